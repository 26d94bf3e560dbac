"""What makes metadata of a scope fit a later layer: the very same lengths, read alike, on the same stream."""

from __future__ import annotations

import weakref

import fa3_metadata
import pytest
import torch
from fa3_metadata import step, wrap_forward, wrapper

from .test_wrapper import BUILD, asked, layer, made_in, recording_forward
from .test_wrapper_safety import Graph

MEMORY = torch.tensor([[5000, 0, 70], [0, 900, 0], [3000, 0, 0]], dtype=torch.int32)
READINGS = {
    "dtype": (MEMORY[0], MEMORY.view(-1)[:6].view(torch.int64)),  # 5000, 0, 70; or 5000, 70, 900
    "stride": (MEMORY[0], MEMORY[:, 0]),  # 5000, 0, 70; or 5000, 0, 3000
}


@pytest.mark.parametrize("what", READINGS)
def test_the_same_memory_read_otherwise_is_other_lengths(what: str) -> None:
    forward, readings = recording_forward(), READINGS[what]
    first, second = readings
    assert (first.data_ptr(), first.shape, first._version) == (second.data_ptr(), second.shape, second._version)
    wrapped = wrap_forward(forward, BUILD)
    with step():
        for lengths in readings:
            wrapped(**layer(cache_seqlens=lengths))
    for lengths, made in zip(readings, made_in(forward), strict=True):
        right = fa3_metadata.get_scheduler_metadata(**asked("fa3", cache_seqlens=lengths.clone()))
        assert torch.equal(made, right)


def test_lengths_live_as_long_as_their_metadata() -> None:
    """Else others may come to lie at their address, with the same shape and as few writes."""
    forward = recording_forward()
    with step():
        lengths = torch.tensor([5000, 70, 900], dtype=torch.int32)
        alive = weakref.ref(lengths)
        wrap_forward(forward, BUILD)(**layer(cache_seqlens=lengths))
        assert made_in(forward)[0] is not None
        forward.calls.clear()
        del lengths
        assert alive() is not None
    assert alive() is None


def test_each_stream_makes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One may not have waited for what another has launched. As if tensors on the CPU were on a GPU."""
    forward = recording_forward()
    wrapped = wrap_forward(forward, BUILD)
    asks = [layer(), layer(window_size=[127, 0]), layer(window_size=(127, 0))]  # the last two ask the same
    with step(lengths_stay=True):
        for stream in ((0, 7), (0, 8), (1, 7), (0, 7), (0, 8), (1, 7)):
            monkeypatch.setattr(wrapper, "_stream_of", lambda _, stream=stream: stream)
            for call in asks:
                wrapped(**call)
    made = [made_in(forward)[start : start + 3] for start in range(0, 18, 3)]
    for first, again in zip(made[:3], made[3:], strict=True):
        assert [id(one) for one in first] == [id(one) for one in again]
        assert first[1] is first[2]
    assert len({id(one) for batch in made for one in batch}) == 6


def test_each_capture_makes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one graph makes is made anew by its replays alone."""
    graph, forward = Graph(monkeypatch), recording_forward()
    wrapped = wrap_forward(forward, BUILD)
    for graph.number in (1, 1, 2, 2):
        wrapped(**layer())
    made = made_in(forward)
    assert made[0] is made[1]
    assert made[2] is made[3]
    assert made[0] is not made[2]
