"""A device's settings: flags first, then HEALCHAIN_DEVICE_<NAME> of the environment, then the default.

What is secret is no flag, because others on the host can read a command line: HEALCHAIN_DEVICE_KEY and
HEALCHAIN_DEVICE_MQTT_PASSWORD, or the files that HEALCHAIN_DEVICE_KEY_FILE and HEALCHAIN_DEVICE_MQTT_PASSWORD_FILE name.

Error: InvalidSettings, which names the setting, its value and what would be right.
"""

import argparse
import math
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from blocks.wasm_runner import MIB, Limits
from tasks.edge.names import DEVICE, DEVICE_RULE, NAME, NAME_RULE

PREFIX = "HEALCHAIN_DEVICE_"
MQTT_PORTS = {"mqtt": 1883, "mqtts": 8883}


class InvalidSettings(ValueError):
    """A setting is missing or wrong."""


class Broker(NamedTuple):
    """Where MQTT is."""

    host: str
    port: int
    is_encrypted: bool


@dataclass(frozen=True)
class Settings:
    """As described by `OPTIONS`; addresses without a slash at their end."""

    server: str
    registry: str
    data_store: str
    broker: Broker | None
    prefix: str
    home: Path
    proplet_id: str
    namespace: str
    data: Path | None
    is_cbor: bool
    is_bare: bool
    is_open: bool
    qos: int
    beat_s: float
    poll_s: float
    timeout_s: float
    ca: Path | None
    limits: Limits
    key: str
    mqtt_password: str

    @property
    def tls(self) -> ssl.SSLContext | None:
        """With the given authority; None: whoever needs TLS takes the host's own."""
        return None if self.ca is None else ssl.create_default_context(cafile=str(self.ca))


class Option(NamedTuple):
    """A setting as it is written. read: text to value, or ValueError saying what is expected."""

    name: str
    default: str
    read: Callable[[str], Any]
    help: str


