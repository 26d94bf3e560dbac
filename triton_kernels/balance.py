"""Policy "balanced": what an attention layer costs on a GPU, and how many splits are allowed.

FA3's own rule looks at the batch's total alone. Here the number of key blocks in a split is chosen to minimise the
time that a law of the GPU predicts. Work tiles go, the largest first, to the SM that is free first; every tile costs
`tile` besides its key blocks; and while a of n SMs work, a key block takes

    (alone^p + (shared a / n)^p)^(1/p),    shared = bytes of a block * n / bandwidth

as the SMs share the memory's bandwidth, softly. Bandwidth, p and what combining takes are a card's, alone and tile a
kernel's. With c key blocks a split there are b "big" tiles for each SM, those of more than c / 2, of the mean cost m,
and the rest, s in all for each SM. As the big ones go first, they come in waves. With d = c + tile - m:

    full waves   all but the last r of b are done at full rate: m b - r l, with l = m, or m - 2 d / b in a later wave:
                 the tiles that are left over are the smallest
    last wave    h = c + tile high, or l in a later wave. Of two halves of h, SMs are busy in the lower with a share
                 r + s / (h / 2), in the upper with r (l / (h / 2) - 1); what is more than 1 moves up
    overhang     m' - 2 d, with m' the mean of the rest, half of it, alone: where the SMs that have no big one of the
                 last wave cannot do the rest while that lasts, m (l in a later wave)

Combining costs split_us for each split of the sequence with the most, and something by itself, unless nothing is split.
FA3's combine kernel takes 8 output rows of a sequence at a time, 16 where a row of v is 64 numbers or fewer. Rows that
are none it combines, too, of as many splits as it is compiled for: the next power of two of the bound, from 32 on (from
16 in the second case; flash_fwd_combine_kernel.h leaves what it reads of them as it was). So with four query heads, or
with eight of 64, a bound of 128 costs 4 us more than one of 32, where there are few splits.

Where there are at most as many tiles as SMs, that is the law itself but for what it makes of sizes between. The
numbers are measured, by `fa3-metadata tune balance`, and kept in balance_*.json or in the cache folder (tables.py).
A card that was not measured takes the constants of one that was, with its own bandwidth and SMs (card.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .card import peak_gb_s
from .problem import Problem
from .tables import Table, find_table

NUM_CANDIDATES = 8  # for the key blocks of a split: candidate_of
MOST_FOR_ALL_CANDIDATES = 128  # sequences, a power of two; in larger batches every second is tried: a shorter launch
# Candidate k: so many 64ths of an SM's load, rounded up, and so many key blocks more. The first, 1.1 exactly, is FA3's.
CANDIDATES = ((70, 0), (72, 1), (94, 0), (72, 5), (37, 3), (37, 0), (19, 6), (16, 3))
CLEAR_GAIN = 1.01  # FA3's is left only for one that is predicted to take this part less
MOST_QUERY_BLOCKS = 15  # of a sequence that the model counts: more than a call that it serves may have, and four bits
# Bounds of `Costs`, far beyond what GPUs have (alone 0.2 to 2, tile 0.1 to 3), with which nothing overflows: the search
# multiplies two numbers of tiles, 2^31 each, times 2^11 heads each. A table is refused where they are exceeded, and a
# kernel or a number of SMs that no table was checked for keeps to them.
LEAST_ALONE, MOST_ALONE, MOST_COST = 2.0**-6, 2.0**10, 2.0**16
_LEAST_NUMBER, _MOST_NUMBER = 1e-12, 1e12  # of a table, so that no quotient overflows
_MAX_SPLITS = 128  # what FA3's heuristic allows, too
_MIN_COMBINE_SPLITS = 32  # that the combine kernel is compiled for
_COMBINE_US, _ROW_US = 0.98, 0.00047  # that it costs by itself, and for each output row, on both cards
_SPARE_ROW_US = 0.04  # for each split that is combined of a row that is none, by sweeps on an H100
# A decode layer that is as short as they come: what a bound costs there is weighed against what it gains elsewhere.
_SHORT_LAYER_US, _LAUNCH_US = 8.0, 5.0
_LEAST_INVARIANT, _MOST_INVARIANT = 4, 8  # key blocks: by the law the best over many batches, whatever the kernel


@dataclass(frozen=True)
class Costs:
    """The model of one kernel on one GPU. In key blocks while all SMs work, or that time; all float32 values."""

    tile: float
    block: tuple[float, float, float, float]  # with a share f of the SMs at work: [0] + [1] f + [2] f^2 + [3] f^3
    per_split: float
    fixed_blocks: int = 0  # key blocks of every split, for batch-invariant schedules; 0: searched for
    block_us: float = 1.0  # of a key block while all SMs work
    combine: float = 0.0  # that something is split at all
    least_splits: float = 0.0  # what all splits cost together at least

    @property
    def alone(self) -> float:
        """A key block on an SM that has the memory to itself."""
        return self.block[0]


def costs_of(problem: Problem, kernel: tuple[int, int, int, int, int], num_sms: int, bound: int = 1) -> Costs:
    """The model of a kernel: (element size, head dim, head dim of v, kBlockM, kBlockN), head dims as compiled.

    A kernel that was not measured gets scaled constants. `bound`: on splits; while it is not known, the least.
    """
    least_us = least_combined_us(problem, bound)
    return costs_from(constants_of(problem.gpu), kernel, num_sms, problem.batch_invariant, least_us)


def costs_from(
    table: Table, kernel: tuple[int, ...], num_sms: int, batch_invariant: bool = False, least_us: float = 0.0
) -> Costs:
    """The same by the constants of a table; `least_us`: what all splits cost at least (least_combined_us)."""
    found = kernel_constants(table, kernel)
    size, num_sms = block_bytes(kernel), max(num_sms, 1)
    alone, tile, per_split, full = _in_blocks(table, found, size, num_sms)
    tile = min(tile, MOST_COST)
    block = _cubic(min(max(alone, LEAST_ALONE), MOST_ALONE), table["softness"])
    fixed = _invariant_blocks(tile) if batch_invariant else 0
    block_us = full * _shared_us(table, size, num_sms)
    return Costs(
        _float32(tile), block, _float32(min(per_split / full, MOST_COST)), fixed, block_us,
        _float32(min(_COMBINE_US / block_us, MOST_COST)), _float32(min(least_us / block_us, MOST_COST)),
    )  # fmt: skip


def has_spare_rows(problem: Problem) -> bool:
    """Whether the combine kernel takes rows of a sequence together of which some are none."""
    ragged = problem.has_cu_seqlens_q or problem.has_seqused_q
    rows = problem.num_heads * (1 if ragged else problem.max_seqlen_q)
    return rows % (16 if problem.value_headdim <= 64 else 8) != 0


def _in_blocks(table: Table, found: Table, size: int, num_sms: int) -> tuple[float, float, float, float]:
    """In units of a block's time at the memory's bandwidth: alone, tile, a split, and a block while all SMs work."""
    shared = _shared_us(table, size, num_sms)
    alone, p = found["alone_us"] / shared, table["softness"]
    bounded = min(max(alone, LEAST_ALONE), MOST_ALONE)
    return alone, found["tile_us"] / shared, table["split_us"] / shared, (bounded**p + 1) ** (1 / p)


def _shared_us(table: Table, size: int, num_sms: int) -> float:
    """What a block of so many bytes takes while all SMs work, by the memory's bandwidth."""
    return float(size * num_sms / (table["bandwidth_gb_s"] * 1e3))


