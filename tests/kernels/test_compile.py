"""torch.compile, export, opcheck; and the kernels compiled for sm_90 on a machine without one."""

from __future__ import annotations

import itertools
import os
import pathlib
import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import fa3_metadata
import pytest
import torch
import torch._dynamo.testing
import triton
from fa3_metadata.schedules import _schedules_of, schedules_of
from fa3_metadata.triton_kernels import launch
from fa3_metadata.triton_kernels.plan import make_plan
from torch._subclasses.fake_tensor import FakeTensorMode

COMPILE_KERNELS = pathlib.Path(__file__).parents[2] / ".ci" / "compile_kernels.py"

BUILDS = ("sglang-kernel-0.4.2", "vllm-0.33.0")


def arguments(cache_seqlens: torch.Tensor, build: str) -> dict[str, Any]:
    return {
        "batch_size": cache_seqlens.shape[0], "max_seqlen_q": 1, "max_seqlen_k": 8192, "num_heads": 8,
        "num_heads_k": 1, "headdim": 128, "cache_seqlens": cache_seqlens, "page_size": 64, "causal": True,
        "num_splits": 8, "build": build,
    }  # fmt: skip


def lengths(batch: int, device: torch.device) -> torch.Tensor:
    return torch.randint(0, 8192, (batch,), dtype=torch.int32, device=device)


@pytest.mark.parametrize("build", BUILDS)
def test_one_graph_for_every_batch_size(build: str, device: torch.device) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    def metadata(cache_seqlens: torch.Tensor) -> torch.Tensor:
        return fa3_metadata.get_scheduler_metadata(**arguments(cache_seqlens, build))

    compiled = torch.compile(metadata, fullgraph=True, dynamic=True, backend=counter)
    for batch in (3, 7, 8, 64, 992):
        cache_seqlens = lengths(batch, device)
        assert torch.equal(compiled(cache_seqlens), metadata(cache_seqlens))
    assert counter.frame_count == 1
    more = lengths(1500, device)
    assert torch.equal(compiled(more), metadata(more))


def test_out_under_compile(device: torch.device) -> None:
    torch._dynamo.reset()
    cache_seqlens = lengths(10, device)
    call = arguments(cache_seqlens, BUILDS[0])

    def into(out: torch.Tensor) -> torch.Tensor:
        return fa3_metadata.get_scheduler_metadata(**call, out=out)

    out = torch.full((fa3_metadata.metadata_layout(**call).size,), -7, dtype=torch.int32, device=device)
    made = torch.compile(into, fullgraph=True, backend="aot_eager")(out)
    assert torch.equal(made, fa3_metadata.get_scheduler_metadata(**call))
    with pytest.raises(ValueError, match=r"out must have exactly 49 elements under torch\.compile, got 60"):
        torch.compile(into, fullgraph=True, backend="eager")(torch.empty(60, dtype=torch.int32, device=device))


def test_export_with_a_dynamic_batch(device: torch.device) -> None:
    class Metadata(torch.nn.Module):
        def forward(self, cache_seqlens: torch.Tensor) -> torch.Tensor:
            return fa3_metadata.get_scheduler_metadata(**arguments(cache_seqlens, BUILDS[0]))

    batch = torch.export.Dim("batch", min=1, max=900)
    exported = torch.export.export(Metadata(), (lengths(7, device),), dynamic_shapes={"cache_seqlens": {0: batch}})
    cache_seqlens = lengths(33, device)
    assert torch.equal(exported.module()(cache_seqlens), Metadata()(cache_seqlens))


@pytest.mark.parametrize("build", BUILDS)
def test_opcheck(build: str, device: torch.device) -> None:
    cache_seqlens = lengths(7, device)
    operands = (
        cache_seqlens, 7, 1, 8192, 8, 1, 128, torch.bfloat16, None, None, None, None, None, None, 64, 0, True, -1, -1,
        0, False, 8, None, 0, build, "fa3", "auto", None, None, False, 2**28, None, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fa3_metadata.get_scheduler_metadata.default, operands)
    size = fa3_metadata.metadata_layout(**arguments(cache_seqlens, build)).size
    out = torch.empty(size, dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.fa3_metadata.get_scheduler_metadata_out.default, (out, *operands))


