"""vLLM's groups of layers of one kind, whose builders are asked one after another: their metadata is made once."""

from __future__ import annotations

import inspect
import pathlib
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fa3_metadata import api
from fa3_metadata.engines import vllm as adapter
from fa3_metadata.engines.vllm_groups import BUILD_ALL, RUNNER, built_together
from fa3_metadata.installed import BUILD_VARIABLE

from ..helpers.vllm_stand_in import BUILD, check, expected, gqa_builder, make_batch

WINDOW, FULL = (1023, 0), (-1, -1)
KINDS = (WINDOW, FULL, WINDOW, WINDOW, FULL)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The windows of what is made."""
    found = []
    make = api.get_scheduler_metadata

    def spied(*args: Any, **kwargs: Any) -> torch.Tensor:
        found.append(args[17])
        return make(*args, **kwargs)

    monkeypatch.setattr(api, "get_scheduler_metadata", spied)
    return found


def builders_of(kinds: tuple[tuple[int, int], ...] = KINDS, **more: Any) -> list[Any]:
    found = [gqa_builder(window=one, others=(WINDOW, FULL), **more) for one in kinds]
    for builder in found:
        builder.build(0, make_batch([5]))  # where vLLM turns metadata off, and we turn it on again
    return found


def built(builders: list[Any], batch: SimpleNamespace, module: str = "vllm.v1.worker.gpu.model_states") -> list[Any]:
    return [one.scheduler_metadata for one in getattr(import_module(module), BUILD_ALL)(builders, batch)]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("policy", ["fa3", "balanced"])
def test_each_kind_is_made_once(
    any_root: pathlib.Path, asked: list[tuple[int, int]], graphs: bool, in_place: bool, policy: str
) -> None:
    import_module(adapter.GQA)
    import_module(RUNNER)
    adapter.attach(in_place, policy)
    builders = builders_of(graphs=graphs)
    batch = make_batch([5, 9000, 4096, 700, 700])
    for more in (0, 64, -300):  # written to the same tensor before the next step
        batch.lengths.add_(more).clamp_(min=0)
        asked.clear()
        made = built(builders, batch)
        assert asked == [WINDOW, FULL]
        told = {"policy": policy, "forward_is_told": False}
        for builder, window, one in zip(builders, KINDS, made, strict=True):
            check(one, expected(batch, 32 if graphs else 0, window_size=window, **told), batch.size)
            if graphs:
                assert one.data_ptr() == builder.scheduler_metadata.data_ptr()
                assert not builder.scheduler_metadata[one.numel() :].any()
        asked.clear()


def test_what_differs_is_made_anew(any_root: pathlib.Path, asked: list[tuple[int, int]]) -> None:
    import_module(adapter.GQA)
    import_module(RUNNER)
    adapter.attach()
    same = (WINDOW, WINDOW)
    batch = make_batch([5, 9000, 300])
    for builders in (
        [*builders_of(same, graphs=True), *builders_of(same, graphs=True, splits=8)],
        [*builders_of(same), *builders_of(same, heads=(16, 8))],
        [*builders_of(same), *builders_of(same, headdim=64)],
    ):
        asked.clear()
        built(builders, batch)
        assert len(asked) == 2
    first, second = builders_of(same)
    asked.clear()
    other = SimpleNamespace(**(vars(batch) | {"lengths": batch.lengths.clone()}))
    import_module(RUNNER).build_attn_metadata(
        [first, SimpleNamespace(build=lambda *_, **__: second.build(0, other))], batch
    )
    assert len(asked) == 2, "other lengths, however alike"
    for _ in range(2):
        first.build(0, batch)
    assert len(asked) == 4, "outside of vLLM's call nothing is known to stay"


def test_a_buffer_that_is_written_again_is_not_copied_from(any_root: pathlib.Path) -> None:
    import_module(adapter.GQA)
    import_module(RUNNER)
    adapter.attach(in_place=True)
    first, second = builders_of((WINDOW, WINDOW), graphs=True)
    batch, other = make_batch([5, 9000, 300]), make_batch([70, 80])

    def twice(prefix: int, of: SimpleNamespace, **more: Any) -> Any:
        first.build(prefix, of, **more)
        return first.build(prefix, other, **more)

    made = built([SimpleNamespace(build=twice), second], batch)
    check(made[0], expected(other, 32, window_size=WINDOW), other.size)
    check(made[1], expected(batch, 32, window_size=WINDOW), batch.size)


def test_vllms_own_function_is_put_back(any_root: pathlib.Path, asked: list[tuple[int, int]]) -> None:
    import_module(adapter.GQA)
    early = import_module("vllm.v1.worker.gpu.model_states")
    own = getattr(early, BUILD_ALL)
    attached = adapter.attach()
    assert getattr(early, BUILD_ALL) is getattr(import_module(RUNNER), BUILD_ALL) is not own
    attached.detach()
    assert getattr(early, BUILD_ALL) is getattr(import_module(RUNNER), BUILD_ALL) is own


def test_a_runner_imported_late_is_found(any_root: pathlib.Path, asked: list[tuple[int, int]]) -> None:
    import_module(adapter.GQA)
    adapter.attach()
    builders = builders_of()
    batch = make_batch([5, 9000, 300])
    built(builders, batch)  # its own, from before the first question
    asked.clear()
    built(builders, batch)
    assert asked == [WINDOW, FULL]


def test_detach_is_for_good(any_root: pathlib.Path, asked: list[tuple[int, int]]) -> None:
    """Whoever has kept our function that waits for modules changes nothing any more."""
    import_module(adapter.GQA)
    attached = adapter.attach()
    attached.detach()
    module = import_module(RUNNER)
    own = getattr(module, BUILD_ALL)
    attached.catch_up()
    assert getattr(module, BUILD_ALL) is own


def test_what_was_put_over_ours_stops_a_detach(any_root: pathlib.Path, asked: list[tuple[int, int]]) -> None:
    import_module(adapter.GQA)
    module = import_module(RUNNER)
    attached = adapter.attach()
    ours = getattr(module, BUILD_ALL)
    setattr(module, BUILD_ALL, lambda *args: ours(*args))
    with pytest.raises(RuntimeError, match=r"replaced again since.*\n.*build_attn_metadata"):
        attached.detach()
    setattr(module, BUILD_ALL, ours)
    attached.detach()


OTHER = {
    "batch_size": 2, "max_seqlen_q": 2, "max_seqlen_k": 9216, "num_heads_q": 16, "num_heads_kv": 2, "headdim": 64,
    "qkv_dtype": torch.float16, "headdim_v": 64, "page_size": 32, "max_seqlen_k_new": 1, "causal": False,
    "window_size": WINDOW, "has_softcap": True, "num_splits": 3, "pack_gqa": False, "sm_margin": 2,
    "cache_seqlens": torch.tensor([5, 9000, 300], dtype=torch.int32),
    "cu_seqlens_q": torch.arange(4, dtype=torch.int32), "cu_seqlens_k_new": torch.arange(4, dtype=torch.int32),
    "cache_leftpad": torch.zeros(3, dtype=torch.int32),
}  # fmt: skip


def test_every_argument_tells_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BUILD_VARIABLE, BUILD)
    made = []
    monkeypatch.setattr(
        api, "get_scheduler_metadata", lambda *_, **__: made.append(torch.zeros(9, dtype=torch.int32)) or made[-1]
    )
    call = {
        "batch_size": 3, "max_seqlen_q": 1, "max_seqlen_k": 9000, "num_heads_q": 8, "num_heads_kv": 1, "headdim": 128,
        "cache_seqlens": torch.tensor([5, 9000, 300], dtype=torch.int32), "causal": True,
    }  # fmt: skip
    assert set(OTHER) == set(inspect.signature(adapter.get_scheduler_metadata).parameters) - {"out"}

    def ask(*_: Any) -> None:
        for name in [None, *OTHER]:
            adapter.get_scheduler_metadata(**call | ({} if name is None else {name: OTHER[name]}))

    built_together(lambda: [ask(), ask()])()
    assert len(made) == 1 + len(OTHER)


def test_an_error_ends_what_is_shared(any_root: pathlib.Path, asked: list[tuple[int, int]]) -> None:
    import_module(adapter.GQA)
    import_module(RUNNER)
    adapter.attach()
    (builder,) = builders_of((WINDOW,))
    batch = make_batch([5, 9000, 300])
    with pytest.raises(AttributeError):
        built([builder, None], batch)
    asked.clear()
    builder.build(0, batch)
    builder.build(0, batch)
    assert len(asked) == 2
