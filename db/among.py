"""The condition that a number is one of many."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import ARRAY, BigInteger, ColumnElement, any_, literal
from sqlalchemy.orm import InstrumentedAttribute, Session

__all__ = ["one_of"]


def one_of(session: Session, column: InstrumentedAttribute[int], numbers: Collection[int]) -> ColumnElement[bool]:
    """Return the condition that a column has one of these numbers, as its database reads it fastest.

    PostgreSQL gets them as one array: a statement with a parameter for each is another text for each number of them,
    to be written, read and planned anew. SQLite has no arrays.
    """
    if session.get_bind().dialect.name == "postgresql":
        return column == any_(literal(list(numbers), ARRAY(BigInteger)))
    return column.in_(numbers)
