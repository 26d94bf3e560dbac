"""`fa3-metadata measure`: what a model's decode step gains on this GPU, by the installed FA3's own forward.

The attention layers of one rank are built with paged KV caches of random data, captured into a CUDA graph in each of
these ways, twice each, and replayed in turns:

    FA3 alone         FA3 makes its metadata in every layer
    engine            FA3's op, a copy into a kept buffer and zeros behind it, run before the replay, as engines do;
                      layers with a window or MLA are left to FA3 (left out where the build has no op)
    ours              the metadata of all kinds of layers by one launch, the first node of the graph
    balanced          the same by policy "balanced"
    batch invariant   the same, batch invariant, if asked for

A time is a replay with what is run before it, between two events, with the GPU kept busy until all is queued. Outputs
are compared first: the same bits as FA3 alone, or for "balanced" within the error of another order of sums. What two
captures of the same differ by, at most, is said: a smaller difference between two ways means nothing. Without a Hopper
GPU and an FA3 wheel the same is simulated (simulator.py).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from .. import trace
from ..api import get_scheduler_metadata, metadata_layout, plan_call
from ..installed import DetectedBuild, installed_version, load_forward, native_op
from ..plans import MetadataPlan, MetadataPlans
from ..triton_kernels.builds import package_of, unsupported_reason
from ..triton_kernels.layout import padded
from ..triton_kernels.plan import make_plan
from ..triton_kernels.problem import Problem
from ..triton_kernels.reference import Lengths
from .call_options import ENGINES, build_of
from .cards import CARDS, find_card
from .decode_batch import DecodeBatch, attend, has_paged_kernels
from .lengths import in_words, parse_lengths
from .models import WHOLE_MODELS, Layers, Model, read_config
from .pictures import card_name
from .plot import draw_bars
from .simulator import Simulation, simulate
from .timing import Captured, apart, eager_sampler, gpu_facts, interleaved, middle

ALONE, ENGINE, OURS, BALANCED, INVARIANT = "FA3 alone", "engine", "ours", "balanced", "batch invariant"
CAPTURES = 2  # graphs of each way
_HEAD_START = 2e-3  # seconds that the host is given to queue a step
_TOLERANCE = {2: 0.02, 1: 0.05}  # by element size; relative, of the norm, for another order of sums
_DEFAULT_LENGTHS = "64 x lognormal(7, 1)"
# us of making the metadata once a step, by sequences: for the simulation. Measured on an H200.
_SEQUENCES = (1, 32, 256, 512, 992, 8192)
_OURS_US, _ENGINE_US = (1.15, 1.18, 1.45, 1.67, 1.99, 3.07), (5.03, 5.59, 8.11, 11.27, 11.80, 11.33)


@dataclass(frozen=True)
class Question:
    """What is measured: the layers of a rank, over sequences of these lengths."""

    layers: Layers  # of one rank
    lengths: tuple[int, ...]
    build: str
    engine: str | None
    page_size: int
    dtype: torch.dtype
    batch_invariant: bool

    @property
    def paged(self) -> bool:
        """Whether the KV cache is; where it is not, each sequence has the longest one's room."""
        return has_paged_kernels(self.build)

    @property
    def table_pages(self) -> int:
        """Pages of a page table: of the longest sequence, and, where batch invariance needs it, more than a window."""
        tokens = max(self.lengths)
        if self.batch_invariant:
            tokens = max(tokens, *(model.window_size[0] + 2 for model, _ in self.layers.kinds))
        return max(1, -(-tokens // self.page_size))

    def call(self, model: Model) -> dict[str, Any]:
        """The arguments of `metadata_layout` for a layer."""
        return {
            "batch_size": len(self.lengths), "max_seqlen_q": 1, "max_seqlen_k": self.table_pages * self.page_size,
            "num_heads": model.num_heads, "num_heads_k": model.num_heads_k, "headdim": model.headdim,
            "headdim_v": model.headdim_v, "qkv_dtype": self.dtype, "causal": True,
            "page_size": self.page_size if self.paged else None,
            "window_size": model.window_size, "attention_chunk": model.attention_chunk, "build": self.build,
        }  # fmt: skip

    @property
    def engine_bound(self) -> int:
        """The num_splits that the engine calls with; 0: it leaves it to FA3."""
        return int(ENGINES[self.engine].arguments["num_splits"]) if self.engine else 0

    def engine_makes(self, model: Model) -> bool:
        """Whether an engine makes the metadata of such layers."""
        return model.words == "full" and model.headdim_v != 512

    @property
    def ways(self) -> list[str]:
        found = [ALONE, ENGINE, OURS, BALANCED]
        return [*found, INVARIANT] if self.batch_invariant else found


@dataclass(frozen=True)
class Answer:
    """Microseconds a step, by what it covers and by way."""

    simulated: bool
    where: str
    times: dict[str, dict[str, float]]  # "step" or a kind of layer -> way -> us of all these layers
    counts: dict[str, int]  # layers of each
    apart: float  # the most that two captures of the same differ by, a part of their time; 0 where simulated
    checked: list[str]  # what was compared, in words
    left_out: list[str]


# ---- simulated -------------------------------------------------------------------------------------------------------


def simulated(question: Question, gpu: str | None, why: str) -> Answer:
    """The answer of simulator.py for a card (None: an H200). Raises what `metadata_layout` raises."""
    lengths = Lengths(np.array(question.lengths, np.int32))
    times: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    left_out: list[str] = []
    last: Simulation | None = None
    for model, count in question.layers.kinds:
        _, problem, rules, _ = plan_call(question.call(model))
        card = find_card(gpu) if gpu else None
        if card is not None:
            problem = replace(problem, gpu=card.name, arch=card.arch, num_sms=card.num_sms)

        def played(
            policy: str = "fa3", bound: int = 0, invariant: bool = False, asked: Problem = problem, of: Any = rules
        ) -> Simulation:
            changed = replace(asked, policy=policy, num_splits=bound, batch_invariant=invariant)
            if reason := unsupported_reason(of, changed):
                raise ValueError(reason)
            return simulate(changed, make_plan(changed, of), lengths)

        last = fa3 = played()
        engine = played(bound=question.engine_bound if "num_splits" not in rules.forward_lacks else 0)
        alone = fa3.time_us + fa3.own_metadata_us
        one = {
            ALONE: alone, ENGINE: engine.time_us if question.engine_makes(model) else alone, OURS: fa3.time_us,
            BALANCED: played("balanced").time_us,
        }  # fmt: skip
        if question.batch_invariant:
            one[INVARIANT] = played("balanced", invariant=True).time_us
        times[model.words] = {way: one[way] * count for way in question.ways}
        counts[model.words] = count
    assert last is not None
    batch = len(question.lengths)
    once = {way: float(np.interp(batch, _SEQUENCES, _OURS_US)) for way in (OURS, BALANCED, INVARIANT)}
    once[ALONE] = 0.0
    once[ENGINE] = 0.0
    if any(question.engine_makes(model) for model, _ in question.layers.kinds):
        once[ENGINE] = float(np.interp(batch, _SEQUENCES, _ENGINE_US))
    step = {way: sum(one[way] for one in times.values()) + once[way] for way in question.ways}
    return Answer(
        True, f"simulated for {card_name(last)}: {why}", {"step": step} | times,
        {"step": question.layers.count} | counts, 0.0, [], left_out,
    )  # fmt: skip


# ---- measured --------------------------------------------------------------------------------------------------------


class RankLayers:
    """The attention layers of one rank: queries, KV caches and page tables, if they are paged, of random data.

    Layers have pages of their own where `memory` bytes hold them all; else they take turns in as many as these hold.
    """

    def __init__(self, question: Question, device: torch.device, memory: int) -> None:
        self.question, self.device = question, device
        self.lengths = torch.tensor(question.lengths, dtype=torch.int32, device=device)
        page = question.page_size
        counts = [max(1, -(-one // page)) if question.paged else question.table_pages for one in question.lengths]
        self.pages = sum(counts)
        place = torch.zeros(len(counts), question.table_pages, dtype=torch.int64)
        for row, end, count in zip(place, np.cumsum(counts).tolist(), counts, strict=True):
            row[:count] = torch.arange(end - count, end)
        self._place = place.to(device)
        self.models = [model for model, count in question.layers.kinds for _ in range(count)]
        wanted = sum(self._bytes(model) for model in self.models)
        self.share = 1.0 if wanted <= memory else memory / wanted
        self.batches = [one for model, count in question.layers.kinds for one in self._of_kind(model, count)]

    def _bytes(self, model: Model) -> int:
        """Of a layer's KV."""
        dims = model.headdim + (model.headdim_v or model.headdim)
        return self.pages * self.question.page_size * model.num_heads_k * dims * self.question.dtype.itemsize

    def _of_kind(self, model: Model, count: int) -> Iterator[DecodeBatch]:
        q = self.question
        regions = max(1, int(self.share * count))
        shape = (self.pages * regions, q.page_size, model.num_heads_k)
        caches = self._random(*shape, model.headdim), self._random(*shape, model.headdim_v or model.headdim)
        order = torch.randperm(self.pages * regions, device=self.device).to(torch.int32).view(regions, self.pages)
        tables = [order[region][self._place] for region in range(regions)]
        batch = len(q.lengths)
        for layer in range(count):
            region = layer % regions
            own = slice(region * self.pages, (region + 1) * self.pages)
            k_cache, v_cache = caches if q.paged else (one[own].view(batch, -1, *one.shape[2:]) for one in caches)
            yield DecodeBatch(
                q=self._random(batch, 1, model.num_heads, model.headdim), k_cache=k_cache, v_cache=v_cache,
                page_table=tables[region] if q.paged else None, cache_seqlens=self.lengths, causal=True,
                window_size=model.window_size,
                qv=self._random(batch, 1, model.num_heads, 512) if model.headdim_v == 512 else None,
            )  # fmt: skip

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=self.device).to(self.question.dtype)


@dataclass(frozen=True, eq=False)
class Way:
    """One way to do some layers: what is run before a replay, and what the graph holds."""

    before: Callable[[], object] | None
    run: Callable[[], list[torch.Tensor]]
    holds: object  # what the graph reads


def way_of(name: str, layers: RankLayers, chosen: Sequence[int]) -> Way:
    """The layers of these numbers done in the way of this name.

    Raises `RuntimeError` where the build cannot do it.
    """
    question = layers.question
    kinds = list(dict.fromkeys(layers.models[i] for i in chosen))
    added: dict[Model, tuple[torch.Tensor | None, int]] = dict.fromkeys(kinds, (None, 0))
    before: Callable[[], object] | None = None
    first: Callable[[], object] = lambda: None  # noqa: E731
    holds: object = layers
    if name == ENGINE:
        native_op(question.build)
        jobs = [_engine_job(question, model, layers.lengths) for model in kinds if question.engine_makes(model)]
        if not jobs:
            raise RuntimeError("engines make no metadata for layers with windows, chunks or MLA")
        for model, (kept, bound, _) in zip([m for m in kinds if question.engine_makes(m)], jobs, strict=True):
            added[model] = kept, bound
        before = partial(_all_of, [job for _, _, job in jobs])
    elif name != ALONE:
        policy = "fa3" if name == OURS else "balanced"
        plans = {}
        for model in kinds:
            call = {key: value for key, value in question.call(model).items() if key not in ("batch_size", "build")}
            plans[model] = MetadataPlan(
                max_batch_size=len(question.lengths), device=layers.device, build=question.build, policy=policy,
                batch_invariant=name == INVARIANT, **call,
            )  # fmt: skip
        together = MetadataPlans(list(plans.values()))
        first, holds = partial(together.update, layers.lengths), (layers, together)
        first()
        added = {model: (plan.metadata, plan.num_splits) for model, plan in plans.items()}

    def run() -> list[torch.Tensor]:
        first()
        return [attend(question.build, layers.batches[i], *added[layers.models[i]]) for i in chosen]

    return Way(before, run, holds)


def _engine_job(
    question: Question, model: Model, lengths: torch.Tensor
) -> tuple[torch.Tensor, int, Callable[[], object]]:
    """(the kept metadata, the forward's num_splits, what is run before a replay)."""
    bound = question.engine_bound
    call = question.call(model) | {"cache_seqlens": lengths, "num_splits": bound, "backend": "native"}
    size = metadata_layout(**{key: value for key, value in call.items() if key != "backend"}).size
    kept = torch.zeros(4 * padded(len(question.lengths) + 4) + 1, dtype=torch.int32, device=lengths.device)

    def make_copy_zero() -> None:
        kept[:size] = get_scheduler_metadata(**call)
        kept[size:] = 0

    return kept[:size], bound, make_copy_zero


def _all_of(jobs: Sequence[Callable[[], object]]) -> None:
    for job in jobs:
        job()


def check_outputs(name: str, found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], element_size: int) -> float:
    """How far the outputs are apart at most, relative. Raises `RuntimeError` for more than this way may be."""
    most = 0.0
    for i, (got, expected) in enumerate(zip(found, wanted, strict=True)):
        if torch.equal(got, expected):
            continue
        error = float((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-9))
        # With another bound on splits than FA3's own, sums have another order.
        if name == OURS or not error < _TOLERANCE[element_size]:
            raise RuntimeError(f"the output of layer {i} by {name!r} is off by {error:.3g}")
        most = max(most, error)
    return most


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    way: Way

    def __call__(self) -> None:
        if self.way.before is not None:
            self.way.before()
        self.graph.replay()


def measured(question: Question, samples: int, rounds: int, progress: Callable[[str], object]) -> Answer:
    """The answer of this GPU. Raises `RuntimeError` for a wrong output."""
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    # Random numbers of one byte are made of two bytes first.
    parts_of_memory = 2 if question.dtype.itemsize == 2 else 4
    layers = RankLayers(question, device, torch.cuda.mem_get_info()[0] // parts_of_memory)
    parts = {"step": list(range(len(layers.models)))}
    kinds = list(dict.fromkeys(layers.models))
    if len(kinds) > 1:
        for model in kinds:
            parts[model.words] = [i for i, one in enumerate(layers.models) if one == model]
    times: dict[str, dict[str, float]] = {}
    checked: dict[str, str] = {}
    left_out: list[str] = []
    noise = 0.0
    if layers.share < 1:
        left_out.append(f"{1 - layers.share:.0%} of the layers share KV pages with others: memory is short")
    for part, chosen in parts.items():
        captured: dict[str, list[_Captured]] = {}
        expected: list[torch.Tensor] | None = None
        pool = torch.cuda.graph_pool_handle()
        for capture in range(CAPTURES):
            for name in question.ways if capture == 0 else [n for n in reversed(question.ways) if n in captured]:
                progress(f"{part}: capturing {name}")
                try:
                    one, outputs = _capture(way_of(name, layers, chosen), pool)
                except RuntimeError as error:
                    if name in (ENGINE, INVARIANT) and capture == 0:
                        left_out.append(f"{part}, {name}: {' '.join(str(error).split())}")
                        continue
                    raise
                expected = outputs if expected is None else expected
                apart_by = check_outputs(name, outputs, expected, question.dtype.itemsize)
                checked[name] = "bit for bit" if apart_by == 0 else f"within {apart_by:.1e}, relative"
                captured.setdefault(name, []).append(one)
        progress(f"{part}: replaying")
        samplers = {
            f"{name} {i}": eager_sampler(one, 1, None, head_start=_HEAD_START)
            for name, some in captured.items()
            for i, one in enumerate(some)
        }
        taken = interleaved(samplers, samples, rounds)
        results: Captured = {name: [taken[f"{name} {i}"] for i in range(CAPTURES)] for name in captured}
        noise = max(noise, apart(results))
        times[part] = {name: middle(some) for name, some in results.items()}
        del captured, samplers, expected
        gc.collect()
        torch.cuda.empty_cache()
    counts = {part: len(chosen) for part, chosen in parts.items()}
    if len(kinds) == 1:
        times[kinds[0].words], counts[kinds[0].words] = times["step"], counts["step"]
    said = [f"{name}: {how}" for name, how in checked.items() if name != ALONE]
    return Answer(False, str(gpu_facts()), times, counts, noise, said, left_out)


def _capture(way: Way, pool: Any) -> tuple[_Captured, list[torch.Tensor]]:
    """A graph, and its outputs after a replay."""
    if way.before is not None:
        way.before()
    way.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = way.run()
    one = _Captured(graph, way)
    for output in outputs:
        output.fill_(torch.nan)
    one()
    return one, [output.clone() for output in outputs]


def why_not(build: str) -> str | None:
    """Why nothing can be measured here, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA GPU here"
    if torch.cuda.get_device_capability()[0] != 9:
        return f"{torch.cuda.get_device_name()} is no Hopper GPU"
    package = package_of(build)
    if installed_version(package) is None:
        return f"{package} is not installed"
    try:
        load_forward(build)
    except (ImportError, OSError) as error:
        return f"{package} does not load: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
    return None


# ---- the command -----------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `fa3-metadata measure`."""
    parser.add_argument("--model", choices=sorted(WHOLE_MODELS), help="a well-known model (default: llama-3.1-8b)")
    parser.add_argument("--model-config", type=pathlib.Path, help="config.json of a model, as Hugging Face has it")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks that share the model's heads")
    parser.add_argument("--cache-seqlens", help=f"tokens in each sequence's cache (default: {_DEFAULT_LENGTHS})")
    parser.add_argument("--trace", type=pathlib.Path, help="take the lengths of a recorded step")
    parser.add_argument("--step", type=int, help="which one, from 0 on (default: the one in the middle)")
    parser.add_argument("--engine", choices=sorted(ENGINES), help="pages, build and bound as this engine has them")
    parser.add_argument("--build", help="FA3 build (default: what is installed)")
    parser.add_argument("--page-size", type=int, help="tokens of a KV page (default: 64, or the engine's)")
    parser.add_argument("--qkv-dtype", choices=["bfloat16", "float16", "float8_e4m3fn"], default="bfloat16")
    parser.add_argument("--batch-invariant", action="store_true", help="measure that, too")
    parser.add_argument("--simulate", action="store_true", help="simulate, even where it could be measured")
    parser.add_argument("--gpu", help=f"simulate for this card: {', '.join(CARDS)}")
    parser.add_argument("--samples", type=int, default=25, help="timed replays of each graph")
    parser.add_argument("--rounds", type=int, default=5, help="turns that they are spread over")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="draw bars: .png, .svg or .pdf")


def question_of(options: argparse.Namespace) -> tuple[Question, DetectedBuild]:
    """What the options ask. Raises `ValueError` or `OSError`."""
    if options.model and options.model_config:
        raise ValueError("give --model or --model-config, not both")
    whole = read_config(options.model_config) if options.model_config else WHOLE_MODELS[options.model or "llama-3.1-8b"]
    if options.trace and options.cache_seqlens:
        raise ValueError("give --cache-seqlens or --trace, not both")
    if options.step is not None and not options.trace:
        raise ValueError("--step is a step of a --trace")
    for name in ("samples", "rounds", "page_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.plot and options.plot.suffix.lower() == ".html":
        raise ValueError(f"--plot must name a file that ends in .png, .svg or .pdf here, got {options.plot}")
    if options.trace:
        steps = [one.lengths.cache_seqlens for one in trace.read(options.trace) if one.problem.batch_size]
        place = len(steps) // 2 if options.step is None else options.step
        if not 0 <= place < len(steps):
            raise ValueError(f"--step must be a step of {options.trace}, which has {len(steps)}, got {place}")
        lengths = [max(int(one), 0) for one in steps[place]]
    else:
        lengths = parse_lengths(options.cache_seqlens or _DEFAULT_LENGTHS)
    if not lengths or max(lengths) == 0:
        raise ValueError("--cache-seqlens must have a sequence of at least one token")
    build = build_of(options.build, options.engine)
    page = options.page_size or (ENGINES[options.engine].arguments["page_size"] if options.engine else 64)
    question = Question(
        whole.shard(options.tp), tuple(lengths), build.build, options.engine, page, getattr(torch, options.qkv_dtype),
        options.batch_invariant,
    )  # fmt: skip
    return question, build


def table(question: Question, answer: Answer) -> list[str]:
    """A row for the step and for a layer of each kind, and what each way gains."""
    ways = [way for way in question.ways if way in answer.times["step"]]
    lines = [f"{'us':38s}" + "".join(f"{way:>17s}" for way in ways)]
    for part, times in answer.times.items():
        count = answer.counts[part]
        name, over = (f"a step, {count} layers", 1) if part == "step" else (f"a layer, {part} ({count} of them)", count)
        cells = "".join(f"{times[way] / over:17.2f}" if way in times else f"{'-':>17s}" for way in ways)
        lines.append(f"{name:38s}{cells}")
        gains = "".join(
            f"{100 * (1 - times[way] / times[ALONE]):+16.1f}%" if way in times else f"{'':17s}" for way in ways[1:]
        )
        lines.append(f"{'    less than FA3 alone':38s}{'':17s}{gains}")
    return lines


def as_json(question: Question, build: DetectedBuild, answer: Answer) -> dict[str, Any]:
    """The answer in JSON's types. Times in us."""
    return {
        "simulated": answer.simulated, "where": answer.where, "build": {"name": build.build, "reason": build.reason},
        "model": question.layers.name, "engine": question.engine,
        "page_size": question.page_size if question.paged else None,
        "qkv_dtype": str(question.dtype).removeprefix("torch."), "lengths": list(question.lengths),
        "times_us": answer.times, "layers": answer.counts, "apart": answer.apart, "checked": answer.checked,
        "left_out": answer.left_out,
    }  # fmt: skip


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], object]]:
    """Says what is going on, on stderr: rich's bar in a terminal, else nothing."""
    if quiet or not sys.stderr.isatty():
        yield lambda what: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda what: print(what, file=sys.stderr, flush=True)
        return
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda what: bar.update(task, description=what)


def run(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """`fa3-metadata measure`. Raises `ValueError`, `RuntimeError` or `OSError` for what cannot be done."""
    question, build = question_of(options)
    why = "as asked" if options.simulate or options.gpu else why_not(question.build)
    if why is None and any(model.attention_chunk for model, _ in question.layers.kinds):
        why = "layers with chunks are not built here"
    if why is None and not question.paged and any(model.words != "full" for model, _ in question.layers.kinds):
        why = f"{question.build} was compiled without windows"
    if why is not None:
        answer = simulated(question, options.gpu, why)
    else:
        with _progress(options.json) as progress:
            answer = measured(question, options.samples, options.rounds, progress)
    kinds = ", ".join(f"{count} {model.words}" for model, count in question.layers.kinds)
    first = question.layers.kinds[0][0]
    title = (
        f"{question.layers.name}, tensor parallel {options.tp}: {kinds}; {first.num_heads}/{first.num_heads_k} q/KV "
        f"heads, head dim {first.headdim}"
    )
    if options.plot:
        parts = {
            ("a step" if part == "step" else f"{part} layers"): times
            for part, times in answer.times.items()
            if len(answer.times) > 2 or part == "step"
        }
        ways = [way for way in question.ways if way in answer.times["step"]]
        bars = {way: [times.get(way, math.nan) for times in parts.values()] for way in ways}
        note = "simulated" if answer.simulated else f"two captures of the same differ by up to {answer.apart:.2%}"
        draw_bars(list(parts), bars, options.plot, f"Attention of a decode step\n{title}\n{answer.where}", note)
    if options.json:
        say(json.dumps(as_json(question, build, answer)))
        return
    say(f"{'simulated' if answer.simulated else 'measured':12s}{answer.where.removeprefix('simulated ')}")
    say(f"model       {title}, {str(question.dtype).removeprefix('torch.')}")
    pages = f"pages of {question.page_size}" if question.paged else "not paged"
    say(f"lengths     {in_words(question.lengths)}; {pages}")
    say(f"build       {build.build}: {build.reason}")
    say("")
    for line in table(question, answer):
        say(line)
    say("")
    if answer.simulated:
        say("simulated   nothing here was measured; the model is off by some percent (docs/how-fa3-schedules.md)")
    else:
        say(f"apart       two captures of the same differ by up to {answer.apart:.2%}: a smaller gain means nothing")
        say(f"outputs     {'; '.join(answer.checked)}")
    for one in answer.left_out:
        say(f"left out    {one}")
    if options.plot:
        say(f"drawn       {options.plot}")
