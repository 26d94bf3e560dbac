"""FlashAttention-3 scheduler metadata, made once a step instead of before every layer.

plan = fa3_metadata.MetadataPlan(max_batch_size=256, max_seqlen_k=131072, num_heads=32, num_heads_k=8, headdim=128,
                                 page_size=64, causal=True, device="cuda")
plan.update(cache_seqlens)  # once a step
out = plan.run(flash_attn_with_kvcache, **call)  # in every layer; call: its arguments by name
"""

from typing import TYPE_CHECKING, Any

from . import ops as _ops  # noqa: F401 (registers the torch operators)
from . import trace
from .api import get_scheduler_metadata, metadata_layout, unpack_metadata
from .install import install, uninstall
from .installed import DetectedBuild, detect_build
from .plans import MetadataPlan, MetadataPlans
from .scopes import step
from .status import status
from .triton_kernels.layout import MetadataLayout
from .wrapper import wrap_forward, wrapping_of

if TYPE_CHECKING:
    from collections.abc import Callable

    flash_attn_with_kvcache: Callable[..., Any]
    """The installed build's forward (vLLM's is `flash_attn_varlen_func`), wrapped by `wrap_forward` on first use.

    Same signature. Raises `ImportError` where no FA3 is installed.
    """

__version__ = "0.1.0"
__all__ = [
    "DetectedBuild",
    "MetadataLayout",
    "MetadataPlan",
    "MetadataPlans",
    "detect_build",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "install",
    "metadata_layout",
    "status",
    "step",
    "trace",
    "uninstall",
    "unpack_metadata",
    "wrap_forward",
]


def __getattr__(name: str) -> Any:
    """`flash_attn_with_kvcache`: the installed build's forward, wrapped, on first use."""
    if name != "flash_attn_with_kvcache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .installed import load_forward

    build = detect_build().build
    forward = load_forward(build)  # `install` may have wrapped it, with a policy of its own
    globals()[name] = wrapped = wrap_forward(forward, build) if wrapping_of(forward) is None else forward
    return wrapped
