"""What comes in from outside, whichever way: an experiment, an update, a task's details. HTTP and MQTT end in these functions.

Errors: Refusal; UnknownRound, UnknownModel; what the registry and the store raise when they are away.
"""

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

from blocks.edge_ledger import ENDED, FAILED, WARNING, AlreadyWritten, Received, UnknownModel, is_alive
from blocks.tables import EdgeRoundRow, EdgeUpdateRow
from tasks.edge import rounds, wire
from tasks.edge.server import Server, open_next, utc_now
from tasks.edge.wire import ExperimentRequest, Refusal, Update
from tasks.learning.combining import InvalidRule, NotCombinable, Tensors, check_enough, checked_options

ALIVE, OFFLINE, UNHEALTHY = "alive", "offline", "unhealthy"
BASES_MAX = 4
RECENT_MAX = 32  # experiments; half of those whose requests a process keeps
_bases: dict[tuple[str, int], Tensors] = {}  # by owner and version: versions are written once, so they are never stale


def ask_for_experiment(
    server: Server, request: ExperimentRequest, now: datetime, start: Callable[[str], None], *, series: str = ""
) -> EdgeRoundRow:
    """Remember the request, start its flow, open its first round. The same request again changes nothing.

    start: starts the flow of an experiment, once however often it is called. The round is opened when it has been: nobody
    would conduct it otherwise. series: of the schedule that asks.
    """
    request = _with_participants(server, request, now)
    _check_runnable(server, request)
    record(server, request, now, series=series)
    found = server.ledger.experiment(request.name)
    if found is None or found.ended_at is None:
        start(request.name)
    return open_next(server, request.name, 1, now)


def record(server: Server, request: ExperimentRequest, now: datetime, *, series: str = "") -> None:
    """Remember what was asked for. Raises Refusal where the experiment, or a round's name, is taken."""
    text, names = request.model_dump_json(), {"first_round": request.round_id, "rounds": request.rounds}
    try:
        server.ledger.record_experiment(request.name, text, now, series=series, **names)  # type: ignore[arg-type]
    except AlreadyWritten as error:
        raise Refusal(409, str(error), "experiment_id") from None


def give_up(server: Server, experiment_id: str, why: str) -> None:
    """End what nothing conducts any more: updates that came are kept to be combined later, and a round without is failed."""
    for row in server.ledger.rounds(experiment_id):
        if row.status in ENDED:
            continue
        if count := server.ledger.count(row.round_id):
            server.ledger.end_round(row.round_id, WARNING, kept(count, why), utc_now())
        else:
            server.ledger.end_round(row.round_id, FAILED, why, utc_now())
    server.ledger.end_experiment(experiment_id, utc_now())


def kept(count: int, why: str) -> str:
    return f"{count} updates are kept, combine them later (healchain edge retry): {why}"


def _with_participants(server: Server, request: ExperimentRequest, now: datetime) -> ExperimentRequest:
    """Those that were named, all known; without names, the devices that are alive, or that this experiment had before."""
    known = {row.proplet_id: row for row in server.ledger.devices()}
    if request.participants:
        unknown = [one for one in request.participants if one not in known]
        if unknown and not server.pinned.is_open:
            raise Refusal(404, f"participants: {unknown[0]} is no known device; register it first", "participants")
        return request
    before = server.ledger.experiment(request.name)
    if before is not None:
        named = ExperimentRequest.model_validate_json(before.request).participants
    else:
        named = [one for one, row in known.items() if is_alive(row, now, server.pinned.alive_within_s)]
    if not named:
        raise Refusal(
            400, "participants list is required for orchestration: it is empty, and no device is alive", "participants"
        )
    if request.k_of_n > len(named):
        raise Refusal(
            400, f"k_of_n = {request.k_of_n}: {len(named)} devices are alive; ask for at most these", "k_of_n"
        )
    return request.model_copy(update={"participants": sorted(named)})


def _check_runnable(server: Server, request: ExperimentRequest) -> None:
    try:
        options = checked_options(request.rule, request.rule_options)
        check_enough(request.rule, options, rounds.needed(request, len(request.participants)))
    except (InvalidRule, NotCombinable) as error:
        raise Refusal(400, f"{error}; raise k_of_n or change the rule", "rule") from None
    version = wire.version_of(request.model_ref)
    try:
        server.ledger.described(version)
    except UnknownModel:
        raise Refusal(
            404, f"model_ref {request.model_ref!r}: no version {version}; store it first (POST /models)", "model_ref"
        ) from None


