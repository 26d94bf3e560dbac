"""The attention layers of a published vLLM, run on CPU: their own source, with stand-ins for what it imports."""

from __future__ import annotations

import ast
import builtins
import copy
import dataclasses
import functools
import sys
import types
import typing
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fa3_metadata.engines.vllm_names import FORWARD, GQA

from .stand_ins import Anything, Given, Names

HEADS, DIM, PAGE = (8, 1), 128, 16
# What class bodies look up.
_CLASSES = (
    "AttentionBackend", "AttentionCGSupport", "AttentionImpl", "AttentionMetadataBuilder", "AttentionType",
    "CacheDType", "FA4DenseWarmup", "KernelBlockSize", "MultipleOf", "VllmJitKernel", "envs",
)  # fmt: skip


class WheelLayers:
    """Layers with these windows. `calls` are those of the forward, by name."""

    def __init__(self, source: str, windows: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch) -> None:
        tree = ast.parse(source)
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) or _is_kernel(node)]
        self.calls: list[dict[str, Any]] = []
        self.names = Names(
            torch=torch, dataclass=dataclasses.dataclass, copy=copy, functools=functools, ClassVar=typing.ClassVar,
            get_flash_attn_version=lambda *_, **__: 3, current_platform=Given(is_xpu=lambda: False),
            __name__=GQA, __builtins__=builtins, **{name: Anything() for name in _CLASSES},
        )  # fmt: skip
        monkeypatch.setitem(sys.modules, GQA, types.ModuleType(GQA))  # where dataclasses look for it
        exec(compile("from __future__ import annotations\n" + ast.unparse(tree), GQA, "exec"), self.names)
        self.names["AttentionType"] = SimpleNamespace(
            DECODER="decoder", ENCODER="encoder", ENCODER_ONLY="encoder_only", ENCODER_DECODER="encoder_decoder"
        )
        self.names["canonicalize_singleton_dim_strides"] = lambda tensor: tensor
        self.names["is_quantized_kv_cache"] = lambda *_: False
        self.names[FORWARD] = _forward_for(self.calls)
        impl = self.names["FlashAttentionImpl"]
        impl.__getattr__ = Given.__getattr__
        page = (HEADS[1], PAGE, 2 * DIM)  # keys and values of a head side by side, or apart, within a page or without
        if "kv_cache.transpose(1, 2).split" not in source:
            page = (2, PAGE, HEADS[1], DIM)
        self._cache = (256, *page) if "kv_cache.unbind(0)" not in source else (2, 256, *page[1:])
        self.layers = [object.__new__(impl) for _ in windows]
        for layer, window in zip(self.layers, windows, strict=True):
            vars(layer).update(
                attn_type="decoder", vllm_flash_attn_version=3, head_size=DIM, num_heads=HEADS[0],
                num_kv_heads=HEADS[1], kv_cache_dtype="auto", dcp_world_size=1, sliding_window=window, scale=1.0,
                alibi_slopes=None, logits_soft_cap=0.0, sinks=None,
            )  # fmt: skip

    def batch(self, lengths: list[int]) -> Any:
        """What vLLM's builder gives the layers of a group that it makes no metadata for."""
        size = len(lengths)
        return SimpleNamespace(
            num_actual_tokens=size, query_start_loc=torch.arange(size + 1, dtype=torch.int32), max_query_len=1,
            seq_lens=torch.tensor(lengths, dtype=torch.int32), max_seq_len=max(lengths), causal=True, use_cascade=False,
            block_table=torch.zeros(size, 256, dtype=torch.int32), scheduler_metadata=None, max_num_splits=0,
            mm_prefix_query_range_tensor=None, mm_prefix_range_tensor=None, sliding_window=None, rswa_prefix_lens=None,
        )  # fmt: skip

    def run(self, batch: Any) -> list[dict[str, Any]]:
        self.calls.clear()
        cache = torch.zeros(self._cache, dtype=torch.bfloat16)
        q, k = (torch.zeros(batch.num_actual_tokens, heads, DIM, dtype=torch.bfloat16) for heads in HEADS)
        scales = Given(_q_scale=torch.ones(1), _k_scale=torch.ones(1), _v_scale=torch.ones(1))
        for layer in self.layers:
            layer.forward(scales, q, k, k, cache, batch, torch.zeros_like(q))
        return list(self.calls)


def _is_kernel(node: ast.stmt) -> bool:
    """One of the objects through which newer versions call the forward."""
    return (
        isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and "Kernel" in ast.unparse(node.value.func)
    )


def _forward_for(calls: list[dict[str, Any]]) -> Any:
    def flash_attn_varlen_func(
        q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None, q_v=None, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=None, softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None, return_softmax_lse=False, out=None, scheduler_metadata=None,
        q_descale=None, k_descale=None, v_descale=None, num_splits=0, fa_version=2, s_aux=None, cp_world_size=1,
        cp_rank=0, cp_tot_seqused_k=None, dynamic_causal=None, mask_mod=None, aux_tensors=None,
    ):  # fmt: skip
        calls.append(dict(locals()))
        return out

    return flash_attn_varlen_func
