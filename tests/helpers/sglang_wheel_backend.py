"""The FlashAttention backend of a published SGLang, run on CPU: its own source, with stand-ins for what it imports."""

from __future__ import annotations

import sys
import types
import zipfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from .stand_ins import Anything, Given, Names, recorded_forward, run_source

_PATH = "sglang/srt/layers/attention/flashattention_backend.py"
_MODULE = _PATH.removesuffix(".py").replace("/", ".")
_ENVIRON = "sglang.srt.environ"
_PACKAGES = tuple(_MODULE.rsplit(".", i)[0] for i in range(1, 5))
BUILD = "sglang-kernel-0.4.2"  # of the forward
HEADS, KV_HEADS, DIM, TOKENS = 8, 1, 128, 4096


class _Module(types.ModuleType):
    """Whose names are those that its functions look up."""

    def __init__(self, names: Names) -> None:
        super().__init__(_MODULE)
        object.__setattr__(self, "_names", names)

    def __getattr__(self, name: str) -> Any:
        if name in (names := object.__getattribute__(self, "_names")):
            return names[name]
        raise AttributeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._names[name] = value


def _mode(*names: str) -> Given:
    """A ForwardMode of which these questions are answered by yes."""
    return Given(**dict.fromkeys(names, lambda *_, **__: True))


_EXTENDS = ("is_extend", "is_extend_or_draft_extend_or_mixed")
_DECODE = _mode("is_decode_or_idle", "is_decode")
MODES = {
    "decode": _DECODE, "verification": _mode("is_target_verify", *_EXTENDS),
    "prefill": _mode("is_extend_without_speculative", *_EXTENDS),
}  # fmt: skip


def _set_decode_metadata(cache_seqlens: torch.Tensor, *given: Any, **_: Any) -> None:
    """Of SGLang's `normal_decode_set_metadata`, whose arguments differ by version: what it does with the lengths."""
    for one, more in pairwise(given[4:]):  # behind req_pool_indices, which looks like them
        if isinstance(one, torch.Tensor) and one.shape == cache_seqlens.shape:
            cache_seqlens.copy_(one + more)
            return
    raise AssertionError("no lengths given")


