"""A publisher on servers that run already: `healchain publisher`, where `healchain stack up` would start its own.

Its home, its account at the store, the contracts, and on Prefect's server the pools, deployments and rules. Called again it
completes what is missing and changes nothing else. The servers' administrator runs it; the publisher's worker needs the home
alone.

Errors: ValueError naming a setting, StoreUnavailable, those of contracts.sending and of Prefect's client.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
from minio.error import MinioException
from pydantic import SecretStr
from urllib3.exceptions import HTTPError

from blocks.artifacts import ArtifactStore
from blocks.chain import Chain
from blocks.connections import Connections
from blocks.identity import Identity
from blocks.object_store import StoreUnavailable
from blocks.registry import Registry
from contracts.sending import Sending
from deployments import register
from deployments.automations import register_automations
from infra import chain_deployment, object_store
from infra.gateway import read_settings
from infra.profiles import write_profile
from infra.stack import DEFINITIONS, WITHDRAWAL_DELAY_S

REGISTRY = "HEALCHAIN_REGISTRY_URL"


def set_up(
    me: Identity, name: str, rpc: str | None, rules: Sending, environment: Mapping[str, str], say: Callable[[str], None]
) -> None:
    """Set the home up; `say` is given a line a step. rpc: where to deploy when Prefect's block `chain` names no contracts."""
    settings = read_settings(environment)
    registry = Registry(url=SecretStr(registry_url(me, environment)))
    with _asking("PREFECT_API_URL", environment["PREFECT_API_URL"]):
        chain = _chain(me, rpc, rules)
        say(f"contracts: escrow {chain.escrow_address}")
    with _asking("HEALCHAIN_STORE_URL", settings.store.root):
        object_store.make_bucket(settings.store)
        access_key, secret_key = object_store.account_of(settings.store, me)
        say(f"store: {settings.store.root}, account {access_key}")
    with _asking("PREFECT_API_URL", environment["PREFECT_API_URL"]):
        say(f"Prefect: {_register(me, name, chain)}")
    store = ArtifactStore(root=settings.store.root, access_key=access_key, secret_key=SecretStr(secret_key))
    Connections(name=name, chain=chain, store=store, registry=registry, uses_pools=True).pin(me)
    registry.record_actor(name, me.address, "publisher")
    write_profile(Path(me.home), environment["PREFECT_API_URL"], environment.get("PREFECT_API_AUTH_STRING", ""))
    say(f"home: {me.home}")


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


def _chain(me: Identity, rpc: str | None, rules: Sending) -> Chain:
    """The chain that Prefect's server notes, or one to which the publisher's account brings the contracts; checked."""
    try:
        chain = chain_deployment.noted(rpc)
    except ValueError:
        if rpc is None:
            raise
        chain = chain_deployment.deploy(rpc, me, rules, WITHDRAWAL_DELAY_S)
    chain_deployment.verify(chain)
    return chain


def registry_url(me: Identity, environment: Mapping[str, str]) -> str:
    """Where the publisher keeps its index: the setting, or a file in its home."""
    return environment.get(REGISTRY) or f"sqlite:///{Path(me.home).resolve() / 'registry.sqlite'}"


def worker_command(home: Path, name: str) -> str:
    """What the publisher's host runs from then on."""
    flags = f"--type healchain --pool publisher --work-queue {name} --name {name}"
    return f"PREFECT_HOME={home / 'prefect'} prefect worker start {flags}"
