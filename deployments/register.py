"""Set up what a Prefect server has to know of this installation. Doing it again changes nothing.

blocks        <actor>: the path of a home on its own host. chain: what a consortium offers to those who join, who check it
              and pin it in their homes
work pools    publisher, miners, aggregators, each with a queue for every actor, whose description is the actor's address
deployments   the flows of prefect.yaml, each on its pool; those of pool edge where a server of edge devices is set up

Nothing here is a secret, and no host believes any of it without a check of its own.
"""

import importlib
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.types.entrypoint import EntrypointType

from blocks.chain import Chain
from blocks.identity import Identity

POOLS = {
    "publisher": "The publisher's own host: it conducts its tasks, and does its steps in their runs.",
    "miners": "A queue for each miner: register, train, encrypt, submit, vote, reveal, withdraw.",
    "aggregators": "A queue for each miner that may be drawn: collect, open the sum, evaluate, publish.",
}
EDGE_POOLS = {"edge": "The server of edge devices: it conducts their rounds (healchain edge up)."}
WORKER_TYPE = "healchain"
# The workers take nothing from it: what would be run here is written in the package.
JOB_TEMPLATE: dict[str, Any] = {
    "job_configuration": {"name": "{{ name }}"},
    "variables": {"type": "object", "properties": {"name": {"type": "string"}}},
}


def register_homes(homes: dict[str, Path]) -> None:
    """Save where the homes of some actors are, for the workers of their clusters."""
    for name, home in homes.items():
        Identity(home=str(home)).save(name, overwrite=True)


def offer(chain: Chain) -> None:
    """Save what a joining host is offered: the chain with its contracts."""
    chain.save("chain", overwrite=True)


def register_pools(pools: Mapping[str, str] = POOLS) -> None:
    """The work pools of these names, with their descriptions; those of a consortium without."""
    with get_client(sync_client=True) as client:
        for name, description in pools.items():
            fields: dict[str, Any] = {"description": description, "base_job_template": JOB_TEMPLATE}
            try:
                client.create_work_pool(WorkPoolCreate(name=name, type=WORKER_TYPE, **fields))
            except ObjectAlreadyExists:
                client.update_work_pool(name, WorkPoolUpdate(**fields))


def register_queue(actor: str, address: str, pools: Iterable[str]) -> None:
    """An actor's queue in some pools. Raises ValueError when the name belongs to another address."""
    with get_client(sync_client=True) as client:
        for pool in pools:
            try:
                found = client.read_work_queue_by_name(actor, work_pool_name=pool)
            except ObjectNotFound:
                client.create_work_queue(name=actor, description=address, work_pool_name=pool)
                continue
            if not found.description:  # a queue that a deployment or a run has named
                client.update_work_queue(found.id, description=address)
            elif found.description != address:
                raise ValueError(f"queue {actor!r} of pool {pool} belongs to {found.description}: choose another name")


def remove_queue(actor: str, pools: Iterable[str]) -> None:
    """Take an actor out of some pools; where it has no queue, nothing changes."""
    with get_client(sync_client=True) as client:
        for pool in pools:
            with suppress(ObjectNotFound):
                client.delete_work_queue_by_id(client.read_work_queue_by_name(actor, work_pool_name=pool).id)


def register_deployments(definitions: Path, pools: Collection[str] = POOLS) -> list[str]:
    """The deployments of a prefect.yaml in these pools; their names, as flow/deployment.

    Raises ValueError for one that is none.
    """
    entries = yaml.safe_load(definitions.read_text())["deployments"]
    for place, entry in enumerate(entries):
        missing = [name for name in ("name", "entrypoint", "work_pool") if name not in entry]
        if missing or entry["work_pool"].get("name") not in {**POOLS, **EDGE_POOLS}:
            known = ", ".join({**POOLS, **EDGE_POOLS})
            wanted = f"{', '.join(missing)} missing" if missing else f"work_pool.name: expected one of {known}"
            raise ValueError(f"{definitions}, deployments[{place}]: {wanted}")
    return [_register(entry) for entry in entries if entry["work_pool"]["name"] in pools]


def register_schedule(
    name: str,
    queue: str,
    parameters: dict[str, Any],
    *,
    cron: str | None,
    interval_s: float | None,
    entrypoint: str = "flows.protocol.run_task",
    pool: str = "publisher",
) -> str:
    """A deployment that begins by itself; its schedule can be paused and resumed in the UI.

    entrypoint: of the whole protocol, or of what asks for the next experiment over edge devices, on its pool.

    Raises ValueError for a schedule that is none.
    """
    if (cron is None) == (interval_s is None):
        raise ValueError("give either a cron expression or an interval")
    module, _, function = entrypoint.rpartition(".")
    flow: Flow[..., Any] = getattr(importlib.import_module(module), function)
    deployment = flow.to_deployment(
        name,
        parameters=parameters,
        tags=["recurring", f"series:{name}"],
        description=f"The next one named {name}, from the last model of this name.",
        work_pool_name=pool,
        work_queue_name=queue,
        cron=cron,
        interval=interval_s,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    assert isinstance(deployment, RunnerDeployment)  # a coroutine only where an event loop runs
    deployment.apply()
    return f"{flow.name}/{name}"


def _register(entry: dict[str, Any]) -> str:
    module, _, function = entry["entrypoint"].rpartition(".")
    flow: Flow[..., Any] = getattr(importlib.import_module(module), function)
    pool = entry["work_pool"]
    deployment = flow.to_deployment(
        entry["name"],
        parameters=entry.get("parameters") or {},
        tags=entry.get("tags") or [],
        description=entry.get("description") or flow.description,
        work_pool_name=pool["name"],
        work_queue_name=pool.get("work_queue_name"),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    assert isinstance(deployment, RunnerDeployment)  # a coroutine only where an event loop runs
    deployment.apply()
    return f"{flow.name}/{entry['name']}"
