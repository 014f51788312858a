"""Points of secp256k1, y**2 = x**3 + 7: one at a time with plain integers, and many at a time in arrays.

    Point           one affine point, or infinity (x = y = 0); plain integers, for keys and tables
    point array     (m, 8) uint64, rows of canonical x and y, four little-endian limbs each; the zero row is infinity
    scalar array    (m, 4) uint64, canonical scalars, four little-endian limbs
    program         the additions that make a weighted sum of arrays, see `backend.combine`

Plain-integer functions check their arguments; array functions work on what `ndd_fe.decode_points` has checked. The
arithmetic on arrays is that of `backend`. Errors: InvalidEncoding, ValueError.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import index
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from tasks.crypto import backend
from tasks.crypto.backend import ADD_ARRAY, ADD_SLOT, BEGIN, COPY, DOUBLE, Program
from tasks.crypto.field import ORDER, P, Words

CHUNK = 8192  # rows worked on at a time: 512 KiB of points


class InvalidEncoding(ValueError):
    """Bytes that are not the one canonical encoding of what they should be."""


@dataclass(frozen=True)
class Point:
    """An affine point; (0, 0), which is not on the curve, stands for infinity."""

    x: int
    y: int


INFINITY = Point(0, 0)
GENERATOR = Point(
    0x79BE667E_F9DCBBAC_55A06295_CE870B07_029BFCDB_2DCE28D9_59F2815B_16F81798,
    0x483ADA77_26A3C465_5DA4FBFC_0E1108A8_FD17B448_A6855419_9C47D08F_FB10D4B8,
)


def is_on_curve(point: Point) -> bool:
    """Whether the point is affine, canonical and on the curve; False for infinity."""
    x, y = point.x, point.y
    return 0 <= x < P and 0 <= y < P and (y * y - x * x * x - 7) % P == 0


def negate(point: Point) -> Point:
    return Point(point.x, -point.y % P)


def add(a: Point, b: Point) -> Point:
    """a + b, for all points."""
    if a == INFINITY:
        return b
    if b == INFINITY:
        return a
    if a.x == b.x and (a.y + b.y) % P == 0:
        return INFINITY
    slope = (b.y - a.y) * pow(b.x - a.x, -1, P) if a.x != b.x else 3 * a.x * a.x * pow(2 * a.y, -1, P)
    x = (slope * slope - a.x - b.x) % P
    return Point(x, (slope * (a.x - x) - a.y) % P)


def multiply(scalar: int, point: Point) -> Point:
    """scalar * point. Raises ValueError unless 0 <= scalar < ORDER and the point is on the curve or infinity."""
    if not 0 <= scalar < ORDER:
        raise ValueError(f"scalar {scalar:#x} is not in [0, order)")
    if point == INFINITY:
        return INFINITY
    if not is_on_curve(point):
        raise ValueError("the point is not on the curve")
    total = INFINITY
    while scalar:
        if scalar & 1:
            total = add(total, point)
        point = add(point, point)
        scalar >>= 1
    return total


def encode_point(point: Point) -> bytes:
    """33 bytes: 02 or 03 for the parity of y, then x, big-endian (SEC 1). Raises ValueError for infinity."""
    if not is_on_curve(point):
        raise ValueError("only an affine point of the curve has an encoding")
    return bytes([2 + point.y % 2]) + point.x.to_bytes(32, "big")


def decode_point(data: bytes) -> Point:
    """33-byte compressed point, big-endian x. Raises InvalidEncoding, never returns a point off the curve."""
    if len(data) != 33 or data[0] not in (2, 3):
        raise InvalidEncoding(f"expected 33 bytes starting with 02 or 03, got {len(data)}: {data[:1].hex()}..")
    x = int.from_bytes(data[1:], "big")
    if x >= P:
        raise InvalidEncoding("x is not reduced mod p")
    square = (x * x * x + 7) % P
    y = pow(square, (P + 1) // 4, P)  # a square root, if there is one: p = 3 mod 4
    if y * y % P != square:
        raise InvalidEncoding("no point on the curve has this x")
    return Point(x, y if y % 2 == data[0] % 2 else P - y)


# --- arrays ---------------------------------------------------------------------------------------------------------


def array_of(points: Sequence[Point]) -> Words:
    """(m, 8) rows of points."""
    data = b"".join(c.to_bytes(32, "little") for point in points for c in (point.x, point.y))
    return np.frombuffer(data, "<u8").astype(np.uint64).reshape(-1, 8)


def points_of(array: Words) -> list[Point]:
    """The points of (m, 8) rows."""
    numbers = integers_of(array.reshape(-1, 4))
    return [Point(x, y) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]


def scalar_array(scalars: Sequence[int]) -> Words:
    """(m, 4) rows of any integers, reduced mod the order."""
    data = b"".join((scalar % ORDER).to_bytes(32, "little") for scalar in scalars)
    return np.frombuffer(data, "<u8").astype(np.uint64).reshape(-1, 4)


def integers_of(array: Words) -> list[int]:
    """The integers of (m, 4) rows of limbs."""
    data = array.astype("<u8").tobytes()
    return [int.from_bytes(data[i : i + 32], "little") for i in range(0, len(data), 32)]


def words(array: npt.ArrayLike, width: int, name: str) -> Words:
    """The array as C-contiguous uint64 of shape (m, width), as the kernels need it; ValueError for another shape."""
    rows = np.asarray(array)
    if rows.ndim != 2 or rows.shape[1] != width or rows.dtype != np.uint64:
        raise ValueError(f"{name}: expected uint64 of shape (d, {width}), got {rows.dtype} of shape {rows.shape}")
    return np.ascontiguousarray(rows)


def longs(array: npt.ArrayLike, name: str) -> npt.NDArray[np.int64]:
    """The array as C-contiguous int64 of shape (m,), as the kernels need it; ValueError for another shape or type."""
    numbers = np.asarray(array)
    if numbers.ndim != 1 or numbers.dtype != np.int64:
        raise ValueError(f"{name}: expected int64 of shape (d,), got {numbers.dtype} of shape {numbers.shape}")
    return np.ascontiguousarray(numbers)


def whole(number: SupportsIndex, name: str, least: int, end: int) -> int:
    """The number as a plain integer; ValueError unless it is one, numpy's included, and least <= number < end."""
    try:
        value = index(number)
    except TypeError:
        raise ValueError(f"{name} is {number!r}, not an integer") from None
    if not least <= value < end:
        raise ValueError(f"{name} is {value}, not in [{least}, {end})")
    return value


