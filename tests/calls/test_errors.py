"""Bad input raises before anything is launched or written, and the message names the argument."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NoReturn

import fa3_metadata
import pytest
import torch
from fa3_metadata import api, installed
from fa3_metadata.arguments import LengthTensors
from fa3_metadata.triton_kernels.problem import Problem

GOOD = {"batch_size": 4, "max_seqlen_q": 1, "max_seqlen_k": 4096, "num_heads": 8, "num_heads_k": 1, "headdim": 128}
INTS = torch.tensor([5, 100, 4096, 0], dtype=torch.int32)
RUNNING = torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32)

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"batch_size": -1}, ValueError, "batch_size must be from 0"),
    ({"batch_size": 2.0}, TypeError, "batch_size must be an integer"),
    ({"batch_size": True}, TypeError, "batch_size must be an integer"),
    ({"batch_size": 5}, ValueError, r"cache_seqlens must have shape \(5,\), got \(4,\)"),
    ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q must be from 0"),
    ({"max_seqlen_k": -4}, ValueError, "max_seqlen_k must be from 0"),
    ({"max_seqlen_k": 2**31}, ValueError, "max_seqlen_k must be from 0 to 2147483647"),
    ({"num_heads": 0}, ValueError, "num_heads must be from 1"),
    ({"num_heads_k": 0}, ValueError, "num_heads_k must be from 1"),
    ({"num_heads_k": 3}, ValueError, "num_heads must be a multiple of num_heads_k, got 8 and 3"),
    ({"headdim": 0}, ValueError, "headdim must be from 1 to 256"),
    ({"headdim": 264}, ValueError, "headdim must be from 1 to 256, got 264"),
    ({"headdim_v": 520}, ValueError, "headdim_v must be from 1 to 512, got 520"),
    ({"qkv_dtype": torch.float32}, TypeError, "qkv_dtype must be one of .*got torch.float32"),
    ({"qkv_dtype": "bfloat16"}, TypeError, "qkv_dtype must be one of"),
    ({"cache_seqlens": None}, TypeError, "cache_seqlens must be a tensor, got NoneType"),
    ({"cache_seqlens": [5, 100, 4096, 0]}, TypeError, "cache_seqlens must be a tensor, got list"),
    ({"cache_seqlens": INTS.float()}, TypeError, "cache_seqlens must have dtype int32 or int64, got torch.float32"),
    ({"cache_seqlens": INTS[None]}, ValueError, r"cache_seqlens must have shape \(4,\), got \(1, 4\)"),
    ({"cache_seqlens": INTS.to("meta")}, ValueError, "cache_seqlens must be on a CUDA or CPU device, got meta"),
    ({"cu_seqlens_q": INTS}, ValueError, r"cu_seqlens_q must have shape \(5,\), got \(4,\)"),
    ({"cu_seqlens_k": INTS}, ValueError, r"cu_seqlens_k must have shape \(5,\), got \(4,\)"),
    ({"cu_seqlens_k_new": RUNNING.bool()}, TypeError, "cu_seqlens_k_new must have dtype int32 or int64"),
    ({"seqused_q": RUNNING}, ValueError, r"seqused_q must have shape \(4,\), got \(5,\)"),
    ({"leftpad_k": INTS.short()}, TypeError, "leftpad_k must have dtype int32 or int64, got torch.int16"),
    ({"leftpad_k": INTS.to("meta")}, ValueError, "leftpad_k must be on cpu like cache_seqlens, got meta"),
    ({"page_size": 0}, ValueError, "page_size must be from 1"),
    ({"page_size": 1.5}, TypeError, "page_size must be an integer"),
    ({"max_seqlen_k_new": -1}, ValueError, "max_seqlen_k_new must be from 0"),
    ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
    ({"has_softcap": None}, TypeError, "has_softcap must be True or False"),
    ({"pack_gqa": 1}, TypeError, "pack_gqa must be True or False, got 1"),
    ({"window_size": None}, TypeError, "window_size must be a pair"),
    ({"window_size": (1, 2, 3)}, TypeError, "window_size must be a pair"),
    ({"window_size": (-2, 0)}, ValueError, r"window_size\[0\] must be from -1"),
    ({"window_size": (0, -9)}, ValueError, r"window_size\[1\] must be from -1"),
    ({"attention_chunk": -1}, ValueError, "attention_chunk must be from 0"),
    ({"attention_chunk": 8, "build": "vllm-0.33.0"}, ValueError, "attention_chunk must be 0 for the vllm build, got 8"),
    ({"num_splits": 257}, ValueError, "num_splits must be from 0 to 256, got 257"),
    ({"num_splits": -1}, ValueError, "num_splits must be from 0 to 256, got -1"),
    ({"sm_margin": -1}, ValueError, "sm_margin must be from 0"),
    ({"sm_margin": 132}, ValueError, "sm_margin must leave at least one SM: it must be under 132, got 132"),
    ({"num_sms": 0}, ValueError, "num_sms must be from 1 to 1024"),
    ({"arch": 100}, ValueError, "arch must be one of 80, 86, 89, 90"),
    ({"arch": 80, "build": "vllm-0.33.0"}, ValueError, "arch must be 90 for the vllm build, got 80"),
    ({"out": [0] * 13}, TypeError, "out must be a tensor, got list"),
    ({"out": torch.zeros(13)}, TypeError, "out must have dtype int32, got torch.float32"),
    ({"out": torch.zeros(12, dtype=torch.int32)}, ValueError, "out must be a contiguous 1-D tensor of at least 13"),
    ({"out": torch.zeros(26, dtype=torch.int32)[::2]}, ValueError, r"out must be a contiguous .* strides \(2,\)"),
    ({"out": torch.zeros((1, 13), dtype=torch.int32)}, ValueError, r"out must be a contiguous 1-D .*shape \(1, 13\)"),
    ({"out": torch.zeros(13, dtype=torch.int32, device="meta")}, ValueError, "out must be on cpu like cache_seqlens"),
    ({"policy": "best"}, ValueError, "policy must be one of fa3, balanced, got 'best'"),
    ({"backend": "cuda"}, ValueError, "backend must be one of auto, triton, reference, native, got 'cuda'"),
    ({"build": "sgl-kernel"}, ValueError, "build 'sgl-kernel' is not known; supported are sgl-kernel 0.1.0 to 0.3.21"),
    ({"build": "xformers-1.0"}, ValueError, "build 'xformers-1.0' is not known"),
    ({"build": "sgl-kernel-0.0.9"}, ValueError, "version 0.0.9 of sgl-kernel is not supported .*another metadata"),
    ({"total_q": -1}, ValueError, "total_q must be from 0 to"),
    ({"total_q": 2.0}, TypeError, "total_q must be an integer"),
    ({"forward_is_told": "yes"}, TypeError, "forward_is_told must be True or False"),
    ({"build": "sgl-kernel-0.3.14", "arch": 80}, ValueError, "arch must be 90 for the sgl-legacy build, got 80"),
    ({"build": "vllm-0.10.0", "attention_chunk": 8}, ValueError, "attention_chunk must be 0 for the vllm-0.9.2 build"),
    ({"build": "sglang-kernel-0.5.0"}, ValueError, "version 0.5.0 of sglang-kernel is not supported"),
    ({"build": "flash-attn-3-3.0.0b1"}, ValueError, "version 3.0.0b1 of flash-attn-3 is not supported"),
    ({"build": 42}, TypeError, "build must be a string"),
    ({"backend": "native"}, RuntimeError, 'backend="native" needs'),
]  # fmt: skip


@pytest.mark.parametrize("before", [None, {}, {"max_seqlen_k": 5000}], ids=["first", "known", "known-but-for-its-size"])
@pytest.mark.parametrize(
    ("change", "error", "message"), BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, _, _) in enumerate(BAD)]
)
def test_raises_and_writes_nothing(
    change: dict[str, Any], error: type[Exception], message: str, before: dict[str, Any] | None
) -> None:
    """Also after a good call, whose checks the next one of its kind does not repeat."""
    api._kinds.clear()
    good = GOOD | {"cache_seqlens": INTS, "build": "sglang-kernel-0.4.2"}
    if before is not None:
        fa3_metadata.get_scheduler_metadata(**good | before)
    out = torch.full((13,), -7, dtype=torch.int32)
    arguments = good | {"out": out} | change
    with pytest.raises(error, match=message):
        fa3_metadata.get_scheduler_metadata(**arguments)
    assert out.tolist() == [-7] * 13


def test_layout_raises_the_same() -> None:
    with pytest.raises(ValueError, match="num_splits must be from 0 to 256"):
        fa3_metadata.metadata_layout(**GOOD, num_splits=300)


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (
            torch.zeros(12, dtype=torch.int32),
            ValueError,
            r"tensor must have shape \(13,\) for this layout, got \(12,\)",
        ),
        (torch.zeros(13), TypeError, "tensor must be an int32 tensor, got torch.float32"),
        ([0] * 13, TypeError, "tensor must be an int32 tensor, got list"),
    ],
)
def test_unpack_refuses_another_tensor(tensor: Any, error: type[Exception], message: str) -> None:
    layout = fa3_metadata.metadata_layout(**GOOD, build="sglang-kernel-0.4.2")
    with pytest.raises(error, match=message):
        fa3_metadata.unpack_metadata(tensor, layout)


def test_the_wheels_own_op_knows_no_total_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would answer for batch_size * max_seqlen_q queries, and the forward have room for another number of splits."""

    def op(_: str) -> NoReturn:
        raise NotImplementedError

    monkeypatch.setattr(installed, "native_op", op)
    monkeypatch.setattr(installed, "device_facts", lambda *_: (90, 132))
    lengths = LengthTensors(SimpleNamespace(device=torch.device("cuda", 0)))  # type: ignore[arg-type]
    problem = Problem(4, 8, 8192, 8, 1, 128, has_cu_seqlens_q=True, total_q=11)
    with pytest.raises(RuntimeError, match="leave total_q out, got 11"):
        installed.native_metadata("sglang-kernel-0.4.5", problem, lengths)
    for same in (replace(problem, total_q=32), replace(problem, total_q=None)):
        with pytest.raises(NotImplementedError):
            installed.native_metadata("sglang-kernel-0.4.5", same, lengths)
