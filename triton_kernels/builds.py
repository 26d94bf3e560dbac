"""Which FA3 builds there are and in what they differ. A new release is one entry in RELEASES."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from . import tiles
from .problem import Problem

MIB = 1024 * 1024


@dataclass(frozen=True, eq=False)  # one object a build: compared and hashed by identity
class FA3Rules:
    """The host-side facts in which FA3 builds differ. Everything else is common to them: see plan.py."""

    name: str
    sm90_tiles: dict[int, tiles.TileTable]  # by element size in bytes
    sm8x_tiles: dict[int, tiles.TileTable] | None  # None: this build has no sm_8x kernels
    rows: tuple[tuple[str, str], ...]  # (row, when): always, sort, swizzle or dynamic_splits
    sorts_batches: bool  # longest first, unless local
    has_one_wg: bool  # kernels with a single MMA warpgroup exist ...
    one_wg_when_local: bool  # ... for local masks too
    paged_tma_when_local: bool
    has_attention_chunk: bool
    forces_pack_gqa: bool  # whenever there are splits or d == dv, whatever the caller asked for
    packs_narrow_windows: bool  # 8 q heads per KV head, local, d == dv == 64
    splits_beyond_992: bool  # the forward takes splits from metadata of more than 992 sequences, too
    l2_bytes: Callable[[int], int]  # q heads per KV head -> L2 budget of the head swizzle


def _fixed_l2(_: int) -> int:
    return 8 * MIB


def _l2_shared_by_q_heads(q_heads_per_kv_head: int) -> int:
    return 32 * MIB // next((step for step in (1, 2, 4, 8) if q_heads_per_kv_head <= step), 16)


_SORTED_ROWS = (
    ("num_splits_dynamic", "always"),
    ("num_m_blocks", "always"),
    ("varlen_batch_idx", "sort"),
    ("num_nheads_in_l2", "swizzle"),
)
_SM8X = {2: tiles.SM8X_16, 1: tiles.SM8X_8}

# FlashAttention hopper/ from 199401d (August 2025) on.
UPSTREAM = FA3Rules(
    name="upstream",
    sm90_tiles={2: tiles.UPSTREAM_16, 1: tiles.UPSTREAM_8},
    sm8x_tiles=_SM8X,
    rows=_SORTED_ROWS,
    sorts_batches=True,
    has_one_wg=False,
    one_wg_when_local=False,
    paged_tma_when_local=True,
    has_attention_chunk=True,
    forces_pack_gqa=False,
    packs_narrow_windows=False,
    splits_beyond_992=True,
    l2_bytes=_fixed_l2,
)
# SGLang's fork since the package was renamed: adds decode kernels with a single MMA warpgroup.
SGLANG = FA3Rules(
    name="sglang",
    sm90_tiles={2: tiles.SGLANG_16, 1: tiles.SGLANG_8},
    sm8x_tiles=_SM8X,
    rows=_SORTED_ROWS,
    sorts_batches=True,
    has_one_wg=True,
    one_wg_when_local=True,
    paged_tma_when_local=False,
    has_attention_chunk=True,
    forces_pack_gqa=False,
    packs_narrow_windows=False,
    splits_beyond_992=True,
    l2_bytes=_fixed_l2,
)
# vLLM's fork: batch order, query lengths in place of query blocks, another L2 budget.
VLLM = FA3Rules(
    name="vllm",
    sm90_tiles={2: tiles.VLLM_16, 1: tiles.VLLM_8},
    sm8x_tiles=None,
    rows=(
        ("packed_seqlen_q", "always"),
        ("num_splits_dynamic", "dynamic_splits"),
        ("num_nheads_in_l2", "swizzle"),
    ),
    sorts_batches=False,
    has_one_wg=True,
    one_wg_when_local=False,
    paged_tma_when_local=False,
    has_attention_chunk=False,
    forces_pack_gqa=True,
    packs_narrow_windows=True,
    splits_beyond_992=False,
    l2_bytes=_l2_shared_by_q_heads,
)


@dataclass(frozen=True)
class Release:
    """The versions `oldest` to `newest` (both included, as numbers) of a package share `rules`."""

    package: str
    oldest: tuple[int, ...]
    newest: tuple[int, ...]
    rules: FA3Rules


RELEASES = (
    Release("sgl-kernel", (0, 3, 20), (0, 3, 21), UPSTREAM),
    Release("sglang-kernel", (0, 4, 0), (0, 4, 10), SGLANG),
    Release("vllm", (0, 33, 0), (0, 33, 99), VLLM),
    Release("flash-attn-3", (3, 0, 0), (3, 0, 99), UPSTREAM),
)
PACKAGES = tuple(dict.fromkeys(release.package for release in RELEASES))
DEFAULT_BUILD = "sglang-kernel-0.4.2"


def supported_builds() -> str:
    """The supported packages and versions in words, for messages."""
    return ", ".join(f"{r.package} {_dotted(r.oldest)} to {_dotted(r.newest)}" for r in RELEASES)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join("x" if part == 99 else str(part) for part in version)


def package_of(build: str) -> str:
    """The package that `build`, "package-version", names; `ValueError` for one that is not known."""
    return _parse(build)[0]


def rules_for(build: str) -> FA3Rules:
    """The rules of `build`, "package-version" such as "sglang-kernel-0.4.2".

    A local suffix (`+cu130`) and `.postN` are ignored. Raises `ValueError` for a package or a version
    whose metadata layout is not known, and for pre-releases, whose layout no version number tells.
    """
    package, text = _parse(build)
    version = re.fullmatch(r"(\d+(?:\.\d+)*)(\.post\d+)?(\+.*)?", text)
    if version:
        number = tuple(map(int, version[1].split(".")))
        number += (0,) * (3 - len(number))
        for release in RELEASES:
            if release.package == package and release.oldest <= number <= release.newest:
                return release.rules
    raise ValueError(
        f"build {build!r}: version {text} of {package} is not supported (supported are "
        f"{supported_builds()}); older ones use another metadata layout, newer ones have not been verified. "
        f"Install a supported version, or, if you know that yours behaves like one of these, name that one as build"
    )


def _parse(build: str) -> tuple[str, str]:
    """(package, version) of a known package."""
    if not isinstance(build, str):
        raise TypeError(f"build must be a string such as {DEFAULT_BUILD!r}, got {build!r}")
    match = re.fullmatch(r"([A-Za-z][\w-]*?)-v?(\d[^-]*)", build.strip())
    if match and (package := match[1].lower().replace("_", "-")) in PACKAGES:
        return package, match[2]
    raise ValueError(
        f"build {build!r} is not known; supported are {supported_builds()}, written like {DEFAULT_BUILD!r}"
    )


def unsupported_reason(rules: FA3Rules, problem: Problem) -> str | None:
    """Why a build with these rules cannot answer `problem`, naming the argument, or None."""
    if problem.arch < 90 and rules.sm8x_tiles is None:
        return f"arch must be 90 for the {rules.name} build, got {problem.arch}"
    if problem.attention_chunk and not rules.has_attention_chunk:
        return f"attention_chunk must be 0 for the {rules.name} build, got {problem.attention_chunk}"
    return None
