"""What a stack consists of: its folder, ports and secrets, and the programs with their command lines and environments.

    FOLDER/stack.json       ports, number of miners, secrets; mode 0600; made once, kept
    FOLDER/actors/NAME/     homes: `publisher`, `miner-1`, ...
    FOLDER/deployer/        home of who deploys the contracts and owns the chain's first money
    FOLDER/postgres/ objects/ chain/ prefect/    what the parts keep
    FOLDER/prefect-login    what the UI and PREFECT_API_AUTH_STRING ask for

Nothing here loads Prefect, which reads where its server is when it is first imported: see `client_environment`.
"""

import json
import os
import re
import secrets
import socket
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from infra import postgres
from infra.chain_node import BINARY_ENVIRONMENT
from infra.supervision import Program, Status, write_private

HOST = "127.0.0.1"
# setting: port; each is an option of `healchain stack up`
DEFAULT_PORTS = {"prefect": 4200, "store": 9000, "chain": 8545, "postgres": 54320}
# A process that was killed lets go of its port a moment after it is gone.
FREE_S = 2.0
DATABASES = ("prefect", "healchain")
BUCKET = "healchain"
DEFAULT_TASK = "breast-cancer"
STORE_USER = "healchain"  # the administrator of the store
SHARED_STEPS = 4
"""Steps at a time on a host of several miners: each is a process of 0.1 GB or more, and they share its cores."""


@dataclass(frozen=True)
class Plan:
    """One stack. ports: by part. task: the ready task whose data the miners share.

    hosts: how many processes serve the miners, who are dealt out among them; 0: one for each miner.
    """

    folder: Path
    ports: dict[str, int]
    miners: int
    task: str
    postgres_password: str
    store_password: str
    prefect_password: str
    hosts: int = 0

    @property
    def rpc(self) -> str:
        return f"http://{HOST}:{self.ports['chain']}"

    @property
    def store_url(self) -> str:
        return f"http://{HOST}:{self.ports['store']}/{BUCKET}"

    @property
    def ui_url(self) -> str:
        return f"http://{HOST}:{self.ports['prefect']}"

    @property
    def api_url(self) -> str:
        return f"{self.ui_url}/api"

    @property
    def prefect_login(self) -> str:
        return f"healchain:{self.prefect_password}"

    def database_url(self, name: str, driver: str) -> str:
        """driver: `asyncpg` for Prefect's server, `psycopg` for ours. Holds the password."""
        credentials = f"{postgres.USER}:{self.postgres_password}"
        return f"postgresql+{driver}://{credentials}@{HOST}:{self.ports['postgres']}/{name}"

    @property
    def actors(self) -> list[str]:
        return ["publisher", *(f"miner-{number}" for number in range(1, self.miners + 1))]

    @property
    def workers(self) -> dict[str, list[str]]:
        """The actors that a worker serves, by the name of its host."""
        publisher, *miners = self.actors
        if not self.hosts:
            return {actor: [actor] for actor in self.actors}
        hosts = min(self.hosts, len(miners))
        return {publisher: [publisher], **{f"host-{number + 1}": miners[number::hosts] for number in range(hosts)}}

    def home(self, actor: str) -> Path:
        return self.folder / "actors" / actor


def open_plan(
    folder: Path, ports: dict[str, int], miners: int | None, task: str | None = None, hosts: int | None = None
) -> Plan:
    """The plan kept in this folder with what is given changed, or a fresh one with new secrets; kept again.

    Raises ValueError when fewer miners are asked for than there are: they may have money in a task.
    """
    path = folder / "stack.json"
    known = read_plan(folder) if path.exists() else None
    plan = known or _fresh_plan(folder)
    if known and miners is not None and miners < known.miners:
        raise ValueError(
            f"--miners {miners}: this stack has {known.miners}, who may have money in a task; use another --folder"
        )
    if known and task not in (None, known.task):
        raise ValueError(f"--task {task}: the miners of this stack have data for {known.task}; use another --folder")
    plan = replace(plan, ports={**plan.ports, **ports}, miners=miners or plan.miners, task=task or plan.task)
    plan = replace(plan, hosts=hosts or plan.hosts)
    if len(set(plan.ports.values())) < len(plan.ports):
        raise ValueError(f"ports {plan.ports}: two parts cannot have the same")
    if plan != known:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        kept = {name: value for name, value in asdict(plan).items() if name != "folder"}
        write_private(path, json.dumps(kept, indent=1))
    return plan


def _fresh_plan(folder: Path) -> Plan:
    one, two, three = (secrets.token_hex(24) for _ in range(3))
    return Plan(folder, DEFAULT_PORTS, 5, DEFAULT_TASK, one, two, three)


