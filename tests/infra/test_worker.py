"""What a worker takes from a server, and what it refuses; the rest is shown on a real stack (tests/faults)."""

import asyncio
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import ParameterTypeError
from prefect.flow_engine import FlowRunEngine
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Pending, Running, Scheduled

from blocks.pools import WAITING
from infra import worker
from infra.at_work import actor_of, mark_of, process_name
from infra.step_process import ENTRYPOINTS, flow_of, run_step, why_not
from infra.worker import HealChainWorker, HomeInUse, homes_here
from tasks.dispatch import STEPS
from tests.protocol.world import task_file


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return settle(tmp_path / "miner-1", "miner-1", monkeypatch)


def settle(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder.mkdir(parents=True)
    (folder / "connections.json").write_text(json.dumps({"name": name}))
    monkeypatch.setenv("HEALCHAIN_HOME", str(folder))
    return folder


def test_a_host_has_one_home_or_a_folder_of_them(home, monkeypatch):
    assert homes_here() == {"miner-1": home}
    second = settle(home.with_name("second"), "miner-2", monkeypatch)
    monkeypatch.setenv("HEALCHAIN_HOME", str(home.parent))
    assert homes_here() == {"miner-1": home, "miner-2": second}


def test_a_folder_without_a_home_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HEALCHAIN_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"HEALCHAIN_HOME = .*: no connections.json .*; run healchain join"):
        homes_here()


def test_a_queue_without_a_home_here_is_refused(home):
    with pytest.raises(ValueError, match="--work-queue miner-9: no home of this name here; there are miner-1"):
        HealChainWorker("miners", ["miner-9"])


def test_a_worker_serves_its_homes_when_no_queue_is_named(home):
    assert HealChainWorker("miners")._work_queues == {"miner-1"}


def test_a_miner_serves_both_pools_and_a_publisher_its_own(home):
    assert HealChainWorker("miners")._pools == ("miners", "aggregators")
    assert HealChainWorker("publisher")._pools == ("publisher",)


def test_one_worker_holds_a_home(home):
    held = worker._lock(home, "miner-1")
    with pytest.raises(HomeInUse, match=f"miner-1 is served by process {os.getpid()} already"):
        worker._lock(home, "miner-1")
    held.close()
    worker._lock(home, "miner-1").close()


@pytest.mark.parametrize("flow", ["", "os.system", "flows.miner.contribute", "contribute ", "prefect"])
def test_a_flow_that_is_no_step_is_refused(flow):
    assert "is no step of the protocol" in why_not(flow, {"actor": "miner-1"}, {"miner-1": "/home"})


@pytest.mark.parametrize("parameters", [{"actor": "miner-2"}, {"publisher": "other"}, {}])
def test_a_step_of_somebody_else_is_refused(parameters):
    assert "does not live on this host; here is miner-1" in why_not("contribute", parameters, {"miner-1": "/home"})


def test_an_own_step_is_taken():
    assert why_not("contribute", {"actor": "miner-1"}, {"miner-1": "/home"}) == ""
    assert why_not("run-task", {"publisher": "publisher"}, {"publisher": "/home"}) == ""


def test_names_lead_to_flows_of_this_package_alone():
    assert set(ENTRYPOINTS) == {*STEPS, "run-task", "edge-experiment", "edge-retry", "edge-series"}
    for name in ENTRYPOINTS:
        assert flow_of(name).name == name
        assert flow_of(name).fn.__module__.startswith("flows.")


@pytest.mark.parametrize("name", [*STEPS, "run-task"])  # the others take no task
@pytest.mark.parametrize("task_id", ["../../x", "a/../../x", "/etc/x", "task-1\n", "..", ".ab", "Task", "a" * 65])
def test_a_task_id_that_is_none_reaches_no_path(name, task_id):
    """Ids become names of folders in homes and of records in the store."""
    parameters = {"task_id": task_id, "round_number": 1, "actor": "miner-1"}
    spec = task_file().spec().model_dump(mode="json")
    if name == "publish":
        parameters |= {"spec": spec}
    elif name == "run-task":
        parameters = {"task_id": task_id, "spec": spec, "publisher": "miner-1"}
    assert flow_of(name).validate_parameters({**parameters, "task_id": "task-1"})
    with pytest.raises(ParameterTypeError, match=r"task_id: String should match pattern"):
        flow_of(name).validate_parameters(parameters)


def test_a_whole_task_is_its_publishers():
    assert actor_of({"publisher": "clinic"}) == "clinic"
    assert actor_of({"actor": "miner-1", "publisher": "clinic"}) == "miner-1"


def test_the_worker_itself_loads_nothing_that_a_step_needs():
    """So that it stays small, and what a step needs is loaded in the process that the steps are forked from."""
    loaded = "import sys, infra.worker; print(sorted({'torch', 'numba', 'web3', 'flows'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What ends a step, and what becomes of its run. The processes are those of a worker: forked from one that has loaded all.


@flow(name="withdraw")
def lasting(task_id: str, round_number: int, actor: str) -> None:
    """A step that says that it began, and ends when it is killed."""
    Path(task_id).touch()
    time.sleep(300)


