"""What the API answers, typed: the catalog's records as JSON holds them, without NaN and infinity."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

__all__ = [
    "Comparison",
    "Conversion",
    "FoundDone",
    "ListedModel",
    "Models",
    "Overview",
    "Problem",
    "Run",
    "Runs",
    "Totals",
    "Working",
]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]


class _Answer(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class Problem(_Answer):
    """Why there is no answer."""

    detail: str


class Totals(_Answer):
    """Attempts by how they ended."""

    converted: int
    reused: int
    mismatch: int
    failed: int


class _Point(_Answer):
    start: datetime
    totals: Totals


class _Step(_Answer):
    step: str
    sampled: int
    median_seconds: Number
    p95_seconds: Number
    median_peak_bytes: int | None


class _Sizes(_Answer):
    served: int
    served_bytes: int
    quarantined: int
    quarantined_bytes: int


class Run(_Answer):
    """One batch; ``totals`` counts what is known so far while it has no end, ``models`` what was asked for."""

    id: int
    engine: str
    started_at: datetime
    finished_at: datetime | None
    models: int | None
    totals: Totals


class Runs(_Answer):
    """Batches, newest first."""

    runs: list[Run]


class Working(_Answer):
    """A model in work; without a ``step`` it waits for its share of memory."""

    model_id: str
    worker: str
    batch_id: int | None
    step: str | None
    began_at: datetime
    seconds: float
    step_seconds: float


class Overview(_Answer):
    """What happened in a period, and what holds now."""

    period: str
    now: Totals
    over_time: list[_Point]
    statuses: dict[str, int]
    failures: dict[str, int]
    templates: dict[str, int]
    steps: list[_Step]
    artifacts: _Sizes
    running: list[Run]
    working: list[Working]


class ListedModel(_Answer):
    """One row of a listing."""

    id: int
    model_id: str
    status: str
    task: str | None
    model_type: str | None
    error_kind: str | None
    verdict: str | None
    max_abs_diff: Number
    tolerance: Number
    size_bytes: int | None
    quarantined: bool
    seconds: float
    finished_at: datetime
    batch_id: int | None
    worker: str | None


class Models(_Answer):
    """One page of a listing; give ``next`` as ``after`` for the page that follows."""

    models: list[ListedModel]
    next: str | None


class FoundDone(_Answer):
    """What a run found done, with the status that the run reports; the rest is of the conversion that was found."""

    models: list[ListedModel]


class _Tensor(_Answer):
    name: str
    dtype: str
    shape: list[int | str]


class _Graph(_Answer):
    role: str
    path: str
    opset: int
    nodes: int
    nodes_before_simplify: int
    operators: dict[str, int]
    operators_before_simplify: dict[str, int]
    inputs: list[_Tensor]
    outputs: list[_Tensor]


class _File(_Answer):
    path: str
    size_bytes: int
    sha256: str


class _Artifact(_Answer):
    sha256: str
    path: str
    quarantined: bool
    size_bytes: int
    created_at: datetime
    files: list[_File]
    graphs: list[_Graph]


class _Output(_Answer):
    name: str
    max_abs_diff: Number
    tolerance: Number


class _Cell(_Answer):
    graph: str
    provider: str
    optimization: str
    dtype: str
    shape: str
    sizes: dict[str, int]
    verdict: str
    output: str | None
    max_abs_diff: Number
    tolerance: Number
    detail: str | None


class _Parity(_Answer):
    verdict: str
    device: str
    provider: str
    shapes: int
    max_abs_diff: Number
    tolerance: Number
    axes_proven: list[str]
    outputs: list[_Output]
    cells: list[_Cell]
    detail: str | None
    checked_at: datetime


class _Timing(_Answer):
    step: str
    seconds: Number


class _Error(_Answer):
    kind: str
    message: str
    step: str
    reproduce: str


class Conversion(_Answer):
    """One attempt with all that hangs on it."""

    id: int
    batch_id: int | None
    worker: str | None
    model_id: str
    key: str | None
    requested_revision: str | None
    revision: str | None
    status: str
    task: str | None
    task_family: str | None
    model_type: str | None
    architecture: str | None
    template: str | None
    simplified: bool
    options: dict[str, Any]
    attempts: int
    peak_rss_bytes: int | None
    notes: list[str]
    timings: list[_Timing]
    error: _Error | None
    artifact: _Artifact | None
    parity: list[_Parity]
    environment: dict[str, str]
    started_at: datetime
    finished_at: datetime


class Comparison(_Answer):
    """Two attempts side by side."""

    a: Conversion
    b: Conversion
