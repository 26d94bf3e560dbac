"""How long a launch takes: on the device in a CUDA graph, on the device run eagerly, on the host, and end to end.

Times are microseconds a call, as a list of samples; `summary` makes percentiles of them. What is inside the timed
region stands with each function. A launch is a callable, or a list of callables that take turns, such as the same work
on several inputs; it is called once before anything is timed, so that nothing is compiled or loaded while timed.

    times = graph_time(launch)
    times = interleaved({"ours": graph_sampler(ours), "theirs": graph_sampler(theirs)})  # in turns, in one process

Every `..._time` has a `..._sampler`, which prepares once and then gives as many samples as asked, as often as asked.
"""

from __future__ import annotations

import datetime
import gc
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ..installed import SEARCH_ORDER, installed_version

Times = list[float]
Launch = Callable[[], object]
Launches = Launch | Sequence[Launch]
Sampler = Callable[[int], Times]
Before = Callable[[], object] | None

_FASTEST_CLOCK = 2e9  # Hz; a spin of so many cycles lasts a second or longer on the GPUs of today
_HEAD_START = 50e-6  # seconds that the host is given to queue what is timed


# ---- device time -----------------------------------------------------------------------------------------------------


def graph_sampler(launch: Launches, calls: int = 20, before_replay: Before = None) -> Sampler:
    """Capture `calls` calls into one CUDA graph; a sample is a replay of it. See `graph_time`."""
    rotation = _rotation(launch, calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _call_once(launch)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for one in rotation:
                one()
        graph.replay()
    return partial(_graph_samples, graph, stream, rotation, before_replay)


def graph_time(launch: Launches, calls: int = 20, replays: int = 50, before_replay: Before = None) -> Times:
    """Device time of a call as a node of a CUDA graph: a replay of `calls` calls between two events, over `calls`.

    `before_replay` runs on the same stream before each replay and is not timed: it changes the inputs, or flushes L2.
    """
    return graph_sampler(launch, calls, before_replay)(replays)


def eager_sampler(launch: Launches, calls: int = 20, before: Before = None, head_start: float = _HEAD_START) -> Sampler:
    """See `eager_time`. The host has `head_start` seconds and twice the time it took to queue a sample's calls."""
    rotation = _rotation(launch, calls)
    _call_once(launch)
    seconds = max(_host_seconds(rotation) for _ in range(3))
    return partial(_eager_samples, rotation, before, 2 * seconds + head_start)


def eager_time(launch: Launches, calls: int = 20, samples: int = 50, before: Before = None) -> Times:
    """Device time of a call launched by itself: `calls` calls between two events, over `calls`.

    The GPU is kept busy until all of them are queued, so the host's time is not in it, unless a call synchronises.
    """
    return eager_sampler(launch, calls, before)(samples)


def _graph_samples(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, rotation: list[Launch], before: Before, replays: int
) -> Times:
    # The rotation is also held here since it holds the tensors that the graph reads.
    with torch.cuda.stream(stream):
        return [_between_events(graph.replay, before, _HEAD_START) / len(rotation) for _ in range(replays)]


def _eager_samples(rotation: list[Launch], before: Before, head_start: float, samples: int) -> Times:
    def run() -> None:
        for one in rotation:
            one()

    with _no_collection():
        return [_between_events(run, before, head_start) / len(rotation) for _ in range(samples)]


def _between_events(run: Launch, before: Before, head_start: float) -> float:
    """Microseconds on the device between an event before `run` and one after it."""
    if before is not None:
        before()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    spin(head_start)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1000


# ---- host time -------------------------------------------------------------------------------------------------------


def host_sampler(launch: Launches, calls: int = 20, before: Before = None) -> Sampler:
    """See `host_time`."""
    rotation = _rotation(launch, calls)
    _call_once(launch)
    return partial(_host_samples, rotation, before)


def host_time(launch: Launches, calls: int = 20, samples: int = 50, before: Before = None) -> Times:
    """Time until a call returns: the host's clock around `calls` calls, over `calls`. The GPU is idle before them."""
    return host_sampler(launch, calls, before)(samples)


def end_to_end_sampler(launch: Launches, before: Before = None) -> Sampler:
    """See `end_to_end_time`."""
    _call_once(launch)
    return partial(_end_to_end_samples, _list(launch), before)


def end_to_end_time(launch: Launches, samples: int = 50, before: Before = None) -> Times:
    """Time of one call and `torch.cuda.synchronize()` after it, by the host's clock. The GPU is idle before it."""
    return end_to_end_sampler(launch, before)(samples)


def first_call_time(launches: Sequence[Launch]) -> Times:
    """Host time of each of `launches`, called once and never before; the GPU is idle before each."""
    return [_idle_then(partial(_host_seconds, [one]), None) * 1e6 for one in launches]


def _host_samples(rotation: list[Launch], before: Before, samples: int) -> Times:
    timed = partial(_host_seconds, rotation)
    return [_idle_then(timed, before) * 1e6 / len(rotation) for _ in range(samples)]


def _end_to_end_samples(launches: list[Launch], before: Before, samples: int) -> Times:
    timed = (partial(_host_seconds, [launches[i % len(launches)], torch.cuda.synchronize]) for i in range(samples))
    return [_idle_then(one, before) * 1e6 for one in timed]


def _idle_then(timed: Callable[[], float], before: Before) -> float:
    if before is not None:
        before()
    torch.cuda.synchronize()
    with _no_collection():
        return timed()


def _host_seconds(rotation: Sequence[Launch]) -> float:
    start = time.perf_counter()
    for one in rotation:
        one()
    return time.perf_counter() - start


# ---- together --------------------------------------------------------------------------------------------------------


def interleaved(samplers: Mapping[str, Sampler], samples: int = 50, rounds: int = 5) -> dict[str, Times]:
    """`samples` samples of each sampler, in turns over `rounds` rounds, so that all see the same clocks and noise.

    Every other round goes backwards: nobody always comes after the same one. One more sample of each is thrown away.
    """
    names = list(samplers)
    times: dict[str, Times] = {name: [] for name in names}
    for name in names:
        samplers[name](1)
    for i in range(rounds):
        share = samples * (i + 1) // rounds - samples * i // rounds
        for name in names if i % 2 == 0 else reversed(names):
            times[name] += samplers[name](share)
    return times


def summary(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    p20, p50, p80 = np.percentile(samples, [20, 50, 80])
    return float(p20), float(p50), float(p80)


Captured = dict[str, list[Times]]  # by what was captured, the times of each of its graphs


def middle(captures: list[Times]) -> float:
    """Mean of the medians of several graphs of the same."""
    return sum(summary(one)[1] for one in captures) / len(captures)


def apart(captured: Captured) -> float:
    """The most that graphs of the same differ by, as a part of their time: smaller differences mean nothing."""
    medians = [[summary(one)[1] for one in captures] for captures in captured.values()]
    return max((max(one) - min(one)) / min(one) for one in medians)


def spin(seconds: float) -> None:
    """Keep the GPU busy for so long, or longer where its clock is slow; returns at once."""
    torch.cuda._sleep(int(seconds * _FASTEST_CLOCK))


def warm_up(seconds: float = 0.5) -> None:
    """Keep the GPU busy so that its clocks are up; waits for it."""
    spin(seconds)
    torch.cuda.synchronize()


def _rotation(launch: Launches, calls: int) -> list[Launch]:
    launches = _list(launch)
    return [launches[i % len(launches)] for i in range(calls)]


def _list(launch: Launches) -> list[Launch]:
    return [launch] if callable(launch) else list(launch)


def _call_once(launch: Launches) -> None:
    for one in _list(launch):
        one()


@contextmanager
def _no_collection() -> Iterator[None]:
    """A collection of garbage in a timed region would be counted as somebody's."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# ---- what it was measured on -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What a number needs beside it; "unknown" or "none" where that is what could be found out."""

    gpu: str
    sm_clock: str
    memory_clock: str
    driver: str
    torch: str
    triton: str
    fa3: str
    date: str

    @property
    def folder(self) -> str:
        """A name for a folder of results, such as 2026-11-23-h200."""
        words = re.findall(r"[a-z0-9]+", self.gpu.lower().replace("nvidia", ""))
        return "-".join([self.date, *words])

    def __str__(self) -> str:
        clocks = f"SM clock {self.sm_clock}, memory clock {self.memory_clock}, driver {self.driver}"
        return f"{self.gpu}; {clocks}; torch {self.torch}, triton {self.triton}, {self.fa3}; {self.date}"


def gpu_facts() -> Facts:
    """The GPU, its clocks while busy, and the versions of everything; never fails."""
    clocks = _ask_nvidia_smi()
    wheels = (f"{name} {version}" for name in SEARCH_ORDER if (version := installed_version(name)))
    return Facts(
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        sm_clock=clocks[0],
        memory_clock=clocks[1],
        driver=clocks[2],
        torch=torch.__version__,
        triton=installed_version("triton") or "none",
        fa3=", ".join(wheels) or "no FA3 wheel",
        date=datetime.date.today().isoformat(),
    )


def _ask_nvidia_smi() -> tuple[str, str, str]:
    """SM clock, memory clock, driver version of the current GPU."""
    unknown = ("unknown", "unknown", "unknown")
    query = "--query-gpu=clocks.sm,clocks.mem,driver_version"
    try:
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        if torch.cuda.is_available():
            command += ["-i", f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"]
            warm_up()
            spin(0.5)  # an idle GPU would report the clocks of an idle GPU
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        found = [field.strip() for field in answer.splitlines()[0].split(",")]
    except Exception:  # no such program, no such option, no GPU: what was measured is worth as much
        return unknown
    return (found[0], found[1], found[2]) if len(found) == 3 else unknown
