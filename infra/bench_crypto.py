"""The cost of the cryptography beside its peers: `make bench-crypto`. Measured in one run, never asserted by a test.

    row       a figure, its unit, its goal, and the figure of a peer that does the same work
    goal      ">= 3.3" or "<= 50" of the figure itself, "ratio >= 1" of the ratio to the peer
    ratio     how many times better we are: more is better for M/s and x, less for every other unit
    M/s, ns   million coordinates a second, nanoseconds a coordinate; one thread where the name does not say more
    peer      somebody else's program, in `infra/peers`, in an environment of its own that the product never sees

Ours and theirs alternate (A B A B) in the same minutes; figures are medians. Peers get fewer coordinates where they are
slow; what each one does is written at its functions. Every sum that is timed is checked, ours and theirs.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numba
import numpy as np
import numpy.typing as npt
from rich.console import Console

from infra import bench_kernels as kernels
from infra import bench_wire
from infra.bench import machine
from infra.rows import Row, markdown, marked, refreshed, show
from tasks.crypto import backend, bsgs, ecies, ndd_fe, pedersen

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
T = TypeVar("T")

PEERS = Path(__file__).with_name("peers")
BOUND = 2047  # a coordinate of 12 bits, as in the ready tasks
BLOCK = 65_536  # coordinates of all miners held at a time: 50 miners take 0.5 GB, encoded and decoded
LABEL = ndd_fe.Label(bytes(32), "bench", 1)
START = marked("bench-crypto")


# --- peers ----------------------------------------------------------------------------------------------------------


class PeerFailed(RuntimeError):
    """A peer could not be installed, or its program ended; the message says what it printed last."""


def peers_python(folder: Path, console: Console) -> Path:
    """The interpreter of the peers' environment in `folder`, made at first use and when the requirements change."""
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    requirements = PEERS / "requirements.txt"
    if installed.exists() and installed.read_text() == requirements.read_text():
        return python
    console.print(f"installing the peers in {folder}: about 100 MB are downloaded once")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    command = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-r", str(requirements)]
    if subprocess.run(command).returncode:
        raise PeerFailed(f"pip could not install {requirements} in {folder}: is a package index reachable?")
    installed.write_text(requirements.read_text())
    return python


