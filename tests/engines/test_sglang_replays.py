"""What a recording is told of the graphs that SGLang replays, on a stand-in for its backend."""

from __future__ import annotations

import pathlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fa3_metadata import trace
from fa3_metadata.arguments import LengthTensors
from fa3_metadata.engines.sglang import LAYOUTS, attach
from fa3_metadata.engines.sglang_replays import PREPARES, Replays

from ..helpers.published import wheel_or_skip
from ..helpers.sglang_stand_in import Batch, Sglang
from ..helpers.sglang_wheel_backend import WheelBackend
from ..tools.test_trace import call
from .test_sglang_contract import VERSIONS

BUILD = "sglang-kernel-0.4.2"


def backend_of(world: Sglang, name: str) -> Any:
    """A backend that prepares its replays by a method of this name, called by SGLang as `prepare` does."""
    backend = world.backend()

    def until_0_5_12(bs: int, req_pool_indices: Any, seq_lens: Any, *_: Any, seq_lens_cpu: Any) -> None:
        backend.prepare_graph(Batch(seq_lens.tolist()), capture=False)

    def since_0_5_13(forward_batch: Batch, in_capture: bool = False) -> None:
        backend.prepare_graph(forward_batch, capture=in_capture)

    setattr(backend, name, until_0_5_12 if name == PREPARES[0] else since_0_5_13)
    attach(backend, BUILD)
    return backend


def prepare_capture(backend: Any, name: str, batch: Batch, by_name: bool = True) -> None:
    if name == PREPARES[0]:
        backend.prepare_graph(batch, capture=True)  # by a method of its own
    elif by_name:
        backend.init_forward_metadata_out_graph(batch, in_capture=True)
    else:
        backend.init_forward_metadata_out_graph(batch, True)


def prepare(backend: Any, name: str, batch: Batch) -> None:
    if name == PREPARES[0]:
        lengths, rows = batch.seq_lens, torch.arange(len(batch.seq_lens))
        backend.decode_cuda_graph_metadata[len(rows)].cache_seqlens_int32.copy_(lengths)  # SGLang's own batch
        getattr(backend, name)(len(rows), rows, lengths, int(lengths.sum()), None, "decode", None, seq_lens_cpu=lengths)
    else:
        getattr(backend, name)(batch)


def captured(metadata: Any) -> None:
    """A graph whose metadata is made of these lengths, as `trace.record` notes it during a capture."""
    problem, _, rules = call(metadata.cache_seqlens_int32.tolist())
    assert trace.current is not None
    trace.current._captured[id(metadata),] = problem, rules, LengthTensors(metadata.cache_seqlens_int32)


@pytest.fixture
def recorded(tmp_path: pathlib.Path) -> Any:
    path = trace.start(tmp_path / "steps.trace")

    def steps() -> list[list[int]]:
        trace.stop()
        return [one.lengths.cache_seqlens.tolist() for one in trace.read(path)]

    yield steps
    trace.stop()


