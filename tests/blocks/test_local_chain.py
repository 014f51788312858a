"""The chain in a file: the same after reopening and after every kill, with time that only goes on."""

import subprocess
import sys

import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount
from eth_tester import EthereumTester, PyEVMBackend
from eth_utils import keccak
from web3 import EthereumTesterProvider, Web3

from blocks.chain import Chain, NotYet
from blocks.local_chain import GENESIS_KEYS, ChainInUse, LocalChainProvider
from contracts import bindings
from contracts.bindings import Terms
from contracts.messages import ZERO_ADDRESS, Domain, Registration, accuracy_commit, sign
from contracts.sending import Reverted, Sender

FAUCET = Account.from_key(GENESIS_KEYS[0])
ALICE, BOB = Account.from_key(keccak(text="alice")), Account.from_key(keccak(text="bob"))
SALT = keccak(text="salt")


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def signed_application(miner: LocalAccount, domain: Domain) -> tuple:
    """What closeRegistration takes of a miner that puts half of its stake behind the task."""
    registration = Registration(
        task_id="a-task",
        round_number=0,
        miner=miner.address,
        encryption_key="0x02" + "11" * 32,
        dataset_proof_sha256="0x" + "22" * 32,
        stake_wei=50,
    )
    return bindings._application(registration, sign(registration, domain, miner.key))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "chain.sqlite"


@pytest.fixture
def provider(path):
    opened = LocalChainProvider(path)
    yield opened
    opened.close()


def pay(web3: Web3, to: str, wei: int) -> None:
    Sender(web3, FAUCET).send(b"", to=to, value_wei=wei)


def blocks(web3: Web3) -> list[tuple[int, str, int, list[str]]]:
    found = [web3.eth.get_block(number) for number in range(web3.eth.block_number + 1)]
    return [
        (block["number"], block["hash"].hex(), block["timestamp"], [hash_.hex() for hash_ in block["transactions"]])
        for block in found
    ]


# The same after reopening


def test_a_reopened_chain_has_the_same_blocks_and_balances(path):
    provider = LocalChainProvider(path)
    web3 = Web3(provider)
    for wei in (5, 7):
        pay(web3, ALICE.address, wei)
    provider.mine()
    before = blocks(web3), web3.eth.get_balance(FAUCET.address), web3.eth.get_transaction_count(FAUCET.address)
    provider.close()

    provider = LocalChainProvider(path)
    web3 = Web3(provider)
    assert (
        blocks(web3),
        web3.eth.get_balance(FAUCET.address),
        web3.eth.get_transaction_count(FAUCET.address),
    ) == before
    assert web3.eth.get_balance(ALICE.address) == 12
    pay(web3, ALICE.address, 1)
    assert blocks(web3)[: len(before[0])] == before[0]
    assert web3.eth.get_balance(ALICE.address) == 13
    provider.close()


def test_contracts_and_their_state_survive_reopening(path):
    provider = LocalChainProvider(path)
    deployment = bindings.deploy(Sender(Web3(provider), FAUCET))
    bindings.connect(Web3(provider), deployment, Sender(Web3(provider), FAUCET)).stakes.deposit_stake(amount_wei=77)
    provider.close()

    provider = LocalChainProvider(path)
    bindings.check_deployment(Web3(provider), deployment)
    contracts = bindings.connect(Web3(provider), deployment, Sender(Web3(provider), FAUCET))
    assert contracts.stakes.stake_of(FAUCET.address) == 77
    contracts.stakes.deposit_stake(amount_wei=3)
    assert contracts.stakes.stake_of(FAUCET.address) == 80
    provider.close()


def test_two_folders_are_two_chains(tmp_path):
    first, second = LocalChainProvider(tmp_path / "a"), LocalChainProvider(tmp_path / "b")
    pay(Web3(first), ALICE.address, 5)
    assert Web3(second).eth.get_balance(ALICE.address) == 0
    first.close()
    second.close()


# One opener


def test_a_second_opener_is_refused_until_the_first_has_closed(path):
    first = LocalChainProvider(path)
    with pytest.raises(ChainInUse, match="open in another process"):
        LocalChainProvider(path)
    opener = "import sys, pathlib, blocks.local_chain as chain\nchain.LocalChainProvider(pathlib.Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", opener, path], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "ChainInUse" in done.stderr
    pay(Web3(first), ALICE.address, 5)  # the refused ones changed nothing
    first.close()
    second = LocalChainProvider(path)
    assert Web3(second).eth.get_balance(ALICE.address) == 5
    second.close()


