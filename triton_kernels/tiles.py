"""Tile sizes kBlockM x kBlockN of the FA3 builds, as data.

A row reads (largest rounded head dim, condition, kBlockM, kBlockN), and the first row that matches wins.
A condition is a choice, by `|`, of flags joined by `&`; the empty one always holds. Flags on sm_90:

    causal, local      the mask, after FA3's normalisation (local: a sliding window or a chunk)
    paged_non_tma      paged KV that is read without TMA
    softcap            scores are capped
    one_wg             a single MMA warpgroup, for few query rows
    dv512, dv256, dv<=128   the rounded head dim of V

and on sm_8x: local, sm86 (sm_86 or sm_89), split (more than one KV split), paged, append (new keys).

Sources: `tile_size_fwd_sm90` and `tile_size_fwd_sm8x` in hopper/tile_size.h of FlashAttention and of vLLM's fork at
the revisions that the releases were built from, and the TileShape_MNK template arguments in the names of the kernels
compiled into every published wheel (`python -m bench wheel-rules` reads them).
"""

from __future__ import annotations

from functools import lru_cache

TileTable = tuple[tuple[int, str, int, int], ...]


def find_tile(table: TileTable, headdim: int, flags: frozenset[str]) -> tuple[int, int]:
    """(kBlockM, kBlockN) of the first row of `table` for this rounded head dim and these flags."""
    for largest_headdim, condition, block_m, block_n in table:
        if headdim <= largest_headdim and _holds(condition, flags):
            return block_m, block_n
    raise LookupError(f"no tile for head dim {headdim} with {sorted(flags)}")


@lru_cache(maxsize=1024)
def _holds(condition: str, flags: frozenset[str]) -> bool:
    return not condition or any(
        all(flag.strip() in flags for flag in choice.split("&")) for choice in condition.split("|")
    )


# What many tables share: MLA, head dims above 64 with 16-bit values, and kernels with a single MMA warpgroup.
_MLA_16 = ((64, "dv512", 64, 64), (64, "dv256", 128, 96))
_ABOVE_64_16 = (
    (96, "local | paged_non_tma", 192, 128),
    (96, "", 192, 144),
    (128, "causal | local | paged_non_tma", 128, 128),
    (128, "", 128, 176),
    (192, "local | paged_non_tma", 128, 96),
    (192, "dv<=128", 128, 128),
    (192, "", 128, 112),
    (256, "local", 128, 64),
    (256, "", 128, 80),
)
_ONE_WG_128_16 = (
    (128, "one_wg & causal | one_wg & local | one_wg & paged_non_tma", 64, 128),
    (128, "one_wg", 64, 176),
)

UPSTREAM_16: TileTable = (
    *_MLA_16,
    (64, "causal | local | paged_non_tma", 192, 128),
    (64, "", 192, 192),
    *_ABOVE_64_16,
)
UPSTREAM_8: TileTable = (
    (64, "", 192, 160),
    (96, "", 192, 128),
    (128, "paged_non_tma", 128, 160),
    (128, "softcap & local", 128, 192),
    (128, "", 128, 224),
    (192, "paged_non_tma & local | softcap & local", 128, 128),
    (192, "", 128, 160),
    (256, "local", 128, 64),
    (256, "", 128, 128),
)
LEGACY_16: TileTable = (  # upstream and sgl-kernel before August 2025
    (64, "dv512", 64, 64),
    (64, "dv256", 128, 112),
    (64, "causal | local", 192, 128),
    (64, "", 192, 192),
    *_ABOVE_64_16,
)

SGLANG_16: TileTable = (
    *_MLA_16,
    (64, "one_wg", 64, 192),
    (64, "causal", 192, 128),
    (64, "local", 192, 192),
    (64, "paged_non_tma", 192, 128),
    (64, "", 192, 192),
    *_ONE_WG_128_16,
    *_ABOVE_64_16,
)
SGLANG_8: TileTable = (
    (64, "one_wg", 64, 128),
    (128, "one_wg", 64, 96),
    *UPSTREAM_8,
)

_64_VLLM_16 = (
    (64, "one_wg", 64, 192),
    (64, "causal", 192, 128),
    (64, "local | paged_non_tma", 192, 160),
    (64, "", 192, 192),
)
VLLM_0_8_5_16: TileTable = (*LEGACY_16[:4], *_ONE_WG_128_16, *_ABOVE_64_16)
VLLM_0_10_1_16: TileTable = (*LEGACY_16[:2], *_64_VLLM_16, *_ONE_WG_128_16, *_ABOVE_64_16)
VLLM_16: TileTable = (
    *_MLA_16,
    *_64_VLLM_16,
    (96, "local | paged_non_tma", 192, 128),
    (96, "", 192, 144),
    *_ONE_WG_128_16,
    (128, "causal | local | paged_non_tma", 128, 128),
    (128, "", 128, 160),
    (192, "local | paged_non_tma", 128, 96),
    (192, "dv<=128", 128, 128),
    (192, "", 128, 96),
    (256, "local", 128, 64),
    (256, "", 128, 80),
)
VLLM_8: TileTable = (
    (64, "one_wg", 64, 128),
    (64, "", 192, 128),
    (96, "", 128, 128),
    (128, "one_wg", 64, 96),
    (128, "", 128, 192),
    (192, "", 128, 96),
    (256, "local", 128, 64),
    (256, "", 128, 128),
)

SM8X_16: TileTable = (
    (64, "split", 128, 80),
    (64, "local", 128, 96),
    (64, "", 128, 112),
    (96, "split | local", 128, 48),
    (96, "", 128, 64),
    (128, "split & local", 128, 96),
    (128, "split", 128, 112),
    (128, "sm86 & local", 128, 96),
    (128, "sm86", 128, 128),
    (128, "local", 128, 48),
    (128, "", 128, 64),
    (192, "append | local | split | paged", 128, 64),
    (192, "", 128, 96),
    (256, "sm86 & append", 128, 32),
    (256, "sm86 & split | sm86 & local", 128, 48),
    (256, "sm86", 128, 64),
    (256, "append", 128, 48),
    (256, "split | local", 128, 64),
    (256, "", 128, 96),
)
SM8X_8: TileTable = ((256, "", 128, 64),)
