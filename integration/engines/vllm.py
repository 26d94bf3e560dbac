"""vLLM: its `get_scheduler_metadata`, made by ours, and `attach`, which makes vLLM call it. VLLM.md says how.

vLLM's metadata builders make the tensor once a step and hand it to every layer, together with the `num_splits` it
was made for. So the function they call is all there is to replace.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
from importlib import import_module
from typing import Any

import torch

from .. import api
from ..installed import BUILD_VARIABLE, installed_version
from ..triton_kernels.builds import rules_for
from ..triton_kernels.problem import MAX_HEADDIM, POLICIES, checked_choice
from .source_facts import broken_facts, installed_source
from .vllm_in_place import BUFFER, WRAPS
from .vllm_in_place import GQA_BUILDER as _GQA
from .vllm_in_place import MLA_BUILDER as _MLA

INTERFACE = "vllm.vllm_flash_attn.flash_attn_interface"  # defines the function; stays as it is
FA_UTILS = "vllm.v1.attention.backends.fa_utils"  # where the backends import it from
GQA = "vllm.v1.attention.backends.flash_attn"
MLA = "vllm.v1.attention.backends.mla.flashattn_mla"
NAME = "get_scheduler_metadata"
_SHAPE = "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens"
_GQA_ASKS = "aot_schedule, batch_size, cu_query_lens, max_query_len, seqlens, max_seq_len, causal, max_num_splits"
_MLA_ASKS = "num_reqs, cu_query_lens, max_query_len, seqlens, max_seq_len, causal, max_num_splits"
_BUFFER = (
    "self.use_full_cuda_graph = self.compilation_config.cudagraph_mode.has_full_cudagraphs()",
    "self.scheduler_metadata = torch.zeros(1 + round_up(max_batch_size, 4) * 4, dtype=torch.int32, device=self.device)",
)
_STORES = ("self.scheduler_metadata[:n] = scheduler_metadata", "self.scheduler_metadata[n:] = 0")

# All that this file leans on in vLLM: for what -> module -> facts about its source, in the words of `source_facts`.
LEANS_ON: dict[str, dict[str, tuple[str, ...]]] = {
    "attach": {
        INTERFACE: (
            f"def {NAME}({_SHAPE}, qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, "
            "cu_seqlens_k_new=None, cache_leftpad=None, page_size=None, max_seqlen_k_new=0, causal=False, "
            "window_size=(-1, -1), has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0)",
        ),
        "vllm.vllm_flash_attn": (f"from {INTERFACE} import {NAME}",),
        FA_UTILS: (f"from vllm.vllm_flash_attn import {NAME}",),
        GQA: (
            f"from {FA_UTILS} import {NAME}",
            f"{_GQA}._get_scheduler_metadata: 1 x {NAME}({_SHAPE}, qkv_dtype, cu_seqlens_q, page_size, causal, "
            "window_size, num_splits)",
        ),
        MLA: (
            f"from {FA_UTILS} import {NAME}",
            f"{_MLA}._schedule_decode: 1 x {NAME}({_SHAPE}, qkv_dtype, headdim_v, page_size, cu_seqlens_q, causal, "
            "num_splits)",
        ),
    },
    # Making the tensor in the buffer is sound as long as what is made is what is stored next: one call, one store.
    "in_place": {
        GQA: (
            f"def {_GQA}._get_scheduler_metadata(self, *, {_GQA_ASKS})",
            f"def {_GQA}._store_scheduler_metadata(self, scheduler_metadata)",
            *(f"{_GQA}._store_scheduler_metadata: {line}" for line in _STORES),
            f"{_GQA}._store_scheduler_metadata: return self.scheduler_metadata[:n]",
            *(f"{_GQA}.__init__: {line}" for line in _BUFFER),
            f"{_GQA}.build: 2 x self._get_scheduler_metadata({_GQA_ASKS})",  # in the two branches of one `if`
            f"{_GQA}.build: 1 x self._store_scheduler_metadata(_)",
            f"{_GQA}.update_draft_decode_metadata: 1 x self._get_scheduler_metadata({_GQA_ASKS})",
            f"{_GQA}.update_draft_decode_metadata: 1 x self._store_scheduler_metadata(_)",
        ),
        MLA: (
            f"def {_MLA}._schedule_decode(self, {_MLA_ASKS})",
            *(f"{_MLA}.__init__: {line}" for line in _BUFFER),
            f"{_MLA}._build_decode: 1 x self._schedule_decode({_MLA_ASKS})",
            *(f"{_MLA}._build_decode: {line}" for line in _STORES),
        ),
    },
}

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
    if attached is not None and (attached.waiting or not attached.used):
        attached.catch_up(called=True)
    build, policy = (vllm_build(), "fa3") if attached is None else (attached.build, attached.policy)
    return api.get_scheduler_metadata(
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens, qkv_dtype,
        headdim_v, cu_seqlens_q, None, cu_seqlens_k_new, None, cache_leftpad, page_size, max_seqlen_k_new, causal,
        window_size, 0, has_softcap, num_splits, pack_gqa, sm_margin,
        build=build, out=BUFFER.get() if out is None else out, policy=policy, forward_is_told=False,
    )  # fmt: skip


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


def attach(in_place: bool = False, policy: str = "fa3") -> Attached:
    """Make vLLM's FlashAttention backends, GQA and MLA, call our `get_scheduler_metadata`, in this process.

    To be called in every process that runs attention, at any time; backend modules that vLLM imports later get it
    too. Attaching again returns the same `Attached`. With `in_place`, builders that keep the metadata in a buffer
    for CUDA graphs have it made there, instead of a new tensor that is copied. `policy` is "fa3" or "balanced": see
    `fa3_metadata.get_scheduler_metadata`, and `get_scheduler_metadata` here for the bound of its splits.

    Raises `ValueError` for another policy, and `RuntimeError`, with nothing changed, where vLLM is missing, has an
    unsupported version, runs on another platform than CUDA, is not laid out as `LEANS_ON` says, or is attached already
    with the other `in_place` or policy.
    """
    global _attached
    checked_choice("policy", policy, POLICIES)
    with _lock:
        if _attached is not None:
            for name, wanted, has in (("in_place", in_place, _attached.in_place), ("policy", policy, _attached.policy)):
                if has != wanted:
                    raise RuntimeError(f"already attached with {name}={has!r}: call detach() first")
            return _attached
        build = vllm_build()
        try:
            rules_for(build)
        except ValueError as error:
            raise RuntimeError(f"cannot attach to this vLLM: {error}; {BUILD_VARIABLE} overrides it") from error
        parts = [LEANS_ON["attach"], LEANS_ON["in_place"]] if in_place else [LEANS_ON["attach"]]
        if broken := [line for leans_on in parts for line in broken_facts(leans_on, installed_source)]:
            raise RuntimeError("vLLM is not laid out as expected; nothing was changed:\n" + "\n".join(broken))
        made = Attached(build, in_place, policy)
        try:
            made._put()
        except BaseException:
            made._restore()
            raise
        _attached = made
        how = f"{build}, in_place={in_place}" + ("" if policy == "fa3" else f", policy={policy}")
        _log.info("fa3_metadata makes the FA3 scheduler metadata from now on (%s)", how)
        return made


class Attached:
    """What `attach` changed. `build` is imitated; `used` says whether vLLM has called our function."""

    def __init__(self, build: str, in_place: bool, policy: str = "fa3") -> None:
        self.build, self.in_place, self.policy, self.used = build, in_place, policy, False
        self.waiting = {GQA: _GQA, MLA: _MLA} if in_place else {}  # builders not changed yet: module -> class
        self._own: Any = None  # vLLM's function
        self._methods: list[tuple[type, str, Any, Any]] = []  # class, name, vLLM's, ours

    @property
    def modules(self) -> list[str]:
        """The imported vLLM modules that call our function now."""
        names = [name for name in tuple(sys.modules) if name.startswith("vllm.")]
        return sorted(name for name in names if vars(sys.modules[name]).get(NAME) is get_scheduler_metadata)

    def _put(self) -> None:
        try:
            self._own = getattr(import_module(INTERFACE), NAME)
            import_module(FA_UTILS)
        except (ImportError, OSError) as error:
            raise RuntimeError(f"vLLM's FlashAttention does not load here; nothing was changed: {error}") from error
        # Backend modules are left for vLLM to import: what they do then depends on its configuration at that time.
        if foreign := _foreign(self._own):
            raise RuntimeError("only vLLM's own function for CUDA is replaced; nothing was:\n" + "\n".join(foreign))
        for name in _bound():
            setattr(sys.modules[name], NAME, get_scheduler_metadata)
        self.catch_up()

    def catch_up(self, called: bool = False) -> None:
        """Change the builders of the modules that have been imported meanwhile."""
        if called and not self.used:
            self.used = True
            _log.info("fa3_metadata is asked for scheduler metadata the first time")
        if not any(module in sys.modules for module in tuple(self.waiting)):
            return
        with _lock:
            for module, name in list(self.waiting.items()):
                if (builder := getattr(sys.modules.get(module), name, None)) is None:
                    continue
                for method, wrap in WRAPS[name]:
                    own = vars(builder)[method]
                    self._methods.append((builder, method, own, wrap(own)))
                    setattr(builder, method, self._methods[-1][-1])
                del self.waiting[module]

    def detach(self) -> None:
        """Put everything back. Does nothing the second time.

        Raises `RuntimeError`, with nothing changed, where something else has been put over ours since.
        """
        global _attached
        with _lock:
            if _attached is not self:
                return
            foreign = _foreign(get_scheduler_metadata)
            foreign += [f"{b.__name__}.{name}" for b, name, _, ours in self._methods if vars(b).get(name) is not ours]
            if foreign:
                raise RuntimeError("replaced again since: undo that first; nothing was changed:\n" + "\n".join(foreign))
            self._restore()
            _attached = None

    def _restore(self) -> None:
        self.waiting.clear()
        for builder, name, own, _ in self._methods:
            setattr(builder, name, own)
        for name in self.modules:  # others too that have imported it since
            setattr(sys.modules[name], NAME, self._own)


def _bound() -> dict[str, Any]:
    """What the imported modules among those that call the function have under its name."""
    loaded = [name for name in (GQA, MLA) if name in sys.modules and NAME in vars(sys.modules[name])]
    return {name: vars(sys.modules[name]).get(NAME) for name in (FA_UTILS, *loaded)}


def _foreign(expected: Any) -> list[str]:
    return [f"{name}.{NAME} is {found!r}" for name, found in _bound().items() if found is not expected]
