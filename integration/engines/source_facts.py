"""What an engine's source says about FA3's scheduling, read without importing it: facts that an adapter leans on."""

from __future__ import annotations

import ast
import copy
import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib import util
from pathlib import Path

_SUBJECT = "schedule"  # functions, and imported names, with this in their name
_STATE = ("self.scheduler_metadata", "self.use_full_cuda_graph = ")
_FunctionDef = ast.FunctionDef | ast.AsyncFunctionDef


def source_facts(source: str) -> list[str]:
    """Facts about a module's source, one line each, without annotations, comments and formatting.

    from module import name                 an import, at module level, under `if` and `try` too
    def function(parameters)                also Class.method; with the defaults
    function: 2 x callee(keyword, _, ...)   how often a function calls what, with which arguments; _: by position
    function: statement                     an assignment or return that has to do with the persistent buffer
    """
    return list(dict.fromkeys(_module_facts(ast.parse(source))))


def _module_facts(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try):
            yield from _module_facts(child)
        elif isinstance(child, ast.ImportFrom):
            names = (ast.unparse(name) for name in child.names if _SUBJECT in name.name)
            yield from (f"from {'.' * child.level}{child.module or ''} import {name}" for name in names)
        elif isinstance(child, _FunctionDef):
            yield from _function_facts(child, child.name)
        elif isinstance(child, ast.ClassDef):
            for method in child.body:
                if isinstance(method, _FunctionDef):
                    yield from _function_facts(method, f"{child.name}.{method.name}")


def _function_facts(function: _FunctionDef, name: str) -> Iterator[str]:
    if _SUBJECT in function.name:
        parameters = copy.deepcopy(function.args)
        for node in ast.walk(parameters):
            if isinstance(node, ast.arg):
                node.annotation = None
        yield f"def {name}({ast.unparse(parameters)})"
    calls: Counter[str] = Counter()
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and _SUBJECT in (callee := ast.unparse(node.func)):
            keywords = [keyword.arg or "**" for keyword in node.keywords]
            calls[f"{callee}({', '.join(['_'] * len(node.args) + keywords)})"] += 1
        elif isinstance(node, ast.Assign | ast.Return) and any(part in (text := ast.unparse(node)) for part in _STATE):
            yield f"{name}: {text}"
    yield from (f"{name}: {times} x {call}" for call, times in calls.items())


def broken_facts(leans_on: Mapping[str, tuple[str, ...]], read_source: Callable[[str], str | None]) -> list[str]:
    """What does not hold of the facts wanted of each module, in words: what was expected, what is there instead."""
    sources = {module: read_source(module) for module in leans_on}
    found = {module: None if source is None else source_facts(source) for module, source in sources.items()}
    return [line for module, wanted in leans_on.items() for line in missing_facts(module, wanted, found[module])]


def missing_facts(module: str, wanted: tuple[str, ...], found: list[str] | None) -> list[str]:
    """As `broken_facts`, for one module of which these facts were found; None: there is no such module."""
    if found is None:
        return [f"{module}: expected this module, found none"]
    nearest = {fact: difflib.get_close_matches(fact, found, n=1, cutoff=0.0) for fact in wanted if fact not in found}
    return [
        f"{module}: expected `{fact}`, found {f'`{near[0]}`' if near else 'none'}" for fact, near in nearest.items()
    ]


def installed_source(module: str) -> str | None:
    """The source of a module of an installed package, found without importing either; None where there is none."""
    package, *rest = module.split(".")
    try:
        spec = util.find_spec(package)
    except ValueError:  # a module without a spec has been put in place of the package
        spec = None
    for root in (spec.submodule_search_locations if spec is not None else None) or ():
        for path in module_files(rest):
            if (file := Path(root, path)).is_file():
                return file.read_text(encoding="utf-8")
    return None


def module_files(names: list[str]) -> tuple[str, str]:
    """Where the module of this dotted name may be, relative to where the dotted name starts."""
    return "/".join(names) + ".py", "/".join([*names, "__init__.py"])
