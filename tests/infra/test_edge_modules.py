"""The module that comes with the system really minimises what it says, repeatably, and refuses whatever is malformed."""

import hashlib
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.wasm_runner import MIB, Limits, ModuleFailed, Result, run
from infra.edge_modules import build

MODULE = build.module_path("logistic").read_bytes()
KEPT = tempfile.TemporaryDirectory()
SMALL = Limits(fuel=2_000_000_000, memory_bytes=64 * MIB, wall_clock_s=60)


def environment(**changes: Any) -> dict[str, str]:
    """The module's input; a value that is no text is written as JSON, None leaves the variable out."""
    rng = np.random.default_rng(5)
    data = [{"x": row.tolist(), "y": int(row.sum() + 0.3 * rng.normal() > 0)} for row in rng.normal(size=(40, 3))]
    given = {
        "ROUND_ID": "r-1",
        "MODEL_URI": "fl/models/global_model_v0",
        "PROPLET_ID": "device-1",
        "HYPERPARAMS": {"epochs": 3, "lr": 0.1, "batch_size": 16},
        "MODEL_DATA": {"w": [0.0, 0.0, 0.0], "b": 0.0},
        "DATASET_DATA": {"schema": "fl-demo-dataset-v1", "proplet_id": "device-1", "data": data, "size": len(data)},
        **changes,
    }
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
    return {name: text for name, text in texts.items() if given[name] is not None}


def trained(**changes: Any) -> Result:
    return run(MODULE, environment(**changes), SMALL, kept=Path(KEPT.name))


def refusal(**changes: Any) -> str:
    with pytest.raises(ModuleFailed) as failed:
        trained(**changes)
    assert failed.value.reason == "exit 1", failed.value
    assert failed.value.log.strip(), "nothing was said"
    return failed.value.log


def plain(
    x: np.ndarray, y: np.ndarray, w: np.ndarray, b: float, *, epochs: int, lr: float, batch_size: int, mu: float = 0.0
) -> tuple[np.ndarray, float]:
    """The same steps in numpy. x (n, d), y (n,) of 0 and 1."""
    w0, b0 = w, b
    for _ in range(epochs):
        for start in range(0, len(x), batch_size):
            rows, labels = x[start : start + batch_size], y[start : start + batch_size]
            error = 1 / (1 + np.exp(-(rows @ w + b))) - labels
            w, b = w - lr * (error @ rows / len(rows) + mu * (w - w0)), b - lr * (error.mean() + mu * (b - b0))
    return w, b


def log_loss(x: np.ndarray, y: np.ndarray, w: np.ndarray, b: float) -> float:
    z = x @ w + b
    return float(np.mean(np.logaddexp(0, z) - y * z))


@pytest.mark.parametrize("mu", [0.0, 0.7])
@pytest.mark.parametrize(("samples", "features", "batch_size"), [(1, 1, 1), (40, 3, 16), (37, 30, 5), (200, 70, 500)])
def test_it_takes_the_steps_of_a_plain_computation(samples, features, batch_size, mu):
    rng = np.random.default_rng(samples)
    x, y = rng.normal(size=(samples, features)), rng.integers(0, 2, samples).astype(float)
    w, b = rng.normal(size=features), 0.25
    rules = {"epochs": 7, "lr": 0.3, "batch_size": batch_size, "mu": mu}
    rows = [{"x": row.tolist(), "y": int(label)} for row, label in zip(x, y, strict=True)]
    answer = trained(HYPERPARAMS=rules, MODEL_DATA={"w": w.tolist(), "b": b}, DATASET_DATA={"data": rows}).answer
    expected_w, expected_b = plain(x, y, w, b, **rules)
    np.testing.assert_allclose(answer["update"]["w"], expected_w, rtol=1e-12, atol=1e-15)
    assert answer["update"]["b"] == pytest.approx(expected_b, rel=1e-12)
    assert answer["metrics"]["loss_before"] == pytest.approx(log_loss(x, y, w, b), rel=1e-12)
    assert answer["metrics"]["loss"] == pytest.approx(log_loss(x, y, expected_w, expected_b), rel=1e-12)
    assert answer["num_samples"] == samples


def test_the_loss_falls_further_with_more_epochs():
    losses = [trained(HYPERPARAMS={"epochs": n, "lr": 0.5}).answer["metrics"]["loss"] for n in (1, 10, 100)]
    before = trained().answer["metrics"]["loss_before"]
    assert before == pytest.approx(np.log(2))
    assert before > losses[0] > losses[1] > losses[2]


def test_the_proximal_term_holds_the_model_near_the_one_received():
    far, near = (trained(HYPERPARAMS={"epochs": 50, "lr": 0.1, "mu": mu}).answer["update"]["w"] for mu in (0, 5))
    assert np.linalg.norm(near) < 0.5 * np.linalg.norm(far)


