"""The wrapped forward and plans with batch_invariant: every call, inside a step or not; what cannot be goes to FA3."""

from __future__ import annotations

import logging
import random
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata import MetadataPlan, MetadataPlans, step, wrap_forward
from fa3_metadata.triton_kernels.invariance import VarianceError

from .test_wrapper import BUILD, LENGTHS, asked, layer, made_in, recording_forward

VLLM = "vllm-0.33.0"


def invariant(forward: Any, build: str = BUILD, **options: Any) -> Any:
    return wrap_forward(forward, build, "balanced", batch_invariant=True, **options)


def vllm_forward() -> Any:
    def flash_attn_varlen_func(
        q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, seqused_k=None, causal=False, window_size=None, softcap=0.0,
        block_table=None, scheduler_metadata=None, num_splits=0, fa_version=3,
    ):  # fmt: skip
        calls.append(dict(locals()))
        return q

    calls: list[dict[str, Any]] = []
    flash_attn_varlen_func.calls = calls  # type: ignore[attr-defined]
    return flash_attn_varlen_func


def vllm_layer(queries: list[int], keys: list[int], heads_k: int = 1, window: Any = None) -> dict[str, Any]:
    cache = torch.zeros(2, 16, heads_k, 128, dtype=torch.bfloat16)
    return {
        "q": torch.zeros(sum(queries), 8 * heads_k, 128, dtype=torch.bfloat16), "k": cache, "v": cache,
        "max_seqlen_q": max(queries), "max_seqlen_k": max(keys), "causal": True, "window_size": window,
        "cu_seqlens_q": torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32),
        "seqused_k": torch.tensor(keys, dtype=torch.int32),
        "block_table": torch.zeros(len(keys), -(-max(keys) // 16), dtype=torch.int32),
    }  # fmt: skip


def ragged(queries: int) -> dict[str, Any]:
    """A decode row, one of `queries` tokens, another decode row."""
    q, starts = torch.zeros(queries + 2, 8, 128, dtype=torch.bfloat16), [0, 1, queries + 1, queries + 2]
    return layer(q=q, cu_seqlens_q=torch.tensor(starts, dtype=torch.int32), max_seqlen_q=queries)


def test_outside_of_a_step_too() -> None:
    """Each call makes its own: a layer that FA3 schedules by itself would have splits by the batch."""
    forward = recording_forward()
    wrapped = invariant(forward)
    wrapped(**layer())
    wrapped(**layer())
    first, second = made_in(forward)
    right = fa3_metadata.get_scheduler_metadata(**asked(batch_invariant=True))
    assert torch.equal(first, right)
    assert torch.equal(second, right)
    assert first is not second
    bound = fa3_metadata.metadata_layout(**asked(batch_invariant=True)).num_splits
    assert [call["num_splits"] for call in forward.calls] == [bound, bound]


def test_calls_that_cannot_be_get_one_split_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Once for each reason; a server goes on, whatever the numbers of the batch."""
    forward = recording_forward()
    wrapped = invariant(forward)
    with caplog.at_level(logging.WARNING, logger="fa3_metadata"):
        for queries in (9, 300, 9):
            wrapped(**ragged(queries))
        wrapped(**layer(window_size=(6399, 0)))
        with step():
            wrapped(**layer(window_size=(9000, 0)))
    assert made_in(forward) == [None] * 5
    assert [call["num_splits"] for call in forward.calls] == [1] * 5
    first, second = (record.getMessage() for record in caplog.records)
    assert "max_seqlen_q must be at most 8 with batch_invariant and ragged queries" in first
    assert "decode rows a call of their own" in first
    assert "It is left to FA3, with one split for every sequence" in first
    assert "window_size[0] must be under max_seqlen_k - 1 = 6399" in second


def test_what_the_call_says_stays(caplog: pytest.LogCaptureFixture) -> None:
    forward = recording_forward()
    wrapped = invariant(forward)
    own = torch.zeros(17, dtype=torch.int32)
    wrapped(**ragged(300) | {"num_splits": 7})
    wrapped(**layer(scheduler_metadata=own, num_splits=5))
    wrapped(**layer(ver=4))
    wrapped(**layer(score_mod=len))
    assert [(call["scheduler_metadata"], call["num_splits"]) for call in forward.calls] == [
        (None, 7), (own, 5), (None, 0), (None, 1)
    ]  # fmt: skip
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 4
    for line, part in zip(said, ("max_seqlen_q", "brings scheduler_metadata", "FlashAttention 4", "score_mod given"),
                          strict=True):  # fmt: skip
        assert part in line


def test_numbers_that_mean_the_heuristic_are_no_bound() -> None:
    forward = recording_forward()
    wrapped = invariant(forward)
    for number in (-1, 0, None):
        wrapped(**layer(window_size=(9000, 0), num_splits=number))
    assert [call["num_splits"] for call in forward.calls] == [1] * 3


def test_the_warning_says_what_is_done(caplog: pytest.LogCaptureFixture) -> None:
    forward = recording_forward()
    wrapped = invariant(forward)
    wrapped(**layer(ver=4))
    wrapped(**ragged(300))
    assert [record.getMessage().rpartition("It is left to FA3, ")[2] for record in caplog.records] == [
        "as it is", "with one split for every sequence"
    ]  # fmt: skip


def test_one_mistake_is_one_warning_whatever_its_numbers(caplog: pytest.LogCaptureFixture) -> None:
    wrapped = invariant(recording_forward())
    for count in range(4, 60):
        wrapped(**layer(cache_seqlens=torch.zeros(count, dtype=torch.int32)))
    assert len(caplog.records) == 1


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(
    "wrong",
    [
        {"window_size": ()},
        {"window_size": {}},
        {"page_table": torch.zeros(3, dtype=torch.int32)},
        {"page_table": [[0]]},
        {"q": torch.zeros(8)},
        {"cu_seqlens_q": 5, "max_seqlen_q": 1},
        {"cache_seqlens": torch.zeros(3, dtype=torch.int32).to_sparse()},
    ],
    ids=str,
)
def test_what_cannot_be_read_is_the_forwards_business(wrong: dict[str, Any], batch_invariant: bool) -> None:
    """Which says better what is wrong with it."""
    forward = recording_forward()
    wrapped = wrap_forward(forward, BUILD, "balanced", batch_invariant=batch_invariant)
    with step():
        wrapped(**layer(**wrong))
    assert made_in(forward) == [None]


@pytest.mark.parametrize("left", [2**31 - 3, 2**31 - 2, 2**31 - 1])
def test_the_widest_windows(left: int, caplog: pytest.LogCaptureFixture) -> None:
    """One that no table can be wider than is none in any batch: the forward need not be told of a wider table."""
    forward = vllm_forward()
    invariant(forward, VLLM)(**vllm_layer([1, 1], [900, 70], window=(left, 0)))
    (call,) = forward.calls
    assert call["scheduler_metadata"] is not None
    assert call["max_seqlen_k"] == (left + 2 if left + 2 <= 2**31 - 1 else 900)
    assert not caplog.records


def test_without_the_promise_nothing_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    forward = recording_forward()
    wrapped = wrap_forward(forward, BUILD, "balanced")
    with step(), caplog.at_level(logging.INFO, logger="fa3_metadata"):
        wrapped(**ragged(300))
        wrapped(**layer(window_size=(9000, 0)))
        wrapped(**layer(score_mod=len))
    assert not caplog.records
    assert [call["num_splits"] for call in forward.calls][2] == 0


def test_a_call_that_was_refused_is_not_planned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers come every step: what is known about a call is looked up."""
    from fa3_metadata.triton_kernels import plan

    planned: list[Any] = []
    original = plan.resolve_pack_gqa
    monkeypatch.setattr(plan, "resolve_pack_gqa", lambda *given: planned.append(given) or original(*given))
    wrapped = invariant(recording_forward())
    wrapped(**ragged(123))
    assert planned
    planned.clear()
    for _ in range(3):
        wrapped(**ragged(123))
    assert not planned


def test_a_window_is_kept_where_a_number_says_the_width(caplog: pytest.LogCaptureFixture) -> None:
    """vLLM says how long the longest sequence of the batch is: told more, its FA3 keeps the kernel of the window."""
    forward = vllm_forward()
    wrapped = invariant(forward, VLLM)
    splits = []
    for keys in ([4000], [4000, 9000], [4000, 100], [4000, 4097]):
        wrapped(**vllm_layer([1] * len(keys), keys, window=(4095, 0)))
        call = forward.calls[-1]
        assert call["max_seqlen_k"] == max(4097, *keys)
        layout = fa3_metadata.metadata_layout(
            len(keys), 1, call["max_seqlen_k"], 8, 1, 128, cu_seqlens_q=call["cu_seqlens_q"], page_size=16, causal=True,
            window_size=(4095, 0), build=VLLM, policy="balanced", batch_invariant=True,
        )  # fmt: skip
        rows = fa3_metadata.unpack_metadata(call["scheduler_metadata"], layout)
        splits.append((int(rows["num_splits_dynamic"][0]), call["num_splits"]))
    assert len(set(splits)) == 1
    assert splits[0][0] > 1
    assert not caplog.records
    wrapped(**vllm_layer([1], [4000]))
    assert forward.calls[-1]["max_seqlen_k"] == 4000, "no window, nothing to keep"
    without_pages = vllm_layer([1], [4000], window=(4095, 0)) | {"block_table": None}
    wrapped(**without_pages)
    assert forward.calls[-1]["max_seqlen_k"] == 4000, "an unpaged cache must be as long as it says"


def test_mixed_batches_and_large_ones_of_vllm(caplog: pytest.LogCaptureFixture) -> None:
    forward = vllm_forward()
    wrapped = invariant(forward, VLLM)
    wrapped(**vllm_layer([1, 8], [19802, 8]))
    wrapped(**vllm_layer([1, 9], [19802, 9]))
    wrapped(**vllm_layer([1] * 992, [19802] + [256] * 991))
    wrapped(**vllm_layer([1] * 993, [19802] + [256] * 992))
    assert [call["scheduler_metadata"] is None for call in forward.calls] == [False, True, False, True]
    assert [call["num_splits"] for call in forward.calls] == [128, 1, 128, 1]
    assert [record.getMessage().count("batch_size must be at most 992") for record in caplog.records] == [0, 1]


@pytest.mark.parametrize("build", ["vllm-0.8.5", "vllm-0.9.1"])
def test_a_forward_that_takes_no_bound_is_refused(build: str) -> None:
    with pytest.raises(ValueError, match=r"batch_invariant must be False for a forward of .* takes no num_splits"):
        invariant(vllm_forward(), build)


def test_a_sequence_in_random_batches_is_handed_the_same() -> None:
    rng, forward, seen = random.Random(0), recording_forward(), set()
    wrapped = invariant(forward)
    cache = torch.zeros(3, 64, 1, 128, dtype=torch.bfloat16)
    for _ in range(40):
        batch = rng.choice([1, 3, 64, 300, 1100])
        place, lengths = rng.randrange(batch), [rng.randint(1, 20000) for _ in range(batch)]
        lengths[place] = 9000
        width = rng.choice([max(lengths), 40000])
        wrapped(
            q=torch.zeros(batch, 1, 8, 128, dtype=torch.bfloat16), k_cache=cache, v_cache=cache, causal=True,
            cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
            page_table=torch.zeros(batch, -(-width // 64), dtype=torch.int32),
        )  # fmt: skip
        call = forward.calls[-1]
        layout = fa3_metadata.metadata_layout(
            batch, 1, call["page_table"].shape[1] * 64, 8, 1, 128, page_size=64, causal=True, build=BUILD,
            policy="balanced", batch_invariant=True,
        )  # fmt: skip
        rows = fa3_metadata.unpack_metadata(call["scheduler_metadata"], layout)
        position = rows["varlen_batch_idx"].tolist().index(place)
        seen.add((call["num_splits"], call["pack_gqa"], int(rows["num_splits_dynamic"][position])))
    assert len(seen) == 1, seen


PLAN: dict[str, Any] = {
    "max_batch_size": 1500, "max_seqlen_k": 8192, "num_heads": 8, "num_heads_k": 1, "headdim": 128, "page_size": 64,
    "causal": True, "device": "cpu", "build": BUILD, "policy": "balanced", "batch_invariant": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"build": VLLM}, "max_batch_size must be at most 992 with batch_invariant"),
        ({"build": "sgl-kernel-0.3.16"}, "max_batch_size must be at most 992 with batch_invariant"),
        ({"max_seqlen_q": 9, "varying": ["cu_seqlens_q"]}, "max_seqlen_q must be at most 8 with batch_invariant"),
        ({"window_size": (8191, 0)}, r"window_size\[0\] must be under max_seqlen_k - 1 = 8191"),
        ({"build": "vllm-0.9.1", "max_batch_size": 8}, "batch_invariant must be False for the vllm-0.8.5 build"),
    ],
)
def test_a_plan_that_cannot_be_is_not_made(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        MetadataPlan(**PLAN | change)


def test_batches_of_a_plan_and_other_plans_of_a_layer_agree() -> None:
    seen = set()
    for width, largest in ((8192, 1500), (65536, 4)):
        plan = MetadataPlan(**PLAN | {"max_seqlen_k": width, "max_batch_size": largest})
        for lengths in ([8000], [8000, 5], [100] * 900 + [8000], [8000] + [300] * 1400):
            if len(lengths) > largest:
                continue
            made = plan.update(torch.tensor(lengths, dtype=torch.int32))
            rows = fa3_metadata.unpack_metadata(made, plan.planned(len(lengths))[1].layout)
            position = rows["varlen_batch_idx"].tolist().index(lengths.index(8000))
            seen.add((plan.num_splits, plan.pack_gqa, int(rows["num_splits_dynamic"][position])))
    assert len(seen) == 1, seen


def test_groups_of_layers_are_refused_one_by_one() -> None:
    plans = MetadataPlans([MetadataPlan(**PLAN), MetadataPlan(**PLAN, window_size=(1023, 0))])
    plans.update(LENGTHS)
    assert plans.plans[0].num_splits > plans.plans[1].num_splits > 1
    with pytest.raises(VarianceError, match="window_size"):
        MetadataPlan(**PLAN | {"max_seqlen_k": 1024}, window_size=(1023, 0))


def test_a_narrower_table_of_the_forward_is_refused_under_a_window() -> None:
    """Which FA3 would take for none: another kernel than that of the plan."""
    plan = MetadataPlan(**PLAN, window_size=(4095, 0))
    plan.update(LENGTHS)
    call = layer(window_size=(4095, 0))
    assert plan.forward_arguments(**call)["num_splits"] == plan.num_splits
    with pytest.raises(ValueError, match="causal, window_size and max_seqlen_k must give the schedule"):
        plan.forward_arguments(**call | {"page_table": torch.zeros(3, 64, dtype=torch.int32)})
