"""The names that the SGLang adapter leans on are in the published sglang wheels.

The wheels are read, never imported. What was found in them is recorded in tests/data/sglang_contract.json, so that a
change of the adapter is checked without them; with FA3_METADATA_WHEELS they are read again and must say the same:

    FA3_METADATA_WHEELS=index python -m pytest tests/engines/test_sglang_contract.py  # those of VERSIONS, from pip
    FA3_METADATA_WHEELS=FOLDER python -m pytest tests/engines/test_sglang_contract.py  # those that FOLDER has

As a script it records anew: `python -m tests.engines.test_sglang_contract [FOLDER]`.
"""

from __future__ import annotations

import ast
import copy
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fa3_metadata import step, wrap_forward
from fa3_metadata.engines import sglang_reach
from fa3_metadata.engines.reach import NONE, THEIRS, coverage_table
from fa3_metadata.engines.sglang_names import ALL_LAYOUTS, FORWARD, LAYOUTS, SGLangNames
from fa3_metadata.engines.sglang_replays import PREPARES

from ..helpers.published import published_wheel, wheel_or_skip, why_no_wheel

RECORD = Path(__file__).parents[1] / "data" / "sglang_contract.json"
PAGE = Path(__file__).parents[2] / "docs" / "sglang.md"
# The first and the last of each range.
VERSIONS = (
    "0.5.7", "0.5.8.post1", "0.5.9", "0.5.10.post1", "0.5.11", "0.5.12", "0.5.13", "0.5.19", "0.5.23",
)  # fmt: skip
OTHER_PLATFORMS = ("xpu_backend", "hardware_backend")
Facts = dict[str, Any]


def layouts_of(version: str) -> list[SGLangNames]:
    return [names for names in ALL_LAYOUTS if names.covers(version)]


CASES = [(version, names) for version in VERSIONS for names in layouts_of(version)]
IDS = [f"{version}-{names.backend}" for version, names in CASES]


def read_wheel(wheel: Path) -> Facts:
    """What a wheel says about every backend in ALL_LAYOUTS that it has, and who else calls the forward."""
    with zipfile.ZipFile(wheel) as archive:
        present = {
            names.backend: names for names in reversed(ALL_LAYOUTS)
            if _path(names.module) in archive.namelist() and _child(_parse(archive, names.module), names.backend)
        }  # fmt: skip
        setting = next(layout.setting for layout in LAYOUTS if layout.setting)
        return {
            "requires": _requirements(archive),
            "settings": sorted(name for name in [setting[1]] if name in ast.dump(_parse(archive, setting[0]))),
            "callers": _callers(archive),
            "backends": {names.backend: _read_backend(archive, names) for names in present.values()},
        }


def _read_backend(archive: zipfile.ZipFile, names: SGLangNames) -> Facts:
    module, where = _parse(archive, names.module), _parse(archive, names.where)
    callee = _imported_from(where, FORWARD)
    in_wheel = callee is not None and _path(callee) in archive.namelist()
    backend, metadata = _child(module, names.backend), _child(module, names.metadata)
    methods = {node.name: node for node in backend.body if isinstance(node, ast.FunctionDef)}
    leaned_on = {name for layout in ALL_LAYOUTS for name in layout.methods}
    caller = _method(where, names)
    return {
        "module": sorted(_bound_names(where)),
        "self": sorted(_assigned_to_self(backend)),
        "methods": {name: _parameters(node) for name, node in sorted(methods.items()) if name in leaned_on},
        "metadata_is_new": _makes_metadata(methods["init_forward_metadata"], names.metadata),
        "metadata_fields": sorted(
            node.target.id
            for node in (metadata.body if metadata else ())
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None
        ),
        "forward_keywords": sorted(_keywords(caller, FORWARD)) if caller else [],
        "forward_found_at": _where_a_layer_finds_the_forward(caller) if caller else None,
        "forward_imported_from": callee,
        "forward_parameters": _parameters(_child(_parse(archive, callee), FORWARD)) if in_wheel and callee else None,
        "maker_keywords": sorted(_keywords(backend, "_get_scheduler_metadata")),
        "makers_answer_may_be_none": _answers_are_tested(backend, "_compute_scheduler_metadata", "scheduler_metadata"),
    }


