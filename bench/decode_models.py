"""Models for decode_step.py: the shapes of real ones, their attention over a batch, and everything around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import rms_norm, silu

from .workloads import lognormal, uniform

PAGE = 64
SPAN = 24  # lengths that take turns; below PAGE, as steps that nobody resets come on top


@dataclass(frozen=True)
class Model:
    """What one GPU has of a model. `windows`: keys to the left that each layer sees, None for all, in a cycle."""

    name: str
    layers: int
    num_heads: int
    num_heads_k: int
    headdim: int = 128
    headdim_v: int | None = None  # 512 with headdim 64: MLA
    windows: tuple[int | None, ...] = (None,)
    dtype: str = "bfloat16"
    hidden: int = 0  # of a whole model
    intermediate: int = 0
    vocabulary: int = 0

    @property
    def window_of(self) -> list[int | None]:
        """The window of each layer."""
        return [self.windows[i % len(self.windows)] for i in range(self.layers)]

    @property
    def value_headdim(self) -> int:
        return self.headdim_v or self.headdim

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the KV caches of all layers."""
        element = getattr(torch, self.dtype).itemsize
        return self.layers * tokens * self.num_heads_k * (self.headdim + self.value_headdim) * element


SOME, MANY = lognormal(16, 8, 1, 41, 32768), lognormal(64, 7, 1, 42, 16384)
ATTENTION: tuple[tuple[Model, tuple[tuple[int, ...], ...]], ...] = (
    (Model("Llama-3.1-8B", 32, 32, 8), (SOME, MANY)),
    (Model("Llama-3.1-8B, e4m3", 32, 32, 8, dtype="float8_e4m3fn"), (MANY,)),
    (Model("Llama-3.1-70B, TP8", 80, 8, 1), (SOME, MANY)),
    (Model("Qwen3-32B, TP4", 64, 16, 2), (SOME, MANY)),
    (Model("gpt-oss-20b", 24, 64, 8, 64, windows=(127, None)), (SOME, MANY)),
    (Model("Gemma-3-27B", 62, 32, 16, windows=(1023,) * 5 + (None,)), (SOME,)),
    (Model("DeepSeek-V3 MLA, TP8", 61, 16, 1, 64, 512), (SOME, MANY)),
)
WHOLE: tuple[tuple[Model, tuple[tuple[int, ...], ...]], ...] = (
    (Model("Llama-3.1-8B", 32, 32, 8, hidden=4096, intermediate=14336, vocabulary=128256), (uniform(1, 1024), MANY)),
    (Model("Llama-3.1-70B, TP8", 80, 8, 1, hidden=8192, intermediate=3584, vocabulary=16032), (uniform(1, 1024), MANY)),
)


