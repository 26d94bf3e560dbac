"""python -m bench record, with an op that the NumPy model stands in for."""

from __future__ import annotations

import gzip
import json
import pathlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata.triton_kernels.builds import rules_for

from bench import __main__ as command
from bench import exported_op, record
from bench.cases import LENGTHS

from ..helpers.cases import Case

BUILDS = ("sglang-kernel-0.4.2", "vllm-0.33.0", "vllm-0.10.0", "sgl-kernel-0.3.14.post1", "fa3-fwd-0.0.3")
CPU = torch.device("cpu")
# The op's arguments by position, in the order of its registered schema; with or without the chunk.
NAMES = (
    "batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads", "num_heads_k", "headdim", "headdim_v", "qkv_dtype",
    "cache_seqlens", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new", "seqused_q", "leftpad_k", "page_size",
    "max_seqlen_k_new", "causal", "window_left", "window_right", "attention_chunk", "has_softcap", "num_splits",
    "pack_gqa", "sm_margin",
)  # fmt: skip


def op_of(build: str, change: Callable[[torch.Tensor], torch.Tensor] = lambda made: made) -> record.Op:
    """Stands in for the op of `build`; its padding is not zero, since FA3 leaves it unwritten."""
    has_chunk = rules_for(build).has_attention_chunk
    names = [name for name in NAMES if has_chunk or name != "attention_chunk"]

    def op(*arguments: Any) -> torch.Tensor:
        call = dict(zip(names, arguments, strict=True))
        window = call.pop("window_left"), call.pop("window_right")
        made = fa3_metadata.get_scheduler_metadata(**call, window_size=window, build=build, backend="reference")
        assert all(call[name] is None or call[name].is_contiguous() for name in LENGTHS)
        return change(made)

    return op


@pytest.mark.parametrize("build", BUILDS)
def test_records_what_the_op_makes(build: str, tmp_path: pathlib.Path) -> None:
    recording = record.record(build, op_of(build), CPU, 240, seed=3, largest_batch=300)
    assert len(recording.cases) == 240
    assert not recording.refused
    assert not recording.wrong
    record.write(tmp_path / "some" / "file.jsonl.gz", recording.cases)
    with gzip.open(tmp_path / "some" / "file.jsonl.gz", "rt") as lines:
        read = [json.loads(text) for text in lines]
    assert all(list(one) == ["build", "num_sms", "arch", "args", "size", "rows"] for one in read)
    for one in read:
        case = Case(**one)
        case.check(case.run("reference", CPU), case.rows, "read back")
        assert all(len(row) == case.args["batch_size"] for row in case.rows.values())
    on_the_boundary = sum(case.args["max_seqlen_k"] == 4_000_000 for case in recording.cases)
    assert on_the_boundary == 80
    their_own_bound_decides = sum("has_softcap" not in case.args for case in recording.cases) - on_the_boundary
    assert their_own_bound_decides == 40
    arguments = Counter(name for case in recording.cases for name in case.args)
    assert {"cu_seqlens_q", "seqused_q", "leftpad_k", "cu_seqlens_k_new"} <= set(arguments)


def test_the_same_seed_gives_the_same_file(tmp_path: pathlib.Path) -> None:
    made = []
    for seed in (0, 0, 1):
        record.write(tmp_path / "f", record.record(BUILDS[0], op_of(BUILDS[0]), CPU, 9, seed, 64).cases)
        made.append((tmp_path / "f").read_bytes())
    assert made[0] == made[1] != made[2]


CHANGES = {
    "longer": lambda made: torch.cat((made, made[:1])),
    "one value for all": lambda made: made[:1],
    "64 bit": lambda made: made.long(),
    "semaphore": lambda made: made + 1,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("build", ["sglang-kernel-0.4.2", "vllm-0.10.0"])
def test_another_layout_fails_and_writes_nothing(
    build: str, change: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "file.jsonl.gz"
    _on_the_cpu(monkeypatch, op_of(build, CHANGES[change]))
    assert command.main(["record", "--build", build, "--cases", "6", "--out", str(out), "--largest-batch", "64"]) == 1
    said = capsys.readouterr().err
    assert "ANOTHER LAYOUT" in said
    assert "nothing is written" in said
    assert "Case(**" in said
    assert not out.exists()


def test_refused_calls_are_counted_and_others_take_their_place(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    op, calls = op_of("vllm-0.33.0"), []

    def refuses(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) % 3 == 0:
            raise RuntimeError("this build has no such kernel\nand more lines")
        return op(*arguments)

    _on_the_cpu(monkeypatch, refuses)
    out = tmp_path / "file.jsonl.gz"
    arguments = ["record", "--build", "vllm-0.33.0", "--out", str(out), "--largest-batch", "64", "--cases"]
    assert command.main([*arguments, "10"]) == 0
    said = capsys.readouterr().out
    assert "refused 4 times: this build has no such kernel\n" in said
    assert "10 cases of vllm-0.33.0" in said
    out.unlink()

    def always_refuses(*_arguments: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(record, "op_of", lambda _build: always_refuses)
    assert command.main([*arguments, "10"]) == 1
    assert "10 calls were refused; nothing is written" in capsys.readouterr().err
    assert not out.exists()


def test_says_why_it_cannot_record(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["record", "--out", "nowhere", "--build"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([*arguments, "vllm-0.33.0"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record, "installed_version", lambda _package: "0.33.1")
    assert command.main([*arguments, "vllm-0.33.0"]) == 2
    assert "vllm 0.33.1 is installed, which is not vllm-0.33.0" in capsys.readouterr().err
    assert command.main([*arguments, "flashinfer-1.0"]) == 2
    assert "is not known" in capsys.readouterr().err


def test_the_exported_function_is_used_where_there_is_no_op(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_op(_build: str) -> record.Op:
        raise record.MissingOpError("no op")

    monkeypatch.setattr(record, "installed_version", lambda _package: "0.3.21")
    monkeypatch.setattr(record, "avoid_misread_tensors", lambda: True)
    monkeypatch.setattr(record, "native_op", no_op)
    monkeypatch.setattr(exported_op, "exported_op", lambda build: f"function of {build}")
    assert record.op_of("sgl-kernel-0.3.21") == "function of sgl-kernel-0.3.21"


def _on_the_cpu(monkeypatch: pytest.MonkeyPatch, op: record.Op) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a GPU")
    monkeypatch.setattr(torch, "device", lambda *_name: CPU)
    monkeypatch.setattr(record, "op_of", lambda _build: op)
