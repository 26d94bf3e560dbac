"""Pictures of a schedule by matplotlib: a timeline of the SMs, bars of times, a trace over its steps."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..triton_kernels.reference import sequence_lengths
from .pictures import Panel, colours, headline, legend, paler, pyplot, subtitle

_MOST_VECTORS = 6000  # tiles; more of them are drawn as pixels, in an SVG too
_STYLE: dict[str, Any] = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none",
    "hatch.linewidth": 0.4,
}  # fmt: skip
_IDLE, _LAUNCH, _COMBINE = "#B0B0B0", "#E4E4E4", "#7A7A7A"


def draw_timelines(panels: Sequence[Panel], lengths: Sequence[Sequence[int]], path: pathlib.Path, title: str) -> None:
    """One figure: panels under each other on one time axis, a row an SM; under each the key blocks of its tiles.

    `lengths`: keys of each sequence, of each panel. Raises `MissingExtraError` without matplotlib.
    """
    plt = pyplot()
    longest = max(panel.simulation.time_us for panel in panels)
    with plt.rc_context(_STYLE):
        height = 1.0 + 3.9 * len(panels)
        figure, axes = plt.subplots(
            2 * len(panels), 2, figsize=(10.5, height), dpi=130, layout="constrained",
            height_ratios=[3.2, 0.9] * len(panels), width_ratios=[4, 1.15],
        )  # fmt: skip
        for i, (panel, keys) in enumerate(zip(panels, lengths, strict=True)):
            timeline, blocks = axes[2 * i][0], axes[2 * i + 1][0]
            _timeline(timeline, panel, longest)
            _blocks(blocks, panel)
            _legend(axes[2 * i][1], panel, keys)
            axes[2 * i + 1][1].axis("off")
        figure.suptitle(headline(panels) + (f"\n{title}" if title else ""), x=0.01, ha="left", fontsize=10.5)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


def _timeline(axes: Any, panel: Panel, longest: float) -> None:
    from matplotlib.collections import PolyCollection

    s, n = panel.simulation, panel.simulation.num_sms
    launch, end, total = s.costs.launch, s.attention_us, s.time_us
    axes.axvspan(0, launch, color=_LAUNCH, linewidth=0)
    last = np.full(n, launch)
    np.maximum.at(last, s.sm, s.end)
    idle = [_box(last[sm], end, sm) for sm in range(n) if end - last[sm] > 0.004 * total]
    axes.add_collection(PolyCollection(idle, facecolors="none", edgecolors=_IDLE, hatch="////", linewidths=0))
    of, gap = colours(s), 0.0015 * longest  # between tiles of an SM
    boxes = [_box(a, max(b - gap, (a + b) / 2), sm) for a, b, sm in zip(s.start, s.end, s.sm, strict=True)]
    # Every other split is paler, so that they can be told apart where they lie side by side.
    filled = [paler(of[i]) if odd else of[i] for i, odd in zip(s.tiles.sequence, s.tiles.split % 2, strict=True)]
    tiles = PolyCollection(
        boxes, facecolors=filled, linewidths=0, antialiaseds=False, rasterized=len(boxes) > _MOST_VECTORS
    )
    axes.add_collection(tiles)
    named: Any = {"rotation": 90, "ha": "center", "va": "center", "fontsize": 7}
    if s.combine_us:
        axes.axvspan(end, total, color=_COMBINE, alpha=0.55, linewidth=0)
        if s.combine_us > 0.015 * longest:
            axes.text((end + total) / 2, n / 2, "combine", color="white", **named)
    if launch > 0.015 * longest:
        axes.text(launch / 2, n / 2, "launch", color="#777777", **named)
    axes.axvline(total, color="#444444", linewidth=0.8)
    axes.set_xlim(0, longest * 1.015)
    axes.set_ylim(n - 0.5, -0.5)
    axes.set_ylabel("SM")
    axes.set_xlabel("us from the start of the layer")
    axes.set_title(f"{panel.label}\n{subtitle(s)}", loc="left", fontsize=9)


def _box(start: float, end: float, sm: int) -> list[tuple[float, float]]:
    return [(start, sm - 0.5), (end, sm - 0.5), (end, sm + 0.5), (start, sm + 0.5)]


def _blocks(axes: Any, panel: Panel) -> None:
    s = panel.simulation
    from matplotlib.ticker import MaxNLocator

    of, places = colours(s), np.arange(len(s.tiles))
    if len(places) <= 1500:
        width = max(1.0, len(places) / 350)  # wide enough to be seen
        axes.bar(places, s.tiles.blocks, width=width, color=[of[i] for i in s.tiles.sequence], linewidth=0)
    else:  # more bars than pixels
        axes.fill_between(places, s.tiles.blocks, step="mid", color="#98B0C2", linewidth=0, rasterized=True)
    axes.set_xlim(-0.5, max(len(places) - 0.5, 0.5))
    if len(places) and s.tiles.blocks.max() > 30 * max(float(np.median(s.tiles.blocks)), 1):
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("key blocks")
    axes.set_xlabel("tiles in FA3's order")


def _legend(axes: Any, panel: Panel, keys: Sequence[int]) -> None:
    from matplotlib.patches import Patch

    axes.axis("off")
    shown = [Patch(color=colour, label=said) for colour, said in legend(panel.simulation, keys)]
    shown.append(Patch(facecolor="none", edgecolor=_IDLE, hatch="////", label="idle, no tile left", linewidth=0))
    axes.legend(handles=shown, loc="upper left", frameon=False, fontsize=7, borderaxespad=0, handlelength=1.2)


def keys_of(panel: Panel, lengths: Any) -> list[int]:
    """Keys of each sequence."""
    return [int(one) for one in sequence_lengths(panel.simulation.problem, lengths)[1]]


def draw_bars(
    rows: Sequence[str], times: Mapping[str, Sequence[float]], path: pathlib.Path, title: str, note: str = ""
) -> None:
    """Bars of us: a group for each of `rows`, in it one for each key of `times`."""
    plt = pyplot()
    looks = ("#8A8A8A", "#CC79A7", "#0072B2", "#D55E00", "#E69F00", "#009E73")
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            figsize=(9, 1.4 + 0.26 * len(rows) * (len(times) + 1)), dpi=130, layout="constrained"
        )
        width = 0.8 / len(times)
        for i, (name, values) in enumerate(times.items()):
            at = np.arange(len(rows)) + (i - (len(times) - 1) / 2) * width
            bars = axes.barh(at, values, width * 0.92, label=name, color=looks[i % len(looks)])
            axes.bar_label(bars, fmt="%.1f", fontsize=7.5, padding=2)
        axes.set_yticks(np.arange(len(rows)), rows)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("us" + (f"; {note}" if note else ""))
        axes.set_title(title, loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


def draw_steps(
    steps: Sequence[int], series: Mapping[str, Mapping[str, Sequence[float]]], path: pathlib.Path, title: str
) -> None:
    """Lines over the steps of a trace: an axes for each quantity of `series`, in it a line for each name."""
    plt = pyplot()
    looks = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    with plt.rc_context(_STYLE):
        figure, all_axes = plt.subplots(
            len(series),
            1,
            figsize=(9, 1 + 1.9 * len(series)),
            dpi=130,
            layout="constrained",
            sharex=True,
            squeeze=False,
        )
        for axes, (quantity, lines) in zip(all_axes[:, 0], series.items(), strict=True):
            for i, (name, values) in enumerate(lines.items()):
                axes.plot(steps, values, label=name, color=looks[i % len(looks)], linewidth=1.3)
            axes.set_ylabel(quantity)
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
            axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        all_axes[-1, 0].set_xlabel("step")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)
