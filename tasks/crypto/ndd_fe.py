"""Functional encryption for weighted sums: non-interactive, designated decryptor (NDD-FE).

    protocol    here                 meaning
    i, k        miner, coordinate    0 <= k < d
    x_ik        values[k]            miner i's quantized coordinate, |x_ik| <= bound
    y_i         weights[i]           public weight of miner i, 0 < y_i < 2**16, the same for every coordinate
    G, H        GENERATOR, H         H is hashed to the curve (RFC 9380): nobody knows its discrete log
    K_iP, K_iA  publisher_mask, aggregator_mask      stream keys shared by i and P, i and A; made by `mask_key`
    r_ik, t_ik  their k-th scalars   AES-256-CTR, 32 bytes a scalar, little-endian, reduced mod n
    U_ik        ciphertext[k]        x_ik G + (r_ik + t_ik) H: a Pedersen commitment whose blinding is split in two
    f_k         functional_key[k]    sum_i y_i r_ik mod n, made by the publisher for one cohort and one round
    rho_k       rho[k]               f_k + sum_i y_i t_ik mod n, the blinding of the weighted sum
    m_k         m[k]                 sum_i y_i x_ik, found as a bounded discrete log and encoded again
    (m, rho)    the opening          sum_i y_i U_ik = m_k G + rho_k H, which anybody can check

Arrays: points (d, 8) and scalars (d, 4) uint64, little-endian limbs (`curve`). Every function that expands a mask has
`start`, the index of its first coordinate, so that chunks can be worked on alone, in any order and in threads (kernels
release the GIL); indices in errors count from the first coordinate of the whole.

The seam of a faster backend is `field`. Kernels index tables by secrets: they are not constant time.

Who may call what is decided elsewhere: the publisher makes ONE functional key a round (two, for different cohorts,
would open a single update by subtraction), and a mask key belongs to one salt, thus to one submission.

Source: the protocol's section NDD-FE. Errors: OutOfBound, InvalidEncoding, ValueError.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tasks.crypto import bsgs, curve, field
from tasks.crypto.bsgs import BabySteps, OutOfBound
from tasks.crypto.curve import CHUNK, FixedBase, InvalidEncoding, Point
from tasks.crypto.field import ORDER, Words
from tasks.crypto.hash_to_curve import hash_to_curve

__all__ = [
    "ORDER", "BabySteps", "H", "InvalidEncoding", "Label", "OutOfBound",
    "blinding", "decode_points", "decode_scalars", "derive_key", "derive_projection_key", "encode_points",
    "encode_scalars", "encrypt", "failing_coordinates", "failing_projections", "mask_key", "open_projection",
    "open_sum", "weighted_sum",
]  # fmt: skip

H: Point = hash_to_curve(b"pedersen base H", b"HealChain-V01-CS01-with-secp256k1_XMD:SHA-256_SSWU_RO_")

MAX_WEIGHT = 2**16


@dataclass(frozen=True)
class Label:
    """What a mask is bound to besides the salt: a deployment of the contracts, a task, a round."""

    domain: bytes  # 32 bytes, the EIP-712 domain separator
    task_id: str
    round_number: int


def mask_key(shared_secret: bytes, role: Literal["publisher", "aggregator"], label: Label, salt: bytes) -> bytes:
    """32-byte key of a miner's mask stream: K_iP or K_iA.

    shared_secret: 32 bytes of ECDH between the miner and the role's holder. salt: 16 fresh random bytes a submission.
    """
    if role not in ("publisher", "aggregator"):
        raise ValueError(f"no mask for the role {role!r}")
    for name, value, length in (("shared secret", shared_secret, 32), ("domain", label.domain, 32), ("salt", salt, 16)):
        if len(value) != length:
            raise ValueError(f"expected a {name} of {length} bytes, got {len(value)}")
    # A length before every field: no two different labels have the same encoding.
    fields = (label.domain, label.task_id.encode(), label.round_number.to_bytes(8, "big"), salt)
    info = f"mask-{role}|".encode() + b"".join(len(item).to_bytes(4, "big") + item for item in fields)
    return HKDF(SHA256(), length=32, salt=None, info=info).derive(shared_secret)


# --- the miner ------------------------------------------------------------------------------------------------------


def encrypt(
    values: npt.NDArray[np.int64], publisher_mask: bytes, aggregator_mask: bytes, *, bound: int, start: int = 0
) -> Words:
    """(d, 8) ciphertext x_k G + (r_k + t_k) H of the (d,) int64 values, which are coordinates start .. start + d - 1.

    Raises ValueError naming the first coordinate with |value| > bound.
    """
    if not 1 <= bound < 2**63:
        raise ValueError(f"bound {bound} is not in [1, 2**63)")
    values = _integers(values, "values")
    outside = np.flatnonzero((values > bound) | (values < -bound))
    if len(outside):
        worst = int(outside[0])
        raise ValueError(f"coordinate {start + worst} is {values[worst]}, outside +-{bound}")
    ciphertext = np.empty((len(values), 8), np.uint64)
    for chunk in _chunks(len(values)):
        rho = _sum_streams([publisher_mask, aggregator_mask], [1, 1], chunk, start)
        ciphertext[chunk] = _commit(values[chunk], rho, bound)
    return ciphertext


# --- the publisher --------------------------------------------------------------------------------------------------


def derive_key(publisher_masks: Sequence[bytes], weights: Sequence[int], length: int, *, start: int = 0) -> Words:
    """(length, 4) functional key f_k = sum_i y_i r_ik for coordinates start .. start + length - 1."""
    _check_weights(weights, len(publisher_masks))
    key = np.empty((length, 4), np.uint64)
    for chunk in _chunks(length):
        key[chunk] = _sum_streams(publisher_masks, weights, chunk, start)
    return key


def derive_projection_key(publisher_mask: bytes, coefficients: npt.NDArray[np.int64]) -> Words:
    """(K, 4) audit keys sum_k a_k r_ik of one miner, for K rows a of +-1: coefficients (K, d), all d coordinates.

    K projections are K linear equations in the update: the publisher keeps the K of a round far below d.
    """
    return _project_stream(publisher_mask, _signs(coefficients))


# --- the aggregator -------------------------------------------------------------------------------------------------


def blinding(
    functional_key: Words, aggregator_masks: Sequence[bytes], weights: Sequence[int], *, start: int = 0
) -> Words:
    """(d, 4) blinding rho_k = f_k + sum_i y_i t_ik of the weighted sum."""
    _check_weights(weights, len(aggregator_masks))
    functional_key = curve.words(functional_key, 4, "functional key")
    rho = np.empty_like(functional_key)
    for chunk in _chunks(len(rho)):
        rho[chunk] = _sum_streams(aggregator_masks, weights, chunk, start, functional_key[chunk])
    return rho


def open_sum(
    functional_key: Words,
    aggregator_masks: Sequence[bytes],
    ciphertexts: Sequence[Words],
    weights: Sequence[int],
    *,
    bound: int,
    table: BabySteps | None = None,
    start: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[npt.NDArray[np.int64], Words]:
    """The opening (m, rho) of the weighted sum: m (d,) int64 with |m_k| <= bound, rho (d, 4).

    Raises OutOfBound with the coordinates when a key, weight, mask or ciphertext is not the right one, or a sum is too
    large: what is returned has been encoded again and compared.
    """
    rho = blinding(functional_key, aggregator_masks, weights, start=start)
    sums = weighted_sum(ciphertexts, weights)
    _check_length(rho, len(sums), "functional key")
    return _open(sums, rho, bound, table, start, progress), rho


def open_projection(
    projection_key: Words,
    aggregator_mask: bytes,
    ciphertext: Words,
    coefficients: npt.NDArray[np.int64],
    *,
    bound: int,
    table: BabySteps | None = None,
) -> tuple[npt.NDArray[np.int64], Words]:
    """The openings of <a, x_i> for one miner: values (K,) int64, |value| <= bound, and rho (K, 4).

    coefficients (K, d) of +-1, ciphertext (d, 8), projection_key (K, 4).
    Raises OutOfBound with the projections' indices.
    """
    signs = _signs(coefficients)
    own = _project_stream(aggregator_mask, signs)
    projection_key = curve.words(projection_key, 4, "projection key")
    _check_length(projection_key, len(signs), "projection key")
    sums = np.zeros((len(own), 5), np.uint64)
    field.accumulate(sums, own, np.uint64(1))
    field.accumulate(sums, projection_key, np.uint64(1))
    rho = _reduce(sums)
    return _open(_project_points(ciphertext, signs), rho, bound, table, 0, None), rho


# --- anybody --------------------------------------------------------------------------------------------------------


def weighted_sum(ciphertexts: Sequence[Words], weights: Sequence[int]) -> Words:
    """(d, 8) points sum_i y_i U_ik. Correct for equal and opposite points too; infinity is a row of zeros."""
    _check_weights(weights, len(ciphertexts))
    arrays = [curve.words(ciphertext, 8, f"ciphertext {i}") for i, ciphertext in enumerate(ciphertexts)]
    for i, array in enumerate(arrays):
        _check_length(array, len(arrays[0]), f"ciphertext {i}")
    total = np.empty_like(arrays[0])
    for chunk in _chunks(len(total)):
        total[chunk] = curve.weigh([array[chunk] for array in arrays], weights)
    return total


def failing_coordinates(
    ciphertexts: Sequence[Words], weights: Sequence[int], m: npt.NDArray[np.int64], rho: Words
) -> list[int]:
    """The coordinates k where sum_i y_i U_ik != m_k G + rho_k H; [] means that the opening holds. Public data only."""
    return _failing(weighted_sum(ciphertexts, weights), m, rho)


def failing_projections(
    ciphertext: Words, coefficients: npt.NDArray[np.int64], values: npt.NDArray[np.int64], rho: Words
) -> list[int]:
    """The projections whose published opening (values, rho) does not hold for this miner's ciphertext."""
    return _failing(_project_points(ciphertext, _signs(coefficients)), values, rho)


