"""A publisher on servers that run already: `healchain publisher`, where `healchain stack up` would start its own.

Its home, its account at the store, the contracts, and on Prefect's server the pools, deployments and rules. Called again it
completes what is missing and keeps what the home has pinned, whatever Prefect's server notes by then; what is asked for
otherwise is refused. The servers' administrator runs it; the publisher's worker needs the home alone.

Errors: ValueError naming a setting, StoreUnavailable, those of contracts.sending and of Prefect's client.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from minio.error import MinioException
from pydantic import SecretStr
from urllib3.exceptions import HTTPError

from blocks.chain import Chain
from blocks.connections import Connections, NotConnected, connections_of
from blocks.identity import Identity
from blocks.object_store import StoreUnavailable
from blocks.registry import Registry
from contracts.sending import Sending
from deployments import register
from deployments.automations import register_automations
from infra import chain_deployment, object_store
from infra.chain_deployment import whereabouts
from infra.gateway import PUBLISHERS, Settings, read_settings
from infra.profiles import write_profile
from infra.stack import DEFINITIONS, WITHDRAWAL_DELAY_S

REGISTRY = "HEALCHAIN_REGISTRY_URL"


@dataclass(frozen=True)
class Wish:
    """How a publisher wants to be set up. None: as its home has pinned it, else as Prefect's block `chain` has it.

    rpc: a node of the chain; where to deploy, when neither of them names contracts. has_new_chain: take the chain of the block
    in place of another one that the home has pinned.
    """

    name: str
    rpc: str | None = None
    chain_id: int | None = None
    confirmations: int | None = None
    has_new_chain: bool = False


def set_up(me: Identity, wish: Wish, environment: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Set the home up; `say` is given a line a step."""
    settings = read_settings(environment)
    pinned = _pinned(me)
    _check(me, wish, settings, pinned)
    registry = Registry(url=SecretStr(registry_url(me, environment)))
    with _asking("PREFECT_API_URL", environment["PREFECT_API_URL"]):
        chain = _chain(me, wish, pinned)
        say(f"contracts: escrow {chain.escrow_address}")
    with _asking("HEALCHAIN_STORE_URL", settings.store.root):
        object_store.make_bucket(settings.store)
        access_key, secret_key = object_store.account_of(settings.store, me)
        say(f"store: {settings.store.root}, account {access_key}")
    with _asking("PREFECT_API_URL", environment["PREFECT_API_URL"]):
        say(f"Prefect: {_register(me, wish.name, chain)}")
    keys = {"access_key": access_key, "secret_key": SecretStr(secret_key)}
    store = (settings.store if pinned is None else pinned.store).model_copy(update=keys)
    Connections(name=wish.name, chain=chain, store=store, registry=registry, uses_pools=True).pin(me)
    registry.record_actor(wish.name, me.address, "publisher")
    write_profile(Path(me.home), environment["PREFECT_API_URL"], environment.get("PREFECT_API_AUTH_STRING", ""))
    say(f"home: {me.home}")


def _pinned(me: Identity) -> Connections | None:
    """What an earlier call has written into the home. Raises ValueError when it cannot be used."""
    path = Path(me.home) / "connections.json"
    if not path.exists():
        return None
    try:
        return connections_of(me)
    except NotConnected:
        raise ValueError(f"{path} is not what was written: restore it from a backup, or move it away first") from None


def _check(me: Identity, wish: Wish, settings: Settings, pinned: Connections | None) -> None:
    """Raises ValueError naming what hosts do not know, or what is not as the home has it."""
    if me.address not in settings.publishers:
        given = ", ".join(settings.publishers)
        raise ValueError(f"{PUBLISHERS} = {given}: hosts that join would refuse this publisher: add {me.address} to it")
    if pinned is None:
        return
    _check_asked("--name", wish.name, "this home is", pinned.name, f"give --name {pinned.name}, or another --home")
    remedy = "correct the setting; if the store has moved, store.root in the home's connections.json first"
    _check_asked("HEALCHAIN_STORE_URL =", settings.store.root, "this home's is", pinned.store.root, remedy)


