"""vLLM's forward with metadata of its own, where vLLM makes none: run eagerly, on CPU and a stand-in for vLLM."""

from __future__ import annotations

import pathlib
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata.engines import vllm as adapter
from fa3_metadata.engines.vllm_forward import lengths_to_share
from fa3_metadata.engines.vllm_names import CONTEXT, ENTER, FORWARD, PACKAGE

from ..calls.test_kv_sharing import MODELS
from ..calls.test_wrapper_safety import Graph
from ..helpers.vllm_stand_in import BUILD, DECODE, check, expected, gqa_builder, make_batch

WINDOW, FULL = (1023, 0), (-1, -1)


class Model:
    """Layers that one builder serves, with these windows."""

    def __init__(self, *windows: tuple[int, int], **more: Any) -> None:
        self.builder = gqa_builder(window=windows[0], others=windows[1:], **more)
        layers = self.builder.vllm_config.compilation_config.static_forward_context
        self.builder.layer_names = list(layers)
        self.impls = [layer.impl for layer in layers.values()]
        self.caches = [torch.zeros(700, 16, 8, 128, dtype=torch.bfloat16) for _ in self.impls]

    def step(self, batch: SimpleNamespace, enter: Any = None, **more: Any) -> list[torch.Tensor | None]:
        """The metadata that each layer's call arrives with."""
        attn_metadata = self.builder.build(0, batch, **more)
        calls = import_module(adapter.INTERFACE).CALLS
        calls.clear()
        q = torch.zeros(int(batch.starts[-1]), 32, 128, dtype=torch.bfloat16)
        enter = enter or import_module(CONTEXT).set_forward_context
        with torch.inference_mode(), enter(dict.fromkeys(self.builder.layer_names, attn_metadata)):
            for impl, cache in zip(self.impls, self.caches, strict=True):
                impl.forward(q, cache, attn_metadata)
        self.calls = list(calls)
        return [call["scheduler_metadata"] for call in calls]


