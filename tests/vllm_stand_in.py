"""A small stand-in for vLLM: real modules with vLLM's names, imports and calls, that run on CPU."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata.engines import vllm as adapter
from fa3_metadata.installed import BUILD_VARIABLE

BUILD = "vllm-0.33.0"
# Of each file, what the adapter has to do with. Where vLLM computes its own metadata, the stand-in answers -1.
FILES = {
    "vllm_flash_attn/flash_attn_interface.py": """
import torch

def get_scheduler_metadata(
    batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens,
    qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None,
    page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1), has_softcap=False, num_splits=0,
    pack_gqa=None, sm_margin=0,
):
    return torch.full((9,), -1, dtype=torch.int32)
""",
    "vllm_flash_attn/__init__.py": """
from vllm.vllm_flash_attn.flash_attn_interface import get_scheduler_metadata
""",
    "v1/attention/backends/fa_utils.py": """
from vllm.platforms import is_cuda

if is_cuda:
    from vllm.vllm_flash_attn import get_scheduler_metadata
else:
    def get_scheduler_metadata(*args, **kwargs):
        return None
""",
    "v1/attention/backends/flash_attn.py": """
import torch
from vllm.v1.attention.backends.fa_utils import get_scheduler_metadata

def round_up(n, multiple):
    return -(-n // multiple) * multiple

class FlashAttentionMetadataBuilder:
    def __init__(self, *, heads, headdim, dcp, compilation_config, max_batch_size, splits, fa_version, window):
        self.num_heads_q, self.num_heads_kv, self.headdim, self.dcp_world_size = *heads, headdim, dcp
        self.aot_schedule, self.aot_sliding_window, self.device = fa_version == 3, window, "cpu"
        self.compilation_config = compilation_config
        self.use_full_cuda_graph = self.compilation_config.cudagraph_mode.has_full_cudagraphs()
        self.max_num_splits = 0
        if self.use_full_cuda_graph and self.aot_schedule:
            self.scheduler_metadata = torch.zeros(
                1 + round_up(max_batch_size, 4) * 4, dtype=torch.int32, device=self.device
            )
            self.max_num_splits = splits

    def _get_scheduler_metadata(
        self, *, aot_schedule, batch_size, cu_query_lens, max_query_len, seqlens, max_seq_len, causal, max_num_splits
    ):
        if aot_schedule:
            return get_scheduler_metadata(
                batch_size=batch_size, max_seqlen_q=max_query_len, max_seqlen_k=max_seq_len,
                num_heads_q=self.num_heads_q * self.dcp_world_size, num_heads_kv=self.num_heads_kv,
                headdim=self.headdim, cache_seqlens=seqlens, qkv_dtype=torch.bfloat16, cu_seqlens_q=cu_query_lens,
                page_size=16, causal=causal, window_size=self.aot_sliding_window, num_splits=max_num_splits,
            )

    def _store_scheduler_metadata(self, scheduler_metadata):
        if self.use_full_cuda_graph and scheduler_metadata is not None:
            n = scheduler_metadata.shape[0]
            self.scheduler_metadata[:n] = scheduler_metadata
            self.scheduler_metadata[n:] = 0
            return self.scheduler_metadata[:n]
        return scheduler_metadata

    def build(self, batch):
        if self.dcp_world_size > 1:
            made = self._get_scheduler_metadata(
                aot_schedule=self.aot_schedule, batch_size=batch.size, cu_query_lens=batch.starts,
                max_query_len=batch.max_query_len, seqlens=batch.lengths, max_seq_len=batch.max_seq_len,
                causal=False, max_num_splits=self.max_num_splits,
            )
        else:
            made = self._get_scheduler_metadata(
                aot_schedule=self.aot_schedule, batch_size=batch.size, cu_query_lens=batch.starts,
                max_query_len=batch.max_query_len, seqlens=batch.lengths, max_seq_len=batch.max_seq_len,
                causal=batch.causal, max_num_splits=self.max_num_splits,
            )
        return self._store_scheduler_metadata(made)

    def update_draft_decode_metadata(self, batch):
        made = self._get_scheduler_metadata(
            aot_schedule=True, batch_size=batch.size, cu_query_lens=batch.starts, max_query_len=batch.max_query_len,
            seqlens=batch.lengths, max_seq_len=batch.max_seq_len, causal=True, max_num_splits=self.max_num_splits,
        )
        return self._store_scheduler_metadata(made)
""",
    "v1/attention/backends/mla/flashattn_mla.py": """
import torch
from vllm.v1.attention.backends.fa_utils import get_scheduler_metadata
from vllm.v1.attention.backends.flash_attn import round_up

class FlashAttnMLAMetadataBuilder:
    def __init__(self, *, num_heads, compilation_config, max_batch_size, splits):
        self.num_heads, self.device, self.compilation_config = num_heads, "cpu", compilation_config
        self.use_full_cuda_graph = self.compilation_config.cudagraph_mode.has_full_cudagraphs()
        self.max_num_splits = 0
        if self.use_full_cuda_graph:
            self.scheduler_metadata = torch.zeros(
                1 + round_up(max_batch_size, 4) * 4, dtype=torch.int32, device=self.device
            )
            self.max_num_splits = splits

    def _schedule_decode(self, num_reqs, cu_query_lens, max_query_len, seqlens, max_seq_len, causal, max_num_splits):
        return get_scheduler_metadata(
            batch_size=num_reqs, max_seqlen_q=max_query_len, max_seqlen_k=max_seq_len, num_heads_q=self.num_heads,
            num_heads_kv=1, headdim=64, cache_seqlens=seqlens, qkv_dtype=torch.bfloat16, headdim_v=512, page_size=64,
            cu_seqlens_q=cu_query_lens, causal=causal, num_splits=max_num_splits,
        )

    def _build_decode(self, batch):
        scheduler_metadata = self._schedule_decode(
            num_reqs=batch.size, cu_query_lens=batch.starts, max_query_len=batch.max_query_len,
            seqlens=batch.lengths, max_seq_len=batch.max_seq_len, causal=True, max_num_splits=self.max_num_splits,
        )
        if self.use_full_cuda_graph:
            n = scheduler_metadata.shape[0]
            self.scheduler_metadata[:n] = scheduler_metadata
            self.scheduler_metadata[n:] = 0
            scheduler_metadata = self.scheduler_metadata[:n]
        return scheduler_metadata
""",
    "platforms.py": "is_cuda = True\n",
    **dict.fromkeys(
        ("__init__.py", "v1/__init__.py", "v1/attention/__init__.py", "v1/attention/backends/__init__.py",
         "v1/attention/backends/mla/__init__.py"), ""),
}  # fmt: skip


@contextmanager
def stand_in(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """The stand-in, written to `folder` and on the path. A real vLLM that was imported is put back at the end."""
    for path, source in FILES.items():
        file = folder / "vllm" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    monkeypatch.setenv(BUILD_VARIABLE, BUILD)
    monkeypatch.syspath_prepend(folder)
    real = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "vllm"}
    yield folder / "vllm"
    if adapter._attached is not None:
        adapter._attached.detach()
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]
    sys.modules.update(real)


def make_batch(lengths: list[int], query_lens: list[int] | None = None, **more: Any) -> SimpleNamespace:
    query_lens = query_lens or [1] * len(lengths)
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    facts = {"size": len(lengths), "starts": starts, "max_query_len": max(query_lens), "causal": True}
    facts |= {"lengths": torch.tensor(lengths, dtype=torch.int32), "max_seq_len": max(lengths)}
    return SimpleNamespace(**(facts | more))


def gqa_builder(
    heads: tuple[int, int] = (32, 8), headdim: int = 128, window: tuple[int, int] = (-1, -1), dcp: int = 1,
    graphs: bool = False, splits: int = 32, fa_version: int = 3, max_batch_size: int = 16,
) -> Any:  # fmt: skip
    config = SimpleNamespace(cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: graphs))
    return import_module(adapter.GQA).FlashAttentionMetadataBuilder(
        heads=heads, headdim=headdim, dcp=dcp, compilation_config=config, max_batch_size=max_batch_size,
        splits=splits, fa_version=fa_version, window=window,
    )  # fmt: skip


def mla_builder(graphs: bool = False, num_heads: int = 16) -> Any:
    config = SimpleNamespace(cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: graphs))
    return import_module(adapter.MLA).FlashAttnMLAMetadataBuilder(
        num_heads=num_heads, compilation_config=config, max_batch_size=16, splits=32
    )


def expected(batch: SimpleNamespace, num_splits: int = 0, **more: Any) -> torch.Tensor:
    """Ours, asked for directly."""
    call = {
        "batch_size": batch.size, "max_seqlen_q": batch.max_query_len, "max_seqlen_k": batch.max_seq_len,
        "num_heads": 32, "num_heads_k": 8, "headdim": 128, "cache_seqlens": batch.lengths,
        "cu_seqlens_q": batch.starts, "page_size": 16, "causal": batch.causal, "num_splits": num_splits,
    }  # fmt: skip
    return fa3_metadata.get_scheduler_metadata(**(call | more), build=BUILD)


def check(made: torch.Tensor, wanted: torch.Tensor, batch_size: int) -> None:
    """Equal but for the padding of rows, which is unspecified."""
    assert made.shape == wanted.shape
    stride = -(-batch_size // 4) * 4
    valid = [i for i in range(made.numel()) if i == made.numel() - 1 or i % stride < batch_size]
    assert made[valid].tolist() == wanted[valid].tolist()


DECODE = make_batch([5, 9000, 4096, 700, 700])
MLA = {"num_heads": 16, "num_heads_k": 1, "headdim": 64, "headdim_v": 512, "page_size": 64}
