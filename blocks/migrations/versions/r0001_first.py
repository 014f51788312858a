"""Tasks, signed records, refusals, steps and actors.

Revision ID: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "actors",
        sa.Column("name", sa.String(), primary_key=True),
        sa.Column("address", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
    )
    op.create_index("ix_actors_address", "actors", ["address"])
    op.create_index("ix_actors_role", "actors", ["role"])
    op.create_table(
        "tasks",
        sa.Column("task_id", sa.String(), primary_key=True),
        *(
            sa.Column(name, sa.String(), nullable=False)
            for name in ("publisher", "spec_hash", "terms", "status", "reason")
        ),
    )
    op.create_table(
        "records",
        sa.Column("task_id", sa.String(), primary_key=True),
        sa.Column("round_number", sa.Integer(), primary_key=True),
        *(sa.Column(name, sa.String(), primary_key=True) for name in ("kind", "signer", "path")),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("message", sa.String(), nullable=False),
    )
    op.create_table(
        "refusals",
        sa.Column("task_id", sa.String(), primary_key=True),
        sa.Column("round_number", sa.Integer(), primary_key=True),
        sa.Column("step", sa.String(), primary_key=True),
        sa.Column("actor", sa.String(), primary_key=True),
        sa.Column("reason", sa.String(), nullable=False),
    )
    op.create_table(
        "steps",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("task_id", sa.String(), nullable=False),
        sa.Column("round_number", sa.Integer(), nullable=False),
        sa.Column("step", sa.String(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("started_s", sa.Float(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("outcome", sa.String(), nullable=False),
        sa.Column("detail", sa.String(), nullable=False),
    )
    op.create_index("ix_steps_task_id", "steps", ["task_id"])


def downgrade() -> None:
    for table in ("steps", "refusals", "records", "tasks", "actors"):
        op.drop_table(table)
