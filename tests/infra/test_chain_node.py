"""The stack's chain: what it answered for outlives kill -9, and nothing comes into it but signed transactions."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount
from requests import ConnectionError as Unreachable
from web3 import HTTPProvider, Web3

from infra import chain_node
from infra.object_store import free_port

OWNER: LocalAccount = Account.from_key("0x" + "11" * 32)
# A contract that stores blockhash(block number - 1) at the slot of its block's number, whatever it is sent.
KEEPS_HASHES = bytes.fromhex("6009600c60003960096000f3436001900340435500")


class Node:
    """The chain of a folder, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.web3 = Web3(HTTPProvider(f"http://127.0.0.1:{self.port}"))
        chain_node.found(folder, OWNER.address)

    def start(self) -> None:
        command = [sys.executable, "-m", "infra.chain_node", "--folder", str(self.folder), "--port", str(self.port)]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(command, stderr=log)
        deadline = time.monotonic() + 30
        while True:
            try:
                assert self.web3.eth.chain_id == chain_node.CHAIN_ID
                return
            except Unreachable:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, "the chain did not start"
                time.sleep(0.02)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def send(self, **transaction: Any) -> Any:
        """Mined when it returns: the receipt."""
        nonce = self.web3.eth.get_transaction_count(OWNER.address)
        fees = {"gas": 200_000, "maxFeePerGas": 10**10, "maxPriorityFeePerGas": 10**9}
        signed = OWNER.sign_transaction({**fees, "nonce": nonce, "chainId": chain_node.CHAIN_ID, **transaction})
        return self.web3.eth.get_transaction_receipt(self.web3.eth.send_raw_transaction(signed.raw_transaction))

    def ask(self, method: str, *parameters: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self.web3.provider.make_request(method, list(parameters))  # type: ignore[arg-type, assignment]
        return answer

    def hashes_are_true(self, contract: str, receipts: list[Any]) -> bool:
        """Whether the contract saw at each of its blocks the hash that the chain gives for the block before."""
        kept = [self.web3.eth.get_storage_at(contract, receipt.blockNumber) for receipt in receipts]  # type: ignore[arg-type]
        return kept == [self.web3.eth.get_block(receipt.blockNumber - 1)["hash"] for receipt in receipts]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    opened = Node(tmp_path)
    opened.start()
    yield opened
    opened.kill()


def test_every_answered_transaction_outlives_the_kill_of_the_chain_and_of_anvil(node: Node) -> None:
    contract = node.send(data=KEEPS_HASHES).contractAddress
    receipts = [node.send(to=contract) for _ in range(3)]
    for kill in (node.kill, lambda: end_anvil(node)):
        kill()
        node.start()
        assert [node.web3.eth.get_transaction_receipt(one.transactionHash) for one in receipts] == receipts
        # The first hash after the start is of a block before it: a node that loads its state has a wrong one here.
        receipts.append(node.send(to=contract))
        assert node.hashes_are_true(contract, receipts)


def end_anvil(node: Node) -> None:
    """The gate goes with it, so that supervisord starts both again."""
    children = Path(f"/proc/{node.process.pid}/task/{node.process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert node.process.wait(10) == 1


def test_anvil_ends_with_its_gate(node: Node) -> None:
    child = Path(f"/proc/{node.process.pid}/task/{node.process.pid}/children").read_text().split()[0]
    node.kill()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_only_signed_transactions_and_reads_come_in(node: Node) -> None:
    for method in (
        "anvil_setBalance",
        "eth_sendTransaction",
        "eth_sendUnsignedTransaction",
        "anvil_impersonateAccount",
    ):
        assert "not let through" in node.ask(method, OWNER.address, "0x1")["error"]["message"]
    poor = Account.from_key("0x" + "22" * 32)
    wrong = poor.sign_transaction(
        {"nonce": 0, "gas": 21_000, "gasPrice": 10**10, "to": OWNER.address, "chainId": 31337}
    )
    before = node.web3.eth.block_number
    assert (
        "nsufficient funds"
        in node.ask("eth_sendRawTransaction", "0x" + wrong.raw_transaction.hex())["error"]["message"]
    )
    assert node.web3.eth.block_number <= before + 1
    assert node.web3.eth.get_balance(OWNER.address) == chain_node.GENESIS_WEI


def test_time_passes_for_whoever_waits_and_never_goes_back(node: Node) -> None:
    began = node.web3.eth.get_block("latest")
    node.ask("evm_increaseTime", 86_400)
    deadline = time.monotonic() + 10
    while (latest := node.web3.eth.get_block("latest"))["timestamp"] < began["timestamp"] + 86_400:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    node.kill()
    node.start()
    node.send(to=OWNER.address)
    assert node.web3.eth.get_block("latest")["timestamp"] >= latest["timestamp"]


def test_a_line_that_a_kill_cut_off_is_left_out(node: Node) -> None:
    kept = node.send(to=OWNER.address)
    node.kill()
    with (node.folder / "blocks.jsonl").open("a") as file:
        file.write('{"timestamp": 17')
    node.start()
    following = node.send(to=OWNER.address)
    node.kill()
    node.start()
    for receipt in (kept, following):
        assert node.web3.eth.get_transaction_receipt(receipt.transactionHash) == receipt


@pytest.mark.parametrize("later_s", [-1, 1])
def test_a_changed_file_is_refused(node: Node, later_s: int) -> None:
    node.send(to=OWNER.address)
    node.kill()
    blocks = node.folder / "blocks.jsonl"
    first, *others = blocks.read_text().splitlines()
    changed = {**json.loads(first), "timestamp": json.loads(first)["timestamp"] + later_s}
    blocks.write_text("\n".join([json.dumps(changed), *others]) + "\n")
    command = [sys.executable, "-m", "infra.chain_node", "--folder", str(node.folder), "--port", str(node.port)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert "NotTheSameChain: block 1 " in ended.stderr
    assert "restore blocks.jsonl" in ended.stderr
