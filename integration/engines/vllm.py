"""vLLM: its `get_scheduler_metadata`, made by ours, and `attach`, which makes vLLM call it. docs/vllm.md says how.

vLLM's metadata builders make the tensor once a step and hand it to every layer, together with the `num_splits` it
was made for: there, the function that they call is all there is to replace. Where they make none, the builder is told
what it lacks (vllm_windows.py), or the forward makes it (vllm_forward.py).
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from .. import api
from ..installed import BUILD_VARIABLE, installed_version
from ..settings import DISABLE_VARIABLE, is_disabled
from ..triton_kernels.builds import rules_for
from ..triton_kernels.problem import MAX_HEADDIM, POLICIES, checked_choice
from .source_facts import installed_facts
from .vllm_forward import with_metadata, with_steps
from .vllm_groups import BUILD_ALL, RUNNER, built_together, once
from .vllm_in_place import BUFFER, built_in_buffer, kept_in_buffer, made_in_buffer
from .vllm_names import (
    CONTEXT,
    ENTER,
    FA_UTILS,
    FORWARD,
    GQA,
    GQA_BUILDER,
    INTERFACE,
    MLA,
    MLA_BUILDER,
    NAME,
    FactsOf,
    Layout,
    layout_of,
)
from .vllm_windows import windows_told

_log = logging.getLogger("vllm.fa3_metadata")  # below vLLM's own logger, so that its handlers print it
_lock = threading.RLock()
_attached: Attached | None = None


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: torch.Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`vllm.vllm_flash_attn.get_scheduler_metadata` for the installed vLLM (see `vllm_build`).

    Bit for bit, unless attached with policy "balanced". vLLM tells the forward its own `num_splits`, never ours, so
    that policy stays within it, or, where it is 0, within the bound of FA3's heuristic, to which the forward comes.

    Arguments are vLLM's, with the meaning that `fa3_metadata.get_scheduler_metadata` gives them (`num_heads_q` is
    its num_heads, `num_heads_kv` num_heads_k, `cache_leftpad` leftpad_k); `num_splits` goes in as it is. `out` as
    there. Raises what that raises. What only FA4 can attend to, head dims above 256 and `causal` as a tensor, goes
    to vLLM's own function: vLLM asks for it although FA4 does not read the answer.
    """
    attached = _attached
    if out is None and (headdim > MAX_HEADDIM or isinstance(causal, torch.Tensor)):
        return getattr(import_module(INTERFACE), NAME)(
            batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens, qkv_dtype,
            headdim_v, cu_seqlens_q, cu_seqlens_k_new, cache_leftpad, page_size, max_seqlen_k_new, causal, window_size,
            has_softcap, num_splits, pack_gqa, sm_margin,
        )  # fmt: skip
    if attached is not None:
        attached._called()
    build, policy = (vllm_build(), "fa3") if attached is None else (attached.build, attached.policy)
    out = BUFFER.get() if out is None else out
    asked = (
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens, qkv_dtype,
        headdim_v, cu_seqlens_q, None, cu_seqlens_k_new, None, cache_leftpad, page_size, max_seqlen_k_new, causal,
        window_size, 0, has_softcap, num_splits, pack_gqa, sm_margin,
    )  # fmt: skip
    make = functools.partial(
        api.get_scheduler_metadata, *asked, build=build, out=out, policy=policy, forward_is_told=False
    )
    return once(make, asked, out)


def vllm_build() -> str:
    """The build to imitate, such as "vllm-0.33.0": FA3_METADATA_BUILD where it names a vLLM, else the installed one.

    Raises `RuntimeError` where neither is there.
    """
    named = os.environ.get(BUILD_VARIABLE, "")
    if named.startswith("vllm-"):
        return named
    if (version := _vllm_version("vllm")) is None:
        raise RuntimeError(f'vLLM is not installed, and {BUILD_VARIABLE} does not name one, such as "vllm-0.33.0"')
    return f"vllm-{version}"


_vllm_version = functools.lru_cache(maxsize=1)(installed_version)


def why_not(
    facts_of: FactsOf = installed_facts, build: str | None = None, in_place: bool = False
) -> tuple[Layout, str | None]:
    """The layout of a vLLM, and why `attach` refuses it, or None. Read from its source; nothing is imported.

    Args:
        facts_of: facts about the source of a module, by its name; those of the installed vLLM.
        build: such as "vllm-0.33.0"; None: see `vllm_build`.
        in_place: as for `attach`.
    """
    layout, broken = layout_of(facts_of, in_place)
    try:
        rules_for(vllm_build() if build is None else build)
    except RuntimeError as error:
        return layout, str(error)
    except ValueError as error:
        return layout, f"cannot attach to this vLLM: {error}; {BUILD_VARIABLE} overrides it"
    if broken:
        expected = f"vLLM is not laid out as expected (nearest: {layout.versions}); nothing was changed:"
        return layout, "\n".join([expected, *broken])
    return layout, None


