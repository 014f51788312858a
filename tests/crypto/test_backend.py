"""Which backend runs, and that both give the same bits on what batches, tails and exceptional additions can do wrong."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from coincurve import PublicKey

from tasks.crypto import backend, bsgs, curve, field, ndd_fe
from tasks.crypto.backend import Choice, WrongBackend
from tasks.crypto.bsgs import baby_steps, encode_exponents, half_logs
from tasks.crypto.curve import CHUNK, GENERATOR, multiples
from tasks.crypto.pedersen import Commitments
from tests import oracle
from tests.crypto import rows, tuples
from tests.crypto.conftest import CHOICES

IFMA = CHOICES[-1].kernels
SIZE = IFMA.BATCH * IFMA.LANES if IFMA else 3072  # points in a batch, or about as many
with_ifma = pytest.mark.skipif(IFMA is None, reason="this machine has no AVX-512 IFMA")


# For tests that do not depend on the backend at work.
once = pytest.mark.parametrize("chosen", CHOICES[:1], ids=["once"], indirect=True)


# --- the choice -----------------------------------------------------------------------------------------------------


def chosen_with(**environment):
    """Name and reason of the backend in a process of its own, or its last line of error."""
    program = "from tasks.crypto import backend; print(backend.CHOICE.name, backend.CHOICE.reason, sep='|')"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2], env={**os.environ, **environment},
    )  # fmt: skip
    assert found.returncode in (0, 1), f"ended by signal {-found.returncode}"
    return found.stdout.strip().split("|") if not found.returncode else found.stderr.strip().splitlines()[-1]


@once
def test_the_environment_asks_for_the_portable_kernels():
    assert chosen_with(HEALCHAIN_CURVE="portable") == ["portable", "HEALCHAIN_CURVE asks for it"]


@once
def test_the_environment_asks_for_ifma():
    found = chosen_with(HEALCHAIN_CURVE="ifma")
    if IFMA:
        assert found == ["ifma", "HEALCHAIN_CURVE asks for it"]
    else:
        assert "WrongBackend: HEALCHAIN_CURVE = 'ifma': numba's target lacks avx512" in found


@once
def test_the_fastest_backend_is_taken_unless_the_environment_asks():
    assert chosen_with(HEALCHAIN_CURVE="")[0] == CHOICES[-1].name


@once
def test_nonsense_in_the_environment_is_refused():
    found = chosen_with(HEALCHAIN_CURVE="fast")
    assert found.endswith(
        "WrongBackend: HEALCHAIN_CURVE = 'fast': expected ifma or portable, or nothing for the fastest"
    )


@once
@pytest.mark.parametrize(
    "target", [{"NUMBA_CPU_NAME": "generic"}, {"NUMBA_CPU_NAME": "skylake", "NUMBA_CPU_FEATURES": "+avx2"}]
)
def test_a_target_without_the_instructions_gets_the_portable_kernels(target, tmp_path):
    """numba may be told to compile for less than the processor has; LLVM would then end the process."""
    name, reason = chosen_with(HEALCHAIN_CURVE="", NUMBA_CACHE_DIR=str(tmp_path), **target)
    assert name == "portable"
    assert "numba's target lacks avx512f" in reason


RIGHT_SUM = IFMA and IFMA.add_rows


def wrong_sum(points, table, references, fresh, failed, room, invert):
    RIGHT_SUM(points, table, references, fresh, failed, room, invert)
    points[8, 7] ^= np.uint64(1)


def gives_up(points, table, references, fresh, failed, room, invert):
    failed[:] = 1


@once
@with_ifma
@pytest.mark.parametrize(
    "kernels",
    [
        {"add_rows": wrong_sum}, {"add_rows": gives_up}, {"first_invalid": lambda points: 3},
        {"decode_pairs": lambda pairs, points, failed, room, invert: points.fill(1)},
    ],
    ids=["one bit", "all failed", "no point", "no pair"],
)  # fmt: skip
def test_kernels_that_fail_their_self_test_are_not_taken(kernels, monkeypatch):
    changed = SimpleNamespace(**{**vars(IFMA), **kernels})
    assert backend.agrees(IFMA)
    assert not backend.agrees(changed)
    for name, kernel in kernels.items():
        monkeypatch.setattr(IFMA, name, kernel)
    assert backend.choose("").name == "portable"
    assert "self-test" in backend.choose("").reason
    with pytest.raises(WrongBackend, match="self-test"):
        backend.choose("ifma")


# --- points of which we know the exponents --------------------------------------------------------------------------

REACH = 20_000


@lru_cache(maxsize=1)
def pool():
    """(2 REACH + 1, 8): row e + REACH is e G. A sample is checked with libsecp256k1; the negatives are Python's."""
    ahead = multiples(GENERATOR, REACH)
    for e in (1, 2, 3, 1000, REACH - 1, REACH):
        assert tuples(ahead[e - 1 : e]) == [PublicKey.from_point(*oracle.G).multiply(e.to_bytes(32, "big")).point()]
    behind = rows([oracle.negate(point) for point in tuples(ahead)[::-1]])
    found = np.concatenate([behind, np.zeros((1, 8), np.uint64), ahead])
    found.flags.writeable = False
    return found


