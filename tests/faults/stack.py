"""A real stack for the tests of faults: started once, struck, and looked at after each task.

Every part is a process of its own under supervisord, as `make stack` starts them. What is checked after a task comes from
the chain, the store and the index, and is compared with the undisturbed task before it.
"""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from minio import Minio
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL

from blocks.connections import connections_of
from blocks.identity import Identity
from contracts import bindings
from contracts.messages import Cohort, RoundResult
from contracts.task_spec import TaskFile
from infra import supervision
from tasks import index
from tasks.cohort import trusted_cohort
from tasks.records import Station
from tests.protocol.world import TERMS

REWARD_WEI = 1_000_000_000_000_000_007
TASKS = 100  # more than all tests publish
MINERS = 5
ROUNDS = 2
SITE = Path(__file__).parent / "site"
COMMAND = [sys.executable, "-m", "infra.cli"]
TASK_S = 600  # longest time of one task, however busy the machine


@dataclass(frozen=True)
class Result:
    """What a task came to. sent: how many transactions of each kind each account made."""

    task_id: str
    status: str
    reason: str
    model_sha256: str | None
    rewards_wei: dict[str, int]
    sent: Counter[tuple[str, str]]
    rounds: int
    refused: list[tuple[int, str, str, str]]


class StackUnderTest:
    """A running stack with the hook of `site/sitecustomize.py` in its Python processes."""

    def __init__(self, folder: Path, ports: dict[str, int], task: str) -> None:
        self.folder, self.ports, self.task = folder, ports, task
        self.site = folder.with_name(f"{folder.name}-site")
        shutil.copytree(SITE, self.site, dirs_exist_ok=True)
        self.up()
        funded = ("--folder", str(folder), "--wei", str(TASKS * REWARD_WEI))
        self.healchain("stack", "fund", self.station("publisher").address, *funded)

    def up(self) -> None:
        flags = [part for name, port in self.ports.items() for part in (f"--{name}-port", str(port))]
        self.healchain("stack", "up", "--folder", str(self.folder), "--task", self.task, *flags)

    def settings(self) -> dict[Any, Any]:
        """How this process finds the stack's Prefect server."""
        login = (self.folder / "prefect-login").read_text().strip()
        return {
            PREFECT_API_URL: f"http://127.0.0.1:{self.ports['prefect']}/api",
            PREFECT_API_AUTH_STRING: login,
        }

    def down(self) -> None:
        self.healchain("stack", "down", "--folder", str(self.folder))

    def healchain(self, *arguments: str) -> str:
        paths = [str(self.site), str(Path(__file__).parents[2])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_HOME"):
            environment.pop(name, None)
        done = subprocess.run(
            [*COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=TASK_S, check=False
        )
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def home(self, actor: str) -> Path:
        return self.folder / "actors" / actor

    def station(self, actor: str) -> Station:
        me = Identity(home=str(self.home(actor)))
        pinned = connections_of(me)
        return Station(me, pinned.chain, pinned.store)

    # Faults

    @contextmanager
    def fault(self, process: str, call: str, *, do: str, nth: int = 1, when: str = "before") -> Iterator[None]:
        """While it holds, the first step's process of this name that comes to this call is struck; once."""
        attrgetter(call.partition(":")[2])(importlib.import_module(call.partition(":")[0]))  # there is such a call
        for name in ("struck", "go"):
            (self.site / name).unlink(missing_ok=True)
        fault = {"process": process, "call": call, "nth": nth, "when": when, "do": do}
        (self.site / "fault.json").write_text(json.dumps(fault))
        try:
            yield
        finally:
            (self.site / "go").touch()
            (self.site / "fault.json").unlink()

    def await_strike(self) -> None:
        """Return when the fault has struck."""
        self.wait(lambda: (self.site / "struck").exists(), "the fault has struck")

    def go_on(self) -> None:
        (self.site / "go").touch()

    def wait(self, is_so: Any, what: str, within_s: float = TASK_S) -> None:
        ends = time.monotonic() + within_s
        while not is_so():
            assert time.monotonic() < ends, f"waited {within_s} s in vain: {what}"
            time.sleep(0.1)

    def pid(self, part: str) -> int:
        return next(one.pid for one in supervision.statuses(self.folder) if one.name == part)

    def kill(self, part: str) -> None:
        """kill -9 of a part with everything that it started; supervisord starts it again, as a host's init would."""
        os.killpg(os.getpgid(self.pid(part)), signal.SIGKILL)

    def power_cut(self) -> None:
        """Everything at once, supervisord first, so that nothing is started again."""
        os.kill(int((self.folder / "supervisord.pid").read_text()), signal.SIGKILL)
        supervision.end_orphans(self.folder)

    def stop(self, part: str) -> None:
        supervision._supervisor(self.folder).stopProcess(part)

    def start(self, part: str) -> None:
        supervision.run(self.folder, part)

    # Tasks

    def begin(self, file: TaskFile) -> tuple[str, Any]:
        """Submit a task as the publisher would; its id and the id of its run."""
        from infra import publishing

        return publishing.submit(self.home("publisher"), file)

    def finish(self, begun: tuple[str, Any]) -> Result:
        """Wait for the end of the task's run, and look at what it came to."""
        from blocks import pools

        task_id, run_id = begun
        self.wait(lambda: pools.look([run_id])[run_id].has_ended, f"{task_id} ends")
        run = pools.look([run_id])[run_id]
        assert run.is_done, f"{run.state}: {run.message}"
        return self.result(task_id)

    def result(self, task_id: str) -> Result:
        st = self.station("publisher")
        registry = connections_of(st.me).registry
        assert registry is not None
        row = registry.find_task(task_id)
        assert row is not None
        claimed = st.chain.events(task_id, bindings.RewardClaimed)
        credited = st.chain.events(task_id, bindings.RewardCredited)
        rewards: Counter[str] = Counter()
        for event in claimed:
            rewards[event.miner] += event.amount_wei
        for event in credited:
            rewards[event.account] += event.amount_wei
        published = st.chain.events(task_id, bindings.BlockPublished)
        return Result(
            task_id=task_id,
            status=row.status,
            reason=row.reason,
            model_sha256=published[0].model_sha256 if published else None,
            rewards_wei=dict(rewards),
            sent=Counter((one.kind, one.sender) for one in st.chain.transactions(task_id)),
            rounds=len(registry.records(task_id, RoundResult.__name__)),
            refused=[(one.round_number, one.step, one.actor, one.reason) for one in registry.refusals(task_id)],
        )

    def state_of_run(self, name: str) -> str:
        """The state of the run with this name, as the scheduler has it."""
        with get_client(sync_client=True) as client:
            [run] = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])))
        return str(run.state_name)

    def cohort(self, task_id: str) -> Cohort:
        return trusted_cohort(self.station("publisher"), task_id)

    def steps(self, task_id: str) -> list[Any]:
        """The steps that have ended, as the index has them."""
        registry = connections_of(self.station("publisher").me).registry
        assert registry is not None
        return list(registry.steps(task_id))

    # What must hold whenever nothing is under way

    def orphans(self) -> list[str]:
        """Blobs in the store that no record names, directly or through a list that a record names."""
        store = self.station("publisher").store
        blobs, said = {}, ""
        for key in self._keys():
            owner, kind, rest = key.split("/", 2)
            if kind == "blobs":
                blobs["0x" + rest.rpartition("/")[2]] = owner
            elif (data := store.find(owner, rest)) is not None:
                said += data.decode()
        named = {digest for digest in blobs if digest in said}
        lists = b"".join(store.get(blobs[digest], digest) for digest in named if _is_list(store, blobs[digest], digest))
        return sorted(set(blobs) - named - {digest for digest in blobs if bytes.fromhex(digest[2:]) in lists})

    def objects(self) -> Minio:
        """The store, as who administers it."""
        plan = json.loads((self.folder / "stack.json").read_text())
        address = f"127.0.0.1:{self.ports['store']}"
        return Minio(address, access_key="healchain", secret_key=plan["store_password"], secure=False)

    def _keys(self) -> list[str]:
        keys = (found.object_name or "" for found in self.objects().list_objects("healchain", recursive=True))
        return [key for key in keys if re.match(r"0x[0-9a-f]{40}/(blobs|records)/", key)]

    def index_differences(self) -> dict[str, tuple[int, int]]:
        """Tables of the index that a rebuild from chain and store gives otherwise: rows before and after."""
        from blocks.tables import INDEX

        st = self.station("publisher")
        registry = connections_of(st.me).registry
        assert registry is not None
        before = {table.__name__: registry.rows(table) for table in INDEX}
        index.reindex(registry, st.chain, st.store, st.address, lambda *_: None)
        after = {table.__name__: registry.rows(table) for table in INDEX}
        return {name: (len(before[name]), len(after[name])) for name in before if before[name] != after[name]}


