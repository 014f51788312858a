"""The real parts of HealChain on this machine, each a process of its own, on the loopback only: `healchain stack up`.

`up` walks STEPS; each finds done what is done, so that the same command makes a stack, completes one that was killed in the
middle, adds miners, and starts again cold after a power cut. `down` ends exactly what was started and keeps the data.
"""

import re
import urllib.request
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from pydantic import SecretStr
from web3 import HTTPProvider, Web3
from web3.exceptions import Web3Exception

from blocks.artifacts import ArtifactStore
from blocks.chain import Chain
from blocks.connections import Connections
from blocks.identity import Identity, create_home
from blocks.registry import Registry
from contracts.sending import Sending
from contracts.task_spec import TaskFile, load_task_file
from deployments import register
from deployments.automations import register_automations
from infra import chain_deployment, chain_node, object_store, postgres, supervision
from infra.devstack import MOST_WEI, give_allowances, give_data
from infra.profiles import write_profile
from infra.stack_plan import DATABASES, HOST, STORE_USER, Plan, check_ports, programs
from tasks.publish import approve_once

DEFINITIONS = Path(__file__).parent.parent / "prefect.yaml"
READY_S = 30.0
# The first start makes the tables; beside other work on two cores that takes its time.
PREFECT_READY_S = 120.0
# Every block is mined again: 2 ms each, several times that beside other work.
CHAIN_READY_S = 300.0
WITHDRAWAL_DELAY_S = 3600
Steps = list[tuple[str, Callable[[Plan], str]]]


def up(plan: Plan, say: Callable[[str], None], steps: Steps | None = None) -> None:
    """Bring the stack up, or what of it is down; `say` is given a line a step. steps: all, or SERVERS without the workers.

    Raises ValueError (a setting), FileNotFoundError (a program that is not installed), supervision.PartFailed and the errors
    of contracts.sending.
    """
    with supervision.alone(plan.folder):
        for title, step in steps or STEPS:
            say(f"{title}: {step(plan)}")


def supervisor(plan: Plan) -> str:
    """Look whether everything can start, then start supervisord with nothing under it."""
    chain_node.binary()
    supervision.clear(plan.folder)
    check_ports(plan, supervision.statuses(plan.folder))
    supervision.write_programs(plan.folder, programs(plan))
    supervision.start(plan.folder)
    return f"logs in {plan.folder / 'logs'}"


def database(plan: Plan) -> str:
    data, port, password = plan.folder / "postgres", plan.ports["postgres"], plan.postgres_password
    postgres.initialise(data, password)
    if supervision.state_of(plan.folder, "postgres") not in supervision.STATES_UP:
        postgres.forget_dead(data)
    supervision.run(plan.folder, "postgres")
    supervision.await_ready(plan.folder, "postgres", lambda: postgres.answers(port, password), READY_S)
    postgres.make_databases(port, password, DATABASES)
    return f"port {port}, databases {', '.join(DATABASES)}"


def store(plan: Plan) -> str:
    object_store.format_volume(plan.folder / "objects")
    supervision.run(plan.folder, "store")
    port = plan.ports["store"]
    supervision.await_ready(
        plan.folder, "store", lambda: is_answered(f"http://{HOST}:{port}/minio/health/live"), READY_S
    )
    administered = administered_store(plan)
    object_store.wait_until_ready(administered)
    object_store.make_bucket(administered)
    return plan.store_url


def chain(plan: Plan) -> str:
    chain_node.found(plan.folder / "chain", create_home(plan.folder / "deployer").address)
    supervision.run(plan.folder, "chain")
    supervision.await_ready(plan.folder, "chain", lambda: is_chain(plan.rpc), CHAIN_READY_S)
    return f"{plan.rpc}, chain id {chain_node.CHAIN_ID}"


def prefect(plan: Plan) -> str:
    supervision.write_private(plan.folder / "prefect-login", plan.prefect_login)
    supervision.run(plan.folder, "prefect")
    ready = f"{plan.api_url}/ready"
    supervision.await_ready(plan.folder, "prefect", lambda: is_answered(ready), PREFECT_READY_S)
    return plan.ui_url


def contracts(plan: Plan) -> str:
    deployed = deployed_chain(plan)
    chain_deployment.verify(deployed)
    return f"escrow {deployed.escrow_address}"


def homes(plan: Plan) -> str:
    """Keys, an account at the store and money for every actor."""
    addresses = [create_home(plan.home(actor)).address for actor in plan.actors]
    deployer = Identity(home=str(plan.folder / "deployer"))
    give_allowances(stack_chain(plan).sender(deployer.account, deployer.journal_path), addresses)
    for actor in plan.actors:
        object_store.account_of(administered_store(plan), Identity(home=str(plan.home(actor))))
    return ", ".join(plan.actors)


