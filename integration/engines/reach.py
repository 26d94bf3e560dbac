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


def coverage_table(reached: list[Reach]) -> str:
    """As a table in Markdown."""
    lines = ["| layers | in a full CUDA graph | eagerly, piecewise | because |", "|---|---|---|---|"]
    lines += [f"| {one.layers} | {one.in_graph} | {one.eagerly} | {one.because} |" for one in reached]
    return "\n".join(lines)
