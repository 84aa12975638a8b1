"""Column types that hold what the databases would lose: time zones, NaN, and text from hostile models."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, DateTime, Dialect, Float, Text
from sqlalchemy.types import TypeDecorator, TypeEngine, UserDefinedType

__all__ = ["JsonValue", "PlainText", "Real", "UtcDateTime", "storable"]


def storable(value: Any) -> Any:
    r"""Return text, or a JSON value with text in it, as both databases can hold it.

    PostgreSQL refuses NUL, and no driver encodes a lone surrogate (which paths read from disk may
    have); both become U+FFFD. A failure must be recorded whatever its message holds.

    >>> storable(["a\x00b", {"c\ud800": 1}])
    ['a\ufffdb', {'c\ufffd': 1}]
    """
    if isinstance(value, str):
        # A StrEnum is a str to us but not to every driver, hence the exact copy.
        text = str.__str__(value)
        return text.replace("\x00", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list | tuple):
        return [storable(item) for item in value]
    if isinstance(value, dict):
        return {storable(key): storable(item) for key, item in value.items()}
    return value


class PlainText(TypeDecorator[str]):
    """Text of any length, made storable."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else storable(value)


class JsonValue(TypeDecorator[Any]):
    """A JSON document, its text made storable; ``None`` is SQL's NULL."""

    impl = JSON(none_as_null=True)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        return storable(value)


class UtcDateTime(TypeDecorator[datetime]):
    """A moment; aware in, UTC out. SQLite has no time zones, so the text there is UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value.isoformat()} has no time zone; give datetime.now(UTC)")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class _AsGiven(UserDefinedType[Any]):
    """SQLite's float without the conversion that would turn the text ``nan`` into a NaN again."""

    cache_ok = True

    def get_col_spec(self, **options: Any) -> str:
        return "FLOAT"


class Real(TypeDecorator[float]):
    """A double that may be NaN.

    SQLite turns a bound NaN into NULL, which would make "not a number" read as "not compared". It is
    kept there as the text ``nan``, which sorts above every number, as NaN does in PostgreSQL.
    """

    impl = Float(53)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(_AsGiven() if dialect.name == "sqlite" else Float(53))

    def process_bind_param(self, value: float | None, dialect: Dialect) -> Any:
        if value is not None and dialect.name == "sqlite" and math.isnan(value):
            return "nan"
        return None if value is None else float(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> float | None:
        return None if value is None else float(value)
