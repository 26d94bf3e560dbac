"""Make .venv for this project: `python3 .ci/environment.py [extra ...]` (extras of pyproject.toml).

Where this Python has torch, .venv sees that one (and its Triton), and nothing downloaded replaces it. Elsewhere it gets
a CPU build of its own: from PyTorch's index of CPU builds (TORCH_CPU_INDEX_URL: a mirror of it; empty: it is not
asked), else from what pip is configured with. A CUDA build is gigabytes and comes only if ALLOW_CUDA_TORCH=1 says so.

A .venv that fits is kept and completed; one that does not is made anew, with a line that says why. So whatever
interrupted or stopped this, it can be run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from typing import Any, NoReturn

ROOT = pathlib.Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "made.json"  # what .venv was made for; with "pyproject" once all is installed

TORCH = "torch==2.13.0"
INSTALL_TORCH = ("install", "-q", "--no-deps", "--force-reinstall", TORCH)  # over whatever is left of one
CPU_INDEX = os.environ.get("TORCH_CPU_INDEX_URL", "https://download.pytorch.org/whl/cpu")
OLDEST_SETUPTOOLS = 68  # that builds this project: pyproject.toml
ALLOW_CUDA = os.environ.get("ALLOW_CUDA_TORCH", "0") not in ("", "0")

LOOK = """
import importlib.metadata, importlib.util, json, os, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except Exception:
        return None  # not installed, or half installed: for pip it is not there
spec = importlib.util.find_spec("torch")
torch = version("torch") if spec and spec.origin else None
print(json.dumps({
    "python": "%d.%d" % sys.version_info[:2] + sys.abiflags,
    "prefix": sys.prefix,
    "torch": torch,
    "torch_folder": os.path.dirname(os.path.dirname(spec.origin)) if torch else None,
    "setuptools": version("setuptools"),
    "packages": [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))],
}))
"""


@dataclasses.dataclass(frozen=True)
class Look:
    """What a Python is and has, without importing any of it."""

    python: str  # "3.11", "3.13t"
    prefix: str
    torch: str | None  # its version
    torch_folder: str | None
    setuptools: str | None
    packages: list[str]


def say(line: str) -> None:
    print(f".venv: {line}", flush=True)


def stop(paragraph: str) -> NoReturn:
    sys.exit(f".venv: {paragraph}")


def run(*command: str | pathlib.Path, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environ}
    nothing = subprocess.DEVNULL  # nobody would see what is asked
    try:
        return subprocess.run(command, env=environment, stdin=nothing, capture_output=True, text=True, errors="replace")
    except OSError as error:  # a missing program, or one whose link is dead
        return subprocess.CompletedProcess(command, 127, "", str(error))


def look(python: str | pathlib.Path) -> Look | None:
    try:
        return Look(**json.loads(run(python, "-c", LOOK).stdout))
    except (ValueError, TypeError):  # it does not run, or is no Python
        return None


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it says nothing"])[-1]


def same_folder(a: str | pathlib.Path, b: str | pathlib.Path) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


# What lies at .venv


class UnfitError(Exception):
    """The torch of this Python cannot be used for this project."""


def read_stamp() -> dict[str, Any]:
    try:
        return dict(json.loads(STAMP.read_text()))
    except (OSError, ValueError, TypeError):  # no .venv, one made by other means, or one cut short
        return {}


def digest() -> str:
    return hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()


def link_file() -> pathlib.Path:
    version = "{}.{}".format(*sys.version_info)
    free_threaded = "t" if "t" in sys.abiflags else ""
    return VENV / "lib" / f"python{version}{free_threaded}" / "site-packages" / "parent.pth"


def misfit(there: Look | None, parent: Look, around: bool, stamp: dict[str, Any]) -> str | None:
    """Why what lies there cannot be completed to what is wanted, if so."""
    if there is None or not same_folder(there.prefix, VENV):
        return "its Python does not run: it is half made, or the Python it was made for is gone"
    if there.python != parent.python:
        return f"it is of Python {there.python}, and this is Python {parent.python}"
    if stamp.get("root", str(ROOT)) != str(ROOT):
        return "it was made in another folder"
    linked = link_file().read_text().splitlines() if link_file().exists() else []
    if around and parent.torch_folder not in linked:
        return f"it does not see the torch {parent.torch} of {sys.executable}"
    if linked and not around:
        return "the torch it was made around is not there any more, or not to be used"
    return None


# The environment and its pip


def create() -> None:
    if VENV.is_dir() and not VENV.is_symlink():
        shutil.rmtree(VENV)
    elif os.path.lexists(VENV):
        VENV.unlink()
    try:
        import venv  # some distributions leave it out

        venv.EnvBuilder(symlinks=True).create(VENV)
    except (ImportError, ValueError, OSError, subprocess.CalledProcessError) as error:
        stop(f"{sys.executable} cannot make it: {error}. {other_pythons()}")


def other_pythons() -> str:
    version = "{}.{}".format(*sys.version_info)
    return (
        f"On Debian and Ubuntu, `apt install python{version}-venv` brings what is missing; a `virtualenv` on PATH will "
        f"do as well, or another Python: PYTHON=/path/to/python3 (3.10 or newer). Then run the same command again."
    )


def works(pip: list[str]) -> bool:
    return run(*pip, "--version").returncode == 0


def find_pip() -> list[str]:
    """The pip that installs into .venv: its own, put there if need be, else this Python's."""
    own = [str(PYTHON), "-m", "pip"]
    if works(own):
        return own
    for remains in link_file().parent.glob("pip*"):  # ensurepip would take them for a pip
        remains.unlink() if remains.is_symlink() or remains.is_file() else shutil.rmtree(remains)
    done = run(PYTHON, "-m", "ensurepip", "--upgrade", "--default-pip")
    if works(own):
        return own
    for virtualenv in ([sys.executable, "-m", "virtualenv"], ["virtualenv"]):  # both bring a pip of their own
        run(*virtualenv, "--python", sys.executable, str(VENV))
        if works(own):
            return own
    parents = [sys.executable, "-m", "pip", "--python", str(PYTHON)]
    if works(parents):
        return parents
    stop(f"{sys.executable} has no pip for it ({last_line(done.stderr)}). {other_pythons()}")


