"""Copies a catalog into another database, row by row, each with its number: from SQLite to a server, say.

The copy goes in parts of some thousand rows, each a transaction, and the tables in the order in which they refer to
each other. A copy that was cut is completed by the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, Row, Table, func, insert, select, text, update

from db.engine import session_scope
from db.errors import CatalogError
from db.migrate import upgrade
from db.models import Base

__all__ = ["Copied", "copy_catalog"]

_ROWS_PER_PART = 2000
# What may change in a row after it was written; all else says which row it is.
_CHANGING = {
    "artifacts": {"path", "quarantined"},
    "batches": {"finished_at", "converted", "reused", "failed", "mismatch"},
    "conversions": {"latest", "status", "error_kind", "error_message", "error_step", "error_reproduce"},
    "templates": {"hits", "size_bytes", "last_used_at"},
}
# Who holds what at the moment is nothing that another database should believe; what counts itself counts there too.
_NOT_COPIED = {"leases", "conversion_totals", "grouped_totals"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """What became of one table."""

    table: str
    """Its name."""

    rows: int
    """Rows in it, in both databases."""

    written: int
    """Rows that were not in the target before, or not as they are now."""


def copy_catalog(
    source: Engine, target: Engine, *, listener: Callable[[Copied], None] = lambda _: None
) -> list[Copied]:
    """Make ``target`` hold what ``source`` holds; both are brought to the current schema first.

    Everything is compared once more at the end. What is recorded in ``source`` after the call began is not copied:
    call it again, or stop the workers first. After a cut, ``target`` holds a part, and the next call the rest.

    Args:
        source: Is read, in one state throughout.
        target: An empty database, or one that holds an earlier copy of the same catalog and nothing else.
        listener: Is told of each table that is done.

    Raises:
        CatalogError: If ``target`` holds anything else, which nothing is changed in then; or a database fails.
    """
    if _identity(source) == _identity(target):
        raise CatalogError(f"The catalog {_shown(source)} cannot be copied into itself. Name another database.")
    upgrade(source)
    upgrade(target)
    tables = [table for table in Base.metadata.sorted_tables if table.name not in _NOT_COPIED]
    with session_scope(source, read_only=True) as reading:
        connection = reading.connection()
        for table in tables:
            _refuse_other_content(connection, target, table)
        done = []
        for table in tables:
            done.append(_copy(connection, target, table))
            listener(done[-1])
        for table in tables:
            _compare(connection, target, table)
    return done


def _copy(source: Connection, target: Engine, table: Table) -> Copied:
    rows = written = 0
    for part in _parts(source, table):
        rows += len(part)
        with session_scope(target) as session:
            connection = session.connection()
            there = _rows_between(connection, table, part[0].id, part[-1].id)
            new = [dict(row._mapping) for row in part if row.id not in there]
            if new:
                connection.execute(insert(table), new)
                _count_on_from(connection, table)
            changed = [row for row in part if row.id in there and not _same(row, there[row.id])]
            for row in changed:
                values = {name: row._mapping[name] for name in _CHANGING[table.name]}
                connection.execute(update(table).where(table.c.id == row.id).values(values))
            written += len(new) + len(changed)
    return Copied(table=table.name, rows=rows, written=written)


def _refuse_other_content(source: Connection, target: Engine, table: Table) -> None:
    """Raise unless every row of the target is one of the source's, but for what may have changed since."""
    known = [column.name for column in table.columns if column.name not in _CHANGING.get(table.name, set())]
    with session_scope(target, read_only=True) as session:
        for part in _parts(session.connection(), table):
            ours = _rows_between(source, table, part[0].id, part[-1].id)
            for row in part:
                mine = ours.get(row.id)
                if mine is None or not _same([mine._mapping[n] for n in known], [row._mapping[n] for n in known]):
                    raise CatalogError(
                        f"The database {_shown(target)} holds other content than the catalog to be copied: row "
                        f"{row.id} of its table {table.name}. Nothing was copied. Name an empty database, or one that "
                        "holds an earlier copy of this catalog and nothing else."
                    )


def _compare(source: Connection, target: Engine, table: Table) -> None:
    with session_scope(target, read_only=True) as session:
        connection = session.connection()
        count = 0
        for part in _parts(source, table):
            there = _rows_between(connection, table, part[0].id, part[-1].id)
            count += len(there)
            if [row.id for row in part] != list(there) or not all(_same(row, there[row.id]) for row in part):
                break
        else:
            if connection.execute(select(func.count()).select_from(table)).scalar_one() == count:
                return
    raise CatalogError(
        f"The copy in {_shown(target)} differs from the catalog in its table {table.name}: something else writes "
        "there. Stop it, and copy again into an empty database."
    )


def _parts(connection: Connection, table: Table) -> Iterator[Sequence[Row[Any]]]:
    last = 0
    while True:
        query = select(table).where(table.c.id > last).order_by(table.c.id).limit(_ROWS_PER_PART)
        rows = connection.execute(query).all()
        if not rows:
            return
        yield rows
        last = rows[-1].id


def _rows_between(connection: Connection, table: Table, first: int, last: int) -> dict[int, Row[Any]]:
    query = select(table).where(table.c.id.between(first, last)).order_by(table.c.id)
    return {row.id: row for row in connection.execute(query)}


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    # NaN, which a difference may be, is not equal to itself.
    return all(a == b or (_is_nan(a) and _is_nan(b)) for a, b in zip(one, other, strict=True))


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _count_on_from(connection: Connection, table: Table) -> None:
    # PostgreSQL numbers rows from a counter of its own, which rows that bring their number do not move.
    if connection.dialect.name == "postgresql":
        connection.execute(
            text(f"SELECT setval(pg_get_serial_sequence('{table.name}', 'id'), (SELECT max(id) FROM {table.name}))")
        )


def _identity(engine: Engine) -> tuple[object, ...]:
    url = engine.url
    return url.get_backend_name(), url.host, url.port, url.database, str(sorted(url.query.items()))


def _shown(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=True)
