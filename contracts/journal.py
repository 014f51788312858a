"""What an account is about to send and has sent, written to disk before anybody else hears of it.

    intent     one wish to change the chain: what is called with what, for which purpose; it has one nonce for good
    version    one signed transaction of an intent; further ones have the same nonce and higher fees

    state      meaning                                        does the same wish find it again?
    open       written; not known to be mined for good        yes
    done       mined, confirmed, reported to the caller       only when it has a purpose
    failed     mined and confirmed, but it reverted           no: it changed nothing
    replaced   another transaction has its nonce              no: none of its versions can be mined

One SQLite file for an account on a host, mode 0600: the transactions in it are signed, so whoever reads it can send them,
but no others. Every write is on the disk (fsync) when the call returns.
"""

import fcntl
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from contracts.messages import Bytes32

SCHEMA = """
CREATE TABLE IF NOT EXISTS intents (
    id INTEGER PRIMARY KEY, owner TEXT NOT NULL, key TEXT NOT NULL, purpose TEXT NOT NULL, nonce INTEGER NOT NULL,
    fields TEXT NOT NULL, state TEXT NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS one_intent_per_nonce ON intents (owner, nonce) WHERE state != 'replaced';
CREATE TABLE IF NOT EXISTS versions (
    number INTEGER PRIMARY KEY, intent INTEGER NOT NULL REFERENCES intents, hash TEXT NOT NULL,
    raw BLOB NOT NULL, max_fee_wei TEXT NOT NULL, tip_wei TEXT NOT NULL, signed_s REAL NOT NULL);
CREATE TABLE IF NOT EXISTS claims (owner TEXT, name TEXT, value TEXT NOT NULL, PRIMARY KEY (owner, name));
"""


class State(StrEnum):
    OPEN = "open"
    DONE = "done"
    FAILED = "failed"
    REPLACED = "replaced"


@dataclass(frozen=True)
class Fees:
    """Wei for one unit of gas: the most in all, and the part of it that goes to whoever includes the transaction."""

    max_fee_wei: int
    tip_wei: int


@dataclass(frozen=True)
class Version:
    hash: Bytes32
    raw: bytes
    fees: Fees
    signed_s: float


@dataclass(frozen=True)
class Intent:
    """`owner` is an account of a chain; `fields` are those of the transaction, without nonce and fees."""

    id: int
    owner: str
    purpose: str
    nonce: int
    fields: dict[str, Any]
    state: State
    versions: tuple[Version, ...]

    @property
    def newest(self) -> Version:
        return self.versions[-1]


