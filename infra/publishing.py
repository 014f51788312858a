"""The publisher's side of a stack: submit a task, resume one, have one begin on a schedule, follow it on a terminal.

Errors: ValueError, LookupError, PoolsUnavailable.
"""

import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from blocks import pools
from blocks.artifacts import ArtifactStore
from blocks.chain import Chain
from blocks.connections import connections_of
from blocks.identity import Identity
from blocks.registry import Registry
from contracts.task_spec import TaskFile, TaskSpec
from deployments.register import register_schedule
from infra.watching import Watcher
from tasks.conductors import terms_of, who_conducts
from tasks.dispatch import StepEvent
from tasks.index import ENDED, catch_up
from tasks.publish import TASKS_APPROVED, approve, check_runnable, decide, largest_score

POLL_S = 1.0


@dataclass(frozen=True)
class Publisher:
    """A publisher, and what its home connects it to."""

    name: str
    me: Identity
    chain: Chain
    store: ArtifactStore
    registry: Registry


def publisher_of(home: Path) -> Publisher:
    """The publisher whose home this is. Raises ValueError."""
    me = Identity(home=str(home.resolve()))
    pinned = connections_of(me)
    if pinned.registry is None:
        raise ValueError(f"--home {home}: the home of {pinned.name}, which has no registry; name the publisher's")
    return Publisher(pinned.name, me, pinned.chain, pinned.store, pinned.registry)


def provide(home: Path, module: bytes | None) -> None:
    """Put a task's module, if it has one, where its miners find it: in the publisher's folder of the store."""
    if module is not None:
        publisher = publisher_of(home)
        publisher.store.put(publisher.me.address, module)


def submit(home: Path, file: TaskFile) -> tuple[str, UUID]:
    """Decide on the task in the publisher's home and start its run; the task's id and the run's."""
    publisher = publisher_of(home)
    check_runnable(file)
    largest_score(file)
    task_id = f"{file.name}-{secrets.token_hex(6)}"
    decide(publisher.me, task_id, file)
    return task_id, _start(publisher, task_id, file.spec(), key=f"{publisher.me.address}/{task_id}")


def resume(home: Path, task_id: str) -> UUID:
    """Start another run for a task whose own has ended before the task; the run's id.

    Raises ValueError for a task that is over, or that a run conducts, LookupError for one that is not of this home.
    """
    publisher = publisher_of(home)
    spec = terms_of(publisher.me, publisher.registry, task_id)
    status = catch_up(publisher.registry, publisher.chain, publisher.store, task_id)
    if status in ENDED:
        raise ValueError(f"task {task_id} is {status}: nothing of it is left to do")
    if reason := who_conducts(publisher.me, task_id):
        raise ValueError(f"{reason}: leave it, or cancel that run first")
    return _start(publisher, task_id, spec, key=f"{publisher.me.address}/{task_id}/{secrets.token_hex(6)}")


def _start(publisher: Publisher, task_id: str, spec: TaskSpec, key: str) -> UUID:
    run = pools.start(
        "run-task/publisher",
        publisher.name,
        {"spec": spec.model_dump(mode="json"), "publisher": publisher.name, "task_id": task_id},
        key=key,
        name=task_id,
        tags=[f"task:{task_id}", f"actor:{publisher.name}"],
    )
    return run.id


def schedule(
    home: Path, file: TaskFile, *, cron: str | None, interval_s: float | None, most_tasks: int = TASKS_APPROVED
) -> str:
    """Approve of so many tasks with these terms and have them begin on a schedule; the deployment's name."""
    publisher = publisher_of(home)
    check_runnable(file)
    largest_score(file)
    approve(publisher.me, file, most_tasks)
    parameters: dict[str, Any] = {
        "spec": file.spec().model_dump(mode="json"),
        "publisher": publisher.name,
        "task_id": "",
        "follow_on": True,
    }
    return register_schedule(file.name, publisher.name, parameters, cron=cron, interval_s=interval_s)


def follow(home: Path, task_id: str, run_id: UUID, watcher: Watcher) -> tuple[str, str]:
    """Show the steps as they end, until the run has; the task's status and reason as the index has them."""
    registry = publisher_of(home).registry
    shown = 0
    while True:
        run = pools.look([run_id]).get(run_id)
        steps = registry.steps(task_id)
        for row in steps[shown:]:
            watcher.tell(
                StepEvent(row.outcome, row.step, row.actor, task_id, row.round_number, row.seconds, row.detail)
            )
        shown = len(steps)
        if run is None or run.has_ended:
            task = registry.find_task(task_id)
            failed = "" if run is None or run.is_done else f"{run.state}: {run.message}"
            return (task.status if task else "FAILED"), failed or (task.reason if task else "")
        if run.due_in_s > 2 * POLL_S:
            return "WAITING", f"{run.message}; its run goes on by itself in {run.due_in_s:.0f} s"
        time.sleep(POLL_S)
