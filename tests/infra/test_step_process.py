"""A task's run is put off after a fault that may pass, a bounded number of times; any other error ends it at once."""

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import Abort
from prefect.states import Failed, Running, Scheduled
from requests import ConnectionError as HttpConnectionError

from blocks import pools
from infra import step_process
from infra.step_process import FIRST_PAUSE_S, LONGEST_PAUSE_S, RETRIES, patient
from tasks.dispatch import NotSettled, StepFailed


@flow(name="run-task")
def conducting() -> None:
    """What the runs below are runs of."""


@pytest.fixture
def run() -> FlowRun:
    with get_client(sync_client=True) as client:
        made = client.create_flow_run(conducting)
        client.set_flow_run_state(made.id, Running(), force=True)
    return made


@pytest.fixture(autouse=True)
def _signals_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_process.signal, "signal", lambda *_: None)


def attempt(run: FlowRun, fault: Exception, name: str = "run-task") -> None:
    """What the run's process does with a body that ends so."""

    @flow(name=name)
    def body() -> None:
        raise fault

    patient(body, run, "publisher").fn()


def put(run: FlowRun, *states: object) -> None:
    with get_client(sync_client=True) as client:
        for state in states:
            client.set_flow_run_state(run.id, state, force=True)


@pytest.mark.parametrize("fault", [OSError("disk full"), StepFailed("Crashed"), NotSettled("is OPEN")], ids=repr)
def test_a_task_goes_on_later_after_a_fault_that_may_pass(run, fault):
    with pytest.raises(Abort, match=f"attempt 1 of {RETRIES + 1}: {type(fault).__name__}: {fault}"):
        attempt(run, fault)
    seen = pools.look([run.id])[run.id]
    assert (seen.state, seen.has_ended) == ("AwaitingRetry", False)
    assert 0 < seen.due_in_s <= FIRST_PAUSE_S + 1


def test_a_fault_that_stays_fails_the_task_in_the_end(run):
    for _ in range(RETRIES):
        with pytest.raises(Abort):
            attempt(run, OSError("the store is away"))
    assert pools.look([run.id])[run.id].due_in_s <= LONGEST_PAUSE_S + 1
    with pytest.raises(OSError, match="the store is away"):
        attempt(run, OSError("the store is away"))
    put(run, Failed(), Running())  # somebody retries it
    with pytest.raises(Abort, match="attempt 1 of"):
        attempt(run, OSError("the store is away"))
    put(run, Scheduled(name=pools.WAITING), Running())  # it has come to a distant moment meanwhile
    assert pools.retries(run.id) == 0


def test_an_error_that_waiting_does_not_mend_ends_a_task_at_once(run):
    with pytest.raises(ValueError, match="terms"):
        attempt(run, ValueError("the terms"))
    assert not pools.retries(run.id)


def test_a_step_alone_is_not_put_off(run):
    with pytest.raises(OSError, match="disk full"):
        attempt(run, OSError("disk full"), "contribute")


def test_the_address_of_a_node_is_in_no_state(run):
    with pytest.raises(Abort, match=r"ConnectionError: no answer$"):
        attempt(run, HttpConnectionError("https://node.example/v3/4f1d"))
    assert "4f1d" not in pools.look([run.id])[run.id].message
