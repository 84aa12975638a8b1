"""The dashboard: every page answers, text from models is text, and nothing is read that the catalog does not name."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from fastapi.testclient import TestClient

from db import (
    BatchTotals,
    ErrorRecord,
    make_engine,
    note_found_done,
    record_conversion,
    session_scope,
    start_batch,
)
from db.dashboard import create_app
from db.dashboard.snippets import snippets

HOSTILE = "<script>alert(1)</script>\u202eevil\x1b[2J" + "y" * 3000


@pytest.fixture
def client(engine, make_record, tmp_path):
    first = make_record(1)
    assert first.artifact is not None
    (tmp_path / "model.onnx").write_bytes(b"graph")
    with session_scope(engine) as session:
        batch = start_batch(session, engine="local", started_at=first.started_at)
        served = replace(first, artifact=replace(first.artifact, path=str(tmp_path)))
        record_conversion(session, served, batch_id=batch)
        record_conversion(session, make_record(2, failure="timeout", model_id=HOSTILE), batch_id=batch)
        third = make_record(3)
        error = ErrorRecord(kind="mismatch", message=HOSTILE, step="parity", reproduce=HOSTILE)
        kept = replace(third.artifact, quarantined=True, path=str(tmp_path))
        record_conversion(session, replace(third, status="mismatch", error=error, artifact=kept))
    return TestClient(create_app(engine), base_url="http://127.0.0.1")


@pytest.mark.parametrize(
    "path",
    ["/", "/?period=all", "/models", "/models?q=evil", "/models/1", "/models/2", "/models/3", "/runs", "/runs/1",
     "/compare", "/compare?a=1&b=3", "/api/v1/overview", "/api/v1/models", "/api/v1/models/1", "/api/v1/runs/1",
     "/openapi.json", "/metrics", "/healthz"],
)  # fmt: skip
def test_a_page_answers_and_shows_text_as_text(client, path):
    answer = client.get(path)
    assert answer.status_code == 200
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    if answer.headers["content-type"].startswith("text/html"):
        assert "<script>alert" not in answer.text
        assert "\u202e" not in answer.text
        assert "\x1b" not in answer.text


@pytest.mark.parametrize(
    ("number", "path", "code"),
    [(1, "model.onnx", 200), (1, "../catalog.db", 404), (1, "config.json", 404), (3, "model.onnx", 409),
     (3, "model.onnx?quarantined=true", 200)],
)  # fmt: skip
def test_only_files_that_the_catalog_names_are_given(client, number, path, code):
    assert client.get(f"/artifacts/{number:064x}/{path}").status_code == code


def test_another_name_for_this_machine_is_refused(client):
    assert client.get("/", headers={"host": "evil.example"}).status_code == 421


def test_a_run_that_goes_on_counts_what_it_found_done(engine, make_record):
    record = make_record(1)
    with session_scope(engine) as session:
        start = datetime.now(UTC)
        done = [record_conversion(session, make_record(number)) for number in range(2, 6)]
        found = BatchTotals(reused=3, failed=1)
        batch = start_batch(session, engine="local", started_at=start, models=20, found=found)
        words = ("reused", "reused", "reused", "failed")
        note_found_done(session, batch, zip(done, words, strict=True), found_at=start)
        record_conversion(session, record, batch_id=batch)
    client = TestClient(create_app(engine), base_url="http://127.0.0.1")
    (run,) = client.get("/api/v1/runs").json()["runs"]
    assert (run["models"], run["totals"]) == (20, {"converted": 1, "reused": 3, "mismatch": 0, "failed": 1})
    assert "for 20 models" in client.get("/runs/1").text
    assert "1 failed so far, of 20" in client.get("/").text


def test_an_absent_catalog_says_what_to_type_and_stays_absent(tmp_path):
    engine = make_engine(f"sqlite:///{tmp_path}/none/catalog.db")
    answer = TestClient(create_app(engine), base_url="http://127.0.0.1").get("/")
    assert answer.status_code == 503
    assert "ferry batch" in answer.text
    assert not (tmp_path / "none").exists()


def test_what_lies_in_a_store_elsewhere_is_loaded_by_its_name(make_record):
    record = make_record(1)
    found = dict(snippets(replace(record, artifact=replace(record.artifact, path="s3://bucket/artifact"))))
    assert list(found) == ["onnx-ferry"]
    assert '"org/model-1"' in found["onnx-ferry"]


def test_cpp_has_no_program_for_what_it_has_no_type_for(make_record):
    record = make_record(1)
    (graph,) = record.artifact.graphs
    assert "std::int64_t" in dict(snippets(record))["C++"]
    words = replace(graph, inputs=(replace(graph.inputs[0], dtype="string"),))
    assert "C++" not in dict(snippets(replace(record, artifact=replace(record.artifact, graphs=(words,)))))


@pytest.mark.parametrize("changes", [{"artifact": None}, {"status": "mismatch"}], ids=["failed", "quarantined"])
def test_what_is_not_served_is_not_loaded(make_record, changes):
    record = make_record(1, failure="mismatch", **changes)
    kept = replace(make_record(2).artifact, quarantined=True)
    assert snippets(replace(record, artifact=kept if "status" in changes else None)) == []
