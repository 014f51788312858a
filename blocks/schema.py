"""The registry's schema: brought to this version when a database is opened, by the steps in blocks/migrations/versions.

A database of before these steps were kept (its tables, and no table `alembic_version`) is taken as FIRST and goes on from there:
nothing that is in it is lost. One process migrates at a time, in one transaction, so that a kill leaves the schema as it was.

Errors: UnknownSchema.
"""

from importlib.resources import files
from typing import Any

from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import DBAPIError

FIRST, HEAD = "0001", "0005"
MIGRATION_LOCK = 0x4865616C  # PostgreSQL's advisory lock of whoever migrates


class UnknownSchema(ValueError):
    """The database is of a version that this program does not know."""


def bring_up_to_date(engine: Engine, revision: str = HEAD) -> None:
    """Give the database the schema of a revision, an older one included. Raises UnknownSchema for one made by a newer program."""
    with engine.connect() as connection:
        if _revision(connection) == revision:
            return
    with engine.connect() as connection:
        _wait_for_turn(connection)
        _migrate(connection, revision)
        connection.commit()


def _revision(connection: Connection) -> str | None:
    """The revision that the database says it has; None when it says nothing."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _wait_for_turn(connection: Connection) -> None:
    """Begin a transaction that no other process that migrates has at the same time."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))


def _migrate(connection: Connection, revision: str) -> None:
    from alembic import command
    from alembic.script import ScriptDirectory

    found = _revision(connection)
    known = {script.revision for script in ScriptDirectory.from_config(_config(connection)).walk_revisions()}
    if found is not None and found not in known:
        raise UnknownSchema(
            f"registry {shown_url(connection.engine)}: its schema is {found}, this program knows {', '.join(sorted(known))}. "
            "Use the newer HealChain that made it, or name another database as registry.url and fill it by healchain reindex"
        )
    if found is None and inspect(connection).has_table("tasks"):
        command.stamp(_config(connection), FIRST)
        found = FIRST
    change = command.downgrade if (found or "") > revision else command.upgrade
    change(_config(connection), revision)


def _config(connection: Connection) -> Any:
    """Alembic's settings, without a file of their own; the steps run on this connection."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(files("blocks") / "migrations"))
    config.attributes["connection"] = connection
    return config


def shown_url(engine: Engine) -> str:
    """The database's address without its password."""
    return engine.url.render_as_string(hide_password=True)


# What a PostgreSQL server says that is stopping, starting or not there; a wrong password or database is none of these.
AWAY = (
    "connection refused",
    "no such file or directory",
    "is starting up",
    "is shutting down",
    "in recovery mode",
    "not yet accepting connections",
    "terminating connection",
    "server closed the connection",
    "connection timeout",
    "connection is closed",
    "connection is lost",
)


def is_away(error: DBAPIError) -> bool:
    """Whether the server went away or is not back yet, so that the same work can be tried again."""
    return error.connection_invalidated or any(sign in str(error.orig).lower() for sign in AWAY)
