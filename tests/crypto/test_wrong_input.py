"""Wrong input is refused with its name and value, or is handled; it never reaches a kernel, which would trust it."""

from types import SimpleNamespace

import numpy as np
import pytest

from tasks.crypto import bsgs, curve, ndd_fe, pedersen
from tasks.crypto.bsgs import BabySteps, baby_steps
from tasks.crypto.curve import GENERATOR, multiples

KEY = bytes(32)
VALUES = np.arange(20)


@pytest.fixture(scope="module")
def right(chosen):
    """Arguments that are as they should be."""
    return SimpleNamespace(
        points=multiples(GENERATOR, 20),
        key=ndd_fe.derive_key([KEY], [1], 20),
        ciphertext=ndd_fe.encrypt(VALUES, KEY, KEY, bound=100),
        tables=pedersen.commitments(),
        slots=baby_steps(64).slots,
    )


def encrypt(values=VALUES, **options):
    return ndd_fe.encrypt(values, KEY, KEY, **{"bound": 100, **options})


def big_endian(array):
    return array.astype(array.dtype.newbyteorder(">"))


def read_only(array):
    copied = array.copy()
    copied.flags.writeable = False
    return copied


def strided(array):
    return np.repeat(array, 2, axis=0)[::2]


def unaligned(array):
    """At an odd address."""
    moved = np.ndarray(array.shape, array.dtype, bytearray(array.nbytes + 1), offset=1)
    moved[...] = array
    return moved


# --- values, bounds, starts, lengths --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        VALUES * 1.0, np.array([np.nan]), np.array([True]), np.array([2**70], object), VALUES.astype(np.int32),
        VALUES.astype(np.uint64), big_endian(VALUES), VALUES[None], np.array([], float),
    ],
)  # fmt: skip
def test_values_of_another_type_or_shape(right, values):
    for call in (
        lambda: encrypt(values),
        lambda: bsgs.encode_exponents(values),
        lambda: right.tables.commit(values, right.key, 100),
        lambda: right.tables.half_exponents(values, 100),
        lambda: ndd_fe.failing_coordinates([right.ciphertext], [1], values, right.key),
    ):
        with pytest.raises(ValueError, match=r"(values|exponents|m): expected int64 of shape \(d,\), got"):
            call()


@pytest.mark.parametrize("form", [strided, unaligned, read_only, list])
def test_values_in_any_memory(right, form):
    assert (encrypt(form(VALUES)) == right.ciphertext).all()
    assert (bsgs.encode_exponents(form(VALUES)) == bsgs.encode_exponents(VALUES)).all()
    assert ndd_fe.failing_coordinates([right.ciphertext], [1], form(VALUES), right.key) != []


@pytest.mark.parametrize("bound", [0, -1, 2**63, 2**200, 100.0, float("nan"), "100", None])
def test_bounds(right, bound):
    with pytest.raises(ValueError, match="bound is"):
        encrypt(bound=bound)
    with pytest.raises(ValueError, match="bound is"):
        ndd_fe.open_sum(right.key, [KEY], [right.ciphertext], [1], bound=bound)
    with pytest.raises(ValueError, match="bound is"):
        bsgs.discrete_logs(right.points, bound)
    if bound != 0:
        with pytest.raises(ValueError, match="bound is"):
            right.tables.commit(VALUES, right.key, bound)


@pytest.mark.parametrize("number", [np.int64(100), np.uint8(100), np.int32(100), np.uint64(100)])
def test_integers_of_numpy_are_integers(right, number):
    assert (encrypt(bound=number) == right.ciphertext).all()
    assert (encrypt(start=number) == encrypt(start=100)).all()
    assert (ndd_fe.derive_key([KEY], [number], number) == ndd_fe.derive_key([KEY], [100], 100)).all()
    assert bsgs.discrete_logs(right.points, number, BabySteps.build(number)).tolist() == list(range(1, 21))


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64, np.uint16])
def test_weights_of_numpy_do_not_overflow(right, kind):
    array = np.array([127, 126, 125], kind)
    expected = ndd_fe.weighted_sum([right.ciphertext] * 3, [127, 126, 125])
    assert (ndd_fe.weighted_sum([right.ciphertext] * 3, array) == expected).all()


@pytest.mark.parametrize("start", [-1, 2**127 - 19, 2**127, 2**200, 1.0, None])
def test_starts_beyond_the_counter(right, start):
    """At 2**127 the counter of AES begins again: a mask would be used twice."""
    for call in (
        lambda: encrypt(start=start),
        lambda: ndd_fe.derive_key([KEY], [1], 20, start=start),
        lambda: ndd_fe.blinding(right.key, [KEY], [1], start=start),
        lambda: ndd_fe.open_sum(right.key, [KEY], [right.ciphertext], [1], bound=9, start=start),
    ):
        with pytest.raises(ValueError, match="start is"):
            call()


