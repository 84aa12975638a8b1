"""The catalog: what was converted, how it went, and where the result is.

`make_engine` opens a database, `upgrade` brings it to the current schema, `session_scope` is one
transaction, and all else works in it on the values of `db.records`. Every such function takes the session
first, never commits, and returns values. Each reads with a number of statements that does not grow with the
rows it returns, save for one more per thousands of them.
"""

from __future__ import annotations

from db.batches import finish_batch, get_batch, list_batches, start_batch
from db.conversions import (
    batch_conversions,
    converted_revisions,
    count_conversions,
    get_conversion,
    iter_artifacts,
    iter_conversions,
    latest_by_key,
    list_conversions,
)
from db.copying import Copied, copy_catalog
from db.engine import make_engine, session_scope, sqlite_file
from db.errors import CatalogError, CatalogVersionError
from db.found import note_found_done
from db.leases import (
    find_leases,
    forget_lapsed_leases,
    keep_lease,
    list_running,
    note_step,
    release_lease,
    take_lease,
)
from db.migrate import is_current, schema_version, upgrade
from db.named import find_artifacts, find_conversion
from db.recording import quarantine_artifact, record_conversion, record_parity
from db.records import (
    ArtifactRecord,
    BatchRecord,
    BatchTotals,
    ConversionRecord,
    ErrorRecord,
    FileRecord,
    GraphRecord,
    LeaseRecord,
    OutputParityRecord,
    ParityCellRecord,
    ParityRecord,
    RunningConversion,
    StepTiming,
    TemplateRecord,
    TensorRecord,
)
from db.templates import forget_templates, list_templates, note_template
from db.vocabulary import BatchEngine, ConversionStatus, FailureKind, ParityVerdict, StepName, TemplateUse

__all__ = [
    "ArtifactRecord",
    "BatchEngine",
    "BatchRecord",
    "BatchTotals",
    "CatalogError",
    "CatalogVersionError",
    "ConversionRecord",
    "ConversionStatus",
    "Copied",
    "ErrorRecord",
    "FailureKind",
    "FileRecord",
    "GraphRecord",
    "LeaseRecord",
    "OutputParityRecord",
    "ParityCellRecord",
    "ParityRecord",
    "ParityVerdict",
    "RunningConversion",
    "StepName",
    "StepTiming",
    "TemplateRecord",
    "TemplateUse",
    "TensorRecord",
    "batch_conversions",
    "converted_revisions",
    "copy_catalog",
    "count_conversions",
    "find_artifacts",
    "find_conversion",
    "find_leases",
    "finish_batch",
    "forget_lapsed_leases",
    "forget_templates",
    "get_batch",
    "get_conversion",
    "is_current",
    "iter_artifacts",
    "iter_conversions",
    "keep_lease",
    "latest_by_key",
    "list_batches",
    "list_conversions",
    "list_running",
    "list_templates",
    "make_engine",
    "note_found_done",
    "note_step",
    "note_template",
    "quarantine_artifact",
    "record_conversion",
    "record_parity",
    "release_lease",
    "schema_version",
    "session_scope",
    "sqlite_file",
    "start_batch",
    "take_lease",
    "upgrade",
]
