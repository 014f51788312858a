"""The processes of a server of edge devices: `healchain edge up`, under the supervision of infra.supervision.

    prefect   unless PREFECT_API_URL names a server     broker    unless HEALCHAIN_EDGE_BROKER=none
    gateway   routes, MQTT bridge, metrics              worker    conducts the rounds

Each finds done what is done; the same command completes what a kill has left, and the data stays.
"""

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deployments import register
from infra import edge_server, supervision
from infra.edge_server import EdgeSettings
from infra.profiles import write_profile
from infra.stack import DEFINITIONS, is_answered
from infra.supervision import Program

HOST = "127.0.0.1"
READY_S, PREFECT_READY_S = 60.0, 180.0


@dataclass(frozen=True)
class Plan:
    """prefect_port 0: the server that PREFECT_API_URL names."""

    folder: Path
    settings: EdgeSettings
    host: str
    port: int
    has_ports: bool
    prefect_port: int

    @property
    def api_url(self) -> str:
        return f"http://{HOST}:{self.prefect_port}/api" if self.prefect_port else os.environ["PREFECT_API_URL"]

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


def up(plan: Plan, say: Callable[[str], None]) -> None:
    """Start what is down. PREFECT_API_URL must be plan.api_url in this process. Raises ValueError or supervision.PartFailed."""
    with supervision.alone(plan.folder):
        connections = edge_server.set_up(plan.folder, plan.settings)
        home = plan.folder / "home"
        (home / "prefect").mkdir(mode=0o700, exist_ok=True)
        write_profile(home, plan.api_url, os.environ.get("PREFECT_API_AUTH_STRING", ""))
        supervision.clear(plan.folder)
        supervision.write_programs(plan.folder, programs(plan))
        supervision.start(plan.folder)
        if plan.prefect_port:
            _run(plan, "prefect", lambda: is_answered(f"{plan.api_url}/ready"), PREFECT_READY_S)
            say(f"Prefect: {plan.api_url.removesuffix('/api')}")
        register.register_pools(register.EDGE_POOLS)
        register.register_queue(connections.name, edge_server.home_of(plan.folder).address, register.EDGE_POOLS)
        say(f"flows: {', '.join(register.register_deployments(DEFINITIONS, register.EDGE_POOLS))}")
        if plan.settings.broker != "none":
            _run(plan, "broker", lambda: _listens(plan.settings.mqtt_host, plan.settings.mqtt_port), READY_S)
            say(f"broker: {plan.settings.broker}, port {plan.settings.mqtt_port}")
        _run(plan, "gateway", lambda: is_answered(f"{plan.url}/health"), READY_S)
        say(f"gateway: {plan.url}, {plan.url}/docs" + (f", and ports {plan.settings.ports}" if plan.has_ports else ""))
        supervision.run(plan.folder, "worker")
        say("worker: conducts the rounds")


def _run(plan: Plan, name: str, is_ready: Callable[[], bool], within_s: float) -> None:
    supervision.run(plan.folder, name)
    supervision.await_ready(plan.folder, name, is_ready, within_s)


def programs(plan: Plan) -> list[Program]:
    """In the order in which they start."""
    folder = str(plan.folder)
    common = {"DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    ours = {
        **common,
        **edge_server.in_environment(plan.settings),
        "PREFECT_HOME": str(plan.folder / "home" / "prefect"),
    }
    flags = ["--host", plan.host, "--port", str(plan.port), *(["--ports"] if plan.has_ports else [])]
    gateway = [sys.executable, "-m", "infra.edge_gateway", "--folder", folder, *flags]
    broker = [sys.executable, "-m", "infra.edge_broker", "--folder", folder]
    worker = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "edge", "--work-queue", "edge"]
    worker += ["--name", "edge", "--type", "healchain"]
    found = [_prefect(plan, common)] if plan.prefect_port else []
    found += [Program("broker", broker, ours)] if plan.settings.broker != "none" else []
    home = {**ours, "HEALCHAIN_HOME": str(plan.folder / "home")}
    return [*found, Program("gateway", gateway, ours, port=plan.port), Program("worker", worker, home)]


def _prefect(plan: Plan, common: dict[str, str]) -> Program:
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(plan.prefect_port)]
    environment = {
        **common,
        "PREFECT_HOME": str(plan.folder / "prefect"),
        "PREFECT_SERVER_API_PORT": str(plan.prefect_port),
        "PREFECT_SERVER_UI_API_URL": plan.api_url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_API_URL": plan.api_url,
    }
    return Program("prefect", command, environment, port=plan.prefect_port)


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), 2):
            return True
    except OSError:
        return False
