"""Thresholds of a launch plan, on both sides of each: where both implementations go by it, only a number tells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fa3_metadata.triton_kernels import balance
from fa3_metadata.triton_kernels.builds import SGLANG, SGLANG_0_4_5, UPSTREAM
from fa3_metadata.triton_kernels.plan import LaunchPlan, make_plan
from fa3_metadata.triton_kernels.problem import SHORT_LIMIT, Problem
from fa3_metadata.triton_kernels.reference import Lengths, sequence_blocks

DECODE: dict[str, Any] = {"max_seqlen_q": 1, "max_seqlen_k": 65536, "num_heads": 8, "num_heads_k": 1, "headdim": 128}


def plan_of(batch_size: int, **more: Any) -> LaunchPlan:
    return make_plan(Problem(batch_size, **DECODE | {"policy": "balanced"} | more), SGLANG)


@pytest.mark.parametrize(
    ("batch_size", "more", "searches"),
    [
        (1, {}, True),
        (64, {"num_heads_k": 8}, True),  # 512 tiles
        (65, {"num_heads_k": 8}, False),
        (198, {}, True),  # 198 tiles are one and a half for each of 132 SMs
        (199, {}, False),
        (99, {"num_heads_k": 2}, True),
        (100, {"num_heads_k": 2}, False),
        (99, {"max_seqlen_q": 17}, True),  # 136 rows are two tiles of 128
        (100, {"max_seqlen_q": 17}, False),
        (256, {"num_sms": 200}, True),
        (257, {"num_sms": 200}, False),
    ],
)
def test_which_batches_are_searched(batch_size: int, more: dict[str, Any], searches: bool) -> None:
    assert plan_of(batch_size, **more).searches_splits == searches


@pytest.mark.parametrize(
    ("batch_size", "keys", "more", "splits"),
    [
        (1, 512, {}, True),
        (44, 512, {}, True),
        (45, 512, {}, False),  # what two splits gain, the combine kernel takes
        (22, 512, {"num_heads_k": 2}, True),
        (23, 512, {"num_heads_k": 2}, False),
        (34, 512, {"gpu": "NVIDIA H100 80GB HBM3"}, True),  # of less bandwidth to share
        (35, 512, {"gpu": "NVIDIA H100 80GB HBM3"}, False),
        (1, 512, {"headdim": 64}, True),
        (1, 384, {"headdim": 64}, False),  # two blocks of 192 keys
        (1, 128, {}, False),
        (1, 65536, {"window_size": (127, 0), "causal": True}, False),
    ],
)
def test_few_key_blocks_are_split_where_that_pays_for_the_combine_kernel(
    batch_size: int, keys: int, more: dict[str, Any], splits: bool
) -> None:
    """FA3 splits nothing of four key blocks or fewer."""
    short = DECODE | {"max_seqlen_k": keys} | more
    assert make_plan(Problem(batch_size, **short), SGLANG).num_splits == 1
    assert (plan_of(batch_size, **short).num_splits > 1) == splits


@pytest.mark.parametrize(
    ("more", "spare"),
    [
        ({}, False),
        ({"num_heads": 4}, True),
        ({"num_heads": 4, "max_seqlen_q": 2}, False),
        ({"num_heads": 4, "max_seqlen_q": 2, "has_cu_seqlens_q": True}, True),  # of one query in some sequences
        ({"num_heads": 12}, True),
        ({"headdim": 64}, True),
        ({"headdim": 64, "num_heads": 16}, False),
        ({"headdim": 64, "headdim_v": 512}, False),
        ({"headdim": 192, "headdim_v": 65}, False),
    ],
)
def test_rows_that_the_combine_kernel_has_to_spare(more: dict[str, Any], spare: bool) -> None:
    assert balance.has_spare_rows(Problem(5, **DECODE | more)) == spare
    assert balance.has_spare_rows(Problem(1, **DECODE | more)) == spare, "rows of several sequences are never mixed"


@pytest.mark.parametrize(
    ("more", "bounds"),
    [
        # Rows to spare are combined of as many splits as the bound allows: 32 where long sequences are not that long.
        ({"num_heads": 4}, (32, 64, 64)),
        ({"headdim": 64}, (32, 64, 128)),
        # Without them a bound costs nothing: what fills the SMs.
        ({}, (64, 128, 128)),
        ({"num_heads": 4, "max_seqlen_q": 2}, (103, 128, 128)),
        ({"headdim": 64, "num_heads": 16}, (64, 128, 128)),
    ],
)
def test_a_bound_costs_time_where_rows_are_to_spare(more: dict[str, Any], bounds: tuple[int, ...]) -> None:
    found = [plan_of(5, causal=True, max_seqlen_k=k, **more).num_splits for k in (13184, 65536, 2**20)]
    assert found == list(bounds)


def test_what_combining_takes_by_splits_and_bound() -> None:
    """Measured on an H100: four heads, 21 splits, 3.6 us more with a bound of 103 than with one of 32."""
    spare, full = Problem(5, **DECODE | {"num_heads": 4}), Problem(5, **DECODE)
    more = balance.combined_us(spare, 103, 21, 0.09) - balance.combined_us(spare, 32, 21, 0.09)
    assert more == pytest.approx(3.6, abs=0.5)
    assert balance.combined_us(full, 103, 21, 0.09) == balance.combined_us(full, 32, 21, 0.09) == 21 * 0.09
    assert balance.combined_us(Problem(5, **DECODE | {"headdim": 64}), 8, 1, 0.0) == 16 * 0.04


@pytest.mark.parametrize("max_seqlen_k", [512, 4096, 65536])
def test_an_invariant_bound_does_not_depend_on_the_batch(max_seqlen_k: int) -> None:
    """Nor on the memory that its partial outputs take: a sequence has the same splits whatever else is there."""
    call = {"max_seqlen_k": max_seqlen_k, "batch_invariant": True, "max_partial_bytes": 2**24}
    bounds = {plan_of(batch_size, **call).num_splits for batch_size in (1, 8, 64, 88, 89, 400, 992)}
    assert len(bounds) == 1
    assert bounds.pop() > 1


def test_more_than_eight_query_blocks_are_a_prefill() -> None:
    tokens = 8 * plan_of(4, max_seqlen_q=100).block_m // 8
    assert plan_of(4, max_seqlen_q=tokens).costs is not None
    assert plan_of(4, max_seqlen_q=tokens + 1).costs is None
    assert plan_of(4, max_seqlen_q=2**28).costs is None, "2^31 query rows are negative to FA3"


def test_appended_keys_count_towards_the_longest_sequence() -> None:
    """Of a batch that is meant to have no more than SHORT_LIMIT keys a sequence is cut there."""
    assert plan_of(1, max_seqlen_k=SHORT_LIMIT).is_short
    assert plan_of(1, max_seqlen_k=SHORT_LIMIT - 5, max_seqlen_k_new=5).is_short
    problem = Problem(1, **DECODE | {"max_seqlen_k": SHORT_LIMIT, "max_seqlen_k_new": 1000})
    plan = make_plan(problem, SGLANG)
    assert not plan.is_short
    _, _, blocks = sequence_blocks(problem, plan, Lengths(np.array([SHORT_LIMIT])))
    assert blocks.tolist() == [-(-(SHORT_LIMIT + 1000) // plan.block_n)]


def test_query_rows_that_wrap_divide_towards_zero() -> None:
    """(seqlen_q * heads + kBlockM - 1) / kBlockM in C++ ints: 2^31 + 8 rows are -2147483640, and not a block more."""
    plan = make_plan(Problem(1, **DECODE | {"max_seqlen_q": 2**28 + 1, "num_splits": 1}), UPSTREAM)
    assert plan.splits_tile[0] == 128
    assert plan.tiles_counted == -16777214  # -16777214.9


def test_a_total_of_no_queries_is_none_given() -> None:
    """FA3's own op leaves it at 0, and counts batch_size * max_seqlen_q queries."""
    none, no_total = (Problem(64, **DECODE, has_cu_seqlens_q=True, total_q=total) for total in (None, 0))
    assert none.query_tokens == no_total.query_tokens == 64
    assert make_plan(no_total, SGLANG_0_4_5).num_splits == make_plan(none, SGLANG_0_4_5).num_splits
