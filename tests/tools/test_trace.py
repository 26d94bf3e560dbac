"""Recordings of an engine's steps: nothing is waited for, nothing is lost that was said to be kept, nothing raises."""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fa3_metadata import trace
from fa3_metadata.api import plan_call
from fa3_metadata.tools import cli, trace_report

BUILD = "sglang-kernel-0.4.2"


@pytest.fixture(autouse=True)
def _stopped() -> Iterator[None]:
    yield
    trace.stop()


def call(lengths: list[int], window: int | None = None, **more: Any) -> tuple[Any, Any, Any]:
    """What is recorded of a call: problem, tensors, rules."""
    arguments = {"batch_size": len(lengths), "max_seqlen_q": 1, "max_seqlen_k": 65536, "num_heads": 8,
                 "num_heads_k": 1, "headdim": 128, "page_size": 64, "causal": True, "build": BUILD,
                 "cache_seqlens": torch.tensor(lengths, dtype=torch.int32),
                 "window_size": (-1, -1) if window is None else (window, 0)} | more  # fmt: skip
    tensors, problem, rules, _ = plan_call(arguments)
    return problem, tensors, rules


def record_steps(path: pathlib.Path, count: int = 60) -> pathlib.Path:
    """Steps of two kinds of layers, with one long sequence from the middle on."""
    trace.start(path)
    for step in range(count):
        lengths = [1000 + step, 300 + step, *([50_000 + step] if step >= count // 2 else [])]
        for window in (None, 1023):
            trace.record(*call(lengths, window))
    trace.stop()
    return path


def test_what_is_recorded_is_read_back(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "steps.trace"
    padding = torch.tensor([3, 0], dtype=torch.int64)
    assert trace.start(path) == path
    assert trace.is_on()
    first, second = call([900, 5000]), call([901, 5001], leftpad_k=padding, build="vllm-0.33.0")
    for one in (first, second, first):
        trace.record(*one)
    trace.stop()
    assert not trace.is_on()
    steps = list(trace.read(path))
    assert [one.problem for one in steps] == [first[0], second[0], first[0]]
    assert [one.rules for one in steps] == [first[2], second[2], first[2]]
    assert [one.lengths.cache_seqlens.tolist() for one in steps] == [[900, 5000], [901, 5001], [900, 5000]]
    assert steps[1].lengths.leftpad_k is not None
    assert steps[1].lengths.leftpad_k.tolist() == [3, 0]
    assert steps[0].lengths.leftpad_k is None
    assert 0 <= steps[0].seconds <= steps[2].seconds


def test_the_lengths_are_those_of_the_moment(tmp_path: pathlib.Path) -> None:
    trace.start(tmp_path / "steps.trace")
    problem, tensors, rules = call([900, 5000])
    for _ in range(3):
        trace.record(problem, tensors, rules)
        tensors.cache_seqlens.add_(1)
    trace.stop()
    found = [one.lengths.cache_seqlens.tolist() for one in trace.read(tmp_path / "steps.trace")]
    assert found == [[900, 5000], [901, 5001], [902, 5002]]


def test_nothing_is_done_while_nothing_records() -> None:
    one = call([900])
    trace.record(*one)
    trace.replayed()
    started = time.perf_counter()
    for _ in range(10_000):
        trace.record(*one)
    assert (time.perf_counter() - started) / 10_000 < 3e-6


def test_a_file_that_is_there_stays(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "steps.trace"
    path.write_text("mine")
    other = trace.start(path)
    assert other == tmp_path / f"steps-{os.getpid()}.trace"
    trace.record(*call([5]))
    assert trace.start(path).name == f"steps-{os.getpid()}-1.trace", "the first is stopped, and kept"
    assert path.read_text() == "mine"
    assert len(list(trace.read(other))) == 1
    with pytest.raises(OSError, match="No such file"):
        trace.start(tmp_path / "no" / "such" / "folder.trace")
    assert not trace.is_on()


def test_a_file_has_a_limit(tmp_path: pathlib.Path) -> None:
    path = trace.start(tmp_path / "steps.trace", most_bytes=4000)
    recorder = trace.current
    assert recorder is not None
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        trace.record(*call(torch.randint(1, 9000, (256,), generator=generator).tolist()))
    trace.stop()
    assert path.stat().st_size < 4000 + 150_000  # what gzip had not written yet
    steps = len(list(trace.read(path)))
    assert recorder.steps == steps < 300
    assert recorder.left_out == 300 - steps


def test_a_file_that_was_cut_off(tmp_path: pathlib.Path) -> None:
    whole = record_steps(tmp_path / "whole.trace", 400).read_bytes()
    cut = tmp_path / "cut.trace"
    cut.write_bytes(whole[: len(whole) // 2])
    assert 50 < len(list(trace.read(cut))) < 800


def zipped(text: str) -> bytes:
    """Without the time of day, which gzip writes into its header."""
    return gzip.compress(text.encode(), mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"no gzip", "Not a gzipped file", id="no gzip"),
        pytest.param(zipped("{}\n"), "none of fa3_metadata.trace", id="no version"),
        pytest.param(zipped('{"fa3_metadata_trace": 2}\n'), "of another version", id="another version"),
        pytest.param(
            zipped('{"fa3_metadata_trace": 1}\n{"of": 3, "at": 1}\n'),
            "cannot be read as a recording",
            id="a step of no problem",
        ),
        pytest.param(zipped("[1]\n"), "none of fa3_metadata.trace", id="a list"),
        pytest.param(zipped(""), "none of fa3_metadata.trace", id="empty"),
    ],
)
def test_a_file_that_is_no_recording(tmp_path: pathlib.Path, content: bytes, message: str) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(trace.read(path))
    assert str(path) in str(error.value)


def test_a_failure_ends_the_recording_and_not_the_engine(tmp_path: pathlib.Path) -> None:
    trace.start(tmp_path / "steps.trace")
    problem, tensors, rules = call([900])
    trace.record(problem, tensors, rules)
    with pytest.warns(UserWarning, match=r"the recording to .* has ended: NotImplementedError: .*meta"):
        trace.record(problem, tensors._replace(cache_seqlens=torch.empty(1, device="meta", dtype=torch.int32)), rules)
    trace.record(problem, tensors, rules)
    trace.stop()
    assert len(list(trace.read(tmp_path / "steps.trace"))) == 1


def test_nor_where_warnings_are_errors(tmp_path: pathlib.Path) -> None:
    path = trace.start(tmp_path / "steps.trace")
    problem, tensors, rules = call([900])
    trace.record(problem, tensors, rules)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace.record(problem, tensors._replace(cache_seqlens=torch.empty(1, device="meta", dtype=torch.int32)), rules)
    assert len(list(trace.read(path))) == 1, "it has been closed"
    trace.stop()


class FakeGPU:
    """Tensors on a GPU whose copies arrive when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing, self.arrived, self.calls = False, False, list[str]()
        gpu = self

        class Event:
            def record(self) -> None:
                gpu.calls.append("record")

            def query(self) -> bool:
                return gpu.arrived

            def synchronize(self) -> None:
                gpu.calls.append("synchronize")

        empty = torch.empty
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "device", lambda device: __import__("contextlib").nullcontext())
        monkeypatch.setattr(
            trace.torch, "empty", lambda shape, dtype, pin_memory: gpu.pinned(empty(shape, dtype=dtype), pin_memory)
        )

    def pinned(self, tensor: torch.Tensor, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        self.calls.append("pinned")
        return tensor

    def tensors(self, lengths: list[int]) -> Any:
        on_gpu = OnGPU(torch.tensor(lengths, dtype=torch.int32))
        names = ("cu_seqlens_q", "cu_seqlens_k_new", "seqused_q", "leftpad_k")
        return SimpleNamespace(cache_seqlens=on_gpu, **dict.fromkeys(names))


class OnGPU(torch.Tensor):
    is_cuda = True  # type: ignore[assignment]


def test_the_gpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    gpu = FakeGPU(monkeypatch)
    path = trace.start(tmp_path / "steps.trace")
    problem, _, rules = call([900, 5000])
    for step in range(5):
        trace.record(problem, gpu.tensors([900 + step, 5000]), rules)
    assert "synchronize" not in gpu.calls
    assert gpu.calls.count("record") == 5
    recorder = trace.current
    assert recorder is not None
    assert recorder.steps == 0, "none has arrived"
    gpu.arrived = True
    trace.record(problem, gpu.tensors([905, 5000]), rules)
    assert recorder.steps == 5
    trace.stop()
    assert gpu.calls.count("synchronize") == 1, "for the last"
    assert [one.lengths.cache_seqlens[0] for one in trace.read(path)] == [900, 901, 902, 903, 904, 905]


def test_copies_that_do_not_arrive_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    gpu = FakeGPU(monkeypatch)
    monkeypatch.setattr(trace, "_MOST_PENDING", 4)
    trace.start(tmp_path / "steps.trace")
    problem, _, rules = call([900])
    for _ in range(10):
        trace.record(problem, gpu.tensors([900]), rules)
    recorder = trace.current
    assert recorder is not None
    assert (len(recorder._pending), recorder.left_out) == (4, 6)


def test_nothing_is_done_in_a_capture_and_replays_are_told_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    gpu = FakeGPU(monkeypatch)
    path = trace.start(tmp_path / "steps.trace")
    gpu.capturing = True
    (problem, _, rules), other = call([900, 5000]), call([7])[0]
    lengths = gpu.tensors([900, 5000])
    trace.record(problem, lengths, rules)
    trace.record(problem, lengths, rules)  # another layer of the graph
    trace.record(other, gpu.tensors([7]), rules)
    assert gpu.calls == []
    gpu.capturing, gpu.arrived = False, True
    trace.replayed(batch_size=2)
    lengths.cache_seqlens.add_(1)
    trace.replayed(batch_size=2)
    trace.replayed()
    trace.stop()
    found = [one.lengths.cache_seqlens.tolist() for one in trace.read(path)]
    assert found == [[900, 5000], [901, 5001], [901, 5001], [7]]


def test_the_environment_starts_it_and_forks_have_files_of_their_own(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "steps.trace"
    script = """
import os, torch, fa3_metadata
from fa3_metadata import trace
from tests.tools.test_trace import call
trace.record(*call([900]))
child = os.fork()
trace.record(*call([901 if child else 902]))
if not child:
    trace.stop()
    os._exit(0)
os.waitpid(child, 0)
print(child)
"""
    environment = os.environ | {trace.VARIABLE: str(path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    found = [one.lengths.cache_seqlens.tolist() for one in trace.read(path)]
    assert found == [[900], [901]]
    of_child = [
        one.lengths.cache_seqlens.tolist() for one in trace.read(tmp_path / f"steps-{done.stdout.strip()}.trace")
    ]
    assert of_child == [[902]]


# ---- explain --trace -------------------------------------------------------------------------------------------------


def test_a_recording_is_summed_up(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    path = record_steps(tmp_path / "steps.trace")
    assert cli.main(["explain", "--trace", str(path)]) == 0
    printed = capsys.readouterr().out
    for expected in ("60 steps in ", "60 of them simulated on H200", "kind 1      8/1 heads, head dim 128, bfloat16",
                     "window 1023,0; policy fa3; 2 to 3 sequences", "us a layer: launch 5.1, SMs at work",
                     "policies    a layer of each kind", "worst       step"):  # fmt: skip
        assert expected in printed
    assert cli.main(["explain", "--trace", str(path), "--json", "--gpu", "h100"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["steps"], len(said["kinds"])) == (60, 2)
    assert said["policies_us"]["balanced"] < said["policies_us"]["fa3"] == pytest.approx(said["as_it_was_us"])
    assert 1 <= len(said["worst"]) <= 10
    saved = [one["saves_us"] for one in said["worst"]]
    assert saved == sorted(saved, reverse=True)


def test_a_step_has_one_layer_of_each_kind(tmp_path: pathlib.Path) -> None:
    steps = trace_report.steps_of(trace.read(record_steps(tmp_path / "steps.trace", 10)))
    assert [len(step.layers) for step in steps] == [2] * 10
    assert [step.number for step in steps] == list(range(10))
    assert [step.sequences for step in steps] == [2] * 5 + [3] * 5
    assert len(trace_report.some_of(steps, 4)) == 4


def test_the_page_of_a_recording(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = record_steps(tmp_path / "steps.trace")
    assert cli.main(["explain", "--trace", str(path), "--plot", str(tmp_path / "out.html")]) == 0
    text = (tmp_path / "out.html").read_text()
    assert len(text.encode()) < 2_000_000
    assert '"name":"step 0"' in text
    assert "3 sequences, the longest of 50,059 keys" in text


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_lines_over_the_steps(tmp_path: pathlib.Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = record_steps(tmp_path / "steps.trace")
    assert cli.main(["explain", "--trace", str(path), "--plot", str(tmp_path / f"out{suffix}")]) == 0
    assert (tmp_path / f"out{suffix}").stat().st_size > 10_000


def test_a_recording_without_steps(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace.start(tmp_path / "steps.trace")
    trace.record(*call([0, 0]))  # a warm-up
    trace.stop()
    with pytest.raises(SystemExit):
        cli.main(["explain", "--trace", str(tmp_path / "steps.trace")])
    assert "holds no steps" in capsys.readouterr().err
