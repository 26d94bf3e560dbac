"""What a captured graph writes to outlives the plan: the graph knows its address alone."""

from __future__ import annotations

import collections
import gc
import weakref

import fa3_metadata
import pytest
import torch
from fa3_metadata.schedules import Step


@pytest.mark.parametrize("captured", [True, False])
def test_the_buffer_of_a_captured_update_stays(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if tensors on the CPU were on a GPU. One that was never captured goes with its plan."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    plan = fa3_metadata.MetadataPlan(
        max_batch_size=4, max_seqlen_k=8192, num_heads=8, num_heads_k=1, headdim=128, device="cpu",
        build="sglang-kernel-0.4.2",
    )  # fmt: skip
    group = plan._group
    monkeypatch.setattr(group, "_on_cpu", False)
    # Where groups of layers share a launch, its numbers lie in a tensor, too.
    monkeypatch.setattr(group, "_tables", torch.zeros(1, 4, dtype=torch.int32))
    monkeypatch.setattr(group, "_table_of", collections.defaultdict(int))
    monkeypatch.setattr(Step, "launch", lambda *_: None)
    plan.update(torch.tensor([5000, 70, 900], dtype=torch.int32))
    written, read = weakref.ref(group._buffer), weakref.ref(group._tables)
    monkeypatch.undo()
    del plan, group
    gc.collect()
    assert [one() is not None for one in (written, read)] == [captured, captured]
