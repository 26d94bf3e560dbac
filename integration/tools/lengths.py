"""Sequence lengths as people write them: "64k,16x1024", "64 x lognormal(8, 1)"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

import numpy as np

MOST_SEQUENCES = 2**20
LONGEST = 2**31 - 1
_UNITS = {"": 1, "k": 1024, "m": 1024**2}
_NUMBER = r"\d+(?:\.\d+)?[kKmM]?"
_PART = re.compile(rf"(?:(?P<count>\d+)\s*[x*]\s*)?(?:(?P<length>{_NUMBER})|(?P<drawn>[a-z]+)\((?P<of>[^()]*)\))")
FORM = 'must be like 64k,16x1024 (a length, or how many x length; k is 1024) or "64 x lognormal(8, 1)"'


def parse_lengths(text: str, option: str = "--cache-seqlens", seed: int = 0) -> list[int]:
    """Lengths in tokens from "64k,16x1024": one sequence of 65,536 tokens and 16 of 1,024.

    A part may be drawn instead: "64 x lognormal(8, 1)" (mean and sigma of the logarithm; from 16 to 131,072 tokens) or
    "8 x uniform(1k, 4k)", by `seed`, so that the same text means the same lengths. Raises `ValueError`, naming
    `option`, for anything else.
    """
    lengths: list[int] = []
    random = np.random.default_rng(seed)
    for part in re.split(r",(?![^()]*\))", text):
        found = _PART.fullmatch(part.strip())
        if found is None:
            raise ValueError(f"{option} {FORM}, got {part!r}")
        count = int(found["count"] or 1)
        if len(lengths) + count > MOST_SEQUENCES:
            raise ValueError(f"{option} must be at most {MOST_SEQUENCES:,} sequences, got {part!r}")
        if found["length"]:
            lengths += [_tokens(found["length"], option)] * count
        else:
            lengths += _drawn(found["drawn"], found["of"], count, random, option)
    return lengths


def _tokens(text: str, option: str) -> int:
    unit = text[-1].lower() if text[-1].isalpha() else ""
    tokens = float(text[: len(text) - len(unit)]) * _UNITS[unit]
    if tokens != int(tokens):
        raise ValueError(f"{option} must be in whole tokens, got {text!r}")
    if tokens > LONGEST:
        raise ValueError(f"{option} must be below {LONGEST + 1}, got {text}")
    return int(tokens)


def _drawn(name: str, of: str, count: int, random: np.random.Generator, option: str) -> list[int]:
    arguments = [one.strip() for one in of.split(",")]
    try:
        if name == "lognormal":
            mean, sigma = (float(one) for one in arguments)
            return [int(one) for one in np.clip(random.lognormal(mean, sigma, count), 16, 131072)]
        if name == "uniform":
            low, high = (_tokens(one, option) for one in arguments)
            return [int(one) for one in random.integers(low, high, count, endpoint=True)]
        raise ValueError
    except ValueError:
        raise ValueError(f"{option} {FORM}, got '{name}({of})'") from None


def checked_lengths(lengths: object, name: str) -> list[int]:
    """A list of lengths as JSON has them. Raises `ValueError` for one that is no whole number of tokens from 0 on."""
    if isinstance(lengths, str):
        return parse_lengths(lengths, name)
    if not isinstance(lengths, list):
        raise ValueError(f"{name} must be a list of lengths or a text like 64k,16x1024, got {lengths!r:.60}")
    for i, one in enumerate(lengths):
        if type(one) is not int:
            raise ValueError(f"{name}[{i}] must be a whole number of tokens, got {one!r:.60}")
        if one < 0:
            raise ValueError(f"{name}[{i}] must not be negative, got {one}")
        if one > LONGEST:
            raise ValueError(f"{name} must be below {LONGEST + 1}, got {one}")
    return lengths


def in_words(lengths: Sequence[int], most: int = 5) -> str:
    """ "16 sequences of 1,024 tokens", so that nobody has to guess what was read."""
    runs = [(len(list(group)), length) for length, group in groupby(lengths)]
    if not runs:
        return "no sequence"
    if len(runs) > most:
        middle, mean = float(np.median(lengths)), float(np.mean(lengths))
        return (
            f"{len(lengths):,} sequences of {min(lengths):,} to {max(lengths):,} tokens, "
            f"median {middle:,.0f}, mean {mean:,.0f}"
        )
    said = [f"{count:,} of {length:,}" for count, length in runs]
    said[0] = f"{runs[0][0]:,} sequence{'s' * (runs[0][0] != 1)} of {runs[0][1]:,}"
    return ", ".join(said) + " tokens"
