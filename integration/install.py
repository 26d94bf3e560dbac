"""Put our functions into an installed FA3 package, and take them out again."""

from __future__ import annotations

import functools
import gc
import logging
import sys
import threading
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

from .api import get_scheduler_metadata
from .installed import detect_build, provider_of
from .settings import DISABLE_VARIABLE, is_disabled
from .triton_kernels.builds import package_of, rules_for
from .triton_kernels.problem import DEFAULT_PARTIAL_BYTES
from .wrapper import SchedulePolicy, wrapping_of
from .wrapper import wrap_forward as wrap

_log = logging.getLogger("fa3_metadata")
_lock = threading.RLock()
_MISSING = object()
_ELSEWHERE = "an object or dict that keeps it"


@dataclass(frozen=True)
class Change:
    """One name that `install` put into a namespace."""

    where: str  # the module that the namespace is of, or _ELSEWHERE
    namespace: dict[str, Any]
    name: str
    before: object  # _MISSING: there was none
    after: object


_changes: list[Change] = []


def install(
    wrap_forward: bool = False,
    build: str | None = None,
    policy: str = "fa3",
    *,
    batch_invariant: bool = False,
    max_partial_bytes: int = DEFAULT_PARTIAL_BYTES,
) -> str:
    """Make the installed FA3 package able to make metadata; returns what was done, in words (also logged).

    Puts `get_scheduler_metadata` into the `sgl_kernel.flash_attn` of builds that lack it, so that engines which
    import it from there find it. With `wrap_forward` it also replaces the forward (`flash_attn_with_kvcache`, or
    vLLM's `flash_attn_varlen_func`) by `wrap_forward(forward)`, in its own module and wherever it is kept under its
    name already, be it in a module, an object or a dict (SGLang remembers it in one after its first call), for engine
    versions that never make metadata themselves. `policy` and what goes with it are those of that wrapper. The function
    that is put in stays FA3's: an engine that calls it hands the forward no other bound of splits.

    Idempotent, reversible by `uninstall`, safe from several threads. Does nothing, and says so, where there is
    nothing to do or where the environment variable FA3_METADATA_DISABLE is set to anything but 0.

    Raises:
        RuntimeError: no package of `build` is installed, or it does not load.
        ValueError: `build` is not supported; `policy` is not valid, or is given without `wrap_forward`; something is
            installed already with another policy, or for a build that behaves otherwise.
    """
    chosen = SchedulePolicy(policy, batch_invariant, max_partial_bytes)
    if chosen.policy != "fa3" and not wrap_forward:
        raise ValueError(f'policy must be "fa3" without wrap_forward=True, got {policy!r}')
    if is_disabled():
        return _say(f"nothing installed: {DISABLE_VARIABLE} is set")
    name = detect_build().build if build is None else build
    rules_for(name)
    provider = provider_of(name)
    try:
        module = import_module(provider.module)
    except (ImportError, OSError) as error:
        raise RuntimeError(f"install() needs {package_of(name)}, which does not load here: {error}") from error
    done = []
    with _lock:
        forward = getattr(module, provider.forward)
        theirs = wrapping_of(forward)
        if wrap_forward and theirs is not None:
            theirs.check(chosen, name)
        there = getattr(module, "get_scheduler_metadata", None)
        installed_for = _installed_for(there)
        if installed_for is not None and rules_for(installed_for) is not rules_for(name):
            raise ValueError(f"build must be like {installed_for}, for which ours is installed already, got {name}")
        if there is None:
            made = functools.partial(get_scheduler_metadata, build=name)
            functools.update_wrapper(made, get_scheduler_metadata)
            _put(_Kept(provider.module, vars(module)), "get_scheduler_metadata", made)
            done.append(f"put get_scheduler_metadata into {provider.module}")
        if wrap_forward and theirs is None:
            places = _kept(provider.forward, forward)
            wrapped = wrap(forward, name, policy, batch_invariant=batch_invariant, max_partial_bytes=max_partial_bytes)
            for place in places:
                _put(place, provider.forward, wrapped)
            under = "" if policy == "fa3" else f", policy {policy}"
            done.append(f"wrapped {provider.forward} in {_where(places)}{under}")
    return _say(f"{name}: " + ("; ".join(done) if done else "nothing to do, everything asked for is already there"))


def uninstall() -> str:
    """Take back what `install` did; returns that in words. Names that somebody else has replaced since are left."""
    with _lock:
        undone, left = [], []
        while _changes:
            change = _changes.pop()
            where = f"{change.where}.{change.name}"
            if change.namespace.get(change.name, _MISSING) is not change.after:
                left.append(where)
            elif change.before is _MISSING:
                del change.namespace[change.name]
                undone.append(where)
            else:
                change.namespace[change.name] = change.before
                undone.append(where)
    said = f"took back {', '.join(undone)}" if undone else "nothing was installed"
    return _say(said + (f"; left {', '.join(left)}, replaced since" if left else ""))


def _installed_for(function: Any) -> str | None:
    """The build for which `install` put this function in; None: it is not ours."""
    is_ours = isinstance(function, functools.partial) and function.func is get_scheduler_metadata
    return function.keywords["build"] if is_ours else None


def installed_names() -> list[str]:
    """Where `install` has put functions of ours, as "module.name"."""
    with _lock:
        return [f"{change.where}.{change.name}" for change in _changes]


class _Kept(NamedTuple):
    """A namespace that keeps a function under its name."""

    where: str
    namespace: dict[str, Any]


def _put(place: _Kept, name: str, value: Any) -> None:
    _changes.append(Change(*place, name, place.namespace.get(name, _MISSING), value))
    place.namespace[name] = value


def _kept(name: str, value: object) -> list[_Kept]:
    """Every namespace that has this very object under this name: of the loaded modules, then of others."""
    loaded = [module for module in list(sys.modules.values()) if isinstance(module, ModuleType)]
    found = [_Kept(module.__name__, vars(module)) for module in loaded if vars(module).get(name) is value]
    known = {id(one.namespace) for one in found}
    for holder in gc.get_referrers(value):
        namespace = holder if type(holder) is dict else getattr(holder, "__dict__", None)
        if type(namespace) is dict and namespace.get(name) is value and id(namespace) not in known:
            known.add(id(namespace))
            found.append(_Kept(_ELSEWHERE, namespace))
    return found


def _where(places: list[_Kept]) -> str:
    """In words, objects and dicts by their number."""
    others = sum(place.where == _ELSEWHERE for place in places)
    said = [place.where for place in places if place.where != _ELSEWHERE]
    return ", ".join(said + ([f"{others} more that keep it"] if others else []))


def _say(text: str) -> str:
    _log.info("%s", text)
    return text
