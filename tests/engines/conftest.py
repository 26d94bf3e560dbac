"""The folder of a stand-in for vLLM, which can be imported meanwhile."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from ..helpers.vllm_stand_in import BUILD, OLDER, stand_in


@pytest.fixture
def root(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    with stand_in(tmp_path, monkeypatch) as folder:
        yield folder


@pytest.fixture(params=[BUILD, OLDER])
def any_root(
    request: pytest.FixtureRequest, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pathlib.Path]:
    """Of either version, whose builders differ."""
    with stand_in(tmp_path, monkeypatch, request.param) as folder:
        yield folder
