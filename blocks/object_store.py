"""A bucket of an S3 server as a place of named bytes: MinIO's client, with a server that may be away or may lie.

Errors: FileNotFoundError and FileExistsError as of a file, Oversized, PermissionError for what the server refuses, and
StoreUnavailable once it was waited for. What comes out is checked by whoever asked for it.
"""

import errno
import io
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar
from xml.etree.ElementTree import ParseError

from minio import Minio
from minio.error import MinioException, S3Error
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager, Timeout
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse

T = TypeVar("T")
_URL = re.compile(r"(https?)://([A-Za-z0-9.-]+(?::[0-9]{1,5})?)/([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/?")

CONNECT_S = 5.0
# Of one object in one request; what is larger would be uploaded in parts, of which the server keeps those of a killed writer.
LARGEST_BYTES = 5 * 1024**3
SMALLEST_PART_BYTES = 5 * 1024**2
PIECE_BYTES = 256 * 1024
AT_ONCE = 8
# A server that has just started answers before it has read its users: for 35 ms, or, when the one before it was killed while
# it read them, until that one's lock is void: measured, for 6 to 10 s (infra.object_store).
STARTING_S = 20.0
PASSING = {408, 429, 500, 502, 503, 504}

REMEDIES = {
    "InvalidAccessKeyId": "the server does not know this access key: ask the publisher to admit this address",
    "SignatureDoesNotMatch": "secret_key is not the one of this access key: use the one that was handed out last",
    "RequestTimeTooSkewed": "the clocks of this host and of the server differ by more than 15 minutes: set them",
}
NOT_ALLOWED = "an actor may write only below its own address, and read no other's folder in private/"
# A server that is away, that says no, or whose answer is no XML.
FAILURES = (HTTPError, MinioException, ParseError, UnicodeError)


class StoreUnavailable(OSError):
    """The store's server cannot be reached, is not ready, or is none."""


class Oversized(ValueError):
    """What is stored is larger than allowed; it was not read."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(f"{size_bytes} bytes")
        self.size_bytes = size_bytes


def parse_url(root: str) -> tuple[bool, str, str]:
    """Whether TLS is used, HOST:PORT, and the bucket of http(s)://HOST:PORT/BUCKET. Raises ValueError for anything else."""
    found = _URL.fullmatch(root)
    if found is None:
        # Not repeated here: somebody may have put a password into it.
        raise ValueError(
            "root: a store on a server is http://HOST:PORT/BUCKET or https://HOST:PORT/BUCKET, nothing more"
        )
    return found[1] == "https", found[2], found[3]


