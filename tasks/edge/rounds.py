"""The rules of a round: who may send, from which model, and what each device is told. Pure.

Topics are below a prefix `m/{tenant}/c/{channel}/`; in compatibility mode some are bare as well (infra.edge_bridge).

Errors: Refusal.
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from tasks.edge.names import NAME
from tasks.edge.wire import DEFAULT_K, DEFAULT_TIMEOUT_S, ExperimentRequest, Refusal, Update, reference_of, version_of

ROUND_START, ROUND_NEXT = "fl/rounds/start", "fl/rounds/next"
TASK_START, TASK_STOP = "control/manager/start", "control/manager/stop"
OWN_START = TASK_START + "/{proplet_id}"
CREATE, ALIVE, RESULTS = "control/proplet/create", "control/proplet/alive", "control/proplet/results"
METRICS, TASK_METRICS = "control/proplet/metrics", "control/proplet/task_metrics"
MODULE_WANTED, MODULE_CHUNK = "registry/proplet", "registry/server"
UPDATES = "fl/rounds/{round_id}/updates/{proplet_id}"
ANSWER = "control/manager/answers"
OWN_ANSWER = ANSWER + "/{proplet_id}"
SPOKEN_BY_DEVICES = (CREATE, ALIVE, RESULTS, METRICS, TASK_METRICS, MODULE_WANTED)
HEARD_BY_DEVICES = (TASK_START, TASK_STOP, MODULE_CHUNK, ROUND_START, ROUND_NEXT)
BARE = (ROUND_NEXT, ROUND_START)  # what compatibility mode publishes without the prefix as well


MAX_DETAIL = 1000  # characters


def prefix_of(tenant: str, channel: str) -> str:
    return f"m/{tenant}/c/{channel}/"


def check_update(update: Update, participants: Collection[str], base_version: int) -> None:
    """Whether this sender may send this to the round. Raises Refusal: 403 a stranger, 409 another base."""
    if update.proplet_id not in participants:
        raise Refusal(
            403, f"proplet_id {update.proplet_id!r} is no participant of round {update.round_id}", "proplet_id"
        )
    if update.base_model_uri and version_of(update.base_model_uri) != base_version:
        raise Refusal(
            409,
            f"base_model_uri {update.base_model_uri!r}: round {update.round_id} trains from {reference_of(base_version)}; "
            "fetch that and train again",
            "base_model_uri",
        )


def late(round_id: str, reason: str) -> Refusal:
    """To an update that came after the closing."""
    why = {"k": "enough updates came", "timeout": "its time was over"}
    because = why.get(reason, "nothing conducts it any more")
    return Refusal(409, f"round {round_id} is closed: {because}; wait for the next round", "round_id")


def needed(request: ExperimentRequest, participants: int) -> int:
    """How many updates close a round."""
    return request.k_of_n or min(DEFAULT_K, participants)


def timeout_s(request: ExperimentRequest) -> int:
    return request.timeout_s or DEFAULT_TIMEOUT_S


def start_message(
    request: ExperimentRequest,
    round_id: str,
    base_version: int,
    proplet_id: str,
    task_id: str,
    urls: Mapping[str, str],
    module_sha256: str | None,
) -> str:
    """What starts a device's task, as existing devices read it. urls: more of the module's environment.

    module_sha256: of the training module, where it is known here; ours, for the device to check.
    """
    env = {
        "ROUND_ID": round_id,
        "MODEL_URI": reference_of(base_version),
        "HYPERPARAMS": json.dumps(request.hyperparams, sort_keys=True, separators=(",", ":")),
        **urls,
    }
    message: dict[str, Any] = {
        "id": task_id,
        "name": task_name(round_id, proplet_id),
        "state": 0,
        "image_url": request.task_wasm_image,
        "cli_args": None,
        "broadcast": False,
        "daemon": False,
        "latent": False,
        "env": env,
        "encrypted": False,
        "proplet_id": proplet_id,
    }
    if module_sha256 is not None:
        message["sha256"] = module_sha256.removeprefix("0x")
    return json.dumps(message)


def task_name(round_id: str, proplet_id: str) -> str:
    """The beginning `fl-round-` is what tells existing devices to run the module's `_start`."""
    return f"fl-round-{round_id}-{proplet_id}"


def start_notice(request: ExperimentRequest, round_id: str, base_version: int) -> str:
    return json.dumps(
        {
            "round_id": round_id,
            "model_uri": reference_of(base_version),
            "task_wasm_image": request.task_wasm_image,
            "participants": request.participants,
            "hyperparams": request.hyperparams,
        }
    )


def answer(round_id: str, proplet_id: str, status: int, detail: str) -> str:
    """What became of an update over MQTT, as HTTP would say it: 200, or the status of a refusal."""
    return json.dumps({"round_id": round_id, "proplet_id": proplet_id, "status": status, "detail": detail[:MAX_DETAIL]})


def topics_of(topic: str, payload: str, *, is_open: bool) -> list[str]:
    """Where a message is published, below the prefix. A task's start goes to its device alone.

    In open mode it goes to all as well, as existing devices expect: then n devices of a round get n starts each.
    """
    proplet_id = json.loads(payload).get("proplet_id") or "" if topic == TASK_START else ""
    if not re.fullmatch(NAME, proplet_id):
        return [topic]
    return [OWN_START.format(proplet_id=proplet_id), *([topic] if is_open else [])]


def acl(prefix: str, *, is_open: bool) -> list[tuple[str, str]]:
    """What a device may do: (read or write, pattern with %u for its id). The server may do everything.

    A device publishes updates under its own id alone. What all speak on together is told apart by the id in the message and
    its seal (tasks.edge.seal).
    """
    own = "fl/rounds/+/updates/%u"
    rules = [("write", prefix + one) for one in (*SPOKEN_BY_DEVICES, own)]
    owned = [one.format(proplet_id="%u") for one in (OWN_START, OWN_ANSWER)]
    rules += [("read", prefix + one) for one in (*HEARD_BY_DEVICES, *owned)]
    if is_open:
        rules += [("write", own), *(("read", one) for one in BARE)]
    return rules
