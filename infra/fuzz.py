"""A long comparison of the curve core with libsecp256k1, and of its backends with each other: `make fuzz`.

    round         random values, weights, masks, lengths, first coordinates, chunks and numbers of threads: all of the seed
    backends      each one that this machine has does every round; all arrays must be the same to the bit
    independent   libsecp256k1 by coincurve adds points, AES in ECB mode makes the masks, Python's and numpy's integers
                  the sums: nothing of `tasks.crypto` but the definition of H
    combination   sum_k c_k P_k of all points P_k of an array, with random c_k below 256: the points of equal c_k are
                  added up, then 255 partial sums are. It must be (sum c_k x_k) G + (sum c_k rho_k) H

What can go unseen. Errors E_k = P_k - (x_k G + rho_k H) that are not all zero pass a combination only if sum c_k E_k = 0.
Take one k with E_k != 0 and the other c fixed: the group has prime order, so at most one value of c_k does that, and a
combination sees the error with a probability of at least 255 / 256. PASSES = 4 independent ones miss it with at most 2**-32,
however many coordinates are wrong and in whatever pattern, as the c are drawn after the points and from another stream. Of
each array of points some coordinates are computed one by one as well. Recovered sums are all compared with numpy's.
"""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tasks.crypto import backend, bsgs, ndd_fe, pedersen
from tasks.crypto.backend import Choice

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

ORDER = 0xFFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFE_BAAEDCE6_AF48A03B_BFD25E8C_D0364141
LARGEST = 2**17  # coordinates of a round
PASSES = 4
SAMPLE = 8  # coordinates of an array computed one by one
TABLE = 2**16  # baby steps


class Mismatch(ValueError):
    """Two ways to compute the same thing disagree."""

    def __init__(self, what: str, coordinate: int) -> None:
        super().__init__(f"{what} is wrong, first at coordinate {coordinate}")
        self.what = what
        self.coordinate = coordinate


def run(coordinates: int, seed: int | None, console: Console) -> dict[str, Any]:
    """Fuzz at least so many coordinates and return what was done.

    At the first mismatch prints the seed and the coordinate and ends the process with 1.
    """
    seed = secrets.randbits(48) if seed is None else seed
    peer, choices = Peer(), available()
    console.print(f"seed {seed}, backends {', '.join(choice.name for choice in choices)}")
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
    done, ciphertexts, number, begun = 0, 0, 0, time.monotonic()
    with bar:
        task = bar.add_task("coordinates", total=coordinates)
        try:
            compare_tables(choices)
            while done < coordinates:
                round_ = Round.of(np.random.default_rng([seed, number]), coordinates - done)
                check(round_, choices, peer)
                number += 1
                done += round_.length
                ciphertexts += round_.length * len(round_.values)
                bar.update(task, completed=done)
        except Mismatch as error:
            bar.stop()
            console.print(f"[red]seed {seed}, round {number}: {error}[/red]")
            raise SystemExit(1) from error
    return {
        "seed": seed,
        "coordinates": done,
        "ciphertexts": ciphertexts,
        "rounds": number,
        "backends": [choice.name for choice in choices],
        "missed_at_most": 256.0**-PASSES,
        "seconds": round(time.monotonic() - begun, 1),
    }


