"""The process of one step on an actor's host: a child of a worker, forked when all of this is imported.

A run is believed as far as its id, its flow's name and its parameters; which code a name means is written in this package.
"""

import contextvars
import importlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.engine import handle_engine_signals
from prefect.events import emit_event
from prefect.exceptions import Abort
from prefect.flow_engine import run_flow
from prefect.flows import Flow
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Failed
from requests import RequestException

import flows.aggregator
import flows.edge
import flows.miner
import flows.protocol
import flows.publisher  # noqa: F401 - loaded before the fork
from blocks import pools
from blocks.chain import NotYet
from blocks.connections import connections_of, edge_connections_of, is_edge
from blocks.identity import Identity, residents
from infra.at_work import actor_of, alone_at
from tasks.dispatch import MENDED_BY_WAITING, STEPS
from tasks.records import station

ORDERING = {
    "run-task": "flows.protocol.run_task",
    "edge-experiment": "flows.edge.run_experiment",
    "edge-retry": "flows.edge.retry_round",
    "edge-series": "flows.edge.ask_on_schedule",
}
ENTRYPOINTS = {name: step.entrypoint for name, step in STEPS.items()} | ORDERING
SOONEST_S = 5.0
BEAT_S = 10.0
RETRIES = 10  # of a task's run after faults in a row: with their pauses an hour and a half
FIRST_PAUSE_S, LONGEST_PAUSE_S = 15.0, 1200.0


def run_step(run_id: str, homes: dict[str, str], mark: str = "") -> None:
    """Run one flow run for an actor of this host; exit with 0 when the server knows how it ended.

    mark: what the process at work on the run holds (infra.at_work); empty for a run of somebody else, which is refused.
    """
    residents.update({name: Identity(home=home) for name, home in homes.items()})
    with alone_at(Path(mark)) if mark else nullcontext(), handle_engine_signals(UUID(run_id)):
        with get_client(sync_client=True) as client:
            flow_run = client.read_flow_run(UUID(run_id))
            if flow_run.state is not None and (flow_run.state.is_final() or flow_run.state.is_scheduled()):
                return  # ended, or put off, by the process that was at work before this one
            flow_name = client.read_flow(flow_run.flow_id).name
            refusal = why_not(flow_name, flow_run.parameters, homes)
            if refusal:
                client.set_flow_run_state(flow_run.id, Failed(message=refusal), force=True)
                return
        body = patient(flow_of(flow_name), flow_run, actor_of(flow_run.parameters))
        if flow_name in STEPS:
            # Prefect opens a channel of its own, to hear of a suspension, for every run of a deployment: half a second.
            flow_run.deployment_id = None
        # Prefect's own handler, which is in place from here to the body's begin, would call the run crashed, for good.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):  # `beating` is in their place
            run_flow(body, flow_run=flow_run)


def unusable(homes: dict[str, str]) -> str:
    """What is wrong with a home of this host, its keys and what it has pinned, or an empty string."""
    try:
        for home in homes.values():
            me = Identity(home=home)
            edge_connections_of(me) if is_edge(me) else connections_of(me)
            me.address, me.encryption_key  # noqa: B018 - opens both keystores
    except ValueError as error:  # NotConnected, InvalidHome, WrongPassphrase
        return str(error)
    return ""


def flow_of(name: str) -> Flow[..., Any]:
    module, _, function = ENTRYPOINTS[name].rpartition(".")
    found: Flow[..., Any] = getattr(importlib.import_module(module), function)
    return found


def why_not(flow_name: str, parameters: dict[str, Any], homes: dict[str, str]) -> str:
    """Why this host does not run it, or an empty string."""
    if flow_name not in ENTRYPOINTS:
        return f"{flow_name!r} is no step of the protocol: this host runs nothing else"
    if (actor := actor_of(parameters)) not in homes:
        return f"actor {actor!r} does not live on this host; here is {', '.join(homes)}"
    return ""


def patient(flow: Flow[..., Any], flow_run: FlowRun, actor: str) -> Flow[..., Any]:
    """The flow, which for a moment of chain time that is far ahead, or after a fault, goes away and begins again then."""
    run_id, deployment_id = flow_run.id, flow_run.deployment_id

    def waiting(body: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(body)
        def run(*args: Any, **options: Any) -> Any:
            # A host that is stopped ends its steps like a power cut, and its next worker gives them back.
            signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            try:
                with beating(deployment_id):
                    return body(*args, **options)
            except NotYet as wait:
                ahead_s = wait.moment_s - station(actor).chain.now_s()
                pools.come_back(run_id, max(SOONEST_S, float(ahead_s)), str(wait))
                raise Abort(str(wait)) from None
            except MENDED_BY_WAITING as fault:
                retry_later(flow, run_id, fault)
                raise

        return run

    flow.fn = waiting(flow.fn)
    return flow


def retry_later(flow: Flow[..., Any], run_id: UUID, fault: Exception) -> None:
    """Put a task's run off after a fault that may pass; raises Abort then. After RETRIES in a row it returns.

    A step alone is not put off: its conductor asks for it again.
    """
    tried = pools.retries(run_id) if flow.name not in STEPS else RETRIES
    if tried >= RETRIES:
        return
    # The text of an HTTP client's error may hold the whole address, and with it a key of the node's provider.
    text = "no answer" if isinstance(fault, RequestException) else " ".join(str(fault).split())[:300]
    said = f"{type(fault).__name__}: {text}"
    reason = f"attempt {tried + 1} of {RETRIES + 1}: {said}"
    pools.come_back(run_id, min(FIRST_PAUSE_S * 2.0**tried, LONGEST_PAUSE_S), reason, pools.RETRYING)
    raise Abort(reason) from None


@contextmanager
def beating(deployment_id: UUID | None) -> Iterator[None]:
    """Tell the server every BEAT_S that the process of this run lives, until its body ends: see deployments.automations.

    Prefect's own heartbeats carry the time of the host. Its rules would take a host whose clock is behind for dead, and one
    that is late to stop would begin a watch over a run that has ended. These carry the server's time: that of the state in
    which the run is, and what a steady clock has counted since.
    """
    run = FlowRunContext.get()
    if run is None or run.flow_run is None or run.flow_run.state is None:
        yield
        return
    ended, began_s = threading.Event(), time.monotonic()

    def beat(flow_run: FlowRun, server_began: Any) -> None:
        while not ended.is_set():
            _beat(flow_run, deployment_id, server_began + timedelta(seconds=time.monotonic() - began_s))
            ended.wait(BEAT_S)

    context, state = contextvars.copy_context(), run.flow_run.state
    thread = threading.Thread(target=context.run, args=(beat, run.flow_run, state.timestamp), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(1.0)


def _beat(flow_run: FlowRun, deployment_id: UUID | None, moment: Any) -> None:
    related = [{"prefect.resource.id": f"prefect.flow.{flow_run.flow_id}", "prefect.resource.role": "flow"}]
    if deployment_id:
        name = f"prefect.deployment.{deployment_id}"
        related.append({"prefect.resource.id": name, "prefect.resource.role": "deployment"})
    resource = {"prefect.resource.id": f"prefect.flow-run.{flow_run.id}", "prefect.resource.name": flow_run.name}
    emit_event("prefect.flow-run.heartbeat", resource=resource, related=related, occurred=moment)
