"""A check repeated in fresh processes, for a wheel that meets a torch which it was not built for.

sgl-kernel 0.3.21 was built for an older torch. On a newer one a tensor that it allocates is broken now and then,
depending on what the process's memory held before, and then it raises. A fresh process has a fresh memory.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch

BROKEN = "doesn't have storage"  # part of what it raises then
PROCESSES = 10
ROOT = pathlib.Path(__file__).parent.parent
_DONE = "one case is done"


def hold(*tensors: torch.Tensor | None) -> Any:
    """A second C++ reference to each, for as long as the result lives.

    A torch of today tells Python when a tensor gets its second C++ reference and when it loses it; code compiled for
    an older one does not, so that Python's count goes wrong wherever such code takes or drops that reference.
    """
    return torch._C.ScriptList([tensor for tensor in tensors if tensor is not None])  # type: ignore[attr-defined]


def in_fresh_processes(check: Callable[..., None], cases: Sequence[tuple[Any, ...]]) -> None:
    """`check(*case)` for all cases in one new process; where the wheel breaks, the rest of them in another one.

    `check` is a function at the top level of a test module; a case is made of numbers, strings and the like. A case
    that broke comes last in the next process, so that it finds another memory. Fails for any other error, and for
    cases that are left after PROCESSES processes.
    """
    left = list(cases)
    for _ in range(PROCESSES):
        code = f"from tests.fresh import run; run({check.__module__!r}, {check.__name__!r}, {left!r})"
        command = [sys.executable, "-W", "ignore", "-c", code]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if process.returncode == 0:
            return
        done = process.stdout.splitlines().count(_DONE)
        failed, left = left[done : done + 1], left[done + 1 :]
        assert BROKEN in process.stderr, f"{failed}: exit code {process.returncode}\n{process.stderr}"
        left += failed
    raise AssertionError(f"the wheel broke in {PROCESSES} fresh processes; left are {left}")


def run(module: str, name: str, cases: Sequence[tuple[Any, ...]]) -> None:
    """What such a process does."""
    check = getattr(import_module(module), name)
    for case in cases:
        check(*case)
        print(f"\n{_DONE}", flush=True)
