"""What each extra comes to with several versions of torch, asked of the package index: `python .ci/extras.py`.

Nothing is installed: uv, of the extra `package`, resolves from metadata alone. The exit code is 1 where an extra
resolves that should not, or does not that should, or to another torch than it is for. An extra for one torch is to
refuse the others, so that nobody gets a wheel that does not load. Where no index is in reach, that is all it says.
"""

from __future__ import annotations

import functools
import pathlib
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
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
    "sglang-kernel": (None, None, "2.14.1"),
    "vllm": (None, "2.11.0", "2.14.0"),
}
NO_INDEX = re.compile(r"Failed to fetch|error sending request|Request failed", re.IGNORECASE)
SHOWN = ("torch", "triton", "sgl-kernel", "sglang-kernel", "vllm", "fa3-fwd")


class Answer(NamedTuple):
    versions: dict[str, str]  # of SHOWN; empty: refused
    why: str  # refused


def declared() -> set[str]:
    """The extras of pyproject.toml."""
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE))


def resolve(folder: pathlib.Path, extra: str, torch: str) -> Answer:
    """What would be installed of this project with this extra, where torch has to be this one."""
    constraints = folder / f"{torch}.txt"
    constraints.write_text("" if torch == NEWEST else f"torch=={torch}\n")
    uv = [sys.executable, "-m", "uv", "pip", "compile", "-q", "--no-header", "--no-annotate", "--color", "never"]
    # Of Linux on x86-64, where the FA3 packages are; vLLM and SGLang want Python 3.11.
    uv += ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_35", "--constraint", str(constraints)]
    uv += ["--extra", extra] if extra else []
    done = subprocess.run([*uv, ROOT / "pyproject.toml"], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        return Answer({}, " ".join(done.stderr.split()))
    found = dict(re.findall(r"^([\w.-]+)==(\S+)", done.stdout, re.MULTILINE))
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
    with tempfile.TemporaryDirectory(prefix="fa3-metadata-extras-") as folder, ThreadPoolExecutor() as pool:
        for extra, expected in EXPECTED.items():
            answers = list(pool.map(functools.partial(resolve, pathlib.Path(folder), extra), TORCHES))
            if out_of_reach := next((one.why for one in answers if NO_INDEX.search(one.why)), None):
                print(f"extras: not asked, since no index is in reach: {out_of_reach}")
                return 0
            cells = [", ".join(f"{package} {v}" for package, v in one.versions.items()) or "refused" for one in answers]
            print(f"| {extra or '(none)'} | " + " | ".join(cells) + " |", flush=True)
            for torch, answer, fitting in zip(TORCHES, answers, expected, strict=True):
                if why := problem(answer, fitting):
                    wrong.append(f"{extra or 'no extra'} with torch {torch}: {why}")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
