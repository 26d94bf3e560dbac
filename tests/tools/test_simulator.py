"""The simulator of FA3's scheduler: its tiles against FA3's own rules spelled out, its times against recorded ones."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fa3_metadata.api import plan_call
from fa3_metadata.tools.cards import CARDS, costs_of_card, find_card
from fa3_metadata.tools.simulator import (
    Schedule,
    Simulation,
    blocks_of_query_blocks,
    kernel_of,
    reference_schedule,
    simulate,
    tiles_of,
)
from fa3_metadata.triton_kernels.balance import block_bytes, constants_of
from fa3_metadata.triton_kernels.plan import LaunchPlan, make_plan
from fa3_metadata.triton_kernels.problem import Problem
from fa3_metadata.triton_kernels.reference import Lengths, blocks_read

from bench import simulated

BUILD = "sglang-kernel-0.4.2"
Asked = tuple[Problem, LaunchPlan, Lengths]


def asked(lengths: list[int], build: str = BUILD, **more: Any) -> Asked:
    call = {"batch_size": len(lengths), "max_seqlen_q": 1, "max_seqlen_k": max(lengths, default=0), "num_heads": 8,
            "num_heads_k": 1, "headdim": 128, "page_size": 64, "causal": True, "build": build} | more  # fmt: skip
    _, problem, rules, _ = plan_call(call)
    return problem, make_plan(problem, rules), Lengths(np.array(lengths, np.int32))


def played(lengths: list[int], **more: Any) -> Simulation:
    return simulate(*asked(lengths, **more))


def fa3s_blocks(problem: Problem, plan: LaunchPlan, keys: int, block: int) -> tuple[int, int]:
    """`BlockMN::get_n_block_min_max` of hopper/block.h before it divides by splits, line for line."""
    queries, window, chunk = problem.max_seqlen_q, plan.window_size, plan.attention_chunk
    n_block_max = -(-keys // plan.block_n)
    if plan.is_causal or plan.is_local:
        m_idx_max = ((block + 1) * plan.block_m - 1) // plan.q_heads_per_row + 1
        n_idx = m_idx_max + keys - queries
        n_idx_right = n_idx + window[1] if plan.is_local else n_idx
        if plan.is_local and chunk:
            n_idx_right = min(n_idx_right, -(-n_idx // chunk) * chunk)
        n_block_max = min(n_block_max, -(-n_idx_right // plan.block_n))
    n_block_min = 0
    if plan.is_local:
        n_idx = block * plan.block_m // plan.q_heads_per_row + keys - queries
        n_idx_left = n_idx - window[0]
        if chunk:
            n_idx_left = max(n_idx_left, n_idx // chunk * chunk)
        n_block_min = max(0, n_idx_left // plan.block_n)
    return n_block_min, n_block_max


def fa3s_tile(plan: LaunchPlan, schedule: Schedule, m_blocks: list[int], index: int) -> tuple[int, int, int, int]:
    """(sequence, head, query block, split) of a tile: `tile_idx_to_work_tile` of hopper/tile_scheduler.hpp."""
    lpt, heads, start = plan.is_causal or plan.is_local, plan.num_heads, 0
    for position, sequence in enumerate(schedule.order.tolist()):
        splits, blocks = int(schedule.splits[position]), m_blocks[sequence]
        if index < start + blocks * splits * heads:
            break
        start += blocks * splits * heads
    mh_block, split = index - start, 0
    if lpt and splits == 1:
        nheads_in_l2 = int(schedule.heads_in_l2[position])
        section, l2_mod = divmod(mh_block, nheads_in_l2 * blocks)
        in_this_section = min(nheads_in_l2, heads - section * nheads_in_l2)
        block, residual = divmod(l2_mod, in_this_section)
        head = section * nheads_in_l2 + residual
    else:
        head, block = divmod(mh_block, blocks)
        head, split = divmod(head, splits)
    return sequence, head, blocks - 1 - block if lpt else block, split


CALLS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "skewed": ([9000, 100, 4000, 0, 333], {}),
    "not causal, one query, no pages": ([9000, 100, 4000], {"page_size": None, "causal": False, "max_seqlen_q": 1}),
    "several query blocks": ([9000, 700, 4000], {"max_seqlen_q": 40, "num_heads": 16, "num_heads_k": 2}),
    "not split": ([900, 800, 500] * 30, {"num_splits": 1, "num_heads": 32, "num_heads_k": 8, "max_seqlen_q": 20}),
    "window": ([9000, 100, 4000], {"window_size": (700, 0), "num_heads": 16, "num_heads_k": 4}),
    "window, queries": ([9000, 100, 4000], {"window_size": (300, 20), "causal": False, "max_seqlen_q": 70}),
    "chunks": ([9000, 100, 4000], {"attention_chunk": 512, "max_seqlen_q": 33}),
    "batch order": ([100, 9000, 4000], {"build": "vllm-0.33.0"}),
    "balanced": ([100, 9000, 4000], {"policy": "balanced", "num_heads_k": 2}),
}


@pytest.mark.parametrize("name", CALLS)
def test_tiles_are_fa3s(name: str) -> None:
    """Every tile: which it is, in which order, and what it reads."""
    lengths, more = CALLS[name]
    problem, plan, given = asked(lengths, **more)
    schedule = reference_schedule(problem, plan, given)
    tiles = tiles_of(problem, plan, given, schedule)
    m_blocks = [-(-problem.max_seqlen_q * plan.q_heads_per_row // plan.block_m)] * len(lengths)
    splits_of = dict(zip(schedule.order.tolist(), schedule.splits.tolist(), strict=True))
    expected = []
    for index in range(plan.num_heads * sum(m * splits_of[i] for i, m in enumerate(m_blocks))):
        sequence, head, block, split = fa3s_tile(plan, schedule, m_blocks, index)
        first, end = fa3s_blocks(problem, plan, lengths[sequence], block)
        each = 0 if end <= first else -(-(end - first) // splits_of[sequence])
        begin = min(first + split * each, max(first, end))
        expected.append((sequence, head, block, split, begin, max(min(begin + each, end) - begin, 0)))
    found = list(zip(*(getattr(tiles, field).tolist() for field in tiles.__dataclass_fields__), strict=True))
    assert found == expected


@pytest.mark.parametrize("name", CALLS)
def test_the_last_query_block_reads_what_the_reference_says(name: str) -> None:
    lengths, more = CALLS[name]
    problem, plan, given = asked(lengths, **more)
    sequence, block, _, blocks = blocks_of_query_blocks(problem, plan, given)
    last = block == block.max()
    assert blocks[last].tolist() == blocks_read(problem, plan, given).tolist()
    assert sequence[last].tolist() == list(range(len(lengths)))


def test_every_sm_works_on_one_tile_at_a_time() -> None:
    s = played([9000, 100, 4000, 700] * 50, num_heads=32, num_heads_k=8)
    for sm in range(s.num_sms):
        own = np.flatnonzero(s.sm == sm)
        assert (s.start[own][1:] >= s.end[own][:-1] - 1e-9).all()
    assert s.start.min() == s.costs.launch
    assert s.end.max() == s.attention_us
    # The next tile goes to whoever is free first: tiles start in their order.
    assert (np.diff(s.start) >= -1e-9).all()
    assert 0 < s.busy_share <= 1
    assert s.time_us == s.attention_us + s.combine_us


def test_one_tile_takes_what_the_law_says() -> None:
    s = played([1000], num_splits=1, num_heads=1)
    alone, tile = s.costs.of_kernel(kernel_of(s.problem, s.plan))
    shared, p = s.shared_us, s.costs.softness
    a_block = (alone**p + (shared / s.num_sms) ** p) ** (1 / p)
    assert s.attention_us == pytest.approx(s.costs.launch + (8 + tile / shared) * a_block)
    assert s.combine_us == 0
    assert (s.idle_sms, s.longest_tile, s.blocks_read) == (131, 0, 8)
    assert s.bytes_read == 8 * 128 * 256 * 2
    assert shared == pytest.approx(block_bytes(kernel_of(s.problem, s.plan)) * 132 / s.costs.bandwidth_gb_s / 1e3)


def test_nothing_to_do() -> None:
    s = played([])
    assert (len(s.tiles), s.attention_us, s.busy_share, s.longest_tile) == (0, s.costs.launch, 0, -1)


def test_more_sequences_take_longer_and_a_faster_memory_less_long() -> None:
    times = [played([4000] * batch, num_heads_k=8, num_heads=32).time_us for batch in (1, 8, 64, 512)]
    assert times == sorted(times)
    problem, plan, lengths = asked([4000] * 256)
    by_card = {name: simulate(replace(problem, gpu=CARDS[name].name), plan, lengths).time_us for name in CARDS}
    assert by_card["h200"] < by_card["h100"] < by_card["h100-pcie"]


def test_many_sequences_are_played_fast() -> None:
    lengths = np.random.default_rng(0).integers(1, 16384, 4096).tolist()
    problem, plan, given = asked(lengths, num_heads=32, num_heads_k=8, policy="balanced")
    started = time.perf_counter()
    assert simulate(problem, plan, given).waves > 200
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("gpu", simulated.RECORDED)
def test_times_go_with_recorded_ones(gpu: str) -> None:
    """All schedules of a card's recorded sweep; the numbers are those that `python -m bench simulated` prints."""
    points = list(simulated.points(simulated.RECORDED[gpu], gpu))
    assert len(points) > 700
    for some in (points, [p for p in points if p.held_out], [p for p in points if p.schedule == "fa3"]):
        assert simulated.rank_correlation(some) >= 0.95
    errors = np.abs([p.error for p in points])
    assert np.median(errors) < 0.04
    assert np.percentile(errors, 90) < 0.12
    assert len(simulated.report(gpu, points)) == 5


