"""Checks of an explained call: the other implementation, the installed wheel, a real forward, and their times."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..api import get_scheduler_metadata, metadata_layout, plan_call, unpack_metadata
from ..installed import installed_version, native_metadata, native_op
from ..triton_kernels.builds import package_of
from .decode_batch import DecodeBatch, attend, kv_cache_bytes, make_decode_batch
from .report import Explanation

_LAUNCHES, _REPLAYS = 20, 21
_TOLERANCE = 0.02  # of a sequence's output, relative: other splits round otherwise in 16 bits


class MismatchError(Exception):
    """Two computations of the same metadata, or of the same attention, differ."""


def allow_interpreter() -> None:
    """Let the Triton kernel run on CPU tensors; must come before triton is first imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def checks(explanation: Explanation, arguments: dict[str, Any]) -> Iterator[str]:
    """Check the explained call in every way this machine allows, a line for each. Raises `MismatchError`."""
    if arguments["cache_seqlens"].is_cuda:
        yield _agree(explanation, arguments, "reference", "Triton kernel and NumPy model")
        yield from _against_wheel(explanation, arguments)
        return
    name = "NumPy model and Triton kernel (in Triton's interpreter)"
    try:
        yield _agree(explanation, arguments, "triton", name)
    except RuntimeError as error:
        yield f"skipped     {name}: {error}"
    yield "skipped     the installed wheel, a real forward and times: no CUDA GPU here"


def _agree(explanation: Explanation, arguments: dict[str, Any], backend: str, name: str) -> str:
    other = get_scheduler_metadata(**arguments, backend=backend)
    for row, values in unpack_metadata(other, explanation.plan.layout).items():
        if values.tolist() != explanation.rows[row]:
            raise MismatchError(f"{name} differ in {row}")
    return f"equal       {name}, bit for bit"


def _against_wheel(explanation: Explanation, arguments: dict[str, Any]) -> Iterator[str]:
    build = explanation.build
    package = package_of(build)
    version = installed_version(package)
    if version is None:
        yield f"skipped     the wheel and a real forward: {package} is not installed"
        return
    ours = _time_in_graph(lambda: get_scheduler_metadata(**arguments, out=explanation.metadata))
    is_fa3s = explanation.problem.policy == "fa3"
    try:
        if is_fa3s:
            equal = _agree(explanation, arguments, "native", f"Triton kernel and {package} {version}")
        else:
            native_op(build)
            equal = f"skipped     the wheel's own op: it makes FA3's schedule, not policy {explanation.problem.policy}"
    except RuntimeError as error:
        yield f"skipped     the wheel's own op: {error}"
        yield f"time        metadata, one launch in a CUDA graph: {ours:.2f} us"
    else:
        yield equal
        tensors, problem, _, _ = plan_call(arguments)
        assert tensors is not None
        theirs = _time_in_graph(lambda: native_metadata(build, problem, tensors))
        times = f"ours {ours:.2f} us, {package} {version}{'' if is_fa3s else ' (FA3 schedule)'} {theirs:.2f} us"
        yield f"time        metadata, one launch in a CUDA graph: {times}"
    yield from _forward(explanation, f"{package} {version}")


def _forward(explanation: Explanation, wheel: str) -> Iterator[str]:
    p, plan = explanation.problem, explanation.plan
    if p.element_size != 2 or p.page_size is None or p.attention_chunk or p.has_softcap or p.max_seqlen_k_new:
        yield "skipped     a real forward: made only for plain 16-bit decode over paged KV"
        return
    if p.has_cu_seqlens_q or p.has_seqused_q or p.has_leftpad_k or not p.batch_size or not p.max_seqlen_q:
        yield "skipped     a real forward: made only for batches with one query length and no left padding"
        return
    need = kv_cache_bytes(explanation.seqlens_k, p.num_heads_k, p.headdim, p.value_headdim, p.page_size)
    if need > torch.cuda.mem_get_info()[0] // 2:
        yield f"skipped     a real forward: its KV cache needs {need / 2**30:.1f} GiB"
        return
    batch = make_decode_batch(
        explanation.seqlens_k, p.num_heads, p.num_heads_k, p.headdim, headdim_v=p.value_headdim,
        max_seqlen_q=p.max_seqlen_q, page_size=p.page_size, causal=p.causal, window_size=p.window_size,
        dtype=getattr(torch, p.qkv_dtype),
    )  # fmt: skip
    build = explanation.build
    call = batch.problem_arguments() | {"build": build}
    ours = _Attention(build, batch, call, plan.num_splits, p.policy, p.batch_invariant)
    fa3 = ours if p.policy == "fa3" else _Attention(build, batch, call, p.num_splits)
    try:
        output, expected = ours.with_metadata(), fa3.by_itself()
        times = [_time_in_graph(launch) for launch in dict.fromkeys((ours.with_metadata, fa3.with_metadata))]
        times.append(_time_in_graph(fa3.by_itself))
    except Exception as error:  # whatever a wheel raises for what it was not built for
        yield f"skipped     a real forward: {wheel} does not run it here: {str(error).splitlines()[0]}"
        return
    if p.policy == "fa3":
        if not torch.equal(output, expected):
            raise MismatchError(f"the forward of {wheel} gives other bits with our metadata")
        yield f"equal       attention of {wheel} with our metadata and with its own, bit for bit"
        each = f"with our metadata {times[0]:.2f} us, without {times[1]:.2f} us"
    else:
        yield f"close       attention of {wheel}, {p.policy} and by itself: {_difference(output, expected, wheel)}"
        each = f"{p.policy} {times[0]:.2f} us, FA3's schedule {times[1]:.2f} us, without metadata {times[2]:.2f} us"
    yield f"time        attention of one layer in a CUDA graph: {each}"


class _Attention:
    """One layer's attention by one schedule: with our metadata, and with what FA3 makes for the same bound."""

    def __init__(
        self, build: str, batch: DecodeBatch, call: dict[str, Any], num_splits: int, policy: str = "fa3",
        batch_invariant: bool = False,
    ) -> None:  # fmt: skip
        call = call | {"num_splits": num_splits, "policy": policy, "batch_invariant": batch_invariant}
        self.num_splits = metadata_layout(**call).num_splits  # FA3's own for 0; both sides must have the same
        self.metadata = get_scheduler_metadata(**call | {"num_splits": self.num_splits})
        self.build, self.batch = build, batch

    def with_metadata(self) -> torch.Tensor:
        return attend(self.build, self.batch, self.metadata, self.num_splits)

    def by_itself(self) -> torch.Tensor:
        return attend(self.build, self.batch, None, self.num_splits)


def _difference(output: torch.Tensor, expected: torch.Tensor, wheel: str) -> str:
    """How far the outputs [b, s, h, d] are apart, in words. Raises `MismatchError` beyond what rounding explains."""
    output, expected = output.double().flatten(1), expected.double().flatten(1)
    # An empty sequence's output is zero by both.
    apart = ((output - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-9)).max().item()
    if not apart <= _TOLERANCE:
        raise MismatchError(f"the forward of {wheel} is off by {apart:.3g} in a sequence with our metadata")
    return f"at most {apart:.1e} apart in any sequence, relative"


def _time_in_graph(launch: Callable[[], object]) -> float:
    """Microseconds on the device of one `launch`, as a node of a graph of 20; median of 21 replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(_LAUNCHES):
                launch()
        graph.replay()
        times = []
        for _ in range(_REPLAYS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / _LAUNCHES)
    return float(statistics.median(times))
