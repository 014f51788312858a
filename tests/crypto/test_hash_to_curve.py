"""RFC 9380, appendix J.8.1, and an independent implementation of the suite."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.crypto import hash_to_curve as module
from tasks.crypto import ndd_fe
from tasks.crypto.hash_to_curve import hash_to_curve
from tests import oracle
from tests.crypto import load

VECTORS = load("hash_to_curve.json")


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["message"][:8] or "empty")
def test_vectors_of_the_standard(case):
    message, tag = case["message"].encode(), VECTORS["tag"].encode()
    expected = int(case["x"], 16), int(case["y"], 16)
    point = hash_to_curve(message, tag)
    assert (point.x, point.y) == expected
    assert oracle.hash_to_field(message, tag) == (int(case["u0"], 16), int(case["u1"], 16))
    assert oracle.hash_to_curve(message, tag) == expected


def test_the_oracles_isogeny_is_one():
    q, a, b, p = oracle.KERNEL_X, oracle.ISO_A, oracle.ISO_B, oracle.P
    assert (3 * q**4 + 6 * a * q**2 + 12 * b * q - a**2) % p == 0, "the kernel has order 3"
    t, u = 6 * q**2 + 2 * a, 4 * (q**3 + a * q + b)
    assert (a - 5 * t) % p == 0, "the image has no term in x"
    assert (b - 7 * (u + q * t)) % p == 7 * 3**6, "and is secp256k1 scaled by 3"


@settings(max_examples=20)
@given(st.binary(max_size=80), st.binary(min_size=1, max_size=255))
def test_agrees_with_the_oracle(message, tag):
    point = hash_to_curve(message, tag)
    assert (point.x, point.y) == oracle.hash_to_curve(message, tag)


@pytest.mark.parametrize("u", [0, 1, oracle.P - 1])
def test_exceptional_field_elements_map_to_the_curve(u):
    point = module._map_to_curve(u)
    assert (point.x, point.y) == oracle.velu(oracle.sswu(u))
    assert oracle.on_curve((point.x, point.y))


def test_the_second_base():
    assert (ndd_fe.H.x, ndd_fe.H.y) == oracle.H
    assert oracle.on_curve(oracle.H)
    assert oracle.multiply(oracle.N - 1, oracle.H) == oracle.multiply(-1, oracle.H)


@pytest.mark.parametrize("tag", [b"", bytes(256)])
def test_tags_of_other_lengths_are_refused(tag):
    with pytest.raises(ValueError, match="tag"):
        hash_to_curve(b"message", tag)
