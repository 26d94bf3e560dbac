"""All that the SGLang adapter leans on, by range of versions. tests/engines/test_sglang_contract.py checks it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

ATTENTION = "sglang.srt.layers.attention"
FORWARD = "flash_attn_with_kvcache"
_LAYER = ("q", "k", "v", "layer", "forward_batch")
METHODS: dict[str, tuple[str, ...]] = {
    "init_forward_metadata": ("forward_batch",),
    "forward_decode": _LAYER,
    "forward_extend": _LAYER,
}


@dataclass(frozen=True)
class SGLangNames:
    """A backend of SGLang whose layers call FA3's forward, in a range of SGLang versions."""

    versions: str
    marker: str  # "self.NAME" or "module.NAME": what tells this range from those after it
    wrapped: tuple[str, ...]  # the FA3 forwards that layers call, written likewise
    module: str = f"{ATTENTION}.flashattention_backend"
    backend: str = "FlashAttentionBackend"
    forward_module: str = ""  # that the "module" of `marker` and `wrapped` is, where it is not `module`
    forward_called_in: str = "forward_decode"  # the method of the backend, or Class.method of forward_module
    version: str | None = "fa_impl_ver"  # where the backend says which FlashAttention it runs; None: it is FA3
    attributes: tuple[str, ...] = ("fa_impl_ver",)  # set on the backend by its own methods
    # name -> parameters after self, the first ones. `init_forward_metadata` begins a batch that is run eagerly, and the
    # other two are its layers.
    methods: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(METHODS))
    metadata: str = "FlashAttentionMetadata"  # the class of `forward_metadata`, made anew by `init_forward_metadata`
    metadata_fields: tuple[str, ...] = ()
    # Keywords of the forward in a decode layer, and of the maker of metadata.
    forward_keywords: tuple[str, ...] = (
        "q", "k_cache", "v_cache", "page_table", "cache_seqlens", "cu_seqlens_q", "max_seqlen_q", "causal",
        "window_size", "softcap", "num_splits",
    )  # fmt: skip
    maker_keywords: tuple[str, ...] = ()
    makers_answer_may_be_none: bool = False  # the callers of the maker test its answer before they use it
    setting: tuple[str, str] | None = None  # (module, name): false where the forward is not the installed package's

    def covers(self, version: str) -> bool:
        """Whether a version, such as "0.5.8.post1", is of this range."""
        first, _, last = self.versions.partition(" to ")
        return version_numbers(first) <= version_numbers(version) <= version_numbers(last or first)

    @property
    def where(self) -> str:
        """The module that the forward is found in, unless the backend object has it."""
        return self.forward_module or self.module


def version_numbers(version: str) -> tuple[int, ...]:
    """(0, 5, 8) of "0.5.8.post1"."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


_SETTING = ("sglang.srt.environ", "SGLANG_USE_SGL_FA3_KERNEL")
_SPARSE = SGLangNames(
    versions="0.5.13 to 0.5.23",
    marker="module.flash_attn_with_kvcache",
    wrapped=("module.flash_attn_with_kvcache",),
    module=f"{ATTENTION}.dsa_backend",
    backend="DeepseekSparseAttnBackend",
    forward_called_in="_forward_fa3",
    version=None,
    attributes=(),
    metadata="DSAMetadata",
    forward_keywords=(
        "q", "k_cache", "v_cache", "qv", "page_table", "cache_seqlens", "cu_seqlens_q", "max_seqlen_q", "causal",
        "softcap", "num_splits",
    ),
    setting=_SETTING,
)  # fmt: skip
_DUAL_CHUNK = SGLangNames(
    versions="0.5.11 to 0.5.19",
    marker="module.flash_attn_with_kvcache",
    wrapped=("module.flash_attn_with_kvcache",),
    module=f"{ATTENTION}.dual_chunk_flashattention_backend",
    backend="DualChunkFlashAttentionBackend",
    forward_called_in="_dual_chunk_flash_attn_decoding_with_exp_sums",
    version=None,
    attributes=(),
    metadata="DualChunkFlashAttentionMetadata",
    forward_keywords=("q", "k_cache", "v_cache", "page_table", "cache_seqlens", "causal"),
    setting=_SETTING,
)  # fmt: skip

# Of each backend the newest range first.
LAYOUTS = (
    SGLangNames(
        versions="0.5.11 to 0.5.23",
        marker="self._get_scheduler_metadata",
        wrapped=("module.flash_attn_with_kvcache",),
        attributes=(
            "fa_impl_ver", "_get_scheduler_metadata", "forward_metadata", "decode_cuda_graph_metadata", "page_size",
        ),
        methods=METHODS | {
            "_compute_scheduler_metadata": ("batch_size", "max_seq_len_k", "cache_seqlens", "cu_seqlens_q"),
        },
        metadata_fields=("cache_seqlens_int32", "cu_seqlens_q", "page_table", "scheduler_metadata"),
        forward_keywords=(*SGLangNames.forward_keywords, "scheduler_metadata", "ver"),
        maker_keywords=(
            "batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads", "num_heads_k", "headdim", "cache_seqlens",
            "qkv_dtype", "cu_seqlens_q", "page_size", "causal", "has_softcap", "num_splits",
        ),
        makers_answer_may_be_none=True,
        setting=_SETTING,
    ),
    SGLangNames(
        versions="0.5.10",
        marker="self.flash_attn_with_kvcache",
        wrapped=("self.flash_attn_with_kvcache",),
        attributes=("fa_impl_ver", "flash_attn_with_kvcache"),
    ),
    SGLangNames(
        versions="0.5.9",
        marker="module.flash_attn_with_kvcache_fa3",
        wrapped=("module.flash_attn_with_kvcache", "module.flash_attn_with_kvcache_fa3"),
    ),
    SGLangNames(
        versions="0.5.7 to 0.5.8",
        marker="module.flash_attn_with_kvcache",
        wrapped=("module.flash_attn_with_kvcache",),
    ),
)  # fmt: skip
SPARSE_LAYOUTS = (
    _SPARSE,
    replace(
        _SPARSE,
        versions="0.5.11 to 0.5.12",
        module=f"{ATTENTION}.nsa_backend",
        backend="NativeSparseAttnBackend",
        metadata="NSAMetadata",
    ),
    replace(
        _SPARSE,
        versions="0.5.7 to 0.5.10",
        module=f"{ATTENTION}.nsa_backend",
        backend="NativeSparseAttnBackend",
        metadata="NSAMetadata",
        setting=None,
    ),
)
MINICPM_LAYOUTS = (
    SGLangNames(
        versions="0.5.19 to 0.5.23",
        marker="module.flash_attn_with_kvcache",
        wrapped=("module.flash_attn_with_kvcache",),
        module=f"{ATTENTION}.minicpm.backend",
        backend="MiniCPMSparseBackend",
        forward_module=f"{ATTENTION}.minicpm.attention_adapter",
        forward_called_in="MiniCPMFlashAttentionAdapter.forward",
        version="flash_attn_backend.fa_impl_ver",
        attributes=("flash_attn_backend",),
        metadata="MiniCPMSparseMetadata",
        forward_keywords=(*SGLangNames.forward_keywords, "ver"),
        setting=_SETTING,
    ),
)
DUAL_CHUNK_LAYOUTS = (_DUAL_CHUNK, replace(_DUAL_CHUNK, versions="0.5.7 to 0.5.10", setting=None))
ALL_LAYOUTS = (*LAYOUTS, *SPARSE_LAYOUTS, *MINICPM_LAYOUTS, *DUAL_CHUNK_LAYOUTS)
