"""What is put into the catalog comes out again, whoever else puts something in."""

from __future__ import annotations

import base64
import math
import pickle
import re
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import func, insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db import (
    ArtifactRecord,
    BatchTotals,
    CatalogError,
    ConversionRecord,
    ErrorRecord,
    FileRecord,
    GraphRecord,
    OutputParityRecord,
    ParityRecord,
    StepTiming,
    TensorRecord,
    count_conversions,
    find_artifacts,
    find_conversion,
    finish_batch,
    get_batch,
    get_conversion,
    iter_conversions,
    latest_by_key,
    list_batches,
    list_conversions,
    record_conversion,
    record_parity,
    session_scope,
    start_batch,
)
from db import models as tables
from db.vocabulary import FailureKind, ParityVerdict, StepName, TemplateUse
from tests.db.plans import plan_of, statements_of

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def recorded(session: Session, record: ConversionRecord) -> ConversionRecord:
    """Record and read back."""
    found = get_conversion(session, record_conversion(session, record))
    assert found is not None
    return found


def ids(records: list[ConversionRecord]) -> list[str]:
    return [record.model_id for record in records]


# Round trips

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
DIGEST = st.text("0123456789abcdef", min_size=64, max_size=64)
COUNT = st.integers(0, 2**31 - 1)
BYTES = st.integers(0, 2**63 - 1)
NUMBER = st.floats(allow_nan=False)
MOMENT = st.datetimes(
    min_value=datetime(1990, 1, 1),  # noqa: DTZ001 - Hypothesis takes the bounds without a zone
    max_value=datetime(2100, 1, 1),  # noqa: DTZ001 - the same
    timezones=st.integers(-720, 840).map(lambda minutes: timezone(timedelta(minutes=minutes))),
)
JSON = st.recursive(st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT, st.lists, max_leaves=3)


def several(strategy, by=None):
    return st.lists(strategy, max_size=3, unique_by=by).map(tuple)


TENSORS = several(
    st.builds(TensorRecord, name=TEXT, dtype=TEXT, shape=several(st.integers(-1, 2**40) | TEXT)),
)
PARITY = st.builds(
    ParityRecord,
    verdict=st.sampled_from([word.value for word in ParityVerdict]),
    device=TEXT,
    provider=TEXT,
    shapes=COUNT,
    max_abs_diff=st.none() | NUMBER,
    tolerance=st.none() | NUMBER,
    axes_proven=several(TEXT),
    outputs=several(st.builds(OutputParityRecord, name=TEXT, max_abs_diff=NUMBER, tolerance=NUMBER)),
    detail=st.none() | TEXT,
    checked_at=MOMENT,
)
ARTIFACT = st.builds(
    ArtifactRecord,
    sha256=DIGEST,
    path=TEXT,
    quarantined=st.booleans(),
    size_bytes=BYTES,
    created_at=MOMENT,
    files=several(st.builds(FileRecord, path=TEXT, size_bytes=BYTES, sha256=DIGEST), by=lambda file: file.path),
    graphs=several(
        st.builds(
            GraphRecord,
            role=TEXT,
            path=TEXT,
            opset=COUNT,
            nodes=COUNT,
            nodes_before_simplify=COUNT,
            inputs=TENSORS,
            outputs=TENSORS,
        ),
        by=lambda graph: graph.role,
    ),
)
ERROR = st.builds(
    ErrorRecord,
    kind=st.sampled_from([word.value for word in FailureKind]),
    message=TEXT,
    step=st.sampled_from([word.value for word in StepName]),
    reproduce=TEXT,
)
OUTCOME = st.one_of(
    st.tuples(st.sampled_from(["converted", "reused"]), ARTIFACT, st.none()),
    st.tuples(st.just("mismatch"), st.none() | ARTIFACT, st.none() | ERROR),
    st.tuples(st.just("failed"), st.none() | ARTIFACT, ERROR),
)


