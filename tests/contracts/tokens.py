"""ERC-20 tokens for the tests: one that is as the standard says, and one that misbehaves as it is told."""

import json
from pathlib import Path

from contracts.bindings import Token
from contracts.messages import Address
from contracts.sending import Sender
from tests.contracts.world import REWARD, World

BUILD = Path(__file__).parent / "build"
# What OddToken does on a transfer.
SEND, KEEP_A_FEE, ANSWER_FALSE, CALL_BACK, EMIT_NONSENSE = range(5)


def funded(world: World, name: str = "TestToken", *, amount: int = 10 * REWARD) -> Token:
    """A new token of which the publisher has this amount, all of it approved to the escrow; bound to the publisher."""
    build = json.loads((BUILD / f"{name}.json").read_text())
    deployed = Sender(world.web3, world.deployer).send(bytes.fromhex(build["bytecode"][2:]), to=None)
    token = Token(world.web3, deployed["contractAddress"], Sender(world.web3, world.publisher))
    _send(world, token, name, "mint", world.publisher.address, amount)
    token.approve(world.deployment.escrow, amount)
    return token


def behave(world: World, token: Token, manner: int, target: Address = "0x" + "00" * 20, again: bytes = b"") -> None:
    """`again` is the call to `target` that CALL_BACK makes."""
    _send(world, token, "OddToken", "behave", manner, target, again)


def _send(world: World, token: Token, name: str, function: str, *arguments: object) -> None:
    abi = json.loads((BUILD / f"{name}.json").read_text())["abi"]
    data = world.web3.eth.contract(abi=abi).encode_abi(function, args=list(arguments))
    Sender(world.web3, world.stranger).send(bytes.fromhex(data[2:]), to=token.address)
