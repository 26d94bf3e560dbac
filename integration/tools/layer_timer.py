"""Times of one layer's attention, by the installed FA3, with splits that are given."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..api import plan_call
from ..triton_kernels.reference import Lengths, metadata_of_splits, sequence_blocks
from .balance_fit import PAGE, Attention, Batch, call_arguments, kernel_of
from .decode_batch import DecodeBatch, attend

_LAYERS = 12  # of a graph
_POOL_BYTES = 300 << 20  # of KV that layers take turns in: well over any L2
_FLUSH_BYTES = 256 << 20
_TOLERANCE = {"bfloat16": 0.02, "float8_e4m3fn": 0.05}  # relative, of the norm


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    reads: object  # tensors, which a graph does not keep alive itself


class LayerTimer:
    """A `balance_fit.Timer` on the current CUDA device.

    Each batch is captured into a CUDA graph of several layers with pages of their own. The graphs are replayed in
    turns, with L2 overwritten before each replay outside the timed region; a time is the median over replays.
    """

    def __init__(self, build: str, rounds: int = 31) -> None:
        self._build, self._rounds = build, rounds
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=self._device)

    def __call__(self, attention: Attention, batches: Sequence[Batch]) -> list[float]:
        """Microseconds of a layer for each batch. Raises `RuntimeError` where an output is wrong."""
        block_n = kernel_of(attention, self._build, self._device)[-1]
        page_bytes = PAGE * (attention.headdim + attention.headdim_v) * getattr(torch, attention.dtype).itemsize
        needed = max(batch.sequences * _pages(batch, block_n) for batch in batches)
        pages = max(2 * needed, math.ceil(_POOL_BYTES / page_bytes))
        caches = (self._random(attention, pages, PAGE, 1, attention.headdim),
                  self._random(attention, pages, PAGE, 1, attention.headdim_v))  # fmt: skip
        order = torch.randperm(pages, device=self._device).to(torch.int32)
        memory = torch.cuda.graph_pool_handle()
        graphs = [self._captured(attention, batch, block_n, caches, order, memory) for batch in batches]
        times = self._replayed(graphs)
        del graphs, caches
        torch.cuda.empty_cache()  # before the next kernel's caches
        return times

    def _captured(
        self, attention: Attention, batch: Batch, block_n: int, caches: tuple[torch.Tensor, torch.Tensor],
        order: torch.Tensor, memory: Any,
    ) -> _Graph:  # fmt: skip
        """A graph of layers that each read the next pages of `order`, round and round."""
        width = _pages(batch, block_n)
        need = batch.sequences * width  # the longest sequence's pages for each
        places = torch.arange(need * _LAYERS, device=self._device) % len(order)
        tables = order[places].view(_LAYERS, batch.sequences, width)
        heads, seqlen_q = attention.num_heads, attention.seqlen_q
        q = self._random(attention, batch.sequences, seqlen_q, heads, attention.headdim)
        lengths = torch.tensor(batch.blocks, dtype=torch.int32, device=self._device) * block_n
        qv = None
        if attention.headdim_v == 512:  # MLA
            qv = self._random(attention, batch.sequences, seqlen_q, heads, attention.headdim_v)
        layers = [DecodeBatch(q, *caches, table, lengths, causal=True, qv=qv) for table in tables]
        metadata = self._metadata(attention, batch, block_n)

        def layer(one: DecodeBatch) -> torch.Tensor:
            return attend(self._build, one, metadata, batch.bound)

        expected, made = attend(self._build, layers[0]).float(), layer(layers[0]).float()
        error = float((made - expected).norm() / expected.norm())
        if not error < _TOLERANCE[attention.dtype]:
            raise RuntimeError(f"the output of {batch} is off by {error:.3g}")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            for one in layers:
                layer(one)
        return _Graph(graph, (layers, metadata))

    def _metadata(self, attention: Attention, batch: Batch, block_n: int) -> torch.Tensor:
        arguments = call_arguments(attention, batch, block_n, self._build)
        _, problem, _, plan = plan_call(arguments, self._device)
        lengths = Lengths(np.array(batch.blocks, np.int32) * np.int32(block_n))
        rows, num_m_blocks, num_n_blocks = sequence_blocks(problem, plan, lengths)
        made = metadata_of_splits(plan, rows, num_m_blocks, num_n_blocks, np.array(batch.splits, np.int32))
        return torch.from_numpy(made).to(self._device)

    def _replayed(self, graphs: list[_Graph]) -> list[float]:
        events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in graphs]
        for i in range(self._rounds + 3):
            for graph, own in zip(graphs, events, strict=True):
                self._flush.add_(1)
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                graph.graph.replay()
                end.record()
                if i >= 3:  # the clocks are up by then
                    own.append((start, end))
            torch.cuda.synchronize()
        return [statistics.median(start.elapsed_time(end) * 1000 / _LAYERS for start, end in own) for own in events]

    def _random(self, attention: Attention, *shape: int) -> torch.Tensor:
        made = torch.randn(shape, device=self._device, dtype=torch.bfloat16)
        return made.to(getattr(torch, attention.dtype))


def _pages(batch: Batch, block_n: int) -> int:
    """Pages of the longest sequence."""
    return -(-max(batch.blocks) * block_n // PAGE)
