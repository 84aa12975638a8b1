"""Turns rows into records: a page of conversions with all that hangs on them, in nine statements.

The parts are read table by table and put together here. Loading them through the mapper gives the same
values in five times the time, and a batch asks for a thousand conversions before it starts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import Select, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from db.among import one_of
from db.models import (
    Artifact,
    ArtifactFile,
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
)
from db.records import (
    ArtifactRecord,
    BatchRecord,
    BatchTotals,
    ConversionRecord,
    ErrorRecord,
    FileRecord,
    GraphRecord,
    OutputParityRecord,
    ParityCellRecord,
    ParityRecord,
    StepTiming,
    TensorRecord,
)
from db.vocabulary import Direction

__all__ = ["batch_record", "chunked", "conversion_records", "conversions"]

# SQLite takes 32,766 parameters in a statement, PostgreSQL's drivers as many or twice that.
_PARAMETERS_PER_STATEMENT = 10_000

Value = TypeVar("Value")


def conversions() -> Select[Any]:
    """Return the query that `conversion_records` reads; narrow it with ``where``, order it, limit it."""
    # Rows that the session saw before may have been changed since by a plain UPDATE.
    return (
        select(Conversion, SourceModel.model_id, Revision.revision)
        .join(SourceModel, SourceModel.id == Conversion.source_model_id)
        .outerjoin(Revision, Revision.id == Conversion.revision_id)
        .execution_options(populate_existing=True)
    )


def conversion_records(session: Session, query: Select[Any]) -> list[ConversionRecord]:
    """Return the conversions that the query finds, in its order, whole."""
    rows: list[tuple[Conversion, str, str | None]] = [(row, model, rev) for row, model, rev in session.execute(query)]
    ids = [row.id for row, _, _ in rows]
    artifacts = _artifacts(session, {row.artifact_id for row, _, _ in rows if row.artifact_id is not None})
    columns: Select[Any] = select(Environment.id, Environment.versions)
    environments = dict(_in(session, columns, Environment.id, {row.environment_id for row, _, _ in rows}))
    timings: dict[int, list[StepTiming]] = defaultdict(list)
    columns = select(StepDuration.conversion_id, StepDuration.step, StepDuration.seconds).order_by(
        StepDuration.position
    )
    for parent, step, seconds in _in(session, columns, StepDuration.conversion_id, ids):
        timings[parent].append(StepTiming(step=step, seconds=seconds))
    parity = _parity(session, ids)
    return [
        ConversionRecord(
            id=row.id,
            batch_id=row.batch_id,
            worker=row.worker,
            model_id=model_id,
            key=row.key,
            requested_revision=row.requested_revision,
            revision=revision,
            status=row.status,
            task=row.task,
            task_family=row.task_family,
            model_type=row.model_type,
            architecture=row.architecture,
            template=row.template,
            simplified=row.simplified,
            options=dict(row.options),
            attempts=row.attempts,
            peak_rss_bytes=row.peak_rss_bytes,
            notes=tuple(row.notes),
            timings=tuple(timings.get(row.id, ())),
            error=_error(row),
            artifact=None if row.artifact_id is None else artifacts[row.artifact_id],
            parity=tuple(parity.get(row.id, ())),
            environment=dict(environments[row.environment_id]),
            started_at=row.started_at,
            finished_at=row.finished_at,
        )
        for row, model_id, revision in rows
    ]


def batch_record(row: Batch) -> BatchRecord:
    """Return a batch's row as a value."""
    totals = BatchTotals(
        converted=row.converted or 0, reused=row.reused or 0, failed=row.failed or 0, mismatch=row.mismatch or 0
    )
    ended = row.finished_at is not None
    return BatchRecord(
        id=row.id,
        engine=row.engine,
        started_at=row.started_at,
        finished_at=row.finished_at,
        totals=totals if ended else None,
        models=row.models,
        found=None if ended or row.models is None else totals,
    )


def chunked(values: Iterable[Value]) -> Iterator[list[Value]]:
    """Yield the values in lists that fit in one statement."""
    remaining = iter(values)
    while chunk := list(islice(remaining, _PARAMETERS_PER_STATEMENT)):
        yield chunk


def _in(
    session: Session, query: Select[Any], column: InstrumentedAttribute[int], values: Iterable[int]
) -> Iterator[Any]:
    for chunk in chunked(values):
        yield from session.execute(query.where(one_of(session, column, chunk)))


def _error(row: Conversion) -> ErrorRecord | None:
    if row.error_kind is None:
        return None
    return ErrorRecord(
        kind=row.error_kind,
        message=row.error_message or "",
        step=row.error_step or "",
        reproduce=row.error_reproduce or "",
    )


