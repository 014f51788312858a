"""The flow over a ledger: rounds by k and by deadline, combinations that fail, and that a killed run goes on."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from blocks.edge_ledger import COMPLETED, FAILED, WARNING, EdgeLedger
from blocks.identity import residents
from blocks.object_store import StoreUnavailable
from deployments.register import EDGE_POOLS, register_pools
from flows.edge import ask_on_schedule, retry_round, run_experiment
from infra import edge_cli
from tasks.edge import experiment, runs
from tasks.edge.combiner import AggregatorAway, decode_answer, encode_job, run_job
from tasks.edge.intake import next_round
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
    assert (row.closed_at - row.started_at).total_seconds() == 2
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


def test_a_step_that_fails_is_done_again_by_its_run(server, monkeypatch):
    """The store is away once, when the model is written."""
    name, real, failures = ask(server), EdgeLedger.complete, [StoreUnavailable("it is away")]

    def away_once(self: EdgeLedger, *given: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(self, *given)

    monkeypatch.setattr(EdgeLedger, "complete", away_once)
    send_when_open(server, UPDATES)
    assert run_experiment.with_options(retry_delay_seconds=0)(name) == COMPLETED
    assert failures == []
    assert [row.version for row in server.ledger.models()] == [0, 1]
    assert server.ledger.experiment(name).ended_at is not None
    model = server.ledger.model(1)
    kept = {path.name for path in Path(server.ledger.store.root).rglob("blobs/*/*")}
    assert kept <= {model.sha256.removeprefix("0x")}


def test_a_late_retry_is_no_base_of_what_follows(server):
    """Round 1 is combined after round 2, and round 3 goes on from round 2."""
    name = ask(server, rounds=3)
    for number, status in ((1, WARNING), (2, COMPLETED)):
        row = open_next(server, name, number, utc_now())
        for one in UPDATES:
            receive(server, {**one, "round_id": row.round_id})
        if status == WARNING:
            server.ledger.end_round(row.round_id, WARNING, "the aggregator was away", utc_now())
        else:
            assert retry_round(row.round_id) == COMPLETED
    assert retry_round("r-1") == COMPLETED
    assert [(row.version, row.round_id) for row in server.ledger.models()] == [(0, None), (1, "r-1.2"), (2, "r-1")]
    assert open_next(server, name, 3, utc_now()).base_version == 1
    assert next_round(server)["new_model_version"] == 1
    assert "training goes on from version 1" in server.ledger.round("r-1").detail


def test_the_clock_starts_when_the_starts_are_out(tmp_path):
    server = make_server(tmp_path, stalled_s=60.0)
    name = ask(server, timeout_s=5)
    server.ledger.beat("a", "alive", utc_now())
    row = open_next(server, name, 1, utc_now())
    distributing = threading.Thread(target=experiment.distribute.fn, args=(row.round_id, "edge"))
    distributing.start()
    while not server.ledger.waiting():
        time.sleep(0.01)
    assert server.ledger.round(row.round_id).started_at is None
    assert server.ledger.close_if_due(row.round_id, utc_now() + timedelta(hours=1)).status == "OPEN"
    sent_at = utc_now()
    server.ledger.mark_sent([one.id for one in server.ledger.unsent()], sent_at)
    distributing.join()
    started = server.ledger.round(row.round_id)
    assert started.started_at >= sent_at
    assert (started.deadline_at - started.started_at).total_seconds() == 5


class Dripping(BaseHTTPRequestHandler):
    """Sends a byte each tenth of a second: each is in time, the whole never is."""

    def do_POST(self) -> None:
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)

    def log_message(self, *_: Any) -> None:
        pass


def test_an_answer_that_never_ends_is_given_up_as_a_whole(tmp_path, monkeypatch):
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Dripping)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    server = make_server(
        tmp_path, aggregator_url=f"http://127.0.0.1:{listening.server_port}", aggregation_timeout_s=0.5
    )
    monkeypatch.setattr(experiment, "ATTEMPTS", 1)
    name = ask(server)
    parts = [Part("a", 1, {"w": np.zeros(3), "b": np.zeros(())})]
    began_s = time.monotonic()
    with pytest.raises(AggregatorAway, match=r"no answer within 0\.5 s"):
        experiment.ask_aggregator(server.pinned, server.request_of(name), parts[0].tensors, {}, parts)
    listening.shutdown()
    assert time.monotonic() - began_s < 30


def test_experiments_of_a_series_follow_each_other_one_at_a_time(server, monkeypatch):
    """Each from the last model, and none while another is under way; a run that begins again goes on with its own."""
    started: list[str] = []
    monkeypatch.setattr(runs, "start_run", lambda *run: started.append(run[1]["experiment_id"]) or "")
    for one in "ab":
        server.ledger.register(one, {}, utc_now())
    asked = {"round_id": "nightly", "participants": ["a", "b"], "k_of_n": 2, "timeout_s": 30}
    first = ask_on_schedule("nightly", asked)
    assert (first.startswith("nightly-"), started) == (True, [first])
    assert ask_on_schedule("nightly", asked) == "SKIPPED"
    for one in UPDATES:
        receive(server, {**one, "round_id": first})
    assert run_experiment(first) == COMPLETED
    second = ask_on_schedule("nightly", asked)
    assert second not in ("SKIPPED", first)
    assert server.ledger.round(second).base_version == 1
    assert started == [first, second]


def test_a_schedule_of_experiments_can_be_paused_and_resumed(tmp_path):
    path = tmp_path / "nightly.json"
    path.write_text(json.dumps({"round_id": "nightly", "rounds": 2}))
    with get_client(sync_client=True) as client, temporary_settings({PREFECT_API_URL: str(client.api_url)}):
        register_pools(EDGE_POOLS)
        assert edge_cli._scheduled(path, "0 3 * * 1", None) == "edge-series/nightly"
        found = client.read_deployment_by_name("edge-series/nightly")
        assert (found.work_pool_name, found.work_queue_name) == ("edge", "edge")
        assert found.parameters == {
            "name": "nightly",
            "experiment": {"round_id": "nightly", "rounds": 2},
            "actor": "edge",
        }
        (times,) = found.schedules
        assert (times.schedule.cron, times.active) == ("0 3 * * 1", True)
    with pytest.raises(ValueError, match="either a cron expression or an interval"):
        edge_cli._scheduled(path, None, None)
    path.write_text('{"rounds": 2}')
    with pytest.raises(ValueError, match="round_id is required"):
        edge_cli._scheduled(path, None, 60)


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
