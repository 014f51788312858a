"""What is read from a device: each field, both formats, and that any bytes give an update or a refusal."""

import json
import math

import cbor2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.edge import wire
from tasks.edge.wire import CBOR_TYPES, JSON_TYPE, Refusal, Update, check_fits, read_experiment, read_update

FIELDS = {
    "round_id": "r-1",
    "proplet_id": "a",
    "base_model_uri": "fl/models/global_model_v0",
    "num_samples": 64,
    "metrics": {"loss": 0.73},
    "update": {"w": [0.1, 0.2, 0.3], "b": 0.05},
}
CBOR = CBOR_TYPES[0]


def read(value, content_type=JSON_TYPE):
    body = cbor2.dumps(value) if content_type == CBOR else json.dumps(value).encode()
    return read_update(body, content_type)


def refused(value, content_type=JSON_TYPE, status=400):
    with pytest.raises(Refusal) as caught:
        read(value, content_type)
    assert caught.value.status == status
    return str(caught.value)


@pytest.mark.parametrize("content_type", [JSON_TYPE, *CBOR_TYPES])
def test_an_update_of_an_existing_device_is_read(content_type):
    body = cbor2.dumps(FIELDS) if "cbor" in content_type else json.dumps(FIELDS).encode()
    update = read_update(body, content_type)
    assert (update.round_id, update.proplet_id, update.num_samples) == ("r-1", "a", 64)
    assert update.update["w"].tolist() == [0.1, 0.2, 0.3]
    assert update.update["b"].shape == ()
    assert update.metrics == {"loss": 0.73}


def test_both_formats_have_one_digest_and_a_changed_number_another():
    assert read(FIELDS).digest == read(FIELDS, CBOR).digest
    assert read({**FIELDS, "num_samples": 65}).digest != read(FIELDS).digest
    assert read({**FIELDS, "update": {"w": [0.1, 0.2, 0.3], "b": 0.06}}).digest != read(FIELDS).digest
    assert read({**FIELDS, "update": {"w": [[0.1, 0.2, 0.3]], "b": 0.05}}).digest != read(FIELDS).digest


@pytest.mark.parametrize(
    ("tag", "kind"),
    [
        (80, ">f2"),
        (81, ">f4"),
        (82, ">f8"),
        (84, "<f2"),
        (85, "<f4"),
        (86, "<f8"),
        (64, "u1"),
        (78, "<i4"),
        (67, ">u8"),
    ],
)
def test_typed_arrays_of_either_byte_order_are_read(tag, kind):
    numbers = np.array([1, 2, 3], dtype=kind)
    update = read({**FIELDS, "update": {"w": cbor2.CBORTag(tag, numbers.tobytes())}}, CBOR)
    assert update.update["w"].tolist() == [1, 2, 3]
    assert update.update["w"].dtype == np.float64


def test_arrays_of_several_dimensions_are_read_by_row_and_by_column():
    data = np.arange(6, dtype="<f8")
    typed = cbor2.CBORTag(86, data.tobytes())
    for tag, order in ((40, "C"), (1040, "F")):
        for numbers in (typed, [0, 1, 2, 3, 4, 5], cbor2.CBORTag(41, [0, 1, 2, 3, 4, 5])):
            update = read({**FIELDS, "update": {"w": cbor2.CBORTag(tag, [[2, 3], numbers])}}, CBOR)
            assert (update.update["w"] == data.reshape((2, 3), order=order)).all()


