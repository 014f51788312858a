"""Where money and the last word are: an Ethereum chain and the four contracts on it.

    rpc   "local:<path>"   the stored chain in this process (blocks.local_chain)
          "http://..."     a node

Errors: NotYet (a moment that lies further ahead than the caller may wait), NodeUnreachable once a node that is away was
waited for, those of contracts.sending.
"""

import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from eth_account.signers.local import LocalAccount
from eth_utils.address import to_checksum_address
from prefect.blocks.core import Block
from pydantic import Field
from web3 import Web3

from blocks.identity import Identity
from blocks.local_chain import LocalChainProvider
from contracts import bindings
from contracts.journal import Journal
from contracts.messages import ZERO_ADDRESS, Domain
from contracts.node import Node
from contracts.sending import Sender, Sending

POLL_S = 1.0
HURRIED_S = 3.0
Event = TypeVar("Event")


class NotYet(RuntimeError):
    """The chain's time is before `moment_s`; come back then."""

    def __init__(self, what: str, moment_s: int) -> None:
        super().__init__(f"{what} is not before {time.strftime('%F %T', time.gmtime(moment_s))} UTC of chain time")
        self.moment_s = moment_s


class Chain(Block):
    """A chain, the addresses of the contracts, and the rules for sending."""

    _block_type_name = "HealChain chain"
    _block_type_slug = "healchain-chain"
    _description = "RPC address of the chain, the contracts' addresses and the rules for sending."

    rpc: str = Field(
        pattern="^(local:|https?://)",
        description="local:<path of its file> or the http(s) address of a node; every host that joins is told it",
        repr=False,
    )
    sending: Sending = Field(default_factory=Sending, description="confirmations, fees and waits of transactions")
    patience_s: float = Field(default=30, ge=0, description="longest wait for a moment of chain time inside one step")
    chain_id: int = 0
    escrow_address: str = ""
    stakes_address: str = ""
    publisher_address: str = ""
    rewards_address: str = ""
    deployed_in_block: int = 0

    @property
    def web3(self) -> Web3:
        return Web3(self._provider)

    def hurried(self) -> "Chain":
        """This chain for somebody who sits and waits: that its node is away is told soon."""
        return self.model_copy(update={"sending": self.sending.model_copy(update={"timeout_s": HURRIED_S})})

    @property
    def deployment(self) -> bindings.Deployment:
        return bindings.Deployment(
            chain_id=self.chain_id,
            escrow=self.escrow_address,
            stakes=self.stakes_address,
            publisher=self.publisher_address,
            rewards=self.rewards_address,
            block_number=self.deployed_in_block,
        )

    def deployed(self, deployment: bindings.Deployment) -> "Chain":
        """This chain with the addresses of a deployment on it."""
        return Chain(
            rpc=self.rpc,
            sending=self.sending,
            patience_s=self.patience_s,
            chain_id=deployment.chain_id,
            escrow_address=deployment.escrow,
            stakes_address=deployment.stakes,
            publisher_address=deployment.publisher,
            rewards_address=deployment.rewards,
            deployed_in_block=deployment.block_number,
        )

    @property
    def domain(self) -> Domain:
        """What every signed message is bound to: this chain and this BlockPublisher."""
        return Domain(chain_id=self.chain_id, verifying_contract=self.publisher_address)

    def contracts(self, me: Identity | None = None, *, purpose: str = "") -> bindings.Contracts:
        """The four contracts; without an identity only their views.

        What an earlier run of this actor left on its way is brought to its end first, so that what the chain says next is
        final. purpose: names one of several equal calls (contracts.sending).
        """
        if me is None:
            return bindings.connect(self.web3, self.deployment)
        sender = self.sender(me.account, me.journal_path)
        sender.finish()
        return bindings.connect(sender.web3, self.deployment, sender, purpose=purpose)

    def sender(self, account: LocalAccount, journal: Path) -> Sender:
        """An account that sends by this chain's rules and remembers in this file."""
        rules = self.sending.model_copy(update={"chain_id": self.chain_id or self.sending.chain_id})
        return Sender(self.web3, account, journal=Journal(journal), rules=rules, pause=self._pause)

    def _pause(self) -> None:
        """Wait for the next block. A local chain mines it."""
        if isinstance(provider := self._provider, LocalChainProvider):
            provider.mine()
        time.sleep(self.sending.poll_s)

    def token(self, address: str, me: Identity | None = None) -> bindings.Token:
        """An ERC-20 contract; without an identity only its views."""
        sender = None if me is None else self.sender(me.account, me.journal_path)
        return bindings.Token(self.web3, address, sender)

    def balance_of(self, account: str, token: str = ZERO_ADDRESS) -> int:
        """Wei, or the token's smallest units, that an account holds."""
        if token == ZERO_ADDRESS:
            return int(self.web3.eth.get_balance(to_checksum_address(account)))
        return self.token(token).balance_of(account)

    def transactions(self, task_id: str) -> list[bindings.TransactionRecord]:
        """Every transaction about a task, in the order of the chain."""
        return bindings.task_events(self.web3, self.deployment, task_id)

    def events(self, task_id: str, kind: type[Event]) -> list[Event]:
        """The events of one kind about a task, in the order of the chain."""
        return bindings.find_events(self.web3, self.deployment, task_id, kind)

    def history(self, first_block: int) -> Iterator[bindings.Logged]:
        """Every event of the contracts from a block on, in the order of the chain, as far as it is final."""
        last = self.web3.eth.block_number - (self.sending.confirmations - 1)
        return bindings.history(self.web3, self.deployment, max(first_block, self.deployed_in_block), last)

    def now_s(self) -> int:
        """Unix seconds of the latest block: the only clock that the contracts know."""
        return int(self.web3.eth.get_block("latest")["timestamp"])

    def wait_until(self, moment_s: int, what: str) -> None:
        """Return when chain time has reached `moment_s`. A local chain's clock is moved there; a node is waited for.

        Raises NotYet when the moment is more than `patience_s` away.
        """
        if isinstance(provider := self._provider, LocalChainProvider):
            provider.advance_to(moment_s)
        if moment_s - self.now_s() > self.patience_s:
            raise NotYet(what, moment_s)
        while self.now_s() < moment_s:
            time.sleep(POLL_S)

    def wait_for_block(self, number: int) -> None:
        """Return when block `number` is mined. A local chain mines it."""
        provider = self._provider
        while self.web3.eth.block_number < number:
            if isinstance(provider, LocalChainProvider):
                provider.mine()
            else:
                time.sleep(POLL_S)

    def close(self) -> None:
        """Let go of a local chain's file."""
        if isinstance(provider := self._provider, LocalChainProvider):
            provider.close()
            _local.cache_clear()

    @property
    def _provider(self) -> LocalChainProvider | Node:
        if self.rpc.startswith("local:"):
            return _local(self.rpc)
        return _node(self.rpc, self.sending.timeout_s)


@lru_cache(maxsize=8)
def _local(rpc: str) -> LocalChainProvider:
    return LocalChainProvider(Path(rpc.removeprefix("local:")))


@lru_cache(maxsize=8)
def _node(rpc: str, patience_s: float) -> Node:
    return Node(rpc, patience_s=patience_s)