def test_the_answer_names_its_round_and_its_keys_are_in_order():
    answer = trained(ROUND_ID='a "round"\\\n\x01', PROPLET_ID="", MODEL_URI=None).answer
    assert list(answer) == sorted(answer)
    assert (answer["round_id"], answer["base_model_uri"]) == ('a "round"\\\n\x01', "")
    assert answer["proplet_id"] == "proplet-unknown"


def test_other_keys_of_the_model_are_handed_back():
    extra = {"version": 3, "a": [1, {"b": None}], "z": "\u00e9\n", "_": 1.5e300}
    answer = trained(MODEL_DATA={"w": [0, 0, 0], "b": 0, **extra}).answer
    assert {name: answer["update"][name] for name in extra} == extra
    assert list(answer["update"]) == sorted(answer["update"])


def test_what_is_not_given_has_a_default():
    assert (
        trained(HYPERPARAMS=None, MODEL_DATA=None).answer
        == trained(HYPERPARAMS={"epochs": 1, "lr": 0.01, "batch_size": 16}, MODEL_DATA={"w": [0, 0, 0], "b": 0}).answer
    )


def test_the_same_input_gives_the_same_bits_and_the_same_fuel():
    first, second = trained(), trained()
    assert (first.answer, first.fuel_used) == (second.answer, second.fuel_used)


def test_numbers_read_back_exactly():
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -(2.0**-1022)]
    rows = [{"x": [0.0] * 5, "y": 0}]
    answer = trained(MODEL_DATA={"w": values, "b": 0.1 + 0.2}, DATASET_DATA={"data": rows}, HYPERPARAMS={"lr": 1e-300})
    assert answer.answer["update"] == {"w": values, "b": 0.1 + 0.2}


def test_four_mebibytes_of_samples_are_trained_on():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(3300, 70))
    rows = [{"x": row.tolist(), "y": int(row[0] > 0)} for row in x]
    text = json.dumps({"data": rows})
    assert len(text) > 4 * MIB
    given = environment(DATASET_DATA=text, MODEL_DATA={"w": [0.0] * 70, "b": 0.0})
    result = run(MODULE, given, kept=Path(KEPT.name))
    assert result.answer["num_samples"] == 3300
    assert result.answer["metrics"]["loss"] < result.answer["metrics"]["loss_before"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ROUND_ID": None}, "Missing ROUND_ID"),
        ({"DATASET_DATA": None}, "Missing DATASET_DATA"),
        ({"DATASET_DATA": "{"}, "DATASET_DATA: malformed JSON at byte 1"),
        ({"DATASET_DATA": {"data": []}}, "no samples"),
        ({"DATASET_DATA": {}}, "no samples"),
        ({"DATASET_DATA": {"data": [{"x": [1]}]}}, "data[0] has no y"),
        ({"DATASET_DATA": {"data": [{"y": 1}]}}, "data[0] has no x"),
        ({"DATASET_DATA": {"data": [{"x": [1, 2, 3], "y": 0}, {"x": [1], "y": 0}]}}, "data[1].x has 1"),
        ({"DATASET_DATA": {"data": [{"x": [1], "y": 2}]}}, "data[0].y = 2"),
        ({"DATASET_DATA": {"data": [{"x": [1], "y": -1}]}}, "data[0].y = -1"),
        ({"DATASET_DATA": {"data": [{"x": [[1]], "y": 1}]}}, "expected a number"),
        ({"DATASET_DATA": {"data": [{"x": [], "y": 1}]}}, "at least one"),
        ({"DATASET_DATA": '{"data":[{"x":[1],"x":[1],"y":1}]}'}, "x is given twice"),
        ({"DATASET_DATA": '{"data":[{"x":[NaN],"y":1}]}'}, "expected a number"),
        ({"DATASET_DATA": '{"data":[{"x":[1e999],"y":1}]}'}, "double precision"),
        ({"DATASET_DATA": '{"data":[{"x":[0x10],"y":1}]}'}, "malformed"),
        ({"DATASET_DATA": '{"data":[{"x":[01],"y":1}]}'}, "leading 0"),
        ({"DATASET_DATA": '{"data":[{"x":[1],"y":1}],}'}, "expected a string"),
        ({"DATASET_DATA": '{"data":[{"x":[1,],"y":1}]}'}, "expected a number"),
        ({"DATASET_DATA": '{"data":[{"x":[1],"y":1}]} x'}, "nothing after"),
        ({"DATASET_DATA": '{"deep":' + "[" * 5000}, "less nesting"),
        ({"MODEL_DATA": {"w": [0, 0], "b": 0}}, "w has 2 numbers, the samples have 3 features"),
        ({"MODEL_DATA": {"w": [], "b": 0}}, "w is empty"),
        ({"MODEL_DATA": {"w": 0, "b": 0}}, "list of numbers"),
        ({"MODEL_DATA": '{"w":[0,0,0],"w":[0,0,0]}'}, "w is given twice"),
        ({"MODEL_DATA": '{"w":[0,0,0],"v":1,"v":2}'}, "v is given twice"),
        ({"MODEL_DATA": []}, "an object"),
        ({"MODEL_DATA": '{"k":"\\x"}'}, "an escape"),
        ({"MODEL_DATA": '{"k":"\\u12"}'}, "four hex digits"),
        ({"MODEL_DATA": '{"k":"\n"}'}, "control character"),
        ({"MODEL_DATA": '{"k":"'}, "the end of a string"),
        ({"HYPERPARAMS": {"lr": 0}}, "lr = 0"),
        ({"HYPERPARAMS": {"lr": -1}}, "lr = -1"),
        ({"HYPERPARAMS": {"epochs": 1.5}}, "epochs = 1.5: expected an integer"),
        ({"HYPERPARAMS": {"epochs": 0}}, "epochs = 0"),
        ({"HYPERPARAMS": {"batch_size": 0}}, "batch_size = 0"),
        ({"HYPERPARAMS": {"mu": -0.1}}, "mu = -0.1"),
        ({"DATASET_DATA": {"data": [{"x": [1e200], "y": 1}]}, "MODEL_DATA": None}, "expected a smaller one"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_what_is_wrong_is_named(changes, says):
    assert says in refusal(**changes)


def test_a_setting_that_it_does_not_know_is_noted():
    assert "HYPERPARAMS: momentum is not used" in trained(HYPERPARAMS={"momentum": 0.9}).log


def never_traps(**changes: Any) -> None:
    """It answers, or exits with a message."""
    with suppress(ModuleFailed):
        trained(**changes)
        return
    refusal(**changes)


BROKEN = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60)
VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["w", "b", "data", "x", "y"]), inner),
    max_leaves=12,
)


