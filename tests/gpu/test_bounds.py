"""Every road to the real forward in batches where FA3's bound on splits counts, eager and captured.

sglang-kernel 0.4.5 and later bound the splits by the queries of the whole batch, so that a larger batch has room for
fewer. A long sequence among short ones wants more than that; metadata made by the older rule was out of bounds here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata import MetadataPlan, MetadataPlans, step, wrap_forward
from fa3_metadata.engines.sglang import attach
from fa3_metadata.installed import load_forward, provider_of
from fa3_metadata.triton_kernels.builds import rules_for

from ..helpers.sglang_stand_in import DIM, HEADS, KV_HEADS, PAGE, Batch, Sglang
from .test_wheels import PACKAGE, WHEEL

BUILD = str(WHEEL)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        PACKAGE not in ("sglang-kernel", "sgl-kernel"), reason="needs SGLang's kernel package, which has the forward"
    ),
]
BATCHES = [1, 4, 31, 64, 100, 129, 256, 1000]
WIDTH = 131072
HEADS_8_1 = {"num_heads": 8, "num_heads_k": 1, "headdim": 128, "page_size": 64, "causal": True}


def skewed(batch_size: int, longest: int = 100_000) -> list[int]:
    return [1000] * (batch_size - 1) + [longest]


def paged(lengths: list[int], heads: int, heads_k: int, page: int = 64, queries: int = 1) -> dict[str, Any]:
    """One decode layer over a page table of WIDTH tokens a sequence, in which pages lie in random order."""
    torch.manual_seed(len(lengths))
    pages = [-(-n // page) for n in lengths]
    table = torch.zeros(len(lengths), WIDTH // page, dtype=torch.int32)
    order, start = torch.randperm(sum(pages), dtype=torch.int32), 0
    for row, count in zip(table, pages, strict=True):
        row[:count] = order[start : start + count]
        start += count
    kv = torch.randn(2, sum(pages), page, heads_k, 128, device="cuda", dtype=torch.bfloat16)
    return {
        "q": torch.randn(len(lengths), queries, heads, 128, device="cuda", dtype=torch.bfloat16),
        "k_cache": kv[0], "v_cache": kv[1], "page_table": table.cuda(), "causal": True,
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32, device="cuda"),
    }  # fmt: skip


def ragged(call: dict[str, Any], queries: list[int]) -> dict[str, Any]:
    """The same sequences with that many query tokens each, as when drafts are verified."""
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0)], dtype=torch.int32, device="cuda")
    q = torch.randn(sum(queries), *call["q"].shape[2:], device="cuda", dtype=torch.bfloat16)
    return call | {"q": q, "cu_seqlens_q": starts, "max_seqlen_q": max(queries)}


def captured(function: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `function` gives in a replayed CUDA graph."""
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    output.zero_()
    graph.replay()
    return output


def most_splits(metadata: torch.Tensor, batch_size: int) -> int:
    """num_splits_dynamic is the first row after the semaphore, or the first of all."""
    first = int(rules_for(BUILD).semaphore_first)
    return int(metadata[first : first + batch_size].max()) if metadata.numel() > batch_size else 1


@pytest.fixture(scope="module")
def forward() -> Callable[..., Any]:
    return load_forward(BUILD)


@pytest.mark.parametrize("batch_size", BATCHES)
def test_the_wrapped_forward(batch_size: int, forward: Callable[..., Any]) -> None:
    call, wrapped = paged(skewed(batch_size), 8, 1), wrap_forward(forward, BUILD)
    expected = forward(**call)
    with step():
        assert torch.equal(wrapped(**call), expected)
    assert torch.equal(captured(lambda: wrapped(**call)), expected)


@pytest.mark.parametrize("batch_size", [4, 64, 129, 256])
@pytest.mark.parametrize("drafts", ["uniform", "ragged", "one prefill"])
def test_the_wrapped_forward_with_several_queries(batch_size: int, drafts: str, forward: Callable[..., Any]) -> None:
    """Of ragged queries the forward counts those that there are, not the most for all."""
    queries = {
        "uniform": [4] * batch_size,
        "ragged": [1 + i % 4 for i in range(batch_size)],
        "one prefill": [1] * (batch_size - 1) + [300],
    }[drafts]
    call, wrapped = ragged(paged(skewed(batch_size), 8, 1), queries), wrap_forward(forward, BUILD)
    expected = forward(**call)
    with step():
        assert torch.equal(wrapped(**call), expected)
    assert torch.equal(captured(lambda: wrapped(**call)), expected)


@pytest.mark.parametrize("batch_size", [1, 64, 256])
def test_install(batch_size: int, forward: Callable[..., Any]) -> None:
    call = paged(skewed(batch_size), 8, 1)
    expected = forward(**call)
    module = __import__(provider_of(BUILD).module, fromlist=["flash_attn"])
    try:
        fa3_metadata.install(wrap_forward=True, build=BUILD)
        installed = module.flash_attn_with_kvcache
        with step():
            assert torch.equal(installed(**call), expected)
        assert torch.equal(captured(lambda: installed(**call)), expected)
        # An engine's own way: the function that is there now, and 0 splits for both sides.
        made = module.get_scheduler_metadata(batch_size, 1, WIDTH, 8, 1, 128, call["cache_seqlens"], page_size=64,
                                             causal=True)  # fmt: skip
        assert torch.equal(forward(**call, scheduler_metadata=made), expected)
    finally:
        fa3_metadata.uninstall()


