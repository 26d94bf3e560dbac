"""Models whose layers read the KV cache of others: as many metadata a step as there are kinds of layers."""

from __future__ import annotations

import functools
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata import step, wrap_forward
from fa3_metadata.schedules import Step

from .test_wrapper import BUILD, LENGTHS, layer, made_in, recording_forward
from .test_wrapper_safety import Graph

FULL, WINDOW = (-1, -1), (511, 0)
Layers = list[tuple[int, tuple[int, int]]]  # the KV cache that each reads, and its window
MODELS: dict[str, Layers] = {
    # 20 layers with KV caches of their own, and 15 that read that of the last one of their kind.
    "Gemma 3n": [(i, FULL if i % 5 == 4 else WINDOW) for i in range(20)]
    + [(19, FULL) if i % 5 == 4 else (18, WINDOW) for i in range(20, 35)],
    # A self-decoder of window layers, and a cross-decoder that reads one cache.
    "YOCO": [(i, WINDOW) for i in range(16)] + [(16, FULL)] * 16,
    # Neighbours share.
    "cross-layer attention": [(i // 2, FULL if i // 2 % 2 else WINDOW) for i in range(24)],
    "one temporary buffer": [(0, FULL)] * 61,
}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The steps of which metadata is made."""
    made: list[Step] = []
    write = Step.write
    monkeypatch.setattr(Step, "write", lambda self, *given: (made.append(self), write(self, *given))[1])
    return made


def calls_of(layers: Layers, lengths: torch.Tensor) -> list[dict[str, Any]]:
    caches = {number: torch.zeros(3, 64, 1, 128, dtype=torch.bfloat16) for number, _ in layers}
    return [
        layer(k_cache=caches[number], v_cache=caches[number], window_size=window, cache_seqlens=lengths)
        for number, window in layers
    ]


def check(forward: Any, layers: Layers, lengths: torch.Tensor) -> None:
    """That each layer has had the metadata of its kind, for these lengths."""
    shape = {"page_size": 64, "causal": True, "build": BUILD}
    right = {
        window: fa3_metadata.get_scheduler_metadata(3, 1, 6400, 8, 1, 128, lengths, window_size=window, **shape)
        for window in {window for _, window in layers}
    }
    for made, (_, window) in zip(made_in(forward), layers, strict=True):
        assert torch.equal(made, right[window])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scope", ["step", "lengths stay", "inference mode"])
def test_a_step_makes_one_of_each_kind(model: str, scope: str, launches: list[Step]) -> None:
    forward, layers = recording_forward(), MODELS[model]
    wrapped = wrap_forward(forward, BUILD)
    with torch.inference_mode(scope == "inference mode"):
        lengths = LENGTHS.clone()
        for _ in range(2):
            with step(lengths_stay=scope != "step"):
                for call in calls_of(layers, lengths):
                    wrapped(**call)
            assert len(launches) == len({window for _, window in layers})
            check(forward, layers, lengths)
            lengths += 1000
            launches.clear()
            forward.calls.clear()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("inference", [False, True])
def test_a_capture_makes_one_of_each_kind(
    model: str, inference: bool, launches: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each step of several in one graph, as of a draft model: what writes the lengths in between is seen there."""
    graph, forward, layers = Graph(monkeypatch), recording_forward(), MODELS[model]

    @functools.wraps(forward)
    def captured(*args: Any, **kwargs: Any) -> Any:
        graph.add(touches_lengths=True)
        return forward(*args, **kwargs)

    wrapped = wrap_forward(captured, BUILD)
    with torch.inference_mode(inference):
        lengths = LENGTHS.clone()
        for _ in range(3):
            for call in calls_of(layers, lengths):
                wrapped(**call)
                graph.add(touches_lengths=False)
            assert len(launches) == len({window for _, window in layers})
            check(forward, layers, lengths)
            lengths.numpy()[:] += 1000  # as a kernel of its own, which torch does not count
            graph.add(touches_lengths=True)
            launches.clear()
            forward.calls.clear()


def test_writes_between_layers_that_share_a_cache_are_noticed() -> None:
    """A draft model of one layer, whose lengths advance in each of its steps."""
    forward, lengths = recording_forward(), LENGTHS.clone()
    wrapped = wrap_forward(forward, BUILD)
    (call,) = calls_of([(0, FULL)], lengths)
    with step():
        for _ in range(4):
            forward.calls.clear()
            wrapped(**call)
            check(forward, [(0, FULL)], lengths)
            lengths += 1000
