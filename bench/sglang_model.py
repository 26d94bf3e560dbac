"""A real SGLang with random weights in this process: its own model runner, and where its metadata comes from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pathlib
from importlib.util import find_spec
from typing import Any

_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "SGLANG_USE_SGL_FA3_KERNEL": "1"}
CONFIG: dict[str, Any] = {  # and the sizes of a model
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 128, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "hidden_act": "silu", "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def why_not(gpus: int = 1) -> str | None:
    """Why SGLang cannot run here, or None."""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA GPU"
    if torch.cuda.device_count() < gpus:
        return f"this machine has {torch.cuda.device_count()}"
    return None if find_spec("sglang") else "no importable sglang"


def make_model(folder: pathlib.Path, sizes: dict[str, Any]) -> None:
    """A config and a tokenizer; weights are SGLang's dummies, the same in every process."""
    from tokenizers import Tokenizer, models

    (folder / "config.json").write_text(json.dumps(CONFIG | sizes))
    words = {f"w{i}": i for i in range(sizes["vocab_size"])}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def digest(logits: Any) -> str:
    """Of all their bits."""
    return hashlib.sha256(logits.float().cpu().numpy().tobytes()).hexdigest()


def log_to_stderr() -> None:
    """What our adapter says."""
    logging.getLogger("fa3_metadata").setLevel(logging.DEBUG)
    logging.getLogger("fa3_metadata").addHandler(logging.StreamHandler())


def use(variant: str) -> None:
    """Say where metadata shall come from, before a model is loaded.

    none: FA3, in every layer. sglang: SGLang's precompute. adapter: ours.
    wrapper: `install(wrap_forward=True)` under a SGLang without precompute.
    """
    os.environ.update(_ENVIRONMENT)  # before SGLang is imported
    if variant == "adapter":
        from fa3_metadata.engines.sglang import attach_new_backends

        attach_new_backends()
    if variant == "wrapper":
        import fa3_metadata

        print(fa3_metadata.install(wrap_forward=True))
    if variant in ("none", "wrapper"):  # SGLang as it was before it made metadata itself
        from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend

        init = FlashAttentionBackend.__init__

        def without(self: object, *args: object, **kwargs: object) -> None:
            init(self, *args, **kwargs)
            self._get_scheduler_metadata = None  # type: ignore[attr-defined]

        FlashAttentionBackend.__init__ = without


def load(folder: pathlib.Path, rank: int = 0, ports: Any = None, **more: Any) -> Any:
    """SGLang's runner for the model of `make_model`; `more` are its server arguments.

    A `rank` of several has the GPU of that number; `ports.nccl_port` is where all of them meet.
    """
    from sglang import bench_one_batch
    from sglang.srt.server_args import PortArgs, ServerArgs

    arguments = ServerArgs(
        model_path=str(folder), load_format="dummy", attention_backend="fa3", sampling_backend="pytorch", page_size=1,
        grammar_backend="none", disable_radix_cache=True, disable_piecewise_cuda_graph=True, **more,
    )  # fmt: skip
    return bench_one_batch.load_model(arguments, ports or PortArgs.init_new(arguments), rank, rank)[0]
