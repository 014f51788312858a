"""What a worker takes from a server, and what it refuses; the rest is shown on a real stack (tests/faults)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.exceptions import ParameterTypeError

from infra import worker
from infra.step_process import ENTRYPOINTS, actor_of, flow_of, why_not
from infra.worker import HealChainWorker, HomeInUse, homes_here, is_alive, process_name
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


def test_a_process_is_known_by_more_than_its_number():
    me = process_name(os.getpid())
    boot, pid, started = me.split(":")
    assert is_alive(me)
    assert not is_alive(f"{boot}:{pid}:{int(started) + 1}")
    assert not is_alive(f"{'0' * len(boot)}:{pid}:{started}")
    ended = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = process_name(ended.pid)
    assert is_alive(name)
    ended.communicate()
    assert not is_alive(name)


@pytest.mark.parametrize("name", ["", "1234", "a:b:c", "::", "host:1", "boot:-1:1"])
def test_what_names_no_process_is_not_alive(name):
    assert not is_alive(name)


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
    assert set(ENTRYPOINTS) == {*STEPS, "run-task"}
    for name in ENTRYPOINTS:
        assert flow_of(name).name == name
        assert flow_of(name).fn.__module__.startswith("flows.")


@pytest.mark.parametrize("name", ENTRYPOINTS)
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
