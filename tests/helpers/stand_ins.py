"""For source of others that is run by itself: names, values and objects of which next to nothing has been said."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any


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
