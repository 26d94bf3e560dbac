"""Whether new constants of policy "balanced" make better schedules than those in use: by times of a real forward.

The batches are others than those that the constants were fitted to. Each is timed with the splits of FA3's own rule,
of the constants in use and of the new ones; where two of them come to the same, once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..api import plan_call
from ..triton_kernels.balance import costs_from, least_combined_us
from ..triton_kernels.reference import splits_of
from .balance_fit import ATTENTIONS, Attention, Batch, Timer, call_arguments, kernel_of

_BETTER = 0.998  # the mean of new times by those of the constants in use, below which a table is better
_WORSE = 1.03  # a time by another's from which on it is clearly worse
RULES = _FA3, _IN_USE, _NEW = ("FA3's rule", "in use", "new")


@dataclass(frozen=True)
class Checked:
    """Microseconds of a layer by each of RULES."""

    name: str
    times: dict[str, float]

    def ratio(self, rule: str) -> float:
        """The new constants' time by that of another rule."""
        return self.times[_NEW] / self.times[rule]

    @property
    def is_worse(self) -> bool:
        to_used, to_fa3 = self.ratio(_IN_USE), self.ratio(_FA3)
        return to_used >= _WORSE or (to_fa3 >= _WORSE and to_used > 1)


@dataclass(frozen=True)
class Verdict:
    checked: list[Checked]

    @property
    def is_better(self) -> bool:
        """Than the constants in use, and nowhere clearly worse than these or, where these are not, than FA3's rule."""
        if not self.checked or self._mean(_IN_USE) >= _BETTER:
            return False
        return not any(one.is_worse for one in self.checked)

    def lines(self) -> list[str]:
        found = [f"{'us a layer, of batches not fitted to':72s}" + "".join(f"{rule:>12s}" for rule in RULES)]
        found += [f"{one.name:72s}" + "".join(f"{one.times[rule]:12.2f}" for rule in RULES) for one in self.checked]
        for rule in (_FA3, _IN_USE) if self.checked else ():
            ratios = [one.ratio(rule) for one in self.checked]
            found.append(f"the new constants' time by that of {rule!r}: {self._mean(rule):.4f} in the geometric mean, "
                         f"{min(ratios):.3f} to {max(ratios):.3f}")  # fmt: skip
        return found

    def _mean(self, rule: str) -> float:
        return math.exp(sum(math.log(one.ratio(rule)) for one in self.checked) / len(self.checked))


def check_lengths(num_sms: int) -> dict[str, tuple[int, ...]]:
    """Key blocks of sequences: few and many, short and long, alike and very different."""
    rng = np.random.default_rng(1)

    def drawn(sequences: int, blocks: float, sigma: float) -> tuple[int, ...]:
        return tuple(max(1, int(n)) for n in rng.lognormal(math.log(blocks), sigma, sequences))

    return {
        "2 of 4 blocks": (4,) * 2,
        "8 of 8": (8,) * 8,
        "3 of 60": (60,) * 3,
        "16 around 20": drawn(16, 20, 1),
        "32 around 30": drawn(32, 30, 1),
        "48 around 15": drawn(48, 15, 1.3),
        "24 around 40, alike": drawn(24, 40, 0.3),
        "one of 400 among 40 of 8": (400, *(8,) * 40),
        "half of the SMs, 12 each": (12,) * max(1, num_sms // 2),
        "a third of the SMs, around 25": drawn(max(1, num_sms // 3), 25, 0.8),
    }


def check(
    new: dict[str, Any], in_use: dict[str, Any], num_sms: int, build: str, timer: Timer,
    device: torch.device | None = None,
) -> Verdict:  # fmt: skip
    """Times of all check batches, for every kernel of the new table."""
    left = [tuple(one["kernel"]) for one in new["kernels"]]
    checked: list[Checked] = []
    for attention in ATTENTIONS:
        kernel = kernel_of(attention, build, device)
        if kernel not in left:
            continue
        left.remove(kernel)
        named = {f"{attention.name}: {name}": blocks for name, blocks in check_lengths(num_sms).items()}
        by_rule = [_by_rule(attention, blocks, (in_use, new), kernel, build, device) for blocks in named.values()]
        every = list(dict.fromkeys(batch for one in by_rule for batch in one.values()))
        times = dict(zip(every, timer(attention, every), strict=True))
        for name, one in zip(named, by_rule, strict=True):
            checked.append(Checked(name, {rule: times[batch] for rule, batch in one.items()}))
    return Verdict(checked)


def _by_rule(
    attention: Attention, blocks: Sequence[int], tables: tuple[dict[str, Any], dict[str, Any]],
    kernel: tuple[int, int, int, int, int], build: str, device: torch.device | None,
) -> dict[str, Batch]:  # fmt: skip
    """The sequences with the splits of each of RULES, and with its bound."""
    unsplit = Batch(tuple(blocks), (1,) * len(blocks))
    asked = call_arguments(attention, unsplit, kernel[-1], build) | {"num_splits": 0}
    query, key = np.ones(len(blocks), np.int32), np.array(blocks, np.int32)
    plans = [plan_call(asked, device)[3]]
    _, problem, _, balanced = plan_call(asked | {"policy": "balanced"}, device)
    least_us = least_combined_us(problem, balanced.num_splits)
    costs = [costs_from(table, kernel, balanced.num_sms, least_us=least_us) for table in tables]
    plans += [replace(balanced, costs=one) for one in costs]
    splits = [tuple(map(int, splits_of(plan, query, key))) for plan in plans]
    return {
        rule: replace(unsplit, splits=some, bound=plan.num_splits)
        for rule, some, plan in zip(RULES, splits, plans, strict=True)
    }