def _register(me: Identity, name: str, chain: Chain) -> str:
    register.register_pools()
    register.register_queue(name, me.address, ("publisher",))
    register.offer(chain)
    watches = register_automations(None)
    flows = register.register_deployments(DEFINITIONS)
    return f"{len(flows)} flows, {len(watches)} rules, queue {name} of pool publisher"


@contextmanager
def _asking(setting: str, address: str) -> Iterator[None]:
    """Raises ValueError naming the setting of a server that cannot be used."""
    try:
        yield
    except (httpx.HTTPError, MinioException, HTTPError, StoreUnavailable) as error:
        problem = f"{type(error).__name__}: is it running, and are its credentials right?"
        raise ValueError(f"{setting} = {address}: {problem}") from error


def _chain(me: Identity, wish: Wish, pinned: Connections | None) -> Chain:
    """The publisher's chain, checked. Raises ValueError naming what is asked for and not so."""
    noted = _noted()
    if pinned is None or wish.has_new_chain:
        chain, where = noted or _deployed(me, wish), "Prefect's block `chain`"
    else:
        chain, where = pinned.chain, "this home's connections.json"
        _check_noted(chain, noted)
        remedy = "leave it out, or change chain.sending.confirmations there, with the worker stopped"
        _check_asked("--confirmations", wish.confirmations, f"{where} has", chain.sending.confirmations, remedy)
    remedy = "leave it out, or set up another --home on servers of that chain"
    _check_asked("--chain-id", wish.chain_id, f"{where} has chain", chain.chain_id, remedy)
    sending = chain.sending.model_copy(update={"confirmations": wish.confirmations or chain.sending.confirmations})
    chain = chain.model_copy(update={"rpc": wish.rpc or chain.rpc, "sending": sending})
    chain_deployment.verify(chain)
    return chain


def _check_asked(option: str, asked: object, what: str, found: object, remedy: str) -> None:
    """Raises ValueError when something else is asked for than what there is."""
    if asked not in (None, found):
        raise ValueError(f"{option} {asked}: {what} {found}: {remedy}")


def _noted() -> Chain | None:
    """The chain that Prefect's server notes. Whoever has its login can change that: believed when the home has none."""
    try:
        return chain_deployment.noted()
    except ValueError:
        return None


def _deployed(me: Identity, wish: Wish) -> Chain:
    """A chain to which the publisher's account brings the contracts."""
    if wish.rpc is None:
        return chain_deployment.noted()  # raises, and says what to do
    rules = Sending(chain_id=wish.chain_id, confirmations=wish.confirmations or 1)
    return chain_deployment.deploy(wish.rpc, me, rules, WITHDRAWAL_DELAY_S)


def _check_noted(pinned: Chain, noted: Chain | None) -> None:
    """Raises ValueError when Prefect's server notes another chain than the home."""
    if noted is None or whereabouts(noted) == whereabouts(pinned):
        return
    raise ValueError(
        f"Prefect's block `chain` is {whereabouts(noted)}, this home's is {whereabouts(pinned)}: if you moved to the first, give "
        "--new-chain; if not, somebody changed the block: delete it, and the same command notes the home's again"
    )


def registry_url(me: Identity, environment: Mapping[str, str]) -> str:
    """Where the publisher keeps its index: the setting, or a file in its home."""
    return environment.get(REGISTRY) or f"sqlite:///{Path(me.home).resolve() / 'registry.sqlite'}"


def worker_command(home: Path, name: str) -> str:
    """What the publisher's host runs from then on."""
    flags = f"--type healchain --pool publisher --work-queue {name} --name {name}"
    return f"PREFECT_HOME={home / 'prefect'} prefect worker start {flags}"
