"""The settings of a server of edge devices: from the environment, checked before anything starts.

Its folder: home/ (its keys, and what it works with), admin-key and broker/server-password (mode 0600), registry.sqlite and
store/ unless named elsewhere.

Errors: ValueError naming the setting.
"""

import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from blocks.artifacts import ArtifactStore
from blocks.connections import EdgeConnections
from blocks.edge_ledger import EdgeLedger
from blocks.identity import Identity, create_home, write_secret
from blocks.registry import Registry
from blocks.tables import EdgeModelRow
from tasks.edge import wire
from tasks.edge.names import DEVICE, DEVICE_RULE, NAME, NAME_RULE
from tasks.edge.server import utc_now

PREFIX = "HEALCHAIN_EDGE_"
FIRST_MODEL = {"b": 0.0, "w": [0.0, 0.0, 0.0]}


class EdgeSettings(BaseModel):
    """Each is read from HEALCHAIN_EDGE_ and its name in capitals."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    open: bool = Field(default=False, description="1: devices without keys, and bare topics; for a trusted network")
    tenant: str = Field(default="healchain", description="of the topics' prefix m/TENANT/c/CHANNEL/")
    channel: str = Field(default="edge", description="of the topics' prefix")
    beat_s: float = Field(
        default=10, ge=1, le=3600, description="how often a device beats; it is alive for three times that"
    )
    public_url: str = Field(default="", description="http(s)://HOST:PORT of the gateway, as existing devices reach it")
    body_bytes: int = Field(default=wire.MAX_BYTES, ge=1024, le=2**30, description="largest body")
    aggregator_url: str = Field(
        default="", description="http(s)://HOST:PORT of another aggregator; else a process here"
    )
    aggregator_key: SecretStr = Field(default=SecretStr(""), description="that the other aggregator asks for, if any")
    aggregation_timeout_s: float = Field(default=30, gt=0, le=86400, description="longest wait for a combination")
    max_samples: int = Field(default=wire.MAX_SAMPLES, ge=1, le=wire.MAX_SAMPLES, description="of one update")
    registry_url: SecretStr = Field(default=SecretStr(""), description="SQLAlchemy URL; else FOLDER/registry.sqlite")
    store_url: str = Field(default="", description="directory, or http(s)://HOST:PORT/BUCKET; else FOLDER/store")
    store_access_key: str = Field(default="", description="of the S3 server")
    store_secret_key: SecretStr = Field(default=SecretStr(""), description="of the S3 server")
    broker: str = Field(default="amqtt", pattern="^(amqtt|mosquitto|none)$", description="amqtt, mosquitto, or none")
    mqtt_host: str = Field(default="127.0.0.1", description="where the broker listens, or of a broker of your own")
    mqtt_port: int = Field(default=1883, ge=1, le=65535)
    mqtt_user: str = Field(default="edge-server", description="of the bridge")
    mqtt_password: SecretStr = Field(default=SecretStr(""), description="of the bridge, at a broker of your own")
    mqtt_ca: str = Field(default="", description="file with the CA of the broker: the bridge then speaks TLS")
    mqtt_cert: str = Field(default="", description="file with the broker's certificate: it then speaks TLS")
    mqtt_key: str = Field(default="", description="file with its key")
    manager_port: int = Field(default=7070, ge=1, le=65535, description="with --ports")
    coordinator_port: int = Field(default=8080, ge=1, le=65535, description="with --ports")
    registry_port: int = Field(default=8081, ge=1, le=65535, description="with --ports")
    aggregator_port: int = Field(default=8082, ge=1, le=65535, description="with --ports")
    datastore_port: int = Field(default=8083, ge=1, le=65535, description="with --ports")

    @field_validator("tenant", "channel")
    @classmethod
    def _is_name(cls, value: str) -> str:
        if not is_name(value):
            raise ValueError(f"expected {NAME_RULE}")
        return value

    @field_validator("mqtt_user")
    @classmethod
    def _is_user(cls, value: str) -> str:
        if not is_device(value):
            raise ValueError(f"expected {DEVICE_RULE}")
        return value

    @field_validator("public_url", "aggregator_url")
    @classmethod
    def _is_url(cls, value: str) -> str:
        if value and not re.fullmatch(r"https?://[^\s/@]+(/[^\s]*)?", value):
            raise ValueError("expected http(s)://HOST:PORT")
        return value.rstrip("/")

    @field_validator("mqtt_ca", "mqtt_cert", "mqtt_key")
    @classmethod
    def _is_file(cls, value: str) -> str:
        if value and not Path(value).is_file():
            raise ValueError("no such file")
        return value

    @model_validator(mode="after")
    def _belongs_together(self) -> "EdgeSettings":
        if bool(self.mqtt_cert) != bool(self.mqtt_key):
            raise ValueError("mqtt_cert and mqtt_key: give both or none")
        if self.mqtt_cert and not self.mqtt_ca:
            raise ValueError("mqtt_ca: the bridge needs it to know the broker of mqtt_cert")
        return self

    @property
    def ports(self) -> dict[str, int]:
        names = ("manager", "coordinator", "registry", "aggregator", "datastore")
        return {name: getattr(self, f"{name}_port") for name in names}


def read_settings(environment: Mapping[str, str]) -> EdgeSettings:
    """Raises ValueError naming what is wrong; unknown HEALCHAIN_EDGE_ names are wrong too, they would be without effect."""
    given = {name.removeprefix(PREFIX).lower(): value for name, value in environment.items() if name.startswith(PREFIX)}
    try:
        return EdgeSettings.model_validate({name: value for name, value in given.items() if value != ""})
    except ValidationError as error:
        said = [f"{PREFIX}{'.'.join(map(str, one['loc'])).upper()}: {one['msg']}" for one in error.errors()]
        raise ValueError("; ".join(said)) from None


def in_environment(settings: EdgeSettings) -> dict[str, str]:
    """The same for the processes of the server."""
    found: dict[str, str] = {}
    for name in EdgeSettings.model_fields:
        value: Any = getattr(settings, name)
        if value != EdgeSettings.model_fields[name].default:
            plain = value.get_secret_value() if isinstance(value, SecretStr) else value
            found[PREFIX + name.upper()] = str(int(plain) if isinstance(plain, bool) else plain)
    return found


def set_up(folder: Path, settings: EdgeSettings) -> EdgeConnections:
    """The home, the keys, version 0 and what the home works with. Doing it again takes the settings of that time."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    me = create_home(folder / "home")
    for path in (folder / "admin-key", folder / "broker" / "server-password"):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not path.exists():
            write_secret(path, secrets.token_urlsafe(32))
    url = settings.registry_url.get_secret_value() or f"sqlite:///{folder / 'registry.sqlite'}"
    connections = EdgeConnections(
        name="edge",
        store=_store(folder, settings),
        registry=Registry(url=SecretStr(url)),
        tenant=settings.tenant,
        channel=settings.channel,
        is_open=settings.open,
        beat_s=settings.beat_s,
        aggregator_url=settings.aggregator_url,
        aggregator_key=settings.aggregator_key,
        aggregation_timeout_s=settings.aggregation_timeout_s,
        max_samples=settings.max_samples,
        public_url=settings.public_url,
    )
    connections.pin(me)
    found_first_model(EdgeLedger(connections.registry, connections.store, me.address))
    return connections


