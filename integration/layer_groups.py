"""Several plans over the same lengths, refreshed by a single launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .arguments import LengthTensors
from .resolved import ResolvedCall, load_launch, on_device
from .triton_kernels.layout import padded
from .triton_kernels.plan import batch_sizes_of_other_plans
from .triton_kernels.problem import checked_int

if TYPE_CHECKING:
    from .layer_plan import MetadataPlan


class _Step:
    """What is kept for each batch size: the resolved calls, the views of the buffer, the launch for all."""

    def __init__(self, resolved: list[ResolvedCall], views: tuple[torch.Tensor, ...]) -> None:
        self.resolved, self.views = resolved, views
        self.batch_size = resolved[0].batch_size
        self.table: torch.Tensor | None = None  # the numbers of the plans, for several on a GPU
        self.launch: Any = None  # of all of them, likewise


_MOST_REMEMBERED = 1024
_ONE_OF_EACH_KERNEL = (1, 32, 64, 128, 256, 512, 992, 1984, 1985)  # launch.launch_shape; with splits and without
_FIRST_OF_EACH_GROUP = (33, 65, 129, 257, 513)
# Buffers that a CUDA graph writes to: the graph knows only their addresses, so they are never freed.
_captured: list[torch.Tensor] = []


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
        self._on_cpu = first.device.type == "cpu"
        self._tables, self._table_of = self._make_tables()
        self._kept = False
        self._launches: dict[Hashable, Any] = {}  # those that other batch sizes can share
        self._steps: dict[int, _Step] = {}
        self._step: _Step | None = None
        # By address and kind of the lengths; None: seen once, and whether they will come again is not known.
        self._again: dict[Hashable, tuple[_Step, Callable[[], bool]] | None] = {}
        for place, plan in enumerate(self.plans):
            plan._group, plan._place = self, place

    @property
    def batch_size(self) -> int:
        """Sequences of the last update."""
        return self._current().batch_size

    def metadata(self, plan: MetadataPlan) -> torch.Tensor:
        """What the last update made for `plan`."""
        return self._current().views[self.plans.index(plan)]

    def _current(self) -> _Step:
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
        key = None
        if isinstance(cache_seqlens, torch.Tensor):  # an address tells the device, too
            key = (cache_seqlens.data_ptr(), cache_seqlens.shape, cache_seqlens.dtype, cache_seqlens.stride())
            again = self._again.get(key)
            if again is not None and cu_seqlens_q is seqused_q is cu_seqlens_k_new is leftpad_k is None and again[1]():
                self._keep_if_captured()
                self._step = again[0]
                return self._step.views
        given = {
            "cu_seqlens_q": cu_seqlens_q,
            "seqused_q": seqused_q,
            "cu_seqlens_k_new": cu_seqlens_k_new,
            "leftpad_k": leftpad_k,
        }
        tensors = LengthTensors(cache_seqlens, **given)
        batch_size = self._checked_batch_size(tensors, given)
        step = self._steps.get(batch_size) or self._new_step(batch_size)
        if step.table is None:  # a single plan, or on the CPU
            for resolved, view in zip(step.resolved, step.views, strict=True):
                resolved.write(tensors, view)
        else:
            self._launch(tensors, step)
        self._keep_if_captured()
        self._step = step
        self._remember(key, tensors, step)
        return step.views

    def _remember(self, key: Hashable, tensors: LengthTensors, step: _Step) -> None:
        """So that the next update from lengths at the same place need not look at everything again."""
        if self._on_cpu or self.plans[0].varying:
            return
        if key not in self._again:
            if len(self._again) >= _MOST_REMEMBERED:  # an engine keeps its lengths in one place, or a few
                self._again.clear()
            self._again[key] = None
            return
        if step.table is None:
            launch = step.resolved[0].repeat(tensors, step.views[0])
        else:
            launch = step.launch.repeat((self._buffer, step.table), tensors.pointers())
        if launch is not None:
            self._again[key] = step, launch

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
        self._again.clear()

    def _checked_batch_size(self, tensors: LengthTensors, given: Mapping[str, torch.Tensor | None]) -> int:
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
        if (name := tensors.overlapping(self._buffer)) is not None:
            raise ValueError(f"{name} must not lie in the plan's own buffer, which is written while it is read")
        for name, tensor in given.items():
            if (tensor is not None) != (name in first.varying):
                wanted = "a tensor" if name in first.varying else "None"
                raise ValueError(f"{name} must be {wanted}, as `varying` says, got {type(tensor).__name__}")
        return batch_size

    def _new_step(self, batch_size: int) -> _Step:
        resolved = [plan.resolved(batch_size) for plan in self.plans]
        parts = zip(self._starts, resolved, strict=True)
        views = tuple([self._buffer[start : start + one.size] for start, one in parts])
        step = self._steps[batch_size] = _Step(resolved, views)
        if self._tables is not None:
            step.table = self._tables[self._table_of[_numbers_of(resolved)]]
        return step

    def _launch(self, tensors: LengthTensors, step: _Step) -> None:
        if step.launch is None:
            step.launch = self._make_launch(step)
        on_device(self._buffer.device, step.launch, (self._buffer, step.table), tensors.pointers())

    def _make_launch(self, step: _Step) -> Any:
        kernels, roots = load_launch(self._buffer.device), [one.root for one in step.resolved]
        shape = kernels.launch_shape_of([root.plan for root in roots], step.batch_size, roots[0].problem.gpu)
        key = (shape, *roots)
        like = self._launches.get(key)
        if like is not None:
            return like.for_batch(step.batch_size)
        plans = [one.plan for one in step.resolved]
        made = self._launches[key] = kernels.layer_groups_launch(step.resolved[0].problem, plans)
        return made

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
            resolved = [plan.resolved(batch_size) for plan in self.plans]
            tables.setdefault(_numbers_of(resolved), make([one.plan for one in resolved], self._starts))
        on_device = torch.stack(list(tables.values())).to(self._buffer.device)
        return on_device, {numbers: place for place, numbers in enumerate(tables)}

    def _keep_if_captured(self) -> None:
        if self._kept or self._on_cpu or not torch.cuda.is_current_stream_capturing():
            return
        self._kept = True
        _captured.extend(tensor for tensor in (self._buffer, self._tables) if tensor is not None)


def _numbers_of(resolved: Sequence[ResolvedCall]) -> tuple[Any, ...]:
    """What tells the tables of a group's plans apart.

    All other numbers follow from these, but for those of batches that have no splits, which no kernel reads then.
    """
    return tuple((one.root.plan.num_splits, one.root.plan.pack_gqa) for one in resolved)
