"""`flash_attn_with_kvcache` that finds or makes its scheduler metadata itself."""

from __future__ import annotations

import ctypes
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .api import resolve_build
from .arguments import device_facts, gpu_name
from .calls import ForwardCall
from .resolved import resolve
from .triton_kernels.builds import FA3Rules
from .triton_kernels.plan import LaunchPlan
from .triton_kernels.problem import DEFAULT_PARTIAL_BYTES, Problem, unchecked_replace

_log = logging.getLogger("fa3_metadata")
Forward = Callable[..., Any]


@dataclass(eq=False)
class _Made:
    """Metadata of this step, the tensors it depends on (kept alive), and the layers that have used it."""

    plan: LaunchPlan
    metadata: torch.Tensor
    inputs: tuple[torch.Tensor, ...]
    layers: set[int] = field(default_factory=set)  # addresses of their KV caches


@dataclass(eq=False)
class _Scope:
    """What may be reused: within one `step()`, or within one capture of a CUDA graph."""

    capture: int | None
    made: dict[tuple[Any, ...], _Made] = field(default_factory=dict)


class _State(threading.local):
    steps: list[_Scope]
    capture: _Scope | None

    def __init__(self) -> None:
        self.steps, self.capture = [], None


_state = _State()


@contextmanager
def step() -> Iterator[None]:
    """One step of a model, run eagerly: layers inside that ask the same of the same lengths share their metadata.

    Lengths must not be written inside the scope other than through torch operations (which are noticed). Each
    thread has its own scopes; a scope inside another starts afresh.
    """
    _state.steps.append(_Scope(None))
    try:
        yield
    finally:
        _state.steps.pop()


@dataclass(frozen=True)
class SchedulePolicy:
    """How splits are chosen: the arguments of `get_scheduler_metadata` of these names, checked."""

    policy: str = "fa3"
    batch_invariant: bool = False
    max_partial_bytes: int = DEFAULT_PARTIAL_BYTES

    def __post_init__(self) -> None:
        # A problem checks them; any other facts will do.
        Problem(batch_size=1, max_seqlen_q=1, max_seqlen_k=1, num_heads=1, num_heads_k=1, headdim=64, **vars(self))

    def of(self, problem: Problem, device: torch.device) -> Problem:
        """`problem` under this policy. Splits that the call itself bounds keep that bound."""
        if self.policy == "fa3":
            return problem
        return unchecked_replace(problem, **vars(self), gpu=gpu_name(device))


def policy_of(forward: Forward) -> SchedulePolicy | None:
    """The policy that `forward` was wrapped with; None: it is not wrapped."""
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
    that graph, and the later layers of the capture reuse it: a replay makes it again from the lengths of that time. A
    layer that comes round again (the same KV cache for the same problem) starts a new step. Run eagerly, a call
    reuses metadata only inside `step()`, and is otherwise passed through. `num_splits` is resolved once and handed
    to both sides. Calls that bring metadata, and calls that we do not know how to schedule (another FlashAttention
    version, masks by callback, ...), pass through unchanged; the log says so once, at debug level.

    Under policy "balanced" the bound of splits, too, is ours, and it is the one that the forward is handed, so that it
    has room for every split; where the call gives a `num_splits`, that stays the bound. What passes through has FA3's
    own schedule, so `batch_invariant` holds only within a capture or a `step()`.

    Args:
        forward: the callable, from any module. One that is wrapped already is returned as it is.
        build: the FA3 build behind it; None: the detected one.
        policy, batch_invariant, max_partial_bytes: as for `get_scheduler_metadata`.

    Raises:
        TypeError: `forward` takes no scheduler_metadata.
        ValueError: `policy` or what goes with it is not valid, or `forward` is wrapped already with another one.
    """
    chosen = SchedulePolicy(policy, batch_invariant, max_partial_bytes)
    if (theirs := policy_of(forward)) is not None:
        if theirs != chosen:
            raise ValueError(f"policy must be that of the forward, which is wrapped with {theirs}, got {chosen}")
        return forward
    rules = resolve_build(build)[1]
    parameters = inspect.signature(forward).parameters
    names = tuple(parameters)
    if "scheduler_metadata" not in parameters:
        raise TypeError(f"forward must take scheduler_metadata, got {forward!r} with {', '.join(names)}")
    takes = {name for name in ("num_splits", "pack_gqa") if name in parameters}
    told: set[str] = set()

    @functools.wraps(forward)
    def with_metadata(*args: Any, **kwargs: Any) -> Any:
        call = dict(zip(names, args, strict=False)) | kwargs
        scope = _current_scope()
        if scope is None or call.get("scheduler_metadata") is not None:
            return forward(*args, **kwargs)
        try:
            made = _find_or_make(scope, ForwardCall.read(call), rules, chosen)
        except (NotImplementedError, TypeError, ValueError) as error:  # the forward knows better what is wrong
            if str(error) not in told:
                told.add(str(error))
                _log.debug("%s is called without our metadata: %s", forward.__name__, error)
            return forward(*args, **kwargs)
        ours: dict[str, Any] = {"scheduler_metadata": made.metadata}
        for name in takes:
            ours[name] = getattr(made.plan.layout, name)
        return forward(**call | ours)

    with_metadata.__fa3_metadata__ = chosen  # type: ignore[attr-defined]
    return with_metadata


def _current_scope() -> _Scope | None:
    if _has_cuda() and torch.cuda.is_current_stream_capturing():
        capture = _capture_id()
        if _state.capture is None or _state.capture.capture != capture:
            _state.capture = _Scope(capture)
        return _state.capture
    _state.capture = None
    return _state.steps[-1] if _state.steps else None


def _find_or_make(scope: _Scope, asked: ForwardCall, rules: FA3Rules, chosen: SchedulePolicy) -> _Made:
    if reason := asked.unsupported_reason():
        raise NotImplementedError(reason)
    problem = chosen.of(asked.problem(*device_facts(asked.device, None, None), rules), asked.device)
    tensors = asked.lengths()
    inputs = tuple(tensor for tensor in tensors.pointers() if tensor is not None)
    identity = tuple((t.data_ptr(), t.dtype, t.stride(), _version(t)) for t in inputs)
    # Another stream may not have waited for the launch on this one, so it makes its own.
    stream = torch.cuda.current_stream(asked.device).cuda_stream if asked.device.type == "cuda" else 0
    key = (rules, problem, identity, stream)
    layer = asked.k_cache.data_ptr()
    made = scope.made.get(key)
    if made is None or layer in made.layers:
        tensors.check(problem.batch_size)
        resolved = resolve(problem, rules)
        metadata = torch.empty(resolved.size, dtype=torch.int32, device=asked.device)
        resolved.write(tensors, metadata)
        made = scope.made[key] = _Made(resolved.plan, metadata, inputs)
    made.layers.add(layer)
    return made


def _version(tensor: torch.Tensor) -> int | None:
    """How often torch has written to this tensor; None where torch does not count (inference mode)."""
    return None if tensor.is_inference() else tensor._version


def _capture_id() -> int:
    """The driver's number of the capture under way on the current stream."""
    status, number = ctypes.c_int(), ctypes.c_uint64()
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    error = _driver().cuStreamGetCaptureInfo_v2(stream, ctypes.byref(status), ctypes.byref(number), None, None, None)
    if error:
        raise RuntimeError(f"cuStreamGetCaptureInfo failed with CUDA error {error}")
    return number.value


@functools.lru_cache(maxsize=1)
def _has_cuda() -> bool:
    return torch.cuda.is_available()


@functools.lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
