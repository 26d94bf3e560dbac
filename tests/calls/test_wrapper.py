"""The wrapped forward, install and uninstall, with a forward that only records what it is called with."""

from __future__ import annotations

import logging
import sys
import threading
from types import ModuleType
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata import install as install_module
from fa3_metadata import installed, step, wrap_forward

BUILD = "sglang-kernel-0.4.2"


def recording_forward() -> Any:
    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None,
        cu_seqlens_k_new=None, max_seqlen_q=None, causal=False, window_size=(-1, -1), attention_chunk=None, softcap=0.0,
        scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, score_mod=None, ver=3,
    ):  # fmt: skip
        """FA3."""
        calls.append(dict(locals()))
        return q

    calls: list[dict[str, Any]] = []
    flash_attn_with_kvcache.calls = calls  # type: ignore[attr-defined]
    return flash_attn_with_kvcache


LENGTHS = torch.tensor([5000, 70, 900], dtype=torch.int32)


def layer(**change: Any) -> dict[str, Any]:
    cache = torch.zeros(3, 64, 1, 128, dtype=torch.bfloat16)
    return {
        "q": torch.zeros(3, 1, 8, 128, dtype=torch.bfloat16), "k_cache": cache, "v_cache": cache, "causal": True,
        "cache_seqlens": LENGTHS, "page_table": torch.zeros(3, 100, dtype=torch.int32),
    } | change  # fmt: skip


def made_in(forward: Any) -> list[Any]:
    return [call["scheduler_metadata"] for call in forward.calls]


def test_outside_a_step_a_call_is_passed_through() -> None:
    forward = recording_forward()
    wrap_forward(forward, BUILD)(**layer())
    assert made_in(forward) == [None]
    assert forward.calls[0]["num_splits"] == 0


def test_layers_of_a_step_share_what_is_the_same() -> None:
    forward = recording_forward()
    wrapped = wrap_forward(forward, BUILD)
    with step():
        for _ in range(3):
            wrapped(**layer())
            wrapped(**layer(window_size=(127, 0)))
    full, window = made_in(forward)[::2], made_in(forward)[1::2]
    assert all(m is full[0] for m in full)
    assert all(m is window[0] for m in window)
    arguments = {"page_size": 64, "causal": True, "build": BUILD}
    for made, more in ((full[0], {}), (window[0], {"window_size": (127, 0)})):
        alone = fa3_metadata.get_scheduler_metadata(3, 1, 6400, 8, 1, 128, LENGTHS, **arguments, **more)
        assert torch.equal(made, alone)
    resolved = fa3_metadata.MetadataPlan(
        max_batch_size=3, max_seqlen_k=6400, num_heads=8, num_heads_k=1, headdim=128, device="cpu", page_size=64,
        causal=True, build=BUILD,
    )  # fmt: skip
    assert (forward.calls[0]["num_splits"], forward.calls[0]["pack_gqa"]) == (resolved.num_splits, resolved.pack_gqa)


def asked(policy: str = "balanced", **more: Any) -> dict[str, Any]:
    """What `layer()` asks of `get_scheduler_metadata`."""
    shape = {"batch_size": 3, "max_seqlen_q": 1, "max_seqlen_k": 6400, "num_heads": 8, "num_heads_k": 1,
             "headdim": 128, "cache_seqlens": LENGTHS, "page_size": 64, "causal": True}  # fmt: skip
    return shape | {"build": BUILD, "policy": policy} | more


def test_positional_arguments_and_signature() -> None:
    forward = recording_forward()
    wrapped = wrap_forward(forward, BUILD)
    arguments = layer()
    with step():
        wrapped(arguments.pop("q"), arguments.pop("k_cache"), arguments.pop("v_cache"), **arguments)
    assert made_in(forward)[0] is not None
    assert wrapped.__name__ == "flash_attn_with_kvcache"
    assert wrapped.__doc__ == "FA3."
    assert wrap_forward(wrapped) is wrapped


