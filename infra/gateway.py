"""The gateway: where a new host becomes a member of a consortium.

A member gets an account at the store that is limited to its address, a queue in each pool of miners, and the credentials of
Prefect's API. The gateway is the only service that holds the administrator's keys of the store, so it answers two questions
and nothing else (`infra.membership`). Its folder, mode 0700:

    keystore/, passphrase         its own key, which is named in every invitation
    gateway.env                   its settings (`SETTINGS`), mode 0600; the environment comes first
    chain.json                    the chain that it offers
    invitations/<digest>.json     of an invitation: SHA-256 of its secret, name, end, and by whom it was used
    members/<name>.json           a member's address and encryption key

Errors: Refused, to those who ask; ValueError naming the setting, to the operator.
"""

import fcntl
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Annotated

import anyio
import httpx
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from minio.error import MinioException
from pydantic import SecretStr, TypeAdapter, ValidationError
from urllib3.exceptions import HTTPError

from blocks.artifacts import ArtifactStore
from blocks.chain import Chain
from blocks.identity import Identity, create_home, write_secret
from blocks.object_store import parse_url
from contracts import bindings
from contracts.messages import Address, Frozen, Membership, key_address, signer_of
from deployments.register import register_pools, register_queue, remove_queue
from infra import object_store
from infra.membership import (
    APPLICATION,
    POOLS,
    SECRET_BYTES,
    Application,
    Invitation,
    Offer,
    Welcome,
    chain_settings,
    seal,
    versions_here,
    welcome_context,
)
from tasks.crypto import ecies

PUBLISHERS = "HEALCHAIN_PUBLISHERS"
SETTINGS = {
    "PREFECT_API_URL": "Prefect's API, as the gateway reaches it",
    "PREFECT_API_AUTH_STRING": "USER:PASSWORD of that API; empty when it asks for none",
    "HEALCHAIN_STORE_URL": "http(s)://HOST:PORT/BUCKET of the store, as the gateway reaches it",
    "HEALCHAIN_STORE_ACCESS_KEY": "of the store's administrator",
    "HEALCHAIN_STORE_SECRET_KEY": "of the store's administrator",
    PUBLISHERS: "addresses in whose tasks members take part, a comma between them",
    "HEALCHAIN_MEMBERS_API_URL": "Prefect's API as members reach it; default: PREFECT_API_URL",
    "HEALCHAIN_MEMBERS_STORE_URL": "the store as members reach it; default: HEALCHAIN_STORE_URL",
}
OPTIONAL = ("PREFECT_API_AUTH_STRING", "HEALCHAIN_MEMBERS_API_URL", "HEALCHAIN_MEMBERS_STORE_URL")
RESERVED = ("publisher", "default")  # the conductor's own queue, and the one that Prefect makes in every pool

LARGEST_BYTES = 4096  # an application has some 700
BODY_S = 10.0
FRESH_S = 300.0  # from the offer to the application
WRONG_MAX, WRONG_WINDOW_S = 10, 600.0  # wrong invitations of one caller
CALLERS_MAX = 10_000
CONNECTIONS_MAX = 64


