"""GPUs that FA3 runs on: what the command line knows of one that is not in this machine, and what a layer costs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..triton_kernels.balance import constants_of, kernel_constants
from ..triton_kernels.card import DATASHEETS
from ..triton_kernels.tables import Table


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


def _card(name: str, num_sms: int, arch: int = 90) -> Card:
    return Card(name, arch, num_sms, DATASHEETS[name])


CARDS = {
    "h200": _card("NVIDIA H200", 132),
    "h100": _card("NVIDIA H100 80GB HBM3", 132),
    "h100-nvl": _card("NVIDIA H100 NVL", 132),
    "h100-pcie": _card("NVIDIA H100 PCIe", 114),
    "h800": _card("NVIDIA H800", 132),
    "h20": _card("NVIDIA H20", 78),
    "gh200": _card("NVIDIA GH200 480GB", 132),
    "a100": _card("NVIDIA A100-SXM4-80GB", 108, 80),
    "a10": _card("NVIDIA A10", 72, 86),
    "l40s": _card("NVIDIA L40S", 142, 89),
    "rtx-4090": _card("NVIDIA GeForce RTX 4090", 128, 89),
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
    """What a layer's attention costs on a card, in us unless said otherwise.

    What a tile takes on an SM follows the law of policy "balanced" with its constants (triton_kernels/balance.py); what
    is added here is the same for many schedules of a batch, so that a policy need not know it.
    """

    table: Table  # the constants of the law
    launch: float  # of a layer, whatever it has to do
    combine: float  # of the combine kernel, where something is split
    partial: float  # for each MB of partial outputs
    rows: float  # for each thousand output rows
    many: float  # for each doubling above 32 of the most splits of a sequence, without spare rows (balance.py)

    @property
    def measured_on(self) -> str:
        """The GPU whose constants these are, scaled for another by its memory's bandwidth."""
        return str(self.table["gpu"])

    @property
    def bandwidth_gb_s(self) -> float:
        return float(self.table["bandwidth_gb_s"])

    @property
    def softness(self) -> float:
        """p of the law."""
        return float(self.table["softness"])

    @property
    def split(self) -> float:
        """Of the combine kernel, for each split of the sequence with the most."""
        return float(self.table["split_us"])

    def of_kernel(self, kernel: tuple[int, ...]) -> tuple[float, float]:
        """(alone, tile) of a kernel, measured or scaled: a key block on an SM alone; starting and ending a tile."""
        found = kernel_constants(self.table, kernel)
        return found["alone_us"], found["tile_us"]


# Fitted to the recorded sweeps of each card, those workloads of the suite that are not held out, beside the law.
_AROUND_THE_TILES = {
    "NVIDIA H200": {"launch": 5.071, "combine": 0.96, "partial": 0.013, "rows": 0.612, "many": 0.298},
    "NVIDIA H100 80GB HBM3": {"launch": 5.821, "combine": 1.055, "partial": 0.082, "rows": 0.449, "many": 0.543},
}


def costs_of_card(gpu: str) -> CardCosts:
    """The costs on a GPU, by the name that torch gives it; one that was not measured gets an H200's, scaled."""
    table = constants_of(gpu)
    return CardCosts(table, **_AROUND_THE_TILES.get(table["gpu"], _AROUND_THE_TILES["NVIDIA H200"]))
