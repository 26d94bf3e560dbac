"""What the bound on splits costs: a layer's time by the forward's num_splits, the splits themselves being the same.

FA3's combine kernel takes 8 output rows of a sequence together, 16 where a row of v has 64 numbers or fewer. It
combines rows that are none, too: of as many splits as it was compiled for, a power of two (balance.py). Four sequences
of 6,144 keys in eight splits each; graphs and timed region are those of `python -m bench schedules`.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import fa3_metadata
import numpy as np
import torch
from fa3_metadata.api import plan_call
from fa3_metadata.installed import load_forward
from fa3_metadata.tools.timing import gpu_facts, middle
from fa3_metadata.triton_kernels.balance import has_spare_rows
from fa3_metadata.triton_kernels.reference import Lengths

from .decode_step import why_not
from .schedules import Layers, capture, replayed, variant_of_splits
from .workloads import Workload

LENGTHS, SPLITS, ROUNDS = (6144,) * 4, 8, 10
BOUNDS = (8, 16, 17, 32, 33, 64, 65, 128)
SHAPES = (  # q heads, KV heads, head dim, that of v, queries
    (4, 1, 128, None, 1), (4, 1, 128, None, 2), (8, 1, 128, None, 1), (12, 1, 128, None, 1), (8, 1, 64, None, 1),
    (16, 1, 64, None, 1), (4, 1, 256, None, 1), (8, 1, 256, None, 1), (16, 1, 64, 512, 1), (4, 1, 64, 512, 1),
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench combining", description="what the bound on splits costs")
    parser.parse_args(argv)
    build = fa3_metadata.detect_build().build
    if missing := why_not(build):
        print(f"combining is timed on a Hopper GPU with sglang-kernel: {missing}", file=sys.stderr)
        return 2
    forward = load_forward(build)
    print(gpu_facts())
    print("us a layer by num_splits; * some rows of the combine kernel are none")
    for shape in SHAPES:
        heads, heads_k, dim, dim_v, queries = shape
        layers = Layers(Workload("", LENGTHS, heads, heads_k, dim, dim_v, None, queries))
        _, problem, rules, _ = plan_call(layers.problem)
        lengths, splits = Lengths(np.array(LENGTHS, np.int32)), np.full(len(LENGTHS), SPLITS, np.int32)
        told = {bound: variant_of_splits(problem, rules, lengths, splits, bound) for bound in BOUNDS}
        graphs = []
        for bound, more in told.items():
            forward(**layers.call, page_table=layers.tables[0], **more)
            graphs.append((str(bound), capture(layers, partial(forward, **layers.call, **more))))
        times = replayed(graphs, layers, ROUNDS)
        name = (
            f"{heads}/{heads_k}, d {dim}"
            + (f", v {dim_v}" if dim_v else "")
            + (f", q {queries}" if queries > 1 else "")
        )
        said = "  ".join(f"{bound}: {middle(some):.2f}" for bound, some in times.items())
        print(f"{'*' if has_spare_rows(problem) else ' '}{name:18s} {heads * queries:3d} rows   {said}", flush=True)
        del graphs, told, layers
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
