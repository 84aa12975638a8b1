"""The catalog as the pages read it: never created, never migrated, and told apart from one that cannot be read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from db.engine import session_scope
from db.errors import CatalogError
from db.migrate import HEAD, schema_version

__all__ = ["CatalogReader", "NotReadyError"]

_LOOK_AGAIN_SECONDS = 5.0
_KEPT_SECONDS = 15.0

Value = TypeVar("Value")


class NotReadyError(CatalogError):
    """There is no catalog yet, or one of another version; the message says what to type."""


class CatalogReader:
    """Opens read-only transactions on a catalog that has the schema that this code reads."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._current_until = 0.0
        self._kept: dict[str, tuple[float, object]] = {}
        self._lock = threading.Lock()

    @property
    def where(self) -> str:
        """The catalog's URL, without a password."""
        return self.engine.url.render_as_string(hide_password=True)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Open one transaction, which sees one state throughout and cannot write.

        Raises:
            NotReadyError: If there is no catalog, or one of another version.
            CatalogError: If it cannot be read.
        """
        self.check()
        with session_scope(self.engine, read_only=True) as session:
            yield session

    def check(self) -> None:
        """Raise `NotReadyError` unless the catalog is there at the right version; looked at every few seconds."""
        if time.monotonic() < self._current_until:
            return
        version = schema_version(self.engine)
        if version is None:
            raise NotReadyError(
                f"There is no catalog at {self.where} yet. Convert something, e.g. `ferry convert org/name` or "
                "`ferry batch models.yaml`, with the same FERRY_HOME; this page finds it by itself."
            )
        if version != HEAD:
            what = "older" if version < HEAD else "newer"
            fix = (
                "Type `ferry catalog list` once: it brings the catalog up to date."
                if version < HEAD
                else "Upgrade this installation of onnx-ferry."
            )
            raise NotReadyError(
                f"The catalog at {self.where} has schema version {version}, which is {what} than the {HEAD} that "
                f"this dashboard reads. {fix}"
            )
        self._current_until = time.monotonic() + _LOOK_AGAIN_SECONDS

    def kept(self, name: str, read: Callable[[], Value]) -> Value:
        """Return what ``read`` says, or said under this name in the last quarter of a minute."""
        with self._lock:
            found = self._kept.get(name)
            if found is None or time.monotonic() > found[0]:
                found = (time.monotonic() + _KEPT_SECONDS, read())
                self._kept[name] = found
        return found[1]  # type: ignore[return-value]  # a name is always read by the same function
