"""docs/api.md from the docstrings of the public names: `python .ci/api_page.py [--write]`. Needs griffe.

Without --write it says whether the page is what the docstrings make, by its exit code.
"""

from __future__ import annotations

import logging
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator

import griffe

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
OPENING = """# API

<!-- made by `make docs` from docstrings: do not edit -->

What `import fa3_metadata` offers. Arguments that do not fit raise `TypeError` or `ValueError`, by name, before anything
is launched.

"""
logging.getLogger("griffe").setLevel(logging.ERROR)  # of arguments that share a line of a docstring
WIDTH = 110  # of a signature that stays in one line


def load() -> griffe.Object:
    """The package, read and not imported: the folders as the import names have them."""
    with tempfile.TemporaryDirectory() as folder:
        package = pathlib.Path(folder, "fa3_metadata")
        shutil.copytree(ROOT / "integration", package)
        shutil.copytree(ROOT / "triton_kernels", package / "triton_kernels")
        options = {"search_paths": [folder], "docstring_parser": "google", "allow_inspection": False}
        return griffe.load("fa3_metadata", **options, docstring_options={"returns_multiple_items": False})


def page() -> str:
    package = load()
    names = [name.strip("'\"") for name in package.exports or ()]
    found = {name: _public(package, name) for name in sorted(names, key=str.lower)}
    contents = [f"- [`{name}`](#{name.lower()}): {_first_line(one)}" for name, one in found.items()]
    entries = [entry for name, one in found.items() for entry in _entries(name, one)]
    return OPENING + "\n".join(contents) + "\n\n" + "\n".join(entries)


def _public(package: griffe.Object, name: str) -> griffe.Object:
    """What the package imports under a name, which a module of its own may have as well."""
    where = package.imports.get(name, f"{package.path}.{name}").removeprefix(f"{package.path}.")
    return package[where]


def _text(one: griffe.Object) -> str:
    if one.docstring is None:
        raise ValueError(f"{one.path} has no docstring, and is public")
    return one.docstring.value


def _first_line(one: griffe.Object) -> str:
    return _text(one).partition("\n")[0]


def _entries(name: str, one: griffe.Object, level: int = 2) -> Iterator[str]:
    """What a name is and, below it, its public members."""
    yield f"{'#' * level} `{name}`\n"
    if not one.is_module:
        yield f"```py\n{_signature(name.rpartition('.')[2], one)}\n```\n"
    yield from _sections(one)
    if one.is_class or one.is_module:
        for member in one.members.values():
            if not member.is_alias and not member.name.startswith("_") and _is_shown(one, member):
                yield from _entries(f"{name}.{member.name}", member, level + 1)


def _is_shown(owner: griffe.Object, member: griffe.Object) -> bool:
    """Of a module, its functions; of a class, all that has a docstring."""
    return member.has_docstring and (member.is_function or owner.is_class)


def _signature(name: str, one: griffe.Object) -> str:
    if one.is_attribute:
        return f"{name}: {one.annotation}" if one.annotation else f"{name} = {one.value}"
    called = one if one.is_function else one.all_members.get("__init__")
    if called is None:
        return f"class {name}"
    parts = list(_parameters(called))
    returns = f" -> {called.returns}" if one.is_function and called.returns else ""
    if any(decorator.callable_path.endswith("contextmanager") for decorator in called.decorators):
        returns = " -> AbstractContextManager[None]"
    line = f"{name}({', '.join(parts)}){returns}"
    if len(line) <= WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"


def _parameters(called: griffe.Object) -> Iterator[str]:
    stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}
    before = None
    for parameter in called.parameters:
        if parameter.name == "self":
            continue
        if before is griffe.ParameterKind.positional_only and parameter.kind is not before:
            yield "/"
        if parameter.kind is griffe.ParameterKind.keyword_only and before not in (parameter.kind, *stars):
            yield "*"
        before = parameter.kind
        annotation = f": {parameter.annotation}" if parameter.annotation else ""
        default = (
            f" = {parameter.default}".replace("'", '"')
            if parameter.default is not None and parameter.kind not in stars
            else ""
        )
        star = stars.get(parameter.kind, "")
        yield f"{star}{parameter.name}{annotation}{default}".replace("'", '"')


def _sections(one: griffe.Object) -> Iterator[str]:
    for section in one.docstring.parsed:
        title, value = str(section.kind.value).title(), section.value
        if section.kind is griffe.DocstringSectionKind.text:
            yield f"{value}\n"
        elif section.kind is griffe.DocstringSectionKind.parameters:
            yield "**Arguments**\n"
            yield "".join(f"- `{item.name}`: {_joined(item.description)}\n" for item in value)
        elif section.kind in (griffe.DocstringSectionKind.returns, griffe.DocstringSectionKind.raises):
            yield f"**{title}**\n"
            named = section.kind is griffe.DocstringSectionKind.raises
            names = [f"`{str(item.annotation).strip('()')}`: " if named else "" for item in value]
            lines = zip(names, (_joined(item.description) for item in value), strict=True)
            yield "".join(f"- {name}{description}\n" for name, description in lines)
        else:
            raise ValueError(f"{one.path}: a section {title!r} of a docstring has no place on the page")


def _joined(text: str) -> str:
    return " ".join(text.split())


def main() -> int:
    made = page()
    if "--write" in sys.argv[1:]:
        PAGE.write_text(made)
    if PAGE.exists() and PAGE.read_text() == made:
        return 0
    print("docs/api.md is not what the docstrings make: `make docs` writes it", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
