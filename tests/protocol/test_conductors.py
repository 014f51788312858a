"""Who conducts a task, and which task a schedule begins: one run at a time, and none is left behind by a run that died."""

import fcntl
import threading
from collections.abc import Callable
from contextlib import suppress
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, StateType
from prefect.states import Cancelled, Completed, Crashed, Failed, Paused, Pending, Running, Scheduled

from blocks import pools
from blocks.connections import connections_of
from blocks.object_store import StoreUnavailable
from contracts.bindings import Status
from deployments import register
from flows.protocol import run_task
from infra import publishing
from infra.step_process import RETRIES
from tasks import conductors, dispatch, publish
from tasks.conductors import hold, next_in_series, who_conducts
from tasks.dispatch import Conductor, NotSettled, conclude, conduct
from tests.protocol.world import TASK_ID, World


@flow(name="conducting")
def conducting() -> None:
    """What the runs below are runs of."""


def a_run(state: State) -> str:
    """The id of a run in this state."""
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(conducting)
        client.set_flow_run_state(run.id, state, force=True)
    return str(run.id)


def put(run_id: str, state: State) -> None:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(UUID(run_id), state, force=True)


def begun(world: World, run_id: str, task_id: str) -> tuple[str, str]:
    """The task that a scheduled run conducts, and why it is none."""
    st = world.station("publisher")
    chosen, spec, reason = next_in_series(st, world.registry, run_id, task_id, world.file.spec())
    assert not chosen or spec == world.file.spec()
    return chosen, reason


@pytest.fixture(autouse=True)
def _one_process_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conductors, "_held", {})


