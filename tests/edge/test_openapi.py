"""Whatever is asked of the gateway, it answers as its OpenAPI document says: schemathesis asks each operation.

What it makes up is seldom near to anything right, so half of the bodies are right ones with a field changed, and half of the
names are known ones. The same questions in every run.
"""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, cast

import cbor2
import pytest
import schemathesis
from fastapi import FastAPI, Response
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from blocks.edge_ledger import WARNING
from blocks.identity import residents
from infra import edge_gateway
from infra.edge_gateway import Gateway
from infra.edge_modules import build
from tasks.edge.server import utc_now
from tests.edge.test_gateway import ADMIN, EXPERIMENT, Asked
from tests.edge.world import BASE, update

EXAMPLES = 40  # of each operation
PINS = 30  # so many times a pin can be rolled back
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
# Routes look at the server when they are asked, and the document needs none.
DOCUMENT = edge_gateway.service(Gateway(cast(Any, None), ADMIN)).openapi()
OPERATIONS = sorted((path, method.upper()) for path, found in DOCUMENT["paths"].items() for method in found)
MODULE = "registry/logistic:1"
KNOWN = {"round_id": "r-1", "proplet_id": "a", "experiment_id": "exp-1", "version": "0"}
ROWS = {"data": [{"x": [0.4, 0.8, 0.2], "y": 0}]}
UPDATE = update("a")
NEAR: dict[str, Any] = {
    "/fl/experiments": EXPERIMENT,
    "/experiments": EXPERIMENT,
    "/fl/update": UPDATE,
    "/fl/update_cbor": UPDATE,
    "/update": UPDATE,
    "/update_cbor": UPDATE,
    "/devices": {"proplet_id": "another", "namespace": "default", "metadata": {"os": "linux"}},
    "/tasks": {"name": "a task", "image_url": MODULE, "env": {"A": "1"}, "proplet_id": "a", "file": ""},
    "/models": {"version": 0, "model": BASE},
    "/pins/{name}": {"version": 0},
    "/aggregate": {"updates": [UPDATE, update("b")], "rule": "fedavg", "rule_options": {}},
    "/datasets/{proplet_id}": ROWS,
    "/modules/{name}": build.module_path("logistic").read_bytes(),
}
PRIMITIVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
ANYTHING = st.recursive(
    PRIMITIVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@schemathesis.serializer("application/cbor", "application/cbor-seq")
def _as_cbor(context: schemathesis.SerializationContext, value: Any) -> Any:
    return cbor2.dumps(value)


class World:
    """A gateway that knows three devices, an open round and one with a warning, a module, a task and pins."""

    def __init__(self, asked: Asked) -> None:
        asked.register("a", "b", "c")
        asked.open()
        asked("PUT", f"/modules/{MODULE}", build.module_path("logistic").read_bytes())
        asked("POST", "/datasets/a", ROWS)
        asked("POST", "/models", {"version": 1, "model": {**BASE, "b": 1.0}})
        for place in range(PINS):
            asked("PUT", "/pins/best", {"version": place % 2})
        asked.open(experiment_id="exp-2", round_id="over", k_of_n=1)
        asked("POST", "/update", {**UPDATE, "round_id": "over"})
        asked.server.ledger.end_round("over", WARNING, "the aggregator was away", utc_now())
        task_id = asked("POST", "/tasks", NEAR["/tasks"]).json()["id"]
        self.asked, self.known = asked, {**KNOWN, "task_id": task_id}
        self.schema = schemathesis.openapi.from_asgi("/openapi.json", asked.client.app)

    def name(self, path: str, parameter: str) -> str:
        if parameter == "name":
            return MODULE if path.startswith("/modules") else "best"
        return "over" if path.endswith("/retry") else self.known[parameter]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    yield World(Asked(tmp_path_factory.mktemp("gateway")))
    residents.pop("edge", None)


def changed(data: st.DataObject, body: Any) -> Any:
    """A right body, or one that is cut, or with a field that is missing or anything at all."""
    if isinstance(body, bytes):
        return body[: data.draw(st.sampled_from([None, 3]))]
    field, how = data.draw(st.sampled_from(sorted(body))), data.draw(st.sampled_from(["right", "missing", "anything"]))
    rest = {name: value for name, value in body.items() if name != field}
    return {"right": lambda: body, "missing": lambda: rest, "anything": lambda: rest | {field: data.draw(ANYTHING)}}[
        how
    ]()


def ask(world: World, path: str, case: schemathesis.Case, data: st.DataObject) -> Any:
    if path in NEAR and data.draw(st.booleans(), label="a body near to a right one"):
        case.body = changed(data, NEAR[path])
    if case.path_parameters and data.draw(st.booleans(), label="known names"):
        case.path_parameters = {one: world.name(path, one) for one in case.path_parameters}
    if path.endswith("/task") and data.draw(st.booleans(), label="known names"):
        case.query = {"round_id": "r-1", "proplet_id": "a"}
    who = data.draw(st.sampled_from(["admin", "admin", "a", None]))
    return case.call(headers={"Authorization": f"Bearer {world.asked.keys[who]}"} if who else {})


def right(world: World, path: str, operation: Any) -> schemathesis.Case:
    """A question to which nothing is wrong: drawn ones are sometimes all refused."""
    names = {one: world.name(path, one) for one in re.findall(r"{(.*?)}", path)}
    kinds = list(operation.get_request_payload_content_types())
    body = {"body": NEAR[path], "media_type": kinds[0]} if kinds and path in NEAR else {}
    query = {"query": {"round_id": "r-1", "proplet_id": "a"}} if path.endswith("/task") else {}
    return operation.Case(path_parameters=names, **query, **body)


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_answer_is_a_documented_one(world, path, method):
    operation = world.schema[path][method]

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(), data=st.data())
    def answers(case: schemathesis.Case, data: st.DataObject) -> None:
        answer = ask(world, path, case, data)
        assert answer.status_code < 500 or answer.status_code == 503
        case.validate_response(answer, checks=CHECKS)

    case = right(world, path, operation)
    answer = case.call(headers={"Authorization": f"Bearer {ADMIN}"})
    assert answer.status_code < 300, answer.text
    case.validate_response(answer, checks=CHECKS)
    answers()


@pytest.mark.parametrize(
    ("status", "kind", "is_documented"),
    [(200, "application/json", True), (418, "application/json", False), (200, "text/html", False)],
)
def test_an_answer_that_a_document_does_not_know_is_found(status, kind, is_documented):
    app = FastAPI()

    @app.get("/a")
    def answer() -> Response:
        return Response("{}", status, media_type=kind)

    case = schemathesis.openapi.from_asgi("/openapi.json", app)["/a"]["GET"].Case()
    with nullcontext() if is_documented else pytest.raises(FailureGroup):
        case.validate_response(case.call(), checks=CHECKS)


def test_the_document_names_every_part_and_no_answer_that_is_never_given():
    tags = {tag for path in DOCUMENT["paths"].values() for one in path.values() for tag in one["tags"]}
    assert tags == {*edge_gateway.PARTS, "metrics"}
    assert not any("422" in one["responses"] for path in DOCUMENT["paths"].values() for one in path.values())


def test_the_document_names_the_keys_and_where_none_is_asked_for():
    assert DOCUMENT["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    open_to_all = {path for path, found in DOCUMENT["paths"].items() for one in found.values() if one["security"] == []}
    assert open_to_all == {"/health", "/metrics"}
