"""The MQTT side of a server of edge devices: what waits in the ledger is published, what devices say is taken.

    published   round start and next, tasks' start and stop; modules in chunks to those who ask
    taken       updates, create, alive, results, metrics; an update goes the same way as one over HTTP, and is answered

A message is acknowledged when the ledger has what it says, and the session outlives the process: what comes while this process
is down, or dies before it has written, is delivered again. What cannot be taken, whatever it is, is said in the log and ends
nothing. Topics are below m/TENANT/c/CHANNEL/; in open mode the bare ones of existing devices as well.

Devices seal what they say (tasks.edge.seal), so that nobody else speaks for them, whoever let a message pass. What is told to
one device is sealed for it. In open mode a seal may be missing; one that is there must be right.
"""

import asyncio
import base64
import itertools
import json
import logging
import math
import re
import ssl
import time
from pathlib import Path
from typing import Any

import aiomqtt
from anyio.to_thread import run_sync

from blocks.artifacts import MissingArtifact, TamperedArtifact
from blocks.edge_ledger import UnknownRound
from blocks.registry import RegistryUnavailable
from blocks.tables import EdgeMessageRow
from infra import edge_data, edge_server
from infra.edge_metrics import Metrics
from infra.edge_server import EdgeSettings
from tasks.edge import intake, rounds, seal, wire
from tasks.edge.names import NAME, NAME_RULE
from tasks.edge.seal import UPDATE, NotSealed
from tasks.edge.server import Server, start_again, utc_now
from tasks.edge.wire import CBOR_TYPES, JSON_TYPE, Refusal

CHUNK_BYTES = 512_000
POLL_S = 0.2
RETRY_S, LONGEST_RETRY_S = 0.5, 10.0
MODULE_PAUSE_S = 1.0  # a module is not sent again within this time, however many ask: all hear it
PRUNE_S = 600.0
MAX_DETAILS = 16_384
MAX_WORD = 65_536  # bytes of what a device says of itself
MAX_RESULTS = 2**20  # bytes of what it says of a task that ended
AWAY = (aiomqtt.MqttError, RegistryUnavailable, OSError)  # what is cured by waiting: the message comes again
Answer = tuple[str, bytes]  # topic below the prefix, payload
log = logging.getLogger(__name__)


class UpdatesFirst(asyncio.PriorityQueue[Any]):
    """Messages as they came, but updates before what devices say of themselves: a round waits for the former alone.

    With a thousand devices the beats of half a minute would otherwise stand before an update.
    """

    def _init(self, maxsize: int) -> None:
        super()._init(maxsize)
        self._places = itertools.count()

    def _put(self, item: aiomqtt.Message) -> None:
        super()._put(("/updates/" not in item.topic.value, next(self._places), item))

    def _get(self) -> aiomqtt.Message:
        message: aiomqtt.Message = super()._get()[2]
        return message


