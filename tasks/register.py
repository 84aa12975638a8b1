"""Register: store the files, then write what is known of them into the catalog."""

from __future__ import annotations

import atexit
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Engine

import db
from onnx_config.errors import ErrorKind, TransientError
from onnx_config.export.artifact import ArtifactFile, content_address, copy_side_files, list_files, write_ferry_file
from onnx_config.hub import is_folder
from tasks.disk import disk_errors, folder_bytes
from tasks.job import Job, run_child
from tasks.report import (
    ErrorEntry,
    GraphEntry,
    ModelEntry,
    OutputDifference,
    ParityCellEntry,
    ParityEntry,
    Status,
    Step,
    TensorEntry,
    Verdict,
)
from tasks.request import ConversionRequest, Workspace
from tasks.retry import patience_with
from tasks.store import file_in, store_of
from tasks.variants import moved
from tasks.versions import CODE_EPOCH, package_versions

if TYPE_CHECKING:
    from tasks.lease import Lease

__all__ = [
    "EPOCH_NAME",
    "catalog",
    "catalog_errors",
    "catalog_id",
    "environment_now",
    "find_batch",
    "known_results",
    "parity_entry",
    "parity_record",
    "patiently",
    "record_entry",
    "register",
    "results_of_revisions",
    "to_entry",
    "worker_name",
]

EPOCH_NAME = "onnx-ferry epoch"
"""Name of `CODE_EPOCH` among the versions that the catalog keeps of a conversion."""

Result = TypeVar("Result")


@lru_cache(maxsize=8)
def _engine(url: str) -> Engine:
    engine = db.make_engine(url)
    # A server is told that nobody is there any more.
    atexit.register(engine.dispose)
    db.upgrade(engine)
    return engine


def _may_pass(error: Exception) -> bool:
    return isinstance(error, db.CatalogError) and error.transient


def patiently(workspace: Workspace, function: Callable[[], Result]) -> Result:
    """Call ``function``, which is one transaction, until the database answers, for about a minute.

    Raises:
        TransientError: If it does not (``catalog``).
    """
    with catalog_errors():
        return patience_with(workspace.catalog_url).call(function, passes=_may_pass)


def catalog(workspace: Workspace) -> Engine:
    """Return the catalog, brought to the current schema.

    Raises:
        TransientError: If it cannot be reached (``catalog``).
    """
    return patiently(workspace, lambda: _engine(workspace.catalog_url))


@contextmanager
def catalog_errors() -> Iterator[None]:
    """Translate the catalog's errors into ours."""
    try:
        yield
    except db.CatalogError as error:
        raise TransientError(str(error), kind=ErrorKind.CATALOG) from error


def register(
    job: Job,
    entry: ModelEntry,
    *,
    started_at: datetime,
    batch_id: int | None,
    templates: Sequence[tuple[Path, str]] = (),
    basis: dict[str, Any] | None = None,
) -> ModelEntry:
    """Store the files in the job's ``artifact`` folder and record ``entry``; return it with its place.

    ``templates`` are the folders of those that the graphs came from, whose names are their keys, each with whether it
    was ``traced`` or ``reused``; ``basis`` is what comparing them again needs to know, for ``ferry.json``.

    A mismatch goes to the quarantine. The folder is moved whole; the catalog is written after it, in one
    transaction, so that a row never names files that are not there. Whoever has lost the model's lease meanwhile
    does neither.

    Raises:
        LeaseLostError: If another worker has the model by now.
        TransientError: If the store or the catalog cannot be written.
    """
    folder = job.scratch / "artifact"
    quarantined = entry.status is not Status.CONVERTED
    store = store_of(job.workspace)
    if folder.is_dir():
        if quarantined and entry.parity is not None:
            verdict = {"onnx_ferry.verdict": entry.parity.verdict.value}
            for graph in entry.graphs:
                run_child(job, Step.REGISTER, "stamp", {"graph": str(folder / graph.path), "metadata": verdict})
        with disk_errors(f"the temporary folder {str(folder)!r}"):
            copy_side_files(job.source, folder)
            files = list_files(folder)
            address = content_address(files)
            write_ferry_file(folder, entry.model_dump(mode="json"), files, basis=basis)
            # Before the folder is moved: from then on only this says where it went.
            target = store.path_of(address, quarantined=quarantined)
            _place_file(job).write_text(target, encoding="utf-8")
        if job.lease is not None:
            job.lease.confirm()
        place = store.publish(folder, address, quarantined=quarantined)
    else:
        # A retry after the catalog did not answer: the files are in place already.
        place = _place_file(job).read_text(encoding="utf-8")
        files, address = list_files(store.folder(place)), place.rpartition("/")[2]
    artifact = _artifact_record(place, address, files, entry.graphs, quarantined)
    stored = entry.model_copy(
        update={
            "artifact": place,
            "graphs": tuple(g.model_copy(update={"path": file_in(place, g.path)}) for g in entry.graphs),
            "variants": moved(entry.variants, place),
        }
    )
    record_entry(
        job.workspace,
        job.request,
        entry,
        key=job.key,
        started_at=started_at,
        artifact=artifact,
        batch_id=batch_id,
        templates=templates,
        lease=job.lease,
    )
    return stored


