"""A catalog with something for each part of each page: ends of every kind, two runs, and text that means harm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import Engine

from db import (
    BatchTotals,
    ConversionRecord,
    ErrorRecord,
    FileRecord,
    OutputParityRecord,
    ParityCellRecord,
    StepTiming,
    TensorRecord,
    finish_batch,
    note_found_done,
    record_conversion,
    session_scope,
    start_batch,
)

__all__ = ["HARM", "LONG", "Contents", "fill"]

HARM = '<script>window.harm=1</script><img src="x" onerror="window.harm=1">"\'>{{7*7}}'
"""What a browser must show and not run."""

LONG = "l" + "o" * 3000 + "ng"
"""A word that fits nowhere."""

_MIRRORED = "\u202egnihtemos\u2066 \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \x1b[2J\x07\x00"

_TASKS = (
    ("text-classification", "bert", "BertForSequenceClassification"),
    ("feature-extraction", "roberta", "RobertaModel"),
    ("text-generation", "llama", "LlamaForCausalLM"),
    ("image-classification", "vit", "ViTForImageClassification"),
    ("automatic-speech-recognition", "whisper", "WhisperForConditionalGeneration"),
)
_STEPS = (("fetch", 0.4), ("detect", 0.9), ("export", 7.5), ("simplify", 0.6), ("parity", 2.4), ("register", 0.1))

_OPERATORS = {
    "operators": {
        "MatMul": 72,
        "Add": 60,
        "Reshape": 48,
        "LayerNormalization": 25,
        "com.microsoft::Gelu": 12,
        "Cast": 13,
    },
    "operators_before_simplify": {
        "MatMul": 72,
        "Add": 85,
        "Reshape": 96,
        "Shape": 60,
        "LayerNormalization": 25,
        "Cast": 2,
    },
}

MakeRecord = Callable[..., ConversionRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The numbers of what a test looks up."""

    whole: int
    """A conversion with everything, whose files are there."""

    older: int
    """An earlier attempt at the same model."""

    failed: int
    """One that failed."""

    quarantined: int
    """One in quarantine."""

    hostile: int
    """One whose every text means harm."""

    ended_run: int
    """A run that has ended."""

    running: int
    """A run that has not."""


def fill(engine: Engine, make_record: MakeRecord, folder: Path, *, now: datetime | None = None) -> Contents:
    """Record all of it; files are written to ``folder``."""
    now = (now or datetime.now(UTC)).replace(microsecond=0)
    begin = now - timedelta(hours=5)
    with session_scope(engine) as session:
        ended = start_batch(session, engine="prefect", started_at=begin)
        for number in range(100, 172):
            session.flush()
            record_conversion(session, _ordinary(make_record, number, begin), batch_id=ended)
        found = [
            record_conversion(session, _ordinary(make_record, number, begin - timedelta(hours=30)))
            for number in (180, 181, 182, 183, 184, 185, 186, 188)
        ]
        older = record_conversion(session, _whole(make_record, folder, begin - timedelta(days=3)))
        failed = record_conversion(session, _failed(make_record, begin), batch_id=ended)
        quarantined = record_conversion(session, _quarantined(make_record, folder, begin), batch_id=ended)
        hostile = record_conversion(session, _hostile(make_record, begin), batch_id=ended)
        whole = record_conversion(session, _whole(make_record, folder, begin + timedelta(minutes=20)), batch_id=ended)
        reused = [(number, "reused") for number in (*found, older)]
        note_found_done(session, ended, reused, found_at=begin + timedelta(seconds=1))
        totals = BatchTotals(converted=62, reused=9, failed=11, mismatch=2)
        finish_batch(session, ended, totals, finished_at=begin + timedelta(minutes=30))
        running = start_batch(session, engine="local", started_at=now - timedelta(minutes=2))
        record_conversion(session, _ordinary(make_record, 190, now - timedelta(minutes=1)), batch_id=running)
    return Contents(
        whole=whole,
        older=older,
        failed=failed,
        quarantined=quarantined,
        hostile=hostile,
        ended_run=ended,
        running=running,
    )


def _ordinary(make_record: MakeRecord, number: int, begin: datetime) -> ConversionRecord:
    task, model_type, architecture = _TASKS[number % len(_TASKS)]
    kinds = {0: "timeout", 7: "export_failed", 9: "network"}
    started = begin + timedelta(seconds=11 * (number % 40))
    timings = tuple(StepTiming(step=step, seconds=seconds * (1 + number % 4)) for step, seconds in _STEPS)
    return make_record(
        number,
        failure=kinds.get(number % 17),
        task=task,
        model_type=model_type,
        architecture=architecture,
        timings=timings,
        started_at=started,
        finished_at=started + timedelta(seconds=sum(timing.seconds for timing in timings)),
    )


