"""The device side as one Triton launch: lengths -> blocks -> total -> splits -> order -> rows.

Computes what `prepare_varlen_num_blocks_kernel` (hopper/flash_prepare_scheduler.cu of FlashAttention) computes,
bit for bit. FA3 uses one thread block for 992 sequences, with atomics and a merge sort. Here many small programs
share the batch and none waits for another: each reads all lengths of its group, adds them up itself, and finds
the place of its own few sequences in the order by counting those that go before them.
"""

from __future__ import annotations

import re

import triton
import triton.language as tl

from .balanced_kernel import balanced_split, fastest_blocks_per_split, few_blocks, group_load, work_of
from .blocks import cdiv, num_blocks
from .builds import MAX_DYNAMIC_SPLIT_BATCH

OLDEST_TRITON = (3, 5)  # gdc_wait of 3.4 does not compile
if tuple(map(int, re.findall(r"\d+", triton.__version__)[:3])) < OLDEST_TRITON:
    oldest = ".".join(map(str, OLDEST_TRITON))
    raise ImportError(f"this is Triton {triton.__version__}, and they need {oldest} or newer")
try:
    from triton.language.extra.cuda import gdc_wait
except ImportError:  # a Triton without programmatic dependent launch
    gdc_wait = None

SORT_GROUP = tl.constexpr(MAX_DYNAMIC_SPLIT_BATCH)
# Nothing that changes from step to step specialises a kernel: neither a number's value nor a pointer's alignment.
_NUMBERS = [
    "stride_0", "stride_1", "stride_2", "stride_3", "stride_4", "batch_size", "max_seqlen_q", "max_seqlen_k_new",
    "q_heads_per_row", "block_m", "multiplier_m", "block_n", "multiplier_n", "num_splits", "num_heads",
    "heads_per_l2_head", "max_kvblocks_in_l2", "is_causal", "load_factor",
    "window_left", "attention_chunk", "fixed_blocks", "causal_saving", "tile_cost", "alone_cost", "split_cost",
]  # fmt: skip
_POINTERS = ["out", "table", "cache_seqlens", "cu_seqlens_q", "seqused_q", "cu_seqlens_k_new", "leftpad_k"]
TABLE_COLUMNS = tl.constexpr(19)
# Where the semaphore is (SEMAPHORE).
NO_SEMAPHORE, SEMAPHORE_FIRST, SEMAPHORE_LAST = (tl.constexpr(i) for i in range(3))
# How splits are found (SPLITS): not at all, by FA3's rule, or by policy "balanced" in one of three ways.
ONE_SPLIT, FA3_RULE, SEARCH, LOAD, FIXED = (tl.constexpr(i) for i in range(5))


@triton.jit
def _load_float(place):
    """A float32 kept among int32 numbers."""
    return tl.load(place).to(tl.float32, bitcast=True)


@triton.jit
def _split(num_n_blocks, blocks_per_sm, num_splits, SHORT: tl.constexpr):
    """Splits of a sequence, and the key blocks of one split."""
    # No blocks per SM means no queries at all: FA3 then divides by zero and ends up with one split.
    wanted = tl.where(blocks_per_sm > 0, cdiv(num_n_blocks, tl.maximum(blocks_per_sm, 1), SHORT), 1)
    splits = tl.maximum(tl.minimum(wanted, num_splits), 1)
    return splits, cdiv(num_n_blocks, splits, SHORT)


