"""`healchain chain deploy` and `verify`: on a node and in process, once, checked, and noted where the flows look."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blocks.chain import Chain
from blocks.identity import create_home
from infra.cli import app
from tests.contracts.anvil import CHAIN_ID, Anvil


@pytest.fixture
def anvil(tmp_path: Path) -> Iterator[Anvil]:
    opened = Anvil(tmp_path)
    yield opened
    opened.stop()


@dataclass(frozen=True)
class Answer:
    exit_code: int
    output: str


def chain(*arguments: object) -> Answer:
    """What the command says, without its line breaks."""
    result = CliRunner().invoke(app, ["chain", *map(str, arguments)])
    assert isinstance(result.exception, SystemExit | None), result.exception
    return Answer(result.exit_code, " ".join(result.output.split()))


def addresses(output: str) -> list[str]:
    return re.findall(r"(0x[0-9a-fA-F]{40}) code 0x[0-9a-f]{64}", output)


def test_contracts_are_deployed_once_checked_and_noted(anvil: Anvil, tmp_path: Path) -> None:
    me = create_home(tmp_path / "home")
    wanted = ("deploy", "--rpc", anvil.rpc, "--home", tmp_path / "home", "--chain-id", CHAIN_ID, "--out", tmp_path)
    poor = chain(*wanted)
    assert poor.exit_code == 2
    assert f"account {me.address} has 0 wei and needs" in poor.output

    anvil.call("anvil_setBalance", me.address, hex(10**20))
    anvil.stop_mining()
    slow = chain(*wanted, "--timeout-s", "0.5")
    assert slow.exit_code == 2
    assert "It stays in the journal" in slow.output
    anvil.start_mining()

    done = chain(*wanted, "--confirmations", "1")
    assert done.exit_code == 0, done.output
    assert len(addresses(done.output)) == 4
    assert chain(*wanted).output == done.output
    assert anvil.web3.eth.get_transaction_count(me.address) == 4  # type: ignore[arg-type]
    noted = Chain.load("chain")
    assert list(noted.deployment.addresses) == addresses(done.output)
    assert (noted.rpc, noted.chain_id, noted.sending.confirmations) == (anvil.rpc, CHAIN_ID, 1)
    assert noted.contracts(me).stakes.deposit_stake(amount_wei=10).event.stake_wei == 10

    verified = chain("verify", "--out", tmp_path)
    assert (verified.exit_code, addresses(verified.output)) == (0, addresses(done.output))
    anvil.call("anvil_setCode", noted.rewards_address, "0x00")
    spoiled = chain("verify", "--out", tmp_path)
    assert spoiled.exit_code == 2
    assert "is not this build of RewardDistribution" in spoiled.output


def test_the_wrong_chain_costs_nothing(anvil: Anvil, tmp_path: Path) -> None:
    me = create_home(tmp_path / "home")
    anvil.call("anvil_setBalance", me.address, hex(10**20))
    refused = chain("deploy", "--rpc", anvil.rpc, "--home", tmp_path / "home", "--chain-id", 1, "--out", tmp_path)
    assert refused.exit_code == 2
    assert "chain_id = 1 is wanted, but the node is of chain 31337" in refused.output
    assert anvil.web3.eth.get_transaction_count(me.address) == 0  # type: ignore[arg-type]


def test_a_node_that_does_not_answer_is_named_without_its_key(tmp_path: Path) -> None:
    nowhere = Anvil(tmp_path, start=False).rpc
    arguments = (
        "--rpc",
        f"{nowhere}/v3/secret-key",
        "--home",
        tmp_path / "home",
        "--timeout-s",
        "0.5",
        "--out",
        tmp_path,
    )
    failed = chain("deploy", *arguments)
    assert failed.exit_code == 2
    assert f"the node at {nowhere} did not answer" in failed.output
    assert "secret-key" not in failed.output


@pytest.mark.parametrize("rpc", ["ws://127.0.0.1:1/secret-key", "127.0.0.1:8545"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, rpc: str) -> None:
    refused = chain("deploy", "--rpc", rpc, "--home", tmp_path / "home", "--out", tmp_path)
    assert refused.exit_code == 2
    assert "rpc: expected local:FILE, or the http:// or https:// address" in refused.output
    assert rpc not in refused.output


def test_the_chain_in_this_process_pays_the_deployer_itself(tmp_path: Path) -> None:
    wanted = ("deploy", "--rpc", f"local:{tmp_path / 'chain.sqlite'}", "--home", tmp_path / "home", "--out", tmp_path)
    done = chain(*wanted)
    assert done.exit_code == 0, done.output
    assert chain(*wanted).output == done.output
    assert addresses(chain("verify", "--out", tmp_path).output) == addresses(done.output) != []
    Chain.load("chain").close()
