"""What a schedule does on the GPU: FA3's persistent scheduler played on paper, and the time that it predicts.

FA3 starts one block of threads an SM. Each takes the next work tile of a list, one split of one query block of one head
of one sequence, until there is none left (VarlenDynamicPersistentTileScheduler in hopper/tile_scheduler.hpp; which key
blocks a tile reads: BlockMN in hopper/block.h). `tiles_of` writes that list, `simulate` plays it onto the SMs.

The law of its time is that of policy "balanced", with its constants (triton_kernels/balance.py), but every tile is
played: all SMs at work advance alike, since what they share is the memory. While a of n SMs work, a key block takes
(alone^p + (shared a / n)^p)^(1/p), with shared = bytes of a block * n / bandwidth. A tile costs as much as some more
blocks. A layer costs `launch`; where the bound on splits is above one, the combine kernel costs its own, more for each
split of the sequence with the most, each MB of partial outputs, each thousand output rows, and each doubling of the
forward's num_splits above 32. `costs_of_card` has the constants.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..triton_kernels.balance import block_bytes, combined_us, has_spare_rows
from ..triton_kernels.plan import LaunchPlan, compiled_kernel
from ..triton_kernels.problem import Problem
from ..triton_kernels.reference import Lengths, reference_metadata, sequence_lengths
from .cards import CardCosts, costs_of_card

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]
# us that FA3's own metadata kernel adds to a layer, by sequences, where it has splits to find; and where it has none.
_OWN_METADATA = ((1, 32, 64, 128, 256, 992, 4096), (1.9, 2.3, 2.7, 3.5, 4.6, 8.6, 9.5))
_OWN_METADATA_UNSPLIT = 0.55
_IDLE_COMBINE = 0.3  # of a combine kernel for a batch in which nothing is split, which it sees and ends


@dataclass(frozen=True, eq=False)
class Schedule:
    """What the metadata says: [b] each, by position in the order in which FA3 takes the sequences."""

    order: Ints  # the sequence at each position
    splits: Ints
    heads_in_l2: Ints  # heads that are taken together where a sequence is not split


@dataclass(frozen=True, eq=False)
class Tiles:
    """Work tiles in FA3's order: [t] each."""

    sequence: Ints
    head: Ints  # of the scheduler: a KV head where GQA is packed, else a q head
    query_block: Ints
    split: Ints
    first_block: Ints  # the first key block read
    blocks: Ints  # key blocks read; 0: more splits than there are blocks to share out

    def __len__(self) -> int:
        return len(self.sequence)


def schedule_of(plan: LaunchPlan, metadata: Ints) -> Schedule:
    """The schedule that a metadata tensor holds."""
    batch, rows = plan.layout.batch_size, {name: metadata[row] for name, row in plan.layout.rows.items()}
    order = rows.get("varlen_batch_idx", np.arange(batch, dtype=np.int32))
    # Without the row the forward splits all alike, if it may, or none.
    alike = plan.num_splits if batch > plan.rules.most_split_by_metadata else 1
    splits = rows.get("num_splits_dynamic", np.full(batch, alike, np.int32))
    heads = rows.get("num_nheads_in_l2", np.ones(batch, np.int32))
    return Schedule(order, np.maximum(splits, 1), np.maximum(heads, 1))


def reference_schedule(problem: Problem, plan: LaunchPlan, lengths: Lengths) -> Schedule:
    """The schedule that the NumPy model makes."""
    return schedule_of(plan, reference_metadata(problem, plan, lengths))


