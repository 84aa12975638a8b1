"""How a database means to answer a query: which index it walks, what it reads whole, what it sorts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session

__all__ = ["plan_of", "statements_of"]

_SQLITE_SCAN = re.compile(r"SCAN (\S+)(?: USING (?:COVERING )?INDEX (\S+))?")
_SQLITE_SEARCH = re.compile(r"SEARCH (\S+) USING (?:COVERING |AUTOMATIC )*(?:INDEX (\S+)|INTEGER PRIMARY KEY)")

Statement = tuple[str, Any]


def statements_of(session: Session, ask: Callable[[Session], object]) -> list[Statement]:
    """Return the statements that a call runs, with their parameters."""
    seen: list[Statement] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        seen.append((statement, parameters))

    bind = session.connection()
    event.listen(bind, "before_cursor_execute", note)
    try:
        ask(session)
    finally:
        event.remove(bind, "before_cursor_execute", note)
    return seen


def plan_of(connection: Connection, statement: Statement) -> list[str]:
    """Return the steps of a plan as ``scan TABLE``, ``index NAME``, ``sort`` and other words of the database."""
    text, parameters = statement
    if connection.dialect.name == "sqlite":
        rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", parameters)
        return [_sqlite_step(row.detail) for row in rows]
    plan = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {text}", parameters).scalar_one()
    return list(_postgres_steps((json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"]))


def _sqlite_step(detail: str) -> str:
    if found := _SQLITE_SEARCH.match(detail):
        return f"index {found[2] or 'primary key'}"
    if found := _SQLITE_SCAN.match(detail):
        return f"index {found[2]}" if found[2] else f"scan {found[1]}"
    return "sort" if "TEMP B-TREE FOR ORDER BY" in detail else detail


def _postgres_steps(node: dict[str, Any]) -> Iterator[str]:
    kind = node["Node Type"]
    if "Index Name" in node:
        yield f"index {node['Index Name']}"
    elif "Seq Scan" in kind:
        yield f"scan {node['Relation Name']}"
    else:
        # An incremental sort puts in order what an index already gave in groups: a few rows at a time.
        yield "sort" if kind == "Sort" else kind
    for inner in node.get("Plans", ()):
        yield from _postgres_steps(inner)
