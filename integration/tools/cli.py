"""The command line: `fa3-metadata demo`, `fa3-metadata explain` and `fa3-metadata tune`."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from typing import Any, NoReturn

import torch

from ..arguments import LengthTensors
from ..installed import detect_build
from ..triton_kernels.problem import POLICIES
from .demo import MismatchError, allow_interpreter, checks
from .models import MODELS
from .report import Explanation, explain
from .tune import add_options as add_tune_options
from .tune import run as run_tune

_DEMO_LENGTHS = "65536,16384,8192x2,4096x4,1024x8,300x16"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{self.prog}: error: {message}\n")
        sys.exit(2)


def parse_lengths(text: str) -> list[int]:
    """Lengths from "65536,256x1023": one sequence of 65,536 tokens and 1,023 of 256."""
    lengths: list[int] = []
    for part in text.split(","):
        length, _, count = part.strip().partition("x")
        if not length.isdecimal() or not (count or "1").isdecimal() or part.strip().endswith("x"):
            raise ValueError(f"--cache-seqlens must be like 65536,256x1023 (length, or length x count), got {part!r}")
        lengths += [int(length)] * int(count or 1)
    return lengths


def _window(text: str) -> tuple[int, int]:
    try:
        left, right = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be LEFT,RIGHT, two integers, got {text!r}") from None
    return left, right


def _add_call_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=sorted(MODELS), help="heads and head dims of a model")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks that share the model's heads")
    parser.add_argument("--build", help='FA3 build, such as "vllm-0.33.0" (default: what is installed)')
    parser.add_argument("--policy", choices=POLICIES, help="fa3: FA3's own schedule (default); balanced: ours")
    parser.add_argument(
        "--batch-invariant", action="store_const", const=True, help="balanced: splits by a sequence's own length alone"
    )
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--all", action="store_true", help="print every sequence of a long batch")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fa3-metadata", description="FlashAttention-3 scheduler metadata: make, explain and check it."
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    demo = commands.add_parser("demo", help="a realistic decode batch, explained, checked and timed")
    _add_call_options(demo)
    demo.set_defaults(model="llama-3.1-70b", tp=8, cache_seqlens=_DEMO_LENGTHS, page_size=64, causal=True)
    explain_ = commands.add_parser("explain", help="the same for lengths and shapes given here or in a JSON file")
    _add_call_options(explain_)
    explain_.add_argument("--cache-seqlens", help="tokens in each sequence's cache: 65536,256x1023")
    explain_.add_argument(
        "--input", type=pathlib.Path, help="JSON object of get_scheduler_metadata's arguments, by name"
    )
    for name in ("num-heads", "num-heads-k", "headdim", "headdim-v", "max-seqlen-q", "max-seqlen-k", "page-size",
                 "attention-chunk", "num-splits", "sm-margin", "max-seqlen-k-new", "arch", "num-sms"):  # fmt: skip
        explain_.add_argument(f"--{name}", type=int)
    explain_.add_argument("--qkv-dtype", choices=["bfloat16", "float16", "float8_e4m3fn"])
    explain_.add_argument("--window-size", type=_window, metavar="LEFT,RIGHT", help="visible tokens; -1: unlimited")
    explain_.add_argument("--causal", action="store_const", const=True)
    explain_.add_argument("--has-softcap", action="store_const", const=True)
    explain_.add_argument("--pack-gqa", action=argparse.BooleanOptionalAction)
    explain_.add_argument("--no-check", action="store_true", help="do not run the checks")
    tune = commands.add_parser("tune", help="measure this machine's GPU, once, for what is tuned to a GPU")
    add_tune_options(tune, _Parser)
    return parser


def _call_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `get_scheduler_metadata`: from the JSON file, the model, the options, in rising order."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    arguments: dict[str, Any] = {}
    if path := given.get("input"):
        arguments = json.loads(path.read_text())
        if not isinstance(arguments, dict):
            raise ValueError(f"{path} must hold a JSON object of arguments by name")
        if isinstance(window := arguments.get("window_size"), list):
            arguments["window_size"] = tuple(window)
    if model := given.get("model"):
        shard = MODELS[model].shard(options.tp)
        arguments |= {
            "num_heads": shard.num_heads, "num_heads_k": shard.num_heads_k, "headdim": shard.headdim,
            "headdim_v": shard.headdim_v, "window_size": shard.window_size,
        }  # fmt: skip
    options_only = ("command", "model", "tp", "device", "json", "all", "input", "no_check")
    arguments |= {name: value for name, value in given.items() if name not in options_only}
    lengths = arguments.get("cache_seqlens")
    if isinstance(lengths, str):
        lengths = arguments["cache_seqlens"] = parse_lengths(lengths)
    if not isinstance(lengths, list):
        raise ValueError("cache_seqlens is needed: give --cache-seqlens, or --input with it")
    page = arguments.get("page_size") or 1
    defaults = {"batch_size": len(lengths), "max_seqlen_q": 1, "build": detect_build().build}
    defaults["max_seqlen_k"] = -(-max(lengths, default=0) // page) * page
    arguments = defaults | arguments
    if missing := [name for name in ("num_heads", "num_heads_k", "headdim") if arguments.get(name) is None]:
        raise ValueError(f"{', '.join(missing)} needed: give --model, or --{missing[0].replace('_', '-')} and so on")
    if lengths and max(lengths) > arguments["max_seqlen_k"]:
        raise ValueError(
            f"max_seqlen_k must hold the longest sequence, {max(lengths)}, got {arguments['max_seqlen_k']}"
        )
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: there is no CUDA GPU here")
    for name in LengthTensors._fields:
        if arguments.get(name) is not None:
            lengths = torch.tensor(arguments[name], dtype=torch.int64)
            if lengths.numel() and lengths.max() >= 2**31:
                raise ValueError(f"{name} must be below {2**31}, got {lengths.max()}")
            arguments[name] = lengths.to(device, torch.int32)
    dtype = str(arguments.get("qkv_dtype", "bfloat16"))
    arguments["qkv_dtype"] = getattr(torch, dtype, dtype)
    return arguments


def _where(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA: the Triton kernel"
    return "this machine's CPU, as if for an H100 SXM or H200: the NumPy model"


def _show(options: argparse.Namespace, explanation: Explanation, arguments: dict[str, Any]) -> None:
    check = not getattr(options, "no_check", False)
    if options.json:
        lines = list(checks(explanation, arguments)) if check else []
        print(json.dumps(explanation.as_json() | {"checks": lines}))
        return
    model = f"{options.model}, tensor parallel {options.tp}: " if options.model else ""
    p = explanation.problem
    print(f"runs on     {_where(arguments['cache_seqlens'].device)}")
    heads = f"{p.num_heads}/{p.num_heads_k} q/KV heads, head dim {p.headdim}/{p.value_headdim}"
    print(f"batch       {model}{heads}, {p.qkv_dtype}")
    print(explanation.as_text(options.all))
    print()
    if check:
        for line in checks(explanation, arguments):
            print(line, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0, or 1 where a check failed, or 2 with one line on stderr for what cannot be done."""
    parser = _parser()
    options = parser.parse_args(argv)
    allow_interpreter()
    try:
        if options.command == "tune":
            run_tune(options, lambda line: print(line, flush=True))
            return 0
        arguments = _call_arguments(options)
        reason = detect_build().reason if options.build is None else "given"
        explanation = explain(arguments, reason)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        parser.error(_one_line(error))
    try:
        _show(options, explanation, arguments)
        sys.stdout.flush()
    except MismatchError as error:
        sys.stderr.write(f"fa3-metadata: check failed: {error}\n")
        return 1
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