def lacking(names: SGLangNames, wheel: Facts) -> list[str]:
    """What the facts of a wheel lack of `names`, in words."""
    facts = wheel["backends"][names.backend]
    has_method = facts["methods"]
    missing = [name for name in (names.marker, *names.wrapped) if name.split(".")[1] not in facts[name.split(".")[0]]]
    missing += [f"self.{name}" for name in names.attributes if name not in facts["self"]]
    for method, parameters in names.methods.items():
        if has_method.get(method, [])[: len(parameters)] != list(parameters):
            missing.append(f"{method}({', '.join(parameters)})")
    if not facts["metadata_is_new"]:
        missing.append(f"init_forward_metadata making a new {names.metadata}")
    missing += [f"{names.metadata}.{name}" for name in names.metadata_fields if name not in facts["metadata_fields"]]
    missing += [f"forward({name}=)" for name in names.forward_keywords if name not in facts["forward_keywords"]]
    if (found_at := facts["forward_found_at"]) not in names.wrapped:
        missing.append(f"{names.forward_called_in} calling {' or '.join(names.wrapped)}, not {found_at}")
    if facts["forward_parameters"] is not None:
        wanted = {*names.forward_keywords, "scheduler_metadata", "pack_gqa"}
        missing += [f"parameter {name} of the forward" for name in sorted(wanted - set(facts["forward_parameters"]))]
    if unknown := set(facts["maker_keywords"]) ^ set(names.maker_keywords):
        missing.append(f"the maker's keywords: {', '.join(sorted(unknown))} differ")
    if names.makers_answer_may_be_none and not facts["makers_answer_may_be_none"]:
        missing.append("a test of the maker's answer for None")
    if names.setting and names.setting[1] not in wheel["settings"]:
        missing.append(names.setting[1])
    return missing


def _path(module: str) -> str:
    return module.replace(".", "/") + ".py"


def _parse(archive: zipfile.ZipFile, module: str) -> ast.Module:
    return ast.parse(archive.read(_path(module)))


def _callers(archive: zipfile.ZipFile) -> dict[str, list[str]]:
    """Modules of SGLang's server -> who in them calls FA3's forward."""
    found = {}
    for path in sorted(archive.namelist()):
        is_ours = path.startswith("sglang/srt/") and path.endswith(".py")
        if not is_ours or any(part in path for part in OTHER_PLATFORMS) or FORWARD.encode() not in archive.read(path):
            continue
        if names := sglang_reach.callers(archive.read(path).decode()):
            found[path.removesuffix(".py").replace("/", ".")] = names
    return found


def _requirements(archive: zipfile.ZipFile) -> list[str]:
    path = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = archive.read(path).decode().splitlines()
    requires = (line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: "))
    return sorted(line for line in requires if line.startswith(("sgl-kernel", "sglang-kernel")))


def _child(module: ast.Module, name: str) -> Any:
    for node in module.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
    return None


def _method(module: ast.Module, names: SGLangNames) -> ast.FunctionDef | None:
    """The function of the module in which a layer calls the forward."""
    kind, _, method = names.forward_called_in.rpartition(".")
    body = getattr(_child(module, kind or names.backend), "body", ())
    return next((node for node in body if isinstance(node, ast.FunctionDef) and node.name == method), None)


def _parameters(function: Any) -> list[str]:
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name != "self"]


def _bound_names(module: ast.Module) -> Iterator[str]:
    """Names of forwards that the module binds at its top level; the others are of no interest."""
    for node in _top_level(module):
        if isinstance(node, ast.ImportFrom):
            bound = [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Assign):
            bound = [target.id for target in node.targets if isinstance(target, ast.Name)]
        else:
            continue
        yield from (name for name in set(bound) if name.startswith("flash_attn_"))


