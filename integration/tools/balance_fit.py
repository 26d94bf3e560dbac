"""The constants of policy "balanced" from times of a real forward: which batches to time, and what their times say.

In triton_kernels/balance.py's model a layer takes a constant, plus for its slowest SM tile_us for each of its work
tiles and a block's time for each of their key blocks, plus per_split_us for each split. A block takes alone_us where
few SMs work, shared_us where all do. All sequences of a batch here have the same length and the same splits, so:

    alone_us      one sequence, unsplit: the slope over its blocks
    shared_us     one tile on every SM: the slope over the tile's blocks
    per_split_us  one sequence in 8 to 64 splits of as many blocks: the slope over splits, less what the model says
                  that blocks cost more while more SMs work
    tile_us       the same sequences with every SM's tile halved, so that it has two: the difference, less the splits'

Constants of a launch cancel out in all of them. Slopes are medians of the slopes between pairs of points, which a few
disturbed times do not move.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from ..api import plan_call

PAGE = 64  # tokens; no tile divides it, so that all kernels page in the same way
_ALONE_BLOCKS = (16, 32, 48, 64)
_TILE_BLOCKS = (8, 16, 24, 32)
_MANY_SPLITS, _BLOCKS_OF_MANY = (8, 16, 24, 32, 48, 64), 4
_BOUND, _MANY_BOUND = 32, 64  # on splits; the combine kernel depends on it
_LEAST_TILE_US = 0.01  # below it the difference is noise


@dataclass(frozen=True)
class Attention:
    """One layer's attention with one KV head, which the forward serves with one kernel."""

    name: str
    num_heads: int
    headdim: int  # as compiled: 64, 96, 128, 192, 256 or 512
    headdim_v: int
    seqlen_q: int = 1
    dtype: str = "bfloat16"


ATTENTIONS = (
    Attention("bf16, head dim 128", 8, 128, 128),
    Attention("bf16, head dim 128, 16 queries", 8, 128, 128, seqlen_q=16),
    Attention("bf16, head dim 64", 8, 64, 64),
    Attention("bf16, head dim 256", 8, 256, 256),
    Attention("bf16, MLA 64/512", 16, 64, 512),
    Attention("e4m3, head dim 128", 8, 128, 128, dtype="float8_e4m3fn"),
)


@dataclass(frozen=True)
class Batch:
    """`sequences` of `blocks` key blocks each, in `splits` splits, with `bound` as the forward's num_splits."""

    sequences: int
    blocks: int
    splits: int = 1
    bound: int = _BOUND

    @property
    def tiles(self) -> int:
        return self.sequences * self.splits

    @property
    def blocks_of_a_tile(self) -> int:
        return self.blocks // self.splits


# The microseconds that a layer takes for each of some batches.
Timer = Callable[[Attention, Sequence[Batch]], Sequence[float]]


