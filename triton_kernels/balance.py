"""Policy "balanced": what an attention tile costs on a GPU, and how many splits are allowed.

FA3's own rule looks at the batch's total alone. Here the number of key blocks in a split is chosen to minimise the
predicted time of the attention and combine kernels. The model has four constants a kernel, measured by
`fa3-metadata tune balance` and kept in balance_*.json or in the cache folder (tables.py):

    shared_us     a key block when every SM works, that is, at the memory's full bandwidth
    alone_us      a key block on an SM that has the memory to itself
    tile_us       starting and finishing a work tile, whatever its size
    per_split_us  combining, for each split of the sequence with the most

With a share f of the SMs at work a block takes alone_us + (shared_us - alone_us) f^3. reference.py and
balanced_kernel.py compute the prediction, in units of shared_us, in float32. A table is used only if every constant of
every kernel, measured or scaled, is in these units from LEAST_COST to MOST_COST; tile_us and per_split_us may be 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .problem import Problem
from .tables import Table, find_table

NUM_CANDIDATES = 8  # for the key blocks of a split, see reference.py
MOST_FOR_ALL_CANDIDATES = 128  # sequences, a power of two; in larger batches every second is tried: a shorter launch
MOST_QUERY_BLOCKS = 15  # of a sequence that the model counts: more than a call that it serves may have, and four bits
# Bounds of the constants in units of shared_us, far beyond the 0.005 to 50 that GPUs have. The search squares the cost
# of tiles that are 2^31 at most, their sum in int32, times the heads: with 2^11 heads (2^42 MOST_COST)^2, well under
# float32's 2^128. Nothing becomes subnormal, and the cost of a block, which has 1 - alone in it, stays positive.
LEAST_COST, MOST_COST = 2.0**-32, 2.0**16
# Bytes of K and V in a key block, of all kernels of all builds: for which a table must give constants in these bounds.
LEAST_BLOCK_BYTES, MOST_BLOCK_BYTES = 2**12, 2**19
_LEAST_NUMBER, _MOST_NUMBER = 1e-12, 1e12  # of a table, so that no quotient overflows
_MAX_SPLITS = 128  # what FA3's heuristic allows, too
_MIN_COMBINE_SPLITS = 32  # the combine kernel costs the same up to here


@dataclass(frozen=True)
class Costs:
    """The model of one kernel on one GPU. In units of a key block at full bandwidth; all float32 values."""

    tile: float
    alone: float
    per_split: float
    fixed_blocks: int = 0  # key blocks of every split, for batch-invariant schedules; 0: searched for


def costs_of(problem: Problem, kernel: tuple[int, int, int, int, int]) -> Costs:
    """The model of a kernel: (element size, head dim, head dim of v, kBlockM, kBlockN), head dims as compiled.

    A kernel that was not measured gets scaled constants.
    """
    table = constants_of(problem.gpu)
    found = next((one for one in table["kernels"] if tuple(one["kernel"]) == kernel), None)
    if found is None:
        element_size, headdim, headdim_v, _, block_n = kernel
        found = _scaled(table, block_n * (headdim + headdim_v) * element_size)
    fixed = _invariant_blocks(found["tile_us"] / found["shared_us"]) if problem.batch_invariant else 0
    return Costs(**_in_blocks(table, found), fixed_blocks=fixed)


def _in_blocks(table: Table, found: dict[str, float]) -> dict[str, float]:
    """The float32 values of `Costs` for a kernel's constants."""
    times = {"tile": found["tile_us"], "alone": found["alone_us"], "per_split": table["per_split_us"]}
    return {name: _float32(time / found["shared_us"]) for name, time in times.items()}


def _scaled(table: dict[str, Any], block_bytes: int) -> dict[str, float]:
    """Constants for a kernel from the GPU's bandwidth, and from what measured kernels have in common."""
    shared = block_bytes * table["num_sms"] / (table["bandwidth_gb_s"] * 1e3)
    kernels = table["kernels"]
    alone = sum(one["alone_us"] / one["shared_us"] for one in kernels) / len(kernels)
    return {
        "shared_us": shared,
        "alone_us": shared * alone,
        "tile_us": sum(k["tile_us"] for k in kernels) / len(kernels),
    }


