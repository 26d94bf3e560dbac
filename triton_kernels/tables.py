"""Measured tables, one JSON file for each kind and GPU: shipped ones, and those of `fa3-metadata tune`.

A kind is "balance" (balance.py) or "launch" (shapes.py). A table tuned on this machine wins over a shipped one of the
same GPU, and a GPU without any uses an H200's. Nothing is ever measured here.

What lies in the cache folder may be anything: a file cut short, an edited one, no file at all. A tuned table is used
only if it is a regular file of at most MOST_BYTES, and in it, as UTF-8, a JSON object of this GPU that passes the check
of its kind. Anything else is ignored with one warning, which names the file and says why.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import stat
import uuid
import warnings
from collections.abc import Callable
from typing import Any

from .problem import DEFAULT_GPU

CACHE_VARIABLE = "FA3_METADATA_CACHE"
MOST_BYTES = 2**20  # of a table: a thousand times what one has
_MOST_OF_A_REASON = 200  # characters: it may quote the table
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
    except Exception as error:  # whatever a file system, a parser or a check raises for what somebody left there
        if isinstance(error, FileNotFoundError) and not os.path.islink(path):
            return None
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if len(reason) > _MOST_OF_A_REASON:
            reason = reason[:_MOST_OF_A_REASON] + " ..."
        warnings.warn(f"{path} cannot be used and is ignored: {reason}", stacklevel=2)
        return None
    return table


def _read(path: pathlib.Path) -> Table:
    """The JSON object in a file. Whatever is no regular file is not even opened: a pipe would block, or never end."""
    _check_regular(os.stat(path))
    with open(path, "rb", opener=_without_waiting) as file:
        _check_regular(os.fstat(file.fileno()))  # it may have been replaced meanwhile
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    table = json.loads(content.decode())
    if not isinstance(table, dict):
        raise ValueError("it is no JSON object")
    return table


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has no such flag


def write_table(path: pathlib.Path, table: Table) -> None:
    """Write a table where it was asked for. Whoever reads at that moment sees the old one or the new one, whole.

    Any number of threads and processes may write at once: one of their tables stays. Nothing else is left beside it,
    whatever fails.
    """
    text = table_text(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{uuid.uuid4().hex}")  # nobody else's
    try:
        with open(beside, "x", encoding="utf-8") as file:
            file.write(text)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def table_text(table: Table) -> str:
    """A table as JSON to be read by people: a line for each value, or for each element of a list of objects."""
    return "{\n" + ",\n".join(f"  {json.dumps(name)}: {_text(value)}" for name, value in table.items()) + "\n}\n"


def _text(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f"    {json.dumps(one)}" for one in value) + "\n  ]"
    return json.dumps(value)
