"""The field arithmetic in lanes, at the bounds of its limbs: values that no random test would ever find.

Small kernels around the emitters take limbs as they are given, canonical or not; Python integers say what is right.
"""

import itertools
import random

import numpy as np
import pytest
from numba import njit

from tasks.crypto.field import P
from tests.crypto.conftest import CHOICES

if CHOICES[-1].name != "ifma":
    pytest.skip("no AVX-512 IFMA: importing the kernels would end the process", allow_module_level=True)

from tasks.crypto import ifma
from tasks.crypto.ifma import _K, _LOW48, _LOW52, ELEMENT, LANES, LIMBS, _load, _memory_operation, _store

C = 2**256 - P
TIGHT4 = 2**48 + 2**8  # limb 4 of a tight or wet element is below
TOP4 = 2**51  # limb 4 of what may be multiplied: its value is below 2**259


@pytest.fixture(scope="module", autouse=True)
def chosen():
    """One backend only."""


# --- emitters as functions of limbs ---------------------------------------------------------------------------------


def emitted(emit):
    """A function from lists of elements, each five limbs, to the list of elements that an emitter makes of them."""
    arity = emit.__code__.co_argcount - 1
    takes = [
        lambda builder, out, a, b, c: _store(builder, out, emit(builder, _load(builder, a))),
        lambda builder, out, a, b, c: _store(builder, out, emit(builder, _load(builder, a), _load(builder, b))),
        lambda builder, out, a, b, c: _store(builder, out, emit(builder, *(_load(builder, at) for at in (a, b, c)))),
    ]
    make = _memory_operation(takes[arity - 1])

    @njit
    def kernel(out, a, b, c):
        for i in range(len(out)):
            at = i * ELEMENT
            make(out.ctypes.data + at, a.ctypes.data + at, b.ctypes.data + at, c.ctypes.data + at)

    def function(*operands):
        lanes = [in_lanes(operand) for operand in operands]
        out = np.zeros_like(lanes[0])
        kernel(out, *(lanes + lanes[:1] * 2)[:3])
        return out_of_lanes(out)[: len(operands[0])]

    return function


def in_lanes(elements):
    """(blocks, 5, 8) words; the last lanes are zero."""
    padded = [*elements, *[(0,) * LIMBS] * (-len(elements) % LANES)]
    return np.ascontiguousarray(np.array(padded, np.uint64).reshape(-1, LANES, LIMBS).swapaxes(1, 2))


def out_of_lanes(lanes):
    return [tuple(element) for element in lanes.swapaxes(1, 2).reshape(-1, LIMBS).tolist()]


def number(element):
    """What five limbs are worth, bits above 52 included."""
    return sum(limb << 52 * j for j, limb in enumerate(element))


def multiplied(element):
    """What a multiplication takes five limbs for."""
    return number(limb & _LOW52 for limb in element)


def limbs(value):
    """Four limbs below 2**52, and the rest."""
    return (*((value >> 52 * j) & _LOW52 for j in range(4)), value >> 208)


def is_tight(element):
    return all(limb <= _LOW52 for limb in element[:4]) and element[4] < TIGHT4


# --- elements at their bounds ---------------------------------------------------------------------------------------

