"""A decode batch of random data, and one layer's attention over it by the installed FA3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..arguments import dtype_name
from ..installed import load_forward
from ..triton_kernels.builds import package_of


@dataclass(frozen=True, eq=False)
class DecodeBatch:
    """b sequences that decode `max_seqlen_q` tokens each over a KV cache, which is paged where it has a page table."""

    q: torch.Tensor  # [b, max_seqlen_q, h, d]
    k_cache: torch.Tensor  # [pages, page_size, hk, d]; not paged: [b, keys a sequence, hk, d]
    v_cache: torch.Tensor  # the same of dv
    page_table: torch.Tensor | None  # [b, pages a sequence], int32
    cache_seqlens: torch.Tensor  # [b], int32
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    qv: torch.Tensor | None = None  # [b, max_seqlen_q, h, dv], for MLA

    @property
    def max_seqlen_k(self) -> int:
        """What FA3 takes for the longest sequence: the width of the page table in tokens, or that of the cache."""
        pages = 1 if self.page_table is None else self.page_table.shape[1]
        return pages * self.k_cache.shape[1]

    def problem_arguments(self) -> dict[str, Any]:
        """The arguments of `get_scheduler_metadata` that describe this batch."""
        return {
            "batch_size": self.q.shape[0],
            "max_seqlen_q": self.q.shape[1],
            "max_seqlen_k": self.max_seqlen_k,
            "num_heads": self.q.shape[2],
            "num_heads_k": self.k_cache.shape[2],
            "headdim": self.q.shape[3],
            "headdim_v": self.v_cache.shape[3],
            "cache_seqlens": self.cache_seqlens,
            "qkv_dtype": self.q.dtype,
            "page_size": None if self.page_table is None else self.k_cache.shape[1],
            "causal": self.causal,
            "window_size": self.window_size,
        }


def has_paged_kernels(build: str) -> bool:
    """Whether `build` was compiled with paged KV; fa3-fwd, as it is published, was not, nor with sliding windows."""
    return package_of(build) != "fa3-fwd"


def kv_cache_bytes(lengths: list[int], num_heads_k: int, headdim: int, headdim_v: int, page_size: int) -> int:
    """Bytes of a 16-bit KV cache for sequences of these lengths."""
    pages = sum(-(-length // page_size) for length in lengths) + 1
    return pages * page_size * num_heads_k * (headdim + headdim_v) * 2


def make_decode_batch(
    lengths: list[int],
    num_heads: int,
    num_heads_k: int,
    headdim: int,
    *,
    headdim_v: int | None = None,
    max_seqlen_q: int = 1,
    page_size: int = 64,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    seed: int = 0,
) -> DecodeBatch:
    """Random q and KV with shuffled pages. Lengths are the tokens in the cache of each sequence."""
    dtype_name(dtype)
    generator = torch.Generator(device).manual_seed(seed)
    pages = [max(1, -(-length // page_size)) for length in lengths]
    order = torch.randperm(sum(pages), generator=generator, device=device).to(torch.int32)
    table = torch.zeros(len(lengths), max(pages, default=1), dtype=torch.int32, device=device)
    for i, own in enumerate(order.split(pages)):
        table[i, : len(own)] = own

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).to(dtype)

    return DecodeBatch(
        q=random(len(lengths), max_seqlen_q, num_heads, headdim),
        k_cache=random(len(order), page_size, num_heads_k, headdim),
        v_cache=random(len(order), page_size, num_heads_k, headdim_v or headdim),
        page_table=table,
        cache_seqlens=torch.tensor(lengths, dtype=torch.int32, device=device),
        causal=causal,
        window_size=window_size,
    )


def attend(
    build: str, batch: DecodeBatch, scheduler_metadata: torch.Tensor | None = None, num_splits: int = 0
) -> torch.Tensor:
    """The output [b, max_seqlen_q, h, dv] of the installed FA3 forward of `build`'s package.

    Without metadata FA3 makes it itself. Raises `ImportError` where the package does not load.
    """
    common: dict[str, Any] = {
        "causal": batch.causal,
        "scheduler_metadata": scheduler_metadata,
        "num_splits": num_splits,
    }
    forward = load_forward(build)
    if package_of(build) == "vllm":
        if batch.qv is not None:
            common["q_v"] = batch.qv.flatten(0, 1)
        rows = batch.q.shape[0] * batch.q.shape[1]
        starts = torch.arange(0, rows + 1, batch.q.shape[1], dtype=torch.int32, device=batch.q.device)
        out: torch.Tensor = forward(
            batch.q.flatten(0, 1), batch.k_cache, batch.v_cache, batch.q.shape[1], starts, batch.max_seqlen_k,
            seqused_k=batch.cache_seqlens, block_table=batch.page_table, window_size=list(batch.window_size),
            fa_version=3, **common,
        )  # fmt: skip
        return out.view(*batch.q.shape[:3], -1)
    if batch.qv is not None:
        common["qv"] = batch.qv
    return forward(
        batch.q, batch.k_cache, batch.v_cache, cache_seqlens=batch.cache_seqlens, page_table=batch.page_table,
        window_size=batch.window_size, **common,
    )  # fmt: skip
