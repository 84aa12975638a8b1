"""Where the bars of a batch's timeline stand: a row for each model that ran beside others, a bar for each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from db.listing import TimedConversion

__all__ = ["Bar", "Timeline", "timeline"]

WIDTH = 1000.0
ROW_HEIGHT = 22.0
_TICKS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One step of one attempt, in units of the picture."""

    conversion_id: int
    """Number of the attempt."""

    label: str
    """What a reader is told who points at it."""

    step: str
    """A `db.vocabulary.StepName`, or ``rest`` for time that no step accounts for."""

    failed: bool
    """Whether the attempt did not end well."""

    x: float
    """Left edge."""

    y: float
    """Upper edge."""

    width: float
    """At least half a unit, or nobody would see it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The picture of a batch."""

    bars: tuple[Bar, ...]
    """In the order of attempts."""

    rows: int
    """How many attempts ran beside each other at most."""

    height: float
    """Of all rows."""

    seconds: float
    """How long the whole width is."""

    begins_at: datetime | None
    """What the left edge is; ``None`` where there is no bar."""

    ticks: tuple[tuple[float, float], ...]
    """Place and seconds of the marks below the rows."""


def timeline(attempts: Sequence[TimedConversion]) -> Timeline:
    """Return the bars of the attempts; each stands in the first row that is free when it begins."""
    ordered = sorted(attempts, key=lambda attempt: (attempt.started_at, attempt.id))
    if not ordered:
        return Timeline(bars=(), rows=0, height=0, seconds=0, begins_at=None, ticks=())
    begin = ordered[0].started_at
    whole = max(0.001, *((attempt.finished_at - begin).total_seconds() for attempt in ordered))
    free_at: list[float] = []
    bars: list[Bar] = []
    for attempt in ordered:
        start = (attempt.started_at - begin).total_seconds()
        end = max(start, (attempt.finished_at - begin).total_seconds())
        # Clocks and timings are rounded, so that one may begin a moment before its forerunner has ended.
        row = next((number for number, moment in enumerate(free_at) if moment <= start + 0.01), len(free_at))
        free_at[row : row + 1] = [end]
        at = start
        parts = [(timing.step, timing.seconds) for timing in attempt.timings]
        for step, seconds in parts or [("rest", end - start)]:
            until = min(at + max(0.0, seconds), end) if parts else end
            bars.append(
                Bar(
                    conversion_id=attempt.id,
                    label=f"{attempt.model_id}: {step} {seconds:.1f} s, {attempt.status}",
                    step=step,
                    failed=attempt.status in ("failed", "mismatch"),
                    x=round(at / whole * WIDTH, 2),
                    y=row * ROW_HEIGHT,
                    width=round(max(0.5, (until - at) / whole * WIDTH), 2),
                )
            )
            at = until
    marks = tuple((round(WIDTH * n / _TICKS, 1), whole * n / _TICKS) for n in range(_TICKS + 1))
    return Timeline(
        bars=tuple(bars),
        rows=len(free_at),
        height=len(free_at) * ROW_HEIGHT,
        seconds=whole,
        begins_at=begin,
        ticks=marks,
    )
