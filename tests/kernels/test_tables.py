"""What may lie in the cache folder of tuned tables: nothing there stops a call or makes both implementations differ."""

from __future__ import annotations

import copy
import itertools
import json
import multiprocessing
import os
import pathlib
import resource
import socket
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fa3_metadata
import numpy as np
import pytest
import torch
from fa3_metadata import api, schedules
from fa3_metadata.api import plan_call
from fa3_metadata.triton_kernels import balance, launch, plan, shapes, tables
from fa3_metadata.triton_kernels.builds import RELEASES, rules_for
from fa3_metadata.triton_kernels.problem import DEFAULT_GPU

from ..conftest import HAS_GPU

GPU = torch.cuda.get_device_name() if HAS_GPU else DEFAULT_GPU
FIND: dict[str, Callable[[str], Any]] = {"balance": balance.constants_of, "launch": shapes.shipped_shapes}
DECODE = {
    "batch_size": 4, "max_seqlen_q": 1, "max_seqlen_k": 65536, "num_heads": 8, "num_heads_k": 1, "headdim": 128,
    "page_size": 64, "causal": True, "build": "sglang-kernel-0.4.2", "policy": "balanced",
}  # fmt: skip
LENGTHS = [100, 200, 300, 60000]


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """An empty cache folder, and nothing remembered of another."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("FA3_METADATA_CACHE", str(folder))
    _forget()
    yield folder
    _forget()


def _forget() -> None:
    api._kinds.clear()
    kept = schedules.step_of, schedules._schedules_of
    for remembered in (shapes.shipped_shapes, balance.constants_of, plan.make_plan, *kept):
        remembered.cache_clear()


def _schedule(device: torch.device, **more: Any) -> list[int]:
    """Of a decode batch: that of both implementations, which must be the same."""
    call = DECODE | {"cache_seqlens": torch.tensor(LENGTHS, dtype=torch.int32, device=device)} | more
    theirs, ours = (
        fa3_metadata.get_scheduler_metadata(**call, backend=backend).tolist() for backend in ("reference", "triton")
    )
    assert ours == theirs
    return ours


def _ignored(kind: str) -> str:
    """Why the tuned table is ignored. The table without it serves, and there is one warning, which names the file."""
    path = tables.cache_file(kind, GPU)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [FIND[kind](GPU), FIND[kind](GPU)]
    (warning,) = caught
    head, _, reason = str(warning.message).partition(" cannot be used and is ignored: ")
    assert head == str(path)
    assert 0 < len(reason) < 250
    assert "\n" not in reason
    if kind == "balance":
        assert found == [_shipped("balance", GPU)] * 2
    else:
        assert found == [shapes.shapes_of(_shipped("launch", GPU))] * 2
    return reason


def _shipped(kind: str, gpu: str) -> dict[str, Any]:
    folder = pathlib.Path(str(tables.__file__)).parent
    found = {table["gpu"]: table for table in map(json.loads, (p.read_text() for p in folder.glob(f"{kind}_*.json")))}
    return found.get(gpu, found[DEFAULT_GPU])


def _good(kind: str, **changes: Any) -> dict[str, Any]:
    return copy.deepcopy(_shipped(kind, GPU)) | {"gpu": GPU} | changes


# ---- hostile contents ------------------------------------------------------------------------------------------------


def _contents(kind: str) -> dict[str, tuple[bytes, str]]:
    """Whatever the kind of table: content, and a part of the reason."""
    good = json.dumps(_good(kind))

    def with_more(more: str) -> bytes:
        return good.replace("{", f'{{"more": {more}, ', 1).encode()

    return {
        "empty": (b"", "JSONDecodeError"),
        "cut short": (good[:-5].encode(), "JSONDecodeError"),
        "null": (b"null", "no JSON object"),
        "a number": (b"5", "no JSON object"),
        "a list": (f"[{good}]".encode(), "no JSON object"),
        "a string": (b'"gpu"', "no JSON object"),
        "a lone surrogate": (b'"\\ud800"', "no JSON object"),
        "an empty object": (b"{}", "KeyError: 'gpu'"),
        "deep lists": (b"[" * 200_000, "RecursionError"),
        "deep objects": (b'{"a":' * 100_000, "RecursionError"),
        "deep, in a good table": (with_more("[" * 200_000 + "]" * 200_000), "RecursionError"),
        "a long integer": (with_more("9" * 5000), "integer string conversion"),
        "a byte order mark": ("\ufeff".encode() + good.encode(), "BOM"),
        "UTF-16": (good.encode("utf-16"), "UnicodeDecodeError"),
        "invalid UTF-8": (with_more('"?"').replace(b"?", b"\xff"), "UnicodeDecodeError"),
        "a surrogate in UTF-8": (with_more('"?"').replace(b"?", b"\xed\xa0\x80"), "UnicodeDecodeError"),
        "zeros": (bytes(4096), "JSONDecodeError"),
        "one byte too many": (good.encode().ljust(tables.MOST_BYTES + 1), "more than 1048576 bytes"),
        "of another": (json.dumps(_good(kind, gpu="another\nGPU")).encode(), r"it is of 'another\nGPU'"),
        "of a lone surrogate": (json.dumps(_good(kind, gpu="\ud800")).encode(), r"it is of '\ud800'"),
        "of a long name": (json.dumps(_good(kind, gpu="a" * 10**6)).encode(), "it is of 'aaa"),
        "of a list": (json.dumps(_good(kind, gpu=[GPU])).encode(), "it is of ["),
    }


@pytest.mark.parametrize("name", _contents("launch"))
@pytest.mark.parametrize("kind", FIND)
def test_a_file_that_is_no_table(kind: str, name: str) -> None:
    content, reason = _contents(kind)[name]
    tables.cache_file(kind, GPU).write_bytes(content)
    assert reason in _ignored(kind)


@pytest.mark.parametrize("kind", FIND)
def test_a_table_of_the_largest_size_is_used(kind: str) -> None:
    table = _good(kind, note="lone \ud800")
    tables.cache_file(kind, GPU).write_bytes(json.dumps(table).encode().ljust(tables.MOST_BYTES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = FIND[kind](GPU)
    assert found == (table if kind == "balance" else shapes.shapes_of(table))


NO_NUMBERS = {
    "NaN": float("nan"), "inf": float("inf"), "-inf": -float("inf"), "-1": -1, "10^400": 10**400, "-10^400": -(10**400),
    "subnormal": 1e-320, "1e-300": 1e-300, "1e300": 1e300, "true": True, "false": False, "null": None, "string": "1",
    "list": [1], "object": {"a": 1},
}  # fmt: skip
NO_KERNELS = {
    "four numbers": [2, 128, 128, 64], "floats": [2.0, 128.0, 128.0, 64.0, 128.0], "NaN": [float("nan")] * 5,
    "booleans": [True] * 5, "strings": ["2", "128", "128", "64", "128"], "a string": "abcde", "null": None,
    "objects": [{}] * 5, "an object": dict.fromkeys("abcde", 1), "lists": [[2]] * 5,
}  # fmt: skip
# Of the table, and of each kernel.
NUMBERS = ("num_sms", "bandwidth_gb_s", "peak_gb_s", "softness", "split_us", "alone_us", "tile_us")


def _set(name: str, value: Any) -> dict[str, Any]:
    """A good table of constants but for this value."""
    table = _good("balance")
    for one in [table] if name in table else table["kernels"]:
        one[name] = value
    return table


def _constants() -> dict[str, tuple[dict[str, Any], str]]:
    """Tables of constants, and a part of the reason."""
    found = {f"{name} {what}": (_set(name, value), f"{name} must be a number from 1e-12 to 1e+12, got ")
             for name, (what, value) in itertools.product(NUMBERS, NO_NUMBERS.items())}  # fmt: skip
    for name in ("num_sms", "bandwidth_gb_s", "peak_gb_s", "softness", "alone_us"):
        found[f"{name} 0"] = _set(name, 0), f"{name} must be a number from 1e-12 to 1e+12, got 0"
    for value in (0.5, 17, 1e-11, 1e11):
        found[f"softness {value}"] = _set("softness", value), "softness must be from 1 to 16, got "
    # Every number can be divided; it is the quotients that are beyond what the search can do with.
    quotients = [("alone_us", 1e-11), ("alone_us", 1e9), ("tile_us", 1e9), ("split_us", 1e9)]
    for name, value in quotients:
        found[f"{name} {value}"] = _set(name, value), f"ValueError: {name} must be from "
    for name, value in [("num_sms", 1e-4), ("num_sms", 1e12), ("bandwidth_gb_s", 1e9), ("bandwidth_gb_s", 1e-9)]:
        found[f"{name} {value}"] = _set(name, value), "ValueError: alone_us must be from "
    table = _good("balance")
    table["kernels"][-1] |= {"alone_us": 1e9}
    found["one slow kernel"] = table, "ValueError: alone_us must be from "
    for what, kernel in {"a negative number": [-2, 128, 128, 64, 128], "a huge one": [2, 10**9, 128, 64, 128]}.items():
        found[f"kernel: {what}"] = _set("kernel", kernel), "the numbers of a kernel must be from 1 to 1024"
    for what, kernel in NO_KERNELS.items():
        found[f"kernel: {what}"] = _set("kernel", kernel), "a kernel must be [element size, head dim,"
    for what, kernels in {"none": [], "an object": {"a": 1}, "a string": "kernels", "null": None, "3": 3}.items():
        found[f"kernels: {what}"] = _good("balance", kernels=kernels), "kernels must be a list"
    for what, kernels in {"numbers": [1], "lists": [[2, 128]], "strings": ["a"], "null": [None]}.items():
        found[f"kernels: list of {what}"] = _good("balance", kernels=kernels), "TypeError"
    for name in NUMBERS:
        table = _good("balance")
        for one in [table] if name in table else table["kernels"]:
            del one[name]
        found[f"no {name}"] = table, f"KeyError: '{name}'"
    return found


CONSTANTS = _constants()
OTHER_KERNEL = {"headdim": 192, "num_heads": 16}  # one that is in no table


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_that_cannot_be_used(name: str) -> None:
    table, reason = CONSTANTS[name]
    tables.cache_file("balance", GPU).write_text(json.dumps(table))
    assert reason in _ignored("balance")


def test_no_hostile_table_stops_a_call_or_changes_it(device: torch.device) -> None:
    """With a measured kernel and with a scaled one, splits searched for and batch invariant; one of the four is run."""
    calls = [{"batch_invariant": invariant} | more for invariant in (True, False) for more in ({}, OTHER_KERNEL)]

    def plans() -> list[plan.LaunchPlan]:
        lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
        return [plan_call(DECODE | {"cache_seqlens": lengths} | call, device)[3] for call in calls]

    expected_plans, expected = plans(), [_schedule(device, **call) for call in calls]
    hostile = [content for content, _ in _contents("balance").values()]
    hostile += [json.dumps(table).encode() for table, _ in CONSTANTS.values()]
    for content, turn in zip(hostile, itertools.cycle(range(len(calls)))):
        tables.cache_file("balance", GPU).write_bytes(content)
        _forget()
        with pytest.warns(UserWarning, match="cannot be used and is ignored"):
            assert _schedule(device, **calls[turn]) == expected[turn], content[:200]
        assert plans() == expected_plans, content[:200]


def test_numbers_that_may_be_zero() -> None:
    for name in ("split_us", "tile_us"):
        balance.check_constants(_set(name, 0))
        balance.check_constants(_set(name, 0.0))


def _kernels_of_all_builds() -> set[tuple[int, int, int, int, int]]:
    kernels = set()
    for release in RELEASES:
        rules = rules_for(f"{release.package}-{release.newest}")
        for by_element_size in filter(None, (rules.sm90_tiles, rules.sm8x_tiles)):
            for element_size, tiles in by_element_size.items():
                for headdim, headdim_v in itertools.product((64, 96, 128, 192, 256), (64, 96, 128, 192, 256, 512)):
                    kernels |= {(element_size, headdim, headdim_v, block_m, block_n) for *_, block_m, block_n in tiles}
    return kernels


def test_the_bounds_hold_for_every_kernel() -> None:
    """A table at the edge of what is accepted is usable for all, on any number of SMs."""
    kernels, accepted = _kernels_of_all_builds(), 0
    for name, value in itertools.product(NUMBERS, [10.0**power for power in range(-12, 13)]):
        table = _set(name, value)
        try:
            balance.check_constants(table)
        except ValueError:
            continue
        accepted += 1
        for kernel, num_sms in itertools.product(kernels, (1, 132, 2000)):
            costs = balance.costs_from(table, kernel, num_sms, batch_invariant=True)
            for cost in (costs.tile, costs.per_split, *costs.block):
                assert cost == np.float32(cost)
            assert 0 <= costs.tile <= balance.MOST_COST
            assert 0 <= costs.per_split <= balance.MOST_COST
            assert 0 <= costs.alone <= 1.05
            assert sum(costs.block) == pytest.approx(1, abs=0.05)
            assert costs.fixed_blocks >= 1
    assert 30 < accepted < 140


@pytest.mark.parametrize("tile", [0.0, balance.MOST_COST])
@pytest.mark.parametrize("alone", [balance.LEAST_ALONE, balance.MOST_ALONE])
@pytest.mark.parametrize("per_split", [0.0, balance.MOST_COST])
def test_the_search_stays_finite_at_the_bounds(
    tile: float, alone: float, per_split: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = balance._cubic(alone, 3.0)
    costs = {invariant: balance.Costs(tile, block, per_split, balance._invariant_blocks(tile) if invariant else 0)
             for invariant in (False, True)}  # fmt: skip
    monkeypatch.setattr(plan, "costs_of", lambda problem, *_: costs[problem.batch_invariant])
    for lengths, heads in (([0], 8), (LENGTHS, 8), ([2**24 - 512] * 64, 1024), ([1] * 63 + [2**24 - 512], 16)):
        call = {
            "batch_size": len(lengths), "max_seqlen_q": 4, "max_seqlen_k": 2**24 - 512, "num_heads": heads,
            "num_heads_k": heads // 8, "cache_seqlens": torch.tensor(lengths, dtype=torch.int32, device=device),
        }  # fmt: skip
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            for invariant in (False, True):
                _schedule(device, **call, batch_invariant=invariant)


# ---- launch shapes ---------------------------------------------------------------------------------------------------

NO_SHAPES = {
    "no powers of two": [3, 4], "a slice beyond the group": [64, 4], "64 warps": [8, 64], "zero": [0, 4],
    "negative": [-8, 4], "booleans": [True, True], "floats": [8.0, 4.0], "NaN": [float("nan"), 4],
    "inf": [float("inf"), 4], "10^400": [10**400, 4], "strings": ["8", "4"], "a string": "84", "null": None,
    "an object": {"8": 1, "4": 1}, "one": [8], "three": [8, 4, 1], "lists": [[8], [4]], "a number": 8,
}  # fmt: skip


@pytest.mark.parametrize("shape", NO_SHAPES.values(), ids=NO_SHAPES.keys())
def test_launch_shapes_that_cannot_be_used(shape: Any) -> None:
    for way, group in (("fa3", "32"), ("balanced", "32")):
        table = _good("launch")
        table[way][group] = shape
        tables.cache_file("launch", GPU).write_text(json.dumps(table))
        _forget()
        assert "a shape for GROUP 32 must be two powers of two, up to 32 and 32, got " in _ignored("launch")


@pytest.mark.parametrize("way", [[], {}, None, "fa3", 3, [[8, 1]] * 7, {"32": [8, 1]}])
def test_a_launch_table_that_lacks_shapes(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.cache_file("launch", GPU).write_text(json.dumps(_good("launch", balanced=way)))
    assert _ignored("launch")
    monkeypatch.setattr(launch, "INTERPRETED", False)  # the launch shapes of a GPU
    slice_, num_warps = _shipped("launch", GPU)["balanced"]["32"]
    assert launch.launch_shape(4, True, True, GPU) == (slice_, 32, num_warps)


# ---- what is no file -------------------------------------------------------------------------------------------------


def _directory(path: pathlib.Path) -> None:
    path.mkdir()


def _loop(path: pathlib.Path) -> None:
    path.symlink_to(path.name)


def _dangling(path: pathlib.Path) -> None:
    path.symlink_to("nowhere")


def _device(path: pathlib.Path) -> None:
    path.symlink_to("/dev/null")


def _socket(path: pathlib.Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        # The name of a socket may have some 100 characters only.
        folder = os.open(path.parent, os.O_RDONLY)
        one.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)


def _cache_is_a_file(path: pathlib.Path) -> None:
    path.parent.rmdir()
    path.parent.write_text("")


@pytest.mark.parametrize(
    ("make", "reason"),
    [(_directory, "no regular file"), (_device, "no regular file"), (_socket, "no regular file"), (_loop, "OSError"),
     (_dangling, "FileNotFoundError"), (_cache_is_a_file, "NotADirectoryError")],
)  # fmt: skip
@pytest.mark.parametrize("kind", FIND)
def test_what_is_no_regular_file(kind: str, make: Callable[[pathlib.Path], None], reason: str) -> None:
    make(tables.cache_file(kind, GPU))
    assert reason in _ignored(kind)


@pytest.mark.parametrize("swapped", [False, True], ids=["", "put there between the look and the opening"])
def test_a_pipe_does_not_hang(swapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    path, hung = tables.cache_file("balance", GPU), []
    os.mkfifo(path)
    if swapped:
        really = os.stat
        monkeypatch.setattr(os, "stat", lambda one, **more: really(__file__ if str(one) == str(path) else one, **more))

    def end_the_wait() -> None:
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))  # fails where nobody reads
        except OSError:
            return
        hung.append(True)

    timer = threading.Timer(3, end_the_wait)
    timer.start()
    try:
        reason = _ignored("balance")
    finally:
        timer.cancel()
    assert not hung
    assert "no regular file" in reason


def test_what_is_no_regular_file_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening alone can do something: a pipe's writer goes on, a tape is rewound."""
    opened = []
    really = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **more: opened.append(path) or really(path, *rest, **more))
    _device(tables.cache_file("launch", GPU))
    _ignored("launch")
    assert str(tables.cache_file("launch", GPU)) not in map(str, opened)


