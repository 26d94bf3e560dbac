"""Which FA3 builds there are and in what they differ. A new release is one entry in RELEASES."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from . import tiles
from .layout import ROWS
from .problem import Problem

MIB = 1024 * 1024
MAX_DYNAMIC_SPLIT_BATCH = 992  # above it FA3 stops splitting; also the size of a sorting group
ROW_CONDITIONS = ("always", "sort", "swizzle", "dynamic_splits", "dynamic_row")  # what they mean: plan.make_plan
PACKED_WITH_SPLITS = ("unless_given", "also", "only")
SPLITS_COUNT = ("one_sequence", "batch_without_dynamic_row", "batch")


@dataclass(frozen=True, eq=False)  # one object a build: compared and hashed by identity
class FA3Rules:
    """The host-side facts in which FA3 builds differ. Everything else is common to them: see plan.py."""

    name: str
    sm90_tiles: dict[int, tiles.TileTable]  # by element size in bytes
    sm8x_tiles: dict[int, tiles.TileTable] | None  # None: not on sm_8x
    # The layout of the tensor.
    rows: tuple[tuple[str, str], ...]  # (row of layout.ROWS, one of ROW_CONDITIONS)
    row_alignment: int  # rows are padded to a multiple of this many elements
    semaphore_first: bool  # before the rows, not after them
    sorts_batches: bool  # longest first, unless local
    # Tiles and packing.
    one_wg_headdims: tuple[int, ...]  # head dims with kernels of a single MMA warpgroup ...
    one_wg_when_local: bool  # ... for local masks too
    packs_first: bool  # whether to pack is found before the splits and the single warpgroup, which depend on it
    paged_tma_when_local: bool
    has_attention_chunk: bool
    packs_with_splits: str  # "unless_given" otherwise; "also": whatever was given; "only": and never without splits
    packs_equal_headdims: bool  # whenever headdim == headdim_v, whatever was given
    packs_narrow_windows: bool  # 8 q heads per KV head, local, d == dv == 64
    # The bound on splits.
    splits_count: str  # query blocks of "one_sequence", of the whole "batch", or of the batch where there is no row
    one_split_drops_row: bool  # a given num_splits of 1 leaves out a "dynamic_row"; 0 that comes to 1 does not
    splits_beyond_992: bool  # the forward takes splits from metadata of more than 992 sequences, too
    forward_lacks: tuple[str, ...]  # of num_splits, pack_gqa and sm_margin: what its front end does not pass on
    l2_bytes: Callable[[int], int]  # q heads per KV head -> L2 budget of the head swizzle

    def __post_init__(self) -> None:
        for row, when in self.rows:
            if row not in ROWS or when not in ROW_CONDITIONS:
                raise ValueError(f"rows of {self.name}: {row!r} must be in layout.ROWS, {when!r} in {ROW_CONDITIONS}")
        if self.packs_with_splits not in PACKED_WITH_SPLITS or self.splits_count not in SPLITS_COUNT:
            raise ValueError(f"{self.name}: {self.packs_with_splits!r} or {self.splits_count!r} is not known")

    @property
    def bound_depends_on_batch(self) -> bool:
        """Whether FA3's bound on splits is another one for another batch size, and for other query totals."""
        return self.splits_count == "batch"

    @property
    def most_split_by_metadata(self) -> int:
        """The largest batch whose splits the metadata says; in a larger one the forward splits all alike."""
        return 2**31 - 1 if self.splits_count != "batch_without_dynamic_row" else MAX_DYNAMIC_SPLIT_BATCH


def _fixed_l2(_: int) -> int:
    return 8 * MIB


def _l2_shared_by_q_heads(q_heads_per_kv_head: int) -> int:
    return 32 * MIB // next((step for step in (1, 2, 4, 8) if q_heads_per_kv_head <= step), 16)


