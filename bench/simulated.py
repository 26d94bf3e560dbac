"""How near `integration/tools/simulator.py` comes to what was measured: every schedule of recorded sweeps, simulated.

    python -m bench simulated                     # the sweeps kept here, of each card
    python -m bench simulated schedules.csv --gpu h100
    python -m bench simulated --choices           # what policy "balanced" chooses beside what is simulated to be best
    python -m bench simulated --bounds            # a layer by the bound on splits that vLLM fixes for CUDA graphs

The sweeps are those of `python -m bench schedules --csv`: FA3's schedule, and every number of key blocks a split worth
trying, for each workload of the suite. Said for each card: how the ranks of predicted and measured times go together
(Spearman), over all schedules and within a workload, and by how much a prediction is off.

The launch searches a few sizes by a closed form of the law that the simulator plays tile by tile. `--choices` says what
that costs, in simulated time: over the suite and the random one, on each card, and on parts of its SMs.
"""

from __future__ import annotations

import argparse
import csv
import pathlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from fa3_metadata.api import plan_call
from fa3_metadata.tools.cards import find_card
from fa3_metadata.tools.simulator import Schedule, reference_schedule, schedule_of, simulate
from fa3_metadata.triton_kernels.builds import FA3Rules, rules_for
from fa3_metadata.triton_kernels.plan import LaunchPlan, make_plan
from fa3_metadata.triton_kernels.problem import Problem
from fa3_metadata.triton_kernels.reference import Lengths, blocks_read, metadata_of_splits, sequence_blocks
from numpy.typing import NDArray

from .workloads import RANDOM_SUITE, SUITE, Workload, sizes_to_try

PAGE, BUILD, VLLM = 64, "sglang-kernel-0.4.2", "vllm-0.33.0"
BOUNDS = (16, 32, 48, 64, 128)
ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORDED = {  # by card
    "h200": ROOT / "bench/results/2026-11-24-h200/schedules.csv",
    "h100": ROOT / "tests/data/schedules-h100.csv",
}


@dataclass(frozen=True)
class Point:
    """One schedule of one workload. Times in us a layer."""

    workload: str
    schedule: str  # "fa3", or key blocks a split
    measured: float
    predicted: float
    held_out: bool
    sequences: int

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


@lru_cache(maxsize=256)
def _problem_of(name: str, gpu: str) -> tuple[Problem, FA3Rules, Lengths]:
    w = next((one for one in SUITE if one.name == name), None)
    if w is None:
        raise ValueError(f"there is no workload {name!r}")
    return _problem(w, gpu)


