"""Head counts of well-known models, for the command line, and of any that has a config.json of Hugging Face's form."""

from __future__ import annotations

import json
import pathlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Model:
    """Attention shape of one decode layer, before tensor parallelism."""

    num_heads: int
    num_heads_k: int
    headdim: int
    headdim_v: int | None = None
    window_size: tuple[int, int] = (-1, -1)  # of the layers this entry stands for
    attention_chunk: int = 0

    def shard(self, tp: int) -> Model:
        """What one of `tp` tensor-parallel ranks has; KV heads are replicated where there are fewer than ranks."""
        if tp < 1 or self.num_heads % tp or (self.num_heads_k % tp and tp % self.num_heads_k):
            raise ValueError(
                f"tp must divide the {self.num_heads} q heads and fit {self.num_heads_k} KV heads, got {tp}"
            )
        return Model(
            self.num_heads // tp, max(1, self.num_heads_k // tp), self.headdim, self.headdim_v, self.window_size,
            self.attention_chunk,
        )  # fmt: skip

    @property
    def words(self) -> str:
        """ "window 127", "chunks of 8192", or "full"."""
        if self.attention_chunk:
            return f"chunks of {self.attention_chunk}"
        return "full" if self.window_size == (-1, -1) else f"window {self.window_size[0]}"


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


@dataclass(frozen=True)
class Layers:
    """The attention layers of a whole model: how many of each kind."""

    name: str
    kinds: tuple[tuple[Model, int], ...]

    @property
    def count(self) -> int:
        return sum(count for _, count in self.kinds)

    def shard(self, tp: int) -> Layers:
        """What one of `tp` ranks has."""
        return Layers(self.name, tuple((model.shard(tp), count) for model, count in self.kinds))


def _whole(name: str, *counts: tuple[str, int]) -> Layers:
    return Layers(name, tuple((MODELS[entry], count) for entry, count in counts))


WHOLE_MODELS = {
    one.name: one
    for one in (
        _whole("llama-3.1-8b", ("llama-3.1-8b", 32)),
        _whole("llama-3.1-70b", ("llama-3.1-70b", 80)),
        _whole("qwen3-32b", ("qwen3-32b", 64)),
        _whole("gpt-oss-20b", ("gpt-oss-20b-window", 12), ("gpt-oss-20b", 12)),
        _whole("gemma-3-27b", ("gemma-3-27b-window", 52), ("gemma-3-27b", 10)),
        _whole("deepseek-v3", ("deepseek-v3", 61)),
    )
}


def read_config(path: pathlib.Path) -> Layers:
    """The attention layers of a config.json as Hugging Face writes it; of a multimodal model its text part.

    Raises `ValueError`, naming the file and the field, where it does not say what is needed.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object")
    config: Mapping[str, Any] = found | found["text_config"] if isinstance(found.get("text_config"), dict) else found
    try:
        kinds = Counter(_layers(config))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    name = str(found.get("_name_or_path") or found.get("model_type") or path.parent.name or path.stem)
    return Layers(name, tuple(kinds.items()))


def _layers(config: Mapping[str, Any]) -> list[Model]:
    count, heads = _number(config, "num_hidden_layers"), _number(config, "num_attention_heads")
    if config.get("kv_lora_rank"):  # multi-head latent attention, absorbed: one KV head of rotary part and latent
        return [Model(heads, 1, _number(config, "qk_rope_head_dim"), _number(config, "kv_lora_rank"))] * count
    heads_k = _number(config, "num_key_value_heads", heads)
    headdim = _number(config, "head_dim", 0) or _number(config, "hidden_size") // heads
    full = Model(heads, heads_k, headdim)
    window, chunk = config.get("sliding_window"), config.get("attention_chunk_size")
    kinds = {"full_attention": full, "attention": full, "global": full}
    if isinstance(window, int) and window > 0:
        # Hugging Face counts the query itself, FA3 the keys to its left.
        kinds["sliding_attention"] = Model(heads, heads_k, headdim, window_size=(window - 1, 0))
    if isinstance(chunk, int) and chunk > 0:
        kinds["chunked_attention"] = Model(heads, heads_k, headdim, attention_chunk=chunk)
    names = config.get("layer_types")
    if isinstance(names, list) and names:
        # Layers of other types, such as linear attention, call no FA3.
        known = [kinds[name] for name in names if name in kinds]
        if not known:
            raise ValueError(f"layer_types has no layers that FA3 runs: {', '.join(map(str, dict.fromkeys(names)))}")
        return known
    sliding = kinds.get("sliding_attention")
    if sliding is None or config.get("use_sliding_window") is False:
        return [full] * count
    pattern = config.get("sliding_window_pattern")
    if isinstance(pattern, int) and pattern > 1:
        return [full if (i + 1) % pattern == 0 else sliding for i in range(count)]
    if config.get("model_type") in ("gemma2", "gpt_oss"):  # every second one, which older files leave to the code
        return [full if i % 2 else sliding for i in range(count)]
    return [sliding] * count


def _number(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None and default is not None:
        return default
    if type(value) is not int or value <= 0:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value
