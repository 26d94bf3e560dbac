"""What becomes of links from a page to files beside docs/, on the site (.ci/docs_hooks.py)."""

from __future__ import annotations

import importlib.util
import pathlib
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("mkdocs")
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / ".ci" / "docs_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(hooks: ModuleType, text: str, repo_url: str | None = None) -> tuple[str, list[Any]]:
    """(The text of docs/page.md on the site, files taken along)."""
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

    config, files = MkDocsConfig(), Files([])
    config.load_dict({"site_name": "x", "docs_dir": str(ROOT / "docs"), "site_dir": "site", "repo_url": repo_url})
    config.validate()
    config.plugins._current_plugin = None  # as in a build, where it is the hook's
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    return hooks.on_page_markdown(text, page=page, config=config, files=files), list(files)


@pytest.mark.parametrize(
    ("link", "plain", "linked"),
    [
        ("[x](../README.md)", "x (`README.md`)", "[x](https://a.example/r/blob/main/README.md)"),
        ("[`pyproject.toml`](../pyproject.toml)", "`pyproject.toml`", "[`pyproject.toml`](https://a.example/r/blob/main/pyproject.toml)"),
        ("[x](../bench/results/README.md#results)", "x (`bench/results/README.md`)",
         "[x](https://a.example/r/blob/main/bench/results/README.md#results)"),
    ],
)  # fmt: skip
def test_a_file_beside_docs(link: str, plain: str, linked: str, hooks: ModuleType) -> None:
    assert made(hooks, f"see {link}.") == (f"see {plain}.", [])
    assert made(hooks, f"see {link}.", "https://a.example/r/") == (f"see {linked}.", [])


@pytest.mark.parametrize("link", ["[x](api.md)", "[x](../docs/api.md)", "[x](../nowhere.md)", "[x](../../away.md)"])
def test_what_the_strict_build_has_to_judge(link: str, hooks: ModuleType) -> None:
    assert made(hooks, link) == (link, [])


def test_code_is_left_alone(hooks: ModuleType) -> None:
    text = "```\n[x](../README.md)\n```\n"
    assert made(hooks, text)[0] == text


def test_a_picture_is_taken_along(hooks: ModuleType) -> None:
    picture = next((ROOT / "docs" / "images").glob("*.png"))
    beside = ROOT / "bench" / "results" / "2026-11-24-h200" / "metadata-graph.png"
    text, files = made(hooks, f"![a](../{beside.relative_to(ROOT)}) ![b](images/{picture.name})")
    assert text == f"![a]({beside.relative_to(ROOT)}) ![b](images/{picture.name})"
    assert [file.abs_src_path for file in files] == [str(beside)]
