"""The key blocks that a window leaves, at every length: policy "balanced" splits these."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fa3_metadata.triton_kernels.builds import SGLANG
from fa3_metadata.triton_kernels.plan import make_plan
from fa3_metadata.triton_kernels.problem import Problem
from fa3_metadata.triton_kernels.reference import Lengths, blocks_read

from ..helpers.cases import Case
from .test_agreement import agree

MASKS = {"window": {"window_size": (1000, 0)}, "chunk": {"attention_chunk": 1000}}
DECODE = {"max_seqlen_q": 1, "num_heads": 8, "num_heads_k": 1, "headdim": 128, "page_size": 64, "causal": True}


def blocks_seen(seqlen_k: int, mask: str, block_n: int) -> int:
    """Blocks with a key that the last query sees, by looking at every key."""
    at = seqlen_k - 1
    first = at - 1000 if mask == "window" else at // 1000 * 1000
    return len({key // block_n for key in range(max(first, 0), seqlen_k)})


@pytest.mark.parametrize("mask", MASKS)
def test_the_model_counts_what_is_seen(mask: str) -> None:
    lengths = np.arange(0, 3300)
    problem = Problem(len(lengths), **DECODE | {"max_seqlen_k": 9000}, **MASKS[mask], policy="balanced")
    plan = make_plan(problem, SGLANG)
    found = blocks_read(problem, plan, Lengths(lengths))
    assert found.tolist() == [blocks_seen(int(length), mask, plan.block_n) for length in lengths]


@pytest.mark.parametrize("mask", MASKS)
def test_the_kernel_counts_what_the_model_counts(mask: str, device: torch.device) -> None:
    """At each place in a block. A few sequences are split so finely that a block more or less shows."""
    for first in range(1100, 1240, 4):
        args = DECODE | MASKS[mask] | {"batch_size": 4, "max_seqlen_k": 9000, "policy": "balanced"}
        agree(Case("sglang-kernel-0.4.2", args | {"cache_seqlens": [*range(first, first + 4)]}), device)
