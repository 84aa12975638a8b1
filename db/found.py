"""What a batch found done: the models that it was asked for and did not convert again.

They are no attempts, so that they stand in a table of their own; the totals of the overview count those reused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime

from sqlalchemy import func, insert, or_, select
from sqlalchemy.orm import Session

from db.listing import ListedConversion, listed_by_number
from db.models import Conversion, FoundDone
from db.records import BatchTotals

__all__ = ["found_done_totals", "list_found_done", "note_found_done"]


def note_found_done(session: Session, batch_id: int, found: Iterable[tuple[int, str]], *, found_at: datetime) -> None:
    """Write down what a batch found done: numbers of attempts, each with the status that the batch reports.

    Attempts of the batch itself are left out, and what was written down before: a part of it that was started again
    finds both.
    """
    statuses = dict(found)
    numbers = list(statuses)
    for start in range(0, len(numbers), 500):
        part = numbers[start : start + 500]
        query = select(Conversion.id).where(
            Conversion.id.in_(part),
            or_(Conversion.batch_id.is_(None), Conversion.batch_id != batch_id),
            Conversion.id.not_in(select(FoundDone.conversion_id).where(FoundDone.batch_id == batch_id)),
        )
        rows = [
            {"batch_id": batch_id, "conversion_id": number, "status": statuses[number], "found_at": found_at}
            for number in session.scalars(query.order_by(Conversion.id))
        ]
        if rows:
            session.execute(insert(FoundDone), rows)


def found_done_totals(session: Session, batch_id: int) -> BatchTotals:
    """Return how what a batch found done had ended, by the status that it reports."""
    query = select(FoundDone.status, func.count()).where(FoundDone.batch_id == batch_id).group_by(FoundDone.status)
    return BatchTotals(**{str(status): number for status, number in session.execute(query)})


def list_found_done(session: Session, batch_id: int, *, limit: int) -> list[ListedConversion]:
    """Return what a batch found done, with the status that the batch reports; those recorded last come first."""
    query = select(FoundDone.conversion_id, FoundDone.status).where(FoundDone.batch_id == batch_id)
    found = session.execute(query.order_by(FoundDone.conversion_id.desc()).limit(limit))
    statuses = {row.conversion_id: row.status for row in found}
    return [replace(row, status=statuses[row.id]) for row in listed_by_number(session, list(statuses))]