# Killed


KILLED = """
import os, signal, sys, time
from pathlib import Path
from eth_account import Account
from eth_utils import keccak
from web3 import Web3
from blocks.local_chain import GENESIS_KEYS, LocalChainProvider
from contracts.sending import Sender

path, faucet, alice = Path(sys.argv[1]), Account.from_key(GENESIS_KEYS[0]), Account.from_key(keccak(text="alice"))
for attempt in range(6):
    noted, note = os.pipe()
    pid = os.fork()
    if pid == 0:
        web3 = Web3(LocalChainProvider(path))
        os.write(note, b"!")
        while True:
            Sender(web3, faucet).send(b"", to=alice.address, value_wei=1)
            os.write(note, b".")
    os.read(noted, 1)
    time.sleep(0.25 + 0.037 * attempt)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(note)
    confirmed = len(os.read(noted, 1 << 16))
    provider = LocalChainProvider(path)
    web3 = Web3(provider)
    blocks = [web3.eth.get_block(number) for number in range(web3.eth.block_number + 1)]
    chained = all(block["parentHash"] == before["hash"] for before, block in zip(blocks, blocks[1:]))
    later = all(block["timestamp"] > before["timestamp"] for before, block in zip(blocks, blocks[1:]))
    mined = sum(len(block["transactions"]) for block in blocks)
    receipts = sum(web3.eth.get_transaction_receipt(one)["status"] for block in blocks for one in block["transactions"])
    nonce, balance = web3.eth.get_transaction_count(faucet.address), web3.eth.get_balance(alice.address)
    print(confirmed, mined, receipts, nonce, balance, int(chained), int(later), flush=True)
    provider.close()
"""


