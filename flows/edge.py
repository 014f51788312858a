"""Rounds over edge devices: the only place where the order of their steps is written."""

from typing import Any

from prefect import flow

from tasks.edge import experiment as edge
from tasks.edge.runs import ask_next

RETRIES, RETRY_S = 2, 10  # of a run whose step failed; each begins again and goes on where the ledger is


@flow(
    name="edge-experiment",
    flow_run_name="edge · {experiment_id}",
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=RETRY_S,
)
def run_experiment(experiment_id: str, actor: str = "edge") -> str:
    """Configure, distribute, collect, combine, store, notify. COMPLETED, or the worst of its rounds.

    Args:
        experiment_id: of an experiment that was asked for at the gateway (POST /fl/experiments).
        actor: the server of edge devices whose home the worker serves.
    """
    for number in range(1, edge.configure(experiment_id, actor) + 1):
        round_id = edge.open_round(experiment_id, number, actor)
        edge.distribute(round_id, actor)
        edge.collect(round_id, actor)
        combined = edge.combine(round_id, actor)
        edge.store(round_id, combined, actor)
        edge.notify(round_id, actor)
    return edge.conclude(experiment_id, actor)


@flow(
    name="edge-retry",
    flow_run_name="edge retry · {round_id}",
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=RETRY_S,
)
def retry_round(round_id: str, actor: str = "edge") -> str:
    """Combine the updates that a round has kept. The round's status.

    Args:
        round_id: of a round that was completed with a warning, or whose rule had no answer.
        actor: the server of edge devices whose home the worker serves.
    """
    combined = edge.combine(round_id, actor)
    edge.store(round_id, combined, actor)
    return edge.notify(round_id, actor)


@flow(
    name="edge-series",
    flow_run_name="edge series · {name}",
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=RETRY_S,
)
def ask_on_schedule(name: str, experiment: dict[str, Any], actor: str = "edge") -> str:
    """Ask for the next experiment of a series, which has a run of its own; its id, or SKIPPED while one is under way.

    Args:
        name: of the series.
        experiment: as for POST /fl/experiments; the ids of experiment and rounds are made from the name.
        actor: the server of edge devices whose home the worker serves.
    """
    return ask_next(name, experiment, actor) or "SKIPPED"
