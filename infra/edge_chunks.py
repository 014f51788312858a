"""A training module in pieces, as it comes over MQTT: in any order, some twice, among those of other modules.

    {"app_name": NAME, "chunk_idx": 0.., "total_chunks": N, "data": BASE64, "sha256": of the whole module, 64 hex digits}

Error: BadChunk.
"""

import base64
import binascii
import hashlib
from collections.abc import Mapping
from typing import Any

from blocks.wasm_runner import MAX_MODULE_BYTES

MAX_CHUNKS = 65_536


class BadChunk(ValueError):
    """A piece that cannot be of the module; what came before it stays."""


class Assembly:
    """One module on its way. sha256: the digest that it must have; empty: the one that its pieces name."""

    def __init__(self, app_name: str, sha256: str) -> None:
        self.app_name, self._wanted = app_name, sha256
        self._pieces: dict[int, bytes] = {}
        self._kind: tuple[int, str] = (0, "")

    def take(self, message: Mapping[str, Any]) -> bytes | None:
        """The whole module once its last piece has come, else None. Raises BadChunk."""
        if message.get("app_name") != self.app_name:
            return None
        index, total, sha256 = message.get("chunk_idx"), message.get("total_chunks"), message.get("sha256", "")
        if type(index) is not int or type(total) is not int or not 0 <= index < total <= MAX_CHUNKS:
            raise BadChunk(
                f"chunk_idx {index!r} of total_chunks {total!r}: expected 0 <= index < total <= {MAX_CHUNKS}"
            )
        if not isinstance(sha256, str) or (self._wanted and sha256 not in ("", self._wanted)):
            raise BadChunk(f"sha256 {sha256!r:.80}: expected {self._wanted}")
        if not (self._wanted or sha256):
            raise BadChunk("no sha256, and the task names none: the module could not be checked")
        if self._kind != (total, sha256):
            self._kind, self._pieces = (total, sha256), {}  # it was cut anew
        self._pieces[index] = _decoded(message.get("data"))
        if sum(map(len, self._pieces.values())) > MAX_MODULE_BYTES:
            self._pieces = {}
            raise BadChunk(f"more than {MAX_MODULE_BYTES} bytes")
        return self._whole() if len(self._pieces) == total else None

    def _whole(self) -> bytes:
        data = b"".join(self._pieces[index] for index in sorted(self._pieces))
        self._pieces = {}
        digest, wanted = hashlib.sha256(data).hexdigest(), self._wanted or self._kind[1]
        if digest != wanted:
            raise BadChunk(f"the pieces of {self.app_name} make digest {digest}, expected {wanted}")
        return data


def _decoded(data: Any) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise BadChunk(f"data is no base64: {error}") from None
