"""The gateway of edge devices: manager, coordinator, registry, aggregator and local data store, over HTTP.

All on one port; with `--ports` each part on one of its own as well, with its own routes, as existing scripts expect. Names,
statuses and texts are those of existing devices, where they do what is promised of them. The manager answers errors as
{"error": ...}, the others in plain text. Keys: `Authorization: Bearer KEY`, of a device for what is its own, or the
administrator's. In open mode (HEALCHAIN_EDGE_OPEN=1, for a trusted network) nobody is asked for one; a key that is shown must
still be right, and a sender still has to take part in the round.

    python -m infra.edge_gateway --folder DIR
"""

import argparse
import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import httpx
import uvicorn
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.params import Query
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy.exc import DataError
from sqlalchemy.exc import TimeoutError as NoConnection
from starlette.exceptions import HTTPException

from blocks import pools
from blocks.artifacts import MissingArtifact, TamperedArtifact
from blocks.edge_ledger import OPEN, RUNNING, AlreadyWritten, UnknownModel, UnknownRound
from blocks.identity import Identity, residents
from blocks.registry import RegistryUnavailable
from blocks.tables import EdgeDeviceRow, EdgeModelRow, EdgeTaskRow
from infra import edge_data, edge_metrics, edge_server
from infra.edge_server import EdgeSettings
from infra.gateway import listening_socket
from tasks.edge import intake, rounds, wire
from tasks.edge.combiner import AggregatorAway, combine_in_child
from tasks.edge.names import DEVICE_RULE
from tasks.edge.runs import experiment_run, start_run
from tasks.edge.server import Server, form_of, server_of, tensors_in, utc_now
from tasks.edge.wire import CBOR_TYPES, JSON_TYPE, Refusal
from tasks.learning.combining import InvalidRule, NotCombinable, Part, checked_options

PARTS = ("manager", "coordinator", "registry", "aggregator", "datastore")
PORTS = {"manager": 7070, "coordinator": 8080, "registry": 8081, "aggregator": 8082, "datastore": 8083}
PLAIN_TYPES = (
    "",
    "text/plain",
    "application/x-www-form-urlencoded",
    "application/octet-stream",
)  # what curl and others say
BODY_S = 60.0
SAID_BYTES = 65_536  # of what a device says of itself, and of one of whom no update is awaited
LOOK_S = 10.0  # longest wait for who asks
PATIENCE_S = 3.0  # longest wait of a request for a database or a store that is away: a device asks again
COMBINING = CapacityLimiter(2)  # at a time in processes of their own, for POST /aggregate
STATUSES = {
    400: "what was sent is wrong; the message names the field",
    401: "no key, or a wrong one",
    403: "the key is another's, or its device takes no part",
    404: "unknown round, device, model or data set",
    408: "the body did not come in time",
    409: "another base version, a closed round, or a name that is taken",
    413: "too large",
    415: "neither JSON nor CBOR",
    500: "the updates cannot be combined, or what is stored was changed",
    503: "a part that is needed is away",
}
TEXT = {"type": "string"}
JSON_ERROR = {JSON_TYPE: {"schema": {"type": "object", "properties": {"error": TEXT}, "required": ["error"]}}}
TEXT_ERROR = {"text/plain": {"schema": TEXT}}
T = TypeVar("T")
Handler = Callable[[Request], Coroutine[Any, Any, Response]]
KEYS = {"type": "http", "scheme": "bearer", "description": "A device's key, or the administrator's."}
FOR_ALL = ("/health", "/metrics")
Text = Annotated[str, Query(max_length=256)]


