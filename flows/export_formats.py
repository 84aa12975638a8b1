"""Conversions as files: JSON with everything, and one flat row for each in CSV and Parquet."""

from __future__ import annotations

import csv
import json as jsonlib
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from flows.catalog_access import to_json
from flows.progress import clean
from onnx_config.errors import InputError

if TYPE_CHECKING:
    from db import ConversionRecord

__all__ = ["COLUMNS", "write_csv", "write_json", "write_parquet"]

COLUMNS = (
    "id",
    "model_id",
    "requested_revision",
    "revision",
    "status",
    "task",
    "task_family",
    "model_type",
    "architecture",
    "template",
    "simplified",
    "attempts",
    "peak_rss_bytes",
    "seconds",
    "verdict",
    "device",
    "provider",
    "shapes",
    "max_abs_diff",
    "tolerance",
    "artifact_sha256",
    "artifact_path",
    "quarantined",
    "size_bytes",
    "error_kind",
    "error_step",
    "error_message",
    "error_reproduce",
    "started_at",
    "finished_at",
    "batch_id",
    "key",
    "worker",
)
"""Of a conversion's row."""

_ROWS_PER_GROUP = 10_000
_WHOLE_NUMBERS = {"id", "attempts", "peak_rss_bytes", "shapes", "size_bytes", "batch_id"}
_NUMBERS = {"seconds", "max_abs_diff", "tolerance"}
_ANSWERS = {"simplified", "quarantined"}
_MOMENTS = {"started_at", "finished_at"}


def write_json(stream: TextIO, records: Iterator[ConversionRecord]) -> int:
    """Write one document without holding more than a few hundred conversions."""
    count = 0
    stream.write('{"schema": 1, "conversions": [')
    for record in records:
        stream.write((",\n" if count else "\n") + jsonlib.dumps(to_json(record), allow_nan=False))
        count += 1
    stream.write("\n]}\n")
    return count


def write_csv(stream: TextIO, records: Iterator[ConversionRecord]) -> int:
    """Write a line for each conversion, its times as text and no cell that a spreadsheet would run."""
    writer = csv.writer(stream)
    writer.writerow(COLUMNS)
    count = 0
    for record in records:
        row = _flat(record)
        writer.writerow([_cell(row[column]) for column in COLUMNS])
        count += 1
    return count


def _flat(record: ConversionRecord) -> dict[str, Any]:
    """Return the columns of a conversion's line; of several parity checks, the newest."""
    row = {column: getattr(record, column, None) for column in COLUMNS}
    row["seconds"] = record.seconds
    if record.parity:
        check = record.parity[-1]
        for column in ("verdict", "device", "provider", "shapes", "max_abs_diff", "tolerance"):
            row[column] = getattr(check, column)
    if record.artifact is not None:
        row |= {
            "artifact_sha256": record.artifact.sha256,
            "artifact_path": record.artifact.path,
            "quarantined": record.artifact.quarantined,
            "size_bytes": record.artifact.size_bytes,
        }
    if record.error is not None:
        row |= {f"error_{name}": getattr(record.error, name) for name in ("kind", "step", "message", "reproduce")}
    return row


def _cell(value: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula: such a text gets a quote in front."""
    if isinstance(value, datetime):
        return to_json(value)
    if isinstance(value, str):
        text = clean(value)
        return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
    return value


def write_parquet(path: Path, records: Iterator[ConversionRecord]) -> int:
    """Write a row for each conversion with the columns of the CSV, typed; text stands there as it was recorded.

    Raises:
        InputError: If pyarrow is not installed; nothing was read or written then.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            "Parquet is written by the package pyarrow, which is not installed. Type: pip install "
            "'onnx-ferry[parquet]'. `ferry catalog export --format csv` has the same columns and needs nothing."
        ) from error
    schema = pyarrow.schema([(name, _arrow_type(pyarrow, name)) for name in COLUMNS])
    count = 0
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while rows := [_flat(record) for record in islice(records, _ROWS_PER_GROUP)]:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            count += len(rows)
    return count


def _arrow_type(pyarrow: Any, name: str) -> Any:
    if name in _MOMENTS:
        return pyarrow.timestamp("us", tz="UTC")
    if name in _WHOLE_NUMBERS:
        return pyarrow.int64()
    if name in _NUMBERS:
        return pyarrow.float64()
    return pyarrow.bool_() if name in _ANSWERS else pyarrow.string()
