"""Decode steps of a real SGLang: without precomputed metadata, with its own, and with ours inside its CUDA graphs.

    python -m bench sglang-decode                       # minutes; a Hopper GPU and an importable SGLang
    python -m bench sglang-decode --model 70b --csv sglang.csv

Two models with random weights, in the shape of Llama-3.1-8B and of one of eight tensor-parallel ranks of Llama-3.1-70B
without its all-reduces. One process a variant, all on the same GPU, which take turns; KV caches are filled with random
numbers instead of a prefill. Timed is `CudaGraphRunner.replay` as SGLang calls it: what it prepares, its precompute
among that, and the replay of the graph. Device time: between events around it, with the GPU kept busy until all is
queued. Host time: until it returns, the GPU idle before. Medians over steps, whose tokens are random and the same for
all. The logits of the first steps are compared first: those with SGLang's metadata and with ours must have the bits of
those without, those of "balanced" be within the error of another order of sums.
"""

from __future__ import annotations

import argparse
import csv
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from types import SimpleNamespace
from typing import Any

from .sglang_model import load, make_model, use, why_not
from .timing import gpu_facts, spin, summary
from .workloads import lognormal, uniform

VARIANTS = {"none": "none", "sglang": "sglang", "ours": "adapter", "balanced": "balanced"}  # shown -> for `use`
CONTEXT, POOL = 20480, 72_000  # tokens: of a sequence at most, and of the KV cache
GRAPHS = [1, 4, 16, 32, 64]
STEPS, ROUNDS, COMPARED = 6, 4, 3  # steps of a turn, turns, first steps whose logits are compared
TOLERANCE = 0.1  # relative, of the norm, after many layers of random weights
HEAD_START = 4e-3  # seconds that the host is given to queue a step
FAILED = 120  # seconds that a process may take to load

MODELS: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": CONTEXT,
    },
    "70b": {  # one rank of eight
        "hidden_size": 8192, "intermediate_size": 3584, "num_hidden_layers": 80, "num_attention_heads": 8,
        "num_key_value_heads": 1, "vocab_size": 16032, "max_position_embeddings": CONTEXT,
    },
}  # fmt: skip
CASES: dict[str, tuple[int, ...]] = {
    "1 x 512": uniform(1, 512),
    "1 x 16k": uniform(1, 16384),
    "4 x 8k": uniform(4, 8192),
    "16 x 2k": uniform(16, 2048),
    "64 x 1k": uniform(64, 1024),
    "32 lognormal(7, 1)": lognormal(32, 7, 1, 51, 16384),
}


# ---- a variant's process ---------------------------------------------------------------------------------------------


@dataclass
class Timed:
    """Microseconds of the replays of a turn."""

    device: list[float]
    host: list[float]


