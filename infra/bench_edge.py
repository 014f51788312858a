"""Rounds over many simulated devices: `make bench-edge`. The server is one of its own, on free loopback ports.

    10, 100, 1 000 devices, a round each, in CROWDS client processes (infra.edge_crowd): real keys, broker, gateway, flow and
    combination; only the training is left out, but for one device in a hundred, which runs the module
    phases                          of the time from the request to the new version
    the combined model              compared with plain numpy; another one stops the benchmark
    memory, processor seconds       of each process of the server
    bottleneck                      the longest phase, and the process that used most

Times of other programs on the machine are in all figures. The devices run beside the server and take their part of its cores.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from pydantic import SecretStr
from rich.console import Console
from rich.status import Status

from blocks.artifacts import ArtifactStore
from blocks.edge_ledger import EdgeLedger
from blocks.identity import write_secret
from blocks.registry import Registry
from infra import edge_server, stack_usage, supervision
from infra.bench_stack import Bench, PartFailed, healchain
from infra.edge_crowd import Done, Plan, Report
from infra.edge_modules import build
from infra.object_store import free_port
from infra.rows import Row, markdown, marked, refreshed
from tasks.edge import rounds

SIZES, QUICK_SIZES = (10, 100, 1000), (6,)
CROWDS = 2
WIDTH = 64  # numbers of the model, beside b
MODULE = "registry/logistic:1"
ROUND_S = 1800
READY_S = 600.0
LOOK_S, ASK_S = 0.5, 1.0
NOTICE_S = 2.0  # within which a new version is heard of
PHASES = ("start of its flow", "distribution", "collection", "combination", "storing")
"""They end when its first step runs, the last device hears of its task, the k-th update is in, it is combined, it is stored."""
CROWD = "simulated devices"
WAYS = {"json": "HTTP, JSON", "cbor": "HTTP, CBOR", "mqtt": "MQTT"}
START = marked("bench-edge")
_http = httpx.Client(timeout=READY_S, trust_env=False)


# --- the server -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A running server of edge devices. ports: gateway, mqtt, prefect."""

    folder: Path
    ports: Mapping[str, int]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['gateway']}"

    @property
    def prefix(self) -> str:
        defaults = edge_server.EdgeSettings()
        return rounds.prefix_of(defaults.tenant, defaults.channel)

    @property
    def ledger(self) -> EdgeLedger:
        """To read: nothing is written beside the server."""
        url = SecretStr(f"sqlite:///{self.folder / 'registry.sqlite'}")
        return EdgeLedger(Registry(url=url), ArtifactStore(root=str(self.folder / "store")), "")

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """As the administrator. Raises PartFailed with what the gateway said."""
        headers = {"Authorization": f"Bearer {edge_server.admin_key(self.folder)}"}
        content = {"content": body} if isinstance(body, bytes) else {} if body is None else {"json": body}
        answer = _http.request(method, self.url + path, headers=headers, **content)
        if answer.status_code >= 400:
            raise PartFailed(f"{method} {path}: HTTP {answer.status_code}: {answer.text[:500]}")
        return answer.json()


@contextmanager
def server(folder: Path, broker: str) -> Iterator[Server]:
    """One on free ports, not yet up; down at the end, whatever happened."""
    folder.mkdir(mode=0o700)
    found = Server(folder, {name: free_port() for name in ("gateway", "mqtt", "prefect")})
    settings = {"MQTT_PORT": found.ports["mqtt"], "BROKER": broker}
    lines = [f"{edge_server.PREFIX}{name}={value}" for name, value in settings.items()]
    write_secret(folder / "edge.env", "\n".join(lines) + "\n")
    try:
        yield found
    finally:
        supervision.stop(folder)


def up(found: Server) -> list[Row]:
    """Start it, and give it the module."""
    began_s = time.monotonic()
    ports = ["--port", str(found.ports["gateway"]), "--prefect-port", str(found.ports["prefect"])]
    healchain("edge", "up", "--folder", str(found.folder), *ports)
    found.ask("PUT", f"/modules/{MODULE}", build.module_path("logistic").read_bytes())
    return [Row("a server of edge devices, from nothing to its worker", time.monotonic() - began_s, "s")]


def said(folder: Path) -> str:
    """The last lines of every process."""
    return "\n".join(f"{one.name}:\n{supervision.tail(folder, one.name)}" for one in supervision.statuses(folder))