def test_nested_maps_are_named_by_their_path_and_come_back():
    model = {"layer/1": {"w": [[1.0, 2.0]], "~": 3.0}, "b": 4.0}
    update = read({**FIELDS, "update": model, "metrics": {"loss": {"train": 1.5}}}, CBOR)
    assert set(update.update) == {"layer~11/w", "layer~11/~0", "b"}
    assert wire.model_json(update.update) == model
    assert json.loads(wire.encode_model(update.update)) == model
    assert update.metrics == {"loss/train": 1.5}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"round_id": ""}, "round_id is required"),
        ({"round_id": 5}, "round_id: expected text, got int"),
        ({"round_id": "r\0"}, "round_id = 'r\\x00': expected at most 128 printable characters"),
        ({"proplet_id": "a" * 129}, "expected at most 128 printable characters"),
        ({"proplet_id": None}, "proplet_id is required"),
        ({"update": {}}, "update data is required and cannot be empty"),
        ({"update": None}, "update data is required and cannot be empty"),
        ({"update": [1]}, "update: expected an object of named tensors, got list"),
        ({"update": {"w": "1"}}, "update.w: expected a number or lists of numbers, got str"),
        ({"update": {"w": ["1", 2]}}, "update.w: expected numbers, got str"),
        ({"update": {"w": [True, 2]}}, "update.w: expected numbers, got bool"),
        ({"update": {"w": [None]}}, "update.w: expected numbers, got NoneType"),
        ({"update": {"w": [[1, 2], [3]]}}, "update.w: its rows differ in length"),
        ({"update": {"w": [[1, 2], 3]}}, "update.w: its rows differ in length"),
        ({"update": {"": [1]}}, "update: a name of ''"),
        ({"num_samples": None}, "num_samples is required"),
        ({"num_samples": 1.5}, "num_samples = 1.5: expected an integer from 1 to 1000000000"),
        ({"num_samples": 0}, "num_samples = 0: expected"),
        ({"num_samples": -1}, "num_samples = -1: expected"),
        ({"num_samples": True}, "num_samples = True: expected"),
        ({"num_samples": 10**9 + 1}, "num_samples = 1000000001: expected"),
        ({"metrics": {"loss": "low"}}, "metrics.loss: expected a number"),
        ({"metrics": {"loss": [1.0]}}, "metrics: expected at most 256 single numbers"),
        ({"metrics": [1]}, "metrics: expected an object of numbers, got list"),
        ({"base_model_uri": 5}, "base_model_uri = 5: Input should be a valid string"),
        ({"error": 5}, "error: expected text, got int"),
    ],
)
@pytest.mark.parametrize("content_type", [JSON_TYPE, CBOR])
def test_a_wrong_field_is_named(change, said, content_type):
    assert said in refused({**FIELDS, **change}, content_type)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(number):
    for value in (number, [1.0, number], cbor2.CBORTag(86, np.array([number]).tobytes())):
        assert "update.w: NaN or infinite" in refused({**FIELDS, "update": {"w": value}}, CBOR)
    assert "metrics.loss: NaN or infinite" in refused({**FIELDS, "metrics": {"loss": number}}, CBOR)
    assert "Invalid JSON" in refused({**FIELDS, "update": {"w": number}})


def test_an_error_update_says_why_there_is_no_model():
    update = read({"round_id": "r-1", "proplet_id": "a", "num_samples": 0, "update": {}, "error": "out of fuel"})
    assert (update.error, update.num_samples, update.update) == ("out of fuel", 0, {})
    assert "num_samples" in refused({**FIELDS, "num_samples": 0})


def test_what_is_too_large_or_too_deep_is_refused(monkeypatch):
    monkeypatch.setattr(wire, "MAX_TENSORS", 4)
    monkeypatch.setattr(wire, "MAX_NUMBERS", 8)
    assert "more than 4 tensors" in refused({**FIELDS, "update": dict.fromkeys("abcde", 1.0)}, status=413)
    assert "more than 8 numbers" in refused({**FIELDS, "update": {"w": [0.0] * 9}}, status=413)
    with pytest.raises(Refusal, match="at most 10 are taken") as caught:
        read_update(json.dumps(FIELDS).encode(), max_bytes=10)
    assert caught.value.status == 413
    deep = 1.0
    for _ in range(30):
        deep = [deep]
    assert "more than 24 dimensions" in refused({**FIELDS, "update": {"w": deep}})
    assert "Invalid CBOR" in refused({**FIELDS, "update": {"w": deep}}, CBOR)
    with pytest.raises(Refusal, match="Invalid JSON"):
        read_update(b"[" * 100_000)


def test_json_that_is_nested_too_deeply_is_refused_before_it_is_read_and_brackets_in_texts_are_none():
    wire.decode_json(b"[" * 64 + b"]" * 64)
    many = b'[[1],{"a":[]},' * 60 + b"0" + b"]" * 60
    assert wire.decode_json(many)
    texts = {"a": "[{" * 100, 'b"\\': '"[' * 100, "c": "\\" * 99 + "[" * 99}
    assert wire.decode_json(json.dumps(texts).encode()) == texts
    for body in (b"[" * 65 + b"]" * 65, b'{"a":' * 65 + b"1" + b"}" * 65, b'{"b\\"":' + b"[" * 64 + b"]" * 64 + b"}"):
        with pytest.raises(Refusal, match="nested more than 64 times"):
            wire.decode_json(body)
    # A text that never ends, with what could be begun again at each quote: linear, or this takes hours.
    with pytest.raises(Refusal, match="Invalid JSON"):
        wire.decode_json(b"[" * 65 + b'"' + b'\\"' * 500_000)