def take_update(server: Server, update: Update, transport: str, now: datetime) -> Received:
    """Check an update against its round and keep it. Raises Refusal or UnknownRound."""
    round_ = server.ledger.round(update.round_id)
    request = server.request_of(round_.experiment_id)
    rounds.check_update(update, frozenset(request.participants), round_.base_version)
    if update.num_samples > server.pinned.max_samples:
        limit = f"expected an integer from 1 to {server.pinned.max_samples}"
        raise Refusal(400, f"num_samples = {update.num_samples}: {limit}", "num_samples")
    if not update.error:
        wire.check_fits(update.update, _base(server, round_.base_version))
    row = EdgeUpdateRow(
        round_id=update.round_id,
        proplet_id=update.proplet_id,
        digest=update.digest,
        num_samples=update.num_samples,
        metrics=json.dumps(update.metrics),
        error=update.error,
        transport=transport,
        received_at=now,
    )
    received = server.ledger.receive(row, None if update.error else wire.encode_model(update.update))
    if received.kind == "late":
        raise rounds.late(update.round_id, received.round.reason)
    return received


def takes_part(server: Server, proplet_id: str) -> bool:
    """Whether a device is asked in one of the experiments that opened a round last: of others no update is awaited."""
    return any(
        proplet_id in server.request_of(one).participants for one in server.ledger.newest_experiments(RECENT_MAX)
    )


def task_of(server: Server, round_id: str, proplet_id: str) -> dict[str, Any]:
    """What a device is to do in a round, as existing devices read it; with the module, where it is known here."""
    round_ = server.ledger.round(round_id)
    request = server.request_of(round_.experiment_id)
    if proplet_id and proplet_id not in request.participants:
        known = server.ledger.device(proplet_id) is not None
        stranger = f"proplet_id {proplet_id[:80]!r} is no participant of round {round_id}"
        said = stranger if known else f"no device {proplet_id[:80]!r}: register it first"
        raise Refusal(403 if known else 404, said, "proplet_id")
    module = server.ledger.blob("module", request.task_wasm_image)
    return {
        "round_id": round_id,
        "model_ref": wire.reference_of(round_.base_version),
        "config": {"proplet_id": proplet_id},
        "hyperparams": request.hyperparams,
        "task_wasm_image": request.task_wasm_image,
        "task_wasm_sha256": None if module is None else module.sha256.removeprefix("0x"),
        "deadline": round_.deadline_at.strftime("%Y-%m-%dT%H:%M:%SZ") if round_.started_at else None,
    }


def standing_of(server: Server, round_id: str, now: datetime) -> dict[str, Any]:
    """How a round stands; completed: it is over, well or not, as `state` says. partial: and fewer updates than k came."""
    row = server.ledger.close_if_due(round_id, now)
    count = server.ledger.count(round_id)
    return {
        "round_id": row.round_id,
        "completed": row.status in ENDED,
        "num_updates": count,
        "k_of_n": row.k_of_n,
        "partial": row.status in ENDED and count < row.k_of_n,
        "model_version": row.version,
        "state": row.status,
        "reason": row.reason,
        "detail": row.detail,
    }


def next_round(server: Server, proplet_id: str = "") -> dict[str, Any]:
    """The model that the newest round made; and, ours, the open rounds, of one device where it is named."""
    opened = [
        row.round_id for row in server.ledger.open_rounds() if not proplet_id or _takes_part(server, row, proplet_id)
    ]
    last = server.ledger.head()
    if last is None or last.version is None:
        return {"message": "No completed rounds found", "next_round_available": False, "open_rounds": opened}
    return {
        "last_completed_round": last.round_id,
        "model_uri": wire.reference_of(last.version),
        "new_model_version": last.version,
        "next_round_available": True,
        "status": "ready",
        "open_rounds": opened,
    }


def _takes_part(server: Server, row: EdgeRoundRow, proplet_id: str) -> bool:
    return proplet_id in server.request_of(row.experiment_id).participants


def _base(server: Server, version: int) -> Tensors:
    """The model that a round trains from; every update of the round is compared with it."""
    key = (server.ledger.owner, version)
    if key not in _bases:
        while len(_bases) >= BASES_MAX:
            _bases.pop(next(iter(_bases)), None)
        _bases[key] = server.base_of(version)
    return _bases[key]