# --- what it uses -----------------------------------------------------------------------------------------------------


class Usage(threading.Thread):
    """Looks at the processes of a server every LOOK_S while it is entered.

    seconds: of the processor, by program with all that it started; peaks: MiB, by program, of its largest process (VmHWM).
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True, name="usage of a server")
        self._folder, self._ended = folder, threading.Event()
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}

    def run(self) -> None:
        while not self._ended.wait(LOOK_S):
            self._look()

    def __enter__(self) -> "Usage":
        self._first = self._look(is_first=True)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()
        last = self._look()
        self.seconds = {name: last[name] - self._first.get(name, 0.0) for name in last}

    def _look(self, *, is_first: bool = False) -> dict[str, float]:
        table, spent = stack_usage.processes(), {}
        for one in supervision.statuses(self._folder):
            family = stack_usage.family(one.pid, table)
            spent[one.name] = sum(table[pid].seconds for pid in family)
            if is_first:
                for pid in family:
                    forget_peak(pid)
            self.peaks[one.name] = max([self.peaks.get(one.name, 0.0), *map(peak_mib, family)])
        return spent


def peak_mib(pid: int) -> float:
    """The most memory that a process had (VmHWM); 0 for one that has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


def forget_peak(pid: int) -> None:
    """Let VmHWM begin again with what the process has (proc(5), clear_refs)."""
    with suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


# --- the devices ------------------------------------------------------------------------------------------------------