def _top_level(node: ast.AST) -> Iterator[ast.AST]:
    """The statements of a module, those under `if`, `else` and `try` too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try):
            yield from _top_level(child)
        else:
            yield child


def _imported_from(module: ast.Module, name: str) -> str | None:
    for node in _top_level(module):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return node.module
    return None


def _assigned_to_self(backend: ast.ClassDef) -> set[str]:
    """Of the attributes that the class sets on itself, those in LAYOUTS."""
    wanted = {name for layout in ALL_LAYOUTS for name in layout.attributes}
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


def _where_a_layer_finds_the_forward(caller: ast.FunctionDef) -> str:
    """ "self.NAME" where the layer takes it from the backend first, else "module.NAME"."""
    for node in ast.walk(caller):
        if isinstance(node, ast.Assign) and FORWARD in [getattr(target, "id", None) for target in node.targets]:
            return ast.unparse(node.value)
    return f"module.{FORWARD}"


def _makes_metadata(init_forward_metadata: ast.FunctionDef, kind: str) -> bool:
    """Whether what it leaves as `self.forward_metadata` is always an object that it has made itself."""
    left, made = set(), set()
    for node in ast.walk(init_forward_metadata):
        if isinstance(node, ast.Assign):
            targets = [ast.unparse(target) for target in node.targets]
            if "self.forward_metadata" in targets:
                left.add(ast.unparse(node.value))
            elif isinstance(node.value, ast.Call):
                made |= set(targets) if getattr(node.value.func, "id", None) == kind else set()
    return bool(left) and left <= made


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


@pytest.mark.parametrize(("version", "names"), CASES, ids=IDS)
def test_recorded_names(version: str, names: SGLangNames) -> None:
    assert lacking(names, _recorded()[version]) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_published_wheel(version: str) -> None:
    wheel = wheel_or_skip("sglang", version)
    facts = read_wheel(wheel)
    assert [line for names in layouts_of(version) for line in lacking(names, facts)] == []
    assert facts == _recorded()[version], "record anew: python -m tests.engines.test_sglang_contract FOLDER"


@pytest.mark.parametrize("version", VERSIONS)
def test_its_backends_are_asked_before_replays(version: str) -> None:
    """By one of the methods that a recording leans on, which says at one place whether it is a capture."""
    wheel = wheel_or_skip("sglang", version)
    with zipfile.ZipFile(wheel) as archive:
        for names in layouts_of(version):
            backend = _child(_parse(archive, names.module), names.backend)
            methods = {node.name: node.args for node in backend.body if isinstance(node, ast.FunctionDef)}
            found = [name for name in PREPARES if name in methods]
            assert found, names.backend
            for name in found:
                parameters = [one.arg for one in methods[name].args]
                if name == PREPARES[0]:
                    assert "in_capture" not in parameters, names.backend
                else:
                    assert parameters == ["self", "forward_batch", "in_capture"], names.backend


@pytest.mark.parametrize("version", VERSIONS)
def test_every_backend_of_a_version_is_of_one_range(version: str) -> None:
    names = [layout.backend for layout in layouts_of(version)]
    assert sorted(names) == sorted(_recorded()[version]["backends"])


@pytest.mark.parametrize(("version", "names"), CASES, ids=IDS)
def test_marker_tells_layouts_apart(version: str, names: SGLangNames) -> None:
    """The adapter takes the first layout whose marker a backend has; nothing but a setting may differ from the right
    one in any version."""
    facts = _recorded()[version]["backends"][names.backend]
    alike = [layout for layout in ALL_LAYOUTS if (layout.module, layout.backend) == (names.module, names.backend)]
    place = [layout.marker.split(".") for layout in alike]
    first = next(layout for layout, (owner, name) in zip(alike, place, strict=True) if name in facts[owner])
    assert first is names or (first.wrapped, first.methods) == (names.wrapped, names.methods), version


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
    ("version", "names", "kind", "name"),
    [(version, names, *removal) for version, names in CASES for removal in _removals(names)],
)
def test_a_rename_is_noticed(version: str, names: SGLangNames, kind: str, name: str) -> None:
    wheel = copy.deepcopy(_recorded()[version])
    facts = wheel if kind == "settings" else wheel["backends"][names.backend]
    if kind == "methods":
        facts[kind]["renamed"] = facts[kind].pop(name)
    else:
        facts[kind] = ["renamed" if found == name else found for found in facts[kind]]
    assert any(name in words for words in lacking(names, wheel))


def test_other_changes_are_noticed() -> None:
    names, wheel = LAYOUTS[0], _recorded()["0.5.23"]
    facts = wheel["backends"][names.backend]
    for change in (
        {"makers_answer_may_be_none": False},
        {"metadata_is_new": False},
        {"forward_found_at": "self.flash_attn_with_kvcache"},
        {"maker_keywords": [*facts["maker_keywords"], "window_size"]},
        {"forward_parameters": ["q"]},
        {"methods": facts["methods"] | {"init_forward_metadata": ["batch", "extra"]}},
    ):
        assert len(lacking(names, wheel | {"backends": {names.backend: facts | change}})) >= 1, change


def reached(version: str, build: str = "sglang-kernel-0.4.2") -> dict[str, Any]:
    found = sglang_reach.reach(_recorded()[version]["callers"].get, version, build)
    return {one.layers: one for one in found}


@pytest.mark.parametrize("version", VERSIONS)
def test_reach_knows_every_caller(version: str) -> None:
    """A method of SGLang's server that calls FA3's forward, and that no site names, is one that nobody looked at."""
    callers = {(module, name) for module, names in _recorded()[version]["callers"].items() for name in names}
    known = {
        (layout.where, name) for site in sglang_reach.SITES for layout in site.layouts if layout.covers(version)
        for name in site.callers(layout)
    }  # fmt: skip
    assert callers == known
    assert [one.layers for one in reached(version).values()] == [
        one.layers for one in (*sglang_reach.SITES, *sglang_reach.OTHERS)
    ]


def test_reach_by_version() -> None:
    for version, without in {"0.5.7": ["sparse attention of"], "0.5.19": [], "0.5.23": ["dual"]}.items():
        lacks = [one.layers for one in reached(version).values() if one.because == "this SGLang has no such layers"]
        assert [layers.startswith(start) for layers, start in zip(lacks, without, strict=True)] == [True] * len(without)
    assert "asks our maker" not in reached("0.5.10.post1")["decode, full attention"].because


def test_reach_without_us(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = reached("0.5.23", "sglang-kernel-0.9.0")
    assert unknown["decode, full attention"].in_graph == THEIRS
    assert "sglang-kernel" in unknown["decode, full attention"].because
    monkeypatch.setenv("FA3_METADATA_DISABLE", "1")
    assert {one.in_graph for one in reached("0.5.10.post1").values()} == {NONE}
    assert reached("0.5.23")["drafts of several layers"].because == "FA3_METADATA_DISABLE is set"


def test_reach_says_where_batch_invariance_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    found = reached("0.5.23")
    assert found["decode, full attention"].invariant == "yes"
    assert "page table is wider" in found["decode: sliding windows"].invariant
    assert "one split" in found["verification, draft extension, prefill, mixed batches"].invariant
    absent = next(one for one in found.values() if one.because == "this SGLang has no such layers")
    assert absent.invariant == ""
    table = coverage_table(list(found.values())).splitlines()
    assert table[0].endswith("| because | batch invariant, if asked for |")
    assert table[1] == "|---|---|---|---|---|"
    assert table[-1].endswith("| they are other kernels | no |")
    monkeypatch.setenv("FA3_METADATA_DISABLE", "1")
    without = coverage_table([one for one in reached("0.5.23").values() if "only_qv" not in one.layers])
    assert without.splitlines()[1] == "|---|---|---|---|"


def test_a_sglang_that_is_not_known() -> None:
    assert sglang_reach.why_not("0.5.24", "sglang-kernel-0.4.10") == "SGLang must be 0.5.7 to 0.5.23, got 0.5.24"
    assert sglang_reach.why_not("0.5.23rc1", "sglang-kernel-0.4.10") is None
    assert sglang_reach.why_not(None) == "SGLang is not installed"


def test_the_page_says_what_is_reached() -> None:
    table = coverage_table(list(reached(VERSIONS[-1]).values()))
    assert table in PAGE.read_text(), "python -m fa3_metadata.engines.sglang_reach prints it"


def _function(wheel: Path, names: SGLangNames, **around: Any) -> Any:
    """SGLang's own function in which layers call the forward, compiled from the wheel, with these names around it."""
    with zipfile.ZipFile(wheel) as archive:
        function = _method(_parse(archive, names.where), names)
    assert function is not None
    function.returns = None
    for argument in (*function.args.args, *function.args.kwonlyargs):
        argument.annotation = None
    namespace = {"torch": torch} | around
    exec(compile(ast.fix_missing_locations(ast.Module([function], [])), names.where, "exec"), namespace)
    return namespace[function.name]


