"""Plans and the wrapper with real attention: every kind of decode layer, eager and captured, like the wheel alone."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata import MetadataPlan, MetadataPlans, step, wrap_forward
from fa3_metadata.providers import load_forward

from .test_gpu_wheels import WHEEL

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHEEL is None, reason="no FA3 wheel is installed")]
IS_SGLANG = str(WHEEL).startswith("sglang-kernel")  # the kit with every kind of kernel
needs_sglang = pytest.mark.skipif(not IS_SGLANG, reason="needs sglang-kernel's kernels for other head dims")
BF16 = torch.bfloat16


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF16)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


LENGTHS = (9000, 70, 1500, 512, 1)


def layer(
    heads: int = 8, heads_k: int = 1, d: int = 128, dv: int | None = None, q: int = 1, **more: Any
) -> dict[str, Any]:
    """The arguments of one layer's `flash_attn_with_kvcache` over a paged cache of 64-token pages."""
    b, pages = len(LENGTHS), -(-max(LENGTHS) // 64) + 2
    table = torch.randperm(b * pages, device="cuda").to(torch.int32).view(b, pages)
    return {
        "q": rand(b, q, heads, d), "k_cache": rand(b * pages, 64, heads_k, d), "causal": True,
        "v_cache": rand(b * pages, 64, heads_k, dv or d), "cache_seqlens": ints(*LENGTHS), "page_table": table,
    } | more  # fmt: skip


def mla() -> dict[str, Any]:
    return layer(16, 1, 64, 512, qv=rand(len(LENGTHS), 1, 16, 512), softmax_scale=0.07)


def ragged() -> dict[str, Any]:
    starts = ints(0, 4, 4, 7, 8, 12)
    return layer() | {"q": rand(12, 8, 128), "cu_seqlens_q": starts, "max_seqlen_q": 4}


def unpaged() -> dict[str, Any]:
    cache = {"k_cache": rand(5, 9100, 1, 128), "v_cache": rand(5, 9100, 1, 128), "page_table": None}
    return layer() | cache


def appended() -> dict[str, Any]:
    return layer(k=rand(5, 3, 1, 128), v=rand(5, 3, 1, 128), q=3)


def left_padded() -> dict[str, Any]:
    return unpaged() | {"cache_leftpad": ints(500, 0, 60, 511, 0)}


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "mqa": layer,
    "gqa": lambda: layer(32, 8),
    "mha": lambda: layer(4, 4),
    "window": lambda: layer(window_size=(255, 0)),
    "not causal": lambda: layer(causal=False),
    "chunk": lambda: layer(attention_chunk=1024),
    "uniform verification": lambda: layer(q=4),
    "ragged verification": ragged,
    "appended keys": appended,
    "left padding": left_padded,
    "not paged": unpaged,
    "short prefill": lambda: layer(q=200),
    "fixed splits": lambda: layer(num_splits=6),
    "margin": lambda: layer(sm_margin=12),
}
SGLANG_KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "softcap": lambda: layer(softcap=30.0),
    "sinks": lambda: layer(sinks=rand(8)),
    "head dim 64": lambda: layer(8, 8, 64),
    "head dim 256": lambda: layer(8, 4, 256),
    "head dims 192 and 128": lambda: layer(8, 8, 192, 128),
    "mla": mla,
    "mla verification": lambda: mla() | {"q": rand(5, 4, 16, 64), "qv": rand(5, 4, 16, 512)},
}


