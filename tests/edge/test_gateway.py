"""The gateway's routes: names, statuses and texts of existing devices, and who may do what."""

import asyncio
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cbor2
import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Failed
from pydantic import SecretStr
from sqlalchemy import event

from blocks.edge_ledger import CLOSED, FAILED, WARNING, EdgeLedger
from blocks.identity import residents
from blocks.registry import Registry, RegistryUnavailable, _engine
from deployments import register
from infra import edge_cli, edge_gateway, edge_server, edge_watch
from infra.edge_gateway import Gateway, service
from infra.stack import DEFINITIONS
from tasks.edge.runs import RUNS_MAX
from tasks.edge.server import server_of, utc_now
from tasks.edge.wire import Refusal
from tests.edge.world import make_server, plain_mean, update

ADMIN = "the administrator's key"
EXPERIMENT = {
    "experiment_id": "exp-1",
    "round_id": "r-1",
    "model_ref": "fl/models/global_model_v0",
    "participants": ["a", "b", "c"],
    "hyperparams": {"epochs": 1, "lr": 0.01, "batch_size": 16},
    "k_of_n": 2,
    "timeout_s": 60,
    "task_wasm_image": "ghcr.io/u/fl-client-wasm:latest",
}


class Asked:
    """A gateway, who asks it, and which flows it has started."""

    def __init__(self, folder: Path, **pinned: Any) -> None:
        self.server = make_server(folder, **pinned)
        self.flows: list[tuple[str, dict[str, Any], str]] = []
        self.gateway = Gateway(self.server, ADMIN, 2**20, self._start)
        self.client = TestClient(service(self.gateway))
        self.keys: dict[str, str] = {"admin": ADMIN}

    def _start(self, *flow: Any) -> str:
        self.flows.append(flow)
        return ""

    def register(self, *names: str) -> None:
        for name in names:
            self.keys[name] = self("POST", "/devices", {"proplet_id": name}).json()["key"]

    def __call__(self, method: str, path: str, body: Any = None, *, by: str | None = "admin", **options: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.keys[by]}"} if by else {}
        headers |= options.pop("headers", {})
        content = {"content": body} if isinstance(body, bytes) else {} if body is None else {"json": body}
        return self.client.request(method, path, headers=headers, **content, **options)

    def open(self, **changes: Any) -> None:
        assert self("POST", "/fl/experiments", {**EXPERIMENT, **changes}).status_code == 200


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Asked]:
    asked = Asked(tmp_path)
    asked.register("a", "b", "c", "stranger")
    yield asked
    residents.pop("edge", None)


@pytest.fixture
def openly(tmp_path: Path) -> Iterator[Asked]:
    yield Asked(tmp_path, is_open=True)
    residents.pop("edge", None)


def test_an_experiment_starts_its_flow_once_and_opens_its_round(ask):
    for _ in range(2):
        answer = ask("POST", "/fl/experiments", EXPERIMENT)
        assert answer.status_code == 200
        assert answer.json() == {"experiment_id": "exp-1", "round_id": "r-1", "status": "configured"}
    assert {flow for flow, _, _ in ask.flows} == {"edge-experiment"}
    assert len({key for _, _, key in ask.flows}) == 1
    assert ask.flows[0][1] == {"experiment_id": "exp-1", "actor": "edge"}
    status = ask("GET", "/fl/rounds/r-1/complete").json()["status"]
    assert {name: status[name] for name in ("round_id", "completed", "num_updates", "k_of_n", "model_version")} == {
        "round_id": "r-1",
        "completed": False,
        "num_updates": 0,
        "k_of_n": 2,
        "model_version": None,
    }


def test_the_coordinator_answers_as_it_ever_did(ask):
    answer = ask(
        "POST", "/experiments", {name: EXPERIMENT[name] for name in ("experiment_id", "round_id", "participants")}
    )
    assert (answer.status_code, answer.json()) == (
        201,
        {"experiment_id": "exp-1", "model_version": 0, "round_id": "r-1", "status": "configured"},
    )
    assert answer.text.endswith("}\n")
    assert ask("GET", "/rounds/r-1/complete").json()["k_of_n"] == 3


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"round_id": ""}, 400, "round_id is required"),
        ({"task_wasm_image": ""}, 400, "task_wasm_image is required for WASM orchestration"),
        ({"participants": []}, 400, "participants list is required for orchestration"),
        ({"participants": ["a", "nobody"]}, 404, "participants: nobody is no known device"),
        ({"model_ref": "fl/models/global_model_v7"}, 404, "no version 7"),
        ({"k_of_n": 4}, 400, "k_of_n = 4"),
        ({"rule": "krum", "rule_options": {"byzantine": 1}}, 400, "krum needs at least 5 updates"),
        ({"rule": "krum"}, 400, "rule_options.byzantine is missing"),
    ],
)
def test_a_wrong_experiment_is_refused_and_starts_nothing(ask, changes, status, said):
    answer = ask("POST", "/fl/experiments", {**EXPERIMENT, **changes})
    assert answer.status_code == status
    assert said in answer.json()["error"]
    assert ask.flows == []


