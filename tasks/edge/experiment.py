"""The steps of an experiment over edge devices: configure, distribute, collect, combine, store, notify.

Each finds done what is done: a run that was killed begins again and goes on where the ledger is. Nothing large is a parameter
or a result: models are in the store, named by their digests.

Errors: NotConnected, UnknownRound, UnknownModel, TamperedArtifact.
"""

import asyncio
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import httpx
import orjson
from prefect import task
from prefect.artifacts import TableArtifact
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger

from blocks.connections import EdgeConnections
from blocks.edge_ledger import FAILED, OPEN, WARNING
from blocks.tables import EdgeModelRow, EdgeRoundRow
from tasks import show
from tasks.edge import rounds, wire
from tasks.edge.combiner import AggregatorAway, combine_in_child
from tasks.edge.intake import kept
from tasks.edge.server import Server, form_of, open_next, server_of, start_alive, tensors_in, utc_now
from tasks.edge.wire import ExperimentRequest, Refusal
from tasks.learning.combining import NotCombinable, Part, Tensors

POLL_S = 0.25
SELECT_S = 2.0  # how often a round looks for devices that have come back
ATTEMPTS = 3
ONLY_PLAIN = ("fedavg", "fedprox")  # rules that need nothing but the updates: any aggregator has them


# Steps


@task(task_run_name="configure · {experiment_id}", persist_result=False)
def configure(experiment_id: str, actor: str) -> int:
    """How many rounds the experiment has."""
    request = server_of(actor).request_of(experiment_id)
    show.tag_run(f"experiment:{experiment_id}", f"rule:{request.rule}", "edge")
    return request.rounds


@task(task_run_name="open round {number} · {experiment_id}", persist_result=False)
def open_round(experiment_id: str, number: int, actor: str) -> str:
    """Open a round, from the newest model of the experiment; its name. One that is open, or over, is found so."""
    return open_next(server_of(actor), experiment_id, number, utc_now()).round_id


@task(task_run_name="distribute · {round_id}", persist_result=False)
def distribute(round_id: str, actor: str) -> int:
    """Leave a start message for each participant that is alive, and start the clock when they are out; how many there were."""
    server = server_of(actor)
    count = start_alive(server, server.ledger.round(round_id))
    _await_starts(server, round_id)
    server.ledger.start_clock(round_id, utc_now())
    return count


def _await_starts(server: Server, round_id: str) -> None:
    """Until what is to be published has been, or the round is closed. A broker that takes nothing is not waited for."""
    ledger, moved_s = server.ledger, time.monotonic()
    last = ledger.last_message()
    left = ledger.waiting(last)
    while left and time.monotonic() - moved_s < server.pinned.stalled_s and ledger.round(round_id).status == OPEN:
        time.sleep(POLL_S)
        if (found := ledger.waiting(last)) < left:
            left, moved_s = found, time.monotonic()


@task(task_run_name="collect · {round_id}", persist_result=False)
def collect(round_id: str, actor: str) -> str:
    """Wait until the round is closed, by the k-th update or by its deadline; why it was."""
    server = server_of(actor)
    selected_s = time.monotonic()
    while True:
        now = utc_now()
        round_ = server.ledger.close_if_due(round_id, now, closer=actor)
        if round_.status != OPEN:
            return round_.reason
        if time.monotonic() - selected_s > SELECT_S:
            start_alive(server, round_)
            count, selected_s = server.ledger.count(round_id), time.monotonic()
            show.show_progress(count / round_.k_of_n, f"round {round_id}: {count} of {round_.k_of_n} updates")
        time.sleep(max(0.01, min(POLL_S, (round_.deadline_at - now).total_seconds())))


