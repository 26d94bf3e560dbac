"""What a wrapped forward must never do: share what may have changed, or schedule what it does not understand."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import inspect
import threading
from typing import Any

import fa3_metadata
import pytest
import torch
from fa3_metadata import captured_writes, scopes, step, wrap_forward, wrapper
from fa3_metadata.calls import _VARLEN_KNOWN, _WITH_KVCACHE_KNOWN, ForwardCall

from bench.wheel_recordings import Recordings

from .test_wrapper import BUILD, LENGTHS, asked, layer, made_in, recording_forward


def with_parameters(extra: str) -> Any:
    """A forward that records its calls and has parameters more than FA3's."""
    calls: list[dict[str, Any]] = []
    head = "def f(q, k_cache, v_cache, cache_seqlens=None, page_table=None, causal=False, scheduler_metadata=None, "
    space: dict[str, Any] = {"calls": calls}
    exec(f"{head}num_splits=0, pack_gqa=None, {extra}):\n    calls.append(dict(locals()))\n    return q", space)
    space["f"].calls = calls
    return space["f"]


@pytest.mark.parametrize("policy", ["fa3", "balanced"])
def test_in_inference_mode_no_write_goes_unnoticed(policy: str) -> None:
    """torch does not count writes there: three modules of a draft model, lengths advance between them."""
    forward = recording_forward()
    wrapped = wrap_forward(forward, BUILD, policy)
    with torch.inference_mode():
        for lengths in (LENGTHS.clone(), torch.tensor([4000, 70, 900], dtype=torch.int32)):
            forward.calls.clear()
            with step():
                for _ in range(3):
                    wrapped(**layer(cache_seqlens=lengths))
                    if (made := made_in(forward)[-1]) is not None:
                        right = fa3_metadata.get_scheduler_metadata(**asked(policy, cache_seqlens=lengths))
                        assert torch.equal(made, right)
                    lengths.add_(1000)
            assert all((made is None) == (policy == "fa3") for made in made_in(forward))


def test_who_says_that_lengths_stay_shares_in_inference_mode() -> None:
    forward = recording_forward()
    wrapped = wrap_forward(forward, BUILD)
    with torch.inference_mode(), step(lengths_stay=True):
        for _ in range(3):
            wrapped(**layer())
    first, *others = made_in(forward)
    assert first is not None
    assert all(made is first for made in others)
    with pytest.raises(TypeError, match="lengths_stay must be True or False, got 1"), step(lengths_stay=1):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("policy", ["fa3", "balanced"])
@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("written_inside", [False, True])
def test_inference_mode_within_a_step(policy: str, made_inside: bool, written_inside: bool) -> None:
    """Or lengths from there: torch does not count writes to tensors that were made in inference mode."""
    forward = recording_forward()
    wrapped = wrap_forward(forward, BUILD, policy)
    with torch.inference_mode(made_inside):
        lengths = LENGTHS.clone()
    calls = [layer(cache_seqlens=lengths) for _ in range(3)]
    with step():
        wrapped(**calls[0])
        with torch.inference_mode(written_inside or made_inside):
            lengths.add_(1000)
            wrapped(**calls[1])
        wrapped(**calls[2])
        wrapped(**calls[2])
    made = made_in(forward)
    right = fa3_metadata.get_scheduler_metadata(**asked(policy, cache_seqlens=lengths))
    refused = [made_inside, made_inside or written_inside, made_inside, made_inside]
    assert [one is None for one in made] == [policy == "fa3" and no for no in refused]
    assert all(one is None or torch.equal(one, right) for one in made[1:])
    assert (made[2] is made[3]) == (not made_inside or policy == "fa3")


def test_builds_in_one_scope_get_each_its_own() -> None:
    builds = ("sglang-kernel-0.4.2", "vllm-0.33.0", "vllm-0.10.0", "sglang-kernel-0.4.2", "sgl-kernel-0.3.21")
    forwards = [recording_forward() for _ in builds]
    with step():
        for forward, build in zip(forwards, builds, strict=True):
            wrap_forward(forward, build)(**layer())
    for forward, build in zip(forwards, builds, strict=True):
        (made,) = made_in(forward)
        assert torch.equal(made, fa3_metadata.get_scheduler_metadata(**asked("fa3", build=build)))


