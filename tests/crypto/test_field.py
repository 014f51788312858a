"""Field and scalar arithmetic against Python integers, at the limbs where carries break."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit, types

from tasks.crypto import field
from tasks.crypto.curve import integers_of, scalar_array
from tasks.crypto.field import ORDER, P, limbs

TOP = 2**256 - 1
LIMBS = [0, 1, 2**32, 2**63, 2**64 - 1]
EDGES = [0, 1, 2, 977, 2**32 + 976, 2**32 + 977, 2**32 + 978, P // 2, P - 2, P - 1, P, P + 1, TOP - 1, TOP]
EDGES += [sum(v << 64 * i for i, v in enumerate(word)) for word in itertools.product([0, 1, 2**64 - 1], repeat=4)]
numbers = st.one_of(
    st.integers(0, TOP),
    st.sampled_from(EDGES),
    st.tuples(*[st.sampled_from(LIMBS)] * 4).map(lambda word: sum(v << 64 * i for i, v in enumerate(word))),
)


@njit
def mul(a, b):
    return field.mul(a, b)


@njit
def add(a, b):
    return field.add(a, b)


@njit
def sub(a, b):
    return field.sub(a, b)


@njit
def normal(a):
    return field.normal(a)


@njit
def less(a, b):
    return field.less(a, b)


@njit
def minus(a, b):
    return field.minus(a, b)


@njit
def negate_if(condition, a):
    return field.negate_if(condition, a)


@njit
def reduce_wide(low, high):
    return field.reduce_wide(low, high)


@njit
def mul_add(a, b, c, d):
    return field.mul_add(a, b, c, d)


def value(words):
    assert all(isinstance(word, int) and 0 <= word < 2**64 for word in words)
    return sum(word << 64 * i for i, word in enumerate(words))


def test_multiplication_of_all_pairs_of_edges():
    for a, b in itertools.product(EDGES, repeat=2):
        assert value(mul(limbs(a), limbs(b))) % P == a * b % P


def test_addition_of_all_pairs_of_edges():
    for a, b in itertools.product(EDGES, repeat=2):
        assert value(add(limbs(a), limbs(b))) % P == (a + b) % P


def test_subtraction_of_all_canonical_edges():
    for a, b in itertools.product(EDGES, repeat=2):
        if b < P:
            assert value(sub(limbs(a), limbs(b))) % P == (a - b) % P


@given(numbers, numbers)
def test_operations_agree_with_integers(a, b):
    A, B = limbs(a), limbs(b)
    assert value(mul(A, B)) % P == a * b % P
    assert value(add(A, B)) % P == (a + b) % P
    assert value(sub(A, limbs(b % P))) % P == (a - b) % P
    assert value(normal(A)) == a % P
    assert less(A, B) == (a < b)
    assert value(minus(limbs(max(a, b)), limbs(min(a, b)))) == abs(a - b)
    assert value(negate_if(True, limbs(a % P))) == -a % P
    assert value(negate_if(False, limbs(a % P))) == a % P


def test_the_second_fold_of_a_product_carries():
    # Products whose first fold lands just below 2**256, so that adding the second one overflows.
    for high in (1, 2**32, 2**64 - 1, 2**200):
        for excess in range(4):
            a = (TOP - excess) * pow(high, -1, P) % P
            for b in (high, high + P):
                if b <= TOP:
                    assert value(mul(limbs(a), limbs(b))) % P == a * b % P


@pytest.mark.parametrize("a", EDGES)
def test_inverse(a):
    assert value(field.inverse(limbs(a))) % P == (pow(a, -1, P) if a % P else 0)


@given(numbers, st.one_of(st.integers(0, 2**64 - 1), st.sampled_from(LIMBS)))
def test_reduction_modulo_the_order(low, high):
    assert value(reduce_wide(limbs(low), np.uint64(high))) == (low + (high << 256)) % ORDER


def test_reduction_modulo_the_order_at_its_edges():
    for low in [*EDGES, ORDER - 1, ORDER, ORDER + 1, 2 * ORDER - 2**256 & TOP]:
        for high in LIMBS:
            assert value(reduce_wide(limbs(low), np.uint64(high))) == (low + (high << 256)) % ORDER


@given(*[st.one_of(st.integers(0, 2**64 - 1), st.sampled_from(LIMBS))] * 4)
def test_multiply_and_add_two(a, b, c, d):
    low, high = mul_add(*(np.uint64(v) for v in (a, b, c, d)))
    assert (high << 64) + low == a * b + c + d


ELEMENT = types.UniTuple(types.uint64, 4)


@pytest.mark.parametrize("operation", [mul, add, sub, normal, minus, negate_if, reduce_wide, field.inverse])
def test_elements_never_leave_uint64(operation):
    argument = {"high": np.uint64(1), "condition": True}
    names = operation.py_func.__code__.co_varnames[: operation.py_func.__code__.co_argcount]
    operation(*[argument.get(name, limbs(1)) for name in names])
    for signature in operation.nopython_signatures:
        assert signature.return_type == ELEMENT


KERNELS = [
    field.add_rows, field.recode, field.scalars_of, field.accumulate, field.reduce_scalars, field.project,
    field.first_invalid, field.insert_tags, field.search,
]  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_have_one_signature_and_their_words_are_uint64(kernel):
    (signature,) = kernel.signatures
    for name, argument in zip(kernel.py_func.__code__.co_varnames, signature, strict=False):
        is_words = kernel.py_func.__annotations__[name] == field.Words
        assert not is_words or argument.dtype == types.uint64
    assert kernel.targetoptions["nogil"]


@given(st.lists(st.tuples(numbers, st.integers(1, 2**64 - 1)), min_size=1, max_size=4))
def test_weighted_scalars_accumulate(terms):
    total = sum(weight for _, weight in terms)
    terms = [(scalar, max(1, weight * (2**64 - 1) // total - 1)) for scalar, weight in terms]  # below 2**64 in sum
    sums = np.zeros((1, 5), np.uint64)
    for scalar, weight in terms:
        field.accumulate(sums, np.array([limbs(scalar)], np.uint64), np.uint64(weight))
    scalars = np.empty((1, 4), np.uint64)
    field.reduce_scalars(sums, scalars)
    assert integers_of(scalars) == [sum(scalar * weight for scalar, weight in terms) % ORDER]


def test_signed_integers_become_scalars():
    values = np.array([0, 1, -1, 2**63 - 1, -(2**63), -(2**63) + 1, 12345], np.int64)
    scalars = np.empty((len(values), 4), np.uint64)
    field.scalars_of(values, scalars)
    assert integers_of(scalars) == [int(v) % ORDER for v in values]


@pytest.mark.parametrize("window", [1, 2, 5, 8, 13, 16])
def test_digits_sum_up_to_the_scalar(window):
    half = ORDER // 2
    scalars = [0, 1, 2, half - 1, half, half + 1, ORDER - 1, ORDER - 2, 2**255, 2**255 - 1, 2**128 - 1]
    scalars += [2**i - 1 for i in range(0, 256, 7)] + [int("8000" * 16, 16) % ORDER, int("7fff" * 16, 16)]
    references = np.empty((-(-256 // window), len(scalars)), np.int32)
    field.recode(scalar_array(scalars), window, references)
    rows = 1 << (window - 1)
    for i, scalar in enumerate(scalars):
        total = 0
        for w, reference in enumerate(references[:, i].tolist()):
            if reference:
                row = abs(reference) - 1
                assert row // rows == w, "a digit names a row of its own window"
                total += (1 if reference > 0 else -1) * (row % rows + 1) << (w * window)
        assert total % ORDER == scalar