@contextmanager
def crowd(found: Server, round_id: str, keys: Mapping[str, str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Client processes whose devices are connected."""
    placed = [(place, name, key) for place, (name, key) in enumerate(keys.items())]
    running = []
    try:
        for number in range(min(CROWDS, len(placed))):
            plan: Plan = {
                "url": found.url,
                "mqtt_port": found.ports["mqtt"],
                "prefix": found.prefix,
                "beat_s": edge_server.EdgeSettings().beat_s,
                "round_id": round_id,
                "devices": placed[number::CROWDS],
                "watches": number == 0,
            }
            command = [sys.executable, "-m", "infra.edge_crowd"]
            one = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            running.append(one)
            _tell(one, json.dumps(plan))
        for one in running:
            if _hear(one) != "ready":
                raise PartFailed(f"the devices ended before they were connected, exit code {one.wait()}")
        yield running
    finally:
        for one in running:
            one.kill()
            one.wait()


def reports(running: Sequence[subprocess.Popen[str]]) -> list[Report]:
    """What the devices saw; they end."""
    for one in running:
        _tell(one, "end")
    return [json.loads(_hear(one)) for one in running]


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# --- a round ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """A round. moments: Unix seconds, of the request and of the ends of PHASES; received: of each update, by the gateway."""

    devices: int
    ready_s: float
    moments: Sequence[float]
    noticed_s: float
    received: Sequence[float]
    done: Sequence[Done]
    seconds: Mapping[str, float]
    peaks: Mapping[str, float]


def run_round(found: Server, devices: int, status: Status) -> Ran:
    """One round in which every device's update is waited for. Raises PartFailed when one is missing or the model is wrong."""
    round_id = f"of-{devices}"
    base = found.ask("POST", "/models", {"model": {"w": [0.01 * place for place in range(WIDTH)], "b": devices / 7}})
    status.update(f"{devices} devices are registered and connect")
    began_s = time.monotonic()
    keys = {name: found.ask("POST", "/devices", {"proplet_id": name})["key"] for name in names(devices)}
    with crowd(found, round_id, keys) as running:
        await_alive(found, set(keys))
        ready_s = time.monotonic() - began_s
        status.update(f"a round of {devices} devices")
        with Usage(found.folder) as usage:
            asked_s = time.time()
            ask_for(found, round_id, list(keys), base["version"])
            ended = await_end(found, round_id)
            time.sleep(NOTICE_S)
        told = reports(running)
    done = list(chain.from_iterable(one["done"] for one in told))
    if ended["state"] != "COMPLETED" or len(done) != devices:
        failed = list(chain.from_iterable(one["failed"] for one in told))
        raise PartFailed(f"{len(done)} of {devices} devices are done, the round: {ended}; {failed[:5]}")
    check_model(found.ask("GET", f"/models/{ended['model_version']}"), done)
    moments, received = moments_of(found, round_id, asked_s, max(one["heard_s"] for one in done))
    seconds = {**usage.seconds, CROWD: sum(one["cpu_s"] for one in told)}
    noticed_s = max(one["noticed_s"] for one in told)
    return Ran(devices, ready_s, moments, noticed_s, received, done, seconds, usage.peaks)


def names(devices: int) -> list[str]:
    return [f"of-{devices}-{place:04d}" for place in range(devices)]


def ask_for(found: Server, round_id: str, devices: list[str], version: int) -> None:
    asked = {
        "round_id": round_id,
        "model_ref": f"fl/models/global_model_v{version}",
        "participants": devices,
        "k_of_n": len(devices),
        "timeout_s": ROUND_S,
        "task_wasm_image": MODULE,
        "hyperparams": {"epochs": 1, "lr": 0.1, "batch_size": 16},
    }
    found.ask("POST", "/fl/experiments", asked)


def await_alive(found: Server, wanted: set[str]) -> None:
    def is_ready() -> bool:
        alive = {one["id"] for one in found.ask("GET", "/devices")["proplets"] if one["alive"]}
        return wanted <= alive

    _await(is_ready, READY_S, f"{len(wanted)} devices alive")


def await_end(found: Server, round_id: str) -> dict[str, Any]:
    standing: dict[str, Any] = {}

    def is_over() -> bool:
        standing.update(found.ask("GET", f"/fl/rounds/{round_id}/complete")["status"])
        return bool(standing["completed"])

    _await(is_over, ROUND_S + READY_S, f"the end of round {round_id}")
    return standing


def _await(is_so: Callable[[], bool], within_s: float, what: str) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        if time.monotonic() > deadline:
            raise PartFailed(f"not within {within_s:.0f} s: {what}")
        time.sleep(ASK_S)


def check_model(model: Mapping[str, Any], done: Sequence[Done]) -> None:
    """The mean of what the devices sent, weighted by samples, in plain numpy. Raises PartFailed for another model."""
    counts = np.array([one["samples"] for one in done], dtype=float)
    w = counts @ np.array([one["w"] for one in done]) / counts.sum()
    b = counts @ np.array([one["b"] for one in done]) / counts.sum()
    if not (np.allclose(model["w"], w, rtol=1e-10) and np.isclose(model["b"], b, rtol=1e-10)):
        raise PartFailed(f"the combined model is not the mean of {len(done)} updates: b is {model['b']}, expected {b}")


def moments_of(found: Server, round_id: str, asked_s: float, heard_s: float) -> tuple[list[float], list[float]]:
    """The moments of a round in Unix seconds, and when each update was received: from its devices, its flow and the ledger."""
    steps = steps_of(found, round_id)
    round_ = found.ledger.round(round_id)
    assert round_.closed_at is not None
    received = sorted(row.received_at.timestamp() for row in found.ledger.updates(round_id))
    ends = (steps["configure"][0], heard_s, round_.closed_at.timestamp(), steps["combine"][1], steps["store"][1])
    return [asked_s, *ends], received


def steps_of(found: Server, round_id: str) -> dict[str, tuple[float, float]]:
    """Begin and end of the steps of a round's flow, by Prefect, which hears of them a little later."""
    wanted = {step: f"{step} · {round_id}" for step in ("configure", "combine", "store")}
    seen: dict[str, tuple[float, float]] = {}

    def are_known() -> bool:
        asked = {"task_runs": {"name": {"any_": list(wanted.values())}}}
        runs = _http.post(f"http://127.0.0.1:{found.ports['prefect']}/api/task_runs/filter", json=asked).json()
        ended = {run["name"]: (_clock(run["start_time"]), _clock(run["end_time"])) for run in runs if run["end_time"]}
        seen.update({step: ended[name] for step, name in wanted.items() if name in ended})
        return len(seen) == len(wanted)

    _await(are_known, 60, f"the steps of {round_id} in Prefect")
    return seen


def _clock(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


# --- figures ----------------------------------------------------------------------------------------------------------


def rows_of(ran: Ran, cores: int) -> list[Row]:
    name, total_s = f"{ran.devices} devices", ran.moments[-1] - ran.moments[0]
    phases = phases_of(ran.moments)
    span_s = ran.received[-1] - ran.received[0]
    rows = [
        Row(f"{name}: registered, connected and alive", ran.ready_s, "s"),
        Row(f"{name}: from the request to the new version", total_s, "s"),
        *(Row(f"{name}: of it {phase}", seconds, "s") for phase, seconds in phases.items()),
        *notice_rows(name, ran),
        Row(f"{name}: updates a second, first to last", (ran.devices - 1) / span_s if span_s else 0.0, "1/s"),
        *latency_rows(name, ran),
        *(Row(f"{name}: memory peak, {part}", peak, "MiB") for part, peak in ran.peaks.items()),
        *(Row(f"{name}: processor time, {part}", used, "s") for part, used in ran.seconds.items()),
        Row(f"{name}: of them ran the module", sum(one["ran_module"] for one in ran.done), "devices"),
        Row(f"{name}: requests that a device repeated", sum(one["retries"] for one in ran.done), "requests"),
    ]
    return [*rows, Row(f"{name}: bottleneck: {bottleneck(phases, ran.seconds, cores)}", 100 * longest(phases), "%")]


def notice_rows(name: str, ran: Ran) -> list[Row]:
    """None where the notice did not come in time."""
    late_s = ran.noticed_s - ran.moments[-1]
    return [Row(f"{name}: from the new version to its notice at a device", late_s, "s")] if ran.noticed_s else []


def phases_of(moments: Sequence[float]) -> dict[str, float]:
    return dict(zip(PHASES, (last - first for first, last in pairwise(moments)), strict=True))


def longest(phases: Mapping[str, float]) -> float:
    """The share of the longest phase."""
    return max(phases.values()) / sum(phases.values())


def bottleneck(phases: Mapping[str, float], seconds: Mapping[str, float], cores: int) -> str:
    """The longest phase, and what the machine did all the time."""
    phase = max(phases, key=lambda one: phases[one])
    return f"{phase}; {stack_usage.bottleneck(seconds, sum(phases.values()), cores)}"


def latency_rows(name: str, ran: Ran) -> list[Row]:
    """Of what a device waits for: its task, the model, the answer to its update."""
    found = _percentiles(
        f"{name}: task heard of after the request", [one["heard_s"] - ran.moments[0] for one in ran.done]
    )
    found += _percentiles(f"{name}: model fetched", [one["fetch_s"] for one in ran.done])
    for way, shown in WAYS.items():
        times = [one["hand_in_s"] for one in ran.done if one["way"] == way]
        found += _percentiles(f"{name}: update over {shown}", times) if times else []
    return found


def _percentiles(name: str, times: Sequence[float]) -> list[Row]:
    return [Row(f"{name}, p{share}", 1000 * float(np.percentile(times, share)), "ms") for share in (50, 99)]


# --- all --------------------------------------------------------------------------------------------------------------


def run(
    out: Path, console: Console, *, sizes: Sequence[int] = SIZES, broker: str = "amqtt", document: Path | None = None
) -> list[str]:
    """Measure, print, write `out`; with a document, write its block of figures again. The parts that failed."""
    bench = Bench(console)
    with tempfile.TemporaryDirectory(prefix="edge-") as temporary:
        measure(bench, Path(temporary) / "server", sizes, broker)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([row.record() for row in bench.rows], indent=1))
    if document is not None:
        document.write_text(refreshed(document.read_text(), START, report(bench, broker)))
    return bench.failed


def measure(bench: Bench, folder: Path, sizes: Sequence[int], broker: str) -> None:
    """A round of each size, the smallest first; after one that fails no larger one is tried."""
    with server(folder, broker) as found:
        is_well = bench.part(f"a server with {broker}", lambda _: up(found))
        for devices in sizes:

            def round_(status: Status, devices: int = devices) -> list[Row]:
                try:
                    return rows_of(run_round(found, devices, status), os.cpu_count() or 1)
                except Exception as error:
                    raise PartFailed(f"{error}\n{said(folder)}") from error

            is_well = is_well and bench.part(f"a round of {devices} devices", round_)


def report(bench: Bench, broker: str) -> str:
    machine = (
        f"{os.cpu_count()} cores; Python {platform.python_version()}; {datetime.now(UTC):%Y-%m-%d}; broker {broker}."
    )
    missing = f" Could not be measured: {', '.join(bench.failed)}." if bench.failed else ""
    return f"{machine}{missing}\n\n{markdown(bench.rows)}"
