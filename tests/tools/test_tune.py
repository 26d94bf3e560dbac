"""`fa3-metadata tune` and the tables it writes: no GPU is needed, times come from the model itself."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from fa3_metadata.api import plan_call
from fa3_metadata.arguments import gpu_name
from fa3_metadata.installed import installed_version
from fa3_metadata.schedules import load_launch
from fa3_metadata.tools import balance_check, balance_fit, cli, layer_timer, tune
from fa3_metadata.tools.balance_fit import ATTENTIONS, Attention, Batch, Constants, kernel_of, layer_us
from fa3_metadata.triton_kernels import balance, shapes, tables
from fa3_metadata.triton_kernels.problem import DEFAULT_GPU
from fa3_metadata.triton_kernels.reference import Lengths, reference_metadata

from ..conftest import HAS_GPU

BUILD = "sglang-kernel-0.4.2"
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """An empty cache folder, and nothing remembered of another."""
    monkeypatch.setenv("FA3_METADATA_CACHE", str(tmp_path / "cache"))
    _forget()
    yield tmp_path / "cache"
    _forget()


def _forget() -> None:
    shapes.shipped_shapes.cache_clear()
    balance.constants_of.cache_clear()


def _launch_json(gpu: str, shape: Any = (2, 8)) -> dict[str, Any]:
    names = [*map(str, shapes.GROUPS), "many"]
    return {"gpu": gpu} | {way: dict.fromkeys(names, shape) for way in ("fa3", "balanced")}


# ---- tables ----------------------------------------------------------------------------------------------------------


def shipped(way: str, group: int | str) -> tuple[int, int]:
    path = pathlib.Path(str(shapes.__file__)).with_name("launch_h200.json")
    return tuple(json.loads(path.read_text())[way][str(group)])


def test_every_shape_of_an_h200() -> None:
    found = shapes.shipped_shapes(DEFAULT_GPU)
    for balanced, way in ((False, "fa3"), (True, "balanced")):
        for group in shapes.GROUPS:
            assert found.find(group, balanced, False) == shipped(way, group)
        assert found.find(1024, balanced, True) == shipped(way, "many")


def test_an_untuned_gpu_has_an_h200s() -> None:
    assert shapes.shipped_shapes("NVIDIA Unheard").gpu == DEFAULT_GPU
    assert balance.constants_of("NVIDIA Unheard")["gpu"] == DEFAULT_GPU


@pytest.mark.parametrize("gpu", [DEFAULT_GPU, H100, "NVIDIA Unheard"])
def test_a_tuned_table_wins(gpu: str, cache: pathlib.Path) -> None:
    tables.write_table(tables.cache_file("launch", gpu), _launch_json(gpu))
    table = balance.constants_of(DEFAULT_GPU) | {"gpu": gpu, "split_us": 0.5}
    tables.write_table(tables.cache_file("balance", gpu), table)
    assert sorted(path.name for path in cache.iterdir()) == [
        f"{kind}-{'-'.join(gpu.lower().split())}.json" for kind in ("balance", "launch")
    ]
    _forget()
    assert shapes.shipped_shapes(gpu).find(512, True, False) == (2, 8)
    assert balance.constants_of(gpu)["split_us"] == 0.5
    other = "NVIDIA Unheard" if gpu == DEFAULT_GPU else DEFAULT_GPU
    assert shapes.shipped_shapes(other).gpu == DEFAULT_GPU
    assert balance.constants_of(other)["split_us"] != 0.5


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    assert tables.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("FA3_METADATA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tables.cache_folder() == tmp_path / "xdg" / "fa3_metadata"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tables.cache_folder() == tmp_path / ".cache" / "fa3_metadata"


def test_without_a_home_folder_the_shipped_tables_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> pathlib.Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FA3_METADATA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", homeless)
    assert shapes.shipped_shapes(DEFAULT_GPU).find(32, False, False) == shipped("fa3", 32)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", json.dumps(_launch_json("another")), json.dumps(_launch_json(DEFAULT_GPU, (3, 4))),
     json.dumps(_launch_json(DEFAULT_GPU, (64, 4))), json.dumps(_launch_json(DEFAULT_GPU, "44")),
     json.dumps(_launch_json(DEFAULT_GPU) | {"balanced": {"32": [4, 4]}})],
)  # fmt: skip
def test_a_tuned_table_that_cannot_be_used_is_left_out(text: str, cache: pathlib.Path) -> None:
    cache.mkdir()
    (cache / "launch-nvidia-h200.json").write_text(text)
    with pytest.warns(UserWarning, match=r"launch-nvidia-h200\.json cannot be used and is ignored"):
        assert shapes.shipped_shapes(DEFAULT_GPU).find(32, False, False) == shipped("fa3", 32)


def test_the_text_of_a_table_is_json() -> None:
    for gpu in (DEFAULT_GPU, H100):
        table = balance.constants_of(gpu)
        assert json.loads(tables.table_text(table)) == table
        assert max(map(len, tables.table_text(table).splitlines())) < 250


# ---- fit -------------------------------------------------------------------------------------------------------------

KNOWN = {  # alone_us, tile_us
    "bf16, head dim 128": (1.08, 1.6),
    "bf16, head dim 128, 16 queries": (1.45, 3.2),
    "bf16, head dim 64": (1.3, 0.6),
    "bf16, head dim 256": (1.6, 2.1),
    "bf16, MLA 64/512": (1.55, 4.0),
    "e4m3, head dim 128": (0.82, 0.8),
}
BANDWIDTH, SPLIT = 4000.0, 0.09


class LawTimer:
    """Times as the law has them; every `noisy`-th is disturbed."""

    def __init__(self, num_sms: int, noisy: int = 0) -> None:
        self.num_sms, self.noisy, self.broken, self.seen = num_sms, noisy, "", list[Batch]()

    def __call__(self, attention: Attention, batches: Sequence[Batch]) -> list[float]:
        if attention.name == self.broken:
            raise RuntimeError("no kernel\nfor this")
        self.seen += batches
        times = [self._time(attention, batch) for batch in batches]
        return [t * (1 + 0.03 * (self.noisy > 0 and i % self.noisy == 2)) for i, t in enumerate(times)]

    def _time(self, attention: Attention, batch: Batch) -> float:
        assert max(batch.splits) <= batch.bound
        assert sum(batch.tiles) == sum(batch.blocks)
        constants = Constants(BANDWIDTH, SPLIT, 6.5, *KNOWN[attention.name])
        return layer_us(batch, kernel_of(attention, BUILD), self.num_sms, constants)


def _fit(timer: LawTimer, build: str = BUILD) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    return balance_fit.fit_table("GPU", timer.num_sms, {"date": "today"}, build, timer, said.append), said


@pytest.mark.parametrize("num_sms", [132, 114, 78])
def test_the_fit_recovers_the_constants(num_sms: int) -> None:
    table, said = _fit(LawTimer(num_sms))
    balance.check_constants(table)
    assert list(table) == [
        "gpu", "num_sms", "bandwidth_gb_s", "peak_gb_s", "measured", "softness", "split_us", "kernels",
    ]  # fmt: skip
    assert table["bandwidth_gb_s"] == pytest.approx(BANDWIDTH, rel=1e-2)
    assert table["split_us"] == pytest.approx(SPLIT, rel=2e-2)
    for one, known in zip(table["kernels"], KNOWN.values(), strict=True):
        assert (one["alone_us"], one["tile_us"]) == pytest.approx(known, rel=2e-2)
    assert any("a tile an SM, us by its blocks" in line for line in said)


def test_the_fit_names_the_kernels_of_the_shipped_tables() -> None:
    table, _ = _fit(LawTimer(132))
    for gpu in (DEFAULT_GPU, H100):
        shipped = balance.constants_of(gpu)
        assert [one["kernel"] for one in table["kernels"]] == [one["kernel"] for one in shipped["kernels"]]


def test_the_fit_bears_noise() -> None:
    table, _ = _fit(LawTimer(132, 7))
    assert table["bandwidth_gb_s"] == pytest.approx(BANDWIDTH, rel=0.05)
    for one, (alone, tile) in zip(table["kernels"], KNOWN.values(), strict=True):
        assert one["alone_us"] == pytest.approx(alone, rel=0.03)
        assert one["tile_us"] == pytest.approx(tile, rel=0.2, abs=0.4)


def test_a_kernel_that_fails_is_skipped() -> None:
    timer = LawTimer(132)
    timer.broken = "bf16, head dim 256"
    table, said = _fit(timer)
    assert len(table["kernels"]) == len(ATTENTIONS) - 1
    assert "skipped   bf16, head dim 256: no kernel for this" in said


def test_a_kernel_is_fitted_once() -> None:
    table, said = _fit(LawTimer(132), "flash-attn-3-3.0.0")
    keys = [tuple(one["kernel"]) for one in table["kernels"]]
    assert len(set(keys)) == len(keys) == len(ATTENTIONS) - 1
    assert "skipped   bf16, head dim 128, 16 queries: the kernel [2, 128, 128, 128, 128] again" in said


@pytest.mark.parametrize("time", [10.0, float("nan"), -1.0, 0.0])
def test_times_that_say_nothing(time: float) -> None:
    said: list[str] = []
    with pytest.raises(RuntimeError, match="no kernel could be measured"):
        balance_fit.fit_table("GPU", 132, {}, BUILD, lambda _, some: [time] * len(some), said.append)
    assert said == [f"skipped   {one.name}: longer sequences do not take longer" for one in ATTENTIONS]


def test_the_law_by_hand() -> None:
    """Three tiles on two SMs: 4 and 3 blocks start, 2 follow where 3 end; what is left of them runs alone."""
    batch, kernel = Batch((4, 3, 2), (1, 1, 1)), (2, 128, 128, 64, 128)
    c = Constants(bandwidth_gb_s=65.536, split_us=0.25, launch_us=5, alone_us=1.0, tile_us=0.0)  # shared_us = 2
    together, alone = 9 ** (1 / 3), 2 ** (1 / 3)
    assert layer_us(batch, kernel, 2, c) == pytest.approx(4 * together + 1 * alone + 5 + 0.25)


# ---- the check -------------------------------------------------------------------------------------------------------


def _table(**changes: Any) -> dict[str, Any]:
    """What the fit would find for LawTimer's card, but for some numbers."""
    names = zip(KNOWN, balance.constants_of(DEFAULT_GPU)["kernels"], strict=True)
    kernels = [{"kernel": one["kernel"], "alone_us": KNOWN[n][0], "tile_us": KNOWN[n][1]} for n, one in names]
    return {
        "gpu": "GPU", "num_sms": 132, "bandwidth_gb_s": BANDWIDTH, "peak_gb_s": BANDWIDTH, "measured": {},
        "softness": 3.0, "split_us": SPLIT, "kernels": kernels,
    } | changes  # fmt: skip


