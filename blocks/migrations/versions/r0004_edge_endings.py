"""Rounds over edge devices: which experiments are over, the names of their rounds, since when a clock runs, what was dropped.

Revision ID: 0004
"""

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

LATE, DROPPED = "edge_late_updates", "edge_dropped_updates"
ENDED = ("COMPLETED", "COMPLETED_WITH_WARNING", "FAILED")


def upgrade() -> None:
    _add("edge_experiments", first_round=sa.String(), rounds=sa.Integer(), series=sa.String())
    with op.batch_alter_table("edge_experiments") as experiments:
        experiments.add_column(sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index("ix_edge_experiments_first_round", "edge_experiments", ["first_round"])
    op.create_index("ix_edge_experiments_series", "edge_experiments", ["series"])
    op.create_index("ix_edge_experiments_ended_at", "edge_experiments", ["ended_at"])
    with op.batch_alter_table("edge_rounds") as rounds:
        rounds.add_column(sa.Column("started_at", sa.DateTime(timezone=True), nullable=True))
    op.execute("UPDATE edge_rounds SET started_at = opened_at")
    op.rename_table(LATE, DROPPED)
    _add(DROPPED, sha256=sa.String(), size_bytes=sa.BigInteger(), reason=sa.String())
    op.create_index("ix_edge_updates_sha256", "edge_updates", ["sha256"])
    _fill_experiments()


def downgrade() -> None:
    op.drop_index("ix_edge_updates_sha256", "edge_updates")
    with op.batch_alter_table(DROPPED) as dropped:
        for name in ("sha256", "size_bytes", "reason"):
            dropped.drop_column(name)
    op.rename_table(DROPPED, LATE)
    with op.batch_alter_table("edge_rounds") as rounds:
        rounds.drop_column("started_at")
    for name in ("first_round", "series", "ended_at"):
        op.drop_index(f"ix_edge_experiments_{name}", "edge_experiments")
    with op.batch_alter_table("edge_experiments") as experiments:
        for name in ("first_round", "rounds", "series", "ended_at"):
            experiments.drop_column(name)


def _add(table: str, **kinds: Any) -> None:
    """Columns that are never empty. Rows that are there get 0 or an empty text; later ones have no default."""
    with op.batch_alter_table(table) as changed:
        for name, kind in kinds.items():
            empty = "" if isinstance(kind, sa.String) else "0"
            changed.add_column(sa.Column(name, kind, nullable=False, server_default=empty))
    with op.batch_alter_table(table) as changed:
        for name, kind in kinds.items():
            changed.alter_column(name, existing_type=kind, existing_nullable=False, server_default=None)


def _fill_experiments() -> None:
    """From what was asked, and from how their rounds stand."""
    here = op.get_bind()
    for name, request in here.execute(sa.text("SELECT experiment_id, request FROM edge_experiments")).all():
        asked = json.loads(request)
        rows = here.execute(sa.text("SELECT status FROM edge_rounds WHERE experiment_id = :name"), {"name": name}).all()
        many = asked.get("rounds") or 1
        filled = {"name": name, "first": asked.get("round_id") or name, "many": many}
        here.execute(
            sa.text("UPDATE edge_experiments SET first_round = :first, rounds = :many WHERE experiment_id = :name"),
            filled,
        )
        if len(rows) >= many and all(status in ENDED for (status,) in rows):
            last = "(SELECT MAX(completed_at) FROM edge_rounds WHERE experiment_id = :name)"
            here.execute(
                sa.text(f"UPDATE edge_experiments SET ended_at = {last} WHERE experiment_id = :name"), {"name": name}
            )
