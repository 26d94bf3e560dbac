"""The judge of schedules: which pages are read when, what is timed, what it says of times, and a run on a GPU."""

from __future__ import annotations

import csv
import pathlib
import subprocess
import sys
from typing import Any

import fa3_metadata
import pytest
import torch
from torch.overrides import TorchFunctionMode

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
    # 10 us by 8, and 10 by 9.8
    assert near == "balanced takes 1.1294 x the oracle's time, up to 992; within 3 % of it: 2 of 3"


def test_the_price_of_batch_invariance(capsys: pytest.CaptureFixture[str]) -> None:
    ours, one = schedules.INVARIANT, schedules.ONE_SPLIT
    schedules.report_price([
        result("even", 4, fa3=[[12]], balanced=[[8]], **{ours: [[10]], one: [[40]]}),
        result("refused", 4, fa3=[[12]], balanced=[[8]], **{one: [[40]]}),
        result("many", 900, fa3=[[10]], balanced=[[8]], **{ours: [[12.1]], one: [[10]]}),
    ])  # fmt: skip
    _, even, many, of_one, of_fa3, of_balanced = capsys.readouterr().out.splitlines()
    assert [even.split(), many.split()] == [
        ["even", "10.00", "40.00", "12.00", "8.00"], ["many", "12.10", "10.00", "10.00", "8.00"]
    ]  # fmt: skip
    assert of_one == "it takes 0.550 x the time of one split, from 0.250 x to 1.210 x"
    assert of_fa3 == "it takes 1.004 x the time of fa3, from 0.833 x to 1.210 x"
    assert of_balanced == "it takes 1.375 x the time of balanced, from 1.250 x to 1.512 x"


def test_the_file_has_the_replays_of_all_captures(tmp_path: pathlib.Path) -> None:
    schedules.write_csv(RESULTS, tmp_path / "made" / "schedules.csv", "NVIDIA H20", 78)
    with (tmp_path / "made" / "schedules.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15
    assert [rows[2][name] for name in ("workload", "held_out", "schedule", "num_splits", "p50_us", "replays")] == [
        "even", "0", "balanced", "4", "10.000", "6",
    ]  # fmt: skip
    assert {(row["gpu"], row["num_sms"]) for row in rows} == {("NVIDIA H20", "78")}


def test_results_of_several_cards_lie_side_by_side(tmp_path: pathlib.Path) -> None:
    h100 = "NVIDIA H100 80GB HBM3"
    cases = {
        (h100, 0, "named"),
        (h100, 54, "named"),
        (h100, 54, "random"),
        (h100, 18, "named"),
        ("NVIDIA H200", 0, "named"),
    }
    names = {schedules.results_file(tmp_path, gpu, 132, margin, suite).name for gpu, margin, suite in cases}
    assert len(names) == len(cases)
    assert {"schedules-h200.csv", "schedules-h100-80gb-hbm3-78-sms-random.csv"} <= names


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


class OnCpu(TorchFunctionMode):
    """What is made on a GPU is made on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return args[0] if function is torch.Tensor.cuda else function(*args, **kwargs)


@pytest.fixture
def layers() -> schedules.Layers:
    with OnCpu():
        return schedules.Layers(Workload("2 short", (100, 40)))


@pytest.mark.parametrize(("window", "served"), [(None, True), (100, True), (9000, False)])
def test_both_ways_of_batch_invariance(window: int | None, served: bool) -> None:
    """Ours where it is not refused, by its own bound; and one split for every sequence."""
    with OnCpu():
        layers = schedules.Layers(Workload("2 short", (700, 40), window=window))
    made = schedules.invariant_variants(layers)
    assert list(made) == [schedules.ONE_SPLIT, *[schedules.INVARIANT] * served]
    assert made[schedules.ONE_SPLIT]["num_splits"] == 1
    if served:
        asked = layers.problem | {"policy": "balanced", "batch_invariant": True}
        ours = made[schedules.INVARIANT]
        assert torch.equal(ours["scheduler_metadata"], fa3_metadata.get_scheduler_metadata(**asked))
        assert ours["num_splits"] == fa3_metadata.metadata_layout(**asked).num_splits
        assert ours["num_splits"] > 1 or window == 100


def test_every_layer_of_both_sets_has_pages_of_its_own(layers: schedules.Layers) -> None:
    seen, captured = [], list(layers.tables)  # what a graph holds, and does not follow when it is replaced
    for pages in (1, 0):
        layers.use(pages)
        for table in captured:
            seen += [*table[0].tolist(), int(table[1, 0])]  # 100 tokens are two pages, 40 one
    assert sorted(seen) == list(range(2 * schedules.LAYERS * 3))
    assert layers.call["k_cache"].shape[0] == len(seen)


def test_what_is_timed_is_the_second_replay_in_a_row_over_other_pages(
    layers: schedules.Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[Any] = []
    first = layers.tables.clone()  # a graph is captured, and must be timed, with the first set in use

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, _: Any) -> float:
            return 0.64  # ms

    class Graph:
        def __init__(self, name: str) -> None:
            self.name = name

        def replay(self) -> None:
            log.append((self.name, torch.equal(layers.tables, first)))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    emptied: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "amax", lambda x: emptied.append((x.nbytes, len(log))))
    graphs: Any = [("fa3", Graph("a")), ("balanced", Graph("b")), ("fa3", Graph("c"))]
    with OnCpu():
        times = schedules.replayed(graphs, layers, rounds=2)
    one_round = [step for name in "abc" for step in ((name, False), "event", (name, True), "event")]
    assert log == 2 * one_round
    assert emptied == [(256 << 20, at) for at in range(0, len(log), 4)]  # each time before the first of both replays
    assert times == {"fa3": [[20.0, 20.0], [20.0, 20.0]], "balanced": [[20.0, 20.0]]}


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["schedules"]) == 2
    assert capsys.readouterr().err == "schedules are judged on a Hopper GPU with sglang-kernel: no CUDA GPU\n"


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize(
    "more", [[], ["--among-weights", "--no-sweep", "--invariant"]], ids=["KV far", "among weights, invariant"]
)
def test_on_a_gpu(more: list[str], tmp_path: pathlib.Path) -> None:
    """Four short sequences: splits, which FA3's own metadata has not, are worth it in both."""
    if missing := why_not(fa3_metadata.detect_build().build):
        pytest.skip(f"needs a Hopper GPU and sglang-kernel: {missing}")
    out = tmp_path / "schedules.csv"
    run = [sys.executable, "-W", "ignore", "-m", "bench", "schedules", "--only", "4 x 512, 16/2", "--rounds", "3"]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([*run, *more, "--csv", str(out)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with out.open() as file:
        measured = {row["schedule"]: float(row["p50_us"]) for row in csv.DictReader(file)}
    assert list(measured)[:3] == ["none", "fa3", "balanced"]
    assert ("4" in measured) != bool(more)  # one of the uniform sizes
    assert ({schedules.INVARIANT, schedules.ONE_SPLIT} <= set(measured)) == ("--invariant" in more)
    assert all(2 < time < 100 for time in measured.values()), measured
    assert measured["balanced"] < measured["fa3"]
