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
        made = make_plan(asked.problem(problem.arch, problem.num_sms, rules.bound_depends_on_batch), rules)
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
        assert sizes[0] == 0
        assert sizes[-1] <= problem.batch_size
        numbers = {numbers_of(problem, rules, size) for size in sizes}
        for batch_size in range(problem.batch_size + 1):
            assert numbers_of(problem, rules, batch_size) in numbers


def numbers_of(problem: Problem, rules: FA3Rules, batch_size: int) -> tuple[object, ...]:
    plan = make_plan(replace(problem, batch_size=batch_size), rules)
    return batch_size > MAX_DYNAMIC_SPLIT_BATCH, plan.num_splits, plan.pack_gqa, plan.block_m, plan.block_n


@pytest.mark.parametrize("policy", ["fa3", "balanced"])
@pytest.mark.parametrize("build", BUILDS)
def test_what_sizes_share_has_the_same_bound(build: str, policy: str) -> None:
    """Of a policy that has bounds of its own only calls that give one share anything."""
    rules, rng, shared = rules_for(build), random.Random(build), 0
    for problem, _ in recorded_bounds(build, 17, 100):
        given = rng.choice([0, 0, 8]) if policy == "balanced" else 0
        problem = replace(problem, policy=policy, max_partial_bytes=rng.choice([2**20, 2**28]), num_splits=given)
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
                assert anew.searches_splits == plan.searches_splits or anew.costs is None, (problem, other)
                shared += 1
    assert shared > 100


@pytest.mark.parametrize("build", ["sgl-kernel-0.3.16", "vllm-0.10.0", "vllm-0.11.0", "vllm-0.16.0"])
def test_a_balanced_plan_beyond_what_the_metadata_splits(build: str) -> None:
    """Above 992 sequences an old forward splits all alike, as many times as it is told: FA3's own number, not ours."""
    shape = {"num_heads": 16, "num_heads_k": 2, "headdim": 128, "page_size": 64, "causal": True}
    plan = fa3_metadata.MetadataPlan(
        max_batch_size=1100, max_seqlen_k=131072, device="cpu", build=build, policy="balanced", **shape
    )
    served = set()
    for batch_size in (992, 1, 1100, 993, 40):
        plan.update(torch.full((batch_size,), 5000))
        alone = make_plan(Problem(batch_size, 1, 131072, **shape), rules_for(build))
        if batch_size > MAX_DYNAMIC_SPLIT_BATCH:
            assert plan.num_splits == alone.layout.num_splits <= 1
        else:
            served.add(plan.num_splits)
    assert len(served) == 1, "one bound for every batch that the policy serves"
    assert served.pop() > 1


def test_a_bound_of_one_that_is_ours_is_told() -> None:
    """vLLM 0.10.1 to 0.16.0 lay the tensor out otherwise when told 1 than when they come to 1 by themselves."""
    rules = rules_for("vllm-0.11.0")
    problem = Problem(4, 1, 8192, 8, 1, 128, page_size=64, causal=True, policy="balanced", max_partial_bytes=0)
    ours = make_plan(problem, rules).layout
    assert (ours.num_splits, ours.row_names) == (1, ())
    assert make_plan(replace(problem, policy="fa3"), rules).layout.num_splits > 1
    theirs = make_plan(replace(problem, policy="fa3", max_seqlen_k=300), rules).layout
    assert (theirs.num_splits, theirs.row_names) == (0, ("num_splits_dynamic",))
    told = make_plan(replace(problem, policy="fa3", max_seqlen_k=300, num_splits=1), rules).layout
    assert (told.num_splits, told.row_names) == (1, ())
    untold = make_plan(replace(problem, max_seqlen_k=300, forward_is_told=False), rules).layout
    assert (untold.num_splits, untold.row_names) == (0, ("num_splits_dynamic",))


