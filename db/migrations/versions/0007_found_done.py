"""Add what batches found done, which the totals count too, and the nodes of graphs by operator.

Revision ID: 0007
Revises: 0006
"""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

_WORDS = "task, model_type, status, error_kind, template"
_GROUPED = "span, dimension, word, start, status, error_kind, template"


def upgrade() -> None:
    """Create the table with what counts it, and widen the graphs.

    What batches before this found done is only known as a number, and stays uncounted.
    """
    op.create_table(
        "found_done",
        sa.Column("id", _NUMBER, nullable=False),
        sa.Column("batch_id", _NUMBER, nullable=False),
        sa.Column("conversion_id", _NUMBER, nullable=False),
        sa.Column("status", sa.String(length=32), nullable=False),
        sa.Column("found_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "status IN ('converted', 'reused', 'mismatch', 'failed')", name=op.f("ck_found_done_status_known")
        ),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name=op.f("fk_found_done_batch_id_batches")),
        sa.ForeignKeyConstraint(
            ["conversion_id"], ["conversions.id"], name=op.f("fk_found_done_conversion_id_conversions")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_found_done")),
    )
    op.create_index(op.f("ix_found_done_batch_id_status"), "found_done", ["batch_id", "status"], unique=False)
    if op.get_bind().dialect.name == "postgresql":
        _count_on_postgresql()
    else:
        _count_on_sqlite()
    for name in ("operators", "operators_before_simplify"):
        op.add_column("graphs", sa.Column(name, sa.JSON(), nullable=True))


def downgrade() -> None:
    """Remove them; what was counted stays counted."""
    for name in ("operators_before_simplify", "operators"):
        op.drop_column("graphs", name)
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP TRIGGER found_done_counted ON found_done")
        op.execute("DROP FUNCTION count_found_done()")
    else:
        op.execute("DROP TRIGGER found_done_counted")
    op.drop_table("found_done")


def _count_on_sqlite() -> None:
    starts = {
        "hour": "substr(NEW.found_at, 1, 13) || ':00:00.000000'",
        "day": "substr(NEW.found_at, 1, 10) || ' 00:00:00.000000'",
    }
    body = "\n".join(line for span, start in starts.items() for line in _counting(span, start))
    op.execute(f"CREATE TRIGGER found_done_counted AFTER INSERT ON found_done BEGIN\n{body}\nEND")


def _count_on_postgresql() -> None:
    start = "date_trunc('{span}', NEW.found_at AT TIME ZONE 'UTC') AT TIME ZONE 'UTC'"
    # The hour before the day, as the trigger on conversions has it, so that no two wait for each other.
    body = "\n".join(line for span in ("hour", "day") for line in _counting(span, start.format(span=span)))
    op.execute(
        "CREATE FUNCTION count_found_done() RETURNS trigger LANGUAGE plpgsql AS $$\n"
        f"BEGIN\n{body}\nRETURN NULL;\nEND\n$$"
    )
    op.execute(
        "CREATE TRIGGER found_done_counted AFTER INSERT ON found_done FOR EACH ROW EXECUTE FUNCTION count_found_done()"
    )


def _counting(span: str, start: str) -> Iterator[str]:
    # A failure that was found again is no further failure, and what it once took is counted where it happened.
    found = "FROM conversions AS c WHERE c.id = NEW.conversion_id AND NEW.status = 'reused'"
    yield (
        f"INSERT INTO conversion_totals (span, start, {_WORDS}, conversions)"
        f" SELECT '{span}', {start}, coalesce(c.task, ''), coalesce(c.model_type, ''), NEW.status, '', '', 1 {found}"
        f" ON CONFLICT (span, start, {_WORDS}) DO UPDATE SET conversions = conversion_totals.conversions + 1;"
    )
    words = {"model_type": "coalesce(c.model_type, '')", "task": "coalesce(c.task, '')", "all": "''"}
    for dimension, word in words.items():
        yield (
            f"INSERT INTO grouped_totals ({_GROUPED}, conversions)"
            f" SELECT '{span}', '{dimension}', {word}, {start}, NEW.status, '', '', 1 {found}"
            f" ON CONFLICT ({_GROUPED}) DO UPDATE SET conversions = grouped_totals.conversions + 1;"
        )
