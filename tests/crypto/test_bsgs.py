"""Discrete logs: every exponent within the bound is found, no other is, whatever the table holds."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.crypto import bsgs, ndd_fe
from tasks.crypto.bsgs import BabySteps, OutOfBound, baby_steps, default_size, discrete_logs, encode_exponents
from tests import oracle
from tests.crypto import rows, tuples


def points(*exponents):
    return encode_exponents(np.array(exponents, np.int64))


def failing(array, bound, table=None):
    with pytest.raises(OutOfBound) as caught:
        discrete_logs(array, bound, table)
    return caught.value.coordinates


def test_exponents_are_encoded_like_the_oracle_does():
    values = [0, 1, -1, 2, 4095, 4096, 4097, -4096, 2**40, -(2**40) - 1, 2**63 - 1, -(2**63)]
    assert tuples(points(*values)) == [oracle.multiply(v, oracle.G) for v in values]


@pytest.mark.parametrize("bound", [1, 2, 5, 7, 50, 999])
@pytest.mark.parametrize("size", [1, 2, 3, 10, 50, 2000])
def test_every_exponent_is_found_and_one_past_the_edge_is_not(bound, size):
    table = baby_steps(size)
    exponents = np.arange(-bound, bound + 1)
    assert (discrete_logs(encode_exponents(exponents), bound, table) == exponents).all()
    around = np.arange(-bound - 3, bound + 4)
    assert failing(encode_exponents(around), bound, table) == [0, 1, 2, 2 * bound + 4, 2 * bound + 5, 2 * bound + 6]


@pytest.mark.parametrize(("size", "bound"), [(2**12, 2**20), (2**16, 2**24), (1000, 2**20), (2**18, 2**32)])
def test_edges_of_steps_and_bound(size, bound):
    stride = 2 * size + 1
    edges = [0, 1, size - 1, size, size + 1, stride - 1, stride, stride + 1, stride + size, stride + size + 1]
    edges += [2 * stride, 7 * stride - size, bound - 1, bound]
    exponents = np.array([sign * e for e in edges for sign in (1, -1)], np.int64)
    table = baby_steps(size)
    assert (discrete_logs(encode_exponents(exponents), bound, table) == exponents).all()
    assert failing(points(bound + 1, 0, -bound - 1, bound), bound, table) == [0, 2]


@settings(max_examples=20)
@given(st.lists(st.integers(-(2**30), 2**30), min_size=1, max_size=30))
def test_random_exponents_are_found(exponents):
    assert discrete_logs(points(*exponents), 2**30, baby_steps(2**14)).tolist() == exponents


def test_more_points_than_a_batch_with_duplicates():
    exponents = np.random.default_rng(1).integers(-5000, 5001, 9000)
    assert (discrete_logs(encode_exponents(exponents), 5000, baby_steps(100)) == exponents).all()


def test_a_random_point_has_no_exponent():
    stranger = oracle.multiply(3**150, oracle.G)
    assert failing(rows([oracle.G, stranger, None, oracle.H]), 2**20) == [1, 3]


def test_a_lone_point_costs_one_inversion_for_many_giant_steps():
    assert discrete_logs(points(2**26 - 5), 2**26, baby_steps(64)).tolist() == [2**26 - 5]


# --- tags that fit by accident --------------------------------------------------------------------------------------


def forged(size, *entries):
    """A table with false entries (exponent whose tag is used, exponent it claims), put in before the true ones."""
    slots = np.zeros_like(baby_steps(size).slots)
    mask = len(slots) - 1

    def put(tag, entry):
        slot = tag & mask
        while slots[slot, 1]:
            slot = (slot + 1) & mask
        slots[slot] = tag, entry

    for exponent, claimed in entries:
        put(int(points(exponent)[0, 0]), claimed)
    for tag, entry in baby_steps(size).slots.tolist():
        if entry:
            put(tag, entry)
    return BabySteps(size, slots)


def test_a_false_tag_in_the_same_chain_is_passed_over():
    table = forged(10, (4, 2 * 7), (4, 2 * 9 + 1), (4, 2 * 1))
    assert discrete_logs(points(4, -4, 7, 0), 10, table).tolist() == [4, -4, 7, 0]


def test_a_false_tag_at_an_earlier_giant_step_is_passed_over():
    # 50 = 2 * 21 + 8 is found at the second giant step; its own tag, and that of 50 - 21, are claimed by others.
    table = forged(10, (50, 2 * 3), (29, 2 * 5 + 1), (71, 2 * 2))
    assert discrete_logs(points(50, -50, 29, 71, 8), 100, table).tolist() == [50, -50, 29, 71, 8]


def test_a_false_tag_without_a_true_one_ends_in_refusal():
    table = forged(10, (500, 2 * 3), (479, 2 * 3))
    assert failing(points(500, 3), 100, table) == [0]


def test_a_table_full_of_lies_yields_no_wrong_number():
    slots = baby_steps(10).slots.copy()
    slots[:, 1] = np.where(slots[:, 1] != 0, slots[:, 1] ^ np.uint64(2), 0)  # j claims j ^ 1
    exponents = list(range(-10, 11))
    assert failing(points(*exponents), 10, BabySteps(10, slots)) == [k for k, m in enumerate(exponents) if m]


# --- interface ------------------------------------------------------------------------------------------------------


def test_tables_are_shared_and_read_only():
    assert baby_steps(50) is baby_steps(50)
    with pytest.raises(ValueError, match="read-only"):
        baby_steps(50).slots[0, 0] = 1


@pytest.mark.parametrize("bound", [1, 2, 1000, 2**20, 2**24, 2**32, 2**48])
def test_the_default_table_fits_the_bound(bound):
    assert 1 <= default_size(bound) <= min(2 * bound, 2**22)
    assert discrete_logs(points(1, -1), 2**10).tolist() == [1, -1]
    assert failing(points(2**10 + 1, -1025, 1024), 2**10) == [0, 1], "the table may reach further than the bound"


def test_progress_counts_up_to_the_end():
    seen = []
    discrete_logs(points(*[1] * 10_000), 10, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (10_000, 10_000)
    assert seen == sorted(seen)


def test_no_points_have_no_logs():
    assert discrete_logs(np.empty((0, 8), np.uint64), 10).tolist() == []


@pytest.mark.parametrize("bound", [0, -1, 2**48 + 1])
def test_bounds_outside_the_range_are_refused(bound):
    with pytest.raises(ValueError, match="bound"):
        discrete_logs(points(1), bound)


@pytest.mark.parametrize("size", [0, 2**28 + 1])
def test_tables_of_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="table"):
        BabySteps.build(size)


def test_points_of_another_shape_are_refused():
    for bad in (np.zeros((3, 4), np.uint64), np.zeros(8, np.uint64), np.zeros((3, 8), np.int64)):
        with pytest.raises(ValueError, match="expected uint64"):
            discrete_logs(bad, 10)


def test_the_error_survives_pickling_and_is_the_schemes():
    error = pickle.loads(pickle.dumps(OutOfBound([3, 5], 10)))
    assert (error.coordinates, error.bound) == ([3, 5], 10)
    assert ndd_fe.OutOfBound is bsgs.OutOfBound
