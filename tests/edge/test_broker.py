"""MQTT with real brokers: who is let in, what each may do, and what the bridge takes and publishes."""

import asyncio
import base64
import contextlib
import hashlib
import itertools
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
from amqtt.adapters import BufferReader
from amqtt.errors import AMQTTError, MQTTError, NoDataError
from amqtt.mqtt.connect import ConnectPacket, ConnectPayload, ConnectVariableHeader
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import SecretStr

from blocks.identity import residents
from infra import edge_data, edge_server
from infra.edge_bridge import CHUNK_BYTES, Bridge, UpdatesFirst, chunks_of
from infra.edge_broker import Bounded, Door, _first_packet, matches, mosquitto_files
from infra.edge_metrics import Metrics
from infra.edge_server import EdgeSettings
from tasks.edge import intake, rounds, seal
from tasks.edge.seal import UPDATE
from tasks.edge.server import Server, open_next, start_alive, utc_now
from tasks.edge.wire import Update
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
        self.counter = itertools.count(1)
        self.keys = {one: self.server.ledger.register(one, {}, utc_now()) for one in "abc"}
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "infra.edge_broker", "--folder", str(self.folder)]
        self.process = subprocess.Popen(command, env={**os.environ, **self.environment}, process_group=0)
        wait_for(self._listens, 90)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        os.killpg(self.process.pid, 9)
        self.process.wait()

    def client(self, user: str | None, key: str | None = None, **more: Any) -> aiomqtt.Client:
        password = key if key is not None else self.keys.get(user or "")
        given = {"identifier": user, "timeout": 10, **more}
        return aiomqtt.Client("127.0.0.1", self.port, username=user, password=password, **given)

    def sealed(self, user: str, kind: str, said: dict[str, Any], counter: int = 0) -> bytes:
        """As this device says it; with the next counter, or the one that is given."""
        key = seal.key_of(self.keys[user])
        return seal.seal(json.dumps(said).encode(), key, kind, user, counter or next(self.counter))

    def word(self, user: str, topic: str, **said: Any) -> tuple[str, bytes]:
        """Topic and payload of what a device says of itself."""
        return PREFIX + topic, self.sealed(user, topic, {"proplet_id": user, **said})

    def update(self, user: str, **fields: Any) -> bytes:
        return self.sealed(user, UPDATE, update(user, **fields))

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


def connect_bytes(
    client: str, user: str | None, password: str | None, will: tuple[str, bytes] | None = None, *, is_clean: bool = True
) -> bytes:
    """A client's first packet."""
    head = ConnectVariableHeader(keep_alive=60)
    head.clean_session_flag, head.username_flag, head.password_flag = is_clean, user is not None, password is not None
    body = ConnectPayload(client, username=user, password=password)
    if will is not None:
        head.will_flag, body.will_topic, body.will_message = True, *will
    return bytes(ConnectPacket(variable_header=head, payload=body).to_bytes())


def connect(site: Site, *said: Any, **more: Any) -> int:
    """What a client is told that connects and is cut off without a word; -1 for no answer."""
    with socket.create_connection(("127.0.0.1", site.port), 20) as raw:
        raw.sendall(connect_bytes(*said, **more))
        answer = raw.recv(4)
    return answer[3] if len(answer) == 4 else -1


def test_a_last_will_says_nothing_that_its_owner_may_not_say(site):
    """Heard by the server's own user, who hears everything."""
    allowed, forbidden = (
        PREFIX + "control/proplet/alive",
        (PREFIX + "fl/rounds/r-1/updates/a", PREFIX + "control/manager/start"),
    )

    async def see() -> list[str]:
        async with site.client("edge-server", "the password of the bridge") as server:
            await server.subscribe("#", qos=1)
            for topic in (*forbidden, allowed):
                await asyncio.to_thread(connect, site, "b", "b", site.keys["b"], (topic, b"last will"))
            heard: list[str] = []
            async with asyncio.timeout(30):
                async for message in server.messages:
                    heard.append(message.topic.value)
                    if heard[-1] == allowed:
                        return heard
        return heard

    assert asyncio.run(see()) == [allowed]


