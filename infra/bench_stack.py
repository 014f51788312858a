"""The real stack under load: `make bench-stack`. Stacks of their own on free loopback ports, brought up and taken down.

    few       FEW miners, a worker each, a ready task: from its submission to its payment, beside the same in one process
    a step    asked again and again of one warm host, when nothing else runs: where the time goes between question and answer
    many      a hundred miners on one host: encryption, signatures and transactions are real, training is light
    store     what the object store takes: infra.bench_store
    databases what a round leaves behind in Prefect's database and in ours

A part that fails is reported with its log, and the others still run. Times of other programs on the machine are in all figures.
"""

import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from pydantic import SecretStr
from rich.console import Console
from rich.status import Status

from blocks import pools
from blocks.artifacts import ArtifactStore
from blocks.identity import Identity, create_home
from blocks.registry import Registry
from blocks.tables import StepRow
from contracts.messages import ChallengeAnswer
from contracts.task_spec import TaskFile
from infra import bench_store, publishing, stack_plan, stack_usage, supervision
from infra.devstack import give_data
from infra.object_store import free_port
from infra.rows import Row, markdown, marked, refreshed, show
from infra.stack import administered_store, ready_task
from infra.stack_plan import Plan
from infra.stack_usage import Usage
from infra.watching import Watcher
from tasks.dispatch import POLL_S, StepEvent
from tasks.records import record_path

FEW, FEW_TASK, MANY_TASK = 5, "breast-cancer", "digits"
PROBE_ACTOR, PROBE_WORKER = "miner-1", "worker-miner-1"
OVERHEAD_GOAL = "<= 3"  # seconds, of a step on a warm host
PHASES = ("asking", "waiting for the host's look", "start of its process", "the step", "seen by who asked")
"""What a dispatched step consists of: until its run is Scheduled, Pending, Running, Completed, and its record is read."""
STATES = ("Scheduled", "Pending", "Running", "Completed")
SHOWN_TABLES = 3
COMMAND_S = 3600
START = marked("bench-stack")


class PartFailed(RuntimeError):
    """A part of the benchmark did not come to its end; the message has what was printed last."""


@dataclass
class Bench:
    """What was measured so far, and what could not be."""

    console: Console
    rows: list[Row] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def part(self, title: str, work: Callable[[Status], list[Row]], plan: Plan | None = None) -> bool:
        """Do one part and show its rows, or say why there are none; whether it went well."""
        self.console.print(f"{datetime.now():%H:%M:%S} {title}", style="dim")
        try:
            with self.console.status(title) as status:
                rows = work(status)
        except Exception as error:  # whatever it is, the other parts can still be measured
            self.failed.append(title)
            said = "".join(traceback.format_exception(error)) + (_logs(plan) if plan else "")
            self.console.print(f"{title} failed\n{said}", style="red", markup=False, soft_wrap=True)
            return False
        if rows:
            show(rows, self.console)
        self.rows += rows
        return True


@dataclass(frozen=True)
class Ran:
    """A task that was paid. paid_s: when its run ended, in Unix seconds."""

    task_id: str
    submitted_s: float
    paid_s: float
    steps: Sequence[StepRow]
    usage: Sequence[Usage]


# --- stacks -----------------------------------------------------------------------------------------------------------


