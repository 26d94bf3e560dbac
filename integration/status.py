"""What is installed here, and what of it is attached to, or why not: for `fa3-metadata doctor`, and for logs."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch

from .api import get_scheduler_metadata, metadata_layout, unpack_metadata
from .engines import plugins, sglang_reach
from .engines.reach import Reach
from .engines.sglang_names import version_numbers
from .install import installed_names
from .installed import SEARCH_ORDER, detect_build, installed_version, resolve_build
from .settings import DISABLE_VARIABLE, VARIABLES, is_disabled, problems

PLUGIN = "fa3_metadata"
# Engine -> (group of its plugins, the variable that names those to load).
_PLUGINS = {"sglang": ("sglang.srt.plugins", "SGLANG_PLUGINS"), "vllm": ("vllm.general_plugins", "VLLM_PLUGINS")}
_FIRST_WITH_PLUGINS = {"sglang": (0, 5, 11)}
_LENGTHS = [65536, 1, 700, 0, 4096]


def status(check: bool = False) -> dict[str, Any]:
    """What is installed, attached, and switched off, in JSON's types.

    Imports neither engine, and initialises no CUDA but with `check`, which launches the kernel once.

    | key | value |
    |---|---|
    | `versions` | of fa3_metadata, Python, torch and the CUDA that it is built for, Triton, NumPy |
    | `gpu` | name, driver, arch (90) and number of SMs of the first GPU, None each where it is not known; or None |
    | `engines` | for "sglang" and "vllm": version, plugin, would_attach and because, attached (None: not, here) |
    | `kernels` | package -> version, of those that hold an FA3 |
    | `build` | name, reason, and rules (None: not supported, and why in error) |
    | `disabled` | the variable that turns everything off, or None |
    | `settings` | for each variable: name, value (None: not set), default, problem (None: none) |
    | `installed` | where `install()` has put functions of ours |
    | `layers` | engine -> for each kind of layer: layers, in_graph, eagerly, because |
    | `check` | None, or with `check`: what ran, and whether it equals the NumPy model |
    """
    wrong = problems()
    return {
        "versions": _versions(),
        "gpu": _gpu(),
        "engines": {engine: _engine(engine) for engine in _PLUGINS},
        "kernels": {package: version for package in SEARCH_ORDER if (version := installed_version(package))},
        "build": _build(),
        "disabled": DISABLE_VARIABLE if is_disabled() else None,
        "settings": [*_settings(wrong), *_strangers(wrong)],
        "installed": installed_names(),
        "layers": {
            engine: [asdict(one) for one in _layers(engine)] for engine in _PLUGINS if installed_version(engine)
        },
        "check": tiny_launch() if check else None,
    }


def _versions() -> dict[str, str | None]:
    return {
        "fa3_metadata": installed_version("fa3-metadata"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "triton": installed_version("triton"),
        "numpy": installed_version("numpy"),
    }


def _gpu() -> dict[str, Any] | None:
    """Of the first GPU that is visible; from nvidia-smi, unless CUDA is initialised already."""
    if torch.cuda.is_initialized():
        facts = torch.cuda.get_device_properties(0)
        arch: int | None = 10 * facts.major + facts.minor
        return {"name": facts.name, "driver": _driver(), "arch": arch, "num_sms": facts.multi_processor_count}
    if plugins.no_cuda():
        return None
    name, arch = _nvidia_smi("name"), None
    if (capability := _nvidia_smi("compute_cap")) is not None:
        arch = int(capability.replace(".", ""))
    return {"name": name, "driver": _driver(), "arch": arch, "num_sms": None}


def _driver() -> str | None:
    return _nvidia_smi("driver_version")


def _nvidia_smi(what: str) -> str | None:
    """One fact of the first GPU; None where it cannot be told."""
    if (program := shutil.which("nvidia-smi")) is None:
        return None
    try:
        asked = [program, f"--query-gpu={what}", "--format=csv,noheader"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer[0].strip() if answer else None


def _build() -> dict[str, Any]:
    found = detect_build()
    try:
        rules, error = resolve_build(None)[1].name, None
    except ValueError as wrong:
        rules, error = None, str(wrong)
    return {"name": found.build, "reason": found.reason, "rules": rules, "error": error}


def _engine(engine: str) -> dict[str, Any]:
    version = installed_version(engine)
    reason = _why_not(engine, version)
    return {
        "version": version,
        "plugin": _plugin(engine, version),
        "would_attach": reason is None,
        "because": reason,
        "attached": _attached(engine),
    }


def _why_not(engine: str, version: str | None) -> str | None:
    """Why a process of this engine would not be attached to here."""
    if is_disabled():
        return f"{DISABLE_VARIABLE} is set"
    if version is None:
        return f"{engine} is not installed"
    if engine == "sglang":
        reason = sglang_reach.why_not(version)
    else:
        from .engines import vllm

        reason = vllm.why_not()[1]
    return reason or plugins.no_cuda()


def _plugin(engine: str, version: str | None) -> str:
    """Whether the engine runs our plugin, in words."""
    group, variable = _PLUGINS[engine]
    if version is None:
        return "no engine"
    if version_numbers(version) < _FIRST_WITH_PLUGINS.get(engine, ()):
        return f"no: {engine} {version} has no plugins; docs/sglang.md has the line for a script that starts it"
    if not any(found.name == PLUGIN for found in metadata.entry_points(group=group)):
        return "no: fa3-metadata is importable, but not installed with its entry points: pip install it again"
    allowed = os.environ.get(variable)
    if allowed is not None and (allowed or engine == "vllm") and PLUGIN not in map(str.strip, allowed.split(",")):
        return f"no: {variable} does not name {PLUGIN}"
    return "yes"


def _attached(engine: str) -> str | None:
    """What is attached in this process, in words. Imports nothing."""
    ours = sys.modules.get(f"{__package__}.engines.{engine}")
    if ours is None:
        return None
    return ours.attached_now()


def _layers(engine: str) -> list[Reach]:
    if engine == "sglang":
        return sglang_reach.reach()
    from .engines import vllm_reach

    return vllm_reach.reach()


def _settings(wrong: dict[str, str]) -> Iterator[dict[str, Any]]:
    for one in VARIABLES:
        value = os.environ.get(one.name) or None
        yield {"name": one.name, "value": value, "default": one.default, "problem": wrong.get(one.name)}


def _strangers(wrong: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Variables that are not ours, and look as if they were meant to be."""
    known = {one.name for one in VARIABLES}
    for name, problem in wrong.items():
        if name not in known:
            yield {"name": name, "value": os.environ.get(name), "default": None, "problem": problem}


