"""Both implementations against what the real wheels returned on a Hopper GPU, every case."""

from __future__ import annotations

import pytest
import torch

from ..helpers.cases import GOLDEN_BUILDS, golden_cases

PARTS = 10  # so that workers can share the slow interpreter's work


@pytest.mark.parametrize("build", GOLDEN_BUILDS)
def test_reference(build: str) -> None:
    for case in golden_cases(build):
        case.check(case.run("reference", "cpu"), case.rows, "NumPy model against the wheel")


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("build", GOLDEN_BUILDS)
def test_triton(build: str, part: int, device: torch.device) -> None:
    for case in golden_cases(build)[part::PARTS]:
        case.check(case.run("triton", device), case.rows, "Triton kernel against the wheel")


def test_all_goldens_are_here() -> None:
    """At least these; each recorded from the build that its name says."""
    assert {"sgl-kernel-0.3.21", "sglang-kernel-0.4.0", "sglang-kernel-0.4.2", "sglang-kernel-0.4.5"} < set(
        GOLDEN_BUILDS
    )
    assert {"vllm-0.28.0", "vllm-0.33.0", "fa3-fwd-0.0.3"} < set(GOLDEN_BUILDS)
    for build in GOLDEN_BUILDS:
        cases = golden_cases(build)
        assert len(cases) >= 400, build
        assert {case.build for case in cases} == {build}
