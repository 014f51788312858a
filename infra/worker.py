"""The worker of an actor's host: `prefect worker start --type healchain --pool miners --work-queue NAME`.

It runs the steps of this installed package, for the actors whose homes are on this host, and nothing else. A process
worker runs whatever command, environment and code the server names for a run; whoever can write there would own every
hospital's host. Of what the server says, this one uses the id of a run, its flow's name and its parameters.

Steps run in children forked from a process that has imported everything: a step begins in a tenth of a second. A run whose
process is gone (killed, or ended with the host) is given back to its queue, at the start and from then on. A child outlives
a worker that is killed: the next one leaves it at work (infra.at_work).
"""

import fcntl
import importlib
import json
import multiprocessing
import os
from datetime import datetime, timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TextIO
from uuid import UUID

import anyio
import anyio.abc
import httpx
from anyio.to_thread import run_sync
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterNextScheduledStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
    WorkQueueFilter,
    WorkQueueFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import WorkerFlowRunResponse
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_HOME
from prefect.states import Scheduled
from prefect.workers.base import BaseJobConfiguration, BaseWorker, BaseWorkerResult

from infra import at_work

SERVED_TOGETHER = {"miners": ("miners", "aggregators")}
"""A miner that is drawn does the aggregator's steps as well: its worker serves its queue in both pools."""
RESTARTS = 10
GIVEN_BACK = "given back by"
LONGEST_PAUSE_S = 60.0
TERMINATED = -15


class HomeInUse(RuntimeError):
    """Another worker serves this home."""


class StepProcess(BaseWorkerResult):
    """How the process of a step ended. identifier: see `at_work.process_name`."""


def homes_here() -> dict[str, Path]:
    """The homes on this host by actor: HEALCHAIN_HOME, or the folder above PREFECT_HOME; one home, or a folder of them."""
    folder = Path(os.environ.get("HEALCHAIN_HOME") or PREFECT_HOME.value().parent)
    found = (
        [folder]
        if (folder / "connections.json").exists()
        else sorted(p.parent for p in folder.glob("*/connections.json"))
    )
    if not found:
        raise ValueError(
            f"HEALCHAIN_HOME = {folder}: no connections.json there or one folder below; run healchain join"
        )
    return {_name_of(home): home for home in found}


