"""Host side: from a problem and a build's rules to everything the device needs to know.

Mirrors `mha_fwd_get_scheduler_metadata` and `get_pagedkv_tma` (hopper/flash_api.cpp) of FlashAttention; what they ask
of its heuristics is in heuristics.py. Pure Python: no tensors, no device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from . import invariance
from .balance import Costs, balanced_num_splits, costs_of, invariant_num_splits
from .builds import MAX_DYNAMIC_SPLIT_BATCH, FA3Rules, unsupported_reason
from .heuristics import (
    Why,
    enough_tiles,
    int32,
    most_keys_read,
    num_blocks,
    resolve_num_splits,
    resolve_pack_gqa,
    tiles_counted_for_splits,
)
from .layout import MetadataLayout
from .problem import SHORT_LIMIT, Problem, unchecked_replace
from .tiles import find_tile

MAX_BALANCED_M_BLOCKS = 8  # with more query blocks a call is a prefill, which FA3's rule serves


@dataclass(frozen=True)
class LaunchPlan:
    """What the device side is launched with: the answer of the host-side rules. Sizes are in tokens or rows."""

    rules: FA3Rules
    is_causal: bool  # after FA3's normalisation of the mask
    is_local: bool
    window_size: tuple[int, int]  # as the mask uses it: open ends filled in
    uses_one_wg: bool
    paged_kv_tma: bool
    block_m: int  # kBlockM: query rows of a tile
    block_n: int  # kBlockN: keys of a block
    num_sms: int  # after sm_margin
    splits_tile: tuple[int, int]  # kBlockM and kBlockN with which FA3's bound on splits is found
    tiles_counted: int  # query blocks that it counts
    num_splits: int  # upper bound; layout.num_splits is what the forward is told
    why_num_splits: Why
    pack_gqa: bool  # pass the same to the forward
    pack_gqa_reason: str
    num_heads: int  # heads the tile scheduler sees: KV heads when packed, else q heads
    q_heads_per_row: int  # rows a query token gives a tile: q heads per KV head when packed, else 1
    heads_per_l2_head: int  # scheduler heads that share a KV head: 1 when packed
    max_kvblocks_in_l2: int
    dynamic_splits: bool  # sequences get splits of their own; otherwise every one has a single split
    costs: Costs | None  # policy "balanced"; None: FA3's rule
    attention_chunk: int  # in tokens; 0: none
    max_seqlen_q: int  # in tokens
    is_short: bool  # no sequence is meant to have more than SHORT_LIMIT tokens or query rows; one that has is cut
    layout: MetadataLayout

    @property
    def num_splits_reason(self) -> str:
        text, *numbers = self.why_num_splits
        return str(text).format(*numbers)

    @property
    def searches_splits(self) -> bool:
        """Whether policy "balanced" tries several splits; with tiles enough for every SM the load alone decides."""
        batch = self.layout.batch_size
        tiles = batch * self.num_heads * -(-self.max_seqlen_q * self.q_heads_per_row // self.block_m)
        return batch <= 64 or (batch <= 256 and 2 * tiles <= 3 * self.num_sms)

    def for_batch(self, batch_size: int) -> LaunchPlan:
        """The same for another batch size, where `sizes_alone_differ`."""
        return unchecked_replace(self, layout=unchecked_replace(self.layout, batch_size=batch_size))

    @property
    def share_of_load(self) -> float:
        """What the total is multiplied with to get the load of an SM, for policy "balanced"."""
        return float(np.float32(1 / self.num_sms))

    @property
    def causal_saving(self) -> float:
        """Key blocks that a pair of query blocks saves by causality, for each of the pair."""
        return float(np.float32(0.5 * self.block_m / (self.q_heads_per_row * self.block_n))) if self.is_causal else 0.0


@lru_cache(maxsize=4096)
def make_plan(problem: Problem, rules: FA3Rules) -> LaunchPlan:
    """The launch plan of `problem` under `rules`.

    Raises `ValueError` for what that build has no kernels for, and `VarianceError`, one of its kind, for what cannot be
    batch invariant: see invariance.py.
    """
    plan = _planned(problem, rules)
    if problem.batch_invariant and (error := _variance(problem, plan)) is not None:
        raise error
    return plan


@lru_cache(maxsize=4096)
def variance_of(problem: Problem, rules: FA3Rules) -> invariance.VarianceError | None:
    """Why a call that asks to be batch invariant is not; None: it is. Raises `ValueError` as `make_plan` does.

    The answer is remembered: who raises it raises a copy, as it would keep the frames that it was raised in.
    """
    return _variance(problem, _planned(problem, rules))


def _variance(problem: Problem, plan: LaunchPlan) -> invariance.VarianceError | None:
    found = (
        invariance.cannot_tell(problem, plan)
        or invariance.too_many_sequences(problem, plan, MAX_DYNAMIC_SPLIT_BATCH)
        or invariance.window_is_lost(problem, plan, _normalise_mask(invariance.in_widest_table(problem))[1])
    )
    if found is None and invariance.is_ragged(problem):
        most = _most_queries(invariance.of_one_query(problem), plan.rules)
        found = invariance.too_many_queries(problem, most)
    return found


@lru_cache(maxsize=1024)
def _most_queries(one: Problem, rules: FA3Rules) -> int:
    """The largest max_seqlen_q at which a layer's ragged queries run as one query does."""
    return invariance.most_queries(
        lambda queries: invariance.kernel_of(_planned(unchecked_replace(one, max_seqlen_q=queries), rules)),
        (2**31 - 1) // one.q_heads_per_kv_head,  # more wrap
    )


