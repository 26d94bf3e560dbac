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
all is queued. Host time: until both have returned. The inputs are the same for all; outputs are compared first, bit
for bit, those of "balanced" within the error of another order of sums. A "whole" model has its norms, projections,
rope, MLP, embedding and head too, with random weights and plain torch operations; its steps end with the next token.
"""

from __future__ import annotations

import argparse
import csv
import gc
import pathlib
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import fa3_metadata
import torch
from fa3_metadata import MetadataPlan, MetadataPlans
from fa3_metadata.providers import load_forward, provider_of
from fa3_metadata.triton_kernels.layout import padded
from torch.nn.functional import rms_norm, silu

from .timing import eager_sampler, gpu_facts, host_sampler, interleaved, summary
from .workloads import lognormal, uniform

PAGE = 64
VARIANTS = ("per layer", "native", "ours", "balanced")
TOLERANCE = {"bfloat16": 0.02, "float8_e4m3fn": 0.05}  # relative, of the norm, for another order of sums
WHOLE_TOLERANCE = 0.1  # the same after many layers of random weights


class DiffersError(RuntimeError):
    """An output that is not FA3's."""


@dataclass(frozen=True)
class Model:
    """What one GPU has of a model. `windows`: keys to the left that each layer sees, None for all, in a cycle."""

    name: str
    layers: int
    num_heads: int
    num_heads_k: int
    headdim: int = 128
    headdim_v: int | None = None  # 512 with headdim 64: MLA
    windows: tuple[int | None, ...] = (None,)
    dtype: str = "bfloat16"
    hidden: int = 0  # of a whole model
    intermediate: int = 0
    vocabulary: int = 0

    @property
    def window_of(self) -> list[int | None]:
        """The window of each layer."""
        return [self.windows[i % len(self.windows)] for i in range(self.layers)]

    @property
    def value_headdim(self) -> int:
        return self.headdim_v or self.headdim

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the KV caches of all layers."""
        element = getattr(torch, self.dtype).itemsize
        return self.layers * tokens * self.num_heads_k * (self.headdim + self.value_headdim) * element


SOME, MANY = lognormal(16, 8, 1, 41, 32768), lognormal(64, 7, 1, 42, 16384)
ATTENTION: tuple[tuple[Model, tuple[tuple[int, ...], ...]], ...] = (
    (Model("Llama-3.1-8B", 32, 32, 8), (SOME, MANY)),
    (Model("Llama-3.1-8B, e4m3", 32, 32, 8, dtype="float8_e4m3fn"), (MANY,)),
    (Model("Llama-3.1-70B, TP8", 80, 8, 1), (SOME, MANY)),
    (Model("Qwen3-32B, TP4", 64, 16, 2), (SOME, MANY)),
    (Model("gpt-oss-20b", 24, 64, 8, 64, windows=(127, None)), (SOME, MANY)),
    (Model("Gemma-3-27B", 62, 32, 16, windows=(1023,) * 5 + (None,)), (SOME,)),
    (Model("DeepSeek-V3 MLA, TP8", 61, 16, 1, 64, 512), (SOME, MANY)),
)
WHOLE: tuple[tuple[Model, tuple[tuple[int, ...], ...]], ...] = (
    (Model("Llama-3.1-8B", 32, 32, 8, hidden=4096, intermediate=14336, vocabulary=128256), (uniform(1, 1024), MANY)),
    (Model("Llama-3.1-70B, TP8", 80, 8, 1, hidden=8192, intermediate=3584, vocabulary=16032), (uniform(1, 1024), MANY)),
)


class Attention:
    """The layers' attention over a batch; `run(metadata)` calls them all, `metadata(window)` adds their arguments."""

    def __init__(self, model: Model, lengths: tuple[int, ...], forward: Callable[..., Any]) -> None:
        self.model, self.forward = model, forward
        self.cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        pages = [-(-n // PAGE) for n in lengths]
        self.page_table = torch.zeros(len(lengths), max(pages), dtype=torch.int32, device="cuda")
        for row, own in zip(self.page_table, torch.randperm(sum(pages), device="cuda").split(pages), strict=True):
            row[: len(own)] = own.to(torch.int32)
        k, v = ((sum(pages), PAGE, model.num_heads_k, d) for d in (model.headdim, model.value_headdim))
        self.caches = [(self.random(*k), self.random(*v)) for _ in range(model.layers)]
        batch = len(lengths)
        self.qs = [self.random(batch, 1, model.num_heads, model.headdim) for _ in range(model.layers)]
        self.qv = self.random(batch, 1, model.num_heads, 512) if model.headdim_v == 512 else None

    def random(self, *shape: int) -> torch.Tensor:
        made = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
        return made.to(getattr(torch, self.model.dtype))

    def attend(self, layer: int, q: torch.Tensor, more: dict[str, Any]) -> torch.Tensor:
        k_cache, v_cache = self.caches[layer]
        window = self.model.window_of[layer]
        if self.qv is not None:
            more = more | {"qv": self.qv}
        out: torch.Tensor = self.forward(
            q=q, k_cache=k_cache, v_cache=v_cache, cache_seqlens=self.cache_seqlens, page_table=self.page_table,
            causal=True, window_size=(-1, -1) if window is None else (window, 0), **more,
        )  # fmt: skip
        return out

    def run(self, metadata: Callable[[int | None], dict[str, Any]]) -> list[torch.Tensor]:
        return [self.attend(i, q, metadata(self.model.window_of[i])) for i, q in enumerate(self.qs)]

    def problem(self, window: int | None) -> dict[str, Any]:
        """What `MetadataPlan` and the wheel's front end are told alike."""
        model = self.model
        return {
            "max_seqlen_k": self.page_table.shape[1] * PAGE, "num_heads": model.num_heads,
            "num_heads_k": model.num_heads_k, "headdim": model.headdim, "headdim_v": model.value_headdim,
            "qkv_dtype": getattr(torch, model.dtype), "page_size": PAGE, "causal": True,
            "window_size": (-1, -1) if window is None else (window, 0),
        }  # fmt: skip


class Whole(Attention):
    """The same with everything around it: from the last tokens to the next ones."""

    def __init__(self, model: Model, lengths: tuple[int, ...], forward: Callable[..., Any]) -> None:
        super().__init__(model, lengths, forward)
        d, hidden = model.headdim, model.hidden
        shapes = ((hidden, (model.num_heads + 2 * model.num_heads_k) * d), (model.num_heads * d, hidden),
                  (hidden, 2 * model.intermediate), (model.intermediate, hidden))  # fmt: skip
        self.weights = [[self.weight(*shape) for shape in shapes] for _ in range(model.layers)]
        self.embedding, self.head = self.weight(model.vocabulary, hidden), self.weight(hidden, model.vocabulary)
        self.tokens = torch.arange(len(lengths), device="cuda")
        position = (self.cache_seqlens - 1).long()  # of the new token, which the lengths count already
        page = self.page_table.gather(1, (position // PAGE)[:, None])[:, 0].long()
        self.slots = page * PAGE + position % PAGE
        angles = position[:, None] * 500000.0 ** (-torch.arange(0, d, 2, device="cuda") / d)
        self.cos, self.sin = (one.repeat(1, 2)[:, None].bfloat16() for one in (angles.cos(), angles.sin()))

    def weight(self, rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda").normal_(std=rows**-0.5)

    def run(self, metadata: Callable[[int | None], dict[str, Any]]) -> list[torch.Tensor]:
        """The logits."""
        model, batch = self.model, len(self.tokens)
        norm = partial(rms_norm, normalized_shape=(model.hidden,), eps=1e-5)
        x = self.embedding[self.tokens]
        for i, (qkv, out, gate_up, down) in enumerate(self.weights):
            heads = (norm(x) @ qkv).view(batch, -1, model.headdim)
            q_and_k, v = heads.split((model.num_heads + model.num_heads_k, model.num_heads_k), dim=1)
            left, right = q_and_k.chunk(2, dim=-1)
            q_and_k = q_and_k * self.cos + torch.cat((-right, left), dim=-1) * self.sin
            q, k = q_and_k.split((model.num_heads, model.num_heads_k), dim=1)
            for cache, new in zip(self.caches[i], (k, v), strict=True):
                cache.flatten(0, 1)[self.slots] = new
            x = x + self.attend(i, q[:, None], metadata(model.window_of[i])).reshape(batch, -1) @ out
            gate, up = (norm(x) @ gate_up).chunk(2, dim=-1)
            x = x + (silu(gate) * up) @ down
        logits = norm(x) @ self.head
        self.next_tokens = logits.argmax(dim=-1)
        return [logits]


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


def step_of(variant: str, attention: Attention, build: str) -> Step:
    """Capture a way to do a step."""
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
    with torch.cuda.graph(graph):
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


def check(steps: dict[str, Step], model: Model) -> None:
    """Raises `DiffersError` where a step's output is not that of FA3's per-layer path."""
    for step in steps.values():
        for output in step.outputs:
            output.fill_(torch.nan)
        step()
    expected = steps["per layer"].outputs
    for variant, step in steps.items():
        for layer, (got, wanted) in enumerate(zip(step.outputs, expected, strict=True)):
            if variant != "balanced":
                if not torch.equal(got, wanted):
                    raise DiffersError(f"{model.name}: output {layer} by {variant!r} has other bits than per layer")
                continue
            error = ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()
            most = WHOLE_TOLERANCE if model.hidden else TOLERANCE[model.dtype]
            if not error < most:
                raise DiffersError(f"{model.name}: output {layer} by {variant!r} is off by {error:.3g}, over {most}")


def measure(
    model: Model, lengths: tuple[int, ...], build: str, samples: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Microseconds of a step by variant, "device" and "host". Raises `DiffersError` for a wrong output."""
    torch.manual_seed(0)
    attention = (Whole if model.hidden else Attention)(model, lengths, load_forward(build))
    steps = {variant: step_of(variant, attention, build) for variant in VARIANTS}
    check(steps, model)
    device = interleaved({name: eager_sampler(step, calls=1) for name, step in steps.items()}, samples, rounds)
    host = interleaved({name: host_sampler(step, calls=1) for name, step in steps.items()}, samples, rounds)
    return {name: {"device": device[name], "host": host[name]} for name in steps}


def how_made(model: Model) -> str:
    """How many groups of layers attend alike, and which have precomputed metadata."""
    groups = Counter(model.window_of)
    parts = [f"{n} {'full' if window is None else f'window {window}'}" for window, n in groups.items()]
    native = 0 if model.headdim_v == 512 else groups[None]
    kinds = "1 group" if len(groups) == 1 else f"{len(groups)} groups"
    return f"{model.name}: {kinds} of layers ({', '.join(parts)}), one launch for all; native for {native} layers"


TIMED = """timed: what is run before the replay (native: op, copy, zeros), and the replay of one graph with all layers.
device: between events, the GPU busy until all is queued. host: until both return."""
HEADER = f"{'us a step':24s}{'batch':>6s}{'mean':>7s}" + "".join(f"{name:>11s}" for name in VARIANTS)
HEADER += "   per layer /" + "".join(f"{name:>9s}" for name in VARIANTS[1:]) + "   host: native   ours"


def line(model: Model, lengths: tuple[int, ...], times: dict[str, dict[str, list[float]]]) -> str:
    """A row of the table, medians; tokens/s in a second row for a whole model."""
    device = {name: summary(one["device"])[1] for name, one in times.items()}
    host = {name: summary(one["host"])[1] for name, one in times.items()}
    name = model.name + (", whole" if model.hidden else "")
    mean = round(sum(lengths) / len(lengths))
    text = f"{name:24s}{len(lengths):6d}{mean:7d}" + "".join(f"{device[v]:11.1f}" for v in VARIANTS)
    text += " " * 14 + "".join(f"{device['per layer'] / device[v]:9.3f}" for v in VARIANTS[1:])
    text += f"{host['native']:15.1f}{host['ours']:7.1f}"
    if model.hidden:
        text += f"\n{'    tokens/s':37s}" + "".join(f"{len(lengths) / device[v] * 1e6:11.1f}" for v in VARIANTS)
        gains = (100 * (device["per layer"] / device[v] - 1) for v in VARIANTS[1:])
        text += f"{'gain':>14s}" + "".join(f"{gain:+8.1f}%" for gain in gains)
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


def write_csv(path: pathlib.Path, rows: list[list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        names = ["model", "part", "batch", "tokens", "variant", "metric", "p20_us", "p50_us", "p80_us"]
        csv.writer(file).writerows([names, *rows])


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
            for variant, metrics in times.items():
                for metric, values in metrics.items():
                    percentiles = [f"{value:.2f}" for value in summary(values)]
                    whole = "whole" if model.hidden else "attention"
                    rows.append([model.name, whole, len(lengths), sum(lengths), variant, metric, *percentiles])
            gc.collect()  # graphs and their pools, before the next caches
            torch.cuda.empty_cache()
    if options.csv:
        write_csv(options.csv, rows)
    return 0
