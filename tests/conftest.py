"""On a machine without a GPU the Triton kernel runs in the interpreter, on CPU tensors."""

from __future__ import annotations

import datetime
import fcntl
import gc
import os
import pathlib
import tempfile
from collections.abc import Iterator

import pytest
import torch
from fa3_metadata.installed import SEARCH_ORDER, installed_version

from bench.newer_torch import avoid_misread_tensors

from .helpers.skips import summed_up

HAS_GPU = torch.cuda.is_available()
_LOCKED = "FA3_METADATA_TESTS_HAVE_THE_GPU"
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
else:
    avoid_misread_tensors()


def pytest_report_header() -> list[str]:
    """What a recorded run was made on."""
    names = ("torch", "triton", "numpy", *SEARCH_ORDER)
    versions = ", ".join(f"{name} {version}" for name in names if (version := installed_version(name)))
    gpu = torch.cuda.get_device_name() if HAS_GPU else "none; the Triton kernel runs in the interpreter"
    return [f"GPU: {gpu}", f"packages: {versions}", f"date: {datetime.date.today()}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    skip = pytest.mark.skipif(True, reason="no CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip, append=False)  # before any wheel that it needs besides


@pytest.fixture(autouse=True)
def _the_gpu_alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """While a test marked `alone` runs, no other worker has the GPU.

    All others share a lock, which it takes for itself: every test may run kernels on the GPU. Whoever takes either
    passes the gate first, so that it need not wait until no other test happens to run. Tests that a test starts have
    its lock.
    """
    if not HAS_GPU or _LOCKED in os.environ:
        yield
        return
    folder = pathlib.Path(tempfile.gettempdir())
    alone = request.node.get_closest_marker("alone") is not None
    with (
        (folder / f"fa3-metadata-tests-{os.getuid()}.gate").open("w") as gate,
        (folder / f"fa3-metadata-tests-{os.getuid()}.gpu").open("w") as gpu,
    ):
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(gpu, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        os.environ[_LOCKED] = "1"
        try:
            yield
        finally:
            gc.collect()
            torch.cuda.empty_cache()  # which other workers may need
            del os.environ[_LOCKED]
            fcntl.flock(gpu, fcntl.LOCK_UN)  # whoever has inherited the file


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [report.longrepr for report in terminalreporter.stats.get("skipped", [])]
    if line := summed_up(longrepr[2] for longrepr in skipped if isinstance(longrepr, tuple)):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the Triton kernel runs here."""
    return torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
