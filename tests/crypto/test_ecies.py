"""Sealed messages open for their recipient and context, and for nobody else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.crypto import ecies
from tasks.crypto.curve import GENERATOR, ORDER, P, decode_point, encode_point, multiply
from tasks.crypto.ecies import Unopenable

SECRET, OTHER = 0x1234567890ABCDEF << 100, 77
KEY, OTHER_KEY = (encode_point(multiply(secret, GENERATOR)) for secret in (SECRET, OTHER))
SEED = bytes(range(48))
CONTEXT = b"functional key of round 3"


def sealed(plaintext=b"the key", context=CONTEXT, seed=SEED):
    return ecies.seal(plaintext, KEY, ephemeral_seed=seed, context=context)


def opened(message, secret=SECRET, key=KEY, context=CONTEXT):
    return ecies.open_sealed(message, lambda public: ecies.shared_secret(secret, public), context, key)


@settings(max_examples=30)
@given(st.binary(max_size=300), st.binary(max_size=50), st.binary(min_size=48, max_size=48))
def test_what_is_sealed_opens(plaintext, context, seed):
    message = sealed(plaintext, context, seed)
    assert len(message) == 33 + len(plaintext) + 16
    assert opened(message, context=context) == plaintext


def test_both_sides_share_the_x_of_the_product():
    expected = multiply(SECRET * OTHER % ORDER, GENERATOR).x.to_bytes(32, "big")
    assert ecies.shared_secret(SECRET, OTHER_KEY) == ecies.shared_secret(OTHER, KEY) == expected
    assert ecies.public_key(SECRET) == KEY


def test_every_changed_byte_is_noticed():
    message = sealed()
    for i in range(len(message)):
        for flip in (1, 0x80):
            with pytest.raises(Unopenable):
                opened(message[:i] + bytes([message[i] ^ flip]) + message[i + 1 :])


@pytest.mark.parametrize("length", [0, 1, 32, 33, 48, 49])
def test_a_cut_message_is_noticed(length):
    with pytest.raises(Unopenable):
        opened(sealed()[:length])


def test_another_context_does_not_open():
    with pytest.raises(Unopenable):
        opened(sealed(), context=b"functional key of round 4")


def test_another_recipient_does_not_open():
    with pytest.raises(Unopenable):
        opened(sealed(), secret=OTHER, key=OTHER_KEY)
    with pytest.raises(Unopenable):
        opened(sealed(), key=OTHER_KEY)


def test_two_seeds_share_nothing():
    first, second = sealed(), sealed(seed=bytes(48))
    assert first[:33] != second[:33]
    assert first[33:] != second[33:]


NOT_POINTS = [b"", KEY[:-1], KEY + b"\0", b"\2" + P.to_bytes(32, "big"), b"\2" + bytes(32), b"\4" + KEY[1:], b"\0" * 33]


@pytest.mark.parametrize("public", NOT_POINTS)
def test_keys_that_are_no_points_are_refused(public):
    with pytest.raises(ValueError):  # noqa: PT011  the sentence is the library's
        ecies.shared_secret(SECRET, public)
    with pytest.raises(ValueError):  # noqa: PT011
        ecies.seal(b"", public, ephemeral_seed=SEED, context=b"")
    with pytest.raises(Unopenable):
        opened(public + sealed()[33:])


@pytest.mark.parametrize("scalar", [0, -1, ORDER, ORDER + 1])
def test_private_scalars_outside_the_range_are_refused(scalar):
    with pytest.raises(ValueError, match="private scalar"):
        ecies.shared_secret(scalar, KEY)
    with pytest.raises(ValueError, match="private scalar"):
        ecies.public_key(scalar)


def test_a_short_seed_is_refused():
    with pytest.raises(ValueError, match="48 bytes"):
        sealed(seed=bytes(47))


def test_the_ephemeral_key_is_a_point():
    assert encode_point(decode_point(sealed()[:33])) == sealed()[:33]
