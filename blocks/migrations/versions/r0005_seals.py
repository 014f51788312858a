"""Counters of sealed messages, so that an older one of a device is not taken again.

Revision ID: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

COUNTERS = ("words_counter", "updates_counter")


def upgrade() -> None:
    with op.batch_alter_table("edge_devices") as devices:
        for name in COUNTERS:
            devices.add_column(sa.Column(name, sa.BigInteger(), nullable=False, server_default="0"))


def downgrade() -> None:
    with op.batch_alter_table("edge_devices") as devices:
        for name in COUNTERS:
            devices.drop_column(name)