@dataclass
class Gateway:
    """What the routes work with.

    start_flow(flow, parameters, key): has Prefect run it; empty when a run of this key is under way, else why there is none.
    """

    server: Server
    admin_key: str = field(repr=False)
    body_bytes: int = wire.MAX_BYTES
    start_flow: Callable[[str, dict[str, Any], str], str] = field(default=lambda *_: "")
    metrics: edge_metrics.Metrics = field(default_factory=edge_metrics.Metrics)

    # Who asks

    def device_of(self, request: Request) -> EdgeDeviceRow | None:
        """The device whose key was shown; None for the administrator, and for nobody in open mode. Raises Refusal."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if not key:
            if self.server.pinned.is_open:
                return None
            raise Refusal(401, "no key: send Authorization: Bearer KEY (healchain edge register gives a device one)")
        if scheme.lower() == "bearer":
            if self.is_admin(key):
                return None
            if found := self.server.ledger.device_with_key(key):
                return found
        raise Refusal(401, "the key is unknown: register the device again, or correct Authorization: Bearer KEY")

    def is_admin(self, key: str) -> bool:
        return hmac.compare_digest(
            hashlib.sha256(key.encode()).digest(), hashlib.sha256(self.admin_key.encode()).digest()
        )

    def check_own(self, request: Request, proplet_id: str) -> None:
        """Whether whoever asks may speak for this device. Raises Refusal."""
        check_speaks_for(self.device_of(request), proplet_id)

    def check_admin(self, request: Request) -> None:
        if self.device_of(request) is not None:
            raise Refusal(403, "the administrator's key is needed here, this is a device's")

    # Bodies: nothing is read of somebody who may not send it

    async def body_of_admin(self, request: Request, most: int | None = None) -> bytes:
        await look(lambda: self.check_admin(request))
        return await read_body(request, most or self.body_bytes)

    async def body_of(self, request: Request, proplet_id: str, most: int | None = None) -> bytes:
        """From this device, or from the administrator."""
        await look(lambda: self.check_own(request, proplet_id))
        return await read_body(request, most or self.body_bytes)

    async def update_from(self, request: Request, kind: Callable[[], str]) -> tuple[EdgeDeviceRow | None, bytes, str]:
        """Who sends an update, its body and its kind. Of a device of whom none is awaited little is read: enough to say why."""
        try:
            device = await look(lambda: self.device_of(request))
            named = kind()
            if device is None or await look(lambda: intake.takes_part(self.server, device.proplet_id)):
                return device, await read_body(request, self.body_bytes), named
            stranger = f"proplet_id {device.proplet_id!r} takes part in no round"
            return device, await read_body(request, SAID_BYTES, Refusal(403, stranger, "proplet_id")), named
        except Refusal as refusal:
            self.metrics.refused("http", refusal.status)
            raise

    # Experiments and updates

    def ask(self, body: bytes, *, needs_module: bool) -> dict[str, Any]:
        asked = wire.read_experiment(body, max_bytes=self.body_bytes)
        if needs_module and not asked.task_wasm_image:
            raise Refusal(400, "task_wasm_image is required for WASM orchestration", "task_wasm_image")
        opened = intake.ask_for_experiment(self.server, asked, utc_now(), self._start_asked)
        return {
            "experiment_id": opened.experiment_id,
            "model_version": opened.base_version,
            "round_id": opened.round_id,
            "status": "configured",
        }

    def start_experiment(self, experiment_id: str) -> str:
        """Have a run for it; another one where the last has died. Empty, or why there is none."""
        return self.start_flow(*experiment_run(self.server, experiment_id))

    def _start_asked(self, experiment_id: str) -> None:
        if why := self.start_experiment(experiment_id):
            raise Refusal(409, f"experiment {experiment_id}: {why}; ask for another one", "experiment_id")

    def retry(self, round_id: str) -> dict[str, Any]:
        row = self.server.ledger.close_if_due(round_id, utc_now())
        if row.status == OPEN:
            raise Refusal(409, f"round {round_id} is OPEN: only one that is closed is combined again", "round_id")
        if row.version is None:
            if not self.server.ledger.count(round_id):
                raise Refusal(409, f"round {round_id} has no updates: ask for another round", "round_id")
            parameters = {"round_id": round_id, "actor": self.server.pinned.name}
            # A minute later it may be tried anew; two who ask at once start one run.
            why = self.start_flow(
                "edge-retry", parameters, f"{self.server.ledger.owner}/retry/{round_id}/{int(time.time() // 60)}"
            )
            if why:
                raise Refusal(409, f"round {round_id}: {why}; ask again in a minute", "round_id")
        return {
            "round_id": round_id,
            "status": "retrying" if row.version is None else row.status,
            "model_version": row.version,
        }

    def take(self, device: EdgeDeviceRow | None, body: bytes, kind: str) -> dict[str, str]:
        began_s = time.perf_counter()
        try:
            update = wire.read_update(body, kind, max_bytes=self.body_bytes)
            check_speaks_for(device, update.proplet_id)
            intake.take_update(self.server, update, "http", utc_now())
        except Refusal as refusal:
            self.metrics.refused("http", refusal.status)
            raise
        self.metrics.accepted("http", time.perf_counter() - began_s)
        return {"status": "accepted"}

    async def take_from(self, request: Request, kind: Callable[[], str]) -> dict[str, str]:
        device, body, named = await self.update_from(request, kind)
        return await run_sync(lambda: self.take(device, body, named))

    def task(self, request: Request, round_id: str, proplet_id: str) -> dict[str, Any]:
        device = self.device_of(request)
        if not round_id:
            raise Refusal(400, "round_id is required", "round_id")
        asker = proplet_id or (device.proplet_id if device else "")
        if not asker and not self.server.pinned.is_open:
            raise Refusal(400, "proplet_id is required", "proplet_id")
        if device is not None:
            self.check_own(request, asker)
            self.server.ledger.beat(asker, intake.ALIVE, utc_now())
        return {"task": intake.task_of(self.server, round_id, asker)}

    # Devices

    def register(self, body: bytes) -> dict[str, Any]:
        found = _object(body)
        proplet_id, namespace = found.get("proplet_id"), found.get("namespace") or "default"
        if not isinstance(proplet_id, str) or not edge_server.is_device(proplet_id):
            raise Refusal(400, f"proplet_id = {proplet_id!r:.60}: expected {DEVICE_RULE}", "proplet_id")
        details = found.get("metadata") or {}
        if not isinstance(details, dict) or not isinstance(namespace, str):
            raise Refusal(400, "metadata: expected an object; namespace: expected text", "metadata")
        key = self.server.ledger.register(proplet_id, details, utc_now(), namespace=namespace[:128])
        return {"proplet_id": proplet_id, "key": key, "beat_s": self.server.pinned.beat_s, "topics": self._prefix}

    @property
    def _prefix(self) -> str:
        return rounds.prefix_of(self.server.pinned.tenant, self.server.pinned.channel)

    def beat(self, proplet_id: str, body: bytes) -> dict[str, Any]:
        said = _object(body).get("status", intake.ALIVE) if body else intake.ALIVE
        if said not in (intake.ALIVE, intake.OFFLINE, intake.UNHEALTHY):
            raise Refusal(400, f"status = {said!r:.60}: expected alive, offline or unhealthy", "status")
        if self.server.ledger.device(proplet_id) is None:
            raise Refusal(404, f"no device {proplet_id[:80]!r}: register it first", "proplet_id")
        self.server.ledger.beat(proplet_id, said, utc_now())
        return {"proplet_id": proplet_id, "status": said}

    def devices(self) -> dict[str, Any]:
        rows, now = self.server.ledger.devices(), utc_now()
        shown = [edge_data.shown_device(row, now, self.server.pinned.alive_within_s) for row in rows]
        return {"total": len(shown), "proplets": shown}

    # Models

    def put_model(self, body: bytes) -> dict[str, Any]:
        found = _object(body)
        version, model = found.get("version"), found.get("model")
        if version is not None and (type(version) is not int or not 0 <= version < 2**31):
            raise Refusal(
                400, f"version = {version!r:.60}: expected an integer from 0, or none for the next", "version"
            )
        form, data = form_of(wire.read_tensors(model, "model"))
        row = EdgeModelRow(version=-1, sha256="", form=form, created_at=utc_now())
        return {"status": "stored", "version": self.server.ledger.put_model(row, data, version=version)}

    def model(self, version: str, form: str) -> tuple[bytes, str, str]:
        """(bytes, their type, the digest of what is stored)."""
        if not version.isascii() or not version.isdigit() or len(version) > 10:
            raise Refusal(400, "Invalid version", "version")
        row = self.server.ledger.model(int(version))
        data = self.server.ledger.model_bytes(row)
        if form not in ("", "json", "safetensors"):
            raise Refusal(400, f"format = {form!r:.40}: expected json or safetensors", "format")
        wanted = form or "json"
        if wanted == row.form:
            shown = data
        else:
            tensors = tensors_in(data, row.form)
            shown = wire.encode_model(tensors) if wanted == "json" else wire.encode_tensors(tensors)
        return shown, JSON_TYPE if wanted == "json" else "application/octet-stream", row.sha256

    # Aggregator

    def aggregate(self, body: bytes) -> dict[str, Any]:
        """The plain mean as existing coordinators ask for it; with `rule`, any rule, with the base and its state."""
        found = _object(body)
        given = found.get("updates")
        if not isinstance(given, list) or not given:
            raise Refusal(400, "No updates provided", "updates")
        parts = [_part(place, one) for place, one in enumerate(given)]
        base = wire.read_tensors(found["base"], "base") if "base" in found else dict(parts[0].tensors)
        state = wire.read_tensors(found["state"], "state") if found.get("state") else {}
        for place, part in enumerate(parts):
            wire.check_fits(part.tensors, base, f"updates.{place}.update")
        self._check_samples(parts)
        rule, options = found.get("rule", "fedavg"), found.get("rule_options") or {}
        if not isinstance(rule, str) or not isinstance(options, dict):
            raise Refusal(400, "rule: expected text; rule_options: expected an object", "rule")
        try:
            checked_options(rule, options)
            timeout_s = self.server.pinned.aggregation_timeout_s
            model, after = combine_in_child(rule, options, base, state, parts, timeout_s)
        except InvalidRule as error:
            raise Refusal(400, str(error), "rule") from None
        except NotCombinable as error:
            raise Refusal(500, str(error)) from None
        except AggregatorAway as error:
            raise Refusal(503, f"{error}: try again") from None
        bare = wire.model_json(model)
        return {"model": bare, "state": wire.model_json(after)} if "rule" in found else bare

    def _check_samples(self, parts: Sequence[Part]) -> None:
        most = self.server.pinned.max_samples
        for place, part in enumerate(parts):
            if part.samples > most:
                what = f"updates.{place}.num_samples"
                raise Refusal(400, f"{what} = {part.samples}: expected an integer from 1 to {most}", what)

    # Tasks of the manager

    def make_task(self, body: bytes) -> EdgeTaskRow:
        row = edge_data.task_from(_object(body), utc_now())
        self.server.ledger.put_task(row)
        return row

    def change_task(self, task_id: str, state: int) -> None:
        row = self.find_task(task_id)
        topic = rounds.TASK_START if state == RUNNING else rounds.TASK_STOP
        stop = json.dumps({"id": row.task_id, "broadcast": False, "proplet_id": row.proplet_id})
        row.state, row.changed_at = state, utc_now()
        self.server.ledger.put_task(row, [(topic, row.start if state == RUNNING else stop)])

    def find_task(self, task_id: str) -> EdgeTaskRow:
        found = self.server.ledger.task(task_id)
        if found is None:
            raise Refusal(404, f"no task {task_id[:80]!r}", "task_id")
        return found


def check_speaks_for(device: EdgeDeviceRow | None, proplet_id: str) -> None:
    """Whether a key is this device's; None: it opens everything. Raises Refusal."""
    if device is not None and device.proplet_id != proplet_id:
        raise Refusal(403, f"proplet_id {proplet_id[:80]!r}: the key is that of {device.proplet_id}", "proplet_id")