def test_a_killed_chain_reopens_with_whole_blocks_only(path):
    done = subprocess.run([sys.executable, "-c", KILLED, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(lines) == 6
    before = 0
    for confirmed, mined, receipts, nonce, balance, chained, later in lines:
        assert mined == receipts == nonce == balance
        assert before + confirmed <= mined <= before + confirmed + 1  # what was answered was written
        assert (chained, later) == (1, 1)
        before = mined
    assert before > 6


# Time


def test_time_follows_the_clock_and_never_goes_back(path):
    clock = Clock(2_000_000_000)
    provider = LocalChainProvider(path, clock=clock)
    web3 = Web3(provider)
    times = []
    for now in (2_000_000_000, 2_000_000_100, 1_000, 2_000_000_050, 2_000_000_300):
        clock.now = now
        pay(web3, ALICE.address, 1)
        times.append(web3.eth.get_block("latest")["timestamp"])
    assert times == sorted(set(times))
    assert times[1] == 2_000_000_100
    assert times[2:4] == [2_000_000_101, 2_000_000_102]
    assert times[4] == 2_000_000_300
    provider.close()
    provider = LocalChainProvider(path, clock=Clock(5))
    provider.mine()
    assert Web3(provider).eth.get_block("latest")["timestamp"] == 2_000_000_301
    provider.close()


@pytest.mark.parametrize("ahead_s", [1, 2, 3, 10, 3600])
def test_the_chain_is_moved_ahead_to_the_very_second(path, ahead_s):
    clock = Clock(2_000_000_000)
    provider = LocalChainProvider(path, clock=clock)
    web3 = Web3(provider)
    pay(web3, ALICE.address, 1)
    moment = web3.eth.get_block("latest")["timestamp"] + ahead_s
    provider.advance_to(moment)
    assert web3.eth.get_block("latest")["timestamp"] == moment
    number = web3.eth.block_number
    provider.advance_to(moment)
    provider.advance_to(moment - 1)
    assert web3.eth.block_number == number
    pay(web3, ALICE.address, 1)
    assert web3.eth.get_block("latest")["timestamp"] == moment + 1
    provider.close()


@pytest.mark.parametrize("ahead_s", [1, 2, 30])
def test_a_chain_behind_the_clock_is_moved_ahead_too(path, ahead_s):
    """Its last block is older than the wall clock: the moment asked for lies between the two."""
    clock = Clock(2_000_000_000)
    provider = LocalChainProvider(path, clock=clock)
    pay(Web3(provider), ALICE.address, 1)
    moment = Web3(provider).eth.get_block("latest")["timestamp"] + ahead_s
    clock.now += 60
    provider.advance_to(moment)
    assert Web3(provider).eth.get_block("latest")["timestamp"] >= moment
    provider.close()


def test_the_block_waits_for_moments_and_blocks(path):
    chain = Chain(rpc=f"local:{path}", patience_s=0)
    later = chain.now_s() + 500
    chain.wait_until(later, "the deadline")
    assert chain.now_s() >= later
    number = chain.web3.eth.block_number
    chain.wait_for_block(number + 3)
    chain.wait_for_block(number)
    assert chain.web3.eth.block_number == number + 3
    chain.close()
    assert "is not before" in str(NotYet("the deadline", later))


# Logs


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """A chain with the contracts and a few events."""
    provider = LocalChainProvider(tmp_path_factory.mktemp("chain") / "chain.sqlite")
    web3 = Web3(provider)
    deployment = bindings.deploy(Sender(web3, FAUCET))
    for number, account in enumerate((ALICE, BOB)):
        pay(web3, account.address, 10**19)
        stakes = bindings.connect(web3, deployment, Sender(web3, account)).stakes
        stakes.deposit_stake(amount_wei=100 + number)
        stakes.request_withdrawal(1)
    provider.mine()
    yield provider, deployment
    provider.close()


def topic(address: str) -> str:
    return "0x" + address[2:].lower().rjust(64, "0")


LAST = 10  # four deployments, two payments, four events about stakes
FILTERS = {
    "everything": lambda d: {"fromBlock": 0, "toBlock": LAST},
    "a few blocks": lambda d: {"fromBlock": 6, "toBlock": 7},
    "no block": lambda d: {"fromBlock": 9, "toBlock": 8},
    "one address": lambda d: {"fromBlock": 0, "toBlock": LAST, "address": d.stakes},
    "a list of addresses": lambda d: {"fromBlock": 0, "toBlock": LAST, "address": [d.stakes, d.escrow]},
    "an address without logs": lambda d: {"fromBlock": 0, "toBlock": LAST, "address": [d.rewards]},
    "one account": lambda d: {"fromBlock": 0, "toBlock": LAST, "topics": [None, topic(ALICE.address)]},
    "either account": lambda d: {
        "fromBlock": 0,
        "toBlock": LAST,
        "topics": [None, [topic(ALICE.address), topic(BOB.address)]],
    },
    "nobody": lambda d: {"fromBlock": 0, "toBlock": LAST, "topics": [None, topic(FAUCET.address)]},
    "more topics than a log has": lambda d: {"fromBlock": 0, "toBlock": LAST, "topics": [None] * 4},
    "to the latest": lambda d: {"fromBlock": 0, "toBlock": "latest"},
    "the latest block only": lambda d: {},
}


@pytest.mark.parametrize("name", FILTERS)
def test_logs_are_those_that_eth_tester_itself_finds(busy, name):
    provider, deployment = busy
    wanted = FILTERS[name](deployment)
    theirs = Web3(EthereumTesterProvider(provider.tester)).eth.get_logs(wanted)
    ours = Web3(provider).eth.get_logs(wanted)
    assert [dict(log) for log in ours] == [dict(log) for log in theirs]
    assert (len(ours) > 0) == (name not in ("no block", "an address without logs", "nobody") and len(theirs) > 0)


def test_the_earliest_block_is_the_first_one(busy):
    """As a node has it; eth-tester itself finds nothing from there."""
    web3 = Web3(busy[0])
    assert web3.eth.get_logs({"fromBlock": "earliest", "toBlock": LAST}) == web3.eth.get_logs(
        {"fromBlock": 0, "toBlock": LAST}
    )


def test_logs_of_blocks_mined_later_are_found_too(provider):
    web3 = Web3(provider)
    deployment = bindings.deploy(Sender(web3, FAUCET))
    stakes = bindings.connect(web3, deployment, Sender(web3, FAUCET)).stakes
    for number in range(1, 4):
        stakes.deposit_stake(amount_wei=1)
        logs = web3.eth.get_logs({"fromBlock": 0, "toBlock": web3.eth.block_number})
        found = [log for log in logs if log["address"] == deployment.stakes]
        assert len(found) == number


# Gas


def test_estimates_are_enough_for_every_call_and_not_far_above(provider):
    """Each transaction is sent with exactly what the estimate says, where `Sender.send` adds a fifth."""
    web3 = Web3(provider)
    used = {}

    def send(what: str, account, data: bytes, to: str | None, value_wei: int = 0):
        plain = {"from": account.address, "value": value_wei, "data": "0x" + data.hex(), **({"to": to} if to else {})}
        gas = web3.eth.estimate_gas(plain)
        nonce = web3.eth.get_transaction_count(account.address)
        rest = {"gas": gas, "nonce": nonce, "chainId": web3.eth.chain_id, "gasPrice": 10**10}
        signed = account.sign_transaction({**plain, **rest})
        receipt = web3.eth.wait_for_transaction_receipt(web3.eth.send_raw_transaction(signed.raw_transaction))
        assert receipt["status"] == 1, what
        assert receipt["gasUsed"] <= gas <= 1.3 * receipt["gasUsed"], what
        used[what] = receipt
        return receipt

    first = web3.eth.get_transaction_count(FAUCET.address)
    names = ("HealChainEscrow", "StakeRegistry", "BlockPublisher", "RewardDistribution")
    escrow, stakes, publisher, rewards = (bindings._create_address(FAUCET.address, first + i) for i in range(4))
    arguments = [(publisher, rewards), (escrow, publisher, 60), (escrow, stakes), (escrow, publisher)]
    for name, values in zip(names, arguments, strict=True):
        build = bindings.load_build(name)
        factory = web3.eth.contract(abi=build["abi"], bytecode=build["bytecode"])
        send(f"deploy {name}", FAUCET, bytes.fromhex(factory.constructor(*values).data_in_transaction[2:]), None)
    deployment = bindings.Deployment(web3.eth.chain_id, escrow, stakes, publisher, rewards, 1)
    contracts = bindings.connect(web3, deployment)

    miners = sorted(
        (Account.from_key(keccak(text=f"miner {i}")) for i in range(4)), key=lambda one: int(one.address, 16)
    )
    deadline_s = web3.eth.get_block("latest")["timestamp"] + 1000
    terms = Terms(deadline_s, 500, 100, 100, 100, 3, 6, 250_000, 100_000, 200_000, 10**9, 10)
    encode = contracts.escrow._encode
    commit, spec_hash = accuracy_commit(1, SALT), "0x" + SALT.hex()
    data = encode("publishTask", "a-task", commit, spec_hash, ZERO_ADDRESS, 10**15, tuple(vars(terms).values()))
    send("publishTask", FAUCET, data, escrow, 10**15)
    encode = contracts.stakes._encode
    for miner in miners:
        send("pay", FAUCET, b"", miner.address, 10**19)
        send("depositStake", miner, encode("depositStake"), stakes, 100)
    domain = Domain(deployment.chain_id, deployment.publisher)
    applications = [signed_application(miner, domain) for miner in miners]
    send("closeRegistration", FAUCET, encode("closeRegistration", "a-task", applications), stakes)
    provider.mine()
    send(
        "drawAggregator",
        ALICE if web3.eth.get_balance(ALICE.address) else FAUCET,
        encode("drawAggregator", "a-task", contracts.stakes.get_cohort("a-task").words),
        stakes,
    )
    send("requestWithdrawal", miners[0], encode("requestWithdrawal", 50), stakes)
    send("requestWithdrawal again", miners[0], encode("requestWithdrawal", 0), stakes)  # refunds storage
    provider.advance_to(terms.deadline_s + 1)
    send("refundPublisher", FAUCET, contracts.escrow._encode("refundPublisher", "a-task", FAUCET.address), escrow)
    assert contracts.stakes.aggregator_of("a-task") in [miner.address for miner in miners]
    assert len(used) == 12


def test_an_estimate_of_a_call_that_would_fail_is_a_refusal(busy):
    provider, deployment = busy
    stakes = bindings.connect(Web3(provider), deployment, Sender(Web3(provider), ALICE)).stakes
    with pytest.raises(Reverted, match=r"NothingToWithdraw|WithdrawalTooEarly"):
        stakes.withdraw_stake()


def test_the_estimate_is_as_good_as_py_evms_own_search(busy):
    provider, deployment = busy
    web3 = Web3(provider)
    data = bindings.connect(web3, deployment).stakes._encode("depositStake")
    call = {"from": ALICE.address, "to": deployment.stakes, "value": 5, "data": "0x" + data.hex()}
    ours = web3.eth.estimate_gas(call)
    receipt = Sender(web3, ALICE).send(data, to=deployment.stakes, value_wei=5)
    assert receipt["gasUsed"] <= ours <= receipt["gasUsed"] * 17 // 16 + 1


def test_the_genesis_accounts_have_money_and_the_known_keys(provider):
    web3 = Web3(provider)
    accounts = [Account.from_key(key).address for key in GENESIS_KEYS]
    theirs = EthereumTester(PyEVMBackend()).get_accounts()
    assert accounts == list(theirs)
    assert {web3.eth.get_balance(account) for account in accounts} == {10**24}
