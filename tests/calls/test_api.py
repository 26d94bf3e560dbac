"""The public interface: names, signatures, layouts, detection, output tensors."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import replace
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata import installed as fa3_installed
from fa3_metadata.triton_kernels import builds

GOOD = {"batch_size": 6, "max_seqlen_q": 1, "max_seqlen_k": 9000, "num_heads": 8, "num_heads_k": 1, "headdim": 128}
LENGTHS = torch.tensor([5, 9000, 4096, 0, 700, 700], dtype=torch.int32)
EMPTY = inspect.Parameter.empty


def parameters(function: Any) -> list[tuple[str, Any, bool]]:
    return [
        (p.name, p.default, p.kind is inspect.Parameter.KEYWORD_ONLY)
        for p in inspect.signature(function).parameters.values()
    ]


def test_exported_names() -> None:
    assert fa3_metadata.__all__ == [
        "DetectedBuild", "MetadataLayout", "MetadataPlan", "MetadataPlans", "detect_build", "flash_attn_with_kvcache",
        "get_scheduler_metadata", "install", "metadata_layout", "status", "step", "trace", "uninstall",
        "unpack_metadata", "wrap_forward",
    ]  # fmt: skip
    assert all(hasattr(fa3_metadata, name) for name in fa3_metadata.__all__ if name != "flash_attn_with_kvcache")


def test_signature_is_that_of_sglang_kernel_with_keyword_only_extras() -> None:
    positional = [
        ("batch_size", EMPTY), ("max_seqlen_q", EMPTY), ("max_seqlen_k", EMPTY), ("num_heads", EMPTY),
        ("num_heads_k", EMPTY), ("headdim", EMPTY), ("cache_seqlens", EMPTY), ("qkv_dtype", torch.bfloat16),
        ("headdim_v", None), ("cu_seqlens_q", None), ("cu_seqlens_k", None), ("cu_seqlens_k_new", None),
        ("seqused_q", None), ("leftpad_k", None), ("page_size", None), ("max_seqlen_k_new", 0), ("causal", False),
        ("window_size", (-1, -1)), ("attention_chunk", 0), ("has_softcap", False), ("num_splits", 0),
        ("pack_gqa", None), ("sm_margin", 0),
    ]  # fmt: skip
    extras = [("build", None), ("out", None), ("policy", "fa3"), ("backend", "auto"), ("arch", None), ("num_sms", None)]
    extras += [("batch_invariant", False), ("max_partial_bytes", 2**28), ("total_q", None), ("forward_is_told", True)]
    expected = [(name, default, False) for name, default in positional] + [(n, d, True) for n, d in extras]
    assert parameters(fa3_metadata.get_scheduler_metadata) == expected
    same = {"cache_seqlens": None} | {name: default for name, default in positional if name != "cache_seqlens"}
    for name, default, _ in parameters(fa3_metadata.metadata_layout):
        assert name in dict(extras) or same[name] == default


@pytest.mark.parametrize(
    ("build", "more", "rows", "size"),
    [
        ("sglang-kernel-0.4.2", {}, ("num_splits_dynamic", "num_m_blocks", "varlen_batch_idx"), 25),
        ("sgl-kernel-0.3.21", {"causal": True, "page_size": 64},
         ("num_splits_dynamic", "num_m_blocks", "varlen_batch_idx", "num_nheads_in_l2"), 33),
        ("flash-attn-3-3.0.0", {"window_size": (100, 0)},
         ("num_splits_dynamic", "num_m_blocks", "num_nheads_in_l2"), 25),
        ("sgl-kernel-0.3.20", {"arch": 80, "num_splits": 1},
         ("num_splits_dynamic", "num_m_blocks", "varlen_batch_idx"), 24),
        ("vllm-0.33.0", {"num_splits": 1}, ("packed_seqlen_q",), 9),
        ("vllm-0.33.0", {"num_splits": 4, "window_size": (100, 0)},
         ("packed_seqlen_q", "num_splits_dynamic", "num_nheads_in_l2"), 25),
        ("vllm-0.33.0", {"num_splits": 4, "batch_size": 993}, ("packed_seqlen_q",), 997),
    ],
)  # fmt: skip
def test_layout(build: str, more: dict[str, Any], rows: tuple[str, ...], size: int) -> None:
    layout = fa3_metadata.metadata_layout(**(GOOD | more), build=build)
    assert (layout.row_names, layout.size) == (rows, size)
    assert layout.semaphore == (None if more.get("arch") == 80 else size - 1)
    assert layout.is_sorted == ("varlen_batch_idx" in rows)
    batch, stride = layout.batch_size, layout.row_stride
    assert list(layout.rows.values()) == [slice(i * stride, i * stride + batch) for i in range(len(rows))]


def test_what_the_rows_mean() -> None:
    made = fa3_metadata.get_scheduler_metadata(**GOOD, cache_seqlens=LENGTHS, num_splits=8, build="sglang-kernel-0.4.2")
    layout = fa3_metadata.metadata_layout(**GOOD, num_splits=8, build="sglang-kernel-0.4.2")
    rows = fa3_metadata.unpack_metadata(made, layout)
    # Blocks of 176 keys: 1, 52, 24, 0, 4, 4. With 85 in all, one block for each of the 132 SMs is the fair share:
    # 8 splits at most leave cdiv(52, 8) = 7 and cdiv(24, 8) = 3 blocks to a split. Longest first, ties in batch order.
    assert rows["varlen_batch_idx"].tolist() == [1, 2, 0, 4, 5, 3]
    assert rows["num_splits_dynamic"].tolist() == [8, 8, 1, 4, 4, 1]
    assert rows["num_m_blocks"].tolist() == [1] * 6
    assert made[layout.size - 1] == 0


def test_out_is_written_in_place_and_may_be_larger() -> None:
    memory = torch.full((40,), -7, dtype=torch.int32)
    made = fa3_metadata.get_scheduler_metadata(**GOOD, cache_seqlens=LENGTHS, out=memory, build="sglang-kernel-0.4.2")
    assert made.data_ptr() == memory.data_ptr()
    assert made.shape == (25,)
    assert memory[25:].tolist() == [-7] * 15


def test_arguments_may_be_positional() -> None:
    positional = fa3_metadata.get_scheduler_metadata(*GOOD.values(), LENGTHS, torch.float16, 128)
    assert torch.equal(positional, fa3_metadata.get_scheduler_metadata(**GOOD, cache_seqlens=LENGTHS))


def test_cu_seqlens_k_is_accepted_and_ignored() -> None:
    plain = fa3_metadata.get_scheduler_metadata(**GOOD, cache_seqlens=LENGTHS)
    running = torch.arange(7, dtype=torch.int32)
    assert torch.equal(plain, fa3_metadata.get_scheduler_metadata(**GOOD, cache_seqlens=LENGTHS, cu_seqlens_k=running))


@pytest.mark.parametrize(
    ("installed", "build"),
    [
        ({}, "sglang-kernel-0.4.2"),
        ({"vllm": "0.33.0"}, "vllm-0.33.0"),
        ({"flash-attn-3": "3.0.0", "vllm": "0.27.1"}, "vllm-0.27.1"),
        ({"fa3-fwd": "0.0.3"}, "fa3-fwd-0.0.3"),
        ({"sgl-kernel": "0.3.21", "sglang-kernel": "0.4.2.post1"}, "sglang-kernel-0.4.2.post1"),
        ({"sgl-kernel": "0.3.20", "vllm": "0.33.0"}, "sgl-kernel-0.3.20"),
    ],
)
def test_detection(installed: dict[str, str], build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fa3_installed.BUILD_VARIABLE, raising=False)
    monkeypatch.setattr(fa3_installed, "installed_version", installed.get)
    fa3_installed._search.cache_clear()
    found = fa3_metadata.detect_build()
    fa3_installed._search.cache_clear()
    assert found.build == build
    assert all(name in found.reason for name in installed)
    builds.rules_for(build)


def test_environment_overrides_detection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fa3_installed.BUILD_VARIABLE, "vllm-0.33.0")
    assert fa3_metadata.detect_build().build == "vllm-0.33.0"
    assert fa3_metadata.metadata_layout(**GOOD, num_splits=1).row_names == ("packed_seqlen_q",)


@pytest.mark.parametrize(
    ("build", "rules"),
    [
        ("sgl-kernel-0.3.20", builds.UPSTREAM),
        ("sgl-kernel-0.3.21+cu130", builds.UPSTREAM),
        ("sgl_kernel-0.3.21", builds.UPSTREAM),
        ("sgl-kernel-0.1.0", builds.SGL_LEGACY),
        ("sgl-kernel-0.3.16", builds.SGL_LEGACY),
        ("sgl-kernel-0.3.16.post1", builds.UPSTREAM),  # the layout changed at a .post ...
        ("sgl-kernel-0.3.16.post2", builds.SGL_LEGACY),  # ... and back
        ("sgl-kernel-0.3.16.post3", builds.UPSTREAM),
        ("sglang-kernel-0.4.0", builds.SGLANG),
        ("sglang-kernel-0.4.2.post2", builds.SGLANG),
        ("sglang-kernel-0.4.5", builds.SGLANG_0_4_5),
        ("sglang-kernel-0.4.6.post1+cu130", builds.SGLANG_0_4_5),
        ("sglang-kernel-0.4.10", builds.SGLANG_0_4_5),
        ("vllm-0.8.5.post1", builds.VLLM_0_8_5),
        ("vllm-0.9.0.1", builds.VLLM_0_8_5),
        ("vllm-0.9.1", builds.VLLM_0_8_5),
        ("vllm-0.9.2", builds.VLLM_0_9_2),
        ("vllm-0.10.0", builds.VLLM_0_9_2),
        ("vllm-0.10.1.1", builds.VLLM_0_10_1),
        ("vllm-0.11.0", builds.VLLM_0_10_1),
        ("vllm-0.11.1", builds.VLLM_0_11_1),
        ("vllm-0.16.0", builds.VLLM_0_11_1),
        ("vllm-0.17.0", builds.VLLM_0_17),
        ("vllm-0.18.1", builds.VLLM_0_17),
        ("vllm-0.19.0", builds.VLLM),
        ("vllm-0.33.0", builds.VLLM),
        ("fa3-fwd-0.0.3", builds.UPSTREAM),
        ("flash-attn-3-3.0.0", builds.UPSTREAM),
        ("flash_attn_3-3.0", builds.UPSTREAM),
    ],
)
def test_any_version_of_a_known_package_has_its_rules(build: str, rules: builds.FA3Rules) -> None:
    assert builds.rules_for(build) is rules


@pytest.mark.parametrize(
    "build",
    ["sgl-kernel-0.0.9", "sgl-kernel-0.3.21.post1", "sglang-kernel-0.4.4.post1", "sglang-kernel-0.4.10.post1",
     "sglang-kernel-0.4.11", "vllm-0.8.4", "vllm-0.18.2", "vllm-0.33.1", "vllm-0.34.0", "fa3-fwd-0.0.2",
     "vllm-0.33.0rc1", "vllm-0.33.0.dev4", "vllm-1.2.3.4.5"],
)  # fmt: skip
def test_a_version_without_evidence_says_what_to_do(build: str) -> None:
    with pytest.raises(ValueError, match=r"is not supported .*Install a supported version, or, if you know"):
        builds.rules_for(build)


@pytest.mark.parametrize(
    ("older", "newer"),
    [("0.3.16", "0.3.16.post1"), ("0.3.16.post6", "0.3.17"), ("0.9.0", "0.9.0.1"), ("0.9.0.1", "0.9.1"),
     ("0.4.9", "0.4.10"), ("0.4.6", "0.4.6.post1+cu130"), ("3.0", "3.0.1")],
)  # fmt: skip
def test_versions_compare_as_versions(older: str, newer: str) -> None:
    assert builds.version_key(older) < builds.version_key(newer)


def test_ranges_of_releases_are_in_order_and_apart() -> None:
    for package in builds.PACKAGES:
        ends = [builds.version_key(v) for r in builds.RELEASES if r.package == package for v in (r.oldest, r.newest)]
        assert all(ends)
        assert ends == sorted(ends)


@pytest.mark.parametrize(
    "wrong", [{"rows": (("num_keys", "always"),)}, {"rows": (("num_m_blocks", "sometimes"),)},
              {"packs_with_splits": "never"}, {"splits_count": "sequences"}],
)  # fmt: skip
def test_rules_that_nothing_understands_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="upstream"):
        replace(builds.UPSTREAM, **wrong)


def test_works_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fa3_metadata as f\n"
        "c = torch.tensor([70, 5000], dtype=torch.int32)\n"
        "made = f.get_scheduler_metadata(2, 1, 8192, 8, 1, 128, c, num_splits=4, build='sglang-kernel-0.4.2')\n"
        "print(made[:2].tolist())\n"
        "try: f.get_scheduler_metadata(2, 1, 8192, 8, 1, 128, c, backend='triton')\n"
        "except RuntimeError as error: print(error)\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[0] == "[4, 1]"
    assert 'backend="triton" needs Triton' in printed


def test_triton_on_cpu_tensors_needs_the_interpreter() -> None:
    code = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import torch, fa3_metadata as f\n"
        "c = torch.tensor([70, 5000], dtype=torch.int32)\n"
        "try: f.get_scheduler_metadata(2, 1, 8192, 8, 1, 128, c, backend='triton')\n"
        "except RuntimeError as error: print(error)\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "set TRITON_INTERPRET=1 before triton is imported" in printed


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", ["cache_seqlens", "cu_seqlens_q", "leftpad_k"])
def test_out_may_not_overlap_lengths(name: str, backend: str, device: torch.device) -> None:
    """They are read by all programs while some write."""
    memory = torch.zeros(400, dtype=torch.int32, device=device)
    call = GOOD | {"cache_seqlens": LENGTHS.to(device), "build": "sglang-kernel-0.4.2", "backend": backend}
    size = fa3_metadata.metadata_layout(**GOOD, build="sglang-kernel-0.4.2").size
    count = GOOD["batch_size"] + (name == "cu_seqlens_q")
    for start in (0, size - 1):
        inside = memory[100 + start :][:count]
        with pytest.raises(ValueError, match=f"out must not overlap {name}"):
            fa3_metadata.get_scheduler_metadata(**call | {name: inside}, out=memory[100:])
    for start in (100 - count, 100 + size):  # side by side
        fa3_metadata.get_scheduler_metadata(**call | {name: memory[start:][:count]}, out=memory[100:])
    spread = memory[: 100 + 2 * count : 30][:count]  # around the start of it
    if len(spread) == count:
        with pytest.raises(ValueError, match=f"out must not overlap {name}"):
            fa3_metadata.get_scheduler_metadata(**call | {name: spread}, out=memory[100:])
