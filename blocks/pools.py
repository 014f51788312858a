"""Prefect's work pools: start a step on another actor's host, see how it goes, take it back.

A pool has a queue for each actor that serves it; an actor's worker takes from its own queues alone. What a run answers is
not read here: the scheduler is not asked for anything that could not be checked.

Errors: PoolsUnavailable. A server that restarts is waited for.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL
from prefect.states import Cancelled, Scheduled
from pydantic import SecretStr

PATIENCE_S = 900.0
"""A server that is away longer than this ends the run that waits for it; a later one takes up its work."""
CLOCK_S = 60
WAITING, RETRYING = "Waiting", "AwaitingRetry"  # states of a run that begins again: at its moment; after a fault
PAGE = 200  # most runs that the server returns at once
T = TypeVar("T")


class PoolsUnavailable(RuntimeError):
    """Prefect's server does not answer, refuses, or lacks a pool, a queue or a deployment; the message says which."""


@dataclass(frozen=True)
class StepRun:
    """One run of a step on another host, as the scheduler has it.

    due_in_s: seconds until it may begin, by the server's clock. ended_s: Unix seconds of this host's clock.
    """

    id: UUID
    kind: StateType
    state: str
    message: str
    due_in_s: float
    ended_s: float | None = None

    @property
    def is_done(self) -> bool:
        return self.kind is StateType.COMPLETED

    @property
    def has_ended(self) -> bool:
        return self.kind in (StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED)


@dataclass(frozen=True)
class Queue:
    """An actor's queue in a pool."""

    actor: str
    address: str
    is_paused: bool


def server_now() -> datetime:
    """The server's time: the hosts' own clocks may be off by minutes."""
    return datetime.now(UTC) + _clock_offset(int(time.monotonic() // CLOCK_S))


@lru_cache(maxsize=1)
def _clock_offset(_: int) -> timedelta:
    """What the server's clock is ahead of this host's, to a second; asked once in CLOCK_S."""
    answered = _client()._client.get("/health").headers.get("date")
    here = datetime.now(UTC)
    return (parsedate_to_datetime(answered) if answered else here) - here


def start(
    deployment: str, queue: str, parameters: dict[str, Any], *, key: str, name: str, tags: Sequence[str]
) -> StepRun:
    """A run of the deployment on this queue; the one there is already, where one has this key."""

    def create() -> StepRun:
        run = run_deployment(
            deployment,
            parameters=parameters,
            scheduled_time=server_now(),
            flow_run_name=name,
            timeout=0,
            tags=list(tags),
            idempotency_key=key,
            work_queue_name=queue,
        )
        assert isinstance(run, FlowRun)  # a coroutine only where an event loop runs, which steps do not have
        return _seen(run.id, run.state)

    return _patiently(create, f"start {deployment} on queue {queue}")


def look(ids: Iterable[UUID]) -> dict[UUID, StepRun]:
    """How these runs stand. One that somebody deleted is not among them."""
    wanted = list(ids)

    def read() -> dict[UUID, StepRun]:
        found: dict[UUID, StepRun] = {}
        for first in range(0, len(wanted), PAGE):
            page = FlowRunFilter(id=FlowRunFilterId(any_=wanted[first : first + PAGE]))
            runs = _client().read_flow_runs(flow_run_filter=page, limit=PAGE)
            found |= {run.id: _seen(run.id, run.state) for run in runs}
        return found

    return _patiently(read, "read the runs of steps") if wanted else {}


def take_back(run: StepRun, reason: str) -> None:
    """End a run that nobody waits for any more, whatever it does; a host that comes back does not begin it."""

    def cancel() -> None:
        _client().set_flow_run_state(run.id, Cancelled(message=reason), force=True)

    _patiently(cancel, "take a run back")


def come_back(run_id: UUID, in_s: float, reason: str, name: str = WAITING) -> None:
    """Have the run begin again after so many seconds; until then no process waits for it. name: of its state."""

    def schedule() -> None:
        state: State[Any] = Scheduled(scheduled_time=server_now() + timedelta(seconds=in_s), message=reason)
        state.name = name
        _client().set_flow_run_state(run_id, state, force=True)

    _patiently(schedule, "schedule the run again")


def retries(run_id: UUID) -> int:
    """How often in a row a run was to be begun again: since it last waited for a moment, or ended."""

    def count() -> int:
        found = 0
        for state in sorted(_client().read_flow_run_states(run_id), key=lambda one: one.timestamp, reverse=True):
            if state.name == WAITING or state.is_final():
                break
            found += state.name == RETRYING
        return found

    return _patiently(count, "read how often a run was retried")


def queues(pool: str) -> list[Queue]:
    """The actors that serve a pool. A queue's description is its actor's address."""

    def read() -> list[Queue]:
        found, first = [], 0
        while page := _client().read_work_queues(work_pool_name=pool, limit=PAGE, offset=first):
            found += page
            first += len(page)
        return [Queue(one.name, one.description or "", one.is_paused) for one in found if one.name != "default"]

    return _patiently(read, f"read the queues of pool {pool}")


def _client() -> SyncPrefectClient:
    return _client_for(PREFECT_API_URL.value(), PREFECT_API_AUTH_STRING.value(), os.getpid())


@lru_cache(maxsize=1)
def _client_for(address: str | None, login: SecretStr | None, process: int) -> SyncPrefectClient:
    """One for all calls of a process: to make one takes longer than a call."""
    return get_client(sync_client=True).__enter__()


def _seen(run_id: UUID, state: State[Any] | None) -> StepRun:
    if state is None:
        return StepRun(run_id, StateType.PENDING, "Pending", "", 0)
    due = state.state_details.scheduled_time if state.type is StateType.SCHEDULED else None
    due_in_s = due.timestamp() - server_now().timestamp() if due else 0.0
    ended_s = time.time() - (server_now() - state.timestamp).total_seconds() if state.is_final() else None
    return StepRun(run_id, state.type, state.name or "", state.message or "", due_in_s, ended_s)


def _patiently(call: Callable[[], T], what: str) -> T:
    """Call again while the server is away. Raises PoolsUnavailable when it is away for long, or refuses."""
    started, pause_s = time.monotonic(), 0.5
    while True:
        try:
            return call()
        except ObjectNotFound as error:
            raise PoolsUnavailable(
                f"cannot {what}: the server does not know it. Register the deployments first (healchain stack up)"
            ) from error
        except (httpx.TransportError, httpx.HTTPStatusError, PrefectHTTPStatusError) as error:
            status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 503
            if status in (401, 403):
                raise PoolsUnavailable(
                    f"cannot {what}: the server refuses the credentials (PREFECT_API_AUTH_STRING)"
                ) from error
            if status < 500 or time.monotonic() - started > PATIENCE_S:
                raise PoolsUnavailable(f"cannot {what}: {type(error).__name__}: {error}") from error
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 5.0)
