"""Head counts of well-known models, for the command line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """Attention shape of one decode layer, before tensor parallelism."""

    num_heads: int
    num_heads_k: int
    headdim: int
    headdim_v: int | None = None
    window_size: tuple[int, int] = (-1, -1)  # of the layers this entry stands for

    def shard(self, tp: int) -> Model:
        """What one of `tp` tensor-parallel ranks has; KV heads are replicated where there are fewer than ranks."""
        if tp < 1 or self.num_heads % tp or (self.num_heads_k % tp and tp % self.num_heads_k):
            raise ValueError(
                f"tp must divide the {self.num_heads} q heads and fit {self.num_heads_k} KV heads, got {tp}"
            )
        return Model(
            self.num_heads // tp, max(1, self.num_heads_k // tp), self.headdim, self.headdim_v, self.window_size
        )


MODELS = {
    "llama-3.1-8b": Model(32, 8, 128),
    "llama-3.1-70b": Model(64, 8, 128),
    "qwen3-32b": Model(64, 8, 128),
    "gpt-oss-20b": Model(64, 8, 64),
    "gpt-oss-20b-window": Model(64, 8, 64, window_size=(127, 0)),
    "gemma-3-27b": Model(32, 16, 128),
    "gemma-3-27b-window": Model(32, 16, 128, window_size=(1023, 0)),
    "deepseek-v3": Model(128, 1, 64, headdim_v=512),  # MLA, absorbed: rotary part and latent
}
