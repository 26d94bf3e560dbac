"""Plans: what they make, what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata import MetadataPlan, MetadataPlans
from fa3_metadata.arguments import LengthTensors
from fa3_metadata.schedules import Step
from fa3_metadata.triton_kernels import launch

BUILD = "sglang-kernel-0.4.2"
LENGTHS = torch.tensor([8000, 200], dtype=torch.int32)
LAYER: dict[str, Any] = {
    "q": torch.zeros(2, 1, 8, 128, dtype=torch.bfloat16), "k_cache": torch.zeros(9, 64, 1, 128, dtype=torch.bfloat16),
    "v_cache": torch.zeros(9, 64, 1, 128, dtype=torch.bfloat16), "cache_seqlens": LENGTHS, "causal": True,
    "page_table": torch.zeros(2, 128, dtype=torch.int32),
}  # fmt: skip
SHAPE: dict[str, Any] = {"num_heads": 8, "num_heads_k": 1, "headdim": 128, "page_size": 64, "max_seqlen_k": 8192}
BUILDS = ("sgl-kernel-0.3.21", "sglang-kernel-0.4.2", "vllm-0.33.0")


def plan(**change: Any) -> MetadataPlan:
    return MetadataPlan(**({"max_batch_size": 1100, "device": "cpu", "causal": True} | SHAPE | change))


def lengths(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 8193, (batch,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("window", [(-1, -1), (1023, 0)])
def test_batches_that_grow_and_shrink(build: str, window: tuple[int, int]) -> None:
    made = plan(build=build, window_size=window)
    for seed, batch in enumerate((3, 64, 1, 992, 1100, 0, 7)):
        cache_seqlens = lengths(batch, seed)
        metadata = made.update(cache_seqlens)
        alone = fa3_metadata.get_scheduler_metadata(
            batch, 1, 8192, 8, 1, 128, cache_seqlens, page_size=64, causal=True, window_size=window, build=build
        )
        assert torch.equal(metadata, alone)
        assert made.metadata.data_ptr() == metadata.data_ptr()


def test_the_forward_gets_the_numbers_that_the_metadata_was_made_with() -> None:
    made = plan(build="sglang-kernel-0.4.2", sm_margin=4)
    metadata = made.update(lengths(5))
    assert made.forward_arguments() == {
        "scheduler_metadata": metadata, "num_splits": made.num_splits, "pack_gqa": True, "sm_margin": 4,
    }  # fmt: skip
    assert (
        made.num_splits
        == fa3_metadata.api.plan_call(
            SHAPE | {"batch_size": 5, "max_seqlen_q": 1, "causal": True, "sm_margin": 4, "build": "sglang-kernel-0.4.2"}
        )[3].num_splits
    )


def test_vllm_gets_only_what_its_forward_takes() -> None:
    made = plan(build="vllm-0.33.0", num_splits=16)
    made.update(lengths(5))
    assert set(made.forward_arguments()) == {"scheduler_metadata", "num_splits"}
    with pytest.raises(ValueError, match=r"pack_gqa must be None for vllm-0.33.0, whose forward takes none, got True"):
        plan(build="vllm-0.33.0", pack_gqa=True)


def test_varying_tensors() -> None:
    made = plan(varying=("cu_seqlens_q", "leftpad_k"), max_seqlen_q=4, build="sglang-kernel-0.4.2")
    more = {"cu_seqlens_q": torch.tensor([0, 4, 4, 7]), "leftpad_k": torch.tensor([0, 9, 100])}
    cache_seqlens = torch.tensor([500, 9, 7000])
    alone = fa3_metadata.get_scheduler_metadata(
        3, 4, 8192, 8, 1, 128, cache_seqlens, page_size=64, causal=True, build="sglang-kernel-0.4.2", **more
    )
    assert torch.equal(made.update(cache_seqlens, **more), alone)


MISFITS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cache_seqlens": lengths(1101)}, ValueError, "at most max_batch_size = 1100 sequences, got 1101"),
    ({"cache_seqlens": lengths(4).float()}, TypeError, "cache_seqlens must have dtype int32 or int64"),
    ({"cache_seqlens": lengths(4)[None]}, TypeError, "cache_seqlens must be a 1-D tensor"),
    ({"cache_seqlens": 4}, TypeError, "cache_seqlens must be a 1-D tensor, got 4"),
    ({"cache_seqlens": lengths(4).to("meta")}, ValueError, "cache_seqlens must be on cpu, got meta"),
    ({"leftpad_k": lengths(4)}, ValueError, "leftpad_k must be None, as `varying` says, got Tensor"),
    ({"cu_seqlens_q": lengths(4)}, ValueError, r"cu_seqlens_q must have shape \(5,\), got \(4,\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), MISFITS)
def test_updates_that_do_not_fit(change: dict[str, Any], error: type[Exception], message: str) -> None:
    made = plan()
    before = made.update(lengths(4)).clone()
    with pytest.raises(error, match=message):
        made.update(**({"cache_seqlens": lengths(4, 1)} | change))
    assert torch.equal(made.metadata, before)


def test_a_varying_tensor_must_be_given() -> None:
    with pytest.raises(ValueError, match="leftpad_k must be a tensor, as `varying` says, got NoneType"):
        plan(varying=("leftpad_k",)).update(lengths(4))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"max_batch_size": -1}, ValueError, "max_batch_size must be from 0"),
        ({"varying": ("page_table",)}, ValueError, "varying must be among .*, got page_table"),
        ({"policy": "best"}, ValueError, "policy must be one of"),
        ({"num_splits": 300}, ValueError, "num_splits must be from 0 to 256"),
        ({"build": "vllm-0.1"}, ValueError, "version 0.1 of vllm is not supported"),
        ({"build": "vllm-0.33.0", "sm_margin": 2}, ValueError, "sm_margin must be 0 for vllm-0.33.0"),
    ],
)
def test_plans_that_cannot_be(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan(**change)


def test_no_metadata_before_the_first_update() -> None:
    with pytest.raises(RuntimeError, match=r"call update\(\) with the step's lengths first"):
        plan().forward_arguments()


def call(**change: Any) -> dict[str, Any]:
    """A forward that fits `plan()` updated with 3 sequences."""
    cache = torch.zeros(10, 64, 1, 128, dtype=torch.bfloat16)
    return {
        "q": torch.zeros(3, 1, 8, 128, dtype=torch.bfloat16), "k_cache": cache, "v_cache": cache, "causal": True,
        "cache_seqlens": lengths(3), "page_table": torch.zeros(3, 128, dtype=torch.int32),
    } | change  # fmt: skip


def test_a_forward_that_fits() -> None:
    made = plan(build="sglang-kernel-0.4.2")
    made.update(lengths(3))
    assert made.forward_arguments(**call())["num_splits"] == made.num_splits
    narrower = call(page_table=torch.zeros(3, 100, dtype=torch.int32))
    assert made.forward_arguments(**narrower)["scheduler_metadata"] is made.metadata


OTHER_FORWARDS: list[tuple[dict[str, Any], str]] = [
    ({"q": torch.zeros(2, 1, 8, 128, dtype=torch.bfloat16)}, "batch_size must be 3, .* got 2"),
    ({"q": torch.zeros(3, 2, 8, 128, dtype=torch.bfloat16)}, "max_seqlen_q must be 1, .* got 2"),
    ({"q": torch.zeros(3, 1, 4, 128, dtype=torch.bfloat16)}, "num_heads must be 8, .* got 4"),
    ({"q": torch.zeros(3, 1, 8, 128, dtype=torch.float16)}, "qkv_dtype must be bfloat16, .* got float16"),
    ({"q": torch.zeros(3, 1, 8, 128, dtype=torch.bfloat16, device="meta")}, "q must be on cpu like the plan, got meta"),
    ({"page_table": torch.zeros(3, 129, dtype=torch.int32)}, "at most max_seqlen_k = 8192 tokens, .* got 8256"),
    ({"page_table": None}, "page_size must be 64, .* got None"),
    ({"causal": False}, "must give the schedule that the metadata was made for"),
    ({"window_size": (100, 0)}, r"window_size=\(100, 0\)"),
    ({"softcap": 30.0}, "has_softcap must be False, .* got True"),
    ({"k": torch.zeros(3, 1, 1, 128, dtype=torch.bfloat16)}, "max_seqlen_k_new must be 0, .* got 1"),
    ({"cache_leftpad": lengths(3)}, "has_leftpad_k must be False, .* got True"),
    ({"attention_chunk": 128}, "attention_chunk must be 0, .* got 128"),
    ({"cu_seqlens_q": torch.zeros(4, dtype=torch.int32), "max_seqlen_q": 1}, "has_cu_seqlens_q must be False"),
]


@pytest.mark.parametrize(("change", "message"), OTHER_FORWARDS)
def test_forwards_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    made = plan(build="sglang-kernel-0.4.2")
    made.update(lengths(3))
    with pytest.raises(ValueError, match=message):
        made.forward_arguments(**call(**change))


def groups(build: str, device: str = "cpu") -> list[MetadataPlan]:
    window = {"window_size": (1023, 0)}
    other = {"num_heads": 32, "num_heads_k": 8, "headdim": 64, "causal": False, "num_splits": 1}
    return [plan(build=build, device=device, **change) for change in ({}, window, other)]


@pytest.mark.parametrize("build", BUILDS)
def test_several_groups(build: str) -> None:
    plans, alone = groups(build), groups(build)
    together = MetadataPlans(plans)
    for seed, batch in enumerate((3, 993, 50)):
        cache_seqlens = lengths(batch, seed)
        made = together.update(cache_seqlens)
        for one, single, metadata in zip(plans, alone, made, strict=True):
            assert torch.equal(metadata, single.update(cache_seqlens))
            assert one.forward_arguments()["scheduler_metadata"] is metadata
            assert metadata.data_ptr() % 16 == together._buffer.data_ptr() % 16


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("batch", [1, 33, 1000])
def test_the_kernel_for_several_groups(build: str, batch: int, device: torch.device) -> None:
    plans = groups(build)
    together = MetadataPlans(plans)
    cache_seqlens = lengths(batch)
    expected = together.update(cache_seqlens)
    planned = [one.planned(batch) for one in plans]
    launch_plans = [made for _, made in planned]
    table = launch.layer_groups_table(launch_plans, together._starts).to(device)
    out = torch.full((together._buffer.numel(),), -7, dtype=torch.int32, device=device)
    pointers = (cache_seqlens.to(device), None, None, None, None)
    launch.layer_groups_launch(planned[0][0], launch_plans)((out, table), pointers)
    for start, metadata in zip(together._starts, expected, strict=True):
        assert torch.equal(out[start : start + metadata.numel()].cpu(), metadata)


def test_one_of_several_groups_refreshes_all_and_returns_its_own() -> None:
    plans = groups("sglang-kernel-0.4.2")
    MetadataPlans(plans)
    cache_seqlens = lengths(9)
    for one, alone in zip(plans, groups("sglang-kernel-0.4.2"), strict=True):
        assert torch.equal(one.update(cache_seqlens), alone.update(cache_seqlens))


def test_groups_must_share_their_lengths() -> None:
    with pytest.raises(ValueError, match="plans must share max_seqlen_q, got 1 and 4"):
        MetadataPlans([plan(), plan(max_seqlen_q=4)])
    with pytest.raises(ValueError, match="plans must share varying"):
        MetadataPlans([plan(), plan(varying=("leftpad_k",))])
    with pytest.raises(ValueError, match="plans must hold at least one"):
        MetadataPlans([])


@pytest.mark.parametrize("groups", [1, 2])
def test_updates_from_the_same_place_are_remembered(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short way of a GPU, with the launches in the hands of the test: what is remembered must fit the lengths."""
    plans = MetadataPlans([plan(window_size=window) for window in ((-1, -1), (127, 0))[:groups]])
    made: list[tuple[int, int]] = []

    def repeat(self: Step, pointers: object, tensors: LengthTensors) -> Callable[[], bool]:
        lengths = tensors.cache_seqlens
        return lambda: made.append((lengths.data_ptr(), len(lengths))) is None

    monkeypatch.setattr(Step, "repeat", repeat)
    monkeypatch.setattr(Step, "launch", lambda self, _, tensors: self.write_on_host(self.views, tensors))
    monkeypatch.setattr(plans, "_on_cpu", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    store = torch.randint(1, 8192, (60,), dtype=torch.int32)
    for batch in (5, 5, 7, 5):
        views = plans.update(store[:batch])  # a new tensor each time, at the same address
        assert plans.batch_size == batch
        assert all(view.data_ptr() >= plans._buffer.data_ptr() for view in views)
    assert made == [(store.data_ptr(), 5)]  # the fourth update; the second of a place keeps the launch
    plans.update(store[1:6])  # another address
    plans.update(store[:10:2])  # another stride
    plans.update(store[:5].to(torch.int64))
    with pytest.raises(TypeError, match="cache_seqlens must have dtype int32 or int64"):
        plans.update(store[:5].view(torch.float32))
    with pytest.raises(ValueError, match="leftpad_k must be None"):
        plans.update(store[:5], leftpad_k=store[:5])
    assert len(made) == 1


def test_warm_up_leaves_no_metadata_behind() -> None:
    made = plan(max_batch_size=70, varying=("leftpad_k", "cu_seqlens_q"))
    made.warm_up()
    with pytest.raises(RuntimeError, match="there is no metadata yet"):
        made.metadata  # noqa: B018
    assert {batch for batch, _ in made._group._schedules.steps} == {1, 32, 64, 70}
    made.warm_up([5], dtype=torch.int64)
    assert (5, None) in made._group._schedules.steps
    with pytest.raises(ValueError, match="batch_sizes must be from 0 to"):
        made.warm_up([-1])


def test_a_forward_is_run_with_what_the_metadata_was_made_with() -> None:
    """Calls that say num_splits themselves, as all of SGLang's and vLLM's do."""
    made, called = plan(build=BUILD, max_batch_size=8), []
    made.update(LENGTHS)
    call = LAYER | {"num_splits": 0, "scheduler_metadata": None}

    def forward(**arguments: Any) -> str:
        called.append(arguments)
        return "out"

    assert made.run(forward, **call) == "out"
    assert called == [call | made.forward_arguments(**call)]
    assert called[0]["num_splits"] == made.num_splits > 1
    with pytest.raises(ValueError, match="max_seqlen_q must be 1"):
        made.run(forward, **call | {"q": LAYER["q"].repeat(1, 2, 1, 1)})
    assert len(called) == 1, "refused before it is called"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ver": 4}, "FlashAttention 4, not 3"),
        ({"score_mod": abs}, "score_mod given"),
        ({"mask_mod": abs}, "mask_mod given"),
        ({"cp_world_size": 2}, "cp_world_size given"),
        ({"batch_invariant": True}, "batch_invariant given"),
        ({"only_qv": True}, "only_qv given"),
        ({"something_new": 1}, "something_new given"),
        ({"cache_seqlens": torch.zeros(7, dtype=torch.int32)}, r"cache_seqlens must have shape \(2,\)"),
        ({"cache_seqlens": torch.zeros(2)}, "cache_seqlens must have dtype"),
        ({"cache_seqlens": 5}, "cache_seqlens is not a tensor"),
        ({"seqused_q": torch.zeros(2, dtype=torch.int32)}, "has_seqused_q must be False"),
    ],
)
def test_calls_that_are_not_understood_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    made = plan(build=BUILD, max_batch_size=8)
    made.update(LENGTHS)
    made.forward_arguments(**LAYER, something_new=None)
    with pytest.raises((ValueError, TypeError), match=message):
        made.forward_arguments(**LAYER | change)


