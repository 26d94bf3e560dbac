"""What is remembered of the calls of a forward: calls that ask something else are told apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fa3_metadata import calls
from fa3_metadata.calls import ForwardCall
from fa3_metadata.triton_kernels.problem import Problem

BF16 = torch.bfloat16
QUERIES, CACHE = torch.zeros(3, 1, 8, 128, dtype=BF16), torch.zeros(3, 64, 1, 128, dtype=BF16)
CALL: dict[str, Any] = {
    "q": QUERIES, "k_cache": CACHE, "v_cache": CACHE, "cache_seqlens": torch.tensor([70, 5, 9]),
    "page_table": torch.zeros(3, 100, dtype=torch.int32), "causal": True,
}  # fmt: skip
ASKED = Problem(3, 1, 6400, 8, 1, 128, page_size=64, causal=True)
STARTS = torch.tensor([0, 1, 2, 3])
RAGGED = {"cu_seqlens_q": STARTS, "max_seqlen_q": 4, "q": torch.zeros(9, 8, 128, dtype=BF16)}
OTHERS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"softcap": 30.0}, {"has_softcap": True}),
    ({"v_cache": CACHE[..., :64]}, {"headdim_v": 64}),
    ({"q": QUERIES.half()}, {"qkv_dtype": "float16"}),
    ({"q": QUERIES.expand(3, 4, 8, 128)}, {"max_seqlen_q": 4}),
    ({"k_cache": CACHE[:, :16], "v_cache": CACHE[:, :16]}, {"page_size": 16, "max_seqlen_k": 1600}),
    ({"page_table": torch.zeros(3, 101, dtype=torch.int32)}, {"max_seqlen_k": 6464}),
    ({"page_table": None}, {"page_size": None, "max_seqlen_k": 64}),
    ({"causal": False}, {"causal": False}),
    ({"window_size": (127, 0)}, {"window_size": (127, 0)}),
    ({"attention_chunk": 128}, {"attention_chunk": 128}),
    ({"num_splits": 3}, {"num_splits": 3}),
    ({"pack_gqa": False}, {"pack_gqa": False}),
    ({"sm_margin": 8}, {"sm_margin": 8}),
    ({"cache_leftpad": torch.zeros(3, dtype=torch.int32)}, {"has_leftpad_k": True}),
    ({"seqused_q": torch.ones(3, dtype=torch.int32)}, {"has_seqused_q": True}),
    ({"k": torch.zeros(3, 2, 1, 128, dtype=BF16)}, {"max_seqlen_k_new": 2}),
    ({"k": torch.zeros(3, 1, 128, dtype=BF16), "cu_seqlens_k_new": STARTS}, {"max_seqlen_k_new": 1}),
    (RAGGED, {"has_cu_seqlens_q": True, "max_seqlen_q": 4, "total_q": 9}),
    (RAGGED | {"max_seqlen_q": 5}, {"has_cu_seqlens_q": True, "max_seqlen_q": 5, "total_q": 9}),
    (RAGGED | {"cu_seqlens_q": STARTS[:3]},
     {"batch_size": 2, "has_cu_seqlens_q": True, "max_seqlen_q": 4, "total_q": 9}),
]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    calls._problems.clear()
    yield
    calls._problems.clear()


def asked(change: dict[str, Any], arch: int = 90, num_sms: int = 132, counts_queries: bool = True) -> Problem:
    return ForwardCall.read(CALL | change).problem(arch, num_sms, counts_queries)


@pytest.mark.parametrize("first_come", range(2))
def test_calls_that_differ_are_told_apart(first_come: int) -> None:
    """In every argument that the schedule depends on, whichever of them came first."""
    cases = [({}, {}), *OTHERS]
    for change, fields in cases if first_come == 0 else reversed(cases):
        expected = Problem(**vars(ASKED) | {"headdim_v": None} | fields)
        assert asked(change) == expected, change
    for change, fields in cases:  # as remembered
        assert asked(change) == Problem(**vars(ASKED) | {"headdim_v": None} | fields), change


def test_devices_and_what_counts_are_told_apart() -> None:
    assert [asked({}, arch=arch, num_sms=sms).arch for arch, sms in ((90, 132), (80, 132))] == [90, 80]
    assert [asked({}, num_sms=sms).num_sms for sms in (132, 78)] == [132, 78]
    assert [asked(RAGGED, counts_queries=counts).total_q for counts in (True, False)] == [9, None]


def test_a_bound_below_one_is_the_heuristics() -> None:
    """FA3's forward: `num_splits <= 0`, hopper/flash_api.cpp."""
    assert asked({"num_splits": -1}) == ASKED
