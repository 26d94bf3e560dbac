"""`fa3-metadata explain --trace FILE`: what an engine's steps asked, where their time goes, what would be faster.

Times are predicted by simulator.py, a layer of each kind once a step: how many layers of a kind a model has is not in
a recording. A step is over when a kind of layer comes again.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from .. import trace
from ..triton_kernels.builds import FA3Rules, unsupported_reason
from ..triton_kernels.plan import make_plan
from ..triton_kernels.problem import Problem
from ..triton_kernels.reference import Lengths, sequence_lengths
from .cards import find_card
from .diagnosis import Case, diagnose
from .page import Slide, that_fit, write_page
from .pictures import Panel, card_name
from .plot import draw_steps
from .simulator import Simulation, simulate

MOST_SIMULATED = 400  # steps, spread evenly over the recording
_WORST = 10
_SIZES = ("batch_size", "max_seqlen_k", "num_splits", "total_q")  # in which layers of a kind differ from step to step


@dataclass(frozen=True, eq=False)
class Layer:
    """One kind of layer in one step, by the policy that it had and by the other one."""

    problem: Problem
    rules: FA3Rules
    lengths: Lengths

    @cached_property
    def now(self) -> Simulation:
        return simulate(self.problem, make_plan(self.problem, self.rules), self.lengths)

    @cached_property
    def other(self) -> Simulation | None:
        """None: this build has no other policy for the call."""
        problem = replace(self.problem, policy="fa3" if self.problem.policy == "balanced" else "balanced",
                          batch_invariant=False)  # fmt: skip
        if unsupported_reason(self.rules, problem):
            return None
        return simulate(problem, make_plan(problem, self.rules), self.lengths)

    def by(self, policy: str) -> Simulation:
        """The simulation by a policy, or as it is where there is none."""
        return self.now if self.problem.policy == policy or self.other is None else self.other

    @property
    def keys(self) -> list[int]:
        return [int(one) for one in sequence_lengths(self.problem, self.lengths)[1]]


@dataclass(frozen=True, eq=False)
class EngineStep:
    """All kinds of layers of a step."""

    number: int
    seconds: float
    layers: dict[str, Layer]  # by kind

    @property
    def sequences(self) -> int:
        return max(one.problem.batch_size for one in self.layers.values())

    @property
    def keys(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.array(next(iter(self.layers.values())).keys, np.int64)

    def time_us(self, policy: str | None = None) -> float:
        """A layer of each kind; None: as it was."""
        return sum((one.now if policy is None else one.by(policy)).time_us for one in self.layers.values())

    @property
    def lost_us(self) -> float:
        """What the better policy would save."""
        return self.time_us() - min(self.time_us(policy) for policy in ("fa3", "balanced"))

    @property
    def waited(self) -> float:
        """The part of the SMs' time that they wait for the last tiles."""
        return 1 - float(np.mean([one.now.busy_share for one in self.layers.values()]))


def kind_of(problem: Problem) -> str:
    """A kind of layer in words: all that does not change from step to step."""
    p = problem
    parts = [f"{p.num_heads}/{p.num_heads_k} heads, head dim {p.headdim}" +
             (f"/{p.value_headdim}" if p.value_headdim != p.headdim else ""), p.qkv_dtype]  # fmt: skip
    parts.append("not paged" if p.page_size is None else f"pages of {p.page_size}")
    parts.append("causal" if p.causal else "no mask")
    if p.window_size != (-1, -1):
        parts.append(f"window {p.window_size[0]},{p.window_size[1]}")
    if p.attention_chunk:
        parts.append(f"chunks of {p.attention_chunk}")
    if p.max_seqlen_q != 1:
        parts.append(f"up to {p.max_seqlen_q} queries")
    return ", ".join(parts) + f"; policy {p.policy}"


def steps_of(recorded: Iterable[trace.Step], gpu: str | None = None) -> list[EngineStep]:
    """The steps of a recording; `gpu`: as if it had been made on another card."""
    card = find_card(gpu) if gpu else None
    found: list[EngineStep] = []
    layers: dict[str, Layer] = {}
    seconds = 0.0
    for one in recorded:
        problem = one.problem
        if card is not None:
            problem = replace(problem, gpu=card.name, arch=card.arch, num_sms=card.num_sms)
        kind = kind_of(problem)
        if kind in layers:
            found.append(EngineStep(len(found), seconds, layers))
            layers = {}
        if not layers:
            seconds = one.seconds
        layers[kind] = Layer(problem, one.rules, one.lengths)
    if layers:
        found.append(EngineStep(len(found), seconds, layers))
    return [step for step in found if step.sequences and step.keys.any()]  # a warm-up has lengths of zero


