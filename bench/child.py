"""Work that needs a process of its own, such as an engine that never gives its GPU back, and its answers one by one."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NoReturn


class FailedError(Exception):
    """The process ended, or found what must not be."""


def answers(target: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    """What a spawned process sends that runs `target(*arguments, folder, connection)`, up to a None.

    Raises `FailedError`: the one that it sends, or one with the end of `folder`'s log where it ends before.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        spawn = multiprocessing.get_context("spawn")  # no CUDA from here
        ours, its = spawn.Pipe()
        process = spawn.Process(target=target, args=(*arguments, folder, its))
        process.start()
        its.close()  # so that its end is seen here
        try:
            while (got := ours.recv()) is not None:
                if isinstance(got, FailedError):
                    raise got
                yield got
        except (EOFError, OSError):
            said = (folder / "log").read_text(errors="replace") if (folder / "log").exists() else ""
            raise FailedError(f"its process ended. {said[-4000:]}") from None
        finally:
            process.terminate()
            process.join()


def answer(work: Callable[[], Iterable[Any]], folder: pathlib.Path, parent: Connection) -> NoReturn:
    """In that process: send each of what `work` gives, then None, or the `FailedError` that it raises; then end.

    What is printed goes to `folder`'s log.
    """
    with (folder / "log").open("w") as log:
        for standard in (1, 2):
            os.dup2(log.fileno(), standard)
    try:
        for one in work():
            parent.send(one)
        parent.send(None)
    except FailedError as error:
        parent.send(error)
    os._exit(0)  # engines' own teardowns wait for servers that are not there
