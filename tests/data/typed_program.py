"""A user's program with the whole public API, for `mypy --strict` (tests/project/test_types.py); it is not run."""

from collections.abc import Callable

import fa3_metadata
import torch
from fa3_metadata import DetectedBuild, MetadataLayout, MetadataPlan, MetadataPlans, flash_attn_with_kvcache


def attend(cache_seqlens: torch.Tensor) -> torch.Tensor:
    metadata: torch.Tensor = fa3_metadata.get_scheduler_metadata(
        4, 1, 8192, 32, 8, 128, cache_seqlens, page_size=64, causal=True, window_size=(-1, -1), policy="balanced"
    )
    layout: MetadataLayout = fa3_metadata.metadata_layout(4, 1, 8192, 32, 8, 128, page_size=64, causal=True)
    rows: dict[str, torch.Tensor] = fa3_metadata.unpack_metadata(metadata, layout)
    splits: int = layout.num_splits
    return rows["num_splits_dynamic"].clamp(max=splits)


def serve(forward: Callable[..., torch.Tensor], cache_seqlens: torch.Tensor) -> torch.Tensor:
    full = MetadataPlan(max_batch_size=4, max_seqlen_k=8192, num_heads=32, num_heads_k=8, headdim=128, device="cpu")
    plans = MetadataPlans([full])
    plans.warm_up([1, 4])
    plans.update(cache_seqlens)
    out: torch.Tensor = full.run(forward, causal=True)
    arguments: dict[str, object] = full.forward_arguments(causal=True)
    with fa3_metadata.step(lengths_stay=True):
        wrapped = fa3_metadata.wrap_forward(forward, build="sglang-kernel-0.4.2", policy="balanced")
        wrapped(**arguments)
        flash_attn_with_kvcache(out, causal=True)
    return out


def inspect() -> str:
    found: DetectedBuild = fa3_metadata.detect_build()
    done: str = fa3_metadata.install(wrap_forward=True) + fa3_metadata.uninstall()
    facts: dict[str, object] = fa3_metadata.status(check=False)
    fa3_metadata.trace.start("steps.trace")
    fa3_metadata.trace.stop()
    version: str = fa3_metadata.__version__
    return f"{found.build} {found.reason} {done} {facts} {version}"
