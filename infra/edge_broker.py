"""The MQTT broker of edge devices: amqtt in this process, or mosquitto as its child.

A device's user name is its id and its password the key that it was registered with. What it may publish and hear is
tasks.edge.rounds.acl: updates under its own id alone. With mosquitto that is a password file and an ACL file, written again
when a device is registered; amqtt asks the ledger. In open mode (for a trusted network) nobody is asked for a password.

A client's id is its user name, so that nobody ends or inherits another's session. amqtt looks at sessions before it asks for
passwords, and publishes last wills for their owners without asking what they may: `Guarded` judges a connection before amqtt
sees it. Nothing is retained, and no message is larger than an update may be.

    python -m infra.edge_broker --folder DIR
"""

import argparse
import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
import pwd
import shutil
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amqtt.adapters import BufferReader, ReaderAdapter, StreamReaderAdapter, StreamWriterAdapter
from amqtt.broker import Broker
from amqtt.contexts import Action
from amqtt.errors import AMQTTError, MQTTError, NoDataError
from amqtt.mqtt.connack import ConnackPacket
from amqtt.mqtt.connect import ConnectPacket
from amqtt.mqtt.packet import CONNECT, MQTTFixedHeader
from amqtt.plugins.base import BaseAuthPlugin, BaseTopicPlugin
from amqtt.session import Session

from blocks.edge_ledger import EdgeLedger, mosquitto_hash
from blocks.identity import residents, write_secret
from blocks.registry import RegistryUnavailable
from infra import edge_server
from infra.edge_server import EdgeSettings
from tasks.edge import rounds
from tasks.edge.server import Server, server_of

