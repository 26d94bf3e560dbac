"""The environment variables: one table, and what is wrong with a value."""

from __future__ import annotations

import pathlib
import re

import pytest
from fa3_metadata import settings, trace
from fa3_metadata.engines.sglang import attach_new_backends
from fa3_metadata.installed import BUILD_VARIABLE
from fa3_metadata.settings import PREFIX, VARIABLES, Settings, as_table, problems, read_settings
from fa3_metadata.triton_kernels import launch, tables

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "settings.md"


def test_the_table_has_every_variable_that_is_read() -> None:
    read = {BUILD_VARIABLE, trace.VARIABLE, tables.CACHE_VARIABLE, launch.EARLY_VARIABLE, launch.DRIVER_VARIABLE}
    sources = [path.read_text() for path in [*ROOT.glob("integration/**/*.py"), *ROOT.glob("triton_kernels/*.py")]]
    named = {name for text in sources for name in re.findall(rf"{PREFIX}[A-Z_]*[A-Z]", text)}
    assert named == {one.name for one in VARIABLES}
    assert read < named


def test_the_page_has_the_table() -> None:
    assert as_table() in PAGE.read_text(), "python -m fa3_metadata.settings prints it"


def test_defaults() -> None:
    assert read_settings(pytest.fail, {}) == Settings("fa3", False, False, False)
    assert read_settings(pytest.fail, {one.name: "" for one in VARIABLES}) == Settings()
    given = {"POLICY": "balanced", "BATCH_INVARIANT": "1", "IN_PLACE": "1", "STRICT": "1"}
    assert read_settings(pytest.fail, {PREFIX + name: value for name, value in given.items()}) == Settings(
        "balanced", True, True, True
    )


WRONG = [
    ({"FA3_METADATA_POLICY": "Balanced"}, "FA3_METADATA_POLICY must be fa3 or balanced, got 'Balanced'"),
    ({"FA3_METADATA_IN_PLACE": "yes"}, "FA3_METADATA_IN_PLACE must be 0 or 1, got 'yes'"),
    ({"FA3_METADATA_EARLY_LAUNCH": "off"}, "FA3_METADATA_EARLY_LAUNCH must be 0 or 1, got 'off'"),
    (
        {"FA3_METADATA_BATCH_INVARIANT": "1"},
        "FA3_METADATA_BATCH_INVARIANT must be 0 unless FA3_METADATA_POLICY is balanced, got '1'",
    ),
    (
        {"FA3_METADATA_POLCIY": "balanced"},
        "FA3_METADATA_POLCIY is not a variable of fa3-metadata: FA3_METADATA_POLICY is",
    ),
]


@pytest.mark.parametrize(("environ", "line"), WRONG, ids=[next(iter(environ)) for environ, _ in WRONG])
def test_what_is_wrong_is_said(environ: dict[str, str], line: str) -> None:
    said: list[str] = []
    assert read_settings(said.append, environ) == Settings()
    assert said == [line]
    assert problems(environ) == {next(iter(environ)): line}
    with pytest.raises(ValueError, match=re.escape(line)):
        read_settings(pytest.fail, environ | {"FA3_METADATA_STRICT": "1"})


def test_others_are_nobodys_business() -> None:
    assert problems({"FA3_METADATA_WHEELS": "index", "FA3_METADATA_DISABLE": "no", "FA3_METADATA_BUILD": "x"}) == {}


def test_an_argument_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.POLICY_VARIABLE, "balanced")
    monkeypatch.setenv(settings.BATCH_INVARIANT_VARIABLE, "1")
    with pytest.raises(ModuleNotFoundError):
        attach_new_backends(policy="fa3")  # and not: batch_invariant needs policy "balanced"
