"""Plans, the wrapper and the engines' calls with real attention, eager and captured: the bits of the wheel alone."""

from __future__ import annotations

import ctypes
import functools
import pathlib
import random
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import fa3_metadata
import pytest
import torch
import triton
import triton.language as tl
from fa3_metadata import MetadataPlan, MetadataPlans, step, wrap_forward
from fa3_metadata.engines import vllm as adapter
from fa3_metadata.installed import load_forward
from fa3_metadata.triton_kernels.builds import rules_for, version_key
from fa3_metadata.triton_kernels.problem import POLICIES

from ..helpers.cases import POISON
from ..helpers.vllm_stand_in import check, gqa_builder, make_batch, metadata_of, mla_builder, stand_in
from .test_wheels import HAS_PAGED_AND_LOCAL, PACKAGE, WHEEL, needs_wheel

pytestmark = pytest.mark.gpu
needs_sglang = pytest.mark.skipif(PACKAGE != "sglang-kernel", reason="one wheel is enough: sglang-kernel")
needs_vllm = pytest.mark.skipif(
    PACKAGE != "vllm" or version_key(str(WHEEL).removeprefix("vllm-")) < version_key("0.28.0"),
    reason="needs the FA3 of a vLLM whose builders the adapter attaches to: 0.28.0 or later",
)
BF16 = torch.bfloat16


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF16)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


LENGTHS = (9000, 70, 1500, 512, 1)


def layer(
    heads: int = 8, heads_k: int = 1, d: int = 128, dv: int | None = None, q: int = 1, **more: Any
) -> dict[str, Any]:
    """The arguments of one layer's `flash_attn_with_kvcache` over a paged cache of 64-token pages.

    Where the wheel has no paged kernels, the cache is not paged and as long.
    """
    b, pages = len(LENGTHS), -(-max(LENGTHS) // 64) + 2
    table = torch.randperm(b * pages, device="cuda").to(torch.int32).view(b, pages) if HAS_PAGED_AND_LOCAL else None
    cache = (b, pages * 64) if table is None else (b * pages, 64)
    return {
        "q": rand(b, q, heads, d), "k_cache": rand(*cache, heads_k, d), "causal": True,
        "v_cache": rand(*cache, heads_k, dv or d), "cache_seqlens": ints(*LENGTHS), "page_table": table,
    } | more  # fmt: skip


def mla() -> dict[str, Any]:
    return layer(16, 1, 64, 512, qv=rand(len(LENGTHS), 1, 16, 512), softmax_scale=0.07)


def ragged() -> dict[str, Any]:
    starts = ints(0, 4, 4, 7, 8, 12)
    return layer() | {"q": rand(12, 8, 128), "cu_seqlens_q": starts, "max_seqlen_q": 4}


def cascade_prefix() -> dict[str, Any]:
    """What all draft tokens see alike; the log-sum-exp is for merging with the rest."""
    return ragged() | {"causal": False, "return_softmax_lse": True}


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
    "cascade prefix": cascade_prefix,
    "appended keys": appended,
    "left padding": left_padded,
    "not paged": unpaged,
    "short prefill": lambda: layer(q=200),
    "fixed splits": lambda: layer(num_splits=6),
    "margin": lambda: layer(sm_margin=12),
    "softcap": lambda: layer(softcap=30.0),
    "sinks": lambda: layer(sinks=rand(8)),
    "head dim 64": lambda: layer(8, 8, 64),
    "head dim 256": lambda: layer(8, 4, 256),
    "head dims 192 and 128": lambda: layer(8, 8, 192, 128),
    "mla": mla,
    "mla verification": lambda: mla() | {"q": rand(5, 4, 16, 64), "qv": rand(5, 4, 16, 512)},
}
_MLA = {"mla", "mla verification"}
_OTHER_HEAD_DIMS = {"head dim 64", "head dim 256", "head dims 192 and 128"} | _MLA
# What is not asked of a wheel: arguments that its front end does not take, and kernels that it, or the slimmed copy of
# it with which these tests are run, does not have. All entries count with which the name of the wheel begins.
LEFT_OUT = {
    "sgl-kernel-": {"not paged", "left padding", "softcap"} | _OTHER_HEAD_DIMS,
    "sgl-kernel-0.3.14.": {"chunk"},  # no such argument up to 0.3.16
    "sglang-kernel-0.4.5": {"softcap"} | _OTHER_HEAD_DIMS,
    "vllm-": {"chunk", "appended keys", "left padding", "margin", "head dim 64", "head dim 256"} | _MLA,
    "vllm-0.10.": {"not paged", "softcap", "sinks"},  # s_aux has been an argument since 0.10.1
    "vllm-0.11.": {"not paged", "softcap"},
    "fa3-fwd-": {"window", "chunk", "sinks", "head dims 192 and 128"} | _MLA,
}
ASKED = [
    kind for kind in KINDS if not any(kind in out for name, out in LEFT_OUT.items() if str(WHEEL).startswith(name))
]


