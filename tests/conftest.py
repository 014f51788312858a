"""One temporary Prefect server for the whole run, and hypothesis without deadlines (the first call compiles)."""

import os
import secrets
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PREFECT_HOME = tempfile.TemporaryDirectory(prefix="healchain-prefect-")
os.environ["PREFECT_HOME"] = _PREFECT_HOME.name
os.environ.pop("PREFECT_API_URL", None)
# Three workers, of which one often waits, on two cores: more threads in each would only get in the way of the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] = "true"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "120"
os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"

import pytest
from hypothesis import settings

from infra import postgres

# Files of minutes, before the many of seconds: no worker is left alone with one of them at the end.
LONGEST = (
    "tests/faults/",
    "tests/protocol/test_resume.py",
    "tests/protocol/test_run.py",
    "tests/infra/test_joining.py",
)

settings.register_profile("numba", deadline=None)
settings.load_profile("numba")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first; otherwise as they were found."""

    def turn(item: pytest.Item) -> int:
        return next((place for place, path in enumerate(LONGEST) if item.nodeid.startswith(path)), len(LONGEST))

    items.sort(key=turn)


@pytest.fixture(scope="session", autouse=True)
def _without_heartbeats() -> Iterator[None]:
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


class Postgres:
    """A PostgreSQL server of this run's own, as the stack starts it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.password, self.data = secrets.token_hex(8), folder / "data"
        postgres.initialise(self.data, self.password)
        self.start()

    def start(self) -> None:
        # It is killed, but its machine is not: what it wrote stays without waiting for the disk.
        fast = ["-c", "fsync=off", "-c", "full_page_writes=off"]
        postgres.forget_dead(self.data)
        command = [*postgres.program(self.data, self.port).command, *fast]
        self.process = subprocess.Popen(command, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not postgres.answers(self.port, self.password):
            assert self.process.poll() is None, "PostgreSQL ended at its start"
            time.sleep(0.05)

    def kill(self) -> None:
        """kill -9 of the server, and wait until its own processes have noticed and ended."""
        parents = {path: path.read_text().rpartition(")")[2].split()[1] for path in Path("/proc").glob("[0-9]*/stat")}
        self.process.kill()
        self.process.wait()
        for path in (path for path, parent in parents.items() if parent == str(self.process.pid)):
            while path.exists():
                time.sleep(0.01)

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://{postgres.USER}:{self.password}@127.0.0.1:{self.port}/{database}"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    with tempfile.TemporaryDirectory(prefix="healchain-pg-", ignore_cleanup_errors=True) as folder:
        server = Postgres(Path(folder))
        yield server
        server.process.send_signal(signal.SIGQUIT)  # ends at once; nothing in it is needed again
        server.process.wait()


@pytest.fixture
def postgres_url(postgres_server: Postgres) -> str:
    """The address of an empty database."""
    name = f"test_{secrets.token_hex(6)}"
    postgres.make_databases(postgres_server.port, postgres_server.password, (name,))
    return postgres_server.url(name)


@pytest.fixture(scope="session")
def prefect_home() -> Path:
    """Where the test run's Prefect server keeps its database and its results."""
    return Path(_PREFECT_HOME.name)
