"""sgl-kernel, and vLLM up to 0.16, under a torch that is newer than the 2.9 or older that they were built for.

Since torch 2.10 tensors have three more virtual functions. Where these wheels ask a tensor whether it has storage,
another function answers, and of the address of the tensor's strides, which that one returns, the lowest byte is taken
for yes or no. So one tensor in sixteen, depending on where it was allocated, "doesn't have storage", and the call
raises.

`avoid_misread_tensors()` lets their ops see no such tensor. It changes nothing else, and is for tests and checks
alone: for serving, install the torch that the wheel asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from fa3_metadata.installed import PROVIDERS, installed_version
from fa3_metadata.triton_kernels.builds import version_key

LAST_FOR_OLDER_TORCH = {"sgl-kernel": "0.3.21", "vllm": "0.16.0"}  # the last version built for torch 2.9

_STRIDES = 0x70  # bytes from the start of a TensorImpl to the strides of up to five dimensions
_MESSAGE = "doesn't have storage"
_ROOM, _TRIES = 48, 60
_kept: list[torch.Tensor] = []  # so that nothing else is allocated where they are


def is_misread(tensor: torch.Tensor) -> bool:
    return (tensor._cdata + _STRIDES) % 256 == 0


def readable(tensor: torch.Tensor, misread: list[torch.Tensor]) -> torch.Tensor:
    """The tensor, or another one of the same memory. What could not be used is added to `misread`."""
    while is_misread(tensor):
        misread.append(tensor)  # while it lives, the next one lies elsewhere
        tensor = tensor.detach()
    return tensor


def keep_misread_places(more: int = 0) -> None:
    """Take such places from those where the next tensors are likely to be allocated, which have just been freed."""
    base = torch.empty(0)
    room = [base.detach() for _ in range(_ROOM + more)]
    _kept.extend(tensor for tensor in room if is_misread(tensor))


def avoid_misread_tensors() -> bool:
    """Let the ops of an installed wheel for an older torch see no such tensor, from now on; whether there is need."""
    if torch.__version__.startswith(("2.7.", "2.8.", "2.9.")):
        return False
    packages = [package for package, last in LAST_FOR_OLDER_TORCH.items() if _is_installed(package, last)]
    for provider in map(PROVIDERS.__getitem__, packages):
        import_module(provider.op_module)
        ops = getattr(torch.ops, provider.op_namespace)
        for name in ("fwd", "get_scheduler_metadata"):
            if hasattr(ops, name):
                packet = getattr(ops, name)
                for op in (packet, packet.default):  # front ends call either
                    if not hasattr(op, "unguarded_op"):
                        op.unguarded_op = op._op
                        op._op = partial(_guarded, op._op)
    return bool(packages)


def _is_installed(package: str, last: str) -> bool:
    version = installed_version(package)
    return version is not None and () < version_key(version) <= version_key(last)


def _guarded(op: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    misread: list[torch.Tensor] = []
    given = [readable(one, misread) if isinstance(one, torch.Tensor) else one for one in arguments]
    named = {name: readable(one, misread) if isinstance(one, torch.Tensor) else one for name, one in named.items()}
    for tried in range(_TRIES):  # what it allocates itself may still be misread: then it raises before it does anything
        keep_misread_places(tried * _ROOM)  # further away each time
        try:
            return op(*given, **named)
        except RuntimeError as error:
            if _MESSAGE not in str(error):
                raise
    return op(*given, **named)
