"""A schedule as a compact coloured timeline in the terminal, by rich."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .pictures import MissingExtraError, Panel, colours, headline, legend, subtitle

if TYPE_CHECKING:
    from rich.console import Console

_MOST_LINES = 22
_IDLE, _BEFORE, _COMBINE = -1, -2, -3  # cells that show no sequence
_LOOKS = {_IDLE: "#303030", _BEFORE: "#585858", _COMBINE: "#a0a0a0"}


def check_terminal() -> None:
    """Raise `MissingExtraError` without rich."""
    try:
        import rich.console  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"--timeline needs rich: pip install rich ({error})") from None


def print_timelines(panels: Sequence[Panel], lengths: Sequence[Sequence[int]], console: Console | None = None) -> None:
    """Each panel as lines of blocks, each line two groups of SMs, on one time axis.

    `lengths`: keys of each sequence, of each panel. Raises `MissingExtraError` without rich.
    """
    check_terminal()
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False)
    width = max(20, min(console.width, 160) - 10)
    longest = max(panel.simulation.time_us for panel in panels)
    for panel, keys in zip(panels, lengths, strict=True):
        s = panel.simulation
        columns = max(1, round(width * s.time_us / longest))
        cells = grid(panel, columns, 2 * min(_MOST_LINES, -(-s.num_sms // 2)))
        of = colours(s)
        console.print(Text(panel.label, style="bold"), Text(subtitle(s)), sep="\n", soft_wrap=True)
        per_row = s.num_sms / len(cells)
        for at in range(0, len(cells), 2):
            line = Text().append(f"SM {int(at * per_row):>3} ", style="dim")
            pairs = zip(cells[at].tolist(), cells[at + 1].tolist(), strict=True)
            for (upper, lower), run in groupby(pairs):
                line.append("▀" * len(list(run)), style=f"{_look(upper, of)} on {_look(lower, of)}")
            console.print(line, soft_wrap=True)
        scale = f"0 us{f'{s.time_us:.1f} us':>{max(columns - 4, 8)}}"
        console.print(Text(" " * 7 + scale, style="dim"), soft_wrap=True)
        shown = Text(" " * 7)
        for colour, said in legend(s, keys, most=4):
            shown.append("█ ", style=colour).append(said + "   ")
        shown.append("█ ", style=_LOOKS[_IDLE]).append("idle   ")
        shown.append("█ ", style=_LOOKS[_BEFORE]).append("launch   ")
        if s.combine_us:
            shown.append("█ ", style=_LOOKS[_COMBINE]).append("combining")
        console.print(shown)
    console.print(Text(headline(panels), style="bold"), soft_wrap=True)


def _look(cell: int, of: Sequence[str]) -> str:
    return _LOOKS[cell] if cell < 0 else of[cell]


def grid(panel: Panel, columns: int, rows: int) -> NDArray[np.int64]:
    """[rows, columns] what most of the time of a group of SMs goes to: a sequence, or one of the numbers below zero."""
    s = panel.simulation
    step = s.time_us / columns
    centres = (np.arange(columns) + 0.5) * step
    # One SM stands for its group: the middle one.
    chosen = np.minimum(((np.arange(rows) + 0.5) * s.num_sms / rows).astype(int), s.num_sms - 1)
    cells = np.full((rows, columns), _IDLE)
    for row, sm in enumerate(chosen.tolist()):
        own = np.flatnonzero(s.sm == sm)
        at = np.searchsorted(s.start[own], centres, side="right") - 1
        runs = (at >= 0) & (centres < s.end[own][np.maximum(at, 0)]) if len(own) else np.zeros(columns, bool)
        if len(own):
            cells[row] = np.where(runs, s.tiles.sequence[own][np.maximum(at, 0)], _IDLE)
    cells[:, centres < s.costs.launch] = _BEFORE
    cells[:, centres >= s.attention_us] = _COMBINE
    return cells
