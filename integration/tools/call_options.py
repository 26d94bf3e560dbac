"""From the command line, or a file, to the arguments of `get_scheduler_metadata`."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..api import get_scheduler_metadata
from ..arguments import DEFAULT_ARCH, DEFAULT_NUM_SMS, LengthTensors
from ..installed import DetectedBuild, detect_build
from ..triton_kernels.builds import DEFAULT_BUILD, RELEASES, package_of
from ..triton_kernels.problem import POLICIES
from .cards import CARDS, Card, find_card
from .lengths import checked_lengths, parse_lengths
from .models import MODELS

INTEGERS = (
    "num-heads", "num-heads-k", "headdim", "headdim-v", "max-seqlen-q", "max-seqlen-k", "page-size", "attention-chunk",
    "num-splits", "sm-margin", "max-seqlen-k-new", "arch", "num-sms",
)  # fmt: skip
_KNOWN = frozenset(inspect.signature(get_scheduler_metadata).parameters) - {"out", "backend"}


@dataclass(frozen=True)
class Engine:
    """What an engine calls FA3 with, as it is configured out of the box, in a decode step of CUDA graphs."""

    packages: tuple[str, ...]  # that bring its FA3
    build: str  # where none of them is installed
    arguments: dict[str, Any]
    words: str


ENGINES = {
    "sglang": Engine(
        ("sglang-kernel", "sgl-kernel"), DEFAULT_BUILD, {"page_size": 1, "causal": True, "num_splits": 0},
        "pages of 1 token, causal, num_splits 0: FA3's own bound",
    ),
    "vllm": Engine(
        ("vllm",), f"vllm-{[r.newest for r in RELEASES if r.package == 'vllm'][-1]}",
        {"page_size": 16, "causal": True, "num_splits": 32},
        "pages of 16 tokens, causal, num_splits 32: its bound in CUDA graphs; outside of them it is 0",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A call to explain."""

    arguments: dict[str, Any]  # of get_scheduler_metadata
    reason: str  # why this build
    card: Card | None  # the GPU that was asked for; None: the one here, or what stands in for it


def joined(arguments: Sequence[str]) -> list[str]:
    """The command line with "--window-size -1,-1" as one word: argparse takes "-1,-1" for an option."""
    found: list[str] = []
    for one in arguments:
        if found and re.match(r"-\d", one) and re.fullmatch(r"--[a-z][a-z-]*", found[-1]):
            found[-1] += "=" + one
        else:
            found.append(one)
    return found


def _window(text: str) -> tuple[int, int]:
    try:
        left, right = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be LEFT,RIGHT, two integers, got {text!r}") from None
    return left, right


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """What `demo`, `explain` and others ask alike."""
    parser.add_argument("--model", choices=sorted(MODELS), help="heads and head dims of a model")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks that share the model's heads")
    parser.add_argument("--build", help='FA3 build, such as "vllm-0.33.0" (default: what is installed)')
    parser.add_argument("--policy", choices=POLICIES, help="fa3: FA3's own schedule (default); balanced: ours")
    parser.add_argument(
        "--batch-invariant", action="store_const", const=True, help="balanced: the same bits in any batch"
    )
    parser.add_argument("--gpu", help=f"explain for this card: {', '.join(CARDS)} (default: the one here, or an H200)")


def add_explain_options(parser: argparse.ArgumentParser) -> None:
    """The arguments of a call."""
    parser.add_argument("--cache-seqlens", help="tokens in each sequence's cache: 64k,1023x256")
    parser.add_argument("--input", type=pathlib.Path, help="JSON object of get_scheduler_metadata's arguments, by name")
    parser.add_argument(
        "--engine", choices=sorted(ENGINES), help="pages, mask, build and bound as this engine has them"
    )
    for name in INTEGERS:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--qkv-dtype", choices=["bfloat16", "float16", "float8_e4m3fn"])
    parser.add_argument("--window-size", type=_window, metavar="LEFT,RIGHT", help="visible tokens; -1: unlimited")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction)
    parser.add_argument("--has-softcap", action="store_const", const=True)
    parser.add_argument("--pack-gqa", action=argparse.BooleanOptionalAction)


