"""What came before, kept so that the next call costs little: the launch plans, launches and calls of a kind of layers.

A `Schedules` is all that calls of one kind share, whichever way they come: by the function, the wrapper or a plan. `at`
gives the `Step` of a batch size and a max_seqlen_k, which writes; steps that differ in their sizes alone share a
`_Family`, its launch plans and its launches. `Again` keeps whole launches, of calls whose every argument came before.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from . import trace
from .arguments import LengthTensors
from .triton_kernels.builds import FA3Rules, untellable_reason
from .triton_kernels.plan import LaunchPlan, make_plan, plan_like, sizes_alone_differ
from .triton_kernels.problem import Problem, unchecked_replace
from .triton_kernels.reference import Lengths, reference_metadata

if TYPE_CHECKING:
    from .triton_kernels.launch import Launch

_MOST_STEPS, _MOST_FAMILIES, _MOST_AGAIN = 1024, 8, 1024


class _Family:
    """Problems and launch plans at one pair of sizes, which serve all sizes where nothing else differs."""

    def __init__(self, problems: tuple[Problem, ...], rules: Sequence[FA3Rules]) -> None:
        for problem, its_rules in zip(problems, rules, strict=True):
            if reason := untellable_reason(its_rules, problem):
                raise ValueError(reason)
        self.problems, self.plans = problems, tuple(map(make_plan, problems, rules))
        self._both = tuple(zip(self.plans, problems, strict=True))
        self._served: int | None = None  # the latest max_seqlen_k
        self._sized: tuple[int, tuple[int, ...]] = (-1, ())  # the latest batch size, and its sizes
        self.launches: dict[tuple[int, int, int], Launch] = {}  # by launch shape
        self.shaped_by: tuple[bool, bool, str] | None = None  # see launch.shaped_by, whose kernels may not import
        self.latest: tuple[int, Launch] | None = None  # and its batch size; max_seqlen_k is none of its arguments

    def sizes_for(self, batch_size: int) -> tuple[int, ...]:
        """Elements of each group's metadata."""
        if batch_size != self._sized[0]:
            self._sized = batch_size, tuple([plan.layout.size_for(batch_size) for plan in self.plans])
        return self._sized[1]

    def serves(self, batch_size: int, max_seqlen_k: int | None) -> bool:
        for plan, problem in self._both:
            longest = problem.max_seqlen_k if max_seqlen_k is None else max_seqlen_k
            if not sizes_alone_differ(plan, problem, batch_size, longest, self._served):
                return False
        self._served = max_seqlen_k
        return True


