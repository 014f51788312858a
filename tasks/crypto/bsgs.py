"""Bounded discrete logs of many points in base G: baby step, giant step.

    E           (m - 1/2) G, a point whose m is sought: never infinity, so that no search has an exceptional addition
    T           table.size: baby steps (j - 1/2) G for 1 <= j <= T are in a hash table, by 64 and more bits of x
    stride      2 T: x alone finds j and 1 - j, so a giant step skips both halves
    m           the exponent, m = g * stride + j with 1 - T <= j <= T, |m| <= bound

A tag may fit by accident. Therefore every candidate is confirmed: that the point is (m - 1/2) G, all of it; a false one
is passed over and the search goes on behind it. What is returned is right, whatever the table holds.

Errors: OutOfBound. Sources: Shanks 1971; sharing 1 / (x_g - x_E) between E - g and E + g, see `field.search`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import numpy as np
import numpy.typing as npt

from tasks.crypto import backend, field
from tasks.crypto.curve import (
    CHUNK,
    GENERATOR,
    aligned,
    array_of,
    longs,
    multiples,
    multiply,
    negate,
    progression,
    whole,
    words,
)
from tasks.crypto.field import Words
from tasks.crypto.pedersen import HALF_GENERATOR, commitments

MAX_BOUND = 2**48  # beyond, the search takes hours
_STEPS_AT_ONCE = 2**20  # 64 MiB of points while a table is built
_BUILDING = Lock()
_MAX_GIANTS = 2**24  # 1 GiB of points; a table of 2**24 steps takes half as many for the largest bound


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
    """The hash table of (j - 1/2) G for 1 <= j <= size. 16 to 32 bytes a step; build once and share, it never changes."""

    size: int
    slots: npt.NDArray[np.uint64]  # (2**k,), layout in `field.insert_tags`, read-only, at most half full

    def __post_init__(self) -> None:
        """A search reads buckets of eight, and ends at a free slot."""
        slots = self.slots
        whole(self.size, "size of a table", 1, 2**28 + 1)
        if slots.dtype != np.uint64 or slots.ndim != 1 or not slots.flags.c_contiguous:
            raise ValueError(f"slots: expected uint64 in one row, got {slots.dtype} of shape {slots.shape}")
        if len(slots) < 8 or len(slots) & len(slots) - 1:
            raise ValueError(f"slots: expected a power of two from 8 on, got {len(slots)}")
        if slots[:1024].all() and slots.all():
            raise ValueError(f"slots: none of {len(slots)} is free")

    @classmethod
    def build(cls, size: int) -> "BabySteps":
        size = whole(size, "size of a table", 1, 2**28 + 1)
        slots = aligned(max(1, (1 << (2 * size - 1).bit_length()) // 8)).reshape(-1)  # a bucket is one cache line
        slots.fill(0)
        first = min(size, _STEPS_AT_ONCE)
        points = progression(HALF_GENERATOR, GENERATOR, first)
        stride = array_of([multiply(first, GENERATOR)])
        for done in range(0, size, first):
            if done:
                backend.add_rows(points, stride, np.ones((1, first), np.int32))
            field.insert_tags(slots, points[: size - done], done + 1)
        slots.flags.writeable = False
        return cls(size, slots)


def default_size(bound: int, count: int = 2**16) -> int:
    """Steps worth building to find `count` exponents within the bound: a power of two, at most 2**24 (256 MiB).

    A step costs some 75 ns to build, a giant step some 150 ns a point; of those there are count * bound / (4 T). Rounded
    up, for a table serves more than one round.
    """
    bits = ((min(bound, MAX_BOUND) * max(count, 1) // 2).bit_length() + 1) // 2
    return 1 << min(max(bits, 0), (bound - 1).bit_length(), 24)


def baby_steps(size: int) -> BabySteps:
    """A table of this process, built at first use; threads that ask meanwhile wait, and share it."""
    with _BUILDING:
        return _baby_steps(size)


@lru_cache(maxsize=2)
def _baby_steps(size: int) -> BabySteps:
    return BabySteps.build(size)


def discrete_logs(
    points: Words,
    bound: int,
    table: BabySteps | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    threads: int = 1,
) -> npt.NDArray[np.int64]:
    """(d,) int64 exponents m with m[i] * G = points[i] and |m[i]| <= bound, 1 <= bound <= 2**48.

    points (d, 8), infinity (zero rows) included. Raises OutOfBound with the coordinates that have no such exponent.
    progress is called with (coordinates done, d).
    """
    points = words(points, 8, "points")
    shifted = points.copy()
    minus_half = array_of([negate(HALF_GENERATOR)])
    affine = np.flatnonzero(points.any(axis=1))
    moved = shifted[affine]
    backend.add_rows(moved, minus_half, np.ones((1, len(moved)), np.int32))
    shifted[:] = minus_half
    shifted[affine] = moved
    return half_logs(shifted, bound, table, progress, threads=threads)


def half_logs(
    points: Words,
    bound: int,
    table: BabySteps | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    threads: int = 1,
) -> npt.NDArray[np.int64]:
    """(d,) exponents m with (m[i] - 1/2) * G = points[i], otherwise as `discrete_logs`."""
    points, bound = words(points, 8, "points"), whole(bound, "bound", 1, MAX_BOUND + 1)
    table = table or baby_steps(default_size(bound, len(points)))
    stride = 2 * table.size
    count = max(0, -(-(bound + 1 - table.size) // stride))
    if count > _MAX_GIANTS:
        raise ValueError(f"bound {bound} takes {count} giant steps with a table of {table.size}: build a larger one")
    giants = _giants(stride, count)
    logs = np.zeros(len(points), np.int64)
    solved = np.zeros(len(points), bool)
    reach = table.size + stride * len(giants)
    done, reporting = [0], Lock()
    commitments()  # built before any thread asks for it

    def confirm(m: npt.NDArray[np.int64], candidates: Words) -> npt.NDArray[np.bool_]:
        return commitments().are_half_exponents(candidates, m - 1, reach)

    def work(chunk: slice) -> None:
        logs[chunk], solved[chunk] = backend.search(table.slots, giants, stride, points[chunk], confirm)
        if progress:
            with reporting:
                done[0] += chunk.stop - chunk.start
                progress(done[0], len(points))

    # Up to four chunks at a time, as long as every thread has work: fewer turns at the interpreter's lock.
    together = max(1, min(4, len(points) // (max(threads, 1) * CHUNK)))
    backend.spread(work, len(points), together * CHUNK, threads)
    failed = np.flatnonzero(~solved | (np.abs(logs) > bound))
    if len(failed):
        raise OutOfBound(failed.tolist(), bound)
    return logs


@lru_cache(maxsize=2)
def _giants(stride: int, count: int) -> Words:
    return multiples(multiply(stride, GENERATOR), count) if count else np.empty((0, 8), np.uint64)


def encode_exponents(exponents: npt.NDArray[np.int64]) -> Words:
    """(d, 8) points exponents[i] * G."""
    exponents = longs(exponents, "exponents")
    largest = max(int(exponents.max(initial=0)), -int(exponents.min(initial=0)) - 1)  # 2 x + 1 of -2**63 fits, too
    return commitments().commit(exponents, np.zeros((len(exponents), 4), np.uint64), largest)
