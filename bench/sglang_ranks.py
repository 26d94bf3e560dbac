"""A real SGLang on two GPUs: logits with and without our metadata, bit for bit, and the time of a step.

    python -m bench sglang-ranks

Two ranks of one model, once with tensor parallelism, where both attend to the same batch with half of the heads each,
and once with attention data parallelism, where each has a batch of its own, which may be empty, and the other layers
are done together. SGLang makes no metadata ahead in the second. Variants are those of `sglang-check`, without the
wrapper. The model is Qwen3-shaped, whose layers SGLang can run both ways, with random weights.

Every variant's two processes load side by side with all others, and decode in turns: a step's time is that of
`decode` until both GPUs are idle, with nothing else on them. Needs SGLang and two Hopper GPUs.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from .sglang_model import digest, load, log_to_stderr, make_model, use, why_not

RANKS, STEPS = 2, 80
VARIANTS = ("none", "sglang", "adapter")
SETUPS: dict[str, dict[str, Any]] = {
    "tensor parallel": {},
    "attention data parallel": {"enable_dp_attention": True, "dp_size": RANKS},
}
SIZES = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 2048,
    "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 16384,
    "max_position_embeddings": 16384,
}  # fmt: skip
# (sequences, tokens of context) of each rank; the first is that of both where they share a batch
BATCHES = (
    ((1, 700), (8, 300)), ((16, 1000), (3, 2000)), ((5, 2000), (0, 0)), ((0, 0), (2, 60)), ((11, 129), (16, 500)),
)  # fmt: skip


class Rank:
    """One of the ranks: SGLang's runner, and what it is given."""

    def __init__(self, setup: str, folder: pathlib.Path, rank: int, port: int) -> None:
        self.number, self.shares = rank, not SETUPS[setup]
        graphs = {"cuda_graph_bs": [1, 8, 16], "context_length": 16384, "disable_custom_all_reduce": True}
        memory = {"mem_fraction_static": 0.1, "max_total_tokens": 60_000}
        more = {"tp_size": RANKS} | SETUPS[setup]
        self.runner = load(folder, rank, SimpleNamespace(nccl_port=port), **graphs, **memory, **more)
        self.model = self.runner.torch_runner

    def decode(self, batches: tuple[tuple[int, int], ...]) -> tuple[list[str], list[float]]:
        """A digest of the logits of every step (none without sequences), and ms of each."""
        import numpy as np
        import torch
        from sglang import bench_one_batch

        sequences, context = batches[0 if self.shares else self.number]
        if self.shares and not sequences:
            return [], [0.0]
        self.runner.clear()
        if sequences:
            np.random.seed(sequences)
            requests = bench_one_batch.prepare_synthetic_inputs_for_latency_test(sequences, context)
            tokens, logits, batch = self.runner.extend(requests)
        else:
            self._idle()
        generator = torch.Generator("cuda").manual_seed(sequences)
        digests, times = [], []
        for _ in range(STEPS):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            if not sequences:
                self._idle()
            else:
                drawn = torch.randint(SIZES["vocab_size"], tokens.shape, generator=generator, device="cuda")
                tokens, logits = self.runner.decode(drawn.to(tokens.dtype), batch)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1e3)
            if sequences:
                assert torch.isfinite(logits).all()
                digests.append(digest(logits))
        return digests, times

    def _idle(self) -> None:
        """A forward without sequences, beside the other rank's."""
        from sglang.srt.layers.dp_attention import get_attention_tp_size
        from sglang.srt.managers.schedule_batch import ScheduleBatch
        from sglang.srt.managers.scheduler_dp_attn_mixin import prepare_mlp_sync_batch_raw
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
        from sglang.srt.utils import require_mlp_tp_gather

        model = self.model
        cache = SimpleNamespace(
            page_size=model.server_args.page_size, device=model.device,
            token_to_kv_pool_allocator=model.token_to_kv_pool_allocator,
        )  # fmt: skip

        def empty() -> Any:
            batch = ScheduleBatch.init_new(
                [], model.req_to_token_pool, model.token_to_kv_pool_allocator, cache, model.model_config, False,
                SpeculativeAlgorithm.NONE,
            )  # fmt: skip
            batch.prepare_for_idle()
            return batch

        batch = prepare_mlp_sync_batch_raw(
            None, dp_size=RANKS, attn_tp_size=get_attention_tp_size(), attn_cp_size=model.attn_cp_size,
            tp_group=model.tp_group, get_idle_batch=empty, disable_cuda_graph=model.server_args.disable_cuda_graph,
            require_mlp_tp_gather=require_mlp_tp_gather(model.server_args),
            disable_overlap_schedule=model.server_args.disable_overlap_schedule, offload_tags=set(),
        )  # fmt: skip
        model.forward(ForwardBatch.init_new(batch.get_model_worker_batch(), model))

    @contextmanager
    def turn(self, folder: pathlib.Path) -> Iterator[None]:
        """Both ranks at once, and no other variant: they wait on the CPU, so that the GPUs are idle."""
        import torch.distributed as dist

        with (folder / "turn").open("w") as file:
            if self.number == 0:
                fcntl.flock(file, fcntl.LOCK_EX)
            dist.barrier(group=self.model.tp_group.cpu_group)
            yield
            dist.barrier(group=self.model.tp_group.cpu_group)


