"""Add an index for the pages of one batch.

Without it PostgreSQL, which guesses from a sample where a batch lies in time, walked through all attempts to find the
newest of an old batch: 150 ms among a million.

Revision ID: 0009
Revises: 0008
"""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_COLUMNS = ["batch_id", "finished_at", "id"]
_INDEX = "ix_conversions_batch_id_finished_at_id"


def upgrade() -> None:
    """Create the index."""
    op.create_index(op.f(_INDEX), "conversions", _COLUMNS, unique=False)


def downgrade() -> None:
    """Drop it."""
    op.drop_index(op.f(_INDEX), table_name="conversions")
