"""SGLang: its FlashAttention-3 backend with our scheduler metadata. SGLANG.md says what is covered.

Two things are done to a backend. The forward that it calls is wrapped (`wrapper.wrap_forward`), so that the layers of
a captured CUDA graph share metadata that a node of the same graph makes. And where SGLang has a precompute of its own
(0.5.11 on), its maker is replaced: eager batches get our metadata, made for the page table that the forward will see;
while graphs are captured the maker answers None, which leaves the layers to the wrapper and drops SGLang's
make, copy and zero fill before each replay.

Under policy "balanced" the wrapper hands the forward the bound of splits that the metadata was made with. In eager
batches SGLang hands it 0, for which it takes FA3's own bound, so the maker stays within that one.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from ..api import get_scheduler_metadata
from ..arguments import device_facts
from ..install import DISABLE_VARIABLE, is_disabled
from ..installed import resolve_build
from ..triton_kernels.problem import POLICIES, checked_choice
from ..wrapper import wrap_forward

_log = logging.getLogger("fa3_metadata")
_MARK = "_fa3_metadata_attached"


@dataclass(frozen=True)
class SGLangNames:
    """Everything that the adapter leans on in a range of SGLang versions. tests/test_sglang_contract.py checks it."""

    versions: str
    marker: str  # "self.NAME" or "module.NAME": what tells this range from those after it in LAYOUTS
    wrapped: tuple[str, ...]  # the FA3 forwards that layers call, written likewise
    module: str = "sglang.srt.layers.attention.flashattention_backend"
    backend: str = "FlashAttentionBackend"
    attributes: tuple[str, ...] = ("fa_impl_ver",)  # set on the backend by its own methods
    methods: dict[str, tuple[str, ...]] = field(default_factory=dict)  # name -> parameters after self
    metadata: str = "FlashAttentionMetadata"
    metadata_fields: tuple[str, ...] = ()
    # Keywords of the forward in a decode layer, and of the maker of metadata.
    forward_keywords: tuple[str, ...] = (
        "q", "k_cache", "v_cache", "page_table", "cache_seqlens", "cu_seqlens_q", "max_seqlen_q", "causal",
        "window_size", "softcap", "num_splits",
    )  # fmt: skip
    maker_keywords: tuple[str, ...] = ()
    makers_answer_may_be_none: bool = False  # the callers of the maker test its answer before they use it
    setting: tuple[str, str] | None = None  # (module, name): false where the forward is not the installed package's


LAYOUTS = (
    SGLangNames(
        versions="0.5.11 to 0.5.23",
        marker="self._get_scheduler_metadata",
        wrapped=("module.flash_attn_with_kvcache",),
        attributes=(
            "fa_impl_ver", "_get_scheduler_metadata", "forward_metadata", "decode_cuda_graph_metadata", "page_size",
        ),
        methods={
            "init_forward_metadata": ("forward_batch",),
            "_compute_scheduler_metadata": ("batch_size", "max_seq_len_k", "cache_seqlens", "cu_seqlens_q"),
        },
        metadata_fields=("cache_seqlens_int32", "cu_seqlens_q", "page_table", "scheduler_metadata"),
        forward_keywords=(*SGLangNames.forward_keywords, "scheduler_metadata", "ver"),
        maker_keywords=(
            "batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads", "num_heads_k", "headdim", "cache_seqlens",
            "qkv_dtype", "cu_seqlens_q", "page_size", "causal", "has_softcap", "num_splits",
        ),
        makers_answer_may_be_none=True,
        setting=("sglang.srt.environ", "SGLANG_USE_SGL_FA3_KERNEL"),
    ),
    SGLangNames(
        versions="0.5.10",
        marker="self.flash_attn_with_kvcache",
        wrapped=("self.flash_attn_with_kvcache",),
        attributes=("fa_impl_ver", "flash_attn_with_kvcache"),
    ),
    SGLangNames(
        versions="0.5.9",
        marker="module.flash_attn_with_kvcache_fa3",
        wrapped=("module.flash_attn_with_kvcache", "module.flash_attn_with_kvcache_fa3"),
    ),
    SGLangNames(
        versions="0.5.7 to 0.5.8",
        marker="module.flash_attn_with_kvcache",
        wrapped=("module.flash_attn_with_kvcache",),
    ),
)  # fmt: skip


class Attached:
    """A backend that uses our metadata, until `detach()`."""

    def __init__(self, backend: Any, module: ModuleType, names: SGLangNames, build: str | None, policy: str) -> None:
        self.backend, self.names, self.build, self.policy = backend, names, build, policy
        self._is_eager = False
        self._asked: dict[str, Any] | None = None  # what the maker was asked while an eager batch was prepared
        self._forwards = [_WrappedForward.at(*_place(name, backend, module), build, policy) for name in names.wrapped]
        for forward in self._forwards:
            forward.hold()
        ours = (self._make_or_leave, self._init_forward_metadata) if names.maker_keywords else ()
        self._ours = dict(zip(("_get_scheduler_metadata", "init_forward_metadata"), ours, strict=False))
        self._theirs = {name: getattr(backend, name) for name in self._ours}
        self._before = {name: vars(backend)[name] for name in self._ours if name in vars(backend)}
        vars(backend).update(self._ours)
        setattr(backend, _MARK, self)

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

    def _init_forward_metadata(self, forward_batch: Any) -> None:
        """SGLang's, for a batch that runs eagerly; then the metadata, now that the page table is final."""
        self._asked, self._is_eager = None, True
        try:
            self._theirs["init_forward_metadata"](forward_batch)
        finally:
            self._is_eager = False
        if self._asked is not None:
            metadata = self.backend.forward_metadata
            metadata.scheduler_metadata = self._make(self._asked, metadata)
            self._asked = None

    def _make_or_leave(self, **asked: Any) -> torch.Tensor | None:
        """In place of SGLang's maker, which it calls for decode without speculation, and not for MLA."""
        if self._is_eager:
            self._asked = asked
            return None
        metadata = self.backend.decode_cuda_graph_metadata.get(asked["batch_size"])
        if metadata is None or metadata.scheduler_metadata is None:
            return None  # under capture: the wrapped forward makes it inside the graph
        return self._theirs["_get_scheduler_metadata"](**asked)  # captured before we came: it reads SGLang's buffer

    def _make(self, asked: dict[str, Any], metadata: Any) -> torch.Tensor | None:
        """The metadata of `asked` for the tensors that the forward will be given.

        SGLang asks for the longest sequence of the batch, FA3 looks at the width of the page table: a different
        number of splits may follow, and more of them than the forward has room for must never get there. For the same
        reason "balanced" is bound by what the forward will come to by itself, whoever calls it with this tensor.
        """
        if device_facts(metadata.cache_seqlens_int32.device, None, None)[0] < 90:
            return None  # sm_8x sizes the tensor by num_splits, and the forward is called with 0: SGLang issue 22800
        asked = asked | {
            "cache_seqlens": metadata.cache_seqlens_int32,
            "cu_seqlens_q": metadata.cu_seqlens_q,
            "max_seqlen_k": metadata.page_table.shape[1] * self.backend.page_size,
        }
        made = get_scheduler_metadata(**asked, build=self.build, policy=self.policy, forward_is_told=False)
        shape = (asked["num_heads"], asked["num_heads_k"], asked["headdim"], asked["headdim"])
        total_q = asked["batch_size"] * asked["max_seqlen_q"]  # what the bound on splits of some builds counts
        setattr(made, _MARK, (*shape, total_q if resolve_build(self.build)[1].bound_depends_on_batch else None))
        return made


