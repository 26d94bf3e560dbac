"""bench/newer_torch.py, with which an sgl-kernel built for an older torch is tested, on tensors of this torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import newer_torch


def test_a_tensor_that_the_wheel_would_misread_is_replaced_by_another_of_the_same_memory() -> None:
    made = [torch.arange(4) for _ in range(500)]
    wrong = [tensor for tensor in made if newer_torch.is_misread(tensor)]
    assert wrong, "none of 500 tensors lies at such an address"
    for tensor in wrong:
        found = newer_torch.readable(tensor, misread := [])
        assert found.data_ptr() == tensor.data_ptr()
        assert not newer_torch.is_misread(found)
        assert misread[0] is tensor


def test_the_places_of_misread_tensors_are_kept_from_the_next_ones() -> None:
    base = torch.empty(0)
    for _ in range(50):
        newer_torch.keep_misread_places()
        assert not any(map(newer_torch.is_misread, [base.detach() for _ in range(5)]))


def test_a_call_that_misread_its_own_tensors_is_repeated_and_any_other_error_is_not() -> None:
    errors = [RuntimeError("a Tensor that doesn't have storage")] * 3

    def op(tensor: torch.Tensor, number: int, **named: Any) -> tuple[Any, ...]:
        if errors:
            raise errors.pop()
        return tensor, number, named

    given = torch.arange(3)
    assert newer_torch._guarded(op, given, 5, pack_gqa=True)[1:] == (5, {"pack_gqa": True})
    errors[:] = [ValueError("another")]
    with pytest.raises(ValueError, match="another"):
        newer_torch._guarded(op, given, 5)
    errors[:] = [RuntimeError("doesn't have storage")] * 100
    with pytest.raises(RuntimeError, match="storage"):
        newer_torch._guarded(op, given, 5)


def test_a_wheel_that_is_not_there_needs_no_help() -> None:
    assert newer_torch.installed_version("sgl-kernel") or not newer_torch.avoid_misread_tensors()
