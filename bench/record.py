"""Recordings of an installed wheel's own metadata op on this GPU: the files in tests/data.

    PYTHONPATH=<folder of a wheel> python -m bench record --build vllm-0.28.0 --cases 500 --out vllm-0.28.0.jsonl.gz

One case a line: {"build", "num_sms", "arch", "args", "size", "rows"}. `args` are named as those of
`get_scheduler_metadata`, lengths as lists; `size` is the length of the tensor that the op returned; `rows` holds the
`batch_size` valid elements of each row, as `metadata_layout` finds them. Half are drawn widely over every argument, a
third lies on the rounding boundary, and in a sixth FA3's own bound on splits decides (cases.py). Nothing is written,
and the exit status is 1, where the op's tensor is not as long as the layout says, or has no zero where its semaphore
should be. Where a build registers no
op for it, the function that it exports is called (exported_op.py).
"""

from __future__ import annotations

import argparse
import gzip
import json
import pathlib
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from fa3_metadata.api import plan_call
from fa3_metadata.arguments import device_facts
from fa3_metadata.installed import MissingOpError, installed_version, native_op, op_arguments
from fa3_metadata.triton_kernels.builds import package_of

from .cases import Case, boundary_case, crowded_case, random_case
from .newer_torch import avoid_misread_tensors

Op = Callable[..., torch.Tensor]
_SHOWN = 5


class OtherLayoutError(Exception):
    """What the op made is not laid out as its build's rules say."""


@dataclass
class Recording:
    """Recorded cases; calls that the op refused, counted by what it said; and results that are laid out otherwise."""

    cases: list[Case] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def op_of(build: str) -> Op:
    """What makes metadata in `build`, which must be installed, by position.

    Raises `ValueError` for a build that is not known, and `RuntimeError` where it is not there or makes none.
    """
    package = package_of(build)
    version = installed_version(package)
    if version and f"{package}-{version}" != build:
        raise RuntimeError(f"{package} {version} is installed, which is not {build}")
    avoid_misread_tensors()
    try:
        return native_op(build)
    except MissingOpError:
        from .exported_op import exported_op  # needs a compiler

        return exported_op(build)


def recorded(case: Case, op: Op, device: torch.device) -> Case:
    """The case with what the op makes of it. Raises `OtherLayoutError`, and whatever the op raises."""
    tensors, problem, rules, plan = plan_call(case.arguments(device))
    assert tensors is not None
    layout = plan.layout
    made = op(*op_arguments(problem, rules, tensors))
    if made.dtype != torch.int32 or made.shape != (layout.size,):
        raise OtherLayoutError(f"{made.dtype} of shape {tuple(made.shape)} instead of {layout.size}: {case.paste()}")
    values = made.tolist()
    if layout.semaphore is not None and values[layout.semaphore] != 0:
        raise OtherLayoutError(f"{values[layout.semaphore]} where the semaphore should be: {case.paste()}")
    return replace(case, size=len(values), rows={name: values[row] for name, row in layout.rows.items()})


def record(build: str, op: Op, device: torch.device, count: int, seed: int, largest_batch: int) -> Recording:
    """`count` cases, or fewer where the op refuses as many."""
    arch, num_sms = device_facts(device, None, None)
    rng, recording = random.Random(f"{build} {seed}"), Recording()
    while len(recording.cases) + len(recording.wrong) < count and recording.refused.total() < count:
        kind = len(recording.cases) % 6
        if kind in (2, 5):
            case = boundary_case(rng, build, num_sms, largest_batch=min(largest_batch, 992))
        elif kind == 4:
            case = crowded_case(rng, build, num_sms, largest_batch=min(largest_batch, 992))
        else:
            case = random_case(rng, build, num_sms, arch, largest_batch)
        if not case.args["batch_size"]:  # the op launches an empty grid, which is an error
            continue
        try:
            recording.cases.append(recorded(case, op, device))
        except OtherLayoutError as error:
            recording.wrong.append(str(error))
        except RuntimeError as error:
            recording.refused[str(error).strip().splitlines()[0]] += 1
    return recording


def line(case: Case) -> str:
    """A case as tests/data holds it."""
    fields: dict[str, Any] = {"build": case.build, "num_sms": case.num_sms, "arch": case.arch, "args": case.args}
    return json.dumps(fields | {"size": case.size, "rows": case.rows}, separators=(",", ":"))


def write(path: pathlib.Path, cases: list[Case]) -> None:
    """The same bytes for the same cases."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        packed.writelines(f"{line(case)}\n".encode() for case in cases)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench record", description=__doc__.splitlines()[0])
    parser.add_argument("--build", required=True, help="package and version of the installed wheel")
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--largest-batch", type=int, default=2048)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("python -m bench record needs a CUDA GPU, and torch finds none here", file=sys.stderr)
        return 2
    try:
        op = op_of(options.build)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    recording = record(options.build, op, device, options.cases, options.seed, options.largest_batch)
    for says, times in recording.refused.most_common():
        print(f"refused {times} times: {says}")
    for says in recording.wrong[:_SHOWN]:
        print(f"ANOTHER LAYOUT: {says}", file=sys.stderr)
    if recording.wrong or len(recording.cases) < options.cases:
        print(
            f"{options.build}: {len(recording.wrong)} of {options.cases} results are laid out otherwise than its "
            f"rules say, {recording.refused.total()} calls were refused; nothing is written",
            file=sys.stderr,
        )
        return 1
    write(options.out, recording.cases)
    print(f"{options.out}: {len(recording.cases)} cases of {options.build} on {torch.cuda.get_device_name(device)}")
    return 0
