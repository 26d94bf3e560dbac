"""No metadata ever holds more splits than the forward that gets it has room for.

What the forward has room for is not worked out here: it is what the published wheels' own `get_num_splits` answered
for these problems, asked as their forward asks it (tests/data/wheel_rules/).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata.calls import ForwardCall
from fa3_metadata.engines import vllm as vllm_adapter
from fa3_metadata.triton_kernels.builds import MAX_DYNAMIC_SPLIT_BATCH, RELEASES, FA3Rules, rules_for
from fa3_metadata.triton_kernels.plan import batch_sizes_of_other_plans, make_plan, sizes_alone_differ
from fa3_metadata.triton_kernels.problem import Problem

from bench.wheel_problems import as_build_is_asked
from bench.wheel_recordings import Recordings

RECORDED = Recordings.load()
BUILDS = [f"{release.package}-{release.newest}" for release in RELEASES if release.package != "flash-attn-3"]
ENGINES_CHUNK = 24  # calls a test, spread over the recorded problems


def recorded_bounds(build: str, seed: int, count: int) -> Iterator[tuple[Problem, int]]:
    """Problems of this build's forward, drawn from those recorded, and the bound that it came to."""
    package, _, version = build.rpartition("-")
    found = RECORDED.wheels[package][version]["num_splits"]
    assert found is not None
    answers, rules = RECORDED.answers[found], rules_for(build)
    asked_by_forward = range(len(RECORDED.problems) // 2, len(RECORDED.problems))
    usable = [
        i for i in asked_by_forward
        if RECORDED.problems[i].num_splits == 0 and RECORDED.problems[i].batch_size <= 1100
        and RECORDED.problems[i].max_seqlen_q <= 4096
    ]  # fmt: skip
    for i in random.Random(seed).sample(usable, count):
        yield as_build_is_asked(RECORDED.problems[i], rules), int(answers[i])


def lengths_of(problem: Problem, rng: random.Random) -> torch.Tensor:
    """One or a few long sequences among short ones, so that FA3's rule wants many splits; sometimes absurd ones."""
    most = rng.choice([problem.max_seqlen_k, problem.max_seqlen_k, 10 * problem.max_seqlen_k, 2**30, 2**31 - 1])
    lengths = [rng.choice([0, 1, min(300, most)]) for _ in range(problem.batch_size)]
    for _ in range(rng.choice([1, 1, 3])):
        lengths[rng.randrange(problem.batch_size)] = most
    return torch.tensor(lengths, dtype=torch.int64)


def call_of(problem: Problem, rng: random.Random) -> dict[str, Any]:
    """Arguments of `get_scheduler_metadata` for a problem, with lengths."""
    names = ("batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads", "num_heads_k", "headdim", "headdim_v",
             "page_size", "max_seqlen_k_new", "causal", "window_size", "attention_chunk", "has_softcap", "num_splits",
             "pack_gqa", "sm_margin", "arch", "num_sms", "total_q")  # fmt: skip
    call = {name: getattr(problem, name) for name in names} | {"qkv_dtype": getattr(torch, problem.qkv_dtype)}
    call["cache_seqlens"] = lengths_of(problem, rng)
    if problem.has_cu_seqlens_q:
        call["cu_seqlens_q"] = torch.arange(problem.batch_size + 1) * problem.max_seqlen_q
    if problem.has_seqused_q:
        call["seqused_q"] = torch.full((problem.batch_size,), problem.max_seqlen_q)
    if problem.has_leftpad_k:
        call["leftpad_k"] = torch.zeros(problem.batch_size, dtype=torch.int64)
    return call


def largest(made: torch.Tensor, call: dict[str, Any]) -> int:
    """The most splits of any sequence."""
    layout = fa3_metadata.metadata_layout(**call)
    rows = fa3_metadata.unpack_metadata(made, layout)
    return int(rows["num_splits_dynamic"].max()) if "num_splits_dynamic" in rows and layout.batch_size else 1


@pytest.mark.parametrize("policy", ["fa3", "balanced"])
@pytest.mark.parametrize("build", BUILDS)
def test_a_forward_that_finds_its_bound_itself_has_room(build: str, policy: str) -> None:
    rng, splits = random.Random(build + policy), 0
    for problem, bound in recorded_bounds(build, len(policy), 150):
        call = call_of(problem, rng) | {"build": build, "policy": policy, "forward_is_told": False}
        made = largest(fa3_metadata.get_scheduler_metadata(**call), call)
        assert made <= bound, (problem, made, bound)
        splits += made > 1
    assert splits > 15, "hardly anything was split"


@pytest.mark.parametrize("policy", ["fa3", "balanced"])
@pytest.mark.parametrize("build", BUILDS)
def test_a_forward_that_is_told_has_room(build: str, policy: str) -> None:
    """And under FA3's policy is told what it would have come to, so that its output has the same bits."""
    rng, rules = random.Random(build + policy), rules_for(build)
    for problem, bound in recorded_bounds(build, 3 + len(policy), 150):
        call = call_of(problem, rng) | {"build": build, "policy": policy}
        told = fa3_metadata.metadata_layout(**call).num_splits
        room = bound if told == 0 or "num_splits" in rules.forward_lacks else told
        assert largest(fa3_metadata.get_scheduler_metadata(**call), call) <= room, problem
        if policy == "fa3":
            assert (told or 1) == bound, problem


@pytest.mark.parametrize("build", [b for b in BUILDS if rules_for(b).splits_count != "batch"])
def test_a_maker_that_is_told_the_longest_sequence_stays_within_the_page_tables_bound(build: str) -> None:
    """SGLang's maker, as `install()` serves it: it says the longest sequence, the forward goes by the table's width."""
    rng = random.Random(build)
    for problem, bound in recorded_bounds(build, 7, 150):
        if problem.window_size != (-1, -1) or problem.attention_chunk:
            continue  # SGLang makes none for them
        shorter = replace(problem, max_seqlen_k=rng.randint(1, problem.max_seqlen_k))
        call = call_of(shorter, rng) | {"build": build}
        assert largest(fa3_metadata.get_scheduler_metadata(**call), call) <= bound, (problem, shorter.max_seqlen_k)


@pytest.mark.parametrize("policy", ["fa3", "balanced"])
@pytest.mark.parametrize("build", [build for build in BUILDS if build.startswith("vllm")])
def test_vllms_builder_stays_within_its_forwards_bound(
    build: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In eager batches vLLM says 0 to both sides, and takes no number from us."""
    monkeypatch.setenv("FA3_METADATA_BUILD", build)
    attached = vllm_adapter.Attached(build, False, policy)
    attached.used = True
    monkeypatch.setattr(vllm_adapter, "_attached", attached)
    rng = random.Random(build)
    for problem, bound in recorded_bounds(build, 11, 150):
        if problem.has_seqused_q or problem.arch != 90 or problem.num_sms != 132:
            continue
        call = call_of(problem, rng)
        renamed = {"num_heads": "num_heads_q", "num_heads_k": "num_heads_kv", "leftpad_k": "cache_leftpad"}
        leave = ("arch", "num_sms", "total_q", "attention_chunk")
        made = vllm_adapter.get_scheduler_metadata(
            **{renamed.get(name, name): value for name, value in call.items() if name not in leave}
        )
        call |= {"build": build, "policy": policy, "forward_is_told": False}
        assert largest(made, call) <= bound, problem


@pytest.mark.parametrize("build", BUILDS)
def test_the_wrapped_forward_asks_what_the_wheels_forward_asks(build: str) -> None:
    """From the shapes of the call alone, ragged queries included."""
    rules, compared = rules_for(build), 0
    for problem, bound in recorded_bounds(build, 13, 200):
        if problem.has_seqused_q or problem.qkv_dtype == "float8_e4m3fn" or problem.max_seqlen_k_new:
            continue
        total = problem.query_tokens
        q = torch.empty(total, problem.num_heads, problem.headdim, device="meta", dtype=torch.bfloat16)
        if not problem.has_cu_seqlens_q:
            q = q.view(problem.batch_size, problem.max_seqlen_q, *q.shape[1:])
        pages = problem.page_size or 1
        table = None
        if problem.page_size:
            wide = -(-problem.max_seqlen_k // problem.page_size)
            if wide * problem.page_size != problem.max_seqlen_k:
                continue  # a page table holds whole pages
            table = torch.empty(problem.batch_size, wide, device="meta")
        cache = (3, pages) if problem.page_size else (problem.batch_size, problem.max_seqlen_k)
        kv = [
            torch.empty(*cache, problem.num_heads_k, d, device="meta") for d in (problem.headdim, problem.value_headdim)
        ]
        asked = ForwardCall(
            q, *kv, page_table=table, max_seqlen_q=problem.max_seqlen_q, causal=problem.causal,
            cu_seqlens_q=torch.empty(problem.batch_size + 1, device="meta") if problem.has_cu_seqlens_q else None,
            leftpad_k=torch.empty(problem.batch_size, device="meta") if problem.has_leftpad_k else None,
            window_size=problem.window_size, attention_chunk=problem.attention_chunk,
            softcap=float(problem.has_softcap), pack_gqa=problem.pack_gqa, sm_margin=problem.sm_margin,
        )  # fmt: skip
        made = make_plan(asked.problem(problem.arch, problem.num_sms, rules), rules)
        assert made.num_splits == bound, problem
        compared += 1
    assert compared > 30


@pytest.mark.parametrize("build", BUILDS)
def test_a_plan_has_the_bound_of_every_batch(build: str) -> None:
    """Whatever its largest batch is, and whichever batches came before."""
    rules = rules_for(build)
    shape = {"num_heads": 16, "num_heads_k": 2, "headdim": 128, "page_size": 64, "causal": True}
    plan = fa3_metadata.MetadataPlan(max_batch_size=1100, max_seqlen_k=131072, device="cpu", build=build, **shape)
    sizes = list(range(1, 1101, 3))
    random.Random(build).shuffle(sizes)
    for batch_size in sizes:
        lengths = torch.full((batch_size,), 64)
        lengths[0] = 131072
        made = plan.update(lengths)
        alone = Problem(batch_size, 1, 131072, **shape)
        expected = make_plan(alone, rules)
        assert plan.num_splits == expected.layout.num_splits
        assert plan.pack_gqa == expected.pack_gqa
        call = {"batch_size": batch_size, "max_seqlen_q": 1, "max_seqlen_k": 131072, **shape, "build": build}
        assert torch.equal(made, fa3_metadata.get_scheduler_metadata(**call, cache_seqlens=lengths))


def all_alike(rules: FA3Rules) -> list[Problem]:
    shapes = [(8, 1, 1), (32, 8, 1), (64, 64, 1), (16, 1, 4), (128, 1, 1), (1, 1, 1), (10, 2, 7)]
    return [
        Problem(1500, queries, keys, heads, heads_k, 128, page_size=page, causal=True, num_sms=sms)
        for heads, heads_k, queries in shapes
        for keys, page in ((131072, 64), (700, None))
        for sms in (132, 78)
    ]


@pytest.mark.parametrize("build", ["sglang-kernel-0.4.10", "sgl-kernel-0.3.16", "vllm-0.10.0", "vllm-0.33.0"])
def test_tables_of_several_plans_are_there_for_every_batch(build: str) -> None:
    """`batch_sizes_of_other_plans` names a batch of each kind; checked against all batch sizes one by one."""
    rules = rules_for(build)
    for problem in all_alike(rules):
        sizes = batch_sizes_of_other_plans(problem, rules)
        assert sizes[0] == 1
        assert sizes[-1] <= problem.batch_size
        numbers = {numbers_of(problem, rules, size) for size in sizes}
        for batch_size in range(1, problem.batch_size + 1):
            assert numbers_of(problem, rules, batch_size) in numbers


def numbers_of(problem: Problem, rules: FA3Rules, batch_size: int) -> tuple[object, ...]:
    plan = make_plan(replace(problem, batch_size=batch_size), rules)
    return batch_size > MAX_DYNAMIC_SPLIT_BATCH, plan.num_splits, plan.pack_gqa, plan.block_m, plan.block_n


@pytest.mark.parametrize("build", BUILDS)
def test_what_sizes_share_has_the_same_bound(build: str) -> None:
    rules, rng, shared = rules_for(build), random.Random(build), 0
    for problem, _ in recorded_bounds(build, 17, 100):
        plan = make_plan(problem, rules)
        for _ in range(20):
            other = replace(
                problem,
                batch_size=rng.choice([1, 7, 32, 33, 64, 128, 992, 993]),
                max_seqlen_k=rng.choice([problem.max_seqlen_k, 300, 4096, 131072]),
            )
            if sizes_alone_differ(plan, problem, other.batch_size, other.max_seqlen_k):
                anew = make_plan(other, rules)
                assert (anew.num_splits, anew.pack_gqa) == (plan.num_splits, plan.pack_gqa), (problem, other)
                shared += 1
    assert shared > 100
