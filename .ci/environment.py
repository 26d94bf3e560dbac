"""Make .venv for this project, once: `python3 .ci/environment.py [extra ...]` (extras of pyproject.toml).

Where this Python already has torch, the environment sees it (and its Triton) and installs only what is missing.
Elsewhere it installs a CPU build of torch, and stops before the package index would send a CUDA build.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "extras.txt"
TORCH = "torch==2.13.0"


def has(python: str | pathlib.Path, module: str) -> bool:
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0


def pip(*arguments: str) -> str:
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def install_cpu_torch() -> None:
    plan = json.loads(pip("install", "-q", "--dry-run", "--report", "-", TORCH))
    names = [item["metadata"]["name"] for item in plan["install"]]
    cuda = [name for name in names if name.lower().startswith(("nvidia-", "cuda-"))]
    if cuda and not os.environ.get("ALLOW_CUDA_TORCH"):
        sys.exit(
            f"{TORCH} would bring {len(cuda)} CUDA packages here, several gigabytes. Install a CPU build of torch for "
            f"this Python first (pytorch.org says how), or set ALLOW_CUDA_TORCH=1 if the CUDA build is what you want."
        )
    pip("install", "-q", TORCH)


def main() -> None:
    extras = sorted(set(sys.argv[1:]) | set(STAMP.read_text().split() if STAMP.exists() else ()))
    stamp = " ".join(extras) + "\n"
    newer = STAMP.exists() and STAMP.stat().st_mtime > (ROOT / "pyproject.toml").stat().st_mtime
    if newer and STAMP.read_text() == stamp:
        return
    shared = has(sys.executable, "torch")
    print(f"making {VENV} {'around the torch of ' + sys.executable if shared else 'with a CPU build of torch'} ...")
    if not PYTHON.exists():
        venv.create(VENV, with_pip=True)
        if shared:  # by a path file, since system_site_packages would look past a virtual environment
            packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
            next(VENV.glob("lib/python*/site-packages")).joinpath("parent.pth").write_text("\n".join(packages) + "\n")
    if not has(PYTHON, "torch"):
        install_cpu_torch()
    isolation = ["--no-build-isolation"] if shared and has(PYTHON, "setuptools") else []
    pip("install", "-q", *isolation, "-e", f"{ROOT}[{','.join(extras)}]")
    if "lint" in extras and not (VENV / "bin" / "ruff").exists():  # it came with the torch, and its program is there
        pip("install", "-q", "--ignore-installed", "--no-deps", "ruff")
    STAMP.write_text(stamp)


if __name__ == "__main__":
    main()