@lru_cache(maxsize=256)
def _cubic(alone: float, p: float) -> tuple[float, float, float, float]:
    """The polynomial nearest to the law, relatively, over shares of the SMs from 0 to 1; exact where all work."""
    share = np.linspace(0, 1, 33)
    law = ((alone**p + share**p) / (alone**p + 1)) ** (1 / p)
    powers = share[:, None] ** np.arange(1, 4)
    rise = np.linalg.lstsq((powers - 1) / law[:, None], (law - 1) / law, rcond=None)[0]
    return _float32(max(1 - rise.sum(), 0.0)), _float32(rise[0]), _float32(rise[1]), _float32(rise[2])


def block_bytes(kernel: tuple[int, ...]) -> int:
    """Bytes of K and V in a key block."""
    element_size, headdim, headdim_v, _, block_n = kernel
    return block_n * (headdim + headdim_v) * element_size


def kernel_constants(table: Table, kernel: tuple[int, ...]) -> Table:
    """alone_us and tile_us of a kernel: measured, else scaled."""
    return next((one for one in table["kernels"] if tuple(one["kernel"]) == kernel), None) or _scaled(table, kernel)


def _scaled(table: Table, kernel: tuple[int, ...]) -> Table:
    """Constants of a kernel from what measured ones have in common: a line through the times of their blocks."""
    sizes = np.array([block_bytes(tuple(one["kernel"])) for one in table["kernels"]], float)
    times = np.array([one["alone_us"] for one in table["kernels"]], float)
    spread = ((sizes - sizes.mean()) ** 2).sum()
    slope = ((sizes - sizes.mean()) * (times - times.mean())).sum() / spread if spread else 0.0
    alone = times.mean() + slope * (block_bytes(kernel) - sizes.mean())
    return {
        "alone_us": float(np.clip(alone, times.min() / 4, times.max() * 4)),
        "tile_us": float(np.median([one["tile_us"] for one in table["kernels"]])),
    }


