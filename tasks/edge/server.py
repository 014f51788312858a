"""The server of edge devices, as its processes share it: its ledger, and how a round is opened and its devices are started.

Errors: NotConnected, UnknownRound, UnknownModel, TamperedArtifact.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from blocks.connections import EdgeConnections, edge_connections_of
from blocks.edge_ledger import OPEN, RUNNING, SMALL_BYTES, EdgeLedger, UnknownRound, is_alive, task_id_of
from blocks.identity import find_identity
from blocks.tables import EdgeRoundRow, EdgeTaskRow
from tasks.edge import rounds, wire
from tasks.edge.wire import ExperimentRequest
from tasks.learning.combining import Tensors

REQUESTS_MAX = 64
_requests: dict[tuple[str, str], ExperimentRequest] = {}  # by owner and name: written once, so they are never stale


@dataclass(frozen=True)
class Server:
    """What a step works with."""

    ledger: EdgeLedger
    pinned: EdgeConnections

    def request_of(self, experiment_id: str) -> ExperimentRequest:
        """Raises UnknownRound."""
        key = (self.ledger.owner, experiment_id)
        if key not in _requests:
            found = self.ledger.experiment(experiment_id)
            if found is None:
                raise UnknownRound(f"experiment {experiment_id!r} is unknown: ask for it first (POST /fl/experiments)")
            while len(_requests) >= REQUESTS_MAX:
                _requests.pop(next(iter(_requests)), None)
            _requests[key] = ExperimentRequest.model_validate_json(found.request)
        return _requests[key]

    def base_of(self, version: int) -> Tensors:
        """The tensors of a version. Raises UnknownModel or TamperedArtifact."""
        return tensors_in(self.ledger.model_bytes(row := self.ledger.model(version)), row.form)


def server_of(actor: str) -> Server:
    """The server of edge devices of this name. Raises NotConnected."""
    me = find_identity(actor)
    pinned = edge_connections_of(me)
    return Server(EdgeLedger(pinned.registry, pinned.store, me.address), pinned)


def utc_now() -> datetime:
    return datetime.now(UTC)


# Rounds


def open_next(server: Server, experiment_id: str, number: int, now: datetime) -> EdgeRoundRow:
    """A round from what the last one before it made. Its clock stands until its devices have been told.

    The last one by its number: an earlier round that was combined later has a higher version, which knows less. Raises
    UnknownModel when the model that the experiment starts from is none.
    """
    request, ledger = server.request_of(experiment_id), server.ledger
    made = [(row.number, row.version) for row in ledger.rounds(experiment_id) if row.version is not None]
    before = [one for one in made if one[0] < number]
    base = max(before)[1] if before else wire.version_of(request.model_ref)
    ledger.described(base)
    limit_s = rounds.timeout_s(request)
    return ledger.open_round(
        EdgeRoundRow(
            round_id=request.round_name(number),
            experiment_id=experiment_id,
            number=number,
            base_version=base,
            k_of_n=rounds.needed(request, len(request.participants)),
            timeout_s=limit_s,
            opened_at=now,
            deadline_at=now + timedelta(seconds=limit_s),
        )
    )


def start_alive(server: Server, round_: EdgeRoundRow) -> int:
    """Start the participants that are alive and were not started before."""
    if round_.status != OPEN:
        return 0
    request, now = server.request_of(round_.experiment_id), utc_now()
    started = {row.proplet_id for row in server.ledger.tasks(round_.round_id)}
    waiting = [one for one in selectable(server, request, now) if one not in started]
    module = server.ledger.blob("module", request.task_wasm_image)
    tasks = [_task_row(server, request, round_, one, now, module.sha256 if module else None) for one in waiting]
    notice = (rounds.ROUND_START, rounds.start_notice(request, round_.round_id, round_.base_version))
    return server.ledger.start_tasks(tasks, rounds.TASK_START, [notice])


def start_again(server: Server, proplet_id: str | None = None) -> int:
    """Leave the start messages of open rounds once more, for a device that has come back, or for all; how many.

    A device that missed the first one begins then, and one that did not finds its work done. Those that sent an update are
    left alone.
    """
    count = 0
    for round_ in server.ledger.open_rounds():
        answered = server.ledger.answered(round_.round_id)
        for task_row in server.ledger.tasks(round_.round_id):
            if task_row.proplet_id not in answered and proplet_id in (None, task_row.proplet_id):
                server.ledger.leave(rounds.TASK_START, task_row.start, utc_now())
                count += 1
    return count


def selectable(server: Server, request: ExperimentRequest, now: datetime) -> list[str]:
    """Participants that are asked: those alive; in open mode those of whom nothing was ever heard, too."""
    known = {row.proplet_id: row for row in server.ledger.devices()}
    within_s = server.pinned.alive_within_s

    def is_asked(proplet_id: str) -> bool:
        row = known.get(proplet_id)
        if row is None or row.last_beat_at is None:
            return server.pinned.is_open
        return is_alive(row, now, within_s)

    return [one for one in request.participants if is_asked(one)]


def _task_row(
    server: Server, request: ExperimentRequest, round_: EdgeRoundRow, proplet_id: str, now: datetime, sha256: str | None
) -> EdgeTaskRow:
    task_id, url = task_id_of(round_.round_id, proplet_id), server.pinned.public_url
    names = ("MANAGER_COORDINATOR_URL", "COORDINATOR_URL", "MODEL_REGISTRY_URL", "DATA_STORE_URL") if url else ()
    urls = dict.fromkeys(names, url)
    start = rounds.start_message(request, round_.round_id, round_.base_version, proplet_id, task_id, urls, sha256)
    return EdgeTaskRow(
        task_id=task_id,
        round_id=round_.round_id,
        proplet_id=proplet_id,
        name=rounds.task_name(round_.round_id, proplet_id),
        state=RUNNING,
        start=start,
        created_at=now,
        changed_at=now,
    )


# Models


def tensors_in(data: bytes, form: str) -> Tensors:
    return wire.decode_tensors(data) if form == "safetensors" else wire.read_tensors(wire.decode_json(data), "model")


def form_of(model: Tensors) -> tuple[str, bytes]:
    """JSON for small models, safetensors for large."""
    data = wire.encode_model(model)
    return ("json", data) if len(data) <= SMALL_BYTES else ("safetensors", wire.encode_tensors(model))
