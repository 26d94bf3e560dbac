"""What `get_scheduler_metadata` knows of calls that came before, so that the next one of their kind costs little."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import fields
from typing import Any

import torch

from .arguments import LengthTensors, make_problem
from .resolved import ResolvedCall, resolve
from .triton_kernels.builds import FA3Rules
from .triton_kernels.problem import Problem, checked_int

# The arguments of a call but its sizes, build, backend and tensors, of which presence alone counts.
STATIC = tuple(field.name for field in fields(Problem) if field.name not in ("batch_size", "max_seqlen_k", "gpu"))
Again = tuple[Callable[[], bool], int]  # the launch, which answers whether it could; and the size of the metadata
_MOST_KINDS, _MOST_SIZES, _MOST_AGAIN = 64, 1024, 256


class KnownCalls:
    """Calls of one kind: they differ in batch_size, max_seqlen_k and the tensors' places alone."""

    def __init__(self) -> None:
        self._resolved: dict[tuple[int, int], ResolvedCall] = {}  # by batch_size and max_seqlen_k
        self._latest: ResolvedCall | None = None
        self._again: dict[Hashable, Again | None] = {}  # with `out`; None: came once, and may never come again

    def seen(self, sizes: tuple[int, int], given: tuple[Any, ...], out: Any) -> tuple[Hashable, Again | None]:
        """A key of all that a call depends on, to `remember` it by, and what is known of it. It was checked then.

        (None, None): there was no call of such sizes.
        """
        if sizes not in self._resolved:
            return None, None
        key = (sizes, _place(out), *[None if one is None else _place(one) for one in given])
        return key, self._again.get(key)

    def remember(self, key: Hashable, resolved: ResolvedCall, tensors: LengthTensors, out: torch.Tensor) -> None:
        """That a call came. The second time its launch is kept."""
        if key not in self._again:
            _keep(self._again, _MOST_AGAIN, key, None)
        elif (launch := resolved.repeat(tensors, out)) is not None:
            self._again[key] = launch, resolved.size

    def resolve(
        self, sizes: tuple[int, int], tensors: LengthTensors, rules: FA3Rules, others: tuple[Any, ...]
    ) -> ResolvedCall:
        """The checked call of these sizes. `others` are the other arguments of `make_problem`, as STATIC names them."""
        sizes = checked_int("batch_size", sizes[0], 0), checked_int("max_seqlen_k", sizes[1], 0)
        found = self._resolved.get(sizes)
        if found is not None:
            tensors.check(sizes[0])
            return found
        if self._latest is not None:
            tensors.check(sizes[0])
            found = self._latest.like_this(*sizes)
        if found is None:
            static = dict(zip(STATIC, others, strict=True))
            problem = make_problem(tensors, batch_size=sizes[0], max_seqlen_k=sizes[1], **static)
            found = self._latest = resolve(problem, rules)
        _keep(self._resolved, _MOST_SIZES, sizes, found)
        return found


_kinds: dict[Hashable, KnownCalls] = {}
known_calls = _kinds.get  # by everything that calls of a kind share


def keep_calls(kind: Hashable, calls: KnownCalls) -> None:
    """Let `known_calls` find them."""
    _keep(_kinds, _MOST_KINDS, kind, calls)


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype  # an address tells the device, too


def _keep(known: dict[Any, Any], most: int, key: Hashable, value: object) -> None:
    if len(known) >= most:
        known.clear()
    known[key] = value
