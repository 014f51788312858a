"""What a joining host and the gateway of a consortium say to each other.

    invitation    base64url(secret, 32 bytes || the gateway's public key, 33 bytes) "." name
    Offer         GET /offer, in the clear: the chain, the publishers, the versions, the gateway's clock
    Application   POST /members, sealed to the key in the invitation
    Welcome       its answer, sealed to the host's own key; the context holds the invitation's secret, so that only who was
                  shown the secret, which is the gateway, can have made it

So a listener, or a proxy with its log, learns no secret and can put nothing in place of an answer, over plain HTTP too.
Errors: ValueError (an invitation that is none), ecies.Unopenable, pydantic's ValidationError.
"""

import base64
import binascii
import hashlib
import re
import secrets
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Self

from pydantic import Field

from blocks.chain import Chain
from contracts.messages import Address, Bytes, Bytes32, Frozen, Membership, struct_hash
from tasks.crypto import ecies

POOLS = ("miners", "aggregators")
"""A member has a queue in each: whoever mines may be drawn as aggregator."""
APPLICATION = b"HealChain application"
SECRET_BYTES, KEY_BYTES = 32, 33
_INVITATION = re.compile(r"([A-Za-z0-9_-]{87})\.([a-z0-9][a-z0-9-]{0,31})")


@dataclass(frozen=True)
class Invitation:
    """A right to join once, under one name. gateway_key: whom it may be told."""

    secret: bytes
    gateway_key: bytes
    name: str

    def __str__(self) -> str:
        return f"{base64.urlsafe_b64encode(self.secret + self.gateway_key).decode().rstrip('=')}.{self.name}"

    def __repr__(self) -> str:
        return f"Invitation({self.name})"

    @property
    def digest(self) -> str:
        """SHA-256 of the secret, in hex: what the gateway keeps of it."""
        return hashlib.sha256(self.secret).hexdigest()

    @classmethod
    def read(cls, text: str) -> Self:
        """The invitation of this text. Raises ValueError, which does not repeat it."""
        found = _INVITATION.fullmatch(text.strip())
        try:
            data = base64.urlsafe_b64decode(found[1] + "=") if found else b""
        except binascii.Error:
            data = b""
        if found is None or len(data) != SECRET_BYTES + KEY_BYTES:
            raise ValueError("invitation: expected what `healchain invite` printed, 87 characters, a dot and a name")
        return cls(data[:SECRET_BYTES], data[SECRET_BYTES:], found[2])


class Versions(Frozen):
    """What must be equal on all hosts of a consortium."""

    healchain: str
    prefect: str


def versions_here() -> Versions:
    return Versions(healchain=version("healchain"), prefect=version("prefect"))


class Offer(Frozen):
    """What everybody may know. chain: the settings of `blocks.chain.Chain`; time_ms: the gateway's clock, unix.

    publishers: in whose tasks members take part.
    """

    chain: dict[str, Any]
    publishers: tuple[Address, ...] = Field(min_length=1)
    versions: Versions
    time_ms: int


class Application(Frozen):
    """A host's wish to be a member; the signature is its wallet's. Sealed to the gateway."""

    secret: Bytes32 = Field(repr=False)
    membership: Membership
    signature: Bytes


class Welcome(Frozen):
    """What a member needs and nobody else may know. Sealed to it.

    api_auth: USER:PASSWORD of Prefect's API, or empty; chain, publishers: as in the offer, which was not sealed.
    """

    api_url: str
    api_auth: str = Field(repr=False)
    store_url: str
    access_key: str
    secret_key: str = Field(repr=False)
    chain: dict[str, Any]
    publishers: tuple[Address, ...]


def welcome_context(secret: bytes, membership: Membership) -> bytes:
    """Of one invitation and one application: an earlier answer does not open in place of a later one."""
    return b"HealChain welcome" + secret + bytes.fromhex(struct_hash(membership)[2:])


def seal(message: Frozen, key: bytes, context: bytes) -> bytes:
    return ecies.seal(message.model_dump_json().encode(), key, ephemeral_seed=secrets.token_bytes(48), context=context)


def chain_settings(chain: Chain) -> dict[str, Any]:
    """A chain's fields as JSON has them."""
    fields = chain.model_dump(mode="json")
    return {name: fields[name] for name in Chain.model_fields}