def attach(backend: Any, build: str | None = None, policy: str = "fa3") -> Attached:
    """Make a live SGLang `FlashAttentionBackend` use our scheduler metadata. Idempotent.

    Best before CUDA graphs are captured: those captured earlier keep what they have. Where SGLang keeps the forward in
    a module, the other FA3 backends of the process use the wrapped one too.

    Args:
        backend: the object; of a composed backend, the FlashAttentionBackend inside.
        build: the FA3 build behind its forward; None: the detected one.
        policy: "fa3" or "balanced", as for `get_scheduler_metadata`. In eager batches "balanced" keeps FA3's own bound
            of splits.

    Raises:
        TypeError: `backend` is something else.
        ValueError: `policy` is not known, or the backend or its forward is attached already with another one.
        RuntimeError: it runs another FlashAttention, or an SGLang whose names differ from those in LAYOUTS.
    """
    checked_choice("policy", policy, POLICIES)
    if attached := vars(backend).get(_MARK) if hasattr(backend, "__dict__") else None:
        if attached.policy != policy:
            raise ValueError(f"policy must be {attached.policy!r}, with which backend is attached, got {policy!r}")
        return attached
    kind, wanted = type(backend), LAYOUTS[0]
    if (kind.__module__, kind.__qualname__) != (wanted.module, wanted.backend):
        raise TypeError(f"backend must be {wanted.module}.{wanted.backend}, got {kind.__module__}.{kind.__qualname__}")
    module = import_module(wanted.module)
    if (version := getattr(backend, "fa_impl_ver", None)) != 3:
        raise RuntimeError(f"backend must run FlashAttention 3 (fa_impl_ver), got {version!r}")
    names = next((names for names in LAYOUTS if hasattr(*_place(names.marker, backend, module))), None)
    if names is None:
        markers = ", ".join(names.marker for names in LAYOUTS)
        raise RuntimeError(f"backend must have one of {markers}, got none: this SGLang is not supported")
    if missing := _missing(names, backend, module):
        raise RuntimeError(
            f"backend must be like that of SGLang {names.versions}, got one without {', '.join(missing)}: "
            f"this SGLang is not supported"
        )
    if names.setting and not getattr(import_module(names.setting[0]).envs, names.setting[1]).get():
        raise RuntimeError(
            f"{names.setting[1]} must be true, so that the forward is the installed sglang-kernel's, got false"
        )
    attached = Attached(backend, module, names, build, policy)
    under = "" if policy == "fa3" else f", policy {policy}"
    _log.info("scheduler metadata: attached to the %s of SGLang %s%s", names.backend, names.versions, under)
    return attached


