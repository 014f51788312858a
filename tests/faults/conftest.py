"""One stack for all tests of faults, and the undisturbed task that every struck one is held against.

It ends with the last of them: while it is there, this process asks its Prefect server.
"""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import temporary_settings

from tests.faults.stack import ROUNDS, Result, StackUnderTest, check, task

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is not a main case is for `make test-faults`: every case is a task on a stack of real servers."""
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("main") is None:
            item.add_marker("faults")


def free_ports() -> dict[str, int]:
    sockets = {name: socket.socket() for name in ("prefect", "store", "chain", "postgres")}
    for one in sockets.values():
        one.bind(("127.0.0.1", 0))
    ports = {name: one.getsockname()[1] for name, one in sockets.items()}
    for one in sockets.values():
        one.close()
    return ports


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StackUnderTest]:
    stack = StackUnderTest(tmp_path_factory.mktemp("faults") / "s", free_ports(), "digits")
    try:
        with temporary_settings(stack.settings()):
            yield stack
    finally:
        stack.down()


@pytest.fixture(scope="package")
def undisturbed(stack: StackUnderTest) -> Result:
    result = stack.finish(stack.begin(task()))
    assert result.refused == []
    assert result.rounds >= ROUNDS
    check(stack, result, result)
    return result
