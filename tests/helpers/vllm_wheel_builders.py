"""The builders of a published vLLM, run on CPU: their own source, with stand-ins for what it imports."""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from fa3_metadata.engines import vllm as adapter
from fa3_metadata.engines.vllm_groups import BUILD_ALL, RUNNER
from fa3_metadata.engines.vllm_names import GQA, GQA_BUILDER, MLA, MLA_BUILDER, NAME

from .stand_ins import Anything, Given, run_source
from .vllm_stand_in import check, expected

_CLASSES = ("FlashAttentionMetadata", "FlashAttentionImpl", "FlashAttentionBackend", GQA_BUILDER)
WINDOW, FULL = (127, 0), (-1, -1)
SHAPE = {"num_heads": 8, "num_heads_k": 1, "headdim": 128, "page_size": 16}


class _Base:
    def __class_getitem__(cls, _: Any) -> Any:
        return cls


def load(source: str) -> types.ModuleType:
    """The module, under its own name in `sys.modules`: its functions and the classes that a builder needs."""
    tree = ast.parse(source)
    tree.body = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.ClassDef) and node.name in _CLASSES)
    ]
    module = types.ModuleType(GQA)
    vars(module).update(
        torch=torch, copy=copy, functools=functools, dataclass=dataclasses.dataclass, ClassVar=typing.ClassVar,
        AttentionBackend=_Base, AttentionImpl=_Base, AttentionMetadataBuilder=_Base, Attention=None,
        vllm_is_batch_invariant=lambda: False,
        envs=SimpleNamespace(VLLM_BATCH_INVARIANT=False),
        AttentionType=SimpleNamespace(DECODER="decoder", ENCODER="", ENCODER_ONLY="", ENCODER_DECODER=""),
        AttentionCGSupport=SimpleNamespace(ALWAYS=1, UNIFORM_BATCH=2), get_flash_attn_version=lambda *_, **__: 3,
        current_platform=SimpleNamespace(is_xpu=lambda: False), is_quantized_kv_cache=lambda _: False,
        get_layers_from_vllm_config=lambda config, _: config.compilation_config.static_forward_context,
        get_scheduler_metadata=adapter.get_scheduler_metadata,
    )  # fmt: skip
    sys.modules[GQA] = module
    exec(compile("from __future__ import annotations\n" + ast.unparse(tree), GQA, "exec"), vars(module))
    return module


def builder(module: types.ModuleType, windows: tuple[tuple[int, int], ...], graphs: bool) -> Any:
    """A builder of the first of these layers, whatever its constructor asks for."""
    layers = {}
    for i, window in enumerate(windows):
        impl = object.__new__(module.FlashAttentionImpl)
        impl.get_impl_variants = lambda impl=impl: (impl,)
        impl.num_heads, impl.num_kv_heads, impl.head_size, impl.sliding_window = 8, 1, 128, window
        impl.attn_type, impl.vllm_flash_attn_version = "decoder", 3
        layers[f"layers.{i}"] = SimpleNamespace(impl=impl)
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    cached = None if windows[0] == FULL else windows[0][0] + 1
    made = object.__new__(getattr(module, GQA_BUILDER))
    vars(made).update(
        vllm_config=config, layer_names=["layers.0"], kv_cache_spec=SimpleNamespace(sliding_window=cached),
        num_heads_q=8, num_heads_kv=1, headdim=128, block_size=16, kv_cache_dtype=torch.bfloat16, device="cpu",
        cache_config=SimpleNamespace(cache_dtype="auto"), dcp_world_size=1, aot_schedule=True, aot_sliding_window=None,
        use_full_cuda_graph=graphs, max_cudagraph_size=16, max_num_splits=32 if graphs else 0, rswa_window=None,
        mm_prefix_query_ranges_np=None,
    )  # fmt: skip
    if graphs:
        made.scheduler_metadata = torch.zeros(65, dtype=torch.int32)
    return made