def test_few_kernels_serve_many_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random walk over 1,000 steps of a server: batch size, lengths and max_seqlen_k change, the model does not."""
    monkeypatch.setattr(launch, "INTERPRETED", False)  # the launch shapes of a GPU
    rng = random.Random(0)
    constants = set()
    for _ in range(1000):
        batch, max_seqlen_k = rng.randint(1, rng.choice([64, 992, 8192])), rng.randint(1, 131072)
        call = {"max_seqlen_q": 1, "num_heads": 8, "num_heads_k": 1, "headdim": 128, "page_size": 64, "causal": True}
        call |= {"batch_size": batch, "max_seqlen_k": max_seqlen_k, "build": BUILDS[0]}
        _, problem, _, plan = fa3_metadata.api.plan_call(call)
        made = launch.metadata_launch(problem, plan)
        constants.add((tuple(made._constants.items()), made._options["num_warps"]))
    # Six launch shapes with splits; without (short caches, over 992 sequences) as many again, and one more.
    assert 6 <= len(constants) <= 13


# {} and the like leave num_splits at 8, which `arguments` gives.
SHARING: tuple[dict[str, Any], ...] = (
    {}, {"num_splits": 0}, {"policy": "balanced"}, {"policy": "balanced", "num_splits": 0}, {"window_size": (300, 0)},
    {"max_seqlen_q": 4, "num_splits": 0}, {"max_seqlen_q": 3000, "num_splits": 0},
    {"causal": False, "num_splits": 0}, {"page_size": None},
    {"max_seqlen_q": 5000, "causal": False, "num_splits": 0},  # split where a KV head does not fit in L2
)  # fmt: skip


def test_kernels_compile_for_hopper_anywhere() -> None:
    """The kinds of .ci/compile_kernels.py, and none that driver.py would leave to Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, COMPILE_KERNELS], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    *compiled, last = run.stdout.splitlines()
    assert last == f"Triton {triton.__version__}: {len(compiled)} kernels, 0 of them not as they should be"
    ways = {way for line in compiled for way in line.split()[1].split("+")}
    assert ways == {"ONE_SPLIT", "FA3_RULE", "SEARCH", "LOAD", "FIXED"}


def test_other_sizes_share_what_does_not_depend_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the plan and of the launch: the same as if made anew, whichever sizes came before."""
    monkeypatch.setattr(launch, "INTERPRETED", False)  # the launch shapes of a GPU
    _schedules_of.cache_clear()  # other tests may have made launches for the interpreter
    sizes = [(batch, 65536) for batch in (1, 40, 33, 64, 65, 300, 992, 993, 1984, 1985, 5000, 31)]
    sizes += [
        (31, 70000),
        (8, 250000),
        (8, 120000),
        (8, 100),
        (8, 5000),
        (8, 1 << 24),
        (1, 1 << 24),
        (1, 0),
        (300, 4096),
        (300, 4097),
    ]
    shared_ones = 0
    for build, more in itertools.product((*BUILDS, "sglang-kernel-0.4.5", "vllm-0.10.0", "vllm-0.10.1"), SHARING):
        call = arguments(lengths(1, torch.device("cpu")), build) | {"cache_seqlens": None} | more
        _, problem, rules, _ = fa3_metadata.api.plan_call(call)
        known = schedules_of(problem, rules)
        assert known is schedules_of(replace(problem, batch_size=7), rules)
        for batch_size, max_seqlen_k in sizes:
            anew = replace(problem, batch_size=batch_size, max_seqlen_k=max_seqlen_k)
            families = len(known._families)
            step = known.at(batch_size, max_seqlen_k)
            shared_ones += len(known._families) == families
            plan = make_plan(anew, rules)
            made = step._make_launch(launch)  # before its plan is looked at
            assert vars(made) == vars(launch.metadata_launch(anew, plan))
            assert (*step.planned(), step.sizes) == (anew, plan, (plan.layout.size,))
    assert shared_ones > 300
    _schedules_of.cache_clear()


@pytest.mark.parametrize("arch", [90, 80])
@pytest.mark.parametrize("build", ["sglang-kernel-0.4.2", "sglang-kernel-0.4.10", "vllm-0.33.0", "vllm-0.11.0"])
def test_the_size_is_known_without_running(build: str, arch: int) -> None:
    """The fake operator's, for every build and many batches: on sm_8x splits, and with them the batch, decide on it."""
    if arch < 90 and build.startswith("vllm"):
        pytest.skip("not on sm_8x")
    for batch, num_splits, window in itertools.product((0, 1, 64, 992, 993, 2000), (0, 1, 8), ((-1, -1), (300, 0))):
        call = arguments(lengths(batch, torch.device("cpu")), build) | {"num_splits": num_splits, "window_size": window}
        call |= {"max_seqlen_k": 131072, "arch": arch}
        real = fa3_metadata.metadata_layout(**call).size
        left, right = call.pop("window_size")
        missing = {
            "qkv_dtype": torch.bfloat16, "headdim_v": None, "cu_seqlens_q": None, "cu_seqlens_k": None,
            "cu_seqlens_k_new": None, "seqused_q": None, "leftpad_k": None, "max_seqlen_k_new": 0,
            "attention_chunk": 0, "has_softcap": False, "pack_gqa": None, "sm_margin": 0, "policy": "fa3",
            "backend": "auto", "num_sms": 132, "batch_invariant": False, "max_partial_bytes": 2**28, "total_q": None,
            "forward_is_told": True, "window_left": left, "window_right": right,
        }  # fmt: skip
        with FakeTensorMode() as mode:
            call["cache_seqlens"] = mode.from_tensor(call["cache_seqlens"])
            made = torch.ops.fa3_metadata.get_scheduler_metadata(**missing | call)
        assert made.shape == (real,), call


