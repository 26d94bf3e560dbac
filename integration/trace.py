"""A recording of an engine's real steps: what was asked of FA3, and the lengths, for `fa3-metadata explain --trace`.

    FA3_METADATA_TRACE=steps.trace python -m sglang.launch_server ...   # records from the import of fa3_metadata on
    fa3_metadata.trace.start("steps.trace"); ...; fa3_metadata.trace.stop()

Wherever metadata is made, `record(problem, tensors, rules)` is called, which is one comparison while nothing records.
The GPU is never waited for: lengths are copied to pinned memory on the stream that makes the metadata, behind an event,
and written to the file by a later call that finds the event passed. Nothing is done while a CUDA graph is captured but
to note which lengths it reads: a replay runs no Python, so whoever replays may call `replayed()` before or after it.

The file is gzip of JSON lines, at most MOST_BYTES long; steps beyond are counted and not kept. A process that finds the
file taken, as the second rank does, adds its process id to the name. What goes wrong ends the recording with one
warning; it never reaches the engine.
"""

from __future__ import annotations

import atexit
import contextlib
import gzip
import json
import os
import pathlib
import threading
import time
import warnings
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, fields
from typing import IO, Any

import numpy as np
import torch

from .arguments import LengthTensors
from .triton_kernels.builds import RELEASES, FA3Rules
from .triton_kernels.problem import Problem
from .triton_kernels.reference import Lengths

VARIABLE = "FA3_METADATA_TRACE"
MOST_BYTES = 32 * 2**20
_MOST_PENDING = 512  # steps whose copies the GPU has not reached
_MOST_CAPTURED = 4096
_FLUSH_EVERY = 5.0  # seconds; what is lost when a process is killed
_NAMES = tuple(field.name for field in fields(Lengths))


@dataclass(frozen=True, eq=False)
class Step:
    """One making of metadata, as read back."""

    seconds: float  # since the recording began
    problem: Problem
    rules: FA3Rules
    lengths: Lengths


class Recorder:
    """Writes steps to a file, which is made at the first one. Methods may be called from any thread."""

    def __init__(self, path: str | os.PathLike[str], most_bytes: int = MOST_BYTES) -> None:
        self.asked, self.path = pathlib.Path(path), pathlib.Path(path)
        self._most_bytes = most_bytes
        self._raw: IO[bytes] | None = None
        self._file: gzip.GzipFile | None = None
        self._ended = False
        self._lock = threading.Lock()
        self._began = self._flushed = time.monotonic()
        self._known: dict[tuple[Problem, str], int] = {}
        self._pending: deque[tuple[Any, float, int, dict[str, torch.Tensor]]] = deque()
        self._captured: dict[tuple[Any, ...], tuple[Problem, FA3Rules, LengthTensors]] = {}
        self.steps = self.left_out = 0

    def open(self) -> None:
        """Make the file. Raises `OSError` where it cannot be made."""
        self._raw, self.path = _open_new(self.asked)
        self._file = gzip.GzipFile(fileobj=self._raw, mode="wb", compresslevel=3)
        self._write({"fa3_metadata_trace": 1, "process": os.getpid()})

    def record(self, problem: Problem, tensors: LengthTensors, rules: FA3Rules) -> None:
        """Keep the lengths as they are when the current stream comes here."""
        with self._lock:
            if self._ended:
                return
            try:
                if self._file is None:
                    self.open()
                self._record(problem, tensors, rules)
            except Exception as error:  # the engine must go on
                self._end(error)

    def replayed(self, batch_size: int | None, reading: Collection[tuple[int, int]] | None) -> None:
        """Keep the lengths that captured graphs read, of these batches alone, as they are now."""
        with self._lock:
            captured = list(self._captured.values())
        for problem, rules, tensors in captured:
            if batch_size is not None and problem.batch_size != batch_size:
                continue
            lengths = tensors.cache_seqlens
            if reading is None or (lengths.data_ptr(), lengths.numel()) in reading:
                self.record(problem, tensors, rules)

    def _record(self, problem: Problem, tensors: LengthTensors, rules: FA3Rules) -> None:
        given = {name: one for name in _NAMES if (one := getattr(tensors, name)) is not None}
        on_gpu = tensors.cache_seqlens.is_cuda
        if on_gpu and torch.cuda.is_current_stream_capturing():
            # A graph keeps reading these very tensors. No call of CUDA may be made now.
            key = (problem, rules.name, *(one.data_ptr() for one in given.values()))
            if len(self._captured) < _MOST_CAPTURED:
                self._captured[key] = (problem, rules, tensors)
            return
        place = self._place(problem, rules)
        at = time.monotonic() - self._began
        if not on_gpu:
            self._write_step(at, place, given)
            return
        self._drain()
        if len(self._pending) >= _MOST_PENDING:
            self.left_out += 1
            return
        # torch keeps pinned memory for the next copy, so that only the first ones ask the driver for it.
        copies = {name: torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for name, one in given.items()}
        with torch.cuda.device(tensors.cache_seqlens.device):
            for name, one in given.items():
                copies[name].copy_(one, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((event, at, place, copies))

    def _place(self, problem: Problem, rules: FA3Rules) -> int:
        """The number of a problem in the file."""
        key = (problem, rules.name)
        if (place := self._known.get(key)) is None:
            place = self._known[key] = len(self._known)
            self._write({"problem": place, "rules": rules.name} | asdict(problem))
        return place

    def _drain(self, wait: bool = False) -> None:
        """Write the steps whose copies have arrived."""
        while self._pending:
            event, at, place, copies = self._pending[0]
            if wait:
                event.synchronize()
            elif not event.query():
                return
            self._pending.popleft()
            self._write_step(at, place, copies)

    def _write_step(self, at: float, place: int, tensors: dict[str, torch.Tensor]) -> None:
        lengths = {name: one.tolist() for name, one in tensors.items()}
        assert self._raw is not None
        if self._raw.tell() >= self._most_bytes:
            self.left_out += 1
            return
        self.steps += 1
        self._write({"at": round(at, 6), "of": place} | lengths)

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write((json.dumps(line, separators=(",", ":")) + "\n").encode())
        if (now := time.monotonic()) - self._flushed > _FLUSH_EVERY:
            self._file.flush()
            self._flushed = now

    def fail(self, error: Exception) -> None:
        """End the recording with a warning that says why."""
        with self._lock:
            if not self._ended:
                self._end(error)

    def stop(self) -> None:
        """Wait for the copies under way, and close the file."""
        with self._lock:
            if self._file is None:
                self._ended = True
                return
            try:
                self._drain(wait=True)
                self._write({"end": True, "steps": self.steps, "left_out": self.left_out})
            except Exception as error:
                self._end(error)
                return
            self._close()

    def _end(self, error: Exception) -> None:
        self._close()
        with contextlib.suppress(Warning):  # which -W error makes an exception
            warnings.warn(f"the recording to {self.path} has ended: {type(error).__name__}: {error}", stacklevel=4)

    def _close(self) -> None:
        self._ended = True
        self._pending.clear()
        self._captured.clear()
        file, self._file = self._file, None
        for one in (file, self._raw):
            with contextlib.suppress(OSError, ValueError):
                if one is not None:
                    one.close()

    def left_to_parent(self) -> None:
        """In a forked child: what is buffered here is the parent's to write, and so is the file."""
        self._ended = True
        if self._raw is not None and not self._raw.closed:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._raw.fileno())


