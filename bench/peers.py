"""Everything that is measured beside our kernel, on the same problem and the same lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import fa3_metadata
import torch
from fa3_metadata import MetadataLayout, MetadataPlan
from fa3_metadata.installed import native_op, provider_of
from fa3_metadata.tools.timing import Launch
from fa3_metadata.triton_kernels.builds import package_of, rules_for
from fa3_metadata.triton_kernels.layout import padded

TITLES = {
    "ours": "plan.update",
    "ours_out": "get(out=)",
    "native": "native",
    "native_op": "native op",
    "sglang": "SGLang path",
    "flag_gems": "FlagGems",
    "empty_grid": "empty grid",
    "floor": "floor",
}
MEANINGS = {
    "ours": "ours: MetadataPlan.update",
    "ours_out": "ours: get_scheduler_metadata(out=...)",
    "native": "get_scheduler_metadata of the installed wheel, by its Python front end; allocates",
    "native_op": "the same, the torch op itself",
    "sglang": "what SGLang does before a replay: native, copy into a kept buffer, zero the buffer's tail",
    "flag_gems": "FlagGems' Triton port of an older vLLM's; splits alone, in another layout",
    "empty_grid": "a Triton kernel that does nothing, with our grid and warps",
    "floor": "the same with one program of one warp; both launched plainly",
}
_SGLANG_BATCH = 512  # the largest batch SGLang's buffer is made for, unless a larger one is measured


class UnavailableError(Exception):
    """A peer that cannot be measured here, and why."""


@dataclass(frozen=True)
class Case:
    """One problem: a bf16 decode batch over paged KV, causal."""

    batch_size: int
    num_heads: int = 8
    num_heads_k: int = 1
    headdim: int = 128
    page_size: int = 64
    max_seqlen_k: int = 65536
    window: int | None = None  # keys to the left of a query that it sees

    @property
    def window_size(self) -> tuple[int, int]:
        return (-1, -1) if self.window is None else (self.window, 0)

    def call(self, lengths: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments that ours and every wheel's front end take alike, by position and by name."""
        heads = (self.num_heads, self.num_heads_k, self.headdim)
        by_name = {"page_size": self.page_size, "causal": True, "window_size": self.window_size}
        return (self.batch_size, 1, self.max_seqlen_k, *heads, lengths), by_name

    def arguments(self, lengths: torch.Tensor) -> dict[str, Any]:
        """The same, all by name, for `fa3_metadata`."""
        by_position, by_name = self.call(lengths)
        names = ("batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads", "num_heads_k", "headdim", "cache_seqlens")
        return dict(zip(names, by_position, strict=True)) | by_name

    def plan(self, max_batch_size: int, device: torch.device) -> MetadataPlan:
        return MetadataPlan(
            max_batch_size=max_batch_size, max_seqlen_k=self.max_seqlen_k, num_heads=self.num_heads,
            num_heads_k=self.num_heads_k, headdim=self.headdim, device=device, page_size=self.page_size, causal=True,
            window_size=self.window_size,
        )  # fmt: skip


