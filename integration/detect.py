"""Which FA3 build is installed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata

from .triton_kernels.builds import DEFAULT_BUILD

BUILD_VARIABLE = "FA3_METADATA_BUILD"
SEARCH_ORDER = ("sglang-kernel", "sgl-kernel", "vllm", "flash-attn-3", "fa3-fwd")


@dataclass(frozen=True)
class DetectedBuild:
    build: str  # such as "sglang-kernel-0.4.2"
    reason: str


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def _search() -> DetectedBuild:
    found = {package: version for package in SEARCH_ORDER if (version := installed_version(package))}
    if not found:
        return DetectedBuild(DEFAULT_BUILD, f"none of {', '.join(SEARCH_ORDER)} is installed; this is the default")
    package, version = next(iter(found.items()))
    others = f"; comes before {', '.join(list(found)[1:])}, also installed" if len(found) > 1 else ""
    return DetectedBuild(f"{package}-{version}", f"{package} {version} is installed{others}")


def detect_build() -> DetectedBuild:
    """The build that `build=None` means, and why.

    The environment variable FA3_METADATA_BUILD wins; then the first installed package of sglang-kernel,
    sgl-kernel, vllm, flash-attn-3, fa3-fwd; with none of them, sglang-kernel-0.4.2. The packages are looked up once a
    process. The answer is not checked here: an unsupported version raises where it is used.
    """
    if build := os.environ.get(BUILD_VARIABLE):
        return DetectedBuild(build, f"the environment variable {BUILD_VARIABLE} says so")
    return _search()