class Server:
    """One variant: a loaded model and the batch that it decodes."""

    def __init__(self, variant: str, folder: pathlib.Path, vocabulary: int) -> None:
        import torch

        use(VARIANTS[variant])
        self.runner = load(
            folder, mem_fraction_static=0.9, max_total_tokens=POOL, cuda_graph_bs=GRAPHS, context_length=CONTEXT
        )
        self.vocabulary, self.folder, self.variant = vocabulary, folder, variant
        from sglang.srt.model_executor.cuda_graph_runner import CudaGraphRunner

        replay = CudaGraphRunner.replay
        self.timed = Timed([], [])
        self.times_device = False

        def timed_replay(*arguments: Any, **named: Any) -> Any:
            torch.cuda.synchronize()
            if self.times_device:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                spin(HEAD_START)
                start.record()
                output = replay(*arguments, **named)
                end.record()
                end.synchronize()
                self.timed.device.append(start.elapsed_time(end) * 1000)
            else:
                started = time.perf_counter()
                output = replay(*arguments, **named)
                self.timed.host.append((time.perf_counter() - started) * 1e6)
            return output

        CudaGraphRunner.replay = timed_replay

    def start(self, lengths: tuple[int, ...]) -> str:
        """Take up a batch and save the logits of its first steps; the file."""
        import torch
        from sglang import bench_one_batch

        model = self.runner.torch_runner
        self.runner.clear()
        generator = torch.Generator("cuda").manual_seed(len(lengths))
        pool = model.token_to_kv_pool
        for cache in (*pool.k_buffer, *pool.v_buffer):
            cache.normal_(generator=generator)
        forward, sample = model.forward, model.sample
        answer = SimpleNamespace(logits_output=SimpleNamespace(next_token_logits=None))
        model.forward, model.sample = lambda *_: answer, lambda *_: torch.zeros(len(lengths), device="cuda")
        prompts = [[1] * length for length in lengths]
        requests = bench_one_batch.prepare_synthetic_inputs_for_latency_test(len(lengths), 0, prompts)
        _, _, self.batch = self.runner.extend(requests)  # memory alone: its forward does nothing
        model.forward, model.sample = forward, sample
        self.tokens = torch.Generator("cuda").manual_seed(0)
        file = self.folder / f"{self.variant}.pt"
        torch.save([self.step().cpu() for _ in range(COMPARED)], file)
        return str(file)

    def step(self) -> Any:
        import torch

        size = (len(self.batch.reqs),)
        tokens = torch.randint(self.vocabulary, size, generator=self.tokens, device="cuda")
        return self.runner.decode(tokens, self.batch)[1].clone()

    def turn(self) -> Timed:
        """Times of some steps; the first of each kind is thrown away."""
        made = Timed([], [])
        for self.times_device in (True, False):
            self.timed = Timed([], [])
            for _ in range(STEPS + 1):
                self.step()
            made.device += self.timed.device[1:]
            made.host += self.timed.host[1:]
        return made


def serve(variant: str, folder: pathlib.Path, vocabulary: int) -> None:
    """Load, then answer the parent: lengths start a batch, "turn" times some steps of it, None ends."""
    server = Server(variant, folder, vocabulary)
    with Client(str(folder / "socket")) as parent:
        parent.send(variant)
        while (asked := parent.recv()) is not None:
            parent.send(server.turn() if asked == "turn" else server.start(asked))
    os._exit(0)  # SGLang's own teardown waits for a server that is not there


# ---- the parent ------------------------------------------------------------------------------------------------------


class FailedError(Exception):
    """A process ended, or logits are not what they must be."""


class Servers:
    """A process for each variant."""

    def __init__(self, model: str, folder: pathlib.Path) -> None:
        self.folder = folder
        sizes = MODELS[model]
        make_model(folder, sizes)
        command = [sys.executable, "-W", "ignore", "-m", "bench", "sglang-decode", "--model", model, "--folder"]
        self.processes, self.parents = {}, {}
        with Listener(str(folder / "socket")) as listener:
            for variant in VARIANTS:
                with (folder / f"{variant}.log").open("w") as log:
                    self.processes[variant] = subprocess.Popen(
                        [*command, str(folder), "--variant", variant], stdout=log, stderr=subprocess.STDOUT
                    )
            listener._listener._socket.settimeout(1)  # type: ignore[attr-defined]
            deadline = time.monotonic() + FAILED
            while len(self.parents) < len(VARIANTS):
                try:
                    one = listener.accept()
                except TimeoutError:
                    if time.monotonic() > deadline or any(p.poll() is not None for p in self.processes.values()):
                        self.end()
                        raise FailedError(self.logs()) from None
                else:
                    self.parents[one.recv()] = one

    def logs(self) -> str:
        """The end of what each process said that is not at work."""
        silent = [variant for variant in VARIANTS if variant not in self.parents] or list(VARIANTS)
        return "\n".join(f"{v}:\n{(self.folder / f'{v}.log').read_text()[-1500:]}" for v in silent)

    def ask(self, variant: str, what: Any) -> Any:
        connection: Connection = self.parents[variant]
        try:
            connection.send(what)
            return connection.recv()
        except (EOFError, OSError):
            raise FailedError(f"{variant}:\n{(self.folder / f'{variant}.log').read_text()[-3000:]}") from None

    def end(self) -> None:
        for connection in self.parents.values():
            try:
                connection.send(None)
            except OSError:
                continue
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def compare(files: dict[str, str]) -> float:
    """The relative error of "balanced". Raises `FailedError` where logits are not what they must be."""
    import torch

    logits = {variant: torch.load(file) for variant, file in files.items()}
    worst = 0.0
    for i, expected in enumerate(logits["none"]):
        if not torch.isfinite(expected).all():
            raise FailedError(f"logits of step {i} are not finite")
        for variant in ("sglang", "ours"):
            if not torch.equal(logits[variant][i], expected):
                raise FailedError(f"logits of step {i} by {variant!r} have other bits than without metadata")
        error = (logits["balanced"][i].float() - expected.float()).norm() / expected.float().norm()
        worst = max(worst, float(error))
    if not worst < TOLERANCE:
        raise FailedError(f'logits by "balanced" are off by {worst:.3g}, over {TOLERANCE}')
    return worst