def _part(place: int, one: Any) -> Part:
    what = f"updates.{place}"
    if not isinstance(one, dict):
        raise Refusal(400, f"{what}: expected an object", what)
    samples, sender = one.get("num_samples"), one.get("proplet_id") or f"{place:06d}"
    if type(samples) is not int or not 1 <= samples <= wire.MAX_SAMPLES:
        raise Refusal(
            400, f"{what}.num_samples = {samples!r:.40}: expected an integer from 1 to {wire.MAX_SAMPLES}", what
        )
    return Part(str(sender), samples, wire.read_tensors(one.get("update"), f"{what}.update"))


def _object(body: bytes) -> dict[str, Any]:
    found = wire.decode_json(body)
    if not isinstance(found, dict):
        raise Refusal(400, "Invalid JSON: expected an object")
    return found


# Answers


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON, keys in order, with a line's end: as existing services answer."""
    return Response(json.dumps(value, sort_keys=True).encode() + b"\n", status, headers, media_type=JSON_TYPE)


def refusal_of(error: Exception) -> Refusal | None:
    """What an error says to whoever asked."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, UnknownRound):
        return Refusal(404, f"Round not found: {error}", "round_id")
    if isinstance(error, UnknownModel | MissingArtifact):
        return Refusal(404, str(error))
    if isinstance(error, AlreadyWritten):
        return Refusal(409, str(error))
    if isinstance(error, DataError):  # PostgreSQL keeps no zero character in a text
        return Refusal(400, "a text holds a character that cannot be kept; leave zero characters out")
    if isinstance(error, TamperedArtifact):
        return Refusal(500, f"Invalid model file: {error}")
    if isinstance(error, RegistryUnavailable | NoConnection | pools.PoolsUnavailable | OSError):
        return Refusal(503, f"a part that is needed is away ({type(error).__name__}): try again")
    return None


def json_error(refusal: Refusal) -> Response:
    return answer({"error": str(refusal)}, refusal.status)


def text_error(refusal: Refusal) -> Response:
    return Response(f"{refusal}\n", refusal.status, {"X-Content-Type-Options": "nosniff"}, media_type="text/plain")


def _route_class(render: Callable[[Refusal], Response]) -> type[APIRoute]:
    """Routes whose refusals are written this way."""

    class Route(APIRoute):
        def get_route_handler(self) -> Handler:
            handle = super().get_route_handler()

            async def run(request: Request) -> Response:
                try:
                    return await handle(request)
                except RequestValidationError as error:
                    first = error.errors()[0]
                    return render(Refusal(400, f"{first['loc'][-1]}: {first['msg']}"))
                except HTTPException:
                    raise
                except Exception as error:
                    refusal = refusal_of(error)
                    if refusal is None:
                        raise
                    return render(refusal)

            return run

    return Route


async def look(work: Callable[[], T]) -> T:
    """Look something up in a thread, so that others are served meanwhile. Raises Refusal: 503 after LOOK_S."""
    try:
        async with asyncio.timeout(LOOK_S):
            return await run_sync(work, abandon_on_cancel=True)
    except TimeoutError:
        raise Refusal(503, f"the database did not answer within {LOOK_S:g} s: try again") from None


async def read_body(request: Request, most: int, larger: Refusal | None = None) -> bytes:
    """Raises Refusal: 413, or `larger`, before anything is read or as soon as it is too large; 408 when it does not come."""
    larger = larger or Refusal(413, f"the body has more than {most} bytes")
    said = request.headers.get("content-length", "")
    if said.isdecimal() and (len(said) > 18 or int(said) > most):
        raise larger
    received = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for piece in request.stream():
                received += piece
                if len(received) > most:
                    raise larger
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {BODY_S:g} s") from None
    return bytes(received)


def kind_of(request: Request, default: str) -> str:
    """JSON or CBOR, by the content type; default: for those that name none of both. Raises Refusal."""
    named = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if named in CBOR_TYPES:
        return named
    if named == JSON_TYPE or named.endswith("+json"):
        return JSON_TYPE
    if named in PLAIN_TYPES:
        return default
    raise Refusal(415, f"Content-Type {named[:80]!r}: expected {JSON_TYPE} or {' or '.join(CBOR_TYPES)}")


def cbor_of(request: Request) -> str:
    """As `kind_of`, where nothing but CBOR is taken."""
    named = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if named not in CBOR_TYPES:
        raise Refusal(400, f"Content-Type {named[:80]!r}: expected {' or '.join(CBOR_TYPES)}")
    return named


# Routes


def _body_of(*kinds: str) -> dict[str, Any]:
    """For the OpenAPI document: bodies are read here and not by FastAPI."""
    shape = {"type": "object"}
    return {"requestBody": {"required": True, "content": {kind: {"schema": shape} for kind in kinds}}}


def _errors(content: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """What each route may answer beside its own."""
    return {status: {"description": said, "content": content} for status, said in STATUSES.items()}


def _bytes(*kinds: str) -> dict[str, Any]:
    """Of a route whose answer is not JSON alone; its types take the place of JSON."""
    content = {kind: {} if kind == JSON_TYPE else {"schema": TEXT} for kind in kinds}
    return {"response_class": Response, "responses": {200: {"description": "Successful Response", "content": content}}}


JSON_BODY, CBOR_BODY, UPDATE_BODY = _body_of(JSON_TYPE), _body_of(*CBOR_TYPES), _body_of(JSON_TYPE, *CBOR_TYPES)
BYTES_BODY = {
    "requestBody": {"required": True, "content": {"application/octet-stream": {"schema": {"type": "string"}}}}
}


def manager_routes(gateway: Gateway) -> APIRouter:
    routes = APIRouter(route_class=_route_class(json_error), tags=["manager"], responses=_errors(JSON_ERROR))

    @routes.post("/fl/experiments", openapi_extra=JSON_BODY)
    async def configure(request: Request) -> Response:
        """Ask for an experiment; its flow is started."""
        await look(lambda: gateway.check_admin(request))
        if JSON_TYPE not in request.headers.get("content-type", ""):
            raise Refusal(400, f"Content-Type: expected {JSON_TYPE}")
        body = await read_body(request, gateway.body_bytes)
        found = await run_sync(lambda: gateway.ask(body, needs_module=True))
        return answer({name: found[name] for name in ("experiment_id", "round_id", "status")})

    @routes.get("/fl/task")
    def task(request: Request, round_id: Text = "", proplet_id: Text = "") -> Response:
        return answer(gateway.task(request, round_id, proplet_id))

    @routes.post("/fl/update", openapi_extra=JSON_BODY)
    async def update(request: Request) -> Response:
        return answer(await gateway.take_from(request, lambda: kind_of(request, JSON_TYPE)))

    @routes.post("/fl/update_cbor", openapi_extra=CBOR_BODY)
    async def update_cbor(request: Request) -> Response:
        return answer(await gateway.take_from(request, lambda: cbor_of(request)))

    @routes.get("/fl/rounds/{round_id}/complete")
    def is_complete(request: Request, round_id: str) -> Response:
        gateway.device_of(request)
        return answer({"status": intake.standing_of(gateway.server, round_id, utc_now())})

    @routes.post("/fl/rounds/{round_id}/retry", status_code=202)
    def retry(request: Request, round_id: str) -> Response:
        """Combine the updates that a round has kept."""
        gateway.check_admin(request)
        return answer(gateway.retry(round_id), 202)

    @routes.get("/fl/experiments/{experiment_id}")
    def experiment(request: Request, experiment_id: str) -> Response:
        gateway.check_admin(request)
        return answer(edge_data.shown_experiment(gateway.server, experiment_id))

    _device_routes(gateway, routes)
    _task_routes(gateway, routes)
    _health(routes, "pass")
    return routes


def _device_routes(gateway: Gateway, routes: APIRouter) -> None:
    @routes.post("/devices", status_code=201, openapi_extra=JSON_BODY)
    async def register(request: Request) -> Response:
        """Give a device a key, in place of an earlier one. It is shown once."""
        body = await gateway.body_of_admin(request)
        return answer(await run_sync(gateway.register, body), 201)

    @routes.get("/devices")
    def devices(request: Request) -> Response:
        gateway.check_admin(request)
        return answer(gateway.devices())

    @routes.post("/devices/{proplet_id}/alive")
    async def beat(request: Request, proplet_id: str) -> Response:
        """What a device without MQTT says each beat: {"status": "alive"}."""
        body = await gateway.body_of(request, proplet_id, SAID_BYTES)
        return answer(await run_sync(lambda: gateway.beat(proplet_id, body)))

    @routes.put("/modules/{name:path}", status_code=201, openapi_extra=BYTES_BODY)
    async def put_module(request: Request, name: str) -> Response:
        """Keep a training module under the name that experiments give as task_wasm_image."""
        body = await gateway.body_of_admin(request)
        return answer(await run_sync(lambda: edge_data.put_module(gateway.server, name, body)), 201)

    @routes.get("/modules/{name:path}", **_bytes("application/wasm"))
    def module(request: Request, name: str) -> Response:
        """A module by its name, or by its SHA-256 in hexadecimal digits."""
        gateway.device_of(request)
        row, data = edge_data.find_module(gateway.server, name)
        return Response(data, headers={"X-SHA256": row.sha256.removeprefix("0x")}, media_type="application/wasm")


def _task_routes(gateway: Gateway, routes: APIRouter) -> None:
    @routes.post("/tasks", status_code=201, openapi_extra=JSON_BODY)
    async def make(request: Request) -> Response:
        body = await gateway.body_of_admin(request)
        row = await run_sync(gateway.make_task, body)
        return answer(edge_data.shown_task(row), 201, {"Location": f"/tasks/{row.task_id}"})

    @routes.get("/tasks/{task_id}")
    def read(request: Request, task_id: str) -> Response:
        gateway.check_admin(request)
        return answer(edge_data.shown_task(gateway.find_task(task_id)))

    @routes.get("/tasks/{task_id}/results")
    def results(request: Request, task_id: str) -> Response:
        gateway.check_admin(request)
        row = gateway.find_task(task_id)
        return answer({"results": None if row.results is None else json.loads(row.results)})

    @routes.post("/tasks/{task_id}/start")
    def start(request: Request, task_id: str) -> Response:
        gateway.check_admin(request)
        gateway.change_task(task_id, RUNNING)
        return answer({"started": True})

    @routes.post("/tasks/{task_id}/stop")
    def stop(request: Request, task_id: str) -> Response:
        gateway.check_admin(request)
        gateway.change_task(task_id, edge_data.INTERRUPTED)
        return answer({"stopped": True})


def coordinator_routes(gateway: Gateway) -> APIRouter:
    routes = APIRouter(route_class=_route_class(text_error), tags=["coordinator"], responses=_errors(TEXT_ERROR))

    @routes.post("/experiments", status_code=201, openapi_extra=JSON_BODY)
    async def configure(request: Request) -> Response:
        body = await gateway.body_of_admin(request)
        return answer(await run_sync(lambda: gateway.ask(body, needs_module=False)), 201)

    @routes.get("/task")
    def task(request: Request, round_id: Text = "", proplet_id: Text = "") -> Response:
        return answer(gateway.task(request, round_id, proplet_id))

    @routes.post("/update", openapi_extra=UPDATE_BODY)
    async def update(request: Request) -> Response:
        return answer(await gateway.take_from(request, lambda: kind_of(request, JSON_TYPE)))

    @routes.post("/update_cbor", openapi_extra=UPDATE_BODY)
    async def update_cbor(request: Request) -> Response:
        return answer(await gateway.take_from(request, lambda: kind_of(request, CBOR_TYPES[0])))

    @routes.get("/rounds/next")
    def next_round(request: Request, proplet_id: Text = "") -> Response:
        device = gateway.device_of(request)
        return answer(intake.next_round(gateway.server, device.proplet_id if device else proplet_id))

    @routes.get("/rounds/{round_id}/complete")
    def is_complete(request: Request, round_id: str) -> Response:
        gateway.device_of(request)
        return answer(intake.standing_of(gateway.server, round_id, utc_now()))

    _health(routes, "ok")
    return routes


def registry_routes(gateway: Gateway) -> APIRouter:
    routes, server = (
        APIRouter(route_class=_route_class(text_error), tags=["registry"], responses=_errors(TEXT_ERROR)),
        gateway.server,
    )

    @routes.post("/models", status_code=201, openapi_extra=JSON_BODY)
    async def put(request: Request) -> Response:
        """Store a version, once; without a number the next one."""
        body = await gateway.body_of_admin(request)
        return answer(await run_sync(gateway.put_model, body), 201)

    @routes.get("/models")
    def versions(request: Request) -> Response:
        gateway.device_of(request)
        return answer({"versions": server.ledger.versions()})

    @routes.get("/models/{version}", **_bytes(JSON_TYPE, "application/octet-stream"))
    def model(request: Request, version: str, format: Text = "") -> Response:
        """The bare model; its digest is in X-SHA256. format: json, or safetensors."""
        gateway.device_of(request)
        data, kind, sha256 = gateway.model(version, format)
        return Response(data, headers={"X-SHA256": sha256.removeprefix("0x")}, media_type=kind)

    @routes.get("/models/{version}/lineage")
    def lineage(request: Request, version: str) -> Response:
        """Where a version comes from: its parents down to the first."""
        gateway.device_of(request)
        return answer({"lineage": edge_data.lineage(server, version)})

    @routes.put("/pins/{name}", openapi_extra=JSON_BODY)
    async def pin(request: Request, name: str) -> Response:
        """Let a name stand for a version: {"version": 3}."""
        body = await gateway.body_of_admin(request, SAID_BYTES)
        return answer(await run_sync(lambda: edge_data.pin(server, name, _object(body))))

    @routes.get("/pins/{name}")
    def pinned(request: Request, name: str) -> Response:
        gateway.device_of(request)
        return answer(edge_data.shown_version(server.ledger.pinned(name)))

    @routes.post("/pins/{name}/rollback")
    def roll_back(request: Request, name: str) -> Response:
        """Undo the newest pin of a name; the version before it holds again."""
        gateway.check_admin(request)
        return answer(edge_data.shown_version(server.ledger.roll_back(name, utc_now())))

    _health(routes, "ok")
    return routes


def aggregator_routes(gateway: Gateway) -> APIRouter:
    routes = APIRouter(route_class=_route_class(text_error), tags=["aggregator"], responses=_errors(TEXT_ERROR))

    @routes.post("/aggregate", openapi_extra=JSON_BODY)
    async def aggregate(request: Request) -> Response:
        body = await gateway.body_of_admin(request)
        return answer(await run_sync(gateway.aggregate, body, limiter=COMBINING))

    _health(routes, "ok")
    return routes


def datastore_routes(gateway: Gateway) -> APIRouter:
    routes, server = (
        APIRouter(route_class=_route_class(text_error), tags=["datastore"], responses=_errors(TEXT_ERROR)),
        gateway.server,
    )

    @routes.get("/datasets")
    def names(request: Request) -> Response:
        gateway.check_admin(request)
        clients = [row.name for row in server.ledger.blobs("dataset")]
        return answer({"clients": clients, "count": len(clients)})

    @routes.get("/datasets/{proplet_id}")
    def dataset(request: Request, proplet_id: str) -> Response:
        gateway.check_own(request, proplet_id)
        return Response(edge_data.dataset(server, proplet_id), media_type=JSON_TYPE)

    @routes.post("/datasets/{proplet_id}", status_code=201, openapi_extra=JSON_BODY)
    async def put(request: Request, proplet_id: str) -> Response:
        body = await gateway.body_of(request, proplet_id)
        return answer(await run_sync(lambda: edge_data.put_dataset(server, proplet_id, _object(body))), 201)

    _health(routes, "ok")
    return routes


def _health(routes: APIRouter, word: str) -> None:
    @routes.get("/health", operation_id=f"health_{word}_{routes.tags[0]}")
    def health() -> Response:
        return answer({"status": word})


def metrics_routes(gateway: Gateway) -> APIRouter:
    routes = APIRouter(route_class=_route_class(text_error), tags=["metrics"], responses=_errors(TEXT_ERROR))

    @routes.get("/metrics", **_bytes("text/plain"))
    def metrics() -> Response:
        """For Prometheus."""
        return Response(gateway.metrics.text(gateway.server), media_type=CONTENT_TYPE_LATEST)

    return routes


ROUTES = dict(
    zip(PARTS, (manager_routes, coordinator_routes, registry_routes, aggregator_routes, datastore_routes), strict=True)
)


class _Service(FastAPI):
    """Its document is without 422, which FastAPI adds to every route with a parameter: they answer 400. It names the keys."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        for name, path in document["paths"].items():
            for operation in path.values():
                operation["responses"].pop("422", None)
                operation["security"] = [] if name in FOR_ALL else [{"HTTPBearer": []}]
        document["components"] = {"securitySchemes": {"HTTPBearer": KEYS}}
        return document


