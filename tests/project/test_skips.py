"""What is skipped is summed up in one line, by its real reason."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from ..conftest import HAS_GPU
from ..helpers.published import why_no_wheel
from ..helpers.skips import cause, summed_up

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("reason", "short"),
    [
        ("Skipped: no CUDA GPU", "no CUDA GPU"),
        ("Skipped: could not import 'matplotlib': No module named 'matplotlib'", "no matplotlib"),
        ("Skipped: could not import 'rich.console': No module named 'rich'", "no rich"),
        (f"Skipped: {why_no_wheel('sglang', '0.5.10.post1')}", "no wheel of sglang"),
        ("no Chromium on this machine (apt-get install chromium)", "no Chromium on this machine"),
        ("needs 2 GPUs, this machine has 1", "needs 2 GPUs, this machine has 1"),
    ],
)
def test_a_reason_in_short(reason: str, short: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FA3_METADATA_WHEELS", raising=False)
    assert cause(reason) == short


def test_reasons_are_counted() -> None:
    reasons = ["no wheel of vllm 0.19.0: set it", "no CUDA GPU", "no wheel of vllm 0.33.0: set it"]
    assert summed_up(reasons) == "3 skipped: no wheel of vllm 2, no CUDA GPU 1 (-rs says which)"
    assert summed_up([]) == ""


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_that_is_the_reason() -> None:
    """Also of tests that need a wheel besides: what is missing first is said."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_wheels.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    count = lines[-1].partition(" ")[0]
    assert int(count) > 10
    assert lines[-2] == f"{count} skipped: no CUDA GPU {count} (-rs says which)"
    assert "SKIPPED" not in done.stdout
