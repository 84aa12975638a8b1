"""What an overview shows: how many of what over time, why models fail, what steps cost.

Counts come from the totals that the catalog keeps per hour and per day; what is kept nowhere in sums, such as the
median of a step, is taken from the newest attempts only, and says from how many.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from db.assemble import batch_record
from db.found import found_done_totals
from db.models import Artifact, Batch, Conversion, ConversionTotal, GroupedTotal, StepDuration
from db.records import BatchRecord, BatchTotals
from db.search import known_values
from db.types import storable
from db.vocabulary import Dimension, Span, StepName

__all__ = [
    "ArtifactSizes",
    "OverviewFilter",
    "Period",
    "StepFigures",
    "TotalsPoint",
    "artifact_sizes",
    "count_by",
    "current_totals",
    "known_words",
    "running_batches",
    "running_totals",
    "step_figures",
    "totals_of",
    "totals_over_time",
]

_SAMPLED_ATTEMPTS = 500
_FORGOTTEN_AFTER = timedelta(days=7)


class Period(StrEnum):
    """How far back an overview looks."""

    DAY = "24h"
    WEEK = "7d"
    MONTH = "30d"
    QUARTER = "90d"
    ALL = "all"

    @property
    def span(self) -> Span:
        """How long one point of its charts is."""
        return Span.HOUR if self in (Period.DAY, Period.WEEK) else Span.DAY

    def since(self, now: datetime) -> datetime | None:
        """Return when it begins, at a whole hour or day; ``None``: with the first attempt."""
        match self:
            case Period.DAY:
                return now.replace(minute=0, second=0, microsecond=0) - timedelta(hours=23)
            case Period.WEEK:
                return now.replace(minute=0, second=0, microsecond=0) - timedelta(hours=7 * 24 - 1)
            case Period.MONTH:
                return now.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=29)
            case Period.QUARTER:
                return now.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=89)
            case Period.ALL:
                return None


@dataclass(frozen=True, slots=True, kw_only=True)
class OverviewFilter:
    """Which attempts count; ``None`` or empty leaves a filter out."""

    period: Period = Period.MONTH
    """How far back."""

    now: datetime
    """The moment at which the period ends; aware."""

    task: str | None = None
    """The task's name, whole."""

    model_type: str | None = None
    """``model_type`` of the config, whole."""

    worker: str | None = None
    """Name of the machine that ran them, whole."""

    @property
    def since(self) -> datetime | None:
        """When the first hour or day begins; ``None``: with the first attempt."""
        return self.period.since(self.now.astimezone(UTC))


@dataclass(frozen=True, slots=True, kw_only=True)
class TotalsPoint:
    """The attempts that ended in one hour or day."""

    start: datetime
    """When the hour or day begins; UTC."""

    totals: BatchTotals
    """How they ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    """What one step costs."""

    step: str
    """A `db.vocabulary.StepName`."""

    sampled: int
    """How many attempts the figures are of: the newest that ran the step."""

    median_seconds: float
    """Half of them took no longer."""

    p95_seconds: float
    """Of a hundred, 95 took no longer."""

    median_peak_bytes: int | None
    """Of the attempts in which this step took longest, half needed no more; ``None`` where it was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactSizes:
    """What the artifacts take on disk, whoever made them."""

    served: int
    """Artifacts that are served."""

    served_bytes: int
    """Theirs together."""

    quarantined: int
    """Artifacts that are kept for a look."""

    quarantined_bytes: int
    """Theirs together."""


def totals_over_time(session: Session, wanted: OverviewFilter) -> list[TotalsPoint]:
    """Return one point for each hour or day that has an attempt, in the order of time."""
    table, conditions = _counted(wanted)
    query = (
        select(table.start, table.status, func.sum(table.conversions))
        .where(*conditions)
        .group_by(table.start, table.status)
        .order_by(table.start)
    )
    points: dict[datetime, dict[str, int]] = defaultdict(dict)
    for start, status, conversions in session.execute(query):
        points[start][status] = int(conversions)
    return [TotalsPoint(start=start, totals=BatchTotals(**counts)) for start, counts in points.items()]


def count_by(session: Session, wanted: OverviewFilter, column: str) -> dict[str, int]:
    """Return how many attempts there are of each word of a column.

    The columns are ``status``, ``error_kind``, ``template``, ``task``, ``model_type`` and ``worker``. Attempts
    that have none are left out. Most come first.
    """
    table, conditions = _counted(wanted, column)
    chosen = table.word if table is GroupedTotal and column in _DIMENSIONS else getattr(table, column)
    number = func.sum(table.conversions)
    query = select(chosen, number).where(*conditions, chosen != "").group_by(chosen).order_by(number.desc(), chosen)
    return {word: int(conversions) for word, conversions in session.execute(query)}


def known_words(session: Session, column: str) -> list[str]:
    """Return every ``task``, ``model_type`` or ``worker`` of an attempt, by name."""
    return known_values(session, getattr(Conversion, column))


def current_totals(session: Session) -> BatchTotals:
    """Return how what was asked for stands now: of the attempts at the same request only the last one counts."""
    query = select(Conversion.status, func.count()).where(Conversion.latest.is_(True)).group_by(Conversion.status)
    return BatchTotals(**{str(status): number for status, number in session.execute(query)})