def test_query_lengths_in_use_are_honoured() -> None:
    forward = with_parameters("seqused_q=None")
    used = torch.tensor([16, 1, 0], dtype=torch.int32)
    call = layer(q=torch.zeros(3, 16, 8, 128, dtype=torch.bfloat16), seqused_q=used)
    with step():
        wrap_forward(forward, BUILD)(**call)
    right = fa3_metadata.get_scheduler_metadata(**asked("fa3", max_seqlen_q=16, seqused_q=used))
    assert torch.equal(made_in(forward)[0], right)


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("some_future_mask=None", object()),
        ("batch_invariant=False", True),
        ("levels=1", 2),
        ("tree=None", torch.zeros(3)),
    ],
)
def test_what_is_not_known_is_passed_through(parameter: str, value: object) -> None:
    forward, name = with_parameters(parameter), parameter.partition("=")[0]
    wrapped = wrap_forward(forward, BUILD)
    with step():
        wrapped(**layer(**{name: value}))
        assert made_in(forward) == [None]
        assert forward.calls[0]["num_splits"] == 0
        # Its default does no harm, whether said or not.
        wrapped(**layer(**{name: inspect.signature(forward).parameters[name].default}))
        wrapped(**layer())
    assert made_in(forward)[1] is made_in(forward)[2] is not None


def test_every_parameter_of_every_published_forward_is_known() -> None:
    recorded = Recordings.load()
    texts = {found["forward_signature"] for versions in recorded.wheels.values() for found in versions.values()}
    assert len(texts) > 10
    for text in texts:
        names = {part.partition("=")[0].strip() for part in (recorded.texts[text or ""] + ",").split(", ")}
        names = {name.strip(",") for name in names if name.isidentifier() or name.strip(",").isidentifier()}
        assert "q" in names
        known = _VARLEN_KNOWN if "fa_version" in names else _WITH_KVCACHE_KNOWN
        assert names <= known


def test_a_forward_that_is_not_fa3_unless_told_so() -> None:
    """vLLM's runs FlashAttention 2 by default."""
    forward = with_parameters("ver=2")
    wrapped = wrap_forward(forward, BUILD)
    with step():
        wrapped(**layer())
        wrapped(**layer(ver=3))
    assert made_in(forward)[0] is None
    assert made_in(forward)[1] is not None


@pytest.mark.parametrize("inside", [False, True])
def test_surplus_arguments_are_the_forwards_business(inside: bool) -> None:
    wrapped = wrap_forward(recording_forward(), BUILD)
    call = layer()
    with step() if inside else torch.no_grad():
        with pytest.raises(TypeError, match="multiple values for argument 'q'"):
            wrapped(call["q"], call["k_cache"], **call)
        with pytest.raises(TypeError, match="positional arguments but"):
            wrapped(call["q"], call["k_cache"], call["v_cache"], *[None] * 40)


def test_tasks_have_scopes_of_their_own() -> None:
    async def task(log: list[bool], wait: float) -> None:
        with step():
            mine = scopes.CURRENT_STEP.get()
            await asyncio.sleep(0)
            log.append(scopes.CURRENT_STEP.get() is mine)
            await asyncio.sleep(wait)
            log.append(scopes.CURRENT_STEP.get() is mine)

    async def both() -> list[bool]:
        log: list[bool] = []
        await asyncio.gather(task(log, 0.01), task(log, 0.02))
        return log

    assert asyncio.run(both()) == [True] * 4
    assert scopes.CURRENT_STEP.get() is None


