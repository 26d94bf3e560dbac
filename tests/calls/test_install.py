"""The variable that turns everything off."""

from __future__ import annotations

from importlib import import_module

import pytest

install = import_module("fa3_metadata.install")  # its function of that name hides it


@pytest.mark.parametrize(("value", "off"), [(None, False), ("", False), ("0", False), ("1", True), ("no", True)])
def test_anything_but_0_turns_it_off(value: str | None, off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty one is none: a script may hand it on from a variable that is not set."""
    monkeypatch.delenv(install.DISABLE_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(install.DISABLE_VARIABLE, value)
    assert install.is_disabled() == off
