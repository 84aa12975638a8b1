"""How a catalog is opened, and what a transaction promises."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from db import CatalogError, list_batches, make_engine, session_scope, sqlite_file, start_batch
from db.engine import translated

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        pytest.param("sqlite:////srv/catalog.db", Path("/srv/catalog.db"), id="absolute"),
        pytest.param("sqlite:///catalog.db", Path("catalog.db"), id="relative"),
        pytest.param("sqlite+pysqlite:////srv/catalog.db", Path("/srv/catalog.db"), id="with-driver"),
        pytest.param("sqlite:///file:/srv/catalog.db?uri=true", Path("/srv/catalog.db"), id="uri"),
        pytest.param("sqlite://", None, id="memory"),
        pytest.param("sqlite:///:memory:", None, id="memory-by-name"),
        pytest.param("postgresql://u:p@h/ferry", None, id="server"),
    ],
)
def test_sqlite_file(url, expected):
    assert sqlite_file(url) == expected


@pytest.mark.parametrize(
    ("pragma", "expected"),
    [
        pytest.param("journal_mode", "wal", id="readers-do-not-wait"),
        pytest.param("foreign_keys", 1, id="references-hold"),
        pytest.param("busy_timeout", 30_000, id="writers-wait"),
    ],
)
def test_each_connection_is_configured(sqlite_engine, pragma, expected):
    first, second = sqlite_engine.raw_connection(), sqlite_engine.raw_connection()
    for connection in (first, second):
        assert connection.cursor().execute(f"PRAGMA {pragma}").fetchone() == (expected,)
        connection.close()


def test_nothing_is_created_before_the_first_connection(tmp_path):
    engine = make_engine(f"sqlite:///{tmp_path}/a b/ü/catalog.db")
    assert list(tmp_path.iterdir()) == []
    with engine.connect():
        pass
    engine.dispose()
    assert (tmp_path / "a b" / "ü" / "catalog.db").is_file()


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("not a url s3cret", id="no-url"),
        pytest.param("oddsql://user:s3cret@host/ferry", id="unknown-database"),
        pytest.param("postgresql+nodriver://user:s3cret@host/ferry", id="unknown-driver"),
    ],
)
def test_an_unusable_url_is_named_without_its_password(url):
    with pytest.raises(CatalogError, match="cannot be used") as caught:
        make_engine(url)
    assert "s3cret" not in str(caught.value)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    engine = make_engine(f"sqlite:///{tmp_path}/file/catalog.db")
    with pytest.raises(CatalogError, match="cannot be created"), session_scope(engine) as session:
        list_batches(session)


def test_an_exception_rolls_back(engine):
    def fail() -> None:
        with session_scope(engine) as session:
            start_batch(session, engine="local", started_at=NOW)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with session_scope(engine, read_only=True) as session:
        assert list_batches(session) == []


def test_a_reading_session_cannot_write_and_the_next_one_can(engine):
    with pytest.raises(CatalogError, match=r"read-?only"), session_scope(engine, read_only=True) as session:
        start_batch(session, engine="local", started_at=NOW)
    with session_scope(engine) as session:
        assert start_batch(session, engine="local", started_at=NOW) == 1


def test_a_reader_does_not_wait_for_a_writer(engine):
    with session_scope(engine) as writer:
        start_batch(writer, engine="local", started_at=NOW)
        with session_scope(engine, read_only=True) as reader:
            assert list_batches(reader) == []


def test_a_writer_that_reads_first_waits_for_another(sqlite_engine):
    """A transaction that took its lock late would fail here at once: its snapshot is out of date."""
    reading, errors = threading.Event(), []

    def write() -> None:
        reading.wait(5)
        try:
            with session_scope(sqlite_engine) as session:
                start_batch(session, engine="local", started_at=NOW)
        except CatalogError as error:
            errors.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    with session_scope(sqlite_engine) as session:
        before = len(list_batches(session))
        reading.set()
        thread.join(0.2)
        assert thread.is_alive()
        start_batch(session, engine="local", started_at=NOW)
    thread.join(10)
    assert (before, errors) == (0, [])
    with session_scope(sqlite_engine, read_only=True) as session:
        assert len(list_batches(session)) == 2


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "catalog.db").write_bytes(b"this is a text, not a database" * 100)
    engine = make_engine(f"sqlite:///{tmp_path}/catalog.db")
    with (
        pytest.raises(CatalogError, match="not a readable SQLite database") as caught,
        session_scope(engine) as session,
    ):
        list_batches(session)
    assert not caught.value.transient


def test_a_lock_that_is_never_released_is_transient(sqlite_engine):
    with session_scope(sqlite_engine) as session:
        list_batches(session)
        held = sqlite3.connect(sqlite_engine.url.database, timeout=0, isolation_level=None)
        with pytest.raises(sqlite3.OperationalError) as locked:
            held.execute("BEGIN IMMEDIATE")
        held.close()
    error = translated(OperationalError("BEGIN IMMEDIATE", {}, locked.value), sqlite_engine)
    assert error.transient
    assert "locked by another process" in error.message


def test_the_package_imports_nothing_heavy_and_nobody_above_it():
    code = (
        "import sys, db, db.migrate; heavy = {'torch', 'transformers', 'prefect', 'alembic', 'onnx_config', 'tasks', "
        "'flows'}; print(sorted(heavy & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
