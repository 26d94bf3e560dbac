"""The public functions: make metadata, say how it is laid out, take it apart."""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from dataclasses import fields
from typing import Any

import torch

from .arguments import LengthTensors, make_problem, output_tensor
from .installed import native_metadata, resolve_build
from .schedules import Schedules, keep, place, schedules_of
from .triton_kernels.builds import FA3Rules
from .triton_kernels.layout import MetadataLayout
from .triton_kernels.plan import LaunchPlan, make_plan
from .triton_kernels.problem import DEFAULT_PARTIAL_BYTES, POLICIES, Problem, checked_choice, checked_int

BACKENDS = ("auto", "triton", "reference", "native")


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads: int,
    num_heads_k: int,
    headdim: int,
    cache_seqlens: torch.Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    *,
    build: str | None = None,
    out: torch.Tensor | None = None,
    policy: str = "fa3",
    backend: str = "auto",
    arch: int | None = None,
    num_sms: int | None = None,
    batch_invariant: bool = False,
    max_partial_bytes: int = DEFAULT_PARTIAL_BYTES,
    total_q: int | None = None,
    forward_is_told: bool = True,
) -> torch.Tensor:
    """FA3's scheduler metadata of a batch: make it once a step, pass it to every layer as `scheduler_metadata`.

    Mirrors `mha_fwd_get_scheduler_metadata` (hopper/flash_api.cpp of FlashAttention), bit for bit. One launch;
    nothing is read back, and with `out` nothing is allocated, so it can be captured into a CUDA graph.
    The forward recomputes part of this from its own arguments: give it the same mask, head counts, lengths,
    `sm_margin`, and the `num_splits` and `pack_gqa` given here. Its max_seqlen_k is the width of its page table
    in tokens (`page_table.shape[1] * page_size`), or the length of an unpaged cache.

    Lengths are 1-D tensors on one device, int32 or int64, of any stride (read in place, never copied). Lengths
    below zero count as zero. b is `batch_size`, which may be 0.

    Args:
        batch_size: number of sequences.
        max_seqlen_q: query tokens of the longest sequence.
        max_seqlen_k: tokens that fit in the cache of one sequence, as the forward sees it.
        num_heads: q heads; a multiple of `num_heads_k`.
        num_heads_k: KV heads.
        headdim: head dim of q and k, at most 256.
        cache_seqlens: [b] tokens in the KV cache of each sequence.
        qkv_dtype: torch.float16, bfloat16 or float8_e4m3fn.
        headdim_v: head dim of v, at most 512; None means `headdim`.
        cu_seqlens_q: [b + 1] running sum of query tokens, for ragged queries.
        cu_seqlens_k: [b + 1] accepted and never read, as in FA3: `cache_seqlens` wins.
        cu_seqlens_k_new: [b + 1] running sum of appended keys.
        seqused_q: [b] query tokens in use; wins over `cu_seqlens_q`.
        leftpad_k: [b] unused tokens at the start of each cache.
        page_size: tokens of a KV page; None: not paged.
        max_seqlen_k_new: keys appended to every sequence, or the most of any with `cu_seqlens_k_new`.
        causal: causal mask, aligned to the last query and key.
        window_size: (left, right) tokens visible around a query, both ends inclusive; -1: unlimited.
        attention_chunk: chunk length in tokens; 0: off. vLLM's builds, sgl-kernel up to 0.3.16 and
            0.3.16.post2 have none.
        has_softcap: whether the forward caps scores.
        num_splits: upper bound on the KV splits of a sequence, at most 256; 0: FA3's heuristic.
        pack_gqa: whether q heads of a KV head share tiles; None: FA3's heuristic.
        sm_margin: SMs left to other kernels.
        build: the FA3 build that will consume the tensor, such as "sglang-kernel-0.4.2"; None: see `detect_build`.
        out: int32 tensor to write to, contiguous, 1-D, at least the layout's size; None: a new tensor.
        policy: "fa3": the build's own schedule. "balanced": splits that a measured model of the GPU predicts to be
            fastest (triton_kernels/balance.py). It bounds the splits otherwise than FA3 does, so the forward must be
            given `metadata_layout(...).num_splits`.
        backend: "triton" (the kernel; CPU tensors need TRITON_INTERPRET=1), "reference" (NumPy, on the host:
            synchronises with CUDA tensors), "native" (the installed build's op), or "auto" (CUDA: the kernel; CPU:
            the reference).
        arch: compute capability as 10 * major + minor: 80, 86, 89 or 90. None: that of the device, 90 on CPU.
        num_sms: SMs of the device. None: those of the device, 132 on CPU.
        batch_invariant: with "balanced", the bits of a sequence's attention depend on its own queries and keys alone,
            whatever else is in the batch: triton_kernels/invariance.py says on which facts of a call that stands. A
            call for which it would not hold is refused: ragged queries of so many tokens that FA3 takes another
            kernel, a window over the whole of max_seqlen_k, more than 992 sequences for vLLM's builds and sgl-kernel
            up to 0.3.16 and 0.3.16.post2, a forward that is not told num_splits. Calls of more than 8 query blocks a
            sequence (prefills) are not split, unless num_splits is given.
        max_partial_bytes: with "balanced" and num_splits 0, what the forward's partial outputs may take; not applied
            with `batch_invariant`.
        total_q: with ragged queries, q.shape[0] of the forward, which the bound on splits of sglang-kernel 0.4.5 and
            later counts. None: batch_size * max_seqlen_q, as FA3's own op takes it; a forward that is called with
            num_splits 0 and has fewer queries may then come to fewer splits than the metadata has.
        forward_is_told: that the forward is given `metadata_layout(...).num_splits`. False: it is called with this
            call's own num_splits, so that with 0 "balanced", too, stays within the bound that the build's forward
            comes to by itself.

    Returns:
        int32 tensor on the device of `cache_seqlens`, laid out as `metadata_layout(...)` says: `out`, or its
        first elements where it is larger. Every element is written.

    Raises:
        TypeError, ValueError: for an argument that does not fit, by name, before anything is launched.
        RuntimeError: where the backend cannot run here.

    Under torch.compile it is one operator, with a dynamic batch size if need be; `out` must then have exactly the
    layout's size.
    """
    if torch.compiler.is_compiling():
        operands = (
            cache_seqlens, batch_size, max_seqlen_q, max_seqlen_k, num_heads, num_heads_k, headdim, qkv_dtype,
            headdim_v, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, leftpad_k, page_size, max_seqlen_k_new,
            causal, window_size[0], window_size[1], attention_chunk, has_softcap, num_splits, pack_gqa, sm_margin,
            build, policy, backend, arch, num_sms, batch_invariant, max_partial_bytes, total_q, forward_is_told,
        )  # fmt: skip
        if out is None:
            return torch.ops.fa3_metadata.get_scheduler_metadata(*operands)
        torch.ops.fa3_metadata.get_scheduler_metadata_out(out, *operands)
        return out
    build, rules = resolve_build(build)
    if type(total_q) is int and total_q >= 0 and not rules.bound_depends_on_batch:
        total_q = None  # of no account, and not worth another kind of call
    static = (  # in the order of STATIC
        max_seqlen_q, num_heads, num_heads_k, headdim, headdim_v, qkv_dtype, cu_seqlens_q is not None,
        seqused_q is not None, leftpad_k is not None, page_size, max_seqlen_k_new, causal, window_size, attention_chunk,
        has_softcap, num_splits, pack_gqa, sm_margin, arch, num_sms, policy, batch_invariant, max_partial_bytes,
        total_q, forward_is_told,
    )  # fmt: skip
    kind, key, schedules = None, None, None
    try:
        kind = build, backend, cache_seqlens.device, static
        types = [*map(type, static), *map(type, window_size)]  # 1 and 1.0 and True are equal, but not all are allowed
        known = _kinds.get(kind)
        if known is not None and known[0] == types:
            schedules = known[1]
            if out is not None and (batch_size, max_seqlen_k) in schedules.steps:
                if cu_seqlens_q is cu_seqlens_k is cu_seqlens_k_new is seqused_q is leftpad_k is None:
                    places = place(cache_seqlens)
                else:
                    given = cache_seqlens, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, leftpad_k
                    places = tuple([None if one is None else place(one) for one in given])
                key = backend, batch_size, max_seqlen_k, type(batch_size), type(max_seqlen_k), place(out), places
                if (size := schedules.again(key)) is not None:
                    return out if out.shape[0] == size else out[:size]
    except (TypeError, AttributeError, RuntimeError):  # no tensor, one without memory, or a list for the window
        kind, key = None, None
    tensors = LengthTensors(cache_seqlens, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, leftpad_k)
    if schedules is None:
        _check_first(policy, backend, cache_seqlens)
        named: dict[str, Any] = dict(zip(STATIC, static, strict=True))
        problem = make_problem(tensors, batch_size=batch_size, max_seqlen_k=max_seqlen_k, **named)
        schedules = schedules_of(problem, rules)
        if kind is not None:
            keep(_kinds, _MOST_KINDS, kind, (types, schedules))
    batch_size, max_seqlen_k = checked_int("batch_size", batch_size, 0), checked_int("max_seqlen_k", max_seqlen_k, 0)
    tensors.check(batch_size)
    step = schedules.at(batch_size, max_seqlen_k)
    out = output_tensor(out, step.sizes[0], cache_seqlens.device, tensors)
    if backend == "native":
        out.copy_(native_metadata(build, step.planned()[0], tensors))
    elif backend == "reference" or (backend == "auto" and out.device.type == "cpu"):
        step.write_on_host([out], tensors)
    else:
        step.launch((out,), tensors)
        if key is not None:
            schedules.again.remember(key, step, (out,), tensors, step.sizes[0])
    return out


