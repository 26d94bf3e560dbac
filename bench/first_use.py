"""The first metadata of a fresh process: seconds from the end of its imports, printed.

python -m bench.first_use           # ours, with Triton's cache as the environment says
python -m bench.first_use native    # the installed wheel's
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
import time
from importlib import import_module

_ROOT = pathlib.Path(__file__).resolve().parent.parent
BATCH = 32


def measure_first_use() -> dict[str, float | str]:
    """Seconds of each way, or why there are none: ours with a cold and a warm Triton cache, the wheel's own."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TRITON_CACHE_DIR": folder}
        ways = {"ours, cold Triton cache": [], "ours, warm Triton cache": [], "native": ["native"]}
        return {name: _in_fresh_process(arguments, environment) for name, arguments in ways.items()}


def _in_fresh_process(arguments: list[str], environment: dict[str, str]) -> float | str:
    command = [sys.executable, "-W", "ignore", "-m", "bench.first_use", *arguments]
    try:
        run = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if run.returncode:
        return (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
    return float(run.stdout.split()[-1])


def main(argv: list[str]) -> None:
    import fa3_metadata
    import torch

    function = fa3_metadata.get_scheduler_metadata
    if argv == ["native"]:
        from fa3_metadata.installed import provider_of

        function = import_module(provider_of(fa3_metadata.detect_build().build).module).get_scheduler_metadata
    lengths = torch.randint(1, 65536, (BATCH,), dtype=torch.int32, device="cuda")  # makes the CUDA context
    torch.cuda.synchronize()
    start = time.perf_counter()
    function(BATCH, 1, 65536, 8, 1, 128, lengths, page_size=64, causal=True)
    torch.cuda.synchronize()
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main(sys.argv[1:])