@st.composite
def conversion_records(draw):
    status, artifact, error = draw(OUTCOME)
    return ConversionRecord(
        model_id=draw(TEXT),
        key=draw(st.none() | DIGEST),
        requested_revision=draw(st.none() | TEXT),
        revision=draw(st.none() | TEXT),
        status=status,
        task=draw(st.none() | TEXT),
        task_family=draw(st.none() | TEXT),
        model_type=draw(st.none() | TEXT),
        architecture=draw(st.none() | TEXT),
        template=draw(st.none() | st.sampled_from([word.value for word in TemplateUse])),
        simplified=draw(st.booleans()),
        options=draw(st.dictionaries(TEXT, JSON, max_size=3)),
        attempts=draw(st.integers(1, 9)),
        peak_rss_bytes=draw(st.none() | BYTES),
        notes=draw(several(TEXT)),
        timings=draw(
            several(
                st.builds(StepTiming, step=st.sampled_from([word.value for word in StepName]), seconds=NUMBER),
                by=lambda timing: timing.step,
            )
        ),
        error=error,
        artifact=artifact,
        parity=draw(several(PARITY)),
        environment=draw(st.dictionaries(TEXT, TEXT, max_size=2)),
        started_at=draw(MOMENT),
        finished_at=draw(MOMENT),
        worker=draw(st.none() | TEXT),
    )


@given(record=conversion_records())
@settings(max_examples=60, deadline=None)
def test_a_record_comes_back_as_it_was(rolled_back, record):
    with rolled_back() as session:
        found = recorded(session, record)
    assert replace(found, id=None) == record


def test_a_whole_record_comes_back_as_it_was(session, make_record):
    found = recorded(session, make_record())
    assert replace(found, id=None) == make_record()


def test_times_come_back_in_utc(session, make_record):
    moment = datetime(2026, 3, 29, 1, 30, 0, 123456, tzinfo=timezone(timedelta(hours=5, minutes=45)))
    found = recorded(session, make_record(started_at=moment, finished_at=moment))
    assert found.started_at == moment
    assert found.started_at.isoformat() == "2026-03-28T19:45:00.123456+00:00"


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(math.nan, id="not-a-number"),
        pytest.param(math.inf, id="infinite"),
        pytest.param(5e-324, id="the-smallest"),
        pytest.param(0.1, id="a-fraction"),
    ],
)
def test_differences_keep_their_value(session, make_record, number):
    output = OutputParityRecord(name="logits", max_abs_diff=number, tolerance=1e-5)
    (check,) = make_record().parity
    found = recorded(session, make_record(parity=(replace(check, max_abs_diff=number, outputs=(output,)),)))
    values = [found.parity[0].max_abs_diff, found.parity[0].outputs[0].max_abs_diff]
    assert [repr(value) for value in values] == [repr(number)] * 2


@pytest.mark.parametrize(
    ("hostile", "stored"),
    [
        pytest.param("a\x00b", "a\ufffdb", id="nul"),
        pytest.param("a\udc80b", "a\ufffdb", id="lone-surrogate"),
        pytest.param("'); DROP TABLE conversions; --", "'); DROP TABLE conversions; --", id="sql"),
        pytest.param("%_\\", "%_\\", id="wildcards"),
        pytest.param("\U0001f600\u202e", "\U0001f600\u202e", id="astral-and-bidi"),
    ],
)
def test_hostile_text_is_recorded(session, make_record, hostile, stored):
    error = ErrorRecord(kind="crashed", message=hostile, step="export", reproduce=hostile)
    record = make_record(
        failure="crashed", model_id=hostile, revision=hostile, notes=(hostile,), options={hostile: hostile}, error=error
    )
    found = recorded(session, record)
    assert (found.model_id, found.revision, found.notes, found.options) == (stored, stored, (stored,), {stored: stored})
    assert found.error == ErrorRecord(kind="crashed", message=stored, step="export", reproduce=stored)
    assert recorded(session, record).model_id == stored
    assert find_conversion(session, hostile) is not None
    assert count_conversions(session, text=hostile) == 1


