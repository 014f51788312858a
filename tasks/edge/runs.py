"""Runs of the flows of edge rounds, on the worker of their server; and the experiments that a schedule asks for.

Errors: PoolsUnavailable, Refusal.
"""

import json
from typing import Any

from prefect import task
from prefect.client.schemas.objects import StateType
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from blocks import pools
from tasks.edge import intake, wire
from tasks.edge.server import Server, server_of, utc_now
from tasks.edge.wire import ExperimentRequest

RUNS_MAX = 5  # of one experiment; each has its own retries, and is given back when its process dies


def experiment_run(server: Server, experiment_id: str) -> tuple[str, dict[str, Any], str]:
    """The flow that conducts an experiment, its parameters, and the key of its run."""
    parameters = {"experiment_id": experiment_id, "actor": server.pinned.name}
    return "edge-experiment", parameters, f"{server.ledger.owner}/edge/{experiment_id}"


def start_run(flow: str, parameters: dict[str, Any], key: str) -> str:
    """Have the worker of this server run a flow; another time where the run of this key has died, RUNS_MAX times at most.

    Empty when a run is under way; else why there is none.
    """
    what = str(parameters.get("experiment_id") or parameters.get("round_id"))
    name = f"edge · {what}" if flow == "edge-experiment" else f"edge retry · {what}"
    tags = ["edge", f"experiment:{what}"]
    for number in range(1, RUNS_MAX + 1):
        own = key if number == 1 else f"{key}/{number}"
        run = pools.start(f"{flow}/edge", str(parameters["actor"]), parameters, key=own, name=name, tags=tags)
        if not run.has_ended:
            return ""
        if run.kind is StateType.CANCELLED:
            return "its run was cancelled"
        if run.is_done and flow == "edge-experiment":
            return "its run is done"
    return f"{RUNS_MAX} runs of it have ended, the last: {run.state} {run.message[:500]}".strip()


# Experiments on a schedule


@task(task_run_name="ask for the next of {name}", persist_result=False)
def ask_next(name: str, experiment: dict[str, Any], actor: str) -> str:
    """Ask for the next experiment of a series, from the last model of the series; its id, or nothing while one is under way.

    Its name is this run's, so that a run which begins again goes on with its own.
    """
    server = server_of(actor)
    own = f"{name}-{str(flow_run.get_id() or '').replace('-', '')[-12:]}"
    others = [row for row in server.ledger.series(name) if row.experiment_id != own]
    for row in others:
        if row.ended_at is None and server.ledger.rounds(row.experiment_id):
            get_run_logger().warning("%s is under way: the next of %s waits", row.experiment_id, name)
            return ""
    before = server.ledger.experiment(own)
    if before is not None:  # decided once: which devices are alive, and the last model, may be others by now
        request = ExperimentRequest.model_validate_json(before.request)
    else:
        made = [last for row in others if (last := server.ledger.head(row.experiment_id)) is not None]
        start = {"model_ref": wire.reference_of(made[-1].version or 0)} if made else {}
        asked = {**experiment, "experiment_id": own, "round_id": own, **start}
        request = wire.read_experiment(json.dumps(asked).encode())
    intake.ask_for_experiment(server, request, utc_now(), lambda _: _start(server, own), series=name)
    return own


def _start(server: Server, experiment_id: str) -> None:
    if why := start_run(*experiment_run(server, experiment_id)):
        raise wire.Refusal(409, f"experiment {experiment_id}: {why}", "experiment_id")
