"""Plan once, run many: metadata of one or several groups of layers, refreshed in place by one launch a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from . import trace
from .arguments import LengthTensors, make_problem
from .calls import ForwardCall
from .installed import resolve_build
from .schedules import Schedules, Step, keep, load_launch
from .triton_kernels.builds import MAX_DYNAMIC_SPLIT_BATCH
from .triton_kernels.invariance import VarianceError
from .triton_kernels.layout import padded
from .triton_kernels.plan import LaunchPlan, batch_sizes_of_other_plans, make_plan
from .triton_kernels.problem import DEFAULT_PARTIAL_BYTES, Problem, checked_int, unchecked_replace

# Fields of a problem in which a forward may differ: FA3 comes to the same, or they are ours alone.
_NOT_COMPARED = {
    "max_seqlen_k", "window_size", "causal", "num_splits", "pack_gqa", "sm_margin",
    "policy", "batch_invariant", "max_partial_bytes", "gpu", "forward_is_told",
}  # fmt: skip
_MOST_FITTING = 1024
_ONE_OF_EACH_KERNEL = (1, 32, 64, 128, 256, 512, 992, 1984, 1985)  # launch.launch_shape; with splits and without
_FIRST_OF_EACH_GROUP = (33, 65, 129, 257, 513)
# Buffers that a CUDA graph writes to: the graph knows only their addresses, so they are never freed.
_captured: list[torch.Tensor] = []
VARYING = ("cu_seqlens_q", "seqused_q", "cu_seqlens_k_new", "leftpad_k")


class MetadataPlan:
    """The scheduler metadata of layers that attend alike, kept in one buffer and refreshed once a step.

    Everything static is fixed here: FA3's `num_splits`, `pack_gqa` and tile are resolved, once for each batch size, and
    the forward is handed the same numbers, so the two sides cannot disagree. `update` refreshes the buffer with one
    launch; `forward_arguments` gives what the forward needs and refuses a forward that the metadata was not made for.

    The arguments that are not listed are those of `get_scheduler_metadata`, and so is what is raised for mistakes.

    Args:
        max_batch_size: the largest batch; the buffer is allocated for it.
        max_seqlen_k: the width of the forward's page table in tokens (`page_table.shape[1] * page_size`), or the
            length of its unpaged cache.
        device: where the lengths will be.
        varying: the optional tensors that every `update` will be given: names among "cu_seqlens_q", "seqused_q",
            "cu_seqlens_k_new" and "leftpad_k".
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
        try:
            make_plan(self.problem, self._rules)
        except VarianceError as error:
            name = "max_batch_size" if error.argument == "batch_size" else error.argument
            raise VarianceError(name, error.reason) from None
        largest_served = min(max_batch_size, self._rules.most_split_by_metadata)
        served = make_plan(replace(self.problem, batch_size=largest_served), self._rules)
        if served.costs is not None and "num_splits" not in self._not_taken:  # "balanced": one bound for every batch
            self._bound = served.num_splits
        self._fitting: dict[tuple[int, Problem, bool], None] = {}  # batch sizes and forwards that were found to fit
        self.sm_margin = sm_margin
        # Layouts of batches with dynamic splits may have a row more.
        some = {min(batch, self.max_batch_size) for batch in (1, MAX_DYNAMIC_SPLIT_BATCH, self.max_batch_size)}
        rows = max(len(make_plan(self.problem_of(batch), self._rules).layout.row_names) for batch in some)
        self.capacity = rows * padded(self.max_batch_size) + 1
        self._place = 0  # in its group
        self._group = MetadataPlans([self])
        self.planned(self.max_batch_size)

    def problem_of(self, batch_size: int) -> Problem:
        """What the metadata of a batch of this size is asked for."""
        bound = self._bound if batch_size <= self._rules.most_split_by_metadata else self.problem.num_splits
        return unchecked_replace(self.problem, batch_size=batch_size, num_splits=bound)

    def planned(self, batch_size: int) -> tuple[Problem, LaunchPlan]:
        """Problem and launch plan of a batch of this size."""
        return self._group._schedules.at(batch_size).planned(self._place)

    @property
    def num_splits(self) -> int:
        """What the forward is told for the batch of the last update; before the first, for the largest batch."""
        return self._latest.layout.num_splits

    @property
    def pack_gqa(self) -> bool:
        """Whether the forward is told to pack q heads, for the same batch."""
        return self._latest.pack_gqa

    @property
    def _latest(self) -> LaunchPlan:
        step = self._group._step or self._group._schedules.at(self.max_batch_size)
        return step.planned(self._place)[1]

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
        batch_size = self._group.batch_size
        asked = call.problem(self.problem.arch, self.problem.num_sms, counts_queries=False)
        if metadata.device != call.device:
            raise ValueError(f"q must be on {metadata.device} like the plan, got {call.device}")
        lengths = call.lengths()
        ragged = lengths.cu_seqlens_k_new is not None
        if (batch_size, asked, ragged) not in self._fitting:
            self._check_problem(batch_size, asked, ragged)
            keep(self._fitting, _MOST_FITTING, (batch_size, asked, ragged), None)  # layers ask the same every step
        lengths.check(batch_size)

    def _check_problem(self, batch_size: int, asked: Problem, ragged: bool) -> None:
        made, made_plan = self.planned(batch_size)
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


