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
from fa3_metadata.tools import balance_fit, cli, tune
from fa3_metadata.tools.balance_fit import ATTENTIONS, Attention, Batch
from fa3_metadata.triton_kernels import balance, shapes, tables
from fa3_metadata.triton_kernels.problem import DEFAULT_GPU
from fa3_metadata.triton_kernels.reference import Lengths, reference_metadata

from .conftest import HAS_GPU

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


def test_an_h100_has_derived_constants() -> None:
    ours, theirs = balance.constants_of(DEFAULT_GPU), balance.constants_of(H100)
    balance.check_constants(ours)
    balance.check_constants(theirs)
    assert "not measured" in theirs["note"]
    assert theirs["bandwidth_gb_s"] == pytest.approx(ours["bandwidth_gb_s"] * 3350 / 4800, rel=1e-3)
    for one, other in zip(ours["kernels"], theirs["kernels"], strict=True):
        scaled = round(one["shared_us"] * 4800 / 3350, 3)
        assert other == one | {"shared_us": scaled}


@pytest.mark.parametrize("gpu", [DEFAULT_GPU, H100, "NVIDIA Unheard"])
def test_a_tuned_table_wins(gpu: str, cache: pathlib.Path) -> None:
    tables.write_table(tables.cache_file("launch", gpu), _launch_json(gpu))
    table = balance.constants_of(DEFAULT_GPU) | {"gpu": gpu, "per_split_us": 0.5}
    tables.write_table(tables.cache_file("balance", gpu), table)
    assert sorted(path.name for path in cache.iterdir()) == [
        f"{kind}-{'-'.join(gpu.lower().split())}.json" for kind in ("balance", "launch")
    ]
    _forget()
    assert shapes.shipped_shapes(gpu).find(512, True, False) == (2, 8)
    assert balance.constants_of(gpu)["per_split_us"] == 0.5
    other = "NVIDIA Unheard" if gpu == DEFAULT_GPU else DEFAULT_GPU
    assert shapes.shipped_shapes(other).gpu == DEFAULT_GPU
    assert balance.constants_of(other)["per_split_us"] != 0.5


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

KNOWN = {  # shared_us, alone_us, tile_us
    "bf16, head dim 128": (1.865, 1.164, 2.66),
    "bf16, head dim 128, 16 queries": (1.916, 1.0, 1.76),
    "bf16, head dim 64": (1.461, 1.14, 1.2),
    "bf16, head dim 256": (2.784, 1.76, 2.31),
    "bf16, MLA 64/512": (2.05, 1.467, 8.99),
    "e4m3, head dim 128": (0.848, 0.77, 2.03),
}


class ModelTimer:
    """Times as balance.py's model has them; every `noisy`-th is disturbed."""

    def __init__(self, num_sms: int, noisy: int = 0) -> None:
        self.num_sms, self.noisy, self.broken = num_sms, noisy, ""

    def __call__(self, attention: Attention, batches: Sequence[Batch]) -> list[float]:
        if attention.name == self.broken:
            raise RuntimeError("no kernel\nfor this")
        times = [self._time(*KNOWN[attention.name], batch) for batch in batches]
        return [t + 0.4 * (self.noisy > 0 and i % self.noisy == 2) for i, t in enumerate(times)]

    def _time(self, shared: float, alone: float, tile: float, batch: Batch) -> float:
        assert batch.splits <= batch.bound
        assert batch.blocks % batch.splits == 0
        waves, rest = divmod(batch.tiles, self.num_sms)
        assert waves == 0 or rest == 0  # a part of a wave would tell little
        busy = min(batch.tiles / self.num_sms, 1)
        block = alone + (shared - alone) * busy**3
        return 6.5 + max(waves, 1) * (tile + batch.blocks_of_a_tile * block) + 0.09 * batch.splits


def _fit(timer: ModelTimer, build: str = BUILD) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    return balance_fit.fit_table("GPU", timer.num_sms, {"date": "today"}, build, timer, said.append), said


@pytest.mark.parametrize("num_sms", [132, 114, 78, 131, 60])
def test_the_fit_recovers_the_constants(num_sms: int) -> None:
    table, _ = _fit(ModelTimer(num_sms))
    balance.check_constants(table)
    assert list(table) == ["gpu", "num_sms", "bandwidth_gb_s", "measured", "per_split_us", "kernels"]
    assert table["per_split_us"] == pytest.approx(0.09, abs=2e-4)
    for one, (shared, alone, tile) in zip(table["kernels"], KNOWN.values(), strict=True):
        assert (one["shared_us"], one["alone_us"]) == pytest.approx((shared, alone), abs=2e-3)
        assert one["tile_us"] == pytest.approx(tile, abs=0.02)


def test_the_fit_names_the_kernels_of_the_shipped_table() -> None:
    table, said = _fit(ModelTimer(132))
    shipped = balance.constants_of(DEFAULT_GPU)
    assert [one["kernel"] for one in table["kernels"]] == [one["kernel"] for one in shipped["kernels"]]
    assert table["bandwidth_gb_s"] == pytest.approx(shipped["bandwidth_gb_s"], rel=0.05)
    assert any("a tile an SM, us by its blocks" in line for line in said)


def test_the_fit_bears_noise() -> None:
    for one, (shared, alone, tile) in zip(_fit(ModelTimer(132, 7))[0]["kernels"], KNOWN.values(), strict=True):
        assert (one["shared_us"], one["alone_us"]) == pytest.approx((shared, alone), rel=0.02)
        assert one["tile_us"] == pytest.approx(tile, abs=0.3)


def test_a_kernel_that_fails_is_skipped() -> None:
    timer = ModelTimer(132)
    timer.broken = "bf16, head dim 256"
    table, said = _fit(timer)
    assert len(table["kernels"]) == len(ATTENTIONS) - 1
    assert "skipped   bf16, head dim 256: no kernel for this" in said


def test_a_kernel_is_fitted_once() -> None:
    table, said = _fit(ModelTimer(132), "flash-attn-3-3.0.0")
    keys = [tuple(one["kernel"]) for one in table["kernels"]]
    assert len(set(keys)) == len(keys) == len(ATTENTIONS) - 1
    assert "skipped   bf16, head dim 128, 16 queries: the kernel [2, 128, 128, 128, 128] again" in said


def test_times_that_say_nothing() -> None:
    said: list[str] = []

    def flat(_: Attention, batches: Sequence[Batch]) -> list[float]:
        return [10.0] * len(batches)

    with pytest.raises(RuntimeError, match="no kernel could be measured"):
        balance_fit.fit_table("GPU", 132, {}, BUILD, flat, said.append)
    assert said == [f"skipped   {one.name}: longer sequences do not take longer" for one in ATTENTIONS]


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
    short, long = timer(ATTENTIONS[0], [Batch(1, 16), Batch(1, 64)])
    assert 3 < short < long < 1000
    assert gpu_name(torch.device("cuda")) == torch.cuda.get_device_name()
