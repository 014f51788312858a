"""Alembic's entry: run the steps on the connection, and within the transaction, that blocks.schema opened."""

from alembic import context
from sqlmodel import SQLModel

from blocks import tables as tables  # the models of the newest revision

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=SQLModel.metadata,
    render_as_batch=True,  # SQLite changes a table by copying it
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
