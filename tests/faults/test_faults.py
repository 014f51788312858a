"""What a fleet does, done to a real stack in the middle of a task: nothing is lost, and nothing is done twice.

`make test-faults` runs all of it; the cases marked `main` are among `make test`. Every struck task is held against the
undisturbed one before it: the same model to the bit, the same rewards' sum to the wei, each transaction once, an index that a
rebuild gives again row by row, and no artifact that nobody names.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from contracts.messages import Submission
from tests.faults.stack import REWARD_WEI, Result, StackUnderTest, check, check_alone, task

SEEN_S = 60.0 + 10.0  # a heartbeat may have come just before
pytestmark = [pytest.mark.timeout(1500)]


def struck(stack: StackUnderTest, undisturbed: Result, process: str, call: str, **fault: object) -> Result:
    """A task in which one process is struck at one call, and nobody else notices."""
    with stack.fault(process, call, **fault):  # type: ignore[arg-type]
        begun = stack.begin(task())
        stack.await_strike()
        result = stack.finish(begun)
    check(stack, result, undisturbed)
    assert result.refused == []
    return result


def test_a_task_runs_to_payment_through_the_pools(undisturbed):
    assert undisturbed.status == "PAID"


@pytest.fixture(scope="module")
def twice_struck(stack) -> Result:
    """kill -9 of a miner's worker between two chunks of its ciphertext, then of everything while the sum is opened."""
    with stack.fault("contribute.*miner-2", "tasks.contribute:store_ciphertext", do="kill-worker", when="after"):
        begun = stack.begin(task())
        stack.await_strike()
    with stack.fault("aggregate", "tasks.opening:store_opening", do="wait"):
        stack.await_strike()
        stack.power_cut()
        stack.up()
        stack.go_on()
        return stack.finish(begun)


@pytest.mark.main
def test_a_killed_worker_a_power_cut_and_a_cold_start_lose_nothing(stack, twice_struck):
    check_alone(stack, twice_struck)


def test_and_change_nothing(stack, undisturbed, twice_struck):
    check(stack, twice_struck, undisturbed)


@pytest.mark.parametrize(
    ("what", "process", "call", "fault"),
    [
        ("training", "contribute.*miner-2", "tasks.contribute:local_round", {"do": "kill-worker"}),
        (
            "encrypting",
            "contribute.*miner-2",
            "tasks.contribute:store_ciphertext",
            {"do": "kill-worker", "when": "after"},
        ),
        (
            "after the upload, before submitting",
            "contribute.*miner-3",
            "tasks.contribute:put_manifest",
            {"do": "kill-worker", "when": "after"},
        ),
        ("a step alone", "attest.*miner-4", "tasks.attest:check_candidate", {"do": "kill-step"}),
        ("recovering", "aggregate .*", "tasks.opening:store_opening", {"do": "kill-worker"}),
        ("between M5 and M6", "publish.block", "tasks.settle:publish_voted_block.fn", {"do": "kill-worker"}),
        (
            "a sent block",
            "publish.block",
            "contracts.bindings:BlockPublisher.publish_block",
            {"do": "kill-worker", "when": "after"},
        ),
        (
            "the publisher, waiting for the receipt",
            "step faults-",
            "contracts.bindings:HealChainEscrow.publish_task",
            {"do": "kill-worker", "when": "after"},
        ),
        (
            "the publisher, with a task sent",
            "step faults-",
            "contracts.sending:Sender._offer",
            {"do": "kill-worker", "when": "after"},
        ),
    ],
)
def test_a_killed_process_loses_nothing_and_repeats_nothing(stack, undisturbed, what, process, call, fault):
    struck(stack, undisturbed, process, call, **fault)


@pytest.mark.parametrize("part", ["prefect", "postgres", "store", "chain"])
def test_a_killed_server_loses_nothing(stack, undisturbed, part):
    with stack.fault("contribute.*miner-2", "tasks.contribute:store_ciphertext", do="wait"):
        begun = stack.begin(task())
        stack.await_strike()
        stack.kill(part)
        stack.go_on()
        result = stack.finish(begun)
    check(stack, result, undisturbed)