def test_batch_invariance_compiles_for_the_batches_that_it_holds_for() -> None:
    """The size is asked for this batch alone, not for one of more than 992 sequences, which is refused for vLLM."""

    def make(cache_seqlens: torch.Tensor) -> torch.Tensor:
        return fa3_metadata.get_scheduler_metadata(
            cache_seqlens.shape[0], 1, 8192, 8, 1, 128, cache_seqlens, page_size=64, causal=True, build="vllm-0.33.0",
            policy="balanced", batch_invariant=True,
        )  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(make, backend="aot_eager", fullgraph=True)
    for batch in (5, 64):
        seqlens = lengths(batch, torch.device("cpu"))
        assert torch.equal(compiled(seqlens), make(seqlens))
    with pytest.raises(Exception, match="must be at most 992 with batch_invariant"):
        compiled(lengths(993, torch.device("cpu")))


def test_a_growing_cache_compiles_once_a_layout() -> None:
    """max_seqlen_k, which engines take from the width of the page table, is guarded where rows change alone."""
    for build, most in (("sglang-kernel-0.4.2", 1), ("vllm-0.33.0", 2)):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

        def make(cache_seqlens: torch.Tensor, table: torch.Tensor, build: str = build) -> torch.Tensor:
            return fa3_metadata.get_scheduler_metadata(
                cache_seqlens.shape[0], 1, table.shape[1] * 64, 8, 1, 128, cache_seqlens, page_size=64, causal=True,
                build=build,
            )  # fmt: skip

        compiled = torch.compile(make, backend=counter, fullgraph=True, dynamic=True)
        for pages in (700, 100, 3, 20, 7, 2000, 12, 5, 100, 31, 64, 1024):
            seqlens, table = lengths(5, torch.device("cpu")), torch.zeros(5, pages)
            assert torch.equal(compiled(seqlens, table), make(seqlens, table))
        assert counter.frame_count <= most


def test_early_launch_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    call = arguments(lengths(3, torch.device("cpu")), BUILDS[0])
    for value, early in (("1", True), ("0", False)):
        monkeypatch.setenv(launch.EARLY_VARIABLE, value)
        _, problem, _, plan = fa3_metadata.api.plan_call(call)
        made = launch.metadata_launch(problem, plan)
        assert made._constants["EARLY"] == early
        assert ("launch_pdl" in made._options) == early
    _, problem, _, plan = fa3_metadata.api.plan_call(call | {"arch": 80})
    assert not launch.metadata_launch(problem, plan)._constants["EARLY"]