def task(**changes: object) -> TaskFile:
    """Two rounds of the test task; a change is named section__field."""
    fields = tomllib.loads(TERMS)
    fields["name"] = "faults"
    fields["rounds"] = {"max_rounds": 6, "contribution_timeout_s": 240, "attestation_timeout_s": 240}
    fields["compression"]["density"] = 1.0
    fields["required_accuracy"] = 0.70  # after the first round it is 0.64
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        (fields[section] if section else fields)[field] = value
    return TaskFile.model_validate(fields)


def check_alone(stack: StackUnderTest, result: Result) -> None:
    """The task was paid to the wei, each transaction was sent once, and nothing is left behind."""
    assert result.status == "PAID"
    assert sum(result.rewards_wei.values()) == REWARD_WEI
    assert len(result.rewards_wei) == MINERS
    assert max(result.sent[kind, sender] for kind, sender in result.sent if kind in ("revealScore", "claimTo")) == 1
    assert stack.index_differences() == {}
    assert stack.orphans() == []


def check(stack: StackUnderTest, result: Result, undisturbed: Result) -> None:
    """The struck task came to what the undisturbed one came to."""
    check_alone(stack, result)
    assert result.model_sha256 == undisturbed.model_sha256
    kinds = Counter(kind for kind, _ in result.sent.elements())
    assert kinds == Counter(kind for kind, _ in undisturbed.sent.elements())


def _is_list(store: Any, owner: str, digest: str) -> bool:
    """Manifests are small; ciphertexts and models are named by them or by records."""
    return len(store.get(owner, digest)) < 1 << 20
