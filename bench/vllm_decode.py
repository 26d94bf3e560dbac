"""Decode steps of a real vLLM: without metadata, with its own, and with ours, around the same kind of CUDA graph.

    python -m bench vllm-decode                      # two minutes; a Hopper GPU and an importable vLLM
    python -m bench vllm-decode --model windows --case "16 x 2k" --splits 32 --csv vllm.csv

A model with random weights, in a process of its own: the shape of Llama-3.1-8B, of one of eight tensor-parallel ranks
of Llama-3.1-70B without its all-reduces, or of 32 layers of which five of six have a window, as in Gemma-3. Its full
CUDA graphs are captured anew for each variant, twice, the second time in the other order; weights, KV cache, inputs and
the graphs' memory pool are the same for all. While vLLM decodes one batch to its end, they take turns of a few steps.

Timed is `execute_model` as vLLM calls it, up to the end of the graph's replay: what it prepares, the metadata among
that. "step": device time from its begin to that end, with the GPU kept busy until all is queued. "graph": of the replay
alone, likewise. "idle": of the replay alone as it looks with nothing queued before it, so that the host's time to
launch a graph, and the clocks of a GPU that waits for the host, are in it. "host": until `execute_model` returns, the
GPU idle before. Each is the mean of the medians of both captures; what captures of the same variant differ by, at most,
is printed as "apart": no smaller difference between two variants means anything.

`vllm-check` compares the logits; here they are only seen to be finite.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from fa3_metadata.tools.timing import Captured, apart, gpu_facts, middle, spin

from .child import FailedError, answer, answers
from .rows import capture_lines, write_captures
from .vllm_model import Engine, make_model, why_not, windows_of
from .workloads import lognormal, uniform

VARIANTS = ("none", "vllm", "ours", "in place", "balanced")
ATTACHED: dict[str, dict[str, Any]] = {
    "ours": {}, "in place": {"in_place": True}, "balanced": {"in_place": True, "policy": "balanced"},
}  # fmt: skip
METRICS = ("step", "graph", "idle", "host")
CAPTURES = 2  # of each variant
SPLITS = (32, 64)  # flash_attn_max_num_splits_for_cuda_graph; vLLM's default is 32
GRAPHS = (1, 4, 16, 32, 64)
STEPS, ROUNDS = 4, 4  # steps of a turn with the GPU busy, and as many with it idle; turns
CONTEXT = 20480
HEAD_START = 8e-3  # seconds that the host is given to queue a step

_LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": CONTEXT,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "8b": _LLAMA_8B,
    "70b": {  # one rank of eight
        "hidden_size": 8192, "intermediate_size": 3584, "num_hidden_layers": 80, "num_attention_heads": 8,
        "num_key_value_heads": 1, "vocab_size": 16032, "max_position_embeddings": CONTEXT,
    },
    "windows": _LLAMA_8B | {"num_key_value_heads": 16} | windows_of(32, (1023, 1023, 1023, 1023, 1023, None)),
}  # fmt: skip
CASES: dict[str, tuple[int, ...]] = {
    "1 x 1k": uniform(1, 1024),
    "16 x 2k": uniform(16, 2048),
    "32 lognormal(7, 1)": lognormal(32, 7, 1, 51, 16384),
}


# ---- in a model's process --------------------------------------------------------------------------------------------


@dataclass
class Way:
    """One capture of a variant: the graphs, and what has been timed of them."""

    variant: str
    splits: int
    graphs: dict[Any, Any] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=lambda: {metric: [] for metric in METRICS})


class Decoder:
    """A loaded vLLM whose steps can go each of several ways."""

    def __init__(self, folder: pathlib.Path, variants: Sequence[str], splits: Sequence[int]) -> None:
        self.engine = Engine(folder, sizes=GRAPHS, context=CONTEXT, kv_bytes=16 << 30, max_splits=splits[0])
        self.runner = self.engine.runner
        # vLLM's own choice, before anybody was attached.
        self.chosen = [(one.aot_schedule, one.aot_sliding_window) for one in self.engine.builders]
        self.attached: Any = None
        self.way: Way | None = None
        self.is_busy = self.is_timed = False
        self._times: dict[str, Any] = {}
        self._watch()
        self.ways: dict[int, list[Way]] = {}
        for number in splits:
            self.ways[number] = made = []
            for capture in range(CAPTURES):
                for variant in variants if capture % 2 == 0 else reversed(variants):
                    made.append(self.capture(Way(variant, number)))

    def go(self, way: Way) -> None:
        """From the next step on."""
        if self.attached is not None:
            self.attached.detach()
            self.attached = None
        for builder, (schedules, window) in zip(self.engine.builders, self.chosen, strict=True):
            builder.aot_schedule, builder.aot_sliding_window = schedules and way.variant != "none", window
            builder.max_num_splits = way.splits
        if way.variant in ATTACHED:
            from fa3_metadata.engines.vllm import attach

            self.attached = attach(**ATTACHED[way.variant])
        self.runner.cudagraph_manager.graphs = way.graphs
        self.way = way

    def capture(self, way: Way) -> Way:
        """New graphs."""
        self.go(way)
        self.runner.capture_model()
        return way

    def _watch(self) -> None:
        """Time what `execute_model` queues, up to the end of the graph."""
        import torch

        replay, execute = torch.cuda.CUDAGraph.replay, self.runner.execute_model
        compute = self.runner.model.compute_logits

        def event() -> Any:
            made = torch.cuda.Event(enable_timing=True)
            made.record()
            return made

        def timed_replay(graph: Any) -> None:
            if not self.is_timed:
                return replay(graph)
            begin = event()
            replay(graph)
            self._times["graph"] = begin, event()

        def timed_execution(*arguments: Any, **named: Any) -> Any:
            if not self.is_timed:
                return execute(*arguments, **named)
            torch.cuda.synchronize()
            self._times = {}
            if self.is_busy:
                spin(HEAD_START)
            begin, began = event(), time.perf_counter()
            output = execute(*arguments, **named)
            took = time.perf_counter() - began
            if "graph" not in self._times:
                raise FailedError("a step of the whole batch was not the replay of one graph")
            self._note(begin, took)
            return output

        def finite_logits(*arguments: Any, **named: Any) -> Any:
            logits = compute(*arguments, **named)
            if not self.is_timed and not torch.isfinite(logits).all():
                raise FailedError("logits are not finite")
            return logits

        torch.cuda.CUDAGraph.replay = timed_replay
        self.runner.execute_model, self.runner.model.compute_logits = timed_execution, finite_logits

    def _note(self, begin: Any, took: float) -> None:
        assert self.way is not None
        first, last = self._times["graph"]
        last.synchronize()
        graph, times = first.elapsed_time(last) * 1e3, self.way.times
        if not self.is_busy:
            times["idle"].append(graph)
            times["host"].append(took * 1e6)
            return
        times["graph"].append(graph)
        if took < HEAD_START:  # else the GPU has waited for the host meanwhile
            times["step"].append(begin.elapsed_time(last) * 1e3)

    def measure(self, lengths: tuple[int, ...], splits: int, rounds: int) -> list[Way]:
        """Decode a batch, the ways in turns, every other round backwards; the first step of a turn is thrown away."""
        ways, llm_engine = self.ways[splits], self.engine.llm.llm_engine
        for way in ways:
            way.times = {metric: [] for metric in METRICS}
        turns = [way for turn in range(rounds) for way in (ways if turn % 2 == 0 else reversed(ways))]
        plan = [(way, step) for way in turns for step in range(2 * STEPS + 1)]
        own, taken = llm_engine.step, 0

        def step() -> Any:
            nonlocal taken
            running = llm_engine.engine_core.engine_core.scheduler.running
            decoding = sum(one.num_computed_tokens >= one.num_prompt_tokens for one in running)
            if decoding == len(lengths) and taken < len(plan):
                way, at = plan[taken]
                taken += 1
                if at == 0:
                    self.go(way)
                self.is_timed, self.is_busy = at > 0, at <= STEPS
            outputs = own()
            self.is_timed = False
            return outputs

        self.go(ways[0])
        llm_engine.step = step
        try:
            self.engine.generate([(length, len(plan) + 8) for length in lengths], seed=len(lengths))
        finally:
            del llm_engine.step
        if taken < len(plan):
            raise FailedError(f"{taken} of {len(plan)} steps decoded the whole batch")
        return ways


Times = dict[str, Captured]  # by METRICS


def times_of(ways: Sequence[Way]) -> Times:
    """Without a metric that could not be taken of every way: a host that is too slow has no "step"."""
    variants = dict.fromkeys(way.variant for way in ways)
    return {
        metric: {name: [way.times[metric] for way in ways if way.variant == name] for name in variants}
        for metric in METRICS
        if all(way.times[metric] for way in ways)
    }


def cases(options: argparse.Namespace, folder: pathlib.Path) -> Iterator[tuple[str, int, Times]]:
    """Case, splits and times, for each that is asked for."""
    make_model(folder, MODELS[options.model])
    decoder = Decoder(folder, options.variants, options.splits)
    for case, lengths in CASES.items():
        for splits in options.splits if options.case in case else ():
            yield case, splits, times_of(decoder.measure(lengths, splits, options.rounds))


def serve(options: argparse.Namespace, folder: pathlib.Path, parent: Connection) -> None:
    """Send what `cases` gives."""
    answer(partial(cases, options, folder), folder, parent)


# ---- the parent ------------------------------------------------------------------------------------------------------


def header(variants: Sequence[str]) -> str:
    text = f"{'us':38s}" + "".join(f"{name:>10s}" for name in variants) + f"   {variants[0]} /"
    return text + "".join(f"{name:>9s}" for name in variants[1:]) + "    apart"


def lines(label: str, times: Times) -> Iterator[str]:
    for metric, captured in times.items():
        shown = {name: middle(captures) for name, captures in captured.items()}
        first = next(iter(shown.values()))
        text = f"{label + ': ' + metric:38s}" + "".join(f"{us:10.1f}" for us in shown.values())
        text += " " * (5 + len(next(iter(shown)))) + "".join(f"{first / us:9.4f}" for us in list(shown.values())[1:])
        yield text + f"{100 * apart(captured):8.2f}%"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench vllm-decode", description="decode steps of a real vLLM")
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--case", default="", help=f"cases whose name contains this: {', '.join(CASES)}")
    parser.add_argument("--splits", type=_numbers, default=SPLITS, help="flash_attn_max_num_splits_for_cuda_graph")
    parser.add_argument("--variants", type=_variants, default=VARIANTS, help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each variant")
    parser.add_argument("--csv", type=pathlib.Path, help="write all percentiles there")
    options = parser.parse_args(argv)
    if missing := why_not():
        print(f"vllm-decode needs a Hopper GPU and vLLM: {missing}", file=sys.stderr)
        return 2
    if not any(options.case in case for case in CASES):
        print(f"vllm-decode: --case must be part of one of {', '.join(CASES)}, got {options.case!r}", file=sys.stderr)
        return 2
    print(gpu_facts())
    print(header(options.variants), flush=True)
    rows = []
    try:
        for case, splits, times in answers(serve, options):
            for text in lines(f"{options.model}, {case}, {splits} splits", times):
                print(text, flush=True)
            rows += capture_lines([options.model, case, splits], times)
    except FailedError as error:
        print(f"{options.model}: {error}", file=sys.stderr)
        return 1
    if options.csv:
        write_captures(options.csv, ["model", "case", "splits"], rows)
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


def _variants(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := set(names) - set(VARIANTS):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(VARIANTS)}, got {', '.join(sorted(unknown))}")
    return names