def test_what_is_no_json_is_refused_in_the_style_of_its_part(ask):
    answer = ask("POST", "/fl/experiments", b"{", headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"][:12]) == (400, "Invalid JSON")
    assert ask("POST", "/fl/experiments", b"{}", headers={"Content-Type": "text/plain"}).status_code == 400
    answer = ask("POST", "/update", b"{", by="a")
    assert (answer.status_code, answer.text[:13], answer.headers["content-type"]) == (
        400,
        "Invalid JSON:",
        "text/plain; charset=utf-8",
    )
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_another_request_of_the_same_name_is_a_conflict(ask):
    ask.open()
    assert ask("POST", "/fl/experiments", {**EXPERIMENT, "k_of_n": 3}).status_code == 409
    assert ask("POST", "/fl/experiments", {**EXPERIMENT, "experiment_id": "exp-2"}).status_code == 409
    assert ask("GET", "/fl/rounds/r-1/complete").json()["status"]["k_of_n"] == 2


def test_a_flow_that_cannot_be_started_opens_no_round(ask):
    def away(*_: Any) -> None:
        raise Refusal(503, "Prefect's API does not answer")

    ask.gateway.start_flow = away
    assert ask("POST", "/fl/experiments", EXPERIMENT).status_code == 503
    assert ask("GET", "/rounds/r-1/complete").status_code == 404
    ask.gateway.start_flow = lambda *_: ""
    ask.open()


def test_without_participants_the_devices_that_are_alive_are_asked(ask):
    for name in ("c", "a"):
        assert ask("POST", f"/devices/{name}/alive", {"status": "alive"}, by=name).status_code == 200
    ask.open(participants=[])
    assert ask("GET", "/fl/experiments/exp-1").json()["experiment"]["participants"] == ["a", "c"]
    ask("POST", "/devices/b/alive", {"status": "alive"}, by="b")
    ask.open(participants=[])


@pytest.mark.parametrize("name", ["00:1a:2b", "a/b", "+", "a#", "", "x" * 129])
def test_a_name_with_a_meaning_for_brokers_is_not_registered(ask, name):
    answer = ask("POST", "/devices", {"proplet_id": name})
    assert (answer.status_code, "1 to 128 of a-z, A-Z, 0-9 and ._@-" in answer.json()["error"]) == (400, True)


def test_a_device_gets_its_task(ask):
    ask.open()
    answer = ask("GET", "/task?round_id=r-1&proplet_id=a", by="a")
    task = answer.json()["task"]
    assert {name: task[name] for name in ("round_id", "model_ref", "config", "hyperparams")} == {
        "round_id": "r-1",
        "model_ref": "fl/models/global_model_v0",
        "config": {"proplet_id": "a"},
        "hyperparams": {"batch_size": 16, "epochs": 1, "lr": 0.01},
    }
    assert ask("GET", "/fl/task?round_id=r-1&proplet_id=a", by="a").json() == answer.json()
    assert ask("GET", "/devices").json()["proplets"][0]["alive"] is True


@pytest.mark.parametrize(
    ("query", "by", "status"),
    [
        ("", "a", 400),
        ("round_id=r-9&proplet_id=a", "a", 404),
        ("round_id=r-1&proplet_id=nobody", "admin", 404),
        ("round_id=r-1&proplet_id=stranger", "stranger", 403),
        ("round_id=r-1&proplet_id=b", "a", 403),
        ("round_id=r-1&proplet_id=a", None, 401),
    ],
)
def test_a_wrong_question_for_a_task_is_refused(ask, query, by, status):
    ask.open()
    assert ask("GET", f"/task?{query}", by=by).status_code == status
    assert ask("GET", f"/fl/task?{query}", by=by).status_code == status


@pytest.mark.parametrize("path", ["/update", "/fl/update"])
def test_updates_are_counted_and_the_kth_closes(ask, path):
    ask.open()
    answer = ask("POST", path, update("a"), by="a")
    assert (answer.status_code, answer.json()) == (200, {"status": "accepted"})
    ask("POST", path, update("a"), by="a")
    assert ask("GET", "/rounds/r-1/complete").json()["num_updates"] == 1
    assert ask("POST", path, update("b"), by="b").status_code == 200
    late = ask("POST", path, update("c"), by="c")
    assert (late.status_code, "round r-1 is closed: enough updates came" in late.text) == (409, True)
    assert ask("POST", path, update("a"), by="a").status_code == 200
    assert ask("GET", "/rounds/r-1/complete").json()["state"] == "CLOSED"


@pytest.mark.parametrize(
    ("body", "by", "status", "said"),
    [
        (update("a", round_id="r-9"), "a", 404, "Round not found"),
        (update("stranger"), "stranger", 403, "no participant"),
        (update("b"), "a", 403, "the key is that of a"),
        (update("a"), None, 401, "no key"),
        (update("a", base_model_uri="fl/models/global_model_v3"), "a", 409, "trains from fl/models/global_model_v0"),
        (update("a", w=[1.0, 2.0]), "a", 400, "update.w has shape [2], the base model has [3]"),
        (update("a", update={"w": [1, 2, 3]}), "a", 400, "update.b is missing"),
        (update("a", samples=0), "a", 400, "num_samples = 0"),
        (update("a", samples=10**12), "a", 400, "num_samples = 1000000000000"),
        (update("a", update={}), "a", 400, "update data is required and cannot be empty"),
        (update("", round_id="r-1"), "a", 400, "proplet_id is required"),
    ],
)
def test_a_wrong_update_is_refused_and_not_counted(ask, body, by, status, said):
    ask.open()
    for path, show in (("/update", lambda answer: answer.text), ("/fl/update", lambda answer: answer.json()["error"])):
        answer = ask("POST", path, body, by=by)
        assert (answer.status_code, said in show(answer)) == (status, True), answer.text
    assert ask("GET", "/rounds/r-1/complete").json()["num_updates"] == 0


def test_cbor_is_taken_on_all_update_routes(ask):
    ask.open(k_of_n=3)
    typed = {"w": cbor2.CBORTag(85, np.array([1, 2, 3], "<f4").tobytes()), "b": 1.0}
    cbor = {"Content-Type": "application/cbor"}
    for sender, path in (("a", "/update"), ("b", "/update_cbor"), ("c", "/fl/update_cbor")):
        body = cbor2.dumps({**update(sender), "update": typed})
        assert ask("POST", path, body, by=sender, headers=cbor).json() == {"status": "accepted"}
    assert ask("GET", "/rounds/r-1/complete").json()["num_updates"] == 3
    assert ask("POST", "/update", b"<x/>", by="a", headers={"Content-Type": "application/xml"}).status_code == 415
    assert (
        ask("POST", "/fl/update_cbor", b"{}", by="a", headers={"Content-Type": "application/json"}).status_code == 400
    )


def test_a_body_that_is_too_large_is_refused(ask):
    ask.open()
    assert ask("POST", "/update", b" " * (2**20 + 1), by="a").status_code == 413
    assert ask("POST", "/fl/update", b" " * (2**20 + 1), by="a").status_code == 413


def test_a_deadline_that_has_passed_is_seen_by_whoever_asks(ask):
    ask.open(timeout_s=1)
    row = ask.server.ledger.start_clock("r-1", utc_now())
    assert ask.server.ledger.close_if_due("r-1", row.deadline_at - timedelta(milliseconds=1)).status == "OPEN"
    while utc_now() < row.deadline_at:
        pass
    assert ask("GET", "/rounds/r-1/complete").json()["reason"] == "timeout"
    late = ask("POST", "/update", update("a"), by="a")
    assert (late.status_code, "its time was over" in late.text) == (409, True)


def unread(ask: Asked, method: str, path: str, by: str | None, said: int = 0) -> int:
    """The status of a request whose body must not be read: whoever reads it ends the test. said: its Content-Length."""
    headers = [(b"content-type", b"application/json")]
    headers += [(b"authorization", f"Bearer {ask.keys[by]}".encode())] if by else []
    headers += [(b"content-length", str(said).encode())] if said else []
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b"", "root_path": ""}
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body is read")

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(ask.client.app({**scope, "http_version": "1.1", "scheme": "http", "server": ("x", 80)}, receive, send))
    return int(sent[0]["status"])


