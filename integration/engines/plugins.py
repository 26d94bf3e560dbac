"""The plugins of SGLang and vLLM, which they run in all of their processes once fa3-metadata is installed.

They go by the environment (settings.py), initialise no CUDA, since an engine may fork later, and never stop an engine:
what cannot be attached to is left alone, and the log says so once. With FA3_METADATA_STRICT=1 they raise instead.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch

from ..installed import installed_version
from ..settings import BATCH_INVARIANT_VARIABLE, DISABLE_VARIABLE, Settings, is_disabled, read_settings
from .once import warn_once

SGLANG_LOG = logging.getLogger("fa3_metadata")
VLLM_LOG = logging.getLogger("vllm.fa3_metadata")  # below vLLM's own logger, so that its handlers print it


def sglang() -> None:
    """Entry point of the group `sglang.srt.plugins`: new backends are attached (`sglang.attach_new_backends`)."""

    def attach(settings: Settings) -> None:
        from .sglang import attach_new_backends
        from .sglang_reach import unknown_version

        version = installed_version("sglang")
        if version is not None and (reason := unknown_version(version)) is not None:
            raise RuntimeError(reason)
        attach_new_backends(policy=settings.policy, batch_invariant=settings.batch_invariant, strict=settings.strict)

    _run("SGLang", SGLANG_LOG, attach)


def vllm() -> None:
    """Entry point of the group `vllm.general_plugins`: `vllm.attach`."""

    def attach(settings: Settings) -> None:
        if settings.batch_invariant:
            raise ValueError(
                f"{BATCH_INVARIANT_VARIABLE} must be 0 for vLLM, got '1': vLLM tells FA3 no num_splits of ours, and "
                "attends to decode rows and prefills in one call; VLLM_BATCH_INVARIANT=1 is vLLM's own"
            )
        from .vllm import attach

        attach(in_place=settings.in_place, policy=settings.policy)

    _run("vLLM", VLLM_LOG, attach)


def _run(engine: str, log: logging.Logger, attach: Callable[[Settings], None]) -> None:
    if is_disabled():
        log.info("fa3_metadata: %s is left alone, since %s is set", engine, DISABLE_VARIABLE)
        return
    settings = read_settings(functools.partial(warn_once, log))
    try:
        if reason := no_cuda():
            raise RuntimeError(reason)
        attach(settings)
    except Exception as error:
        if settings.strict:
            raise
        warn_once(log, f"{engine} is left alone, which works as without fa3-metadata: {error}")


def no_cuda() -> str | None:
    """Why this process has no use for FA3, or None. Asks NVML where that is there, and so initialises nothing."""
    if torch.version.cuda is None:
        return "torch has been built without CUDA"
    if torch.cuda.device_count() == 0:
        return "no CUDA GPU is visible to this process"
    return None