def for_vllm(call: dict[str, Any]) -> dict[str, Any]:
    """The same layer, as arguments of vLLM's `flash_attn_varlen_func`; `call` and it share their tensors."""
    q, k_cache, table = call["q"], call["k_cache"], call["page_table"]
    if (starts := call.get("cu_seqlens_q")) is None:
        starts = torch.arange(0, q.shape[0] * q.shape[1] + 1, q.shape[1], dtype=torch.int32, device="cuda")
    return {
        "q": q.flatten(0, -3), "k": k_cache, "v": call["v_cache"],
        "max_seqlen_q": call.get("max_seqlen_q", q.shape[1]), "cu_seqlens_q": starts,
        "max_seqlen_k": k_cache.shape[1] * (1 if table is None else table.shape[1]),
        "seqused_k": call["cache_seqlens"], "block_table": table, "causal": call["causal"],
        "window_size": list(call.get("window_size", (-1, -1))), "softcap": call.get("softcap", 0.0),
        "num_splits": call.get("num_splits", 0), "fa_version": 3,
        "return_softmax_lse": call.get("return_softmax_lse", False),
    } | ({"s_aux": call["sinks"]} if "sinks" in call else {})  # fmt: skip


def bits(output: Any) -> torch.Tensor:
    """A layer's output, or it and the log-sum-exp in one."""
    if isinstance(output, torch.Tensor):
        return output
    return torch.cat([output[0].flatten().float(), output[1].flatten()])


