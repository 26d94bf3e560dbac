"""A whole decode step on the shapes of real models, by FA3's per-layer path, SGLang's precompute, and ours.

    python -m bench decode-step                       # attention of all layers, and two whole models
    python -m bench decode-step --model 8B Qwen3 --batch 64 --csv step.csv

Every layer has a paged KV cache of its own, and all layers are captured into one CUDA graph. Four ways to do a step:

    per layer   FA3 makes its metadata in every layer
    native      as SGLang does: the wheel's op, a copy into a kept buffer and zeros behind it, run before the replay;
                layers with a window and MLA, for which SGLang makes none, are left to FA3
    ours        the metadata of all groups of layers by one launch, the first node of the graph
    balanced    the same by policy "balanced"

Device time: between events before and after the replay, with what is run before it, while the GPU is kept busy until
all is queued. Host time: until both have returned. Lengths differ from step to step, by one token, and are set before
a step, outside of both; each way sees the same ones. Outputs are compared first, bit for bit, those of "balanced"
within the error of another order of sums. A "whole" model has its norms, projections, rope, MLP, embedding and head
too, with random weights and plain torch operations; its steps end with the next token and the next lengths in place.

Each way is captured twice, and its time is the mean of the two medians. What the two graphs of a way differ by, at
most, is printed as "apart": no smaller difference between two ways means anything. The graphs share one memory pool,
and outputs are let go before the next capture, so that all of them work at nearly the same addresses.
"""

from __future__ import annotations

import argparse
import gc
import pathlib
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import count
from typing import Any

import fa3_metadata
import torch
from fa3_metadata import MetadataPlan, MetadataPlans
from fa3_metadata.installed import load_forward, provider_of
from fa3_metadata.tools.timing import (
    Captured,
    apart,
    eager_sampler,
    gpu_facts,
    host_sampler,
    interleaved,
    middle,
)
from fa3_metadata.triton_kernels.layout import padded

from .decode_models import ATTENTION, SPAN, WHOLE, Attention, Model, Whole
from .rows import capture_lines, write_captures

VARIANTS = ("per layer", "native", "ours", "balanced")
CAPTURES = 2  # graphs of each way
HEAD_START = 2e-3  # seconds that the host is given to queue a step, on top of twice the time it took
TOLERANCE = {"bfloat16": 0.02, "float8_e4m3fn": 0.05}  # relative, of the norm, for another order of sums
WHOLE_TOLERANCE = 0.1  # the same after many layers of random weights


class DiffersError(RuntimeError):
    """An output that is not FA3's."""


@dataclass
class Step:
    """One way to do a step: `before` a replay, and the graph."""

    graph: torch.cuda.CUDAGraph
    outputs: list[torch.Tensor]
    before: Callable[[], object] | None
    holds: object  # whose memory the graph reads

    def __call__(self) -> None:
        if self.before is not None:
            self.before()
        self.graph.replay()


def step_of(variant: str, attention: Attention, build: str, pool: Any) -> Step:
    """Capture a way to do a step, with what it allocates in `pool`."""
    windows = list(dict.fromkeys(attention.model.window_of))
    before: Callable[[], object] | None = None
    first: Callable[[], object] = lambda: None  # noqa: E731
    added: dict[int | None, dict[str, Any]] = {window: {} for window in windows}
    holds: Any = attention
    if variant == "native" and None in windows and attention.qv is None:
        before, added[None] = native_before(attention, build)
    elif variant in ("ours", "balanced"):
        policy = "fa3" if variant == "ours" else "balanced"
        batch = len(attention.cache_seqlens)
        plans = {
            window: MetadataPlan(
                max_batch_size=batch, device="cuda", build=build, policy=policy, **attention.problem(window)
            )
            for window in windows
        }
        together = MetadataPlans(list(plans.values()))
        first, holds = partial(together.update, attention.cache_seqlens), (attention, together)
        first()
        added = {window: plan.forward_arguments() for window, plan in plans.items()}

    def run() -> list[torch.Tensor]:
        first()
        return attention.run(added.__getitem__)

    if before is not None:
        before()
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = run()
    return Step(graph, outputs, before, holds)


