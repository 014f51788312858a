"""Rounds over edge devices: experiments, rounds, updates, devices, model versions, tasks, messages, modules and data sets.

Revision ID: 0003
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

INDEXED = {
    "edge_rounds": ("experiment_id", "status"),
    "edge_devices": ("key_sha256",),
    "edge_models": ("experiment_id",),
    "edge_tasks": ("round_id", "proplet_id"),
    "edge_messages": ("sent_at",),
}
TABLES = (
    "edge_experiments", "edge_rounds", "edge_updates", "edge_late_updates", "edge_devices", "edge_models", "edge_tasks",
    "edge_messages", "edge_blobs",
)  # fmt: skip


def upgrade() -> None:
    _create_rounds()
    _create_updates()
    op.create_table(
        "edge_devices", _key("proplet_id"), _text("key_sha256", nullable=True), _text("mqtt_hash", nullable=True),
        _text("namespace"), _long("details"), _text("health"), _moment("registered_at"), _moment("last_beat_at", nullable=True),
    )  # fmt: skip
    op.create_table(
        "edge_models", sa.Column("version", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("parent", sa.Integer()), _text("sha256"), _text("form"), _long("body", nullable=True),
        _text("state_sha256", nullable=True), _long("metrics"), _text("experiment_id", nullable=True),
        sa.Column("round_id", sa.String(), unique=True), _moment("created_at"),
    )  # fmt: skip
    op.create_table(
        "edge_tasks", _key("task_id"), _text("round_id", nullable=True), _text("proplet_id"), _text("name"), _whole("state"),
        _long("start"), _long("results", nullable=True), _long("error"), _moment("created_at"), _moment("changed_at"),
    )  # fmt: skip
    op.create_table(
        "edge_messages", sa.Column("id", sa.Integer(), primary_key=True), _text("topic"), _long("payload"), _moment("made_at"),
        _moment("sent_at", nullable=True),
    )  # fmt: skip
    op.create_table("edge_blobs", _key("kind"), _key("name"), _text("sha256"), _big("size_bytes"))
    for table, columns in INDEXED.items():
        for column in columns:
            op.create_index(f"ix_{table}_{column}", table, [column])


def downgrade() -> None:
    for table in reversed(TABLES):
        op.drop_table(table)


def _create_rounds() -> None:
    op.create_table("edge_experiments", _key("experiment_id"), _text("digest"), _long("request"), _moment("created_at"))
    op.create_table(
        "edge_rounds", _key("round_id"), _text("experiment_id"),
        *(_whole(name) for name in ("number", "base_version", "k_of_n", "timeout_s")), _text("status"), _text("reason"),
        _text("closed_by"), sa.Column("version", sa.Integer()), _long("detail"), _moment("opened_at"), _moment("deadline_at"),
        _moment("closed_at", nullable=True), _moment("completed_at", nullable=True),
    )  # fmt: skip


def _create_updates() -> None:
    op.create_table(
        "edge_updates", _key("round_id"), _key("proplet_id"), _text("digest"), _big("num_samples"), _long("metrics"),
        _long("error"), _text("transport"), _long("body", nullable=True), _text("sha256", nullable=True), _moment("received_at"),
    )  # fmt: skip
    op.create_table(
        "edge_late_updates", _key("round_id"), _key("proplet_id"), _key("digest"), _big("num_samples"), _moment("received_at"),
    )  # fmt: skip


def _key(name: str) -> Any:
    return sa.Column(name, sa.String(), primary_key=True)


def _text(name: str, *, nullable: bool = False) -> Any:
    return sa.Column(name, sa.String(), nullable=nullable)


def _long(name: str, *, nullable: bool = False) -> Any:
    return sa.Column(name, sa.Text(), nullable=nullable)


def _whole(name: str) -> Any:
    return sa.Column(name, sa.Integer(), nullable=False)


def _big(name: str) -> Any:
    return sa.Column(name, sa.BigInteger(), nullable=False)


def _moment(name: str, *, nullable: bool = False) -> Any:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)
