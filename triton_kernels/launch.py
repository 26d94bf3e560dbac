"""Launching the kernels of kernel.py: shapes, constants and arguments."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton

from .kernel import INTERPRETED, TABLE_COLUMNS, prepare_layer_groups_kernel, prepare_varlen_num_blocks_kernel
from .layout import ROW_ALIGNMENT
from .plan import MAX_DYNAMIC_SPLIT_BATCH, LaunchPlan
from .problem import Problem
from .reciprocal import approximate_reciprocal

# cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new, leftpad_k: 1-D, int32 or int64, any stride; or None
LengthPointers = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
_ROWS = ("num_splits_dynamic", "num_m_blocks", "packed_seqlen_q", "varlen_batch_idx", "num_nheads_in_l2")
# GROUP -> (SLICE, num_warps), where the order is counted: measured on an H200. Small slices make many programs.
_SORTED_SHAPES = {32: (4, 4), 64: (2, 2), 128: (2, 2), 256: (4, 4), 512: (4, 8), 1024: (4, 8)}


def launch_shape(batch_size: int, is_sorted: bool, dynamic_splits: bool) -> tuple[int, int, int]:
    """(SLICE, GROUP, num_warps) for a batch. GROUP has six values, so that few kernels are compiled."""
    group = max(32, triton.next_power_of_2(min(batch_size, MAX_DYNAMIC_SPLIT_BATCH)))
    if not is_sorted or INTERPRETED:  # the interpreter's time is per program
        return group, group, max(1, min(8, group // 128))
    if group == 1024 and not dynamic_splits:
        return 8, group, 4
    slice_, num_warps = _SORTED_SHAPES[group]
    return slice_, group, num_warps


def triton_metadata(problem: Problem, plan: LaunchPlan, lengths: LengthPointers, out: torch.Tensor) -> None:
    """Write the metadata into `out` (int32, contiguous, at least `plan.layout.size` elements): one launch.

    Lengths are on `out`'s device. Nothing is read back, allocated or synchronised. CPU tensors need Triton's
    interpreter (TRITON_INTERPRET=1 before triton is imported).
    """
    batch_size = plan.layout.batch_size
    slice_, group, num_warps = launch_shape(batch_size, plan.layout.is_sorted, plan.dynamic_splits)
    strides = _strides(lengths)
    prepare_varlen_num_blocks_kernel[_grid(batch_size, slice_, 1)](
        out, *lengths, *strides, batch_size, problem.max_seqlen_q, problem.max_seqlen_k_new,
        *_numbers(plan), float(approximate_reciprocal(plan.num_sms)),
        LAYOUT=layout_constants(plan), CONTIGUOUS=strides == (1, 1, 1, 1, 1), SLICE=slice_, GROUP=group,
        num_warps=num_warps,
    )  # fmt: skip


def layer_groups_metadata(
    problem: Problem, plans: Sequence[LaunchPlan], table: torch.Tensor, lengths: LengthPointers, out: torch.Tensor
) -> None:
    """Write the metadata of one batch for several plans into `out`, where `table` (see `layer_groups_table`) says.

    One launch, on the terms of `triton_metadata`. The plans share batch size, query length and appended keys, which
    are taken from `problem`.
    """
    batch_size = problem.batch_size
    any_sorted = any(plan.layout.is_sorted for plan in plans)
    slice_, group, num_warps = launch_shape(batch_size, any_sorted, any(plan.dynamic_splits for plan in plans))
    strides = _strides(lengths)
    prepare_layer_groups_kernel[_grid(batch_size, slice_, len(plans))](
        out, table, *lengths, *strides, batch_size, problem.max_seqlen_q, problem.max_seqlen_k_new,
        LAYOUTS=tuple(map(layout_constants, plans)), CONTIGUOUS=strides == (1, 1, 1, 1, 1), SLICE=slice_, GROUP=group,
        num_warps=num_warps,
    )  # fmt: skip


def layer_groups_table(plans: Sequence[LaunchPlan], starts: Sequence[int]) -> torch.Tensor:
    """[len(plans), TABLE_COLUMNS] int32 on the CPU: the numbers of each plan, and the start of its metadata."""
    reciprocals = (struct.unpack("<i", struct.pack("<f", approximate_reciprocal(plan.num_sms)))[0] for plan in plans)
    rows = [
        [*_numbers(plan), reciprocal, start] for plan, reciprocal, start in zip(plans, reciprocals, starts, strict=True)
    ]
    assert all(len(row) == TABLE_COLUMNS.value for row in rows)
    return torch.tensor(rows, dtype=torch.int32)


def _strides(lengths: LengthPointers) -> tuple[int, ...]:
    return tuple(1 if t is None else t.stride(0) for t in lengths)


def _grid(batch_size: int, slice_: int, layer_groups: int) -> tuple[int, int, int]:
    padded = -(-batch_size // ROW_ALIGNMENT) * ROW_ALIGNMENT  # the padding is written, too
    slices = triton.cdiv(min(padded, MAX_DYNAMIC_SPLIT_BATCH), slice_)
    return slices or 1, triton.cdiv(batch_size, MAX_DYNAMIC_SPLIT_BATCH) or 1, layer_groups


@lru_cache(maxsize=4096)
def _numbers(plan: LaunchPlan) -> tuple[int, ...]:
    """The kernels' arguments from q_heads_per_row to is_causal."""
    return (
        plan.q_heads_per_row, plan.block_m, _multiplier(plan.block_m), plan.block_n, _multiplier(plan.block_n),
        plan.num_splits, plan.num_heads, plan.heads_per_l2_head, plan.max_kvblocks_in_l2, int(plan.is_causal),
    )  # fmt: skip


def _multiplier(tile: int) -> int:
    """What kernel._cdiv_tile multiplies with, as an int32 bit pattern."""
    multiplier = -(-(2**32) // (tile // 16))
    return multiplier - 2**32 if multiplier >= 2**31 else multiplier


@lru_cache(maxsize=4096)
def layout_constants(plan: LaunchPlan) -> tuple[Any, ...]:
    """Place of each of _ROWS or -1, number of rows, whether there is a semaphore, whether there are splits."""
    names = plan.layout.row_names
    places = (names.index(row) if row in names else -1 for row in _ROWS)
    return (*places, len(names), plan.layout.has_semaphore, plan.dynamic_splits)