def service(gateway: Gateway, parts: Sequence[str] = PARTS) -> FastAPI:
    """The service of some parts; a path that two have is the first one's."""
    app = _Service(title="HealChain edge gateway", version="1")
    is_manager = "manager" in parts
    for part in parts:
        app.include_router(ROUTES[part](gateway))

    app.include_router(metrics_routes(gateway))

    @app.exception_handler(HTTPException)
    def unknown(request: Request, error: HTTPException) -> Response:
        if is_manager:
            return answer({"error": str(error.detail)}, error.status_code, dict(error.headers or {}))
        said = "404 page not found\n" if error.status_code == 404 else ""
        return Response(said, error.status_code, dict(error.headers or {}), media_type="text/plain")

    return app


# The process


def start_by_prefect(flow: str, parameters: dict[str, Any], key: str) -> str:
    """As `start_run`, for somebody who waits. Raises Refusal when Prefect does not answer."""
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    try:
        httpx.get(f"{url}/health", timeout=5.0)
    except httpx.HTTPError as error:
        raise Refusal(
            503, f"Prefect's API does not answer ({type(error).__name__}): nothing was started; ask again"
        ) from None
    return start_run(flow, parameters, key)


def gateway_of(folder: Path, settings: EdgeSettings) -> Gateway:
    """The gateway of a folder that `healchain edge up` has set up. Raises NotConnected."""
    residents["edge"] = Identity(home=str(folder / "home"))
    server = impatient(server_of("edge"))
    return Gateway(server, edge_server.admin_key(folder), settings.body_bytes, start_by_prefect)


