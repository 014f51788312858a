"""MQTT with real brokers: who is let in, what each may do, and what the bridge takes and publishes."""

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import aiomqtt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import SecretStr

from blocks.identity import residents
from infra import edge_data, edge_server
from infra.edge_bridge import CHUNK_BYTES, Bridge, UpdatesFirst, chunks_of
from infra.edge_broker import Door, matches
from infra.edge_metrics import Metrics
from infra.edge_server import EdgeSettings
from tasks.edge import rounds
from tasks.edge.server import Server, open_next, start_alive, utc_now
from tests.edge.world import ask, make_server, put_model, update

PREFIX = "m/healchain/c/edge/"
has_mosquitto = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is not None
needs_mosquitto = pytest.mark.skipif(not has_mosquitto, reason="mosquitto is missing: apt-get install -y mosquitto")
BROKERS = ["amqtt", pytest.param("mosquitto", marks=needs_mosquitto)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: Callable[[], Any], within_s: float = 20) -> Any:
    deadline = time.monotonic() + within_s
    while not (found := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


class Site:
    """A broker as a process of its own, and a ledger."""

    def __init__(self, folder: Path, kind: str, more: dict[str, str] | None = None, **pinned: Any) -> None:
        self.folder = folder
        self.server: Server = make_server(folder, beat_s=1, **pinned)
        is_open = "1" if pinned.get("is_open") else "0"
        self.port = free_port()
        given = {
            "HEALCHAIN_EDGE_BROKER": kind,
            "HEALCHAIN_EDGE_MQTT_PORT": str(self.port),
            "HEALCHAIN_EDGE_OPEN": is_open,
        }
        given |= more or {}
        self.environment = given
        self.settings: EdgeSettings = edge_server.read_settings(given)
        password = folder / "broker" / "server-password"
        password.parent.mkdir()
        password.write_text("the password of the bridge")
        self.keys = {one: self.server.ledger.register(one, {}, utc_now()) for one in "abc"}
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "infra.edge_broker", "--folder", str(self.folder)]
        self.process = subprocess.Popen(command, env={**os.environ, **self.environment}, process_group=0)
        wait_for(self._listens)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        os.killpg(self.process.pid, 9)
        self.process.wait()

    def client(self, user: str | None, key: str | None = None) -> aiomqtt.Client:
        password = key if key is not None else self.keys.get(user or "")
        return aiomqtt.Client("127.0.0.1", self.port, username=user, password=password, timeout=10)

    def bridge(self) -> Bridge:
        return Bridge(self.server, self.settings, self.folder, Metrics())


@pytest.fixture(scope="module", params=BROKERS)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One for all tests: a process takes seconds to load. Each has a round of its own."""
    made = Site(tmp_path_factory.mktemp(request.param), request.param)
    yield made
    made.kill()
    residents.pop("edge", None)


async def is_let_in(client: aiomqtt.Client) -> bool:
    try:
        async with client:
            return True
    except aiomqtt.MqttError:
        return False


def test_only_those_with_a_key_are_let_in(site):
    async def see() -> list[bool]:
        asked = [
            ("a", None),
            ("a", "wrong"),
            ("a", site.keys["b"]),
            ("nobody", "x"),
            (None, None),
            ("edge-server", "x"),
        ]
        return [await is_let_in(site.client(*one)) for one in asked]

    assert asyncio.run(see()) == [True, False, False, False, False, False]


def test_a_device_that_is_registered_later_is_let_in_with_its_new_key(site):
    async def enters(key: str) -> bool:
        return await is_let_in(site.client("late", key))

    first = site.server.ledger.register("late", {}, utc_now())
    wait_for(lambda: asyncio.run(enters(first)))
    second = site.server.ledger.register("late", {}, utc_now())
    wait_for(lambda: asyncio.run(enters(second)))
    assert not asyncio.run(enters(first))


def test_a_device_publishes_its_own_updates_alone(site):
    """Heard by the server's own user, who hears everything."""
    mine, others = (PREFIX + f"fl/rounds/r-1/updates/{one}" for one in "ab")
    attempts = [mine, others, PREFIX + "control/manager/start", PREFIX + "fl/rounds/next", "fl/rounds/r-1/updates/a"]
    attempts += [PREFIX + "registry/server", PREFIX + "control/proplet/alive"]

    async def see() -> list[str]:
        heard: list[str] = []
        async with site.client("edge-server", "the password of the bridge") as server, site.client("a") as device:
            await server.subscribe("#", qos=1)
            for topic in attempts:
                with contextlib.suppress(aiomqtt.MqttError):
                    await device.publish(topic, "{}", qos=1)
            async with asyncio.timeout(10):
                async for message in server.messages:
                    heard.append(message.topic.value)
                    if heard[-1].endswith("alive"):
                        return heard
        return heard

    assert asyncio.run(see()) == [mine, PREFIX + "control/proplet/alive"]


