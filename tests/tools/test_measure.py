"""`fa3-metadata measure`: what it builds and compares on the CPU, what it simulates, and how it says so."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fa3_metadata import trace
from fa3_metadata.tools import cli, decode_batch, measure
from fa3_metadata.tools.measure import ALONE, BALANCED, ENGINE, INVARIANT, OURS, Question, RankLayers
from fa3_metadata.tools.models import MODELS, WHOLE_MODELS, Layers, Model, read_config

from ..conftest import HAS_GPU
from ..helpers.attention_reference import attention as reference

BUILD = "sglang-kernel-0.4.2"
CPU = torch.device("cpu")
TINY = Layers("tiny", ((Model(4, 2, 64, window_size=(31, 0)), 2), (Model(4, 2, 64), 1)))
Config = dict[str, Any]


def question(**more: Any) -> Question:
    given: dict[str, Any] = {
        "layers": TINY, "lengths": (1, 64, 65, 700), "build": BUILD, "engine": None, "page_size": 64,
        "dtype": torch.bfloat16, "batch_invariant": False,
    }  # fmt: skip
    return Question(**given | more)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of a forward in float64."""
    made: list[dict[str, Any]] = []

    def forward(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, **call: Any) -> torch.Tensor:
        made.append(call | {"q": q, "k_cache": k_cache, "v_cache": v_cache})
        return reference(made[-1]).to(q.dtype)

    monkeypatch.setattr(decode_batch, "load_forward", lambda build: forward)
    return made


# ---- what is built ---------------------------------------------------------------------------------------------------


def test_no_two_sequences_and_no_two_layers_share_a_page() -> None:
    torch.manual_seed(0)
    layers = RankLayers(question(), CPU, 1 << 40)
    assert layers.share == 1
    assert [one.window_size for one in layers.batches] == [(31, 0), (31, 0), (-1, -1)]
    seen = set()
    for batch in layers.batches:
        for row, length in zip(batch.page_table, question().lengths, strict=True):
            for page in row[: -(-length // 64)].tolist():
                place = (batch.k_cache.data_ptr(), page)
                assert place not in seen
                assert page < batch.k_cache.shape[0]
                seen.add(place)


def test_layers_share_pages_where_memory_is_short() -> None:
    layers = RankLayers(question(), CPU, 1)
    assert layers.share < 1
    assert layers.batches[0].page_table is layers.batches[1].page_table
    assert len(layers.batches) == 3


@pytest.mark.parametrize(("memory", "regions"), [(1 << 40, 3), (1, 1)])
def test_a_build_without_paged_kernels_gets_caches_that_are_not_paged(
    calls: list[dict[str, Any]], memory: int, regions: int
) -> None:
    whole = Layers("whole", ((Model(4, 2, 64), 3),))
    asked = question(build="fa3-fwd-0.0.3", layers=whole, lengths=(1, 64, 65, 100))
    assert asked.call(whole.kinds[0][0])["page_size"] is None
    layers = RankLayers(asked, CPU, memory)
    assert len({one.k_cache.data_ptr() for one in layers.batches}) == regions
    for one in layers.batches:
        assert one.page_table is None
        assert one.k_cache.shape == one.v_cache.shape == (4, 128, 2, 64)
        assert (one.max_seqlen_k, one.problem_arguments()["page_size"]) == (128, None)
    outputs = measure.way_of(OURS, layers, [0, 1, 2]).run()
    assert [tuple(one.shape) for one in outputs] == [(4, 1, 4, 64)] * 3
    assert all(call["page_table"] is None for call in calls)


@pytest.mark.parametrize("way", [ALONE, OURS, BALANCED, INVARIANT])
def test_each_way_gives_the_layers_what_was_made_for_them(calls: list[dict[str, Any]], way: str) -> None:
    layers = RankLayers(question(), CPU, 1 << 40)
    made = measure.way_of(way, layers, [0, 1, 2])
    assert made.before is None
    outputs = made.run()
    assert [tuple(one.shape) for one in outputs] == [(4, 1, 4, 64)] * 3
    metadata = [call["scheduler_metadata"] for call in calls]
    if way == ALONE:
        assert metadata == [None] * 3
        return
    assert metadata[0] is metadata[1], "layers of a kind"
    assert not torch.equal(metadata[0], metadata[2][: len(metadata[0])])
    assert all(call["num_splits"] >= 1 for call in calls)


def test_what_an_engine_runs_before_a_replay(monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any]]) -> None:
    asked: list[dict[str, Any]] = []

    def made(**call: Any) -> torch.Tensor:
        asked.append(call)
        size = measure.metadata_layout(**{k: v for k, v in call.items() if k != "backend"}).size
        return torch.full((size,), len(asked), dtype=torch.int32)

    monkeypatch.setattr(measure, "native_op", lambda build: None)
    monkeypatch.setattr(measure, "get_scheduler_metadata", made)
    layers = RankLayers(question(engine="vllm"), CPU, 1 << 40)
    way = measure.way_of(ENGINE, layers, [0, 1, 2])
    assert way.before is not None
    way.before()
    way.before()
    assert [one["window_size"] for one in asked] == [(-1, -1)] * 2, "none for layers with windows"
    assert asked[0]["num_splits"] == 32
    assert asked[0]["backend"] == "native"
    way.run()
    assert [None if call["scheduler_metadata"] is None else int(call["scheduler_metadata"][0]) for call in calls] == [
        None, None, 2
    ]  # fmt: skip
    assert [call["num_splits"] for call in calls] == [0, 0, 32]
    with pytest.raises(RuntimeError, match="engines make no metadata"):
        measure.way_of(ENGINE, layers, [0, 1])


