"""An Ethereum chain in this process that survives a kill: py-evm over a database file.

Each block, with the state it leads to, is written in one SQLite transaction when it is mined: a kill leaves the chain at
the last whole block. For development, tests and one-machine runs: it has no peers and no consensus.

Errors: ChainInUse (another process has the file open).
"""

import fcntl
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from eth.abc import SignedTransactionAPI, StateAPI
from eth.db.atomic import AtomicDB
from eth.db.backends.memory import MemoryDB
from eth.exceptions import TransactionNotFound as EVMTransactionNotFound
from eth.vm.spoof import SpoofTransaction
from eth_tester import EthereumTester, PyEVMBackend
from eth_tester.backends.pyevm.serializers import serialize_transaction, serialize_transaction_receipt
from eth_tester.exceptions import TransactionNotFound
from web3 import EthereumTesterProvider

GENESIS_KEYS = tuple(n.to_bytes(32, "big") for n in range(1, 11))
"""The chain's own accounts: well-known keys, each with 10^6 ether at genesis."""


class ChainInUse(RuntimeError):
    """Another process has the chain's file open."""


def _estimate_gas(state: StateAPI, transaction: SignedTransactionAPI) -> int:
    """Gas limit from one execution at the block's limit; py-evm's own estimate is a search of a dozen executions.

    What was used, plus what refunds took off, plus the part (one 64th a call, EIP-150) that callers must hold back.
    """
    snapshot = state.snapshot()
    try:
        computation = state.apply_transaction(
            cast(SignedTransactionAPI, SpoofTransaction(transaction, gas=state.gas_limit, gas_price=0))
        )
        computation.raise_if_error()
        used = state.gas_limit - computation.get_gas_remaining() + computation.get_gas_refund()
        return min(used + used // 16, state.gas_limit)
    finally:
        state.revert(snapshot)


class _StoredDB(MemoryDB):
    """py-evm's key-value store: all in memory, what changed is written to the file by `commit`."""

    def __init__(self, path: Path) -> None:
        # One connection for all threads: the provider's lock lets in one at a time.
        self._file = sqlite3.connect(path, check_same_thread=False)
        self._file.execute("PRAGMA journal_mode=WAL")
        self._file.execute("PRAGMA synchronous=FULL")
        self._file.execute("CREATE TABLE IF NOT EXISTS entries (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID")
        self._changed: dict[bytes, bytes | None] = {}
        super().__init__(dict(self._file.execute("SELECT key, value FROM entries")))

    def __setitem__(self, key: bytes, value: bytes) -> None:
        super().__setitem__(key, value)
        self._changed[key] = value

    def __delitem__(self, key: bytes) -> None:
        super().__delitem__(key)
        self._changed[key] = None

    def commit(self) -> None:
        """Write all changes or none."""
        with self._file:
            for key, value in self._changed.items():
                if value is None:
                    self._file.execute("DELETE FROM entries WHERE key = ?", (key,))
                else:
                    self._file.execute("INSERT OR REPLACE INTO entries VALUES (?, ?)", (key, value))
        self._changed.clear()

    def close(self) -> None:
        self._file.close()


class _StoredBackend(PyEVMBackend):  # type: ignore[misc]
    """PyEVMBackend over a stored database, with block times from a clock and quick look-ups."""

    def __init__(self, database: _StoredDB, clock: Callable[[], float]) -> None:
        self.chain: Any = None
        super().__init__()
        self._database, self._clock = database, clock
        fresh = not len(database)
        base = AtomicDB(database)
        chain_class: Any = type(self.chain)
        if fresh:
            parameters = self.generate_genesis_params({"timestamp": int(clock())})
            self.chain = chain_class.from_genesis(base, parameters, dict(self.generate_genesis_state()))
            database.commit()
        else:
            self.chain = chain_class(base)
        self.chain.gas_estimator = _estimate_gas

    def _set_timestamp(self, timestamp: int) -> None:
        self.chain.header = self.chain.header.copy(timestamp=timestamp)

    def _open_block(self) -> None:
        """Give the pending block its time, if it is still empty: never before its parent's."""
        if not self.chain.get_block().transactions:
            parent = self.chain.get_canonical_block_header_by_number(self.chain.header.block_number - 1)
            self._set_timestamp(max(parent.timestamp + 1, int(self._clock())))

    def send_raw_transaction(self, raw_transaction: bytes) -> Any:
        self._open_block()
        return super().send_raw_transaction(raw_transaction)

    def mine_blocks(self, num_blocks: int = 1, coinbase: bytes = b"\x00" * 20) -> tuple[bytes, ...]:
        hashes = []
        for _ in range(num_blocks):
            self._open_block()
            hashes += super().mine_blocks(1, coinbase)
            self._database.commit()
        return tuple(hashes)

    def time_travel(self, to_timestamp: int) -> int:
        clock, self._clock = self._clock, lambda: to_timestamp
        try:
            self.mine_blocks()
        finally:
            self._clock = clock
        return to_timestamp

    def get_transaction_by_hash(self, transaction_hash: bytes) -> Any:
        block, transaction, index, pending = self._locate(transaction_hash)
        return serialize_transaction(block, transaction, index, pending)

    def get_transaction_receipt(self, transaction_hash: bytes) -> Any:
        block, transaction, index, pending = self._locate(transaction_hash)
        receipts = block.get_receipts(self.chain.chaindb)
        return serialize_transaction_receipt(block, receipts, transaction, index, pending, self.chain.get_vm())

    def _locate(self, transaction_hash: bytes) -> tuple[Any, Any, int, bool]:
        """The block, the transaction, its place, and whether it is pending. From the index: py-evm's own backend walks."""
        head = self.chain.get_block()
        for index, transaction in enumerate(head.transactions):
            if transaction.hash == transaction_hash:
                return head, transaction, index, True
        try:
            number, index = self.chain.get_canonical_transaction_index(transaction_hash)
        except EVMTransactionNotFound as error:
            raise TransactionNotFound(f"no transaction {transaction_hash.hex()}") from error
        block = self.chain.get_canonical_block_by_number(number)
        return block, block.transactions[index], index, False


class LocalChainProvider(EthereumTesterProvider):
    """web3 provider over the chain stored at `path`; calls from several threads are taken one at a time.

    clock: unix seconds for new blocks. A chain moved ahead of it stays ahead: block times never go back.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._holding = path.with_name(path.name + ".lock").open("w")
        try:
            fcntl.flock(self._holding, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._holding.close()
            raise ChainInUse(f"{path} is open in another process: wait for it to end, or use another folder") from error
        self._lock = threading.RLock()
        self._database = _StoredDB(path)
        self.tester = EthereumTester(backend=_StoredBackend(self._database, clock))
        self._logs: list[list[Any]] = []
        super().__init__(ethereum_tester=self.tester)

    def make_request(self, method: Any, params: Any) -> Any:
        with self._lock:
            if method == "eth_getLogs":
                return {"jsonrpc": "2.0", "id": 0, "result": self._find_logs(params[0])}
            return super().make_request(method, params)

    def _find_logs(self, wanted: dict[str, Any]) -> list[Any]:
        """Logs of mined blocks, which never change: each block is decoded once, where eth-tester decodes all each time."""
        latest = self.tester.get_block_by_number("latest")["number"]
        for number in range(len(self._logs), latest + 1):
            transactions = self.tester.get_block_by_number(number)["transactions"]
            receipts = [self.tester.get_transaction_receipt(transaction) for transaction in transactions]
            self._logs.append([log for receipt in receipts for log in receipt["logs"]])
        addresses = {address.lower() for address in wanted.get("address") or ()}
        names: dict[Any, int] = {"earliest": 0, "latest": latest, "pending": latest, None: latest}
        edges = (wanted.get("from_block"), wanted.get("to_block"))
        first, last = (edge if isinstance(edge, int) else names[edge] for edge in edges)
        return [
            log
            for logs in self._logs[first : last + 1]
            for log in logs
            if (not addresses or log["address"].lower() in addresses)
            and _has(wanted.get("topics") or (), log["topics"])
        ]

    def advance_to(self, timestamp: int) -> None:
        """Mine an empty block at `timestamp` (unix seconds), unless the chain is there already."""
        with self._lock:
            if self.tester.get_block_by_number("latest")["timestamp"] < timestamp:
                # Not the tester's own: that one does nothing when the pending block has this time already.
                self.tester.backend.time_travel(timestamp)

    def mine(self) -> None:
        with self._lock:
            self.tester.mine_block()

    def close(self) -> None:
        """Let go of the file, so that another process (or a restarted chain) may open it."""
        self._database.close()
        self._holding.close()


def _has(wanted: Sequence[Any], topics: Sequence[str]) -> bool:
    """Whether a log's topics are the wanted ones: None fits all, a list any of its members."""
    if len(wanted) > len(topics):
        return False
    choices = ([one] if isinstance(one, str) else one for one in wanted)
    return all(one is None or topic in one for one, topic in zip(choices, topics, strict=False))
