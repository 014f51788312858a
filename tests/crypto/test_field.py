"""Field and scalar arithmetic against Python integers, at the limbs where carries break."""

import ctypes
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
def odd_digits(k, negative):
    return field.odd_digits(k, negative)


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
    assert value(field.inverse(limbs(a))) == (pow(a, -1, P) if a % P else 0)


def test_inverse_of_what_takes_many_or_few_division_steps():
    small = [
        *range(1, 200),
        *(2**i for i in range(256)),
        *(2**i - 1 for i in range(1, 257)),
        *(3**i for i in range(161)),
    ]
    fractions = [a * pow(b, -1, P) % P for a in small[:14] for b in small[200:400:7]]
    for a in [*small, *(P - a for a in small if a < P), *(pow(a, -1, P) for a in small if a % P), *fractions]:
        assert value(field.inverse(limbs(a))) == pow(a, -1, P)


@given(numbers)
def test_inverse_in_place_by_its_address(a):
    words = np.array(limbs(a), np.uint64)
    pointer = ctypes.POINTER(ctypes.c_uint64)
    ctypes.CFUNCTYPE(None, pointer)(field.invert_at.address)(words.ctypes.data_as(pointer))
    assert value(words.tolist()) == (pow(a, -1, P) if a % P else 0)


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
    field.add_rows, field.recode, field.recode_exponents, field.accumulate, field.reduce_scalars, field.project,
    field.first_invalid, field.compare_rows, field.insert_tags, field.search,
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


# --- digits ---------------------------------------------------------------------------------------------------------

FULL, HALF = 2**16, 2**15
SCALARS = [0, 1, 2, ORDER // 2 - 1, ORDER // 2, ORDER // 2 + 1, ORDER - 1, ORDER - 2, 2**255, 2**255 - 1, 2**128 - 1]
SCALARS += [2**i - 1 for i in range(0, 256, 7)] + [int("8000" * 16, 16) % ORDER, int("7fff" * 16, 16)]
SCALARS += [k % ORDER for k in (2**256 - 1, -(2**256) + 1, 2**256 + 1, 2**256 - ORDER - 1, 2**256 - ORDER)]


def digit(reference, window, first):
    """The odd number whose row of a window a reference names; rows of 1, 3, 5, ... begin at `first`."""
    row = abs(reference) - 1 - (first + window * HALF)
    assert 0 <= row < HALF, "a digit names a row of its own window"
    return (2 * row + 1) * (1 if reference > 0 else -1)


def test_odd_digits_are_half_of_what_they_should_be_modulo_the_order():
    for k in SCALARS:
        assert value(odd_digits(limbs(k), False)) == (k + 2**256 - 1) * pow(2, -1, ORDER) % ORDER
        assert value(odd_digits(limbs(k), True)) == (-k + 2**256 - 1) * pow(2, -1, ORDER) % ORDER


@given(st.integers(0, ORDER - 1), st.booleans())
def test_odd_digits_of_random_scalars(k, negative):
    expected = ((-k if negative else k) + 2**256 - 1) * pow(2, -1, ORDER) % ORDER
    assert value(odd_digits(limbs(k), negative)) == expected


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("count", [1, 7, 8, 63, 64, 65, 200])
def test_digits_sum_up_to_the_scalar(count, negative):
    scalars = (SCALARS * 4)[:count]
    references = np.empty((16, count), np.int32)
    field.recode(scalar_array(scalars), negative, references)
    for i, scalar in enumerate(scalars):
        first, *others = references[:, i].tolist()
        assert 1 <= first <= FULL, "window 0 has a row for each digit"
        total = 2 * (first - 1) - FULL + 1
        total += sum(digit(reference, j, FULL) << 16 * (j + 1) for j, reference in enumerate(others))
        assert total % ORDER == (-scalar if negative else scalar) % ORDER


@pytest.mark.parametrize("windows", [1, 2, 3, 4])
def test_digits_of_exponents_sum_up_to_twice_and_one(windows):
    half = 2 ** (16 * windows - 1)
    exponents = [-half, -half + 1, -2, -1, 0, 1, 2, half // 2, -half // 2, half - 2, half - 1]
    references = np.empty((windows, len(exponents)), np.int32)
    field.recode_exponents(np.array(exponents, np.int64), 1000, references)
    for i, exponent in enumerate(exponents):
        digits = [digit(reference, j, 1000) for j, reference in enumerate(references[:, i].tolist())]
        assert sum(d << 16 * j for j, d in enumerate(digits)) == 2 * exponent + 1


def test_rows_are_compared_word_by_word():
    for width in (4, 8):
        a = np.arange(6 * width, dtype=np.uint64).reshape(6, width)
        for column in range(width):
            for bit in (0, 63):
                b, equal = a.copy(), np.full(6, 7, np.uint8)
                b[3, column] ^= np.uint64(1 << bit)
                field.compare_rows(a, b, equal)
                assert equal.tolist() == [1, 1, 1, 0, 1, 1]