def _open_new(path: pathlib.Path) -> tuple[IO[bytes], pathlib.Path]:
    """A new file of this name, or with the process id in it where there is one already."""
    try:
        return path.open("xb"), path
    except FileExistsError:
        for count in range(1000):
            more = f"{os.getpid()}" + (f"-{count}" if count else "")
            beside = path.with_name(f"{path.stem}-{more}{path.suffix}")
            try:
                return beside.open("xb"), beside
            except FileExistsError:
                continue
        raise


current: Recorder | None = None  # the recording under way; read where every microsecond counts


def start(path: str | os.PathLike[str], most_bytes: int = MOST_BYTES) -> pathlib.Path:
    """Record from now on; the file that is written. A recording under way is stopped first.

    Raises `OSError` where the file cannot be made.
    """
    global current
    stop()
    recorder = Recorder(path, most_bytes)
    recorder.open()
    current = recorder
    return recorder.path


def stop() -> None:
    """End the recording, if there is one."""
    global current
    recorder, current = current, None
    if recorder is not None:
        recorder.stop()


def record(problem: Problem, tensors: LengthTensors, rules: FA3Rules) -> None:
    """Called where metadata is made: keeps the problem and the lengths, if a recording is on."""
    if current is not None:
        current.record(problem, tensors, rules)


def replayed(batch_size: int | None = None, *, reading: Collection[tuple[int, int]] | None = None) -> None:
    """Call at each replay of a CUDA graph that makes its metadata itself: keeps the lengths that it reads.

    `batch_size`: that of the graph, where several were captured. `reading`: the address and the number of elements of
    each tensor that may be its lengths. None: whatever they are. SGLang's adapter calls it.
    """
    if current is not None:
        try:
            current.replayed(batch_size, reading)
        except Exception as error:  # the engine must go on
            current.fail(error)


def is_on() -> bool:
    """Whether a recording is under way."""
    return current is not None


def read(path: str | os.PathLike[str]) -> Iterator[Step]:
    """The steps in a file, in their order. A file that was cut off is read as far as it goes.

    Raises `ValueError`, naming the file, for one that is no recording.
    """
    rules = {release.rules.name: release.rules for release in RELEASES}
    problems: dict[int, tuple[Problem, FA3Rules]] = {}
    lines = _lines(pathlib.Path(path))
    try:
        first = next(lines, None)
        if not isinstance(first, dict) or first.get("fa3_metadata_trace") != 1:
            raise ValueError("it is none of fa3_metadata.trace, or of another version")
        for line in lines:
            if "problem" in line:
                place, name = line.pop("problem"), line.pop("rules")
                line["window_size"] = tuple(line["window_size"])
                problems[place] = Problem(**line), rules[name]
            elif "of" in line:
                problem, own = problems[line["of"]]
                arrays = {name: np.array(line[name], np.int32) for name in _NAMES if name in line}
                yield Step(float(line["at"]), problem, own, Lengths(**arrays))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as a recording: {error}") from None


def _lines(path: pathlib.Path) -> Iterator[Any]:
    with gzip.open(path, "rb") as file:
        while True:
            try:
                line = file.readline()
            except EOFError:  # the process was killed
                return
            except gzip.BadGzipFile as error:
                raise ValueError(str(error)) from None
            if not line.endswith(b"\n"):
                return
            yield json.loads(line)


def _start_if_asked() -> None:
    """At import: what FA3_METADATA_TRACE says."""
    global current
    if path := os.environ.get(VARIABLE):
        current = Recorder(path)


def _after_fork() -> None:
    global current
    if (parents := current) is not None:
        parents.left_to_parent()
        _kept.append(parents)
        current = Recorder(parents.asked)


_kept: list[Recorder] = []  # nothing of theirs may be closed
atexit.register(stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
_start_if_asked()