def read_plan(folder: Path) -> Plan:
    """Raises ValueError when there is no stack in this folder, or what is written there is none."""
    path = folder / "stack.json"
    try:
        plan = Plan(folder=folder, **json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise ValueError(f"--folder {folder}: there is no stack; healchain stack up makes one") from error
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not what was written: {error}. Restore it from a backup") from error
    if problem := _wrong_setting(plan):
        raise ValueError(f"{path}: {problem}")
    return plan


def _wrong_setting(plan: Plan) -> str:
    """What cannot be used, or an empty string. It may have been edited by hand."""
    if not isinstance(plan.ports, dict) or set(plan.ports) != set(DEFAULT_PORTS):
        return f"ports = {plan.ports!r}: expected one for each of {', '.join(DEFAULT_PORTS)}"
    for part, port in plan.ports.items():
        if type(port) is not int or not 1 <= port <= 65535:
            return f"ports.{part} = {port!r}: expected a number from 1 to 65535"
    if type(plan.miners) is not int or plan.miners < 1:
        return f"miners = {plan.miners!r}: expected a number from 1 up"
    for name in ("postgres_password", "store_password", "prefect_password"):
        # They stand in addresses and in supervisord's file; shorter ones than 8 the store refuses.
        if not re.fullmatch(r"[A-Za-z0-9_-]{8,}", str(getattr(plan, name))):
            return f"{name}: expected 8 or more letters, digits, - and _; for example those of openssl rand -hex 24"
    return ""


def check_ports(plan: Plan, running: list[Status]) -> None:
    """Raises ValueError naming the first port that somebody else has, and the option that changes it."""
    ours = {status.name for status in running if status.pid}
    for part, port in plan.ports.items():
        deadline = time.monotonic() + FREE_S
        while part not in ours and (reason := _why_taken(port)):
            if time.monotonic() > deadline:
                raise ValueError(f"port {port} for {part}: {reason}. Give another by --{part}-port, or end what has it")
            time.sleep(0.05)


def _why_taken(port: int) -> str:
    """Why nobody can listen there; nothing when one can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def client_environment(plan: Plan) -> dict[str, str]:
    """What a process needs to find and to be let in by this stack's Prefect server."""
    return {
        "PREFECT_API_URL": plan.api_url,
        "PREFECT_API_AUTH_STRING": plan.prefect_login,
        "PREFECT_HOME": str(plan.folder / "client"),
        "DO_NOT_TRACK": "1",
    }


def programs(plan: Plan) -> list[Program]:
    """In the order in which they start; they end in the opposite one."""
    servers = [postgres.program(plan.folder / "postgres", plan.ports["postgres"]), store_program(plan)]
    servers += [chain_program(plan), prefect_program(plan)]
    return [*servers, *(worker_program(plan, host, actors) for host, actors in plan.workers.items())]


def store_program(plan: Plan) -> Program:
    from infra import object_store  # loads Prefect

    folder, port = plan.folder / "objects", plan.ports["store"]
    environment = object_store.gateway_environment(folder, STORE_USER, plan.store_password)
    return Program("store", object_store.gateway_command(folder, port), environment, port=port)


def chain_program(plan: Plan) -> Program:
    folder, port = plan.folder / "chain", plan.ports["chain"]
    command = [sys.executable, "-m", "infra.chain_node", "--folder", str(folder), "--host", HOST, "--port", str(port)]
    named = {name: os.environ[name] for name in (BINARY_ENVIRONMENT,) if name in os.environ}
    return Program("chain", command, named, port=port)


def prefect_program(plan: Plan) -> Program:
    port = plan.ports["prefect"]
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    environment = {
        "PREFECT_HOME": str(plan.folder / "prefect"),
        "PREFECT_API_DATABASE_CONNECTION_URL": plan.database_url("prefect", "asyncpg"),
        "PREFECT_SERVER_API_AUTH_STRING": plan.prefect_login,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_UI_API_URL": plan.api_url,  # otherwise the page in the browser calls port 4200
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_API_URL": plan.api_url,
        "PREFECT_API_AUTH_STRING": plan.prefect_login,
        "DO_NOT_TRACK": "1",
    }
    return Program("prefect", command, environment, port=port)


def worker_program(plan: Plan, host: str, actors: list[str]) -> Program:
    """The worker of a host: the very command that it would run itself; all else is in the homes of its actors."""
    pool = "publisher" if host == "publisher" else "miners"
    queues = [flag for actor in actors for flag in ("--work-queue", actor)]
    flags = ["--pool", pool, *queues, "--name", host, "--type", "healchain"]
    environment = {"PREFECT_HOME": str(plan.home(actors[0]) / "prefect"), "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    if actors != [host]:
        flags += ["--limit", str(SHARED_STEPS)]
        environment["HEALCHAIN_HOME"] = str(plan.home(host).parent)
    return Program(f"worker-{host}", [sys.executable, "-m", "prefect", "worker", "start", *flags], environment)
