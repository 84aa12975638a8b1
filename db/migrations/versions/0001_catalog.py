"""Create the catalog.

Revision ID: 0001
Revises:
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# A migration is history, so types and words are spelled out here instead of being imported from the models.
# SQLite numbers rows by itself only for a column whose type is exactly INTEGER.
_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create all tables and indexes."""
    op.create_table(
        "artifacts",
        sa.Column("id", _NUMBER, nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("quarantined", sa.Boolean(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("length(sha256) = 64", name=op.f("ck_artifacts_sha256_digest")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_artifacts")),
        sa.UniqueConstraint("sha256", name=op.f("uq_artifacts_sha256")),
    )
    op.create_table(
        "batches",
        sa.Column("id", _NUMBER, nullable=False),
        sa.Column("engine", sa.String(length=32), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("converted", sa.Integer(), nullable=True),
        sa.Column("reused", sa.Integer(), nullable=True),
        sa.Column("failed", sa.Integer(), nullable=True),
        sa.Column("mismatch", sa.Integer(), nullable=True),
        sa.CheckConstraint("engine IN ('prefect', 'local')", name=op.f("ck_batches_engine_known")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batches")),
    )
    op.create_index(op.f("ix_batches_started_at"), "batches", ["started_at"], unique=False)
    op.create_table(
        "environments",
        sa.Column("id", _NUMBER, nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("versions", sa.JSON(), nullable=False),
        sa.CheckConstraint("length(sha256) = 64", name=op.f("ck_environments_sha256_digest")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_environments")),
        sa.UniqueConstraint("sha256", name=op.f("uq_environments_sha256")),
    )
    op.create_table(
        "source_models",
        sa.Column("id", _NUMBER, nullable=False),
        sa.Column("model_id", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_source_models")),
        sa.UniqueConstraint("model_id", name=op.f("uq_source_models_model_id")),
    )
    op.create_table(
        "artifact_files",
        sa.Column("id", _NUMBER, nullable=False),
        sa.Column("artifact_id", _NUMBER, nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.CheckConstraint("length(sha256) = 64", name=op.f("ck_artifact_files_sha256_digest")),
        sa.ForeignKeyConstraint(
            ["artifact_id"], ["artifacts.id"], name=op.f("fk_artifact_files_artifact_id_artifacts")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_artifact_files")),
        sa.UniqueConstraint("artifact_id", "path", name=op.f("uq_artifact_files_artifact_id_path")),
    )
    op.create_table(
        "graphs",
        sa.Column("id", _NUMBER, nullable=False),
        sa.Column("artifact_id", _NUMBER, nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("opset", sa.Integer(), nullable=False),
        sa.Column("nodes", sa.Integer(), nullable=False),
        sa.Column("nodes_before_simplify", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["artifact_id"], ["artifacts.id"], name=op.f("fk_graphs_artifact_id_artifacts")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_graphs")),
        sa.UniqueConstraint("artifact_id", "role", name=op.f("uq_graphs_artifact_id_role")),
    )
    op.create_table(
        "revisions",
        sa.Column("id", _NUMBER, nullable=False),
        sa.Column("source_model_id", _NUMBER, nullable=False),
        sa.Column("revision", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["source_model_id"], ["source_models.id"], name=op.f("fk_revisions_source_model_id_source_models")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_revisions")),
        sa.UniqueConstraint("source_model_id", "revision", name=op.f("uq_revisions_source_model_id_revision")),
    )
    op.create_table(
        "conversions",
        sa.Column("id", _NUMBER, nullable=False),
        sa.Column("key", sa.String(length=64), nullable=True),
        sa.Column("subject", sa.String(length=64), nullable=False),
        sa.Column("latest", sa.Boolean(), nullable=False),
        sa.Column("source_model_id", _NUMBER, nullable=False),
        sa.Column("requested_revision", sa.Text(), nullable=True),
        sa.Column("revision_id", _NUMBER, nullable=True),
        sa.Column("environment_id", _NUMBER, nullable=False),
        sa.Column("artifact_id", _NUMBER, nullable=True),
        sa.Column("batch_id", _NUMBER, nullable=True),
        sa.Column("status", sa.String(length=32), nullable=False),
        sa.Column("task", sa.Text(), nullable=True),
        sa.Column("task_family", sa.Text(), nullable=True),
        sa.Column("model_type", sa.Text(), nullable=True),
        sa.Column("architecture", sa.Text(), nullable=True),
        sa.Column("template", sa.String(length=32), nullable=True),
        sa.Column("simplified", sa.Boolean(), nullable=False),
        sa.Column("options", sa.JSON(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("peak_rss_bytes", sa.BigInteger(), nullable=True),
        sa.Column("notes", sa.JSON(), nullable=False),
        sa.Column("error_kind", sa.String(length=32), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("error_step", sa.String(length=32), nullable=True),
        sa.Column("error_reproduce", sa.Text(), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "error_kind IN ('bad_input', 'not_found', 'network', 'unsupported', 'export_failed', 'runtime_failed',"
            " 'mismatch', 'out_of_memory', 'timeout', 'crashed', 'store', 'catalog', 'internal')",
            name=op.f("ck_conversions_error_kind_known"),
        ),
        sa.CheckConstraint(
            "error_step IN ('fetch', 'detect', 'export', 'simplify', 'parity', 'register')",
            name=op.f("ck_conversions_error_step_known"),
        ),
        sa.CheckConstraint(
            "status <> 'failed' OR error_kind IS NOT NULL", name=op.f("ck_conversions_failed_has_error")
        ),
        sa.CheckConstraint(
            "status IN ('converted', 'reused', 'mismatch', 'failed')", name=op.f("ck_conversions_status_known")
        ),
        sa.CheckConstraint(
            "status NOT IN ('converted', 'reused') OR (artifact_id IS NOT NULL AND error_kind IS NULL)",
            name=op.f("ck_conversions_done_has_artifact"),
        ),
        sa.CheckConstraint("template IN ('traced', 'reused', 'direct')", name=op.f("ck_conversions_template_known")),
        sa.CheckConstraint(
            "(error_kind IS NULL) = (error_message IS NULL) AND (error_kind IS NULL) = (error_step IS NULL)"
            " AND (error_kind IS NULL) = (error_reproduce IS NULL)",
            name=op.f("ck_conversions_error_whole"),
        ),
        sa.CheckConstraint("attempts >= 1", name=op.f("ck_conversions_attempts_positive")),
        sa.CheckConstraint("length(key) = 64", name=op.f("ck_conversions_key_digest")),
        sa.CheckConstraint("length(subject) = 64", name=op.f("ck_conversions_subject_digest")),
        sa.ForeignKeyConstraint(["artifact_id"], ["artifacts.id"], name=op.f("fk_conversions_artifact_id_artifacts")),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name=op.f("fk_conversions_batch_id_batches")),
        sa.ForeignKeyConstraint(
            ["environment_id"], ["environments.id"], name=op.f("fk_conversions_environment_id_environments")
        ),
        sa.ForeignKeyConstraint(["revision_id"], ["revisions.id"], name=op.f("fk_conversions_revision_id_revisions")),
        sa.ForeignKeyConstraint(
            ["source_model_id"], ["source_models.id"], name=op.f("fk_conversions_source_model_id_source_models")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_conversions")),
    )
    op.create_index(op.f("ix_conversions_artifact_id"), "conversions", ["artifact_id"], unique=False)
    op.create_index(op.f("ix_conversions_batch_id"), "conversions", ["batch_id"], unique=False)
    op.create_index(op.f("ix_conversions_finished_at"), "conversions", ["finished_at"], unique=False)
    op.create_index(op.f("ix_conversions_key_id"), "conversions", ["key", "id"], unique=False)
    op.create_index(op.f("ix_conversions_latest_finished_at"), "conversions", ["latest", "finished_at"], unique=False)
    op.create_index(
        op.f("ix_conversions_latest_status_task"), "conversions", ["latest", "status", "task"], unique=False
    )
    op.create_index(
        op.f("ix_conversions_source_model_id_finished_at"),
        "conversions",
        ["source_model_id", "finished_at"],
        unique=False,
    )
    op.create_index(op.f("ix_conversions_status_finished_at"), "conversions", ["status", "finished_at"], unique=False)
    op.create_index(op.f("ix_conversions_subject_latest"), "conversions", ["subject", "latest"], unique=False)
    op.create_index(op.f("ix_conversions_task_finished_at"), "conversions", ["task", "finished_at"], unique=False)
    op.create_table(
        "graph_tensors",
        sa.Column("id", _NUMBER, nullable=False),
        sa.Column("graph_id", _NUMBER, nullable=False),
        sa.Column("direction", sa.String(length=32), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("dtype", sa.Text(), nullable=False),
        sa.Column("shape", sa.JSON(), nullable=False),
        sa.CheckConstraint("direction IN ('input', 'output')", name=op.f("ck_graph_tensors_direction_known")),
        sa.ForeignKeyConstraint(["graph_id"], ["graphs.id"], name=op.f("fk_graph_tensors_graph_id_graphs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_graph_tensors")),
        sa.UniqueConstraint(
            "graph_id", "direction", "position", name=op.f("uq_graph_tensors_graph_id_direction_position")
        ),
    )
    op.create_table(
        "parity_checks",
        sa.Column("id", _NUMBER, nullable=False),
        sa.Column("conversion_id", _NUMBER, nullable=False),
        sa.Column("verdict", sa.String(length=32), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("shapes", sa.Integer(), nullable=False),
        sa.Column("max_abs_diff", sa.Float(53), nullable=True),
        sa.Column("tolerance", sa.Float(53), nullable=True),
        sa.Column("axes_proven", sa.JSON(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.Column("checked_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "verdict IN ('verified', 'mismatch', 'unstable', 'not_run')", name=op.f("ck_parity_checks_verdict_known")
        ),
        sa.ForeignKeyConstraint(
            ["conversion_id"], ["conversions.id"], name=op.f("fk_parity_checks_conversion_id_conversions")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_parity_checks")),
    )
    op.create_index(op.f("ix_parity_checks_conversion_id"), "parity_checks", ["conversion_id"], unique=False)
    op.create_table(
        "step_timings",
        sa.Column("id", _NUMBER, nullable=False),
        sa.Column("conversion_id", _NUMBER, nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("step", sa.String(length=32), nullable=False),
        sa.Column("seconds", sa.Float(53), nullable=False),
        sa.CheckConstraint(
            "step IN ('fetch', 'detect', 'export', 'simplify', 'parity', 'register')",
            name=op.f("ck_step_timings_step_known"),
        ),
        sa.ForeignKeyConstraint(
            ["conversion_id"], ["conversions.id"], name=op.f("fk_step_timings_conversion_id_conversions")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_step_timings")),
        sa.UniqueConstraint("conversion_id", "step", name=op.f("uq_step_timings_conversion_id_step")),
    )
    op.create_table(
        "parity_outputs",
        sa.Column("id", _NUMBER, nullable=False),
        sa.Column("parity_check_id", _NUMBER, nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("max_abs_diff", sa.Float(53), nullable=False),
        sa.Column("tolerance", sa.Float(53), nullable=False),
        sa.ForeignKeyConstraint(
            ["parity_check_id"], ["parity_checks.id"], name=op.f("fk_parity_outputs_parity_check_id_parity_checks")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_parity_outputs")),
        sa.UniqueConstraint("parity_check_id", "position", name=op.f("uq_parity_outputs_parity_check_id_position")),
    )


def downgrade() -> None:
    """Drop all tables; their indexes go with them."""

    op.drop_table("parity_outputs")
    op.drop_table("step_timings")
    op.drop_table("parity_checks")
    op.drop_table("graph_tensors")
    op.drop_table("conversions")
    op.drop_table("revisions")
    op.drop_table("graphs")
    op.drop_table("artifact_files")
    op.drop_table("source_models")
    op.drop_table("environments")
    op.drop_table("batches")
    op.drop_table("artifacts")
