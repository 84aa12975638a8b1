"""A catalog of any size in seconds or minutes: rows made by rule and written in bulk, past the mapper and its triggers.

The rows go into the schema before there were triggers that count, and the migrations do the rest: what a catalog of
that size has to go through when it is brought up to date is done here too.
"""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

import psycopg
from alembic import command
from sqlalchemy import Engine

from db.migrate import alembic_config, upgrade

__all__ = ["OLD_ORG", "RARE_WORD", "BulkCatalog", "fill_in_bulk"]

# The last schema without a trigger.
_BEFORE_TRIGGERS = "0003"
_ROWS_PER_WRITE = 20_000

OLD_ORG = "oldorg"
"""Two of a hundred models are this organisation's, and all were converted at the very beginning."""

RARE_WORD = "zanzibar"
"""In the ids of three models."""

Row = tuple[Any, ...]

_NAMES_OF_TYPES = """
    bert roberta distilbert t5 gpt2 llama mistral qwen2 vit whisper wav2vec2 clip deberta-v2 electra xlm-roberta bart
    mt5 phi3 gemma2 mamba opt bloom falcon segformer detr swin convnext resnet albert longformer bigbird pegasus marian
    m2m_100 speecht5 hubert blip siglip sam dinov2 beit deit mpnet xlnet camembert flaubert layoutlmv3 donut timesfm
"""
_TYPES = _NAMES_OF_TYPES.split()
_USUAL_WORDS = """
    base large small tiny finetuned uncased cased multilingual squad emotion news legal medical chat instruct en de fr
"""
_WORDS = _USUAL_WORDS.split()
_HEADS = (
    ("SequenceClassification", "text-classification"),
    ("MaskedLM", "fill-mask"),
    ("TokenClassification", "token-classification"),
    ("QuestionAnswering", "question-answering"),
    ("CausalLM", "text-generation"),
    ("ConditionalGeneration", "text2text-generation"),
    ("ImageClassification", "image-classification"),
    ("ObjectDetection", "object-detection"),
    ("SemanticSegmentation", "image-segmentation"),
    ("CTC", "automatic-speech-recognition"),
    ("AudioClassification", "audio-classification"),
    ("Model", "feature-extraction"),
)
_KINDS = (
    "unsupported",
    "export_failed",
    "timeout",
    "out_of_memory",
    "runtime_failed",
    "network",
    "bad_input",
    "crashed",
)
_STEPS = ("fetch", "detect", "export", "simplify", "parity", "register")


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkCatalog:
    """What was made, by the numbers that a test or benchmark asks for again."""

    conversions: int
    """Attempts; numbered from 1 in the order of time."""

    models: int
    """Source models; numbered from 1."""

    batches: int
    """The last one has no end."""

    began_at: datetime
    """When the first attempt ended."""

    ended_at: datetime
    """When the last one did."""


def fill_in_bulk(engine: Engine, *, conversions: int, models: int, seed: int = 0) -> BulkCatalog:
    """Fill an empty database; return what is in it. Deterministic, save for the moment at which it ends: now."""
    with engine.begin() as connection:
        command.upgrade(alembic_config(connection), _BEFORE_TRIGGERS)
    writer = _Postgres(engine) if engine.dialect.name == "postgresql" else _SQLite(engine)
    rows = _Rows(conversions, models, seed)
    try:
        for table, columns, made in rows.tables():
            writer.write(table, columns, made)
        writer.done()
    finally:
        writer.close()
    upgrade(engine)
    return BulkCatalog(
        conversions=conversions,
        models=models,
        batches=rows.batches,
        began_at=rows.moment(1),
        ended_at=rows.moment(conversions),
    )


def model_id(number: int, models: int) -> str:
    """Return the id of a model, always the same for a number.

    >>> model_id(5, 100), model_id(7, 100)
    ('oldorg/llama-uncased-5', '/srv/models/large-7')
    """
    if number <= 3:
        return f"org-{number}/{RARE_WORD}-{number}"
    word = _WORDS[number % len(_WORDS)]
    if number <= 3 + models // 50:
        return f"{OLD_ORG}/{_TYPES[number % 7]}-{word}-{number}"
    if number % 7 == 0:
        return f"/srv/models/{_WORDS[(number // 7) % len(_WORDS)]}-{number}"
    return f"org-{number % (models // 20 + 1)}/{_type(number)}-{word}-{_WORDS[number // 3 % len(_WORDS)]}-{number}"


def _type(number: int) -> str:
    # A few types are most of a catalog, and there are some hundreds that are hardly in it.
    step = number * 2654435761 % 1000
    if step < 900:
        return _TYPES[step % 12]
    return _TYPES[step % len(_TYPES)] if step < 990 else f"odd_{number % 400}"


