"""Launching a compiled kernel through the CUDA driver.

Triton's own launch looks up the kernel and checks every pointer with the driver each time, which takes longer than
everything else that a refresh of the metadata does on the host. Here all but the pointers and the stream is laid out
once.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: this thread has not used the GPU yet


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("x", "y", "z", "threads", "threads_y", "threads_z", "shared_bytes")),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("num_attributes", ctypes.c_uint),
    )  # fmt: skip


class DriverLaunch:
    """A kernel with its grid and numbers; `made` is what Triton compiled.

    Args:
        made: the compiled kernel.
        grid: programs in each dimension.
        num_pointers: how many pointers the kernel takes, before all numbers.
        numbers: the numbers, int for int32 and float for float32 parameters.
        early: programmatic dependent launch.
    """

    def __init__(
        self, made: Any, grid: tuple[int, int, int], num_pointers: int, numbers: Sequence[int | float], early: bool
    ) -> None:
        self._function: int = made.function
        self._pointers = (ctypes.c_uint64 * num_pointers)()
        formats = "".join("f" if isinstance(n, float) else "i" for n in numbers)
        self._numbers = ctypes.create_string_buffer(struct.pack(f"<{formats}", *numbers))
        # A kernel may take pointers to scratch memory after its own parameters: this one needs none.
        self._scratch = (ctypes.c_uint64 * 2)()
        pointers, words = ctypes.addressof(self._pointers), ctypes.addressof(self._numbers)
        scratch = ctypes.addressof(self._scratch)
        addresses = [
            *range(pointers, pointers + 8 * num_pointers, 8), *range(words, words + 4 * len(formats), 4),
            scratch, scratch + 8,
        ]  # fmt: skip
        self._parameters = (ctypes.c_void_p * len(addresses))(*addresses)
        self._attribute = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        threads = 32 * made.metadata.num_warps
        self._config = _Config(
            *grid, threads, 1, 1, made.metadata.shared, None, ctypes.pointer(self._attribute), int(early)
        )
        self._where = ctypes.addressof(self._config), ctypes.addressof(self._parameters)
        self._lock = threading.Lock()  # parameters are read from here during the call

    def __call__(self, stream: int, pointers: list[int]) -> bool:
        """Launch; False where this thread has no CUDA context yet. Raises `RuntimeError` for any other failure."""
        config, parameters = self._where
        with self._lock:
            self._pointers[:] = pointers  # type: ignore[assignment]
            self._config.stream = stream
            error = _launch_function()(config, self._function, parameters, None)
        if error and error != _NO_CONTEXT:
            raise RuntimeError(f"cuLaunchKernelEx failed with CUDA error {error}")
        return not error


def can_launch(made: Any) -> bool:
    """Whether `made` is a kernel that DriverLaunch knows how to launch."""
    metadata = getattr(made, "metadata", None)
    return (
        metadata is not None
        and not getattr(metadata, "global_scratch_size", 0)
        and not getattr(metadata, "profile_scratch_size", 0)
        and getattr(metadata, "num_ctas", 1) == 1
        and not getattr(metadata, "launch_cooperative_grid", False)
    )


@lru_cache(maxsize=1)
def _launch_function() -> Any:
    function = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    function.argtypes = (ctypes.c_void_p,) * 4
    function.restype = ctypes.c_int
    return function
