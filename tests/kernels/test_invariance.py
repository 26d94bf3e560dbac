"""batch_invariant: a sequence is attended to by the same kernel and with the same splits in any batch, or refused."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import fa3_metadata
import numpy as np
import pytest
import torch
from fa3_metadata.triton_kernels import invariance
from fa3_metadata.triton_kernels.builds import RELEASES, SGLANG, UPSTREAM, VLLM, FA3Rules, rules_for
from fa3_metadata.triton_kernels.invariance import VarianceError
from fa3_metadata.triton_kernels.plan import _most_queries, _planned, make_plan, plan_like, sizes_alone_differ
from fa3_metadata.triton_kernels.problem import Problem
from fa3_metadata.triton_kernels.reference import Lengths, blocks_read, sequence_blocks, splits_of

BUILDS = {release.rules.name: f"{release.package}-{release.newest}" for release in RELEASES}
TELLABLE = [name for name, build in BUILDS.items() if "num_splits" not in rules_for(build).forward_lacks]
BATCHES = 200
WIDE = 262144
PROMISE: dict[str, Any] = {"policy": "balanced", "batch_invariant": True}


@dataclass(frozen=True)
class Kind:
    """A kind of layer, and the lengths of the sequence that is looked at."""

    layer: dict[str, Any]
    queries: int = 1  # of the sequence
    keys: tuple[int, ...] = (1, 300, 2000, 19802)  # of it
    others: tuple[int, ...] = (1,)  # queries of the others; more than one number: ragged
    page: int | None = 64
    table: int = 0  # tokens of the narrowest page table; 0: as wide as the longest sequence
    leftpad: bool = False
    appended: int = 0
    chunk: bool = field(default=False)  # not of every build


GQA = {"num_heads": 32, "num_heads_k": 8, "headdim": 128, "causal": True}
MQA = {"num_heads": 8, "num_heads_k": 1, "headdim": 128, "causal": True}
D64 = {"num_heads": 14, "num_heads_k": 2, "headdim": 64, "causal": True}
MLA = {"num_heads": 16, "num_heads_k": 1, "headdim": 64, "headdim_v": 512, "causal": True}
KINDS = {
    "gqa": Kind(GQA),
    "mqa": Kind(MQA),
    "not causal": Kind(MQA | {"causal": False}),
    "d64": Kind(D64, page=16),
    "d256": Kind(GQA | {"headdim": 256}),
    "mla": Kind(MLA),
    "fp8": Kind(GQA | {"qkv_dtype": "float8_e4m3fn"}),
    "no pages": Kind(MQA, page=None),
    "large pages": Kind(MQA, page=256),
    "narrow window": Kind(MQA | {"window_size": (127, 0)}),
    "window": Kind(MQA | {"window_size": (4095, 0)}, keys=(1, 300, 4000, 19802)),
    "window in a wide table": Kind(D64 | {"window_size": (4095, 0)}, keys=(1, 4000, 19802), table=8192),
    "window both ways": Kind(MQA | {"causal": False, "window_size": (1000, 3)}, others=(1, 2, 6), table=8192),
    "chunk": Kind(GQA | {"attention_chunk": 8192}, chunk=True),
    "softcap": Kind(GQA | {"has_softcap": True}),
    "left padding": Kind(MQA, leftpad=True),
    "appended keys": Kind(MQA, appended=1),
    "given bound": Kind(GQA | {"num_splits": 16}),
    "one split": Kind(GQA | {"num_splits": 1}, others=(1, 9, 500)),
    "verification": Kind(MQA, queries=4, others=(4,)),
    "equal prefills": Kind(GQA, queries=700, keys=(700, 19802), others=(700,)),
    "ragged verification": Kind(MQA, queries=3, keys=(3, 2000, 19802), others=(1, 2, 3, 4)),
    "ragged verification, mla": Kind(MLA, queries=2, keys=(2, 2000, 19802), others=(1, 2, 3, 4)),
    "decode beside prefills": Kind(GQA, others=(1, 1, 8, 9, 10, 17, 300, 4000)),
    "decode beside prefills, d64": Kind(D64, others=(1, 1, 8, 9, 10, 17, 300, 4000), page=16),
    "decode beside prefills under a window": Kind(
        MQA | {"window_size": (1023, 0)}, others=(1, 9, 40, 4000), table=8192
    ),
}


def drawn(rng: random.Random, kind: Kind, keys: int) -> tuple[Problem, Lengths, int]:
    """A batch with the sequence in it, and its place."""
    batch = rng.choice([1, 2, 5, 31, 32, 100, 128, 256, 500, 991, 992, 993, 1500, rng.randint(1, 1500)])
    place, ragged = rng.randrange(batch), len(kind.others) > 1
    some = rng.sample(kind.others, rng.randint(1, len(kind.others)))  # so that not every batch has the longest
    numbers = np.random.default_rng(rng.getrandbits(32))
    queries = numbers.choice(some, batch).astype(np.int32)
    queries[place] = kind.queries
    longest = rng.choice([500, 3000, 30000, 200000])
    lengths = np.maximum(queries, numbers.integers(1, longest, batch, np.int32))
    lengths[place] = keys
    width = rng.choice([int(lengths.max()), int(lengths.max()), 20480, 131072, WIDE])
    width = max(width, int(lengths.max()), kind.table) + kind.appended
    more: dict[str, Any] = {}
    if kind.leftpad:
        more["leftpad_k"] = numbers.integers(0, lengths // 2 + 1, dtype=np.int32)
        more["leftpad_k"][place] = keys // 3
    if ragged:
        more["cu_seqlens_q"] = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    problem = problem_of(kind, batch, int(queries.max()), width, ragged)
    return problem, Lengths(lengths, **more), place


def problem_of(kind: Kind, batch: int, queries: int, width: int, ragged: bool) -> Problem:
    page = kind.page or 1
    return Problem(
        batch, queries, -(-width // page) * page, page_size=kind.page, has_cu_seqlens_q=ragged,
        has_leftpad_k=kind.leftpad, max_seqlen_k_new=kind.appended, **PROMISE, **kind.layer,
    )  # fmt: skip


def seen_by_the_forward(problem: Problem, rules: FA3Rules) -> tuple[Any, ...]:
    """The kernel that FA3 comes to by itself for this call, told what our metadata was made with; causal or not."""
    plan = make_plan(problem, rules)
    asked = replace(problem, policy="fa3", batch_invariant=False, num_splits=plan.num_splits, pack_gqa=plan.pack_gqa)
    own = make_plan(asked, rules)
    splits = own.num_splits > 1 and (problem.batch_size <= 992 or rules.splits_beyond_992)
    return (
        own.block_m, own.block_n, own.is_local, own.uses_one_wg, own.paged_kv_tma, own.pack_gqa, splits,
        plan.layout.num_splits,
    )  # fmt: skip


def splits_at(problem: Problem, rules: FA3Rules, lengths: Lengths, place: int) -> int:
    plan = make_plan(problem, rules)
    _, num_m_blocks, _ = sequence_blocks(problem, plan, lengths)
    return int(splits_of(plan, num_m_blocks, blocks_read(problem, plan, lengths))[place])


REFUSED = {  # the arguments for which each kind may be refused; all others for batch_size alone
    "window": {"window_size[0]", "batch_size"},
    "narrow window": {"window_size[0]"},
    "window both ways": {"max_seqlen_q", "batch_size"},
    "one split": {"max_seqlen_q"},
    "equal prefills": set(),
    "decode beside prefills": {"max_seqlen_q", "batch_size"},
    "decode beside prefills, d64": {"max_seqlen_q", "batch_size"},
    "decode beside prefills under a window": {"max_seqlen_q", "batch_size"},
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("build", TELLABLE)
def test_a_sequence_is_scheduled_alike_in_any_company(build: str, name: str) -> None:
    kind, rules, rng = KINDS[name], rules_for(BUILDS[build]), random.Random(build + name)
    if kind.chunk and not rules.has_attention_chunk:
        return
    refused, served = Counter[str](), 0
    for keys in kind.keys:
        seen: set[tuple[Any, ...]] = set()
        for _ in range(BATCHES // len(kind.keys)):
            problem, lengths, place = drawn(rng, kind, keys)
            try:
                kernel = seen_by_the_forward(problem, rules)
            except VarianceError as error:
                refused[error.argument] += 1
            else:
                seen.add((*kernel, splits_at(problem, rules, lengths, place)))
                served += 1
        assert len(seen) <= 1, f"{keys} keys: {seen}"
    assert set(refused) <= REFUSED.get(name, {"batch_size"})
    assert not (refused["batch_size"] and rules.splits_beyond_992)
    assert served > BATCHES / 16, f"nearly all are refused: {refused}"
    if not set(refused) - {"batch_size"}:
        assert served > 0.6 * BATCHES


@pytest.mark.parametrize("build", TELLABLE)
def test_the_kernel_comes_to_the_same(build: str, device: torch.device) -> None:
    """As the NumPy model, and to the same splits of a sequence, in its place in the tensor."""
    rng, seen = random.Random(build), {keys: set[int]() for keys in (300, 9000, 19802)}
    for batch in (1, 40, 64, 65, 300, 992):
        for window in ((-1, -1), (5000, 0)):
            lengths = [*list(seen)[: batch if batch < 3 else 3], *(rng.randint(1, 60000) for _ in range(batch - 3))]
            call: dict[str, Any] = {
                "batch_size": batch, "max_seqlen_q": 1, "max_seqlen_k": rng.choice([65536, 131072]), "num_heads": 16,
                "num_heads_k": 2, "headdim": 128, "page_size": 64, "causal": True, "window_size": window,
                "build": BUILDS[build], "policy": "balanced", "batch_invariant": True,
                "cache_seqlens": torch.tensor(lengths, dtype=torch.int32, device=device),
                "cu_seqlens_q": torch.arange(batch + 1, dtype=torch.int32, device=device),
            }  # fmt: skip
            made = fa3_metadata.get_scheduler_metadata(**call, backend="triton")
            assert torch.equal(made, fa3_metadata.get_scheduler_metadata(**call, backend="reference"))
            rows = fa3_metadata.unpack_metadata(made, fa3_metadata.metadata_layout(**call))
            order = rows["varlen_batch_idx"].tolist() if "varlen_batch_idx" in rows else list(range(batch))
            if window == (-1, -1):
                for place, sequence in enumerate(order):
                    if sequence < 3:
                        seen[lengths[sequence]].add(int(rows["num_splits_dynamic"][place]))
    assert all(len(splits) == 1 for splits in seen.values()), seen
    assert max(seen[19802]) > max(seen[300]) >= 1


@pytest.mark.parametrize("build", TELLABLE)
def test_the_most_queries_are_those_at_which_the_kernel_changes(build: str) -> None:
    """Counted one by one. FA3 comes to the same kernel for each of them, and to another for one more."""
    rules = rules_for(BUILDS[build])
    for name in ("gqa", "d64", "mla", "d256", "fp8", "no pages", "large pages", "window in a wide table",
                 "window both ways", "given bound", "one split"):  # fmt: skip
        one = invariance.of_one_query(problem_of(KINDS[name], 1, 1, WIDE, True))
        most = _most_queries(one, rules)
        kernels = [
            invariance.kernel_of(_planned(replace(one, max_seqlen_q=queries), rules))
            for queries in range(1, min(most, 1100) + 2)
        ]
        assert set(kernels[:most]) == {kernels[0]}
        assert len(kernels) <= most or kernels[most] != kernels[0]
        assert most < 1100 or (one.num_splits and not rules.one_wg_headdims), name


DECODE: dict[str, Any] = {"max_seqlen_q": 1, "max_seqlen_k": 8192, "page_size": 64} | MQA


@pytest.mark.parametrize(
    ("rules", "batch", "change"),
    [
        (VLLM, 992, {}),
        (SGLANG, 1500, {}),
        (UPSTREAM, 993, {}),
        (VLLM, 993, {"num_splits": 1}),
        (VLLM, 993, {"max_seqlen_q": 5000}),  # prefills, never split
        (VLLM, 1500, {"window_size": (127, 0)}),  # so few keys that they are never split
        (SGLANG, 8, {"has_cu_seqlens_q": True, "max_seqlen_q": 8}),  # 64 rows
        (SGLANG, 8, {"max_seqlen_q": 9}),  # another kernel, but that of every sequence
        (UPSTREAM, 8, {"has_cu_seqlens_q": True, "max_seqlen_q": 128}),  # a single tile: eight blocks of it
        (UPSTREAM, 8, {"has_seqused_q": True, "max_seqlen_q": 5000, "num_splits": 1}),
        (VLLM, 8, {"window_size": (8190, 0)}),
        (VLLM, 8, {"window_size": (8191, 0), "max_seqlen_k": 8256}),
        (SGLANG, 8, {"window_size": (9000, 0), "attention_chunk": 100}),  # local without the window, too
        (SGLANG, 8, {"window_size": (9000, 5), "causal": False, "max_seqlen_q": 8}),
    ],
)
def test_what_can_be_invariant_is_not_refused(rules: FA3Rules, batch: int, change: dict[str, Any]) -> None:
    make_plan(Problem(batch, **DECODE | PROMISE | change), rules)


@pytest.mark.parametrize(
    ("rules", "batch", "change", "message"),
    [
        (VLLM, 993, {}, "batch_size must be at most 992 with batch_invariant, since the forward of the vllm build does "
                        "not split .*, got 993: split the batch, or give num_splits=1"),
        (VLLM, 993, {"num_splits": 16}, "batch_size must be at most 992"),
        (rules_for("sgl-kernel-0.3.16"), 993, {}, "batch_size must be at most 992"),
        (SGLANG, 8, {"has_cu_seqlens_q": True, "max_seqlen_q": 9},
         "max_seqlen_q must be at most 8 with batch_invariant and ragged queries .*, got 9: .* decode rows a call"),
        (VLLM, 8, {"has_seqused_q": True, "max_seqlen_q": 9}, "max_seqlen_q must be at most 8"),
        (UPSTREAM, 8, {"has_cu_seqlens_q": True, "max_seqlen_q": 129}, "max_seqlen_q must be at most 128"),
        (UPSTREAM, 8, {"has_cu_seqlens_q": True, "max_seqlen_q": 2, "page_size": None},
         "max_seqlen_q must be at most 1"),
        (VLLM, 8, {"has_cu_seqlens_q": True, "max_seqlen_q": 9, "num_splits": 1}, "max_seqlen_q must be at most 8"),
        (SGLANG, 8, {"window_size": (8191, 0)},
         r"window_size\[0\] must be under max_seqlen_k - 1 = 8191 with batch_invariant, got 8191: .* at least 8193"),
        (VLLM, 8, {"window_size": (9000, 0), "num_splits": 1}, r"window_size\[0\] must be under"),
        (SGLANG, 8, {"forward_is_told": False}, "batch_invariant must be False for the sglang build unless"),
        (rules_for("vllm-0.8.5"), 8, {}, "batch_invariant must be False for the vllm-0.8.5 build, whose forward takes"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(rules: FA3Rules, batch: int, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        make_plan(Problem(batch, **DECODE | PROMISE | change), rules)
    assert isinstance(caught.value, VarianceError)
    make_plan(Problem(batch, **DECODE | {"policy": "balanced"} | change), rules)  # not promised, not refused


def test_sizes_that_share_a_plan_are_those_that_are_not_refused() -> None:
    """The function plans once for sizes that differ in nothing else: a refused one must not slip through."""
    lengths = torch.full((1000,), 100, dtype=torch.int32)
    call = {**DECODE, **PROMISE, "build": "vllm-0.33.0"} | {"window_size": (1023, 0)}
    for batch, width, right in (
        (4, 8192, True),
        (4, 1024, False),
        (8, 1025, True),
        (992, 2048, True),
        (993, 2048, False),
    ):
        asked = call | {"batch_size": batch, "max_seqlen_k": width, "cache_seqlens": lengths[:batch]}
        if right:
            fa3_metadata.get_scheduler_metadata(**asked)
        else:
            with pytest.raises(VarianceError):
                fa3_metadata.get_scheduler_metadata(**asked)


@pytest.mark.parametrize("build", TELLABLE)
def test_plans_are_shared_by_the_sizes_that_they_are_the_same_for(build: str) -> None:
    rules, shared = rules_for(BUILDS[build]), 0
    for change in ({}, {"window_size": (1023, 0)}, {"num_splits": 16}, {"has_cu_seqlens_q": True, "max_seqlen_q": 4}):
        problem = Problem(8, **DECODE | PROMISE | change)
        plan = make_plan(problem, rules)
        for batch, width in itertools.product((1, 8, 300, 992, 993, 1500), (500, 1024, 8192, 131072)):
            other = replace(problem, batch_size=batch, max_seqlen_k=width)
            if sizes_alone_differ(plan, problem, batch, width):
                assert plan_like(plan, problem, batch, width) == make_plan(other, rules)
                shared += 1
    assert shared > 20


def test_a_refusal_keeps_no_frames_alive() -> None:
    """What is remembered is not what was raised, which holds the caller's tensors."""
    problem = Problem(993, **DECODE | PROMISE)
    errors = []
    for _ in range(2):
        with pytest.raises(VarianceError) as caught:
            make_plan(problem, VLLM)
        errors.append(caught.value)
    assert errors[0] is not errors[1]
