"""The named decode batches on which schedules are judged."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Workload:
    """One layer's decode attention over a batch. Lengths are tokens in the cache."""

    name: str
    lengths: tuple[int, ...]
    num_heads: int = 8
    num_heads_k: int = 1
    headdim: int = 128
    headdim_v: int | None = None  # 512 with headdim 64: MLA, with qv
    window: int | None = None  # keys to the left of a query that it sees
    seqlen_q: int = 1
    dtype: str = "bfloat16"
    held_out: bool = False  # never used to fit the constants of the policy

    @property
    def is_mla(self) -> bool:
        return self.headdim_v == 512


def uniform(batch: int, length: int) -> tuple[int, ...]:
    return (length,) * batch


def lognormal(batch: int, mean: float, sigma: float, seed: int, longest: int = 65536) -> tuple[int, ...]:
    """`mean` and `sigma` are of the logarithm of the length."""
    drawn = np.random.default_rng(seed).lognormal(mean, sigma, batch)
    return tuple(int(n) for n in np.clip(drawn, 16, longest))


def between(batch: int, low: int, high: int, seed: int) -> tuple[int, ...]:
    return tuple(int(n) for n in np.random.default_rng(seed).integers(low, high + 1, batch))


def mixed(*parts: tuple[int, int]) -> tuple[int, ...]:
    """(how many, length) of each part, in this order."""
    return tuple(length for count, length in parts for _ in range(count))


def agentic(batch: int, prefix: int, seed: int) -> tuple[int, ...]:
    """A long shared prompt, and turns of very different lengths after it."""
    return tuple(prefix + n for n in lognormal(batch, 6.5, 1.2, seed, 16384))


def _suite() -> tuple[Workload, ...]:
    w = Workload
    fitted = [
        w("1 x 512", uniform(1, 512)),
        w("2 x 512", uniform(2, 512)),
        w("4 x 300", between(4, 200, 400, 13)),
        w("8 x 512, 16/2", uniform(8, 512), 16, 2),
        w("1 x 1024, 32/8", uniform(1, 1024), 32, 8),
        w("1 x 8192", uniform(1, 8192)),
        w("1 x 512, d 64, 64/8", uniform(1, 512), 64, 8, 64),
        w("4 x 512, 16/2", uniform(4, 512), 16, 2),
        w("8 x 1000, 4/1", uniform(8, 1000), 4, 1),
        w("16 x 1024, 32/8", uniform(16, 1024), 32, 8),
        w("64 x 2048, 32/8", uniform(64, 2048), 32, 8),
        w("256 x 500", between(256, 200, 800, 1)),
        w("64 lognormal(7.5, 1.2)", lognormal(64, 7.5, 1.2, 2)),
        w("32 lognormal(8, 1), 32/8", lognormal(32, 8, 1, 3), 32, 8),
        w("one 100k among 63 x 1k", mixed((1, 100_000), (63, 1000))),
        w("bimodal 8 x 16k, 56 x 256", mixed((8, 16384), (56, 256))),
        w("agentic 16 x 12k, 16/2", agentic(16, 12_000, 4), 16, 2),
        w("32 lognormal(8, 1), d 64", lognormal(32, 8, 1, 5), headdim=64),
        w("16 x 4096, 8/4, d 256", uniform(16, 4096), 8, 4, 256),
        w("32 lognormal(9, 1), window 4095", lognormal(32, 9, 1, 6), window=4095),
        w("64 lognormal(8, 1), 64/8, d 64, window 127", lognormal(64, 8, 1, 7), 64, 8, 64, window=127),
        w("16 lognormal(8, 1), window 1023, 16/8", lognormal(16, 8, 1, 8), 16, 8, window=1023),
        w("16 lognormal(8, 1), MLA 16/1", lognormal(16, 8, 1, 9), 16, 1, 64, 512),
        w("8 x 3000, q 4, 32/8", between(8, 2000, 4000, 10), 32, 8, seqlen_q=4),
        w("32 lognormal(7, 1), q 8", lognormal(32, 7, 1, 11), seqlen_q=8),
        w("32 lognormal(8, 1), e4m3", lognormal(32, 8, 1, 12), dtype="float8_e4m3fn"),
        w("1024: two 64k, rest 256", mixed((2, 65536), (1022, 256))),
    ]
    held_out = [
        w("1 x 700, 16/2", uniform(1, 700), 16, 2),
        w("3 x 900", uniform(3, 900)),
        w("6 x 400", between(6, 250, 512, 31)),
        w("2 x 1500, 32/8", uniform(2, 1500), 32, 8),
        w("16 x 500, 4/1", between(16, 300, 700, 32), 4, 1),
        w("4 x 1000, q 4", uniform(4, 1000), seqlen_q=4),
        w("2 x 32768, 32/8", uniform(2, 32768), 32, 8),
        w("12 x 2500, 16/2", between(12, 1500, 3500, 20), 16, 2),
        w("128 lognormal(7, 1)", lognormal(128, 7, 1, 21)),
        w("48 lognormal(8, 1.5), 64/8", lognormal(48, 8, 1.5, 22), 64, 8),
        w("two 50k among 30 x 2k, 16/2", mixed((2, 50_000), (30, 2000)), 16, 2),
        w("agentic 8 x 30k", agentic(8, 30_000, 23)),
        w("24 lognormal(8.5, 1), d 64, 64/8", lognormal(24, 8.5, 1, 24), 64, 8, 64),
        w("8 lognormal(8, 1), 16/8, d 256", lognormal(8, 8, 1, 25), 16, 8, 256),
        w("8 lognormal(9.5, 0.7), window 4095, 32/8", lognormal(8, 9.5, 0.7, 26), 32, 8, window=4095),
        w("24 lognormal(8, 1), window 1023", lognormal(24, 8, 1, 27), window=1023),
        w("4 x 20k, MLA 128/1", between(4, 10_000, 30_000, 28), 128, 1, 64, 512),
        w("4 x 8000, q 4", uniform(4, 8000), seqlen_q=4),
        w("8 lognormal(9, 1), e4m3, 32/8", lognormal(8, 9, 1, 29), 32, 8, dtype="float8_e4m3fn"),
        w("992 lognormal(6, 1)", lognormal(992, 6, 1, 30)),
        w("4096: four 16k, rest 128", mixed((4, 16384), (4092, 128))),
    ]
    return (*fitted, *(Workload(**(vars(one) | {"held_out": True})) for one in held_out))