def _place_file(job: Job) -> Path:
    return job.scratch / "stored-at"


def _artifact_record(
    place: str, address: str, files: Iterable[ArtifactFile], graphs: Iterable[GraphEntry], quarantined: bool
) -> db.ArtifactRecord:
    records = tuple(db.FileRecord(path=f.path, size_bytes=f.size_bytes, sha256=f.sha256) for f in files)
    return db.ArtifactRecord(
        sha256=address,
        path=place,
        quarantined=quarantined,
        size_bytes=sum(f.size_bytes for f in records),
        created_at=datetime.now(UTC),
        files=records,
        graphs=tuple(
            db.GraphRecord(
                role=g.role,
                path=g.path,
                opset=g.opset,
                nodes=g.nodes,
                nodes_before_simplify=g.nodes_before_simplify,
                operators=g.operators,
                operators_before_simplify=g.operators_before_simplify,
                inputs=tuple(db.TensorRecord(**t.model_dump()) for t in g.inputs),
                outputs=tuple(db.TensorRecord(**t.model_dump()) for t in g.outputs),
            )
            for g in graphs
        ),
    )


def record_entry(
    workspace: Workspace,
    request: ConversionRequest,
    entry: ModelEntry,
    *,
    key: str | None,
    started_at: datetime,
    artifact: db.ArtifactRecord | None = None,
    batch_id: int | None = None,
    templates: Sequence[tuple[Path, str]] = (),
    lease: Lease | None = None,
) -> int:
    """Write one conversion, and the templates that it used, into the catalog, in one transaction; return its number.

    With the ``lease`` under which it was made, only if that is had still; it is given back with it.

    Raises:
        LeaseLostError: If another worker has the lease.
        TransientError: If the catalog does not take it (``catalog``).
    """
    now = datetime.now(UTC)
    parity = entry.parity
    record = db.ConversionRecord(
        model_id=catalog_id(entry.id),
        key=key,
        requested_revision=request.revision,
        revision=entry.revision,
        status=entry.status.value,
        task=entry.task,
        model_type=entry.model_type,
        architecture=entry.architecture,
        template=entry.template,
        simplified=entry.simplified,
        options=request.options.to_json(),
        attempts=max(1, entry.attempts),
        peak_rss_bytes=entry.peak_rss_bytes,
        notes=entry.notes,
        timings=tuple(db.StepTiming(step=step.value, seconds=s) for step, s in entry.seconds.items()),
        error=None
        if entry.error is None
        else db.ErrorRecord(
            kind=entry.error.kind.value,
            message=entry.error.message,
            step=entry.error.step.value,
            reproduce=entry.error.reproduce,
        ),
        artifact=artifact,
        parity=() if parity is None else (parity_record(parity, at=now),),
        environment=environment_now(),
        started_at=started_at,
        finished_at=now,
        worker=worker_name(),
    )
    engine = catalog(workspace)
    # Measured here, so that a disk that fails is no trouble of the catalog's.
    sizes = {template: folder_bytes(template) for template, _ in templates}

    def write() -> int:
        with db.session_scope(engine) as session:
            if lease is not None:
                lease.settle(session)
            for template, use in templates:
                db.note_template(
                    session,
                    template.name,
                    architecture=entry.architecture,
                    size_bytes=sizes[template],
                    reused=use == db.TemplateUse.REUSED,
                    at=now,
                )
            return db.record_conversion(session, record, batch_id=batch_id)

    return patiently(workspace, write)


def parity_record(
    parity: ParityEntry, *, at: datetime, environment: Mapping[str, str] | None = None
) -> db.ParityRecord:
    """Return a verdict as the catalog keeps it; ``environment``: its versions, where the conversion had others."""
    return db.ParityRecord(
        verdict=parity.verdict.value,
        device=parity.device,
        provider=parity.provider,
        shapes=parity.shapes,
        max_abs_diff=parity.max_abs_diff,
        tolerance=parity.tolerance,
        axes_proven=parity.axes_proven,
        outputs=tuple(db.OutputParityRecord(**o.model_dump()) for o in parity.outputs),
        detail=parity.detail,
        cells=tuple(db.ParityCellRecord(**cell.model_dump()) for cell in parity.cells),
        session=parity.session,
        device_memory_bytes=parity.device_memory_bytes,
        environment=environment,
        checked_at=at,
    )


