"""How long a launch takes: integration/tools/timing.py, which `fa3-metadata measure` needs, too."""

from __future__ import annotations

import subprocess
import time

from fa3_metadata.tools.timing import (
    Before,
    Captured,
    Facts,
    Launch,
    Launches,
    Sampler,
    Times,
    apart,
    eager_sampler,
    eager_time,
    end_to_end_sampler,
    end_to_end_time,
    first_call_time,
    gpu_facts,
    graph_sampler,
    graph_time,
    host_sampler,
    host_time,
    interleaved,
    middle,
    spin,
    summary,
    warm_up,
)

__all__ = [
    "Before", "Captured", "Facts", "Launch", "Launches", "Sampler", "Times", "apart", "eager_sampler", "eager_time",
    "end_to_end_sampler", "end_to_end_time", "first_call_time", "gpu_facts", "graph_sampler", "graph_time",
    "host_sampler", "host_time", "interleaved", "middle", "spin", "subprocess", "summary", "time", "warm_up",
]  # fmt: skip
