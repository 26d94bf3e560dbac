"""Published wheels, for tests that read them: of a folder, or fetched with pip.

FA3_METADATA_WHEELS names the folder, or is "index". Nothing is fetched unasked: wheels are large.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

WHEELS_VARIABLE = "FA3_METADATA_WHEELS"


def published_wheel(package: str, version: str, where: Path | str | None = None) -> Path | None:
    """The wheel of a release; None: there is none, or it could not be fetched. `where` goes before the variable."""
    where = where or os.environ.get(WHEELS_VARIABLE)
    if not where:
        return None
    if where == "index":
        return _fetched(package, version)
    return next(iter(sorted(Path(where).rglob(f"{package}-{version}-*.whl"))), None)


def why_no_wheel(package: str, version: str) -> str:
    """For a test that is skipped."""
    where = os.environ.get(WHEELS_VARIABLE)
    if where == "index":
        return f"pip could not fetch {package} {version}"
    return f"no wheel of {package} {version}: set {WHEELS_VARIABLE}=index, or to a folder of wheels"


def wheel_or_skip(package: str, version: str) -> Path:
    """The wheel of a release, for a test that is skipped without."""
    if (wheel := published_wheel(package, version)) is None:
        pytest.skip(why_no_wheel(package, version))
    return wheel


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fa3-metadata-wheels-")


@functools.cache
def _fetched(package: str, version: str) -> Path | None:
    folder = Path(_folder().name) / version
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    for python in (f"{sys.version_info.major}.{sys.version_info.minor}", "3.12"):
        platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 31, 34, 35)]
        asked = [*platforms, f"--python-version={python}", "--implementation=cp", "-d", str(folder)]
        if subprocess.run([*command, *asked, f"{package}=={version}"], capture_output=True).returncode == 0:
            return next(folder.glob("*.whl"))
    return None