class Bridge:
    """Between one broker and one ledger."""

    def __init__(self, server: Server, settings: EdgeSettings, folder: Path, metrics: Metrics) -> None:
        self._server, self._settings, self._metrics = server, settings, metrics
        self._folder = folder
        self._prefix = rounds.prefix_of(server.pinned.tenant, server.pinned.channel)
        self._sent_s: dict[str, float] = {}
        self._pruned_s = -math.inf

    async def run(self) -> None:
        """Until it is cancelled; whatever ends its work, it begins again."""
        pause_s, was_connected = RETRY_S, False
        while True:
            try:
                async with self._client() as client:
                    client._client.manual_ack_set(True)
                    await self._subscribe(client)
                    self._metrics.connected.set(1)
                    log.info("connected to the broker at %s:%d", self._settings.mqtt_host, self._settings.mqtt_port)
                    pause_s = RETRY_S
                    async with asyncio.TaskGroup() as group:
                        group.create_task(self._take(client))
                        group.create_task(self._publish(client))
                        if was_connected:
                            group.create_task(self._remind())
                        was_connected = True
            except* AWAY as errors:
                log.warning("the broker is away: %s; again in %.1f s", errors.exceptions[0], pause_s)
            except* Exception as errors:
                log.error("the bridge stopped at what nobody foresaw; again in %.1f s", pause_s, exc_info=errors)
            self._metrics.connected.set(0)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_RETRY_S)

    def _client(self) -> aiomqtt.Client:
        ca = self._settings.mqtt_ca
        return aiomqtt.Client(
            self._settings.mqtt_host,
            self._settings.mqtt_port,
            username=self._settings.mqtt_user,
            password=edge_server.server_password(self._folder, self._settings),
            identifier=self._settings.mqtt_user,  # as the brokers ask of all
            clean_session=False,
            keepalive=15,
            timeout=20,
            queue_type=UpdatesFirst,
            tls_context=ssl.create_default_context(cafile=ca) if ca else None,
        )

    async def _subscribe(self, client: aiomqtt.Client) -> None:
        wanted = [self._prefix + one for one in (*rounds.SPOKEN_BY_DEVICES, UPDATES_FILTER)]
        wanted += [UPDATES_FILTER] if self._server.pinned.is_open else []
        for topic in wanted:
            await client.subscribe(topic, qos=1)

    async def _remind(self) -> None:
        """After a broker was away: what it had for devices is lost, so they are told again once they had time to come back."""
        await asyncio.sleep(self._server.pinned.beat_s)
        await run_sync(start_again, self._server)

    # What is published

    async def _publish(self, client: aiomqtt.Client) -> None:
        while True:
            waiting = await run_sync(self._server.ledger.unsent)
            for row in waiting:
                try:
                    await self._publish_one(client, row)
                except (ValueError, TypeError):
                    log.exception("message %s on %s cannot be published and is passed over", row.id, row.topic)
            if waiting:
                await run_sync(self._server.ledger.mark_sent, [row.id or 0 for row in waiting], utc_now())
            elif time.monotonic() - self._pruned_s > PRUNE_S:
                await run_sync(self._server.ledger.prune_messages, utc_now())
                self._pruned_s = time.monotonic()
            else:
                await asyncio.sleep(POLL_S)

    async def _publish_one(self, client: aiomqtt.Client, row: EdgeMessageRow) -> None:
        payload = row.payload.encode()
        if row.topic in (rounds.TASK_START, rounds.TASK_STOP):
            payload = await run_sync(self._sealed, row.topic, json.loads(payload).get("proplet_id"), payload)
        for topic in rounds.topics_of(row.topic, row.payload, is_open=self._server.pinned.is_open):
            await client.publish(self._prefix + topic, payload, qos=1)
        if self._server.pinned.is_open and row.topic in rounds.BARE:
            await client.publish(row.topic, payload, qos=1)

    def _sealed(self, kind: str, proplet_id: Any, body: bytes) -> bytes:
        """For a device that has a key; for others as it is."""
        row = self._server.ledger.device(proplet_id) if isinstance(proplet_id, str) and proplet_id else None
        if row is None or row.key_sha256 is None:
            return body
        return seal.seal(body, seal.key_of_digest(row.key_sha256), kind, row.proplet_id, time.time_ns())

    async def _send_module(self, client: aiomqtt.Client, name: str) -> None:
        """In chunks, each with the digest of the whole."""
        if time.monotonic() - self._sent_s.get(name, -math.inf) < MODULE_PAUSE_S:
            return
        row, data = await run_sync(edge_data.find_module, self._server, name)
        for chunk in chunks_of(name, data, row.sha256):
            await client.publish(self._prefix + rounds.MODULE_CHUNK, chunk, qos=1)
        self._sent_s[name] = time.monotonic()

    # What is taken

    async def _take(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            topic, payload = message.topic.value, message.payload
            data = payload if isinstance(payload, bytes) else str(payload or "").encode()
            try:
                await self._take_one(client, topic, data)
            except (Refusal, UnknownRound, MissingArtifact, TamperedArtifact) as error:
                log.warning("%s: refused: %s", topic[-200:], error)
            except AWAY:
                raise
            except Exception:
                # It would be the same the next time: the message is acknowledged, and those behind it are taken.
                log.exception("%s: passed over", topic[-200:])
                self._metrics.refused("mqtt", 500)
            if message.qos:
                client._client.ack(message.mid, message.qos)

    async def _take_one(self, client: aiomqtt.Client, topic: str, data: bytes) -> None:
        if topic == self._prefix + rounds.MODULE_WANTED:
            await self._send_module(client, await run_sync(self._module_wanted, data))
        elif answer := await run_sync(self.take, topic, data):
            await client.publish(self._prefix + answer[0], answer[1], qos=1)

    def take(self, topic: str, data: bytes) -> Answer | None:
        """What one message says, and what its sender is answered. Raises Refusal."""
        name = topic.removeprefix(self._prefix)
        if name.startswith("fl/rounds/"):
            return self._take_update(name, data)
        sender, found, counter = self._word(name, data)
        self._take_word(name, sender, found, counter)
        return None

    def _word(self, name: str, data: bytes) -> tuple[str, dict[str, Any], int | None]:
        """Who says what of itself, and its counter, if it is sealed. Raises Refusal."""
        found = wire.decode_json(data, max_bytes=self._most(name))
        if not isinstance(found, dict):
            raise Refusal(400, "expected an object")
        results = found.get("results")
        sender = found.get("proplet_id") or (results.get("proplet_id") if isinstance(results, dict) else None)
        if not isinstance(sender, str) or not re.fullmatch(NAME, sender):
            raise Refusal(400, f"proplet_id = {sender!r:.60}: expected {NAME_RULE}", "proplet_id")
        counter = self._authenticated(name, sender, data)[1]
        found.pop("seal", None)
        return sender, found, counter

    def _most(self, name: str) -> int:
        """Bytes of a message. Results of existing devices carry an update in base64."""
        if name != rounds.RESULTS:
            return MAX_WORD
        return MAX_RESULTS + (4 * self._settings.body_bytes // 3 if self._server.pinned.is_open else 0)

    def _authenticated(self, kind: str, sender: str, data: bytes) -> tuple[bytes, int | None]:
        """The message without its seal, and its counter; in open mode None where it has none. Raises Refusal."""
        row, is_open = self._server.ledger.device(sender), self._server.pinned.is_open
        if row is None or row.key_sha256 is None:
            if not is_open:
                raise Refusal(403, f"proplet_id {sender!r:.140} is no registered device", "proplet_id")
            return data, None
        if is_open and not seal.has_seal(data):
            return data, None
        try:
            body, counter = seal.opened(data, seal.key_of_digest(row.key_sha256), kind, sender)
        except NotSealed as error:
            raise Refusal(401, f"{sender}: {error}", "seal") from None
        # What a broker delivers again is the same update, which counts once; a word that was taken is not taken again.
        newest = row.updates_counter - 1 if kind == UPDATE else row.words_counter
        if counter <= newest:
            raise Refusal(409, f"{sender}: counter {counter} after {newest}: it was said before", "seal")
        return body, counter

    def _module_wanted(self, data: bytes) -> str:
        """The name of a module that a device asks for; existing ones do not say who they are. Raises Refusal."""
        if self._server.pinned.is_open:
            found = wire.decode_json(data, max_bytes=MAX_WORD)
        else:
            sender, found, counter = self._word(rounds.MODULE_WANTED, data)
            self._server.ledger.note_counter(sender, "words_counter", counter or 0)
        name = found.get("app_name") if isinstance(found, dict) else None
        if not isinstance(name, str) or not name:
            raise Refusal(400, "app_name is required", "app_name")
        return name[:512]

    def _take_word(self, name: str, sender: str, found: dict[str, Any], counter: int | None) -> None:
        ledger, now = self._server.ledger, utc_now()
        if name == rounds.CREATE:
            details = found.get("metadata")
            about = _bounded(details if isinstance(details, dict) else {})
            ledger.beat(sender, intake.ALIVE, now, about, counter)
            start_again(self._server, sender)
        elif name == rounds.ALIVE:
            said = found.get("status", intake.ALIVE)
            is_well = said in (intake.ALIVE, intake.OFFLINE) and found.get("healthy", True) is not False
            ledger.beat(sender, said if is_well else intake.UNHEALTHY, now, counter=counter)
        elif name == rounds.RESULTS:
            edge_data.record_results(self._server, found, sender)
            self._take_envelope(found.get("results"))
            if counter is not None:
                ledger.note_counter(sender, "words_counter", counter)
        elif name in (rounds.METRICS, rounds.TASK_METRICS):
            row = ledger.device(sender)
            known_details = json.loads(row.details) if row else {}
            about = _bounded({**known_details, name.rpartition("/")[2]: found})
            ledger.beat(sender, intake.ALIVE, now, about, counter)

    def _take_update(self, name: str, data: bytes) -> Answer | None:
        """fl/rounds/ROUND/updates/SENDER. Only who said it is answered. Raises Refusal."""
        began_s = time.perf_counter()
        _, _, round_id, _, sender = name.split("/")
        try:
            body, counter = self._authenticated(UPDATE, sender, data)
        except Refusal as refusal:
            self._metrics.refused("mqtt", refusal.status)
            raise
        refused = self._judged(round_id, sender, body)
        if counter is not None:
            self._server.ledger.note_counter(sender, "updates_counter", counter)
        if refused is None:
            self._metrics.accepted("mqtt", time.perf_counter() - began_s)
        else:
            self._metrics.refused("mqtt", refused.status)
            log.warning("%s: refused: %s", name[-200:], refused)
        return self._answer(round_id, sender, refused)

    def _judged(self, round_id: str, sender: str, body: bytes) -> Refusal | None:
        """Take an update; None when it counts, or counted before."""
        try:
            kind = JSON_TYPE if body.lstrip()[:1] == b"{" else CBOR_TYPES[0]
            update = wire.read_update(body, kind, max_bytes=self._settings.body_bytes)
            if (round_id, sender) != (update.round_id, update.proplet_id):
                whose = f"round {update.round_id} and {update.proplet_id}"
                raise Refusal(403, f"the topic is not that of {whose}", "proplet_id")
            intake.take_update(self._server, update, "mqtt", utc_now())
        except Refusal as refusal:
            return refusal
        except UnknownRound as unknown:
            return Refusal(404, f"Round not found: {unknown}", "round_id")
        return None

    def _answer(self, round_id: str, sender: str, refused: Refusal | None) -> Answer | None:
        """None for names that have no topic, as devices have in open mode alone."""
        if not re.fullmatch(NAME, sender):
            return None
        status, detail = (refused.status, str(refused)) if refused else (200, "accepted")
        body = rounds.answer(round_id, sender, status, detail).encode()
        return rounds.OWN_ANSWER.format(proplet_id=sender), self._sealed(rounds.ANSWER, sender, body)

    def _take_envelope(self, results: Any) -> None:
        """The update in the results of an existing device. All devices may publish there, so in open mode alone."""
        if not self._server.pinned.is_open or not isinstance(results, dict) or not results.get("update_b64"):
            return
        try:
            data = base64.b64decode(results["update_b64"], validate=True)
        except (ValueError, TypeError):
            raise Refusal(400, "results.update_b64: no base64", "update_b64") from None
        update = wire.read_update(data, max_bytes=self._settings.body_bytes)
        intake.take_update(self._server, update, "mqtt", utc_now())


UPDATES_FILTER = "fl/rounds/+/updates/+"


def chunks_of(name: str, data: bytes, sha256: str) -> list[str]:
    """The messages that bring a module; at least one."""
    total = max(1, -(-len(data) // CHUNK_BYTES))
    return [
        json.dumps(
            {
                "app_name": name,
                "chunk_idx": place,
                "total_chunks": total,
                "data": base64.b64encode(data[place * CHUNK_BYTES : (place + 1) * CHUNK_BYTES]).decode(),
                "sha256": sha256.removeprefix("0x"),
            }
        )
        for place in range(total)
    ]


def _bounded(details: dict[str, Any]) -> dict[str, Any]:
    """What a device says of itself, unless it is too much."""
    return details if len(json.dumps(details)) <= MAX_DETAILS else {}