class Peer:
    """A peer's program, kept running: one JSON object a line asks, one line answers (see `infra/peers/answering.py`)."""

    def __init__(self, python: Path, program: str) -> None:
        self.program = program
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 closed in __exit__
        # One thread, whatever numerical library a peer brings.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [str(python), str(PEERS / f"{program}.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # ends with its stdin
        self._errors.close()

    def ask(self, job: str, **request: Any) -> dict[str, Any]:
        """The answer to one job. Raises PeerFailed when the program ends instead."""
        pipes = self._process
        assert pipes.stdin is not None
        assert pipes.stdout is not None
        try:
            pipes.stdin.write(json.dumps({"job": job, **request}) + "\n")
            pipes.stdin.flush()
            line = pipes.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._errors.seek(0)
            raise PeerFailed(f"{self.program}.py ended at {job} {request}: {self._errors.read()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def timed(self, job: str, count: int, **request: Any) -> Callable[[], float]:
        """Work for `alternate`: seconds a coordinate of a job over `count` of them."""
        return lambda: float(self.ask(job, count=count, **request)["seconds"]) / count


# --- the clock ------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def each(coordinates: int, work: Callable[[], Any]) -> Callable[[], float]:
    """Work for `alternate`: seconds a coordinate."""
    return lambda: seconds(work) / coordinates


def alternate(repeats: int, *works: Callable[[], float]) -> list[float]:
    """Median seconds of each work, taken in turns (A B A B); a first turn warms up and is not counted."""
    turns = [[work() for work in works] for _ in range(repeats + 1)][1:]
    return [statistics.median(spent) for spent in zip(*turns, strict=True)]


def rate(seconds_each: float) -> float:
    """Million coordinates a second."""
    return 1e-6 / seconds_each


def spread(threads: int) -> dict[str, Any]:
    """The keywords that have a function of `ndd_fe` or `bsgs` work in so many threads."""
    return {"threads": threads}


# --- one core -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """How much is measured: coordinates and repeats of the rows of one core, and the shapes of whole aggregations."""

    coordinates: int
    repeats: int
    aggregations: tuple["Shape", ...]


@dataclass(frozen=True)
class Cohort:
    """Submissions of n miners for d coordinates, their sum opened. The table of baby steps is kept with them."""

    weights: Sequence[int]
    values: Sequence[Integers]
    publisher_masks: Sequence[bytes]
    aggregator_masks: Sequence[bytes]
    ciphertexts: Sequence[Words]
    key: Words
    m: Integers
    rho: Words
    table: bsgs.BabySteps

    @property
    def coordinates(self) -> int:
        return len(self.m)

    @property
    def bound(self) -> int:
        return largest_sum(self.weights)

    def open(self, threads: int = 1) -> None:
        m, _ = ndd_fe.open_sum(
            self.key,
            self.aggregator_masks,
            self.ciphertexts,
            self.weights,
            bound=self.bound,
            table=self.table,
            **spread(threads),
        )
        self.compare(m)

    def verify(self, threads: int = 1) -> None:
        if ndd_fe.failing_coordinates(self.ciphertexts, self.weights, self.m, self.rho, **spread(threads)):
            raise AssertionError("an honest opening does not hold")

    def derive_key(self) -> Words:
        return ndd_fe.derive_key(self.publisher_masks, self.weights, self.coordinates, **spread(1))

    def aggregate(self) -> None:
        ndd_fe.blinded_sum(self.key, self.aggregator_masks, self.ciphertexts, self.weights, **spread(1))

    def compare(self, m: Integers) -> None:
        if (m != self.m).any():
            raise AssertionError("what was recovered is not the sum of the values")


def largest_sum(weights: Sequence[int]) -> int:
    return BOUND * sum(weights)


def cohort(weights: Sequence[int], coordinates: int) -> Cohort:
    rng = np.random.default_rng(len(weights))
    masks = [(rng.bytes(32), rng.bytes(32)) for _ in weights]
    values = [uniform(rng, BOUND, coordinates) for _ in weights]
    ciphertexts = [
        ndd_fe.encrypt(row, *pair, bound=BOUND, **spread(1)) for row, pair in zip(values, masks, strict=True)
    ]
    publisher, aggregator = zip(*masks, strict=True)
    return summed(weights, values, publisher, aggregator, ciphertexts)


def summed(
    weights: Sequence[int],
    values: Sequence[Integers],
    publisher_masks: Sequence[bytes],
    aggregator_masks: Sequence[bytes],
    ciphertexts: Sequence[Words],
) -> Cohort:
    """The cohort with the key, the opening and the table for these weights."""
    key = ndd_fe.derive_key(publisher_masks, weights, len(values[0]), **spread(1))
    rho = ndd_fe.blinding(key, aggregator_masks, weights)
    m = np.asarray(weights, np.int64) @ np.stack(values)
    table = bsgs.baby_steps(bsgs.default_size(largest_sum(weights)))
    return Cohort(weights, values, publisher_masks, aggregator_masks, ciphertexts, key, m, rho, table)


def uniform(rng: np.random.Generator, bound: int, count: int) -> Integers:
    return rng.integers(-bound, bound + 1, count)


def encrypt_works(coordinates: int, *threads: int) -> list[Callable[[], float]]:
    """Encrypting everything included, keystreams too, in so many threads."""
    rng = np.random.default_rng(0)
    values, masks = uniform(rng, BOUND, coordinates), (rng.bytes(32), rng.bytes(32))

    def work(count: int) -> Callable[[], float]:
        return each(coordinates, lambda: ndd_fe.encrypt(values, *masks, bound=BOUND, **spread(count)))

    return [work(count) for count in threads]


def field_rows(sizes: Sizes, curves: Peer) -> list[Row]:
    """One multiplication and one addition; the multiplication where it is IFMA's."""
    rows = []
    if backend.CHOICE.name == "ifma":
        own, cycle = alternate(sizes.repeats, kernels.multiplication(), kernels.cycle)
        limit = kernels.MULTIPLICATION_IFMA / 2 * cycle / 8
        name = f"port limit at the measured {1e-9 / cycle:.2f} GHz"
        rows.append(Row("field multiplication, IFMA", own * 1e9, "ns", "<= 1.2", name, limit * 1e9))
    small, large, peer = alternate(
        sizes.repeats,
        kernels.additions(kernels.SMALL),
        kernels.additions(kernels.LARGE),
        curves.timed("combine", 10, points=1000),
    )
    return [
        *rows,
        Row("addition of a point, table of 1 MiB", small * 1e9, "ns", "<= 11", "libsecp256k1 combine", peer * 1e6),
        Row("addition of a point, table of 32 MiB", large * 1e9, "ns", "<= 13", "libsecp256k1 combine", peer * 1e6),
    ]


def part_rows(sizes: Sizes) -> list[Row]:
    """Where the time of encryption goes."""
    parts = [kernels.encryption_parts() for _ in range(sizes.repeats)]
    return [
        Row(f"encrypt, of it {name}", 1e9 * statistics.median(part[name] for part in parts), "ns") for name in parts[0]
    ]


def encrypt_rows(sizes: Sizes, curves: Peer) -> list[Row]:
    own, fast, fastest, python = alternate(
        sizes.repeats,
        *encrypt_works(sizes.coordinates, 1),
        curves.timed("encrypt", 1000, bound=BOUND),
        curves.timed("encrypt_tables", 1000, bound=BOUND),
        curves.timed("encrypt_python", 100, bound=BOUND),
    )
    portable = portable_seconds(sizes)
    return [
        Row("encrypt", rate(own), "M/s", ">= 3.3"),
        Row("encrypt", rate(own), "M/s", "ratio >= 100", "libsecp256k1", rate(fast)),
        Row("encrypt", rate(own), "M/s", None, "libsecp256k1, bases swapped, table of x·H", rate(fastest)),
        Row("encrypt", rate(own), "M/s", None, "python-ecdsa with gmpy2", rate(python)),
        Row("encrypt, portable path", rate(portable), "M/s", ">= 0.3", "this processor's best path", rate(own)),
    ]


def portable_seconds(sizes: Sizes) -> float:
    """Encrypting in a process of its own: the path is chosen when tasks.crypto is first imported."""
    measured = f"bench.alternate({sizes.repeats}, *bench.encrypt_works({sizes.coordinates}, 1))[0]"
    program = f"from infra import bench_crypto as bench; print({measured})"
    environment = os.environ | {"HEALCHAIN_CURVE": "portable"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return float(done.stdout)


def sum_rows(sizes: Sizes, curves: Peer) -> list[Row]:
    """Aggregate, verify, derive, and two threads."""
    few, many = cohort([1] * 5, sizes.coordinates), cohort([1] * 50, sizes.coordinates)
    uneven = distinct_weights(many)
    times = alternate(
        sizes.repeats,
        each(few.coordinates, few.aggregate),
        curves.timed("aggregate", 200, miners=5),
        each(many.coordinates, many.aggregate),
        curves.timed("aggregate", 200, miners=50),
        each(uneven.coordinates, uneven.aggregate),
        each(many.coordinates, many.verify),
        each(many.coordinates, many.derive_key),
        each(many.coordinates, many.open),
        each(many.coordinates, lambda: many.open(2)),
        each(many.coordinates, lambda: many.verify(2)),
        *encrypt_works(sizes.coordinates, 1, 2),
    )
    few_own, few_peer, many_own, many_peer, uneven_own = times[:5]
    verifying, deriving, opening, open_twice, verify_twice, encrypting, encrypt_twice = times[5:]
    unit = rate(many_own)
    peer = "libsecp256k1"
    return [
        Row("aggregate, 5 miners", rate(few_own), "M/s", ">= 2.5", peer, rate(few_peer)),
        Row("aggregate, 50 miners", unit, "M/s", ">= 0.6", peer, rate(many_peer)),
        Row(
            "aggregate, 50 miners, weights of 16 bits",
            rate(uneven_own),
            "M/s",
            None,
            "50 miners, weights 1",
            unit,
        ),
        Row("verify an opening, 50 miners", rate(verifying), "M/s", ">= 0.6"),
        Row("derive the functional key, 50 miners", rate(deriving), "M/s", ">= 1"),
        Row("encrypt, two threads over one", encrypting / encrypt_twice, "x", ">= 1.8"),
        Row("open the sum, 50 miners, two threads over one", opening / open_twice, "x", ">= 1.8"),
        Row("verify, 50 miners, two threads over one", verifying / verify_twice, "x", ">= 1.8"),
    ]


def distinct_weights(equal: Cohort) -> Cohort:
    """The same ciphertexts with a different weight of 16 bits each."""
    weights = np.random.default_rng(16).choice(np.arange(2**15, 2**16), len(equal.weights), replace=False).tolist()
    return summed(weights, equal.values, equal.publisher_masks, equal.aggregator_masks, equal.ciphertexts)


# Bits of the bound, the goal in ns, and the peer's coordinates.
RECOVERIES = ((20, 50, 10_000), (24, 150, 2000), (28, 250, 200), (32, 2500, 10))


def recover_rows(sizes: Sizes, curves: Peer) -> list[Row]:
    """Uniform exponents, which are the hardest: sign and check of each included, the table made before."""
    rows, size = [], 2**19
    for bits, goal, count in RECOVERIES:
        values = uniform(np.random.default_rng(bits), 2**bits, sizes.coordinates)
        own, peer = alternate(
            sizes.repeats,
            recovery(values, 2**bits),
            curves.timed("recover", count, bound=2**bits, size=size),
        )
        beside = "Python dictionary of 2^19 steps, libsecp256k1"
        rows.append(Row(f"recover, bound 2^{bits}", own * 1e9, "ns", f"<= {goal}", beside, peer * 1e9))
    return rows


def recovery(values: Integers, bound: int) -> Callable[[], float]:
    """Recovery as decryption does it, with the table that a million coordinates are worth."""
    points = pedersen.commitments().half_exponents(values - 1, bound + 1)
    table = bsgs.baby_steps(bsgs.default_size(bound, 10**6))

    def work() -> None:
        if (bsgs.half_logs(points, bound, table, **spread(1)) != values).any():
            raise AssertionError(f"recovery within {bound} found other exponents")

    return each(len(values), work)


# --- points as bytes ------------------------------------------------------------------------------------------------


def wire_rows(sizes: Sizes) -> list[Row]:
    """48 bytes a point beside 64: coding, hashing and storing, at each dimension of the aggregations."""
    rows = []
    for dimension in sorted({shape.dimension for shape in sizes.aggregations}):
        with bench_wire.wire(dimension) as points:
            for name, (compact, plain) in points.works().items():
                own, other = alternate(sizes.repeats, compact, plain)
                title = f"{Shape(dimension, 1).parameters}: points, {name}"
                rows.append(Row(title, own * 1e9, "ns", None, "x and y, 64 bytes a point", other * 1e9))
    return rows


# --- whole secure aggregations --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """One aggregation: so many parameters from so many clients, of whom one in ten, at least one, can drop out."""

    dimension: int
    clients: int

    @property
    def dropped(self) -> int:
        return max(1, self.clients // 10)

    @property
    def repeats(self) -> int:
        """Large ones are measured once: their clients and blocks are many measurements already."""
        return 3 if self.dimension * self.clients <= 5_000_000 else 1

    @property
    def parameters(self) -> str:
        return f"{self.dimension:,}".replace(",", " ") + " parameters"

    def __str__(self) -> str:
        return f"{self.parameters}, {self.clients} clients"


FULL = Sizes(262_144, 5, (Shape(100_000, 5), Shape(100_000, 50), Shape(1_000_000, 5), Shape(1_000_000, 50)))
QUICK = Sizes(8192, 3, (Shape(20_000, 5), Shape(20_000, 50)))


@dataclass(frozen=True)
class KeyPair:
    scalar: int
    public: bytes

    @classmethod
    def number(cls, index: int) -> "KeyPair":
        """Any key will do for a measurement."""
        return cls(index + 1, ecies.public_key(index + 1))

    def mask(self, other: "KeyPair", role: Literal["publisher", "aggregator"]) -> bytes:
        return ndd_fe.mask_key(ecies.shared_secret(self.scalar, other.public), role, LABEL, bytes(16))


class Client:
    """A client's part, block by block: key agreement, encryption, encoding. `seconds` counts all of it."""

    def __init__(self, key: KeyPair, publisher: KeyPair, aggregator: KeyPair, threads: int) -> None:
        self.threads = threads
        self.masks, self.seconds = clocked(
            lambda: (key.mask(publisher, "publisher"), key.mask(aggregator, "aggregator"))
        )

    def submit(self, values: Integers, start: int) -> bytes:
        sent, spent = clocked(
            lambda: ndd_fe.encode_points(
                ndd_fe.encrypt(values, *self.masks, bound=BOUND, start=start, **spread(self.threads))
            )
        )
        self.seconds += spent
        return sent


class Server:
    """The publisher's and the aggregator's part for those who submitted, block by block.

    key_s: the publisher's key agreement and functional key. decode_s: decoding with its checks. sum_s: the aggregator's
    key agreement, and opening. verify_s, not the server's: what a verifier does after decoding.
    """

    def __init__(
        self, members: range, keys: list[KeyPair], publisher: KeyPair, aggregator: KeyPair, threads: int
    ) -> None:
        self.members, self.threads, self.decode_s, self.verify_s = members, threads, 0.0, 0.0
        others = [keys[member] for member in members]
        self.publisher_masks, self.key_s = clocked(lambda: [publisher.mask(key, "publisher") for key in others])
        self.aggregator_masks, self.sum_s = clocked(lambda: [aggregator.mask(key, "aggregator") for key in others])

    @property
    def seconds(self) -> float:
        return self.key_s + self.decode_s + self.sum_s

    def open(self, submitted: list[bytes], values: npt.NDArray[np.int64], start: int) -> None:
        """One block: submitted by all clients, values (clients, block) to compare with."""
        weights, data = [1] * len(self.members), [submitted[member] for member in self.members]
        key, spent = clocked(
            lambda: ndd_fe.derive_key(
                self.publisher_masks, weights, values.shape[1], start=start, **spread(self.threads)
            )
        )
        self.key_s += spent
        ciphertexts, spent = clocked(lambda: [ndd_fe.decode_points(one) for one in data])
        self.decode_s += spent
        bound = BOUND * len(weights)
        (m, rho), spent = clocked(
            lambda: ndd_fe.open_sum(
                key, self.aggregator_masks, ciphertexts, weights, bound=bound, start=start, **spread(self.threads)
            )
        )
        self.sum_s += spent
        if (m != values[list(self.members)].sum(axis=0)).any():
            raise AssertionError(f"the sum opened from coordinate {start} on is not the sum of the values")
        failing, spent = clocked(
            lambda: ndd_fe.failing_coordinates(ciphertexts, weights, m, rho, **spread(self.threads))
        )
        self.verify_s += spent
        if failing:
            raise AssertionError(f"an honest opening does not hold from coordinate {start} on")


def clocked(work: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def own_aggregation(shape: Shape) -> dict[str, float]:
    """Seconds of each part, and bytes a parameter: every client encrypts, every opening is done, drop-outs too.

    Works through blocks of BLOCK coordinates: memory does not grow with the dimension.
    """
    publisher, aggregator, *keys = (KeyPair.number(index) for index in range(shape.clients + 2))
    clients = [Client(key, publisher, aggregator, 1) for key in keys]
    twice = Client(keys[0], publisher, aggregator, 2)
    everybody, staying = range(shape.clients), range(shape.dropped, shape.clients)
    server, after_drops, server_twice = (
        Server(members, keys, publisher, aggregator, threads)
        for members, threads in ((everybody, 1), (staying, 1), (everybody, 2))
    )
    rng, sent_bytes = np.random.default_rng(1), 0
    for start in range(0, shape.dimension, BLOCK):
        length = min(BLOCK, shape.dimension - start)
        values = rng.integers(-BOUND, BOUND + 1, (shape.clients, length))
        submitted = [client.submit(row, start) for client, row in zip(clients, values, strict=True)]
        if twice.submit(values[0], start) != submitted[0]:
            raise AssertionError("two threads make another ciphertext than one")
        sent_bytes += len(submitted[0])
        for opening in (server, after_drops, server_twice):
            opening.open(submitted, values, start)
    return {
        "client": statistics.median(client.seconds for client in clients),
        "client, two threads": twice.seconds,
        "server": server.seconds,
        "server and decryption": server.seconds,  # ours opens what it sums
        "server after drop-outs": after_drops.seconds,
        "server, two threads": server_twice.seconds,
        "publisher's key": server.key_s,
        "decoding": server.decode_s,
        "verify": server.verify_s,
        "bytes": sent_bytes / shape.dimension,
    }


# Shares and threshold. Flower leaves them to the user: a ring of a few neighbours, as examples of its use take (3 of
# threshold 2; 7 of threshold 4 with 20 clients), is the faster; the complete graph is SecAgg, safe against any minority.
RINGS = {5: (3, 2), 50: (7, 4)}
GRAPHS = {5: (5, 3), 50: (50, 26)}


def flower_aggregation(flower: Peer, shape: Shape, shares: tuple[int, int]) -> dict[str, float]:
    sizes = {"dimension": shape.dimension, "clients": shape.clients, "num_shares": shares[0], "threshold": shares[1]}
    whole = flower.ask("aggregate", **sizes, dropped=0)
    after_drops = flower.ask("aggregate", **sizes, dropped=shape.dropped)
    return {
        "client": whole["client_s"],
        "server": whole["server_s"],
        "server after drop-outs": after_drops["server_s"],
        "bytes": whole["bytes"],
    }


def ckks_aggregation(ckks: Peer, shape: Shape) -> dict[str, float]:
    """Three clients encrypt for real; the server takes a ciphertext for every client."""
    return homomorphic(ckks.ask("aggregate", dimension=shape.dimension, clients=shape.clients, distinct=3), 1)


PAILLIER_COUNT = 30


def paillier_aggregation(paillier: Peer, shape: Shape) -> dict[str, float]:
    """30 parameters, times as many as there are: a parameter's cost does not depend on the others'."""
    measured = paillier.ask("aggregate", count=PAILLIER_COUNT, clients=shape.clients, bound=BOUND)
    return homomorphic(measured, shape.dimension / PAILLIER_COUNT)


def homomorphic(measured: dict[str, Any], times: float) -> dict[str, float]:
    """The server adds only; whoever holds the key decrypts the sum, which is then compared as a whole, too."""
    return {
        "client": measured["client_s"] * times,
        "server": measured["server_s"] * times,
        "server and decryption": (measured["server_s"] + measured["decrypt_s"]) * times,
        "bytes": measured["bytes"],
    }


def medians(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}


def aggregation_rows(shape: Shape, flower: Peer, ckks: Peer, paillier: Peer) -> list[Row]:
    own_aggregation(Shape(4096, shape.clients))  # tables are built once a process, before the clock
    ring, graph = RINGS[shape.clients], GRAPHS[shape.clients]
    own_turns, ring_turns, ckks_turns = [], [], []
    for _ in range(shape.repeats):
        own_turns.append(own_aggregation(shape))
        ring_turns.append(flower_aggregation(flower, shape, ring))
        ckks_turns.append(ckks_aggregation(ckks, shape))
    own, ring_name = medians(own_turns), f"Flower SecAgg+, ring of {ring[0]} shares"
    peers = {
        ring_name: medians(ring_turns),
        "Flower SecAgg, complete graph": flower_aggregation(flower, shape, graph),
        "TenSEAL CKKS": medians(ckks_turns),
        "python-paillier (extrapolated)": paillier_aggregation(paillier, shape),
    }
    rows = [
        beside(shape, part, own[part], peer, figures[part])
        for part in ("client", "server", "server and decryption", "server after drop-outs", "bytes")
        for peer, figures in peers.items()
        if part in figures
    ]
    for part in ("client", "server"):
        name = f"{shape}: {part}, two threads"
        rows.append(Row(name, own[f"{part}, two threads"] * 1e3, "ms", None, ring_name, peers[ring_name][part] * 1e3))
    for part in ("publisher's key", "decoding", "verify"):
        rows.append(Row(f"{shape}: {part}", own[part] * 1e3, "ms"))
    return rows


def beside(shape: Shape, part: str, own: float, peer: str, theirs: float) -> Row:
    """A part of an aggregation and a peer's; to be ahead of Flower is the goal, except in bytes."""
    if part == "bytes":
        return Row(f"{shape}: upload", own, "B/parameter", None, peer, theirs)
    goal = "ratio >= 1" if peer.startswith("Flower") else None
    return Row(f"{shape}: {part}", own * 1e3, "ms", goal, peer, theirs * 1e3)


# --- all of it ------------------------------------------------------------------------------------------------------


def run(out: Path, console: Console, *, quick: bool = False, document: Path | None = None) -> list[Row]:
    """Measure, print the table, write `out`; with a document, write its block of figures again."""
    sizes, python = QUICK if quick else FULL, peers_python(out.parent / "peers-venv", console)
    if (load := os.getloadavg()[0]) > 0.5:
        console.print(
            f"[yellow]other programs are running (load {load:.1f}): figures are those of what they leave[/yellow]"
        )
    rows = list(measure(sizes, python, console))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([row.record() for row in rows], indent=1))
    show(rows, console)
    console.print(surroundings(), soft_wrap=True)
    if document is not None:
        block = f"{surroundings()}{', small sizes (--quick)' if quick else ''}\n\n{markdown(rows)}"
        document.write_text(refreshed(document.read_text(), START, block))
    return rows


def measure(sizes: Sizes, python: Path, console: Console) -> Iterator[Row]:
    with ExitStack() as stack:
        curves, flower, ckks, paillier = (
            stack.enter_context(Peer(python, program)) for program in ("curves", "flower", "ckks", "paillier")
        )
        parts: list[tuple[str, Callable[[], list[Row]]]] = [
            ("multiplying and adding", lambda: field_rows(sizes, curves)),
            ("encrypting", lambda: encrypt_rows(sizes, curves)),
            ("encrypting, part by part", lambda: part_rows(sizes)),
            ("summing, verifying, deriving", lambda: sum_rows(sizes, curves)),
            ("recovering", lambda: recover_rows(sizes, curves)),
            ("points as bytes", lambda: wire_rows(sizes)),
        ]
        for title, part in parts:
            with console.status(title):
                yield from part()
            console.print(f"measured: {title}")
        for shape in sizes.aggregations:
            with console.status(f"secure aggregation, {shape}"):
                yield from aggregation_rows(shape, flower, ckks, paillier)
            console.print(f"measured: secure aggregation, {shape}")


def surroundings() -> str:
    """The machine, the versions and the day: one line."""
    found = machine()
    return (
        f"{found['processor']}, {found['cores']} cores; Python {found['python']}, numba {numba.__version__}, "
        f"{backend.CHOICE.name} curve core; {datetime.now(UTC):%Y-%m-%d}"
    )
