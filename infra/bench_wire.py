"""Points on the wire, 48 bytes each, beside x and y in 64: what coding, hashing and storing take, for `make bench-crypto`.

    48 bytes    `ndd_fe.encode_points`: two points in three elements
    64 bytes    x and y; here only, to be compared with. Checked as strictly: encoding and decoding refuse the same points

Chunks are as large as those that are stored. Everything is seconds a point, one thread; the store is a folder of its own
whose files stay in the page cache, and nothing is synced: neither the disk nor a network is in these figures.
"""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from blocks.artifacts import ArtifactStore
from tasks.crypto import backend, ndd_fe
from tasks.crypto.field import Words

T = TypeVar("T")

CHUNK = 16_384
WRITER, READER = "0x" + "00" * 20, "0x" + "11" * 20  # owners in the store


def encode_plain(points: Words) -> bytes:
    """12 bytes of header, then x and y, little-endian."""
    check(points)
    return b"HCP\x01" + len(points).to_bytes(8, "little") + points.astype("<u8", copy=False).tobytes()


def decode_plain(data: bytes) -> Words:
    points = np.frombuffer(data, "<u8", offset=12).astype(np.uint64).reshape(-1, 8)
    check(points)
    return points


def check(points: Words) -> None:
    """Raises InvalidEncoding."""
    if (index := backend.first_invalid(points)) >= 0:
        raise ndd_fe.InvalidEncoding(f"point {index} is not a reduced point of the curve")


@dataclass(frozen=True)
class Form:
    """A way to write points down, and what a store keeps of them."""

    encode: Callable[[Words], bytes]
    decode: Callable[[bytes], Words]
    store: ArtifactStore


@dataclass(frozen=True)
class Wire:
    """The same points in chunks, in both forms."""

    chunks: list[Words]
    forms: tuple[Form, Form]  # 48 bytes, 64 bytes

    @property
    def count(self) -> int:
        return sum(map(len, self.chunks))

    def works(self) -> dict[str, list[Callable[[], float]]]:
        """What is measured, each for 48 bytes and for 64: seconds a point."""
        steps = {"encode": self._encode, "decode": self._decode, "SHA-256": self._hash, "encode and store": self._put}
        steps |= {"read, hash and decode": self._get}
        return {name: [step(form) for form in self.forms] for name, step in steps.items()}

    def _timed(self, work: Callable[[T], object], items: list[T]) -> float:
        started = time.perf_counter()
        for item in items:
            work(item)
        return (time.perf_counter() - started) / self.count

    def _encode(self, form: Form) -> Callable[[], float]:
        return lambda: self._timed(form.encode, self.chunks)

    def _decode(self, form: Form) -> Callable[[], float]:
        encoded = [form.encode(points) for points in self.chunks]
        for data, points in zip(encoded, self.chunks, strict=True):
            if (form.decode(data) != points).any():
                raise AssertionError("what was decoded are not the points that were encoded")
        return lambda: self._timed(form.decode, encoded)

    def _hash(self, form: Form) -> Callable[[], float]:
        encoded = [form.encode(points) for points in self.chunks]
        return lambda: self._timed(lambda data: hashlib.sha256(data).digest(), encoded)

    def _put(self, form: Form) -> Callable[[], float]:
        def work() -> float:
            spent = self._timed(lambda points: form.store.put(WRITER, form.encode(points), durable=False), self.chunks)
            shutil.rmtree(Path(form.store.root) / WRITER)
            return spent

        return work

    def _get(self, form: Form) -> Callable[[], float]:
        digests = [form.store.put(READER, form.encode(points), durable=False).sha256 for points in self.chunks]
        return lambda: self._timed(lambda digest: form.decode(form.store.get(READER, digest)), digests)


@contextmanager
def wire(count: int) -> Iterator[Wire]:
    """Random ciphertexts of so many coordinates, and a store for each form, which are removed in the end."""
    rng = np.random.default_rng(count)
    points = ndd_fe.encrypt(rng.integers(-2047, 2048, count), rng.bytes(32), rng.bytes(32), bound=2047)
    with tempfile.TemporaryDirectory(prefix="wire-") as folder:
        stores = [ArtifactStore(root=f"{folder}/{name}") for name in ("48", "64")]
        forms = (
            Form(ndd_fe.encode_points, ndd_fe.decode_points, stores[0]),
            Form(encode_plain, decode_plain, stores[1]),
        )
        yield Wire([points[first : first + CHUNK] for first in range(0, count, CHUNK)], forms)