@pytest.mark.parametrize(
    ("method", "path", "by", "said", "status"),
    [
        ("POST", "/update", None, 0, 401),
        ("POST", "/fl/update", "wrong", 0, 401),
        ("POST", "/fl/update_cbor", None, 0, 401),
        ("POST", "/update_cbor", "wrong", 0, 401),
        ("POST", "/update", "a", 2**20 + 1, 413),
        ("POST", "/update", "a", 10**30, 413),
        ("POST", "/update", "stranger", 65_537, 403),
        ("POST", "/devices/a/alive", "b", 0, 403),
        ("POST", "/datasets/a", "b", 0, 403),
        ("PUT", "/modules/x", "a", 0, 403),
        ("POST", "/fl/experiments", "a", 0, 403),
        ("PUT", "/pins/x", "a", 0, 403),
    ],
    ids=str,
)
def test_nothing_is_read_of_who_may_not_send_it(ask, method, path, by, said, status):
    ask.keys["wrong"] = "wrong"
    ask.open()
    assert unread(ask, method, path, by, said) == status


def test_a_stranger_hears_why_and_sends_little(ask):
    ask.open()
    answer = ask("POST", "/update", update("stranger"), by="stranger")
    assert (answer.status_code, "is no participant of round r-1" in answer.text) == (403, True)
    assert ask("POST", "/update", update("stranger", round_id="r-9"), by="stranger").status_code == 404
    assert ask("POST", "/update", b" " * 65_537, by="stranger").status_code == 403


