"""Trying a step again where the cause of its failure may pass."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import tenacity

from onnx_config.errors import FerryError

__all__ = [
    "FIRST_PATIENCE_SECONDS",
    "PATIENCE_SECONDS",
    "RETRIES",
    "RETRY_WAIT_SECONDS",
    "Patience",
    "is_transient",
    "patience_with",
    "with_retries",
]

RETRIES = 2
"""How often a step is tried again after an error that may pass."""

RETRY_WAIT_SECONDS = 2.0
"""Wait before the first retry; it doubles."""

PATIENCE_SECONDS = 60.0
"""For how long a server that has answered before is called again."""

FIRST_PATIENCE_SECONDS = 6.0
"""For how long a server that has never answered is called."""

_LONGEST_PAUSE_SECONDS = 5.0

Result = TypeVar("Result")


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


class Patience:
    """Calls a server again while it is silent: a database that is being restarted, a store that refuses for a while.

    What waits is a single call that costs nothing, behind hours of work. All callers share one silence, so that a
    server which is gone for good holds up a batch once and not each of its models.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._silent_since: float | None = None
        self._has_answered = False

    def call(self, function: Callable[[], Result], *, passes: Callable[[Exception], bool]) -> Result:
        """Return what ``function`` returns, called again with growing pauses after errors of which ``passes`` holds."""
        pause = RETRY_WAIT_SECONDS / 4
        while True:
            try:
                result = function()
            # Judged by who knows the server's errors.
            except Exception as error:
                if not passes(error) or self._silent_seconds() + pause > self._limit_seconds:
                    raise
                time.sleep(pause * random.uniform(1, 1.25))
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            else:
                with self._lock:
                    self._silent_since, self._has_answered = None, True
                return result

    @property
    def _limit_seconds(self) -> float:
        # Whoever has named a server that does not exist wants to hear so soon.
        return PATIENCE_SECONDS if self._has_answered else FIRST_PATIENCE_SECONDS

    def _silent_seconds(self) -> float:
        with self._lock:
            now = time.monotonic()
            if self._silent_since is None:
                self._silent_since = now
            return now - self._silent_since


@lru_cache(maxsize=32)
def patience_with(url: str) -> Patience:
    """Return the patience that this process has with the server at ``url``."""
    return Patience()


def _wait_seconds(state: tenacity.RetryCallState) -> float:
    doubled: int = 2 ** (state.attempt_number - 1)
    # Up to a quarter more, so that models which failed together do not come again together.
    return RETRY_WAIT_SECONDS * doubled * random.uniform(1, 1.25)
