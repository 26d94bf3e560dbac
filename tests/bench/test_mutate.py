"""python -m bench mutate: its list fits the code, and a survivor, a red one and a stale list are told apart."""

from __future__ import annotations

import pathlib
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from bench import mutate
from bench.mutations import MUTATIONS, Mutation


def test_the_list_fits_the_code() -> None:
    """Every text is in its file once, and every test is there. Where the code has moved, the list must, too."""
    stale = {one.name: reason for one in MUTATIONS if (reason := mutate.stale_reason(one, mutate.ROOT)) is not None}
    assert not stale
    assert [name for name, times in Counter(one.name for one in MUTATIONS).items() if times > 1] == []


def test_important_files_are_in_the_list() -> None:
    """Those whose breaks are silent: a schedule that is read as garbage, or out of bounds."""
    files = Counter(one.file for one in MUTATIONS)
    for file in ("triton_kernels/plan.py", "triton_kernels/builds.py", "triton_kernels/blocks.py",
                 "integration/wrapper.py", "integration/calls.py"):  # fmt: skip
        assert files[file] >= 4


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    """A project of one line, half of which is tested."""
    root = tmp_path / "project"
    files = {
        "integration/__init__.py": "",
        "triton_kernels/__init__.py": "",
        "triton_kernels/sums.py": "def both(a, b):\n    return a + b, a - b\n",
        "tests/test_sums.py": "from fa3_metadata.triton_kernels.sums import both\n\n\n"
        "def test_sum():\n    assert both(2, 3)[0] == 5\n",
        "tests/bench/test_mutate.py": "def test_that_would_be_red_whatever_is_broken():\n    assert False\n",
        ".gitignore": "left_out/\n",
        "left_out/large.bin": "",
    }
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


NOTICED = Mutation("sum", "triton_kernels/sums.py", "a + b", "a * b", "no sum", ("tests/test_sums.py::test_sum",))
SURVIVES = replace(NOTICED, name="difference", before="a - b", after="b - a", why="no difference")


def contents(root: pathlib.Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("more", [[], ["--jobs", "2", "--all"]], ids=["named tests", "whole suite"])
def test_a_survivor_is_told_from_a_red_one(
    more: list[str], tree: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(tree)
    assert mutate.main(more, [SURVIVES, NOTICED], tree) == 1
    header, first, second, *rest = capsys.readouterr().out.splitlines()
    assert header.split() == ["mutation", "result", "seconds"]
    assert first.split()[:2] == ["difference", "survived"]
    assert second.split()[:2] == ["sum", "red"]
    assert "difference survived: triton_kernels/sums.py, no difference" in rest
    assert contents(tree) == before, "breaks are made in a copy"
    assert mutate.main([*more, "--only", "su"], [SURVIVES, NOTICED], tree) == 0
    assert "difference" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"before": "a / b"}, "triton_kernels/sums.py has the text 0 times, not once: 'a / b'"),
        ({"before": "a"}, "triton_kernels/sums.py has the text 3 times, not once: 'a'"),
        ({"file": "triton_kernels/gone.py"}, "there is no triton_kernels/gone.py"),
        ({"after": "a - b"}, "it changes nothing"),
        ({"after": "a +"}, "triton_kernels/sums.py would not compile"),
        ({"tests": ()}, "it names no tests"),
        ({"tests": ("tests/test_gone.py",)}, "there is no tests/test_gone.py"),
        ({"tests": ("tests/test_sums.py::test_su",)}, "tests/test_sums.py has no test_su"),
    ],
)
def test_a_stale_list_is_refused_before_anything_runs(
    change: dict[str, Any], reason: str, tree: pathlib.Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(mutate, "Tree", None)
    assert mutate.main([], [NOTICED, replace(SURVIVES, **change)], tree) == 2
    said = capsys.readouterr().err
    assert said.startswith("the list of mutations must fit the code, and does not:\ndifference: ")
    assert reason in said


def test_a_break_that_stops_the_import_is_no_answer(tree: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any test would be red then."""
    gone = replace(NOTICED, before="def both", after="def neither")
    assert mutate.main([], [gone], tree) == 1
    assert "sum no answer" in capsys.readouterr().out


def test_a_break_that_crashes_the_tests_is_noticed(tree: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As one that writes past the end of a tensor may, in Triton's interpreter."""
    crash = replace(NOTICED, before="a + b", after="__import__('os').abort()")
    assert mutate.main([], [crash], tree) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["sum", "red"]


def test_tests_that_fail_anyway_say_nothing(tree: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "tests" / "test_sums.py").write_text("def test_sum():\n    assert False\n")
    assert mutate.main([], [NOTICED], tree) == 2
    assert "the tests must pass before anything is broken" in capsys.readouterr().err


def test_a_copy_whose_package_is_another_is_refused(tree: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """An installed one, say, which the breaks do not reach."""
    copy = mutate.Tree(tree, tmp_path)
    copy.check()
    assert not (copy.folder / "left_out").exists()
    (tmp_path / "imported" / "fa3_metadata" / "triton_kernels").unlink()
    with pytest.raises(RuntimeError, match="fa3_metadata must be imported from"):
        copy.check()


def test_the_list_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutate.main(["--list", "--only", "diff"], [NOTICED, SURVIVES]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "difference: triton_kernels/sums.py", "    no difference", "    - a - b", "    + b - a",
        "    tests/test_sums.py::test_sum",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--only", "no such"], "must be part of a mutation's name, got 'no such'"), (["--jobs", "0"], "at least 1")],
)
def test_mistakes_end_in_exit_code_2(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        mutate.main(arguments, [NOTICED])
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
