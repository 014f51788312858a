"""One round at the size of a large model, through the disk: what it takes in time, memory and bytes.

Dense random updates instead of learning; everything else is what the steps do, by the very functions they call: homes and
keys, the artifact store, chunks and manifests.

    encrypt       each miner: encrypt and store, durably
    derive key    the publisher: the functional key, sealed chunk by chunk
    audit         publisher and aggregator: the projections of each ciphertext; one thread
    open          the aggregator: open, check and store the opening, group by group
    verify        one voter: the opening against the ciphertexts, all chunks or some

The opened sum is compared with that of the updates. Files are below the folder of `out`, and removed at the end.
"""

import json
import resource
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from blocks.artifacts import ArtifactStore
from blocks.identity import Identity, create_home
from tasks.aggregate import audit_table
from tasks.attest import failing_coordinates
from tasks.chunks import Chunked, Layout, put_manifest
from tasks.contribute import Ciphertext, store_ciphertext
from tasks.crypto import ndd_fe
from tasks.global_model import Opening, opening_size
from tasks.keys import SealedKey, key_context, sealed_size, store_key
from tasks.opening import RoundToOpen, open_chunks

Integers = npt.NDArray[np.int64]
T = TypeVar("T")
C = TypeVar("C", bound=Chunked)

BOUND = 2047  # of a task with 12 bits
WEIGHTS = (16, 11, 7, 5, 3)
PROJECTIONS = 2
SALT = "0x" + "00" * 16
LABEL = ndd_fe.Label(domain=bytes(32), task_id="stream", round_number=1)


class WrongSum(AssertionError):
    """What was opened is not the weighted sum of the updates."""


@dataclass(frozen=True)
class Parties:
    """Who takes part, each with a home of its own, and the masks that they agree on (K_iP and K_iA of each miner)."""

    publisher: Identity
    aggregator: Identity
    miners: tuple[Identity, ...]

    def masks_of(self, miner: Identity) -> tuple[bytes, bytes]:
        """As the miner derives them: for the publisher, for the aggregator."""
        return (
            miner.mask_key(self.publisher.encryption_key, "publisher", LABEL, SALT),
            miner.mask_key(self.aggregator.encryption_key, "aggregator", LABEL, SALT),
        )

    def publisher_masks(self) -> list[bytes]:
        return [self.publisher.mask_key(one.encryption_key, "publisher", LABEL, SALT) for one in self.miners]

    def aggregator_masks(self) -> list[bytes]:
        return [self.aggregator.mask_key(one.encryption_key, "aggregator", LABEL, SALT) for one in self.miners]


