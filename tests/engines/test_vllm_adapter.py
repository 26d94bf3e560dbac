"""What vLLM's builders get from the vLLM adapter, on CPU and a stand-in for vLLM."""

from __future__ import annotations

import inspect
import pathlib
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata.engines import vllm as adapter
from fa3_metadata.engines.vllm_names import LAYOUTS
from fa3_metadata.installed import BUILD_VARIABLE

from ..helpers.vllm_stand_in import (
    BUILD,
    DECODE,
    MLA,
    OLDER,
    check,
    expected,
    gqa_builder,
    make_batch,
    metadata_of,
    mla_builder,
    stand_in,
)


@pytest.fixture(autouse=True)
def _build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BUILD_VARIABLE, BUILD)


MIXED = make_batch([300, 9000, 17, 2048], query_lens=[300, 1, 1, 512])
GQA_CALLS = {
    "decode": (DECODE, {}, {}),
    "decode-fixed-splits": (DECODE, {"graphs": True}, {"num_splits": 32}),
    "one-split": (DECODE, {"graphs": True, "splits": 1}, {"num_splits": 1}),
    "mixed": (MIXED, {}, {}),
    "mixed-fixed-splits": (MIXED, {"graphs": True, "splits": 8}, {"num_splits": 8}),
    "window": (DECODE, {"window": (1023, 0)}, {"window_size": (1023, 0)}),
    "window-narrow-heads": (
        MIXED,
        {"window": (127, 0), "heads": (64, 8), "headdim": 64},
        {"window_size": (127, 0), "num_heads": 64, "headdim": 64},
    ),
    "bidirectional": (make_batch([40, 7], query_lens=[40, 7], causal=False), {}, {}),
    "context-parallel": (MIXED, {"dcp": 2}, {"num_heads": 64, "causal": False}),
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", GQA_CALLS)
def test_gqa_builder_gets_our_metadata(any_root: pathlib.Path, case: str, in_place: bool) -> None:
    batch, builder, call = GQA_CALLS[case]
    import_module(adapter.GQA)
    adapter.attach(in_place)
    check(metadata_of(gqa_builder(**builder), batch), expected(batch, **call), batch.size)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("batch", [DECODE, make_batch([4000, 70, 9], query_lens=[2, 2, 1])], ids=["decode", "verify"])
def test_mla_builder_gets_our_metadata(
    any_root: pathlib.Path, batch: SimpleNamespace, graphs: bool, in_place: bool
) -> None:
    import_module(adapter.MLA)
    adapter.attach(in_place)
    wanted = expected(batch, num_splits=32 if graphs else 0, **MLA)
    check(mla_builder(graphs)._build_decode(batch), wanted, batch.size)


def test_cascade_calls() -> None:
    """As versions with cascade attention ask: the common prefix as one sequence, then the rest of each."""
    shape = {"num_heads_q": 32, "num_heads_kv": 8, "headdim": 128, "page_size": 16, "qkv_dtype": torch.float16}
    prefix = make_batch([4096], query_lens=[7], causal=False)
    suffix = make_batch([60, 9, 1000, 33, 8, 41, 5])
    for batch in (prefix, suffix):
        made = adapter.get_scheduler_metadata(
            batch_size=batch.size, max_seqlen_q=batch.max_query_len, max_seqlen_k=batch.max_seq_len, **shape,
            cache_seqlens=batch.lengths, cu_seqlens_q=batch.starts, causal=batch.causal, num_splits=16,
        )  # fmt: skip
        check(made, expected(batch, 16, qkv_dtype=torch.float16), batch.size)


def test_signature_is_vllms_with_out() -> None:
    signature = inspect.signature(adapter.get_scheduler_metadata)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert [p.name for p in plain if p.kind is p.KEYWORD_ONLY] == ["out"]
    ours = inspect.Signature([p for p in plain if p.name != "out"])
    assert f"def {adapter.NAME}{ours}" in LAYOUTS[0].attach()[adapter.INTERFACE]


def test_every_argument_arrives_under_our_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    real = inspect.signature(fa3_metadata.get_scheduler_metadata)
    monkeypatch.setattr(
        adapter.api, "get_scheduler_metadata", lambda *a, **k: seen.update(real.bind(*a, **k).arguments)
    )
    names = [name for name in inspect.signature(adapter.get_scheduler_metadata).parameters if name != "out"]
    values: dict[str, Any] = {name: 10 + i for i, name in enumerate(names)}
    adapter.get_scheduler_metadata(**values, out=torch.empty(3))
    renamed = {"num_heads_q": "num_heads", "num_heads_kv": "num_heads_k", "cache_leftpad": "leftpad_k"}
    for name, value in values.items():
        assert seen.pop(renamed.get(name, name)) == value
    assert seen.pop("out").shape == (3,)
    ours = {"cu_seqlens_k": None, "seqused_q": None, "attention_chunk": 0, "forward_is_told": False}
    assert seen == {"build": BUILD, "policy": "fa3"} | ours


@pytest.mark.parametrize("splits", [1, 7, 32])
def test_splits_are_those_that_vllm_fixed(root: pathlib.Path, monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    seen = []
    real = fa3_metadata.get_scheduler_metadata

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(inspect.signature(real).bind(*args, **kwargs).arguments["num_splits"])
        return real(*args, **kwargs)

    monkeypatch.setattr(adapter.api, "get_scheduler_metadata", spy)
    adapter.attach()
    metadata_of(gqa_builder(graphs=True, splits=splits), DECODE)
    metadata_of(gqa_builder(graphs=False), DECODE)
    assert seen == [splits, 0]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("splits", [0, 1, 7, 32])
@pytest.mark.parametrize(
    "lengths", [[5, 9000, 4096, 700, 700], [300], [40000] + [64] * 999], ids=["skewed", "short", "beyond 992"]
)
def test_balanced_stays_within_what_the_forward_has_room_for(
    root: pathlib.Path, monkeypatch: pytest.MonkeyPatch, lengths: list[int], splits: int, in_place: bool
) -> None:
    """vLLM hands the forward its own number: the fixed one, or 0, for which FA3's heuristic gives the bound."""
    import_module(adapter.GQA)
    seen = []
    real = fa3_metadata.get_scheduler_metadata

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(inspect.signature(real).bind(*args, **kwargs).arguments)
        return real(*args, **kwargs)

    batch = make_batch(lengths)
    fa3_bound = fa3_metadata.metadata_layout(
        batch.size, 1, batch.max_seq_len, 32, 8, 128, cu_seqlens_q=batch.starts, page_size=16, causal=True, build=BUILD
    ).num_splits
    monkeypatch.setattr(adapter.api, "get_scheduler_metadata", spy)
    assert adapter.attach(in_place, "balanced").policy == "balanced"
    made = metadata_of(gqa_builder(graphs=splits > 0, splits=splits, max_batch_size=1000), batch)
    bound = splits or fa3_bound
    assert [(c["policy"], c["num_splits"], c["forward_is_told"]) for c in seen] == [("balanced", splits, False)]
    check(made, expected(batch, bound, policy="balanced"), batch.size)
    assert made.shape == expected(batch, splits).shape, "vLLM's buffer is made for it"


def test_a_policy_is_for_all(root: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="policy must be one of fa3, balanced, got 'fast'"):
        adapter.attach(policy="fast")
    adapter.attach(policy="balanced")
    with pytest.raises(RuntimeError, match=r"already attached with policy='balanced': call detach\(\) first"):
        adapter.attach()


def test_other_flash_attention_versions_are_left_alone(root: pathlib.Path) -> None:
    import_module(adapter.GQA)
    attached = adapter.attach(in_place=True)
    for version in (2, 4):
        builder = gqa_builder(graphs=True, fa_version=version)
        assert metadata_of(builder, DECODE) is None
    assert not attached.used
    # FA4 on Hopper takes over head dims above 256; vLLM asks for FA3's metadata all the same.
    wide = gqa_builder(graphs=True, headdim=512)
    assert metadata_of(wide, DECODE).tolist() == [-1] * 9
    assert wide.scheduler_metadata.tolist() == [-1] * 9 + [0] * (wide.scheduler_metadata.numel() - 9)
    one_mask_each = SimpleNamespace(**(vars(DECODE) | {"causal": torch.ones(5)}))
    assert metadata_of(gqa_builder(), one_mask_each).tolist() == [-1] * 9


def test_in_place_leaves_the_buffer_as_vllm_does(any_root: pathlib.Path) -> None:
    batches = [make_batch([900] * n) for n in (3, 12, 12, 5, 16, 1)]
    plain, changed = gqa_builder(graphs=True), gqa_builder(graphs=True)
    changed.scheduler_metadata[:] = 7  # nothing is known of a buffer from before attach()
    for batch in batches:
        adapter.attach().detach()
        with_copy = adapter.attach()
        stored = metadata_of(plain, batch)
        with_copy.detach()
        adapter.attach(in_place=True)
        memory = changed.scheduler_metadata.data_ptr()
        made = metadata_of(changed, batch)
        assert made.data_ptr() == memory == changed.scheduler_metadata.data_ptr()
        check(made, stored, batch.size)
        assert not changed.scheduler_metadata[made.numel() :].any()
        adapter.attach(in_place=True).detach()


WINDOW, FULL = (1023, 0), (-1, -1)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(("window", "others"), [(WINDOW, (FULL,)), (FULL, (WINDOW, FULL)), (WINDOW, (FULL, (127, 0)))])
def test_models_that_mix_windows(
    any_root: pathlib.Path, window: tuple[int, int], others: Any, graphs: bool, in_place: bool
) -> None:
    """vLLM turns metadata off for all their builders; each of them serves layers of one window."""
    without = gqa_builder(window=window, others=others, graphs=graphs)  # imports the module
    assert metadata_of(without, DECODE) is None
    attached = adapter.attach(in_place)
    wanted = expected(DECODE, 32 if graphs else 0, window_size=window)
    for builder in (gqa_builder(window=window, others=others, graphs=graphs), without):  # made before, and after
        for _ in range(2):
            made = metadata_of(builder, DECODE)
            check(made, wanted, DECODE.size)
            assert not graphs or made.data_ptr() == builder.scheduler_metadata.data_ptr()
        assert metadata_of(builder, DECODE, fast_build=True) is None
    attached.detach()
    assert metadata_of(builder, DECODE).tolist() == [-1] * 9, "a captured graph may read it: vLLM goes on making it"


def test_a_builder_of_layers_that_differ_is_not_told_a_window(root: pathlib.Path) -> None:
    gqa = import_module(adapter.GQA)
    adapter.attach()
    changes: tuple[tuple[str, Any], ...] = (
        ("sliding_window", (511, 0)), ("num_heads", 16), ("num_kv_heads", 4), ("head_size", 64),
        ("attn_type", "encoder_decoder"), ("vllm_flash_attn_version", 4),
    )  # fmt: skip
    for name, value in changes:  # of one of two layers, then of both
        for both in (False, True):
            builder = gqa_builder(window=WINDOW, others=(WINDOW, FULL))
            builder.layer_names = ["layers.0", "layers.1"]
            layers = builder.vllm_config.compilation_config.static_forward_context
            setattr(layers["layers.1"].impl, name, value)
            if both:
                setattr(layers["layers.0"].impl, name, value)
            assert metadata_of(builder, DECODE) is None, (name, both)
    builder = gqa_builder(window=WINDOW, others=(FULL,))
    layers = builder.vllm_config.compilation_config.static_forward_context
    layers["layers.0"].impl.__class__ = type("FlashAttentionDiffKVImpl", (gqa.FlashAttentionImpl,), {})
    assert metadata_of(builder, DECODE) is None
    for change in ({"dcp_world_size": 2}, {"layer_names": ["layers.9"]}, {"use_full_cuda_graph": True}):
        builder = gqa_builder(window=WINDOW, others=(FULL,))
        vars(builder).update(change)
        assert metadata_of(builder, DECODE) is None, change
    check(metadata_of(gqa_builder(window=WINDOW, others=(FULL,)), DECODE), expected(DECODE, window_size=WINDOW), 5)


def test_a_told_builder_leaves_bidirectional_windows_to_fa3(any_root: pathlib.Path) -> None:
    import_module(adapter.GQA)
    adapter.attach()
    both_ways = SimpleNamespace(**(vars(DECODE) | {"causal": False}))
    builder = gqa_builder(window=WINDOW, others=(FULL,))
    for batch, is_made in ((both_ways, False), (DECODE, True), (both_ways, False), (DECODE, True)):
        assert (metadata_of(builder, batch) is not None) == is_made
    assert metadata_of(gqa_builder(window=FULL, others=(WINDOW,)), both_ways) is not None


@pytest.mark.parametrize("in_place", [False, True])
def test_cascade_keeps_two(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, in_place: bool) -> None:
    with stand_in(tmp_path, monkeypatch, OLDER):
        import_module(adapter.GQA)
        adapter.attach(in_place)
        batch = make_batch([600, 900, 17], prefix=torch.tensor([4096], dtype=torch.int32))
        builder = gqa_builder(graphs=True)
        made = builder.build(4096, batch)
        wanted = expected(
            SimpleNamespace(size=1, starts=batch.starts[::3], max_query_len=3, lengths=batch.prefix, max_seq_len=4096,
                            causal=False), 32,
        )  # fmt: skip
        check(made.prefix, wanted, 1)
        check(made.scheduler_metadata, expected(batch, 32), 3)
        assert made.scheduler_metadata.data_ptr() == builder.scheduler_metadata.data_ptr() != made.prefix.data_ptr()


def test_in_place_zeroes_only_what_is_stale(root: pathlib.Path) -> None:
    import_module(adapter.GQA)
    adapter.attach(in_place=True)
    builder = gqa_builder(graphs=True)
    size = metadata_of(builder, make_batch([900] * 4)).numel()
    builder.scheduler_metadata[-1] = 5  # would be zeroed if the rest were
    metadata_of(builder, make_batch([900] * 4))
    assert builder.scheduler_metadata[-1] == 5
    larger = metadata_of(builder, make_batch([900] * 8)).numel()
    assert larger > size
    builder.update_draft_decode_metadata(builder.build(0, make_batch([900] * 4)))
    assert not builder.scheduler_metadata[size:larger].any()


def test_in_place_notices_what_vllm_stores_itself(root: pathlib.Path) -> None:
    import_module(adapter.GQA)
    adapter.attach(in_place=True)
    builder = gqa_builder(graphs=True)
    size = metadata_of(builder, make_batch([900])).numel()
    assert metadata_of(builder, make_batch([900], causal=torch.ones(1))).tolist() == [-1] * 9
    builder.scheduler_metadata[size:] = 3
    metadata_of(builder, make_batch([900]))
    assert not builder.scheduler_metadata[size:].any()


def test_in_place_without_graphs_makes_new_tensors(root: pathlib.Path) -> None:
    import_module(adapter.GQA)
    adapter.attach(in_place=True)
    call = {"batch_size": 1, "max_seqlen_q": 1, "max_seqlen_k": 9, "num_heads_q": 8, "num_heads_kv": 1, "headdim": 64}
    with_graphs, builder = gqa_builder(graphs=True), gqa_builder(graphs=False)
    builder.scheduler_metadata = torch.zeros(65, dtype=torch.int32)  # whatever it is for, it is not to be written
    made = [metadata_of(with_graphs, DECODE)]
    made.append(adapter.get_scheduler_metadata(**call, cache_seqlens=torch.tensor([9], dtype=torch.int32)))
    made += [metadata_of(builder, DECODE), metadata_of(builder, DECODE)]
    assert len({tensor.data_ptr() for tensor in made}) == 4
    assert not builder.scheduler_metadata.any()
