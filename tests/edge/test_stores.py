"""A round with its rows in PostgreSQL and its bytes on an S3 server: from the request at the gateway to the next version."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from blocks.edge_ledger import COMPLETED
from blocks.identity import residents
from blocks.registry import Registry
from flows.edge import run_experiment
from infra.edge_gateway import Gateway, service
from tests.blocks.object_server import ObjectServer
from tests.edge.world import make_server, plain_mean, put_model, update

WIDTH = 120_000  # numbers: with 17 digits each such an update is larger than what a row takes
ADMIN = "the administrator's key"


@pytest.fixture
def server_of_objects(tmp_path: Path) -> Iterator[ObjectServer]:
    server = ObjectServer(tmp_path / "objects")
    yield server
    server.kill()


@pytest.mark.faults  # two servers are started for it
def test_a_round_on_postgresql_and_s3(tmp_path, postgres_url, server_of_objects):
    store = server_of_objects.store()
    server = make_server(tmp_path, registry=Registry(url=SecretStr(postgres_url)), store=store)
    base = put_model(server, {"w": [0.0] * WIDTH, "b": 0.0})
    asked = TestClient(service(Gateway(server, ADMIN)))
    headers = {"Authorization": f"Bearer {ADMIN}"}
    keys = {one: asked.post("/devices", json={"proplet_id": one}, headers=headers).json()["key"] for one in "ab"}
    reference = f"fl/models/global_model_v{base}"
    request = {
        "round_id": "r-1",
        "participants": ["a", "b"],
        "k_of_n": 2,
        "model_ref": reference,
        "task_wasm_image": "m",
    }
    assert asked.post("/fl/experiments", json=request, headers=headers).status_code == 200
    rng = np.random.default_rng(1)
    numbers = {one: rng.normal(size=WIDTH).tolist() for one in ("first", "a", "b")}
    sent = [
        update(one, w=numbers[one], samples=place, base_model_uri=reference) for place, one in enumerate("ab", start=1)
    ]
    replaced = {**sent[0], "update": {"w": numbers["first"], "b": 1.0}}
    for one in (replaced, *sent):
        answer = asked.post("/update", json=one, headers={"Authorization": f"Bearer {keys[one['proplet_id']]}"})
        assert answer.status_code == 200, answer.text
    assert run_experiment("r-1") == COMPLETED
    found, wanted = asked.get(f"/models/{base + 1}", headers=headers).json(), plain_mean(sent)
    np.testing.assert_allclose(found["w"], wanted["w"], rtol=1e-12)
    held = {row.sha256 for row in server.ledger.updates("r-1")} | {server.ledger.described(base + 1).sha256}
    owner = server.ledger.owner.lower()
    assert {"0x" + name.rpartition("/")[2] for name in store._place.names(f"{owner}/blobs")} == held
    (dropped,) = server.ledger.dropped("r-1")
    assert (dropped.reason, dropped.size_bytes > 2**20) == ("replaced", True)
    assert json.loads(server.ledger.model(base + 1).metrics) == {"loss": 0.5}
    residents.pop("edge", None)
