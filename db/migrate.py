"""Brings a catalog to the schema that this code reads and writes.

`upgrade` is called before each command that writes, so a catalog that is current costs one query: Alembic
is imported only where there is something to do.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import SQLAlchemyError

from db.engine import session_scope, sqlite_file, translated
from db.errors import CatalogError, CatalogVersionError

if TYPE_CHECKING:
    from alembic.config import Config

__all__ = ["HEAD", "alembic_config", "is_current", "schema_version", "upgrade"]

HEAD = "0009"
"""The newest revision in ``migrations/versions``; named here so that looking it up needs no Alembic."""

_MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK_TIMEOUT_SECONDS = 60.0
# An arbitrary number that PostgreSQL's advisory locks know this catalog by.
_ADVISORY_LOCK = 0x6F6E6E7866657272
# Alembic's environment is global to a process.
_alembic_in_use = threading.Lock()


def schema_version(engine: Engine) -> str | None:
    """Return the revision that the catalog is at; ``None`` where there is no catalog yet.

    An absent SQLite file is not created.

    Raises:
        CatalogError: If the database cannot be read.
    """
    file = sqlite_file(engine.url.render_as_string(hide_password=False))
    if file is not None and not file.exists():
        return None
    with session_scope(engine, read_only=True) as session:
        return _version(session.connection())


def is_current(engine: Engine) -> bool:
    """Return whether the catalog has the schema that this code reads and writes."""
    return schema_version(engine) == HEAD


def upgrade(engine: Engine) -> None:
    """Create the catalog, or bring it to the newest schema, in one transaction; nothing where it is current.

    Several processes may call this at once: one migrates, the others wait. A process that is killed
    in the middle leaves the schema as it was.

    Raises:
        CatalogVersionError: If the catalog was written by a newer onnx-ferry.
        CatalogError: If the database cannot be read or changed.
    """
    if _known(schema_version(engine), engine) == HEAD:
        return
    with _one_at_a_time(engine):
        try:
            with engine.begin() as connection:
                if engine.dialect.name == "postgresql":
                    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _ADVISORY_LOCK})
                if _known(_version(connection), engine) != HEAD:
                    _run_alembic(connection)
        except SQLAlchemyError as error:
            raise translated(error, engine) from error


def alembic_config(connection: Connection | None = None) -> Config:
    """Return Alembic's configuration for these migrations; its commands take it as it is."""
    from alembic.config import Config

    config = Config()
    # Alembic fills in %(name)s, so a folder's own percent signs are doubled.
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    if connection is not None:
        config.attributes["connection"] = connection
    return config


def _run_alembic(connection: Connection) -> None:
    from alembic import command

    with _alembic_in_use:
        command.upgrade(alembic_config(connection), HEAD)


def _version(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    version = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return None if version is None else str(version)


def _known(version: str | None, engine: Engine) -> str | None:
    if version is not None and version not in {file.name.partition("_")[0] for file in _revision_files()}:
        where = engine.url.render_as_string(hide_password=True)
        raise CatalogVersionError(
            f"The catalog {where} has schema version {version!r}; this onnx-ferry knows versions up to {HEAD!r}. "
            "It was written by a newer onnx-ferry: upgrade this installation, or use another FERRY_CATALOG_URL."
        )
    return version


def _revision_files() -> Iterator[Path]:
    return _MIGRATIONS.glob("versions/[0-9]*_*.py")


@contextmanager
def _one_at_a_time(engine: Engine) -> Iterator[None]:
    file = sqlite_file(engine.url.render_as_string(hide_password=False))
    if file is None:
        yield
        return
    lock = FileLock(f"{file}.migrate.lock", timeout=_LOCK_TIMEOUT_SECONDS)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, TimeoutError) as error:
        raise CatalogError(
            f"The catalog {file} cannot be prepared, since {lock.lock_file} cannot be locked: {error}. "
            "Set FERRY_HOME or FERRY_CATALOG_URL to a place that can be written.",
            transient=isinstance(error, TimeoutError),
        ) from error
    try:
        yield
    finally:
        lock.release()