def _invariant_blocks(tile: float) -> int:
    """Key blocks of a split that does not depend on the batch: a tile's fixed cost is an eighth of it, or so."""
    return max(_LEAST_INVARIANT, min(round(8 * tile), _MOST_INVARIANT))


def combined_us(problem: Problem, bound: int, splits: int, split_us: float) -> float:
    """Of the combine kernel: what it takes for the splits of the sequence with the most, by the bound and split_us."""
    return max(split_us * splits, least_combined_us(problem, bound))


def least_combined_us(problem: Problem, bound: int) -> float:
    """What it takes for rows that are none, whatever the splits."""
    if not has_spare_rows(problem):
        return 0.0
    least = _MIN_COMBINE_SPLITS // (2 if problem.value_headdim <= 64 else 1)
    return _SPARE_ROW_US * max(least, 1 << (bound - 1).bit_length())


def balanced_num_splits(
    problem: Problem, costs: Costs, tiles_of_a_sequence: int, num_n_blocks: int, num_sms: int, fa3: int
) -> int:
    """The bound on splits, from static facts alone; `fa3` is what FA3's heuristic says."""
    tiles = max(1, tiles_of_a_sequence)
    rows = problem.batch_size * problem.max_seqlen_q * problem.num_heads
    if fa3 == 1 and not _pays(costs, problem.batch_size * tiles, num_n_blocks, num_sms, rows):
        return 1  # a single split needs no combine kernel
    useful = _useful_splits(fa3)
    if has_spare_rows(problem):
        useful = _least_regret(costs, tiles, num_n_blocks, num_sms, useful)
    useful = min(useful, max(num_n_blocks, 1))
    row_bytes = 4 * (problem.value_headdim + 1)  # the partial output and its log-sum-exp, in float32
    return max(1, min(useful, problem.max_partial_bytes // max(1, rows * row_bytes)))


def _pays(costs: Costs, tiles: int, num_n_blocks: int, num_sms: int, rows: int) -> bool:
    """Whether splitting gains more than the combine kernel costs, where all sequences have as many key blocks."""
    splits = np.arange(1, min(num_n_blocks, num_sms // max(tiles, 1)) + 1)
    if len(splits) < 2:
        return False
    share = tiles * splits / num_sms
    block = sum(factor * share**power for power, factor in enumerate(costs.block))
    time = (-(-num_n_blocks // splits) + costs.tile) * block
    combine = np.maximum(costs.per_split * splits, costs.least_splits) + costs.combine + rows * _ROW_US / costs.block_us
    return bool((time + combine)[1:].min() < time[0])


def invariant_num_splits(problem: Problem, num_n_blocks: int, fa3: int) -> int:
    """The bound on splits of every batch of a layer; `num_n_blocks` and `fa3` must be the same for all of them.

    A window of few key blocks is never split into more than it has room for, at the fewest key blocks of a split.
    """
    useful = min(_useful_splits(fa3), 2 * _MIN_COMBINE_SPLITS if has_spare_rows(problem) else _MAX_SPLITS)
    return min(useful, -(-(num_n_blocks + 1) // _LEAST_INVARIANT))


def _useful_splits(fa3: int) -> int:
    """Splits that let the longest sequence fill the SMs, up to the next power of two, which costs no more."""
    return min(max(_MIN_COMBINE_SPLITS, 1 << (fa3 - 1).bit_length()), _MAX_SPLITS)


def _least_regret(costs: Costs, tiles: int, num_n_blocks: int, num_sms: int, useful: int) -> int:
    """A bound up to `useful` where it costs time: lengths are not known, so what can be lost by it is kept least.

    Of the two extremes, a short layer, for which every bound is wide enough, and one sequence as long as they may be,
    of so many tiles if it is not split.
    """
    bounds = [1 << k for k in range(5, 8) if 1 << k <= useful]

    def longest(bound: int) -> float:
        splits = max(min(bound, num_n_blocks, num_sms // tiles), 1)  # more would come in two waves
        share = min(tiles * splits / num_sms, 1.0)
        block = sum(factor * share**power for power, factor in enumerate(costs.block))
        attention = (-(-num_n_blocks // splits) + costs.tile) * block
        # What real rows take for more splits than some 16 is left out: of a head dim of 64, half of split_us or less.
        return _LAUNCH_US + attention * costs.block_us + _SPARE_ROW_US * bound

    short = {bound: _SHORT_LAYER_US + _SPARE_ROW_US * bound for bound in bounds}
    long = {bound: longest(bound) for bound in bounds}
    least = min(short.values()), min(long.values())
    return min(bounds, key=lambda bound: max(short[bound] / least[0], long[bound] / least[1]))


@lru_cache(maxsize=64)
def constants_of(gpu: str) -> Table:
    """The constants of a GPU: tuned on this machine, else shipped, else an H200's with its own bandwidth.

    An H200's were seen to serve an H100 that way, and either's to serve a part of its SMs.
    """
    table = find_table("balance", gpu, check_constants)
    peak = peak_gb_s(gpu) if table["gpu"] != gpu else None
    if peak is None:
        return table
    return table | {"bandwidth_gb_s": peak * table["bandwidth_gb_s"] / table["peak_gb_s"]}


def check_constants(table: Table) -> None:
    """Raise `KeyError`, `TypeError` or `ValueError` for a table that `costs_of` cannot use."""
    for name in ("num_sms", "bandwidth_gb_s", "peak_gb_s"):
        _check_number(name, table[name])
    _check_number("split_us", table["split_us"], or_zero=True)
    _check_number("softness", table["softness"])
    if not 1 <= table["softness"] <= 16:
        raise ValueError(f"softness must be from 1 to 16, got {table['softness']!r}")
    kernels = table["kernels"]
    if not isinstance(kernels, list) or not kernels:
        raise ValueError("kernels must be a list of at least one")
    for one in kernels:
        _check_kernel(table, one)


def _check_kernel(table: Table, one: Table) -> None:
    kernel = one["kernel"]
    if not isinstance(kernel, list) or len(kernel) != 5 or any(type(part) is not int for part in kernel):
        raise ValueError(f"a kernel must be [element size, head dim, head dim of v, kBlockM, kBlockN]: {kernel!r}")
    if not all(0 < part <= 1024 for part in kernel):
        raise ValueError(f"the numbers of a kernel must be from 1 to 1024: {kernel!r}")
    _check_number("alone_us", one["alone_us"])
    _check_number("tile_us", one["tile_us"], or_zero=True)
    alone, tile, split, _ = _in_blocks(table, one, block_bytes(tuple(kernel)), table["num_sms"])
    bounds = (LEAST_ALONE, MOST_ALONE), (0.0, MOST_COST), (0.0, MOST_COST)
    for name, cost, (least, most) in zip(
        ("alone_us", "tile_us", "split_us"), (alone, tile, split), bounds, strict=True
    ):
        if not least <= cost <= most:
            raise ValueError(
                f"{name} must be from {least:g} to {most:g} times a block at the bandwidth, got {cost:g} for {kernel}"
            )


def _check_number(name: str, value: Any, or_zero: bool = False) -> None:
    """Raise `ValueError` unless `value` is a number that can be divided and divided by. NaN is in no range."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (_LEAST_NUMBER <= value <= _MOST_NUMBER or (or_zero and value == 0)):
        raise ValueError(f"{name} must be a number from {_LEAST_NUMBER:g} to {_MOST_NUMBER:g}, got {value!r}")


def _float32(value: float) -> float:
    return float(np.float32(value))
