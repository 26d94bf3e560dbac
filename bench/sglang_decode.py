"""Decode steps of a real SGLang: without precomputed metadata, with its own, and with ours inside its CUDA graphs.

    python -m bench sglang-decode                       # minutes; a Hopper GPU and an importable SGLang
    python -m bench sglang-decode --model 70b --case "2k,lognormal" --csv sglang.csv

Models with random weights, in a process each, in the shape of Llama-3.1-8B, gpt-oss-20b, and one tensor-parallel rank
of Llama-3.1-70B, Gemma-3-27B and DeepSeek-V3, without all-reduces (MODELS says which). There, SGLang's attention
backend and its CUDA graphs are made anew for each variant, twice; weights, KV cache, inputs and the graphs' memory pool
are the same for all. They take turns, each of which starts from the same lengths, places in the KV cache and tokens;
the cache is filled with random numbers instead of a prefill.

Timed is `CudaGraphRunner.replay` as SGLang calls it: what it prepares, its precompute among that, and the replay of
the graph. Device time: between events around it, with the GPU kept busy until all is queued. Host time: until it
returns, the GPU idle before. The mean of the medians of both captures; what captures of the same variant differ by, at
most, is printed as "apart": no smaller difference between two variants means anything. The logits of the first steps
are compared first: those with SGLang's metadata and with ours must have the bits of those without, those of "balanced"
be within the error of another order of sums.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

from fa3_metadata.tools.timing import Captured, apart, gpu_facts, middle, spin

from .child import FailedError, answer, answers
from .rows import capture_lines, write_captures
from .sglang_model import load, make_model, use, why_not
from .workloads import lognormal, uniform

VARIANTS = ("none", "sglang", "ours", "balanced")
POLICIES = {"ours": "fa3", "balanced": "balanced"}
CAPTURES = 2  # of each variant
CONTEXT, POOL = 20480, 72_000  # tokens: of a sequence at most, and of the KV cache
STEPS, ROUNDS, COMPARED = 6, 4, 3  # steps of a turn, turns, first steps whose logits are compared
TOLERANCE = 0.1  # relative, of the norm, after many layers of random weights
HEAD_START = 4e-3  # seconds that the host is given to queue a step

MODELS: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": CONTEXT,
    },
    "70b": {  # one rank of eight
        "hidden_size": 8192, "intermediate_size": 3584, "num_hidden_layers": 80, "num_attention_heads": 8,
        "num_key_value_heads": 1, "vocab_size": 16032, "max_position_embeddings": CONTEXT,
    },
    "gemma": {  # Gemma-3-27B, one rank of four: a window of 1,024 in five layers of six
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
        "hidden_size": 5376, "intermediate_size": 5376, "num_hidden_layers": 62, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 65552, "max_position_embeddings": CONTEXT,
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 168, "sliding_window": 1024,
        "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(62)],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
        "pad_token_id": 0,
    },
    "deepseek": {  # DeepSeek-V3, one rank of eight: MLA; all layers are as its first three, without experts
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "hidden_size": 7168, "intermediate_size": 2304, "num_hidden_layers": 61, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 16160, "max_position_embeddings": CONTEXT, "head_dim": 64,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "first_k_dense_replace": 61, "moe_layer_freq": 1, "n_routed_experts": 8, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 256, "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    },
    "gpt-oss": {  # gpt-oss-20b: a window of 128 in every second layer, sinks
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss",
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 201088, "max_position_embeddings": CONTEXT, "head_dim": 64,
        "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "attention_bias": True,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "pad_token_id": 0,
    },
}  # fmt: skip
# SGLang would take this checkout's folder triton_kernels for the package of experts. And the cache of layers with a
# window must hold whole contexts, too, as nothing is evicted here.
SERVER: dict[str, dict[str, Any]] = {"gpt-oss": {"moe_runner_backend": "triton", "swa_full_tokens_ratio": 1.0}}
CASES: dict[str, tuple[int, ...]] = {
    "1 x 512": uniform(1, 512),
    "1 x 16k": uniform(1, 16384),
    "4 x 8k": uniform(4, 8192),
    "16 x 2k": uniform(16, 2048),
    "64 x 1k": uniform(64, 1024),
    "32 lognormal(7, 1)": lognormal(32, 7, 1, 51, 16384),
}


def named(case: str, parts: str) -> bool:
    """Whether one of these parts, with commas between them, is in a case's name."""
    return any(part in case for part in parts.split(","))


# ---- in a model's process --------------------------------------------------------------------------------------------


