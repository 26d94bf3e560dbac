"""Length tensors: each on its own may have another stride or dtype than the others, and none may be written to."""

from __future__ import annotations

import itertools
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata.arguments import LengthTensors
from fa3_metadata.triton_kernels import launch
from fa3_metadata.triton_kernels.builds import SGLANG
from fa3_metadata.triton_kernels.plan import make_plan
from fa3_metadata.triton_kernels.problem import Problem

VALUES = {
    "cache_seqlens": [5000, 3000, 4000], "cu_seqlens_q": [0, 200, 210, 510], "seqused_q": [200, 10, 300],
    "cu_seqlens_k_new": [0, 3000, 3000, 6000], "leftpad_k": [2000, 10, 3000],
}  # fmt: skip
CALL: dict[str, Any] = {
    "batch_size": 3, "max_seqlen_q": 400, "max_seqlen_k": 8192, "num_heads": 8, "num_heads_k": 1, "headdim": 128,
    "max_seqlen_k_new": 3000, "causal": True, "num_splits": 16, "build": "sglang-kernel-0.4.2", "backend": "triton",
}  # fmt: skip


def tensors(device: torch.device, dtype: torch.dtype = torch.int32) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values, dtype=dtype, device=device) for name, values in VALUES.items()}


def strided(values: torch.Tensor) -> torch.Tensor:
    """A column of a matrix that is zero elsewhere."""
    matrix = torch.zeros(len(values), 3, dtype=values.dtype, device=values.device)
    matrix[:, 0] = values
    return matrix[:, 0]


@pytest.mark.parametrize("alone", [True, False], ids=["and no other", "and all others"])
@pytest.mark.parametrize("name", VALUES)
def test_one_tensor_that_is_not_contiguous(name: str, alone: bool, device: torch.device) -> None:
    given = tensors(device)
    if name == "cu_seqlens_q":
        del given["seqused_q"]  # which wins over it
    if alone:
        given = {one: values for one, values in given.items() if one in ("cache_seqlens", name)}
    right = fa3_metadata.get_scheduler_metadata(**CALL, **given)
    made = fa3_metadata.get_scheduler_metadata(**CALL, **given | {name: strided(given[name])})
    assert torch.equal(made, right)


def test_kernels_are_told_apart_by_every_dtype() -> None:
    """And by which tensors are given."""
    here = torch.device("cpu")
    kinds = [(*tensors(here, dtype).values(),) for dtype in (torch.int32, torch.int64)]
    choices = [pair if place == 0 else (*pair, None) for place, pair in enumerate(zip(*kinds, strict=True))]
    given: list[Any] = list(itertools.product(*choices))
    assert len({launch._key(lengths) for lengths in given}) == len(given) == 2 * 3**4


@pytest.mark.parametrize(("arch", "early"), [(90, True), (89, False), (80, False)])
def test_only_hopper_starts_early(arch: int, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """sm_8x has no programmatic dependent launch."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.delenv(launch.EARLY_VARIABLE, raising=False)
    problem = Problem(3, 1, 8192, 8, 1, 128, arch=arch)
    made = launch.metadata_launch(problem, make_plan(problem, SGLANG))
    assert made._constants["EARLY"] == early
    assert ("launch_pdl" in made._options) == early


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("step", [1, 2])
def test_overlap_begins_with_one_element(name: str, step: int) -> None:
    """Lengths that end where the output begins, and with one more element."""
    memory = torch.zeros(40, dtype=torch.int32)
    batch = 4 - name.startswith("cu_")
    for out, overlaps in ((memory[3 * step + 1 :], None), (memory[3 * step :], name)):
        given = {"cache_seqlens": torch.zeros(batch)} | {name: memory[: 3 * step + 1 : step]}
        assert len(given[name]) == 4
        start = out.data_ptr()
        assert LengthTensors(**given).overlapping(start, start + out.nbytes) == overlaps
