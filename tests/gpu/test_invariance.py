"""batch_invariant with real attention: the output bits of a sequence in random batches, by every road, are the same."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata import MetadataPlan, wrap_forward
from fa3_metadata.installed import load_forward
from fa3_metadata.triton_kernels.builds import rules_for
from fa3_metadata.triton_kernels.invariance import VarianceError

from .test_balanced import output_of
from .test_integration import ASKED, BF16, HAS_PAGED_AND_LOCAL, PACKAGE, WHEEL, for_vllm, ints, needs_wheel, rand

pytestmark = [pytest.mark.gpu, needs_wheel]

BATCHES = 200
PAGE, PAGES, OWN_PAGES = 64, 800, 200  # the first OWN_PAGES are the looked-at sequence's alone
UNPAGED = 3000  # keys of an unpaged cache
GRAPHS = 10  # of different shapes, each replayed over BATCHES / GRAPHS batches
PROMISE: dict[str, Any] = {"policy": "balanced", "batch_invariant": True}
STATIC = ("max_seqlen_k_new", "causal", "window_size", "attention_chunk", "num_splits")  # as a plan takes them


@dataclass(frozen=True)
class Kind:
    """A kind of layer, the queries of the sequence that is looked at, and those that others may have."""

    heads: int = 8
    heads_k: int = 1
    dim: int = 128
    dim_v: int | None = None
    queries: int = 1
    others: tuple[int, ...] = (1,)  # more than one number: ragged
    more: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()  # kinds of test_integration.py that the wheel must be asked for
    paged: bool = True
    pages: int = 1  # of the narrowest page table
    may_be_refused: bool = False
    most: int = 1500  # sequences
    leftpad: bool = False
    appended: int = 0

    @property
    def ragged(self) -> bool:
        return len(self.others) > 1

    @property
    def longest(self) -> int:
        return (OWN_PAGES * PAGE if self.paged else UNPAGED) - self.appended


KINDS = {
    "mqa": Kind(),
    "gqa": Kind(32, 8),
    "mha": Kind(4, 4),
    "not causal": Kind(more={"causal": False}),
    "head dim 64": Kind(8, 8, 64, needs=("head dim 64",)),
    "head dim 256": Kind(8, 4, 256, needs=("head dim 256",), most=500),
    "mla": Kind(16, 1, 64, 512, needs=("mla",), most=500),
    "narrow window": Kind(more={"window_size": (127, 0)}, needs=("window",), pages=4),
    "window": Kind(16, 2, more={"window_size": (4095, 0)}, needs=("window",), pages=65),
    "window that may be over all": Kind(
        more={"window_size": (4095, 0)}, needs=("window",), may_be_refused=True, most=900
    ),
    "chunk": Kind(more={"attention_chunk": 2048}, needs=("chunk",)),
    "given bound": Kind(more={"num_splits": 16}),
    "one split": Kind(more={"num_splits": 1}),
    "verification": Kind(queries=4, others=(4,), most=500),
    "prefill": Kind(queries=200, others=(200,), most=40),
    "ragged verification": Kind(queries=3, others=(1, 2, 3, 4), most=500),
    "one query among ragged ones": Kind(others=(1, 2, 3, 4), most=500),
    # By itself in the kernel without a mask, beside others in the causal one.
    "one query among ragged ones, mla": Kind(16, 1, 64, 512, others=(1, 2, 3, 4), needs=("mla",), most=200),
    "one query among ragged ones, head dim 256": Kind(
        8, 4, 256, others=(1, 2, 3), needs=("head dim 256",), most=200
    ),
    "decode beside prefills": Kind(others=(1, 1, 1, 8, 9, 40, 300), may_be_refused=True, most=200),
    "no pages": Kind(paged=False, most=200, needs=("not paged",)),
    "left padding": Kind(paged=False, most=200, leftpad=True, needs=("left padding",)),
    "appended keys": Kind(appended=1, most=500, needs=("appended keys",)),
}  # fmt: skip
SERVED = [
    name for name, kind in KINDS.items()
    if set(kind.needs) <= set(ASKED) and (HAS_PAGED_AND_LOCAL or not kind.paged)
    and not (name == "prefill" and PACKAGE == "vllm")  # whose queries are all called ragged
]  # fmt: skip


class Sequence:
    """The sequence that is looked at, and the caches in which it lies beside others."""

    def __init__(self, kind: Kind, keys: int) -> None:
        self.kind, self.keys = kind, max(min(keys, kind.longest), kind.queries)
        shape = (PAGES, PAGE) if kind.paged else (9, UNPAGED)
        self.k_cache = rand(*shape, kind.heads_k, kind.dim)
        self.v_cache = rand(*shape, kind.heads_k, kind.dim_v or kind.dim)
        self.pages = torch.randperm(OWN_PAGES, device="cuda").to(torch.int32)
        self.q = rand(kind.queries, kind.heads, kind.dim)
        self.qv = rand(kind.queries, kind.heads, 512) if kind.dim_v == 512 else None
        self.new = [rand(kind.appended, kind.heads_k, kind.dim) for _ in "kv"] if kind.appended else []

    def alone(self) -> Batch:
        """By itself, under the widest page table."""
        return Batch(self, random.Random(0), [self.kind.queries], 0, self.kind.longest)

    def drawn(self, rng: random.Random) -> Batch:
        """With others, at a place of its own."""
        kind = self.kind
        count = min(kind.most, rng.choice([1, 2, 7, 64, 65, 200, 500, 992, 993, 1500, rng.randint(1, 1500)]))
        some = rng.sample(kind.others, rng.randint(1, len(kind.others)))
        queries, place = [rng.choice(some) for _ in range(count)], rng.randrange(count)
        queries[place] = kind.queries
        return Batch(self, rng, queries, place, rng.choice([500, 3000, kind.longest]))


class Batch:
    """A batch with the sequence in it: its call, as the wheel's forward takes it."""

    def __init__(self, own: Sequence, rng: random.Random, queries: list[int], place: int, longest: int) -> None:
        kind = own.kind
        self.own, self.queries, self.place, self.longest = own, queries, place, longest
        self.starts = [0]
        for count in queries:
            self.starts.append(self.starts[-1] + count)
        lengths = self._lengths(rng)
        count, total = len(queries), self.starts[-1]
        shape = (total,) if kind.ragged else (count, kind.queries)
        width = rng.choice([max(lengths) + kind.appended, kind.longest + kind.appended])
        self.width = max(-(-width // PAGE), kind.pages)
        self.call: dict[str, Any] = {
            "q": rand(*shape, kind.heads, kind.dim), "cache_seqlens": ints(*lengths), "causal": True,
            "page_table": torch.empty(count, self.width, dtype=torch.int32, device="cuda") if kind.paged else None,
            "k_cache": own.k_cache, "v_cache": own.v_cache,
        } | kind.more  # fmt: skip
        if kind.ragged:
            self.call |= {"cu_seqlens_q": ints(*self.starts), "max_seqlen_q": max(queries)}
        if own.qv is not None:
            self.call |= {"qv": rand(*shape, kind.heads, 512), "softmax_scale": 0.07}
        if kind.appended:
            self.call |= {name: rand(count, kind.appended, kind.heads_k, kind.dim) for name in "kv"}
        if kind.leftpad:
            self.call["cache_leftpad"] = ints(*(n // 3 for n in lengths))
        if not kind.paged:
            rows = torch.randint(1, 9, (count,), device="cuda")
            rows[place] = 0
            self.call |= {name: getattr(own, name)[rows] for name in ("k_cache", "v_cache")}
        self._put()
        self.theirs = for_vllm(self.call) if PACKAGE == "vllm" else self.call

    def _lengths(self, rng: random.Random) -> list[int]:
        lengths = [max(count, rng.randint(1, self.longest)) for count in self.queries]
        lengths[self.place] = self.own.keys
        return lengths

    def _put(self) -> None:
        """The sequence in its place, and others' pages beside."""
        own, call = self.own, self.call
        rows = self.rows
        call["q"][rows] = own.q
        if own.qv is not None:
            call["qv"][rows] = own.qv
        for name, new in zip("kv", own.new, strict=False):
            call[name][self.place] = new
        if own.kind.paged:
            call["page_table"].random_(OWN_PAGES, PAGES)
            call["page_table"][self.place] = own.pages[: self.width]

    @property
    def rows(self) -> Any:
        return slice(*self.starts[self.place : self.place + 2]) if self.own.kind.ragged else self.place

    def refill(self, rng: random.Random) -> None:
        """Other lengths, pages and queries in the same tensors, as a replayed graph finds them."""
        longest = self.width * PAGE - self.own.kind.appended if self.own.kind.paged else UNPAGED
        self.longest = rng.randint(1, longest)
        lengths = [min(length, longest) for length in self._lengths(rng)]
        self.call["cache_seqlens"].copy_(ints(*lengths))
        if self.own.kind.leftpad:
            self.call["cache_leftpad"].copy_(ints(*(n // 3 for n in lengths)))
        self.call["q"].normal_()
        self._put()

    def of_own(self, output: Any) -> torch.Tensor:
        return output_of(output).view(*self.call["q"].shape[:-1], -1)[self.rows].clone()


# ---- the roads: each yields the sequence's output, or None where it was refused ------------------------------------

Outputs = Iterator[torch.Tensor | None]
forward = functools.cache(lambda: load_forward(str(WHEEL)))


def by_function(own: Sequence, rng: random.Random) -> Outputs:
    for _ in range(BATCHES):
        batch = own.drawn(rng)
        yield one_by_function(batch)


def one_by_function(batch: Batch) -> torch.Tensor | None:
    kind, call = batch.own.kind, batch.call
    page = {"page_size": PAGE} if kind.paged else {}
    more = {name: value for name, value in kind.more.items() if name in STATIC}
    tensors = {"cu_seqlens_q": batch.theirs.get("cu_seqlens_q"), "leftpad_k": call.get("cache_leftpad")}
    asked = {
        "batch_size": len(batch.queries), "max_seqlen_q": max(batch.queries), "num_heads": kind.heads,
        "max_seqlen_k": batch.width * PAGE if kind.paged else UNPAGED, "num_heads_k": kind.heads_k,
        "headdim": kind.dim, "headdim_v": kind.dim_v, "qkv_dtype": BF16, "max_seqlen_k_new": kind.appended,
        "causal": True, "build": WHEEL, "cache_seqlens": call["cache_seqlens"],
    } | tensors | page | more | PROMISE  # fmt: skip
    try:
        metadata = fa3_metadata.get_scheduler_metadata(**asked)
    except VarianceError:
        return None
    layout = fa3_metadata.metadata_layout(**asked)
    told = {"scheduler_metadata": metadata, "num_splits": layout.num_splits}
    if PACKAGE != "vllm":
        told["pack_gqa"] = layout.pack_gqa
    return batch.of_own(forward()(**batch.theirs | told))


def by_plan(own: Sequence, rng: random.Random) -> Outputs:
    """One plan for all batches, of the widest page table."""
    kind = own.kind
    ragged = kind.ragged or PACKAGE == "vllm"
    most = kind.most if rules_for(str(WHEEL)).splits_beyond_992 else min(kind.most, 992)
    try:
        plan = MetadataPlan(
            max_batch_size=most, max_seqlen_k=OWN_PAGES * PAGE if kind.paged else UNPAGED, num_heads=kind.heads,
            max_seqlen_q=max(kind.others), num_heads_k=kind.heads_k, headdim=kind.dim, headdim_v=kind.dim_v,
            page_size=PAGE if kind.paged else None, max_seqlen_k_new=kind.appended, device="cuda", build=str(WHEEL),
            varying=["cu_seqlens_q"] * ragged + ["leftpad_k"] * kind.leftpad, **{"causal": True} | kind.more, **PROMISE,
        )  # fmt: skip
    except VarianceError:
        yield None
        return
    for _ in range(BATCHES):
        batch = own.drawn(rng)
        if len(batch.queries) > most:
            continue
        more = {"cu_seqlens_q": batch.theirs.get("cu_seqlens_q"), "leftpad_k": batch.call.get("cache_leftpad")}
        call = batch.theirs
        if kind.ragged or PACKAGE == "vllm":
            call["max_seqlen_q"] = max(kind.others)
        plan.update(batch.call["cache_seqlens"], **{name: one for name, one in more.items() if one is not None})
        try:
            yield batch.of_own(plan.run(forward(), **call))
        except ValueError:  # a page table over which the window reaches: another kernel
            yield None


class Spied:
    """The wrapped forward, and what it handed on."""

    def __init__(self) -> None:
        original = forward()
        self.handed: list[tuple[torch.Tensor | None, int]] = []

        @functools.wraps(original)  # with its signature, which the wrapper reads
        def spy(**call: Any) -> Any:
            self.handed.append((call.get("scheduler_metadata"), call.get("num_splits", 0)))
            return original(**call)

        self.wrapped = wrap_forward(spy, WHEEL, **PROMISE)

    def attend(self, batch: Batch) -> torch.Tensor | None:
        output = self.wrapped(**batch.theirs)
        return None if self.was_refused() else batch.of_own(output)

    def was_refused(self) -> bool:
        metadata, num_splits = self.handed[-1]
        assert metadata is not None or num_splits >= 1, "FA3's own schedule, which depends on the batch"
        return metadata is None


def by_wrapper(own: Sequence, rng: random.Random) -> Outputs:
    spied = Spied()
    for _ in range(BATCHES):
        yield spied.attend(own.drawn(rng))


def by_graph(own: Sequence, rng: random.Random) -> Outputs:
    spied = Spied()
    for _ in range(GRAPHS):
        batch = own.drawn(rng)
        spied.attend(batch)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = spied.wrapped(**batch.theirs)
        for _ in range(BATCHES // GRAPHS):
            batch.refill(rng)
            graph.replay()
            yield None if spied.was_refused() else batch.of_own(output)


ROADS: dict[str, Callable[[Sequence, random.Random], Outputs]] = {
    "function": by_function, "plan": by_plan, "wrapper": by_wrapper, "graph": by_graph
}  # fmt: skip
LENGTHS = {"function": (1, 12000), "plan": (300, 2000), "wrapper": (2000, 12000), "graph": (1, 300)}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", SERVED)
def test_a_sequence_has_the_same_bits_in_any_batch(name: str, road: str) -> None:
    """As by itself. 200 batches by each road, for each of two lengths in turn."""
    kind, served, refused = KINDS[name], 0, 0
    for keys in LENGTHS[road]:
        torch.manual_seed(keys)
        own = Sequence(kind, keys)
        expected = one_by_function(own.alone())
        assert expected is not None
        assert bool(expected.isfinite().all())
        assert float(expected.abs().max()) > 0
        for output in ROADS[road](own, random.Random(f"{name} {road} {keys}")):
            if output is None:
                refused += 1
                continue
            served += 1
            assert torch.equal(output, expected), f"{keys} keys, after {served} batches"
    some_too_large = kind.most > 992 and not rules_for(str(WHEEL)).splits_beyond_992
    if not (kind.may_be_refused or some_too_large):
        assert refused == 0
        assert served >= len(LENGTHS[road]) * BATCHES
    elif not (kind.may_be_refused and road == "plan"):  # of the widest batch that there may be
        assert served > len(LENGTHS[road]) * BATCHES / 20


@pytest.mark.parametrize("name", [name for name in SERVED if KINDS[name].may_be_refused])
def test_what_is_refused_gets_one_split_and_is_right(name: str) -> None:
    """Passed through, and as exact as it was: what is lost is the promise alone."""
    kind, rng, seen = KINDS[name], random.Random(name), 0
    torch.manual_seed(0)
    spied, own = Spied(), Sequence(kind, 2000)
    for _ in range(30):
        batch = own.drawn(rng)
        output = output_of(spied.wrapped(**batch.theirs)).clone().float()
        if spied.was_refused():
            seen += 1
            assert spied.handed[-1][1] == 1
            theirs = output_of(forward()(**batch.theirs)).float()
            assert float((output - theirs).norm() / theirs.norm()) < 0.02
    # vLLM's forward is told a width, and so can be told one that is wider than the window.
    assert seen == 0 if PACKAGE == "vllm" and not kind.ragged else seen > 3
