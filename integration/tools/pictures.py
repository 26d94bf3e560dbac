"""What all pictures of a schedule share: panels, colours, and the headline."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cards import CARDS
from .simulator import Simulation

SUFFIXES = (".png", ".svg", ".pdf", ".html")
# Colours that colour-blind readers can tell apart, for the sequences with the most work; tints for all others.
STRONG = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#A65628")
PALE = ("#AFC3D2", "#C9D6DF", "#98B0C2", "#BCCAD6")


class MissingExtraError(ImportError):
    """A picture needs a package that is not installed."""


@dataclass(frozen=True, eq=False)
class Panel:
    """One timeline of a picture."""

    label: str  # in what it differs from the others, such as "policy balanced"
    simulation: Simulation


def pyplot() -> Any:
    """matplotlib's, without a display. Raises `MissingExtraError`."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as found
    except ImportError as error:
        raise MissingExtraError(f"a picture needs matplotlib: pip install matplotlib ({error})") from None
    return found


def check_picture(path: pathlib.Path) -> None:
    """Raise `ValueError` for a file whose kind is not known, `MissingExtraError` for one that cannot be drawn here."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--plot must name a file that ends in {', '.join(SUFFIXES)}, got {path}")
    if path.suffix.lower() != ".html":
        pyplot()


def ranks(simulation: Simulation) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[b] the place of each sequence by the key blocks read for it, the most first."""
    work = np.bincount(simulation.tiles.sequence, simulation.tiles.blocks, minlength=simulation.problem.batch_size)
    found = np.empty(len(work), np.int64)
    found[np.argsort(-work, kind="stable")] = np.arange(len(work))
    return found


def colours(simulation: Simulation) -> list[str]:
    """[b] a colour for each sequence: strong ones for those with the most work."""
    return [STRONG[rank] if rank < len(STRONG) else PALE[rank % len(PALE)] for rank in ranks(simulation).tolist()]


def paler(colour: str) -> str:
    """A third of the way to white."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{part + (255 - part) // 3:02X}" for part in parts)


def card_name(simulation: Simulation) -> str:
    """Such as "H200"; says whose constants it goes by where these are another card's."""
    gpu, of = simulation.problem.gpu, simulation.costs.measured_on
    short = {card.name: card.short_name for card in CARDS.values()}
    name = short.get(gpu, gpu.removeprefix("NVIDIA "))
    return name if gpu == of else f"{name}, by constants of {short.get(of, of)}"


def headline(panels: Sequence[Panel]) -> str:
    """The number that matters, in words."""
    first = panels[0]
    on = card_name(first.simulation)
    if len(panels) == 1:
        s = first.simulation
        return f"{s.time_us:.1f} us a layer predicted on {on}; the SMs work {s.busy_share:.0%} of the time"
    last = panels[-1]
    before, after = first.simulation.time_us, last.simulation.time_us
    other = card_name(last.simulation)
    where = f"on {on}" if on == other else f"on {on} and {other}"
    said = f"{last.label} {after:.1f} us a layer, {first.label} {before:.1f} us"
    if abs(before / after - 1) < 0.005:
        return f"{said}: no difference, predicted {where}"
    times, how = max(before, after) / min(before, after), "faster" if after < before else "slower"
    return f"{said}: {times:.2f} x {how}, predicted {where}"


def subtitle(simulation: Simulation) -> str:
    """A line of facts under a panel's label."""
    s = simulation
    idle = f", {s.idle_sms} of {s.num_sms} SMs without work" if s.idle_sms else ""
    return (
        f"{s.time_us:.1f} us: {len(s.tiles):,} tiles in {s.waves:.2f} waves, SMs at work {s.busy_share:.0%}{idle}, "
        f"{s.bytes_read / 1e6:,.1f} MB of KV, combining {s.combine_us:.1f} us"
    )


def legend(simulation: Simulation, lengths_k: Sequence[int], most: int = len(STRONG)) -> list[tuple[str, str]]:
    """(colour, words) for the sequences that have a colour of their own, and the rest."""
    found, place, tiles = [], ranks(simulation), simulation.sequence_tiles()
    splits = np.empty(len(place), np.int64)
    splits[simulation.schedule.order] = simulation.schedule.splits
    for sequence in np.argsort(place)[:most].tolist():
        said = f"sequence {sequence}: {lengths_k[sequence]:,} keys, "
        said += f"{splits[sequence]} splits" if splits[sequence] > 1 else "not split"
        found.append((STRONG[place[sequence]], said + f", {tiles[sequence]:,} tile{'s' * (int(tiles[sequence]) != 1)}"))
    if len(place) > most:
        found.append((PALE[0], f"{len(place) - most:,} more sequences"))
    return found
