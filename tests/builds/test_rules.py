"""Host-side rules that the goldens cannot show: sm_8x, the reciprocal, tables that stay consistent."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from fa3_metadata.triton_kernels import tiles
from fa3_metadata.triton_kernels.builds import RELEASES, SGLANG, UPSTREAM, FA3Rules
from fa3_metadata.triton_kernels.plan import make_plan
from fa3_metadata.triton_kernels.problem import ELEMENT_SIZE, Problem
from fa3_metadata.triton_kernels.reciprocal import approximate_reciprocal

from ..helpers.cases import DATA


def test_reciprocal_is_the_measured_one() -> None:
    measured = np.load(DATA / "mufu_rcp_0_4096.npy")
    made = np.array([approximate_reciprocal(n) for n in range(1, 1025)])
    assert made.dtype == np.float32
    assert np.array_equal(made.view(np.int32), measured[1:1025].view(np.int32))


def test_reciprocal_is_not_ieee_for_an_h200() -> None:
    assert approximate_reciprocal(132) < np.float32(1) / np.float32(132)


@pytest.mark.parametrize("num_sms", [0, -1, 1025])
def test_reciprocal_refuses_what_was_not_measured(num_sms: int) -> None:
    with pytest.raises(ValueError, match="num_sms must be from 1 to 1024"):
        approximate_reciprocal(num_sms)


@pytest.mark.parametrize("release", RELEASES, ids=lambda r: r.package)
def test_every_problem_has_a_tile_of_sixteens(release: object) -> None:
    """The kernel divides by kBlockM and kBlockN as multiples of 16 (kernel._cdiv_tile)."""
    rules: FA3Rules = release.rules  # type: ignore[attr-defined]
    flags = ["causal", "local", "paged_non_tma", "softcap", "one_wg", "dv512", "dv<=128", "sm86", "split", "append"]
    tables = [*rules.sm90_tiles.values(), *(rules.sm8x_tiles or {}).values()]
    for table, headdim in itertools.product(tables, (64, 96, 128, 192, 256)):
        for chosen in itertools.chain.from_iterable(itertools.combinations(flags, n) for n in range(5)):
            block_m, block_n = tiles.find_tile(table, headdim, frozenset(chosen))
            assert block_m % 16 == block_n % 16 == 0
            assert 32 <= block_n <= block_m * 4


def test_no_tile_is_an_error() -> None:
    with pytest.raises(LookupError, match="no tile for head dim 512"):
        tiles.find_tile(tiles.UPSTREAM_16, 512, frozenset())


# (arch, headdim, window, page_size, appended keys, num_splits) -> kBlockN of tile_size_fwd_sm8x, hopper/tile_size.h
SM8X = [
    ((80, 64, (-1, -1), None, 0, 1), 112), ((80, 64, (-1, -1), None, 0, 4), 80), ((86, 64, (99, 0), None, 0, 1), 96),
    ((80, 96, (-1, -1), 64, 0, 1), 64), ((89, 96, (99, 0), 64, 0, 1), 48), ((80, 128, (-1, -1), None, 0, 1), 64),
    ((80, 128, (99, 0), None, 0, 1), 48), ((86, 128, (-1, -1), None, 0, 1), 128), ((89, 128, (99, 0), None, 0, 1), 96),
    ((80, 128, (-1, -1), None, 0, 2), 112), ((86, 128, (99, 0), None, 0, 2), 96), ((80, 192, (-1, -1), None, 0, 1), 96),
    ((80, 192, (-1, -1), 16, 0, 1), 64), ((80, 256, (-1, -1), None, 0, 1), 96), ((80, 256, (-1, -1), None, 0, 2), 64),
    ((80, 256, (-1, -1), None, 3, 2), 48), ((86, 256, (-1, -1), None, 0, 1), 64), ((89, 256, (-1, -1), None, 0, 2), 48),
    ((89, 256, (-1, -1), None, 3, 2), 32),
]  # fmt: skip


@pytest.mark.parametrize("rules", [UPSTREAM, SGLANG], ids=lambda r: r.name)
@pytest.mark.parametrize(("asked", "block_n"), SM8X)
def test_sm8x_tiles(
    rules: FA3Rules, asked: tuple[int, int, tuple[int, int], int | None, int, int], block_n: int
) -> None:
    arch, headdim, window, page_size, new, splits = asked
    problem = Problem(
        2, 4, 9000, 8, 2, headdim, window_size=window, page_size=page_size, max_seqlen_k_new=new, num_splits=splits,
        arch=arch, num_sms=108,
    )  # fmt: skip
    plan = make_plan(problem, rules)
    assert (plan.block_m, plan.block_n) == (128, block_n)
    assert plan.pack_gqa
    assert plan.layout.has_semaphore == (splits > 1)


def test_sm8x_has_no_one_warpgroup_tiles() -> None:
    assert not make_plan(Problem(2, 1, 9000, 8, 1, 128, arch=86, num_sms=84), SGLANG).uses_one_wg
    assert make_plan(Problem(2, 1, 9000, 8, 1, 128), SGLANG).uses_one_wg


def test_sm8x_resolves_splits_with_the_tile_of_splits() -> None:
    """FA3 counts key blocks as if there were splits, then uses the tile for the splits it found."""
    one = make_plan(Problem(1, 1, 400, 8, 1, 64, arch=80, num_sms=108), UPSTREAM)
    assert one.num_splits == 5  # 400 keys are 5 blocks of 80, though only 4 of 112
    assert one.block_n == 80


def test_int32_overflow_of_a_kv_head_is_kept() -> None:
    """One KV head of exactly 2^31 bytes is negative to FA3, hence fits in L2."""
    assert make_plan(Problem(1, 200_000, 2**22, 1, 1, 128), UPSTREAM).num_splits == 1
    assert make_plan(Problem(1, 200_000, 2**22 - 4096, 1, 1, 128), UPSTREAM).num_splits > 1


@pytest.mark.parametrize("mask", [{"causal": True}, {"window_size": (1000, 1000)}])
def test_a_kv_head_beyond_l2_is_split_without_a_mask_alone(mask: dict[str, object]) -> None:
    """num_splits_heuristic, hopper/heuristics.h: of a masked call the query blocks read different keys."""
    problem = Problem(1, 200_000, 2**18, 1, 1, 128)
    assert make_plan(problem, UPSTREAM).num_splits == 3  # 128 MiB over 50 MiB
    assert make_plan(replace(problem, **mask), UPSTREAM).num_splits == 1


def test_dtypes() -> None:
    assert ELEMENT_SIZE == {"float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}


@pytest.mark.parametrize(("rules", "packed"), [(UPSTREAM, False), (SGLANG, True)], ids=["upstream", "sglang"])
def test_windows_are_not_read_by_tma_in_newer_builds(rules: FA3Rules, packed: bool) -> None:
    """Without TMA the q heads are packed, though 128 query tokens fill their tiles unpacked."""
    plan = make_plan(Problem(2, 128, 9000, 16, 8, 128, page_size=128, window_size=(1000, 0), num_splits=1), rules)
    assert plan.paged_kv_tma != packed
    assert plan.pack_gqa == packed
