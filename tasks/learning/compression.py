"""Deep Gradient Compression on a support that all miners share, and the fixed point it is sent in.

    paper       here             meaning
    u           velocity         updates accumulated with momentum (momentum correction)
    v           residual         what was not sent yet (error feedback)
    thr         support          the coordinates sent: here PUBLIC and common to the cohort, not a private top-k
    s           1 - density      share of coordinates not sent; grows during the warm-up

Source: Lin, Han, Mao, Wang, Dally: Deep Gradient Compression, ICLR 2018. Two things differ, because updates are summed
under encryption: coordinates must line up, and which ones a miner would choose says something about its data. So
the support is computed by everybody from public data, and what exceeds a limit is kept for later instead of being lost.
Because the support is known beforehand, local training may also be confined to it (`training.train`), which at ten per
cent density is what keeps the result level with a dense run.

Nothing is lost: velocity + residual before = values sent + residual after, through clipping, selection and rounding.
Errors: OutOfRange, InvalidMemory.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.learning.datasets import InvalidDataset, decode_arrays, encode_arrays

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

PPM = 1_000_000
SCORE_UNIT = 1_000_000  # a score counts millionths of a quantisation step


class OutOfRange(ValueError):
    """A quantised coordinate would exceed the bound that the sum's recovery relies on."""


class InvalidMemory(ValueError):
    """The bytes are not a memory of this dimension."""


@dataclass(frozen=True, eq=False)
class Memory:
    """What a miner keeps between rounds, on its own disk: it is private. Both arrays have shape (d,), float32."""

    velocity: Floats
    residual: Floats

    @classmethod
    def zero(cls, dimension: int) -> "Memory":
        return cls(np.zeros(dimension, dtype=np.float32), np.zeros(dimension, dtype=np.float32))

    def encode(self) -> bytes:
        return encode_arrays({"velocity": self.velocity, "residual": self.residual})

    @classmethod
    def decode(cls, data: bytes, dimension: int) -> "Memory":
        try:
            arrays = decode_arrays(data)
        except InvalidDataset as error:
            raise InvalidMemory(str(error)) from error
        if set(arrays) != {"velocity", "residual"}:
            raise InvalidMemory(f"arrays: {sorted(arrays)}, expected residual and velocity")
        for name, array in arrays.items():
            if array.dtype != np.float32 or array.shape != (dimension,) or not np.isfinite(array).all():
                raise InvalidMemory(
                    f"{name}: {array.dtype} of shape {array.shape}, expected finite float32 of shape ({dimension},)"
                )
        return cls(arrays["velocity"], arrays["residual"])


# ── the common support ───────────────────────────────────────────────────────────────────────────────────────────────


def density_of_round(round_number: int, density: float, warmup_rounds: int) -> float:
    """Share of coordinates sent in a round: density^(r / (w + 1)) while r <= w, then density.

    Exponentially growing sparsity, as in the paper: for 0.1 and two warm-up rounds 0.46, 0.22, 0.1, 0.1, ...
    """
    if round_number < 1 or warmup_rounds < 0 or not 0 < density <= 1:
        raise ValueError(
            f"round_number {round_number}, warmup_rounds {warmup_rounds}, density {density}: "
            "expected rounds from 1, a warm-up of 0 or more rounds, a density in (0, 1]"
        )
    # In whole millionths: hosts may disagree on the last bit of a power, and must agree on the support's size.
    return round(PPM * density ** (min(round_number, warmup_rounds + 1) / (warmup_rounds + 1))) / PPM