def test_each_kind_of_layer_is_made_once_a_step(any_root: pathlib.Path) -> None:
    attached = adapter.attach()
    model = Model(WINDOW, FULL, WINDOW, FULL, WINDOW)
    for batch in (DECODE, make_batch([40, 2000])):
        made = model.step(batch)
        assert len({id(tensor) for tensor in made}) == 2
        for tensor, impl in zip(made, model.impls, strict=True):
            check(tensor, expected(batch, window_size=impl.sliding_window), batch.size)
        assert [call["num_splits"] for call in model.calls] == [
            bound_of(batch, impl.sliding_window) for impl in model.impls
        ]
    assert attached.used


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("captured", [False, True])
def test_layers_that_read_the_keys_of_others(
    any_root: pathlib.Path, model: str, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one group with windows mixed, since vLLM's hybrid KV cache is turned off."""
    adapter.attach()
    layers = MODELS[model]
    ours = Model(*[window for _, window in layers])
    ours.caches = [ours.caches[number] for number, _ in layers]
    if captured:
        Graph(monkeypatch)
    made = ours.step(DECODE, fast_build=True)
    assert len({id(tensor) for tensor in made}) == len({window for _, window in layers})
    for tensor, (_, window) in zip(made, layers, strict=True):
        check(tensor, expected(DECODE, window_size=window), DECODE.size)


def bound_of(batch: SimpleNamespace, window: tuple[int, int]) -> int:
    return fa3_metadata.metadata_layout(
        batch.size, 1, batch.max_seq_len, 32, 8, 128, cu_seqlens_q=batch.starts, page_size=16, causal=True,
        window_size=window, build=BUILD,
    ).num_splits  # fmt: skip


def test_drafts_that_are_built_fast(any_root: pathlib.Path) -> None:
    adapter.attach()
    made = Model(FULL, FULL, FULL).step(DECODE, fast_build=True)
    assert len({id(tensor) for tensor in made}) == 1
    check(made[0], expected(DECODE), DECODE.size)
    assert Model(FULL).step(DECODE, fast_build=True) == [None], "a layer alone has nobody to share with"


def test_what_vllm_made_is_not_made_again(any_root: pathlib.Path) -> None:
    adapter.attach()
    model = Model(FULL, FULL)
    made = model.step(DECODE)
    assert made[0] is made[1]
    check(made[0], expected(DECODE), DECODE.size)
    assert [call["num_splits"] for call in model.calls] == [0, 0], "vLLM's own"


@pytest.mark.parametrize("splits", [1, 8, 32])
def test_splits_that_vllm_fixed_stay(any_root: pathlib.Path, splits: int) -> None:
    """In full CUDA graphs, and 1 for batch invariance."""
    adapter.attach(policy="balanced")
    model = Model(WINDOW, FULL, WINDOW, graphs=True, splits=splits)
    made = model.step(DECODE)
    assert [call["num_splits"] for call in model.calls] == [splits] * 3
    check(made[1], expected(DECODE, splits, policy="balanced", forward_is_told=True), DECODE.size)


def test_balanced_tells_the_forward_its_own_bound(any_root: pathlib.Path) -> None:
    adapter.attach(policy="balanced")
    model = Model(WINDOW, FULL)
    made = model.step(DECODE)
    check(made[1], expected(DECODE, policy="balanced"), DECODE.size)
    layout = fa3_metadata.metadata_layout(
        DECODE.size, 1, 9000, 32, 8, 128, cu_seqlens_q=DECODE.starts, page_size=16, causal=True, build=BUILD,
        policy="balanced",
    )  # fmt: skip
    assert model.calls[1]["num_splits"] == layout.num_splits


@pytest.mark.parametrize("version", [2, 4])
def test_other_flash_attention_versions_go_straight_to_vllm(any_root: pathlib.Path, version: int) -> None:
    adapter.attach()
    model = Model(WINDOW, FULL, fa_version=version)
    assert model.step(DECODE) == [None, None]
    assert [call["num_splits"] for call in model.calls] == [0, 0]


def test_ragged_keys_go_straight_to_vllm(any_root: pathlib.Path) -> None:
    """As in encoders and prefills, which bring no lengths of a cache."""
    attached = adapter.attach()
    forward, calls = (getattr(import_module(adapter.INTERFACE), name) for name in (FORWARD, "CALLS"))
    q, starts = torch.zeros(3, 8, 64, dtype=torch.bfloat16), torch.tensor([0, 1, 3], dtype=torch.int32)
    with fa3_metadata.step():
        forward(q=q, k=q, v=q, max_seqlen_q=2, cu_seqlens_q=starts, max_seqlen_k=2, cu_seqlens_k=starts, fa_version=3)
    assert [call["scheduler_metadata"] for call in calls] == [None]
    assert not attached.used


def test_outside_a_step_nothing_is_shared(any_root: pathlib.Path) -> None:
    adapter.attach()
    model = Model(WINDOW, FULL)
    own = import_module(CONTEXT).set_forward_context
    assert model.step(DECODE, enter=lambda metadata: own(None)) == [None, None]
    assert model.step(DECODE, enter=lambda metadata: own([metadata, metadata])) == [None, None]  # two half batches


def test_steps_of_modules_that_have_imported_it_before(any_root: pathlib.Path) -> None:
    runner = import_module("vllm.v1.runner")
    own = runner.set_forward_context
    attached = adapter.attach()
    assert import_module(CONTEXT).set_forward_context is runner.set_forward_context is not own
    model = Model(WINDOW, FULL, WINDOW)
    assert len({id(tensor) for tensor in model.step(DECODE, enter=runner.set_forward_context)}) == 2
    with runner.set_forward_context(attn_metadata={"layers.0": None}) as entered:
        assert entered == {"layers.0": None}
    attached.detach()
    assert import_module(CONTEXT).set_forward_context is runner.set_forward_context is own


def test_builders_imported_late_are_told_their_windows(any_root: pathlib.Path) -> None:
    """Such a builder never calls our function: entering a forward notices that vLLM has imported it."""
    attached = adapter.attach()
    assert attached.waiting == {adapter.GQA: "FlashAttentionMetadataBuilder"}
    builder = gqa_builder(window=WINDOW, others=(FULL,))
    assert builder.build(0, DECODE).scheduler_metadata is None  # once vLLM's way
    with import_module(CONTEXT).set_forward_context(None):
        assert attached.waiting == {}
    check(builder.build(0, DECODE).scheduler_metadata, expected(DECODE, window_size=WINDOW), DECODE.size)


def test_modules_that_call_the_forward(any_root: pathlib.Path) -> None:
    modules = [import_module(name) for name in (adapter.INTERFACE, PACKAGE, adapter.FA_UTILS, adapter.GQA)]
    own = modules[0].flash_attn_varlen_func
    attached = adapter.attach()
    (any_root / "v1/sparse.py").write_text(f"from {adapter.INTERFACE} import {FORWARD}\n")
    modules.append(import_module("vllm.v1.sparse"))
    ours = {id(getattr(module, FORWARD)) for module in modules}
    assert len(ours) == 1
    assert id(own) not in ours
    attached.detach()
    assert all(getattr(module, FORWARD) is own for module in modules)


def test_a_forward_that_is_wrapped_already(any_root: pathlib.Path) -> None:
    fa3_metadata.install(wrap_forward=True, build=BUILD)
    try:
        with pytest.raises(RuntimeError, match="forward cannot be wrapped; nothing was changed: policy must be"):
            adapter.attach(policy="balanced")
        wrapped = getattr(import_module(adapter.FA_UTILS), FORWARD)
        attached = adapter.attach()
        assert len({id(tensor) for tensor in Model(WINDOW, FULL, WINDOW).step(DECODE)}) == 2
        attached.detach()
        assert getattr(import_module(adapter.FA_UTILS), FORWARD) is wrapped
    finally:
        fa3_metadata.uninstall()


@pytest.mark.parametrize(("module", "name"), [(CONTEXT, ENTER), (adapter.FA_UTILS, FORWARD)])
def test_what_was_put_over_ours_stops_a_detach(any_root: pathlib.Path, module: str, name: str) -> None:
    attached = adapter.attach()
    ours = getattr(import_module(module), name)
    setattr(import_module(module), name, len)
    with pytest.raises(RuntimeError, match=f"{module}.{name} is <built-in function len>"):
        attached.detach()
    setattr(import_module(module), name, ours)
    attached.detach()


def test_lengths_of_a_layers_own_are_left_alone(any_root: pathlib.Path) -> None:
    """Those of sparse MLA, which each layer may write anew in the same place."""
    adapter.attach()
    forward, calls = (getattr(import_module(adapter.INTERFACE), name) for name in (FORWARD, "CALLS"))
    own, shared = (SimpleNamespace(scheduler_metadata=None, seq_lens=torch.tensor([5, 70, 3])) for _ in range(2))
    q, cache = torch.zeros(3, 8, 64), torch.zeros(9, 16, 1, 64)
    starts = torch.arange(4, dtype=torch.int32)
    with import_module(CONTEXT).set_forward_context({"a": shared, "b": shared}):
        for lengths in (shared.seq_lens, own.seq_lens, shared.seq_lens.clone()):
            forward(
                q=q.bfloat16(), k=cache.bfloat16(), v=cache.bfloat16(), max_seqlen_q=1, cu_seqlens_q=starts,
                max_seqlen_k=80, seqused_k=lengths.int() if lengths is own.seq_lens else lengths, fa_version=3,
                block_table=torch.zeros(3, 5, dtype=torch.int32),
            )  # fmt: skip
    assert [call["scheduler_metadata"] is None for call in calls] == [False, True, True]


def test_whose_lengths_are_shared() -> None:
    lengths = torch.zeros(2)
    has, lacks = (SimpleNamespace(scheduler_metadata=made, seq_lens=lengths) for made in (1, None))
    for metadata in ({"a": lacks, "b": lacks}, {"a": lacks, "b": has, "c": SimpleNamespace(**vars(lacks))}):
        assert lengths_to_share(metadata) == {id(lengths)}
    for metadata in (None, [], {}, [{"a": lacks, "b": lacks}], {"a": lacks}, {"a": lacks, "b": has},
                     {"a": SimpleNamespace(), "b": SimpleNamespace()}, {"a": None, "b": None}):  # fmt: skip
        assert lengths_to_share(metadata) is None, metadata
