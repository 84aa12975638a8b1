"""The closed sets of words that the catalog stores.

They are spelled out here since the catalog knows no other package; the database checks them too.
"""

from __future__ import annotations

from enum import StrEnum

__all__ = [
    "BatchEngine",
    "ConversionStatus",
    "Dimension",
    "Direction",
    "FailureKind",
    "ParityVerdict",
    "Span",
    "StepName",
    "TemplateUse",
]


class ConversionStatus(StrEnum):
    """How an attempt ended."""

    CONVERTED = "converted"
    REUSED = "reused"
    MISMATCH = "mismatch"
    FAILED = "failed"


class ParityVerdict(StrEnum):
    """What a parity check found."""

    VERIFIED = "verified"
    MISMATCH = "mismatch"
    UNSTABLE = "unstable"
    NOT_RUN = "not_run"


class StepName(StrEnum):
    """The steps of a conversion, in their order."""

    FETCH = "fetch"
    DETECT = "detect"
    EXPORT = "export"
    SIMPLIFY = "simplify"
    PARITY = "parity"
    REGISTER = "register"


class TemplateUse(StrEnum):
    """Where the graph's structure came from."""

    TRACED = "traced"
    REUSED = "reused"
    DIRECT = "direct"


class FailureKind(StrEnum):
    """Why a model is not converted."""

    BAD_INPUT = "bad_input"
    NOT_FOUND = "not_found"
    NETWORK = "network"
    UNSUPPORTED = "unsupported"
    EXPORT_FAILED = "export_failed"
    RUNTIME_FAILED = "runtime_failed"
    MISMATCH = "mismatch"
    OUT_OF_MEMORY = "out_of_memory"
    TIMEOUT = "timeout"
    CRASHED = "crashed"
    STORE = "store"
    CATALOG = "catalog"
    INTERNAL = "internal"


class BatchEngine(StrEnum):
    """Who ran a batch's steps."""

    PREFECT = "prefect"
    LOCAL = "local"


class Direction(StrEnum):
    """On which side of a graph a tensor stands."""

    INPUT = "input"
    OUTPUT = "output"


class Span(StrEnum):
    """How long the time is that one row of the totals counts."""

    HOUR = "hour"
    DAY = "day"


class Dimension(StrEnum):
    """What the attempts have in common that one row of the grouped totals counts."""

    ALL = "all"
    TASK = "task"
    MODEL_TYPE = "model_type"
    WORKER = "worker"
