"""Stand-ins for SGLang's FA3 backend: same attribute names, a page table, and no attention."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from fa3_metadata.engines.sglang import LAYOUTS

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16


class Batch(SimpleNamespace):
    """Of SGLang's ForwardBatch what the stand-ins look at."""

    def __init__(self, lengths: list[int], speculative: bool = False, fails: bool = False) -> None:
        super().__init__(seq_lens=torch.tensor(lengths), speculative=speculative, fails=fails)


def forward_for(calls: list[dict[str, Any]]) -> Any:
    """An FA3 forward that notes what it was called with."""

    def flash_attn_with_kvcache(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_table: torch.Tensor | None = None,
        cache_seqlens: torch.Tensor | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        scheduler_metadata: torch.Tensor | None = None,
        num_splits: int = 0,
        pack_gqa: bool | None = None,
        ver: int = 3,
    ) -> torch.Tensor:
        calls.append(dict(locals()))
        return q

    return flash_attn_with_kvcache


class FlashAttentionMetadata:
    cache_seqlens_int32: Any = None
    cu_seqlens_q: Any = None
    page_table: Any = None
    scheduler_metadata: Any = None
    starts: Any = None  # tokens of each sequence -> cu_seqlens_q


class Sglang:
    """The modules that the adapter imports, for one of its layouts, and what was asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, versions: str) -> None:
        self.names = next(names for names in LAYOUTS if names.versions == versions)
        self.calls: list[dict[str, Any]] = []
        self.native_calls = 0
        self.kept: list[dict[str, Any]] = []
        self.uses_package_kernel = True
        self.module = module = ModuleType(self.names.module)
        module.FlashAttentionMetadata = FlashAttentionMetadata  # type: ignore[attr-defined]
        module.FlashAttentionBackend = self._backend_class()  # type: ignore[attr-defined]
        self.forward = forward_for(self.calls)
        for place in self.names.wrapped:
            if place.startswith("module."):
                setattr(module, place.removeprefix("module."), self.forward)
        environ = ModuleType("sglang.srt.environ")
        flag = SimpleNamespace(get=lambda: self.uses_package_kernel)
        environ.envs = SimpleNamespace(SGLANG_USE_SGL_FA3_KERNEL=flag)  # type: ignore[attr-defined]
        for name, value in ((self.names.module, module), ("sglang.srt.environ", environ)):
            parents = name.split(".")[:-1]
            for depth in range(1, len(parents) + 1):
                monkeypatch.setitem(sys.modules, ".".join(parents[:depth]), ModuleType(parents[depth - 1]))
            monkeypatch.setitem(sys.modules, name, value)

    def _backend_class(self) -> type:
        world = self
        has_maker = bool(self.names.maker_keywords)
        on_backend = "self.flash_attn_with_kvcache" in self.names.wrapped

        class FlashAttentionBackend:
            def __init__(self, version: int = 3) -> None:
                self.fa_impl_ver, self.page_size = version, PAGE
                self.forward_metadata: Any = None
                self.decode_cuda_graph_metadata: dict[Any, Any] = {}
                if has_maker:
                    self._get_scheduler_metadata = world.native_maker
                    self.buffer = torch.full((100,), -1, dtype=torch.int32)
                if on_backend:
                    self.flash_attn_with_kvcache = world.forward

            def prepare(self, batch: Batch, pages: int) -> Any:
                metadata = world.module.FlashAttentionMetadata()
                count = len(batch.seq_lens)
                metadata.cache_seqlens_int32 = batch.seq_lens.to(torch.int32)
                metadata.cu_seqlens_q = torch.arange(count + 1, dtype=torch.int32)
                metadata.starts = {1: metadata.cu_seqlens_q}
                metadata.page_table = torch.zeros(count, pages, dtype=torch.int32)
                return metadata

            def init_forward_metadata(self, batch: Batch) -> None:
                longest = int(batch.seq_lens.max())
                metadata = self.prepare(batch, -(-longest // PAGE))
                if has_maker and not batch.speculative:
                    metadata.scheduler_metadata = self._compute_scheduler_metadata(
                        len(batch.seq_lens), longest, metadata.cache_seqlens_int32, metadata.cu_seqlens_q
                    )
                if batch.fails:
                    raise MemoryError
                self.forward_metadata = metadata

            def _compute_scheduler_metadata(
                self, batch_size: int, max_seq_len_k: int, cache_seqlens: Any, cu_seqlens_q: Any
            ) -> Any:
                return self._get_scheduler_metadata(
                    batch_size=batch_size, max_seqlen_q=1, max_seqlen_k=max_seq_len_k, num_heads=HEADS,
                    num_heads_k=KV_HEADS, headdim=DIM, cache_seqlens=cache_seqlens, qkv_dtype=torch.bfloat16,
                    cu_seqlens_q=cu_seqlens_q, page_size=PAGE, causal=True, has_softcap=False, num_splits=0,
                )  # fmt: skip

            def prepare_graph(self, batch: Batch, capture: bool) -> None:
                """SGLang's side of a captured graph: make, and copy to a buffer that the graph reads."""
                count = len(batch.seq_lens)
                if capture:
                    self.decode_cuda_graph_metadata[count] = self.prepare(batch, pages=64)
                metadata = self.forward_metadata = self.decode_cuda_graph_metadata[count]
                metadata.cache_seqlens_int32.copy_(batch.seq_lens)
                if has_maker and (capture or metadata.scheduler_metadata is not None):
                    made = self._compute_scheduler_metadata(
                        count, int(batch.seq_lens.max()), metadata.cache_seqlens_int32, metadata.cu_seqlens_q
                    )
                    if made is not None:
                        self.buffer[: len(made)] = made
                        metadata.scheduler_metadata = self.buffer[: len(made)]

            def decode_layer(self, headdim_v: int = DIM, window: int = -1) -> None:
                q = torch.zeros(len(self.forward_metadata.cache_seqlens_int32), HEADS, DIM, dtype=torch.bfloat16)
                self.forward_decode(q, None, None, SimpleNamespace(headdim_v=headdim_v, window=window), None)

            def run_layers(self, layers: list[Any]) -> None:
                """A model's, each with a window and the keys that it reads."""
                q = torch.zeros(len(self.forward_metadata.cache_seqlens_int32), HEADS, DIM, dtype=torch.bfloat16)
                for layer in layers:
                    self.forward_decode(q, None, None, layer, None)

            def verify_layer(self, tokens: int) -> None:
                """As speculative decoding checks `tokens` drafts of each sequence: no metadata is passed in."""
                count = len(self.forward_metadata.cache_seqlens_int32)
                q = torch.zeros(count * tokens, HEADS, DIM, dtype=torch.bfloat16)
                self.forward_extend(q, None, None, SimpleNamespace(headdim_v=DIM, window=-1, tokens=tokens), None)

            def forward_decode(self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any) -> None:
                given = self.forward_metadata.scheduler_metadata if layer.window < 0 else None
                self.attend(q, layer, **({"scheduler_metadata": given} if has_maker else {}))

            def forward_extend(self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any) -> None:
                self.attend(q, layer, max_seqlen_q=layer.tokens)

            def attend(self, q: Any, layer: Any, **given: Any) -> None:
                metadata = self.forward_metadata
                if (tokens := given.get("max_seqlen_q", 1)) not in metadata.starts:
                    metadata.starts[tokens] = metadata.cu_seqlens_q * tokens
                version = {"ver": self.fa_impl_ver} if has_maker else {}
                forward = self.flash_attn_with_kvcache if on_backend else world.module.flash_attn_with_kvcache
                keys = getattr(layer, "keys", None)
                call = {
                    "q": q, "k_cache": torch.zeros(4, PAGE, KV_HEADS, DIM).bfloat16() if keys is None else keys,
                    "v_cache": torch.zeros(4, PAGE, KV_HEADS, layer.headdim_v, dtype=torch.bfloat16),
                    "page_table": metadata.page_table, "cache_seqlens": metadata.cache_seqlens_int32,
                    "cu_seqlens_q": metadata.starts[tokens], "max_seqlen_q": 1, "causal": True,
                    "window_size": (layer.window, 0 if layer.window >= 0 else -1), "num_splits": 0,
                }  # fmt: skip
                world.kept.append(call)  # as a model keeps its KV caches
                forward(**call | version | given)

        FlashAttentionBackend.__module__ = self.names.module
        FlashAttentionBackend.__qualname__ = "FlashAttentionBackend"
        return FlashAttentionBackend

    def native_maker(self, **asked: Any) -> torch.Tensor:
        self.native_calls += 1
        return torch.zeros(1 + 4 * 4, dtype=torch.int32)

    def backend(self, version: int = 3) -> Any:
        return self.module.FlashAttentionBackend(version)  # type: ignore[attr-defined]
