"""A real vLLM decodes without us, attached and in place: all logits must have the same bits.

    python -m bench vllm-check                                    # all of SETTINGS but the last; a Hopper GPU
    python -m bench vllm-check --setting "llama, full graphs"     # those whose name contains this

Needs an importable vLLM with its FlashAttention-3. A small Llama-shaped model with random weights, all layers alike or
every second one with a window as in gpt-oss, is served in one process a variant, several at a time on the same GPU. The
engine takes requests of different lengths, more than fit at once, so that the batches shrink and grow; some are padded
to a captured size. In the end four steps of a whole batch are profiled: vLLM's and FA3's metadata kernels must be gone,
and ours there once for each kind of layer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .vllm_model import Engine, make_model, prepare, why_not, windows_of

VARIANTS = ("none", "attached", "in place")
MOST, SIZES = 16, (1, 2, 4, 8, 16)  # sequences at once; batches captured
PROFILED = range(8, 12)  # steps of the last batch
LAYERS = 6
MODEL = {
    "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": LAYERS, "num_attention_heads": 8,
    "num_key_value_heads": 1, "vocab_size": 16384, "max_position_embeddings": 16384,
}  # fmt: skip
THEIRS = "flash::prepare_varlen_num_blocks"  # vLLM's op, and FA3's own stage
OURS = ("prepare_varlen_num_blocks", "layer_groups")


@dataclass(frozen=True)
class Setting:
    name: str
    windows: tuple[int | None, ...]
    graphs: str  # vLLM's cudagraph_mode
    one_group: bool = False

    @property
    def kinds(self) -> int:
        """Metadata kernels that a step needs."""
        return len(self.windows)


SETTINGS = (
    Setting("llama, full graphs", (None,), "FULL_DECODE_ONLY"),
    Setting("windows, full graphs", (127, None), "FULL_DECODE_ONLY"),
    Setting("windows, eager", (127, None), "NONE"),
    Setting("windows in one group, full graphs", (127, None), "FULL_DECODE_ONLY", one_group=True),
    Setting("windows in one group, eager", (127, None), "NONE", one_group=True),
    Setting("windows, piecewise graphs", (127, None), "PIECEWISE"),
)


def requests() -> tuple[list[tuple[int, int]], ...]:
    """(tokens of context, tokens to generate) of all requests, in groups that are run to their end one by one."""
    rng = random.Random(0)
    groups = [
        [(min(int(rng.lognormvariate(6, 1.2)) + 16, 6000), rng.randint(16, 120)) for _ in range(size)]
        for size in (20, 3, 27, 1, 9)  # up to MOST at once
    ]
    return *groups, [(500 + 100 * i, PROFILED.stop + 4) for i in range(MOST)]


# ---- in a variant's process ------------------------------------------------------------------------------------------


def decode(variant: str, setting: Setting, folder: pathlib.Path) -> dict[str, Any]:
    """Digests of the logits of every step, the batches, and the kernels of a step of the last batch."""
    import torch

    prepare(folder, setting.graphs)
    attached = None
    if variant != "none":
        from fa3_metadata.engines.vllm import attach

        attached = attach(in_place=variant == "in place")
    engine = Engine(folder, graphs=setting.graphs, sizes=SIZES, one_group=setting.one_group)
    digests: list[str] = []
    batches: list[int] = []
    own = engine.runner.model.compute_logits

    def compute_logits(*arguments: Any, **named: Any) -> Any:
        logits = own(*arguments, **named)
        if not torch.isfinite(logits).all():
            raise RuntimeError(f"logits of step {len(digests)} are not finite")
        digests.append(
            hashlib.sha256(logits.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()).hexdigest()
        )
        batches.append(len(logits))
        return logits

    engine.runner.model.compute_logits = compute_logits
    *groups, last = requests()
    for i, group in enumerate(groups):
        engine.generate(group, 1000 * i)
    kernels = profiled(engine, last)
    used = None if attached is None else attached.used
    return {"digests": digests, "batches": batches, "kernels": kernels, "used": used}


def profiled(engine: Engine, last: list[tuple[int, int]]) -> dict[str, float]:
    """Device events of a step by name: of the steps PROFILED, of which each decodes all requests of `last`."""
    import torch

    llm_engine, own, taken = engine.llm.llm_engine, engine.llm.llm_engine.step, 0
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def step() -> Any:
        nonlocal taken
        if taken == PROFILED.start:
            torch.cuda.synchronize()
            profiler.start()
        outputs = own()
        taken += 1
        if taken == PROFILED.stop:
            torch.cuda.synchronize()
            profiler.stop()
        return outputs

    llm_engine.step = step
    try:
        engine.generate(last, 9000)
    finally:
        del llm_engine.step
    counts: dict[str, float] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            counts[event.name] = counts.get(event.name, 0) + 1 / len(PROFILED)
    return counts


# ---- the parent ------------------------------------------------------------------------------------------------------


def run(setting: Setting, variant: str, folder: pathlib.Path) -> dict[str, Any] | str:
    """What a process of its own found, or the end of what it said."""
    answer = folder / f"{setting.name} {variant}.json"
    command = [sys.executable, "-W", "ignore", "-m", "bench", "vllm-check", "--setting", setting.name]
    command += ["--variant", variant, "--folder", str(folder)]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout[-4000:] if done.returncode or not answer.exists() else json.loads(answer.read_text())


def metadata_kernels(kernels: dict[str, float]) -> tuple[float, float]:
    """(vLLM's and FA3's, ours) of a step."""
    theirs = sum(count for name, count in kernels.items() if THEIRS in name)
    ours = sum(count for name, count in kernels.items() if any(part in name for part in OURS) and THEIRS not in name)
    return theirs, ours


def problems(setting: Setting, variant: str, found: dict[str, Any], without: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    wrong = [i for i, pair in enumerate(zip(without["digests"], found["digests"], strict=False)) if pair[0] != pair[1]]
    said = []
    if len(found["digests"]) != len(without["digests"]) or wrong:
        said.append(f"logits differ from those without us in {len(wrong)} steps, first {wrong[:1]}")
    if variant != "none" and metadata_kernels(found["kernels"]) != (0, setting.kinds):
        said.append(f"must run no metadata kernel but ours, {setting.kinds} a step")
    return said


HEADER = (
    f"{'':36s}{'':10s}{'steps':>6s}{'batches':>9s}{'distinct':>10s}{'device events':>15s}{'theirs':>8s}{'ours':>6s}"
)


def line(setting: Setting, variant: str, found: dict[str, Any]) -> str:
    theirs, ours = metadata_kernels(found["kernels"])
    batches = f"{min(found['batches'])} to {max(found['batches'])}"
    text = f"{setting.name:36s}{variant:10s}{len(found['digests']):6d}{batches:>9s}{len(set(found['digests'])):10d}"
    return text + f"{sum(found['kernels'].values()):15.1f}{theirs:8.1f}{ours:6.1f}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench vllm-check", description="vLLM's logits with and without our metadata, bit for bit"
    )
    parser.add_argument("--setting", default="", help=f"those with this in their name: {', '.join(map(str, NAMES))}")
    parser.add_argument("--at-once", type=int, default=8, help="processes on the GPU")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if missing := why_not():
        print(f"vllm-check needs a Hopper GPU and vLLM: {missing}", file=sys.stderr)
        return 2
    if options.variant:
        setting = SETTINGS[NAMES.index(options.setting)]
        found = decode(options.variant, setting, options.folder / f"{setting.name} {options.variant}")
        (options.folder / f"{setting.name} {options.variant}.json").write_text(json.dumps(found))
        os._exit(0)  # vLLM's own teardown is not what is tried here
    settings = [one for one in SETTINGS if options.setting in one.name] if options.setting else SETTINGS[:-1]
    if not settings:
        print(f"vllm-check: --setting must be part of one of {NAMES}, got {options.setting!r}", file=sys.stderr)
        return 2
    failed = False
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.at_once) as pool:
        folder, running = pathlib.Path(name), {}
        for setting in settings:
            for variant in VARIANTS:
                make_model(folder / f"{setting.name} {variant}", MODEL | windows_of(LAYERS, setting.windows))
                running[setting, variant] = pool.submit(run, setting, variant, folder)
        print(f"{HEADER}   (kernels of a step; theirs, ours: those that make metadata)", flush=True)
        for setting in settings:
            without = running[setting, "none"].result()
            for variant in VARIANTS:
                found = running[setting, variant].result()
                if isinstance(found, str) or isinstance(without, str):
                    print(f"{setting.name:36s}{variant:10s} failed:\n{found if isinstance(found, str) else ''}")
                    failed = True
                    continue
                print(line(setting, variant, found), flush=True)
                for problem in problems(setting, variant, found, without):
                    print(f"{'':36s}{'':10s}  WRONG: {problem}")
                    failed = True
    return int(failed)


NAMES = [setting.name for setting in SETTINGS]
