"""The names of vLLM that the adapter leans on, checked in vLLM's wheels and in what was recorded from them.

    FA3_METADATA_WHEELS=index python -m pytest tests/engines/test_vllm_contract.py  # those of VERSIONS, from pip
    FA3_METADATA_WHEELS=FOLDER python -m pytest tests/engines/test_vllm_contract.py  # every vLLM wheel under FOLDER

As a script it records: `python -m tests.engines.test_vllm_contract [FOLDER]` reads the same wheels, one at a time,
without importing or unpacking them, and adds what they say about scheduler metadata to tests/data/vllm_contract.json.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata.engines import vllm as adapter
from fa3_metadata.engines.source_facts import missing_facts, module_files, source_facts
from fa3_metadata.engines.vllm_forward import with_metadata, with_steps
from fa3_metadata.engines.vllm_groups import RUNNER, built_together
from fa3_metadata.engines.vllm_names import CASCADE, FORWARD, LAYOUTS, MLA_SPARSE, PACKAGE, Facts, layout_of
from fa3_metadata.engines.vllm_reach import NONE, OURS, SITES, THEIRS, coverage_table, reach
from fa3_metadata.installed import BUILD_VARIABLE
from fa3_metadata.triton_kernels.builds import rules_for

from ..helpers.vllm_wheel_builders import check_builders, check_groups, check_mla_builders, load, load_mla
from ..helpers.vllm_wheel_layers import DIM, HEADS, WheelLayers

WHEELS_VARIABLE = "FA3_METADATA_WHEELS"
RECORDED = pathlib.Path(__file__).parents[1] / "data" / "vllm_contract.json"
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "vllm.md"
MODULES = (*dict.fromkeys(module for layout in LAYOUTS for module in layout.attach()), MLA_SPARSE)
# The first and the last of each range that the adapter knows, and the last before them.
VERSIONS = ("0.16.0", *(version for layout in reversed(LAYOUTS) for version in layout.versions.split(" to ")))
_DOWNLOAD = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
_DOWNLOAD += ["--python-version=3.12", "--implementation=cp"]
_DOWNLOAD += [f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 31, 35)] + ["--platform=manylinux1_x86_64"]
# Those that import the maker.
IMPORTERS = [PACKAGE, adapter.FA_UTILS, adapter.GQA, adapter.MLA]


class Wheel:
    """A vLLM wheel, read in place."""

    def __init__(self, path: pathlib.Path) -> None:
        self.version = path.name.split("-")[1]
        self._zip = zipfile.ZipFile(path)
        self._names = set(self._zip.namelist())

    def source(self, module: str) -> str | None:
        """The source of a module, or None."""
        found = [path for path in module_files(module.split(".")) if path in self._names]
        return self._zip.read(found[0]).decode() if found else None

    def importers(self) -> list[str]:
        """All modules that import a function of this name from another one of vLLM's."""
        importers = []
        for path in sorted(self._names):
            if path.endswith(".py") and adapter.NAME.encode() in (source := self._zip.read(path)):
                facts = source_facts(source.decode())
                if any(fact.startswith("from vllm.") and fact.endswith(f" import {adapter.NAME}") for fact in facts):
                    importers.append(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        return importers

    def record(self) -> dict[str, Any]:
        sources = {module: self.source(module) for module in MODULES}
        facts = {module: None if source is None else source_facts(source) for module, source in sources.items()}
        return {"importers": self.importers(), "facts": facts}


def wheels(where: str | None) -> Iterator[Wheel]:
    """Of a folder, or those of VERSIONS, fetched one at a time ("index")."""
    if where == "index":
        for version in VERSIONS:
            with TemporaryDirectory(prefix="vllm-contract-") as folder:
                subprocess.run([*_DOWNLOAD, "-d", folder, f"vllm=={version}"], check=True)
                yield from wheels(folder)
    elif where:
        yield from (Wheel(path) for path in sorted(pathlib.Path(where).rglob("vllm-*.whl")))


def recorded() -> dict[str, Any]:
    return json.loads(RECORDED.read_text())


def is_attached_to(version: str) -> bool:
    return version != "0.16.0"


def broken(facts: dict[str, list[str] | None], in_place: bool = True) -> list[str]:
    """What does not hold of all that the adapter leans on."""
    return layout_of(facts.get, in_place)[1]


@pytest.mark.parametrize("version", [version for version in VERSIONS if is_attached_to(version)])
def test_recorded_names_hold(version: str) -> None:
    record = recorded()[version]
    layout, lines = layout_of(record["facts"].get, True)
    assert lines == []
    assert version in layout.versions.split(" to ")
    assert sorted(record["importers"]) == sorted(IMPORTERS)
    assert adapter.why_not(record["facts"].get, f"vllm-{version}", True) == (layout, None)


def test_how_far_back_the_names_go() -> None:
    """`attach` refuses a vLLM whose names are others, though its metadata is known."""
    assert rules_for("vllm-0.16.0")
    assert set(recorded()) == set(VERSIONS)
    layout, reason = adapter.why_not(recorded()["0.16.0"]["facts"].get, "vllm-0.16.0")
    assert reason is not None
    assert reason.startswith(f"vLLM is not laid out as expected (nearest: {layout.versions}); nothing was changed:\n")
    assert layout.versions == "0.17.0 to 0.24.0"


def every_fact() -> Iterator[tuple[int, str, str]]:
    for i, layout in enumerate(LAYOUTS):
        parts: tuple[Facts, Facts] = layout.attach(), layout.in_place()
        yield from ((i, module, fact) for part in parts for module, facts in part.items() for fact in facts)


@pytest.mark.parametrize(("layout", "module", "fact"), list(every_fact()))
def test_a_name_that_goes_missing_is_noticed(layout: int, module: str, fact: str) -> None:
    facts = recorded()[LAYOUTS[layout].versions.split(" to ")[1]]["facts"]
    facts[module].remove(fact)
    lines = LAYOUTS[layout].broken(facts.get, in_place=True)
    assert lines
    assert all(line.startswith(f"{module}: expected `{fact}`, found ") for line in lines)
    assert broken(facts), "nor does another layout fit"


def test_a_module_that_goes_missing_is_noticed() -> None:
    facts = recorded()["0.33.0"]["facts"] | {adapter.MLA: None}
    assert set(broken(facts)) == {f"{adapter.MLA}: expected this module, found none"}


def test_the_page_says_what_is_reached() -> None:
    newest = VERSIONS[-1]
    table = coverage_table(reach(recorded()[newest]["facts"].get, f"vllm-{newest}"))
    assert table in PAGE.read_text(), "python -m fa3_metadata.engines.vllm_reach prints it"


@pytest.mark.parametrize("version", VERSIONS)
def test_reach(version: str) -> None:
    facts = recorded()[version]["facts"]
    reached = {one.layers: one for one in reach(facts.get, f"vllm-{version}")}
    assert list(reached) == [site.layers for site in SITES]
    for site in SITES:
        one = reached[site.layers]
        if facts[site.module] is None and not is_attached_to(version):
            assert (one.in_graph, one.eagerly) == (NONE, NONE)
        elif facts[site.module] is None or site.fact not in facts[site.module]:
            assert (one.in_graph, one.eagerly, one.because) == (NONE, NONE, "this vLLM has no such layers")
        elif is_attached_to(version):
            assert (one.in_graph, one.eagerly, one.because) == (site.in_graph, site.eagerly, site.because)
        else:
            assert (one.in_graph, one.eagerly) == (site.theirs, site.theirs)
    assert reached["MLA decode"].in_graph == (OURS if is_attached_to(version) else THEIRS)
    absent = [one.layers.split(" ")[0] for one in reached.values() if one.because == "this vLLM has no such layers"]
    since = tuple(map(int, version.split(".")))
    assert absent == ["sparse"] * (since < (0, 25)) + ["cascade"] * (since > (0, 31, 9)) or version == "0.16.0"


def test_reach_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FA3_METADATA_BUILD", raising=False)
    monkeypatch.setattr(adapter, "_vllm_version", {}.get)
    assert {(one.in_graph, one.eagerly) for one in reach({}.get)} == {(NONE, NONE)}
    assert all(one.because.startswith("vLLM is not installed") for one in reach({}.get))


def test_reach_of_a_version_that_is_not_known() -> None:
    reached = reach(recorded()["0.33.0"]["facts"].get, "vllm-0.99.0")
    assert {one.in_graph for one in reached} == {THEIRS, NONE}
    assert all("cannot attach to this vLLM" in one.because for one in reached if one.in_graph == THEIRS)


SOURCE = """
from a.b import other
if True:
    from a.b import (schedule as plan, unrelated)
def schedule(q: int, *, k: "int | None" = None) -> int:
    # a comment
    return rescheduled(q,
                       k=k)
def set_forward_context(attn_metadata: dict, *, more=()):
    pass
class Builder:
    async def build(self, n: int) -> int:
        if self.aot_sliding_window is None and n:
            f(window=self.aot_sliding_window)
        self.scheduler_metadata[n:] = 0
        schedule(1); schedule(2); schedule(n=3)
        return n
"""
FACTS = [
    "from a.b import schedule as plan",
    "def schedule(q, *, k=None)",
    "schedule: 1 x rescheduled(_, k)",
    "set_forward_context takes attn_metadata",
    "set_forward_context takes more",
    "Builder.build: if self.aot_sliding_window is None and n",
    "Builder.build: self.scheduler_metadata[n:] = 0",
    "Builder.build: window=self.aot_sliding_window",
    "Builder.build: 2 x schedule(_)",
    "Builder.build: 1 x schedule(n)",
]


def test_facts_of_a_source() -> None:
    assert source_facts(SOURCE) == FACTS


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda s: s.replace("schedule as plan", "unrelated"), FACTS[0]),
        (lambda s: s.replace("k: ", "keys: "), FACTS[1]),
        (lambda s: s.replace("= None) ->", "= 1) ->"), FACTS[1]),
        (lambda s: s.replace("k=k", "keys=k"), FACTS[2]),
        (lambda s: s.replace("attn_metadata", "metadata"), FACTS[3]),
        (lambda s: s.replace("is None and n", "is None"), FACTS[5]),
        (lambda s: s.replace("[n:]", "[n + 1:]"), FACTS[6]),
        (lambda s: s.replace("schedule(2); ", ""), FACTS[8]),
        (lambda s: s.replace("Builder", "Maker"), FACTS[9]),
    ],
)
def test_a_rename_in_a_source_is_noticed(change: Callable[[str], str], wanted: str) -> None:
    assert missing_facts("a", tuple(FACTS), source_facts(SOURCE)) == []
    lines = missing_facts("a", tuple(FACTS), source_facts(change(SOURCE)))
    assert any(line.startswith(f"a: expected `{wanted}`") for line in lines)