def attach(in_place: bool = False, policy: str = "fa3") -> Attached:
    """Make vLLM's FlashAttention-3 layers use our metadata, in this process: docs/vllm.md says which get it how.

    To be called in every process that runs attention, before CUDA graphs are captured; modules that vLLM imports later
    get it too. Attaching again returns the same `Attached`. With `in_place`, builders that keep the metadata in a
    buffer for CUDA graphs have it made there, instead of a new tensor that is copied. `policy` is "fa3" or "balanced":
    see `fa3_metadata.get_scheduler_metadata`, and `get_scheduler_metadata` here for the bound of its splits.

    Where FA3_METADATA_DISABLE is set, nothing is changed, and the `Attached` has no build.

    Raises `ValueError` for another policy, and `RuntimeError`, with nothing changed, where vLLM is missing, has an
    unsupported version, runs on another platform than CUDA, is laid out otherwise than in any of `LAYOUTS`
    (vllm_names.py), or is attached already with the other `in_place` or policy.
    """
    global _attached
    checked_choice("policy", policy, POLICIES)
    with _lock:
        if _attached is not None:
            for name, wanted, has in (("in_place", in_place, _attached.in_place), ("policy", policy, _attached.policy)):
                if has != wanted:
                    raise RuntimeError(f"already attached with {name}={has!r}: call detach() first")
            return _attached
        if is_disabled():
            _log.info("scheduler metadata: vLLM is left alone, since %s is set", DISABLE_VARIABLE)
            return Attached("", in_place, policy)
        layout, reason = why_not(in_place=in_place)
        if reason is not None:
            raise RuntimeError(reason)
        build = vllm_build()
        made = Attached(build, in_place, policy)
        try:
            made._put(layout)
        except BaseException:
            made._restore()
            raise
        _attached = made
        how = f"{build}, in_place={in_place}" + ("" if policy == "fa3" else f", policy={policy}")
        _log.info("fa3_metadata makes the FA3 scheduler metadata from now on (%s)", how)
        return made


def attached_now() -> str | None:
    """What is attached in this process, in words; None: nothing."""
    one = _attached
    return None if one is None else f"{one.build}, in_place={one.in_place}, policy {one.policy}"


@dataclass(frozen=True)
class _Replaced:
    """A function of vLLM's that every module of vLLM has ours for, but for those named."""

    name: str
    own: Any
    ours: Any
    but: tuple[str, ...] = ()

    def put(self) -> None:
        for name in _modules_with(self.name, self.own):
            if name not in self.but:
                setattr(sys.modules[name], self.name, self.ours)

    def restore(self) -> None:
        for name in _modules_with(self.name, self.ours):  # others too that have imported it since
            setattr(sys.modules[name], self.name, self.own)


_Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
_Wraps = dict[str, tuple[str, _Wrap | Mapping[str, _Wrap]]]  # module -> its function, or class and methods to replace