# FlashAttention hopper/ from 199401d (August 2025) on.
UPSTREAM = FA3Rules(
    name="upstream",
    sm90_tiles={2: tiles.UPSTREAM_16, 1: tiles.UPSTREAM_8},
    sm8x_tiles={2: tiles.SM8X_16, 1: tiles.SM8X_8},
    rows=(
        ("num_splits_dynamic", "always"),
        ("num_m_blocks", "always"),
        ("varlen_batch_idx", "sort"),
        ("num_nheads_in_l2", "swizzle"),
    ),
    row_alignment=4,
    semaphore_first=False,
    sorts_batches=True,
    one_wg_headdims=(),
    one_wg_when_local=False,
    packs_first=False,
    paged_tma_when_local=True,
    has_attention_chunk=True,
    packs_with_splits="unless_given",
    packs_equal_headdims=False,
    packs_narrow_windows=False,
    splits_count="one_sequence",
    one_split_drops_row=False,
    splits_beyond_992=True,
    forward_lacks=(),
    l2_bytes=_fixed_l2,
)
# Before that: the splits alone, in batch order. Not on sm_8x, where without splits the forward reads a word past the
# end of the tensor that it asks for.
SGL_LEGACY = replace(
    UPSTREAM,
    name="sgl-legacy",
    sm90_tiles={2: tiles.LEGACY_16, 1: tiles.UPSTREAM_8},
    sm8x_tiles=None,
    rows=(("num_splits_dynamic", "dynamic_row"),),
    row_alignment=1,
    semaphore_first=True,
    sorts_batches=False,
    has_attention_chunk=False,
    splits_count="batch_without_dynamic_row",
    splits_beyond_992=False,
)
# SGLang's fork since the package was renamed: adds decode kernels with a single MMA warpgroup.
SGLANG = replace(
    UPSTREAM,
    name="sglang",
    sm90_tiles={2: tiles.SGLANG_16, 1: tiles.SGLANG_8},
    one_wg_headdims=(64, 128),
    one_wg_when_local=True,
    paged_tma_when_local=False,
)
SGLANG_0_4_5 = replace(SGLANG, name="sglang-0.4.5", splits_count="batch")

# vLLM's fork. At first the legacy layout, and kernels with a single MMA warpgroup for head dim 128.
VLLM_0_8_5 = replace(
    SGL_LEGACY,
    name="vllm-0.8.5",
    sm90_tiles={2: tiles.VLLM_0_8_5_16, 1: tiles.UPSTREAM_8},
    one_wg_headdims=(128,),
    one_wg_when_local=True,
    packs_first=True,
    packs_with_splits="only",
    forward_lacks=("num_splits", "pack_gqa", "sm_margin"),
)
VLLM_0_9_2 = replace(VLLM_0_8_5, name="vllm-0.9.2", forward_lacks=("pack_gqa", "sm_margin"))
VLLM_0_10_1 = replace(
    VLLM_0_9_2,
    name="vllm-0.10.1",
    sm90_tiles={2: tiles.VLLM_0_10_1_16, 1: tiles.UPSTREAM_8},
    one_wg_headdims=(64, 128),
    packs_first=False,
    paged_tma_when_local=False,
    packs_with_splits="also",
    packs_narrow_windows=True,
    one_split_drops_row=True,
)
VLLM_0_11_1 = replace(VLLM_0_10_1, name="vllm-0.11.1", sm90_tiles={2: tiles.VLLM_0_10_1_16, 1: tiles.SGLANG_8})
# Then upstream's kernel: batch order, query lengths in place of query blocks, another L2 budget.
VLLM_0_17 = replace(
    VLLM_0_11_1,
    name="vllm-0.17",
    sm90_tiles={2: tiles.VLLM_16, 1: tiles.SGLANG_8},
    rows=(
        ("packed_seqlen_q", "always"),
        ("num_splits_dynamic", "dynamic_splits"),
        ("num_nheads_in_l2", "swizzle"),
    ),
    row_alignment=4,
    semaphore_first=False,
    one_wg_when_local=False,
    packs_equal_headdims=True,
    splits_count="one_sequence",
    one_split_drops_row=False,
    l2_bytes=_l2_shared_by_q_heads,
)
VLLM = replace(VLLM_0_17, name="vllm", sm90_tiles={2: tiles.VLLM_16, 1: tiles.VLLM_8})