def test_the_very_call_that_a_plan_was_made_for() -> None:
    starts = torch.tensor([0, 4, 8], dtype=torch.int32)
    call = LAYER | {
        "q": torch.zeros(8, 8, 128, dtype=torch.bfloat16), "k": torch.zeros(8, 1, 128, dtype=torch.bfloat16),
        "v": torch.zeros(8, 1, 128, dtype=torch.bfloat16), "cu_seqlens_q": starts, "cu_seqlens_k_new": starts,
        "max_seqlen_q": 4,
    }  # fmt: skip
    queries = {"max_batch_size": 8, "max_seqlen_q": 4, "build": BUILD}
    made = plan(**queries, max_seqlen_k_new=4, varying=("cu_seqlens_q", "cu_seqlens_k_new"))
    made.update(LENGTHS, cu_seqlens_q=starts, cu_seqlens_k_new=starts)
    made.forward_arguments(**call)
    dense = {"k": torch.zeros(2, 4, 1, 128, dtype=torch.bfloat16), "cu_seqlens_k_new": None}
    with pytest.raises(ValueError, match="cu_seqlens_k_new must be a tensor, which the metadata was made for"):
        made.forward_arguments(**call | dense)

    used = torch.tensor([4, 1], dtype=torch.int32)
    made = plan(**queries, varying=("seqused_q",))
    made.update(LENGTHS, seqused_q=used)
    dense = LAYER | {"q": torch.zeros(2, 4, 8, 128, dtype=torch.bfloat16)}
    made.forward_arguments(**dense, seqused_q=used)
    with pytest.raises(ValueError, match="has_seqused_q must be True"):
        made.forward_arguments(**dense)