def test_the_check_knows_which_constants_are_better() -> None:
    right, wrong = _table(), _table(bandwidth_gb_s=BANDWIDTH * 20, split_us=3.0)
    better = balance_check.check(right, wrong, 132, BUILD, LawTimer(132))
    assert better.is_better
    assert not balance_check.check(wrong, right, 132, BUILD, LawTimer(132)).is_better
    assert len(better.checked) == len(ATTENTIONS) * len(balance_check.check_lengths(132))
    *_, to_fa3, to_used = better.lines()
    assert to_fa3.startswith("the new constants' time by that of \"FA3's rule\": 0.")
    assert to_used.startswith("the new constants' time by that of 'in use': 0.")


def test_the_same_constants_are_no_better() -> None:
    verdict = balance_check.check(_table(), _table(), 132, BUILD, LawTimer(132))
    assert not verdict.is_better
    assert all(one.times["in use"] == one.times["new"] for one in verdict.checked)


def test_better_on_the_whole_but_clearly_worse_somewhere() -> None:
    def verdict(worst: float, in_use: float = 10.0) -> balance_check.Verdict:
        times = [(10.0, 10.0, 8.0)] * 9 + [(10.0, in_use, worst)]
        return balance_check.Verdict([
            balance_check.Checked(str(i), dict(zip(balance_check.RULES, one, strict=True)))
            for i, one in enumerate(times)
        ])  # fmt: skip

    assert verdict(10.2).is_better
    assert not verdict(10.4).is_better
    assert not verdict(10.4, 10.3).is_better  # worse than FA3, and than what is in use
    assert verdict(10.4, 10.4).is_better
    assert not balance_check.Verdict([]).is_better