class Attached:
    """What `attach` changed. `build` is imitated; `used` says whether vLLM has asked us for metadata."""

    def __init__(self, build: str, in_place: bool, policy: str = "fa3") -> None:
        self.build, self.in_place, self.policy, self.used = build, in_place, policy, False
        self._wraps: _Wraps = {}  # what is not changed yet
        self._replaced: list[_Replaced] = []
        self._methods: list[tuple[type, str, Any, Any]] = []  # class, name, vLLM's, ours

    @property
    def modules(self) -> list[str]:
        """The imported vLLM modules that call our `get_scheduler_metadata` now."""
        return _modules_with(NAME, get_scheduler_metadata)

    @property
    def waiting(self) -> dict[str, str]:
        """The builders that are not changed yet, since vLLM has not imported them: module -> class."""
        return {module: name for module, (name, wrap) in self._wraps.items() if isinstance(wrap, Mapping)}

    def _put(self, layout: Layout) -> None:
        try:
            own, forward = (getattr(import_module(INTERFACE), name) for name in (NAME, FORWARD))
            enter = getattr(import_module(CONTEXT), ENTER)
            import_module(FA_UTILS)
        except (ImportError, OSError) as error:
            raise RuntimeError(f"vLLM's FlashAttention does not load here; nothing was changed: {error}") from error
        # Backend modules are left for vLLM to import: what they do then depends on its configuration at that time.
        if foreign := _foreign(NAME, own) + _foreign(FORWARD, forward):
            raise RuntimeError("only vLLM's own function for CUDA is replaced; nothing was:\n" + "\n".join(foreign))
        try:
            attend = with_metadata(forward, self.build, self.policy, self._called)
        except (TypeError, ValueError) as error:
            raise RuntimeError(f"vLLM's forward cannot be wrapped; nothing was changed: {error}") from error
        self._wraps = _wraps(layout, self.in_place)
        self._replaced = [
            _Replaced(NAME, own, get_scheduler_metadata, but=(INTERFACE,)),
            _Replaced(FORWARD, forward, attend),
            _Replaced(ENTER, enter, with_steps(enter, self.catch_up)),
        ]
        for one in self._replaced:
            one.put()
        self.catch_up()

    def _called(self) -> None:
        if not self.used:
            self.used = True
            _log.info("fa3_metadata is asked for scheduler metadata the first time")
        if self._wraps:
            self.catch_up()

    def catch_up(self) -> None:
        """Change what is to be changed in modules that have been imported meanwhile."""
        if not any(module in sys.modules for module in tuple(self._wraps)):
            return
        with _lock:
            for module, (name, wraps) in list(self._wraps.items()):
                if (found := getattr(sys.modules.get(module), name, None)) is None:
                    continue
                if isinstance(wraps, Mapping):
                    for method, wrap in wraps.items():
                        own = vars(found)[method]
                        self._methods.append((found, method, own, wrap(own)))
                        setattr(found, method, self._methods[-1][-1])
                else:
                    self._replaced.append(_Replaced(name, found, wraps(found)))
                    self._replaced[-1].put()
                del self._wraps[module]

    def detach(self) -> None:
        """Put everything back. Does nothing the second time.

        Graphs captured meanwhile keep what they have. A builder that was told its window (vllm_windows.py) goes on
        making metadata, by vLLM's function, since such a graph may read it.

        Raises `RuntimeError`, with nothing changed, where something else has been put over ours since.
        """
        global _attached
        with _lock:
            if _attached is not self:
                return
            foreign = [line for one in self._replaced for line in _foreign(one.name, one.ours)]
            foreign += [f"{b.__name__}.{name}" for b, name, _, ours in self._methods if vars(b).get(name) is not ours]
            if foreign:
                raise RuntimeError("replaced again since: undo that first; nothing was changed:\n" + "\n".join(foreign))
            self._restore()
            _attached = None

    def _restore(self) -> None:
        self._wraps.clear()
        for builder, name, own, _ in self._methods:
            setattr(builder, name, own)
        for one in self._replaced:
            one.restore()


def _wraps(layout: Layout, in_place: bool) -> _Wraps:
    """What is to be replaced in builders, and of the newer runner, which not every version has.

    The MLA builder, and the GQA builder up to 0.27, store in the middle of a longer method, which stays: torch launches
    nothing for a copy of the buffer onto itself, and the rest is zeroed as ever.
    """
    runner: _Wraps = {RUNNER: (BUILD_ALL, built_together)}
    if not in_place:
        return {GQA: (GQA_BUILDER, {"build": windows_told})} | runner
    gqa: dict[str, Callable[..., Any]] = {"build": lambda build: windows_told(built_in_buffer(build))}
    if layout.stores:
        gqa |= {"update_draft_decode_metadata": made_in_buffer, "_store_scheduler_metadata": kept_in_buffer}
    return {GQA: (GQA_BUILDER, gqa), MLA: (MLA_BUILDER, {"_schedule_decode": made_in_buffer})} | runner


def _modules_with(name: str, value: Any) -> list[str]:
    """The imported modules of vLLM that hold this very object under this name."""
    loaded = [(module, vars(found)) for module, found in tuple(sys.modules.items()) if found is not None]
    return sorted(module for module, names in loaded if module.startswith("vllm.") and names.get(name) is value)


def _foreign(name: str, expected: Any) -> list[str]:
    """What the modules that must hold a function of vLLM's have under its name instead."""
    where = {ENTER: (CONTEXT,), BUILD_ALL: (RUNNER,)}.get(name, (FA_UTILS, GQA, MLA))
    bound = {module: vars(sys.modules[module]) for module in where if module in sys.modules}
    found = {module: names[name] for module, names in bound.items() if name in names}  # none while it is imported
    return [f"{module}.{name} is {one!r}" for module, one in found.items() if one is not expected]