def test_a_device_does_not_hear_what_others_send(site):
    async def see() -> list[str]:
        heard = []
        async with site.client("a") as nosy, site.client("b") as sender:
            for topic in ("#", PREFIX + "fl/rounds/+/updates/+", PREFIX + "control/manager/start"):
                with contextlib.suppress(aiomqtt.MqttError):
                    await nosy.subscribe(topic, qos=1)
            await sender.publish(PREFIX + "fl/rounds/r-1/updates/b", "{}", qos=1)
            async with site.client("edge-server", "the password of the bridge") as server:
                await server.publish(PREFIX + "control/manager/start", "{}", qos=1)
            async with asyncio.timeout(10):
                async for message in nosy.messages:
                    heard.append(message.topic.value)
                    if heard[-1].endswith("start"):
                        return heard
        return heard

    assert set(asyncio.run(see())) == {PREFIX + "control/manager/start"}


async def beside(bridge: Bridge, work: Any) -> Any:
    """Do the work while the bridge runs."""
    running = asyncio.create_task(bridge.run())
    try:
        while not bridge._metrics.connected._value.get():
            await asyncio.sleep(0.05)
        return await asyncio.wait_for(work, 60)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def until(what: Callable[[], Any]) -> Any:
    while not (found := await asyncio.to_thread(what)):
        await asyncio.sleep(0.05)
    return found


def test_a_round_over_mqtt_alone(site):
    """A device says that it is there, hears of the round, sends its update, hears of the model; late ones change nothing."""
    server, topic = site.server, PREFIX + "fl/rounds/r-1/updates/"
    open_next(server, ask(server), 1, utc_now())

    async def take_part() -> list[dict[str, Any]]:
        async with site.client("a") as a, site.client("b") as b:
            for topic_of_start in (rounds.TASK_START, *(rounds.OWN_START.format(proplet_id=one) for one in "ab")):
                await a.subscribe(PREFIX + topic_of_start, qos=1)
            await a.subscribe(PREFIX + rounds.ROUND_NEXT, qos=1)
            await a.publish(PREFIX + rounds.CREATE, json.dumps({"proplet_id": "a", "metadata": {"os": "linux"}}), qos=1)
            await b.publish(PREFIX + rounds.ALIVE, json.dumps({"proplet_id": "b", "status": "alive"}), qos=1)
            await until(lambda: server.ledger.device("a").health and server.ledger.device("b").health)
            assert await asyncio.to_thread(start_alive, server, server.ledger.round("r-1")) == 2
            await until(lambda: not server.ledger.unsent())
            server.ledger.leave(rounds.ROUND_NEXT, "{}", utc_now())
            started: list[dict[str, Any]] = []
            async for message in a.messages:
                if message.topic.value == PREFIX + rounds.ROUND_NEXT:
                    break
                started.append(json.loads(message.payload))
            await a.publish(topic + "a", json.dumps(update("a")), qos=1)
            await a.publish(topic + "a", json.dumps(update("a")), qos=1)
            await a.publish(topic + "a", json.dumps(update("b")), qos=1)
            await a.publish(topic + "a", b"\xff\x00", qos=1)
            await b.publish(topic + "b", json.dumps(update("b")), qos=1)
            await until(lambda: server.ledger.round("r-1").status == "CLOSED")
            return started

    [started] = asyncio.run(beside(site.bridge(), take_part()))
    assert (started["proplet_id"], started["env"]["ROUND_ID"]) == ("a", "r-1")
    assert [row.proplet_id for row in server.ledger.updates("r-1")] == ["a", "b"]
    assert {row.transport for row in server.ledger.updates("r-1")} == {"mqtt"}
    assert json.loads(server.ledger.device("a").details) == {"os": "linux"}
    assert server.ledger.unsent() == []