def healchain(*arguments: str) -> None:
    """Run the command as a user would, with nothing of this process's own Prefect. Raises PartFailed."""
    own = ("PREFECT_", "HEALCHAIN_HOME", "HEALCHAIN_EDGE_", "OMP_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    done = subprocess.run(
        [sys.executable, "-m", "infra.cli", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        check=False,
    )
    if done.returncode:
        raise PartFailed(f"healchain {' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")


@contextmanager
def stack(folder: Path, miners: int, task: str, hosts: int | None = None) -> Iterator[Plan]:
    """A stack on free ports, not yet up; down at the end, whatever happened."""
    plan = stack_plan.open_plan(folder, {part: free_port() for part in stack_plan.DEFAULT_PORTS}, miners, task, hosts)
    try:
        with temporary_settings({PREFECT_API_URL: plan.api_url, PREFECT_API_AUTH_STRING: plan.prefect_login}):
            yield plan
    finally:
        supervision.stop(folder)


def up(plan: Plan) -> list[Row]:
    started = time.monotonic()
    healchain("stack", "up", "--folder", str(plan.folder))
    return [Row(f"a stack of {plan.miners} miners, from nothing to its workers", time.monotonic() - started, "s")]


def _logs(plan: Plan) -> str:
    names = ("prefect", "worker-publisher", f"worker-{list(plan.workers)[1]}")
    return "\n".join(f"{name}:\n{supervision.tail(plan.folder, name)}" for name in names)


class _Counting(Watcher):
    """Says how many steps have ended, not each."""

    def __init__(self, console: Console, status: Status, title: str) -> None:
        super().__init__(console)
        self._status, self._said, self._ended = status, title, 0

    def tell(self, event: StepEvent) -> None:
        self._ended += 1
        number = f", round {event.round_number}" if event.round_number else ""
        self._status.update(f"{self._said}: {self._ended} steps, last {event.step}{number}")


def run_task(plan: Plan, file: TaskFile, console: Console, status: Status) -> Ran:
    """Submit a task to a stack and follow it to its payment. Raises PartFailed when it ends otherwise."""
    home = plan.home("publisher")
    watcher = _Counting(console, status, f"{plan.miners} miners, {file.name}")
    with stack_usage.Watch(plan) as watch:
        submitted_s = time.time()
        task_id, run_id = publishing.submit(home, file)
        ended, reason = publishing.follow(home, task_id, run_id, watcher)
    if ended != "PAID":
        raise PartFailed(f"{task_id}: {ended}, {reason}")
    _, paid_s = states_of(run_id)[-1]
    return Ran(task_id, submitted_s, paid_s, publishing.publisher_of(home).registry.steps(task_id), watch.seen)


# --- few --------------------------------------------------------------------------------------------------------------


def in_process(folder: Path) -> Sequence[StepRow]:
    """The steps of the same task with all parties in one process."""
    healchain("run", FEW_TASK, "--miners", str(FEW), "--out", str(folder))
    task_id = json.loads((folder / "run.json").read_text())["task_id"]
    return Registry(url=SecretStr(f"sqlite:///{folder / 'registry.sqlite'}")).steps(task_id)


def few_rows(ran: Ran, beside: Sequence[StepRow]) -> list[Row]:
    """Of the stack, and of one process where that could be measured."""
    name = f"{FEW} miners, {FEW_TASK}"
    own, other = rounds_of(ran.steps), rounds_of(beside)
    peer = "in one process, first step to last" if beside else None
    return [
        Row(
            f"{name}: submitted to paid",
            ran.paid_s - ran.submitted_s,
            "s",
            None,
            peer,
            span(beside) if beside else None,
        ),
        Row(f"{name}: rounds", len(own), "rounds"),
        Row(
            f"{name}: a round", median_s(own), "s", None, peer and "in one process", median_s(other) if beside else None
        ),
    ]


def rounds_of(steps: Sequence[StepRow]) -> list[tuple[float, float]]:
    """Begin and end of each round in Unix seconds: from its first step asked for, to the one asked for after its aggregate."""
    found = []
    for aggregate in (row for row in steps if row.step == "aggregate"):
        begin = min(row.started_s for row in steps if row.round_number == aggregate.round_number)
        after = [row.started_s for row in steps if row.started_s > aggregate.started_s]
        found.append((begin, min(after, default=aggregate.started_s + aggregate.seconds)))
    return found


def span(steps: Sequence[StepRow]) -> float:
    """Seconds from the begin of the first step to the end of the last."""
    return max(row.started_s + row.seconds for row in steps) - min(row.started_s for row in steps)


def median_s(windows: Sequence[tuple[float, float]]) -> float:
    return statistics.median(last - first for first, last in windows)


# --- a step -----------------------------------------------------------------------------------------------------------


def probe(plan: Plan, task_id: str) -> dict[str, float]:
    """Ask one miner for a step that it has done already, as tasks.dispatch does; seconds by phase."""
    me = Identity(home=str(plan.home(PROBE_ACTOR)))
    store = administered_store(plan)
    asked_s = time.time()
    run = pools.start(
        "prove-dataset/miners",
        PROBE_ACTOR,
        {"task_id": task_id, "round_number": 0, "actor": PROBE_ACTOR},
        key=f"bench/{secrets.token_hex(8)}",
        name=f"bench · {PROBE_ACTOR}",
        tags=[],
    )
    while not (run := pools.look([run.id])[run.id]).has_ended:
        time.sleep(POLL_S)
    if not run.is_done or store.find(me.address, record_path(ChallengeAnswer, task_id, 0)) is None:
        raise PartFailed(f"a step of {PROBE_ACTOR}: {run.state}, {run.message}")
    answered_s = time.time()
    return phases(asked_s, states_of(run.id), answered_s)


def states_of(run_id: UUID) -> list[tuple[str, float]]:
    """The states that a run went through, with their Unix seconds by the server's clock."""
    with get_client(sync_client=True) as client:
        states = client.read_flow_run_states(run_id)
    return sorted(((one.name or "", one.timestamp.timestamp()) for one in states), key=lambda one: one[1])


def phases(asked_s: float, states: Sequence[tuple[str, float]], answered_s: float) -> dict[str, float]:
    """Seconds by phase of a run that went straight through STATES, late or not. Raises ValueError for any other."""
    states = [one for one in states if one[0] != "Late"]
    if tuple(name for name, _ in states) != STATES:
        raise ValueError(f"a run went through {', '.join(name for name, _ in states)}, not {', '.join(STATES)}")
    moments = [asked_s, *(at_s for _, at_s in states), answered_s]
    return dict(zip(PHASES, (last - first for first, last in pairwise(moments)), strict=True))


def step_rows(measured: Sequence[dict[str, float]]) -> list[Row]:
    """Medians of each phase; the overhead is all of them but the step itself."""
    overhead = statistics.median(sum(one.values()) - one["the step"] for one in measured)
    name = "a dispatched step on a warm host"
    rows = [Row(f"{name}: overhead", overhead, "s", OVERHEAD_GOAL)]
    of_it = [phase for phase in PHASES if phase != "the step"]
    rows += [Row(f"{name}: of it {one}", statistics.median(m[one] for m in measured), "s") for one in of_it]
    return [*rows, Row(f"{name}: the step, begun to ended", statistics.median(m["the step"] for m in measured), "s")]


def cold_start(plan: Plan, task_id: str) -> float:
    """Seconds from the start of a worker to the answer of its first step."""
    supervision.restart(plan.folder, PROBE_WORKER)
    started = time.monotonic()
    probe(plan, task_id)
    return time.monotonic() - started


def host_rows(plan: Plan, task_id: str, steps: int, starts: int) -> list[Row]:
    probe(plan, task_id)
    measured = [probe(plan, task_id) for _ in range(steps)]
    memory = stack_usage.memory_mib(plan, PROBE_WORKER)
    cold = statistics.median(cold_start(plan, task_id) for _ in range(starts))
    return [
        *step_rows(measured),
        Row("a worker's start and its first step", cold, "s"),
        Row("memory of an idle worker with its fork server", memory, "MiB"),
    ]


# --- many -------------------------------------------------------------------------------------------------------------


def light_task(miners: int) -> TaskFile:
    """The ready task on digits with logistic regression on few samples of each miner, and few rounds."""
    fields = ready_task(MANY_TASK).model_dump(mode="json")
    fields["required_accuracy"] = 0.2
    fields["participants"] |= {"miners_min": miners, "miners_max": miners}
    fields["rounds"] = {"max_rounds": 3, "contribution_timeout_s": COMMAND_S, "attestation_timeout_s": COMMAND_S}
    fields["dataset"] |= {"samples_min": 5, "challenged_leaves": 4}
    fields["model"] = {"name": "logistic", "options": {}}
    fields["training"] |= {"local_epochs": 1}
    fields["voting"] |= {"tolerance": 1.0, "spot_checks": 1}
    return TaskFile.model_validate(fields)


def prepare(plan: Plan, file: TaskFile) -> None:
    """Homes with keys and few samples each, before the stack gives them more."""
    homes = {actor: plan.home(actor) for actor in plan.actors}
    for home in homes.values():
        create_home(home)
    give_data(homes, file.dataset, file.seed, {})


def many_rows(ran: Ran, miners: int, cores: int) -> list[Row]:
    """Of the first round: how long, how many runs a second, and what the processor was used for."""
    begin, end = rounds_of(ran.steps)[0]
    first, last = stack_usage.moment(ran.usage, begin), stack_usage.moment(ran.usage, end)
    seconds, elapsed_s = stack_usage.spent(first, last), last.at_s - first.at_s
    ended = sum(begin <= row.started_s + row.seconds <= end and row.actor != "publisher" for row in ran.steps)
    name = f"{miners} miners on one host"
    what = stack_usage.bottleneck(seconds, elapsed_s, cores)
    rows = [
        Row(f"{name}: submitted to paid", ran.paid_s - ran.submitted_s, "s"),
        Row(f"{name}: a round", end - begin, "s"),
        Row(f"{name}: dispatched steps of a round", ended, "steps"),
        Row(f"{name}: steps a second", ended / (end - begin), "1/s"),
        Row(f"{name}: processor time of a step, all parts", sum(seconds.values()) / ended, "s"),
    ]
    shares = [
        Row(f"{name}: of {cores} cores, {part}", 100 * used / elapsed_s / cores, "%") for part, used in seconds.items()
    ]
    return [*rows, *shares, Row(f"{name}: bottleneck: {what}", 100 * sum(seconds.values()) / elapsed_s / cores, "%")]


# --- databases --------------------------------------------------------------------------------------------------------


def database_rows(ran: Ran, miners: int) -> list[Row]:
    """Rows and KiB that a round adds, means over all rounds; of Prefect's database also the largest tables."""
    windows = rounds_of(ran.steps)
    first, last = stack_usage.moment(ran.usage, windows[0][0]), stack_usage.moment(ran.usage, windows[-1][1])
    found = []
    for database, shown in (("prefect", SHOWN_TABLES), ("healchain", 0)):
        growth = stack_usage.grown(first, last, database)
        total = {"all tables": stack_usage.in_all(growth.values())}
        for name, table in (total | dict(list(growth.items())[:shown])).items():
            where = f"a round of {miners} miners adds to database {database}, {name}"
            found += [Row(where, table.rows / len(windows), "rows")]
            found += [Row(where, table.size / len(windows) / 1024, "KiB")]
    return found


# --- all --------------------------------------------------------------------------------------------------------------


def measure_few(bench: Bench, folder: Path, *, steps: int, starts: int) -> None:
    """The task in one process first, when nothing else of ours runs; then the stack."""
    beside: list[StepRow] = []

    def alone(_: Status) -> list[Row]:
        beside.extend(in_process(folder / "run"))
        return []

    bench.part("all parties in one process", alone)
    with stack(folder / "few", FEW, FEW_TASK) as plan:
        if not bench.part(f"a stack of {FEW} miners", lambda _: up(plan), plan):
            return
        done: list[Ran] = []

        def task(status: Status) -> list[Row]:
            done.append(run_task(plan, ready_task(FEW_TASK), bench.console, status))
            return [*few_rows(done[0], beside), *database_rows(done[0], FEW)]

        if bench.part(f"a task of {FEW} miners", task, plan):
            bench.part("a step", lambda _: host_rows(plan, done[0].task_id, steps, starts), plan)
        bench.part("the object store", lambda _: bench_store.measure(administered_store(plan), "object store"), plan)
    directory = ArtifactStore(root=str(folder / "directory"))
    bench.part("a directory as store", lambda _: bench_store.measure(directory, "directory"))


def measure_many(bench: Bench, folder: Path, miners: int) -> None:
    with stack(folder / "many", miners, MANY_TASK, hosts=1) as plan:
        file = light_task(miners)

        def begin(status: Status) -> list[Row]:
            prepare(plan, file)
            status.update(f"a stack of {miners} miners")
            return up(plan)

        def task(status: Status) -> list[Row]:
            ran = run_task(plan, file, bench.console, status)
            return [*many_rows(ran, miners, os.cpu_count() or 1), *database_rows(ran, miners)]

        if bench.part(f"homes of {miners} miners", begin, plan):
            bench.part(f"a task of {miners} miners", task, plan)


def run(out: Path, console: Console, *, many: int, quick: bool = False, document: Path | None = None) -> list[str]:
    """Measure, print, write `out`; with a document, write its block of figures again. The parts that failed."""
    bench = Bench(console)
    with tempfile.TemporaryDirectory(prefix="healchain-bench-") as temporary:
        folder = Path(temporary)
        measure_few(bench, folder, steps=3 if quick else 20, starts=1 if quick else 3)
        measure_many(bench, folder, min(many, 10) if quick else many)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([row.record() for row in bench.rows], indent=1))
    if document is not None:
        document.write_text(refreshed(document.read_text(), START, report(bench)))
    return bench.failed


def report(bench: Bench) -> str:
    said = f"{os.cpu_count()} cores; {datetime.now(UTC):%Y-%m-%d}."
    missing = f" Could not be measured: {', '.join(bench.failed)}." if bench.failed else ""
    return f"{said}{missing}\n\n{markdown(bench.rows)}"
