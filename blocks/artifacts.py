"""Where bytes are: a store that is not trusted. What comes out is checked by whoever relies on it.

Each owner (an address) has a folder of its own: ``blobs/<sha256>`` for content named by its digest, and
``records/<path>`` for small signed records under an agreed name, each written once.

Errors: MissingArtifact, TamperedArtifact, AlreadyPosted; OSError (disk full, no permission) passes through.
"""

import ctypes
import hashlib
import os
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from eth_utils.address import to_checksum_address
from prefect.blocks.core import Block
from pydantic import Field

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
    """A directory as artifact store."""

    _block_type_name = "HealChain artifact store"
    _block_type_slug = "healchain-artifacts"
    _description = "The directory that holds ciphertexts, models and signed records, each named by its digest."

    root: str = Field(description="the directory; one folder per owner below it")

    def put(self, owner: str, data: bytes, *, durable: bool = True) -> ArtifactRef:
        """Store bytes under their SHA-256. Putting the same bytes again changes nothing, or repairs what is stored.

        A kill leaves all of them or nothing. With durable=False a power cut may leave less, until `sync`: syncing many at
        once takes a third of the time, and what no record names yet can be made again.
        """
        digest = sha256_hex(data)
        target = self._blob(owner, digest)
        with suppress(FileNotFoundError):
            if not _is_content(target, data):
                target.unlink()
        with suppress(FileExistsError):
            _write_once(target, data, durable=durable)
        return ArtifactRef(owner=owner, sha256=digest, size_bytes=len(data))

    def sync(self) -> None:
        """Make everything that was put survive a power cut. Raises OSError when it could not be written."""
        descriptor = os.open(self.root, os.O_RDONLY)
        try:
            # Of the store's file system alone, and unlike os.sync it reports errors.
            if _libc.syncfs(descriptor) != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), self.root)
        finally:
            os.close(descriptor)

    def get(self, owner: str, sha256: str, *, max_bytes: int | None = None) -> bytes:
        """The bytes that the digest names. Raises MissingArtifact or TamperedArtifact."""
        data = self._read(self._blob(owner, sha256), f"artifact {sha256} of {owner}", max_bytes)
        if sha256_hex(data) != sha256:
            raise TamperedArtifact(f"artifact {sha256} of {owner} has digest {sha256_hex(data)}: truncated or changed")
        return data

    def post(self, owner: str, path: str, data: bytes) -> None:
        """Store a record under an agreed name, once. Posting the same bytes again changes nothing."""
        target = self._record(owner, path)
        if len(data) > MAX_RECORD_BYTES:
            raise ValueError(f"record {path} has {len(data)} bytes, at most {MAX_RECORD_BYTES}: put it as an artifact")
        try:
            _write_once(target, data)
        except FileExistsError as error:
            if target.read_bytes() != data:
                raise AlreadyPosted(f"{owner} has posted another record {path}: a record is written once") from error

    def find(self, owner: str, path: str) -> bytes | None:
        """The record's bytes, or None. Nothing about them is checked here but their size."""
        try:
            return self._read(self._record(owner, path), f"record {path} of {owner}", MAX_RECORD_BYTES)
        except MissingArtifact:
            return None

    def list_records(self, owner: str) -> list[str]:
        """Paths of all records of one owner, in order."""
        folder = self._owner(owner) / "records"
        return sorted(str(found.relative_to(folder)) for found in folder.rglob("*.json"))

    def owners_of(self, path: str) -> list[str]:
        """Addresses of all who posted a record under this agreed name, in order, checksummed."""
        self._record(ZERO_ADDRESS, path)  # refuses a path that is none
        found = Path(self.root).glob(f"0x*/records/{path}")
        owners = [one.relative_to(self.root).parts[0] for one in found]
        return sorted((str(to_checksum_address(one)) for one in owners if _OWNER.fullmatch(one)), key=str.lower)

    def _read(self, target: Path, what: str, max_bytes: int | None) -> bytes:
        try:
            size = target.stat().st_size
            if max_bytes is not None and size > max_bytes:
                raise TamperedArtifact(f"{what} has {size} bytes, at most {max_bytes} are allowed")
            return target.read_bytes()
        except FileNotFoundError as error:
            raise MissingArtifact(f"{what} is not in the store") from error

    def _owner(self, owner: str) -> Path:
        if not _OWNER.fullmatch(owner):
            raise ValueError(f"owner {owner!r} is not an address")
        return Path(self.root) / owner.lower()

    def _blob(self, owner: str, sha256: str) -> Path:
        if not _SHA256.fullmatch(sha256):
            raise ValueError(f"digest {sha256!r} is not 0x and 64 lower-case hex digits")
        return self._owner(owner) / "blobs" / sha256[2:4] / sha256[2:]

    def _record(self, owner: str, path: str) -> Path:
        if not _PATH.fullmatch(path):
            raise ValueError(f"record path {path!r} may hold letters, digits, '.', '_', '-' and single slashes")
        return self._owner(owner) / "records" / path


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
