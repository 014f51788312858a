"""Points of secp256k1, y**2 = x**3 + 7: one at a time with plain integers, and many at a time in arrays.

    Point           one affine point, or infinity (x = y = 0); plain integers, for keys and tables
    point array     (m, 8) uint64, rows of canonical x and y, four little-endian limbs each; the zero row is infinity
    scalar array    (m, 4) uint64, canonical scalars, four little-endian limbs
    FixedBase       windows of multiples of one point: a scalar becomes a few rows to add

Plain-integer functions check their arguments; array functions work on what `ndd_fe.decode_points` has checked. The
arithmetic on arrays is in `field` (see there for the seam of another backend). Errors: InvalidEncoding, ValueError.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tasks.crypto import field
from tasks.crypto.field import ORDER, P, Words

CHUNK = 4096  # rows worked on at a time: 256 KiB of points


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


def _every_row(count: int) -> npt.NDArray[np.int32]:
    """References to rows 0 .. count - 1 in order: adds one array of points to another."""
    return np.arange(1, count + 1, dtype=np.int32)[None, :]


def sum_points(points: Words) -> Words:
    """(m, 8) sums over the first axis of (count, m, 8)."""
    total = np.zeros(points.shape[1:], np.uint64)
    for row in points:
        field.add_rows(total, np.ascontiguousarray(row), _every_row(len(total)))
    return total


def multiples(base: Point, count: int) -> Words:
    """(count, 8) rows: base, 2 base, ..., count base. Twice as many with each batch of additions."""
    table = _aligned(count)
    table[:1] = array_of([base])
    done = 1
    while done < count:
        more = table[done : done + min(done, count - done)]
        more[:] = table[: len(more)]
        field.add_rows(more, table[done - 1 : done], np.ones((1, len(more)), np.int32))
        done += len(more)
    return table


def _aligned(rows: int) -> Words:
    """(rows, 8) uninitialized at a multiple of 64 bytes: a row is one cache line. Large ones get huge pages."""
    room = np.empty(rows * 8 + 8, np.uint64)
    skip = -room.ctypes.data // 8 % 8
    return room[skip : skip + rows * 8].reshape(rows, 8)


@dataclass(frozen=True, eq=False)
class FixedBase:
    """Multiples of one base: row w * half + m - 1 is m * 2**(window * w) * base, for 1 <= m <= half = 2**(window - 1).

    With 16 windows of 16 bits: 32 MiB, and a product with any scalar is the sum of 16 rows.
    """

    window: int
    table: Words  # (windows * half, 8), read-only

    @classmethod
    def build(cls, base: Point, window: int, windows: int) -> "FixedBase":
        half = 1 << (window - 1)
        table = _aligned(windows * half)
        for w in range(windows):
            table[w * half : (w + 1) * half] = multiples(base, half)
            for _ in range(window):
                base = add(base, base)
        table.flags.writeable = False
        return cls(window, table)

    def add_to(self, points: Words, scalars: Words, *, negative: bool = False, bits: int = 256) -> None:
        """points[i] += (or -= if negative) scalars[i] * base, in place.

        bits bounds the signed scalars: every scalar or its negative mod n is below 2**bits.
        """
        # One bit more than the magnitude for the carry of signed digits; 256 bits cannot carry (see `field.recode`).
        windows = -(-min(bits + 1, 256) // self.window)
        if windows << (self.window - 1) > len(self.table):
            raise ValueError(f"a scalar of {bits} bits is longer than the table of {len(self.table)} multiples")
        references = np.empty((windows, len(points)), np.int32)
        field.recode(scalars, self.window, references)
        if negative:
            np.negative(references, out=references)
        field.add_rows(points, self.table, references)


def signed_scalars(values: npt.NDArray[np.int64]) -> Words:
    """(m, 4) values mod n."""
    scalars = np.empty((len(values), 4), np.uint64)
    field.scalars_of(np.ascontiguousarray(values, dtype=np.int64), scalars)
    return scalars


def weigh(arrays: Sequence[Words], weights: Sequence[int]) -> Words:
    """(m, 8) points sum_j weights[j] * arrays[j], for positive weights; all arrays (m, 8).

    Weights are the same for all rows: one doubling a bit, shared by the arrays, and one addition for every nonzero
    signed digit (non-adjacent form: a third of the bits).
    """
    total = np.zeros_like(arrays[0])
    every = _every_row(len(total))
    digits = [_non_adjacent(weight) for weight in weights]
    for bit in reversed(range(max(map(len, digits)))):
        field.add_rows(total, total.copy(), every)
        for array, digit in zip(arrays, digits, strict=True):
            if bit < len(digit) and digit[bit]:
                field.add_rows(total, array, every if digit[bit] > 0 else -every)
    return total


def _non_adjacent(weight: int) -> list[int]:
    """Digits -1, 0, 1 of a positive integer, least first; of two neighbours one is 0."""
    digits = []
    while weight:
        digit = 2 - weight % 4 if weight % 2 else 0
        digits.append(digit)
        weight = (weight - digit) // 2
    return digits
