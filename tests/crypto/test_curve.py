"""Points against coincurve (libsecp256k1) and the oracle, one at a time and in arrays."""

from itertools import pairwise

import numpy as np
import pytest
from coincurve import PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.crypto import curve, field
from tasks.crypto.curve import (
    GENERATOR,
    INFINITY,
    ORDER,
    FixedBase,
    InvalidEncoding,
    Point,
    add,
    array_of,
    decode_point,
    encode_point,
    integers_of,
    multiples,
    multiply,
    negate,
    points_of,
    scalar_array,
)
from tests import oracle
from tests.crypto import load, rows, tuples

EDGES = [0, 1, 2, 3, ORDER - 1, ORDER - 2, ORDER // 2, ORDER // 2 + 1, *(2**i for i in range(0, 256, 5)), 2**255]
scalars = st.one_of(st.integers(0, ORDER - 1), st.sampled_from(EDGES))


def peer(scalar, base=None):
    """The same product by libsecp256k1; None for infinity."""
    if scalar % ORDER == 0:
        return None
    point = PublicKey.from_point(*(base or oracle.G))
    return point.multiply((scalar % ORDER).to_bytes(32, "big")).point()


def coordinates(point):
    return None if point == INFINITY else (point.x, point.y)


def small_points(count):
    """count points around infinity: ..., -2 G, -G, infinity, G, 2 G, ..."""
    return [oracle.multiply(j - count // 2, oracle.G) for j in range(count)]


# --- one point at a time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scalar", EDGES)
def test_multiples_of_the_generator_agree_with_libsecp256k1(scalar):
    assert coordinates(multiply(scalar, GENERATOR)) == peer(scalar)


@settings(max_examples=20)
@given(scalars, scalars)
def test_multiplication_distributes(a, b):
    assert multiply((a + b) % ORDER, GENERATOR) == add(multiply(a, GENERATOR), multiply(b, GENERATOR))


def test_addition_of_all_pairs_of_small_points():
    points = [Point(*(p or (0, 0))) for p in small_points(9)]
    for i, a in enumerate(points):
        for j, b in enumerate(points):
            assert coordinates(add(a, b)) == oracle.multiply(i + j - 8, oracle.G)
    assert add(GENERATOR, negate(GENERATOR)) == INFINITY
    assert negate(INFINITY) == INFINITY


@pytest.mark.parametrize("scalar", [-1, ORDER, ORDER + 1])
def test_scalars_outside_the_range_are_refused(scalar):
    with pytest.raises(ValueError, match="not in"):
        multiply(scalar, GENERATOR)


def test_multiplying_a_point_off_the_curve_is_refused():
    with pytest.raises(ValueError, match="not on the curve"):
        multiply(3, Point(GENERATOR.x, GENERATOR.y + 1))


@pytest.mark.parametrize("case", load("compressed_points.json"), ids=lambda case: case["why"])
def test_decode_point_vectors(case):
    data = bytes.fromhex(case["hex"])
    if case["valid"]:
        assert decode_point(data) == Point(int(case["x"], 16), int(case["y"], 16))
        assert encode_point(decode_point(data)) == data
        assert PublicKey(data).point() == coordinates(decode_point(data))
    else:
        with pytest.raises(InvalidEncoding):
            decode_point(data)


@pytest.mark.parametrize("point", [INFINITY, Point(1, 1), Point(GENERATOR.x + field.P, GENERATOR.y)])
def test_what_is_not_a_point_has_no_encoding(point):
    with pytest.raises(ValueError, match="only an affine point"):
        encode_point(point)


# --- arrays ---------------------------------------------------------------------------------------------------------


def test_rows_of_points_and_scalars_go_both_ways():
    points = [GENERATOR, INFINITY, negate(GENERATOR)]
    assert points_of(array_of(points)) == points
    assert integers_of(scalar_array([0, -1, ORDER, 7])) == [0, ORDER - 1, 0, 7]


def test_every_kind_of_addition_inside_one_batch():
    # All pairs of small points: chords, tangents, cancellations, infinity on either side, and duplicates.
    small = small_points(9)
    left = [a for a in small for _ in small] * 15
    right = [b for _ in small for b in small] * 15  # 1215 pairs: more than one batch
    total = rows(left)
    field.add_rows(total, rows(right), np.arange(1, len(right) + 1, dtype=np.int32)[None])
    expected = [oracle.add(a, b) for a in small for b in small] * 15
    assert tuples(total) == expected


def test_points_with_tiny_and_huge_coordinates_add_up():
    # Near 0 and p a representative can lie on either side of p.
    near = [x % field.P for x in range(-40, 40)]
    points = [(x, pow(x**3 + 7, (field.P + 1) // 4, field.P)) for x in near]
    points = [point for point in points if oracle.on_curve(point)]
    left = [a for a in points for _ in points]
    right = [b for _ in points for b in points]
    for sign in (1, -1):
        total = rows(left)
        field.add_rows(total, rows(right), sign * np.arange(1, len(right) + 1, dtype=np.int32)[None])
        expected = [oracle.add(a, b if sign > 0 else oracle.negate(b)) for a, b in zip(left, right, strict=True)]
        assert tuples(total) == expected
        # And back: the results are tiny again.
        field.add_rows(total, rows(right), -sign * np.arange(1, len(right) + 1, dtype=np.int32)[None])
        assert tuples(total) == left


def test_references_subtract_and_skip():
    table = rows(small_points(9))
    total = rows([oracle.G] * 19)
    field.add_rows(total, table, np.arange(-9, 10, dtype=np.int32)[None])
    expected = [oracle.add(oracle.G, oracle.multiply(4 - j, oracle.G)) for j in reversed(range(9))]
    expected += [oracle.G, *(oracle.add(oracle.G, oracle.multiply(j - 4, oracle.G)) for j in range(9))]
    assert tuples(total) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 1023, 1024, 1025, 2049])
def test_batches_of_every_size_agree(size):
    points = multiples(GENERATOR, size)
    total = points.copy()
    field.add_rows(total, points, np.arange(1, size + 1, dtype=np.int32)[None])
    assert (total == multiples(GENERATOR, 2 * size)[1::2]).all()


def test_nothing_is_added_to_an_empty_array():
    field.add_rows(np.empty((0, 8), np.uint64), rows([oracle.G]), np.empty((3, 0), np.int32))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 100])
def test_multiples_are_multiples(count):
    assert tuples(multiples(GENERATOR, count)) == [peer(j) for j in range(1, count + 1)]
    assert multiples(GENERATOR, count).ctypes.data % 64 == 0


@pytest.fixture(scope="module")
def second_base():
    return oracle.multiply(0xDEADBEEF << 130, oracle.G)


@pytest.fixture(scope="module", params=[(4, 64), (5, 52), (13, 20)])
def base(request, second_base):
    return FixedBase.build(Point(*second_base), *request.param)


def test_fixed_base_agrees_with_libsecp256k1(base, second_base):
    points = np.zeros((len(EDGES), 8), np.uint64)
    base.add_to(points, scalar_array(EDGES))
    assert tuples(points) == [peer(k, second_base) for k in EDGES]
    base.add_to(points, scalar_array(EDGES), negative=True)
    assert not points.any(), "what was added is taken off again"


@settings(max_examples=25)
@given(st.lists(scalars, min_size=1, max_size=20))
def test_fixed_base_agrees_on_random_scalars(base, second_base, values):
    points = np.zeros((len(values), 8), np.uint64)
    base.add_to(points, scalar_array(values))
    assert tuples(points) == [peer(k, second_base) for k in values]


@pytest.mark.parametrize("bits", [1, 3, 4, 12, 13, 25, 26, 63, 64])
def test_short_scalars_need_few_windows_and_are_right_at_both_ends(bits):
    base = FixedBase.build(GENERATOR, window=13, windows=5)
    values = [2**bits - 1, -(2**bits) + 1, 2 ** (bits - 1), -(2 ** (bits - 1)), 0, 1, -1]
    points = np.zeros((len(values), 8), np.uint64)
    base.add_to(points, scalar_array(values), bits=bits)
    assert tuples(points) == [peer(v) for v in values]


def test_a_table_refuses_longer_scalars():
    with pytest.raises(ValueError, match="longer"):
        FixedBase.build(GENERATOR, window=4, windows=2).add_to(np.zeros((1, 8), np.uint64), scalar_array([1]), bits=8)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 2**16 - 1), min_size=1, max_size=4), st.data())
def test_weighted_sums_of_points_agree_with_the_oracle(weights, data):
    # Few different small points: equal, opposite and infinite intermediate sums are common.
    exponents = [data.draw(st.lists(st.integers(-2, 2), min_size=6, max_size=6)) for _ in weights]
    arrays = [rows([oracle.multiply(e, oracle.G) for e in row]) for row in exponents]
    expected = [sum(y * row[k] for y, row in zip(weights, exponents, strict=True)) for k in range(6)]
    assert tuples(curve.weigh(arrays, weights)) == [peer(e) for e in expected]


@given(st.integers(1, 2**20))
def test_non_adjacent_digits_sum_up(weight):
    digits = curve._non_adjacent(weight)
    assert sum(d << i for i, d in enumerate(digits)) == weight
    assert not any(a and b for a, b in pairwise(digits))


def test_the_curve_check_names_the_first_bad_row():
    good = multiples(GENERATOR, 50)
    assert field.first_invalid(good) == -1
    for column in range(8):
        bad = good.copy()
        bad[17, column] ^= np.uint64(1)
        bad[30] = 0
        assert field.first_invalid(bad) == 17
    assert field.first_invalid(np.zeros((1, 8), np.uint64)) == 0
