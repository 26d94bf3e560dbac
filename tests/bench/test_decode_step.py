"""What a decode step of `bench.decode_step` computes, on the CPU: its layers on tiny models, and its models' shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from fa3_metadata.tools.models import MODELS
from torch.overrides import TorchFunctionMode

from bench import decode_step
from bench.decode_models import ATTENTION, PAGE, SPAN, WHOLE, Attention, Model, Whole

from ..helpers.attention_reference import attention as reference

LENGTHS = (1, 64, 65, 130)  # a first token, a full page, one more, and three pages
TINY = Model("tiny", 3, 4, 2, 16, windows=(31, None), hidden=64, intermediate=96, vocabulary=50)
SHAPES = {  # name of the benchmark's model, name in `models`, ranks
    "Llama-3.1-8B": ("llama-3.1-8b", 1),
    "Llama-3.1-8B, e4m3": ("llama-3.1-8b", 1),
    "Llama-3.1-70B, TP8": ("llama-3.1-70b", 8),
    "Qwen3-32B, TP4": ("qwen3-32b", 4),
    "gpt-oss-20b": ("gpt-oss-20b", 1),
    "Gemma-3-27B": ("gemma-3-27b", 1),
    "DeepSeek-V3 MLA, TP8": ("deepseek-v3", 8),
}


class OnCpu(TorchFunctionMode):
    """Makes on the CPU what the benchmark makes on "cuda"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    torch.manual_seed(0)
    with OnCpu():
        yield


def forward(calls: list[dict[str, Any]]) -> Any:
    """FA3's forward in float64, which notes what it was given."""

    def attend(**call: Any) -> torch.Tensor:
        calls.append(call)
        return reference(call).to(call["q"].dtype)

    return attend


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [model for model, _ in (*ATTENTION, *WHOLE)], ids=lambda model: model.name)
def test_heads_are_those_of_a_rank_of_the_model(model: Model) -> None:
    name, ranks = SHAPES[model.name]
    known = MODELS[name].shard(ranks)
    assert (model.num_heads, model.num_heads_k) == (known.num_heads, known.num_heads_k)
    assert (model.headdim, model.headdim_v) == (known.headdim, known.headdim_v)
    for window in set(model.windows) - {None}:
        assert MODELS[f"{name}-window"].window_size == (window, 0)


def test_layers_are_those_of_the_models() -> None:
    layers = {model.name: model.layers for model, _ in (*ATTENTION, *WHOLE)}
    assert layers == {"Llama-3.1-8B": 32, "Llama-3.1-8B, e4m3": 32, "Llama-3.1-70B, TP8": 80, "Qwen3-32B, TP4": 64,
                      "gpt-oss-20b": 24, "Gemma-3-27B": 62, "DeepSeek-V3 MLA, TP8": 61}  # fmt: skip


