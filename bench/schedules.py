"""Judge of schedules: one layer's attention over named workloads, by FA3's schedule, ours and the best uniform one.

    python -m bench schedules                     # the named workloads
    python -m bench schedules --suite random      # others, drawn at random, that nobody looked at
    python -m bench schedules --suite seen        # drawn at random, too, but looked at since
    python -m bench schedules --sm-margin 54      # a card with 54 SMs less
    python -m bench schedules --invariant         # and what batch invariance costs

Each workload is measured as FA3 without metadata (it makes its own in every layer), with FA3's metadata, with policy
"balanced", and with every uniform number of key blocks per split; the best of those is the oracle. All are captured
into CUDA graphs of 32 layers with pages of their own, the first three thrice each, and replayed in turns. The timed
region is a replay; the metadata is made outside of it except in the first case.

Before it, outside of it, L2 is emptied by reading, the same graph is replayed over other pages, and the page tables are
switched. So the KV comes from memory, as in serving, while the graph itself is near: after a flush alone every kernel
of a graph waits for its parameters and code first, which a layer of two kernels pays twice and one of one pays once.
With --invariant they are measured with batch_invariant=True, too, and with one split for every sequence, which engines
ask for where bits must not depend on the batch.
With --among-weights every layer follows a matrix times a vector, 50 MB of weights, whose time is subtracted: what a
layer adds to a decode step.

What the metadata launch takes by either policy comes last: a call as a node of a CUDA graph of 20.
"""

from __future__ import annotations

import argparse
import csv
import math
import pathlib
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import fa3_metadata
import numpy as np
import torch
from fa3_metadata.api import plan_call
from fa3_metadata.installed import load_forward
from fa3_metadata.tools.timing import Captured, gpu_facts, graph_sampler, interleaved, middle, summary
from fa3_metadata.triton_kernels.builds import FA3Rules
from fa3_metadata.triton_kernels.card import peak_gb_s
from fa3_metadata.triton_kernels.invariance import VarianceError
from fa3_metadata.triton_kernels.plan import make_plan
from fa3_metadata.triton_kernels.problem import Problem
from fa3_metadata.triton_kernels.reference import Lengths, blocks_read, metadata_of_splits, sequence_blocks
from numpy.typing import NDArray

from .decode_step import why_not
from .workloads import RANDOM_SUITE, SEEN_SUITE, SUITE, Workload, sizes_to_try

PAGE, LAYERS = 64, 32
POOL_BYTES = 600 << 20  # of KV between two readings of the same: well over L2
WEIGHTS = (8, 8192, 3072)  # matrices of 50 MB
PARTIAL_BYTES = 1 << 30  # the oracle's partial outputs are kept below
LAUNCHED = (1, 32, 64, 128, 192, 256, 512, 992, 1024, 8192)  # sequences
COMPARED = ("none", "fa3", "balanced")
INVARIANT, ONE_SPLIT = "invariant", "one split"
SUITES = {"named": SUITE, "random": RANDOM_SUITE, "seen": SEEN_SUITE}
TOLERANCE = {"bfloat16": 0.02, "float8_e4m3fn": 0.05}  # relative, of the norm


@dataclass
class Result:
    workload: Workload
    times: Captured  # us a layer; "none", "fa3", "balanced" or key blocks per split
    most_splits: dict[str, int]  # of any sequence, by policy
    num_splits: dict[str, int]
    floor: float  # us to read the KV once at the memory's peak bandwidth; NaN: not known

    def median(self, variant: str) -> float:
        return middle(self.times[variant])

    @property
    def is_swept(self) -> bool:
        return any(name.isdigit() for name in self.times)

    @property
    def oracle(self) -> str:
        return min((name for name in self.times if name.isdigit()), key=self.median)

    def ratio(self, variant: str) -> float:
        """How much faster "balanced" is."""
        return self.median(variant) / self.median("balanced")


