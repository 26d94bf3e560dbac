"""docs/api.md is what the docstrings make: `make docs` writes it."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys

import fa3_metadata
import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "api.md"


@pytest.mark.skipif(importlib.util.find_spec("griffe") is None, reason="no griffe (make docs brings it)")
def test_the_page_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, ROOT / ".ci" / "api_page.py"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_public_name_is_on_it() -> None:
    lines = PAGE.read_text().splitlines()
    names = [line.removeprefix("## ").strip("`") for line in lines if line.startswith("## ")]
    assert names == sorted(fa3_metadata.__all__, key=str.lower)
