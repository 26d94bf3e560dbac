"""Policy "balanced" on the device: the search that reference.py describes, with every rounding of it.

Compiled without fused multiply-add, so that both come to the same schedule.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .balance import NUM_CANDIDATES
from .blocks import cdiv

CANDIDATES = tl.constexpr(NUM_CANDIDATES)
WARP = tl.constexpr(32)
ONE_WARP = tl.constexpr(64)  # the most sequences that one warp alone works on (launch_*.json)


@triton.jit
def work_of(num_m, num_n, causal_saving):
    """Key blocks read by all query blocks of a sequence: reference._work."""
    pairs = (num_m * (num_m - 1)).to(tl.float32)
    return tl.maximum(num_m * num_n - _rounded(pairs * causal_saving - 0.4995), 0)


@triton.jit
def _block_cost(busy, alone):
    return alone + (1.0 - alone) * (busy * busy * busy)


@triton.jit
def _total_and_longest(total, longest, more, other):
    return total + more, tl.maximum(longest, other)


@triton.jit
def fastest_blocks_per_split(
    num_m, num_n, work, causal_saving, share, num_splits, num_heads, tile, alone, split_cost, SHORT: tl.constexpr
):
    """reference._fastest_blocks_per_split: the key blocks of a split, for num_m, num_n and work [GROUP]."""
    # [GROUP, CANDIDATES]. One number for three, made as wide as that (by adding zeros) before it is taken apart, means
    # one exchange between threads and not one for all that follows. While it is under way, the first sums are made.
    k = tl.arange(0, CANDIDATES)[None, :]
    blocks = num_n * 16 + tl.minimum(num_m, 15)
    wide = ((work.to(tl.int64) << 32) | blocks)[:, None] + (k & CANDIDATES)

    heads = num_heads.to(tl.float32)
    if num_n.shape[0] <= ONE_WARP:  # which has instructions for either
        total, longest = tl.sum(work), tl.max(num_n)
    else:  # within warps likewise, and one exchange between them
        rows: tl.constexpr = (num_n.shape[0] // WARP, WARP)
        totals, longests = tl.sum(tl.reshape(work, rows), axis=1), tl.max(tl.reshape(num_n, rows), axis=1)
        total, longest = tl.reduce((totals, longests), 0, _total_and_longest)
    load, longest = total.to(tl.float32) * heads * share, tl.maximum(longest, 1)
    c = _candidates(k, load, longest, num_splits, SHORT)
    size = c.to(tl.float32)
    longest_tile = size + tile
    reciprocal = _reciprocal(size * longest_tile)
    inverse = longest_tile * reciprocal

    # three sums over the batch in one reduction
    blocks, wide_work = wide.to(tl.int32), (wide >> 32).to(tl.int32)
    num_n, num_m = blocks >> 4, blocks & 15
    tiles = num_m * tl.maximum(_rounded(num_n.to(tl.float32) * inverse + 0.4995), 1)
    big = num_n * 2 > c
    big_blocks = tl.where(big, wide_work, 0)
    joined = tl.join(tl.join(tiles, tl.where(big, tiles, 0)), tl.join(big_blocks, big_blocks))
    counts, big_blocks = tl.split(tl.sum(joined, axis=0, keep_dims=True))
    all_tiles, big_tiles = tl.split(counts)
    big_blocks, _ = tl.split(big_blocks)

    average = load + tile * (all_tiles.to(tl.float32) * heads) * share
    big_tiles = big_tiles.to(tl.float32) * heads
    big_cost = tl.maximum(big_blocks.to(tl.float32) * heads + tile * big_tiles, 1e-6)
    big_tiles = tl.maximum(big_tiles, 1.0)
    quotient = _reciprocal(big_tiles * big_cost)
    big_tile = big_cost * big_cost * quotient
    full_waves = ((big_tiles - 0.5) * share - 0.4995 + 12582912.0) - 12582912.0
    filled = average * (big_tiles * big_tiles * quotient) - full_waves
    waves = big_tile * (full_waves + _block_cost(tl.minimum(filled, 1.0), alone))
    time = tl.where(filled >= 1.0, average, waves)
    busy = tl.minimum(average * (size * reciprocal), 1.0)
    time = tl.maximum(time, longest_tile * _block_cost(busy, alone))
    time += longest.to(tl.float32) * inverse * split_cost
    time = tl.where(k == 0, time, time * 1.01)
    # A positive float's bits rise with it. Its last three make room for the candidate's number. A warp has every
    # candidate in four of its threads, and an instruction for the least number of all of them.
    key = tl.broadcast_to((time.to(tl.int32, bitcast=True) & -CANDIDATES) | k, (WARP // CANDIDATES, CANDIDATES))
    return tl.max(tl.where(key == tl.min(key), c, 0))


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
def _candidates(k, load, longest, num_splits, SHORT: tl.constexpr):
    """reference._candidates: candidate `k` for the key blocks of a split."""
    spread = tl.where(k == CANDIDATES - 1, 96, 32 + 3 * k).to(tl.float32) * 0.015625
    load = tl.minimum(load, 2097152.0)
    c = 1 + k + _rounded(load * spread - 0.4995)
    c = tl.where(k == 0, _rounded(load * 1.1 + 0.4995), c)
    return tl.maximum(tl.minimum(c, longest), cdiv(longest, num_splits, SHORT))


@triton.jit
def group_load(work, group_start, group_end, batch_size, num_heads, share):
    """reference._group_load: key blocks of a split for a group of 992, from its own work."""
    batch, size = batch_size.to(tl.float32), (group_end - group_start).to(tl.float32)
    margin = 1.1 - 0.6 * (group_start.to(tl.float32) * _reciprocal(batch))
    margin *= batch * _reciprocal(size)
    load = work.to(tl.float32) * num_heads.to(tl.float32) * share
    return tl.maximum(_rounded(tl.minimum(load * margin, 2097152.0) + 0.4995), 1)


@triton.jit
def balanced_split(num_n, blocks_per_split, num_splits, SHORT: tl.constexpr):
    """Splits of at most that many key blocks, as far as the bound allows, and the key blocks of one."""
    splits = tl.maximum(tl.minimum(cdiv(num_n, blocks_per_split, SHORT), num_splits), 1)
    return splits, cdiv(num_n, splits, SHORT)
