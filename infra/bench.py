"""What learning under encryption costs, and what it gives up: measured here and now, never asserted by a test.

learning       for each ready task and seed: accuracy after the last round, encrypted and sparse, and the same run in
               plaintext and dense; the encrypted run encrypts, sums and recovers every coordinate for real
cryptography   microseconds a coordinate, one thread, medians; beside it libsecp256k1 through coincurve, one point
               operation at a time, on the same work in the same minute
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from coincurve import PrivateKey, PublicKey
from rich.console import Console
from rich.progress import track
from rich.table import Table

from contracts.task_spec import TaskSpec, load_task_file
from infra.simulate import simulate, simulate_dense
from tasks.crypto import bsgs, curve, ndd_fe

Integers = npt.NDArray[np.int64]

TASKS = ("breast-cancer", "digits")
COORDINATES, MINERS, REPEATS, PEER_COORDINATES = 20_000, 5, 5, 200


def run(out: Path, seeds: int, console: Console) -> dict[str, Any]:
    """Measure, print both tables, write `out`. Takes some minutes."""
    torch.set_num_threads(1)
    cost = cryptography(console)
    learnt = [
        learning(name, seed) for name in TASKS for seed in track(range(seeds), f"learning {name}", console=console)
    ]
    result = {"machine": machine(), "cryptography_us_per_coordinate": cost, "learning": learnt}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1))
    _print(result, console)
    return result


def machine() -> dict[str, Any]:
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(names),
        "python": platform.python_version(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def learning(name: str, seed: int) -> dict[str, Any]:
    """One task and seed, encrypted and sparse beside plaintext and dense."""
    text = (files("deployments") / "ready" / f"{name}.toml").read_text()
    spec = load_task_file(text, seed=seed).spec()
    started = time.perf_counter()
    encrypted = simulate(spec, combine=encrypted_sum(spec))
    seconds = time.perf_counter() - started
    dense = simulate_dense(spec)
    return {
        "task": name,
        "seed": seed,
        "rounds": len(encrypted),
        "encrypted_sparse": encrypted[-1].correct / encrypted[-1].total,
        "plaintext_dense": dense[-1].correct / dense[-1].total,
        "seconds_encrypted": round(seconds, 2),
    }


def encrypted_sum(spec: TaskSpec) -> Callable[[list[Integers], Sequence[int]], Integers]:
    """The scheme end to end, in place of a plain sum: encrypt, derive the key, open, and check the opening."""
    rng = np.random.default_rng(spec.seed)

    def combine(vectors: list[Integers], weights: Sequence[int]) -> Integers:
        keys = [(rng.bytes(32), rng.bytes(32)) for _ in vectors]
        bound = spec.compression.bound
        ciphertexts = [ndd_fe.encrypt(vector, *key, bound=bound) for vector, key in zip(vectors, keys, strict=True)]
        functional_key = ndd_fe.derive_key([key[0] for key in keys], weights, len(vectors[0]))
        opened, blinding = ndd_fe.open_sum(
            functional_key, [key[1] for key in keys], ciphertexts, weights, bound=spec.recovery_bound(sum(weights))
        )
        if ndd_fe.failing_coordinates(ciphertexts, weights, opened, blinding):
            raise AssertionError("an honest opening does not hold")
        return opened

    return combine


def cryptography(console: Console) -> dict[str, float]:
    """Microseconds a coordinate of each part, one thread."""
    rng = np.random.default_rng(0)
    bound, weights = 2047, [16, 11, 7, 5, 3]
    vectors = [rng.integers(-bound, bound + 1, COORDINATES) for _ in range(MINERS)]
    keys = [(rng.bytes(32), rng.bytes(32)) for _ in range(MINERS)]
    with console.status("measuring the cryptography"):
        ciphertexts = [ndd_fe.encrypt(vector, *key, bound=bound) for vector, key in zip(vectors, keys, strict=True)]
        functional_key = ndd_fe.derive_key([key[0] for key in keys], weights, COORDINATES)
        masks = [key[1] for key in keys]
        largest = bound * sum(weights)
        opened, blinding = ndd_fe.open_sum(functional_key, masks, ciphertexts, weights, bound=largest)
        # What recovery receives: small multiples of G, in no order.
        points = curve.multiples(curve.GENERATOR, largest)[rng.integers(0, largest, COORDINATES)]
        return {
            "encrypt": _median_us(lambda: ndd_fe.encrypt(vectors[0], *keys[0], bound=bound), COORDINATES),
            "derive key, 5 miners": _median_us(
                lambda: ndd_fe.derive_key([key[0] for key in keys], weights, COORDINATES), COORDINATES
            ),
            "aggregate, 5 miners": _median_us(lambda: ndd_fe.weighted_sum(ciphertexts, weights), COORDINATES),
            "recover": _median_us(lambda: bsgs.discrete_logs(points, largest), COORDINATES),
            "open the sum, all of it": _median_us(
                lambda: ndd_fe.open_sum(functional_key, masks, ciphertexts, weights, bound=largest), COORDINATES
            ),
            "verify the opening": _median_us(
                lambda: ndd_fe.failing_coordinates(ciphertexts, weights, opened, blinding), COORDINATES
            ),
            "encrypt, libsecp256k1": _median_us(lambda: _peer_encrypt(vectors[0][:PEER_COORDINATES]), PEER_COORDINATES),
        }


def _peer_encrypt(values: Integers) -> None:
    """x * G + rho * H with libsecp256k1: two multiplications and one addition a coordinate."""
    base = PrivateKey(b"\x02" * 32).public_key
    for index, value in enumerate(values.tolist(), start=1):
        short = PrivateKey.from_int(abs(value) + 1).public_key
        PublicKey.combine_keys([short, base.multiply(index.to_bytes(32, "big"))])


def _median_us(work: Callable[[], Any], coordinates: int) -> float:
    """Median microseconds a coordinate over some repeats, after one that warms up."""
    work()
    spent = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        spent.append((time.perf_counter() - started) / coordinates * 1e6)
    return round(statistics.median(spent), 3)


def _print(result: dict[str, Any], console: Console) -> None:
    table = Table("task", "seeds", "encrypted", "lowest", "plaintext", "difference", "seconds")
    table.title = "Accuracy after the last round: encrypted and 90 % sparse, plaintext and dense"
    for name in TASKS:
        runs = [one for one in result["learning"] if one["task"] == name]
        sparse, dense, seconds = (
            statistics.mean(one[key] for one in runs)
            for key in ("encrypted_sparse", "plaintext_dense", "seconds_encrypted")
        )
        lowest = min(one["encrypted_sparse"] for one in runs)
        shares = [f"{100 * share:.2f} %" for share in (sparse, lowest, dense)]
        table.add_row(name, str(len(runs)), *shares, f"{100 * (sparse - dense):+.2f} points", f"{seconds:.1f}")
    console.print(table)
    cost = Table("Cryptography, one thread", "µs a coordinate")
    for part, spent in result["cryptography_us_per_coordinate"].items():
        cost.add_row(part, f"{spent:.2f}")
    console.print(cost)
    console.print(f"{result['machine']['processor']}, {result['machine']['cores']} cores")
