"""What a profiler's trace shows of a decode step: one metadata launch for all layers, and none beside a graph's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fa3_metadata import MetadataPlan, MetadataPlans
from fa3_metadata.installed import load_forward

from .test_integration import PLAN, for_vllm, layer
from .test_wheels import PACKAGE, WHEEL, needs_paged_and_local, needs_wheel

pytestmark = [pytest.mark.gpu, needs_wheel, needs_paged_and_local]
LAYERS = ((-1, -1), (255, 0), (255, 0), (-1, -1), (255, 0), (255, 0))  # windows
FA3S, OURS = "prepare_varlen_num_blocks_kernel", "prepare_layer_groups_kernel"
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def trace(run: Callable[[], object]) -> tuple[list[str], list[str]]:
    """Names of what ran on the GPU, and of what the host did."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    events = profile.profiler.kineto_results.events()
    on_gpu = torch.autograd.DeviceType.CUDA
    device = [event.name() for event in events if event.device_type() == on_gpu]
    return device, [event.name() for event in events if event.device_type() != on_gpu]


def count(names: list[str], part: str) -> int:
    return sum(part in name for name in names)


class Step:
    """Six layers, two of them full; eager or captured, with our metadata or without."""

    def __init__(self) -> None:
        self.forward = load_forward(str(WHEEL))
        self.calls = [layer(window_size=window) for window in LAYERS]
        for call in self.calls[1:]:
            call["cache_seqlens"], call["page_table"] = self.calls[0]["cache_seqlens"], self.calls[0]["page_table"]
        width = self.calls[0]["page_table"].shape[1] * 64
        plan: dict[str, Any] = PLAN | {"max_seqlen_k": width}
        self.plans = {window: MetadataPlan(**plan | {"window_size": window}) for window in dict.fromkeys(LAYERS)}
        self.together = MetadataPlans(list(self.plans.values()))

    def attend(self, ours: bool) -> None:
        if ours:
            self.together.update(self.calls[0]["cache_seqlens"])
        for window, call in zip(LAYERS, self.calls, strict=True):
            arguments = for_vllm(call) if PACKAGE == "vllm" else call
            self.forward(**arguments | (self.plans[window].forward_arguments() if ours else {}))


@pytest.fixture
def step() -> Step:
    """A step that has run both ways; skips where the profiler does not see what FA3 launches in every layer."""
    made = Step()
    for ours in (True, True, False):
        made.attend(ours)
    device, _ = trace(lambda: made.attend(False))
    if not device:
        pytest.skip("the profiler records nothing on this machine")
    assert count(device, FA3S) == len(LAYERS)
    return made


def test_a_step_has_one_metadata_launch(step: Step) -> None:
    device, _ = trace(lambda: step.attend(True))
    assert (count(device, OURS), count(device, FA3S)) == (1, 0)


def test_a_captured_step_launches_its_graph_alone(step: Step) -> None:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.attend(True)
    graph.replay()
    _, host = trace(graph.replay)
    assert [name for name in host if name in LAUNCHES] == []
    assert count(host, "cudaGraphLaunch") == 1
