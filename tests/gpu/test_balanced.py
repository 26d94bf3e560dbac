"""Policy "balanced" with real attention: as exact as FA3's own schedule, repeatable, and never beyond its bound."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata import MetadataPlan, MetadataPlans, step, wrap_forward
from fa3_metadata.api import plan_call
from fa3_metadata.arguments import device_facts, gpu_name
from fa3_metadata.calls import ForwardCall
from fa3_metadata.installed import load_forward
from fa3_metadata.triton_kernels.builds import rules_for
from fa3_metadata.triton_kernels.plan import make_plan
from fa3_metadata.triton_kernels.problem import unchecked_replace

from ..helpers.attention_reference import attention
from .test_integration import ASKED, BF16, KINDS, LENGTHS, PLAN, for_vllm, ints, layer, nodes, rand
from .test_wheels import PACKAGE, WHEEL

KITS = ("sglang-kernel", "vllm")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(PACKAGE not in KITS, reason=f"needs the wheel of one of {', '.join(KITS)}, found {PACKAGE}"),
]
SHORTER = tuple(max(1, n // 3) for n in LENGTHS)
ROUNDING = 1e-4  # of an error, relative: what FA3's own may be better by luck


def output_of(answer: Any) -> torch.Tensor:
    """Without the log-sum-exp that may come with it."""
    output: torch.Tensor = answer if isinstance(answer, torch.Tensor) else answer[0]
    return output


class Layer:
    """One layer, attended to by FA3's own path and by the wrapped forward, with what the latter was handed."""

    def __init__(self, call: dict[str, Any], **options: Any) -> None:
        self.call, self.handed = call, list[tuple[torch.Tensor | None, int]]()
        self.theirs = for_vllm(call) if PACKAGE == "vllm" else call
        self.caches = [call["k_cache"], call["v_cache"]]
        self.fresh = [cache.clone() for cache in self.caches] if "k" in call else []  # for keys that are appended
        self.options = {"policy": "balanced"} | options
        self.forward = forward = load_forward(str(WHEEL))

        @functools.wraps(forward)  # with its signature, which the wrapper reads
        def spy(**call: Any) -> Any:
            self.handed.append((call.get("scheduler_metadata"), call.get("num_splits", 0)))
            return forward(**call)

        self.wrapped = wrap_forward(spy, WHEEL, **self.options)

    def by_itself(self) -> torch.Tensor:
        return self._run(self.forward)

    def balanced(self) -> torch.Tensor:
        with step():
            out = self._run(self.wrapped)
        self.check_bound()
        return out

    def _run(self, function: Callable[..., torch.Tensor]) -> torch.Tensor:
        self.refresh()
        return output_of(function(**self.theirs)).view(*self.call["q"].shape[:-1], -1).clone()

    def refresh(self) -> None:
        """Take back what appended keys have written to the caches."""
        for cache, fresh in zip(self.caches, self.fresh, strict=False):
            cache.copy_(fresh)

    def layout(self) -> Any:
        """What `wrap_forward` should have come to, from the call itself."""
        asked, device, rules = ForwardCall.read(self.theirs), self.call["q"].device, rules_for(str(WHEEL))
        problem = asked.problem(*device_facts(device, None, None), rules.bound_depends_on_batch)
        return make_plan(unchecked_replace(problem, **self.options, gpu=gpu_name(device)), rules).layout

    def check_bound(self) -> None:
        """The metadata last handed over has no more splits than the forward was told to have room for."""
        metadata, num_splits = self.handed[-1]
        assert metadata is not None, "the wrapper passed the call through"
        layout = self.layout()
        assert num_splits == layout.num_splits
        splits = fa3_metadata.unpack_metadata(metadata, layout).get("num_splits_dynamic")
        room = max(num_splits, 1)  # 0: the forward comes to one split by itself
        assert splits is None or (splits.min() >= 1 and splits.max() <= room)


