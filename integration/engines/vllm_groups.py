"""vLLM's groups of layers: those of one kind, each of which has a builder of its own, get what was made for the first.

With vLLM's hybrid KV cache a model that mixes windows has several groups of the same kind: Gemma-3-27B seven groups of
two kinds. The newer model runner builds them all by one call, in which all groups are given the same lengths; the older
one asks one builder of a kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

RUNNER, BUILD_ALL = "vllm.v1.worker.gpu.attn_utils", "build_attn_metadata"

_Made = dict[tuple[Any, ...], tuple[torch.Tensor, tuple[Any, ...]]]  # by what was asked, whose tensors live on
_MADE: ContextVar[_Made | None] = ContextVar("fa3_metadata_vllm_groups", default=None)


def built_together(build_all: Callable[..., Any]) -> Callable[..., Any]:
    """`build_attn_metadata`: what is asked within one call of it more than once is made once."""

    @functools.wraps(build_all)
    def build(*args: Any, **kwargs: Any) -> Any:
        token = _MADE.set({})
        try:
            return build_all(*args, **kwargs)
        finally:
            _MADE.reset(token)

    return build


def once(make: Callable[[], torch.Tensor], asked: tuple[Any, ...], out: torch.Tensor | None) -> torch.Tensor:
    """What `make` makes in `out`, or what it has made before where the same was asked, copied if need be.

    Numbers and flags are compared with their types, tensors by identity.
    """
    if (made := _MADE.get()) is None:
        return make()
    key = (*[id(one) if isinstance(one, torch.Tensor) else one for one in asked], *map(type, asked))
    try:
        known = made.get(key)
    except TypeError:  # a list among them
        return make()
    if known is None:
        result = make()
        for other in [one for one, (kept, _) in made.items() if kept.data_ptr() == result.data_ptr()]:
            del made[other]  # which was in this buffer
        made[key] = result, asked
        return result
    if out is None:
        return known[0]
    part = out[: known[0].numel()]
    part.copy_(known[0])
    return part
