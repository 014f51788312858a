"""Who must not succeed. Every attack is carried out twice: on the published scheme, where it works, and on ours.

The published scheme, U_k = r * pk_P + x_k * pk_A with ONE mask r for the whole vector, is implemented here as the
positive control: it shows that the attack's code would find the update if it could be found. Where the published scheme
has nothing to attack, the control is the same code in the hands of somebody who is allowed to succeed.
"""

from collections import Counter
from functools import lru_cache

import numpy as np
import pytest

from tasks.crypto import ndd_fe
from tasks.crypto.bsgs import OutOfBound, discrete_logs
from tasks.crypto.curve import integers_of, scalar_array
from tasks.crypto.ndd_fe import Label
from tests import oracle
from tests.crypto import rows, tuples
from tests.oracle import G, H, N, add, multiply, negate

BOUND = 9
VALUES = np.array(
    [
        [0, 0, 0, 4, 0, -7, 9, 4],
        [1, -2, 0, 3, 0, 5, -9, 0],
        [0, 6, 0, -4, 1, 0, 8, -3],
        [2, 0, -1, 0, 7, 0, 5, -6],
    ]
)
WEIGHTS = [2, 3, 1, 4]
HONEST, ALSO_HONEST, COLLUDING = 0, 1, [2, 3]  # two honest miners: with one, the public sum alone gives it away
LABEL = Label(bytes(32), "attacked", 1)
D = VALUES.shape[1]


def minus(a, b):
    return add(a, negate(b))


@lru_cache(maxsize=16)
def multiples_around_zero(base, bound):
    return {multiply(e, base): e for e in range(-bound, bound + 1)}


def small_exponents(points, base, bound):
    """Discrete logs in a small range, None where there is none: what anybody with a laptop can compute."""
    return [multiples_around_zero(base, bound).get(point) for point in points]


# --- the two schemes ------------------------------------------------------------------------------------------------

PUBLISHER_SECRET, AGGREGATOR_SECRET, BROKEN_MASK = 0x1111 << 200, 0x2222 << 190, 0x3333 << 180
BROKEN_BASE = multiply(AGGREGATOR_SECRET, G)  # pk_A, in which the published scheme writes x


@pytest.fixture(scope="module")
def broken():
    """Ciphertext of the honest miner in the published scheme."""
    mask = multiply(BROKEN_MASK, multiply(PUBLISHER_SECRET, G))
    return [add(mask, multiply(int(x), BROKEN_BASE)) for x in VALUES[HONEST]]


class Ours:
    """One round of our scheme, with everything that anybody in it knows."""

    def __init__(self, salt=bytes(16)):
        self.publisher_masks, self.aggregator_masks = (
            [ndd_fe.mask_key(bytes([i, j]) * 16, role, LABEL, salt) for i in range(4)]
            for j, role in enumerate(("publisher", "aggregator"))
        )
        masks = zip(VALUES, self.publisher_masks, self.aggregator_masks, strict=True)
        self.arrays = [ndd_fe.encrypt(x, p, a, bound=BOUND) for x, p, a in masks]
        self.ciphertexts = [tuples(array) for array in self.arrays]
        self.key = ndd_fe.derive_key(self.publisher_masks, WEIGHTS, D)
        self.m, self.rho = ndd_fe.open_sum(self.key, self.aggregator_masks, self.arrays, WEIGHTS, bound=90)
        self.f = integers_of(self.key)
        self.public_rho = integers_of(self.rho)
        self.r = [[oracle.mask(key, k) for k in range(D)] for key in self.publisher_masks]
        self.t = [[oracle.mask(key, k) for k in range(D)] for key in self.aggregator_masks]

    def without(self, blinding):
        """The honest miner's ciphertext with a guess at its blinding taken off."""
        target = self.ciphertexts[HONEST]
        return [minus(U, multiply(b, H)) for U, b in zip(target, blinding, strict=True)]


@pytest.fixture(scope="module")
def ours(chosen):
    return Ours()


# --- the attacks ----------------------------------------------------------------------------------------------------


def differences(ciphertext, base):
    """x_k - x_0 for every k, from the quotients of one miner's ciphertexts."""
    return small_exponents([minus(U, ciphertext[0]) for U in ciphertext], base, 2 * BOUND)