@pytest.mark.parametrize(
    ("body", "is_taken"),
    [
        (b'"\\u0000"', False),
        (b'"\\\\u0000"', True),
        (b'"\\\\\\u0000"', False),
        (b'{"a\\u0000":1}', False),
        (b'"u0000"', True),
    ],
)
def test_a_zero_character_is_refused_where_texts_are_kept(body, is_taken):
    if is_taken:
        assert wire.decode_json(body) == json.loads(body)
    else:
        with pytest.raises(Refusal, match="a zero character"):
            wire.decode_json(body)


def test_an_error_update_may_hold_a_zero_character_and_a_tensor_may_not_be_named_by_one():
    said = {**FIELDS, "num_samples": 0, "update": {}, "error": "trap: \0"}
    assert read_update(json.dumps(said).encode()).error == "trap: \N{REPLACEMENT CHARACTER}"
    assert "a name of" in refused({**FIELDS, "update": {"w\0": 1.0}})


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\xff", cbor2.dumps(FIELDS) + b"\x00", cbor2.dumps([1]), b"\xbb\x0f\xff\xff\xff\xff\xff\xff\xff",
        cbor2.dumps({**FIELDS, "update": {"w": cbor2.CBORTag(28, [1])}}),
        cbor2.dumps({**FIELDS, "update": {"w": cbor2.CBORTag(35, "(a+)+$")}}),
        cbor2.dumps({**FIELDS, "update": {"w": cbor2.CBORTag(9999, [1])}}),
        cbor2.dumps({**FIELDS, "update": {"w": cbor2.CBORTag(86, b"1234567")}}),
        cbor2.dumps({**FIELDS, "update": {"w": cbor2.CBORTag(86, "text")}}),
        cbor2.dumps({**FIELDS, "update": {"w": cbor2.CBORTag(40, [[2, 2], [1, 2, 3]])}}),
        cbor2.dumps({**FIELDS, "update": {"w": cbor2.CBORTag(40, [[-1], [1]])}}),
        cbor2.dumps({**FIELDS, "update": {"w": cbor2.CBORTag(40, [[2**40, 2**40], []])}}),
        cbor2.dumps({**FIELDS, "update": {5: [1.0]}}),
        cbor2.dumps({**FIELDS, "update": {"w": b"bytes"}}),
        cbor2.dumps({**FIELDS, "update": {"w": 2**70}}),
    ],
)  # fmt: skip
def test_cbor_that_is_no_update_is_refused(body):
    with pytest.raises(Refusal) as caught:
        read_update(body, CBOR)
    assert caught.value.status == 400


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4), inner, max_size=4)
        | st.builds(
            cbor2.CBORTag,
            st.sampled_from([0, 1, 2, 28, 29, 30, 35, 37, 40, 41, 64, 68, 76, 80, 83, 85, 86, 258, 1040, 7]),
            inner,
        )
    ),
    max_leaves=12,
)
changed = st.dictionaries(st.sampled_from([*FIELDS, "error", "received_at"]), anything, max_size=3)


def outcome(body, content_type):
    """An update, all of whose numbers are good, or the status of a refusal."""
    try:
        update = read_update(body, content_type)
    except Refusal as refusal:
        return refusal.status
    assert isinstance(update, Update)
    assert all(tensor.dtype == np.float64 and np.isfinite(tensor).all() for tensor in update.update.values())
    assert 0 <= update.num_samples <= 10**9
    assert bool(update.error) != bool(update.update)
    assert len(update.digest) == 64
    return 200


@given(st.binary(max_size=300), st.sampled_from([JSON_TYPE, CBOR]))
def test_any_bytes_give_an_update_or_a_refusal(body, content_type):
    assert outcome(body, content_type) in (200, 400, 413)


@given(changed)
def test_any_cbor_value_gives_an_update_or_a_refusal(change):
    try:
        body = cbor2.dumps({**FIELDS, **change})
    except cbor2.CBOREncodeError:
        return
    assert outcome(body, CBOR) in (200, 400, 413)


