"""What was skipped, in one line: hundreds of tests share a handful of reasons."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable


def cause(reason: str) -> str:
    """A reason without what differs from test to test: versions, and what to do about it."""
    reason = reason.removeprefix("Skipped: ")
    if missing := re.match(r"could not import '([\w.]+)'", reason):  # pytest.importorskip
        return f"no {missing[1].partition('.')[0]}"
    reason = re.split(r": | \(", reason, maxsplit=1)[0]
    return re.sub(r" \d+(\.\w+)+$", "", reason)


def summed_up(reasons: Iterable[str]) -> str:
    """ "3 skipped: no CUDA GPU 2, no matplotlib 1 ...", the most frequent first; empty where nothing was."""
    causes = Counter(map(cause, reasons))
    if not causes:
        return ""
    counts = ", ".join(f"{name} {count}" for name, count in causes.most_common())
    return f"{causes.total()} skipped: {counts} (-rs says which)"
