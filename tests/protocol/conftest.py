"""Worlds that stand after a step: each is made once, from the latest one before it, and copied for every test."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from contracts.task_spec import TaskFile
from tests.protocol.world import ORDER, World, reopen, task_file

_snapshots: dict[str, dict[str, Path]] = {}


def snapshot(folder: Path, file: TaskFile, step: str) -> Path:
    """The folder of a closed world in which everybody has done `step`."""
    made = _snapshots.setdefault(file.model_dump_json(), {})
    if step not in made:
        earlier = [done for done in ORDER[: ORDER.index(step)] if done in made]
        if earlier:
            world = reopen(made[earlier[-1]], folder, file).through(step, after=earlier[-1])
        else:
            world = World(folder, file).through(step)
        world.close()
        made[step] = folder
    return made[step]


@pytest.fixture
def world_after(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., World]]:
    """`world_after("submit")`: a world in which everybody has done that step; None: nobody anything."""
    open_worlds: list[World] = []

    def build(step: str | None, **changes: Any) -> World:
        file = task_file(**changes)
        target = tmp_path_factory.mktemp("world") / "run"
        if step is None:
            world = World(target, file)
        else:
            world = reopen(snapshot(tmp_path_factory.mktemp("snapshot") / "run", file, step), target, file)
        open_worlds.append(world)
        return world

    yield build
    for world in open_worlds:
        world.close()
