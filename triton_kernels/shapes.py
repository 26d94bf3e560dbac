"""The launch shapes of the metadata kernel, as measured on a GPU by `fa3-metadata tune launch`.

A table has, for FA3's rule (or no splits at all) and for policy "balanced", a pair (SLICE, num_warps) for each GROUP,
and one, "many", for batches above MANY sequences, whose programs are so many that larger slices pay.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .tables import Table, find_table

GROUPS = (32, 64, 128, 256, 512, 1024)
MANY = 1984  # two groups of the most sequences that are sorted together
_WAYS = {"fa3": False, "balanced": True}
_MOST_WARPS = 32


@dataclass(frozen=True)
class Shapes:
    """The launch shapes of one GPU."""

    gpu: str  # where they were measured
    _found: dict[tuple[int, bool, bool], tuple[int, int]]

    def find(self, group: int, balanced: bool, many: bool) -> tuple[int, int]:
        """(SLICE, num_warps) for a GROUP. `many`: the batch has more than MANY sequences."""
        return self._found[group, balanced, many]


def shapes_of(table: Table) -> Shapes:
    """The shapes of a table. Raises `KeyError`, `TypeError` or `ValueError` for one that cannot be used."""
    found = {}
    for way, balanced in _WAYS.items():
        for group in GROUPS:
            shape = _checked(table[way][str(group)], group)
            found[group, balanced, False] = found[group, balanced, True] = shape
        found[GROUPS[-1], balanced, True] = _checked(table[way]["many"], GROUPS[-1])
    return Shapes(table["gpu"], found)


@lru_cache(maxsize=16)
def shipped_shapes(gpu: str) -> Shapes:
    """The shapes to be used on a GPU: tuned on this machine, else shipped, else those of an H200."""
    return shapes_of(find_table("launch", gpu, shapes_of))


def _checked(shape: tuple[int, int], group: int) -> tuple[int, int]:
    """A slice and a number of warps that can be launched."""
    slice_, num_warps = shape
    for value, most in ((slice_, group), (num_warps, _MOST_WARPS)):
        if not isinstance(value, int) or not 1 <= value <= most or value & (value - 1):
            raise ValueError(f"{shape} is no launch shape for GROUP {group}: powers of two are needed")
    return slice_, num_warps
