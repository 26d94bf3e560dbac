"""The links of a Markdown page, and those of them that lead nowhere in this repository."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterator

_FENCED = re.compile(r"^(?P<fence>```+|~~~+).*?^(?P=fence)\s*?$", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
_INLINE = re.compile(r"\]\(\s*<?([^)\s>]*)>?(?:\s+\"[^\"]*\")?\s*\)")
_REFERENCE = re.compile(r"^\s{0,3}\[[^\]]+\]:\s+<?([^\s>]+)", re.MULTILINE)
_HTML = re.compile(r"<(?:a|img)\s[^>]*?(?:href|src)=\"([^\"]*)\"", re.IGNORECASE)
_ANCHOR = re.compile(r"<a\s[^>]*?(?:id|name)=\"([^\"]+)\"", re.IGNORECASE)
_HEADING = re.compile(r"^ {0,3}#{1,6}\s+(.*?)\s*#*\s*$", re.MULTILINE)


def pages(root: pathlib.Path) -> list[pathlib.Path]:
    """Every Markdown page of the repository; not those of environments, caches and what was built."""
    found = []
    for folder, folders, files in os.walk(root):
        built = {"site", "build", "dist"} if pathlib.Path(folder) == root else set()
        folders[:] = [one for one in folders if one == ".github" or not (one.startswith(".") or one in built)]
        found += [pathlib.Path(folder, file) for file in files if file.endswith(".md")]
    return sorted(found)


def targets(text: str) -> Iterator[str]:
    """Where a page's links and pictures lead; what stands in code is none."""
    text = _FENCED.sub("", text)
    plain = _CODE.sub("", text)
    for pattern in (_INLINE, _REFERENCE, _HTML):
        yield from pattern.findall(plain)


def anchors(text: str) -> set[str]:
    """Those of a page's headings, as code hosts make them, and those that it names itself."""
    text = _FENCED.sub("", text)
    found: set[str] = set(_ANCHOR.findall(text))
    for heading in _HEADING.findall(text):
        words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug, number = re.sub(r"[^\w\- ]", "", words).replace(" ", "-"), 0
        while (anchor := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(anchor)
    return found


def astray(page: pathlib.Path, root: pathlib.Path) -> list[str]:
    """The links of a page that lead nowhere, and why."""
    wrong = []
    for target in targets(page.read_text(encoding="utf-8")):
        if re.match(r"(https?://[\w.-]+(/\S*)?|mailto:\S+@\S+)$", target):
            continue
        path, _, anchor = target.partition("#")
        there = pathlib.Path(os.path.normpath(page.parent / path)) if path else page
        if not target or re.match(r"[a-z]+:|/", target):
            wrong.append(f"{target!r} is neither relative nor an address")
        elif not there.is_relative_to(root):
            wrong.append(f"{target} leads out of the repository")
        elif not there.exists():
            wrong.append(f"{target} is not there")
        elif anchor and (there.suffix != ".md" or anchor not in anchors(there.read_text(encoding="utf-8"))):
            wrong.append(f"{target} names no heading of {there.relative_to(root)}")
    return wrong
