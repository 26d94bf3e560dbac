"""Attention in float64, for one layer's arguments of `flash_attn_with_kvcache`: what a kernel's output should be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def attention(call: Mapping[str, Any]) -> torch.Tensor:
    """The output in float64, shaped like q but for the head dim, which is that of v. Scores as in FA3's mha_fwd.

    Knows paged and unpaged caches, ragged queries, appended keys, left padding, causal masks, windows, chunks, softcap,
    sinks, and MLA's qv.
    """
    q, v_cache, starts = call["q"], call["v_cache"], call.get("cu_seqlens_q")
    out = torch.zeros(*q.shape[:-1], v_cache.shape[-1], dtype=torch.float64, device=q.device)
    for i in range(len(call["cache_seqlens"])):
        rows: Any = i if starts is None else slice(int(starts[i]), int(starts[i + 1]))
        qv = None if call.get("qv") is None else call["qv"][rows].double()
        out[rows] = _of_sequence(call, q[rows].double(), _keys(call, "k", i), _keys(call, "v", i), qv)
    return out


def _keys(call: Mapping[str, Any], name: str, i: int) -> torch.Tensor:
    """[keys, heads, dim] that sequence i attends to, appended ones included."""
    cache, table = call[f"{name}_cache"], call.get("page_table")
    padding = 0 if call.get("cache_leftpad") is None else int(call["cache_leftpad"][i])
    own = cache[i] if table is None else cache[table[i].long()].flatten(0, 1)
    own = own[padding : int(call["cache_seqlens"][i])]
    return (own if call.get(name) is None else torch.cat([own, call[name][i]])).double()


def _of_sequence(
    call: Mapping[str, Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, qv: torch.Tensor | None
) -> torch.Tensor:
    k, v = (keys.repeat_interleave(q.shape[1] // keys.shape[1], dim=1) for keys in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k)
    scale = (q.shape[-1] + (0 if qv is None else qv.shape[-1])) ** -0.5
    if qv is not None:
        scores += torch.einsum("qhd,khd->hqk", qv, v)
    scores *= call.get("softmax_scale") or scale
    if softcap := call.get("softcap", 0.0):
        scores = softcap * torch.tanh(scores / softcap)
    scores.masked_fill_(~_visible(call, q.shape[0], k.shape[0], q.device), -torch.inf)
    sinks = call.get("sinks")
    if sinks is not None:  # a logit of every head that takes its share and has no value
        scores = torch.cat([scores, sinks.double().view(-1, 1, 1).expand(-1, q.shape[0], 1)], dim=2)
    shares = scores.softmax(dim=2).nan_to_num()[..., : k.shape[0]]  # nan: a query that sees nothing
    return torch.einsum("hqk,khd->qhd", shares, v)


def _visible(call: Mapping[str, Any], seqlen_q: int, seqlen_k: int, device: torch.device) -> torch.Tensor:
    """[queries, keys]: the last query is at the last key."""
    place = torch.arange(seqlen_q, device=device).view(-1, 1) + seqlen_k - seqlen_q
    key = torch.arange(seqlen_k, device=device)
    left, right = call.get("window_size", (-1, -1))
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if call.get("causal"):
        seen &= key <= place
    if left >= 0:
        seen &= key >= place - left
    if right >= 0:
        seen &= key <= place + right
    if chunk := call.get("attention_chunk", 0):
        first = place.div(chunk, rounding_mode="floor") * chunk
        seen &= (key >= first) & (key < first + chunk)
    return seen
