"""Attaching to vLLM and detaching from it, and what is refused, on CPU and a stand-in for vLLM."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import threading
from importlib import import_module
from typing import Any

import pytest
from fa3_metadata.engines import vllm as adapter
from fa3_metadata.engines.vllm_names import PACKAGE
from fa3_metadata.installed import BUILD_VARIABLE

from ..helpers.vllm_stand_in import (
    BUILD,
    DECODE,
    MLA,
    check,
    expected,
    gqa_builder,
    make_batch,
    metadata_of,
    mla_builder,
)


@pytest.fixture(autouse=True)
def _build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BUILD_VARIABLE, BUILD)


def test_modules_imported_after_attach(root: pathlib.Path) -> None:
    attached = adapter.attach(in_place=True)
    assert attached.modules == [adapter.FA_UTILS, PACKAGE]
    assert not {adapter.GQA, adapter.MLA} & set(sys.modules)  # for vLLM to import when it is ready
    builder = gqa_builder(graphs=True)
    for _ in range(2):  # the first call finds the builder as vLLM made it
        check(metadata_of(builder, DECODE), expected(DECODE, 32), DECODE.size)
    assert attached.waiting == {adapter.MLA: "FlashAttnMLAMetadataBuilder"}
    mla = mla_builder(graphs=True)
    for _ in range(2):
        check(mla._build_decode(DECODE), expected(DECODE, 32, **MLA), DECODE.size)
    assert (attached.waiting, attached.used) == ({}, True)
    assert attached.modules == [adapter.FA_UTILS, adapter.GQA, adapter.MLA, PACKAGE]


def test_switched_off_vllm_is_left_alone(root: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = import_module(adapter.INTERFACE).get_scheduler_metadata
    monkeypatch.setenv("FA3_METADATA_DISABLE", "1")
    left = adapter.attach()
    assert (left.modules, left.waiting, adapter.attached_now()) == ([], {}, None)
    assert import_module(adapter.FA_UTILS).get_scheduler_metadata is own
    left.detach()
    monkeypatch.delenv("FA3_METADATA_DISABLE")
    attached = adapter.attach()
    assert attached.modules
    assert adapter.attached_now() == f"{BUILD}, in_place=False, policy fa3"
    left.detach()
    assert adapter.attached_now() is not None, "what was left alone takes nothing back"


@pytest.mark.parametrize("in_place", [False, True])
def test_detach_puts_everything_back(root: pathlib.Path, in_place: bool) -> None:
    own = import_module(adapter.INTERFACE).get_scheduler_metadata
    modules = [import_module(name) for name in (adapter.FA_UTILS, adapter.GQA)]
    builder = modules[1].FlashAttentionMetadataBuilder
    before = dict(vars(builder))
    attached = adapter.attach(in_place)
    assert adapter.attach(in_place) is attached
    modules.append(import_module(adapter.MLA))  # imported while attached
    (root / "v1" / "late.py").write_text(f"from {adapter.FA_UTILS} import get_scheduler_metadata\n")
    modules.append(import_module("vllm.v1.late"))  # nothing that we know of
    assert all(module.get_scheduler_metadata is adapter.get_scheduler_metadata for module in modules)
    changed = {name for name, value in vars(builder).items() if value is not before[name]}
    assert changed == {"build"} | ({"update_draft_decode_metadata", "_store_scheduler_metadata"} if in_place else set())
    attached.detach()
    attached.detach()
    assert all(module.get_scheduler_metadata is own for module in modules)
    assert dict(vars(builder)) == before
    assert metadata_of(gqa_builder(), DECODE).tolist() == [-1] * 9
    assert adapter.attach(in_place) is not attached


def test_the_other_mode_needs_a_detach(root: pathlib.Path) -> None:
    adapter.attach()
    with pytest.raises(RuntimeError, match="already attached with in_place=False"):
        adapter.attach(in_place=True)


def test_what_was_put_over_ours_stops_a_detach(root: pathlib.Path) -> None:
    module = import_module(adapter.GQA)
    attached = adapter.attach(in_place=True)
    ours = module.FlashAttentionMetadataBuilder._store_scheduler_metadata
    module.get_scheduler_metadata = module.FlashAttentionMetadataBuilder._store_scheduler_metadata = len
    with pytest.raises(RuntimeError, match="replaced again") as error:
        attached.detach()
    assert f"{adapter.GQA}.get_scheduler_metadata is <built-in function len>" in str(error.value)
    assert "FlashAttentionMetadataBuilder._store_scheduler_metadata" in str(error.value)
    module.get_scheduler_metadata = adapter.get_scheduler_metadata
    module.FlashAttentionMetadataBuilder._store_scheduler_metadata = ours
    attached.detach()


def all_sources() -> list[tuple[str, str, str, bool]]:
    gqa, mla = "v1/attention/backends/flash_attn.py", "v1/attention/backends/mla/flashattn_mla.py"
    interface = "vllm_flash_attn/flash_attn_interface.py"
    return [
        (interface, "num_heads_kv", "num_heads_k", False),
        (interface, "has_softcap=False", "has_softcap=True", False),
        ("v1/attention/backends/fa_utils.py", "vllm.vllm_flash_attn import", "vllm.flash import", False),
        (gqa, "page_size=16", "block_size=16", False),
        (gqa, "FlashAttentionMetadataBuilder", "Builder", False),
        (gqa, "_store_scheduler_metadata", "_keep_scheduler_metadata", True),
        (gqa, "self.scheduler_metadata[n:] = 0", "pass", True),
        (gqa, "causal=common_attn_metadata.causal", "causal=common_attn_metadata.causal, **self.more", True),
        (gqa, "self.aot_schedule = False", "pass", False),
        (gqa, "if self.aot_sliding_window is None", "if not self.aot_sliding_window", False),
        (interface, "fa_version=2", "version=2", False),
        ("forward_context.py", "attn_metadata, vllm_config", "metadata, vllm_config", False),
        (mla, "headdim_v=512, ", "", False),
        (mla, "seqlens, max_seq_len", "lens, max_seq_len", True),
    ]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("path", "old", "new", "only_in_place"), all_sources())
def test_an_unknown_layout_is_refused(
    root: pathlib.Path, path: str, old: str, new: str, only_in_place: bool, in_place: bool
) -> None:
    source = (root / path).read_text()
    assert old in source
    (root / path).write_text(source.replace(old, new))
    if only_in_place and not in_place:
        adapter.attach(in_place)
        return
    with pytest.raises(
        RuntimeError, match=r"not laid out as expected \(nearest: 0.32.0 to 0.33.0\); nothing was changed"
    ) as error:
        adapter.attach(in_place)
    module = "vllm." + path.removesuffix(".py").replace("/", ".")
    assert f"{module}: expected `" in str(error.value)
    assert "`, found `" in str(error.value)
    assert not [name for name in sys.modules if name.startswith("vllm.")]


def test_a_missing_module_is_refused(root: pathlib.Path) -> None:
    (root / "v1/attention/backends/mla/flashattn_mla.py").unlink()
    with pytest.raises(RuntimeError, match=f"{adapter.MLA}: expected this module, found none"):
        adapter.attach()


def test_another_platform_is_refused(root: pathlib.Path) -> None:
    (root / "platforms.py").write_text("is_cuda, fa_version = False, 3\n")
    with pytest.raises(RuntimeError, match=f"{adapter.FA_UTILS}.get_scheduler_metadata is <function"):
        adapter.attach()
    assert adapter._attached is None


def test_a_flash_attention_that_does_not_load_is_refused(root: pathlib.Path) -> None:
    file = root / "vllm_flash_attn/__init__.py"
    file.write_text(file.read_text() + "raise ImportError('no extension')\n")
    with pytest.raises(RuntimeError, match="does not load here; nothing was changed: no extension"):
        adapter.attach()


def test_a_function_replaced_by_another_is_refused(root: pathlib.Path) -> None:
    module = import_module(adapter.GQA)
    module.get_scheduler_metadata = len
    with pytest.raises(RuntimeError, match=f"{adapter.GQA}.get_scheduler_metadata is <built-in function len>"):
        adapter.attach()
    assert import_module(adapter.FA_UTILS).get_scheduler_metadata is not adapter.get_scheduler_metadata


def test_a_failure_halfway_is_undone(root: pathlib.Path) -> None:
    builder = import_module(adapter.GQA).FlashAttentionMetadataBuilder
    del builder._store_scheduler_metadata  # not what its source says
    own = builder._get_scheduler_metadata
    with pytest.raises(KeyError):
        adapter.attach(in_place=True)
    assert builder._get_scheduler_metadata is own
    assert import_module(adapter.FA_UTILS).get_scheduler_metadata is not adapter.get_scheduler_metadata


@pytest.mark.parametrize("version", ["0.8.4", "0.34.0", "0.33.1.dev4+gabcdef"])
def test_unsupported_versions_are_refused(root: pathlib.Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BUILD_VARIABLE)
    monkeypatch.setattr(adapter, "_vllm_version", {"vllm": version}.get)
    with pytest.raises(RuntimeError, match=r"cannot attach to this vLLM: .*FA3_METADATA_BUILD overrides it"):
        adapter.attach()


def test_build_is_that_of_the_installed_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_vllm_version", {"vllm": "0.33.1"}.get)
    assert adapter.vllm_build() == BUILD  # the environment variable
    monkeypatch.setenv(BUILD_VARIABLE, "sglang-kernel-0.4.2")  # meant for another engine
    assert adapter.vllm_build() == "vllm-0.33.1"
    monkeypatch.setattr(adapter, "_vllm_version", {}.get)
    with pytest.raises(RuntimeError, match="vLLM is not installed"):
        adapter.vllm_build()


def test_without_vllm() -> None:
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "from fa3_metadata.engines import vllm\n"
        "try: vllm.attach()\nexcept RuntimeError as error: print(error)\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "expected this module, found none" in printed


def test_threads(root: pathlib.Path) -> None:
    """Attaching at once gives one `Attached`; builders of two threads write to their own buffers."""
    import_module(adapter.GQA)
    attached: list[Any] = []
    failed: list[BaseException] = []

    def work(n: int) -> None:
        try:
            attached.append(adapter.attach(in_place=True))
            batch, builder = make_batch([700 * n] * n), gqa_builder(graphs=True)
            for _ in range(20):
                made = metadata_of(builder, batch)
                assert made.data_ptr() == builder.scheduler_metadata.data_ptr()
                check(made, expected(batch, 32), n)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(attached) == 8
    assert len(set(map(id, attached))) == 1
