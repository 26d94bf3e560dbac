"""`fa3-metadata tune`: measures this machine's GPU once, and writes the tables that the library then uses.

    fa3-metadata tune launch     launch shapes of the metadata kernel (triton_kernels/shapes.py)
    fa3-metadata tune balance    constants of policy "balanced" (triton_kernels/balance.py), by the installed FA3

New constants are kept where they make schedules that take less time than those of the constants in use, measured on
batches that they were not fitted to, and that are nowhere clearly slower than these or FA3's.

Launch shapes are found by `triton.autotune`, here and never in production: there it would have to be what launches go
through, and would measure whenever a key is new, in the middle of serving. A launch takes longer on the host than on
the device, so it is given Triton's `do_bench_cudagraph`. All shapes would be some 300 kernels to compile; the search
goes from the H200's shape to the neighbours of the best one instead, and moves only for a clear gain.
"""

from __future__ import annotations

import argparse
import datetime
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..api import plan_call
from ..arguments import device_facts, gpu_name
from ..installed import detect_build, installed_version
from ..schedules import load_launch
from ..triton_kernels.balance import check_constants, constants_of
from ..triton_kernels.builds import DEFAULT_BUILD, package_of
from ..triton_kernels.problem import DEFAULT_GPU
from ..triton_kernels.shapes import GROUPS, MANY, Shapes, shapes_of, shipped_shapes
from ..triton_kernels.tables import cache_file, write_table
from .balance_check import check
from .balance_fit import fit_table

Shape = tuple[int, int]  # SLICE, num_warps
# The microseconds of launches of some shapes: batch size, whether for policy "balanced", shapes.
LaunchTimer = Callable[[int, bool, Sequence[Shape]], Mapping[Shape, float]]
_GAIN = 0.98  # a shape is left for one that takes less than this part of its time
_SLICES, _WARPS = (1, 64), (1, 16)  # the least and the most that are tried
_MANY_BATCH = 4096
_WARM_UP_CYCLES = 60_000_000  # some 30 ms


def add_options(parser: argparse.ArgumentParser, parser_class: type[argparse.ArgumentParser]) -> None:
    """The options of the command."""
    what = parser.add_subparsers(dest="what", required=True, parser_class=parser_class)
    launch = what.add_parser("launch", help="launch shapes of the metadata kernel")
    balance = what.add_parser("balance", help='constants of policy "balanced", by timing the installed FA3')
    balance.add_argument("--build", help='FA3 build, such as "vllm-0.33.0" (default: what is installed)')
    for one in (launch, balance):
        one.add_argument("--out", type=pathlib.Path, help="file to write (default: where the library looks for it)")


def run(options: argparse.Namespace, say: Callable[[str], None] = print) -> None:
    """Measure, and write the table. Raises `RuntimeError`, `OSError` or `ValueError` where that cannot be done."""
    if not torch.cuda.is_available():
        raise RuntimeError(f"tune {options.what} measures a CUDA GPU: there is none here")
    device = torch.device("cuda", torch.cuda.current_device())
    gpu, (arch, num_sms) = gpu_name(device), device_facts(device, None, None)
    path: pathlib.Path = options.out or cache_file(options.what, gpu)
    say(f"{gpu}, {num_sms} SMs")
    if options.what == "launch":
        table = launch_table(gpu, _measured("torch", "triton"), time_launches, say)
        shapes_of(table)
    else:
        if arch < 90:
            raise RuntimeError(f"tune balance needs a Hopper GPU, whose kernels the model describes, got sm_{arch}")
        better = balance_table(options.build, gpu, num_sms, device, say)
        if better is None:
            return
        table = better
    write_table(path, table)
    say(f"written to {path}")


def _measured(*packages: str) -> dict[str, str]:
    """What a table was measured with, and when."""
    versions = {package: version for package in packages if (version := installed_version(package))}
    return versions | {"date": datetime.date.today().isoformat()}