def test_the_check_is_not_what_was_fitted() -> None:
    timer = LawTimer(132)
    table, _ = _fit(timer)
    fitted = set(timer.seen)
    timer.seen.clear()
    balance_check.check(table, _table(), 132, BUILD, timer)
    assert {batch.blocks for batch in timer.seen}.isdisjoint(batch.blocks for batch in fitted)


# ---- launch shapes ---------------------------------------------------------------------------------------------------


def test_the_search_finds_another_best_shape() -> None:
    asked: list[tuple[int, bool, tuple[int, int]]] = []

    def timer(batch_size: int, balanced: bool, some: Sequence[tuple[int, int]]) -> dict[tuple[int, int], float]:
        assert len(set(some)) == len(some) > 1  # of one, triton.autotune would measure nothing
        asked.extend((batch_size, balanced, shape) for shape in some)
        best = (16, 1) if balanced else (2, 8)

        def steps(shape: tuple[int, int]) -> int:
            return sum(abs(a.bit_length() - b.bit_length()) for a, b in zip(shape, best, strict=True))

        return {shape: 1 + 0.1 * steps(shape) for shape in some}

    said: list[str] = []
    table = tune.launch_table("GPU", {"date": "today"}, timer, said.append)
    found = shapes.shapes_of(json.loads(tables.table_text(table)))
    for group in shapes.GROUPS:
        assert (found.find(group, False, False), found.find(group, True, False)) == ((2, 8), (16, 1))
    assert (found.find(1024, False, True), found.find(1024, True, True)) == ((2, 8), (16, 1))
    assert len(set(asked)) < 250
    assert {batch_size for batch_size, _, _ in asked} == {32, 64, 128, 256, 512, 992, 4096}
    assert len(said) == 15


