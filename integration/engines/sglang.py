"""SGLang: its FlashAttention-3 backends with our scheduler metadata. docs/sglang.md says what is covered.

Three things are done to a backend. The forward that it calls is wrapped (`wrapper.wrap_forward`), so that the layers of
a captured CUDA graph share metadata that a node of the same graph makes. Its `init_forward_metadata` begins a batch
that is run eagerly, within which its layers share likewise (sglang_step.py). And where SGLang has a precompute of its
own (0.5.11 on), its maker is replaced: under FA3's policy, eager decode gets our metadata from it, made for the page
table that the forward will see; in all else the maker answers None, which leaves the layers to the wrapper and drops
SGLang's make, copy and zero fill before each replay.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from importlib import import_module, util
from operator import attrgetter
from types import ModuleType
from typing import Any
from weakref import WeakSet

import torch

from ..api import get_scheduler_metadata
from ..arguments import device_facts
from ..installed import resolve_build
from ..settings import DISABLE_VARIABLE, is_disabled, read_settings
from ..wrapper import SchedulePolicy, wrap_forward
from .late_import import when_imported
from .once import warn_once
from .sglang_names import ALL_LAYOUTS, LAYOUTS, SGLangNames
from .sglang_replays import PREPARES, Replays
from .sglang_step import EagerSteps

_log = logging.getLogger("fa3_metadata")
_MARK = "_fa3_metadata_attached"
_MAKER = "_get_scheduler_metadata"
_LAYERS = ("forward_decode", "forward_extend")
_live: WeakSet[Attached] = WeakSet()


class Attached:
    """A backend that uses our metadata, until `detach()`; with `names` None one that is left alone."""

    def __init__(self, backend: Any, names: SGLangNames | None, build: str | None, policy: SchedulePolicy) -> None:
        self.backend, self.names, self.build, self.policy = backend, names, build, policy
        self._forwards: list[_WrappedForward] = []
        if names is not None:
            self._put(names)

    def _put(self, names: SGLangNames) -> None:
        backend, build, policy = self.backend, self.build, self.policy
        self._is_eager = False
        self._asked: dict[str, Any] | None = None  # what the maker was asked while an eager batch was prepared
        self._steps = EagerSteps(backend, alone_too=policy.policy != "fa3")
        self._forwards = [_WrappedForward.at(*_place(name, backend, names), build, policy) for name in names.wrapped]
        for forward in self._forwards:
            forward.hold()
        ours: dict[str, Callable[..., Any]] = {"init_forward_metadata": self._init_forward_metadata}
        ours |= {name: self._steps.of_layer(getattr(backend, name)) for name in _LAYERS}
        self._replays = Replays(backend)
        prepares = {name: getattr(backend, name) for name in PREPARES if hasattr(backend, name)}
        ours |= {name: self._replays.of_prepare(name, prepare) for name, prepare in prepares.items()}
        if names.maker_keywords:
            ours[_MAKER] = self._make_or_leave
        self._ours = ours
        self._theirs = {name: getattr(backend, name) for name in ours}
        self._before = {name: vars(backend)[name] for name in ours if name in vars(backend)}
        vars(backend).update(ours)
        setattr(backend, _MARK, self)
        _live.add(self)

    def detach(self) -> None:
        """Undo. Graphs captured meanwhile go on making their own metadata. Does nothing the second time.

        Raises `RuntimeError`, with nothing undone, where somebody has replaced one of our functions since.
        """
        if vars(self.backend).get(_MARK) is not self:
            return
        replaced = [name for name, ours in self._ours.items() if vars(self.backend).get(name) is not ours]
        replaced += [held.name for held in self._forwards if getattr(held.owner, held.name) is not held.ours]
        if replaced:
            raise RuntimeError(f"{', '.join(replaced)} must be as attach() left it, but has been replaced since")
        for name in self._ours:
            delattr(self.backend, name)
        vars(self.backend).update(self._before)
        for forward in self._forwards:
            forward.release()
        delattr(self.backend, _MARK)
        _live.discard(self)

    def _init_forward_metadata(self, *args: Any, **kwargs: Any) -> None:
        """SGLang's, for a batch that runs eagerly; then the metadata, now that the page table is final."""
        self._replays.tell()
        self._asked, self._is_eager = None, True
        try:
            self._theirs["init_forward_metadata"](*args, **kwargs)
        finally:
            self._is_eager = False
        if self._asked is not None:
            metadata = self.backend.forward_metadata
            metadata.scheduler_metadata = self._make(self._asked, metadata)
            self._asked = None
        self._steps.begin()

    def _make_or_leave(self, **asked: Any) -> torch.Tensor | None:
        """In place of SGLang's maker, which it calls for decode without speculation, and not for MLA.

        Layers that are handed their metadata cost the host least. Under another policy they are not: the bound of its
        splits is ours, and the wrapped forward alone can say so to FA3.
        """
        if self._is_eager:
            self._asked = asked if self.policy.policy == "fa3" else None
            return None
        metadata = self.backend.decode_cuda_graph_metadata.get(asked["batch_size"])
        if metadata is None or metadata.scheduler_metadata is None:
            return None  # under capture: the wrapped forward makes it inside the graph
        return self._theirs[_MAKER](**asked)  # captured before we came: it reads SGLang's buffer

    def _make(self, asked: dict[str, Any], metadata: Any) -> torch.Tensor | None:
        """The metadata of `asked` for the tensors that the forward will be given.

        SGLang asks for the longest sequence of the batch, FA3 looks at the width of the page table: a different
        number of splits may follow, and more of them than the forward has room for must never get there.
        """
        if device_facts(metadata.cache_seqlens_int32.device, None, None)[0] < 90:
            # sm_8x sizes the tensor by num_splits, and SGLang hands the forward 0 (SGLang issue 22800): layers without
            # metadata are the wrapper's, which tells the forward.
            return None
        asked = asked | {
            "cache_seqlens": metadata.cache_seqlens_int32,
            "cu_seqlens_q": metadata.cu_seqlens_q,
            "max_seqlen_k": metadata.page_table.shape[1] * self.backend.page_size,
        }
        made = get_scheduler_metadata(**asked, build=self.build, forward_is_told=False)
        shape = (asked["num_heads"], asked["num_heads_k"], asked["headdim"], asked["headdim"])
        total_q = asked["batch_size"] * asked["max_seqlen_q"]  # what the bound on splits of some builds counts
        setattr(made, _MARK, (*shape, total_q if resolve_build(self.build)[1].bound_depends_on_batch else None))
        return made