def some_of(steps: Sequence[EngineStep], most: int = MOST_SIMULATED) -> list[EngineStep]:
    """At most so many, evenly spread."""
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int))
    return [steps[i] for i in chosen.tolist()]


def summary(steps: Sequence[EngineStep], simulated: Sequence[EngineStep]) -> dict[str, Any]:
    """What `text_of` says, in JSON's types."""
    kinds: dict[str, dict[str, Any]] = {}
    for step in steps:
        for kind, layer in step.layers.items():
            one = kinds.setdefault(kind, {"steps": 0, "sequences": [], "num_splits": set()})
            one["steps"] += 1
            one["sequences"].append(layer.problem.batch_size)
            one["num_splits"].add(layer.problem.num_splits)
    where: dict[str, dict[str, float]] = {}
    for kind in kinds:
        played = [step.layers[kind].now for step in simulated if kind in step.layers]
        if not played:
            continue
        time = float(np.mean([s.time_us for s in played]))
        waiting = float(np.mean([(1 - s.busy_share) * (s.attention_us - s.costs.launch) for s in played]))
        combine = float(np.mean([s.combine_us for s in played]))
        launch = played[0].costs.launch
        where[kind] = {
            "time_us": time, "launch_us": launch, "combine_us": combine, "waiting_us": waiting,
            "working_us": time - launch - combine - waiting,
        }  # fmt: skip
    policies = {policy: float(np.mean([step.time_us(policy) for step in simulated])) for policy in ("fa3", "balanced")}
    worst = worst_of(simulated)
    return {
        "steps": len(steps), "simulated": len(simulated), "seconds": steps[-1].seconds - steps[0].seconds,
        "kinds": [
            {"kind": kind, "steps": one["steps"], "sequences": _quartiles(one["sequences"]),
             "num_splits": sorted(one["num_splits"]), "a_layer": where.get(kind)}
            for kind, one in kinds.items()
        ],
        "as_it_was_us": float(np.mean([step.time_us() for step in simulated])), "policies_us": policies,
        "worst": [
            {"step": step.number, "seconds": step.seconds, "sequences": step.sequences, "longest": int(step.keys.max()),
             "mean": float(step.keys.mean()), "time_us": step.time_us(), "saves_us": step.lost_us,
             "sms_wait": step.waited}
            for step in worst
        ],
    }  # fmt: skip


def worst_of(steps: Sequence[EngineStep]) -> list[EngineStep]:
    """The steps that could save most, the worst first; of steps that lie side by side one alone: they are alike."""
    apart = len(steps) // (4 * _WORST)
    found: list[int] = []
    for i in sorted(range(len(steps)), key=lambda i: (-steps[i].lost_us, -steps[i].waited)):
        if len(found) < _WORST and all(abs(i - other) > apart for other in found):
            found.append(i)
    return [steps[i] for i in found]


def _quartiles(values: Sequence[int]) -> list[int]:
    return [int(one) for one in np.percentile(values, [0, 50, 100])]


def text_of(path: pathlib.Path, said: dict[str, Any], steps: Sequence[EngineStep], worst: Sequence[str]) -> list[str]:
    """The summary for a terminal."""
    card = card_name(next(iter(steps[0].layers.values())).now)
    lines = [
        f"trace       {path}: {said['steps']:,} steps in {said['seconds']:.1f} s; {said['simulated']:,} of them "
        f"simulated on {card}"
    ]
    for i, one in enumerate(said["kinds"]):
        low, middle, high = one["sequences"]
        bounds = ", ".join(str(bound) if bound else "FA3's own" for bound in one["num_splits"])
        lines.append(f"kind {i + 1:<7}{one['kind']}; {low} to {high} sequences, median {middle}; num_splits {bounds}")
        if a := one["a_layer"]:
            lines.append(
                f"            {a['time_us']:.1f} us a layer: launch {a['launch_us']:.1f}, SMs at work "
                f"{a['working_us']:.1f}, SMs waiting {a['waiting_us']:.1f}, combining {a['combine_us']:.1f}"
            )
    lines.append("lengths     over time: steps, sequences, keys of the longest, mean")
    parts = np.array_split(np.arange(len(steps)), min(8, len(steps)))
    for part in parts:
        some = [steps[i] for i in part.tolist()]
        keys = np.concatenate([step.keys for step in some])
        counts = f"{min(s.sequences for s in some)} to {max(s.sequences for s in some)}"
        lines.append(
            f"            {some[0].number:>6} to {some[-1].number:<6} {counts:>12} {keys.max():>10,} "
            f"{keys.mean():>9,.0f}"
        )
    fa3, balanced, now = said["policies_us"]["fa3"], said["policies_us"]["balanced"], said["as_it_was_us"]
    lines.append(
        f"policies    a layer of each kind, mean of the steps: as it was {now:.1f} us, fa3 {fa3:.1f}, balanced "
        f"{balanced:.1f} ({fa3 / balanced:.3f} x)"
    )
    lines.append("worst       step  sequences   longest      mean  us a layer of each kind  could save  SMs waiting")
    for one in said["worst"]:
        lines.append(
            f"      {one['step']:>10}{one['sequences']:>11}{one['longest']:>10,}{one['mean']:>10,.0f}"
            f"{one['time_us']:>25.1f}{one['saves_us']:>12.1f}{one['sms_wait']:>13.0%}"
        )
    return lines + [f"{'to know' if i == 0 else '':12}{text}" for i, text in enumerate(worst)]


