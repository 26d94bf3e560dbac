"""`python -m bench`: what it refuses, prints and writes. The timed code runs on a CUDA that only pretends."""

from __future__ import annotations

import contextlib
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata.tools import timing

from bench import first_use, metadata, peers, rows

BUILD = "sglang-kernel-0.4.2"
FACTS = timing.Facts("NVIDIA H200", "1980 MHz", "3201 MHz", "580.1", "2.11", "3.6", BUILD, "2026-11-23")


class PretendedCuda:
    """Counts what is asked of the GPU; an event is a number of microseconds on a clock of its own."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.microseconds = 0.0
        self.replay_takes = 60.0
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = cuda.microseconds

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Any) -> float:
                return float(end.at - self.at) / 1000

        class CUDAGraph:
            def replay(self) -> None:
                cuda.log.append("replay")
                cuda.microseconds += cuda.replay_takes

        class Stream:
            def wait_stream(self, other: object) -> None:
                pass

        self.Event, self.CUDAGraph, self.Stream = Event, CUDAGraph, Stream
        self.current_stream = Stream
        self.stream = contextlib.nullcontext

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def _sleep(self, cycles: int) -> None:
        self.log.append("spin")
        self.microseconds += cycles / 2000

    @contextlib.contextmanager
    def graph(self, graph: object, stream: object) -> Iterator[None]:
        self.log.append("capture")
        yield
        self.log.append("captured")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> PretendedCuda:
    pretended = PretendedCuda()
    for name in ("Event", "CUDAGraph", "Stream", "current_stream", "stream", "synchronize", "_sleep", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(pretended, name))
    return pretended


# ---- timing ----------------------------------------------------------------------------------------------------------


def test_percentiles() -> None:
    assert timing.summary([float(i) for i in range(101)]) == (20.0, 50.0, 80.0)
    assert timing.summary([3.0]) == (3.0, 3.0, 3.0)


def test_a_graph_sample_is_a_replay_over_its_calls(cuda: PretendedCuda) -> None:
    called: list[str] = []
    launches = [lambda name=name: called.append(name) for name in "abc"]
    times = timing.graph_time(launches, calls=7, replays=4, before_replay=lambda: cuda.log.append("before"))
    assert times == pytest.approx([60 / 7] * 4)
    assert called == [*"abc", *"abcabca"]  # once each, then captured in turns
    inside = cuda.log[cuda.log.index("captured") + 2 :]  # after the first replay, which uploads the graph
    assert inside == ["before", "spin", "replay"] * 4


def test_an_eager_sample_holds_neither_the_spin_nor_the_host(cuda: PretendedCuda) -> None:
    def launch() -> None:
        cuda.microseconds += 3

    assert timing.eager_time(launch, calls=5, samples=3) == pytest.approx([3.0] * 3)


def test_host_times(cuda: PretendedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def passes(microseconds: float) -> Callable[[], None]:
        def call() -> None:
            now[0] += microseconds / 1e6

        return call

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", passes(100))
    launches = [passes(10), passes(20)]
    assert timing.host_time(launches, calls=4, samples=2, before=passes(999)) == pytest.approx([15, 15])
    assert timing.end_to_end_time(launches, samples=3, before=passes(999)) == pytest.approx([110, 120, 110])
    assert timing.first_call_time(launches) == pytest.approx([10, 20])


def test_peers_take_turns() -> None:
    asked: list[tuple[str, int]] = []

    def sampler(name: str) -> timing.Sampler:
        def sample(n: int) -> list[float]:
            asked.append((name, n))
            return [1.0] * n

        return sample

    times = timing.interleaved({name: sampler(name) for name in "ab"}, samples=7, rounds=3)
    assert {name: len(samples) for name, samples in times.items()} == {"a": 7, "b": 7}
    assert asked == [("a", 1), ("b", 1), ("a", 2), ("b", 2), ("b", 2), ("a", 2), ("a", 3), ("b", 3)]


def test_facts_never_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_program(*arguments: object, **more: object) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(timing.subprocess, "run", no_such_program)
    facts = timing.gpu_facts()
    assert (facts.sm_clock, facts.memory_clock, facts.driver) == ("unknown",) * 3
    assert facts.torch == torch.__version__
    answer = subprocess.CompletedProcess([], 0, "1980 MHz, 3201 MHz, 580.159\n")
    monkeypatch.setattr(timing.subprocess, "run", lambda *arguments, **more: answer)
    assert timing.gpu_facts().memory_clock == "3201 MHz"
    assert FACTS.folder == "2026-11-23-h200"


# ---- rows and tables -------------------------------------------------------------------------------------------------


def some_rows() -> list[rows.Row]:
    made = []
    for batch in (1, 992, 1024):
        for metric in metadata.METRICS:
            made.append(rows.row_of(batch, "ours", metric, [1.0, 2.0, 3.0], equal=True))
            made.append(rows.row_of(batch, "native", metric, [5.0], equal=batch != 992))
            times = [] if metric == "graph" else [300.0]
            made.append(rows.row_of(batch, "flag_gems", metric, times, equal=True, note="reads back, and waits"))
            made.append(rows.row_of(batch, "floor", metric, [0.5]))
    return made


def test_csv_round_trip(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new" / "metadata.csv"
    rows.write_csv(path, asdict(FACTS) | {"problem": "8/1 heads: causal"}, some_rows())
    lines = path.read_text().splitlines()
    assert lines[0] == "# gpu: NVIDIA H200"
    assert lines[9:12] == [
        "batch,peer,metric,p20_us,p50_us,p80_us,samples,equal,note",
        "1,ours,graph,1.400,2.000,2.600,3,yes,",
        "1,native,graph,5.000,5.000,5.000,1,yes,",
    ]
    assert '1,flag_gems,graph,,,,0,yes,"reads back, and waits"' in lines
    made_on, read = rows.read_csv(path)
    assert made_on["problem"] == "8/1 heads: causal"
    assert read == [rows.Row(**asdict(row) | {"p20": row.p20 and round(row.p20, 3)}) for row in read]
    assert [(row.batch, row.peer, row.metric, row.p50, row.samples, row.equal, row.note) for row in read] == [
        (row.batch, row.peer, row.metric, row.p50, row.samples, row.equal, row.note) for row in some_rows()
    ]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has not the columns batch, peer"):
        rows.read_csv(path)


def test_no_ratio_where_outputs_differ() -> None:
    table = rows.metric_table(some_rows(), "host", peers.TITLES, "ours", "floor").splitlines()
    assert [line.split("  ")[-1].strip() for line in table] == ["ours/floor", "4.00x", "4.00x", "4.00x"]
    assert "5.00 (2.50x)" in table[1]
    assert "5.00 (differs)" in table[2]
    assert "5.00 (2.50x)" in table[3]
    assert len({line.index(")") for line in table[1:]}) == 1
    graph = rows.metric_table(some_rows(), "graph", peers.TITLES, "ours", "floor").splitlines()
    assert graph[1].split() == ["1", "2.00", "5.00", "(2.50x)", "-", "0.50", "4.00x"]


def test_no_ratio_at_all_where_ours_is_wrong() -> None:
    wrong = [rows.row_of(1, "ours", "host", [2.0], equal=False), rows.row_of(1, "native", "host", [5.0], equal=True)]
    table = rows.metric_table(wrong, "host", peers.TITLES, "ours", "floor")
    assert table.splitlines()[1].split() == ["1", "2.00", "(wrong)", "5.00", "(differs)", "-"]


# ---- the whole run ---------------------------------------------------------------------------------------------------


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A wheel whose op is the NumPy model, and nothing for the empty kernels. `off` is added to what it makes."""
    control = {"off": 0}

    def front_end(*by_position: Any, **by_name: Any) -> torch.Tensor:
        made = fa3_metadata.get_scheduler_metadata(*by_position, **by_name, build=BUILD, backend="reference")
        made[0] += control["off"]
        return made

    def op(*everything: Any) -> torch.Tensor:
        batch, max_q, max_k, heads, heads_k, headdim, headdim_v, dtype, lengths, *optional = everything
        absent, (page, new, causal, left, right, chunk, softcap, splits, pack, margin) = optional[:5], optional[5:]
        assert absent == [None] * 5
        assert (headdim_v, dtype, new, chunk, softcap) == (headdim, torch.bfloat16, 0, 0, False)
        return front_end(
            batch, max_q, max_k, heads, heads_k, headdim, lengths, page_size=page, causal=causal,
            window_size=(left, right), num_splits=splits, pack_gqa=pack, sm_margin=margin,
        )  # fmt: skip

    def empty(case: peers.Case, lengths: peers.Lengths, build: str) -> peers.Peer:
        return peers.Peer("floor", [lambda: None], makes="nothing")

    monkeypatch.setattr(peers, "native_op", lambda build: op)
    monkeypatch.setattr(peers, "_front_end", lambda build: front_end)
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    monkeypatch.setitem(peers._MAKERS, "floor", empty)
    monkeypatch.delitem(peers._MAKERS, "empty_grid")
    monkeypatch.setenv("FA3_METADATA_BUILD", BUILD)
    return control