def _name_of(home: Path) -> str:
    """Read as it stands: the worker itself uses no key, no chain and no store, and loads nothing of them."""
    path = home / "connections.json"
    try:
        return str(json.loads(path.read_text())["name"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not what was written: run healchain join again, or restore it") from None


class HealChainWorker(BaseWorker[BaseJobConfiguration, Any, StepProcess]):
    """Runs steps of the installed package in forked children."""

    type = "healchain"
    job_configuration = BaseJobConfiguration
    _description = "Runs the steps of HealChain for the actors of a host; takes no command and no code from the server."
    _display_name = "HealChain"

    def __init__(self, work_pool_name: str, *args: Any, **options: Any) -> None:
        super().__init__(work_pool_name, *args, **{**options, "create_pool_if_not_found": False})
        self._homes = homes_here()
        self._work_queues = self._work_queues or set(self._homes)
        if unknown := sorted(self._work_queues - set(self._homes)):
            raise ValueError(
                f"--work-queue {unknown[0]}: no home of this name here; there are {', '.join(self._homes)}"
            )
        self._locks: list[TextIO] = []
        self._pools = SERVED_TOGETHER.get(work_pool_name, (work_pool_name,))
        self._looks_closely = True
        self._children: dict[UUID, ForkServerProcess] = {}
        self._forkserver = multiprocessing.get_context("forkserver")
        self._forkserver.set_forkserver_preload(["infra.step_process", "infra.step_warmth"])

    async def setup(self) -> None:
        for name in sorted(self._work_queues):
            self._locks.append(_lock(self._homes[name], name))
            at_work.forget_ended(self._homes[name])
        # Nothing of the server's own code loading is inherited: the first child would wait for these imports.
        await run_sync(self._warm_up)
        await super().setup()

    def _warm_up(self) -> None:
        """Have the first child look whether the homes can be used. Raises ValueError."""
        answer, said = self._forkserver.Pipe(duplex=False)
        homes = {name: str(self._homes[name]) for name in sorted(self._work_queues)}
        process = self._forkserver.Process(target=_look_at, args=(homes, said))
        process.start()
        said.close()
        process.join()
        if not answer.poll():
            raise ValueError(f"the process that looks at the homes ended with code {process.exitcode}")
        if problem := answer.recv():
            raise ValueError(problem)

    async def sync_with_backend(self) -> None:
        """Say that this host is there, in every pool that it serves, and give back what died."""
        self._looks_closely = True  # the server takes a queue that nobody looks into for a minute as unserved
        await super().sync_with_backend()
        for pool in self._pools:
            if pool != self._work_pool_name:
                await self.client.send_worker_heartbeat(pool, self.name, self.heartbeat_interval_seconds)
        await self._give_back_dead_runs()

    async def _get_scheduled_flow_runs(self) -> list[WorkerFlowRunResponse]:
        """What is due; asked for only when something is: to count takes the server a seventh of the time."""
        from blocks import pools

        before = await run_sync(pools.server_now) + timedelta(seconds=int(self._prefetch_seconds))
        if not self._looks_closely and not await self._count_due(before):
            return []
        self._looks_closely = False
        found: list[WorkerFlowRunResponse] = []
        for pool in self._pools:
            found += await self.client.get_scheduled_flow_runs_for_work_pool(pool, sorted(self._work_queues), before)
        return found

    async def _count_due(self, before: datetime) -> int:
        state = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED]))
        due = FlowRunFilterNextScheduledStartTime.model_validate({"before_": before})
        return await self.client.count_flow_runs(
            **self._own_queues(), flow_run_filter=FlowRunFilter(state=state, next_scheduled_start_time=due)
        )

    def _own_queues(self) -> dict[str, Any]:
        """Filters of the runs that are this host's."""
        return {
            "work_pool_filter": WorkPoolFilter(name=WorkPoolFilterName(any_=list(self._pools))),
            "work_queue_filter": WorkQueueFilter(name=WorkQueueFilterName(any_=sorted(self._work_queues))),
        }

    async def _submit_run_and_capture_errors(
        self, flow_run: FlowRun, task_status: anyio.abc.TaskStatus[Any] | None = None
    ) -> BaseWorkerResult | Exception:
        """Without the base's look at job templates, commands and environments of the server."""
        try:
            return await self.run(flow_run, BaseJobConfiguration(), task_status)
        except Exception as error:
            self.get_flow_run_logger(flow_run).exception("The step could not be started.")
            await self._propose_crashed_state(flow_run, f"{type(error).__name__}: {error}")
            if task_status is not None and not task_status._future.done():  # type: ignore[attr-defined]
                task_status.started(error)
            return error
        finally:
            self._release_limit_slot(flow_run.id)

    async def run(
        self,
        flow_run: FlowRun,
        configuration: BaseJobConfiguration,
        task_status: anyio.abc.TaskStatus[Any] | None = None,
    ) -> StepProcess:
        """Fork a child for the run, wait for its end."""
        homes = {name: str(home) for name, home in self._homes.items() if name in self._work_queues}
        given = (str(flow_run.id), homes, str(self._mark_of(flow_run) or ""))
        child = self._forkserver.Process(target=_run_step, args=given, name=f"step {flow_run.name}")
        if (before := self._children.pop(flow_run.id, None)) is not None and before.is_alive():
            before.kill()  # the server lost sight of it and gave the run out again; what it did is done, and done once
        await run_sync(child.start)
        self._children[flow_run.id] = child
        name = at_work.process_name(child.pid or 0)
        if task_status is not None:
            task_status.started(name)
        try:
            await run_sync(child.join, abandon_on_cancel=True)
        finally:
            is_latest = self._children.get(flow_run.id) is child
            if is_latest:
                del self._children[flow_run.id]
        if is_latest and child.exitcode not in (0, None):  # one that was replaced has nothing to give back
            await self._try_to_give_back(flow_run, f"its process ended with code {child.exitcode}")
        return StepProcess(identifier=name, status_code=child.exitcode or 0)

    async def _cancel_run(self, flow_run_id: UUID) -> None:
        """What somebody cancels in the UI ends, also when it has begun."""
        child = self._children.get(flow_run_id)
        if child is None or not child.is_alive():
            await super()._cancel_run(flow_run_id)
            return
        await self._mark_flow_run_as_cancelled(await self.client.read_flow_run(flow_run_id))
        child.kill()

    async def _give_back_dead_runs(self) -> None:
        """Runs that the server thinks are running here, and whose process is gone."""
        found = await self.client.read_flow_runs(
            **self._own_queues(),
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING]))
            ),
        )
        for flow_run in found:
            is_ours = flow_run.id in self._children or flow_run.id in self._submitting_flow_run_ids
            if not is_ours and not self._is_at_work(flow_run):
                await self._try_to_give_back(flow_run, "its process is gone")

    def _is_at_work(self, flow_run: FlowRun) -> bool:
        """Whether a child of an earlier worker goes on: as it says itself, or, where its disk is full, as the server knows."""
        mark = self._mark_of(flow_run)
        return (mark is not None and at_work.is_at_work(mark)) or at_work.is_alive(flow_run.infrastructure_pid or "")

    def _mark_of(self, flow_run: FlowRun) -> Path | None:
        """What the process at work on a run holds; None for a run of an actor who does not live here."""
        home = self._homes.get(at_work.actor_of(flow_run.parameters))
        return None if home is None else at_work.mark_of(home, flow_run.id)

    async def _try_to_give_back(self, flow_run: FlowRun, reason: str) -> None:
        """A run that was deleted meanwhile is nobody's; a server that is away is asked again at the next look."""
        try:
            await self._give_back(flow_run, reason)
        except ObjectNotFound:
            self._logger.warning("Run %s was deleted: %s", flow_run.name, reason)
        except httpx.HTTPError as error:
            self._logger.warning("Run %s is not given back yet: %s", flow_run.name, type(error).__name__)

    async def _give_back(self, flow_run: FlowRun, reason: str) -> None:
        """Have the run begin again, a little later each time; after RESTARTS times in a row it is left as crashed."""
        from blocks import pools

        seen = await self.client.read_flow_run(flow_run.id)
        if seen.state is None or seen.state.is_final() or seen.state.is_scheduled():
            return
        deaths = 1 + _times_given_back(await self.client.read_flow_run_states(seen.id), pools.WAITING)
        if deaths > RESTARTS:
            remedy = "see this host's journal, then Retry"
            await self._propose_crashed_state(seen, f"died {deaths} times in a row, at last: {reason}; {remedy}")
            return
        pause_s = 0.0 if deaths == 1 else min(2.0**deaths, LONGEST_PAUSE_S)
        due = await run_sync(pools.server_now) + timedelta(seconds=pause_s)
        state: State[Any] = Scheduled(scheduled_time=due, message=f"{GIVEN_BACK} {self.name}: {reason}")
        state.name = "AwaitingRetry"
        await self.client.set_flow_run_state(seen.id, state, force=True)
        self._logger.warning("Run %s is given back: %s", seen.name, reason)


def _times_given_back(states: list[State[Any]], waiting: str) -> int:
    """How often a worker gave the run back since it last came as far as a wait or an end, after which it began anew."""
    count = 0
    for state in sorted(states, key=lambda one: one.timestamp):
        count = 0 if state.name == waiting or state.is_final() else count + (state.message or "").startswith(GIVEN_BACK)
    return count


def _run_step(run_id: str, homes: dict[str, str], mark: str) -> None:
    """In a child: all of this is loaded there, and nothing of it in the worker."""
    importlib.import_module("infra.step_process").run_step(run_id, homes, mark)


def _look_at(homes: dict[str, str], said: Connection) -> None:
    """In the first child, whose start waits for the imports."""
    said.send(importlib.import_module("infra.step_process").unusable(homes))


def _lock(home: Path, name: str) -> TextIO:
    """Hold the home for this process. Raises HomeInUse naming the other one."""
    file = (home / "worker.lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise HomeInUse(f"{name} is served by process {holder} already: one worker for each home ({home})") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