@pytest.mark.parametrize("kind", FIND)
def test_a_file_that_may_not_be_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tables.cache_file(kind, GPU)
    tables.write_table(path, _good(kind))
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may
        really = os.open

        def refuse(opened: Any, *rest: Any, **more: Any) -> int:
            if str(opened) == str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return really(opened, *rest, **more)

        monkeypatch.setattr(os, "open", refuse)
    assert "PermissionError: [Errno 13] Permission denied" in _ignored(kind)


def test_links_are_followed(cache: pathlib.Path) -> None:
    tables.write_table(cache / "elsewhere.json", _good("balance", split_us=0.5))
    tables.cache_file("balance", GPU).symlink_to("elsewhere.json")
    assert balance.constants_of(GPU)["split_us"] == 0.5


# ---- writing ---------------------------------------------------------------------------------------------------------


def _write_often(path: pathlib.Path, writer: int) -> None:
    for turn in range(60):
        tables.write_table(path, {"writer": writer, "turn": turn, "values": [writer] * 500})


def _read_until(done: threading.Event, path: pathlib.Path) -> int:
    """The times that the table was read, whole each time."""
    times = 0
    while not done.is_set():
        if path.exists():
            table = json.loads(path.read_text())
            assert table["values"] == [table["writer"]] * 500
            times += 1
        time.sleep(0.001)
    return times