def of(exponents):
    """(m, 8) points of exponents."""
    return pool()[np.asarray(exponents) + REACH]


def references_to(exponents, signs=1):
    """References to rows of the pool, positive or negative; a row of infinity is named, too."""
    return ((np.asarray(exponents) * signs + REACH + 1) * signs).astype(np.int32)


@dataclass(frozen=True)
class Sums:
    """Exponents that start (m,), and those added to them (w, m), with the signs of their references (w, m)."""

    start: np.ndarray
    added: np.ndarray
    signs: np.ndarray

    @classmethod
    def random(cls, m, w, seed=0):
        """Distinct, and without an exceptional addition: starts are multiples of 100, the sums never come back to 0."""
        rng = np.random.default_rng(seed)
        start = 100 * rng.integers(-90, 90, m) + 50
        added = np.sort(rng.integers(1, 40, (w, m)), axis=0)
        return cls(start, added, rng.choice([-1, 1], (w, m)))

    def check(self, *, fresh=False, skipped=None):
        """The backend at work adds them up. skipped (w, m): where the reference is 0 instead."""
        points, skipped = of(self.start), np.zeros_like(self.added) if skipped is None else skipped
        references = np.where(skipped, 0, references_to(self.added, self.signs)).astype(np.int32)
        backend.add_rows(points, pool(), references, fresh=fresh)
        expected = np.where(skipped, 0, self.added).sum(axis=0) + (0 if fresh else self.start)
        wrong = np.flatnonzero((points != of(expected)).any(axis=1))
        assert wrong.tolist() == []


LENGTHS = [
    *range(1, 18),
    SIZE - 9,
    SIZE - 8,
    SIZE - 1,
    SIZE,
    SIZE + 1,
    SIZE + 7,
    SIZE + 8,
    SIZE + 9,
    2 * SIZE - 1,
    2 * SIZE + 3,
]


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("w", [1, 2, 3, 4])
def test_tails_of_every_length(w, fresh):
    for m in LENGTHS:
        Sums.random(m, w, seed=m).check(fresh=fresh)


PLACES = [0, 5, 7, 8, SIZE - 8, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE - 1, 2 * SIZE, 2 * SIZE + 4]


@pytest.mark.parametrize(
    "kind", ["equal", "opposite", "back to equal", "infinity added", "reference 0", "begins at infinity"]
)
def test_one_exceptional_addition_anywhere(kind):
    """In the first block and the last, in a tail, in the first batch and later ones, at each of three additions."""
    for place, step in product(PLACES, range(3)):
        sums = Sums.random(2 * SIZE + 5, 3, seed=place)
        skipped = np.zeros_like(sums.added)
        before = int(sums.start[place] + sums.added[:step, place].sum())
        if kind == "equal":
            sums.added[step, place] = before
        elif kind == "opposite":
            sums.added[step, place] = -before  # and, where more is added, begins at infinity in the middle
        elif kind == "back to equal":
            sums.start[place] = sums.added[step, place] - sums.added[:step, place].sum()
        elif kind == "infinity added":
            sums.added[step, place] = 0
        elif kind == "reference 0":
            skipped[step, place] = 1
        else:
            sums.start[place] = 0
        sums.check(skipped=skipped)


