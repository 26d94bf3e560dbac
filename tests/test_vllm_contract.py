"""The names of vLLM that the adapter leans on, checked in vLLM's wheels and in what was recorded from them.

As a script it records: `python -m tests.test_vllm_contract FOLDER` reads every vLLM wheel under FOLDER, without
importing or unpacking it, and adds what it says about scheduler metadata to tests/data/vllm_contract.json.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
from fa3_metadata.engines import vllm as adapter
from fa3_metadata.engines.source_facts import broken_facts, missing_facts, module_files, source_facts
from fa3_metadata.triton_kernels.builds import rules_for

WHEELS_VARIABLE = "FA3_METADATA_WHEELS"
RECORDED = pathlib.Path(__file__).parent / "data" / "vllm_contract.json"
MODULES = tuple(dict.fromkeys(module for leans_on in adapter.LEANS_ON.values() for module in leans_on))
FETCH = (
    "pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 "
    "-d FOLDER vllm==0.33.0"
)
# Those that import the function; `attach` has to know them all.
IMPORTERS = ["vllm.vllm_flash_attn", adapter.FA_UTILS, adapter.GQA, adapter.MLA]


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


def wheels() -> list[Wheel]:
    folder = os.environ.get(WHEELS_VARIABLE)
    return [] if not folder else [Wheel(path) for path in sorted(pathlib.Path(folder).rglob("vllm-*.whl"))]


def recorded() -> dict[str, Any]:
    return json.loads(RECORDED.read_text())


def is_supported(version: str) -> bool:
    try:
        rules_for(f"vllm-{version}")
    except ValueError:
        return False
    return True


def broken(facts: dict[str, list[str] | None]) -> list[str]:
    """What does not hold of all that the adapter leans on."""
    return [
        line
        for leans_on in adapter.LEANS_ON.values()
        for module, wanted in leans_on.items()
        for line in missing_facts(module, wanted, facts[module])
    ]


ATTACHED = ("0.32.0", "0.33.0")  # of those recorded


@pytest.mark.parametrize("version", ATTACHED)
def test_recorded_names_hold(version: str) -> None:
    record = recorded()[version]
    assert broken(record["facts"]) == []
    assert sorted(record["importers"]) == sorted(IMPORTERS)


def test_how_far_back_the_names_go() -> None:
    """For the documentation: `attach` refuses a vLLM whose names are others, though its metadata is known."""
    assert is_supported("0.20.0")
    for version, record in recorded().items():
        assert bool(broken(record["facts"])) == (version not in ATTACHED), version
    lines = broken(recorded()["0.20.0"]["facts"])
    assert any(line.startswith(f"{adapter.MLA}: expected `from {adapter.FA_UTILS} import") for line in lines)


@pytest.mark.parametrize(
    ("module", "fact"),
    [
        (module, fact)
        for leans_on in adapter.LEANS_ON.values()
        for module, facts in leans_on.items()
        for fact in facts
    ],
)  # fmt: skip
def test_a_name_that_goes_missing_is_noticed(module: str, fact: str) -> None:
    facts = recorded()["0.33.0"]["facts"]
    facts[module].remove(fact)
    lines = broken(facts)
    assert lines
    assert all(line.startswith(f"{module}: expected `{fact}`, found ") for line in lines)


def test_a_module_that_goes_missing_is_noticed() -> None:
    facts = recorded()["0.33.0"]["facts"] | {adapter.MLA: None}
    assert set(broken(facts)) == {f"{adapter.MLA}: expected this module, found none"}


SOURCE = """
from a.b import other
if True:
    from a.b import (schedule as plan, unrelated)
def schedule(q: int, *, k: "int | None" = None) -> int:
    # a comment
    return rescheduled(q,
                       k=k)
class Builder:
    async def build(self, n: int) -> int:
        self.scheduler_metadata[n:] = 0
        schedule(1); schedule(2); schedule(n=3)
        return n
"""
FACTS = [
    "from a.b import schedule as plan",
    "def schedule(q, *, k=None)",
    "schedule: 1 x rescheduled(_, k)",
    "Builder.build: self.scheduler_metadata[n:] = 0",
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
        (lambda s: s.replace("[n:]", "[n + 1:]"), FACTS[3]),
        (lambda s: s.replace("schedule(2); ", ""), FACTS[4]),
        (lambda s: s.replace("Builder", "Maker"), FACTS[5]),
    ],
)
def test_a_rename_in_a_source_is_noticed(change: Callable[[str], str], wanted: str) -> None:
    leans_on = {"a": tuple(FACTS)}
    assert broken_facts(leans_on, {"a": SOURCE}.get) == []
    assert any(line.startswith(f"a: expected `{wanted}`") for line in broken_facts(leans_on, {"a": change(SOURCE)}.get))


def test_wheels() -> None:
    found = wheels()
    if not found:
        pytest.skip(f"no vLLM wheel: set {WHEELS_VARIABLE}=FOLDER after `{FETCH}`")
    for wheel in found:
        record = wheel.record()
        if wheel.version in ATTACHED:
            assert broken(record["facts"]) == [], wheel.version
            assert sorted(record["importers"]) == sorted(IMPORTERS), wheel.version
        if wheel.version in recorded():
            assert record == recorded()[wheel.version], f"{wheel.version} is not what was recorded"


def main() -> None:
    records = recorded() if RECORDED.exists() else {}
    for path in sorted(pathlib.Path(sys.argv[1]).rglob("vllm-*.whl")):
        wheel = Wheel(path)
        records[wheel.version] = wheel.record()
        print(f"{wheel.version}: {len(broken(records[wheel.version]['facts']))} facts do not hold")
    RECORDED.write_text(json.dumps(dict(sorted(records.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