def attach(backend: Any, build: str | None = None, policy: str = "fa3", *, batch_invariant: bool = False) -> Attached:
    """Make a live FlashAttention-3 backend of SGLang use our scheduler metadata. Idempotent.

    Best before CUDA graphs are captured: those captured earlier keep what they have. Where SGLang keeps the forward in
    a module, the other FA3 backends of the process use the wrapped one too. Where the environment variable
    FA3_METADATA_DISABLE is set to anything but 0 the backend is left alone.

    Args:
        backend: the object, of a class in `ALL_LAYOUTS` (sglang_names.py); of a composed backend, the one inside.
        build: the FA3 build behind its forward; None: the detected one.
        policy, batch_invariant: as for `get_scheduler_metadata`.

    Raises:
        TypeError: `backend` is something else.
        ValueError: `policy` is not known or does not go with `batch_invariant`, or the backend or its forward is
            attached already with another one.
        RuntimeError: it runs another FlashAttention, or an SGLang whose names differ from those in `ALL_LAYOUTS`.
    """
    chosen = SchedulePolicy(policy, batch_invariant)
    if attached := vars(backend).get(_MARK) if hasattr(backend, "__dict__") else None:
        _check_policy(attached.policy, chosen, "with which backend is attached")
        return attached
    if is_disabled():
        _log.info("scheduler metadata: SGLang is left alone, since %s is set", DISABLE_VARIABLE)
        return Attached(backend, None, build, chosen)
    names = _names_of(backend)
    attached = Attached(backend, names, build, chosen)
    if any(forward.holders == 1 for forward in attached._forwards):
        _log.info(
            "scheduler metadata: attached to the %s of SGLang %s%s", names.backend, names.versions, _under(chosen)
        )
    return attached


def _names_of(backend: Any) -> SGLangNames:
    """The layout that `backend` fits; raises what `attach` says."""
    kind = type(backend)
    known = {(names.module, names.backend): names for names in ALL_LAYOUTS}
    if (kind.__module__, kind.__qualname__) not in known:
        allowed = ", ".join(".".join(one) for one in known)
        raise TypeError(f"backend must be {allowed}, got {kind.__module__}.{kind.__qualname__}")
    layouts = [names for names in ALL_LAYOUTS if (names.module, names.backend) == (kind.__module__, kind.__qualname__)]
    if (version := _version_of(backend, layouts[0])) != 3:
        raise RuntimeError(f"backend must run FlashAttention 3 ({layouts[0].version}), got {version!r}")
    has_marker = [names for names in layouts if hasattr(*_place(names.marker, backend, names))]
    if not has_marker:
        markers = ", ".join(dict.fromkeys(names.marker for names in layouts))
        raise RuntimeError(f"backend must have one of {markers}, got none: this SGLang is not supported")
    names = has_marker[0]
    if missing := _missing(names, backend):
        raise RuntimeError(
            f"backend must be like that of SGLang {names.versions}, got one without {', '.join(missing)}: "
            f"this SGLang is not supported"
        )
    if names.setting and not getattr(import_module(names.setting[0]).envs, names.setting[1]).get():
        raise RuntimeError(
            f"{names.setting[1]} must be true, so that the forward is the installed sglang-kernel's, got false"
        )
    return names


