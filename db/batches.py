"""Batches: when each began and ended, and how many models it was asked for."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.assemble import batch_record
from db.models import Batch
from db.records import BatchRecord, BatchTotals
from db.vocabulary import BatchEngine

__all__ = ["finish_batch", "get_batch", "list_batches", "start_batch"]


def start_batch(
    session: Session,
    *,
    engine: str,
    started_at: datetime,
    models: int | None = None,
    found: BatchTotals | None = None,
) -> int:
    """Add a batch that begins; return its number.

    ``models`` is how many were asked for, ``found`` what is known of them already and not recorded again.
    """
    row = Batch(engine=BatchEngine(engine).value, started_at=started_at, models=models)
    if found is not None:
        row.converted, row.reused = found.converted, found.reused
        row.failed, row.mismatch = found.failed, found.mismatch
    session.add(row)
    session.flush()
    return row.id


def finish_batch(session: Session, batch_id: int, totals: BatchTotals, *, finished_at: datetime) -> None:
    """Say how a batch ended.

    Raises:
        LookupError: If there is no such batch.
    """
    row = session.get(Batch, batch_id)
    if row is None:
        raise LookupError(f"no batch has number {batch_id}")
    row.finished_at = finished_at
    row.converted, row.reused = totals.converted, totals.reused
    row.failed, row.mismatch = totals.failed, totals.mismatch
    session.flush()


def get_batch(session: Session, batch_id: int) -> BatchRecord | None:
    """Return one batch; ``None`` where there is none of that number."""
    row = session.get(Batch, batch_id, populate_existing=True)
    return None if row is None else batch_record(row)


def list_batches(session: Session, *, limit: int = 50, offset: int = 0) -> list[BatchRecord]:
    """Return the batches, newest first."""
    query = select(Batch).order_by(Batch.started_at.desc(), Batch.id.desc()).limit(limit).offset(offset)
    return [batch_record(row) for row in session.scalars(query.execution_options(populate_existing=True))]