class Lengths:
    """Several tensors of lengths that take turns, drawn anew between samples; never zero."""

    def __init__(self, case: Case, device: torch.device, sets: int = 8) -> None:
        line = 32  # int32 elements: 128 bytes, so that no two sets share a cache line
        self._all = torch.empty(sets, -(-case.batch_size // line) * line, dtype=torch.int32, device=device)
        self._longest = case.max_seqlen_k
        self.sets = [row[: case.batch_size] for row in self._all]
        self.redraw()

    def redraw(self) -> None:
        """One launch for all sets."""
        self._all.random_(1, self._longest + 1)


@dataclass(frozen=True)
class Peer:
    """`launches`: one for each set of lengths, which returns what it made."""

    name: str
    launches: list[Launch]
    makes: str = "metadata"  # laid out as ours; "splits": FlagGems' tensor; "nothing"
    not_captured: str | None = None  # why it cannot be in a CUDA graph

    def differing(self, layout: MetadataLayout, ours: torch.Tensor, theirs: torch.Tensor) -> list[str]:
        """Names of the rows of its tensor that are not as in ours, which `layout` describes."""
        if self.makes == "nothing":
            return []
        return (differing_rows if self.makes == "metadata" else differing_splits)(layout, ours, theirs)


def make_peers(case: Case, lengths: Lengths, build: str) -> tuple[list[Peer], dict[str, str]]:
    """Ours first, then all that can be measured here; and why the others cannot, by name. Each has run once."""
    peers = _ours(case, lengths)
    missing: dict[str, str] = {}
    for name, make in _MAKERS.items():
        try:
            peer = make(case, lengths, build)
            peer.launches[0]()
        except Exception as error:  # whatever a package raises where it does not load or run
            missing[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
        else:
            peers.append(peer)
    return peers, missing


def differing_rows(layout: MetadataLayout, ours: torch.Tensor, theirs: torch.Tensor) -> list[str]:
    """Rows that differ between two tensors of one layout. Padding, which FA3 leaves unwritten, is left out."""
    if theirs.shape != ours.shape:
        return [f"length {theirs.numel()} instead of {ours.numel()}"]
    a, b = (fa3_metadata.unpack_metadata(tensor, layout) for tensor in (ours, theirs))
    wrong = [name for name in a if not torch.equal(a[name], b[name])]
    if layout.semaphore is not None and not torch.equal(ours[layout.semaphore], theirs[layout.semaphore]):
        wrong.append("semaphore")
    return wrong


def differing_splits(layout: MetadataLayout, ours: torch.Tensor, theirs: torch.Tensor) -> list[str]:
    """Compare with FlagGems' tensor: the semaphore, then splits in batch order; no splits above 992 sequences."""
    rows = fa3_metadata.unpack_metadata(ours, layout)
    if theirs.shape != (layout.batch_size + 1,):
        return [f"it makes {max(theirs.numel() - 1, 0)} of {layout.batch_size} num_splits_dynamic"]
    splits = rows.get("num_splits_dynamic", torch.ones_like(theirs[1:]))
    if layout.is_sorted:
        splits = torch.empty_like(splits).index_copy_(0, rows["varlen_batch_idx"].long(), splits)
    return [] if torch.equal(splits, theirs[1:]) else ["num_splits_dynamic"]


def _ours(case: Case, lengths: Lengths) -> list[Peer]:
    device = lengths.sets[0].device
    plan = case.plan(case.batch_size, device)
    size = fa3_metadata.metadata_layout(**case.arguments(lengths.sets[0])).size
    out = torch.empty(size, dtype=torch.int32, device=device)

    def in_place(seqlens: torch.Tensor) -> Launch:
        by_position, by_name = case.call(seqlens)
        return lambda: fa3_metadata.get_scheduler_metadata(*by_position, **by_name, out=out)

    return [
        Peer("ours", [partial(plan.update, seqlens) for seqlens in lengths.sets]),
        Peer("ours_out", [in_place(seqlens) for seqlens in lengths.sets]),
    ]


def _front_end(build: str) -> Callable[..., torch.Tensor]:
    native_op(build)  # says best what is missing
    made: Callable[..., torch.Tensor] = import_module(provider_of(build).module).get_scheduler_metadata
    return made


def _native(case: Case, lengths: Lengths, build: str) -> Peer:
    front_end = _front_end(build)

    def launch(seqlens: torch.Tensor) -> Launch:
        by_position, by_name = case.call(seqlens)
        return lambda: front_end(*by_position, **by_name)

    return Peer("native", [launch(seqlens) for seqlens in lengths.sets])


def _native_op(case: Case, lengths: Lengths, build: str) -> Peer:
    op = native_op(build)
    chunk = (0,) if rules_for(build).has_attention_chunk else ()

    def launch(seqlens: torch.Tensor) -> Launch:
        everything = (
            case.batch_size, 1, case.max_seqlen_k, case.num_heads, case.num_heads_k, case.headdim, case.headdim,
            torch.bfloat16, seqlens, None, None, None, None, None, case.page_size, 0, True, *case.window_size, *chunk,
            False, 0, None, 0,
        )  # fmt: skip
        return lambda: op(*everything)

    return Peer("native_op", [launch(seqlens) for seqlens in lengths.sets])


def _sglang(case: Case, lengths: Lengths, build: str) -> Peer:
    """The three operations of SGLang 0.5.11 for a decode batch whose graph is about to be replayed.

    There they come before the replay; in a graph they are measured for what they keep the device busy with.
    """
    if package_of(build) not in ("sglang-kernel", "sgl-kernel"):
        raise UnavailableError("SGLang's path needs an installed sglang-kernel")
    if case.window is not None:
        raise UnavailableError("SGLang makes no metadata for layers with a window")
    front_end = _front_end(build)
    device = lengths.sets[0].device
    cu_seqlens_q = torch.arange(case.batch_size + 1, dtype=torch.int32, device=device)
    # Larger than any batch measured, since the buffer has a tail to zero for all but the largest batch.
    capacity = padded(max(_SGLANG_BATCH, case.batch_size + 4))
    kept = torch.zeros(4 * capacity + 1, dtype=torch.int32, device=device)

    def launch(seqlens: torch.Tensor) -> Launch:
        arguments = case.arguments(seqlens) | {"cu_seqlens_q": cu_seqlens_q, "has_softcap": False, "num_splits": 0}

        def make_copy_zero() -> torch.Tensor:
            made = front_end(**arguments)
            size = made.shape[0]
            kept[:size] = made
            kept[size:] = 0
            return kept[:size]

        return make_copy_zero

    return Peer("sglang", [launch(seqlens) for seqlens in lengths.sets])


def _flag_gems(case: Case, lengths: Lengths, build: str) -> Peer:
    if find_spec("flag_gems") is None:
        raise UnavailableError("flag_gems is not installed")
    function = import_module("flag_gems").get_scheduler_metadata

    def launch(seqlens: torch.Tensor) -> Launch:
        heads = (case.num_heads, case.num_heads_k, case.headdim, case.headdim)
        by_position = (case.batch_size, 1, case.max_seqlen_k, *heads, torch.bfloat16, seqlens)
        left, right = case.window_size
        by_name = {"page_size": case.page_size, "is_causal": True, "window_size_left": left, "window_size_right": right}
        return lambda: function(*by_position, **by_name)

    return Peer(
        "flag_gems",
        [launch(seqlens) for seqlens in lengths.sets],
        makes="splits",
        not_captured="reads a device value back, which a capture forbids",
    )


def _empty_grid(case: Case, lengths: Lengths, build: str) -> Peer:
    from .empty_kernel import empty_launch, shape_of_ours  # needs Triton

    seqlens = lengths.sets[0]
    return Peer("empty_grid", [empty_launch(*shape_of_ours(case.arguments(seqlens)), seqlens)], makes="nothing")


def _floor(case: Case, lengths: Lengths, build: str) -> Peer:
    from .empty_kernel import empty_launch

    return Peer("floor", [empty_launch((1, 1, 1), 1, lengths.sets[0])], makes="nothing")


_MAKERS: dict[str, Callable[[Case, Lengths, str], Peer]] = {
    "native": _native,
    "native_op": _native_op,
    "sglang": _sglang,
    "flag_gems": _flag_gems,
    "empty_grid": _empty_grid,
    "floor": _floor,
}
