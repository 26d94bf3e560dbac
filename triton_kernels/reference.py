"""The device side in NumPy, written to be read: lengths -> blocks -> total -> splits -> order -> rows.

Mirrors `prepare_varlen_num_blocks_kernel` (hopper/flash_prepare_scheduler.cu of FlashAttention) and shares
nothing with the Triton kernel but the launch plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .balance import CANDIDATES, CLEAR_GAIN, MOST_FOR_ALL_CANDIDATES, MOST_QUERY_BLOCKS, NUM_CANDIDATES, Costs
from .builds import MAX_DYNAMIC_SPLIT_BATCH
from .plan import LaunchPlan
from .problem import SHORT_LIMIT, Problem
from .reciprocal import approximate_reciprocal

Ints = NDArray[np.int32]
Floats = Any  # a float32, or an array of them


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
    rows, num_m_blocks, num_n_blocks = sequence_blocks(problem, plan, lengths)
    if plan.costs is not None:
        num_n_blocks = blocks_read(problem, plan, lengths)
    num_splits = splits_of(plan, num_m_blocks, num_n_blocks)
    return metadata_of_splits(plan, rows, num_m_blocks, num_n_blocks, num_splits)


def splits_of(plan: LaunchPlan, num_m_blocks: Ints, num_n_blocks: Ints) -> Ints:
    """KV splits of every sequence; under policy "balanced" of the key blocks that are read."""
    if not plan.dynamic_splits:
        return np.ones_like(num_n_blocks)
    return (_split if plan.costs is None else split_balanced)(plan, num_m_blocks, num_n_blocks)


def sequence_blocks(problem: Problem, plan: LaunchPlan, lengths: Lengths) -> tuple[Ints, Ints, Ints]:
    """Query rows, query blocks and key blocks of every sequence."""
    rows, _, seqlen_k = _rows_and_lengths(problem, plan, lengths)
    return rows, _ceil_div(rows, plan.block_m), _ceil_div(seqlen_k, plan.block_n)


def _rows_and_lengths(problem: Problem, plan: LaunchPlan, lengths: Lengths) -> tuple[Ints, Ints, Ints]:
    """Query rows, query tokens and keys of every sequence; in a short batch, rows and keys up to SHORT_LIMIT."""
    seqlen_q, seqlen_k = sequence_lengths(problem, lengths)
    rows = np.maximum(seqlen_q * np.int32(plan.q_heads_per_row), 0)
    if plan.is_short:
        rows, seqlen_k = np.minimum(rows, SHORT_LIMIT), np.minimum(seqlen_k, SHORT_LIMIT)
    return rows, seqlen_q, seqlen_k


def metadata_of_splits(plan: LaunchPlan, rows: Ints, num_m_blocks: Ints, num_n_blocks: Ints, num_splits: Ints) -> Ints:
    """The metadata of sequences whose splits are known. No split may be over `plan.num_splits`."""
    num_n_blocks = _ceil_div(num_n_blocks, num_splits)
    order = np.arange(len(num_splits), dtype=np.int32)
    if plan.layout.is_sorted:
        order = _longest_first(plan, num_m_blocks, num_n_blocks)
    values = {
        "num_splits_dynamic": num_splits[order],
        "num_m_blocks": num_m_blocks[order],
        "packed_seqlen_q": rows[order],
        "varlen_batch_idx": order,
        "num_nheads_in_l2": _num_nheads_in_l2(plan, num_n_blocks)[order],
    }
    metadata = np.zeros(plan.layout.size, np.int32)  # the semaphore is among the zeros
    for name, row in plan.layout.rows.items():
        metadata[row] = values[name]
    return metadata


def blocks_read(problem: Problem, plan: LaunchPlan, lengths: Lengths) -> Ints:
    """Key blocks that the last query block of every sequence reads: those that the forward splits."""
    rows, seqlen_q, seqlen_k = _rows_and_lengths(problem, plan, lengths)
    num_n_blocks = _ceil_div(seqlen_k, plan.block_n)
    if not plan.is_local:
        return num_n_blocks
    num_m_blocks = _ceil_div(rows, plan.block_m)
    first_row = np.maximum(num_m_blocks - 1, 0) * np.int32(plan.block_m) // np.int32(plan.q_heads_per_row)
    at = first_row + seqlen_k - seqlen_q  # the key of that row itself
    first_key = at - np.int32(plan.window_size[0])
    if plan.attention_chunk:
        first_key = np.maximum(first_key, at - at % np.int32(plan.attention_chunk))
    first_block = np.maximum(first_key, 0) // np.int32(plan.block_n)
    return np.maximum(num_n_blocks - first_block, 0)


def sequence_lengths(problem: Problem, lengths: Lengths) -> tuple[Ints, Ints]:
    """Query tokens and keys of every sequence. A negative length counts as zero."""
    if lengths.seqused_q is not None:
        seqlen_q = lengths.seqused_q.astype(np.int32)
    elif lengths.cu_seqlens_q is not None:
        seqlen_q = _differences(lengths.cu_seqlens_q)
    else:
        seqlen_q = np.full(problem.batch_size, problem.max_seqlen_q, np.int32)
    seqlen_k = lengths.cache_seqlens.astype(np.int32)
    if lengths.leftpad_k is not None:
        seqlen_k = seqlen_k - lengths.leftpad_k.astype(np.int32)
    if lengths.cu_seqlens_k_new is not None:
        seqlen_k = seqlen_k + _differences(lengths.cu_seqlens_k_new)
    else:
        seqlen_k = seqlen_k + np.int32(problem.max_seqlen_k_new)
    return np.maximum(seqlen_q, 0), np.maximum(seqlen_k, 0)


def _differences(running_sum: NDArray[np.integer]) -> Ints:
    """Its steps, in the int32 arithmetic of the device."""
    sums = running_sum.astype(np.int32)
    return sums[1:] - sums[:-1]


def _split(plan: LaunchPlan, num_m_blocks: Ints, num_n_blocks: Ints) -> Ints:
    """KV splits of every sequence: as many as keep each near the SMs' average load plus 10 %."""
    total_blocks = np.sum(num_m_blocks * num_n_blocks, dtype=np.int32)
    per_head = np.float32(total_blocks) * np.float32(1.1)
    load = np.ceil(per_head * np.float32(plan.num_heads) * approximate_reciprocal(plan.num_sms))
    blocks_per_sm = np.int32(min(load, np.float32(2**31 - 128)))  # the GPU's conversion to int32 saturates
    if blocks_per_sm <= 0:  # no queries at all
        return np.ones_like(num_n_blocks)
    wanted = (num_n_blocks + blocks_per_sm - np.int32(1)) // blocks_per_sm
    return np.maximum(np.minimum(wanted, np.int32(plan.num_splits)), np.int32(1))


