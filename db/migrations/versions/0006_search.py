"""Add what keeps a catalog of a million attempts fast: indexes for texts, totals of fewer rows; and a batch's length.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

import sqlite3

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

_INDEXES = (
    ("conversions", ["latest", "architecture", "finished_at"]),
    ("conversion_totals", ["span", "task", "model_type", "start"]),
)
# Table, and the column whose texts are searched.
_SEARCHED = (("source_models", "model_id"), ("conversions", "error_message"))
_COUNTED = "span, dimension, word, start, status, error_kind, template"
_DIMENSIONS = {"all": "''", "task": "task", "model_type": "model_type"}


def upgrade() -> None:
    """Create the totals with what counts them, add up what is counted so far, and index the texts.

    Triggers keep all of it in step, so that a worker of an older onnx-ferry that still runs is counted and found too.
    """
    on_server = op.get_bind().dialect.name == "postgresql"
    op.add_column("batches", sa.Column("models", sa.Integer(), nullable=True))
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
        sa.CheckConstraint(
            "dimension IN ('all', 'task', 'model_type')", name=op.f("ck_grouped_totals_dimension_known")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_grouped_totals")),
        sa.UniqueConstraint(*_COUNTED.split(", "), name=op.f("uq_grouped_totals_counted")),
    )
    for dimension, word in _DIMENSIONS.items():
        op.execute(
            f"INSERT INTO grouped_totals ({_COUNTED}, conversions) SELECT span, '{dimension}', {word}, start, status,"
            " error_kind, template, sum(conversions) FROM conversion_totals GROUP BY 1, 2, 3, 4, 5, 6, 7"
        )
    if on_server:
        _count_on_postgresql()
        _index_on_postgresql()
    else:
        _count_on_sqlite()
        _index_on_sqlite()
    for table, columns in _INDEXES:
        op.create_index(_name(table, columns), table, columns, unique=False)


def downgrade() -> None:
    """Remove all of it."""
    for table, columns in _INDEXES:
        op.drop_index(_name(table, columns), table_name=table)
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP TRIGGER conversions_grouped ON conversions")
        op.execute("DROP FUNCTION group_conversion()")
        for table, _ in _SEARCHED:
            op.execute(f"DROP INDEX {table}_search")
        op.execute("DROP FUNCTION catalog_grams(text)")
    else:
        op.execute("DROP TRIGGER conversions_grouped")
        for table, _ in _SEARCHED:
            for when in ("insert", "update", "delete"):
                op.execute(f"DROP TRIGGER IF EXISTS {table}_search_{when}")
            op.execute(f"DROP TABLE IF EXISTS {table}_search")
    op.drop_table("grouped_totals")
    op.drop_column("batches", "models")


def _name(table: str, columns: list[str]) -> str:
    return op.f(f"ix_{table}_{'_'.join(columns)}")


# Counting


def _count_on_sqlite() -> None:
    # The text that SQLAlchemy keeps of a moment, its minutes or hours set to zero.
    starts = {
        "hour": "substr(NEW.finished_at, 1, 13) || ':00:00.000000'",
        "day": "substr(NEW.finished_at, 1, 10) || ' 00:00:00.000000'",
    }
    body = "\n".join(
        f"INSERT INTO grouped_totals ({_COUNTED}, conversions) VALUES ({_values(span, dimension, start)}, 1)"
        f" ON CONFLICT ({_COUNTED}) DO UPDATE SET conversions = conversions + 1;"
        for dimension in reversed(_DIMENSIONS)
        for span, start in starts.items()
    )
    op.execute(f"CREATE TRIGGER conversions_grouped AFTER INSERT ON conversions BEGIN\n{body}\nEND")


def _count_on_postgresql() -> None:
    start = "date_trunc('{span}', NEW.finished_at AT TIME ZONE 'UTC') AT TIME ZONE 'UTC'"
    # Always in this order, so that no two transactions that add one conversion each wait for each other; and what all
    # of them count last, so that they wait for as short a time as may be.
    body = "\n".join(
        f"INSERT INTO grouped_totals ({_COUNTED}, conversions)"
        f" VALUES ({_values(span, dimension, start.format(span=span))}, 1)"
        f" ON CONFLICT ({_COUNTED}) DO UPDATE SET conversions = grouped_totals.conversions + 1;"
        for dimension in reversed(_DIMENSIONS)
        for span in ("hour", "day")
    )
    op.execute(
        "CREATE FUNCTION group_conversion() RETURNS trigger LANGUAGE plpgsql AS $$\n"
        f"BEGIN\n{body}\nRETURN NULL;\nEND\n$$"
    )
    op.execute(
        "CREATE TRIGGER conversions_grouped AFTER INSERT ON conversions"
        " FOR EACH ROW EXECUTE FUNCTION group_conversion()"
    )


def _values(span: str, dimension: str, start: str) -> str:
    word = "''" if dimension == "all" else f"coalesce(NEW.{dimension}, '')"
    return (
        f"'{span}', '{dimension}', {word}, {start}, NEW.status, coalesce(NEW.error_kind, ''),"
        " coalesce(NEW.template, '')"
    )


# Texts


def _index_on_postgresql() -> None:
    """Index every two and three letters in a row, by what every PostgreSQL has: pg_trgm is not on every server."""
    op.execute(
        "CREATE FUNCTION catalog_grams(words text) RETURNS text[] LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$\n"
        "  SELECT array_agg(DISTINCT gram) FROM (\n"
        "    SELECT unnest(ARRAY[letter || next, letter || next || third]) AS gram FROM (\n"
        "      SELECT letter, lead(letter) OVER places AS next, lead(letter, 2) OVER places AS third\n"
        '      FROM unnest(string_to_array(lower(words COLLATE "C"), NULL)) WITH ORDINALITY AS listed (letter, place)\n'
        "      WINDOW places AS (ORDER BY place)\n"
        "    ) AS letters\n"
        "  ) AS grams WHERE gram IS NOT NULL\n"
        "$$"
    )
    for table, column in _SEARCHED:
        # Without a list of what is not sorted in yet, which every search would have to read.
        op.execute(
            f"CREATE INDEX {table}_search ON {table} USING gin (catalog_grams({column})) WITH (fastupdate = off)"
            f" WHERE {column} IS NOT NULL"
        )


def _index_on_sqlite() -> None:
    """Index every three letters in a row; not where SQLite cannot, which is slower there and finds the same."""
    options = {str(row[0]) for row in op.get_bind().exec_driver_sql("PRAGMA compile_options")}
    if sqlite3.sqlite_version_info < (3, 34) or "ENABLE_FTS5" not in options:
        return
    for table, column in _SEARCHED:
        name = f"{table}_search"
        # The texts stay where they are; only which three letters are in which row is kept.
        op.execute(
            f"CREATE VIRTUAL TABLE {name} USING fts5 ({column}, content = '{table}', content_rowid = 'id',"
            " tokenize = 'trigram', detail = none, columnsize = 0)"
        )
        op.execute(f"INSERT INTO {name} (rowid, {column}) SELECT id, {column} FROM {table} WHERE {column} IS NOT NULL")
        add = f"INSERT INTO {name} (rowid, {column}) SELECT NEW.id, NEW.{column} WHERE NEW.{column} IS NOT NULL;"
        forget = (
            f"INSERT INTO {name} ({name}, rowid, {column})"
            f" SELECT 'delete', OLD.id, OLD.{column} WHERE OLD.{column} IS NOT NULL;"
        )
        op.execute(f"CREATE TRIGGER {name}_insert AFTER INSERT ON {table} BEGIN {add} END")
        op.execute(f"CREATE TRIGGER {name}_update AFTER UPDATE OF {column} ON {table} BEGIN {forget} {add} END")
        op.execute(f"CREATE TRIGGER {name}_delete AFTER DELETE ON {table} BEGIN {forget} END")
