"""What layers may share: within one `step()`, or within one capture of a CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from .captured_writes import Capture
from .rounds import Rounds
from .schedules import keep
from .triton_kernels.plan import LaunchPlan
from .triton_kernels.problem import checked_bool


@dataclass(eq=False)
class Made:
    """Metadata of this step, and the tensors it depends on, which are kept alive."""

    plan: LaunchPlan
    metadata: torch.Tensor
    inputs: tuple[torch.Tensor, ...]
    nodes: frozenset[int] = frozenset()  # of the graph that is captured: those known not to have written `inputs` since


# To a call: the metadata, if there is any for it, and what the forward is handed. None: nothing, it is passed through.
Answer = tuple[Made | None, dict[str, Any]] | None


@dataclass(eq=False)
class Scope:
    """What may be reused: within one `step()`, or within one capture of a CUDA graph."""

    capture: int | None = None
    lengths_stay: bool = False  # the caller says so
    thread: int | None = None  # whose it is; None: of any that has it
    has_ended: bool = False  # a task that was created inside still has it
    readers: frozenset[int] = frozenset()  # nodes of the graph that is captured: layers and metadata, which only read
    made: dict[tuple[Any, ...], Made] = field(default_factory=dict)  # by problem and lengths
    answers: dict[tuple[Any, ...] | None, Answer] = field(default_factory=dict)  # to calls, by CallKeys
    rounds: Rounds = field(default_factory=Rounds)

    def keep(self, key: tuple[Any, ...], made: Made) -> None:
        """Remember it; of a long scope, the latest."""
        self.made.pop(key, None)
        self.made[key] = made
        if len(self.made) > _MOST_MADE:
            del self.made[next(iter(self.made))]
            self.answers.clear()  # which hold it, too

    def answer(self, key: tuple[Any, ...] | None, answer: Answer) -> None:
        if key is not None:
            keep(self.answers, _MOST_ANSWERS, key, answer)

    def enter_layer(self, k_cache: Any) -> None:
        """A layer with this KV cache comes: forget everything where it begins a new round.

        That is a loop over steps inside of one scope, which is not meant to be.
        """
        if self.lengths_stay or self.capture is not None or not isinstance(k_cache, torch.Tensor):
            return
        if self.rounds.begins(k_cache.data_ptr()):
            self.made.clear()
            self.answers.clear()


class _Captures(threading.local):
    """Of each thread, the scope of the CUDA graph that it captures."""

    scope: Scope | None = None


_MOST_MADE, _MOST_ANSWERS = 256, 1024  # kinds of layers of a step, and a margin; and of calls
_captures = _Captures()
# The innermost `step()` of a thread or an asyncio task; None: there is none.
CURRENT_STEP: ContextVar[Scope | None] = ContextVar("fa3_metadata_step", default=None)


@contextmanager
def step(lengths_stay: bool = False) -> Iterator[None]:
    """One step of a model, run eagerly: layers inside that ask the same of the same lengths share their metadata.

    Each kind of layer makes one, also where layers read the KV cache of another. Lengths must not be written inside the
    scope other than through torch operations (not on their `.data`), which torch counts. It does not in inference mode,
    and not on tensors made there: there nothing is shared, unless `lengths_stay` says that nothing at all writes
    lengths inside the scope. Each thread has its own scopes; an asyncio task has the one that it was created in, until
    that ends. One inside another starts afresh.

    Nor does torch count what collectives (torch.distributed) and the operators of C++ extensions write: leave the step
    before them.
    """
    scope = Scope(lengths_stay=checked_bool("lengths_stay", lengths_stay), thread=threading.get_ident())
    token = CURRENT_STEP.set(scope)
    try:
        yield
    finally:
        scope.has_ended = True
        CURRENT_STEP.reset(token)


def current_scope(capture: Capture | None) -> Scope | None:
    """What the current call may share with others; None: nothing, and it is passed through."""
    if capture is None:
        if _captures.scope is not None:
            _captures.scope = None
        scope = CURRENT_STEP.get()
        if scope is None or scope.has_ended or scope.thread not in (None, threading.get_ident()):
            return None
        return scope
    if _captures.scope is None or _captures.scope.capture != capture.number:
        _captures.scope = Scope(capture.number)
    return _captures.scope
