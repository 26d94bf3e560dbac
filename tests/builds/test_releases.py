"""What is said of the supported builds, against RELEASES; and that adding a release is what its page says."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from fa3_metadata.engines.vllm_names import LAYOUTS
from fa3_metadata.triton_kernels import builds, layout
from fa3_metadata.triton_kernels.builds import RELEASES, SGLANG_0_4_5, Release, rules_for, version_key

from bench import releases
from bench.wheel_recordings import Recordings

from .test_wheel_rules import not_recorded

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
NAMED = re.compile(
    r"\b(sglang-kernel|sgl-kernel|fa3-fwd|flash-attn-3)[ -](\d+\.\d+\.\d+(?:\.post\d+)?)(?: to (\d[\w.]*\w))?"
)


def extras() -> dict[str, dict[str, str]]:
    """The optional dependencies of pyproject.toml: extra -> package -> its bounds."""
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    found = {}
    for name, wanted in re.findall(r"^([\w-]+) = \[(.*?)\]", section, re.M):
        found[name] = dict(re.findall(r'"([\w-]+)([<>=][^"]*)"', wanted))
    return found


@pytest.mark.parametrize(("page", "make"), [(releases.PAGE, releases.table), (releases.README, releases.summary)])
def test_pages_say_what_is_made_of_the_releases(page: pathlib.Path, make: Callable[[], str]) -> None:
    text = page.read_text()
    assert releases.with_made(text, make()) == text, "python -m bench releases --write"


def test_the_summary_adds_up_the_table() -> None:
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in releases.table().splitlines()[2:]]
    wheels = sum(int(row[3]) for row in rows if row[3].isdigit())
    cases = [int(count.replace(",", "")) for row in rows for count in re.findall(r": ([\d,]+?)(?:,\s|$)", row[4])]
    said = releases.summary()
    assert f"{wheels} published wheels" in said
    assert f"{sum(cases):,} calls" in said
    assert f"of {len(cases)} of them" in said
    for package in {release.package for release in RELEASES}:
        oldest, newest = releases.bounds(package)
        assert f"{package} {oldest}{f' to {newest}' if newest != oldest else ''}" in said


def test_every_release_has_evidence_in_the_table() -> None:
    rows = releases.table().splitlines()[2:]
    assert len(rows) == len(RELEASES)
    for release, row in zip(RELEASES, rows, strict=True):
        assert release.oldest in row
        assert release.rules.name in row
        assert "| 0 |" not in row, "no wheel of it was read"


@pytest.mark.parametrize("package", releases.EXTRAS)
def test_extras_allow_what_has_rules(package: str) -> None:
    ranges = [extras()[extra][package] for extra in releases.EXTRAS[package]]
    ends = [end for one in ranges for end in one.removeprefix(">=").split(",<=")]
    assert ends == sorted(ends, key=version_key)
    assert ends[-1] == releases.bounds(package)[1]
    for end in ends:
        rules_for(f"{package}-{end}")


def test_vllms_extra_allows_what_the_adapter_attaches_to() -> None:
    oldest, newest = LAYOUTS[-1].versions.split(" to ")[0], LAYOUTS[0].versions.split(" to ")[-1]
    assert extras()["vllm"]["vllm"] == f">={oldest},<={newest}"
    assert newest == releases.bounds("vllm")[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_versions_that_pages_name_have_rules(page: pathlib.Path) -> None:
    for package, first, last in NAMED.findall(page.read_text()):
        rules_for(f"{package}-{first}")
        if last:
            rules_for(f"{package}-{last}")


def test_names_are_found_in_text() -> None:
    found = NAMED.findall("sgl-kernel 0.3.16.post1 to 0.3.21, and sglang-kernel-0.4.10.")
    assert found == [("sgl-kernel", "0.3.16.post1", "0.3.21"), ("sglang-kernel", "0.4.10", "")]


def test_adding_a_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/adding-a-release.md, step by step, for a version that does not exist."""
    version, recorded = "0.4.11", Recordings.load()
    build = f"sglang-kernel-{version}"
    with pytest.raises(ValueError, match="is not supported"):
        rules_for(build)

    widened = tuple(replace(r, newest=version) if r.newest == "0.4.10" else r for r in RELEASES)  # step 2
    monkeypatch.setattr(builds, "RELEASES", widened)
    assert rules_for(build) is SGLANG_0_4_5
    assert not_recorded(widened, recorded) == [build], "red until it is recorded"

    wheels = recorded.wheels["sglang-kernel"] | {version: recorded.wheels["sglang-kernel"]["0.4.10"]}  # step 3
    recorded.wheels["sglang-kernel"] = wheels
    assert not_recorded(widened, recorded) == []

    text = releases.PAGE.read_text()  # step 5
    made = releases.table(widened, recorded)
    assert f"sglang-kernel 0.4.5 to {version} | sglang-0.4.5 | yes | 8 |" in made
    assert releases.with_made(text, made) != text, "red until the table is made anew"
    assert f"sglang-kernel 0.4.0 to {version}" in releases.summary(widened, recorded)
    assert releases.bounds("sglang-kernel", widened)[1] not in extras()["sglang-kernel"]["sglang-kernel"], (
        "red until it says so"
    )


def test_a_release_with_rules_of_its_own() -> None:
    """Step 2 where something differs: one entry, and the layout follows."""
    rules = replace(SGLANG_0_4_5, name="sglang-0.5", rows=(("num_splits_dynamic", "always"),), semaphore_first=True)
    release = Release("sglang-kernel", "0.5.0", "0.5.0", rules)
    assert version_key(release.oldest) > version_key(RELEASES[5].newest)
    with pytest.raises(ValueError, match=r"must be in layout\.ROWS"):
        replace(rules, rows=(*rules.rows, ("num_of_something", "always")))
    assert set(layout.ROWS) >= {row for row, _ in rules.rows}


def test_a_table_without_its_place_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no"):
        releases.with_made("# A page", releases.table())
