"""Policy "balanced" judged on recorded sweeps, without a GPU; its law, and the cards that were not measured."""

from __future__ import annotations

import csv
import math
import pathlib
import re
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from fa3_metadata.api import plan_call
from fa3_metadata.triton_kernels import balance, card
from fa3_metadata.triton_kernels.plan import make_plan
from fa3_metadata.triton_kernels.problem import DEFAULT_GPU
from fa3_metadata.triton_kernels.reference import Lengths, blocks_read, sequence_blocks, splits_of

from bench.simulated import choice
from bench.workloads import RANDOM_SUITE, SEEN_SUITE, SUITE, Workload, random_suite

DATA = pathlib.Path(__file__).parents[1] / "data"
RESULTS = pathlib.Path(__file__).parents[2] / "bench" / "results"
H100 = "NVIDIA H100 80GB HBM3"
PAGE = 64


class Recording(NamedTuple):
    """`python -m bench schedules --csv`, sweeps and all, and what is asked of the choices there."""

    path: pathlib.Path
    gpu: str
    num_sms: int
    mean: float  # time by the best swept one's, in the geometric mean
    near: float  # part of the workloads within 3 % of it
    worst: float  # time of FA3's metadata by ours, at least
    suite: tuple[Workload, ...] = SUITE


RECORDINGS = {
    "H200": Recording(RESULTS / "2026-11-24-h200" / "schedules.csv", DEFAULT_GPU, 132, 1.0065, 0.93, 0.98),
    "H100": Recording(DATA / "schedules-h100.csv", H100, 132, 1.006, 0.95, 0.97),
    "H100, 114 SMs": Recording(DATA / "schedules-h100-114-sms.csv", H100, 114, 1.01, 0.9, 0.96),
    "H100, 78 SMs": Recording(DATA / "schedules-h100-78-sms.csv", H100, 78, 1.01, 0.9, 0.96),
    "H100, drawn at random": Recording(DATA / "schedules-h100-seen.csv", H100, 132, 1.006, 0.93, 0.98, SEEN_SUITE),
}
OTHER = {DEFAULT_GPU: H100, H100: DEFAULT_GPU}