def most_frequent(ciphertext, base):
    """Sparse vectors: the commonest ciphertext is the mask itself."""
    mask, _ = Counter(ciphertext).most_common(1)[0]
    return small_exponents([minus(U, mask) for U in ciphertext], base, BOUND)


def nothing(found, certain=()):
    """No coordinate is found, but for those that are certain beforehand (the difference of a point to itself)."""
    return [k for k, value in enumerate(found) if value is not None] == list(certain)


# --- outsider: everything public, ciphertexts and the opening (m, rho) ----------------------------------------------


def test_outsider_cannot_use_differences_of_one_miners_ciphertexts(broken, ours):
    truth = (VALUES[HONEST] - VALUES[HONEST][0]).tolist()
    assert differences(broken, BROKEN_BASE) == truth, "control"
    assert nothing(differences(ours.ciphertexts[HONEST], G), certain=[0])
    assert nothing(differences(ours.ciphertexts[HONEST], H), certain=[0])


def test_outsider_cannot_use_any_pair_of_ciphertexts(ours):
    everything = [U for ciphertext in ours.ciphertexts for U in ciphertext]
    pairs = [minus(a, b) for i, a in enumerate(everything) for b in everything[:i]]
    pairs += [add(a, b) for i, a in enumerate(everything) for b in everything[:i]]
    assert nothing(small_exponents(pairs, G, 2 * BOUND))


def test_outsider_cannot_use_the_most_frequent_ciphertext(broken, ours):
    assert most_frequent(broken, BROKEN_BASE) == VALUES[HONEST].tolist(), "control"
    assert Counter(ours.ciphertexts[HONEST]).most_common(1)[0][1] == 1, "no ciphertext occurs twice"
    # The guess that some coordinate is zero gives the blinding of that coordinate, and of no other.
    for guess in range(D):
        found = [minus(U, ours.ciphertexts[HONEST][guess]) for U in ours.ciphertexts[HONEST]]
        assert nothing(small_exponents(found, G, 2 * BOUND), certain=[guess])


def test_outsider_cannot_use_the_opening_beyond_the_sum(ours):
    assert nothing(small_exponents(ours.without(ours.public_rho), G, 90))
    for share in (pow(WEIGHTS[HONEST], -1, N), pow(sum(WEIGHTS), -1, N)):
        assert nothing(small_exponents(ours.without([rho * share % N for rho in ours.public_rho]), G, 90))
    # Two openings of the same sum by two rounds of salts: their difference is free of x, and shows nothing either.
    other = Ours(salt=b"\1" * 16)
    assert (other.m == ours.m).all()
    pairs = [minus(a, b) for a, b in zip(ours.ciphertexts[HONEST], other.ciphertexts[HONEST], strict=True)]
    assert nothing(small_exponents(pairs, G, BOUND))
    assert not set(ours.ciphertexts[HONEST]) & set(other.ciphertexts[HONEST])


def test_outsider_cannot_open_without_a_key(ours):
    with pytest.raises(OutOfBound) as caught:
        discrete_logs(ours.arrays[HONEST], 2**20)
    assert caught.value.coordinates == list(range(D))


# --- publisher alone: all r, f, everything public -------------------------------------------------------------------


def test_publisher_alone_finds_no_coordinate(broken, ours):
    mask = multiply(BROKEN_MASK, multiply(PUBLISHER_SECRET, G))  # P computes it: r comes from its ECDH with the miner
    assert small_exponents([minus(U, mask) for U in broken], BROKEN_BASE, BOUND) == VALUES[HONEST].tolist(), "control"

    own = ours.without(ours.r[HONEST])
    assert nothing(small_exponents(own, G, BOUND))
    assert nothing(differences(own, G), certain=[0])
    # rho - f is the weighted sum of all t: the publisher learns it from the opening, but not one miner's part.
    t_sum = [(rho - f) % N for rho, f in zip(ours.public_rho, ours.f, strict=True)]
    guess = [(r + t * pow(WEIGHTS[HONEST], -1, N)) % N for r, t in zip(ours.r[HONEST], t_sum, strict=True)]
    assert nothing(small_exponents(ours.without(guess), G, 90))


