"""Plan once, run many: metadata for a group of layers that is refreshed in place every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from .arguments import make_problem
from .calls import ForwardCall
from .installed import resolve_build
from .layer_groups import MetadataPlans
from .resolved import ResolvedCall, resolve
from .triton_kernels.builds import MAX_DYNAMIC_SPLIT_BATCH
from .triton_kernels.layout import padded
from .triton_kernels.plan import make_plan
from .triton_kernels.problem import DEFAULT_PARTIAL_BYTES, Problem, checked_int

# Fields of a problem in which a forward may differ: FA3 comes to the same, or they are ours alone.
_NOT_COMPARED = {
    "max_seqlen_k", "window_size", "causal", "num_splits", "pack_gqa", "sm_margin",
    "policy", "batch_invariant", "max_partial_bytes", "gpu", "forward_is_told",
}  # fmt: skip
_MOST_FITTING = 1024
VARYING = ("cu_seqlens_q", "seqused_q", "cu_seqlens_k_new", "leftpad_k")


class MetadataPlan:
    """The scheduler metadata of layers that attend alike, kept in one buffer and refreshed once a step.

    Everything static is fixed here: FA3's `num_splits`, `pack_gqa` and tile are resolved, once for each batch size, and
    the forward is handed the same numbers, so the two sides cannot disagree. `update` refreshes the buffer with one
    launch; `forward_arguments` gives what the forward needs and refuses a forward that the metadata was not made for.

    Arguments are those of `get_scheduler_metadata`, and:
        max_batch_size: the largest batch; the buffer is allocated for it.
        max_seqlen_k: the width of the forward's page table in tokens (`page_table.shape[1] * page_size`), or the
            length of its unpaged cache.
        device: where the lengths will be.
        varying: the optional tensors that every `update` will be given, names among VARYING.

    Raises what `get_scheduler_metadata` raises, for the same mistakes.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_seqlen_k: int,
        num_heads: int,
        num_heads_k: int,
        headdim: int,
        device: torch.device | str,
        max_seqlen_q: int = 1,
        headdim_v: int | None = None,
        qkv_dtype: torch.dtype = torch.bfloat16,
        page_size: int | None = None,
        max_seqlen_k_new: int = 0,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        attention_chunk: int = 0,
        has_softcap: bool = False,
        num_splits: int = 0,
        pack_gqa: bool | None = None,
        sm_margin: int = 0,
        varying: Sequence[str] = (),
        build: str | None = None,
        policy: str = "fa3",
        batch_invariant: bool = False,
        max_partial_bytes: int = DEFAULT_PARTIAL_BYTES,
    ) -> None:
        if unknown := set(varying) - set(VARYING):
            raise ValueError(f"varying must be among {', '.join(VARYING)}, got {', '.join(sorted(unknown))}")
        self.max_batch_size = checked_int("max_batch_size", max_batch_size, 0)
        self.varying = tuple(name for name in VARYING if name in varying)
        self.build, self._rules = resolve_build(build)
        self._not_taken = self._rules.forward_lacks
        for name, value, only in (("num_splits", num_splits, 0), ("pack_gqa", pack_gqa, None),
                                  ("sm_margin", sm_margin, 0)):  # fmt: skip
            if name in self._not_taken and value != only:
                raise ValueError(f"{name} must be {only} for {self.build}, whose forward takes none, got {value!r}")
        self.device = _indexed(torch.device(device))
        self.problem: Problem = make_problem(
            None,
            device=self.device,
            batch_size=max_batch_size,
            qkv_dtype=qkv_dtype,
            arch=None,
            num_sms=None,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            num_heads=num_heads,
            num_heads_k=num_heads_k,
            headdim=headdim,
            headdim_v=headdim_v,
            has_cu_seqlens_q="cu_seqlens_q" in varying,
            has_seqused_q="seqused_q" in varying,
            has_leftpad_k="leftpad_k" in varying,
            page_size=page_size,
            max_seqlen_k_new=max_seqlen_k_new,
            causal=causal,
            window_size=window_size,
            attention_chunk=attention_chunk,
            has_softcap=has_softcap,
            num_splits=num_splits,
            pack_gqa=pack_gqa,
            sm_margin=sm_margin,
            policy=policy,
            batch_invariant=batch_invariant,
            max_partial_bytes=max_partial_bytes,
        )
        self._bound = num_splits
        largest_served = min(max_batch_size, self._rules.most_split_by_metadata)
        served = make_plan(replace(self.problem, batch_size=largest_served), self._rules)
        if served.costs is not None and "num_splits" not in self._not_taken:  # "balanced": one bound for every batch
            self._bound = served.num_splits
        self._resolved: dict[int, ResolvedCall] = {}
        self._some_resolved: dict[bool, ResolvedCall] = {}  # of a batch up to 992, and of one above
        self._fitting: set[tuple[ResolvedCall, Problem, bool]] = set()  # forwards that were found to fit
        self.sm_margin = sm_margin
        # Layouts of batches with dynamic splits may have a row more.
        some = {min(batch, self.max_batch_size) for batch in (1, MAX_DYNAMIC_SPLIT_BATCH, self.max_batch_size)}
        rows = max(len(self.resolved(batch).plan.layout.row_names) for batch in some)
        self.capacity = rows * padded(self.max_batch_size) + 1
        self._place = 0  # in its group
        self._group = MetadataPlans([self])

    def resolved(self, batch_size: int) -> ResolvedCall:
        """Problem and launch plan of a batch of this size."""
        if (found := self._resolved.get(batch_size)) is None:
            like = self._some_resolved.get(batch_size > MAX_DYNAMIC_SPLIT_BATCH)
            found = None if like is None else like.like_this(batch_size, self.problem.max_seqlen_k)
            found = found or resolve(self._problem_of(batch_size), self._rules)
            self._resolved[batch_size] = self._some_resolved[batch_size > MAX_DYNAMIC_SPLIT_BATCH] = found
        return found

    def _problem_of(self, batch_size: int) -> Problem:
        bound = self._bound if batch_size <= self._rules.most_split_by_metadata else self.problem.num_splits
        return replace(self.problem, batch_size=batch_size, num_splits=bound)

    @property
    def num_splits(self) -> int:
        """What the forward is told for the batch of the last update; before the first, for the largest batch."""
        return self._latest.plan.layout.num_splits

    @property
    def pack_gqa(self) -> bool:
        """Likewise."""
        return self._latest.plan.pack_gqa

    @property
    def _latest(self) -> ResolvedCall:
        step = self._group._step
        return self.resolved(self.max_batch_size) if step is None else step.resolved[self._place]

    def update(
        self,
        cache_seqlens: torch.Tensor,
        *,
        cu_seqlens_q: torch.Tensor | None = None,
        seqused_q: torch.Tensor | None = None,
        cu_seqlens_k_new: torch.Tensor | None = None,
        leftpad_k: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Refresh the metadata for a batch of `cache_seqlens.shape[0]` sequences and return it.

        Exactly one launch on the current stream; no allocation, no synchronisation, no copy, so it can be captured
        into a CUDA graph and follows the lengths at each replay. The tensor is a view of the plan's own buffer.
        A plan that is one of several in a `MetadataPlans` refreshes all of them.
        Raises `TypeError` or `ValueError` before the launch for lengths that the plan was not made for.
        """
        made = self._group.update(
            cache_seqlens,
            cu_seqlens_q=cu_seqlens_q,
            seqused_q=seqused_q,
            cu_seqlens_k_new=cu_seqlens_k_new,
            leftpad_k=leftpad_k,
        )
        return made[self._place]

    def warm_up(self, batch_sizes: Iterable[int] | None = None, dtype: torch.dtype = torch.int32) -> None:
        """Compile and plan ahead of time: see `MetadataPlans.warm_up`."""
        self._group.warm_up(batch_sizes, dtype)

    @property
    def metadata(self) -> torch.Tensor:
        """What the last `update` made. Raises `RuntimeError` before the first one."""
        return self._group._current().views[self._place]

    def forward_arguments(self, **call: Any) -> dict[str, Any]:
        """What to add to the forward's arguments: scheduler_metadata, num_splits, pack_gqa, sm_margin.

        For vLLM, whose front end takes no pack_gqa and sm_margin, the first two; up to vLLM 0.9.1, which takes no
        num_splits either, the first, and `call` must be given.

        `call` are the forward's own arguments by name (q, k_cache, v_cache, page_table, causal, ...). Given any,
        the call is compared with what the metadata was made for, and a `ValueError` names the first difference, or an
        argument whose effect on the schedule is not known. Where the call says `num_splits` itself, what is returned
        here replaces it: `forward(**call | plan.forward_arguments(**call))`, which is `run`.
        """
        metadata = self.metadata
        if not call and "num_splits" in self._not_taken:
            raise ValueError(f"call must be given for {self.build}, whose forward finds its bound on splits itself")
        if call:
            self._check_call(ForwardCall.read(call), metadata)
        ours = {
            "scheduler_metadata": metadata,
            "num_splits": self.num_splits,
            "pack_gqa": self.pack_gqa,
            "sm_margin": self.sm_margin,
        }
        return {name: value for name, value in ours.items() if name not in self._not_taken}

    def run(self, forward: Callable[..., Any], /, **call: Any) -> Any:
        """`forward(**call)` with this plan's metadata and numbers in the place of the call's own.

        Raises what `forward_arguments` raises, before `forward` is called.
        """
        return forward(**call | self.forward_arguments(**call))

    def _check_call(self, call: ForwardCall, metadata: torch.Tensor) -> None:
        if reason := call.unsupported_reason():
            raise ValueError(f"the forward must be one that the metadata is made for, got a call with {reason}")
        resolved = self.resolved(self._group.batch_size)
        asked = call.problem(self.problem.arch, self.problem.num_sms, counts_queries=False)
        if metadata.device != call.device:
            raise ValueError(f"q must be on {metadata.device} like the plan, got {call.device}")
        lengths = call.lengths()
        ragged = lengths.cu_seqlens_k_new is not None
        if (resolved, asked, ragged) not in self._fitting:
            self._check_problem(resolved, asked, ragged)
            if len(self._fitting) >= _MOST_FITTING:
                self._fitting.clear()
            self._fitting.add((resolved, asked, ragged))  # layers ask the same every step
        lengths.check(resolved.batch_size)

    def _check_problem(self, resolved: ResolvedCall, asked: Problem, ragged: bool) -> None:
        made, made_plan = resolved.problem, resolved.plan
        if ragged != ("cu_seqlens_k_new" in self.varying):
            wanted = "a tensor" if "cu_seqlens_k_new" in self.varying else "None"
            raise ValueError(f"cu_seqlens_k_new must be {wanted}, which the metadata was made for")
        if ragged and made.max_seqlen_k_new:
            made = replace(made, max_seqlen_k_new=1)  # as ForwardCall says it: that there are any is what counts
        for field in fields(Problem):
            wanted, got = getattr(made, field.name), getattr(asked, field.name)
            if field.name in _NOT_COMPARED:
                continue
            if wanted != got:
                raise ValueError(f"{field.name} must be {wanted}, which the metadata was made for, got {got}")
        if asked.max_seqlen_k > made.max_seqlen_k:
            raise ValueError(
                f"page_table (or the unpaged cache) must hold at most max_seqlen_k = {made.max_seqlen_k} tokens, "
                f"which the plan was made for, got {asked.max_seqlen_k}"
            )
        told: dict[str, Any] = {
            "num_splits": made_plan.layout.num_splits,
            "pack_gqa": made_plan.pack_gqa,
            "sm_margin": self.sm_margin,
        }
        asked = replace(asked, **{name: value for name, value in told.items() if name not in self._not_taken})
        seen = make_plan(asked, self._rules)
        for name in ("is_causal", "is_local", "block_m", "block_n", "layout"):
            wanted, got = getattr(made_plan, name), getattr(seen, name)
            if wanted != got:
                raise ValueError(
                    f"causal, window_size and max_seqlen_k must give the schedule that the metadata was made for "
                    f"({name} {wanted}), got causal={asked.causal}, window_size={asked.window_size}, "
                    f"max_seqlen_k={asked.max_seqlen_k} ({name} {got})"
                )


def _indexed(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