def test_a_host_that_is_away_for_a_round_takes_part_in_the_next(stack, undisturbed):
    """Its worker is stopped during round 1, longer than the timeout, and starts again before round 2."""
    with stack.fault("contribute.*miner-2", "tasks.contribute:local_round", do="wait"):
        begun = stack.begin(task(rounds__contribution_timeout_s=40))
        stack.await_strike()
        stack.stop("worker-miner-2")
        st = stack.station("publisher")
        address = stack.station("miner-2").address
        stack.wait(
            lambda: any(entry[2] == address for entry in stack.result(begun[0]).refused),
            "miner-2 is refused in round 1",
        )
        stack.start("worker-miner-2")
        result = stack.finish(begun)
    assert result.status == "PAID"
    refused = {(number, step) for number, step, actor, _ in result.refused if actor == address}
    assert refused == {(1, "contribute"), (1, "Collection")}  # as the publisher, and as the aggregator has it
    assert st.find(Submission, address, result.task_id, 1) is None
    assert st.find(Submission, address, result.task_id, 2) is not None
    assert address in result.rewards_wei
    assert sum(result.rewards_wei.values()) == REWARD_WEI
    assert stack.index_differences() == {}


def test_a_frozen_host_is_noticed_within_a_minute_and_its_step_begins_again(stack, undisturbed):
    """Nothing of it runs and nothing of it is dead: neither it nor its init can say so. Then it is killed, and comes back."""
    with stack.fault("contribute.*miner-2", "tasks.contribute:local_round", do="wait"):
        begun = stack.begin(task())
        stack.await_strike()
        name = f"M3 contribute · {begun[0]} · round 1 · miner-2"
        group = os.getpgid(stack.pid("worker-miner-2"))
        os.killpg(group, signal.SIGSTOP)
        assert stack.state_of_run(name) == "Running"
        stack.wait(lambda: stack.state_of_run(name) != "Running", "the run is taken from its host", within_s=SEEN_S)
        os.killpg(group, signal.SIGKILL)
        stack.go_on()
        result = stack.finish(begun)
    check(stack, result, undisturbed)
    assert result.refused == []


def test_a_network_cut_between_a_miner_and_the_server(stack, undisturbed):
    """The miner's worker lives in a network of its own; what joins it to the servers is cut for longer than the timeout."""
    stack.stop("worker-miner-3")
    with own_network(stack, "miner-3") as link:
        begun = stack.begin(task(rounds__contribution_timeout_s=40))
        address = stack.station("miner-3").address
        registered = lambda: any(step.step == "form-cohort" for step in stack.steps(begun[0]))  # noqa: E731
        stack.wait(registered, "the cohort is formed")
        link.cut()
        stack.wait(
            lambda: any(entry[2] == address for entry in stack.result(begun[0]).refused),
            "miner-3 is refused in round 1",
        )
        link.mend()
        result = stack.finish(begun)
    stack.start("worker-miner-3")
    assert result.status == "PAID"
    assert sum(result.rewards_wei.values()) == REWARD_WEI
    assert address in result.rewards_wei
    assert stack.index_differences() == {}


def test_a_miner_ten_times_slower_is_waited_for(stack, undisturbed):
    begun = stack.begin(task())
    with slowed(stack, "worker-miner-4", 10):
        result = stack.finish(begun)
    check(stack, result, undisturbed)


def test_a_full_disk_at_a_miner(stack, undisturbed):
    """Its round goes on without it; once there is space, it takes part again."""
    with full_disk(stack.home("miner-5") / "private") as disk:
        begun = stack.begin(task())
        formed = lambda: any(step.step == "form-cohort" for step in stack.steps(begun[0]))  # noqa: E731
        stack.wait(formed, "the cohort is formed")
        disk.fill()
        address = stack.station("miner-5").address
        stack.wait(
            lambda: any(entry[2] == address for entry in stack.result(begun[0]).refused),
            "miner-5 is refused in round 1",
        )
        disk.free()
        result = stack.finish(begun)
    assert result.status == "PAID"
    reasons = {step: reason for _, step, actor, reason in result.refused if actor == address}
    assert "No space left" in reasons["contribute"]
    assert address in result.rewards_wei
    assert sum(result.rewards_wei.values()) == REWARD_WEI


