"""What a call costs the host, of this package and of another commit's beside it, in turns.

    git archive COMMIT integration triton_kernels | tar x -C OTHER && mv OTHER/integration OTHER/fa3_metadata
    mv OTHER/triton_kernels OTHER/fa3_metadata
    python -m bench host --beside OTHER

us until a call returns, with launches that the GPU keeps up with: the least of many turns, each of some hundred calls
and one synchronisation before it. A process has one package; `--turns` processes of each take turns.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import fa3_metadata
import torch

SHAPE: dict[str, Any] = {"num_heads": 8, "num_heads_k": 1, "headdim": 128, "page_size": 64, "causal": True}
LARGEST, BATCH, LONGEST = 512, 256, 65536
ROOT = pathlib.Path(__file__).resolve().parent.parent


def per_call(calls: Iterable[Callable[[], object]]) -> float:
    """us of each of these calls, one after another."""
    todo = list(calls)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for call in todo:
        call()
    return (time.perf_counter() - begin) / len(todo) * 1e6


def measured() -> dict[str, float]:
    """us by what is called. "first" is a batch size that did not come before, "new" a max_seqlen_k."""
    lengths = {b: torch.full((b,), 1000, dtype=torch.int32, device="cuda") for b in range(1, LARGEST + 1)}
    out = torch.empty(20000, dtype=torch.int32, device="cuda")

    def function(batch: int, longest: int) -> Callable[[], object]:
        call = {"cache_seqlens": lengths[batch], "out": out, "backend": "triton", **SHAPE}
        return lambda: fa3_metadata.get_scheduler_metadata(batch, 1, longest, **call)

    def plan() -> Any:
        made = fa3_metadata.MetadataPlan(max_batch_size=LARGEST, max_seqlen_k=LONGEST, device="cuda", **SHAPE)
        for _ in range(2):
            made.update(lengths[LARGEST])
        return made

    sizes = range(LARGEST // 2 + 1, LARGEST - 12)
    one = plan()
    for batch in (1, 33, BATCH, LARGEST // 2 + 1, LARGEST):  # compiles
        for _ in range(3):
            one.update(lengths[batch])
            function(batch, LONGEST)()
    gc.disable()
    times: dict[str, list[float]] = {}
    for turn in range(14):
        fresh, longest = plan(), 100_000 + 64 * turn
        function(LARGEST, longest)()
        new = 200_000 + 64 * 250 * turn
        for name, calls in {
            "plan again": [partial(one.update, lengths[BATCH])] * 400,
            "function again": [function(BATCH, LONGEST)] * 400,
            "plan first": [partial(fresh.update, lengths[b]) for b in sizes],
            "function first": [function(b, longest) for b in sizes],
            "function new": [function(BATCH, new + 64 * i) for i in range(250)],
        }.items():
            times.setdefault(name, []).append(per_call(calls))
    if hasattr(fa3_metadata, "trace"):
        with tempfile.TemporaryDirectory() as folder:
            fa3_metadata.trace.start(pathlib.Path(folder) / "steps.trace")
            times["plan again, traced"] = [per_call([partial(one.update, lengths[BATCH])] * 100) for _ in range(10)]
            fa3_metadata.trace.stop()
    return {name: min(some) for name, some in times.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench host", description="what a call costs the host")
    parser.add_argument("--beside", type=pathlib.Path, metavar="FOLDER", help="holds another commit's fa3_metadata")
    parser.add_argument("--turns", type=int, default=3, help="processes of each package (default: 3)")
    parser.add_argument("--once", action="store_true", help="measure in this process, and print JSON")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("python -m bench host needs a CUDA GPU, and torch finds none here", file=sys.stderr)
        return 2
    if options.once:
        print(json.dumps(measured()))
        return 0
    if options.turns < 1:
        parser.error(f"--turns must be at least 1, got {options.turns}")
    if options.beside and not (options.beside / "fa3_metadata" / "__init__.py").is_file():
        parser.error(f"--beside must be a folder with fa3_metadata in it, got {options.beside}")
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.turns):
        for name, folder in (("beside", options.beside), ("this", None)):
            if name == "this" or folder:
                found.setdefault(name, []).append(_in_a_process(folder))
    least = {name: {what: min(one[what] for one in some) for what in some[0]} for name, some in found.items()}
    for what, time_us in least["this"].items():
        other = least.get("beside", {}).get(what)
        said = f"   beside {other:7.2f}   ratio {time_us / other:.3f}" if other else ""
        print(f"{what:20s} {time_us:7.2f} us{said}")
    return 0


def _in_a_process(folder: pathlib.Path | None) -> dict[str, float]:
    environment = dict(os.environ)
    if folder:  # before the package that is installed
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(folder.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "bench", "host", "--once"], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


if __name__ == "__main__":
    sys.exit(main())
