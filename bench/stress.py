"""Random replays of captured decode steps, every output compared bitwise with FA3's per-layer path.

    python -m bench stress --replays 20000            # on this process's GPU
    python -m bench stress --replays 5000 --ranks 2   # data-parallel, a GPU each if there are enough; some batches idle

A step has full and sliding-window layers with KV caches of their own. One graph a batch size holds a single metadata
launch (MetadataPlans) and the layers that use it; its twin holds the same layers without metadata. Each replay draws
how many sequences are live (the rest is padding), their lengths, and the batch size.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from fa3_metadata import MetadataPlan, MetadataPlans, detect_build
from fa3_metadata.installed import load_forward

from .newer_torch import avoid_misread_tensors

BATCHES = (1, 2, 5, 16, 48)
PAGE, PAGES = 64, 100
LAYERS = ((-1, -1), (127, 0), (-1, -1), (1023, 0))  # windows
GROUPS = tuple(dict.fromkeys(LAYERS))


class Step:
    """A captured decode step of one batch size, with our metadata or without."""

    def __init__(self, batch: int, caches: list[torch.Tensor], lengths: torch.Tensor, ours: bool) -> None:
        build = detect_build().build
        forward = load_forward(build)
        self.lengths = lengths[:batch]
        generator = torch.Generator(lengths.device).manual_seed(batch)
        shape = (batch, 1, 8, 128)
        self.q = [torch.randn(shape, device=lengths.device, dtype=torch.bfloat16, generator=generator) for _ in LAYERS]
        pages = torch.randperm(len(caches[0]), device=lengths.device, generator=generator)
        table = pages[: batch * PAGES].to(torch.int32).view(batch, PAGES)
        plans = {
            window: MetadataPlan(
                max_batch_size=batch, max_seqlen_k=PAGE * PAGES, num_heads=8, num_heads_k=1, headdim=128,
                page_size=PAGE, causal=True, window_size=window, device="cuda", build=build,
            )
            for window in GROUPS
        }  # fmt: skip
        together = MetadataPlans(list(plans.values()))
        self.table = table  # a graph keeps no tensor alive

        def run() -> list[torch.Tensor]:
            if ours:
                together.update(self.lengths)
            outputs = []
            for q, cache, window in zip(self.q, caches, LAYERS, strict=True):
                call: dict[str, Any] = {"cache_seqlens": self.lengths, "page_table": table, "causal": True}
                call |= {"q": q, "k_cache": cache, "v_cache": cache, "window_size": window}
                if ours:
                    call |= plans[window].forward_arguments(**call)
                outputs.append(forward(**call))
            return outputs

        run()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = run()


def stress(replays: int, seed: int, idle: float = 0.0) -> float:
    """Run; seconds taken. Raises `RuntimeError` at the first output that differs."""
    avoid_misread_tensors()
    rng = random.Random(seed)
    lengths = torch.ones(max(BATCHES), dtype=torch.int32, device="cuda")
    shape = (max(BATCHES) * PAGES, PAGE, 1, 128)
    caches = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in LAYERS]
    steps = {batch: [Step(batch, caches, lengths, ours) for ours in (True, False)] for batch in BATCHES}
    start = time.perf_counter()
    for replay in range(replays):
        batch = rng.choice(BATCHES)
        live = 0 if rng.random() < idle else rng.randint(1, batch)
        longest = rng.choice((64, 700, PAGE * PAGES))
        drawn = [rng.randint(0, longest) for _ in range(live)] + [rng.choice((0, 1))] * (batch - live)
        lengths[:batch].copy_(torch.tensor(drawn, dtype=torch.int32), non_blocking=True)
        ours, alone = steps[batch]
        ours.graph.replay()
        alone.graph.replay()
        same = torch.stack([(a == b).all() for a, b in zip(ours.outputs, alone.outputs, strict=True)])
        if not same.all().item():
            raise RuntimeError(f"replay {replay}: layers {(~same).nonzero().flatten().tolist()} differ for {drawn}")
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _rank(rank: int, ranks: int, replays: int, seed: int) -> None:
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", rank % gpus)
    torch.cuda.set_device(device)
    backend = "nccl" if ranks <= gpus else "gloo"  # NCCL wants a GPU for each
    torch.distributed.init_process_group(
        backend, init_method="tcp://127.0.0.1:29511", rank=rank, world_size=ranks,
        device_id=device if backend == "nccl" else None,
    )  # fmt: skip
    total = torch.zeros(1, device=device if backend == "nccl" else "cpu")
    parts = 10
    for part in range(parts):
        stress(replays // parts, seed * 1000 + rank * 100 + part, idle=0.2)
        torch.distributed.all_reduce(total)
    print(f"rank {rank} on {device}: {replays // parts * parts} replays equal", flush=True)
    torch.distributed.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench stress", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--replays", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("stress: replays need a CUDA GPU, and an FA3", file=sys.stderr)
        return 2
    if options.ranks > 1:
        arguments = (options.ranks, options.replays, options.seed)
        multiprocessing.spawn(_rank, arguments, nprocs=options.ranks)  # type: ignore[no-untyped-call]
        return 0
    seconds = stress(options.replays, options.seed)
    where = f"{detect_build().build} on {torch.cuda.get_device_name()}"
    layers = options.replays * len(LAYERS)
    print(f"{where}: {options.replays} replays, {layers} layer outputs, all bitwise equal, in {seconds:.1f} s")
    return 0