@pytest.mark.parametrize("m", [1, 8, 9, SIZE, 2 * SIZE + 5])
def test_vectors_of_exceptional_additions(m):
    zeros, ones = np.zeros(m, np.int64), np.ones((3, m), np.int64)
    for start, added in product((0, 1, -1, 2), repeat=2):
        Sums(zeros + start, ones * added, ones).check()
        Sums(zeros + start, ones * added, -ones).check()
    Sums(zeros, ones, ones).check(skipped=ones)
    Sums(zeros + 7, np.array([zeros + 7, zeros - 14, zeros + 14]), ones).check()
    mostly = np.where(np.arange(m) % 100 == 3, 5, 0)  # sums are 0 in most lanes, as those of sparse updates
    Sums(mostly - 9, ones[:1] * 9, ones[:1]).check()


def test_begun_afresh_with_exceptional_rows():
    """Reference 0 and rows of infinity in the first additions, equal and opposite first rows."""
    for place, step, exponent in product(PLACES, range(2), (0, 3, -3)):
        sums = Sums.random(2 * SIZE + 5, 3, seed=place)
        sums.added[:2, place] = (exponent, 3)[:: 1 - 2 * step]
        sums.check(fresh=True)
        skipped = np.zeros_like(sums.added)
        skipped[: step + 1, place] = 1
        sums.check(fresh=True, skipped=skipped)


def test_what_fresh_points_hold_does_not_matter():
    points, references = np.full((20, 8), 2**64 - 1, np.uint64), references_to(np.arange(1, 21))[None]
    backend.add_rows(points, pool(), references, fresh=True)
    assert (points == of(np.arange(1, 21))).all()
    backend.add_rows(points, pool(), np.empty((0, 20), np.int32), fresh=True)
    assert not points.any(), "a sum of nothing is infinity"


# --- programs -------------------------------------------------------------------------------------------------------

PART = SIZE // 4  # points in a batch of a program of several slots
WEIGHTS = [
    [1], [2], [3], [65535], [1, 1], [1, 1, 1, 1, 1], [2, 2], [7, 7, 7], [1, 2, 4, 8, 16, 32768], [65535, 1, 1, 1],
    [1, 65535], [3, 5], [65535, 65534, 65533], [16, 9, 4, 1, 12],
]  # fmt: skip


@lru_cache(maxsize=4096)
def multiple(exponent):
    return rows([oracle.multiply(exponent, oracle.G)])[0]


