"""Hash to secp256k1, RFC 9380, suite secp256k1_XMD:SHA-256_SSWU_RO_: a point whose discrete log nobody knows.

    u           two field elements hashed from the message, 48 bytes each reduced mod p (sections 5.2, 5.3.1)
    E'          the curve y**2 = x**3 + A x + B that is 3-isogenous to secp256k1 and has A B != 0 (section 8.7)
    (xn, xd)    numerator and denominator of x in the isogeny E' -> secp256k1; (yn, yd) those of y / y' (appendix E.1)

Plain integers; it runs once per process.
"""

from hashlib import sha256

from tasks.crypto.curve import Point, add
from tasks.crypto.field import P

_A = 0x3F8731ABDD661ADCA08A5558F0F5D272E953D363CB6F0E5D405447C01A444533
_B = 1771
_Z = -11 % P

# Coefficients of appendix E.1, constant term first.
_X_NUMERATOR = (
    0x8E38E38E38E38E38E38E38E38E38E38E38E38E38E38E38E38E38E38DAAAAA8C7,
    0x07D3D4C80BC321D5B9F315CEA7FD44C5D595D2FC0BF63B92DFFF1044F17C6581,
    0x534C328D23F234E6E2A413DECA25CAECE4506144037C40314ECBD0B53D9DD262,
    0x8E38E38E38E38E38E38E38E38E38E38E38E38E38E38E38E38E38E38DAAAAA88C,
)
_X_DENOMINATOR = (
    0xD35771193D94918A9CA34CCBB7B640DD86CD409542F8487D9FE6B745781EB49B,
    0xEDADC6F64383DC1DF7C4B2D51B54225406D36B641F5E41BBC52A56612A8C6D14,
    1,
)
_Y_NUMERATOR = (
    0x4BDA12F684BDA12F684BDA12F684BDA12F684BDA12F684BDA12F684B8E38E23C,
    0xC75E0C32D5CB7C0FA9D0A54B12A0A6D5647AB046D686DA6FDFFC90FC201D71A3,
    0x29A6194691F91A73715209EF6512E576722830A201BE2018A765E85A9ECEE931,
    0x2F684BDA12F684BDA12F684BDA12F684BDA12F684BDA12F684BDA12F38E38D84,
)
_Y_DENOMINATOR = (
    0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEFFFFF93B,
    0x7A06534BB8BDB49FD5E9E6632722C2989467C1BFC8E8D978DFB425D2685C2573,
    0x6484AA716545CA2CF3A70C3FA8FE337E0A3D21162F0D6299A7BF8192BFD2A76F,
    1,
)


def hash_to_curve(message: bytes, tag: bytes) -> Point:
    """The point of a message; tag separates domains (1 to 255 bytes)."""
    data = _expand(message, tag, 96)
    u0, u1 = (int.from_bytes(part, "big") % P for part in (data[:48], data[48:]))
    return add(_map_to_curve(u0), _map_to_curve(u1))


def _expand(message: bytes, tag: bytes, length: int) -> bytes:
    """expand_message_xmd with SHA-256 (blocks of 64 bytes, digests of 32). length <= 255 * 32."""
    if not 1 <= len(tag) <= 255:
        raise ValueError(f"a tag has 1 to 255 bytes, got {len(tag)}")
    suffix = tag + bytes([len(tag)])
    first = sha256(bytes(64) + message + length.to_bytes(2, "big") + b"\0" + suffix).digest()
    blocks = [sha256(first + b"\1" + suffix).digest()]
    while 32 * len(blocks) < length:
        mixed = bytes(a ^ b for a, b in zip(first, blocks[-1], strict=True))
        blocks.append(sha256(mixed + bytes([len(blocks) + 1]) + suffix).digest())
    return b"".join(blocks)[:length]


def _map_to_curve(u: int) -> Point:
    """Simplified SWU to E' (section 6.6.2), then the isogeny (section 6.6.3)."""
    z = _Z * u * u % P
    t = (z * z + z) % P
    x = -_B * pow(_A, -1, P) * (1 + pow(t, -1, P)) % P if t else _B * pow(_Z * _A, -1, P) % P
    square = (x * x * x + _A * x + _B) % P
    if pow(square, (P - 1) // 2, P) == P - 1:
        x = z * x % P
        square = (x * x * x + _A * x + _B) % P
    y = pow(square, (P + 1) // 4, P)
    if y % 2 != u % 2:
        y = P - y
    # The denominators vanish for the kernel of the isogeny only, which goes to infinity.
    xd, yd = _evaluate(_X_DENOMINATOR, x), _evaluate(_Y_DENOMINATOR, x)
    if not xd:
        return Point(0, 0)
    return Point(
        _evaluate(_X_NUMERATOR, x) * pow(xd, -1, P) % P,
        y * _evaluate(_Y_NUMERATOR, x) * pow(yd, -1, P) % P,
    )


def _evaluate(coefficients: tuple[int, ...], x: int) -> int:
    return sum(c * pow(x, i, P) for i, c in enumerate(coefficients)) % P
