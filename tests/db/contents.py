"""A catalog with something in every table, and what is in one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from sqlalchemy import Engine, select

import db
from db import ConversionRecord, record_conversion, session_scope
from db.models import Base, ConversionTotal, GroupedTotal

__all__ = ["content", "fill"]

START = datetime(2026, 1, 1, 12, tzinfo=UTC)
MakeRecord = Callable[..., ConversionRecord]


def fill(engine: Engine, make_record: MakeRecord, *, first: int = 1, count: int = 7) -> None:
    numbers: list[int] = []
    with session_scope(engine) as session:
        batch = db.start_batch(session, engine="local", started_at=START)
        for number in range(first, first + count):
            numbers.append(record_conversion(session, make_record(number), batch_id=batch if number % 2 else None))
        # One that a later attempt replaces, one whose difference is no number, one that says odd things.
        record_conversion(session, make_record(first, failure="timeout"))
        (check,) = make_record(first).parity
        record_conversion(session, make_record(first, parity=(replace(check, max_abs_diff=math.nan),)))
        record_conversion(session, make_record(first + count, failure="internal", notes=("\0\ud800 ü",)))
        db.note_template(session, f"{first:064x}", architecture="BertModel", size_bytes=10, reused=False, at=START)
        db.note_found_done(session, batch, [(number, "reused") for number in numbers], found_at=START)
        db.finish_batch(session, batch, db.BatchTotals(converted=count), finished_at=START)


def content(engine: Engine) -> dict[str, list[str]]:
    """Return every row of every table as text, which tells NaN from NaN; totals without their numbers."""
    with session_scope(engine, read_only=True) as session:
        found = {
            table.name: [repr(tuple(row)) for row in session.execute(select(table).order_by(table.c.id))]
            for table in Base.metadata.sorted_tables
            if "id" in table.c
        }
        # They count themselves, in whatever order.
        for totals in (ConversionTotal.__table__, GroupedTotal.__table__):
            found[totals.name] = sorted(repr(tuple(row)[1:]) for row in session.execute(select(totals)))
        return found