REFRESH_S = 1.0
MAX_PACKET = 268_435_455  # of MQTT itself
BESIDE_BODY = 65_536  # bytes of a packet beside an update: its topic, and its seal
MAX_CONNECT = 65_536  # bytes of a client's first packet, its last will among them
CONNECT_S = 20.0
MQTT_3_1_1 = 4  # its protocol level, and what it answers a CONNECT (section 3.2.2.3)
ACCEPTED, IDENTIFIER_REJECTED, SERVER_UNAVAILABLE, NOT_AUTHORIZED = 0, 2, 3, 5
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Door:
    """Who is let in, and what each may do."""

    server: Server
    settings: EdgeSettings
    password: str

    def admits(self, user: str | None, password: str | None) -> bool:
        if user == self.settings.mqtt_user:
            return hmac.compare_digest((password or "").encode(), self.password.encode())
        ledger: EdgeLedger = self.server.ledger
        row = ledger.device(user) if user else None
        if row is None or row.key_sha256 is None:
            return self.server.pinned.is_open
        return hmac.compare_digest(hashlib.sha256((password or "").encode()).hexdigest(), row.key_sha256)

    def answer(self, connect: ConnectPacket) -> int:
        """What a client is told that wants to connect: ACCEPTED, or why not."""
        user, client = connect.username, connect.client_id
        if not self.admits(user, connect.password):
            return NOT_AUTHORIZED
        if not self.owns(user, client) or (connect.payload.client_id_is_random and not connect.clean_session_flag):
            return IDENTIFIER_REJECTED
        if connect.will_flag and not self._may_will(user, connect.will_topic or ""):
            return NOT_AUTHORIZED
        return ACCEPTED

    def owns(self, user: str | None, client: str) -> bool:
        """Whether this session is this user's. In open mode that of nobody who has a key is anybody's."""
        return client == user or (self.server.pinned.is_open and self.admits(client, None))

    def _may_will(self, user: str | None, topic: str) -> bool:
        return topic != "" and not set(topic) & set("+#$") and self.allows(user, topic, "write")

    @property
    def max_packet(self) -> int:
        """Bytes."""
        # A task that brings its module has it in base64.
        return min(MAX_PACKET, 4 * self.settings.body_bytes // 3 + BESIDE_BODY)

    def allows(self, user: str | None, topic: str, access: str) -> bool:
        """access: read or write."""
        if user == self.settings.mqtt_user or self.server.pinned.is_open:
            return True
        prefix = rounds.prefix_of(self.server.pinned.tenant, self.server.pinned.channel)
        rules = rounds.acl(prefix, is_open=False)
        return any(how == access and matches(one.replace("%u", user or ""), topic) for how, one in rules)


def matches(pattern: str, topic: str) -> bool:
    """Whether a topic is one of a pattern with + for a level."""
    wanted, given = pattern.split("/"), topic.split("/")
    return len(wanted) == len(given) and all(one in ("+", other) for one, other in zip(wanted, given, strict=True))


_doors: dict[int, Door] = {}


class Admitted(BaseAuthPlugin):  # type: ignore[misc]
    """amqtt's question who is let in: `Guarded` has answered it."""

    async def authenticate(self, *, session: Session) -> bool | None:
        return True


class LedgerTopics(BaseTopicPlugin):  # type: ignore[misc]
    """amqtt's question what a device may do. As with mosquitto, all may subscribe, and hear what they may."""

    @dataclass
    class Config:
        port: int = 0

    async def topic_filtering(
        self, *, session: Session | None = None, topic: str | None = None, action: Action | None = None
    ) -> bool | None:
        if action is Action.SUBSCRIBE:
            return True
        access = "write" if action is Action.PUBLISH else "read"
        user = session.username if session else None
        return _doors[self.config.port].allows(user, topic or "", access)


class Bounded(ReaderAdapter):  # type: ignore[misc]
    """A connection whose first packet was read already. One that sends more than `most` bytes at once is at its end."""

    def __init__(self, first: bytes, reader: ReaderAdapter, most: int) -> None:
        self._first, self._reader, self._most = BufferReader(first), reader, most
        self._left, self._is_over = len(first), False

    async def read(self, n: int = -1) -> bytes:
        if self._is_over or n > self._most:
            self._is_over = True
            return b""
        if self._left:
            found: bytes = await self._first.read(n)
            self._left -= len(found)
            return found
        return bytes(await self._reader.read(n))

    def feed_eof(self) -> None:
        self._reader.feed_eof()


class Guarded(Broker):  # type: ignore[misc]
    """amqtt that looks at who connects, and with what, before it touches any session."""

    def __init__(self, door: Door, config: dict[str, Any]) -> None:
        super().__init__(config)
        self._door = door

    async def stream_connected(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener_name: str
    ) -> None:
        incoming, outgoing = StreamReaderAdapter(reader), StreamWriterAdapter(writer)
        connect = await self._let_in(incoming, outgoing)
        if connect is None:
            with contextlib.suppress(OSError):
                await outgoing.close()
            return
        # Written anew, so that amqtt reads just what was judged.
        first = Bounded(connect.to_bytes(), incoming, self._door.max_packet)
        await self.external_connected(first, outgoing, listener_name)

    async def _let_in(self, incoming: ReaderAdapter, outgoing: StreamWriterAdapter) -> ConnectPacket | None:
        """The packet of a client that may connect; another one is told so."""
        try:
            async with asyncio.timeout(CONNECT_S):
                connect = await _first_packet(incoming)
            answer = await asyncio.to_thread(self._door.answer, connect)
            if answer == ACCEPTED:
                return connect
            log.warning("client %r of user %r is not let in: code %d", connect.client_id, connect.username, answer)
        except RegistryUnavailable as error:
            log.warning("nobody can be let in: %s", error)
            answer = SERVER_UNAVAILABLE
        except (AMQTTError, MQTTError, NoDataError, EOFError, OSError, ValueError) as error:
            log.warning("not MQTT 3.1.1: %s", error or type(error).__name__)
            return None
        with contextlib.suppress(OSError):
            await ConnackPacket.build(0, answer).to_stream(outgoing)
        return None

    async def retain_message(self, *_: Any, **__: Any) -> None:
        """amqtt would show them to everybody who subscribes."""


async def _first_packet(reader: ReaderAdapter) -> ConnectPacket:
    """Raises MQTTError and what amqtt raises for bytes that are no packet."""
    header = await MQTTFixedHeader.from_stream(reader)
    if header is None or header.packet_type != CONNECT or header.remaining_length > MAX_CONNECT:
        raise MQTTError(f"the first packet: expected CONNECT of at most {MAX_CONNECT} bytes")
    body = BufferReader(await reader.read(header.remaining_length))
    connect: ConnectPacket = await ConnectPacket.from_stream(body, fixed_header=header)
    if connect.proto_name != "MQTT" or connect.proto_level != MQTT_3_1_1:
        raise MQTTError(f"protocol {connect.proto_name!r:.20}, level {connect.proto_level}")
    return connect


class Embedded:
    """amqtt in this process."""

    def __init__(self, door: Door) -> None:
        settings = door.settings
        _doors[settings.mqtt_port] = door
        listener: dict[str, Any] = {"type": "tcp", "bind": f"{settings.mqtt_host}:{settings.mqtt_port}"}
        if settings.mqtt_cert:
            listener |= {"ssl": True, "certfile": settings.mqtt_cert, "keyfile": settings.mqtt_key}
        plugins = {f"{__name__}.Admitted": {}, f"{__name__}.LedgerTopics": {"port": settings.mqtt_port}}
        self._broker = Guarded(door, {"listeners": {"default": listener}, "plugins": plugins})

    async def start(self) -> None:
        await self._broker.start()

    async def stop(self) -> None:
        await self._broker.shutdown()


def mosquitto_files(folder: Path, door: Door) -> Path:
    """Write mosquitto's settings, passwords and permissions, mode 0600; the settings' path."""
    settings, home = door.settings, folder / "broker"
    home.mkdir(mode=0o700, exist_ok=True)
    (home / "data").mkdir(mode=0o700, exist_ok=True)
    lines = [
        f"listener {settings.mqtt_port} {settings.mqtt_host}",
        f"user {pwd.getpwuid(os.getuid()).pw_name}",
        f"max_packet_size {door.max_packet}",
        "retain_available false",
        "max_queued_messages 10000",
        "persistence true",
        f"persistence_location {home / 'data'}/",
        "autosave_interval 1",
        "autosave_on_changes true",
        "log_dest stderr",
    ]
    if door.server.pinned.is_open:
        lines.append("allow_anonymous true")
    else:
        lines += [
            "allow_anonymous false",
            "use_username_as_clientid true",
            f"password_file {home / 'passwords'}",
            f"acl_file {home / 'acl'}",
        ]
        write_secret(home / "acl", _acl_file(door))
        write_passwords(folder, door)
    if settings.mqtt_cert:
        lines += [f"certfile {settings.mqtt_cert}", f"keyfile {settings.mqtt_key}"]
    write_secret(home / "mosquitto.conf", "\n".join(lines) + "\n")
    return home / "mosquitto.conf"


def _acl_file(door: Door) -> str:
    prefix = rounds.prefix_of(door.server.pinned.tenant, door.server.pinned.channel)
    patterns = [f"pattern {how} {one}" for how, one in rounds.acl(prefix, is_open=False)]
    return "\n".join([f"user {door.settings.mqtt_user}", "topic readwrite #", "", *patterns, ""])


def write_passwords(folder: Path, door: Door) -> bool:
    """mosquitto's password file, with every registered device; whether it changed."""
    path, note = folder / "broker" / "passwords", folder / "broker" / "server-hash"
    if not note.exists():
        write_secret(note, mosquitto_hash(door.password))
    rows = door.server.ledger.devices()
    # A name with a colon, which nobody can register, would end its line's first field too early.
    known = {row.proplet_id: row.mqtt_hash for row in rows if row.mqtt_hash and edge_server.is_device(row.proplet_id)}
    known[door.settings.mqtt_user] = note.read_text()
    text = "".join(f"{name}:{digest}\n" for name, digest in sorted(known.items()))
    if path.exists() and path.read_text() == text:
        return False
    write_secret(path, text)
    return True


class Mosquitto:
    """mosquitto as a child, told of devices that are registered while it runs."""

    def __init__(self, folder: Path, door: Door) -> None:
        self._folder, self._door = folder, door
        self._program = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
        if self._program is None:
            raise ValueError("HEALCHAIN_EDGE_BROKER = mosquitto: it is not installed (apt-get install -y mosquitto)")
        self._child: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()

    def start(self) -> None:
        settings = mosquitto_files(self._folder, self._door)
        self._child = subprocess.Popen([str(self._program), "-c", str(settings)])

    def run(self) -> int:
        """Until it ends, or `stop`; its exit code."""
        assert self._child is not None
        while self._child.poll() is None and not self._ended.is_set():
            self._ended.wait(REFRESH_S)
            # A registry that restarts is waited for by the next look.
            with contextlib.suppress(ConnectionError):
                if not self._door.server.pinned.is_open and write_passwords(self._folder, self._door):
                    self._child.send_signal(signal.SIGHUP)
        self._child.terminate()
        return self._child.wait()

    def stop(self) -> None:
        self._ended.set()


def door_of(folder: Path, settings: EdgeSettings) -> Door:
    """Raises NotConnected for a folder that was not set up."""
    residents["edge"] = edge_server.home_of(folder)
    return Door(server_of("edge"), settings, edge_server.server_password(folder, settings))


async def _serve(door: Door) -> None:
    broker, ended = Embedded(door), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await broker.start()
    await ended.wait()
    await broker.stop()


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m infra.edge_broker")
    flags.add_argument("--folder", type=Path, required=True)
    folder = flags.parse_args().folder.resolve()
    settings = edge_server.read_settings(os.environ)
    door = door_of(folder, settings)
    if settings.broker == "mosquitto":
        child = Mosquitto(folder, door)
        signal.signal(signal.SIGTERM, lambda *_: child.stop())
        child.start()
        raise SystemExit(child.run())
    asyncio.run(_serve(door))


if __name__ == "__main__":
    # Under its own name: amqtt imports the plugins from it.
    from infra.edge_broker import main as run

    run()