def measure(servers: Servers, lengths: tuple[int, ...]) -> tuple[dict[str, Timed], float]:
    """Times by variant, and the relative error of "balanced"."""
    error = compare({variant: servers.ask(variant, lengths) for variant in VARIANTS})
    times = {variant: Timed([], []) for variant in VARIANTS}
    for turn in range(ROUNDS):
        for variant in VARIANTS if turn % 2 == 0 else reversed(VARIANTS):
            made: Timed = servers.ask(variant, "turn")
            times[variant].device += made.device
            times[variant].host += made.host
    return times, error


HEADER = f"{'us a replay':26s}" + "".join(f"{name:>10s}" for name in VARIANTS)
HEADER += "   none /" + "".join(f"{name:>9s}" for name in list(VARIANTS)[1:]) + "   sglang / ours"
HEADER += "   host:" + "".join(f"{name:>9s}" for name in VARIANTS) + "   error of balanced"


def line(model: str, case: str, times: dict[str, Timed], error: float) -> str:
    device = {name: summary(one.device)[1] for name, one in times.items()}
    text = f"{model + ', ' + case:26s}" + "".join(f"{device[name]:10.1f}" for name in VARIANTS)
    text += " " * 9 + "".join(f"{device['none'] / device[name]:9.4f}" for name in list(VARIANTS)[1:])
    text += f"{device['sglang'] / device['ours']:16.4f}        "
    return text + "".join(f"{summary(one.host)[1]:9.0f}" for one in times.values()) + f"{error:20.1e}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench sglang-decode", description="decode steps of a real SGLang")
    parser.add_argument("--model", choices=MODELS, help="one of both")
    parser.add_argument("--case", default="", help="cases whose name contains this")
    parser.add_argument("--csv", type=pathlib.Path, help="write all percentiles there")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if missing := why_not():
        print(f"sglang-decode needs a Hopper GPU and SGLang: {missing}", file=sys.stderr)
        return 2
    if options.variant:
        serve(options.variant, options.folder, MODELS[options.model]["vocab_size"])
    print(gpu_facts())
    print(HEADER, flush=True)
    rows = []
    for model in [options.model] if options.model else MODELS:
        with tempfile.TemporaryDirectory() as name:
            servers = None
            try:
                servers = Servers(model, pathlib.Path(name))
                for case, lengths in CASES.items():
                    if options.case not in case:
                        continue
                    times, error = measure(servers, lengths)
                    print(line(model, case, times, error), flush=True)
                    for variant, timed in times.items():
                        for metric, values in vars(timed).items():
                            rows.append([model, case, variant, metric, *(f"{us:.1f}" for us in summary(values))])
            except FailedError as error:
                print(f"{model}: {error}", file=sys.stderr)
                return 1
            finally:
                if servers is not None:
                    servers.end()
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as file:
            names = ["model", "case", "variant", "metric", "p20_us", "p50_us", "p80_us"]
            csv.writer(file).writerows([names, *rows])
    return 0