def test_of_two_late_runs_one_begins_a_task_and_the_other_names_it(world_after, monkeypatch):
    a_run(Running())  # the test server is there before two threads want it
    together, both_decided = threading.Barrier(2), threading.Barrier(2)
    honest, chosen = conductors.follow_chain, []

    def meeting(*given):
        with suppress(threading.BrokenBarrierError):
            together.wait(0.5)  # both are here at once, unless one decides after the other
        honest(*given)

    @flow
    def late(world: World) -> None:
        chosen.append(conduct("publisher", "", world.file.spec(), follow_on=True)[0])
        both_decided.wait(250)

    monkeypatch.setattr(conductors, "follow_chain", meeting)
    world = world_after(None)
    threads = [threading.Thread(target=late, args=(world,), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(280)
    assert sorted(map(bool, chosen)) == [False, True]


def test_a_run_that_begins_again_goes_on_with_its_own_task_and_another_waits(world_after):
    world = world_after(None)
    first, second = a_run(Running()), a_run(Running())
    assert begun(world, first, "series-1") == ("series-1", "")
    conductors._held.clear()  # its process was killed before anything was published
    put(first, Scheduled())
    assert begun(world, second, "series-2") == (
        "",
        f"task series-1 is conducted by run {first}, which is Scheduled",
    )
    assert begun(world, first, "series-1") == ("series-1", "")


@pytest.mark.parametrize("state", [Running(), Pending(), Paused(), Scheduled()], ids=lambda state: state.name)
def test_a_task_whose_conductor_lives_is_left_to_it(world_after, state):
    world = world_after("publish")
    conductor = a_run(state)
    assert hold(world.station("publisher").me, TASK_ID, conductor) == ""
    reason = f"task {TASK_ID} is conducted by run {conductor}, which is {state.name}"
    assert begun(world, a_run(Running()), "series-2") == ("", reason)
    with pytest.raises(ValueError, match=f"{reason}: leave it, or cancel"):
        publishing.resume(world.stack.homes["publisher"], TASK_ID)


@pytest.mark.parametrize(
    "state", [Failed(), Cancelled(), Crashed(), Completed(), None], ids=lambda state: state.name if state else "deleted"
)
def test_a_task_whose_conductor_is_gone_is_ended_before_the_next_begins(world_after, state):
    world = world_after("publish")
    me = world.station("publisher").me
    conductor = str(uuid4()) if state is None else a_run(state)
    hold(me, TASK_ID, conductor)
    conductors._held.clear()
    later = a_run(Running())
    assert begun(world, later, "series-2") == (TASK_ID, "")
    # Should the dead run be retried, it finds that it was replaced.
    assert later in who_conducts(me, TASK_ID, conductor)


def test_a_process_that_outlives_its_run_still_conducts(world_after):
    world = world_after("publish")
    me = world.station("publisher").me
    conductor = a_run(Running())
    hold(me, TASK_ID, conductor)
    conductors._held.clear()
    put(conductor, Cancelled())
    with conductors._lock_path(me, TASK_ID).open("a") as process:
        fcntl.flock(process, fcntl.LOCK_EX)
        assert begun(world, a_run(Running()), "series-2")[1].endswith(
            "whose process is at work though the run has ended"
        )
        with pytest.raises(conductors.StillConducted, match="an earlier process"):
            hold(me, TASK_ID, conductor)
    assert begun(world, a_run(Running()), "series-2") == (TASK_ID, "")


def test_a_task_that_was_never_locked_holds_nobody_up(world_after):
    world = world_after(None)
    failed = a_run(Running())
    assert begun(world, failed, "series-1") == ("series-1", "")
    conductors._held.clear()
    put(failed, Failed())
    assert begun(world, a_run(Running()), "series-2") == ("series-2", "")


@pytest.fixture
def on_pools() -> Callable[[World], None]:
    """Give the publisher hosts to ask, of which there are none."""

    def connect(world: World) -> None:
        register.register_pools()
        me = world.station("publisher").me
        connections_of(me).model_copy(update={"uses_pools": True}).pin(me)

    return connect


def test_a_task_that_two_runs_were_started_for_has_one_conductor(world_after, on_pools):
    world = world_after("publish")
    on_pools(world)
    me = world.station("publisher").me
    first = a_run(Running())
    assert hold(me, TASK_ID, first) == ""
    assert run_task(world.file.spec(), task_id=TASK_ID) == "SKIPPED"
    assert hold(me, TASK_ID, first) == ""


def test_a_locked_reward_that_nothing_can_come_of_goes_back_and_the_series_goes_on(world_after, on_pools, monkeypatch):
    """Its conductor died between lock and announcement, and the validation set is gone: only the refund is left."""
    world = world_after(None)
    on_pools(world)
    st = world.station("publisher")
    before_wei = world.contracts.escrow.get_task(TASK_ID).reward_wei
    with monkeypatch.context() as broken:
        broken.setattr(type(st.store), "post", lambda *_: (_ for _ in ()).throw(StoreUnavailable("the store is away")))
        with pytest.raises(StoreUnavailable):
            publish.lock_reward.fn(TASK_ID, world.file.spec(), "publisher")
    conductors._append(st.me, f"series/{world.file.name}", TASK_ID)
    hold(st.me, TASK_ID, str(uuid4()))
    conductors._held.clear()
    st.me.data_path().unlink()
    locked = world.contracts.escrow.get_task(TASK_ID)
    assert (before_wei, locked.status) == (0, Status.LOCKED)
    st.chain.wait_until(locked.terms.deadline_s + 1, "the deadline")
    ended = run_task(world.file.spec(), follow_on=True, return_state=True)
    assert ended.result() == "REFUNDED"
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(ended.state_details.flow_run_id).name == TASK_ID
    assert begun(world, a_run(Running()), "series-2") == ("series-2", "")


def test_an_unfinished_task_is_not_called_concluded(world_after):
    world = world_after("publish")
    st = world.station("publisher")
    world.follow("publish")
    for uses_pools in (False, True):
        dispatch._conductor.set(Conductor("publisher", st, world.registry, uses_pools))
        if not uses_pools:
            assert conclude(TASK_ID) == "OPEN"
            continue
        with pytest.raises(NotSettled, match="is OPEN, neither PAID nor REFUNDED"):
            conclude(TASK_ID)


def test_only_the_publisher_of_an_overdue_task_declares_it_over(world_after):
    world = world_after("publish")
    deadline_s = world.contracts.escrow.get_task(TASK_ID).terms.deadline_s
    st = world.station("publisher")
    st.chain.wait_until(deadline_s + 1, "the deadline")
    assert dispatch._is_overdue(Conductor("publisher", st, world.registry, True), TASK_ID)
    assert not dispatch._is_overdue(Conductor("miner-1", world.station("miner-1"), world.registry, True), TASK_ID)


def test_a_task_whose_run_failed_is_resumed_by_a_command(world_after, on_pools):
    world = world_after("publish")
    on_pools(world)
    entry = {"name": "publisher", "entrypoint": "flows.protocol.run_task", "work_pool": {"name": "publisher"}}
    register._register(entry)
    me, home = world.station("publisher").me, world.stack.homes["publisher"]
    hold(me, TASK_ID, a_run(Failed()))
    conductors._held.clear()
    run_id = publishing.resume(home, TASK_ID)
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(run_id)
    assert run.name == TASK_ID
    assert run.parameters["spec"] == world.file.spec().model_dump(mode="json")
    assert run.parameters["task_id"] == TASK_ID
    assert hold(me, TASK_ID, str(run_id)) == ""
    with pytest.raises(LookupError, match="'of-nobody': its terms are not in"):
        publishing.resume(home, "of-nobody")
    pools.take_back(pools.look([run_id])[run_id], "the test is over")


def test_a_task_that_is_over_is_not_resumed(world_after):
    world = world_after("publish")
    st = world.station("publisher")
    st.chain.wait_until(world.contracts.escrow.get_task(TASK_ID).terms.deadline_s + 1, "the deadline")
    world.do("refund", "publisher")
    with pytest.raises(ValueError, match="is REFUNDED: nothing of it is left to do"):
        publishing.resume(world.stack.homes["publisher"], TASK_ID)


def test_a_step_that_failed_at_every_retry_is_asked_for_again_when_its_task_is_resumed(world_after, monkeypatch):
    world = world_after("publish")
    begun_keys: list[str] = []

    def start(*_, key, **__):
        """A server on which the first runs of the step have failed, one for each retry of two conductors."""
        begun_keys.append(key)
        kind = StateType.FAILED if len(begun_keys) <= 2 * (RETRIES + 1) else StateType.SCHEDULED
        return pools.StepRun(uuid4(), kind, kind.value, "", 0)

    monkeypatch.setattr(pools, "start", start)
    me = Conductor("publisher", world.station("publisher"), world.registry, True)
    asked = dispatch.Asked(world.registry.find_actor("miner-1"), "collect", TASK_ID, 1, {})
    assert dispatch._started(me, asked, dispatch.IN_VAIN).kind is StateType.SCHEDULED
    assert len(set(begun_keys)) == len(begun_keys)
