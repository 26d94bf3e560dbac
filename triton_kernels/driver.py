"""Launching a compiled kernel through the CUDA driver.

Triton's own launch looks up the kernel and checks every pointer with the driver each time, which takes longer than
everything else that a refresh of the metadata does on the host. Here all but the pointers and the stream is laid out
once.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    """A kernel with all numbers but the batch size.

    Args:
        made: the kernel.
        num_pointers: how many pointers the kernel takes, before all numbers.
        strides: numbers before the batch size.
        numbers: the batch size, which each call replaces, and the numbers after it; int for int32 and float for
            float32 parameters.
        early: programmatic dependent launch.
    """

    def __init__(
        self, made: LoadedKernel, num_pointers: int, strides: Sequence[int], numbers: Sequence[int | float], early: bool
    ) -> None:
        self._made_of = made, num_pointers, strides, numbers, early
        self._function = made.function
        self._pointers = (ctypes.c_uint64 * num_pointers)()
        words = (*strides, *numbers)
        formats = "".join("f" if isinstance(word, float) else "i" for word in words)
        self._words = ctypes.create_string_buffer(struct.pack(f"<{formats}", *words))
        self._batch_size = ctypes.c_int32.from_buffer(self._words, 4 * len(strides))
        # A kernel may take pointers to scratch memory after its own parameters: this one needs none.
        self._scratch = (ctypes.c_uint64 * 2)()
        first_pointer, first_word = ctypes.addressof(self._pointers), ctypes.addressof(self._words)
        scratch = ctypes.addressof(self._scratch)
        addresses = [
            *range(first_pointer, first_pointer + 8 * num_pointers, 8),
            *range(first_word, first_word + 4 * len(words), 4), scratch, scratch + 8,
        ]  # fmt: skip
        self._parameters = (ctypes.c_void_p * len(addresses))(*addresses)
        self._attribute = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self._config = _Config(
            1, 1, 1, 32 * made.num_warps, 1, 1, made.shared_bytes, None, ctypes.pointer(self._attribute), int(early)
        )  # fmt: skip
        self._where = ctypes.addressof(self._config), ctypes.addressof(self._parameters)
        self._by_stream: dict[int, int] = {}  # the address of its config
        self._configs: list[_Config] = []  # whose memory these are
        self._lock = threading.Lock()  # parameters are read from here during the call

    def __call__(self, stream: int, pointers: list[int], batch_size: int, grid: tuple[int, int, int]) -> bool:
        """Launch; False where this thread has no CUDA context yet. Raises `RuntimeError` for any other failure."""
        config, parameters = self._where
        with self._lock:
            self._set(pointers, batch_size, grid)
            self._config.stream = stream
            return _launched(_launch_function()(config, self._function, parameters, None))

    def bound(self, pointers: list[int], batch_size: int, grid: tuple[int, int, int]) -> Callable[[int], bool]:
        """The same launch again and again, of which only the stream is left to be given."""
        own = DriverLaunch(*self._made_of)
        own._set(pointers, batch_size, grid)
        return own._again

    def _set(self, pointers: list[int], batch_size: int, grid: tuple[int, int, int]) -> None:
        self._pointers[:] = pointers  # type: ignore[assignment]
        self._batch_size.value = batch_size
        self._config.x, self._config.y, self._config.z = grid

    def _again(self, stream: int) -> bool:
        config = self._by_stream.get(stream) or self._config_of(stream)  # needs no lock: nothing is written any more
        return _launched(_launch_function()(config, self._function, self._where[1], None))

    def _config_of(self, stream: int) -> int:
        made = _Config.from_buffer_copy(self._config)
        made.stream = stream
        self._configs.append(made)
        self._by_stream[stream] = ctypes.addressof(made)
        return self._by_stream[stream]


def _launched(error: int) -> bool:
    if error and error != _NO_CONTEXT:
        raise RuntimeError(f"cuLaunchKernelEx failed with CUDA error {error}")
    return not error


@dataclass(frozen=True, eq=False)
class LoadedKernel:
    """A compiled kernel on a device, as the driver knows it. It stays loaded."""

    function: int
    num_warps: int
    shared_bytes: int


def load(made: Any, device: int) -> LoadedKernel | None:
    """What Triton compiled, on the device; None where it is not a kernel that DriverLaunch knows how to launch."""
    metadata = made.metadata
    scratch = getattr(metadata, "global_scratch_size", 0) or getattr(metadata, "profile_scratch_size", 0)
    several = getattr(metadata, "num_ctas", 1) != 1 or getattr(metadata, "launch_cooperative_grid", False)
    if scratch or several or "cubin" not in made.asm:
        return None
    from triton.runtime import driver

    _module, function, *_ = driver.active.utils.load_binary(made.name, made.asm["cubin"], metadata.shared, device)
    return LoadedKernel(function, metadata.num_warps, metadata.shared)


@lru_cache(maxsize=1)
def _launch_function() -> Any:
    function = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    function.argtypes = (ctypes.c_void_p,) * 4
    function.restype = ctypes.c_int
    return function