class Refused(ValueError):
    """A host is not admitted; the message says why and what to do. is_wrong: it showed no valid invitation."""

    def __init__(self, status: int, message: str, *, is_wrong: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.is_wrong = is_wrong


class Issued(Frozen):
    """An invitation as the gateway keeps it. used_by and moment_ms: whom it let in, and of its last application."""

    name: str
    expires_s: float
    used_by: Address | None = None
    moment_ms: int = 0


class Member(Frozen):
    """Whom the gateway let in."""

    name: str
    address: Address
    encryption_key: str


@dataclass(frozen=True)
class Settings:
    """What the gateway rules over, and what it tells members."""

    store: ArtifactStore
    api_url: str
    api_auth: str = field(repr=False)
    store_url: str
    publishers: tuple[Address, ...]


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Raises ValueError naming what is missing."""
    missing = [name for name in SETTINGS if name not in OPTIONAL and not environment.get(name)]
    if missing:
        listed = "; ".join(f"{name}: {SETTINGS[name]}" for name in missing)
        raise ValueError(f"settings are missing, write them into the gateway's gateway.env (mode 0600): {listed}")
    for name in environment.keys() & {name for name in SETTINGS if name.endswith("_URL")}:
        _check_address(name, environment[name])
    store = ArtifactStore(
        root=environment["HEALCHAIN_STORE_URL"],
        access_key=environment["HEALCHAIN_STORE_ACCESS_KEY"],
        secret_key=SecretStr(environment["HEALCHAIN_STORE_SECRET_KEY"]),
    )
    return Settings(
        store=store,
        api_url=environment.get("HEALCHAIN_MEMBERS_API_URL") or environment["PREFECT_API_URL"],
        api_auth=environment.get("PREFECT_API_AUTH_STRING", ""),
        store_url=environment.get("HEALCHAIN_MEMBERS_STORE_URL") or store.root,
        publishers=_read_addresses(environment[PUBLISHERS]),
    )


def _read_addresses(text: str) -> tuple[Address, ...]:
    try:
        return TypeAdapter(tuple[Address, ...]).validate_python([one.strip() for one in text.split(",")])
    except ValidationError:
        raise ValueError(
            f"{PUBLISHERS} = {text}: expected addresses, 0x and 40 hex digits, a comma between them"
        ) from None


def _check_address(name: str, value: str) -> None:
    """Raises ValueError; the value is not repeated, somebody may have put a password into it."""
    if not value:
        return
    if "STORE" in name:
        try:
            parse_url(value)
        except ValueError:
            raise ValueError(f"{name}: expected http(s)://HOST:PORT/BUCKET, nothing more") from None
    elif not re.fullmatch(r"https?://[^\s@]+/api/?", value):
        raise ValueError(f"{name}: expected http(s)://HOST:PORT/api")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time changes who is invited and who is a member."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _keep(path: Path, record: Frozen) -> None:
    path.parent.mkdir(exist_ok=True, mode=0o700)
    write_secret(path, record.model_dump_json())


def invite(folder: Path, name: str, valid_hours: float) -> Invitation:
    """A new invitation, of which the gateway keeps a hash. Raises ValueError for a name that cannot be one."""
    if name in RESERVED:
        raise ValueError(f"name {name!r} is taken by the server itself: choose another")
    if valid_hours <= 0:
        raise ValueError(f"--valid-hours {valid_hours:g}: expected a positive number")
    with _alone(folder):
        me = create_home(folder)
        invitation = Invitation(secrets.token_bytes(SECRET_BYTES), bytes.fromhex(me.encryption_key[2:]), name)
        if Invitation.read(str(invitation)) != invitation:
            raise ValueError(f"name {name!r}: expected 1 to 32 of a-z, 0-9 and -, a letter or digit first")
        issued = Issued(name=name, expires_s=time.time() + 3600 * valid_hours)
        _keep(folder / "invitations" / f"{invitation.digest}.json", issued)
    return invitation


def members(folder: Path) -> list[Member]:
    """Everybody who was let in, by name."""
    found = sorted((folder / "members").glob("[!.]*.json"))
    return [Member.model_validate_json(path.read_text()) for path in found]


def expel(folder: Path, settings: Settings, name: str) -> Member:
    """Void a member's account and its invitations, remove its queues. Cut off, it can be done again.

    Raises ValueError when nobody has this name.
    """
    with _alone(folder):
        found = next((one for one in members(folder) if one.name == name), None)
        if found is None:
            raise ValueError(
                f"no member {name!r}: there are {', '.join(one.name for one in members(folder)) or 'none'}"
            )
        for path in (folder / "invitations").glob("[!.]*.json"):
            if Issued.model_validate_json(path.read_text()).name == name:
                path.unlink()
        with _services():
            object_store.expel(settings.store, found.address)
            remove_queue(name, POOLS)
        (folder / "members" / f"{name}.json").unlink()
    return found


def pinned_chain(folder: Path) -> Chain | None:
    """The chain that this gateway offers, if it was told one."""
    path = folder / "chain.json"
    return Chain.model_validate_json(path.read_text()) if path.exists() else None


def pin_chain(folder: Path, chain: Chain) -> None:
    """Offer this chain from here on. Raises ValueError for one that hosts cannot share, or whose contracts are others."""
    if chain.rpc.startswith("local:"):
        raise ValueError(f"rpc {chain.rpc}: a chain inside one process cannot be shared: deploy on a node")
    bindings.check_deployment(chain.web3, chain.deployment)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_secret(folder / "chain.json", json.dumps(chain_settings(chain), indent=1))


@dataclass(frozen=True)
class Gateway:
    """The folder, the settings and the chain, for as long as the service runs."""

    folder: Path
    settings: Settings
    chain: Chain

    @property
    def me(self) -> Identity:
        return Identity(home=str(self.folder))

    def offer(self) -> Offer:
        return Offer(
            chain=chain_settings(self.chain),
            publishers=self.settings.publishers,
            versions=versions_here(),
            time_ms=_now_ms(),
        )

    def admit(self, sealed: bytes) -> bytes:
        """The sealed welcome to the application in `sealed`. The same host may ask again, later. Raises Refused."""
        application = self._opened(sealed)
        membership, secret = application.membership, bytes.fromhex(application.secret[2:])
        with _alone(self.folder):
            self._use_up(secret, application)
            access_key, secret_key = self._furnish(membership)
            _keep(self.folder / "members" / f"{membership.name}.json", _member(membership))
        welcome = Welcome(
            api_url=self.settings.api_url,
            api_auth=self.settings.api_auth,
            store_url=self.settings.store_url,
            access_key=access_key,
            secret_key=secret_key,
            chain=chain_settings(self.chain),
            publishers=self.settings.publishers,
        )
        key = bytes.fromhex(membership.encryption_key[2:])
        return seal(welcome, key, welcome_context(secret, membership))

    def _opened(self, sealed: bytes) -> Application:
        try:
            return Application.model_validate_json(self.me.open_sealed(sealed, APPLICATION))
        except ecies.Unopenable:
            raise Refused(
                400, "the application is not sealed to this gateway: use an invitation of this one", is_wrong=True
            ) from None
        except ValidationError as error:
            fields = sorted({".".join(map(str, problem["loc"])) for problem in error.errors()})
            raise Refused(
                422, f"{', '.join(fields)}: malformed; do both run the same version?", is_wrong=True
            ) from None

    def _use_up(self, secret: bytes, application: Application) -> None:
        """Note whom the invitation lets in, once all about the application was found right."""
        membership = application.membership
        path = self.folder / "invitations" / f"{Invitation(secret, b'', '').digest}.json"
        issued = _valid(path, membership)
        _check_signature(application, self.chain)
        if abs(_now_ms() - membership.moment_ms) > 1000 * FRESH_S or membership.moment_ms <= issued.moment_ms:
            raise Refused(409, "this application is old, or a copy of an earlier one: run healchain join again")
        self._check_free(membership)
        _keep(path, issued.model_copy(update={"used_by": membership.address, "moment_ms": membership.moment_ms}))

    def _check_free(self, membership: Membership) -> None:
        for other in members(self.folder):
            if (other.name == membership.name) != (other.address == membership.address):
                raise Refused(
                    409,
                    f"{other.address} is a member named {other.name}: a name has one address and an address one name. "
                    "Ask for an invitation to another name, or give --home another folder",
                )

    def _furnish(self, membership: Membership) -> tuple[str, str]:
        """The member's queues, and its account at the store with a fresh secret key."""
        with _services():
            register_pools()
            try:
                register_queue(membership.name, membership.address, POOLS)
            except ValueError as error:
                raise Refused(409, str(error)) from error
            return object_store.admit(self.settings.store, membership.address)


@contextmanager
def _services() -> Iterator[None]:
    """Raises Refused when Prefect's API or the store cannot be used."""
    try:
        yield
    except (httpx.HTTPError, RuntimeError) as error:
        raise Refused(503, _away("Prefect's API", error)) from error
    except (MinioException, HTTPError) as error:
        raise Refused(503, _away("the store", error)) from error


def _away(what: str, error: Exception) -> str:
    """To a stranger: no address, no text of the server's own."""
    return f"the gateway cannot use {what} ({type(error).__name__}): once its operator has mended it, do the same again"


def _valid(path: Path, membership: Membership) -> Issued:
    """The invitation, if it lets this host in."""
    try:
        issued = Issued.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise Refused(403, "the invitation is unknown here, or was withdrawn: ask for another", is_wrong=True) from None
    if time.time() > issued.expires_s:
        expired = time.strftime("%F %T", time.gmtime(issued.expires_s))
        raise Refused(403, f"the invitation expired at {expired} UTC: ask for another", is_wrong=True)
    if issued.name != membership.name:
        raise Refused(403, f"the invitation is for the name {issued.name!r}", is_wrong=True)
    if issued.used_by not in (None, membership.address):
        raise Refused(403, "the invitation was used by another address: ask for another", is_wrong=True)
    return issued


def _check_signature(application: Application, chain: Chain) -> None:
    try:
        key_address(application.membership.encryption_key)
        signer = signer_of(application.membership, chain.domain, application.signature)
    except ValueError as error:
        raise Refused(403, str(error), is_wrong=True) from None
    if signer != application.membership.address:
        raise Refused(
            403, "the signature is not of this address, for this chain and these contracts: run healchain join again"
        )


def _member(membership: Membership) -> Member:
    return Member(name=membership.name, address=membership.address, encryption_key=membership.encryption_key)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass
class WrongCodes:
    """When each caller showed an invitation that is none."""

    _moments: dict[str, list[float]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def note(self, caller: str) -> None:
        with self._lock:
            self._moments.setdefault(caller, []).append(time.monotonic())
            while len(self._moments) > CALLERS_MAX:  # whoever came first is forgotten first
                del self._moments[next(iter(self._moments))]

    def are_too_many(self, caller: str) -> bool:
        with self._lock:
            since = time.monotonic() - WRONG_WINDOW_S
            recent = [moment for moment in self._moments.pop(caller, []) if moment > since]
            if recent:
                self._moments[caller] = recent
            return len(recent) >= WRONG_MAX


async def _read_body(request: Request) -> bytes:
    """At most LARGEST_BYTES, within BODY_S."""
    received = bytearray()
    with anyio.move_on_after(BODY_S) as patience:
        async for piece in request.stream():
            received += piece
            if len(received) > LARGEST_BYTES:
                raise HTTPException(413, f"an application has at most {LARGEST_BYTES} bytes")
    if patience.cancelled_caught:
        raise HTTPException(408, f"the application did not come within {BODY_S:g} s")
    return bytes(received)


SealedBody = Annotated[bytes, Depends(_read_body)]


def service(gateway: Gateway) -> FastAPI:
    """The service. It has no pages of documentation, and answers errors with one sentence."""
    app = FastAPI(openapi_url=None)
    wrong = WrongCodes()

    @app.exception_handler(Refused)
    def refuse(request: Request, refused: Refused) -> JSONResponse:
        if refused.is_wrong:
            wrong.note(_caller(request))
        return JSONResponse({"detail": str(refused)}, refused.status)

    @app.get("/offer")
    def read_offer() -> Offer:
        return gateway.offer()

    @app.post("/members")
    def admit(request: Request, sealed: SealedBody) -> Response:
        if wrong.are_too_many(_caller(request)):
            raise HTTPException(429, f"too many wrong invitations: try again in {WRONG_WINDOW_S / 60:.0f} minutes")
        return Response(gateway.admit(sealed), media_type="application/octet-stream")

    return app


def _caller(request: Request) -> str:
    return request.client.host if request.client else ""


def serve(folder: Path, host: str, port: int) -> None:
    """Serve until told to stop. Raises ValueError for settings that are missing, or a chain that is not as it should be."""
    chain = pinned_chain(folder)
    if chain is None:
        raise ValueError(f"{folder / 'chain.json'} is missing: name the chain to offer")
    create_home(folder)
    gateway = Gateway(folder, read_settings(os.environ), chain)
    config = uvicorn.Config(
        service(gateway),
        access_log=False,  # errors alone are logged
        log_level="warning",
        limit_concurrency=CONNECTIONS_MAX,
        timeout_keep_alive=5,
        server_header=False,
    )
    with listening_socket(host, port) as listening:
        uvicorn.Server(config).run(sockets=[listening])


def listening_socket(host: str, port: int) -> socket.socket:
    """Raises ValueError when nobody can listen there."""
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror}; choose another") from error