def _version_of(backend: Any, names: SGLangNames) -> Any:
    """The FlashAttention that a backend runs."""
    try:
        return 3 if names.version is None else attrgetter(names.version)(backend)
    except AttributeError:
        return None


def _check_policy(has: SchedulePolicy, wanted: SchedulePolicy, where: str) -> None:
    for name in ("policy", "batch_invariant"):
        ours, theirs = getattr(has, name), getattr(wanted, name)
        if ours != theirs:
            raise ValueError(f"{name} must be {ours!r}, {where}, got {theirs!r}")


def _under(policy: SchedulePolicy) -> str:
    if policy.policy == "fa3":
        return ""
    return f", policy {policy.policy}{', batch invariant' if policy.batch_invariant else ''}"


class _NewBackends:
    """The classes whose new backends are attached; those that SGLang has not imported are waited for."""

    def __init__(self, build: str | None, policy: SchedulePolicy, strict: bool) -> None:
        self.build, self.policy, self.strict = build, policy, strict
        self._hooked: list[tuple[Any, Any, Any]] = []  # class, its __init__, ours
        kinds = dict.fromkeys((names.module, names.backend) for names in ALL_LAYOUTS)
        self._waiting = [when_imported(module, functools.partial(self._hook, name)) for module, name in kinds]

    def _hook(self, name: str, module: ModuleType) -> None:
        kind = getattr(module, name, None)
        if kind is None:
            self._left_alone(f"{module.__name__} has no {name}: this SGLang is not supported")
            return
        if kind.__module__ != module.__name__:  # an old name of a class that is waited for where it is
            return
        original = kind.__init__

        @functools.wraps(original)
        def init_and_attach(backend: Any, *args: Any, **kwargs: Any) -> None:
            original(backend, *args, **kwargs)
            if type(backend) is kind:  # what derives from it, for other platforms, brings forwards of its own
                self._attach(backend)

        self._hooked.append((kind, original, init_and_attach))
        kind.__init__ = init_and_attach

    def _attach(self, backend: Any) -> None:
        try:
            attach(backend, self.build, self.policy.policy, batch_invariant=self.policy.batch_invariant)
        except (TypeError, ValueError, RuntimeError) as error:
            if self.strict:
                raise
            self._left_alone(f"{type(backend).__name__}: {error}")

    def _left_alone(self, reason: str) -> None:
        if self.strict:
            raise RuntimeError(reason)
        warn_once(_log, f"SGLang is left alone, which works as without fa3-metadata: {reason}")

    def undo(self) -> None:
        global _new_backends
        if _new_backends is not self:
            return
        _new_backends = None
        for call_off in self._waiting:
            call_off()
        for kind, original, ours in self._hooked:
            if kind.__init__ is ours:
                kind.__init__ = original


_new_backends: _NewBackends | None = None


def attach_new_backends(
    build: str | None = None,
    policy: str | None = None,
    *,
    batch_invariant: bool | None = None,
    strict: bool | None = None,
) -> Callable[[], None]:
    """`attach` every FlashAttention-3 backend that this process creates from now on. Idempotent.

    This is what the plugin does. Backends are created in SGLang's scheduler processes, so without plugins call it where
    those will run it: at the top level of the script that launches the server (docs/sglang.md). It imports nothing of
    SGLang: a module is waited for. Returns what undoes it for later backends. A backend that cannot be attached to, one
    that runs FlashAttention 4 for instance, is left alone, with a warning that says why; with `strict` creating it
    raises what `attach` raises. Does nothing where the environment variable FA3_METADATA_DISABLE is set to anything
    but 0.

    `policy`, `batch_invariant` and `strict` are None for what the environment says (settings.py lists the variables).

    Raises:
        ModuleNotFoundError: SGLang is not installed.
        ValueError: `policy` is not known, does not go with `batch_invariant`, or is not that of an earlier call.
    """
    global _new_backends
    settings = read_settings(functools.partial(warn_once, _log))
    chosen = SchedulePolicy(
        settings.policy if policy is None else policy,
        settings.batch_invariant and policy is None if batch_invariant is None else batch_invariant,
    )
    if is_disabled():
        _log.info("scheduler metadata: SGLang is left alone, since %s is set", DISABLE_VARIABLE)
        return lambda: None
    if _new_backends is not None:
        _check_policy(_new_backends.policy, chosen, "with which new backends are attached")
        return _new_backends.undo
    if not _is_installed("sglang"):
        raise ModuleNotFoundError("SGLang is not installed: there are no backends to attach to", name="sglang")
    _new_backends = _NewBackends(build, chosen, settings.strict if strict is None else strict)
    return _new_backends.undo


