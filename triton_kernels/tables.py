"""Measured tables, one JSON file for each kind and GPU: shipped ones, and those of `fa3-metadata tune`.

A kind is "balance" (balance.py) or "launch" (shapes.py). A table tuned on this machine wins over a shipped one of the
same GPU, and a GPU without any uses an H200's. Nothing is ever measured here.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import warnings
from collections.abc import Callable
from typing import Any

from .problem import DEFAULT_GPU

CACHE_VARIABLE = "FA3_METADATA_CACHE"
Table = dict[str, Any]
_SHIPPED = pathlib.Path(__file__).parent


def cache_folder() -> pathlib.Path:
    """Where tuned tables are kept: FA3_METADATA_CACHE, else fa3_metadata in the user's cache folder.

    Raises `RuntimeError` for a user without a home folder.
    """
    if folder := os.environ.get(CACHE_VARIABLE):
        return pathlib.Path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "fa3_metadata"


def cache_file(kind: str, gpu: str) -> pathlib.Path:
    """The file of a GPU's tuned table, such as balance-nvidia-h200.json."""
    return cache_folder() / f"{kind}-{'-'.join(re.findall(r'[a-z0-9]+', gpu.lower()))}.json"


def find_table(kind: str, gpu: str, check: Callable[[Table], object]) -> Table:
    """The table of a GPU: tuned, else shipped, else the H200's. `check` raises for a table that cannot be used.

    A tuned table that cannot be read or used is left out, with a warning: it must not stop an engine.
    """
    tuned = _tuned_table(kind, gpu, check)
    if tuned is not None:
        return tuned
    shipped = {table["gpu"]: table for table in map(_read, sorted(_SHIPPED.glob(f"{kind}_*.json")))}
    return shipped.get(gpu, shipped[DEFAULT_GPU])


def _tuned_table(kind: str, gpu: str, check: Callable[[Table], object]) -> Table | None:
    try:
        path = cache_file(kind, gpu)
    except RuntimeError:  # no home folder
        return None
    try:
        table = _read(path)
        if table["gpu"] != gpu:
            raise ValueError(f"it is of {table['gpu']!r}")
        check(table)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{path} cannot be used and is ignored: {error!r}", stacklevel=2)
        return None
    return table


def _read(path: pathlib.Path) -> Table:
    table: Table = json.loads(path.read_text())
    return table


def write_table(path: pathlib.Path, table: Table) -> None:
    """Write a table where it was asked for. Whoever reads at that moment sees the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(table_text(table))
    beside.replace(path)


def table_text(table: Table) -> str:
    """A table as JSON to be read by people: a line for each value, or for each element of a list of objects."""
    return "{\n" + ",\n".join(f"  {json.dumps(name)}: {_text(value)}" for name, value in table.items()) + "\n}\n"


def _text(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f"    {json.dumps(one)}" for one in value) + "\n  ]"
    return json.dumps(value)