class MetadataPlans:
    """Several plans over the same lengths, refreshed together by a single launch.

    For models whose layers attend in different ways: full and sliding-window layers, or different head counts.
    The plans must share device, query length, appended keys and the tensors that vary; after `update` each gives its
    own `forward_arguments`.
    """

    def __init__(self, plans: Sequence[MetadataPlan]) -> None:
        if not plans:
            raise ValueError("plans must hold at least one MetadataPlan, got none")
        self.plans = tuple(plans)
        first = self.plans[0]
        for plan in self.plans:
            if len(self.plans) > 1 and (self.plans.count(plan) > 1 or len(plan._group.plans) > 1):
                raise ValueError(
                    "plans must be in one MetadataPlans alone, and once, got one that is in another or twice"
                )
            for name in ("device", "varying"):
                if getattr(plan, name) != getattr(first, name):
                    raise ValueError(f"plans must share {name}, got {getattr(first, name)} and {getattr(plan, name)}")
            for name in ("max_seqlen_q", "max_seqlen_k_new"):
                ours, theirs = getattr(plan.problem, name), getattr(first.problem, name)
                if ours != theirs:
                    raise ValueError(f"plans must share {name}, got {theirs} and {ours}")
        self.max_batch_size = min(plan.max_batch_size for plan in self.plans)
        starts = [0]
        for plan in self.plans:
            starts.append(starts[-1] + padded(plan.capacity))
        self._starts = starts[:-1]
        self._buffer = torch.empty(starts[-1], dtype=torch.int32, device=first.device)
        self._memory = self._buffer.data_ptr(), self._buffer.data_ptr() + self._buffer.nbytes
        self._on_cpu = first.device.type == "cpu"
        self._schedules = Schedules(self._problems_at, [plan._rules for plan in self.plans])
        self._again = self._schedules.again
        self._known = self._again.known
        self._step: Step | None = None
        self._kept = False
        self._tables, self._table_of = self._make_tables()
        for number, plan in enumerate(self.plans):
            plan._group, plan._place = self, number

    def _problems_at(self, batch_size: int, _max_seqlen_k: int | None) -> tuple[Problem, ...]:
        return tuple(plan.problem_of(batch_size) for plan in self.plans)

    @property
    def batch_size(self) -> int:
        """Sequences of the last update."""
        return self._current().batch_size

    def metadata(self, plan: MetadataPlan) -> torch.Tensor:
        """What the last update made for `plan`."""
        return self._current().views[self.plans.index(plan)]

    def _current(self) -> Step:
        if self._step is None:
            raise RuntimeError("there is no metadata yet: call update() with the step's lengths first")
        return self._step

    def update(
        self,
        cache_seqlens: torch.Tensor,
        *,
        cu_seqlens_q: torch.Tensor | None = None,
        seqused_q: torch.Tensor | None = None,
        cu_seqlens_k_new: torch.Tensor | None = None,
        leftpad_k: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """`MetadataPlan.update` for all plans at once; returns the metadata of each."""
        key, alone = None, cu_seqlens_q is seqused_q is cu_seqlens_k_new is leftpad_k is None
        if isinstance(cache_seqlens, torch.Tensor):
            # `place` and Again's call written out: a step's time on the host is mostly this.
            key = cache_seqlens.data_ptr(), cache_seqlens.shape, cache_seqlens.stride(), cache_seqlens.dtype
            if alone and (known := self._known.get(key)) is not None and trace.current is None and known[0]():
                self._keep_if_captured()
                self._step = step = known[1]
                return step.views
        tensors = LengthTensors(cache_seqlens, cu_seqlens_q, None, cu_seqlens_k_new, seqused_q, leftpad_k)
        step = self._at(self._checked_batch_size(tensors, alone))
        if self._on_cpu:
            step.write_on_host(step.views, tensors)
        else:
            step.launch(step.pointers, tensors)
        self._keep_if_captured()
        self._step = step
        if not self._on_cpu and not self.plans[0].varying:
            self._again.remember(key, step, step.pointers, tensors, step)
        return step.views

    def warm_up(self, batch_sizes: Iterable[int] | None = None, dtype: torch.dtype = torch.int32) -> None:
        """Compile the kernels and plan the launches of batches ahead of time, so that no step waits for that.

        Launches on the current stream, on lengths of its own; not while a graph is captured. Call `update` afterwards.

        Args:
            batch_sizes: what will come; None: one size for each kernel that batches up to the largest need.
            dtype: of the lengths that will come; kernels are compiled for it.
        """
        sizes = {*_ONE_OF_EACH_KERNEL, *self._sizes_around_other_plans()} if batch_sizes is None else batch_sizes
        for batch_size in {min(checked_int("batch_sizes", size, 0), self.max_batch_size) for size in sizes}:
            lengths = {
                name: torch.zeros(batch_size + name.startswith("cu_"), dtype=dtype, device=self._buffer.device)
                for name in ("cache_seqlens", *self.plans[0].varying)
            }
            self.update(**lengths)
        self._step = None
        self._again.forget()

    def _checked_batch_size(self, tensors: LengthTensors, alone: bool) -> int:
        """Of lengths that fit the plans; `alone`: cache_seqlens, without the others."""
        first = self.plans[0]
        if not isinstance(tensors.cache_seqlens, torch.Tensor) or tensors.cache_seqlens.dim() != 1:
            raise TypeError(f"cache_seqlens must be a 1-D tensor, got {tensors.cache_seqlens!r}")
        batch_size = tensors.cache_seqlens.shape[0]
        if batch_size > self.max_batch_size:
            raise ValueError(
                f"cache_seqlens must hold at most max_batch_size = {self.max_batch_size} sequences, got {batch_size}"
            )
        tensors.check(batch_size)
        if tensors.cache_seqlens.device != first.device:
            raise ValueError(f"cache_seqlens must be on {first.device}, got {tensors.cache_seqlens.device}")
        if (name := tensors.overlapping(*self._memory)) is not None:
            raise ValueError(f"{name} must not lie in the plan's own buffer, which is written while it is read")
        if alone and not first.varying:
            return batch_size
        for name in VARYING:
            tensor = getattr(tensors, name)
            if (tensor is not None) != (name in first.varying):
                wanted = "a tensor" if name in first.varying else "None"
                raise ValueError(f"{name} must be {wanted}, as `varying` says, got {type(tensor).__name__}")
        return batch_size

    def _at(self, batch_size: int) -> Step:
        """The step of this batch size, with its part of the buffer."""
        step = self._schedules.at(batch_size)
        if not step.views:
            parts = zip(self._starts, step.sizes, strict=True)
            step.views = step.pointers = tuple([self._buffer[start : start + size] for start, size in parts])
            if self._tables is not None:
                step.pointers = self._buffer, self._tables[self._table_of[_numbers_of(step)]]
        return step

    def _sizes_of_other_plans(self) -> list[int]:
        """Batch sizes among which is one of each set of numbers and of each way to split."""
        found = {size for plan in self.plans for size in batch_sizes_of_other_plans(plan.problem, plan._rules)}
        return sorted({min(size, self.max_batch_size) for size in found})

    def _sizes_around_other_plans(self) -> set[int]:
        """For `warm_up`: where splits depend on the batch, these, the last before each, and the first of each shape."""
        if not any(plan._rules.bound_depends_on_batch for plan in self.plans):
            return set()
        others = self._sizes_of_other_plans()
        return {*others, *(size - 1 for size in others if size), *_FIRST_OF_EACH_GROUP}

    def _make_tables(self) -> tuple[torch.Tensor | None, dict[tuple[Any, ...], int]]:
        """The numbers of the plans on the device, for every batch size ahead of a capture; and which are whose."""
        if len(self.plans) == 1 or self._on_cpu:
            return None, {}
        tables: dict[tuple[Any, ...], torch.Tensor] = {}
        make = load_launch(self._buffer.device).layer_groups_table
        for batch_size in self._sizes_of_other_plans():
            step = self._schedules.at(batch_size)
            plans = [step.planned(number)[1] for number in range(len(self.plans))]
            tables.setdefault(_numbers_of(step), make(plans, self._starts))
        on_device = torch.stack(list(tables.values())).to(self._buffer.device)
        return on_device, {numbers: place for place, numbers in enumerate(tables)}

    def _keep_if_captured(self) -> None:
        if self._kept or self._on_cpu or not torch.cuda.is_current_stream_capturing():
            return
        self._kept = True
        _captured.extend(tensor for tensor in (self._buffer, self._tables) if tensor is not None)


def _numbers_of(step: Step) -> tuple[Any, ...]:
    """What tells the tables of a group's plans apart.

    All other numbers follow from these, but for those of batches that have no splits, which no kernel reads then.
    """
    return tuple([(plan.num_splits, plan.pack_gqa) for plan in step.family.plans])


def _indexed(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