def test_a_database_that_is_away_is_said_within_seconds(ask, monkeypatch):
    monkeypatch.setattr(edge_gateway, "PATIENCE_S", 0.1)
    away = Registry(url=SecretStr("postgresql+psycopg://me:x@127.0.0.1:1/none"))
    server = edge_gateway.impatient(replace(ask.server, ledger=replace(ask.server.ledger, registry=away)))
    assert server.ledger.store.patience_s == 0.1
    client, began_s = TestClient(service(Gateway(server, ADMIN))), time.monotonic()
    answer = client.post("/update", json=update("a"), headers={"Authorization": f"Bearer {ask.keys['a']}"})
    assert (answer.status_code, "a part that is needed is away" in answer.text) == (503, True)
    assert time.monotonic() - began_s < 20  # of the minute that flows wait


def test_a_look_up_that_hangs_is_given_up_and_others_are_served_meanwhile(monkeypatch):
    monkeypatch.setattr(edge_gateway, "LOOK_S", 0.2)
    hanging = threading.Event()

    async def both() -> str:
        asked = asyncio.create_task(edge_gateway.look(hanging.wait))
        other = await edge_gateway.look(lambda: "served")
        assert not asked.done()
        with pytest.raises(Refusal, match="did not answer within") as said:
            await asked
        assert said.value.status == 503
        hanging.set()
        return other

    assert asyncio.run(both()) == "served"


def test_listings_and_metrics_read_no_model(ask):
    ask.open()
    queries: list[str] = []
    engine = _engine(ask.server.ledger.registry.url.get_secret_value(), os.getpid())
    event.listen(engine, "before_cursor_execute", lambda _c, _cursor, query, *_: queries.append(query))
    for path in ("/metrics", "/models", "/models/0/lineage"):
        assert ask("GET", path).status_code == 200
    assert any("edge_models" in query for query in queries)
    assert not any("edge_models.body" in query for query in queries)


def test_more_samples_than_the_server_allows_are_refused(tmp_path):
    asked = Asked(tmp_path, max_samples=100)
    asked.register("a", "b", "c")
    asked.open()
    answer = asked("POST", "/update", update("a", samples=101), by="a")
    assert (answer.status_code, "num_samples = 101: expected an integer from 1 to 100" in answer.text) == (400, True)
    assert asked("POST", "/update", update("a", samples=100), by="a").status_code == 200
    assert asked("POST", "/aggregate", {"updates": [update("a", samples=101)]}).status_code == 400
    residents.pop("edge", None)


def test_a_combination_that_hangs_is_ended(tmp_path):
    asked = Asked(tmp_path, aggregation_timeout_s=0.001)
    answer = asked("POST", "/aggregate", {"updates": [update("a")]})
    assert (answer.status_code, "no answer within 0.001 s" in answer.text) == (503, True)
    residents.pop("edge", None)


def test_experiments_whose_run_has_died_are_ended_and_their_updates_kept(ask):
    ask.open(rounds=3)
    ask("POST", "/update", update("a"), by="a")
    ask.open(experiment_id="exp-2", round_id="r-2")
    ask.flows.clear()
    edge_watch.look(ask.gateway)
    assert {flow[1]["experiment_id"] for flow in ask.flows} == {"exp-1", "exp-2"}
    ask.gateway.start_flow = lambda *_: "its run was cancelled"
    edge_watch.look(ask.gateway)
    kept, empty = ask.server.ledger.round("r-1"), ask.server.ledger.round("r-2")
    assert (kept.status, kept.reason, empty.status, empty.detail) == (
        WARNING,
        "abandoned",
        FAILED,
        "its run was cancelled",
    )
    assert kept.detail.startswith("1 updates are kept")
    assert ask.server.ledger.unended() == []
    late = ask("POST", "/update", update("b"), by="b")
    assert (late.status_code, "nothing conducts it any more" in late.text) == (409, True)
    assert ask("POST", "/fl/experiments", {**EXPERIMENT, "rounds": 3}).status_code == 200
    ask.gateway.start_flow = ask._start
    assert ask("POST", "/fl/rounds/r-1/retry").status_code == 202