# The arguments of a call but its sizes, build, backend and tensors, of which presence alone counts.
STATIC = tuple(field.name for field in fields(Problem) if field.name not in ("batch_size", "max_seqlen_k", "gpu"))
# By all that calls share but their sizes and tensors; with the types of the arguments, then of the window's numbers.
_kinds: dict[Hashable, tuple[list[type], Schedules]] = {}
_MOST_KINDS = 256


def _check_first(policy: str, backend: str, cache_seqlens: Any) -> None:
    """What Problem does not check."""
    checked_choice("policy", policy, POLICIES)
    checked_choice("backend", backend, BACKENDS)
    if backend == "native" and policy != "fa3":
        raise ValueError(f'policy must be "fa3" for backend="native", got {policy!r}')
    if cache_seqlens is None:
        raise TypeError("cache_seqlens must be a tensor, got NoneType")


def metadata_layout(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads: int,
    num_heads_k: int,
    headdim: int,
    cache_seqlens: torch.Tensor | None = None,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    *,
    build: str | None = None,
    policy: str = "fa3",
    arch: int | None = None,
    num_sms: int | None = None,
    batch_invariant: bool = False,
    max_partial_bytes: int = DEFAULT_PARTIAL_BYTES,
    total_q: int | None = None,
    forward_is_told: bool = True,
) -> MetadataLayout:
    """Length and rows of the tensor that `get_scheduler_metadata` makes for the same arguments.

    Launches nothing and reads no lengths: `cache_seqlens` may be left out, and then the device is taken to be an
    H100 SXM or H200 unless `arch` and `num_sms` say otherwise. Of the other tensors only their presence counts: give
    those that the function gets, or the bound on splits may be another one.
    Raises what `get_scheduler_metadata` raises.
    """
    return plan_call(locals())[3].layout


