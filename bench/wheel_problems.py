"""Random problems that wheels are asked, as a table of integers: one row a problem, stored once for all wheels.

The first half is asked as FA3's metadata op asks, which knows no total of query tokens; the second half as its forward
does, where it is q.shape[0] for ragged queries.
"""

from __future__ import annotations

import pathlib
import random
from dataclasses import replace

import numpy as np
from fa3_metadata.triton_kernels.builds import FA3Rules
from fa3_metadata.triton_kernels.problem import ELEMENT_SIZE, Problem
from numpy.typing import NDArray

NUM_PROBLEMS = 24_000
_DTYPES = tuple(ELEMENT_SIZE)
_NONE = -1  # stands for None
# What is drawn from; what is to be drawn often is listed often.
_HEADDIMS = [(64, 64)] * 4 + [(128, 128)] * 6 + [(256, 256)] * 2 + [(192, 128)] * 2
_HEADDIMS += [(d, d) for d in (32, 72, 80, 96, 112, 144, 160, 192, 224)]
_HEADDIMS += [(64, 512), (64, 512), (64, 256), (64, 256), (40, 300), (56, 200), (160, 96), (192, 64), (128, 64)]
_HEADS_K = [1, 1, 1, 2, 3, 4, 5, 8, 8, 16, 32]
_GROUPS = [1, 1, 2, 3, 4, 5, 7, 8, 8, 8, 16, 16, 64, 128]
_BATCHES = [1, 1, 1, 2, 2, 3, 4, 5, 7, 8, 16, 31, 32, 64, 100, 128, 132, 256, 512, 991, 992, 993, 994, 1024, 1500]
_QUERIES = [1, 1, 1, 1, 1, 2, 3, 4, 5, 7, 8, 16, 17, 33, 63, 64, 65, 100, 128, 192, 300, 512, 1000, 2048, 4096, 40_000]
_KEYS = [
    1, 64, 257, 300, 512, 700, 1000, 1024, 2000, 4096, 8192, 20_000, 32_768, 65_536, 131_072, 500_000, 2**21, 2**22,
]  # fmt: skip
_PAGES = [
    1, 16, 16, 64, 64, 64, 80, 96, 112, 128, 128, 144, 160, 176, 192, 224, 256, 256, 480, 512, 640, 704, 896, 1024,
]  # fmt: skip
_SMS = [132, 132, 132, 132, 114, 114, 78]


