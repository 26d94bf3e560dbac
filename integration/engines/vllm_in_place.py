"""vLLM's builders, changed so that their metadata is made in the buffer that CUDA graphs read.

As they are, they make a new tensor, copy it into that buffer and zero the rest of it: two launches more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch

GQA_BUILDER, MLA_BUILDER = "FlashAttentionMetadataBuilder", "FlashAttnMLAMetadataBuilder"
# The buffer of the builder that is asking for metadata; every thread has its own.
BUFFER: ContextVar[torch.Tensor | None] = ContextVar("fa3_metadata_vllm_buffer", default=None)


def _made_in_buffer(makes: Callable[..., Any]) -> Callable[..., Any]:
    """A builder's method that calls `get_scheduler_metadata`, with the builder's buffer, if it has one, as `out`."""

    @functools.wraps(makes)
    def made_in_buffer(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = BUFFER.set(getattr(self, "scheduler_metadata", None) if self.use_full_cuda_graph else None)
        try:
            return makes(self, *args, **kwargs)
        finally:
            BUFFER.reset(token)

    return made_in_buffer


def _kept_in_buffer(stores: Callable[..., Any]) -> Callable[..., Any]:
    """A builder's method that stores metadata: nothing is left to copy, and only stale elements are zeroed."""
    ends: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # builder -> from here on its buffer is zero
    captured: WeakSet[Any] = WeakSet()  # a replay of a graph writes without our knowledge

    @functools.wraps(stores)
    def kept_in_buffer(self: Any, scheduler_metadata: torch.Tensor | None) -> torch.Tensor | None:
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

    return kept_in_buffer


# Builder class -> its methods to replace. The MLA builder stores in the middle of a longer method, which stays:
# torch launches nothing for a copy of the buffer onto itself, and the rest is zeroed as ever.
WRAPS: dict[str, list[tuple[str, Callable[..., Any]]]] = {
    GQA_BUILDER: [("_get_scheduler_metadata", _made_in_buffer), ("_store_scheduler_metadata", _kept_in_buffer)],
    MLA_BUILDER: [("_schedule_decode", _made_in_buffer)],
}
