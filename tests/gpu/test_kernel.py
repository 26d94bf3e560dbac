"""The compiled kernel by itself: hardware facts, capture, other streams, what it costs the host."""

from __future__ import annotations

import ctypes

import fa3_metadata
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from fa3_metadata.triton_kernels.reciprocal import approximate_reciprocal

pytestmark = pytest.mark.gpu

PROBLEM = {"batch_size": 64, "max_seqlen_q": 1, "max_seqlen_k": 65536, "num_heads": 8, "num_heads_k": 1, "headdim": 128,
           "page_size": 64, "num_splits": 32, "build": "sglang-kernel-0.4.2"}  # fmt: skip


def lengths(seed: int = 0, batch: int = 64) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(0, 65536, (batch,), dtype=torch.int32, device="cuda", generator=generator)


@triton.jit
def _reciprocals(out, N: tl.constexpr):
    i = tl.arange(0, N)
    x = (i + 1).to(tl.float32)
    y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(out + i, y)


def test_reciprocal_table_is_what_the_hardware_computes() -> None:
    out = torch.empty(1024, device="cuda")
    _reciprocals[(1,)](out, 1024)
    table = np.array([approximate_reciprocal(n) for n in range(1, 1025)])
    assert np.array_equal(out.cpu().numpy().view(np.int32), table.view(np.int32))


def test_out_means_no_allocation_and_no_synchronisation() -> None:
    cache_seqlens, out = lengths(), torch.empty(400, dtype=torch.int32, device="cuda")
    fa3_metadata.get_scheduler_metadata(**PROBLEM, cache_seqlens=cache_seqlens, out=out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        fa3_metadata.get_scheduler_metadata(**PROBLEM, cache_seqlens=cache_seqlens, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_is_one_node_of_a_graph() -> None:
    cache_seqlens, out = lengths(), torch.empty(400, dtype=torch.int32, device="cuda")
    fa3_metadata.get_scheduler_metadata(**PROBLEM, cache_seqlens=cache_seqlens, out=out)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        fa3_metadata.get_scheduler_metadata(**PROBLEM, cache_seqlens=cache_seqlens, out=out)
    nodes = ctypes.c_size_t()
    get_nodes = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes
    assert get_nodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(nodes)) == 0
    assert nodes.value == 1


def test_follows_the_current_stream() -> None:
    expected = fa3_metadata.get_scheduler_metadata(**PROBLEM, cache_seqlens=lengths())
    cache_seqlens, arriving = torch.zeros_like(lengths()), lengths()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # on any other stream the launch would overtake this and read zeros
        cache_seqlens.copy_(arriving)
        out = fa3_metadata.get_scheduler_metadata(**PROBLEM, cache_seqlens=cache_seqlens)
    stream.synchronize()
    for row in fa3_metadata.metadata_layout(**PROBLEM).rows.values():
        assert torch.equal(out[row], expected[row])


def test_reads_arch_and_sms_from_the_device() -> None:
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    made = fa3_metadata.get_scheduler_metadata(**PROBLEM, cache_seqlens=lengths())
    named = fa3_metadata.get_scheduler_metadata(**PROBLEM, cache_seqlens=lengths(), num_sms=sms)
    row = fa3_metadata.metadata_layout(**PROBLEM).rows["num_splits_dynamic"]
    assert torch.equal(made[row], named[row])
    fewer = fa3_metadata.get_scheduler_metadata(**PROBLEM, cache_seqlens=lengths(), num_sms=16)
    assert not torch.equal(made[row], fewer[row])


def test_auto_on_cuda_is_the_kernel_and_agrees_with_the_reference() -> None:
    made = fa3_metadata.get_scheduler_metadata(**PROBLEM, cache_seqlens=lengths())
    reference = fa3_metadata.get_scheduler_metadata(**PROBLEM, cache_seqlens=lengths(), backend="reference")
    for row in fa3_metadata.metadata_layout(**PROBLEM).rows.values():
        assert torch.equal(made[row], reference[row])


def test_lengths_and_out_on_different_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="out must be on cuda:0 like cache_seqlens, got cpu"):
        fa3_metadata.get_scheduler_metadata(**PROBLEM, cache_seqlens=lengths(), out=torch.empty(400, dtype=torch.int32))
    with pytest.raises(ValueError, match="leftpad_k must be on cuda:0 like cache_seqlens, got cpu"):
        fa3_metadata.get_scheduler_metadata(**PROBLEM, cache_seqlens=lengths(), leftpad_k=lengths().cpu())
