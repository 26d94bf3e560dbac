"""Calls of `get_scheduler_metadata` as data: drawn widely over every argument, or placed where rules decide."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from fa3_metadata.triton_kernels.builds import rules_for
from fa3_metadata.triton_kernels.plan import LaunchPlan, make_plan
from fa3_metadata.triton_kernels.problem import Problem

LENGTHS = ("cache_seqlens", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new", "seqused_q", "leftpad_k")
POISON = -77777777


@dataclass(frozen=True)
class Case:
    """`args` uses the argument names of `get_scheduler_metadata`; lengths are lists, the dtype a name."""

    build: str
    args: dict[str, Any]
    arch: int = 90
    num_sms: int = 132
    rows: dict[str, list[int]] = field(default_factory=dict)  # expected; empty: not recorded
    size: int | None = None

    @property
    def static(self) -> dict[str, Any]:
        return {name: value for name, value in self.args.items() if name not in LENGTHS}

    def plan(self) -> LaunchPlan:
        present = {f"has_{n}": self.args.get(n) is not None for n in ("cu_seqlens_q", "seqused_q", "leftpad_k")}
        static = self.static | {"window_size": tuple(self.static.get("window_size", (-1, -1)))}
        return make_plan(Problem(**static, **present, arch=self.arch, num_sms=self.num_sms), rules_for(self.build))

    def arguments(
        self, device: torch.device | str, dtype: torch.dtype = torch.int32, stride: int = 1
    ) -> dict[str, Any]:
        """Keyword arguments for `get_scheduler_metadata`, lengths as tensors of this dtype and stride."""
        lengths = {}
        for name in LENGTHS:
            if (values := self.args.get(name)) is not None:
                spread = torch.full((len(values), stride), POISON, dtype=dtype)
                spread[:, 0] = torch.tensor(values, dtype=dtype)
                lengths[name] = spread.to(device)[:, 0]
        qkv_dtype = getattr(torch, self.static.get("qkv_dtype", "bfloat16"))
        static = self.static | {"qkv_dtype": qkv_dtype}
        return static | lengths | {"build": self.build, "arch": self.arch, "num_sms": self.num_sms}

    def paste(self) -> str:
        recorded = {name: value for name, value in asdict(self).items() if name not in ("rows", "size")}
        return f"Case(**{recorded!r})"


HEADS = [(8, 1), (32, 8), (64, 8), (16, 16), (7, 1), (28, 4), (1, 1), (5, 5), (128, 1), (12, 6), (40, 8), (24, 3)]
BATCHES = [0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 62, 63, 64, 100, 127, 128, 129, 255, 256, 257, 496, 512, 513]
LARGE_BATCHES = [900, 991, 992, 993, 1000, 1024, 1984, 1985, 3000, 5000]
HEADDIMS = [(64, None), (128, None), (256, None), (128, None), (32, None), (72, None), (80, None), (96, None),
            (112, None), (160, None), (192, None), (192, 128), (160, 128), (64, 512), (64, 256), (32, 512)]  # fmt: skip


def random_case(rng: random.Random, build: str, num_sms: int = 132, arch: int = 90, largest_batch: int = 5000) -> Case:
    """A case drawn widely over every argument, ugly ones included."""
    pick = rng.choice
    batch = min(pick(BATCHES) if rng.random() < 0.8 else pick(LARGE_BATCHES), largest_batch)
    heads, heads_k = pick(HEADS)
    headdim, headdim_v = pick(HEADDIMS)
    max_k = pick([0, 1, 64, 100, 300, 1000, 4096, 10000, 32768, 131072, 400000, rng.randint(1, 200000)])
    max_q = pick([1, 1, 1, 1, 2, 3, 4, 5, 8, 16, 64, 100, 128, 300])
    args: dict[str, Any] = {
        "batch_size": batch,
        "max_seqlen_q": max_q,
        "max_seqlen_k": max_k,
        "num_heads": heads,
        "num_heads_k": heads_k,
        "headdim": headdim,
        "headdim_v": headdim_v,
        "qkv_dtype": pick(["bfloat16", "bfloat16", "float16", "float8_e4m3fn"]),
        "cache_seqlens": _lengths(rng, batch, max_k),
        "page_size": pick([None, 1, 16, 64, 64, 96, 128, 176, 256, 512]),
        "causal": pick([True, True, False]),
        "window_size": pick([(-1, -1)] * 4 + [(127, 0), (4095, 0), (128, -1), (-1, 3), (0, 128), (max_k, max_q)]),
        "has_softcap": rng.random() < 0.1,
        "num_splits": pick([0, 0, 0, 1, 2, 3, 8, 16, 32, 64, 128, 200, 256]),
        "pack_gqa": pick([None, None, None, True, False]),
        "sm_margin": min(pick([0, 0, 0, 2, 4, 8, 16, 100, num_sms]), num_sms - 1),
    }
    args["num_splits"] = bound_told(build, args["num_splits"])
    if rules_for(build).has_attention_chunk and rng.random() < 0.06:
        args["attention_chunk"] = pick([1, 128, 1000, 8192])
    kind = rng.random()
    if kind < 0.25:
        args["cu_seqlens_q"] = _running_sum(rng, batch, max_q)
    elif kind < 0.4:
        args["seqused_q"] = [rng.randint(0, max_q) for _ in range(batch)]
    if rng.random() < 0.06:
        args["leftpad_k"] = [rng.randint(0, length) for length in args["cache_seqlens"]]
    if rng.random() < 0.08:
        args["max_seqlen_k_new"] = rng.randint(1, 8)
        if rng.random() < 0.5:
            args["cu_seqlens_k_new"] = _running_sum(rng, batch, args["max_seqlen_k_new"])
    return Case(build, args, arch=arch, num_sms=num_sms)


def boundary_case(rng: random.Random, build: str, num_sms: int = 132, largest_batch: int = 992) -> Case:
    """Total blocks * heads * 1.1 is a multiple of the SM count, or one block off: the reciprocal's last bit decides."""
    heads, heads_k = rng.choice(HEADS)
    batch = min(rng.choice([1, 2, 3, 8, 31, 32, 64, 100, 256, 512, 991, 992]), largest_batch)
    args: dict[str, Any] = {
        "batch_size": batch,
        "max_seqlen_q": 1,
        "max_seqlen_k": 4_000_000,
        "num_heads": heads,
        "num_heads_k": heads_k,
        "headdim": rng.choice([64, 128, 256]),
        "qkv_dtype": rng.choice(["bfloat16", "float8_e4m3fn"]),
        "cache_seqlens": [0] * batch,
        "page_size": rng.choice([None, 1, 64]),
        "causal": rng.random() < 0.5,
        "num_splits": rng.choice([8, 32, 128, 256]),
        "sm_margin": rng.choice([0, 0, 0, 4, 8, 16, num_sms - rng.randint(1, num_sms)]),
    }
    args["num_splits"] = bound_told(build, args["num_splits"])
    plan = Case(build, args, num_sms=num_sms).plan()
    m_blocks = -(-plan.q_heads_per_row // plan.block_m)
    per_block = plan.num_heads * m_blocks * 11
    exact = [k for k in range(1, 400) if (k * plan.num_sms * 10) % per_block == 0] or list(range(1, 400))
    total = rng.choice(exact) * plan.num_sms * 10 // per_block + rng.choice([-1, 0, 0, 0, 1])
    blocks = [0] * batch
    for _ in range(min(batch, 8)):
        share = rng.randint(0, max(total, 0))
        blocks[rng.randrange(batch)] += share
        total -= share
    blocks[rng.randrange(batch)] += max(total, 0)
    args["cache_seqlens"] = [n * plan.block_n - rng.randrange(plan.block_n) if n else 0 for n in blocks]
    return Case(build, args, num_sms=num_sms)


def bound_told(build: str, num_splits: int) -> int:
    """`num_splits`, or 0 for a build whose forward cannot be told."""
    return 0 if "num_splits" in rules_for(build).forward_lacks else num_splits


def crowded_case(rng: random.Random, build: str, num_sms: int = 132, largest_batch: int = 992) -> Case:
    """A few long sequences among many short ones and no bound given: how far they are split is FA3's own bound."""
    batch, max_q = rng.randint(2, min(rng.choice([8, 64, 200, 992]), largest_batch)), rng.choice([1, 1, 1, 2, 4, 8])
    heads, heads_k = rng.choice(HEADS)
    lengths = [rng.randint(1, 600) for _ in range(batch)]
    for _ in range(rng.choice([1, 1, 2, 3])):
        lengths[rng.randrange(batch)] = rng.randint(20_000, 131_072)
    args: dict[str, Any] = {
        "batch_size": batch,
        "max_seqlen_q": max_q,
        "max_seqlen_k": 131_072,
        "num_heads": heads,
        "num_heads_k": heads_k,
        "headdim": rng.choice([64, 128, 128, 256]),
        "cache_seqlens": lengths,
        "page_size": rng.choice([None, 16, 64]),
        "causal": rng.random() < 0.8,
        "window_size": rng.choice([(-1, -1), (-1, -1), (-1, -1), (40_000, 0)]),
        "sm_margin": rng.choice([0, 0, 0, 18, num_sms // 2]),
    }
    if rng.random() < 0.3:
        args["cu_seqlens_q"] = _running_sum(rng, batch, max_q)
    return Case(build, args, num_sms=num_sms)


def _lengths(rng: random.Random, batch: int, longest: int) -> list[int]:
    kind = rng.random()
    if kind < 0.2:
        return [longest] * batch
    if kind < 0.4:  # mostly short, a few long
        return [longest if rng.random() < 0.05 else rng.randint(0, min(longest, 512)) for _ in range(batch)]
    if kind < 0.5:
        return [rng.choice([0, 1, longest]) for _ in range(batch)]
    return [rng.randint(0, longest) for _ in range(batch)]


def _running_sum(rng: random.Random, batch: int, largest: int) -> list[int]:
    total = [rng.choice([0, 0, 5])]
    for _ in range(batch):
        total.append(total[-1] + rng.randint(0, largest))
    return total
