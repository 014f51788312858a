"""A participant's place in a block: its leaf under the contributions root, and the path to it. PURE.

The same tree as BlockPublisher.contributionsRoot builds on chain: leaves keccak(abi.encode(position, miner, score commit)),
pairs hashed in ascending order, a last node without a partner rises as it is. (OpenZeppelin's MerkleProof checks it.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

from eth_abi.abi import encode
from eth_utils.crypto import keccak

from contracts.messages import Address, Bytes32


@dataclass(frozen=True)
class Place:
    """Index among the participants, the score commitment there, and the proof of both."""

    position: int
    score_commit: Bytes32
    proof: tuple[Bytes32, ...]


@dataclass(frozen=True)
class Opening:
    """A participant's score commitment opened, with its place in the block. salt: 32 bytes."""

    score: int
    salt: bytes
    place: Place


def place(participants: Sequence[Address], score_commits: Sequence[Bytes32], position: int) -> Place:
    """The place at this position. Raises IndexError outside of the participants."""
    nodes = _leaves(participants, score_commits)
    proof, index = [], range(len(nodes))[position]
    while len(nodes) > 1:
        if index ^ 1 < len(nodes):
            proof.append("0x" + nodes[index ^ 1].hex())
        nodes, index = _parents(nodes), index // 2
    return Place(position, score_commits[position], tuple(proof))


def contributions_root(participants: Sequence[Address], score_commits: Sequence[Bytes32]) -> Bytes32:
    """Root over all contributions of a block. Raises ValueError unless there is one commitment per participant."""
    nodes = _leaves(participants, score_commits)
    while len(nodes) > 1:
        nodes = _parents(nodes)
    return "0x" + nodes[0].hex()


def _leaves(participants: Sequence[Address], score_commits: Sequence[Bytes32]) -> list[bytes]:
    pairs = enumerate(zip(participants, score_commits, strict=True))
    types = ["uint256", "address", "bytes32"]
    return [keccak(encode(types, [i, miner, bytes.fromhex(commit[2:])])) for i, (miner, commit) in pairs]


def _parents(nodes: Sequence[bytes]) -> list[bytes]:
    pairs = [sorted(nodes[i : i + 2]) for i in range(0, len(nodes), 2)]
    return [keccak(pair[0] + pair[1]) if len(pair) == 2 else pair[0] for pair in pairs]
