"""The real stack, without its workers: what it lets in, what it keeps through kill -9 and power cuts, what `down` leaves."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import minio
import psycopg
import pytest
from minio.error import S3Error
from urllib3.exceptions import HTTPError
from web3 import Web3

from blocks.connections import connections_of
from blocks.identity import Identity, create_home
from infra import postgres, stack, stack_plan, supervision
from infra.object_store import free_port
from infra.stack_plan import Plan
from infra.supervision import PartFailed, Program

SERVERS = ("postgres", "store", "chain", "prefect")
BACK_S = 40.0  # on two busy cores


@dataclass(frozen=True)
class Kept:
    """One thing in each part."""

    flow_run: str
    transaction: str


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plan]:
    folder = tmp_path_factory.mktemp("stack")
    plan = stack_plan.open_plan(folder, {part: free_port() for part in stack_plan.DEFAULT_PORTS}, 1)
    try:
        stack.up(plan, lambda _: None, stack.SERVERS)
        yield plan
    finally:
        supervision.stop(folder)


@pytest.fixture(scope="module")
def kept(plan: Plan) -> Kept:
    flow = call(plan, "flows/", {"name": "kept"})["id"]
    run = call(plan, "flow_runs/", {"flow_id": flow, "name": "kept", "state": {"type": "SCHEDULED"}})["id"]
    bucket(plan).put_object(stack_plan.BUCKET, "0xkept/note", BytesIO(b"kept"), 4)
    with row(plan) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS kept AS SELECT 17 AS number")
    deployer = Identity(home=str(plan.folder / "deployer"))
    sender = stack.stack_chain(plan).sender(deployer.account, deployer.journal_path)
    receipt = sender.send(b"", to=deployer.address, value_wei=1, purpose="kept")
    return Kept(run, Web3.to_hex(receipt["transactionHash"]))


def call(plan: Plan, path: str, body: Any = None, *, login: str | None = None) -> Any:
    """What Prefect's API says. Raises HTTPError."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{plan.api_url}/{path}", data, {"Content-Type": "application/json"})
    credentials = plan.prefect_login if login is None else login
    if credentials:
        request.add_header("Authorization", f"Basic {b64encode(credentials.encode()).decode()}")
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def bucket(plan: Plan) -> minio.Minio:
    keys = (stack_plan.STORE_USER, plan.store_password)
    return minio.Minio(
        endpoint=f"127.0.0.1:{plan.ports['store']}", access_key=keys[0], secret_key=keys[1], secure=False
    )


def row(plan: Plan) -> "psycopg.Connection[Any]":
    return postgres.connect(plan.ports["postgres"], plan.postgres_password, "healchain")


def assert_all_kept(plan: Plan, kept: Kept) -> None:
    assert call(plan, f"flow_runs/{kept.flow_run}")["name"] == "kept"
    with bucket(plan).get_object(bucket_name=stack_plan.BUCKET, object_name="0xkept/note") as answer:
        assert answer.data == b"kept"
    with row(plan) as connection:
        assert connection.execute("SELECT number FROM kept").fetchone() == (17,)
    assert stack.stack_chain(plan).web3.eth.get_transaction_receipt(kept.transaction)["status"] == 1  # type: ignore[arg-type]


def eventually(check: Callable[[], None]) -> None:
    """Returns when it holds; fails as it failed last."""
    deadline = time.monotonic() + BACK_S
    while True:
        try:
            return check()
        except (AssertionError, OSError, psycopg.Error, HTTPError, S3Error):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def expect(holds: bool) -> None:
    assert holds


def pids(plan: Plan) -> dict[str, int]:
    return {one.name: one.pid for one in supervision.statuses(plan.folder) if one.name in SERVERS}