# What attempts share


def count(session: Session, table: type[tables.Base]) -> int:
    return session.execute(select(func.count()).select_from(table)).scalar_one()


def test_attempts_share_model_revision_environment_and_artifact(session, make_record):
    for _ in range(2):
        record_conversion(session, make_record())
    shared = [tables.SourceModel, tables.Revision, tables.Environment, tables.Artifact, tables.Graph]
    assert [count(session, table) for table in shared] == [1] * 5
    assert (count(session, tables.ArtifactFile), count(session, tables.Conversion)) == (2, 2)


def test_an_artifact_that_is_there_moves_but_keeps_its_files(session, make_record):
    record = make_record()
    first = record_conversion(session, record)
    moved = replace(record.artifact, path="/quarantine/x", quarantined=True, files=(), graphs=())
    record_conversion(session, replace(record, artifact=moved))
    found = get_conversion(session, first)
    assert found is not None
    assert found.artifact == replace(record.artifact, path="/quarantine/x", quarantined=True)


def test_one_more_check_stands_beside_the_first(session, make_record):
    record = make_record()
    number = record_conversion(session, record)
    again = replace(record.parity[0], device="cuda", checked_at=NOW + timedelta(days=1))
    record_parity(session, number, again)
    found = get_conversion(session, number)
    assert found is not None
    assert found.parity == (record.parity[0], again)


@pytest.mark.parametrize(
    "statement",
    [
        pytest.param("UPDATE conversions SET status = 'done'", id="unknown-status"),
        pytest.param("UPDATE conversions SET status = 'failed'", id="failed-without-error"),
        pytest.param("UPDATE conversions SET artifact_id = NULL", id="converted-to-nothing"),
        pytest.param("UPDATE conversions SET error_kind = 'odd'", id="unknown-error"),
        pytest.param("UPDATE conversions SET status = 'mismatch', error_kind = 'mismatch'", id="half-an-error"),
        pytest.param("UPDATE conversions SET key = 'abc'", id="short-key"),
        pytest.param("UPDATE conversions SET attempts = 0", id="no-attempt"),
        pytest.param("UPDATE conversions SET batch_id = 4711", id="unknown-batch"),
        pytest.param("DELETE FROM artifacts", id="artifact-in-use"),
        pytest.param("UPDATE graph_tensors SET direction = 'up'", id="unknown-direction"),
        pytest.param("UPDATE parity_checks SET verdict = 'fine'", id="unknown-verdict"),
        pytest.param("UPDATE step_timings SET step = 'dream'", id="unknown-step"),
    ],
)
def test_the_database_refuses_what_cannot_be(session, make_record, statement):
    record_conversion(session, make_record())
    with pytest.raises(IntegrityError):
        session.execute(text(statement))


# Looking up


def test_latest_by_key(session, make_record):
    record_conversion(session, make_record(1, failure="network"))
    # Recorded last is newest, though its clock was behind.
    newest = record_conversion(session, make_record(1, finished_at=NOW - timedelta(days=1)))
    record_conversion(session, make_record(2))
    record_conversion(session, make_record(3, failure="not_found", key=None))
    found = latest_by_key(session, ["0" * 64, f"{1:064x}", f"{1:064x}", f"{2:064x}"])
    assert {key: record.model_id for key, record in found.items()} == {
        f"{1:064x}": "org/model-1",
        f"{2:064x}": "org/model-2",
    }
    assert found[f"{1:064x}"].id == newest
    assert latest_by_key(session, []) == {}


