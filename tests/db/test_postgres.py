"""What matters on a server alone: it is restarted, it is not there, its address comes in several spellings."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from sqlalchemy import Engine, text

from db import CatalogError, count_conversions, list_batches, make_engine, record_conversion, session_scope, start_batch
from db.engine import sqlite_file
from tests.postgres import PostgresServer

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    """A server that a test may stop: the shared one has other tests' connections."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.mark.parametrize(
    "spelt",
    [
        pytest.param("postgresql://ferry@db/ferry", id="plain"),
        pytest.param("postgres://ferry@db/ferry", id="short"),
        pytest.param("postgresql+psycopg://ferry@db/ferry", id="with-driver"),
    ],
)
def test_every_spelling_means_psycopg_3(spelt):
    engine = make_engine(spelt)
    assert (engine.dialect.name, engine.dialect.driver) == ("postgresql", "psycopg")
    assert engine.url.database == "ferry"
    assert sqlite_file(spelt) is None


def test_a_plain_url_works(postgres):
    engine = make_engine(postgres.url().replace("+psycopg", ""))
    with session_scope(engine, read_only=True) as session:
        assert session.execute(text("SHOW application_name")).scalar_one() == "onnx-ferry"
        assert session.execute(text("SHOW transaction_isolation")).scalar_one() == "repeatable read"
        assert session.execute(text("SHOW transaction_read_only")).scalar_one() == "on"
    engine.dispose()


def test_a_wish_in_the_url_goes_before_ours(postgres):
    engine = make_engine(postgres.url() + "?application_name=theirs")
    with session_scope(engine, read_only=True) as session:
        assert session.execute(text("SHOW application_name")).scalar_one() == "theirs"
    engine.dispose()


def test_a_server_restarted_between_two_transactions_is_not_noticed(own_server):
    engine = catalog_of_its_own(own_server)
    for hard in (False, True):
        with session_scope(engine) as session:
            start_batch(session, engine="local", started_at=NOW)
        own_server.stop(hard=hard)
        own_server.start()
    with session_scope(engine, read_only=True) as session:
        assert len(list_batches(session)) == 2
    engine.dispose()


def test_a_server_that_goes_in_the_middle_is_a_passing_trouble_and_leaves_nothing(own_server, make_record):
    engine = catalog_of_its_own(own_server)

    def record(*, stop: bool) -> None:
        with session_scope(engine) as session:
            record_conversion(session, make_record(1))
            if stop:
                own_server.stop(hard=True)
            record_conversion(session, make_record(2))

    with pytest.raises(CatalogError, match=r"did not answer as expected.*that the server runs") as caught:
        record(stop=True)
    assert caught.value.transient
    own_server.start()
    with session_scope(engine, read_only=True) as session:
        assert count_conversions(session) == 0
    record(stop=False)
    with session_scope(engine, read_only=True) as session:
        assert count_conversions(session) == 2
    engine.dispose()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        pytest.param("ferry:s3cret@127.0.0.1:1/ferry", "refused", id="nobody-listens"),
        pytest.param("ferry:s3cret@no-such-host.invalid/ferry", "did not answer as expected", id="no-such-host"),
    ],
)
def test_a_server_that_is_not_there_is_a_passing_trouble(address, words):
    engine = make_engine(f"postgresql://{address}")
    started = time.monotonic()
    with pytest.raises(CatalogError, match=words) as caught, session_scope(engine, read_only=True) as session:
        list_batches(session)
    assert caught.value.transient
    assert "Check FERRY_CATALOG_URL" in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert time.monotonic() - started < 15


def test_a_database_that_is_not_there_is_named(postgres):
    engine = make_engine(postgres.url("nowhere"))
    with pytest.raises(CatalogError, match='database "nowhere" does not exist'), session_scope(engine) as session:
        list_batches(session)


def catalog_of_its_own(server: PostgresServer) -> Engine:
    from db import upgrade

    engine = make_engine(server.url())
    upgrade(engine)
    return engine
