"""The pages of docs say what the commands on them print, and show pictures that are there."""

from __future__ import annotations

import pathlib
import re

import pytest

from bench import illustrate

PAGES = sorted((illustrate.ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_says_what_its_commands_print(path: pathlib.Path) -> None:
    """Where it does not: python -m bench illustrate --write."""
    assert illustrate.illustrated(path.read_text()) == path.read_text()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_what_a_page_points_to_is_there(path: pathlib.Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert target.startswith("http") or (path.parent / target).exists(), target
    for picture in re.findall(r"--plot (docs/\S+)", text):
        assert (illustrate.ROOT / picture).stat().st_size < 300_000
        assert picture.removeprefix("docs/") in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    headings = {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in text.splitlines()
                if line.startswith("#")}  # fmt: skip
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in {heading.lstrip("-") for heading in headings}


def test_lines_are_chosen_by_their_labels() -> None:
    output = "build       x\npredicted   1\n            2\n\nto know     3\nagainst     4\n  12  13\n"
    assert illustrate.chosen(output, ["predicted", "against"]) == "predicted   1\n            2\nagainst     4\n"


def test_only_known_commands_are_run() -> None:
    with pytest.raises(ValueError, match="only fa3-metadata and python -m bench are run"):
        illustrate.printed("rm -rf build", draws=False)


def test_a_page_that_says_something_else_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    block = "```\n$ fa3-metadata explain --num-heads 8 --num-heads-k 1 --headdim 128 --cache-seqlens 5 --no-check\n"
    (tmp_path / "docs" / "page.md").write_text(f"{block}lengths     wrong\n```\n<!-- shows: lengths -->\n")
    monkeypatch.setattr(illustrate, "ROOT", tmp_path)
    assert illustrate.main([]) == 1
    assert "docs/page.md does not say what its commands print" in capsys.readouterr().out