class Step:
    """The metadata of each group of layers at one pair of sizes. Tensors given to it must have been checked."""

    views: tuple[torch.Tensor, ...] = ()  # of a plan's buffer
    pointers: tuple[torch.Tensor, ...] = ()  # the kernel's, to write those
    _launch: Launch | None = None

    def __init__(self, family: _Family, batch_size: int, max_seqlen_k: int | None) -> None:
        self.family, self.batch_size, self.max_seqlen_k = family, batch_size, max_seqlen_k
        self.sizes = family.sizes_for(batch_size)  # elements of the metadata of each group
        self._planned: dict[int, tuple[Problem, LaunchPlan]] = {}

    def planned(self, group: int = 0) -> tuple[Problem, LaunchPlan]:
        """Problem and launch plan of a group of layers at these sizes; a launch that is shared needs neither."""
        if (found := self._planned.get(group)) is None:
            problem, plan = self.family.problems[group], self.family.plans[group]
            longest = problem.max_seqlen_k if self.max_seqlen_k is None else self.max_seqlen_k
            if (self.batch_size, longest) != (problem.batch_size, problem.max_seqlen_k):
                plan = plan_like(plan, problem, self.batch_size, longest)
                problem = unchecked_replace(problem, batch_size=self.batch_size, max_seqlen_k=longest)
            found = self._planned[group] = problem, plan
        return found

    def write(self, pointers: tuple[torch.Tensor, ...], tensors: LengthTensors) -> None:
        """Into `pointers[0]`, of a single group: by the kernel on CUDA, by the NumPy model on CPU."""
        if pointers[0].device.type == "cpu":
            self.write_on_host(pointers, tensors)
        else:
            self.launch(pointers, tensors)

    def write_on_host(self, outs: Sequence[torch.Tensor], tensors: LengthTensors) -> None:
        """By the NumPy model, into a tensor for each group; synchronises with CUDA tensors."""
        if trace.current is not None:
            self._trace(tensors)
        lengths = host_lengths(tensors)
        for group, out in enumerate(outs):
            out.copy_(torch.from_numpy(reference_metadata(*self.planned(group), lengths)))

    def launch(self, pointers: tuple[torch.Tensor, ...], tensors: LengthTensors) -> None:
        """One launch of the Triton kernel on the current stream. Raises `RuntimeError` where it cannot run.

        `pointers` are (out,) for a single group, else (out, table): see launch.metadata_launch, layer_groups_launch.
        """
        if trace.current is not None:
            self._trace(tensors)
        device, launch = pointers[0].device, self._launch
        if launch is None:
            launch = self._launch = self._make_launch(load_launch(device))
        # The tensors have made CUDA's context, so that it may be asked directly.
        if device.type == "cuda" and device.index != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                launch(pointers, tensors.pointers())
        else:
            launch(pointers, tensors.pointers())

    def _trace(self, tensors: LengthTensors) -> None:
        for group, plan in enumerate(self.family.plans):
            trace.record(self.planned(group)[0], tensors, plan.rules)

    def _make_launch(self, kernels: Any) -> Launch:
        family = self.family
        if family.latest is None or family.latest[0] != self.batch_size:
            family.latest = self.batch_size, self._launch_of_shape(kernels)
        return family.latest[1]

    def _launch_of_shape(self, kernels: Any) -> Launch:
        family = self.family
        if family.shaped_by is None:
            family.shaped_by = kernels.shaped_by(family.plans, family.problems[0].gpu)
        shape = kernels.launch_shape(self.batch_size, *family.shaped_by)
        if (like := family.launches.get(shape)) is not None:
            return like.for_batch(self.batch_size)
        problem, plan = self.planned()
        if len(family.plans) == 1:
            made: Launch = kernels.metadata_launch(problem, plan)
        else:
            made = kernels.layer_groups_launch(problem, [self.planned(i)[1] for i in range(len(family.plans))])
        family.launches[shape] = made
        return made

    def repeat(self, pointers: tuple[torch.Tensor, ...], tensors: LengthTensors) -> Callable[[], bool] | None:
        """`launch` of the same again; None before the first. It answers whether it could: see Launch.repeat."""
        return None if self._launch is None else self._launch.repeat(pointers, tensors.pointers())


class Schedules:
    """One or more groups of layers over the same lengths, at any sizes."""

    def __init__(self, at: Callable[[int, int | None], tuple[Problem, ...]], rules: Sequence[FA3Rules]) -> None:
        """`at` gives the groups' problems at a batch size and a max_seqlen_k (None: each group's own)."""
        self._problems_at, self._rules = at, tuple(rules)
        self._families: list[_Family] = []  # the latest in use comes last
        self.steps: dict[tuple[int, int | None], Step] = {}  # by their sizes
        self.again = Again()  # launches on the caller's own tensors

    def at(self, batch_size: int, max_seqlen_k: int | None = None) -> Step:
        """The step of these sizes, without planning anew where another one's plans serve.

        Raises `ValueError` for what the build has no kernels for, or what its forward could not be told.
        """
        sizes = (batch_size, max_seqlen_k)
        if (step := self.steps.get(sizes)) is None:
            families = self._families
            serves = families and families[-1].serves(batch_size, max_seqlen_k)
            family = families[-1] if serves else self._family(batch_size, max_seqlen_k)
            step = Step(family, batch_size, max_seqlen_k)
            keep(self.steps, _MOST_STEPS, sizes, step)
        return step

    def _family(self, batch_size: int, max_seqlen_k: int | None) -> _Family:
        families = self._families
        found = next((one for one in families if one.serves(batch_size, max_seqlen_k)), None)
        if found is None:
            found = _Family(self._problems_at(batch_size, max_seqlen_k), self._rules)
        self._families = [*[one for one in families if one is not found][1 - _MOST_FAMILIES :], found]
        return found


