"""Pedersen commitments x G + rho H, many at a time, from tables of multiples of G and H.

    H           hashed to the curve (RFC 9380): nobody knows its discrete log
    x, rho      exponents (m,) int64 and scalars (m, 4)

The rows are named by secret digits: not constant time. Source: Pedersen 1991.
"""

from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import numpy as np
import numpy.typing as npt

from tasks.crypto import backend, field
from tasks.crypto.curve import GENERATOR, Point, add, aligned, longs, multiply, negate, progression, whole, words
from tasks.crypto.field import ORDER, Words
from tasks.crypto.hash_to_curve import hash_to_curve

H: Point = hash_to_curve(b"pedersen base H", b"HealChain-V01-CS01-with-secp256k1_XMD:SHA-256_SSWU_RO_")
HALF_GENERATOR = multiply((ORDER + 1) // 2, GENERATOR)

WINDOW, WINDOWS, EXPONENT_WINDOWS = 16, 16, 4
_FULL, _HALF = 2**WINDOW, 2 ** (WINDOW - 1)
_EXPONENT_ROWS = _FULL + (WINDOWS - 1) * _HALF  # where those of x begin
_ROWS = _EXPONENT_ROWS + EXPONENT_WINDOWS * _HALF
_BUILDING = Lock()


@dataclass(frozen=True, eq=False)
class Commitments:
    """Rows from which commitments x G + rho H are added: 42 MiB, built in a moment, never changed.

    rho     sixteen odd digits of 16 bits, D_j = 2 U_j - 2**16 + 1, see `field.recode`. Window 0 has 2**16 rows, one for
            each U_0: D_0 H - G / 2. Window j > 0 has the 2**15 rows 1, 3, 5, ... times 2**(16 j) H
    x       2 x + 1 in odd digits over G / 2: four windows of 2**15 rows 1, 3, 5, ... times 2**(16 j) G / 2. A bound
            below 2**15 takes one window, below 2**31 two

    A digit is never zero, so no addition is ever left out; the halves of G cancel: (x + 1/2) G + rho H - G / 2.
    Alone, x gives (x + 1/2) G, which is never infinity; and E - rho H with window 0 is E - rho H - G / 2.
    """

    table: Words  # (688 128, 8), read-only

    def __post_init__(self) -> None:
        if words(self.table, 8, "table").shape[0] != _ROWS:
            raise ValueError(f"a table has {_ROWS} rows, got {len(self.table)}")

    @classmethod
    def build(cls) -> "Commitments":
        parts = [progression(add(multiply(ORDER - _FULL + 1, H), negate(HALF_GENERATOR)), add(H, H), _FULL)]
        shifted = {WINDOWS: H, EXPONENT_WINDOWS: HALF_GENERATOR}
        for windows, point in shifted.items():
            for j in range(windows):
                if j or windows == EXPONENT_WINDOWS:
                    parts.append(progression(point, add(point, point), _HALF))
                for _ in range(WINDOW):
                    point = add(point, point)
        table = aligned(sum(map(len, parts)))
        np.concatenate(parts, out=table)
        table.flags.writeable = False
        return cls(table)

    def commit(self, values: npt.NDArray[np.int64], rho: Words, bound: int) -> Words:
        """(m, 8) points values G + rho H; |values| <= bound makes the work independent of the largest one.

        The caller answers for values within the bound and rho below n; beyond, a point is a wrong one.
        """
        points = np.empty((len(values), 8), np.uint64)
        self.commit_into(points, values, rho, bound)
        return points

    def commit_into(self, points: Words, values: npt.NDArray[np.int64], rho: Words, bound: int) -> None:
        """`commit`, written to points (m, 8)."""
        values, rho = longs(values, "values"), words(rho, 4, "rho")
        _check_length(rho, len(values), "rho")
        _check_length(_written(points), len(values), "points")
        backend.add_rows(points, self.table, references_of(values, rho, bound), fresh=True)

    def half_exponents(self, values: npt.NDArray[np.int64], bound: int) -> Words:
        """(m, 8) points (values + 1/2) G."""
        references = _exponent_references(values, bound)
        points = np.empty((len(values), 8), np.uint64)
        backend.add_rows(points, self.table, references, fresh=True)
        return points

    def are_half_exponents(self, points: Words, values: npt.NDArray[np.int64], bound: int) -> npt.NDArray[np.bool_]:
        """(m,) whether points (m, 8) are (values + 1/2) G.

        Two windows, for bounds from 2**15 on and below 2**31, need no addition: their rows are odd multiples of G / 2
        and of 2**16 G / 2, which never agree in x.
        """
        _check_length(words(points, 8, "points"), len(values), "points")
        if exponent_windows(bound) != 2:
            return backend.equal_rows(self.half_exponents(values, bound), points)
        return backend.sums_hold(points, self.table, _exponent_references(values, bound))

    def take_off(self, points: Words, rho: Words) -> None:
        """points -= rho H + G / 2, in place."""
        rho = words(rho, 4, "rho")
        _check_length(rho, len(_written(points)), "rho")
        references = _references(WINDOWS, len(points))
        field.recode(rho, True, references)
        backend.add_rows(points, self.table, references)


def references_of(values: npt.NDArray[np.int64], rho: Words, bound: int) -> npt.NDArray[np.int32]:
    """References to the rows of commitments: sixteen windows of rho, then those of the values."""
    references = _references(WINDOWS + exponent_windows(bound), len(values))
    field.recode(rho, False, references)
    field.recode_exponents(values, _EXPONENT_ROWS, references[WINDOWS:])
    return references


def _exponent_references(values: npt.NDArray[np.int64], bound: int) -> npt.NDArray[np.int32]:
    """References to the rows of values + 1/2."""
    values = longs(values, "values")
    references = _references(exponent_windows(bound), len(values))
    field.recode_exponents(values, _EXPONENT_ROWS, references)
    return references


def exponent_windows(bound: int) -> int:
    """Windows for exponents x with |x| <= bound < 2**63: 2 |x| + 1 < 2**(16 windows)."""
    return whole(bound, "bound", 0, 2**63).bit_length() // WINDOW + 1


def _written(points: Words) -> Words:
    if not (points.flags.c_contiguous and points.flags.writeable):
        raise ValueError("points: expected an array in one piece that can be written to")
    return words(points, 8, "points")


def _check_length(rows: Words, length: int, name: str) -> None:
    if len(rows) != length:
        raise ValueError(f"{name} has {len(rows)} rows, expected {length}")


def _references(windows: int, count: int) -> npt.NDArray[np.int32]:
    """References to be written for `count` points: columns to a multiple of eight, the last ones to row 0."""
    columns = -(-count // 8) * 8
    references = np.empty((windows, columns), np.int32)
    references[:, count:] = 1
    return references


def commitments() -> Commitments:
    """The rows of this process, built at first use; threads that ask meanwhile wait, and share them."""
    with _BUILDING:
        return _commitments()


@lru_cache(maxsize=1)
def _commitments() -> Commitments:
    return Commitments.build()
