"""FlashAttention-3 scheduler metadata, made once a step instead of before every layer.

metadata = fa3_metadata.get_scheduler_metadata(batch_size, 1, max_seqlen_k, 32, 8, 128, cache_seqlens)
out = flash_attn_with_kvcache(q, k_cache, v_cache, ..., scheduler_metadata=metadata)
"""

from .api import get_scheduler_metadata, metadata_layout, unpack_metadata
from .detect import DetectedBuild, detect_build
from .triton_kernels.layout import MetadataLayout

__version__ = "0.1.0"
__all__ = [
    "DetectedBuild",
    "MetadataLayout",
    "detect_build",
    "get_scheduler_metadata",
    "metadata_layout",
    "unpack_metadata",
]
