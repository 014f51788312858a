"""Sending on a real node (anvil) and in process: one wish is one transaction, whatever is killed, lost, slow or reorganised."""

import json
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount
from eth_utils import keccak
from web3 import Web3

from blocks.chain import Chain
from blocks.identity import Identity, create_home
from blocks.local_chain import GENESIS_KEYS, LocalChainProvider
from contracts.bindings import Contracts, Deployment, InvalidDeployment, check_deployment, connect, deploy
from contracts.journal import Journal, State
from contracts.node import Node
from contracts.sending import (
    FeesTooHigh,
    Replaced,
    Reverted,
    Sender,
    Sending,
    Unconfirmed,
    WrongChain,
)
from tests.contracts.anvil import CHAIN_ID, Anvil

QUICK = Sending(chain_id=CHAIN_ID, poll_s=0.02, timeout_s=20)
HASTY = QUICK.model_copy(update={"timeout_s": 0.3})


class Bench:
    """A node with the contracts, an account with ether, and its journal."""

    def __init__(self, folder: Path, deployment: Deployment) -> None:
        self.anvil = Anvil(folder)
        self.web3 = self.anvil.web3
        self.alice = self.anvil.account("alice")
        self.deployment = deployment
        self.path = folder / "home" / "transactions.sqlite"

    def sender(
        self, rules: Sending = QUICK, journal: Path | None = None, account: LocalAccount | None = None
    ) -> Sender:
        return Sender(
            Web3(Node(self.anvil.rpc, patience_s=rules.timeout_s)),
            account or self.alice,
            journal=Journal(journal or self.path),
            rules=rules,
        )

    def as_alice(self, rules: Sending = QUICK, purpose: str = "", **changes: Any) -> Contracts:
        sender = self.sender(rules.model_copy(update=changes))
        return connect(sender.web3, self.deployment, sender, purpose=purpose)

    @property
    def stake(self) -> int:
        return connect(self.web3, self.deployment).stakes.stake_of(self.alice.address)

    @property
    def nonce(self) -> int:
        return self.web3.eth.get_transaction_count(self.alice.address)

    def intents(self) -> list[Any]:
        return Journal(self.path)._intents("1")


def deploy_on(anvil: Anvil) -> Deployment:
    return deploy(Sender(anvil.web3, anvil.account("deployer"), rules=QUICK))


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Deployment]:
    """The state of a node with the contracts."""
    anvil = Anvil(tmp_path_factory.mktemp("deployed"))
    deployment = deploy_on(anvil)
    anvil.stop()
    return anvil.state, deployment


@pytest.fixture
def bench(tmp_path: Path, deployed: tuple[Path, Deployment]) -> Iterator[Bench]:
    state, deployment = deployed
    shutil.copy(state, tmp_path)
    opened = Bench(tmp_path, deployment)
    yield opened
    opened.anvil.stop()


def at_once(work: Callable[[], Any]) -> "Future[Any]":
    """Work in a thread of its own."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def wait_until(holds: Callable[[], Any], timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


# Killed

KILLED = """
import json, os, signal, sys
from pathlib import Path
from eth_account import Account
from eth_utils import keccak
from web3 import HTTPProvider, Web3
from contracts.bindings import Deployment, connect
from contracts.journal import Journal
from contracts.sending import Sender, Sending

rpc, path, deployment, point = sys.argv[1:]
web3 = Web3(HTTPProvider(rpc))
sender = Sender(web3, Account.from_key(keccak(text="alice")), journal=Journal(Path(path)), rules=Sending(poll_s=0.02))
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
send = web3.eth.send_raw_transaction
if point == "before the journal is written":
    Journal.write = die
if point == "before sending":
    web3.eth.send_raw_transaction = die
if point == "after sending":
    web3.eth.send_raw_transaction = lambda raw: (send(raw), die())
if point == "before the receipt is noted":
    Journal.close = die
