"""The launch past Triton's own: what it gives the kernel, and every kernel that it leaves to Triton."""

from __future__ import annotations

import ctypes
import inspect
import logging
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace
from typing import Any, get_type_hints

import fa3_metadata
import pytest
import torch
import triton
from fa3_metadata.triton_kernels import driver, launch
from fa3_metadata.triton_kernels.kernel import Numbers

# What Triton 3.5.1 says of a kernel, and what later ones say more or no longer.
METADATA: dict[str, Any] = {
    "allowed_dot_input_precisions": ["tf32", "tf32x3", "ieee"], "arch": "sm90", "backend_name": "cuda",
    "cluster_dims": (1, 1, 1), "debug": False, "default_dot_input_precision": "tf32",
    "deprecated_fp8_dot_operand_dtypes": ["fp8e4b15"], "enable_fp_fusion": True,
    "extern_libs": [["libdevice", "libdevice.10.bc"]], "global_scratch_align": 1, "global_scratch_size": 0,
    "hash": "9113fa23", "instrumentation_mode": "", "ir_override": None, "launch_cooperative_grid": False,
    "launch_pdl": False, "max_num_imprecise_acc_default": 1073741824, "maxnreg": None, "name": "kernel",
    "num_ctas": 1, "num_stages": 3, "num_warps": 2, "profile_scratch_align": 1, "profile_scratch_size": 0,
    "ptx_options": None, "ptx_version": None, "sanitize_overflow": True, "shared": 96,
    "supported_fp8_dtypes": ["fp8e4b15", "fp8e4nv", "fp8e5"], "target": ("cuda", 90, 32), "tensordesc_meta": [],
    "tmem_size": 0, "triton_version": "3.5.1", "warp_size": 32,
}  # fmt: skip
NO_LONGER = ("cluster_dims",)
FROM_3_6: dict[str, Any] = {"enable_reflect_ftz": True, "triton_version": "3.6.0"}
FROM_3_9: dict[str, Any] = {
    **FROM_3_6, "clc": False, "fpsan_homomorphic_casts": False, "min_shared_mem": None, "sched4reg": False,
    "triton_version": "3.9.0",
}  # fmt: skip
LATER = {name: value for name, value in METADATA.items() if name not in NO_LONGER}
OF_VERSION = {"3.5.1": METADATA, "3.6.0": LATER | FROM_3_6, "3.9.0": LATER | FROM_3_9}
LOADED = (17, 4711, 30, 0, 1024)  # module, function, registers, spills, the most threads
POINTER, NUMBER, FLOAT = ".u64 .ptr .global .align 1", ".u32", ".f32"
KINDS = (POINTER, POINTER, NUMBER, NUMBER, FLOAT, POINTER, POINTER)  # two of each of ours, a float, Triton's two


def ptx(kinds: tuple[str, ...], name: str = "kernel") -> str:
    parameters = ",\n".join(f"\t.param {kind} {name}_param_{i}" for i, kind in enumerate(kinds))
    return f"\t// .globl {name}\n.visible .entry {name}(\n{parameters}\n)\n.reqntid 64\n{{\n\tld.param.b64 %rd1;\n}}\n"


def compiled(fields: dict[str, Any], code: str) -> SimpleNamespace:
    metadata = namedtuple("KernelMetadata", sorted(fields))(**fields)
    return SimpleNamespace(name="kernel", asm={"cubin": b"code", "ptx": code}, metadata=metadata)


def without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """In the place of CUDA's driver, loading is: what the second entry answers, or raises."""
    calls: list[Any] = [[], LOADED]

    def load_binary(*arguments: Any) -> Any:
        calls[0].append(arguments)
        if isinstance(calls[1], Exception):
            raise calls[1]
        return calls[1]

    utils = SimpleNamespace(load_binary=load_binary)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    monkeypatch.setattr(driver, "_launch_function", lambda: lambda *_: 0)
    return calls


def load(fields: dict[str, Any], code: str = ptx(KINDS), early: bool = False) -> driver.LoadedKernel | None:
    return driver.load(lambda: compiled(fields, code), 3, 2, 3, early)


@pytest.mark.parametrize("version", OF_VERSION)
def test_kernels_of_every_triton_are_launched_past_it(version: str, loads: list[Any]) -> None:
    made = load(OF_VERSION[version])
    assert made is not None
    assert (made.function, made.num_warps, made.shared_bytes) == (4711, 2, 96)
    assert loads[0] == [("kernel", b"code", 96, 3)]
    assert load(OF_VERSION[version] | {"launch_pdl": True}, early=True) is not None


