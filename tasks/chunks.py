"""Artifacts of one entry a coordinate, in chunks: ciphertext, sealed functional key and opening are stored and read alike.

    coordinates   k of a round, cut into chunks of `voting.chunk_coordinates`; the last one may be shorter
    chunk         one blob
    manifest      one blob that lists the SHA-256 digests of all chunks in order; signed records name it by its digest
    piece         consecutive chunks that are worked on at once, about PIECE_COORDINATES in all
    group         consecutive chunks that are one Prefect task, about GROUP_COORDINATES in all, gone through in pieces

A party holds the pieces that its threads are at, at any number of coordinates: PIECE_COORDINATES points of 64 bytes are
1 MiB a thread and a miner, twice that while chunks are joined; a chunk above that size counts as a piece. Besides, 32
bytes a chunk of each manifest in use, and some 200 bytes a chunk of the one that is being made or checked.

Encodings begin with a header, a magic of three letters and a version, then counts; integers are little-endian:

    HCM1   manifest: coordinates (8 bytes), coordinates of a chunk (8), SHA-256 digests (32 each)

Errors: BadRecord, which names the chunk, what it is a chunk of, and whose.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import numpy.typing as npt

from blocks.artifacts import ArtifactStore, MissingArtifact
from contracts.messages import Address, Bytes32
from tasks.crypto import merkle
from tasks.records import BadRecord

# Kernels are efficient from some 4096 coordinates on. A group is at least a second's work for a Prefect task, which costs
# some 25 ms of its own.
PIECE_COORDINATES = 16_384
GROUP_COORDINATES = 262_144

MANIFEST_MAGIC = b"HCM1"
DIGEST_BYTES = 32

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """How coordinates are cut into chunks of `size`, the last one shorter. Both are 1 or more."""

    coordinates: int
    size: int

    @property
    def chunks(self) -> range:
        return range(-(-self.coordinates // self.size))

    def span(self, chunks: range) -> slice:
        """The coordinates of consecutive chunks."""
        return slice(chunks.start * self.size, min(chunks.stop * self.size, self.coordinates))

    def length(self, index: int) -> int:
        """The number of coordinates in one chunk."""
        return min(self.size, self.coordinates - index * self.size)

    def cut(self, rows: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """The rows of consecutive chunks, chunk by chunk."""
        return [rows[first : first + self.size] for first in range(0, len(rows), self.size)]

    def pieces(self, chunks: Sequence[int]) -> Iterator[Any]:
        """The chunks, in order, as many at a time as are worked on at once; a range gives ranges."""
        return _batches(chunks, max(1, PIECE_COORDINATES // self.size))

    def groups(self) -> list[range]:
        return list(_batches(self.chunks, max(1, GROUP_COORDINATES // self.size)))


@dataclass(frozen=True, eq=False)
class Chunked:
    """An artifact as its manifest lists it. Every chunk that is read is checked; none is kept."""

    WHAT: ClassVar[str]

    store: ArtifactStore
    owner: Address
    sha256: Bytes32  # of the manifest
    layout: Layout
    digests: bytes  # 32 bytes a chunk

    @classmethod
    def listed(cls, store: ArtifactStore, owner: Address, sha256: Bytes32, *, size: int, at_most: int) -> Self:
        """The artifact whose manifest has this digest: at most `at_most` coordinates in chunks of `size`."""
        largest = len(encode_manifest(Layout(at_most, size), [])) + DIGEST_BYTES * len(Layout(at_most, size).chunks)
        try:
            layout, digests = decode_manifest(store.get(owner, sha256, max_bytes=largest))
        except (MissingArtifact, ValueError) as error:
            raise BadRecord(f"manifest of the {cls.WHAT} of {owner}: {error}") from error
        if layout.size != size or layout.coordinates > at_most:
            raise BadRecord(
                f"manifest of the {cls.WHAT} of {owner}: {layout.coordinates} coordinates in chunks of {layout.size}, "
                f"expected at most {at_most} in chunks of {size}"
            )
        return cls(store, owner, sha256, layout, digests)

    def digest(self, index: int) -> Bytes32:
        return "0x" + self.digests[DIGEST_BYTES * index : DIGEST_BYTES * (index + 1)].hex()

    def root(self) -> Bytes32:
        """Merkle root over the chunks' digests."""
        return chunk_root([self.digest(index) for index in self.layout.chunks])

    def read(self, index: int, max_bytes: int, decode: Callable[[bytes], T]) -> T:
        """One chunk, decoded. Raises BadRecord when it is missing, changed, or not what `decode` takes."""
        try:
            return decode(self.store.get(self.owner, self.digest(index), max_bytes=max_bytes))
        except (MissingArtifact, ValueError) as error:
            raise BadRecord(f"chunk {index} of the {self.WHAT} of {self.owner}: {error}") from error


