"""What the catalog takes and gives: plain frozen values, the same for writing and for reading.

`ConversionRecord` is one attempt with all that hangs on it. ``id`` and ``batch_id`` are what the
database adds; they are ignored when a record is written. Times are aware; they come back in UTC.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import cache
from typing import Any

from db.vocabulary import BatchEngine, ConversionStatus, FailureKind, ParityVerdict, StepName, TemplateUse

__all__ = [
    "ArtifactRecord",
    "BatchRecord",
    "BatchTotals",
    "ConversionRecord",
    "ErrorRecord",
    "FileRecord",
    "GraphRecord",
    "LeaseRecord",
    "OutputParityRecord",
    "ParityCellRecord",
    "ParityRecord",
    "RunningConversion",
    "StepTiming",
    "TemplateRecord",
    "TensorRecord",
]

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """One graph input or output."""

    name: str
    """Name in the graph."""

    dtype: str
    """NumPy name of the element type."""

    shape: tuple[int | str, ...]
    """Sizes in elements, outermost first; a ``str`` names a dynamic axis or a formula over such names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRecord:
    """One ``.onnx`` file of an artifact."""

    role: str
    """``model``, ``encoder``, ``decoder``, ``decoder_with_past``, …; unique in an artifact."""

    path: str
    """The file, relative to the artifact's folder."""

    opset: int
    """ONNX opset of the default domain."""

    nodes: int
    """Nodes of the graph as stored."""

    nodes_before_simplify: int
    """Nodes before the simplifier ran."""

    operators: Mapping[str, int] = field(default_factory=dict)
    """Operator -> nodes of it, as stored; empty where nobody counted them."""

    operators_before_simplify: Mapping[str, int] = field(default_factory=dict)
    """The same before the simplifier ran."""

    inputs: tuple[TensorRecord, ...]
    """In the graph's order."""

    outputs: tuple[TensorRecord, ...]
    """In the graph's order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One file of an artifact."""

    path: str
    """Relative to the artifact's folder; unique in an artifact."""

    size_bytes: int
    """Length of the file."""

    sha256: str
    """SHA-256 of the content, 64 lower-case hex digits."""

    def __post_init__(self) -> None:
        _check_digest("file sha256", self.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactRecord:
    """The files of one conversion result, known by their content."""

    sha256: str
    """Content address, 64 lower-case hex digits; two attempts with the same content share one artifact."""

    path: str
    """Folder that holds the files."""

    quarantined: bool
    """Whether parity did not hold: kept for a look, never served."""

    size_bytes: int
    """All files together."""

    created_at: datetime
    """When the files were stored first."""

    files: tuple[FileRecord, ...] = ()
    """By path."""

    graphs: tuple[GraphRecord, ...] = ()
    """In the order in which they were recorded."""

    def __post_init__(self) -> None:
        _check_digest("artifact sha256", self.sha256)
        object.__setattr__(self, "files", tuple(sorted(self.files, key=lambda file: file.path)))
        _check_aware("created_at", self.created_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputParityRecord:
    """The largest difference of one output over all compared shapes."""

    name: str
    """Name of the output."""

    max_abs_diff: float
    """Largest absolute difference; NaN where one side only had NaN."""

    tolerance: float
    """Largest absolute difference allowed."""

    spread: float | None = None
    """By how much PyTorch differs from itself there; ``None`` where that was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityCellRecord:
    """One graph at one shape, run by one provider at one optimisation level."""

    graph: str
    """Role of the graph."""

    provider: str
    """ONNX Runtime's execution provider."""

    optimization: str
    """``disable``, ``basic``, ``extended`` or ``all``: how far ONNX Runtime rewrites the graph."""

    dtype: str
    """Element type of the graph's weights."""

    shape: str
    """What the shape is there to find."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    """Dynamic axis -> size in elements."""

    verdict: str
    """A `db.vocabulary.ParityVerdict`."""

    output: str | None
    """The output that came closest to its tolerance, or went beyond it; ``None`` where nothing was compared."""

    max_abs_diff: float | None
    """Its largest absolute difference."""

    tolerance: float | None
    """Largest absolute difference allowed of it."""

    detail: str | None = None
    """What differed; ``None`` where nothing did."""

    def __post_init__(self) -> None:
        _check_word("verdict", self.verdict, ParityVerdict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityRecord:
    """One comparison of an artifact with the model that it came from."""

    verdict: str
    """A `db.vocabulary.ParityVerdict`."""

    device: str
    """``cpu`` or ``cuda``."""

    provider: str
    """ONNX Runtime's execution provider."""

    shapes: int
    """How many input shapes other than the traced one were compared."""

    max_abs_diff: float | None
    """Largest absolute difference over all outputs; ``None`` where nothing was compared."""

    tolerance: float | None
    """Largest absolute difference allowed where it came closest to failing."""

    axes_proven: tuple[str, ...] = ()
    """Dynamic axes that were compared at two sizes at least."""

    outputs: tuple[OutputParityRecord, ...] = ()
    """In the graph's order."""

    detail: str | None = None
    """What differed and where; ``None`` where nothing did."""

    cells: tuple[ParityCellRecord, ...] = ()
    """In the order in which they were compared."""

    session: Mapping[str, Any] | None = None
    """How ONNX Runtime was asked to run; ``None`` where that was not written down."""

    device_memory_bytes: int | None = None
    """Memory of the device that the check took; ``None`` on the CPU, or where it was not measured."""

    environment: Mapping[str, str] | None = None
    """Versions by package name; ``None``: those of the conversion."""

    checked_at: datetime
    """When the check ended."""

    def __post_init__(self) -> None:
        _check_word("verdict", self.verdict, ParityVerdict)
        _check_aware("checked_at", self.checked_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTiming:
    """How long one step of an attempt took."""

    step: str
    """A `db.vocabulary.StepName`."""

    seconds: float
    """Wall time."""

    def __post_init__(self) -> None:
        _check_word("step", self.step, StepName)


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRecord:
    """Why an attempt did not end in a verified artifact."""

    kind: str
    """A `db.vocabulary.FailureKind`."""

    message: str
    """What was asked, what was found, what to do; one paragraph."""

    step: str
    """A `db.vocabulary.StepName`: where it happened."""

    reproduce: str
    """A shell command that shows it again."""

    def __post_init__(self) -> None:
        _check_word("error kind", self.kind, FailureKind)
        _check_word("error step", self.step, StepName)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionRecord:
    """One attempt to convert one model, and what came of it."""

    model_id: str
    """Hub id, or absolute folder; as resolved."""

    key: str | None
    """Action key, 64 lower-case hex digits: the same key asks for the same work. ``None`` where the
    model could not be looked up, so that the work was never known."""

    requested_revision: str | None = None
    """Branch, tag or commit as asked for; ``None``: the default."""

    revision: str | None
    """Commit or content hash; ``None`` where it could not be looked up."""

    status: str
    """A `db.vocabulary.ConversionStatus`."""

    task: str | None
    """As detected or asked for; ``None`` where detection failed."""

    task_family: str | None = None
    """The family that the task belongs to."""

    model_type: str | None
    """``model_type`` of the config."""

    architecture: str | None
    """Class of the model."""

    template: str | None
    """A `db.vocabulary.TemplateUse`; ``None`` where no graph was made."""

    simplified: bool
    """Whether the simplifier's graph is the one stored."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """How the conversion was asked for; values that JSON holds."""

    attempts: int
    """Tries within this conversion, at least 1."""

    peak_rss_bytes: int | None
    """Largest resident size of the converting process; ``None`` where it was not measured."""

    notes: tuple[str, ...] = ()
    """What a reader should know."""

    timings: tuple[StepTiming, ...] = ()
    """One for each step that ran, in the order in which they ran."""

    error: ErrorRecord | None = None
    """Why there is no verified artifact; ``None`` where there is one."""

    artifact: ArtifactRecord | None = None
    """What was stored; ``None`` where nothing was."""

    parity: tuple[ParityRecord, ...] = ()
    """Oldest first."""

    environment: Mapping[str, str] = field(default_factory=dict)
    """Versions by package name."""

    started_at: datetime
    """When the first step began."""

    finished_at: datetime
    """When the last step ended."""

    id: int | None = None
    """Number in the catalog; ``None`` before it is recorded."""

    batch_id: int | None = None
    """The batch that it belongs to; ``None``: converted alone, or not recorded yet."""

    worker: str | None = None
    """Name of the machine that it ran on; ``None``: nobody wrote it down."""

    def __post_init__(self) -> None:
        if self.key is not None:
            _check_digest("key", self.key)
        _check_word("status", self.status, ConversionStatus)
        if self.template is not None:
            _check_word("template", self.template, TemplateUse)
        _check_aware("started_at", self.started_at)
        _check_aware("finished_at", self.finished_at)
        done = self.status in (ConversionStatus.CONVERTED, ConversionStatus.REUSED)
        if done and (self.artifact is None or self.error is not None):
            raise ValueError(f"{self.model_id}: status {self.status} goes with an artifact and without an error")
        if self.status == ConversionStatus.FAILED and self.error is None:
            raise ValueError(f"{self.model_id}: status failed needs an error")

    @property
    def seconds(self) -> float:
        """Wall time of all steps together."""
        return sum(timing.seconds for timing in self.timings)


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateRecord:
    """The graph of a structure without its weights."""

    key: str
    """SHA-256 over all that decides what graph the structure gives."""

    architecture: str | None
    """Class of its models."""

    size_bytes: int
    """Of its files."""

    hits: int
    """Models bound to it after the one that it was traced for."""

    created_at: datetime
    """When it was first used."""

    last_used_at: datetime
    """When a model was last bound to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTotals:
    """Models of a batch by status."""

    converted: int = 0
    """Converted and verified."""

    reused: int = 0
    """Found done."""

    failed: int = 0
    """Ended in an error."""

    mismatch: int = 0
    """In quarantine."""

    @property
    def models(self) -> int:
        """How many they are together."""
        return self.converted + self.reused + self.failed + self.mismatch


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRecord:
    """One run of the batch command."""

    id: int
    """Number in the catalog."""

    engine: str
    """A `db.vocabulary.BatchEngine`."""

    started_at: datetime
    """When it began."""

    finished_at: datetime | None
    """When it ended; ``None``: it still runs, or it was killed."""

    totals: BatchTotals | None
    """``None`` until it ends."""

    models: int | None = None
    """How many were asked for; ``None``: nobody wrote it down."""

    found: BatchTotals | None = None
    """While it runs: what was known already when it began; none of it is recorded again."""

    def __post_init__(self) -> None:
        _check_word("engine", self.engine, BatchEngine)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRecord:
    """Who has the lease on a key, or wants it."""

    key: str
    """64 hexadecimal digits."""

    owner: str
    """32 letters or digits, others each time that somebody takes a lease."""

    host: str
    """Name of the machine, for people."""

    process_id: int
    """Number of the process there, for people."""

    process: str
    """What no other process was or will be, on this machine or another; empty where that cannot be said."""

    lapsed: bool = False
    """Whether its time is over, by the database's clock; what is wanted has not begun."""

    model_id: str | None = None
    """What is converted under it; ``None``: it is on something else than a model."""

    batch_id: int | None = None
    """The batch that the model belongs to; ``None``: it is converted alone."""

    def __post_init__(self) -> None:
        _check_digest("key", self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningConversion:
    """A model in work, as its worker last said."""

    model_id: str
    """Hub id, or absolute folder."""

    worker: str
    """Name of the machine."""

    batch_id: int | None
    """The batch that it belongs to; ``None``: it is converted alone."""

    step: str | None
    """A `db.vocabulary.StepName`; ``None``: it waits for its share of memory."""

    began_at: datetime
    """When the worker took it, by the database's clock, as all times here."""

    seconds: float
    """For how long it has been in work."""

    step_seconds: float
    """For how long it has been at this step."""


def _check_word(name: str, value: str, words: type[StrEnum]) -> None:
    if value not in _values(words):
        raise ValueError(f"{name} is {value!r}; the catalog knows {sorted(_values(words))}")


@cache
def _values(words: type[StrEnum]) -> frozenset[str]:
    return frozenset(word.value for word in words)


def _check_digest(name: str, value: str) -> None:
    if not _DIGEST.fullmatch(value):
        raise ValueError(f"{name} is {value!r}; it has 64 lower-case hex digits")


def _check_aware(name: str, value: datetime) -> None:
    if value.tzinfo is None:
        raise ValueError(f"{name} is {value.isoformat()}, without a time zone; give datetime.now(UTC)")
