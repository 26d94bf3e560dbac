"""What is wrong with a schedule, in words, and what to set: found by simulating what else could be done.

Every number here is predicted by simulator.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..triton_kernels.builds import MAX_DYNAMIC_SPLIT_BATCH, FA3Rules, unsupported_reason
from ..triton_kernels.invariance import VarianceError
from ..triton_kernels.plan import make_plan
from ..triton_kernels.problem import DEFAULT_PARTIAL_BYTES, Problem
from ..triton_kernels.reference import Lengths, blocks_read, sequence_blocks
from .cards import CardCosts
from .simulator import Simulation, simulate

_WORTH_SAYING = 0.02  # of a layer's time
_FILLED = 0.9  # busy share from which nobody waits for more splits
_BOUNDS = (32, 48, 64, 96, 128)
_SHORT_BLOCKS = 4  # FA3 allows contexts of up to so many key blocks one split


@dataclass(frozen=True)
class Finding:
    """One thing to know about a schedule."""

    kind: str
    text: str
    saves_us: float = 0.0  # of a layer, by what the text says to set; 0: nothing, or not known


@dataclass(frozen=True, eq=False)
class Case:
    """A call whose alternatives can be simulated."""

    problem: Problem
    rules: FA3Rules
    lengths: Lengths
    costs: CardCosts
    now: Simulation

    def instead(self, **changes: object) -> Simulation:
        """The call with other fields of its problem."""
        problem = replace(self.problem, **changes)  # type: ignore[arg-type]
        return simulate(problem, make_plan(problem, self.rules), self.lengths, costs=self.costs)

    def saved(self, other: Simulation) -> float:
        """us that the other one saves."""
        return self.now.time_us - other.time_us

    def is_worth(self, saved_us: float) -> bool:
        return saved_us > _WORTH_SAYING * self.now.time_us


def diagnose(case: Case) -> list[Finding]:
    """What there is to say, what costs most first."""
    if not len(case.now.tiles):
        return []
    checks = (_short_contexts, _bound, _windows, _beyond_992, _combining, _one_long_tile)
    found = [finding for check in checks if (finding := check(case))]
    found.sort(key=lambda finding: -finding.saves_us)
    others = (_partial_outputs, _larger_batch, _page_size)
    return found + [finding for check in others if (finding := check(case))]


def _balanced(case: Case) -> Simulation | None:
    """By policy "balanced"; None where it is that already, or leaves the call to FA3's rule."""
    changed = replace(case.problem, policy="balanced")
    if case.problem.policy == "balanced" or unsupported_reason(case.rules, changed):
        return None
    found = case.instead(policy="balanced")
    return None if found.plan.costs is None else found


def _gain(case: Case, other: Simulation, setting: str) -> str:
    return f"{setting}: {case.now.time_us:.1f} to {other.time_us:.1f} us a layer"


def _short_contexts(case: Case) -> Finding | None:
    now, plan = case.now, case.now.plan
    if now.idle_sms == 0 or plan.num_splits > 1 or case.problem.num_splits:
        return None
    blocks = blocks_read(case.problem, plan, case.lengths)
    working = now.num_sms - now.idle_sms
    text = f"{now.idle_sms} of {now.num_sms} SMs get no work: {working} tiles, none split"
    if blocks.max(initial=0) <= _SHORT_BLOCKS:
        keys = _SHORT_BLOCKS * plan.block_n
        text += f", since FA3 never splits contexts of up to {_SHORT_BLOCKS} key blocks ({keys} keys)"
    other = _balanced(case)
    saved = case.saved(other) if other else 0.0
    if other and case.is_worth(saved):
        return Finding("short contexts", f"{text}. {_gain(case, other, 'policy balanced splits them')}", saved)
    return Finding("short contexts", text + (". Splitting them would not pay" if other else ""))


def _bound(case: Case) -> Finding | None:
    """A bound on splits below what would fill the card."""
    now, bound = case.now, case.now.plan.num_splits
    held = now.schedule.splits >= bound
    if bound == 1 or not now.plan.dynamic_splits or not held.any() or now.busy_share >= _FILLED:
        return None
    larger = [(one, case.instead(num_splits=one)) for one in _BOUNDS if one > bound]
    if not larger:
        return None
    fastest = min(other.time_us for _, other in larger)
    value, best = next((one, other) for one, other in larger if other.time_us <= 1.01 * fastest)
    saved = case.saved(best)
    if not case.is_worth(saved):
        return None
    name = (
        f"vLLM's flash_attn_max_num_splits_for_cuda_graph = {value}" if case.rules.name.startswith("vllm")
        else f"num_splits = {value}"
    )  # fmt: skip
    count = int(held.sum())
    text = (
        f"{count} sequence{'s' * (count > 1)} would take more than the {bound} splits that num_splits allows, and the "
        f"SMs work {now.busy_share:.0%} of the time. {_gain(case, best, name)}"
    )
    return Finding("bound on splits", text, saved)


def _windows(case: Case) -> Finding | None:
    """FA3's rule counts whole sequences under a window."""
    plan = case.now.plan
    if not plan.is_local or case.problem.policy != "fa3" or plan.num_splits == 1:
        return None
    whole = sequence_blocks(case.problem, plan, case.lengths)[2]
    read = blocks_read(case.problem, plan, case.lengths)
    counted, used = int(whole.sum(dtype=np.int64)), int(read.sum(dtype=np.int64))
    if not used or counted < 1.5 * used:
        return None
    text = f"the window leaves {used:,} of {counted:,} key blocks to read, but FA3's rule splits as if all were read"
    other = _balanced(case)
    if other is None or not case.is_worth(case.saved(other)):
        return Finding("window", text)
    return Finding("window", f"{text}. {_gain(case, other, 'policy balanced counts what is read')}", case.saved(other))