def parity_entry(parity: db.ParityRecord) -> ParityEntry:
    """Return what the catalog keeps of a verdict as a report's."""
    return ParityEntry(
        verdict=Verdict(parity.verdict),
        device=parity.device,
        provider=parity.provider,
        shapes=parity.shapes,
        max_abs_diff=parity.max_abs_diff,
        tolerance=parity.tolerance,
        axes_proven=parity.axes_proven,
        outputs=tuple(OutputDifference(**asdict(o)) for o in parity.outputs),
        detail=parity.detail,
        cells=tuple(ParityCellEntry(**asdict(cell)) for cell in parity.cells),
        session=None if parity.session is None else dict(parity.session),
        device_memory_bytes=parity.device_memory_bytes,
    )


def environment_now() -> dict[str, str]:
    """Return the versions that a conversion or a check of today has, as the catalog keeps them."""
    return {**package_versions(), EPOCH_NAME: str(CODE_EPOCH)}


def worker_name() -> str:
    """Return the name by which the catalog knows this machine, or this container."""
    return platform.node()


def catalog_id(model_id: str) -> str:
    """Return the id under which the catalog knows a model: a Hub id as it is, a folder by its absolute path."""
    if not is_folder(model_id):
        return model_id
    try:
        return str(Path(model_id).expanduser().resolve())
    # A "~" that is nobody's home, or links that lead in a circle: there is no such folder, whatever it is called.
    except (OSError, RuntimeError):
        return str(Path(model_id).absolute())


def known_results(workspace: Workspace, keys: Iterable[str]) -> dict[str, db.ConversionRecord]:
    """Return, for each key that was converted before, the newest attempt.

    Raises:
        TransientError: If the catalog cannot be read (``catalog``).
    """
    wanted = list(keys)
    if not wanted:
        return {}
    engine = catalog(workspace)

    def read() -> dict[str, db.ConversionRecord]:
        with db.session_scope(engine, read_only=True) as session:
            return db.latest_by_key(session, wanted)

    return patiently(workspace, read)


def results_of_revisions(workspace: Workspace, revisions: Iterable[tuple[str, str]]) -> list[db.ConversionRecord]:
    """Return what was converted of models (their ids in the catalog) at these revisions, the newest first.

    Raises:
        TransientError: If the catalog cannot be read (``catalog``).
    """
    wanted = list(revisions)
    engine = catalog(workspace)

    def read() -> list[db.ConversionRecord]:
        with db.session_scope(engine, read_only=True) as session:
            return db.converted_revisions(session, wanted)

    return patiently(workspace, read)


def find_batch(workspace: Workspace, number: int) -> db.BatchRecord | None:
    """Return a batch by its number; ``None`` where this catalog has none of it.

    Raises:
        TransientError: If the catalog cannot be read (``catalog``).
    """
    engine = catalog(workspace)

    def read() -> db.BatchRecord | None:
        with db.session_scope(engine, read_only=True) as session:
            return db.get_batch(session, number)

    return patiently(workspace, read)


def to_entry(record: db.ConversionRecord, *, model_id: str, status: Status) -> ModelEntry:
    """Return what the catalog holds of a conversion as a report's entry, under ``status``."""
    artifact = record.artifact
    parity = record.parity[-1] if record.parity else None
    return ModelEntry(
        id=model_id,
        revision=record.revision,
        status=status,
        task=record.task,
        model_type=record.model_type,
        architecture=record.architecture,
        artifact=None if artifact is None else artifact.path,
        graphs=()
        if artifact is None
        else tuple(
            GraphEntry(
                role=g.role,
                path=file_in(artifact.path, g.path),
                opset=g.opset,
                nodes=g.nodes,
                nodes_before_simplify=g.nodes_before_simplify,
                operators=dict(g.operators),
                operators_before_simplify=dict(g.operators_before_simplify),
                inputs=tuple(TensorEntry(name=t.name, dtype=t.dtype, shape=t.shape) for t in g.inputs),
                outputs=tuple(TensorEntry(name=t.name, dtype=t.dtype, shape=t.shape) for t in g.outputs),
            )
            for g in artifact.graphs
        ),
        template=record.template,
        simplified=record.simplified,
        parity=None if parity is None else parity_entry(parity),
        seconds={Step(t.step): t.seconds for t in record.timings},
        peak_rss_bytes=record.peak_rss_bytes,
        attempts=record.attempts,
        notes=record.notes,
        error=None
        if record.error is None
        else ErrorEntry(
            kind=ErrorKind(record.error.kind),
            message=record.error.message,
            step=Step(record.error.step),
            reproduce=record.error.reproduce,
        ),
    )
