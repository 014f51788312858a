"""A host joins a consortium: `healchain join`.

It looks first at what needs no membership (versions, clock, chain), then applies at the gateway, then tries what it was
given (store, Prefect's API), and last pins all of it in its home. Cut off, or stopped by something that is wrong, the same
command completes it; with a fresh invitation it takes up what the consortium has changed.

Errors: CannotJoin, after everything that is wrong was told.
"""

import json
import os
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from minio import Minio
from pydantic import SecretStr, ValidationError
from requests import RequestException
from web3 import Web3
from web3.exceptions import Web3Exception

from blocks.artifacts import ArtifactStore
from blocks.chain import Chain
from blocks.connections import Connections, NotConnected, connections_of
from blocks.identity import Identity, InvalidHome, create_home
from blocks.object_store import Bucket, parse_url
from contracts import bindings
from contracts.messages import Address, Membership
from infra import doctor
from infra.chain_deployment import whereabouts
from infra.doctor import Finding
from infra.membership import (
    APPLICATION,
    POOLS,
    Application,
    Invitation,
    Offer,
    Versions,
    Welcome,
    seal,
    versions_here,
    welcome_context,
)
from infra.profiles import write_profile
from tasks.crypto import ecies

ANSWER_S = 60.0  # the gateway makes an account and two queues
STORE_PATIENCE_S = 5.0
LARGEST_ANSWER_BYTES = 64 * 1024

# What breaks is the store's check of signatures, at 15 minutes: 3 are left for a clock that drifts on. Runs are due by the
# server's clock and windows end by the chain's, so a smaller error is only told.
SKEW_TOLD_S, SKEW_MAX_S = 30.0, 720.0
# A public chain has a block every few seconds; a development chain may stand still, or be ahead.
CHAIN_BEHIND_S, CHAIN_AHEAD_S = 900.0, 30.0

MOST_STAKE_WEI = 2 * 10**17  # twice what the ready tasks ask for
TASKS_AT_ONCE = 5  # so many such stakes may be in the contract: it holds one until its task's latest end


class CannotJoin(RuntimeError):
    """Something that a member needs is not in order; what it is was told."""


@dataclass(frozen=True)
class Wish:
    """How a host wants to join. store, rpc: its own way to the store and to a node of the chain, else those it is offered.

    has_new_chain, has_new_publishers: take another chain or other contracts, or other publishers, than those that the home
    has pinned. most_stake_wei: the largest stake of one task; else what the home has pinned, else MOST_STAKE_WEI.
    """

    server: str
    invitation: Invitation
    home: Path
    store: str | None = None
    rpc: str | None = None
    has_new_chain: bool = False
    has_new_publishers: bool = False
    most_stake_wei: int | None = None


@dataclass
class Findings:
    """What was found so far. Everything of one stage is told before it ends."""

    tell: Callable[[Finding], None]
    wrong: list[str] = field(default_factory=list)

    def note(self, finding: Finding) -> None:
        self.tell(finding)
        if finding.needed and not finding.in_order:
            self.wrong.append(finding.name)

    def end_stage(self) -> None:
        """Raises CannotJoin when something needed was not in order."""
        if self.wrong:
            raise CannotJoin(f"not joined: {', '.join(self.wrong)}. Once that is mended, the same command completes it")


def join(wish: Wish, tell: Callable[[Finding], None]) -> str:
    """Make this host a member, telling one finding after the other; the command that starts its worker. Raises CannotJoin."""
    findings = Findings(tell)
    me = create_home(wish.home)
    findings.note(Finding("home", f"{wish.home}, address {me.address}", True))
    with httpx.Client(base_url=wish.server, timeout=ANSWER_S) as gateway:
        offer, chain = _look_first(wish, me, gateway, findings)
        welcome = _asked(findings, "gateway", lambda: apply(wish, me, chain, offer, gateway))
    findings.note(Finding("gateway", f"{wish.server} made this host the member {wish.invitation.name}", True))
    store = _asked(findings, "store", lambda: store_of(wish, welcome))
    for finding in (store_access(store, me), api_access(welcome, wish.invitation.name, me), *own_resources(me)):
        findings.note(finding)
    findings.end_stage()
    most_stake_wei, most_deposit_wei = limits(wish, me)
    Connections(
        name=wish.invitation.name,
        chain=chain,
        store=store,
        publishers=welcome.publishers,
        most_stake_wei=most_stake_wei,
        most_deposit_wei=most_deposit_wei,
    ).pin(me)
    write_profile(wish.home, welcome.api_url, welcome.api_auth)
    return worker_command(wish.home, wish.invitation.name)


