"""Acting on modules when an engine imports them."""

from __future__ import annotations

import pathlib
import sys
from importlib import import_module
from types import ModuleType

import pytest
from fa3_metadata.engines.late_import import when_imported


@pytest.fixture
def package(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "package_for_late_import"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "module.py").write_text("value = 1\n")
    (tmp_path / name / "fails.py").write_text("import builtins\nif not hasattr(builtins, 'now'): raise ImportError\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module in [module for module in sys.modules if module.startswith(name)]:
        monkeypatch.delitem(sys.modules, module)
    return name


def test_now_or_later(package: str) -> None:
    before = list(sys.meta_path)
    seen: list[ModuleType] = []
    when_imported(f"{package}.module", seen.append)
    assert not seen
    assert package not in sys.modules, "nothing is imported for it"
    module = import_module(f"{package}.module")
    assert seen == [module]
    assert (module.value, module.__name__) == (1, f"{package}.module")
    when_imported(f"{package}.module", seen.append)
    assert seen == [module] * 2
    assert sys.meta_path == before


def test_two_may_wait_and_one_may_leave(package: str) -> None:
    before, seen = list(sys.meta_path), []
    leaves = [when_imported(f"{package}.module", lambda _, n=n: seen.append(n)) for n in range(3)]
    leaves[1]()
    leaves[1]()
    import_module(f"{package}.module")
    assert sorted(seen) == [0, 2]
    assert sys.meta_path == before


def test_a_failed_import_is_waited_for_again(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ModuleType] = []
    leave = when_imported(f"{package}.fails", seen.append)
    with pytest.raises(ImportError):
        import_module(f"{package}.fails")
    assert not seen
    monkeypatch.setattr("builtins.now", True, raising=False)
    assert import_module(f"{package}.fails") is seen[0]
    with pytest.raises(ModuleNotFoundError):
        import_module(f"{package}.missing")
    leave()


def test_what_acts_may_raise(package: str) -> None:
    def refuse(_: ModuleType) -> None:
        raise RuntimeError("refused")

    when_imported(f"{package}.module", refuse)
    with pytest.raises(RuntimeError, match="refused"):
        import_module(f"{package}.module")
    assert import_module(f"{package}.module").value == 1
