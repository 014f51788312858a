"""Seals: who says a message over MQTT, and to whom, whichever broker and topic brought it. Pure.

A sealed message is a JSON object whose last field is

    "seal": "COUNTER.MAC"     HMAC-SHA-256 of kind, device and counter, and of every byte before the field; 64 hex digits

Who does not know of seals reads one field more. kind is what the message is about (tasks.edge.rounds), whatever topic it is on,
so that an update cannot be shown as a beat, nor a server's word as a device's. The counter rises with each message of a sender.

The key comes from SHA-256 of the device's key, which is all that a server keeps of it, by the expanding step of HKDF
(RFC 5869) under a name of its own. A device's key is 256 random bits: nobody finds it or its digest by trying. Who reads the
server's database has the digests, so can make seals, but still cannot enter the broker or the gateway with them: they ask for
the key itself.

Error: NotSealed.
"""

import hashlib
import hmac
import re

UPDATE = "fl/rounds/updates"  # the kind of an update; of other messages it is their topic, as if all went to all
DOMAIN = b"healchain edge message 1"
MAX_COUNTER = 2**63 - 1
_SEAL = re.compile(rb',"seal":"([1-9][0-9]{0,18})\.([0-9a-f]{64})"\}\Z')
SEAL_BYTES = len(b',"seal":"."}') + 19 + 64  # at most


class NotSealed(ValueError):
    """No seal, or one that is not of this message, this sender and this key."""


def key_of(device_key: str) -> bytes:
    """Of the key as its device has it. 32 bytes."""
    return key_of_digest(hashlib.sha256(device_key.encode()).hexdigest())


def key_of_digest(key_sha256: str) -> bytes:
    """Of its SHA-256 as a server has it, 64 hex digits."""
    return hmac.digest(bytes.fromhex(key_sha256), DOMAIN + b"\x01", "sha256")


def seal(body: bytes, key: bytes, kind: str, device: str, counter: int) -> bytes:
    """body: a JSON object with a field at least, and no space at its end."""
    if not body.endswith(b"}") or not 0 < counter <= MAX_COUNTER:
        raise ValueError(f"counter = {counter}: expected 1 to {MAX_COUNTER}, and a JSON object")
    mac = _mac(body[:-1], key, kind, device, counter)
    return body[:-1] + f',"seal":"{counter}.{mac}"}}'.encode()


def has_seal(payload: bytes) -> bool:
    return _found(payload) is not None


def opened(payload: bytes, key: bytes, kind: str, device: str) -> tuple[bytes, int]:
    """The message without its seal, and its counter. Raises NotSealed."""
    found = _found(payload)
    if found is None:
        raise NotSealed("no seal at its end")
    said, counter = payload[: len(payload) - len(found[0])], int(found[1])
    if counter > MAX_COUNTER or not hmac.compare_digest(_mac(said, key, kind, device, counter), found[2].decode()):
        raise NotSealed(f"the seal is not that of {device} for this message: the key was replaced, or another sent it")
    return said + b"}", counter


def _found(payload: bytes) -> re.Match[bytes] | None:
    return _SEAL.search(payload[-SEAL_BYTES:])


def _mac(said: bytes, key: bytes, kind: str, device: str, counter: int) -> str:
    """Kinds and names of devices hold no zero byte, so the parts cannot run into each other."""
    head = b"\0".join((DOMAIN, kind.encode(), device.encode(), str(counter).encode(), b""))
    mac = hmac.new(key, head, "sha256")
    mac.update(said)
    return mac.hexdigest()
