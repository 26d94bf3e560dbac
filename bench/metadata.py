"""The metadata stage alone: our kernel beside the wheel's op, SGLang's way of using it, FlagGems and empty kernels.

    python -m bench metadata                  # a CUDA GPU; everything else that is measured if it is installed
    python -m bench metadata --heads 32/8 --window 4095

First every output is compared with ours, row by row; a peer whose output differs gets no ratio, and the exit status
is 1. Then all are measured in turns in this process, at each batch size: device time of a call in a CUDA graph, device
time run eagerly, host time of a call, and time end to end with a synchronise after it (integration/tools/timing.py says
what is inside each). Eight tensors of random lengths take turns and are drawn anew before each sample, outside of it.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import fa3_metadata
import torch
from fa3_metadata import MetadataLayout
from fa3_metadata.tools.timing import (
    Before,
    Facts,
    Launch,
    Launches,
    Sampler,
    eager_sampler,
    end_to_end_sampler,
    first_call_time,
    gpu_facts,
    graph_sampler,
    host_sampler,
    interleaved,
    warm_up,
)

from . import first_use
from .peers import MEANINGS, TITLES, Case, Lengths, Peer, differing_rows, make_peers
from .rows import Row, metric_table, row_of, write_csv

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 992, 1024, 2048, 4096, 8192)
QUICK_BATCHES = (1, 32, 992)
RESULTS = pathlib.Path(__file__).resolve().parent / "results"
METRICS = {
    "graph": "device time in a CUDA graph",
    "eager": "device time run eagerly",
    "host": "host time",
    "end_to_end": "end to end, with a synchronise",
}
_SAMPLERS: dict[str, Callable[[Launches, Before], Sampler]] = {
    "graph": lambda launch, before: graph_sampler(launch, before_replay=before),
    "eager": lambda launch, before: eager_sampler(launch, before=before),
    "host": lambda launch, before: host_sampler(launch, before=before),
    "end_to_end": lambda launch, before: end_to_end_sampler(launch, before=before),
}
_SHOWN_AGAIN = 32  # the batch size of the table of host times
_COMPARED_DRAWS = 3  # of eight tensors of lengths each


@dataclass(frozen=True)
class Prepared:
    """A case and its peers, compiled and compared."""

    case: Case
    lengths: Lengths
    peers: list[Peer]
    missing: dict[str, str]  # peers that cannot be measured here: why
    differing: dict[str, list[str]]  # rows in which a peer's output is not ours; "ours": nor the NumPy model's

    def equal(self, name: str) -> bool | None:
        return None if name not in self.differing else not self.differing[name]


def prepare(case: Case, build: str, device: torch.device) -> Prepared:
    lengths = Lengths(case, device)
    peers, missing = make_peers(case, lengths, build)
    return Prepared(case, lengths, peers, missing, compare(case, lengths, peers))


def compare(case: Case, lengths: Lengths, peers: Sequence[Peer]) -> dict[str, list[str]]:
    """Rows in which the output of each peer ever differs from that of the first, and the first from the NumPy model."""
    ours, *others = (peer for peer in peers if peer.makes != "nothing")
    layout: MetadataLayout = fa3_metadata.metadata_layout(**case.arguments(lengths.sets[0]))
    found: dict[str, list[str]] = {peer.name: [] for peer in (ours, *others)}
    for _ in range(_COMPARED_DRAWS):
        lengths.redraw()
        for i, seqlens in enumerate(lengths.sets):
            made: Any = ours.launches[i]()
            model = fa3_metadata.get_scheduler_metadata(**case.arguments(seqlens), backend="reference")
            found[ours.name] += differing_rows(layout, model, made)
            for peer in others:
                theirs: Any = peer.launches[i]()
                found[peer.name] += peer.differing(layout, made, theirs)
    return {name: list(dict.fromkeys(rows)) for name, rows in found.items()}


def measure(prepared: Prepared, samples: int) -> Iterator[Row]:
    """Every metric of every peer."""
    for metric, sampler_of in _SAMPLERS.items():
        able = [peer for peer in prepared.peers if metric != "graph" or not peer.not_captured]
        samplers = {peer.name: sampler_of(peer.launches, prepared.lengths.redraw) for peer in able}
        warm_up(0.02)  # preparing left the GPU idle
        times = interleaved(samplers, samples)
        for peer in prepared.peers:
            note = "" if peer in able else str(peer.not_captured)
            equal = prepared.equal(peer.name)
            yield row_of(prepared.case.batch_size, peer.name, metric, times.get(peer.name, []), equal, note)


def measure_first_seen(case: Case, device: torch.device) -> list[Row]:
    """Host time of problems never asked before whose kernel is compiled: once each."""
    batch, problems = case.batch_size, 64
    seqlens = Lengths(case, device).sets[0]
    out = torch.empty(fa3_metadata.metadata_layout(**case.arguments(seqlens)).size, dtype=torch.int32, device=device)
    by_position, by_name = case.call(seqlens)
    function = partial(fa3_metadata.get_scheduler_metadata, *by_position[:2], **by_name, out=out)
    function(*by_position[2:])
    # SGLang asks for the longest sequence of each step, so that most steps have a new max_seqlen_k.
    widths = (case.max_seqlen_k + case.page_size * i for i in range(1, problems + 1))
    asked: list[Launch] = [partial(function, width, *by_position[3:]) for width in widths]
    # 129 to 256 sequences share a kernel.
    many = torch.randint(1, case.max_seqlen_k, (256,), dtype=torch.int32, device=device)
    plan = case.plan(256, device)
    plan.update(many)
    updates: list[Launch] = [partial(plan.update, many[:n]) for n in range(129, 129 + problems)]
    times = {"ours_out": first_call_time(asked), "ours": first_call_time(updates)}
    notes = {"ours_out": "another max_seqlen_k each time", "ours": "another batch size each time, 129 to 192"}
    return [row_of(batch, name, "host_first_seen", times[name], note=notes[name]) for name in times]


def first_use_rows() -> list[Row]:
    """Of fresh processes: one sample each."""
    rows = []
    for name, found in first_use.measure_first_use().items():
        times, note = ([found * 1e6], "") if isinstance(found, float) else ([], found)
        rows.append(row_of(first_use.BATCH, name, "first_use", times, note=note))
    return rows


def host_table(rows: Sequence[Row], batch: int) -> str:
    """Host times: of the same problem again, and of one never seen."""
    found = {(row.peer, row.metric): row for row in rows if row.batch == batch and row.p50 is not None}
    lines = []
    for name in ("ours", "ours_out", "native", "native_op", "sglang"):
        for metric, says in (("host", "the same problem again"), ("host_first_seen", "never seen before, compiled")):
            if row := found.get((name, metric)):
                says = f"{says}: {row.note}" if row.note else says
                lines.append(f"{row.p50:9.2f}  {TITLES[name]:12}  {says}")
    return "\n".join(lines)


def first_use_table(rows: Sequence[Row]) -> str:
    """Seconds to the first metadata of a fresh process."""
    shown = ((row, "        -" if row.p50 is None else f"{row.p50 / 1e6:9.3f}") for row in rows)
    return "\n".join(f"{seconds}  {row.peer}{row.note and ': '}{row.note}" for row, seconds in shown)


def report(prepared: Sequence[Prepared], rows: Sequence[Row], first: Sequence[Row]) -> None:
    """Everything measured, as tables."""
    for metric, says in METRICS.items():
        print(f"\n{says}: us a call, median (and over plan.update's)")
        print(metric_table(rows, metric, TITLES, "ours", "floor"))
    again = prepared[0].case.batch_size
    again = next((one.case.batch_size for one in prepared if one.case.batch_size == _SHOWN_AGAIN), again)
    print(f"\nhost time at batch {again}: us a call, median")
    print(host_table(rows, again))
    if first:
        print("\nfirst use in a fresh process: s from the end of its imports to the first metadata")
        print(first_use_table(first))
    print()
    measured = {row.peer for row in rows}
    print(aligned_left([(TITLES[name], says) for name, says in MEANINGS.items() if name in measured]))


def aligned_left(pairs: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name:{width}}  {says}" for name, says in pairs)


def verdict(prepared: Sequence[Prepared]) -> tuple[list[str], int]:
    """What was equal, what was not and what is missing; and the exit status."""
    lines, status = [], 0
    peers = {peer.name: peer for one in prepared for peer in one.peers if peer.makes != "nothing"}
    for name, peer in peers.items():
        wrong = {one.case.batch_size: one.differing[name] for one in prepared if one.differing.get(name)}
        against = "the NumPy model" if name == "ours" else "plan.update"
        for batch, found in wrong.items():
            lines.append(f"DIFFERS   {TITLES[name]} from {against} at batch {batch}: {', '.join(found)}")
        if not wrong:
            rows = "num_splits_dynamic" if peer.makes == "splits" else "every row"
            lines.append(f"equal     {TITLES[name]} and {against}: {rows}, at every batch")
        elif peer.makes == "metadata":  # FlagGems follows another FA3 release and rounds otherwise: no error of ours
            status = 1
    missing = {name: why for one in prepared for name, why in one.missing.items()}
    lines += [f"missing   {TITLES[name]}: {why}" for name, why in missing.items()]
    lines += [f"graph     {TITLES[name]} is not in it: {p.not_captured}" for name, p in peers.items() if p.not_captured]
    return lines, status


def run(options: argparse.Namespace, facts: Facts, build: str, device: torch.device) -> int:
    """Compare, measure, print and write; the exit status."""
    start = time.perf_counter()
    heads, heads_k = options.heads
    shape = {"num_heads": heads, "num_heads_k": heads_k, "max_seqlen_k": options.max_seqlen_k, "window": options.window}
    prepared = [prepare(Case(batch, **shape), build, device) for batch in options.batches]
    case = prepared[0].case
    mask = "causal" if case.window is None else f"causal, window {case.window}"
    problem = (
        f"{heads}/{heads_k} heads, headdim {case.headdim}, page {case.page_size}, {mask}, "
        f"max_seqlen_k {case.max_seqlen_k}, random lengths of 1 to that; rules of {build}"
    )
    print(f"{facts}\n{problem}", flush=True)
    lines, status = verdict(prepared)
    print("\n".join(lines), flush=True)
    warm_up()
    rows = [row for one in prepared for row in measure(one, options.samples)]
    batches = [one.case.batch_size for one in prepared]
    again = _SHOWN_AGAIN if _SHOWN_AGAIN in batches else batches[0]
    rows += measure_first_seen(Case(again, **shape), device)
    first = [] if options.quick else first_use_rows()
    report(prepared, rows, first)
    path = options.out or RESULTS / facts.folder / f"{_file_name(options)}.csv"
    write_csv(path, asdict(facts) | {"problem": problem}, [*rows, *first])
    print(f"\n{path} written, in {time.perf_counter() - start:.0f} s")
    return status


def _file_name(options: argparse.Namespace) -> str:
    """Another problem than the default is another file."""
    name = "metadata"
    if options.heads != (8, 1):
        name += "-heads-{}-{}".format(*options.heads)
    if options.max_seqlen_k != Case.max_seqlen_k:
        name += f"-max-{options.max_seqlen_k}"
    if options.window is not None:
        name += f"-window-{options.window}"
    return name + ("-quick" if options.quick else "")


def main(argv: list[str] | None = None) -> int:
    """The exit status: 1 where an output differs, 2 where there is no GPU or an argument does not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m bench metadata", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--batches", type=_batches, help=f"default: {','.join(map(str, BATCHES))}")
    parser.add_argument("--heads", type=_heads, default=(8, 1), help="q heads / KV heads; default: 8/1")
    parser.add_argument("--window", type=_positive, help="keys to the left that a query sees; default: all")
    parser.add_argument("--max-seqlen-k", type=_positive, default=Case.max_seqlen_k, help="default: %(default)s")
    parser.add_argument("--samples", type=_positive, default=50, help="of each number; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="three batch sizes, and no fresh processes")
    parser.add_argument("--out", type=pathlib.Path, help="CSV file; default: bench/results/<date>-<gpu>/metadata.csv")
    options = parser.parse_args(argv)
    options.batches = options.batches or (QUICK_BATCHES if options.quick else BATCHES)
    if not torch.cuda.is_available():
        print("python -m bench metadata needs a CUDA GPU, and torch finds none here", file=sys.stderr)
        return 2
    return run(options, gpu_facts(), fa3_metadata.detect_build().build, torch.device("cuda"))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _batches(text: str) -> tuple[int, ...]:
    """None may be 0: the wheels' op takes the process down on an empty batch."""
    return tuple(_positive(part) for part in text.split(","))


def _heads(text: str) -> tuple[int, int]:
    heads, slash, heads_k = text.partition("/")
    if not slash or _positive(heads) % _positive(heads_k):
        raise argparse.ArgumentTypeError(f"must be q heads / KV heads, and a multiple of these, got {text!r}")
    return int(heads), int(heads_k)
