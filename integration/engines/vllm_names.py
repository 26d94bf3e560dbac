"""What the vLLM adapter leans on in vLLM: names, and facts about the sources of every range of versions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

from .source_facts import missing_facts

PACKAGE = "vllm.vllm_flash_attn"
INTERFACE = f"{PACKAGE}.flash_attn_interface"  # defines both functions
FA_UTILS = "vllm.v1.attention.backends.fa_utils"  # where the backends import them from
GQA = "vllm.v1.attention.backends.flash_attn"
MLA = "vllm.v1.attention.backends.mla.flashattn_mla"
MLA_SPARSE = "vllm.v1.attention.backends.mla.flashattn_mla_sparse"  # from 0.25 on
CONTEXT = "vllm.forward_context"
NAME = "get_scheduler_metadata"
FORWARD = "flash_attn_varlen_func"
ENTER = "set_forward_context"  # entered around every forward of a model, one step of a drafter included
GQA_BUILDER, MLA_BUILDER = "FlashAttentionMetadataBuilder", "FlashAttnMLAMetadataBuilder"
CASCADE = f"{GQA_BUILDER}.build: use_cascade = common_prefix_len > 0"

_SHAPE = "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens"
_GQA_CALL = f"1 x {NAME}({_SHAPE}, qkv_dtype, cu_seqlens_q, page_size, causal, window_size, num_splits)"
_MLA_CALL = f"1 x {NAME}({_SHAPE}, qkv_dtype, headdim_v, page_size, cu_seqlens_q, causal, num_splits)"
_ASKS = "batch_size, cu_query_lens, max_query_len, seqlens, max_seq_len, causal"
_GQA_ASKS = f"aot_schedule, {_ASKS}, max_num_splits"
_MLA_ASKS = _GQA_ASKS.replace("aot_schedule, batch_size", "num_reqs")
_READ = ("seqused_k", "block_table", "window_size", "num_splits", "scheduler_metadata", "fa_version")
_BUFFER = (
    "self.use_full_cuda_graph = self.compilation_config.cudagraph_mode.has_full_cudagraphs()",
    "self.scheduler_metadata = torch.zeros(1 + round_up(max_batch_size, 4) * 4, dtype=torch.int32, device=self.device)",
)
_STORES = ("self.scheduler_metadata[:n] = scheduler_metadata", "self.scheduler_metadata[n:] = 0")

Facts = Mapping[str, tuple[str, ...]]  # module -> facts about its source, in the words of `source_facts`
FactsOf = Callable[[str], list[str] | None]  # of a module; None: there is no such module


@dataclass(frozen=True)
class Layout:
    """A range of versions whose builders are alike."""

    versions: str
    makes: str  # the method of the GQA builder that calls `get_scheduler_metadata`
    symmetric: str  # the window that it asks for
    asks: str  # how `build` asks that method, or the closure that it has for it
    mla_imports_from: str
    more: tuple[str, ...] = field(default=())  # that only making the tensor in the buffer leans on

    def attach(self) -> Facts:
        """What `attach` leans on."""
        built = f"{GQA_BUILDER}.build"
        return {
            INTERFACE: (
                f"def {NAME}({_SHAPE}, qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, "
                "cu_seqlens_k_new=None, cache_leftpad=None, page_size=None, max_seqlen_k_new=0, causal=False, "
                "window_size=(-1, -1), has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0)",
                *(f"{FORWARD} takes {name}" for name in _READ),
            ),
            PACKAGE: (f"from {INTERFACE} import {NAME}", f"from {INTERFACE} import {FORWARD}"),
            FA_UTILS: (f"from {PACKAGE} import {NAME}", f"from {PACKAGE} import {FORWARD}"),
            CONTEXT: (f"{ENTER} takes attn_metadata",),
            GQA: (
                f"from {FA_UTILS} import {NAME}",
                f"from {FA_UTILS} import {FORWARD}",
                f"{self.makes}: {_GQA_CALL}",
                f"{self.makes}: window_size={self.symmetric}",
                # Metadata is turned off in the first call of `build`, where windows differ in the model.
                f"{GQA_BUILDER}.__init__: self.aot_schedule = get_flash_attn_version() == 3",
                f"{built}: if self.aot_sliding_window is None",
                f"{built}: self.aot_schedule = False",
            ),
            MLA: (
                f"from {self.mla_imports_from} import {NAME}",
                f"{MLA_BUILDER}._schedule_decode: {_MLA_CALL}",
            ),
        }

    def in_place(self) -> Facts:
        """What `attach(in_place=True)` leans on besides: what is made in the buffer is what is stored next."""
        return {
            GQA: (
                *(f"{GQA_BUILDER}.__init__: {line}" for line in _BUFFER),
                f"{GQA_BUILDER}.build: {self.asks}",
                *self.more,
            ),
            MLA: (
                f"def {MLA_BUILDER}._schedule_decode(self, {_MLA_ASKS})",
                *(f"{MLA_BUILDER}.__init__: {line}" for line in _BUFFER),
                f"{MLA_BUILDER}._build_decode: 1 x self._schedule_decode({_MLA_ASKS})",
                *(f"{MLA_BUILDER}._build_decode: {line}" for line in _STORES),
            ),
        }

    @property
    def stores(self) -> bool:
        """Whether the GQA builder makes and stores in methods of their own."""
        return not self.makes.endswith(".build")

    def parts(self, in_place: bool) -> tuple[Facts, ...]:
        return (self.attach(), self.in_place()) if in_place else (self.attach(),)

    def count(self, in_place: bool) -> int:
        """How many facts it leans on."""
        return sum(len(facts) for part in self.parts(in_place) for facts in part.values())

    def broken(self, facts_of: FactsOf, in_place: bool = False) -> list[str]:
        """What does not hold, in words."""
        return [
            line for part in self.parts(in_place) for module, facts in part.items()
            for line in missing_facts(module, facts, facts_of(module))
        ]  # fmt: skip


_MAKES, _STORED = f"{GQA_BUILDER}._get_scheduler_metadata", f"{GQA_BUILDER}._store_scheduler_metadata"
_SYMMETRIC = "_maybe_symmetrize_window(self.aot_sliding_window, causal)"
_METHODS = (
    f"def {_MAKES}(self, *, {_GQA_ASKS})",
    f"def {_STORED}(self, scheduler_metadata)",
    *(f"{_STORED}: {line}" for line in _STORES),
    f"{_STORED}: return self.scheduler_metadata[:n]",
    f"{GQA_BUILDER}.build: 1 x self._store_scheduler_metadata(_)",
    f"{GQA_BUILDER}.update_draft_decode_metadata: 1 x self._get_scheduler_metadata({_GQA_ASKS})",
    f"{GQA_BUILDER}.update_draft_decode_metadata: 1 x self._store_scheduler_metadata(_)",
)
# In the branches of one `if`, of which cascade attention has two: prefix and rest.
_CLOSURE = (CASCADE, *(f"{GQA_BUILDER}.build: {line}" for line in _STORES))
LAYOUTS = (  # the newest first
    Layout(
        "0.32.0 to 0.33.0", _MAKES, _SYMMETRIC, f"2 x self._get_scheduler_metadata({_GQA_ASKS})", FA_UTILS, _METHODS
    ),
    Layout(
        "0.28.0 to 0.31.0", _MAKES, _SYMMETRIC, f"4 x self._get_scheduler_metadata({_GQA_ASKS})", PACKAGE,
        (CASCADE, *_METHODS),
    ),
    Layout("0.25.0 to 0.27.1", f"{GQA_BUILDER}.build", _SYMMETRIC, f"4 x schedule({_ASKS})", PACKAGE, _CLOSURE),
    Layout(
        "0.17.0 to 0.24.0", f"{GQA_BUILDER}.build", "self.aot_sliding_window", f"4 x schedule({_ASKS})", PACKAGE,
        _CLOSURE,
    ),
)  # fmt: skip


def layout_of(facts_of: FactsOf, in_place: bool = False) -> tuple[Layout, list[str]]:
    """The layout that fits, else the one of which most holds; and what does not hold of it, in words."""
    read_once = cache(facts_of)
    tried = [(layout, layout.broken(read_once, in_place)) for layout in LAYOUTS]
    return min(tried, key=lambda one: (bool(one[1]), len(one[1]) - one[0].count(in_place)))
