"""One transaction from the wish to the receipt: simulate, price, sign, send, wait.

A transaction is simulated first, so that a refusal costs nothing; then signed here with the account's key and sent raw
(EIP-1559). Amounts are wei. Errors: Reverted, InsufficientFunds.
"""

import ast
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from eth_abi.abi import decode
from eth_abi.exceptions import DecodingError
from eth_account.signers.local import LocalAccount
from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak
from web3 import EthereumTesterProvider, Web3
from web3.exceptions import ContractLogicError

from contracts.messages import Address

# What to do about the errors of Solidity itself and the two of this module.
HINTS = {
    "Error": "The called contract refused with this message.",
    "Panic": "An internal check of a contract failed; this should never happen.",
    "UnknownError": "The contract at this address is not of this deployment's build, or the node gives no reason.",
    "TransactionReverted": "The chain changed between simulation and mining; read the state, then decide again.",
}


class Reverted(Exception):
    """A contract refused. `error` is the Solidity error's name, `arguments` its values, `hint` says what to do."""

    def __init__(self, error: str, arguments: tuple[Any, ...] = (), hint: str = "") -> None:
        self.error = error
        self.arguments = arguments
        self.hint = hint or HINTS.get(error, HINTS["UnknownError"])
        super().__init__(error, arguments, self.hint)

    def __str__(self) -> str:
        return f"{self.error}({', '.join(map(str, self.arguments))}): {self.hint}"


class InsufficientFunds(Exception):
    """The sender's balance does not cover the value and the most that the gas can cost."""

    def __init__(self, account: Address, balance_wei: int, needed_wei: int) -> None:
        self.account = account
        self.balance_wei = balance_wei
        self.needed_wei = needed_wei
        super().__init__(account, balance_wei, needed_wei)

    def __str__(self) -> str:
        return (
            f"account {self.account} has {self.balance_wei} wei and needs {self.needed_wei} wei for value and gas; "
            f"send it at least {self.needed_wei - self.balance_wei} wei"
        )


# The error that a contract's own revert data says, or None when it is none of that contract's.
Explain = Callable[[bytes], Reverted | None]


def explain_nothing(_: bytes) -> None:
    """Of an account or a contract that is not ours: only Solidity's own errors are known."""


def send(
    web3: Web3,
    account: LocalAccount,
    data: bytes,
    *,
    to: Address | None,
    value_wei: int = 0,
    confirmations: int = 1,
    timeout_s: float = 120,
    explain: Explain = explain_nothing,
) -> Mapping[str, Any]:
    """Simulate, sign, send, wait; the receipt. `to` None creates a contract. Raises Reverted or InsufficientFunds."""
    latest = web3.eth.get_block("latest")
    base_fee, gas_limit = latest.get("baseFeePerGas", 0), latest["gasLimit"]
    tip = web3.eth.max_priority_fee
    # Twice the base fee covers six full blocks in a row.
    max_fee = 2 * base_fee + tip
    transaction: dict[str, Any] = {
        "from": account.address,
        "value": value_wei,
        "data": "0x" + data.hex(),
        "chainId": web3.eth.chain_id,
        "type": 2,
        "maxFeePerGas": max_fee,
        "maxPriorityFeePerGas": tip,
    }
    if to is not None:
        transaction["to"] = to
    # The cheapest transaction costs 21000 gas. Nodes answer an unpayable simulation each in their own way.
    _check_funds(web3, account.address, value_wei + 21_000 * max_fee)
    gas = _estimate(web3, transaction, gas_limit * max_fee, explain)
    gas = min(gas + gas // 5, gas_limit)
    _check_funds(web3, account.address, value_wei + gas * max_fee)

    nonce = web3.eth.get_transaction_count(account.address, "pending")
    signed = account.sign_transaction({**transaction, "gas": gas, "nonce": nonce})
    sent = web3.eth.send_raw_transaction(signed.raw_transaction)
    receipt = web3.eth.wait_for_transaction_receipt(sent, timeout=timeout_s, poll_latency=0.1)
    if receipt["status"] != 1:
        raise Reverted("TransactionReverted", ("0x" + bytes(sent).hex(),))
    deadline = time.monotonic() + timeout_s
    while web3.eth.block_number < receipt["blockNumber"] + confirmations - 1:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"transaction 0x{bytes(sent).hex()}: fewer than {confirmations} confirmations in {timeout_s} s"
            )
        time.sleep(0.1)
    return receipt


def _check_funds(web3: Web3, address: Address, needed_wei: int) -> None:
    balance_wei = web3.eth.get_balance(to_checksum_address(address))
    if balance_wei < needed_wei:
        raise InsufficientFunds(address, balance_wei, needed_wei)


def _estimate(web3: Web3, transaction: dict[str, Any], most_wei: int, explain: Explain) -> int:
    """Gas of a transaction that would succeed now. most_wei: what the gas of a whole block costs."""
    # Without fees, a node does not ask whether the balance covers a whole block.
    plain = {key: value for key, value in transaction.items() if key in ("from", "to", "value", "data")}
    # The transaction will see the next block's number and time, not the last one's. (The tester does so unasked.)
    block = () if isinstance(web3.provider, EthereumTesterProvider) else ("pending",)
    try:
        return web3.eth.estimate_gas(plain, *block)  # type: ignore[arg-type]
    except Exception as error:
        # The in-process tester does ask.
        if re.search("cannot afford|insufficient funds", str(error)):
            _check_funds(web3, transaction["from"], transaction["value"] + most_wei)
        if not _is_revert(error):
            raise
        if data := _revert_data(error):
            raise _reverted(data, explain) from error
        # The tester's estimate drops the selector of an error that begins with a string; its call does not.
        call(web3, plain, explain)
        raise Reverted("UnknownError", (str(error),)) from error


def call(web3: Web3, transaction: dict[str, Any], explain: Explain) -> bytes:
    """What a view returns. Raises Reverted."""
    try:
        return bytes(web3.eth.call(transaction))  # type: ignore[arg-type]
    except Exception as error:
        if not _is_revert(error):
            raise
        data = _revert_data(error)
        raise (_reverted(data, explain) if data else Reverted("UnknownError", (str(error),))) from error


def _reverted(data: bytes, explain: Explain) -> Reverted:
    """The error that revert data says."""
    try:
        if data[:4] == keccak(text="Error(string)")[:4]:
            return Reverted("Error", tuple(decode(["string"], data[4:])))
        if data[:4] == keccak(text="Panic(uint256)")[:4]:
            return Reverted("Panic", tuple(decode(["uint256"], data[4:])))
    except DecodingError:
        return Reverted("UnknownError", ("0x" + data.hex(),))
    return explain(data) or Reverted("UnknownError", ("0x" + data.hex(),))


def _revert_data(error: Exception) -> bytes | None:
    """The revert data inside a provider's exception. Nodes give hex, the in-process tester a Python literal."""
    if isinstance(error, ContractLogicError):
        data = error.data.get("data") if isinstance(error.data, dict) else error.data
        found = re.search("0x([0-9a-fA-F]+)", str(data))
        return bytes.fromhex(found[1]) if found else None
    text = str(error).removeprefix("execution reverted: ")
    return bytes(ast.literal_eval(text)) if re.match("b['\"]", text) else None


def _is_revert(error: Exception) -> bool:
    # The tester's class is known by name, so that a production install needs no tester.
    return isinstance(error, ContractLogicError) or type(error).__name__ == "TransactionFailed"
