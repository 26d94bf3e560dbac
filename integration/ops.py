"""`get_scheduler_metadata` as a torch operator, so that torch.compile and export see one opaque node.

The public function calls these while it is being compiled; nobody needs to call them by hand.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch

from .arguments import LengthTensors
from .triton_kernels.builds import MAX_DYNAMIC_SPLIT_BATCH

_DECODE = 1024  # query tokens up to which the bound on splits rises with max_seqlen_k
_LONGEST = 2**22
_ARGUMENTS = (
    "Tensor cache_seqlens, SymInt batch_size, SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt num_heads, "
    "SymInt num_heads_k, SymInt headdim, ScalarType qkv_dtype, SymInt? headdim_v, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? leftpad_k, SymInt? page_size, "
    "SymInt max_seqlen_k_new, bool causal, SymInt window_left, SymInt window_right, SymInt attention_chunk, "
    "bool has_softcap, SymInt num_splits, bool? pack_gqa, SymInt sm_margin, str? build, str policy, str backend, "
    "SymInt? arch, SymInt? num_sms, bool batch_invariant, SymInt max_partial_bytes, "
    "SymInt? total_q, bool forward_is_told"
)


def _call(arguments: dict[str, Any], out: torch.Tensor | None = None) -> torch.Tensor:
    from .api import get_scheduler_metadata

    arguments["window_size"] = (arguments.pop("window_left"), arguments.pop("window_right"))
    return get_scheduler_metadata(**arguments, out=out)


def _by_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(_NAMES, args, strict=False)) | kwargs


_NAMES = tuple(part.split()[-1] for part in _ARGUMENTS.split(", "))


@torch.library.custom_op("fa3_metadata::get_scheduler_metadata", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
def get_scheduler_metadata_op(*args: Any, **kwargs: Any) -> torch.Tensor:
    """New metadata."""
    return _call(_by_name(args, kwargs))


@torch.library.custom_op(
    "fa3_metadata::get_scheduler_metadata_out", mutates_args=("out",), schema=f"(Tensor(a!) out, {_ARGUMENTS}) -> ()"
)
def get_scheduler_metadata_out_op(out: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """Metadata in place; `out` must have exactly the layout's size, since no view of it is returned."""
    made = _call(_by_name(args, kwargs), out)
    if made.shape != out.shape:
        raise ValueError(f"out must have exactly {made.numel()} elements under torch.compile, got {out.numel()}")


@get_scheduler_metadata_op.register_fake
def _(*args: Any, **kwargs: Any) -> torch.Tensor:
    """The right size for a batch size that is not known yet."""
    from .api import plan_call

    arguments = _by_name(args, kwargs)
    batch_size = arguments["batch_size"]
    lengths = arguments["cache_seqlens"]
    presence = LengthTensors._fields[1:]
    not_static = (*presence, "batch_size", "backend", "max_seqlen_k")
    static = {name: _plain(arguments[name]) for name in _NAMES if name not in not_static}
    static["window_size"] = (static.pop("window_left"), static.pop("window_right"))
    static |= {name: arguments[name] for name in presence} | {"cache_seqlens": None}

    def plan_at(batch: int, max_seqlen_k: int) -> Any:
        sizes = {"batch_size": batch, "max_seqlen_k": max_seqlen_k}
        return plan_call(static | sizes, lengths.device)

    def layout_at(batch: int, max_seqlen_k: int) -> Any:
        return plan_at(batch, max_seqlen_k)[3].layout

    def rows_at(max_seqlen_k: int) -> Any:
        both = (layout_at(batch, max_seqlen_k) for batch in (1, MAX_DYNAMIC_SPLIT_BATCH + 1))
        return [(layout.row_names, layout.has_semaphore) for layout in both]

    longest = arguments["max_seqlen_k"]
    if isinstance(longest, torch.SymInt) and arguments["policy"] == "fa3" and static["max_seqlen_q"] <= _DECODE:
        # Guard the few places where the rows change, not every width that a page table may have.
        longest = max((edge for edge in _edges(rows_at, static["window_size"][0]) if longest >= edge), default=0)
    longest = _plain(longest)

    def layout(batch: int) -> Any:
        return layout_at(batch, longest)

    # The bound on splits of the policy, and that of some builds, depends on the batch size. So do, with it, vLLM's rows
    # and whether there is a semaphore on sm_8x.
    _, problem, rules, _ = plan_at(1, longest)
    if problem.policy != "fa3" or (problem.arch < 90 and rules.splits_count != "one_sequence"):
        return lengths.new_empty(layout(_plain(batch_size)).size, dtype=torch.int32)
    few, many = layout(1), layout(MAX_DYNAMIC_SPLIT_BATCH + 1)
    # In this order, so that the batch size is guarded only where it matters.
    if len(few.row_names) != len(many.row_names) and batch_size > MAX_DYNAMIC_SPLIT_BATCH:
        few = many
    return lengths.new_empty(few.size_for(batch_size), dtype=torch.int32)


@get_scheduler_metadata_out_op.register_fake
def _(out: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """Nothing to allocate."""


def _edges(rows_at: Callable[[int], Any], window_left: int) -> list[int]:
    """The lengths from which on `rows_at` gives something else than before; it does so once between two of a window."""
    starts = sorted({1, max(window_left + 1, 1), max(window_left + 2, 1)})
    found = []
    for start, end in zip(starts, [*starts[1:], _LONGEST], strict=True):
        found.append(start)
        if rows_at(start) != rows_at(end - 1):
            found.append(bisect_left(range(end), True, start, key=lambda length: rows_at(length) != rows_at(start)))
    return found


def _plain(value: Any) -> Any:
    """A number that may be symbolic as a number that is not (and a guard on it)."""
    return int(value) if isinstance(value, torch.SymInt) else value
