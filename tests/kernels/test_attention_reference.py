"""The float64 attention that schedules are judged by, against torch's own and against masks written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ..helpers.attention_reference import attention

LENGTHS, PAGE, HEADS, KV_HEADS, DIM = (37, 5, 64), 8, 6, 2, 16
MASKS = {
    "none": ({}, lambda place, key: True),
    "causal": ({"causal": True}, lambda place, key: key <= place),
    "window": ({"causal": True, "window_size": (6, 0)}, lambda place, key: place - 6 <= key <= place),
    "two-sided window": ({"window_size": (3, 1)}, lambda place, key: place - 3 <= key <= place + 1),
    "chunk": ({"causal": True, "attention_chunk": 8}, lambda place, key: key <= place and key // 8 == place // 8),
}


def make_call(queries: int = 4, dim_v: int = DIM, **more: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    pages = 8
    table = torch.randperm(len(LENGTHS) * pages).view(len(LENGTHS), pages).to(torch.int32)
    return {
        "q": torch.randn(len(LENGTHS), queries, HEADS, DIM), "k_cache": torch.randn(table.numel(), PAGE, KV_HEADS, DIM),
        "v_cache": torch.randn(table.numel(), PAGE, KV_HEADS, dim_v), "page_table": table,
        "cache_seqlens": torch.tensor(LENGTHS, dtype=torch.int32),
    } | more  # fmt: skip


def by_torch(call: dict[str, Any], i: int, length: int, visible: Any, **more: Any) -> torch.Tensor:
    """[queries, heads, dim of v] of sequence i."""
    q = call["q"][i].double().transpose(0, 1)
    k, v = (call[name][call["page_table"][i].long()].flatten(0, 1)[:length].double() for name in ("k_cache", "v_cache"))
    k, v = (keys.transpose(0, 1).repeat_interleave(HEADS // KV_HEADS, dim=0) for keys in (k, v))
    shift = length - q.shape[1]
    mask = torch.tensor([[visible(row + shift, key) for key in range(length)] for row in range(q.shape[1])])
    made = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **more)
    return made.transpose(0, 1)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    more, visible = MASKS[name]
    call = make_call(**more)
    out = attention(call)
    for i, length in enumerate(LENGTHS):
        torch.testing.assert_close(out[i], by_torch(call, i, length, visible))


def test_ragged_queries_and_another_scale() -> None:
    whole = make_call(softmax_scale=0.3, causal=True)
    starts = torch.tensor([0, 4, 5, 7], dtype=torch.int32)
    ragged = whole | {"q": torch.cat([whole["q"][0], whole["q"][1, 3:], whole["q"][2, 2:]]), "cu_seqlens_q": starts}
    out, made = attention(whole), attention(ragged)
    torch.testing.assert_close(made, torch.cat([out[0], out[1, 3:], out[2, 2:]]))
    torch.testing.assert_close(out[0], by_torch(whole, 0, 37, MASKS["causal"][1], scale=0.3))


def test_appended_keys_and_left_padding_are_another_cut_of_the_same_keys() -> None:
    whole = make_call(1)
    table = whole["page_table"].long()
    unpaged = {name: whole[name][table].flatten(1, 2) for name in ("k_cache", "v_cache")} | {"page_table": None}
    expected = attention(whole)
    torch.testing.assert_close(attention(whole | unpaged), expected)
    new = {
        name: torch.stack([unpaged[f"{name}_cache"][i, n - 3 : n] for i, n in enumerate(LENGTHS)])
        for name in ("k", "v")
    }
    torch.testing.assert_close(attention(whole | new | {"cache_seqlens": whole["cache_seqlens"] - 3}), expected)
    shifted = {name: unpaged[name].roll(7, 1) for name in ("k_cache", "v_cache")}
    padding = {"cache_leftpad": torch.full((3,), 7), "cache_seqlens": whole["cache_seqlens"] + 7, "page_table": None}
    some = slice(0, 2)  # the third has no room
    cut = {name: (whole | shifted | padding)[name][some] for name in ("q", "k_cache", "v_cache", "cache_seqlens")}
    torch.testing.assert_close(attention(padding | cut | {"cache_leftpad": torch.full((2,), 7)}), expected[some])


def test_scores_of_mla_are_those_of_one_wider_head() -> None:
    call = make_call(2, dim_v=24, causal=True, qv=torch.randn(len(LENGTHS), 2, HEADS, 24))
    wide = {"q": torch.cat([call["q"], call["qv"]], dim=-1), "qv": None}
    wide["k_cache"] = torch.cat([call["k_cache"], call["v_cache"]], dim=-1)
    torch.testing.assert_close(attention(call), attention(call | wide))


def test_a_sink_is_a_key_without_a_value_and_a_softcap_tames() -> None:
    call, sinks = make_call(1), torch.full((HEADS,), 2.0)
    plain, sunk = attention(call), attention(call | {"sinks": sinks})
    shares = sunk / plain
    assert ((shares > 0) & (shares < 1)).all()
    torch.testing.assert_close(attention(call | {"sinks": torch.full((HEADS,), -1e9)}), plain)
    torch.testing.assert_close(attention(call | {"softcap": 1e6}), plain)
    flat = attention(call | {"softcap": 1e-9})
    k = call["v_cache"][call["page_table"][1].long()].flatten(0, 1)[:5].double()
    torch.testing.assert_close(flat[1, 0, 0], k[:, 0].mean(0))