def weighed(exponents, weights):
    """The backend's weighted sum of arrays of exponents (h, m), and the right one."""
    arrays = [of(row) for row in exponents]
    total = np.empty((exponents.shape[1], 8), np.uint64)
    curve.weigh(total, arrays, weights)
    sums, places = np.unique(np.array(weights) @ exponents, return_inverse=True)
    return total, np.array([multiple(int(e)) for e in sums]).reshape(-1, 8)[places]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weighted_sums_with_exceptional_additions_anywhere(weights):
    """Few columns without an exceptional addition, and one with in some place: equal, opposite, infinite."""
    h = len(weights)
    rng = np.random.default_rng(h)
    usual = rng.permutation(np.arange(1, 4 * h + 1)).reshape(h, 4) * 1009 % 19_000
    special = [np.full(h, 1), np.full(h, 0), np.resize([1, -1], h), np.resize([0, 1], h), np.resize([-2, 1, 0, 1], h)]
    special.append(np.array([(-1) ** j * (60 // w if w < 60 else 1) for j, w in enumerate(weights)]))
    for m in (1, 9, PART - 1, PART, PART + 1, SIZE + 5):
        exponents = usual[:, rng.integers(0, 4, m)]
        for i, column in enumerate(special):
            exponents[:, [place for place in (0, 7, PART - 1, PART, SIZE, m - 1) if place < m][i :: len(special)]] = (
                column[:, None]
            )
        total, expected = weighed(exponents, weights)
        assert (total == expected).all()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weighted_sums_of_equal_opposite_and_infinite_arrays(weights):
    h = len(weights)
    for pattern in ([3], [0], [3, -3], [0, 3], [5, 0, -5]):
        exponents = np.repeat(np.resize(pattern, h)[:, None], 21, axis=1)
        total, expected = weighed(exponents, weights)
        assert (total == expected).all()


def test_the_same_array_may_be_given_several_times():
    array = of(np.arange(1, 30))
    total = np.empty_like(array)
    curve.weigh(total, [array] * 4, [2, 3, 5, 7])
    assert (total == of(17 * np.arange(1, 30))).all()
    curve.weigh(total, [array] * 3, [1, 1, 1])
    assert (total == of(3 * np.arange(1, 30))).all()
    assert (array == of(np.arange(1, 30))).all(), "inputs are left as they were"


# --- both backends, bit for bit -------------------------------------------------------------------------------------


def with_both(monkeypatch, work):
    """What each backend makes."""
    made = []
    for choice in CHOICES:
        monkeypatch.setattr(backend, "CHOICE", choice)
        made.append(work())
    return made


@once
@with_ifma
@pytest.mark.parametrize("seed", range(4))
def test_a_whole_round_is_the_same_to_the_bit(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    h, d = 4, int(rng.integers(1, 3 * SIZE))
    values = rng.integers(-500, 501, (h, d)) * rng.choice([0, 1], (h, d), p=[0.8, 0.2])
    weights = rng.integers(1, 2 ** int(rng.integers(1, 17)), h).tolist()
    masks = [[rng.bytes(32) for _ in range(h)] for _ in range(2)]
    bound = 500 * sum(weights)

    def work():
        pairs = zip(values, *masks, strict=True)
        ciphertexts = [ndd_fe.encrypt(x, p, a, bound=500, start=7) for x, p, a in pairs]
        key = ndd_fe.derive_key(masks[0], weights, d, start=7)
        sums, _ = ndd_fe.blinded_sum(key, masks[1], ciphertexts, weights, start=7)
        m, rho = ndd_fe.open_sum(key, masks[1], ciphertexts, weights, bound=bound, start=7, table=baby_steps(2**14))
        projected = ndd_fe._project_points(ciphertexts[0], rng_signs)
        return [*ciphertexts, key, sums, m, rho, projected, ndd_fe.weighted_sum(ciphertexts, weights)]

    rng_signs = np.random.default_rng(seed).choice(np.array([-1, 1], np.int8), (3, d))
    ours, theirs = with_both(monkeypatch, work)
    for a, b in zip(ours, theirs, strict=True):
        assert (a == b).all()
    assert (ours[h + 2] == np.array(weights) @ values).all()


@once
@with_ifma
def test_tables_are_the_same_to_the_bit(monkeypatch):
    for build in (lambda: bsgs.BabySteps.build(5000).slots, lambda: bsgs.BabySteps.build(1).slots,
                  lambda: curve.progression(curve.multiply(3**99, GENERATOR), GENERATOR, 9999),
                  lambda: Commitments.build().table):  # fmt: skip
        a, b = with_both(monkeypatch, build)
        assert (a == b).all()


@once
@with_ifma
def test_rows_that_are_no_points_are_seen_in_every_lane_by_both(monkeypatch):
    p_words = [int(limb) for limb in field.limbs(field.P)]
    garbage = [[0] * 8, p_words + p_words, p_words + [0] * 4, [1] + [0] * 7, [2**64 - 1] * 8, [0] * 4 + p_words]
    for m, place, bad in product((1, 7, 8, 9, 25), (0, 6, 7, 8, 24), garbage):
        if place < m:
            points = of(np.arange(1, m + 1))
            points[place] = bad
            assert with_both(monkeypatch, lambda points=points: backend.first_invalid(points)) == [place, place]


def test_coordinates_at_or_above_p_are_no_points():
    """The same point with x + p or y + p, where that fits 256 bits."""
    small = [(x, pow(x**3 + 7, (field.P + 1) // 4, field.P)) for x in range(1, 60)]
    small = [point for point in small if oracle.on_curve(point)]
    for x, y in small:
        points = rows([oracle.G, (x, y), (x, field.P - y)])
        assert backend.first_invalid(points) == -1
        points[2, :4] = field.limbs(x + field.P)
        assert backend.first_invalid(points) == 2
    # y**2 = x**3 + 7 with a small y: x is a cube root, p = 7 mod 9.
    for y in range(1, 60):
        cube = (y * y - 7) % field.P
        x = pow(cube, (field.P + 2) // 9, field.P)
        if pow(x, 3, field.P) == cube:
            points = rows([(x, y)])
            assert backend.first_invalid(points) == -1
            points[0, 4:] = field.limbs(y + field.P)
            assert backend.first_invalid(points) == 0
            return
    raise AssertionError("no small y")


# --- memory ---------------------------------------------------------------------------------------------------------


def misplaced(array):
    """The same array, at eight bytes behind a multiple of 64."""
    room = np.zeros(array.size + 16, array.dtype)
    skip = (-room.ctypes.data // 8 % 8 + 1) % 8
    moved = room[skip : skip + array.size].reshape(array.shape)
    moved[:] = array
    assert moved.ctypes.data % 64 == 8
    return moved


def test_arrays_at_any_multiple_of_eight_bytes_are_added():
    start, added = np.arange(1, 1 + 2 * SIZE), np.arange(5, 5 + 2 * SIZE)
    points, table = misplaced(of(start)), misplaced(of(added))
    table.flags.writeable = False
    backend.add_rows(points, table, misplaced(np.arange(1, 1 + 2 * SIZE).astype(np.int64)).astype(np.int32)[None])
    assert (points == of(start + added)).all()
    total = misplaced(np.zeros_like(points))
    curve.weigh(total, [misplaced(of(start)), table], [2, 1])
    assert (total == of(2 * start + added)).all()
    assert backend.first_invalid(misplaced(of(start))) == -1
    shifted = misplaced(encode_exponents(np.arange(50)))
    assert bsgs.discrete_logs(shifted, 60).tolist() == list(range(50))


# --- threads --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(chosen):
    """Arguments of a round of three miners over more than two chunks."""
    rng = np.random.default_rng(11)
    d = 2 * CHUNK + 1234
    values = rng.integers(-20, 21, (3, d))
    masks = [[rng.bytes(32) for _ in range(3)] for _ in range(2)]
    ciphertexts = [ndd_fe.encrypt(x, p, a, bound=20) for x, p, a in zip(values, *masks, strict=True)]
    return SimpleNamespace(d=d, values=values, masks=masks, ciphertexts=ciphertexts, weights=[3, 1, 2])


def opened(many, threads, **options):
    key = ndd_fe.derive_key(many.masks[0], many.weights, many.d, threads=threads)
    return ndd_fe.open_sum(key, many.masks[1], many.ciphertexts, many.weights, bound=120, threads=threads, **options)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads_gives_the_same(many, threads):
    again = ndd_fe.encrypt(many.values[1], many.masks[0][1], many.masks[1][1], bound=20, threads=threads)
    assert (again == many.ciphertexts[1]).all()
    m, rho = opened(many, threads)
    assert (m == np.array(many.weights) @ many.values).all()
    assert (rho == opened(many, 1)[1]).all()
    m[[5, CHUNK, many.d - 1]] += 1
    failing = ndd_fe.failing_coordinates(many.ciphertexts, many.weights, m, rho, threads=threads)
    assert failing == [5, CHUNK, many.d - 1]


@pytest.mark.parametrize("threads", [1, 3])
def test_progress_never_goes_back(many, threads):
    seen = []
    opened(many, threads, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert len(seen) > 1
    assert seen[-1] == (many.d, many.d)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_an_error_in_a_thread_is_raised(many, threads):
    with pytest.raises(ValueError, match="a mask key has 32 bytes, got 31"):
        ndd_fe.encrypt(many.values[0], bytes(31), bytes(32), bound=20, threads=threads)

    def stop(done, total):
        raise RuntimeError(f"stopped at {done}")

    with pytest.raises(RuntimeError, match="stopped at"):
        opened(many, threads, progress=stop)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_error_in_order_of_chunks_is_raised(threads):
    def work(chunk):
        if chunk.start >= 20:
            raise ValueError(f"chunk {chunk.start}")

    with pytest.raises(ValueError, match="chunk 20"):
        backend.spread(work, 95, 10, threads)


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_do_no_work(many, threads):
    with pytest.raises(ValueError, match=f"threads = {threads}"):
        opened(many, threads)


# --- what the lanes miss is searched again --------------------------------------------------------------------------


def losing(change):
    """The kernels, but for what `change` makes of the answers of their search."""

    def search(slots, giants, stride, points, logs, others, found, *rest):
        IFMA.search(slots, giants, stride, points, logs, others, found, *rest)
        change(logs, others, found)

    return Choice("ifma", "answers are lost", SimpleNamespace(**{**vars(IFMA), "search": search}))


def lose_all(logs, others, found):
    found[:] = 0


def lose_some(logs, others, found):
    found[::3] = 0
    logs[::3] = -12345


def lie_about_some(logs, others, found):
    logs[::4] += 1
    others[::4] -= 1


def exchange_exponents(logs, others, found):
    logs[:], others[:] = others.copy(), logs.copy()


@with_ifma
@pytest.mark.parametrize("change", [lose_all, lose_some, lie_about_some, exchange_exponents])
def test_a_point_that_the_lanes_miss_is_found_all_the_same(change, monkeypatch):
    monkeypatch.setattr(backend, "CHOICE", losing(change))
    exponents = np.random.default_rng(5).integers(-3000, 3001, 5000)
    points = encode_exponents(exponents)
    assert (bsgs.discrete_logs(points, 3000, baby_steps(100)) == exponents).all()
    points[17] = rows([oracle.H])[0]
    with pytest.raises(bsgs.OutOfBound) as caught:
        bsgs.discrete_logs(points, 3000, baby_steps(100))
    assert caught.value.coordinates == [17]


# --- recovery at special points -------------------------------------------------------------------------------------


def halves(exponents):
    """(m - 1/2) G."""
    return ndd_fe.commitments().half_exponents(np.asarray(exponents, np.int64) - 1, 2**50)


@pytest.mark.parametrize("count", [1, 7, 9, 500])
def test_points_equal_to_a_giant_step_do_not_spoil_their_batch(count):
    """g * stride * G among the points, or its opposite: no difference of x to divide by. Its own exponent is no half."""
    table = baby_steps(20)
    exponents = np.resize(np.arange(-900, 901, 7), count)
    points = halves(exponents)
    assert half_logs(points, 1000, table).tolist() == exponents.tolist()
    for multiple_of_stride in (40, -40, 400, 1000):
        for place in {0, count // 2, count - 1}:
            spoiled = points.copy()
            spoiled[place] = encode_exponents(np.array([multiple_of_stride]))[0]
            with pytest.raises(bsgs.OutOfBound) as caught:
                half_logs(spoiled, 1000, table)
            assert caught.value.coordinates == [place]


def test_garbage_among_the_points_is_named_and_harms_no_other():
    exponents = np.arange(-300, 301)
    points = halves(exponents)
    garbage = {3: [0] * 8, 9: [2**64 - 1] * 8, 300: [1] * 8, 600: [0] * 7 + [5]}
    for place, row in garbage.items():
        points[place] = row
    with pytest.raises(bsgs.OutOfBound) as caught:
        half_logs(points, 300, baby_steps(16))
    assert caught.value.coordinates == [3, 9, 300, 600]


@pytest.mark.parametrize(("size", "bound"), [(1, 1), (1, 9), (7, 7), (7, 100), (64, 5000)])
def test_every_half_exponent_within_the_bound_is_found(size, bound):
    exponents = np.arange(-bound, bound + 1)
    table = baby_steps(size)
    assert (half_logs(halves(exponents), bound, table) == exponents).all()
    for beyond in (bound + 1, -bound - 1, bound + 2 * size, -bound - 2 * size):
        with pytest.raises(bsgs.OutOfBound):
            half_logs(halves([beyond]), bound, table)


def test_a_table_may_say_less_than_it_holds():
    """Entries beyond the size that a caller claims: what is found is right all the same."""
    table = replace(baby_steps(10), slots=baby_steps(1000).slots)
    exponents = np.arange(-100, 101)
    assert (half_logs(halves(exponents), 100, table) == exponents).all()
