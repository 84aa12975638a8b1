"""Trying a step again where the cause of its failure may pass."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import tenacity

from onnx_config.errors import FerryError

__all__ = ["RETRIES", "RETRY_WAIT_SECONDS", "is_transient", "with_retries"]

RETRIES = 2
"""How often a step is tried again after an error that may pass."""

RETRY_WAIT_SECONDS = 2.0
"""Wait before the first retry; it doubles."""


def is_transient(error: BaseException) -> bool:
    """Return whether the same step may succeed if it is simply tried again."""
    return isinstance(error, FerryError) and error.kind.transient


def with_retries(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with retries after errors that may pass."""
    return tenacity.retry(
        retry=tenacity.retry_if_exception(is_transient),
        stop=tenacity.stop_after_attempt(1 + RETRIES),
        wait=_wait_seconds,
        reraise=True,
    )(function)


def _wait_seconds(state: tenacity.RetryCallState) -> float:
    doubled: int = 2 ** (state.attempt_number - 1)
    # Up to a quarter more, so that models which failed together do not come again together.
    return RETRY_WAIT_SECONDS * doubled * random.uniform(1, 1.25)
