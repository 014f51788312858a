"""Typed tables of what happened, derived from chain and store; pins of model versions; each start of a step is kept once.

The new tables and columns of a database that has tasks already are filled by `healchain reindex`.

Revision ID: 0002
"""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

WITH_DEFAULTS = {"terms": "", "status": "LOCKED", "reason": ""}
NEW_IN_TASKS: dict[str, Any] = {
    "token": sa.String,
    "reward_wei": sa.String,
    "accuracy_commit": sa.String,
    "deadline_s": sa.BigInteger,
    "published_at": lambda: sa.DateTime(timezone=True),
    "block_number": sa.BigInteger,
    "transaction": sa.String,
    "aggregator": sa.String,
    "required_accuracy_ppm": sa.BigInteger,
    "outcome": sa.String,
    "start": sa.String,
}
NEW_TABLES = (
    "events",
    "registrations",
    "rounds",
    "submissions",
    "votes",
    "model_versions",
    "scores",
    "rewards",
    "slashes",
    "pins",
)
INDEXED = {
    "events": ("task_id",),
    "model_versions": ("task_id", "sha256"),
    "rewards": ("task_id", "account"),
    "pins": ("name",),
}


def upgrade() -> None:
    with op.batch_alter_table("tasks") as tasks:
        for name, default in WITH_DEFAULTS.items():
            tasks.alter_column(name, existing_type=sa.String(), existing_nullable=False, server_default=default)
        for name, kind in NEW_IN_TASKS.items():
            tasks.add_column(sa.Column(name, kind(), nullable=True))
    with op.batch_alter_table("steps") as steps:
        steps.create_unique_constraint("one_start", ["task_id", "round_number", "step", "actor", "started_s"])
    _create_chain_tables()
    _create_record_tables()
    op.create_table(
        "pins",
        sa.Column("id", sa.Integer(), primary_key=True),
        *_texts("name", "version"),
        _moment("pinned_at"),
        _moment("undone_at", nullable=True),
    )
    for table, columns in INDEXED.items():
        for column in columns:
            op.create_index(f"ix_{table}_{column}", table, [column])


def downgrade() -> None:
    for table in NEW_TABLES:
        op.drop_table(table)
    with op.batch_alter_table("steps") as steps:
        steps.drop_constraint("one_start", type_="unique")
    with op.batch_alter_table("tasks") as tasks:
        for name in NEW_IN_TASKS:
            tasks.drop_column(name)
        for name in WITH_DEFAULTS:
            tasks.alter_column(name, existing_type=sa.String(), existing_nullable=False, server_default=None)


def _create_chain_tables() -> None:
    place = ("block_number", "log_index")
    op.create_table(
        "events", *_whole_keys(*place), *_texts("task_id", nullable=True), *_texts("kind", "transaction"), _moment("at"),
        sa.Column("fields", sa.Text(), nullable=False),
    )  # fmt: skip
    op.create_table(
        "rewards", *_whole_keys(*place), *_texts("task_id", nullable=True), *_texts("kind", "account", "recipient"),
        *_texts("token", "amount_wei", "transaction"), _moment("at"),
    )  # fmt: skip
    op.create_table("scores", *_keys("task_id", "miner"), *_texts("score", "transaction"))
    op.create_table("slashes", *_keys("task_id", "aggregator", "offence"), *_texts("amount_wei", "transaction"))


def _create_record_tables() -> None:
    op.create_table(
        "registrations", *_keys("task_id", "miner"), *_texts("encryption_key", "dataset_proof_sha256", nullable=True),
        *_texts("offered_stake_wei", "held_stake_wei", nullable=True), *_wholes("weight"), _flag("is_admitted"),
    )  # fmt: skip
    op.create_table(
        "rounds", *_keys("task_id"), _number(), sa.Column("collected", sa.Integer()), sa.Column("accepted", sa.Integer()),
        *_texts("opening_sha256", "model_sha256", nullable=True), *_wholes("correct", "total", "loss_micro"),
        *_texts("candidate", nullable=True),
    )  # fmt: skip
    op.create_table(
        "submissions", *_keys("task_id"), _number(), *_keys("miner"),
        *_texts("base_model_sha256", "ciphertext_root", "chunks_sha256", "score_commit", nullable=True),
        *_wholes("coordinates", "sample_count"), sa.Column("is_accepted", sa.Boolean()),
    )  # fmt: skip
    op.create_table(
        "votes", *_keys("task_id"), _number(), *_keys("miner"), *_texts("candidate", "reason"),
        sa.Column("accepted", sa.Boolean(), nullable=False),
    )  # fmt: skip
    op.create_table(
        "model_versions", *_keys("version"), *_texts("task_id", "sha256", "uri"),
        sa.Column("round_number", sa.Integer(), nullable=False), *_wholes("correct", "total", nullable=False),
        *_wholes("loss_micro"), *_texts("parent", "transaction", nullable=True), _flag("is_published"),
        _moment("published_at", nullable=True),
    )  # fmt: skip


def _keys(*names: str) -> Sequence[Any]:
    return [sa.Column(name, sa.String(), primary_key=True) for name in names]


def _whole_keys(*names: str) -> Sequence[Any]:
    return [sa.Column(name, sa.BigInteger(), primary_key=True, autoincrement=False) for name in names]


def _number() -> Any:
    return sa.Column("round_number", sa.Integer(), primary_key=True, autoincrement=False)


def _texts(*names: str, nullable: bool = False) -> Sequence[Any]:
    return [sa.Column(name, sa.String(), nullable=nullable) for name in names]


def _wholes(*names: str, nullable: bool = True) -> Sequence[Any]:
    return [sa.Column(name, sa.BigInteger(), nullable=nullable) for name in names]


def _flag(name: str) -> Any:
    return sa.Column(name, sa.Boolean(), nullable=False, server_default=sa.false())


def _moment(name: str, *, nullable: bool = False) -> Any:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)
