"""The device side as one Triton launch: lengths -> blocks -> total -> splits -> order -> rows.

Computes what `prepare_varlen_num_blocks_kernel` (hopper/flash_prepare_scheduler.cu of FlashAttention) computes,
bit for bit. FA3 uses one thread block for 992 sequences, with atomics and a merge sort. Here many small programs
share the batch and none waits for another: each reads all lengths of its group, adds them up itself, and finds
the place of its own few sequences in the order by counting those that go before them.
"""

from __future__ import annotations

import re
from typing import NamedTuple, get_type_hints

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
# Where the semaphore is (Layout.semaphore).
NO_SEMAPHORE, SEMAPHORE_FIRST, SEMAPHORE_LAST = (tl.constexpr(i) for i in range(3))
# How splits are found (Layout.splits): not at all, by FA3's rule, or by policy "balanced" in one of three ways.
ONE_SPLIT, FA3_RULE, SEARCH, LOAD, FIXED = (tl.constexpr(i) for i in range(5))


class Layout(NamedTuple):
    """What a kernel is compiled for. Rows: the place of each, or -1 where this layout has none."""

    splits_row: int
    m_blocks_row: int
    seqlen_q_row: int
    batch_idx_row: int
    nheads_row: int
    num_rows: int
    alignment: int  # of rows, in elements
    semaphore: int  # NO_SEMAPHORE, SEMAPHORE_FIRST or SEMAPHORE_LAST
    splits: int  # ONE_SPLIT, FA3_RULE, SEARCH, LOAD or FIXED
    window: bool  # policy "balanced": only blocks in the window count
    short: bool  # no sequence counts for more than MOST tokens (blocks.py), which makes keys and divisions cheaper


class Numbers(NamedTuple):
    """What differs between groups of layers: arguments of one kernel, a row of the other's table. All 32 bits wide."""

    q_heads_per_row: int
    block_m: int  # kBlockM
    multiplier_m: int  # divides by it: blocks.cdiv_tile
    block_n: int  # kBlockN
    multiplier_n: int
    num_splits: int  # the most splits of a sequence
    num_heads: int
    heads_per_l2_head: int
    max_kvblocks_in_l2: int
    is_causal: int
    load_factor: float  # makes the load of an SM of the total; for FA3's rule approximate as in reciprocal.py
    window_left: int  # this and what follows: for policy "balanced" (balance.py)
    attention_chunk: int
    fixed_blocks: int  # of a split, for FIXED
    causal_saving: float
    tile_cost: float
    block_cost_0: float  # of a key block, a cubic of the share of SMs at work
    block_cost_1: float
    block_cost_2: float
    block_cost_3: float
    split_cost: float
    combine_cost: float
    least_splits_cost: float


# The names themselves: Triton's cache tells kernels apart by their source and by such constants that they read, and
# would take a kernel of other fields for the same one.
LAYOUT_FIELDS = tl.constexpr(Layout._fields)
TABLE_COLUMNS = tl.constexpr((*Numbers._fields, "start"))  # the last: where in `out` the metadata begins
FLOATS = tl.constexpr(tuple(kind is float for kind in get_type_hints(Numbers).values()))
# Nothing that changes from step to step specialises a kernel: neither a number's value nor a pointer's alignment.
_NUMBERS = [
    "stride_0", "stride_1", "stride_2", "stride_3", "stride_4", "batch_size", "max_seqlen_q", "max_seqlen_k_new",
    *Numbers._fields,
]  # fmt: skip
_POINTERS = ["out", "table", "cache_seqlens", "cu_seqlens_q", "seqused_q", "cu_seqlens_k_new", "leftpad_k"]


@triton.constexpr_function
def _by_name(layout):
    """The Layout of a plain tuple: one with names in it is no constant of a kernel up to Triton 3.7.1."""
    return Layout(**dict(zip(LAYOUT_FIELDS.value, layout, strict=True)))


@triton.jit
def _numbers_in(row):
    """The Numbers in a row of a table, where each float32 is kept as an int32."""
    numbers = ()
    for column in tl.static_range(len(TABLE_COLUMNS.value) - 1):
        number = tl.load(row + column)
        if FLOATS[column]:
            number = number.to(tl.float32, bitcast=True)
        numbers += (number,)  # type: ignore[assignment]
    return Numbers(*numbers)  # type: ignore[call-arg]