def times_of(path: pathlib.Path) -> dict[str, dict[str, float]]:
    """Median us by workload and schedule."""
    found: dict[str, dict[str, float]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            found.setdefault(row["workload"], {})[row["schedule"]] = float(row["p50_us"])
    return found


def splits_by(w: Workload, gpu: str, num_sms: int, sizes: list[int]) -> tuple[np.ndarray, dict[int, np.ndarray], bool]:
    """Splits that the policy finds, those of each number of key blocks a split, and whether it searched."""
    pages = max(max(1, -(-n // PAGE)) for n in w.lengths)
    call = {
        "batch_size": len(w.lengths), "max_seqlen_q": w.seqlen_q, "max_seqlen_k": pages * PAGE,
        "num_heads": w.num_heads, "num_heads_k": w.num_heads_k, "headdim": w.headdim,
        "headdim_v": w.headdim_v or w.headdim, "qkv_dtype": getattr(torch, w.dtype), "page_size": PAGE, "causal": True,
        "window_size": (-1, -1) if w.window is None else (w.window, 0), "build": "sglang-kernel-0.4.2",
        "policy": "balanced",
    }  # fmt: skip
    _, problem, rules, _ = plan_call(call)
    problem = replace(problem, gpu=gpu, num_sms=num_sms)
    plan, lengths = make_plan(problem, rules), Lengths(np.array(w.lengths, np.int32))
    _, num_m_blocks, _ = sequence_blocks(problem, plan, lengths)
    blocks = blocks_read(problem, plan, lengths)
    swept = {}
    for size in sizes:
        wanted = np.maximum(-(-blocks // size), 1)
        swept[size] = np.maximum(-(-blocks // np.maximum(-(-blocks // wanted), 1)), 1)
    found = splits_of(plan, num_m_blocks, blocks)
    return np.maximum(-(-blocks // np.maximum(-(-blocks // found), 1)), 1), swept, plan.searches_splits


@pytest.mark.parametrize("by", ["its own constants", "the other card's"])
@pytest.mark.parametrize("name", RECORDINGS)
def test_choices_on_recorded_sweeps(name: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The few schedules that were not swept, and so have no time, are left out."""
    recording = RECORDINGS[name]
    gpu = recording.gpu
    if by == "the other card's":
        monkeypatch.setattr(balance, "constants_of", lambda gpu: carried_over(gpu))
    to_best, to_fa3 = [], []
    times = times_of(recording.path)
    for w in recording.suite:
        if len(w.lengths) > 992:
            continue
        swept = {int(name): time for name, time in times[w.name].items() if name.isdigit()}
        make_plan.cache_clear()
        found, splits, searched = splits_by(w, gpu, recording.num_sms, list(swept))
        alike = [size for size in swept if np.array_equal(splits[size], found)]
        if not alike:
            continue
        # Without a search nothing was chosen, and the recorded one has the bound that goes with it.
        time = swept[alike[0]] if searched else times[w.name]["balanced"]
        to_best.append(time / min(swept.values()))
        to_fa3.append(times[w.name]["fa3"] / time)
    make_plan.cache_clear()
    assert len(to_best) >= 36
    slack = 0.004 if by == "the other card's" else 0.0
    assert math.exp(np.log(to_best).mean()) <= recording.mean + slack
    assert np.mean(np.array(to_best) <= 1.03) >= recording.near - 10 * slack
    assert min(to_fa3) >= recording.worst - 3 * slack


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("gpu", "num_sms", "worst"), [("h100", 132, 0.98), ("h100", 78, 0.96), ("h200", 132, 0.94)])
def test_choices_beside_the_law_played_out(gpu: str, num_sms: int, worst: float, seed: int) -> None:
    """On batches drawn at random, short contexts and small windows among them: nowhere clearly slower than FA3's."""
    fa3, ours, best = np.array([choice(w, gpu, num_sms) for w in random_suite(60, seed)]).T
    assert (fa3 / ours).min() >= worst
    assert math.exp(np.log(ours / best).mean()) <= 1.01
    assert np.mean(ours <= 1.03 * best) >= 0.9


def carried_over(gpu: str) -> dict[str, object]:
    """The constants of the other measured card, with the bandwidth of this one."""
    own, other = (balance.find_table("balance", one, balance.check_constants) for one in (gpu, OTHER[gpu]))
    return other | {"bandwidth_gb_s": own["bandwidth_gb_s"]}


# ---- the law ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [0.25, 0.35, 0.5, 0.8, 1.0, 2.0, 30.0])
def test_the_cubic_is_near_the_law(alone: float) -> None:
    share = np.linspace(0, 1, 101)
    law = ((alone**3 + share**3) / (alone**3 + 1)) ** (1 / 3)
    a, b, c, d = balance._cubic(alone, 3.0)
    assert np.abs((a + b * share + c * share**2 + d * share**3) / law - 1).max() < 0.02


@pytest.mark.parametrize("gpu", [DEFAULT_GPU, H100])
def test_fewer_sms_are_another_card(gpu: str) -> None:
    """As with sm_margin: a block of each takes less while all of them work, and alone as long as ever."""
    table, kernel = balance.constants_of(gpu), (2, 128, 128, 64, 128)
    few, many = (balance.costs_from(table, kernel, num_sms) for num_sms in (66, 132))
    assert few.alone > many.alone
    assert few.tile == pytest.approx(2 * many.tile)


def test_a_kernel_that_was_not_measured_is_like_those_of_its_size() -> None:
    table = balance.constants_of(DEFAULT_GPU)
    for one in table["kernels"]:
        kernel = tuple(one["kernel"])
        size = balance.block_bytes(kernel)
        scaled = balance._scaled(table, (2, 128, 128, 192, size // 512))
        assert 0.4 * one["alone_us"] < scaled["alone_us"] < 2.5 * one["alone_us"]


# ---- cards -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    devices(monkeypatch)


def devices(monkeypatch: pytest.MonkeyPatch, *found: tuple[str, int, int]) -> None:
    monkeypatch.setattr(card, "_devices", lambda: iter(found))
    for remembered in (card.peak_gb_s, balance.constants_of):
        remembered.cache_clear()


def test_a_card_without_a_table_has_its_own_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    h200 = balance.constants_of(DEFAULT_GPU)
    reached = h200["bandwidth_gb_s"] / h200["peak_gb_s"]
    devices(monkeypatch, ("NVIDIA Other", 1_000_000, 1024), ("NVIDIA Unheard", 2_619_000, 5120))
    found = balance.constants_of("NVIDIA Unheard")
    assert found["bandwidth_gb_s"] == pytest.approx(reached * 2 * 2.619 * 5120 / 8)
    assert {name for name in found if found[name] != h200[name]} == {"bandwidth_gb_s"}
    balance.check_constants(found)
    devices(monkeypatch)
    assert balance.constants_of("NVIDIA H100 PCIe")["bandwidth_gb_s"] == pytest.approx(reached * 2039)
    assert balance.constants_of("NVIDIA Unheard") == h200
    balance.constants_of.cache_clear()
    card.peak_gb_s.cache_clear()


@pytest.mark.parametrize("answer", [("NVIDIA Unheard", 0, 5120), ("NVIDIA Unheard", 2_619_000, 0),
                                    ("NVIDIA Unheard", 2**31 - 1, 2**31 - 1)])  # fmt: skip
def test_an_absurd_answer_of_a_driver_is_not_believed(
    answer: tuple[str, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices(monkeypatch, answer)
    assert card.driver_gb_s("NVIDIA Unheard") is None


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_no_driver(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise error

    monkeypatch.setattr(card.ctypes, "CDLL", missing)
    assert card.driver_gb_s("NVIDIA H200") is None


@pytest.mark.gpu
def test_the_driver_agrees_with_the_datasheet() -> None:
    gpu = torch.cuda.get_device_name()
    peak = card.driver_gb_s(gpu)
    assert peak is not None
    assert peak == pytest.approx(card.DATASHEETS.get(gpu, peak), rel=0.06)


# ---- the suites ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split_us", [0.0, 0.01, 0.0924, 1.0])
def test_combining_costs_whatever_a_split_costs(split_us: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that was tuned may say that splits are for nothing: the combine kernel is not."""
    table = balance.constants_of(DEFAULT_GPU) | {"split_us": split_us}
    costs = balance.costs_from(table, (2, 128, 128, 64, 128), 132)
    assert not balance._pays(costs, 16, 2, 132, 1000)
    assert not balance._pays(costs, 1, 4, 132, 100_000)
    assert balance._pays(costs, 1, 4, 132, 8) == (split_us < 0.5)


def test_the_random_suite_is_another_one() -> None:
    assert len(RANDOM_SUITE) >= 30
    names = [w.name for w in (*SUITE, *RANDOM_SUITE)]
    assert len(set(names)) == len(names)
    assert all(w.held_out for w in RANDOM_SUITE)
    assert {w.lengths for w in RANDOM_SUITE}.isdisjoint(w.lengths for w in SUITE)
    assert len({(w.num_heads, w.num_heads_k, w.headdim, w.headdim_v, w.dtype) for w in RANDOM_SUITE}) >= 6
    assert any(w.window for w in RANDOM_SUITE)
    assert any(w.seqlen_q > 1 for w in RANDOM_SUITE)
    assert all(re.match(r"random \d+: ", w.name) for w in RANDOM_SUITE)