def balance_table(
    build: str | None, gpu: str, num_sms: int, device: torch.device, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """The table of constants that was fitted; None where those in use are as good, or it is clearly worse somewhere."""
    from ..installed import load_forward
    from .layer_timer import LayerTimer

    build = build or detect_build().build
    try:
        load_forward(build)
    except ImportError as error:
        raise RuntimeError(f"tune balance times the forward of {build}, which does not import here: {error}") from error
    say(f"{build}; us a layer, medians of CUDA-graph replays")
    timer, in_use = LayerTimer(build), constants_of(gpu)
    table = fit_table(gpu, num_sms, _measured("torch", package_of(build)), build, timer, say, device)
    check_constants(table)
    for one in table["kernels"]:
        say(f"kernel {one['kernel']}: alone_us {one['alone_us']}, tile_us {one['tile_us']}")
    say(f"split_us {table['split_us']}; {table['bandwidth_gb_s']} GB/s, at most {table['peak_gb_s']}")
    verdict = check(table, in_use, num_sms, build, timer, device)
    for line in verdict.lines():
        say(line)
    if not verdict.is_better:
        say(f"kept the constants in use, of {in_use['gpu']}: these are not better, or clearly worse somewhere")
        return None
    return table


# ---- launch shapes ---------------------------------------------------------------------------------------------------


def launch_table(
    gpu: str, measured: dict[str, str], timer: LaunchTimer, say: Callable[[str], None], start: Shapes | None = None
) -> dict[str, Any]:
    """The table of launch shapes of a GPU, found from those of `start` (default: an H200's)."""
    start = start or shipped_shapes(DEFAULT_GPU)
    table: dict[str, Any] = {"gpu": gpu, "measured": measured, "columns": ["slice", "num_warps"]}
    say(f"{'us a launch':>12s}  sequences  (SLICE, num_warps): time, from the first tried to the best")
    for way, balanced in (("fa3", False), ("balanced", True)):
        shapes: dict[str, Shape] = {}
        for name, group, batch_size in _buckets():
            times = search(start.find(group, balanced, batch_size > MANY), group, batch_size, balanced, timer)
            shapes[name] = min(times, key=lambda shape: times[shape])
            steps = ", ".join(f"{shape}: {time:.2f}" for shape, time in times.items())
            say(f"{way:>12s}  {batch_size:9d}  {steps}")
        table[way] = shapes
    return table


def _buckets() -> list[tuple[str, int, int]]:
    """(name, GROUP, a batch size) of the entries of a table: the largest batches, which take the longest."""
    groups = [(str(group), group, min(group, MANY // 2)) for group in GROUPS]
    return [*groups, ("many", GROUPS[-1], _MANY_BATCH)]


def search(start: Shape, group: int, batch_size: int, balanced: bool, timer: LaunchTimer) -> dict[Shape, float]:
    """The shapes that were the best so far, and their times: `start` first, the last is the best."""
    seen: dict[Shape, float] = {}
    path: dict[Shape, float] = {}
    best = start
    while new := [shape for shape in _neighbours(best, group) if shape not in seen]:
        seen |= timer(batch_size, balanced, [best, *new])
        path[best] = seen[best]
        found = min(_neighbours(best, group), key=lambda shape: seen[shape])
        if seen[found] >= _GAIN * seen[best]:
            break
        best = found
    path[best] = seen[best]
    return path


def _neighbours(shape: Shape, group: int) -> list[Shape]:
    """Twice and half the slice, twice and half the warps."""
    slice_, warps = shape
    some = [(2 * slice_, warps), (slice_ // 2, warps), (slice_, 2 * warps), (slice_, warps // 2)]
    most_slice = min(group, _SLICES[1])
    return [(s, w) for s, w in some if _SLICES[0] <= s <= most_slice and _WARPS[0] <= w <= _WARPS[1]]


def time_launches(batch_size: int, balanced: bool, shapes: Sequence[Shape]) -> dict[Shape, float]:
    """Microseconds of a launch for decode over a paged cache, by its shape, on the current CUDA device."""
    from triton.testing import do_bench_cudagraph

    def bench(launch: Callable[[], object], quantiles: Sequence[float]) -> Sequence[float]:
        launch()  # compiles
        torch.cuda._sleep(_WARM_UP_CYCLES)  # clocks go down while a kernel is compiled
        times: Sequence[float] = do_bench_cudagraph(launch, rep=3, quantiles=quantiles)
        return times

    device = torch.device("cuda", torch.cuda.current_device())
    drawn = torch.Generator().manual_seed(batch_size)
    lengths = torch.empty(batch_size).log_normal_(7, 1, generator=drawn).clamp(16, 65536).to(device, torch.int32)
    arguments = {
        "batch_size": batch_size, "max_seqlen_q": 1, "max_seqlen_k": 65536, "num_heads": 8, "num_heads_k": 1,
        "headdim": 128, "cache_seqlens": lengths, "page_size": 64, "causal": True, "num_splits": 32,
        "policy": "balanced" if balanced else "fa3", "build": DEFAULT_BUILD,
    }  # fmt: skip
    tensors, problem, _, plan = plan_call(arguments, device)
    assert tensors is not None
    out = torch.empty(plan.layout.size, dtype=torch.int32, device=device)
    launch = load_launch(device).metadata_launch(problem, plan)
    found = launch.autotune(shapes, bench, (out,), tensors.pointers())
    return {shape: 1000 * milliseconds for shape, milliseconds in found.items()}