def connections(plan: Plan) -> str:
    """What each home believes in, how its processes find Prefect, and data of its own."""
    chain, registry = deployed_chain(plan), Registry(url=SecretStr(plan.database_url("healchain", "psycopg")))
    publisher = Identity(home=str(plan.home("publisher"))).address
    for actor in plan.actors:
        me = Identity(home=str(plan.home(actor)))
        access_key, secret_key = object_store.account_of(administered_store(plan), me)
        store = ArtifactStore(root=plan.store_url, access_key=access_key, secret_key=SecretStr(secret_key))
        is_publisher = actor == "publisher"
        Connections(
            name=actor,
            chain=chain,
            store=store,
            registry=registry if is_publisher else None,
            uses_pools=is_publisher,
            publishers=(publisher,),
            most_stake_wei=MOST_WEI,
            most_deposit_wei=MOST_WEI,
        ).pin(me)
        write_profile(plan.home(actor), plan.api_url, plan.prefect_login)
    registry.record_actor("publisher", publisher, "publisher")
    task = ready_task(plan.task)
    give_data({actor: plan.home(actor) for actor in plan.actors}, task.dataset, task.seed, {})
    approve_once(Identity(home=str(plan.home("publisher"))), task)
    return f"each home knows its own; data: parts of {task.dataset.name}"


def deployments(plan: Plan) -> str:
    register.register_pools()
    for actor in plan.actors:
        pools = ("publisher",) if actor == "publisher" else ("miners", "aggregators")
        register.register_queue(actor, Identity(home=str(plan.home(actor))).address, pools)
    register.offer(deployed_chain(plan))
    rules = register_automations(reports_of(plan))
    flows = register.register_deployments(DEFINITIONS)
    return f"{len(flows)} flows in pools {', '.join(register.POOLS)}, {len(rules)} rules"


def reports_of(plan: Plan) -> SecretStr | None:
    """Where failed and stuck tasks are reported to, if the operator has said so. It may hold a key."""
    path = plan.folder / "report-to"
    address = path.read_text().strip() if path.exists() else ""
    if address and not re.match(r"https?://[^/\s]+", address):
        raise ValueError(f"{path}: expected an address http(s)://..., to which reports are posted; or no such file")
    return SecretStr(address) if address else None


def gateway(plan: Plan) -> str:
    """What `healchain gateway` needs to let other hosts join. What the operator has added to its settings stays."""
    from infra.gateway import PUBLISHERS, pin_chain

    folder = plan.folder / "gateway"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / "gateway.env"
    settings = {
        "PREFECT_API_URL": plan.api_url,
        "PREFECT_API_AUTH_STRING": plan.prefect_login,
        "HEALCHAIN_STORE_URL": plan.store_url,
        "HEALCHAIN_STORE_ACCESS_KEY": STORE_USER,
        "HEALCHAIN_STORE_SECRET_KEY": plan.store_password,
    }
    there = path.read_text().splitlines() if path.exists() else []
    if PUBLISHERS not in {line.partition("=")[0].strip() for line in there}:  # the operator may add others to it
        settings[PUBLISHERS] = Identity(home=str(plan.home("publisher"))).address
    added = [line for line in there if line.partition("=")[0].strip() not in settings]
    lines = [*(f"{name}={value}" for name, value in settings.items()), *added]
    supervision.write_private(path, "\n".join(lines) + "\n")
    pin_chain(folder, deployed_chain(plan))
    return f"ready for healchain gateway --folder {folder}"


def fund(plan: Plan, address: str, wei: int) -> int:
    """Send coins of the stack's own chain to an address; what it has then. Raises ValueError for an address that is none."""
    if not Web3.is_address(address):
        raise ValueError(f"address {address!r} is none: 0x and 40 hex digits, as healchain join prints it")
    deployer, chain = Identity(home=str(plan.folder / "deployer")), stack_chain(plan)
    chain.sender(deployer.account, deployer.journal_path).send(b"", to=address, value_wei=wei, purpose="allowance")
    return chain.balance_of(address)


def workers(plan: Plan) -> str:
    for host in plan.workers:
        supervision.run(plan.folder, f"worker-{host}")
    return f"one for each of {', '.join(plan.workers)}"


SERVERS: Steps = [
    ("supervisor", supervisor),
    ("PostgreSQL", database),
    ("object store", store),
    ("chain", chain),
    ("Prefect", prefect),
    ("contracts", contracts),
    ("homes", homes),
]
# These speak with Prefect's server, which a process finds by its environment when it first imports Prefect.
STEPS: Steps = [
    *SERVERS,
    ("connections", connections),
    ("deployments", deployments),
    ("gateway", gateway),
    ("workers", workers),
]


def ready_task(name: str) -> TaskFile:
    """The ready task of this name. Raises ValueError when there is none."""
    found = files("deployments") / "ready" / f"{name}.toml"
    if not found.is_file():
        raise ValueError(f"--task {name}: no ready task of this name; see healchain tasks")
    return load_task_file(found.read_text())


def administered_store(plan: Plan) -> ArtifactStore:
    return ArtifactStore(root=plan.store_url, access_key=STORE_USER, secret_key=SecretStr(plan.store_password))


def stack_chain(plan: Plan) -> Chain:
    """The stack's chain, whose node has every block on the disk before it is seen: one confirmation is final."""
    return Chain(rpc=plan.rpc, sending=Sending(chain_id=chain_node.CHAIN_ID, confirmations=1, poll_s=0.2))


def deployed_chain(plan: Plan) -> Chain:
    """It with the contracts, which are deployed by the first call."""
    deployer = Identity(home=str(plan.folder / "deployer"))
    return chain_deployment.deploy(plan.rpc, deployer, stack_chain(plan).sending, WITHDRAWAL_DELAY_S)


def is_answered(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def is_chain(rpc: str) -> bool:
    try:
        return Web3(HTTPProvider(rpc)).eth.chain_id == chain_node.CHAIN_ID
    except (OSError, Web3Exception):
        return False