def test_a_module_comes_in_chunks_with_its_digest(site):
    data = b"\0asm" + bytes(range(256)) * 5000
    edge_data.put_module(site.server, "module:latest", data)

    async def fetch() -> list[dict[str, Any]]:
        async with site.client("a") as device:
            await device.subscribe(PREFIX + rounds.MODULE_CHUNK, qos=1)
            await device.publish(PREFIX + rounds.MODULE_WANTED, json.dumps({"app_name": "module:latest"}), qos=1)
            found: list[dict[str, Any]] = []
            async for message in device.messages:
                found.append(json.loads(message.payload))
                if len(found) == found[0]["total_chunks"]:
                    return found
        return found

    chunks = asyncio.run(beside(site.bridge(), fetch()))
    whole = b"".join(base64.b64decode(one["data"]) for one in sorted(chunks, key=lambda one: one["chunk_idx"]))
    assert whole == data
    assert {one["sha256"] for one in chunks} == {hashlib.sha256(data).hexdigest()}
    assert len(chunks) == 3
    assert max(len(base64.b64decode(one["data"])) for one in chunks) == CHUNK_BYTES


def test_messages_wait_for_a_broker_that_was_killed(site):
    server = site.server

    async def go_through_it() -> str:
        await asyncio.to_thread(site.kill)
        server.ledger.leave(rounds.ROUND_NEXT, '{"after":"the kill"}', utc_now())
        await asyncio.sleep(1)
        assert len(server.ledger.unsent()) == 1
        await asyncio.to_thread(site.start)
        async with site.client("a") as device:
            await device.subscribe(PREFIX + rounds.ROUND_NEXT, qos=1)
            await until(lambda: not server.ledger.unsent())
            server.ledger.leave(rounds.ROUND_NEXT, '{"after":"the start"}', utc_now())
            async for message in device.messages:
                if b"the start" in message.payload:
                    return message.payload.decode()
        return ""

    assert asyncio.run(beside(site.bridge(), go_through_it())) == '{"after":"the start"}'


def test_an_update_that_comes_while_the_bridge_is_down_is_taken_later(site):
    server = site.server
    open_next(server, ask(server, round_id="r-2"), 1, utc_now())

    async def nothing() -> None:
        await asyncio.sleep(0.2)

    async def send() -> None:
        async with site.client("a") as device:
            said = json.dumps(update("a", round_id="r-2"))
            await device.publish(PREFIX + "fl/rounds/r-2/updates/a", said, qos=1)

    async def taken() -> None:
        await until(lambda: server.ledger.count("r-2") == 1)

    asyncio.run(beside(site.bridge(), nothing()))
    asyncio.run(send())
    assert server.ledger.count("r-2") == 0
    asyncio.run(beside(site.bridge(), taken()))


@pytest.mark.parametrize("kind", BROKERS)
def test_in_open_mode_existing_devices_speak_on_bare_topics(tmp_path, kind):
    site = Site(tmp_path, kind, is_open=True)
    server = site.server
    put_model(server, {"w": [1.0]})
    open_next(server, ask(server), 1, utc_now())
    body = base64.b64encode(json.dumps(update("c")).encode()).decode()
    envelope = {"task_id": "t", "results": {"task_id": "t", "round_id": "r-1", "proplet_id": "c", "update_b64": body}}

    async def take_part() -> str:
        async with site.client(None) as device:
            await device.subscribe("fl/rounds/next", qos=1)
            await device.publish("fl/rounds/r-1/updates/b", json.dumps(update("b")), qos=1)
            await device.publish(PREFIX + rounds.RESULTS, json.dumps({**envelope, "error": None}), qos=1)
            await until(lambda: server.ledger.round("r-1").status == "CLOSED")
            server.ledger.leave(rounds.ROUND_NEXT, "{}", utc_now())
            async for message in device.messages:
                return message.topic.value
        return ""

    try:
        assert asyncio.run(beside(site.bridge(), take_part())) == "fl/rounds/next"
        assert [row.proplet_id for row in server.ledger.updates("r-1")] == ["b", "c"]
    finally:
        site.kill()
        residents.pop("edge", None)