def errors(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", ASKED)
def test_as_exact_as_fa3s_own_schedule(kind: str) -> None:
    """Against attention in float64, over all sequences and for each of them (short ones do not hide behind long)."""
    torch.manual_seed(0)
    one = Layer(KINDS[kind]())
    wanted, theirs, ours = attention(one.call), one.by_itself(), one.balanced()
    own = errors(theirs, wanted)
    assert own < 0.02, f"the reference is not what this kernel computes: {own:.3g}"
    assert errors(ours, wanted) <= 1.2 * own + ROUNDING
    starts = one.call.get("cu_seqlens_q")
    for i in range(len(LENGTHS)):
        rows: Any = i if starts is None else slice(int(starts[i]), int(starts[i + 1]))
        if wanted[rows].numel() and wanted[rows].norm() > 0:
            assert errors(ours[rows], wanted[rows]) <= 1.5 * errors(theirs[rows], wanted[rows]) + 10 * ROUNDING, i


@pytest.mark.parametrize("kind", ASKED)
def test_the_same_bits_every_time(kind: str) -> None:
    torch.manual_seed(1)
    one = Layer(KINDS[kind]())
    first = one.balanced()
    assert all(torch.equal(one.balanced(), first) for _ in range(4))


@pytest.mark.parametrize("kind", ASKED)
def test_a_graph_follows_the_lengths(kind: str) -> None:
    torch.manual_seed(2)
    one = Layer(KINDS[kind]())
    lengths, padding = one.call["cache_seqlens"], one.call.get("cache_leftpad")
    one.balanced()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = output_of(one.wrapped(**one.theirs))
    one_captured = one.handed[-1]
    if padding is not None:
        padding.fill_(0)
    for new in (LENGTHS, SHORTER, tuple(reversed(LENGTHS)), LENGTHS):
        lengths.copy_(ints(*new))
        expected = one.balanced()
        for _ in range(5):
            one.refresh()
            graph.replay()
            assert torch.equal(captured.view_as(expected), expected), f"lengths {new}"
        assert one.handed[-1][1] == one_captured[1], "the bound goes by static facts alone"
        one.handed.append(one_captured)
        one.check_bound()


def batch_of(lengths: list[int], own: int, pool: dict[str, torch.Tensor], seed: int, **more: Any) -> dict[str, Any]:
    """A batch with `pool`'s sequence at place `own`; the others are random."""
    generator = torch.Generator("cuda").manual_seed(seed)
    b, width = len(lengths), pool["table"].numel()
    pages = len(pool["k_cache"])
    table = torch.randint(0, pages, (b, width), generator=generator, device="cuda", dtype=torch.int32)
    table[own] = pool["table"]
    q = torch.randn(b, *pool["q"].shape, generator=generator, device="cuda", dtype=BF16)
    q[own] = pool["q"]
    call = {"q": q, "k_cache": pool["k_cache"], "v_cache": pool["v_cache"], "causal": True, "page_table": table}
    return call | {"cache_seqlens": ints(*lengths)} | more


INVARIANT: dict[str, tuple[tuple[int, int, int, int], dict[str, Any]]] = {  # q heads, KV heads, head dim, queries
    "mqa": ((8, 1, 128, 1), {}),
    "gqa": ((32, 8, 128, 1), {}),
    "verification": ((8, 1, 128, 4), {}),
    "window": ((8, 1, 128, 1), {"window_size": (1023, 0)}),
    "wide window": ((16, 2, 128, 1), {"window_size": (4095, 0)}),
    "given bound": ((8, 1, 128, 1), {"num_splits": 16}),
}


@pytest.mark.parametrize("length", [1, 700, 3000, 12000])
@pytest.mark.parametrize("kind", INVARIANT)
def test_batch_invariant_rows_have_the_same_bits_in_any_company(kind: str, length: int) -> None:
    (heads, heads_k, dim, queries), more = INVARIANT[kind]
    torch.manual_seed(length)
    pool = {
        "q": rand(queries, heads, dim), "k_cache": rand(800, 64, heads_k, dim), "v_cache": rand(800, 64, heads_k, dim),
        "table": torch.randint(0, 800, (200,), dtype=torch.int32, device="cuda"),
    }  # fmt: skip
    rng, seen, bounds = random.Random(length), [], set()
    for others, place in ((0, 0), (3, 2), (3, 0), (60, 0), (60, 59)):
        lengths = [rng.randint(queries, 12800) for _ in range(others)]
        lengths.insert(place, max(length, queries))
        one = Layer(batch_of(lengths, place, pool, others + place, **more), batch_invariant=True)
        seen.append(one.balanced()[place])
        bounds.add(one.handed[-1][1])
    assert len(bounds) == 1, "the bound depends on the batch"
    assert all(torch.equal(out, seen[0]) for out in seen)


def test_no_random_batch_has_more_splits_than_its_bound() -> None:
    """And none of their outputs is wrong: what has more splits than there is room for writes over something else."""
    rng = random.Random(0)
    caches = {(hk, d): (rand(2000, 64, hk, d), rand(2000, 64, hk, d)) for hk, d in ((1, 128), (8, 128), (4, 128))}
    split = 0
    for i in range(200):
        (heads_k, dim), (k_cache, v_cache) = rng.choice(list(caches.items()))
        b, width = rng.choice((1, 2, 7, 31, 64, rng.randint(1, 300))), rng.choice((1, 4, 20, 300))
        longest = rng.randint(1, width * 64)
        queries = rng.choice((1, 1, 1, 4))
        call = {
            "q": rand(b, queries, heads_k * rng.choice((1, 4, 8)), dim), "k_cache": k_cache, "v_cache": v_cache,
            "cache_seqlens": ints(*(rng.randint(1, longest) for _ in range(b))), "causal": rng.random() < 0.8,
            "page_table": torch.randint(0, 2000, (b, width), dtype=torch.int32, device="cuda"),
            "window_size": rng.choice(((-1, -1), (-1, -1), (255, 0), (2047, 0))), "num_splits": rng.choice((0, 0, 9)),
        }  # fmt: skip
        has_window = call["window_size"][0] < width * 64 - 1  # one over all of the table is not batch invariant
        options = {
            "batch_invariant": has_window and rng.random() < 0.2, "max_partial_bytes": rng.choice((2**20, 2**28))
        }  # fmt: skip
        one = Layer(call, **options)
        ours, theirs = one.balanced(), one.by_itself()
        split += one.handed[-1][1] > 1
        apart = (ours - theirs).double().flatten(1).norm(dim=1) / theirs.double().flatten(1).norm(dim=1).clamp_min(1e-3)
        assert apart.max() < 0.02, f"batch {i}: {options}"
    assert split > 100, "hardly any batch may split"


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_all_groups_of_a_balanced_plan_are_refreshed_by_one_node(groups: int) -> None:
    windows = [(-1, -1), (1023, 0), (127, 0)][:groups]
    plans = MetadataPlans([MetadataPlan(**PLAN, window_size=window, policy="balanced") for window in windows])
    lengths = torch.randint(1, 8192, (40,), dtype=torch.int32, device="cuda")
    plans.update(lengths)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        made = plans.update(lengths)
    assert nodes(graph) == 1
    graph.instantiate()
    for seed in range(5):
        torch.manual_seed(seed)
        lengths.copy_(torch.randint(1, 8192, (40,), dtype=torch.int32))
        graph.replay()
        for plan, window, metadata in zip(plans.plans, windows, made, strict=True):
            call = {
                "batch_size": 40, "max_seqlen_q": 1, "max_seqlen_k": 8192, "num_heads": 8, "num_heads_k": 1,
                "headdim": 128, "page_size": 64, "causal": True, "window_size": window, "build": WHEEL,
                "policy": "balanced", "num_splits": plan.num_splits, "cache_seqlens": lengths,
            }  # fmt: skip
            assert torch.equal(metadata, fa3_metadata.get_scheduler_metadata(**call))
            layout = plan_call(call)[3].layout
            splits = fa3_metadata.unpack_metadata(metadata, layout).get("num_splits_dynamic")
            assert splits is None or splits.max() <= plan.forward_arguments()["num_splits"] == layout.num_splits


def test_a_plan_gives_the_bits_of_the_wrapper() -> None:
    """The forward with a plan's own arguments, against the same layer by the wrapper with that bound."""
    torch.manual_seed(3)
    call = layer()
    width = call["page_table"].shape[1] * 64
    more = {"varying": ["cu_seqlens_q"]} if PACKAGE == "vllm" else {}
    plan = MetadataPlan(**PLAN | {"max_seqlen_k": width, "max_batch_size": len(LENGTHS)}, policy="balanced", **more)
    one = Layer(call | {"num_splits": plan.num_splits})
    plan.update(call["cache_seqlens"], **({"cu_seqlens_q": one.theirs["cu_seqlens_q"]} if more else {}))
    out = one.forward(**one.theirs | plan.forward_arguments(**one.theirs)).view_as(call["q"])
    assert torch.equal(out, one.balanced())