def _look_first(wish: Wish, me: Identity, gateway: httpx.Client, findings: Findings) -> tuple[Offer, Chain]:
    """Everything that can be wrong before the invitation is shown to anybody."""
    offer, skew_s = _asked(findings, "gateway", lambda: read_offer(gateway))
    findings.note(same_versions(versions_here(), offer.versions))
    findings.note(clock(skew_s))
    chain = _asked(findings, "chain", lambda: chain_of(wish, offer))
    for finding in chain_findings(chain, me, offer.time_ms / 1000):
        findings.note(finding)
    findings.note(agreement(offer.publishers, *limits(wish, me)))
    for finding in pinned_before(me, wish, chain, offer.publishers):
        findings.note(finding)
    findings.end_stage()
    return offer, chain


def _asked(findings: Findings, name: str, question: Callable[[], Any]) -> Any:
    """Its answer; without one there is nothing more to look at. Raises CannotJoin."""
    try:
        return question()
    except (httpx.HTTPError, ValueError, OSError) as error:
        findings.note(Finding(name, str(error), False))
        findings.end_stage()
        raise


def read_offer(gateway: httpx.Client) -> tuple[Offer, float]:
    """What the gateway offers, and by how many seconds this host's clock is ahead of its own."""
    before = time.time()
    answer = _ask(gateway, "GET", "/offer", b"")
    after = time.time()
    try:
        offer = Offer.model_validate_json(answer)
    except ValidationError:
        raise ValueError(f"{gateway.base_url} is no HealChain gateway: correct --server") from None
    return offer, (before + after) / 2 - offer.time_ms / 1000


def apply(wish: Wish, me: Identity, chain: Chain, offer: Offer, gateway: httpx.Client) -> Welcome:
    """What the gateway gives its new member. Raises ValueError with what it has against it."""
    invitation = wish.invitation
    membership = Membership(
        name=invitation.name, address=me.address, encryption_key=me.encryption_key, moment_ms=offer.time_ms
    )
    application = Application(
        secret="0x" + invitation.secret.hex(), membership=membership, signature=me.sign(membership, chain.domain)
    )
    sealed = _ask(gateway, "POST", "/members", seal(application, invitation.gateway_key, APPLICATION))
    try:
        opened = me.open_sealed(sealed, welcome_context(invitation.secret, membership))
        welcome = Welcome.model_validate_json(opened)
    except (ecies.Unopenable, ValidationError):
        raise ValueError(
            f"the answer of {gateway.base_url} is not from the gateway of this invitation: somebody between may have "
            "changed it; ask its operator"
        ) from None
    if (welcome.chain, welcome.publishers) != (offer.chain, offer.publishers):
        raise ValueError(
            "the chain or the publishers offered before were changed on the way: ask the gateway's operator, use another "
            "network"
        )
    return welcome


def _ask(gateway: httpx.Client, method: str, path: str, content: bytes) -> bytes:
    """The answer's body. Raises ValueError with the gateway's own sentence for a refusal."""
    try:
        with gateway.stream(method, path, content=content) as answer:
            body = b""
            for piece in answer.iter_bytes():
                body += piece
                if len(body) > LARGEST_ANSWER_BYTES:
                    raise ValueError(f"{gateway.base_url} answers more than a gateway would: correct --server")
    except (httpx.TransportError, httpx.UnsupportedProtocol) as error:
        raise ValueError(
            f"{gateway.base_url} does not answer ({type(error).__name__}): is --server right, is the gateway running, and "
            "may this host reach it?"
        ) from None
    if answer.status_code == 404:
        raise ValueError(f"{gateway.base_url} is no HealChain gateway: correct --server")
    if answer.status_code != 200:
        raise ValueError(f"{gateway.base_url} refuses: {_sentence(body) or f'status {answer.status_code}'}")
    return body