def run(monkeypatch: pytest.MonkeyPatch, out: pathlib.Path, *arguments: str) -> int:
    """`python -m bench metadata`, on the CPU."""
    on_gpu = metadata.run
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(metadata, "gpu_facts", lambda: FACTS)
    monkeypatch.setattr(metadata, "run", lambda *given: on_gpu(*given[:3], torch.device("cpu")))
    monkeypatch.setattr(first_use, "measure_first_use", lambda: {"ours, cold Triton cache": 2.5, "native": "no GPU"})
    return metadata.main(["--batches", "2,1000", "--samples", "5", "--out", str(out), *arguments])


def test_a_run_measures_everything(
    cuda: PretendedCuda,
    wheel: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, tmp_path / "metadata.csv") == 0
    printed = capsys.readouterr().out
    assert "NVIDIA H200; SM clock 1980 MHz" in printed
    assert "8/1 heads, headdim 128, page 64, causal, max_seqlen_k 65536" in printed
    for peer in ("native", "native op", "SGLang path"):
        assert f"equal     {peer} and plan.update: every row, at every batch" in printed
    assert "missing   FlagGems: flag_gems is not installed" in printed
    assert "DIFFERS" not in printed
    for title in metadata.METRICS.values():
        assert title in printed
    assert "    2.500  ours, cold Triton cache" in printed
    assert "        -  native: no GPU" in printed
    made_on, read = rows.read_csv(tmp_path / "metadata.csv")
    assert made_on["gpu"] == "NVIDIA H200"
    measured = {(row.batch, row.peer, row.metric) for row in read if row.p50 is not None and row.samples == 5}
    names = ("ours", "ours_out", "native", "native_op", "sglang", "floor")
    assert measured == {(b, name, metric) for b in (2, 1000) for name in names for metric in metadata.METRICS}
    seen = [row for row in read if row.metric == "host_first_seen"]
    assert {(row.peer, row.samples) for row in seen} == {("ours", 64), ("ours_out", 64)}


