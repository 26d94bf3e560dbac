"""The judge of schedules, but for what it measures: what it says of times, and what it times the launch of."""

from __future__ import annotations

import csv
import pathlib
from typing import Any

import pytest

from bench import schedules
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
