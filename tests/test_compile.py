"""torch.compile, export, opcheck; and the kernels compiled for sm_90 on a machine without one."""

from __future__ import annotations

import ctypes
import inspect
import itertools
import os
import random
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import fa3_metadata
import pytest
import torch
import torch._dynamo.testing
import triton
from fa3_metadata.resolved import resolve
from fa3_metadata.triton_kernels import driver, launch

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


class Compiled:
    """In a kernel's place: keeps what it is compiled for, and what it is launched with through Triton, by name."""

    name, asm = "kernel", {"cubin": b"code"}
    metadata = SimpleNamespace(num_warps=2, shared=96)

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.compiled: list[dict[str, Any]] = []
        self.launched: list[dict[str, Any]] = []

    def warmup(self, *args: Any, grid: tuple[int, int, int], **named: Any) -> Compiled:
        self.compiled.append(self.by_name(args, grid, named))
        return self

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args, **named: self.launched.append(self.by_name(args, grid, named))

    def by_name(self, args: tuple[Any, ...], grid: tuple[int, int, int], named: dict[str, Any]) -> dict[str, Any]:
        constants = {name: value for name, value in named.items() if name.isupper()}  # not Triton's options
        return dict(zip(self.names, args, strict=False)) | constants | {"grid": grid}


class Driver:
    """In cuLaunchKernelEx's place: keeps what the kernel would read."""

    def __init__(self, like: dict[str, Any]) -> None:
        self.like, self.seen = like, []

    def __call__(self, config: int, function: int, parameters: int, extra: None) -> int:
        config = driver._Config.from_address(config)
        read: dict[str, Any] = {"grid": (config.x, config.y, config.z)}
        assert (function, config.threads, config.shared_bytes, config.stream) == (4711, 64, 96, 5)
        addresses = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))
        taken = 0
        for name, value in self.like.items():
            if value is None or name == "grid" or name.isupper():
                continue  # not a parameter of the compiled kernel
            kind = {float: ctypes.c_float, int: ctypes.c_int32}.get(type(value), ctypes.c_uint64)
            read[name] = kind.from_address(addresses[taken]).value
            taken += 1
        self.seen.append(read)
        return 0


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("policy", ["fa3", "balanced"])
def test_driver_launches_are_given_what_the_first_one_was(
    groups: int, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path past Triton's own launch, which only a GPU takes otherwise: every argument in its place."""
    lengths = torch.arange(40, dtype=torch.int32)
    out, table = torch.empty(900, dtype=torch.int32), torch.empty(99, dtype=torch.int32)
    _, problem, _, plan = fa3_metadata.api.plan_call(arguments(lengths, BUILDS[0]) | {"policy": policy})
    if groups == 1:
        made, kernel = launch.metadata_launch(problem, plan), launch.prepare_varlen_num_blocks_kernel
    else:
        made, kernel = launch.layer_groups_launch(problem, [plan] * 2), launch.prepare_layer_groups_kernel
    pointers = (out, table)[:groups]
    fake = Compiled(list(inspect.signature(kernel.fn).parameters))
    loaded = []
    utils = SimpleNamespace(load_binary=lambda *code: loaded.append(code) or ("module", 4711, 30, 0, 1024))
    monkeypatch.setattr(made, "_function", fake)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 5, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: lengths.device.index, raising=False)
    cuda: Any = None
    monkeypatch.setattr(driver, "_launch_function", lambda: cuda or (lambda *_: 201))  # no context yet
    made(pointers, (lengths, None, None, None, None))
    (first,) = fake.compiled
    assert fake.launched == [first]  # through Triton, which makes the context
    cuda = Driver(first)
    for _ in range(2):
        made(pointers, (lengths, None, None, None, None))
    again = made.repeat(pointers, (lengths, None, None, None, None))
    assert again is not None
    assert [again(), again()] == [True, True]
    assert loaded == [("kernel", b"code", 96, lengths.device.index)]  # once
    for read in cuda.seen:
        for name, value in read.items():
            wanted = first[name]
            wanted = wanted.data_ptr() if isinstance(wanted, torch.Tensor) else wanted
            assert value == (pytest.approx(wanted) if isinstance(wanted, float) else wanted), name
    assert len(cuda.seen) == 4
    strided = torch.arange(120, dtype=torch.int32)[::3]  # through Triton
    made(pointers, (strided, None, None, None, None))
    assert (fake.launched[1]["CONTIGUOUS"], fake.launched[1]["stride_0"]) == (False, 3)
    assert len(fake.compiled) == 1


