"""The benchmarks of decode steps, as far as they go without a GPU."""

from __future__ import annotations

import os
import pathlib
import threading
from multiprocessing.connection import Listener
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import decode_models, decode_step, sglang_decode
from bench.decode_models import ATTENTION, WHOLE, Model
from bench.sglang_decode import CASES, CONTEXT, GRAPHS, POOL, ROUNDS, STEPS, FailedError, Timed

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


def test_cases_fit_the_cache_and_the_graphs() -> None:
    steps = 2 * ROUNDS * (STEPS + 1) + 10
    for lengths in CASES.values():
        assert sum(lengths) + steps * len(lengths) <= POOL
        assert max(lengths) + steps <= CONTEXT
        assert len(lengths) in GRAPHS


def files(folder: pathlib.Path, **changed: torch.Tensor) -> dict[str, str]:
    for variant in sglang_decode.VARIANTS:
        torch.save([changed.get(variant, torch.arange(8.0))], folder / variant)
    return {variant: str(folder / variant) for variant in sglang_decode.VARIANTS}


def test_logits_are_compared(tmp_path: pathlib.Path) -> None:
    assert sglang_decode.compare(files(tmp_path)) == 0
    near = torch.arange(8.0) * 1.01
    assert sglang_decode.compare(files(tmp_path, balanced=near)) == pytest.approx(0.01, rel=1e-3)
    for wrong, says in (({"ours": near}, "'ours' have other bits"), ({"sglang": near}, "'sglang' have other bits"),
                        ({"balanced": near * 2}, "are off by"),
                        ({"none": torch.full((8,), torch.nan)}, "not finite")):  # fmt: skip
        with pytest.raises(FailedError, match=says):
            sglang_decode.compare(files(tmp_path, **wrong))


def test_a_process_answers_until_it_is_told_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    class StandIn:
        def __init__(self, *arguments: object) -> None:
            self.arguments = arguments

        def start(self, lengths: tuple[int, ...]) -> str:
            return f"{self.arguments[0]} {sum(lengths)}"

        def turn(self) -> Timed:
            return Timed([1.0], [2.0])

    ended = []
    monkeypatch.setattr(sglang_decode, "Server", StandIn)
    monkeypatch.setattr(os, "_exit", ended.append)
    with Listener(str(tmp_path / "socket")) as listener:
        child = threading.Thread(target=sglang_decode.serve, args=("ours", tmp_path, 9))
        child.start()
        parent = listener.accept()
        answers = [parent.recv()]
        for asked in ((3, 4), "turn"):
            parent.send(asked)
            answers.append(parent.recv())
        parent.send(None)
        child.join(10)
    assert answers == ["ours", "ours 7", Timed([1.0], [2.0])]
    assert ended == [0]


def test_a_row_of_sglangs_table() -> None:
    times = {name: Timed([us] * 3, [us / 10] * 3) for name, us in zip(
        sglang_decode.VARIANTS, (200.0, 160.0, 150.0, 100.0), strict=True)}  # fmt: skip
    text = sglang_decode.line("8b", "1 x 2", times, 0.0012)
    assert text.split()[4:] == ["200.0", "160.0", "150.0", "100.0", "1.2500", "1.3333", "2.0000", "1.0667",
                                "20", "16", "15", "10", "1.2e-03"]  # fmt: skip