def split_balanced(plan: LaunchPlan, num_m_blocks: Ints, blocks: Ints) -> Ints:
    """KV splits of every sequence: none longer than the number of key blocks predicted to be fastest."""
    assert plan.costs is not None
    num_m_blocks = np.minimum(num_m_blocks, np.int32(MOST_QUERY_BLOCKS))  # query lengths may be absurd
    if plan.costs.fixed_blocks:
        blocks_per_split: Ints | np.int32 = np.int32(plan.costs.fixed_blocks)
    elif not plan.searches_splits:
        blocks_per_split = _group_load(plan, num_m_blocks, blocks)
    else:
        blocks_per_split = _fastest_blocks_per_split(plan, num_m_blocks, blocks)
    return np.clip(_ceil_div(blocks, blocks_per_split), 1, plan.num_splits).astype(np.int32)


def _work(plan: LaunchPlan, num_m_blocks: Ints, blocks: Ints) -> Ints:
    """Key blocks read by all query blocks of a sequence. Earlier query blocks of a causal call read fewer."""
    work = num_m_blocks * blocks
    if plan.is_causal:
        pairs = (num_m_blocks * (num_m_blocks - 1)).astype(np.float32)
        saved = _rounded(pairs * np.float32(plan.causal_saving) - np.float32(0.4995))  # down
        work = np.maximum(work - saved.astype(np.int32), 0)
    return work


def _load(plan: LaunchPlan, work: Ints) -> np.float32:
    """Key blocks for each SM."""
    total = np.sum(work, dtype=np.int32)
    load = np.float32(np.float32(total) * np.float32(plan.num_heads) * np.float32(plan.share_of_load))
    return np.maximum(load, np.float32(0))  # a total that has wrapped is negative


def _group_load(plan: LaunchPlan, num_m_blocks: Ints, blocks: Ints) -> Ints:
    """Key blocks of a split where tiles are many, for each sequence: the load of an SM, guessed from its own group.

    Longest first, they fill the SMs in any case. But groups of 992 come one after another, so the splits of later ones
    are smaller: an SM that starts one of them last must not keep all others waiting.
    """
    f32, work, batch = np.float32, _work(plan, num_m_blocks, blocks), len(blocks)
    found = np.ones_like(blocks)
    for start in range(0, batch, MAX_DYNAMIC_SPLIT_BATCH):
        group = slice(start, min(start + MAX_DYNAMIC_SPLIT_BATCH, batch))
        margin = f32(1.1) - f32(0.6) * (f32(start) * _reciprocal(f32(batch)))
        margin = margin * (f32(batch) * _reciprocal(f32(group.stop - start)))
        load = np.minimum(_load(plan, work[group]) * margin, f32(2**21))
        found[group] = max(np.int32(_rounded(load + f32(0.4995))), np.int32(1))
    return found


