"""What an engine's source says about FA3's scheduling, read without importing it: facts that an adapter leans on."""

from __future__ import annotations

import ast
import copy
import difflib
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from importlib import util
from pathlib import Path

_SUBJECT = "schedule"  # functions, and imported names, with this in their name
_NAMED = ("flash_attn_varlen_func", "set_forward_context")  # more of them, whose parameters differ by version
_STATE = (
    "self.scheduler_metadata", "self.use_full_cuda_graph = ", "self.aot_schedule = ", "self.aot_sliding_window",
    "common_prefix_len > 0",
)  # fmt: skip
_FunctionDef = ast.FunctionDef | ast.AsyncFunctionDef


def source_facts(source: str) -> list[str]:
    """Facts about a module's source, one line each, without annotations, comments and formatting.

    from module import name                 an import, at module level, under `if` and `try` too
    def function(parameters)                also Class.method; with the defaults
    function takes parameter                of the functions whose parameters differ by version
    function: 2 x callee(keyword, _, ...)   how often a function calls what, with which arguments; _: by position
    function: statement                     an assignment, return or `if` that has to do with the builder's state
    function: keyword=value                 an argument that has to do with it
    """
    return list(dict.fromkeys(_module_facts(ast.parse(source))))


def _module_facts(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try):
            yield from _module_facts(child)
        elif isinstance(child, ast.ImportFrom):
            names = (ast.unparse(name) for name in child.names if _SUBJECT in name.name or name.name in _NAMED)
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
    if name in _NAMED:
        parameters = function.args
        yield from (f"{name} takes {one.arg}" for one in (*parameters.args, *parameters.kwonlyargs))
    calls: Counter[str] = Counter()
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and _SUBJECT in (callee := ast.unparse(node.func)):
            keywords = [keyword.arg or "**" for keyword in node.keywords]
            calls[f"{callee}({', '.join(['_'] * len(node.args) + keywords)})"] += 1
        elif isinstance(node, ast.Assign | ast.Return | ast.keyword) and _is_state(text := ast.unparse(node)):
            yield f"{name}: {text}"
        elif isinstance(node, ast.If) and _is_state(text := ast.unparse(node.test)):
            yield f"{name}: if {text}"
    yield from (f"{name}: {times} x {call}" for call, times in calls.items())


def _is_state(text: str) -> bool:
    return any(part in text for part in _STATE)


def missing_facts(module: str, wanted: tuple[str, ...], found: list[str] | None) -> list[str]:
    """What does not hold of the facts wanted of a module, in words: what was expected, what is there instead.

    `found` are the facts about its source; None: there is no such module.
    """
    if found is None:
        return [f"{module}: expected this module, found none"]
    nearest = {fact: difflib.get_close_matches(fact, found, n=1, cutoff=0.0) for fact in wanted if fact not in found}
    return [
        f"{module}: expected `{fact}`, found {f'`{near[0]}`' if near else 'none'}" for fact, near in nearest.items()
    ]


def installed_facts(module: str) -> list[str] | None:
    """Facts about the source of a module of an installed package; None: there is no such module."""
    source = installed_source(module)
    return None if source is None else list(_known_facts(source))


@lru_cache(maxsize=16)
def _known_facts(source: str) -> tuple[str, ...]:
    return tuple(source_facts(source))


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
