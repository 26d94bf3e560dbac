"""What a GPU's memory can carry at most: by its driver, by its datasheet."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

# GB/s, by the name that torch gives a card: for one that is not in this machine, or whose driver does not say.
DATASHEETS = {
    "NVIDIA H200": 4800, "NVIDIA H100 80GB HBM3": 3350, "NVIDIA H100 PCIe": 2039, "NVIDIA H100 NVL": 3938,
    "NVIDIA H800": 3350, "NVIDIA H20": 4000, "NVIDIA GH200 480GB": 4000, "NVIDIA GH200 144G HBM3e": 4900,
    "NVIDIA A100-SXM4-80GB": 2039, "NVIDIA A10": 600, "NVIDIA L40S": 864, "NVIDIA GeForce RTX 4090": 1008,
}  # fmt: skip
_CLOCK_KHZ, _BUS_BITS = 36, 37  # of a device's memory: CUdevice_attribute
_LEAST_GB_S, _MOST_GB_S = 10, 100_000  # of an answer that is believed


@lru_cache(maxsize=64)
def peak_gb_s(gpu: str) -> float | None:
    """Of a card by its name: what the driver of this machine says, else its datasheet; None: not known."""
    return driver_gb_s(gpu) or DATASHEETS.get(gpu)


def driver_gb_s(gpu: str) -> float | None:
    """Memory clock times bus width of a GPU of this machine, twice a cycle; None: not known."""
    try:
        for name, khz, bits in _devices():
            peak = 2 * khz * 1e3 * bits / 8 / 1e9
            if name == gpu and _LEAST_GB_S <= peak <= _MOST_GB_S:
                return peak
    except (OSError, AttributeError):  # no driver, or one without these functions
        pass
    return None


def _devices() -> Iterator[tuple[str, int, int]]:
    """(name, memory clock in kHz, bus width in bits) of each GPU. Nothing is allocated on it, no context made."""
    cuda = ctypes.CDLL("libcuda.so.1")
    if cuda.cuInit(0):
        return
    for device in range(_answer(lambda place: cuda.cuDeviceGetCount(place))):
        name = ctypes.create_string_buffer(256)
        if cuda.cuDeviceGetName(name, len(name), device):
            continue
        clock, bits = (_attribute(cuda, which, device) for which in (_CLOCK_KHZ, _BUS_BITS))
        yield name.value.decode(errors="replace"), clock, bits


def _attribute(cuda: Any, which: int, device: int) -> int:
    return _answer(lambda place: cuda.cuDeviceGetAttribute(place, which, device))


def _answer(ask: Callable[[Any], int]) -> int:
    """The int that a function of the driver writes; 0 where it fails."""
    value = ctypes.c_int()
    return value.value if ask(ctypes.byref(value)) == 0 else 0
