"""python -m bench sglang-ranks: what it says of what its processes found, and of those that fail."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from bench import __main__ as command
from bench import sglang_ranks as ranks

DATA = "attention data parallel"


def found(changed: tuple[int, int, int] | None = None, ms: float = 2.0) -> list[dict[str, Any]]:
    """Both ranks' answers; `changed`: (rank, batches, step) of which the digest is another."""
    answers: list[dict[str, Any]] = []
    for rank in range(ranks.RANKS):
        digests = [
            [f"{rank} {i} {step}" for step in range(ranks.STEPS if batches[rank][0] else 0)]
            for i, batches in enumerate(ranks.BATCHES)
        ]
        answers.append({"digests": digests, "ms": [ms] * len(ranks.BATCHES)})
    if changed:
        rank, i, step = changed
        answers[rank]["digests"][i][step] = "another"
    return answers


def test_a_step_that_differs_is_named() -> None:
    assert ranks.differences(found(), found()) == []
    (said,) = ranks.differences(found(), found((1, 3, 5)))
    assert said == f"rank 1, {ranks.BATCHES[3]}: logits of 1 of {ranks.STEPS} steps differ"


def test_the_report_has_a_row_for_each_pair_of_batches() -> None:
    lines = ranks.report(DATA, {"none": found(ms=3.0), "sglang": found(ms=3.0), "adapter": found(ms=2.0)})
    assert len(lines) == 1 + len(ranks.BATCHES)
    assert f"{8 * ranks.STEPS} logits of {5 * ranks.STEPS} steps" in lines[0]
    assert "5 x 2000 and idle" in lines[3]
    assert lines[3].endswith("adapter   2.000 (1.500 x)")
    shared = ranks.report("tensor parallel", {"none": found(), "sglang": found(), "adapter": found()})
    assert len(shared) == len(ranks.BATCHES), "where both have the first rank's batch, none is run without sequences"


def test_there_are_three_hundred_steps_of_each_setup() -> None:
    assert sum(batches[0][0] > 0 for batches in ranks.BATCHES) * ranks.STEPS >= 300
    for rank in range(ranks.RANKS):
        assert any(batches[rank][0] == 0 for batches in ranks.BATCHES), "an idle rank"


def test_who_waits_for_a_rank_that_failed_is_ended() -> None:
    def process(code: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", code], text=True)

    ended = ranks.wait_for({
        ("one", "none", 0): process("raise SystemExit(3)"),
        ("one", "none", 1): process("import time; time.sleep(600)"),
        ("one", "adapter", 0): process("pass"),
        ("one", "adapter", 1): process("import time; time.sleep(1)"),
    })  # fmt: skip
    assert ended["one", "none", 0] == 3
    assert ended["one", "none", 1] < 0
    assert ended["one", "adapter", 0] == ended["one", "adapter", 1] == 0


@pytest.mark.parametrize("setup", ranks.SETUPS)
def test_without_two_gpus(setup: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert command.main(["sglang-ranks", "--setup", setup]) == 2
    assert "needs two Hopper GPUs and SGLang: this machine has 1" in capsys.readouterr().err