def test_a_run_that_has_died_is_followed_by_another_of_the_same_experiment():
    parameters = {"experiment_id": "exp-1", "actor": "edge"}
    with get_client(sync_client=True) as client, temporary_settings({PREFECT_API_URL: str(client.api_url)}):
        register.register_pools(register.EDGE_POOLS)
        register.register_deployments(DEFINITIONS, register.EDGE_POOLS)

        def found_runs() -> list[FlowRun]:
            found = client.read_flow_runs(
                flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=["experiment:exp-1"]))
            )
            return sorted(found, key=lambda run: run.created)

        for _ in range(2):
            assert edge_gateway.start_by_prefect("edge-experiment", parameters, "key") == ""
        assert len(found_runs()) == 1
        for number in range(1, RUNS_MAX):
            client.set_flow_run_state(found_runs()[-1].id, Failed(message=f"failure {number}"), force=True)
            assert edge_gateway.start_by_prefect("edge-experiment", parameters, "key") == ""
            assert len(found_runs()) == number + 1
        client.set_flow_run_state(found_runs()[-1].id, Failed(message="the last"), force=True)
        assert "5 runs of it have ended, the last: Failed the last" in edge_gateway.start_by_prefect(
            "edge-experiment", parameters, "key"
        )
        edge_gateway.start_by_prefect("edge-experiment", parameters, "other")
        client.set_flow_run_state(found_runs()[-1].id, Cancelled(), force=True)
        assert edge_gateway.start_by_prefect("edge-experiment", parameters, "other") == "its run was cancelled"


def test_unknown_rounds_are_404_in_both_styles(ask):
    assert ask("GET", "/rounds/r-9/complete").text.startswith("Round not found")
    answer = ask("GET", "/fl/rounds/r-9/complete")
    assert (answer.status_code, "Round not found" in answer.json()["error"]) == (404, True)


def test_the_next_round_is_told_with_the_open_ones(ask):
    assert ask("GET", "/rounds/next").json() == {
        "message": "No completed rounds found",
        "next_round_available": False,
        "open_rounds": [],
    }
    ask.open()
    assert ask("GET", "/rounds/next", by="a").json()["open_rounds"] == ["r-1"]
    assert ask("GET", "/rounds/next", by="stranger").json()["open_rounds"] == []


def test_models_are_written_once_and_read_bare(ask):
    assert ask("GET", "/models/0").json() == {"b": 0.0, "w": [0.0, 0.0, 0.0]}
    assert ask("POST", "/models", {"version": 0, "model": {"w": [0.0, 0.0, 0.0], "b": 0.0}}).status_code == 201
    assert ask("POST", "/models", {"version": 0, "model": {"w": [1.0]}}).status_code == 409
    assert ask("POST", "/models", {"model": {"w": [1.0]}}).json() == {"status": "stored", "version": 1}
    assert ask("GET", "/models").json() == {"versions": [0, 1]}
    assert (ask("GET", "/models/x").status_code, ask("GET", "/models/x").text) == (400, "Invalid version\n")
    assert (ask("GET", "/models/7").status_code, ask("GET", "/models/7").text) == (404, "Model not found\n")
    assert ask("GET", "/models/99999999999999999999").status_code == 400
    assert ask("POST", "/models", {"model": {"w": "x"}}, by="a").status_code == 403


def test_a_large_model_is_kept_as_safetensors_and_a_changed_file_is_refused(ask):
    ask.gateway.body_bytes = 2**25
    large = {"w": np.linspace(0, 1, 100_000).tolist()}
    assert ask("POST", "/models", {"model": large}).json()["version"] == 1
    assert ask.server.ledger.model(1).form == "safetensors"
    assert ask("GET", "/models/1").json() == large
    raw = ask("GET", "/models/1?format=safetensors")

    assert hashlib.sha256(raw.content).hexdigest() == raw.headers["x-sha256"]
    for path in Path(ask.server.ledger.store.root).rglob("blobs/*/*"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    answer = ask("GET", "/models/1")
    assert (answer.status_code, answer.text[:18]) == (500, "Invalid model file")


def test_pins_and_lineage(ask):
    ask("POST", "/models", {"model": {"w": [1.0]}})
    assert ask("PUT", "/pins/best", {"version": 0}).json()["version"] == 0
    assert ask("PUT", "/pins/best", {"version": 1}).json()["version"] == 1
    assert ask("GET", "/pins/best", by="a").json()["version"] == 1
    assert ask("POST", "/pins/best/rollback").json()["version"] == 0
    assert ask("POST", "/pins/best/rollback").status_code == 404
    assert ask("PUT", "/pins/best", {"version": 9}).status_code == 404
    assert [row["version"] for row in ask("GET", "/models/1/lineage").json()["lineage"]] == [1]


def test_the_aggregator_answers_as_existing_coordinators_ask(ask):
    updates = [update("a", samples=1), update("b", w=[5.0, 6.0, 7.0], b=5.0, samples=3)]
    answer = ask("POST", "/aggregate", {"updates": updates})
    assert answer.json() == {"w": [4.0, 5.0, 6.0], "b": 4.0}
    assert np.allclose(answer.json()["w"], plain_mean(updates)["w"])
    named = ask("POST", "/aggregate", {"updates": updates, "rule": "median"})
    assert named.json() == {"model": {"w": [3.0, 4.0, 5.0], "b": 3.0}, "state": {}}


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"updates": []}, 400, "No updates provided"),
        ({"updates": [update("a"), update("b", w=[1.0])]}, 400, "updates.1.update.w has shape [1]"),
        ({"updates": [update("a", samples=0)]}, 400, "updates.0.num_samples = 0"),
        ({"updates": [update("a")], "rule": "best"}, 400, "rule 'best'"),
        ({"updates": [update("a")], "rule": "krum", "rule_options": {"byzantine": 1}}, 500, "needs at least 5 updates"),
    ],
)
def test_what_cannot_be_aggregated_is_said(ask, body, status, said):
    answer = ask("POST", "/aggregate", body)
    assert (answer.status_code, said in answer.text) == (status, True), answer.text


