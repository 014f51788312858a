"""A small device of edge rounds: it hears of a round, trains its module on its own data, and hands the model in.

    heard of        over MQTT, or by asking the server while there is none
    module          from the task itself, an http(s) address, the server, or in pieces over MQTT; checked by its digest
    model, data     over HTTP; the data from the device's own file, where it has one
    handed in       over HTTP; after three failures in a row over MQTT as well; kept on disk until the server has answered

It needs nothing but wasmtime, aiomqtt and cbor2, and remembers in its home (infra.edge_memory) what a kill must not undo: a
round that was trained is not trained again. A 4xx answer is final; a server that fails or is away is asked again. That a broker
has an update says nothing of the server: until its answer comes, over whichever way, the update is sent again.
"""

import array
import asyncio
import base64
import binascii
import gc
import hashlib
import json
import logging
import os
import platform
import random
import re
import resource
import signal
import ssl
import sys
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import quote

import aiomqtt
import cbor2

from blocks import wasm_runner
from blocks.wasm_runner import MAX_MODULE_BYTES, ModuleFailed
from infra.edge_chunks import Assembly
from infra.edge_http import Http, Refused, Unreachable
from infra.edge_memory import REFUSED, SENT, STARTED, TRAINED, Credentials, Memory, Round, Unusable
from infra.edge_seals import Seals
from infra.edge_settings import InvalidSettings, Settings, read_settings
from tasks.edge.names import NAME
from tasks.edge.seal import UPDATE

log = logging.getLogger("healchain.device")
MAX_MODEL_BYTES = MAX_DATA_BYTES = 256 * 2**20
HTTP_ATTEMPTS = 3  # failures in a row before an update goes over MQTT
FETCH_ATTEMPTS = 5
ANSWER_S = 10.0  # how long the server's answer to an update over MQTT is waited for, before it is sent again
START, ANSWERS = "control/manager/start", "control/manager/answers"
MQTT_ATTEMPTS = 5  # failures in a row before the device calls itself unhealthy
CHUNK_QUESTIONS, CHUNK_WAIT_S = 12, 5.0  # a minute in all
LONGEST_PAUSE_S = 60.0
MAX_ERROR = 1000  # characters of an error update
FLOAT64 = 86  # tags of RFC 8746: a typed array of little-endian float64, and one with dimensions
DIMENSIONS = 40
KEY_REMEDY = (
    "write what `healchain edge register` printed into a file, chmod 600, and name it in HEALCHAIN_DEVICE_KEY_FILE"
)


class CannotTrain(RuntimeError):
    """Why a round ends with an error update; the message leaves the device, so it repeats none of its data."""