# --- the rounds -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """What the parties of one round hold, and how the work is cut."""

    values: Integers  # (h, d)
    bound: int  # of a value
    weights: list[int]
    publisher_masks: list[bytes]
    aggregator_masks: list[bytes]
    start: int
    threads: int
    chunk: slice  # worked on alone, too
    rng: np.random.Generator  # for the comparison

    @classmethod
    def of(cls, rng: np.random.Generator, most: int) -> "Round":
        h = int(rng.integers(1, 5))
        small = rng.random() < 0.25
        d = min(most, int(rng.integers(1, 5000)) if small else int(rng.integers(LARGEST // 2, LARGEST)))
        # The sum stays below 2**22, so that its recovery does not take all the time.
        weight_bits = int(rng.integers(0, 17))
        bound = 2 ** int(rng.integers(0, 21 - weight_bits)) if weight_bits < 20 else 1
        values = rng.integers(-bound, bound + 1, (h, d))
        values[rng.random((h, d)) < rng.choice([0.0, 0.5, 0.99])] = 0
        first, last = sorted(rng.integers(0, d + 1, 2).tolist())
        return cls(
            values=values,
            bound=bound,
            weights=rng.integers(1, max(2, 2**weight_bits), h).tolist(),
            publisher_masks=[rng.bytes(32) for _ in range(h)],
            aggregator_masks=[rng.bytes(32) for _ in range(h)],
            start=int(rng.integers(0, 2 ** int(rng.choice([0, 40, 62])))),
            threads=int(rng.integers(1, 4)),
            chunk=slice(first, last),
            rng=rng,
        )

    @property
    def length(self) -> int:
        return len(self.values[0])

    @cached_property
    def sums(self) -> Integers:
        """(d,) weighted sums of the values."""
        return np.array(self.weights) @ self.values


def work(round_: Round) -> dict[str, Any]:
    """Every array of the round, by the backend at work."""
    masks = list(zip(round_.publisher_masks, round_.aggregator_masks, strict=True))
    more: dict[str, int] = {"start": round_.start, "threads": round_.threads}
    ciphertexts = [
        ndd_fe.encrypt(x, p, a, bound=round_.bound, **more) for x, (p, a) in zip(round_.values, masks, strict=True)
    ]
    key = ndd_fe.derive_key(round_.publisher_masks, round_.weights, round_.length, **more)
    bound = round_.bound * sum(round_.weights)
    table = bsgs.baby_steps(TABLE)
    m, rho = opened(key, round_.aggregator_masks, ciphertexts, round_.weights, bound=bound, table=table, **more)
    total = ndd_fe.weighted_sum(ciphertexts, round_.weights, threads=round_.threads)
    compare_chunk(round_, ciphertexts[0], total)
    compare_decoded(ciphertexts)
    compare_failing(round_, ciphertexts, m, rho)
    named = {f"ciphertext {i}": ciphertext for i, ciphertext in enumerate(ciphertexts)}
    return {**named, "functional key": key, "weighted sum": total, "blinding": rho, "recovered sum": m}


def opened(*arguments: Any, **options: Any) -> tuple[Integers, Words]:
    """`ndd_fe.open_sum`, whose refusal of honest input is a mismatch."""
    try:
        return ndd_fe.open_sum(*arguments, **options)
    except ndd_fe.OutOfBound as error:
        raise Mismatch("recovery", error.coordinates[0] - options["start"]) from error


def compare_chunk(round_: Round, ciphertext: Words, total: Words) -> None:
    """A chunk worked on alone, in one thread, is that of the whole."""
    part, masks = round_.chunk, (round_.publisher_masks[0], round_.aggregator_masks[0])
    alone = ndd_fe.encrypt(round_.values[0, part], *masks, bound=round_.bound, start=round_.start + part.start)
    expect_same("chunk of a ciphertext", alone, ciphertext[part], part.start)
    if len(round_.weights) == 1:
        times = ndd_fe.weighted_sum([ciphertext[part]], round_.weights)
        expect_same("chunk of a weighted sum", times, total[part], part.start)


def compare_decoded(ciphertexts: list[Words]) -> None:
    """Every ciphertext comes back from its encoding."""
    for i, points in enumerate(ciphertexts):
        expect_same(f"ciphertext {i} from its encoding", ndd_fe.decode_points(ndd_fe.encode_points(points)), points)


def compare_failing(round_: Round, ciphertexts: list[Words], m: Integers, rho: Words) -> None:
    """The opening holds but where it was made false: some sums and a blinding are changed."""
    changed = sorted(set(round_.rng.integers(0, round_.length, 3).tolist()))
    claimed, blinding = m.copy(), rho.copy()
    claimed[changed[:2]] += 1
    blinding[changed[2:], 0] ^= np.uint64(1)
    found = ndd_fe.failing_coordinates(ciphertexts, round_.weights, claimed, blinding, threads=round_.threads)
    if found != changed:
        raise Mismatch("verification", min(set(found) ^ set(changed)))


# --- the comparisons ------------------------------------------------------------------------------------------------


def available() -> list[Choice]:
    """The backends of this machine."""
    choices = [backend.choose("portable")]
    with suppress(backend.WrongBackend):
        choices.append(backend.choose("ifma"))
    return choices


@contextmanager
def at_work(choice: Choice) -> Iterator[None]:
    """Have a backend do the work."""
    before, backend.CHOICE = backend.CHOICE, choice
    try:
        yield
    finally:
        backend.CHOICE = before


def compare_tables(choices: list[Choice]) -> None:
    """Both tables are the same, whoever builds them."""
    made = []
    for choice in choices:
        with at_work(choice):
            made.append((pedersen.Commitments.build().table, bsgs.BabySteps.build(TABLE).slots[:, None]))
    for rows, slots in made[1:]:
        expect_same("table of commitments", rows, made[0][0])
        expect_same("table of baby steps", slots, made[0][1])


def check(round_: Round, choices: list[Choice], peer: "Peer") -> None:
    """One round by every backend, compared with each other and with the peer."""
    results = []
    for choice in choices:
        with at_work(choice):
            results.append(work(round_))
    for other in results[1:]:
        for name, array in other.items():
            expect_same(f"{name} of {choices[0].name} or {choices[-1].name}", array, results[0][name])
    compare_with_peer(round_, results[0], peer)


def expect_same(what: str, a: npt.NDArray[Any], b: npt.NDArray[Any], first: int = 0) -> None:
    if a.shape != b.shape:
        raise Mismatch(f"{what}: the length", first)
    if not np.array_equal(a, b):
        differ = (a != b).reshape(len(a), -1).any(axis=1)
        raise Mismatch(what, first + int(np.flatnonzero(differ)[0]))


def compare_with_peer(round_: Round, result: dict[str, Any], peer: "Peer") -> None:
    """Every array of one backend is what the definition says."""
    expect_same("recovered sum", result["recovered sum"], round_.sums)
    publisher, aggregator = (
        [raw_stream(key, round_.start, round_.length) for key in keys]
        for keys in (round_.publisher_masks, round_.aggregator_masks)
    )
    ones = [1] * len(round_.weights)
    for i in range(len(round_.values)):
        own = Blinding([publisher[i], aggregator[i]], ones[:1] * 2)
        compare_points(f"ciphertext {i}", result[f"ciphertext {i}"], round_.values[i], own, round_.rng, peer)
    both = Blinding(publisher + aggregator, round_.weights * 2)
    compare_points("weighted sum", result["weighted sum"], round_.sums, both, round_.rng, peer)
    compare_scalars("functional key", result["functional key"], Blinding(publisher, round_.weights), round_.rng)
    compare_scalars("blinding", result["blinding"], both, round_.rng)


@dataclass(frozen=True)
class Blinding:
    """Scalars sum_i weights[i] * streams[i], mod n."""

    streams: list[Words]  # each (d, 4)
    weights: list[int]

    def at(self, k: int) -> int:
        return sum(y * number(stream[k]) for y, stream in zip(self.weights, self.streams, strict=True)) % ORDER

    def combined(self, part: slice, c: npt.NDArray[np.uint8]) -> list[int]:
        """sum_k c_k rho_k mod n for each row of c (PASSES, ...)."""
        terms = [combined_words(stream[part], c) for stream in self.streams]
        return [
            sum(y * term for y, term in zip(self.weights, row, strict=True)) % ORDER for row in zip(*terms, strict=True)
        ]


def coefficients(rng: np.random.Generator, part: slice) -> npt.NDArray[np.uint8]:
    """(PASSES, points) random coefficients of combinations."""
    return rng.integers(0, 256, (PASSES, part.stop - part.start), np.uint8)


def compare_points(
    what: str, points: Words, x: Integers, blinding: Blinding, rng: np.random.Generator, peer: "Peer"
) -> None:
    """Points are x G + rho H: all by combinations, a few one by one."""

    def hold(part: slice) -> bool:
        c = coefficients(rng, part)
        return all(
            peer.combination(points[part], row) == peer.commitment(int(row.astype(np.int64) @ x[part]), rho)
            for row, rho in zip(c, blinding.combined(part, c), strict=True)
        )

    infinite = np.flatnonzero(~points[:, :4].any(axis=1))
    if len(infinite):  # rho is random, and libsecp256k1 takes no infinity
        raise Mismatch(what, int(infinite[0]))
    if not hold(slice(0, len(points))):
        raise Mismatch(what, first_failing(len(points), hold))
    for k in rng.integers(0, len(points), SAMPLE).tolist():
        if points[k].tobytes() != peer.commitment(int(x[k]), blinding.at(k)):
            raise Mismatch(what, k)


def first_failing(length: int, hold: Callable[[slice], bool]) -> int:
    """The first of `length` coordinates that is wrong, by halves; one is."""
    first, last = 0, length
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (middle, last) if hold(slice(first, middle)) else (first, middle)
    return first


def compare_scalars(what: str, scalars: Words, blinding: Blinding, rng: np.random.Generator) -> None:
    """Scalars are what they should be mod n, by combinations, and below n: random ones never come near it."""
    unreduced = np.flatnonzero((scalars[:, 3] == 2**64 - 1) & (scalars[:, 2] >= 2**64 - 2))
    if len(unreduced):
        raise Mismatch(what, int(unreduced[0]))

    def hold(part: slice) -> bool:
        c = coefficients(rng, part)
        return [total % ORDER for total in combined_words(scalars[part], c)] == blinding.combined(part, c)

    if not hold(slice(0, len(scalars))):
        raise Mismatch(what, first_failing(len(scalars), hold))


# --- the independent side -------------------------------------------------------------------------------------------


def raw_stream(key: bytes, start: int, length: int) -> Words:
    """(length, 4) words of the mask stream from scalar `start` on: AES of each counter by itself."""
    counters = np.zeros((2 * length, 2), ">u8")
    counters[:, 0], counters[:, 1] = 2 * start >> 64, 2 * start % 2**64
    counters[:, 1] += np.arange(2 * length, dtype=np.uint64)  # starts are below 2**62: no carry
    return np.frombuffer(Cipher(AES(key), ECB()).encryptor().update(counters.tobytes()), np.uint64).reshape(-1, 4)


def number(words: Words) -> int:
    return int.from_bytes(words.astype("<u8").tobytes(), "little")


def combined_words(words: Words, c: npt.NDArray[np.uint8]) -> list[int]:
    """sum_k c_k times row k of (d, 4), exact, for each row of c: columns of 16 bits, sums below 2**41 in float64."""
    columns = c.astype(np.float64) @ words.view(np.uint16).astype(np.float64)
    return [sum(int(column) << 16 * j for j, column in enumerate(row)) for row in columns]


class Peer:
    """libsecp256k1. Points are rows of 64 bytes as ours, None for infinity."""

    def __init__(self) -> None:
        try:
            from coincurve import PublicKey
            from coincurve._libsecp256k1 import ffi, lib
            from coincurve.context import GLOBAL_CONTEXT
        except ImportError:
            raise ValueError("the comparison needs coincurve: pip install -e '.[dev]'") from None
        self._ffi, self._lib, self._context = ffi, lib, GLOBAL_CONTEXT.ctx
        self._bases = [PublicKey.from_secret(bytes(31) + b"\1"), PublicKey.from_point(pedersen.H.x, pedersen.H.y)]
        # Its keys are x and y, 32 bytes each, little-endian, on every machine that numba compiles for; made sure of here.
        if self._row(self._bases[1].public_key) != b"".join(
            c.to_bytes(32, "little") for c in (pedersen.H.x, pedersen.H.y)
        ):
            raise ValueError("this libsecp256k1 holds points in another form than x and y in 64 bytes")

    def commitment(self, x: int, rho: int) -> bytes | None:
        """x G + rho H."""
        scalars = [(scalar % ORDER).to_bytes(32, "big") for scalar in (x, rho)]
        terms = [base.multiply(scalar) for base, scalar in zip(self._bases, scalars, strict=True) if any(scalar)]
        rows = [self._row(term.public_key) for term in terms]
        return self._add(rows[0], rows[1]) if len(rows) == 2 else next(iter(rows), None)

    def combination(self, points: Words, c: npt.NDArray[np.uint8]) -> bytes | None:
        """sum_k c_k points[k]: partial sums of equal c, then 255 S_255 + ... + 1 S_1 by running sums from the top."""
        order = np.argsort(c, kind="stable")
        addresses = points.ctypes.data + 64 * order.astype(np.uint64)
        ends = np.searchsorted(c[order], np.arange(257))
        running = total = None
        for j in range(255, 0, -1):
            running = self._add(running, self._sum(addresses[ends[j] : ends[j + 1]]))
            total = self._add(total, running)
        return total

    def _add(self, a: bytes | None, b: bytes | None) -> bytes | None:
        rows = [row for row in (a, b) if row is not None]
        if len(rows) < 2:
            return next(iter(rows), None)
        two = np.frombuffer(b"".join(rows), np.uint64)
        return self._sum(two.ctypes.data + np.array([0, 64], np.uint64))

    def _sum(self, addresses: Words) -> bytes | None:
        """The sum of points at these addresses; the library refuses to name infinity."""
        if not len(addresses):
            return None
        out, pointers = (
            self._ffi.new("secp256k1_pubkey *"),
            self._ffi.cast("secp256k1_pubkey **", addresses.ctypes.data),
        )
        found = self._lib.secp256k1_ec_pubkey_combine(self._context, out, pointers, len(addresses))
        return self._row(out) if found else None

    def _row(self, key: Any) -> bytes:
        return bytes(self._ffi.buffer(key))
