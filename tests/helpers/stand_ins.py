"""For source of others that is run by itself: names, values and objects of which next to nothing has been said."""

from __future__ import annotations

import ast
import builtins
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from bench.wheel_recordings import Recordings


class Anything:
    """What nobody has said anything about: false, empty, and whatever is asked of it; of a function a decorator."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else self

    def __getattr__(self, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: Any) -> Anything:
        return self

    def __bool__(self) -> bool:
        return False

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __mro_entries__(self, bases: Any) -> tuple[()]:
        return ()

    def __or__(self, other: Any) -> Anything:
        return self

    __ror__ = __or__


class Names(dict[str, Any]):
    """Of a module: what is not there is a builtin, or Anything."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, Anything())


class Given(SimpleNamespace):
    """What has been said of an object; all else of it is Anything."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


def run_source(source: str, module: str, keep: Callable[[ast.stmt], bool] | None = None, **known: Any) -> Names:
    """What a module's functions and classes, or the statements to `keep`, define, with these names `known`.

    Class bodies look up known names alone. `sys.modules` must have something of the module's name, for dataclasses.
    """
    tree = ast.parse(source)
    chosen = keep or (lambda node: isinstance(node, ast.FunctionDef | ast.ClassDef))
    tree.body = [node for node in tree.body if chosen(node)]
    names = Names(
        torch=torch, copy=copy, functools=functools, dataclass=dataclasses.dataclass, ClassVar=ClassVar,
        __name__=module, __builtins__=builtins, **known,
    )  # fmt: skip
    exec(compile("from __future__ import annotations\n" + ast.unparse(tree), module, "exec"), names)
    return names


def recorded_forward(build: str, calls: list[dict[str, Any]]) -> Any:
    """A forward with the parameters of this build's, which notes what it was called with, by name."""
    recorded = Recordings.load()
    package, version = build.rsplit("-", 1)
    text = recorded.texts[recorded.wheels[package][version]["forward_signature"] or ""]
    space: dict[str, Any] = {"calls": calls, "out_of": _out_of, "DEFAULT_FA_VERSION": 3}
    exec(f"def forward({text}):\n    calls.append(dict(locals()))\n    return out_of(calls[-1])", space)
    return space["forward"]


def _out_of(call: dict[str, Any]) -> Any:
    """Something with the shape of the output."""
    return next(call[name] for name in ("out", "qv", "q") if call.get(name) is not None)
