"""Policy "balanced" on the device: the search that reference.py describes, with every rounding of it.

Compiled without fused multiply-add, so that both come to the same schedule.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .balance import CANDIDATES as MULTIPLES
from .balance import CLEAR_GAIN, MOST_FOR_ALL_CANDIDATES, MOST_QUERY_BLOCKS, NUM_CANDIDATES
from .blocks import cdiv, num_blocks

CANDIDATES = tl.constexpr(NUM_CANDIDATES)
HALF = tl.constexpr(NUM_CANDIDATES // 2)
PARTS, MORE = (tl.constexpr(int.from_bytes(bytes(column), "little")) for column in zip(*MULTIPLES, strict=True))
GAIN = tl.constexpr(CLEAR_GAIN)
WARP = tl.constexpr(32)
MOST_M_BLOCKS = tl.constexpr(MOST_QUERY_BLOCKS)
ALL_CANDIDATES = tl.constexpr(MOST_FOR_ALL_CANDIDATES)
ONE_WARP = tl.constexpr(64)  # the most sequences that one warp alone works on (launch_*.json)


@triton.jit
def few_blocks(num_m):
    """Query blocks as the model counts them: reference.split_balanced."""
    return tl.minimum(num_m, MOST_M_BLOCKS)


@triton.jit
def work_of(num_m, num_n, causal_saving):
    """Key blocks read by all query blocks of a sequence: reference._work."""
    pairs = (num_m * (num_m - 1)).to(tl.float32)
    return tl.maximum(num_m * num_n - _rounded(pairs * causal_saving - 0.4995), 0)


@triton.jit
def _block_cost(busy, n):
    return n.block_cost_0 + busy * (n.block_cost_1 + busy * (n.block_cost_2 + busy * n.block_cost_3))


@triton.jit
def fastest_blocks_per_split(
    lengths, strides, batch_size, most, group_m, group_n, n, LAYOUT: tl.constexpr, GROUP: tl.constexpr
):
    """reference._fastest_blocks_per_split: the key blocks of a split, for a batch that is a single group.

    `group_m`, `group_n` [GROUP]: query and key blocks of `lengths`. `most`, `n`, LAYOUT: as for num_blocks.
    """
    group_m = few_blocks(group_m)
    if GROUP <= ONE_WARP:
        # [GROUP, CANDIDATES]. One number for three, made as wide as that (by adding zeros) before it is taken apart,
        # means one exchange between threads and not one for all that follows. Meanwhile the first sums are made.
        k = tl.arange(0, CANDIDATES)[None, :]
        work = work_of(group_m, group_n, n.causal_saving)
        wide = ((work.to(tl.int64) << 32) | (group_n * 16 + group_m))[:, None] + (k & CANDIDATES)
        c, inverse, load, longest = _candidates(k, tl.sum(work), tl.max(group_n), n, LAYOUT.short)
        blocks, work = wide.to(tl.int32), (wide >> 32).to(tl.int32)
        tiles, big = _tiles(blocks & 15, blocks >> 4, c, inverse)
        big_work = tl.where(big, work, 0)
        joined = tl.join(tl.join(tiles, tl.where(big, tiles, 0)), tl.join(big_work, big_work))
        counts, big_work = tl.split(tl.sum(joined, axis=0, keep_dims=True))  # three sums in one reduction
        all_tiles, big_tiles = tl.split(counts)
        big_work, _ = tl.split(big_work)
        key = _predicted(k, c, inverse, load, longest, all_tiles, big_tiles, big_work, n)
        # The warp has every candidate in four of its threads, and an instruction for the least number of all of them.
        key = tl.broadcast_to(key, (WARP // CANDIDATES, CANDIDATES))
        return tl.max(tl.where(key == tl.min(key), c, 0))

    # [HALF, GROUP // WARP, WARP]: each of four warps has two candidates, one of each half, or an even one, and every
    # sequence, which it reads itself, so that nothing is exchanged between warps but the answer.
    k = tl.arange(0, HALF)[:, None, None]
    j = tl.arange(0, GROUP // WARP)[None, :, None] * WARP + tl.arange(0, WARP)[None, None, :] + (k & HALF)
    _, num_m, num_n = num_blocks(lengths, strides, j, j < batch_size, most, n, LAYOUT)
    num_m = few_blocks(num_m)
    work = work_of(num_m, num_n, n.causal_saving)
    longest = tl.max(tl.max(num_n, axis=1, keep_dims=True), axis=2, keep_dims=True)
    batch = (num_m, num_n, work, _of_all(work), longest)
    if GROUP > ALL_CANDIDATES:  # as the batch is then: GROUP is the next power of two
        key = _key(2 * k, batch, n, LAYOUT.short)
    else:
        key = tl.minimum(_key(k, batch, n, LAYOUT.short), _key(k + HALF, batch, n, LAYOUT.short))
    return tl.min(key).to(tl.int32)


@triton.jit
def _key(k, batch, n, SHORT: tl.constexpr):
    """`_predicted` of candidates [HALF, 1, 1] in the upper half of an int64, and their key blocks of a split."""
    num_m, num_n, work, total, longest = batch
    c, inverse, load, longest = _candidates(k, total, longest, n, SHORT)
    tiles, big = _tiles(num_m, num_n, c, inverse)
    big_tiles, big_work = _of_all(tl.where(big, tiles, 0)), _of_all(tl.where(big, work, 0))
    key = _predicted(k, c, inverse, load, longest, _of_all(tiles), big_tiles, big_work, n)
    return (key.to(tl.int64) << 32) | c


@triton.jit
def _of_all(x):
    """The sum over the sequences, for each candidate."""
    return tl.sum(tl.sum(x, axis=1, keep_dims=True), axis=2, keep_dims=True)


@triton.jit
def _candidates(k, total, longest, n, SHORT: tl.constexpr):
    """reference._candidates `k`: key blocks of a split, their reciprocal; load, longest."""
    load = tl.maximum(total.to(tl.float32) * n.num_heads.to(tl.float32) * n.load_factor, 0.0)
    longest = tl.maximum(longest, 1)
    place = k.to(tl.int64) * 8  # of a byte
    parts, more = ((place * 0 + PARTS) >> place) & 255, ((place * 0 + MORE) >> place) & 255
    of_load = tl.where(k == 0, 1.1, parts.to(tl.float32) * 0.015625)
    c = _rounded(tl.minimum(load, 2097152.0) * of_load + 0.4995) + more.to(tl.int32)
    c = tl.maximum(tl.minimum(c, longest), cdiv(longest, n.num_splits, SHORT))
    return c, _reciprocal(c.to(tl.float32)), load, longest


@triton.jit
def _tiles(num_m, num_n, c, inverse):
    """Work tiles of a head, and whether they are more than half as long as a split may be."""
    splits = _rounded(num_n.to(tl.float32) * inverse + 0.4995)
    return num_m * tl.maximum(splits, 1), num_n * 2 > c


@triton.jit
def _predicted(k, c, inverse, load, longest, all_tiles, big_tiles, big_work, n):
    """The predicted time as an int32 that rises with it; the last three bits are the candidate's number."""
    heads, share = n.num_heads.to(tl.float32), n.load_factor
    all_tiles, big_tiles = all_tiles.to(tl.float32) * heads, big_tiles.to(tl.float32) * heads
    time = _predicted_time(c, load, all_tiles, big_tiles, big_work.to(tl.float32) * heads * share, n)
    combine = n.combine_cost + tl.maximum(longest.to(tl.float32) * inverse * n.split_cost, n.least_splits_cost)
    time = tl.where(c < longest, time + combine, time)
    time = tl.maximum(tl.where(k == 0, time, time * GAIN), 0.0)
    return (time.to(tl.int32, bitcast=True) & -CANDIDATES) | k  # a positive float's bits rise with it


