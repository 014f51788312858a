"""Long waits and repetition on a real stack: no process sleeps through a window, and restarts in between lose nothing."""

import time

import pytest

from blocks import pools
from contracts import bindings
from tests.faults.stack import REWARD_WEI, StackUnderTest, task

pytestmark = [pytest.mark.timeout(1500)]


def test_a_window_is_waited_for_by_a_scheduled_run_through_a_power_cut(stack: StackUnderTest, undisturbed):
    """A miner does not reveal its score: the others' rewards wait for the end of the window, and nobody stands by."""
    # Who is away is asked for a minute; then two are left of its window.
    begun = stack.begin(task(windows__score_reveal_s=180, rounds__attestation_timeout_s=60))
    with stack.fault("reveal.score.*miner-2", "tasks.settle:own_opening", do="wait"):
        stack.await_strike()
        stack.stop("worker-miner-2")
        stack.wait(lambda: pools.look([begun[1]])[begun[1]].state == "Waiting", "the task's run waits")
        stack.power_cut()
    stack.up()
    stack.stop("worker-miner-2")
    result = stack.finish(begun)
    stack.start("worker-miner-2")
    silent = stack.station("miner-2").address
    assert result.status == "PAID"
    assert silent not in result.rewards_wei
    assert sum(result.rewards_wei.values()) == REWARD_WEI
    st = stack.station("publisher")
    settlement = st.chain.contracts().rewards.get_settlement(result.task_id)
    distributed = st.chain.events(result.task_id, bindings.Distributed)
    assert len(distributed) == 1
    assert settlement.is_distributed


def test_tasks_recur_from_the_last_model_one_at_a_time(stack: StackUnderTest, undisturbed):
    from infra import publishing

    home = stack.home("publisher")
    # Its own seed: the same terms would lead to a model that other tests' tasks have published, which is its version then.
    name = publishing.schedule(home, task(name="series", seed=2), cron=None, interval_s=10)
    registry = publishing.publisher_of(home).registry

    def series() -> list[str]:
        return [row.task_id for row in registry.tasks() if row.task_id.startswith("series-")]

    def paid() -> list[str]:
        return [row.task_id for row in registry.tasks() if row.task_id in series() and row.status == "PAID"]

    stack.wait(lambda: len(paid()) >= 2, "two tasks of the series are paid")
    pause(name, True)
    first, second = paid()[:2]
    published = [one for one in registry.versions(first) if one.is_published][-1]
    assert registry.find_task(second).start == published.version
    assert registry.find_task(first).start is None
    begun = [registry.find_task(task_id).published_at for task_id in series()]
    ended = [max(step.started_s for step in registry.steps(task_id)) for task_id in series()]
    assert all(before <= after.timestamp() for before, after in zip(ended, begun[1:], strict=False))
    stack.wait(lambda: len(paid()) == len(series()), "the last one that began is paid")
    count = len(series())
    time.sleep(25)
    assert len(series()) == count
    pause(name, False)
    stack.wait(lambda: len(series()) > count, "it recurs again")
    pause(name, True)
    stack.wait(lambda: len(paid()) == len(series()), "the last one is paid")
    assert stack.index_differences() == {}


def pause(deployment: str, is_paused: bool) -> None:
    """What the switch in the UI does."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name(deployment)
        (client.pause_deployment if is_paused else client.resume_deployment)(found.id)