def native_before(attention: Attention, build: str) -> tuple[Callable[[], object], dict[str, Any]]:
    """What SGLang runs before a replay for its full layers, and what these are given."""
    front_end = import_module(provider_of(build).module).get_scheduler_metadata
    batch = len(attention.cache_seqlens)
    kept = torch.zeros(4 * padded(batch + 4) + 1, dtype=torch.int32, device="cuda")
    call = attention.problem(None) | {"batch_size": batch, "max_seqlen_q": 1, "cache_seqlens": attention.cache_seqlens}
    size = front_end(**call).shape[0]

    def make_copy_zero() -> None:
        kept[:size] = front_end(**call)
        kept[size:] = 0

    return make_copy_zero, {"scheduler_metadata": kept[:size]}


def outputs_of(step: Step, attention: Attention) -> list[torch.Tensor]:
    """What a step answers for the first and the last lengths. Its own tensors are let go: see the top of this file."""
    found = []
    for at in (0, SPAN - 1):  # metadata must follow the lengths
        for output in step.outputs:
            output.fill_(torch.nan)
        attention.reset(at)
        step()
        found += [output.clone() for output in step.outputs]
    step.outputs = []
    return found


def check(variant: str, found: list[torch.Tensor], expected: list[torch.Tensor], model: Model) -> None:
    """Raises `DiffersError` where an output is not that of FA3's per-layer path."""
    for i, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        if variant != "balanced":
            if not torch.equal(got, wanted):
                raise DiffersError(f"{model.name}: output {i} by {variant!r} has other bits than per layer")
            continue
        error = ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()
        most = WHOLE_TOLERANCE if model.hidden else TOLERANCE[model.dtype]
        if not error < most:
            raise DiffersError(f"{model.name}: output {i} by {variant!r} is off by {error:.3g}, over {most}")


def measure(model: Model, lengths: tuple[int, ...], build: str, samples: int, rounds: int) -> dict[str, Captured]:
    """Microseconds of a step, "device" and "host". Raises `DiffersError` for a wrong output."""
    torch.manual_seed(0)
    attention = (Whole if model.hidden else Attention)(model, lengths, load_forward(build))
    pool = torch.cuda.graph_pool_handle()
    steps: dict[str, list[Step]] = {variant: [] for variant in VARIANTS}
    expected: list[torch.Tensor] | None = None
    for capture in range(CAPTURES):
        for variant in VARIANTS if capture % 2 == 0 else reversed(VARIANTS):
            step = step_of(variant, attention, build, pool)
            found = outputs_of(step, attention)
            expected = found if expected is None else expected
            check(variant, found, expected, model)
            steps[variant].append(step)

    def lengths_in_turn() -> Callable[[], None]:
        steps_so_far = count()
        return lambda: attention.reset(next(steps_so_far))

    def times(sampler_of: Callable[..., Any], **more: Any) -> Captured:
        attention.reset()
        samplers = {
            f"{variant} {i}": sampler_of(step, 1, lengths_in_turn(), **more)
            for variant, captures in steps.items()
            for i, step in enumerate(captures)
        }
        taken = interleaved(samplers, samples, rounds)
        return {variant: [taken[f"{variant} {i}"] for i in range(CAPTURES)] for variant in VARIANTS}

    return {"device": times(eager_sampler, head_start=HEAD_START), "host": times(host_sampler)}


def how_made(model: Model) -> str:
    """How many groups of layers attend alike, and which have precomputed metadata."""
    groups = Counter(model.window_of)
    parts = [f"{n} {'full' if window is None else f'window {window}'}" for window, n in groups.items()]
    native = 0 if model.headdim_v == 512 else groups[None]
    kinds = "1 group" if len(groups) == 1 else f"{len(groups)} groups"
    return f"{model.name}: {kinds} of layers ({', '.join(parts)}), one launch for all; native for {native} layers"


