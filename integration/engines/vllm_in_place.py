"""vLLM's builders, changed so that their metadata is made in the buffer that CUDA graphs read.

As they are, they make a new tensor, copy it into that buffer and zero the rest of it: two launches more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch

# The buffer of the builder that is asking for metadata; every thread has its own.
BUFFER: ContextVar[torch.Tensor | None] = ContextVar("fa3_metadata_vllm_buffer", default=None)


@contextmanager
def _buffer_of(builder: Any) -> Iterator[None]:
    token = BUFFER.set(getattr(builder, "scheduler_metadata", None) if builder.use_full_cuda_graph else None)
    try:
        yield
    finally:
        BUFFER.reset(token)


def made_in_buffer(makes: Callable[..., Any]) -> Callable[..., Any]:
    """A builder's method that calls `get_scheduler_metadata` once, with the builder's buffer, if any, as `out`."""

    @functools.wraps(makes)
    def made(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _buffer_of(self):
            return makes(self, *args, **kwargs)

    return made


def built_in_buffer(build: Callable[..., Any]) -> Callable[..., Any]:
    """The GQA builder's `build`, likewise; not for cascade attention, which makes two, and keeps the second."""

    @functools.wraps(build)
    def built(self: Any, common_prefix_len: int, *args: Any, **kwargs: Any) -> Any:
        if common_prefix_len > 0:
            return build(self, common_prefix_len, *args, **kwargs)
        with _buffer_of(self):
            return build(self, common_prefix_len, *args, **kwargs)

    return built


def kept_in_buffer(stores: Callable[..., Any]) -> Callable[..., Any]:
    """A builder's method that stores metadata: nothing is left to copy, and only stale elements are zeroed."""
    ends: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # builder -> from here on its buffer is zero
    captured: WeakSet[Any] = WeakSet()  # a replay of a graph writes without our knowledge

    @functools.wraps(stores)
    def kept(self: Any, scheduler_metadata: torch.Tensor | None) -> torch.Tensor | None:
        buffer = getattr(self, "scheduler_metadata", None)
        if scheduler_metadata is None or buffer is None or scheduler_metadata.data_ptr() != buffer.data_ptr():
            ends.pop(self, None)
            return stores(self, scheduler_metadata)
        if buffer.is_cuda and torch.cuda.is_current_stream_capturing():
            captured.add(self)
        size = scheduler_metadata.numel()
        end = buffer.numel() if self in captured else ends.get(self, buffer.numel())
        if size < end:
            buffer[size:end].zero_()
        ends[self] = size
        return scheduler_metadata

    return kept
