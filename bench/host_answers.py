"""A wheel's own answers to problems: its host rules, called in the order in which its op calls them.

What the op does itself around them (hopper/flash_api.cpp) cannot be called: the mask and `paged_kv_tma` come from our
plan, and which q heads are packed after all is worked out here, as the op of that release does.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fa3_metadata.triton_kernels.builds import version_key
from fa3_metadata.triton_kernels.plan import LaunchPlan
from fa3_metadata.triton_kernels.problem import Problem
from numpy.typing import NDArray

from .host_functions import GET_NUM_SPLITS, GET_PACK_GQA, POISON, call, filled

_MAX_DYNAMIC_BATCH = 992
_PROBED = 8000  # structs with which the layout is probed
# Members on which an answer depends in every build. Where such a one has no effect, it lies somewhere else.
NUM_SPLITS_READS = (
    "h", "h_k", "seqlen_q", "seqlen_k", "d", "dv", "d_rounded", "dv_rounded", "page_table", "pagedkv_tma", "is_e4m3",
    "is_causal", "is_local", "window_size_left", "window_size_right", "arch", "num_sm",
)  # fmt: skip
PACK_GQA_READS = ("h", "h_k", "seqlen_q", "page_table", "pagedkv_tma", "cu_seqlens_q", "seqused_q", "num_splits")
Members = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Packing:
    """What an op makes of what `get_pack_gqa` or the caller says."""

    first: bool = False  # before the splits, which depend on it
    with_splits: str = "as said"  # "always", or "exactly": and never without
    equal_headdims: bool = False  # always where headdim == headdim_v

    @staticmethod
    def of(package: str, version: str) -> Packing:
        if package != "vllm":
            return Packing()
        if version_key(version) < version_key("0.10.1"):
            return Packing(first=True, with_splits="exactly")
        return Packing(with_splits="always", equal_headdims=version_key(version) >= version_key("0.17.0"))


@dataclass(frozen=True)
class Answers:
    num_splits: NDArray[np.uint8]
    pack_gqa: NDArray[np.bool_] | None  # None: the wheel does not export the function
    layout_doubt: str | None  # what speaks against the struct's layout


@dataclass(frozen=True)
class HostRules:
    """The host rules of a loadable copy of an extension."""

    library: pathlib.Path
    exports_pack_gqa: bool
    packing: Packing
    params: np.dtype[np.void]  # host_functions.params_dtype
    always_dynamic: bool  # the op has splits by sequence for any batch size

    def answers(self, problems: Sequence[Problem], plans: Sequence[LaunchPlan]) -> Answers:
        """As the op (first half) or the forward asks. Raises `RuntimeError` if the wheel's code cannot be called."""
        members = _members(problems, plans, self.always_dynamic)
        given = np.array([p.num_splits for p in problems])
        given_pack = np.array([-1 if p.pack_gqa is None else p.pack_gqa for p in problems])
        doubts: list[str] = []

        def pack_gqa() -> NDArray[np.bool_]:
            found = self._ask(GET_PACK_GQA, members, PACK_GQA_READS, doubts) != 0
            return np.asarray(np.where(given_pack < 0, found, given_pack != 0), np.bool_)

        pack = None
        if self.packing.first:
            if not self.exports_pack_gqa:
                raise ValueError("the bound on splits depends on get_pack_gqa, which is not exported")
            members["pack_gqa"] = pack_gqa()
        found = self._ask(GET_NUM_SPLITS, members, NUM_SPLITS_READS, doubts)
        members["num_splits"] = np.where(given > 0, given, found)
        if self.exports_pack_gqa and not self.packing.first:
            pack = pack_gqa()
        has_splits = members["num_splits"] > 1
        if self.packing.with_splits == "exactly":
            pack = has_splits
        elif pack is not None and self.packing.with_splits == "always":
            pack = pack | has_splits
        if pack is not None and self.packing.equal_headdims:
            pack = pack | (members["d"] == members["dv"])
        return Answers(members["num_splits"].astype(np.uint8), pack, "; ".join(doubts) or None)

    def _ask(self, function: str, members: Members, reads: Sequence[str], doubts: list[str]) -> NDArray[np.int32]:
        """The answers; what speaks against the layout is added to `doubts`."""
        probed = {name: values[:_PROBED] for name, values in members.items()}
        batches = [filled(self.params, members), filled(self.params, members, POISON)]
        batches += [filled(self.params, probed | {name: _other(name, probed[name])}) for name in reads]
        answers = call(self.library, function, np.concatenate(batches))
        plain, poisoned, *others = np.split(answers, np.cumsum([len(batch) for batch in batches])[:-1])
        if not np.array_equal(plain, poisoned):
            doubts.append(f"{function} reads what is not filled in, e.g. for problem {np.argmax(plain != poisoned)}")
        unread = [name for name, found in zip(reads, others, strict=True) if np.array_equal(found, plain[: len(found)])]
        if unread:
            doubts.append(f"{function} answers the same whatever {', '.join(unread)} is")
        return plain


def _other(name: str, values: NDArray[Any]) -> NDArray[Any]:
    """Other values of a member."""
    if values.dtype == np.bool_:
        return ~values
    if name in ("page_table", "cu_seqlens_q", "seqused_q"):
        return values == 0
    if name == "arch":
        return np.array(np.where(values >= 90, 80, 90))
    return np.full_like(values, 2) if name == "num_splits" else np.roll(values, 1)


def _rounded(headdim: int) -> int:
    return next(rounded for rounded in (64, 96, 128, 192, 256, 512) if headdim <= rounded)


def _members(problems: Sequence[Problem], plans: Sequence[LaunchPlan], always_dynamic: bool) -> Members:
    """Members of `Flash_fwd_params` as the op or (second half) the forward fills them before it asks its host rules."""
    as_op = len(problems) // 2
    rows = [
        {
            "b": p.batch_size,
            "seqlen_q": p.max_seqlen_q,
            "seqlen_k": p.max_seqlen_k,
            "seqlen_knew": p.max_seqlen_k_new,
            "h": p.num_heads,
            "h_k": p.num_heads_k,
            "d": p.headdim,
            "dv": p.value_headdim,
            "d_rounded": _rounded(p.headdim),
            "dv_rounded": _rounded(p.value_headdim),
            "total_q": 0 if i < as_op else p.query_tokens,
            "softcap": float(p.has_softcap),
            "cu_seqlens_q": p.has_cu_seqlens_q,
            "cu_seqlens_k": 0,
            "cu_seqlens_knew": 0,
            "seqused_q": p.has_seqused_q,
            "seqused_k": 1,
            "leftpad_k": p.has_leftpad_k,
            "knew_ptr": p.max_seqlen_k_new > 0,
            "page_table": p.page_size is not None,
            "page_size": p.page_size or 1,
            "pagedkv_tma": plan.paged_kv_tma,
            "window_size_left": plan.window_size[0],
            "window_size_right": plan.window_size[1],
            "is_bf16": p.qkv_dtype == "bfloat16",
            "is_e4m3": p.element_size == 1,
            "is_causal": plan.is_causal,
            "is_local": plan.is_local,
            "num_splits": 0,
            "pack_gqa": False,
            "num_splits_dynamic_ptr": always_dynamic or p.batch_size <= _MAX_DYNAMIC_BATCH,
            "arch": p.arch,
            "num_sm": p.num_sms - p.sm_margin,
        }
        for i, (p, plan) in enumerate(zip(problems, plans, strict=True))
    ]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}
