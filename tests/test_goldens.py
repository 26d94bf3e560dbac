"""Both implementations against what the real wheels returned on an H200, every case."""

from __future__ import annotations

import pytest
import torch

from .cases import GOLDEN_BUILDS, golden_cases

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
    assert {build: len(golden_cases(build)) for build in GOLDEN_BUILDS} == {
        "sgl-kernel-0.3.21": 500,
        "sglang-kernel-0.4.0": 500,
        "sglang-kernel-0.4.2": 750,
        "vllm-0.33.0": 500,
    }
