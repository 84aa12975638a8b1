"""Graphs without weights: which there are, and how often models were bound to them."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from db.assemble import chunked
from db.models import Template
from db.records import TemplateRecord
from db.rows import get_or_add

__all__ = ["forget_templates", "list_templates", "note_template"]


def note_template(
    session: Session, key: str, *, architecture: str | None, size_bytes: int, reused: bool, at: datetime
) -> None:
    """Say that a model was bound to a template, which is added where it is new."""
    row = get_or_add(
        session,
        Template,
        {"key": key},
        lambda: {
            "architecture": architecture,
            "size_bytes": size_bytes,
            "hits": 0,
            "created_at": at,
            "last_used_at": at,
        },
    )
    # Counted by the database, since two workers may do so at once.
    changes = {"hits": Template.hits + int(reused), "size_bytes": size_bytes, "last_used_at": at}
    session.execute(update(Template).where(Template.id == row.id).values(changes))


def list_templates(session: Session) -> list[TemplateRecord]:
    """Return all templates, those used last first."""
    rows = session.scalars(select(Template).order_by(Template.last_used_at.desc(), Template.id.desc()))
    return [
        TemplateRecord(
            key=row.key,
            architecture=row.architecture,
            size_bytes=row.size_bytes,
            hits=row.hits,
            created_at=row.created_at,
            last_used_at=row.last_used_at,
        )
        for row in rows
    ]


def forget_templates(session: Session, keys: Collection[str]) -> int:
    """Remove templates whose files are gone; return how many were known."""
    return sum(
        session.execute(delete(Template).where(Template.key.in_(part))).rowcount  # type: ignore[attr-defined]
        for part in chunked(sorted(keys))
    )
