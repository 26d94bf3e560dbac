"""Warnings that are said once a process."""

from __future__ import annotations

import logging

from ..settings import DISABLE_VARIABLE

_said: set[str] = set()


def warn_once(log: logging.Logger, text: str) -> None:
    """With what to do about it."""
    if text not in _said:
        _said.add(text)
        log.warning(
            "fa3_metadata: %s. `fa3-metadata doctor` says more; %s=1 turns fa3-metadata off", text, DISABLE_VARIABLE
        )
