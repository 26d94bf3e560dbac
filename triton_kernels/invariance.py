"""What `batch_invariant=True` promises, and on which facts of a call it stands.

The promise: the bits of a sequence's attention depend on its own queries, keys and lengths alone, not on which other
sequences are in its batch, how many, how long, or in which order. It holds from call to call of one layer, through
get_scheduler_metadata, a MetadataPlan or the wrapped forward. A call for which it would not hold is refused with a
`VarianceError`, which says what to do instead.

Bits follow from three things (hopper/flash_api.cpp, heuristics.h, tile_size.h and flash_fwd_combine_launch_template.h
of FlashAttention and of the forks):

    the kernel      kBlockM x kBlockN, a local mask or not, one MMA warpgroup or more, KV read by TMA or not, GQA packed
                    or not, with splits or without
    the splits      of the sequence: which key blocks are summed together
    the bound       num_splits, by which the kernel is chosen that combines splits, and the order of its sums

A sequence's splits are those of a fixed number of key blocks (balance.py), so that they follow from its own lengths.
The kernel and the bound are found from facts of the call. Those that must stay the same from call to call, since bits
depend on them: FA3 build, GPU (its number of SMs and its table of constants), dtype, heads, head dims, page size or
none, causal, window_size, attention_chunk, softcap, num_splits, pack_gqa and sm_margin as given, and which tensors are
given (queries as cu_seqlens_q, seqused_q or neither, leftpad_k, appended keys, qv, sinks). Those that may differ:

    batch_size      No bound of ours looks at it. Where a build's forward splits no sequence of more than 992 by itself,
                    a larger batch is refused, unless nothing is split anyway.
    max_seqlen_q    Without cu_seqlens_q and seqused_q every sequence has as many queries: it is a length of its own.
                    With them there may be shorter ones, for which FA3 would choose by their own length if they were
                    alone. So a call is refused in which the kernel or the bound is not that of a single query: decode
                    rows belong in a call of their own.
    max_seqlen_k    The bound is that of the widest page table there could be. A window that reaches over a whole table
                    is no window to FA3, and the next wider table makes it one: refused.
    total_q         Not looked at.

One difference in the kernel is none in the bits: FA3 takes a causal mask for none where max_seqlen_q is 1. Beside
longer ones, a sequence of one query runs in the causal kernel. Where that has the same tile, it goes through the same
key blocks in the same order, and masks nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from .problem import Problem, unchecked_replace

if TYPE_CHECKING:
    from .plan import LaunchPlan

WIDEST = 2**31 - 1  # tokens of a page table, for what must not depend on its width


class VarianceError(ValueError):
    """A call that cannot be batch invariant. `argument` is what stands in the way, `reason` how, and what to do."""

    def __init__(self, argument: str, reason: str) -> None:
        super().__init__(argument, reason)
        self.argument, self.reason = argument, reason

    def __str__(self) -> str:
        return f"{self.argument} {self.reason}"


def is_ragged(problem: Problem) -> bool:
    """Whether sequences may have fewer queries than max_seqlen_q."""
    return problem.has_cu_seqlens_q or problem.has_seqused_q


def in_widest_table(problem: Problem) -> Problem:
    """The same call with the widest page table."""
    return unchecked_replace(problem, max_seqlen_k=WIDEST)


def of_one_query(problem: Problem) -> Problem:
    """What does not differ between batches of such a layer: a single sequence of a single query."""
    return unchecked_replace(in_widest_table(problem), batch_size=1, max_seqlen_q=1, total_q=None)


def kernel_of(plan: LaunchPlan) -> Hashable:
    """What the bits depend on, but for the splits: the kernel and the bound. The causal mask is left out: see above."""
    return (
        plan.block_m, plan.block_n, plan.is_local, plan.uses_one_wg, plan.paged_kv_tma, plan.pack_gqa, plan.num_splits,
    )  # fmt: skip


def most_queries(kernel_at: Callable[[int], Hashable], most: int) -> int:
    """The largest max_seqlen_q up to `most` at which the kernel is that of one query.

    Each fact of `kernel_of` changes once at most as queries grow, so that they are searched by halves.
    """
    one, low, high = kernel_at(1), 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if kernel_at(middle) == one:
            low = middle
        else:
            high = middle - 1
    return low


def cannot_tell(problem: Problem, plan: LaunchPlan) -> VarianceError | None:
    """Why no call of this kind could be invariant: the forward finds its own bound, which depends on the batch."""
    rules = plan.rules
    if "num_splits" in rules.forward_lacks:
        return VarianceError("batch_invariant", f"must be False for the {rules.name} build, whose forward takes no "
                             f"num_splits: it finds a bound on splits by the batch's longest lengths")  # fmt: skip
    if not (problem.forward_is_told or problem.num_splits):
        return VarianceError("batch_invariant", f"must be False for the {rules.name} build unless the forward is told "
                             f"num_splits: it would find a bound by the batch's longest lengths")  # fmt: skip
    return None


def too_many_sequences(problem: Problem, plan: LaunchPlan, most: int) -> VarianceError | None:
    """Why a batch of more than `most` sequences cannot be, where the build's forward splits none of them by itself."""
    if problem.batch_size <= most or plan.rules.splits_beyond_992 or plan.num_splits == 1:
        return None
    return VarianceError("batch_size", f"must be at most {most} with batch_invariant, since the forward of the "
                         f"{plan.rules.name} build does not split sequences of larger batches one by one, got "
                         f"{problem.batch_size}: split the batch, or give num_splits=1")  # fmt: skip


def window_is_lost(problem: Problem, plan: LaunchPlan, is_local_in_widest_table: bool) -> VarianceError | None:
    """Why a window cannot be that FA3 takes for none in this page table, but not in a wider one."""
    if plan.is_local == is_local_in_widest_table:
        return None
    left = problem.window_size[0]
    return VarianceError("window_size[0]", f"must be under max_seqlen_k - 1 = {problem.max_seqlen_k - 1} with "
                         f"batch_invariant, got {left}: FA3 takes a window over the whole page table for none, but "
                         f"would not in a wider one. Give both sides a max_seqlen_k (for most builds: a page table) of "
                         f"at least {left + 2} tokens, or, where no sequence can ever have more, -1")  # fmt: skip


def too_many_queries(problem: Problem, most: int) -> VarianceError | None:
    """Why ragged queries of more than `most` tokens cannot be."""
    if problem.max_seqlen_q <= most:
        return None
    return VarianceError("max_seqlen_q", f"must be at most {most} with batch_invariant and ragged queries "
                         f"(cu_seqlens_q or seqused_q), got {problem.max_seqlen_q}: for more, FA3 attends with another "
                         f"kernel to all sequences, the short ones too. Give decode rows a call of their own, and "
                         f"sequences of one length another, without cu_seqlens_q and seqused_q")  # fmt: skip