connect(web3, Deployment(**json.loads(deployment)), sender).stakes.deposit_stake(amount_wei=10)
"""


def start(bench: Bench, script: str, *arguments: str) -> "subprocess.Popen[str]":
    deployment = json.dumps(vars(bench.deployment))
    command = [sys.executable, "-c", script, bench.anvil.rpc, str(bench.path), deployment, *arguments]
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("point", "sent"),
    [
        ("before the journal is written", 0),
        ("before sending", 0),
        ("after sending", 1),
        ("before the receipt is noted", 1),
    ],
)
def test_a_killed_deposit_is_made_once(bench: Bench, point: str, sent: int) -> None:
    killed = start(bench, KILLED, point)
    assert killed.wait(60) == -signal.SIGKILL, killed.stderr and killed.stderr.read()
    assert (bench.stake, bench.nonce) == (10 * sent, sent)
    mined = bench.as_alice().stakes.deposit_stake(amount_wei=10)
    assert (bench.stake, bench.nonce, mined.event.amount_wei) == (10, 1, 10)
    bench.as_alice().stakes.deposit_stake(amount_wei=10)  # the first is over: this one is meant
    assert (bench.stake, bench.nonce) == (20, 2)


def test_killed_while_it_waits_the_deposit_is_made_once(bench: Bench) -> None:
    bench.anvil.stop_mining()
    killed = start(bench, KILLED, "never")
    wait_until(bench.anvil.pending, 60)
    killed.kill()
    assert killed.wait(20) == -signal.SIGKILL
    done = at_once(lambda: bench.as_alice().stakes.deposit_stake(amount_wei=10))
    time.sleep(0.2)
    (waiting,) = bench.anvil.pending().values()
    assert list(waiting) == ["0"]
    bench.anvil.start_mining()
    assert done.result(20).transaction == waiting["0"]["hash"]
    assert (bench.stake, bench.nonce) == (10, 1)


def test_what_was_left_open_is_finished_before_the_chain_is_asked(bench: Bench, tmp_path: Path) -> None:
    """A step that looks at the chain to decide sees what its killed run did, even when it would now do something else."""
    me: Identity = create_home(tmp_path / "home")
    bench.anvil.call("anvil_setBalance", me.address, hex(10**20))
    chain = Chain(rpc=bench.anvil.rpc, sending=Sending(poll_s=0.02, timeout_s=0.3)).deployed(bench.deployment)
    bench.anvil.stop_mining()
    with pytest.raises(Unconfirmed):
        chain.contracts(me).stakes.deposit_stake(amount_wei=10)
    bench.anvil.forget_pending()
    bench.anvil.start_mining()
    stakes = chain.contracts(me).stakes
    assert stakes.stake_of(me.address) == 10
    assert me.journal_path.parent == tmp_path / "home"


# The same wish, and another


def test_a_purpose_is_fulfilled_once(bench: Bench) -> None:
    def deposit(purpose: str) -> str:
        return bench.as_alice(purpose=purpose).stakes.deposit_stake(amount_wei=10).transaction

    first = deposit("task 1")
    assert deposit("task 1") == first
    assert bench.stake == 10
    assert deposit("task 2") != first
    assert (bench.stake, bench.nonce) == (20, 2)


def test_a_call_that_gave_up_waiting_is_joined_by_the_next(bench: Bench) -> None:
    bench.anvil.stop_mining()
    for _ in range(2):
        with pytest.raises(Unconfirmed, match=r"nonce 0 of .* fewer than 1 confirmations"):
            bench.as_alice(HASTY).stakes.deposit_stake(amount_wei=10)
    with pytest.raises(Unconfirmed, match="nonce 1"):
        bench.as_alice(HASTY).stakes.deposit_stake(amount_wei=11)
    bench.anvil.start_mining()
    bench.sender().finish()
    assert (bench.stake, bench.nonce) == (21, 2)
    assert [intent.state for intent in bench.intents()] == [State.DONE, State.DONE]


def test_one_that_reverted_in_a_block_changed_nothing_and_may_be_sent_again(bench: Bench) -> None:
    bench.anvil.stop_mining()
    done = at_once(lambda: bench.as_alice().stakes.deposit_stake(amount_wei=10))
    wait_until(bench.anvil.pending)
    code = bench.web3.eth.get_code(bench.deployment.stakes).to_0x_hex()
    bench.anvil.call("anvil_setCode", bench.deployment.stakes, "0x60006000fd")  # it always reverts
    bench.anvil.start_mining()
    with pytest.raises(Reverted, match="TransactionReverted"):
        done.result(20)
    bench.anvil.call("anvil_setCode", bench.deployment.stakes, code)
    bench.as_alice().stakes.deposit_stake(amount_wei=10)
    assert (bench.stake, bench.nonce) == (10, 2)


# Stuck


def test_a_stuck_transaction_is_sent_again_with_higher_fees(bench: Bench) -> None:
    bench.anvil.stop_mining()
    done = at_once(lambda: bench.as_alice(stuck_s=0.2).stakes.deposit_stake(amount_wei=10))
    wait_until(lambda: [len(one.versions) for one in bench.intents()] >= [4])
    bench.anvil.start_mining()
    mined = done.result(20)
    (intent,) = bench.intents()
    assert mined.transaction in [version.hash for version in intent.versions]
    assert (bench.stake, bench.nonce) == (10, 1)
    for before, after in zip(intent.versions, intent.versions[1:], strict=False):
        assert after.fees.max_fee_wei >= before.fees.max_fee_wei * 9 / 8
        assert after.fees.tip_wei >= before.fees.tip_wei * 9 / 8
        assert after.signed_s - before.signed_s >= 0.2


def test_a_base_fee_above_the_offer_is_followed(bench: Bench) -> None:
    bench.anvil.stop_mining()
    done = at_once(lambda: bench.as_alice(stuck_s=1).stakes.deposit_stake(amount_wei=10))
    wait_until(bench.anvil.pending)
    offered = bench.intents()[0].newest.fees.max_fee_wei
    bench.anvil.call("anvil_setNextBlockBaseFeePerGas", hex(10 * offered))
    bench.anvil.start_mining()  # at this price nobody includes it
    assert bench.nonce == 0
    assert done.result(20).event.amount_wei == 10
    first, *_, last = bench.intents()[0].versions
    assert first.fees.max_fee_wei == offered < last.fees.max_fee_wei
    assert (bench.stake, bench.nonce) == (10, 1)


def test_fees_stay_below_the_cap(bench: Bench) -> None:
    base_fee = bench.web3.eth.get_block("latest")["baseFeePerGas"]
    with pytest.raises(FeesTooHigh, match=r"max_fee_wei is 1: wait until it is cheaper, or allow more"):
        bench.as_alice(max_fee_wei=1).stakes.deposit_stake(amount_wei=10)
    assert bench.intents() == []
    bench.anvil.stop_mining()
    cap = 5 * base_fee // 2
    with pytest.raises(Unconfirmed, match=f"fees are as high as max_fee_wei = {cap} allows"):
        bench.as_alice(HASTY, max_fee_wei=cap, tip_wei=7, stuck_s=0.05).stakes.deposit_stake(amount_wei=10)
    (intent,) = bench.intents()
    assert intent.versions[0].fees.tip_wei == 7
    assert all(version.fees.max_fee_wei <= cap for version in intent.versions)


# Reorganised


def test_a_reorganised_transaction_is_awaited_again(bench: Bench) -> None:
    done = at_once(lambda: bench.as_alice(confirmations=3).stakes.deposit_stake(amount_wei=10))
    wait_until(lambda: bench.nonce == 1)
    first = bench.web3.eth.get_block("latest")
    bench.anvil.reorganise(1)
    wait_until(lambda: bench.nonce == 1)
    assert not done.done()
    bench.anvil.mine(2)
    mined = done.result(20)
    receipt = bench.web3.eth.get_transaction_receipt(mined.transaction)
    assert receipt["blockHash"] != first["hash"]
    assert receipt["blockNumber"] == mined.block_number
    assert first["transactions"][0] == receipt["transactionHash"]  # the same bytes
    assert (bench.stake, bench.nonce) == (10, 1)


def test_a_receipt_counts_with_its_confirmations_only(bench: Bench) -> None:
    done = at_once(lambda: bench.as_alice(confirmations=3).stakes.deposit_stake(amount_wei=10))
    wait_until(lambda: bench.nonce == 1)
    bench.anvil.mine()
    time.sleep(0.2)
    assert not done.done()
    bench.anvil.mine()
    assert bench.web3.eth.block_number == done.result(20).block_number + 2


def test_a_purpose_that_a_deep_reorganisation_undid_is_fulfilled_again(bench: Bench) -> None:
    first = bench.as_alice(purpose="once").stakes.deposit_stake(amount_wei=10)
    bench.anvil.mine(2)
    bench.anvil.reorganise(3)
    assert bench.stake == 0
    assert bench.as_alice(purpose="once").stakes.deposit_stake(amount_wei=10).transaction == first.transaction
    assert (bench.stake, bench.nonce) == (10, 1)


# Nonces


def test_another_transaction_with_the_nonce_is_noticed(bench: Bench) -> None:
    bench.anvil.stop_mining()
    done = at_once(lambda: bench.as_alice().stakes.deposit_stake(amount_wei=10))
    wait_until(bench.anvil.pending)
    bench.anvil.forget_pending()
    elsewhere = {"to": bench.alice.address, "value": 0, "gas": 21_000, "nonce": 0, "chainId": CHAIN_ID, "type": 2}
    fees = {"maxFeePerGas": 10**11, "maxPriorityFeePerGas": 10**10}
    bench.web3.eth.send_raw_transaction(bench.alice.sign_transaction({**elsewhere, **fees}).raw_transaction)
    bench.anvil.start_mining()
    with pytest.raises(Replaced, match=r"nonce 0 of .* is the account used elsewhere"):
        done.result(20)
    assert bench.stake == 0
    bench.as_alice().stakes.deposit_stake(amount_wei=10)
    assert (bench.stake, bench.nonce) == (10, 2)


def test_those_before_it_are_sent_again_when_the_node_forgot_them(bench: Bench) -> None:
    bench.anvil.stop_mining()
    for amount in (1, 2):
        with pytest.raises(Unconfirmed):
            bench.as_alice(HASTY).stakes.deposit_stake(amount_wei=amount)
    bench.anvil.forget_pending()
    bench.anvil.start_mining()
    bench.as_alice().stakes.deposit_stake(amount_wei=2)  # the second alone is asked for
    assert (bench.stake, bench.nonce) == (3, 2)


def test_a_gap_is_named_and_filled_by_the_next(bench: Bench, tmp_path: Path) -> None:
    """A transaction of another program had the first nonce, and the node forgot it."""
    bench.anvil.stop_mining()
    with pytest.raises(Unconfirmed):
        bench.sender(HASTY, tmp_path / "other.sqlite").send(b"", to=bench.alice.address)
    with pytest.raises(Unconfirmed, match="nonce 1"):
        bench.as_alice(HASTY).stakes.deposit_stake(amount_wei=10)
    bench.anvil.forget_pending()
    bench.anvil.start_mining()
    with pytest.raises(Unconfirmed, match="the chain waits for nonce 0 first, which is not in"):
        bench.as_alice(HASTY).stakes.deposit_stake(amount_wei=10)
    bench.as_alice().stakes.deposit_stake(amount_wei=5)
    bench.sender().finish()
    assert (bench.stake, bench.nonce) == (15, 2)


TWO = """
import json, sys
from pathlib import Path
from eth_account import Account
from eth_utils import keccak
from web3 import HTTPProvider, Web3
from contracts.bindings import Deployment, connect
from contracts.journal import Journal
from contracts.sending import Sender, Sending

