"""The attention layers of a published vLLM, run on CPU: their own source, with stand-ins for what it imports."""

from __future__ import annotations

import ast
import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fa3_metadata.engines.vllm_names import FORWARD, GQA

from .stand_ins import Anything, Given, recorded_forward, run_source

HEADS, DIM, PAGE = (8, 1), 128, 16
# What class bodies look up.
_CLASSES = (
    "AttentionBackend", "AttentionCGSupport", "AttentionImpl", "AttentionMetadataBuilder", "AttentionType",
    "CacheDType", "FA4DenseWarmup", "KernelBlockSize", "MultipleOf", "VllmJitKernel", "envs",
)  # fmt: skip


class WheelLayers:
    """Layers with these windows. `calls` are those of the forward, by name."""

    def __init__(
        self, source: str, build: str, windows: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:  # fmt: skip
        self.calls: list[dict[str, Any]] = []
        monkeypatch.setitem(sys.modules, GQA, types.ModuleType(GQA))
        self.names = run_source(
            source, GQA, lambda node: isinstance(node, ast.FunctionDef | ast.ClassDef) or _is_kernel(node),
            get_flash_attn_version=lambda *_, **__: 3, current_platform=Given(is_xpu=lambda: False),
            **{name: Anything() for name in _CLASSES},
        )  # fmt: skip
        self.names["AttentionType"] = SimpleNamespace(
            DECODER="decoder", ENCODER="encoder", ENCODER_ONLY="encoder_only", ENCODER_DECODER="encoder_decoder"
        )
        self.names["canonicalize_singleton_dim_strides"] = lambda tensor: tensor
        self.names["is_quantized_kv_cache"] = lambda *_: False
        self.names[FORWARD] = recorded_forward(build, self.calls)
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
