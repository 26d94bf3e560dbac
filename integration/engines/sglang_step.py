"""The batches that a backend of SGLang runs eagerly, and within which its layers share metadata."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, copy_context
from typing import Any

import torch

from ..rounds import Rounds
from ..scopes import step

Call = Callable[..., Any]


class EagerStep:
    """One batch: from the backend's `init_forward_metadata` on, for as long as the backend has that metadata.

    A graph that is captured or replayed gives the backend other metadata, whose lengths are written anew each time:
    what was shared before must not be found then.
    """

    def __init__(self, metadata: Any, shares: bool) -> None:
        self.metadata, self.shares, self.layers = metadata, shares, 0
        self.rounds = Rounds()
        # Layers come one by one: a context of its own keeps the `step()` open between them, and nobody else is in it.
        self._context = copy_context()
        self._scope = step(lengths_stay=True)  # SGLang writes a batch's lengths before its layers run
        self._context.run(self._scope.__enter__)

    def run(self, forward: Call, *args: Any, **kwargs: Any) -> Any:
        """`forward(...)` inside of this step."""
        return self._context.run(forward, *args, **kwargs)

    def __del__(self) -> None:
        self._context.run(self._scope.__exit__, None, None, None)


# The step of the layer that runs now in this thread; None: it is not known, or its layers do not share.
_current: ContextVar[EagerStep | None] = ContextVar("fa3_metadata_sglang_step", default=None)


class EagerSteps:
    """The steps of one backend. `alone_too`: metadata is made for one layer alone as well."""

    def __init__(self, backend: Any, alone_too: bool) -> None:
        self.backend, self.alone_too = backend, alone_too
        self.latest: EagerStep | None = None

    def begin(self) -> None:
        """The backend has prepared a batch."""
        before = self.latest
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            self.latest = None  # a replay writes the lengths of this batch again, without our knowledge
            return
        # A drafter's single layer has nobody to share with, and FA3's own stage costs it less. It is known after one
        # batch; a batch without layers, of a rank that idles, says nothing.
        alone = before is not None and (before.layers == 1 or (before.layers == 0 and not before.shares))
        self.latest = EagerStep(self.backend.forward_metadata, self.alone_too or not alone)

    def of_layer(self, layer: Call) -> Call:
        """A method of the backend that runs a layer, whose forwards find the step by `in_step`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            now = self.latest
            if torch.compiler.is_compiling() or now is None or now.metadata is not self.backend.forward_metadata:
                return layer(*args, **kwargs)
            if now.rounds.begins(id(args[3] if len(args) > 3 else kwargs.get("layer"))):
                now = self.latest = EagerStep(now.metadata, now.shares)  # the same batch, whose lengths may have grown
            now.layers += 1
            token = _current.set(now if now.shares else None)
            try:
                return layer(*args, **kwargs)
            finally:
                _current.reset(token)

        return run


def in_step(forward: Call, *args: Any, **kwargs: Any) -> Any:
    """`forward(...)`, inside of the step of the layer that calls it."""
    now = _current.get()
    return forward(*args, **kwargs) if now is None else now.run(forward, *args, **kwargs)
