"""The backends of SGLang's sparse and dual chunk attention, on a stand-in for each: same names, and no attention."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakSet

import fa3_metadata
import pytest
import torch
from fa3_metadata.engines import sglang
from fa3_metadata.engines.sglang import attach, attach_new_backends
from fa3_metadata.engines.sglang_names import DUAL_CHUNK_LAYOUTS, MINICPM_LAYOUTS, SPARSE_LAYOUTS, SGLangNames

BUILD = "sglang-kernel-0.4.2"
KINDS = [SPARSE_LAYOUTS[0], SPARSE_LAYOUTS[1], MINICPM_LAYOUTS[0], DUAL_CHUNK_LAYOUTS[0]]


class World:
    """The modules that the adapter imports for one kind of backend, and the calls of its forward."""

    def __init__(self, names: SGLangNames, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names, self.calls, self.kept = names, [], []  # type: ignore[var-annotated]
        environ = SimpleNamespace(SGLANG_USE_SGL_FA3_KERNEL=SimpleNamespace(get=lambda: True))
        self.modules = {name: ModuleType(name) for name in {names.module, names.where, "sglang.srt.environ"}}
        self.modules["sglang.srt.environ"].envs = environ  # type: ignore[attr-defined]
        self.where = self.modules[names.where]
        for name in [*self.modules, "sglang"]:
            monkeypatch.setitem(sys.modules, name, self.modules.get(name, ModuleType(name)))
        calls = self.calls

        def flash_attn_with_kvcache(  # type: ignore[no-untyped-def]
            q, k_cache, v_cache, qv=None, page_table=None, cache_seqlens=None, cu_seqlens_q=None, max_seqlen_q=None,
            causal=False, window_size=(-1, -1), softcap=0.0, num_splits=0, pack_gqa=None, scheduler_metadata=None,
        ):  # fmt: skip
            calls.append({"metadata": scheduler_metadata, "num_splits": num_splits})
            return q

        self.where.flash_attn_with_kvcache = self.forward = flash_attn_with_kvcache  # type: ignore[attr-defined]
        world = self

        class Backend:
            def __init__(self, fa_impl_ver: int = 3) -> None:
                self.flash_attn_backend = SimpleNamespace(fa_impl_ver=fa_impl_ver)

            def init_forward_metadata(self, forward_batch: torch.Tensor) -> None:
                lengths = forward_batch.to(torch.int32).clamp(max=2048)
                self.forward_metadata = SimpleNamespace(
                    lengths=lengths, starts=torch.arange(len(lengths) + 1, dtype=torch.int32)
                )

            def forward_decode(self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any) -> Any:
                metadata = self.forward_metadata
                keys = torch.zeros(99, 1, 1, 64, dtype=torch.bfloat16)
                world.kept.append(keys)  # as a model keeps its KV caches
                return world.where.flash_attn_with_kvcache(  # type: ignore[attr-defined]
                    q=q, k_cache=keys, v_cache=torch.zeros(99, 1, 1, 512, dtype=torch.bfloat16),
                    qv=torch.zeros(len(q), 16, 512, dtype=torch.bfloat16), cache_seqlens=metadata.lengths,
                    page_table=torch.zeros(len(q), 2048, dtype=torch.int32), cu_seqlens_q=metadata.starts,
                    max_seqlen_q=1, causal=True,
                )  # fmt: skip

            forward_extend = forward_decode

        Backend.__module__, Backend.__qualname__ = names.module, names.backend
        setattr(self.modules[names.module], names.backend, Backend)
        self.kind = Backend

    def layer(self, backend: Any, method: str = "forward_decode") -> Any:
        count = len(backend.forward_metadata.lengths)
        getattr(backend, method)(torch.zeros(count, 16, 64, dtype=torch.bfloat16), None, None, object(), None)
        return self.calls[-1]["metadata"]


@pytest.fixture(params=KINDS, ids=[names.backend for names in KINDS])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(sglang, "_live", WeakSet())  # without what other tests have left to the collector
    yield World(request.param, monkeypatch)
    if sglang._new_backends is not None:
        sglang._new_backends.undo()


def test_eager_layers_of_a_batch_share(world: World) -> None:
    backend = world.kind()
    attached = attach(backend, BUILD)
    made = []
    for lengths in ([9000, 300, 1], [8999, 2, 70]):
        backend.init_forward_metadata(torch.tensor(lengths))
        first = world.layer(backend)
        made.append(first)
        assert first is not None
        assert all(world.layer(backend, method) is first for method in ("forward_decode", "forward_extend") * 30)
    assert not torch.equal(*made)
    attached.detach()
    assert world.where.flash_attn_with_kvcache is world.forward  # type: ignore[attr-defined]
    assert world.layer(backend) is None
    assert not {"init_forward_metadata", "forward_decode", "forward_extend"} & set(vars(backend))


def test_layers_of_a_capture_share(world: World) -> None:
    """`step()` stands in for the capture of a graph, which needs a GPU; balanced tells the forward its bound."""
    backend = world.kind()
    backend.init_forward_metadata(torch.tensor([9000, 300, 1]))  # before the backend is attached: no eager step
    attach(backend, BUILD, "balanced", batch_invariant=True)
    with fa3_metadata.step():
        assert world.layer(backend) is world.layer(backend) is not None
    assert world.calls[0]["num_splits"] > 0
    assert "balanced, batch invariant" in (sglang.attached_now() or "")


def test_new_backends(world: World) -> None:
    assert "new" not in (sglang.attached_now() or "")
    undo = attach_new_backends(BUILD)
    backend = world.kind()
    assert f"1 x {world.names.backend}" in (sglang.attached_now() or "")
    assert "every new backend" in (sglang.attached_now() or "")
    assert hasattr(backend, sglang._MARK)
    undo()
    assert not hasattr(world.kind(), sglang._MARK)


def test_another_flash_attention(world: World) -> None:
    """MiniCPM's backend says which it has; the others have none but 3."""
    backend = world.kind(4)
    if world.names.version is None:
        attach(backend, BUILD).detach()
        return
    with pytest.raises(RuntimeError, match=r"FlashAttention 3 \(flash_attn_backend.fa_impl_ver\), got 4"):
        attach(backend, BUILD)
    del backend.flash_attn_backend
    with pytest.raises(RuntimeError, match="got None"):
        attach(backend, BUILD)