rpc, path, deployment, name = sys.argv[1:]
web3 = Web3(HTTPProvider(rpc))
sender = Sender(web3, Account.from_key(keccak(text="alice")), journal=Journal(Path(path)), rules=Sending(poll_s=0.02))
for purpose in (f"{name} 1", "shared 1", f"{name} 2", "shared 2", f"{name} 3"):
    connect(web3, Deployment(**json.loads(deployment)), sender, purpose=purpose).stakes.deposit_stake(amount_wei=10)
"""


def test_two_processes_of_one_account_share_its_nonces_and_its_purposes(bench: Bench) -> None:
    running = [start(bench, TWO, name) for name in ("first", "second")]
    for process in running:
        assert process.wait(60) == 0, process.stderr and process.stderr.read()
    assert (bench.stake, bench.nonce) == (80, 8)
    assert sorted(intent.nonce for intent in bench.intents()) == list(range(8))


def test_threads_of_one_account_share_its_nonces(bench: Bench) -> None:
    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(bench.as_alice().stakes.deposit_stake, amount_wei=amount) for amount in range(1, 7)]
        assert sorted(job.result(30).event.amount_wei for job in jobs) == [1, 2, 3, 4, 5, 6]
    assert (bench.stake, bench.nonce) == (21, 6)


# The node


def test_the_wrong_chain_is_refused_before_anything_is_signed(bench: Bench) -> None:
    with pytest.raises(
        WrongChain, match=r"chain_id = 1 is wanted, but the node is of chain 31337: correct rpc or chain_id"
    ):
        bench.as_alice(chain_id=1).stakes.deposit_stake(amount_wei=10)
    assert (bench.intents(), bench.nonce, bench.anvil.pending()) == ([], 0, {})


def test_a_node_that_is_down_is_waited_for(bench: Bench) -> None:
    bench.anvil.stop()
    done = at_once(lambda: bench.as_alice().stakes.deposit_stake(amount_wei=10))
    time.sleep(0.3)
    assert not done.done()
    bench.anvil.start()
    assert done.result(20).event.amount_wei == 10
    assert (bench.stake, bench.nonce) == (10, 1)


def test_a_node_that_lost_what_waited_gets_it_again(bench: Bench) -> None:
    """Stopped and started with its state: the blocks are there, what was not mined is gone."""
    bench.as_alice().stakes.deposit_stake(amount_wei=1)
    bench.anvil.stop_mining()
    with pytest.raises(Unconfirmed):
        bench.as_alice(HASTY).stakes.deposit_stake(amount_wei=10)
    waiting = bench.intents()[-1].newest.hash
    bench.anvil.stop()
    bench.anvil.start()
    assert (bench.stake, bench.anvil.pending()) == (1, {})
    assert bench.as_alice().stakes.deposit_stake(amount_wei=10).transaction == waiting
    assert (bench.stake, bench.nonce) == (11, 2)


def test_another_chain_of_the_same_number_is_another_chain(bench: Bench) -> None:
    bench.as_alice(purpose="once").stakes.deposit_stake(amount_wei=10)
    bench.anvil.stop()
    bench.anvil.state.unlink()
    bench.anvil.start()
    bench.anvil.account("alice")
    assert deploy_on(bench.anvil).stakes == bench.deployment.stakes
    bench.as_alice(purpose="once").stakes.deposit_stake(amount_wei=10)
    assert (bench.stake, bench.nonce) == (10, 1)


# The journal


def test_the_journal_is_private_and_has_no_key(bench: Bench) -> None:
    bench.as_alice().stakes.deposit_stake(amount_wei=10)
    for path in bench.path.parent.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert bytes(bench.alice.key) not in path.read_bytes()
        assert bytes(bench.alice.key).hex().encode() not in path.read_bytes()


# Deployment


def test_an_interrupted_deployment_is_resumed(bench: Bench, tmp_path: Path) -> None:
    deployer = bench.anvil.account("another deployer")

    def sender(rules: Sending) -> Sender:
        return bench.sender(rules, tmp_path / "deployer.sqlite", deployer)

    bench.anvil.stop_mining()
    with pytest.raises(Unconfirmed):
        deploy(sender(HASTY))
    bench.anvil.forget_pending()
    bench.anvil.start_mining()
    first = deploy(sender(QUICK))
    assert deploy(sender(QUICK)) == first
    assert bench.web3.eth.get_transaction_count(deployer.address) == 4
    check_deployment(bench.web3, first)
    assert deploy(sender(QUICK), withdrawal_delay_s=7200).stakes != first.stakes


def test_a_deployment_whose_nonces_were_used_elsewhere_starts_anew(bench: Bench, tmp_path: Path) -> None:
    deployer = bench.anvil.account("another deployer")
    sender = bench.sender(QUICK, tmp_path / "deployer.sqlite", deployer)
    send, sent = sender.send, []

    def disturbed(*arguments: Any, **named: Any) -> Any:
        sent.append(1)
        if len(sent) == 3:
            Sender(bench.web3, deployer, rules=QUICK).send(b"", to=deployer.address)
        return send(*arguments, **named)

    sender.send = disturbed  # type: ignore[method-assign]
    with pytest.raises(InvalidDeployment, match="at nonce 3, not 2: it sent something else meanwhile"):
        deploy(sender)
    check_deployment(bench.web3, deploy(sender))
    assert bench.web3.eth.get_transaction_count(deployer.address) == 7


# In this process

KILLED_IN_PROCESS = """
import os, signal, sys
from pathlib import Path
from eth_account import Account
from web3 import Web3
from blocks.local_chain import GENESIS_KEYS, LocalChainProvider
from contracts.journal import Journal
from contracts.sending import Sender