@given(st.data())
def test_a_damaged_update_is_an_update_or_a_refusal(data):
    typed = {**FIELDS, "update": {"w": cbor2.CBORTag(40, [[2, 2], cbor2.CBORTag(85, bytes(16))]), "b": 1.0}}
    for content_type, whole in ((CBOR, cbor2.dumps(typed)), (JSON_TYPE, json.dumps(FIELDS).encode())):
        body = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 4))):
            body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
        cut = data.draw(st.integers(0, len(body)))
        assert outcome(bytes(body[: cut or None]), content_type) in (200, 400, 413)


def test_a_model_must_have_the_names_and_shapes_of_its_base():
    base = {"w": np.zeros(3), "b": np.zeros(())}
    check_fits(read(FIELDS).update, base)
    for tensors, said in (
        ({"w": np.zeros(2), "b": np.zeros(())}, r"update.w has shape \[2\], the base model has \[3\]"),
        ({"w": np.zeros(3), "b": np.zeros(1)}, r"update.b has shape \[1\], the base model has \[\]"),
        ({"w": np.zeros(3)}, "update.b is missing"),
        ({**base, "c": np.zeros(1)}, "update.c: the base model has only b, w"),
    ):
        with pytest.raises(Refusal, match=said):
            check_fits(tensors, base)


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6)
lists = st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=4)


@given(st.dictionaries(names, lists | st.floats(-9, 9), min_size=1, max_size=5))
def test_models_come_back_from_both_encodings(model):
    tensors = wire.read_tensors(model, "model")
    in_json = wire.read_tensors(json.loads(wire.encode_model(tensors)), "model")
    for back in (wire.decode_tensors(wire.encode_tensors(tensors)), in_json):
        assert {name: (one.shape, one.tobytes()) for name, one in back.items()} == {
            name: (one.shape, one.tobytes()) for name, one in tensors.items()
        }


@pytest.mark.parametrize("data", [b"", b"12345678", b"\x02\x00\x00\x00\x00\x00\x00\x00{}x"])
def test_what_is_no_safetensors_is_refused(data):
    with pytest.raises(Refusal, match="no safetensors"):
        wire.decode_tensors(data)


@pytest.mark.parametrize(
    ("reference", "version"), [("fl/models/global_model_v12", 12), ("", 0), ("model", 0), ("v1/m-7b", 7), ("٣", 0)]
)
def test_a_version_is_the_last_digits_of_a_reference(reference, version):
    assert wire.version_of(reference) == version


def experiment(**changes):
    return read_experiment(json.dumps({"round_id": "r-1", "participants": ["a", "b"], "k_of_n": 2, **changes}).encode())


def test_an_experiment_of_existing_scripts_is_read():
    request = experiment(experiment_id="exp-1", model_ref="fl/models/global_model_v0", hyperparams={"epochs": 1, "lr": 0.01},
                         timeout_s=60, task_wasm_image="ghcr.io/u/client:latest")  # fmt: skip
    assert (request.name, request.k_of_n, request.rounds, request.rule) == ("exp-1", 2, 1, "fedavg")
    assert [request.round_name(number) for number in (1, 2)] == ["r-1", "r-1.2"]
    assert experiment().name == "r-1"


def test_the_proximal_term_reaches_the_devices_with_the_hyperparameters():
    request = experiment(rule="fedprox", rule_options={"mu": 0.5}, hyperparams={"lr": 1})
    assert request.hyperparams == {"lr": 1, "mu": 0.5}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"round_id": ""}, "round_id is required"),
        ({"round_id": "a/b"}, "round_id = 'a/b': String should match pattern"),
        ({"participants": ["a", "#"]}, "participants.1 = '#'"),
        ({"participants": ["a", "a"]}, "participants: a device is named twice"),
        ({"k_of_n": 3}, "k_of_n = 3: there are 2 participants; ask for at most 2"),
        ({"k_of_n": -1}, "k_of_n = -1"),
        ({"timeout_s": "5"}, "timeout_s = '5'"),
        ({"rounds": 0}, "rounds = 0"),
        ({"rule": "best"}, "rule 'best': expected one of fedavg"),
        ({"rule": "krum", "rule_options": {"byzantine": -1}}, "rule_options.byzantine = -1"),
        ({"k_of_m": 3}, "k_of_m = 3: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_experiment_is_named(change, said):
    with pytest.raises(Refusal) as caught:
        experiment(**change)
    assert said in str(caught.value)
    assert caught.value.status == 400
