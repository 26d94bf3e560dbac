"""What a call of an FA3 forward asks, whatever the build calls its arguments."""

from __future__ import annotations

from collections.abc import Container, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from .arguments import LengthTensors, dtype_name
from .schedules import keep
from .triton_kernels.problem import Problem

# Arguments of published forwards that the schedule does not depend on.
NO_MATTER = frozenset({
    "v", "qv", "q_v", "rotary_cos", "rotary_sin", "rotary_seqlens", "rotary_interleaved", "cache_batch_idx",
    "q_descale", "k_descale", "v_descale", "softmax_scale", "return_softmax_lse", "return_attn_probs", "sinks", "s_aux",
    "out", "output_scale", "dropout_p", "deterministic", "cp_rank", "aux_tensor_leading_dims",
})  # fmt: skip
# Those that change what is computed in ways the metadata does not know, and their harmless values.
_HARMLESS = {
    "score_mod": (None,), "aux_tensors": (None,), "mask_mod": (None,), "block_sparse_tensors": (None,),
    "cp_world_size": (None, 1), "cp_tot_seqused_k": (None,), "dynamic_causal": (None,), "gather_kv_indices": (None,),
    "gather_kv_valid_length": (None,), "alibi_slopes": (None,), "cu_seqlens_k": (None,), "only_qv": (None, False),
    "batch_invariant": (None, False),
}  # fmt: skip


class ForwardCall(NamedTuple):
    """The arguments of one forward that its schedule depends on. Shapes as in FA3's mha_fwd (hopper/flash_api.cpp)."""

    q: torch.Tensor  # [b, s_q, h, d], or [total_q, h, d] with cu_seqlens_q
    k_cache: torch.Tensor  # [pages, page_size, hk, d], or [b, s_k, hk, d] where not paged
    v_cache: torch.Tensor  # the same with dv
    cache_seqlens: torch.Tensor | None = None  # [b]
    page_table: torch.Tensor | None = None  # [b, pages of a sequence]
    cu_seqlens_q: torch.Tensor | None = None  # [b + 1]
    seqused_q: torch.Tensor | None = None  # [b]; no published forward takes it yet
    cu_seqlens_k_new: torch.Tensor | None = None  # [b + 1]
    leftpad_k: torch.Tensor | None = None  # [b]
    k_new: torch.Tensor | None = None  # [b, s_new, hk, d], or [total_new, hk, d] with cu_seqlens_k_new
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None  # vLLM passes it, and its FA3 goes by it; elsewhere the cache says
    causal: bool = False
    window_size: tuple[int, int] | None = (-1, -1)
    attention_chunk: int | None = 0
    softcap: float = 0.0
    num_splits: int = 0
    pack_gqa: bool | None = None
    sm_margin: int = 0
    scheduler_metadata: torch.Tensor | None = None
    version: int = 3
    unknown: tuple[str, ...] = ()  # arguments in use whose effect on the schedule is not known

    @classmethod
    def read(cls, call: Mapping[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})) -> ForwardCall:
        """From the arguments of `flash_attn_with_kvcache`, or of vLLM's `flash_attn_varlen_func`, by name.

        `defaults` are those of the forward, by name: what it does where the call says nothing.
        """
        names = names_of(call, defaults)
        known = _VARLEN_KNOWN if names is _VARLEN else _WITH_KVCACHE_KNOWN
        given = {ours: call[theirs] for ours, theirs in names if theirs in call}
        if "version" not in given and (version := defaults.get(names[-1][1])) is not None:
            given["version"] = version
        for ours, theirs in names[:3]:
            if not isinstance(given.get(ours), torch.Tensor):
                raise TypeError(f"{theirs} must be a tensor, got {given.get(ours)!r}")
        unknown = [
            name for name, harmless in _HARMLESS.items() if name in call and not _is_one_of(call[name], harmless)
        ]
        if others := call.keys() - known:
            unknown += sorted(name for name in others if not _is_one_of(call[name], (None, defaults.get(name))))
        return cls(**given, unknown=tuple(unknown))

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def batch_size(self) -> int:
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    def unsupported_reason(self) -> str | None:
        """Why this call gets no metadata from us, or None."""
        if self.unknown:
            return f"{', '.join(self.unknown)} given"
        if self.version != 3:
            return f"FlashAttention {self.version}, not 3"
        if not isinstance(self.cache_seqlens, torch.Tensor):
            return "cache_seqlens is not a tensor"
        if self.cu_seqlens_q is not None and self.max_seqlen_q is None:
            return "cu_seqlens_q without max_seqlen_q"
        if self.k_new is not None and self.cu_seqlens_k_new is None and self.k_new.shape[1] == 0:
            return "no tokens in k"
        return None

    def lengths(self) -> LengthTensors:
        """The tensors that the metadata is made from."""
        assert self.cache_seqlens is not None  # see unsupported_reason
        return LengthTensors(
            self.cache_seqlens,
            cu_seqlens_q=self.cu_seqlens_q,
            seqused_q=self.seqused_q,
            cu_seqlens_k_new=None if self.k_new is None else self.cu_seqlens_k_new,  # FA3 reads it only with k
            leftpad_k=self.leftpad_k,
        )

    def problem(self, arch: int, num_sms: int, counts_queries: bool) -> Problem:
        """What the forward's own metadata stage is asked; remembered, since layers ask the same every step.

        `counts_queries`: the number of ragged queries matters, to a build whose bound on splits depends on the batch.

        Raises `TypeError` or `ValueError` for what FA3 does not support.
        """
        window = (-1, -1) if self.window_size is None else tuple(self.window_size)
        table, starts, new = self.page_table, self.cu_seqlens_q, self.k_new
        key = (
            self.q.shape, self.q.dtype, self.k_cache.shape, self.v_cache.shape[-1],
            None if table is None else table.shape[1], None if starts is None else starts.shape[0],
            self.max_seqlen_q, self.max_seqlen_k, None if new is None else new.shape,
            self.cu_seqlens_k_new is None, self.leftpad_k is None, self.seqused_q is None, self.causal, window,
            self.attention_chunk, self.softcap > 0, self.num_splits, self.pack_gqa, self.sm_margin, arch, num_sms,
            counts_queries, *map(type, window), *map(type, self[_FIRST_NUMBER:_LAST_NUMBER]),
        )  # fmt: skip
        if (found := _problems.get(key)) is None:
            found = self._make_problem(window, arch, num_sms, counts_queries)
            keep(_problems, _MOST_PROBLEMS, key, found)
        return found

    def with_its_window(self) -> ForwardCall:
        """The call under a window that FA3 does not take for none, where a number says how wide the page table is.

        So vLLM's forward: it is told the longest length of the batch, and goes by it in nothing else that matters.
        """
        longest = self.max_seqlen_k
        if type(longest) is not int or self.page_table is None or not isinstance(self.window_size, tuple | list):
            return self
        left = self.window_size[0]
        if left < max(longest - 1, 0) or left >= 2**31 - 2:  # of these the former is one, and the latter none anywhere
            return self
        return self._replace(max_seqlen_k=left + 2)

    def _make_problem(self, window: tuple[int, ...], arch: int, num_sms: int, counts_queries: bool) -> Problem:
        ragged = self.cu_seqlens_q is not None
        return Problem(
            batch_size=self.batch_size,
            max_seqlen_q=self.max_seqlen_q if ragged and self.max_seqlen_q is not None else self.q.shape[1],
            max_seqlen_k=self._max_seqlen_k(),
            num_heads=self.q.shape[-2],
            num_heads_k=self.k_cache.shape[-2],
            headdim=self.q.shape[-1],
            headdim_v=self.v_cache.shape[-1],
            qkv_dtype=dtype_name(self.q.dtype),
            has_cu_seqlens_q=ragged,
            has_seqused_q=self.seqused_q is not None,
            has_leftpad_k=self.leftpad_k is not None,
            page_size=None if self.page_table is None else self.k_cache.shape[1],
            max_seqlen_k_new=self._max_seqlen_k_new(),
            causal=bool(self.causal),
            window_size=window,  # type: ignore[arg-type] # Problem checks that it is a pair
            attention_chunk=self.attention_chunk or 0,
            has_softcap=self.softcap > 0,
            num_splits=max(self.num_splits, 0),
            pack_gqa=self.pack_gqa,
            sm_margin=self.sm_margin,
            arch=arch,
            num_sms=num_sms,
            total_q=self.q.shape[0] if ragged and counts_queries else None,
        )

    def _max_seqlen_k(self) -> int:
        if self.max_seqlen_k is not None:
            return self.max_seqlen_k
        return self.k_cache.shape[1] * (1 if self.page_table is None else self.page_table.shape[1])

    def _max_seqlen_k_new(self) -> int:
        if self.k_new is None:
            return 0
        # With ragged new keys FA3 reads their lengths from the tensor; that there are any is what counts.
        return 1 if self.cu_seqlens_k_new is not None else self.k_new.shape[1]


