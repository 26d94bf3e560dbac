"""A key of all that the metadata of a forward's call depends on, read fast: layers ask the same again and again.

`ForwardCall.read` reads a call thoroughly, once for each key. What it goes by is here: a name that it reads is a tensor
whose sizes count, a tensor of lengths, or a value; the names that do not matter are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch

from .calls import NO_MATTER, names_of
from .schedules import keep

_SIZED = ("q", "k_cache", "v_cache", "page_table", "k_new")
_LENGTHS = ("cache_seqlens", "cu_seqlens_q", "seqused_q", "cu_seqlens_k_new", "leftpad_k")
_NO_VALUES = {*_SIZED, *_LENGTHS, "window_size", "scheduler_metadata"}  # the last is None in a call that is asked about
_PLAIN = frozenset({type(None), bool, int, float, str})
_MOST_READERS = 64
_Get = Callable[[Mapping[str, Any]], tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class _Reader:
    """How to read the calls of one forward that give these arguments."""

    sized: _Get
    lengths: _Get
    values: _Get
    window: str | None  # its name, where it is given: some hand over a list


class CallKeys:
    """The keys of the calls of one forward; `defaults` are its own, by name."""

    def __init__(self, defaults: Mapping[str, Any]) -> None:
        self._defaults = defaults
        self._readers: dict[tuple[str, ...], _Reader] = {}

    def of(self, call: Mapping[str, Any], where: Hashable) -> tuple[Any, ...] | None:
        """The key of a call made there; None: each such call is to be read, since it cannot be told from others."""
        names = tuple(call)
        reader = self._readers.get(names) or self._read_names(names)
        try:
            sized, values = reader.sized(call), reader.values(call)
            if reader.window is not None and (window := call[reader.window]) is not None:
                values = *values, "window", *window
            types = tuple(map(type, values))
            if not _PLAIN.issuperset(types):  # which may hold memory of the caller's alive, or not tell by `==`
                return None
            return (
                reader, where, sized[0].dtype,
                *[None if tensor is None else tensor.shape for tensor in sized],
                *[None if tensor is None else identity(tensor) for tensor in reader.lengths(call)],
                types, values,
            )  # fmt: skip
        except (AttributeError, IndexError, RuntimeError, TypeError):  # no tensor or window: reading the call says so
            return None

    def _read_names(self, names: tuple[str, ...]) -> _Reader:
        ours = {theirs: name for name, theirs in names_of(names, self._defaults)}
        kinds = {name: ours.get(name, "") for name in names if name in ours or name not in NO_MATTER}
        made = _Reader(
            _getter([name for kind in _SIZED for name in kinds if kinds[name] == kind]),
            _getter([name for name in kinds if kinds[name] in _LENGTHS]),
            _getter([name for name in kinds if kinds[name] not in _NO_VALUES]),
            next((name for name in kinds if kinds[name] == "window_size"), None),
        )
        keep(self._readers, _MOST_READERS, names, made)
        return made


def identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What tells lengths from others: the same memory, read alike and written as often; -1: torch does not count."""
    written = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), written


def _getter(names: list[str]) -> _Get:
    """The values of these names, as a tuple."""
    if len(names) > 1:
        return itemgetter(*names)
    return lambda call: tuple([call[name] for name in names])
