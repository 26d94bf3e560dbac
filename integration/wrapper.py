"""`flash_attn_with_kvcache` that finds or makes its scheduler metadata itself."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .arguments import LengthTensors, device_facts, gpu_name
from .call_keys import CallKeys, identity
from .calls import ForwardCall
from .captured_writes import Capture, may_write
from .installed import resolve_build
from .schedules import step_of
from .scopes import Answer, Made, Scope, current_scope
from .settings import is_disabled
from .triton_kernels.builds import FA3Rules
from .triton_kernels.invariance import VarianceError
from .triton_kernels.plan import variance_of
from .triton_kernels.problem import DEFAULT_PARTIAL_BYTES, Problem, unchecked_replace

_log = logging.getLogger("fa3_metadata")
Forward = Callable[..., Any]
_UNKNOWN: Any = object()  # no answer, which None is


@dataclass(frozen=True)
class SchedulePolicy:
    """How splits are chosen: the arguments of `get_scheduler_metadata` of these names, checked."""

    policy: str = "fa3"
    batch_invariant: bool = False
    max_partial_bytes: int = DEFAULT_PARTIAL_BYTES

    def __post_init__(self) -> None:
        # A problem checks them; any other facts will do.
        Problem(batch_size=1, max_seqlen_q=1, max_seqlen_k=1, num_heads=1, num_heads_k=1, headdim=64, **vars(self))

    def of(self, problem: Problem, device: torch.device, told: bool = True) -> Problem:
        """`problem` under this policy. Splits that the call itself bounds keep that bound; `told`: the forward is."""
        if self.policy == "fa3":
            return problem
        return unchecked_replace(problem, **vars(self), gpu=gpu_name(device), forward_is_told=told)


@dataclass(frozen=True)
class Wrapping:
    """What a forward was wrapped with."""

    policy: SchedulePolicy
    build: str
    rules: FA3Rules

    def check(self, chosen: SchedulePolicy, build: str) -> None:
        """Raise `ValueError` where another policy, or a build that behaves otherwise, is asked for."""
        if self.policy != chosen:
            raise ValueError(
                f"policy must be that of the forward, which is wrapped with {self.policy} already, got {chosen}"
            )
        if resolve_build(build)[1] is not self.rules:
            raise ValueError(f"build must be like {self.build}, for which the forward is wrapped already, got {build}")


def wrapping_of(forward: Forward) -> Wrapping | None:
    """What `forward` was wrapped with; None: it is not wrapped."""
    return getattr(forward, "__fa3_metadata__", None)


def wrap_forward(
    forward: Forward,
    build: str | None = None,
    policy: str = "fa3",
    *,
    batch_invariant: bool = False,
    max_partial_bytes: int = DEFAULT_PARTIAL_BYTES,
) -> Forward:
    """`forward`, an FA3 `flash_attn_with_kvcache` or vLLM's `flash_attn_varlen_func`, with metadata of its own.

    Same signature. While a CUDA graph is captured, the metadata is made once for each distinct problem, as a node of
    that graph, and the later layers of the capture reuse it: a replay makes it again from the lengths of that time.
    Where a node of the graph since may have written the lengths, it is made anew. Run eagerly, a call reuses metadata
    only inside `step()`, and is otherwise passed through. `num_splits` is resolved once and handed to both sides.
    Calls that bring metadata, and calls that we do not know how to schedule (another FlashAttention version, masks by
    callback, ...), pass through unchanged; the log says so once, at debug level.

    Under policy "balanced" the bound of splits, too, is ours, and it is the one that the forward is handed, so that it
    has room for every split; where the call gives a `num_splits`, that stays the bound. What passes through has FA3's
    own schedule.

    With `batch_invariant` a call outside of `step()` gets metadata, too, which it shares with none. What cannot be
    invariant (triton_kernels/invariance.py) passes through with one split for every sequence, unless it gives a
    `num_splits` or metadata, and a warning says so once for each reason: a server goes on.

    Args:
        forward: the callable, from any module. One that is wrapped already is returned as it is, and so is any where
            the environment variable FA3_METADATA_DISABLE is set.
        build: the FA3 build behind it; None: the detected one.
        policy, batch_invariant, max_partial_bytes: as for `get_scheduler_metadata`.

    Raises:
        TypeError: `forward` takes no scheduler_metadata.
        ValueError: `policy` or what goes with it is not valid, or `forward` is wrapped already with another one, or for
            a build that behaves otherwise.
    """
    chosen = SchedulePolicy(policy, batch_invariant, max_partial_bytes)
    build, rules = resolve_build(build)
    if (theirs := wrapping_of(forward)) is not None:
        theirs.check(chosen, build)
        return forward
    parameters = inspect.signature(forward).parameters
    names = tuple(parameters)
    defaults = {name: one.default for name, one in parameters.items() if one.default is not inspect.Parameter.empty}
    if "scheduler_metadata" not in parameters:
        raise TypeError(f"forward must take scheduler_metadata, got {forward!r} with {', '.join(names)}")
    if is_disabled():
        return forward
    takes = {name for name in ("num_splits", "pack_gqa") if name in parameters}
    told = "num_splits" in takes
    if batch_invariant and not (told and "num_splits" not in rules.forward_lacks):
        raise ValueError(f"batch_invariant must be False for a forward of {build} that takes no num_splits")
    said: set[str] = set()
    keys = CallKeys(defaults)

    def leave(reason: str, kind: str, call: dict[str, Any] | None = None) -> dict[str, Any]:
        """Say once why a call is left to FA3; what it is given all the same: one split, where it gives no number."""
        own = None if call is None else call.get("num_splits")
        one_split = batch_invariant and call is not None and not (type(own) is int and own > 0)
        if kind not in said:
            said.add(kind)
            if batch_invariant:
                how = "with one split for every sequence" if one_split else "as it is"
                _log.warning("%s is called in a way that is not batch invariant: %s. It is left to FA3, %s",
                             forward.__name__, reason, how)  # fmt: skip
            else:
                _log.debug("%s is called without our metadata: %s", forward.__name__, reason)
        return {"num_splits": 1} if one_split else {}

    def without(error: Exception, call: dict[str, Any], asked: ForwardCall | None) -> Answer:
        """To a call that gets no metadata. The forward knows better what is wrong with it."""
        if isinstance(error, VarianceError):
            return None, leave(str(error), error.argument, call)
        kind = f"{type(error).__name__} {str(error).split(' ', 1)[0]}"  # the argument; a text may name any number
        one_split = leave(str(error), kind, call if asked is not None and asked.version == 3 else None)
        return (None, one_split) if one_split else None

    @functools.wraps(forward)
    def with_metadata(*args: Any, **kwargs: Any) -> Any:
        capturing = _has_cuda() and torch.cuda.is_current_stream_capturing()
        capture = Capture.current() if capturing else None
        scope = None if capturing and capture is None else current_scope(capture)
        if scope is None and batch_invariant:
            scope = Scope()  # of this call alone
        if scope is None:
            return forward(*args, **kwargs)
        if capture is None:
            return attend(scope, None, args, kwargs)
        before = capture.nodes()
        output = attend(scope, capture, args, kwargs)
        if before is not None and (after := capture.nodes()) is not None:
            scope.readers |= after - before
        return output

    def attend(scope: Scope, capture: Capture | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = dict(zip(names, args, strict=False)) | kwargs if args else kwargs
        if call.get("scheduler_metadata") is not None or len(call) < len(args) + len(kwargs):
            if batch_invariant and call.get("scheduler_metadata") is not None:
                leave("it brings scheduler_metadata, whose schedule is not known", "scheduler_metadata")
            return forward(*args, **kwargs)  # which also says what is wrong with surplus arguments, or one given twice
        scope.enter_layer(call.get("k_cache", call.get("k")))
        stream = _stream_of(call.get("q"))
        key = keys.of(call, (stream, torch.is_inference_mode_enabled()))
        answer = scope.answers.get(key, _UNKNOWN)
        if answer is _UNKNOWN or (capture and answer and answer[0] and _may_be_written(answer[0], scope, capture)):
            answer = make(scope, capture, call, stream)
            made = None if answer is None else answer[0]
            if made is None or capture is not None or _stays(made.inputs, scope):
                scope.answer(key, answer)
        if answer is None:
            return forward(*args, **kwargs)
        call.update(answer[1])
        return forward(**call)

    def make(scope: Scope, capture: Capture | None, call: dict[str, Any], stream: tuple[int, int]) -> Answer:
        asked: ForwardCall | None = None
        try:
            asked = ForwardCall.read(call, defaults)
            if batch_invariant:
                asked = asked.with_its_window()
            wanted = _read(asked, scope, capture, stream, rules, chosen, told)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            return without(error, call, asked)
        try:
            made = _find_or_make(wanted, scope, capture, rules, chosen)
        except (TypeError, ValueError) as error:
            return without(error, call, asked)
        ours: dict[str, Any] = {"scheduler_metadata": made.metadata}
        if asked.max_seqlen_k is not call.get("max_seqlen_k"):
            ours["max_seqlen_k"] = asked.max_seqlen_k
        return made, ours | {name: getattr(made.plan.layout, name) for name in takes}

    with_metadata.__fa3_metadata__ = Wrapping(chosen, build, rules)  # type: ignore[attr-defined]
    return with_metadata


class _Wanted(NamedTuple):
    """What a call asks for."""

    key: tuple[Any, ...]
    problem: Problem
    tensors: LengthTensors
    inputs: tuple[torch.Tensor, ...]


def _read(
    asked: ForwardCall, scope: Scope, capture: Capture | None, stream: tuple[int, int], rules: FA3Rules,
    chosen: SchedulePolicy, told: bool,
) -> _Wanted:  # fmt: skip
    if reason := asked.unsupported_reason():
        raise NotImplementedError(reason)
    tensors = asked.lengths()
    inputs = tuple(tensor for tensor in tensors.pointers() if tensor is not None)
    if capture is None and chosen.policy == "fa3" and not _stays(inputs, scope):
        raise NotImplementedError(
            "torch does not count writes in inference mode, nor to tensors made there: step(lengths_stay=True) shares"
        )
    problem = asked.problem(*device_facts(asked.device, None, None), rules.bound_depends_on_batch)
    problem = chosen.of(problem, asked.device, told)
    # Another stream may not have waited for the launch on this one, so it makes its own.
    return _Wanted((rules, problem, tuple(map(identity, inputs)), stream), problem, tensors, inputs)


def _find_or_make(
    wanted: _Wanted, scope: Scope, capture: Capture | None, rules: FA3Rules, chosen: SchedulePolicy
) -> Made:
    key, problem, tensors, inputs = wanted
    made = scope.made.get(key)
    if made is None or (_may_be_written(made, scope, capture) if capture else not _stays(inputs, scope)):
        if chosen.batch_invariant and (variance := variance_of(problem, rules)) is not None:
            raise VarianceError(*variance.args)  # for each layer: sooner than a plan would
        tensors.check(problem.batch_size)
        its_step = step_of(problem, rules)
        metadata = torch.empty(its_step.sizes[0], dtype=torch.int32, device=inputs[0].device)
        its_step.write((metadata,), tensors)
        made = Made(its_step.planned()[1], metadata, inputs)
        if capture is not None:
            made.nodes = capture.nodes() or frozenset()
        scope.keep(key, made)
    return made


def _may_be_written(made: Made, scope: Scope, capture: Capture) -> bool:
    """Whether a node captured since may have written the lengths, be it one that torch counts or not."""
    nodes = capture.nodes()
    if nodes is None or may_write(nodes - made.nodes - scope.readers, made.inputs):
        return True
    made.nodes = nodes
    return False


def _stays(lengths: tuple[torch.Tensor, ...], scope: Scope) -> bool:
    """Whether these lengths are as they were, eagerly, where torch has counted no write to them.

    In inference mode it does not count all, and none of those to tensors that were made there.
    """
    if scope.lengths_stay:
        return True
    return not (torch.is_inference_mode_enabled() or any(tensor.is_inference() for tensor in lengths))


def _stream_of(q: Any) -> tuple[int, int]:
    """The device of a tensor, and its current stream; of anything else those of the CPU."""
    if not isinstance(q, torch.Tensor) or not q.is_cuda:
        return -1, 0
    device = q.get_device()
    return device, torch._C._cuda_getCurrentRawStream(device)


@functools.lru_cache(maxsize=1)
def _has_cuda() -> bool:
    return torch.cuda.is_available()