def batch(lengths: list[int]) -> SimpleNamespace:
    n = len(lengths)
    starts = torch.arange(n + 1, dtype=torch.int32)
    names = {"mm_req_doc_ranges": None, "rswa_prefix_lens": None, "seq_lens_cpu_upper_bound": None}
    return SimpleNamespace(
        num_reqs=n, num_actual_tokens=n, max_query_len=1, max_seq_len=max(lengths), query_start_loc=starts,
        query_start_loc_cpu=starts, seq_lens=torch.tensor(lengths, dtype=torch.int32), causal=True,
        block_table_tensor=None, slot_mapping=None, **names,
    )  # fmt: skip


def check_builders(module: types.ModuleType, has_cascade: bool) -> None:
    """With the adapter attached to `module`: what its builders make, in models that mix windows and that do not."""
    for windows in ((WINDOW, FULL), (FULL, WINDOW), (FULL, FULL)):
        for graphs in (False, True):
            made = builder(module, windows, graphs)
            for lengths in ([5, 900, 70], [3], [400] * 7):
                asked = batch(lengths)
                metadata = made.build(0, asked).scheduler_metadata
                as_ours = SimpleNamespace(
                    size=asked.num_reqs, starts=asked.query_start_loc, max_query_len=1, lengths=asked.seq_lens,
                    max_seq_len=asked.max_seq_len, causal=True,
                )  # fmt: skip
                check(metadata, expected(as_ours, made.max_num_splits, window_size=windows[0], **SHAPE), len(lengths))
                if graphs:
                    assert metadata.data_ptr() == made.scheduler_metadata.data_ptr()
                    assert not made.scheduler_metadata[len(metadata) :].any()
                assert made.build(0, asked, fast_build=True).scheduler_metadata is None
            if has_cascade:
                both = made.build(512, batch([600, 900]))
                assert both.prefix_scheduler_metadata is not None
                assert both.prefix_scheduler_metadata.data_ptr() != both.scheduler_metadata.data_ptr()


def check_groups(runner: str, module: types.ModuleType, built_together: Callable[..., Any]) -> None:
    """What the `build_attn_metadata` in the source `runner` makes for groups of layers with builders of `module`."""
    names = run_source(
        runner, RUNNER, lambda node: isinstance(node, ast.FunctionDef) and node.name == BUILD_ALL, MambaSpec=_Base,
        CommonAttentionMetadata=lambda **given: SimpleNamespace(**(vars(batch([1])) | given)),
    )  # fmt: skip
    build_all = built_together(names[BUILD_ALL])
    kinds = (WINDOW, FULL, WINDOW, FULL, WINDOW)
    for graphs in (False, True):
        builders = [builder(module, (one, FULL if one == WINDOW else WINDOW), graphs) for one in kinds]
        groups = [
            SimpleNamespace(
                layer_names=[f"layers.{i}"], kv_cache_spec=None, get_metadata_builder=lambda *_, one=one: one,
                build_metadata=lambda common, *_, one=one, **more: one.build(0, common, **more),
            )
            for i, one in enumerate(builders)
        ]  # fmt: skip
        seq_lens, n = torch.zeros(16, dtype=torch.int32), 3
        starts = torch.arange(n + 1, dtype=torch.int32)
        for lengths in ([5, 900, 70], [6, 901, 71]):  # in a buffer, as a runner keeps them
            seq_lens[:n] = torch.tensor(lengths, dtype=torch.int32)
            with counted(adapter.api, NAME) as calls:
                made = build_all(
                    attn_groups=[[group] for group in groups], num_reqs=n, num_tokens=n, query_start_loc_gpu=starts,
                    query_start_loc_cpu=starts, max_query_len=1, seq_lens=seq_lens, max_seq_len=max(lengths),
                    block_tables=[None] * len(groups), slot_mappings=[None] * len(groups),
                    kv_cache_config=SimpleNamespace(kv_cache_groups=groups),
                )  # fmt: skip
            assert len(calls) == 2, "groups of a kind share"
            as_ours = SimpleNamespace(
                size=n, starts=starts, max_query_len=1, lengths=seq_lens[:n], max_seq_len=max(lengths), causal=True
            )
            for i, (window, one) in enumerate(zip(kinds, builders, strict=True)):
                metadata = made[f"layers.{i}"].scheduler_metadata
                check(metadata, expected(as_ours, one.max_num_splits, window_size=window, **SHAPE), n)
                assert not graphs or metadata.data_ptr() == one.scheduler_metadata.data_ptr()


