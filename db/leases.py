"""Leases: one worker at a time for a key, on whatever machine, and another one once it is gone.

A lease ends by itself unless its owner keeps it, and the database's clock says when: that of a worker may jump. Every
function is one or two statements in the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, DateTime, Row, delete, func, or_, select, type_coerce, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from db.models import Base
from db.records import LeaseRecord, RunningConversion
from db.types import UtcDateTime, storable
from db.vocabulary import StepName

__all__ = [
    "find_leases",
    "forget_lapsed_leases",
    "keep_lease",
    "list_running",
    "note_step",
    "release_lease",
    "take_lease",
]

_LEASES = Base.metadata.tables["leases"]
# A lapsed one says who was lost in the middle of what, to whoever looks soon.
_LAPSED_SECONDS = 24 * 3600.0


def take_lease(session: Session, wanted: LeaseRecord, *, seconds: float, instead_of: str | None = None) -> LeaseRecord:
    """Take a lease that is free or lapsed; return who has it now: ``wanted`` itself, or another.

    Taking it again as the same owner makes it last longer.

    Args:
        session: A transaction.
        wanted: The key, and who wants it.
        seconds: For how long it is had, unless it is kept.
        instead_of: The owner that is known to be gone although its time is not over.
    """
    insert = postgresql.insert if _is_postgresql(session) else sqlite.insert
    values: dict[str, Any] = {
        "owner": wanted.owner,
        "host": wanted.host,
        "process_id": wanted.process_id,
        "process": wanted.process,
        "acquired_at": _moment(session),
        "expires_at": _moment(session, after=seconds),
        "model_id": wanted.model_id,
        "batch_id": wanted.batch_id,
        # Where every model begins, so that its first step needs no statement of its own.
        "step": None if wanted.model_id is None else StepName.FETCH.value,
        "step_began_at": None if wanted.model_id is None else _moment(session),
    }
    may_be_taken = or_(
        _LEASES.c.expires_at < _moment(session),
        _LEASES.c.owner.in_([owner for owner in (wanted.owner, instead_of) if owner is not None]),
    )
    statement = (
        insert(_LEASES)
        .values(key=wanted.key, **values)
        .on_conflict_do_update(index_elements=["key"], set_=values, where=may_be_taken)
        .returning(_LEASES.c.owner)
    )
    while True:
        if session.execute(statement).first() is not None:
            return wanted
        # Where it is given back between the two statements, there is nobody to name.
        if (holder := find_leases(session, [wanted.key]).get(wanted.key)) is not None:
            return holder


def keep_lease(session: Session, lease: LeaseRecord, *, seconds: float) -> bool:
    """Have a lease last so long from now; return whether it is the owner's still.

    One that has lapsed and that nobody has taken is. Until the transaction ends, nobody can take it.
    """
    kept = (
        update(_LEASES)
        .where(_LEASES.c.key == lease.key, _LEASES.c.owner == lease.owner)
        .values(expires_at=_moment(session, after=seconds))
        .returning(_LEASES.c.key)
    )
    return session.execute(kept).first() is not None


def note_step(session: Session, lease: LeaseRecord, step: str | None) -> bool:
    """Write down which step a model under a lease is at, from now; return whether the lease is the owner's still.

    ``None``: it waits for its share of memory.
    """
    noted = (
        update(_LEASES)
        .where(_LEASES.c.key == lease.key, _LEASES.c.owner == lease.owner)
        .values(step=step, step_began_at=_moment(session))
        .returning(_LEASES.c.key)
    )
    return session.execute(noted).first() is not None


def list_running(
    session: Session, *, worker: str | None = None, batch_id: int | None = None, limit: int = 200
) -> list[RunningConversion]:
    """Return the models in work, those begun last first.

    One whose worker is gone stands there until its lease is over.
    """
    now = type_coerce(_moment(session), UtcDateTime).label("now")
    query = select(_LEASES, now).where(_LEASES.c.model_id.is_not(None), _LEASES.c.expires_at >= _moment(session))
    if worker:
        query = query.where(_LEASES.c.host == storable(worker))
    if batch_id is not None:
        query = query.where(_LEASES.c.batch_id == batch_id)
    found = session.execute(query.order_by(_LEASES.c.acquired_at.desc(), _LEASES.c.key).limit(limit))
    return [
        RunningConversion(
            model_id=row.model_id,
            worker=row.host,
            batch_id=row.batch_id,
            step=row.step,
            began_at=row.acquired_at,
            seconds=_seconds(row.acquired_at, row.now),
            step_seconds=_seconds(row.step_began_at or row.acquired_at, row.now),
        )
        for row in found
    ]


def release_lease(session: Session, lease: LeaseRecord) -> bool:
    """Give a lease back; return whether it was had. Nothing where it is another's by now."""
    mine = (_LEASES.c.key == lease.key, _LEASES.c.owner == lease.owner)
    return session.execute(delete(_LEASES).where(*mine).returning(_LEASES.c.key)).first() is not None


def find_leases(session: Session, keys: Collection[str]) -> dict[str, LeaseRecord]:
    """Return who has the leases on keys; those on which nobody has one are left out."""
    lapsed = (_LEASES.c.expires_at < _moment(session)).label("lapsed")
    found = session.execute(select(_LEASES, lapsed).where(_LEASES.c.key.in_(list(keys))))
    return {row.key: _record(row) for row in found}


def forget_lapsed_leases(session: Session) -> None:
    """Remove what killed workers left a day ago or more."""
    session.execute(delete(_LEASES).where(_LEASES.c.expires_at < _moment(session, after=-_LAPSED_SECONDS)))


def _record(row: Row[Any]) -> LeaseRecord:
    return LeaseRecord(
        key=row.key,
        owner=row.owner,
        host=row.host,
        process_id=row.process_id,
        process=row.process,
        lapsed=bool(row.lapsed),
        model_id=row.model_id,
        batch_id=row.batch_id,
    )


def _seconds(begin: datetime, now: datetime) -> float:
    return max(0.0, (now - begin).total_seconds())


def _is_postgresql(session: Session) -> bool:
    return session.get_bind().dialect.name == "postgresql"


def _moment(session: Session, *, after: float = 0.0) -> ColumnElement[datetime]:
    """Return the database's time so many seconds from now, as an expression."""
    if _is_postgresql(session):
        # Not now(), which is when the transaction began: it may have waited for a row since.
        return func.clock_timestamp(type_=DateTime(timezone=True)) + timedelta(seconds=after)
    # As SQLAlchemy writes a moment, so that texts compare as moments do.
    return func.strftime("%Y-%m-%d %H:%M:%f000", "now", f"{after:+.3f} seconds", type_=DateTime())