def _sentence(body: bytes) -> str:
    """What a server says, as one printable line."""
    with suppress(ValueError, TypeError, KeyError):
        said = str(json.loads(body)["detail"])
        return "".join(one for one in " ".join(said.split()) if one.isprintable())[:300]
    return ""


def same_versions(here: Versions, there: Versions) -> Finding:
    different = [
        f"{name} is {getattr(here, name)} here and {getattr(there, name)} at the gateway: install that one"
        for name in Versions.model_fields
        if getattr(here, name) != getattr(there, name)
    ]
    same = f"healchain {here.healchain}, prefect {here.prefect}, as at the gateway"
    return Finding("versions", "; ".join(different) or same, not different)


def clock(skew_s: float) -> Finding:
    """skew_s: how far this host's clock is ahead of the gateway's."""
    where = f"{abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} the gateway's"
    if abs(skew_s) > SKEW_MAX_S:
        remedy = "the store refuses a host that is 15 minutes off; set the clock (NTP: timedatectl set-ntp true)"
        return Finding("clock", f"{where}: {remedy}", False)
    if abs(skew_s) > SKEW_TOLD_S:
        remedy = "works, but the times in logs and reports are wrong; set the clock (NTP: timedatectl set-ntp true)"
        return Finding("clock", f"{where}: {remedy}", False, needed=False)
    return Finding("clock", where, True)


def chain_of(wish: Wish, offer: Offer) -> Chain:
    """The chain that is offered, through the node of this host's choice. Raises ValueError."""
    try:
        chain = Chain(**{**offer.chain, **({"rpc": wish.rpc} if wish.rpc else {})})
    except ValidationError as error:
        fields = sorted({".".join(map(str, problem["loc"])) for problem in error.errors()})
        raise ValueError(f"{', '.join(fields)} cannot be used: correct --rpc, or ask the gateway's operator") from None
    if chain.rpc.startswith("local:"):
        raise ValueError("rpc: a chain inside one process cannot be shared: give a node's address by --rpc")
    return chain


def chain_findings(chain: Chain, me: Identity, server_s: float) -> list[Finding]:
    """The contracts, the chain's clock, the money. server_s: the gateway's clock, unix."""
    chain = chain.hurried()
    try:
        bindings.check_deployment(chain.web3, chain.deployment)
        now_s, wei = chain.now_s(), chain.balance_of(me.address)
    except bindings.InvalidDeployment as error:
        remedy = "install the version that the publisher uses, or ask it which contracts are meant"
        return [Finding("chain", f"{error}: {remedy}", False)]
    except (RequestException, Web3Exception, ValueError, OSError) as error:
        # The text of such an error may hold the whole address, and with it a key of the node's provider.
        remedy = "is it running, and may this host reach it? --rpc names another one"
        return [Finding("chain", f"the node does not answer ({type(error).__name__}): {remedy}", False)]
    found = f"id {chain.chain_id}, this build's contracts, BlockPublisher {chain.publisher_address}"
    return [Finding("chain", found, True), chain_clock(now_s - server_s), wallet(me, wei)]


def chain_clock(ahead_s: float) -> Finding:
    """ahead_s: how far the latest block's time is ahead of the gateway's clock. Windows end by the chain's."""
    where = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the gateway's clock"
    if -CHAIN_BEHIND_S <= ahead_s <= CHAIN_AHEAD_S:
        return Finding("chain time", where, True)
    why = "a development chain, or the node is not in step: compare with another by --rpc"
    return Finding("chain time", f"{where}: {why}", False, needed=False)


def wallet(me: Identity, wei: int) -> Finding:
    if wei:
        return Finding("wallet", f"{me.address} has {wei} wei", True)
    return Finding("wallet", f"{me.address} has 0 wei: send it the stake and some for gas", False, needed=False)


