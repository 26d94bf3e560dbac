"""Whether our rules are those of published wheels, by the wheels themselves. Needs neither GPU nor CUDA.

python -m bench wheel-rules sglang-kernel==0.4.5 some-directory/vllm-0.33.0-....whl

For every wheel a line a check, `ok` or `DIFFERS` and the first difference:

    tiles            tile shapes in the names of the kernels compiled for sm_90, against our tile tables
    num_splits       what the wheel's own get_num_splits answers to thousands of random problems, against make_plan;
    pack_gqa         get_pack_gqa likewise, where it is exported
    struct layout    whether these two functions read all that was filled in for them, and nothing else
    arguments        what op and forward take, against what our rules have them take
    as recorded      all that, and the code of the metadata kernel, against what is recorded of this version or else of
                     the last one before it: a release that differs wants a look even where our rules hold

What runs on a GPU is not checked here: that is for the recorded goldens (tests/data/*.jsonl.gz). --record keeps what
was found for the tests (tests/data/wheel_rules/). Exit status: 1 if anything differs, 2 if a wheel cannot be read.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from fa3_metadata.triton_kernels.builds import RELEASES, FA3Rules, rules_for
from fa3_metadata.triton_kernels.plan import LaunchPlan, make_plan
from fa3_metadata.triton_kernels.problem import Problem
from numpy.typing import NDArray

from .wheel_facts import CELLS, FORWARD, OP, Cell, Facts, Texts, Tiles, facts_of, parameters
from .wheel_files import opened, published_versions
from .wheel_problems import NUM_PROBLEMS, as_build_is_asked, draw_problems
from .wheel_recordings import ANSWERS, EVIDENCE, FOLDER, HOST_CODE, Found, Recordings, found_in

_FORWARD_OPTIONS = ("num_splits", "pack_gqa", "sm_margin")


@dataclass(frozen=True)
class Check:
    name: str
    difference: str | None  # None: ok
    note: str = ""  # what was compared

    def __str__(self) -> str:
        return f"  {self.name:14} {'ok' if self.difference is None else 'DIFFERS'}  {self.difference or self.note}"


@lru_cache(maxsize=1)
def plans_for(problems: tuple[Problem, ...], rules: FA3Rules) -> tuple[list[Problem], list[LaunchPlan]]:
    """The problems as a build with these rules is asked them, and our plans."""
    asked = [as_build_is_asked(problem, rules) for problem in problems]
    return asked, [make_plan(problem, rules) for problem in asked]


def check_tiles(found: Tiles, rules: FA3Rules) -> Check:
    """The cells that the wheel has, against our tables."""
    note = f"{len(found)} of {len(CELLS)} cells, {sum(map(len, found.values()))} tiles"
    for cell, tiles in found.items():
        if tiles != (ours := our_tiles(cell, rules)):
            return Check("tiles", f"{cell}: the wheel has {_dimensions(tiles)}, we say {_dimensions(ours)}")
    return Check("tiles", None if found else "no forward kernel for sm_90 was found", note)


def our_tiles(cell: Cell, rules: FA3Rules) -> frozenset[tuple[int, int]]:
    """The tiles of all plans for kernels of this cell."""
    masks = {"causal": {"causal": True}, "local": {"window_size": (5, 0)}, "none": {}}
    found = set()
    for max_seqlen_q in (2, 4096):  # with and without a single MMA warpgroup
        problem = Problem(
            1, max_seqlen_q, 100_000, 1, 1, cell.headdim, cell.headdim_v, cell.dtype, has_softcap=cell.softcap,
            page_size=1 if cell.paged_non_tma else None, num_splits=1, **masks[cell.mask],  # type: ignore[arg-type]
        )  # fmt: skip
        plan = make_plan(problem, rules)
        found.add((plan.block_m, plan.block_n))
    return frozenset(found)


def _dimensions(tiles: frozenset[tuple[int, int]]) -> str:
    return " and ".join(f"{m}x{n}" for m, n in sorted(tiles))


def check_answers(
    name: str, theirs: NDArray[np.generic] | None, asked: Sequence[Problem], plans: Sequence[LaunchPlan]
) -> Check:
    """The wheel's answers against the plans' attribute `name`."""
    if theirs is None:
        return Check(name, None, "not exported")
    ours = np.array([getattr(plan, name) for plan in plans])
    wrong = np.flatnonzero(ours != theirs)
    if not len(wrong):
        return Check(name, None, f"{len(ours):,} problems")
    first = int(wrong[0])
    difference = f"the wheel says {theirs[first].item()}, we say {ours[first].item()}: {_pasted(asked[first])}"
    return Check(name, f"{len(wrong):,} of {len(ours):,}, first: {difference}")


def _pasted(problem: Problem) -> str:
    """The problem as Python, without what is left at its default."""
    default = Problem(1, 1, 1, 1, 1, problem.headdim)
    needed = ("batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads", "num_heads_k", "headdim")
    values = {name: value for name, value in vars(problem).items() if name in needed or value != vars(default)[name]}
    return f"Problem({', '.join(f'{name}={value!r}' for name, value in values.items())})"


def check_arguments(signatures: Texts, schemas: Texts, rules: FA3Rules) -> Check:
    """What the front end and the ops take, against what the rules say of it."""
    forward, forward_op = parameters(signatures[FORWARD] or ""), schemas[FORWARD] or ""
    lacks = tuple(name for name in _FORWARD_OPTIONS if name not in forward)
    difference = None
    if "scheduler_metadata" not in forward or "scheduler_metadata" not in forward_op:
        difference = "the forward takes no scheduler_metadata"
    elif ("attention_chunk" in forward_op) != rules.has_attention_chunk:
        takes = "takes one" if "attention_chunk" in forward_op else "takes none"
        difference = f"attention_chunk: the rules say {rules.has_attention_chunk}, the forward {takes}"
    elif lacks != rules.forward_lacks:
        difference = f"the forward lacks {lacks}, the rules say {rules.forward_lacks}"
    elif (schemas[OP] is None) != (signatures[OP] is None):
        difference = f"{OP} is one of op and Python function, but not both"
    return Check("arguments", difference, "makes metadata" if schemas[OP] else "makes no metadata itself")


def check_recorded(package: str, version: str, found: Found, recordings: Recordings, same_problems: bool) -> Check:
    """Everything found, against the recording of this version or of the last one before it.

    Answers only where the problems asked are the recorded ones.
    """
    if (known := recordings.like(package, version)) is None:
        return Check("as recorded", None, f"nothing is recorded of {package}")
    like, recorded = known
    keys = [key for key in EVIDENCE if same_problems or key not in ANSWERS]
    if like != version:  # compilers may differ, and a function that they inline is not exported
        inlined = [key for key in ANSWERS if None in (found[key], recorded[key])]
        keys = [key for key in keys if key not in (*HOST_CODE, *inlined)]
    changed = [EVIDENCE[key] for key in keys if found[key] != recorded[key]]
    note = f"of {like}" if like == version else f"of {like}, the nearest"
    return Check("as recorded", f"{', '.join(changed)}, from what is recorded {note}" if changed else None, note)


@dataclass(frozen=True)
class Examined:
    """A wheel's facts and all checks of them."""

    package: str
    version: str
    rules: str
    facts: Facts
    checks: tuple[Check, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.package} {self.version}, rules {self.rules}", *map(str, self.checks)])