def test_a_speed_up_is_refused_where_outputs_differ(
    cuda: PretendedCuda,
    wheel: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wheel["off"] = 1
    assert run(monkeypatch, tmp_path / "metadata.csv", "--quick", "--heads", "32/8") == 1
    printed = capsys.readouterr().out
    assert "DIFFERS   native from plan.update at batch 1000: num_splits_dynamic" in printed
    table = printed.split("host time: ")[1].splitlines()
    assert "(differs)" in table[2]
    assert "(differs)" in table[3]
    assert "equal     plan.update and the NumPy model: every row, at every batch" in printed
    assert all(row.equal is False for row in rows.read_csv(tmp_path / "metadata.csv")[1] if row.peer == "native_op")


def test_what_cannot_be_measured_is_said(
    cuda: PretendedCuda,
    wheel: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_op(build: str) -> None:
        raise RuntimeError("sgl-kernel 0.3.21 cannot make scheduler metadata\nmore")

    monkeypatch.setattr(peers, "native_op", no_op)
    assert run(monkeypatch, tmp_path / "metadata.csv", "--quick", "--window", "4095") == 0
    printed = capsys.readouterr().out
    assert "missing   native op: sgl-kernel 0.3.21 cannot make scheduler metadata\n" in printed
    assert "missing   SGLang path: SGLang makes no metadata for layers with a window" in printed
    assert "equal     native and plan.update" in printed


def test_flag_gems_is_no_error_of_ours(
    cuda: PretendedCuda,
    wheel: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def port(*by_position: Any, **by_name: Any) -> torch.Tensor:
        assert by_name == {"page_size": 64, "is_causal": True, "window_size_left": -1, "window_size_right": -1}
        return torch.full((by_position[0] + 1,), 77, dtype=torch.int32)

    monkeypatch.setattr(peers, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "flag_gems", SimpleNamespace(get_scheduler_metadata=port))
    assert run(monkeypatch, tmp_path / "metadata.csv", "--quick") == 0
    printed = capsys.readouterr().out
    assert "DIFFERS   FlagGems from plan.update at batch 2: num_splits_dynamic" in printed
    assert "graph     FlagGems is not in it: reads a device value back" in printed
    assert "(differs)" in printed
    found = {row.metric: row for row in rows.read_csv(tmp_path / "metadata.csv")[1] if row.peer == "flag_gems"}
    assert (found["graph"].p50, found["graph"].note.split(",")[0]) == (None, "reads a device value back")
    assert found["host"].equal is False


def test_flag_gems_splits_are_compared_in_batch_order() -> None:
    case = peers.Case(3)
    lengths = torch.tensor([300, 60000, 7000], dtype=torch.int32)
    arguments = case.arguments(lengths) | {"build": BUILD}
    layout = fa3_metadata.metadata_layout(**arguments)
    ours = fa3_metadata.get_scheduler_metadata(**arguments)
    found = fa3_metadata.unpack_metadata(ours, layout)
    splits = [0, 0, 0]
    for place, sequence in enumerate(found["varlen_batch_idx"].tolist()):
        splits[sequence] = int(found["num_splits_dynamic"][place])
    theirs = torch.tensor([0, *splits], dtype=torch.int32)
    assert splits[1] > splits[0]
    assert peers.differing_splits(layout, ours, theirs) == []
    theirs[2] += 1
    assert peers.differing_splits(layout, ours, theirs) == ["num_splits_dynamic"]
    assert peers.differing_splits(layout, ours, theirs[:1]) == ["it makes 0 of 3 num_splits_dynamic"]


def test_rows_are_compared_without_their_padding() -> None:
    arguments = peers.Case(3).arguments(torch.tensor([300, 60000, 7000], dtype=torch.int32)) | {"build": BUILD}
    layout = fa3_metadata.metadata_layout(**arguments)
    ours = fa3_metadata.get_scheduler_metadata(**arguments)
    theirs = ours.clone()
    theirs[3] = -1  # the padding of the first row
    assert peers.differing_rows(layout, ours, theirs) == []
    theirs[[4, -1]] = -1
    assert peers.differing_rows(layout, ours, theirs) == ["num_m_blocks", "semaphore"]
    assert peers.differing_rows(layout, ours, ours[:-1]) == [f"length {layout.size - 1} instead of {layout.size}"]


def test_lengths_are_never_zero_and_are_drawn_anew() -> None:
    lengths = peers.Lengths(peers.Case(5, max_seqlen_k=9), torch.device("cpu"), sets=4)
    before = torch.stack(lengths.sets).clone()
    lengths.redraw()
    after = torch.stack(lengths.sets)
    assert not torch.equal(before, after)
    assert after.min() >= 1
    assert after.max() <= 9
    assert all(row.is_contiguous() for row in lengths.sets)


def test_first_use_says_why_there_is_none() -> None:
    found = first_use._in_fresh_process(["native"], {"FA3_METADATA_BUILD": "none"})
    assert isinstance(found, str)