class Engine:
    """A loaded SGLang, the ways in which its steps have been captured, and the batch that it decodes."""

    def __init__(self, folder: pathlib.Path, model: str, graphs: list[int]) -> None:
        use("sglang")
        more = {"max_total_tokens": POOL, "cuda_graph_bs": graphs, "context_length": CONTEXT} | SERVER.get(model, {})
        self.runner = load(folder, mem_fraction_static=0.9, disable_cuda_graph=True, **more)
        self.model, self.vocabulary = self.runner.torch_runner, MODELS[model]["vocab_size"]
        self.model.server_args.disable_cuda_graph = False
        self.replays: list[float] = []  # microseconds
        self.times_device = False
        self._time_replays()
        self._keep_logits()
        self.ways: dict[str, list[tuple[Any, Any]]] = {variant: [] for variant in VARIANTS}
        for capture in range(CAPTURES):
            for variant in VARIANTS if capture % 2 == 0 else reversed(VARIANTS):
                self.ways[variant].append(self.capture(variant))

    def capture(self, variant: str) -> tuple[Any, Any]:
        """A new attention backend and new graphs."""
        from fa3_metadata.engines.sglang import attach

        self.model.init_attention_backend()
        backend = self.model.attn_backend
        attached = attach(backend, policy=POLICIES[variant]) if variant in POLICIES else None
        if variant == "none":  # SGLang as it was before it made metadata itself
            backend._get_scheduler_metadata = None
        self.model.init_device_graphs()
        if attached is not None:
            attached.detach()  # from the module, for the next capture; graphs keep what they have
        return backend, self.model.graph_runner

    def _time_replays(self) -> None:
        import torch
        from sglang.srt.model_executor.cuda_graph_runner import CudaGraphRunner

        replay = CudaGraphRunner.replay

        def timed_replay(*arguments: Any, **named: Any) -> Any:
            torch.cuda.synchronize()
            if self.times_device:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                spin(HEAD_START)
                start.record()
                output = replay(*arguments, **named)
                end.record()
                end.synchronize()
                self.replays.append(start.elapsed_time(end) * 1000)
            else:
                started = time.perf_counter()
                output = replay(*arguments, **named)
                self.replays.append((time.perf_counter() - started) * 1e6)
            return output

        CudaGraphRunner.replay = timed_replay

    def _keep_logits(self) -> None:
        """Copy logits out of the graphs' pool, so that each capture finds the pool as the first one did.

        Otherwise a way's matrices are multiplied at other addresses than another's, which alone makes up to 1 %.
        """
        import torch

        forward = self.model.model.forward
        kept: dict[int, torch.Tensor] = {}

        def forward_and_copy(*arguments: Any, **named: Any) -> Any:
            output = forward(*arguments, **named)
            logits = output.next_token_logits
            if len(logits) not in kept:  # while SGLang warms up, before it captures
                kept[len(logits)] = torch.empty_like(logits)
            output.next_token_logits = kept[len(logits)].copy_(logits)
            return output

        self.model.model.forward = forward_and_copy

    def fill_cache(self, seed: int) -> None:
        import torch

        generator = torch.Generator("cuda").manual_seed(seed)
        pool = self.model.token_to_kv_pool
        pools = [pool.full_kv_pool, pool.swa_kv_pool] if hasattr(pool, "swa_kv_pool") else [pool]
        for one in pools:  # that of MLA has one buffer a layer
            buffers = one.kv_buffer if hasattr(one, "kv_buffer") else (*one.k_buffer, *one.v_buffer)
            for cache in buffers:
                cache.normal_(generator=generator)

    def start(self, variant: str, capture: int, lengths: tuple[int, ...]) -> None:
        """Take up a batch, as if its prompts had been run, to be decoded in one of the ways."""
        import torch
        from sglang import bench_one_batch

        model = self.model
        model.attn_backend, model.graph_runner = self.ways[variant][capture]
        self.runner.clear()
        forward, sample = model.forward, model.sample
        answer = SimpleNamespace(logits_output=SimpleNamespace(next_token_logits=None))
        model.forward, model.sample = lambda *_: answer, lambda *_: torch.zeros(len(lengths), device="cuda")
        prompts = [[1] * length for length in lengths]
        requests = bench_one_batch.prepare_synthetic_inputs_for_latency_test(len(lengths), 0, prompts)
        _, _, self.batch = self.runner.extend(requests)  # memory alone: its forward does nothing
        model.forward, model.sample = forward, sample
        self.tokens = torch.Generator("cuda").manual_seed(0)

    def steps(self, count: int) -> Iterator[Any]:
        """The logits of some steps of random tokens."""
        import torch

        for _ in range(count):
            size = (len(self.batch.reqs),)
            tokens = torch.randint(self.vocabulary, size, generator=self.tokens, device="cuda")
            yield self.runner.decode(tokens, self.batch)[1].clone()

    def turn(self, metric: str) -> list[float]:
        """Microseconds of some replays; the first is thrown away."""
        self.times_device, self.replays = metric == "device", []
        for _ in self.steps(STEPS + 1):
            pass
        return self.replays[1:]


