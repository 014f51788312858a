"""Discrete logs: every exponent within the bound is found, no other is, whatever the table holds."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from threading import Barrier

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.crypto import bsgs, ndd_fe, pedersen
from tasks.crypto.bsgs import BabySteps, OutOfBound, baby_steps, default_size, discrete_logs, encode_exponents
from tests import oracle
from tests.crypto import rows, tuples
from tests.crypto.conftest import forget_tables


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
    # A giant step skips 2 size, and reaches from 1 - size to size around it: both ends of the first, and of a later one.
    stride = 2 * size
    edges = [0, 1, size - 1, size, size + 1, stride - 1, stride, stride + 1, stride + size - 1, stride + size]
    edges += [stride + size + 1, 2 * stride, 7 * stride - size, 7 * stride - size + 1, 7 * stride + size]
    edges += [bound - stride - size, bound - size, bound - 1, bound]
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

STEP_BITS, BUCKET = 30, 8


@lru_cache(maxsize=1024)
def half_point(exponent):
    """(m - 1/2) G by the oracle."""
    half = oracle.multiply((oracle.N + 1) // 2, oracle.G)
    return oracle.add(oracle.multiply(exponent, oracle.G), oracle.negate(half))


def place(exponent, slots):
    """First slot of the bucket of (m - 1/2) G, and its tag, in the upper 34 bits of an entry."""
    x, _ = half_point(exponent)
    return (x & 2**64 - 1) * BUCKET % len(slots), (x >> 64 << STEP_BITS) & 2**64 - 1


def forged(size, *entries, room=1):
    """A table with false entries (exponent whose tag is used, step it claims), put in before the true ones.

    A step is 2 j + parity, for the exponent j or 1 - j. room: so many times as many slots.
    """
    true = baby_steps(size).slots
    slots = np.zeros(len(true) * room, np.uint64)

    def put(exponent, step):
        slot, tag = place(exponent, slots)
        while slots[slot]:
            slot = (slot + 1) % len(slots)
        slots[slot] = tag | step

    for exponent, claimed in entries:
        put(exponent, claimed)
    for entry in sorted(int(entry) & 2**STEP_BITS - 1 for entry in true if entry):
        put(entry >> 1, entry)
    return BabySteps(size, slots)


def test_a_table_of_true_entries_is_the_one_that_is_built():
    assert sorted(forged(10).slots.tolist()) == sorted(baby_steps(10).slots.tolist())


def test_a_false_tag_in_the_same_chain_is_passed_over():
    table = forged(10, (4, 2 * 7), (4, 2 * 9 + 1), (4, 2 * 1))
    assert discrete_logs(points(4, -4, -3, 7, 0), 10, table).tolist() == [4, -4, -3, 7, 0]


@pytest.mark.parametrize("lies", [1, 6, 7, 8, 9, 15, 16, 17, 30])
def test_false_tags_that_fill_the_bucket_go_on_in_the_next(lies):
    table = forged(10, *[(4, 2 * (7 + i % 3) + i % 2) for i in range(lies)], room=4)
    first, tag = place(4, table.slots)
    chain = [int(table.slots[(first + i) % len(table.slots)]) ^ tag < 2**STEP_BITS for i in range(40)]
    assert chain[:lies] == [True] * lies
    assert chain[lies:].count(True) == 1, "the true entry is behind them"
    exponents = [4, -3, 7, -7, 0, 1, 10, -10]
    assert discrete_logs(points(*exponents), 10, table).tolist() == exponents
    assert failing(points(11, 4, -14), 10, table) == [0, 2]


def test_a_chain_goes_around_the_end_of_the_table():
    size = 10
    slots = np.zeros_like(baby_steps(size).slots)
    last = next(m for m in range(1, size + 1) if place(m, slots)[0] == len(slots) - BUCKET)
    table = forged(size, *[(last, 2 * (1 + (last + i) % 9) + i % 2) for i in range(11)])
    exponents = list(range(-size, size + 1))
    assert discrete_logs(points(*exponents), size, table).tolist() == exponents


def test_a_false_tag_at_an_earlier_giant_step_is_passed_over():
    # 50 = 2 * 20 + 10 is found at the second giant step; its own tag, and that of 50 - 20, are claimed by others.
    table = forged(10, (50, 2 * 3), (30, 2 * 5 + 1), (70, 2 * 2), (-49, 2 * 6))
    exponents = [50, -50, 30, 70, 10, -29, -49]
    assert discrete_logs(points(*exponents), 100, table).tolist() == exponents


def test_a_lie_about_the_parity_of_y_yields_no_wrong_number():
    true = baby_steps(10).slots
    table = BabySteps(10, np.where(true != 0, true ^ np.uint64(1), 0).astype(np.uint64))
    assert failing(points(4, -4, 7), 10, table) == [0, 1, 2]
    for exponent in range(11, 51):  # with giant steps y may not be asked for at all
        with suppress(OutOfBound):
            assert discrete_logs(points(exponent), 50, table).tolist() == [exponent]


def test_a_false_tag_without_a_true_one_ends_in_refusal():
    table = forged(10, (500, 2 * 3), (480, 2 * 3), (-479, 2 * 3 + 1))
    assert failing(points(500, 3, -499, 480), 100, table) == [0, 2, 3]


def test_a_table_full_of_lies_yields_no_wrong_number():
    true = baby_steps(10).slots
    slots = np.where(true != 0, true ^ np.uint64(4), 0).astype(np.uint64)  # j claims j ^ 2
    exponents = list(range(-9, 11))
    assert failing(points(*exponents), 10, BabySteps(10, slots)) == list(range(20))


def test_a_table_without_a_single_entry_finds_nothing():
    assert failing(points(1, 5, 0), 100, BabySteps(10, np.zeros(32, np.uint64))) == [0, 1, 2]


# --- interface ------------------------------------------------------------------------------------------------------


def test_tables_are_shared_and_read_only():
    assert baby_steps(50) is baby_steps(50)
    with pytest.raises(ValueError, match="read-only"):
        baby_steps(50).slots[0] = 1


@pytest.mark.parametrize("bound", [1, 2, 1000, 2**20, 2**24, 2**32, 2**48])
def test_the_default_table_fits_the_bound(bound):
    assert 1 <= default_size(bound) <= min(2 * bound, 2**24)
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


@pytest.mark.parametrize(
    ("table", "ask"),
    [(bsgs.BabySteps, lambda: bsgs.baby_steps(777)), (pedersen.Commitments, pedersen.commitments)],
    ids=["baby steps", "commitments"],
)
def test_threads_that_ask_at_once_share_one_table(table, ask, monkeypatch):
    """A second one would take the same memory and time again."""
    forget_tables()
    right, built, together = table.build, [], Barrier(4)

    def build(*arguments):
        built.append(right(*arguments))
        return built[-1]

    def asked(_):
        together.wait()
        return ask()

    monkeypatch.setattr(table, "build", build)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(asked, range(4)))
    assert len(built) == 1
    assert all(one is built[0] for one in found)