def examine(
    name: str, like: str | None, problems: tuple[Problem, ...], recordings: Recordings, same_problems: bool
) -> Examined:
    """Everything about the wheel at a path or of that name, and its checks against the rules of `like`, or its own.

    Raises `ValueError` or `RuntimeError` if the wheel cannot be read or asked.
    """
    with opened(name) as wheel:
        rules, rules_name = rules_of(like or wheel.build, wheel.package)
        asked, plans = plans_for(problems, rules)
        facts = facts_of(wheel, asked, plans)
    checks = (
        check_tiles(facts.tiles, rules),
        check_answers("num_splits", facts.answers.num_splits, asked, plans),
        check_answers("pack_gqa", facts.answers.pack_gqa, asked, plans),
        Check("struct layout", facts.answers.layout_doubt, "all that is filled in is heeded, nothing else is read"),
        check_arguments(facts.signatures, facts.schemas, rules),
        check_recorded(wheel.package, wheel.version, found_in(facts), recordings, same_problems),
    )
    return Examined(wheel.package, wheel.version, rules_name, facts, checks)


def rules_of(build: str, package: str) -> tuple[FA3Rules, str]:
    """The rules of a build, or of the newest one of the package that is known; and their name."""
    try:
        rules = rules_for(build)
        return rules, rules.name
    except ValueError:
        newest = [release for release in RELEASES if release.package == package][-1].rules
        return newest, f"{newest.name} (of the newest release known)"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench wheel-rules", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheels", nargs="+", metavar="WHEEL", help="a .whl file, or PACKAGE==VERSION for pip to fetch")
    parser.add_argument("--like", metavar="BUILD", help="check the rules of this build, not those of each wheel's own")
    parser.add_argument("--record", action="store_true", help="keep what is found for the tests")
    parser.add_argument("--seed", type=int, help="ask other random problems than the recorded ones")
    options = parser.parse_args(argv)
    if options.record and options.seed is not None:
        parser.error("--record asks the recorded problems: not with --seed")
    if options.like:
        try:
            rules_for(options.like)
        except ValueError as error:
            parser.error(f"--like: {error}")

    recordings = Recordings.load(FOLDER)
    same_problems = options.seed is None and bool(recordings.wheels)
    problems = recordings.problems if same_problems else draw_problems(random.Random(options.seed or 0), NUM_PROBLEMS)
    status = 0
    for name in options.wheels:
        try:
            examined = examine(name, options.like, problems, recordings, same_problems)
        except (ValueError, RuntimeError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 2
            continue
        print(examined, flush=True)
        status = max(status, int(any(check.difference for check in examined.checks)))
        if options.record:
            recordings.published[examined.package] = published_versions(examined.package)
            recordings.add(examined.package, examined.version, examined.facts)
            recordings.save(problems)
            same_problems = True
    return status