def test_nobody_ends_or_inherits_the_session_of_another(site):
    """Who has no key, or another's, is told nothing; a device stays connected, and what waits for it waits."""
    start = PREFIX + rounds.OWN_START.format(proplet_id="a")
    strangers: list[tuple[str, str | None, str | None]] = [
        ("a", "b", site.keys["b"]),
        ("a", "a", "wrong"),
        ("edge-server", "b", site.keys["b"]),
    ]

    # mosquitto 2.0.11 (Debian's) drops what waits for a session when somebody asks for it who says no user name at all.
    strangers += [("a", None, None)] if site.settings.broker == "amqtt" else []

    async def strike() -> None:
        for one in strangers:
            for is_clean in (True, False):
                await asyncio.to_thread(connect, site, *one, is_clean=is_clean)

    async def say(text: str) -> None:
        async with site.client("edge-server", "the password of the bridge") as server:
            await server.publish(start, text, qos=1)

    async def see() -> list[bytes]:
        heard: list[bytes] = []
        async with site.client("a", clean_session=False) as device:
            await device.subscribe(start, qos=1)
            await strike()
            await say("while it listens")
            async with asyncio.timeout(30):
                heard.append(bytes((await anext(aiter(device.messages))).payload))
        await strike()  # meanwhile the broker notices that the device has left
        await say("while it is away")
        await strike()
        async with site.client("a", clean_session=False) as device:
            heard.append(await first_of(device))
        return heard

    async def first_of(device: aiomqtt.Client) -> bytes:
        waiting = asyncio.ensure_future(anext(aiter(device.messages)))
        done, _ = await asyncio.wait([waiting], timeout=15)
        if not done and site.settings.broker == "amqtt":
            # On a busy machine it can lose what came while a client left; whoever starts a round says it again.
            await say("while it is away")
        async with asyncio.timeout(30):
            return bytes((await waiting).payload)

    assert asyncio.run(see()) == [b"while it listens", b"while it is away"]


@pytest.mark.parametrize("is_open", [False, True])
def test_who_may_connect_as_whom(tmp_path, is_open):
    server = make_server(tmp_path, is_open=is_open)
    door = Door(server, EdgeSettings(mqtt_password=SecretStr("x")), "x")
    a, b = (server.ledger.register(one, {}, utc_now()) for one in "ab")
    said = PREFIX + rounds.ALIVE

    def answer(*said: Any, **more: Any) -> int:
        packet = asyncio.run(_first_packet(BufferReader(connect_bytes(*said, **more))))
        return door.answer(packet)

    assert [answer("a", "a", a), answer("a", "a", a, (said, b"")), answer("edge-server", "edge-server", "x")] == [
        0,
        0,
        0,
    ]
    assert [answer("a", "b", b), answer("edge-server", "a", a), answer("", "a", a, is_clean=False)] == [2, 2, 2]
    assert [answer("a", "a", b), answer("a", "a", None), answer("edge-server", "edge-server", "y")] == [5, 5, 5]
    strangers = [answer("a", None, None), answer("edge-server", None, None)]
    assert strangers == ([2, 2] if is_open else [5, 5])
    assert answer("who", None, None) == (0 if is_open else 5)
    assert answer("x", "a", a) == (0 if is_open else 2)
    assert answer("a", "a", a, (PREFIX + "fl/rounds/r/updates/b", b"")) == (0 if is_open else 5)
    wrong = ["", "$SYS/x", PREFIX + "fl/rounds/+/updates/a", "#"]
    assert [answer("a", "a", a, (topic, b"")) for topic in wrong] == [5] * 4
    residents.pop("edge", None)


@pytest.mark.parametrize(
    "packet",
    [
        b"\x10\xff\xff\xff\x7f",
        b"\x30\x02\x00\x00",
        b"\x10\x02\x00\x09",
        b"\x10\x0c\x00\x04MQTT\x05\x02\x00\x3c\x00\x00",
        b"",
    ],
)
def test_what_is_no_first_packet_is_not_read_on(packet):
    with pytest.raises((AMQTTError, MQTTError, NoDataError)):
        asyncio.run(_first_packet(BufferReader(packet)))


def test_a_packet_that_is_too_large_ends_its_connection():
    async def read() -> list[bytes]:
        reader = Bounded(b"first", BufferReader(b"and the rest"), 6)
        return [await reader.read(n) for n in (2, 3, 3, 6, 7, 1)]

    assert asyncio.run(read()) == [b"fi", b"rst", b"and", b" the r", b"", b""]


def test_what_nobody_foresaw_ends_neither_the_bridge_nor_the_messages_behind_it(site, monkeypatch, caplog):
    server, bridge = site.server, site.bridge()
    open_next(server, ask(server, round_id="r-3"), 1, utc_now())
    take, publish = intake.take_update, bridge._publish_one

    def take_or_fall(server: Server, found: Update, *more: Any) -> Any:
        if found.proplet_id == "a":
            raise RecursionError("unforeseen in taking")
        return take(server, found, *more)

    async def fall_once(*_: Any) -> None:
        monkeypatch.setattr(bridge, "_publish_one", publish)
        raise RuntimeError("unforeseen in publishing")

    monkeypatch.setattr(intake, "take_update", take_or_fall)
    monkeypatch.setattr(bridge, "_publish_one", fall_once)

    async def send() -> None:
        async with site.client("a") as a, site.client("b") as b:
            await a.publish(PREFIX + "fl/rounds/r-3/updates/a", site.update("a", round_id="r-3"), qos=1)
            await b.publish(PREFIX + "fl/rounds/r-3/updates/b", site.update("b", round_id="r-3"), qos=1)
            await until(lambda: server.ledger.count("r-3") == 1)
            server.ledger.leave(rounds.ROUND_NEXT, "{}", utc_now())
            await until(lambda: "unforeseen in publishing" in caplog.text and not server.ledger.unsent())

    asyncio.run(beside(bridge, send()))
    assert [row.proplet_id for row in server.ledger.updates("r-3")] == ["b"]
    assert "fl/rounds/r-3/updates/a: passed over" in caplog.text
    assert "unforeseen in taking" in caplog.text
    assert "again in 0.5 s" in caplog.text


