"""Bounded discrete logs of many points in base G: baby step, giant step.

    T           table.size: baby steps j * G for 1 <= j <= T are in a hash table, by the low 64 bits of x
    stride      2 T + 1: x alone finds j and -j, so a giant step skips both halves
    m           the exponent, m = g * stride + j with |j| <= T, |m| <= bound

A tag may fit by accident. Therefore every candidate is encoded again, m * G, and compared with the point; a false one
is passed over and the search goes on behind it. What is returned is right, whatever the table holds.

Errors: OutOfBound. Sources: Shanks 1971; sharing 1 / (x_g - x_E) between E - g and E + g, see `field.search`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tasks.crypto import field
from tasks.crypto.curve import CHUNK, GENERATOR, FixedBase, multiples, multiply, signed_scalars, words
from tasks.crypto.field import Words

MAX_BOUND = 2**48  # beyond, the search takes hours


class OutOfBound(ValueError):
    """No exponent in [-bound, bound] fits: the sum overflowed, the key is wrong or a ciphertext was forged."""

    def __init__(self, coordinates: list[int], bound: int) -> None:
        shown = ", ".join(map(str, coordinates[:8])) + (", ..." if len(coordinates) > 8 else "")
        super().__init__(f"{len(coordinates)} coordinates have no exponent within +-{bound}: {shown}")
        self.coordinates = coordinates
        self.bound = bound

    def __reduce__(self) -> tuple[type["OutOfBound"], tuple[list[int], int]]:
        return OutOfBound, (self.coordinates, self.bound)


@dataclass(frozen=True, eq=False)
class BabySteps:
    """The hash table of j * G for 1 <= j <= size. 32 to 64 bytes a step; build once and share, it never changes."""

    size: int
    slots: Words  # (2**k, 2), layout in `field.insert_tags`, read-only, at most half full

    @classmethod
    def build(cls, size: int) -> "BabySteps":
        if not 1 <= size <= 2**28:
            raise ValueError(f"a table has 1 to 2**28 steps, got {size}")
        slots = np.empty((1 << (2 * size - 1).bit_length(), 2), np.uint64)  # unlike zeros, empty gets huge pages
        slots.fill(0)
        field.insert_tags(slots, multiples(GENERATOR, size), 1)
        slots.flags.writeable = False
        return cls(size, slots)


def default_size(bound: int) -> int:
    """Steps worth building for some 10**5 points: a power of two, about sqrt(2**16 bound), at most 2**22 (128 MiB)."""
    bits = (bound - 1).bit_length()
    return 1 << min(bits, (bits + 16) // 2, 22)


@lru_cache(maxsize=2)
def baby_steps(size: int) -> BabySteps:
    """A table of this process, built at first use."""
    return BabySteps.build(size)


@lru_cache(maxsize=1)
def generator() -> FixedBase:
    """Multiples of G for short scalars, up to 65 bits: 5 windows of 13 bits, 1.3 MiB."""
    return FixedBase.build(GENERATOR, window=13, windows=5)


def discrete_logs(
    points: Words, bound: int, table: BabySteps | None = None, progress: Callable[[int, int], None] | None = None
) -> npt.NDArray[np.int64]:
    """(d,) int64 exponents m with m[i] * G = points[i] and |m[i]| <= bound, 1 <= bound <= 2**48.

    points (d, 8), infinity (zero rows) included. Raises OutOfBound with the coordinates that have no such exponent.
    progress is called with (coordinates done, d).
    """
    if not 1 <= bound <= MAX_BOUND:
        raise ValueError(f"bound {bound} is not in [1, 2**48]")
    points = words(points, 8, "points")
    table = table or baby_steps(default_size(bound))
    stride = 2 * table.size + 1
    giants = _giants(stride, max(0, -(-(bound - table.size) // stride)))
    logs = np.zeros(len(points), np.int64)
    solved = np.empty(len(points), bool)
    for first in range(0, len(points), CHUNK):
        chunk = slice(first, first + CHUNK)
        logs[chunk], solved[chunk] = _solve(points[chunk], stride, table, giants)
        if progress:
            progress(min(first + CHUNK, len(points)), len(points))
    failed = np.flatnonzero(~solved | (np.abs(logs) > bound))
    if len(failed):
        raise OutOfBound(failed.tolist(), bound)
    return logs


@lru_cache(maxsize=2)
def _giants(stride: int, count: int) -> Words:
    return multiples(multiply(stride, GENERATOR), count) if count else np.empty((0, 8), np.uint64)


def _solve(
    points: Words, stride: int, table: BabySteps, giants: Words
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Exponents and whether they were found: candidates are encoded again, wrong ones searched further."""
    logs = np.zeros(len(points), np.int64)
    solved: npt.NDArray[np.bool_] = np.logical_not(points.any(axis=1))  # infinity: the exponent is 0
    pending = np.flatnonzero(~solved)
    skips = np.zeros(len(points), np.int64)
    while len(pending):
        targets = points[pending]
        candidates = np.zeros(len(pending), np.int64)
        found = np.zeros(len(pending), np.uint8)
        field.search(table.slots, giants, stride, targets, skips[pending], candidates, found)
        fits = (found == 1) & (encode_exponents(candidates) == targets).all(axis=1)
        logs[pending[fits]] = candidates[fits]
        solved[pending[fits]] = True
        pending = pending[(found == 1) & ~fits]
        skips[pending] += 1
    return logs, solved


def encode_exponents(exponents: npt.NDArray[np.int64], bound: int | None = None) -> Words:
    """(d, 8) points exponents[i] * G. A bound on |exponents| makes the work independent of the largest one."""
    if bound is None:
        bound = max(int(exponents.max(initial=0)), -int(exponents.min(initial=0)))
    points = np.zeros((len(exponents), 8), np.uint64)
    generator().add_to(points, signed_scalars(exponents), bits=bound.bit_length())
    return points
