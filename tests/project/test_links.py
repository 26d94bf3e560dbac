"""Every relative link of every Markdown page leads to a file that is there, and to a heading of it."""

from __future__ import annotations

import pathlib
import re

import pytest

from ..helpers.markdown_links import anchors, astray, pages, targets

ROOT = pathlib.Path(__file__).parents[2]
PAGES = pages(ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    assert astray(page, ROOT) == []


def test_every_page_is_looked_at() -> None:
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/api.md", "bench/results/README.md"} <= names


def test_every_page_of_docs_has_its_place_on_the_site() -> None:
    named = re.findall(r"^ +- [^\n#]*?: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(named) == len(set(named))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(named), "the nav of mkdocs.yml"


PAGE = """# A page: `fa3-metadata explain` and `step()`

[there](sub/other.md#two-words) ![picture](a.png "title") [up](#a-page-fa3-metadata-explain-and-step)
<a id="mark"></a> [mark](#mark) [address](https://pypi.org/project/torch/) `[code](nowhere.md)`

```
[code](nowhere.md)
```

[reference]: sub/other.md#two-words-1
"""


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.md").write_text("# Two words\n\n## Two words\n[back](../page.md)\n")
    (tmp_path / "a.png").touch()
    (tmp_path / "page.md").write_text(PAGE)
    return tmp_path


def test_a_page_whose_links_are_right(folder: pathlib.Path) -> None:
    assert len(list(targets(PAGE))) == 6
    assert anchors(PAGE) == {"a-page-fa3-metadata-explain-and-step", "mark"}
    assert pages(folder) == [folder / "page.md", folder / "sub" / "other.md"]
    assert astray(folder / "page.md", folder) == astray(folder / "sub" / "other.md", folder) == []


@pytest.mark.parametrize(
    ("link", "why"),
    [
        ("[x](nowhere.md)", "nowhere.md is not there"),
        ("[x [y]](sub/nowhere.py)", "sub/nowhere.py is not there"),
        ("[![x](b.png)](page.md)", "b.png is not there"),
        ("[x](#no-heading)", "#no-heading names no heading of page.md"),
        ("[x](sub/other.md#three)", "sub/other.md#three names no heading of sub/other.md"),
        ("[x](../other.md)", "../other.md leads out of the repository"),
        ("[x](/page.md)", "'/page.md' is neither relative nor an address"),
        ("[x]()", "'' is neither relative nor an address"),
        ("[x](http:/pypi.org)", "'http:/pypi.org' is neither relative nor an address"),
        ('<img alt="x" src="c.png">', "c.png is not there"),
        ("[x]: gone.md", "gone.md is not there"),
    ],
)
def test_a_link_that_leads_nowhere(link: str, why: str, folder: pathlib.Path) -> None:
    (folder / "page.md").write_text(f"# A page\n\n{link}\n")
    assert astray(folder / "page.md", folder) == [why]