def test_data_sets_are_each_device_its_own(ask):
    rows = [{"x": [0.4, 0.8], "y": 0}, {"x": [0.1, 0.2], "y": 1}]
    answer = ask("POST", "/datasets/a", {"data": rows, "size": 99}, by="a")
    assert (answer.status_code, answer.json()) == (201, {"proplet_id": "a", "size": 2, "status": "stored"})
    found = ask("GET", "/datasets/a", by="a").json()
    assert found == {"schema": "fl-demo-dataset-v1", "proplet_id": "a", "data": rows, "size": 2}
    assert ask("GET", "/datasets/a", by="b").status_code == 403
    assert (ask("GET", "/datasets/b", by="b").status_code, ask("GET", "/datasets/b").text) == (
        404,
        "Dataset not found\n",
    )
    assert ask("GET", "/datasets").json() == {"clients": ["a"], "count": 1}
    assert ask("POST", "/datasets/a", {"data": [{"x": ["1"], "y": 0}]}, by="a").status_code == 400


def test_tasks_of_the_manager(ask):
    made = ask("POST", "/tasks", {"name": "job", "image_url": "img", "proplet_id": "a"})
    assert (made.status_code, made.headers["location"]) == (201, f"/tasks/{made.json()['id']}")
    path = made.headers["location"]
    assert ask("POST", f"{path}/start").json() == {"started": True}
    assert ask("GET", path).json()["state"] == 2
    assert ask("POST", f"{path}/stop").json() == {"stopped": True}
    assert ask("GET", f"{path}/results").json() == {"results": None}
    assert [row.topic for row in ask.server.ledger.unsent()] == ["control/manager/start", "control/manager/stop"]
    assert json.loads(ask.server.ledger.unsent()[0].payload)["proplet_id"] == "a"
    assert ask("GET", "/tasks/none").status_code == 404
    assert ask("POST", "/tasks", {"image_url": "img"}).status_code == 400


def test_modules_are_kept_by_name_and_found_by_digest(ask):
    name = "ghcr.io/u/fl-client-wasm:latest"
    stored = ask("PUT", f"/modules/{name}", b"\0asm\1\0\0\0")
    assert stored.status_code == 201
    for asked in (name, stored.json()["sha256"], f"sha256:{stored.json()['sha256']}"):
        found = ask("GET", f"/modules/{asked}", by="a")
        assert (found.content, found.headers["x-sha256"]) == (b"\0asm\1\0\0\0", stored.json()["sha256"])
    ask.open()
    assert (
        ask("GET", "/task?round_id=r-1&proplet_id=a", by="a").json()["task"]["task_wasm_sha256"]
        == stored.json()["sha256"]
    )
    assert ask("PUT", "/modules/x", b"#!/bin/sh").status_code == 400
    assert ask("GET", "/modules/y").status_code == 404


def test_a_retry_starts_a_flow_for_a_round_that_has_ended_and_kept_updates(ask):
    ask.open()
    assert ask("POST", "/fl/rounds/r-1/retry").status_code == 409
    for sender in "ab":
        ask("POST", "/update", update(sender), by=sender)
    assert ask.server.ledger.round("r-1").status == CLOSED
    assert ask("POST", "/fl/rounds/r-1/retry").status_code == 202
    ask.server.ledger.end_round("r-1", WARNING, "the aggregator is away", utc_now())
    status = ask("GET", "/fl/rounds/r-1/complete").json()["status"]
    assert (status["completed"], status["state"], status["detail"]) == (True, WARNING, "the aggregator is away")
    assert ask("POST", "/fl/rounds/r-1/retry", by="a").status_code == 403
    answer = ask("POST", "/fl/rounds/r-1/retry")
    assert (answer.status_code, answer.json()["status"]) == (202, "retrying")
    assert ask.flows[-1][:2] == ("edge-retry", {"round_id": "r-1", "actor": "edge"})
    ask.open(experiment_id="exp-2", round_id="r-2")
    ask.server.ledger.end_round("r-2", FAILED, "no update came", utc_now())
    assert ask("POST", "/fl/rounds/r-2/retry").status_code == 409


