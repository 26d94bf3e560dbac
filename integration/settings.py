"""The environment variables that fa3-metadata goes by: one table of them, and how they are read.

Those under `plugin` are what the plugins of SGLang and vLLM do, which are on once fa3-metadata is installed; functions
that are called from Python go by their arguments.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .triton_kernels.problem import POLICIES

PREFIX = "FA3_METADATA_"
DISABLE_VARIABLE = "FA3_METADATA_DISABLE"
POLICY_VARIABLE = "FA3_METADATA_POLICY"
BATCH_INVARIANT_VARIABLE = "FA3_METADATA_BATCH_INVARIANT"
IN_PLACE_VARIABLE = "FA3_METADATA_IN_PLACE"
STRICT_VARIABLE = "FA3_METADATA_STRICT"


@dataclass(frozen=True)
class Variable:
    """One environment variable. Set to nothing, it counts as not set."""

    name: str
    meaning: str
    default: str
    allowed: str  # in words, or the values, with " or " between them
    read_by: str  # "everything": every road to our metadata; "plugin"; else the module that reads it

    def problem(self, value: str) -> str | None:
        """What is wrong with a value, in words; None: nothing."""
        values = self.allowed.split(" or ")
        if len(values) == 1 or value in values:
            return None
        return f"{self.name} must be {self.allowed}, got {value!r}"


_SWITCH = "0 or 1"
VARIABLES = (
    Variable(
        DISABLE_VARIABLE, "turns every road off: both plugins, both adapters, `install()` and the wrapped forward", "0",
        "0; anything else turns it off", "everything",
    ),
    Variable(
        POLICY_VARIABLE, "the schedule that the plugins ask for: FA3's own, or ours", "fa3", " or ".join(POLICIES),
        "plugin",
    ),
    Variable(
        BATCH_INVARIANT_VARIABLE,
        "SGLang: the same bits whatever else is in the batch; needs FA3_METADATA_POLICY=balanced",
        "0", _SWITCH, "plugin",
    ),
    Variable(
        IN_PLACE_VARIABLE, "vLLM: metadata is made in the buffer that CUDA graphs read", "0", _SWITCH, "plugin",
    ),
    Variable(
        STRICT_VARIABLE, "a plugin raises where it would leave an engine alone: for tests", "0", _SWITCH, "plugin",
    ),
    Variable(
        "FA3_METADATA_BUILD", "the FA3 build that metadata is made for", "what is installed",
        'a package and its version, such as "vllm-0.33.0"', "installed.py",
    ),
    Variable(
        "FA3_METADATA_CACHE", "the folder of tuned tables", "fa3_metadata in XDG_CACHE_HOME or ~/.cache", "a folder",
        "triton_kernels/tables.py",
    ),
    Variable(
        "FA3_METADATA_TRACE", "records an engine's steps to this file, for `fa3-metadata explain --trace`", "none",
        "a file", "trace.py",
    ),
    Variable(
        "FA3_METADATA_EARLY_LAUNCH", "start while the kernel before it ends (programmatic dependent launch)", "1",
        _SWITCH, "triton_kernels/launch.py",
    ),
    Variable(
        "FA3_METADATA_DRIVER_LAUNCH", "launch through the driver; 0: through Triton, with its hooks", "1", _SWITCH,
        "triton_kernels/launch.py",
    ),
)  # fmt: skip


def is_disabled() -> bool:
    """Whether FA3_METADATA_DISABLE is set to anything but 0."""
    return os.environ.get(DISABLE_VARIABLE, "0") not in ("", "0")


@dataclass(frozen=True)
class Settings:
    """What the plugins do."""

    policy: str = "fa3"
    batch_invariant: bool = False
    in_place: bool = False
    strict: bool = False


def read_settings(warn: Callable[[str], Any], environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of the plugins, by the environment.

    What is wrong with a value, `warn` is told, in a line that names the variable and what is allowed; the default
    stands in for it. Raises `ValueError` with that line instead where FA3_METADATA_STRICT is 1.
    """
    environ = os.environ if environ is None else environ
    given = {one.name: environ[one.name] for one in VARIABLES if environ.get(one.name)}
    strict = given.get(STRICT_VARIABLE) == "1"
    wrong = problems(environ)
    if wrong and strict:
        raise ValueError("; ".join(wrong.values()))
    for line in wrong.values():
        warn(line)
    right = {name: value for name, value in given.items() if name not in wrong}
    return Settings(
        policy=right.get(POLICY_VARIABLE, "fa3"),
        batch_invariant=right.get(BATCH_INVARIANT_VARIABLE) == "1",
        in_place=right.get(IN_PLACE_VARIABLE) == "1",
        strict=strict,
    )


def problems(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variable -> what is wrong with its value, or with its name."""
    environ = os.environ if environ is None else environ
    known = {one.name: one for one in VARIABLES}
    found = {}
    for name, value in sorted(environ.items()):
        if name in known and value and (problem := known[name].problem(value)):
            found[name] = problem
        elif name.startswith(PREFIX) and name not in known and (near := _nearest(name)):
            found[name] = f"{name} is not a variable of fa3-metadata: {near} is"
    if environ.get(BATCH_INVARIANT_VARIABLE) == "1" and environ.get(POLICY_VARIABLE) != "balanced":
        found[BATCH_INVARIANT_VARIABLE] = (
            f"{BATCH_INVARIANT_VARIABLE} must be 0 unless {POLICY_VARIABLE} is balanced, got '1'"
        )
    return found


def _nearest(name: str) -> str | None:
    """The variable that was meant, by its name without what all begin with."""
    endings = [one.name.removeprefix(PREFIX) for one in VARIABLES]
    near = difflib.get_close_matches(name.removeprefix(PREFIX), endings, n=1, cutoff=0.75)
    return PREFIX + near[0] if near else None


def as_table() -> str:
    """The variables, as a table in Markdown."""
    lines = ["| variable | meaning | default | allowed |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| `{v.name}` | {v.meaning} | {v.default} | {v.allowed} |" for v in VARIABLES])


if __name__ == "__main__":
    print(as_table())