def _whole(make_record: MakeRecord, folder: Path, started: datetime) -> ConversionRecord:
    base = make_record(1)
    assert base.artifact is not None
    (folder / "model.onnx").write_bytes(b"graph")
    (graph,) = base.artifact.graphs
    past = tuple(
        TensorRecord(
            name=f"past_key_values.{layer}.{part}",
            dtype="float32",
            shape=("batch_size", 4, "past_sequence_length", 16),
        )
        for layer in range(3)
        for part in ("key", "value")
    )
    outputs = (
        *graph.outputs,
        TensorRecord(name="hidden", dtype="float32", shape=("batch_size", "past_sequence_length + sequence_length")),
    )
    graph = replace(graph, inputs=(*graph.inputs, *past), outputs=outputs, **_OPERATORS)
    (check,) = base.parity
    (cell,) = check.cells
    on_gpu = replace(
        check,
        device="cuda",
        provider="CUDAExecutionProvider",
        checked_at=started + timedelta(minutes=2),
        outputs=(OutputParityRecord(name="logits", max_abs_diff=3e-4, tolerance=1e-5),),
        verdict="mismatch",
        detail="logits differ by 3e-04 where 1e-05 is allowed",
        cells=tuple(
            ParityCellRecord(
                graph="model",
                provider="CUDAExecutionProvider",
                optimization=level,
                dtype="float32",
                shape=shape,
                sizes={"batch_size": 2, "sequence_length": 7},
                verdict="mismatch" if level == "all" else "verified",
                output="logits",
                max_abs_diff=3e-4 if level == "all" else 2e-6,
                tolerance=1e-5,
            )
            for level in ("disable", "basic", "extended", "all")
            for shape in ("one row", "odd sizes")
        ),
    )
    timings = tuple(StepTiming(step=step, seconds=seconds) for step, seconds in _STEPS)
    return replace(
        base,
        model_id="org/everything",
        artifact=replace(base.artifact, path=str(folder), graphs=(graph,)),
        parity=(replace(check, cells=(cell, replace(cell, shape="odd sizes"))), on_gpu),
        timings=timings,
        started_at=started,
        finished_at=started + timedelta(seconds=12),
    )


def _failed(make_record: MakeRecord, begin: datetime) -> ConversionRecord:
    error = ErrorRecord(
        kind="out_of_memory",
        message="org/too-big was asked for; the export took more than 12.0 GiB. Give it more with FERRY_MEMORY_LIMIT.",
        step="export",
        reproduce="ferry convert org/too-big --memory-limit 12GiB",
    )
    return make_record(
        2,
        failure="out_of_memory",
        model_id="org/too-big",
        error=error,
        started_at=begin,
        finished_at=begin + timedelta(minutes=9),
    )


def _quarantined(make_record: MakeRecord, folder: Path, begin: datetime) -> ConversionRecord:
    base = make_record(3)
    assert base.artifact is not None
    error = ErrorRecord(kind="mismatch", message="logits differ", step="parity", reproduce="ferry convert org/odd")
    kept = replace(base.artifact, quarantined=True, path=str(folder))
    (check,) = base.parity
    wrong = replace(check, verdict="mismatch", max_abs_diff=float("nan"), detail="logits are not numbers")
    return replace(
        base, model_id="org/odd", status="mismatch", error=error, artifact=kept, parity=(wrong,), **_at(begin)
    )


def _hostile(make_record: MakeRecord, begin: datetime) -> ConversionRecord:
    base = make_record(4)
    assert base.artifact is not None
    text = f"{HARM} {_MIRRORED} {LONG}"
    (graph,) = base.artifact.graphs
    (check,) = base.parity
    (cell,) = check.cells
    tensors = tuple(TensorRecord(name=f"{n}{text}", dtype=text, shape=(text, 7, LONG)) for n in range(3))
    graph = replace(graph, role=text, path=text, inputs=tensors, outputs=tensors, operators={text: 3, LONG: 2})
    files = (FileRecord(path=f"../{text}", size_bytes=1, sha256="c" * 64),)
    error = ErrorRecord(kind="mismatch", message=text, step="parity", reproduce=text)
    return replace(
        base,
        model_id=text,
        status="mismatch",
        error=error,
        requested_revision=text,
        revision=text,
        task=text,
        task_family=text,
        model_type=text,
        architecture=text,
        options={text: text},
        notes=(text, LONG),
        environment={text: text},
        artifact=replace(base.artifact, quarantined=True, path=f"/{text}", files=files, graphs=(graph,)),
        parity=(
            replace(
                check,
                verdict="mismatch",
                device=text,
                provider=text,
                detail=text,
                axes_proven=(text,),
                outputs=(OutputParityRecord(name=text, max_abs_diff=float("inf"), tolerance=0.0),),
                cells=(replace(cell, graph=text, provider=text, shape=text, detail=text, output=text),),
            ),
        ),
        **_at(begin),
    )


def _at(begin: datetime) -> dict[str, datetime]:
    return {"started_at": begin, "finished_at": begin + timedelta(seconds=9)}
