"""The MQTT side of a server of edge devices: what waits in the ledger is published, what devices say is taken.

    published   round start and next, tasks' start and stop; modules in chunks to those who ask
    taken       updates, create, alive, results, metrics; an update goes the same way as one over HTTP

A message is acknowledged when the ledger has what it says, and the session outlives the process: what comes while this process
is down, or dies before it has written, is delivered again. Topics are below m/TENANT/c/CHANNEL/; in open mode the bare ones of
existing devices as well.
"""

import asyncio
import base64
import itertools
import json
import logging
import math
import ssl
import time
from collections.abc import Sequence
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
from tasks.edge import intake, rounds, wire
from tasks.edge.server import Server, start_again, utc_now
from tasks.edge.wire import CBOR_TYPES, JSON_TYPE, Refusal

CHUNK_BYTES = 512_000
POLL_S = 0.2
RETRY_S, LONGEST_RETRY_S = 0.5, 10.0
MODULE_PAUSE_S = 1.0  # a module is not sent again within this time, however many ask: all hear it
MAX_DETAILS = 16_384
IDENTIFIER = "healchain-edge-bridge"
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

    async def run(self) -> None:
        """Until it is cancelled; a broker that is away is tried again."""
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
            except* (aiomqtt.MqttError, RegistryUnavailable, OSError) as errors:
                log.warning("the broker is away: %s; again in %.1f s", errors.exceptions[0], pause_s)
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
            identifier=f"{IDENTIFIER}-{self._server.pinned.tenant}-{self._server.pinned.channel}",
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
                await self._publish_one(client, row)
            if waiting:
                await run_sync(self._server.ledger.mark_sent, [row.id or 0 for row in waiting], utc_now())
            else:
                await asyncio.sleep(POLL_S)

    async def _publish_one(self, client: aiomqtt.Client, row: EdgeMessageRow) -> None:
        for topic in rounds.topics_of(row.topic, row.payload, is_open=self._server.pinned.is_open):
            await client.publish(self._prefix + topic, row.payload, qos=1)
        if self._server.pinned.is_open and row.topic in rounds.BARE:
            await client.publish(row.topic, row.payload, qos=1)

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
                if topic == self._prefix + rounds.MODULE_WANTED:
                    await self._send_module(client, _module_name(data))
                else:
                    await run_sync(self.take, topic, data)
            except (Refusal, UnknownRound, MissingArtifact, TamperedArtifact) as error:
                log.warning("%s: refused: %s", topic[-200:], error)
            if message.qos:
                client._client.ack(message.mid, message.qos)

    def take(self, topic: str, data: bytes) -> None:
        """What one message says. Raises Refusal, UnknownRound."""
        name = topic.removeprefix(self._prefix)
        if name.startswith("fl/rounds/"):
            self._take_update(name.split("/"), data)
            return
        found = wire.decode_json(data)
        if not isinstance(found, dict):
            raise Refusal(400, "expected an object")
        results = found.get("results")
        sender = found.get("proplet_id") or (results.get("proplet_id") if isinstance(results, dict) else None)
        if not isinstance(sender, str) or not edge_server.is_name(sender):
            raise Refusal(400, f"proplet_id = {sender!r:.60}: expected {edge_server.NAME_RULE}", "proplet_id")
        self._check_known(sender)
        self._take_word(name, sender, found)

    def _check_known(self, sender: str) -> None:
        if not self._server.pinned.is_open and self._server.ledger.device(sender) is None:
            raise Refusal(403, f"proplet_id {sender!r} is no registered device", "proplet_id")

    def _take_word(self, name: str, sender: str, found: dict[str, Any]) -> None:
        ledger, now = self._server.ledger, utc_now()
        if name == rounds.CREATE:
            details = found.get("metadata")
            ledger.beat(sender, intake.ALIVE, now, _bounded(details if isinstance(details, dict) else {}))
            start_again(self._server, sender)
        elif name == rounds.ALIVE:
            said = found.get("status", intake.ALIVE)
            is_well = said in (intake.ALIVE, intake.OFFLINE) and found.get("healthy", True) is not False
            ledger.beat(sender, said if is_well else intake.UNHEALTHY, now)
        elif name == rounds.RESULTS:
            edge_data.record_results(self._server, found, sender)
            self._take_envelope(found.get("results"))
        elif name in (rounds.METRICS, rounds.TASK_METRICS):
            row = ledger.device(sender)
            known_details = json.loads(row.details) if row else {}
            ledger.beat(sender, intake.ALIVE, now, _bounded({**known_details, name.rpartition("/")[2]: found}))

    def _take_update(self, path: Sequence[str], data: bytes) -> None:
        """fl/rounds/ROUND/updates/SENDER: who may publish there is the broker's to say, so the two must be the body's own."""
        began_s = time.perf_counter()
        try:
            kind = JSON_TYPE if data.lstrip()[:1] == b"{" else CBOR_TYPES[0]
            update = wire.read_update(data, kind, max_bytes=self._settings.body_bytes)
            if list(path[2:]) != [update.round_id, "updates", update.proplet_id]:
                raise Refusal(
                    403, f"the topic is not that of round {update.round_id} and {update.proplet_id}", "proplet_id"
                )
            intake.take_update(self._server, update, "mqtt", utc_now())
        except Refusal as refusal:
            self._metrics.refused("mqtt", refusal.status)
            raise
        self._metrics.accepted("mqtt", time.perf_counter() - began_s)

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


def _module_name(data: bytes) -> str:
    found = wire.decode_json(data)
    name = found.get("app_name") if isinstance(found, dict) else None
    if not isinstance(name, str) or not name:
        raise Refusal(400, "app_name is required", "app_name")
    return name[:512]


def _bounded(details: dict[str, Any]) -> dict[str, Any]:
    """What a device says of itself, unless it is too much."""
    return details if len(json.dumps(details)) <= MAX_DETAILS else {}