class Attention:
    """The layers' attention over a batch; `run(metadata)` calls them all, `metadata(window)` adds their arguments."""

    def __init__(self, model: Model, lengths: tuple[int, ...], forward: Callable[..., Any]) -> None:
        self.model, self.forward = model, forward
        self.cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        self.start = self.cache_seqlens.clone()
        pages = [-(-n // PAGE) + 1 for n in lengths]  # one to grow into
        self.page_table = torch.zeros(len(lengths), max(pages), dtype=torch.int32, device="cuda")
        for row, own in zip(self.page_table, torch.randperm(sum(pages), device="cuda").split(pages), strict=True):
            row[: len(own)] = own.to(torch.int32)
        k, v = ((sum(pages), PAGE, model.num_heads_k, d) for d in (model.headdim, model.value_headdim))
        self.caches = [(self.random(*k), self.random(*v)) for _ in range(model.layers)]
        batch = len(lengths)
        self.qs = [self.random(batch, 1, model.num_heads, model.headdim) for _ in range(model.layers)]
        self.qv = self.random(batch, 1, model.num_heads, 512) if model.headdim_v == 512 else None

    def random(self, *shape: int) -> torch.Tensor:
        made = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
        return made.to(getattr(torch, self.model.dtype))

    def attend(self, layer: int, q: torch.Tensor, more: dict[str, Any]) -> torch.Tensor:
        k_cache, v_cache = self.caches[layer]
        window = self.model.window_of[layer]
        if self.qv is not None:
            more = more | {"qv": self.qv}
        out: torch.Tensor = self.forward(
            q=q, k_cache=k_cache, v_cache=v_cache, cache_seqlens=self.cache_seqlens, page_table=self.page_table,
            causal=True, window_size=(-1, -1) if window is None else (window, 0), **more,
        )  # fmt: skip
        return out

    def reset(self, step: int = 0) -> None:
        """Set the lengths to those of this step."""
        torch.add(self.start, step % SPAN, out=self.cache_seqlens)

    def run(self, metadata: Callable[[int | None], dict[str, Any]]) -> list[torch.Tensor]:
        return [self.attend(i, q, metadata(self.model.window_of[i])) for i, q in enumerate(self.qs)]

    def problem(self, window: int | None) -> dict[str, Any]:
        """What `MetadataPlan` and the wheel's front end are told alike."""
        model = self.model
        return {
            "max_seqlen_k": self.page_table.shape[1] * PAGE, "num_heads": model.num_heads,
            "num_heads_k": model.num_heads_k, "headdim": model.headdim, "headdim_v": model.value_headdim,
            "qkv_dtype": getattr(torch, model.dtype), "page_size": PAGE, "causal": True,
            "window_size": (-1, -1) if window is None else (window, 0),
        }  # fmt: skip


class Whole(Attention):
    """The same with everything around it: from the last tokens to the next ones."""

    def __init__(self, model: Model, lengths: tuple[int, ...], forward: Callable[..., Any]) -> None:
        super().__init__(model, lengths, forward)
        d, hidden = model.headdim, model.hidden
        shapes = ((hidden, (model.num_heads + 2 * model.num_heads_k) * d), (model.num_heads * d, hidden),
                  (hidden, 2 * model.intermediate), (model.intermediate, hidden))  # fmt: skip
        self.weights = [[self.weight(*shape) for shape in shapes] for _ in range(model.layers)]
        self.embedding, self.head = self.weight(model.vocabulary, hidden), self.weight(hidden, model.vocabulary)
        self.first_tokens = torch.arange(len(lengths), device="cuda")
        self.tokens = self.first_tokens.clone()
        self.frequencies = 500000.0 ** (-torch.arange(0, d, 2, device="cuda") / d)

    def reset(self, step: int = 0) -> None:
        super().reset(step)
        self.tokens.copy_(self.first_tokens)

    def weight(self, rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda").normal_(std=rows**-0.5)

    def run(self, metadata: Callable[[int | None], dict[str, Any]]) -> list[torch.Tensor]:
        """The logits. Lengths grow last, so that what is made before the next replay is made from that step's."""
        model, batch = self.model, len(self.tokens)
        position = (self.cache_seqlens - 1).long()  # of the new token, which the lengths count already
        page = self.page_table.gather(1, (position // PAGE)[:, None])[:, 0].long()
        slots = page * PAGE + position % PAGE
        angles = position[:, None] * self.frequencies
        cos, sin = (one.repeat(1, 2)[:, None].bfloat16() for one in (angles.cos(), angles.sin()))
        norm = partial(rms_norm, normalized_shape=(model.hidden,), eps=1e-5)
        x = self.embedding[self.tokens]
        for i, (qkv, out, gate_up, down) in enumerate(self.weights):
            heads = (norm(x) @ qkv).view(batch, -1, model.headdim)
            q_and_k, v = heads.split((model.num_heads + model.num_heads_k, model.num_heads_k), dim=1)
            left, right = q_and_k.chunk(2, dim=-1)
            q_and_k = q_and_k * cos + torch.cat((-right, left), dim=-1) * sin
            q, k = q_and_k.split((model.num_heads, model.num_heads_k), dim=1)
            for cache, new in zip(self.caches[i], (k, v), strict=True):
                cache.flatten(0, 1)[slots] = new
            x = x + self.attend(i, q[:, None], metadata(model.window_of[i])).reshape(batch, -1) @ out
            gate, up = (norm(x) @ gate_up).chunk(2, dim=-1)
            x = x + (silu(gate) * up) @ down
        logits = norm(x) @ self.head
        self.tokens.copy_(logits.argmax(dim=-1))
        self.cache_seqlens.add_(1)
        return [logits]