def test_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (where := os.environ.get(WHEELS_VARIABLE)):
        pytest.skip(f"no wheel of vllm: set {WHEELS_VARIABLE}=index, or to a folder of wheels")
    for wheel in wheels(where):
        record = wheel.record()
        if adapter.why_not(record["facts"].get, f"vllm-{wheel.version}")[1] is None:
            assert broken(record["facts"]) == [], wheel.version
            assert sorted(record["importers"]) == sorted(IMPORTERS), wheel.version
            for in_place in (False, True):
                run_builders(wheel, record, in_place, monkeypatch)
            run_layers(wheel, monkeypatch)
        if wheel.version in recorded():
            assert record == recorded()[wheel.version], f"{wheel.version} is not what was recorded"


def run_builders(wheel: Wheel, record: dict[str, Any], in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own builders on CPU, with the adapter."""
    build = f"vllm-{wheel.version}"
    monkeypatch.setenv(BUILD_VARIABLE, build)
    for name in (adapter.GQA, adapter.MLA):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # put back at the end
    attached = adapter.Attached(build, in_place)
    attached._wraps = adapter._wraps(layout_of(record["facts"].get)[0], in_place)
    monkeypatch.setattr(adapter, "_attached", attached)
    module = load(wheel.source(adapter.GQA) or "")
    mla = load_mla(wheel.source(adapter.MLA) or "")
    attached.catch_up()
    check_mla_builders(mla)
    check_builders(module, CASCADE in record["facts"][adapter.GQA])
    check_groups(wheel.source(RUNNER) or "", module, built_together)


@contextmanager
def _entered(attn_metadata: Any) -> Iterator[None]:
    yield


def run_layers(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own layers on CPU, in a group that mixes windows, for which vLLM makes no metadata."""
    build, windows = f"vllm-{wheel.version}", ((-1, -1), (127, 0), (-1, -1), (127, 0))
    own = WheelLayers(wheel.source(adapter.GQA) or "", build, windows, monkeypatch)
    own.names[FORWARD] = with_metadata(own.names[FORWARD], build, "fa3", lambda: None)
    enter = with_steps(_entered, lambda: None)
    batch = own.batch([300, 45, 4000])
    for longer in (0, 16):
        batch.seq_lens.add_(longer)
        batch.max_seq_len += longer
        with enter({f"layers.{i}": batch for i in range(len(windows))}):
            calls = own.run(batch)
        for call, window in zip(calls, windows, strict=True):
            assert call["window_size"] == list(window), wheel.version
            wanted = fa3_metadata.get_scheduler_metadata(
                3, 1, batch.max_seq_len, *HEADS, DIM, batch.seq_lens, cu_seqlens_q=batch.query_start_loc,
                page_size=16, causal=True, window_size=window, build=build,
            )  # fmt: skip
            assert torch.equal(call["scheduler_metadata"], wanted), wheel.version
        for i in (0, 1):
            assert calls[i]["scheduler_metadata"] is calls[i + 2]["scheduler_metadata"], wheel.version


def main() -> None:
    records = {}
    for wheel in wheels(sys.argv[1] if len(sys.argv) > 1 else "index"):
        records[wheel.version] = wheel.record()
        print(f"{wheel.version}: {len(broken(records[wheel.version]['facts']))} facts do not hold")
    RECORDED.write_text(json.dumps({version: records[version] for version in VERSIONS}, indent=1) + "\n")


if __name__ == "__main__":
    main()
