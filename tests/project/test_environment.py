"""`.ci/environment.py` on fresh and on spoiled machines: real runs of it, on copies of this Python and fake wheels."""

from __future__ import annotations

import atexit
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / ".ci" / "environment.py"
VERSION = "{}.{}".format(*sys.version_info)
BASE = pathlib.Path(sys.base_prefix)
STDLIB = pathlib.Path(sysconfig.get_path("stdlib", vars={"installed_base": str(BASE), "base": str(BASE)}))
SETUPTOOLS = re.findall(r'requires = \["(.*)"\]', (SCRIPT.parents[1] / "pyproject.toml").read_text())[0]
REFUSED = "http://127.0.0.1:9/cpu"  # nothing listens on the discard port

BACKEND = '''
import os, time, zipfile

def build_editable(folder, settings=None, metadata_folder=None):
    time.sleep(float(os.environ.get("BUILD_SECONDS", 0)))
    name = "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("tiny-1.0.dist-info/METADATA", METADATA)
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    return name

METADATA = """Metadata-Version: 2.1
Name: tiny
Version: 1.0
Requires-Dist: torch>=2.4
Provides-Extra: test
Requires-Dist: tester>=1; extra == 'test'
Requires-Dist: triton>=3.6; extra == 'test'
Provides-Extra: lint
Requires-Dist: ruff>=0.14; extra == 'lint'
"""
'''
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


# Wheels, indexes, Pythons


def wheel(
    folder: pathlib.Path, name: str, version: str, *requires: str, code: str = "", program: bool = False
) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    module = name.replace("-", "_")
    path = folder / f"{module}-{version}-py3-none-any.whl"
    info = f"{module}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {item}\n" for item in requires)
    files = [f"{module}/__init__.py", *(f"{info}/{file}" for file in ("METADATA", "WHEEL", "RECORD"))]
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{module}/__init__.py", code or f"__version__ = {version!r}\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        if program:
            file.writestr(f"{info}/entry_points.txt", f"[console_scripts]\n{name} = {module}:main\n")
        file.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in files))
    return path


def index(folder: pathlib.Path, *wheels: pathlib.Path) -> str:
    for path in wheels:
        page = folder / path.name.partition("-")[0].replace("_", "-") / "index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(f'<a href="{path.as_uri()}">{path.name}</a>')
    return folder.as_uri()


@functools.cache
def bundled_pip() -> pathlib.Path:
    """The wheel that ensurepip installs."""
    for folder in (STDLIB / "ensurepip" / "_bundled", pathlib.Path("/usr/share/python-wheels")):
        for path in folder.glob("pip-*.whl"):
            return path
    pytest.skip("this Python has no wheel of pip")


@functools.cache
def unpacked_pip() -> pathlib.Path:
    """That pip, and the old setuptools that came with it up to Python 3.11."""
    folder = pathlib.Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    for path in (bundled_pip(), wheel(folder / "wheel", "setuptools", "65.5.0")):
        with zipfile.ZipFile(path) as file:
            file.extractall(folder / "unpacked")
    return folder / "unpacked"


QUICK_ENSUREPIP = """
import pathlib, shutil, sysconfig

for path in pathlib.Path({pip!r}).iterdir():
    there = pathlib.Path(sysconfig.get_path("purelib"), path.name)
    there.symlink_to(path) if "pip" in path.name else shutil.copytree(path, there, dirs_exist_ok=True)
"""


