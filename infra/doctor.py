"""What this machine can do for HealChain, and what is missing: `healchain doctor`.

Each finding is a name, what was found and whether it is in order; what is missing is named with the line that installs it.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from infra.bench import machine
from infra.devstack import FASHION_MNIST
from tasks.crypto import backend, ndd_fe

PACKAGES = ("prefect", "torch", "numba", "web3", "cryptography")
NEEDED_BYTES = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report. needed: without it, tasks do not run."""

    name: str
    found: str
    in_order: bool
    needed: bool = True


def examine(folder: Path) -> list[Finding]:
    """Everything that decides whether, and how fast, tasks run here; folder: where runs are to be kept."""
    return [python(), processor(), curve_core(), encryption(), *packages(), disk(folder), node(), images()]


def python() -> Finding:
    version = platform.python_version()
    return Finding("Python", f"{version}, {sys.executable}", sys.version_info[:2] == (3, 11))


def processor() -> Finding:
    found = machine()
    return Finding("processor", f"{found['processor']}, {found['cores']} cores", True)


def curve_core() -> Finding:
    choice = backend.CHOICE
    speed = (
        "about eight coordinates at a time"
        if choice.name == "ifma"
        else "one coordinate at a time, some five times slower"
    )
    return Finding("curve core", f"{choice.name} ({choice.reason}): {speed}; {backend.ENVIRONMENT} forces one", True)


def encryption() -> Finding:
    """Four values, encrypted, summed and opened."""
    import numpy as np

    values, masks = np.array([0, 1, -1, 2047]), [(bytes([i]) * 32, bytes([i + 1]) * 32) for i in (1, 3, 5)]
    ciphertexts = [ndd_fe.encrypt(values, *pair, bound=2047) for pair in masks]
    weights = [1, 2, 3]
    key = ndd_fe.derive_key([pair[0] for pair in masks], weights, len(values))
    opened, rho = ndd_fe.open_sum(key, [pair[1] for pair in masks], ciphertexts, weights, bound=6 * 2047)
    right = (opened == 6 * values).all() and not ndd_fe.failing_coordinates(ciphertexts, weights, opened, rho)
    return Finding("encryption", "four values encrypted, summed, opened and verified", bool(right))


def packages() -> list[Finding]:
    findings = []
    for name in PACKAGES:
        try:
            findings.append(Finding(name, importlib.metadata.version(name), True))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, "missing: pip install --requirement requirements.lock", False))
    return findings


def disk(folder: Path) -> Finding:
    there = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    writable = os.access(there, os.W_OK)
    found = f"{free / 2**30:.1f} GiB free in {there}" + ("" if writable else ", which cannot be written to")
    return Finding("disk", found, writable and free >= NEEDED_BYTES)


def node() -> Finding:
    found = shutil.which("npm")
    missing = "missing; only `make test` and `make contracts` need it: apt-get install -y nodejs npm"
    return Finding("node and npm", found or missing, found is not None, needed=False)


def images() -> Finding:
    there = FASHION_MNIST.exists()
    missing = "missing; only the task fashion-mnist needs it: apt-get install -y dataset-fashion-mnist"
    return Finding("fashion-mnist", str(FASHION_MNIST) if there else missing, there, needed=False)
