"""What a person means by a name: the number of an attempt, a model, or the hash of an artifact."""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import Any

from sqlalchemy import ColumnElement, Select, or_, select
from sqlalchemy.orm import Session

from db.assemble import conversion_records, conversions
from db.conversions import LARGEST_ID
from db.models import Artifact, Conversion, Revision, SourceModel
from db.records import ArtifactRecord, ConversionRecord
from db.types import storable

__all__ = ["find_artifacts", "find_conversion"]

# What a person may shorten a hash to; shorter ones are too easily a word.
_SHORTEST_PREFIX = 7
# Of one model that are looked at for its artifacts.
_MOST_ATTEMPTS = 100


def find_conversion(session: Session, name: str) -> ConversionRecord | None:
    """Return the attempt that a person means by ``name``; ``None`` where nothing fits.

    Tried in this order: the number of an attempt; a model's id, with ``@`` and a revision or not; the
    first 7 digits or more of an artifact's SHA-256. Of several attempts, the newest.
    """
    return next((record for meant in _meanings(name) if (record := _first(session, conversions().where(*meant)))), None)


def find_artifacts(session: Session, name: str) -> list[ArtifactRecord]:
    """Return the artifacts of the model that a person means by ``name``, as `find_conversion` understands it.

    The newest comes first, but those in quarantine last. Empty where nothing fits.
    """
    for meant in _meanings(name):
        query = conversions().where(*meant, Conversion.artifact_id.is_not(None)).order_by(Conversion.id.desc())
        records = conversion_records(session, query.limit(_MOST_ATTEMPTS))
        if found := {record.artifact.sha256: record.artifact for record in records if record.artifact is not None}:
            return sorted(found.values(), key=lambda artifact: artifact.quarantined)
    return []


def _meanings(name: str) -> Iterator[tuple[ColumnElement[bool], ...]]:
    """Yield what a name may mean, as conditions on attempts, the likelier first."""
    name = storable(name)
    if name.isascii() and name.isdigit() and 0 < (number := int(name[:20])) <= LARGEST_ID:
        yield (Conversion.id == number,)
    yield (_is_model(name),)
    model_id, _, revision = name.rpartition("@")
    if model_id and revision:
        # Of the model alone: no index answers what a revision begins with.
        resolved = (
            select(Revision.id)
            .join(SourceModel, SourceModel.id == Revision.source_model_id)
            .where(SourceModel.model_id == model_id, Revision.revision.startswith(revision, autoescape=True))
        )
        at_revision = or_(Conversion.requested_revision == revision, Conversion.revision_id.in_(resolved))
        yield _is_model(model_id), at_revision
    digits = name.lower()
    if _SHORTEST_PREFIX <= len(digits) <= 64 and set(digits) <= set(string.hexdigits):
        # A range, since neither database uses the index on LIKE under every collation.
        artifacts = select(Artifact.id).where(Artifact.sha256.between(digits, digits.ljust(64, "f")))
        yield (Conversion.artifact_id.in_(artifacts),)


def _is_model(model_id: str) -> ColumnElement[bool]:
    return Conversion.source_model_id.in_(select(SourceModel.id).where(SourceModel.model_id == model_id))


def _first(session: Session, query: Select[Any]) -> ConversionRecord | None:
    records = conversion_records(session, query.order_by(Conversion.id.desc()).limit(1))
    return records[0] if records else None
