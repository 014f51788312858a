"""Compression: nothing is lost, everybody computes the same support, and no coordinate leaves its range."""

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from contracts.task_spec import Compression
from tasks.learning import compression
from tasks.learning.compression import InvalidMemory, Memory, OutOfRange

SEED = b"a task"


def vectors(size, largest=100.0):
    return arrays(np.float32, size, elements=st.floats(-largest, largest, width=32))


@st.composite
def rounds(draw):
    """An update, a memory and a support of one dimension."""
    size = draw(st.integers(1, 40))
    chosen = draw(st.sets(st.integers(0, size - 1), min_size=1))
    memory = Memory(draw(vectors(size)), draw(vectors(size)))
    return draw(vectors(size)), memory, np.array(sorted(chosen), dtype=np.int64)


# ── conservation ──


@given(rounds(), st.floats(0, 0.95), st.floats(0.01, 1000), st.integers(2, 20), st.floats(0.01, 100))
@settings(deadline=None, max_examples=200)
def test_nothing_is_lost(case, momentum, clip_norm, bits, value_limit):
    update, memory, support = case
    scale, bound = 10, 2 ** (bits - 1) - 1
    values, kept = compression.compress(update, memory, support, momentum=momentum, clip_norm=clip_norm)
    quantised, kept = compression.to_fixed_point(values, kept, support, scale=scale, bound=bound)

    went_in = memory.residual.astype(np.float64) + np.float32(momentum) * memory.velocity.astype(np.float64) + update
    came_out = kept.residual.astype(np.float64)
    came_out[support] += quantised / scale
    assert np.allclose(came_out, went_in, rtol=1e-5, atol=1e-4)


@given(rounds(), st.floats(0, 0.95), st.floats(0.01, 1000))
@settings(deadline=None, max_examples=100)
def test_no_miner_sends_more_than_the_clip_norm(case, momentum, clip_norm):
    update, memory, support = case
    values, kept = compression.compress(update, memory, support, momentum=momentum, clip_norm=clip_norm)
    assert np.linalg.norm(values.astype(np.float64)) <= clip_norm * (1 + 1e-5)
    assert (kept.velocity[support] == 0).all()


@given(rounds())
@settings(deadline=None, max_examples=50)
def test_the_arguments_stay_as_they_were(case):
    update, memory, support = case
    before = [array.copy() for array in (update, memory.velocity, memory.residual)]
    values, kept = compression.compress(update, memory, support, momentum=0.5, clip_norm=1)
    compression.to_fixed_point(values, kept, support, scale=100, bound=7)
    after = (update, memory.velocity, memory.residual)
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))


def test_what_waits_is_sent_when_its_coordinate_comes_up():
    update = np.array([1, 2, 4], dtype=np.float32)
    _, memory = compression.compress(update, Memory.zero(3), np.array([0]), momentum=0.5, clip_norm=100)
    values, memory = compression.compress(update, memory, np.array([1, 2]), momentum=0.5, clip_norm=100)
    # velocity 2 then 0.5 * 2 + 2; both are in the residual: momentum correction.
    assert values.tolist() == [2 + 3, 4 + 6]
    assert memory.residual.tolist() == [1, 0, 0]
    assert memory.velocity.tolist() == [1, 0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="expected finite numbers"):
        compression.compress(np.array([bad], np.float32), Memory.zero(1), np.array([0]), momentum=0, clip_norm=1)


def test_a_huge_update_is_sent_in_parts():
    memory, update, sent = Memory.zero(2), np.array([3e30, 1.0], np.float32), 0
    for _ in range(3):
        values, memory = compression.compress(update, memory, np.array([0]), momentum=0, clip_norm=5)
        quantised, memory = compression.to_fixed_point(values, memory, np.array([0]), scale=1, bound=2)
        update = np.zeros(2, np.float32)
        sent += int(quantised[0])
    assert sent == 6
    assert np.isfinite(memory.residual).all()


@pytest.mark.parametrize(
    ("size", "options"),
    [(3, {}), (2, {"momentum": 1.0}), (2, {"clip_norm": 0.0}), (2, {"clip_norm": math.nan}), (2, {"momentum": -0.1})],
)
def test_unusable_arguments_of_compress_are_refused(size, options):
    with pytest.raises(ValueError, match="expected"):
        compression.compress(
            np.zeros(size, np.float32), Memory.zero(2), np.array([0]), **{"momentum": 0.0, "clip_norm": 1.0, **options}
        )


# ── the support ──