def pip(command: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    # An environment refuses to install for the user alone, which is a common setting.
    return run(*command, "--disable-pip-version-check", "--no-input", *arguments, PIP_USER="0")


def complaint(stderr: str) -> str:
    """What pip says that went wrong, in a line if it does."""
    if "Retrying (" in stderr:  # whatever pip concludes from what it could not read
        return "the index cannot be reached"
    errors = [error.rstrip(".") for error in re.findall(r"^\s*(?:ERROR|error): (.+)", stderr, re.MULTILINE)]
    more = ("No matching distribution", "ResolutionImpossible", "subprocess-exited", "metadata-generation-failed")
    return "; ".join(dict.fromkeys(error for error in errors if not error.startswith(more))) or stderr.strip()


# The torch


def reachable(url: str, seconds: float = 3) -> bool:
    """Whether the index takes a connection; pip would try each of its addresses, and wait for each."""
    parts = urllib.parse.urlsplit(url)
    proxy = parts.scheme in urllib.request.getproxies() or "PIP_PROXY" in os.environ
    if parts.scheme not in ("http", "https") or proxy:
        return True  # nothing to connect to, or not from here
    connected = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError):
            socket.create_connection((parts.hostname, parts.port or parts.scheme), seconds).close()
            connected.set()

    thread = threading.Thread(target=connect, daemon=True)  # looking up a name has no time limit of its own
    thread.start()
    thread.join(seconds)
    return connected.is_set()


def cuda_packages(requirements: list[str]) -> list[str]:
    """Those of a torch's requirements that make it a CUDA build on this machine."""
    found = []
    for requirement in requirements:
        name, _, marker = requirement.partition(";")
        machine = re.search(r"platform_machine\s*==\s*['\"](\w+)", marker)
        elsewhere = sys.platform != "linux" or "extra" in marker or (machine and machine[1] != platform.machine())
        if name.lower().startswith(("nvidia-", "cuda-")) and not elsewhere:
            found.append(name)
    return found


def why_not_from(command: list[str], *options: str) -> str | None:
    """Why no CPU build comes from there, if so. Asks for the metadata of torch alone, which is small."""
    ask = (*INSTALL_TORCH, "--dry-run", "--report", "-", *options)
    done = pip(command, *ask)
    if "no such option" in done.stderr:  # pip before 22.2, as Ubuntu 22.04 has it
        done = pip(command, "install", "-q", "--upgrade", "pip")
        done = done if done.returncode else pip(command, *ask)
    if done.returncode:
        return complaint(done.stderr)
    metadata = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    cuda = [name for item in metadata for name in cuda_packages(item.get("requires_dist", []))]
    if cuda and not ALLOW_CUDA:
        return f"a CUDA build, gigabytes with the {len(cuda)} CUDA packages it asks for"
    return None


def install_torch(command: list[str]) -> None:
    findings = []
    if CPU_INDEX and not ALLOW_CUDA:
        shown = re.sub(r"//[^/@]*@", "//", CPU_INDEX)  # without a password
        index, impatient = ("--index-url", CPU_INDEX), ("--retries", "0", "--timeout", "4")
        why = why_not_from(command, *index, *impatient) if reachable(CPU_INDEX) else "it cannot be reached"
        if why is None:
            return install_torch_from(command, shown, *index)
        findings.append(f"{shown}: {why}")
    why = why_not_from(command, "--retries", "2")
    if why is None:
        return install_torch_from(command, "what pip is configured with")
    findings.append(f"what pip is configured with: {why}")
    stop(
        f"no {'' if ALLOW_CUDA else 'CPU '}build of {TORCH} was found for Python {platform.python_version()} "
        f"({'; '.join(findings)}). Do one of these, then run the same command again:\n"
        f"  {shlex.join(command)} install {TORCH} --index-url https://download.pytorch.org/whl/cpu\n"
        f"      where that index can be reached; or the path of a CPU build's wheel instead of what follows `install`\n"
        f"  export TORCH_CPU_INDEX_URL=...   a mirror of that index\n"
        f"  export PYTHON=...                a Python that has torch, or another version of Python\n"
        f"  export ALLOW_CUDA_TORCH=1        if the CUDA build is what you want"
    )