class Journal:
    """The journal at `path`; without a path one in memory, for chains and accounts that do not outlive the process."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._mutex = threading.RLock()
        self._in_memory = None if path else sqlite3.connect(":memory:", check_same_thread=False)
        if path:
            _create_private(path)
            _create_private(self._lock_path)
        with self._database() as database:
            database.executescript(SCHEMA)

    def __str__(self) -> str:
        return str(self.path or "memory")

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Nobody else, thread or process, chooses a nonce meanwhile. Not to be nested."""
        if self.path is None:
            with self._mutex:
                yield
            return
        with self._lock_path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed, also by a kill
            yield

    def find(self, owner: str, key: str, *, with_done: bool) -> Intent | None:
        """The intent of this key that is open, or also one that is done."""
        states = (State.OPEN, State.DONE) if with_done else (State.OPEN, State.OPEN)
        found = self._intents("owner = ? AND key = ? AND state IN (?, ?)", owner, key, *states)
        return found[-1] if found else None

    def read(self, intent: int) -> Intent:
        return self._intents("id = ?", intent)[0]

    def unfinished(self, owner: str) -> list[Intent]:
        """Open intents in the order of their nonces."""
        return self._intents("owner = ? AND state = ?", owner, State.OPEN)

    def has_unfinished(self) -> bool:
        with self._database() as database:
            return database.execute("SELECT 1 FROM intents WHERE state = ?", (State.OPEN,)).fetchone() is not None

    def living(self, owner: str, first_nonce: int) -> list[Intent]:
        """Intents that may still be mined, or mined again after a reorganisation, from a nonce on."""
        return self._intents("owner = ? AND nonce >= ? AND state != ?", owner, first_nonce, State.REPLACED)

    def write(self, owner: str, key: str, purpose: str, nonce: int, fields: dict[str, Any], version: Version) -> Intent:
        row = (owner, key, purpose, nonce, json.dumps(fields), State.OPEN)
        with self._database() as database:
            statement = "INSERT INTO intents (owner, key, purpose, nonce, fields, state) VALUES (?, ?, ?, ?, ?, ?)"
            number = database.execute(statement, row).lastrowid
            assert number is not None
            _add_version(database, number, version)
        return self.read(number)

    def add_version(self, intent: int, version: Version) -> None:
        with self._database() as database:
            _add_version(database, intent, version)

    def close(self, intent: int, state: State) -> None:
        with self._database() as database:
            database.execute("UPDATE intents SET state = ? WHERE id = ? AND state != ?", (state, intent, state))

    def claim(self, owner: str, name: str, value: str) -> str:
        """The first value ever kept under this name."""
        with self._database() as database:
            database.execute("INSERT OR IGNORE INTO claims VALUES (?, ?, ?)", (owner, name, value))
            row = database.execute("SELECT value FROM claims WHERE owner = ? AND name = ?", (owner, name)).fetchone()
        return str(row[0])

    def forget(self, owner: str, name: str) -> None:
        """Take a claim back."""
        with self._database() as database:
            database.execute("DELETE FROM claims WHERE owner = ? AND name = ?", (owner, name))

    @property
    def _lock_path(self) -> Path:
        assert self.path is not None
        return self.path.with_name(self.path.name + ".lock")

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """One SQLite transaction, on the disk when the block is left."""
        if self._in_memory is not None:
            with self._mutex, self._in_memory:
                yield self._in_memory
            return
        database = sqlite3.connect(str(self.path), timeout=30)
        try:
            database.execute("PRAGMA synchronous=EXTRA")
            with database:
                yield database
        finally:
            database.close()

    def _intents(self, where: str, *values: Any) -> list[Intent]:
        with self._database() as database:
            query = f"SELECT id, owner, purpose, nonce, fields, state FROM intents WHERE {where} ORDER BY nonce, id"
            return [
                Intent(number, owner, purpose, nonce, json.loads(fields), State(state), _versions(database, number))
                for number, owner, purpose, nonce, fields, state in database.execute(query, values).fetchall()
            ]


def new_version(transaction_hash: bytes, raw: bytes, fees: Fees) -> Version:
    """A version signed at this moment."""
    return Version("0x" + transaction_hash.hex(), raw, fees, time.time())


def _add_version(database: sqlite3.Connection, intent: int, version: Version) -> None:
    fees = (str(version.fees.max_fee_wei), str(version.fees.tip_wei))
    database.execute(
        "INSERT INTO versions (intent, hash, raw, max_fee_wei, tip_wei, signed_s) VALUES (?, ?, ?, ?, ?, ?)",
        (intent, version.hash, version.raw, *fees, version.signed_s),
    )


def _versions(database: sqlite3.Connection, intent: int) -> tuple[Version, ...]:
    query = "SELECT hash, raw, max_fee_wei, tip_wei, signed_s FROM versions WHERE intent = ? ORDER BY number"
    return tuple(
        Version(hash_, bytes(raw), Fees(int(max_fee), int(tip)), signed_s)
        for hash_, raw, max_fee, tip, signed_s in database.execute(query, (intent,)).fetchall()
    )


def _create_private(path: Path) -> None:
    """An empty file that only its owner can read, unless there is one; its name is on the disk, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
