"""Where the bars of a batch's timeline stand: a row for each model that ran beside others, a bar for each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from db.listing import TimedConversion

__all__ = ["Bar", "Lane", "Timeline", "timeline"]

WIDTH = 1000.0
ROW_HEIGHT = 22.0
_TICKS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One step of one attempt, in units of the picture."""

    step: str
    """A `db.vocabulary.StepName`, or ``rest`` for time that no step accounts for."""

    x: float
    """Left edge."""

    width: float
    """At least half a unit, or nobody would see it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One attempt: what its steps have in common, so that a page has to say it once."""

    label: str
    """What a reader is told who points at it."""

    failed: bool
    """Whether the attempt did not end well."""

    y: float
    """Upper edge of its bars."""

    bars: tuple[Bar, ...]
    """One for each step, in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The picture of a batch."""

    lanes: tuple[Lane, ...]
    """In the order in which the attempts began."""

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
        return Timeline(lanes=(), rows=0, height=0, seconds=0, begins_at=None, ticks=())
    begin = ordered[0].started_at
    whole = max(0.001, *((attempt.finished_at - begin).total_seconds() for attempt in ordered))
    free_at: list[float] = []
    lanes: list[Lane] = []
    for attempt in ordered:
        start = (attempt.started_at - begin).total_seconds()
        end = max(start, (attempt.finished_at - begin).total_seconds())
        # Clocks and timings are rounded, so that one may begin a moment before its forerunner has ended.
        row = next((number for number, moment in enumerate(free_at) if moment <= start + 0.01), len(free_at))
        free_at[row : row + 1] = [end]
        at = start
        parts = [(timing.step, timing.seconds) for timing in attempt.timings]
        bars: list[Bar] = []
        for step, seconds in parts or [("rest", end - start)]:
            until = min(at + max(0.0, seconds), end) if parts else end
            width = round(max(0.5, (until - at) / whole * WIDTH), 1)
            bars.append(Bar(step=step, x=round(at / whole * WIDTH, 1), width=width))
            at = until
        told = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in parts)
        lanes.append(
            Lane(
                label=f"{attempt.model_id}: {told + ', ' if told else ''}{attempt.status}",
                failed=attempt.status in ("failed", "mismatch"),
                y=row * ROW_HEIGHT,
                bars=tuple(bars),
            )
        )
    marks = tuple((round(WIDTH * n / _TICKS, 1), whole * n / _TICKS) for n in range(_TICKS + 1))
    return Timeline(
        lanes=tuple(lanes),
        rows=len(free_at),
        height=len(free_at) * ROW_HEIGHT,
        seconds=whole,
        begins_at=begin,
        ticks=marks,
    )