def install_torch_from(command: list[str], source: str, *options: str) -> None:
    say(f"installing {TORCH}{'' if ALLOW_CUDA else ', a CPU build,'} from {source}")
    done = pip(command, *INSTALL_TORCH, *options)
    if done.returncode:
        stop(f"pip could not install {TORCH}: {complaint(done.stderr)}. The same command goes on from here.")


def import_torch() -> str | None:
    """Why the torch in .venv does not import, if so."""
    done = run(PYTHON, "-c", "import torch")
    return last_line(done.stderr) if done.returncode else None


# All of it


def install_project(command: list[str], extras: list[str], around: bool) -> None:
    there = look(PYTHON)
    if there is None or there.torch is None:
        stop("there is still no torch in it. `make clean`, then run the same command again.")
    say(f"installing this project with what it needs: {', '.join(extras)}")
    alone = int((there.setuptools or "0").split(".")[0]) >= OLDEST_SETUPTOOLS
    isolation = ["--no-build-isolation"] if around and alone else []  # then nothing is downloaded to build this project
    project = [*isolation, "-e", f"{ROOT}[{','.join(extras)}]", f"torch=={there.torch}"]  # this torch or none
    done = pip(command, "install", "-q", *project)
    if done.returncode == 0 and "lint" in extras and not (VENV / "bin" / "ruff").exists():
        # it came with the torch, and its program is there
        done = pip(command, "install", "-q", "--ignore-installed", "--no-deps", "ruff")
    if done.returncode:
        why = complaint(done.stderr)
        if f"torch=={there.torch}" in why and "conflict" in why:
            raise UnfitError(why)
        stop(
            f"pip could not install this project with what it needs: {why}. That takes an index (PIP_INDEX_URL or "
            f"pip's configuration) or a folder of wheels (PIP_FIND_LINKS). The same command goes on from here."
        )


def leave() -> None:
    """Where .venv itself is activated, goes on as the Python that .venv was made for."""
    if same_folder(sys.prefix, VENV):
        base = "{}/bin/python{}.{}".format(sys.base_prefix, *sys.version_info)
        python = next(filter(os.path.exists, [read_stamp().get("by", ""), base]), None)
        if python is None:
            stop("it is activated, and the Python it was made for is gone. `deactivate`, then run the same command.")
        os.execv(python, [python, *sys.argv])


def main() -> None:
    leave()
    stamp, parent, there = read_stamp(), look(sys.executable), look(PYTHON)
    if parent is None:
        stop(f"{sys.executable} does not run as it should.")
    extras = sorted({*sys.argv[1:], *stamp.get("extras", [])})
    this_torch = f"torch {parent.torch} of {parent.torch_folder}"
    around = parent.torch is not None and stamp.get("unfit") != this_torch
    kept = os.path.lexists(VENV)
    if kept:
        reason = misfit(there, parent, around, stamp)
        finished = stamp.get("pyproject") == digest() and stamp["extras"] == extras
        if not reason and finished and there and there.torch:
            return
        say(f"made anew, since {reason}" if reason else "completing it")
        kept = not reason
    if not kept:
        whose = f"around its torch {parent.torch}" if around else "with a torch of its own"
        say(f"for Python {platform.python_version()} ({sys.executable}), {whose}")
        create()
    stamp = {"root": str(ROOT), "by": sys.executable, "unfit": stamp.get("unfit"), "extras": extras}
    STAMP.write_text(json.dumps(stamp))
    command = find_pip()
    if around:  # by a path file, since system_site_packages would look past a virtual environment
        if not link_file().exists():  # ensurepip brings an old setuptools, up to Python 3.11
            pip(command, "uninstall", "-q", "-y", "setuptools")
        folders = dict.fromkeys([*parent.packages, str(parent.torch_folder)])
        link_file().write_text("\n".join(folders) + "\n")
    elif not (kept and there and there.torch):
        install_torch(command)
    try:
        install_project(command, extras, around)
        why = import_torch()
        if why:
            raise UnfitError(why)
    except UnfitError as error:
        if not around:
            stop(f"its torch cannot be used: {error}. `make clean`, then run the same command again.")
        say(f"{this_torch} cannot be used: {error}")
        STAMP.write_text(json.dumps({**stamp, "unfit": this_torch}))
        return main()  # which now gives it a torch of its own
    STAMP.write_text(json.dumps({**stamp, "pyproject": digest()}))
    say("ready")


if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036
        stop(f"{sys.executable} is Python {platform.python_version()}. PYTHON=... takes another: 3.10 or newer.")
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted. The same command goes on from here.")
    except OSError as error:  # a full disk, a folder that cannot be written
        stop(f"{error}. Once that is mended, the same command goes on from here.")
