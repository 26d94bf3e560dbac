"""The short way of a call that came before, which only a GPU takes; its launch is in the hands of the test here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata import known_calls
from fa3_metadata.resolved import ResolvedCall

STORE = torch.arange(1, 41, dtype=torch.int32) * 200
GOOD: dict[str, Any] = {
    "batch_size": 6, "max_seqlen_q": 1, "max_seqlen_k": 9000, "num_heads": 8, "num_heads_k": 1, "headdim": 128,
    "cache_seqlens": STORE[:6], "leftpad_k": STORE[:6] // 2, "build": "sglang-kernel-0.4.2", "backend": "triton",
}  # fmt: skip
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("batch_size", {"batch_size": 5, "cache_seqlens": STORE[:5], "leftpad_k": STORE[:5]}),
    ("max_seqlen_k", {"max_seqlen_k": 8500}),
    ("mask", {"causal": True}),
    ("policy", {"policy": "balanced"}),
    ("build", {"build": "vllm-0.33.0"}),
    ("backend", {"backend": "reference"}),
    ("address", {"cache_seqlens": STORE[1:7]}),
    ("stride", {"cache_seqlens": STORE[:12:2]}),
    ("dtype", {"cache_seqlens": STORE.view(torch.int64)[:6]}),  # same address, shape and strides
    ("leftpad_k", {"leftpad_k": STORE[:6] // 3}),
    ("no leftpad_k", {"leftpad_k": None}),
    ("seqused_q", {"seqused_q": STORE[:6] // STORE[:6]}),
]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch size of every launch that was made the short way."""
    if torch.cuda.is_available():
        pytest.skip("tensors are the CPU's, where this GPU's kernels do not run")
    made: list[int] = []

    def repeat(self: ResolvedCall, tensors: object, out: torch.Tensor) -> Callable[[], bool]:
        return lambda: made.append(self.batch_size) is None

    monkeypatch.setattr(ResolvedCall, "repeat", repeat)
    known_calls._kinds.clear()
    return made


def call(out: torch.Tensor, **more: Any) -> torch.Tensor:
    return fa3_metadata.get_scheduler_metadata(**GOOD | more, out=out)


@pytest.mark.parametrize("more", [more for _, more in OTHERS], ids=[name for name, _ in OTHERS])
def test_another_call_goes_the_long_way(more: dict[str, Any], launched: list[int]) -> None:
    out = torch.empty(60, dtype=torch.int32)
    for _ in range(3):  # its kind becomes known, then the call, then its launch
        call(out)
    assert launched == []
    assert call(out).shape == call(torch.empty_like(out)).shape
    assert launched == [6]
    out.fill_(-7)
    made = call(out, **more)
    assert launched == [6]
    assert torch.equal(made, fa3_metadata.get_scheduler_metadata(**GOOD | more))


def test_what_was_known_before_at_another_size_is_not_taken_for_this_one(launched: list[int]) -> None:
    """Of the same tensors: a shorter max_seqlen_k may mean another bound on splits."""
    out = torch.empty(60, dtype=torch.int32)
    for longest in (9000, 100, 9000, 9000):
        call(out, max_seqlen_k=longest)
    made = call(out.fill_(-7), max_seqlen_k=100)
    assert torch.equal(made, fa3_metadata.get_scheduler_metadata(**GOOD | {"max_seqlen_k": 100}))
    call(out)
    assert launched == [6]


def test_the_same_call_is_a_launch_and_as_much_of_out_as_the_layout_has(launched: list[int]) -> None:
    exact, larger = torch.empty(25, dtype=torch.int32), torch.empty(60, dtype=torch.int32)
    for out in (exact, larger):
        made = [call(out) for _ in range(6)]
        assert {(one.data_ptr(), one.shape) for one in made} == {(out.data_ptr(), (25,))}
    assert set(launched) == {6}
    assert len(launched) >= 4


def test_a_launch_that_could_not_is_made_the_long_way(launched: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another device is current, say."""
    monkeypatch.setattr(ResolvedCall, "repeat", lambda *_: lambda: launched.append(0) is not None)
    out = torch.empty(25, dtype=torch.int32)
    for _ in range(5):
        made = call(out.fill_(-7))
    assert launched
    assert torch.equal(made, fa3_metadata.get_scheduler_metadata(**GOOD))


def test_what_is_known_is_bounded(launched: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_MOST_KINDS", "_MOST_SIZES", "_MOST_AGAIN"):
        monkeypatch.setattr(known_calls, name, 3)
    out = torch.empty(60, dtype=torch.int32)
    for i in range(8):
        call(out, num_splits=i + 1)
        call(out, max_seqlen_k=9000 + i)
        for _ in range(2):
            call(out, cache_seqlens=STORE[i : i + 6])
    assert len(known_calls._kinds) <= 3
    for calls in known_calls._kinds.values():
        assert len(calls._resolved) <= 3
        assert len(calls._again) <= 3
