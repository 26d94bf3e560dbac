"""The commands of docs/*.md, run: what they print goes into the page, what they draw beside it.

    python -m bench illustrate            # says whether the pages say what the commands print; 1: they do not
    python -m bench illustrate --write    # writes what they print, and draws the pictures

A block of code that starts with "$ " is a command with its output. The comment after it, "shows: predicted, to know",
says which lines of the output are shown: those that start with one of these labels, and the lines that go on from them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Iterator

from fa3_metadata.installed import BUILD_VARIABLE
from fa3_metadata.tools import cli
from fa3_metadata.tools.pictures import MissingExtraError, pyplot
from fa3_metadata.triton_kernels.builds import DEFAULT_BUILD

ROOT = pathlib.Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"```\n\$ (?P<command>[^\n]+)\n(?P<output>.*?)```\n<!-- shows: (?P<labels>[^\n]+) -->", re.DOTALL)


def printed(command: str, draws: bool) -> str:
    """What a command prints. Without `draws` a picture is left out. Raises `ValueError` for an unknown one."""
    words = shlex.split(command)
    if "--plot" in words:
        place = words.index("--plot")
        if draws:
            words[place + 1] = str(ROOT / words[place + 1])
        else:
            del words[place : place + 2]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), _default_build():
        if words[0] == "fa3-metadata":
            status = cli.main(words[1:])
        elif words[:3] == ["python", "-m", "bench"]:
            from .__main__ import main as bench

            status = bench(words[3:])
        else:
            raise ValueError(f"only fa3-metadata and python -m bench are run, got {command!r}")
    if status:
        raise ValueError(f"{command} ended with {status}")
    return out.getvalue()


@contextlib.contextmanager
def _default_build() -> Iterator[None]:
    """Whatever FA3 is installed, the pages are of the default one."""
    before = os.environ.get(BUILD_VARIABLE)
    os.environ[BUILD_VARIABLE] = DEFAULT_BUILD
    try:
        yield
    finally:
        del os.environ[BUILD_VARIABLE]
        if before is not None:
            os.environ[BUILD_VARIABLE] = before


def chosen(output: str, labels: list[str]) -> str:
    """The lines that start with one of the labels, and those that go on from them."""
    lines, shows = [], False
    for line in output.splitlines():
        goes_on = line.startswith("            ") and line.strip()
        if not goes_on:
            shows = any(line.lstrip().startswith(label) for label in labels)
        if shows:
            lines.append(line.rstrip() + "\n")
    return "".join(lines)


def illustrated(text: str, draws: bool = False) -> str:
    """A page with what its commands print."""

    def made(block: re.Match[str]) -> str:
        labels = [label.strip() for label in block["labels"].split(",")]
        output = chosen(printed(block["command"], draws), labels)
        return f"```\n$ {block['command']}\n{output}```\n<!-- shows: {block['labels']} -->"

    return _BLOCK.sub(made, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench illustrate", description="run the commands of docs/*.md")
    parser.add_argument("--write", action="store_true", help="write what they print, and draw their pictures")
    options = parser.parse_args(argv)
    if options.write:
        try:
            pyplot()
        except MissingExtraError as error:
            print(f"illustrate: {error}", file=sys.stderr)
            return 2
    status = 0
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = path.read_text()
        made = illustrated(text, options.write)
        if options.write:
            path.write_text(made)
        elif made != text:
            print(f"{path.relative_to(ROOT)} does not say what its commands print: python -m bench illustrate --write")
            status = 1
    return status
