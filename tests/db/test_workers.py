"""What runs now and at which step, and what each worker made: in the catalog, on the pages and in the API."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from alembic import command
from fastapi.testclient import TestClient
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from db import (
    CatalogError,
    ConversionRecord,
    LeaseRecord,
    list_running,
    note_found_done,
    note_step,
    record_conversion,
    release_lease,
    session_scope,
    start_batch,
    take_lease,
)
from db.dashboard import create_app
from db.listing import ConversionFilter, count_up_to, list_page
from db.migrate import alembic_config, upgrade
from db.overview import OverviewFilter, Period, count_by, known_words, step_figures, totals_over_time
from tests.db.conftest import START

MakeRecord = Callable[..., ConversionRecord]

HARM = "<b>org</b>/model"


def working(number: int = 1, **changes: object) -> LeaseRecord:
    values: dict[str, object] = {
        "key": f"{number:064x}",
        "owner": f"owner {number}",
        "host": "machine-1",
        "process_id": 7,
        "process": "boot 7",
        "model_id": f"org/model-{number}",
        "batch_id": 3,
    }
    return LeaseRecord(**(values | changes))  # type: ignore[arg-type]


# In work


def test_a_model_in_work_says_where_it_is(session):
    assert take_lease(session, working(), seconds=60) is not None
    (running,) = list_running(session)
    assert (running.model_id, running.worker, running.batch_id) == ("org/model-1", "machine-1", 3)
    assert running.step == "fetch", "every model begins there, without a statement of its own"
    assert note_step(session, working(), "export")
    (running,) = list_running(session)
    assert running.step == "export"
    assert 0 <= running.step_seconds <= running.seconds < 60
    assert note_step(session, working(), None)
    assert [running.step for running in list_running(session)] == [None]
    release_lease(session, working())
    assert list_running(session) == []


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        pytest.param({}, -1.0, id="its-worker-was-not-heard-of"),
        pytest.param({"model_id": None, "batch_id": None}, 60.0, id="on-something-else"),
    ],
)
def test_what_is_not_in_work(session, changes, seconds):
    take_lease(session, working(**changes), seconds=seconds)
    assert list_running(session) == []


def test_who_has_lost_a_lease_says_nothing_of_it(session):
    take_lease(session, working(), seconds=-1)
    other = working(owner="another", host="machine-2")
    assert take_lease(session, other, seconds=60) is other
    assert not note_step(session, working(), "register")
    assert [(running.worker, running.step) for running in list_running(session)] == [("machine-2", "fetch")]


def test_models_in_work_of_one_worker_and_of_one_batch(session):
    for number, changes in enumerate(({}, {"host": "machine-2"}, {"batch_id": None}), 1):
        take_lease(session, working(number, **changes), seconds=60)
    assert {running.model_id for running in list_running(session, worker="machine-2")} == {"org/model-2"}
    assert {running.model_id for running in list_running(session, batch_id=3)} == {"org/model-1", "org/model-2"}
    assert len(list_running(session, limit=2)) == 2


@pytest.mark.parametrize("step", ["nothing", "", "FETCH"])
def test_a_step_is_one_of_those_that_there_are(engine, step):
    def note() -> None:
        with session_scope(engine) as session:
            take_lease(session, working(), seconds=60)
            note_step(session, working(), step)

    with pytest.raises(CatalogError, match="ck_leases_step_known"):
        note()


# Made by


def made(session: Session, make_record: MakeRecord) -> list[int]:
    """Record what two machines made, and something of which nobody wrote down who had."""
    return [
        record_conversion(session, make_record(1, worker="machine-1")),
        record_conversion(session, make_record(2, worker="machine-2", failure="timeout")),
        record_conversion(session, make_record(3, worker="machine-2")),
        record_conversion(session, make_record(4, worker="machine-2", task="fill-mask", model_type="roberta")),
        record_conversion(session, make_record(5)),
    ]


def overview(**given: str) -> OverviewFilter:
    return OverviewFilter(period=Period.ALL, now=START + timedelta(hours=1), **given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param({}, {"converted": 4, "failed": 1}, id="all"),
        pytest.param({"worker": "machine-1"}, {"converted": 1}, id="one"),
        pytest.param({"worker": "machine-2"}, {"converted": 2, "failed": 1}, id="another"),
        pytest.param({"worker": "machine-2", "task": "fill-mask"}, {"converted": 1}, id="with-a-task"),
        pytest.param({"worker": "machine-2", "model_type": "bert"}, {"converted": 1, "failed": 1}, id="with-a-type"),
        pytest.param({"worker": "machine-1", "task": "fill-mask"}, {}, id="with-a-task-of-another"),
        pytest.param({"worker": "nobody"}, {}, id="none"),
    ],
)
def test_attempts_of_a_worker_are_counted(session, make_record, given, expected):
    made(session, make_record)
    wanted = overview(**given)
    assert count_by(session, wanted, "status") == expected
    points = totals_over_time(session, wanted)
    assert sum(point.totals.converted for point in points) == expected.get("converted", 0)
    assert sum(figures.sampled for figures in step_figures(session, wanted)) == 2 * sum(expected.values())


def test_workers_are_known_by_name_and_counted(session, make_record):
    made(session, make_record)
    assert known_words(session, "worker") == ["machine-1", "machine-2"]
    assert count_by(session, overview(), "worker") == {"machine-2": 3, "machine-1": 1}


def test_nobody_worked_at_what_was_found_done(session, make_record):
    numbers = made(session, make_record)
    batch = start_batch(session, engine="local", started_at=START)
    note_found_done(session, batch, [(number, "reused") for number in numbers], found_at=START)
    assert count_by(session, overview(), "status")["reused"] == 5
    assert count_by(session, overview(task="fill-mask", model_type="roberta"), "status") == {
        "converted": 1,
        "reused": 1,
    }
    for worker in ("machine-1", "machine-2"):
        assert "reused" not in count_by(session, overview(worker=worker), "status")


@pytest.mark.parametrize("every", [False, True])
def test_a_listing_of_one_worker(session, make_record, every):
    made(session, make_record)
    record_conversion(session, make_record(3, worker="machine-1"))
    wanted = ConversionFilter(worker="machine-2", every=every)
    expected = ["org/model-4", *(["org/model-3"] if every else []), "org/model-2"]
    rows = list_page(session, wanted).rows
    assert [row.model_id for row in rows] == expected
    assert {row.worker for row in rows} == {"machine-2"}
    assert count_up_to(session, wanted, most=9).number == len(expected)
    assert [row.model_id for row in list_page(session, ConversionFilter(worker="machine-2", text="del-4")).rows] == [
        "org/model-4"
    ]


# The schema before


def test_going_back_adds_up_what_was_counted_apart(engine: Engine, make_record: MakeRecord) -> None:
    def counted() -> tuple[int, int]:
        with engine.connect() as connection:
            one = connection.execute(text("SELECT sum(conversions) FROM conversion_totals")).scalar_one()
            return int(one), int(connection.execute(text("SELECT sum(conversions) FROM grouped_totals")).scalar_one())

    with session_scope(engine) as session:
        made(session, make_record)
    assert counted() == (10, 30 + 8)
    with engine.begin() as connection:
        command.downgrade(alembic_config(connection), "0007")
    assert counted() == (10, 30)
    with engine.begin() as connection:
        # As a worker of before would.
        connection.execute(
            text(
                "INSERT INTO conversions (subject, latest, source_model_id, environment_id, status, task, model_type,"
                " simplified, options, attempts, notes, started_at, finished_at, error_kind, error_message, error_step,"
                " error_reproduce) SELECT subject, latest, source_model_id, environment_id, status, task, model_type,"
                " simplified, options, attempts, notes, started_at, finished_at, error_kind, error_message, error_step,"
                " error_reproduce FROM conversions WHERE id = 2"
            )
        )
    assert counted() == (12, 36)
    upgrade(engine)
    assert counted() == (12, 36)
    with session_scope(engine) as session:
        record_conversion(session, make_record(9, worker="machine-9"))
        assert count_by(session, overview(worker="machine-9"), "status") == {"converted": 1}
        assert count_by(session, overview(), "status") == {"converted": 5, "failed": 2}


# Shown


@pytest.fixture
def client(engine: Engine, make_record: MakeRecord) -> TestClient:
    with session_scope(engine) as session:
        batch = start_batch(session, engine="local", started_at=START)
        made(session, make_record)
        take_lease(session, working(7, model_id=HARM, host="machine-7", batch_id=batch), seconds=60)
        note_step(session, working(7), "simplify")
        take_lease(session, working(8, host="machine-8", batch_id=None), seconds=60)
        note_step(session, working(8), None)
    return TestClient(create_app(engine), base_url="http://127.0.0.1")


def test_the_overview_shows_what_is_in_work(client):
    page = client.get("/").text
    assert "&lt;b&gt;org&lt;/b&gt;/model" in page
    assert HARM not in page
    assert "simplify</td>" in page
    assert "waits for memory</td>" in page
    of_one = client.get("/?worker=machine-8").text
    assert "org/model-8" in of_one
    assert "machine-7" not in of_one.partition('id="working"')[2].partition("</section>")[0]


def test_a_run_shows_what_of_it_is_in_work(client):
    page = client.get("/runs/1").text
    assert "simplify</td>" in page
    assert "org/model-8" not in page


def test_the_pages_offer_every_worker(client):
    for path in ("/", "/models"):
        page = client.get(f"{path}?worker=machine-2").text
        assert '<option value="machine-2" selected>' in page
        assert '<option value="machine-1">' in page
    page = client.get("/models?worker=machine-2").text
    assert "org/model-4" in page
    assert "org/model-1<" not in page
    assert "worker=machine-2" in page.partition("/coverage?")[2], "the links keep the filter"
    assert "machine-1" in client.get("/models/1").text


def test_the_api_gives_the_same(client):
    found = client.get("/api/v1/overview?period=all&worker=machine-2").json()
    assert found["statuses"] == {"converted": 2, "failed": 1}
    assert found["working"] == []
    working = client.get("/api/v1/overview").json()["working"]
    assert {(one["model_id"], one["worker"], one["step"], one["batch_id"]) for one in working} == {
        (HARM, "machine-7", "simplify", 1),
        ("org/model-8", "machine-8", None, None),
    }
    rows = client.get("/api/v1/models?worker=machine-1").json()["models"]
    assert [(row["model_id"], row["worker"]) for row in rows] == [("org/model-1", "machine-1")]
    assert client.get("/api/v1/models/1").json()["worker"] == "machine-1"


def test_prometheus_hears_of_what_is_in_work(client):
    lines = client.get("/metrics").text.splitlines()
    assert 'ferry_models_in_work{step="simplify"} 1.0' in lines
    assert 'ferry_models_in_work{step="waiting"} 1.0' in lines
    assert 'ferry_models_in_work{step="export"} 0.0' in lines