def begin(run_id: str, home: str, server: str, *, is_struck_early: bool = False) -> None:
    """In a child: the step, with another body. is_struck_early: SIGTERM comes while Prefect's engine starts."""
    ENTRYPOINTS["withdraw"] = "tests.infra.test_worker.lasting"
    honest = FlowRunEngine.begin_run

    def struck(engine: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return honest(engine)

    if is_struck_early:
        FlowRunEngine.begin_run = struck  # type: ignore[method-assign]
    with temporary_settings({PREFECT_API_URL: server}):
        run_step(run_id, {"miner-1": home}, str(mark_of(Path(home), UUID(run_id))))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A Prefect server that other processes find, too."""
    started = SubprocessASGIServer()
    started.start()
    with temporary_settings({PREFECT_API_URL: started.api_url}):
        yield started.api_url


@pytest.fixture
def given_out(server: str, tmp_path: Path) -> UUID:
    """A run that a worker has taken. Its step touches the file `began`."""
    parameters = {"task_id": str(tmp_path / "began"), "round_number": 0, "actor": "miner-1"}
    with get_client(sync_client=True) as client:
        return client.create_flow_run(lasting, parameters=parameters, state=Pending()).id


@pytest.fixture
def start(server: str, home: Path, given_out: UUID) -> Iterator[Callable[..., Any]]:
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["infra.step_process"])
    started: list[Any] = []

    def start(**how: bool) -> Any:
        started.append(forkserver.Process(target=begin, args=(str(given_out), str(home), server), kwargs=how))
        started[-1].start()
        return started[-1]

    yield start
    for child in started:
        child.kill()
        child.join()


def state_of(run_id: UUID) -> Any:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run_id).state


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 250
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)


@pytest.mark.parametrize("is_struck_early", [True, False], ids=["before the body", "in the body"])
def test_a_step_that_is_told_to_end_leaves_its_run_to_be_given_back(start, given_out, tmp_path, is_struck_early):
    """As by a power cut: whatever Prefect's engine would say of it, its next worker says."""
    child = start(is_struck_early=is_struck_early)
    if not is_struck_early:
        wait_for(tmp_path / "began")
        child.terminate()
    child.join(250)
    assert child.exitcode == -signal.SIGKILL
    assert state_of(given_out).type is StateType.RUNNING
    assert (tmp_path / "began").exists() is not is_struck_early


def test_a_run_whose_process_the_server_does_not_know_is_at_work_and_once(start, given_out, home, tmp_path):
    """A worker was killed between the start of its child and the note of it at the server."""
    first = start()
    wait_for(tmp_path / "began")
    with get_client(sync_client=True) as client:
        seen = client.read_flow_run(given_out)
    assert not seen.infrastructure_pid
    assert HealChainWorker("miners")._is_at_work(seen)  # so the next worker leaves it at work; should it not:
    (tmp_path / "began").unlink()
    second = start()
    wait_for(tmp_path / "began")
    assert first.exitcode == -signal.SIGKILL
    assert mark_of(home, given_out).read_text() == process_name(second.pid)


@pytest.mark.parametrize("state", [Completed(), Scheduled(name="Waiting")], ids=["ended", "put off"])
def test_what_the_process_before_has_ended_or_put_off_is_not_begun(given_out, home, state):
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(given_out, state, force=True)
    run_step(str(given_out), {"miner-1": str(home)}, str(mark_of(home, given_out)))
    assert state_of(given_out).name == state.name
    assert not mark_of(home, given_out).exists()


# Deaths


def put(run_id: UUID, *states: State[Any]) -> None:
    with get_client(sync_client=True) as client:
        for state in states:
            client.set_flow_run_state(run_id, state, force=True)


def look_for_dead(run_id: UUID) -> State[Any]:
    """What a worker makes of a run whose process is gone."""

    async def look() -> None:
        miner = HealChainWorker("miners", name="host")
        async with get_client() as miner._client:
            await miner._try_to_give_back(await miner.client.read_flow_run(run_id), "its process is gone")

    asyncio.run(look())
    return state_of(run_id)


@pytest.fixture
def restarts(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(worker, "RESTARTS", 3)
    return 3


def test_a_run_that_waited_often_outlives_a_death(home, given_out, restarts):
    """Each wait for chain time is a beginning, and none of them is a death."""
    for _ in range(restarts + 2):
        put(given_out, Running(), Scheduled(name=WAITING))
    put(given_out, Running())
    assert look_for_dead(given_out).name == "AwaitingRetry"


def test_a_run_that_dies_each_time_is_left_as_crashed(home, given_out, restarts):
    for _ in range(restarts):
        put(given_out, Running())
        assert look_for_dead(given_out).name == "AwaitingRetry"
    put(given_out, Running())
    crashed = look_for_dead(given_out)
    assert crashed.type is StateType.CRASHED
    assert crashed.message.startswith(f"died {restarts + 1} times in a row, at last: its process is gone; ")
    put(given_out, Scheduled(), Running())  # somebody has it tried again
    assert look_for_dead(given_out).name == "AwaitingRetry"
