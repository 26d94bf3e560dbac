"""The names that the SGLang adapter leans on are in the published sglang wheels.

The wheels are read, never imported. What was found in them is recorded in tests/data/sglang_contract.json, so that a
change of the adapter is checked without them; with FA3_METADATA_WHEELS naming a folder of wheels, they are read again
and must say the same. To fetch them, and to record anew:

    pip download --no-deps --only-binary=:all: -d FOLDER sglang==0.5.7    # and so on: VERSIONS
    python -m tests.test_sglang_contract FOLDER
"""

from __future__ import annotations

import ast
import copy
import json
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fa3_metadata.engines.sglang import LAYOUTS, SGLangNames

VARIABLE = "FA3_METADATA_WHEELS"
RECORD = Path(__file__).parent / "data" / "sglang_contract.json"
# Version -> its entry of LAYOUTS: the oldest supported, the one on each side of every change, and the newest.
VERSIONS = {
    "0.5.7": LAYOUTS[3],
    "0.5.8.post1": LAYOUTS[3],
    "0.5.9": LAYOUTS[2],
    "0.5.10.post1": LAYOUTS[1],
    "0.5.11": LAYOUTS[0],
    "0.5.23": LAYOUTS[0],
}
Facts = dict[str, Any]


def read_wheel(wheel: Path) -> Facts:
    """What a wheel says about everything in `SGLangNames`; sorted lists of names."""
    names = LAYOUTS[0]
    with zipfile.ZipFile(wheel) as archive:
        module = _parse(archive, names.module)
        requirements = _requirements(archive)
        setting = next(layout.setting for layout in LAYOUTS if layout.setting)
        settings = _parse(archive, setting[0])
        callee = _imported_from(module, "flash_attn_with_kvcache")
        in_wheel = callee is not None and callee.replace(".", "/") + ".py" in archive.namelist()
        callee_parameters = (
            _parameters(_child(_parse(archive, callee), "flash_attn_with_kvcache")) if in_wheel and callee else None
        )
    backend, metadata = _child(module, names.backend), _child(module, names.metadata)
    methods = {node.name: node for node in backend.body if isinstance(node, ast.FunctionDef)}
    leaned_on = {name for layout in LAYOUTS for name in layout.methods}
    return {
        "requires": requirements,
        "module": sorted(_bound_names(module)),
        "self": sorted(_assigned_to_self(backend)),
        "methods": {name: _parameters(node) for name, node in sorted(methods.items()) if name in leaned_on},
        "metadata_fields": sorted(
            node.target.id
            for node in metadata.body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None
        ),
        "forward_keywords": sorted(_keywords(methods["forward_decode"], "flash_attn_with_kvcache")),
        "forward_found_at": _where_decode_finds_the_forward(methods["forward_decode"]),
        "forward_imported_from": callee,
        "forward_parameters": callee_parameters,
        "maker_keywords": sorted(_keywords(backend, "_get_scheduler_metadata")),
        "makers_answer_may_be_none": _answers_are_tested(backend, "_compute_scheduler_metadata", "scheduler_metadata"),
        "settings": sorted(name for name in [setting[1]] if name in ast.dump(settings)),
    }


def lacking(names: SGLangNames, facts: Facts) -> list[str]:
    """What `facts` lack of `names`, in words."""
    has_method = facts["methods"]
    missing = [name for name in (names.marker, *names.wrapped) if name.split(".")[1] not in facts[name.split(".")[0]]]
    missing += [f"self.{name}" for name in names.attributes if name not in facts["self"]]
    for method, parameters in names.methods.items():
        if has_method.get(method) != list(parameters):
            missing.append(f"{method}({', '.join(parameters)})")
    missing += [f"{names.metadata}.{name}" for name in names.metadata_fields if name not in facts["metadata_fields"]]
    missing += [f"forward({name}=)" for name in names.forward_keywords if name not in facts["forward_keywords"]]
    if (found_at := facts["forward_found_at"]) not in names.wrapped:
        missing.append(f"forward_decode calling {' or '.join(names.wrapped)}, not {found_at}")
    if facts["forward_parameters"] is not None:
        wanted = {*names.forward_keywords, "scheduler_metadata", "pack_gqa"}
        missing += [f"parameter {name} of the forward" for name in sorted(wanted - set(facts["forward_parameters"]))]
    if unknown := set(facts["maker_keywords"]) ^ set(names.maker_keywords):
        missing.append(f"the maker's keywords: {', '.join(sorted(unknown))} differ")
    if names.makers_answer_may_be_none and not facts["makers_answer_may_be_none"]:
        missing.append("a test of the maker's answer for None")
    if names.setting and names.setting[1] not in facts["settings"]:
        missing.append(names.setting[1])
    return missing


def _parse(archive: zipfile.ZipFile, module: str) -> ast.Module:
    return ast.parse(archive.read(module.replace(".", "/") + ".py"))


def _requirements(archive: zipfile.ZipFile) -> list[str]:
    path = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = archive.read(path).decode().splitlines()
    requires = (line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: "))
    return sorted(line for line in requires if line.startswith(("sgl-kernel", "sglang-kernel")))


def _child(module: ast.Module, name: str) -> Any:
    for node in module.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
    raise LookupError(f"no {name} at the top level of the module")


def _parameters(function: Any) -> list[str]:
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name != "self"]


