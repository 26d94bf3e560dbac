"""Whether anything captured into a CUDA graph since may have written to a tensor, where torch does not count writes.

In inference mode, in which engines run, a tensor's version does not rise when torch writes to it. A capture in progress
tells in another way: its graph has the nodes captured so far, and with each kernel, copy and fill its arguments. Nodes
that lie between two layers and have an address within the tensor's storage among their arguments may have written it.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Iterable

import torch

_log = logging.getLogger("fa3_metadata")
_KERNEL, _MEMCPY, _MEMSET = 0, 1, 2  # CUgraphNodeType
_HARMLESS = frozenset({5, 6, 7, 10, 11})  # empty, events, allocation and release of memory
_CAPTURING = 1  # CUstreamCaptureStatus
_NO_SUCH_PARAMETER = 1  # CUDA_ERROR_INVALID_VALUE


class _KernelParams(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = (
        ("func", ctypes.c_void_p), ("dims", ctypes.c_uint * 7), ("kernel_params", ctypes.POINTER(ctypes.c_void_p)),
        ("extra", ctypes.c_void_p), ("kern", ctypes.c_void_p), ("ctx", ctypes.c_void_p),
    )  # fmt: skip


class Capture:
    """The capture under way on the current stream: its number, and the nodes that it has."""

    def __init__(self, number: int, graph: int) -> None:
        self.number, self._graph = number, graph

    @staticmethod
    def current() -> Capture | None:
        """None where no capture is under way, or the driver does not tell."""
        driver = _driver()
        if driver is None:
            return None
        status, number, graph = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p()
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        places = (ctypes.byref(status), ctypes.byref(number), ctypes.byref(graph))
        if driver.cuStreamGetCaptureInfo_v2(stream, *places, None, None) or status.value != _CAPTURING:
            return None
        return Capture(number.value, graph.value or 0)

    def nodes(self) -> frozenset[int] | None:
        """Handles of the nodes captured so far; None where the driver does not tell."""
        driver, count = _driver(), ctypes.c_size_t()
        graph = ctypes.c_void_p(self._graph)
        if driver is None or driver.cuGraphGetNodes(graph, None, ctypes.byref(count)):
            return None
        if not count.value:  # the driver refuses to list none
            return frozenset()
        nodes = (ctypes.c_void_p * count.value)()
        if driver.cuGraphGetNodes(graph, nodes, ctypes.byref(count)):
            return None
        return frozenset(node or 0 for node in nodes[: count.value])


def may_write(nodes: Iterable[int], tensors: Iterable[torch.Tensor]) -> bool:
    """Whether one of these nodes has an address within a tensor's storage among its arguments, or cannot be read."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    ranges = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
    return any(_may_write(node, ranges) for node in nodes)


def _may_write(node: int, ranges: list[tuple[int, int]]) -> bool:
    driver, kind, handle = _driver(), ctypes.c_int(), ctypes.c_void_p(node)
    if driver is None or driver.cuGraphNodeGetType(handle, ctypes.byref(kind)):
        return True
    if kind.value in _HARMLESS:
        return False
    if kind.value == _KERNEL:
        arguments = _kernel_arguments(driver, handle)
    elif kind.value in (_MEMCPY, _MEMSET):
        get = driver.cuGraphMemcpyNodeGetParams if kind.value == _MEMCPY else driver.cuGraphMemsetNodeGetParams
        room = (ctypes.c_uint64 * 64)()  # more than either structure takes
        arguments = None if get(handle, ctypes.byref(room)) else bytes(room)
    else:  # a graph within the graph, a function of the host: whatever it does
        return True
    return arguments is None or _has_address(arguments, ranges)


def _kernel_arguments(driver: ctypes.CDLL, node: ctypes.c_void_p) -> bytes | None:
    """A kernel's arguments one after the other, each padded to eight bytes; None where they cannot be read."""
    params = _KernelParams()
    if driver.cuGraphKernelNodeGetParams_v2(node, ctypes.byref(params)):
        return None
    if not params.kernel_params:  # given as one buffer, as cuBLAS does
        return _buffer_of(params.extra) if params.extra else None
    function, info = params.func, driver.cuFuncGetParamInfo
    if not function:
        function, info = params.kern, driver.cuKernelGetParamInfo
    found, index, offset, size = b"", 0, ctypes.c_size_t(), ctypes.c_size_t()
    places = ctypes.byref(offset), ctypes.byref(size)
    while not (error := info(ctypes.c_void_p(function), ctypes.c_size_t(index), *places)):
        value = ctypes.string_at(params.kernel_params[index], size.value)
        found += value + bytes(-len(value) % 8)
        index += 1
    return found if error == _NO_SUCH_PARAMETER else None


def _buffer_of(extra: int) -> bytes | None:
    """What CU_LAUNCH_PARAM_BUFFER_POINTER (1) and ..._SIZE (2) say in a list that ends with 0."""
    words, buffer, size = ctypes.cast(extra, ctypes.POINTER(ctypes.c_void_p)), None, None
    for place in (0, 2):
        tag, value = words[place], words[place + 1]
        if tag == 1:
            buffer = value
        elif tag == 2 and value:
            size = ctypes.cast(value, ctypes.POINTER(ctypes.c_size_t))[0]
    return ctypes.string_at(buffer, size) if buffer and size is not None and not words[4] else None


def _has_address(arguments: bytes, ranges: list[tuple[int, int]]) -> bool:
    """Addresses are eight bytes long and aligned within what holds them."""
    numbers = memoryview(arguments[: len(arguments) // 8 * 8]).cast("Q")
    return any(start <= number < end for number in numbers for start, end in ranges)


@functools.lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL | None:
    """The CUDA driver; None, said once, where it lacks one of the functions: then nothing is known of a capture."""
    names = (
        "cuStreamGetCaptureInfo_v2", "cuGraphGetNodes", "cuGraphNodeGetType", "cuGraphKernelNodeGetParams_v2",
        "cuFuncGetParamInfo", "cuKernelGetParamInfo", "cuGraphMemcpyNodeGetParams", "cuGraphMemsetNodeGetParams",
    )  # fmt: skip
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        for name in names:
            getattr(driver, name)
    except (OSError, AttributeError) as error:
        _log.warning(
            "captured calls are left without our metadata: the CUDA driver does not tell of captures (%s)", error
        )
        return None
    return driver
