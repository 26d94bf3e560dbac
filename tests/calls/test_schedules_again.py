"""The short way of a call that came before, which only a GPU takes; its launch is in the hands of the test here."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata import api, schedules, trace
from fa3_metadata.schedules import Step
from fa3_metadata.triton_kernels.reference import reference_metadata

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

    def repeat(self: Step, pointers: object, tensors: object) -> Callable[[], bool]:
        return lambda: made.append(self.batch_size) is None

    monkeypatch.setattr(Step, "repeat", repeat)
    api._kinds.clear()
    schedules._schedules_of.cache_clear()
    schedules.step_of.cache_clear()
    return made


@pytest.fixture
def plan(launched: list[int], monkeypatch: pytest.MonkeyPatch) -> fa3_metadata.MetadataPlan:
    """One that takes its tensors for a GPU's, and knows STORE[:6]."""
    shape: dict[str, Any] = {"num_heads": 8, "num_heads_k": 1, "headdim": 128, "build": "sglang-kernel-0.4.2"}
    made = fa3_metadata.MetadataPlan(max_batch_size=8, max_seqlen_k=9000, device="cpu", **shape)
    monkeypatch.setattr(made._group, "_on_cpu", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(3):
        made.update(STORE[:6])
    assert launched == [6], "by the third time it is known"
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
    for _ in range(2):  # also when its own kind is known
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


WRONG_TYPES = [
    ("batch_size", 6.0), ("max_seqlen_k", 9000.0), ("max_seqlen_q", True), ("max_seqlen_q", 1.0), ("num_heads", 8.0),
    ("num_heads_k", True), ("headdim", 128.0), ("page_size", 64.0), ("causal", 1), ("num_splits", True),
    ("pack_gqa", 1), ("sm_margin", False), ("attention_chunk", 0.0), ("has_softcap", 0), ("window_size", (-1.0, -1)),
    ("batch_invariant", 0), ("forward_is_told", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES)
@pytest.mark.parametrize("times", [1, 3])
def test_a_wrong_type_is_refused_also_after_a_good_call(
    name: str, value: object, times: int, launched: list[int]
) -> None:
    """Though it equals the right one, and so does a tuple or a problem that has it."""
    good = {"page_size": 64, "causal": True, "num_splits": 1, "pack_gqa": True}
    out = torch.full((60,), -7, dtype=torch.int32)
    for _ in range(times):
        call(out, **good)
    out.fill_(-7)
    with pytest.raises(TypeError, match=name):
        call(out, **good | {name: value})
    assert out.eq(-7).all()


def test_the_same_call_is_a_launch_and_as_much_of_out_as_the_layout_has(launched: list[int]) -> None:
    exact, larger = torch.empty(25, dtype=torch.int32), torch.empty(60, dtype=torch.int32)
    for out in (exact, larger):
        made = [call(out) for _ in range(6)]
        assert {(one.data_ptr(), one.shape) for one in made} == {(out.data_ptr(), (25,))}
    assert set(launched) == {6}
    assert len(launched) >= 4


def test_a_launch_that_could_not_is_made_the_long_way(launched: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another device is current, say."""
    monkeypatch.setattr(Step, "repeat", lambda *_: lambda: launched.append(0) is not None)
    out = torch.empty(25, dtype=torch.int32)
    for _ in range(5):
        made = call(out.fill_(-7))
    assert launched
    assert torch.equal(made, fa3_metadata.get_scheduler_metadata(**GOOD))


def test_while_steps_are_recorded_every_launch_goes_the_long_way(
    launched: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    out = torch.empty(60, dtype=torch.int32)
    for _ in range(4):
        call(out)
    assert launched == [6]
    trace.start(tmp_path / "steps.trace")
    for _ in range(3):
        call(out)
    trace.stop()
    assert launched == [6]
    assert len(list(trace.read(tmp_path / "steps.trace"))) == 3
    call(out)
    assert launched == [6, 6]


def test_lengths_of_another_batch_size_are_refused_also_after_a_good_call(launched: list[int]) -> None:
    """Of the same address, stride and dtype."""
    out = torch.full((60,), -7, dtype=torch.int32)
    for _ in range(3):
        call(out)
    for name in ("cache_seqlens", "leftpad_k"):
        with pytest.raises(ValueError, match=name):
            call(out, **{name: GOOD[name].as_strided((7,), (1,))} if name == "cache_seqlens" else {name: STORE[:5]})
    assert launched == []


@pytest.mark.parametrize(
    ("other", "wanted"),
    [(STORE[1:7], 6), (STORE[:5], 5), (STORE[:12:2], 6), (STORE.view(torch.int64)[:6], 6)],
    ids=["place", "shape", "stride", "dtype"],
)
def test_a_plan_takes_other_lengths_the_long_way(
    other: torch.Tensor, wanted: int, launched: list[int], plan: fa3_metadata.MetadataPlan
) -> None:
    plan.update(other)
    assert launched == [6]
    assert plan._group.batch_size == wanted


def test_so_does_every_update_of_a_plan(
    launched: list[int], plan: fa3_metadata.MetadataPlan, tmp_path: pathlib.Path
) -> None:
    trace.start(tmp_path / "steps.trace")
    for _ in range(3):
        plan.update(STORE[:6])
    trace.stop()
    assert launched == [6]
    assert len(list(trace.read(tmp_path / "steps.trace"))) == 3
    plan.update(STORE[:6])
    assert launched == [6, 6]


def test_what_is_known_is_bounded(launched: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_MOST_KINDS", 3)
    for name in ("_MOST_STEPS", "_MOST_AGAIN"):
        monkeypatch.setattr(schedules, name, 3)
    out = torch.empty(60, dtype=torch.int32)
    for i in range(8):
        call(out, num_splits=i + 1)
        call(out, max_seqlen_k=9000 + i)
        for _ in range(2):
            call(out, cache_seqlens=STORE[i : i + 6])
    assert len(api._kinds) <= 3
    for _, known in api._kinds.values():
        assert len(known.steps) <= 3
        assert len(known.again.known) <= 3
        assert len(known._families) <= schedules._MOST_FAMILIES


@pytest.mark.parametrize("window", [(-1, -1), (4095, 0)], ids=["full", "window"])
@pytest.mark.parametrize("build", ["sglang-kernel-0.4.2", "sglang-kernel-0.4.5", "vllm-0.33.0"])
def test_sizes_in_any_order_are_as_if_each_came_alone(build: str, window: tuple[int, int]) -> None:
    """Sizes that share a launch, and such that differ in splits, mask or the length of the sort's keys."""
    api._kinds.clear()
    schedules._schedules_of.cache_clear()
    sizes = [
        (3, 65536),
        (4, 65536),
        (4, 2048),
        (300, 2048),
        (4, 65536),
        (140, 2**25),
        (7, 65536),
        (1001, 65536),
        (2, 64),
    ]
    generator = torch.Generator().manual_seed(0)
    for batch_size, longest in [*sizes, *sizes[::-1]]:
        lengths = torch.randint(0, longest + 1, (batch_size,), generator=generator, dtype=torch.int32)
        asked = {
            "batch_size": batch_size, "max_seqlen_q": 1, "max_seqlen_k": longest, "num_heads": 8, "num_heads_k": 1,
            "headdim": 128, "cache_seqlens": lengths, "causal": True, "window_size": window, "build": build,
        }  # fmt: skip
        tensors, problem, _, plan = api.plan_call(asked)
        assert tensors is not None
        right = reference_metadata(problem, plan, schedules.host_lengths(tensors))
        made = fa3_metadata.get_scheduler_metadata(**asked, backend="triton")
        assert made.tolist() == right.tolist(), (batch_size, longest)
