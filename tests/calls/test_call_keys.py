"""Layers that ask what came before are not read again, and are answered as if they were."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from fa3_metadata import scopes, step, wrap_forward, wrapper
from fa3_metadata.calls import ForwardCall

from .test_wrapper import BUILD, LENGTHS, layer, made_in, recording_forward

BF16 = torch.bfloat16
CACHE = torch.zeros(3, 64, 1, 128, dtype=BF16)
STARTS = torch.arange(4, dtype=torch.int32)
CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "heads": {"q": torch.zeros(3, 1, 4, 128, dtype=BF16)},
    "queries": {"q": torch.zeros(3, 2, 8, 128, dtype=BF16)},
    "dtype": {"q": torch.zeros(3, 1, 8, 128, dtype=torch.float8_e4m3fn)},
    "head dim": {"q": torch.zeros(3, 1, 8, 64, dtype=BF16), "k_cache": CACHE[..., :64], "v_cache": CACHE[..., :64]},
    "head dim of v": {"v_cache": CACHE[..., :64]},
    "KV heads": {"k_cache": CACHE.view(3, 32, 2, 128), "v_cache": CACHE.view(3, 32, 2, 128)},
    "page size": {"k_cache": CACHE.view(6, 32, 1, 128), "v_cache": CACHE.view(6, 32, 1, 128)},
    "pages": {"page_table": torch.zeros(3, 50, dtype=torch.int32)},
    "no pages": {"page_table": None},
    "lengths": {"cache_seqlens": LENGTHS.clone() + 900},
    "lengths of another type": {"cache_seqlens": LENGTHS.long()},
    "ragged": {"q": torch.zeros(3, 8, 128, dtype=BF16), "cu_seqlens_q": STARTS, "max_seqlen_q": 1},
    "ragged, longer": {"q": torch.zeros(3, 8, 128, dtype=BF16), "cu_seqlens_q": STARTS, "max_seqlen_q": 2},
    "new keys": {"k": torch.zeros(3, 1, 1, 128, dtype=BF16), "v": torch.zeros(3, 1, 1, 128, dtype=BF16)},
    "left padding": {"cache_leftpad": torch.tensor([900, 0, 1], dtype=torch.int32)},
    "no mask": {"causal": False},
    "window": {"window_size": (127, 0)},
    "window in a list": {"window_size": [255, 0]},
    "no window": {"window_size": None},
    "chunk": {"attention_chunk": 256},
    "softcap": {"softcap": 30.0},
    "splits": {"num_splits": 3},
    "not packed": {"pack_gqa": False},
    "margin": {"sm_margin": 12},
    "version": {"ver": 4},
    "mask": {"score_mod": abs},
    "one split": {"num_splits": 1},
    "a margin of one": {"sm_margin": 1},
    "a flag for a number": {"num_splits": True},
    "a fraction": {"sm_margin": 1.0},
    "no lengths": {"cache_seqlens": None},
    "one length": {"cache_seqlens": 70},
    "no tensor": {"q": None},
    "an odd window": {"window_size": 127},
}
NAMES = ("scheduler_metadata", "num_splits", "pack_gqa")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that are read thoroughly."""
    calls: list[Any] = []
    whole = ForwardCall.read
    monkeypatch.setattr(wrapper.ForwardCall, "read", lambda *given: (calls.append(given[0]), whole(*given))[1])
    return calls


def handed(call: dict[str, Any]) -> tuple[Any, ...]:
    metadata, *numbers = (call[name] for name in NAMES)
    return None if metadata is None else metadata.tolist(), *numbers


@pytest.mark.parametrize("policy", ["fa3", "balanced"])
@pytest.mark.parametrize("lengths_stay", [False, True])
def test_every_difference_tells(policy: str, lengths_stay: bool) -> None:
    """In one step with all others, each call is handed what it is handed alone; the second time too."""
    forward = recording_forward()
    wrapped = wrap_forward(forward, BUILD, policy)
    calls = {name: layer(k_cache=CACHE, v_cache=CACHE) | change for name, change in CHANGES.items()}
    alone = {}
    for name, call in calls.items():
        with step(lengths_stay):
            wrapped(**call)
        alone[name] = handed(forward.calls.pop())
    with step(lengths_stay):
        for _ in range(2):
            for name, call in calls.items():
                wrapped(**call)
                assert handed(forward.calls.pop()) == alone[name], name


def test_what_came_before_is_not_read_again(read: list[Any]) -> None:
    forward = recording_forward()
    wrapped = wrap_forward(forward, BUILD)
    table = torch.zeros(3, 100, dtype=torch.int32)
    with step():
        for i in range(10):
            wrapped(**layer(page_table=table, window_size=(127, 0) if i % 2 else (-1, -1), ver=3))
        wrapped(**layer(page_table=table, window_size=[127, 0], ver=3))
        assert len(read) == 2
        for _ in range(5):
            wrapped(**layer(ver=4))  # which passes through
    assert len(read) == 3
    made = made_in(forward)
    assert len({id(one) for one in made[:11]}) == 2
    assert made[11:] == [None] * 5


def test_lengths_that_torch_does_not_count_are_read_each_time(read: list[Any]) -> None:
    forward = recording_forward()
    wrapped = wrap_forward(forward, BUILD, "balanced")
    with torch.inference_mode(), step():
        call = layer(cache_seqlens=LENGTHS.clone())
        for _ in range(3):
            wrapped(**call)
    assert len(read) == 3
    assert len({id(one) for one in made_in(forward)}) == 3


def test_positions_and_names_are_told_apart() -> None:
    forward = recording_forward()
    wrapped = wrap_forward(forward, BUILD)
    call = layer()
    q, k_cache, v_cache = (call.pop(name) for name in ("q", "k_cache", "v_cache"))
    with step():
        wrapped(q, k_cache, v_cache, **call)
        wrapped(v_cache=v_cache, k_cache=k_cache, q=q, **call)
        wrapped(q, k_cache, v_cache, None, None, call.pop("cache_seqlens"), **call)
    first, *others = made_in(forward)
    assert first is not None
    assert all(made is first for made in others)


def test_no_object_of_the_callers_is_kept_by_a_key() -> None:
    class Mask:
        pass

    forward, mask = recording_forward(), Mask()
    alive = weakref.ref(mask)
    with step():
        wrap_forward(forward, BUILD)(**layer(score_mod=mask))
        forward.calls.clear()
        del mask
        gc.collect()
        assert alive() is None


def test_a_wrapper_does_not_answer_for_another() -> None:
    """Of the same names, at the same time: another build, whose rows are others."""
    forwards = [recording_forward() for _ in range(2)]
    wrapped = [wrap_forward(f, build) for f, build in zip(forwards, (BUILD, "vllm-0.33.0"), strict=True)]
    call = layer()
    with step():
        for _ in range(2):
            for one in wrapped:
                one(**call)
    first, second = (made_in(forward) for forward in forwards)
    assert first[0] is first[1]
    assert second[0] is second[1]
    assert first[0].shape != second[0].shape or not torch.equal(first[0], second[0])


def test_many_calls_of_a_long_step_are_bounded() -> None:
    forward = recording_forward()
    wrapped = wrap_forward(forward, BUILD)
    with step():
        scope = scopes.CURRENT_STEP.get()
        assert scope is not None
        for i in range(3000):
            wrapped(**layer(ver=4, sm_margin=i))
        assert 0 < len(scope.answers) <= 1024
