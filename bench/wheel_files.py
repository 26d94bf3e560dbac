"""Wheels with FA3 in them: fetched with pip, and what is looked at in them."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from tempfile import TemporaryDirectory

from fa3_metadata.triton_kernels.builds import version_key

from .elf import Elf

_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28, 31, 34, 35, 39)]
_PLATFORMS += ["manylinux1_x86_64", "manylinux2014_x86_64", "linux_x86_64"]
_FOR_ANY_PYTHON = ["--no-deps", "--only-binary=:all:", "--implementation=cp", "--python-version=3.12"]


@dataclass(frozen=True)
class Contents:
    """Where a package has its parts."""

    extension: str
    front_end: str  # the Python module with both functions
    forward: str  # the function that takes metadata; the other one is get_scheduler_metadata


_SGL = Contents("sgl_kernel/flash_ops.abi3.so", "sgl_kernel/flash_attn.py", "flash_attn_with_kvcache")
CONTENTS = {
    "sgl-kernel": _SGL,
    "sglang-kernel": _SGL,
    "vllm": Contents(
        "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
        "vllm/vllm_flash_attn/flash_attn_interface.py",
        "flash_attn_varlen_func",
    ),
    "fa3-fwd": Contents("fa3_fwd/_C.abi3.so", "fa3_fwd_interface.py", "flash_attn_with_kvcache"),
    "flash-attn-3": Contents("flash_attn_3/_C.abi3.so", "flash_attn_interface.py", "flash_attn_with_kvcache"),
}


@dataclass(frozen=True)
class Wheel:
    package: str
    version: str
    extension: Elf
    front_end: str  # Python source
    forward: str

    @property
    def build(self) -> str:
        return f"{self.package}-{self.version}"


@contextmanager
def opened(wheel: str) -> Iterator[Wheel]:
    """The wheel at a path, or of a name such as "sglang-kernel==0.4.5", fetched for the time of the block.

    Raises `ValueError` for a package that has no FA3, or a wheel without the parts of it.
    """
    with TemporaryDirectory(prefix="wheel-rules-") as folder:
        path = pathlib.Path(wheel) if wheel.endswith(".whl") else _download(wheel, pathlib.Path(folder))
        yield _read(path)


@cache
def published_versions(package: str) -> list[str]:
    """Every released version of a package that pip finds, oldest first; none where the index does not know it."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    listed = subprocess.run(command, capture_output=True, text=True).stdout
    found = re.search(r"^Available versions: (.*)$", listed, re.MULTILINE)
    return sorted((text for text in found[1].split(", ") if version_key(text)) if found else (), key=version_key)


def _download(requirement: str, folder: pathlib.Path) -> pathlib.Path:
    if not re.fullmatch(r"[\w.-]+==[\w.+]+", requirement):
        raise ValueError(f"a wheel must be a .whl file or a name such as sglang-kernel==0.4.5, got {requirement!r}")
    platforms = [f"--platform={platform}" for platform in _PLATFORMS]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-cache-dir", *_FOR_ANY_PYTHON, *platforms]
    done = subprocess.run([*command, "-d", str(folder), requirement], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise ValueError(f"{requirement}: {(done.stderr.strip().splitlines() or ['pip found no wheel'])[-1]}")
    return wheels[0]


def _read(path: pathlib.Path) -> Wheel:
    name = re.match(r"([^-]+)-([^-]+)-.*\.whl$", path.name)
    package, version = (name[1].replace("_", "-").lower(), name[2].partition("+")[0]) if name else ("", "")
    if package not in CONTENTS:
        raise ValueError(f"{path.name} is not a wheel of {', '.join(CONTENTS)}")
    contents = CONTENTS[package]
    try:
        with zipfile.ZipFile(path) as archive:
            extension, front_end = archive.read(contents.extension), archive.read(contents.front_end)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{path.name}: {error}") from None
    return Wheel(package, version, Elf(extension), front_end.decode(), contents.forward)