@pytest.mark.parametrize("version", OF_VERSION)
@pytest.mark.parametrize(
    "name",
    ["num_warps", "shared", "num_ctas", "warp_size", "global_scratch_size", "profile_scratch_size", "launch_pdl",
     "launch_cooperative_grid", "tensordesc_meta", "tmem_size", "instrumentation_mode"],
)  # fmt: skip
def test_a_kernel_of_which_nothing_is_said_is_left_to_triton(name: str, version: str, loads: list[Any]) -> None:
    assert load(without(OF_VERSION[version], name)) is None
    assert loads[0] == []


def test_triton_3_5_has_cluster_dimensions(loads: list[Any]) -> None:
    assert load(without(METADATA, "cluster_dims")) is None
    assert load(without(without(METADATA, "cluster_dims"), "triton_version")) is None
    assert load(METADATA | {"cluster_dims": (2, 1, 1)}) is None
    assert load(OF_VERSION["3.9.0"] | {"cluster_dims": (2, 1, 1)}) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_ctas", 2), ("warp_size", 64), ("global_scratch_size", 8), ("profile_scratch_size", 8),
     ("launch_cooperative_grid", True), ("launch_pdl", True), ("tensordesc_meta", [{"swizzle": 3}]), ("tmem_size", 128),
     ("instrumentation_mode", "gsan"), ("shared", 48 * 1024 + 1), ("shared", -1), ("shared", None), ("num_warps", None),
     ("num_warps", 64), ("clc", True), ("min_shared_mem", 4096), ("tensor_scratch_size", 16), ("launch_later", True)],
)  # fmt: skip
@pytest.mark.parametrize("version", OF_VERSION)
def test_a_kernel_that_may_need_more_is_left_to_triton(name: str, value: Any, version: str, loads: list[Any]) -> None:
    assert load(OF_VERSION[version] | {name: value}) is None


def test_what_is_new_and_not_set_does_no_harm(loads: list[Any]) -> None:
    more = {"scratch_of_clusters": 0, "launch_later": False, "to_come": None, "descriptors": []}
    assert load(OF_VERSION["3.9.0"] | more) is not None


def test_a_kernel_compiled_early_is_launched_early(loads: list[Any]) -> None:
    assert load(METADATA, early=True) is None


@pytest.mark.parametrize(
    "code",
    [
        ptx(KINDS[:-1]),  # one pointer to scratch memory
        ptx((*KINDS, POINTER)),  # three
        ptx(KINDS[1:]),
        ptx((POINTER, POINTER, ".u64", NUMBER, FLOAT, POINTER, POINTER)),  # an int64
        ptx((NUMBER, POINTER, POINTER, NUMBER, FLOAT, POINTER, POINTER)),  # in another order
        ptx(KINDS).replace("kernel_param_3", "kernel_param_3[4]"),  # an array
        ptx(KINDS).replace(".u32", ".align 64 .b8", 1),
        ptx(()),
        ptx(KINDS, "another_kernel"),
        "",
    ],
)
def test_a_kernel_that_takes_other_parameters_is_left_to_triton(code: str, loads: list[Any]) -> None:
    assert load(METADATA, code) is None
    assert loads[0] == []


@pytest.mark.parametrize("missing", ["cubin", "ptx"])
def test_a_kernel_without_code_or_ptx_is_left_to_triton(missing: str, loads: list[Any]) -> None:
    made = compiled(METADATA, ptx(KINDS))
    del made.asm[missing]
    assert driver.load(lambda: made, 3, 2, 3, False) is None


@pytest.mark.parametrize(
    "answer",
    [LOADED[:4], (*LOADED, 0), list(LOADED), ("module", *LOADED[1:]), (17, "function", 30, 0, 1024),
     (17, 0, 30, 0, 1024), (17, 4711, 30, 0, 32), (17, 4711, 30, 0, None), None, RuntimeError("out of memory")],
)  # fmt: skip
def test_another_answer_of_load_binary_means_that_triton_launches(answer: Any, loads: list[Any]) -> None:
    loads[1] = answer
    assert load(METADATA) is None
    assert len(loads[0]) == 1