def read_input(path: pathlib.Path) -> dict[str, Any]:
    """The arguments in a JSON file. Raises `ValueError`, naming the file, for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object of arguments by name")
    for name in found:
        if name not in _KNOWN:
            near = difflib.get_close_matches(name, _KNOWN, 1)
            raise ValueError(f"{path}: there is no argument {name!r}" + (f"; is {near[0]} meant?" if near else ""))
    if isinstance(window := found.get("window_size"), list):
        found["window_size"] = tuple(window)
    for name in LengthTensors._fields:
        if found.get(name) is not None:
            try:
                found[name] = checked_lengths(found[name], name)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
    return found


def build_of(given: str | None, engine: str | None) -> DetectedBuild:
    """The build to explain, and why."""
    if given is not None:
        return DetectedBuild(given, "given")
    found = detect_build()
    if engine is None:
        return found
    chosen = ENGINES[engine]
    try:
        if package_of(found.build) in chosen.packages and "default" not in found.reason:
            return found
    except ValueError:
        pass
    return DetectedBuild(chosen.build, f"{engine}'s FA3; {' or '.join(chosen.packages)} is not what is installed")


def call_of(options: argparse.Namespace) -> Call:
    """The call that the options ask for: from the engine, the JSON file, the model, the options, in rising order."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    engine = given.get("engine")
    arguments: dict[str, Any] = dict(ENGINES[engine].arguments) if engine else {}
    if path := given.get("input"):
        arguments |= read_input(path)
    if model := given.get("model"):
        shard = MODELS[model].shard(options.tp)
        arguments |= {
            "num_heads": shard.num_heads, "num_heads_k": shard.num_heads_k, "headdim": shard.headdim,
            "headdim_v": shard.headdim_v, "window_size": shard.window_size,
        }  # fmt: skip
    arguments |= {name: value for name, value in given.items() if name in _KNOWN}
    card = find_card(options.gpu) if options.gpu else None
    if card is not None:
        arguments = {"arch": card.arch, "num_sms": card.num_sms} | arguments
    if isinstance(lengths := arguments.get("cache_seqlens"), str):
        arguments["cache_seqlens"] = lengths = parse_lengths(lengths)
    if not isinstance(lengths, list):
        raise ValueError("cache_seqlens is needed: give --cache-seqlens, or --input with it")
    page = arguments.get("page_size") or 1
    build = build_of(arguments.get("build"), engine)
    defaults = {"batch_size": len(lengths), "max_seqlen_q": 1, "build": build.build}
    if type(page) is int and page > 0:
        defaults["max_seqlen_k"] = -(-max(lengths, default=0) // page) * page
    arguments = defaults | arguments
    if missing := [name for name in ("num_heads", "num_heads_k", "headdim") if arguments.get(name) is None]:
        raise ValueError(f"{', '.join(missing)} needed: give --model, or --{missing[0].replace('_', '-')} and so on")
    if lengths and type(most := arguments.get("max_seqlen_k", 0)) is int and max(lengths) > most:
        raise ValueError(f"max_seqlen_k must hold the longest sequence, {max(lengths)}, got {most}")
    # Another card's schedule is none that a GPU here could be asked for.
    elsewhere = card is not None or "arch" in arguments or "num_sms" in arguments
    device = options.device or ("cuda" if torch.cuda.is_available() and not elsewhere else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: there is no CUDA GPU here")
    for name in LengthTensors._fields:
        if arguments.get(name) is not None:
            arguments[name] = torch.tensor(arguments[name], dtype=torch.int32, device=device)
    dtype = str(arguments.get("qkv_dtype", "bfloat16"))
    arguments["qkv_dtype"] = getattr(torch, dtype, dtype)
    return Call(arguments, build.reason, card)


def where(call: Call) -> str:
    """What it runs on, in words."""
    device = call.arguments["cache_seqlens"].device
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA: the Triton kernel"
    arch, sms = call.arguments.get("arch"), call.arguments.get("num_sms")
    if call.card is not None and (arch, sms) == (call.card.arch, call.card.num_sms):
        stands_for = f"an {call.card.name} ({call.card.num_sms} SMs, sm_{call.card.arch})"
    elif arch is None and sms is None:
        stands_for = "an H100 SXM or H200"
    else:
        stands_for = f"a GPU of {sms or DEFAULT_NUM_SMS} SMs, sm_{arch or DEFAULT_ARCH}"
    return f"this machine's CPU, as if for {stands_for}: the NumPy model"
