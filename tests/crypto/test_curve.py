"""Points against coincurve (libsecp256k1) and the oracle, one at a time and in arrays."""

import numpy as np
import pytest
from coincurve import PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.crypto import backend, curve, field
from tasks.crypto.curve import (
    GENERATOR,
    INFINITY,
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
    progression,
    scalar_array,
    weighing,
)
from tasks.crypto.field import ORDER
from tasks.crypto.pedersen import commitments, exponent_windows
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
    backend.add_rows(total, rows(right), np.arange(1, len(right) + 1, dtype=np.int32)[None])
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
        backend.add_rows(total, rows(right), sign * np.arange(1, len(right) + 1, dtype=np.int32)[None])
        expected = [oracle.add(a, b if sign > 0 else oracle.negate(b)) for a, b in zip(left, right, strict=True)]
        assert tuples(total) == expected
        # And back: the results are tiny again.
        backend.add_rows(total, rows(right), -sign * np.arange(1, len(right) + 1, dtype=np.int32)[None])
        assert tuples(total) == left


def test_references_subtract_and_skip():
    table = rows(small_points(9))
    total = rows([oracle.G] * 19)
    backend.add_rows(total, table, np.arange(-9, 10, dtype=np.int32)[None])
    expected = [oracle.add(oracle.G, oracle.multiply(4 - j, oracle.G)) for j in reversed(range(9))]
    expected += [oracle.G, *(oracle.add(oracle.G, oracle.multiply(j - 4, oracle.G)) for j in range(9))]
    assert tuples(total) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 1023, 1024, 1025, 2049])
def test_batches_of_every_size_agree(size):
    points = multiples(GENERATOR, size)
    total = points.copy()
    backend.add_rows(total, points, np.arange(1, size + 1, dtype=np.int32)[None])
    assert (total == multiples(GENERATOR, 2 * size)[1::2]).all()


def test_nothing_is_added_to_an_empty_array():
    backend.add_rows(np.empty((0, 8), np.uint64), rows([oracle.G]), np.empty((3, 0), np.int32))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 100])
def test_multiples_are_multiples(count):
    assert tuples(multiples(GENERATOR, count)) == [peer(j) for j in range(1, count + 1)]
    assert multiples(GENERATOR, count).ctypes.data % 64 == 0


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 64, 100])
@pytest.mark.parametrize(("start", "step"), [(5, 3), (1, 2), (ORDER - 40, 2), (2**200, 1), (-8, 3)])
def test_progressions_step_by_step(start, step, count):
    first, stride = multiply(start % ORDER, GENERATOR), multiply(step, GENERATOR)
    assert tuples(progression(first, stride, count)) == [peer(start + j * step) for j in range(count)]


# --- commitments ----------------------------------------------------------------------------------------------------


def commitment(x, rho):
    """x G + rho H by libsecp256k1."""
    return oracle.add(peer(x), peer(rho, oracle.H))


def test_commitments_agree_with_libsecp256k1_at_the_edges():
    values = np.resize([0, 1, -1, 2, 1000, -32768, 32767], len(EDGES)).astype(np.int64)
    points = commitments().commit(values, scalar_array(EDGES), 32768)
    assert tuples(points) == [commitment(int(x), rho) for x, rho in zip(values, EDGES, strict=True)]


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), scalars), min_size=1, max_size=20))
def test_random_commitments_agree_with_libsecp256k1(pairs):
    values, rho = np.array([x for x, _ in pairs], np.int64), scalar_array([rho for _, rho in pairs])
    assert tuples(commitments().commit(values, rho, 2**63 - 1)) == [commitment(*pair) for pair in pairs]