def test_the_last_start_works(right):
    start = 2**127 - 20
    key = ndd_fe.derive_key([KEY], [1], 20, start=start)
    assert (
        ndd_fe.open_sum(key, [KEY], [encrypt(start=start)], [1], bound=20, start=start)[0].tolist() == VALUES.tolist()
    )


@pytest.mark.parametrize("length", [-1, 2**62, 1.5])
def test_lengths(length):
    with pytest.raises(ValueError, match="length is"):
        ndd_fe.derive_key([KEY], [1], length)


@pytest.mark.parametrize("weights", [[1.5], [2.0], [float("nan")], ["1"], [0], [-1], [2**16], [None], [], [1, 1]])
def test_weights(right, weights):
    for call in (
        lambda: ndd_fe.weighted_sum([right.ciphertext], weights),
        lambda: ndd_fe.derive_key([KEY], weights, 5),
        lambda: ndd_fe.blinding(right.key, [KEY], weights),
    ):
        with pytest.raises(ValueError, match="weight"):
            call()


@pytest.mark.parametrize("round_number", [-1, 2**64, 1.0])
def test_round_numbers(round_number):
    with pytest.raises(ValueError, match="round is"):
        ndd_fe.mask_key(KEY, "publisher", ndd_fe.Label(KEY, "task", round_number), bytes(16))


# --- arrays of words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        big_endian,
        lambda a: a.astype(np.int64),
        lambda a: a.astype(object),
        lambda a: a[0],
        lambda a: a[None],
        lambda a: a[:, :-1],
    ],
)
def test_words_of_another_type_or_shape(right, change):
    points, key = change(right.ciphertext), change(right.key)
    for call in (
        lambda: ndd_fe.weighted_sum([points], [1]),
        lambda: ndd_fe.open_sum(right.key, [KEY], [points], [1], bound=9),
        lambda: ndd_fe.open_sum(key, [KEY], [right.ciphertext], [1], bound=9),
        lambda: ndd_fe.failing_coordinates([right.ciphertext], [1], VALUES, key),
        lambda: ndd_fe.encode_points(points),
        lambda: ndd_fe.encode_scalars(key),
        lambda: bsgs.discrete_logs(points, 9),
        lambda: bsgs.half_logs(points, 9),
        lambda: right.tables.commit(VALUES, key, 100),
        lambda: right.tables.take_off(right.points.copy(), key),
        lambda: right.tables.take_off(points, right.key),
        lambda: curve.weigh(np.empty_like(right.points), [points], [1]),
        lambda: ndd_fe.open_projection(key, KEY, right.ciphertext, np.ones((20, 20), np.int8), bound=9),
    ):
        with pytest.raises(ValueError, match=r"expected (uint64|an array in one piece)|rows, expected"):
            call()


@pytest.mark.parametrize("form", [np.asfortranarray, strided, unaligned, read_only])
def test_words_in_any_memory(right, form):
    points, key = form(right.ciphertext), form(right.key)
    expected = ndd_fe.weighted_sum([right.ciphertext] * 2, [2, 3])
    assert (ndd_fe.weighted_sum([points, right.ciphertext], [2, 3]) == expected).all()
    assert ndd_fe.open_sum(key, [KEY], [points], [1], bound=50)[0].tolist() == VALUES.tolist()
    assert ndd_fe.encode_points(points) == ndd_fe.encode_points(right.ciphertext)
    assert ndd_fe.encode_scalars(key) == ndd_fe.encode_scalars(right.key)
    assert bsgs.discrete_logs(form(right.points), 30).tolist() == list(range(1, 21))


@pytest.mark.parametrize("count", [0, 3, 5000])
def test_arrays_of_different_lengths(right, count):
    key = np.resize(right.key, (count, 4))
    for call in (
        lambda: right.tables.commit(VALUES, key, 100),
        lambda: right.tables.commit_into(np.empty((count, 8), np.uint64), VALUES, right.key, 100),
        lambda: right.tables.take_off(right.points.copy(), key),
        lambda: ndd_fe.open_sum(key, [KEY], [right.ciphertext], [1], bound=9),
        lambda: ndd_fe.failing_coordinates([right.ciphertext], [1], VALUES, key),
        lambda: ndd_fe.weighted_sum([right.ciphertext, np.zeros((count, 8), np.uint64)], [1, 2]),
        lambda: curve.weigh(np.empty((count, 8), np.uint64), [right.ciphertext], [1]),
        lambda: curve.weigh(np.empty((20, 8), np.uint64), [right.ciphertext, np.zeros((count, 8), np.uint64)], [1, 2]),
    ):
        with pytest.raises(ValueError, match=f"has ({count}|20) rows, expected ({count}|20)"):
            call()


@pytest.mark.parametrize("form", [read_only, strided, np.asfortranarray])
def test_results_are_written_in_place_or_not_at_all(right, form):
    for call in (
        lambda: right.tables.take_off(form(right.points), right.key),
        lambda: right.tables.commit_into(form(right.points), VALUES, right.key, 100),
        lambda: curve.weigh(form(right.points), [right.ciphertext], [3]),
    ):
        with pytest.raises(ValueError, match="an array in one piece that can be written to"):
            call()


