"""Turns records into rows: an attempt at a model refers to what is there already, and adds what is new."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db.models import (
    Artifact,
    ArtifactFile,
    Base,
    Environment,
    Graph,
    GraphTensor,
    ParityCell,
    ParityCheck,
    ParityOutput,
)
from db.records import ArtifactRecord, ParityRecord, TensorRecord
from db.types import storable
from db.vocabulary import Direction

__all__ = ["artifact_id", "environment_id", "get_or_add", "parity_row", "sha256_of"]

Row = TypeVar("Row", bound=Base)


def get_or_add(
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


def environment_id(session: Session, versions: Mapping[str, str]) -> int:
    """Return the number of an environment with these versions, added where it is new."""
    row = get_or_add(session, Environment, {"sha256": sha256_of(dict(versions))}, lambda: {"versions": dict(versions)})
    return row.id


def artifact_id(session: Session, artifact: ArtifactRecord) -> int:
    """Return the number of an artifact, added where it is new; it is where ``artifact`` says, which knows better."""
    row = get_or_add(session, Artifact, {"sha256": artifact.sha256}, lambda: _artifact_columns(artifact))
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


def parity_row(session: Session, parity: ParityRecord) -> ParityCheck:
    """Return a check with all that hangs on it, not added yet."""
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
        environment_id=None if parity.environment is None else environment_id(session, parity.environment),
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


def sha256_of(value: Any) -> str:
    """Return the SHA-256 over a JSON value, whatever the order of its keys."""
    canonical = json.dumps(storable(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