def attach_new_backends(build: str | None = None, policy: str = "fa3") -> Callable[[], None]:
    """`attach` every `FlashAttentionBackend` that this process creates from now on. Idempotent.

    Backends are created in SGLang's scheduler processes, so call it where those will run it: in an SGLang plugin, or
    at the top level of the script that launches the server (see SGLANG.md). Returns what undoes it for later ones.
    Creating a backend raises what `attach` raises. Does nothing where the environment variable FA3_METADATA_DISABLE is
    set to anything but 0. Raises `ValueError` for a `policy` that is not known or not that of an earlier call.
    """
    checked_choice("policy", policy, POLICIES)
    if is_disabled():
        _log.info("scheduler metadata: SGLang is left alone, since %s is set", DISABLE_VARIABLE)
        return lambda: None
    kind = getattr(import_module(LAYOUTS[0].module), LAYOUTS[0].backend)
    original = kind.__init__
    if earlier := getattr(original, _MARK, None):
        undo, its_policy = earlier
        if its_policy != policy:
            raise ValueError(f"policy must be {its_policy!r}, with which new backends are attached, got {policy!r}")
        return undo

    @functools.wraps(original)
    def init_and_attach(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        attach(self, build, policy)

    def undo_it() -> None:
        if kind.__init__ is init_and_attach:
            kind.__init__ = original

    setattr(init_and_attach, _MARK, (undo_it, policy))
    kind.__init__ = init_and_attach
    return undo_it


def _place(name: str, backend: Any, module: ModuleType) -> tuple[Any, str]:
    """(owner, attribute) of "self.NAME" or "module.NAME"."""
    owner, _, attribute = name.partition(".")
    return {"self": backend, "module": module}[owner], attribute


def _missing(names: SGLangNames, backend: Any, module: ModuleType) -> list[str]:
    """What a live backend lacks of `names`."""
    wanted = [*names.wrapped, *(f"self.{name}" for name in (*names.attributes, *names.methods))]
    missing = [name for name in dict.fromkeys(wanted) if not hasattr(*_place(name, backend, module))]
    metadata = getattr(module, names.metadata, None)
    return missing + [f"{names.metadata}.{name}" for name in names.metadata_fields if not hasattr(metadata, name)]


class _WrappedForward:
    """A forward wrapped where `owner` keeps it, shared by the backends that hold it: the last one puts it back."""

    def __init__(self, owner: Any, name: str, build: str, policy: str) -> None:
        self.owner, self.name, self.build, self.policy, self.holders = owner, name, build, policy, 0
        self.theirs: Callable[..., Any] = getattr(owner, name)
        self.ours = _withhold_misfits(self.theirs, wrap_forward(self.theirs, build, policy))
        setattr(self.ours, _MARK, self)

    @classmethod
    def at(cls, owner: Any, name: str, build: str | None, policy: str) -> _WrappedForward:
        """The one in place, else a new one. `ValueError` where the one in place is for another build or policy."""
        build = resolve_build(build)[0]
        found: _WrappedForward | None = getattr(getattr(owner, name), _MARK, None)
        if found is not None and found.build != build:
            raise ValueError(f"build must be {found.build!r}, for which {name} is wrapped already, got {build!r}")
        if found is not None and found.policy != policy:
            raise ValueError(f"policy must be {found.policy!r}, with which {name} is wrapped already, got {policy!r}")
        return found or cls(owner, name, build, policy)

    def hold(self) -> None:
        self.holders += 1
        setattr(self.owner, self.name, self.ours)

    def release(self) -> None:
        self.holders -= 1
        if not self.holders:
            setattr(self.owner, self.name, self.theirs)


def _withhold_misfits(forward: Callable[..., Any], with_metadata: Callable[..., Any]) -> Callable[..., Any]:
    """`with_metadata`, without metadata of ours where a layer's shape is not that of the model's configuration.

    SGLang asks for it once, with the head counts and head dim of the configuration, and hands it to every
    full-attention layer; a layer with another head dim of v, say, would read a schedule that is not its own. Nor where
    the batch has been padded with queries since, and the bound on splits counts them (sglang-kernel 0.4.5 and later):
    the forward would have room for other splits.
    """

    @functools.wraps(forward)
    def checked(*args: Any, **kwargs: Any) -> Any:
        made_for = getattr(kwargs.get("scheduler_metadata"), _MARK, None)
        if made_for is not None:
            q, k_cache, v_cache = kwargs["q"], kwargs["k_cache"], kwargs["v_cache"]
            *shape, total_q = made_for
            fits = shape == [q.shape[-2], k_cache.shape[-2], q.shape[-1], v_cache.shape[-1]]
            if not fits or (total_q is not None and total_q != q.shape[:-2].numel()):
                kwargs["scheduler_metadata"] = None
        return with_metadata(*args, **kwargs)

    return checked
