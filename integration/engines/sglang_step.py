"""The batches that a backend of SGLang runs eagerly, and within which its layers share metadata."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..scopes import CURRENT_STEP, Scope

Call = Callable[..., Any]


class EagerStep:
    """One batch: from the backend's `init_forward_metadata` on, for as long as the backend has that metadata.

    A graph that is captured or replayed gives the backend other metadata, whose lengths are written anew each time:
    what was shared before must not be found then.
    """

    def __init__(self, metadata: Any, shares: bool) -> None:
        self.metadata, self.shares, self.layers = metadata, shares, 0
        self.first: object = None  # the layer that came first; when it comes again, the model is run again
        self.scope = Scope(lengths_stay=True)  # SGLang writes a batch's lengths before its layers run


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
        """A method of the backend that runs a layer, whose forwards are within the step."""

        def run(*args: Any, **kwargs: Any) -> Any:
            now = self.latest
            if torch.compiler.is_compiling() or now is None or now.metadata is not self.backend.forward_metadata:
                return layer(*args, **kwargs)
            layer_of_model = args[3] if len(args) > 3 else kwargs.get("layer")
            if now.layers and layer_of_model is now.first:
                now = self.latest = EagerStep(now.metadata, now.shares)  # its lengths may have grown
            if not now.layers:
                now.first = layer_of_model
            now.layers += 1
            if not now.shares:
                return layer(*args, **kwargs)
            token = CURRENT_STEP.set(now.scope)
            try:
                return layer(*args, **kwargs)
            finally:
                CURRENT_STEP.reset(token)

        return run
