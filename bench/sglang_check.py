"""A real SGLang decodes without metadata, with its own and with ours: all logits must have the same bits.

    python -m bench sglang-check

Ours comes by the adapter, and by `install(wrap_forward=True)` as for versions that make none. Needs an importable
SGLang with its FlashAttention-3 backend, and a Hopper GPU. A small Llama-shaped model with random weights runs in one
process a variant, side by side on the same GPU, with CUDA graphs for batches of 1, 8 and 16; the batches decoded shrink
and grow, and some are padded to a captured size. The next tokens are drawn at random, the same for all: those of a
model with random weights soon repeat, and then attention gives the same whatever it reads.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from .sglang_model import digest, load, log_to_stderr, make_model, use, why_not

VARIANTS = ("none", "sglang", "adapter", "wrapper")
BATCHES = ((1, 700), (8, 300), (16, 1000), (5, 2000), (2, 60), (11, 129))  # sequences, tokens of context
STEPS = 64
SIZES = {
    "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 1, "vocab_size": 16384, "max_position_embeddings": 16384,
}  # fmt: skip


def decode(variant: str, folder: pathlib.Path) -> list[str]:
    """A digest of the logits of every step."""
    import numpy as np
    import torch
    from sglang import bench_one_batch

    log_to_stderr()
    use(variant)
    graphs = {"cuda_graph_bs": [1, 8, 16], "context_length": 16384}
    runner = load(folder, mem_fraction_static=0.3, max_total_tokens=100_000, **graphs)
    digests = []
    for batch_size, context in BATCHES:
        np.random.seed(batch_size)
        requests = bench_one_batch.prepare_synthetic_inputs_for_latency_test(batch_size, context)
        runner.clear()
        tokens, logits, batch = runner.extend(requests)
        generator = torch.Generator("cuda").manual_seed(batch_size)
        for _ in range(STEPS):
            tokens = torch.randint(SIZES["vocab_size"], tokens.shape, generator=generator, device="cuda").to(
                tokens.dtype
            )
            tokens, logits = runner.decode(tokens, batch)
            digests.append(digest(logits))
    assert torch.isfinite(logits).all()
    return digests


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench sglang-check", description="SGLang's logits with and without our metadata, bit for bit"
    )
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if missing := why_not():
        print(f"sglang-check needs a Hopper GPU and SGLang: {missing}", file=sys.stderr)
        return 2
    if options.variant:
        digests = decode(options.variant, options.folder)
        (options.folder / f"{options.variant}.json").write_text(json.dumps(digests))
        os._exit(0)  # SGLang's own teardown waits for a server that is not there
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_model(folder, SIZES)
        command = [sys.executable, "-W", "ignore", "-m", "bench", "sglang-check", "--folder", name, "--variant"]
        running = {
            variant: subprocess.Popen([*command, variant], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for variant in VARIANTS
        }
        logs = {variant: process.communicate()[0] for variant, process in running.items()}
        for variant, process in running.items():
            if process.returncode:
                sys.exit(f"{variant} failed:\n{logs[variant][-3000:]}")
        made = {variant: json.loads((folder / f"{variant}.json").read_text()) for variant in VARIANTS}
    for variant in VARIANTS[1:]:
        wrong = [i for i, pair in enumerate(zip(made["none"], made[variant], strict=True)) if pair[0] != pair[1]]
        if wrong:
            sys.exit(f"{variant}: logits differ from those without metadata in {len(wrong)} steps, first {wrong[0]}")
    print(f"{len(made['none'])} decode steps, {len(set(made['none']))} distinct logits: the same bits by {VARIANTS}")
    for variant in VARIANTS[2:]:
        said = [
            line for line in logs[variant].splitlines() if "scheduler_metadata" in line or "scheduler metadata" in line
        ]
        print(f"log of {variant}:", *said, sep="\n  ")
    return 0
