"""The one place that knows how each database is opened.

SQLite serves one machine: WAL, so that readers never wait for a writer; every writing transaction takes
its lock at the start, since one that upgrades from reading fails at once with "database is locked"
however long it would be willing to wait. PostgreSQL serves many, through psycopg 3 whether the URL names the driver
or not; a connection that the server has dropped meanwhile is replaced before it is used.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Dialect, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from db.errors import CatalogError

__all__ = ["make_engine", "session_scope", "sqlite_file", "translated"]

_BUSY_TIMEOUT_SECONDS = 30.0
_READ_ONLY = "catalog_read_only"
_CONNECT_TIMEOUT_SECONDS = 10
# A server that is gone without a word is noticed within a minute, and not after the kernel's two hours.
_POSTGRES_OPTIONS: dict[str, Any] = {
    "connect_timeout": _CONNECT_TIMEOUT_SECONDS,
    "application_name": "onnx-ferry",
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
}


def sqlite_file(url: str) -> Path | None:
    """Return the file of a SQLite URL; ``None`` for a database in memory or on a server.

    >>> sqlite_file("sqlite:////srv/ferry/catalog.db").as_posix()
    '/srv/ferry/catalog.db'
    """
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" or not parsed.database or parsed.database == ":memory:":
        return None
    if parsed.database.startswith("file:"):
        name = parsed.database.removeprefix("file:").partition("?")[0]
        return None if name == ":memory:" or parsed.query.get("mode") == "memory" else Path(name)
    return Path(parsed.database)


def make_engine(url: str) -> Engine:
    """Return an engine on a SQLAlchemy URL; nothing is opened or created yet.

    The first connection creates a SQLite file and its parent folder.

    Raises:
        CatalogError: If the URL cannot be read, or its driver is not installed.
    """
    try:
        file = sqlite_file(url)
        parsed = make_url(url)
        if parsed.get_backend_name() in ("postgresql", "postgres"):
            return _postgres_engine(parsed)
        if parsed.get_backend_name() != "sqlite":
            return create_engine(url, pool_pre_ping=True)
        engine = create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_SECONDS})
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        # The URL itself may hold a password, and SQLAlchemy's message quotes it.
        scheme, separator, _ = url.partition("://")
        shown = f"The catalog URL that starts with {scheme + separator!r}" if separator else "The catalog URL"
        raise CatalogError(
            f"{shown} cannot be used ({type(error).__name__}: it is not a "
            "SQLAlchemy URL, or its driver is not installed). Give one such as sqlite:////srv/ferry/catalog.db or "
            "postgresql://user@host/ferry, which needs: pip install 'onnx-ferry[postgres]'."
        ) from error

    @event.listens_for(engine, "do_connect")
    def create_folder(dialect: Dialect, record: Any, args: Any, params: Any) -> None:
        if file is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CatalogError(
                    f"The folder {file.parent} of the catalog cannot be created: {error.strerror or error}. "
                    "Set FERRY_HOME or FERRY_CATALOG_URL to a place that can be written."
                ) from error

    @event.listens_for(engine, "connect")
    def configure(connection: Any, record: Any) -> None:
        # Python's driver would begin transactions by itself, late and never IMMEDIATE.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        _switch_to_wal(cursor)
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        read_only = bool(connection.get_execution_options().get(_READ_ONLY))
        # The mode stays on a pooled connection, so each transaction sets its own.
        connection.exec_driver_sql(f"PRAGMA query_only = {'ON' if read_only else 'OFF'}")
        connection.exec_driver_sql("BEGIN DEFERRED" if read_only else "BEGIN IMMEDIATE")

    return engine


def _postgres_engine(url: URL) -> Engine:
    if url.drivername in ("postgresql", "postgres"):
        # SQLAlchemy would take psycopg2, and does not know the short name that many services hand out.
        url = url.set(drivername="postgresql+psycopg")
    # What the URL says itself goes first.
    options = {name: value for name, value in _POSTGRES_OPTIONS.items() if name not in url.query}
    return create_engine(url, pool_pre_ping=True, connect_args=options if "psycopg" in url.drivername else {})


@contextmanager
def session_scope(engine: Engine, *, read_only: bool = False) -> Iterator[Session]:
    """Open one transaction: committed at the end, rolled back on any exception.

    Writing transactions wait for each other up to 30 s on SQLite; ``read_only`` ones wait for nobody, see one
    state throughout, and cannot write.

    Raises:
        CatalogError: For every error of the database, with what it said.
    """
    options: dict[str, Any] = {}
    if read_only:
        options = {_READ_ONLY: True}
        if engine.dialect.name == "postgresql":
            options |= {"postgresql_readonly": True, "isolation_level": "REPEATABLE READ"}
    try:
        with Session(engine.execution_options(**options), expire_on_commit=False) as session, session.begin():
            yield session
    except SQLAlchemyError as error:
        raise translated(error, engine) from error


def translated(error: SQLAlchemyError, engine: Engine) -> CatalogError:
    """Return the error as the catalog's own: where, what was found, what to do."""
    where = engine.url.render_as_string(hide_password=True)
    found = str(error.orig) if isinstance(error, DBAPIError) else str(error)
    found = " ".join(found.split())[:500]
    if isinstance(error, DBAPIError) and isinstance(error.orig, sqlite3.DatabaseError):
        code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            return CatalogError(
                f"The catalog {where} is not a readable SQLite database: {found}. Restore a copy of it, or move it "
                "away: an empty one is created by the next conversion."
            )
        if code == sqlite3.SQLITE_BUSY:
            return CatalogError(
                f"The catalog {where} was locked by another process for {_BUSY_TIMEOUT_SECONDS:.0f} s: {found}. "
                "Try again when it is done.",
                transient=True,
            )
    if isinstance(error, IntegrityError | DataError):
        return CatalogError(f"The catalog {where} refused what was to be written: {found}. Nothing was written.")
    on_server = engine.dialect.name != "sqlite"
    transient = on_server and isinstance(error, OperationalError | InterfaceError | PoolTimeoutError)
    return CatalogError(
        f"The catalog {where} did not answer as expected: {found}. Check FERRY_CATALOG_URL, that its place can be "
        "read and written, and that the server runs.",
        transient=transient,
    )


def _switch_to_wal(cursor: sqlite3.Cursor) -> None:
    """Put the file in WAL mode; a file that cannot be written is read as it is.

    The mode stays in the file, so all but the first connection only look. SQLite does not wait for its
    own timeout here when two processes switch at once, hence the loop.
    """
    deadline = time.monotonic() + _BUSY_TIMEOUT_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            code = error.sqlite_errorcode & 0xFF
            if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
                return
            if code not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
