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
`start`, the index of its first coordinate, so that chunks can be worked on alone and in any order; indices in errors count
from the first coordinate of the whole. `threads`: how many to use, for kernels release the GIL.

The arithmetic is that of `backend`. Kernels index tables by secrets: they are not constant time.

Who may call what is decided elsewhere: the publisher makes ONE functional key a round (two, for different cohorts,
would open a single update by subtraction), and a mask key belongs to one salt, thus to one submission.

Source: the protocol's section NDD-FE. Errors: OutOfBound, InvalidEncoding, ValueError.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tasks.crypto import backend, bsgs, curve, field
from tasks.crypto.bsgs import BabySteps, OutOfBound
from tasks.crypto.curve import CHUNK, InvalidEncoding
from tasks.crypto.field import ORDER, Words
from tasks.crypto.pedersen import H, commitments

__all__ = [
    "ORDER", "BabySteps", "H", "InvalidEncoding", "Label", "OutOfBound",
    "blinding", "decode_points", "decode_scalars", "derive_key", "derive_projection_key", "encode_points",
    "encode_scalars", "encoded_size", "encrypt", "failing_coordinates", "failing_projections", "mask_key",
    "open_projection", "open_sum", "weighted_sum",
]  # fmt: skip

MAX_WEIGHT = 2**16
_POINTS_HEADER = b"HCP\x02"
_ZEROS = memoryview(bytes(32 * CHUNK))  # a stream is the encryption of zeros

Signs = npt.NDArray[np.int8] | npt.NDArray[np.int64]


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
    curve.whole(label.round_number, "round", 0, 2**64)
    # A length before every field: no two different labels have the same encoding.
    fields = (label.domain, label.task_id.encode(), label.round_number.to_bytes(8, "big"), salt)
    info = f"mask-{role}|".encode() + b"".join(len(item).to_bytes(4, "big") + item for item in fields)
    return HKDF(SHA256(), length=32, salt=None, info=info).derive(shared_secret)


# --- the miner ------------------------------------------------------------------------------------------------------


def encrypt(
    values: npt.NDArray[np.int64],
    publisher_mask: bytes,
    aggregator_mask: bytes,
    *,
    bound: int,
    start: int = 0,
    threads: int = 1,
) -> Words:
    """(d, 8) ciphertext x_k G + (r_k + t_k) H of the (d,) int64 values, which are coordinates start .. start + d - 1.

    Raises ValueError naming the first coordinate with |value| > bound.
    """
    values, bound = curve.longs(values, "values"), curve.whole(bound, "bound", 1, 2**63)
    start = _checked_start(start, len(values))
    if values.max(initial=0) > bound or values.min(initial=0) < -bound:
        worst = int(np.flatnonzero((values > bound) | (values < -bound))[0])
        raise ValueError(f"coordinate {start + worst} is {values[worst]}, outside +-{bound}")
    ciphertext = np.empty((len(values), 8), np.uint64)
    tables = commitments()

    def work(chunk: slice) -> None:
        rho = _sum_streams([publisher_mask, aggregator_mask], [1, 1], chunk, start)
        tables.commit_into(ciphertext[chunk], values[chunk], rho, bound)

    backend.spread(work, len(values), CHUNK, threads)
    return ciphertext


# --- the publisher --------------------------------------------------------------------------------------------------


def derive_key(
    publisher_masks: Sequence[bytes], weights: Sequence[int], length: int, *, start: int = 0, threads: int = 1
) -> Words:
    """(length, 4) functional key f_k = sum_i y_i r_ik for coordinates start .. start + length - 1."""
    weights = _checked_weights(weights, len(publisher_masks))
    length = curve.whole(length, "length", 0, 2**48)
    start = _checked_start(start, length)
    key = np.empty((length, 4), np.uint64)

    def work(chunk: slice) -> None:
        key[chunk] = _sum_streams(publisher_masks, weights, chunk, start)

    backend.spread(work, length, CHUNK, threads)
    return key


def derive_projection_key(publisher_mask: bytes, coefficients: Signs) -> Words:
    """(K, 4) audit keys sum_k a_k r_ik of one miner, for K rows a of +-1: coefficients (K, d), all d coordinates.

    K projections are K linear equations in the update: the publisher keeps the K of a round far below d.
    """
    return _project_stream(publisher_mask, _signs(coefficients))


