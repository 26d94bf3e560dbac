"""The two implementations against each other, over the whole argument space."""

from __future__ import annotations

import random
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata.triton_kernels import launch
from fa3_metadata.triton_kernels.builds import RELEASES, rules_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.cases import bound_told

from ..helpers.cases import POISON, Case, boundary_case, crowded_case, random_case

BUILDS = tuple(f"{release.package}-{release.newest}" for release in RELEASES)
ARCHS = {build: (90, 80, 86, 89) if rules_for(build).sm8x_tiles else (90,) for build in BUILDS}
TENSOR_KINDS = [{}, {"dtype": torch.int64}, {"stride": 3}, {"dtype": torch.int64, "stride": 2}]


def agree(case: Case, device: torch.device, **tensor_kind: object) -> None:
    rows = case.run("triton", device, **tensor_kind)
    # On the same device: policy "balanced" goes by the constants of the GPU.
    case.check(rows, case.run("reference", device), f"Triton kernel against NumPy model {tensor_kind or ''}")


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rng=st.randoms(use_true_random=False), build=st.sampled_from(BUILDS), num_sms=st.sampled_from([132, 114, 78, 16])
)
def test_on_random_cases(rng: random.Random, build: str, num_sms: int, device: torch.device) -> None:
    case = random_case(rng, build, num_sms, arch=rng.choice(ARCHS[build]))
    agree(case, device, **rng.choice(TENSOR_KINDS))


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False), build=st.sampled_from(BUILDS))
def test_on_boundary_cases(rng: random.Random, build: str, device: torch.device) -> None:
    agree(boundary_case(rng, build), device)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False), build=st.sampled_from(BUILDS))
def test_where_fa3s_own_bound_decides(rng: random.Random, build: str, device: torch.device) -> None:
    agree(crowded_case(rng, build), device)


ABSURD = [
    -(2**31),
    -1,
    0,
    1,
    2**20,
    2**24 - 600,
    2**24 - 512,
    2**24 - 1,
    2**24,
    2**24 + 1,
    2**30,
    2**31 - 200,
    2**31 - 1,
]


@pytest.mark.parametrize("policy", ["fa3", "balanced"])
@pytest.mark.parametrize("build", BUILDS)
def test_absurd_lengths_stay_within_the_tensor(build: str, policy: str, device: torch.device) -> None:
    """Such as a row of padding that nobody has set: every position is written, and holds what a forward can read."""
    rng = random.Random(build + policy)
    for i in range(24):
        batch = rng.choice([1, 7, 40, 64, 65, 130, 300])
        lengths = [rng.choice(ABSURD) if rng.random() < 0.4 else rng.randint(1, 9000) for _ in range(batch)]
        call: dict[str, Any] = {
            "batch_size": batch, "max_seqlen_q": rng.choice([1, 4]), "max_seqlen_k": rng.choice([9000, 9000, 2**24]),
            "num_heads": 8, "num_heads_k": rng.choice([1, 8]), "headdim": 128, "page_size": 64, "causal": i % 3 > 0,
            "window_size": rng.choice([(-1, -1), (-1, -1), (1000, 0)]), "build": build, "policy": policy,
            "num_splits": bound_told(build, rng.choice([0, 8, 256])),
        }  # fmt: skip
        call["cache_seqlens"] = torch.tensor(lengths, device=device, dtype=rng.choice([torch.int32, torch.int64]))
        if rng.random() < 0.3:
            queries = [rng.choice(ABSURD) if rng.random() < 0.2 else rng.randint(0, 4) for _ in range(batch)]
            call["seqused_q"] = torch.tensor(queries, dtype=torch.int32, device=device)
        layout = fa3_metadata.metadata_layout(**call)
        memory = torch.full((layout.size + 5000,), POISON, dtype=torch.int32, device=device)
        made = fa3_metadata.get_scheduler_metadata(**call, out=memory[2000:], backend="triton")
        outside = torch.cat([memory[:2000], memory[2000 + layout.size :]])
        assert bool((outside == POISON).all()), (call, lengths)
        assert bool((made != POISON).all()), (call, lengths)
        rows = fa3_metadata.unpack_metadata(made, layout)
        if "varlen_batch_idx" in rows:
            assert sorted(rows["varlen_batch_idx"].tolist()) == list(range(batch))
        if "num_splits_dynamic" in rows:
            most = max(layout.num_splits, 1)
            assert 1 <= int(rows["num_splits_dynamic"].min()) <= int(rows["num_splits_dynamic"].max()) <= most
        assert torch.equal(made, fa3_metadata.get_scheduler_metadata(**call, backend="reference")), (call, lengths)