@given(
    st.integers(1, 300),
    st.integers(1, 12),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.integers(0, 4),
    st.binary(max_size=8),
    st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_a_support_is_ascending_sized_and_the_same_for_everybody(d, number, density, share, warmup, seed, known):
    last = np.random.default_rng(number).standard_normal(d).astype(np.float32) if known else None
    options = {"density": density, "explore_share": share, "warmup_rounds": warmup, "seed": seed}
    support = compression.support(d, number, last, **options)
    exact = d * compression.density_of_round(number, density, warmup)
    assert len(support) == max(1, math.ceil(exact - 1e-6))
    assert support.dtype == np.int64
    assert (np.diff(support) > 0).all()
    assert 0 <= support[0] <= support[-1] < d
    assert np.array_equal(support, compression.support(d, number, None if last is None else last.copy(), **options))


def test_a_support_is_a_known_answer():
    last = np.array([0, -9, 1, 1, 0, 0, 8, 0, 0, 0], dtype=np.float32)
    first = compression.support(10, 1, None, density=0.3, explore_share=0.5, seed=SEED)
    second = compression.support(10, 2, last, density=0.3, explore_share=0.0, seed=SEED)
    assert first.tolist() == [3, 8, 9]
    assert second.tolist() == [1, 2, 6]  # 2 before 3: equal, so by index


def sorted_support(dimension, number, last, *, density, explore_share, seed, warmup_rounds):
    """The slow twin: what `support` says, with whole vectors sorted."""
    sizes = [
        max(1, math.ceil(dimension * round(1e6 * compression.density_of_round(n, density, warmup_rounds)) / 1e6))
        for n in range(1, number + 1)
    ]
    exploring = [sizes[0], *(math.ceil(size * round(1e6 * explore_share) / 1e6) for size in sizes[1:])]
    stream = hashlib.shake_256(b"support" + seed).digest(8 * dimension)
    keys = [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(dimension)]
    order = sorted(range(dimension), key=lambda i: (keys[i], i))
    count = sizes[-1] if last is None else exploring[-1]
    chosen = {order[(sum(exploring[:-1]) + i) % dimension] for i in range(count)}
    if last is not None:
        largest = sorted((i for i in range(dimension) if i not in chosen), key=lambda i: (-abs(last[i]), i))
        chosen |= set(largest[: sizes[-1] - count])
    return sorted(chosen)


@given(
    st.integers(1, 120),
    st.integers(1, 12),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.integers(0, 4),
    st.binary(max_size=8),
    st.data(),
)
@settings(deadline=None, max_examples=300)
def test_a_support_is_that_of_whole_vectors_sorted(d, number, density, share, warmup, seed, data):
    # Few values, so that many are equal in size, also at the edge: then the index decides.
    values = arrays(np.float32, d, elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -3.0]))
    last = data.draw(st.none() | values)
    options = {"density": density, "explore_share": share, "seed": seed, "warmup_rounds": warmup}
    support = compression.support(d, number, last, **options)
    assert support.tolist() == sorted_support(d, number, last, **options)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_equal_keys_are_ordered_by_index(values, data):
    count = data.draw(st.integers(0, len(values)))
    chosen = compression._smallest(np.array(values, np.uint64), count)
    assert set(np.flatnonzero(chosen)) == set(sorted(range(len(values)), key=lambda i: (values[i], i))[:count])


def test_exploring_visits_every_coordinate_before_one_twice():
    last, visited = np.zeros(100, dtype=np.float32), []
    for number in range(1, 11):
        visited += compression.support(100, number, last, density=0.1, explore_share=1.0, seed=SEED).tolist()
    assert sorted(visited) == list(range(100))


def test_another_seed_explores_elsewhere():
    def explored(seed):
        return compression.support(1000, 1, None, density=0.1, explore_share=0.5, seed=seed).tolist()

    assert explored(b"one") != explored(b"two")


def test_sparsity_grows_exponentially_during_the_warm_up():
    # The schedule of the paper, section 3.3: 75 %, 93.75 %, 98.4375 %, 99.6 %, 99.9 %.
    densities = [compression.density_of_round(number, 0.001, 4) for number in range(1, 8)]
    assert densities == pytest.approx([0.25, 0.0625, 0.0158, 0.004, 0.001, 0.001, 0.001], rel=0.02)
    assert compression.density_of_round(1, 0.1, 0) == 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"round_number": 0},
        {"density": 0.0},
        {"density": 1.1},
        {"warmup_rounds": -1},
        {"explore_share": 1.1},
        {"last_combined": np.zeros(9, np.float32)},
        {"last_combined": np.full(10, np.nan, np.float32)},
    ],
)
def test_an_impossible_support_is_refused(options):
    usual = {"dimension": 10, "round_number": 1, "last_combined": None, "density": 0.1, "explore_share": 0.5}
    with pytest.raises(ValueError, match="expected"):
        compression.support(**{**usual, "seed": SEED, **options})


# ── fixed point ──