def put_manifest(store: ArtifactStore, owner: Address, layout: Layout, digests: Sequence[Bytes32]) -> Bytes32:
    """Store the list of an artifact's chunks, after which they and it survive a power cut. Returns its digest."""
    store.sync()
    return store.put(owner, encode_manifest(layout, digests)).sha256


def put_chunks(store: ArtifactStore, owner: Address, chunks: Iterable[bytes]) -> list[Bytes32]:
    """Store chunks; their digests. They survive a power cut from the next `sync` on, so that many share one."""
    return [store.put(owner, chunk, durable=False).sha256 for chunk in chunks]


def chunk_root(digests: Sequence[Bytes32]) -> Bytes32:
    """Merkle root over the SHA-256 digests of chunks; who made them signs it."""
    return "0x" + merkle.root([merkle.leaf_hash(bytes.fromhex(digest[2:])) for digest in digests]).hex()


def encode_manifest(layout: Layout, digests: Sequence[Bytes32]) -> bytes:
    front = MANIFEST_MAGIC + layout.coordinates.to_bytes(8, "little") + layout.size.to_bytes(8, "little")
    return front + b"".join(bytes.fromhex(digest[2:]) for digest in digests)


def decode_manifest(data: bytes) -> tuple[Layout, bytes]:
    """The layout, and 32 bytes of digest a chunk. Raises ValueError for what `encode_manifest` does not produce."""
    if data[:4] != MANIFEST_MAGIC or len(data) < 20:
        raise ValueError(f"{len(data)} bytes beginning {data[:4]!r} are no manifest: it begins {MANIFEST_MAGIC!r}")
    coordinates, size = int.from_bytes(data[4:12], "little"), int.from_bytes(data[12:20], "little")
    if coordinates < 1 or size < 1:
        raise ValueError(f"{coordinates} coordinates in chunks of {size}: both are 1 or more")
    layout, digests = Layout(coordinates, size), data[20:]
    if len(digests) != DIGEST_BYTES * len(layout.chunks):
        raise ValueError(f"{len(digests)} bytes of digests for {len(layout.chunks)} chunks: 32 bytes a chunk")
    return layout, digests


def encode_header(magic: bytes, count: int) -> bytes:
    """Magic with version, and how many entries follow: 12 bytes."""
    return magic + count.to_bytes(8, "little")


def check_header(data: bytes, magic: bytes, count: int, entry_bytes: int) -> bytes:
    """What follows the header. Raises ValueError unless that is `count` entries of this kind and version."""
    if data[: len(magic)] != magic:
        raise ValueError(f"it begins {data[:4]!r}, expected {magic!r}")
    announced = int.from_bytes(data[4:12], "little")
    if announced != count or len(data) != 12 + entry_bytes * count:
        raise ValueError(
            f"{len(data)} bytes that announce {announced} entries, expected {count} of {entry_bytes} bytes"
        )
    return data[12:]


def joined(rows: Iterable[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Rows of one chunk after another, as one array."""
    parts = list(rows)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _batches(chunks: Sequence[int], count: int) -> Iterator[Any]:
    return (chunks[first : first + count] for first in range(0, len(chunks), count))