@task(task_run_name="combine · {round_id}", persist_result=False)
def combine(round_id: str, actor: str) -> dict[str, str]:
    """The combined model, and the rule's next state, by their digests in the store; nothing where there is none.

    An aggregator that is away is asked three times. Then the updates stay, and the round is completed with a warning. A rule
    that has no answer for these updates fails the round.
    """
    server = server_of(actor)
    round_ = server.ledger.round(round_id)
    updates = [row for row in server.ledger.updates(round_id) if not row.error]
    if round_.version is not None:
        return {}
    if not updates:
        _end(server, round_id, FAILED, f"no update came within {round_.timeout_s} s")
        return {}
    request = server.request_of(round_.experiment_id)
    base, state = server.base_of(round_.base_version), _state_of(server, round_.base_version)
    parts = [Part(row.proplet_id, row.num_samples, tensors_in(server.ledger.body_of(row), "json")) for row in updates]
    try:
        model, after = ask_aggregator(server.pinned, request, base, state, parts)
    except NotCombinable as error:
        _end(server, round_id, FAILED, str(error))
        return {}
    except AggregatorAway as error:
        _end(server, round_id, WARNING, kept(len(parts), str(error)))
        return {}
    put = server.ledger.store.put
    found = {"model": put(server.ledger.owner, wire.encode_tensors(model)).sha256}
    return found | ({"state": put(server.ledger.owner, wire.encode_tensors(after)).sha256} if after else {})


