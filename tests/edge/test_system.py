"""All of it as it is run: `healchain edge up`, devices as processes, the module in C, and what is struck in a round."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra import edge_gateway
from infra.edge_modules import build
from tests.edge.test_broker import free_port
from tests.edge.test_experiment import Aggregator
from tests.infra.test_edge_modules import log_loss, plain

HYPERPARAMS = {"epochs": 5, "lr": 0.5, "batch_size": 8}
DEVICES = ("device-1", "device-2", "device-3")
ROUND_S = 120.0
MODULE_NAME = "registry/logistic:1"


def wait_for(what: Callable[[], Any], why: str, within_s: float = ROUND_S) -> Any:
    deadline = time.monotonic() + within_s
    while not (found := what()):
        assert time.monotonic() < deadline, f"not within {within_s} s: {why}"
        time.sleep(0.1)
    return found


def samples(place: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(place)
    x = rng.normal(size=(20 + 10 * place, 3))
    return x, (x @ np.array([1.0, -2.0, 0.5]) + 0.2 * rng.normal(size=len(x)) > 0).astype(float)


class System:
    """A server of edge devices with its processes, an aggregator that can be broken, and three devices."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.mqtt_port, self.prefect_port = folder / "e", free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.aggregator = ThreadingHTTPServer(("127.0.0.1", 0), Aggregator)
        threading.Thread(target=self.aggregator.serve_forever, daemon=True).start()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
            "HEALCHAIN_EDGE_MQTT_PORT": str(self.mqtt_port),
            "HEALCHAIN_EDGE_BEAT_S": "2",
            "HEALCHAIN_EDGE_AGGREGATOR_URL": f"http://127.0.0.1:{self.aggregator.server_port}",
            "DO_NOT_TRACK": "1",
        }
        self.ports = {part: free_port() for part in edge_gateway.PARTS}
        self.environment |= {f"HEALCHAIN_EDGE_{part.upper()}_PORT": str(port) for part, port in self.ports.items()}
        self.healchain("up", "--port", str(self.port), "--prefect-port", str(self.prefect_port), "--ports")
        self.admin_key = (self.folder / "admin-key").read_text()
        self.ask("PUT", f"/modules/{MODULE_NAME}", build.module_path("logistic").read_bytes())
        self.devices = {name: Device(self, place, name) for place, name in enumerate(DEVICES, start=1)}
        wait_for(lambda: self.alive() == set(DEVICES), "all devices alive")

    def healchain(self, *arguments: str) -> str:
        command = [
            sys.executable,
            "-m",
            "infra.cli",
            "edge",
            arguments[0],
            "--folder",
            str(self.folder),
            *arguments[1:],
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.admin_key}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def alive(self) -> set[str]:
        return {one["id"] for one in self.ask("GET", "/devices")["proplets"] if one["alive"]}

    def newest(self) -> int:
        return int(max(self.ask("GET", "/models")["versions"]))

    def experiment(self, round_id: str, **changes: Any) -> int:
        """Ask for one from the newest model; the version that it starts from."""
        version = self.newest()
        asked = {
            "experiment_id": f"exp-{round_id}",
            "round_id": round_id,
            "model_ref": f"fl/models/global_model_v{version}",
            "participants": list(DEVICES),
            "hyperparams": HYPERPARAMS,
            "k_of_n": 3,
            "timeout_s": 100,
            "task_wasm_image": MODULE_NAME,
            **changes,
        }
        assert self.ask("POST", "/fl/experiments", asked)["status"] == "configured"
        return version

    def standing(self, round_id: str) -> dict[str, Any]:
        """Empty while the gateway does not answer, or the round is none."""
        try:
            found: dict[str, Any] = self.ask("GET", f"/fl/rounds/{round_id}/complete")["status"]
        except (urllib.error.URLError, ConnectionError):
            return {}
        return found

    def completed(self, round_id: str) -> dict[str, Any]:
        def ended() -> Any:
            found = self.standing(round_id)
            return found if found.get("completed") else None

        found: dict[str, Any] = wait_for(ended, f"the end of {round_id}")
        return found

    def expected(self, start: dict[str, Any], names: tuple[str, ...] = DEVICES) -> dict[str, Any]:
        """What a plain computation makes of a model in one round."""
        sets = [samples(DEVICES.index(name) + 1) for name in names]
        trained = [plain(x, y, np.array(start["w"]), start["b"], **HYPERPARAMS) for x, y in sets]
        counts = np.array([len(x) for x, _ in sets], dtype=float)
        w = np.array([w for w, _ in trained]).T @ counts / counts.sum()
        return {"w": w, "b": float(np.array([b for _, b in trained]) @ counts / counts.sum())}

    def pid(self, part: str) -> int:
        from infra import supervision

        return next(one.pid for one in supervision.statuses(self.folder) if one.name == part)

    def kill(self, part: str) -> None:
        os.kill(self.pid(part), signal.SIGKILL)

    def close(self) -> None:
        for device in self.devices.values():
            device.process.kill()
        self.healchain("down")
        self.aggregator.shutdown()


