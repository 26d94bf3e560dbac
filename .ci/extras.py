"""What each extra comes to with several versions of torch, asked of the package index: `python .ci/extras.py`.

Nothing is installed: pip resolves into an empty environment (`--dry-run`). It takes minutes, since metadata of large
wheels is read. The exit code is 1 where an extra resolves that should not, or does not that should, or to another torch
than it is for. An extra for one torch is expected to refuse the others, so that nobody gets a wheel that does not load.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import venv
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from package import build

ROOT = pathlib.Path(__file__).resolve().parent.parent
NEWEST = "newest"
TORCHES = ("2.9.1", "2.11.0", NEWEST)
# Extra -> the torch that it comes to for each of TORCHES, "" for any; None: refused.
FITS_ALL = ("2.9.1", "2.11.0", "")
EXPECTED = {
    "": FITS_ALL,
    "triton": FITS_ALL,
    "plot": FITS_ALL,
    "test": FITS_ALL,
    "bench": FITS_ALL,
    "lint": FITS_ALL,
    "docs": FITS_ALL,
    "package": FITS_ALL,
    "fa3-fwd": FITS_ALL,
    "sgl-kernel": ("2.9.1", None, "2.9.1"),
    "sglang-kernel-torch29": ("2.9.1", None, "2.9.1"),
    "sglang-kernel-torch211": (None, "2.11.0", "2.11.0"),
    "sglang-kernel": (None, None, ""),
    "vllm": (None, "2.11.0", ""),
}
SHOWN = ("torch", "triton", "sgl-kernel", "sglang-kernel", "vllm", "fa3-fwd")


class Answer(NamedTuple):
    versions: dict[str, str]  # of SHOWN; empty: refused
    why: str  # refused


def declared() -> set[str]:
    """The extras of pyproject.toml."""
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE))


def empty_environment(folder: pathlib.Path) -> list[str | pathlib.Path]:
    """The command of pip for an environment that has nothing."""
    venv.create(folder, with_pip=False)
    return [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "--disable-pip-version-check"]


def resolve(pip: list[str | pathlib.Path], wheel: pathlib.Path, extra: str, torch: str) -> Answer:
    """What pip would install of the wheel with this extra, where torch has to be this one."""
    constraints = wheel.with_name(f"{torch}.txt")
    constraints.write_text("" if torch == NEWEST else f"torch=={torch}\n")
    dry = ["install", "-q", "--dry-run", "--ignore-installed", "--report", "-", "-c", constraints]
    done = subprocess.run([*pip, *dry, f"{wheel}[{extra}]" if extra else wheel], capture_output=True, text=True)
    if done.returncode:
        errors = re.findall(r"^ERROR: (.+)", done.stderr, re.MULTILINE)
        return Answer({}, errors[0] if errors else done.stderr.strip()[-300:])
    items = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    found = {item["name"].lower(): item["version"] for item in items}
    return Answer({name: found[name] for name in SHOWN if name in found}, "")


def problem(answer: Answer, expected: str | None) -> str:
    """What is wrong with an answer; empty: nothing."""
    if expected is None:
        return f"resolves to {answer.versions}" if answer.versions else ""
    if not answer.versions:
        return answer.why
    torch = answer.versions["torch"].partition("+")[0]
    return "" if torch == expected or not expected else f"comes to torch {torch}"


def main() -> int:
    if strange := declared() ^ (EXPECTED.keys() - {""}):
        print(f"extras that are in one of pyproject.toml and EXPECTED alone: {', '.join(sorted(strange))}")
        return 1
    print("| extra | " + " | ".join(f"torch {torch}" for torch in TORCHES) + " |\n|---|" + "---|" * len(TORCHES))
    wrong = []
    with tempfile.TemporaryDirectory(prefix="fa3-metadata-extras-") as name, ThreadPoolExecutor(len(TORCHES)) as pool:
        folder = pathlib.Path(name)
        pip = empty_environment(folder / "empty")
        _, wheel = build(folder)
        for extra, expected in EXPECTED.items():
            answers = list(pool.map(functools.partial(resolve, pip, wheel, extra), TORCHES))
            cells = [", ".join(f"{package} {v}" for package, v in one.versions.items()) or "refused" for one in answers]
            print(f"| {extra or '(none)'} | " + " | ".join(cells) + " |", flush=True)
            for torch, answer, fitting in zip(TORCHES, answers, expected, strict=True):
                if why := problem(answer, fitting):
                    wrong.append(f"{extra or 'no extra'} with torch {torch}: {why}")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
