"""bench/newer_torch.py, with which an sgl-kernel built for an older torch is tested, on tensors of this torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import newer_torch


class Placed:
    """A tensor, of which only the address counts; those made of it lie at the next ones."""

    def __init__(self, *addresses: int) -> None:
        self._cdata, self._next = addresses[0], addresses[1:]

    def detach(self) -> Placed:
        return Placed(*self._next)


def test_a_tensor_that_the_wheel_would_misread_is_replaced_by_another_of_the_same_memory() -> None:
    misread: list[Any] = []
    wrong, right = 0x7F0000000090, 0x7F00000000A0  # the strides lie 0x70 bytes behind
    first: Any = Placed(wrong, wrong + 0x100, right)
    assert newer_torch.readable(first, misread)._cdata == right
    assert [one._cdata for one in misread] == [wrong, wrong + 0x100]
    good = torch.arange(4).detach()
    while newer_torch.is_misread(good):
        good, _kept = good.detach(), good
    assert newer_torch.readable(good, []) is good


def test_the_places_of_misread_tensors_are_kept_from_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    every_third = [number % 3 == 0 for number in range(48)]
    answers, kept = iter(every_third), []
    monkeypatch.setattr(newer_torch, "is_misread", lambda _tensor: next(answers))
    monkeypatch.setattr(newer_torch, "_kept", kept)
    newer_torch.keep_misread_places()
    assert len(kept) == sum(every_third)
    assert next(answers, None) is None
    assert len({tensor._cdata for tensor in kept}) == len(kept)  # alive, so nothing else is there


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


def test_tensors_given_by_name_are_replaced_too(monkeypatch: pytest.MonkeyPatch) -> None:
    given = torch.arange(3)
    monkeypatch.setattr(newer_torch, "is_misread", lambda tensor: tensor is given)
    monkeypatch.setattr(newer_torch, "keep_misread_places", lambda more: None)
    positional, named = newer_torch._guarded(lambda one, *, other: (one, other), given, other=given)
    for found in (positional, named):
        assert found is not given
        assert found.data_ptr() == given.data_ptr()


def test_a_wheel_that_is_not_there_needs_no_help() -> None:
    installed = [newer_torch.installed_version(package) for package in newer_torch.LAST_FOR_OLDER_TORCH]
    assert any(installed) or not newer_torch.avoid_misread_tensors()
