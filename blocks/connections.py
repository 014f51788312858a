"""What an actor's host believes in: its name, its chain with the contracts, its store, its publishers. Pinned in its home.

``HOME/connections.json`` (mode 0600: it may hold a store's key, a database's password and a node's address with a key in it)
is written once, when a home is set up, and read by every step. Nothing of it comes from the scheduler: whoever rules over
Prefect's database cannot send a host to another chain, other contracts or another store, nor have it stake in a stranger's
task: anybody can lock a reward in the contracts and ask.

Errors: NotConnected.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from blocks.artifacts import ArtifactStore
from blocks.chain import Chain
from blocks.identity import Identity, write_secret
from blocks.registry import Registry
from contracts.messages import Address


class NotConnected(ValueError):
    """The home has no connections, or broken ones; the message says what to do."""


class Connections(BaseModel):
    """An actor's own view of the outside world."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: str
    """The actor's name, which is the name of its work queue."""
    chain: Chain
    store: ArtifactStore
    registry: Registry | None = None
    """The publisher's index; miners have none."""
    uses_pools: bool = False
    """Whether other actors are asked through Prefect's work pools, or take turns in this process."""
    publishers: tuple[Address, ...] = ()
    """In whose tasks this host takes part; in nobody's when there is none, as in homes from before this field."""
    most_stake_wei: int = Field(default=0, ge=0)
    """The largest stake that it puts behind one task."""
    most_deposit_wei: int = Field(default=0, ge=0)
    """The largest stake that it has in the contract, for all tasks together: nothing deposits beyond it."""

    def pin(self, me: Identity) -> None:
        """Write them into the home, in place of earlier ones."""
        fields = {
            "name": self.name,
            "chain": _settings(self.chain),
            "store": _settings(self.store),
            "registry": None if self.registry is None else _settings(self.registry),
            "uses_pools": self.uses_pools,
            "publishers": self.publishers,
            "most_stake_wei": self.most_stake_wei,
            "most_deposit_wei": self.most_deposit_wei,
        }
        write_secret(_path(me), json.dumps(fields, indent=1))


class EdgeConnections(BaseModel):
    """What the server of edge devices works with. It has no chain: nobody is paid for these rounds.

    tenant, channel: of the prefix of MQTT's topics. is_open: devices without keys are let in, and bare topics are served.
    beat_s: how often a device says that it is well; it is alive for three times that. aggregator_url, aggregator_key: who
    combines, if not a process of this host, and the key that it asks for, if any. public_url: of the gateway, as devices
    reach it; told to the modules of existing devices. max_samples: the most that an update may say it was trained on.
    stalled_s: a broker that takes no message for so long is not waited for before a round's clock starts.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    name: str
    store: ArtifactStore
    registry: Registry
    tenant: str = "healchain"
    channel: str = "edge"
    is_open: bool = False
    beat_s: float = 10.0
    aggregator_url: str = ""
    aggregator_key: SecretStr = SecretStr("")
    aggregation_timeout_s: float = 30.0
    aggregation_pause_s: float = 1.0
    max_samples: int = 10**9
    stalled_s: float = 5.0
    public_url: str = ""

    @property
    def alive_within_s(self) -> float:
        """A device that has missed three beats is not asked."""
        return 3 * self.beat_s

    def pin(self, me: Identity) -> None:
        """Write them into the home, in place of earlier ones."""
        fields = {name: _plain(getattr(self, name)) for name in type(self).model_fields}
        fields |= {"store": _settings(self.store), "registry": _settings(self.registry)}
        write_secret(_path(me), json.dumps(fields, indent=1))


def is_edge(me: Identity) -> bool:
    """Whether this is the home of a server of edge devices."""
    try:
        return "chain" not in json.loads(_path(me).read_text())
    except (FileNotFoundError, ValueError):
        return False


def edge_connections_of(me: Identity) -> EdgeConnections:
    """What the home of a server of edge devices has pinned. Raises NotConnected."""
    path = _path(me)
    try:
        return EdgeConnections.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise NotConnected(f"{path} is missing: set the server up first (healchain edge up)") from None
    except ValidationError as error:
        fields = sorted({".".join(map(str, problem["loc"])) for problem in error.errors()})
        raise NotConnected(f"{path}: {', '.join(fields)} cannot be used: run healchain edge up again") from None


def connections_of(me: Identity) -> Connections:
    """What the home has pinned. Raises NotConnected."""
    path = _path(me)
    try:
        return Connections.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise NotConnected(f"{path} is missing: set the home up first (healchain join)") from None
    except ValidationError as error:
        fields = sorted({".".join(map(str, problem["loc"])) for problem in error.errors()})
        raise NotConnected(f"{path}: {', '.join(fields)} cannot be used: run healchain join again") from None


def _path(me: Identity) -> Path:
    return Path(me.home) / "connections.json"


def _settings(block: BaseModel) -> dict[str, Any]:
    """The fields of a block, with its secrets in the clear."""
    fields = {name: getattr(block, name) for name in type(block).model_fields if not name.startswith("_")}
    return {name: _plain(value) for name, value in fields.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value