# --- encodings ------------------------------------------------------------------------------------------------------


def encode_points(points: Words) -> bytes:
    """64 bytes a point, x then y, little-endian. Raises InvalidEncoding for what `decode_points` would refuse."""
    points = curve.words(points, 8, "points")
    _check_points(points)
    return points.astype("<u8").tobytes()


def decode_points(data: bytes) -> Words:
    """(d, 8) points from 64 bytes each. Raises InvalidEncoding naming the first point that is not on the curve."""
    points = _decode(data, 8)
    _check_points(points)
    return points


def encode_scalars(scalars: Words) -> bytes:
    """32 bytes a scalar, little-endian. Raises InvalidEncoding for one that is not below n."""
    scalars = curve.words(scalars, 4, "scalars")
    _check_scalars(scalars)
    return scalars.astype("<u8").tobytes()


def decode_scalars(data: bytes) -> Words:
    """(d, 4) scalars from 32 bytes each. Raises InvalidEncoding naming the first one that is not below n."""
    scalars = _decode(data, 4)
    _check_scalars(scalars)
    return scalars


def _decode(data: bytes, width: int) -> Words:
    if len(data) % (8 * width):
        raise InvalidEncoding(f"{len(data)} bytes are not a multiple of {8 * width}")
    return np.frombuffer(data, "<u8").astype(np.uint64).reshape(-1, width)


def _check_points(points: Words) -> None:
    index = field.first_invalid(points)
    if index >= 0:
        raise InvalidEncoding(f"point {index} is not a reduced point of the curve")


def _check_scalars(scalars: Words) -> None:
    sums = np.zeros((len(scalars), 5), np.uint64)
    sums[:, :4] = scalars
    unreduced = np.flatnonzero((_reduce(sums) != scalars).any(axis=1))
    if len(unreduced):
        raise InvalidEncoding(f"scalar {unreduced[0]} is not below the order")


# --- inside ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _blinding_base() -> FixedBase:
    """Multiples of H for whole scalars: 16 windows of 16 bits, 32 MiB, built at first use."""
    return FixedBase.build(H, window=16, windows=16)


def _chunks(length: int) -> Iterator[slice]:
    return (slice(first, min(first + CHUNK, length)) for first in range(0, length, CHUNK))


def _commit(values: npt.NDArray[np.int64], rho: Words, bound: int | None = None) -> Words:
    """(m, 8) points values G + rho H."""
    points = bsgs.encode_exponents(values, bound)
    _blinding_base().add_to(points, rho)
    return points


def _open(
    sums: Words,
    rho: Words,
    bound: int,
    table: BabySteps | None,
    start: int,
    progress: Callable[[int, int], None] | None,
) -> npt.NDArray[np.int64]:
    """Discrete logs of sums - rho H."""
    for chunk in _chunks(len(sums)):
        _blinding_base().add_to(sums[chunk], rho[chunk], negative=True)
    try:
        return bsgs.discrete_logs(sums, bound, table, progress)
    except OutOfBound as error:
        raise OutOfBound([start + k for k in error.coordinates], bound) from None