def test_no_exception_leaves_loading(
    loads: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> Any:
        raise AttributeError("no attribute 'warmup'")

    with caplog.at_level(logging.DEBUG, "fa3_metadata"):
        assert driver.load(fails, 0, 2, 3, False) is None
        monkeypatch.setattr(driver, "_launch_function", fails)  # a libcuda without cuLaunchKernelEx
        assert load(METADATA) is None
        monkeypatch.setattr(triton.runtime, "driver", None)
        assert load(METADATA) is None
    assert [record.levelno for record in caplog.records] == [logging.DEBUG] * 3
    assert "no attribute 'warmup'" in caplog.messages[0]


class Kernel:
    """In a kernel's place: keeps what it is compiled for, and what it is launched with through Triton, by name."""

    def __init__(self, names: list[str], lacks: str = "") -> None:
        self.names, self.lacks = names, lacks
        self.compiled: list[dict[str, Any]] = []
        self.launched: list[dict[str, Any]] = []

    def warmup(self, *args: Any, grid: tuple[int, int, int], **named: Any) -> SimpleNamespace:
        self.compiled.append(self.by_name(args, grid, named))
        given = [value for value in args if value is not None]
        kinds = [POINTER if isinstance(one, torch.Tensor) else FLOAT if type(one) is float else NUMBER for one in given]
        fields = METADATA | {"launch_pdl": named.get("launch_pdl", False)}
        return compiled(without(fields, self.lacks), ptx((*kinds, POINTER, POINTER)))

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
        scratch = [ctypes.c_uint64.from_address(addresses[taken + i]).value for i in range(2)]
        assert scratch == [0, 0]
        self.seen.append(read)
        return 0


def arguments(cache_seqlens: torch.Tensor) -> dict[str, Any]:
    return {
        "batch_size": cache_seqlens.shape[0], "max_seqlen_q": 1, "max_seqlen_k": 8192, "num_heads": 8,
        "num_heads_k": 1, "headdim": 128, "cache_seqlens": cache_seqlens, "page_size": 64, "causal": True,
        "num_splits": 8, "build": "sglang-kernel-0.4.2",
    }  # fmt: skip


def make_launch(cache_seqlens: torch.Tensor, **more: Any) -> launch.Launch:
    _, problem, _, plan = fa3_metadata.api.plan_call(arguments(cache_seqlens) | more)
    return launch.metadata_launch(problem, plan)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, loads: list[Any]) -> list[Any]:
    """As if tensors on the CPU were on the GPU."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_loaded", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 5, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: torch.empty(0).device.index, raising=False)
    return loads


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("policy", ["fa3", "balanced"])
def test_driver_launches_are_given_what_the_first_one_was(
    groups: int, policy: str, monkeypatch: pytest.MonkeyPatch, on_a_gpu: list[Any]
) -> None:
    """The path past Triton's own launch, which only a GPU takes otherwise: every argument in its place."""
    lengths = torch.arange(40, dtype=torch.int32)
    out, table = torch.empty(900, dtype=torch.int32), torch.empty(99, dtype=torch.int32)
    _, problem, _, plan = fa3_metadata.api.plan_call(arguments(lengths) | {"policy": policy})
    if groups == 1:
        made, kernel = launch.metadata_launch(problem, plan), launch.prepare_varlen_num_blocks_kernel
    else:
        made, kernel = launch.layer_groups_launch(problem, [plan] * 2), launch.prepare_layer_groups_kernel
    pointers = (out, table)[:groups]
    fake = Kernel(list(inspect.signature(kernel.fn).parameters))
    monkeypatch.setattr(made, "_function", fake)
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
    assert on_a_gpu[0] == [("kernel", b"code", 96, lengths.device.index)]  # once
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


