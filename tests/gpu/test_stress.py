"""`python -m bench stress` in short: random replays on one GPU; on two with a rank each, some batches idle."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch

from .test_wheels import WHEEL, needs_paged_and_local, needs_wheel

pytestmark = [pytest.mark.gpu, needs_wheel, needs_paged_and_local]
ROOT = pathlib.Path(__file__).parents[2]
GPUS = torch.cuda.device_count()


def stress(*options: str) -> str:
    if str(WHEEL).startswith("vllm"):
        pytest.skip("vLLM's forward has other arguments")
    command = [sys.executable, "-W", "ignore", "-m", "bench", "stress", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_random_replays() -> None:
    assert "2000 replays, 8000 layer outputs, all bitwise equal" in stress("--replays", "2000", "--seed", "1")


@pytest.mark.parametrize("gpus", [1, 2])
def test_data_parallel_ranks(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, which share a GPU or have one each."""
    if gpus > GPUS:
        pytest.skip(f"needs {gpus} GPUs, this machine has {GPUS}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(GPUS)))).split(",")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(visible[:gpus]))
    printed = stress("--replays", "4000", "--ranks", "2")
    for rank in range(2):
        assert f"rank {rank} on cuda:{rank % gpus}: 4000 replays equal" in printed