def load_mla(source: str) -> types.ModuleType:
    """The module of the MLA backend, under its own name in `sys.modules`: its builder alone."""

    @dataclasses.dataclass
    class Common:
        block_table: Any
        seq_lens: Any
        dcp_tot_seq_lens: Any

    bases = ("MLACommonBackend", "MLACommonImpl", "MLACommonMetadata", "MLACommonMetadataBuilder")
    looked_up = ("AttentionCGSupport", "DeviceCapability", "MultipleOf", "QueryLenSupport")
    module = sys.modules[MLA] = types.ModuleType(MLA)
    names = run_source(
        source, MLA, lambda node: isinstance(node, ast.ClassDef) and not node.name.startswith("XPU"),
        MLACommonDecodeMetadata=Common, get_scheduler_metadata=adapter.get_scheduler_metadata,
        **{name: Anything() for name in (*bases, *looked_up)},
    )  # fmt: skip
    setattr(module, MLA_BUILDER, names[MLA_BUILDER])
    return module


def check_mla_builders(module: types.ModuleType) -> None:
    """With the adapter attached to `module`: what its builder makes."""
    kind = getattr(module, MLA_BUILDER)
    kind.__getattr__ = Given.__getattr__
    shape = {"num_heads": 16, "num_heads_k": 1, "headdim": 64, "headdim_v": 512, "page_size": 64}
    for graphs in (False, True):
        made = object.__new__(kind)
        vars(made).update(
            fa_aot_schedule=True, use_full_cuda_graph=graphs, max_cudagraph_size=16, max_num_splits=32 if graphs else 0,
            num_heads=16, dcp_world_size=1, mla_dims=SimpleNamespace(qk_rope_head_dim=64, kv_lora_rank=512),
            kv_cache_spec=SimpleNamespace(dtype=torch.bfloat16), page_size=64,
            scheduler_metadata=torch.full((65,), 7, dtype=torch.int32),
        )  # fmt: skip
        for lengths in ([5, 900, 70], [3], [400] * 7):
            asked = batch(lengths)
            given = {
                "block_table_tensor": None, "seq_lens_device": asked.seq_lens, "seq_lens_cpu": asked.seq_lens,
                "max_seq_len": asked.max_seq_len, "query_start_loc_cpu": asked.query_start_loc,
                "query_start_loc_device": asked.query_start_loc, "num_decode_tokens": asked.num_reqs,
                "max_query_len": 1, "dcp_tot_seq_lens_device": None,
            }  # fmt: skip
            names = list(inspect.signature(kind._build_decode).parameters)[1:]  # which differ by version
            metadata = made._build_decode(**{name: given[name] for name in names}).scheduler_metadata
            as_ours = SimpleNamespace(
                size=asked.num_reqs, starts=asked.query_start_loc, max_query_len=1, lengths=asked.seq_lens,
                max_seq_len=asked.max_seq_len, causal=True,
            )  # fmt: skip
            check(metadata, expected(as_ours, made.max_num_splits, **shape), asked.num_reqs)
            if graphs:
                assert metadata.data_ptr() == made.scheduler_metadata.data_ptr()
                assert not made.scheduler_metadata[len(metadata) :].any()


@contextmanager
def counted(module: Any, name: str) -> Iterator[list[None]]:
    """The calls of a module's function meanwhile."""
    own, calls = getattr(module, name), list[None]()
    setattr(module, name, lambda *args, **kwargs: calls.append(None) or own(*args, **kwargs))
    try:
        yield calls
    finally:
        setattr(module, name, own)
