"""A consortium on this machine: Prefect's server behind credentials, the S3 server, a node with the contracts, a gateway."""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from blocks.artifacts import ArtifactStore
from blocks.chain import Chain
from blocks.identity import write_secret
from contracts.sending import Sending
from deployments.register import register_deployments, register_pools
from infra import chain_deployment, gateway, joining
from infra.doctor import Finding
from infra.membership import Invitation
from infra.object_store import free_port
from tests.blocks.object_server import ObjectServer
from tests.contracts.anvil import Anvil

ROOT = Path(__file__).parents[2]
PUBLISHER = "0x" + "7" * 40
STEPS = """
deployments:
  - {name: miners, entrypoint: flows.miner.register, work_pool: {name: miners}}
"""


def surroundings(**settings: object) -> dict[str, str]:
    """The environment of a process that knows nothing of the test run's own Prefect."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "HEALCHAIN_"))}
    quiet = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PYTHONPATH": str(ROOT)}
    return {**mine, **quiet, **{name: str(value) for name, value in settings.items()}}


def wait_until(is_so: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.1)


class Process:
    """A service in a process group of its own, with its log."""

    def __init__(self, log: Path, command: list[str], environment: dict[str, str]) -> None:
        self.log, self._command, self._environment = log, command, environment
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.running = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self) -> None:
        if self.running.poll() is None:
            os.killpg(self.running.pid, signal.SIGTERM)
        try:
            self.running.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.running.pid, signal.SIGKILL)
            self.running.wait(10)


def is_answered(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.HTTPError:
        return False


class Consortium:
    """All of it, in `folder`; `secrets` are what must be seen nowhere."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts = ExitStack()
        with self._parts:  # whatever fails, nothing is left running
            self._start()
            self._parts = self._parts.pop_all()

    def _start(self) -> None:
        self.auth = f"operator:{secrets.token_urlsafe(20)}"
        self.api_url = f"http://127.0.0.1:{free_port()}/api"
        self.prefect = self._start_prefect()
        self._parts.callback(self.prefect.stop)
        self.objects = ObjectServer(self.folder / "objects")
        self._parts.callback(self.objects.kill)
        self.root = self.objects.store()
        self.anvil = Anvil(self.folder)
        self._parts.callback(self.anvil.stop)
        self.chain = self._deploy()
        wait_until(lambda: is_answered(f"{self.api_url}/ready"), 120, "Prefect's server")
        self._register()
        self.url = f"http://127.0.0.1:{free_port()}"
        self.gateway_folder = self.folder / "gateway"
        self.gateway = self._start_gateway()
        self._parts.callback(self.gateway.stop)
        wait_until(lambda: is_answered(f"{self.url}/offer"), 120, "the gateway")
        self.secrets = [self.auth.partition(":")[2], self.objects.secret_key]

    def close(self) -> None:
        self._parts.close()

    def _start_prefect(self) -> Process:
        port = str(httpx.URL(self.api_url).port)
        command = [str(Path(sys.executable).parent / "prefect"), "server", "start", "--host", "127.0.0.1"]
        return Process(
            self.folder / "prefect.log",
            [*command, "--port", port],
            surroundings(
                PREFECT_HOME=self.folder / "prefect",
                PREFECT_SERVER_API_PORT=port,
                PREFECT_SERVER_API_AUTH_STRING=self.auth,
            ),
        )

    def _deploy(self) -> Chain:
        me = chain_deployment.open_home(self.folder / "deployer")
        self.anvil.call("anvil_setBalance", me.address, hex(10**20))
        return chain_deployment.deploy(self.anvil.rpc, me, Sending(poll_s=0.02), 3600)

    def api(self) -> Any:
        """The operator's settings of Prefect, for a `with`."""
        return temporary_settings({PREFECT_API_URL: self.api_url, PREFECT_API_AUTH_STRING: self.auth})

    def _register(self) -> None:
        definitions = self.folder / "prefect.yaml"
        definitions.write_text(STEPS)
        with self.api():
            chain_deployment.note(self.chain)
            register_pools()
            register_deployments(definitions)

    def _start_gateway(self) -> Process:
        self.gateway_folder.mkdir()
        settings = {
            "PREFECT_API_URL": self.api_url,
            "PREFECT_API_AUTH_STRING": self.auth,
            "HEALCHAIN_STORE_URL": self.root.root,
            "HEALCHAIN_STORE_ACCESS_KEY": self.objects.access_key,
            "HEALCHAIN_STORE_SECRET_KEY": self.objects.secret_key,
            "HEALCHAIN_PUBLISHERS": PUBLISHER,
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        write_secret(self.gateway_folder / "gateway.env", "\n".join(["# settings", "", *lines]))
        flags = ["--folder", str(self.gateway_folder), "--port", str(httpx.URL(self.url).port)]
        command = [sys.executable, "-m", "infra.cli", "gateway", *flags]
        return Process(self.folder / "gateway.log", command, surroundings())

    def settings(self) -> gateway.Settings:
        return gateway.Settings(self.root, self.api_url, self.auth, self.root.root, (PUBLISHER,))

    def invite(self, name: str, valid_hours: float = 1) -> Invitation:
        invitation = gateway.invite(self.gateway_folder, name, valid_hours)
        self.secrets.append(str(invitation))
        return invitation

    def wish(self, invitation: Invitation, home: Path, **changes: Any) -> joining.Wish:
        return joining.Wish(**{"server": self.url, "invitation": invitation, "home": home, **changes})

    def store(self, address: str, secret_key: str) -> ArtifactStore:
        return ArtifactStore(root=self.root.root, access_key=address.lower(), secret_key=secret_key, patience_s=3)


class Told:
    """What a joining host was told, by the name of the finding."""

    def __init__(self) -> None:
        self.findings: dict[str, Finding] = {}

    def __call__(self, finding: Finding) -> None:
        self.findings[finding.name] = finding

    def __getitem__(self, name: str) -> Finding:
        return self.findings[name]

    @property
    def wrong(self) -> list[str]:
        return [name for name, one in self.findings.items() if one.needed and not one.in_order]