def test_lengths_written_by_torch_are_noticed() -> None:
    forward = recording_forward()
    wrapped = wrap_forward(forward, BUILD)
    cache_seqlens = LENGTHS.clone()
    with step():
        wrapped(**layer(cache_seqlens=cache_seqlens))
        cache_seqlens.add_(1000)
        wrapped(**layer(cache_seqlens=cache_seqlens))
    first, second = made_in(forward)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("lengths_stay", [False, True])
def test_layers_that_begin_again_are_a_new_step(lengths_stay: bool) -> None:
    """A loop within one scope, where something else than torch may write: unless the caller says that nothing does."""
    forward = recording_forward()
    wrapped = wrap_forward(forward, BUILD)
    one, two = layer(), layer()
    with step(lengths_stay=lengths_stay):
        for arguments in (one, two, two, one, two, one):
            wrapped(**arguments)
    made = made_in(forward)
    assert made[0] is made[1] is made[2]
    assert made[3] is made[4]
    for again, before in ((3, 0), (5, 3)):
        assert (made[again] is made[before]) == lengths_stay


def test_steps_do_not_leak() -> None:
    forward = recording_forward()
    wrapped = wrap_forward(forward, BUILD)
    for _ in range(2):
        with step():
            wrapped(**layer())
    wrapped(**layer())
    first, second, outside = made_in(forward)
    assert first is not second
    assert outside is None

    def other_thread() -> None:
        wrapped(**layer())

    with step():
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
    assert made_in(forward)[-1] is None


PASSED_THROUGH: list[tuple[dict[str, Any], str]] = [
    ({"ver": 4}, "FlashAttention 4, not 3"),
    ({"score_mod": abs}, "score_mod given"),
    ({"cache_seqlens": 70}, "cache_seqlens is not a tensor"),
    ({"cu_seqlens_q": torch.arange(4, dtype=torch.int32)}, "cu_seqlens_q without max_seqlen_q"),
    ({"q": torch.zeros(3, 1, 8, 264, dtype=torch.bfloat16)}, "headdim must be from 1 to 256"),
    ({"cache_seqlens": LENGTHS[:2]}, "cache_seqlens must have shape"),
]


