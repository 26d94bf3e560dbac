"""The command line: what it prints, and that mistakes end in one line and exit code 2."""

from __future__ import annotations

import json
import pathlib

import fa3_metadata
import pytest
import torch
from fa3_metadata.installed import DetectedBuild
from fa3_metadata.tools import call_options, cli, demo
from fa3_metadata.tools.lengths import in_words, parse_lengths
from fa3_metadata.tools.models import MODELS
from fa3_metadata.triton_kernels.balance import constants_of
from fa3_metadata.triton_kernels.problem import DEFAULT_GPU

from ..conftest import HAS_GPU

SHAPE = ["explain", "--num-heads", "8", "--num-heads-k", "1", "--headdim", "128", "--build", "sglang-kernel-0.4.2"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_demo_explains_and_checks(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "demo", "--build", "sglang-kernel-0.4.2")
    for expected in ("llama-3.1-70b, tensor parallel 8: 8/1 q/KV heads", "rules of sglang", "kBlockM 64 x kBlockN 128",
                     "num_splits  at most 109", "32 sequences, 127680 keys, 1008 key blocks"):  # fmt: skip
        assert expected in printed
    assert "bit for bit" in printed
    if not HAS_GPU:
        assert "runs on     this machine's CPU" in printed
        assert "no CUDA GPU here" in printed


def test_explain_takes_lengths_by_shorthand(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "explain", "--model", "llama-3.1-8b", "--cache-seqlens", "64k,1023x256", "--json")
    explained = json.loads(printed)
    assert explained["totals"]["sequences"] == 1024
    assert explained["totals"]["keys"] == 65536 + 256 * 1023
    assert explained["sequences"][0] | {"key_blocks": 0, "blocks_read": 0, "blocks_per_split": 0} == {
        "sequence": 0, "query_tokens": 1, "query_blocks": 1, "keys": 65536, "key_blocks": 0, "blocks_read": 0,
        "splits": 1, "blocks_per_split": 0,
    }  # fmt: skip


def test_explain_says_what_a_long_batch_hides(capsys: pytest.CaptureFixture[str]) -> None:
    short = run(capsys, *SHAPE, "--cache-seqlens", "40x500", "--no-check")
    assert "... 16 more (--all shows them)" in short
    full = run(capsys, *SHAPE, "--cache-seqlens", "40x500", "--no-check", "--all")
    assert len(full.splitlines()) == len(short.splitlines()) + 15


def test_explain_reads_arguments_from_a_file(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "call.json"
    call = {"num_heads": 8, "num_heads_k": 1, "headdim": 128, "cache_seqlens": [900, 0, 70], "leftpad_k": [100, 0, 0],
            "window_size": [255, 0], "page_size": 64, "max_seqlen_q": 2, "num_splits": 4}  # fmt: skip
    path.write_text(json.dumps(call))
    explained = json.loads(run(capsys, "explain", "--input", str(path), "--build", "sgl-kernel-0.3.21", "--json"))
    assert explained["mask"] == {"causal": False, "local": True, "window_size": [255, 0]}
    assert [entry["keys"] for entry in explained["sequences"]] == [800, 0, 70]
    assert explained["layout"]["rows"] == {
        "num_splits_dynamic": [0, 3],
        "num_m_blocks": [4, 7],
        "num_nheads_in_l2": [8, 11],
    }


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("build", ["sgl-kernel-0.3.21", "sglang-kernel-0.4.2", "vllm-0.33.0"])
def test_every_model_can_be_explained(capsys: pytest.CaptureFixture[str], model: str, build: str) -> None:
    assert "4 sequences" in run(capsys, "explain", "--model", model, "--cache-seqlens", "9000,3x5", "--build", build)


def constants_used() -> str:
    """The GPU whose constants policy "balanced" goes by on this machine."""
    return str(constants_of(torch.cuda.get_device_name() if HAS_GPU else DEFAULT_GPU)["gpu"])


def test_balanced_says_so_and_what_it_goes_by(capsys: pytest.CaptureFixture[str]) -> None:
    skewed = [*SHAPE, "--cache-seqlens", "512,3x300", "--page-size", "64", "--causal"]
    fa3 = run(capsys, *skewed, "--no-check")  # which would say how long it took
    assert "policy      " not in fa3
    assert run(capsys, *skewed, "--no-check", "--policy", "fa3") == fa3
    balanced = run(capsys, *skewed, "--policy", "balanced")
    for expected in (f"policy      balanced; in key blocks at full bandwidth, on {constants_used()}: a tile ",
                     "what may pay, within max_partial_bytes", "bit for bit"):  # fmt: skip
        assert expected in balanced
    invariant = run(capsys, *skewed, "--policy", "balanced", "--batch-invariant")
    assert "policy      balanced; batch invariant, " in invariant
    long = [*SHAPE, "--cache-seqlens", "5000", "--max-seqlen-q", "5000", "--no-check"]
    assert "left to FA3's rule" in run(capsys, *long, "--policy", "balanced")


def test_balanced_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    call = [*SHAPE, "--cache-seqlens", "512", "--json", "--no-check"]
    assert "policy" not in json.loads(run(capsys, *call))
    explained = json.loads(run(capsys, *call, "--policy", "balanced"))
    assert explained["sequences"][0]["splits"] > 1, "which FA3 would not split"
    constants = explained["policy"].pop("constants")
    assert explained["policy"] == {"name": "balanced", "batch_invariant": False}
    assert constants.pop("gpu") == constants_used()
    assert constants.pop("fixed_blocks") is None
    assert all(0 < value < 100 for value in constants.values())
    assert len(constants) == 4


def test_the_demo_of_balanced(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "demo", "--build", "sglang-kernel-0.4.2", "--policy", "balanced")
    assert "policy      balanced; " in printed
    assert "num_splits  at most 128" in printed
    assert "NumPy model" in printed


def test_outputs_are_compared_sequence_by_sequence() -> None:
    """A sequence that is wrong does not hide behind longer ones, and rounding is not an error."""
    wanted = torch.ones(30, 1, 2, 4)
    wanted[2] = 0
    close = wanted * 1.01
    assert demo._difference(close, wanted, "a wheel") == "at most 1.0e-02 apart in any sequence, relative"
    for sequence in (1, 2):
        wrong = wanted.clone()
        wrong[sequence] += 0.05
        with pytest.raises(demo.MismatchError, match="the forward of a wheel is off by"):
            demo._difference(wrong, wanted, "a wheel")
    with pytest.raises(demo.MismatchError):
        demo._difference(wanted * float("nan"), wanted, "a wheel")


def test_an_empty_batch(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "call.json"
    path.write_text('{"num_heads": 8, "num_heads_k": 1, "headdim": 128, "cache_seqlens": []}')
    assert "(an empty batch)" in run(capsys, "explain", "--input", str(path))


MISTAKES = [
    ([], "required: command"),
    (["draw"], "invalid choice: 'draw'"),
    (["tune"], "required: what"),
    (["explain"], "cache_seqlens is needed"),
    ([*SHAPE, "--cache-seqlens", "5x"], "must be like 64k,16x1024 (a length, or how many x length; k is 1024)"),
    ([*SHAPE, "--cache-seqlens", "1.3"], "--cache-seqlens must be in whole tokens, got '1.3'"),
    ([*SHAPE, "--cache-seqlens", "9999999x1"], "at most 1,048,576 sequences"),
    ([*SHAPE, "--cache-seqlens", "2 x poisson(3)"], "got 'poisson(3)'"),
    ([*SHAPE, "--cache-seqlens", "2 x uniform(9, 3)"], "got 'uniform(9, 3)'"),
    ([*SHAPE, "--cache-seqlens", "5", "--gpu", "h300"], "the GPU must be one of h200, h100"),
    ([*SHAPE, "--cache-seqlens", "5", "--against", "faster"], "--against must be a policy, a build or a card"),
    ([*SHAPE, "--cache-seqlens", "5", "--against", "torch-1"], "build 'torch-1' is not known"),
    ([*SHAPE, "--cache-seqlens", "5", "--plot", "out.jpg"], "--plot must name a file that ends in .png, .svg"),
    ([*SHAPE, "--cache-seqlens", "5", "--trace", "/no/such/file"], "leave --cache-seqlens and --input out"),
    (["explain", "--trace", "/no/such/file"], "No such file"),
    ([*SHAPE, "--cache-seqlens", "5", "--page-size", "0"], "page_size must be from 1"),
    (["measure", "--model", "gpt-2"], "invalid choice: 'gpt-2'"),
    (["measure", "--model-config", "/no/such/file"], "/no/such/file cannot be read: No such file"),
    (["measure", "--tp", "7"], "tp must divide the 32 q heads"),
    (["measure", "--cache-seqlens", "0"], "at least one token"),
    (["measure", "--step", "3"], "--step is a step of a --trace"),
    (["measure", "--samples", "0"], "--samples must be at least 1, got 0"),
    (["measure", "--plot", "out.html"], "ends in .png, .svg or .pdf here"),
    ([*SHAPE, "--cache-seqlens", "-5"], "must be like"),
    ([*SHAPE, "--cache-seqlens=-5"], "must be like"),
    ([*SHAPE, "--cache-seqlens", ""], "must be like"),
    ([*SHAPE, "--cache-seqlens", "5", "--num-splits", "300"], "num_splits must be from 0 to 256, got 300"),
    ([*SHAPE, "--cache-seqlens", "5", "--window-size", "x"], "must be LEFT,RIGHT, two integers, got 'x'"),
    ([*SHAPE, "--cache-seqlens", "700", "--max-seqlen-k", "600"], "max_seqlen_k must hold the longest sequence, 700"),
    ([*SHAPE, "--cache-seqlens", "99999999999"], "--cache-seqlens must be below 2147483648, got 99999999999"),
    ([*SHAPE, "--cache-seqlens", "5", "--input", "/no/such/file"], "/no/such/file cannot be read: No such file"),
    (["explain", "--cache-seqlens", "5"], "num_heads, num_heads_k, headdim needed: give --model"),
    (["explain", "--model", "gpt-2", "--cache-seqlens", "5"], "invalid choice: 'gpt-2'"),
    (["explain", "--model", "llama-3.1-8b", "--tp", "5", "--cache-seqlens", "5"], "tp must divide the 32 q heads"),
    ([*SHAPE, "--cache-seqlens", "5", "--policy", "fast"], "invalid choice: 'fast'"),
    ([*SHAPE, "--cache-seqlens", "5", "--batch-invariant"], 'batch_invariant needs policy "balanced"'),
    (
        ["explain", "--model", "llama-3.1-8b", "--build", "torch-1", "--cache-seqlens", "5"],
        "build 'torch-1' is not known",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[str(i) for i in range(len(MISTAKES))])
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert message in printed.err


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1, 2]", "must hold a JSON object"), ("{", "is not JSON: Expecting property name"), ("\xff", "is not JSON"),
     ('{"cache_seqlens": "5"}', "num_heads"),
     ('{"cache_seqlens": "5", "num_head": 1}', "there is no argument 'num_head'; is num_heads"),
     ('{"cache_seqlens": [5], "out": [1]}', "there is no argument 'out'"),
     ('{"cache_seqlens": [5, 1.5]}', "cache_seqlens[1] must be a whole number of tokens, got 1.5"),
     ('{"cache_seqlens": [true]}', "cache_seqlens[0] must be a whole number of tokens, got True"),
     ('{"cache_seqlens": [5], "leftpad_k": [-1]}', "leftpad_k[0] must not be negative, got -1"),
     ('{"cache_seqlens": [4294967296]}', "cache_seqlens must be below 2147483648"),
     ('{"cache_seqlens": 5}', "cache_seqlens must be a list of lengths or a text"),
     ('{"cache_seqlens": "5y"}', "cache_seqlens must be like 64k,16x1024")],
)  # fmt: skip
def test_mistakes_in_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, text: str, message: str
) -> None:
    path = tmp_path / "call.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["explain", "--input", str(path)])
    assert exit_.value.code == 2
    assert message in (said := capsys.readouterr().err)
    assert said.count("\n") == 1
    assert "num_heads, " in said or str(path) in said, "which file is wrong"


def test_a_failed_check_is_reported(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the second implementation, and the demo must say so and exit with 1."""
    honest = demo.get_scheduler_metadata

    def wrong(**arguments: object) -> object:
        made = honest(**arguments)  # type: ignore[arg-type]
        made[0] += 1
        return made

    monkeypatch.setattr(demo, "get_scheduler_metadata", wrong)
    assert cli.main(["demo", "--build", "sglang-kernel-0.4.2"]) == 1
    assert "check failed: " in (printed := capsys.readouterr()).err
    assert "differ in num_splits_dynamic" in printed.err


@pytest.mark.parametrize(
    ("text", "lengths"),
    [("16x1024", [1024] * 16), ("64k", [65536]), ("1.5k,2 x 3K", [1536, 3072, 3072]), ("1m", [1 << 20]),
     ("0,7", [0, 7]), ("2 * 5, 3", [5, 5, 3])],
)  # fmt: skip
def test_lengths_as_people_write_them(text: str, lengths: list[int]) -> None:
    assert parse_lengths(text) == lengths


def test_lengths_that_are_drawn() -> None:
    drawn = parse_lengths("40 x lognormal(8, 1), 5 x uniform(1k, 2k), 3")
    assert drawn == parse_lengths("40 x lognormal(8, 1), 5 x uniform(1k, 2k), 3"), "the same text, the same lengths"
    assert len(drawn) == 46
    assert all(16 <= one <= 131072 for one in drawn[:40])
    assert all(1024 <= one <= 2048 for one in drawn[40:45])


def test_what_was_read_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert in_words([1024] * 16) == "16 sequences of 1,024 tokens"
    assert in_words([9]) == "1 sequence of 9 tokens"
    assert in_words([65536, *[256] * 1023]) == "1 sequence of 65,536, 1,023 of 256 tokens"
    assert in_words(list(range(1, 101))) == "100 sequences of 1 to 100 tokens, median 50, mean 50"
    assert in_words([]) == "no sequence"
    printed = run(capsys, *SHAPE, "--cache-seqlens", "16x1024", "--no-check")
    assert "lengths     16 sequences of 1,024 tokens" in printed


def test_a_window_with_a_minus(capsys: pytest.CaptureFixture[str]) -> None:
    for window in (["--window-size", "-1,-1"], ["--window-size=-1,-1"]):
        explained = json.loads(run(capsys, *SHAPE, "--cache-seqlens", "700", "--json", "--no-check", *window))
        assert explained["call"]["window_size"] == [-1, -1]
    explained = json.loads(
        run(capsys, *SHAPE, "--cache-seqlens", "700", "--json", "--no-check", "--window-size", "-1,3")
    )
    assert explained["call"]["window_size"] == [-1, 3]


def test_json_says_what_it_is_of(capsys: pytest.CaptureFixture[str]) -> None:
    call = [*SHAPE, "--cache-seqlens", "5000,300", "--page-size", "64", "--causal", "--window-size", "600,0"]
    explained = json.loads(run(capsys, *call, "--json", "--no-check", "--against", "balanced"))
    assert explained["version"] == fa3_metadata.__version__
    assert explained["gpu"]["arch"] == explained["call"]["arch"] == 90
    assert explained["call"]["num_heads"] == 8
    assert explained["costs"]["kernel"] == [2, 128, 128, 64, 128]
    assert explained["costs"]["alone"] > 0
    assert [one["blocks_read"] for one in explained["sequences"]] == [6, 3], "of 40 and 3 key blocks"
    assert explained["totals"]["blocks_read"] == 9
    assert explained["predicted"]["time_us"] > explained["costs"]["launch"]
    assert [one["label"] for one in explained["against"]] == ["policy balanced"]


def test_as_an_engine_calls(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["explain", "--model", "llama-3.1-8b", "--cache-seqlens", "5000", "--no-check"]
    printed = run(capsys, *model, "--engine", "vllm", "--build", "vllm-0.33.0")
    for expected in ("engine      vllm: pages of 16 tokens", "mask: causal", "num_splits  at most 32: given"):
        assert expected in printed
    explained = json.loads(run(capsys, *model, "--engine", "sglang", "--json"))
    assert [explained["call"][name] for name in ("page_size", "causal", "num_splits")] == [1, True, 0]
    explained = json.loads(run(capsys, *model, "--engine", "sglang", "--json", "--page-size", "64", "--no-causal"))
    assert [explained["call"][name] for name in ("page_size", "causal")] == [64, False], "what is said wins"


def test_the_newest_build_of_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_options, "detect_build", lambda: DetectedBuild("sgl-kernel-0.3.21", "installed"))
    assert call_options.build_of(None, "vllm").build == "vllm-0.33.0"
    assert call_options.build_of(None, "sglang").build == "sgl-kernel-0.3.21"
    assert call_options.build_of("vllm-0.20.0", "vllm") == DetectedBuild("vllm-0.20.0", "given")
    assert call_options.build_of(None, None).build == "sgl-kernel-0.3.21"


def test_another_card(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, *SHAPE, "--cache-seqlens", "5000", "--gpu", "h20", "--no-check")
    assert "as if for an NVIDIA H20 (78 SMs, sm_90)" in printed
    assert "scheduler   1 heads on 78 SMs" in printed
    assert "a layer on H20, by constants of H200" in printed
    shape = [one for one in SHAPE if one != "sglang-kernel-0.4.2"] + ["fa3-fwd-0.0.3"]
    printed = run(capsys, *shape, "--cache-seqlens", "5000", "--arch", "80", "--num-sms", "108")
    assert "as if for a GPU of 108 SMs, sm_80" in printed
    assert "bit for bit" in printed
    printed = run(capsys, *SHAPE, "--cache-seqlens", "5000", "--gpu", "H100", "--policy", "balanced")
    assert "skipped     the checks" in printed


def test_against_others(capsys: pytest.CaptureFixture[str]) -> None:
    call = [*SHAPE, "--cache-seqlens", "512", "--no-check", "--against"]
    printed = run(capsys, *call, "balanced", "--against", "h100", "--against", "vllm-0.33.0")
    assert "against     policy balanced " in printed
    assert "x faster, predicted on H200" in printed
    assert "against     H100 " in printed
    assert "predicted on H200 and H100" in printed
    assert "against     vllm-0.33.0 " in printed
