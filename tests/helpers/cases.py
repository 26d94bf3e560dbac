"""Test cases: recorded ones, and those that bench/cases.py draws, run and checked against each other."""

from __future__ import annotations

import gzip
import json
import pathlib
import random
from dataclasses import dataclass
from typing import Any

import fa3_metadata
import torch

from bench import cases
from bench.cases import LENGTHS, POISON

__all__ = ["GOLDEN_BUILDS", "LENGTHS", "POISON", "Case", "boundary_case", "crowded_case", "golden_cases", "random_case"]

DATA = pathlib.Path(__file__).parents[1] / "data"
GOLDEN_BUILDS = tuple(sorted(path.name.removesuffix(".jsonl.gz") for path in DATA.glob("*.jsonl.gz")))


@dataclass(frozen=True)
class Case(cases.Case):
    """A case that can be run by any backend."""

    def run(self, backend: str, device: torch.device | str, **tensor_kind: Any) -> dict[str, list[int]]:
        """Rows made by a backend into poisoned memory, after checking size, bounds and semaphore."""
        arguments = self.arguments(device, **tensor_kind)
        layout = fa3_metadata.metadata_layout(**arguments)
        memory = torch.full((layout.size + 8,), POISON, dtype=torch.int32, device=device)
        out = fa3_metadata.get_scheduler_metadata(**arguments, out=memory, backend=backend)
        assert out.untyped_storage().data_ptr() == memory.data_ptr(), "out= was not used"
        assert self.size in (None, layout.size), self.paste()
        assert memory[layout.size :].tolist() == [POISON] * 8, f"written past the end: {self.paste()}"
        if layout.semaphore is not None:
            assert out[layout.semaphore].item() == 0, self.paste()
        if backend != "native":  # FA3 leaves the padding unwritten
            assert POISON not in out.tolist(), f"an element was not written: {self.paste()}"
        return {name: row.tolist() for name, row in fa3_metadata.unpack_metadata(out, layout).items()}

    def check(self, rows: dict[str, list[int]], expected: dict[str, list[int]], what: str) -> None:
        """Fail with the case in a form that can be pasted into a test."""
        assert list(rows) == list(expected), f"{what}: other rows: {self.paste()}"
        wrong = [name for name in rows if rows[name] != expected[name]]
        assert not wrong, f"{what}: {', '.join(wrong)} differ for\n{self.paste()}"


def golden_cases(build: str) -> list[Case]:
    """The cases recorded from the real wheel of this build, on a Hopper GPU."""
    with gzip.open(DATA / f"{build}.jsonl.gz", "rt") as lines:
        return [Case(**json.loads(line)) for line in lines]


def random_case(rng: random.Random, build: str, num_sms: int = 132, **limits: int) -> Case:
    return Case(**vars(cases.random_case(rng, build, num_sms, **limits)))


def boundary_case(rng: random.Random, build: str, num_sms: int = 132, **limits: int) -> Case:
    return Case(**vars(cases.boundary_case(rng, build, num_sms, **limits)))


def crowded_case(rng: random.Random, build: str, num_sms: int = 132, **limits: int) -> Case:
    return Case(**vars(cases.crowded_case(rng, build, num_sms, **limits)))