# --- the aggregator -------------------------------------------------------------------------------------------------


def blinding(
    functional_key: Words,
    aggregator_masks: Sequence[bytes],
    weights: Sequence[int],
    *,
    start: int = 0,
    threads: int = 1,
) -> Words:
    """(d, 4) blinding rho_k = f_k + sum_i y_i t_ik of the weighted sum."""
    weights = _checked_weights(weights, len(aggregator_masks))
    functional_key = curve.words(functional_key, 4, "functional key")
    start = _checked_start(start, len(functional_key))
    rho = np.empty_like(functional_key)

    def work(chunk: slice) -> None:
        rho[chunk] = _sum_streams(aggregator_masks, weights, chunk, start, functional_key[chunk])

    backend.spread(work, len(rho), CHUNK, threads)
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
    threads: int = 1,
) -> tuple[npt.NDArray[np.int64], Words]:
    """The opening (m, rho) of the weighted sum: m (d,) int64 with |m_k| <= bound, rho (d, 4).

    Raises OutOfBound with the coordinates when a key, weight, mask or ciphertext is not the right one, or a sum is too
    large: what is returned has been encoded again and compared.
    """
    sums, rho = blinded_sum(functional_key, aggregator_masks, ciphertexts, weights, start=start, threads=threads)
    return _logs(sums, bound, table, start, progress, threads), rho


def blinded_sum(
    functional_key: Words,
    aggregator_masks: Sequence[bytes],
    ciphertexts: Sequence[Words],
    weights: Sequence[int],
    *,
    start: int = 0,
    threads: int = 1,
) -> tuple[Words, Words]:
    """E_k - G / 2, (d, 8), whose logs are m_k - 1/2, and rho (d, 4): all of decryption but the recovery."""
    rho = blinding(functional_key, aggregator_masks, weights, start=start, threads=threads)
    sums = weighted_sum(ciphertexts, weights, threads=threads)
    _check_length(rho, len(sums), "functional key")
    _take_off(sums, rho, threads)
    return sums, rho


def open_projection(
    projection_key: Words,
    aggregator_mask: bytes,
    ciphertext: Words | Iterable[Words],
    coefficients: Signs,
    *,
    bound: int,
    table: BabySteps | None = None,
) -> tuple[npt.NDArray[np.int64], Words]:
    """The openings of <a, x_i> for one miner: values (K,) int64, |value| <= bound, and rho (K, 4).

    coefficients (K, d) of +-1, ciphertext (d, 8) or its consecutive chunks (n, 8), projection_key (K, 4). Of chunks, one
    at a time is in memory.
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
    projected = _project_points(ciphertext, signs)
    _take_off(projected, rho, 1)
    return _logs(projected, bound, table, 0, None, 1), rho


# --- anybody --------------------------------------------------------------------------------------------------------


def weighted_sum(ciphertexts: Sequence[Words], weights: Sequence[int], *, threads: int = 1) -> Words:
    """(d, 8) points sum_i y_i U_ik. Correct for equal and opposite points too; infinity is a row of zeros."""
    weights = _checked_weights(weights, len(ciphertexts))
    arrays = [curve.words(ciphertext, 8, f"ciphertext {i}") for i, ciphertext in enumerate(ciphertexts)]
    for i, array in enumerate(arrays):
        _check_length(array, len(arrays[0]), f"ciphertext {i}")
    total = np.empty_like(arrays[0])

    def work(chunk: slice) -> None:
        curve.weigh(total[chunk], [array[chunk] for array in arrays], weights)

    backend.spread(work, len(total), 4 * CHUNK, threads)
    return total


def failing_coordinates(
    ciphertexts: Sequence[Words],
    weights: Sequence[int],
    m: npt.NDArray[np.int64],
    rho: Words,
    *,
    threads: int = 1,
) -> list[int]:
    """The coordinates k where sum_i y_i U_ik != m_k G + rho_k H; [] means that the opening holds. Public data only."""
    return _failing(weighted_sum(ciphertexts, weights, threads=threads), m, rho, threads)


def failing_projections(
    ciphertext: Words | Iterable[Words], coefficients: Signs, values: npt.NDArray[np.int64], rho: Words
) -> list[int]:
    """The projections whose published opening (values, rho) does not hold for this miner's ciphertext, or its chunks."""
    return _failing(_project_points(ciphertext, _signs(coefficients)), values, rho, 1)


