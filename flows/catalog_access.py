"""What the commands over the catalog share: opening it for reading, its records as JSON, and how they give up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from flows.progress import clean

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

__all__ = ["fail", "open_catalog", "to_json"]


@contextmanager
def open_catalog(*, home: str | None, catalog_url: str | None) -> Iterator[Session | None]:
    """Open the catalog for reading; ``None`` where there is none yet. Ends the command if it cannot be read."""
    from db import CatalogError, make_engine, schema_version, session_scope, upgrade
    from flows.settings import load_settings

    settings = load_settings(home=home, catalog_url=catalog_url)
    try:
        engine = make_engine(settings.catalog_url)
        try:
            if schema_version(engine) is None:
                yield None
                return
            upgrade(engine)
            with session_scope(engine, read_only=True) as session:
                yield session
        finally:
            engine.dispose()
    except CatalogError as error:
        fail(error.message)


def to_json(value: Any) -> Any:
    """Return a record as JSON holds it: times in ISO 8601 with ``Z``, and ``null`` for NaN and infinity."""
    if hasattr(value, "__dataclass_fields__"):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def fail(message: str, *, code: int = 1) -> NoReturn:
    """End the command with one paragraph on standard error."""
    typer.echo(f"Error: {clean(message)}", err=True)
    raise typer.Exit(code)