def _bound_names(module: ast.Module) -> Iterator[str]:
    """Names of forwards that the module binds at its top level; the others are of no interest."""
    for node in module.body:
        if isinstance(node, ast.ImportFrom):
            bound = [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Assign):
            bound = [target.id for target in node.targets if isinstance(target, ast.Name)]
        else:
            continue
        yield from (name for name in set(bound) if name.startswith("flash_attn_"))


def _imported_from(module: ast.Module, name: str) -> str | None:
    for node in module.body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return node.module
    return None


def _assigned_to_self(backend: ast.ClassDef) -> set[str]:
    """Of the attributes that the class sets on itself, those in LAYOUTS."""
    wanted = {name for layout in LAYOUTS for name in layout.attributes}
    found = set()
    for node in ast.walk(backend):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
                found.add(target.attr)
    return found & wanted


def _calls(node: ast.AST, name: str) -> Iterator[ast.Call]:
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and name in (getattr(call.func, "id", None), getattr(call.func, "attr", None)):
            yield call


def _keywords(node: ast.AST, name: str) -> set[str]:
    return {keyword.arg for call in _calls(node, name) for keyword in call.keywords if keyword.arg}


def _where_decode_finds_the_forward(forward_decode: ast.FunctionDef) -> str:
    """ "self.NAME" where the layer takes it from the backend first, else "module.NAME"."""
    name = "flash_attn_with_kvcache"
    for node in ast.walk(forward_decode):
        if isinstance(node, ast.Assign) and name in [getattr(target, "id", None) for target in node.targets]:
            return ast.unparse(node.value)
    return f"module.{name}"


def _answers_are_tested(backend: ast.ClassDef, maker: str, field: str) -> bool:
    """Every answer of `maker` goes straight into `field`, or into a name that is compared with None."""
    assigned = [node for node in ast.walk(backend) if isinstance(node, ast.Assign) and any(_calls(node.value, maker))]
    tested = {
        node.left.id
        for node in ast.walk(backend)
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and isinstance(node.ops[0], ast.IsNot)
    }
    targets = [node.targets[0] for node in assigned]
    return bool(targets) and all(getattr(t, "attr", None) == field or getattr(t, "id", None) in tested for t in targets)


def _recorded() -> dict[str, Facts]:
    return json.loads(RECORD.read_text())


def _wheel(folder: Path, version: str) -> Path | None:
    return next(iter(sorted(folder.glob(f"sglang-{version}-*.whl"))), None)


@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_names(version: str) -> None:
    assert lacking(VERSIONS[version], _recorded()[version]) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_published_wheel(version: str) -> None:
    folder = os.environ.get(VARIABLE)
    wheel = _wheel(Path(folder), version) if folder else None
    if wheel is None:
        pytest.skip(
            f"no sglang-{version} wheel: pip download --no-deps --only-binary=:all: -d FOLDER sglang=={version}, "
            f"then set {VARIABLE}=FOLDER"
        )
    facts = read_wheel(wheel)
    assert lacking(VERSIONS[version], facts) == []
    assert facts == _recorded()[version], "record anew: python -m tests.test_sglang_contract FOLDER"


def test_marker_tells_layouts_apart() -> None:
    """The adapter takes the first layout whose marker a backend has; that must be the right one in every version."""
    for version, names in VERSIONS.items():
        facts = _recorded()[version]
        place = [layout.marker.split(".") for layout in LAYOUTS]
        first = next(layout for layout, (owner, name) in zip(LAYOUTS, place, strict=True) if name in facts[owner])
        assert first is names, version


def _removals(names: SGLangNames) -> list[tuple[str, str]]:
    """(kind of fact, name) of everything that a rename could take away."""
    removals = [(owner, name) for owner, name in (place.split(".") for place in (names.marker, *names.wrapped))]
    removals += [("self", name) for name in names.attributes]
    removals += [("methods", name) for name in names.methods]
    removals += [("metadata_fields", name) for name in names.metadata_fields]
    removals += [("forward_keywords", name) for name in names.forward_keywords]
    removals += [("maker_keywords", name) for name in names.maker_keywords]
    return removals + ([("settings", names.setting[1])] if names.setting else [])


@pytest.mark.parametrize(
    ("version", "kind", "name"),
    [(version, *removal) for version in VERSIONS for removal in _removals(VERSIONS[version])],
)
def test_a_rename_is_noticed(version: str, kind: str, name: str) -> None:
    facts = copy.deepcopy(_recorded()[version])
    if kind == "methods":
        facts[kind]["renamed"] = facts[kind].pop(name)
    else:
        facts[kind] = ["renamed" if found == name else found for found in facts[kind]]
    assert any(name in words for words in lacking(VERSIONS[version], facts))


def test_other_changes_are_noticed() -> None:
    facts = _recorded()["0.5.23"]
    names = VERSIONS["0.5.23"]
    for change in (
        {"makers_answer_may_be_none": False},
        {"forward_found_at": "self.flash_attn_with_kvcache"},
        {"maker_keywords": [*facts["maker_keywords"], "window_size"]},
        {"forward_parameters": ["q"]},
        {"methods": facts["methods"] | {"init_forward_metadata": ["batch", "extra"]}},
    ):
        assert len(lacking(names, facts | change)) >= 1, change


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    wheels = {version: _wheel(folder, version) for version in VERSIONS}
    if absent := [version for version, wheel in wheels.items() if wheel is None]:
        sys.exit(f"no wheel of sglang {', '.join(absent)} in {folder}")
    record = {version: read_wheel(wheel) for version, wheel in wheels.items() if wheel is not None}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