def draw_problems(rng: random.Random, count: int) -> tuple[Problem, ...]:
    """`count` problems, widely drawn over every field that FA3's host rules look at."""
    return tuple(_draw(rng, ragged_total=i >= count // 2) for i in range(count))


def _draw(rng: random.Random, ragged_total: bool) -> Problem:
    pick = rng.choice
    headdim, headdim_v = pick(_HEADDIMS)
    heads_k, batch, max_q = pick(_HEADS_K), pick(_BATCHES), pick(_QUERIES)
    if rng.random() < 0.2:
        batch, max_q = rng.randint(1, 1500), rng.randint(1, 600)
    max_k = pick(_KEYS) if rng.random() < 0.7 else round(2 ** rng.uniform(0, 20))
    long_prefill = rng.random() < 0.04
    if long_prefill:  # the one case in which queries that fill the GPU are split: a KV head beyond L2
        max_q, max_k = pick([2048, 4096, 20_000, 40_000]), pick([100_000, 300_000, 2**20, 2**22])
    arch = 90 if rng.random() < 0.9 else pick([80, 86, 89])
    num_sms = pick(_SMS) if arch == 90 else pick([108, 84, 142])
    ragged = rng.random() < 0.5
    total_q = rng.randint(1, batch * max_q) if ragged_total and ragged else None
    if total_q and rng.random() < 0.5:  # one long query, the others decode
        total_q = batch - 1 + max_q
    return Problem(
        batch_size=batch,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        num_heads=heads_k * pick(_GROUPS),
        num_heads_k=heads_k,
        headdim=headdim,
        headdim_v=headdim_v,
        qkv_dtype=pick(["float16", "bfloat16", "bfloat16", "float8_e4m3fn"]),
        has_cu_seqlens_q=ragged,
        has_seqused_q=rng.random() < 0.1,
        has_leftpad_k=rng.random() < 0.05,
        page_size=pick(_PAGES) if rng.random() < 0.55 else None,
        max_seqlen_k_new=pick([1, 8]) if rng.random() < 0.06 else 0,
        causal=not long_prefill and rng.random() < 0.5,
        window_size=(-1, -1) if long_prefill else _window(rng, max_q, max_k),
        attention_chunk=pick([1, 64, 1000, 8192]) if not long_prefill and rng.random() < 0.06 else 0,
        has_softcap=rng.random() < 0.2,
        num_splits=pick([1, 1, 2, 3, 8, 32, 128, 255]) if rng.random() < 0.12 else 0,
        pack_gqa=rng.random() < 0.5 if rng.random() < 0.12 else None,
        sm_margin=pick([1, 4, 8, 16, num_sms // 2, num_sms - 1]) if rng.random() < 0.25 else 0,
        arch=arch,
        num_sms=num_sms,
        total_q=total_q,
    )


def _window(rng: random.Random, max_q: int, max_k: int) -> tuple[int, int]:
    if rng.random() < 0.55:
        return -1, -1
    left = rng.choice([-1, 0, 63, 127, 1023, 4095, 32_767, max(max_k - 3, 0), max_k - 1, max_k])
    right = rng.choice([-1, 0, 0, 0, 3, 128, 1023, max(max_q - 3, 0), max_q - 1, max_q])
    return left, right


# As integers; qkv_dtype and window_size are stored in another way. The others are not FA3's.
_COLUMNS = (
    "batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads", "num_heads_k", "headdim", "headdim_v",
    "has_cu_seqlens_q", "has_seqused_q", "has_leftpad_k", "page_size", "max_seqlen_k_new", "causal",
    "attention_chunk", "has_softcap", "num_splits", "pack_gqa", "sm_margin", "arch", "num_sms", "total_q",
)  # fmt: skip
_NULLABLE = ("page_size", "pack_gqa", "total_q")
_FLAGS = ("has_cu_seqlens_q", "has_seqused_q", "has_leftpad_k", "causal", "has_softcap", "pack_gqa")


def save_problems(path: pathlib.Path, problems: tuple[Problem, ...]) -> None:
    columns = {name: [_NONE if (v := getattr(p, name)) is None else int(v) for p in problems] for name in _COLUMNS}
    columns["qkv_dtype"] = [_DTYPES.index(p.qkv_dtype) for p in problems]
    columns["window_left"], columns["window_right"] = map(list, zip(*(p.window_size for p in problems), strict=True))
    np.savez_compressed(path, **{name: _smallest(values) for name, values in columns.items()})  # type: ignore[arg-type]


def load_problems(path: pathlib.Path) -> tuple[Problem, ...]:
    with np.load(path) as stored:
        columns = {name: stored[name].tolist() for name in (*_COLUMNS, "qkv_dtype", "window_left", "window_right")}
    count = len(columns["batch_size"])
    for name in _FLAGS:
        columns[name] = [_NONE if value == _NONE else bool(value) for value in columns[name]]
    for name in _NULLABLE:
        columns[name] = [None if value == _NONE else value for value in columns[name]]
    columns["qkv_dtype"] = [_DTYPES[index] for index in columns["qkv_dtype"]]
    columns["window_size"] = list(zip(columns.pop("window_left"), columns.pop("window_right"), strict=True))
    return tuple(Problem(**{name: values[i] for name, values in columns.items()}) for i in range(count))


def _smallest(values: list[int]) -> NDArray[np.generic]:
    """As an array of the smallest integers that hold them."""
    for kind in ("int8", "int16"):
        if np.iinfo(kind).min <= min(values) and max(values) <= np.iinfo(kind).max:
            return np.array(values, kind)
    return np.array(values, np.int32)


def as_build_is_asked(problem: Problem, rules: FA3Rules) -> Problem:
    """The problem without what a build with these rules cannot be asked: chunks, other architectures."""
    if problem.attention_chunk and not rules.has_attention_chunk:
        problem = replace(problem, attention_chunk=0)
    if problem.arch < 90 and rules.sm8x_tiles is None:
        problem = replace(problem, arch=90)
    return problem