def test_a_plan_belongs_to_one_group() -> None:
    one, two, three = (plan(build=BUILD) for _ in range(3))
    MetadataPlans([one, two])
    for plans in ([two, three], [three, three]):
        with pytest.raises(ValueError, match="plans must be in one MetadataPlans alone, and once"):
            MetadataPlans(plans)
    MetadataPlans([three])
    assert three.update(LENGTHS).data_ptr() == three.metadata.data_ptr()


def test_what_is_remembered_of_forwards_is_bounded() -> None:
    made = plan(build=BUILD, max_batch_size=8)
    made.update(LENGTHS)
    table = torch.zeros(2, 8192, dtype=torch.int32)
    for width in range(10, 128):
        for sms in range(10):
            made.forward_arguments(**LAYER | {"page_table": table[:, :width], "sm_margin": sms})
    assert 0 < len(made._fitting) <= 1024


def test_lengths_may_not_lie_in_the_plans_own_buffer() -> None:
    made = plan(build=BUILD, max_batch_size=8)
    for lengths in (made.update(LENGTHS)[:2], made._group._buffer[-2:]):
        with pytest.raises(ValueError, match="cache_seqlens must not lie in the plan's own buffer"):
            made.update(lengths)


@pytest.mark.parametrize("shape", [{}, {"headdim": 96, "num_heads": 32, "num_heads_k": 16}, {"max_seqlen_q": 4}])
@pytest.mark.parametrize("build", ["sglang-kernel-0.4.2", "sglang-kernel-0.4.10"])
def test_warm_up_reaches_every_kernel(build: str, shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the batch decides on the splits, two batches of one launch shape may run kernels that differ."""
    made = plan(build=build, **shape)
    monkeypatch.setattr(launch, "INTERPRETED", False)  # the launch shapes of a GPU

    def kernel(batch_size: int) -> tuple[Any, ...]:
        planned = made.planned(batch_size)[1]
        return launch.layout_constants(planned), launch.launch_shape(
            batch_size, *launch.shaped_by([planned], made.problem.gpu)
        )

    warmed = []
    monkeypatch.setattr(made._group, "update", lambda cache_seqlens, **_: warmed.append(cache_seqlens.shape[0]))
    made.warm_up()
    assert {kernel(batch_size) for batch_size in range(1, 1101)} <= {kernel(batch_size) for batch_size in warmed}
