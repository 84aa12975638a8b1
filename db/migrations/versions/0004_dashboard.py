"""Add what the dashboard reads: totals that count themselves, and indexes for its listings.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

_WORDS = "task, model_type, status, error_kind, template"

_INDEXES = (
    ("conversions", ["latest", "status", "finished_at"]),
    ("conversions", ["latest", "task", "finished_at"]),
    ("conversions", ["latest", "model_type", "finished_at"]),
    ("conversions", ["latest", "error_kind", "finished_at"]),
    ("conversions", ["batch_id", "status"]),
    ("artifacts", ["quarantined", "size_bytes"]),
)


def upgrade() -> None:
    """Create the totals with what counts them, count what is there, and replace indexes by longer ones.

    Triggers count, so that a worker of an older onnx-ferry that still runs is counted too.
    """
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
        sa.Column("conversions", sa.Integer(), nullable=False),
        sa.CheckConstraint("span IN ('hour', 'day')", name=op.f("ck_conversion_totals_span_known")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_conversion_totals")),
        sa.UniqueConstraint(
            "span",
            "start",
            "task",
            "model_type",
            "status",
            "error_kind",
            "template",
            name=op.f("uq_conversion_totals_counted"),
        ),
    )
    if op.get_bind().dialect.name == "postgresql":
        _count_on_postgresql()
    else:
        _count_on_sqlite()
    for table, columns in _INDEXES:
        op.create_index(_name(table, columns), table, columns, unique=False)
    op.drop_index(op.f("ix_conversions_batch_id"), table_name="conversions")
    op.drop_index(op.f("ix_conversions_latest_status_task"), table_name="conversions")
    longer = ["latest", "status", "task", "finished_at"]
    op.create_index(_name("conversions", longer), "conversions", longer, unique=False)


def downgrade() -> None:
    """Remove the totals, and bring the shorter indexes back."""
    op.drop_index(_name("conversions", ["latest", "status", "task", "finished_at"]), table_name="conversions")
    shorter = ["latest", "status", "task"]
    op.create_index(_name("conversions", shorter), "conversions", shorter, unique=False)
    op.create_index(op.f("ix_conversions_batch_id"), "conversions", ["batch_id"], unique=False)
    for table, columns in reversed(_INDEXES):
        op.drop_index(_name(table, columns), table_name=table)
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP TRIGGER conversions_counted ON conversions")
        op.execute("DROP FUNCTION count_conversion()")
    else:
        op.execute("DROP TRIGGER conversions_counted")
    op.drop_table("conversion_totals")


def _name(table: str, columns: list[str]) -> str:
    return op.f(f"ix_{table}_{'_'.join(columns)}")


def _count_on_sqlite() -> None:
    # The text that SQLAlchemy keeps of a moment, its minutes or hours set to zero.
    starts = {
        "hour": "substr({row}finished_at, 1, 13) || ':00:00.000000'",
        "day": "substr({row}finished_at, 1, 10) || ' 00:00:00.000000'",
    }
    for span, start in starts.items():
        op.execute(_backfill(span, start.format(row="")))
    body = "\n".join(
        f"INSERT INTO conversion_totals (span, start, {_WORDS}, conversions)"
        f" VALUES ('{span}', {start.format(row='NEW.')}, {_values('NEW.')}, 1)"
        f" ON CONFLICT (span, start, {_WORDS}) DO UPDATE SET conversions = conversions + 1;"
        for span, start in starts.items()
    )
    op.execute(f"CREATE TRIGGER conversions_counted AFTER INSERT ON conversions BEGIN\n{body}\nEND")


def _count_on_postgresql() -> None:
    start = "date_trunc('{span}', {row}finished_at AT TIME ZONE 'UTC') AT TIME ZONE 'UTC'"
    for span in ("hour", "day"):
        op.execute(_backfill(span, start.format(span=span, row="")))
    # Always the hour before the day, so that no two transactions that add one conversion each wait for each other.
    body = "\n".join(
        f"INSERT INTO conversion_totals (span, start, {_WORDS}, conversions)"
        f" VALUES ('{span}', {start.format(span=span, row='NEW.')}, {_values('NEW.')}, 1)"
        f" ON CONFLICT (span, start, {_WORDS}) DO UPDATE SET conversions = conversion_totals.conversions + 1;"
        for span in ("hour", "day")
    )
    op.execute(
        "CREATE FUNCTION count_conversion() RETURNS trigger LANGUAGE plpgsql AS $$\n"
        f"BEGIN\n{body}\nRETURN NULL;\nEND\n$$"
    )
    op.execute(
        "CREATE TRIGGER conversions_counted AFTER INSERT ON conversions"
        " FOR EACH ROW EXECUTE FUNCTION count_conversion()"
    )


def _values(row: str) -> str:
    # Two NULLs are not equal to a unique constraint, hence the empty words.
    return (
        f"coalesce({row}task, ''), coalesce({row}model_type, ''), {row}status,"
        f" coalesce({row}error_kind, ''), coalesce({row}template, '')"
    )


def _backfill(span: str, start: str) -> str:
    return (
        f"INSERT INTO conversion_totals (span, start, {_WORDS}, conversions)"
        f" SELECT '{span}', {start}, {_values('')}, count(*) FROM conversions GROUP BY 1, 2, 3, 4, 5, 6, 7"
    )