ADMINISTERED = [
    ("POST", "/fl/experiments"), ("POST", "/experiments"), ("POST", "/devices"), ("GET", "/devices"), ("POST", "/models"),
    ("PUT", "/pins/x"), ("POST", "/pins/x/rollback"), ("POST", "/aggregate"), ("GET", "/datasets"), ("POST", "/tasks"),
    ("PUT", "/modules/x"), ("POST", "/fl/rounds/r-1/retry"), ("GET", "/tasks/x"), ("POST", "/tasks/x/start"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ADMINISTERED)
def test_what_is_the_administrators_is_nobody_elses(ask, method, path):
    body = None if method == "GET" else {}
    assert ask(method, path, body, by="a").status_code == 403
    assert ask(method, path, body, by=None).status_code == 401
    ask.keys["wrong"] = "wrong"
    assert ask(method, path, body, by="wrong").status_code == 401


def test_in_open_mode_existing_scripts_need_no_key(openly):
    assert openly("POST", "/fl/experiments", EXPERIMENT, by=None).status_code == 200
    assert openly("GET", "/task?round_id=r-1&proplet_id=a", by=None).status_code == 200
    assert openly("POST", "/update", json.dumps(update("a")).encode(), by=None).status_code == 200
    assert openly("POST", "/update", update("stranger"), by=None).status_code == 403
    openly.keys["wrong"] = "wrong"
    assert openly("POST", "/update", update("b"), by="wrong").status_code == 401


def test_each_part_alone_has_its_own_routes(ask):
    def paths(part: str) -> set[str]:
        return set(service(ask.gateway, [part]).openapi()["paths"]) - {"/metrics", "/health"}

    assert paths("coordinator") == {
        "/experiments", "/task", "/update", "/update_cbor", "/rounds/next", "/rounds/{round_id}/complete",
    }  # fmt: skip
    assert paths("aggregator") == {"/aggregate"}
    assert paths("datastore") == {"/datasets", "/datasets/{proplet_id}"}
    alone = TestClient(service(ask.gateway, ["coordinator"]))
    answer = alone.get("/fl/task")
    assert (answer.status_code, answer.text) == (404, "404 page not found\n")
    assert alone.get("/health").json() == {"status": "ok"}
    assert alone.get("/update").status_code == 405
    assert ask("GET", "/health", by=None).json() == {"status": "pass"}


def test_metrics_count_what_happened(ask):
    ask.open()
    ask("POST", "/update", update("a"), by="a")
    ask("POST", "/update", update("stranger"), by="stranger")
    text = ask("GET", "/metrics", by=None).text
    for line in (
        'healchain_edge_updates_total{transport="http"} 1.0',
        'healchain_edge_refusals_total{status="403",transport="http"} 1.0',
        'healchain_edge_rounds{status="OPEN"} 1.0',
        'healchain_edge_devices{state="silent"} 4.0',
        "healchain_edge_model_version 0.0",
    ):
        assert line in text


def test_metrics_say_that_the_database_is_away(ask, monkeypatch):
    def away(_: EdgeLedger) -> None:
        raise RegistryUnavailable("registry: is it running?")

    monkeypatch.setattr(EdgeLedger, "devices", away)
    answer = ask("GET", "/metrics")
    assert (answer.status_code, "away" in answer.text) == (503, True)


def test_prefect_that_is_away_is_said_at_once():
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}),
        pytest.raises(Refusal, match="nothing was started") as said,
    ):
        edge_gateway.start_by_prefect("edge-experiment", {"experiment_id": "exp-1", "actor": "edge"}, "key")
    assert said.value.status == 503


def test_a_gateway_that_begins_again_has_everything(ask, tmp_path):
    ask.open()
    ask("POST", "/update", update("a"), by="a")
    ask("POST", "/models", {"model": {"w": [1.0]}})
    again = TestClient(service(Gateway(server_of("edge"), ADMIN)))
    headers = {"Authorization": f"Bearer {ask.keys['b']}"}
    assert again.get("/rounds/r-1/complete", headers=headers).json()["num_updates"] == 1
    assert again.post("/update", json=update("b"), headers=headers).status_code == 200
    assert again.get("/models", headers=headers).json() == {"versions": [0, 1]}