def certificate(folder: Path) -> dict[str, str]:
    """A certificate of 127.0.0.1 that signs itself, as settings of the server."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = utc_now()
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "cert.pem").write_bytes(made.public_bytes(pem))
    (folder / "key.pem").write_bytes(key.private_bytes(pem, *plain))
    paths = {"CA": "cert.pem", "CERT": "cert.pem", "KEY": "key.pem"}
    return {f"HEALCHAIN_EDGE_MQTT_{name}": str(folder / file) for name, file in paths.items()}


@pytest.mark.parametrize("kind", BROKERS)
def test_by_setting_all_is_said_over_tls(tmp_path, kind):
    site = Site(tmp_path, kind, certificate(tmp_path))
    trusted = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))

    async def send() -> None:
        async with aiomqtt.Client(
            "127.0.0.1", site.port, username="a", password=site.keys["a"], tls_context=trusted, timeout=10
        ) as device:
            await device.publish(PREFIX + rounds.ALIVE, json.dumps({"proplet_id": "a", "status": "alive"}), qos=1)
            await until(lambda: site.server.ledger.device("a").health == "alive")

    try:
        asyncio.run(beside(site.bridge(), send()))
        assert not asyncio.run(is_let_in_plainly(site))
    finally:
        site.kill()
        residents.pop("edge", None)


async def is_let_in_plainly(site: Site) -> bool:
    return await is_let_in(aiomqtt.Client("127.0.0.1", site.port, username="a", password=site.keys["a"], timeout=3))


def test_updates_come_before_what_devices_say_of_themselves():
    topics = ["control/proplet/alive", "fl/rounds/r-1/updates/a", "control/proplet/metrics", "fl/rounds/r-1/updates/b"]

    async def taken() -> list[str]:
        queue = UpdatesFirst()
        for place, topic in enumerate(topics):
            queue.put_nowait(aiomqtt.Message(topic, b"", 1, False, place, None))
        return [queue.get_nowait().topic.value for _ in topics]

    assert asyncio.run(taken()) == [topics[1], topics[3], topics[0], topics[2]]


@pytest.mark.parametrize(("size", "count"), [(0, 1), (CHUNK_BYTES, 1), (CHUNK_BYTES + 1, 2)])
def test_chunks_are_as_many_as_needed(size, count):
    chunks = [json.loads(one) for one in chunks_of("m", bytes(size), "0xab")]
    assert [(one["chunk_idx"], one["total_chunks"], one["sha256"]) for one in chunks] == [
        (place, count, "ab") for place in range(count)
    ]


@pytest.mark.parametrize(
    ("user", "topic", "access", "is_allowed"),
    [
        ("a", PREFIX + "fl/rounds/r/updates/a", "write", True),
        ("a", PREFIX + "fl/rounds/r/updates/b", "write", False),
        ("a", PREFIX + "fl/rounds/r/updates/a", "read", False),
        ("a", PREFIX + "fl/rounds/r/x/updates/a", "write", False),
        ("a", PREFIX + "control/manager/start", "read", True),
        ("a", PREFIX + "control/manager/start", "write", False),
        ("a", PREFIX + "control/manager/start/a", "read", True),
        ("a", PREFIX + "control/manager/start/b", "read", False),
        ("a", PREFIX + "control/manager/start/a", "write", False),
        ("a", "fl/rounds/r/updates/a", "write", False),
        (None, PREFIX + "control/proplet/alive", "write", True),
        ("edge-server", "anything", "write", True),
    ],
)
def test_the_rules_of_the_topics(tmp_path, user, topic, access, is_allowed):
    door = Door(make_server(tmp_path), EdgeSettings(mqtt_password=SecretStr("x")), "x")
    assert door.allows(user, topic, access) is is_allowed
    residents.pop("edge", None)


def test_a_name_is_no_pattern():
    assert not matches("fl/rounds/+/updates/a", "fl/rounds/r/updates/+")
    assert edge_server.is_name("device-1.a:b@c")
    assert not any(edge_server.is_name(one) for one in ("+", "#", "a/b", "", "a b", "a\n", "-a", "x" * 129))
