"""From the opened sum to the next model: combine, then step.

Encryption opens a weighted sum and nothing else, so `weighted_mean` is the only way to combine ciphertexts. Rules that
compare single updates (Krum, trimmed mean, median) fit participants who send plaintext: such a rule takes the updates
(n, d) and returns one combined update (d,), which any server step below applies.

Miners recompute W_{t+1} and compare digests. So nothing here depends on the host: only elementwise IEEE operations, in
float64, rounded once to float32; no sums over an axis.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tasks.learning.datasets import InvalidDataset, decode_arrays, encode_arrays

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


class InvalidState(ValueError):
    """The bytes are not a server state of this dimension."""


@dataclass(frozen=True, eq=False)
class ServerState:
    """What the server step remembers between rounds; public. Both moments have shape (d,), float32."""

    step: int
    first: Floats
    second: Floats

    @classmethod
    def zero(cls, dimension: int) -> "ServerState":
        return cls(0, np.zeros(dimension, dtype=np.float32), np.zeros(dimension, dtype=np.float32))

    def encode(self) -> bytes:
        return encode_arrays(
            {"step": np.asarray(self.step, dtype=np.int64), "first": self.first, "second": self.second}
        )

    @classmethod
    def decode(cls, data: bytes, dimension: int) -> "ServerState":
        try:
            arrays = decode_arrays(data)
        except InvalidDataset as error:
            raise InvalidState(str(error)) from error
        if set(arrays) != {"step", "first", "second"}:
            raise InvalidState(f"arrays: {sorted(arrays)}, expected first, second and step")
        for name in ("first", "second"):
            array = arrays[name]
            if array.dtype != np.float32 or array.shape != (dimension,) or not np.isfinite(array).all():
                raise InvalidState(
                    f"{name}: {array.dtype} of shape {array.shape}, expected finite float32 of shape ({dimension},)"
                )
        step = arrays["step"]
        if step.dtype != np.int64 or step.shape != () or int(step) < 0:
            raise InvalidState(f"step: {step.dtype} of shape {step.shape}, expected one int64 of 0 or more")
        return cls(int(step), arrays["first"], arrays["second"])


def public_weights(sample_counts: Sequence[int], levels: int, max_ratio: int) -> list[int]:
    """One integer in 1..levels per miner, proportional to its registered samples; the largest count gets `levels`.

    No weight is more than max_ratio times another: a huge weight would single a miner out, and small ones keep the
    bound of the sum small. Needs 1 <= max_ratio <= levels.
    """
    if not sample_counts or min(sample_counts) < 1:
        raise ValueError(f"sample_counts: {list(sample_counts)}, expected at least one, all positive")
    if not 1 <= max_ratio <= levels:
        raise ValueError(f"levels {levels}, max_ratio {max_ratio}: expected 1 <= max_ratio <= levels")
    largest = max(sample_counts)
    smallest_weight = -(-levels // max_ratio)
    return [max(smallest_weight, (2 * levels * count + largest) // (2 * largest)) for count in sample_counts]


def weighted_mean(weighted_sum: Integers, total_weight: int, scale: int, support: Integers, dimension: int) -> Floats:
    """The mean update (d,) float32 from the opened sum (k,) int64; zero outside the support."""
    if weighted_sum.dtype != np.int64 or weighted_sum.shape != support.shape or weighted_sum.ndim != 1:
        raise ValueError(
            f"weighted_sum: {weighted_sum.dtype} of shape {weighted_sum.shape}, expected int64 of shape {support.shape}"
        )
    if total_weight < 1 or scale < 1:
        raise ValueError(f"total_weight {total_weight}, scale {scale}: expected both to be positive")
    if support.size and not (support[0] >= 0 and support[-1] < dimension and (np.diff(support) > 0).all()):
        raise ValueError(f"support: expected ascending indices from 0 to {dimension - 1}")
    mean = np.zeros(dimension, dtype=np.float32)
    mean[support] = weighted_sum / np.float64(total_weight * scale)
    return mean


def fedavg(
    parameters: Floats, mean_update: Floats, state: ServerState, *, learning_rate: float = 1.0
) -> tuple[Floats, ServerState]:
    """W + learning_rate * update (McMahan et al., AISTATS 2017)."""
    _check(parameters, mean_update, state)
    stepped = parameters.astype(np.float64) + learning_rate * mean_update.astype(np.float64)
    return stepped.astype(np.float32), ServerState(state.step + 1, state.first, state.second)


def fedadam(
    parameters: Floats,
    mean_update: Floats,
    state: ServerState,
    *,
    learning_rate: float = 0.01,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> tuple[Floats, ServerState]:
    """FedAdam (Reddi et al., ICLR 2021, algorithm 2), without bias correction as in the paper.

    m = beta1 m + (1 - beta1) D;  v = beta2 v + (1 - beta2) D^2;  W = W + learning_rate * m / (sqrt(v) + tau)
    """
    _check(parameters, mean_update, state)
    D = mean_update.astype(np.float64)
    m = (beta1 * state.first.astype(np.float64) + (1 - beta1) * D).astype(np.float32)
    v = (beta2 * state.second.astype(np.float64) + (1 - beta2) * (D * D)).astype(np.float32)
    step = learning_rate * m.astype(np.float64) / (np.sqrt(v.astype(np.float64)) + tau)
    return (parameters.astype(np.float64) + step).astype(np.float32), ServerState(state.step + 1, m, v)


SERVER_STEPS: dict[str, Callable[..., tuple[Floats, ServerState]]] = {"fedavg": fedavg, "fedadam": fedadam}


def _check(parameters: Floats, mean_update: Floats, state: ServerState) -> None:
    for name, array in (("parameters", parameters), ("mean_update", mean_update), ("first moment", state.first)):
        if array.dtype != np.float32 or array.shape != parameters.shape or parameters.ndim != 1:
            raise ValueError(f"{name}: {array.dtype} of shape {array.shape}, expected float32 {parameters.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: NaN or infinite, expected finite numbers")