@pytest.mark.parametrize("batch", [0, 1, 31, 32, 33, 991, 992, 993, 5000])
@pytest.mark.parametrize("build", BUILDS)
def test_on_every_edge_of_the_batch_size(build: str, batch: int, device: torch.device) -> None:
    rng = random.Random(batch)
    lengths = [rng.choice([0, 1, 127, 128, 129, 5000, 70000]) for _ in range(batch)]
    args = {"batch_size": batch, "max_seqlen_q": 1, "max_seqlen_k": 70000, "num_heads": 7, "num_heads_k": 1}
    for causal in (False, True):
        more = {"headdim": 128, "cache_seqlens": lengths, "page_size": 64, "causal": causal}
        more["num_splits"] = bound_told(build, 32)
        agree(Case(build, args | more), device)


@pytest.mark.parametrize("slice_size", [1, 4, 32])
def test_slices_of_any_size_give_the_same(
    slice_size: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter runs one program a group; a GPU runs many. Here the interpreter runs many, too."""
    shape = launch.launch_shape
    monkeypatch.setattr(launch, "launch_shape", lambda *batch: (slice_size, *shape(*batch)[1:]))
    rng = random.Random(slice_size)
    for build in ("sgl-kernel-0.3.16", "sgl-kernel-0.3.21", "sglang-kernel-0.4.2", "vllm-0.33.0"):
        agree(boundary_case(rng, build, largest_batch=100), device)
        agree(random_case(rng, build, largest_batch=100), device)
    lengths = [rng.randint(0, 5000) for _ in range(1000)]
    args = {
        "batch_size": 1000,
        "max_seqlen_q": 1,
        "max_seqlen_k": 5000,
        "num_heads": 8,
        "num_heads_k": 1,
        "headdim": 64,
    }
    if slice_size >= 32:  # two groups
        agree(Case("sglang-kernel-0.4.2", args | {"cache_seqlens": lengths}), device)


def test_no_queries_at_all(device: torch.device) -> None:
    """No query blocks but some keys: FA3 divides by zero blocks per SM and ends up with one split."""
    args = {"batch_size": 3, "max_seqlen_q": 4, "max_seqlen_k": 9000, "num_heads": 8, "num_heads_k": 1, "headdim": 128}
    case = Case("sglang-kernel-0.4.2", args | {"cache_seqlens": [9000, 0, 5], "seqused_q": [0, 0, 0], "num_splits": 8})
    agree(case, device)
    assert case.run("triton", device)["num_splits_dynamic"] == [1, 1, 1]


def test_negative_lengths_count_as_zero(device: torch.device) -> None:
    args = {"batch_size": 3, "max_seqlen_q": 1, "max_seqlen_k": 9000, "num_heads": 8, "num_heads_k": 1, "headdim": 128}
    case = Case("sglang-kernel-0.4.2", args | {"cache_seqlens": [9000, -4000, 5], "num_splits": 8})
    agree(case, device)
    zero = Case("sglang-kernel-0.4.2", args | {"cache_seqlens": [9000, 0, 5], "num_splits": 8})
    assert case.run("triton", device) == zero.run("triton", device)


def test_lengths_are_read_in_place(device: torch.device) -> None:
    """A column of a matrix gives the same metadata as its copy, and is left as it was."""
    matrix = torch.randint(1, 60000, (40, 6), dtype=torch.int64, device=device)
    before = matrix.clone()
    made = [
        fa3_metadata.get_scheduler_metadata(40, 1, 60000, 8, 1, 128, lengths, num_splits=16, backend="triton")
        for lengths in (matrix[:, 2], matrix[:, 2].contiguous().to(torch.int32))
    ]
    assert torch.equal(*made)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("most", [2**24 - 500, 2**24 + 5000], ids=["short", "long"])
@pytest.mark.parametrize("causal", [False, True])
def test_keys_at_the_ends_of_their_range(most: int, causal: bool, device: torch.device) -> None:
    """Up to 2^24 tokens or query rows the order is found by signs of differences, which must not overflow."""
    rng = random.Random(most)
    for heads in (1, 8):
        rows = (2**24 - 500) // heads
        args = {"batch_size": 40, "max_seqlen_q": rows, "max_seqlen_k": most, "num_heads": heads, "num_heads_k": 1}
        ends = [[rng.choice([0, 1, end // 2, end - 1, end]) for _ in range(40)] for end in (most, rows)]
        more = {"headdim": 128, "cache_seqlens": ends[0], "seqused_q": ends[1], "causal": causal, "pack_gqa": True}
        agree(Case("sglang-kernel-0.4.2", args | more | {"num_splits": 8}), device)
