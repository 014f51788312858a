"""Looks after experiments whose run has died: it is started again, and what cannot go on is ended.

A run begins again by itself when a step fails, and is given back when its process dies. What is left: a run that has failed or
crashed for good, that somebody cancelled in the UI, or that was deleted. So no round is open, or closed, that nobody conducts.
"""

import asyncio
import logging

from anyio.to_thread import run_sync

from blocks.pools import PoolsUnavailable
from blocks.registry import RegistryUnavailable
from infra.edge_gateway import Gateway
from tasks.edge import intake
from tasks.edge.wire import Refusal

WATCH_S = 30.0
log = logging.getLogger(__name__)


async def watch(gateway: Gateway) -> None:
    """Look every WATCH_S, until it is cancelled."""
    while True:
        await asyncio.sleep(WATCH_S)
        try:
            await run_sync(look, gateway)
        except (Refusal, PoolsUnavailable, RegistryUnavailable, OSError) as error:
            log.warning("experiments are not looked after: %s; again in %.0f s", error, WATCH_S)


def look(gateway: Gateway) -> None:
    """Have a run for each experiment that is not over, or end it. Raises what the registry and Prefect raise when away."""
    for experiment_id in gateway.server.ledger.unended():
        if why := gateway.start_experiment(experiment_id):
            log.warning("experiment %s is given up: %s", experiment_id, why)
            intake.give_up(gateway.server, experiment_id, why)