@settings(max_examples=150)
@given(name=st.sampled_from(["MODEL_DATA", "DATASET_DATA", "HYPERPARAMS", "ROUND_ID"]), text=BROKEN)
def test_no_text_makes_it_trap(name, text):
    never_traps(**{name: text})


@settings(max_examples=150)
@given(name=st.sampled_from(["MODEL_DATA", "DATASET_DATA", "HYPERPARAMS"]), value=VALUES)
def test_no_json_makes_it_trap(name, value):
    never_traps(**{name: value})


@settings(max_examples=200)
@given(name=st.sampled_from(["MODEL_DATA", "DATASET_DATA"]), data=st.data())
def test_no_damage_to_a_right_input_makes_it_trap(name, data):
    text = environment()[name][:300] if name == "DATASET_DATA" else environment()[name]
    place = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.sampled_from(list('{}[]",:0123456789.eE+-\\u tfn')))
    cut = data.draw(st.booleans())
    never_traps(**{name: text[:place] if cut else text[:place] + letter + text[place + 1 :]})


def test_the_committed_digest_is_that_of_the_module():
    path = build.module_path("logistic")
    noted, name = path.with_suffix(".wasm.sha256").read_text().split()
    assert (noted, name) == (hashlib.sha256(MODULE).hexdigest(), path.name)
    assert build.module_of(noted) == MODULE


def test_a_module_is_found_by_its_digest_among_ones_own_and_these(tmp_path):
    (tmp_path / "own.wasm").write_bytes(b"own")
    own = hashlib.sha256(b"own").hexdigest()
    assert build.module_of(own, tmp_path) == b"own"
    assert build.module_of(own) is None
    assert build.module_of(hashlib.sha256(MODULE).hexdigest(), tmp_path) == MODULE


@pytest.fixture
def cache(request: pytest.FixtureRequest) -> Path:
    """What the compiler keeps between runs of the tests; the first one waits half a minute for it."""
    assert request.config.cache is not None
    return Path(request.config.cache.mkdir("healchain-zig"))


def test_compiling_the_source_again_gives_the_same_bytes(cache):
    assert hashlib.sha256(build.compile_module("logistic", cache)).hexdigest() == hashlib.sha256(MODULE).hexdigest()


def test_a_source_that_does_not_compile_is_said_to_be_wrong(tmp_path, monkeypatch, cache):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "broken.c").write_text("int main(void) { return nothing; }")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    with pytest.raises(build.BuildFailed, match="nothing"):
        build.compile_module("broken", cache)
