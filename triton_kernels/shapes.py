"""The launch shapes of the metadata kernel, as measured on a GPU by `fa3-metadata tune launch`.

A table has, for FA3's rule (or no splits at all) and for policy "balanced", a pair (SLICE, num_warps) for each GROUP,
and one, "many", for batches above MANY sequences, whose programs are so many that larger slices pay.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

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


def _checked(shape: Any, group: int) -> tuple[int, int]:
    """A slice and a number of warps that can be launched. Raises `ValueError`."""
    pair = isinstance(shape, list | tuple) and len(shape) == 2
    if not pair or not _is_power_of_two(shape[0], group) or not _is_power_of_two(shape[1], _MOST_WARPS):
        raise ValueError(
            f"a shape for GROUP {group} must be two powers of two, up to {group} and {_MOST_WARPS}, got {shape!r}"
        )
    return shape[0], shape[1]


def _is_power_of_two(value: Any, most: int) -> bool:
    return type(value) is int and 1 <= value <= most and not value & (value - 1)  # True is no number
