"""How values read on a page: sizes, times, differences; and text from models with nothing invisible in it."""

from __future__ import annotations

import math
import unicodedata
from datetime import UTC, datetime

__all__ = ["count_text", "difference_text", "duration_text", "plain", "size_text", "time_text"]

_LONGEST = 2000


def plain(text: object, longest: int = _LONGEST) -> str:
    r"""Return text from outside with its control and formatting characters shown as U+FFFD, and cut where it is long.

    Templates escape it besides. Line breaks stay; a character that turns the direction of what follows does not.

    >>> plain("a\x1b[2J\u202eb")
    'a\ufffd[2J\ufffdb'
    """
    words = "".join(
        "\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\n\t" else c
        for c in str(text)[: longest + 1]
    )
    return words if len(words) <= longest else words[:longest] + "…"


def size_text(size_bytes: float | None) -> str:
    """Return bytes for people.

    >>> size_text(90), size_text(3 * 1024**2), size_text(None)
    ('90 B', '3.0 MiB', '-')
    """
    if size_bytes is None:
        return "-"
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def duration_text(seconds: float | None) -> str:
    """Return a duration for people.

    >>> duration_text(0.004), duration_text(7.25), duration_text(75), duration_text(7325)
    ('4 ms', '7.2 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{max(0.0, seconds) * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def difference_text(value: float | None) -> str:
    """Return a difference of numbers for people.

    >>> difference_text(1.23e-6), difference_text(float("nan")), difference_text(None)
    ('1.2e-06', 'not a number', '-')
    """
    if value is None:
        return "-"
    return "not a number" if math.isnan(value) else f"{value:.1e}"


def count_text(value: int) -> str:
    """Return a count for people.

    >>> count_text(1234567)
    '1,234,567'
    """
    return f"{value:,}"


def time_text(moment: datetime | None) -> str:
    """Return a moment as text, in UTC and to the minute."""
    return "-" if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M}"