NUMBERS = [0, 1, 2, C - 1, C, C + 1, 2**52 - 1, 2**52, 2**208 - 1, 2**208, P // 2, P - 2, P - 1, P, P + 1, P + C - 1]
NUMBERS += [
    2**256 - 2,
    2**256 - 1,
    2**256,
    2**256 + 1,
    2**256 + 2**216 - 1,
    2**256 - 2**208,
    2**255,
    16 * C,
    2**256 - 16 * C,
]
PATTERNS = [(*low, top) for low in itertools.product((0, _LOW52), repeat=4) for top in (0, _LOW48, 2**48, TIGHT4 - 1)]
TIGHT = [*map(limbs, NUMBERS), *PATTERNS]
LARGE = [limbs(value) for k in range(1, 9) for value in (k * P - 1, k * P, k * P + 1)]
LARGE += [
    (*low, top) for low in itertools.product((0, _LOW52), repeat=4) for top in (2**49 - 1, 2**50 - 5, 2**50, TOP4 - 1)
]


def wet(elements):
    """The same numbers to a multiplication, with anything above bit 52 in limbs 0 to 3: all ones, or random."""
    source = random.Random(52)
    return [
        (*(limb | (2**12 - 1 if i % 2 else source.getrandbits(12)) << 52 for limb in element[:4]), element[4])
        for i, element in enumerate(elements)
    ]


def holds_wet(element):
    """A wet result: what is above bit 52 has been carried, and no limb was near its end."""
    return all(limb < 2**60 for limb in element[:4]) and element[4] < TIGHT4


INITIAL = [
    (0,) * 5,
    (2**58 - 1,) * 5,
    (2**58 - 1, 0, 0, 0, 0),
    (0, 0, 0, 2**58 - 1, 2**58 - 1),
    (0, 0, 0, 0, 2**58 - 1),
]
INITIAL += [_K, tuple(2 * limb for limb in _K), (1, 0, 0, 0, 0)]

# n and less, where limbs of 2 n - less are in [0, 2**58).
DOUBLED = [(n, (0,) * 5) for n in ((0,) * 5, (2**57 - 1,) * 5, (2**57 - 1, 0, 0, 0, 0), (0, 0, 0, 0, 2**57 - 1), _K)]
DOUBLED += [(_K, (*[_LOW52] * 4, 2**51 - 10)), ((2**51,) * 5, (2**52,) * 5), ((2**57 - 1,) * 5, (1,) * 5)]

multiply = emitted(lambda builder, a, b: ifma._multiply(builder, a, b))
multiply_dry = emitted(lambda builder, a, b, c: ifma._multiply(builder, a, b, c, dry=True))
square = emitted(lambda builder, a: ifma._square(builder, a))
square_dry = emitted(lambda builder, a, n, less: ifma._square(builder, a, n, less, dry=True))
reduce_dry = emitted(lambda builder, low, high: ifma._reduce(builder, low + high, dry=True))
reduce_wet = emitted(lambda builder, low, high: ifma._reduce(builder, low + high))
carry_dry = emitted(lambda builder, a: ifma._carry(builder, a, dry=True))
carry_signed = emitted(lambda builder, a: ifma._carry(builder, a, signed=True))
canonical = emitted(lambda builder, a: ifma._canonical(builder, a))
is_multiple = emitted(
    lambda builder, a: [builder.select(ifma._is_multiple_of_p(builder, a), ifma._all(1), ifma._all(0))] * LIMBS
)
from_k = emitted(lambda builder, a: ifma._from_k(builder, a))
minus = emitted(lambda builder, a: ifma._minus(builder, a))
pack = emitted(lambda builder, a: [*ifma._pack64(builder, a), a[4]])
unpack = emitted(lambda builder, words: ifma._unpack64(builder, words[:4]))
halved = emitted(lambda builder, a: ifma._halved(builder, a))
halves = emitted(
    lambda builder, a, q: ifma._canonical(
        builder, [builder.add(*limbs) for limbs in zip(ifma._halved(builder, a), q, strict=True)]
    )
)
unpack_flipped = emitted(lambda builder, words: ifma._unpack64(builder, words[:4], ifma._all(-1)))


@pytest.mark.parametrize("factors", [TIGHT, wet(TIGHT), LARGE, wet(LARGE)], ids=["tight", "wet", "large", "large-wet"])
def test_products_at_the_bounds(factors):
    pairs = list(itertools.product(factors, TIGHT + LARGE))
    left, right = zip(*pairs, strict=True)
    for (a, b), product in zip(pairs, multiply(left, right), strict=True):
        assert multiplied(product) % P == multiplied(a) * multiplied(b) % P
        assert holds_wet(product)
    initial = list(itertools.islice(itertools.cycle(INITIAL), len(pairs)))
    for (a, b), i, product in zip(pairs, initial, multiply_dry(left, right, initial), strict=True):
        assert number(product) % P == (multiplied(a) * multiplied(b) + number(i)) % P
        assert is_tight(product)


def test_squares_at_the_bounds():
    factors = [*TIGHT, *wet(TIGHT), *LARGE, *wet(LARGE)]
    for a, product in zip(factors, square(factors), strict=True):
        assert multiplied(product) % P == multiplied(a) ** 2 % P
        assert holds_wet(product)
    triples = [(a, n, less) for a, (n, less) in itertools.product(factors, DOUBLED)]
    for (a, n, less), product in zip(triples, square_dry(*zip(*triples, strict=True)), strict=True):
        assert number(product) % P == (multiplied(a) ** 2 + 2 * number(n) - number(less)) % P
        assert is_tight(product)


def columns_at_the_folds():
    """Ten columns: the largest ones, and numbers whose first or second fold lands around a multiple of 2**256."""
    high = (2**59 - 1, 2**59 - 1, 2**59 - 1, 2**59 - 1, 2**50 - 2**8)  # below 2**258
    for low in itertools.product((0, _LOW52, 2**59 - 1), repeat=5):
        yield low, high
        yield low, (0,) * 5
    source = random.Random(256)
    for bits in [*range(0, 258, 6), *[257] * 50]:
        upper = source.getrandbits(bits) | 1 << bits
        if upper < 2**258:
            for delta in (-1, 0, 1, C, -C, -2 * C, 16 * C):
                # upper 16 C + lower is k 2**256 + delta: t = k, or k - 1 and a carry that comes later.
                k = -(-(upper * 16 * C - delta) >> 256) + source.choice((0, 0, 1, 2))
                lower = k * 2**256 + delta - upper * 16 * C
                if 0 <= lower < 2**266:
                    yield limbs(lower), limbs(upper)


def test_sums_of_columns_at_the_folds():
    cases = [(low, high) for low, high in columns_at_the_folds() if number(high) < 2**258]
    assert len(cases) > 600
    lows, highs = zip(*cases, strict=True)
    for (low, high), dry, damp in zip(cases, reduce_dry(lows, highs), reduce_wet(lows, highs), strict=True):
        expected = (number(low) + (number(high) << 260)) % P
        assert number(dry) % P == multiplied(damp) % P == expected
        assert is_tight(dry)
        assert holds_wet(damp)


def test_the_canonical_number_of_everything_it_is_stated_for():
    cases = [*TIGHT, *LARGE, *itertools.product((0, _LOW52, 2**60 - 1), repeat=4)]
    cases = [
        (*case[:4], *case[4:5]) if len(case) == 5 else (*case, top) for case in cases for top in (0, 2**50, 2**56 - 1)
    ]
    multiples = [k * P + d for k in (*range(12), 255, 256, 257) for d in (-C - 1, -C, -2, -1, 0, 1, 2, C, C + 1)]
    multiples += [k * 2**256 + d for k in range(1, 200) for d in (-C - 1, -C, -1, 0, 1, C)]
    cases += [limbs(value) for value in multiples if value >= 0]
    for case, result in zip(cases, canonical(cases), strict=True):
        assert result == limbs(number(case) % P)


def test_only_zero_and_p_are_multiples_of_p():
    near = [
        [limb ^ (1 << bit if k == j else 0) for k, limb in enumerate(limbs(P))] for j in range(5) for bit in (0, 47)
    ]
    elements = [*TIGHT, *near]
    for element, (found, *_) in zip(elements, is_multiple(elements), strict=True):
        assert found == int(number(element) % P == 0)
    assert sum(number(element) % P == 0 for element in elements) >= 2


def test_what_is_taken_from_k_stays_positive_limb_by_limb():
    for element, result in zip(TIGHT, from_k(TIGHT), strict=True):
        assert number(result) == 4 * P - number(element)
        assert all(2**53 < limb < 2**55 for limb in result[:4])
        assert 0 < result[4] < 2**50


def test_negatives_of_canonical_elements():
    elements = [limbs(value % P) for value in NUMBERS]
    for element, result in zip(elements, minus(elements), strict=True):
        assert number(result) == 4 * P - number(element)
        assert all(limb <= _LOW52 for limb in result[:4])
        assert result[4] < 2**50


def test_carries_keep_the_number():
    elements = [
        *TIGHT,
        *LARGE,
        *itertools.product((0, 1, 2**60 - 1), (0, 2**60 - 1), (_LOW52,), (2**60 - 1,), (0, 2**50)),
    ]
    for element, result in zip(elements, carry_dry(elements), strict=True):
        assert number(result) == number(element)
        assert all(limb <= _LOW52 for limb in result[:4])


def test_signed_carries_keep_a_number_that_is_not_negative():
    source = random.Random(4)
    elements = []
    for value in (0, 1, C, P, 2**256, 4 * P, 8 * P - 1, 2**259 - 1):
        for shifts in itertools.product((-(2**54), -1, 0, 1, 2**54), repeat=4):
            # Move some multiples of 2**52 from every limb to the one below: limbs become negative, or large.
            moved = [0, *(source.choice((shift, shift // 3)) % 2**9 * (1 if shift > 0 else -1) for shift in shifts), 0]
            limb = [a + (moved[j + 1] << 52) - moved[j] for j, a in enumerate(limbs(value))]
            elements.append([part % 2**64 for part in limb])
    for element, result in zip(elements, carry_signed(elements), strict=True):
        signed = [limb - 2**64 if limb >> 63 else limb for limb in element]
        assert multiplied(result) == number(signed)


def test_words_and_limbs_go_both_ways():
    values = [value % 2**256 for value in NUMBERS] + [sum(w << 64 * i for i, w in enumerate(word)) for word in WORDS]
    packed = pack([limbs(value) for value in values])
    assert [sum(w << 64 * i for i, w in enumerate(words[:4])) for words in packed] == values
    assert unpack(packed) == [limbs(value) for value in values]
    assert unpack_flipped(packed) == [limbs(2**256 - 1 - value) for value in values]


def test_halves_of_canonical_elements_and_what_is_added_to_them():
    patterns = [sum(word << 64 * i for i, word in enumerate(words)) for words in WORDS]
    elements = [limbs(value % P) for value in [*NUMBERS, *patterns]]
    for element, result in zip(elements, halved(elements), strict=True):
        assert 2 * number(result) in (number(element), number(element) + P)
        assert all(limb < 2**52 + 2**51 for limb in result[:4])
        assert result[4] < 2**48
    for terms in (TIGHT, from_k(TIGHT)):
        left, right = zip(*itertools.product(elements[: len(NUMBERS)], terms), strict=True)
        for a, q, result in zip(left, right, halves(left, right), strict=True):
            assert result == limbs((number(a) * (P + 1) // 2 + number(q)) % P)


WORDS = [*itertools.product((0, 1, 2**63, 2**64 - 1), repeat=4)]

# --- the steps of an addition, on coordinates that are not canonical -------------------------------------------------


@njit
def chord(states, others, dx, slopes, negative):
    """Both passes of state + other state, but for the inversion: dx is written, slopes hold 1 / dx."""
    for i in range(0, len(states), 2):
        j = min(i + 1, len(states) - 1)
        state, other = states.ctypes.data + 2 * i * ELEMENT, others.ctypes.data + 2 * i * ELEMENT
        state2, other2 = states.ctypes.data + 2 * j * ELEMENT, others.ctypes.data + 2 * j * ELEMENT
        slope, slope2 = slopes.ctypes.data + i * SLOPE, slopes.ctypes.data + j * SLOPE
        dx1, dx2 = dx.ctypes.data + i * ELEMENT, dx.ctypes.data + j * ELEMENT
        ifma._compare_states(
            state, other, dx1, slope + ELEMENT, slope + 2 * ELEMENT,
            state2, other2, dx2, slope2 + ELEMENT, slope2 + 2 * ELEMENT,
        )  # fmt: skip
        ifma._slope_states(slope, state, other, negative, slope2, state2, other2, negative)
        ifma._abscissa_chord(slope, state, dx1, slope2, state2, dx2)
        ifma._ordinate(slope, state, slope2, state2)


@njit
def tangent(states, dx, slopes):
    for i in range(0, len(states), 2):
        j = min(i + 1, len(states) - 1)
        state, slope = states.ctypes.data + 2 * i * ELEMENT, slopes.ctypes.data + i * SLOPE
        state2, slope2 = states.ctypes.data + 2 * j * ELEMENT, slopes.ctypes.data + j * SLOPE
        dx1, dx2 = dx.ctypes.data + i * ELEMENT, dx.ctypes.data + j * ELEMENT
        ifma._compare_self(
            state, dx1, slope + ELEMENT, slope + 2 * ELEMENT, state2, dx2, slope2 + ELEMENT, slope2 + 2 * ELEMENT
        )
        ifma._slope_self(slope, state, slope2, state2)
        ifma._abscissa_self(slope, state, slope2, state2)
        ifma._ordinate(slope, state, slope2, state2)


SLOPE = (ifma._GROUP + 1) * ELEMENT  # a slope, and d behind the slopes of a group


def states_of(points):
    """(blocks, 2, 5, 8): N = K - x and S = y of tight (x, y)."""
    n = [tuple(k - limb for k, limb in zip(_K, x, strict=True)) for x, _ in points]
    return np.ascontiguousarray(np.stack([in_lanes(n), in_lanes([y for _, y in points])], axis=1))


def room(blocks, inverses):
    slopes = np.zeros((blocks, SLOPE // ELEMENT, LIMBS, LANES), np.uint64)
    slopes[:, 0] = in_lanes(inverses)
    slopes[:, 2] = in_lanes([(1, 0, 0, 0, 0)] * LANES * blocks)  # the chain of prefix products
    return slopes


def check_states(states, count, expected):
    n, s = out_of_lanes(states[:, 0])[:count], out_of_lanes(states[:, 1])[:count]
    for n_limbs, s_limbs, (x3, minus_y3) in zip(n, s, expected, strict=True):
        x = tuple(k - limb for k, limb in zip(_K, n_limbs, strict=True))
        assert all(limb >= 0 for limb in x)
        assert is_tight(x)
        assert is_tight(s_limbs)
        assert (number(x) % P, number(s_limbs) % P) == (x3 % P, minus_y3 % P)


def coordinates(count, seed, more=()):
    """Pairs of tight elements: some at their bounds, the others random. more: for the second of a pair, beside these."""
    source = random.Random(seed)
    drawn = [limbs(source.randrange(P)) for _ in range(20)]
    return [(source.choice(TIGHT + drawn), source.choice(TIGHT + drawn + list(more))) for _ in range(count)]


NEGATED = [limbs(4 * P - y) for y in (1, 2, C, P // 2, P - 2, P - 1)] * 4  # S of a row that is taken off first


@pytest.mark.parametrize("negative", [0, 1])
def test_the_steps_of_a_chord_hold_for_tight_coordinates(negative):
    pairs = [
        (a, b)
        for a, b in zip(coordinates(6000, 1, NEGATED), coordinates(6000, 2), strict=True)
        if (number(a[0]) - number(b[0])) % P
    ]
    first, second = zip(*pairs, strict=True)
    inverses, expected = [], []
    for (x1, s1), (x2, s2) in pairs:
        x1, s1, x2, y2 = number(x1), number(s1), number(x2), number(s2) * (-1) ** negative
        inverse = pow(x2 - x1, -1, P)
        slope = (y2 - s1) * inverse
        x3 = slope * slope - x1 - x2
        inverses.append(limbs(inverse + P if inverse < C else inverse))  # the larger representative, where there is one
        expected.append((x3, slope * (x3 - x1) + s1))
    states, dx = states_of(first), np.zeros_like(in_lanes(inverses))
    chord(states, states_of(second), dx, room(len(states), inverses), negative)
    check_states(states, len(pairs), expected)
    for element, ((x1, _), (x2, _)) in zip(out_of_lanes(dx), pairs, strict=False):
        assert number(element) == number(x2) + 4 * P - number(x1)
        assert all(limb <= _LOW52 for limb in element[:4])
        assert element[4] < 2**51


def test_the_steps_of_a_doubling_hold_for_tight_coordinates():
    points = [(x, y) for x, y in coordinates(6000, 3) if number(y) % P]
    inverses, expected = [], []
    for x1, s1 in ((number(x), number(y)) for x, y in points):
        inverse = pow(2 * s1, -1, P)
        slope = 3 * x1 * x1 * inverse
        x3 = slope * slope - 2 * x1
        inverses.append(limbs(inverse))
        expected.append((x3, slope * (x3 - x1) + s1))
    states, dx = states_of(points), np.zeros_like(in_lanes(inverses))
    tangent(states, dx, room(len(states), inverses))
    check_states(states, len(points), expected)
    for element, (_, y) in zip(out_of_lanes(dx), points, strict=False):
        assert number(element) == 2 * number(y)
        assert element[4] < 2**51


# --- confirming sums without a division ------------------------------------------------------------------------------

EDGES = sorted({value % P for value in NUMBERS})


def drawn_sums(count, seed):
    """Signed rows (x, y) that need not be on the curve, some with coordinates at their bounds, and their sums by a chord."""
    source = random.Random(seed)

    def coordinate():
        return source.choice(EDGES) if source.random() < 0.6 else source.randrange(P)

    for _ in range(count):
        (xa, ya), (xb, yb) = ((coordinate(), coordinate()) for _ in range(2))
        a, b = source.choice((1, -1)), source.choice((1, -1))
        if xa != xb:
            slope = (b * yb - a * ya) * pow(xb - xa, -1, P)
            x = (slope * slope - xa - xb) % P
            yield (xa, ya, a), (xb, yb, b), (x, (slope * (xa - x) - a * ya) % P)


def confirmed(sums):
    table = np.ascontiguousarray(words_of([(x, y) for rows in zip(*sums, strict=True) for x, y, *_ in rows]))[
        : 2 * len(sums)
    ]
    columns = -(-len(sums) // LANES) * LANES
    references = np.ones((2, columns), np.int32)
    for w in range(2):
        references[w, : len(sums)] = [(w * len(sums) + i + 1) * each[w][2] for i, each in enumerate(sums)]
    holds = np.full(len(sums), 7, np.uint8)
    ifma.sums_hold(words_of([point for *_, point in sums]), table, references, holds)
    return holds.tolist()


def words_of(points):
    data = b"".join(c.to_bytes(32, "little") for point in points for c in point)
    return np.frombuffer(data, "<u8").reshape(-1, 8)


def test_every_sum_of_two_rows_is_confirmed():
    sums = list(drawn_sums(8000, 1))
    assert confirmed(sums) == [1] * len(sums)


def test_nothing_but_the_sum_is_confirmed():
    beta = pow(3, (P - 1) // 3, P)  # (beta x, y) is on the curve with (x, y), too
    others = [
        lambda x, y: (x, (P - y) % P),
        lambda x, y: (beta * x % P, y),
        lambda x, y: ((x + 1) % P, y),
        lambda x, y: (x, (y + 1) % P),
        lambda x, y: (0, 0),
    ]
    for other in others:
        sums = [(a, b, point) for a, b, point in drawn_sums(500, 2) if other(*point) != point]
        assert confirmed([(a, b, other(*point)) for a, b, point in sums]) == [0] * len(sums)
    for other in range(2):  # one row with the other sign, one row in the place of the sum
        sums = [each for each in drawn_sums(500, 3) if each[other][1] and each[0][1] and each[1][1]]
        turned = [[(x, y, -sign if w == other else sign) for w, (x, y, sign) in enumerate(each[:2])] for each in sums]
        wrong = confirmed([(*rows, each[2]) for rows, each in zip(turned, sums, strict=True)])
        assert wrong == [0] * len(sums)
        wrong = confirmed([(a, b, (a, b)[other][:2]) for a, b, point in sums if (a, b)[other][:2] != point])
        assert not any(wrong)


@pytest.mark.parametrize("count", [*range(1, 18), 63, 64, 65, 97, 128])
def test_one_wrong_sum_is_seen_wherever_it_is(count):
    sums = list(drawn_sums(2 * count + 9, 4))[:count]
    for wrong in range(count):
        tried = list(sums)
        a, b, (x, y) = sums[wrong]
        tried[wrong] = (a, b, (x, (y + 1) % P))
        assert confirmed(tried) == [int(i != wrong) for i in range(count)]
