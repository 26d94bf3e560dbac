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

BUILD, OLDER = "vllm-0.33.0", "vllm-0.24.0"  # whose builders differ
_GQA_HEAD = """
import torch
from types import SimpleNamespace
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version, get_scheduler_metadata

def round_up(n, multiple):
    return -(-n // multiple) * multiple

class FlashAttentionImpl:
    def __init__(self, heads, headdim, window, fa_version):
        self.num_heads, self.num_kv_heads, self.head_size, self.sliding_window = *heads, headdim, window
        self.attn_type, self.vllm_flash_attn_version = "decoder", fa_version

    def forward(self, q, cache, attn_metadata):
        batch = attn_metadata.batch
        return flash_attn_varlen_func(
            q=q, k=cache, v=cache, cu_seqlens_q=batch.starts, max_seqlen_q=batch.max_query_len,
            seqused_k=attn_metadata.seq_lens, max_seqlen_k=batch.max_seq_len, causal=batch.causal,
            window_size=list(self.sliding_window), block_table=batch.table,
            scheduler_metadata=attn_metadata.scheduler_metadata, fa_version=self.vllm_flash_attn_version,
            num_splits=attn_metadata.max_num_splits,
        )

class FlashAttentionMetadataBuilder:
    def __init__(self, *, kv_cache_spec, layer_names, vllm_config, heads, headdim, dcp, max_batch_size, splits):
        self.kv_cache_spec, self.layer_names, self.vllm_config = kv_cache_spec, layer_names, vllm_config
        self.num_heads_q, self.num_heads_kv, self.headdim, self.dcp_world_size = *heads, headdim, dcp
        self.compilation_config, self.device = vllm_config.compilation_config, "cpu"
        self.aot_schedule = get_flash_attn_version() == 3
        self.use_full_cuda_graph = self.compilation_config.cudagraph_mode.has_full_cudagraphs()
        self.max_num_splits = 0
        if self.use_full_cuda_graph and self.aot_schedule:
            self.scheduler_metadata = torch.zeros(
                1 + round_up(max_batch_size, 4) * 4, dtype=torch.int32, device=self.device
            )
            self.max_num_splits = splits
        self.aot_sliding_window = None

    def windows(self):
        layers = self.compilation_config.static_forward_context.values()
        return {layer.impl.sliding_window for layer in layers if isinstance(layer.impl, FlashAttentionImpl)}
"""
_FIRST_BUILD = """
        aot_schedule = self.aot_schedule and not fast_build
        if self.aot_sliding_window is None:
            self.aot_sliding_window = (-1, -1)
            if aot_schedule:
                if len(windows := self.windows()) == 1:
                    self.aot_sliding_window = windows.pop()
                elif len(windows) > 1:
                    self.aot_schedule = False
                    aot_schedule = False
"""
_CALL = """get_scheduler_metadata(
                batch_size=batch_size, max_seqlen_q=max_query_len, max_seqlen_k=max_seq_len,
                num_heads_q=self.num_heads_q * self.dcp_world_size, num_heads_kv=self.num_heads_kv,
                headdim=self.headdim, cache_seqlens=seqlens, qkv_dtype=torch.bfloat16, cu_seqlens_q=cu_query_lens,
                page_size=16, causal=causal, window_size=WINDOW, num_splits=max_num_splits,
            )
"""
_ASK = """aot_schedule=aot_schedule, batch_size=common_attn_metadata.size, cu_query_lens=common_attn_metadata.starts,
                max_query_len=common_attn_metadata.max_query_len, seqlens=common_attn_metadata.lengths,
                max_seq_len=common_attn_metadata.max_seq_len, causal=CAUSAL, max_num_splits=self.max_num_splits,
"""
_GQA = f"""{_GQA_HEAD}
    def _get_scheduler_metadata(
        self, *, aot_schedule, batch_size, cu_query_lens, max_query_len, seqlens, max_seq_len, causal, max_num_splits
    ):
        if aot_schedule:
            return {_CALL.replace("WINDOW", "_maybe_symmetrize_window(self.aot_sliding_window, causal)")}

    def _store_scheduler_metadata(self, scheduler_metadata):
        if self.use_full_cuda_graph and scheduler_metadata is not None:
            n = scheduler_metadata.shape[0]
            self.scheduler_metadata[:n] = scheduler_metadata
            self.scheduler_metadata[n:] = 0
            return self.scheduler_metadata[:n]
        return scheduler_metadata

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        {_FIRST_BUILD.strip()}
        if self.dcp_world_size > 1:
            made = self._get_scheduler_metadata(
                {_ASK.replace("CAUSAL", "False")}
            )
        else:
            made = self._get_scheduler_metadata(
                {_ASK.replace("CAUSAL", "common_attn_metadata.causal")}
            )
        made = self._store_scheduler_metadata(made)
        return SimpleNamespace(
            batch=common_attn_metadata, seq_lens=common_attn_metadata.lengths, scheduler_metadata=made,
            max_num_splits=self.max_num_splits,
        )

    def update_draft_decode_metadata(self, metadata):
        common_attn_metadata, aot_schedule = metadata.batch, True
        made = self._get_scheduler_metadata(
            {_ASK.replace("CAUSAL", "True")}
        )
        metadata.scheduler_metadata = self._store_scheduler_metadata(made)

def _maybe_symmetrize_window(window, causal):
    return (window[0], window[0]) if window[0] >= 0 and window[1] == 0 and causal is not True else window
"""
_CLOSURE_ASK = (
    "batch_size=batch.size, cu_query_lens=batch.starts, max_query_len=batch.max_query_len, seqlens=batch.lengths, "
    "max_seq_len=batch.max_seq_len, causal="
)
_PREFIX_ASK = (
    "batch_size=1, cu_query_lens=batch.starts[:: batch.size], max_query_len=batch.size, "
    "seqlens=batch.prefix, max_seq_len=common_prefix_len, causal=False"
)
_OLDER_GQA = f"""{_GQA_HEAD}
    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        {_FIRST_BUILD.strip()}
        batch, max_num_splits, prefix = common_attn_metadata, self.max_num_splits, None

        def schedule(batch_size, cu_query_lens, max_query_len, seqlens, max_seq_len, causal):
            if aot_schedule:
                return {_CALL.replace("WINDOW", "self.aot_sliding_window")}

        use_cascade = common_prefix_len > 0
        if self.dcp_world_size > 1:
            scheduler_metadata = schedule({_CLOSURE_ASK}False)
        elif use_cascade:
            prefix = schedule({_PREFIX_ASK})
            scheduler_metadata = schedule({_CLOSURE_ASK}True)
        else:
            scheduler_metadata = schedule({_CLOSURE_ASK}batch.causal)
        if self.use_full_cuda_graph and scheduler_metadata is not None:
            n = scheduler_metadata.shape[0]
            self.scheduler_metadata[:n] = scheduler_metadata
            self.scheduler_metadata[n:] = 0
            scheduler_metadata = self.scheduler_metadata[:n]
        return SimpleNamespace(
            batch=batch, seq_lens=batch.lengths, scheduler_metadata=scheduler_metadata, prefix=prefix,
            max_num_splits=max_num_splits,
        )
"""
# Of each file, what the adapter has to do with. Where vLLM computes its own metadata, the stand-in answers -1.
FILES = {
    "vllm_flash_attn/flash_attn_interface.py": """
import torch

CALLS = []  # of the forward

def get_scheduler_metadata(
    batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens,
    qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None,
    page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1), has_softcap=False, num_splits=0,
    pack_gqa=None, sm_margin=0,
):
    return torch.full((9,), -1, dtype=torch.int32)

def flash_attn_varlen_func(
    q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None, softmax_scale=None,
    causal=False, window_size=None, softcap=0.0, block_table=None, out=None, scheduler_metadata=None, num_splits=0,
    fa_version=2, s_aux=None,
):
    CALLS.append(dict(locals()))
    return q
""",
    "vllm_flash_attn/__init__.py": """
from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func, get_scheduler_metadata
""",
    "v1/attention/backends/fa_utils.py": """
from vllm import platforms

if platforms.is_cuda:
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata
else:
    from vllm.vllm_flash_attn import flash_attn_varlen_func
    def get_scheduler_metadata(*args, **kwargs):
        return None

def get_flash_attn_version():
    return platforms.fa_version
""",
    "v1/attention/backends/flash_attn.py": _GQA,
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
    "forward_context.py": """
from contextlib import contextmanager

@contextmanager
def set_forward_context(attn_metadata, vllm_config=None, **more):
    yield attn_metadata
""",
    "v1/runner.py": "from vllm.forward_context import set_forward_context\n",
    "v1/worker/gpu/attn_utils.py": """
def build_attn_metadata(builders, batch, fast_build=False):
    return [builder.build(0, batch, fast_build=fast_build) for builder in builders]
""",
    "v1/worker/gpu/model_states.py": "from vllm.v1.worker.gpu.attn_utils import build_attn_metadata\n",
    "platforms.py": "is_cuda = True\nfa_version = 3\n",
    **dict.fromkeys(
        ("__init__.py", "v1/__init__.py", "v1/attention/__init__.py", "v1/attention/backends/__init__.py",
         "v1/attention/backends/mla/__init__.py", "v1/worker/__init__.py", "v1/worker/gpu/__init__.py"), ""),
}  # fmt: skip