def _fastest_blocks_per_split(plan: LaunchPlan, num_m_blocks: Ints, blocks: Ints) -> np.int32:
    """Of a few candidates, the number of key blocks a split for which balance.py's law predicts the least time."""
    costs, f32, i32 = plan.costs, np.float32, np.int32
    assert costs is not None
    longest, work = i32(max(blocks.max(initial=0), 1)), _work(plan, num_m_blocks, blocks)
    heads, share, load = f32(plan.num_heads), f32(plan.share_of_load), _load(plan, work)
    k = np.arange(0, NUM_CANDIDATES, 1 if len(blocks) <= MOST_FOR_ALL_CANDIDATES else 2, dtype=i32)
    candidates = _candidates(plan, k, load, longest)
    inverse = _reciprocal(candidates.astype(f32))

    wanted = _rounded(blocks[:, None].astype(f32) * inverse + f32(0.4995))  # up, but for the least excess
    tiles = num_m_blocks[:, None] * np.maximum(wanted.astype(i32), 1)
    is_big = 2 * blocks[:, None] > candidates
    all_tiles = np.sum(tiles, axis=0, dtype=i32).astype(f32) * heads
    big_tiles = np.sum(tiles * is_big, axis=0, dtype=i32).astype(f32) * heads
    big_load = np.sum(work[:, None] * is_big, axis=0, dtype=i32).astype(f32) * heads * share

    tallest = candidates.astype(f32) + f32(costs.tile)
    time = _predicted_time(costs, tallest, load, all_tiles, big_tiles, big_load, share)
    splits = np.maximum(f32(longest) * inverse * f32(costs.per_split), f32(costs.least_splits))
    combine = f32(costs.combine) + splits
    time = np.where(candidates < longest, time + combine, time)
    time = np.maximum(np.where(k == 0, time, time * f32(CLEAR_GAIN)), f32(0))
    return candidates[np.argmin(time.view(i32) // NUM_CANDIDATES)]  # but for the last bits, as the kernel does


def _predicted_time(
    costs: Costs, tallest: Floats, load: Floats, all_tiles: Floats, big_tiles: Floats, big_load: Floats, share: Floats
) -> Floats:
    """Time of the attention kernel by balance.py's law, for each candidate.

    Tiles are counted in the whole batch, loads are key blocks for each SM, heights what an SM has done since it began.
    """
    f32, tile = np.float32, np.float32(costs.tile)
    small_tiles = np.maximum(all_tiles - big_tiles, f32(0))
    big_tiles = np.maximum(big_tiles, f32(1))
    waves, others = big_tiles * share, np.maximum(small_tiles, f32(1)) * share
    quotient = _reciprocal(waves * others)  # one division for two
    each = others * quotient
    big = big_load * each + tile  # the mean of each kind
    small_load = np.maximum(load - big_load, f32(0))
    small = small_load * (waves * quotient) + tile
    filling = small_load + tile * (small_tiles * share)

    full_waves = _rounded((big_tiles - f32(0.5)) * share - f32(0.4995))  # at least a tile is left over
    left = waves - full_waves
    spread = np.maximum(tallest - big, f32(0))
    low = np.where(full_waves >= 1, np.maximum(big - f32(2) * spread * each, spread), big)
    height = np.where(full_waves >= 1, low, tallest)
    half = f32(0.5) * height
    per_half = _reciprocal(half)
    lower = left + filling * per_half
    busy = np.minimum(lower, f32(1))
    upper = left * (low * per_half - f32(1)) + (lower - busy)
    busy_above = np.minimum(upper, f32(1))
    last_wave = half * (_block_cost(costs, busy) + _block_cost(costs, busy_above) + (upper - busy_above))
    time = (big * waves - left * low) + last_wave
    overhang = np.maximum(small - f32(2) * spread, f32(0)) * f32(0.5 * costs.alone)
    return np.where(filling > (f32(1) - left) * low, time + overhang, time)


def _candidates(plan: LaunchPlan, k: Ints, load: np.float32, longest: np.int32) -> Ints:
    """Key blocks of a split by candidate `k`: FA3's choice for 0, and others around the load of an SM."""
    f32, (parts, more) = np.float32, np.array(CANDIDATES, np.int32)[k].T
    of_load = np.where(k == 0, f32(1.1), parts.astype(f32) * f32(1 / 64))
    candidates = _rounded(np.minimum(load, f32(2**21)) * of_load + f32(0.4995)).astype(np.int32) + more
    at_least = max(-(-longest // np.int32(plan.num_splits)), np.int32(1))
    return np.maximum(np.minimum(candidates, longest), at_least).astype(np.int32)


def _reciprocal(x: Any) -> Any:
    """1 / x, up to 7e-6 too small, as the kernel computes it: a guess by the exponent, two steps of Newton's method."""
    y = (np.int32(0x7EF311C3) - x.view(np.int32)).view(np.float32)
    y = y * (np.float32(2) - x * y)
    return y * (np.float32(2) - x * y)


def _rounded(x: Any) -> Any:
    """Float32 numbers under 2^22 rounded to integers as the kernel does it: in the mantissa of a large number."""
    large = np.float32(1.5 * 2**23)
    return (x + large) - large


def _block_cost(costs: Costs, busy: Floats) -> Floats:
    """Time of a key block while a share `busy` of the SMs works."""
    a, b, c, d = map(np.float32, costs.block)
    return a + busy * (b + busy * (c + busy * d))


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


def _ceil_div(a: Ints, b: int | np.int32 | Ints) -> Ints:
    return -(-a // b)