class WheelBackend:
    """A backend, in a module of its own name, and the buffers of the runner that replays its graphs.

    `calls` are those of the forward, by name.
    """

    def __init__(self, wheel: Path, monkeypatch: pytest.MonkeyPatch, use_mla: bool = False) -> None:
        with zipfile.ZipFile(wheel) as archive:
            source = archive.read(_PATH).decode()
        environ = types.ModuleType(_ENVIRON)
        environ.envs = Given(SGLANG_USE_SGL_FA3_KERNEL=Given(get=lambda: True))  # type: ignore[attr-defined]
        for name in _PACKAGES:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, _ENVIRON, environ)
        monkeypatch.setitem(sys.modules, _MODULE, types.ModuleType(_MODULE))  # where dataclasses look for it
        names = run_source(source, _MODULE)
        monkeypatch.setitem(sys.modules, _MODULE, _Module(names))
        self.calls: list[dict[str, Any]] = []
        forward = recorded_forward(BUILD, self.calls)
        names["normal_decode_set_metadata"] = _set_decode_metadata
        names["paged_view"] = lambda cache, page_size: cache.unflatten(0, (-1, page_size))
        names["flash_attn_with_kvcache"] = forward
        if "flash_attn_with_kvcache_fa3" in source:
            names["flash_attn_with_kvcache_fa3"] = forward
        kind = names["FlashAttentionBackend"]
        kind.__getattr__ = _of_backend
        self.backend = object.__new__(kind)
        self.pages = torch.arange(16 * TOKENS, dtype=torch.int32).view(16, TOKENS)
        caches = (torch.zeros(TOKENS, 1, KV_HEADS, DIM, dtype=torch.bfloat16),) * 2
        vars(self.backend).update(
            decode_cuda_graph_metadata={}, target_verify_metadata={}, draft_extend_metadata={}, forward_metadata=None,
            max_context_len=TOKENS, device="cpu", req_to_token=self.pages, page_size=1, topk=0,
            speculative_num_steps=0, speculative_num_draft_tokens=0, skip_prefill=False, attn_cp_size=1,
            max_num_pages=TOKENS, attention_chunk_size=None, fa_impl_ver=3, num_splits=0, decode_num_splits=0,
            head_dim=DIM, num_attention_heads=HEADS, num_kv_heads=KV_HEADS, has_softcap=False,
            kv_cache_dtype=torch.bfloat16, kv_cache_dtype_str="auto", use_mla=use_mla,
            req_to_token_pool=Given(req_to_token=self.pages), token_to_kv_pool=_pool(),
            prepare_paged_mha_query=lambda q, q_rope, k_rope, *_, **__: (q, q_rope, k_rope, None, None),  # not read
            get_paged_mha_kv_cache=lambda *_, **__: caches,
        )  # fmt: skip
        if "self.flash_attn_with_kvcache = " in source:
            self.backend.flash_attn_with_kvcache = forward
        if "self._get_scheduler_metadata = " in source:
            self.backend._get_scheduler_metadata = _sglangs_own
        self.seq_lens, self.rows = torch.ones(16, dtype=torch.int32), torch.arange(16)

    def prepare_capture(self, size: int) -> None:
        if hasattr(type(self.backend), "init_forward_metadata_capture_cuda_graph"):
            self.backend.init_forward_metadata_capture_cuda_graph(
                size, size, self.rows[:size], self.seq_lens[:size], None, _DECODE, None
            )
        else:
            self.backend.init_forward_metadata_out_graph(self._batch(size), in_capture=True)

    def prepare(self, lengths: list[int]) -> None:
        """The replay of a batch, which the runner writes to its buffers first."""
        size = self._write(lengths)
        if hasattr(type(self.backend), "init_forward_metadata_replay_cuda_graph"):
            self.backend.init_forward_metadata_replay_cuda_graph(
                size, self.rows[:size], self.seq_lens[:size], sum(lengths), None, _DECODE, None,
                seq_lens_cpu=self.seq_lens[:size].clone(),
            )  # fmt: skip
        else:
            self.backend.init_forward_metadata_out_graph(self._batch(size))

    def run(
        self, lengths: list[int], windows: Sequence[int], mode: str = "decode", tokens: int = 1
    ) -> list[dict[str, Any]]:  # fmt: skip
        """A batch of so many tokens a sequence, eagerly: the calls of its layers, each with a window, or -1.

        `lengths` are those of the sequences before, in a verification, and after, in a prefill.
        """
        size, backend, mla = self._write(lengths), self.backend, self.backend.use_mla
        batch = self._batch(size)
        batch.forward_mode = MODES[mode]
        if mode == "verification":
            backend.speculative_num_draft_tokens = tokens
            batch.spec_info = Given(draft_token_num=tokens, topk=1, ragged_verify_layout=None)
        batch.extend_seq_lens = torch.full((size,), tokens, dtype=torch.int32)
        batch.extend_seq_lens_cpu, batch.extend_prefix_lens = [tokens] * size, batch.seq_lens - tokens
        batch.extend_prefix_lens_cpu = batch.extend_prefix_lens.tolist()
        backend.init_forward_metadata(batch)
        self.calls.clear()
        q = torch.zeros(size * tokens, HEADS * (512 if mla else DIM), dtype=torch.bfloat16)
        k = torch.zeros(size * tokens, KV_HEADS * DIM, dtype=torch.bfloat16)
        ropes = {"q_rope": torch.zeros(size * tokens, HEADS * 64, dtype=torch.bfloat16), "k_rope": k} if mla else {}
        for i, window in enumerate(windows):
            layer = Given(
                layer_id=i, tp_q_head_num=HEADS, tp_k_head_num=KV_HEADS, tp_v_head_num=KV_HEADS, scaling=1.0,
                head_dim=576 if mla else DIM, qk_head_dim=DIM, v_head_dim=512 if mla else DIM, logit_cap=0.0,
                sliding_window_size=window, k_scale=None, v_scale=None,
            )  # fmt: skip
            attend = backend.forward_decode if mode == "decode" else backend.forward_extend
            attend(q, k, k, layer, batch, **ropes)
        return list(self.calls)

    def _write(self, lengths: list[int]) -> int:
        self.seq_lens[: len(lengths)] = torch.tensor(lengths, dtype=torch.int32)
        return len(lengths)

    def _batch(self, size: int) -> Any:
        lengths = self.seq_lens[:size]
        return Given(
            batch_size=size, req_pool_indices=self.rows[:size], seq_lens=lengths, seq_lens_sum=int(lengths.sum()),
            seq_lens_cpu=lengths.clone(), positions=self.rows[:size], forward_mode=_DECODE, spec_info=None,
            encoder_lens=None, out_cache_loc=self.rows[:size], token_to_kv_pool=_pool(), _attn_output=None,
            attn_attend_prefix_cache=None, req_to_token_pool=Given(req_to_token=self.pages),
        )  # fmt: skip


def _of_backend(backend: Any, name: str) -> Any:
    if name in ("flash_attn_with_kvcache", "_get_scheduler_metadata") or name.startswith(("__", "_fa3")):
        raise AttributeError(name)
    return Anything()


def _pool() -> Any:
    cache = torch.zeros(TOKENS, KV_HEADS, DIM, dtype=torch.bfloat16)
    latent = torch.zeros(TOKENS, 1, 576, dtype=torch.bfloat16)
    return Given(get_kv_buffer=lambda _: (cache, cache), get_key_buffer=lambda _: latent)


def _sglangs_own(**_: Any) -> torch.Tensor:
    """What SGLang makes."""
    return torch.full((9,), -1, dtype=torch.int32)
