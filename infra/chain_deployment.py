"""The contracts on a chain of one's choice: deploy them once, check what is there, note where it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak

from blocks.chain import Chain
from blocks.identity import Identity, create_home
from blocks.local_chain import ChainInUse
from contracts import bindings
from contracts.messages import Address, Bytes32
from contracts.sending import Sending

__all__ = ["ChainInUse", "Checked", "deploy", "note", "noted", "open_home", "verify", "whereabouts"]


@dataclass(frozen=True)
class Checked:
    """A contract whose code and wiring were found right. code_hash: keccak of the code at the address."""

    name: str
    address: Address
    code_hash: Bytes32


def open_home(home: Path) -> Identity:
    """The deployer's identity; a folder that does not exist yet becomes a home with fresh keys."""
    return Identity(home=str(home)) if home.exists() else create_home(home)


def deploy(rpc: str, me: Identity, rules: Sending, withdrawal_delay_s: int) -> Chain:
    """The chain with the four contracts on it, which are checked. Called again it resumes, or returns the same ones.

    Raises the errors of contracts.sending and bindings.InvalidDeployment.
    """
    if not rpc.startswith(("local:", "http://", "https://")):
        # Not repeated here: it may hold a key of the node's provider.
        raise ValueError("rpc: expected local:FILE, or the http:// or https:// address of a node")
    chain = Chain(rpc=rpc, sending=rules)
    if rpc.startswith("local:"):
        from infra.devstack import fund

        fund(chain, [me.address], me.journal_path.with_name("faucet.sqlite"))
    sender = chain.sender(me.account, me.journal_path)
    return chain.deployed(bindings.deploy(sender, withdrawal_delay_s=withdrawal_delay_s))


def note(chain: Chain) -> None:
    """Save it as the block that the flows look for."""
    chain.save("chain", overwrite=True)


def noted(rpc: str | None = None) -> Chain:
    """The block that the flows look for; with another node's address when one is given. Raises ValueError without one."""
    try:
        chain = cast(Chain, Chain.load("chain"))
    except ValueError as error:
        raise ValueError(
            "Prefect has no block `chain` here: deploy first (healchain chain deploy), or name its server or --out"
        ) from error
    return chain if rpc is None else chain.model_copy(update={"rpc": rpc})


def whereabouts(chain: Chain) -> str:
    """Which chain and which contracts, whatever the node: what an actor must not be moved away from unasked."""
    return f"chain {chain.chain_id} with {', '.join(chain.deployment.addresses)}"


def verify(chain: Chain) -> list[Checked]:
    """What is at the addresses of this chain. Raises bindings.InvalidDeployment when anything is not as it should be."""
    web3 = chain.hurried().web3
    bindings.check_deployment(web3, chain.deployment)
    return [
        Checked(name, address, "0x" + keccak(bytes(web3.eth.get_code(to_checksum_address(address)))).hex())
        for name, address in zip(bindings.CONTRACTS, chain.deployment.addresses, strict=True)
    ]
