"""Merkle trees over byte strings, SHA-256, in the shape of RFC 6962.

    leaf        SHA-256(00 || data)
    node        SHA-256(01 || left || right); the last node of an odd level goes up unchanged
    root        SHA-256(02 || count as 8 bytes || top node): a root is for one number of leaves

The first byte keeps leaves, nodes and roots apart, so no node can be passed off as a leaf (second preimage).
"""

from collections.abc import Sequence
from hashlib import sha256


def leaf_hash(data: bytes) -> bytes:
    return sha256(b"\0" + data).digest()


def root(leaf_hashes: Sequence[bytes]) -> bytes:
    """32 bytes that commit to the leaves, their order and their number. Raises ValueError without leaves."""
    return _bind(_levels(leaf_hashes)[-1][0], len(leaf_hashes))


def path(leaf_hashes: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """The siblings of a leaf from the bottom to the top, for `verify`. Raises ValueError for an index outside."""
    if not 0 <= index < len(leaf_hashes):
        raise ValueError(f"no leaf {index} in a tree of {len(leaf_hashes)}")
    siblings = []
    for level in _levels(leaf_hashes)[:-1]:
        if index ^ 1 < len(level):
            siblings.append(level[index ^ 1])
        index //= 2
    return tuple(siblings)


def verify(root: bytes, leaf_hash: bytes, index: int, count: int, path: Sequence[bytes]) -> bool:
    """Whether the root commits to `count` leaves with this one at `index`."""
    if not 0 <= index < count < 2**64 or any(len(item) != 32 for item in (leaf_hash, *path)):
        return False
    node, width, siblings = leaf_hash, count, list(reversed(path))
    while width > 1:
        if index ^ 1 < width:
            if not siblings:
                return False
            sibling = siblings.pop()
            node = _node(sibling, node) if index % 2 else _node(node, sibling)
        index //= 2
        width = (width + 1) // 2
    return not siblings and _bind(node, count) == root


def _levels(leaf_hashes: Sequence[bytes]) -> list[list[bytes]]:
    """All levels, from the leaves to the single top node."""
    if not leaf_hashes or any(len(item) != 32 for item in leaf_hashes):
        raise ValueError(f"expected at least one leaf hash, of 32 bytes each; got {len(leaf_hashes)}")
    levels = [list(leaf_hashes)]
    while len(level := levels[-1]) > 1:
        above = [_node(left, right) for left, right in zip(level[::2], level[1::2], strict=False)]
        levels.append(above + level[len(level) & ~1 :])
    return levels


def _node(left: bytes, right: bytes) -> bytes:
    return sha256(b"\1" + left + right).digest()


def _bind(top: bytes, count: int) -> bytes:
    return sha256(b"\2" + count.to_bytes(8, "big") + top).digest()
