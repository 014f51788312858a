"""The seals of a device (tasks.edge.seal): on all that it says over MQTT, and on what its server tells it.

A device without a key has none: it is let in by servers in open mode alone. With `--open` it seals, and takes what is not sealed.

The counter of a message is the number of its connection, which is on disk before, and its place in it. A last will is handed to
the broker when the connection begins and said after its end, so it has the last place.

Error: NotSealed.
"""

import json
import time
from typing import Any

from infra.edge_memory import Credentials, Memory
from tasks.edge.seal import NotSealed, has_seal, key_of, opened, seal

PLACES = 2**28  # of a connection: nine months of ten messages a second


class Seals:
    """Of one device and its server."""

    def __init__(self, memory: Memory, me: Credentials, *, is_open: bool) -> None:
        self._memory, self._device = memory, me.proplet_id
        self._key = key_of(me.key) if me.key else None
        self._is_open = is_open
        self._session = self._place = 0

    @property
    def are_needed(self) -> bool:
        """Whether what has no seal is passed over."""
        return self._key is not None and not self._is_open

    def begin(self) -> None:
        """A connection begins."""
        self._session, self._place = self._memory.begin_session(int(time.time())), 0

    def closing(self, kind: str, said: dict[str, Any]) -> bytes:
        """A last will, sealed."""
        return self._sealed(kind, said, PLACES - 1)

    def on(self, kind: str, said: dict[str, Any]) -> bytes:
        """The next message of this connection, sealed."""
        self._place += 1
        if self._place == PLACES - 1:
            self.begin()
        return self._sealed(kind, said, self._place)

    def _sealed(self, kind: str, said: dict[str, Any], place: int) -> bytes:
        body = json.dumps(said).encode()
        if self._key is None:
            return body
        return seal(body, self._key, kind, self._device, self._session * PLACES + place)

    def opened(self, kind: str, payload: bytes) -> bytes:
        """What the server said to this device. Raises NotSealed."""
        if self._key is None or (self._is_open and not has_seal(payload)):
            return payload
        try:
            return opened(payload, self._key, kind, self._device)[0]
        except NotSealed as error:
            raise NotSealed(f"{error}; --open 1 takes it from a server that seals nothing") from None
