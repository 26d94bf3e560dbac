"""The SGLang adapter, on stand-ins for SGLang's backend (sglang_stand_in.py)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata.engines import once, sglang
from fa3_metadata.engines.sglang import LAYOUTS, attach, attach_new_backends

from ..calls.test_kv_sharing import MODELS
from ..calls.test_wrapper_safety import Graph
from ..helpers.sglang_stand_in import DIM, HEADS, KV_HEADS, PAGE, Batch, Sglang

BUILD = "sglang-kernel-0.4.2"


@pytest.fixture(autouse=True)
def _no_new_backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test begins with no class of SGLang hooked and nothing said."""
    monkeypatch.setattr(once, "_said", set())
    yield
    if sglang._new_backends is not None:
        sglang._new_backends.undo()


@pytest.fixture(params=[names.versions for names in LAYOUTS])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Sglang:
    return Sglang(monkeypatch, request.param)


@pytest.fixture
def precompute(monkeypatch: pytest.MonkeyPatch) -> Sglang:
    return Sglang(monkeypatch, LAYOUTS[0].versions)


def forwards(world: Sglang, backend: Any) -> list[Any]:
    """The forwards that layers call, as they are now."""
    owners = {"self": backend, "module": world.module}
    return [getattr(owners[place.split(".")[0]], place.split(".")[1]) for place in world.names.wrapped]


def test_attach_wraps_and_detach_puts_back(world: Sglang) -> None:
    backend = world.backend()
    before = dict(vars(backend))
    attached = attach(backend, BUILD)
    assert attached.names is world.names
    assert world.forward not in forwards(world, backend)
    backend.init_forward_metadata(Batch([300, 5, 70]))
    backend.decode_layer()
    assert len(world.calls) == 1, "the layer still reaches SGLang's forward"
    attached.detach()
    assert all(forward is world.forward for forward in forwards(world, backend))
    assert vars(backend).keys() == before.keys()
    assert all(value == before[name] for name, value in vars(backend).items() if callable(value))
    attached.detach()  # the second time: nothing


def test_attach_is_idempotent_and_shared(world: Sglang) -> None:
    first, second = world.backend(), world.backend()
    attached = attach(first, BUILD)
    assert attach(first, BUILD) is attached
    wrapped = forwards(world, first)
    other = attach(second, BUILD)
    if "module" in world.names.wrapped[0]:
        assert all(a is b for a, b in zip(forwards(world, second), wrapped, strict=True)), "wrapped once"
    attached.detach()
    assert world.forward not in forwards(world, second), "the second backend keeps its wrapped forward"
    other.detach()
    assert all(forward is world.forward for forward in forwards(world, second))
    assert attach(first, BUILD) is not attached, "attachable again"


def test_eager_decode_gets_what_the_forward_would_make(precompute: Sglang) -> None:
    backend = precompute.backend()
    attach(backend, BUILD)
    lengths = [300, 5, 70]
    backend.init_forward_metadata(Batch(lengths))
    made = backend.forward_metadata.scheduler_metadata
    wanted = fa3_metadata.get_scheduler_metadata(
        3, 1, 19 * PAGE, HEADS, KV_HEADS, DIM, torch.tensor(lengths, dtype=torch.int32), page_size=PAGE, causal=True,
        cu_seqlens_q=torch.arange(4, dtype=torch.int32), build=BUILD,
    )  # fmt: skip
    layout = fa3_metadata.metadata_layout(
        3, 1, 19 * PAGE, HEADS, KV_HEADS, DIM, page_size=PAGE, causal=True,
        cu_seqlens_q=torch.arange(4, dtype=torch.int32), build=BUILD,
    )  # fmt: skip
    ours, theirs = (fa3_metadata.unpack_metadata(tensor, layout) for tensor in (made, wanted))
    assert all(torch.equal(ours[row], theirs[row]) for row in layout.rows)
    assert precompute.native_calls == 0
    backend.decode_layer()
    assert precompute.calls[-1]["scheduler_metadata"] is made
    backend.decode_layer(window=64)
    window = precompute.calls[-1]["scheduler_metadata"]
    assert window is not None, "SGLang passes none to a layer with a window"
    assert window is not made


