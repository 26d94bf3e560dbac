"""What was found in published wheels, kept in tests/data/wheel_rules/ so that tests need none of them.

problems.npz holds the problems asked (wheel_problems.py), answers.npz every distinct set of answers by its hash, and
wheels.json the rest: by package the versions published when it was recorded, and by version the hash of everything
found in that wheel; every distinct text and tile table once, by its hash.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from fa3_metadata.triton_kernels.builds import version_key
from fa3_metadata.triton_kernels.problem import Problem
from numpy.typing import NDArray

from .host_functions import GET_NUM_SPLITS, GET_PACK_GQA
from .wheel_facts import CELLS, FORWARD, OP, Facts, Tiles, short_hash
from .wheel_problems import load_problems, save_problems

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data" / "wheel_rules"
EVIDENCE = {  # key in wheels.json -> what it is the hash of
    "tiles": "tile shapes",
    "num_splits": "answers of get_num_splits",
    "pack_gqa": "answers of get_pack_gqa",
    "op_signature": "signature of get_scheduler_metadata",
    "forward_signature": "signature of the forward",
    "op_schema": "schema of get_scheduler_metadata",
    "forward_schema": "schema of the forward",
    "prepare_kernel": "code of the metadata kernel",
    "num_splits_code": "code of get_num_splits",
    "pack_gqa_code": "code of get_pack_gqa",
}
ANSWERS, HOST_CODE = ("num_splits", "pack_gqa"), ("num_splits_code", "pack_gqa_code")
_CELLS_A_LINE = 12  # those of one dtype and head dim

Found = dict[str, str | None]  # by the keys of EVIDENCE; None: the wheel has no such thing


@dataclass
class Recordings:
    published: dict[str, list[str]] = field(default_factory=dict)
    wheels: dict[str, dict[str, Found]] = field(default_factory=dict)  # by package, then version
    texts: dict[str, str] = field(default_factory=dict)
    tiles: dict[str, Tiles] = field(default_factory=dict)
    answers: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    folder: pathlib.Path = FOLDER

    @staticmethod
    def load(folder: pathlib.Path = FOLDER) -> Recordings:
        """What is recorded there; nothing where there is no such folder."""
        if not (folder / "wheels.json").exists():
            return Recordings(folder=folder)
        stored = json.loads((folder / "wheels.json").read_text())
        with np.load(folder / "answers.npz") as file:
            answers = {key: file[key] for key in file.files}
        tiles = {key: _tiles(lines) for key, lines in stored["tiles"].items()}
        return Recordings(stored["published"], stored["wheels"], stored["texts"], tiles, answers, folder)

    @cached_property
    def problems(self) -> tuple[Problem, ...]:
        return load_problems(self.folder / "problems.npz")

    def versions(self, package: str) -> list[str]:
        """Those with a recording, oldest first."""
        return sorted(self.wheels.get(package, ()), key=version_key)

    def like(self, package: str, version: str) -> tuple[str, Found] | None:
        """The recording of this version, or else of the newest before it, or else of the oldest."""
        recorded = self.versions(package)
        if not recorded:
            return None
        before = [text for text in recorded if version_key(text) <= version_key(version)]
        chosen = (before or recorded[:1])[-1]
        return chosen, self.wheels[package][chosen]

    def add(self, package: str, version: str, facts: Facts) -> None:
        self.wheels.setdefault(package, {})[version] = found_in(facts)
        for key, value in _answers(facts).items():
            self.answers[key] = value
        self.tiles[_tiles_hash(facts.tiles)] = facts.tiles
        for text in (*facts.signatures.values(), *facts.schemas.values()):
            if text is not None:
                self.texts[short_hash(text.encode())] = text

    def save(self, problems: tuple[Problem, ...]) -> None:
        """Write everything that some wheel still needs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        used = {value for versions in self.wheels.values() for found in versions.values() for value in found.values()}
        if not (self.folder / "problems.npz").exists():
            save_problems(self.folder / "problems.npz", problems)
        answers = {key: values for key, values in sorted(self.answers.items()) if key in used}
        np.savez_compressed(self.folder / "answers.npz", **answers)  # type: ignore[arg-type]
        stored: dict[str, dict[str, Any]] = {
            "published": self.published,
            "wheels": {
                package: {v: self.wheels[package][v] for v in self.versions(package)} for package in self.wheels
            },
            "tiles": {key: _lines(tiles) for key, tiles in sorted(self.tiles.items()) if key in used},
            "texts": {key: text for key, text in sorted(self.texts.items()) if key in used},
        }
        (self.folder / "wheels.json").write_text(_json(stored))


def found_in(facts: Facts) -> Found:
    """The hashes of what a wheel was found to have."""
    answers = facts.answers
    hashes = {
        "tiles": _tiles_hash(facts.tiles),
        "num_splits": answers_hash(answers.num_splits),
        "pack_gqa": None if answers.pack_gqa is None else answers_hash(answers.pack_gqa),
        "prepare_kernel": facts.prepare_kernel,
        "num_splits_code": facts.host_code[GET_NUM_SPLITS],
        "pack_gqa_code": facts.host_code[GET_PACK_GQA],
    }
    for kind, texts in (("signature", facts.signatures), ("schema", facts.schemas)):
        for name, key in ((OP, f"op_{kind}"), (FORWARD, f"forward_{kind}")):
            text = texts[name]
            hashes[key] = None if text is None else short_hash(text.encode())
    return {key: hashes[key] for key in EVIDENCE}


def answers_hash(values: NDArray[np.generic]) -> str:
    """Tells answers apart, and what kind they are."""
    return ("flags-" if values.dtype == np.bool_ else "numbers-") + short_hash(values.tobytes())


def _answers(facts: Facts) -> dict[str, NDArray[np.generic]]:
    found = (facts.answers.num_splits, facts.answers.pack_gqa)
    return {answers_hash(values): values for values in found if values is not None}


def _tiles_hash(tiles: Tiles) -> str:
    return short_hash("\n".join(_lines(tiles)).encode())


def _lines(tiles: Tiles) -> list[str]:
    """A line for the cells of one dtype and head dim, in the order of CELLS; "-" for those without a kernel."""
    words = [",".join(f"{m}x{n}" for m, n in sorted(tiles.get(cell, ()))) or "-" for cell in CELLS]
    return [" ".join(words[i : i + _CELLS_A_LINE]) for i in range(0, len(words), _CELLS_A_LINE)]


def _tiles(lines: Iterable[str]) -> Tiles:
    words = " ".join(lines).split()
    found = {cell: word for cell, word in zip(CELLS, words, strict=True) if word != "-"}
    return {
        cell: frozenset((int(m), int(n)) for m, _, n in (tile.partition("x") for tile in word.split(",")))
        for cell, word in found.items()
    }


def _json(stored: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for every text, tile table and wheel."""
    parts = []
    for title, entries in stored.items():
        if title == "wheels":
            wheels = [f" {json.dumps(p)}: {{\n{_entries(versions, 3)}\n  }}" for p, versions in entries.items()]
            parts.append(f'"{title}": {{\n' + ",\n".join(wheels) + "\n}")
        else:
            parts.append(f'"{title}": {{\n{_entries(entries, 1)}\n}}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _entries(entries: dict[str, Any], indent: int) -> str:
    return ",\n".join(f"{' ' * indent}{json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
