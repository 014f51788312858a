"""The encoding of points: one for every list, both backends the same, and nothing else is decoded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.crypto import curve, ndd_fe
from tasks.crypto.curve import GENERATOR
from tasks.crypto.ndd_fe import InvalidEncoding
from tests import oracle
from tests.crypto import rows, tuples

BATCH = 2 * 3072  # points that the IFMA kernel decodes with one inversion
HEADER = 8


def point(k, power=0):
    """k G with x times a power of the cube root of 1, which is on the curve, too."""
    x, y = oracle.multiply(k, oracle.G)
    return x * oracle.BETA**power % oracle.P, y


def numbers(data, first):
    """The three elements of the pair that begins with this point."""
    place = HEADER + 48 * first
    return [int.from_bytes(data[place + 32 * i : place + 32 * (i + 1)], "little") for i in range(3)]


def with_numbers(data, first, elements):
    place = HEADER + 48 * first
    return data[:place] + b"".join(n.to_bytes(32, "little") for n in elements) + data[place + 96 :]


@pytest.fixture(scope="module")
def many(chosen):
    """Three batches and an odd last point: G, 2 G, 3 G, ..."""
    return curve.multiples(GENERATOR, 3 * BATCH + 1)


@given(st.lists(st.tuples(st.integers(1, 3) | st.integers(-3, -1), st.integers(0, 2)), max_size=9))
@settings(max_examples=60)
def test_points_are_encoded_as_the_oracle_does_and_come_back(names):
    """Few different points: equal, opposite and turned ones meet in pairs."""
    points = [point(k, power) for k, power in names]
    data = ndd_fe.encode_points(rows(points))
    assert data == oracle.encode_points(points)
    assert len(data) == ndd_fe.encoded_size(len(points))
    assert tuples(ndd_fe.decode_points(data)) == points


AROUND = [BATCH - 2, BATCH - 1, BATCH, BATCH + 1, 2 * BATCH + 14, 3 * BATCH + 1]


@pytest.mark.parametrize("count", [1, 2, 3, 15, 16, 17, 31, *AROUND])
def test_blocks_batches_and_tails(many, count):
    data = ndd_fe.encode_points(many[:count])
    assert (ndd_fe.decode_points(data) == many[:count]).all()
    assert data[HEADER:][-200:] == oracle.encode_points(tuples(many[:count][count % 2 - 6 :]))[HEADER:][-200:]


@pytest.mark.parametrize("place", [0, 14, 16, BATCH - 2, BATCH, 2 * BATCH + 2, 3 * BATCH - 2])
@pytest.mark.parametrize("power", [0, 1, 2])
def test_opposite_points_in_any_place(many, place, power):
    changed = many.copy()
    changed[place : place + 2] = rows([point(5), point(-5, power)])
    data = ndd_fe.encode_points(changed)
    assert numbers(data, place) == [point(5)[0], oracle.P + power, point(5)[1]]
    assert (ndd_fe.decode_points(data) == changed).all()


def test_nothing_but_opposite_points(many):
    changed = many[:BATCH].copy()
    changed[1::2] = rows([oracle.negate(one) for one in tuples(many[0:BATCH:2])])
    assert (ndd_fe.decode_points(ndd_fe.encode_points(changed)) == changed).all()


@pytest.mark.parametrize("place", [0, 12, BATCH - 2, BATCH, 3 * BATCH - 2])
@pytest.mark.parametrize(
    "change",
    [
        lambda x1, x2, s: (x1, x2, 0),
        lambda x1, x2, s: (x1, x2, oracle.P),
        lambda x1, x2, s: (x1, x2, s + 1),
        lambda x1, x2, s: (s, x2, x1),
        lambda x1, x2, s: (x1 + 1, x2, s),
        lambda x1, x2, s: (x1, x2 ^ 1, s),
        lambda x1, x2, s: (x1, x1, s),
        lambda x1, x2, s: (2**256 - 1, x2, s),
        lambda x1, x2, s: (x1, 2**256 - 1, s),
        lambda x1, x2, s: (x1, x2, 2**256 - 1),
        lambda x1, x2, s: (x1, oracle.P, s),
        lambda x1, x2, s: (0, 0, 1),
    ],
)
def test_a_wrong_pair_is_named(many, place, change):
    data = ndd_fe.encode_points(many)
    wrong = with_numbers(data, place, change(*numbers(data, place)))
    with pytest.raises(InvalidEncoding, match=f"points {place} and {place + 1} are no encoding of two points"):
        ndd_fe.decode_points(wrong)


def test_the_first_wrong_pair_is_named(many):
    data = ndd_fe.encode_points(many)
    for place, elements in ((2 * BATCH, [0, 0, 0]), (BATCH + 6, [1, 1, 1]), (BATCH + 8, [0, 0, 0])):
        data = with_numbers(data, place, elements)
    with pytest.raises(InvalidEncoding, match=f"points {BATCH + 6} and {BATCH + 7} "):
        ndd_fe.decode_points(data)


def test_a_wrong_last_point_is_named(many):
    data = ndd_fe.encode_points(many)
    with pytest.raises(InvalidEncoding, match=f"point {3 * BATCH} is not"):
        ndd_fe.decode_points(data[:-1] + bytes([data[-1] ^ 1]))


SMALL = [1, 2, 3, 4, 6, 8, 12, 13, oracle.P - 1, oracle.P - 2]  # some are an x of the curve, some are not
ELEMENTS = st.sampled_from([*SMALL, 0, oracle.P, oracle.P + 1, oracle.P + 2, oracle.P + 3]) | st.integers(0, 2**256 - 1)
ORDINATES = [point(k, power)[1] for k in (1, -1, 2) for power in range(3)]
ABSCISSAS = [point(k, power)[0] for k in (1, 2) for power in range(3)]


PAIRS = st.tuples(
    ELEMENTS | st.sampled_from(ABSCISSAS), ELEMENTS | st.sampled_from(ABSCISSAS), ELEMENTS | st.sampled_from(ORDINATES)
)


@given(st.lists(PAIRS, max_size=3))
@settings(max_examples=200)
def test_whatever_is_decoded_is_the_one_encoding_of_points_of_the_curve(pairs):
    front = b"HCP\x02" + (2 * len(pairs)).to_bytes(4, "little")
    data = front + b"".join(n.to_bytes(32, "little") for pair in pairs for n in pair)
    try:
        points = tuples(ndd_fe.decode_points(data))
    except InvalidEncoding:
        return
    assert all(one is not None and oracle.on_curve(one) for one in points)
    assert oracle.encode_points(points) == data


def test_bytes_at_any_address_are_decoded(many):
    data = ndd_fe.encode_points(many[:33])
    for shift in range(8):
        assert (ndd_fe.decode_points(memoryview(bytes(shift) + data)[shift:]) == many[:33]).all()


def test_every_bit_counts(many):
    """Changed in any one bit, an encoding is refused, or is that of other points."""
    data = ndd_fe.encode_points(many[:3])
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            assert ndd_fe.encode_points(ndd_fe.decode_points(bytes(changed))) == changed
        except InvalidEncoding:
            continue


def test_points_of_random_ciphertexts_come_back():
    values = np.random.default_rng(1).integers(-2047, 2048, 20_001)
    points = ndd_fe.encrypt(values, bytes(32), bytes([1]) * 32, bound=2047)
    assert (ndd_fe.decode_points(ndd_fe.encode_points(points)) == points).all()
