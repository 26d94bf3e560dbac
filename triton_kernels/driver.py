"""Launching a compiled kernel through the CUDA driver.

Triton's own launch looks up the kernel and checks every pointer with the driver each time, which takes longer than
everything else that a refresh of the metadata does on the host. Here all but the pointers and the stream is laid out
once. That holds for kernels that look as those of Triton 3.5.1 to 3.9 do: any other is left to Triton, see `refusal`.
"""

from __future__ import annotations

import ctypes
import logging
import re
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: this thread has not used the GPU yet
_WARP = 32
_POINTER_BITS, _NUMBER_BITS = 64, 32
_SCRATCH_POINTERS = 2  # what Triton adds after a kernel's own parameters: global and profile scratch memory
_MOST_SHARED_BYTES = 48 * 1024  # what a kernel may have without asking for more
# Metadata of a compiled kernel. These must be there, and none of them set; a Triton that has renamed one has changed
# what it means.
_NOTHING_OF = (
    "global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "tensordesc_meta", "tmem_size",
    "instrumentation_mode",  # a sanitizer adds parameters
)  # fmt: skip
# These say how it was compiled, not how to launch it. Whatever else is set may say that a kernel needs more.
_OF_COMPILATION = frozenset((
    "allowed_dot_input_precisions", "arch", "backend_name", "debug", "default_dot_input_precision",
    "deprecated_fp8_dot_operand_dtypes", "enable_fp_fusion", "enable_reflect_ftz", "extern_libs",
    "global_scratch_align", "hash", "ir_override", "max_num_imprecise_acc_default", "maxnreg", "name", "num_stages",
    "profile_scratch_align", "ptx_options", "ptx_version", "sanitize_overflow", "supported_fp8_dtypes", "target",
    "triton_version",
))  # fmt: skip
_log = logging.getLogger(__name__)


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
        self._scratch = (ctypes.c_uint64 * _SCRATCH_POINTERS)()
        first_pointer, first_word = ctypes.addressof(self._pointers), ctypes.addressof(self._words)
        scratch = ctypes.addressof(self._scratch)
        addresses = [
            *range(first_pointer, first_pointer + 8 * num_pointers, 8),
            *range(first_word, first_word + 4 * len(words), 4),
            *range(scratch, scratch + 8 * _SCRATCH_POINTERS, 8),
        ]  # fmt: skip
        self._parameters = (ctypes.c_void_p * len(addresses))(*addresses)
        self._attribute = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self._config = _Config(
            1, 1, 1, _WARP * made.num_warps, 1, 1, made.shared_bytes, None, ctypes.pointer(self._attribute), int(early)
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


def load(
    compile_kernel: Callable[[], Any], device: int, num_pointers: int, num_numbers: int, early: bool
) -> LoadedKernel | None:
    """What Triton compiles, on the device; None where Triton must launch it, for which the log has the reason.

    The kernel is to be launched with that many pointers and numbers, and early or not.
    """
    try:
        made = compile_kernel()
        reason = refusal(made, num_pointers, num_numbers, early)
        if reason is None:
            return _loaded(made, device)
    except Exception as error:  # of names that Triton does not have, say. What its launch cannot do either, it raises
        reason = repr(error)
    _log.debug("Triton launches a kernel itself: %s", reason)
    return None


def refusal(made: Any, num_pointers: int, num_numbers: int, early: bool) -> str | None:
    """Why Triton must launch what it compiled; None where DriverLaunch knows all that the kernel needs."""
    if "cubin" not in made.asm:
        return "it is not compiled for CUDA"
    fields = made.metadata._asdict()
    exactly: dict[str, Any] = {"num_ctas": 1, "warp_size": _WARP, "launch_pdl": early}
    if "cluster_dims" in fields or fields["triton_version"].startswith("3.5."):  # the last that has them
        exactly["cluster_dims"] = (1, 1, 1)
    sizes = ("num_warps", "shared")
    missing = sorted({*exactly, *_NOTHING_OF, *sizes} - set(fields))
    if missing:
        return f"its metadata has no {', '.join(missing)}"
    for name, wanted in exactly.items():
        if fields[name] != wanted:
            return f"{name} is {fields[name]!r}, not {wanted!r}"
    for name in set(fields) - {*exactly, *sizes} - _OF_COMPILATION:
        if fields[name]:
            return f"it may need more, as {name} is {fields[name]!r}"
    if not 0 <= fields["shared"] <= _MOST_SHARED_BYTES:
        return f"it needs {fields['shared']} bytes of shared memory"
    taken = _parameter_bits(made.asm["ptx"], made.name)
    given = [_POINTER_BITS] * num_pointers + [_NUMBER_BITS] * num_numbers + [_POINTER_BITS] * _SCRATCH_POINTERS
    return None if taken == given else f"it takes parameters of {taken} bits, not {given}"


def _parameter_bits(ptx: str, name: str) -> list[int]:
    """Of each parameter of the kernel in PTX; 0 for one that is neither a pointer nor a number."""
    entry = re.search(rf"\.entry\s+{re.escape(name)}\s*\(([^)]*)\)", ptx)
    if entry is None:
        raise ValueError(f"the PTX has no entry {name}")
    numbers = [re.match(r"\s+\.[usfb](\d+)\s[^\[]*$", one) for one in entry[1].split(".param")[1:]]
    return [int(number[1]) if number else 0 for number in numbers]


def _loaded(made: Any, device: int) -> LoadedKernel:
    from triton.runtime import driver

    _launch_function()  # the driver may be too old for it
    num_warps, shared = made.metadata.num_warps, made.metadata.shared
    answer = driver.active.utils.load_binary(made.name, made.asm["cubin"], shared, device)
    if not isinstance(answer, tuple) or [type(part) for part in answer] != [int] * 5:
        raise TypeError(f"load_binary answered {answer!r}")
    _module, function, _registers, _spills, most_threads = answer
    if not function or most_threads < _WARP * num_warps:
        raise ValueError(f"function {function:#x} may have {most_threads} threads and needs {_WARP * num_warps}")
    return LoadedKernel(function, num_warps, shared)


@lru_cache(maxsize=1)
def _launch_function() -> Any:
    function = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    function.argtypes = (ctypes.c_void_p,) * 4
    function.restype = ctypes.c_int
    return function
