"""One transaction from the wish to the final receipt, sent once whatever happens in between.

    Sending    the rules: which chain, how many confirmations, how much gas may cost, how long to wait
    Sender     one account on one chain with its journal: `send` a transaction, `finish` what a killed process left

A transaction is simulated first, so that a refusal costs nothing; signed here; written to the journal; only then sent raw
(EIP-1559). Until it is mined and confirmed, the same wish again (same contract, data, value and purpose) finds it in the
journal and waits for it instead of sending another:

    killed before or after sending      the same bytes are sent again: a nonce is mined once
    killed after mining                 the receipt is found
    the node forgot it                  the same bytes are sent again, and those with lower nonces that it lacks
    not mined for `stuck_s`             the same nonce with higher fees; whichever version is mined counts
    its block is reorganised away       awaited again, sent again
    it reverts in a block               Reverted; it changed nothing, so the same wish is a new transaction
    another has its nonce               Replaced; the account is used elsewhere, so the caller must look first

A wish with a purpose is fulfilled once for good: later calls return the same receipt. One without is over when its receipt
is returned; whoever repeats it after that means it, so look at the chain first (after `finish`).
Amounts are wei. Errors: Reverted, InsufficientFunds, WrongChain, FeesTooHigh, NonceTaken, Replaced, Unconfirmed, and
those of the web3 provider: contracts.node waits for a node that is away.
"""

import ast
import json
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from eth_abi.abi import decode
from eth_abi.exceptions import DecodingError
from eth_account.signers.local import LocalAccount
from eth_typing import HexStr
from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak
from pydantic import BaseModel, ConfigDict, Field
from web3 import EthereumTesterProvider, Web3
from web3.exceptions import BlockNotFound, ContractLogicError, TransactionNotFound

from contracts.journal import Fees, Intent, Journal, State, Version, new_version
from contracts.messages import Address
from contracts.node import NodeUnreachable

Receipt = Mapping[str, Any]

# A nonce that is taken without a receipt of ours is believed after this many looks: a node may know the account's new
# nonce before it can find the receipt.
LOOKS = 3
# Nodes replace a pending transaction from 10 % more on; some ask for 12.5 %.
RAISE_NUMERATOR, RAISE_DENOMINATOR = 9, 8

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


class WrongChain(ValueError):
    """The node is of another chain than the rules name; nothing was signed."""


class FeesTooHigh(RuntimeError):
    """The chain asks more for gas than the rules allow; nothing was signed."""


class NonceTaken(RuntimeError):
    """The account has used, or is about to use, the nonce that this transaction must have; nothing was signed."""


class Replaced(RuntimeError):
    """Another transaction of the account has this one's nonce, so this one can never be mined."""


class Unconfirmed(TimeoutError):
    """Not mined, or not deep enough, within the time. It stays in the journal; the same call waits for it again."""


class Sending(BaseModel):
    """The rules for sending on one chain."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    chain_id: int | None = Field(default=None, gt=0, description="the only chain to sign for; None: the node's")
    confirmations: int = Field(default=1, ge=1, description="blocks, its own included, that make a transaction final")
    max_fee_wei: int | None = Field(default=None, gt=0, description="most for one unit of gas, tip included; None: any")
    tip_wei: int | None = Field(default=None, ge=0, description="tip for one unit of gas; None: what the node suggests")
    stuck_s: float = Field(default=60, gt=0, description="not mined for so long, it is sent again with higher fees")
    poll_s: float = Field(default=0.5, gt=0, description="pause between two looks")
    timeout_s: float = Field(default=300, gt=0, description="longest wait of one call, and for a node that is away")


# The error that a contract's own revert data says, or None when it is none of that contract's.
Explain = Callable[[bytes], Reverted | None]


def explain_nothing(_: bytes) -> None:
    """Of an account or a contract that is not ours: only Solidity's own errors are known."""


