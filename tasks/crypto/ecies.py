"""Sealed messages to the holder of an encryption key: ECIES on secp256k1.

    sealed      ephemeral public key (33 bytes) || AES-256-GCM ciphertext and tag
    key         HKDF-SHA256(x of the ECDH, info = "HealChain ECIES" || ephemeral key || recipient key || context)

The key is used for one message, so the GCM nonce is zero. `context` says what the message is for; a message sealed for
one context does not open in another. Keys are 33-byte compressed points. Opening asks for the shared secret instead of
the private key, which stays with its holder.

Errors: Unopenable; ValueError for a public key that is not a point.
"""

from collections.abc import Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

# Not from `field`: opening a message should not wait for the compiled kernels.
_ORDER = 0xFFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFE_BAAEDCE6_AF48A03B_BFD25E8C_D0364141
_KEY_LENGTH = 33
_NONCE = bytes(12)


class Unopenable(ValueError):
    """Not sealed for this recipient and context, or changed on the way."""


def public_key(private_scalar: int) -> bytes:
    """33-byte compressed public key. Raises ValueError unless 0 < private_scalar < order."""
    private = ec.derive_private_key(_checked(private_scalar), ec.SECP256K1())
    return private.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)


def shared_secret(private_scalar: int, public: bytes) -> bytes:
    """32-byte x coordinate of private_scalar * public. Raises ValueError unless public is 33 bytes of a curve point."""
    if len(public) != _KEY_LENGTH:
        raise ValueError(f"expected a public key of 33 bytes, got {len(public)}")
    point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256K1(), public)
    return ec.derive_private_key(_checked(private_scalar), ec.SECP256K1()).exchange(ec.ECDH(), point)


def seal(plaintext: bytes, public_key: bytes, *, ephemeral_seed: bytes, context: bytes) -> bytes:
    """The plaintext for the holder of public_key. ephemeral_seed: 48 fresh uniform bytes, never used twice."""
    if len(ephemeral_seed) != 48:
        raise ValueError(f"expected 48 bytes of seed, got {len(ephemeral_seed)}")
    secret = int.from_bytes(ephemeral_seed, "big") % (_ORDER - 1) + 1
    ephemeral = ec.derive_private_key(secret, ec.SECP256K1()).public_key()
    front = ephemeral.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    key = _message_key(shared_secret(secret, public_key), front, public_key, context)
    return front + AESGCM(key).encrypt(_NONCE, plaintext, None)


def open_sealed(
    sealed: bytes, shared_secret_of: Callable[[bytes], bytes], context: bytes, recipient_key: bytes
) -> bytes:
    """The plaintext. shared_secret_of maps a public key to its ECDH with the key whose public part is recipient_key."""
    front, body = sealed[:_KEY_LENGTH], sealed[_KEY_LENGTH:]
    try:
        secret = shared_secret_of(front)
    except ValueError as error:
        raise Unopenable("the message does not begin with a public key") from error
    try:
        return AESGCM(_message_key(secret, front, recipient_key, context)).decrypt(_NONCE, body, None)
    except InvalidTag:
        raise Unopenable("not sealed for this recipient and context, or changed") from None


def _message_key(secret: bytes, ephemeral: bytes, recipient: bytes, context: bytes) -> bytes:
    info = b"HealChain ECIES" + ephemeral + recipient + context
    return HKDF(SHA256(), length=32, salt=None, info=info).derive(secret)


def _checked(private_scalar: int) -> int:
    if not 0 < private_scalar < _ORDER:
        raise ValueError("a private scalar is in (0, order)")
    return private_scalar
