"""Combining and stepping, each against a twin in plain Python numbers: every host must get the same bits."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tasks.learning import aggregation
from tasks.learning.aggregation import InvalidState, ServerState

finite = st.floats(-1e6, 1e6, width=32)


def vectors(size):
    return arrays(np.float32, size, elements=finite)


def round32(number):
    return float(np.float32(number))


# ── the slow twins ──


def slow_fedavg(parameters, update, learning_rate):
    return [round32(w + learning_rate * u) for w, u in zip(parameters, update, strict=True)]


def slow_fedadam(parameters, update, first, second, learning_rate, beta1, beta2, tau):
    stepped, m_next, v_next = [], [], []
    for w, u, m, v in zip(parameters, update, first, second, strict=True):
        m = round32(beta1 * m + (1 - beta1) * u)
        v = round32(beta2 * v + (1 - beta2) * (u * u))
        stepped.append(round32(w + learning_rate * m / (math.sqrt(v) + tau)))
        m_next.append(m)
        v_next.append(v)
    return stepped, m_next, v_next


@given(st.integers(1, 20).flatmap(lambda n: st.tuples(vectors(n), vectors(n))), st.floats(0.01, 2))
@settings(deadline=None)
def test_fedavg_agrees_with_its_twin_to_the_bit(pair, learning_rate):
    parameters, update = pair
    state = ServerState.zero(parameters.size)
    stepped, after = aggregation.fedavg(parameters, update, state, learning_rate=learning_rate)
    assert stepped.tolist() == slow_fedavg(parameters.tolist(), update.tolist(), learning_rate)
    assert (stepped.dtype, after.step) == (np.float32, 1)


@given(st.integers(1, 20).flatmap(lambda n: st.tuples(vectors(n), vectors(n), vectors(n))))
@settings(deadline=None)
def test_fedadam_agrees_with_its_twin_to_the_bit(triple):
    parameters, *updates = triple
    options = {"learning_rate": 0.03, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}
    state = ServerState.zero(parameters.size)
    slow, m, v = parameters.tolist(), state.first.tolist(), state.second.tolist()
    for update in updates:
        parameters, state = aggregation.fedadam(parameters, update, state, **options)
        slow, m, v = slow_fedadam(slow, update.tolist(), m, v, **options)
    assert parameters.tolist() == slow
    assert (state.first.tolist(), state.second.tolist(), state.step) == (m, v, 2)


@pytest.mark.parametrize("name", sorted(aggregation.SERVER_STEPS))
@pytest.mark.parametrize(
    "update", [np.zeros(3, np.float32), np.zeros(2), np.full(2, np.nan, np.float32), np.full(2, np.inf, np.float32)]
)
def test_a_step_refuses_an_update_that_does_not_fit(name, update):
    with pytest.raises(ValueError, match="expected"):
        aggregation.SERVER_STEPS[name](np.zeros(2, np.float32), update, ServerState.zero(2))


# ── combining ──


def test_the_mean_is_on_the_support_and_zero_elsewhere():
    support = np.array([1, 3])
    mean = aggregation.weighted_mean(np.array([30, -60]), 3, 10, support, 5)
    assert mean.tolist() == [0, 1, 0, -2, 0]
    assert mean.dtype == np.float32


@given(arrays(np.int64, st.integers(1, 20), elements=st.integers(-(2**22), 2**22)), st.integers(1, 80))
@settings(deadline=None)
def test_the_mean_agrees_with_plain_division(total, weight):
    mean = aggregation.weighted_mean(total, weight, 2047, np.arange(total.size), total.size)
    assert mean.tolist() == [round32(x / (weight * 2047)) for x in total.tolist()]


@pytest.mark.parametrize(
    ("total", "weight", "scale", "support"),
    [
        ([1.0, 2.0], 1, 1, [0, 1]),
        ([1], 1, 1, [0, 1]),
        ([1, 2], 0, 1, [0, 1]),
        ([1, 2], 1, 0, [0, 1]),
        ([1, 2], 1, 1, [1, 0]),
        ([1, 2], 1, 1, [1, 1]),
        ([1, 2], 1, 1, [0, 4]),
        ([1, 2], 1, 1, [-1, 0]),
    ],
)
def test_a_sum_that_does_not_fit_is_refused(total, weight, scale, support):
    with pytest.raises(ValueError, match="expected"):
        aggregation.weighted_mean(np.array(total), weight, scale, np.array(support), 4)


# ── weights ──


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=20), st.integers(1, 64), st.integers(1, 64))
@settings(deadline=None)
def test_weights_are_small_positive_and_capped_in_ratio(counts, levels, ratio):
    if ratio > levels:
        with pytest.raises(ValueError, match="max_ratio"):
            aggregation.public_weights(counts, levels, ratio)
        return
    weights = aggregation.public_weights(counts, levels, ratio)
    assert max(weights) == levels
    assert min(weights) >= 1
    assert max(weights) <= ratio * min(weights)
    ordered = [weight for _, weight in sorted(zip(counts, weights, strict=True))]
    assert ordered == sorted(ordered)


def test_weights_are_a_known_answer():
    assert aggregation.public_weights([100, 50, 10, 75], levels=16, max_ratio=4) == [16, 8, 4, 12]


@pytest.mark.parametrize("counts", [[], [0, 5], [-1]])
def test_unusable_counts_are_refused(counts):
    with pytest.raises(ValueError, match="sample_counts"):
        aggregation.public_weights(counts, 16, 4)


# ── state as bytes ──


def test_a_state_round_trips_and_is_canonical():
    state = ServerState(3, np.array([1, 2], np.float32), np.array([3, 4], np.float32))
    again = ServerState.decode(state.encode(), 2)
    assert (again.step, again.first.tolist(), again.second.tolist()) == (3, [1, 2], [3, 4])
    assert again.encode() == state.encode()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (ServerState.zero(3).encode(), "another dimension"),
        (ServerState(-1, np.zeros(2, np.float32), np.zeros(2, np.float32)).encode(), "a negative step"),
        (ServerState(0, np.zeros(2), np.zeros(2)).encode(), "float64"),
        (ServerState(0, np.full(2, np.inf, np.float32), np.zeros(2, np.float32)).encode(), "infinite"),
        (aggregation.encode_arrays({"first": np.zeros(2, np.float32)}), "arrays missing"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_other_bytes_are_no_state(data, why):
    with pytest.raises(InvalidState):
        ServerState.decode(data, 2)