def diagnosis(step: EngineStep) -> list[str]:
    """What there is to know of a step, a line for each kind and finding."""
    found = []
    for i, layer in enumerate(step.layers.values()):
        case = Case(layer.problem, layer.rules, layer.lengths, layer.now.costs, layer.now)
        name = f"kind {i + 1}: " if len(step.layers) > 1 else ""
        # What a larger batch would change is for whoever sets it, not for a step.
        found += [f"{name}{one.text}" for one in diagnose(case) if one.kind not in ("larger batch", "page size")]
    return found


def slides_of(steps: Sequence[EngineStep], keep: int) -> list[Slide]:
    """As many of the steps as fit a page, the one of this number among them."""
    slides = []
    place = 0
    for i, step in enumerate(steps):
        place = i if step.number == keep else place
        panels = [Panel(kind, layer.now) for kind, layer in step.layers.items()]
        said = (
            f"{step.sequences} sequences, the longest of {step.keys.max():,} keys; a layer of each kind "
            f"{step.time_us():.1f} us, by policy balanced {step.time_us('balanced'):.1f} us, predicted on "
            f"{card_name(panels[0].simulation)}"
        )
        keys = [layer.keys for layer in step.layers.values()]
        slides.append(Slide(f"step {step.number}", panels, keys, headline=said))
    chosen = that_fit(slides, place)
    numbers = {step.number: step for step in steps}
    return [replace(one, notes=diagnosis(numbers[int(one.name.split()[1])])) for one in chosen]


def draw(steps: Sequence[EngineStep], worst: int, path: pathlib.Path, title: str) -> None:
    """A page with a slider over the steps (.html), or lines over them."""
    if path.suffix.lower() == ".html":
        write_page(slides_of(steps, worst), path, title)
        return
    numbers = [step.number for step in steps]
    series = {
        "sequences": {"sequences": [float(step.sequences) for step in steps]},
        "keys": {
            "longest": [float(step.keys.max()) for step in steps],
            "mean": [float(step.keys.mean()) for step in steps],
        },
        "us, a layer of each kind": {
            f"policy {policy}": [step.time_us(policy) for step in steps] for policy in ("fa3", "balanced")
        },
        "SMs waiting, %": {"of their time": [100 * step.waited for step in steps]},
    }
    draw_steps(numbers, series, path, title)


def run(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Sum up `options.trace`. Raises `ValueError` or `OSError` for a file that is no recording."""
    if options.cache_seqlens or options.input:
        raise ValueError("--trace brings its own lengths: leave --cache-seqlens and --input out")
    steps = steps_of(trace.read(options.trace), options.gpu)
    if not steps:
        raise ValueError(f"{options.trace} holds no steps")
    simulated = some_of(steps)
    said = summary(steps, simulated)
    worst = next(step for step in simulated if step.number == said["worst"][0]["step"])
    if options.plot:
        draw(simulated, worst.number, options.plot, f"{options.trace.name}: {len(steps):,} steps")
    if options.json:
        say(json.dumps(said))
        return
    notes = [f"step {worst.number}: {text}" for text in diagnosis(worst)]
    for line in text_of(options.trace, said, steps, notes):
        say(line)
    if options.plot:
        say(f"drawn       {options.plot}")