def impatient(server: Server) -> Server:
    """The same, for requests: whoever asks is told within seconds that the database or the store is away."""
    patience = {"patience_s": PATIENCE_S}
    registry = server.ledger.registry.model_copy(update=patience)
    store = server.ledger.store.model_copy(update=patience)
    return replace(server, ledger=replace(server.ledger, registry=registry, store=store))


async def serve(
    gateway: Gateway, host: str, port: int, ports: dict[str, int], beside: Callable[[], Any] | None = None
) -> None:
    """Serve on one port, and each part on its own where `ports` has one, until SIGTERM. beside: what runs next to it."""
    apps = [(service(gateway), port), *((service(gateway, [part]), own) for part, own in ports.items())]
    servers = [
        _Quiet(uvicorn.Config(app, access_log=False, log_level="warning", server_header=False)) for app, _ in apps
    ]
    sockets = [listening_socket(host, own) for _, own in apps]
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _end, servers)
    helper = asyncio.create_task(beside()) if beside else None
    await asyncio.gather(*(one.serve(sockets=[own]) for one, own in zip(servers, sockets, strict=True)))
    if helper is not None:
        helper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await helper


def _end(servers: Sequence[uvicorn.Server]) -> None:
    for one in servers:
        one.should_exit = True


class _Quiet(uvicorn.Server):
    """One of several in a process: signals are handled once, for all."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m infra.edge_gateway")
    flags.add_argument("--folder", type=Path, required=True)
    flags.add_argument("--host", default="127.0.0.1")
    flags.add_argument("--port", type=int, default=8080)
    flags.add_argument("--ports", action="store_true", help="each part on its own port as well")
    given = flags.parse_args()
    settings = edge_server.read_settings(os.environ)
    gateway = gateway_of(given.folder.resolve(), settings)
    ports = {part: own for part, own in settings.ports.items() if own != given.port} if given.ports else {}
    from infra import edge_bridge, edge_watch

    bridge = edge_bridge.Bridge(server_of("edge"), settings, given.folder.resolve(), gateway.metrics)

    async def beside() -> None:
        await asyncio.gather(bridge.run(), edge_watch.watch(gateway))

    asyncio.run(serve(gateway, given.host, given.port, ports, beside))


if __name__ == "__main__":
    main()
