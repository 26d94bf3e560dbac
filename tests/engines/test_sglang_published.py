"""The adapter on the backends of published SGLangs, whose own code decodes on the CPU."""

from __future__ import annotations

import pathlib
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata.engines.sglang import attach

from ..helpers.published import wheel_or_skip
from ..helpers.sglang_wheel_backend import BUILD, DIM, HEADS, KV_HEADS, WheelBackend
from .test_sglang_contract import VERSIONS

LENGTHS = [300, 45, 4000]


@pytest.fixture(params=VERSIONS)
def wheel(request: pytest.FixtureRequest) -> pathlib.Path:
    return wheel_or_skip("sglang", request.param)


def wanted(call: dict[str, Any], policy: str, **more: Any) -> torch.Tensor:
    """Ours for the arguments of a forward."""
    asked: dict[str, Any] = {
        "batch_size": len(LENGTHS), "max_seqlen_q": call["max_seqlen_q"], "max_seqlen_k": call["page_table"].shape[1],
        "num_heads": HEADS, "num_heads_k": KV_HEADS, "headdim": DIM, "cache_seqlens": call["cache_seqlens"],
        "cu_seqlens_q": call["cu_seqlens_q"], "page_size": 1, "causal": True, "window_size": call["window_size"],
        "policy": policy,
    }  # fmt: skip
    return fa3_metadata.get_scheduler_metadata(**(asked | more), build=BUILD)


@pytest.mark.parametrize("policy", ["fa3", "balanced"])
def test_layers_of_a_kind_share_ours(wheel: pathlib.Path, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = WheelBackend(wheel, monkeypatch)
    attached = attach(runner.backend, BUILD, policy)
    windows = (-1, 127, -1, 127)
    for mode, tokens, more in (("decode", 1, 0), ("verification", 4, 4), ("prefill", 40, 0), ("decode", 1, 0)):
        calls = runner.run(LENGTHS, windows, mode, tokens)
        assert [call["window_size"][0] for call in calls] == list(windows)
        for call in calls:
            assert call["max_seqlen_q"] == tokens
            assert call["cache_seqlens"].tolist() == [one + more for one in LENGTHS]
            assert torch.equal(call["scheduler_metadata"], wanted(call, policy))
        for i in (0, 1):
            assert calls[i]["scheduler_metadata"] is calls[i + 2]["scheduler_metadata"]
    attached.detach()
    without = runner.run(LENGTHS, windows)
    assert all(
        call["scheduler_metadata"] is None or call["scheduler_metadata"].tolist() == [-1] * 9 for call in without
    )


def test_mla(wheel: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = WheelBackend(wheel, monkeypatch, use_mla=True)
    attached = attach(runner.backend, BUILD)
    calls = runner.run(LENGTHS, (-1, -1))
    for call in calls:
        assert call["qv"] is not None
        assert torch.equal(call["scheduler_metadata"], wanted(call, "fa3", headdim=64, headdim_v=512))
    assert calls[0]["scheduler_metadata"] is calls[1]["scheduler_metadata"]
    attached.detach()
    assert all(call["scheduler_metadata"] is None for call in runner.run(LENGTHS, (-1, -1)))