def support(
    dimension: int,
    round_number: int,
    last_combined: Floats | None,
    *,
    density: float,
    explore_share: float,
    seed: bytes,
    warmup_rounds: int = 0,
) -> Integers:
    """The coordinates of a round, (k,) ascending: the same on every host, since all arguments are public.

    A part explores: the next coordinates in a pseudo-random order drawn once per task, so that each is sent before any
    is explored a second time. The rest are the largest of the last combined update, equal ones by index. Without one
    (the first round) everything explores.

    last_combined: (d,), or None. density: after the warm-up. seed: of the task.
    """
    if not 0 <= explore_share <= 1:
        raise ValueError(f"explore_share: {explore_share}, expected 0 to 1")
    if last_combined is not None and (last_combined.shape != (dimension,) or not np.isfinite(last_combined).all()):
        raise ValueError(f"last_combined: shape {last_combined.shape}, expected finite numbers of shape ({dimension},)")

    def size(number: int) -> int:
        return max(1, -(-dimension * round(PPM * density_of_round(number, density, warmup_rounds)) // PPM))

    def exploring(number: int) -> int:
        return size(number) if number == 1 else -(-size(number) * round(PPM * explore_share) // PPM)

    # The pseudo-random order is that of these keys. It is walked in a circle, from where the last round stopped.
    keys = np.frombuffer(hashlib.shake_256(b"support" + seed).digest(8 * dimension), dtype="<u8")
    first = sum(exploring(number) for number in range(1, round_number)) % dimension
    count = size(round_number) if last_combined is None else exploring(round_number)
    chosen = _smallest(keys, min(first + count, dimension)) & ~_smallest(keys, first)
    chosen |= _smallest(keys, max(first + count - dimension, 0))

    if last_combined is not None:
        others = np.flatnonzero(~chosen)
        chosen[others[_smallest(-np.abs(last_combined[others]), size(round_number) - count)]] = True
    return np.flatnonzero(chosen)


def _smallest(values: npt.NDArray[Any], count: int) -> npt.NDArray[np.bool_]:
    """(d,) true at the `count` smallest of (d,) numbers, equal ones by index; in linear time, for millions of them."""
    if count == 0:
        return np.zeros(values.size, dtype=bool)
    edge = np.partition(values, count - 1)[count - 1]
    chosen: npt.NDArray[np.bool_] = values < edge
    equal = np.flatnonzero(values == edge)
    chosen[equal[: count - np.count_nonzero(chosen)]] = True
    return chosen


# ── what is sent, what is kept ───────────────────────────────────────────────────────────────────────────────────────


def compress(
    update: Floats, memory: Memory, support: Integers, *, momentum: float, clip_norm: float
) -> tuple[Floats, Memory]:
    """Values (k,) to send on the support, and the next memory. Raises ValueError if the update is not finite.

    The values' norm never exceeds clip_norm: no miner moves the model further in one round. What is sent is forgotten
    (momentum factor masking), everything else stays in the residual.
    """
    if update.shape != memory.residual.shape or not np.isfinite(update).all():
        raise ValueError(f"update: shape {update.shape}, expected finite numbers of shape {memory.residual.shape}")
    if not 0 <= momentum < 1 or not clip_norm > 0:
        raise ValueError(f"momentum {momentum}, clip_norm {clip_norm}: expected 0 <= momentum < 1 and clip_norm > 0")
    velocity = (np.float32(momentum) * memory.velocity + update).astype(np.float32)
    residual = (memory.residual + velocity).astype(np.float32)

    values = residual[support]
    norm = math.sqrt(float(np.square(values, dtype=np.float64).sum()))
    if norm > clip_norm:
        values = (values * (clip_norm / norm)).astype(np.float32)
    residual[support] -= values
    velocity[support] = 0
    return values, Memory(velocity, residual)


def to_fixed_point(
    values: Floats, memory: Memory, support: Integers, *, scale: int, bound: int
) -> tuple[Integers, Memory]:
    """Quantise the values (k,); what does not fit the range, and what rounding takes off, goes back to the residual."""
    inside, excess = fit_to_range(values, bound / scale)
    quantised = quantize(inside, scale=scale, bound=bound)
    residual = memory.residual.copy()
    residual[support] += excess + (inside - dequantize(quantised, scale=scale))
    return quantised, Memory(memory.velocity, residual)


def fit_to_range(values: Floats, limit: float) -> tuple[Floats, Floats]:
    """(inside, excess): values = inside + excess, with |inside| <= limit."""
    if not limit > 0:
        raise ValueError(f"limit: {limit}, expected more than 0")
    # A limit that float32 cannot hold is rounded towards zero, so that quantize accepts all that is inside.
    edge = np.float32(limit)
    edge = edge if float(edge) <= limit else np.nextafter(edge, np.float32(0))
    inside = np.clip(values, -edge, edge).astype(np.float32)
    return inside, values - inside


def quantize(values: Floats, *, scale: int, bound: int) -> Integers:
    """Fixed point: round(values * scale) as int64, every |q| <= bound, otherwise OutOfRange."""
    scaled = np.rint(values.astype(np.float64) * scale)
    worst = float(np.abs(scaled).max(initial=0.0))
    if not worst <= bound:  # NaN too
        raise OutOfRange(f"largest |q| is {worst:.0f}, bound is {bound} at scale {scale}")
    return scaled.astype(np.int64)


def dequantize(quantised: Integers, *, scale: int) -> Floats:
    """The numbers that a quantised vector stands for, float32."""
    return (quantised / np.float64(scale)).astype(np.float32)


def score(quantised: Integers) -> int:
    """|x|_2 of a quantised vector in millionths of a step: floor(10^6 * sqrt(sum x^2)), exact on every host."""
    return math.isqrt(_sum_of_squares(quantised) * SCORE_UNIT**2)


def _sum_of_squares(integers: Integers) -> int:
    """Exact for every (d,) int64: each is a 2^42 + b 2^21 + c with b, c in [0, 2^21) and a in [-2^21, 2^21)."""
    total = 0
    # A product of two limbs is at most 2^42 in size, so 2^20 of them stay below 2^63.
    for start in range(0, len(integers), 2**20):
        block = integers[start : start + 2**20]
        limbs = (block & (2**21 - 1), block >> 21 & (2**21 - 1), block >> 42)
        total += sum(int(limbs[i] @ limbs[j]) << 21 * (i + j) for i in range(3) for j in range(3))
    return total


def score_bound(size: int, bound: int) -> int:
    """The largest score of any vector of this size and bound."""
    return math.isqrt(size * bound * bound * SCORE_UNIT**2)