@task(task_run_name="store · {round_id}", persist_result=False)
def store(round_id: str, combined: dict[str, str], actor: str) -> int | None:
    """Write the next version, end the round and leave the notice of it, in one transaction; the version, if there is one."""
    ledger = server_of(actor).ledger
    round_ = ledger.round(round_id)
    if not combined:
        return round_.version
    model = wire.decode_tensors(ledger.store.get(ledger.owner, combined["model"]))
    measured, now = ledger.measured(round_id), utc_now()
    form, data = form_of(model)
    row = EdgeModelRow(
        version=-1,
        parent=round_.base_version,
        sha256="",
        form=form,
        state_sha256=combined.get("state"),
        metrics=orjson.dumps(mean_metrics((samples, orjson.loads(told)) for samples, told in measured)).decode(),
        experiment_id=round_.experiment_id,
        round_id=round_id,
        created_at=now,
    )
    notice = {
        "round_id": round_id,
        "status": "complete",
        "next_round_available": True,
        "timestamp": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    version = ledger.complete(row, data, rounds.ROUND_NEXT, notice).version
    for sha256 in combined.values():
        ledger.discard(sha256)  # a small model is in its row
    return version


@task(task_run_name="notify · {round_id}", persist_result=False)
def notify(round_id: str, actor: str) -> str:
    """Say in the run's log and on its page how the round ended; its status."""
    server = server_of(actor)
    round_ = server.ledger.round(round_id)
    said = get_run_logger().info if round_.status not in (FAILED, WARNING) else get_run_logger().warning
    said("round %s: %s, version %s. %s", round_id, round_.status, round_.version, round_.detail)
    show_rounds(server, round_.experiment_id)
    return round_.status


@task(task_run_name="conclude · {experiment_id}", persist_result=False)
def conclude(experiment_id: str, actor: str) -> str:
    """How the experiment ended: the worst of its rounds."""
    ledger = server_of(actor).ledger
    ledger.end_experiment(experiment_id, utc_now())
    found = {row.status for row in ledger.rounds(experiment_id)}
    return next((status for status in (FAILED, WARNING) if status in found), "COMPLETED")


# Combining


def ask_aggregator(
    pinned: EdgeConnections, request: ExperimentRequest, base: Tensors, state: Tensors, parts: list[Part]
) -> tuple[Tensors, Tensors]:
    """Have the updates combined, at most ATTEMPTS times, with pauses that double. Raises AggregatorAway or NotCombinable.

    It takes no longer than the attempts' time limits and pauses together: by default 3 times 30 s, and 3 s.
    """
    pause_s = pinned.aggregation_pause_s
    for attempt in range(1, ATTEMPTS + 1):
        try:
            if pinned.aggregator_url:
                return _combine_by_url(pinned, request, base, state, parts)
            limit_s = pinned.aggregation_timeout_s
            return combine_in_child(request.rule, request.rule_options, base, state, parts, limit_s)
        except AggregatorAway as error:
            if attempt == ATTEMPTS:
                raise AggregatorAway(f"{ATTEMPTS} attempts, the last: {error}") from error
            get_run_logger().warning("attempt %d of %d: %s", attempt, ATTEMPTS, error)
        time.sleep(pause_s)
        pause_s *= 2
    raise AssertionError("the last attempt returns or raises")


def _combine_by_url(
    pinned: EdgeConnections, request: ExperimentRequest, base: Tensors, state: Tensors, parts: list[Part]
) -> tuple[Tensors, Tensors]:
    """By POST /aggregate. Rules that compare or remember are named, with the base and the state."""
    asked: dict[str, Any] = {"updates": [_as_update(part) for part in parts]}
    if request.rule not in ONLY_PLAIN:
        asked |= {"rule": request.rule, "rule_options": request.rule_options}
        asked |= {"base": wire.model_json(base), "state": wire.model_json(state)}
    url = f"{pinned.aggregator_url.rstrip('/')}/aggregate"
    key = pinned.aggregator_key.get_secret_value()
    headers = {"Content-Type": wire.JSON_TYPE} | ({"Authorization": f"Bearer {key}"} if key else {})
    status, said = asyncio.run(_post(url, orjson.dumps(asked), headers, pinned))
    if status in (400, 422, 500):
        raise NotCombinable(f"the aggregator: {said.decode(errors='replace').strip()[:500]}")
    if status != 200:
        raise AggregatorAway(f"{pinned.aggregator_url}: HTTP {status}")
    try:
        found = wire.decode_json(said)
        plain = request.rule in ONLY_PLAIN
        model = wire.read_tensors(found if plain else found["model"], "model")
        wire.check_fits(model, base, "model")
        return model, {} if plain or not found.get("state") else wire.read_tensors(found["state"], "state")
    except (Refusal, KeyError, TypeError) as error:
        raise NotCombinable(f"the aggregator's answer is no model: {error}") from None


async def _post(url: str, body: bytes, headers: Mapping[str, str], pinned: EdgeConnections) -> tuple[int, bytes]:
    """Status and body of the answer, all of it within the time limit, however slowly it comes. Raises AggregatorAway."""
    limit_s, said = pinned.aggregation_timeout_s, bytearray()
    try:
        async with (
            asyncio.timeout(limit_s),
            httpx.AsyncClient(timeout=limit_s) as client,
            client.stream("POST", url, content=body, headers=headers) as answer,
        ):
            async for piece in answer.aiter_bytes():
                said += piece
                if len(said) > wire.MAX_BYTES:
                    raise AggregatorAway(f"{pinned.aggregator_url}: its answer has more than {wire.MAX_BYTES} bytes")
            return answer.status_code, bytes(said)
    except httpx.HTTPError as error:
        raise AggregatorAway(f"{pinned.aggregator_url}: {type(error).__name__}") from None
    except TimeoutError:
        raise AggregatorAway(f"{pinned.aggregator_url}: no answer within {limit_s:g} s") from None


def _as_update(part: Part) -> dict[str, Any]:
    return {"proplet_id": part.sender, "num_samples": part.samples, "update": wire.model_json(part.tensors)}


def _state_of(server: Server, version: int) -> Tensors:
    data = server.ledger.state_bytes(version)
    return {} if data is None else wire.decode_tensors(data)


def _end(server: Server, round_id: str, status: str, detail: str) -> None:
    server.ledger.end_round(round_id, status, detail, utc_now())


# Metrics


def mean_metrics(told: Iterable[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Means weighted by samples of what every device measured."""
    rows = list(told)
    names = set.intersection(*(set(metrics) for _, metrics in rows)) if rows else set()
    total = sum(samples for samples, _ in rows)
    return {name: sum(samples / total * metrics[name] for samples, metrics in rows) for name in sorted(names)}


# The page of a run


def show_rounds(server: Server, experiment_id: str) -> None:
    """A table of the rounds, beside the run that conducts them."""
    if FlowRunContext.get() is None:
        return
    rows = [_shown(server, row) for row in server.ledger.rounds(experiment_id)]
    key = "edge-" + re.sub(r"[^a-z0-9-]+", "-", experiment_id.lower())
    try:
        TableArtifact(key=key, table=rows, description=f"Rounds of {experiment_id}").create(_sync=True)  # type: ignore[call-arg]
    except show.NOT_TAKEN as error:
        get_run_logger().warning("%s is not shown: %s", key, error)


def _shown(server: Server, row: EdgeRoundRow) -> dict[str, Any]:
    model = None if row.version is None else server.ledger.described(row.version)
    return {
        "round": row.round_id,
        "status": row.status,
        "updates": f"{server.ledger.count(row.round_id)} of {row.k_of_n}",
        "closed by": row.reason,
        "seconds": "" if row.closed_at is None else f"{(row.closed_at - row.opened_at).total_seconds():.1f}",
        "from": row.base_version,
        "version": "" if row.version is None else row.version,
        "metrics": "" if model is None else model.metrics,
        "detail": row.detail,
    }
