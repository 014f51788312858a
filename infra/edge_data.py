"""What the gateway of edge devices shows and keeps beside rounds: modules, data sets, tasks, lineages.

Errors: Refusal, UnknownModel, UnknownRound.
"""

import base64
import binascii
import json
import math
from datetime import datetime
from typing import Any
from uuid import uuid4

from blocks.artifacts import MissingArtifact
from blocks.edge_ledger import DONE, PENDING, is_alive
from blocks.tables import EdgeBlobRow, EdgeDeviceRow, EdgeModelRow, EdgeTaskRow
from tasks.edge.intake import standing_of
from tasks.edge.server import Server, utc_now
from tasks.edge.wire import Refusal

INTERRUPTED = 6
SCHEMA = "fl-demo-dataset-v1"
WASM = b"\0asm"
MAX_ROWS = 10_000_000
LINEAGE_MAX = 100_000

# Modules


def put_module(server: Server, name: str, data: bytes) -> dict[str, Any]:
    if not 0 < len(name) <= 512 or not name.isprintable():
        raise Refusal(400, "name: expected 1 to 512 printable characters, such as registry/module:tag", "name")
    if not data.startswith(WASM):
        raise Refusal(400, "the body is no WebAssembly module: it does not begin with 00 61 73 6d")
    row = server.ledger.put_blob("module", name, data)
    return {"name": name, "sha256": row.sha256.removeprefix("0x"), "size": row.size_bytes, "status": "stored"}


def find_module(server: Server, name: str) -> tuple[EdgeBlobRow, bytes]:
    """By its name or its digest. Raises Refusal."""
    row = server.ledger.blob("module", name) or next(
        (one for one in server.ledger.blobs("module") if one.sha256.removeprefix("0x") == name.removeprefix("sha256:")),
        None,
    )
    if row is None:
        raise Refusal(404, f"no module {name[:200]!r}: store it first (PUT /modules/NAME)", "name")
    return row, server.ledger.blob_bytes(row)


# Data sets


def put_dataset(server: Server, proplet_id: str, found: dict[str, Any]) -> dict[str, Any]:
    """Keep a device's data set; what it says of its size and its owner is written again."""
    rows = found.get("data")
    if not isinstance(rows, list) or len(rows) > MAX_ROWS:
        raise Refusal(400, f"data: expected a list of at most {MAX_ROWS} samples", "data")
    for place, row in enumerate(rows):
        _check_sample(place, row)
    if not 0 < len(proplet_id) <= 128 or not proplet_id.isprintable():
        raise Refusal(400, f"proplet_id = {proplet_id!r:.60}: expected 1 to 128 printable characters", "proplet_id")
    schema = found.get("schema") or SCHEMA
    kept = {**found, "schema": schema, "proplet_id": proplet_id, "data": rows, "size": len(rows)}
    server.ledger.put_blob("dataset", proplet_id, json.dumps(kept, sort_keys=True).encode())
    return {"proplet_id": proplet_id, "size": len(rows), "status": "stored"}


def _check_sample(place: int, row: Any) -> None:
    what = f"data.{place}"
    if not isinstance(row, dict) or not isinstance(row.get("x"), list) or "y" not in row:
        raise Refusal(400, f'{what}: expected {{"x": [numbers], "y": number}}', what)
    for value in (*row["x"], row["y"]):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise Refusal(400, f"{what}: {value!r:.40} is no finite number", what)


def dataset(server: Server, proplet_id: str) -> bytes:
    row = server.ledger.blob("dataset", proplet_id)
    if row is None:
        raise Refusal(404, "Dataset not found", "proplet_id")
    try:
        return server.ledger.blob_bytes(row)
    except MissingArtifact:
        raise Refusal(404, "Dataset not found", "proplet_id") from None


# Tasks