# --- encodings ------------------------------------------------------------------------------------------------------


def encode_points(points: Words) -> bytes:
    """The header, then 96 bytes for every two points, then 64 for an odd last one; numbers are little-endian.

    header: "HCP", the version 2 as a byte, and the number of points as 4 bytes, so that all elements are aligned.
    two points: x1, x2 and y1 + y2 mod p; where that is 0, x1, p + k and y1 for x2 = x1 times the k-th power of a cube root
    of 1 (`field.encode_pairs`). One point: x and y. Every list of points has one encoding.
    Raises InvalidEncoding for what is not a canonical point of the curve.
    """
    points = curve.words(points, 8, "points")
    _check_points(points, 0)
    encoded, even = np.empty(encoded_size(len(points)) // 8, np.uint64), len(points) & ~1
    encoded[0] = int.from_bytes(_POINTS_HEADER + len(points).to_bytes(4, "little"), "little")
    field.encode_pairs(points[:even], encoded[1 : 1 + 6 * even].reshape(-1, 12))
    encoded[1 + 6 * even :] = points[even:].reshape(-1)
    return encoded.astype("<u8", copy=False).tobytes()


def decode_points(data: bytes) -> Words:
    """(d, 8) points from what `encode_points` makes.

    Raises InvalidEncoding for another kind or version, another length, or naming the first points that are not on the curve
    or not in their one encoding.
    """
    header, count = data[:4], int.from_bytes(data[4:8], "little")
    if header != _POINTS_HEADER:
        known = "of another version" if header[:3] == _POINTS_HEADER[:3] else "not points"
        raise InvalidEncoding(f"data beginning {header!r} are {known}: expected {_POINTS_HEADER!r}")
    if len(data) != encoded_size(count):
        raise InvalidEncoding(f"{len(data)} bytes announce {count} points, which would take {encoded_size(count)}")
    encoded = np.require(np.frombuffer(data, "<u8", offset=8), np.uint64, "A")
    points, even = np.empty((count, 8), np.uint64), count & ~1
    pair = backend.decode_pairs(encoded[: 6 * even].reshape(-1, 12), points[:even])
    if pair >= 0:
        raise InvalidEncoding(f"points {2 * pair} and {2 * pair + 1} are no encoding of two points of the curve")
    points[even:] = encoded[6 * even :].reshape(-1, 8)
    _check_points(points[even:], even)
    return points


def encoded_size(count: int) -> int:
    """Bytes that `encode_points` makes of `count` points."""
    return 8 + 96 * (count // 2) + 64 * (count % 2)


def encode_scalars(scalars: Words) -> bytes:
    """32 bytes a scalar, little-endian. Raises InvalidEncoding for one that is not below n."""
    scalars = curve.words(scalars, 4, "scalars")
    _check_scalars(scalars)
    return scalars.astype("<u8").tobytes()


def decode_scalars(data: bytes) -> Words:
    """(d, 4) scalars from 32 bytes each. Raises InvalidEncoding naming the first one that is not below n."""
    if len(data) % 32:
        raise InvalidEncoding(f"{len(data)} bytes are not a multiple of 32")
    scalars = np.frombuffer(data, "<u8").astype(np.uint64).reshape(-1, 4)
    _check_scalars(scalars)
    return scalars


def _check_points(points: Words, start: int) -> None:
    index = backend.first_invalid(points)
    if index >= 0:
        raise InvalidEncoding(f"point {start + index} is not a reduced point of the curve")


def _check_scalars(scalars: Words) -> None:
    sums = np.zeros((len(scalars), 5), np.uint64)
    sums[:, :4] = scalars
    unreduced = np.flatnonzero((_reduce(sums) != scalars).any(axis=1))
    if len(unreduced):
        raise InvalidEncoding(f"scalar {unreduced[0]} is not below the order")


# --- inside ---------------------------------------------------------------------------------------------------------


def _chunks(length: int) -> Iterator[slice]:
    return (slice(first, min(first + CHUNK, length)) for first in range(0, length, CHUNK))


def _take_off(sums: Words, rho: Words, threads: int) -> None:
    """sums -= rho H + G / 2, in place."""
    tables = commitments()
    backend.spread(lambda chunk: tables.take_off(sums[chunk], rho[chunk]), len(sums), CHUNK, threads)


def _logs(
    points: Words,
    bound: int,
    table: BabySteps | None,
    start: int,
    progress: Callable[[int, int], None] | None,
    threads: int,
) -> npt.NDArray[np.int64]:
    """m of points (m - 1/2) G."""
    try:
        return bsgs.half_logs(points, bound, table, progress, threads=threads)
    except OutOfBound as error:
        raise OutOfBound([start + k for k in error.coordinates], bound) from None


def _failing(sums: Words, m: npt.NDArray[np.int64], rho: Words, threads: int) -> list[int]:
    m, rho = curve.longs(m, "m"), curve.words(rho, 4, "rho")
    _check_scalars(rho)
    _check_length(m, len(sums), "m")
    _check_length(rho, len(sums), "rho")
    largest = max(int(m.max(initial=0)), -int(m.min(initial=0)) - 1)
    holds = np.empty(len(sums), bool)
    tables = commitments()

    def work(chunk: slice) -> None:
        holds[chunk] = backend.equal_rows(tables.commit(m[chunk], rho[chunk], largest), sums[chunk])

    backend.spread(work, len(sums), CHUNK, threads)
    failing: list[int] = np.flatnonzero(~holds).tolist()
    return failing


def _stream(key: bytes, start: int, length: int) -> Words:
    """(length, 4) raw 256-bit words of the mask stream from scalar `start` on: two AES blocks a scalar.

    Reduced mod n they are within 2**-127 of uniform: 2**256 - n is about 2**128.
    """
    if len(key) != 32:
        raise ValueError(f"a mask key has 32 bytes, got {len(key)}")
    cipher = Cipher(AES(key), CTR((2 * start).to_bytes(16, "big"))).encryptor()
    stream = np.empty(4 * length, "<u8")
    cipher.update_into(_ZEROS[: 32 * length] if length <= CHUNK else bytes(32 * length), stream.view(np.uint8).data)
    return stream.astype(np.uint64, copy=False).reshape(-1, 4)


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


def _project_points(ciphertext: Words | Iterable[Words], signs: npt.NDArray[np.int8]) -> Words:
    """(K, 8) points sum_k a_k U_k. 64 partial sums a row, so that few projections still fill a batch."""
    if isinstance(ciphertext, np.ndarray):
        ciphertext = [ciphertext[chunk] for chunk in _chunks(len(ciphertext))]
    count, length = signs.shape
    partial = np.zeros((64 * count, 8), np.uint64)
    done = 0
    for points in ciphertext:
        points = curve.words(points, 8, "ciphertext")
        part = signs[:, done : done + len(points)]
        done += len(points)
        if done > length:
            break
        columns = -(-len(points) // 64)
        references = np.zeros((count, 64 * columns), np.int32)
        references[:, : len(points)] = part * np.arange(1, len(points) + 1, dtype=np.int32)
        backend.add_rows(partial, points, np.ascontiguousarray(references.reshape(64 * count, columns).T))
    if done != length:
        raise ValueError(f"ciphertext has {done} rows, expected {length}")
    return curve.sum_points(partial.reshape(count, 64, 8).swapaxes(0, 1))


def _signs(coefficients: Signs) -> npt.NDArray[np.int8]:
    signs = np.asarray(coefficients)
    if signs.ndim != 2 or not all(np.isin(signs[:, chunk], (-1, 1)).all() for chunk in _chunks(signs.shape[1])):
        raise ValueError(f"expected coefficients +-1 of shape (K, d), got shape {signs.shape}")
    return np.ascontiguousarray(signs, dtype=np.int8)


def _checked_weights(weights: Sequence[int], count: int) -> list[int]:
    if len(weights) != count or not count:
        raise ValueError(f"{len(weights)} weights for {count} miners")
    return [curve.whole(weight, f"weight {i}", 1, MAX_WEIGHT) for i, weight in enumerate(weights)]


def _checked_start(start: int, length: int) -> int:
    """Two blocks a scalar: at 2**127 the counter would begin again, and a mask would be used twice."""
    return curve.whole(start, "start", 0, 2**127 - length + 1)


def _check_length(rows: npt.NDArray[np.int64] | Words, length: int, name: str) -> None:
    if len(rows) != length:
        raise ValueError(f"{name} has {len(rows)} rows, expected {length}")