class Layers:
    """The KV caches, page tables and queries of a workload's layers: two sets of pages, one of them in use."""

    def __init__(self, w: Workload, sm_margin: int = 0) -> None:
        dtype, page_counts = getattr(torch, w.dtype), [max(1, -(-n // PAGE)) for n in w.lengths]
        headdim_v, pages = w.headdim_v or w.headdim, sum(page_counts)
        self.kv_bytes = pages * PAGE * w.num_heads_k * (w.headdim + headdim_v) * dtype.itemsize
        regions = max(2, min(2 * LAYERS, math.ceil(POOL_BYTES / self.kv_bytes)))

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(dtype)

        order = torch.randperm(pages * regions, device="cuda").to(torch.int32).view(regions, pages)
        index = np.zeros((len(w.lengths), max(page_counts)), np.int64)
        for row, end, count in zip(index, np.cumsum(page_counts), page_counts, strict=True):
            row[:count] = np.arange(end - count, end)
        place = torch.from_numpy(index).cuda()
        every = torch.stack([order[layer % regions][place] for layer in range(2 * LAYERS)])
        self._sets = every.view(2, LAYERS, *place.shape)
        self.tables = self._sets[0].clone()
        self.lengths = torch.tensor(w.lengths, dtype=torch.int32, device="cuda")
        window = (-1, -1) if w.window is None else (w.window, 0)
        self.call: dict[str, Any] = {
            "q": random(len(w.lengths), w.seqlen_q, w.num_heads, w.headdim),
            "k_cache": random(pages * regions, PAGE, w.num_heads_k, w.headdim),
            "v_cache": random(pages * regions, PAGE, w.num_heads_k, headdim_v),
            "cache_seqlens": self.lengths, "causal": True, "window_size": window, "sm_margin": sm_margin,
        }  # fmt: skip
        if w.is_mla:
            self.call["qv"] = random(len(w.lengths), w.seqlen_q, w.num_heads, headdim_v)
        self.problem: dict[str, Any] = {
            "batch_size": len(w.lengths), "max_seqlen_q": w.seqlen_q, "max_seqlen_k": max(page_counts) * PAGE,
            "num_heads": w.num_heads, "num_heads_k": w.num_heads_k, "headdim": w.headdim, "headdim_v": headdim_v,
            "cache_seqlens": self.lengths, "qkv_dtype": dtype, "page_size": PAGE, "causal": True, "window_size": window,
            "sm_margin": sm_margin,
        }  # fmt: skip

    def use(self, pages: int) -> None:
        """Switch to a set of pages, 0 or 1, captured graphs included."""
        self.tables.copy_(self._sets[pages])


def policy_variant(layers: Layers, policy: str, **more: Any) -> dict[str, Any]:
    """The forward's arguments that go with our metadata of this policy."""
    asked = layers.problem | {"policy": policy} | more
    metadata = fa3_metadata.get_scheduler_metadata(**asked)
    layout = fa3_metadata.metadata_layout(**asked)
    return {"scheduler_metadata": metadata, "num_splits": layout.num_splits, "pack_gqa": layout.pack_gqa}


def invariant_variants(layers: Layers) -> dict[str, dict[str, Any]]:
    """Two ways to make a sequence's bits its own. Ours is left out where it is refused."""
    found = {ONE_SPLIT: policy_variant(layers, "fa3", num_splits=1)}
    with suppress(VarianceError):  # a window over the whole page table
        found[INVARIANT] = policy_variant(layers, "balanced", batch_invariant=True)
    return found


def uniform_variants(layers: Layers, w: Workload) -> dict[str, dict[str, Any]]:
    """The same for every number of key blocks per split worth trying."""
    _, problem, rules, _ = plan_call(layers.problem)
    plan = make_plan(replace(problem, num_splits=2), rules)
    lengths = Lengths(np.array(w.lengths, np.int32))
    _, num_m_blocks, _ = sequence_blocks(problem, plan, lengths)
    blocks = blocks_read(problem, plan, lengths)
    row_bytes = len(w.lengths) * w.seqlen_q * w.num_heads * (problem.value_headdim + 1) * 4
    found: dict[str, dict[str, Any]] = {}
    seen = set()
    for size in sizes_to_try(int(blocks.max()), plan.num_heads * int((num_m_blocks * blocks).sum()) / plan.num_sms):
        splits = np.maximum(-(-blocks // size), 1)
        splits = np.maximum(-(-blocks // np.maximum(-(-blocks // splits), 1)), 1).astype(np.int32)
        most = int(splits.max())
        if most > 128 or most * row_bytes > PARTIAL_BYTES or splits.tobytes() in seen:
            continue
        seen.add(splits.tobytes())
        bound = 1 if most == 1 else 1 << max(5, (most - 1).bit_length())
        found[str(size)] = variant_of_splits(problem, rules, lengths, splits, bound)
    return found


def variant_of_splits(
    problem: Problem, rules: FA3Rules, lengths: Lengths, splits: NDArray[np.int32], bound: int
) -> dict[str, Any]:
    """The forward's arguments for these splits of each sequence, with `bound` as its num_splits."""
    plan = make_plan(replace(problem, num_splits=bound), rules)
    metadata = metadata_of_splits(plan, *sequence_blocks(problem, plan, lengths), splits)
    return {"scheduler_metadata": torch.from_numpy(metadata).cuda(), "num_splits": bound, "pack_gqa": plan.pack_gqa}


def measure(
    w: Workload, forward: Callable[..., torch.Tensor], rounds: int, sweep: bool, among_weights: bool = False,
    sm_margin: int = 0, invariant: bool = False,
) -> Result:  # fmt: skip
    """Times of every variant. Raises `RuntimeError` where a variant's output is wrong."""
    layers = Layers(w, sm_margin)
    variants: dict[str, dict[str, Any]] = {"none": {}}
    variants |= {policy: policy_variant(layers, policy) for policy in ("fa3", "balanced")}
    variants |= invariant_variants(layers) if invariant else {}
    variants |= uniform_variants(layers, w) if sweep else {}
    expected = None
    for name, more in variants.items():
        output = forward(**layers.call, page_table=layers.tables[0], **more).float()
        expected = output if expected is None else expected
        error = ((output - expected).norm() / expected.norm()).item()
        if not error < TOLERANCE[w.dtype]:
            raise RuntimeError(f"{w.name}: the output with schedule {name} is off by {error:.3g}")

    vector = torch.ones(1, WEIGHTS[1], dtype=torch.bfloat16, device="cuda")
    weights = torch.ones(WEIGHTS, dtype=torch.bfloat16, device="cuda") if among_weights else ()
    between: list[Callable[[], object]] = [partial(torch.mm, vector, one) for one in weights] or [lambda: None]
    between[0]()
    pool = torch.cuda.graph_pool_handle()

    def captured(attend: Callable[..., object]) -> torch.cuda.CUDAGraph:
        return capture(layers, attend, between, pool)

    names = (*variants, *COMPARED, *COMPARED)
    graphs = [(name, captured(partial(forward, **layers.call, **variants[name]))) for name in names]
    graphs += [("weights", captured(lambda page_table: None))] if among_weights else []
    times = replayed(graphs, layers, rounds)
    if among_weights:
        base = middle(times.pop("weights"))
        times = {name: [[time - base for time in one] for one in captures] for name, captures in times.items()}
    bounds = {name: more.get("num_splits", 0) for name, more in variants.items()}
    peak = peak_gb_s(torch.cuda.get_device_name()) or math.nan
    return Result(w, times, _most_splits(layers), bounds, layers.kv_bytes / peak / 1e3)


def capture(
    layers: Layers, attend: Callable[..., object], between: Sequence[Callable[[], object]] = (lambda: None,),
    pool: Any = None,
) -> torch.cuda.CUDAGraph:  # fmt: skip
    """A graph of all layers; `attend` takes a page_table. What is done before each of them, in turns."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for i, table in enumerate(layers.tables):
            between[i % len(between)]()
            attend(page_table=table)
    return graph


def replayed(graphs: list[tuple[str, torch.cuda.CUDAGraph]], layers: Layers, rounds: int) -> Captured:
    """Microseconds a layer of every graph, by its name, in turns."""
    more_than_l2 = torch.zeros(64 << 20, dtype=torch.int32, device="cuda")
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in graphs]
    for _ in range(rounds):
        for (_, graph), timed in zip(graphs, events, strict=True):
            layers.use(1)
            more_than_l2.amax()
            graph.replay()
            layers.use(0)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            timed.append((start, end))
        torch.cuda.synchronize()
    times: Captured = {}
    for (name, _), timed in zip(graphs, events, strict=True):
        times.setdefault(name, []).append([start.elapsed_time(end) * 1000 / LAYERS for start, end in timed])
    return times


def _most_splits(layers: Layers) -> dict[str, int]:
    """The splits of the sequence that has the most, by policy."""
    found = {}
    for policy in ("fa3", "balanced"):
        layout = fa3_metadata.metadata_layout(**layers.problem, policy=policy)
        rows = fa3_metadata.unpack_metadata(
            fa3_metadata.get_scheduler_metadata(**layers.problem, policy=policy), layout
        )
        found[policy] = int(rows["num_splits_dynamic"].max()) if "num_splits_dynamic" in rows else 1
    return found


def report(results: list[Result]) -> None:
    """A row a workload, then means, the worst case and how often the oracle is near."""
    wide = max(46, *(len(r.workload.name) + 2 for r in results))
    print(f"{'us a layer':{wide}s}{'none':>8s}{'fa3':>8s}{'ours':>8s}{'oracle':>8s}{'fa3/':>8s}{'none/':>7s}"
          f"{'ours/':>7s}{'splits':>9s}{'floor':>8s}")  # fmt: skip
    print(f"{'':{wide}s}{'':32s}{'ours':>8s}{'ours':>7s}{'oracle':>7s}{'fa3,ours':>9s}")
    for r in results:
        none, fa3, ours = map(r.median, ("none", "fa3", "balanced"))
        oracle = r.median(r.oracle) if r.is_swept else math.nan
        name = ("*" if r.workload.held_out else " ") + r.workload.name
        splits = f"{r.most_splits['fa3']},{r.most_splits['balanced']}"
        print(f"{name:{wide}s}{none:8.2f}{fa3:8.2f}{ours:8.2f}{oracle:8.2f}"
              f"{fa3 / ours:8.3f}{none / ours:7.3f}{ours / oracle:7.3f}{splits:>9s}{r.floor:8.2f}")  # fmt: skip
    print("* held out: never used to fit the constants. floor: reading the KV once at the memory's peak bandwidth")
    few = [r for r in results if len(r.workload.lengths) <= 992]
    for name, some in (("up to 992 sequences", few), ("of these held out", [r for r in few if r.workload.held_out]),
                       ("over 992 sequences", [r for r in results if r not in few])):  # fmt: skip
        if some:
            means = [statistics.geometric_mean(r.ratio(variant) for r in some) for variant in ("fa3", "none")]
            print(f"{name}: geometric mean {means[0]:.3f} x over FA3's metadata, {means[1]:.3f} x over FA3 without")
    worst = min(results, key=lambda r: r.ratio("fa3"))
    print(f"worst against FA3's metadata: {worst.ratio('fa3'):.3f} x, {worst.workload.name}")
    swept = [r for r in results if r.is_swept]
    if few and swept:
        means = [statistics.geometric_mean(r.median(v) / r.median(r.oracle) for r in few) for v in ("fa3", "none")]
        print(f"the oracle, up to 992: geometric mean {means[0]:.3f} x over FA3's metadata, {means[1]:.3f} x without")
        near = sum(r.median("balanced") <= 1.03 * r.median(r.oracle) for r in swept)
        ours = statistics.geometric_mean(r.median("balanced") / r.median(r.oracle) for r in few)
        print(f"balanced takes {ours:.4f} x the oracle's time, up to 992; within 3 % of it: {near} of {len(swept)}")


def report_price(results: list[Result]) -> None:
    """What batch invariance costs: a row a workload, then means, against one split for all and FA3's metadata."""
    some = [r for r in results if INVARIANT in r.times]
    print(f"{'batch invariance, us a layer':46s}{'ours':>9s}{'one split':>11s}{'fa3':>9s}{'balanced':>10s}")
    for r in some:
        ours, one, fa3, free = (r.median(name) for name in (INVARIANT, ONE_SPLIT, "fa3", "balanced"))
        print(f"{r.workload.name:46s}{ours:9.2f}{one:11.2f}{fa3:9.2f}{free:10.2f}")
    for name in (ONE_SPLIT, "fa3", "balanced"):
        ratios = [r.median(INVARIANT) / r.median(name) for r in some]
        print(f"it takes {statistics.geometric_mean(ratios):.3f} x the time of {name}, from {min(ratios):.3f} x to "
              f"{max(ratios):.3f} x")  # fmt: skip


def launch_times(device: str = "cuda") -> dict[int, dict[str, float]]:
    """Microseconds of a metadata launch by policy, for decode over a paged cache of 8/1 heads, by batch size."""
    found = {}
    for batch in LAUNCHED:
        lengths = torch.randint(1, 65537, (batch,), dtype=torch.int32, device=device)
        samplers = {}
        for policy in ("fa3", "balanced"):
            plan = fa3_metadata.MetadataPlan(
                max_batch_size=batch, max_seqlen_k=65536, num_heads=8, num_heads_k=1, headdim=128, page_size=PAGE,
                causal=True, device=device, policy=policy,
            )  # fmt: skip
            samplers[policy] = graph_sampler(partial(plan.update, lengths))
        found[batch] = {policy: summary(times)[1] for policy, times in interleaved(samplers).items()}
    return found


def results_file(folder: pathlib.Path, gpu: str, num_sms: int, sm_margin: int, suite: str) -> pathlib.Path:
    """Of a card, a part of its SMs and a suite: those of several lie side by side."""
    name = "-".join(re.findall(r"[a-z0-9]+", gpu.lower().removeprefix("nvidia ")))
    name += f"-{num_sms - sm_margin}-sms" if sm_margin else ""
    return folder / f"schedules-{name}{'' if suite == 'named' else '-' + suite}.csv"


def write_csv(results: list[Result], path: pathlib.Path, gpu: str, num_sms: int) -> None:
    """A row for each time of a workload, with the card and the SMs that it was measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([
            "workload", "held_out", "schedule", "num_splits", "p20_us", "p50_us", "p80_us", "replays", "gpu", "num_sms"
        ])  # fmt: skip
        for r in results:
            for name, captures in r.times.items():
                times = [time for capture in captures for time in capture]
                p20, p50, p80 = summary(times)
                held, bound = int(r.workload.held_out), r.num_splits[name]
                rows.writerow([
                    r.workload.name, held, name, bound, f"{p20:.3f}", f"{p50:.3f}", f"{p80:.3f}", len(times), gpu,
                    num_sms,
                ])  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench schedules", description="FA3's schedules, ours, the best")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--rounds", type=int, default=8, help="timed replays of each graph")
    parser.add_argument("--no-sweep", action="store_true", help="leave out the oracle")
    parser.add_argument("--among-weights", action="store_true", help="each layer after a matrix times a vector")
    parser.add_argument("--suite", choices=SUITES, default="named", help="which workloads (default: named)")
    parser.add_argument("--invariant", action="store_true", help="measure batch-invariant schedules, and one split")
    parser.add_argument("--sm-margin", type=int, default=0, help="SMs that the forward leaves alone: a smaller card")
    parser.add_argument("--csv", type=pathlib.Path, help="write all times there; in a folder, to a file of this card's")
    options = parser.parse_args(argv)
    chosen = [w for w in SUITES[options.suite] if options.only in w.name]
    if not chosen:
        print(f"schedules: --only must be part of a workload's name, got {options.only!r}", file=sys.stderr)
        return 2
    build = fa3_metadata.detect_build().build
    if missing := why_not(build):
        print(f"schedules are judged on a Hopper GPU with sglang-kernel: {missing}", file=sys.stderr)
        return 2
    forward, results = load_forward(build), []
    gpu, num_sms = torch.cuda.get_device_name(), torch.cuda.get_device_properties("cuda").multi_processor_count
    if not 0 <= options.sm_margin < num_sms:
        print(f"schedules: --sm-margin must be from 0 to {num_sms - 1}, got {options.sm_margin}", file=sys.stderr)
        return 2
    print(gpu_facts(), flush=True)
    print(f"{options.suite} suite on {num_sms - options.sm_margin} of {num_sms} SMs; the memory's peak bandwidth is "
          f"{peak_gb_s(gpu) or math.nan:.0f} GB/s", flush=True)  # fmt: skip
    for w in chosen:
        more = options.rounds, not options.no_sweep, options.among_weights, options.sm_margin, options.invariant
        results.append(measure(w, forward, *more))
        torch.cuda.empty_cache()
    report(results)
    if any(INVARIANT in r.times for r in results):
        report_price(results)
    if not options.only:
        for batch, times in launch_times().items():
            fa3, ours = times["fa3"], times["balanced"]
            print(f"launch {batch} fa3 {fa3:.2f} balanced {ours:.2f} ratio {ours / fa3:.2f}")
    if options.csv:
        path = options.csv
        if path.is_dir() or not path.suffix:
            path = results_file(path, gpu, num_sms, options.sm_margin, options.suite)
        write_csv(results, path, gpu, num_sms - options.sm_margin)
        print(f"written to {path}")
    return 0