# --- aggregator alone: all t, then also f ---------------------------------------------------------------------------


def test_aggregator_alone_finds_no_coordinate_without_the_functional_key(broken, ours):
    # In the published scheme the aggregator needs no key for one miner's differences either.
    assert differences(broken, BROKEN_BASE)[6] == 9, "control"
    own = ours.without(ours.t[HONEST])
    assert nothing(small_exponents(own, G, BOUND))
    assert nothing(differences(own, G), certain=[0])
    zero = np.zeros((D, 4), np.uint64)
    with pytest.raises(OutOfBound):
        ndd_fe.open_sum(zero, ours.aggregator_masks, ours.arrays, WEIGHTS, bound=90)


def test_aggregator_with_the_functional_key_learns_the_sum_and_no_coordinate(ours):
    assert ours.m.tolist() == (WEIGHTS @ VALUES).tolist(), "control: the sum is what it is meant to learn"
    inverse = pow(WEIGHTS[HONEST], -1, N)
    for share in (1, inverse, pow(sum(WEIGHTS), -1, N)):
        guess = [(f * share + t) % N for f, t in zip(ours.f, ours.t[HONEST], strict=True)]
        assert nothing(small_exponents(ours.without(guess), G, 90))
    # The key is for the whole cohort and these weights: no part of it opens, alone or in pairs.
    for part in ([0], [1], [0, 1], [0, 2, 3], [1, 2, 3]):
        with pytest.raises(OutOfBound) as caught:
            ndd_fe.open_sum(
                ours.key, [ours.aggregator_masks[i] for i in part], [ours.arrays[i] for i in part],
                [WEIGHTS[i] for i in part], bound=90,
            )  # fmt: skip
        assert caught.value.coordinates == list(range(D))