@pytest.mark.parametrize("bound", [1, 7, 2047, 32767])
def test_quantising_stops_exactly_at_the_bound(bound):
    at = np.array([bound, -bound, bound + 0.49, 0], np.float64) / 8
    assert compression.quantize(at, scale=8, bound=bound).tolist() == [bound, -bound, bound, 0]
    for past in (bound + 1, -bound - 1, bound + 0.51):
        with pytest.raises(OutOfRange, match=f"bound is {bound} at scale 8"):
            compression.quantize(np.array([past / 8]), scale=8, bound=bound)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_quantising_refuses_what_is_no_number_in_range(bad):
    with pytest.raises(OutOfRange):
        compression.quantize(np.array([0, bad], np.float32), scale=100, bound=2047)


def test_an_empty_vector_quantises_to_nothing():
    assert compression.quantize(np.zeros(0, np.float32), scale=8, bound=7).tolist() == []


@given(vectors(st.integers(1, 30), 1e6), st.floats(1e-3, 1e3), st.integers(2, 24))
@settings(deadline=None, max_examples=150)
def test_what_is_inside_the_range_is_never_refused(values, value_limit, bits):
    rules = {"density": 0.1, "warmup_rounds": 0, "explore_share": 0.5, "momentum": 0.3, "clip_norm": 1.0}
    if value_limit > 2 ** (bits - 1) - 1:
        with pytest.raises(ValueError, match="does not fit"):
            Compression(value_limit=value_limit, bits=bits, **rules)
        return
    agreed = Compression(value_limit=value_limit, bits=bits, **rules)
    scale, bound = agreed.scale, agreed.bound
    inside, excess = compression.fit_to_range(values, bound / scale)
    assert np.abs(compression.quantize(inside, scale=scale, bound=bound)).max() <= bound
    assert np.allclose(inside + excess, values)
    assert np.array_equal(inside[excess == 0], values[excess == 0])


@given(vectors(st.integers(1, 30), 15.0), st.integers(1, 1000))
@settings(deadline=None, max_examples=100)
def test_rounding_errs_by_half_a_step_at_most(values, scale):
    quantised = compression.quantize(values, scale=scale, bound=2**31)
    assert np.abs(compression.dequantize(quantised, scale=scale) - values).max() <= 0.5 / scale + 1e-5


# ── score ──


def test_scores_are_norms_in_millionths_of_a_step():
    assert compression.score(np.array([3, -4])) == 5_000_000
    assert compression.score(np.array([1, 1])) == 1_414_213
    assert compression.score(np.zeros(0, np.int64)) == 0
    assert compression.score(np.full(3, 2**62)) == math.isqrt(3 * 2**124 * 10**12)


@given(
    arrays(
        np.int64,
        st.integers(0, 40),
        elements=st.integers(-(2**63), 2**63 - 1) | st.sampled_from([-(2**63), 2**63 - 1, 2**42, 2**42 - 1, -(2**21)]),
    )
)
@settings(deadline=None, max_examples=300)
def test_a_score_is_exact_for_every_integer(quantised):
    assert compression.score(quantised) == math.isqrt(sum(x * x for x in quantised.tolist()) * 10**12)


@pytest.mark.parametrize("extreme", [-(2**63), 2**63 - 1, 2**42 - 1, 2**42 + 2**21 - 1, -1, 2047])
def test_a_score_is_exact_where_partial_sums_are_largest(extreme):
    size = 2**21 + 3  # two whole blocks and a part
    assert compression.score(np.full(size, extreme)) == math.isqrt(size * extreme**2 * 10**12)


@given(arrays(np.int64, st.integers(1, 50), elements=st.integers(-2047, 2047)))
@settings(deadline=None)
def test_no_score_exceeds_its_bound(quantised):
    assert 0 <= compression.score(quantised) <= compression.score_bound(len(quantised), 2047)


# ── memory as bytes ──


@given(rounds())
@settings(deadline=None, max_examples=30)
def test_a_memory_round_trips(case):
    _, memory, _ = case
    again = Memory.decode(memory.encode(), memory.residual.size)
    assert np.array_equal(again.velocity, memory.velocity)
    assert np.array_equal(again.residual, memory.residual)
    assert again.encode() == memory.encode()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (Memory.zero(3).encode()[:-30], "cut off"),
        (Memory.zero(4).encode(), "another dimension"),
        (compression.encode_arrays({"velocity": np.zeros(3, np.float32)}), "one array missing"),
        (Memory(np.zeros(3), np.zeros(3)).encode(), "float64"),
        (Memory(np.full(3, np.nan, np.float32), np.zeros(3, np.float32)).encode(), "NaN"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_other_bytes_are_no_memory(data, why):
    with pytest.raises(InvalidMemory):
        Memory.decode(data, 3)