def plan_call(
    arguments: dict[str, Any], device: torch.device | None = None
) -> tuple[LengthTensors | None, Problem, FA3Rules, LaunchPlan]:
    """A call taken apart: `arguments` of `metadata_layout` by name; those left out have their defaults.

    Without `cache_seqlens` the call is for `device` (None: an H100 SXM or H200).
    """
    arguments = _DEFAULTS | arguments
    tensors = None
    if arguments["cache_seqlens"] is not None:
        tensors = LengthTensors(**{name: arguments[name] for name in LengthTensors._fields})
    names = ("batch_size", "max_seqlen_k", *STATIC)
    static = {name: arguments[name] for name in names if name not in _PRESENCE}
    static |= {name: arguments[name.removeprefix("has_")] is not None for name in _PRESENCE}
    problem = make_problem(tensors, device=device, **static)
    rules = resolve_build(arguments["build"])[1]
    return tensors, problem, rules, make_plan(problem, rules)


def unpack_metadata(tensor: torch.Tensor, layout: MetadataLayout) -> dict[str, torch.Tensor]:
    """The rows of a metadata tensor by name: [b] int32 views, indexed as `MetadataLayout` says.

    Raises `TypeError` or `ValueError` for a tensor that this layout does not describe.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.int32:
        raise TypeError(f"tensor must be an int32 tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
    if tensor.shape != (layout.size,):
        raise ValueError(f"tensor must have shape ({layout.size},) for this layout, got {tuple(tensor.shape)}")
    return {name: tensor[row] for name, row in layout.rows.items()}


_PRESENCE = ("has_cu_seqlens_q", "has_seqused_q", "has_leftpad_k")


_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(metadata_layout).parameters.items()
    if parameter.default is not inspect.Parameter.empty
}