# Of the older version, the files that differ.
_MLA_PATH = "v1/attention/backends/mla/flashattn_mla.py"
OLDER_FILES = {
    "v1/attention/backends/flash_attn.py": _OLDER_GQA,
    _MLA_PATH: FILES[_MLA_PATH].replace("vllm.v1.attention.backends.fa_utils import", "vllm.vllm_flash_attn import"),
}


@contextmanager
def stand_in(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, build: str = BUILD) -> Iterator[pathlib.Path]:
    """The stand-in, written to `folder` and on the path. A real vLLM that was imported is put back at the end."""
    for path, source in (FILES | (OLDER_FILES if build == OLDER else {})).items():
        file = folder / "vllm" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    monkeypatch.setenv(BUILD_VARIABLE, build)
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
    facts["table"] = torch.zeros(len(lengths), -(-max(lengths) // 16), dtype=torch.int32)
    return SimpleNamespace(**(facts | more))


def gqa_builder(
    heads: tuple[int, int] = (32, 8), headdim: int = 128, window: tuple[int, int] = (-1, -1), dcp: int = 1,
    graphs: bool = False, splits: int = 32, fa_version: int = 3, max_batch_size: int = 16,
    others: tuple[tuple[int, int], ...] = (),
) -> Any:  # fmt: skip
    """A builder that serves one layer, of this window; `others` are the windows of the model's other layers."""
    import_module("vllm.platforms").fa_version = fa_version
    gqa = import_module(adapter.GQA)
    impls = [gqa.FlashAttentionImpl(heads, headdim, one, fa_version) for one in (window, *others)]
    config = SimpleNamespace(
        cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: graphs),
        static_forward_context={f"layers.{i}": SimpleNamespace(impl=impl) for i, impl in enumerate(impls)},
    )
    return gqa.FlashAttentionMetadataBuilder(
        kv_cache_spec=SimpleNamespace(sliding_window=None if window[0] < 0 else window[0] + 1),
        layer_names=["layers.0"], vllm_config=SimpleNamespace(compilation_config=config), heads=heads, headdim=headdim,
        dcp=dcp, max_batch_size=max_batch_size, splits=splits,
    )  # fmt: skip


def metadata_of(builder: Any, batch: SimpleNamespace, **more: Any) -> Any:
    """What a builder makes for a batch."""
    if hasattr(builder, "_build_decode"):
        return builder._build_decode(batch)
    return builder.build(0, batch, **more).scheduler_metadata


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
