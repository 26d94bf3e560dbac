"""install(wrap_forward=True) reaches a forward that an engine has kept, and uninstall() puts it back there."""

from __future__ import annotations

import functools
import pathlib
import sys
import zipfile
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import fa3_metadata
import pytest
import torch

from ..helpers.published import wheel_or_skip

BUILD = "sglang-kernel-0.4.2"
ORDER = [
    "q", "k_cache", "v_cache", "k", "v", "qv", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx",
    "cache_leftpad", "page_table", "cu_seqlens_q", "cu_seqlens_k_new", "max_seqlen_q", "rotary_seqlens", "q_descale",
    "k_descale", "v_descale", "softmax_scale", "causal", "window_size", "attention_chunk", "softcap",
    "rotary_interleaved", "scheduler_metadata", "num_splits", "pack_gqa", "sm_margin", "only_qv", "return_softmax_lse",
    "sinks", "out",
]  # fmt: skip
DEFAULTS = {"causal": False, "window_size": (-1, -1), "softcap": 0.0, "num_splits": 0, "rotary_interleaved": True}


class Kernel:
    """A stand-in for sgl_kernel.flash_attn, with the forward's own order of parameters."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        source = ", ".join(f"{name}={DEFAULTS.get(name)!r}" for name in ORDER)
        namespace: dict[str, Any] = {"calls": self.calls}
        exec(f"def flash_attn_with_kvcache({source}):\n    calls.append(dict(locals()))\n    return q", namespace)
        self.forward = namespace.pop("flash_attn_with_kvcache")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    kernel = Kernel()
    module = ModuleType("sgl_kernel.flash_attn")
    module.flash_attn_with_kvcache = kernel.forward  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = module.get_scheduler_metadata = len  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sgl_kernel", ModuleType("sgl_kernel"))
    monkeypatch.setitem(sys.modules, "sgl_kernel.flash_attn", module)
    yield kernel
    fa3_metadata.uninstall()


CALL = {
    "q": torch.zeros(3, 8, 64, dtype=torch.bfloat16), "k_cache": torch.zeros(90, 16, 1, 64, dtype=torch.bfloat16),
    "v_cache": torch.zeros(90, 16, 1, 64, dtype=torch.bfloat16), "page_table": torch.zeros(3, 30, dtype=torch.int32),
    "cache_seqlens": torch.tensor([400, 5, 70], dtype=torch.int32), "max_seqlen_q": 1, "causal": True,
    "cu_seqlens_q": torch.arange(4, dtype=torch.int32), "num_splits": 0,
}  # fmt: skip


def test_objects_and_dicts_that_keep_it(kernel: Kernel) -> None:
    """SGLang 0.5.10 keeps the forward in its backend, 0.5.11 and later in a dict that a function remembers."""
    backend = SimpleNamespace(flash_attn_with_kvcache=kernel.forward)
    another = SimpleNamespace(attend=kernel.forward)

    @functools.cache
    def kept() -> dict[str, Any]:
        return {"flash_attn_with_kvcache": kernel.forward}

    kept()
    said = fa3_metadata.install(wrap_forward=True, build=BUILD)
    assert said.endswith("wrapped flash_attn_with_kvcache in sgl_kernel.flash_attn, 2 more that keep it")
    ours = sys.modules["sgl_kernel.flash_attn"].flash_attn_with_kvcache
    assert ours is not kernel.forward
    assert backend.flash_attn_with_kvcache is kept()["flash_attn_with_kvcache"] is ours
    assert another.attend is kernel.forward, "another name"
    assert fa3_metadata.status()["installed"][0] == "sgl_kernel.flash_attn.flash_attn_with_kvcache"
    fa3_metadata.uninstall()
    assert backend.flash_attn_with_kvcache is kept()["flash_attn_with_kvcache"] is kernel.forward
    assert fa3_metadata.status()["installed"] == []


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize(
    ("version", "path"), [("0.5.11", "jit_kernel"), ("0.5.23", "kernels/ops/attention")], ids=["0.5.11", "0.5.23"]
)
def test_sglangs_own(
    kernel: Kernel, version: str, path: str, called_before: bool, monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
) -> None:  # fmt: skip
    """The module of a published SGLang that finds the forward, and remembers it, with stand-ins for what it imports."""
    wheel = wheel_or_skip("sglang", version)
    flag = SimpleNamespace(get=lambda: True)
    stand_ins: dict[str, dict[str, Any]] = {
        "sglang": {}, "sglang.kernels": {}, "sglang.kernels.jit": {}, "sglang.jit_kernel": {}, "sglang.srt": {},
        "sglang.kernels.jit.utils": {"cache_once": functools.cache},
        "sglang.jit_kernel.utils": {"cache_once": functools.cache},
        "sglang.kernels.kernel_api_logging": {"debug_kernel_api": lambda function: function},
        "sglang.kernel_api_logging": {"debug_kernel_api": lambda function: function},
        "sglang.srt.environ": {"envs": SimpleNamespace(SGLANG_USE_SGL_FA3_KERNEL=flag)},
        "sglang.srt.utils": {"get_device_capability": lambda *_: (9, 0), "is_musa": lambda: False},
        "sglang.srt.utils.common": {"get_device_capability": lambda *_: (9, 0), "is_musa": lambda: False},
    }  # fmt: skip
    for name, values in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    with zipfile.ZipFile(wheel) as archive:
        source = archive.read(f"sglang/{path}/flash_attention_v3.py")
    theirs = ModuleType("sglang.flash_attention_v3")
    exec(compile(source, "flash_attention_v3.py", "exec"), vars(theirs))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    if called_before:
        theirs.flash_attn_with_kvcache(**CALL)
    fa3_metadata.install(wrap_forward=True, build=BUILD)
    with fa3_metadata.step():
        theirs.flash_attn_with_kvcache(**CALL)
    assert kernel.calls[-1]["scheduler_metadata"] is not None
    fa3_metadata.uninstall()
    with fa3_metadata.step():
        theirs.flash_attn_with_kvcache(**CALL)
    assert (kernel.calls[-1]["scheduler_metadata"] is None) == called_before, "a first call remembers what it finds"