class _Rows:
    """The rows of every table, in the order in which they refer to each other."""

    def __init__(self, conversions: int, models: int, seed: int) -> None:
        self._conversions, self._models = conversions, models
        self._random = random.Random(seed)
        self._end = datetime.now(UTC).replace(microsecond=0)
        self.batches = max(1, conversions // 500)
        # Which model an attempt is at: the old ones first, then any.
        old = 3 + models // 50
        self._model = [0] * (conversions + 1)
        newest: dict[tuple[int, int], int] = {}
        for number in range(1, conversions + 1):
            model = number if number <= old else self._random.randrange(old + 1, models + 1)
            self._model[number] = model
            newest[model, number % 5 // 4] = number
        self._latest = set(newest.values())

    def moment(self, number: int) -> datetime:
        """Return when an attempt ended: spread over two years."""
        return self._end - timedelta(seconds=(self._conversions - number) * 63_000_000 // self._conversions)

    def tables(self) -> Iterator[tuple[str, str, Iterator[Row]]]:
        yield "source_models", "id model_id", ((n, model_id(n, self._models)) for n in range(1, self._models + 1))
        yield "revisions", "id source_model_id revision", ((n, n, f"{n:040x}") for n in range(1, self._models + 1))
        versions = ((n, _digest(f"e{n}"), json.dumps({"torch": f"2.{n}", "onnx": "1.23.2"})) for n in range(1, 13))
        yield "environments", "id sha256 versions", versions
        yield "batches", "id engine started_at finished_at converted reused failed mismatch", self._batch_rows()
        made = ((n, _digest(f"t{n}"), "BertModel", 10, n, self._text(1), self._text(1)) for n in range(1, 301))
        yield "templates", "id key architecture size_bytes hits created_at last_used_at", made
        yield "artifacts", "id sha256 path quarantined size_bytes created_at", self._artifact_rows()
        yield "artifact_files", "id artifact_id path size_bytes sha256", self._file_rows()
        yield "graphs", "id artifact_id role path opset nodes nodes_before_simplify", self._graph_rows()
        yield "graph_tensors", "id graph_id direction position name dtype shape", self._tensor_rows()
        columns = (
            "id key subject latest source_model_id requested_revision revision_id environment_id artifact_id batch_id "
            "status task task_family model_type architecture template simplified options attempts peak_rss_bytes notes "
            "error_kind error_message error_step error_reproduce started_at finished_at"
        )
        yield "conversions", columns, self._conversion_rows()
        yield "step_timings", "id conversion_id position step seconds", self._timing_rows()
        columns = "id conversion_id verdict device provider shapes max_abs_diff tolerance axes_proven checked_at"
        yield "parity_checks", columns, self._check_rows()
        columns = "id parity_check_id position name max_abs_diff tolerance"
        yield "parity_outputs", columns, ((n, n, 0, "logits", 1e-6, 1e-5) for n in self._with_artifact())
        columns = "id parity_check_id position graph provider optimization dtype shape sizes verdict"
        yield "parity_cells", columns, self._cell_rows()

    def _status(self, number: int) -> str:
        step = number * 7919 % 100
        return "failed" if step < 11 else "mismatch" if step < 15 else "converted"

    def _with_artifact(self) -> Iterator[int]:
        """Yield the attempts that have one; artifact, graph and check have the attempt's number."""
        return (number for number in range(1, self._conversions + 1) if self._status(number) != "failed")

    def _text(self, number: int, seconds: int = 0) -> str:
        return f"{self.moment(number) - timedelta(seconds=seconds):%Y-%m-%d %H:%M:%S.%f}"

    def _batch_rows(self) -> Iterator[Row]:
        for number in range(1, self.batches + 1):
            ends = number < self.batches
            first, last = (number - 1) * 500 + 1, min(number * 500, self._conversions)
            totals = (425, 0, 55, 20) if ends else (None,) * 4
            yield number, "local", self._text(first, 60), self._text(last) if ends else None, *totals

    def _artifact_rows(self) -> Iterator[Row]:
        for number in self._with_artifact():
            digest = _digest(f"a{number}")
            kept = self._status(number) == "mismatch"
            yield number, digest, f"/srv/artifacts/{digest}", int(kept), 90_000_000 + number, self._text(number)

    def _file_rows(self) -> Iterator[Row]:
        for at, number in enumerate(self._with_artifact()):
            for place, name in enumerate(("config.json", "ferry.json", "model.onnx")):
                yield at * 3 + place + 1, number, name, 30_000_000 * place + 500, _FILE

    def _graph_rows(self) -> Iterator[Row]:
        for number in self._with_artifact():
            yield number, number, "model", "model.onnx", 20, 230 + number % 500, 800

    def _tensor_rows(self) -> Iterator[Row]:
        shape = json.dumps(["batch_size", "sequence_length"])
        for at, number in enumerate(self._with_artifact()):
            yield at * 3 + 1, number, "input", 0, "input_ids", "int64", shape
            yield at * 3 + 2, number, "input", 1, "attention_mask", "int64", shape
            yield at * 3 + 3, number, "output", 0, "logits", "float32", shape

    def _conversion_rows(self) -> Iterator[Row]:
        options = [json.dumps({"device": "auto", "opset": opset}) for opset in (None, 18)]
        for number in range(1, self._conversions + 1):
            model, status, option = self._model[number], self._status(number), number % 5 // 4
            kind_of_model = _type(model)
            head, task = _HEADS[(model * 31 + len(kind_of_model)) % len(_HEADS)]
            architecture = f"{kind_of_model.title().replace('-', '').replace('_', '')}For{head}"
            error: Row = (None,) * 4
            if status != "converted":
                kind = "mismatch" if status == "mismatch" else _KINDS[number * 31 % len(_KINDS)]
                name = model_id(model, self._models)
                message = (
                    f"{name} cannot be converted: node /encoder/layer.{number % 48}/attention/Add_{number % 977} was "
                    f"asked for {number % 8191} values and found {number % 4093}. Leave the axis fixed, or report this."
                )
                error = (kind, message, _STEPS[number % 6], f"ferry convert {name}")
            # What detection could not read has neither task nor class.
            known = (task, task, kind_of_model, architecture) if number % 50 else (None,) * 4
            yield (
                number,
                _digest(f"k{number}"),
                _digest(f"s{model}-{option}"),
                int(number in self._latest),
                model,
                "main",
                model,
                number % 12 + 1,
                number if status != "failed" else None,
                (number - 1) // 500 + 1 if number <= self.batches * 500 else None,
                status,
                *known,
                None if status == "failed" else ("reused", "traced", "reused", "direct")[number % 4],
                1,
                options[option],
                1,
                900_000_000 + number % 1000 * 1_000_000,
                "[]",
                *error,
                self._text(number, 20),
                self._text(number),
            )

    def _timing_rows(self) -> Iterator[Row]:
        at = 0
        for number in range(1, self._conversions + 1):
            for place, step in enumerate(_STEPS[: 3 if self._status(number) == "failed" else 6]):
                at += 1
                yield at, number, place, step, number % 97 / 10

    def _check_rows(self) -> Iterator[Row]:
        for number in self._with_artifact():
            verdict = "mismatch" if self._status(number) == "mismatch" else "verified"
            text = self._text(number)
            yield number, number, verdict, "cpu", "CPUExecutionProvider", 5, 1.5e-6, 1e-5, '["batch_size"]', text

    def _cell_rows(self) -> Iterator[Row]:
        for at, number in enumerate(self._with_artifact()):
            for place in range(2):
                cell = ("model", "CPUExecutionProvider", "all", "float32", "one row", '{"batch_size": 1}', "verified")
                yield at * 2 + place + 1, number, place, *cell


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


_FILE = _digest("file")


class _SQLite:
    def __init__(self, engine: Engine) -> None:
        assert engine.url.database is not None
        self._connection = sqlite3.connect(engine.url.database, isolation_level=None)
        for words in ("synchronous = OFF", "cache_size = -1000000", "foreign_keys = OFF"):
            self._connection.execute(f"PRAGMA {words}")
        self._connection.execute("BEGIN IMMEDIATE")

    def write(self, table: str, columns: str, rows: Iterator[Row]) -> None:
        names = columns.split()
        marks = ", ".join("?" * len(names))
        self._connection.executemany(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks})", rows)

    def done(self) -> None:
        self._connection.execute("COMMIT")

    def close(self) -> None:
        self._connection.close()


class _Postgres:
    def __init__(self, engine: Engine) -> None:
        address = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
        self._connection = psycopg.connect(address)
        # What refers to what is right by rule; looking each up takes longer than writing it.
        self._connection.execute("SET session_replication_role = replica")
        self._connection.execute("SET timezone = 'UTC'")
        self._tables: list[str] = []

    def write(self, table: str, columns: str, rows: Iterator[Row]) -> None:
        self._tables.append(table)
        names = ", ".join(columns.split())
        with self._connection.cursor() as cursor, cursor.copy(f"COPY {table} ({names}) FROM STDIN".encode()) as copy:
            part: list[Row] = []
            for row in rows:
                part.append(row)
                if len(part) == _ROWS_PER_WRITE:
                    copy.write(_lines(part))
                    part = []
            copy.write(_lines(part))

    def done(self) -> None:
        for table in self._tables:
            counter = f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), coalesce(max(id), 1)) FROM {table}"
            self._connection.execute(counter.encode())
        self._connection.commit()

    def close(self) -> None:
        self._connection.close()


def _lines(rows: Sequence[Row]) -> str:
    # No value of ours has a tab, a line break or a backslash in it.
    return "".join("\t".join("\\N" if value is None else str(value) for value in row) + "\n" for row in rows)