SUITE = _suite()


# (q heads, KV heads, head dim, that of v, dtype) of layers, common ones more than once
_LAYERS = (
    *[(8, 1, 128, None, "bfloat16")] * 4, *[(16, 2, 128, None, "bfloat16")] * 2, *[(32, 8, 128, None, "bfloat16")] * 3,
    (64, 8, 128, None, "bfloat16"), (4, 1, 128, None, "bfloat16"), (64, 8, 64, None, "bfloat16"),
    (8, 1, 64, None, "bfloat16"), (16, 8, 256, None, "bfloat16"), (16, 1, 64, 512, "bfloat16"),
    (8, 1, 128, None, "float8_e4m3fn"), (32, 8, 128, None, "float8_e4m3fn"),
)  # fmt: skip
_MOST_KV_BYTES = 500 << 20  # of a layer


def random_suite(count: int, seed: int) -> tuple[Workload, ...]:
    """Decode batches drawn at random: layers, batch sizes, and lengths that are alike, skewed, of two kinds or grown.

    All are held out: never looked at while a policy is made or fitted, they say what it is worth on what nobody thought
    of. Another seed gives others.
    """
    rng, found = np.random.default_rng(seed), list[Workload]()
    while len(found) < count:
        num_heads, num_heads_k, headdim, headdim_v, dtype = _LAYERS[rng.integers(len(_LAYERS))]
        batch, mean = round(2 ** rng.uniform(0, 7)), int(2 ** rng.uniform(8, 15))
        kind, lengths = _random_lengths(rng, batch, mean)
        key_bytes = num_heads_k * (headdim + (headdim_v or headdim)) * (1 if dtype == "float8_e4m3fn" else 2)
        if sum(lengths) * key_bytes > _MOST_KV_BYTES:
            continue
        window = int(rng.choice([127, 1023, 4095])) if rng.random() < 0.15 and headdim_v is None else None
        seqlen_q = int(rng.choice([2, 4, 8])) if rng.random() < 0.15 else 1
        more = f"{num_heads}/{num_heads_k}, d {headdim}" + (", MLA" if headdim_v else "")
        more += ", e4m3" if dtype == "float8_e4m3fn" else ""
        more += (f", window {window}" if window else "") + (f", q {seqlen_q}" if seqlen_q > 1 else "")
        name = f"random {len(found)}: {batch} {kind} {mean}, {more}"
        found.append(Workload(
            name, lengths, num_heads, num_heads_k, headdim, headdim_v, window, seqlen_q, dtype, held_out=True
        ))  # fmt: skip
    return tuple(found)


def _random_lengths(rng: np.random.Generator, batch: int, mean: int) -> tuple[str, tuple[int, ...]]:
    kind, seed = rng.choice(["x", "skewed", "around", "two kinds", "grown from"]), int(rng.integers(1 << 30))
    if kind == "x":
        return kind, uniform(batch, mean)
    if kind == "skewed":
        return kind, lognormal(batch, float(np.log(mean)), float(rng.choice([0.5, 1, 1.5])), seed, 131072)
    if kind == "around":
        return kind, between(batch, mean // 2, 3 * mean // 2, seed)
    if kind == "grown from":
        return kind, agentic(batch, mean, seed)
    few = max(1, int(batch * rng.uniform(0, 0.3)))
    return kind, mixed((few, min(131072, int(mean * 2 ** rng.uniform(2, 6)))), (batch - few, mean))


# What was learnt from the first two is in balance.py. The third takes their place as what nobody looked at.
SEEN_SUITE = (*random_suite(40, 20261126), *random_suite(40, 20261127))
RANDOM_SUITE = random_suite(40, 20261128)


def sizes_to_try(longest: int, load: float) -> list[int]:
    """Key blocks per split: everything from 1 to the longest sequence in small steps, finer near an SM's load."""
    sizes = {round(size) for size in np.geomspace(1, longest, 18)}
    sizes |= {-(-longest // parts) for parts in range(1, 9)}
    sizes |= {math.ceil(load * share) for share in (0.25, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3)}
    return sorted(min(max(size, 1), longest) for size in sizes)