class Shelf:
    """Every index a machine here may have."""

    def __init__(self, folder: pathlib.Path) -> None:
        make = folder / "wheels"
        uses_filelock = "import filelock\n"
        not_here = "nvidia-nccl-cu13; platform_machine == 'elsewhere'", "cuda-bindings; extra == 'cuda'"
        here = "nvidia-cudnn-cu13; platform_system == 'Linux'", "cuda-toolkit; platform_system == 'Linux'"
        self.cpu_torch = wheel(make / "cpu", "torch", "2.13.0+cpu", "filelock", *not_here, code=uses_filelock)
        cuda_torch = wheel(make / "cuda", "torch", "2.13.0", "filelock", *here, code=uses_filelock)
        rest = [
            wheel(make, "filelock", "3.0"),
            wheel(make, "tester", "1.0"),
            wheel(make, "triton", "3.7.1"),
            wheel(make, "ruff", "0.14.0", program=True),
            wheel(make, "nvidia-cudnn-cu13", "9.0"),
            wheel(make, "cuda-toolkit", "13.0"),
        ]
        rest.append(bundled_pip())
        self.cpu = index(folder / "of-cpu-builds", self.cpu_torch)  # PyTorch's own, as it were
        self.plain = index(folder / "plain", self.cpu_torch, *rest)
        self.cuda = index(folder / "cuda", cuda_torch, *rest)
        self.no_torch = index(folder / "no-torch", *rest)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"))


class Python:
    """A Python of its own: a copy of the one that runs the tests, with links to its standard library.

    Its ensurepip is the real one, one that links to a pip unpacked before ("quick": this saves seconds), or missing.
    """

    def __init__(self, folder: pathlib.Path, ensurepip: str = "quick", *, managed: bool = False) -> None:
        self.folder = folder
        library = folder / STDLIB.relative_to(BASE)
        library.mkdir(parents=True)
        left_out = {"site-packages", "dist-packages", "EXTERNALLY-MANAGED", "sitecustomize.py"}
        left_out |= set() if ensurepip == "real" else {"ensurepip"}
        for path in STDLIB.iterdir():
            if path.name not in left_out:
                (library / path.name).symlink_to(path)
        if ensurepip == "quick":
            (library / "ensurepip").mkdir()
            (library / "ensurepip" / "__main__.py").write_text(QUICK_ENSUREPIP.format(pip=str(unpacked_pip())))
        if managed:
            (library / "EXTERNALLY-MANAGED").write_text("[externally-managed]\nError=managed by the system\n")
        self.program = folder / "bin" / f"python{VERSION}"
        self.program.parent.mkdir()
        shutil.copy2(os.path.realpath(sys.executable), self.program)
        where = "import site, sys; print(sys.prefix); print(site.getsitepackages()[0])"
        done = subprocess.run([self.program, "-c", where], capture_output=True, text=True)
        prefix, _, packages = done.stdout.strip().partition("\n")
        if done.returncode or pathlib.Path(prefix) != folder:
            pytest.skip("this Python does not run from a copy")
        self.packages = pathlib.Path(packages)
        self.packages.mkdir(parents=True, exist_ok=True)

    def install(self, folder: pathlib.Path, name: str, version: str, *requires: str, code: str = "") -> Python:
        with zipfile.ZipFile(wheel(folder, name, version, *requires, code=code)) as file:
            file.extractall(self.packages)
        return self

    def install_pip(self) -> None:
        shutil.copytree(unpacked_pip(), self.packages, dirs_exist_ok=True)

    def uninstall(self, name: str) -> None:
        for path in self.packages.glob(f"{name}*"):
            shutil.rmtree(path)

    def with_torch(self, folder: pathlib.Path, torch: str = "2.11.0", triton: str = "3.6.0") -> Python:
        """A torch with its Triton, as on a machine with a GPU."""
        self.install(folder, "torch", torch, f"triton=={triton}").install(folder, "triton", triton)
        return self


@pytest.fixture
def python(tmp_path: pathlib.Path) -> Python:
    return Python(tmp_path / "python")


