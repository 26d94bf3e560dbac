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


class SGLangSteps:
    """What `bench sglang-decode` found on a card."""

    def __init__(self, folder: pathlib.Path, name: str = "sglang-decode.csv") -> None:
        self.times = medians(folder / name, "model", "case", "variant", "metric")
        self.cases = list(dict.fromkeys(key[:2] for key in self.times))

    def gains(self, over: str, way: str, model: str = "") -> list[float]:
        times, cases = self.times, [case for case in self.cases if model in case[0]]
        return [gain(times[(*case, over, "device")], times[(*case, way, "device")]) for case in cases]

    def cells(self, model: str) -> str:
        return " | ".join(f"{span(self.gains('none', way, model))} %" for way in ("sglang", "ours", "balanced"))

    def apart(self, case: tuple[str, ...]) -> float:
        pairs = [self.times[(*case, way, "device")] for way in ("none", "sglang", "ours", "balanced")]
        return max(100 * (max(pair) / min(pair) - 1) for pair in pairs)

    def more_than_apart(self) -> int:
        more = self.gains("sglang", "ours")
        return sum(abs(value) > self.apart(case) for value, case in zip(more, self.cases, strict=True))

    def saved(self) -> list[float]:
        """us of the host that ours takes less than SGLang's own."""
        means = {key: statistics.mean(some) for key, some in self.times.items()}
        return [means[(*case, "sglang", "host")] - means[(*case, "ours", "host")] for case in self.cases]


def test_a_whole_sglang() -> None:
    h200, h100 = map(SGLangSteps, (H200, H100))
    has(H200_PAGE, f"| a rank of a 70B without its all-reduces | {h200.cells('70b')} |")
    has(H200_PAGE, f"| an 8B | {h200.cells('8b')} |")
    has(BENCHMARKS, f"| a rank of a 70B without its all-reduces, six batches, H200 | {h200.cells('70b')} |")
    has(BENCHMARKS, f"| an 8B, six batches, H200, 2026-11-24 | {h200.cells('8b')} |")
    has(BENCHMARKS, f"| an 8B, six batches, H100, 2026-11-25 | {h100.cells('8b')} |")
    both = f"+{span(h100.gains('none', 'ours', '8b'))} % (H100), +{span(h200.gains('none', 'ours', '8b'))} % (H200)"
    has(README, f"Llama-3.1-8B {both}")
    has(README, f"without its all-reduces, +{span(h200.gains('none', 'ours', '70b'))} % (H200)")
    over = [f"{span(one.gains('sglang', 'ours'), sign='+')} %" for one in (h100, h200)]
    has(README, f"over SGLang's own precompute {over[0]} (H100), {over[1]} (H200)")
    has(BENCHMARKS, f"Ours over SGLang's own is {over[0]} on the H100 and {over[1]} on the H200")
    assert h100.more_than_apart() + h200.more_than_apart() == 4
    has(BENCHMARKS, 'more than "apart" in four of eighteen rows')
    for one in (h100, h200):
        assert all(
            more > -one.apart(case) for more, case in zip(one.gains("sglang", "balanced"), one.cases, strict=True)
        )
    for page in (BENCHMARKS, H200_PAGE):
        has(page, f"{span(h200.saved(), 0)} us less")
    has(README, f"Up to {max(h200.saved()):.0f} us less host time")
    low, high = min(h100.saved()), max(h100.saved())
    has(BENCHMARKS, f"takes {-low:.0f} us more to {high:.0f} us less than with SGLang's own precompute on the H100")
    for case in h100.cases:
        cells = [f"{gain(h100.times[(*case, 'none', 'device')], h100.times[(*case, way, 'device')]):.1f} %"
                 for way in ("sglang", "ours", "balanced")]  # fmt: skip
        has(H100_PAGE, f"| {case[1]} | {' | '.join(cells)} | {h100.apart(case):.1f} % |")


def test_a_whole_sglang_with_windows() -> None:
    steps = SGLangSteps(H100, "sglang-decode-gemma.csv")
    theirs, ours, balanced = (
        [f"{one:.1f}" for one in steps.gains("none", way)] for way in ("sglang", "ours", "balanced")
    )
    assert set(theirs) == {"0.0"}
    apart = [f"{steps.apart(case):.1f}" for case in steps.cases]
    has(README, f"""H100: +{" and ".join(ours)} % (SGLang's way: 0.0), "balanced" +{" and ".join(balanced)} %""")
    has(BENCHMARKS, f'ours +{" and +".join(ours)} % in two batches, "balanced" +{" and +".join(balanced)} %')
    has(BENCHMARKS, f'"Apart" is {" and ".join(apart)} %')
    for case, *cells in zip(steps.cases, theirs, ours, balanced, apart, strict=True):
        has(H100_PAGE, f"| {case[1]} | {' % | '.join(cells)} % |")


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
    ("32 lognormal(8, 1), head dim 64", "32 lognormal(8, 1), d 64", "8/1"),
    ("agentic 16 x 12k", "agentic 16 x 12k, 16/2", "16/2"),
    ("16 x 1024", "16 x 1024, 32/8", "32/8"),
    ("1024: two 64k, rest 256", "1024: two 64k, rest 256", "8/1"),
]


