"""Policy "balanced": what an attention tile costs on a GPU, and how many splits are allowed.

FA3's own rule looks at the batch's total alone. Here the number of key blocks in a split is chosen to minimise the
predicted time of the attention and combine kernels. The model has four constants a kernel, measured by
`fa3-metadata tune balance` and kept in balance_*.json or in the cache folder (tables.py):

    shared_us     a key block when every SM works, that is, at the memory's full bandwidth
    alone_us      a key block on an SM that has the memory to itself
    tile_us       starting and finishing a work tile, whatever its size
    per_split_us  combining, for each split of the sequence with the most

With a share f of the SMs at work a block takes alone_us + (shared_us - alone_us) f^3. reference.py and
balanced_kernel.py compute the prediction, in units of shared_us.
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
    shared = found["shared_us"]
    tile, alone = found["tile_us"] / shared, found["alone_us"] / shared
    fixed = _invariant_blocks(tile) if problem.batch_invariant else 0
    return Costs(_float32(tile), _float32(alone), _float32(table["per_split_us"] / shared), fixed)


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
    """Raise `KeyError`, `TypeError` or `ValueError` for a table that `costs_of` cannot use."""
    positive = [table["num_sms"], table["bandwidth_gb_s"]]
    at_least_zero = [table["per_split_us"]]
    for one in table["kernels"]:
        if len(one["kernel"]) != 5:
            raise ValueError(f"{one['kernel']} is not [element size, head dim, head dim of v, kBlockM, kBlockN]")
        positive += [one["shared_us"], one["alone_us"]]
        at_least_zero.append(one["tile_us"])
    if not table["kernels"] or min(positive) <= 0 or min(at_least_zero) < 0:
        raise ValueError("there must be kernels, and no constant may be negative")


def _float32(value: float) -> float:
    return float(np.float32(value))