class Device:
    """A device as a process of its own, with its samples in a file that stays with it."""

    def __init__(self, system: System, place: int, name: str) -> None:
        x, y = samples(place)
        self.home = system.folder.parent / name
        self.home.mkdir()
        rows = [{"x": row.tolist(), "y": int(label)} for row, label in zip(x, y, strict=True)]
        (self.home / "data.json").write_text(json.dumps({"data": rows, "size": len(rows)}))
        key = system.healchain("register", name, "--url", system.url).strip()
        self.environment = {**os.environ, "HEALCHAIN_DEVICE_KEY": key}
        given = {
            "server": system.url, "mqtt": f"mqtt://127.0.0.1:{system.mqtt_port}", "home": str(self.home / "home"), "id": name,
            "data": str(self.home / "data.json"), "beat-s": "2", "poll-s": "1",
        }  # fmt: skip
        self.flags = [part for flag, value in given.items() for part in (f"--{flag}", value)]
        self.start()

    def start(self, *more: str) -> None:
        command = [sys.executable, "-m", "infra.edge_device", *self.flags, *more]
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with tempfile.TemporaryDirectory(prefix="edge-") as folder:
        made = System(Path(folder))
        try:
            yield made
        finally:
            made.close()


@pytest.fixture(autouse=True)
def _sound(system: System) -> None:
    Aggregator.broken, Aggregator.status, Aggregator.asked = 0, 503, []
    wait_for(lambda: system.alive() == set(DEVICES), "all devices alive")


def check_model(system: System, version: int, expected: dict[str, Any]) -> dict[str, Any]:
    model: dict[str, Any] = system.ask("GET", f"/models/{version}")
    np.testing.assert_allclose(model["w"], expected["w"], rtol=1e-10)
    assert model["b"] == pytest.approx(expected["b"], rel=1e-10)
    return model