@triton.jit
def _split(num_n_blocks, blocks_per_sm, num_splits, SHORT: tl.constexpr):
    """Splits of a sequence, and the key blocks of one split."""
    # No blocks per SM means no queries at all: FA3 then divides by zero and ends up with one split.
    wanted = tl.where(blocks_per_sm > 0, cdiv(num_n_blocks, tl.maximum(blocks_per_sm, 1), SHORT), 1)
    splits = tl.maximum(tl.minimum(wanted, num_splits), 1)
    return splits, cdiv(num_n_blocks, splits, SHORT)


@triton.jit
def _write_metadata(
    out, lengths, strides, batch_size, max_seqlen_q, max_seqlen_k_new, n,
    LAYOUT: tl.constexpr, SLICE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Program (x, y) writes the metadata of slice x of group y; the first one the semaphore too.

    `out` is int32. `lengths` are pointers to cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new and leftpad_k,
    int32, int64 or None, and `strides` theirs in elements. `n`: Numbers. LAYOUT: a Layout. A program writes SLICE
    sequences and looks at the GROUP of at most 992 that they are sorted in; both are powers of two.
    """
    group_start = tl.program_id(1) * SORT_GROUP
    group_end = tl.minimum(group_start + SORT_GROUP, batch_size)
    row_stride = tl.cdiv(batch_size, LAYOUT.alignment) * LAYOUT.alignment
    first = group_start + tl.program_id(0) * SLICE
    i = first + tl.arange(0, SLICE)  # [SLICE]  the sequences this program writes
    mine = i < group_end
    j = group_start + tl.arange(0, GROUP)  # [GROUP]  every sequence of its group
    in_group = j < group_end

    # lengths -> blocks
    most = (max_seqlen_q, max_seqlen_k_new)
    rows, num_m, num_n = num_blocks(lengths, strides, i, mine, most, n, LAYOUT)
    _, group_m, group_n = num_blocks(lengths, strides, j, in_group, most, n, LAYOUT)

    # blocks -> total -> splits. FA3's order of rounding: each product to float32, a 10 % margin.
    splits = tl.full((SLICE,), 1, tl.int32)
    if LAYOUT.splits == FA3_RULE:
        total = tl.sum(group_m * group_n)
        blocks_per_sm = tl.ceil(total.to(tl.float32) * 1.1 * n.num_heads.to(tl.float32) * n.load_factor).to(tl.int32)
        splits, num_n = _split(num_n, blocks_per_sm, n.num_splits, LAYOUT.short)
        _, group_n = _split(group_n, blocks_per_sm, n.num_splits, LAYOUT.short)
    elif LAYOUT.splits != ONE_SPLIT:
        blocks_per_split = n.fixed_blocks
        if LAYOUT.splits == SEARCH:
            blocks_per_split = fastest_blocks_per_split(
                lengths, strides, batch_size, most, group_m, group_n, n, LAYOUT, GROUP
            )
        if LAYOUT.splits == LOAD:
            work = tl.sum(work_of(few_blocks(group_m), group_n, n.causal_saving))
            blocks_per_split = group_load(work, group_start, group_end, batch_size, n.num_heads, n.load_factor)
        splits, num_n = balanced_split(num_n, blocks_per_split, n.num_splits, LAYOUT.short)
        _, group_n = balanced_split(group_n, blocks_per_split, n.num_splits, LAYOUT.short)

    # splits -> order: falling key, ties in batch order. Keys are blocks, or whole tokens (in sixteens where short).
    position = i
    if LAYOUT.batch_idx_row >= 0:
        per_n = tl.where(n.is_causal != 0, n.block_n >> (4 if LAYOUT.short else 0), 1)
        per_m = tl.where(n.is_causal != 0, n.block_m >> (4 if LAYOUT.short else 0), 0)
        key, group_key = num_n * per_n - num_m * per_m, group_n * per_n - group_m * per_m
        # [GROUP, SLICE], which has threads side by side along the slice, so that most sums stay within a thread
        if LAYOUT.short:
            # The place in the low bits makes all keys different, and a difference's sign says which is greater.
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
    if LAYOUT.semaphore == SEMAPHORE_FIRST:
        tl.store(out, 0, mask=first == 0)
        out_rows += 1
    if LAYOUT.splits_row >= 0:
        tl.store(out_rows + LAYOUT.splits_row * row_stride, tl.where(mine, splits, 0), mask=written)
    if LAYOUT.m_blocks_row >= 0:
        tl.store(out_rows + LAYOUT.m_blocks_row * row_stride, num_m, mask=written)
    if LAYOUT.seqlen_q_row >= 0:
        tl.store(out_rows + LAYOUT.seqlen_q_row * row_stride, rows, mask=written)
    if LAYOUT.batch_idx_row >= 0:
        tl.store(out_rows + LAYOUT.batch_idx_row * row_stride, tl.where(mine, i, 0), mask=written)
    if LAYOUT.nheads_row >= 0:
        blocks = tl.maximum(num_n, 1)
        kv_heads = tl.where(blocks * 2 <= n.max_kvblocks_in_l2, 2, 1)
        kv_heads = tl.where(blocks * 4 <= n.max_kvblocks_in_l2, 4, kv_heads)
        kv_heads = tl.where(blocks * 8 <= n.max_kvblocks_in_l2, 8, kv_heads)
        kv_heads = tl.where(blocks * 16 <= n.max_kvblocks_in_l2, 16, kv_heads)
        nheads = tl.minimum(kv_heads * n.heads_per_l2_head, n.num_heads)
        tl.store(out_rows + LAYOUT.nheads_row * row_stride, tl.where(mine, nheads, 0), mask=written)
    if LAYOUT.semaphore == SEMAPHORE_LAST:
        tl.store(out + LAYOUT.num_rows * row_stride, 0, mask=first == 0)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def prepare_varlen_num_blocks_kernel(
    out, cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new, leftpad_k,
    stride_0, stride_1, stride_2, stride_3, stride_4, batch_size, max_seqlen_q, max_seqlen_k_new,
    q_heads_per_row, block_m, multiplier_m, block_n, multiplier_n, num_splits, num_heads, heads_per_l2_head,
    max_kvblocks_in_l2, is_causal, load_factor, window_left, attention_chunk, fixed_blocks, causal_saving,
    tile_cost, block_cost_0, block_cost_1, block_cost_2, block_cost_3, split_cost, combine_cost, least_splits_cost,
    LAYOUT: tl.constexpr, CONTIGUOUS: tl.constexpr, EARLY: tl.constexpr, SLICE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The metadata of one batch. LAYOUT: a Layout as a plain tuple."""
    if EARLY:  # launched while the kernel before still runs
        gdc_wait()
    lengths = (cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new, leftpad_k)
    strides = (1, 1, 1, 1, 1) if CONTIGUOUS else (stride_0, stride_1, stride_2, stride_3, stride_4)
    n = Numbers(
        q_heads_per_row, block_m, multiplier_m, block_n, multiplier_n, num_splits, num_heads, heads_per_l2_head,
        max_kvblocks_in_l2, is_causal, load_factor, window_left, attention_chunk, fixed_blocks, causal_saving,
        tile_cost, block_cost_0, block_cost_1, block_cost_2, block_cost_3, split_cost, combine_cost, least_splits_cost,
    )  # fmt: skip
    _write_metadata(
        out, lengths, strides, batch_size, max_seqlen_q, max_seqlen_k_new, n, _by_name(LAYOUT), SLICE, GROUP
    )


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def prepare_layer_groups_kernel(
    out, table, cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new, leftpad_k,
    stride_0, stride_1, stride_2, stride_3, stride_4, batch_size, max_seqlen_q, max_seqlen_k_new,
    LAYOUTS: tl.constexpr, CONTIGUOUS: tl.constexpr, EARLY: tl.constexpr, SLICE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The metadata of one batch for several groups of layers: program (x, y, z) works for group z.

    `table` is int32, [groups, TABLE_COLUMNS].
    """
    if EARLY:  # launched while the kernel before still runs
        gdc_wait()
    lengths = (cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new, leftpad_k)
    strides = (1, 1, 1, 1, 1) if CONTIGUOUS else (stride_0, stride_1, stride_2, stride_3, stride_4)
    row = table + tl.program_id(2) * len(TABLE_COLUMNS.value)
    out += tl.load(row + len(TABLE_COLUMNS.value) - 1)
    n = _numbers_in(row)
    for z in tl.static_range(len(LAYOUTS)):
        if tl.program_id(2) == z:
            _write_metadata(
                out, lengths, strides, batch_size, max_seqlen_q, max_seqlen_k_new, n, _by_name(LAYOUTS[z]), SLICE, GROUP
            )


CAN_START_EARLY = gdc_wait is not None
INTERPRETED = not isinstance(prepare_varlen_num_blocks_kernel, triton.JITFunction)  # TRITON_INTERPRET=1
