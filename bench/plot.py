"""Draw what `python -m bench metadata` measured: device time in a CUDA graph, and host time, by batch size.

python -m bench plot                        # the newest of bench/results, drawn beside it
python -m bench plot metadata.csv --out DIR
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from .rows import Row, read_csv

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
TITLES = {
    "graph": "Device time of the scheduler metadata in a CUDA graph",
    "host": "Host time of making the scheduler metadata",
}
# name, colour, marker: colours that colour-blind readers can tell apart; empty kernels in grey
_LOOKS = {
    "ours": ("this project: plan.update", "#0072B2", "o"),
    "ours_out": ("this project: get_scheduler_metadata", "#56B4E9", "s"),
    "native": ("FA3's own op", "#D55E00", "^"),
    "sglang": ("SGLang: own op, copy, zero fill", "#CC79A7", "D"),
    "flag_gems": ("FlagGems", "#009E73", "v"),
    "floor": ("an empty Triton kernel", "#888888", ""),
}
_ALIKE_ON_DEVICE = "ours_out"  # the same kernel as "ours"
_WIDE = 12  # times from the fastest to the slowest: a log axis shows them better


def draw(made_on: Mapping[str, str], rows: Sequence[Row], metric: str, path: pathlib.Path) -> None:
    """One PNG: medians as lines, the 20th to the 80th percentile as a band. Outputs that differ from ours are left out.

    Raises `ImportError` without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    drawn = [row for row in rows if row.metric == metric and row.p50 is not None and row.equal is not False]
    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(8, 5), dpi=160)
        for name, (label, colour, marker) in _LOOKS.items():
            if metric != "graph" or name != _ALIKE_ON_DEVICE:
                _line(axes, [row for row in drawn if row.peer == name], label, colour, marker)
        batches = sorted({row.batch for row in drawn})
        axes.set_xscale("log", base=2)
        axes.set_xticks(_apart(batches), [str(batch) for batch in _apart(batches)])
        axes.set_xlabel("batch size, sequences")
        medians = [row.p50 for row in drawn if row.p50]
        if max(medians) > _WIDE * min(medians):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda time, _: f"{time:g}"))
        else:
            axes.set_ylim(bottom=0)
        axes.minorticks_off()
        axes.set_ylabel("µs a call")
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_title(TITLES[metric], loc="left", fontweight="bold", pad=30)
        axes.text(0, 1.02, _made_on(made_on), transform=axes.transAxes, fontsize=7.5, color="#555555")
        axes.legend(frameon=False, fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.13))
        figure.tight_layout()
        figure.savefig(path)
        pyplot.close(figure)


def _line(axes: Any, rows: Sequence[Row], label: str, colour: str, marker: str) -> None:
    if not rows:
        return
    x = [row.batch for row in rows]
    look = {"linewidth": 1.8, "markersize": 4} if marker else {"linewidth": 1.2, "linestyle": "--"}
    axes.plot(x, [row.p50 for row in rows], label=label, color=colour, marker=marker or None, **look)
    axes.fill_between(x, [row.p20 for row in rows], [row.p80 for row in rows], color=colour, alpha=0.15, linewidth=0)


def _apart(batches: Sequence[int]) -> list[int]:
    """Batch sizes whose labels do not touch: 992 and 1024 would."""
    kept: list[int] = []
    for batch in batches:
        if not kept or batch >= 1.5 * kept[-1]:
            kept.append(batch)
    return kept


def _made_on(made_on: Mapping[str, str]) -> str:
    versions = [f"{name} {made_on[name]}" for name in ("torch", "triton") if name in made_on]
    parts = [made_on.get("gpu", ""), *versions, made_on.get("fa3", ""), made_on.get("date", "")]
    problem = made_on.get("problem", "").split(";")[0]
    return ", ".join(part for part in parts if part) + (f"\n{problem}" if problem else "")


def newest() -> pathlib.Path | None:
    """What `metadata` wrote last, if it has not been told where to."""
    found = sorted(RESULTS.glob("*/metadata*.csv"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def main(argv: list[str] | None = None) -> int:
    """The exit status: 2 where there is nothing to draw, or nothing to draw with."""
    parser = argparse.ArgumentParser(prog="python -m bench plot", description="Draw what `metadata` measured.")
    parser.add_argument("csv", type=pathlib.Path, nargs="?", help="default: the newest bench/results/*/metadata*.csv")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the PNG files; default: that of the CSV file")
    options = parser.parse_args(argv)
    path = options.csv or newest()
    if path is None:
        parser.error("there is no bench/results/*/metadata*.csv yet: run `python -m bench metadata` first")
    try:
        made_on, rows = read_csv(path)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    folder = options.out or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    for metric in TITLES:
        if not any(row.metric == metric and row.p50 is not None and row.equal is not False for row in rows):
            parser.error(f"{path} has no times of metric {metric}")
        target = folder / f"{path.stem}-{metric}.png"
        try:
            draw(made_on, rows, metric, target)
        except ImportError as error:
            print(f"python -m bench plot needs matplotlib (pip install matplotlib): {error}", file=sys.stderr)
            return 2
        print(target)
    return 0
