"""The tables. Rows stay inside `db`; callers get the values of `db.records`.

Relationships serve writing, where a row brings its parts; reading goes table by table in `db.assemble`, so a
relationship that is read is a mistake and raises.

A conversion is one attempt. What attempts share stands once: the source model and its revisions, the
environment (by the hash of its versions) and the artifact (by the hash of its content).
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, Integer, MetaData, String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from db.types import JsonValue, PlainText, Real, UtcDateTime
from db.vocabulary import (
    BatchEngine,
    ConversionStatus,
    Dimension,
    Direction,
    FailureKind,
    ParityVerdict,
    Span,
    StepName,
    TemplateUse,
)

__all__ = [
    "Artifact",
    "ArtifactFile",
    "Base",
    "Batch",
    "Conversion",
    "ConversionTotal",
    "Environment",
    "FoundDone",
    "Graph",
    "GraphTensor",
    "GroupedTotal",
    "Lease",
    "ParityCell",
    "ParityCheck",
    "ParityOutput",
    "Revision",
    "SourceModel",
    "StepDuration",
    "Template",
]

# SQLite numbers rows by itself only for a column whose type is exactly INTEGER.
_Number = BigInteger().with_variant(Integer, "sqlite")

PrimaryKey = Annotated[int, mapped_column(_Number, primary_key=True)]
Count = Annotated[int, mapped_column(Integer)]
Bytes = Annotated[int, mapped_column(BigInteger)]
Words = Annotated[str, mapped_column(PlainText)]
Word = Annotated[str, mapped_column(String(32))]
Digest = Annotated[str, mapped_column(String(64))]
Moment = Annotated[datetime, mapped_column(UtcDateTime)]
Number = Annotated[float, mapped_column(Real)]
Json = Annotated[Any, mapped_column(JsonValue)]


def _one_of(column: str, words: Iterable[StrEnum]) -> CheckConstraint:
    # A NULL passes a CHECK, so the same text serves columns that may be empty.
    listed = ", ".join(f"'{word.value}'" for word in words)
    return CheckConstraint(f"{column} IN ({listed})", name=f"{column}_known")


def _digest(column: str) -> CheckConstraint:
    return CheckConstraint(f"length({column}) = 64", name=f"{column}_digest")


class Base(DeclarativeBase):
    """Names every constraint, since a migration can only drop what has a name."""

    metadata: ClassVar[MetaData] = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class SourceModel(Base):
    """What was converted: a Hub model or a folder."""

    __tablename__ = "source_models"

    id: Mapped[PrimaryKey]
    model_id: Mapped[Words] = mapped_column(unique=True)


class Revision(Base):
    """One state of a source model."""

    __tablename__ = "revisions"
    __table_args__ = (UniqueConstraint("source_model_id", "revision"),)

    id: Mapped[PrimaryKey]
    source_model_id: Mapped[int] = mapped_column(ForeignKey("source_models.id"))
    revision: Mapped[Words]


class Environment(Base):
    """The versions that a conversion ran with."""

    __tablename__ = "environments"
    __table_args__ = (_digest("sha256"),)

    id: Mapped[PrimaryKey]
    sha256: Mapped[Digest] = mapped_column(unique=True)
    versions: Mapped[Json]


class Batch(Base):
    """One run of the batch command; until it ends, the totals are those of what it found done when it began."""

    __tablename__ = "batches"
    __table_args__ = (_one_of("engine", BatchEngine), Index(None, "started_at"))

    id: Mapped[PrimaryKey]
    engine: Mapped[Word]
    models: Mapped[Count | None]
    """How many were asked for; NULL where nobody wrote it down."""
    started_at: Mapped[Moment]
    finished_at: Mapped[Moment | None]
    converted: Mapped[Count | None]
    reused: Mapped[Count | None]
    failed: Mapped[Count | None]
    mismatch: Mapped[Count | None]


class Template(Base):
    """The graph of a structure without its weights, in the folder of templates; known by its key."""

    __tablename__ = "templates"
    __table_args__ = (_digest("key"), Index(None, "last_used_at"))

    id: Mapped[PrimaryKey]
    key: Mapped[Digest] = mapped_column(unique=True)
    architecture: Mapped[Words | None]
    size_bytes: Mapped[Bytes]
    hits: Mapped[Count]
    """Models bound to it after the one that it was traced for."""
    created_at: Mapped[Moment]
    last_used_at: Mapped[Moment]


class Artifact(Base):
    """A folder of files, known by its content."""

    __tablename__ = "artifacts"
    # The bytes of all are summed inside the index.
    __table_args__ = (_digest("sha256"), Index(None, "quarantined", "size_bytes"))

    id: Mapped[PrimaryKey]
    sha256: Mapped[Digest] = mapped_column(unique=True)
    path: Mapped[Words]
    quarantined: Mapped[bool]
    size_bytes: Mapped[Bytes]
    created_at: Mapped[Moment]

    files: Mapped[list[ArtifactFile]] = relationship(lazy="raise")
    graphs: Mapped[list[Graph]] = relationship(lazy="raise")


class ArtifactFile(Base):
    """One file of an artifact."""

    __tablename__ = "artifact_files"
    __table_args__ = (UniqueConstraint("artifact_id", "path"), _digest("sha256"))

    id: Mapped[PrimaryKey]
    artifact_id: Mapped[int] = mapped_column(ForeignKey("artifacts.id"))
    path: Mapped[Words]
    size_bytes: Mapped[Bytes]
    sha256: Mapped[Digest]


class Graph(Base):
    """One ``.onnx`` file of an artifact."""

    __tablename__ = "graphs"
    __table_args__ = (UniqueConstraint("artifact_id", "role"),)

    id: Mapped[PrimaryKey]
    artifact_id: Mapped[int] = mapped_column(ForeignKey("artifacts.id"))
    role: Mapped[Words]
    path: Mapped[Words]
    opset: Mapped[Count]
    nodes: Mapped[Count]
    nodes_before_simplify: Mapped[Count]
    operators: Mapped[Json | None]
    """Nodes by operator; NULL where nobody counted them, as in the next one."""
    operators_before_simplify: Mapped[Json | None]

    tensors: Mapped[list[GraphTensor]] = relationship(lazy="raise")


class GraphTensor(Base):
    """One input or output of a graph."""

    __tablename__ = "graph_tensors"
    __table_args__ = (UniqueConstraint("graph_id", "direction", "position"), _one_of("direction", Direction))

    id: Mapped[PrimaryKey]
    graph_id: Mapped[int] = mapped_column(ForeignKey("graphs.id"))
    direction: Mapped[Word]
    position: Mapped[Count]
    name: Mapped[Words]
    dtype: Mapped[Words]
    shape: Mapped[Json]


class Conversion(Base):
    """One attempt."""

    __tablename__ = "conversions"
    __table_args__ = (
        _one_of("status", ConversionStatus),
        _one_of("template", TemplateUse),
        _one_of("error_kind", FailureKind),
        _one_of("error_step", StepName),
        _digest("key"),
        _digest("subject"),
        CheckConstraint("attempts >= 1", name="attempts_positive"),
        CheckConstraint("status <> 'failed' OR error_kind IS NOT NULL", name="failed_has_error"),
        CheckConstraint(
            "status NOT IN ('converted', 'reused') OR (artifact_id IS NOT NULL AND error_kind IS NULL)",
            name="done_has_artifact",
        ),
        CheckConstraint(
            "(error_kind IS NULL) = (error_message IS NULL) AND (error_kind IS NULL) = (error_step IS NULL)"
            " AND (error_kind IS NULL) = (error_reproduce IS NULL)",
            name="error_whole",
        ),
        # The newest attempt of a key.
        Index(None, "key", "id"),
        # Pages of a listing: by time, alone or under one of the filters.
        Index(None, "finished_at"),
        Index(None, "latest", "finished_at"),
        Index(None, "status", "finished_at"),
        Index(None, "task", "finished_at"),
        Index(None, "source_model_id", "finished_at"),
        # Totals of a listing are counted inside this index, without reading the rows.
        Index(None, "latest", "status", "task", "finished_at"),
        # Pages of a listing of what holds now, under one filter.
        Index(None, "latest", "status", "finished_at"),
        Index(None, "latest", "task", "finished_at"),
        Index(None, "latest", "model_type", "finished_at"),
        Index(None, "latest", "error_kind", "finished_at"),
        Index(None, "latest", "worker", "finished_at"),
        # Searched besides: which classes there are, and the newest attempts of one.
        Index(None, "latest", "architecture", "finished_at"),
        # The one row that a new attempt supersedes.
        Index(None, "subject", "latest"),
        # Also the totals of a batch that runs, without reading the rows.
        Index(None, "batch_id", "status"),
        # Pages of one batch, however old.
        Index(None, "batch_id", "finished_at", "id"),
        Index(None, "artifact_id"),
    )

    id: Mapped[PrimaryKey]
    key: Mapped[Digest | None]
    subject: Mapped[Digest]
    """Hash of model, requested revision and options: what the user asked for, whatever the versions were."""
    latest: Mapped[bool]
    """Whether no later attempt has the same subject. Kept here since a listing that had to find
    out for itself would read every row."""
    source_model_id: Mapped[int] = mapped_column(ForeignKey("source_models.id"))
    requested_revision: Mapped[Words | None]
    revision_id: Mapped[int | None] = mapped_column(ForeignKey("revisions.id"))
    environment_id: Mapped[int] = mapped_column(ForeignKey("environments.id"))
    artifact_id: Mapped[int | None] = mapped_column(ForeignKey("artifacts.id"))
    batch_id: Mapped[int | None] = mapped_column(ForeignKey("batches.id"))
    worker: Mapped[Words | None]
    """The machine that it ran on; NULL where nobody wrote it down."""
    status: Mapped[Word]
    task: Mapped[Words | None]
    task_family: Mapped[Words | None]
    model_type: Mapped[Words | None]
    architecture: Mapped[Words | None]
    template: Mapped[Word | None]
    simplified: Mapped[bool]
    options: Mapped[Json]
    attempts: Mapped[Count]
    peak_rss_bytes: Mapped[Bytes | None]
    notes: Mapped[Json]
    error_kind: Mapped[Word | None]
    error_message: Mapped[Words | None]
    error_step: Mapped[Word | None]
    error_reproduce: Mapped[Words | None]
    started_at: Mapped[Moment]
    finished_at: Mapped[Moment]

    timings: Mapped[list[StepDuration]] = relationship(lazy="raise")
    parity: Mapped[list[ParityCheck]] = relationship(lazy="raise")


class FoundDone(Base):
    """A model that a batch did not convert, since an earlier attempt had done so, or had failed and would again."""

    __tablename__ = "found_done"
    __table_args__ = (_one_of("status", ConversionStatus), Index(None, "batch_id", "status"))

    id: Mapped[PrimaryKey]
    batch_id: Mapped[int] = mapped_column(ForeignKey("batches.id"))
    conversion_id: Mapped[int] = mapped_column(ForeignKey("conversions.id"))
    status: Mapped[Word]
    """What the batch says of it: ``reused``, or how the earlier attempt had ended."""
    found_at: Mapped[Moment]


class ConversionTotal(Base):
    """How many attempts ended in one hour or day, by what a chart tells apart.

    A trigger counts each attempt that is added, and each `FoundDone` that was reused. A dashboard that counted the
    attempts themselves would read a million rows for one picture.
    """

    __tablename__ = "conversion_totals"
    __table_args__ = (
        # PostgreSQL cuts names of more than 63 letters, which the conventional one has.
        UniqueConstraint(
            *("span", "start", "task", "model_type", "status", "error_kind", "template", "worker"),
            name="uq_conversion_totals_counted",
        ),
        _one_of("span", Span),
        # One task of one model type over all time.
        Index(None, "span", "task", "model_type", "start"),
        # One worker, with a task or a model type.
        Index(None, "span", "worker", "start"),
    )

    id: Mapped[PrimaryKey]
    span: Mapped[Word]
    start: Mapped[Moment]
    task: Mapped[Words]
    """Empty where the attempt has none, as the five below: NULLs would count as different."""
    model_type: Mapped[Words]
    status: Mapped[Word]
    error_kind: Mapped[Word]
    template: Mapped[Word]
    worker: Mapped[Words]
    conversions: Mapped[Count]


class GroupedTotal(Base):
    """The same, of all attempts, of one task, of one model type, or of one worker.

    A large catalog has nearly as many of the rows above as it has attempts, since few have all of them in common.
    """

    __tablename__ = "grouped_totals"
    __table_args__ = (
        UniqueConstraint(
            *("span", "dimension", "word", "start", "status", "error_kind", "template"),
            name="uq_grouped_totals_counted",
        ),
        _one_of("span", Span),
        _one_of("dimension", Dimension),
    )

    id: Mapped[PrimaryKey]
    span: Mapped[Word]
    dimension: Mapped[Word]
    word: Mapped[Words]
    """The task, the model type or the worker; empty where the attempt has none, and where all are counted."""
    start: Mapped[Moment]
    status: Mapped[Word]
    error_kind: Mapped[Word]
    template: Mapped[Word]
    conversions: Mapped[Count]


class Lease(Base):
    """Who works at a key at the moment; a row that is over may lie here until somebody wants the key.

    Its times are the database's own, so that no worker's clock decides who may go on.
    """

    __tablename__ = "leases"
    __table_args__ = (_digest("key"), _one_of("step", StepName))

    key: Mapped[Digest] = mapped_column(primary_key=True)
    owner: Mapped[Word]
    """Another one each time that somebody takes the lease."""
    host: Mapped[Words]
    process_id: Mapped[Count]
    process: Mapped[Words]
    """What no other process was or will be, on this machine or another; empty where that cannot be said."""
    acquired_at: Mapped[Moment]
    expires_at: Mapped[Moment]
    model_id: Mapped[Words | None]
    """What is converted under it; NULL where it is on something else than a model."""
    batch_id: Mapped[int | None] = mapped_column(_Number)
    """For people, so that it refers to nothing."""
    step: Mapped[Word | None]
    """NULL while the model waits for its share of memory."""
    step_began_at: Mapped[Moment | None]


class StepDuration(Base):
    """How long one step of an attempt took; a table of its own so that dashboards can sum it."""

    __tablename__ = "step_timings"
    __table_args__ = (
        UniqueConstraint("conversion_id", "step"),
        _one_of("step", StepName),
    )

    id: Mapped[PrimaryKey]
    conversion_id: Mapped[int] = mapped_column(ForeignKey("conversions.id"))
    position: Mapped[Count]
    step: Mapped[Word]
    seconds: Mapped[Number]


class ParityCheck(Base):
    """One comparison of an artifact with its source."""

    __tablename__ = "parity_checks"
    __table_args__ = (
        _one_of("verdict", ParityVerdict),
        Index(None, "conversion_id"),
        Index(None, "environment_id"),
    )

    id: Mapped[PrimaryKey]
    conversion_id: Mapped[int] = mapped_column(ForeignKey("conversions.id"))
    verdict: Mapped[Word]
    device: Mapped[Words]
    provider: Mapped[Words]
    shapes: Mapped[Count]
    max_abs_diff: Mapped[Number | None]
    tolerance: Mapped[Number | None]
    axes_proven: Mapped[Json]
    detail: Mapped[Words | None]
    session: Mapped[Json | None]
    """How ONNX Runtime was asked to run; NULL where nobody wrote it down."""
    device_memory_bytes: Mapped[Bytes | None]
    environment_id: Mapped[int | None] = mapped_column(_Number)
    """The environment whose versions it ran with; NULL: that of the conversion."""
    checked_at: Mapped[Moment]

    outputs: Mapped[list[ParityOutput]] = relationship(lazy="raise")
    cells: Mapped[list[ParityCell]] = relationship(lazy="raise")


class ParityOutput(Base):
    """The largest difference of one output in one check."""

    __tablename__ = "parity_outputs"
    __table_args__ = (UniqueConstraint("parity_check_id", "position"),)

    id: Mapped[PrimaryKey]
    parity_check_id: Mapped[int] = mapped_column(ForeignKey("parity_checks.id"))
    position: Mapped[Count]
    name: Mapped[Words]
    max_abs_diff: Mapped[Number]
    tolerance: Mapped[Number]
    spread: Mapped[Number | None]
    """By how much PyTorch differs from itself there; NULL where that decided nothing and was not measured."""


class ParityCell(Base):
    """One graph at one shape, run by one provider at one optimisation level, in one check."""

    __tablename__ = "parity_cells"
    __table_args__ = (UniqueConstraint("parity_check_id", "position"), _one_of("verdict", ParityVerdict))

    id: Mapped[PrimaryKey]
    parity_check_id: Mapped[int] = mapped_column(ForeignKey("parity_checks.id"))
    position: Mapped[Count]
    graph: Mapped[Words]
    provider: Mapped[Words]
    optimization: Mapped[Word]
    dtype: Mapped[Word]
    shape: Mapped[Words]
    sizes: Mapped[Json]
    verdict: Mapped[Word]
    output: Mapped[Words | None]
    max_abs_diff: Mapped[Number | None]
    tolerance: Mapped[Number | None]
    detail: Mapped[Words | None]