@dataclass(frozen=True)
class Release:
    """The published versions `oldest` to `newest` of a package, both included, share `rules`."""

    package: str
    oldest: str
    newest: str
    rules: FA3Rules


# Each range has recordings in tests/data: of the first and last version, and of every one at which a wheel changed.
RELEASES = (
    Release("sgl-kernel", "0.1.0", "0.3.16", SGL_LEGACY),
    Release("sgl-kernel", "0.3.16.post1", "0.3.16.post1", UPSTREAM),
    Release("sgl-kernel", "0.3.16.post2", "0.3.16.post2", SGL_LEGACY),  # went back
    Release("sgl-kernel", "0.3.16.post3", "0.3.21", UPSTREAM),
    Release("sglang-kernel", "0.4.0", "0.4.4", SGLANG),
    Release("sglang-kernel", "0.4.5", "0.4.10", SGLANG_0_4_5),
    Release("vllm", "0.8.5", "0.9.1", VLLM_0_8_5),
    Release("vllm", "0.9.2", "0.10.0", VLLM_0_9_2),
    Release("vllm", "0.10.1", "0.11.0", VLLM_0_10_1),
    Release("vllm", "0.11.1", "0.16.0", VLLM_0_11_1),
    Release("vllm", "0.17.0", "0.18.1", VLLM_0_17),
    Release("vllm", "0.19.0", "0.33.0", VLLM),
    Release("flash-attn-3", "3.0.0", "3.0.0", UPSTREAM),  # built from source; fa3-fwd is the same, published
    Release("fa3-fwd", "0.0.3", "0.0.3", UPSTREAM),
)
PACKAGES = tuple(dict.fromkeys(release.package for release in RELEASES))
DEFAULT_BUILD = "sglang-kernel-0.4.2"


def supported_builds() -> str:
    """The supported packages and versions in words, for messages."""
    said = []
    for package in PACKAGES:
        ranges = [release for release in RELEASES if release.package == package]
        oldest, newest = ranges[0].oldest, ranges[-1].newest
        said.append(f"{package} {oldest}" + (f" to {newest}" if newest != oldest else ""))
    return ", ".join(said)


def package_of(build: str) -> str:
    """The package that `build`, "package-version", names; `ValueError` for one that is not known."""
    return _parse(build)[0]


def rules_for(build: str) -> FA3Rules:
    """The rules of `build`, "package-version" such as "sglang-kernel-0.4.2".

    A local suffix (`+cu130`) is ignored; `.postN` counts. Raises `ValueError` for a package or a version whose rules
    are not known, and for pre-releases, whose rules no version number tells.
    """
    package, text = _parse(build)
    version = version_key(text)
    for release in RELEASES:
        oldest, newest = version_key(release.oldest), version_key(release.newest)
        if version and release.package == package and oldest <= version <= newest:
            return release.rules
    raise ValueError(
        f"build {build!r}: version {text} of {package} is not supported (supported are "
        f"{supported_builds()}); others may use another metadata layout or another bound on splits. "
        f"Install a supported version, or, if you know that yours behaves like one of these, name that one as build"
    )


def version_key(text: str) -> tuple[int, ...]:
    """A version as numbers that compare as versions do, `.postN` last; empty for anything but a release."""
    version = re.fullmatch(r"(\d+(?:\.\d+){0,3})(?:\.post(\d+))?(\+.*)?", text)
    if not version:
        return ()
    numbers = [int(part) for part in version[1].split(".")]
    return (*numbers, *[0] * (4 - len(numbers)), int(version[2] or 0))


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


def untellable_reason(rules: FA3Rules, problem: Problem) -> str | None:
    """Why metadata of `problem` could not be used: its op takes a bound on splits that its forward cannot be told."""
    if problem.num_splits and "num_splits" in rules.forward_lacks:
        return f"num_splits must be 0 for the {rules.name} build, whose forward takes none, got {problem.num_splits}"
    return None