def test_eager_asks_for_the_page_tables_width(precompute: Sglang, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(sglang, "get_scheduler_metadata", lambda **call: asked.append(call) or torch.zeros(17))
    backend = precompute.backend()
    attach(backend, BUILD)
    backend.init_forward_metadata(Batch([300, 5, 70]))
    assert (asked[0]["max_seqlen_k"], asked[0]["build"]) == (304, BUILD), "in whole pages, as the forward counts"
    assert asked[0]["cache_seqlens"] is backend.forward_metadata.cache_seqlens_int32


def test_no_metadata_where_sglang_asks_for_none(precompute: Sglang) -> None:
    backend = precompute.backend()
    attach(backend, BUILD)
    backend.init_forward_metadata(Batch([300]))
    backend.init_forward_metadata(Batch([300], speculative=True))
    assert backend.forward_metadata.scheduler_metadata is None, "nothing left over from the batch before"


def test_eager_layers_of_a_kind_share(world: Sglang) -> None:
    """Also those that SGLang never has metadata for: windows, and verification of drafts."""
    backend = world.backend()
    attach(backend, BUILD)
    backend.init_forward_metadata(Batch([300, 5, 70], speculative=True))
    for _ in range(2):
        backend.decode_layer()
        backend.decode_layer(window=64)
        backend.verify_layer(4)
    first, again = world.calls[:3], world.calls[3:]
    assert len({call["scheduler_metadata"].data_ptr() for call in first}) == 3
    assert all(a["scheduler_metadata"] is b["scheduler_metadata"] for a, b in zip(first, again, strict=True))
    verified = first[2]
    layout = fa3_metadata.metadata_layout(
        3, 4, 19 * PAGE, HEADS, KV_HEADS, DIM, page_size=PAGE, causal=True,
        cu_seqlens_q=torch.arange(4, dtype=torch.int32), build=BUILD,
    )  # fmt: skip
    assert (verified["num_splits"], len(verified["scheduler_metadata"])) == (layout.num_splits, layout.size)


def layers_of(model: str) -> list[Any]:
    layers = MODELS[model]
    caches = {number: torch.zeros(4, PAGE, KV_HEADS, DIM, dtype=torch.bfloat16) for number, _ in layers}
    return [SimpleNamespace(headdim_v=DIM, window=window, keys=caches[number]) for number, (window, _) in layers]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("captured", [False, True])
def test_layers_that_read_the_keys_of_others(
    world: Sglang, model: str, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, layers = world.backend(), layers_of(model)
    attach(backend, BUILD)
    with torch.inference_mode():
        if captured:
            Graph(monkeypatch)
            backend.prepare_graph(Batch([300, 5, 70]), capture=True)
        else:
            backend.init_forward_metadata(Batch([300, 5, 70], speculative=True))
        backend.run_layers(layers)
    made = {layer.window: call["scheduler_metadata"] for layer, call in zip(layers, world.calls, strict=True)}
    for layer, call in zip(layers, world.calls, strict=True):
        assert call["scheduler_metadata"] is made[layer.window] is not None


@pytest.mark.parametrize("model", ["Gemma 3n", "YOCO", 1, 2, 3])
def test_a_model_that_is_run_again_is_a_new_step(world: Sglang, model: str | int) -> None:
    """On a batch that SGLang has prepared once: nothing says that its lengths have not grown. However many layers."""
    backend = world.backend()
    layers = layers_of(model) if isinstance(model, str) else layers_of("Gemma 3n")[:model]
    attach(backend, BUILD)
    with torch.inference_mode():
        backend.init_forward_metadata(Batch([300, 5, 70], speculative=True))
        for longest in (300, 9000, 4000, 64, 15000, 300):
            lengths = [longest, 5, 70]
            backend.forward_metadata.cache_seqlens_int32.numpy()[:] = lengths
            world.calls.clear()
            backend.run_layers(layers)
            kinds = {layer.window for layer in layers}
            assert len({id(call["scheduler_metadata"]) for call in world.calls}) == len(kinds)
            for layer, call in zip(layers, world.calls, strict=True):
                window = (layer.window, 0 if layer.window >= 0 else -1)
                right = fa3_metadata.get_scheduler_metadata(
                    **SHAPE, batch_size=3, max_seqlen_k=19 * PAGE, window_size=window,
                    cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
                    cu_seqlens_q=torch.arange(4, dtype=torch.int32),
                )  # fmt: skip
                assert torch.equal(call["scheduler_metadata"], right)


@pytest.mark.parametrize("inference", [False, True])
def test_batches_do_not_share(world: Sglang, inference: bool) -> None:
    """The lengths of the next batch may lie where those of the last one did."""
    backend = world.backend()
    attach(backend, BUILD)
    with torch.inference_mode(inference):
        for lengths in ([300, 5, 70], [9000, 5, 70]):
            backend.init_forward_metadata(Batch(lengths, speculative=True))
            for _ in range(2):
                backend.decode_layer()
    made = [call["scheduler_metadata"] for call in world.calls]
    assert made[0] is made[1]
    assert made[2] is made[3]
    assert not torch.equal(made[0], made[2])


def test_a_graphs_batch_is_no_eager_step(world: Sglang) -> None:
    """Its lengths are written in place before every replay, so nothing made for a warm-up may be found later."""
    backend = world.backend()
    attach(backend, BUILD)
    backend.init_forward_metadata(Batch([300, 5, 70], speculative=True))
    backend.prepare_graph(Batch([20, 5, 70]), capture=True)
    backend.decode_layer()
    backend.verify_layer(4)
    assert [call["scheduler_metadata"] for call in world.calls] == [None, None]


def test_backends_do_not_share_a_step(world: Sglang) -> None:
    """A draft's backends know their own batches; one that has none is passed through."""
    first, second = world.backend(), world.backend()
    for backend in (first, second):
        attach(backend, BUILD)
    first.init_forward_metadata(Batch([300, 5], speculative=True))
    second.forward_metadata = first.forward_metadata
    second.decode_layer()
    assert world.calls[-1]["scheduler_metadata"] is None
    first.decode_layer()
    assert world.calls[-1]["scheduler_metadata"] is not None


def test_a_single_layer_is_left_to_fa3(world: Sglang) -> None:
    """A drafter's layer shares with none; "balanced" is a better schedule for it all the same."""
    for policy, made in (("fa3", [True, False, False, False, True]), ("balanced", [True] * 5)):
        backend = world.backend()
        attached = attach(backend, BUILD, policy)
        world.calls.clear()
        for layers in (1, 1, 0, 1, 2, 1):
            backend.init_forward_metadata(Batch([300, 5], speculative=True))
            for _ in range(layers):
                backend.decode_layer()
        firsts = [world.calls[i]["scheduler_metadata"] is not None for i in (0, 1, 2, 3, 5)]
        assert firsts == made, policy
        attached.detach()


def test_an_eager_step_in_a_thread_of_its_own(world: Sglang) -> None:
    backend = world.backend()
    attach(backend, BUILD)
    backend.init_forward_metadata(Batch([300, 5], speculative=True))
    thread = threading.Thread(target=backend.decode_layer)
    thread.start()
    thread.join()
    backend.decode_layer()
    assert world.calls[0]["scheduler_metadata"] is world.calls[1]["scheduler_metadata"] is not None


def test_a_failed_eager_batch_leaves_nothing_behind(precompute: Sglang) -> None:
    backend = precompute.backend()
    backend.prepare_graph(Batch([1, 1]), capture=True)
    attach(backend, BUILD)
    with pytest.raises(MemoryError):
        backend.init_forward_metadata(Batch([300], fails=True))
    backend.init_forward_metadata(Batch([300], speculative=True))
    assert backend.forward_metadata.scheduler_metadata is None, "not that of the failed batch"
    with pytest.raises(MemoryError):
        backend.init_forward_metadata(Batch([300], fails=True))
    backend.prepare_graph(Batch([300, 5]), capture=False)
    assert precompute.native_calls == 2, "a replay is not taken for an eager batch"


def test_sm8x_leaves_eager_batches_to_fa3(precompute: Sglang, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang, "device_facts", lambda *_: (89, 128))
    backend = precompute.backend()
    attach(backend, BUILD)
    backend.init_forward_metadata(Batch([300]))
    assert backend.forward_metadata.scheduler_metadata is None


def test_capture_is_left_to_the_wrapped_forward(precompute: Sglang) -> None:
    backend = precompute.backend()
    attached = attach(backend, BUILD)
    backend.prepare_graph(Batch([1, 1]), capture=True)
    assert backend.forward_metadata.scheduler_metadata is None
    backend.prepare_graph(Batch([300, 70]), capture=False)
    assert backend.forward_metadata.scheduler_metadata is None
    assert precompute.native_calls == 0
    assert bool((backend.buffer == -1).all()), "SGLang copies nothing"
    attached.detach()
    backend.prepare_graph(Batch([400, 70]), capture=False)
    assert precompute.native_calls == 0, "a graph that makes its own metadata needs none from SGLang"


def test_layers_of_a_kind_share_what_the_first_of_them_makes(world: Sglang) -> None:
    """`step()` stands in for the capture of a graph, which needs a GPU."""
    backend = world.backend()
    attach(backend, BUILD)
    backend.prepare_graph(Batch([300, 5, 70]), capture=True)
    with fa3_metadata.step():
        for window in (-1, 64, -1, 64):
            backend.decode_layer(window=window)
    full, window, *again = (call["scheduler_metadata"] for call in world.calls)
    assert full is not None
    assert window is not None
    assert again[0] is full
    assert again[1] is window
    assert full is not window
    plan = fa3_metadata.MetadataPlan(
        max_batch_size=3, max_seqlen_k=64 * PAGE, num_heads=HEADS, num_heads_k=KV_HEADS, headdim=DIM, device="cpu",
        page_size=PAGE, causal=True, varying=["cu_seqlens_q"], build=BUILD,
    )  # fmt: skip
    assert (world.calls[0]["num_splits"], world.calls[0]["pack_gqa"]) == (plan.num_splits, plan.pack_gqa)


def test_a_graph_captured_before_keeps_sglangs_metadata(precompute: Sglang) -> None:
    backend = precompute.backend()
    backend.prepare_graph(Batch([1, 1]), capture=True)
    attach(backend, BUILD)
    backend.buffer.fill_(-1)
    backend.prepare_graph(Batch([300, 70]), capture=False)
    assert precompute.native_calls == 2
    assert bool((backend.buffer[:17] == 0).all()), "the buffer that the graph reads is refreshed"


def test_layers_of_another_shape_get_no_eager_metadata(precompute: Sglang) -> None:
    backend = precompute.backend()
    attach(backend, BUILD)
    backend.init_forward_metadata(Batch([300, 5, 70]))
    made = backend.forward_metadata.scheduler_metadata
    backend.decode_layer(headdim_v=64)
    own = precompute.calls[-1]["scheduler_metadata"]
    assert own is not None, "but the wrapped forward makes theirs"
    assert own is not made


SHAPE = {"max_seqlen_q": 1, "num_heads": HEADS, "num_heads_k": KV_HEADS, "headdim": DIM, "page_size": PAGE,
         "causal": True, "build": BUILD}  # fmt: skip


@pytest.mark.parametrize("lengths", [[300, 5, 70], [30000, 5, 70], [9000] * 40, [60000] + [100] * 1100], ids=len)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_balanced_eager_batches_get_the_bound_of_their_metadata(
    world: Sglang, lengths: list[int], batch_invariant: bool
) -> None:
    """SGLang hands the forward num_splits=0; the wrapped forward tells FA3 how many there are."""
    backend = world.backend()
    attach(backend, BUILD, "balanced", batch_invariant=batch_invariant)
    backend.init_forward_metadata(Batch(lengths))
    backend.decode_layer()
    backend.decode_layer()
    first, second = world.calls
    call = SHAPE | {
        "batch_size": len(lengths), "max_seqlen_k": -(-max(lengths) // PAGE) * PAGE, "policy": "balanced",
        "cu_seqlens_q": torch.arange(len(lengths) + 1, dtype=torch.int32), "batch_invariant": batch_invariant,
    }  # fmt: skip
    ours = fa3_metadata.get_scheduler_metadata(**call, cache_seqlens=torch.tensor(lengths, dtype=torch.int32))
    layout = fa3_metadata.metadata_layout(**call)
    assert torch.equal(first["scheduler_metadata"], ours)
    assert (first["num_splits"], first["pack_gqa"]) == (layout.num_splits, layout.pack_gqa)
    assert second["scheduler_metadata"] is first["scheduler_metadata"]
    assert world.native_calls == 0


def test_batch_invariance_of_eager_batches(world: Sglang, caplog: pytest.LogCaptureFixture) -> None:
    """A decode row has its splits in any batch. What cannot be is served with one split, and said once."""
    backend = world.backend()
    attach(backend, BUILD, "balanced", batch_invariant=True)
    seen = set()
    for lengths in ([9000], [9000, 5, 30000], [9000] + [300] * 1100):
        backend.init_forward_metadata(Batch(lengths))
        backend.decode_layer()
        call, batch = world.calls[-1], len(lengths)
        layout = fa3_metadata.metadata_layout(
            **SHAPE | {"batch_size": batch, "max_seqlen_k": call["page_table"].shape[1] * PAGE, "policy": "balanced",
                       "cu_seqlens_q": call["cu_seqlens_q"], "batch_invariant": True}
        )  # fmt: skip
        rows = fa3_metadata.unpack_metadata(call["scheduler_metadata"], layout)
        place = rows["varlen_batch_idx"].tolist().index(0)
        seen.add((int(rows["num_splits_dynamic"][place]), call["num_splits"], call["pack_gqa"]))
    assert len(seen) == 1
    assert max(seen)[0] > 1
    assert not caplog.records
    backend.init_forward_metadata(Batch([9000, 300]))
    backend.verify_layer(16)  # 64 query rows
    assert world.calls[-1]["scheduler_metadata"] is not None
    for tokens in (17, 300):
        backend.verify_layer(tokens)
        assert (world.calls[-1]["scheduler_metadata"], world.calls[-1]["num_splits"]) == (None, 1)
    backend.decode_layer(window=9050)  # over the whole page table of this batch
    assert (world.calls[-1]["scheduler_metadata"], world.calls[-1]["num_splits"]) == (None, 1)
    backend.decode_layer(window=4095)
    assert world.calls[-1]["scheduler_metadata"] is not None
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "max_seqlen_q must be at most 16" in said[0]
    assert "window_size[0] must be under" in said[1]


def test_balanced_layers_of_a_graph_get_the_bound_of_their_metadata(world: Sglang) -> None:
    """`step()` stands in for the capture of a graph, which needs a GPU."""
    backend = world.backend()
    attach(backend, BUILD, "balanced")
    backend.prepare_graph(Batch([300, 5, 70]), capture=True)
    with fa3_metadata.step():
        for window in (-1, 64, -1):
            backend.decode_layer(window=window)
    starts, lengths = torch.arange(4, dtype=torch.int32), torch.tensor([300, 5, 70], dtype=torch.int32)
    for call, window in zip(world.calls, ((-1, -1), (64, 0), (-1, -1)), strict=True):
        problem = SHAPE | {"batch_size": 3, "max_seqlen_k": 64 * PAGE, "cu_seqlens_q": starts, "window_size": window}
        problem |= {"policy": "balanced", "cache_seqlens": lengths}
        layout = fa3_metadata.metadata_layout(**problem)
        assert torch.equal(call["scheduler_metadata"], fa3_metadata.get_scheduler_metadata(**problem))
        assert (call["num_splits"], call["pack_gqa"]) == (layout.num_splits, layout.pack_gqa)
    assert world.calls[0]["num_splits"] != fa3_metadata.metadata_layout(**problem | {"policy": "fa3"}).num_splits


def test_policies_do_not_mix(world: Sglang) -> None:
    backend, other = world.backend(), world.backend()
    with pytest.raises(ValueError, match="policy must be one of fa3, balanced, got 'fast'"):
        attach(backend, BUILD, "fast")
    attached = attach(backend, BUILD, "balanced")
    assert attach(backend, BUILD, "balanced") is attached
    with pytest.raises(ValueError, match="policy must be 'balanced', with which backend is attached, got 'fa3'"):
        attach(backend, BUILD)
    if "module" in world.names.wrapped[0]:
        before = dict(vars(other))
        with pytest.raises(ValueError, match=r"policy must be 'balanced', with which .* is wrapped already"):
            attach(other, BUILD)
        assert vars(other) == before
    attached.detach()
    attach(other, BUILD).detach()


def test_attach_new_backends_with_a_policy(world: Sglang, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="policy must be one of"):
        attach_new_backends(BUILD, "fast")
    with caplog.at_level(logging.INFO, "fa3_metadata"):
        undo = attach_new_backends(BUILD, "balanced")
        backend = world.backend()
    assert caplog.messages[0].endswith(f"SGLang {world.names.versions}, policy balanced")
    assert attach_new_backends(BUILD, "balanced") == undo
    with pytest.raises(ValueError, match="policy must be 'balanced', with which new backends are attached"):
        attach_new_backends(BUILD)
    undo()
    attach(backend, BUILD, "balanced").detach()


def test_another_backend_is_refused(precompute: Sglang) -> None:
    for backend in (object(), None, SimpleNamespace(fa_impl_ver=3), type("B", (type(precompute.backend()),), {})()):
        with pytest.raises(TypeError, match=r"must be sglang\..*FlashAttentionBackend, got"):
            attach(backend, BUILD)


def test_another_flash_attention_is_refused(precompute: Sglang) -> None:
    with pytest.raises(RuntimeError, match=r"FlashAttention 3 .*got 4"):
        attach(precompute.backend(4), BUILD)
    precompute.uses_package_kernel = False
    with pytest.raises(RuntimeError, match="SGLANG_USE_SGL_FA3_KERNEL must be true"):
        attach(precompute.backend(), BUILD)


@pytest.mark.parametrize("name", ["page_size", "forward_metadata", "decode_cuda_graph_metadata"])
def test_an_unknown_sglang_is_refused_untouched(precompute: Sglang, name: str) -> None:
    backend = precompute.backend()
    delattr(backend, name)
    before = dict(vars(backend))
    with pytest.raises(RuntimeError, match=rf"without self\.{name}: this SGLang is not supported"):
        attach(backend, BUILD)
    assert vars(backend) == before
    assert precompute.module.flash_attn_with_kvcache is precompute.forward  # type: ignore[attr-defined]


def test_unknown_names_are_refused(world: Sglang, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = world.backend()
    for place in [name for names in LAYOUTS for name in (names.marker, *names.wrapped)]:
        owner, name = place.split(".")
        (vars(backend) if owner == "self" else vars(world.module)).pop(name, None)
    with pytest.raises(RuntimeError, match=r"must have one of .* got none"):
        attach(backend, BUILD)


def test_a_forward_without_metadata_is_refused(precompute: Sglang) -> None:
    backend = precompute.backend()
    before = dict(vars(backend))
    precompute.module.flash_attn_with_kvcache = lambda q, k_cache, v_cache: q  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="scheduler_metadata"):
        attach(backend, BUILD)
    assert vars(backend) == before


def test_detach_refuses_what_somebody_has_replaced(world: Sglang) -> None:
    backend = world.backend()
    attached = attach(backend, BUILD)
    owner, name = world.names.wrapped[0].split(".")
    setattr(backend if owner == "self" else world.module, name, lambda **_: None)
    with pytest.raises(RuntimeError, match=f"{name} must be as attach"):
        attached.detach()
    assert attach(backend, BUILD) is attached, "still attached"


def test_another_build_of_a_shared_forward_is_refused(precompute: Sglang) -> None:
    attach(precompute.backend(), BUILD)
    with pytest.raises(ValueError, match=r"build must be 'sglang-kernel-0\.4\.2'"):
        attach(precompute.backend(), "sglang-kernel-0.4.1")


def test_attach_new_backends(world: Sglang, caplog: pytest.LogCaptureFixture) -> None:
    earlier = world.backend()
    with caplog.at_level(logging.INFO, "fa3_metadata"):
        undo = attach_new_backends(BUILD)
        assert attach_new_backends(BUILD) == undo
        backend = world.backend()
    assert caplog.messages == [
        f"scheduler metadata: attached to the FlashAttentionBackend of SGLang {world.names.versions}"
    ]
    assert world.forward not in forwards(world, backend)
    undo()
    attach(backend).detach()
    later = world.backend()
    for untouched in (earlier, later):
        assert all(forward is world.forward for forward in forwards(world, untouched))


def test_another_flash_attention_is_left_alone(world: Sglang, caplog: pytest.LogCaptureFixture) -> None:
    """FA4 for prefill beside FA3 for decode: both are FlashAttentionBackends of one process."""
    attach_new_backends(BUILD)
    backend, other = world.backend(), world.backend(4)
    third = world.backend(4)
    assert not hasattr(other, sglang._MARK)
    assert [record.levelname for record in caplog.records] == ["WARNING"], "once"
    assert "FlashAttention 3 (fa_impl_ver), got 4" in caplog.text
    assert "fa3-metadata doctor" in caplog.text
    for one in (backend, other, third):
        one.init_forward_metadata(Batch([300, 5, 70]))
        one.decode_layer()
    if world.names.maker_keywords:  # where one forward serves both versions
        assert [call["pack_gqa"] for call in world.calls if call["ver"] == 4] == [None, None]


def test_strict_raises_what_attach_raises(world: Sglang, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA3_METADATA_STRICT", "1")
    attach_new_backends(BUILD)
    with pytest.raises(RuntimeError, match="FlashAttention 3"):
        world.backend(4)
    world.backend()


def test_an_unknown_sglang_is_left_alone(precompute: Sglang, caplog: pytest.LogCaptureFixture) -> None:
    attach_new_backends(BUILD)
    precompute.uses_package_kernel = False
    backend = precompute.backend()
    assert forwards(precompute, backend) == [precompute.forward]
    assert "SGLANG_USE_SGL_FA3_KERNEL must be true" in caplog.text


def test_what_derives_from_a_backend_is_left_alone(world: Sglang, caplog: pytest.LogCaptureFixture) -> None:
    """SGLang has one for MUSA, with a forward of its own."""
    attach_new_backends(BUILD)
    kind = world.module.FlashAttentionBackend  # type: ignore[attr-defined]
    backend = type("MusaFlashAttentionBackend", (kind,), {})()
    assert not hasattr(backend, sglang._MARK)
    assert not caplog.records


def test_the_environment_says_how(world: Sglang, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA3_METADATA_POLICY", "balanced")
    monkeypatch.setenv("FA3_METADATA_BATCH_INVARIANT", "1")
    attach_new_backends(BUILD)
    attached = vars(world.backend())[sglang._MARK]
    assert (attached.policy.policy, attached.policy.batch_invariant) == ("balanced", True)


def test_without_sglang() -> None:
    with pytest.raises(ModuleNotFoundError, match="SGLang is not installed"):
        attach_new_backends(BUILD)


def test_the_kill_switch(precompute: Sglang, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA3_METADATA_DISABLE", "1")
    undo = attach_new_backends(BUILD)
    backend = precompute.backend()
    before = dict(vars(backend))
    attach(backend, BUILD).detach()
    assert forwards(precompute, backend) == [precompute.forward]
    assert vars(backend) == before
    undo()


@pytest.mark.parametrize(("build", "kept"), [("sglang-kernel-0.4.2", True), ("sglang-kernel-0.4.5", False)])
def test_a_batch_padded_with_queries_makes_its_own_where_they_are_counted(
    precompute: Sglang, build: str, kept: bool
) -> None:
    """The forward counts them, and has room for other splits than the batch was given."""
    backend = precompute.module.FlashAttentionBackend()  # type: ignore[attr-defined]
    attach(backend, build)
    backend.init_forward_metadata(Batch([9000, 40, 700]))
    made = backend.forward_metadata
    assert made.scheduler_metadata is not None
    kv = torch.zeros(9, PAGE, KV_HEADS, DIM, dtype=torch.bfloat16)
    for tokens in (3, 8):
        precompute.module.flash_attn_with_kvcache(  # type: ignore[attr-defined]
            q=torch.zeros(tokens, HEADS, DIM, dtype=torch.bfloat16), k_cache=kv, v_cache=kv,
            page_table=made.page_table, cache_seqlens=made.cache_seqlens_int32, cu_seqlens_q=made.cu_seqlens_q,
            max_seqlen_q=1, causal=True, scheduler_metadata=made.scheduler_metadata, ver=3,
        )  # fmt: skip
    exact, padded = (call["scheduler_metadata"] for call in precompute.calls)
    assert exact is made.scheduler_metadata
    assert (padded is made.scheduler_metadata) == kept
