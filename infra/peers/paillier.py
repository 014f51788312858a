"""Homomorphic sums with python-paillier on gmpy2: a key of 2048 bits, one parameter a ciphertext as the library does."""

import random
import time
from functools import lru_cache
from typing import Any

import phe
from answering import answer

KEY_BITS = 2048
RANDOM = random.Random(0)  # measured, not kept secret


@lru_cache
def _keys() -> tuple[phe.PaillierPublicKey, phe.PaillierPrivateKey]:
    public, private = phe.generate_paillier_keypair(n_length=KEY_BITS)
    return public, private


def aggregate(count: int, clients: int, bound: int) -> dict[str, Any]:
    """Seconds for `count` parameters of one client, of the server's additions and of the key holder's decryption.

    The first client's ciphertexts stand for all clients': an addition costs the same.
    """
    public, private = _keys()
    values = [RANDOM.randrange(-bound, bound + 1) for _ in range(count)]
    started = time.perf_counter()
    sent = [public.encrypt(value) for value in values]
    client_s = time.perf_counter() - started
    started = time.perf_counter()
    sums = [sum([item] * (clients - 1), item) for item in sent]
    server_s = time.perf_counter() - started
    started = time.perf_counter()
    opened = [private.decrypt(item) for item in sums]
    decrypt_s = time.perf_counter() - started
    if opened != [clients * value for value in values]:
        raise AssertionError("Paillier opens another sum")
    return {"client_s": client_s, "server_s": server_s, "decrypt_s": decrypt_s, "bytes": 2 * KEY_BITS / 8}


answer({"aggregate": aggregate})
