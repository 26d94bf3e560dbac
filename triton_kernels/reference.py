"""The device side in NumPy, written to be read: lengths -> blocks -> total -> splits -> order -> rows.

Mirrors `prepare_varlen_num_blocks_kernel` (hopper/flash_prepare_scheduler.cu of FlashAttention) and shares
nothing with the Triton kernel but the launch plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .plan import MAX_DYNAMIC_SPLIT_BATCH, LaunchPlan
from .problem import Problem
from .reciprocal import approximate_reciprocal

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Lengths:
    """The lengths of a batch of b sequences, in tokens; any integer dtype. None: not given."""

    cache_seqlens: NDArray[np.integer]  # [b]      keys in the cache, left padding included
    cu_seqlens_q: NDArray[np.integer] | None = None  # [b + 1]  running sum of query lengths
    seqused_q: NDArray[np.integer] | None = None  # [b]      query lengths; wins over cu_seqlens_q
    cu_seqlens_k_new: NDArray[np.integer] | None = None  # [b + 1]  running sum of appended keys
    leftpad_k: NDArray[np.integer] | None = None  # [b]      unused keys at the start of the cache


def reference_metadata(problem: Problem, plan: LaunchPlan, lengths: Lengths) -> Ints:
    """The metadata as an int32 array of `plan.layout.size` elements; padding is zero."""
    seqlen_q, seqlen_k = sequence_lengths(problem, lengths)
    seqlen_q = seqlen_q * np.int32(plan.q_heads_per_row)
    num_m_blocks = _ceil_div(seqlen_q, plan.block_m)
    num_n_blocks = _ceil_div(seqlen_k, plan.block_n)

    num_splits = np.ones_like(num_n_blocks)
    if plan.dynamic_splits:
        num_splits = _split(plan, num_m_blocks, num_n_blocks)
        num_n_blocks = _ceil_div(num_n_blocks, num_splits)

    order = np.arange(problem.batch_size, dtype=np.int32)
    if plan.layout.is_sorted:
        order = _longest_first(plan, num_m_blocks, num_n_blocks)

    values = {
        "num_splits_dynamic": num_splits[order],
        "num_m_blocks": num_m_blocks[order],
        "packed_seqlen_q": seqlen_q[order],
        "varlen_batch_idx": order,
        "num_nheads_in_l2": _num_nheads_in_l2(plan, num_n_blocks)[order],
    }
    metadata = np.zeros(plan.layout.size, np.int32)  # the semaphore is among the zeros
    for name, row in plan.layout.rows.items():
        metadata[row] = values[name]
    return metadata


def sequence_lengths(problem: Problem, lengths: Lengths) -> tuple[Ints, Ints]:
    """Query tokens and keys of every sequence. A negative length counts as zero."""
    if lengths.seqused_q is not None:
        seqlen_q = lengths.seqused_q
    elif lengths.cu_seqlens_q is not None:
        seqlen_q = np.diff(lengths.cu_seqlens_q)
    else:
        seqlen_q = np.full(problem.batch_size, problem.max_seqlen_q)
    seqlen_k = lengths.cache_seqlens.astype(np.int32)
    if lengths.leftpad_k is not None:
        seqlen_k = seqlen_k - lengths.leftpad_k.astype(np.int32)
    if lengths.cu_seqlens_k_new is not None:
        seqlen_k = seqlen_k + np.diff(lengths.cu_seqlens_k_new).astype(np.int32)
    else:
        seqlen_k = seqlen_k + np.int32(problem.max_seqlen_k_new)
    return np.maximum(seqlen_q, 0).astype(np.int32), np.maximum(seqlen_k, 0)


def _split(plan: LaunchPlan, num_m_blocks: Ints, num_n_blocks: Ints) -> Ints:
    """KV splits of every sequence: as many as keep each near the SMs' average load plus 10 %."""
    total_blocks = np.sum(num_m_blocks * num_n_blocks, dtype=np.int32)
    per_head = np.float32(total_blocks) * np.float32(1.1)
    blocks_per_sm = np.int32(np.ceil(per_head * np.float32(plan.num_heads) * approximate_reciprocal(plan.num_sms)))
    if blocks_per_sm <= 0:  # no queries at all
        return np.ones_like(num_n_blocks)
    wanted = (num_n_blocks + blocks_per_sm - np.int32(1)) // blocks_per_sm
    return np.maximum(np.minimum(wanted, np.int32(plan.num_splits)), np.int32(1))


def _longest_first(plan: LaunchPlan, num_m_blocks: Ints, num_n_blocks: Ints) -> Ints:
    """Batch indices by falling work, ties in batch order, each group of 992 sorted within itself."""
    key = num_n_blocks
    if plan.is_causal:  # the keys that even the shortest row of the last query block sees
        key = num_n_blocks * np.int32(plan.block_n) - num_m_blocks * np.int32(plan.block_m)
    groups = np.arange(len(key)) // MAX_DYNAMIC_SPLIT_BATCH
    return np.lexsort((-key.astype(np.int64), groups)).astype(np.int32)


def _num_nheads_in_l2(plan: LaunchPlan, num_n_blocks: Ints) -> Ints:
    """Scheduler heads whose KV blocks fit in the L2 budget together."""
    blocks = np.maximum(num_n_blocks, 1)
    kv_heads = np.ones_like(blocks)
    for heads in (2, 4, 8, 16):
        kv_heads[blocks * np.int32(heads) <= plan.max_kvblocks_in_l2] = heads
    return np.minimum(kv_heads * np.int32(plan.heads_per_l2_head), np.int32(plan.num_heads))


def _ceil_div(a: Ints, b: int | Ints) -> Ints:
    return -(-a // b)