@pytest.mark.parametrize("queries", [1, 4])
def test_plans(queries: int, forward: Callable[..., Any]) -> None:
    """One plan alone and two in one launch, made for the largest batch, in mixed order."""
    shape = HEADS_8_1 | {"max_batch_size": 1024, "max_seqlen_k": WIDTH, "max_seqlen_q": queries, "device": "cuda"}
    alone, one, other = (MetadataPlan(**shape, build=BUILD) for _ in range(3))
    both = MetadataPlans([one, other])
    for batch_size in (256, 1, 64, 1000, 129, 31, 64):
        call = paged(skewed(batch_size), 8, 1, queries=queries)
        expected = forward(**call)
        alone.update(call["cache_seqlens"])
        both.update(call["cache_seqlens"])
        for plan in (alone, one, other):
            assert torch.equal(forward(**call, **plan.forward_arguments(**call)), expected), batch_size
        assert torch.equal(alone.metadata, other.metadata)

        def in_a_graph(call: dict[str, Any] = call) -> torch.Tensor:
            both.update(call["cache_seqlens"])
            return forward(**call, **other.forward_arguments(**call))

        assert torch.equal(captured(in_a_graph), expected), batch_size


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch, forward: Callable[..., Any]) -> Sglang:
    """The stand-in of SGLang's backend, with the wheel's forward in its module."""
    world = Sglang(monkeypatch, "0.5.11 to 0.5.23")
    world.module.flash_attn_with_kvcache = forward  # type: ignore[attr-defined]
    return world


@pytest.mark.parametrize("batch_size", [1, 16, 64, 129, 256])
@pytest.mark.parametrize("policy", ["fa3", "balanced"])
def test_sglangs_maker(batch_size: int, policy: str, sglang: Sglang, forward: Callable[..., Any]) -> None:
    """Eager decode: the maker is ours, the forward is called with num_splits=0 by SGLang."""
    call = paged(skewed(batch_size), HEADS, KV_HEADS, PAGE)
    call |= {"cu_seqlens_q": torch.arange(batch_size + 1, dtype=torch.int32, device="cuda"), "max_seqlen_q": 1}
    call["q"] = call["q"].squeeze(1)
    backend = sglang.module.FlashAttentionBackend()  # type: ignore[attr-defined]
    attached = attach(backend, BUILD, policy)
    lengths = Batch(skewed(batch_size))
    lengths.seq_lens = call["cache_seqlens"]
    prepare = backend.prepare

    def on_gpu(batch: Batch, pages: int) -> Any:
        metadata = prepare(batch, WIDTH // PAGE)
        metadata.cu_seqlens_q, metadata.page_table = call["cu_seqlens_q"], call["page_table"]
        return metadata

    backend.prepare = on_gpu
    backend.init_forward_metadata(lengths)
    made = backend.forward_metadata.scheduler_metadata
    expected = forward(**call, num_splits=0)
    for function in (forward, sglang.module.flash_attn_with_kvcache):  # type: ignore[attr-defined]
        if made is None and function is forward:  # the forward of SGLang's module is told our bound
            continue
        output = function(**call, num_splits=0, scheduler_metadata=made)
        if policy == "fa3":
            assert torch.equal(output, expected)
        else:  # other splits of the same sums
            torch.testing.assert_close(output, expected, atol=2e-2, rtol=2e-2)
    room = fa3_metadata.metadata_layout(batch_size, 1, WIDTH, HEADS, KV_HEADS, DIM, page_size=PAGE, causal=True,
                                        cu_seqlens_q=call["cu_seqlens_q"], build=BUILD).num_splits  # fmt: skip
    assert made is None or most_splits(made, batch_size) <= room
    attached.detach()


@pytest.mark.skipif(PACKAGE != "sglang-kernel", reason="needs a wheel that makes metadata itself")
@pytest.mark.parametrize("batch_size", BATCHES)
def test_the_wheels_own_op_agrees(batch_size: int) -> None:
    lengths = torch.tensor(skewed(batch_size), dtype=torch.int32, device="cuda")
    call = {"batch_size": batch_size, "max_seqlen_q": 1, "max_seqlen_k": WIDTH, "cache_seqlens": lengths, **HEADS_8_1}
    ours, theirs = (
        fa3_metadata.get_scheduler_metadata(**call, build=BUILD, backend=backend) for backend in ("triton", "native")
    )
    layout = fa3_metadata.metadata_layout(**call, build=BUILD)
    assert ours.shape == theirs.shape
    for row in layout.rows.values():
        assert torch.equal(ours[row], theirs[row])