def judged(name: str = "schedules.txt", folder: pathlib.Path = H100) -> dict[str, tuple[str, ...]]:
    """Workload -> us by FA3 without metadata, with, by ours and the best; that of FA3's, of none over ours; ours over
    the best."""
    lines = (folder / name).read_text().splitlines()
    found = [re.match(r"[ *](\S.*?)  +" + r"([\d.]+) +" * 7, line) for line in lines]
    return {one[1]: one.groups()[1:] for one in found if one}


@pytest.mark.parametrize(("named", "workload", "heads"), WORKLOADS, ids=[row[0] for row in WORKLOADS])
def test_schedules(named: str, workload: str, heads: str) -> None:
    cells = [f"{float(us):.1f}" if float(us) < 100 else f"{float(us):.0f}" for us in judged()[workload][:4]]
    has(SCHEDULES, f"| {named} | {heads} | {' | '.join(cells)} |")


SUITES = [  # what the page calls it, file, folder, and that of the times that are of another model
    ("46 named, up to 992 sequences | H100", "schedules.txt", H100),
    ("the same, on 114 of its SMs | H100", "schedules-114-sms.txt", H100),
    ("the same, on 78 of its SMs | H100", "schedules-78-sms.txt", H100),
    ("40 drawn at random, never looked at | H100", "schedules-random.txt", H100),
    ("46 named, an earlier cost model, 2026-11-24 | H200", "schedules.txt", H200),
]


@pytest.mark.parametrize(("named", "file", "folder"), SUITES, ids=[row[0] for row in SUITES])
def test_schedules_together(named: str, file: str, folder: pathlib.Path) -> None:
    """Means are of batches that FA3 splits, up to 992 sequences; what is within 3 % of all."""
    rows = {name: [float(cell) for cell in cells] for name, cells in judged(file, folder).items()}
    few = [cells for name, cells in rows.items() if not name.startswith(("1024:", "4096:"))]
    near = sum(cells[2] <= 1.03 * cells[3] for cells in rows.values())
    said = re.search(rf"\| {re.escape(named)} \|(.*)\|", SCHEDULES.read_text())
    assert said is not None
    cells = [
        float(number) if number.strip() else None for number in re.sub(r"[x%]|within.*", "", said[1]).split("|")[:4]
    ]
    mean = statistics.geometric_mean
    measured = (
        mean(row[4] for row in few), min(row[4] for row in few), mean(row[5] for row in few),
        100 * (mean(row[6] for row in few) - 1),
    )  # fmt: skip
    for found, wanted in zip(cells, measured, strict=True):
        assert found is None or found == pytest.approx(wanted, abs=0.011)
    counted = re.search(r"(\d+) of (?:all )?(\d+) \|", said[0])
    assert counted is not None
    assert [int(number) for number in counted.groups()] == [near, len(rows)]


def test_what_the_readme_says_of_schedules() -> None:
    named, drawn = (
        {name: float(cells[4]) for name, cells in judged(file).items()}
        for file in ("schedules.txt", "schedules-random.txt")
    )
    many = sorted(named.pop(name) for name in list(named) if name.startswith(("1024:", "4096:")))
    means = [statistics.geometric_mean(some.values()) for some in (named, drawn)]
    has(README, f"{len(named)} named batches {span(named.values(), 2)} x, mean {means[0]:.2f} x; {len(drawn)} drawn at "
                f"random {span(drawn.values(), 2)} x, mean {means[1]:.2f} x; above 992 sequences {many[0]:.1f} and "
                f"{many[1]:.1f} x")  # fmt: skip
    page = (ROOT / "docs" / "how-fa3-schedules.md").read_text()
    (picture,) = re.findall(r"against +policy balanced ([\d.]+) us a layer, policy fa3 ([\d.]+) us: .* on H100", page)
    has(README, f"The picture is simulated ({picture[1]} and {picture[0]} us)")
    _, theirs, ours, *_ = judged()["32 lognormal(9, 1), window 4095"]
    has(README, f'FA3\'s took {float(theirs):.1f} us and "balanced" {float(ours):.1f}, measured')


def test_the_models_that_were_measured() -> None:
    """Rows of `fa3-metadata measure`, us of a step and what is less, in their order."""
    text = (H100 / "measure.txt").read_text()
    steps = re.findall(r"^a step, .*\n +less than FA3 alone.*$", text, re.MULTILINE)
    page = (ROOT / "docs" / "measuring.md").read_text()
    table = [line for line in page.splitlines() if re.match(r"\| .*lognormal.*\|", line)]
    assert len(steps) == len(table) == 4
    for step, row in zip(steps, table, strict=True):
        us = [f"{float(one):,.0f}" for one in re.findall(r"\d+\.\d+(?!\d*%)", step.splitlines()[0])]
        assert all(f" {one} " in row for one in us if one != "2,501"), (us, row)  # batch invariant stands elsewhere
        less = re.findall(r"\+(\d+\.\d)%", step.splitlines()[1])
        assert sum(f"({one} %)" in row for one in less) >= min(len(less), 3)
