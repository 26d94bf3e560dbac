"""Launching the kernels of kernel.py: shapes, constants and arguments.

A kernel is compiled for: the rows of the layout and whether there are splits (LAYOUT: of one build, mask and kind of
num_splits), whether lengths are contiguous, their dtypes and which of the optional ones are given, and the launch
shape, of which there are few. Batch sizes, lengths, heads, tiles and every other number are arguments.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from . import kernel
from .balance import Costs
from .builds import MAX_DYNAMIC_SPLIT_BATCH
from .driver import DriverLaunch, LoadedKernel, load
from .kernel import Layout, Numbers, prepare_layer_groups_kernel, prepare_varlen_num_blocks_kernel
from .layout import ROWS, padded
from .plan import LaunchPlan
from .problem import DEFAULT_GPU, Problem
from .reciprocal import approximate_reciprocal
from .shapes import GROUPS, MANY, shipped_shapes

INTERPRETED = kernel.INTERPRETED
# cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new, leftpad_k: 1-D, int32 or int64, any stride; or None
LengthPointers = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
EARLY_VARIABLE = "FA3_METADATA_EARLY_LAUNCH"  # 0: start only when the kernel before has ended
DRIVER_VARIABLE = "FA3_METADATA_DRIVER_LAUNCH"  # 0: Triton launches, with its hooks
_NO_COSTS = Costs(0.0, (0.0, 0.0, 0.0, 0.0), 0.0)
_ONE_SPLIT, _FA3_RULE, _SEARCH, _LOAD, _FIXED = (
    int(way.value) for way in (kernel.ONE_SPLIT, kernel.FA3_RULE, kernel.SEARCH, kernel.LOAD, kernel.FIXED)
)
_NO_SEMAPHORE, _SEMAPHORE_FIRST, _SEMAPHORE_LAST = (
    int(place.value) for place in (kernel.NO_SEMAPHORE, kernel.SEMAPHORE_FIRST, kernel.SEMAPHORE_LAST)
)
_UNIT_STRIDES = (1, 1, 1, 1, 1)
_ROWS = {  # fields of kernel.Layout
    "splits_row": "num_splits_dynamic", "m_blocks_row": "num_m_blocks", "seqlen_q_row": "packed_seqlen_q",
    "batch_idx_row": "varlen_batch_idx", "nheads_row": "num_nheads_in_l2",
}  # fmt: skip
if set(_ROWS.values()) != set(ROWS):  # a row that nobody writes would be read as it was
    raise ImportError(f"the kernels write the rows {', '.join(_ROWS.values())}, but layouts may have {', '.join(ROWS)}")


def launch_shape(batch_size: int, is_sorted: bool, balanced: bool, gpu: str = DEFAULT_GPU) -> tuple[int, int, int]:
    """(SLICE, GROUP, num_warps) for a batch. GROUP has six values, so that few kernels are compiled."""
    group = max(GROUPS[0], 1 << max(0, min(batch_size, MAX_DYNAMIC_SPLIT_BATCH) - 1).bit_length())
    if not is_sorted or INTERPRETED:  # the interpreter's time is per program
        return group, group, max(1, min(8, group // 128))
    slice_, num_warps = shipped_shapes(gpu).find(group, balanced, batch_size > MANY)
    return slice_, group, num_warps


class Launch:
    """A kernel with everything bound but the pointers, for one batch size.

    Triton compiles a kernel, which is then launched through the driver, past Triton's launch hooks and without the
    launcher that Triton would have a C compiler build. Through Triton's launch go lengths that are not contiguous,
    kernels that driver.py refuses, and all of them if FA3_METADATA_DRIVER_LAUNCH was 0 when this was made.
    """

    def __init__(
        self, function: Any, problem: Problem, plans: Sequence[LaunchPlan], batch_size: int,
        numbers: tuple[int | float, ...], constants: dict[str, Any],
    ) -> None:  # fmt: skip
        """`numbers` are the kernel's arguments after the batch size, `constants` those that are not the shape's."""
        self._slice, group, num_warps = launch_shape(batch_size, *shaped_by(plans, problem.gpu))
        self._layer_groups, self._numbers = len(plans), numbers
        self._batch_size, self._grid = batch_size, _grid(batch_size, self._slice, len(plans))
        # Programmatic dependent launch: programs start while the kernel before ends, and wait for its end themselves.
        # That kernel must have waited for those before it, as FA3's do.
        early = problem.arch >= 90 and not INTERPRETED and kernel.CAN_START_EARLY
        early = early and os.environ.get(EARLY_VARIABLE, "1") != "0"
        self._function, self._early = function, early
        self._past_triton = os.environ.get(DRIVER_VARIABLE, "1") != "0"
        # in the order of the kernel's parameters
        self._constants = constants | {"CONTIGUOUS": None, "EARLY": early, "SLICE": self._slice, "GROUP": group}
        # Policy "balanced" without: the NumPy model rounds after every operation. Triton's default is not the same
        # in every version.
        fusion = all(plan.costs is None for plan in plans)
        self._options: dict[str, Any] = {"num_warps": num_warps, "enable_fp_fusion": fusion}
        if early:
            self._options["launch_pdl"] = True
        self._launches: dict[tuple[Any, ...], DriverLaunch] = {}

    def for_batch(self, batch_size: int) -> Launch:
        """The same kernel for another batch size, for which `launch_shape` answers the same."""
        made = object.__new__(Launch)
        grid = _grid(batch_size, self._slice, self._layer_groups)
        made.__dict__ = {**self.__dict__, "_batch_size": batch_size, "_grid": grid}
        return made

    def __call__(self, pointers: tuple[torch.Tensor, ...], lengths: LengthPointers) -> None:
        """Launch on the current stream and device. `lengths` are the last of the kernel's pointers."""
        key = _key(lengths)
        launch = self._launches.get(key) or self._driver_launch(key, pointers, lengths)
        if launch is not None:
            stream = torch._C._cuda_getCurrentRawStream(lengths[0].device.index)
            if launch(stream, _addresses(pointers, lengths), self._batch_size, self._grid):
                return
        contiguous = key[1]
        strides = _UNIT_STRIDES if contiguous else tuple(1 if t is None else t.stride(0) for t in lengths)
        numbers, constants = (self._batch_size, *self._numbers), self._constants | {"CONTIGUOUS": contiguous}
        self._function[self._grid](*pointers, *lengths, *strides, *numbers, **constants, **self._options)

    def repeat(self, pointers: tuple[torch.Tensor, ...], lengths: LengthPointers) -> Callable[[], bool] | None:
        """The same launch again, or None where Triton has to launch.

        It launches on the current stream, and answers False, having done nothing, where another device is current.
        The caller sees to it that the tensors stay as they are.
        """
        launch = self._launches.get(_key(lengths)) or self._driver_launch(_key(lengths), pointers, lengths)
        if launch is None:
            return None
        device, addresses = lengths[0].device.index, _addresses(pointers, lengths)
        current_device, current_stream = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream
        again = launch.bound(addresses, self._batch_size, self._grid)
        return lambda: current_device() == device and again(current_stream(device))

    def autotune(
        self, shapes: Sequence[tuple[int, int]], bench: Callable[..., Sequence[float]],
        pointers: tuple[torch.Tensor, ...], lengths: LengthPointers,
    ) -> dict[tuple[int, int], float]:  # fmt: skip
        """What `triton.autotune` finds for launch shapes (SLICE, num_warps), at least two: by `bench`, its do_bench.

        The kernel of a single plan, on contiguous lengths. `pointers` are written to by each of them.
        """
        configs = [triton.Config({"SLICE": slice_}, num_warps=num_warps) for slice_, num_warps in shapes]
        tuner = triton.autotune(configs, key=[], do_bench=bench)(self._function)
        constants = {name: value for name, value in self._constants.items() if name != "SLICE"}
        options = {name: value for name, value in self._options.items() if name != "num_warps"}
        launch = tuner[lambda chosen: _grid(self._batch_size, chosen["SLICE"], 1)]
        numbers, constants = (self._batch_size, *self._numbers), constants | {"CONTIGUOUS": True}
        launch(*pointers, *lengths, *_UNIT_STRIDES, *numbers, **constants, **options)
        return {(one.kwargs["SLICE"], one.num_warps): times[0] for one, times in tuner.configs_timings.items()}

    def _driver_launch(
        self, key: tuple[Any, ...], pointers: tuple[torch.Tensor, ...], lengths: LengthPointers
    ) -> DriverLaunch | None:
        """The launch of a kernel compiled for these tensors; None: Triton must launch."""
        if INTERPRETED or not self._past_triton or not key[1]:  # contiguous
            return None
        identity, num_pointers = self._identity(key), sum(t is not None for t in (*pointers, *lengths))
        if identity in _loaded:
            made = _loaded[identity]
        else:
            constants = self._constants | {"CONTIGUOUS": True}
            arguments = (*pointers, *lengths, *_UNIT_STRIDES, self._batch_size, *self._numbers)

            def compiled() -> Any:
                return self._function.warmup(*arguments, grid=self._grid, **constants, **self._options)

            num_numbers = len(_UNIT_STRIDES) + 1 + len(self._numbers)
            made = load(compiled, lengths[0].device.index, num_pointers, num_numbers, self._early)
            _loaded[identity] = made
        if made is None:
            return None
        found = _driver_launches.get((made, self._numbers))
        if found is None:
            if len(_driver_launches) >= _MOST_DRIVER_LAUNCHES:
                _driver_launches.clear()
            numbers = (self._batch_size, *self._numbers)
            found = DriverLaunch(made, num_pointers, _UNIT_STRIDES, numbers, self._early)
            _driver_launches[made, self._numbers] = found
        self._launches[key] = found
        return found

    def _identity(self, key: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a kernel is compiled for."""
        return (self._function, *self._constants.items(), *self._options.items(), *key)


_loaded: dict[tuple[Any, ...], LoadedKernel | None] = {}  # by Launch._identity; None: Triton must launch it
# By the kernel, and all numbers but the batch size.
_driver_launches: dict[tuple[Any, tuple[int | float, ...]], DriverLaunch] = {}
_MOST_DRIVER_LAUNCHES = 1024


def shaped_by(plans: Sequence[LaunchPlan], gpu: str) -> tuple[bool, bool, str]:
    """What `launch_shape` asks but the batch size. Where only sizes differ, the shape decides which kernel runs."""
    return any(plan.layout.is_sorted for plan in plans), any(plan.costs is not None for plan in plans), gpu


def metadata_launch(problem: Problem, plan: LaunchPlan) -> Launch:
    """The launch that writes one plan's metadata; called with (out,) and the lengths.

    `out` is int32, contiguous, of at least `plan.layout.size` elements; lengths are on its device. A call reads nothing
    back, allocates nothing and does not synchronise. CPU tensors need Triton's interpreter (TRITON_INTERPRET=1 before
    triton is imported).
    """
    numbers = (problem.max_seqlen_q, problem.max_seqlen_k_new, *_numbers(plan))
    constants = {"LAYOUT": layout_constants(plan)}
    return Launch(prepare_varlen_num_blocks_kernel, problem, [plan], plan.layout.batch_size, numbers, constants)


def layer_groups_launch(problem: Problem, plans: Sequence[LaunchPlan]) -> Launch:
    """The same for several plans at once; called with (out, table), where `table` is `layer_groups_table(...)`.

    The plans share batch size, query length and appended keys, which are taken from `problem`.
    """
    numbers = (problem.max_seqlen_q, problem.max_seqlen_k_new)
    constants = {"LAYOUTS": tuple(map(layout_constants, plans))}
    return Launch(prepare_layer_groups_kernel, problem, plans, problem.batch_size, numbers, constants)


def layer_groups_table(plans: Sequence[LaunchPlan], starts: Sequence[int]) -> torch.Tensor:
    """[len(plans), kernel.TABLE_COLUMNS] int32 on the CPU: the numbers of each plan, and the start of its metadata."""
    rows = [[*map(_bits, _numbers(plan)), start] for plan, start in zip(plans, starts, strict=True)]
    return torch.tensor(rows, dtype=torch.int32)


def _key(lengths: LengthPointers) -> tuple[Any, ...]:
    """Device, whether all are contiguous, and the dtype of each (False: not given)."""
    k, q, used, new, pad = lengths
    return (
        k.device.index, _are_contiguous(lengths), k.dtype, q is not None and q.dtype, used is not None and used.dtype,
        new is not None and new.dtype, pad is not None and pad.dtype,
    )  # fmt: skip


def _addresses(pointers: tuple[torch.Tensor, ...], lengths: LengthPointers) -> list[int]:
    return [t.data_ptr() for t in (*pointers, *lengths) if t is not None]


def _are_contiguous(lengths: LengthPointers) -> bool:
    """Whether every given tensor has unit stride."""
    k, q, used, new, pad = lengths
    return (
        k.stride(0) == 1
        and (q is None or q.stride(0) == 1)
        and (used is None or used.stride(0) == 1)
        and (new is None or new.stride(0) == 1)
        and (pad is None or pad.stride(0) == 1)
    )


def _grid(batch_size: int, slice_: int, layer_groups: int) -> tuple[int, int, int]:
    slices = -(-min(padded(batch_size), MAX_DYNAMIC_SPLIT_BATCH) // slice_)  # the padding is written, too
    return slices or 1, -(-batch_size // MAX_DYNAMIC_SPLIT_BATCH) or 1, layer_groups


def _numbers(plan: LaunchPlan) -> Numbers:
    costs = plan.costs or _NO_COSTS
    share = approximate_reciprocal(plan.num_sms) if plan.costs is None else plan.share_of_load
    return Numbers(
        q_heads_per_row=plan.q_heads_per_row,
        block_m=plan.block_m,
        multiplier_m=_multiplier(plan.block_m),
        block_n=plan.block_n,
        multiplier_n=_multiplier(plan.block_n),
        num_splits=plan.num_splits,
        num_heads=plan.num_heads,
        heads_per_l2_head=plan.heads_per_l2_head,
        max_kvblocks_in_l2=plan.max_kvblocks_in_l2,
        is_causal=int(plan.is_causal),
        load_factor=float(share),
        window_left=plan.window_size[0] if plan.is_local else 0,
        attention_chunk=plan.attention_chunk,
        fixed_blocks=costs.fixed_blocks,
        causal_saving=plan.causal_saving,
        tile_cost=costs.tile,
        block_cost_0=costs.block[0],
        block_cost_1=costs.block[1],
        block_cost_2=costs.block[2],
        block_cost_3=costs.block[3],
        split_cost=costs.per_split,
        combine_cost=costs.combine,
        least_splits_cost=costs.least_splits,
    )


def _bits(number: int | float) -> int:
    """An int32 as it is, a float32 by its bits."""
    bits: int = struct.unpack("<i", struct.pack("<f", number))[0] if isinstance(number, float) else number
    return bits


def _multiplier(tile: int) -> int:
    """What blocks.cdiv_tile multiplies with, as an int32 bit pattern."""
    multiplier = -(-(2**32) // (tile // 16))
    return multiplier - 2**32 if multiplier >= 2**31 else multiplier


def layout_constants(plan: LaunchPlan) -> tuple[Any, ...]:
    """A plan's Layout, as the kernels take it: as a plain tuple."""
    layout, names = plan.layout, plan.layout.row_names
    semaphore = _NO_SEMAPHORE
    if layout.has_semaphore:
        semaphore = _SEMAPHORE_FIRST if layout.semaphore_first else _SEMAPHORE_LAST
    made = Layout(
        **{field: names.index(row) if row in names else -1 for field, row in _ROWS.items()},
        num_rows=len(names),
        alignment=layout.row_alignment,
        semaphore=semaphore,
        splits=_splits_constant(plan),
        window=plan.costs is not None and plan.is_local,
        short=plan.is_short,
    )
    return tuple(made)


def _splits_constant(plan: LaunchPlan) -> int:
    if not plan.dynamic_splits:
        return _ONE_SPLIT
    if plan.costs is None:
        return _FA3_RULE
    if plan.costs.fixed_blocks:
        return _FIXED
    return _SEARCH if plan.searches_splits else _LOAD
