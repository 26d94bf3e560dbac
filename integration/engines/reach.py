"""Which layers of an engine get our metadata: how that is said of every engine."""

from __future__ import annotations

from dataclasses import dataclass

OURS, THEIRS, NONE = "ours", "theirs", "none"


@dataclass(frozen=True)
class Reach:
    """Where the metadata of a kind of layer comes from: "ours", "theirs" (the engine makes it), "none" (FA3 alone)."""

    layers: str
    in_graph: str  # in a full CUDA graph
    eagerly: str  # run eagerly, or between the pieces of piecewise CUDA graphs
    because: str
    invariant: str = ""  # whether `batch_invariant` holds there; "": it is not offered


def coverage_table(reached: list[Reach]) -> str:
    """As a table in Markdown."""
    heads = ["layers", "in a full CUDA graph", "eagerly, piecewise", "because"]
    rows = [[one.layers, one.in_graph, one.eagerly, one.because] for one in reached]
    if any(one.invariant for one in reached):
        heads.append("batch invariant, if asked for")
        rows = [[*row, one.invariant or "no"] for row, one in zip(rows, reached, strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)).replace(" --- ", "---")