def _address(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise ValueError("expected http://HOST:PORT or https://HOST:PORT, and nothing secret in it")
    _ = parts.port  # a ValueError where it is none
    return text.rstrip("/")


def _broker(text: str) -> Broker | None:
    if not text:
        return None
    parts = urlsplit(text)
    if parts.scheme not in MQTT_PORTS or not parts.hostname or parts.username or parts.path.strip("/"):
        raise ValueError("expected mqtt://HOST:PORT, or mqtts://HOST:PORT for TLS, and nothing secret in it")
    return Broker(parts.hostname, parts.port or MQTT_PORTS[parts.scheme], parts.scheme == "mqtts")


def _device(text: str) -> str:
    if text and not re.fullmatch(DEVICE, text):
        raise ValueError(f"expected {DEVICE_RULE}")
    return text


def _name(text: str) -> str:
    if text and not re.fullmatch(NAME, text):
        raise ValueError(f"expected {NAME_RULE}")
    return text


def _level(text: str) -> str:
    if not text or any(letter in text for letter in "/+#\0"):
        raise ValueError("expected a part of a topic, without / + and #")
    return text


def _file(text: str) -> Path | None:
    if text and not Path(text).is_file():
        raise ValueError("there is no such file")
    return Path(text).resolve() if text else None


def _authority(text: str) -> Path | None:
    path = _file(text)
    if path is not None:
        try:
            ssl.create_default_context(cafile=str(path))
        except ssl.SSLError as error:
            raise ValueError(f"it holds no certificates: {error.reason}") from None
    return path


def _between(low: float, high: float, kind: type[int] | type[float] = float) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise ValueError(f"expected {'an integer' if kind is int else 'a number'} from {low:g} to {high:g}")
        return value

    return read


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("expected 0 or 1")
    return text == "1"


OPTIONS = (
    Option("server", "", _address, "http(s)://HOST:PORT of the coordinator; needed"),
    Option("registry", "", lambda text: _address(text) if text else "", "of the model registry; default: the server"),
    Option("data-store", "", lambda text: _address(text) if text else "", "of the data store; default: the server"),
    Option("mqtt", "", _broker, "mqtt(s)://HOST:PORT of the broker; without one the server is asked for rounds"),
    Option("tenant", "healchain", _level, "of the topics m/TENANT/c/CHANNEL/..."),
    Option("channel", "edge", _level, "of the topics m/TENANT/c/CHANNEL/..."),
    Option("home", "~/healchain-device", lambda text: Path(text).expanduser().resolve(), "the device's folder"),
    Option("id", "", _device, "the device's id, and its user name at the broker; default: as in device.json, or drawn"),
    Option("namespace", "default", _name, "told to the manager"),
    Option("data", "", _file, "the device's samples, dataset JSON; default: they are fetched from the data store"),
    Option("cbor", "0", _switch, "send updates in CBOR, tensors as typed arrays"),
    Option("bare-topics", "0", _switch, "updates over MQTT go to fl/rounds/... without the prefix"),
    Option("open", "0", _switch, "take what the server says over MQTT without a seal, as existing servers say it"),
    Option("qos", "1", _between(0, 2, int), "of what is published"),
    Option("beat-s", "10", _between(0.1, 3600), "seconds between signs of life"),
    Option("poll-s", "5", _between(0.1, 3600), "seconds between questions for rounds, where there is no MQTT"),
    Option("timeout-s", "30", _between(0.1, 3600), "seconds that an answer over HTTP may take"),
    Option("ca", "", _authority, "certificate of the authority that signed the servers' own"),
    Option("fuel", "200000000000", _between(1, 10**18, int), "of one training, about a unit an instruction"),
    Option("memory-mib", "256", _between(1, 4096, int), "of the module's memory"),
    Option("wall-clock-s", "600", _between(0.1, 86_400), "seconds that one training may take"),
    Option("compile-s", "120", _between(0.1, 86_400), "seconds that compiling a module may take, once"),
    Option("compile-memory-mib", "1024", _between(64, 65_536, int), "of the process that compiles"),
)


EPILOG = """\
Each option may stand in the environment: HEALCHAIN_DEVICE_SERVER for --server, HEALCHAIN_DEVICE_BEAT_S for --beat-s.

The key that `healchain edge register ID` printed is no option, because others on this host can read a command line:
  HEALCHAIN_DEVICE_KEY_FILE=FILE   a file that nobody else can read (chmod 600), or HEALCHAIN_DEVICE_KEY
  HEALCHAIN_DEVICE_MQTT_PASSWORD_FILE, HEALCHAIN_DEVICE_MQTT_PASSWORD   where the broker has another password
It is kept in the home from then on.

The log is on stderr; HOME/status.json says how the device is. Exit code 2: a setting is wrong; 1: its disk failed."""


def read_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Raises InvalidSettings; SystemExit for --help and for a flag that there is not."""
    parser = argparse.ArgumentParser(
        "healchain edge device",
        usage="healchain-device --server URL [--mqtt URL] [--id ID] [--data FILE] [other options]",
        description="Train WebAssembly modules on this device's data, in rounds, until it is stopped.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for option in OPTIONS:
        said = f"{option.help}; default: {option.default}" if option.default else option.help
        # A switch may stand alone.
        more: dict[str, Any] = {"nargs": "?", "const": "1"} if option.read is _switch else {}
        parser.add_argument(f"--{option.name}", metavar=option.name.upper(), help=said, **more)
    given = vars(parser.parse_args(arguments))
    read = {option.name: _read(option, given[option.name.replace("-", "_")], environment) for option in OPTIONS}
    return Settings(
        server=read["server"],
        registry=read["registry"] or read["server"],
        data_store=read["data-store"] or read["server"],
        broker=read["mqtt"],
        prefix=f"m/{read['tenant']}/c/{read['channel']}/",
        home=read["home"],
        proplet_id=read["id"],
        namespace=read["namespace"],
        data=read["data"],
        is_cbor=read["cbor"],
        is_bare=read["bare-topics"],
        is_open=read["open"],
        qos=read["qos"],
        beat_s=read["beat-s"],
        poll_s=read["poll-s"],
        timeout_s=read["timeout-s"],
        ca=read["ca"],
        limits=Limits(
            read["fuel"],
            read["memory-mib"] * MIB,
            read["wall-clock-s"],
            compile_s=read["compile-s"],
            compile_memory_bytes=read["compile-memory-mib"] * MIB,
        ),
        key=_secret("KEY", environment),
        mqtt_password=_secret("MQTT_PASSWORD", environment),
    )


def _read(option: Option, flag: str | None, environment: Mapping[str, str]) -> Any:
    variable = PREFIX + option.name.upper().replace("-", "_")
    name, text = (f"--{option.name}", flag) if flag is not None else (variable, environment.get(variable))
    try:
        return option.read(option.default if text is None else text)
    except ValueError as error:
        if text is None:
            raise InvalidSettings(f"--{option.name} (or {variable}) is missing: {option.help}") from None
        raise InvalidSettings(f"{name} = {text}: {error}") from None


def _secret(name: str, environment: Mapping[str, str]) -> str:
    variable, file = PREFIX + name, environment.get(f"{PREFIX}{name}_FILE", "")
    if variable in environment or not file:
        secret = environment.get(variable, "")
    else:
        path = Path(file).expanduser()
        if not path.is_file():
            raise InvalidSettings(f"{variable}_FILE = {file}: there is no such file")
        if path.stat().st_mode & 0o077:
            raise InvalidSettings(f"{variable}_FILE = {file}: others can read it: chmod 600 {file}")
        secret = path.read_text().strip()
    if not secret.isascii() or not secret.isprintable():
        raise InvalidSettings(f"{variable}: expected one line of printable ASCII characters")
    return secret
