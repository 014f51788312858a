"""Where bytes are: a store that is not trusted. What comes out is checked by whoever relies on it.

It is a directory, or a bucket of an S3 server. Each owner (an address) has a folder of its own: ``blobs/<sha256>`` for
content named by its digest, and ``records/<path>`` for small signed records under an agreed name, each written once.

Errors: MissingArtifact, TamperedArtifact, AlreadyPosted; OSError (disk full, PermissionError, StoreUnavailable) passes through.
"""

import ctypes
import hashlib
import os
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from eth_utils.address import to_checksum_address
from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, SecretStr, model_validator

from blocks.object_store import Bucket, Oversized, parse_url
from contracts.messages import ZERO_ADDRESS

MAX_RECORD_BYTES = 256 * 1024
_OWNER = re.compile(r"^0x[0-9a-fA-F]{40}$")
_PATH = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")
_SHA256 = re.compile(r"^0x[0-9a-f]{64}$")
_libc = ctypes.CDLL(None, use_errno=True)


class MissingArtifact(LookupError):
    """Nothing is stored under this name."""


class TamperedArtifact(ValueError):
    """What is stored is not what its digest names."""


class AlreadyPosted(ValueError):
    """Another record is stored under this name, and records are written once."""


@dataclass(frozen=True)
class ArtifactRef:
    """Bytes in the store: who put them there, and their SHA-256."""

    owner: str
    sha256: str
    size_bytes: int

    @property
    def uri(self) -> str:
        return f"artifact:{self.owner}/{self.sha256}"


def sha256_hex(data: bytes) -> str:
    return "0x" + hashlib.sha256(data).hexdigest()


class ArtifactStore(Block):
    """A directory, or a bucket of an S3 server, as artifact store."""

    _block_type_name = "HealChain artifact store"
    _block_type_slug = "healchain-artifacts"
    _description = (
        "Where ciphertexts, models and signed records are, each named by its digest: a directory or an S3 bucket."
    )
    # A message about wrong settings would else repeat them, with the secret key.
    model_config = ConfigDict(hide_input_in_errors=True)

    root: str = Field(
        description="a directory, or http(s)://HOST:PORT/BUCKET of an S3 server; one folder per owner below it"
    )
    access_key: str | None = Field(default=None, description="of the account on the S3 server; none for a directory")
    secret_key: SecretStr | None = Field(default=None, description="of that account; none for a directory")
    patience_s: float = Field(default=60, ge=0, le=3600, description="how long an S3 server that is away is waited for")

    @model_validator(mode="after")
    def _keys_belong_to_a_server(self) -> Self:
        given = [name for name in ("access_key", "secret_key") if getattr(self, name) is not None]
        if "://" not in self.root:
            if given:
                raise ValueError(
                    f"{' and '.join(given)}: a directory takes none; root {self.root!r} is no http(s)://..."
                )
            return self
        parse_url(self.root)
        if not self.access_key or not (self.secret_key and self.secret_key.get_secret_value()):
            raise ValueError(f"access_key and secret_key: the S3 server of root {self.root!r} needs both")
        return self

    def put(self, owner: str, data: bytes, *, durable: bool = True) -> ArtifactRef:
        """Store bytes under their SHA-256. Putting the same bytes again changes nothing, or repairs what is stored.

        A kill leaves all of them or nothing. With durable=False a power cut may leave less, until `sync`: syncing many at
        once takes a third of the time, and what no record names yet can be made again.
        """
        digest = sha256_hex(data)
        self._place.hold(_blob(owner, digest), data, durable=durable)
        return ArtifactRef(owner=owner, sha256=digest, size_bytes=len(data))

    def sync(self) -> None:
        """Make everything that was put survive a power cut. Raises OSError when it could not be written."""
        self._place.sync()

    def get(self, owner: str, sha256: str, *, max_bytes: int | None = None) -> bytes:
        """The bytes that the digest names. Raises MissingArtifact or TamperedArtifact."""
        data = self._read(_blob(owner, sha256), f"artifact {sha256} of {owner}", max_bytes)
        if sha256_hex(data) != sha256:
            raise TamperedArtifact(f"artifact {sha256} of {owner} has digest {sha256_hex(data)}: truncated or changed")
        return data

    def size(self, owner: str, sha256: str) -> int | None:
        """How many bytes are stored under this digest, unchecked; None when there is nothing."""
        return self._place.size(_blob(owner, sha256))

    def remove(self, owner: str, sha256: str) -> None:
        """Let go of bytes that nothing names any longer. Removing what is not there changes nothing."""
        self._place.remove(_blob(owner, sha256))

    def post(self, owner: str, path: str, data: bytes) -> None:
        """Store a record under an agreed name, once. Posting the same bytes again changes nothing."""
        name = _record(owner, path)
        if len(data) > MAX_RECORD_BYTES:
            raise ValueError(f"record {path} has {len(data)} bytes, at most {MAX_RECORD_BYTES}: put it as an artifact")
        try:
            self._place.create(name, data)
        except FileExistsError as error:
            if self.find(owner, path) != data:
                raise AlreadyPosted(f"{owner} has posted another record {path}: a record is written once") from error

    def find(self, owner: str, path: str) -> bytes | None:
        """The record's bytes, or None. Nothing about them is checked here but their size."""
        try:
            return self._read(_record(owner, path), f"record {path} of {owner}", MAX_RECORD_BYTES)
        except MissingArtifact:
            return None

    def list_records(self, owner: str) -> list[str]:
        """Paths of all records of one owner, in order."""
        return sorted(name for name in self._place.names(f"{_folder(owner)}/records") if name.endswith(".json"))

    def owners_of(self, path: str) -> list[str]:
        """Addresses of all who posted a record under this agreed name, in order, checksummed."""
        _record(ZERO_ADDRESS, path)  # refuses a path that is none
        found = self._place.folders_with(f"records/{path}")
        return sorted((str(to_checksum_address(one)) for one in found if _OWNER.fullmatch(one)), key=str.lower)

    @property
    def _place(self) -> "Directory | Bucket":
        if self.access_key is None or self.secret_key is None:
            return Directory(Path(self.root))
        return Bucket(self.root, self.access_key, self.secret_key.get_secret_value(), self.patience_s)

    def _read(self, name: str, what: str, max_bytes: int | None) -> bytes:
        try:
            return self._place.read(name, max_bytes)
        except Oversized as error:
            raise TamperedArtifact(f"{what} has {error.size_bytes} bytes, at most {max_bytes} are allowed") from error
        except FileNotFoundError as error:
            raise MissingArtifact(f"{what} is not in the store") from error