def test_the_benchmarks_bytes_are_those_of_its_caches() -> None:
    made = Attention(TINY, LENGTHS, forward([]))
    pages = sum(-(-length // PAGE) for length in LENGTHS)
    tensors = [tensor for pair in made.caches for tensor in pair]
    assert sum(tensor.nbytes for tensor in tensors) >= TINY.kv_bytes(pages * PAGE)
    assert len({tensor.data_ptr() for tensor in tensors}) == 2 * TINY.layers  # no two layers share one


# ---- attention -------------------------------------------------------------------------------------------------------


def test_no_two_sequences_share_a_page() -> None:
    made = Attention(TINY, LENGTHS, forward([]))
    own = [row[: -(-length // PAGE)].tolist() for row, length in zip(made.page_table, LENGTHS, strict=True)]
    pages = [page for row in own for page in row]
    assert len(set(pages)) == len(pages)
    assert max(pages) < made.caches[0][0].shape[0]


def test_every_layer_is_called_on_its_own_cache_with_its_own_window_and_metadata() -> None:
    calls: list[dict[str, Any]] = []
    made = Attention(TINY, LENGTHS, forward(calls))
    outputs = made.run(lambda window: {"num_splits": 7 if window is None else 5})
    assert [call["window_size"] for call in calls] == [(31, 0), (-1, -1), (31, 0)]
    assert [call["num_splits"] for call in calls] == [5, 7, 5]
    for layer, call in enumerate(calls):
        assert call["k_cache"] is made.caches[layer][0]
        assert call["v_cache"] is made.caches[layer][1]
        assert call["q"] is made.qs[layer]
        assert call["causal"]
        assert "qv" not in call
    assert all(output.shape == (4, 1, 4, 16) for output in outputs)


def test_mla_has_its_latent_query() -> None:
    calls: list[dict[str, Any]] = []
    made = Attention(Model("MLA", 2, 2, 1, 64, 512), (3, 70), forward(calls))
    assert [output.shape for output in made.run(lambda _: {})] == [(2, 1, 2, 512)] * 2
    assert all(call["qv"].shape == (2, 1, 2, 512) for call in calls)


def test_metadata_is_made_for_what_the_forward_sees() -> None:
    made = Attention(TINY, LENGTHS, forward([]))
    assert made.problem(None)["max_seqlen_k"] == made.page_table.shape[1] * PAGE
    assert made.problem(31)["window_size"] == (31, 0)


# ---- native ----------------------------------------------------------------------------------------------------------


def test_native_makes_copies_and_zeroes_before_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Attention(TINY, LENGTHS, forward([]))
    asked: list[dict[str, Any]] = []

    class FrontEnd:
        @staticmethod
        def get_scheduler_metadata(**call: Any) -> torch.Tensor:
            asked.append(call)
            return torch.full((9,), len(asked), dtype=torch.int32)

    monkeypatch.setattr(decode_step, "import_module", lambda _: FrontEnd)
    before, added = decode_step.native_before(made, "sglang-kernel-0.4.2")
    kept = added["scheduler_metadata"]._base
    assert kept is not None
    for made_so_far in (2, 3):  # the first was for its length
        kept.fill_(-1)
        before()
        assert added["scheduler_metadata"].tolist() == [made_so_far] * 9
        assert not kept[9:].any()
    assert asked[-1]["cache_seqlens"] is made.cache_seqlens
    assert (asked[-1]["batch_size"], asked[-1]["max_seqlen_q"]) == (4, 1)
    assert asked[-1]["window_size"] == (-1, -1)


# ---- a whole model ---------------------------------------------------------------------------------------------------


def rotated(heads: torch.Tensor, position: int) -> torch.Tensor:
    """Rope on [heads, d] as a product of complex numbers, in float64."""
    half = heads.shape[-1] // 2
    angles = position * 500000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    pairs = torch.complex(heads[:, :half], heads[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def normed(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean() + 1e-5).sqrt()


def logits_of(whole: Whole, before: list[list[torch.Tensor]], sequence: int, token: int, length: int) -> torch.Tensor:
    """Logits of one sequence in float64 from the caches as they were; written apart from the benchmark's own."""
    m = whole.model
    pages = whole.page_table[sequence].long()
    x = whole.embedding[token].double()
    for layer, weights in enumerate(whole.weights):
        qkv, out, gate_up, down = (weight.double() for weight in weights)
        heads = (normed(x) @ qkv).view(-1, m.headdim)
        q = rotated(heads[: m.num_heads], length - 1)
        k_new = rotated(heads[m.num_heads : m.num_heads + m.num_heads_k], length - 1)
        keys, values = (cache[pages].flatten(0, 1)[:length].double() for cache in before[layer])
        keys[-1], values[-1] = k_new, heads[m.num_heads + m.num_heads_k :]
        window = m.window_of[layer]
        first = 0 if window is None else max(0, length - 1 - window)
        attended = []
        for head in range(m.num_heads):
            group = head * m.num_heads_k // m.num_heads
            scores = keys[first:, group] @ q[head] / math.sqrt(m.headdim)
            attended.append(scores.softmax(dim=0) @ values[first:, group])
        x = x + torch.cat(attended) @ out
        gate, up = (normed(x) @ gate_up).chunk(2)
        x = x + (gate / (1 + (-gate).exp()) * up) @ down
    return normed(x) @ whole.head.double()


def test_a_whole_step_is_a_transformer() -> None:
    whole = Whole(TINY, LENGTHS, forward([]))
    before = [[cache.clone() for cache in pair] for pair in whole.caches]
    tokens = whole.tokens.tolist()
    (logits,) = whole.run(lambda _: {})
    for i, length in enumerate(LENGTHS):
        expected = logits_of(whole, before, i, tokens[i], length)
        error = (logits[i].double() - expected).norm() / expected.norm()
        assert error < 0.05, (i, error)  # bfloat16 through three layers


def test_a_whole_step_appends_one_token_a_sequence_and_nothing_else() -> None:
    whole = Whole(TINY, LENGTHS, forward([]))
    before = [[cache.clone() for cache in pair] for pair in whole.caches]
    whole.run(lambda _: {})
    wanted = {
        (int(whole.page_table[i, (n - 1) // PAGE]), (n - 1) % PAGE) for i, n in enumerate(LENGTHS)
    }  # page, and place in it
    for pair, old in zip(whole.caches, before, strict=True):
        for cache, was in zip(pair, old, strict=True):
            changed = (cache != was).flatten(2).any(dim=2).nonzero()
            assert {(int(page), int(place)) for page, place in changed} == wanted


def test_a_whole_step_ends_with_the_likeliest_token() -> None:
    whole = Whole(TINY, LENGTHS, forward([]))
    (logits,) = whole.run(lambda _: {})
    assert torch.equal(whole.tokens, logits.argmax(dim=-1))


# ---- where it runs and what it prints --------------------------------------------------------------------------------


def on_gpu(monkeypatch: pytest.MonkeyPatch, build: str, major: int = 9) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU of a test")
    monkeypatch.setenv("FA3_METADATA_BUILD", build)


def no_package(name: str) -> Any:
    raise ModuleNotFoundError(f"No module named {name!r}")


@pytest.mark.parametrize(
    ("build", "major", "found", "says"),
    [
        ("sglang-kernel-0.4.2", 8, no_package, "no Hopper GPU but a GPU of a test"),
        ("vllm-0.33.0", 9, no_package, "vllm-0.33.0 instead of sglang-kernel"),
        ("sglang-kernel-0.4.2", 9, no_package, "sglang-kernel-0.4.2 does not load: No module named"),
        ("sglang-kernel-0.4.0", 9, lambda _: object(), "sglang-kernel-0.4.0 has no get_scheduler_metadata"),
    ],
)
def test_where_it_cannot_run_one_line_says_why(
    build: str, major: int, found: Any, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_gpu(monkeypatch, build, major)
    monkeypatch.setattr(decode_step, "import_module", found)
    assert decode_step.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert says in said.err


def ready(monkeypatch: pytest.MonkeyPatch, measure: Any) -> None:
    on_gpu(monkeypatch, "sglang-kernel-0.4.2")
    monkeypatch.setattr(decode_step, "why_not", lambda _: None)
    monkeypatch.setattr(decode_step, "gpu_facts", lambda: "facts")
    monkeypatch.setattr(decode_step, "measure", measure)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def test_models_and_batches_are_chosen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def measure(model: Model, lengths: tuple[int, ...], *_: Any) -> Any:
        seen.append((model.name, bool(model.hidden), len(lengths)))
        return {
            metric: {name: [[us]] * 2 for name in decode_step.VARIANTS}
            for metric, us in (("device", 100.0), ("host", 10.0))
        }

    ready(monkeypatch, measure)
    assert decode_step.main(["--model", "70B", "gpt", "--batch", "64"]) == 0
    assert seen == [("Llama-3.1-70B, TP8", False, 64), ("gpt-oss-20b", False, 64), ("Llama-3.1-70B, TP8", True, 64)]
    said = capsys.readouterr().out
    assert said.startswith("facts\ntimed: ")
    assert said.count("one launch for all") == 2  # once a model
    assert "gpt-oss-20b: 2 groups of layers (12 window 127, 12 full), one launch for all; native for 12" in said
    assert "tokens/s" in said
    assert "+0.00%" in said
    assert decode_step.main(["--batch", "5"]) == 2


def test_a_wrong_output_ends_it_without_a_speed_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(model: Model, *_: Any) -> Any:
        raise decode_step.DiffersError(f"{model.name}: output 3")

    ready(monkeypatch, measure)
    assert decode_step.main(["--model", "Qwen3"]) == 1
    said = capsys.readouterr()
    assert said.err == "decode-step, batch 16, attention: Qwen3-32B, TP4: output 3\n"
    assert said.out.endswith(decode_step.HEADER + "\n")


# ---- lengths that grow -----------------------------------------------------------------------------------------------


def test_lengths_stay_within_the_pages() -> None:
    made = Whole(TINY, LENGTHS, forward([]))
    for step in (0, 1, SPAN - 1, SPAN, 1000):
        made.reset(step)
        assert made.cache_seqlens.tolist() == [length + step % SPAN for length in LENGTHS]
    unreset = (
        (1 + 3) * decode_step.CAPTURES * len(decode_step.VARIANTS)
    )  # by the samplers, before they are told to reset
    assert SPAN + unreset <= PAGE
    for length, row in zip(LENGTHS, made.page_table, strict=True):
        pages = -(-(length + SPAN + unreset) // PAGE)
        assert pages <= len(row)
        assert len(set(row[:pages].tolist())) == pages


def test_a_step_takes_up_where_the_last_one_ended() -> None:
    whole = Whole(TINY, LENGTHS, forward([]))
    whole.run(lambda _: {})
    tokens = whole.tokens.tolist()
    before = [[cache.clone() for cache in pair] for pair in whole.caches]
    (logits,) = whole.run(lambda _: {})
    for i, length in enumerate(LENGTHS):
        expected = logits_of(whole, before, i, tokens[i], length + 1)
        assert (logits[i].double() - expected).norm() / expected.norm() < 0.05
    whole.reset()
    assert whole.cache_seqlens.tolist() == list(LENGTHS)
    assert torch.equal(whole.tokens, whole.first_tokens)


def test_every_way_sees_the_same_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[list[int]]] = []

    def step_of(variant: str, attention: Attention, build: str, pool: object) -> Any:
        seen.append([])
        return partial(lambda own: own.append(attention.cache_seqlens.tolist()), seen[-1])

    def sampler_of(step: Any, calls: int, before: Any, **_: Any) -> Any:
        def samples(n: int) -> list[float]:
            for _ in range(n):
                before()
                step()
            return [1.0] * n

        return samples

    monkeypatch.setattr(decode_step, "load_forward", lambda _: forward([]))
    monkeypatch.setattr(decode_step, "step_of", step_of)
    monkeypatch.setattr(decode_step, "outputs_of", lambda *_: [])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(decode_step, "eager_sampler", sampler_of)
    monkeypatch.setattr(decode_step, "host_sampler", sampler_of)
    decode_step.measure(Model("A", 1, 2, 1, 16), (5, 9), "sglang-kernel-0.4.2", samples=40, rounds=3)
    turns = [[5 + step % SPAN, 9 + step % SPAN] for step in range(41)]
    assert len(seen) == decode_step.CAPTURES * len(decode_step.VARIANTS)
    assert all(lengths == turns * 2 for lengths in seen)
