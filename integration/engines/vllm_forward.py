"""vLLM's forward, with metadata of its own where vLLM makes none, and the steps within which layers share it.

That is: models that mix windows within a group of layers, drafts that are built fast, batch invariance, sparse MLA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

from ..scopes import step
from ..wrapper import wrap_forward

# Of the forward that is run: the lengths that its layers may share metadata of, by id. None: whatever they ask for.
_SHARED: ContextVar[frozenset[int] | None] = ContextVar("fa3_metadata_vllm_lengths", default=None)


def with_metadata(
    forward: Callable[..., Any], build: str, policy: str, called: Callable[[], None]
) -> Callable[..., Any]:
    """`flash_attn_varlen_func`, wrapped for FlashAttention-3 over a KV cache and calls without metadata.

    All others go straight to it. `called` is called before each of the former. Raises what `wrap_forward` raises.
    """
    wrapped = wrap_forward(forward, build, policy)

    @functools.wraps(forward)
    def attend(*args: Any, **kwargs: Any) -> Any:
        lengths, has_metadata = kwargs.get("seqused_k"), kwargs.get("scheduler_metadata") is not None
        if has_metadata or lengths is None or kwargs.get("fa_version") != 3 or torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        shared = _SHARED.get()
        if shared is not None and id(lengths) not in shared:
            return forward(*args, **kwargs)  # the layer's own lengths, which another may write anew in the same place
        called()
        return wrapped(*args, **kwargs)

    return attend


def with_steps(enter: Callable[..., Any], entering: Callable[[], None]) -> Callable[..., Any]:
    """`set_forward_context`, which calls `entering` first, and which layers without metadata take for one step.

    vLLM enters it anew for every forward of a model, between which, and not within which, it writes the lengths that
    layers share.
    """

    @functools.wraps(enter)
    @contextmanager
    def enter_step(*args: Any, **kwargs: Any) -> Iterator[Any]:
        entering()
        lengths = lengths_to_share(args[0] if args else kwargs.get("attn_metadata"))
        token = _SHARED.set(lengths)
        try:
            with enter(*args, **kwargs) as entered, nullcontext() if lengths is None else step(lengths_stay=True):
                yield entered
        finally:
            _SHARED.reset(token)

    return enter_step


def lengths_to_share(attn_metadata: Any) -> frozenset[int] | None:
    """Ids of the tensors of metadata that several layers share, and of which vLLM has made none for FA3; None: of none.

    `attn_metadata` is vLLM's: layer -> its metadata, which layers of a group share. One layer alone, such as an EAGLE
    drafter's, has nobody to share with: run eagerly, FA3's own stage costs it less.
    """
    if not isinstance(attn_metadata, dict):
        return None
    lacking = [one for one in attn_metadata.values() if getattr(one, "scheduler_metadata", 0) is None]
    if len(lacking) < 2:
        return None
    groups = {id(one): one for one in lacking}.values()
    return frozenset(id(value) for one in groups for value in vars(one).values() if isinstance(value, torch.Tensor))
