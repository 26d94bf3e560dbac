"""What `python -m bench vllm-check` and `vllm-decode` do around a vLLM, without one."""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fa3_metadata.engines import vllm as adapter

from bench import __main__ as command
from bench import vllm_check, vllm_decode
from bench.vllm_decode import METRICS, STEPS, VARIANTS, Decoder, Way
from bench.vllm_model import CONFIG, make_model, windows_of

THEIRS, OURS = "void flash::prepare_varlen_num_blocks_kernel<1>", "prepare_varlen_num_blocks_kernel"
LLAMA, WINDOWS = vllm_check.SETTINGS[:2]


@pytest.mark.parametrize("name", ["vllm-check", "vllm-decode"])
def test_without_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([name]) == 2
    assert capsys.readouterr().err == f"{name} needs a Hopper GPU and vLLM: no CUDA GPU\n"


def test_a_models_config(tmp_path: pathlib.Path) -> None:
    assert windows_of(4, (None,)) == {}
    windows = windows_of(3, (127, None))
    assert windows == {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 128,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"windows must be of one width besides None, got \(127, 63\)"):
        windows_of(2, (127, 63))
    make_model(tmp_path / "model", {"hidden_size": 64} | windows)
    assert json.loads((tmp_path / "model/config.json").read_text()) == CONFIG | {"hidden_size": 64} | windows


def test_the_batches_of_the_check_shrink_and_grow() -> None:
    sizes: list[int] = []
    for group in vllm_check.requests():
        waiting, running = [tokens for _, tokens in group], list[int]()
        while waiting or running:
            while waiting and len(running) < vllm_check.MOST:
                running.append(waiting.pop(0))
            sizes.append(len(running))
            running = [left - 1 for left in running if left > 1]
    assert len(sizes) >= 384
    assert {min(sizes), max(sizes)} == {1, vllm_check.MOST}
    assert sum(one < other for one, other in itertools.pairwise(sizes)) >= 4
    assert sum(one > other for one, other in itertools.pairwise(sizes)) >= 10
    last = vllm_check.requests()[-1]
    assert len(last) == vllm_check.MOST
    assert all(tokens > vllm_check.PROFILED.stop for _, tokens in last)


def found(*digests: str, kernels: dict[str, float] | None = None) -> dict[str, Any]:
    return {"digests": list(digests), "batches": [1, 3], "kernels": kernels or {}, "used": True}


def test_what_is_not_as_it_must_be() -> None:
    without = found("a", "b", kernels={THEIRS: 1.0, "gemm": 7.0})
    ours = found("a", "b", kernels={OURS: 1.0, "gemm": 7.0})
    assert vllm_check.metadata_kernels({THEIRS: 6.0, OURS: 2.0, "layer_groups_kernel": 1.0, "gemm": 3.0}) == (6, 3)
    assert vllm_check.problems(LLAMA, "none", without, without) == []
    assert vllm_check.problems(LLAMA, "attached", ours, without) == []
    assert len(vllm_check.problems(WINDOWS, "attached", ours, without)) == 1, "two kinds of layers"
    assert len(vllm_check.problems(LLAMA, "in place", without, without)) == 1, "vLLM's own kernel"
    said = vllm_check.problems(LLAMA, "attached", found("a", "c", kernels={OURS: 1.0}), without)
    assert said == ["logits differ from those without us in 1 steps, first [1]"]
    assert vllm_check.problems(LLAMA, "attached", found("a", kernels={OURS: 1.0}), without)
    row = vllm_check.line(LLAMA, "attached", ours)
    assert row.split() == ["llama,", "full", "graphs", "attached", "2", "1", "to", "3", "2", "8.0", "0.0", "1.0"]
    assert len(row) == len(vllm_check.HEADER)


def test_a_check_prints_and_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(setting: vllm_check.Setting, variant: str, folder: pathlib.Path) -> Any:
        assert (folder / f"{setting.name} {variant}/config.json").exists()
        if setting is WINDOWS and variant == "in place":
            return "no kernel image"
        return found("a", kernels={THEIRS if variant == "none" else OURS: float(setting.kinds)})

    monkeypatch.setattr(vllm_check, "run", run)
    monkeypatch.setattr(vllm_check, "why_not", lambda: None)
    assert vllm_check.main(["--setting", "llama"]) == 0
    assert "WRONG" not in capsys.readouterr().out
    assert vllm_check.main(["--setting", ", full graphs"]) == 1
    assert "in place   failed:\nno kernel image" in capsys.readouterr().out
    assert vllm_check.main(["--setting", "no such"]) == 2
    assert "--setting must be part of one of" in capsys.readouterr().err


