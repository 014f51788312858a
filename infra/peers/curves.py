"""The same group in other hands: libsecp256k1 through coincurve, python-ecdsa, and a Python dictionary of baby steps.

Masks are drawn before the clock starts, and points are parsed: the peers do curve arithmetic only, on one core.
"""

import random
import time
from functools import lru_cache
from typing import Any

from answering import answer
from coincurve import PublicKey
from ecdsa import SECP256k1
from ecdsa.ellipticcurve import PointJacobi

ORDER = SECP256k1.order
RANDOM = random.Random(0)  # measured, not kept secret
G = PublicKey.from_secret((1).to_bytes(32, "big"))
H = PublicKey.from_secret(RANDOM.randrange(ORDER).to_bytes(32, "big"))  # costs what any other point costs


def scalar() -> bytes:
    return RANDOM.randrange(1, ORDER).to_bytes(32, "big")


def encrypt(count: int, bound: int) -> dict[str, Any]:
    """x G + rho H for |x| <= bound: multiply H, then tweak by x, which is faster than two products and a sum.

    A tweak is positive and a short one is fast, so bound + 1 is added to every x.
    """
    work = [(RANDOM.randrange(1, 2 * bound + 2).to_bytes(32, "big"), scalar()) for _ in range(count)]
    started = time.perf_counter()
    for value, rho in work:
        H.multiply(rho).add(value, update=True)
    return {"seconds": time.perf_counter() - started}


def encrypt_tables(count: int, bound: int) -> dict[str, Any]:
    """x H + rho G for |x| <= bound, the fastest way here: a table of all x H, rho by the generator's own tables, a sum.

    The bases have changed places, for libsecp256k1 multiplies its generator much faster than any other point.
    """
    table = _multiples_of_h(bound)
    work = [(RANDOM.randrange(2 * bound + 1), scalar()) for _ in range(count)]
    started = time.perf_counter()
    for value, rho in work:
        PublicKey.combine_keys([table[value], PublicKey.from_valid_secret(rho)])
    return {"seconds": time.perf_counter() - started}


@lru_cache
def _multiples_of_h(bound: int) -> list[PublicKey]:
    """x H for x in 1 .. 2 bound + 1: as many as there are values, and none of them infinity."""
    return [H.multiply(x.to_bytes(32, "big")) for x in range(1, 2 * bound + 2)]


def encrypt_python(count: int, bound: int) -> dict[str, Any]:
    """x G + rho H with python-ecdsa on gmpy2 integers; both bases have its tables of doublings."""
    base, blinding = SECP256k1.generator, _python_h()
    work = [(RANDOM.randrange(-bound, bound + 1) % ORDER, RANDOM.randrange(1, ORDER)) for _ in range(count)]
    started = time.perf_counter()
    for value, rho in work:
        (base * value + blinding * rho).to_affine()
    return {"seconds": time.perf_counter() - started}


@lru_cache
def _python_h() -> PointJacobi:
    x, y = H.point()
    point = PointJacobi(SECP256k1.curve, x, y, 1, ORDER, generator=True)
    point * 2  # the table is made at the first product
    return point


def aggregate(count: int, miners: int) -> dict[str, Any]:
    """sum_i U_i - rho G for unit weights: one call of combine for all points, rho already summed and negated."""
    points = [[H.multiply(scalar()) for _ in range(miners)] for _ in range(count)]
    masks = [scalar() for _ in range(count)]
    started = time.perf_counter()
    for row, rho in zip(points, masks, strict=True):
        PublicKey.combine_keys([*row, PublicKey.from_valid_secret(rho)])
    return {"seconds": time.perf_counter() - started}


def combine(count: int, points: int) -> dict[str, Any]:
    """Sums of many points in one call each: what an addition costs where it costs least."""
    many = [H.multiply(scalar()) for _ in range(points)]
    started = time.perf_counter()
    for _ in range(count):
        PublicKey.combine_keys(many)
    return {"seconds": time.perf_counter() - started}


def recover(count: int, bound: int, size: int) -> dict[str, Any]:
    """Exponents of x G, |x| <= bound, with a dictionary of `size` baby steps; the table is made before the clock starts.

    Keys are x coordinates, so a step finds both signs, and 32 bytes equal are the check of the result.
    """
    table = _table(size)
    stride = 2 * size + 1
    up, down = (_multiple(sign * stride) for sign in (1, -1))
    values = [RANDOM.randrange(-bound, bound + 1) or 1 for _ in range(count)]
    points = [_multiple(value) for value in values]
    started = time.perf_counter()
    found = [_logarithm(point, table, stride, up, down, bound) for point in points]
    seconds = time.perf_counter() - started
    if found != values:
        raise AssertionError(f"the dictionary finds {found[:4]}, expected {values[:4]}")
    return {"seconds": seconds}


@lru_cache(maxsize=1)
def _table(size: int) -> dict[bytes, int]:
    """x of j G, and whether its y is odd, as 2 j + parity."""
    table, point, one = {}, G, (1).to_bytes(32, "big")
    for step in range(1, size + 1):
        data = point.format()
        table[data[1:]] = 2 * step + (data[0] & 1)
        point = point.add(one)
    return table


def _multiple(value: int) -> PublicKey:
    return PublicKey.from_secret((value % ORDER).to_bytes(32, "big"))


def _logarithm(
    point: PublicKey, table: dict[bytes, int], stride: int, up: PublicKey, down: PublicKey, bound: int
) -> int | None:
    """The exponent, trying giant steps 0, -1, +1, -2, ... of `stride`."""
    lower = higher = point
    for giant in range(bound // stride + 2):
        for centre, shifted in ((giant * stride, lower), (-giant * stride, higher)):
            data = shifted.format()
            if (entry := table.get(data[1:])) is not None:
                step = entry >> 1
                return centre + (step if (entry ^ data[0]) & 1 == 0 else -step)
            if giant == 0:
                break
        lower, higher = _sum(lower, down), _sum(higher, up)
    return None


def _sum(a: PublicKey, b: PublicKey) -> PublicKey:
    return PublicKey.combine_keys([a, b])


answer(
    {
        "encrypt": encrypt,
        "encrypt_tables": encrypt_tables,
        "encrypt_python": encrypt_python,
        "aggregate": aggregate,
        "combine": combine,
        "recover": recover,
    }
)