@dataclass(frozen=True)
class Bucket:
    """Named bytes in a bucket. An object is there whole or not at all, and is durable once the server acknowledged it."""

    url: str
    access_key: str
    secret_key: str = field(repr=False)
    patience_s: float = 60.0
    silence_s: float = 30.0  # a connection on which nothing moves for so long is given up

    def read(self, name: str, max_bytes: int | None) -> bytes:
        """All of an object, in one copy. Raises FileNotFoundError or Oversized."""
        return self._ask(f"read {name}", lambda client: _received(self._get(client, name), max_bytes))

    def hold(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Make the object's content `data`; content that is already so is left alone. `durable` is always so."""
        try:
            same = self._ask(f"compare {name}", lambda client: _is_content(self._get(client, name), data))
        except FileNotFoundError:
            same = False
        if not same:
            self._put(name, data)

    def create(self, name: str, data: bytes) -> None:
        """Store an object that is not there. Raises FileExistsError.

        Looked up first, then put: not every server honours a conditional put. Two writers at once would have to hold
        the same owner's credentials, and what is signed is claimed in the signer's home before it comes here.
        """
        if self._has(name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        self._put(name, data)

    def size(self, name: str) -> int | None:
        """Bytes of an object, by GET as in `_has`; None when there is none."""
        try:
            return self._ask(f"measure {name}", lambda client: _size(self._get(client, name)))
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        self._ask(f"remove {name}", lambda client: client.remove_object(bucket_name=self._bucket, object_name=name))

    def names(self, folder: str) -> list[str]:
        """Names of all objects in a folder and below, relative to it."""
        listed = self._list(f"{folder}/", recursive=True)
        return [name.removeprefix(f"{folder}/") for name in listed]

    def folders_with(self, tail: str) -> list[str]:
        """The folders 0x... at the top in which there is an object `tail`."""
        folders = [name.rstrip("/") for name in self._list("0x", recursive=False) if name.endswith("/")]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            found = list(threads.map(lambda folder: self._has(f"{folder}/{tail}"), folders))
        return [folder for folder, has in zip(folders, found, strict=True) if has]

    def sync(self) -> None:
        """Nothing is left to do: what the server acknowledged is durable."""

    def _has(self, name: str) -> bool:
        """Whether there is such an object. By GET: the answer to HEAD does not say why it is refused."""
        try:
            self.read(name, PIECE_BYTES)
        except FileNotFoundError:
            return False
        except Oversized:
            return True
        return True

    def _put(self, name: str, data: bytes) -> None:
        if len(data) > LARGEST_BYTES:
            raise ValueError(f"{name} has {len(data)} bytes, at most {LARGEST_BYTES}: store it in chunks")
        part_size = max(len(data), SMALLEST_PART_BYTES)
        self._ask(
            f"write {name}",
            lambda client: client.put_object(
                bucket_name=self._bucket, object_name=name, data=io.BytesIO(data), length=len(data), part_size=part_size
            ),
        )

    def _get(self, client: Minio, name: str) -> BaseHTTPResponse:
        return client.get_object(bucket_name=self._bucket, object_name=name)

    def _list(self, prefix: str, *, recursive: bool) -> list[str]:
        def listed(client: Minio) -> list[str]:
            found = client.list_objects(bucket_name=self._bucket, prefix=prefix, recursive=recursive)
            try:
                return [str(one.object_name) for one in found]
            except ValueError as error:
                raise StoreUnavailable(f"{self.url} does not answer as an S3 server does: {error}") from error

        return self._ask(f"list {prefix}", listed)

    @property
    def _bucket(self) -> str:
        return parse_url(self.url)[2]

    def _ask(self, what: str, question: Callable[[Minio], T]) -> T:
        """The server's answer. One that is away or not ready is asked again until patience_s after its first failure."""
        failing_since: float | None = None
        pause = 0.05
        while True:
            client = _client(os.getpid(), self.url, self.access_key, self.secret_key, self.silence_s)
            try:
                return question(client)
            except FAILURES as error:
                failed = time.monotonic()
                failing_since = failed if failing_since is None else failing_since
                if failed + pause - failing_since > self._waits_for(error):
                    raise self._explained(what, error, failed - failing_since) from error
            time.sleep(pause)
            pause = min(2 * pause, 2.0)

    def _waits_for(self, error: Exception) -> float:
        """Seconds for which this error may pass by itself."""
        if isinstance(error, S3Error):
            if error.code == "InvalidAccessKeyId":
                return min(STARTING_S, self.patience_s)
            return self.patience_s if error.response.status in PASSING else 0.0
        return self.patience_s

    def _explained(self, what: str, error: Exception, waited_s: float) -> OSError:
        if isinstance(error, S3Error):
            if error.code == "NoSuchKey":
                return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), what)
            if error.code == "NoSuchBucket":
                return StoreUnavailable(f"{self.url}: the server has no such bucket: correct root, or make the bucket")
            if error.response.status in (401, 403):
                remedy = REMEDIES.get(str(error.code), NOT_ALLOWED)
                return PermissionError(f"{self.url} refuses {self.access_key} to {what} ({error.code}): {remedy}")
        return StoreUnavailable(
            f"{self.url} did not {what} ({error}), {waited_s:.0f} s after it first failed, and patience_s is "
            f"{self.patience_s:.0f}: is it running, has it disk space, and is root its address?"
        )


def _received(response: BaseHTTPResponse, max_bytes: int | None) -> bytes:
    with closing(response):
        size = _announced(response)
        if max_bytes is not None and size > max_bytes:
            raise Oversized(size)
        data: bytes = response.read(decode_content=False)
        response.release_conn()
        return data


def _size(response: BaseHTTPResponse) -> int:
    """What the server announces; nothing of it is read."""
    with closing(response):
        return _announced(response)


def _is_content(response: BaseHTTPResponse, data: bytes) -> bool:
    """Whether exactly `data` comes, compared piece by piece."""
    with closing(response):
        if _announced(response) != len(data):
            return False
        expected, at = memoryview(data), 0
        for piece in response.stream(PIECE_BYTES, decode_content=False):
            if piece != expected[at : at + len(piece)]:
                return False
            at += len(piece)
        response.release_conn()
        return True


def _announced(response: BaseHTTPResponse) -> int:
    """The size that the server announced; what is shorter raises when it is read, and more is not read."""
    size: int | None = response.length_remaining
    if size is None:
        raise StoreUnavailable("the store's server does not say how large an object is: S3 servers do")
    return size


@lru_cache(maxsize=32)
def _client(process: int, url: str, access_key: str, secret_key: str, silence_s: float) -> Minio:
    """One client for each process and account, with its connections: a forked child must not use its parent's."""
    secure, endpoint, _ = parse_url(url)
    # retries=False: `_ask` repeats, and a redirection is not followed to wherever the server names.
    http = PoolManager(timeout=Timeout(connect=CONNECT_S, read=silence_s), retries=False, maxsize=2 * AT_ONCE)
    http.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}
    return Minio(endpoint=endpoint, access_key=access_key, secret_key=secret_key, secure=secure, http_client=http)


class _Piecewise:
    """Sends a large body in pieces: the time limit of a socket is for one call, so it holds for a piece, not for all."""

    def send(self, data: Any) -> None:
        if not isinstance(data, bytes):
            super().send(data)  # type: ignore[misc]
            return
        for start in range(0, len(data), PIECE_BYTES):
            super().send(memoryview(data)[start : start + PIECE_BYTES])  # type: ignore[misc]


class _Connection(_Piecewise, HTTPConnection):
    pass


class _SecureConnection(_Piecewise, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection
