"""The slow twin of `tasks/crypto`: plain integers, written from the protocol, sharing no code with it.

points      (x, y) tuples of ints, None for infinity
scalars     ints mod N
ciphertext  list of points, one a coordinate
"""

import hashlib
import hmac

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

P = 2**256 - 2**32 - 977
N = 115792089237316195423570985008687907852837564279074904382605163141518161494337
G = (
    55066263022277343669578718895168534326250603453777594175500187360389116729240,
    32670510020758816978083085130507043184471273380659243275938904335757337482424,
)

Coordinates = tuple[int, int] | None


def on_curve(point: Coordinates) -> bool:
    return point is None or (point[1] ** 2 - point[0] ** 3 - 7) % P == 0


def add(a: Coordinates, b: Coordinates, curve_a: int = 0) -> Coordinates:
    """Chord and tangent on y**2 = x**3 + curve_a x + b."""
    if a is None or b is None:
        return a or b
    (x1, y1), (x2, y2) = a, b
    if x1 == x2:
        if (y1 + y2) % P == 0:
            return None
        slope = (3 * x1 * x1 + curve_a) * pow(2 * y1, -1, P) % P
    else:
        slope = (y2 - y1) * pow(x2 - x1, -1, P) % P
    x3 = (slope * slope - x1 - x2) % P
    return x3, (slope * (x1 - x3) - y1) % P


def negate(point: Coordinates) -> Coordinates:
    return point and (point[0], -point[1] % P)


def multiply(k: int, point: Coordinates) -> Coordinates:
    """k * point for any integer k, from the highest bit of k mod N down."""
    result = None
    for bit in bin(k % N)[2:]:
        result = add(result, result)
        if bit == "1":
            result = add(result, point)
    return result


# --- RFC 9380 -------------------------------------------------------------------------------------------------------

ISO_A = 0x3F8731ABDD661ADCA08A5558F0F5D272E953D363CB6F0E5D405447C01A444533
ISO_B = 1771
# x of the kernel of the isogeny, a root of the 3-division polynomial of E' (the tests check that it is one).
KERNEL_X = -0xEDADC6F64383DC1DF7C4B2D51B54225406D36B641F5E41BBC52A56612A8C6D14 * pow(2, -1, P) % P


def is_square(a: int) -> bool:
    return pow(a, (P - 1) // 2, P) in (0, 1)


def expand_message(message: bytes, tag: bytes, length: int) -> bytes:
    suffix = tag + len(tag).to_bytes(1, "big")
    b0 = hashlib.sha256(b"\0" * 64 + message + length.to_bytes(2, "big") + b"\0" + suffix).digest()
    previous, output, i = bytes(32), b"", 1
    while len(output) < length:
        mixed = (int.from_bytes(b0, "big") ^ int.from_bytes(previous, "big")).to_bytes(32, "big")
        previous = hashlib.sha256(mixed + i.to_bytes(1, "big") + suffix).digest()
        output += previous
        i += 1
    return output[:length]


def velu(point: Coordinates) -> Coordinates:
    """The 3-isogeny E' -> secp256k1 with kernel x = KERNEL_X, by Velu's formulas, scaled by 3.

    Independent of the RFC's coefficient tables. With t = 6 q**2 + 2 A, u = 4 y_q**2:
    X = x + t / (x - q) + u / (x - q)**2, Y = y (1 - t / (x - q)**2 - 2 u / (x - q)**3), then (X / 9, Y / 27).
    """
    x, y = point
    t = 6 * KERNEL_X**2 + 2 * ISO_A
    u = 4 * (KERNEL_X**3 + ISO_A * KERNEL_X + ISO_B)
    w = pow(x - KERNEL_X, -1, P)
    X = x + t * w + u * w * w
    Y = y * (1 - t * w * w - 2 * u * w**3)
    return X * pow(9, -1, P) % P, Y * pow(27, -1, P) % P


def sswu(u: int) -> tuple[int, int]:
    """Section 6.6.2 by its definition: x1, or x2 = Z u**2 x1 when g(x1) is not a square."""
    denominator = (121 * u**4 - 11 * u**2) % P
    if denominator:
        x1 = -ISO_B * pow(ISO_A, -1, P) * (1 + pow(denominator, -1, P)) % P
    else:
        x1 = ISO_B * pow(-11 * ISO_A, -1, P) % P
    for x in (x1, -11 * u * u * x1 % P):
        g = (x**3 + ISO_A * x + ISO_B) % P
        if is_square(g):
            y = pow(g, (P + 1) // 4, P)
            return x, y if y % 2 == u % 2 else -y % P
    raise AssertionError("one of the two is a square")


def hash_to_field(message: bytes, tag: bytes) -> tuple[int, int]:
    data = expand_message(message, tag, 96)
    return int.from_bytes(data[:48], "big") % P, int.from_bytes(data[48:], "big") % P


def hash_to_curve(message: bytes, tag: bytes) -> Coordinates:
    """The two points are added on E', before the isogeny; the fast code adds after it."""
    u0, u1 = hash_to_field(message, tag)
    return velu(add(sswu(u0), sswu(u1), ISO_A))


H = hash_to_curve(b"pedersen base H", b"HealChain-V01-CS01-with-secp256k1_XMD:SHA-256_SSWU_RO_")

# --- the scheme -----------------------------------------------------------------------------------------------------


def mask_key(secret: bytes, role: str, domain: bytes, task_id: str, round_number: int, salt: bytes) -> bytes:
    """HKDF-SHA256 (RFC 5869) without salt, one block of output."""
    info = b"mask-" + role.encode() + b"|"
    for item in (domain, task_id.encode(), round_number.to_bytes(8, "big"), salt):
        info += len(item).to_bytes(4, "big") + item
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, info + b"\1", "sha256")


def mask(key: bytes, k: int) -> int:
    """The k-th scalar of a mask stream: AES-256 of the counters 2 k and 2 k + 1."""
    aes = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    blocks = aes.update((2 * k).to_bytes(16, "big") + (2 * k + 1).to_bytes(16, "big"))
    return int.from_bytes(blocks, "little") % N


def encrypt(values: list[int], publisher_mask: bytes, aggregator_mask: bytes, start: int = 0) -> list[Coordinates]:
    return [
        add(multiply(x, G), multiply(mask(publisher_mask, k) + mask(aggregator_mask, k), H))
        for k, x in enumerate(values, start)
    ]


def derive_key(publisher_masks: list[bytes], weights: list[int], length: int, start: int = 0) -> list[int]:
    pairs = list(zip(publisher_masks, weights, strict=True))
    return [sum(y * mask(key, k) for key, y in pairs) % N for k in range(start, start + length)]


def blinding(key: list[int], aggregator_masks: list[bytes], weights: list[int], start: int = 0) -> list[int]:
    own = derive_key(aggregator_masks, weights, len(key), start)
    return [(f + t) % N for f, t in zip(key, own, strict=True)]


def weighted_sum(ciphertexts: list[list[Coordinates]], weights: list[int]) -> list[Coordinates]:
    total: list[Coordinates] = [None] * len(ciphertexts[0])
    for ciphertext, y in zip(ciphertexts, weights, strict=True):
        total = [add(s, multiply(y, U)) for s, U in zip(total, ciphertext, strict=True)]
    return total


def discrete_log(point: Coordinates, bound: int) -> int | None:
    """The exponent in [-bound, bound], by trying all; None if there is none."""
    plus = minus = None
    for m in range(bound + 1):
        if point == plus:
            return m
        if point == minus:
            return -m
        plus, minus = add(plus, G), add(minus, negate(G))
    return None


def decrypt(
    key: list[int], aggregator_masks: list[bytes], ciphertexts: list[list[Coordinates]], weights: list[int], bound: int
) -> tuple[list[int | None], list[int]]:
    rho = blinding(key, aggregator_masks, weights)
    sums = weighted_sum(ciphertexts, weights)
    return [discrete_log(add(s, multiply(-b, H)), bound) for s, b in zip(sums, rho, strict=True)], rho


def opens(point: Coordinates, m: int, rho: int) -> bool:
    return point == add(multiply(m, G), multiply(rho, H))


# --- the encoding of points -----------------------------------------------------------------------------------------

# The cube root of 1 that libsecp256k1 uses for its endomorphism.
BETA = 0x7AE96A2B657C07106E64479EAC3434E99CF0497512F58995C1396C28719501EE


def encode_points(points: list[tuple[int, int]]) -> bytes:
    """x1, x2, y1 + y2 for two points; x1, p + k, y1 for (x1, y1) and (x1 beta**k, -y1); x, y for an odd last one."""
    numbers = []
    for i in range(0, len(points) - 1, 2):
        (x1, y1), (x2, y2) = points[i], points[i + 1]
        if (y1 + y2) % P:
            numbers += [x1, x2, (y1 + y2) % P]
        else:
            numbers += [x1, P + [x1 * BETA**k % P for k in range(3)].index(x2), y1]
    if len(points) % 2:
        numbers += points[-1]
    return b"HCP\x02" + len(points).to_bytes(4, "little") + b"".join(n.to_bytes(32, "little") for n in numbers)
