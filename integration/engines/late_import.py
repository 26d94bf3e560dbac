"""Act on a module when something else imports it: an engine's backends load kernels, so it must be the engine that
decides when, and in which of its processes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib import util
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Act = Callable[[ModuleType], object]
_lock = threading.RLock()


def when_imported(name: str, act: Act) -> Callable[[], None]:
    """`act(module)` once that module has been imported: now, if it has been already; returns what calls it off.

    What `act` raises, the import raises.
    """
    with _lock:
        if (module := sys.modules.get(name)) is not None and not _is_being_imported(module):
            act(module)
            return lambda: None
        waiting = _Waiting(name, act)
        sys.meta_path.insert(0, waiting)
    return waiting.leave


def _is_being_imported(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


class _Waiting(MetaPathFinder):
    """Finds nothing itself: of the module that it waits for, it has the loader tell when it has been executed."""

    def __init__(self, name: str, act: Act) -> None:
        self.name, self.act, self._is_asking = name, act, False

    def leave(self) -> None:
        with _lock:
            if self in sys.meta_path:
                sys.meta_path.remove(self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name or self._is_asking:
            return None
        self._is_asking = True
        try:
            spec = util.find_spec(name)  # by the finders that are there anyway
        finally:
            self._is_asking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_tell(module: ModuleType) -> None:
            execute(module)
            self.leave()
            self.act(module)

        spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign] # of this spec alone
        return spec