@pytest.mark.parametrize("bits", [1, 3, 14, 15, 16, 31, 32, 47, 48, 62, 63])
def test_short_exponents_need_few_windows_and_are_right_at_both_ends(bits):
    bound = 2**bits - 1
    values = np.array([bound, -bound, -bound - 1, 2 ** (bits - 1), -(2 ** (bits - 1)), 0, 1, -1], np.int64)
    assert exponent_windows(bound) == bits // 16 + 1
    halves = commitments().half_exponents(values, bound)
    half = oracle.multiply((ORDER + 1) // 2, oracle.G)
    assert tuples(halves) == [oracle.add(peer(int(x)), half) for x in values]
    rho = [7**90 + i for i in range(len(values))]
    points = commitments().commit(values, scalar_array(rho), bound)
    assert tuples(points) == [commitment(int(x), r) for x, r in zip(values, rho, strict=True)]


@pytest.mark.parametrize("bound", [2**14, 2**20, 2**31 - 1, 2**40])
@pytest.mark.parametrize("count", [1, 8, 13, 1000])
def test_exponents_of_points_are_confirmed_and_no_others(bound, count):
    values = np.random.default_rng(count).integers(-bound, bound + 1, count)
    values[: min(count, 6)] = [-bound, bound, 0, -1, 1, bound - 1][:count]
    points = commitments().half_exponents(values, bound)
    assert commitments().are_half_exponents(points, values, bound).all()
    for others in (-1 - values, np.where(values == bound, -bound, values + 1), values ^ 2**13):  # the first: -(v + 1/2)
        others = np.clip(others, -bound, bound)
        confirmed = commitments().are_half_exponents(points, others, bound)
        assert confirmed.tolist() == (others == values).tolist()
    with pytest.raises(ValueError, match="points has"):
        commitments().are_half_exponents(points[1:], values, bound)


def test_what_was_put_on_is_taken_off_again_with_half_the_generator():
    half = oracle.multiply((ORDER + 1) // 2, oracle.G)
    values = np.arange(-(len(EDGES) // 2), len(EDGES) - len(EDGES) // 2)
    points = commitments().commit(values, scalar_array(EDGES), 100)
    commitments().take_off(points, scalar_array(EDGES))
    assert tuples(points) == [oracle.add(peer(int(x)), oracle.negate(half)) for x in values]


@pytest.mark.parametrize("rho", [0, 1, ORDER - 1, 2**16 - 1, ORDER - 2**16 + 1, ORDER // 2])
def test_blindings_whose_partial_sums_meet_a_row_are_right(rho):
    """Equal to a row, opposite to one, or infinite in between: the exceptional additions of a commitment."""
    edges = [k % ORDER for shift in range(0, 256, 16) for k in (rho << shift, (rho << shift) + 1, -(rho << shift))]
    values = np.zeros(len(edges), np.int64)
    assert tuples(commitments().commit(values, scalar_array(edges), 1)) == [commitment(0, k) for k in edges]


# --- weighted sums --------------------------------------------------------------------------------------------------


def weighed(arrays, weights):
    total = np.empty_like(arrays[0])
    curve.weigh(total, arrays, weights)
    return total


@settings(max_examples=25)
@given(st.lists(st.integers(1, 2**16 - 1), min_size=1, max_size=4), st.data())
def test_weighted_sums_of_points_agree_with_the_oracle(weights, data):
    # Few different small points: equal, opposite and infinite intermediate sums are common.
    exponents = [data.draw(st.lists(st.integers(-2, 2), min_size=6, max_size=6)) for _ in weights]
    arrays = [rows([oracle.multiply(e, oracle.G) for e in row]) for row in exponents]
    expected = [sum(y * row[k] for y, row in zip(weights, exponents, strict=True)) for k in range(6)]
    assert tuples(weighed(arrays, weights)) == [peer(e) for e in expected]


def executed(weights):
    """What a program makes of the numbers (0, .., 1, .., 0): its weights, and how many slots it has touched."""
    program, slots = weighing(tuple(weights))
    held = {}
    for kind, slot, other in program.tolist():
        unit = tuple(int(j == other) for j in range(len(weights)))
        if kind == backend.BEGIN:
            held[slot] = unit
        elif kind == backend.COPY:
            held[slot] = held[other]
        else:
            assert kind != backend.DOUBLE or slot == other
            term = unit if kind == backend.ADD_ARRAY else held[other]
            held[slot] = tuple(a + b for a, b in zip(held[slot], term, strict=True))
    assert set(held) <= set(range(slots))
    return list(held[0])


@given(st.lists(st.integers(1, 2**16 - 1), min_size=1, max_size=60))
def test_a_program_makes_the_weights(weights):
    assert executed(weights) == weights


@pytest.mark.parametrize(
    "weights",
    [
        [1], [2], [65535], [1] * 60, [7] * 60, [65535] * 60, [2**i for i in range(16)], [2**i for i in range(16)] * 3,
        [65535, *[1] * 59], [32768, *[1] * 59], [*range(1, 61)], [65535 - i for i in range(60)], [65535, 65534],
        [1, 65535], [2, 3], [46368, 28657, 17711],
    ],
)  # fmt: skip
def test_programs_of_special_weights_make_them(weights):
    assert executed(weights) == weights
    additions = sum(
        kind in (backend.ADD_ARRAY, backend.ADD_SLOT, backend.DOUBLE) for kind, *_ in weighing(tuple(weights))[0]
    )
    assert additions <= len(weights) * max(2, max(weights).bit_length()) + 32, "no more than by doubling and adding"


def test_fifty_distinct_weights_of_sixteen_bits_agree_with_the_oracle():
    rng = np.random.default_rng(50)
    weights = (rng.choice(2**15, 50, replace=False) + 2**15).tolist()
    exponents = rng.integers(1, 2**60, (50, 3)).tolist()
    arrays = [rows([peer(e) for e in row]) for row in exponents]
    expected = [sum(y * row[k] for y, row in zip(weights, exponents, strict=True)) for k in range(3)]
    assert tuples(weighed(arrays, weights)) == [oracle.multiply(e, oracle.G) for e in expected]


def test_the_curve_check_names_the_first_bad_row():
    good = multiples(GENERATOR, 50)
    assert backend.first_invalid(good) == -1
    for column in range(8):
        bad = good.copy()
        bad[17, column] ^= np.uint64(1)
        bad[30] = 0
        assert backend.first_invalid(bad) == 17
    assert backend.first_invalid(np.zeros((1, 8), np.uint64)) == 0
