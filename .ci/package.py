"""Build the wheel and the sdist, and try both where nothing of this checkout is: `.venv/bin/python .ci/package.py`.

The wheel goes into a fresh environment that borrows the torch of this Python; nothing is downloaded. There it is
imported, asked for its version, `doctor` and `demo`, and used by a typed program. Some of the sdist's tests run where
it is unpacked. Needs what the extras test, lint and package bring. With a folder, the two files are left there.
"""

from __future__ import annotations

import email
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", ".*-kit", ".*_cache", ".whl", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist", "site"
)
SDIST_TESTS = (  # some of each kind: of data, of the kernel, of pages, of the bench
    *("tests/builds/test_rules.py", "tests/builds/test_releases.py", "tests/builds/test_goldens.py::test_reference"),
    *("tests/calls/test_api.py", "tests/bench/test_mutate.py", "tests/project/test_links.py"),
    *("tests/project/test_docs.py", "tests/project/test_api_page.py"),
)
ENTRY_POINTS = {
    "console_scripts": "fa3-metadata = fa3_metadata.tools.cli:main",
    "sglang.srt.plugins": "fa3_metadata = fa3_metadata.engines.plugins:sglang",
    "vllm.general_plugins": "fa3_metadata = fa3_metadata.engines.plugins:vllm",
}
IMPORT = """
import importlib.metadata, pathlib, sys
import fa3_metadata
assert pathlib.Path(fa3_metadata.__file__).is_relative_to(sys.prefix), fa3_metadata.__file__
assert importlib.metadata.version("fa3-metadata") == fa3_metadata.__version__
for group in ("sglang.srt.plugins", "vllm.general_plugins"):
    (point,) = importlib.metadata.entry_points(group=group, name="fa3_metadata")
    assert callable(point.load())
for name in fa3_metadata.__all__:
    assert name == "flash_attn_with_kvcache" or getattr(fa3_metadata, name) is not None
"""


class WrongError(Exception):
    """What was built is not as it should be."""


def run(*command: str | pathlib.Path, cwd: pathlib.Path, path: pathlib.Path | None = None) -> str:
    """What a command prints, run where nothing of this checkout or of the caller's is seen."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST_"))}
    environment |= {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"} if path else {}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr)[-4000:]
        raise WrongError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{said}")
    return done.stdout


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise WrongError(otherwise)


# The two files


def build(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The sdist, of a clean copy of the sources, and the wheel that is made from the sdist."""
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source, cwd=folder)
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