@pytest.mark.skipif(not shutil.which("faketime"), reason="apt-get install -y faketime")
def test_a_clock_that_is_ten_minutes_off(stack, undisturbed):
    for offset in ("-600s", "+600s"):
        stack.stop("worker-miner-1")
        with worker(stack, "miner-1", ["faketime", "-f", offset]):
            result = stack.finish(stack.begin(task()))
        stack.start("worker-miner-1")
        check(stack, result, undisturbed)
        assert result.refused == []


@pytest.mark.main
def test_a_second_worker_for_a_home_does_not_start(stack):
    environment = {**os.environ, "PREFECT_HOME": str(stack.home("miner-1") / "prefect")}
    command = [sys.executable, "-m", "prefect", "worker", "start", "--type", "healchain", "--pool", "miners"]
    done = subprocess.run(
        [*command, "--work-queue", "miner-1"], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert f"is served by process {stack.pid('worker-miner-1')} already" in done.stdout + done.stderr


# ── what is done to the stack ──


@contextmanager
def worker(stack: StackUnderTest, actor: str, before: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The actor's worker, started by hand with something before its command."""
    flags = ["--type", "healchain", "--pool", "miners", "--work-queue", actor, "--name", actor]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    environment = {**kept, "PREFECT_HOME": str(stack.home(actor) / "prefect"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(stack.site), str(Path(__file__).parents[2])])
    log = (stack.folder / "logs" / f"{actor}-by-hand.log").open("ab")
    process = subprocess.Popen(
        [*before, sys.executable, "-m", "prefect", "worker", "start", *flags],
        env=environment,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Link:
    """What joins a network of its own to the servers on the loopback: a relay for each port, over Unix sockets."""

    def __init__(self, folder: Path, ports: list[int]) -> None:
        self.folder, self.ports = folder, ports
        self._outer: list[subprocess.Popen[bytes]] = []
        self.mend()

    def mend(self) -> None:
        self._outer = [
            subprocess.Popen([sys.executable, str(RELAY), f"unix:{self.folder / str(port)}", f"tcp:{port}"])
            for port in self.ports
        ]

    def cut(self) -> None:
        for relay in self._outer:
            relay.kill()
            relay.wait()


RELAY = Path(__file__).parent / "relay.py"


@contextmanager
def own_network(stack: StackUnderTest, actor: str) -> Iterator[Link]:
    """The actor's worker in a network namespace that has nothing but its loopback, and a link to the servers."""
    folder = stack.folder.with_name("link")
    folder.mkdir(exist_ok=True)
    ports = [stack.ports[name] for name in ("prefect", "store", "chain")]
    link = Link(folder, ports)
    inner = " ".join(f"{sys.executable} {RELAY} tcp:{port} unix:{folder / str(port)} &" for port in ports)
    with worker(stack, actor, ["unshare", "--net", "sh", "-c", f'ip link set lo up; {inner} exec "$@"', "sh"]):
        yield link
    link.cut()


@contextmanager
def slowed(stack: StackUnderTest, part: str, factor: int) -> Iterator[None]:
    """All of a part's processes get one slice of time in so many."""
    script = (
        "import os,signal,sys,time\n"
        "group, factor = int(sys.argv[1]), int(sys.argv[2])\n"
        "while True:\n"
        "    os.killpg(group, signal.SIGSTOP); time.sleep(0.05 * (factor - 1))\n"
        "    os.killpg(group, signal.SIGCONT); time.sleep(0.05)\n"
    )
    group = os.getpgid(stack.pid(part))
    brake = subprocess.Popen([sys.executable, "-c", script, str(group), str(factor)])
    try:
        yield
    finally:
        brake.kill()
        brake.wait()
        os.killpg(group, signal.SIGCONT)


class Disk:
    """A small file system of its own under a folder."""

    def __init__(self, folder: Path) -> None:
        self.filler = folder / ".filler"

    def fill(self) -> None:
        with self.filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 12))
            except OSError:
                return

    def free(self) -> None:
        self.filler.unlink()


@contextmanager
def full_disk(folder: Path) -> Iterator[Disk]:
    """The folder on a file system that can be filled; its content is kept before and after."""
    kept = folder.with_name(f"{folder.name}-kept")
    shutil.copytree(folder, kept, dirs_exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=700", "tmpfs", str(folder)], check=True)
    try:
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        yield Disk(folder)
    finally:
        shutil.copytree(folder, kept, dirs_exist_ok=True)
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        shutil.copytree(kept, folder, dirs_exist_ok=True)
