import pytest

from tests.contracts.world import World


@pytest.fixture(scope="session")
def world() -> World:
    return World()


@pytest.fixture
def empty(world: World) -> World:
    return world.stage("empty")


@pytest.fixture
def locked(world: World) -> World:
    return world.stage("locked")


@pytest.fixture
def drawn(world: World) -> World:
    return world.stage("drawn")


@pytest.fixture
def published(world: World) -> World:
    return world.stage("published")


@pytest.fixture
def opened(world: World) -> World:
    return world.stage("open")


@pytest.fixture
def paid(world: World) -> World:
    return world.stage("paid")
