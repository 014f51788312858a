"""The kernels under the cryptography, for `make bench-crypto`: one multiplication, one addition, encryption part by part.

    clock       of this core while it computes, from a chain of operations of known latency
    port limit  what 62 IFMA instructions of eight lanes take when two start in every cycle, as the processor has ports for

Everything is seconds for one: a product in one lane, an addition of one point, a coordinate. One thread.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from tasks.crypto import backend, curve, field, ndd_fe, pedersen
from tasks.crypto.field import Words

MULTIPLICATION_IFMA, ADDITION_IFMA = 62, 5 * 62 + 42  # instructions for eight lanes, carries not counted
CYCLE_CHAIN = 4  # cycles of a 64-bit multiplication and an exclusive or that wait for the ones before
POINTS = 131_072
SMALL, LARGE = 2**14, 2**19  # rows of tables: 1 MiB, in the second-level cache; 32 MiB
STEPS = 17  # rows added a point, as in encryption


@njit(nogil=True)
def _chain(count: int, factor: np.uint64) -> np.uint64:
    product = factor
    for _ in range(count):
        product = (product * product) ^ factor
    return product


def cycle() -> float:
    """Seconds a clock cycle."""
    return _median(lambda: _chain(30_000_000, np.uint64(3)), 30_000_000 * CYCLE_CHAIN, repeats=3)


def multiplication() -> Callable[[], float]:
    """Seconds a lane of one IFMA multiplication, two in turns as in an addition; all stay in the first-level cache."""
    from tasks.crypto.ifma import ELEMENT, LANES, _load, _multiply, _pair_operation, _store

    @_pair_operation
    def product(builder: Any, out: Any, a: Any, b: Any) -> None:
        _store(builder, out, _multiply(builder, _load(builder, a), _load(builder, b)))

    @njit(nogil=True)
    def products(first: int, rounds: int) -> None:
        out = first + 32 * ELEMENT
        for _ in range(rounds):
            for i in range(0, 30, 2):
                a, b, c = first + i * ELEMENT, first + (i + 1) * ELEMENT, first + (i + 2) * ELEMENT
                product(out + i * ELEMENT, a, b, out + (i + 1) * ELEMENT, b, c)

    room = np.full(64 * ELEMENT // 8 + 8, 2**51 - 1, np.uint64)

    def work() -> float:
        return _median(lambda: products((room.ctypes.data + 63) & ~63, 50_000), 50_000 * 30 * LANES, repeats=3)

    return work


def additions(rows: int) -> Callable[[], float]:
    """Seconds an addition of a row of a table of so many rows, inversion and conversion included."""
    table, references = _windows(rows, POINTS)
    points = np.empty((POINTS, 8), np.uint64)
    return lambda: _median(lambda: backend.add_rows(points, table, references, fresh=True), POINTS * (STEPS - 1))


def _windows(rows: int, points: int) -> tuple[Words, npt.NDArray[np.int32]]:
    """A table of STEPS windows, together so many rows, and references (STEPS, points) to one random row of each.

    The windows begin at unrelated points, as those of scalars do: no sum meets its own row again.
    """
    rng, width = np.random.default_rng(rows), rows // STEPS
    starts = [curve.multiply(3 ** (140 + step), curve.GENERATOR) for step in range(STEPS)]
    table = curve.aligned(width * STEPS)
    np.concatenate([curve.progression(start, curve.GENERATOR, width) for start in starts], out=table)
    references = rng.integers(1, width + 1, (STEPS, points)) + width * np.arange(STEPS)[:, None]
    return table, (references * rng.choice([-1, 1], (STEPS, points))).astype(np.int32)


def encryption_parts() -> dict[str, float]:
    """Seconds a coordinate of each part of encryption; additions without what the other rows name."""
    rng = np.random.default_rng(0)
    count = POINTS
    key = rng.bytes(32)
    stream = ndd_fe._stream(key, 0, count)
    sums = np.zeros((count, 5), np.uint64)
    scalars, values = ndd_fe._reduce(sums), rng.integers(-2047, 2048, count)
    field.accumulate(sums, stream, np.uint64(1))
    field.reduce_scalars(sums, scalars)
    tables = pedersen.commitments()
    references = pedersen.references_of(values, scalars, 2047)
    small, near = _windows(SMALL, count)
    points = np.empty((count, 8), np.uint64)

    def adding(table: Any, rows: Any) -> float:
        return _median(lambda: backend.add_rows(points, table, rows, fresh=True), count)

    def scalars_work() -> None:
        field.accumulate(sums, stream, np.uint64(1))
        field.accumulate(sums, stream, np.uint64(1))
        field.reduce_scalars(sums, scalars)

    whole, cached, no_addition = adding(tables.table, references), adding(small, near), adding(small, near[:1])
    inversion = 0.0
    if backend.CHOICE.kernels is not None:
        batch = backend.CHOICE.kernels.BATCH * backend.CHOICE.kernels.LANES
        inversion = (len(references) - 1) * inversion_seconds() / batch
    return {
        "keystreams": 2 * _median(lambda: ndd_fe._stream(key, 0, count), count),
        "scalars": _median(scalars_work, count),
        "recoding": _median(lambda: pedersen.references_of(values, scalars, 2047), count),
        "table traffic": max(0.0, whole - cached),
        "inversions": inversion,
        "normalisation and conversion": no_addition,
        "additions": cached - no_addition - inversion,
    }


def inversion_seconds() -> float:
    """Seconds of one inversion mod p."""

    @njit(nogil=True)
    def inversions(element: Any, count: int) -> Any:
        for _ in range(count):
            element = field.inverse(element)
        return element

    return _median(lambda: inversions(field.limbs(3**150), 1000), 1000, repeats=3)


def _median(work: Callable[[], Any], count: int, repeats: int = 5) -> float:
    """Seconds for one of `count`, the median of some turns after one that warms up."""
    work()
    spent = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        spent.append(time.perf_counter() - started)
    return statistics.median(spent) / count