@pytest.mark.parametrize("build", ["sglang-kernel-0.4.2", "sglang-kernel-0.4.10", "vllm-0.33.0", "vllm-0.9.1"])
def test_a_wrapped_forward_without_num_splits_keeps_to_its_own_bound(build: str) -> None:
    """Short contexts, which "balanced" would split, and FA3 does not."""
    seen: list[torch.Tensor] = []

    def forward(
        q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, cache_seqlens: torch.Tensor,
        page_table: torch.Tensor, causal: bool = False, scheduler_metadata: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        assert scheduler_metadata is not None
        seen.append(scheduler_metadata)

    wrapped = fa3_metadata.wrap_forward(forward, build, "balanced")
    kv = torch.zeros(16, 64, 1, 128, dtype=torch.bfloat16)
    lengths = torch.tensor([512, 512])
    with fa3_metadata.step():
        wrapped(torch.zeros(2, 1, 8, 128, dtype=torch.bfloat16), kv, kv, lengths, torch.zeros(2, 8), causal=True)
    call = {"batch_size": 2, "max_seqlen_q": 1, "max_seqlen_k": 512, "num_heads": 8, "num_heads_k": 1, "headdim": 128,
            "page_size": 64, "causal": True, "build": build}  # fmt: skip
    bound = fa3_metadata.metadata_layout(**call).num_splits
    assert seen[0].shape == (fa3_metadata.metadata_layout(**call).size,)
    assert bound <= 1
    assert largest(seen[0], call) == 1


def test_a_bound_that_the_forward_cannot_be_told_is_refused() -> None:
    call = {"batch_size": 4, "max_seqlen_q": 1, "max_seqlen_k": 131072, "num_heads": 8, "num_heads_k": 1,
            "headdim": 128, "cache_seqlens": torch.tensor([131072, 1, 1, 1])}  # fmt: skip
    with pytest.raises(ValueError, match=r"num_splits must be 0 for the vllm-0\.8\.5 build, whose forward takes none"):
        fa3_metadata.get_scheduler_metadata(**call, build="vllm-0.9.1", num_splits=128)
    fa3_metadata.get_scheduler_metadata(**call, build="vllm-0.9.2", num_splits=128)


def test_a_forward_that_cannot_be_told_must_show_its_call() -> None:
    """Its bound goes by the width of its own block table."""
    plan = fa3_metadata.MetadataPlan(max_batch_size=2, max_seqlen_k=131072, num_heads=8, num_heads_k=1, headdim=128,
                                     page_size=16, causal=True, device="cpu", build="vllm-0.9.1",
                                     varying=("cu_seqlens_q",))  # fmt: skip
    starts, lengths = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([1000], dtype=torch.int32)
    plan.update(lengths, cu_seqlens_q=starts)
    with pytest.raises(ValueError, match=r"call must be given for vllm-0\.9\.1"):
        plan.forward_arguments()
    kv = torch.zeros(9, 16, 1, 128, dtype=torch.bfloat16)
    call = {"q": torch.zeros(1, 8, 128, dtype=torch.bfloat16), "k": kv, "v": kv, "max_seqlen_q": 1,
            "cu_seqlens_q": starts, "seqused_k": lengths, "causal": True,
            "block_table": torch.zeros(1, 8192, dtype=torch.int32)}  # fmt: skip
    assert list(plan.forward_arguments(**call, max_seqlen_k=131072)) == ["scheduler_metadata"]
    with pytest.raises(ValueError, match="max_seqlen_k must give the schedule that the metadata was made for"):
        plan.forward_arguments(**call, max_seqlen_k=1000)


def test_a_plan_serves_ragged_queries_of_any_number() -> None:
    """It counts the most that there may be, and tells the forward what it came to."""
    plan = fa3_metadata.MetadataPlan(max_batch_size=64, max_seqlen_k=131072, max_seqlen_q=4, num_heads=8, num_heads_k=1,
                                     headdim=128, page_size=64, causal=True, device="cpu",
                                     build="sglang-kernel-0.4.10", varying=("cu_seqlens_q",))  # fmt: skip
    lengths, kv = torch.full((64,), 1000, dtype=torch.int32), torch.zeros(9, 64, 1, 128, dtype=torch.bfloat16)
    table = torch.zeros(64, 2048, dtype=torch.int32)
    for tokens in (64, 100, 256):
        starts = torch.linspace(0, tokens, 65).to(torch.int32)
        plan.update(lengths, cu_seqlens_q=starts)
        q = torch.zeros(tokens, 8, 128, dtype=torch.bfloat16)
        call = {"q": q, "k_cache": kv, "v_cache": kv, "cache_seqlens": lengths, "page_table": table, "causal": True}
        ours = plan.forward_arguments(**call, cu_seqlens_q=starts, max_seqlen_q=4)
        assert ours["num_splits"] == plan.num_splits
    assert len(plan._fitting) == 1, "one kind of call, whatever the number of its queries"


@pytest.mark.parametrize("build", ["sgl-kernel-0.3.16", "sglang-kernel-0.4.2", "sglang-kernel-0.4.5", "vllm-0.33.0"])
def test_splits_that_do_not_depend_on_the_batch_need_a_bound_that_does_not(build: str) -> None:
    """A forward that is told none finds one by the longest lengths of the batch, and some count its sequences, too."""
    call = {"batch_size": 64, "max_seqlen_q": 1, "max_seqlen_k": 131072, "num_heads": 8, "num_heads_k": 1,
            "headdim": 128, "page_size": 64, "policy": "balanced", "batch_invariant": True, "build": build}  # fmt: skip
    fa3_metadata.metadata_layout(**call)
    fa3_metadata.metadata_layout(**call, forward_is_told=False, num_splits=8)
    with pytest.raises(ValueError, match=r"^batch_invariant must be False for the .* unless the forward is told"):
        fa3_metadata.metadata_layout(**call, forward_is_told=False)


def test_a_total_of_queries_makes_new_calls_only_where_it_counts() -> None:
    from fa3_metadata import api

    call = {"batch_size": 4, "max_seqlen_q": 8, "max_seqlen_k": 8192, "num_heads": 8, "num_heads_k": 1, "headdim": 128,
            "cache_seqlens": torch.tensor([8192, 1, 1, 1])}  # fmt: skip
    api._kinds.clear()
    for total_q in range(4, 33):
        fa3_metadata.get_scheduler_metadata(**call, build="sglang-kernel-0.4.2", total_q=total_q)
    assert len(api._kinds) == 1