class FakeEngine:
    """One whose requests are prefilled in two steps; each step of the whole batch is noted in the way it goes."""

    def __init__(self) -> None:
        self.builders = [SimpleNamespace(aot_schedule=True, aot_sliding_window=(-1, -1), max_num_splits=32)]
        self.scheduler = SimpleNamespace(running=[])
        core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=self.scheduler))
        self.llm = SimpleNamespace(llm_engine=Stepping(self, core))
        self.decoder: Any = None
        self.log: list[tuple[str, bool | None]] = []

    def generate(self, requests: list[tuple[int, int]], seed: int) -> None:
        self.scheduler.running = [SimpleNamespace(num_computed_tokens=0, num_prompt_tokens=n) for n, _ in requests]
        for _ in range(requests[0][1]):
            self.llm.llm_engine.step()

    def own_step(self) -> None:
        decoder = self.decoder
        self.log.append((decoder.way.variant, decoder.is_busy if decoder.is_timed else None))
        for metric in (("graph", "step") if decoder.is_busy else ("idle", "host")) if decoder.is_timed else ():
            decoder.way.times[metric].append(float(len(self.log)))
        for one in self.scheduler.running:
            one.num_computed_tokens += one.num_prompt_tokens / 2


class Stepping:
    def __init__(self, engine: FakeEngine, core: Any) -> None:
        self.engine, self.engine_core = engine, core

    def step(self) -> None:
        self.engine.own_step()


def decoder_of(engine: FakeEngine) -> Decoder:
    made = Decoder.__new__(Decoder)
    engine.decoder = made
    vars(made).update(engine=engine, runner=SimpleNamespace(cudagraph_manager=SimpleNamespace(graphs=None)))
    vars(made).update(chosen=[(True, (-1, -1))], attached=None, way=None, is_busy=False, is_timed=False)
    made.ways = {32: [Way(variant, 32, {capture: variant}) for capture in (1, 2) for variant in VARIANTS]}
    return made


def test_ways_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def attach(**how: Any) -> Any:
        events.append(f"attach {how}")
        return SimpleNamespace(detach=lambda: events.append("detach"))

    monkeypatch.setattr(adapter, "attach", attach)
    engine = FakeEngine()
    decoder = decoder_of(engine)
    ways = decoder.measure((10, 20), 32, rounds=2)
    assert "step" not in vars(engine.llm.llm_engine), "the engine's own again"
    assert engine.log[:2] == [("none", None), ("none", None)], "prefills"
    turns = [name for name, timed in engine.log[2:] if timed is None][: 4 * len(VARIANTS)]
    assert turns == [*VARIANTS, *VARIANTS, *reversed(VARIANTS), *reversed(VARIANTS)]
    assert [timed for _, timed in engine.log[2 : 2 * STEPS + 3]] == [None] + [True] * STEPS + [False] * STEPS
    assert all(len(way.times[metric]) == 2 * STEPS for way in ways for metric in METRICS)
    times = vllm_decode.times_of(ways)
    assert list(times) == list(METRICS)
    assert {name: len(captures) for name, captures in times["step"].items()} == dict.fromkeys(VARIANTS, 2)
    ways[3].times["step"] = []
    assert list(vllm_decode.times_of(ways)) == ["graph", "idle", "host"], "the host is too slow"
    assert events.count("attach {'in_place': True, 'policy': 'balanced'}") == 4
    assert events.count("detach") >= events.count("attach {}")
    monkeypatch.setattr(engine, "own_step", lambda: None)
    with pytest.raises(vllm_decode.FailedError, match="0 of 1080 steps decoded the whole batch"):
        decoder.measure((10, 20), 32, rounds=12)


def test_a_way_has_builders_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "attach", lambda **how: SimpleNamespace(detach=lambda: None))
    engine = FakeEngine()
    decoder, builder = decoder_of(engine), engine.builders[0]
    for variant, schedules in (("none", False), ("vllm", True), ("ours", True), ("none", False)):
        builder.aot_sliding_window = (1023, 0)  # as the adapter may have told it
        decoder.go(Way(variant, 64, {1: variant}))
        assert vars(builder) == {"aot_schedule": schedules, "aot_sliding_window": (-1, -1), "max_num_splits": 64}
        assert decoder.runner.cudagraph_manager.graphs == {1: variant}
    decoder.chosen = [(False, (-1, -1))]  # vLLM has turned it off
    decoder.go(Way("vllm", 32))
    assert not builder.aot_schedule


def test_rows_of_the_table() -> None:
    times = {"step": {"none": [[200.0], [202.0]], "vllm": [[100.0], [101.0]]}}
    row = next(vllm_decode.lines("8b, 1 x 1k, 32 splits", times))
    assert row.split() == ["8b,", "1", "x", "1k,", "32", "splits:", "step", "201.0", "100.5", "2.0000", "1.00%"]
    assert len(row) == len(vllm_decode.header(("none", "vllm")))


def test_options() -> None:
    assert vllm_decode._variants("vllm, in place") == ("vllm", "in place")
    assert vllm_decode._numbers("32,8,32") == (32, 8)
    with pytest.raises(argparse.ArgumentTypeError, match=r"must be of none, vllm, .*, got theirs"):
        vllm_decode._variants("vllm,theirs")
