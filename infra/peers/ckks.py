"""Homomorphic sums with TenSEAL: CKKS, degree 8192, 4096 parameters a ciphertext, 128 bits of security, one thread.

The coefficient modulus is 60 + 40 + 60 bits, scale 2**40: enough for sums, and smaller and faster than the chains for
products. The server sees the public context; the key holder decrypts.
"""

import statistics
import time
from typing import Any

import numpy as np
import tenseal as ts
from answering import answer

SLOTS = 4096


def aggregate(dimension: int, clients: int, distinct: int) -> dict[str, Any]:
    """One sum. The first `distinct` clients encrypt; the others send copies of what those sent.

    client_s: median of encode, encrypt, serialize; server_s: deserialize and add all; decrypt_s: by the key holder.
    """
    context = ts.context(ts.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 60], n_threads=1)
    context.global_scale = 2**40
    public = context.copy()
    public.make_context_public()
    updates = [np.random.default_rng(i).uniform(-1, 1, dimension) for i in range(min(distinct, clients))]
    sent, spent = [], []
    for update in updates:
        started = time.perf_counter()
        sent.append(_encrypt(public, update))
        spent.append(time.perf_counter() - started)
    started = time.perf_counter()
    total = [
        _sum(public, [sent[client % len(sent)][chunk] for client in range(clients)]) for chunk in range(len(sent[0]))
    ]
    server_s = time.perf_counter() - started
    started = time.perf_counter()
    opened = np.concatenate([ciphertext.decrypt(context.secret_key()) for ciphertext in total])
    decrypt_s = time.perf_counter() - started
    expected = sum(updates[client % len(updates)] for client in range(clients))
    if np.abs(opened - expected).max() > 1e-3:
        raise AssertionError("CKKS opens another sum")
    size = sum(map(len, sent[0])) / dimension
    return {"client_s": statistics.median(spent), "server_s": server_s, "decrypt_s": decrypt_s, "bytes": size}


def _encrypt(context: ts.Context, update: np.ndarray) -> list[bytes]:
    chunks = (update[first : first + SLOTS] for first in range(0, len(update), SLOTS))
    return [ts.ckks_vector(context, chunk.tolist()).serialize() for chunk in chunks]


def _sum(context: ts.Context, chunks: list[bytes]) -> ts.CKKSVector:
    total = ts.ckks_vector_from(context, chunks[0])
    for chunk in chunks[1:]:
        total += ts.ckks_vector_from(context, chunk)
    return total


answer({"aggregate": aggregate})