def test_threads_have_scopes_of_their_own() -> None:
    seen = []
    with step():
        thread = threading.Thread(target=lambda: seen.append(scopes.CURRENT_STEP.get()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_a_step_that_has_ended_is_nobodys() -> None:
    """A task that was created inside still has it, and so has a thread that took the context along."""
    forward = recording_forward()
    wrapped, lengths = wrap_forward(forward, BUILD), LENGTHS.clone()

    async def main() -> None:
        async def later() -> None:
            await asyncio.sleep(0.01)
            wrapped(**layer(cache_seqlens=lengths))

        with step(lengths_stay=True):
            wrapped(**layer(cache_seqlens=lengths))
            task = asyncio.create_task(later())
            await asyncio.to_thread(wrapped, **layer(cache_seqlens=lengths))
        lengths.add_(1000)
        await task

    asyncio.run(main())
    assert [made is not None for made in made_in(forward)] == [True, False, False]


def test_writes_that_torch_does_not_count() -> None:
    """What `step` says that it does not notice: should torch count them one day, say so there."""
    library = torch.library.Library("fa3_metadata_test", "DEF")
    library.define("advance(Tensor(a!) lengths) -> ()")

    def advance(lengths: torch.Tensor) -> None:
        lengths.numpy()[:] += 1

    library.impl("advance", advance, "CPU")
    lengths = LENGTHS.clone()
    torch.ops.fa3_metadata_test.advance(lengths)
    assert lengths.tolist() == (LENGTHS + 1).tolist()
    assert lengths._version == 0
    assert "C++ extensions" in (step.__doc__ or "")
    assert "collectives" in (step.__doc__ or "")


def test_a_long_scope_keeps_a_bounded_number() -> None:
    forward = recording_forward()
    wrapped, lengths = wrap_forward(forward, BUILD), LENGTHS.clone()
    call = layer(cache_seqlens=lengths)
    with step():
        for _ in range(600):
            wrapped(**call)
            lengths.add_(1)
        scope = scopes.CURRENT_STEP.get()
        assert scope is not None
        assert len(scope.made) == 256
        held = {id(answer[0]) for answer in scope.answers.values() if answer}
        assert held <= {id(made) for made in scope.made.values()}
    assert torch.equal(
        made_in(forward)[-1], fa3_metadata.get_scheduler_metadata(**asked("fa3", cache_seqlens=lengths - 1))
    )


def test_lengths_of_another_shape_at_the_same_place_are_not_taken_for_these() -> None:
    forward, lengths = recording_forward(), torch.tensor([5000, 70, 900, 9], dtype=torch.int32)
    wrapped = wrap_forward(forward, BUILD)
    with step():
        wrapped(**layer(cache_seqlens=lengths[:3]))
        wrapped(**layer(cache_seqlens=lengths))  # four lengths for three queries
    assert made_in(forward)[0] is not None
    assert made_in(forward)[1] is None


def test_another_build_is_not_taken_for_the_one_in_place() -> None:
    wrapped = wrap_forward(recording_forward(), "sglang-kernel-0.4.2")
    assert wrap_forward(wrapped, "sglang-kernel-0.4.4") is wrapped  # behaves the same
    with pytest.raises(ValueError, match=r"build must be like sglang-kernel-0.4.2, .* got sglang-kernel-0.4.5"):
        wrap_forward(wrapped, "sglang-kernel-0.4.5")


def test_a_driver_that_does_not_tell_of_captures_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls pass through, as they are."""

    class Driver:
        cuGraphGetNodes = None  # noqa: N815, the driver's name

    captured_writes._driver.cache_clear()
    monkeypatch.setattr(captured_writes.ctypes, "CDLL", lambda _: Driver())
    assert captured_writes.Capture.current() is None
    monkeypatch.setattr(wrapper, "_has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    forward = recording_forward()
    with step():
        wrap_forward(forward, BUILD)(**layer())
    assert made_in(forward) == [None]
    captured_writes._driver.cache_clear()


class GraphOf:
    """The driver's answers about a graph of so many nodes, each a kernel whose second parameter cannot be told."""

    def __init__(self, nodes: int, error: int) -> None:
        self.nodes, self.error = nodes, error

    def cuGraphGetNodes(self, graph: Any, nodes: Any, count: Any) -> int:  # noqa: N802
        if nodes is None:
            count._obj.value = self.nodes
            return 0
        if not count._obj.value:  # as the driver does
            return 1
        for i in range(self.nodes):
            nodes[i] = 100 + i
        return 0

    def cuGraphKernelNodeGetParams_v2(self, node: Any, params: Any) -> int:  # noqa: N802
        self.value = ctypes.c_uint64(0x7F0000001000)
        self.values = (ctypes.c_void_p * 1)(ctypes.addressof(self.value))
        params._obj.func, params._obj.kernel_params = 1, self.values
        return 0

    def cuFuncGetParamInfo(self, function: Any, index: Any, offset: Any, size: Any) -> int:  # noqa: N802
        size._obj.value = 8
        return 0 if index.value == 0 else self.error


def test_a_capture_that_has_nothing_yet_has_no_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not "unknown": else the first layer is not known to have read the lengths only."""
    for count in (0, 1, 3):
        monkeypatch.setattr(captured_writes, "_driver", lambda count=count: GraphOf(count, 1))
        assert captured_writes.Capture(1, 7).nodes() == frozenset(range(100, 100 + count))


def test_a_kernel_whose_parameters_cannot_be_told_is_not_one_without() -> None:
    for error, known in ((1, True), (2, False), (201, False)):  # the driver has no more of them; other failures
        found = captured_writes._kernel_arguments(GraphOf(1, error), ctypes.c_void_p(100))  # type: ignore[arg-type]
        assert (found is not None) == known
        assert not known or captured_writes._has_address(found or b"", [(0x7F0000001000, 0x7F0000001008)])


def test_switched_off_a_forward_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = recording_forward()
    monkeypatch.setenv("FA3_METADATA_DISABLE", "1")
    assert wrap_forward(forward, BUILD) is forward
    with pytest.raises(ValueError, match="policy must be one of"):
        wrap_forward(forward, BUILD, "fastest")
    monkeypatch.delenv("FA3_METADATA_DISABLE")
    assert wrap_forward(forward, BUILD) is not forward


def test_addresses_are_found_among_a_kernels_arguments() -> None:
    numbers = torch.tensor([3, 0x7F0000001000, 5], dtype=torch.int64).numpy().tobytes()
    assert captured_writes._has_address(numbers, [(0x7F0000000FF0, 0x7F0000001004)])
    assert not captured_writes._has_address(numbers, [(0x7F0000001004, 0x7F0000001010)])
    assert not captured_writes._has_address(numbers[:12], [(0x7F0000000FF0, 0x7F0000001004)])


def test_reading_a_call_does_not_compare_tensors() -> None:
    call = layer(mask_mod=torch.zeros(2), unknown_thing=torch.zeros(2))
    assert ForwardCall.read(call).unknown == ("mask_mod", "unknown_thing")


def test_arguments_given_as_one_buffer_are_read() -> None:
    """As cuBLAS launches its kernels: a list of tags and values, which ends with 0."""
    content, size = ctypes.create_string_buffer(bytes(range(24)), 24), ctypes.c_size_t(24)
    words = (ctypes.c_void_p * 5)(1, ctypes.addressof(content), 2, ctypes.addressof(size), None)
    assert captured_writes._buffer_of(ctypes.addressof(words)) == bytes(range(24))
    words[2] = 7  # a tag that is not known
    assert captured_writes._buffer_of(ctypes.addressof(words)) is None


class Graph:
    """A capture in progress, on a machine without a GPU: `write` and the layers add nodes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number, self.count, self.touching = 1, 0, set[int]()
        monkeypatch.setattr(scopes._captures, "scope", None)  # the driver gives no number twice
        monkeypatch.setattr(wrapper, "_has_cuda", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(wrapper.Capture, "current", staticmethod(lambda: self))
        monkeypatch.setattr(wrapper, "may_write", lambda nodes, _: bool(self.touching & set(nodes)))

    def nodes(self) -> frozenset[int]:
        return frozenset(range(self.count))

    def add(self, touches_lengths: bool) -> None:
        if touches_lengths:
            self.touching.add(self.count)
        self.count += 1


@pytest.mark.parametrize("policy", ["fa3", "balanced"])
def test_kinds_of_layers_share_in_a_capture_in_inference_mode(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full and window layers in turns, as in gpt-oss: a layer of one kind reads the lengths of the other's, too."""
    graph, forward = Graph(monkeypatch), recording_forward()

    @functools.wraps(forward)
    def captured(*args: Any, **kwargs: Any) -> Any:
        graph.add(touches_lengths=True)  # a layer has their address among its arguments
        return forward(*args, **kwargs)

    wrapped, lengths = wrap_forward(captured, BUILD, policy), LENGTHS.clone()
    with torch.inference_mode():
        for _ in range(3):
            wrapped(**layer(cache_seqlens=lengths))
            graph.add(touches_lengths=False)  # a matrix product
            wrapped(**layer(cache_seqlens=lengths, window_size=(127, 0)))
            wrapped(**layer(cache_seqlens=lengths, score_mod=abs))  # passed through: it reads them as well
        made = made_in(forward)
        for kind in (made[::3], made[1::3]):
            assert kind[0] is not None
            assert all(one is kind[0] for one in kind)
        lengths.add_(1000)
        graph.add(touches_lengths=True)
        wrapped(**layer(cache_seqlens=lengths))
        wrapped(**layer(cache_seqlens=lengths, window_size=(127, 0)))
        after = made_in(forward)[-2:]
        assert after[0] is not made[0]
        assert after[1] is not made[1]
        wrapped(**layer(cache_seqlens=lengths))
        assert made_in(forward)[-1] is after[0]
    call = asked(policy, cache_seqlens=lengths)
    assert torch.equal(after[0], fa3_metadata.get_scheduler_metadata(**call))


@pytest.mark.parametrize("inference", [False, True])
def test_a_capture_that_shows_no_nodes_shares_nothing(inference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, forward = Graph(monkeypatch), recording_forward()
    monkeypatch.setattr(graph, "nodes", lambda: None)
    wrapped = wrap_forward(forward, BUILD)
    with torch.inference_mode(inference):
        for _ in range(2):
            wrapped(**layer())
    first, second = made_in(forward)
    assert first is not None
    assert second is not first
