"""The S3 server of the whole run."""

from collections.abc import Iterator

import pytest

from tests.blocks.object_server import ObjectServer


@pytest.fixture(scope="session")
def object_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    server = ObjectServer(tmp_path_factory.mktemp("objects"))
    yield server
    server.kill()