def _beyond_992(case: Case) -> Finding | None:
    now, batch = case.now, case.problem.batch_size
    if batch <= MAX_DYNAMIC_SPLIT_BATCH or now.plan.dynamic_splits:
        return None
    longest = now.longest_tile
    took = float(now.end[longest] - now.start[longest])
    text = f"FA3 splits nothing in batches of more than {MAX_DYNAMIC_SPLIT_BATCH} sequences"
    if took > 0.3 * now.attention_us:
        text += (
            f", and one tile of {now.tiles.blocks[longest]} key blocks takes {took:.0f} of {now.attention_us:.0f} us"
        )
    if not case.rules.splits_beyond_992:
        return Finding("many sequences", f"{text}; nor does the forward of this build, whatever the metadata says")
    other = _balanced(case)
    if other is None or not case.is_worth(case.saved(other)):
        return Finding("many sequences", text)
    return Finding("many sequences", f"{text}. {_gain(case, other, 'policy balanced goes on')}", case.saved(other))


def _combining(case: Case) -> Finding | None:
    """Splits that cost more to combine than they save."""
    now = case.now
    if now.plan.num_splits == 1 or "num_splits" in case.rules.forward_lacks:
        return None
    unsplit = case.instead(num_splits=1)
    saved = case.saved(unsplit)
    if not case.is_worth(saved):
        return None
    text = f"combining takes {now.combine_us:.1f} us, more than the splits save"
    if now.schedule.splits.max(initial=1) == 1:
        text = f"nothing is split, and the combine kernel is launched all the same, for {now.combine_us:.1f} us"
    return Finding("combining", f"{text}. {_gain(case, unsplit, 'num_splits = 1')}", saved)


def _one_long_tile(case: Case) -> Finding | None:
    """Everyone waits for a few, for none of the reasons above."""
    now = case.now
    if now.busy_share >= 0.8 or now.plan.num_splits == 1 or case.problem.policy != "fa3" or now.plan.is_local:
        return None
    other = _balanced(case)
    if other is None or not case.is_worth(case.saved(other)) or not now.plan.dynamic_splits:
        return None
    longest = now.longest_tile
    text = (
        f"the SMs work {now.busy_share:.0%} of the time: the last ones are at tiles of up to "
        f"{now.tiles.blocks[longest]} key blocks. {_gain(case, other, 'policy balanced')}"
    )
    return Finding("idle at the end", text, case.saved(other))


def _partial_outputs(case: Case) -> Finding | None:
    allocated, most = case.now.allocated_bytes, min(case.problem.max_partial_bytes, DEFAULT_PARTIAL_BYTES)
    if allocated <= most:
        return None
    used = case.now.partial_bytes
    text = (
        f"with num_splits {case.now.plan.num_splits} the forward makes room for {allocated / 2**20:,.0f} MiB of "
        f"partial outputs, over the {most / 2**20:,.0f} MiB of max_partial_bytes, and uses {used / 2**20:,.0f}"
    )
    return Finding("partial outputs", text)


def _larger_batch(case: Case) -> Finding | None:
    """What twice the sequences would take."""
    lengths, problem = case.lengths, case.problem
    only_keys = lengths.cu_seqlens_q is lengths.cu_seqlens_k_new is lengths.seqused_q is lengths.leftpad_k is None
    if not only_keys or not problem.batch_size:
        return None
    twice = replace(
        problem, batch_size=2 * problem.batch_size, total_q=None if problem.total_q is None else 2 * problem.total_q
    )
    doubled = Lengths(np.concatenate([lengths.cache_seqlens, lengths.cache_seqlens]))
    try:
        plan = make_plan(twice, case.rules)
    except VarianceError as error:
        return Finding("larger batch", f"twice the sequences could not be batch invariant: {error}")
    other = simulate(twice, plan, doubled, costs=case.costs)
    longer = other.time_us / case.now.time_us - 1
    text = f"twice the sequences would take {other.time_us:.1f} us a layer, {longer:+.0%}"
    if longer < 0.5:
        text += ": there is room for more"
    elif longer > 0.9:
        text += ": the card is full"
    return Finding("larger batch", text)


def _page_size(case: Case) -> Finding | None:
    """Another page size is another kernel only where TMA can load whole pages."""
    if case.problem.page_size is None:
        return None
    plan = case.now.plan
    for page in (64, 128, 160, 192, 256):
        try:
            other = make_plan(replace(case.problem, page_size=page), case.rules)
        except VarianceError:
            continue
        if page == case.problem.page_size or (other.paged_kv_tma, other.block_n) == (plan.paged_kv_tma, plan.block_n):
            continue
        played = case.instead(page_size=page)
        by = "TMA" if other.paged_kv_tma else "cp.async"
        text = (
            f"pages of {page} tokens would be loaded by {by} in blocks of {other.block_n} keys: {played.time_us:.1f} us"
        )
        return Finding("page size", text + " a layer, not counting what the way of loading changes")
    return Finding("page size", "another page size would change neither tile nor splits")