def sum_points(points: Words) -> Words:
    """(m, 8) sums over the first axis of (count, m, 8)."""
    total = np.zeros(points.shape[1:], np.uint64)
    every = np.arange(1, len(total) + 1, dtype=np.int32)[None, :]
    for row in points:
        backend.add_rows(total, words(row, 8, "points"), every)
    return total


def multiples(base: Point, count: int) -> Words:
    """(count, 8) rows: base, 2 base, ..., count base."""
    return progression(base, base, count)


def progression(start: Point, step: Point, count: int) -> Words:
    """(count, 8) rows: start, start + step, ..., each batch of additions as long as all before it."""
    table = aligned(count)
    table[:1] = array_of([start])
    done = 1
    while done < count:
        more = table[done : 2 * done]
        more[:] = table[: len(more)]
        backend.add_rows(more, array_of([step]), np.ones((1, len(more)), np.int32))
        step = add(step, step)
        done += len(more)
    return table


def aligned(rows: int) -> Words:
    """(rows, 8) uninitialized at a multiple of 64 bytes: a row is one cache line. Large ones get huge pages."""
    room = np.empty(rows * 8 + 8, np.uint64)
    skip = -room.ctypes.data // 8 % 8
    return room[skip : skip + rows * 8].reshape(rows, 8)


@lru_cache(maxsize=64)
def weighing(weights: tuple[int, ...]) -> tuple[Program, int]:
    """The program that makes sum_j weights[j] * array j of positive weights, and how many slots it takes.

    All ones: each array is added as it is read. Otherwise by differences (Bos and Coster 1989): of the two largest
    weights a >= b, with points A and B, a A + b B = (a - b) A + b (A + B). Where a is twice b or more, A is doubled
    instead, after an odd a has left one A in slot 0, the sum. Some 1.3 additions a weight of 4 bits, 3.8 for 16 bits.
    """
    weights = tuple(whole(weight, f"weight {j}", 1, 2**63) for j, weight in enumerate(weights))
    count = len(weights)
    if set(weights) == {1}:
        steps = [(BEGIN, 0, 0), *((ADD_ARRAY, 0, j) for j in range(1, count))]
        return np.array(steps, np.int64), 1
    steps = [(BEGIN, j + 1, j) for j in range(count)]
    left = {j + 1: weight for j, weight in enumerate(weights)}
    begun = False

    def take(slot: int) -> None:
        nonlocal begun
        steps.append((ADD_SLOT if begun else COPY, 0, slot))
        begun = True

    while left:
        largest = max(left, key=lambda slot: left[slot])
        a = left[largest]
        second = max((slot for slot in left if slot != largest), key=lambda slot: left[slot], default=0)
        if second and a < 2 * left[second]:
            steps.append((ADD_SLOT, second, largest))
            left[largest] = a - left[second]
        elif a % 2:
            take(largest)
            left[largest] = a - 1
        else:
            steps.append((DOUBLE, largest, largest))
            left[largest] = a // 2
        if not left[largest]:
            del left[largest]
    return np.array(steps, np.int64), count + 1


def weigh(total: Words, arrays: Sequence[Words], weights: Sequence[int]) -> None:
    """total (m, 8) = sum_j weights[j] * arrays[j], for positive weights; all arrays (m, 8), one weight for all rows."""
    if len(arrays) != len(weights) or not arrays:
        raise ValueError(f"{len(weights)} weights for {len(arrays)} arrays")
    if not (total.flags.c_contiguous and total.flags.writeable):
        raise ValueError("total: expected an array in one piece that can be written to")
    arrays = [words(array, 8, f"array {j}") for j, array in enumerate(arrays)]
    for j, array in enumerate([*arrays, words(total, 8, "total")]):
        if len(array) != len(total):
            raise ValueError(f"array {j} has {len(array)} rows, expected {len(total)}")
    program, slots = weighing(tuple(weights))
    backend.combine(total, arrays, program, slots)
