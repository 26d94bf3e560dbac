"""A checked call and its launch plan, ready to write metadata as often as asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch

from .arguments import LengthTensors
from .triton_kernels.builds import FA3Rules, untellable_reason
from .triton_kernels.plan import LaunchPlan, make_plan, plan_like, sizes_alone_differ
from .triton_kernels.problem import Problem, unchecked_replace
from .triton_kernels.reference import Lengths, reference_metadata

if TYPE_CHECKING:
    from .triton_kernels.launch import Launch


class ResolvedCall:
    """Writes the metadata of one problem; tensors given to it must have been checked.

    Those of other sizes that are made of one share its launches, and plan nothing that a launch does not need.
    """

    batch_size: int
    max_seqlen_k: int
    size: int  # elements of the metadata
    root: ResolvedCall  # the one that this was made of, or itself
    _launch: Launch | None

    def __init__(self, problem: Problem, plan: LaunchPlan) -> None:
        vars(self).update(problem=problem, plan=plan)
        self.batch_size, self.max_seqlen_k, self.size = problem.batch_size, problem.max_seqlen_k, plan.layout.size
        self.root, self._launch = self, None
        self._launches: dict[tuple[int, int, int], Launch] = {}  # by their shape, for all that are made of this

    @cached_property
    def problem(self) -> Problem:
        return unchecked_replace(self.root.problem, batch_size=self.batch_size, max_seqlen_k=self.max_seqlen_k)

    @cached_property
    def plan(self) -> LaunchPlan:
        return plan_like(self.root.plan, self.root.problem, self.batch_size, self.max_seqlen_k)

    def like_this(self, batch_size: int, max_seqlen_k: int) -> ResolvedCall | None:
        """The same for other sizes, without planning anew; None where that changes more than the sizes."""
        root = self.root
        if not sizes_alone_differ(root.plan, root.problem, batch_size, max_seqlen_k):
            return None
        made = object.__new__(ResolvedCall)
        made.batch_size, made.max_seqlen_k, made.size = batch_size, max_seqlen_k, root.plan.layout.size_for(batch_size)
        made.root, made._launch = root, None
        return made

    def write(self, tensors: LengthTensors, out: torch.Tensor) -> None:
        """By the kernel on CUDA, by the NumPy model on CPU."""
        if out.device.type == "cpu":
            self.write_on_host(tensors, out)
        else:
            self.launch(tensors, out)

    def write_on_host(self, tensors: LengthTensors, out: torch.Tensor) -> None:
        """By the NumPy model; synchronises with CUDA tensors."""
        out.copy_(torch.from_numpy(reference_metadata(self.problem, self.plan, host_lengths(tensors))))

    def launch(self, tensors: LengthTensors, out: torch.Tensor) -> None:
        """By the Triton kernel: one launch on the current stream. Raises `RuntimeError` where it cannot run."""
        launch = self._launch
        if launch is None:
            launch = self._launch = self._make_launch(load_launch(out.device))
        on_device(out.device, launch, (out,), tensors.pointers())

    def _make_launch(self, kernels: Any) -> Launch:
        root = self.root
        if self.batch_size == root.batch_size and root._launch is not None:
            return root._launch  # max_seqlen_k is none of its arguments
        shape = kernels.launch_shape_of([root.plan], self.batch_size, root.problem.gpu)
        like = root._launches.get(shape)
        if like is not None:
            return like.for_batch(self.batch_size)
        made: Launch = kernels.metadata_launch(self.problem, self.plan)
        root._launches[shape] = made
        return made

    def repeat(self, tensors: LengthTensors, out: torch.Tensor) -> Callable[[], bool] | None:
        """`launch` of the same again; None before the first. It answers whether it could: see Launch.repeat."""
        return None if self._launch is None else self._launch.repeat((out,), tensors.pointers())


@lru_cache(maxsize=4096)
def resolve(problem: Problem, rules: FA3Rules) -> ResolvedCall:
    """The resolved call of `problem` under `rules`, the same object each time: it knows its compiled kernel.

    Raises `ValueError` for what that build has no kernels for, or what its forward could not be told.
    """
    if reason := untellable_reason(rules, problem):
        raise ValueError(reason)
    return ResolvedCall(problem, make_plan(problem, rules))


def on_device(device: torch.device, launch: Any, *arguments: Any) -> None:
    """Call `launch` with `device` as the current one."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(*arguments)
    else:
        launch(*arguments)


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