@pytest.mark.parametrize("wrong", [{"num_ctas": 2}, {"global_scratch_size": 8}, {"launch_cooperative_grid": True}])
def test_kernels_that_need_more_are_left_to_triton(wrong: dict[str, Any]) -> None:
    metadata = SimpleNamespace(num_warps=2, shared=96, **wrong)
    assert driver.load(SimpleNamespace(name="kernel", asm={"cubin": b"code"}, metadata=metadata), 0) is None


# {} and the like leave num_splits at 8, which `arguments` gives.
SHARING: tuple[dict[str, Any], ...] = (
    {}, {"num_splits": 0}, {"policy": "balanced"}, {"policy": "balanced", "num_splits": 0}, {"window_size": (300, 0)},
    {"max_seqlen_q": 4, "num_splits": 0}, {"max_seqlen_q": 3000, "num_splits": 0},
    {"causal": False, "num_splits": 0}, {"page_size": None},
    {"max_seqlen_q": 5000, "causal": False, "num_splits": 0},  # split where a KV head does not fit in L2
)  # fmt: skip


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fa3_metadata.triton_kernels import kernel
absent = ("cu_seqlens_q", "seqused_q", "cu_seqlens_k_new", "leftpad_k")
floats = ("load_factor", "causal_saving", "tile_cost", "alone_cost", "split_cost")
single, several = kernel.prepare_varlen_num_blocks_kernel, kernel.prepare_layer_groups_kernel
for function, splits in ((single, 1), (single, 2), (single, 3), (single, 4), (several, 1), (several, 2)):
    full = (0, 1, -1, 2, 3, 4, 4, 2, splits, False, True)
    window = (0, 1, -1, -1, 2, 3, 4, 2, splits, splits > 1, False)
    constants = {"LAYOUT": full, "LAYOUTS": (full, window), "CONTIGUOUS": True, "EARLY": True}
    constants |= {"SLICE": 4, "GROUP": 1024}
    signature, values = {}, {}
    for parameter in function.params:
        name = parameter.name
        if name in constants or name in absent:
            signature[name], values[(parameter.num,)] = "constexpr", constants.get(name)
        else:
            pointer = name in ("out", "table", "cache_seqlens")
            signature[name] = "*i32" if pointer else "fp32" if name in floats else "i32"
    source = ASTSource(function, signature, values)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    print("compiled", function.__name__, splits)
"""


def test_kernels_compile_for_hopper_anywhere() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 6


def test_other_sizes_share_what_does_not_depend_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the plan and of the launch: the same as if made anew, whichever sizes came before."""
    monkeypatch.setattr(launch, "INTERPRETED", False)  # the launch shapes of a GPU
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
        like = resolve(problem, rules)
        for batch_size, max_seqlen_k in sizes:
            anew = resolve(replace(problem, batch_size=batch_size, max_seqlen_k=max_seqlen_k), rules)
            shared = like.like_this(batch_size, max_seqlen_k) or anew
            shared_ones += shared is not anew
            made = shared._make_launch(launch)  # before its plan is looked at
            assert vars(made) == vars(launch.metadata_launch(anew.problem, anew.plan))
            assert (shared.problem, shared.plan, shared.size) == (anew.problem, anew.plan, anew.plan.layout.size)
            like = shared
    assert shared_ones > 300


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