def test_mosquittos_files_hold_no_name_that_would_break_a_line(tmp_path):
    server = make_server(tmp_path)
    (tmp_path / "broker").mkdir()
    for name in ("a", "00:1a"):
        server.ledger.register(name, {}, utc_now())
    mosquitto_files(tmp_path, Door(server, EdgeSettings(mqtt_password=SecretStr("x")), "x"))
    lines = (tmp_path / "broker" / "passwords").read_text().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["a", "edge-server"]
    residents.pop("edge", None)


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


def opened(site: Site, user: str, kind: str, message: aiomqtt.Message) -> dict[str, Any]:
    """What the server says to a device."""
    found: dict[str, Any] = json.loads(seal.opened(bytes(message.payload), seal.key_of(site.keys[user]), kind, user)[0])
    return found


def test_a_round_over_mqtt_alone(site):
    """A device says that it is there, hears of the round, sends its update, hears that it was taken.

    Sent again after the closing it is taken as before; another one is late, and one in another's name is refused.
    """
    server, topic = site.server, PREFIX + "fl/rounds/r-1/updates/"
    open_next(server, ask(server), 1, utc_now())

    async def take_part() -> list[dict[str, Any]]:
        async with site.client("a") as a, site.client("b") as b:
            for topic_of_start in (rounds.TASK_START, *(rounds.OWN_START.format(proplet_id=one) for one in "ab")):
                await a.subscribe(PREFIX + topic_of_start, qos=1)
            await a.subscribe(PREFIX + rounds.ROUND_NEXT, qos=1)
            await a.subscribe(PREFIX + rounds.OWN_ANSWER.format(proplet_id="a"), qos=1)
            await a.publish(*site.word("a", rounds.CREATE, metadata={"os": "linux"}), qos=1)
            await b.publish(*site.word("b", rounds.ALIVE, status="alive"), qos=1)
            await until(lambda: server.ledger.device("a").health and server.ledger.device("b").health)
            assert await asyncio.to_thread(start_alive, server, server.ledger.round("r-1")) == 2
            await until(lambda: not server.ledger.unsent())
            server.ledger.leave(rounds.ROUND_NEXT, "{}", utc_now())
            started: list[dict[str, Any]] = []
            async for message in a.messages:
                if message.topic.value == PREFIX + rounds.ROUND_NEXT:
                    break
                started.append(opened(site, "a", rounds.TASK_START, message))
            await a.publish(topic + "a", site.update("a"), qos=1)
            await b.publish(topic + "b", site.update("b"), qos=1)
            await until(lambda: server.ledger.round("r-1").status == "CLOSED")
            for late in (site.update("a"), site.update("a", w=[7.0] * 3), site.sealed("a", UPDATE, update("b"))):
                await a.publish(topic + "a", late, qos=1)
            answers: list[dict[str, Any]] = []
            async for message in a.messages:
                answers.append(opened(site, "a", rounds.ANSWER, message))
                if len(answers) == 4:
                    break
            assert [one["status"] for one in answers] == [200, 200, 409, 403]
            assert {(one["round_id"], one["proplet_id"]) for one in answers} == {("r-1", "a")}
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
            await device.publish(*site.word("a", rounds.MODULE_WANTED, app_name="module:latest"), qos=1)
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
            await device.publish(PREFIX + "fl/rounds/r-2/updates/a", site.update("a", round_id="r-2"), qos=1)

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
            "127.0.0.1",
            site.port,
            username="a",
            password=site.keys["a"],
            identifier="a",
            tls_context=trusted,
            timeout=10,
        ) as device:
            await device.publish(*site.word("a", rounds.ALIVE, status="alive"), qos=1)
            await until(lambda: site.server.ledger.device("a").health == "alive")

    try:
        asyncio.run(beside(site.bridge(), send()))
        assert not asyncio.run(is_let_in_plainly(site))
    finally:
        site.kill()
        residents.pop("edge", None)


async def is_let_in_plainly(site: Site) -> bool:
    return await is_let_in(site.client("a", timeout=3))


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
        ("a", PREFIX + "control/manager/answers/a", "read", True),
        ("a", PREFIX + "control/manager/answers/b", "read", False),
        ("a", PREFIX + "control/manager/answers/a", "write", False),
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
    assert edge_server.is_device("device-1.a@c")
    wrong = ("+", "#", "a/b", "", "a b", "a\n", "-a", "x" * 129)
    assert not any(edge_server.is_name(one) or edge_server.is_device(one) for one in wrong)
    assert not edge_server.is_device("00:1a:2b")
