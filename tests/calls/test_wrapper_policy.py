"""The wrapped forward under policy "balanced": it is handed the bound of splits that its metadata was made with."""

from __future__ import annotations

import sys
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata import step, wrap_forward

from .test_wrapper import BUILD, LENGTHS, asked, layer, made_in, recording_forward

BALANCED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # options of the wrapper, changes to the call
    "free": ({}, {}),
    "short contexts": ({}, {"page_table": torch.zeros(3, 8, dtype=torch.int32), "cache_seqlens": LENGTHS // 20}),
    "bound by the call": ({}, {"num_splits": 6}),
    "one split": ({}, {"num_splits": 1}),
    "batch invariant": ({"batch_invariant": True}, {}),
    "little memory": ({"max_partial_bytes": 3 * 8 * 129 * 4 * 5}, {}),
    "no memory": ({"max_partial_bytes": 0}, {}),
}


@pytest.mark.parametrize("case", BALANCED)
def test_the_forward_gets_the_bound_that_balanced_metadata_was_made_with(case: str) -> None:
    options, change = BALANCED[case]
    forward = recording_forward()
    with step():
        wrap_forward(forward, BUILD, policy="balanced", **options)(**layer(**change))
    (call,) = forward.calls
    problem = asked(**options, num_splits=change.get("num_splits", 0))
    if "page_table" in change:
        problem |= {"max_seqlen_k": 512, "cache_seqlens": change["cache_seqlens"]}
    layout = fa3_metadata.metadata_layout(**problem)
    assert torch.equal(call["scheduler_metadata"], fa3_metadata.get_scheduler_metadata(**problem))
    assert (call["num_splits"], call["pack_gqa"]) == (layout.num_splits, layout.pack_gqa)
    splits = fa3_metadata.unpack_metadata(call["scheduler_metadata"], layout)["num_splits_dynamic"]
    assert 1 <= splits.max() <= call["num_splits"]
    bounds = {"free": 50, "short contexts": 4, "bound by the call": 6, "one split": 1, "batch invariant": 128,
              "little memory": 5, "no memory": 1}  # fmt: skip
    assert call["num_splits"] == bounds[case]


def test_policies_do_not_share_metadata() -> None:
    forward = recording_forward()
    with step():
        for policy in ("fa3", "balanced"):
            wrap_forward(forward, BUILD, policy)(**layer())
    for call, policy in zip(forward.calls, ("fa3", "balanced"), strict=True):
        assert torch.equal(call["scheduler_metadata"], fa3_metadata.get_scheduler_metadata(**asked(policy)))
    assert forward.calls[0]["num_splits"] != forward.calls[1]["num_splits"]


def test_balanced_layers_of_a_step_share() -> None:
    forward = recording_forward()
    wrapped = wrap_forward(forward, BUILD, "balanced")
    with step():
        wrapped(**layer())
        wrapped(**layer())
    first, second = made_in(forward)
    assert first is second


def test_balanced_is_passed_through_like_fa3s() -> None:
    forward = recording_forward()
    wrapped = wrap_forward(forward, BUILD, "balanced")
    own = torch.zeros(17, dtype=torch.int32)
    wrapped(**layer())
    with step():
        wrapped(**layer(ver=4))
        wrapped(**layer(scheduler_metadata=own))
    assert made_in(forward) == [None, None, own]
    assert [call["num_splits"] for call in forward.calls] == [0, 0, 0]


def test_the_constants_are_those_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, devices = recording_forward(), []
    monkeypatch.setattr(
        sys.modules["fa3_metadata.wrapper"], "gpu_name", lambda device: devices.append(device) or "NVIDIA Unheard"
    )
    problems = []
    resolve = sys.modules["fa3_metadata.wrapper"].step_of
    monkeypatch.setattr(
        sys.modules["fa3_metadata.wrapper"], "step_of", lambda *given: problems.append(given[0]) or resolve(*given)
    )
    with step():
        wrap_forward(forward, BUILD, "balanced")(**layer())
        wrap_forward(forward, BUILD)(**layer())
    assert [problem.gpu for problem in problems] == ["NVIDIA Unheard", "NVIDIA H200"]
    assert devices == [torch.device("cpu")]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"policy": "fast"}, ValueError, "policy must be one of fa3, balanced, got 'fast'"),
        ({"batch_invariant": True}, ValueError, 'batch_invariant needs policy "balanced"'),
        ({"policy": "balanced", "batch_invariant": 1}, TypeError, "batch_invariant must be True or False"),
        ({"policy": "balanced", "max_partial_bytes": -1}, ValueError, "max_partial_bytes must be from 0"),
    ],
)
def test_policies_are_checked_at_once(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrap_forward(recording_forward(), BUILD, **options)
    with pytest.raises(error, match=message):
        fa3_metadata.install(wrap_forward=True, build="flash-attn-3-3.0.0", **options)


def test_a_wrapped_forward_keeps_its_policy() -> None:
    wrapped = wrap_forward(recording_forward(), BUILD, "balanced")
    assert wrap_forward(wrapped, BUILD, "balanced") is wrapped
    for other in ({}, {"policy": "balanced", "batch_invariant": True}):
        with pytest.raises(ValueError, match=r"policy must be that of the forward, which is wrapped with .*'balanced'"):
            wrap_forward(wrapped, BUILD, **other)