def found_first_model(ledger: EdgeLedger) -> None:
    """Version 0, zeros as existing registries begin with, where there is no version at all."""
    if not ledger.versions():
        row = EdgeModelRow(version=-1, sha256="", form="json", created_at=utc_now())
        ledger.put_model(row, wire.encode_model(wire.read_tensors(FIRST_MODEL, "model")), version=0)


def _store(folder: Path, settings: EdgeSettings) -> ArtifactStore:
    root = settings.store_url or str(folder / "store")
    if not settings.store_access_key:
        return ArtifactStore(root=root)
    return ArtifactStore(root=root, access_key=settings.store_access_key, secret_key=settings.store_secret_key)


def admin_key(folder: Path) -> str:
    return _kept(folder / "admin-key")


def server_password(folder: Path, settings: EdgeSettings) -> str:
    """Of the bridge at the broker."""
    return settings.mqtt_password.get_secret_value() or _kept(folder / "broker" / "server-password")


def _kept(path: Path) -> str:
    if not path.exists():
        raise ValueError(f"{path} is missing: run healchain edge up with this folder first")
    return path.read_text().strip()


def home_of(folder: Path) -> Identity:
    return Identity(home=str(folder / "home"))


def is_name(value: str) -> bool:
    return bool(re.fullmatch(NAME, value))


def is_device(value: str) -> bool:
    """Whether a device of this name can be registered."""
    return bool(re.fullmatch(DEVICE, value))
