"""FA3's heuristics: how many splits a forward may have, and whether the q heads of a KV head share a tile.

Mirrors `get_num_splits`, `get_pack_gqa` (hopper/flash_api.cpp) and `num_splits_heuristic`, `should_pack_gqa`
(hopper/heuristics.h) of FlashAttention and of its forks, the float32 and int32 arithmetic included.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import numpy as np

from .builds import MIB, FA3Rules
from .problem import Problem

Why: TypeAlias = tuple[str | int, ...]  # a text, and what goes into it: found for every new size, seldom read
_L2_BYTES_FOR_SPLITS = 50 * MIB
_MAX_HEURISTIC_SPLITS = 128


def tiles_counted_for_splits(p: Problem, rules: FA3Rules, block_m: int, batch_size: int) -> int:
    """Query blocks of all KV heads that FA3's bound on splits counts in a batch of this size."""
    tokens, sequences = p.max_seqlen_q, 1
    if rules.bound_depends_on_batch:
        tokens = p.query_tokens_in(batch_size)
    elif batch_size > rules.most_split_by_metadata:
        sequences = batch_size
    return int32(sequences * p.num_heads_k * num_blocks(int32(tokens * p.q_heads_per_kv_head), block_m))


def resolve_num_splits(
    p: Problem, max_seqlen_k: int, total_m_blocks: int, keys_read: int, num_sms: int, block_m: int, block_n: int,
    is_masked: bool,
) -> tuple[int, Why]:  # fmt: skip
    """FA3's upper bound on splits, and why: most builds count the tiles of one sequence of the largest length."""
    num_n_blocks = -(-keys_read // block_n)
    if total_m_blocks >= enough_tiles(num_sms):
        num_m_blocks = num_blocks(int32(p.max_seqlen_q * p.q_heads_per_kv_head), block_m)
        kv_head_bytes = int32(max_seqlen_k * (p.headdim + p.value_headdim) * p.element_size)
        if kv_head_bytes > _L2_BYTES_FOR_SPLITS and num_m_blocks >= 2 * num_sms and not is_masked:
            splits = min(-(-kv_head_bytes // _L2_BYTES_FOR_SPLITS), _MAX_HEURISTIC_SPLITS)
            return splits, ("one KV head does not fit in L2 and many query blocks read it",)
        return 1, ("{} tiles fill 80 % of {} SMs", total_m_blocks, num_sms)
    if num_n_blocks <= 4:
        return 1, ("at most {} key blocks are not worth splitting", num_n_blocks)
    splits = _most_efficient_splits(total_m_blocks, num_sms, min(_MAX_HEURISTIC_SPLITS, num_sms, num_n_blocks))
    why = "smallest number within 85 % of the best wave efficiency of {} tiles on {} SMs", total_m_blocks, num_sms
    return splits, why


@lru_cache(maxsize=256)
def enough_tiles(num_sms: int) -> float:
    """80 % of the SMs, in FA3's float32."""
    return float(np.float32(0.8) * np.float32(num_sms))


def most_keys_read(p: Problem, block_m: int, is_local: bool, window: tuple[int, int]) -> int:
    """Keys that a query block of the longest sequence reads at most, as FA3 estimates them."""
    return max(0, min(p.max_seqlen_k, sum(window) + 1 + block_m)) if is_local else p.max_seqlen_k


@lru_cache(maxsize=4096)
def _most_efficient_splits(total_m_blocks: int, num_sms: int, max_splits: int) -> int:
    tiles = (total_m_blocks * np.arange(1, max_splits + 1)).astype(np.float32)
    waves = tiles / np.float32(num_sms)
    with np.errstate(divide="ignore", invalid="ignore"):  # no queries, or so many that their number has wrapped
        efficiency = waves / np.ceil(waves)
    good_enough = efficiency.astype(np.float64) >= 0.85 * float(efficiency.max())
    return int(np.argmax(good_enough)) + 1


def resolve_pack_gqa(
    p: Problem, rules: FA3Rules, block_m: int, num_splits: int, paged_non_tma: bool, is_local: bool
) -> tuple[bool, str]:
    """Whether the q heads of a KV head share a tile, and why."""
    if rules.packs_with_splits == "also" and num_splits > 1:
        return True, "this build always packs with splits"
    if rules.packs_equal_headdims and p.headdim == p.value_headdim:
        return True, "this build always packs when headdim == headdim_v"
    if p.pack_gqa is not None:
        return p.pack_gqa, "given"
    if p.arch < 90:
        return True, "sm_8x kernels always pack"
    if paged_non_tma:
        return True, "kernels for paged KV without TMA always pack"
    if num_splits > 1:
        return True, "kernels with splits always pack"
    group = p.q_heads_per_kv_head
    if rules.packs_narrow_windows and group == 8 and is_local and p.headdim == p.value_headdim == 64:
        return True, "this build packs 8 q heads of dim 64 under a window"
    if group == 1:
        return False, "one q head per KV head"
    if p.has_cu_seqlens_q or p.has_seqused_q:
        return True, "query lengths vary"
    packed, unpacked = (_tile_fill(rows, block_m) for rows in (p.max_seqlen_q * group, p.max_seqlen_q))
    if float(unpacked) < 0.9 * float(packed):
        return True, "packed rows fill their tiles better"
    return False, "unpacked rows fill their tiles well enough"


def _tile_fill(rows: int, block_m: int) -> np.float32:
    """Part of the tiles' rows that is used."""
    if rows == 0:
        return np.float32("nan")  # 0 / 0, as in FA3: every comparison with it is false
    return np.float32(rows) / np.float32(-(-rows // block_m) * block_m)


def int32(value: int) -> int:
    """`value` wrapped as C++ int arithmetic wraps it."""
    return (value + 2**31) % 2**32 - 2**31


def num_blocks(rows: int, block_m: int) -> int:
    """ceil_div(rows, kBlockM) in C++ ints, which divide towards zero: rows that have wrapped are negative."""
    return int(int32(rows + block_m - 1) / block_m)
