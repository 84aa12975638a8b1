"""Pages of conversions as a table shows them: light rows, filters, and a place to go on from.

A page starts after the last row of the one before, never at a number of rows to skip, so that the hundredth page
costs what the first does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, func, or_, select
from sqlalchemy.orm import Session

from db.among import one_of
from db.models import Artifact, Conversion, ParityCheck, SourceModel, StepDuration
from db.records import StepTiming
from db.search import TextSearch
from db.types import storable

__all__ = [
    "ConversionFilter",
    "Counted",
    "ListedConversion",
    "Page",
    "PlaceInListing",
    "TimedConversion",
    "count_up_to",
    "list_page",
    "listed_by_number",
    "model_history",
    "timed_conversions",
]

_ROWS_PER_LOOKUP = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionFilter:
    """Which conversions are asked for; what is ``None`` or empty leaves a filter out."""

    text: str | None = None
    """A part of the model's id; upper and lower case of ASCII letters are the same."""

    status: str | None = None
    """A `db.vocabulary.ConversionStatus`."""

    task: str | None = None
    """The task's name, whole."""

    model_type: str | None = None
    """``model_type`` of the config, whole."""

    error_kind: str | None = None
    """A `db.vocabulary.FailureKind`."""

    worker: str | None = None
    """Name of the machine that it ran on, whole."""

    batch_id: int | None = None
    """Only attempts of this batch, those that were replaced since included."""

    since: datetime | None = None
    """Only what ended at this moment or later."""

    every: bool = False
    """Also attempts that a later one of the same request replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceInListing:
    """The row after which a page begins.

    >>> place = PlaceInListing(finished_at=datetime(2026, 1, 1, tzinfo=UTC), id=7)
    >>> PlaceInListing.read(str(place)) == place
    True
    """

    finished_at: datetime
    """When that row's attempt ended."""

    id: int
    """Its number."""

    def __str__(self) -> str:
        return f"{self.finished_at.astimezone(UTC):%Y%m%dT%H%M%S.%f}-{self.id}"

    @classmethod
    def read(cls, text: str) -> PlaceInListing:
        """Return the place that ``str`` wrote.

        Raises:
            ValueError: If it is none.
        """
        moment, separator, number = text.rpartition("-")
        if not separator or not number.isascii() or not number.isdigit() or len(number) > 18:
            raise ValueError(f"{text[:80]!r} is no place in a listing; take it from the link to the next page")
        return cls(finished_at=datetime.strptime(moment, "%Y%m%dT%H%M%S.%f").replace(tzinfo=UTC), id=int(number))


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedConversion:
    """One row of a listing."""

    id: int
    """Number of the attempt."""

    model_id: str
    """Hub id or folder."""

    status: str
    """How it ended."""

    task: str | None
    """``None`` where detection failed."""

    model_type: str | None
    """``model_type`` of the config."""

    error_kind: str | None
    """Why there is no verified artifact."""

    verdict: str | None
    """What the newest parity check found; ``None`` where there was none."""

    max_abs_diff: float | None
    """Largest difference that it found."""

    tolerance: float | None
    """Largest difference that was allowed."""

    size_bytes: int | None
    """Of the artifact; ``None`` where there is none."""

    quarantined: bool
    """Whether the artifact is one that is not served."""

    seconds: float
    """From the first step's begin to the last one's end."""

    finished_at: datetime
    """When it ended."""

    batch_id: int | None
    """The batch that it belongs to."""

    worker: str | None
    """Name of the machine that it ran on; ``None``: nobody wrote it down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Some rows of a listing."""

    rows: tuple[ListedConversion, ...]
    """Those that ended last come first."""

    next: PlaceInListing | None
    """Where the next page begins; ``None`` on the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """How many rows a listing has, as far as they were counted."""

    number: int
    """So many were found."""

    exact: bool
    """Whether there are no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedConversion:
    """When the steps of one attempt ran."""

    id: int
    """Number of the attempt."""

    model_id: str
    """Hub id or folder."""

    status: str
    """How it ended."""

    started_at: datetime
    """When the first step began."""

    finished_at: datetime
    """When the last one ended."""

    timings: tuple[StepTiming, ...]
    """In the order in which they ran."""


def list_page(
    session: Session, wanted: ConversionFilter, *, limit: int = 50, after: PlaceInListing | None = None
) -> Page:
    """Return the rows that fit, those that ended last first, from the one after ``after`` on."""
    place = [] if after is None else [_comes_after(after)]
    newest_first = (Conversion.finished_at.desc(), Conversion.id.desc())
    if wanted.text:
        numbers = _search(wanted, *place).newest(session, most=limit + 1)
        query = _rows().where(one_of(session, Conversion.id, numbers)).order_by(*newest_first)
    else:
        query = _rows().where(*_conditions(wanted), *place).order_by(*newest_first).limit(limit + 1)
    rows = _listed(session, query)
    last = rows[limit - 1] if len(rows) > limit else None
    following = None if last is None else PlaceInListing(finished_at=last.finished_at, id=last.id)
    return Page(rows=tuple(rows[:limit]), next=following)


def count_up_to(session: Session, wanted: ConversionFilter, *, most: int) -> Counted:
    """Return how many rows fit, ``most`` at most; of a text that many models have, those among the newest rows."""
    if wanted.text:
        number, exact = _search(wanted).count(session, most=most)
        return Counted(number=number, exact=exact)
    inner = select(Conversion.id).where(*_conditions(wanted)).limit(most + 1).subquery()
    number = session.execute(select(func.count()).select_from(inner)).scalar_one()
    return Counted(number=min(number, most), exact=number <= most)


