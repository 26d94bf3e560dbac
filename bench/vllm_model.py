"""A real vLLM with random weights in this process: its own engine, model runner and CUDA graphs."""

from __future__ import annotations

import json
import os
import pathlib
import sys
import types
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false", "VLLM_LOGGING_LEVEL": "INFO",
}  # fmt: skip
CONFIG: dict[str, Any] = {  # and the sizes of a model
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 128, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "hidden_act": "silu", "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
_SPREAD = 1.28  # of what comes out of a matrix, for ones of spread 1 that go in


def why_not() -> str | None:
    """Why vLLM cannot run here, or None."""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA GPU"
    return None if find_spec("vllm") else "no importable vllm"


def windows_of(layers: int, windows: Sequence[int | None]) -> dict[str, Any]:
    """For a model's config: `windows`, keys to the left that a layer sees, or None for all, in a cycle."""
    cycle = [windows[i % len(windows)] for i in range(layers)]
    seen = {window for window in cycle if window is not None}
    if len(seen) > 1:
        raise ValueError(f"windows must be of one width besides None, got {windows!r}")
    if not seen:
        return {}
    kinds = ["full_attention" if window is None else "sliding_attention" for window in cycle]
    return {"layer_types": kinds, "sliding_window": seen.pop() + 1}


def make_model(folder: pathlib.Path, sizes: dict[str, Any]) -> None:
    """A config; tokens go in and come out as numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | sizes))


def prepare(folder: pathlib.Path, graphs: str = "FULL_DECODE_ONLY") -> None:
    """To be called before anything imports vLLM; `graphs` as for `Engine`."""
    os.environ.update(_ENVIRONMENT | {"VLLM_CACHE_ROOT": str(folder / "cache")})
    if "PIECEWISE" in graphs:
        os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] = "1"  # pieces of a model that is not compiled
    _complete_host()


class Engine:
    """A loaded vLLM. Tokens are drawn at random, the same for the same logits: those of a model with random weights
    soon repeat, and then attention gives the same whatever it reads.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        graphs: str = "FULL_DECODE_ONLY",
        sizes: Sequence[int] = (1, 4, 16),
        context: int = 16384,
        kv_bytes: int = 2 << 30,
        max_splits: int = 32,
        one_group: bool = False,
    ) -> None:
        """`graphs`: vLLM's cudagraph_mode; `sizes`: the batches captured, of which the largest is the most sequences.

        `max_splits`: flash_attn_max_num_splits_for_cuda_graph; `one_group`: without vLLM's hybrid KV cache, so that
        layers with and without a window are in one group.
        """
        prepare(folder, graphs)
        from vllm import LLM

        self.vocabulary = int(json.loads((folder / "config.json").read_text())["vocab_size"])
        captured = {} if graphs == "NONE" else {"cudagraph_capture_sizes": list(sizes)}
        self.llm = LLM(
            model=str(folder), load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True, seed=0,
            max_model_len=context, block_size=16, max_num_seqs=max(sizes), max_num_batched_tokens=max(32768, context),
            enable_prefix_caching=False, kv_cache_memory_bytes=kv_bytes, async_scheduling=False,
            gpu_memory_utilization=0.05,  # what must be free before: other processes may be on the same GPU
            enforce_eager=graphs == "NONE", disable_custom_all_reduce=True, disable_hybrid_kv_cache_manager=one_group,
            kernel_config={"enable_jit_warmup": False, "enable_flashinfer_autotune": False},
            attention_config={"backend": "FLASH_ATTN", "flash_attn_max_num_splits_for_cuda_graph": max_splits},
            compilation_config={"mode": 0, "cudagraph_mode": graphs, "custom_ops": ["all"], **captured},
        )  # fmt: skip
        core = self.llm.llm_engine.engine_core.engine_core
        worker = core.model_executor.driver_worker
        self.runner = getattr(worker, "worker", worker).model_runner
        parts = [part for group in self.runner.attn_groups for part in group]
        self.builders = [part.get_metadata_builder(0) for part in parts]
        self._draw_weights()

    def _draw_weights(self) -> None:
        """Weights that keep values near 1. vLLM's dummies are so small that attention is lost in rounding."""
        import torch

        generator = torch.Generator(device=self.runner.device).manual_seed(1)
        with torch.inference_mode():
            for name, weight in self.runner.model.named_parameters():
                if "norm" in name:
                    weight.fill_(1)
                else:
                    spread = 1 if "embed" in name else _SPREAD / weight.shape[-1] ** 0.5
                    weight.normal_(0, spread, generator=generator)

    def generate(self, requests: Sequence[tuple[int, int]], seed: int) -> None:
        """Run requests of (tokens of context, tokens to generate) to their end, as many at once as there is room for.

        Every call of the engine's `step` is one step of the model.
        """
        import numpy as np
        from vllm import SamplingParams

        rng = np.random.default_rng(seed)
        prompts = [{"prompt_token_ids": rng.integers(3, self.vocabulary, n).tolist()} for n, _ in requests]
        samplings = [
            SamplingParams(temperature=1.0, seed=seed + i, max_tokens=tokens, ignore_eos=True, detokenize=False)
            for i, (_, tokens) in enumerate(requests)
        ]
        self.llm.generate(prompts, samplings, use_tqdm=False)


def _complete_host() -> None:
    """Stand in for what vLLM imports, does not need here, and may find broken on a GPU host."""
    try:
        import numba  # for drafting by n-grams
    except Exception:
        for name in [name for name in sys.modules if name.split(".")[0] == "numba"]:
            del sys.modules[name]
        numba: Any = types.ModuleType("numba")
        numba.jit = numba.njit = lambda *a, **k: a[0] if a and callable(a[0]) else (lambda function: function)
        numba.prange, numba.get_num_threads, numba.set_num_threads = range, lambda: 1, lambda n: None
        sys.modules["numba"] = numba
    import vllm.platforms
    import vllm.third_party.pynvml as nvml

    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # vLLM would find no platform
        vllm.platforms.builtin_platform_plugins["cuda"] = lambda: "vllm.platforms.cuda.NonNvmlCudaPlatform"
