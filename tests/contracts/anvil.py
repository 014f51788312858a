"""A real Ethereum node on this machine: the anvil binary of contracts/package.json, on a free loopback port."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from eth_account import Account
from eth_account.signers.local import LocalAccount
from eth_utils import keccak
from web3 import HTTPProvider, Web3

# `npm ci` in contracts puts it there.
BINARY = Path(__file__).parents[2] / "contracts/node_modules/@foundry-rs/anvil-linux-amd64/bin/anvil"
CHAIN_ID = 31337


class Anvil:
    """A node that can be stopped and started again on its port; its chain outlives that in `folder`."""

    def __init__(self, folder: Path, *, start: bool = True) -> None:
        self.folder = folder
        self.state = folder / "anvil.json"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.rpc = f"http://127.0.0.1:{self.port}"
        self.web3 = Web3(HTTPProvider(self.rpc))
        self._process: subprocess.Popen[bytes] | None = None
        if start:
            self.start()

    def start(self) -> None:
        assert BINARY.is_file(), f"{BINARY} is missing: run `npm ci --ignore-scripts` in contracts"
        flags = ["--port", str(self.port), "--state", str(self.state), "--silent"]
        environment = {**os.environ, "HOME": str(self.folder)}  # it keeps temporary files there
        self._process = subprocess.Popen([BINARY, *flags], env=environment, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert self._process.poll() is None, "anvil ended at its start"
                assert time.monotonic() < deadline, "anvil did not start"
                time.sleep(0.02)

    def stop(self) -> None:
        """End it in order: it writes its chain, and forgets the transactions that are not mined."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(20)
            self._process = None

    def call(self, method: str, *parameters: Any) -> Any:
        answer = self.web3.provider.make_request(method, list(parameters))  # type: ignore[arg-type]
        assert "error" not in answer, answer
        return answer.get("result")

    def account(self, name: str) -> LocalAccount:
        """A fresh account with 100 ether."""
        account: LocalAccount = Account.from_key(keccak(text=name))
        self.call("anvil_setBalance", account.address, hex(10**20))
        return account

    def mine(self, blocks: int = 1) -> None:
        self.call("anvil_mine", hex(blocks))

    def stop_mining(self) -> None:
        """Transactions wait until `mine`."""
        self.call("evm_setAutomine", False)

    def start_mining(self) -> None:
        """Every transaction is mined at once, also those that wait."""
        self.call("evm_setAutomine", True)
        self.mine()

    def reorganise(self, depth: int) -> None:
        """Replace the last blocks by empty ones; their transactions are forgotten."""
        self.call("anvil_reorg", depth, [])

    def forget_pending(self) -> None:
        self.call("anvil_dropAllTransactions")

    def pending(self) -> dict[str, Any]:
        """Transactions that wait, by sender and nonce."""
        content = self.call("txpool_content")
        return {**content["pending"], **content["queued"]}