def task_from(found: dict[str, Any], now: datetime) -> EdgeTaskRow:
    """A task as the manager's API takes it. Raises Refusal."""
    for name in ("name", "image_url", "file", "proplet_id"):
        if not isinstance(found.get(name) or "", str):
            raise Refusal(400, f"{name}: expected text", name)
    env = found.get("env") or {}
    if not isinstance(env, dict) or not all(isinstance(value, str) for value in env.values()):
        raise Refusal(400, "env: expected an object of texts", "env")
    if not found.get("name"):
        raise Refusal(400, "name is required", "name")
    _check_file(found.get("file"))
    kept = ("name", "image_url", "file", "cli_args", "broadcast", "daemon", "latent", "env", "encrypted", "proplet_id")
    task_id = str(uuid4())
    start = {"id": task_id, "state": PENDING, **{name: found[name] for name in kept if name in found}}
    return EdgeTaskRow(
        task_id=task_id,
        proplet_id=(found.get("proplet_id") or "")[:128],
        name=found["name"][:256],
        state=PENDING,
        start=json.dumps(start),
        created_at=now,
        changed_at=now,
    )


def _check_file(file: str | None) -> None:
    try:
        if file and not base64.b64decode(file, validate=True).startswith(WASM):
            raise Refusal(400, "file: no WebAssembly module in base64", "file")
    except binascii.Error:
        raise Refusal(400, "file: no base64", "file") from None


def shown_task(row: EdgeTaskRow) -> dict[str, Any]:
    moments = {"created_at": _clock(row.created_at), "updated_at": _clock(row.changed_at)}
    return {**json.loads(row.start), "id": row.task_id, "state": row.state, "error": row.error, **moments}


def record_results(server: Server, found: dict[str, Any], sender: str) -> bool:
    """What a device says of a task that ended; whether the task is known and this device's."""
    row = server.ledger.task(str(found.get("task_id", ""))[:64])
    if row is None or row.proplet_id not in ("", sender):
        return False
    error = str(found.get("error") or "")[:4096].replace("\0", "")
    row.state, row.error, row.changed_at = (4 if error else DONE), error, utc_now()
    row.results = json.dumps(found.get("results"))
    server.ledger.put_task(row)
    return True


# What is shown


def shown_device(row: EdgeDeviceRow, now: datetime, within_s: float) -> dict[str, Any]:
    return {
        "id": row.proplet_id,
        "namespace": row.namespace,
        "alive": is_alive(row, now, within_s),
        "health": row.health,
        "last_beat": None if row.last_beat_at is None else _clock(row.last_beat_at),
        "has_key": row.key_sha256 is not None,
        "metadata": json.loads(row.details),
    }


def shown_version(row: EdgeModelRow) -> dict[str, Any]:
    return {
        "version": row.version,
        "parent": row.parent,
        "sha256": row.sha256.removeprefix("0x"),
        "form": row.form,
        "metrics": json.loads(row.metrics),
        "experiment_id": row.experiment_id,
        "round_id": row.round_id,
        "created_at": _clock(row.created_at),
    }


def lineage(server: Server, version: str) -> list[dict[str, Any]]:
    """A version and its parents, the newest first."""
    if not version.isascii() or not version.isdigit() or len(version) > 10:
        raise Refusal(400, "Invalid version", "version")
    found = [shown_version(row := server.ledger.described(int(version)))]
    while row.parent is not None and row.parent < row.version and len(found) < LINEAGE_MAX:
        row = server.ledger.described(row.parent)
        found.append(shown_version(row))
    return found


def pin(server: Server, name: str, found: dict[str, Any]) -> dict[str, Any]:
    version = found.get("version")
    if type(version) is not int or not 0 < len(name) <= 80 or not name.isprintable():
        raise Refusal(
            400, f"version = {version!r:.40}: expected an integer, and a name of at most 80 characters", "version"
        )
    return shown_version(server.ledger.pin(name, version, utc_now()))


def shown_experiment(server: Server, experiment_id: str) -> dict[str, Any]:
    request = server.request_of(experiment_id)
    rows = [standing_of(server, row.round_id, utc_now()) for row in server.ledger.rounds(experiment_id)]
    return {"experiment": request.model_dump(mode="json"), "rounds": rows}


def _clock(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
