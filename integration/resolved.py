"""A checked call and its launch plan, ready to write metadata as often as asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from .arguments import LengthTensors
from .triton_kernels.builds import FA3Rules
from .triton_kernels.plan import LaunchPlan, make_plan, plan_like
from .triton_kernels.problem import Problem, unchecked_replace
from .triton_kernels.reference import Lengths, reference_metadata

if TYPE_CHECKING:
    from .triton_kernels.launch import Launch


class ResolvedCall:
    """Writes the metadata of one problem; tensors given to it must have been checked."""

    def __init__(self, problem: Problem, plan: LaunchPlan) -> None:
        self.problem, self.plan = problem, plan
        self._launch: Launch | None = None
        self._like: ResolvedCall | None = None  # of other sizes, whose launch this one can share

    def like_this(self, batch_size: int, max_seqlen_k: int) -> ResolvedCall | None:
        """The same for other sizes, without planning anew; None where that changes more than the sizes."""
        plan = plan_like(self.plan, self.problem, batch_size, max_seqlen_k)
        if plan is None:
            return None
        problem = unchecked_replace(self.problem, batch_size=batch_size, max_seqlen_k=max_seqlen_k)
        made = ResolvedCall(problem, plan)
        made._like = self
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
        kernels = load_launch(out.device)
        if self._launch is None:
            like = None if self._like is None else self._like._launch
            self._launch = kernels.metadata_launch(self.problem, self.plan, like)
        on_device(out.device, self._launch, (out,), tensors.pointers())

    def repeat(self, tensors: LengthTensors, out: torch.Tensor) -> Callable[[], bool] | None:
        """`launch` of the same again; None before the first. It answers whether it could: see Launch.repeat."""
        return None if self._launch is None else self._launch.repeat((out,), tensors.pointers())


@lru_cache(maxsize=4096)
def resolve(problem: Problem, rules: FA3Rules) -> ResolvedCall:
    """The resolved call of `problem` under `rules`, the same object each time: it knows its compiled kernel."""
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
            raise RuntimeError(f'backend="triton" needs Triton, which does not import here: {error}') from error
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