def check_kind(make: Callable[[], dict[str, Any]]) -> None:
    torch.manual_seed(0)
    forward = load_forward(str(WHEEL))
    wrapped = wrap_forward(forward, WHEEL)
    made: list[Any] = []

    def spy(**call: Any) -> Any:
        made.append(call["scheduler_metadata"])
        return forward(**call)

    spied = wrap_forward(lambda scheduler_metadata=None, num_splits=0, pack_gqa=None, **call: spy(
        scheduler_metadata=scheduler_metadata, num_splits=num_splits, pack_gqa=pack_gqa, **call), WHEEL)  # fmt: skip
    call = make()
    fresh = [call["k_cache"].clone(), call["v_cache"].clone()]

    def run(function: Callable[..., Any]) -> torch.Tensor:
        call["k_cache"].copy_(fresh[0])
        call["v_cache"].copy_(fresh[1])
        out: torch.Tensor = function(**call)
        return out.clone()

    expected = run(forward)
    with step():
        assert torch.equal(run(spied), expected), "eager"
    assert made[-1] is not None, "the wrapper passed the call through"

    graph, captured = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        captured = [wrapped(**call), wrapped(**call | {"k_cache": call["k_cache"].clone()})]
    for lengths in (LENGTHS, tuple(max(1, n // 3) for n in LENGTHS)):
        call["cache_seqlens"].copy_(ints(*lengths))
        if "cache_leftpad" in call:
            call["cache_leftpad"].fill_(0)
        expected = run(forward)
        call["k_cache"].copy_(fresh[0])
        call["v_cache"].copy_(fresh[1])
        graph.replay()
        for output in captured:
            assert torch.equal(output, expected), f"captured, lengths {lengths}"


@pytest.mark.skipif(str(WHEEL).startswith("vllm"), reason="vLLM's forward has other arguments")
@pytest.mark.skipif(str(WHEEL).startswith("sgl-kernel"), reason="this wheel's own path is not sound on a newer torch")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind: str) -> None:
    check_kind(KINDS[kind])


@needs_sglang
@pytest.mark.parametrize("kind", SGLANG_KINDS)
def test_every_kind_of_layer_of_sglang(kind: str) -> None:
    check_kind(SGLANG_KINDS[kind])


def nodes(graph: torch.cuda.CUDAGraph) -> int:
    count = ctypes.c_size_t()
    raw = ctypes.c_void_p(graph.raw_cuda_graph())
    assert ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(raw, None, ctypes.byref(count)) == 0
    return count.value


PLAN: dict[str, Any] = {"max_batch_size": 64, "max_seqlen_k": 8192, "num_heads": 8, "num_heads_k": 1, "headdim": 128,
                        "page_size": 64, "causal": True, "device": "cuda", "build": WHEEL}  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_all_groups_are_refreshed_by_one_node(groups: int) -> None:
    windows = [(-1, -1), (1023, 0), (127, 0)][:groups]
    plans = MetadataPlans([MetadataPlan(**PLAN, window_size=window) for window in windows])
    lengths = torch.randint(1, 8192, (40,), dtype=torch.int32, device="cuda")
    plans.update(lengths)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        made = plans.update(lengths)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert nodes(graph) == 1
    graph.instantiate()
    for seed in range(5):
        torch.manual_seed(seed)
        lengths.copy_(torch.randint(1, 8192, (40,), dtype=torch.int32))
        graph.replay()
        for window, metadata in zip(windows, made, strict=True):
            alone = fa3_metadata.get_scheduler_metadata(
                40, 1, 8192, 8, 1, 128, lengths, page_size=64, causal=True, window_size=window, build=WHEEL
            )
            assert torch.equal(metadata, alone)


@pytest.mark.skipif(not IS_SGLANG, reason="counts the nodes of sgl_kernel's forward")
def test_a_capture_holds_one_metadata_node_for_each_problem() -> None:
    forward = load_forward(str(WHEEL))
    wrapped = wrap_forward(forward, WHEEL)
    # A wide window, so that both kinds have splits: a forward without them launches a fill in place of the metadata.
    layers = [layer() for _ in range(3)] + [layer(window_size=(4095, 0)) for _ in range(2)]
    shared = layers[0]["cache_seqlens"]
    for one in layers:
        one["cache_seqlens"] = shared
    counts = {}
    for name, function in (("alone", forward), ("ours", wrapped)):
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            for one in layers:
                function(**one)
        counts[name] = nodes(graph)
    assert counts["alone"] - counts["ours"] == len(layers) - 2  # 5 launches of their own become 2 of ours


def test_two_steps_in_one_capture_do_not_share() -> None:
    """Multi-step decoding in one graph: the lengths grow between steps, also where torch does not count writes."""
    if not IS_SGLANG:
        pytest.skip("one wheel is enough")
    forward = load_forward(str(WHEEL))
    wrapped = wrap_forward(forward, WHEEL)
    with torch.inference_mode():
        call = layer()
        call["cache_seqlens"] = ints(100, 70, 1500, 512, 1)
        expected = []
        for _ in range(3):
            expected.append(forward(**call).clone())
            call["cache_seqlens"].add_(2000)
        call["cache_seqlens"].sub_(6000)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = []
            for _ in range(3):
                captured.append(wrapped(**call))
                call["cache_seqlens"].add_(2000)
            call["cache_seqlens"].sub_(6000)
        for _ in range(3):
            graph.replay()
            for output, wanted in zip(captured, expected, strict=True):
                assert torch.equal(output, wanted)
