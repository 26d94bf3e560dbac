"""The packages that bring an FA3 build, and where they keep it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from .triton_kernels.builds import package_of


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