@triton.jit
def _predicted_time(c, load, all_tiles, big_tiles, big_load, n):
    """reference._predicted_time"""
    share, tile = n.load_factor, n.tile_cost
    tallest = c.to(tl.float32) + tile
    small_tiles = tl.maximum(all_tiles - big_tiles, 0.0)
    big_tiles = tl.maximum(big_tiles, 1.0)
    waves, others = big_tiles * share, tl.maximum(small_tiles, 1.0) * share
    quotient = _reciprocal(waves * others)
    each = others * quotient
    big = big_load * each + tile
    small_load = tl.maximum(load - big_load, 0.0)
    small = small_load * (waves * quotient) + tile
    filling = small_load + tile * (small_tiles * share)

    full_waves = ((big_tiles - 0.5) * share - 0.4995 + 12582912.0) - 12582912.0
    left = waves - full_waves
    spread = tl.maximum(tallest - big, 0.0)
    later = full_waves >= 1.0
    low = tl.where(later, tl.maximum(big - 2.0 * spread * each, spread), big)
    height = tl.where(later, low, tallest)
    half = 0.5 * height
    per_half = _reciprocal(half)
    lower = left + filling * per_half
    busy = tl.minimum(lower, 1.0)
    upper = left * (low * per_half - 1.0) + (lower - busy)
    busy_above = tl.minimum(upper, 1.0)
    last_wave = half * (_block_cost(busy, n) + _block_cost(busy_above, n) + (upper - busy_above))
    time = (big * waves - left * low) + last_wave
    overhang = tl.maximum(small - 2.0 * spread, 0.0) * (0.5 * n.block_cost_0)
    return tl.where(filling > (1.0 - left) * low, time + overhang, time)


@triton.jit
def _reciprocal(x):
    """1 / x, up to 7e-6 too small, for 0 < x < 2^126: a guess by the exponent, and two steps of Newton's method."""
    y = (0x7EF311C3 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    y *= 2.0 - x * y
    return y * (2.0 - x * y)


@triton.jit
def _rounded(x):
    """A number under 2^22 rounded to an integer, in the mantissa of a large number: a conversion to int is slow."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def group_load(work, group_start, group_end, batch_size, num_heads, share):
    """reference._group_load: key blocks of a split for a group of 992, from its own work."""
    batch, size = batch_size.to(tl.float32), (group_end - group_start).to(tl.float32)
    margin = 1.1 - 0.6 * (group_start.to(tl.float32) * _reciprocal(batch))
    margin *= batch * _reciprocal(size)
    load = tl.maximum(work.to(tl.float32) * num_heads.to(tl.float32) * share, 0.0)
    return tl.maximum(_rounded(tl.minimum(load * margin, 2097152.0) + 0.4995), 1)


@triton.jit
def balanced_split(num_n, blocks_per_split, num_splits, SHORT: tl.constexpr):
    """Splits of at most that many key blocks, as far as the bound allows, and the key blocks of one."""
    splits = tl.maximum(tl.minimum(cdiv(num_n, blocks_per_split, SHORT), num_splits), 1)
    return splits, cdiv(num_n, splits, SHORT)