def test_a_sum_may_be_written_over_one_of_its_terms(right):
    total = right.points.copy()
    curve.weigh(total, [total, right.ciphertext], [3, 2])
    assert (total == ndd_fe.weighted_sum([right.points, right.ciphertext], [3, 2])).all()


@pytest.mark.parametrize("weights", [[0, 1], [-1, 2], [1.5, 1], [1], [1, 1, 1], [], [2**63, 1]])
def test_weights_of_a_sum(right, weights):
    with pytest.raises(ValueError, match="weight"):
        curve.weigh(np.empty((20, 8), np.uint64), [right.ciphertext] * 2, weights)


def test_sums_of_nothing_have_no_rows(right):
    empty = right.ciphertext[:0]
    assert ndd_fe.weighted_sum([empty, empty], [1, 2]).shape == (0, 8)
    assert encrypt(VALUES[:0]).shape == (0, 8)
    assert ndd_fe.open_sum(right.key[:0], [KEY], [empty], [1], bound=5)[0].shape == (0,)
    assert ndd_fe.failing_coordinates([empty], [1], VALUES[:0], right.key[:0]) == []
    assert right.tables.commit(VALUES[:0], right.key[:0], 5).shape == (0, 8)
    assert ndd_fe.decode_points(ndd_fe.encode_points(empty)).shape == (0, 8)
    with pytest.raises(ValueError, match="0 weights for 0"):
        ndd_fe.weighted_sum([], [])
    with pytest.raises(ValueError, match="0 weights for 0"):
        curve.weigh(np.empty((20, 8), np.uint64), [], [])


def test_points_off_the_curve_are_added_to_something(right):
    """What `decode_points` refuses is garbage in, garbage out: no error, no end of the process, no other row harmed."""
    garbage = right.ciphertext.copy()
    garbage[3] = 2**64 - 1
    garbage[7] = 7
    garbage[19, 4:] = 0
    total = ndd_fe.weighted_sum([garbage, right.points, garbage], [3, 1, 65535])
    expected = ndd_fe.weighted_sum([right.ciphertext, right.points, right.ciphertext], [3, 1, 65535])
    assert np.flatnonzero((total != expected).any(axis=1)).tolist() == [3, 7, 19]


def test_unreduced_scalars_are_refused_or_reduced(right):
    top = np.full((20, 4), 2**64 - 1, np.uint64)
    with pytest.raises(ndd_fe.InvalidEncoding, match="scalar 0"):
        ndd_fe.failing_coordinates([right.ciphertext], [1], VALUES, top)
    reduced = curve.scalar_array([2**256 - 1] * 20)
    assert (ndd_fe.blinding(top, [KEY], [1]) == ndd_fe.blinding(reduced, [KEY], [1])).all()


@pytest.mark.parametrize("signs", [np.full((1, 20), np.nan), np.zeros((1, 20)), np.ones(20), np.full((1, 20), "1")])
def test_coefficients(right, signs):
    with pytest.raises(ValueError, match="coefficients"):
        ndd_fe.failing_projections(right.ciphertext, signs, np.zeros(1, np.int64), np.zeros((1, 4), np.uint64))


# --- tables of a caller ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -5, 2**28 + 1, 2**62, 1.5])
def test_sizes_of_tables(right, size):
    with pytest.raises(ValueError, match="size of a table is"):
        BabySteps(size, right.slots)
    with pytest.raises(ValueError, match="size of a table is"):
        BabySteps.build(size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda slots: slots.astype(np.int64), "expected uint64 in one row"),
        (lambda slots: slots.reshape(-1, 8), "expected uint64 in one row"),
        (strided, "expected uint64 in one row"),
        (lambda slots: slots[:0], "expected a power of two from 8 on, got 0"),
        (lambda slots: slots[:4], "expected a power of two from 8 on, got 4"),
        (lambda slots: slots[:-1], "expected a power of two from 8 on, got 127"),
        (lambda slots: slots | np.uint64(1), "none of 128 is free"),
    ],
)
def test_slots_of_tables(right, change, message):
    """Without a free slot a search would never end."""
    with pytest.raises(ValueError, match=message):
        BabySteps(64, change(right.slots))


def test_a_table_far_too_small_for_the_bound(right):
    """A caller's slip would otherwise ask for gigabytes of giant steps."""
    with pytest.raises(ValueError, match="bound 1099511627776 takes 8589934592 giant steps with a table of 64"):
        bsgs.discrete_logs(right.points, 2**40, baby_steps(64))


def test_a_table_of_commitments_has_all_its_rows():
    with pytest.raises(ValueError, match="688128 rows, got 5"):
        pedersen.Commitments(np.zeros((5, 8), np.uint64))
