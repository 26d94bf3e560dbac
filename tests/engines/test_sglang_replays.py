"""What a recording is told of the graphs that SGLang replays, on a stand-in for its backend."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from fa3_metadata import trace
from fa3_metadata.arguments import LengthTensors
from fa3_metadata.engines.sglang import LAYOUTS, attach
from fa3_metadata.engines.sglang_replays import PREPARES

from ..helpers.sglang_stand_in import Batch, Sglang
from ..tools.test_trace import call

BUILD = "sglang-kernel-0.4.2"


def backend_of(world: Sglang, name: str) -> Any:
    """A backend that prepares its replays by a method of this name."""
    backend = world.backend()

    def prepare(batch: Batch, in_capture: bool = False) -> None:
        backend.prepare_graph(batch, capture=in_capture)

    setattr(backend, name, prepare)
    attach(backend, BUILD)
    return backend


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
            getattr(one, prepares)(Batch(lengths), in_capture=True)
            captured(one.forward_metadata)
    replay = getattr(backend, prepares)
    replay(Batch([300, 5]))
    replay(Batch([301, 6]))
    backend.forward_metadata.cache_seqlens_int32.add_(1000)  # as a graph of SGLang 0.5.23 writes them itself
    replay(Batch([40, 50, 60]))
    backend.init_forward_metadata(Batch([7, 8], speculative=True))  # an eager batch, of tensors of its own
    backend.init_forward_metadata(Batch([9, 10], speculative=True))
    replay(Batch([302, 7]))  # is told of by the next one, which does not come
    assert recorded() == [[300, 5], [1301, 1006], [40, 50, 60]]


def test_nothing_is_looked_at_while_nothing_records(prepares: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_of(Sglang(monkeypatch, LAYOUTS[0].versions), prepares)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda self: pytest.fail("a recording is not on"))
    getattr(backend, prepares)(Batch([1, 1]), in_capture=True)
    getattr(backend, prepares)(Batch([300, 5]))


def test_a_recording_that_begins_later_hears_of_the_next_replay(
    prepares: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = backend_of(Sglang(monkeypatch, LAYOUTS[0].versions), prepares)
    getattr(backend, prepares)(Batch([1, 1]), in_capture=True)
    getattr(backend, prepares)(Batch([300, 5]))
    path = trace.start(tmp_path / "steps.trace")
    captured(backend.forward_metadata)
    for lengths in ([301, 6], [302, 7]):
        getattr(backend, prepares)(Batch(lengths))
    trace.stop()
    assert [one.lengths.cache_seqlens.tolist() for one in trace.read(path)] == [[301, 6]]
    getattr(backend, prepares)(Batch([303, 8]))
    trace.start(tmp_path / "later.trace")
    getattr(backend, prepares)(Batch([304, 9]))
    trace.stop()
    assert list(trace.read(tmp_path / "later.trace")) == []