def test_outputs_are_compared() -> None:
    wanted = [torch.ones(2, 3), torch.ones(2, 3)]
    near = [torch.ones(2, 3), torch.ones(2, 3) * 1.01]
    assert measure.check_outputs(OURS, wanted, wanted, 2) == 0
    assert measure.check_outputs(BALANCED, near, wanted, 2) == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(RuntimeError, match=r"the output of layer 1 by 'ours' is off by 0\.01"):
        measure.check_outputs(OURS, near, wanted, 2)
    for wrong in (torch.ones(2, 3) * 1.1, torch.ones(2, 3) * float("nan")):
        with pytest.raises(RuntimeError, match="by 'balanced' is off by"):
            measure.check_outputs(BALANCED, [wrong, wrong], wanted, 2)


class FakeGraph:
    """Runs what was captured again."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


def on_a_fake_gpu(monkeypatch: pytest.MonkeyPatch, time_of: Callable[[str], float]) -> None:
    """`measure.measured` on the CPU: nothing is captured, outputs stay, times are given by way."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(measure.torch, "device", lambda *_: CPU)
    monkeypatch.setattr(measure, "gpu_facts", lambda: "a fake GPU")

    def capture(way: Any, pool: Any) -> Any:
        return measure._Captured(FakeGraph(), way), way.run()  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "_capture", capture)
    monkeypatch.setattr(measure, "eager_sampler", lambda one, *_, **__: one)
    monkeypatch.setattr(measure, "interleaved", lambda samplers, *_: {name: [time_of(name)] * 3 for name in samplers})


def test_all_is_measured_and_compared(monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any]]) -> None:
    times = {ALONE: 30.0, OURS: 28.0, BALANCED: 20.0, INVARIANT: 21.0}
    on_a_fake_gpu(monkeypatch, lambda name: times[name[:-2]] * (1.01 if name.endswith("1") else 1))

    def no_op(build: str) -> Any:
        raise RuntimeError("it has no op")

    monkeypatch.setattr(measure, "native_op", no_op)
    asked = question(batch_invariant=True)
    answer = measure.measured(asked, 3, 1, lambda what: None)
    assert not answer.simulated
    assert list(answer.times) == ["step", "window 31", "full"]
    assert answer.counts == {"step": 3, "window 31": 2, "full": 1}
    assert answer.times["step"][BALANCED] == pytest.approx(20.1)
    assert answer.apart == pytest.approx(0.01)
    assert answer.left_out == [f"{part}, engine: it has no op" for part in answer.times]
    assert [line.partition(":")[0] for line in answer.checked] == [OURS, BALANCED, INVARIANT]
    rows = "\n".join(measure.table(asked, answer))
    assert "a layer, window 31 (2 of them)" in rows
    assert "+33.3%" in rows
    assert "engine" not in rows


