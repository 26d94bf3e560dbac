"""Every row of every tile table can be reached: one that another row hides would go unnoticed otherwise."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from itertools import combinations

import pytest
from fa3_metadata.triton_kernels import tiles
from fa3_metadata.triton_kernels.builds import RELEASES

HEADDIMS = (64, 96, 128, 192, 256)  # as FA3 rounds them
# No problem has two flags of one of these. The others are independent.
EXCLUSIVE = ({"causal", "local"}, {"dv512", "dv256", "dv<=128"})
TABLES = {name: table for name, table in vars(tiles).items() if re.fullmatch(r"[A-Z][A-Z0-9_]*_(16|8)", name)}


def flag_sets(table: tiles.TileTable, may_be_one_wg: bool) -> Iterator[frozenset[str]]:
    """Every set of the table's flags that a problem may have."""
    flags = {flag.strip() for _, condition, _, _ in table for flag in re.split("[&|]", condition)} - {""}
    if not may_be_one_wg:
        flags.discard("one_wg")
    for count in range(len(flags) + 1):
        for chosen in map(frozenset, combinations(sorted(flags), count)):
            if all(len(chosen & together) <= 1 for together in EXCLUSIVE):
                yield chosen


def dead_rows(table: tiles.TileTable, one_wg_headdims: Container[int] = (64, 128)) -> list[tuple[int, str, int, int]]:
    """The rows of which `find_tile` returns none for any problem."""
    alive = set()
    for headdim in HEADDIMS:
        for flags in flag_sets(table, headdim in one_wg_headdims):
            reached = (i for i in range(len(table)) if finds(table[: i + 1], headdim, flags))
            alive.add(next(reached, None))
    return [row for i, row in enumerate(table) if i not in alive]


def finds(table: tiles.TileTable, headdim: int, flags: frozenset[str]) -> bool:
    try:
        return bool(tiles.find_tile(table, headdim, flags))
    except LookupError:
        return False


@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_reached(name: str) -> None:
    users = [r.rules for r in RELEASES if TABLES[name] in r.rules.sm90_tiles.values()]
    one_wg_headdims = {headdim for rules in users for headdim in rules.one_wg_headdims}
    assert not dead_rows(TABLES[name], one_wg_headdims), f"no problem reaches these rows of {name}"


def test_every_table_is_used_by_a_release() -> None:
    used = [table for r in RELEASES for table in (*r.rules.sm90_tiles.values(), *(r.rules.sm8x_tiles or {}).values())]
    assert all(table in used for table in TABLES.values())
    assert all(table in TABLES.values() for table in used), "it has no name in triton_kernels/tiles.py"


ANY = (256, "", 128, 80)


@pytest.mark.parametrize(
    ("planted", "dead"),
    [
        (((128, "", 128, 176), (64, "", 192, 192), ANY), [(64, "", 192, 192)]),
        (((64, "", 1, 1), (64, "causal", 2, 2), ANY), [(64, "causal", 2, 2)]),
        (((64, "causal & local", 1, 1), ANY), [(64, "causal & local", 1, 1)]),
        (((128, "one_wg", 1, 1), (96, "", 2, 2), (96, "one_wg", 3, 3), ANY), [(96, "one_wg", 3, 3)]),
        (((64, "local | causal", 1, 1), (64, "local & softcap", 2, 2), ANY), [(64, "local & softcap", 2, 2)]),
        (((64, "dv512", 1, 1), (64, "dv512 & dv256", 2, 2), ANY), [(64, "dv512 & dv256", 2, 2)]),
    ],
)
def test_a_row_that_is_hidden_is_found(planted: tiles.TileTable, dead: list[tuple[int, str, int, int]]) -> None:
    assert dead_rows(planted) == dead


def test_a_single_warpgroup_is_for_head_dims_that_have_it() -> None:
    planted = ((64, "one_wg", 1, 1), (128, "one_wg", 2, 2), ANY)
    assert not dead_rows(planted)
    assert dead_rows(planted, one_wg_headdims=(128,)) == [(64, "one_wg", 1, 1)]


def test_the_row_of_head_dim_128_before_that_of_64_is_found() -> None:
    table = tiles.UPSTREAM_16
    first = next(i for i, row in enumerate(table) if row[0] == 128 and row[1] == "")
    planted = (table[first], *table[:first], *table[first + 1 :])
    assert {row[0] for row in dead_rows(planted)} == {64, 96, 128}