def blocks_of_query_blocks(problem: Problem, plan: LaunchPlan, lengths: Lengths) -> tuple[Ints, Ints, Ints, Ints]:
    """(sequence, query block, first key block, number of key blocks) of every query block, by sequence: [m] each."""
    seqlen_q, seqlen_k = (one.astype(np.int64) for one in sequence_lengths(problem, lengths))
    per_row, block_m, block_n = plan.q_heads_per_row, plan.block_m, plan.block_n
    query_blocks = -(-seqlen_q * per_row // block_m)
    sequence = np.repeat(np.arange(len(seqlen_q)), query_blocks)
    block = _counted(query_blocks)
    q, k = seqlen_q[sequence], seqlen_k[sequence]
    end, start = -(-k // block_n), np.zeros_like(k)
    if plan.is_causal or plan.is_local:
        at = ((block + 1) * block_m - 1) // per_row + 1 + k - q  # one past the key of the block's last row
        last = at + (plan.window_size[1] if plan.is_local else 0)
        if plan.attention_chunk:
            last = np.minimum(last, -(-at // plan.attention_chunk) * plan.attention_chunk)
        end = np.minimum(end, -(-last // block_n))
    if plan.is_local:
        at = block * block_m // per_row + k - q
        first = at - plan.window_size[0]
        if plan.attention_chunk:
            first = np.maximum(first, at // plan.attention_chunk * plan.attention_chunk)
        start = np.maximum(first, 0) // block_n
    int32 = np.int32
    return sequence.astype(int32), block.astype(int32), start.astype(int32), np.maximum(end - start, 0).astype(int32)


def tiles_of(problem: Problem, plan: LaunchPlan, lengths: Lengths, schedule: Schedule) -> Tiles:
    """The work tiles in the order in which FA3 takes them: sequences as scheduled, longest query block first.

    A sequence that is split goes head by head, split by split. Under a causal mask or a window, one that is not goes
    block by block through as many heads as fit in L2 together.
    """
    sequence, query_block, first, blocks = blocks_of_query_blocks(problem, plan, lengths)
    reverses = plan.is_causal or plan.is_local
    position_of = np.empty(len(schedule.order), np.int64)
    position_of[schedule.order] = np.arange(len(schedule.order))
    position = position_of[sequence]
    # A row of the table is a query block of a sequence with all its heads and splits; tiles are its cells.
    splits, heads = schedule.splits[position].astype(np.int64), plan.num_heads
    row = np.repeat(np.arange(len(sequence)), splits * heads)
    cell = _counted(splits * heads)
    head, split = cell // splits[row], cell % splits[row]
    each = -(-blocks.astype(np.int64) // splits)[row]
    begin = np.minimum(split * each, blocks[row])
    length = np.minimum(each, blocks[row] - begin)
    within = query_block[row].astype(np.int64) * (-1 if reverses else 1)
    if reverses:
        in_l2 = schedule.heads_in_l2[position[row]]
        unsplit = splits[row] == 1
        # By position, then section of heads, query block, head; or head, split, query block.
        second = np.where(unsplit, head // in_l2, head)
        third, fourth = np.where(unsplit, within, split), np.where(unsplit, head, within)
        by = np.lexsort((fourth, third, second, position[row]))
    else:
        by = np.lexsort((within, split, head, position[row]))
    columns = (sequence[row], head, query_block[row], split, first[row] + begin, length)
    return Tiles(*(column[by].astype(np.int32) for column in columns))


def _counted(counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """0, 1, ... up to each of the counts, one after another."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)


@dataclass(frozen=True, eq=False)
class Simulation:
    """A schedule played: when each tile ran on which SM. Times are in us from the start of the layer."""

    problem: Problem
    plan: LaunchPlan
    costs: CardCosts
    schedule: Schedule
    tiles: Tiles
    sm: Ints  # [t]
    start: Floats  # [t]
    end: Floats  # [t]
    shared_us: float  # a key block where every SM works and nothing else is in the way
    combine_us: float  # 0: the forward has no splits and no combine kernel

    @property
    def num_sms(self) -> int:
        return self.plan.num_sms

    @property
    def attention_us(self) -> float:
        """From the layer's start to the end of the last tile."""
        return float(self.end.max(initial=self.costs.launch))

    @property
    def time_us(self) -> float:
        """The layer: launch, tiles, combining."""
        return self.attention_us + self.combine_us

    @property
    def own_metadata_us(self) -> float:
        """What the layer takes more where FA3 makes the metadata itself in front of it."""
        if self.plan.num_splits == 1:
            return _OWN_METADATA_UNSPLIT
        return float(np.interp(self.problem.batch_size, *_OWN_METADATA))

    @cached_property
    def busy_us(self) -> Floats:
        """[SMs] the time that each works."""
        return np.bincount(self.sm, self.end - self.start, minlength=self.num_sms).astype(np.float64)

    @property
    def busy_share(self) -> float:
        """The part of the SMs' time that they work, from the first tile to the end of the last."""
        span = self.attention_us - self.costs.launch
        return float(self.busy_us.sum()) / (span * self.num_sms) if span > 0 else 0.0

    @property
    def idle_sms(self) -> int:
        """SMs that never get a tile."""
        return self.num_sms - len(np.unique(self.sm))

    @property
    def waves(self) -> float:
        """Tiles over SMs."""
        return len(self.tiles) / self.num_sms

    @property
    def longest_tile(self) -> int:
        """Of `tiles`, the one that takes longest; -1: there is none."""
        return int(np.argmax(self.end - self.start)) if len(self.tiles) else -1

    @property
    def blocks_read(self) -> int:
        """Key blocks that all tiles read together."""
        return int(self.tiles.blocks.sum(dtype=np.int64))

    @property
    def bytes_read(self) -> int:
        """Of K and V by all tiles, whole blocks; what several query blocks or q heads read alike is counted again."""
        return self.blocks_read * block_bytes(kernel_of(self.problem, self.plan))

    @property
    def partial_bytes(self) -> int:
        """Of the partial outputs that are written and combined."""
        return _partial_bytes(self.problem, self.schedule)

    @property
    def allocated_bytes(self) -> int:
        """Of the partial outputs that the forward makes room for, whether they are used or not."""
        p, splits = self.problem, self.plan.num_splits
        return 0 if splits == 1 else 4 * splits * p.query_tokens * p.num_heads * (p.value_headdim + 1)

    @property
    def floor_us(self) -> float:
        """The layer if its bytes came at the memory's full bandwidth, with no tile waiting for another."""
        return self.costs.launch + self.bytes_read / (self.costs.bandwidth_gb_s * 1e3)

    def sequence_tiles(self) -> Ints:
        """[b] tiles of each sequence."""
        return np.bincount(self.tiles.sequence, minlength=self.problem.batch_size).astype(np.int32)


def simulate(
    problem: Problem, plan: LaunchPlan, lengths: Lengths, schedule: Schedule | None = None,
    costs: CardCosts | None = None,
) -> Simulation:  # fmt: skip
    """Play a schedule onto the SMs; None: the one that the NumPy model makes, with the costs of `problem.gpu`."""
    schedule = reference_schedule(problem, plan, lengths) if schedule is None else schedule
    costs = costs_of_card(problem.gpu) if costs is None else costs
    tiles = tiles_of(problem, plan, lengths, schedule)
    kernel = kernel_of(problem, plan)
    alone, tile_us = costs.of_kernel(kernel)
    # Of the card's SMs `sm_margin` may be left out, but all of those that work share the whole memory.
    shared = block_bytes(kernel) * plan.num_sms / (costs.bandwidth_gb_s * 1e3)
    sm, start, end = _played(tiles.blocks.astype(np.float64) + tile_us / shared, plan.num_sms)
    clock = _clock(end, sm, plan.num_sms, alone, shared, costs.softness)
    return Simulation(
        problem, plan, costs, schedule, tiles, sm, clock(start) + costs.launch, clock(end) + costs.launch, shared,
        _combine_us(problem, plan, schedule, costs),
    )  # fmt: skip


def kernel_of(problem: Problem, plan: LaunchPlan) -> tuple[int, int, int, int, int]:
    """The compiled kernel that serves a call."""
    return compiled_kernel(problem, plan.block_m, plan.block_n)


def _played(work: Floats, num_sms: int) -> tuple[Ints, Floats, Floats]:
    """SM, start and end of every tile, in key blocks: a tile goes to the SM that is free first."""
    free = [(0.0, sm) for sm in range(num_sms)]
    sms, starts = np.empty(len(work), np.int32), np.empty(len(work))
    replace = heapq.heapreplace
    for i, one in enumerate(work.tolist()):
        at, sm = free[0]
        sms[i], starts[i] = sm, at
        replace(free, (at + one, sm))
    return sms, starts, starts + work


class _clock:  # noqa: N801 (a function with a table)
    """From key blocks done to us. SMs fall idle only when no tile is left: one after another, at the end."""

    def __init__(self, end: Floats, sm: Ints, num_sms: int, alone: float, shared: float, softness: float) -> None:
        last = np.zeros(num_sms)
        np.maximum.at(last, sm, end)
        ends = np.sort(last[last > 0])
        working = np.arange(len(ends), 0, -1)
        a_block = (alone**softness + (shared * working / num_sms) ** softness) ** (1 / softness)
        self._blocks = np.concatenate([[0.0], ends])
        self._us = np.concatenate([[0.0], np.cumsum(np.diff(self._blocks) * a_block)])

    def __call__(self, blocks: Floats) -> Floats:
        return np.interp(blocks, self._blocks, self._us)


def _partial_bytes(problem: Problem, schedule: Schedule) -> int:
    p = problem
    rows = p.num_heads * p.max_seqlen_q
    return int(schedule.splits[schedule.splits > 1].sum(dtype=np.int64)) * rows * p.value_headdim * 4


def _combine_us(problem: Problem, plan: LaunchPlan, schedule: Schedule, costs: CardCosts) -> float:
    if plan.num_splits == 1:
        return 0.0
    most = int(schedule.splits.max(initial=1))
    if most == 1:
        return _IDLE_COMBINE
    time = costs.combine + combined_us(problem, plan.num_splits, most, costs.split)
    time += costs.partial * _partial_bytes(problem, schedule) / 1e6
    time += costs.rows * problem.query_tokens * problem.num_heads / 1000
    if most <= 32 or has_spare_rows(problem):
        return time
    return time + costs.many * math.log2(most / 32)