def healchain(*arguments: object, group: tuple[str, ...] = ("stack",)) -> "subprocess.CompletedProcess[str]":
    """The command as an operator gives it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    command = [sys.executable, "-m", "infra.cli", *group, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_the_api_asks_who_calls(plan: Plan) -> None:
    assert call(plan, "flows/count", {}) >= 0
    for login in ("", "healchain:guess"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            call(plan, "flows/count", {}, login=login)
        assert refused.value.code == 401


def test_the_page_in_the_browser_calls_this_server(plan: Plan) -> None:
    with urllib.request.urlopen(f"{plan.ui_url}/ui-settings", timeout=10) as answer:
        settings = json.load(answer)
    assert settings["api_url"] == plan.api_url
    assert settings["auth"] == "BASIC"
    with urllib.request.urlopen(plan.ui_url, timeout=10) as answer:
        assert b"<title>Prefect Server</title>" in answer.read()


def test_the_database_and_the_store_ask_who_calls(plan: Plan) -> None:
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        postgres.connect(plan.ports["postgres"], "guess")
    with pytest.raises(S3Error, match="AccessDenied"):
        minio.Minio(endpoint=f"127.0.0.1:{plan.ports['store']}", secure=False).list_buckets()


def test_everything_listens_on_the_loopback_only(plan: Plan) -> None:
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines() if line.split()[3] == "0A"]
    addresses = {int(entry[1].split(":")[1], 16): entry[1].split(":")[0] for entry in listening}
    assert {addresses[port] for port in plan.ports.values()} == {"0100007F"}
    v6 = [int(line.split()[1].split(":")[1], 16) for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
    assert not set(plan.ports.values()) & set(v6)


def test_no_secret_is_on_a_command_line_in_a_log_or_readable_by_others(plan: Plan) -> None:
    secrets = [plan.postgres_password, plan.store_password, plan.prefect_password]
    secrets += [
        json.loads((plan.home(actor) / "store-account.json").read_text())["secret_key"] for actor in plan.actors
    ]
    said = "".join(supervision.processes_of(plan.folder).values())
    said += "".join(path.read_text(errors="replace") for path in plan.folder.rglob("*.log*"))
    assert not [secret for secret in secrets if secret in said]
    for path in ("stack.json", "supervisord.conf", "prefect-login", "actors/miner-1/store-account.json"):
        assert (plan.folder / path).stat().st_mode & 0o777 == 0o600
    assert plan.folder.stat().st_mode & 0o777 == 0o700


def test_a_publisher_is_set_up_on_servers_that_run_already(plan: Plan, tmp_path: Path) -> None:
    """With one command: refused without money, then done, then found done."""
    home, folder = tmp_path / "clinic", tmp_path / "gateway"
    folder.mkdir()
    settings = {
        "PREFECT_API_URL": plan.api_url,
        "PREFECT_API_AUTH_STRING": plan.prefect_login,
        "HEALCHAIN_STORE_URL": plan.store_url,
        "HEALCHAIN_STORE_ACCESS_KEY": stack_plan.STORE_USER,
        "HEALCHAIN_STORE_SECRET_KEY": plan.store_password,
        "HEALCHAIN_REGISTRY_URL": plan.database_url("healchain", "psycopg"),
        "HEALCHAIN_PUBLISHERS": create_home(home).address,
    }
    supervision.write_private(folder / "gateway.env", "".join(f"{name}={value}\n" for name, value in settings.items()))
    command = ["publisher", "--home", home, "--folder", folder, "--name", "clinic", "--rpc", plan.rpc]
    without_money = healchain(*command, group=())
    assert without_money.returncode == 2
    address = Identity(home=str(home)).address
    assert f"account {address} has 0 wei" in " ".join(without_money.stderr.split())
    stack.fund(plan, address, 10**18)
    done, again = healchain(*command, group=()), healchain(*command, group=())
    assert (done.returncode, again.returncode) == (0, 0), done.stderr + again.stderr
    assert done.stdout == again.stdout
    assert not [value for name, value in settings.items() if "SECRET" in name and value in done.stdout]
    pinned = connections_of(Identity(home=str(home)))
    assert pinned.store.get(address, pinned.store.put(address, b"terms").sha256) == b"terms"
    assert pinned.registry is not None
    assert [(actor.name, actor.address) for actor in pinned.registry.actors() if actor.name == "clinic"] == [
        ("clinic", address)
    ]
    assert call(plan, "work_pools/publisher/queues/clinic")["description"] == address
    assert call(plan, "deployments/name/run-task/publisher")["work_pool_name"] == "publisher"


def test_up_again_changes_nothing(plan: Plan, kept: Kept) -> None:
    before, addresses = pids(plan), [Identity(home=str(plan.home(actor))).address for actor in plan.actors]
    said: list[str] = []
    stack.up(plan, said.append, stack.SERVERS)
    assert [line.partition(":")[0] for line in said] == [title for title, _ in stack.SERVERS]
    assert pids(plan) == before
    assert [Identity(home=str(plan.home(actor))).address for actor in plan.actors] == addresses
    assert_all_kept(plan, kept)


@pytest.mark.parametrize("part", SERVERS)
def test_a_killed_part_comes_back_with_what_it_kept(plan: Plan, kept: Kept, part: str) -> None:
    killed = pids(plan)[part]
    os.kill(killed, signal.SIGKILL)

    def is_back() -> None:
        assert pids(plan)[part] not in (0, killed)
        assert_all_kept(plan, kept)

    eventually(is_back)


def test_status_and_restart(plan: Plan, kept: Kept) -> None:
    before = pids(plan)
    assert healchain("restart", "store", "--folder", plan.folder).returncode == 0
    after = pids(plan)
    assert {part for part in SERVERS if after[part] != before[part]} == {"store"}
    shown = healchain("status", "--folder", plan.folder).stdout
    for part in SERVERS:
        line = next(line.split() for line in shown.splitlines() if line.startswith(part))
        assert line[:4] == [part, "RUNNING", str(after[part]), str(plan.ports[part])]
    unknown = healchain("restart", "stores", "--folder", plan.folder)
    assert unknown.returncode == 2
    assert "stores: no such part" in unknown.stderr
    eventually(lambda: assert_all_kept(plan, kept))


def test_a_cold_start_after_a_power_cut(plan: Plan, kept: Kept) -> None:
    """supervisord dies; what it left is found and killed with no chance to tidy up; then everything starts cold."""
    before = supervision.processes_of(plan.folder)
    (supervisor,) = [pid for pid, command in before.items() if "supervisor.supervisord" in command]
    os.kill(supervisor, signal.SIGKILL)
    eventually(lambda: expect(supervisor not in supervision.processes_of(plan.folder)))
    orphans = supervision.processes_of(plan.folder)
    assert set(pids(plan).values()) <= {0}
    assert len(orphans) >= len(before) - 1 > len(SERVERS)
    # The pids in the files that are left behind are other programs' when the power is back; this one lives.
    for name in ("supervisord.pid", "postgres/postmaster.pid"):
        _, *others = (plan.folder / name).read_text().splitlines()
        (plan.folder / name).write_text("\n".join([str(os.getpid()), *others]) + "\n")
    stack.up(plan, lambda _: None, stack.SERVERS)
    assert not set(orphans) & set(supervision.processes_of(plan.folder))
    assert_all_kept(plan, kept)


def test_down_ends_what_was_started_in_order_and_nothing_else(plan: Plan, kept: Kept) -> None:
    bystander = subprocess.Popen(
        ["sleep", "60"], cwd=plan.folder / "postgres", env={supervision.MARK: f"{plan.folder}2"}
    )
    try:
        ended = healchain("down", "--folder", plan.folder)
        assert ended.returncode == 0, ended.stderr
        assert supervision.processes_of(plan.folder) == {}
        assert bystander.poll() is None
        assert "database system is shut down" in supervision.tail(plan.folder, "postgres")
        stack_plan.check_ports(plan, [])
        assert supervision.statuses(plan.folder) == []
    finally:
        bystander.kill()
        bystander.wait()


def test_a_taken_port_is_named_with_its_setting(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        taken = other.getsockname()[1]
        ports = {part: free_port() for part in ("prefect", "store", "postgres")}
        plan = stack_plan.open_plan(tmp_path, {**ports, "chain": taken}, 1)
        with pytest.raises(ValueError, match=f"port {taken} for chain: Address already in use. .* --chain-port"):
            stack.up(plan, lambda _: None, stack.SERVERS)
    assert supervision.processes_of(tmp_path) == {}


def test_a_part_that_does_not_start_is_shown_with_its_last_words(tmp_path: Path) -> None:
    supervision.write_programs(tmp_path, [Program("poor", ["sh", "-c", "echo the disk is on fire && exit 3"])])
    try:
        supervision.start(tmp_path)
        supervision.run(tmp_path, "poor")
        with pytest.raises(PartFailed, match=r"(?s)poor ends at its start.*the disk is on fire"):
            supervision.await_ready(tmp_path, "poor", lambda: False, 30)
    finally:
        supervision.stop(tmp_path)
    assert supervision.processes_of(tmp_path) == {}


def test_settings_are_kept_and_wrong_ones_refused(tmp_path: Path) -> None:
    first = stack_plan.open_plan(tmp_path, {"chain": 18545}, 2)
    assert stack_plan.open_plan(tmp_path, {}, None) == first
    grown = stack_plan.open_plan(tmp_path, {"store": 19000}, 3)
    assert (grown.miners, grown.ports["chain"], grown.ports["store"]) == (3, 18545, 19000)
    assert grown.prefect_password == first.prefect_password
    with pytest.raises(ValueError, match="--miners 1: this stack has 3"):
        stack_plan.open_plan(tmp_path, {}, 1)
    with pytest.raises(ValueError, match="two parts cannot have the same"):
        stack_plan.open_plan(tmp_path, {"store": 18545}, None)
    with pytest.raises(ValueError, match="there is no stack; healchain stack up makes one"):
        stack_plan.read_plan(tmp_path / "other")
    assert asdict(stack_plan.read_plan(tmp_path)) == asdict(grown)


def test_one_command_at_a_time(tmp_path: Path) -> None:
    with (
        supervision.alone(tmp_path),
        pytest.raises(ValueError, match="another command starts or ends this stack"),
        supervision.alone(tmp_path),
    ):
        pass


def test_what_supervisord_would_read_as_something_else_is_refused(tmp_path: Path) -> None:
    for value in ('a"b', "a;b", "a\nb", "a\\b"):
        with pytest.raises(ValueError, match="cannot be passed to a program"):
            supervision.write_programs(tmp_path, [Program("p", ["true"], {"NAME": value})])
    with pytest.raises(ValueError, match="bytes too long for the path of a Unix socket"):
        supervision.write_programs(tmp_path / ("a" * 100), [])