def test_lookups_take_as_many_statements_for_a_thousand_as_for_one(session, make_record):
    first = record_conversion(session, make_record(0))
    columns = select(tables.Conversion.__table__).where(tables.Conversion.id == first)
    row = dict(session.execute(columns).mappings().one())
    del row["id"]
    keys = [f"{number:064x}" for number in range(1000)]
    session.execute(insert(tables.Conversion), [row | {"key": key, "subject": key} for key in keys[1:]])
    assert len(latest_by_key(session, keys)) == 1000
    one = len(statements_of(session, lambda session: latest_by_key(session, keys[:1])))
    assert len(statements_of(session, lambda session: latest_by_key(session, keys))) <= one <= 11
    assert len(statements_of(session, lambda session: list_conversions(session, limit=1000))) <= one
    assert [record.key for record in iter_conversions(session)] == keys


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        pytest.param({}, ["org/failed", "org/other", "org/bert"], id="the-last-finished-first"),
        pytest.param({"limit": 1}, ["org/failed"], id="a-page"),
        pytest.param({"limit": 1, "offset": 2}, ["org/bert"], id="a-later-page"),
        pytest.param({"offset": 3}, [], id="past-the-end"),
        pytest.param({"status": "failed"}, ["org/failed"], id="by-status"),
        pytest.param({"status": "reused"}, [], id="by-a-status-that-none-has"),
        pytest.param({"task": "fill-mask"}, ["org/other"], id="by-task"),
        pytest.param({"status": "failed", "task": "fill-mask"}, [], id="by-both"),
        pytest.param({"text": "ORG/BE"}, ["org/bert"], id="text-in-the-model-id"),
        pytest.param({"text": "fill-"}, ["org/other"], id="text-in-the-task"),
        pytest.param({"text": "forMasked"}, ["org/other"], id="text-in-the-class"),
        pytest.param({"text": "gpt"}, ["org/failed"], id="text-in-the-model-type"),
        pytest.param({"text": "it broke"}, ["org/failed"], id="text-in-the-error"),
        pytest.param({"text": "org_bert"}, [], id="an-underscore-is-no-wildcard"),
        pytest.param({"text": "%"}, [], id="a-percent-sign-is-no-wildcard"),
        pytest.param(
            {"latest_only": False}, ["org/failed", "org/other", "org/bert", "org/bert"], id="with-what-was-replaced"
        ),
        pytest.param({"latest_only": False, "status": "failed"}, ["org/failed", "org/bert"], id="replaced-failures"),
    ],
)
def test_list_conversions(session, make_record, filters, expected):
    record_conversion(session, make_record(1, failure="timeout", model_id="org/bert"))
    record_conversion(session, make_record(2, model_id="org/bert"))
    record_conversion(session, make_record(3, model_id="org/other", task="fill-mask", architecture="BertForMaskedLM"))
    record_conversion(session, make_record(4, failure="timeout", model_id="org/failed", model_type="gpt2"))
    if "text" in filters and filters["text"] == "it broke":
        assert count_conversions(session, latest_only=False, **filters) == 2
    assert ids(list_conversions(session, **filters)) == expected
    whole = {name: value for name, value in filters.items() if name not in ("limit", "offset")}
    assert count_conversions(session, **whole) == len(list_conversions(session, **whole))