def limits(wish: Wish, me: Identity) -> tuple[int, int]:
    """The largest stake in wei of one task, and of all tasks together: as wished, else as pinned, else the defaults."""
    if wish.most_stake_wei is None:
        with suppress(NotConnected):
            pinned = connections_of(me)
            if pinned.publishers:  # else a home from before there were limits
                return pinned.most_stake_wei, pinned.most_deposit_wei
    most_stake_wei = MOST_STAKE_WEI if wish.most_stake_wei is None else wish.most_stake_wei
    return most_stake_wei, TASKS_AT_ONCE * most_stake_wei


def agreement(publishers: Sequence[Address], most_stake_wei: int, most_deposit_wei: int) -> Finding:
    """In whose tasks this host is going to stake, and how much."""
    most = f"at most {_ether(most_stake_wei)} ether in one and {_ether(most_deposit_wei)} in all"
    return Finding("publishers", f"stakes in tasks of {', '.join(publishers)}, {most}; --most-stake changes it", True)


def _ether(wei: int) -> str:
    return f"{Web3.from_wei(wei, 'ether'):f}"


def pinned_before(me: Identity, wish: Wish, chain: Chain, publishers: Sequence[Address]) -> list[Finding]:
    """What an earlier joining has written into the home, where it is not the same."""
    try:
        pinned = connections_of(me)
    except NotConnected as error:
        broken = f"{error}. Chain and publishers above are taken: compare them with what the publisher told you"
        is_there = (Path(me.home) / "connections.json").exists()
        return [Finding("pinned", broken, False, needed=False)] if is_there else []
    found = []
    if pinned.name != wish.invitation.name:
        remedy = "give --home another folder, or use an invitation to the old name"
        found.append(Finding("name", f"this home is {pinned.name}, invited is {wish.invitation.name}: {remedy}", False))
    if whereabouts(pinned.chain) != whereabouts(chain):
        both = f"pinned is {whereabouts(pinned.chain)}, offered is {whereabouts(chain)}"
        remedy = "if the publisher has announced this, give --new-chain"
        found.append(Finding("pinned chain", both if wish.has_new_chain else f"{both}: {remedy}", wish.has_new_chain))
    if pinned.publishers and set(pinned.publishers) != set(publishers):
        both = f"pinned: {', '.join(pinned.publishers)}; offered: {', '.join(publishers)}"
        told = both if wish.has_new_publishers else f"{both}: if the first have announced this, give --new-publishers"
        found.append(Finding("pinned publishers", told, wish.has_new_publishers))
    return found


def store_of(wish: Wish, welcome: Welcome) -> ArtifactStore:
    """The store at the address that this host uses for it. Raises ValueError."""
    _, _, bucket = parse_url(welcome.store_url)
    root = welcome.store_url if wish.store is None else wish.store.rstrip("/")
    if wish.store is not None and not root.endswith(f"/{bucket}"):
        root = f"{root}/{bucket}"
    try:
        parse_url(root)
    except ValueError:
        raise ValueError(
            f"--store: expected http(s)://HOST:PORT, or that with the consortium's bucket /{bucket}"
        ) from None
    return ArtifactStore(root=root, access_key=welcome.access_key, secret_key=SecretStr(welcome.secret_key))


def store_access(store: ArtifactStore, me: Identity) -> Finding:
    """Whether this host can write and read below its address, and nothing more."""
    assert store.access_key is not None
    assert store.secret_key is not None
    bucket = Bucket(store.root, store.access_key, store.secret_key.get_secret_value(), STORE_PATIENCE_S)
    own, foreign = me.address.lower(), f"0x{secrets.token_hex(20)}"
    name, probe = f"{own}/probe", secrets.token_bytes(32)
    try:
        bucket.hold(name, probe)
        is_same = bucket.read(name, len(probe)) == probe
        _remove(bucket, name)
    except (OSError, ValueError) as error:
        return Finding("store", f"{error}. --store names its address as seen from this host", False)
    if not is_same:
        return Finding("store", f"{store.root} gives back other bytes than it was given: tell its operator", False)
    if allowed := [what for what, attempt in _trespasses(bucket, foreign) if not _is_refused(attempt)]:
        return Finding(
            "store", f"{store.root} lets a member {' and '.join(allowed)}: its operator has to limit accounts", False
        )
    return Finding("store", f"{store.root}: writes and reads below {own}, refused elsewhere", True)