# ---- simulated -------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["measure", *arguments]) == 0
    return capsys.readouterr().out


def test_batch_invariance_under_a_window_gets_a_page_table_wider_than_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Of contexts shorter than the window; FA3 would take it for none, and the promise would be refused."""
    arguments = ("--model", "gemma-3-27b", "--gpu", "h100", "--cache-seqlens", "4 x 100", "--json")
    assert INVARIANT in json.loads(run(capsys, *arguments, "--batch-invariant"))["times_us"]["step"]
    short, wide = (question(lengths=(20, 5), page_size=16, batch_invariant=asked) for asked in (False, True))
    assert (short.table_pages, wide.table_pages) == (2, 3)  # a window of 31 tokens
    layers = RankLayers(wide, CPU, 1 << 40)
    assert layers.batches[0].page_table.shape[1] * 16 == wide.call(layers.models[0])["max_seqlen_k"]


def test_without_a_gpu_it_simulates_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "--model", "gpt-oss-20b", "--cache-seqlens", "16 x 4k", *(["--simulate"] if HAS_GPU else []))
    for expected in ("simulated   for H200: ", "12 window 127, 12 full", "16 sequences of 4,096 tokens; pages of 64",
                     "a step, 24 layers", "a layer, window 127 (12 of them)", "nothing here was measured"):  # fmt: skip
        assert expected in printed
    if not HAS_GPU:
        assert "there is no CUDA GPU here" in printed


def test_simulated_steps_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    said = json.loads(run(capsys, "--model", "gemma-3-27b", "--gpu", "h100", "--batch-invariant", "--json"))
    assert said["simulated"]
    assert said["layers"] == {"step": 62, "window 1023": 52, "full": 10}
    step, kinds = said["times_us"]["step"], [said["times_us"][kind] for kind in ("window 1023", "full")]
    assert list(step) == [ALONE, ENGINE, OURS, BALANCED, INVARIANT]
    for way in step:
        assert 0 <= step[way] - sum(one[way] for one in kinds) < 12, "the metadata, once a step"
    assert step[BALANCED] <= step[OURS] * 1.01 < step[ALONE]
    assert step[OURS] < step[ENGINE] <= step[ALONE], "which leaves windows to FA3"


def test_an_engines_pages_and_bound(capsys: pytest.CaptureFixture[str]) -> None:
    said = json.loads(run(capsys, "--engine", "vllm", "--build", "vllm-0.33.0", "--simulate", "--json"))
    assert (said["page_size"], said["engine"], said["build"]["name"]) == (16, "vllm", "vllm-0.33.0")


def test_lengths_of_a_recording(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    from .test_trace import record_steps

    path = str(record_steps(tmp_path / "steps.trace"))
    middle = json.loads(run(capsys, "--trace", path, "--simulate", "--json"))
    assert middle["lengths"] == [1030, 330, 50030]
    first = json.loads(run(capsys, "--trace", path, "--step", "0", "--simulate", "--json"))
    assert first["lengths"] == [1000, 300]
    with pytest.raises(SystemExit):
        cli.main(["measure", "--trace", path, "--step", "9999"])
    assert "which has 120, got 9999" in capsys.readouterr().err
    assert not trace.is_on()


def test_bars(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "bars.svg"
    assert "drawn" in run(capsys, "--model", "gpt-oss-20b", "--simulate", "--plot", str(path))
    text = path.read_text()
    for expected in ("FA3 alone", "balanced", "window 127 layers", "simulated"):
        assert expected in text


# ---- models ----------------------------------------------------------------------------------------------------------


def test_presets_agree_with_the_list_of_shapes() -> None:
    assert {name: one.count for name, one in WHOLE_MODELS.items()} == {
        "llama-3.1-8b": 32, "llama-3.1-70b": 80, "qwen3-32b": 64, "gpt-oss-20b": 24, "gemma-3-27b": 62,
        "deepseek-v3": 61,
    }  # fmt: skip
    sharded = WHOLE_MODELS["llama-3.1-70b"].shard(8)
    assert sharded.kinds == ((MODELS["llama-3.1-70b"].shard(8), 80),)


LLAMA: Config = {"num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
FULL, SLIDING = Model(32, 8, 128), Model(32, 8, 128, window_size=(1023, 0))
CONFIGS: dict[str, tuple[Config, tuple[tuple[Model, int], ...]]] = {
    "Llama": (LLAMA, ((FULL, 4),)),
    "a head dim of its own": (LLAMA | {"head_dim": 64}, ((Model(32, 8, 64), 4),)),
    "as many KV heads": ({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}, ((Model(32, 32, 128), 4),)),
    "Mistral, every layer": (LLAMA | {"sliding_window": 1024}, ((SLIDING, 4),)),
    "Qwen2, turned off": (LLAMA | {"sliding_window": 1024, "use_sliding_window": False}, ((FULL, 4),)),
    "layer types": (
        LLAMA | {"sliding_window": 1024,
                 "layer_types": ["sliding_attention", "full_attention", "linear_attention", "sliding_attention"]},
        ((SLIDING, 2), (FULL, 1)),
    ),
    "Gemma 3, a pattern in the text part": (
        {"text_config": LLAMA | {"sliding_window": 1024, "sliding_window_pattern": 4}}, ((SLIDING, 3), (FULL, 1)),
    ),
    "Gemma 2": (LLAMA | {"sliding_window": 1024, "model_type": "gemma2"}, ((SLIDING, 2), (FULL, 2))),
    "Llama 4": (
        LLAMA | {"attention_chunk_size": 8192, "layer_types": ["chunked_attention", "full_attention"] * 2},
        ((Model(32, 8, 128, attention_chunk=8192), 2), (FULL, 2)),
    ),
    "DeepSeek": (LLAMA | {"kv_lora_rank": 512, "qk_rope_head_dim": 64}, ((Model(32, 1, 64, 512), 4),)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_of_models(tmp_path: pathlib.Path, name: str) -> None:
    config, kinds = CONFIGS[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert read_config(path).kinds == kinds


def test_a_config_from_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS["Llama 4"][0] | {"model_type": "llama4"}))
    printed = run(capsys, "--model-config", str(path), "--tp", "2", "--simulate")
    assert "llama4, tensor parallel 2: 2 chunks of 8192, 2 full; 16/4 q/KV heads" in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "must hold a JSON object"), ("{}", "num_hidden_layers must be a positive integer"),
     ('{"num_hidden_layers": 2, "num_attention_heads": "8"}', "heads must be a positive integer, got '8'"),
     (json.dumps(LLAMA | {"layer_types": ["linear_attention"] * 4}), "layer_types has no layers that FA3 runs")],
)  # fmt: skip
def test_configs_that_do_not_say_what_is_needed(tmp_path: pathlib.Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_config(path)
    assert str(path) in str(error.value)


def test_options_that_do_not_go_together(tmp_path: pathlib.Path) -> None:
    parser = argparse.ArgumentParser()
    measure.add_options(parser)
    for arguments, message in (
        (["--model", "qwen3-32b", "--model-config", "x"], "not both"),
        (["--cache-seqlens", "5", "--trace", "x"], "not both"),
    ):
        with pytest.raises(ValueError, match=message):
            measure.question_of(parser.parse_args(arguments))