@pytest.mark.parametrize(
    ("changes", "replaced"),
    [
        pytest.param({}, True, id="the-same-request"),
        pytest.param({"key": "f" * 64, "environment": {"torch": "3"}}, True, id="under-other-versions"),
        pytest.param({"revision": "e" * 40}, True, id="after-the-branch-moved"),
        pytest.param({"requested_revision": "v2"}, False, id="another-branch"),
        pytest.param({"options": {"task": "fill-mask"}}, False, id="other-options"),
        pytest.param({"model_id": "org/x"}, False, id="another-model"),
    ],
)
def test_an_attempt_replaces_the_last_of_its_request(session, make_record, changes, replaced):
    record_conversion(session, make_record(1))
    record_conversion(session, make_record(1, **changes))
    assert count_conversions(session) == (1 if replaced else 2)
    assert count_conversions(session, latest_only=False) == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("org/bert", "newest", id="newest-of-a-model"),
        pytest.param("org/bert@v1", "first", id="a-model-at-a-branch"),
        pytest.param(f"org/bert@{1:040x}", "first", id="a-model-at-a-commit"),
        pytest.param("org/bert@v9", None, id="a-model-at-no-revision"),
        pytest.param("ab12" * 16, "first", id="an-artifact"),
        pytest.param("ab12ab1", "first", id="an-artifact-by-a-prefix"),
        pytest.param("AB12AB12", "first", id="in-upper-case"),
        pytest.param("ab12ab", None, id="too-short-a-prefix"),
        pytest.param("org/ber", None, id="a-part-of-a-name"),
        pytest.param("9" * 30, None, id="a-huge-number"),
        pytest.param("0", None, id="number-zero"),
        pytest.param("", None, id="nothing"),
        pytest.param("12345678", "digits", id="a-model-that-looks-like-a-number"),
    ],
)
def test_find_conversion(session, make_record, name, expected):
    artifact = replace(make_record(1).artifact, sha256="ab12" * 16)
    numbers = {
        record_conversion(
            session, make_record(1, model_id="org/bert", requested_revision="v1", artifact=artifact)
        ): "first",
        record_conversion(session, make_record(2, model_id="org/bert")): "newest",
        record_conversion(session, make_record(3, model_id="12345678")): "digits",
        None: None,
    }
    found = find_conversion(session, name)
    assert numbers[None if found is None else found.id] == expected


def test_artifacts_of_a_model_are_found_the_newest_first_and_those_in_quarantine_last(session, make_record):
    for number in (1, 2, 3):
        record = make_record(number, model_id="org/bert", requested_revision=f"v{number}")
        record_conversion(session, replace(record, artifact=replace(record.artifact, quarantined=number == 3)))
    record_conversion(session, make_record(4, model_id="org/bert", failure="crashed"))
    record_conversion(session, make_record(1, model_id="org/bert"))

    def found(name: str) -> list[int]:
        return [int(artifact.sha256, 16) for artifact in find_artifacts(session, name)]

    assert found("org/bert") == [1, 2, 3]
    assert found("org/bert@v2") == [2]
    assert found(f"{2:064x}") == [2]
    assert found("org/other") == found("org/bert@v4") == []


def test_find_conversion_by_number(session, make_record):
    number = record_conversion(session, make_record(1))
    record_conversion(session, make_record(2))
    found = find_conversion(session, str(number))
    assert found is not None
    assert found.model_id == "org/model-1"


@pytest.mark.parametrize(
    ("ask", "index"),
    [
        pytest.param(lambda session: latest_by_key(session, ["a" * 64]), "key_id", id="by-key"),
        pytest.param(list_conversions, "latest_finished_at", id="a-page"),
        pytest.param(lambda session: list_conversions(session, latest_only=False), "finished_at", id="a-page-of-all"),
        pytest.param(
            lambda session: list_conversions(session, status="failed"),
            "(latest_)?status_finished_at",
            id="a-page-by-status",
        ),
        pytest.param(
            lambda session: list_conversions(session, task="x"), "(latest_)?task_finished_at", id="a-page-by-task"
        ),
        pytest.param(count_conversions, r"latest_\w+", id="a-total"),
        pytest.param(
            lambda session: count_conversions(session, status="failed"),
            r"(latest_)?status_\w+",
            id="a-total-by-status",
        ),
    ],
)
def test_listings_walk_an_index(engine, ask, index):
    """Sorting, or reading every row, would take a second where there are a million."""
    with session_scope(engine, read_only=True) as session:
        connection = session.connection()
        statement = statements_of(session, ask)[0]
        if engine.dialect.name == "postgresql":
            # Empty tables are read whole whatever indexes there are; this asks what could be done without.
            for way in ("seqscan", "sort", "bitmapscan"):
                connection.exec_driver_sql(f"SET LOCAL enable_{way} = off")
        steps = plan_of(connection, statement)
    assert any(re.fullmatch(f"index ix_conversions_{index}", step) for step in steps), steps
    assert "sort" not in steps
    assert "scan conversions" not in steps