class Sender:
    """One account on one chain, its journal and its rules.

    pause: what to do between two looks; by default to wait for rules.poll_s.
    """

    def __init__(
        self,
        web3: Web3,
        account: LocalAccount,
        *,
        journal: Journal | None = None,
        rules: Sending | None = None,
        pause: Callable[[], None] | None = None,
    ) -> None:
        self.web3 = web3
        self.account = account
        self.journal = journal or Journal()
        self.rules = rules or Sending()
        self._pause = pause or (lambda: time.sleep(self.rules.poll_s))

    def send(
        self,
        data: bytes,
        *,
        to: Address | None,
        value_wei: int = 0,
        purpose: str = "",
        nonce: int | None = None,
        explain: Explain = explain_nothing,
    ) -> Receipt:
        """The receipt of the one transaction that does this. `to` None creates a contract.

        nonce: the only one that it may have; by default the lowest that is free.
        """
        deadline = self._deadline()
        wish = {"from": self.account.address, "value": value_wei, "data": "0x" + data.hex(), "to": to}
        intent = self._enter(wish, purpose, nonce, explain)
        return self._settle(intent, deadline)

    def finish(self) -> None:
        """Bring to its end what this account left open here: what the chain says afterwards, it says of all of it."""
        if not self.journal.has_unfinished():
            return
        deadline = self._deadline()
        for intent in self.journal.unfinished(self._owner()):
            with suppress(Reverted, Replaced):  # over, too: whoever wanted it looks at the chain
                self._settle(intent, deadline)

    def claim_nonce(self, name: str) -> int:
        """The free nonce that the first call with this name found: a plan over several transactions starts there."""
        owner = self._owner()
        with self.journal.hold():
            return int(self.journal.claim(owner, name, str(self._free_nonce(owner))))

    def forget_nonce(self, name: str) -> None:
        """Give a plan up; the next claim of its name starts another."""
        self.journal.forget(self._owner(), name)

    # Until it is in the journal

    def _owner(self) -> str:
        """Whose transactions these are: the account, on the chain that begins with this block."""
        chain_id = self.web3.eth.chain_id
        if self.rules.chain_id not in (None, chain_id):
            raise WrongChain(
                f"chain_id = {self.rules.chain_id} is wanted, but the node is of chain {chain_id}: correct rpc or chain_id"
            )
        genesis = bytes(self.web3.eth.get_block(0)["hash"])
        return f"{chain_id}:0x{genesis.hex()}:{self.account.address}"

    def _enter(self, wish: dict[str, Any], purpose: str, nonce: int | None, explain: Explain) -> Intent:
        """The journal's entry for this wish: the one that it has, or one written now."""
        owner = self._owner()
        key = keccak(text=json.dumps([wish, purpose], sort_keys=True)).hex()
        with self.journal.hold():
            if found := self.journal.find(owner, key, with_done=bool(purpose)):
                return found
            fees = self._affordable_fees()
            fields = self._prepare({name: value for name, value in wish.items() if value is not None}, fees, explain)
            free = self._free_nonce(owner, nonce)
            return self.journal.write(owner, key, purpose, free, fields, self._sign(fields, free, fees))

    def _prepare(self, wish: dict[str, Any], fees: Fees, explain: Explain) -> dict[str, Any]:
        """The fields of the transaction without nonce and fees. Raises Reverted or InsufficientFunds."""
        block_gas = self.web3.eth.get_block("latest")["gasLimit"]
        # The cheapest transaction costs 21000 gas. Nodes answer an unpayable simulation each in their own way.
        self._check_funds(wish["value"] + 21_000 * fees.max_fee_wei)
        gas = self._estimate(wish, block_gas * fees.max_fee_wei, explain)
        gas = min(gas + gas // 5, block_gas)
        self._check_funds(wish["value"] + gas * fees.max_fee_wei)
        return {**wish, "gas": gas, "chainId": self.web3.eth.chain_id, "type": 2}

    def _free_nonce(self, owner: str, wanted: int | None = None) -> int:
        """The lowest nonce that neither the node nor the journal has a transaction for; it also closes a gap."""
        address = to_checksum_address(self.account.address)
        mined = self.web3.eth.get_transaction_count(address)
        taken = {intent.nonce for intent in self.journal.living(owner, mined)}
        free = int(self.web3.eth.get_transaction_count(address, "pending"))
        while free in taken:
            free += 1
        if wanted not in (None, free):
            raise NonceTaken(
                f"{self.account.address} is at nonce {free}, not {wanted}: it sent something else meanwhile"
            )
        return free

    def _sign(self, fields: dict[str, Any], nonce: int, fees: Fees) -> Version:
        prices = {"maxFeePerGas": fees.max_fee_wei, "maxPriorityFeePerGas": fees.tip_wei}
        signed = self.account.sign_transaction({**fields, "nonce": nonce, **prices})
        return new_version(bytes(signed.hash), bytes(signed.raw_transaction), fees)

    # From the journal to the final receipt

    def _settle(self, intent: Intent, deadline: float) -> Receipt:
        while (receipt := self._final_receipt(intent.id)) is None:
            if time.monotonic() > deadline:
                raise Unconfirmed(self._explain_delay(intent.id))
            self._pause()
        succeeded = receipt["status"] == 1
        self.journal.close(intent.id, State.DONE if succeeded else State.FAILED)
        if not succeeded:
            raise Reverted("TransactionReverted", ("0x" + bytes(receipt["transactionHash"]).hex(),))
        return receipt

    def _final_receipt(self, number: int) -> Receipt | None:
        """The receipt, when it is deep enough. A transaction without a receipt is pushed on."""
        head = self.web3.eth.block_number
        receipt = self._receipt(self.journal.read(number))
        if receipt is None:
            self._push(self.journal.read(number))
            head = self.web3.eth.block_number
            receipt = self._receipt(self.journal.read(number))  # an in-process chain mines at once
        if receipt is None or head < receipt["blockNumber"] + self.rules.confirmations - 1:
            return None
        return receipt

    def _receipt(self, intent: Intent) -> Receipt | None:
        """Of whichever version is in a block of the chain as it is now."""
        for version in reversed(intent.versions):
            with suppress(TransactionNotFound, BlockNotFound):
                receipt = self.web3.eth.get_transaction_receipt(HexStr(version.hash))
                if self.web3.eth.get_block(receipt["blockNumber"])["hash"] == receipt["blockHash"]:
                    return receipt
        return None

    def _push(self, intent: Intent) -> None:
        """Have the node know the transaction and those before it; raise the fees of the first when it is stuck."""
        mined = self._mined_nonces()
        if intent.state is State.REPLACED or (mined > intent.nonce and self._is_replaced(intent)):
            self.journal.close(intent.id, State.REPLACED)
            raise Replaced(
                f"nonce {intent.nonce} of {self.account.address} went to a transaction that is not in {self.journal}: is the "
                "account used elsewhere? Look at the chain, then decide again"
            )
        queue = [one for one in self.journal.living(intent.owner, mined) if one.nonce <= intent.nonce]
        refusals = [self._offer(one.newest) for one in queue]
        if queue and (self._is_stuck(queue[0]) or re.search("underpriced|base fee|fee too low", refusals[0])):
            self._raise_fees(queue[0].id, queue[0].newest)

    def _mined_nonces(self, block: int | str = "latest") -> int:
        return self.web3.eth.get_transaction_count(to_checksum_address(self.account.address), block)  # type: ignore[arg-type]

    def _is_replaced(self, intent: Intent) -> bool:
        """Whether the nonce is finally used, and not by a version of ours."""
        for _ in range(LOOKS):
            final = max(0, self.web3.eth.block_number - self.rules.confirmations + 1)
            if self._mined_nonces(final) <= intent.nonce or self._receipt(self.journal.read(intent.id)) is not None:
                return False
            self._pause()
        return True

    def _offer(self, version: Version) -> str:
        """Send a version that the node does not know; why the node refused it, or an empty string."""
        with suppress(TransactionNotFound):
            self.web3.eth.get_transaction(HexStr(version.hash))
            return ""
        try:
            self.web3.eth.send_raw_transaction(version.raw)
        except NodeUnreachable:
            raise
        except Exception as error:
            # Each node refuses in its own words ("already known", "nonce too low"); what counts is the receipt.
            return str(error)
        return ""

    # Fees

    def _market_fees(self) -> Fees:
        """Twice the base fee covers six full blocks in a row."""
        base_fee = self.web3.eth.get_block("latest").get("baseFeePerGas", 0)
        tip = self.web3.eth.max_priority_fee if self.rules.tip_wei is None else self.rules.tip_wei
        return Fees(2 * base_fee + tip, tip)

    def _affordable_fees(self) -> Fees:
        fees, most = self._market_fees(), self.rules.max_fee_wei
        if most is None:
            return fees
        base_fee = (fees.max_fee_wei - fees.tip_wei) // 2
        if most < base_fee:
            raise FeesTooHigh(
                f"gas costs {base_fee} wei, max_fee_wei is {most}: wait until it is cheaper, or allow more"
            )
        return Fees(min(fees.max_fee_wei, most), min(fees.tip_wei, most))

    def _is_stuck(self, intent: Intent) -> bool:
        return time.time() - intent.newest.signed_s >= self.rules.stuck_s

    def _raise_fees(self, number: int, last: Version) -> None:
        """Sign, journal and send the next version, if the rules and the balance allow one."""
        fees = self._raised(last.fees)
        with self.journal.hold():
            intent = self.journal.read(number)
            if fees is None or intent.newest.hash != last.hash or self._cost(intent, fees) > self._balance():
                return
            version = self._sign(intent.fields, intent.nonce, fees)
            self.journal.add_version(number, version)
        self._offer(version)

    def _raised(self, last: Fees) -> Fees | None:
        """At least an eighth more of both, and what the chain asks now; None when that exceeds max_fee_wei."""
        market, most = self._market_fees(), self.rules.max_fee_wei
        least = Fees(_an_eighth_more(last.max_fee_wei), _an_eighth_more(last.tip_wei))
        max_fee = max(least.max_fee_wei, market.max_fee_wei)
        max_fee = max_fee if most is None else min(max_fee, most)
        tip = min(max(least.tip_wei, market.tip_wei), max_fee)
        return Fees(max_fee, tip) if max_fee >= least.max_fee_wei and tip >= least.tip_wei else None

    # What can go wrong

    def _balance(self) -> int:
        return self.web3.eth.get_balance(to_checksum_address(self.account.address))

    def _cost(self, intent: Intent, fees: Fees) -> int:
        return int(intent.fields["value"] + intent.fields["gas"] * fees.max_fee_wei)

    def _check_funds(self, needed_wei: int) -> None:
        if (balance_wei := self._balance()) < needed_wei:
            raise InsufficientFunds(self.account.address, balance_wei, needed_wei)

    def _estimate(self, wish: dict[str, Any], most_wei: int, explain: Explain) -> int:
        """Gas of a transaction that would succeed now. most_wei: what the gas of a whole block costs.

        Without fees in it, a node does not ask whether the balance covers a whole block.
        """
        # The transaction will see the next block's number and time, not the last one's. (The tester does so unasked.)
        block = () if isinstance(self.web3.provider, EthereumTesterProvider) else ("pending",)
        try:
            return self.web3.eth.estimate_gas(wish, *block)  # type: ignore[arg-type]
        except Exception as error:
            # The in-process tester does ask.
            if re.search("cannot afford|insufficient funds", str(error)):
                self._check_funds(wish["value"] + most_wei)
            if not _is_revert(error):
                raise
            if data := _revert_data(error):
                raise _reverted(data, explain) from error
            # The tester's estimate drops the selector of an error that begins with a string; its call does not.
            call(self.web3, wish, explain)
            raise Reverted("UnknownError", (str(error),)) from error

    def _explain_delay(self, number: int) -> str:
        """What is known about a transaction that is not final in time."""
        intent, rules = self.journal.read(number), self.rules
        parts = [
            f"transaction {intent.newest.hash} (nonce {intent.nonce} of {self.account.address}) has fewer than "
            f"{rules.confirmations} confirmations after {rules.timeout_s:g} s"
        ]
        mined = self._mined_nonces()
        queue = self.journal.living(intent.owner, mined)
        if mined < (queue[0].nonce if queue else 0):
            parts.append(f"the chain waits for nonce {mined} first, which is not in {self.journal}")
        elif queue and (refusal := self._offer(queue[0].newest)):
            parts.append(f"the node says: {refusal}")
        if rules.max_fee_wei is not None and queue and self._raised(queue[0].newest.fees) is None:
            parts.append(f"its fees are as high as max_fee_wei = {rules.max_fee_wei} allows")
        return "; ".join(parts) + ". It stays in the journal: the same call waits for it again"

    def _deadline(self) -> float:
        return time.monotonic() + self.rules.timeout_s


def _an_eighth_more(fee_wei: int) -> int:
    return -(-fee_wei * RAISE_NUMERATOR // RAISE_DENOMINATOR)


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