class Device:
    """One device, from its start to its end. What it is at work on is in `memory` before it begins."""

    def __init__(self, settings: Settings, memory: Memory, me: Credentials) -> None:
        self.settings, self.memory, self.me = settings, memory, me
        trusted = (settings.server, settings.registry, settings.data_store)
        self.http = Http(key=me.key, trusted=trusted, context=settings.tls, timeout_s=settings.timeout_s)
        self.seals = Seals(memory, me, is_open=settings.is_open)
        self.answers: dict[str, asyncio.Future[dict[str, Any]]] = {}  # by round, while they are waited for
        self.mqtt: aiomqtt.Client | None = None
        self.unhealthy = ""
        self.failed_connections = 0
        self.no_rounds = ""
        self.assembly: Assembly | None = None
        self.assembled: asyncio.Future[bytes] | None = None
        self.waiting: asyncio.Queue[str] = asyncio.Queue()
        self.known: set[str] = set()
        self.has_unsent, self.ask_now = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """Until it is cancelled."""
        for round_ in self.memory.unfinished():
            self.known.add(round_.round_id)
            if round_.state == STARTED:
                self.waiting.put_nowait(round_.round_id)
            else:
                self.has_unsent.set()
        log.info("device %s, server %s", self.me.proplet_id, self.settings.server)
        if not self.me.key:
            log.warning("no key, which only a server in open mode takes: %s", KEY_REMEDY)
        self._note_status()
        async with asyncio.TaskGroup() as group:
            parts: list[Coroutine[Any, Any, None]] = [
                self._train_rounds(),
                self._send_updates(),
                self._ask_for_rounds(),
                self._beat(),
            ]
            if self.settings.broker is not None:
                parts.append(self._stay_connected())
            for part in parts:
                group.create_task(part)

    # Hearing of rounds

    def accept(self, task: dict[str, Any]) -> None:
        """Remember a task and train it in its turn. Raises ValueError for what is no task; a known round is left alone."""
        for name in ("id", "image_url", "sha256", "file"):
            if not isinstance(task.get(name) or "", str):
                raise ValueError(f"{name}: expected a text")
        environment = task.get("env")
        if not isinstance(environment, dict) or not all(isinstance(value, str) for value in environment.values()):
            raise ValueError("env: expected an object of texts")
        wasm_runner.check_environment(environment)
        round_id = environment.get("ROUND_ID", "")
        if not re.fullmatch(NAME, round_id):
            raise ValueError(f"env.ROUND_ID = {round_id!r:.60}: expected a name of letters, digits and ._:@-")
        if self._knows(round_id):
            return
        self.known.add(round_id)
        kept = {name: task[name] for name in ("id", "image_url", "sha256", "file", "env") if task.get(name)}
        self.memory.keep(Round(round_id, STARTED, kept, {}))
        self.waiting.put_nowait(round_id)
        log.info("round %s: heard of", round_id)

    def _knows(self, round_id: str) -> bool:
        if round_id not in self.known and self.memory.find(round_id) is not None:
            self.known.add(round_id)
        return round_id in self.known

    async def _ask_for_rounds(self) -> None:
        """Ask the server for open rounds: all the time without MQTT, and once after every connection."""
        while True:
            if self.mqtt is None or self.ask_now.is_set():
                self.ask_now.clear()
                await self._ask_once()
            with suppress(TimeoutError):
                async with asyncio.timeout(self.settings.poll_s):
                    await self.ask_now.wait()

    async def _ask_once(self) -> None:
        who = quote(self.me.proplet_id, safe="")
        try:
            found = await self._get_json(f"{self.settings.server}/rounds/next?proplet_id={who}")
            for round_id in found.get("open_rounds") or ():
                if isinstance(round_id, str) and re.fullmatch(NAME, round_id) and not self._knows(round_id):
                    address = f"{self.settings.server}/task?round_id={quote(round_id, safe='')}&proplet_id={who}"
                    self.accept(_as_started((await self._get_json(address)).get("task")))
        except (Refused, Unreachable, ValueError, TypeError, RecursionError) as error:
            if str(error) != self.no_rounds:  # it may be so for days
                remedy = f": {KEY_REMEDY}" if isinstance(error, Refused) and error.status == 401 else ""
                log.warning("no rounds from %s: %s%s", self.settings.server, error, remedy)
            self.no_rounds = str(error)
        else:
            self.no_rounds = ""

    # Training

    async def _train_rounds(self) -> None:
        while True:
            round_id = await self.waiting.get()
            round_ = self.memory.find(round_id)
            if round_ is None or round_.state != STARTED:
                continue
            try:
                update = await self._train(round_.task)
                error = None
            except (CannotTrain, OSError, MemoryError) as failed:
                error = (
                    str(failed)[:MAX_ERROR]
                    if isinstance(failed, CannotTrain)
                    else f"the device: {type(failed).__name__}"
                )
                update = {"num_samples": 0, "metrics": {}, "update": {}, "error": error}
                log.error("round %s: %s", round_id, failed)
            # In whose name, and for what, is not the module's to say.
            update |= {
                "round_id": round_id,
                "proplet_id": self.me.proplet_id,
                "base_model_uri": round_.task["env"].get("MODEL_URI", ""),
            }
            self.memory.keep(Round(round_id, TRAINED, round_.task, update))
            self.has_unsent.set()
            await self._tell_result(round_.task, update, error)

    async def _train(self, task: dict[str, Any]) -> dict[str, Any]:
        """The module's answer. Raises CannotTrain."""
        environment = dict(task["env"])
        module = await self._module(task)
        model = await self._fetch(
            f"{self.settings.registry}/models/{_version(environment.get('MODEL_URI', ''))}", "the model"
        )
        given = {"PROPLET_ID": self.me.proplet_id, "MODEL_DATA": model, "DATASET_DATA": await self._data()}
        try:
            kept = self.memory.home / "compiled"
            run = partial(wasm_runner.run, module, environment | given, self.settings.limits, kept=kept)
            result = await asyncio.to_thread(run)
        except ModuleFailed as failed:
            log.error("the module's log: %s", failed.log.strip() or "empty")
            raise CannotTrain(f"{failed.reason}: {failed.detail}") from None
        except (ValueError, wasm_runner.NoRuntime) as error:
            raise CannotTrain(str(error)) from None
        finally:
            gc.collect()  # the input is large, and the next round may be hours away
        log.info(
            "round %s: trained in %.2f s, %.3g units of fuel", environment["ROUND_ID"], result.seconds, result.fuel_used
        )
        return _checked(result.answer)

    async def _data(self) -> str:
        """The device's samples: the file that was given, else what the data store has for this device."""
        path = self.settings.data
        if path is None:
            return await self._fetch(
                f"{self.settings.data_store}/datasets/{quote(self.me.proplet_id, safe='')}", "the data"
            )
        try:
            return path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise CannotTrain(f"the device's data file cannot be read: {type(error).__name__}") from None

    async def _fetch(self, url: str, what: str) -> str:
        """Text from a server that may be away for a while. Raises CannotTrain."""
        for attempt in range(1, FETCH_ATTEMPTS + 1):
            try:
                return (await asyncio.to_thread(self.http.get, url, max_bytes=MAX_DATA_BYTES)).decode()
            except (Refused, UnicodeDecodeError) as error:
                raise CannotTrain(f"{what} was not given: {error}") from None
            except Unreachable as error:
                log.warning("%s, attempt %d of %d: %s", what, attempt, FETCH_ATTEMPTS, error)
                if attempt == FETCH_ATTEMPTS:
                    raise CannotTrain(f"{what} could not be fetched: {error}") from None
            await asyncio.sleep(_pause_s(attempt))
        raise AssertionError("the last attempt returns or raises")

    # The module

    async def _module(self, task: dict[str, Any]) -> bytes:
        """The training module, checked by its digest. Raises CannotTrain."""
        image, _, named = (task.get("image_url") or "").partition("#sha256=")
        sha256 = (task.get("sha256") or named).removeprefix("0x").lower()
        if sha256 and not re.fullmatch("[0-9a-f]{64}", sha256):
            raise CannotTrain(f"sha256 = {sha256!r:.80}: expected 64 hex digits")
        if sha256 and (kept := self.memory.module(sha256)) is not None:
            return kept
        module = _included(task) or await self._download(image, sha256) or await self._in_pieces(image, sha256)
        if module is None:
            raise CannotTrain(f"there is no module {image!r:.200}: give a task with a file, an address or a digest")
        if sha256 and hashlib.sha256(module).hexdigest() != sha256:
            raise CannotTrain(f"the module has digest {hashlib.sha256(module).hexdigest()}, the task names {sha256}")
        self.memory.keep_module(module)
        return module

    async def _download(self, image: str, sha256: str) -> bytes | None:
        """From the address that the task names, or from the server by digest; None where neither has it."""
        is_address = image.startswith(("http://", "https://"))
        if is_address and not sha256:
            raise CannotTrain(
                f"image_url = {image!r:.200}: an address needs a digest, as sha256 or as #sha256=... at its end"
            )
        if not sha256:
            return None
        url = image if is_address else f"{self.settings.server}/modules/{sha256}"
        try:
            return await asyncio.to_thread(self.http.get, url, max_bytes=MAX_MODULE_BYTES)
        except (Refused, Unreachable, ValueError) as error:
            log.warning("no module from %s: %s", url, error)
            return None

    async def _in_pieces(self, app_name: str, sha256: str) -> bytes | None:
        """Over MQTT; None when it does not come within a minute, or there is no MQTT.

        All devices hear the pieces, so they have no seal: what they must make is the task's to say.
        """
        if self.mqtt is None or not app_name or (self.seals.are_needed and not sha256):
            return None
        pieces = self.settings.prefix + "registry/server"  # heard for so long only: they go to all devices
        self.assembly, self.assembled = Assembly(app_name, sha256), asyncio.get_running_loop().create_future()
        try:
            await self.mqtt.subscribe(pieces, qos=self.settings.qos)
            for _ in range(CHUNK_QUESTIONS):
                await self._publish("registry/proplet", {"app_name": app_name, "proplet_id": self.me.proplet_id})
                with suppress(TimeoutError):
                    return await asyncio.wait_for(asyncio.shield(self.assembled), CHUNK_WAIT_S)
            return None
        except aiomqtt.MqttError as error:
            log.warning("no module over MQTT: %s", error)
            return None
        finally:
            self.assembly = self.assembled = None
            if self.mqtt is not None:
                with suppress(aiomqtt.MqttError):
                    await self.mqtt.unsubscribe(pieces)

    # Handing in

    async def _send_updates(self) -> None:
        failures = 0
        while True:
            await self.has_unsent.wait()
            self.has_unsent.clear()
            unsent = [round_ for round_ in self.memory.unfinished() if round_.state == TRAINED]
            outcomes = [await self._send(round_) for round_ in unsent]
            failures = 0 if all(outcomes) else failures + 1
            if failures:
                log.warning("%d updates wait on disk", len([one for one in outcomes if not one]))
                with suppress(TimeoutError):
                    async with asyncio.timeout(_pause_s(failures)):
                        await self.has_unsent.wait()
                self.has_unsent.set()

    async def _send(self, round_: Round) -> bool:
        """Hand an update in; whether that is settled, well or not."""
        for attempt in range(1, HTTP_ATTEMPTS + 1):
            try:
                await asyncio.to_thread(self._post, round_.update)
            except Refused as refusal:
                self._give_up(round_, str(refusal))
                return True
            except Unreachable as error:
                log.warning("round %s: HTTP attempt %d of %d: %s", round_.round_id, attempt, HTTP_ATTEMPTS, error)
                if attempt < HTTP_ATTEMPTS:
                    await asyncio.sleep(_pause_s(attempt))
            else:
                self._settle(round_, "HTTP")
                return True
        return await self._send_over_mqtt(round_)

    async def _send_over_mqtt(self, round_: Round) -> bool:
        """Publish an update and wait for what the server says to it; whether it is settled."""
        topic = f"fl/rounds/{round_.round_id}/updates/{self.me.proplet_id}"
        answer = self.answers[round_.round_id] = asyncio.get_running_loop().create_future()
        try:
            if not await self._publish(topic, round_.update, kind=UPDATE, is_bare=self.settings.is_bare):
                return False
            said = await asyncio.wait_for(answer, ANSWER_S)
        except TimeoutError:
            log.warning("round %s: the broker has the update, the server has not answered", round_.round_id)
            return False
        finally:
            del self.answers[round_.round_id]
        if said["status"] == 200:
            self._settle(round_, "MQTT")
        else:
            self._give_up(round_, f"MQTT {said['status']}: {said.get('detail', '')!s:.{MAX_ERROR}}")
        return True

    def _give_up(self, round_: Round, why: str) -> None:
        log.error("round %s: the server refused the update: %s", round_.round_id, why)
        self.memory.keep(round_._replace(state=REFUSED, detail=why[:MAX_ERROR]))

    def _post(self, update: dict[str, Any]) -> None:
        if self.settings.is_cbor:
            self.http.post(f"{self.settings.server}/update_cbor", encode_cbor(update), "application/cbor")
        else:
            self.http.post(f"{self.settings.server}/update", json.dumps(update).encode(), "application/json")

    def _settle(self, round_: Round, transport: str) -> None:
        log.info("round %s: handed in over %s", round_.round_id, transport)
        self.memory.keep(round_._replace(state=SENT, detail=transport))
        self._note_status()

    # MQTT

    async def _stay_connected(self) -> None:
        while True:
            try:
                async with self._client() as client:
                    mine = (f"{START}/{self.me.proplet_id}", f"{ANSWERS}/{self.me.proplet_id}")
                    for topic in (START, *mine):
                        await client.subscribe(self.settings.prefix + topic, qos=self.settings.qos)
                    await self._connected(client)
                    async for message in client.messages:
                        self._hear(message)
            except aiomqtt.MqttError as error:
                self.mqtt = None
                self.failed_connections += 1
                self._disconnected(str(error))
                await asyncio.sleep(_pause_s(self.failed_connections))

    def _client(self) -> aiomqtt.Client:
        broker = self.settings.broker
        assert broker is not None
        self.seals.begin()
        alive = "control/proplet/alive"
        offline = self.seals.closing(alive, {"status": "offline", "proplet_id": self.me.proplet_id})
        return aiomqtt.Client(
            broker.host,
            broker.port,
            username=self.me.proplet_id,
            password=self.settings.mqtt_password or self.me.key or None,
            identifier=self.me.proplet_id,
            will=aiomqtt.Will(self.settings.prefix + alive, offline, qos=self.settings.qos),
            tls_context=(self.settings.tls or ssl.create_default_context()) if broker.is_encrypted else None,
            keepalive=max(5, round(3 * self.settings.beat_s)),
            timeout=self.settings.timeout_s,
        )

    async def _connected(self, client: aiomqtt.Client) -> None:
        """Say who it is, and first how it was while nobody could hear it."""
        was, self.mqtt, self.unhealthy, self.failed_connections = self.unhealthy, client, "", 0
        log.info("connected to the broker")
        await self._publish("control/proplet/create", self._description())
        await self._publish(
            "control/proplet/alive", self._sign_of_life() | ({"healthy": False, "detail": was} if was else {})
        )
        self.ask_now.set()
        self.has_unsent.set()
        self._note_status()

    def _disconnected(self, why: str) -> None:
        log.warning("no MQTT, attempt %d: %s", self.failed_connections, why)
        if self.failed_connections == MQTT_ATTEMPTS:
            self.unhealthy = f"no MQTT after {MQTT_ATTEMPTS} attempts: {why}"
            log.error("unhealthy: %s. It goes on trying, and asks the server for rounds", self.unhealthy)
        self._note_status()

    def _hear(self, message: aiomqtt.Message) -> None:
        """What is malformed or for others is passed over: whoever may publish must not be able to end this device."""
        try:
            topic, payload = message.topic.value.removeprefix(self.settings.prefix), bytes(message.payload)
            said = json.loads(payload)
            if not isinstance(said, dict):
                raise ValueError("expected an object")
            if topic == "registry/server":
                self._take_piece(said)
            elif said.get("proplet_id") == self.me.proplet_id:
                kind, take = (ANSWERS, self._take_answer) if topic.startswith(ANSWERS) else (START, self.accept)
                take(json.loads(self.seals.opened(kind, payload)))
        except (ValueError, RecursionError) as error:
            log.warning("passed over a message on %s: %s", message.topic, error)

    def _take_answer(self, said: dict[str, Any]) -> None:
        """Raises ValueError."""
        status, round_id = said.get("status"), said.get("round_id")
        if type(status) is not int or not (status == 200 or 400 <= status < 500):
            raise ValueError(f"status = {status!r:.40}: expected 200, or 400 to 499")
        waiting = self.answers.get(round_id) if isinstance(round_id, str) else None
        if waiting is not None and not waiting.done():
            waiting.set_result(said)

    def _take_piece(self, said: dict[str, Any]) -> None:
        """Raises BadChunk."""
        if self.assembly is None or self.assembled is None or self.assembled.done():
            return
        if (whole := self.assembly.take(said)) is not None:
            self.assembled.set_result(whole)

    async def _publish(self, topic: str, said: dict[str, Any], *, kind: str = "", is_bare: bool = False) -> bool:
        """Whether the broker has it. kind: of the seal, where it is not the topic."""
        if self.mqtt is None:
            return False
        try:
            full, payload = topic if is_bare else self.settings.prefix + topic, self.seals.on(kind or topic, said)
            await self.mqtt.publish(full, payload, qos=self.settings.qos, timeout=self.settings.timeout_s)
        except aiomqtt.MqttError as error:
            log.warning("not published on %s: %s", topic, error)
            return False
        return True

    async def _beat(self) -> None:
        """Over MQTT, and over HTTP while there is none; a server that knows only MQTT answers 404 to that."""
        address = f"{self.settings.server}/devices/{quote(self.me.proplet_id, safe='')}/alive"
        while True:
            if self.mqtt is None:
                said = json.dumps({"status": "unhealthy" if self.unhealthy else "alive", "detail": self.unhealthy})
                with suppress(Refused, Unreachable):
                    await asyncio.to_thread(self.http.post, address, said.encode(), "application/json")
            await asyncio.sleep(self.settings.beat_s)
            await self._publish("control/proplet/alive", self._sign_of_life())
            await self._publish("control/proplet/metrics", self._usage())

    # What it says of itself

    def _sign_of_life(self) -> dict[str, Any]:
        return {
            "proplet_id": self.me.proplet_id,
            "status": "alive",
            "namespace": self.settings.namespace,
            "healthy": not self.unhealthy,
        }

    def _description(self) -> dict[str, Any]:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        about = {
            "environment": "edge",
            "os": platform.system().lower(),
            "cpu_arch": platform.machine(),
            "total_memory_bytes": pages,
            "proplet_version": "healchain",
            "wasm_runtime": "wasmtime",
        }
        return {"proplet_id": self.me.proplet_id, "namespace": self.settings.namespace, "metadata": about}

    def _usage(self) -> dict[str, Any]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "proplet_id": self.me.proplet_id,
            "namespace": self.settings.namespace,
            "cpu_metrics": {"user_seconds": used.ru_utime, "system_seconds": used.ru_stime},
            "memory_metrics": {"rss_bytes": resident_bytes()},
        }

    async def _tell_result(self, task: dict[str, Any], update: dict[str, Any], error: str | None) -> None:
        names = ("round_id", "proplet_id", "num_samples", "metrics")
        results = {"task_id": task.get("id", ""), **{name: update.get(name) for name in names}}
        told = {"task_id": task.get("id", ""), "proplet_id": self.me.proplet_id, "results": results, "error": error}
        await self._publish("control/proplet/results", told)

    def _note_status(self) -> None:
        self.memory.note_status(
            {
                "proplet_id": self.me.proplet_id,
                "pid": os.getpid(),
                "healthy": not self.unhealthy,
                "detail": self.unhealthy,
                "mqtt": "none" if self.settings.broker is None else "connected" if self.mqtt else "away",
                "noted_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
        )

    async def _get_json(self, url: str) -> dict[str, Any]:
        """Raises Refused, Unreachable or ValueError."""
        found = json.loads(await asyncio.to_thread(self.http.get, url, max_bytes=MAX_MODEL_BYTES))
        if not isinstance(found, dict):
            raise ValueError(f"{url}: expected a JSON object")
        return found


def _as_started(task: Any) -> dict[str, Any]:
    """The answer of GET /task as a start message."""
    if not isinstance(task, dict):
        raise ValueError("task: expected an object")
    hyperparameters = json.dumps(task.get("hyperparams") or {}, sort_keys=True, separators=(",", ":"))
    reference = str(task.get("model_ref") or "")
    return {
        "id": "",
        "image_url": task.get("task_wasm_image") or "",
        "sha256": task.get("task_wasm_sha256") or "",
        "env": {"ROUND_ID": task.get("round_id"), "MODEL_URI": reference, "HYPERPARAMS": hyperparameters},
    }


def _included(task: dict[str, Any]) -> bytes | None:
    """The module that a task brings along. Raises CannotTrain."""
    if not task.get("file"):
        return None
    try:
        return base64.b64decode(task["file"], validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise CannotTrain(f"file: no base64: {error}") from None


def _version(reference: str) -> int:
    """The version that a model's reference names: its last run of digits; 0 without one."""
    found = re.findall("[0-9]{1,15}", reference)
    return int(found[-1]) if found else 0


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    """The parts of a module's answer that are handed on. Raises CannotTrain."""
    samples, update = answer.get("num_samples"), answer.get("update")
    if type(samples) is not int or samples < 1:
        raise CannotTrain(f"output: num_samples = {samples!r:.60}: expected a positive integer")
    if not isinstance(update, dict) or not update:
        raise CannotTrain("output: update: expected an object with the trained model")
    metrics = answer.get("metrics")
    return {"num_samples": samples, "metrics": metrics if isinstance(metrics, dict) else {}, "update": update}


def encode_cbor(update: dict[str, Any]) -> bytes:
    """An update in CBOR: lists of numbers become typed arrays (RFC 8746), eight bytes a number."""
    return cbor2.dumps({**update, "update": {name: _packed(value) for name, value in update["update"].items()}})


def _packed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _packed(inner) for name, inner in value.items()}
    shape, flat = _flattened(value)
    if not shape or 0 in shape:
        return value
    numbers = array.array("d", flat)
    if sys.byteorder == "big":
        numbers.byteswap()
    typed = cbor2.CBORTag(FLOAT64, numbers.tobytes())
    return typed if len(shape) == 1 else cbor2.CBORTag(DIMENSIONS, [shape, typed])


def _flattened(value: Any) -> tuple[list[int], list[Any]]:
    """Shape and numbers of nested lists; an empty shape for what is no tensor."""
    if not isinstance(value, list):
        return [], []
    if all(type(one) in (int, float) for one in value):
        return [len(value)], value
    parts = [_flattened(one) for one in value]
    shape = parts[0][0]
    if not shape or any(one != shape for one, _ in parts):
        return [], []
    return [len(value), *shape], [number for _, numbers in parts for number in numbers]


def _pause_s(failures: int) -> float:
    """Exponential, and not the same for all the devices that lost one server."""
    return float(min(LONGEST_PAUSE_S, 2.0 ** (failures - 1)) * random.uniform(0.5, 1.0))


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def _serve(settings: Settings, memory: Memory, me: Credentials) -> None:
    running = asyncio.current_task()
    assert running is not None
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, running.cancel)
    with suppress(asyncio.CancelledError):
        await Device(settings, memory, me).run()
    log.info("stopped")
    # A module may be running for minutes yet. What it was at is on disk.
    os._exit(0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run until it is stopped. Exit code 2 for wrong settings."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    logging.getLogger("mqtt").setLevel(logging.ERROR)  # its errors come as exceptions, too
    try:
        settings = read_settings(sys.argv[1:] if arguments is None else arguments, os.environ)
        memory = Memory(settings.home)
        me = memory.credentials(settings.proplet_id, settings.key)
    except (InvalidSettings, Unusable, OSError) as error:
        print(f"healchain edge device: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        asyncio.run(_serve(settings, memory, me))
    except* OSError as errors:  # of its own disk: the network's are waited out
        print(f"healchain edge device: {_first(errors)}. Started again, it goes on where it was", file=sys.stderr)
        sys.exit(1)


def _first(errors: BaseExceptionGroup) -> BaseException:
    found = errors.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found


if __name__ == "__main__":
    main()
