"""What is said of a schedule: one call for each thing to know, and none of it where it is not so."""

from __future__ import annotations

from typing import Any

import pytest
from fa3_metadata.installed import resolve_build
from fa3_metadata.tools.diagnosis import Case, Finding, diagnose
from fa3_metadata.tools.simulator import simulate

from .test_simulator import BUILD, asked


def found(lengths: list[int], build: str = BUILD, **more: Any) -> dict[str, Finding]:
    problem, plan, given = asked(lengths, build, **more)
    now = simulate(problem, plan, given)
    case = Case(problem, resolve_build(build)[1], given, now.costs, now)
    return {one.kind: one for one in diagnose(case)}


def test_short_contexts_are_never_split() -> None:
    said = found([512])["short contexts"]
    assert said.text.startswith("131 of 132 SMs get no work: 1 tiles, none split")
    assert "never splits contexts of up to 4 key blocks (512 keys)" in said.text
    assert "policy balanced splits them: " in said.text
    assert said.saves_us > 1
    assert "short contexts" not in found([512], policy="balanced")
    assert "short contexts" not in found([8000])


def test_a_bound_that_is_too_low() -> None:
    said = found([60000], build="vllm-0.33.0", num_splits=32)["bound on splits"]
    assert "1 sequence would take more than the 32 splits" in said.text
    assert "vLLM's flash_attn_max_num_splits_for_cuda_graph = " in said.text
    assert said.saves_us > 1
    said = found([60000], num_splits=8)["bound on splits"]
    assert ". num_splits = " in said.text
    assert "bound on splits" not in found([60000])
    assert "bound on splits" not in found([60000] * 64, num_splits=32)


def test_windows_counted_whole() -> None:
    said = found([30000, 9000] * 8, window_size=(4095, 0))["window"]
    assert "leaves 528 of 2,448 key blocks to read" in said.text
    assert "policy balanced counts what is read" in said.text
    assert "window" not in found([30000, 9000] * 8)
    assert "window" not in found([300] * 8, window_size=(4095, 0))


def test_more_than_992_sequences() -> None:
    said = found([65536, 65536, *[256] * 1022])["many sequences"]
    assert "one tile of 512 key blocks takes " in said.text
    assert "policy balanced goes on" in said.text
    assert said.saves_us > 100
    said = found([65536, *[256] * 1023], build="vllm-0.33.0")["many sequences"]
    assert "nor does the forward of this build" in said.text
    assert "many sequences" not in found([65536, *[256] * 900])


def test_splits_that_do_not_pay() -> None:
    said = found([640] * 10, num_heads=32, num_heads_k=8, num_splits=8)["combining"]
    assert "more than the splits save. num_splits = 1: " in said.text
    assert "combining" not in found([60000])
    said = found([300] * 12, num_heads=32, num_heads_k=8, num_splits=8)["combining"]
    assert said.text.startswith("nothing is split, and the combine kernel is launched all the same, for 0.3 us. num_")


def test_partial_outputs_over_budget() -> None:
    said = found([900] * 512, num_heads=64, num_heads_k=8, num_splits=128)["partial outputs"]
    assert "makes room for 2,064 MiB" in said.text
    assert "partial outputs" not in found([900] * 8)


def test_what_a_larger_batch_and_another_page_size_would_change() -> None:
    assert "there is room for more" in found([1000])["larger batch"].text
    assert "the card is full" in found([16000] * 256)["larger batch"].text
    assert found([1000])["page size"].text == "another page size would change neither tile nor splits"
    assert "page size" not in found([1000], page_size=None)
    by_tma = found([5000] * 4, num_heads=64, num_heads_k=8, max_seqlen_q=32, page_size=64)["page size"]
    assert "would be loaded by TMA" in by_tma.text


def test_what_costs_most_comes_first() -> None:
    saved = [one.saves_us for one in found([512, 300], num_heads=4).values()]
    assert saved == sorted(saved, reverse=True)
    assert found([]) == {}


@pytest.mark.parametrize("build", ["sgl-kernel-0.3.14.post1", "vllm-0.9.1", "vllm-0.18.1", "sglang-kernel-0.4.5"])
def test_every_build_can_be_diagnosed(build: str) -> None:
    for lengths in ([512], [9000, 100, 60000], [256] * 1100):
        assert found(lengths, build=build)


def test_what_would_not_be_batch_invariant_is_not_played() -> None:
    promise = {"policy": "balanced", "batch_invariant": True}
    said = found([400] * 600, build="vllm-0.33.0", **promise)["larger batch"]
    assert said.text.startswith("twice the sequences could not be batch invariant: batch_size must be at most 992")
    assert "twice the sequences would take" in found([400] * 600, **promise)["larger batch"].text
    # Of 256 rows pages of whole blocks would be loaded by TMA, and by cp.async for one query.
    ragged = {"num_heads": 8, "num_heads_k": 1, "headdim": 256, "max_seqlen_q": 32, "page_size": 64}
    ragged |= {"cu_seqlens_q": True}  # of tensors presence alone counts
    assert "would be loaded by TMA" in found([5000] * 4, **ragged)["page size"].text
    assert "TMA" not in found([5000] * 4, **ragged, **promise)["page size"].text