def _failing(sums: Words, m: npt.NDArray[np.int64], rho: Words) -> list[int]:
    m, rho = _integers(m, "m"), curve.words(rho, 4, "rho")
    _check_scalars(rho)
    _check_length(m, len(sums), "m")
    _check_length(rho, len(sums), "rho")
    failing = []
    for chunk in _chunks(len(sums)):
        differs = (_commit(m[chunk], rho[chunk]) != sums[chunk]).any(axis=1)
        failing += (chunk.start + np.flatnonzero(differs)).tolist()
    return failing


def _stream(key: bytes, start: int, length: int) -> Words:
    """(length, 4) raw 256-bit words of the mask stream from scalar `start` on: two AES blocks a scalar.

    Reduced mod n they are within 2**-127 of uniform: 2**256 - n is about 2**128.
    """
    if len(key) != 32:
        raise ValueError(f"a mask key has 32 bytes, got {len(key)}")
    cipher = Cipher(AES(key), CTR((2 * start).to_bytes(16, "big"))).encryptor()
    return np.frombuffer(cipher.update(bytes(32 * length)), "<u8").astype(np.uint64).reshape(-1, 4)


def _sum_streams(
    keys: Sequence[bytes], weights: Sequence[int], chunk: slice, start: int, initial: Words | None = None
) -> Words:
    """(m, 4) scalars initial + sum_i weights[i] * stream i over one chunk. Weights sum up to less than 2**64."""
    length = chunk.stop - chunk.start
    sums = np.zeros((length, 5), np.uint64)
    if initial is not None:
        sums[:, :4] = initial
    for key, weight in zip(keys, weights, strict=True):
        field.accumulate(sums, _stream(key, start + chunk.start, length), np.uint64(weight))
    return _reduce(sums)


def _reduce(sums: Words) -> Words:
    scalars = np.empty((len(sums), 4), np.uint64)
    field.reduce_scalars(sums, scalars)
    return scalars


def _project_stream(key: bytes, signs: npt.NDArray[np.int8]) -> Words:
    sums = np.zeros((len(signs), 5), np.uint64)
    for chunk in _chunks(signs.shape[1]):
        scalars = _sum_streams([key], [1], chunk, 0)
        field.project(scalars, np.ascontiguousarray(signs[:, chunk]), sums)
    return _reduce(sums)


def _project_points(ciphertext: Words, signs: npt.NDArray[np.int8]) -> Words:
    """(K, 8) points sum_k a_k U_k. 64 partial sums a row, so that few projections still fill a batch."""
    ciphertext = curve.words(ciphertext, 8, "ciphertext")
    count, length = signs.shape
    _check_length(ciphertext, length, "ciphertext")
    columns = -(-length // 64)
    references = np.zeros((count, 64 * columns), np.int32)
    references[:, :length] = signs * np.arange(1, length + 1, dtype=np.int32)
    partial = np.zeros((64 * count, 8), np.uint64)
    field.add_rows(partial, ciphertext, np.ascontiguousarray(references.reshape(64 * count, columns).T))
    return curve.sum_points(partial.reshape(count, 64, 8).swapaxes(0, 1))


def _signs(coefficients: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
    signs = np.asarray(coefficients)
    if signs.ndim != 2 or not np.isin(signs, (-1, 1)).all():
        raise ValueError(f"expected coefficients +-1 of shape (K, d), got shape {signs.shape}")
    return np.ascontiguousarray(signs, dtype=np.int8)


def _integers(values: npt.ArrayLike, name: str) -> npt.NDArray[np.int64]:
    integers = np.asarray(values)
    if integers.ndim != 1 or integers.dtype != np.int64:
        raise ValueError(f"{name}: expected int64 of shape (d,), got {integers.dtype} of shape {integers.shape}")
    return integers


def _check_weights(weights: Sequence[int], count: int) -> None:
    if len(weights) != count or not count:
        raise ValueError(f"{len(weights)} weights for {count} miners")
    for i, weight in enumerate(weights):
        if not 0 < weight < MAX_WEIGHT:
            raise ValueError(f"weight {i} is {weight}, not in [1, {MAX_WEIGHT})")


def _check_length(rows: npt.NDArray[np.int64] | Words, length: int, name: str) -> None:
    if len(rows) != length:
        raise ValueError(f"{name} has {len(rows)} rows, expected {length}")
