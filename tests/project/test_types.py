"""What a user's type checker sees of the package, as installed: py.typed, and a public API that `--strict` accepts."""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import shutil
import subprocess
import sys
import venv

import fa3_metadata
import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "data" / "typed_program.py"
needs_mypy = pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="no mypy (make lint brings it)")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The Python of an environment that has this package, as a wheel lays it out, and this torch."""
    folder = tmp_path_factory.mktemp("user")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = next((folder / "lib").glob("python*/site-packages"))
    shutil.copytree(ROOT / "integration", packages / "fa3_metadata")
    shutil.copytree(ROOT / "triton_kernels", packages / "fa3_metadata" / "triton_kernels")
    (packages / "torch.pth").write_text(f"{pathlib.Path(torch.__file__).parents[1]}\n")
    return folder / "bin" / "python"


def checked(python: pathlib.Path, program: pathlib.Path) -> subprocess.CompletedProcess[str]:
    command = ["-m", "mypy", "--strict", "--config-file=", "--cache-dir", ROOT / ".mypy_cache"]
    return subprocess.run(
        [sys.executable, *command, "--python-executable", python, program],
        cwd=program.parent,
        capture_output=True,
        text=True,
    )


@needs_mypy
def test_a_program_with_the_whole_api_is_accepted(python: pathlib.Path) -> None:
    done = checked(python, PROGRAM)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_mypy
def test_types_are_really_checked(python: pathlib.Path, tmp_path: pathlib.Path) -> None:
    program = tmp_path / "program.py"
    program.write_text('import fa3_metadata\nsize: str = fa3_metadata.metadata_layout("4", 1, 9, 8, 1, 128).size\n')
    said = checked(python, program).stdout
    assert 'Argument 1 to "metadata_layout" has incompatible type "str"; expected "int"' in said
    assert 'expression has type "int", variable has type "str"' in said


def test_the_program_uses_the_whole_api() -> None:
    used = {node.attr for node in ast.walk(ast.parse(PROGRAM.read_text())) if isinstance(node, ast.Attribute)}
    used |= {node.id for node in ast.walk(ast.parse(PROGRAM.read_text())) if isinstance(node, ast.Name)}
    assert set(fa3_metadata.__all__) <= used