@dataclass
class Round:
    """A synthetic round in a folder; its parts are called in the order in which they are written here."""

    folder: Path
    layout: Layout
    parties: Parties
    store: ArtifactStore
    threads: int
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def set_up(cls, folder: Path, layout: Layout, miners: int, threads: int, console: Console) -> "Round":
        names = ("publisher", "aggregator", *(f"miner-{number}" for number in range(1, miners + 1)))
        publisher, aggregator, *others = (create_home(folder / "actors" / name) for name in names)
        store = ArtifactStore(root=str(folder / "store"))
        return cls(folder, layout, Parties(publisher, aggregator, tuple(others)), store, threads, console)

    @property
    def weights(self) -> list[int]:
        return [WEIGHTS[index % len(WEIGHTS)] for index in range(len(self.parties.miners))]

    @property
    def pieces(self) -> list[range]:
        return list(self.layout.pieces(self.layout.chunks))

    def update(self, miner: int, piece: range) -> Integers:
        """One piece of a miner's update, the same whenever it is asked for: |x| <= BOUND."""
        span = self.layout.span(piece)
        rng = np.random.default_rng((miner, span.start))
        values: Integers = rng.integers(-BOUND, BOUND + 1, span.stop - span.start, dtype=np.int64)
        return values

    def encrypt(self) -> list[Ciphertext]:
        return [self._encrypt_one(index, miner) for index, miner in enumerate(self.parties.miners)]

    def _encrypt_one(self, index: int, miner: Identity) -> Ciphertext:
        masks, address = self.parties.masks_of(miner), miner.address

        def work(piece: range) -> list[str]:
            values = self.update(index, piece)
            return store_ciphertext(self.store, address, self.layout, piece, values, masks, bound=BOUND)

        with self._part("encrypt"):
            parts = self._each(work, self.pieces, f"encrypting, miner {index + 1}")
            sha256 = put_manifest(self.store, address, self.layout, [digest for part in parts for digest in part])
        return self._listed(Ciphertext, address, sha256)

    def derive_key(self) -> SealedKey:
        owner, masks = self.parties.publisher.address, self.parties.publisher_masks()
        recipient, context = self.parties.aggregator.encryption_key, key_context("functional key", "stream", 1, "all")

        def work(piece: range) -> list[str]:
            return store_key(self.store, owner, self.layout, piece, masks, self.weights, recipient, context)

        with self._part("derive key"):
            parts = self._each(work, self.pieces, "deriving the functional key")
            sha256 = put_manifest(self.store, owner, self.layout, [digest for part in parts for digest in part])
        return self._listed(SealedKey, owner, sha256)

    def audit(self, ciphertexts: Sequence[Ciphertext]) -> None:
        """Raises OutOfBound for a malformed ciphertext."""
        signs = np.random.default_rng(0).integers(0, 2, (PROJECTIONS, self.layout.coordinates), dtype=np.int8)
        signs *= 2
        signs -= 1
        bound, masks = (
            BOUND * self.layout.coordinates,
            (self.parties.publisher_masks(), self.parties.aggregator_masks()),
        )
        with self._part("audit"):
            table = audit_table(bound, PROJECTIONS * len(ciphertexts))
            for ciphertext, ours, theirs in self._shown(list(zip(ciphertexts, *masks, strict=True)), "auditing"):
                key = ndd_fe.derive_projection_key(ours, signs)
                ndd_fe.open_projection(key, theirs, ciphertext.pieces(lambda _: None), signs, bound=bound, table=table)

    def open(self, ciphertexts: Sequence[Ciphertext], key: SealedKey) -> Opening:
        aggregator = self.parties.aggregator
        sums = RoundToOpen(
            key=key,
            context=key_context("functional key", "stream", 1, "all"),
            me=aggregator,
            ciphertexts=ciphertexts,
            masks=self.parties.aggregator_masks(),
            weights=self.weights,
            bound=BOUND * sum(self.weights),
            wide_bound=BOUND * sum(self.weights),
        )

        def work(group: range) -> list[str]:
            return open_chunks(sums, group, self.store, aggregator.address)

        with self._part("open"):
            parts = self._each(work, self.layout.groups(), "opening the sum")
            digests = [digest for part in parts for digest in part]
            sha256 = put_manifest(self.store, aggregator.address, self.layout, digests)
        return self._listed(Opening, aggregator.address, sha256)

    def verify(self, ciphertexts: Sequence[Ciphertext], opening: Opening, spot_chunks: int | None = None) -> int:
        """Check that many random chunks, or all; how many. Raises WrongSum naming a coordinate."""
        checks = min(spot_chunks or len(self.layout.chunks), len(self.layout.chunks))
        drawn = sorted(secrets.SystemRandom().sample(self.layout.chunks, checks))

        def work(chunks: Sequence[int]) -> list[int]:
            return failing_coordinates(ciphertexts, self.weights, opening, chunks)

        with self._part("verify"):
            failing = self._each(work, list(self.layout.pieces(drawn)), "verifying the opening")
        if first := [coordinate for part in failing for coordinate in part][:1]:
            raise WrongSum(f"the opening does not hold at coordinate {first[0]}")
        return checks

    def compare(self, opening: Opening) -> None:
        """Raises WrongSum where the opened sum is not that of the updates. Not part of a round, so it is not timed."""

        def work(piece: range) -> Integers:
            sums = sum(weight * self.update(index, piece) for index, weight in enumerate(self.weights))
            wrong: Integers = self.layout.span(piece).start + np.flatnonzero(opening.opened(piece)[0] != sums)
            return wrong

        for wrong in self._each(work, self.pieces, "comparing with the updates"):
            if len(wrong):
                raise WrongSum(f"coordinate {wrong[0]} was opened to another number than the sum of the updates")

    def stored_bytes(self) -> int:
        return sum(path.stat().st_size for path in Path(self.store.root).rglob("*") if path.is_file())

    def _listed(self, kind: type[C], owner: str, sha256: str) -> C:
        size, coordinates = self.layout.size, self.layout.coordinates
        return kind.listed(self.store, owner, sha256, size=size, at_most=coordinates)

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def _each(self, work: Callable[[Any], T], parts: list[Any], what: str) -> list[T]:
        """Do each part on a thread of the pool; what they return, in order."""
        with ThreadPoolExecutor(self.threads) as pool:
            return list(self._shown(pool.map(work, parts), what, len(parts)))

    def _shown(self, parts: Any, what: str, total: int | None = None) -> Any:
        return track(parts, what, total=total, console=self.console)


def run(
    out: Path,
    console: Console,
    dimension: int = 25_000_000,
    miners: int = 5,
    threads: int = 2,
    chunk_coordinates: int = 16_384,
    spot_chunks: int | None = None,
) -> dict[str, Any]:
    """Measure, write `out`. spot_chunks: how many the voter checks, all by default. Raises ValueError for too small a disk."""
    layout = Layout(dimension, chunk_coordinates)
    out.parent.mkdir(parents=True, exist_ok=True)
    check_space(out.parent, layout, miners)
    imported_bytes = peak_memory_bytes()
    with tempfile.TemporaryDirectory(prefix="stream-", dir=out.parent) as folder:
        work = Round.set_up(Path(folder), layout, miners, threads, console)
        ciphertexts = work.encrypt()
        key = work.derive_key()
        work.audit(ciphertexts)
        opening = work.open(ciphertexts, key)
        checked = work.verify(ciphertexts, opening, spot_chunks)
        # Before the comparison, which makes the updates again.
        peak_bytes = peak_memory_bytes()
        work.compare(opening)
        stored = work.stored_bytes()
    result = {
        "dimension": dimension,
        "miners": miners,
        "threads": threads,
        "chunk_coordinates": chunk_coordinates,
        "verified_chunks": checked,
        "seconds": {name: round(seconds, 2) for name, seconds in work.seconds.items()},
        "imported_memory_bytes": imported_bytes,
        "peak_memory_bytes": peak_bytes,
        "stored_bytes": stored,
        "bytes_per_parameter": round(stored / dimension, 2),
    }
    out.write_text(json.dumps(result, indent=1))
    return result


def peak_memory_bytes() -> int:
    """The most memory that this process has had, its libraries included."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def check_space(folder: Path, layout: Layout, miners: int) -> None:
    """Raise ValueError unless the round's files fit on the disk, with a tenth to spare."""
    a_chunk = miners * ndd_fe.encoded_size(layout.size) + sealed_size(layout.size) + opening_size(layout.size)
    needed, free = int(1.1 * a_chunk * len(layout.chunks)), shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"dimension = {layout.coordinates} with {miners} miners needs {needed / 1e9:.1f} GB in {folder}, "
            f"{free / 1e9:.1f} GB are free: lower it, or write elsewhere"
        )