def model_history(session: Session, model_id: str, *, limit: int = 50) -> list[ListedConversion]:
    """Return the newest attempts at one model, whatever was asked of it; those that ended last first."""
    models = select(SourceModel.id).where(SourceModel.model_id == storable(model_id))
    query = _rows().where(Conversion.source_model_id == models.scalar_subquery())
    return _listed(session, query.order_by(Conversion.finished_at.desc(), Conversion.id.desc()).limit(limit))


def listed_by_number(session: Session, numbers: Sequence[int]) -> list[ListedConversion]:
    """Return the rows of these conversions, in the order given; those that are not there are left out."""
    found: dict[int, ListedConversion] = {}
    for chunk in _chunks(numbers):
        found |= {row.id: row for row in _listed(session, _rows().where(one_of(session, Conversion.id, chunk)))}
    return [found[number] for number in numbers if number in found]


def timed_conversions(session: Session, batch_id: int, *, limit: int) -> list[TimedConversion]:
    """Return when the steps of a batch's attempts ran: the ``limit`` recorded last, in the order recorded."""
    query = (
        select(Conversion.id, SourceModel.model_id, Conversion.status, Conversion.started_at, Conversion.finished_at)
        .join(SourceModel, SourceModel.id == Conversion.source_model_id)
        .where(Conversion.batch_id == batch_id)
        .order_by(Conversion.id.desc())
        .limit(limit)
    )
    rows = session.execute(query).all()[::-1]
    timings: dict[int, list[StepTiming]] = {row.id: [] for row in rows}
    steps = select(StepDuration.conversion_id, StepDuration.step, StepDuration.seconds)
    for chunk in _chunks(list(timings)):
        found = steps.where(one_of(session, StepDuration.conversion_id, chunk)).order_by(StepDuration.position)
        for conversion_id, step, seconds in session.execute(found):
            timings[conversion_id].append(StepTiming(step=step, seconds=seconds))
    return [
        TimedConversion(
            id=row.id,
            model_id=row.model_id,
            status=row.status,
            started_at=row.started_at,
            finished_at=row.finished_at,
            timings=tuple(timings[row.id]),
        )
        for row in rows
    ]


def _rows() -> Select[Any]:
    return (
        select(
            Conversion.id,
            SourceModel.model_id,
            Conversion.status,
            Conversion.task,
            Conversion.model_type,
            Conversion.error_kind,
            Conversion.started_at,
            Conversion.finished_at,
            Conversion.batch_id,
            Conversion.worker,
            Artifact.size_bytes,
            Artifact.quarantined,
        )
        .join(SourceModel, SourceModel.id == Conversion.source_model_id)
        .outerjoin(Artifact, Artifact.id == Conversion.artifact_id)
    )


def _listed(session: Session, query: Select[Any]) -> list[ListedConversion]:
    rows = session.execute(query).all()
    checks: dict[int, Any] = {}
    columns = select(
        ParityCheck.conversion_id, ParityCheck.verdict, ParityCheck.max_abs_diff, ParityCheck.tolerance
    ).order_by(ParityCheck.id)
    for chunk in _chunks([row.id for row in rows]):
        for row in session.execute(columns.where(one_of(session, ParityCheck.conversion_id, chunk))):
            checks[row.conversion_id] = row
    return [
        ListedConversion(
            id=row.id,
            model_id=row.model_id,
            status=row.status,
            task=row.task,
            model_type=row.model_type,
            error_kind=row.error_kind,
            verdict=None if (check := checks.get(row.id)) is None else check.verdict,
            max_abs_diff=None if check is None else check.max_abs_diff,
            tolerance=None if check is None else check.tolerance,
            size_bytes=row.size_bytes,
            quarantined=bool(row.quarantined),
            seconds=(row.finished_at - row.started_at).total_seconds(),
            finished_at=row.finished_at,
            batch_id=row.batch_id,
            worker=row.worker,
        )
        for row in rows
    ]


def _search(wanted: ConversionFilter, *more: ColumnElement[bool]) -> TextSearch:
    latest_only = wanted.batch_id is None and not wanted.every
    where = [*_conditions(wanted, latest=False), *more]
    return TextSearch(text=wanted.text or "", where=where, latest_only=latest_only)


def _comes_after(place: PlaceInListing) -> ColumnElement[bool]:
    return and_(
        Conversion.finished_at <= place.finished_at,
        or_(Conversion.finished_at < place.finished_at, Conversion.id < place.id),
    )


def _conditions(wanted: ConversionFilter, *, latest: bool = True) -> list[ColumnElement[bool]]:
    """Return what must hold of a row, save for the text; without ``latest`` also save for being the last attempt."""
    found: list[ColumnElement[bool]] = []
    if wanted.batch_id is not None:
        found.append(Conversion.batch_id == wanted.batch_id)
    elif latest and not wanted.every:
        found.append(Conversion.latest.is_(True))
    for column, value in (
        (Conversion.status, wanted.status),
        (Conversion.task, wanted.task),
        (Conversion.model_type, wanted.model_type),
        (Conversion.error_kind, wanted.error_kind),
        (Conversion.worker, wanted.worker),
    ):
        if value:
            found.append(column == storable(value))
    if wanted.since is not None:
        found.append(Conversion.finished_at >= wanted.since)
    return found


def _chunks(numbers: Sequence[int]) -> list[Sequence[int]]:
    return [numbers[start : start + _ROWS_PER_LOOKUP] for start in range(0, len(numbers), _ROWS_PER_LOOKUP)]
