"""What a device must not forget when it is killed: which rounds it trained, and what it has not sent yet.

    device.json        its id, and its key                                                              mode 0600
    counter.json       where the counters of its sealed messages begin, higher with each connection
    status.json        how it is, for whoever looks after it
    rounds/NAME.json   a round: its task until it is trained, its update until it is sent, then how it ended
    rounds/NAME.aside  one of these that cannot be used, because somebody changed it, or that could not be sent
    modules/SHA256     training modules; each is checked by its digest when it is read
    compiled/          their machine code (blocks.wasm_runner)

A file is written aside, synced and renamed, so that a kill leaves the earlier one or the whole new one.

Errors: OSError, and Unusable for a device.json that somebody changed.
"""

import fcntl
import hashlib
import json
import logging
import os
import secrets
import uuid
from pathlib import Path
from typing import Any, NamedTuple

from blocks.wasm_runner import MAX_DEPTH, Limits, read_object

log = logging.getLogger("healchain.device")
STARTED, TRAINED, SENT, REFUSED = "started", "trained", "sent", "refused"
OVER = (SENT, REFUSED)
KEPT_ROUNDS = 200  # of those that are over
KEPT_MODULES = 8
MAX_SESSION = 2**35  # Unix seconds of the year 3058: what is higher was not written here


class Unusable(ValueError):
    """A file of the device's home does not hold what it should; names it, and what to do."""


class Credentials(NamedTuple):
    """Who the device is. key: empty where the server takes devices without one."""

    proplet_id: str
    key: str


class Round(NamedTuple):
    """task: as the device was told; update: as it sends it; detail: how it was sent, or why it was refused."""

    round_id: str
    state: str
    task: dict[str, Any]
    update: dict[str, Any]
    detail: str = ""


class Memory:
    """A device's home. One process has it at a time."""

    def __init__(self, home: Path) -> None:
        self.home = home
        for folder in (home, home / "rounds", home / "modules"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise Unusable(f"{home} is in use by another device: stop it, or give another --home") from None

    def close(self) -> None:
        os.close(self._lock)

    def credentials(self, wanted_id: str, key: str) -> Credentials:
        """Those of device.json, made when there is none. A key that is given replaces the one in the file."""
        path = self.home / "device.json"
        found = _read(path) if path.exists() else {}
        if not all(isinstance(value, str) for value in found.values()):
            raise Unusable(
                f"{path}: expected texts, proplet_id and key: correct it, or remove it and give --id and the key"
            )
        if path.exists() and path.stat().st_mode & 0o077:
            raise Unusable(f"{path} holds a key, and others can read it: chmod 600 {path}")
        if wanted_id and found.get("proplet_id", wanted_id) != wanted_id:
            raise Unusable(f"id = {wanted_id}: {path} is of device {found['proplet_id']}; give another --home")
        mine = Credentials(wanted_id or found.get("proplet_id") or str(uuid.uuid4()), key or found.get("key", ""))
        if mine._asdict() != found:
            _write(path, mine._asdict())
        return mine

    def begin_session(self, now_s: int) -> int:
        """A number higher than any before in this home; and where the home is new, higher than those of an earlier one, if the
        clock is right."""
        path = self.home / "counter.json"
        last = _read(path).get("session") if path.exists() else 0
        if type(last) is not int or not 0 <= last < MAX_SESSION:
            raise Unusable(f"{path} holds no counter: remove it")
        session = max(last + 1, now_s)
        _write(path, {"session": session})
        return session

    def note_status(self, status: dict[str, Any]) -> None:
        _write(self.home / "status.json", status)

    def find(self, round_id: str) -> Round | None:
        path = self._path(round_id)
        return self._load(path) if path.exists() else None

    def keep(self, round_: Round) -> None:
        """Remember a round; of one that is over, no more than that."""
        if round_.state in OVER:
            round_ = round_._replace(task={}, update={})
        _write(self._path(round_.round_id), round_._asdict())

    def unfinished(self) -> list[Round]:
        """Rounds that were started and not sent, oldest first. What is over for long is forgotten."""
        paths = sorted((self.home / "rounds").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        rounds = [(path, one) for path in paths if (one := self._load(path)) is not None]
        over = [path for path, one in rounds if one.state in OVER]
        for path in over[:-KEPT_ROUNDS]:
            path.unlink()
        return [one for _, one in rounds if one.state not in OVER]

    def module(self, sha256: str) -> bytes | None:
        """The bytes that the digest (64 hex digits) names, if they are here and unchanged."""
        path = self.home / "modules" / sha256
        if not path.exists():
            return None
        data = path.read_bytes()
        return data if hashlib.sha256(data).hexdigest() == sha256 else None

    def keep_module(self, data: bytes) -> None:
        folder = self.home / "modules"
        _write_bytes(folder / hashlib.sha256(data).hexdigest(), data)
        for old in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)[:-KEPT_MODULES]:
            old.unlink()

    def _load(self, path: Path) -> Round | None:
        """The round of a file. One that cannot be used is set aside, so that it stands in the way of no other."""
        try:
            found = _round(path)
            if path != self._path(found.round_id):
                raise Unusable(f"it is of round {found.round_id!r:.80}, which has another file")
        except Unusable as error:
            aside = path.with_suffix(".aside")
            path.replace(aside)
            log.error("%s cannot be used and is set aside as %s: %s", path, aside.name, error)
            return None
        return found

    def _path(self, round_id: str) -> Path:
        return self.home / "rounds" / f"{hashlib.sha256(round_id.encode()).hexdigest()[:32]}.json"


def _round(path: Path) -> Round:
    """Whatever it holds can be sent. Raises Unusable."""
    try:
        # The task's texts count, too; and the update is a level below its file's top.
        fields = read_object(path.read_bytes(), max_values=2 * Limits.answer_values, max_depth=MAX_DEPTH + 1)
        found = Round(**fields)
    except (ValueError, TypeError) as error:
        raise Unusable(f"no round: {error}") from None
    kinds = (str, str, dict, dict, str)
    if not all(map(isinstance, found, kinds)) or found.state not in (STARTED, TRAINED, *OVER):
        raise Unusable("no round: a field has another kind of value")
    if found.state not in OVER and not isinstance(found.task.get("env"), dict):
        raise Unusable("task.env: expected an object of texts")
    if found.state == TRAINED and not isinstance(found.update.get("update"), dict):
        raise Unusable("update.update: expected an object")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{path} is no JSON ({error}): remove it") from None
    if not isinstance(found, dict):
        raise Unusable(f"{path} holds no JSON object: remove it")
    return found


def _write(path: Path, fields: dict[str, Any]) -> None:
    _write_bytes(path, json.dumps(fields).encode())


def _write_bytes(path: Path, data: bytes) -> None:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
