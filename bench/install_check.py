"""What `fa3_metadata.install()` gives to an sgl-kernel without metadata: newer SGLang's decode, as it stands.

    python -m bench install-check            # needs a Hopper GPU and an installed sgl_kernel
    python -m bench install-check --quick    # few layers and no times

sgl-kernel 0.3.20 and 0.3.21 take `scheduler_metadata`, but have no `get_scheduler_metadata`. After `install()` this
does what the FlashAttention-3 backend of SGLang 0.5.11 does: its imports, its call for the metadata of a decode batch,
the copy into the buffer that CUDA graphs read, and the forward of each layer with the arguments that `forward_decode`
passes (but for `out`, which these versions lack). Each layer's output must have the bits that it has without metadata,
eagerly and in a captured graph whose lengths change. Then layers are timed without metadata and with it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import fa3_metadata
import torch
from fa3_metadata.installed import installed_version

from .newer_torch import avoid_misread_tensors

PACKAGES = ("sglang-kernel", "sgl-kernel")
HEADDIM, MAX_BATCH = 128, 32
BATCHES = {  # skewed; the longest is the length of the page table, a multiple of FA3's 128 keys a block
    1: (16384,),
    8: (32768, 8192, 4096, 2048, 1024, 512, 300, 77),
    32: (32768, 16384, 8192, 8192, *(4096,) * 4, *(1024,) * 8, *(300,) * 16),
}
TIMED_REPLAYS = 41
EQUAL, SLOWER = "outputs equal", "NOT LOWER"  # of a case's line
Graph = tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]


@dataclass(frozen=True)
class Case:
    heads: int
    heads_k: int
    page_size: int
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        batch = f"batch {len(self.lengths):2}, longest {max(self.lengths)}"
        return f"{f'{self.heads}/{self.heads_k}':>4} heads, {batch}, page {self.page_size:2}"

    def other_lengths(self, rng: random.Random) -> list[int]:
        """Lengths of another step.

        SGLang asks for the metadata of the longest sequence of the step; a layer of a captured graph goes by its page
        table, and without metadata may then split more. So one sequence always ends in the page table's last block.
        """
        longest = max(self.lengths)
        drawn = [int(longest ** rng.random()) for _ in self.lengths]
        drawn[rng.randrange(len(drawn))] = longest - rng.randrange(64)
        return drawn


def cases(quick: bool) -> list[Case]:
    batches = [BATCHES[8]] if quick else list(BATCHES.values())
    shapes = [(heads, page) for page in (1, 64) for heads in ((8, 1), (32, 8))]
    return [Case(*heads, page, lengths) for heads, page in shapes for lengths in batches]


class Decode:
    """A decode batch and its layers, each with a KV cache of its own, handled as SGLang's backend does."""

    def __init__(self, case: Case, layers: int) -> None:
        from sgl_kernel.flash_attn import flash_attn_with_kvcache, get_scheduler_metadata

        self.case, self.flash_attn_with_kvcache = case, flash_attn_with_kvcache
        self.get_scheduler_metadata = get_scheduler_metadata
        batch, page = len(case.lengths), case.page_size
        self.cache_seqlens = torch.tensor(case.lengths, dtype=torch.int32, device="cuda")
        self.cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        pages = [-(-length // page) for length in case.lengths]
        order = torch.randperm(sum(pages), device="cuda").to(torch.int32)
        columns = torch.arange(max(pages), device="cuda")
        # A sequence that outgrows its pages comes round to them again: what is read there does not matter.
        self.page_table = torch.stack([own[columns % len(own)] for own in order.split(pages)])
        cache = (len(order), page, case.heads_k, HEADDIM)
        self.layers = [(rand(batch, case.heads, HEADDIM), rand(*cache), rand(*cache)) for _ in range(layers)]
        self.buffer = torch.zeros(1 + MAX_BATCH * 4, dtype=torch.int32, device="cuda")

    def compute_metadata(self, max_seq_len_k: int) -> torch.Tensor:
        """`_compute_scheduler_metadata` of SGLang."""
        made: torch.Tensor = self.get_scheduler_metadata(
            batch_size=len(self.case.lengths),
            max_seqlen_q=1,
            max_seqlen_k=max_seq_len_k,
            num_heads=self.case.heads,
            num_heads_k=self.case.heads_k,
            headdim=HEADDIM,
            cache_seqlens=self.cache_seqlens,
            qkv_dtype=torch.bfloat16,
            cu_seqlens_q=self.cu_seqlens_q,
            page_size=self.case.page_size,
            causal=True,
            has_softcap=False,
            num_splits=0,
        )
        return made

    def refill_buffer(self, max_seq_len_k: int) -> torch.Tensor:
        """What SGLang does before it captures or replays a graph; returns what the graph's layers are given."""
        made = self.compute_metadata(max_seq_len_k)
        n = made.shape[0]
        self.buffer[:n] = made
        self.buffer[n:] = 0
        return self.buffer[:n]

    def attend(self, page_table: torch.Tensor, scheduler_metadata: torch.Tensor | None) -> list[torch.Tensor]:
        """The output of every layer; its call is that of SGLang's `forward_decode`."""
        return [
            self.flash_attn_with_kvcache(
                q=q,
                k_cache=k_cache,
                v_cache=v_cache,
                page_table=page_table,
                cache_seqlens=self.cache_seqlens,
                cu_seqlens_q=self.cu_seqlens_q,
                max_seqlen_q=1,
                softmax_scale=HEADDIM**-0.5,
                causal=True,
                window_size=(-1, -1),
                softcap=0.0,
                k_descale=None,
                v_descale=None,
                return_softmax_lse=False,
                num_splits=0,
                ver=3,
                scheduler_metadata=scheduler_metadata,
            )
            for q, k_cache, v_cache in self.layers
        ]

    def set_lengths(self, lengths: list[int]) -> int:
        """Write the lengths of a step; the longest."""
        self.cache_seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        return max(lengths)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def require_equal(got: list[torch.Tensor], wanted: list[torch.Tensor], what: str) -> None:
    wrong = [layer for layer, pair in enumerate(zip(got, wanted, strict=True)) if not torch.equal(*pair)]
    if wrong:
        sys.exit(f"{what}: with metadata the outputs of layers {wrong} have other bits than without")


def capture(run: Callable[[], list[torch.Tensor]]) -> Graph:
    run()  # compiles, loads
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph, outputs


def check_eager(decode: Decode, rng: random.Random, steps: int) -> None:
    page = decode.case.page_size
    for _ in range(steps):
        longest = decode.set_lengths(lengths := decode.case.other_lengths(rng))
        table = decode.page_table[:, : -(-longest // page)].contiguous()  # run eagerly, SGLang cuts it to the longest
        metadata = decode.compute_metadata(longest)
        require_equal(decode.attend(table, metadata), decode.attend(table, None), f"{decode.case}: eager, {lengths}")


def check_graphs(decode: Decode, without: Graph, ours: Graph, rng: random.Random, replays: int) -> None:
    for _ in range(replays):
        longest = decode.set_lengths(lengths := decode.case.other_lengths(rng))
        decode.refill_buffer(longest)
        for output in (*without[1], *ours[1]):
            output.fill_(torch.nan)  # which equals nothing, should a layer not write its output
        without[0].replay()
        ours[0].replay()
        require_equal(ours[1], without[1], f"{decode.case}: in a graph, {lengths}")


def time_replays(graphs: list[torch.cuda.CUDAGraph]) -> list[float]:
    """Device time of a replay of each graph in microseconds: the median, replayed in turns."""
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(TIMED_REPLAYS):
        for graph, own in zip(graphs, times, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graph.replay()  # not timed: while it runs, the host gets ahead, and no launch is waited for
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            own.append(start.elapsed_time(end) * 1000)
    return [statistics.median(own) for own in times]


def check_case(case: Case, quick: bool) -> str:
    """The line that says how it went; ends the process where an output differs."""
    torch.manual_seed(0)
    rng = random.Random(str(case))
    layers = 4 if quick else 32
    decode, longest = Decode(case, layers), max(case.lengths)
    check_eager(decode, rng, 2)
    decode.set_lengths(list(case.lengths))
    metadata = decode.refill_buffer(longest)
    without = capture(lambda: decode.attend(decode.page_table, None))
    check_graphs(decode, without, capture(lambda: decode.attend(decode.page_table, metadata)), rng, 5)
    if quick:
        return f"{case}: {EQUAL}"
    # The timed graph also makes the metadata, once for all layers, which SGLang does before the replay.
    decode.set_lengths(list(case.lengths))
    timed = capture(lambda: decode.attend(decode.page_table, decode.refill_buffer(longest)))
    times = time_replays([without[0], timed[0]])
    require_equal(timed[1], without[1], f"{case}: in a graph that makes the metadata")
    alone, ours = (time / layers for time in times)
    ratio = f"ratio {ours / alone:.3f}" + ("" if ours < alone else f", {SLOWER}")
    return f"{case}: {EQUAL}; us a layer: {alone:6.2f} without, {ours:6.2f} with, {ratio}"


def main(argv: list[str] | None = None) -> None:
    """Exits with a message, and status 1, where an output differs or a layer is not faster with metadata."""
    parser = argparse.ArgumentParser(
        prog="python -m bench install-check", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--quick", action="store_true", help="few layers, no times")
    options = parser.parse_args(argv)
    found = next((f"{name} {version}" for name in PACKAGES if (version := installed_version(name))), None)
    if found is None or not torch.cuda.is_available():
        sys.exit(f"needs a CUDA GPU and one of {', '.join(PACKAGES)}; found {found or 'none of them'}")
    all_cases = cases(options.quick)
    print(f"{found}, torch {torch.__version__}, {torch.cuda.get_device_name()}: {len(all_cases)} cases", flush=True)
    if avoid_misread_tensors():
        print(
            "the wheel was built for another torch: it is kept from tensors that it would misread, see newer_torch.py"
        )
    print(f"install(): {fa3_metadata.install()}", flush=True)
    slower = 0
    for case in all_cases:
        line = check_case(case, options.quick)
        slower += SLOWER in line
        print(line, flush=True)
        torch.cuda.empty_cache()
    print(f"{len(all_cases)} cases: every output equal to that without metadata", flush=True)
    if slower:
        sys.exit(f"but in {slower} cases layers take no less time with metadata than without: {SLOWER} above")