def names_of(call: Container[str], defaults: Container[str]) -> tuple[tuple[str, str], ...]:
    """(our name, the forward's) of the arguments that a schedule depends on, in a call that gives these names."""
    if "block_table" in call or "seqused_k" in call or "fa_version" in call or "fa_version" in defaults:
        return _VARLEN
    return _WITH_KVCACHE


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """By identity, or as the same number: a tensor is compared with nothing."""
    return any(value is one or (type(value) is type(one) and isinstance(one, int | float | str) and value == one)
               for one in allowed)  # fmt: skip


# Numbers and flags of a call: equal ones of another type are not all allowed.
_FIRST_NUMBER = ForwardCall._fields.index("max_seqlen_q")
_LAST_NUMBER = ForwardCall._fields.index("scheduler_metadata")
# (our name, the forward's); the tensors that every call has come first, and the version last.
_FIELDS = tuple(name for name in ForwardCall._fields if name != "unknown")


def _names(**theirs: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, theirs.get(name, name)) for name in _FIELDS)


_WITH_KVCACHE = _names(k_new="k", leftpad_k="cache_leftpad", version="ver")  # sgl_kernel, flash_attn_interface
_VARLEN = _names(  # vllm_flash_attn.flash_attn_varlen_func
    k_cache="k", v_cache="v", cache_seqlens="seqused_k", page_table="block_table", version="fa_version",
    k_new="no such argument",
)  # fmt: skip
_WITH_KVCACHE_KNOWN = {theirs for _, theirs in _WITH_KVCACHE} | NO_MATTER | set(_HARMLESS)
_VARLEN_KNOWN = {theirs for _, theirs in _VARLEN} | NO_MATTER | set(_HARMLESS)
_problems: dict[tuple[Any, ...], Problem] = {}
_MOST_PROBLEMS = 4096
