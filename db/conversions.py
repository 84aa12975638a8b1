"""Attempts by number, key, revision or batch, page by page, or all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from db.among import one_of
from db.assemble import chunked, conversion_records, conversions
from db.models import Artifact, Conversion, SourceModel
from db.records import ConversionRecord
from db.search import TextSearch
from db.types import storable
from db.vocabulary import ConversionStatus

__all__ = [
    "LARGEST_ID",
    "batch_conversions",
    "converted_revisions",
    "count_conversions",
    "get_conversion",
    "iter_artifacts",
    "iter_conversions",
    "latest_by_key",
    "list_conversions",
]

LARGEST_ID = 2**63 - 1
"""The largest number that a row can have."""

_ROWS_PER_CHUNK = 500


def get_conversion(session: Session, conversion_id: int) -> ConversionRecord | None:
    """Return one attempt; ``None`` where there is none of that number."""
    if not 0 < conversion_id <= LARGEST_ID:
        return None
    records = conversion_records(session, conversions().where(Conversion.id == conversion_id))
    return records[0] if records else None


def latest_by_key(session: Session, keys: Collection[str]) -> dict[str, ConversionRecord]:
    """Return the newest attempt of each key; a key that was never attempted is left out.

    The newest is the one recorded last, whatever the clocks of the machines said.
    """
    found: dict[str, ConversionRecord] = {}
    for chunk in chunked(sorted(set(keys))):
        newest = select(func.max(Conversion.id)).where(Conversion.key.in_(chunk)).group_by(Conversion.key)
        for record in conversion_records(session, conversions().where(Conversion.id.in_(newest))):
            if record.key is not None:
                found[record.key] = record
    return found


def converted_revisions(session: Session, revisions: Iterable[tuple[str, str]]) -> list[ConversionRecord]:
    """Return what models are converted to at revisions, given as pairs; what was recorded last first.

    Of the attempts at the same model, requested revision and options only the last one counts.
    """
    wanted = {(storable(model_id), storable(revision)) for model_id, revision in revisions}
    found: list[ConversionRecord] = []
    for chunk in chunked(sorted({model_id for model_id, _ in wanted})):
        models = select(SourceModel.id).where(SourceModel.model_id.in_(chunk))
        query = conversions().where(
            # By the index on models; a model has few revisions and a revision few attempts.
            Conversion.source_model_id.in_(models),
            Conversion.status == ConversionStatus.CONVERTED.value,
            Conversion.latest.is_(True),
        )
        found += [
            record for record in conversion_records(session, query) if (record.model_id, record.revision) in wanted
        ]
    return sorted(found, key=lambda record: record.id or 0, reverse=True)


def batch_conversions(session: Session, batch_id: int, *, after: int = 0) -> list[ConversionRecord]:
    """Return the attempts of a batch that were recorded after the one with the number ``after``, in that order."""
    query = conversions().where(Conversion.batch_id == batch_id, Conversion.id > after)
    return conversion_records(session, query.order_by(Conversion.id))


def list_conversions(
    session: Session,
    *,
    status: str | None = None,
    task: str | None = None,
    text: str | None = None,
    latest_only: bool = True,
    limit: int = 50,
    offset: int = 0,
) -> list[ConversionRecord]:
    """Return one page of attempts, those that finished last first.

    ``None`` leaves a filter out. ``text`` is looked for, whatever the case of its ASCII letters, in model id, task,
    model type and class, and, where it has three letters or more, in the error message. With ``latest_only``, of the
    attempts at the same model, requested revision and options only the last one counts.
    """
    query = conversions().order_by(Conversion.finished_at.desc(), Conversion.id.desc())
    if text is None:
        query = query.where(*_filters(status=status, task=task, latest_only=latest_only))
        return conversion_records(session, query.limit(limit).offset(offset))
    search = _text_search(text, status=status, task=task, latest_only=latest_only)
    numbers = search.newest(session, most=limit + offset)[offset:]
    return [
        record
        for chunk in chunked(numbers)
        for record in conversion_records(session, query.where(one_of(session, Conversion.id, chunk)))
    ]


def count_conversions(
    session: Session,
    *,
    status: str | None = None,
    task: str | None = None,
    text: str | None = None,
    latest_only: bool = True,
    most: int | None = None,
) -> int:
    """Return how many attempts `list_conversions` would return without a limit; with ``most``, so many at most.

    A text is counted by finding what has it, so a limit is wise there.
    """
    if text is not None:
        search = _text_search(text, status=status, task=task, latest_only=latest_only)
        return len(search.newest(session, most=LARGEST_ID if most is None else most))
    query = select(Conversion.id).where(*_filters(status=status, task=task, latest_only=latest_only)).limit(most)
    return session.execute(select(func.count()).select_from(query.subquery())).scalar_one()


def iter_conversions(session: Session, *, latest_only: bool = False) -> Iterator[ConversionRecord]:
    """Yield every attempt in the order recorded, holding a few hundred in memory at a time."""
    last = 0
    while True:
        query = conversions().where(Conversion.id > last, *_filters(latest_only=latest_only))
        records = conversion_records(session, query.order_by(Conversion.id).limit(_ROWS_PER_CHUNK))
        yield from records
        if len(records) < _ROWS_PER_CHUNK or (last_id := records[-1].id) is None:
            return
        last = last_id


def iter_artifacts(session: Session) -> Iterator[ConversionRecord]:
    """Yield the newest attempt behind every artifact, in the order in which artifacts were stored first."""
    last = 0
    while True:
        page = (
            select(Artifact.id, func.max(Conversion.id))
            .join(Conversion, Conversion.artifact_id == Artifact.id)
            .where(Artifact.id > last)
            .group_by(Artifact.id)
            .order_by(Artifact.id)
            .limit(_ROWS_PER_CHUNK)
        )
        rows = session.execute(page).all()
        if not rows:
            return
        found = {
            r.id: r for r in conversion_records(session, conversions().where(Conversion.id.in_(n for _, n in rows)))
        }
        yield from (found[number] for _, number in rows)
        last = rows[-1][0]


def _filters(*, status: str | None = None, task: str | None = None, latest_only: bool) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if latest_only:
        found.append(Conversion.latest.is_(True))
    elif status is not None and task is not None:
        # Whatever it is: the index that has both begins with it.
        found.append(Conversion.latest.in_([True, False]))
    if status is not None:
        found.append(Conversion.status == status)
    if task is not None:
        found.append(Conversion.task == task)
    return found


def _text_search(text: str, *, status: str | None, task: str | None, latest_only: bool) -> TextSearch:
    where = _filters(status=status, task=task, latest_only=False)
    return TextSearch(text=text, where=where, latest_only=latest_only, everywhere=True)
