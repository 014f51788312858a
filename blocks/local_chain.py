"""An Ethereum chain in this process that survives a kill: py-evm, with every block in a journal before it is mined.

A journal line is one block: its parent's hash, its timestamp and its raw signed transactions. Opening the chain again
executes the lines in order; timestamps and the randomness of each block come from the journal and the parent hash, so
every block hash comes out as before. For development, tests and one-machine runs: it has no peers and no consensus.

Errors: JournalError (the journal is damaged, or another process has it open).
"""

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eth_tester import EthereumTester, PyEVMBackend
from eth_utils.crypto import keccak
from web3 import EthereumTesterProvider

GENESIS_KEYS = tuple(n.to_bytes(32, "big") for n in range(1, 11))
"""The chain's own accounts: well-known keys, each with 10^6 ether at genesis."""


class JournalError(RuntimeError):
    """The journal cannot be replayed."""


class _JournaledBackend(PyEVMBackend):
    """PyEVMBackend whose blocks depend on nothing but the journal."""

    def __init__(self, genesis_timestamp: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._journal: Any = None
        self._pending: list[str] = []
        super().__init__(genesis_parameters=self.generate_genesis_params({"timestamp": genesis_timestamp}))

    def replay_then_append_to(self, journal: Any) -> None:
        journal.seek(0)
        good = 0
        for number, line in enumerate(iter(journal.readline, b"")):
            if not line.endswith(b"\n"):
                break  # cut off in the middle of a write: that block was never mined
            if number > 0:
                self._replay(number, json.loads(line))
            good = journal.tell()
        journal.truncate(good)
        journal.seek(good)
        self._journal = journal

    def _replay(self, number: int, block: dict[str, Any]) -> None:
        parent = self.chain.header.parent_hash.hex()
        if parent != block["parent"]:
            raise JournalError(f"chain journal line {number + 1}: parent {block['parent']}, but the chain is at {parent}")
        self._set_timestamp(block["timestamp"])
        for raw in block["transactions"]:
            super().send_raw_transaction(bytes.fromhex(raw))
        self._mine()

    def _set_timestamp(self, timestamp: int) -> None:
        self.chain.header = self.chain.header.copy(timestamp=timestamp)

    def _next_timestamp(self) -> int:
        parent = self.chain.get_canonical_block_header_by_number(self.chain.header.block_number - 1)
        return max(parent.timestamp + 1, int(self._clock()))

    def _mine(self) -> bytes:
        # prevrandao from the parent, so that a replay reaches the same block hash.
        mix_hash = keccak(b"local chain" + self.chain.header.parent_hash)
        return bytes(self.chain.mine_block(coinbase=b"\x00" * 20, mix_hash=mix_hash, blob_gas_used=0).hash)

    def send_raw_transaction(self, raw_transaction: bytes) -> Any:
        if not self._pending:
            self._set_timestamp(self._next_timestamp())
        sent = super().send_raw_transaction(raw_transaction)
        self._pending.append(raw_transaction.hex())
        return sent

    def mine_blocks(self, num_blocks: int = 1, coinbase: bytes = b"") -> tuple[bytes, ...]:
        hashes = []
        for _ in range(num_blocks):
            if not self._pending:
                self._set_timestamp(self._next_timestamp())
            header = self.chain.header
            line = {
                "parent": header.parent_hash.hex(),
                "timestamp": header.timestamp,
                "transactions": self._pending,
            }
            self._journal.write(json.dumps(line).encode() + b"\n")
            self._journal.flush()
            os.fsync(self._journal.fileno())
            self._pending = []
            hashes.append(self._mine())
        return tuple(hashes)

    def time_travel(self, to_timestamp: int) -> int:
        self._set_timestamp(to_timestamp)
        clock, self._clock = self._clock, lambda: to_timestamp
        try:
            self.mine_blocks()
        finally:
            self._clock = clock
        return to_timestamp


class LocalChainProvider(EthereumTesterProvider):
    """web3 provider over the journaled chain at `path`; calls from several threads are taken one at a time.

    clock: unix seconds for new blocks. A chain moved ahead of it stays ahead: block times never go back.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise JournalError(f"{path} is open in another process: wait for it to end, or use another folder") from error
        self._lock = threading.RLock()
        backend = _JournaledBackend(self._genesis_timestamp(clock), clock)
        backend.replay_then_append_to(self._file)
        self.tester = EthereumTester(backend=backend)
        super().__init__(ethereum_tester=self.tester)

    def _genesis_timestamp(self, clock: Callable[[], float]) -> int:
        self._file.seek(0)
        first = self._file.readline()
        if first.endswith(b"\n"):
            return int(json.loads(first)["genesis"])
        timestamp = int(clock())
        self._file.truncate(0)
        self._file.write(json.dumps({"genesis": timestamp}).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        return timestamp

    def make_request(self, method: Any, params: Any) -> Any:
        with self._lock:
            return super().make_request(method, params)

    def advance_to(self, timestamp: int) -> None:
        """Mine an empty block at `timestamp` (unix seconds), unless the chain is there already."""
        with self._lock:
            if self.tester.get_block_by_number("latest")["timestamp"] < timestamp:
                self.tester.time_travel(timestamp)

    def mine(self) -> None:
        with self._lock:
            self.tester.mine_block()

    def close(self) -> None:
        """Let go of the journal, so that another process (or a restarted chain) may open it."""
        self._file.close()