words = st.text(max_size=12) | st.sampled_from(["r-1", "a", "0", "best", "+", "..", "%00", "x" * 300])
NAMES = [*EXPERIMENT, *update("a"), "version", "model", "updates", "data"]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            words | st.sampled_from([*EXPERIMENT, *update("a"), "version", "model", "updates", "data"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


def nearly(whole: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """With some fields replaced."""
    changes = st.dictionaries(st.sampled_from([*whole]), values, max_size=3)
    return changes.map(lambda one: json.dumps({**whole, **one}).encode())


bodies = st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode())
bodies |= nearly(EXPERIMENT) | nearly(update("a"))
kinds = st.sampled_from(["application/json", "application/cbor", "text/plain", "application/xml", ""])


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_asked_is_answered_and_as_the_openapi_says(ask, data):
    paths = ask.client.app.openapi()["paths"]
    path = data.draw(st.sampled_from(sorted(paths)))
    method = data.draw(st.sampled_from(sorted(paths[path])))
    filled = re.sub(r"\{[^}]*\}", lambda _: quote(data.draw(words), safe="") or "x", path)
    query = {
        name: data.draw(words) for name in data.draw(st.sets(st.sampled_from(["round_id", "proplet_id", "format"])))
    }
    body, kind = (data.draw(bodies), data.draw(kinds)) if method != "get" else (None, "")
    by = data.draw(st.sampled_from(["admin", "a", None]))
    answer = ask(method.upper(), filled, body, by=by, params=query, headers={"Content-Type": kind} if kind else {})
    assert answer.status_code < 500 or (path, answer.status_code) == ("/aggregate", 500)
    if answer.status_code not in (404, 405):  # what was filled in may lead elsewhere
        assert str(answer.status_code) in paths[path][method]["responses"]


def test_the_same_on_postgresql_for_what_it_cannot_keep(tmp_path, postgres_url):
    asked = Asked(tmp_path)
    ledger = replace(asked.server.ledger, registry=Registry(url=SecretStr(postgres_url)))
    asked.gateway.server = replace(asked.server, ledger=ledger)
    client = TestClient(service(asked.gateway))
    headers = {"Authorization": f"Bearer {ADMIN}"}
    assert client.get("/fl/rounds/%00/complete", headers=headers).status_code == 400
    assert client.post("/update", json=update("a\0"), headers=headers).status_code == 400
    assert client.post("/devices", json={"proplet_id": "a", "namespace": "\0"}, headers=headers).status_code == 400
    assert client.post("/devices", json={"proplet_id": "a"}, headers=headers).status_code == 201
    residents.pop("edge", None)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("BEAT_S", "0", "HEALCHAIN_EDGE_BEAT_S: Input should be greater than or equal to 1"),
        ("BROKER", "other", "HEALCHAIN_EDGE_BROKER: String should match"),
        ("AGGREGATOR_URL", "aggregator", r"HEALCHAIN_EDGE_AGGREGATOR_URL: Value error, expected http\(s\)"),
        ("MQTT_CERT", "/nowhere", "HEALCHAIN_EDGE_MQTT_CERT: Value error, no such file"),
        ("TENANT", "a/b", "HEALCHAIN_EDGE_TENANT: Value error, expected 1 to 128"),
        ("COLOUR", "red", "HEALCHAIN_EDGE_COLOUR: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_setting_is_named(name, value, said):
    with pytest.raises(ValueError, match=said):
        edge_server.read_settings({f"HEALCHAIN_EDGE_{name}": value})


def test_settings_come_through_the_environment():
    settings = edge_server.read_settings({"HEALCHAIN_EDGE_OPEN": "1", "HEALCHAIN_EDGE_MQTT_PORT": "1884", "OTHER": "x"})
    assert (settings.open, settings.mqtt_port) == (True, 1884)
    assert edge_server.read_settings(edge_server.in_environment(settings)) == settings
    assert edge_server.read_settings({}).ports == edge_gateway.PORTS


def test_settings_in_a_file_that_others_can_read_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "edge.env"
    path.write_text("# of this server\nHEALCHAIN_EDGE_BEAT_S=5\n")
    path.chmod(0o644)
    with pytest.raises(ValueError, match="others can read it: chmod 600"):
        edge_cli.take_environment(tmp_path)
    path.chmod(0o600)
    monkeypatch.setenv("HEALCHAIN_EDGE_BEAT_S", "7")
    edge_cli.take_environment(tmp_path)
    assert edge_server.read_settings(os.environ).beat_s == 7
    monkeypatch.delenv("HEALCHAIN_EDGE_BEAT_S")
    edge_cli.take_environment(tmp_path)
    assert edge_server.read_settings(os.environ).beat_s == 5
    monkeypatch.delenv("HEALCHAIN_EDGE_BEAT_S")
