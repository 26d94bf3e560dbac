"""The constants of policy "balanced" from times of a real forward: which batches to time, and what their times say.

A layer of triton_kernels/balance.py's law takes a constant, plus what its tiles take that are played onto the SMs one
by one, plus split_us for each split of the sequence with the most. All its constants are fitted at once, to batches of
which each group tells one of them best:

    alone      one sequence, unsplit: alone_us
    filled     one tile on every SM: the bandwidth
    many       one sequence in 8 to 64 splits of as many blocks: split_us
    mixed      sequences of very different lengths in splits of different sizes: tile_us

The mixed batches are like those for which the law has to choose. Where all SMs start their second tile at the same
moment instead, that alone takes twice as long as it does in them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..api import plan_call
from ..triton_kernels.balance import block_bytes
from ..triton_kernels.card import peak_gb_s
from ..triton_kernels.plan import compiled_kernel

PAGE = 64  # tokens; no tile divides it, so that all kernels page in the same way
SOFTNESS = 3.0  # the law's p: a fit of it says 2.4 to 4 for the same card, and predicts no better
_ALONE_BLOCKS = (16, 32, 48, 64)
_FILLED_BLOCKS = (8, 16, 24, 32)
_MANY_SPLITS, _BLOCKS_OF_MANY = (8, 16, 24, 32, 48, 64), 4
_MIXED_SIZES = (0.35, 0.45, 0.6, 0.8, 1.1, 1.3, 1.6)  # key blocks of a split, times an SM's load
_MIXED_LOAD, _MIXED_SPREAD = 11, 64  # key blocks for each SM; the longest sequence by the shortest
_MIXED_SEQUENCES = 24
_BOUND, _MANY_BOUND = 32, 64  # on splits; the combine kernel depends on it
_ROUNDS, _ENOUGH = 40, 1e-6  # of the fit; it ends when the errors' squares fall by no more than this part
_MOST_OFF = 0.25  # of a kernel's times, root mean square, in what the law explains

Floats = NDArray[np.float64]


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
    Attention("bf16, head dim 64", 16, 64, 64),  # fewer heads would have rows to spare (balance.py)
    Attention("bf16, head dim 256", 8, 256, 256),
    Attention("bf16, MLA 64/512", 16, 64, 512),
    Attention("e4m3, head dim 128", 8, 128, 128, dtype="float8_e4m3fn"),
)


@dataclass(frozen=True)
class Batch:
    """The key blocks of each sequence and its splits, with `bound` as the forward's num_splits."""

    blocks: tuple[int, ...]
    splits: tuple[int, ...]
    bound: int = _BOUND

    @property
    def sequences(self) -> int:
        return len(self.blocks)

    @property
    def tiles(self) -> list[int]:
        """Key blocks of each work tile, in the order in which FA3 takes them."""
        found = []
        each = [-(-blocks // splits) for blocks, splits in zip(self.blocks, self.splits, strict=True)]
        for i in sorted(range(self.sequences), key=lambda i: -each[i]):
            found += [min(each[i], max(self.blocks[i] - each[i] * j, 0)) for j in range(self.splits[i])]
        return found

    @classmethod
    def even(cls, sequences: int, blocks: int, splits: int = 1, bound: int = _BOUND) -> Batch:
        return cls((blocks,) * sequences, (splits,) * sequences, bound)

    @classmethod
    def cut(cls, blocks: Sequence[int], size: int, bound: int = _BOUND) -> Batch:
        """Splits of at most `size` key blocks, as far as the bound allows, and none that would be empty."""
        wanted = [min(max(-(-n // size), 1), bound) for n in blocks]
        splits = (-(-n // -(-n // most)) for n, most in zip(blocks, wanted, strict=True))
        return cls(tuple(blocks), tuple(splits), bound)


# The microseconds that a layer takes for each of some batches.
Timer = Callable[[Attention, Sequence[Batch]], Sequence[float]]


@dataclass(frozen=True)
class Design:
    """The batches to time for one kernel on a GPU with this many SMs; all tiles have one query block."""

    num_sms: int

    def batches(self) -> dict[str, list[Batch]]:
        return {"alone": self.alone(), "filled": self.filled(), "many": self.many(), "mixed": self.mixed()}

    def alone(self) -> list[Batch]:
        return [Batch.even(1, blocks) for blocks in _ALONE_BLOCKS]

    def filled(self) -> list[Batch]:
        splits = max(splits for splits in range(1, _BOUND + 1) if self.num_sms % splits == 0)
        return [Batch.even(self.num_sms // splits, blocks * splits, splits) for blocks in _FILLED_BLOCKS]

    def many(self) -> list[Batch]:
        # More splits than SMs would come in two waves.
        some = [splits for splits in _MANY_SPLITS if splits <= self.num_sms]
        return [Batch.even(1, splits * _BLOCKS_OF_MANY, splits, _MANY_BOUND) for splits in some]

    def mixed(self) -> list[Batch]:
        """Lengths in a geometric row, shuffled: the order in memory is not that of FA3."""
        row = np.geomspace(1, _MIXED_SPREAD, _MIXED_SEQUENCES)
        blocks = np.maximum(np.round(row * (_MIXED_LOAD * self.num_sms / row.sum())), 1).astype(int)
        blocks = np.random.default_rng(0).permutation(blocks)
        return [Batch.cut(blocks.tolist(), max(1, round(_MIXED_LOAD * share))) for share in _MIXED_SIZES]


@dataclass(frozen=True)
class Constants:
    """Of the law, for one kernel."""

    bandwidth_gb_s: float
    split_us: float
    launch_us: float
    alone_us: float
    tile_us: float


def layer_us(batch: Batch, kernel: Sequence[int], num_sms: int, c: Constants) -> float:
    """Microseconds of a layer by the law itself: tiles go to the SM that is free first, and all SMs advance alike."""
    shared = block_bytes(tuple(kernel)) * num_sms / (c.bandwidth_gb_s * 1e3)
    tiles, tile = batch.tiles, c.tile_us / shared
    free = sorted(blocks + tile for blocks in tiles[:num_sms])
    heapq.heapify(free)
    for blocks in tiles[num_sms:]:
        heapq.heapreplace(free, free[0] + blocks + tile)
    steps = np.diff([0.0, *sorted(free)])
    busy = np.arange(len(free), 0, -1) / num_sms
    times = (c.alone_us**SOFTNESS + (shared * busy) ** SOFTNESS) ** (1 / SOFTNESS)
    return float((steps * times).sum()) + c.launch_us + c.split_us * max(batch.splits)


@dataclass(frozen=True)
class Timed:
    """A kernel's batches and the microseconds of each."""

    kernel: tuple[int, int, int, int, int]
    groups: dict[str, list[Batch]]
    times: dict[str, list[float]]

    def check(self) -> None:
        """Raise `ValueError` for times that no law explains."""
        for name in ("alone", "filled"):
            times = self.times[name]
            if not (all(math.isfinite(t) and t > 0 for t in times) and times[0] < times[-1]):
                raise ValueError("longer sequences do not take longer")

    @property
    def points(self) -> list[tuple[Batch, float]]:
        return [point for name in self.groups for point in zip(self.groups[name], self.times[name], strict=True)]


def time_kernel(attention: Attention, kernel: tuple[int, int, int, int, int], design: Design, timer: Timer) -> Timed:
    """Times of all of a kernel's batches, taken together, so that a drift of the clocks meets all of them alike."""
    groups = design.batches()
    taken = list(timer(attention, [batch for group in groups.values() for batch in group]))
    times = {}
    for name, group in groups.items():
        times[name], taken = taken[: len(group)], taken[len(group) :]
    return Timed(kernel, groups, times)


def call_arguments(attention: Attention, batch: Batch, block_n: int, build: str) -> dict[str, Any]:
    """The arguments of `metadata_layout` for a batch, without `cache_seqlens`."""
    return {
        "batch_size": batch.sequences, "max_seqlen_q": attention.seqlen_q,
        "max_seqlen_k": -(-max(batch.blocks) * block_n // PAGE) * PAGE, "num_heads": attention.num_heads,
        "num_heads_k": 1, "headdim": attention.headdim, "headdim_v": attention.headdim_v, "page_size": PAGE,
        "causal": True, "qkv_dtype": getattr(torch, attention.dtype), "num_splits": batch.bound, "build": build,
    }  # fmt: skip


def kernel_of(attention: Attention, build: str, device: torch.device | None = None) -> tuple[int, int, int, int, int]:
    """The compiled kernel that serves an attention."""
    _, problem, _, plan = plan_call(call_arguments(attention, Batch.even(1, 64), 128, build), device)
    return compiled_kernel(problem, plan.block_m, plan.block_n)


def fit_table(
    gpu: str, num_sms: int, measured: dict[str, str], build: str, timer: Timer, say: Callable[[str], None],
    device: torch.device | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The table of constants of a GPU. Says what was measured; a kernel that fails is left out.

    Raises `RuntimeError` where no kernel could be measured.
    """
    design, timed = Design(num_sms), list[Timed]()
    for attention in ATTENTIONS:
        try:
            kernel = kernel_of(attention, build, device)
            if kernel in (one.kernel for one in timed):
                say(f"skipped   {attention.name}: the kernel {list(kernel)} again")
                continue
            one = time_kernel(attention, kernel, design, timer)
            one.check()
        except Exception as error:  # whatever a wheel raises for what it was not built for
            say(f"skipped   {attention.name}: {' '.join(str(error).split())[:200] or repr(error)}")
            continue
        timed.append(one)
        say(attention.name)
        for line in _described(one):
            say(line)
    if not timed:
        raise RuntimeError("no kernel could be measured")
    fitted, off = fit(timed, num_sms, peak_gb_s(gpu))
    kernels: list[dict[str, Any]] = []
    for one, c, share in zip(timed, fitted, off, strict=True):
        say(f"kernel {list(one.kernel)}: the law is off by {share:.1%}, root mean square")
        if share <= _MOST_OFF:
            found = {"alone_us": round(c.alone_us, 3), "tile_us": round(c.tile_us, 2)}
            kernels.append({"kernel": list(one.kernel)} | found)
    if not kernels:
        raise RuntimeError("the law explains no kernel's times")
    bandwidth = round(fitted[0].bandwidth_gb_s)
    return {
        "gpu": gpu, "num_sms": num_sms, "bandwidth_gb_s": bandwidth, "peak_gb_s": round(peak_gb_s(gpu) or bandwidth),
        "measured": measured, "softness": SOFTNESS, "split_us": round(fitted[0].split_us, 4), "kernels": kernels,
    }  # fmt: skip


def fit(timed: Sequence[Timed], num_sms: int, peak: float | None) -> tuple[list[Constants], list[float]]:
    """The constants of each kernel that explain its times best, relatively, and how far the law is off for each.

    Bandwidth and split_us are the card's. Constants are fitted by their logarithms: none becomes negative.
    """

    def constants(x: Floats) -> list[Constants]:
        bandwidth, split, *own = np.exp(x).tolist()
        return [Constants(bandwidth, split, *own[3 * i : 3 * i + 3]) for i in range(len(timed))]

    def errors(x: Floats) -> Floats:
        return np.array([
            math.log(layer_us(batch, one.kernel, num_sms, c) / time)
            for one, c in zip(timed, constants(x), strict=True)
            for batch, time in one.points
        ])  # fmt: skip

    start = [_reached(timed, num_sms, peak), 0.09]
    for one in timed:
        alone = (one.times["alone"][-1] - one.times["alone"][0]) / (_ALONE_BLOCKS[-1] - _ALONE_BLOCKS[0])
        start += [5.0, max(alone, 0.01), 1.5]
    found = least_squares(errors, np.log(start))
    rest, off = errors(found), []
    for one in timed:
        own, rest = rest[: len(one.points)], rest[len(one.points) :]
        off.append(float(np.sqrt((own**2).mean())))
    return constants(found), off


def _reached(timed: Sequence[Timed], num_sms: int, peak: float | None) -> float:
    """GB/s of the kernel that reads fastest while every SM works; by the times of a tile on each."""
    blocks = _FILLED_BLOCKS[-1] - _FILLED_BLOCKS[0]
    found = max(
        block_bytes(one.kernel) * num_sms * blocks / (one.times["filled"][-1] - one.times["filled"][0]) / 1e3
        for one in timed
    )
    return min(found, peak) if peak else found


def least_squares(errors: Callable[[Floats], Floats], start: Floats) -> Floats:
    """Where the squares of `errors` are least, near `start`: steps of Gauss and Newton, damped as by Marquardt."""
    at, now, damping = start, errors(start), 1e-2
    for _ in range(_ROUNDS):
        slopes = np.stack([(errors(at + step) - now) / 1e-3 for step in 1e-3 * np.eye(len(at))], axis=1)
        normal, gradient = slopes.T @ slopes, slopes.T @ now
        for _ in range(8):
            scale = np.diag(normal.diagonal() + 1e-9)
            tried = at - np.clip(np.linalg.solve(normal + damping * scale, gradient), -0.5, 0.5)
            then = errors(tried)
            if then @ then < now @ now:
                break
            damping *= 4
        else:
            return at
        gained = 1 - (then @ then) / (now @ now)
        at, now, damping = tried, then, damping / 4
        if gained < _ENOUGH:
            break
    return at


def _described(timed: Timed) -> list[str]:
    whole = {
        "alone": ("alone, us by blocks", _ALONE_BLOCKS),
        "filled": ("a tile an SM, us by its blocks", _FILLED_BLOCKS),
        "many": (f"splits of {_BLOCKS_OF_MANY} blocks, us by splits", _MANY_SPLITS),
        "mixed": ("mixed lengths, us by tiles", [len(batch.tiles) for batch in timed.groups["mixed"]]),
    }
    return [
        f"  {name:34s}" + "  ".join(f"{x}: {y:.2f}" for x, y in zip(xs, timed.times[group], strict=False))
        for group, (name, xs) in whole.items()
    ]
