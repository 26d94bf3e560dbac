"""The device side as one Triton launch: lengths -> blocks -> total -> splits -> order -> rows.

Computes what `prepare_varlen_num_blocks_kernel` (hopper/flash_prepare_scheduler.cu of FlashAttention) computes,
bit for bit. FA3 uses one thread block for 992 sequences, with atomics and a merge sort. Here many small programs
share the batch and none waits for another: each reads all lengths of its group, adds them up itself, and finds
the place of its own few sequences in the order by counting those that go before them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .plan import MAX_DYNAMIC_SPLIT_BATCH, LaunchPlan
from .problem import Problem
from .reciprocal import approximate_reciprocal

SORT_GROUP = tl.constexpr(MAX_DYNAMIC_SPLIT_BATCH)


@triton.jit
def _load(lengths, strides, k: tl.constexpr, i, mask):
    """Elements `i` of the k-th lengths tensor, as int32."""
    offset = i.to(tl.int64) if strides is None else i.to(tl.int64) * strides[k]
    return tl.load(lengths + offset, mask=mask, other=0).to(tl.int32)


@triton.jit
def _cdiv_tile(tokens, tile, multiplier):
    """cdiv(tokens, tile) without a division: tiles are 16 e, and multiplier is ceil(2^32 / e)."""
    sixteens = (tokens + tile - 1).to(tl.uint32) >> 4  # at most 2^27 + 14, for which the product is exact
    return tl.umulhi(sixteens, multiplier.to(tl.uint32, bitcast=True)).to(tl.int32)


@triton.jit
def _num_blocks(lengths, strides, i, mask, max_seqlen_q, max_seqlen_k_new, q_heads_per_row, tile_m, tile_n):
    """Query rows, query blocks and key blocks of sequences `i`; zero where `mask` is off."""
    cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new, leftpad_k = lengths
    if seqused_q is not None:
        seqlen_q = _load(seqused_q, strides, 2, i, mask)
    elif cu_seqlens_q is not None:
        seqlen_q = _load(cu_seqlens_q, strides, 1, i + 1, mask) - _load(cu_seqlens_q, strides, 1, i, mask)
    else:
        seqlen_q = tl.where(mask, max_seqlen_q, 0)

    seqlen_k = _load(cache_seqlens, strides, 0, i, mask)
    if leftpad_k is not None:
        seqlen_k -= _load(leftpad_k, strides, 4, i, mask)
    if cu_seqlens_k_new is not None:
        seqlen_k += _load(cu_seqlens_k_new, strides, 3, i + 1, mask) - _load(cu_seqlens_k_new, strides, 3, i, mask)
    else:
        seqlen_k += tl.where(mask, max_seqlen_k_new, 0)

    rows = tl.maximum(seqlen_q, 0) * q_heads_per_row
    num_m_blocks = _cdiv_tile(rows, tile_m[0], tile_m[1])
    num_n_blocks = _cdiv_tile(tl.maximum(seqlen_k, 0), tile_n[0], tile_n[1])
    return rows, num_m_blocks, num_n_blocks


@triton.jit
def _cdiv(a, b):
    """cdiv(a, b) for a >= 0, b > 0, exact in int32: cheaper than an integer division on a GPU."""
    a += b - 1
    inverse = 1.0 / b.to(tl.float32)
    quotient = (a.to(tl.float32) * inverse).to(tl.int32)  # off by a few in 2^22
    quotient += ((a - quotient * b).to(tl.float32) * inverse).to(tl.int32)  # off by one at most
    remainder = a - quotient * b
    return quotient + (remainder >= b).to(tl.int32) - (remainder < 0).to(tl.int32)


@triton.jit
def _split(num_n_blocks, blocks_per_sm, num_splits):
    """Splits of a sequence, and the key blocks of one split."""
    # No blocks per SM means no queries at all: FA3 then divides by zero and ends up with one split.
    wanted = tl.where(blocks_per_sm > 0, _cdiv(num_n_blocks, tl.maximum(blocks_per_sm, 1)), 1)
    splits = tl.maximum(tl.minimum(wanted, num_splits), 1)
    return splits, _cdiv(num_n_blocks, splits)


@triton.jit(
    do_not_specialize=[
        "strides", "batch_size", "max_seqlen_q", "max_seqlen_k_new", "q_heads_per_row", "tile_m", "tile_n",
        "num_splits", "num_heads", "heads_per_l2_head", "max_kvblocks_in_l2", "is_causal", "sms_reciprocal",
    ],
    do_not_specialize_on_alignment=["out", "lengths"],
)  # fmt: skip
def prepare_varlen_num_blocks_kernel(
    out,  # *i32, laid out by the ..._ROW constants
    lengths,  # pointers to cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new, leftpad_k; i32, i64 or None
    strides,  # their strides in elements, or None where all are contiguous
    batch_size, max_seqlen_q, max_seqlen_k_new, q_heads_per_row,
    tile_m, tile_n,  # kBlockM and kBlockN, each with its multiplier for _cdiv_tile
    num_splits, num_heads, heads_per_l2_head, max_kvblocks_in_l2, is_causal,
    sms_reciprocal,  # f32, approximate: see reciprocal.py
    SPLITS_ROW: tl.constexpr, M_BLOCKS_ROW: tl.constexpr, SEQLEN_Q_ROW: tl.constexpr,
    BATCH_IDX_ROW: tl.constexpr, NHEADS_ROW: tl.constexpr,  # place of each row; None: not in this layout
    NUM_ROWS: tl.constexpr, HAS_SEMAPHORE: tl.constexpr,
    DYNAMIC_SPLITS: tl.constexpr,  # False: every sequence has one split
    SLICE: tl.constexpr,  # sequences a program writes: a power of two
    GROUP: tl.constexpr,  # sequences a program looks at: a power of two, no less than its group
):  # fmt: skip
    """Program (x, y) writes the metadata of slice x of group y; the first one the semaphore too."""
    group_start = tl.program_id(1) * SORT_GROUP
    group_end = tl.minimum(group_start + SORT_GROUP, batch_size)
    first = group_start + tl.program_id(0) * SLICE
    i = first + tl.arange(0, SLICE)  # [SLICE]  the sequences this program writes
    mine = i < group_end
    j = group_start + tl.arange(0, GROUP)  # [GROUP]  every sequence of its group
    in_group = j < group_end

    # lengths -> blocks
    rows, num_m, num_n = _num_blocks(lengths, strides, i, mine, max_seqlen_q, max_seqlen_k_new,
                                     q_heads_per_row, tile_m, tile_n)  # fmt: skip
    _, group_m, group_n = _num_blocks(lengths, strides, j, in_group, max_seqlen_q, max_seqlen_k_new,
                                      q_heads_per_row, tile_m, tile_n)  # fmt: skip

    # blocks -> total -> splits. FA3's order of rounding: each product to float32, a 10 % margin.
    splits = tl.full((SLICE,), 1, tl.int32)
    if DYNAMIC_SPLITS:
        total = tl.sum(group_m * group_n)
        blocks_per_sm = tl.ceil(total.to(tl.float32) * 1.1 * num_heads.to(tl.float32) * sms_reciprocal).to(tl.int32)
        splits, num_n = _split(num_n, blocks_per_sm, num_splits)
        _, group_n = _split(group_n, blocks_per_sm, num_splits)

    # splits -> order: falling key, ties in batch order.
    position = i
    if BATCH_IDX_ROW is not None:
        key = tl.where(is_causal != 0, num_n * tile_n[0] - num_m * tile_m[0], num_n)
        group_key = tl.where(is_causal != 0, group_n * tile_n[0] - group_m * tile_m[0], group_n)
        group_key = tl.where(in_group, group_key, -2147483648)
        earlier = (j[None, :] < i[:, None]).to(tl.int32)
        before = group_key[None, :] + earlier > key[:, None]  # [SLICE, GROUP]
        position = group_start + tl.sum(before.to(tl.int32), axis=1)

    # order -> rows
    row_stride = tl.cdiv(batch_size, 4) * 4
    out_rows = out + position
    if SPLITS_ROW is not None:
        tl.store(out_rows + SPLITS_ROW * row_stride, splits, mask=mine)
    if M_BLOCKS_ROW is not None:
        tl.store(out_rows + M_BLOCKS_ROW * row_stride, num_m, mask=mine)
    if SEQLEN_Q_ROW is not None:
        tl.store(out_rows + SEQLEN_Q_ROW * row_stride, rows, mask=mine)
    if BATCH_IDX_ROW is not None:
        tl.store(out_rows + BATCH_IDX_ROW * row_stride, i, mask=mine)
    if NHEADS_ROW is not None:
        blocks = tl.maximum(num_n, 1)
        kv_heads = tl.where(blocks * 2 <= max_kvblocks_in_l2, 2, 1)
        kv_heads = tl.where(blocks * 4 <= max_kvblocks_in_l2, 4, kv_heads)
        kv_heads = tl.where(blocks * 8 <= max_kvblocks_in_l2, 8, kv_heads)
        kv_heads = tl.where(blocks * 16 <= max_kvblocks_in_l2, 16, kv_heads)
        nheads = tl.minimum(kv_heads * heads_per_l2_head, num_heads)
        tl.store(out_rows + NHEADS_ROW * row_stride, nheads, mask=mine)
    if HAS_SEMAPHORE:
        tl.store(out + NUM_ROWS * row_stride, 0, mask=first == 0)


INTERPRETED = not isinstance(prepare_varlen_num_blocks_kernel, triton.JITFunction)  # TRITON_INTERPRET=1


# GROUP -> (SLICE, num_warps), where the order is counted: measured on an H200. Small slices make many programs.
_SORTED_SHAPES = {32: (4, 4), 64: (2, 2), 128: (2, 2), 256: (4, 4), 512: (4, 8), 1024: (4, 8)}


def launch_shape(plan: LaunchPlan) -> tuple[int, int, int]:
    """(SLICE, GROUP, num_warps) for a plan. Batch sizes share six values of GROUP, so that few kernels are compiled."""
    batch_size = plan.layout.batch_size
    group = max(32, triton.next_power_of_2(min(batch_size, MAX_DYNAMIC_SPLIT_BATCH)))
    if not plan.layout.is_sorted or INTERPRETED:  # the interpreter's time is per program
        return group, group, max(1, min(8, group // 128))
    if group == 1024 and not plan.dynamic_splits:
        return 8, group, 4
    slice_, num_warps = _SORTED_SHAPES[group]
    return slice_, group, num_warps


@lru_cache(maxsize=64)
def _tile_divisor(tile: int) -> tuple[int, int]:
    """(tile, multiplier for _cdiv_tile as an int32 bit pattern)."""
    multiplier = -(-(2**32) // (tile // 16))
    return tile, multiplier - 2**32 if multiplier >= 2**31 else multiplier


def triton_metadata(
    problem: Problem,
    plan: LaunchPlan,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    seqused_q: torch.Tensor | None,
    cu_seqlens_k_new: torch.Tensor | None,
    leftpad_k: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write the metadata into `out` (int32, contiguous, at least `plan.layout.size` elements): one launch.

    Lengths are 1-D int32 or int64 tensors on `out`'s device, of any stride. Nothing is read back, allocated or
    synchronised. On CPU tensors it needs Triton's interpreter (TRITON_INTERPRET=1 before triton is imported).
    """
    layout = plan.layout
    lengths = (cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new, leftpad_k)
    strides = tuple(1 if t is None else t.stride(0) for t in lengths)
    row = {name: place for place, name in enumerate(layout.row_names)}
    slice_, group, num_warps = launch_shape(plan)
    largest_group = min(layout.batch_size, MAX_DYNAMIC_SPLIT_BATCH)
    grid = (triton.cdiv(largest_group, slice_) or 1, triton.cdiv(layout.batch_size, MAX_DYNAMIC_SPLIT_BATCH) or 1)
    prepare_varlen_num_blocks_kernel[grid](
        out,
        lengths,
        None if strides == (1, 1, 1, 1, 1) else strides,
        layout.batch_size,
        problem.max_seqlen_q,
        problem.max_seqlen_k_new,
        plan.q_heads_per_row,
        _tile_divisor(plan.block_m),
        _tile_divisor(plan.block_n),
        plan.num_splits,
        plan.num_heads,
        plan.heads_per_l2_head,
        plan.max_kvblocks_in_l2,
        int(plan.is_causal),
        float(approximate_reciprocal(plan.num_sms)),
        SPLITS_ROW=row.get("num_splits_dynamic"),
        M_BLOCKS_ROW=row.get("num_m_blocks"),
        SEQLEN_Q_ROW=row.get("packed_seqlen_q"),
        BATCH_IDX_ROW=row.get("varlen_batch_idx"),
        NHEADS_ROW=row.get("num_nheads_in_l2"),
        NUM_ROWS=len(layout.row_names),
        HAS_SEMAPHORE=layout.has_semaphore,
        DYNAMIC_SPLITS=plan.dynamic_splits,
        SLICE=slice_,
        GROUP=group,
        num_warps=num_warps,
    )