@pytest.mark.faults
def test_each_part_answers_on_its_own_port_with_its_own_routes(system):
    def status(part: str, path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{system.ports[part]}{path}", timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    assert [status(part, "/health") for part in edge_gateway.PARTS] == [200] * 5
    asked = {"manager": "/fl/task", "coordinator": "/task", "registry": "/models", "datastore": "/datasets"}
    for part in asked:
        assert {other: status(other, asked[part]) for other in asked} == {
            one: 401 if one == part else 404 for one in asked
        }


def test_two_rounds_with_three_devices_are_a_plain_computation(system):
    assert "3 of 3 devices are alive" in system.healchain("status", "--url", system.url)
    start = system.experiment("two", rounds=2)
    first = system.completed("two")
    assert (first["state"], first["model_version"], first["num_updates"]) == ("COMPLETED", start + 1, 3)
    assert system.completed("two.2")["model_version"] == start + 2
    model = check_model(system, start + 1, system.expected(system.ask("GET", f"/models/{start}")))
    model = check_model(system, start + 2, system.expected(model))
    x, y = (np.concatenate(parts) for parts in zip(*(samples(place) for place in (1, 2, 3)), strict=True))
    assert log_loss(x, y, np.array(model["w"]), model["b"]) < 0.9 * log_loss(x, y, np.zeros(3), 0.0)
    lineage = system.ask("GET", f"/models/{start + 2}/lineage")["lineage"]
    assert [row["version"] for row in lineage[:3]] == [start + 2, start + 1, start]
    assert lineage[0]["metrics"]["loss"] < lineage[1]["metrics"]["loss"]


@pytest.mark.faults
def test_a_broker_that_is_killed_in_a_round_is_not_missed(system):
    stopped = [system.devices[name] for name in DEVICES[1:]]
    for device in stopped:
        os.kill(device.process.pid, signal.SIGSTOP)
    try:
        start = system.experiment("broker")
        wait_for(lambda: system.standing("broker").get("num_updates") == 1, "the first update")
        system.kill("broker")
        time.sleep(1)
    finally:
        for device in stopped:
            os.kill(device.process.pid, signal.SIGCONT)
    assert system.completed("broker")["num_updates"] == 3
    check_model(system, start + 1, system.expected(system.ask("GET", f"/models/{start}")))


def test_a_gateway_that_is_killed_after_the_last_update_loses_nothing(system):
    """The aggregator's first answer is a failure, so that the kill falls between the k-th update and the combination."""
    Aggregator.broken = 1
    start = system.experiment("gateway")
    wait_for(lambda: Aggregator.asked, "the first attempt")
    system.kill("gateway")
    assert system.completed("gateway")["model_version"] == start + 1
    check_model(system, start + 1, system.expected(system.ask("GET", f"/models/{start}")))


@pytest.mark.faults
def test_a_worker_that_is_killed_in_a_round_goes_on(system):
    device = system.devices[DEVICES[2]]
    os.kill(device.process.pid, signal.SIGSTOP)
    try:
        start = system.experiment("worker")
        wait_for(lambda: system.standing("worker").get("num_updates") == 2, "two updates")
        os.killpg(os.getpgid(system.pid("worker")), signal.SIGKILL)
    finally:
        os.kill(device.process.pid, signal.SIGCONT)
    assert system.completed("worker")["model_version"] == start + 1
    check_model(system, start + 1, system.expected(system.ask("GET", f"/models/{start}")))


def test_an_aggregator_that_is_down_leaves_a_warning_and_a_retry_the_right_version(system):
    Aggregator.broken = 3
    start = system.experiment("retried")
    warned = system.completed("retried")
    assert (warned["state"], warned["model_version"]) == ("COMPLETED_WITH_WARNING", None)
    assert system.newest() == start
    assert "retrying" in system.healchain("retry", "retried", "--url", system.url)
    wait_for(lambda: system.standing("retried").get("model_version") == start + 1, "the version of the retry")
    check_model(system, start + 1, system.expected(system.ask("GET", f"/models/{start}")))


@pytest.mark.faults
def test_a_device_that_is_dead_is_not_asked_and_comes_back(system):
    device = system.devices[DEVICES[1]]
    device.kill()
    wait_for(lambda: DEVICES[1] not in system.alive(), "the death of the device")
    start = system.experiment("dead", k_of_n=3, timeout_s=60)
    wait_for(lambda: system.standing("dead").get("num_updates") == 2, "the two that live")
    device.start()
    ended = system.completed("dead")
    assert (ended["reason"], ended["num_updates"]) == ("k", 3)
    check_model(system, start + 1, system.expected(system.ask("GET", f"/models/{start}")))


@pytest.mark.faults
def test_a_device_that_stays_away_is_left_out_at_the_deadline(system):
    device = system.devices[DEVICES[0]]
    device.kill()
    try:
        start = system.experiment("late", timeout_s=12)
        ended = system.completed("late")
        assert (ended["reason"], ended["num_updates"]) == ("timeout", 2)
        check_model(system, start + 1, system.expected(system.ask("GET", f"/models/{start}"), DEVICES[1:]))
    finally:
        device.start()