# Batches


def test_a_batch_from_start_to_finish(session, make_record):
    number = start_batch(session, engine="prefect", started_at=NOW)
    begun = get_batch(session, number)
    assert begun is not None
    assert (begun.engine, begun.started_at, begun.finished_at, begun.totals) == ("prefect", NOW, None, None)
    conversion = get_conversion(session, record_conversion(session, make_record(), batch_id=number))
    assert conversion is not None
    assert conversion.batch_id == number
    totals = BatchTotals(converted=1, reused=2, failed=3, mismatch=4)
    finish_batch(session, number, totals, finished_at=NOW + timedelta(hours=1))
    ended = get_batch(session, number)
    assert ended is not None
    assert (ended.totals, ended.finished_at) == (totals, NOW + timedelta(hours=1))
    later = start_batch(session, engine="local", started_at=NOW + timedelta(hours=2))
    assert [batch.id for batch in list_batches(session, limit=2)] == [later, number]
    assert [batch.id for batch in list_batches(session, limit=1, offset=1)] == [number]


def test_a_batch_that_is_not_there(session):
    assert get_batch(session, 4711) is None
    with pytest.raises(LookupError, match="no batch has number 4711"):
        finish_batch(session, 4711, BatchTotals(), finished_at=NOW)


def test_a_batch_of_an_unknown_engine(session):
    with pytest.raises(ValueError, match="airflow"):
        start_batch(session, engine="airflow", started_at=NOW)


# Several processes


def child(code: str, url: str, record: ConversionRecord) -> subprocess.Popen[str]:
    """Start Python on ``code``, which finds ``engine`` and ``record`` and prints when it is ready."""
    start = (
        "import base64, pickle, sys, time\nfrom db import *\n"
        "engine = make_engine(sys.argv[1])\nrecord = pickle.loads(base64.b64decode(sys.argv[2]))\n"
    )
    packed = base64.b64encode(pickle.dumps(record)).decode()
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", start + code, url, packed],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_processes_record_the_same_artifact_at_once(engine, make_record):
    code = (
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for _ in range(15):\n"
        "    with session_scope(engine) as session:\n"
        "        latest_by_key(session, [record.key])\n"
        "        record_conversion(session, record)\n"
        "engine.dispose(); print('done', flush=True)\n"
    )
    children = [child(code, str(engine.url), make_record()) for _ in range(2)]
    for process in children:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in children:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60) for process in children] == [("done\n", "")] * 2
    with session_scope(engine, read_only=True) as session:
        assert count_conversions(session, latest_only=False) == 30
        assert count_conversions(session) == 1
        assert count(session, tables.Artifact) == count(session, tables.SourceModel) == 1


def test_a_worker_killed_in_the_middle_leaves_nothing_half_registered(engine, make_record):
    code = (
        "with session_scope(engine) as session:\n"
        "    record_conversion(session, record)\n"
        "    print('recorded', flush=True); time.sleep(60)\n"
    )
    with child(code, str(engine.url), make_record()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "recorded\n"
        process.send_signal(signal.SIGKILL)
    with session_scope(engine, read_only=True) as session:
        assert [
            table.name for table in tables.Base.metadata.sorted_tables if session.execute(select(table)).all()
        ] == []
    with session_scope(engine) as session:
        record_conversion(session, make_record())
    with session_scope(engine, read_only=True) as session:
        assert count_conversions(session) == 1


def test_a_refused_record_leaves_nothing(engine, make_record):
    with pytest.raises(CatalogError, match="refused what was to be written"), session_scope(engine) as session:
        record_conversion(session, make_record(), batch_id=4711)
    with session_scope(engine, read_only=True) as session:
        assert count(session, tables.Artifact) == count(session, tables.SourceModel) == 0
