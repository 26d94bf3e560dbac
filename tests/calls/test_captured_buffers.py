"""What a captured graph writes to outlives the plan: the graph knows its address alone."""

from __future__ import annotations

import gc
import weakref

import fa3_metadata
import pytest
import torch


@pytest.mark.parametrize("captured", [True, False])
def test_the_buffer_of_a_captured_update_stays(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if tensors on the CPU were on a GPU. One that was never captured goes with its plan."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    plan = fa3_metadata.MetadataPlan(
        max_batch_size=4, max_seqlen_k=8192, num_heads=8, num_heads_k=1, headdim=128, device="cpu",
        build="sglang-kernel-0.4.2",
    )  # fmt: skip
    monkeypatch.setattr(plan._group, "_on_cpu", False)
    plan.update(torch.tensor([5000, 70, 900], dtype=torch.int32))
    buffer = weakref.ref(plan._group._buffer)
    monkeypatch.undo()
    del plan
    gc.collect()
    assert (buffer() is not None) == captured
