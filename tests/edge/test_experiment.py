"""The flow over a ledger: rounds by k and by deadline, combinations that fail, and that a killed run goes on."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.client.orchestration import get_client

from blocks.edge_ledger import COMPLETED, FAILED, WARNING
from blocks.identity import residents
from flows.edge import retry_round, run_experiment
from tasks.edge.combiner import decode_answer, encode_job, run_job
from tasks.edge.server import Server, open_next, start_alive, utc_now
from tasks.learning.combining import NotCombinable, Part, combine
from tests.edge import world
from tests.edge.world import ask, make_server, model_of, plain_mean, receive, update

UPDATES = [update("a", samples=1), update("b", w=(5.0, 6.0, 7.0), b=5.0, samples=3)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    yield make_server(tmp_path)
    residents.pop("edge", None)


def send_when_open(server: Server, updates: list[dict[str, Any]]) -> threading.Thread:
    """Send each update once its round is open."""

    def send() -> None:
        for one in updates:
            while not any(row.round_id == one["round_id"] for row in server.ledger.open_rounds()):
                time.sleep(0.05)
            receive(server, one)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


class Aggregator(BaseHTTPRequestHandler):
    """Another's aggregator, which is `broken` for so many requests, and then answers as the public one does."""

    broken = 0
    status = 503
    asked: list[Any] = []  # noqa: RUF012 - of all requests to the class

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(body)
        if len(type(self).asked) <= type(self).broken:
            self.send_response(type(self).status)
            self.end_headers()
            self.wfile.write(b"Aggregation failed\n")
            return
        mean = plain_mean(body["updates"])
        answer = json.dumps({"w": mean["w"].tolist(), "b": float(mean["b"])}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def aggregator() -> Iterator[str]:
    Aggregator.broken, Aggregator.status, Aggregator.asked = 0, 503, []
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Aggregator)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()


def test_two_rounds_make_two_versions_that_follow_each_other(server):
    name = ask(server, rounds=2)
    second = [{**one, "round_id": "r-1.2", "base_model_uri": "fl/models/global_model_v1"} for one in UPDATES]
    sending = send_when_open(server, [*UPDATES, *second])
    assert run_experiment(name) == COMPLETED
    sending.join()
    assert model_of(server, 1) == model_of(server, 2) == {"w": [4.0, 5.0, 6.0], "b": 4.0}
    assert [(row.version, row.parent, row.round_id) for row in server.ledger.models()] == [
        (0, None, None),
        (1, 0, "r-1"),
        (2, 1, "r-1.2"),
    ]
    assert json.loads(server.ledger.model(1).metrics) == {"loss": 0.5}
    notices = [json.loads(row.payload) for row in server.ledger.unsent() if row.topic == "fl/rounds/next"]
    assert [(one["round_id"], one["new_model_version"]) for one in notices] == [("r-1", 1), ("r-1.2", 2)]
    assert run_experiment(name) == COMPLETED
    assert len(server.ledger.models()) == 3


def test_a_deadline_combines_what_has_come_and_is_exact_to_a_second(server):
    name = ask(server, timeout_s=2)
    sending = send_when_open(server, UPDATES[:1])
    assert run_experiment(name) == COMPLETED
    sending.join()
    row = server.ledger.round("r-1")
    assert (row.reason, row.version) == ("timeout", 1)
    assert (row.closed_at - row.opened_at).total_seconds() == 2
    assert (row.completed_at - row.deadline_at).total_seconds() < 3
    assert model_of(server, 1) == {"w": [1.0, 2.0, 3.0], "b": 1.0}


def test_a_round_without_updates_fails_without_a_version(server):
    name = ask(server, timeout_s=1)
    sending = send_when_open(server, [update("a", samples=0, update={}, error="out of fuel")])
    assert run_experiment(name) == FAILED
    sending.join()
    row = server.ledger.round("r-1")
    assert (row.status, row.version, row.detail) == (FAILED, None, "no update came within 1 s")
    assert [one.version for one in server.ledger.models()] == [0]


def test_an_aggregator_that_is_away_leaves_a_warning_and_a_retry_the_right_version(tmp_path, aggregator):
    server = make_server(tmp_path, aggregator_url=aggregator)
    Aggregator.broken = 3
    name = ask(server)
    sending = send_when_open(server, UPDATES)
    assert run_experiment(name) == WARNING
    sending.join()
    row = server.ledger.round("r-1")
    assert (row.status, row.version, len(Aggregator.asked)) == (WARNING, None, 3)
    assert "2 updates are kept" in row.detail
    assert "HTTP 503" in row.detail
    assert retry_round("r-1") == COMPLETED
    assert server.ledger.round("r-1").version == 1
    assert model_of(server, 1) == {"w": [4.0, 5.0, 6.0], "b": 4.0}


def test_two_failed_attempts_are_not_seen_from_outside(tmp_path, aggregator):
    server = make_server(tmp_path, aggregator_url=aggregator)
    Aggregator.broken = 2
    name = ask(server)
    send_when_open(server, UPDATES)
    assert run_experiment(name) == COMPLETED
    assert len(Aggregator.asked) == 3


def test_an_aggregator_that_finds_an_error_fails_the_round(tmp_path, aggregator):
    server = make_server(tmp_path, aggregator_url=aggregator)
    Aggregator.broken, Aggregator.status = 1, 500
    name = ask(server)
    send_when_open(server, UPDATES)
    assert run_experiment(name) == FAILED
    assert server.ledger.round("r-1").detail == "the aggregator: Aggregation failed"