@pytest.mark.parametrize(("change", "reason"), PASSED_THROUGH)
def test_what_is_not_known_is_passed_through_and_said_once(
    change: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    forward = recording_forward()
    wrapped = wrap_forward(forward, BUILD)
    with caplog.at_level(logging.DEBUG, "fa3_metadata"), step():
        wrapped(**layer(**change))
        wrapped(**layer(**change))
    assert made_in(forward) == [None, None]
    assert [reason in record.getMessage() for record in caplog.records] == [True]


def test_ragged_new_keys_count_only_with_new_keys() -> None:
    """Engines pass cu_seqlens_k_new without k, for other purposes; FA3 then ignores it."""
    forward = recording_forward()
    wrapped = wrap_forward(forward, BUILD)
    new = {"cu_seqlens_k_new": torch.tensor([0, 5000, 5070, 5970], dtype=torch.int32)}
    with step():
        wrapped(**layer())
        wrapped(**layer(**new))
        wrapped(**layer(**new, k=torch.zeros(5970, 1, 128, dtype=torch.bfloat16)))
    without, ignored, counted = made_in(forward)
    assert torch.equal(ignored, without)
    assert not torch.equal(counted, without)


def test_metadata_that_is_brought_is_kept() -> None:
    forward = recording_forward()
    own = torch.zeros(17, dtype=torch.int32)
    with step():
        wrap_forward(forward, BUILD)(**layer(scheduler_metadata=own, num_splits=3))
    assert made_in(forward) == [own]
    assert forward.calls[0]["num_splits"] == 3


def test_a_forward_without_the_argument_cannot_be_wrapped() -> None:
    with pytest.raises(TypeError, match="forward must take scheduler_metadata"):
        wrap_forward(lambda q: q, BUILD)


def test_vllm_argument_names() -> None:
    def flash_attn_varlen_func(
        q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, seqused_k=None, block_table=None, causal=False,
        window_size=None, scheduler_metadata=None, num_splits=0, fa_version=3,
    ):  # fmt: skip
        calls.append(dict(locals()))

    calls: list[dict[str, Any]] = []
    cache, starts = torch.zeros(3, 16, 8, 128, dtype=torch.bfloat16), torch.arange(4, dtype=torch.int32)
    wrapped = wrap_forward(flash_attn_varlen_func, "vllm-0.33.0")
    with step():
        wrapped(torch.zeros(3, 32, 128, dtype=torch.bfloat16), cache, cache, 1, starts, 5000, seqused_k=LENGTHS,
                block_table=torch.zeros(3, 400, dtype=torch.int32), causal=True)  # fmt: skip
    expected = fa3_metadata.get_scheduler_metadata(
        3, 1, 5000, 32, 8, 128, LENGTHS, cu_seqlens_q=starts, page_size=16, causal=True, build="vllm-0.33.0"
    )
    assert torch.equal(calls[0]["scheduler_metadata"], expected)


@pytest.fixture
def sgl_kernel(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An installed sgl_kernel that lacks get_scheduler_metadata, and an engine that has imported its forward."""
    module, engine = ModuleType("sgl_kernel.flash_attn"), ModuleType("an_engine")
    module.flash_attn_with_kvcache = engine.flash_attn_with_kvcache = recording_forward()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sgl_kernel", ModuleType("sgl_kernel"))
    monkeypatch.setitem(sys.modules, "sgl_kernel.flash_attn", module)
    monkeypatch.setitem(sys.modules, "an_engine", engine)
    monkeypatch.delenv(install_module_disable(), raising=False)
    return module


def install_module_disable() -> str:
    return sys.modules["fa3_metadata.install"].DISABLE_VARIABLE  # type: ignore[no-any-return]


def test_install_and_uninstall(sgl_kernel: ModuleType) -> None:
    before = dict(vars(sgl_kernel))
    said = fa3_metadata.install(build="sgl-kernel-0.3.21")
    assert said == "sgl-kernel-0.3.21: put get_scheduler_metadata into sgl_kernel.flash_attn"
    put = sgl_kernel.get_scheduler_metadata  # for this build, whatever else is installed
    assert (put.func, put.keywords) == (fa3_metadata.get_scheduler_metadata, {"build": "sgl-kernel-0.3.21"})
    assert "nothing to do" in fa3_metadata.install(build="sgl-kernel-0.3.21")
    assert fa3_metadata.uninstall() == "took back sgl_kernel.flash_attn.get_scheduler_metadata"
    assert vars(sgl_kernel) == before
    assert fa3_metadata.uninstall() == "nothing was installed"


def test_install_wraps_the_forward_where_it_was_imported(sgl_kernel: ModuleType) -> None:
    engine, forward = sys.modules["an_engine"], sgl_kernel.flash_attn_with_kvcache
    said = fa3_metadata.install(wrap_forward=True, build="sgl-kernel-0.3.21")
    assert "wrapped flash_attn_with_kvcache in sgl_kernel.flash_attn, an_engine" in said
    assert engine.flash_attn_with_kvcache is sgl_kernel.flash_attn_with_kvcache is not forward
    with step():
        engine.flash_attn_with_kvcache(**layer())
    assert made_in(forward)[0] is not None
    assert "nothing to do" in fa3_metadata.install(wrap_forward=True, build="sgl-kernel-0.3.21")
    fa3_metadata.uninstall()
    assert engine.flash_attn_with_kvcache is sgl_kernel.flash_attn_with_kvcache is forward


def test_install_with_a_policy(sgl_kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, build = sgl_kernel.flash_attn_with_kvcache, "sgl-kernel-0.3.21"
    with pytest.raises(ValueError, match='policy must be "fa3" without wrap_forward=True'):
        fa3_metadata.install(build=build, policy="balanced")
    assert not hasattr(sgl_kernel, "get_scheduler_metadata")
    said = fa3_metadata.install(wrap_forward=True, build=build, policy="balanced", batch_invariant=True)
    assert "an_engine, policy balanced" in said
    with step():
        sgl_kernel.flash_attn_with_kvcache(**layer())
    layout = fa3_metadata.metadata_layout(**asked(build=build, batch_invariant=True))
    assert forward.calls[0]["num_splits"] == layout.num_splits
    assert sgl_kernel.get_scheduler_metadata.keywords == {"build": build}, "FA3's unless told otherwise"
    again = fa3_metadata.install(wrap_forward=True, build=build, policy="balanced", batch_invariant=True)
    assert "nothing to do" in again
    assert "nothing to do" in fa3_metadata.install(build=build)
    for other in ({}, {"policy": "balanced"}):
        with pytest.raises(ValueError, match="policy must be that of"):
            fa3_metadata.install(wrap_forward=True, build=build, **other)
    monkeypatch.setenv("FA3_METADATA_BUILD", build)
    monkeypatch.delitem(vars(fa3_metadata), "flash_attn_with_kvcache", raising=False)
    assert fa3_metadata.flash_attn_with_kvcache is sgl_kernel.flash_attn_with_kvcache
    monkeypatch.delitem(vars(fa3_metadata), "flash_attn_with_kvcache")
    fa3_metadata.uninstall()
    assert sgl_kernel.flash_attn_with_kvcache is forward


def test_uninstall_leaves_what_somebody_else_replaced(sgl_kernel: ModuleType) -> None:
    fa3_metadata.install(build="sgl-kernel-0.3.21")
    theirs = sgl_kernel.get_scheduler_metadata = lambda: None  # type: ignore[attr-defined]
    assert "left sgl_kernel.flash_attn.get_scheduler_metadata, replaced since" in fa3_metadata.uninstall()
    assert sgl_kernel.get_scheduler_metadata is theirs


def test_many_threads_install_once(sgl_kernel: ModuleType) -> None:
    forward = sgl_kernel.flash_attn_with_kvcache
    threads = [
        threading.Thread(target=fa3_metadata.install, kwargs={"wrap_forward": True, "build": "sgl-kernel-0.3.21"})
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fa3_metadata.uninstall()
    assert sgl_kernel.flash_attn_with_kvcache is forward
    assert not hasattr(sgl_kernel, "get_scheduler_metadata")


def test_a_variable_turns_it_off(sgl_kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(install_module_disable(), "1")
    assert fa3_metadata.install() == "nothing installed: FA3_METADATA_DISABLE is set"
    assert not hasattr(sgl_kernel, "get_scheduler_metadata")


def test_nothing_to_install_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with pytest.raises(RuntimeError, match=r"install\(\) needs flash-attn-3, which does not load here"):
        fa3_metadata.install(build="flash-attn-3-3.0.0")


def test_the_installed_forward_is_wrapped_on_first_use(sgl_kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA3_METADATA_BUILD", "sgl-kernel-0.3.21")
    monkeypatch.delitem(vars(fa3_metadata), "flash_attn_with_kvcache", raising=False)
    assert fa3_metadata.flash_attn_with_kvcache.__wrapped__ is sgl_kernel.flash_attn_with_kvcache  # type: ignore[attr-defined]
    monkeypatch.delitem(vars(fa3_metadata), "flash_attn_with_kvcache")


def test_every_package_has_a_provider() -> None:
    from fa3_metadata.triton_kernels.builds import PACKAGES

    assert set(installed.PROVIDERS) == set(PACKAGES)
    assert install_module is fa3_metadata.install


def test_install_for_another_build_is_refused(sgl_kernel: ModuleType) -> None:
    """What is installed already is the other build's, whose tensor is laid out otherwise."""
    fa3_metadata.install(wrap_forward=True, build="sgl-kernel-0.3.21")
    for more in ({}, {"wrap_forward": True}):
        assert "nothing to do" in fa3_metadata.install(build="sgl-kernel-0.3.20", **more)  # behaves the same
        with pytest.raises(ValueError, match=r"build must be like sgl-kernel-0\.3\.21, .* got sgl-kernel-0\.3\.14"):
            fa3_metadata.install(build="sgl-kernel-0.3.14", **more)
    fa3_metadata.uninstall()
