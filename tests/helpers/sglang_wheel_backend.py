"""The FlashAttention backend of a published SGLang, run on CPU: its own source, with stand-ins for what it imports."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import sys
import types
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

_PATH = "sglang/srt/layers/attention/flashattention_backend.py"
_MODULE = "sglang_backend_of_a_wheel"


class _Anything:
    """What nobody has said anything about: false, empty, and whatever is asked of it; of a function a decorator."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else self

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: Any) -> _Anything:
        return self

    def __bool__(self) -> bool:
        return False

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __mro_entries__(self, bases: Any) -> tuple[()]:
        return ()

    def __or__(self, other: Any) -> _Anything:
        return self

    __ror__ = __or__


class _Names(dict[str, Any]):
    """Of the module."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, _Anything())


class _Given(SimpleNamespace):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


_DECODE = _Given(is_decode_or_idle=lambda: True, is_decode=lambda: True)


def _set_decode_metadata(cache_seqlens: torch.Tensor, *given: Any, **_: Any) -> None:
    """Of SGLang's `normal_decode_set_metadata`, whose arguments differ by version: what it does with the lengths."""
    for one, more in pairwise(given[4:]):  # behind req_pool_indices, which looks like them
        if isinstance(one, torch.Tensor) and one.shape == cache_seqlens.shape:
            cache_seqlens.copy_(one + more)
            return
    raise AssertionError("no lengths given")


class WheelBackend:
    """A backend, and the buffers of the runner that replays its graphs."""

    def __init__(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            tree = ast.parse(archive.read(_PATH))
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        names = _Names(torch=torch, dataclass=dataclasses.dataclass, __name__=_MODULE, __builtins__=builtins)
        sys.modules[_MODULE] = types.ModuleType(_MODULE)  # where dataclasses look for it
        exec(compile("from __future__ import annotations\n" + ast.unparse(tree), _PATH, "exec"), names)
        names["normal_decode_set_metadata"] = _set_decode_metadata

        class Backend(names["FlashAttentionBackend"]):  # type: ignore[misc]
            __getattr__ = _Given.__getattr__

        self.backend = object.__new__(Backend)
        vars(self.backend).update(
            decode_cuda_graph_metadata={}, target_verify_metadata={}, draft_extend_metadata={}, forward_metadata=None,
            max_context_len=4096, device="cpu", req_to_token=torch.zeros(16, 4096, dtype=torch.int32), page_size=1,
            topk=0, speculative_num_steps=0, speculative_num_draft_tokens=0, max_num_pages=4096,
            attention_chunk_size=None, _get_scheduler_metadata=None, _sched_meta_buf=None,
        )  # fmt: skip
        self.backend.init_cuda_graph_state(16, 16)
        self.seq_lens, self.rows = torch.ones(16, dtype=torch.int32), torch.arange(16)

    def prepare_capture(self, size: int) -> None:
        if hasattr(type(self.backend), "init_forward_metadata_capture_cuda_graph"):
            self.backend.init_forward_metadata_capture_cuda_graph(
                size, size, self.rows[:size], self.seq_lens[:size], None, _DECODE, None
            )
        else:
            self.backend.init_forward_metadata_out_graph(self._batch(size), in_capture=True)

    def prepare(self, lengths: list[int]) -> None:
        """The replay of a batch, which the runner writes to its buffers first."""
        size = len(lengths)
        self.seq_lens[:size] = torch.tensor(lengths, dtype=torch.int32)
        if hasattr(type(self.backend), "init_forward_metadata_replay_cuda_graph"):
            self.backend.init_forward_metadata_replay_cuda_graph(
                size, self.rows[:size], self.seq_lens[:size], sum(lengths), None, _DECODE, None,
                seq_lens_cpu=self.seq_lens[:size].clone(),
            )  # fmt: skip
        else:
            self.backend.init_forward_metadata_out_graph(self._batch(size))

    def _batch(self, size: int) -> Any:
        lengths = self.seq_lens[:size]
        return _Given(
            batch_size=size, req_pool_indices=self.rows[:size], seq_lens=lengths, seq_lens_sum=int(lengths.sum()),
            seq_lens_cpu=lengths.clone(), positions=self.rows[:size], forward_mode=_DECODE, spec_info=None,
            encoder_lens=None, out_cache_loc=None,
        )  # fmt: skip
