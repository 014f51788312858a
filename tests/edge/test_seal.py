"""Seals: only who has the key says something in a device's name, and it says it once, about one thing."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.edge.seal import MAX_COUNTER, NotSealed, has_seal, key_of, key_of_digest, opened, seal

KEY = key_of("the key of the device")
BODY = b'{"round_id":"r-1","w":[1.0,2.0]}'
SEALED = seal(BODY, KEY, "update", "a", 7)
KNOWN = "7.97f91acecb82eec1fa85b0496d3e0c5bba60416cb1437e0f8abe438c7a0e7bb5"


def test_a_seal_is_one_field_more_and_gives_the_message_back():
    assert json.loads(SEALED) == {**json.loads(BODY), "seal": json.loads(SEALED)["seal"]}
    assert opened(SEALED, KEY, "update", "a") == (BODY, 7)
    assert has_seal(SEALED)
    assert not has_seal(BODY)


def test_the_server_makes_the_key_from_the_digest_that_it_keeps_and_it_is_not_that_digest():
    sha256 = hashlib.sha256(b"the key of the device")
    assert key_of_digest(sha256.hexdigest()) == KEY != sha256.digest()


def test_known_bytes():
    """Computed with `openssl dgst -mac HMAC` over the parts as the module describes them."""
    assert json.loads(SEALED)["seal"] == KNOWN


@pytest.mark.parametrize(
    ("key", "kind", "device"),
    [(key_of("another"), "update", "a"), (KEY, "alive", "a"), (KEY, "update", "b"), (KEY, "updat", "ea")],
)
def test_another_key_kind_or_device_does_not_open_it(key, kind, device):
    with pytest.raises(NotSealed, match=f"not that of {device}"):
        opened(SEALED, key, kind, device)


@given(st.integers(0, len(SEALED) - 1), st.integers(1, 255))
def test_no_byte_can_be_changed(place, change):
    changed = bytearray(SEALED)
    changed[place] ^= change
    with pytest.raises(NotSealed):
        opened(bytes(changed), KEY, "update", "a")


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"{}", BODY, SEALED[:-1], SEALED + b" ", SEALED + b"\n", SEALED[:-1] + b',"w":[9]}', SEALED.replace(b'"7.', b'"07.'),
        SEALED.replace(b'"7.', b'"8.'), SEALED.replace(b'"7.', b'"9999999999999999999.'), SEALED.replace(b',"seal"', b', "seal"'),
    ],
)  # fmt: skip
def test_what_is_not_sealed_is_said_to_be_so(payload):
    with pytest.raises(NotSealed):
        opened(payload, KEY, "update", "a")


@pytest.mark.parametrize(("body", "counter"), [(b"[1]", 1), (BODY, 0), (BODY, MAX_COUNTER + 1), (BODY + b"\n", 1)])
def test_what_cannot_be_sealed_is_refused(body, counter):
    with pytest.raises(ValueError, match="expected 1 to"):
        seal(body, KEY, "update", "a", counter)
