"""From a call's arguments to a checked problem and its tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from .triton_kernels.problem import DEFAULT_GPU, Problem, checked_int

if TYPE_CHECKING:
    from .triton_kernels.launch import LengthPointers

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float8_e4m3fn: "float8_e4m3fn"}
DEFAULT_ARCH, DEFAULT_NUM_SMS = 90, 132  # H100 SXM, H200


class LengthTensors(NamedTuple):
    """The tensors of a call: 1-D, int32 or int64, any stride, one device. b values, or b + 1 for `cu_...`."""

    cache_seqlens: torch.Tensor
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None  # accepted as FA3 does, which never reads it: cache_seqlens wins
    cu_seqlens_k_new: torch.Tensor | None = None
    seqused_q: torch.Tensor | None = None
    leftpad_k: torch.Tensor | None = None

    def _are_more(self) -> bool:
        """Than cache_seqlens, which most calls give alone."""
        none = (
            self.cu_seqlens_q is self.cu_seqlens_k is self.cu_seqlens_k_new is self.seqused_q is self.leftpad_k is None
        )
        return not none

    def pointers(self) -> LengthPointers:
        """The tensors that the kernel reads, in its order."""
        return self.cache_seqlens, self.cu_seqlens_q, self.seqused_q, self.cu_seqlens_k_new, self.leftpad_k

    def overlapping(self, start: int, end: int) -> str | None:
        """The first tensor read that has memory from address `start` up to `end`, by its ends; None: there is none."""
        read = self.pointers() if self._are_more() else (self.cache_seqlens,)
        for place, tensor in enumerate(read):
            if tensor is not None and (first := tensor.data_ptr()) < end and first + _reach(tensor) > start:
                return _READ[place]
        return None

    def check(self, batch_size: int) -> None:
        """Raise `TypeError` or `ValueError` for the first tensor that does not fit a batch of this size."""
        _check("cache_seqlens", self.cache_seqlens, batch_size, self.cache_seqlens)
        if not self._are_more():
            return
        for name, tensor in zip(self._fields[1:], self[1:], strict=True):
            if tensor is not None:
                _check(name, tensor, batch_size + name.startswith("cu_"), self.cache_seqlens)


def _reach(tensor: torch.Tensor) -> int:
    """Bytes from the first element of a 1-D tensor to the end of its last. torch has no negative strides."""
    if tensor.is_contiguous() or not tensor.shape[0]:
        return tensor.nbytes
    return ((tensor.shape[0] - 1) * tensor.stride(0) + 1) * tensor.itemsize


_READ = ("cache_seqlens", "cu_seqlens_q", "seqused_q", "cu_seqlens_k_new", "leftpad_k")  # as `pointers` has them


def _check(name: str, tensor: torch.Tensor, length: int, like: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype is not torch.int32 and tensor.dtype is not torch.int64:
        raise TypeError(f"{name} must have dtype int32 or int64, got {tensor.dtype}")
    if tensor.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), got {tuple(tensor.shape)}")
    if tensor is not like and tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like cache_seqlens, got {tensor.device}")


def dtype_name(qkv_dtype: torch.dtype) -> str:
    """The name of a dtype that FA3 supports; `TypeError` for another."""
    if qkv_dtype not in _DTYPES:
        raise TypeError(f"qkv_dtype must be one of {', '.join(map(str, _DTYPES))}, got {qkv_dtype!r}")
    return _DTYPES[qkv_dtype]


@lru_cache(maxsize=64)
def _cuda_device_facts(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def device_facts(device: torch.device | None, arch: int | None, num_sms: int | None) -> tuple[int, int]:
    """(arch, num_sms): as given, else read from a CUDA device, else those of an H100 SXM or H200."""
    found_arch, found_sms = DEFAULT_ARCH, DEFAULT_NUM_SMS
    if device is not None and device.type == "cuda":
        found_arch, found_sms = _cuda_device_facts(
            torch.cuda.current_device() if device.index is None else device.index
        )
    return (found_arch if arch is None else arch), (found_sms if num_sms is None else num_sms)


@lru_cache(maxsize=64)
def _cuda_device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def gpu_name(device: torch.device | None) -> str:
    """The GPU whose measured tables are used: a CUDA device's, else an H200's."""
    if device is None or device.type != "cuda":
        return DEFAULT_GPU
    return _cuda_device_name(torch.cuda.current_device() if device.index is None else device.index)


def make_problem(
    tensors: LengthTensors | None,
    *,
    batch_size: int,
    qkv_dtype: torch.dtype,
    arch: int | None,
    num_sms: int | None,
    device: torch.device | None = None,
    **static: object,
) -> Problem:
    """The checked problem; `static` are the other fields of `Problem` by name.

    Without `tensors` only sizes are asked, for `device` (None: an H100 SXM or H200).
    """
    batch_size = checked_int("batch_size", batch_size, 0)
    if tensors is not None:
        tensors.check(batch_size)
        device = tensors.cache_seqlens.device
    if device is not None and device.type not in ("cpu", "cuda"):
        raise ValueError(f"cache_seqlens must be on a CUDA or CPU device, got {device}")
    arch, num_sms = device_facts(device, arch, num_sms)
    return Problem(
        batch_size=batch_size,
        qkv_dtype=dtype_name(qkv_dtype),
        arch=arch,
        num_sms=num_sms,
        gpu=gpu_name(device),
        **static,  # type: ignore[arg-type]
    )


def output_tensor(
    out: torch.Tensor | None, size: int, device: torch.device, lengths: LengthTensors | None = None
) -> torch.Tensor:
    """A tensor of `size` elements: the start of `out`, checked, or a new one. It must not overlap `lengths`."""
    if out is None:
        return torch.empty(size, dtype=torch.int32, device=device)
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    if out.dtype != torch.int32:
        raise TypeError(f"out must have dtype int32, got {out.dtype}")
    if out.device != device:
        raise ValueError(f"out must be on {device} like cache_seqlens, got {out.device}")
    if out.dim() != 1 or not out.is_contiguous() or out.shape[0] < size:
        raise ValueError(
            f"out must be a contiguous 1-D tensor of at least {size} elements, "
            f"got shape {tuple(out.shape)} with strides {out.stride()}"
        )
    made = out if out.shape[0] == size else out[:size]
    start = out.data_ptr()
    if lengths is not None and (name := lengths.overlapping(start, start + 4 * size)) is not None:
        raise ValueError(f"out must not overlap {name}, which is read while it is written")
    return made