def _problem(w: Workload, gpu: str) -> tuple[Problem, FA3Rules, Lengths]:
    call = {
        "batch_size": len(w.lengths), "max_seqlen_q": w.seqlen_q,
        "max_seqlen_k": max(max(1, -(-n // PAGE)) for n in w.lengths) * PAGE, "num_heads": w.num_heads,
        "num_heads_k": w.num_heads_k, "headdim": w.headdim, "headdim_v": w.headdim_v or w.headdim, "page_size": PAGE,
        "causal": True, "qkv_dtype": getattr(torch, w.dtype), "build": BUILD,
        "window_size": (-1, -1) if w.window is None else (w.window, 0),
    }  # fmt: skip
    _, problem, rules, _ = plan_call(call)
    return replace(problem, gpu=find_card(gpu).name), rules, Lengths(np.array(w.lengths, np.int32))


def points(path: pathlib.Path, gpu: str) -> Iterator[Point]:
    """Every schedule recorded in `path`, simulated for `gpu`."""
    held_out = {w.name for w in SUITE if w.held_out}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            name, kind, bound = row["workload"], row["schedule"], int(row["num_splits"])
            if kind != "fa3" and not kind.isdigit():
                continue
            problem, rules, lengths = _problem_of(name, gpu)
            plan = make_plan(replace(problem, num_splits=bound), rules)
            schedule = reference_schedule(problem, plan, lengths)
            if kind.isdigit():
                schedule = _of_size(problem, plan, lengths, int(kind))
            found = simulate(problem, plan, lengths, schedule).time_us
            yield Point(name, kind, float(row["p50_us"]), found, name in held_out, problem.batch_size)


def _of_size(problem: Problem, plan: LaunchPlan, lengths: Lengths, size: int) -> Schedule:
    """No split of more than `size` key blocks, as few as that takes: what `bench schedules` swept."""
    blocks = blocks_read(problem, plan, lengths)
    splits = np.maximum(-(-blocks // size), 1)
    splits = np.maximum(-(-blocks // np.maximum(-(-blocks // splits), 1)), 1).astype(np.int32)
    return schedule_of(plan, metadata_of_splits(plan, *sequence_blocks(problem, plan, lengths), splits))


def rank_correlation(found: list[Point]) -> float:
    """Spearman's, of predicted and measured times."""
    ranks = [np.argsort(np.argsort(values)) for values in ([p.predicted for p in found], [p.measured for p in found])]
    return float(np.corrcoef(*ranks)[0, 1])


def report(gpu: str, found: list[Point]) -> list[str]:
    """What is said of a card."""
    lines = []
    groups = {
        "all schedules": found,
        "of held-out workloads": [p for p in found if p.held_out],
        "FA3's own": [p for p in found if p.schedule == "fa3"],
        "up to 992 sequences": [p for p in found if p.sequences <= 992],
    }
    for name, some in groups.items():
        errors = np.array([p.error for p in some])
        middle, ninety = np.percentile(np.abs(errors), [50, 90])
        worst = max(some, key=lambda p: abs(p.error))
        lines.append(
            f"{gpu}  {name:22s} {len(some):4d}   rank correlation {rank_correlation(some):.4f}   error: median "
            f"{middle:.1%}, nine of ten within {ninety:.1%}, mean {errors.mean():+.1%}, worst {worst.error:+.1%} "
            f"({worst.workload}, {worst.schedule})"
        )
    swept = [[p for p in found if p.workload == w.name] for w in SUITE]
    each = [rank_correlation(some) for some in swept if len(some) >= 5]
    best = [[p for p in some if p.schedule.isdigit()] for some in swept if some]
    lost = np.array([min(some, key=lambda p: p.predicted).measured / min(p.measured for p in some) for some in best])
    lines.append(
        f"{gpu}  within a workload: rank correlation, median {np.median(each):.3f} of {len(each)}; the size predicted "
        f"to be fastest costs {np.exp(np.log(lost).mean()) - 1:.1%} over the fastest (geometric mean), at most "
        f"{lost.max() - 1:.1%}"
    )
    return lines


def choice(w: Workload, gpu: str, num_sms: int) -> tuple[float, float, float]:
    """Simulated us of FA3's schedule, of that which policy "balanced" chooses, and of the best uniform size."""
    asked, rules, lengths = _problem(w, gpu)
    asked = replace(asked, num_sms=num_sms)
    fa3 = simulate(asked, make_plan(asked, rules), lengths).time_us
    problem = replace(asked, policy="balanced")
    plan = make_plan(problem, rules)
    ours = simulate(problem, plan, lengths).time_us
    blocks = blocks_read(problem, plan, lengths)
    _, num_m_blocks, _ = sequence_blocks(problem, plan, lengths)
    load = plan.num_heads * int((num_m_blocks * blocks).sum()) / num_sms
    fits = [size for size in sizes_to_try(int(blocks.max()), load) if -(-int(blocks.max()) // size) <= plan.num_splits]
    times = [simulate(problem, plan, lengths, _of_size(problem, plan, lengths, size)).time_us for size in fits]
    return fa3, ours, min([*times, ours])


def choices(gpu: str, num_sms: int) -> list[str]:
    """What the closed form loses to the law played out, in batches of up to 992 sequences."""
    lines = []
    for name, suite in {"the suite": SUITE, "the random suite": RANDOM_SUITE}.items():
        some = [w for w in suite if len(w.lengths) <= 992]
        fa3, ours, best = np.array([choice(w, gpu, num_sms) for w in some]).T
        worst = int((ours / best).argmax())
        lines.append(
            f"{gpu} {num_sms:4d} SMs  {name:16s} {len(some):3d}   {_mean(fa3 / ours):.3f} x FA3's metadata, least "
            f"{(fa3 / ours).min():.3f}; {_mean(ours / best) - 1:.2%} over the best size, within 3 % of it "
            f"{(ours <= 1.03 * best).sum()}, worst {ours[worst] / best[worst] - 1:+.1%} ({some[worst].name})"
        )
    return lines


def bounds(gpu: str) -> list[str]:
    """Simulated us of a layer by FA3's schedule, by the bound that vLLM fixes for full CUDA graphs."""
    lines = []
    for num_heads, num_heads_k in ((8, 1), (32, 8)):
        for longest in (8, 16, 32, 64, 128):
            w = Workload("", (longest * 1024, *(2048,) * 7), num_heads, num_heads_k)
            problem, _, lengths = _problem(w, gpu)
            rules, times = rules_for(VLLM), {}
            for bound in BOUNDS:
                asked = replace(problem, num_splits=bound)
                times[bound] = simulate(asked, make_plan(asked, rules), lengths).time_us
            said = "  ".join(f"{bound}: {time:6.1f}" for bound, time in times.items())
            lines.append(f"{gpu}  {num_heads}/{num_heads_k} heads, one of {longest:3d}k beside seven of 2k   {said}")
    return lines


def _mean(ratios: NDArray[np.float64]) -> float:
    """Geometric."""
    return float(np.exp(np.log(ratios).mean()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench simulated", description="the simulator against times")
    parser.add_argument("csv", type=pathlib.Path, nargs="?", help="a sweep of `schedules --csv`; default: those kept")
    parser.add_argument("--gpu", help="the card that it was measured on, such as h100")
    parser.add_argument("--choices", action="store_true", help='what policy "balanced" chooses, beside the best')
    parser.add_argument("--bounds", action="store_true", help="a layer by the bound on splits that vLLM fixes")
    options = parser.parse_args(argv)
    if options.bounds:
        for gpu in RECORDED:
            print(*bounds(gpu), sep="\n", flush=True)
        return 0
    if options.choices:
        for gpu, num_sms in (("h100", 132), ("h100", 114), ("h100", 78), ("h200", 132), ("h20", 78)):
            print(*choices(gpu, num_sms), sep="\n", flush=True)
        return 0
    if (options.csv is None) != (options.gpu is None):
        parser.error("give a sweep and --gpu, or neither")
    try:
        chosen = {options.gpu: options.csv} if options.csv else RECORDED
        for gpu, path in chosen.items():
            print(*report(gpu, list(points(path, gpu))), sep="\n", flush=True)
    except (OSError, ValueError, KeyError) as error:
        print(f"simulated: {error}", file=sys.stderr)
        return 2
    return 0
