"""The measured numbers on the pages are those of bench/results: each row here is made anew from the files there."""

from __future__ import annotations

import csv
import pathlib
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable

import pytest

ROOT = pathlib.Path(__file__).parents[2]
H200, H100 = (ROOT / "bench" / "results" / day for day in ("2026-11-24-h200", "2026-11-25-h100"))
README, BENCHMARKS, SCHEDULES = (ROOT / name for name in ("README.md", "docs/benchmarks.md", "docs/schedules.md"))
H100_PAGE, H200_PAGE = H100 / "README.md", H200 / "README.md"

Times = dict[tuple[str, ...], list[float]]  # names of a row -> medians of its captures, us


def medians(path: pathlib.Path, *names: str) -> Times:
    """The column p50_us of a file, by the columns `names`."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    found: Times = defaultdict(list)
    for row in csv.DictReader(lines):
        found[tuple(row[name] for name in names)].append(float(row["p50_us"] or "nan"))
    return found


def gain(without: list[float], with_us: list[float]) -> float:
    """Percent that the time without us is longer."""
    return 100 * (statistics.mean(without) / statistics.mean(with_us) - 1)


def span(values: Iterable[float], digits: int = 1, sign: str = "") -> str:
    """`1.3 to 2.7`"""
    low, high = min(values := list(values)), max(values)
    return f"{low:{sign}.{digits}f} to {high:{sign}.{digits}f}"


def has(page: pathlib.Path, text: str) -> None:
    if text not in " ".join(page.read_text().split()):
        pytest.fail(f"{page.relative_to(ROOT)} should say: {text}", pytrace=False)


@pytest.mark.parametrize(
    ("folder", "batches"), [(H200, (1, 32, 256, 512, 992, 8192)), (H100, (1, 32, 256, 992, 4096))], ids=["h200", "h100"]
)
def test_the_metadata_stage(folder: pathlib.Path, batches: tuple[int, ...]) -> None:
    times = medians(folder / "metadata.csv", "batch", "peer", "metric")
    for batch in batches:
        (ours,), (op,), (sglang,) = (times[str(batch), peer, "graph"] for peer in ("ours", "native", "sglang"))
        has(
            BENCHMARKS,
            f"| {batch} | {ours:.2f} | {op:.2f} ({op / ours:.1f} x) | {sglang:.2f} ({sglang / ours:.1f} x) |",
        )


STEPS = [  # what the page calls it, model, part, batches
    ("a rank of Llama-3.1-70B under TP8, whole but for all-reduces; 1 x 1k", "Llama-3.1-70B, TP8", "whole", ["1"]),
    ("the same, 64 sequences, lognormal", "Llama-3.1-70B, TP8", "whole", ["64"]),
    ("Llama-3.1-8B, whole; 1 x 1k", "Llama-3.1-8B", "whole", ["1"]),
    ("the same, 64 sequences, lognormal", "Llama-3.1-8B", "whole", ["64"]),
    ("attention of Llama-3.1-8B; 16 and 64 sequences", "Llama-3.1-8B", "attention", ["16", "64"]),
    ("of a rank of Llama-3.1-70B", "Llama-3.1-70B, TP8", "attention", ["16", "64"]),
    ("of a rank of Qwen3-32B under TP4", "Qwen3-32B, TP4", "attention", ["16", "64"]),
    ("of gpt-oss-20b, half of the layers with a window", "gpt-oss-20b", "attention", ["16", "64"]),
    ("of Gemma-3-27B, five of six with a window; 16", "Gemma-3-27B", "attention", ["16"]),
    ("of a rank of DeepSeek-V3, MLA", "DeepSeek-V3 MLA, TP8", "attention", ["16", "64"]),
]


def step_gains(model: str, part: str, batches: list[str], variant: str) -> list[float]:
    times = medians(H200 / "decode-step.csv", "model", "part", "batch", "variant", "metric")
    return [gain(*(times[model, part, batch, way, "device"] for way in ("per layer", variant))) for batch in batches]


@pytest.mark.parametrize(("named", "model", "part", "batches"), STEPS, ids=[f"{row[1]}, {row[2]}" for row in STEPS])
def test_decode_steps(named: str, model: str, part: str, batches: list[str]) -> None:
    cells = []
    for variant in ("native", "ours", "balanced"):
        values = step_gains(model, part, batches, variant)
        cells.append(", ".join(f"{value:.1f}" for value in values) + " %")
    has(BENCHMARKS, f"| {named} | {' | '.join(cells)} |")


def test_the_readmes_layers_with_windows_and_mla() -> None:
    def cell(model: str, batches: list[str], variant: str) -> list[float]:
        return step_gains(model, "attention", batches, variant)

    both = ["16", "64"]
    oss, oss_theirs = (cell("gpt-oss-20b", both, way) for way in ("ours", "native"))
    gemma, gemma_theirs = (cell("Gemma-3-27B", ["16"], way)[0] for way in ("ours", "native"))
    mla, mla_theirs = (cell("DeepSeek-V3 MLA, TP8", both, way) for way in ("ours", "native"))
    has(README, f"gpt-oss-20b +{span(oss)} % (SGLang's way: {span(oss_theirs)}), Gemma-3-27B +{gemma:.1f} % "
                f"({gemma_theirs:.1f}), a rank of DeepSeek-V3 +{span(mla)} % ({span(mla_theirs)})")  # fmt: skip


def test_a_whole_sglang() -> None:
    times = medians(H200 / "sglang-decode.csv", "model", "case", "variant", "metric")
    cases = list(dict.fromkeys(key[:2] for key in times))

    def gains(over: str, way: str, model: str = "") -> list[float]:
        return [
            gain(times[(*case, over, "device")], times[(*case, way, "device")]) for case in cases if model in case[0]
        ]

    for page, big, small in (
        (BENCHMARKS, "a rank of a 70B without its all-reduces, six batches", "an 8B, six batches"),
        (H200_PAGE, "a rank of a 70B without its all-reduces", "an 8B"),
    ):
        for named, model in ((big, "70b"), (small, "8b")):
            cells = [f"{span(gains('none', way, model))} %" for way in ("sglang", "ours", "balanced")]
            has(page, f"| {named} | {' | '.join(cells)} |")
    has(README, f"Llama-3.1-8B +{span(gains('none', 'ours', '8b'))} %")
    has(README, f"without its all-reduces, +{span(gains('none', 'ours', '70b'))} %")

    def apart(case: tuple[str, ...]) -> float:
        pairs = [times[(*case, way, "device")] for way in ("none", "sglang", "ours", "balanced")]
        return max(100 * (max(pair) / min(pair) - 1) for pair in pairs)

    more = gains("sglang", "ours")
    within = sum(abs(value) < apart(case) for value, case in zip(more, cases, strict=True))
    saved = [
        statistics.mean(times[(*case, "sglang", "host")]) - statistics.mean(times[(*case, "ours", "host")])
        for case in cases
    ]
    has(README, f"{span(more, sign='+')} %: in {within} of {len(cases)} cases less than two captures")
    for page in (README, BENCHMARKS, H200_PAGE):
        has(page, f"{span(saved, 0)} us less")


def test_a_whole_vllm() -> None:
    times = medians(H100 / "vllm-decode-windows.csv", "case", "splits", "metric", "variant")
    cases = list(dict.fromkeys(key[0] for key in times))
    ways = ("ours", "in place", "balanced")

    def gains(case: str, way: str) -> list[float]:
        return [gain(times[case, bound, "graph", "vllm"], times[case, bound, "graph", way]) for bound in ("32", "64")]

    def host(case: str, way: str) -> list[float]:
        return [statistics.mean(times[case, bound, "host", way]) / 1e3 for bound in ("32", "64")]

    for case in cases:
        cells = []
        for way in ways:
            low, high = (f"{value:.1f}" for value in sorted(gains(case, way)))
            cells.append(f"{low} %" if low == high else f"{low} to {high} %")
        has(BENCHMARKS, f"| {case} | {' | '.join(cells)} |")
        us = [f"{statistics.mean(times[case, bound, 'graph', 'vllm']):,.0f}" for bound in ("32", "64")]
        cells = [" and ".join(f"{value:.1f}" for value in gains(case, way)) for way in ways]
        has(H100_PAGE, f"| {case} | {' and '.join(us)} | +" + " % | +".join(cells) + " % |")
        cells = [" and ".join(f"{value:.1f}" for value in host(case, way)) for way in ("vllm", "ours")]
        has(H100_PAGE, f"| {' | '.join(cells)} |")
    has(README, f"graph replay +{span(one for case in cases for one in gains(case, 'ours'))} %")
    before, after = (span(one for case in cases for one in host(case, way)) for way in ("vllm", "ours"))
    has(README, f"{before} ms before, {after} ms after")
    has(BENCHMARKS, f"it took {before} ms by vLLM as it is, and {after} ms with the adapter")


WORKLOADS = [  # what the page calls it, the file, and its heads
    ("1 x 512", "1 x 512", "8/1"),
    ("one 100k among 63 x 1k", "one 100k among 63 x 1k", "8/1"),
    ("32 lognormal(9, 1), window 4095", "32 lognormal(9, 1), window 4095", "8/1"),
    ("agentic 16 x 12k", "agentic 16 x 12k, 16/2", "16/2"),
    ("16 x 1024", "16 x 1024, 32/8", "32/8"),
    ("1024: two 64k, rest 256", "1024: two 64k, rest 256", "8/1"),
]


def judged() -> dict[str, tuple[str, ...]]:
    """Workload -> us by FA3 without metadata, with, by ours and the best, and how much faster ours is than FA3's."""
    lines = (H200 / "schedules.txt").read_text().splitlines()
    found = [re.match(r"[ *](\S.*?)  +" + r"([\d.]+) +" * 5, line) for line in lines]
    return {one[1]: one.groups()[1:] for one in found if one}