def compare(logits: dict[str, list[Any]]) -> float:
    """The relative error of "balanced". Raises `FailedError` where logits are not what they must be."""
    import torch

    worst = 0.0
    for i, expected in enumerate(logits["none"]):
        if not torch.isfinite(expected).all():
            raise FailedError(f"logits of step {i} are not finite")
        for variant in ("sglang", "ours"):
            if not torch.equal(logits[variant][i], expected):
                raise FailedError(f"logits of step {i} by {variant!r} have other bits than without metadata")
        error = (logits["balanced"][i].float() - expected.float()).norm() / expected.float().norm()
        worst = max(worst, float(error))
    if not worst < TOLERANCE:
        raise FailedError(f'logits by "balanced" are off by {worst:.3g}, over {TOLERANCE}')
    return worst


Times = dict[str, Captured]  # "device", "host"


def measure(engine: Engine, lengths: tuple[int, ...]) -> tuple[Times, float]:
    """Times, and the relative error of "balanced"."""
    engine.fill_cache(len(lengths))
    error = 0.0
    for capture in range(CAPTURES):
        logits = {}
        for variant in VARIANTS:
            engine.start(variant, capture, lengths)
            logits[variant] = list(engine.steps(COMPARED))
        error = max(error, compare(logits))
    times: Times = {metric: {variant: [[], []] for variant in VARIANTS} for metric in ("device", "host")}
    ways = [(variant, capture) for capture in range(CAPTURES) for variant in VARIANTS]
    for turn in range(ROUNDS):
        for variant, capture in ways if turn % 2 == 0 else reversed(ways):
            engine.start(variant, capture, lengths)
            for metric, captured in times.items():
                captured[variant][capture] += engine.turn(metric)
    return times, error


def cases(model: str, part: str, folder: pathlib.Path) -> Iterator[tuple[str, Times, float]]:
    """Name, times and error of each case that `part` names."""
    make_model(folder, MODELS[model])
    chosen = {case: lengths for case, lengths in CASES.items() if named(case, part)}
    engine = Engine(folder, model, sorted({len(lengths) for lengths in chosen.values()}))
    for case, lengths in chosen.items():
        yield (case, *measure(engine, lengths))


def serve(model: str, part: str, folder: pathlib.Path, parent: Connection) -> None:
    """Send what `cases` gives."""
    answer(partial(cases, model, part, folder), folder, parent)


# ---- the parent ------------------------------------------------------------------------------------------------------


def measured(model: str, part: str, target: Any = serve) -> Iterator[tuple[str, Times, float]]:
    """Cases, times and errors from a model's process. Raises `FailedError`."""
    return answers(target, model, part)


HEADER = f"{'us a replay':26s}" + "".join(f"{name:>10s}" for name in VARIANTS)
HEADER += "   none /" + "".join(f"{name:>9s}" for name in VARIANTS[1:]) + "   sglang / ours   apart"
HEADER += "   host:" + "".join(f"{name:>9s}" for name in VARIANTS) + "   error of balanced"


def line(model: str, case: str, times: Times, error: float) -> str:
    device = {name: middle(captures) for name, captures in times["device"].items()}
    text = f"{model + ', ' + case:26s}" + "".join(f"{device[name]:10.1f}" for name in VARIANTS)
    text += " " * 9 + "".join(f"{device['none'] / device[name]:9.4f}" for name in VARIANTS[1:])
    text += f"{device['sglang'] / device['ours']:16.4f}{100 * apart(times['device']):7.2f}%        "
    return text + "".join(f"{middle(times['host'][name]):9.0f}" for name in VARIANTS) + f"{error:20.1e}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench sglang-decode", description="decode steps of a real SGLang")
    parser.add_argument("--model", choices=MODELS, help="one of them")
    parser.add_argument("--case", default="", help="cases whose name contains one of these: A,B,...")
    parser.add_argument("--csv", type=pathlib.Path, help="write all percentiles there")
    options = parser.parse_args(argv)
    if missing := why_not():
        print(f"sglang-decode needs a Hopper GPU and SGLang: {missing}", file=sys.stderr)
        return 2
    if not any(named(case, options.case) for case in CASES):
        print(f"sglang-decode: --case must be part of one of {', '.join(CASES)}, got {options.case!r}", file=sys.stderr)
        return 2
    print(gpu_facts())
    print(HEADER, flush=True)
    rows = []
    for model in [options.model] if options.model else MODELS:
        try:
            for case, times, error in measured(model, options.case):
                print(line(model, case, times, error), flush=True)
                rows += capture_lines([model, case], times)
        except FailedError as error:
            print(f"{model}: {error}", file=sys.stderr)
            return 1
    if options.csv:
        write_captures(options.csv, ["model", "case"], rows)
    return 0
