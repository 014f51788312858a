"""Models: the same from the same seed, and one canonical encoding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tasks.learning import models
from tasks.learning.models import InvalidModel

CASES = [
    ("logistic", (30,), 2, {}, 62),
    ("mlp", (30,), 2, {"hidden": [64]}, 2114),
    ("cnn", (1, 8, 8), 10, {"channels": [16, 32], "hidden": 64}, 13706),
]
# Begins at zero, whatever the seed.
ZERO = ("binary", (1, 5, 6), 2, {}, 31)


@pytest.mark.parametrize(("name", "shape", "classes", "options", "size"), CASES)
def test_a_model_depends_on_its_seed_and_on_nothing_else(name, shape, classes, options, size):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = models.flatten(models.build(name, shape, classes, options, seed=7))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert np.array_equal(first, models.flatten(models.build(name, shape, classes, options, seed=7)))
    assert not np.array_equal(first, models.flatten(models.build(name, shape, classes, options, seed=8)))
    assert first.size == models.dimension(name, shape, classes, options) == size


@pytest.mark.parametrize(("name", "shape", "classes", "options", "size"), [*CASES, ZERO])
def test_loading_is_the_inverse_of_flattening(name, shape, classes, options, size):
    module = models.build(name, shape, classes, options, seed=0)
    parameters = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    models.load_flat(module, parameters)
    assert np.array_equal(models.flatten(module), parameters)
    assert module(torch.zeros(3, *shape)).shape == (3, classes)
    for wrong in (parameters[:-1], parameters.astype(np.float64), parameters[:, None]):
        with pytest.raises(InvalidModel, match="expected float32 of shape"):
            models.load_flat(module, wrong)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "options", "message"),
    [
        ("resnet", (30,), 2, {}, "name: 'resnet', expected one of logistic, mlp, cnn, binary"),
        ("mlp", (30,), 2, {}, r"options: \[\], expected \['hidden'\]"),
        ("mlp", (30,), 2, {"hidden": [8], "depth": 3}, "options: .*'depth'"),
        ("mlp", (30,), 2, {"hidden": []}, "hidden"),
        ("mlp", (30,), 2, {"hidden": 8}, "hidden: 8, expected positive"),
        ("mlp", (30,), 2, {"hidden": [0]}, "hidden"),
        ("mlp", (30,), 1, {"hidden": [8]}, "classes: 1"),
        ("binary", (30,), 3, {}, "classes: 3, a binary model expects 2"),
        ("mlp", (0,), 2, {"hidden": [8]}, "input_shape"),
        ("cnn", (30,), 2, {"channels": [4], "hidden": 8}, "input_shape"),
        ("cnn", (1, 4, 4), 2, {"channels": [4, 4, 4], "hidden": 8}, "below one pixel"),
        ("cnn", (1, 8, 8), 2, {"channels": [4], "hidden": 0.5}, "hidden"),
    ],
)
def test_an_unknown_model_or_option_is_refused_with_the_choices(name, shape, classes, options, message):
    with pytest.raises(InvalidModel, match=message):
        models.build(name, shape, classes, options, seed=0)


def test_a_binary_model_begins_at_zero_and_its_logits_are_those_of_a_logistic_regression():
    module = models.build("binary", (3,), 2, {}, seed=5)
    assert models.flatten(module).tolist() == [0.0] * 4
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {"w": (3,), "b": ()}
    models.load_flat(module, np.array([1, 2, 3, 0.5], dtype=np.float32))
    chances = module(torch.tensor([[1.0, 0.0, -1.0]])).softmax(dim=1)
    assert float(chances[0, 1].detach()) == pytest.approx(1 / (1 + np.exp(1.5)))


@given(arrays(np.float32, st.integers(0, 50), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
@settings(deadline=None)
def test_parameters_round_trip_to_the_bit(parameters):
    data = models.encode_parameters(parameters)
    assert models.decode_parameters(data).tobytes() == parameters.tobytes()
    assert models.encode_parameters(models.decode_parameters(data)) == data


GOOD = models.encode_parameters(np.array([1, 2], dtype=np.float32))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (GOOD[:10], "half a header"),
        (GOOD[:-1], "one byte short"),
        (GOOD + b"\0", "one byte more"),
        (b"XCMP" + GOOD[4:], "another magic"),
        (GOOD[:4] + b"\2" + GOOD[5:], "another version"),
        (GOOD[:6] + b"\1" + GOOD[7:], "padding not zero"),
        (GOOD[:8] + b"\3" + GOOD[9:], "another length"),
        (GOOD[:8] + b"\xff" * 8 + GOOD[16:], "a huge length"),
        (GOOD[:-4] + np.array([np.nan], dtype="<f4").tobytes(), "NaN"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_other_bytes_are_no_model(data, why):
    with pytest.raises(InvalidModel):
        models.decode_parameters(data)


def test_the_encoding_is_known_byte_by_byte():
    assert GOOD.hex() == "48434d50" + "0100" + "0000" + "0200000000000000" + "0000803f" + "00000040"


@pytest.mark.parametrize("wrong", [np.array([np.inf], np.float32), np.zeros(2), np.zeros((1, 2), np.float32)])
def test_unusable_parameters_are_not_encoded(wrong):
    with pytest.raises(InvalidModel):
        models.encode_parameters(wrong)
