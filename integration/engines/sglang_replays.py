"""What a recording (trace.py) is told of CUDA graphs that SGLang replays, in which no Python of ours runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import trace

# What a backend is asked before each replay, in 0.5.7 to 0.5.23; the second also before a capture.
PREPARES = ("init_forward_metadata_replay_cuda_graph", "init_forward_metadata_out_graph")
Place = tuple[int, int]  # the address of a tensor, and its elements


class Replays:
    """The replays of one backend. A replay is told of when the next batch is prepared.

    Its lengths are complete only then: newer versions write them within the graph. And they are there still, since a
    graph reads them from a buffer of its own.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self._read: frozenset[Place] = frozenset()  # by the graph that is replayed next

    def tell(self) -> None:
        """Of the replay that was prepared last, if there is one. To be called before lengths are written again."""
        if self._read and trace.current is not None:
            trace.replayed(reading=self._read)
        self._read = frozenset()

    def of_prepare(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        """One of PREPARES."""

        def prepared(*args: Any, **kwargs: Any) -> Any:
            self.tell()
            answer = prepare(*args, **kwargs)
            if trace.current is not None and kwargs.get("in_capture", args[1:2] == (True,)) is not True:
                self._read = frozenset(self._places())
            return answer

        return prepared

    def _places(self) -> list[Place]:
        """Of the 1-D tensors that the backend's layers may read now, lengths among them."""
        held = [one for name, one in vars(self.backend).items() if name.startswith("forward_metadata")]
        some = [one for metadata in held for one in getattr(metadata, "__dict__", {}).values()]
        return [(one.data_ptr(), one.numel()) for one in some if isinstance(one, torch.Tensor) and one.dim() == 1]