def attached_now() -> str | None:
    """What is attached in this process, in words; None: nothing."""
    said = [f"{one.names.backend}{_under(one.policy)}" for one in list(_live) if one.names is not None]
    said = [f"{said.count(one)} x {one}" for one in sorted(set(said))]
    if _new_backends is not None:
        said.append(f"every new backend{_under(_new_backends.policy)}")
    return "; ".join(said) or None


def _is_installed(package: str) -> bool:
    try:
        return util.find_spec(package) is not None
    except ValueError:  # a module without a spec has been put in its place
        return True


def _place(name: str, backend: Any, names: SGLangNames) -> tuple[Any, str]:
    """(owner, attribute) of "self.NAME" or "module.NAME"."""
    owner, _, attribute = name.partition(".")
    return backend if owner == "self" else import_module(names.where), attribute


def _missing(names: SGLangNames, backend: Any) -> list[str]:
    """What a live backend lacks of `names`."""
    wanted = [*names.wrapped, *(f"self.{name}" for name in (*names.attributes, *names.methods))]
    missing = [name for name in dict.fromkeys(wanted) if not hasattr(*_place(name, backend, names))]
    metadata = getattr(import_module(names.module), names.metadata, None)
    return missing + [f"{names.metadata}.{name}" for name in names.metadata_fields if not hasattr(metadata, name)]


class _WrappedForward:
    """A forward wrapped where `owner` keeps it, shared by the backends that hold it: the last one puts it back."""

    def __init__(self, owner: Any, name: str, build: str, policy: SchedulePolicy) -> None:
        self.owner, self.name, self.build, self.policy, self.holders = owner, name, build, policy, 0
        self.theirs: Callable[..., Any] = getattr(owner, name)
        ours = wrap_forward(self.theirs, build, policy.policy, batch_invariant=policy.batch_invariant)
        self.ours = _for_layers(self.theirs, ours)
        setattr(self.ours, _MARK, self)

    @classmethod
    def at(cls, owner: Any, name: str, build: str | None, policy: SchedulePolicy) -> _WrappedForward:
        """The one in place, else a new one. `ValueError` where the one in place is for another build or policy."""
        build = resolve_build(build)[0]
        found: _WrappedForward | None = getattr(getattr(owner, name), _MARK, None)
        if found is None:
            return cls(owner, name, build, policy)
        if found.build != build:
            raise ValueError(f"build must be {found.build!r}, for which {name} is wrapped already, got {build!r}")
        _check_policy(found.policy, policy, f"with which {name} is wrapped already")
        return found

    def hold(self) -> None:
        self.holders += 1
        setattr(self.owner, self.name, self.ours)

    def release(self) -> None:
        self.holders -= 1
        if not self.holders:
            setattr(self.owner, self.name, self.theirs)


def _for_layers(forward: Callable[..., Any], with_metadata: Callable[..., Any]) -> Callable[..., Any]:
    """`with_metadata`; `forward` as it is for another FlashAttention.

    Without metadata of ours where a layer's shape is not that of the model's configuration: SGLang asks for it once,
    with the head counts and head dim of the configuration, and hands it to every full-attention layer; a layer with
    another head dim of v, say, would read a schedule that is not its own. Nor where the batch has been padded with
    queries since, and the bound on splits counts them (sglang-kernel 0.4.5 and later): the forward would have room for
    other splits.
    """

    @functools.wraps(forward)
    def attend(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("ver", 3) != 3 or torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        made_for = getattr(kwargs.get("scheduler_metadata"), _MARK, None)
        if made_for is not None:
            q, k_cache, v_cache = kwargs["q"], kwargs["k_cache"], kwargs["v_cache"]
            *shape, total_q = made_for
            fits = shape == [q.shape[-2], k_cache.shape[-2], q.shape[-1], v_cache.shape[-1]]
            if not fits or (total_q is not None and total_q != q.shape[:-2].numel()):
                kwargs["scheduler_metadata"] = None
        return with_metadata(*args, **kwargs)

    return attend


__all__ = ["ALL_LAYOUTS", "LAYOUTS", "Attached", "SGLangNames", "attach", "attach_new_backends"]