def _trespasses(bucket: Bucket, foreign: str) -> Sequence[tuple[str, Callable[[], Any]]]:
    return (
        ("write below another's address", lambda: bucket.hold(f"{foreign}/probe", b"")),
        ("read what is private to another", lambda: bucket.read(f"private/{foreign}/probe", 1)),
    )


def _is_refused(attempt: Callable[[], Any]) -> bool:
    try:
        attempt()
    except PermissionError:
        return True
    except OSError:  # nothing is there: so it may look
        return False
    return False


def _remove(bucket: Bucket, name: str) -> None:
    secure, endpoint, folder = parse_url(bucket.url)
    Minio(endpoint=endpoint, access_key=bucket.access_key, secret_key=bucket.secret_key, secure=secure).remove_object(
        bucket_name=folder, object_name=name
    )


def api_access(welcome: Welcome, name: str, me: Identity) -> Finding:
    """Whether Prefect's API takes the credentials, takes no one without, has the version of here and this host's queues."""
    user, _, password = welcome.api_auth.partition(":")
    own = httpx.BasicAuth(user, password) if welcome.api_auth else None
    try:
        with httpx.Client(base_url=welcome.api_url, timeout=10) as api:
            answer = api.get("/admin/version", auth=own)
            is_open = api.get("/admin/version").status_code == 200
            queues = [api.get(f"/work_pools/{pool}/queues/{name}", auth=own) for pool in POOLS]
    except httpx.HTTPError as error:
        remedy = "may this host reach it? The gateway's operator names it by HEALCHAIN_MEMBERS_API_URL"
        return Finding("Prefect", f"{welcome.api_url} does not answer ({type(error).__name__}): {remedy}", False)
    if answer.status_code != 200:
        remedy = "its operator has to give the gateway the PREFECT_API_AUTH_STRING of the server"
        return Finding("Prefect", f"{welcome.api_url} refuses the credentials ({answer.status_code}): {remedy}", False)
    if (there := answer.json()) != versions_here().prefect:
        return Finding("Prefect", f"the server is {there}, here is {versions_here().prefect}: install that one", False)
    if any(queue.status_code != 200 or queue.json()["description"] != me.address for queue in queues):
        return Finding("Prefect", f"the queues of {name} are not there: run healchain join again", False)
    if is_open:
        remedy = "whoever reaches it rules the scheduler; its operator sets PREFECT_SERVER_API_AUTH_STRING"
        return Finding("Prefect", f"{welcome.api_url} asks for no credentials: {remedy}", False, needed=False)
    return Finding("Prefect", f"{welcome.api_url}, version {there}, queue {name} in {' and '.join(POOLS)}", True)


def own_resources(me: Identity) -> list[Finding]:
    """What the worker finds on this host: the data, the disk, the curve core."""
    home = Path(me.home)
    try:
        data = Finding("data", str(me.data_path()), True)
    except InvalidHome:
        remedy = f"put a MedMNIST-style .npz there, or the path of one or of an image folder into {home / 'data.link'}"
        data = Finding("data", f"{home / 'data.npz'} is not there yet: {remedy}", False, needed=False)
    return [data, doctor.disk(home), doctor.curve_core()]


def worker_command(home: Path, name: str) -> str:
    """The second of the two commands."""
    beside = Path(sys.executable).parent / "prefect"
    found = shutil.which("prefect")
    program = "prefect" if found and os.path.samefile(found, beside) else str(beside)
    return (
        f"PREFECT_HOME={shlex.quote(str(home / 'prefect'))} {shlex.quote(program)} worker start --type healchain "
        f"--pool miners --work-queue {name} --name {name}"
    )
