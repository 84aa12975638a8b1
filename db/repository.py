"""What is asked of the catalog.

Every function takes the session first, never commits, and returns values. Each reads with a number of
statements that does not grow with the rows it returns, save for one more per thousands of them.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, delete, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db.among import one_of
from db.assemble import batch_record, chunked, conversion_records, conversions
from db.models import (
    Artifact,
    ArtifactFile,
    Base,
    Batch,
    Conversion,
    Environment,
    Graph,
    GraphTensor,
    ParityCell,
    ParityCheck,
    ParityOutput,
    Revision,
    SourceModel,
    StepDuration,
    Template,
)
from db.records import (
    ArtifactRecord,
    BatchRecord,
    BatchTotals,
    ConversionRecord,
    ErrorRecord,
    ParityRecord,
    TemplateRecord,
    TensorRecord,
)
from db.search import TextSearch
from db.types import storable
from db.vocabulary import BatchEngine, ConversionStatus, Direction

__all__ = [
    "batch_conversions",
    "converted_revisions",
    "count_conversions",
    "find_artifacts",
    "find_conversion",
    "finish_batch",
    "forget_templates",
    "get_batch",
    "get_conversion",
    "iter_artifacts",
    "iter_conversions",
    "latest_by_key",
    "list_batches",
    "list_conversions",
    "list_templates",
    "note_template",
    "quarantine_artifact",
    "record_conversion",
    "record_parity",
    "start_batch",
]

_ROWS_PER_CHUNK = 500
# What a person may shorten a hash to; shorter ones are too easily a word.
_SHORTEST_PREFIX = 7
_LARGEST_ID = 2**63 - 1
# Of one model that are looked at for its artifacts.
_MOST_ATTEMPTS = 100

Row = TypeVar("Row", bound=Base)


def record_conversion(session: Session, record: ConversionRecord, *, batch_id: int | None = None) -> int:
    """Add one attempt, and what it refers to where that is new; return its number.

    An artifact that is there already, by its content, keeps its files and graphs; its folder and
    quarantine become those of ``record``, which knows better where the content is now.
    The record's own ``id`` and ``batch_id`` are ignored.
    """
    source = _get_or_add(session, SourceModel, {"model_id": storable(record.model_id)})
    # Workers that record the same model take turns from here, so that exactly one attempt is the latest.
    session.execute(select(SourceModel.id).where(SourceModel.id == source.id).with_for_update())
    revision = None
    if record.revision is not None:
        revision = _get_or_add(session, Revision, {"source_model_id": source.id, "revision": storable(record.revision)})
    subject = _sha256([record.model_id, record.requested_revision, dict(record.options)])
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
        environment_id=_environment_id(session, record.environment),
        artifact_id=None if record.artifact is None else _artifact_id(session, record.artifact),
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
        parity=[_parity_row(session, parity) for parity in record.parity],
    )
    session.add(row)
    session.flush()
    return row.id


def record_parity(session: Session, conversion_id: int, parity: ParityRecord) -> int:
    """Add one more check to an attempt, as verifying again does; return the check's number."""
    row = _parity_row(session, parity)
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


