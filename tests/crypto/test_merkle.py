"""Merkle trees: every leaf is proved, nothing else is."""

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.crypto import merkle


def leaves(count):
    return [merkle.leaf_hash(i.to_bytes(4, "big")) for i in range(count)]


def split_root(hashes):
    """RFC 6962, section 2.1, by its recursion over the largest power of two below the size."""
    if len(hashes) == 1:
        return hashes[0]
    half = 1 << (len(hashes) - 1).bit_length() - 1
    return sha256(b"\1" + split_root(hashes[:half]) + split_root(hashes[half:])).digest()


@pytest.mark.parametrize("count", [*range(1, 34), 100, 255, 256, 257])
def test_every_leaf_is_proved_and_in_its_place_only(count):
    hashes = leaves(count)
    top = merkle.root(hashes)
    assert top == sha256(b"\2" + count.to_bytes(8, "big") + split_root(hashes)).digest()
    for index in range(count):
        path = merkle.path(hashes, index)
        assert merkle.verify(top, hashes[index], index, count, path)
        assert not merkle.verify(top, hashes[index], (index + 1) % count, count, path) or count == 1
        for other in (count - 1, count + 1, 2 * count):
            assert not merkle.verify(top, hashes[index], index, other, path)
        assert not merkle.verify(top, hashes[index], index, count, (*path, bytes(32)))
        assert not path or not merkle.verify(top, hashes[index], index, count, path[:-1])


@given(st.integers(1, 40), st.data())
def test_a_changed_bit_anywhere_is_refused(count, data):
    hashes = leaves(count)
    index = data.draw(st.integers(0, count - 1))
    path = merkle.path(hashes, index)
    parts = [merkle.root(hashes), hashes[index], *path]
    assert merkle.verify(parts[0], parts[1], index, count, parts[2:])
    which, bit = data.draw(st.integers(0, len(parts) - 1)), data.draw(st.integers(0, 255))
    changed = (int.from_bytes(parts[which], "big") ^ 1 << bit).to_bytes(32, "big")
    parts[which] = changed
    assert not merkle.verify(parts[0], parts[1], index, count, parts[2:])


@given(
    st.lists(st.binary(max_size=4), min_size=1, max_size=20), st.lists(st.binary(max_size=4), min_size=1, max_size=20)
)
def test_different_leaves_have_different_roots(a, b):
    equal = merkle.root([merkle.leaf_hash(x) for x in a]) == merkle.root([merkle.leaf_hash(x) for x in b])
    assert equal == (a == b)


def test_a_node_does_not_pass_for_a_leaf():
    hashes = leaves(4)
    pair = sha256(b"\1" + hashes[0] + hashes[1]).digest()
    other = sha256(b"\1" + hashes[2] + hashes[3]).digest()
    top = merkle.root(hashes)
    assert merkle.root([pair, other]) != top, "the number of leaves is part of the root"
    assert not merkle.verify(top, pair, 0, 2, (other,))
    assert merkle.leaf_hash(hashes[0] + hashes[1]) != pair, "the data of a leaf cannot be made to hash like a node"


def test_doubling_the_last_leaf_changes_the_root():
    hashes = leaves(3)
    assert merkle.root(hashes) != merkle.root([*hashes, hashes[2]])


@pytest.mark.parametrize(("index", "count"), [(-1, 4), (4, 4), (0, 0)])
def test_indices_outside_are_refused(index, count):
    hashes = leaves(4)
    assert not merkle.verify(merkle.root(hashes), hashes[0], index, count, merkle.path(hashes, 0))
    with pytest.raises(ValueError, match="no leaf"):
        merkle.path(hashes[:count], index)


def test_hashes_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="leaf hash"):
        merkle.root([])
    with pytest.raises(ValueError, match="leaf hash"):
        merkle.root([b"short"])
    hashes = leaves(2)
    assert not merkle.verify(merkle.root(hashes), hashes[0], 0, 2, (hashes[1][:-1],))


def test_a_hundred_thousand_leaves():
    hashes = leaves(100_000)
    top = merkle.root(hashes)
    assert merkle.verify(top, hashes[99_999], 99_999, 100_000, merkle.path(hashes, 99_999))