def _invariant_blocks(tile: float) -> int:
    """Key blocks of a split that does not depend on the batch: a tile's fixed cost is an eighth of it."""
    return max(1, round(8 * tile))


def balanced_num_splits(problem: Problem, tiles_of_a_sequence: int, num_n_blocks: int, num_sms: int, fa3: int) -> int:
    """The bound on splits, from static facts alone; `fa3` is what FA3's heuristic says."""
    tiles = max(1, tiles_of_a_sequence)
    # Splits that let the longest sequence fill the SMs; the combine kernel's cost rises at powers of two.
    useful = max(_MIN_COMBINE_SPLITS, 1 << (fa3 - 1).bit_length())
    if problem.value_headdim <= 64:  # a combine kernel whose cost grows fast with the bound
        useful = _MIN_COMBINE_SPLITS
    useful = min(useful, _MAX_SPLITS, max(num_n_blocks, 1))
    if problem.batch_invariant:  # the bound, too, must not depend on the batch
        return useful
    few = problem.batch_size * tiles * 3 <= 2 * num_sms
    if fa3 == 1 and not few:
        return 1  # a single split needs no combine kernel
    rows = problem.batch_size * problem.max_seqlen_q * problem.num_heads
    row_bytes = 4 * (problem.value_headdim + 1)  # the partial output and its log-sum-exp, in float32
    return max(1, min(useful, problem.max_partial_bytes // max(1, rows * row_bytes)))


@lru_cache(maxsize=16)
def constants_of(gpu: str) -> dict[str, Any]:
    """The constants of a GPU: tuned on this machine, else shipped, else those of an H200."""
    return find_table("balance", gpu, check_constants)


def check_constants(table: Table) -> None:
    """Raise `KeyError`, `TypeError` or `ValueError` for a table that `costs_of` cannot use, whatever the kernel."""
    for name in ("num_sms", "bandwidth_gb_s"):
        _check_number(name, table[name])
    _check_number("per_split_us", table["per_split_us"], or_zero=True)
    kernels = table["kernels"]
    if not isinstance(kernels, list) or not kernels:
        raise ValueError("kernels must be a list of at least one")
    for one in kernels:
        kernel = one["kernel"]
        if not isinstance(kernel, list) or len(kernel) != 5 or any(type(part) is not int for part in kernel):
            raise ValueError(f"a kernel must be [element size, head dim, head dim of v, kBlockM, kBlockN]: {kernel!r}")
        for name in ("shared_us", "alone_us"):
            _check_number(name, one[name])
        _check_number("tile_us", one["tile_us"], or_zero=True)
    # Scaled constants rise or fall with the size of a block.
    for found in (*kernels, _scaled(table, LEAST_BLOCK_BYTES), _scaled(table, MOST_BLOCK_BYTES)):
        for name, cost in _in_blocks(table, found).items():
            if not LEAST_COST <= cost <= MOST_COST and (name == "alone" or cost != 0):
                kernel = found.get("kernel", "a kernel that was not measured")
                raise ValueError(
                    f"{name}_us must be from {LEAST_COST:g} to {MOST_COST:g} times shared_us, got {cost:g} for {kernel}"
                )


def _check_number(name: str, value: Any, or_zero: bool = False) -> None:
    """Raise `ValueError` unless `value` is a number that can be divided and divided by. NaN is in no range."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (_LEAST_NUMBER <= value <= _MOST_NUMBER or (or_zero and value == 0)):
        raise ValueError(f"{name} must be a number from {_LEAST_NUMBER:g} to {_MOST_NUMBER:g}, got {value!r}")


def _float32(value: float) -> float:
    return float(np.float32(value))