def test_a_schedule_is_chosen_well_by_what_is_predicted() -> None:
    """The size of split predicted to be fastest is nearly the fastest."""
    for gpu, path in simulated.RECORDED.items():
        points = [p for p in simulated.points(path, gpu) if p.schedule.isdigit()]
        for name in {p.workload for p in points}:
            own = [p for p in points if p.workload == name]
            chosen = min(own, key=lambda p: p.predicted)
            assert chosen.measured <= 1.05 * min(p.measured for p in own), name


def test_the_commands_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    assert simulated.main([str(tmp_path / "none.csv"), "--gpu", "h100"]) == 2
    assert "none.csv" in capsys.readouterr().err
    (tmp_path / "other.csv").write_text("workload,schedule,num_splits,p50_us\nno such,fa3,1,3.0\n")
    assert simulated.main([str(tmp_path / "other.csv"), "--gpu", "h100"]) == 2
    with pytest.raises(SystemExit):
        simulated.main(["--gpu", "h100"])


def test_cards() -> None:
    assert find_card("H20").num_sms == 78
    assert find_card("NVIDIA H200") is find_card("h200")
    with pytest.raises(ValueError, match="the GPU must be one of h200"):
        find_card("h300")
    h200, h20 = costs_of_card("NVIDIA H200"), costs_of_card(CARDS["h20"].name)
    assert h20.bandwidth_gb_s == pytest.approx(h200.bandwidth_gb_s * 4000 / 4800)
    assert h20.measured_on == "NVIDIA H200"
    assert costs_of_card("a GPU of the future") == h200
    assert costs_of_card(CARDS["a100"].name).bandwidth_gb_s == pytest.approx(h200.bandwidth_gb_s * 2039 / 4800)


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_it_goes_by_the_constants_that_schedules_are_chosen_by(gpu: str) -> None:
    name = CARDS[gpu].name
    problem, plan, lengths = asked([1000, 70_000])
    s = simulate(replace(problem, gpu=name), plan, lengths)
    table, kernel = constants_of(name), kernel_of(s.problem, s.plan)
    measured = next(one for one in table["kernels"] if tuple(one["kernel"]) == kernel)
    assert s.costs.of_kernel(kernel) == (measured["alone_us"], measured["tile_us"])
    assert (s.costs.bandwidth_gb_s, s.costs.softness) == (table["bandwidth_gb_s"], table["softness"])
    assert (s.costs.split, s.costs.measured_on) == (table["split_us"], name)


def test_a_kernel_that_was_not_measured() -> None:
    costs = costs_of_card("NVIDIA H200")
    small, large = (costs.of_kernel((2, 96, 96, 192, block_n))[0] for block_n in (64, 144))
    assert 0 < small < large < 3
