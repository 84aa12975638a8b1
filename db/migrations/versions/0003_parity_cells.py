"""Add the cells of a parity check, and what it ran with.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the table of cells; widen checks and outputs."""
    op.create_table(
        "parity_cells",
        sa.Column("id", _NUMBER, nullable=False),
        sa.Column("parity_check_id", _NUMBER, nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("graph", sa.Text(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("optimization", sa.String(length=32), nullable=False),
        sa.Column("dtype", sa.String(length=32), nullable=False),
        sa.Column("shape", sa.Text(), nullable=False),
        sa.Column("sizes", sa.JSON(), nullable=False),
        sa.Column("verdict", sa.String(length=32), nullable=False),
        sa.Column("output", sa.Text(), nullable=True),
        sa.Column("max_abs_diff", sa.Float(53), nullable=True),
        sa.Column("tolerance", sa.Float(53), nullable=True),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "verdict IN ('verified', 'mismatch', 'unstable', 'not_run')", name=op.f("ck_parity_cells_verdict_known")
        ),
        sa.ForeignKeyConstraint(
            ["parity_check_id"], ["parity_checks.id"], name=op.f("fk_parity_cells_parity_check_id_parity_checks")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_parity_cells")),
        sa.UniqueConstraint("parity_check_id", "position", name=op.f("uq_parity_cells_parity_check_id_position")),
    )
    # No constraint on the last one: SQLite could only add it to a copy, and cannot drop what others refer to.
    for column in (
        sa.Column("session", sa.JSON(), nullable=True),
        sa.Column("device_memory_bytes", sa.BigInteger(), nullable=True),
        sa.Column("environment_id", _NUMBER, nullable=True),
    ):
        op.add_column("parity_checks", column)
    op.create_index(op.f("ix_parity_checks_environment_id"), "parity_checks", ["environment_id"], unique=False)
    op.add_column("parity_outputs", sa.Column("spread", sa.Float(53), nullable=True))


def downgrade() -> None:
    """Remove them."""
    op.drop_index(op.f("ix_parity_checks_environment_id"), table_name="parity_checks")
    op.drop_column("parity_outputs", "spread")
    for name in ("environment_id", "device_memory_bytes", "session"):
        op.drop_column("parity_checks", name)
    op.drop_table("parity_cells")