@pytest.mark.parametrize("writers", ["threads", "processes"])
def test_many_may_write_at_once(writers: str, cache: pathlib.Path) -> None:
    path, done = cache / "table.json", threading.Event()
    with ThreadPoolExecutor(9) as pool:
        reader = pool.submit(_read_until, done, path)
        try:
            if writers == "threads":
                for written in [pool.submit(_write_often, path, writer) for writer in range(8)]:
                    written.result()
            else:
                fork = multiprocessing.get_context("fork")
                processes = [fork.Process(target=_write_often, args=(path, writer)) for writer in range(3)]
                for process in processes:
                    process.start()
                for process in processes:
                    process.join()
                    assert process.exitcode == 0
        finally:
            done.set()
        assert reader.result() > 0
    assert json.loads(path.read_text())["turn"] == 59
    assert [one.name for one in cache.iterdir()] == ["table.json"]


def test_a_table_of_a_long_name(cache: pathlib.Path) -> None:
    path = cache / ("a" * 250 + ".json")
    tables.write_table(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_table_may_be_read_by_whom_the_umask_lets(cache: pathlib.Path) -> None:
    before = os.umask(0o027)
    try:
        tables.write_table(cache / "table.json", {"a": 1})
    finally:
        os.umask(before)
    assert stat.S_IMODE((cache / "table.json").stat().st_mode) == 0o640


def test_a_failed_write_leaves_nothing(cache: pathlib.Path) -> None:
    (cache / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        tables.write_table(cache / "folder", {"a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        tables.write_table(cache / "table.json", {"a": object()})
    tables.write_table(cache / "table.json", {"a": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # the disk is full
    try:
        with pytest.raises(OSError, match="File too large"):
            tables.write_table(cache / "table.json", {"a": "b" * 100_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert json.loads((cache / "table.json").read_text()) == {"a": 1}
    assert sorted(one.name for one in cache.iterdir()) == ["folder", "table.json"]
