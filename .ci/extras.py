"""What each extra comes to with several versions of torch, asked of the package index: `python .ci/extras.py`.

Nothing is installed: pip resolves into an empty environment (`--dry-run`). It takes minutes, since metadata of large
wheels is read. The exit code is 1 where an extra resolves that should not, or does not that should, or to another torch
than it is for. An extra for one torch is expected to refuse the others, so that nobody gets a wheel that does not load.
"""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
import tempfile
import venv
from typing import NamedTuple

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


def resolve(extra: str, torch: str, folder: pathlib.Path) -> Answer:
    """What pip would install of the project with this extra, where torch has to be this one."""
    python = folder / "bin" / "python"
    constraints = folder / "constraints.txt"
    constraints.write_text("" if torch == NEWEST else f"torch=={torch}\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    dry = ["install", "-q", "--dry-run", "--ignore-installed", "--report", "-", "-c", constraints]
    project = f"{ROOT}[{extra}]" if extra else str(ROOT)
    done = subprocess.run([*pip, *dry, project], capture_output=True, text=True)
    if done.returncode:
        errors = re.findall(r"^ERROR: (.+)", done.stderr, re.MULTILINE)
        return Answer({}, errors[0] if errors else done.stderr.strip()[-300:])
    found = {
        item["metadata"]["name"].lower(): item["metadata"]["version"] for item in json.loads(done.stdout)["install"]
    }
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
    with tempfile.TemporaryDirectory(prefix="fa3-metadata-extras-") as name:
        venv.create(name, with_pip=False)
        for extra, expected in EXPECTED.items():
            cells = []
            for torch, fitting in zip(TORCHES, expected, strict=True):
                answer = resolve(extra, torch, pathlib.Path(name))
                cells.append(", ".join(f"{package} {v}" for package, v in answer.versions.items()) or "refused")
                if why := problem(answer, fitting):
                    wrong.append(f"{extra or 'no extra'} with torch {torch}: {why}")
            print(f"| {extra or '(none)'} | " + " | ".join(cells) + " |", flush=True)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