web3 = Web3(LocalChainProvider(Path(sys.argv[1]) / "chain.sqlite"))
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "before sending":
    web3.eth.send_raw_transaction = die
else:
    Journal.close = die
sender = Sender(web3, Account.from_key(GENESIS_KEYS[0]), journal=Journal(Path(sys.argv[1]) / "journal.sqlite"))
sender.send(b"", to=Account.from_key(b"1" * 32).address, value_wei=5)
"""


@pytest.mark.parametrize(("point", "arrived"), [("before sending", 0), ("before the receipt is noted", 5)])
def test_on_the_chain_in_this_process_a_killed_payment_is_made_once(tmp_path: Path, point: str, arrived: int) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED_IN_PROCESS, str(tmp_path), point], check=False)
    assert done.returncode == -signal.SIGKILL
    provider = LocalChainProvider(tmp_path / "chain.sqlite")
    web3, payee = Web3(provider), Account.from_key(b"1" * 32).address
    assert web3.eth.get_balance(payee) == arrived
    sender = Sender(web3, Account.from_key(GENESIS_KEYS[0]), journal=Journal(tmp_path / "journal.sqlite"))
    for expected in (5, 10):
        sender.send(b"", to=payee, value_wei=5)
        assert web3.eth.get_balance(payee) == expected
    provider.close()


def test_the_chain_in_this_process_mines_the_confirmations_itself(tmp_path: Path) -> None:
    chain = Chain(rpc=f"local:{tmp_path / 'chain.sqlite'}", sending=Sending(confirmations=4, poll_s=0.01))
    sender = chain.sender(Account.from_key(GENESIS_KEYS[0]), tmp_path / "journal.sqlite")
    receipt = sender.send(b"", to=Account.from_key(keccak(text="x")).address, value_wei=5)
    assert chain.web3.eth.block_number == receipt["blockNumber"] + 3
    chain.close()
