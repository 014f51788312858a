"""The command itself, killed again and again at its durable writes: it resumes the same task, and does nothing twice."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from prefect.server.api.server import SubprocessASGIServer

from blocks.chain import Chain
from contracts import bindings
from tests.protocol.world import TERMS

# While homes and keys are made; in M2; between the submissions; while the sum is opened; between the votes and the reveals.
KILLED_AT = (16, 94, 44, 50, 80)


pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[subprocess.CompletedProcess[str]], list[dict[str, str]]]:
    """The folder of a task that was killed at each of these points, what each run printed, and what was private then."""
    folder = tmp_path_factory.mktemp("killed")
    task = folder / "task.toml"
    task.write_text(TERMS)
    command = ["run", str(task), "--out", str(folder / "run")]
    printed, private = [], []
    for number, killed_at in enumerate(KILLED_AT):
        killed = [sys.executable, "-m", "tests.protocol.killed", str(killed_at), *command]
        # The second run, which is killed in M1, has a temporary Prefect server of its own; the others share a lasting one.
        printed.append(start(killed, folder, server="" if number == 1 else lasting_server()))
        private.append(secrets_on_disk(folder / "run"))
    printed.append(start([sys.executable, "-m", "infra.cli", *command], folder, server=lasting_server()))
    private.append(secrets_on_disk(folder / "run"))
    return folder, printed, private


def lasting_server() -> str:
    """API address of the Prefect server of this test run."""
    server = SubprocessASGIServer()
    server.start()
    return server.api_url


def start(command: list[str], folder: Path, server: str = "") -> subprocess.CompletedProcess[str]:
    """Run to the end. The output goes to files: a pipe would stay open in what a killed process leaves behind."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"COLUMNS": "120"} | ({"PREFECT_API_URL": server} if server else {})
    printed, errors = folder / "stdout.txt", folder / "stderr.txt"
    with printed.open("w") as out, errors.open("w") as err:
        done = subprocess.run(
            command, env=environment, cwd=Path.cwd(), stdout=out, stderr=err, check=False, timeout=240
        )
    return subprocess.CompletedProcess(command, done.returncode, printed.read_text(), errors.read_text())


def secrets_on_disk(run: Path) -> dict[str, str]:
    """Digests of what must never be made a second time: keys, salts, trained updates, keys derived."""
    names = ("wallet.json", "encryption.json", "prepared.npz", "commitment.json", "dataset-salt")
    files = [path for path in run.glob("actors/**/*") if path.name in names or path.name.endswith("-for")]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_killed_run_leaves_no_server_behind(runs):
    """Prefect's temporary server ends with the process that started it, kill or not."""
    folder, _, _ = runs
    deadline = time.monotonic() + 10
    while (left := servers_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []


def servers_of(folder: Path) -> list[str]:
    """Processes whose environment names this run's Prefect home."""
    wanted, found = f"PREFECT_HOME={folder / 'run' / 'prefect'}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                found.append(process.name)
    return found


def report(folder: Path) -> dict:
    return json.loads((folder / "run" / "report.json").read_text())


def test_every_run_was_killed_but_the_last_which_finished(runs):
    _, printed, _ = runs
    assert [run.returncode for run in printed] == [-signal.SIGKILL] * len(KILLED_AT) + [0], printed[-1].stderr
    assert "Paid" in printed[-1].stdout


def test_nothing_secret_was_made_twice(runs):
    """No second training, salt or key: what was on disk at a kill is there unchanged at the end."""
    _, _, private = runs
    for before, after in pairwise(private):
        assert before.items() <= after.items()
    assert len([name for name in private[-1] if name.endswith("prepared.npz")]) == 5 * len(report_rounds(runs))


def report_rounds(runs) -> list:
    return report(runs[0])["rounds"]


def test_every_transaction_was_sent_once(runs):
    sent = Counter(one["kind"] for one in report(runs[0])["transactions"])
    assert sent == {
        "publishTask": 1,
        "depositStake": 5,
        "closeRegistration": 1,
        "drawAggregator": 1,
        "publishBlock": 1,
        "revealAccuracy": 1,
        "revealScore": 5,
        "distribute": 1,
        "claimTo": 5,
        "withdrawTo": 1,
    }


def test_every_wei_of_the_reward_arrived(runs):
    facts = report(runs[0])
    paid = sum(facts["rewards_wei"].values()) + facts["aggregator_reward_wei"] + facts["refund_wei"]
    assert paid + facts["escrow_left_wei"] == facts["task"]["reward_wei"]
    assert facts["task"]["status"] == "PAID"
    note = json.loads((runs[0] / "run" / "deployment.json").read_text())
    deployment = bindings.Deployment(**note)
    chain = Chain(rpc=f"local:{runs[0] / 'run' / 'chain.sqlite'}")
    try:
        assert chain.web3.eth.get_balance(deployment.escrow) == 0
        assert chain.web3.eth.get_balance(deployment.rewards) == 0
    finally:
        chain.close()


def test_the_same_command_again_changes_nothing(runs):
    folder, _, _ = runs
    before = report(folder)
    again = start(
        [sys.executable, "-m", "infra.cli", "run", str(folder / "task.toml"), "--out", str(folder / "run")], folder
    )
    assert again.returncode == 0, again.stderr
    assert "is finished; --again starts a new one" in again.stdout
    after = report(folder)
    assert after["transactions"] == before["transactions"]
    assert after["model_sha256"] == before["model_sha256"]
    assert secrets_on_disk(folder / "run") == runs[2][-1]


def test_another_task_in_the_same_folder_is_refused(runs):
    folder, _, _ = runs
    other = start([sys.executable, "-m", "infra.cli", "run", "digits", "--out", str(folder / "run")], folder)
    assert other.returncode == 2
    assert "holds another task" in other.stderr


def test_the_output_shows_every_step(runs):
    text = runs[1][-1].stdout
    for step in ("M5 attest", "M6 publish-block", "M7 withdraw", "aggregator's share", "publishTask", "report.html"):
        assert step in text
