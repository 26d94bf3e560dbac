"""The device side as one Triton launch: lengths -> blocks -> total -> splits -> order -> rows.

Computes what `prepare_varlen_num_blocks_kernel` (hopper/flash_prepare_scheduler.cu of FlashAttention) computes,
bit for bit. FA3 uses one thread block for 992 sequences, with atomics and a merge sort. Here many small programs
share the batch and none waits for another: each reads all lengths of its group, adds them up itself, and finds
the place of its own few sequences in the order by counting those that go before them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .plan import MAX_DYNAMIC_SPLIT_BATCH

SORT_GROUP = tl.constexpr(MAX_DYNAMIC_SPLIT_BATCH)
# Nothing that changes from step to step specialises a kernel: neither a number's value nor a pointer's alignment.
_NUMBERS = [
    "stride_0", "stride_1", "stride_2", "stride_3", "stride_4", "batch_size", "max_seqlen_q", "max_seqlen_k_new",
    "q_heads_per_row", "block_m", "multiplier_m", "block_n", "multiplier_n", "num_splits", "num_heads",
    "heads_per_l2_head", "max_kvblocks_in_l2", "is_causal", "sms_reciprocal",
]  # fmt: skip
_POINTERS = ["out", "table", "cache_seqlens", "cu_seqlens_q", "seqused_q", "cu_seqlens_k_new", "leftpad_k"]
TABLE_COLUMNS = tl.constexpr(12)


@triton.jit
def _load(lengths, stride, i, mask):
    """Elements `i` of a lengths tensor as int32."""
    return tl.load(lengths + i.to(tl.int64) * stride, mask=mask, other=0).to(tl.int32)


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
        seqlen_q = _load(seqused_q, strides[2], i, mask)
    elif cu_seqlens_q is not None:
        seqlen_q = _load(cu_seqlens_q, strides[1], i + 1, mask) - _load(cu_seqlens_q, strides[1], i, mask)
    else:
        seqlen_q = tl.where(mask, max_seqlen_q, 0)

    seqlen_k = _load(cache_seqlens, strides[0], i, mask)
    if leftpad_k is not None:
        seqlen_k -= _load(leftpad_k, strides[4], i, mask)
    if cu_seqlens_k_new is not None:
        new = strides[3]
        seqlen_k += _load(cu_seqlens_k_new, new, i + 1, mask) - _load(cu_seqlens_k_new, new, i, mask)
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


@triton.jit
def _write_metadata(
    out, lengths, strides, batch_size, max_seqlen_q, max_seqlen_k_new,
    q_heads_per_row, tile_m, tile_n, num_splits, num_heads, heads_per_l2_head, max_kvblocks_in_l2, is_causal,
    sms_reciprocal,
    SPLITS_ROW: tl.constexpr, M_BLOCKS_ROW: tl.constexpr, SEQLEN_Q_ROW: tl.constexpr, BATCH_IDX_ROW: tl.constexpr,
    NHEADS_ROW: tl.constexpr, NUM_ROWS: tl.constexpr, HAS_SEMAPHORE: tl.constexpr, DYNAMIC_SPLITS: tl.constexpr,
    SLICE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Program (x, y) writes the metadata of slice x of group y; the first one the semaphore too.

    `out` is int32, laid out by the ..._ROW constants (the place of each row; -1: not in this layout). `lengths` are
    pointers to cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new and leftpad_k, int32, int64 or None, and
    `strides` theirs in elements. `tile_m`, `tile_n`: kBlockM and kBlockN, each with its multiplier for _cdiv_tile.
    `sms_reciprocal`: float32, approximate as in reciprocal.py. A program writes SLICE sequences and looks at the
    GROUP of at most 992 that they are sorted in; both are powers of two.
    """
    group_start = tl.program_id(1) * SORT_GROUP
    group_end = tl.minimum(group_start + SORT_GROUP, batch_size)
    row_stride = tl.cdiv(batch_size, 4) * 4
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
    if BATCH_IDX_ROW >= 0:
        key = tl.where(is_causal != 0, num_n * tile_n[0] - num_m * tile_m[0], num_n)
        group_key = tl.where(is_causal != 0, group_n * tile_n[0] - group_m * tile_m[0], group_n)
        group_key = tl.where(in_group, group_key, -2147483648)
        earlier = (j[None, :] < i[:, None]).to(tl.int32)
        before = group_key[None, :] + earlier > key[:, None]  # [SLICE, GROUP]
        position = group_start + tl.sum(before.to(tl.int32), axis=1)

    # order -> rows, padded with zeros
    written = i < tl.minimum(group_start + SORT_GROUP, row_stride)
    out_rows = out + tl.where(mine, position, i)
    if SPLITS_ROW >= 0:
        tl.store(out_rows + SPLITS_ROW * row_stride, tl.where(mine, splits, 0), mask=written)
    if M_BLOCKS_ROW >= 0:
        tl.store(out_rows + M_BLOCKS_ROW * row_stride, num_m, mask=written)
    if SEQLEN_Q_ROW >= 0:
        tl.store(out_rows + SEQLEN_Q_ROW * row_stride, rows, mask=written)
    if BATCH_IDX_ROW >= 0:
        tl.store(out_rows + BATCH_IDX_ROW * row_stride, tl.where(mine, i, 0), mask=written)
    if NHEADS_ROW >= 0:
        blocks = tl.maximum(num_n, 1)
        kv_heads = tl.where(blocks * 2 <= max_kvblocks_in_l2, 2, 1)
        kv_heads = tl.where(blocks * 4 <= max_kvblocks_in_l2, 4, kv_heads)
        kv_heads = tl.where(blocks * 8 <= max_kvblocks_in_l2, 8, kv_heads)
        kv_heads = tl.where(blocks * 16 <= max_kvblocks_in_l2, 16, kv_heads)
        nheads = tl.minimum(kv_heads * heads_per_l2_head, num_heads)
        tl.store(out_rows + NHEADS_ROW * row_stride, tl.where(mine, nheads, 0), mask=written)
    if HAS_SEMAPHORE:
        tl.store(out + NUM_ROWS * row_stride, 0, mask=first == 0)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def prepare_varlen_num_blocks_kernel(
    out, cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new, leftpad_k,
    stride_0, stride_1, stride_2, stride_3, stride_4, batch_size, max_seqlen_q, max_seqlen_k_new,
    q_heads_per_row, block_m, multiplier_m, block_n, multiplier_n, num_splits, num_heads, heads_per_l2_head,
    max_kvblocks_in_l2, is_causal, sms_reciprocal,
    LAYOUT: tl.constexpr, CONTIGUOUS: tl.constexpr, SLICE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The metadata of one batch. LAYOUT: see launch.layout_constants."""
    lengths = (cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new, leftpad_k)
    strides = (1, 1, 1, 1, 1) if CONTIGUOUS else (stride_0, stride_1, stride_2, stride_3, stride_4)
    _write_metadata(
        out, lengths, strides, batch_size, max_seqlen_q, max_seqlen_k_new,
        q_heads_per_row, (block_m, multiplier_m), (block_n, multiplier_n), num_splits, num_heads, heads_per_l2_head,
        max_kvblocks_in_l2, is_causal, sms_reciprocal,
        LAYOUT[0], LAYOUT[1], LAYOUT[2], LAYOUT[3], LAYOUT[4], LAYOUT[5], LAYOUT[6], LAYOUT[7], SLICE, GROUP,
    )  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def prepare_layer_groups_kernel(
    out, table, cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new, leftpad_k,
    stride_0, stride_1, stride_2, stride_3, stride_4, batch_size, max_seqlen_q, max_seqlen_k_new,
    LAYOUTS: tl.constexpr, CONTIGUOUS: tl.constexpr, SLICE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The metadata of one batch for several groups of layers: program (x, y, z) works for group z.

    `table` [groups, TABLE_COLUMNS] int32 holds the numbers of each group, and where in `out` its metadata starts.
    """
    lengths = (cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new, leftpad_k)
    strides = (1, 1, 1, 1, 1) if CONTIGUOUS else (stride_0, stride_1, stride_2, stride_3, stride_4)
    row = table + tl.program_id(2) * TABLE_COLUMNS
    tile_m = (tl.load(row + 1), tl.load(row + 2))
    tile_n = (tl.load(row + 3), tl.load(row + 4))
    sms_reciprocal = tl.load(row + 10).to(tl.float32, bitcast=True)
    for z in tl.static_range(len(LAYOUTS)):
        if tl.program_id(2) == z:
            _write_metadata(
                out + tl.load(row + 11), lengths, strides, batch_size, max_seqlen_q, max_seqlen_k_new,
                tl.load(row), tile_m, tile_n, tl.load(row + 5), tl.load(row + 6), tl.load(row + 7),
                tl.load(row + 8), tl.load(row + 9), sms_reciprocal,
                LAYOUTS[z][0], LAYOUTS[z][1], LAYOUTS[z][2], LAYOUTS[z][3], LAYOUTS[z][4], LAYOUTS[z][5],
                LAYOUTS[z][6], LAYOUTS[z][7], SLICE, GROUP,
            )  # fmt: skip


INTERPRETED = not isinstance(prepare_varlen_num_blocks_kernel, triton.JITFunction)  # TRITON_INTERPRET=1
