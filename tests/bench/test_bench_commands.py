"""python -m bench: its commands, their mistakes, and the plots."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from bench import __main__ as command
from bench import plot, rows

from .test_bench import FACTS, some_rows


@pytest.mark.parametrize("name", ["metadata", "host"])
def test_without_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([name]) == 2
    assert capsys.readouterr().err == f"python -m bench {name} needs a CUDA GPU, and torch finds none here\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "python -m bench COMMAND"),
        (["metadaat"], "python -m bench COMMAND"),
        (["metadata", "--batches", "0,1"], "must be a whole number of at least 1, got '0'"),
        (["metadata", "--batches", "1,"], "must be a whole number of at least 1, got ''"),
        (["metadata", "--heads", "8"], "must be q heads / KV heads"),
        (["metadata", "--heads", "8/3"], "must be q heads / KV heads"),
        (["metadata", "--window", "-1"], "must be a whole number"),
        (["metadata", "--frobnicate"], "unrecognized arguments"),
        (["schedules", "--only", "no such"], "must be part of a workload's name, got 'no such'"),
        (["plot", "nowhere.csv"], "nowhere.csv"),
        (["plot", __file__], "has not the columns"),
    ],
)
def test_mistakes_end_in_exit_code_2(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: object = command.main(arguments)
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert says in capsys.readouterr().err


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in command.COMMANDS)


def test_plot_draws(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    rows.write_csv(tmp_path / "metadata.csv", asdict(FACTS), some_rows())
    assert plot.main([str(tmp_path / "metadata.csv"), "--out", str(tmp_path / "drawn")]) == 0
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert [path.name for path in drawn] == ["metadata-graph.png", "metadata-host.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_plot_says_that_it_needs_matplotlib(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    rows.write_csv(tmp_path / "metadata.csv", asdict(FACTS), some_rows())
    assert plot.main([str(tmp_path / "metadata.csv")]) == 2
    assert "needs matplotlib (pip install matplotlib)" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.alone
def test_what_a_call_costs_the_host() -> None:
    """In microseconds: a launch takes some, and no call hundreds."""
    run = [sys.executable, "-W", "ignore", "-m", "bench", "host", "--turns", "1"]
    done = subprocess.run(run, cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    times = {line[:20].strip(): float(line[20:].split()[0]) for line in done.stdout.splitlines()}
    traced = times.pop("plan again, traced")
    assert list(times) == ["plan again", "function again", "plan first", "function first", "function new"]
    assert all(1 < time < 300 for time in times.values()), times
    assert traced > times["plan again"]


@pytest.mark.gpu
@pytest.mark.alone
def test_on_a_gpu(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "metadata.csv"
    arguments = [sys.executable, "-W", "ignore", "-m", "bench", "metadata", "--quick", "--samples", "5"]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([*arguments, "--out", str(out)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    measured = {row.peer: row.p50 for row in rows.read_csv(out)[1] if row.metric == "graph" and row.batch == 32}
    assert all(0.2 < (time or 0) < 100 for time in measured.values()), measured
    assert measured["ours"] is not None
