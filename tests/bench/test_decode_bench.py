"""The benchmarks of decode steps, as far as they go without a GPU."""

from __future__ import annotations

import os
import pathlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import decode_models, decode_step, sglang_decode
from bench.decode_models import ATTENTION, WHOLE, Model
from bench.sglang_decode import CASES, CONTEXT, POOL, ROUNDS, STEPS, FailedError

DEVICE = {name: [[us] * 3, [us + 4] * 3] for name, us in zip(
    decode_step.VARIANTS, (198.0, 158.0, 148.0, 98.0), strict=True)}  # fmt: skip
TIMES = {"device": DEVICE, "host": {name: [[16.0] * 3, [18.0] * 3] for name in DEVICE}}


def test_models_fit_a_gpu_and_split_into_tiles() -> None:
    for model, batches in (*ATTENTION, *WHOLE):
        assert model.num_heads % model.num_heads_k == 0
        assert len(model.window_of) == model.layers
        for lengths in batches:
            assert model.kv_bytes(sum(lengths)) < 60e9


def test_windows_alternate_as_in_the_models() -> None:
    named = {model.name: model.window_of for model, _ in ATTENTION}
    assert named["gpt-oss-20b"][:4] == [127, None, 127, None]
    assert named["Gemma-3-27B"][:7] == [1023] * 5 + [None, 1023]
    assert named["Llama-3.1-8B"] == [None] * 32


def test_a_row_of_the_table() -> None:
    text = decode_step.line(Model("A", 2, 8, 1), (100, 300), TIMES)
    assert text.split() == ["A", "2", "200", "200.0", "160.0", "150.0", "100.0", "1.2500", "1.3333", "2.0000",
                            "4.08%", "17.0", "17.0"]  # fmt: skip
    assert "20000.0" in decode_step.line(Model("A", 2, 8, 1, hidden=64), (100, 300), TIMES)


@pytest.mark.parametrize(
    ("variant", "off", "says"),
    [("native", 1e-6, "has other bits"), ("ours", 1e-6, "has other bits"), ("balanced", 0.1, "is off by")],
)
def test_outputs_that_differ_end_it(variant: str, off: float, says: str) -> None:
    model, expected = Model("A", 2, 8, 1), [torch.ones(4), torch.ones(4)]
    decode_step.check(variant, expected, expected, model)
    with pytest.raises(decode_step.DiffersError, match=f"A: output 1 by '{variant}' {says}"):
        decode_step.check(variant, [expected[0], expected[1] + off], expected, model)


def test_outputs_are_those_of_a_step_at_two_lengths_and_of_nothing_else() -> None:
    lengths, outputs = torch.zeros(1), [torch.zeros(4), torch.zeros(4)]

    class Replay(SimpleNamespace):
        def __call__(self) -> None:
            outputs[0].copy_(lengths.expand(4))  # and leaves the other

    step: Any = Replay(outputs=outputs)
    attention: Any = SimpleNamespace(reset=lengths.fill_)
    found = decode_step.outputs_of(step, attention)
    assert [one.tolist()[0] for one in found[::2]] == [0, decode_models.SPAN - 1]
    assert all(one.isnan().all() for one in found[1::2])
    assert step.outputs == []  # or the next graph could not have the same memory


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [decode_step, sglang_decode])
def test_without_a_gpu_one_line_says_so(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "needs a Hopper GPU" in said


# ---- SGLang ----------------------------------------------------------------------------------------------------------


def test_cases_fit_the_cache() -> None:
    steps = 2 * (STEPS + 1)  # of a turn
    for lengths in CASES.values():
        assert sum(lengths) + steps * len(lengths) <= POOL
        assert max(lengths) + steps <= CONTEXT


def test_logits_are_compared() -> None:
    def logits(**changed: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        return {variant: [changed.get(variant, torch.arange(8.0))] for variant in sglang_decode.VARIANTS}

    assert sglang_decode.compare(logits()) == 0
    near = torch.arange(8.0) * 1.01
    assert sglang_decode.compare(logits(balanced=near)) == pytest.approx(0.01, rel=1e-3)
    for wrong, says in (({"ours": near}, "'ours' have other bits"), ({"sglang": near}, "'sglang' have other bits"),
                        ({"balanced": near * 2}, "are off by"),
                        ({"none": torch.full((8,), torch.nan)}, "not finite")):  # fmt: skip
        with pytest.raises(FailedError, match=says):
            sglang_decode.compare(logits(**wrong))


class StandIn:
    """An engine whose steps take as long as its variant's place says, in the second capture one more."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int, tuple[int, ...]]] = []

    def fill_cache(self, seed: int) -> None:
        assert not self.started

    def start(self, variant: str, capture: int, lengths: tuple[int, ...]) -> None:
        self.started.append((variant, capture, lengths))

    def steps(self, count: int) -> list[torch.Tensor]:
        return [torch.ones(4)] * count

    def turn(self, metric: str) -> list[float]:
        variant, capture, _ = self.started[-1]
        return [100.0 * (1 + sglang_decode.VARIANTS.index(variant)) + capture + (metric == "host")]


def test_every_capture_of_every_variant_takes_its_turns() -> None:
    engine: Any = StandIn()
    times, error = sglang_decode.measure(engine, (3, 4))
    assert error == 0
    assert times["device"]["ours"] == [[300.0] * ROUNDS, [301.0] * ROUNDS]
    assert times["host"]["none"] == [[101.0] * ROUNDS, [102.0] * ROUNDS]
    turns = engine.started[-8 * ROUNDS :]
    assert turns[:8] == turns[8:16][::-1]  # there and back
    assert {lengths for _, _, lengths in turns} == {(3, 4)}


def _answers(model: str, part: str, folder: pathlib.Path, parent: Any) -> None:
    (folder / "log").write_text(f"{model} dies of {part}")
    if part == "logits":
        parent.send(FailedError("other bits"))
    if part != "death":
        parent.send((part, {}, 0.0))
        parent.send(None)
    os._exit(0)


def test_what_a_models_process_sends_is_what_is_measured() -> None:
    assert list(sglang_decode.measured("8b", "1 x 512", _answers)) == [("1 x 512", {}, 0.0)]
    with pytest.raises(FailedError, match="other bits"):
        list(sglang_decode.measured("8b", "logits", _answers))
    with pytest.raises(FailedError, match=r"its process ended\. 8b dies of death"):
        list(sglang_decode.measured("8b", "death", _answers))


def test_a_row_of_sglangs_table() -> None:
    device = {name: [[us - 1] * 3, [us + 1] * 3] for name, us in zip(
        sglang_decode.VARIANTS, (200.0, 160.0, 150.0, 100.0), strict=True)}  # fmt: skip
    times = {"device": device, "host": {name: [[20.0], [30.0]] for name in device}}
    text = sglang_decode.line("8b", "1 x 2", times, 0.0012)
    assert text.split()[4:] == ["200.0", "160.0", "150.0", "100.0", "1.2500", "1.3333", "2.0000", "1.0667", "2.02%",
                                "25", "25", "25", "25", "1.2e-03"]  # fmt: skip
