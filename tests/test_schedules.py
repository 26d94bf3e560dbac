"""The judge of schedules: what it says of times, what it times the launch of, and whether it runs on a GPU."""

from __future__ import annotations

import csv
import pathlib
import subprocess
import sys
from typing import Any

import fa3_metadata
import pytest
import torch

from bench import __main__ as command
from bench import schedules
from bench.decode_step import why_not
from bench.workloads import Workload

BOUNDS = {"none": 0, "fa3": 1, "balanced": 4, "1": 32, "2": 32}


def result(name: str, batch: int, held_out: bool = False, **times: list[list[float]]) -> schedules.Result:
    workload = Workload(name, (100,) * batch, held_out=held_out)
    return schedules.Result(workload, times, {"fa3": 1, "balanced": 4}, BOUNDS, 0.5)


RESULTS = [
    # of "balanced" a capture takes 9 and one 11, each with an outlier: 10, as the mean of their medians
    result("even", 4, none=[[24]], fa3=[[12]], balanced=[[9, 9, 90], [11, 11, 0]], **{"1": [[10]], "2": [[8]]}),
    result("worse", 9, True, none=[[20]], fa3=[[9]], balanced=[[10]], **{"1": [[9.8]], "2": [[30]]}),
    result("many", 1000, none=[[60]], fa3=[[40]], balanced=[[10]], **{"1": [[40]], "2": [[10]]}),
]


def test_what_the_judge_says(capsys: pytest.CaptureFixture[str]) -> None:
    schedules.report(RESULTS)
    *rows, said, few, held_out, many, worst, oracle, near = capsys.readouterr().out.splitlines()[2:]
    assert [row.split()[0] for row in rows] == ["even", "*worse", "many"]
    assert rows[0].split()[1:] == ["24.00", "12.00", "10.00", "8.00", "1.200", "2.400", "1.250", "1,4", "0.50"]
    assert said.startswith("* held out")
    assert few.endswith("geometric mean 1.039 x over FA3's metadata, 2.191 x over FA3 without")
    assert held_out.endswith("geometric mean 0.900 x over FA3's metadata, 2.000 x over FA3 without")
    assert many.endswith("geometric mean 4.000 x over FA3's metadata, 6.000 x over FA3 without")
    assert worst == "worst against FA3's metadata: 0.900 x, worse"
    assert oracle.endswith("geometric mean 1.174 x over FA3's metadata, 2.474 x without")
    assert near == "within 3 % of the oracle: 2 of 3"


def test_the_file_has_the_replays_of_all_captures(tmp_path: pathlib.Path) -> None:
    schedules.write_csv(RESULTS, tmp_path / "made" / "schedules.csv")
    with (tmp_path / "made" / "schedules.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15
    assert [rows[2][name] for name in ("workload", "held_out", "schedule", "num_splits", "p50_us", "replays")] == [
        "even", "0", "balanced", "4", "10.000", "6",
    ]  # fmt: skip


def test_the_judge_times_the_launch_of_both_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def graph_sampler(update: Any) -> Any:
        made.append(update().shape[0])  # of a plan that works
        return lambda samples: [float(len(made))] * samples

    monkeypatch.setattr(schedules, "LAUNCHED", (3, 40))
    monkeypatch.setattr(schedules, "graph_sampler", graph_sampler)
    found = schedules.launch_times("cpu")
    assert {batch: list(times) for batch, times in found.items()} == {3: ["fa3", "balanced"], 40: ["fa3", "balanced"]}
    assert len(made) == 4


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["schedules"]) == 2
    assert capsys.readouterr().err == "schedules are judged on a Hopper GPU with sglang-kernel: no CUDA GPU\n"


@pytest.mark.gpu
@pytest.mark.parametrize("more", [[], ["--among-weights", "--no-sweep"]], ids=["KV far", "among weights"])
def test_on_a_gpu(more: list[str], tmp_path: pathlib.Path) -> None:
    """Four short sequences: splits, which FA3's own metadata has not, are worth it in both."""
    if missing := why_not(fa3_metadata.detect_build().build):
        pytest.skip(f"needs a Hopper GPU and sglang-kernel: {missing}")
    out = tmp_path / "schedules.csv"
    run = [sys.executable, "-W", "ignore", "-m", "bench", "schedules", "--only", "4 x 512, 16/2", "--rounds", "3"]
    root = pathlib.Path(__file__).parent.parent
    done = subprocess.run([*run, *more, "--csv", str(out)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with out.open() as file:
        measured = {row["schedule"]: float(row["p50_us"]) for row in csv.DictReader(file)}
    assert list(measured)[:3] == ["none", "fa3", "balanced"]
    assert ("4" in measured) != bool(more)  # one of the uniform sizes
    assert all(2 < time < 100 for time in measured.values()), measured
    assert measured["balanced"] < measured["fa3"]