@pytest.mark.parametrize(("named", "workload", "heads"), WORKLOADS, ids=[row[0] for row in WORKLOADS])
def test_schedules(named: str, workload: str, heads: str) -> None:
    cells = [f"{float(us):.1f}" if float(us) < 100 else f"{float(us):.0f}" for us in judged()[workload][:4]]
    has(SCHEDULES, f"| {named} | {heads} | {' | '.join(cells)} |")


def test_schedules_together() -> None:
    ratios = {name: float(cells[4]) for name, cells in judged().items()}
    assert len(ratios) == 48
    many = {name: ratios.pop(name) for name in list(ratios) if name.startswith(("1024:", "4096:"))}
    mean = statistics.geometric_mean(ratios.values())
    worst = min(ratios, key=lambda name: ratios[name])
    has(SCHEDULES, f"Over {len(ratios)} workloads of up to 992 sequences the geometric mean is {mean:.3f} x")
    has(SCHEDULES, f"The worst is {ratios[worst]:.3f} x ({worst})")
    low, high = sorted(many.values())
    has(README, f"{span(ratios.values(), 2)} x, mean {mean:.2f} x; above, {low:.1f} and {high:.1f} x")
    _, theirs, ours, _, _ = judged()["32 lognormal(9, 1), window 4095"]
    has(README, f'FA3\'s took {float(theirs):.1f} us and "balanced" {float(ours):.1f}')