class Again:
    """Launches by all that a call depends on, kept from its second time on: an engine's buffers stay where they are."""

    def __init__(self) -> None:
        self.known: dict[Hashable, tuple[Callable[[], bool], Any] | None] = {}  # None: came once, perhaps never again

    def __call__(self, key: Hashable) -> Any:
        """What was remembered with a launch, which has just been made again; None: there is none, or it could not."""
        if trace.current is not None:  # which sees launches that are made the long way
            return None
        known = self.known.get(key)
        return known[1] if known is not None and known[0]() else None

    def remember(
        self, key: Hashable, step: Step, pointers: tuple[torch.Tensor, ...], tensors: LengthTensors, what: Any
    ) -> None:
        """That a launch came, and what to answer when it comes again. `key` must tell the tensors' places."""
        if key not in self.known:
            keep(self.known, _MOST_AGAIN, key, None)
        elif (launch := step.repeat(pointers, tensors)) is not None:
            self.known[key] = launch, what

    def forget(self) -> None:
        self.known.clear()


def schedules_of(problem: Problem, rules: FA3Rules) -> Schedules:
    """The schedules of the kind of calls that differ from `problem` in their sizes alone: the same object each time."""
    return _schedules_of(unchecked_replace(problem, batch_size=0, max_seqlen_k=0), rules)


@lru_cache(maxsize=1024)
def _schedules_of(problem: Problem, rules: FA3Rules) -> Schedules:
    return Schedules(
        lambda batch, longest: (unchecked_replace(problem, batch_size=batch, max_seqlen_k=longest),), [rules]
    )


@lru_cache(maxsize=4096)
def step_of(problem: Problem, rules: FA3Rules) -> Step:
    """The step of one checked problem. Raises what `Schedules.at` raises."""
    return schedules_of(problem, rules).at(problem.batch_size, problem.max_seqlen_k)


def place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """All of a tensor that a launch depends on. An address tells the device, too."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def keep(known: dict[Any, Any], most: int, key: Hashable, value: object) -> None:
    """Into a dictionary that is emptied when it is full."""
    if len(known) >= most:
        known.clear()
    known[key] = value


def load_launch(device: torch.device) -> Any:
    """The module triton_kernels.launch. Raises `RuntimeError` where its kernels cannot run on `device`."""
    global _launch_module
    if _launch_module is None:
        try:
            from .triton_kernels import launch as _launch_module
        except ImportError as error:
            raise RuntimeError(
                f'backend="triton" needs Triton, and its kernels do not import: {error}; backend="reference" does not'
            ) from error
    if device.type == "cpu" and not _launch_module.INTERPRETED:
        raise RuntimeError(
            'backend="triton" runs on CPU tensors only in Triton\'s interpreter: set TRITON_INTERPRET=1 before '
            'triton is imported, or use backend="reference"'
        )
    return _launch_module


_launch_module: Any = None


def host_lengths(tensors: LengthTensors) -> Lengths:
    """The lengths as NumPy arrays; synchronises with CUDA tensors."""
    arrays: dict[str, Any] = {field.name: getattr(tensors, field.name) for field in fields(Lengths)}
    arrays = {name: None if tensor is None else tensor.detach().cpu().numpy() for name, tensor in arrays.items()}
    return Lengths(**arrays)