def tiny_launch() -> dict[str, Any]:
    """One call of the kernel, compared with the NumPy model.

    {"ran": what ran in words, "equal": whether they are; None where nothing but the model can run, and why in "ran"}.
    On a GPU the kernel runs there; without one, in Triton's interpreter, if TRITON_INTERPRET=1 was set in time.
    """
    build = detect_build().build
    on_gpu = torch.cuda.is_available()
    lengths = torch.tensor(_LENGTHS, dtype=torch.int32, device="cuda" if on_gpu else "cpu")
    shape = {
        "batch_size": len(_LENGTHS), "max_seqlen_q": 1, "max_seqlen_k": max(_LENGTHS), "num_heads": 8,
        "num_heads_k": 1, "headdim": 128, "page_size": 64, "causal": True, "build": build,
    }  # fmt: skip
    where = "on the GPU" if on_gpu else "in Triton's interpreter, on the CPU"
    try:
        made = get_scheduler_metadata(cache_seqlens=lengths, backend="triton", **shape)  # type: ignore[arg-type]
    except (ImportError, RuntimeError, ValueError) as error:
        return {"ran": f"nothing but the NumPy model: {' '.join(str(error).split())}", "equal": None}
    model = get_scheduler_metadata(cache_seqlens=lengths, backend="reference", **shape)  # type: ignore[arg-type]
    layout = metadata_layout(cache_seqlens=lengths, **shape)  # type: ignore[arg-type]
    ours, theirs = (unpack_metadata(tensor, layout) for tensor in (made, model))
    equal = all(torch.equal(ours[row].cpu(), theirs[row].cpu()) for row in layout.rows)
    return {"ran": f"the Triton kernel {where}, for {build}", "equal": equal}