def step_figures(session: Session, wanted: OverviewFilter) -> list[StepFigures]:
    """Return what each step costs, over the newest attempts that fit, in the order of the steps.

    Memory is measured per attempt, so it is told at each step of the attempts in which that step was the longest.
    """
    query = select(Conversion.id, Conversion.peak_rss_bytes).order_by(
        Conversion.finished_at.desc(), Conversion.id.desc()
    )
    for column, value in (
        (Conversion.task, wanted.task),
        (Conversion.model_type, wanted.model_type),
        (Conversion.worker, wanted.worker),
    ):
        if value:
            # What was replaced since counts too, but the index that serves one word begins with what was not.
            query = query.where(column == storable(value), Conversion.latest.is_(True))
    if wanted.since is not None:
        query = query.where(Conversion.finished_at >= wanted.since)
    peaks: dict[int, int | None] = {
        row.id: row.peak_rss_bytes for row in session.execute(query.limit(_SAMPLED_ATTEMPTS))
    }
    spent: dict[str, list[float]] = defaultdict(list)
    longest: dict[int, tuple[float, str]] = {}
    numbers = list(peaks)
    steps: Any = select(StepDuration.conversion_id, StepDuration.step, StepDuration.seconds)
    for first in range(0, len(numbers), 500):
        for conversion_id, step, seconds in session.execute(
            steps.where(StepDuration.conversion_id.in_(numbers[first : first + 500]))
        ):
            spent[step].append(seconds)
            longest[conversion_id] = max(longest.get(conversion_id, (0.0, step)), (seconds, step))
    memory: dict[str, list[int]] = defaultdict(list)
    for conversion_id, (_, step) in longest.items():
        if (peak := peaks[conversion_id]) is not None:
            memory[step].append(peak)
    return [
        StepFigures(
            step=step.value,
            sampled=len(spent[step]),
            median_seconds=_quantile(sorted(spent[step]), 0.5),
            p95_seconds=_quantile(sorted(spent[step]), 0.95),
            median_peak_bytes=int(_quantile(sorted(memory[step]), 0.5)) if memory[step] else None,
        )
        for step in StepName
        if spent[step]
    ]


def artifact_sizes(session: Session) -> ArtifactSizes:
    """Return how many artifacts there are, and their bytes."""
    query = select(Artifact.quarantined, func.count(), func.sum(Artifact.size_bytes)).group_by(Artifact.quarantined)
    found = {bool(quarantined): (number, int(size)) for quarantined, number, size in session.execute(query)}
    served, kept = found.get(False, (0, 0)), found.get(True, (0, 0))
    return ArtifactSizes(served=served[0], served_bytes=served[1], quarantined=kept[0], quarantined_bytes=kept[1])


def running_batches(session: Session, *, now: datetime) -> list[BatchRecord]:
    """Return the batches of the last seven days that have no end, newest first: they run, or they were killed."""
    query = select(Batch).where(Batch.finished_at.is_(None), Batch.started_at >= now - _FORGOTTEN_AFTER)
    return [batch_record(row) for row in session.scalars(query.order_by(Batch.started_at.desc()).limit(20))]


def totals_of(session: Session, batch: BatchRecord) -> BatchTotals:
    """Return how the models of a batch ended; while it runs, those so far, with what it found done."""
    return batch.totals or running_totals(session, batch.id)


def running_totals(session: Session, batch_id: int) -> BatchTotals:
    """Return how the models of a batch ended of which something is recorded so far, those found done included."""
    query = select(Conversion.status, func.count()).where(Conversion.batch_id == batch_id).group_by(Conversion.status)
    made = {str(status): number for status, number in session.execute(query)}
    found = asdict(found_done_totals(session, batch_id))
    return BatchTotals(**{word: number + made.get(word, 0) for word, number in found.items()})


_DIMENSIONS = ("task", "model_type", "worker")


def _counted(
    wanted: OverviewFilter, column: str = ""
) -> tuple[type[GroupedTotal] | type[ConversionTotal], list[ColumnElement[bool]]]:
    """Return the totals that tell apart what is asked for and little more, and which of them count."""
    given = {"task": wanted.task, "model_type": wanted.model_type, "worker": wanted.worker}
    named = {name: value for name, value in given.items() if value}
    needed = {*named, *({column} & set(_DIMENSIONS))}
    table: type[GroupedTotal] | type[ConversionTotal]
    found: list[ColumnElement[bool]]
    if len(needed) > 1:
        table = ConversionTotal
        found = [getattr(ConversionTotal, name) == storable(value) for name, value in named.items()]
    else:
        table = GroupedTotal
        dimension = Dimension(needed.pop()) if needed else Dimension.ALL
        found = [GroupedTotal.dimension == dimension.value]
        if dimension is Dimension.ALL:
            # All have it, and the index goes on by time only behind it.
            found.append(GroupedTotal.word == "")
        found += [GroupedTotal.word == storable(value) for value in named.values()]
    found.append(table.span == wanted.period.span.value)
    if wanted.since is not None:
        found.append(table.start >= wanted.since)
    return table, found


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Return the value that ``share`` of the ordered ones do not exceed; there is one at least."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
