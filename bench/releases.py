"""The table of supported builds, from RELEASES and from what was recorded of each: `python -m bench releases`.

With --write the README's is made anew. What the tests compare: this table with the README's, the bounds of the extras
in pyproject.toml with RELEASES, and the recordings with both.
"""

from __future__ import annotations

import argparse
import gzip
import pathlib
import sys

from fa3_metadata.triton_kernels.builds import RELEASES, Release, version_key

from .wheel_recordings import Recordings

ROOT = pathlib.Path(__file__).resolve().parent.parent
README, GOLDENS = ROOT / "README.md", ROOT / "tests" / "data"
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


def _row(release: Release, recordings: Recordings) -> str:
    ends = [release.oldest] if release.oldest == release.newest else [release.oldest, release.newest]
    found = recordings.wheels.get(release.package, {})
    read = [version for version in found if _is_in(release, version)]
    makers = [version for version in sorted(read, key=version_key) if found[version]["op_schema"] is not None]
    if not read:
        makes, wheels = "yes", "none is published"
    else:
        makes = "no" if not makers else "yes" if len(makers) == len(read) else f"from {makers[0]} on"
        wheels = str(len(read))
    cases = [f"{version}: {count:,}" for version, count in _golden_cases(release)]
    named = f"{release.package} {' to '.join(ends)}"
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


def with_table(text: str, made: str) -> str:
    """A Markdown text with the table between BEGIN and END replaced. Raises `ValueError` where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there is no {BEGIN} ... {END}")
    return f"{before}{begin}\n{made}\n{end}{after}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench releases", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    options = parser.parse_args(argv)
    made = table()
    if not options.write:
        print(made)
        return 0
    README.write_text(with_table(README.read_text(), made))
    print(f"{README}: {len(RELEASES)} releases", file=sys.stderr)
    return 0