@pytest.fixture(params=PREPARES)
def prepares(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_replay_is_recorded_once_with_what_it_read(
    prepares: str, recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = Sglang(monkeypatch, LAYOUTS[0].versions)
    backend, other = backend_of(world, prepares), backend_of(world, prepares)
    for one in (backend, other):
        for lengths in ([1, 1], [1, 1, 1]):
            prepare_capture(one, prepares, Batch(lengths))
            captured(one.forward_metadata)
    prepare(backend, prepares, Batch([300, 5]))
    prepare(backend, prepares, Batch([301, 6]))
    if prepares == PREPARES[1]:
        backend.forward_metadata.cache_seqlens_int32.add_(1000)  # in the graph
    prepare(backend, prepares, Batch([40, 50, 60]))
    backend.init_forward_metadata(Batch([7, 8], speculative=True))  # an eager batch, of tensors of its own
    backend.init_forward_metadata(Batch([9, 10], speculative=True))
    prepare(backend, prepares, Batch([302, 7]))
    if prepares == PREPARES[1]:  # the last one is told of by the next, which does not come
        assert recorded() == [[300, 5], [1301, 1006], [40, 50, 60]]
    else:
        assert recorded() == [[300, 5], [301, 6], [40, 50, 60], [302, 7]]


@pytest.mark.parametrize("part", ["local_attn_metadata", "swa_spec_metadata"])
def test_lengths_of_chunks_and_of_windows(part: str, recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which SGLang keeps one level down."""
    backend = backend_of(Sglang(monkeypatch, LAYOUTS[0].versions), PREPARES[0])
    prepare_capture(backend, PREPARES[0], Batch([1, 1]))
    inner = SimpleNamespace(cache_seqlens_int32=torch.tensor([70, 80], dtype=torch.int32))
    setattr(backend.forward_metadata, part, inner)
    captured(inner)
    prepare(backend, PREPARES[0], Batch([300, 5]))
    assert recorded() == [[70, 80]]


def test_nothing_is_looked_at_while_nothing_records(prepares: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_of(Sglang(monkeypatch, LAYOUTS[0].versions), prepares)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda self: pytest.fail("a recording is not on"))
    prepare_capture(backend, prepares, Batch([1, 1]))
    prepare(backend, prepares, Batch([300, 5]))


def test_a_recording_that_begins_later_hears_of_the_next_replay(
    prepares: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = backend_of(Sglang(monkeypatch, LAYOUTS[0].versions), prepares)
    prepare_capture(backend, prepares, Batch([1, 1]))
    prepare(backend, prepares, Batch([300, 5]))
    path = trace.start(tmp_path / "steps.trace")
    captured(backend.forward_metadata)
    for lengths in ([301, 6], [302, 7]):
        prepare(backend, prepares, Batch(lengths))
    trace.stop()
    wanted = [[301, 6], [302, 7]][: 1 if prepares == PREPARES[1] else 2]
    assert [one.lengths.cache_seqlens.tolist() for one in trace.read(path)] == wanted
    prepare(backend, prepares, Batch([303, 8]))
    trace.start(tmp_path / "later.trace")
    prepare(backend, prepares, Batch([304, 9]))
    trace.stop()
    assert list(trace.read(tmp_path / "later.trace")) == []


def test_a_capture_is_no_replay(recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_of(Sglang(monkeypatch, LAYOUTS[0].versions), PREPARES[1])
    for by_name in (True, False):
        prepare_capture(backend, PREPARES[1], Batch([1, 1]), by_name)
        captured(backend.forward_metadata)
    prepare_capture(backend, PREPARES[1], Batch([1, 1, 1]))
    assert recorded() == []


def test_whatever_goes_wrong_ends_the_recording_alone(
    prepares: str, recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang goes on with what it was answered."""
    backend = backend_of(Sglang(monkeypatch, LAYOUTS[0].versions), prepares)
    prepare_capture(backend, prepares, Batch([1, 1]))
    captured(backend.forward_metadata)
    prepare(backend, prepares, Batch([300, 5]))
    prepare(backend, prepares, Batch([301, 6]))
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda self: 1 // 0)
    with pytest.warns(UserWarning, match="has ended: ZeroDivisionError"):
        prepare(backend, prepares, Batch([302, 7]))
    assert backend.forward_metadata.cache_seqlens_int32.tolist() == [302, 7]
    prepare(backend, prepares, Batch([303, 8]))
    assert recorded() == [[300, 5], [301, 6]][: 1 if prepares == PREPARES[1] else 2]


@pytest.mark.parametrize("version", VERSIONS)
def test_replays_of_a_published_backend(version: str, recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = wheel_or_skip("sglang", version)
    runner = WheelBackend(wheel, monkeypatch)
    runner.backend._get_scheduler_metadata = None  # nothing of the replay depends on it
    runner.backend.init_cuda_graph_state(16, 16)
    replays = Replays(runner.backend)
    for name in PREPARES:
        if hasattr(type(runner.backend), name):
            setattr(runner.backend, name, replays.of_prepare(name, getattr(runner.backend, name)))
    for size in (3, 2):
        runner.prepare_capture(size)
        captured(runner.backend.forward_metadata)
    steps = [[300, 5], [40, 50, 60], [301, 6], [302, 7], [41, 51, 61]]
    for lengths in steps:
        runner.prepare(lengths)
    is_told_later = hasattr(type(runner.backend), PREPARES[1])
    assert recorded() == (steps[:-1] if is_told_later else steps)
