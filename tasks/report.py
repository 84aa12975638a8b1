"""The report: what users and programs read of a conversion, in the schema that ``contract`` fixes.

`Report` is what ``--report`` writes; `ModelEntry` is one of its models, and what ``ferry.json`` and
the catalog hold. All values are frozen and compare by content.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from onnx_config.errors import ErrorKind

__all__ = [
    "AgreementEntry",
    "Engine",
    "ErrorEntry",
    "GraphEntry",
    "ModelEntry",
    "OutputDifference",
    "ParityCellEntry",
    "ParityEntry",
    "Report",
    "Status",
    "Step",
    "TensorEntry",
    "Totals",
    "VariantEntry",
    "VariantOutputEntry",
    "VariantParityEntry",
    "Verdict",
]


class Status(StrEnum):
    """How a model's conversion ended."""

    CONVERTED = "converted"
    REUSED = "reused"
    MISMATCH = "mismatch"
    FAILED = "failed"


class Verdict(StrEnum):
    """What parity says of an artifact."""

    VERIFIED = "verified"
    MISMATCH = "mismatch"
    UNSTABLE = "unstable"
    NOT_RUN = "not_run"


class Step(StrEnum):
    """The steps of a conversion, in their order; ``FETCH`` looks the model up and downloads it."""

    FETCH = "fetch"
    DETECT = "detect"
    EXPORT = "export"
    SIMPLIFY = "simplify"
    PARITY = "parity"
    REGISTER = "register"


class Engine(StrEnum):
    """Who runs the steps."""

    PREFECT = "prefect"
    LOCAL = "local"


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorEntry(_Value):
    """One graph input or output."""

    name: str
    dtype: str
    """NumPy name of the element type."""
    shape: tuple[int | str, ...]
    """An ``int`` is fixed, a ``str`` names a dynamic axis or a formula over such names."""


class GraphEntry(_Value):
    """One ``.onnx`` file of an artifact."""

    role: str
    """``model``, ``encoder``, ``decoder``, ``decoder_with_past``, …"""
    path: str
    """The file; absolute in a report, relative to the folder in ``ferry.json`` and the catalog."""
    opset: int
    """ONNX opset of the default domain."""
    nodes: int
    """Nodes of the graph as stored, those of its branches included."""
    nodes_before_simplify: int
    """Nodes of the graph as exported."""
    operators: dict[str, int] = Field(default_factory=dict)
    """Operator -> nodes of it; those of another domain than ONNX's as ``domain::name``."""
    operators_before_simplify: dict[str, int] = Field(default_factory=dict)
    """The same of the graph as exported; empty where nobody counted them."""
    inputs: tuple[TensorEntry, ...]
    """In the graph's order, as in the next one."""
    outputs: tuple[TensorEntry, ...]
    """Each with its name, its element type and its shape."""


class OutputDifference(_Value):
    """The largest difference of one output over all shapes."""

    name: str
    max_abs_diff: float
    tolerance: float
    spread: float | None = None
    """By how much PyTorch differs from itself between float32 and float64 there; ``None`` where that decided nothing
    and was not measured."""


class ParityCellEntry(_Value):
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
    sizes: dict[str, int]
    """Dynamic axis -> size in elements."""
    verdict: Verdict
    output: str | None
    """The output that came closest to its tolerance, or went beyond."""
    max_abs_diff: float | None
    tolerance: float | None
    detail: str | None = None


class ParityEntry(_Value):
    """The verdict and what it rests on."""

    verdict: Verdict
    """``unstable``: PyTorch differs from itself by as much, so that nothing is proven."""
    device: str
    """``cpu`` or ``cuda``."""
    provider: str
    """ONNX Runtime's execution provider."""
    shapes: int
    """How many input shapes other than the traced one were compared."""
    max_abs_diff: float | None
    """Largest absolute difference of an output."""
    tolerance: float | None
    """Largest absolute difference allowed where it came closest to failing."""
    axes_proven: tuple[str, ...]
    """Dynamic axes that were compared at two sizes at least."""
    outputs: tuple[OutputDifference, ...] = ()
    """Each output's largest difference over all shapes."""
    detail: str | None = None
    """What differed and where; ``None`` where nothing did."""
    cells: tuple[ParityCellEntry, ...] = ()
    """Every comparison, in the order in which they were made."""
    session: dict[str, int | str] | None = None
    """How ONNX Runtime was asked to run."""
    device_memory_bytes: int | None = None
    """Memory of the GPU that the session took; ``None`` on the CPU."""


class AgreementEntry(_Value):
    """How often a variant chooses as the float32 model does: the class, the next token, the place in a text."""

    rate: float
    """Share of equal choices, 0 to 1."""
    choices: int
    """How many were counted."""
    over: str
    """Of what they were."""