TIMED = """timed: what is run before the replay (native: op, copy, zeros), and the replay of one graph with all layers.
device: between events, the GPU busy until all is queued. host: until both return. Setting lengths is not timed.
Two graphs of each way, the mean of their medians; apart: what graphs of the same way differ by at most."""
HEADER = f"{'us a step':24s}{'batch':>6s}{'mean':>7s}" + "".join(f"{name:>11s}" for name in VARIANTS)
HEADER += "   per layer /" + "".join(f"{name:>9s}" for name in VARIANTS[1:]) + "   apart   host: native   ours"


def line(model: Model, lengths: tuple[int, ...], times: dict[str, Captured]) -> str:
    """A row of the table; tokens/s and gains in a second row for a whole model."""
    device = {name: middle(captures) for name, captures in times["device"].items()}
    name = model.name + (", whole" if model.hidden else "")
    mean = round(sum(lengths) / len(lengths))
    text = f"{name:24s}{len(lengths):6d}{mean:7d}" + "".join(f"{device[v]:11.1f}" for v in VARIANTS)
    text += " " * 14 + "".join(f"{device['per layer'] / device[v]:9.4f}" for v in VARIANTS[1:])
    text += f"{100 * apart(times['device']):7.2f}%"
    text += f"{middle(times['host']['native']):15.1f}{middle(times['host']['ours']):7.1f}"
    if model.hidden:
        text += f"\n{'    tokens/s':37s}" + "".join(f"{len(lengths) / device[v] * 1e6:11.1f}" for v in VARIANTS)
        gains = (100 * (device["per layer"] / device[v] - 1) for v in VARIANTS[1:])
        text += f"{'gain':>14s}" + "".join(f"{gain:+8.2f}%" for gain in gains)
    return text


def why_not(build: str) -> str | None:
    """Why steps cannot be measured here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    if torch.cuda.get_device_capability()[0] != 9:
        return f"no Hopper GPU but {torch.cuda.get_device_name()}"
    if not build.startswith("sglang-kernel"):
        return f"{build} instead of sglang-kernel"
    try:
        module = import_module(provider_of(build).module)
    except (ImportError, OSError) as error:
        return f"{build} does not load: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
    return None if hasattr(module, "get_scheduler_metadata") else f"{build} has no get_scheduler_metadata"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench decode-step", description="a decode step of real models")
    parser.add_argument("--model", nargs="+", default=[""], help="models whose name contains one of these")
    parser.add_argument("--batch", nargs="+", type=int, help="batches of so many sequences only")
    parser.add_argument("--samples", type=int, default=25, help="timed steps of each kind")
    parser.add_argument("--rounds", type=int, default=5, help="turns that they are spread over")
    parser.add_argument("--no-whole", action="store_true", help="attention only")
    parser.add_argument("--csv", type=pathlib.Path, help="write all times there")
    options = parser.parse_args(argv)
    build = fa3_metadata.detect_build().build
    if missing := why_not(build):
        print(f"decode-step needs a Hopper GPU and sglang-kernel: {missing}", file=sys.stderr)
        return 2
    cases = [
        (model, [lengths for lengths in batches if options.batch is None or len(lengths) in options.batch])
        for model, batches in (*ATTENTION, *(() if options.no_whole else WHOLE))
        if any(name in model.name for name in options.model)
    ]
    cases = [(model, batches) for model, batches in cases if batches]
    if not cases:
        print("decode-step: there is no such model and batch", file=sys.stderr)
        return 2
    print(gpu_facts())
    print(TIMED, *dict.fromkeys(how_made(model) for model, _ in cases), HEADER, sep="\n", flush=True)
    rows = []
    for model, batches in cases:
        for lengths in batches:
            try:
                times = measure(model, lengths, build, options.samples, options.rounds)
            except DiffersError as error:
                part = "whole" if model.hidden else "attention"
                print(f"decode-step, batch {len(lengths)}, {part}: {error}", file=sys.stderr)
                return 1
            print(line(model, lengths, times), flush=True)
            part = "whole" if model.hidden else "attention"
            rows += capture_lines([model.name, part, len(lengths), sum(lengths)], times, digits=2)
            gc.collect()  # graphs and their pools, before the next caches
            torch.cuda.empty_cache()
    if options.csv:
        write_captures(options.csv, ["model", "part", "batch", "tokens"], rows)
    return 0
