"""Checks of an explained call: the other implementation, the installed wheel, a real forward, and their times."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .api import get_scheduler_metadata, plan_call, unpack_metadata
from .decode_batch import attend, kv_cache_bytes, make_decode_batch
from .detect import installed_version
from .native import native_metadata
from .report import Explanation
from .triton_kernels.builds import package_of

_LAUNCHES, _REPLAYS = 20, 21


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
    try:
        equal = _agree(explanation, arguments, "native", f"Triton kernel and {package} {version}")
    except RuntimeError as error:
        yield f"skipped     the wheel's own op: {error}"
        yield f"time        metadata, one launch in a CUDA graph: {ours:.2f} us"
    else:
        yield equal
        tensors, problem, _, _ = plan_call(arguments)
        assert tensors is not None
        theirs = _time_in_graph(lambda: native_metadata(build, problem, tensors))
        times = f"ours {ours:.2f} us, {package} {version} {theirs:.2f} us"
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
    arguments = batch.problem_arguments() | {"num_splits": plan.num_splits, "build": build}
    metadata = get_scheduler_metadata(**arguments)

    def with_ours() -> torch.Tensor:
        return attend(build, batch, metadata, plan.num_splits)

    def by_itself() -> torch.Tensor:
        return attend(build, batch, None, plan.num_splits)

    try:
        equal = torch.equal(with_ours(), by_itself())
        ours, theirs = _time_in_graph(with_ours), _time_in_graph(by_itself)
    except Exception as error:  # whatever a wheel raises for what it was not built for
        yield f"skipped     a real forward: {wheel} does not run it here: {str(error).splitlines()[0]}"
        return
    if not equal:
        raise MismatchError(f"the forward of {wheel} gives other bits with our metadata")
    yield f"equal       attention of {wheel} with our metadata and with its own, bit for bit"
    times = f"with our metadata {ours:.2f} us, without {theirs:.2f} us"
    yield f"time        attention of one layer in a CUDA graph: {times}"


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
