"""vLLM's GQA builder in models that mix windows, such as Gemma and gpt-oss: metadata for the layers that it serves.

vLLM turns metadata off for every builder of a model whose layers differ in their windows. But a builder serves one
group of layers, and with vLLM's hybrid KV cache the layers of a group have one window: theirs is what it needs to know.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from .vllm_names import GQA

_IMPL = "FlashAttentionImpl"


def windows_told(build: Callable[..., Any]) -> Callable[..., Any]:
    """`FlashAttentionMetadataBuilder.build`, with metadata turned on again for a builder of layers that are alike."""
    looked_at: WeakSet[Any] = WeakSet()
    told: WeakSet[Any] = WeakSet()

    @functools.wraps(build)
    def build_and_tell(self: Any, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        def built() -> Any:
            return build(self, common_prefix_len, common_attn_metadata, *args, **kwargs)

        if self in told and common_attn_metadata.causal is not True and self.aot_sliding_window[0] >= 0:
            # Not every version widens the window of such a batch both here and in its layers: FA3 makes it there.
            self.aot_schedule = False
            try:
                return built()
            finally:
                self.aot_schedule = True
        metadata = built()
        if self.aot_schedule or self.aot_sliding_window is None or self in looked_at:
            return metadata
        looked_at.add(self)
        if (window := window_of(self)) is None:
            return metadata
        told.add(self)
        self.aot_sliding_window, self.aot_schedule = window, True
        return build_and_tell(self, common_prefix_len, common_attn_metadata, *args, **kwargs)

    return build_and_tell


def window_of(builder: Any) -> tuple[int, int] | None:
    """The window (left, right) of all layers that a builder serves, where its metadata fits all of them; else None.

    They must be plain FlashAttention-3 decoder layers with the builder's heads, in a KV cache of their window, and
    without context parallelism, where the window that vLLM asks for is not always the one that it attends with.
    """
    if builder.dcp_world_size != 1 or (builder.use_full_cuda_graph and not hasattr(builder, "scheduler_metadata")):
        return None
    layers = builder.vllm_config.compilation_config.static_forward_context
    kinds = {_kind(getattr(layers.get(name), "impl", None)) for name in builder.layer_names}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        return None
    window, *rest = kind
    cached = getattr(builder.kv_cache_spec, "sliding_window", None)
    fits = rest == [builder.num_heads_q, builder.num_heads_kv, builder.headdim, "decoder", 3]
    return window if fits and window == ((-1, -1) if cached is None else (cached - 1, 0)) else None


def _kind(impl: Any) -> tuple[Any, ...] | None:
    """What layers of one builder must have in common; None: another implementation, which may attend otherwise."""
    if impl is None or type(impl) is not getattr(sys.modules.get(GQA), _IMPL, None):
        return None
    names = ("num_heads", "num_kv_heads", "head_size", "attn_type", "vllm_flash_attn_version")
    window = getattr(impl, "sliding_window", None)
    return None if window is None else (tuple(window), *(getattr(impl, name, None) for name in names))