def _artifacts(session: Session, ids: Iterable[int]) -> dict[int, ArtifactRecord]:
    ids = list(ids)
    files: dict[int, list[FileRecord]] = defaultdict(list)
    columns = select(ArtifactFile.artifact_id, ArtifactFile.path, ArtifactFile.size_bytes, ArtifactFile.sha256)
    for parent, path, size_bytes, sha256 in _in(session, columns, ArtifactFile.artifact_id, ids):
        files[parent].append(FileRecord(path=path, size_bytes=size_bytes, sha256=sha256))
    graphs = _graphs(session, ids)
    artifacts = {}
    columns_of_artifact = select(
        Artifact.id, Artifact.sha256, Artifact.path, Artifact.quarantined, Artifact.size_bytes, Artifact.created_at
    )
    for key, sha256, path, quarantined, size_bytes, created_at in _in(session, columns_of_artifact, Artifact.id, ids):
        artifacts[key] = ArtifactRecord(
            sha256=sha256,
            path=path,
            quarantined=quarantined,
            size_bytes=size_bytes,
            created_at=created_at,
            files=tuple(files.get(key, ())),
            graphs=tuple(graphs.get(key, ())),
        )
    return artifacts


def _graphs(session: Session, artifact_ids: Iterable[int]) -> dict[int, list[GraphRecord]]:
    columns = select(
        Graph.artifact_id,
        Graph.id,
        Graph.role,
        Graph.path,
        Graph.opset,
        Graph.nodes,
        Graph.nodes_before_simplify,
        Graph.operators,
        Graph.operators_before_simplify,
    )
    rows = list(_in(session, columns.order_by(Graph.id), Graph.artifact_id, artifact_ids))
    tensors: dict[tuple[int, str], list[TensorRecord]] = defaultdict(list)
    columns_of_tensor = select(
        GraphTensor.graph_id, GraphTensor.direction, GraphTensor.name, GraphTensor.dtype, GraphTensor.shape
    )
    for parent, direction, name, dtype, shape in _in(
        session, columns_of_tensor.order_by(GraphTensor.position), GraphTensor.graph_id, [row[1] for row in rows]
    ):
        tensors[parent, direction].append(TensorRecord(name=name, dtype=dtype, shape=tuple(shape)))
    graphs: dict[int, list[GraphRecord]] = defaultdict(list)
    for artifact_id, key, role, path, opset, nodes, nodes_before_simplify, operators, operators_before in rows:
        graphs[artifact_id].append(
            GraphRecord(
                role=role,
                path=path,
                opset=opset,
                nodes=nodes,
                nodes_before_simplify=nodes_before_simplify,
                operators=operators or {},
                operators_before_simplify=operators_before or {},
                inputs=tuple(tensors.get((key, Direction.INPUT.value), ())),
                outputs=tuple(tensors.get((key, Direction.OUTPUT.value), ())),
            )
        )
    return graphs


def _parity(session: Session, conversion_ids: Iterable[int]) -> dict[int, list[ParityRecord]]:
    columns = select(ParityCheck).order_by(ParityCheck.id).execution_options(populate_existing=True)
    checks = [row for (row,) in _in(session, columns, ParityCheck.conversion_id, conversion_ids)]
    outputs: dict[int, list[OutputParityRecord]] = defaultdict(list)
    columns_of_output = select(
        ParityOutput.parity_check_id,
        ParityOutput.name,
        ParityOutput.max_abs_diff,
        ParityOutput.tolerance,
        ParityOutput.spread,
    )
    for parent, name, max_abs_diff, tolerance, spread in _in(
        session,
        columns_of_output.order_by(ParityOutput.position),
        ParityOutput.parity_check_id,
        [check.id for check in checks],
    ):
        outputs[parent].append(
            OutputParityRecord(name=name, max_abs_diff=max_abs_diff, tolerance=tolerance, spread=spread)
        )
    cells = _cells(session, [check.id for check in checks])
    versions: Select[Any] = select(Environment.id, Environment.versions)
    theirs = {check.environment_id for check in checks if check.environment_id is not None}
    environments = dict(_in(session, versions, Environment.id, theirs))
    parity: dict[int, list[ParityRecord]] = defaultdict(list)
    for check in checks:
        parity[check.conversion_id].append(
            ParityRecord(
                verdict=check.verdict,
                device=check.device,
                provider=check.provider,
                shapes=check.shapes,
                max_abs_diff=check.max_abs_diff,
                tolerance=check.tolerance,
                axes_proven=tuple(check.axes_proven),
                outputs=tuple(outputs.get(check.id, ())),
                detail=check.detail,
                cells=tuple(cells.get(check.id, ())),
                session=check.session,
                device_memory_bytes=check.device_memory_bytes,
                environment=None if check.environment_id is None else dict(environments[check.environment_id]),
                checked_at=check.checked_at,
            )
        )
    return parity


def _cells(session: Session, check_ids: Iterable[int]) -> dict[int, list[ParityCellRecord]]:
    columns = select(ParityCell).order_by(ParityCell.position).execution_options(populate_existing=True)
    cells: dict[int, list[ParityCellRecord]] = defaultdict(list)
    for (row,) in _in(session, columns, ParityCell.parity_check_id, check_ids):
        cells[row.parity_check_id].append(
            ParityCellRecord(
                graph=row.graph,
                provider=row.provider,
                optimization=row.optimization,
                dtype=row.dtype,
                shape=row.shape,
                sizes=dict(row.sizes),
                verdict=row.verdict,
                output=row.output,
                max_abs_diff=row.max_abs_diff,
                tolerance=row.tolerance,
                detail=row.detail,
            )
        )
    return cells