def test_the_search_moves_only_for_a_clear_gain() -> None:
    start = shapes.shipped_shapes(DEFAULT_GPU)
    table = tune.launch_table(
        "GPU", {}, lambda _, __, some: {shape: 1 - 0.01 * (shape == (8, 8)) for shape in some}, lambda _: None
    )
    found = shapes.shapes_of(table)
    assert all(
        found.find(group, balanced, False) == start.find(group, balanced, False)
        for group in shapes.GROUPS
        for balanced in (False, True)
    )


@pytest.mark.parametrize("policy", ["fa3", "balanced"])
def test_autotune_launches_every_shape_and_each_writes_the_same(policy: str, device: torch.device) -> None:
    lengths = torch.randint(1, 9000, (37,), generator=torch.Generator().manual_seed(1)).to(device, torch.int32)
    arguments = {
        "batch_size": 37, "max_seqlen_q": 1, "max_seqlen_k": 9000, "num_heads": 8, "num_heads_k": 1, "headdim": 128,
        "cache_seqlens": lengths, "page_size": 50, "causal": True, "num_splits": 32, "policy": policy, "build": BUILD,
    }  # fmt: skip
    tensors, problem, _, plan = plan_call(arguments)
    assert tensors is not None
    out = torch.empty(plan.layout.size, dtype=torch.int32, device=device)
    expected = reference_metadata(problem, plan, Lengths(lengths.cpu().numpy())).tolist()
    times = iter((5.0, 3.0, 4.0))

    def bench(launch: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
        out.fill_(-1)
        launch()
        assert out.tolist() == expected
        return [next(times)] * len(quantiles)

    shapes_tried = [(1, 1), (8, 2), (32, 8)]
    found = load_launch(device).metadata_launch(problem, plan).autotune(shapes_tried, bench, (out,), tensors.pointers())
    assert found == dict(zip(shapes_tried, (5.0, 3.0, 4.0), strict=True))
    assert out.tolist() == expected


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
@pytest.mark.parametrize("what", ["balance", "launch"])
def test_without_a_gpu(what: str, capsys: pytest.CaptureFixture[str], cache: pathlib.Path) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["tune", what])
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"fa3-metadata: error: tune {what} measures a CUDA GPU: there is none here\n"
    assert not cache.exists()