def tracked_files() -> set[str]:
    """What git keeps here; empty where this is no checkout."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    there = {line for line in done.stdout.splitlines() if (ROOT / line).exists()}
    return there if done.returncode == 0 and (ROOT / ".git").exists() else set()


def check_sdist(sdist: pathlib.Path) -> str:
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    missing = tracked_files() - names - {".gitignore"}
    check(not missing, f"{sdist.name} lacks {', '.join(sorted(missing)[:9])}: see MANIFEST.in")
    for name in ("Makefile", "LICENSE", "tests/conftest.py", ".ci/environment.py", "docs/api.md", "bench/__main__.py"):
        check(name in names, f"{sdist.name} lacks {name}: see MANIFEST.in")
    return f"{sdist.name}: {len(names)} files, {sdist.stat().st_size / 1e6:.1f} MB"


def check_wheel(wheel: pathlib.Path) -> str:
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        metadata = email.message_from_bytes(file.read(f"{info}/METADATA"))
        points = file.read(f"{info}/entry_points.txt").decode()
    modules = {
        f"fa3_metadata/{path.relative_to(ROOT / 'integration')}" for path in (ROOT / "integration").rglob("*.py")
    }
    kernels = {*(ROOT / "triton_kernels").glob("*.py"), *(ROOT / "triton_kernels").glob("*.json")}
    wanted = modules | {f"fa3_metadata/triton_kernels/{path.name}" for path in kernels}
    wanted |= {"fa3_metadata/py.typed", "fa3_metadata/triton_kernels/py.typed", f"{info}/licenses/LICENSE"}
    check(not wanted - {*names}, f"{wheel.name} lacks {', '.join(sorted(wanted - {*names})[:9])}")
    strange = {name.partition("/")[0] for name in names} - {"fa3_metadata", info}
    check(not strange, f"{wheel.name} would put {', '.join(sorted(strange))} beside the package")
    for group, line in ENTRY_POINTS.items():
        check(f"[{group}]\n{line}\n" in points, f"{wheel.name} does not declare {line} in {group}")
    licence = "License :: OSI Approved :: Apache Software License"
    check(licence in (metadata.get_all("Classifier") or ()), "the wheel's licence is not said")
    return f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB"


# Where they are tried


def borrowed(folder: pathlib.Path) -> pathlib.Path:
    """A folder that has all that this Python has, but this project."""
    folder.mkdir()
    for packages in filter(os.path.isdir, sys.path):
        if not packages.endswith(("site-packages", "dist-packages")):
            continue
        for path in pathlib.Path(packages).iterdir():
            ours = path.name.lower().replace("-", "_").startswith(("fa3_metadata", "__editable__", "_fa3"))
            if not ours and path.suffix != ".pth" and not os.path.lexists(folder / path.name):
                (folder / path.name).symlink_to(path)
    return folder


def fresh_environment(folder: pathlib.Path, wheel: pathlib.Path) -> pathlib.Path:
    """The Python of an environment that has the wheel, and all that it needs borrowed."""
    venv.create(folder / "fresh", with_pip=False, symlinks=True)
    python = folder / "fresh" / "bin" / "python"
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    pathlib.Path(packages, "borrowed.pth").write_text(f"{borrowed(folder / 'borrowed')}\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "-q", "--no-index", wheel, cwd=folder)  # what it needs is there, or this fails
    return python


def try_sdist(sdist: pathlib.Path, python: pathlib.Path, folder: pathlib.Path) -> str:
    with tarfile.open(sdist) as file:
        file.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    said = run(python, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *SDIST_TESTS, cwd=unpacked)
    return said.strip().splitlines()[-1]


def steps(folder: pathlib.Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """(what is done, a function that does it and says what came of it), in their order."""
    made: list[pathlib.Path] = []
    home = folder / "elsewhere"
    home.mkdir()

    def build_both() -> str:
        made.extend(build(folder))
        return check_sdist(made[0]) + "; " + check_wheel(made[1])

    def last_line(*command: str | pathlib.Path) -> str:
        lines = run(*command, cwd=home, path=made[-1].parent).strip().splitlines()
        return lines[-1] if lines else "ok"

    def install() -> str:
        made.append(fresh_environment(folder, made[1]))
        return last_line(made[2], "-c", IMPORT)

    yield "wheel and sdist", build_both
    yield "twine check", lambda: last_line(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *made[:2])
    yield "the wheel, imported", install
    for command in ("--version", "doctor", "demo"):
        yield f"fa3-metadata {command}", lambda command=command: last_line("fa3-metadata", command)
    program = ROOT / "tests" / "data" / "typed_program.py"
    strict = ("-m", "mypy", "--strict", "--config-file=", "--cache-dir", ROOT / ".mypy_cache", "--python-executable")
    yield "mypy --strict of a program", lambda: last_line(sys.executable, *strict, made[2], program)
    yield "tests of the sdist", lambda: try_sdist(made[0], made[2], folder)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="fa3-metadata-package-") as name:
        folder = pathlib.Path(name)
        for what, step in steps(folder):
            start = time.perf_counter()
            try:
                said = step()
            except WrongError as error:
                sys.exit(f"package: {what}: {error}")
            print(f"package: {what} ({time.perf_counter() - start:.0f} s): {said}", flush=True)
        for target in sys.argv[1:]:
            shutil.copytree(folder / "dist", target, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
