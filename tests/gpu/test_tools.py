"""Recording and measuring on a GPU: nothing is waited for, captures are left alone, what is measured is compared."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from fa3_metadata import detect_build, trace
from fa3_metadata.tools import cli, measure
from fa3_metadata.tools.decode_batch import has_paged_kernels

from ..tools.test_trace import call

pytestmark = pytest.mark.gpu


def on_gpu(lengths: list[int]) -> tuple[object, ...]:
    return call(lengths, cache_seqlens=torch.tensor(lengths, dtype=torch.int32, device="cuda"))


@pytest.mark.alone
def test_recording_waits_for_nothing(tmp_path: pathlib.Path) -> None:
    """The GPU is kept busy for a while: lengths are those at that place of the stream, read when it has come there."""
    path = trace.start(tmp_path / "steps.trace")
    problem, tensors, rules = on_gpu([900, 5000])
    trace.record(problem, tensors, rules)  # pinned memory is there from now on
    tensors.cache_seqlens.add_(0)  # a kernel's first launch loads it, which waits for the GPU
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)  # 0.1 s or more
        busy = torch.cuda.Event()
        for _ in range(5):
            tensors.cache_seqlens.add_(1)
            trace.record(problem, tensors, rules)
        busy.record()
        assert not busy.query(), "the GPU has not come there yet"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trace.stop()
    assert [int(one.lengths.cache_seqlens[0]) for one in trace.read(path)] == [900, 901, 902, 903, 904, 905]


def test_a_capture_is_left_alone_and_its_replays_can_be_told_of(tmp_path: pathlib.Path) -> None:
    path = trace.start(tmp_path / "steps.trace")
    problem, tensors, rules = on_gpu([900, 5000])
    trace.record(problem, tensors, rules)  # a copy that may be under way
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        trace.record(problem, tensors, rules)
        tensors.cache_seqlens.add_(1)
    for _ in range(3):
        trace.replayed(batch_size=2)
        graph.replay()
    trace.stop()
    assert [int(one.lengths.cache_seqlens[0]) for one in trace.read(path)] == [900, 900, 901, 902]


@pytest.mark.alone
def test_a_step_is_measured(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    """Of a small model with head dim 128, which every wheel has; upstream's build has no windows."""
    build = detect_build().build
    if reason := measure.why_not(build):
        pytest.skip(reason)
    config = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 128}
    if has_paged_kernels(build):
        config |= {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 2}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    arguments = ["measure", "--model-config", str(path), "--cache-seqlens", "2k,7x300", "--samples", "4"]
    assert cli.main([*arguments, "--rounds", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert not said["simulated"]
    assert set(said["times_us"]) == ({"step", "window 127", "full"} if "sliding_window" in config else {"step", "full"})
    for times in said["times_us"].values():
        assert {"FA3 alone", "ours", "balanced"} <= set(times)
        assert all(time > 0 for time in times.values())
    assert "ours: bit for bit" in said["checked"]