def run(setup: str, variant: str, rank: int, folder: pathlib.Path, port: int) -> None:
    """One process: what it found, in a file of its own."""
    log_to_stderr()
    use(variant)
    one = Rank(setup, folder, rank, port)
    with one.turn(folder):
        found = [one.decode(batches) for batches in BATCHES]
    answer = {"digests": [digests for digests, _ in found], "ms": [statistics.median(times) for _, times in found]}
    path_of(folder, setup, variant, rank).write_text(json.dumps(answer))


def path_of(folder: pathlib.Path, setup: str, variant: str, rank: int) -> pathlib.Path:
    return folder / f"{setup} {variant} {rank}.json"


def differences(without: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[str]:
    """What is not the same, by rank and batch."""
    said = []
    for rank, (theirs, ours) in enumerate(zip(without, found, strict=True)):
        for batches, wanted, got in zip(BATCHES, theirs["digests"], ours["digests"], strict=True):
            wrong = sum(one != other for one, other in zip(wanted, got, strict=True))
            if wrong:
                said.append(f"rank {rank}, {batches}: logits of {wrong} of {len(wanted)} steps differ")
    return said


def report(setup: str, made: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lines about a setup: what was compared, and a row for each pair of batches."""
    steps = [len(digests) for one in made["none"] for digests in one["digests"]]
    distinct = {digest for one in made["none"] for digests in one["digests"] for digest in digests}
    shared = "both ranks" if not SETUPS[setup] else "each rank"
    lines = []
    for i, batches in enumerate(BATCHES):
        some = [f"{n} x {context}" if n else "idle" for n, context in (batches if SETUPS[setup] else batches[:1])]
        if some == ["idle"]:  # of a batch that both share
            continue
        times = {variant: max(one["ms"][i] for one in ranks) for variant, ranks in made.items()}
        said = "".join(f"  {variant} {ms:7.3f} ({times['none'] / ms:.3f} x)" for variant, ms in times.items())
        lines.append(f"  {' and '.join(some):24s}ms a step:{said}")
    what = f"{setup}: {sum(steps)} logits of {len(lines) * STEPS} steps, {len(distinct)} distinct, {shared}"
    return [what, *lines]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench sglang-ranks", description="SGLang on two GPUs")
    parser.add_argument("--setup", choices=SETUPS, help="one of both")
    for name, kind in (("--variant", str), ("--rank", int), ("--folder", pathlib.Path), ("--port", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if missing := why_not(RANKS):
        print(f"sglang-ranks needs two Hopper GPUs and SGLang: {missing}", file=sys.stderr)
        return 2
    if options.variant:
        run(options.setup, options.variant, options.rank, options.folder, options.port)
        os._exit(0)  # SGLang's own teardown waits for a server that is not there
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_model(folder, SIZES)
        running = {}
        for setup in [options.setup] if options.setup else SETUPS:
            for variant in VARIANTS:
                port = _free_port()
                for rank in range(RANKS):
                    more = ["--setup", setup, "--variant", variant, "--rank", str(rank), "--port", str(port)]
                    running[setup, variant, rank] = subprocess.Popen(
                        [sys.executable, "-W", "ignore", "-m", "bench", "sglang-ranks", "--folder", name, *more],
                        text=True, stdout=(folder / f"{setup} {variant} {rank}.log").open("w"),
                        stderr=subprocess.STDOUT, env=os.environ | {"NCCL_NVLS_ENABLE": "0"},
                    )  # fmt: skip
        ended = wait_for(running)
        for setup in dict.fromkeys(key[0] for key in running):
            for (_, variant, rank), status in [one for one in ended.items() if one[0][0] == setup]:
                if status:
                    log = (folder / f"{setup} {variant} {rank}.log").read_text()
                    print(f"{setup}, {variant}, rank {rank} failed:\n{log[-2500:]}")
                    failed = True
            if any(status for key, status in ended.items() if key[0] == setup):
                continue
            made = {
                variant: [json.loads(path_of(folder, setup, variant, rank).read_text()) for rank in range(RANKS)]
                for variant in VARIANTS
            }
            print(*report(setup, made), sep="\n", flush=True)
            for variant in VARIANTS[1:]:
                wrong = differences(made["none"], made[variant])
                print(f"  {variant}: " + ("the same bits as without" if not wrong else "; ".join(wrong)))
                failed = failed or bool(wrong)
    return int(failed)


def wait_for(running: dict[tuple[str, str, int], subprocess.Popen[str]]) -> dict[tuple[str, str, int], int]:
    """The exit status of each. Where one has failed its partner, which would wait for it for ever, is ended."""
    while any(process.poll() is None for process in running.values()):
        for (*one, _), process in running.items():
            if process.poll():  # not 0
                for key, partner in running.items():
                    if [*key[:2]] == one and partner.poll() is None:
                        partner.kill()
        time.sleep(0.2)
    return {key: process.returncode for key, process in running.items()}


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


if __name__ == "__main__":
    sys.exit(main())