class Checkout:
    """A project with the real script, on a machine where pip is configured by the variables given to `make`."""

    def __init__(self, folder: pathlib.Path, **variables: str) -> None:
        self.folder = folder
        self.venv = folder / ".venv"
        self.python = self.venv / "bin" / "python"
        (folder / ".ci").mkdir(parents=True)
        shutil.copy(SCRIPT, folder / ".ci")
        (folder / "backend.py").write_text(BACKEND)
        (folder / "pyproject.toml").write_text(PYPROJECT)
        home = folder.parent / "home"
        home.mkdir(exist_ok=True)
        self.variables = {
            "PATH": str(home),  # with nothing there
            "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
            "HOME": str(home),
            "PIP_CONFIG_FILE": os.devnull,
            **variables,
        }

    def start(self, python: Python | pathlib.Path, *extras: str, **variables: str) -> subprocess.Popen[str]:
        program = python.program if isinstance(python, Python) else python
        return subprocess.Popen(
            [program, self.folder / ".ci" / "environment.py", *(extras or ("test",))],
            env={**self.variables, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # a test run in the background ignores ^C, and what it starts would
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, python: Python | pathlib.Path, *extras: str, **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(python, *extras, **variables)
        out, err = process.communicate(timeout=120)
        for chatter in ("Traceback", "WARNING", "DEPRECATION", "[notice]"):
            assert chatter not in out + err
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def made(self, python: Python | pathlib.Path, *extras: str, **variables: str) -> str:
        """What it says when it makes a .venv that works, which a second run then leaves alone."""
        done = self.run(python, *extras, **variables)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert done.stdout.endswith(".venv: ready\n")
        assert self.value("import torch, tester, triton; print('works')") == "works"
        again = self.run(python, *extras, **variables)
        assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
        return done.stdout

    def stopped(self, python: Python | pathlib.Path, **variables: str) -> str:
        done = self.run(python, **variables)
        assert done.returncode == 1
        assert done.stderr.startswith(".venv: ")
        return done.stderr

    def value(self, code: str) -> str:
        done = subprocess.run([self.python, "-c", code], env=self.variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def torch(self) -> str:
        return self.value("import torch, importlib.metadata as m; print(m.version('torch'), torch.__file__)")

    def packages(self) -> set[str]:
        names = self.value("import importlib.metadata as m; print(*{d.name for d in m.distributions()})")
        return set(names.split())


@pytest.fixture
def checkout(tmp_path: pathlib.Path, shelf: Shelf) -> Checkout:
    """On a stock laptop, where pip is served a CUDA build, and PyTorch's index of CPU builds cannot be reached."""
    return Checkout(tmp_path / "checkout", PIP_INDEX_URL=shelf.cuda, TORCH_CPU_INDEX_URL=REFUSED)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shelf: Shelf) -> tuple[Checkout, Python, pathlib.Path]:
    """A checkout with a .venv, its Python, and a copy of that .venv."""
    folder = tmp_path_factory.mktemp("finished")
    python = Python(folder / "python")
    checkout = Checkout(folder / "checkout", PIP_INDEX_URL=shelf.cuda, TORCH_CPU_INDEX_URL=shelf.cpu)
    checkout.made(python)
    shutil.copytree(checkout.venv, folder / "copy", symlinks=True)
    return checkout, python, folder / "copy"


@pytest.fixture
def whole(finished: tuple[Checkout, Python, pathlib.Path]) -> tuple[Checkout, Python]:
    checkout, python, copy = finished
    for path in [*python.packages.iterdir(), checkout.venv]:
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(copy, checkout.venv, symlinks=True)
    return checkout, python


# Where there is no torch


def test_the_index_of_cpu_builds_comes_first(checkout: Checkout, python: Python, shelf: Shelf) -> None:
    said = checkout.made(python, TORCH_CPU_INDEX_URL=shelf.cpu, PIP_USER="1")  # a common setting
    assert f"a CPU build, from {shelf.cpu}" in said
    assert checkout.torch().startswith(f"2.13.0+cpu {checkout.venv}")
    assert not {"nvidia-cudnn-cu13", "cuda-toolkit"} & checkout.packages()
    assert len(said.splitlines()) == 4

    said = checkout.made(python, "lint")  # what is added later leaves the rest as it is
    assert said.splitlines()[0] == ".venv: completing it"
    assert "lint, test" in said
    assert "installing torch" not in said
    assert (checkout.venv / "bin" / "ruff").exists()
    assert checkout.run(python, "test").stdout == ""


@pytest.mark.parametrize("way", ["install", "mirror", "python", "cuda", "wheel"])
def test_the_advice_works(way: str, checkout: Checkout, python: Python, shelf: Shelf, tmp_path: pathlib.Path) -> None:
    advice = checkout.stopped(python)
    assert "2 CUDA packages" in advice
    assert f"{REFUSED}: it cannot be reached" in advice
    assert "torch" not in checkout.packages()
    variables = {}
    if way in ("install", "wheel"):
        line = next(line for line in advice.splitlines() if " install torch==" in line)
        assert line.endswith(" install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu")
        command, _, _ = line.partition(" torch==")
        what = f"torch==2.13.0 --index-url {shelf.cpu} --extra-index-url {shelf.no_torch}"  # here, its mirror
        what = what if way == "install" else str(shelf.cpu_torch)
        subprocess.run(f"{command} {what}", shell=True, check=True, env=checkout.variables, capture_output=True)
    elif way == "mirror":
        assert "export TORCH_CPU_INDEX_URL=" in advice
        variables = {"TORCH_CPU_INDEX_URL": shelf.cpu}
    elif way == "cuda":
        assert "export ALLOW_CUDA_TORCH=1" in advice
        variables = {"ALLOW_CUDA_TORCH": "1"}
    elif way == "python":
        assert "export PYTHON=" in advice
        python.with_torch(tmp_path / "more")  # or this one gets a torch
    said = checkout.made(python, **variables)
    assert ("made anew" in said) == (way == "python")
    assert ("cuda-toolkit" in checkout.packages()) == (way == "cuda")


@pytest.mark.parametrize("why", ["no index", "unreachable", "no such torch"])
def test_without_a_torch_it_says_so(why: str, checkout: Checkout, python: Python, shelf: Shelf) -> None:
    variables = {
        "no index": {"PIP_NO_INDEX": "1"},
        "unreachable": {"PIP_INDEX_URL": REFUSED},
        "no such torch": {"PIP_INDEX_URL": shelf.no_torch},
    }[why]
    message = checkout.stopped(python, TORCH_CPU_INDEX_URL="http://me:secret@127.0.0.1:9/cpu", **variables)
    assert "http://127.0.0.1:9/cpu: it cannot be reached" in message  # in a log, too
    assert "secret" not in message
    assert "No matching distribution" not in message
    assert "no CPU build of torch==2.13.0 was found for Python" in message
    assert ("what pip is configured with: the index cannot be reached" in message) == (why == "unreachable")
    assert ("requirement torch==2.13.0 (from versions: none)" in message) == (why != "unreachable")


def test_without_the_rest_it_says_so(checkout: Checkout, python: Python, shelf: Shelf) -> None:
    message = checkout.stopped(python, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(shelf.cpu_torch.parent))
    assert "could not install this project with what it needs" in message
    assert "PIP_INDEX_URL" in message
    assert len(message.splitlines()) == 1
    said = checkout.made(python)  # of an index whose torch is a CUDA build; this torch is kept
    assert "installing torch" not in said
    assert checkout.torch().startswith("2.13.0+cpu ")


def test_an_index_that_does_not_answer_costs_seconds(checkout: Checkout, python: Python, shelf: Shelf) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/cpu"
        said = checkout.run(python, PIP_INDEX_URL=shelf.plain, TORCH_CPU_INDEX_URL=url, PIP_DEFAULT_TIMEOUT="180")
        assert said.returncode == 0
        assert time.monotonic() - start < 60
    assert "from what pip is configured with" in said.stdout


# Where there is one


def test_the_torch_of_this_python_is_used(checkout: Checkout, python: Python, tmp_path: pathlib.Path) -> None:
    python.with_torch(tmp_path / "more").install(tmp_path / "more", "tester", "1.0")
    python.install(tmp_path / "more", "setuptools", "80.0")
    (checkout.folder / "pyproject.toml").write_text(PYPROJECT.replace("[]", f'["{SETUPTOOLS}"]'))
    said = checkout.made(python, PIP_NO_INDEX="1")  # and nothing is downloaded
    assert "around its torch 2.11.0" in said
    assert checkout.torch() == f"2.11.0 {python.packages}/torch/__init__.py"
    assert checkout.value("import triton; print(triton.__file__)").startswith(str(python.packages))


def test_a_setuptools_too_old_to_build_this_is_left_alone(
    checkout: Checkout, python: Python, tmp_path: pathlib.Path
) -> None:
    python.with_torch(tmp_path / "more").install(tmp_path / "more", "tester", "1.0")
    python.install(tmp_path / "more", "setuptools", "67.8")
    (checkout.folder / "pyproject.toml").write_text(PYPROJECT.replace("[]", f'["{SETUPTOOLS}"]'))
    assert f"requirement {SETUPTOOLS} (from versions: none)" in checkout.stopped(python, PIP_NO_INDEX="1")
    newer = wheel(tmp_path / "newer", "setuptools", "80.0")
    checkout.made(python, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(newer.parent))
    assert checkout.torch().startswith("2.11.0 ")


def test_a_ruff_that_came_with_the_torch(checkout: Checkout, python: Python, tmp_path: pathlib.Path) -> None:
    python.with_torch(tmp_path / "more").install(tmp_path / "more", "ruff", "0.14.0")
    checkout.made(python, "test", "lint")
    assert (checkout.venv / "bin" / "ruff").exists()


def test_a_torch_that_comes_and_goes(whole: tuple[Checkout, Python], tmp_path: pathlib.Path) -> None:
    checkout, python = whole
    python.with_torch(tmp_path / "more")
    assert "made anew, since it does not see the torch 2.11.0" in checkout.made(python)
    assert checkout.torch().startswith("2.11.0 ")
    python.uninstall("torch")
    assert "made anew, since the torch it was made around is not there" in checkout.made(python)
    assert checkout.torch().startswith("2.13.0+cpu ")


@pytest.mark.parametrize("flaw", ["its Triton", "broken"])
def test_a_torch_that_cannot_be_used(
    flaw: str, checkout: Checkout, python: Python, shelf: Shelf, tmp_path: pathlib.Path
) -> None:
    torch = "2.8.0" if flaw == "its Triton" else "2.11.0"
    python.with_torch(tmp_path / "more", torch, "3.4.0" if flaw == "its Triton" else "3.6.0")
    if flaw == "broken":
        (python.packages / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13')")
    advice = checkout.run(python)
    assert advice.returncode == 1
    assert f"torch {torch} of {python.packages} cannot be used: " in advice.stdout
    assert ("libcudart.so.13" in advice.stdout) == (flaw == "broken")
    said = checkout.made(python, TORCH_CPU_INDEX_URL=shelf.cpu)  # that Python's own stays what it is
    assert "made anew" not in said
    assert checkout.torch().startswith(f"2.13.0+cpu {checkout.venv}")


# A .venv that is not as it should be

Spoil = Callable[[pathlib.Path, pathlib.Path], None]


def without_pip(venv: pathlib.Path, packages: pathlib.Path) -> None:
    (packages / "pip").unlink()
    (venv / "made.json").unlink()


def without_torch(venv: pathlib.Path, packages: pathlib.Path) -> None:
    shutil.rmtree(packages / "torch")


def with_half_a_torch(venv: pathlib.Path, packages: pathlib.Path) -> None:
    shutil.rmtree(next(packages.glob("torch-*.dist-info")))
    (packages / "torch" / "__init__.py").unlink()


def with_half_a_stamp(venv: pathlib.Path, packages: pathlib.Path) -> None:
    (venv / "made.json").write_text('{"root": ')


def of_an_older_project(venv: pathlib.Path, packages: pathlib.Path) -> None:
    stamp = json.loads((venv / "made.json").read_text())
    (venv / "made.json").write_text(json.dumps({**stamp, "pyproject": "of another day"}))


def without_python(venv: pathlib.Path, packages: pathlib.Path) -> None:
    for path in (venv / "bin").glob("python*"):
        path.unlink()


def without_configuration(venv: pathlib.Path, packages: pathlib.Path) -> None:
    (venv / "pyvenv.cfg").unlink()  # its python would then be, and install into, the Python it links to


def of_another_version(venv: pathlib.Path, packages: pathlib.Path) -> None:
    (packages / "pretend.pth").write_text("import sys; sys.version_info = (3, 8, 0, 'final', 0)\n")


def around_a_lost_torch(venv: pathlib.Path, packages: pathlib.Path) -> None:
    without_torch(venv, packages)
    (packages / "parent.pth").write_text("/nowhere/site-packages\n")


def moved(venv: pathlib.Path, packages: pathlib.Path) -> None:
    stamp = json.loads((venv / "made.json").read_text())
    (venv / "made.json").write_text(json.dumps({**stamp, "root": "/elsewhere"}))


COMPLETED = [without_pip, without_torch, with_half_a_torch, with_half_a_stamp, of_an_older_project]
MADE_ANEW = {
    without_python: "its Python does not run",
    without_configuration: "its Python does not run",
    of_another_version: "it is of Python 3.8, and this is Python",
    around_a_lost_torch: "the torch it was made around is not there",
    moved: "it was made in another folder",
}


@pytest.mark.parametrize("spoil", COMPLETED, ids=lambda spoil: spoil.__name__)
def test_it_is_completed(spoil: Spoil, whole: tuple[Checkout, Python]) -> None:
    checkout, python = whole
    spoil(checkout.venv, checkout.venv / "lib" / f"python{VERSION}" / "site-packages")
    said = checkout.made(python)
    assert said.splitlines()[0] == ".venv: completing it"
    assert ("installing torch" in said) == (spoil in (without_torch, with_half_a_torch))


@pytest.mark.parametrize("spoil", MADE_ANEW, ids=lambda spoil: spoil.__name__)
def test_it_is_made_anew(spoil: Spoil, whole: tuple[Checkout, Python]) -> None:
    checkout, python = whole
    spoil(checkout.venv, checkout.venv / "lib" / f"python{VERSION}" / "site-packages")
    said = checkout.made(python)
    assert f"made anew, since {MADE_ANEW[spoil]}" in said
    assert "torch" not in {path.name for path in python.packages.iterdir()}


def test_the_python_it_was_made_for_is_gone(whole: tuple[Checkout, Python], python: Python) -> None:
    checkout, old = whole
    gone = old.folder.rename(old.folder.with_name("gone"))
    try:
        assert "made anew, since its Python does not run" in checkout.made(python)
    finally:
        gone.rename(old.folder)


def test_something_else_of_its_name(checkout: Checkout, python: Python) -> None:
    anew = ".venv: made anew, since its Python does not run: it is half made, or the Python it was made for is gone\n"
    checkout.venv.mkdir()
    assert checkout.run(python, PIP_NO_INDEX="1").stdout.startswith(anew)
    shutil.rmtree(checkout.venv)
    checkout.venv.write_text("")
    assert checkout.run(python, PIP_NO_INDEX="1").stdout.startswith(anew)
    shutil.rmtree(checkout.venv)
    checkout.venv.symlink_to("/nowhere")
    assert checkout.run(python, PIP_NO_INDEX="1").stdout.startswith(anew)
    assert checkout.python.exists()


def another_python() -> pathlib.Path | None:
    """One of another version that can make environments, on PATH or beside this one."""
    names = [f"python3.{minor}" for minor in (13, 10, 12, 11) if f"3.{minor}" != VERSION]
    beside = [path for name in names for path in BASE.parent.glob(f"*/bin/{name}")]
    for program in [*beside, *filter(None, map(shutil.which, names))]:
        done = subprocess.run([program, "-c", "import venv, ensurepip"], capture_output=True)
        if done.returncode == 0:
            return pathlib.Path(program)
    return None


def test_another_version_of_python(whole: tuple[Checkout, Python]) -> None:
    checkout, _ = whole
    other = another_python()
    if other is None:
        pytest.skip("no other version of Python on this machine")
    said = checkout.run(other)
    assert f"made anew, since it is of Python {VERSION}, and this is Python 3." in said.stdout
    if said.returncode == 0:  # unless it has a torch that does not go with these wheels
        assert checkout.value("import sys; print('%d.%d' % sys.version_info[:2])") in other.name


def test_run_by_the_python_of_the_environment_itself(whole: tuple[Checkout, Python]) -> None:
    checkout, _ = whole
    done = checkout.run(checkout.python, "lint")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == ".venv: completing it"
    assert (checkout.venv / "bin" / "ruff").exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_is_repeated(how: signal.Signals, checkout: Checkout, python: Python, shelf: Shelf) -> None:
    checkout.variables["TORCH_CPU_INDEX_URL"] = shelf.cpu
    for step in ("for Python", "installing torch", "installing this project"):
        process = checkout.start(python, BUILD_SECONDS="60")
        assert process.stdout
        for line in process.stdout:
            if step in line:
                time.sleep(0.3)
                os.killpg(process.pid, how)
        _, err = process.communicate(timeout=60)
        assert process.returncode != 0
        assert "Traceback" not in err
        assert err == ("" if how == signal.SIGKILL else ".venv: interrupted. The same command goes on from here.\n")
    assert "made anew" not in checkout.made(python)


# Pythons that lack something


def test_an_externally_managed_python(checkout: Checkout, shelf: Shelf, tmp_path: pathlib.Path) -> None:
    python = Python(tmp_path / "python", managed=True)
    python.install_pip()
    install = [python.program, "-m", "pip", "install", shelf.cpu_torch]
    refused = subprocess.run(install, env=checkout.variables, capture_output=True, text=True)
    assert "externally-managed-environment" in refused.stderr
    checkout.made(python, TORCH_CPU_INDEX_URL=shelf.cpu)


def test_a_python_without_ensurepip(checkout: Checkout, shelf: Shelf, tmp_path: pathlib.Path) -> None:
    checkout.variables["TORCH_CPU_INDEX_URL"] = shelf.cpu
    python = Python(tmp_path / "python", "missing", managed=True)
    message = checkout.stopped(python)
    assert f"`apt install python{VERSION}-venv`" in message
    assert len(message.splitlines()) == 1

    python.install_pip()
    advice = checkout.stopped(python, TORCH_CPU_INDEX_URL=REFUSED)  # by that pip, too
    assert f"{python.program} -m pip --python {checkout.python} install torch" in advice
    checkout.made(python)
    assert "pip" not in checkout.packages()

    python.uninstall("pip")
    shutil.rmtree(checkout.venv)
    programs = tmp_path / "programs"
    programs.mkdir()
    base = Python(tmp_path / "base").program  # virtualenv --python PYTHON FOLDER
    (programs / "virtualenv").write_text(f'#!/bin/sh\nexec "{base}" -m venv --clear "$3"\n')
    (programs / "virtualenv").chmod(0o755)
    checkout.made(python, PATH=str(programs))
    assert "pip" in checkout.packages()


def test_a_pip_too_old_to_ask(checkout: Checkout, shelf: Shelf, tmp_path: pathlib.Path) -> None:
    python = Python(tmp_path / "python", "real")
    checkout.stopped(python)
    packages = checkout.venv / "lib" / f"python{VERSION}" / "site-packages"
    install = packages / "pip" / "_internal" / "commands" / "install.py"
    install.write_text(install.read_text().replace('"--report"', '"--not-yet"'))
    info = next(packages.glob("pip-*.dist-info"))
    version = info.name.removeprefix("pip-").removesuffix(".dist-info")
    (info / "METADATA").write_text((info / "METADATA").read_text().replace(f"Version: {version}", "Version: 22.0.2"))
    info.rename(packages / "pip-22.0.2.dist-info")
    checkout.made(python, TORCH_CPU_INDEX_URL=shelf.cpu)
    assert '"--report"' in install.read_text()