class VariantOutputEntry(_Value):
    """One output of a variant over all shapes."""

    name: str
    max_abs_diff: float
    relative_error: float
    """The difference as a share of the output: of its largest number for halves, of the worst row's root of the mean
    square for 8 and 4 bits."""
    tolerance: float
    """What was allowed of it, as a share."""
    largest: float
    """Largest magnitude of the output there."""
    cosine: float


class VariantParityEntry(_Value):
    """The verdict on a variant, against the float32 model in PyTorch."""

    verdict: Verdict
    device: str
    provider: str
    shapes: int
    max_abs_diff: float | None
    relative_error: float | None
    """Where it came closest to failing."""
    tolerance: float | None
    """What was allowed there."""
    cosine: float | None
    """The smallest."""
    agreement: AgreementEntry | None
    """``None``: the model neither classifies nor generates."""
    outputs: tuple[VariantOutputEntry, ...] = ()
    detail: str | None = None
    """What was off and where; ``None`` where nothing was."""


class VariantEntry(_Value):
    """One variant that was asked for."""

    variant: str
    """What its files' names end in: ``fp16``, ``q4``."""
    graphs: tuple[GraphEntry, ...] = ()
    """Its files; none where it does not hold, since then it is not in the artifact."""
    size_bytes: int = 0
    """Of the files, weights beside them included."""
    parity: VariantParityEntry | None = None
    """``None``: it could not be made."""
    seconds: float = 0.0
    """What making and comparing it took, without what all variants share."""
    notes: tuple[str, ...] = ()
    """Operators that stayed float32, and what was quantized; or why there is none."""


class ErrorEntry(_Value):
    """Why a model is not converted."""

    kind: ErrorKind
    """What happens next depends on it."""
    message: str
    """What was asked, what was found, what to do; one paragraph."""
    step: Step
    """Where it happened."""
    reproduce: str
    """A shell command that shows it again."""


class ModelEntry(_Value):
    """One model of a report."""

    id: str
    """As written in the manifest."""
    revision: str | None
    """Commit of the Hub, or content hash of a folder; ``None`` where it could not be looked up."""
    status: Status
    """``converted`` and ``reused`` mean verified."""
    task: str | None
    """As asked for, or as the config declares."""
    model_type: str | None
    """``model_type`` of the config."""
    architecture: str | None
    """Class of the model."""
    artifact: str | None
    """Folder that holds the files; of a mismatch, the quarantine folder."""
    graphs: tuple[GraphEntry, ...] = ()
    """One for each ``.onnx`` file that the model became."""
    template: str | None
    """``traced``, ``reused`` or ``direct``."""
    simplified: bool
    """Whether the simplifier's graph is the one stored."""
    parity: ParityEntry | None
    """The comparison with PyTorch; ``None`` where it did not come to that."""
    variants: tuple[VariantEntry, ...] = ()
    """Those that were asked for; the graphs above are none of them."""
    seconds: dict[Step, float] = Field(default_factory=dict)
    """Wall time of each step that ran."""
    peak_rss_bytes: int | None
    """Largest resident size of a converting process."""
    attempts: int
    """Tries of the model in this batch."""
    notes: tuple[str, ...] = ()
    """What a reader should know: an axis that had to be fixed, why the plain graph was kept."""
    error: ErrorEntry | None
    """Why it is not converted; ``None`` where it is."""


class Totals(_Value):
    """Models by status."""

    converted: int
    reused: int
    failed: int
    mismatch: int


class Report(_Value):
    """What a batch did."""

    schema_: int = Field(default=1, alias="schema")
    """Grows where a key changes its meaning."""
    started_at: datetime
    """When the batch began; UTC."""
    seconds: float
    """How long it took."""
    totals: Totals
    """Models by status."""
    models: tuple[ModelEntry, ...]
    """In the order of the manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @classmethod
    def of(cls, models: Iterable[ModelEntry], *, started_at: datetime, seconds: float) -> Report:
        """Return the report over ``models``, in their order, with totals counted."""
        entries = tuple(models)
        count = Counter(entry.status for entry in entries)
        totals = Totals(**{status.value: count[status] for status in Status})
        return cls(started_at=started_at.astimezone(UTC), seconds=round(seconds, 3), totals=totals, models=entries)

    @property
    def all_verified(self) -> bool:
        """Whether every model is converted or reused."""
        return self.totals.failed == self.totals.mismatch == 0

    def to_json(self) -> str:
        """Return the report as one JSON document."""
        return self.model_dump_json(by_alias=True, indent=2)
