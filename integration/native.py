"""`backend="native"`: the installed build's own op."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from .arguments import LengthTensors, device_facts
from .detect import installed_version
from .providers import provider_of
from .triton_kernels.builds import package_of, rules_for
from .triton_kernels.problem import Problem


def native_op(build: str) -> Callable[..., torch.Tensor]:
    """The `get_scheduler_metadata` op of the installed package that `build` names.

    Raises `RuntimeError` where that package is missing, behaves unlike `build`, or has no such op.
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
        raise RuntimeError(
            f'backend="native": {package} {version} cannot make scheduler metadata; use backend="triton"'
        ) from None


def native_metadata(build: str, problem: Problem, tensors: LengthTensors) -> torch.Tensor:
    """A new tensor made by the installed op; lengths are converted to contiguous int32 first."""
    device = tensors.cache_seqlens.device
    if device.type != "cuda":
        raise RuntimeError(f'backend="native" needs CUDA tensors, got cache_seqlens on {device}')
    p = problem
    if (p.arch, p.num_sms) != device_facts(device, None, None):
        raise RuntimeError('backend="native" answers for the device of cache_seqlens: leave arch and num_sms out')
    if p.batch_size == 0:
        raise RuntimeError('backend="native" cannot take an empty batch: the op crashes the process')
    op = native_op(build)
    chunk = (p.attention_chunk,) if rules_for(build).has_attention_chunk else ()
    with torch.cuda.device(device):
        return op(
            p.batch_size, p.max_seqlen_q, p.max_seqlen_k, p.num_heads, p.num_heads_k, p.headdim, p.value_headdim,
            getattr(torch, p.qkv_dtype), _int32(tensors.cache_seqlens), _int32(tensors.cu_seqlens_q),
            _int32(tensors.cu_seqlens_k), _int32(tensors.cu_seqlens_k_new), _int32(tensors.seqused_q),
            _int32(tensors.leftpad_k), p.page_size, p.max_seqlen_k_new, p.causal, *p.window_size, *chunk,
            p.has_softcap, p.num_splits, p.pack_gqa, p.sm_margin,
        )  # fmt: skip


def _int32(lengths: torch.Tensor | None) -> torch.Tensor | None:
    return None if lengths is None else lengths.to(torch.int32).contiguous()
