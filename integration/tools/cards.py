"""GPUs that FA3 runs on: what the command line knows of one that is not in this machine, and what its kernels cost."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from ..triton_kernels.balance import block_bytes
from ..triton_kernels.card import DATASHEETS

# (element size, head dim, head dim of v, kBlockM, kBlockN), head dims as compiled
Kernel = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Card:
    """A GPU by its datasheet."""

    name: str  # as torch.cuda.get_device_name says it
    arch: int  # 10 * major + minor of its compute capability
    num_sms: int
    peak_gb_s: int  # of its memory

    @property
    def short_name(self) -> str:
        return self.name.removeprefix("NVIDIA ").removeprefix("GeForce ").removesuffix(" 80GB HBM3")


def _hopper(name: str, num_sms: int) -> Card:
    return Card(name, 90, num_sms, DATASHEETS[name])


CARDS = {
    "h200": _hopper("NVIDIA H200", 132),
    "h100": _hopper("NVIDIA H100 80GB HBM3", 132),
    "h100-nvl": _hopper("NVIDIA H100 NVL", 132),
    "h100-pcie": _hopper("NVIDIA H100 PCIe", 114),
    "h800": _hopper("NVIDIA H800", 132),
    "h20": _hopper("NVIDIA H20", 78),
    "gh200": _hopper("NVIDIA GH200 480GB", 132),
    "a100": Card("NVIDIA A100-SXM4-80GB", 80, 108, 2039),
    "a10": Card("NVIDIA A10", 86, 72, 600),
    "l40s": Card("NVIDIA L40S", 89, 142, 864),
    "rtx-4090": Card("NVIDIA GeForce RTX 4090", 89, 128, 1008),
}


def find_card(text: str) -> Card:
    """A card by its short name, whatever the case, or by the name that torch gives it; `ValueError` for another."""
    asked = re.sub(r"[^a-z0-9]+", "-", text.lower().removeprefix("nvidia").strip())
    for key, card in CARDS.items():
        if asked == key or text.lower() == card.name.lower():
            return card
    raise ValueError(f"the GPU must be one of {', '.join(CARDS)}, got {text!r}")


@dataclass(frozen=True)
class CardCosts:
    """What a layer's attention costs on a card, in us unless said otherwise: the constants of simulator.py's law.

    All but those of `kernels` are the card's, whatever the kernel.
    """

    measured_on: str  # the GPU whose constants these are
    num_sms: int
    bandwidth_gb_s: float
    softness: float  # p of the law
    launch: float  # of a layer, whatever it has to do
    combine: float  # of the combine kernel, which runs where the bound on splits is above one
    split: float  # of it, for each split of the sequence with the most
    partial: float  # for each MB of partial outputs
    rows: float  # for each thousand output rows
    bound: float  # for each doubling of the forward's num_splits above 32
    kernels: tuple[tuple[Kernel, float, float], ...]  # us of a key block on an SM alone; of starting and ending a tile

    def of_kernel(self, kernel: Kernel) -> tuple[float, float]:
        """(alone, tile) of a kernel: measured, else of one that reads the same, else by the bytes of a block."""
        exact = next((one for one in self.kernels if one[0] == kernel), None)
        if exact is not None:
            return exact[1:]
        tile = sum(one[2] for one in self.kernels) / len(self.kernels)
        alike = next((one for one in self.kernels if one[0][:3] + one[0][4:] == kernel[:3] + kernel[4:]), None)
        if alike is not None:
            return alike[1], tile
        # A block of few bytes still takes its round of waiting: a line through the measured kernels.
        sizes = [block_bytes(one[0]) for one in self.kernels]
        times = [one[1] for one in self.kernels]
        mean, middle = sum(sizes) / len(sizes), sum(times) / len(times)
        spread = sum((size - mean) ** 2 for size in sizes)
        slope = sum((s - mean) * (t - middle) for s, t in zip(sizes, times, strict=True)) / spread if spread else 0.0
        return max(middle + slope * (block_bytes(kernel) - mean), 0.2 * middle), tile


# Fitted to the recorded sweeps of each card, to those workloads of the suite that are not held out.
_H200 = CardCosts(
    measured_on="NVIDIA H200", num_sms=132, bandwidth_gb_s=4862, softness=2.619, launch=5.111, combine=1.009,
    split=0.0924, partial=0.108, rows=0.272, bound=0.0,
    kernels=(
        ((2, 128, 128, 64, 128), 1.068, 1.40), ((2, 64, 64, 64, 192), 1.105, 1.20),
        ((2, 256, 256, 128, 80), 1.718, 1.35), ((2, 64, 512, 64, 64), 1.637, 1.62),
        ((1, 128, 128, 64, 96), 0.795, 0.85),
    ),
)  # fmt: skip
_H100 = CardCosts(
    measured_on="NVIDIA H100 80GB HBM3", num_sms=132, bandwidth_gb_s=3110, softness=3.034, launch=5.542, combine=1.039,
    split=0.0853, partial=0.392, rows=0.0, bound=0.557,
    kernels=(
        ((2, 128, 128, 64, 128), 1.011, 1.20), ((2, 64, 64, 64, 192), 1.070, 1.20),
        ((2, 256, 256, 128, 80), 1.408, 1.23), ((2, 64, 512, 64, 64), 1.604, 1.20),
        ((1, 128, 128, 64, 96), 0.756, 1.04),
    ),
)  # fmt: skip
_MEASURED = {"NVIDIA H200": _H200, "NVIDIA H100 80GB HBM3": _H100}


@lru_cache(maxsize=64)
def costs_of_card(gpu: str) -> CardCosts:
    """The costs on a GPU, by the name that torch gives it.

    One that was not measured gets an H200's constants, with its own bandwidth and SMs where its datasheet is known:
    the constants of one Hopper card were seen to serve another that way.
    """
    if gpu in _MEASURED:
        return _MEASURED[gpu]
    card = next((one for one in CARDS.values() if one.name == gpu), None)
    if card is None:
        return _H200
    share = card.peak_gb_s / CARDS["h200"].peak_gb_s
    return replace(_H200, num_sms=card.num_sms, bandwidth_gb_s=_H200.bandwidth_gb_s * share)
