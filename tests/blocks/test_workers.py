"""An actor's larger steps run on the Prefect task runner that its block names, or on two threads."""

import pytest
from prefect.task_runners import ThreadPoolTaskRunner
from prefect_dask import DaskTaskRunner

from blocks.workers import Workers, load_workers

ADDRESS = "tcp://scheduler:8786"


def test_without_a_block_an_actor_has_two_threads():
    assert load_workers("nobody") == Workers()
    runner = load_workers("nobody").task_runner()
    assert isinstance(runner, ThreadPoolTaskRunner)
    assert runner._max_workers == 2


def test_a_saved_block_decides_for_its_actor_alone():
    Workers(runner="prefect_dask.DaskTaskRunner", options={"address": ADDRESS}).save("somebody-workers", overwrite=True)
    runner = load_workers("somebody").task_runner()
    assert isinstance(runner, DaskTaskRunner)
    assert runner.address == ADDRESS
    assert load_workers("nobody") == Workers()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"runner": "prefect_dusk.DaskTaskRunner"}, "runner = 'prefect_dusk.DaskTaskRunner': No module named"),
        ({"runner": "prefect.task_runners.Fast"}, "has no attribute 'Fast'"),
        ({"runner": "threads"}, "runner = 'threads'"),
        ({"runner": "json.JSONDecoder"}, "not a Prefect task runner"),
        ({"options": {"workers": 2}}, "options = {'workers': 2}: "),
    ],
)
def test_workers_that_cannot_be_are_refused_by_field(fields, reason):
    with pytest.raises(ValueError, match=r"options|runner") as refused:
        Workers(**fields).task_runner()
    assert reason in str(refused.value)