def _folder(owner: str) -> str:
    if not _OWNER.fullmatch(owner):
        raise ValueError(f"owner {owner!r} is not an address")
    return owner.lower()


def _blob(owner: str, sha256: str) -> str:
    if not _SHA256.fullmatch(sha256):
        raise ValueError(f"digest {sha256!r} is not 0x and 64 lower-case hex digits")
    return f"{_folder(owner)}/blobs/{sha256[2:4]}/{sha256[2:]}"


def _record(owner: str, path: str) -> str:
    if not _PATH.fullmatch(path):
        raise ValueError(f"record path {path!r} may hold letters, digits, '.', '_', '-' and single slashes")
    return f"{_folder(owner)}/records/{path}"


@dataclass(frozen=True)
class Directory:
    """Named bytes in a directory, as `Bucket` has them in a bucket."""

    root: Path

    def read(self, name: str, max_bytes: int | None) -> bytes:
        """All of a file. Raises FileNotFoundError or Oversized."""
        target = self.root / name
        size = target.stat().st_size
        if max_bytes is not None and size > max_bytes:
            raise Oversized(size)
        return target.read_bytes()

    def hold(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Make the file's content `data`; content that is already so is left alone."""
        target = self.root / name
        with suppress(FileNotFoundError):
            if not _is_content(target, data):
                target.unlink()
        with suppress(FileExistsError):
            _write_once(target, data, durable=durable)

    def create(self, name: str, data: bytes) -> None:
        """Write a file that is not there. Raises FileExistsError."""
        _write_once(self.root / name, data)

    def size(self, name: str) -> int | None:
        try:
            return (self.root / name).stat().st_size
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        """Names of all files in a folder and below, relative to it."""
        found = (self.root / folder).rglob("*")
        return [str(one.relative_to(self.root / folder)) for one in found if one.is_file()]

    def folders_with(self, tail: str) -> list[str]:
        """The folders 0x... at the top in which there is a file `tail`."""
        return [one.relative_to(self.root).parts[0] for one in self.root.glob(f"0x*/{tail}")]

    def sync(self) -> None:
        """Make everything below survive a power cut. Raises OSError when it could not be written."""
        descriptor = os.open(self.root, os.O_RDONLY)
        try:
            # Of the store's file system alone, and unlike os.sync it reports errors.
            if _libc.syncfs(descriptor) != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(self.root))
        finally:
            os.close(descriptor)


def _is_content(target: Path, data: bytes) -> bool:
    return target.stat().st_size == len(data) and target.read_bytes() == data


def sync_folder(folder: Path) -> None:
    """Make a new name in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_once(target: Path, data: bytes, *, durable: bool = True) -> None:
    """Write all of `data` or nothing. Raises FileExistsError when the target is there already."""
    if target.exists():
        raise FileExistsError(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.parent / f".{target.name}.{secrets.token_hex(8)}"
    try:
        with draft.open("xb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.link(draft, target)
        if durable:
            sync_folder(target.parent)
    finally:
        draft.unlink(missing_ok=True)
