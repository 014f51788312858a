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
