"""What a module of a task gets is the model and the samples exactly; what it answers is a model, or refused by name."""

import json

import numpy as np
import pytest

from tasks.learning import models
from tasks.learning.datasets import Dataset
from tasks.learning.workload import InvalidAnswer, environment, trained_parameters

RNG = np.random.default_rng(8)
SAMPLES = Dataset(RNG.normal(size=(9, 1, 2, 2)).astype(np.float32), RNG.integers(0, 2, 9), 2)
NETWORK = models.build("mlp", (1, 2, 2), 2, {"hidden": [3]}, seed=1)
PARAMETERS = RNG.normal(size=4 * 3 + 3 + 3 * 2 + 2).astype(np.float32)
UPDATE = {
    "1.weight": PARAMETERS[:12].reshape(3, 4).tolist(),
    "1.bias": PARAMETERS[12:15].tolist(),
    "3.weight": PARAMETERS[15:21].reshape(2, 3).tolist(),
    "3.bias": PARAMETERS[21:].tolist(),
}


def given(seed: int = 0) -> dict[str, str]:
    rules = {"epochs": 2, "lr": 0.5}
    return environment(NETWORK, PARAMETERS, SAMPLES, rules, round_id="r", model_uri="m", seed=seed)


def test_the_model_arrives_by_name_and_exactly():
    assert json.loads(given()["MODEL_DATA"]) == UPDATE
    assert json.loads(given()["HYPERPARAMS"]) == {"epochs": 2, "lr": 0.5}
    assert (given()["ROUND_ID"], given()["MODEL_URI"]) == ("r", "m")


def test_every_sample_arrives_once_in_an_order_that_the_seed_gives():
    rows = [(*row["x"], row["y"]) for row in json.loads(given()["DATASET_DATA"])["data"]]
    flat = SAMPLES.features.reshape(9, 4).tolist()
    assert sorted(rows) == sorted((*x, y) for x, y in zip(flat, SAMPLES.labels.tolist(), strict=True))
    assert given(0) == given(0)
    assert given(0)["DATASET_DATA"] != given(1)["DATASET_DATA"]


def test_the_answer_is_read_in_the_order_of_the_network():
    shuffled = dict(sorted(UPDATE.items(), reverse=True))
    assert trained_parameters({"update": shuffled}, NETWORK).tobytes() == PARAMETERS.tobytes()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({}, "update: NoneType"),
        ({"update": [1]}, "update: list"),
        ({"update": {}}, r"parameters \[\], expected \['1.bias'"),
        ({"update": {**UPDATE, "w": 1}}, "expected"),
        ({"update": {**UPDATE, "1.bias": [1, 2]}}, r"update.1.bias: .* shape \(2,\), expected .* shape \(3,\)"),
        ({"update": {**UPDATE, "1.bias": 1.0}}, r"shape \(\)"),
        ({"update": {**UPDATE, "1.bias": ["a", "b", "c"]}}, "expected numbers"),
        ({"update": {**UPDATE, "1.bias": [True, False, True]}}, "bool"),
        ({"update": {**UPDATE, "1.bias": [None, 1, 2]}}, "object"),
        ({"update": {**UPDATE, "1.weight": [[1], [1, 2], []]}}, "rows of different lengths"),
        ({"update": {**UPDATE, "1.bias": [1e39, 0, 0]}}, "finite numbers of single precision"),
        ({"update": {**UPDATE, "1.bias": [10**400, 0, 0]}}, "1.bias"),
    ],
)
def test_an_answer_that_is_no_model_of_the_task_is_refused(answer, says):
    with pytest.raises(InvalidAnswer, match=says):
        trained_parameters(answer, NETWORK)