@pytest.mark.parametrize("version", ["0.5.7", "0.5.12", "0.5.13", "0.5.23"])
def test_sparse_layers_of_a_step_share(version: str) -> None:
    """SGLang's own code, 61 layers of it, each with a page table of its own."""
    wheel = wheel_or_skip("sglang", version)
    calls: list[dict[str, Any]] = []
    names = next(one for one in layouts_of(version) if one.module.endswith(("nsa_backend", "dsa_backend")))

    def forward(q, k_cache, v_cache, qv=None, only_qv=False, page_table=None, cache_seqlens=None, cu_seqlens_q=None,  # type: ignore[no-untyped-def]
                cu_seqlens_k_new=None, max_seqlen_q=None, softmax_scale=None, causal=False, softcap=0.0,
                return_softmax_lse=False, num_splits=0, pack_gqa=None, scheduler_metadata=None):  # fmt: skip
        calls.append({"metadata": scheduler_metadata, "cache": k_cache, "num_splits": num_splits})
        return q

    layer = _function(wheel, names, flash_attn_with_kvcache=wrap_forward(forward, "sglang-kernel-0.4.2"))
    backend = type("Backend", (), {"num_splits": 0, "dsa_index_kpool": 1})()
    lengths, starts = torch.tensor([2048, 300, 77, 1], dtype=torch.int32), torch.arange(5, dtype=torch.int32)
    with step(lengths_stay=True):
        for _ in range(61):
            layer(
                backend, q_rope=torch.zeros(4, 16, 64, dtype=torch.bfloat16), v_head_dim=512,
                kv_cache=torch.zeros(99, 1, 576, dtype=torch.bfloat16), q_nope=torch.zeros(4, 16, 512).bfloat16(),
                page_table=torch.zeros(4, 2048, dtype=torch.int32), cache_seqlens=lengths, cu_seqlens_q=starts,
                cu_seqlens_k=starts, max_seqlen_q=1, sm_scale=1.0, logit_cap=0.0, page_size=1,
            )  # fmt: skip
    assert len({id(call["metadata"]) for call in calls}) == 1
    assert calls[0]["metadata"] is not None


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    record = {}
    for version in VERSIONS:
        if (wheel := published_wheel("sglang", version, folder or "index")) is None:
            sys.exit(why_no_wheel("sglang", version))
        record[version] = read_wheel(wheel)
    text = json.dumps(record, indent=1)
    RECORD.write_text(
        re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n"
    )  # lists in a line
