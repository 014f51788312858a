"""The MQTT broker of edge devices: amqtt in this process, or mosquitto as its child.

A device's user name is its id and its password the key that it was registered with. What it may publish and hear is
tasks.edge.rounds.acl: updates under its own id alone. With mosquitto that is a password file and an ACL file, written again
when a device is registered; amqtt asks the ledger. In open mode (for a trusted network) nobody is asked for a password.

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

from amqtt.broker import Broker
from amqtt.contexts import Action
from amqtt.plugins.base import BaseAuthPlugin, BaseTopicPlugin
from amqtt.session import Session

from blocks.edge_ledger import EdgeLedger, mosquitto_hash
from blocks.identity import residents, write_secret
from infra import edge_server
from infra.edge_server import EdgeSettings
from tasks.edge import rounds
from tasks.edge.server import Server, server_of

REFRESH_S = 1.0
MAX_PACKET = 268_435_455
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


class LedgerAuth(BaseAuthPlugin):  # type: ignore[misc]
    """amqtt's question who is let in, answered by the ledger."""

    @dataclass
    class Config:
        port: int = 0

    async def authenticate(self, *, session: Session) -> bool | None:
        return await asyncio.to_thread(_doors[self.config.port].admits, session.username, session.password)


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


class Embedded:
    """amqtt in this process."""

    def __init__(self, door: Door) -> None:
        settings = door.settings
        _doors[settings.mqtt_port] = door
        listener: dict[str, Any] = {"type": "tcp", "bind": f"{settings.mqtt_host}:{settings.mqtt_port}"}
        if settings.mqtt_cert:
            listener |= {"ssl": True, "certfile": settings.mqtt_cert, "keyfile": settings.mqtt_key}
        plugins = {f"{__name__}.{kind}": {"port": settings.mqtt_port} for kind in ("LedgerAuth", "LedgerTopics")}
        self._broker = Broker({"listeners": {"default": listener}, "plugins": plugins})

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
        f"max_packet_size {MAX_PACKET}",
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
        lines += ["allow_anonymous false", f"password_file {home / 'passwords'}", f"acl_file {home / 'acl'}"]
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
    known = {row.proplet_id: row.mqtt_hash for row in door.server.ledger.devices() if row.mqtt_hash}
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