@dataclass(frozen=True)
class Design:
    """The batches to time for one kernel on a GPU with this many SMs; all tiles have one query block."""

    num_sms: int

    @property
    def splits(self) -> int:
        """Of each sequence where every SM has one tile: as many as divide the SMs, twice as many being allowed."""
        return max(splits for splits in range(1, _BOUND // 2 + 1) if self.num_sms % splits == 0)

    def alone(self) -> list[Batch]:
        return [Batch(1, blocks) for blocks in _ALONE_BLOCKS]

    def one_tile(self) -> list[Batch]:
        return [self._filled(blocks, self.splits) for blocks in _TILE_BLOCKS]

    def two_tiles(self) -> list[Batch]:
        """The same sequences as `one_tile`, every tile halved."""
        return [self._filled(blocks, 2 * self.splits) for blocks in _TILE_BLOCKS]

    def many_splits(self) -> list[Batch]:
        # More splits than SMs would come in two waves.
        some = [splits for splits in _MANY_SPLITS if splits <= self.num_sms]
        return [Batch(1, splits * _BLOCKS_OF_MANY, splits, _MANY_BOUND) for splits in some]

    def _filled(self, blocks: int, splits: int) -> Batch:
        return Batch(self.num_sms // self.splits, blocks * self.splits, splits)


@dataclass(frozen=True)
class Times:
    """Microseconds of the batches of a `Design`, in its order."""

    design: Design
    alone: Sequence[float]
    one_tile: Sequence[float]
    two_tiles: Sequence[float]
    many_splits: Sequence[float]

    @property
    def shared_us(self) -> float:
        return slope(_TILE_BLOCKS, self.one_tile)

    @property
    def alone_us(self) -> float:
        """At most `shared_us`: more SMs at work make no block faster, but noise may say so."""
        return min(slope(_ALONE_BLOCKS, self.alone), self.shared_us)

    @property
    def per_split_us(self) -> float:
        batches, alone, shared = self.design.many_splits(), self.alone_us, self.shared_us
        busy = [(batch.tiles / self.design.num_sms) ** 3 for batch in batches]
        rest = [t - _BLOCKS_OF_MANY * (shared - alone) * b for t, b in zip(self.many_splits, busy, strict=True)]
        return max(0.0, slope([batch.splits for batch in batches], rest))

    def tile_us(self, per_split_us: float) -> float:
        extra = [two - one for one, two in zip(self.one_tile, self.two_tiles, strict=True)]
        return max(_LEAST_TILE_US, statistics.median(extra) - per_split_us * self.design.splits)

    def check(self) -> None:
        """Raise `ValueError` for times that the model cannot explain."""
        if not (self.shared_us > 0 and self.alone_us > 0):
            raise ValueError("longer sequences do not take longer")


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The median slope between two of the points."""
    points = list(zip(xs, ys, strict=True))
    return statistics.median((y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2))


def time_kernel(attention: Attention, design: Design, timer: Timer) -> Times:
    """Times of all of a kernel's batches, taken together, so that a drift of the clocks meets all of them alike."""
    groups = [design.alone(), design.one_tile(), design.two_tiles(), design.many_splits()]
    times = list(timer(attention, [batch for group in groups for batch in group]))
    parts: list[list[float]] = []
    for group in groups:
        parts.append(times[: len(group)])
        times = times[len(group) :]
    return Times(design, *parts)


def call_arguments(attention: Attention, batch: Batch, block_n: int, build: str) -> dict[str, Any]:
    """The arguments of `metadata_layout` for a batch, without `cache_seqlens`."""
    return {
        "batch_size": batch.sequences, "max_seqlen_q": attention.seqlen_q,
        "max_seqlen_k": -(-batch.blocks * block_n // PAGE) * PAGE, "num_heads": attention.num_heads, "num_heads_k": 1,
        "headdim": attention.headdim, "headdim_v": attention.headdim_v, "page_size": PAGE, "causal": True,
        "qkv_dtype": getattr(torch, attention.dtype), "num_splits": batch.bound, "build": build,
    }  # fmt: skip


def kernel_of(attention: Attention, build: str, device: torch.device | None = None) -> tuple[int, int, int, int, int]:
    """(element size, head dim, head dim of v, kBlockM, kBlockN) of the kernel that serves an attention."""
    _, problem, _, plan = plan_call(call_arguments(attention, Batch(1, 64), 128, build), device)
    return problem.element_size, attention.headdim, attention.headdim_v, plan.block_m, plan.block_n


def fit_table(
    gpu: str, num_sms: int, measured: dict[str, str], build: str, timer: Timer, say: Callable[[str], None],
    device: torch.device | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The table of constants of a GPU. Says what was measured; a kernel that fails is left out.

    Raises `RuntimeError` where no kernel could be measured.
    """
    design, fitted = Design(num_sms), dict[tuple[int, int, int, int, int], Times]()
    for attention in ATTENTIONS:
        try:
            kernel = kernel_of(attention, build, device)
            if kernel in fitted:
                say(f"skipped   {attention.name}: the kernel {list(kernel)} again")
                continue
            times = time_kernel(attention, design, timer)
            times.check()
        except Exception as error:  # whatever a wheel raises for what it was not built for
            say(f"skipped   {attention.name}: {' '.join(str(error).split())[:200] or repr(error)}")
            continue
        fitted[kernel] = times
        for line in _described(attention, times):
            say(line)
    if not fitted:
        raise RuntimeError("no kernel could be measured")
    per_split = statistics.median(times.per_split_us for times in fitted.values())
    kernels: list[dict[str, Any]] = [
        {
            "kernel": list(kernel), "shared_us": round(times.shared_us, 3), "alone_us": round(times.alone_us, 3),
            "tile_us": round(times.tile_us(per_split), 2),
        }
        for kernel, times in fitted.items()
    ]  # fmt: skip
    reached = [_block_bytes(kernel) * num_sms / times.shared_us / 1e3 for kernel, times in fitted.items()]
    return {
        "gpu": gpu, "num_sms": num_sms, "bandwidth_gb_s": round(statistics.median(reached)), "measured": measured,
        "per_split_us": round(per_split, 4), "kernels": kernels,
    }  # fmt: skip


def _block_bytes(kernel: tuple[int, int, int, int, int]) -> int:
    element_size, headdim, headdim_v, _, block_n = kernel
    return block_n * (headdim + headdim_v) * element_size


def _described(attention: Attention, times: Times) -> list[str]:
    splits = [batch.splits for batch in times.design.many_splits()]
    rows = (
        ("alone, us by blocks", _ALONE_BLOCKS, times.alone),
        ("a tile an SM, us by its blocks", _TILE_BLOCKS, times.one_tile),
        ("the same, halved", _TILE_BLOCKS, times.two_tiles),
        (f"splits of {_BLOCKS_OF_MANY} blocks, us by splits", splits, times.many_splits),
    )
    lines = [attention.name]
    for name, xs, ys in rows:
        lines.append(f"  {name:34s}" + "  ".join(f"{x}: {y:.2f}" for x, y in zip(xs, ys, strict=True)))
    lines.append(f"  us a block shared {times.shared_us:.3f}, alone {times.alone_us:.3f};"
                 f" us a split {times.per_split_us:.4f}")  # fmt: skip
    return lines
