"""sgl-kernel 0.3.20 and 0.3.21 under a torch that is newer than the 2.9.1 they were built for.

Since then tensors have three more virtual functions. Where these wheels ask a tensor whether it has storage, another
function answers, and of the address of the tensor's strides, which that one returns, the lowest byte is taken for
yes or no. So one tensor in sixteen, depending on where it was allocated, "doesn't have storage", and the call raises.

`avoid_misread_tensors()` lets their forward see no such tensor. It changes nothing else, and is for tests and checks
alone: for serving, install the torch that the wheel asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from fa3_metadata.detect import installed_version

_STRIDES = 0x70  # bytes from the start of a TensorImpl to the strides of up to five dimensions
_MESSAGE = "doesn't have storage"
_ROOM, _TRIES = 48, 20
_kept: list[torch.Tensor] = []  # so that nothing else is allocated where they are


def is_misread(tensor: torch.Tensor) -> bool:
    return (tensor._cdata + _STRIDES) % 256 == 0


def readable(tensor: torch.Tensor, misread: list[torch.Tensor]) -> torch.Tensor:
    """The tensor, or another one of the same memory. What could not be used is added to `misread`."""
    while is_misread(tensor):
        misread.append(tensor)  # while it lives, the next one lies elsewhere
        tensor = tensor.detach()
    return tensor


def keep_misread_places() -> None:
    """Take such places from those where the next tensors are likely to be allocated, which have just been freed."""
    base = torch.empty(0)
    room = [base.detach() for _ in range(_ROOM)]
    _kept.extend(tensor for tensor in room if is_misread(tensor))


def avoid_misread_tensors() -> bool:
    """Let the installed sgl-kernel's forward see no such tensor, from now on; whether there is need."""
    version = installed_version("sgl-kernel")
    if version is None or torch.__version__.startswith("2.9."):
        return False
    import_module("sgl_kernel.flash_attn")
    forward: Any = torch.ops.sgl_kernel.fwd.default
    if not hasattr(forward, "unguarded_op"):
        forward.unguarded_op = forward._op
        forward._op = partial(_guarded, forward._op)
    return True


def _guarded(op: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    misread: list[torch.Tensor] = []
    given = [readable(one, misread) if isinstance(one, torch.Tensor) else one for one in arguments]
    for _ in range(_TRIES):  # what it allocates itself may still be misread: then it raises before it does anything
        keep_misread_places()
        try:
            return op(*given, **named)
        except RuntimeError as error:
            if _MESSAGE not in str(error):
                raise
    return op(*given, **named)