@needs_wheel
@pytest.mark.parametrize("kind", ASKED)
def test_every_kind_of_layer(kind: str) -> None:
    torch.manual_seed(0)
    call, cache_names = KINDS[kind](), ("k_cache", "v_cache")
    lengths, left_padding = call["cache_seqlens"], call.get("cache_leftpad")
    if PACKAGE == "vllm":
        call, cache_names = for_vllm(call), ("k", "v")
    caches = [call[name] for name in cache_names]
    fresh = [cache.clone() for cache in caches]
    forward = load_forward(str(WHEEL))
    handed: list[torch.Tensor | None] = []

    @functools.wraps(forward)  # with its signature, which the wrapper reads
    def spy(**call: Any) -> Any:
        handed.append(call.get("scheduler_metadata"))
        return forward(**call)

    wrapped = wrap_forward(spy, WHEEL)

    def run(function: Callable[..., Any]) -> torch.Tensor:
        torch._foreach_copy_(caches, fresh)  # appended keys have been written to them
        return bits(function(**call)).clone()

    expected = run(forward)
    with step():
        assert torch.equal(run(wrapped), expected), f"{kind}: eager"
    assert handed[0] is not None, f"{kind}: the wrapper passed the call through"

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [wrapped(**call), wrapped(**call | {cache_names[0]: caches[0].clone()})]
    assert handed[1] is not None, f"{kind}: the wrapper passed the captured call through"
    assert handed[1] is handed[2], f"{kind}: two layers of one capture do not share their metadata"
    for new in (LENGTHS, tuple(max(1, n // 3) for n in LENGTHS)):
        lengths.copy_(ints(*new))
        if left_padding is not None:
            left_padding.fill_(0)
        expected = run(forward)
        torch._foreach_copy_(caches, fresh)
        graph.replay()
        for output in captured:
            assert torch.equal(bits(output), expected), f"{kind}: captured, lengths {new}"


def nodes(graph: torch.cuda.CUDAGraph) -> int:
    count = ctypes.c_size_t()
    raw = ctypes.c_void_p(graph.raw_cuda_graph())
    assert ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(raw, None, ctypes.byref(count)) == 0
    return count.value


PLAN: dict[str, Any] = {"max_batch_size": 64, "max_seqlen_k": 8192, "num_heads": 8, "num_heads_k": 1, "headdim": 128,
                        "page_size": 64, "causal": True, "device": "cuda", "build": WHEEL}  # fmt: skip


@needs_wheel
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


@needs_sglang
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


# Models whose layers read the KV caches of others, as in tests/calls/test_kv_sharing.py, smaller: cache and window.
WIDE = (4095, 0)  # so that both kinds have splits
SHARING = {
    "Gemma 3n": [(0, WIDE), (1, (-1, -1)), (2, WIDE), (3, (-1, -1)), (2, WIDE), (3, (-1, -1)), (2, WIDE)],
    "YOCO": [(0, WIDE), (1, WIDE), (2, (-1, -1)), (2, (-1, -1)), (2, (-1, -1))],
}


@triton.jit
def advance(lengths, more):  # type: ignore[no-untyped-def]
    """A kernel of an engine's own, one program a sequence."""
    at = lengths + tl.program_id(0)
    tl.store(at, tl.load(at) + more)


@needs_sglang
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("model", SHARING)
def test_layers_that_read_the_cache_of_another_share(model: str, steps: int, inference: bool) -> None:
    """A metadata node for each kind of layer and step of a capture, and FA3's bits; lengths advance between steps.

    By a torch operation, and by a kernel of our own, which torch does not count.
    """
    forward = load_forward(str(WHEEL))
    wrapped = wrap_forward(forward, WHEEL)
    with torch.inference_mode(inference):
        lengths, start, more = ints(*LENGTHS), ints(*LENGTHS), ints(*[64] * len(LENGTHS))
        caches = [layer() for _ in range(1 + max(cache for cache, _ in SHARING[model]))]
        layers = [
            caches[cache] | {"q": rand(5, 1, 8, 128), "cache_seqlens": lengths, "window_size": window}
            for cache, window in SHARING[model]
        ]

        def model_steps(function: Callable[..., Any]) -> list[torch.Tensor]:
            lengths.copy_(start)
            outputs = []
            for number in range(steps):
                outputs += [function(**one) for one in layers]
                if number % 2:
                    lengths.add_(more)
                else:
                    advance[(len(LENGTHS),)](lengths, 64)
            return outputs

        expected = [output.clone() for output in model_steps(forward)]
        counts, replayed = {}, {}
        for name, function in (("alone", forward), ("ours", wrapped)):
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            with torch.cuda.graph(graph):
                captured = model_steps(function)
            counts[name] = nodes(graph)
            graph.instantiate()
            for _ in range(2):
                graph.replay()
            replayed[name] = [output.clone() for output in captured]
    kinds = len({window for _, window in SHARING[model]})
    assert counts["alone"] - counts["ours"] == steps * (len(layers) - kinds)
    for name, outputs in replayed.items():
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True)), name
    with torch.inference_mode(inference):
        lengths.copy_(start)
        with step(lengths_stay=True):
            eager = [wrapped(**one) for one in layers]
        assert all(torch.equal(a, b) for a, b in zip(eager, expected, strict=False))


@needs_sglang
def test_two_steps_in_one_capture_do_not_share() -> None:
    """Multi-step decoding in one graph: the lengths grow between steps, also where torch does not count writes."""
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


WRITES = {  # how lengths are advanced between the modules of a draft model
    "torch": lambda lengths, more: lengths.add_(more),
    "a copy": lambda lengths, more: lengths.copy_(lengths + more),
    "a fill": lambda lengths, more: lengths.fill_(3000),
    "a view": lambda lengths, more: lengths[1:].add_(more),
}


@needs_sglang
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("how", WRITES)
def test_lengths_that_advance_between_layers_of_a_capture(how: str, inference: bool) -> None:
    """Draft modules have a KV cache each, so that no layer comes round again; engines run in inference mode."""
    forward = load_forward(str(WHEEL))
    wrapped, weights = wrap_forward(forward, WHEEL), rand(128, 128)
    with torch.inference_mode(inference):
        layers, lengths, start = [layer() for _ in range(3)], ints(*LENGTHS), ints(*LENGTHS)
        for one in layers:
            one["cache_seqlens"] = lengths
        more = torch.full((len(LENGTHS),), 100, dtype=torch.int32, device="cuda")
        if how == "a view":
            more = more[1:]

        def modules(function: Callable[..., Any]) -> list[torch.Tensor]:
            lengths.copy_(start)
            outputs = []
            for one in layers:
                outputs.append(function(**one) @ weights)
                WRITES[how](lengths, more)
            return outputs

        expected = [output.clone() for output in modules(forward)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = modules(wrapped)
        graph.replay()
        for output, wanted in zip(captured, expected, strict=True):
            assert torch.equal(output, wanted)


@needs_sglang
def test_layers_of_a_capture_share_in_inference_mode() -> None:
    """With matrix products, norms and copies between them, none of which writes the lengths."""
    handed: list[Any] = []
    forward = load_forward(str(WHEEL))

    @functools.wraps(forward)
    def spy(**call: Any) -> Any:
        handed.append(call["scheduler_metadata"])
        return forward(**call)

    wrapped, weights = wrap_forward(spy, WHEEL), rand(128, 128)
    with torch.inference_mode():
        layers = [layer() for _ in range(6)]
        for one in layers:
            one["cache_seqlens"] = layers[0]["cache_seqlens"]
        kept = torch.zeros(4, 4, device="cuda")
        rand(4, 1, 8, 128) @ weights  # cuBLAS starts outside of the capture, as in an engine
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for one in layers:
                out = wrapped(**one) @ weights
                out = torch.nn.functional.rms_norm(out, (128,)).softmax(-1)
                one["k_cache"][0].copy_(one["k_cache"][1])
                one["v_cache"][0].copy_(out[0, 0, :1].expand(64, 1, 128))
                kept.zero_()
    assert handed[0] is not None
    assert all(made is handed[0] for made in handed)


@pytest.fixture
def vllm(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """vLLM's FA3. Meanwhile `import vllm` finds the stand-in, which has the builders that the installed copy lacks."""
    real = import_module("vllm.vllm_flash_attn")
    with stand_in(tmp_path, monkeypatch):
        yield real


WIDTH = 600  # pages of 16 tokens that a sequence may have
VLLM_DECODE = {"lengths": [5, 9000, 4096, 700, 700]}
VLLM_MIXED = {"lengths": [300, 9000, 17, 2048], "query_lens": [300, 1, 1, 512]}


def vllm_batch(**batch: Any) -> SimpleNamespace:
    """A batch for the stand-in's builders, on the GPU. The longest sequence that it speaks of fills the block table."""
    made = make_batch(**batch, max_seq_len=WIDTH * 16)
    made.lengths, made.starts = made.lengths.cuda(), made.starts.cuda()
    return made


def vllm_builder(make: Callable[..., Any], **arguments: Any) -> Any:
    made = make(**arguments)
    if made.use_full_cuda_graph:
        made.scheduler_metadata = made.scheduler_metadata.cuda()  # the stand-in's is on the CPU
    return made


def vllm_layer(batch: SimpleNamespace, builder: Any) -> dict[str, Any]:
    """One layer's arguments of `flash_attn_varlen_func`, as vLLM's backend passes them: 32 q heads on 8 KV heads."""
    cache = {name: rand(3000, 16, 8, 128) for name in ("k", "v")}
    table = torch.randint(0, 3000, (batch.size, WIDTH), dtype=torch.int32, device="cuda")
    return cache | {
        "q": rand(int(batch.starts[-1]), 32, 128), "cu_seqlens_q": batch.starts, "max_seqlen_q": batch.max_query_len,
        "seqused_k": batch.lengths, "max_seqlen_k": batch.max_seq_len, "softmax_scale": 128**-0.5,
        "causal": batch.causal, "window_size": list(builder.aot_sliding_window), "block_table": table,
        "num_splits": builder.max_num_splits, "fa_version": 3,
    }  # fmt: skip


@needs_vllm
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("graphs", [False, True], ids=["free splits", "fixed splits"])
@pytest.mark.parametrize("kind", ["decode", "mixed", "window", "mla"])
def test_vllm_adapter_makes_what_vllm_makes(
    vllm: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, graphs: bool, in_place: bool
) -> None:
    """The metadata that a builder gets by the adapter, and what vLLM's forward makes of it."""
    batch = vllm_batch(**VLLM_MIXED if kind == "mixed" else VLLM_DECODE)
    make, module = (mla_builder, adapter.MLA) if kind == "mla" else (gqa_builder, adapter.GQA)
    arguments = {"graphs": graphs} | ({"window": (1023, 0)} if kind == "window" else {})
    with monkeypatch.context() as patch:
        patch.setattr(import_module(module), adapter.NAME, vllm.get_scheduler_metadata)
        theirs = metadata_of(vllm_builder(make, **arguments), batch)
    attached = adapter.attach(in_place)
    builder = vllm_builder(make, **arguments)
    for _ in range(2):  # the second time there is something to overwrite
        made = metadata_of(builder, batch)
        check(made, theirs, batch.size)
    assert attached.used
    if kind != "mla":  # of its head dims the copy has no attention kernels
        call = vllm_layer(batch, builder)
        expected = vllm.flash_attn_varlen_func(**call)
        for metadata in (theirs, made, made):  # one tensor serves many layers
            assert torch.equal(vllm.flash_attn_varlen_func(**call, scheduler_metadata=metadata), expected)


@needs_vllm
@pytest.mark.parametrize("in_place", [False, True])
def test_vllm_full_graph_follows_the_adapters_metadata(vllm: ModuleType, in_place: bool) -> None:
    """As vLLM does it: layers captured with a slice of the builder's buffer, which is made anew before each replay."""
    forward = vllm.flash_attn_varlen_func
    batch = vllm_batch(**VLLM_DECODE)
    import_module(adapter.GQA)
    adapter.attach(in_place)
    builder = vllm_builder(gqa_builder, graphs=True)
    metadata = metadata_of(builder, batch)
    layers = [vllm_layer(batch, builder) for _ in range(3)]
    for call in layers:
        forward(**call, scheduler_metadata=metadata)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [forward(**call, scheduler_metadata=metadata) for call in layers]
    for lengths in ((5, 9000, 4096, 700, 700), (9600, 1, 1, 1, 1), (64, 128, 129, 1000, 300), (1, 1, 1, 1, 1)):
        batch.lengths.copy_(ints(*lengths))
        batch.max_seq_len = max(lengths)  # vLLM asks for the longest sequence of the step; the graph's is the table
        assert metadata_of(builder, batch).data_ptr() == metadata.data_ptr()
        graph.replay()
        for output, call in zip(outputs, layers, strict=True):
            assert torch.equal(output, forward(**call)), f"lengths {lengths}"


GUARD = 8192  # elements on either side of a tensor, more than any row is long
MASKS = {"full": (False, (-1, -1)), "causal": (True, (-1, -1)), "window": (True, (127, 0))}
LAYOUTS = (  # builds, each with rows, or rules for them, of its own
    "sgl-kernel-0.3.14.post1", "sgl-kernel-0.3.21", "sglang-kernel-0.4.2", "sglang-kernel-0.4.5", "vllm-0.10.0",
    "vllm-0.11.0", "vllm-0.16.0", "vllm-0.18.1", "vllm-0.33.0",
)  # fmt: skip


def in_a_minefield(size: int, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(memory, the `size` elements in its middle); everything is poison."""
    memory = torch.full((2 * GUARD + size + offset,), POISON, dtype=torch.int32, device="cuda")
    return memory, memory[GUARD + offset : GUARD + offset + size]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("build", LAYOUTS)
@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_written_outside_the_tensor(policy: str, build: str, mask: str) -> None:
    rng = random.Random(f"{policy} {build} {mask}")
    causal, window = MASKS[mask]
    archs = (90, 86) if policy == "fa3" and rules_for(build).sm8x_tiles else (90,)
    for i in range(60):
        batch = rng.choice((1, 31, 32, 33, 991, 992, 993, 1100)) if i % 4 == 0 else rng.randint(1, 1100)
        problem = {
            "batch_size": batch, "max_seqlen_q": rng.choice((1, 4)), "max_seqlen_k": 100_000, "num_heads": 32,
            "num_heads_k": 8, "headdim": 128, "page_size": 64, "causal": causal, "window_size": window,
            "num_splits": rng.choice((0, 1, 32)), "arch": rng.choice(archs), "build": build, "policy": policy,
        }  # fmt: skip
        lengths = torch.randint(0, 100_000, (batch,), dtype=torch.int32, device="cuda")
        memory, out = in_a_minefield(fa3_metadata.metadata_layout(**problem).size, rng.randrange(4))
        fa3_metadata.get_scheduler_metadata(**problem, cache_seqlens=lengths, out=out)
        assert POISON not in out.tolist(), f"an element was not written: {problem}"
        out.fill_(POISON)
        assert (memory == POISON).all(), f"written outside: {problem}"


def test_no_group_of_layers_is_written_outside_its_part() -> None:
    rng = random.Random(0)
    shape = PLAN | {"max_batch_size": 1100, "build": "sglang-kernel-0.4.2"}
    plans = MetadataPlans([MetadataPlan(**shape, window_size=window) for window in ((-1, -1), (1023, 0), (127, 0))])
    own = plans._buffer  # lives on: lengths in its memory are refused
    memory, plans._buffer = in_a_minefield(own.numel())
    for batch in (1, 33, 992, 993, 1100, *(rng.randint(1, 1100) for _ in range(40))):
        lengths = torch.randint(0, 8192, (batch,), dtype=torch.int32, device="cuda")
        for part in plans.update(lengths):
            assert POISON not in part.tolist(), f"an element was not written: {batch}"
            part.fill_(POISON)
        assert (memory == POISON).all(), f"written outside: {batch}"
