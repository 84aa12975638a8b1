"""How fast the Hub may be asked: whoever is told to wait makes all others of this process wait too.

``huggingface_hub`` waits by itself where it downloads, but not where it looks a model up, which a batch of a thousand
does a thousand times within a minute.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

__all__ = ["LONGEST_WAIT_SECONDS", "asked_to_wait_seconds", "within_limits"]

LONGEST_WAIT_SECONDS = 300.0
"""The Hub's windows are of five minutes. One that asks for a longer pause is not waited for."""

_TOO_MANY = 429
_TRIES = 5
_WAIT_SECONDS = 10.0
"""Where the answer does not say how long."""

_Found = TypeVar("_Found")
_lock = threading.Lock()
_closed_until = 0.0


def asked_to_wait_seconds(headers: Mapping[str, str]) -> float | None:
    """Return how long a refusal asks to wait, by ``Retry-After`` or ``RateLimit``; ``None``: it does not say.

    >>> asked_to_wait_seconds({"retry-after": "7"}), asked_to_wait_seconds({"ratelimit": '"api";r=0;t=55'})
    (7.0, 55.0)
    """
    named = {name.lower(): value for name, value in headers.items()}
    if written := named.get("retry-after", "").strip():
        if written.isdecimal():
            return float(written)
        try:
            return max(0.0, (parsedate_to_datetime(written) - datetime.now(UTC)).total_seconds())
        except (TypeError, ValueError):
            return None
    for part in named.get("ratelimit", "").split(";"):
        name, _, value = part.strip().partition("=")
        if name == "t" and value.isdecimal():
            return float(value)
    return None


def within_limits(ask: Callable[[], _Found]) -> _Found:
    """Return what ``ask`` does; where the Hub says that it is asked too often, wait as long as it says and ask again.

    Raises:
        Exception: What ``ask`` raises else, and the refusal itself where it is repeated or asks for too long a wait.
    """
    for attempt in range(1, _TRIES + 1):
        _wait()
        try:
            return ask()
        except Exception as error:
            response: Any = getattr(error, "response", None)
            if getattr(response, "status_code", None) != _TOO_MANY or attempt == _TRIES:
                raise
            told = asked_to_wait_seconds(response.headers)
            seconds = _WAIT_SECONDS if told is None else told
            if seconds > LONGEST_WAIT_SECONDS:
                raise
            _close(seconds)
    raise AssertionError("the last try returns or raises")


def _close(seconds: float) -> None:
    global _closed_until  # noqa: PLW0603 - one Hub, one clock
    with _lock:
        _closed_until = max(_closed_until, time.monotonic() + seconds)


def _wait() -> None:
    while (left := _closed_until - time.monotonic()) > 0:
        time.sleep(left)