def _planned(problem: Problem, rules: FA3Rules) -> LaunchPlan:
    """The plan itself, batch invariant or not."""
    if reason := unsupported_reason(rules, problem):
        raise ValueError(reason)
    p, group = problem, problem.q_heads_per_kv_head
    query_rows = int32(p.max_seqlen_q * group)
    is_causal, is_local, window = _normalise_mask(p)
    mask_flags = _tile_flags(p, is_causal, is_local)
    flags = mask_flags
    if not rules.packs_first:
        flags |= _one_wg_flag(p, rules, is_local, True)
    num_sms = p.num_sms - p.sm_margin

    paged = p.page_size is not None
    block_m, block_n = _tile(p, rules, flags)
    paged_kv_tma = (
        p.page_size is not None
        and p.arch >= 90
        and not p.has_leftpad_k
        and p.max_seqlen_k_new == 0
        and (rules.paged_tma_when_local or not is_local)
        and p.page_size % block_n == 0
        and query_rows > block_m
    )
    paged_non_tma = paged and not paged_kv_tma
    if paged_non_tma:
        mask_flags |= {"paged_non_tma"}
        flags |= {"paged_non_tma"}
    if rules.packs_first:
        block_m, _ = _tile(p, rules, flags)
        first_pack_gqa, _ = resolve_pack_gqa(p, rules, block_m, 0, paged_non_tma, is_local)
        flags |= _one_wg_flag(p, rules, is_local, first_pack_gqa)

    # sm_8x picks its tile by whether there are splits, and the number of splits by the tile: FA3 breaks
    # the circle by counting blocks as if there were.
    splits_tile = block_m, block_n = _tile(p, rules, flags | {"split"})
    tiles_counted = tiles_counted_for_splits(p, rules, block_m, p.batch_size)
    is_decode = 0 <= query_rows <= MAX_BALANCED_M_BLOCKS * block_m
    balanced = p.policy == "balanced" and (
        p.batch_invariant or (is_decode and p.batch_size <= rules.most_split_by_metadata)
    )
    # Only a forward that is told the bound has room for ours; another one has room for FA3's.
    own_bound = balanced and p.forward_is_told and "num_splits" not in rules.forward_lacks
    why_num_splits: Why = ("given",)
    if p.num_splits:
        num_splits = p.num_splits
    elif own_bound and p.batch_invariant:
        num_splits, why_num_splits = _invariant_bound(p, num_sms, block_m, block_n, is_local, is_decode)
    else:
        keys_read = most_keys_read(p, block_m, is_local, window)
        bound = (keys_read, num_sms, block_m, block_n, is_causal or is_local)  # what FA3 finds it by
        if own_bound:
            tiles = p.num_heads_k * num_blocks(query_rows, block_m)
            fa3, _ = resolve_num_splits(p, p.max_seqlen_k, tiles, *bound)
            costs = costs_of(p, compiled_kernel(p, block_m, block_n), num_sms)
            num_splits = balanced_num_splits(p, costs, tiles, -(-keys_read // block_n), num_sms, fa3)
            why_num_splits = ("what may pay, within max_partial_bytes",)
        else:
            num_splits, why_num_splits = resolve_num_splits(p, p.max_seqlen_k, tiles_counted, *bound)
    if rules.packs_first:
        flags = mask_flags | _one_wg_flag(p, rules, is_local, num_splits > 1)
    block_m, block_n = _tile(p, rules, flags | ({"split"} if num_splits > 1 else set()))
    pack_gqa, pack_reason = resolve_pack_gqa(p, rules, block_m, num_splits, paged_non_tma, is_local)
    if rules.packs_with_splits == "only":
        pack_gqa, pack_reason = num_splits > 1, "this build packs with splits, and only then"

    beyond = balanced and rules.splits_beyond_992
    dynamic_splits = num_splits > 1 and (p.batch_size <= MAX_DYNAMIC_SPLIT_BATCH or beyond)
    told = num_splits  # what the forward is to be told
    if rules.one_split_drops_row and num_splits == 1 and not (p.num_splits or own_bound):
        told = 0
    conditions = {
        "always": True,
        "sort": rules.sorts_batches and not is_local,
        "swizzle": is_causal or is_local,
        "dynamic_splits": dynamic_splits,
        "dynamic_row": p.batch_size <= MAX_DYNAMIC_SPLIT_BATCH and not (rules.one_split_drops_row and told == 1),
    }
    kv_block_bytes = block_n * (p.headdim + p.value_headdim) * p.element_size
    return LaunchPlan(
        rules=rules,
        is_causal=is_causal,
        is_local=is_local,
        window_size=window,
        uses_one_wg="one_wg" in flags,
        paged_kv_tma=paged_kv_tma,
        block_m=block_m,
        block_n=block_n,
        num_sms=num_sms,
        splits_tile=splits_tile,
        tiles_counted=tiles_counted,
        num_splits=num_splits,
        why_num_splits=why_num_splits,
        pack_gqa=pack_gqa,
        pack_gqa_reason=pack_reason,
        num_heads=p.num_heads_k if pack_gqa else p.num_heads,
        q_heads_per_row=group if pack_gqa else 1,
        heads_per_l2_head=1 if pack_gqa else group,
        max_kvblocks_in_l2=rules.l2_bytes(group) // kv_block_bytes,
        dynamic_splits=dynamic_splits,
        costs=costs_of(p, compiled_kernel(p, block_m, block_n), num_sms, num_splits) if balanced else None,
        attention_chunk=p.attention_chunk,
        max_seqlen_q=p.max_seqlen_q,
        is_short=_is_short(p, p.max_seqlen_k),
        layout=MetadataLayout(
            batch_size=p.batch_size,
            row_names=tuple(row for row, when in rules.rows if conditions[when]),
            has_semaphore=p.arch >= 90 or num_splits > 1,
            num_splits=told,
            pack_gqa=pack_gqa,
            row_alignment=rules.row_alignment,
            semaphore_first=rules.semaphore_first,
        ),
    )


def sizes_alone_differ(
    plan: LaunchPlan, problem: Problem, batch_size: int, max_seqlen_k: int, served: int | None = None
) -> bool:
    """Whether the plan of `problem` is that of another batch size and max_seqlen_k, too, but for these two.

    `served`: a max_seqlen_k of which it is known that it is, at the problem's batch size.
    """
    if (batch_size > MAX_DYNAMIC_SPLIT_BATCH) != (problem.batch_size > MAX_DYNAMIC_SPLIT_BATCH):
        return False
    if plan.costs is not None:
        if not (problem.num_splits or problem.batch_invariant):  # a bound that depends on the batch size
            return False
        if plan.for_batch(batch_size).searches_splits != plan.searches_splits:
            return False
    if max_seqlen_k != problem.max_seqlen_k and max_seqlen_k != served:
        if problem.arch < 90 or problem.window_size != (-1, -1) or problem.attention_chunk:
            return False
        if _is_short(problem, max_seqlen_k) != plan.is_short:
            return False
    served_before = max_seqlen_k == served and plan.rules.splits_count == "one_sequence"
    if problem.num_splits or problem.batch_invariant or served_before:
        return True
    return _num_splits_like(plan, problem, batch_size, max_seqlen_k)[0] == plan.num_splits


def batch_sizes_of_other_plans(problem: Problem, rules: FA3Rules) -> list[int]:
    """Batch sizes from 0 on, up to the problem's own, among which is one of each plan that `sizes_alone_differ` tells.

    Where FA3's bound on splits counts the batch, it may be another one from each of them on.
    """
    largest, found = problem.batch_size, {0, 1, MAX_DYNAMIC_SPLIT_BATCH, MAX_DYNAMIC_SPLIT_BATCH + 1}
    rows = problem.max_seqlen_q * problem.q_heads_per_kv_head
    if rules.bound_depends_on_batch and not problem.num_splits and rows:
        plan = make_plan(problem, rules)
        block_m = plan.splits_tile[0]
        most = int(enough_tiles(plan.num_sms)) // problem.num_heads_k + 2  # query blocks of a head that fill the SMs
        found |= {blocks * block_m // rows + 1 for blocks in range(most)}
    return sorted({min(batch_size, largest) for batch_size in found})


def plan_like(plan: LaunchPlan, problem: Problem, batch_size: int, max_seqlen_k: int) -> LaunchPlan:
    """The plan for other sizes where `sizes_alone_differ`."""
    why = plan.why_num_splits
    if not (problem.num_splits or problem.batch_invariant):
        why = _num_splits_like(plan, problem, batch_size, max_seqlen_k)[1]
    return unchecked_replace(
        plan.for_batch(batch_size),
        tiles_counted=tiles_counted_for_splits(problem, plan.rules, plan.splits_tile[0], batch_size),
        window_size=_normalise_mask(unchecked_replace(problem, max_seqlen_k=max_seqlen_k))[2],
        why_num_splits=why,
    )


def _num_splits_like(plan: LaunchPlan, problem: Problem, batch_size: int, max_seqlen_k: int) -> tuple[int, Why]:
    """FA3's bound on splits where `plan` is that of `problem` but for the sizes; max_seqlen_k only without a window."""
    counts_one = plan.rules.splits_count == "one_sequence"
    if max_seqlen_k == problem.max_seqlen_k and (counts_one or batch_size == problem.batch_size):
        return plan.num_splits, plan.why_num_splits
    block_m, block_n = plan.splits_tile
    keys_read = most_keys_read(problem, block_m, True, plan.window_size) if plan.is_local else max_seqlen_k
    tiles = plan.tiles_counted if counts_one else tiles_counted_for_splits(problem, plan.rules, block_m, batch_size)
    return resolve_num_splits(
        problem, max_seqlen_k, tiles, keys_read, plan.num_sms, block_m, block_n, plan.is_causal or plan.is_local
    )


def _is_short(p: Problem, max_seqlen_k: int) -> bool:
    keys = max_seqlen_k + p.max_seqlen_k_new
    return keys <= SHORT_LIMIT and p.max_seqlen_q * p.q_heads_per_kv_head <= SHORT_LIMIT


def _invariant_bound(
    p: Problem, num_sms: int, block_m: int, block_n: int, is_local: bool, is_decode: bool
) -> tuple[int, Why]:
    """The bound on splits that all batches of a layer share, whatever their longest lengths."""
    if not is_decode:
        return 1, ("a prefill, not split in any batch",)
    one = invariance.of_one_query(p)
    keys_read = most_keys_read(one, block_m, is_local, _normalise_mask(one)[2])
    fa3, _ = resolve_num_splits(one, 0, p.num_heads_k, keys_read, num_sms, block_m, block_n, True)
    return invariant_num_splits(one, -(-keys_read // block_n), fa3), ("what may pay, the same in every batch",)


def _normalise_mask(p: Problem) -> tuple[bool, bool, tuple[int, int]]:
    """(is_causal, is_local, window) as FA3 sees them."""
    left, right = p.window_size
    causal, chunk = p.causal, p.attention_chunk
    if left >= p.max_seqlen_k - 1:
        left = -1
    if right >= p.max_seqlen_q - 1:
        right = -1
    if p.max_seqlen_q == 1 and (left, right, chunk) == (-1, -1, 0):
        # One query sees every key either way. FA3 keeps the causal kernels where their kBlockN suits paging.
        causal = causal and 64 < p.headdim <= 128 and p.page_size is not None
    if causal:
        right = 0
    is_causal = left < 0 and right == 0 and chunk == 0
    is_local = (left >= 0 or right >= 0 or chunk >= 1) and not is_causal
    left = p.max_seqlen_k - 1 if left < 0 else left
    right = p.max_seqlen_q - 1 if right < 0 else right
    if chunk > 0:
        left, right = min(left, chunk - 1), min(right, chunk - 1)
    return is_causal, is_local, (left, right)


def _one_wg_flag(p: Problem, rules: FA3Rules, is_local: bool, pack_gqa: bool) -> frozenset[str]:
    """The tile flag of kernels with a single MMA warpgroup, where this build has and uses one."""
    rows = int32(p.max_seqlen_q * (p.q_heads_per_kv_head if pack_gqa else 1))
    uses = (
        p.headdim in rules.one_wg_headdims and p.arch >= 90 and rows <= 64 and (rules.one_wg_when_local or not is_local)
    )
    return frozenset({"one_wg"} if uses else ())


def _round_headdim(headdim: int) -> int:
    return next(rounded for rounded in (64, 96, 128, 192, 256, 512) if headdim <= rounded)


def compiled_kernel(p: Problem, block_m: int, block_n: int) -> tuple[int, int, int, int, int]:
    """What serves a call: (element size, head dim, head dim of v, kBlockM, kBlockN), head dims as compiled."""
    return p.element_size, _round_headdim(p.headdim), _round_headdim(p.value_headdim), block_m, block_n


def _tile_flags(p: Problem, is_causal: bool, is_local: bool) -> frozenset[str]:
    rounded_v = _round_headdim(p.value_headdim)
    holds = {
        "causal": is_causal,
        "local": is_local,
        "softcap": p.has_softcap,
        "dv<=128": rounded_v <= 128,
        f"dv{rounded_v}": True,
        "sm86": p.arch in (86, 89),
        "paged": p.page_size is not None,
        "append": p.max_seqlen_k_new > 0,
    }
    return frozenset(flag for flag, value in holds.items() if value)


def _tile(p: Problem, rules: FA3Rules, flags: frozenset[str]) -> tuple[int, int]:
    tables = rules.sm90_tiles if p.arch >= 90 else rules.sm8x_tiles
    assert tables is not None  # unsupported_reason
    return find_tile(tables[p.element_size], _round_headdim(p.headdim), flags)
