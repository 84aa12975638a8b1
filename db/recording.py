"""What is written of attempts: one more, one more check of it, or that what came of it no longer holds."""

from __future__ import annotations

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from db.models import Artifact, Conversion, Revision, SourceModel, StepDuration
from db.records import ConversionRecord, ErrorRecord, ParityRecord
from db.rows import artifact_id, environment_id, get_or_add, parity_row, sha256_of
from db.types import storable
from db.vocabulary import ConversionStatus

__all__ = ["quarantine_artifact", "record_conversion", "record_parity"]


def record_conversion(session: Session, record: ConversionRecord, *, batch_id: int | None = None) -> int:
    """Add one attempt, and what it refers to where that is new; return its number.

    An artifact that is there already, by its content, keeps its files and graphs; its folder and
    quarantine become those of ``record``, which knows better where the content is now.
    The record's own ``id`` and ``batch_id`` are ignored.
    """
    source = get_or_add(session, SourceModel, {"model_id": storable(record.model_id)})
    # Workers that record the same model take turns from here, so that exactly one attempt is the latest.
    session.execute(select(SourceModel.id).where(SourceModel.id == source.id).with_for_update())
    revision = None
    if record.revision is not None:
        revision = get_or_add(session, Revision, {"source_model_id": source.id, "revision": storable(record.revision)})
    subject = sha256_of([record.model_id, record.requested_revision, dict(record.options)])
    session.execute(
        update(Conversion).where(Conversion.subject == subject, Conversion.latest.is_(True)).values(latest=False)
    )
    error = record.error
    row = Conversion(
        key=record.key,
        subject=subject,
        latest=True,
        source_model_id=source.id,
        requested_revision=record.requested_revision,
        revision_id=None if revision is None else revision.id,
        environment_id=environment_id(session, record.environment),
        artifact_id=None if record.artifact is None else artifact_id(session, record.artifact),
        batch_id=batch_id,
        worker=record.worker,
        status=str(record.status),
        task=record.task,
        task_family=record.task_family,
        model_type=record.model_type,
        architecture=record.architecture,
        template=None if record.template is None else str(record.template),
        simplified=record.simplified,
        options=dict(record.options),
        attempts=record.attempts,
        peak_rss_bytes=record.peak_rss_bytes,
        notes=list(record.notes),
        error_kind=None if error is None else str(error.kind),
        error_message=None if error is None else error.message,
        error_step=None if error is None else str(error.step),
        error_reproduce=None if error is None else error.reproduce,
        started_at=record.started_at,
        finished_at=record.finished_at,
        timings=[
            StepDuration(position=position, step=str(timing.step), seconds=timing.seconds)
            for position, timing in enumerate(record.timings)
        ],
        parity=[parity_row(session, parity) for parity in record.parity],
    )
    session.add(row)
    session.flush()
    return row.id


def record_parity(session: Session, conversion_id: int, parity: ParityRecord) -> int:
    """Add one more check to an attempt, as verifying again does; return the check's number."""
    row = parity_row(session, parity)
    row.conversion_id = conversion_id
    session.add(row)
    session.flush()
    return row.id


def quarantine_artifact(session: Session, sha256: str, *, path: str, error: ErrorRecord) -> int:
    """Say that an artifact, once verified, no longer holds: where it is now, and why; return how many attempts had it.

    What was converted to it becomes a mismatch, so that nobody serves it and the next batch says why.
    """
    row = session.scalars(select(Artifact).where(Artifact.sha256 == sha256)).one_or_none()
    if row is None:
        return 0
    row.path, row.quarantined = path, True
    done = (ConversionStatus.CONVERTED.value, ConversionStatus.REUSED.value)
    changed = session.execute(
        update(Conversion)
        .where(Conversion.artifact_id == row.id, Conversion.status.in_(done))
        .values(
            status=ConversionStatus.MISMATCH.value,
            error_kind=str(error.kind),
            error_message=error.message,
            error_step=str(error.step),
            error_reproduce=error.reproduce,
        )
    )
    session.flush()
    return int(changed.rowcount)  # type: ignore[attr-defined]  # an UPDATE's result has it