@triton.jit
def _write_metadata(
    out, lengths, strides, batch_size, max_seqlen_q, max_seqlen_k_new,
    q_heads_per_row, tile_m, tile_n, num_splits, num_heads, heads_per_l2_head, max_kvblocks_in_l2, is_causal,
    load_factor, window_left, attention_chunk, fixed_blocks, causal_saving, tile_cost, alone_cost, split_cost,
    SPLITS_ROW: tl.constexpr, M_BLOCKS_ROW: tl.constexpr, SEQLEN_Q_ROW: tl.constexpr, BATCH_IDX_ROW: tl.constexpr,
    NHEADS_ROW: tl.constexpr, NUM_ROWS: tl.constexpr, ALIGNMENT: tl.constexpr, SEMAPHORE: tl.constexpr,
    SPLITS: tl.constexpr, WINDOW: tl.constexpr, SHORT: tl.constexpr, SLICE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Program (x, y) writes the metadata of slice x of group y; the first one the semaphore too.

    `out` is int32, laid out by the ..._ROW constants (the place of each row; -1: not in this layout), the ALIGNMENT of
    rows in elements and SEMAPHORE. `lengths` are pointers to cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new
    and leftpad_k, int32, int64 or None, and `strides` theirs in elements. `tile_m`, `tile_n`: kBlockM and kBlockN, each
    with its multiplier (blocks.cdiv_tile). `load_factor`: float32, makes the load of an SM of the total; for FA3's rule
    approximate as in reciprocal.py. What follows it is for policy "balanced" (balance.py), as is WINDOW, with which
    only blocks in the window count. A program writes SLICE sequences and looks at the GROUP of at most 992 that they
    are sorted in; both are powers of two. SHORT: no sequence counts for more than MOST tokens (blocks.py), which makes
    keys and divisions cheaper.
    """
    group_start = tl.program_id(1) * SORT_GROUP
    group_end = tl.minimum(group_start + SORT_GROUP, batch_size)
    row_stride = tl.cdiv(batch_size, ALIGNMENT) * ALIGNMENT
    first = group_start + tl.program_id(0) * SLICE
    i = first + tl.arange(0, SLICE)  # [SLICE]  the sequences this program writes
    mine = i < group_end
    j = group_start + tl.arange(0, GROUP)  # [GROUP]  every sequence of its group
    in_group = j < group_end

    # lengths -> blocks
    shape = (max_seqlen_q, max_seqlen_k_new, q_heads_per_row, tile_m, tile_n, window_left, attention_chunk)
    rows, num_m, num_n = num_blocks(lengths, strides, i, mine, shape, WINDOW, SHORT)
    _, group_m, group_n = num_blocks(lengths, strides, j, in_group, shape, WINDOW, SHORT)

    # blocks -> total -> splits. FA3's order of rounding: each product to float32, a 10 % margin.
    splits = tl.full((SLICE,), 1, tl.int32)
    if SPLITS == FA3_RULE:
        total = tl.sum(group_m * group_n)
        blocks_per_sm = tl.ceil(total.to(tl.float32) * 1.1 * num_heads.to(tl.float32) * load_factor).to(tl.int32)
        splits, num_n = _split(num_n, blocks_per_sm, num_splits, SHORT)
        _, group_n = _split(group_n, blocks_per_sm, num_splits, SHORT)
    elif SPLITS != ONE_SPLIT:
        blocks_per_split = fixed_blocks
        if SPLITS == SEARCH:
            blocks_per_split = fastest_blocks_per_split(
                lengths, strides, batch_size, shape, group_m, group_n, causal_saving, load_factor,
                num_splits, num_heads, tile_cost, alone_cost, split_cost, WINDOW, SHORT, GROUP,
            )  # fmt: skip
        if SPLITS == LOAD:
            work = tl.sum(work_of(few_blocks(group_m), group_n, causal_saving))
            blocks_per_split = group_load(work, group_start, group_end, batch_size, num_heads, load_factor)
        splits, num_n = balanced_split(num_n, blocks_per_split, num_splits, SHORT)
        _, group_n = balanced_split(group_n, blocks_per_split, num_splits, SHORT)

    # splits -> order: falling key, ties in batch order. Keys are blocks, or whole tokens (in sixteens where SHORT).
    position = i
    if BATCH_IDX_ROW >= 0:
        per_n = tl.where(is_causal != 0, tile_n[0] >> (4 if SHORT else 0), 1)
        per_m = tl.where(is_causal != 0, tile_m[0] >> (4 if SHORT else 0), 0)
        key, group_key = num_n * per_n - num_m * per_m, group_n * per_n - group_m * per_m
        # [GROUP, SLICE], which has threads side by side along the slice, so that most sums stay within a thread
        if SHORT:  # the place in the low bits makes all keys different, and a difference's sign says which is greater
            key, group_key = key * 1024 - (i - group_start), group_key * 1024 - (j - group_start)
            group_key = tl.where(in_group, group_key, -(1 << 30))  # less than all, and no difference overflows
            before = (key[None, :] - group_key[:, None]).to(tl.uint32) >> 31
        else:
            before = group_key[:, None] > key[None, :]
            before |= (group_key[:, None] == key[None, :]) & (j[:, None] < i[None, :])
            before &= in_group[:, None]
        position = group_start + tl.sum(before.to(tl.int32), axis=0)

    # order -> rows, padded with zeros
    written = i < tl.minimum(group_start + SORT_GROUP, row_stride)
    out_rows = out + tl.where(mine, position, i)
    if SEMAPHORE == SEMAPHORE_FIRST:
        tl.store(out, 0, mask=first == 0)
        out_rows += 1
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
    if SEMAPHORE == SEMAPHORE_LAST:
        tl.store(out + NUM_ROWS * row_stride, 0, mask=first == 0)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def prepare_varlen_num_blocks_kernel(
    out, cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new, leftpad_k,
    stride_0, stride_1, stride_2, stride_3, stride_4, batch_size, max_seqlen_q, max_seqlen_k_new,
    q_heads_per_row, block_m, multiplier_m, block_n, multiplier_n, num_splits, num_heads, heads_per_l2_head,
    max_kvblocks_in_l2, is_causal, load_factor, window_left, attention_chunk, fixed_blocks, causal_saving,
    tile_cost, alone_cost, split_cost,
    LAYOUT: tl.constexpr, CONTIGUOUS: tl.constexpr, EARLY: tl.constexpr, SLICE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The metadata of one batch. LAYOUT: see launch.layout_constants."""
    if EARLY:  # launched while the kernel before still runs
        gdc_wait()
    lengths = (cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new, leftpad_k)
    strides = (1, 1, 1, 1, 1) if CONTIGUOUS else (stride_0, stride_1, stride_2, stride_3, stride_4)
    _write_metadata(
        out, lengths, strides, batch_size, max_seqlen_q, max_seqlen_k_new,
        q_heads_per_row, (block_m, multiplier_m), (block_n, multiplier_n), num_splits, num_heads, heads_per_l2_head,
        max_kvblocks_in_l2, is_causal, load_factor, window_left, attention_chunk, fixed_blocks, causal_saving,
        tile_cost, alone_cost, split_cost,
        LAYOUT[0], LAYOUT[1], LAYOUT[2], LAYOUT[3], LAYOUT[4], LAYOUT[5],
        LAYOUT[6], LAYOUT[7], LAYOUT[8], LAYOUT[9], LAYOUT[10], SLICE, GROUP,
    )  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def prepare_layer_groups_kernel(
    out, table, cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new, leftpad_k,
    stride_0, stride_1, stride_2, stride_3, stride_4, batch_size, max_seqlen_q, max_seqlen_k_new,
    LAYOUTS: tl.constexpr, CONTIGUOUS: tl.constexpr, EARLY: tl.constexpr, SLICE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The metadata of one batch for several groups of layers: program (x, y, z) works for group z.

    `table` [groups, TABLE_COLUMNS] int32 holds the numbers of each group, and where in `out` its metadata starts.
    """
    if EARLY:  # launched while the kernel before still runs
        gdc_wait()
    lengths = (cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new, leftpad_k)
    strides = (1, 1, 1, 1, 1) if CONTIGUOUS else (stride_0, stride_1, stride_2, stride_3, stride_4)
    row = table + tl.program_id(2) * TABLE_COLUMNS
    tile_m = (tl.load(row + 1), tl.load(row + 2))
    tile_n = (tl.load(row + 3), tl.load(row + 4))
    for z in tl.static_range(len(LAYOUTS)):
        if tl.program_id(2) == z:
            _write_metadata(
                out + tl.load(row + 18), lengths, strides, batch_size, max_seqlen_q, max_seqlen_k_new,
                tl.load(row), tile_m, tile_n, tl.load(row + 5), tl.load(row + 6), tl.load(row + 7),
                tl.load(row + 8), tl.load(row + 9), _load_float(row + 10), tl.load(row + 11),
                tl.load(row + 12), tl.load(row + 13), _load_float(row + 14), _load_float(row + 15),
                _load_float(row + 16), _load_float(row + 17),
                LAYOUTS[z][0], LAYOUTS[z][1], LAYOUTS[z][2], LAYOUTS[z][3], LAYOUTS[z][4], LAYOUTS[z][5],
                LAYOUTS[z][6], LAYOUTS[z][7], LAYOUTS[z][8], LAYOUTS[z][9], LAYOUTS[z][10], SLICE, GROUP,
            )  # fmt: skip


CAN_START_EARLY = gdc_wait is not None
INTERPRETED = not isinstance(prepare_varlen_num_blocks_kernel, triton.JITFunction)  # TRITON_INTERPRET=1