@pytest.mark.parametrize("why", ["turned off", "metadata"])
def test_triton_launches_instead(
    why: str, monkeypatch: pytest.MonkeyPatch, on_a_gpu: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Each time, and the log says so once."""
    if why == "turned off":
        monkeypatch.setenv(launch.DRIVER_VARIABLE, "0")
    lengths = torch.arange(40, dtype=torch.int32)
    made, out = make_launch(lengths), torch.empty(900, dtype=torch.int32)
    names = list(inspect.signature(launch.prepare_varlen_num_blocks_kernel.fn).parameters)
    fake = Kernel(names, lacks="num_ctas" if why == "metadata" else "")
    monkeypatch.setattr(made, "_function", fake)
    with caplog.at_level(logging.DEBUG, "fa3_metadata"):
        for _ in range(3):
            made((out,), (lengths, None, None, None, None))
        assert made.repeat((out,), (lengths, None, None, None, None)) is None
    assert (len(fake.launched), len(fake.compiled), on_a_gpu[0]) == (3, int(why == "metadata"), [])
    assert sum("num_ctas" in message for message in caplog.messages) == int(why == "metadata")


def test_fused_multiply_add_is_said_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = torch.arange(40, dtype=torch.int32)
    assert make_launch(lengths)._options["enable_fp_fusion"] is True
    assert make_launch(lengths, policy="balanced")._options["enable_fp_fusion"] is False
    plans = [fa3_metadata.api.plan_call(arguments(lengths) | {"policy": policy}) for policy in ("fa3", "balanced")]
    made = launch.layer_groups_launch(plans[0][1], [plan for *_, plan in plans])
    assert made._options["enable_fp_fusion"] is False


@pytest.mark.parametrize("version", ["2.3.1", "3.4.0", "3.4.1+git1234"])
def test_an_older_triton_is_named_with_the_oldest_that_will_do(version: str) -> None:
    code = (
        f"import triton; triton.__version__ = {version!r}\n"
        "import torch, fa3_metadata as f\n"
        "c = torch.tensor([70, 5000], dtype=torch.int32)\n"
        "call = dict(num_splits=4, build='sglang-kernel-0.4.2')\n"
        "print(f.get_scheduler_metadata(2, 1, 8192, 8, 1, 128, c, backend='reference', **call)[:2].tolist())\n"
        "for _ in range(2):\n"
        "    try: f.get_scheduler_metadata(2, 1, 8192, 8, 1, 128, c, backend='triton', **call)\n"
        "    except RuntimeError as error: print(error)\n"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert made[0] == "[4, 1]"
    for said in made[1:3]:
        assert 'backend="triton" needs Triton' in said
        assert f"Triton {version}" in said
        assert "3.5 or newer" in said


def lacks_num_ctas(made: Any) -> SimpleNamespace:
    broken = compiled(without(made.metadata._asdict(), "num_ctas"), made.asm["ptx"])
    return SimpleNamespace(name=made.name, asm=made.asm, metadata=broken.metadata)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["fa3", "balanced"])
def test_both_ways_of_launching_write_the_same(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past Triton; through Triton, by the variable; through Triton, since the metadata lack a field."""
    lengths = torch.randint(0, 8192, (70,), dtype=torch.int32, device="cuda")
    call = arguments(lengths) | {"policy": policy}
    wanted = fa3_metadata.get_scheduler_metadata(**call, backend="reference")

    def write() -> bool:
        """Whether it was launched past Triton."""
        monkeypatch.setattr(launch, "_loaded", {})
        made = make_launch(lengths, policy=policy)
        for _ in range(2):
            out = torch.full_like(wanted, -7)
            made((out,), (lengths, None, None, None, None))
            assert torch.equal(out, wanted)
        return made.repeat((out,), (lengths, None, None, None, None)) is not None

    assert write()
    monkeypatch.setenv(launch.DRIVER_VARIABLE, "0")
    assert not write()
    monkeypatch.delenv(launch.DRIVER_VARIABLE)
    real = driver.load
    monkeypatch.setattr(launch, "load", lambda compile_, *rest: real(lambda: lacks_num_ctas(compile_()), *rest))
    assert not write()


@pytest.mark.parametrize("policy", ["fa3", "balanced"])
def test_numbers_are_what_the_kernel_takes_them_for(policy: str) -> None:
    """They are passed in order, and a float by the type of its field."""
    names = list(inspect.signature(launch.prepare_varlen_num_blocks_kernel.fn).parameters)
    first = names.index(Numbers._fields[0])
    assert tuple(names[first : first + len(Numbers._fields)]) == Numbers._fields
    assert names[first + len(Numbers._fields)] == "LAYOUT"
    lengths = torch.arange(40, dtype=torch.int32)
    *_, plan = fa3_metadata.api.plan_call(arguments(lengths) | {"policy": policy})
    numbers = launch._numbers(plan)
    assert {name: type(number) for name, number in numbers._asdict().items()} == get_type_hints(Numbers)
