"""The scheme does what the protocol says, and fails loudly when anything is not as it should be."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.crypto import ndd_fe
from tasks.crypto.curve import integers_of, scalar_array
from tasks.crypto.ndd_fe import ORDER, InvalidEncoding, Label, OutOfBound
from tests import oracle
from tests.crypto import load, rows, tuples

DOMAIN = bytes(range(32))
LABEL = Label(DOMAIN, "mnist", 3)
SALT = bytes(16)


def secret(i, role):
    return bytes([i, len(role)]) * 16


def mask_of(i, role, label=LABEL, salt=SALT):
    return ndd_fe.mask_key(secret(i, role), role, label, salt)


@dataclass(frozen=True)
class Round:
    """One round as its parties see it; the tests replace one thing at a time."""

    values: np.ndarray  # (h, d)
    weights: list[int]
    publisher_masks: list[bytes]
    aggregator_masks: list[bytes]
    ciphertexts: list[np.ndarray]
    key: np.ndarray
    bound: int

    @classmethod
    def of(cls, values, weights, label=LABEL, salt=SALT):
        values = np.asarray(values, np.int64)
        publisher = [mask_of(i, "publisher", label, salt) for i in range(len(values))]
        aggregator = [mask_of(i, "aggregator", label, salt) for i in range(len(values))]
        largest = max(1, int(np.abs(values).max(initial=0)))
        ciphertexts = [
            ndd_fe.encrypt(x, p, a, bound=largest) for x, p, a in zip(values, publisher, aggregator, strict=True)
        ]
        key = ndd_fe.derive_key(publisher, weights, values.shape[1])
        return cls(values, weights, publisher, aggregator, ciphertexts, key, largest * sum(weights))

    def open(self):
        return ndd_fe.open_sum(self.key, self.aggregator_masks, self.ciphertexts, self.weights, bound=self.bound)

    def expected(self):
        return (np.array(self.weights) @ self.values).tolist()


@pytest.fixture(scope="module")
def round_(chosen):
    values = np.random.default_rng(7).integers(-100, 101, (4, 20))
    return Round.of(values, [1, 3, 2, 9])


# --- against the oracle ---------------------------------------------------------------------------------------------


@given(
    st.binary(min_size=32, max_size=32),
    st.sampled_from(["publisher", "aggregator"]),
    st.binary(min_size=32, max_size=32),
    st.text(max_size=40),
    st.integers(0, 2**32),
    st.binary(min_size=16, max_size=16),
)
def test_mask_keys_agree_with_the_oracle(shared, role, domain, task_id, round_number, salt):
    fast = ndd_fe.mask_key(shared, role, Label(domain, task_id, round_number), salt)
    assert fast == oracle.mask_key(shared, role, domain, task_id, round_number, salt)


@settings(max_examples=8)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**40), st.data())
def test_a_whole_round_agrees_with_the_oracle(h, d, start, data):
    values = [data.draw(st.lists(st.integers(-4, 4), min_size=d, max_size=d)) for _ in range(h)]
    weights = data.draw(st.lists(st.integers(1, 3), min_size=h, max_size=h))
    publisher, aggregator = ([mask_of(i, role) for i in range(h)] for role in ("publisher", "aggregator"))
    slow = [oracle.encrypt(*item, start) for item in zip(values, publisher, aggregator, strict=True)]
    fast = [
        ndd_fe.encrypt(np.array(x, np.int64), p, a, bound=4, start=start)
        for x, p, a in zip(values, publisher, aggregator, strict=True)
    ]
    assert [tuples(ciphertext) for ciphertext in fast] == slow

    key = ndd_fe.derive_key(publisher, weights, d, start=start)
    assert integers_of(key) == oracle.derive_key(publisher, weights, d, start)
    assert integers_of(ndd_fe.blinding(key, aggregator, weights, start=start)) == oracle.blinding(
        integers_of(key), aggregator, weights, start
    )
    assert tuples(ndd_fe.weighted_sum(fast, weights)) == oracle.weighted_sum(slow, weights)

    m, rho = ndd_fe.open_sum(key, aggregator, fast, weights, bound=36, start=start)
    sums = [sum(y * x[k] for y, x in zip(weights, values, strict=True)) for k in range(d)]
    assert m.tolist() == sums
    for point, exponent, blinding in zip(oracle.weighted_sum(slow, weights), sums, integers_of(rho), strict=True):
        assert oracle.opens(point, exponent, blinding)


@settings(max_examples=4)
@given(st.lists(st.lists(st.integers(-2, 2), min_size=2, max_size=2), min_size=2, max_size=2))
def test_decrypting_agrees_with_the_oracle(values):
    round_ = Round.of(values, [2, 1])
    m, rho = round_.open()
    slow = [tuples(ciphertext) for ciphertext in round_.ciphertexts]
    key = integers_of(round_.key)
    assert (m.tolist(), integers_of(rho)) == oracle.decrypt(key, round_.aggregator_masks, slow, [2, 1], 6)


# --- laws -----------------------------------------------------------------------------------------------------------


def test_the_aggregator_opens_the_weighted_sum_and_anybody_can_check_it(round_):
    m, rho = round_.open()
    assert m.tolist() == round_.expected()
    assert ndd_fe.failing_coordinates(round_.ciphertexts, round_.weights, m, rho) == []


@settings(max_examples=15)
@given(st.integers(1, 5), st.integers(0, 6), st.data())
def test_sums_open_for_all_sizes_and_weights(h, d, data):
    integers = st.integers(-1000, 1000)
    values = [data.draw(st.lists(integers, min_size=d, max_size=d)) for _ in range(h)]
    weights = data.draw(st.lists(st.sampled_from([1, 2, 255, 65535]), min_size=h, max_size=h))
    round_ = Round.of(np.array(values, np.int64).reshape(h, d), weights)
    m, rho = round_.open()
    assert m.tolist() == round_.expected()
    assert ndd_fe.failing_coordinates(round_.ciphertexts, weights, m, rho) == []


def test_all_zero_updates_open_to_zero():
    m, rho = Round.of(np.zeros((3, 50)), [1, 1, 1]).open()
    assert not m.any()
    assert rho.any(axis=1).all()


def test_sums_at_the_bound_open_and_one_past_it_does_not():
    round_ = Round.of([[100, -100, 100], [100, -100, 99]], [1, 2])
    assert replace(round_, bound=300).open()[0].tolist() == [300, -300, 298]
    with pytest.raises(OutOfBound) as caught:
        replace(round_, bound=299).open()
    assert caught.value.coordinates == [0, 1]


def test_chunks_equal_the_whole(round_):
    whole, rho = round_.open()
    for first, last in ((0, 1), (1, 8), (8, 20)):
        part = slice(first, last)
        arguments = zip(round_.values, round_.publisher_masks, round_.aggregator_masks, strict=True)
        ciphertexts = [ndd_fe.encrypt(x[part], p, a, bound=100, start=first) for x, p, a in arguments]
        for ciphertext, complete in zip(ciphertexts, round_.ciphertexts, strict=True):
            assert (ciphertext == complete[part]).all()
        key = ndd_fe.derive_key(round_.publisher_masks, round_.weights, last - first, start=first)
        assert (key == round_.key[part]).all()
        m, rho_part = ndd_fe.open_sum(
            key, round_.aggregator_masks, ciphertexts, round_.weights, bound=round_.bound, start=first
        )
        assert (m == whole[part]).all()
        assert (rho_part == rho[part]).all()


def test_more_coordinates_than_a_chunk():
    values = np.random.default_rng(3).integers(-7, 8, (3, 9001))
    round_ = Round.of(values, [1, 2, 1])
    m, rho = round_.open()
    assert m.tolist() == round_.expected()
    for first, last in ((4090, 4100), (8192, 9001)):
        part = slice(first, last)
        masks = round_.publisher_masks[0], round_.aggregator_masks[0]
        alone = ndd_fe.encrypt(values[0, part], *masks, bound=7, start=first)
        assert (alone == round_.ciphertexts[0][part]).all()
        key = ndd_fe.derive_key(round_.publisher_masks, round_.weights, last - first, start=first)
        assert (key == round_.key[part]).all()
        assert (ndd_fe.blinding(key, round_.aggregator_masks, round_.weights, start=first) == rho[part]).all()
    k = 8500
    assert integers_of(round_.key[k : k + 1]) == oracle.derive_key(round_.publisher_masks, round_.weights, 1, k)
    rho[8999] = rho[9000]
    m[4096] += 1
    assert ndd_fe.failing_coordinates(round_.ciphertexts, round_.weights, m, rho) == [4096, 8999]


def test_read_only_and_strided_arrays_are_accepted(round_):
    m, rho = round_.open()
    read_only = [ndd_fe.decode_points(ndd_fe.encode_points(c)) for c in round_.ciphertexts]
    for array in read_only:
        array.flags.writeable = False
    strided = [np.repeat(c, 2, axis=0)[::2] for c in read_only]
    key = round_.key.copy()
    key.flags.writeable = False
    again = replace(round_, ciphertexts=strided, key=key)
    assert (again.open()[0] == m).all()
    assert ndd_fe.failing_coordinates(strided, round_.weights, m, rho) == []


def test_progress_is_reported(round_):
    seen = []
    ndd_fe.open_sum(
        round_.key, round_.aggregator_masks, round_.ciphertexts, round_.weights, bound=round_.bound,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(20, 20)]


def test_inputs_are_left_as_they_were(round_):
    before = [c.copy() for c in round_.ciphertexts], round_.key.copy()
    round_.open()
    assert all((a == b).all() for a, b in zip(before[0], round_.ciphertexts, strict=True))
    assert (before[1] == round_.key).all()


# --- one thing wrong ------------------------------------------------------------------------------------------------


def refused(round_):
    with pytest.raises(OutOfBound) as caught:
        round_.open()
    return caught.value.coordinates


def test_a_tampered_coordinate_is_named(round_):
    forged = round_.ciphertexts[2].copy()
    forged[13] = forged[12]
    ciphertexts = [*round_.ciphertexts[:2], forged, *round_.ciphertexts[3:]]
    assert refused(replace(round_, ciphertexts=ciphertexts)) == [13]


def test_indices_count_from_the_first_coordinate_of_the_whole(round_):
    forged = round_.ciphertexts[0].copy()
    forged[13] = forged[12]
    part = slice(10, 20)
    with pytest.raises(OutOfBound, match="13") as caught:
        ndd_fe.open_sum(
            round_.key[part], round_.aggregator_masks, [forged[part], *(c[part] for c in round_.ciphertexts[1:])],
            round_.weights, bound=round_.bound, start=10,
        )  # fmt: skip
    assert caught.value.coordinates == [13]


def test_a_missing_ciphertext_opens_nothing(round_):
    fewer = replace(
        round_,
        ciphertexts=round_.ciphertexts[1:],
        weights=round_.weights[1:],
        aggregator_masks=round_.aggregator_masks[1:],
    )
    assert refused(fewer) == list(range(20))


def test_an_exchanged_ciphertext_opens_nothing(round_):
    assert refused(replace(round_, ciphertexts=round_.ciphertexts[::-1])) == list(range(20))


def test_other_weights_open_nothing(round_):
    assert refused(replace(round_, weights=[1, 3, 3, 9])) == list(range(20))


@pytest.mark.parametrize(
    "label", [Label(DOMAIN, "mnist", 4), Label(DOMAIN, "mnist2", 3), Label(DOMAIN[::-1], "mnist", 3)]
)
def test_a_key_for_another_label_opens_nothing(round_, label):
    other = Round.of(round_.values, round_.weights, label)
    assert refused(replace(round_, key=other.key)) == list(range(20))


def test_a_key_for_another_salt_opens_nothing(round_):
    other = Round.of(round_.values, round_.weights, salt=b"another 16 bytes")
    assert refused(replace(round_, key=other.key)) == list(range(20))


def test_a_key_for_a_part_of_the_cohort_opens_nothing(round_):
    key = ndd_fe.derive_key(round_.publisher_masks[1:], round_.weights[1:], 20)
    assert refused(replace(round_, key=key)) == list(range(20))


def test_a_wrong_aggregator_mask_opens_nothing(round_):
    masks = [*round_.aggregator_masks[:-1], bytes(32)]
    assert refused(replace(round_, aggregator_masks=masks)) == list(range(20))


def test_one_wrong_key_coordinate_is_named(round_):
    key = round_.key.copy()
    key[5] = scalar_array([integers_of(key)[5] + 1])
    assert refused(replace(round_, key=key)) == [5]


def test_every_field_of_a_mask_key_matters():
    base = (secret(1, "publisher"), "publisher", LABEL, SALT)
    others = [
        (secret(2, "publisher"), "publisher", LABEL, SALT),
        (secret(1, "publisher"), "aggregator", LABEL, SALT),
        (secret(1, "publisher"), "publisher", replace(LABEL, domain=bytes(32)), SALT),
        (secret(1, "publisher"), "publisher", replace(LABEL, task_id="mnis"), SALT),
        (secret(1, "publisher"), "publisher", replace(LABEL, task_id=""), SALT),
        (secret(1, "publisher"), "publisher", replace(LABEL, round_number=0), SALT),
        (secret(1, "publisher"), "publisher", LABEL, b"x" * 16),
    ]
    keys = [ndd_fe.mask_key(*arguments) for arguments in [base, *others]]
    assert len(set(keys)) == len(keys)


def test_two_encryptions_of_one_vector_share_no_point():
    values = np.full(300, 7)
    first, second = (Round.of([values], [1], salt=salt).ciphertexts[0] for salt in (bytes(16), b"\1" * 16))
    assert len({bytes(row) for row in np.concatenate([first, second])}) == 600


def test_equal_coordinates_have_unequal_ciphertexts():
    ciphertext = Round.of([np.zeros(9001)], [1]).ciphertexts[0]  # more than two chunks
    assert len({bytes(row) for row in ciphertext[:, :4]}) == 9001


# --- the border -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [101, -101, 2**63 - 1, -(2**63)])
def test_a_value_past_the_bound_is_refused_by_its_coordinate(value):
    values = np.array([100, -100, value, 500])
    with pytest.raises(ValueError, match=f"coordinate 42 is {value}"):
        ndd_fe.encrypt(values, bytes(32), bytes(32), bound=100, start=40)


@pytest.mark.parametrize("weights", [[0, 1], [-1, 1], [2**16, 1], [1], [1, 1, 1], []])
def test_weights_outside_the_range_are_refused(weights):
    ciphertexts = [rows([oracle.G])] * 2
    with pytest.raises(ValueError, match="weight"):
        ndd_fe.weighted_sum(ciphertexts, weights)
    with pytest.raises(ValueError, match="weight"):
        ndd_fe.derive_key([bytes(32)] * 2, weights, 1)
    with pytest.raises(ValueError, match="weight"):
        ndd_fe.blinding(np.zeros((1, 4), np.uint64), [bytes(32)] * 2, weights)


def test_lengths_that_do_not_agree_are_refused(round_):
    shorter = [*round_.ciphertexts[:-1], round_.ciphertexts[-1][:-1]]
    with pytest.raises(ValueError, match="ciphertext 3 has 19 rows"):
        replace(round_, ciphertexts=shorter).open()
    with pytest.raises(ValueError, match="functional key has 19 rows"):
        replace(round_, key=round_.key[:-1]).open()
    m, rho = round_.open()
    with pytest.raises(ValueError, match="m has 19 rows"):
        ndd_fe.failing_coordinates(round_.ciphertexts, round_.weights, m[1:], rho)
    with pytest.raises(ValueError, match="rho has 19 rows"):
        ndd_fe.failing_coordinates(round_.ciphertexts, round_.weights, m, rho[1:])


def test_keys_salts_and_values_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="32 bytes"):
        ndd_fe.encrypt(np.array([1]), bytes(31), bytes(32), bound=1)
    with pytest.raises(ValueError, match="salt"):
        ndd_fe.mask_key(bytes(32), "publisher", LABEL, bytes(15))
    with pytest.raises(ValueError, match="domain"):
        ndd_fe.mask_key(bytes(32), "publisher", replace(LABEL, domain=b""), SALT)
    with pytest.raises(ValueError, match="shared secret"):
        ndd_fe.mask_key(b"", "publisher", LABEL, SALT)
    with pytest.raises(ValueError, match="role"):
        ndd_fe.mask_key(bytes(32), "miner", LABEL, SALT)
    with pytest.raises(ValueError, match="int64"):
        ndd_fe.encrypt(np.array([1.5]), bytes(32), bytes(32), bound=1)
    with pytest.raises(ValueError, match="bound"):
        ndd_fe.encrypt(np.array([0]), bytes(32), bytes(32), bound=0)


def test_infinity_is_a_legal_sum():
    a = rows([oracle.G, oracle.G, oracle.H])
    b = rows([oracle.multiply(-1, oracle.G), oracle.G, oracle.G])
    total = ndd_fe.weighted_sum([a, b], [5, 5])
    assert tuples(total)[0] is None
    assert tuples(total)[1] == oracle.multiply(10, oracle.G)
    zero = np.zeros((1, 4), np.uint64)
    assert ndd_fe.failing_coordinates([a[:1], b[:1]], [5, 5], np.array([0]), zero) == []
    assert ndd_fe.failing_coordinates([a[:1], b[:1]], [5, 5], np.array([1]), zero) == [0]


@pytest.mark.parametrize("case", load("points.json"), ids=lambda case: case["why"])
def test_point_vectors(case):
    data = bytes.fromhex(case["hex"])
    if case["valid"]:
        points = ndd_fe.decode_points(data)
        assert points.shape == (case["count"], 8)
        assert all(oracle.on_curve(point) for point in tuples(points))
        assert ndd_fe.encode_points(points) == data
    else:
        with pytest.raises(InvalidEncoding, match=case["message"]):
            ndd_fe.decode_points(data)


@pytest.mark.parametrize("case", load("scalars.json"), ids=lambda case: case["why"])
def test_scalar_vectors(case):
    data = bytes.fromhex(case["hex"])
    if case["valid"]:
        scalars = ndd_fe.decode_scalars(data)
        assert integers_of(scalars) == [int(v, 16) for v in case["values"]]
        assert ndd_fe.encode_scalars(scalars) == data
    else:
        with pytest.raises(InvalidEncoding, match=case["message"]):
            ndd_fe.decode_scalars(data)


def test_what_could_not_be_decoded_is_not_encoded():
    with pytest.raises(InvalidEncoding, match="point 0"):
        ndd_fe.encode_points(np.zeros((1, 8), np.uint64))
    with pytest.raises(InvalidEncoding, match="scalar 1"):
        ndd_fe.encode_scalars(np.array([[0] * 4, [2**64 - 1] * 4], np.uint64))


def test_an_unreduced_rho_is_no_opening(round_):
    m, rho = round_.open()
    rho[3] = 2**64 - 1
    with pytest.raises(InvalidEncoding, match="scalar 3"):
        ndd_fe.failing_coordinates(round_.ciphertexts, round_.weights, m, rho)


# --- audit projections ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 63, 64, 65, 5000])
def test_projections_of_one_miner_open_and_are_verifiable(d):
    rng = np.random.default_rng(d)
    values, signs = rng.integers(-50, 51, (1, d)), rng.choice([-1, 1], (5, d))
    round_ = Round.of(values, [1])
    key = ndd_fe.derive_projection_key(round_.publisher_masks[0], signs)
    masks = [integers_of(ndd_fe.derive_key(round_.publisher_masks, [1], d))]
    assert integers_of(key) == [sum(int(a) * r for a, r in zip(row, masks[0], strict=True)) % ORDER for row in signs]

    ciphertext, mask = round_.ciphertexts[0], round_.aggregator_masks[0]
    opened, rho = ndd_fe.open_projection(key, mask, ciphertext, signs, bound=50 * d)
    assert opened.tolist() == (signs @ values[0]).tolist()
    assert ndd_fe.failing_projections(ciphertext, signs, opened, rho) == []
    opened[2] += 1
    assert ndd_fe.failing_projections(ciphertext, signs, opened, rho) == [2]


@pytest.mark.parametrize("sizes", [(5000,), (1, 4999), (1024, 1024, 1024, 1024, 904), (64,) * 78 + (8,)])
def test_a_projection_of_consecutive_chunks_is_that_of_the_whole(sizes):
    signs = np.random.default_rng(3).choice(np.array([-1, 1], np.int8), (2, 5000))
    round_ = Round.of(np.random.default_rng(4).integers(-50, 51, (1, 5000)), [1])
    whole, edges = round_.ciphertexts[0], np.cumsum((0, *sizes))
    key = ndd_fe.derive_projection_key(round_.publisher_masks[0], signs)

    def chunks():
        return (whole[first:last] for first, last in pairwise(edges))

    expected = ndd_fe.open_projection(key, round_.aggregator_masks[0], whole, signs, bound=250_000)
    opened, rho = ndd_fe.open_projection(key, round_.aggregator_masks[0], chunks(), signs, bound=250_000)
    assert opened.tolist() == expected[0].tolist()
    assert rho.tolist() == expected[1].tolist()
    assert ndd_fe.failing_projections(chunks(), signs, opened, rho) == []
    assert ndd_fe.failing_projections(chunks(), signs, opened + 1, rho) == [0, 1]


@pytest.mark.parametrize("rows", [9, 11])
@pytest.mark.parametrize("in_chunks", [False, True])
def test_a_ciphertext_of_another_length_is_not_projected(rows, in_chunks):
    signs, points = np.ones((1, 10), np.int8), Round.of(np.ones((1, rows)), [1]).ciphertexts[0]
    with pytest.raises(ValueError, match=f"ciphertext has {rows} rows, expected 10"):
        ndd_fe.failing_projections([points] if in_chunks else points, signs, np.zeros(1, np.int64), np.zeros((1, 4)))


def test_projections_of_another_miner_do_not_open():
    signs = np.ones((2, 10), np.int64)
    round_ = Round.of(np.ones((2, 10)), [1, 1])
    key = ndd_fe.derive_projection_key(round_.publisher_masks[0], signs)
    with pytest.raises(OutOfBound) as caught:
        ndd_fe.open_projection(key, round_.aggregator_masks[1], round_.ciphertexts[1], signs, bound=10)
    assert caught.value.coordinates == [0, 1]


@pytest.mark.parametrize("coefficients", [np.zeros((1, 3)), np.ones(3), np.full((1, 3), 2)])
def test_other_coefficients_are_refused(coefficients):
    with pytest.raises(ValueError, match="coefficients"):
        ndd_fe.derive_projection_key(bytes(32), coefficients)