def test_two_keys_for_different_cohorts_would_reveal_one_miner(ours):
    """The stated reason why the publisher derives one key a round: this attack WORKS if it derives two."""
    rest = [1, 2, 3]
    second = ndd_fe.derive_key([ours.publisher_masks[i] for i in rest], [WEIGHTS[i] for i in rest], D)
    m, _ = ndd_fe.open_sum(
        second, [ours.aggregator_masks[i] for i in rest], [ours.arrays[i] for i in rest],
        [WEIGHTS[i] for i in rest], bound=90,
    )  # fmt: skip
    assert ((ours.m - m) // WEIGHTS[HONEST]).tolist() == VALUES[HONEST].tolist()


# --- other miners, alone and with one key holder --------------------------------------------------------------------


def known_by_miners(ours):
    """What the colluding miners take off the public sum: their own values and blindings. Leaves the honest miners'."""
    m = ours.m - sum(WEIGHTS[i] * VALUES[i] for i in COLLUDING)
    own = [sum(WEIGHTS[i] * (ours.r[i][k] + ours.t[i][k]) for i in COLLUDING) for k in range(D)]
    return m, [(rho - b) % N for rho, b in zip(ours.public_rho, own, strict=True)]


def test_other_miners_alone_find_no_coordinate(broken, ours):
    assert differences(broken, BROKEN_BASE) == (VALUES[HONEST] - VALUES[HONEST][0]).tolist(), "control"
    m, rho = known_by_miners(ours)
    honest_sum = WEIGHTS[HONEST] * VALUES[HONEST] + WEIGHTS[ALSO_HONEST] * VALUES[ALSO_HONEST]
    assert m.tolist() == honest_sum.tolist(), "the sum of the honest miners, which is public by subtraction"
    inverse = pow(WEIGHTS[HONEST], -1, N)
    for share in (1, inverse):
        assert nothing(small_exponents(ours.without([b * share % N for b in rho]), G, 90))
    for i in COLLUDING:  # one's own mask fits nobody else
        assert nothing(small_exponents(ours.without([a + b for a, b in zip(ours.r[i], ours.t[i], strict=True)]), G, 90))


@pytest.mark.parametrize("holder", ["publisher", "aggregator"])
def test_other_miners_colluding_with_one_key_holder_find_no_coordinate(ours, holder):
    known, unknown = (ours.r, ours.t) if holder == "publisher" else (ours.t, ours.r)
    _, rho = known_by_miners(ours)
    # What is left of rho without the known masks is y_0 s_0 + y_1 s_1 of the holder that keeps silent.
    left = [
        (b - WEIGHTS[HONEST] * known[HONEST][k] - WEIGHTS[ALSO_HONEST] * known[ALSO_HONEST][k]) % N
        for k, b in enumerate(rho)
    ]
    assert left[0] == (WEIGHTS[HONEST] * unknown[HONEST][0] + WEIGHTS[ALSO_HONEST] * unknown[ALSO_HONEST][0]) % N
    inverse = pow(WEIGHTS[HONEST], -1, N)
    for guess in ([0] * D, left, [b * inverse % N for b in left]):
        blinding = [(a + b) % N for a, b in zip(known[HONEST], guess, strict=True)]
        assert nothing(small_exponents(ours.without(blinding), G, 90))
        assert nothing(differences(ours.without(blinding), G), certain=[0])


def test_stated_limit_publisher_and_aggregator_together_see_everything(ours):
    both = [r + t for r, t in zip(ours.r[HONEST], ours.t[HONEST], strict=True)]
    assert small_exponents(ours.without(both), G, BOUND) == VALUES[HONEST].tolist()


def test_stated_limit_with_one_honest_miner_the_sum_is_its_update(ours):
    others = sum(WEIGHTS[i] * VALUES[i] for i in (1, 2, 3))
    assert ((ours.m - others) // WEIGHTS[HONEST]).tolist() == VALUES[HONEST].tolist()


# --- a lying aggregator ---------------------------------------------------------------------------------------------


def lies(ours):
    """Openings of another sum, made with everything the aggregator knows: t, f, rho, the true m."""
    rho = ours.public_rho
    changed = ours.m.copy()
    changed[3] += 1
    others = ours.m - WEIGHTS[1] * VALUES[1]  # even if it knew a miner's update by other means
    without = [(b - WEIGHTS[1] * ours.t[1][k]) % N for k, b in enumerate(rho)]
    return {
        "one coordinate raised": (changed, rho, [3]),
        "blinding moved along": (changed, [(b - 1) % N for b in rho], list(range(D))),
        "blinding of that coordinate moved": (changed, [*rho[:3], (rho[3] - 1) % N, *rho[4:]], [3]),
        "f as blinding": (changed, ours.f, list(range(D))),
        "a miner left out": (others, without, list(range(D))),
        "doubled": (2 * ours.m, [2 * b % N for b in rho], list(range(D))),
        "negated": (-ours.m, [-b % N for b in rho], list(range(D))),
        "coordinates moved by one": (np.roll(ours.m, 1), [rho[-1], *rho[:-1]], list(range(D))),
        "the sum of another round": (ours.m, Ours(salt=b"\2" * 16).public_rho, list(range(D))),
    }


def test_every_lie_of_the_aggregator_is_caught_by_public_verification(ours):
    assert ndd_fe.failing_coordinates(ours.arrays, WEIGHTS, ours.m, ours.rho) == [], "control: the truth passes"
    for name, (m, rho, expected) in lies(ours).items():
        assert ndd_fe.failing_coordinates(ours.arrays, WEIGHTS, m, scalar_array(rho)) == expected, name


def test_the_lie_passes_only_for_one_who_knows_the_log_of_H():
    """Control: with a second base of known discrete log the very same lie passes, so the check is what catches it."""
    trapdoor = 0xABCDEF << 99
    base = multiply(trapdoor, G)
    commitment = add(multiply(5, G), multiply(1234, base))
    forged = (1234 - pow(trapdoor, -1, N)) % N
    assert commitment == add(multiply(6, G), multiply(forged, base))
    assert not oracle.opens(add(multiply(5, G), multiply(1234, H)), 6, forged)


def test_verification_notices_a_ciphertext_exchanged_afterwards(ours):
    exchanged = [ours.arrays[0], rows(ours.ciphertexts[1][::-1]), *ours.arrays[2:]]
    assert len(ndd_fe.failing_coordinates(exchanged, WEIGHTS, ours.m, ours.rho)) >= D - 1
