"""Add who converts what and where it is at the moment, and which worker made each attempt, counted in the totals.

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

_WORDS = ("task", "model_type", "status", "error_kind", "template")
_GROUPED = "span, dimension, word, start, status, error_kind, template"
_UNIQUE = "uq_conversion_totals_counted"
_BY_WORKER = ["span", "worker", "start"]
_LISTED = ["latest", "worker", "finished_at"]


def upgrade() -> None:
    """Widen leases, attempts and totals, and have the triggers count by worker as well.

    Attempts before this have no worker: nobody wrote it down. A worker of an older onnx-ferry that still runs takes
    its leases without saying for which model, and is not shown.
    """
    on_server = op.get_bind().dialect.name == "postgresql"
    for column in ("model_id TEXT", "batch_id BIGINT" if on_server else "batch_id INTEGER"):
        op.execute(f"ALTER TABLE leases ADD COLUMN {column}")
    # Alembic would write the constraint apart, which SQLite cannot add.
    op.execute(
        "ALTER TABLE leases ADD COLUMN step VARCHAR(32) CONSTRAINT ck_leases_step_known"
        " CHECK (step IN ('fetch', 'detect', 'export', 'simplify', 'parity', 'register'))"
    )
    op.add_column("leases", sa.Column("step_began_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("conversions", sa.Column("worker", sa.Text(), nullable=True))
    op.create_index(_name("conversions", _LISTED), "conversions", _LISTED, unique=False)
    if on_server:
        op.execute("ALTER TABLE conversion_totals ADD COLUMN worker TEXT NOT NULL DEFAULT ''")
        op.execute("ALTER TABLE conversion_totals ALTER COLUMN worker DROP DEFAULT")
        op.drop_constraint(op.f(_UNIQUE), "conversion_totals", type_="unique")
        op.create_unique_constraint(op.f(_UNIQUE), "conversion_totals", ["span", "start", *_WORDS, "worker"])
        op.drop_constraint(op.f("ck_grouped_totals_dimension_known"), "grouped_totals", type_="check")
        op.create_check_constraint(
            op.f("ck_grouped_totals_dimension_known"),
            "grouped_totals",
            "dimension IN ('all', 'task', 'model_type', 'worker')",
        )
    else:
        # SQLite changes no constraint of a table that is there.
        _drop_triggers()
        _remake_conversion_totals(with_worker=True)
        _remake_grouped_totals(with_worker=True)
    op.create_index(_name("conversion_totals", _BY_WORKER), "conversion_totals", _BY_WORKER, unique=False)
    _count(with_worker=True)


def downgrade() -> None:
    """Remove all of it, and add up what was counted apart."""
    if op.get_bind().dialect.name != "postgresql":
        _drop_triggers()
    op.drop_index(_name("conversion_totals", _BY_WORKER), table_name="conversion_totals")
    op.execute("DELETE FROM grouped_totals WHERE dimension = 'worker'")
    _remake_conversion_totals(with_worker=False)
    _remake_grouped_totals(with_worker=False)
    # The index of one table, and then the index's column.
    op.drop_index(_name("conversions", _LISTED), table_name="conversions")
    _count(with_worker=False)
    op.drop_column("conversions", "worker")
    for column in ("step_began_at", "step", "batch_id", "model_id"):
        op.drop_column("leases", column)


def _name(table: str, columns: list[str]) -> str:
    return op.f(f"ix_{table}_{'_'.join(columns)}")


# Tables made anew


def _remake_conversion_totals(*, with_worker: bool) -> None:
    words = ", ".join(_WORDS)
    kept = f"id, span, start, {words}, '' AS worker, conversions FROM conversion_totals"
    if not with_worker:
        kept = (
            f"min(id) AS id, span, start, {words}, sum(conversions) AS conversions FROM conversion_totals"
            f" GROUP BY span, start, {words}"
        )
    op.execute(f"CREATE TEMPORARY TABLE kept_totals AS SELECT {kept}")
    op.drop_table("conversion_totals")
    worker = [sa.Column("worker", sa.Text(), nullable=False)] if with_worker else []
    op.create_table(
        "conversion_totals",
        sa.Column("id", _NUMBER, nullable=False),
        sa.Column("span", sa.String(length=32), nullable=False),
        sa.Column("start", sa.DateTime(timezone=True), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("model_type", sa.Text(), nullable=False),
        sa.Column("status", sa.String(length=32), nullable=False),
        sa.Column("error_kind", sa.String(length=32), nullable=False),
        sa.Column("template", sa.String(length=32), nullable=False),
        *worker,
        sa.Column("conversions", sa.Integer(), nullable=False),
        sa.CheckConstraint("span IN ('hour', 'day')", name=op.f("ck_conversion_totals_span_known")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_conversion_totals")),
        sa.UniqueConstraint("span", "start", *_WORDS, *(["worker"] if with_worker else []), name=op.f(_UNIQUE)),
    )
    by_type = ["span", "task", "model_type", "start"]
    op.create_index(_name("conversion_totals", by_type), "conversion_totals", by_type, unique=False)
    columns = f"id, span, start, {words}, {'worker, ' if with_worker else ''}conversions"
    _put_back("conversion_totals", columns)


def _remake_grouped_totals(*, with_worker: bool) -> None:
    op.execute("CREATE TEMPORARY TABLE kept_totals AS SELECT * FROM grouped_totals")
    op.drop_table("grouped_totals")
    known = "'all', 'task', 'model_type'" + (", 'worker'" if with_worker else "")
    op.create_table(
        "grouped_totals",
        sa.Column("id", _NUMBER, nullable=False),
        sa.Column("span", sa.String(length=32), nullable=False),
        sa.Column("dimension", sa.String(length=32), nullable=False),
        sa.Column("word", sa.Text(), nullable=False),
        sa.Column("start", sa.DateTime(timezone=True), nullable=False),
        sa.Column("status", sa.String(length=32), nullable=False),
        sa.Column("error_kind", sa.String(length=32), nullable=False),
        sa.Column("template", sa.String(length=32), nullable=False),
        sa.Column("conversions", sa.Integer(), nullable=False),
        sa.CheckConstraint("span IN ('hour', 'day')", name=op.f("ck_grouped_totals_span_known")),
        sa.CheckConstraint(f"dimension IN ({known})", name=op.f("ck_grouped_totals_dimension_known")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_grouped_totals")),
        sa.UniqueConstraint(*_GROUPED.split(", "), name=op.f("uq_grouped_totals_counted")),
    )
    _put_back("grouped_totals", f"id, {_GROUPED}, conversions")


def _put_back(table: str, columns: str) -> None:
    op.execute(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM kept_totals ORDER BY id")
    op.execute("DROP TABLE kept_totals")
    if op.get_bind().dialect.name == "postgresql":
        # What brings its number does not move the counter that the next row is numbered from.
        op.execute(
            f"SELECT setval(pg_get_serial_sequence('{table}', 'id'),"
            f" (SELECT coalesce(max(id), 0) + 1 FROM {table}), false)"
        )


# Counting


def _drop_triggers() -> None:
    for name in ("conversions_counted", "conversions_grouped", "found_done_counted"):
        op.execute(f"DROP TRIGGER {name}")


def _count(*, with_worker: bool) -> None:
    """Have the triggers count; those of PostgreSQL call functions, which are replaced under them."""
    on_server = op.get_bind().dialect.name == "postgresql"
    of_attempts, of_found = (_starts("NEW.finished_at"), _starts("NEW.found_at"))
    counted = [_one_attempt(span, start, with_worker) for span, start in of_attempts.items()]
    # Always in this order, so that no two transactions that add one conversion each wait for each other; and what all
    # of them count last, so that they wait for as short a time as may be.
    grouped = [
        _one_grouped(span, start, dimension)
        for dimension in (*(["worker"] if with_worker else []), "model_type", "task", "all")
        for span, start in of_attempts.items()
    ]
    found = [line for span, start in of_found.items() for line in _one_found(span, start, with_worker)]
    for trigger, table, function, lines in (
        ("conversions_counted", "conversions", "count_conversion", counted),
        ("conversions_grouped", "conversions", "group_conversion", grouped),
        ("found_done_counted", "found_done", "count_found_done", found),
    ):
        body = "\n".join(lines)
        if on_server:
            op.execute(
                f"CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $$\n"
                f"BEGIN\n{body}\nRETURN NULL;\nEND\n$$"
            )
        else:
            op.execute(f"CREATE TRIGGER {trigger} AFTER INSERT ON {table} BEGIN\n{body}\nEND")


def _starts(moment: str) -> dict[str, str]:
    if op.get_bind().dialect.name == "postgresql":
        return {span: f"date_trunc('{span}', {moment} AT TIME ZONE 'UTC') AT TIME ZONE 'UTC'" for span in _SPANS}
    # The text that SQLAlchemy keeps of a moment, its minutes or hours set to zero.
    return {
        "hour": f"substr({moment}, 1, 13) || ':00:00.000000'",
        "day": f"substr({moment}, 1, 10) || ' 00:00:00.000000'",
    }


_SPANS = ("hour", "day")


def _one_attempt(span: str, start: str, with_worker: bool) -> str:
    columns, worker = _counted_columns(with_worker), ", coalesce(NEW.worker, '')" if with_worker else ""
    return (
        f"INSERT INTO conversion_totals ({columns}, conversions)"
        f" VALUES ('{span}', {start}, coalesce(NEW.task, ''), coalesce(NEW.model_type, ''), NEW.status,"
        f" coalesce(NEW.error_kind, ''), coalesce(NEW.template, ''){worker}, 1)"
        f" ON CONFLICT ({columns}) DO UPDATE SET conversions = conversion_totals.conversions + 1;"
    )


def _one_grouped(span: str, start: str, dimension: str) -> str:
    word = "''" if dimension == "all" else f"coalesce(NEW.{dimension}, '')"
    # An attempt of which nobody wrote down the worker is counted for none.
    known = "NEW.worker IS NOT NULL" if dimension == "worker" else "true"
    return (
        f"INSERT INTO grouped_totals ({_GROUPED}, conversions)"
        f" SELECT '{span}', '{dimension}', {word}, {start}, NEW.status, coalesce(NEW.error_kind, ''),"
        f" coalesce(NEW.template, ''), 1 WHERE {known}"
        f" ON CONFLICT ({_GROUPED}) DO UPDATE SET conversions = grouped_totals.conversions + 1;"
    )


def _one_found(span: str, start: str, with_worker: bool) -> Iterator[str]:
    # A failure that was found again is no further failure, and what it once took is counted where it happened; nobody
    # worked at what was found.
    found = "FROM conversions AS c WHERE c.id = NEW.conversion_id AND NEW.status = 'reused'"
    columns, worker = _counted_columns(with_worker), ", ''" if with_worker else ""
    yield (
        f"INSERT INTO conversion_totals ({columns}, conversions)"
        f" SELECT '{span}', {start}, coalesce(c.task, ''), coalesce(c.model_type, ''), NEW.status, '', ''{worker}, 1"
        f" {found} ON CONFLICT ({columns}) DO UPDATE SET conversions = conversion_totals.conversions + 1;"
    )
    words = {"model_type": "coalesce(c.model_type, '')", "task": "coalesce(c.task, '')", "all": "''"}
    for dimension, word in words.items():
        yield (
            f"INSERT INTO grouped_totals ({_GROUPED}, conversions)"
            f" SELECT '{span}', '{dimension}', {word}, {start}, NEW.status, '', '', 1 {found}"
            f" ON CONFLICT ({_GROUPED}) DO UPDATE SET conversions = grouped_totals.conversions + 1;"
        )


def _counted_columns(with_worker: bool) -> str:
    return ", ".join(["span", "start", *_WORDS, *(["worker"] if with_worker else [])])