def note_template(
    session: Session, key: str, *, architecture: str | None, size_bytes: int, reused: bool, at: datetime
) -> None:
    """Say that a model was bound to a template, which is added where it is new."""
    row = _get_or_add(
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


def get_conversion(session: Session, conversion_id: int) -> ConversionRecord | None:
    """Return one attempt; ``None`` where there is none of that number."""
    if not 0 < conversion_id <= _LARGEST_ID:
        return None
    return _first(session, conversions().where(Conversion.id == conversion_id))


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
    if name.isascii() and name.isdigit() and 0 < (number := int(name[:20])) <= _LARGEST_ID:
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
        return len(search.newest(session, most=_LARGEST_ID if most is None else most))
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


def _first(session: Session, query: Select[Any]) -> ConversionRecord | None:
    records = conversion_records(session, query.order_by(Conversion.id.desc()).limit(1))
    return records[0] if records else None


def _is_model(model_id: str) -> ColumnElement[bool]:
    return Conversion.source_model_id.in_(select(SourceModel.id).where(SourceModel.model_id == model_id))


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


def _get_or_add(
    session: Session, model: type[Row], identity: Mapping[str, Any], more: Callable[[], Mapping[str, Any]] = dict
) -> Row:
    """Return the row that ``identity`` names, added where it is not there, whoever else adds it now."""
    query = select(model).filter_by(**identity)
    row = session.scalars(query).one_or_none()
    if row is not None:
        return row
    try:
        with session.begin_nested():
            row = model(**identity, **more())
            session.add(row)
    except IntegrityError:
        # Another transaction added it first and has committed: else the insert would still wait.
        return session.scalars(query).one()
    return row


def _environment_id(session: Session, versions: Mapping[str, str]) -> int:
    row = _get_or_add(session, Environment, {"sha256": _sha256(dict(versions))}, lambda: {"versions": dict(versions)})
    return row.id


def _artifact_id(session: Session, artifact: ArtifactRecord) -> int:
    row = _get_or_add(session, Artifact, {"sha256": artifact.sha256}, lambda: _artifact_columns(artifact))
    row.path = artifact.path
    row.quarantined = artifact.quarantined
    session.flush()
    return row.id


def _artifact_columns(artifact: ArtifactRecord) -> dict[str, Any]:
    return {
        "path": artifact.path,
        "quarantined": artifact.quarantined,
        "size_bytes": artifact.size_bytes,
        "created_at": artifact.created_at,
        "files": [
            ArtifactFile(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256) for file in artifact.files
        ],
        "graphs": [
            Graph(
                role=graph.role,
                path=graph.path,
                opset=graph.opset,
                nodes=graph.nodes,
                nodes_before_simplify=graph.nodes_before_simplify,
                operators=dict(graph.operators) or None,
                operators_before_simplify=dict(graph.operators_before_simplify) or None,
                tensors=_tensor_rows(Direction.INPUT, graph.inputs) + _tensor_rows(Direction.OUTPUT, graph.outputs),
            )
            for graph in artifact.graphs
        ],
    }


def _tensor_rows(direction: Direction, tensors: Sequence[TensorRecord]) -> list[GraphTensor]:
    return [
        GraphTensor(
            direction=direction.value,
            position=position,
            name=tensor.name,
            dtype=tensor.dtype,
            shape=list(tensor.shape),
        )
        for position, tensor in enumerate(tensors)
    ]


def _parity_row(session: Session, parity: ParityRecord) -> ParityCheck:
    return ParityCheck(
        verdict=str(parity.verdict),
        device=parity.device,
        provider=parity.provider,
        shapes=parity.shapes,
        max_abs_diff=parity.max_abs_diff,
        tolerance=parity.tolerance,
        axes_proven=list(parity.axes_proven),
        detail=parity.detail,
        session=None if parity.session is None else dict(parity.session),
        device_memory_bytes=parity.device_memory_bytes,
        environment_id=None if parity.environment is None else _environment_id(session, parity.environment),
        checked_at=parity.checked_at,
        outputs=[
            ParityOutput(
                position=position,
                name=output.name,
                max_abs_diff=output.max_abs_diff,
                tolerance=output.tolerance,
                spread=output.spread,
            )
            for position, output in enumerate(parity.outputs)
        ],
        cells=[
            ParityCell(
                position=position,
                graph=cell.graph,
                provider=cell.provider,
                optimization=cell.optimization,
                dtype=cell.dtype,
                shape=cell.shape,
                sizes=dict(cell.sizes),
                verdict=str(cell.verdict),
                output=cell.output,
                max_abs_diff=cell.max_abs_diff,
                tolerance=cell.tolerance,
                detail=cell.detail,
            )
            for position, cell in enumerate(parity.cells)
        ],
    )


def _sha256(value: Any) -> str:
    canonical = json.dumps(storable(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
