"""The table of supported builds, from RELEASES and from what was recorded of each: `python -m bench releases`.

With --write the one in docs/builds.md is made anew, and the README's sentence that sums it up. What the tests compare:
both with these pages, the bounds of the extras in pyproject.toml with RELEASES, and the recordings with both.
"""

from __future__ import annotations

import argparse
import gzip
import pathlib
import sys

from fa3_metadata.triton_kernels.builds import RELEASES, Release, version_key

from .wheel_recordings import Recordings

ROOT = pathlib.Path(__file__).resolve().parent.parent
README, PAGE, GOLDENS = ROOT / "README.md", ROOT / "docs" / "builds.md", ROOT / "tests" / "data"
BEGIN, END = "<!-- releases: python -m bench releases --write -->", "<!-- end of releases -->"
EXTRAS = {  # package -> the extras of pyproject that bring it, the oldest versions first
    "sgl-kernel": ("sgl-kernel",),
    "sglang-kernel": ("sglang-kernel-torch29", "sglang-kernel-torch211", "sglang-kernel"),
    "fa3-fwd": ("fa3-fwd",),
}


def table(releases: tuple[Release, ...] = RELEASES, recordings: Recordings | None = None) -> str:
    """Markdown, a row a release."""
    recordings = recordings or Recordings.load()
    lines = [
        "| build (`build=`) | rules | makes metadata itself | wheels read | cases of the real op on a Hopper GPU |",
        "|---|---|---|---|---|",
    ]
    lines += [_row(release, recordings) for release in releases]
    return "\n".join(lines)


def summary(releases: tuple[Release, ...] = RELEASES, recordings: Recordings | None = None) -> str:
    """The same in a sentence or two: packages and versions, wheels read, calls recorded."""
    recordings = recordings or Recordings.load()
    packages = dict.fromkeys(release.package for release in releases)
    named = [f"{package} {_range(*bounds(package, releases))}" for package in packages]
    wheels = sum(len(_read(release, recordings)) for release in releases)
    cases = [case for release in releases for case in _golden_cases(release)]
    return (
        f"{', '.join(named[:-1])} and {named[-1]}.\n"
        f"{wheels} published wheels were read for it, and {sum(count for _, count in cases):,} calls of the real op "
        f"of {len(cases)} of them\nare kept with the values that it gave on a Hopper GPU."
    )


def _range(oldest: str, newest: str) -> str:
    return oldest if oldest == newest else f"{oldest} to {newest}"


def _read(release: Release, recordings: Recordings) -> list[str]:
    """Versions of this release whose wheels were read."""
    return [version for version in recordings.wheels.get(release.package, {}) if _is_in(release, version)]


def _row(release: Release, recordings: Recordings) -> str:
    found = recordings.wheels.get(release.package, {})
    read = _read(release, recordings)
    makers = [version for version in sorted(read, key=version_key) if found[version]["op_schema"] is not None]
    if not read:
        makes, wheels = "yes", "none is published"
    else:
        makes = "no" if not makers else "yes" if len(makers) == len(read) else f"from {makers[0]} on"
        wheels = str(len(read))
    cases = [f"{version}: {count:,}" for version, count in _golden_cases(release)]
    named = f"{release.package} {_range(release.oldest, release.newest)}"
    return f"| {named} | {release.rules.name} | {makes} | {wheels} | {', '.join(cases) or '-'} |"


def _golden_cases(release: Release) -> list[tuple[str, int]]:
    """Versions of this release that were recorded on a GPU, and how many cases of each."""
    found = []
    for path in GOLDENS.glob(f"{release.package}-*.jsonl.gz"):
        version = path.name.removeprefix(f"{release.package}-").removesuffix(".jsonl.gz")
        if version_key(version) and _is_in(release, version):
            with gzip.open(path, "rb") as lines:
                found.append((version, sum(1 for _ in lines)))
    return sorted(found, key=lambda one: version_key(one[0]))


def _is_in(release: Release, version: str) -> bool:
    return version_key(release.oldest) <= version_key(version) <= version_key(release.newest)


def bounds(package: str, releases: tuple[Release, ...] = RELEASES) -> tuple[str, str]:
    """The oldest and newest version of a package that has rules."""
    own = [release for release in releases if release.package == package]
    return own[0].oldest, own[-1].newest


def with_made(text: str, made: str) -> str:
    """A Markdown text with what stands between BEGIN and END replaced. Raises `ValueError` where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there is no {BEGIN} ... {END}")
    return f"{before}{begin}\n{made}\n{end}{after}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench releases", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put it into docs/builds.md, and its sum into README.md")
    options = parser.parse_args(argv)
    made = table()
    if not options.write:
        print(made)
        return 0
    for page, its in ((PAGE, made), (README, summary())):
        page.write_text(with_made(page.read_text(), its))
        print(f"{page}: {len(RELEASES)} releases", file=sys.stderr)
    return 0
