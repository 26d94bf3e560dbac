"""Which FA3 is installed, and what it has: the build and its rules, its forward, its own op."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module, metadata
from typing import Any

import torch

from .arguments import LengthTensors, device_facts
from .triton_kernels.builds import DEFAULT_BUILD, FA3Rules, package_of, rules_for
from .triton_kernels.plan import make_plan
from .triton_kernels.problem import Problem

BUILD_VARIABLE = "FA3_METADATA_BUILD"
SEARCH_ORDER = ("sglang-kernel", "sgl-kernel", "vllm", "flash-attn-3", "fa3-fwd")


@dataclass(frozen=True)
class DetectedBuild:
    """The FA3 build that `build=None` means, and why: what `detect_build` returns."""

    build: str  # such as "sglang-kernel-0.4.2"
    reason: str


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def _search() -> DetectedBuild:
    found = {package: version for package in SEARCH_ORDER if (version := installed_version(package))}
    if not found:
        return DetectedBuild(DEFAULT_BUILD, f"none of {', '.join(SEARCH_ORDER)} is installed; this is the default")
    package, version = next(iter(found.items()))
    others = f"; comes before {', '.join(list(found)[1:])}, also installed" if len(found) > 1 else ""
    return DetectedBuild(f"{package}-{version}", f"{package} {version} is installed{others}")


def detect_build() -> DetectedBuild:
    """The build that `build=None` means, and why.

    The environment variable FA3_METADATA_BUILD wins; then the first installed package of sglang-kernel,
    sgl-kernel, vllm, flash-attn-3, fa3-fwd; with none of them, sglang-kernel-0.4.2. The packages are looked up once a
    process. The answer is not checked here: an unsupported version raises where it is used.
    """
    if build := os.environ.get(BUILD_VARIABLE):
        return DetectedBuild(build, f"the environment variable {BUILD_VARIABLE} says so")
    return _search()


def resolve_build(build: str | None) -> tuple[str, FA3Rules]:
    """(name, rules) of a build; None means the detected one."""
    name = detect_build().build if build is None else build
    return name, _rules_for(name)


_rules_for = lru_cache(maxsize=64)(rules_for)


@dataclass(frozen=True)
class Provider:
    """Import names of one package."""

    module: str  # holds the forward and, in builds that have it, get_scheduler_metadata
    forward: str
    op_module: str  # its import registers the ops
    op_namespace: str  # torch.ops.<this>


_SGL = Provider("sgl_kernel.flash_attn", "flash_attn_with_kvcache", "sgl_kernel.flash_attn", "sgl_kernel")
PROVIDERS = {
    "sglang-kernel": _SGL,
    "sgl-kernel": _SGL,
    "vllm": Provider("vllm.vllm_flash_attn", "flash_attn_varlen_func", "vllm.vllm_flash_attn", "_vllm_fa3_C"),
    "flash-attn-3": Provider("flash_attn_interface", "flash_attn_with_kvcache", "flash_attn_3._C", "flash_attn_3"),
    "fa3-fwd": Provider("fa3_fwd_interface", "flash_attn_with_kvcache", "fa3_fwd._C", "fa3_fwd"),
}


def provider_of(build: str) -> Provider:
    """The provider of `build`'s package; `ValueError` for a package that is not known."""
    return PROVIDERS[package_of(build)]


def load_forward(build: str) -> Callable[..., Any]:
    """The installed forward of `build`'s package. Raises `ImportError` where it does not load."""
    provider = provider_of(build)
    return getattr(import_module(provider.module), provider.forward)


class MissingOpError(RuntimeError):
    """The installed package has no op that makes scheduler metadata."""


def native_op(build: str) -> Callable[..., torch.Tensor]:
    """The `get_scheduler_metadata` op of the installed package that `build` names.

    Raises `RuntimeError` where that package is missing, behaves unlike `build`, or has no such op (`MissingOpError`).
    """
    package = package_of(build)
    version = installed_version(package)
    if version is None:
        raise RuntimeError(f'backend="native" needs {package}, which is not installed (build is {build!r})')
    if rules_for(f"{package}-{version}") is not rules_for(build):
        raise RuntimeError(f'backend="native": build is {build!r}, but {package} {version} is installed')
    provider = provider_of(build)
    try:
        import_module(provider.op_module)
        return getattr(torch.ops, provider.op_namespace).get_scheduler_metadata.default
    except (ImportError, OSError) as error:
        raise RuntimeError(f'backend="native": {package} {version} does not load: {error}') from error
    except AttributeError:
        raise MissingOpError(
            f'backend="native": {package} {version} cannot make scheduler metadata; use backend="triton"'
        ) from None


def op_arguments(problem: Problem, rules: FA3Rules, tensors: LengthTensors) -> tuple[Any, ...]:
    """The op's arguments by position: the order of `mha_fwd_get_scheduler_metadata` (hopper/flash_api.cpp).

    Lengths are converted to contiguous int32.
    """
    p = problem
    chunk = (p.attention_chunk,) if rules.has_attention_chunk else ()
    return (
        p.batch_size, p.max_seqlen_q, p.max_seqlen_k, p.num_heads, p.num_heads_k, p.headdim, p.value_headdim,
        getattr(torch, p.qkv_dtype), _int32(tensors.cache_seqlens), _int32(tensors.cu_seqlens_q),
        _int32(tensors.cu_seqlens_k), _int32(tensors.cu_seqlens_k_new), _int32(tensors.seqused_q),
        _int32(tensors.leftpad_k), p.page_size, p.max_seqlen_k_new, p.causal, *p.window_size, *chunk,
        p.has_softcap, p.num_splits, p.pack_gqa, p.sm_margin,
    )  # fmt: skip


def native_metadata(build: str, problem: Problem, tensors: LengthTensors) -> torch.Tensor:
    """A new tensor made by the installed op."""
    device = tensors.cache_seqlens.device
    if device.type != "cuda":
        raise RuntimeError(f'backend="native" needs CUDA tensors, got cache_seqlens on {device}')
    if (problem.arch, problem.num_sms) != device_facts(device, None, None):
        raise RuntimeError('backend="native" answers for the device of cache_seqlens: leave arch and num_sms out')
    if problem.batch_size == 0:
        raise RuntimeError('backend="native" cannot take an empty batch: the op crashes the process')
    rules = rules_for(build)
    if rules.bound_depends_on_batch and problem.query_tokens != problem.batch_size * problem.max_seqlen_q:
        raise RuntimeError(
            f'backend="native" counts batch_size * max_seqlen_q queries: leave total_q out, got {problem.total_q}'
        )
    op = native_op(build)
    with torch.cuda.device(device):
        made = op(*op_arguments(problem, rules, tensors))
    if made.shape != (size := make_plan(problem, rules).layout.size,):
        raise RuntimeError(f'backend="native": the op of {build} made {made.numel()} elements instead of {size}')
    return made


def _int32(lengths: torch.Tensor | None) -> torch.Tensor | None:
    return None if lengths is None else lengths.to(torch.int32).contiguous()
