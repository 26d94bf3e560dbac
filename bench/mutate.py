"""Whether the tests notice one-line breaks of the code: those of mutations.py, one at a time, in a copy of the tree.

A mutation whose tests go red is what the list promises; one that survives says that a test is missing.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

from .mutations import MUTATIONS, Mutation

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "fa3_metadata"
FOLDERS = ("integration", "triton_kernels")  # what the package is made of: pyproject.toml
OWN_TEST = "tests/bench/test_mutate.py"  # says that every text is in its file, so it is red whatever is broken
LONGEST = 3600  # seconds that the tests of one mutation may take; a break may make a loop endless
_NO_FAILURE, _FAILURE = 0, 1  # exit codes of pytest
# What a break that writes where it may not dies of, which nobody overlooks.
_CRASHES = tuple(-signum for signum in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE))


def stale_reason(mutation: Mutation, root: pathlib.Path) -> str | None:
    """Why a mutation no longer fits the tree; None: it does."""
    path = root / mutation.file
    if not path.is_file():
        return f"there is no {mutation.file}"
    text = path.read_text(encoding="utf-8")
    if (times := text.count(mutation.before)) != 1:
        return f"{mutation.file} has the text {times} times, not once: {mutation.before!r}"
    mutated = mutation.applied_to(text)
    if mutated == text:
        return "it changes nothing"
    if path.suffix == ".py":
        try:
            compile(mutated, mutation.file, "exec")
        except SyntaxError as error:
            return f"{mutation.file} would not compile: {error}"
    if not mutation.tests:
        return "it names no tests"
    for test in mutation.tests:
        file, *names = test.split("::")
        if not (root / file).is_file():
            return f"there is no {file}"
        name = names[-1].partition("[")[0] if names else None
        if name and not re.search(rf"^ *def {re.escape(name)}\(", (root / file).read_text(encoding="utf-8"), re.M):
            return f"{file} has no {name}"
    return None


class Tree:
    """A copy of the tree in a folder, whose package is the one that its tests import."""

    def __init__(self, root: pathlib.Path, folder: pathlib.Path) -> None:
        self.folder = folder / "tree"
        ignored = (root / ".gitignore").read_text().split() if (root / ".gitignore").exists() else ()
        left_out = shutil.ignore_patterns(".git", "__pycache__", *(name.rstrip("/") for name in ignored))
        shutil.copytree(root, self.folder, symlinks=True, ignore=left_out)
        # An installed package may point to the working tree, and its parts are found one by one, so ours is whole.
        package = folder / "imported" / PACKAGE
        package.mkdir(parents=True)
        for path in (*(self.folder / FOLDERS[0]).iterdir(), *(self.folder / name for name in FOLDERS[1:])):
            (package / path.name).symlink_to(path)
        paths = (str(package.parent), os.environ.get("PYTHONPATH", ""))
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONDONTWRITEBYTECODE": "1",  # two mutations of a file may have one size and one second
            "CUDA_VISIBLE_DEVICES": "",
        }

    def check(self) -> None:
        """Raise `RuntimeError` where its tests would test other code than its own."""
        where = "; ".join(f"import {name} as m; print(m.__file__)" for name in (PACKAGE, f"{PACKAGE}.{FOLDERS[-1]}"))
        done = self._run("-c", where)
        found = [pathlib.Path(line).resolve() for line in done.stdout.split()]
        wanted = [(self.folder / name / "__init__.py").resolve() for name in FOLDERS]
        if found != wanted:
            raise RuntimeError(f"{PACKAGE} must be imported from {wanted}, got {found}\n{done.stderr}")

    def test(self, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run tests, the whole suite if none are named, until one fails."""
        chosen = tests or (f"--ignore={OWN_TEST}",)
        return self._run("-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *chosen)

    @contextmanager
    def mutated(self, mutation: Mutation) -> Iterator[None]:
        """The tree with one break."""
        path = self.folder / mutation.file
        text = path.read_text(encoding="utf-8")
        path.write_text(mutation.applied_to(text), encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(text, encoding="utf-8")

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], cwd=self.folder, env=self._environment, capture_output=True, text=True,
            timeout=LONGEST,
        )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What the tests said of a mutation."""

    mutation: Mutation
    result: str  # "red", "survived", or "no answer"
    seconds: float
    output: str


def outcome_of(mutation: Mutation, tree: Tree, whole_suite: bool) -> Outcome:
    start = time.perf_counter()
    try:
        with tree.mutated(mutation):
            done = tree.test(() if whole_suite else mutation.tests)
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, output = None, str(error)
    result = "no answer"
    if code == _NO_FAILURE:
        result = "survived"
    elif code in (_FAILURE, *_CRASHES) and "ERROR collecting" not in output:  # whatever stops the import is no test's
        result = "red"
    return Outcome(mutation, result, time.perf_counter() - start, output)


def outcomes(
    mutations: Sequence[Mutation], root: pathlib.Path, whole_suite: bool = False, jobs: int = 1
) -> Iterator[Outcome]:
    """What the tests say of each mutation, in this order.

    Raises `ValueError` for one that does not fit the tree, and `RuntimeError` where the tests fail without any.
    """
    reasons = [f"{one.name}: {reason}" for one in mutations if (reason := stale_reason(one, root)) is not None]
    if reasons:
        raise ValueError("the list of mutations must fit the code, and does not:\n" + "\n".join(reasons))
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        trees = [Tree(root, pathlib.Path(folder, str(job))) for job in range(min(jobs, len(mutations)))]
        trees[0].check()
        free: SimpleQueue[Tree] = SimpleQueue()
        for tree in trees:
            free.put(tree)

        def outcome(mutation: Mutation) -> Outcome:
            tree = free.get()
            try:
                return outcome_of(mutation, tree, whole_suite)
            finally:
                free.put(tree)

        with ThreadPoolExecutor(len(trees)) as pool:
            named = sorted({test for one in mutations for test in one.tests})
            shares = [named[place :: len(trees)] for place in range(min(len(trees), len(named)))]
            for done in pool.map(Tree.test, trees, [()] if whole_suite else shares):
                if done.returncode != _NO_FAILURE:
                    raise RuntimeError(f"the tests must pass before anything is broken:\n{done.stdout}{done.stderr}")
            yield from pool.map(outcome, mutations)


def report(found: Iterable[Outcome], width: int) -> int:
    """Print a table of them as they come, then what is wrong; the exit status."""
    others = []
    for place, one in enumerate(found):
        if place == 0:
            print(f"{'mutation':{width}}  {'result':9}  seconds")
        print(f"{one.mutation.name:{width}}  {one.result:9}  {one.seconds:7.1f}", flush=True)
        if one.result != "red":
            others.append(one)
    for one in others:
        print(f"\n{one.mutation.name} {one.result}: {one.mutation.file}, {one.mutation.why}")
        print("\n".join(one.output.splitlines()[-20:]))
    return int(bool(others))


def listed(mutations: Sequence[Mutation]) -> str:
    """The mutations, to be read."""
    lines = []
    for one in mutations:
        lines += [f"{one.name}: {one.file}", f"    {one.why}"]
        lines += [f"    - {line}" for line in one.before.splitlines()]
        lines += [f"    + {line}" for line in one.after.splitlines()]
        lines += [f"    {test}" for test in one.tests]
    return "\n".join(lines)


def main(argv: list[str], mutations: Sequence[Mutation] = MUTATIONS, root: pathlib.Path = ROOT) -> int:
    """Exit status 1: one survived, or its tests gave no answer; 2: the list is stale, or the tests fail anyway."""
    parser = argparse.ArgumentParser(prog="python -m bench mutate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="NAME", help="mutations whose name contains this")
    parser.add_argument("--all", action="store_true", help="the whole suite for each, not the tests that it names")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="as many at a time, each in its own copy")
    parser.add_argument("--list", action="store_true", help="print the mutations, and run nothing")
    options = parser.parse_args(argv)
    chosen = [one for one in mutations if options.only in one.name]
    if not chosen:
        parser.error(f"--only must be part of a mutation's name, got {options.only!r}")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    if options.list:
        print(listed(chosen))
        return 0
    try:
        return report(outcomes(chosen, root, options.all, options.jobs), max(len(one.name) for one in chosen))
    except (ValueError, RuntimeError, subprocess.TimeoutExpired) as error:
        print(error, file=sys.stderr)
        return 2