@pytest.mark.parametrize("asked", [None, "folder/table.json"])
def test_what_is_written_is_used(
    asked: str | None, cache: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "gpu_name", lambda _: "NVIDIA Unheard")
    monkeypatch.setattr(tune, "device_facts", lambda *_: (90, 132))
    monkeypatch.setattr(
        tune, "time_launches", lambda _, __, some: {shape: abs(shape[0] - 2) + 0.1 * shape[1] for shape in some}
    )
    out = None if asked is None else tmp_path / asked
    said: list[str] = []
    tune.run(argparse.Namespace(what="launch", out=out), said.append)
    assert said[-1] == f"written to {out or cache / 'launch-nvidia-unheard.json'}"
    if out is None:
        assert shapes.shipped_shapes("NVIDIA Unheard").find(256, False, False) == (2, 1)
        assert [path.name for path in cache.iterdir()] == ["launch-nvidia-unheard.json"]
    else:
        table = json.loads(out.read_text())
        assert table["gpu"] == "NVIDIA Unheard"
        assert {"torch", "date"} <= set(table["measured"])


@pytest.mark.parametrize("known", ["the constants in use", "others"])
def test_only_a_better_table_is_written(known: str, cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = "NVIDIA Unheard"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "gpu_name", lambda _: gpu)
    monkeypatch.setattr(tune, "device_facts", lambda *_: (90, 132))
    monkeypatch.setattr("fa3_metadata.installed.load_forward", lambda _: None)
    monkeypatch.setattr(layer_timer, "LayerTimer", lambda _: LawTimer(132))
    in_use = _table() if known == "the constants in use" else _table(bandwidth_gb_s=BANDWIDTH * 20, split_us=3.0)
    monkeypatch.setattr(tune, "constants_of", lambda _: in_use)
    said: list[str] = []
    # The forward's device is a GPU: plans are made for the CPU here.
    monkeypatch.setattr(tune, "fit_table", lambda *args: balance_fit.fit_table(*args[:-1]))
    monkeypatch.setattr(tune, "check", lambda *args: balance_check.check(*args[:-1]))
    tune.run(argparse.Namespace(what="balance", out=None, build=BUILD), said.append)
    if known == "others":
        assert said[-1] == f"written to {cache / 'balance-nvidia-unheard.json'}"
        assert balance.constants_of(gpu)["bandwidth_gb_s"] == pytest.approx(BANDWIDTH, rel=0.01)
    else:
        assert said[-1].startswith("kept the constants in use, of GPU: ")
        assert not cache.exists()
    assert any("geometric mean" in line for line in said)


@pytest.mark.gpu
def test_a_launch_is_timed() -> None:
    found = tune.time_launches(32, True, [(4, 1), (8, 1)])
    assert list(found) == [(4, 1), (8, 1)]
    assert all(0.3 < time < 100 for time in found.values())


@pytest.mark.gpu
def test_a_layer_is_timed() -> None:
    if not installed_version("sglang-kernel"):
        pytest.skip("sglang-kernel is not installed")
    from fa3_metadata.tools.layer_timer import LayerTimer

    timer = LayerTimer(f"sglang-kernel-{installed_version('sglang-kernel')}", rounds=5)
    short, long = timer(ATTENTIONS[0], [Batch.even(1, 16), Batch.even(1, 64)])
    assert 3 < short < long < 1000
    assert gpu_name(torch.device("cuda")) == torch.cuda.get_device_name()
