"""What a recording (trace.py) is told of CUDA graphs that SGLang replays, in which no Python of ours runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import trace

# What a backend is asked before each replay. Until 0.5.12, (bs, req_pool_indices, seq_lens, ...): the lengths are
# complete then, and those of plain decode lie in a buffer that the next batch is written to before it is asked again.
# From 0.5.13 on, (forward_batch, in_capture=False), before a capture too: the lengths lie in a buffer of the backend's
# own, and some are written within the graph, so that they are complete when it is asked again.
_UNTIL_0_5_12, _SINCE_0_5_13 = "init_forward_metadata_replay_cuda_graph", "init_forward_metadata_out_graph"
PREPARES = (_UNTIL_0_5_12, _SINCE_0_5_13)
Place = tuple[int, int]  # the address of a tensor, and its elements


class Replays:
    """The replays of one backend. One that has been prepared is told of as soon as its lengths are complete."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self._read: frozenset[Place] = frozenset()  # by the graph that is replayed next

    def tell(self) -> None:
        """Of the replay that was prepared last, if it has not been told of. To be called before it is overwritten."""
        if self._read:
            trace.replayed(reading=self._read)
        self._read = frozenset()

    def of_prepare(self, name: str, prepare: Callable[..., Any]) -> Callable[..., Any]:
        """The one of PREPARES that has this name."""

        def prepared(*args: Any, **kwargs: Any) -> Any:
            self.tell()
            answer = prepare(*args, **kwargs)
            if (recorder := trace.current) is None:
                return answer
            try:
                if name == _UNTIL_0_5_12 or not _in_capture(*args, **kwargs):
                    self._read = frozenset(self._places())
            except Exception as error:
                recorder.fail(error)
            if name == _UNTIL_0_5_12:
                self.tell()
            return answer

        return prepared

    def _places(self) -> list[Place]:
        """Of the 1-D tensors that the backend's layers may read now, lengths among them."""
        held = [one for name, one in vars(self.backend).items() if name.startswith("forward_metadata")]
        some = [one for metadata in held for one in getattr(metadata, "__dict__", {}).values()]
        some += [one for inner in some for one in getattr(inner, "__dict__", {}).values()]  # of chunks, of windows
        return [(one.data_ptr(), one.numel()) for one in some if isinstance(one, torch.Tensor) and one.dim() == 1]


def _in_capture(forward_batch: Any = None, in_capture: bool = False, **_: Any) -> bool:
    return in_capture