def test_nobody_there_is_a_warning_too(tmp_path):
    server = make_server(tmp_path, aggregator_url="http://127.0.0.1:1")
    name = ask(server)
    send_when_open(server, UPDATES)
    assert run_experiment(name) == WARNING
    assert "ConnectError" in server.ledger.round("r-1").detail


def test_a_combination_that_takes_too_long_is_ended(tmp_path):
    server = make_server(tmp_path, aggregation_timeout_s=0.001)
    name = ask(server)
    send_when_open(server, UPDATES)
    assert run_experiment(name) == WARNING
    assert "no answer within 0.001 s" in server.ledger.round("r-1").detail
    world.make_server(tmp_path)
    assert retry_round("r-1") == COMPLETED


def test_too_few_for_the_rule_fail_the_round(server):
    name = ask(server, rule="krum", rule_options={"byzantine": 1})
    send_when_open(server, UPDATES)
    assert run_experiment(name) == FAILED
    assert "krum needs at least 5 updates" in server.ledger.round("r-1").detail


def test_fedadam_remembers_its_state_with_the_version(server):
    options = {"learning_rate": 0.1}
    name = ask(server, rounds=2, rule="fedadam", rule_options=options)
    second = [{**one, "round_id": "r-1.2", "base_model_uri": "fl/models/global_model_v1"} for one in UPDATES]
    sending = send_when_open(server, [*UPDATES, *second])
    assert run_experiment(name) == COMPLETED
    sending.join()
    base = {"b": np.zeros(()), "w": np.zeros(3)}
    tensors = [{name: np.asarray(one["update"][name]) for name in base} for one in UPDATES]
    parts = [Part(one["proplet_id"], one["num_samples"], found) for one, found in zip(UPDATES, tensors, strict=True)]
    first, state = combine("fedadam", base, parts, {}, options)
    wanted, _ = combine("fedadam", first, parts, state, options)
    assert model_of(server, 2)["w"] == wanted["w"].tolist()
    assert model_of(server, 2)["w"] != combine("fedadam", first, parts, {}, options)[0]["w"].tolist()


def test_devices_that_beat_are_started_and_one_that_comes_back_too(server):
    name = ask(server)
    for one in "abc":
        server.ledger.register(one, {}, utc_now())
    server.ledger.beat("a", "alive", utc_now())
    server.ledger.beat("b", "unhealthy", utc_now())
    row = open_next(server, name, 1, utc_now())
    assert start_alive(server, row) == 1
    server.ledger.beat("c", "alive", utc_now())
    assert start_alive(server, row) == 1
    assert start_alive(server, row) == 0
    messages = server.ledger.unsent()
    assert [one.topic for one in messages] == ["fl/rounds/start", "control/manager/start", "control/manager/start"]
    start = json.loads(messages[1].payload)
    assert start["proplet_id"] == "a"
    assert start["name"] == "fl-round-r-1-a"
    assert start["env"] == {"ROUND_ID": "r-1", "MODEL_URI": "fl/models/global_model_v0", "HYPERPARAMS": "{}"}


def test_in_open_mode_devices_that_never_beat_are_started(tmp_path):
    server = make_server(tmp_path, is_open=True)
    name = ask(server)
    server.ledger.beat("a", "offline", utc_now())
    row = open_next(server, name, 1, utc_now())
    assert start_alive(server, row) == 2


KILLED = """
import functools, sys
from blocks.identity import Identity, residents
residents["edge"] = Identity(home=sys.argv[1])
from flows.edge import run_experiment
from tasks.edge import experiment
if sys.argv[2]:
    step = getattr(experiment, sys.argv[2])
    real = step.fn
    @functools.wraps(real)
    def die(*args, **options):
        real(*args, **options)
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    step.fn = die
print(run_experiment("r-1"))
"""


@pytest.mark.parametrize(
    "step",
    [pytest.param("distribute", marks=pytest.mark.faults), "combine", pytest.param("store", marks=pytest.mark.faults)],
)
def test_a_run_that_was_killed_goes_on_from_the_ledger(server, step):
    ask(server)
    home = residents["edge"].home
    sending = send_when_open(server, UPDATES)

    with get_client(sync_client=True) as client:  # a server of its own would outlive the process that is killed
        environment = {**os.environ, "PREFECT_API_URL": str(client.api_url)}

    def run(killed_after: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED, home, killed_after]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    assert run(step).returncode == -9
    sending.join()
    done = run("")
    assert done.stdout.strip() == COMPLETED, done.stderr[-2000:]
    assert [row.version for row in server.ledger.models()] == [0, 1]
    assert model_of(server, 1) == {"w": [4.0, 5.0, 6.0], "b": 4.0}
    assert len([row for row in server.ledger.unsent() if row.topic == "fl/rounds/next"]) == 1


numbers = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=2)


@given(st.lists(st.tuples(st.integers(1, 100), numbers), min_size=1, max_size=5))
def test_a_job_is_combined_as_in_this_process(sent):
    base = {"w": np.zeros(2), "state x": np.zeros(())}
    parts = [
        Part(f"d{place}", samples, {"w": np.array(values), "state x": np.array(1.0)})
        for place, (samples, values) in enumerate(sent)
    ]
    model, state = decode_answer(run_job(encode_job("fedavg", {}, base, {}, parts)))
    wanted, _ = combine("fedavg", base, parts)
    assert {name: one.tobytes() for name, one in model.items()} == {name: one.tobytes() for name, one in wanted.items()}
    assert state == {}
    with pytest.raises(NotCombinable, match="needs at least"):
        decode_answer(run_job(encode_job("krum", {"byzantine": 9}, base, {}, parts)))
