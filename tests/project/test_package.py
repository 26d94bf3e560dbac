"""What is said of the package, and that the checks of wheel, sdist and extras (.ci/) notice what is wrong."""

from __future__ import annotations

import importlib
import pathlib
import re
import sys
import tarfile
import zipfile
from types import ModuleType

import fa3_metadata
import pytest

from ..helpers.markdown_links import pages

ROOT = pathlib.Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def script(name: str) -> ModuleType:
    """A file of .ci/, imported."""
    sys.path.insert(0, str(ROOT / ".ci"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / ".ci"))


# What is said


def test_the_version_is_in_one_place() -> None:
    assert 'dynamic = ["version"]' in PYPROJECT
    assert not re.search(r'^version = "', PYPROJECT, re.MULTILINE)
    changes = (ROOT / "CHANGELOG.md").read_text()
    heading = re.search(r"^## \[(\S+?)\] - (unreleased|\d{4}-\d\d-\d\d)$", changes, re.MULTILINE)
    assert heading is not None
    assert heading[1] == fa3_metadata.__version__


def test_the_oldest_setuptools_is_the_one_that_pyproject_asks_for() -> None:
    oldest = script("environment").OLDEST_SETUPTOOLS
    assert f'requires = ["setuptools>={oldest}"]' in PYPROJECT
    assert f'"setuptools>={oldest}"' in re.search(r"^package = .*$", PYPROJECT, re.MULTILINE)[0]  # type: ignore[index]


def test_the_extras_that_an_index_is_asked_for_are_those_declared() -> None:
    extras = script("extras")
    assert extras.declared() == extras.EXPECTED.keys() - {""}
    assert {"sgl-kernel", "test", "docs"} < extras.declared()
    assert all(len(expected) == len(extras.TORCHES) for expected in extras.EXPECTED.values())


def test_extras_that_are_named_are_there() -> None:
    """In pages, and in what the commands say."""
    files = [*pages(ROOT), *ROOT.glob("integration/**/*.py")]
    named = {name for path in files for name in re.findall(r"fa3-metadata\[([\w,.-]+)\]", path.read_text())}
    assert "plot" in named
    assert {extra for one in named for extra in one.split(",")} <= script("extras").declared()


def test_an_extra_that_comes_to_another_torch_is_noticed() -> None:
    extras = script("extras")
    right = extras.Answer({"torch": "2.9.1+cpu", "triton": "3.5.1"}, "")
    refused = extras.Answer({}, "Cannot install torch==2.11.0")
    assert extras.problem(right, "2.9.1") == extras.problem(right, "") == extras.problem(refused, None) == ""
    assert extras.problem(right, "2.11.0") == "comes to torch 2.9.1+cpu".removesuffix("+cpu")
    assert "resolves to" in extras.problem(right, None)
    assert extras.problem(refused, "2.11.0") == "Cannot install torch==2.11.0"


# The checks of the wheel and of the sdist


@pytest.fixture
def wheel(tmp_path: pathlib.Path) -> pathlib.Path:
    """One that is as it should be, of empty files."""
    package = script("package")
    info = "fa3_metadata-1.0.dist-info"
    names = [f"fa3_metadata/{path.relative_to(ROOT / 'integration')}" for path in (ROOT / "integration").rglob("*.py")]
    kernels = [path.name for kind in ("py", "json") for path in (ROOT / "triton_kernels").glob(f"*.{kind}")]
    names += [f"fa3_metadata/triton_kernels/{name}" for name in [*kernels, "py.typed"]]
    path = tmp_path / "fa3_metadata-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name in [*names, "fa3_metadata/py.typed", f"{info}/licenses/LICENSE"]:
            file.writestr(name, "")
        file.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.4\nClassifier: License :: OSI Approved :: Apache Software License\n",
        )
        points = "".join(f"[{group}]\n{line}\n\n" for group, line in package.ENTRY_POINTS.items())
        file.writestr(f"{info}/entry_points.txt", points)
    return path


def altered(wheel: pathlib.Path, name: str, text: str | None) -> pathlib.Path:
    """The wheel with another text in a file, or (None) without it."""
    path = wheel.with_name(f"altered-{wheel.name}")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(path, "w") as new:
        for one in old.namelist():
            if one != name:
                new.writestr(one, old.read(one))
        if text is not None:
            new.writestr(name, text)
    return path


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("fa3_metadata/py.typed", None, "lacks fa3_metadata/py.typed"),
        ("fa3_metadata/triton_kernels/balance_h200.json", None, "lacks fa3_metadata/triton_kernels/balance_h200.json"),
        ("fa3_metadata/engines/plugins.py", None, "lacks fa3_metadata/engines/plugins.py"),
        ("fa3_metadata-1.0.dist-info/licenses/LICENSE", None, "lacks fa3_metadata-1.0.dist-info/licenses/LICENSE"),
        ("triton_kernels/kernel.py", "", "would put triton_kernels beside the package"),
        ("fa3_metadata-1.0.dist-info/METADATA", "Metadata-Version: 2.4\n", "licence is not said"),
        ("fa3_metadata-1.0.dist-info/entry_points.txt", "[console_scripts]\n", "does not declare fa3-metadata ="),
    ],
)
def test_a_wheel_that_lacks_something(name: str, text: str | None, why: str, wheel: pathlib.Path) -> None:
    package = script("package")
    assert package.check_wheel(wheel).startswith("fa3_metadata-1.0-py3-none-any.whl: ")
    with pytest.raises(package.WrongError, match=re.escape(why)):
        package.check_wheel(altered(wheel, name, text))


def test_an_sdist_that_lacks_something(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = script("package")
    monkeypatch.setattr(package, "tracked_files", lambda: {"README.md", "tests/data/new.json", ".gitignore"})
    path = tmp_path / "fa3_metadata-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        file.add(ROOT / "README.md", "fa3_metadata-1.0/README.md")
    with pytest.raises(package.WrongError, match=r"lacks tests/data/new\.json: see MANIFEST"):
        package.check_sdist(path)
    monkeypatch.setattr(package, "tracked_files", set)
    with pytest.raises(package.WrongError, match="lacks Makefile"):
        package.check_sdist(path)


def test_what_is_borrowed_is_not_this_project(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "a" / "site-packages", tmp_path / "b" / "site-packages"
    for folder, name in [
        (first, "torch"),
        (second, "torch"),
        (second, "numpy"),
        (second, "fa3_metadata-0.1.0.dist-info"),
    ]:
        (folder / name).mkdir(parents=True)
    (second / "__editable___fa3_metadata_0_1_0_finder.py").touch()
    (second / "parent.pth").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(first), str(second)])
    made = script("package").borrowed(tmp_path / "borrowed")
    assert {path.name: path.resolve() for path in made.iterdir()} == {
        "torch": first / "torch",
        "numpy": second / "numpy",
    }


def test_a_command_that_fails_says_what_it_printed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = script("package")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")  # not passed on
    assert package.run(sys.executable, "-c", "import os; print(os.environ.get('PYTHONPATH'))", cwd=tmp_path) == "None\n"
    with pytest.raises(package.WrongError, match=r"(?s)ended with 3:.*out.*why"):
        package.run(
            sys.executable, "-c", "print('out'); import sys; print('why', file=sys.stderr); sys.exit(3)", cwd=tmp_path
        )
