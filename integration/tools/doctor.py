"""`fa3-metadata doctor`: what is installed, attached and switched off, and whether the kernel runs here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

from ..status import status
from .demo import MismatchError

_NAMES = {"sglang": "SGLang", "vllm": "vLLM"}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-check", action="store_true", help="launch nothing")


def run(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Print the report. Raises `MismatchError` where the kernel and the NumPy model differ."""
    found = status(check=not options.no_check)
    if options.json:
        say(json.dumps(found))
    else:
        for line in report(found):
            say(line)
    if found["check"] is not None and found["check"]["equal"] is False:
        raise MismatchError(f"{found['check']['ran']}, and the NumPy model differ")


def report(found: dict[str, Any]) -> Iterator[str]:
    """What `status()` says, a line at a time."""
    v, build = found["versions"], found["build"]
    cuda = f" for CUDA {v['cuda']}" if v["cuda"] else " without CUDA"
    yield f"installed   fa3-metadata {v['fa3_metadata']}, torch {v['torch']}{cuda}, Triton {v['triton'] or 'none'}, " \
          f"Python {v['python']}"  # fmt: skip
    yield f"gpu         {_gpu(found['gpu'])}"
    kernels = ", ".join(f"{package} {version}" for package, version in found["kernels"].items())
    yield f"kernels     {kernels or 'none'}"
    rules = f"rules of {build['rules']}" if build["rules"] else "not supported"
    yield f"build       {build['name']}, {rules}: {build['error'] or build['reason']}"
    if found["disabled"]:
        yield f"off         {found['disabled']} turns everything off"
    for one in found["settings"]:
        if one["problem"]:
            yield f"problem     {one['problem']}"
        elif one["value"] is not None:
            yield f"setting     {one['name']}={one['value']} (default: {one['default']})"
    for engine, facts in found["engines"].items():
        yield from _engine(_NAMES[engine], facts, found["layers"].get(engine, []))
    if found["installed"]:
        yield f"install()   {', '.join(found['installed'])}"
    if check := found["check"]:
        verdict = {True: "equal       ", False: "DIFFERENT   ", None: "skipped     "}[check["equal"]]
        yield "\n" + verdict + check["ran"] + ("" if check["equal"] is None else ", and the NumPy model, bit for bit")


def _gpu(facts: dict[str, Any] | None) -> str:
    if facts is None:
        return "none that is visible; the kernel runs in Triton's interpreter, and the engines would be left alone"
    known = [facts["name"] or "a GPU"]
    known += [f"sm_{facts['arch']}"] if facts["arch"] else []
    known += [f"{facts['num_sms']} SMs"] if facts["num_sms"] else []
    known += [f"driver {facts['driver']}"] if facts["driver"] else []
    return ", ".join(known)


def _engine(name: str, facts: dict[str, Any], layers: list[dict[str, str]]) -> Iterator[str]:
    if facts["version"] is None:
        yield f"engine      {name}: not installed"
        return
    would = "would be attached to" if facts["would_attach"] else f"would be left alone: {facts['because']}"
    yield f"\nengine      {name} {facts['version']} {would}"
    yield f"plugin      {facts['plugin']}"
    yield f"here        {facts['attached'] or 'nothing is attached in this process'}"
    if not layers:
        return
    if not facts["would_attach"] and any("ours" in one["in_graph"] for one in layers):
        yield "layers      of a process with a CUDA GPU:"
    names = ("layers", "in_graph", "eagerly")
    titles = {"layers": "layers", "in_graph": "in a CUDA graph", "eagerly": "eagerly"}
    widths = [max(len(titles[key]), *(len(one[key]) for one in layers)) for key in names]
    for one in [titles | {"because": "because"}, *layers]:
        cells = [one[key].ljust(width) for key, width in zip(names, widths, strict=True)]
        yield "  ".join(["  ", *cells, one["because"].splitlines()[0]])
