"""The fuzzer: an honest run passes, and a single wrong bit anywhere is found and named."""

import json
import sys
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from infra import fuzz
from infra.fuzz import Mismatch, Peer, Round
from tasks.crypto import backend, curve, ndd_fe

PLACE = 701


@pytest.fixture
def screen():
    return Console(file=StringIO(), width=200)


def test_an_honest_run_counts_what_it_did(screen):
    before = backend.CHOICE
    result = fuzz.run(20_000, 7, screen)
    assert result["coordinates"] >= 20_000
    assert result["ciphertexts"] >= result["coordinates"]
    assert result["backends"] == [choice.name for choice in fuzz.available()]
    assert result["missed_at_most"] == 2**-32
    assert json.loads(json.dumps(result)) == result
    assert "seed 7" in screen.file.getvalue()
    assert backend.CHOICE is before


def test_rounds_are_all_of_the_seed():
    one, same, other = (Round.of(np.random.default_rng([seed, 3]), 10**6) for seed in (1, 1, 2))
    assert (one.values == same.values).all()
    assert (one.weights, one.publisher_masks, one.start) == (same.weights, same.publisher_masks, same.start)
    assert one.publisher_masks != other.publisher_masks


@pytest.fixture(scope="module")
def round_():
    """Some 2000 coordinates of two miners."""
    for seed in range(1000):
        found = Round.of(np.random.default_rng(seed), 2000)
        if len(found.values) == 2 and found.length == 2000:
            return found
    raise AssertionError("no such round")


@pytest.fixture
def result(round_):
    return fuzz.work(round_)


def corrupt_one_bit(rows):
    rows[PLACE, 3] ^= np.uint64(1 << 17)


def exchange(rows):
    """What belongs to the next coordinate: points of the curve, scalars below n."""
    rows[PLACE] = rows[PLACE + 1]


def exchange_many(rows):
    rows[PLACE:] = rows[: len(rows) - PLACE].copy()


def erase(rows):
    rows[PLACE] = 0


ARRAYS = ["ciphertext 0", "ciphertext 1", "weighted sum", "functional key", "blinding"]


def test_an_honest_round_agrees_with_the_peer(round_, result):
    assert set(result) == {*ARRAYS, "recovered sum"}
    fuzz.compare_with_peer(round_, result, Peer())


@pytest.mark.parametrize("damage", [corrupt_one_bit, exchange, exchange_many, erase])
@pytest.mark.parametrize("name", ARRAYS)
def test_a_wrong_coordinate_is_found_and_named(round_, result, name, damage):
    damage(result[name])
    with pytest.raises(Mismatch, match=f"{name} is wrong, first at coordinate {PLACE}"):
        fuzz.compare_with_peer(round_, result, Peer())


@pytest.mark.parametrize("name", ["functional key", "blinding"])
def test_a_scalar_that_is_not_below_the_order_is_found(round_, result, name):
    result[name][PLACE] = np.array([2**64 - 1] * 4, np.uint64)
    with pytest.raises(Mismatch, match=f"{name} is wrong, first at coordinate {PLACE}"):
        fuzz.compare_with_peer(round_, result, Peer())


def test_a_wrong_sum_is_found(round_, result):
    result["recovered sum"][PLACE] += 1
    with pytest.raises(Mismatch, match=f"recovered sum is wrong, first at coordinate {PLACE}"):
        fuzz.compare_with_peer(round_, result, Peer())


def test_backends_that_differ_in_one_bit_are_found(result):
    other = {name: array.copy() for name, array in result.items()}
    corrupt_one_bit(other["blinding"])
    with pytest.raises(Mismatch, match=f"blinding is wrong, first at coordinate {PLACE}"):
        fuzz.expect_same("blinding", other["blinding"], result["blinding"])


def test_a_point_that_comes_back_as_another_is_found(result, monkeypatch):
    honest = ndd_fe.decode_points

    def lying(data):
        points = honest(data)
        corrupt_one_bit(points)
        return points

    ciphertexts = [result[name] for name in result if name.startswith("ciphertext")]
    fuzz.compare_decoded(ciphertexts)
    monkeypatch.setattr(ndd_fe, "decode_points", lying)
    with pytest.raises(Mismatch, match=f"ciphertext 0 from its encoding is wrong, first at coordinate {PLACE}"):
        fuzz.compare_decoded(ciphertexts)


def test_the_peer_is_right_about_small_multiples():
    peer, rows = Peer(), curve.multiples(curve.GENERATOR, 300)
    assert [peer.commitment(x, 0) for x in range(1, 301)] == [row.tobytes() for row in rows]
    assert peer.commitment(0, 0) is None
    assert peer.commitment(0, 5) == curve.array_of([curve.multiply(5, ndd_fe.H)]).tobytes()
    c = np.arange(300).astype(np.uint8)
    assert peer.combination(rows, c) == peer.commitment(int(c.astype(int) @ np.arange(1, 301)), 0)
    assert peer.combination(rows, np.zeros(300, np.uint8)) is None


def test_a_lie_of_every_backend_ends_the_run_with_its_seed(screen, monkeypatch):
    """All of one mind, and verification too: only the peer can know better."""
    honest = ndd_fe.derive_key

    def lying(*arguments, **options):
        key = honest(*arguments, **options)
        key[-1] = key[0]
        return key

    monkeypatch.setattr(ndd_fe, "derive_key", lying)
    with pytest.raises(SystemExit) as caught:
        fuzz.run(5000, 12, screen)
    assert caught.value.code == 1
    assert "seed 12, round 0: recovery is wrong, first at coordinate" in screen.file.getvalue()


def test_without_coincurve_it_says_what_is_missing(screen, monkeypatch):
    monkeypatch.setitem(sys.modules, "coincurve", None)
    with pytest.raises(ValueError, match=r"coincurve: pip install -e '\.\[dev\]'"):
        fuzz.run(10, 1, screen)
