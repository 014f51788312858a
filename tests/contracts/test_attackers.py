"""Accounts that are contracts: they refuse their payment, or call back while they are paid. Only they lose by it."""

import json
from pathlib import Path

import pytest
from eth_account.signers.local import LocalAccount

from contracts.bindings import Bound
from contracts.messages import accuracy_commit, score_commit, sign
from contracts.sending import Reverted, send
from tests.contracts.world import DELAY, PUBLISHER_WINDOW, REWARD, SCORE_WINDOW, SPEC, TASK, World, number

BUILD = Path(__file__).parent / "build" / "Recipient.json"
ACCEPT, REFUSE, REENTER = range(3)


class Recipient:
    """A contract account at the hand of the stranger."""

    def __init__(self, world: World, value: int = 10**6) -> None:
        self.world = world
        build = json.loads(BUILD.read_text())
        deployed = send(world.web3, world.stranger, bytes.fromhex(build["bytecode"][2:]), to=None, value_wei=value)
        self.address = deployed["contractAddress"]
        self.contract = world.web3.eth.contract(address=self.address, abi=build["abi"])

    def _send(self, function: str, *arguments: object) -> None:
        data = bytes.fromhex(self.contract.encode_abi(function, args=list(arguments))[2:])
        send(self.world.web3, self.world.stranger, data, to=self.address)

    def behave(self, manner: int, again: bytes = b"") -> None:
        self._send("behave", manner, again)

    def call(self, target: Bound, function: str, *arguments: object, value: int = 0) -> None:
        """Call one of the contracts as this account."""
        self._send("forward", target.address, value, target._encode(function, *arguments))

    @property
    def has_reentered(self) -> bool:
        return bool(self.contract.functions.hasReentered().call())


def cohort_with(world: World, recipient: Recipient) -> list[str]:
    """A task whose cohort has a contract among three ordinary miners; a contract cannot sign, so others vote."""
    world.publish(fault_rate_ppm=500_000)
    world.deposit(world.miners[:3], [100] * 3)
    world.register(world.miners[:3])
    stakes = world.views.stakes
    recipient.call(stakes, "depositStake", value=10)
    recipient.call(stakes, "register", TASK, b"\1" * 32)
    return sorted([recipient.address, *(miner.address for miner in world.miners[:3])], key=number)


def draw_someone_else(world: World, cohort: list[str], recipient: Recipient) -> LocalAccount:
    snapshot = world.tester.take_snapshot()
    for _ in range(20):
        world.as_(world.publisher).stakes.close_registration(TASK, cohort)
        world.tester.mine_block()
        world.as_(world.publisher).stakes.draw_aggregator(TASK)
        if world.views.stakes.aggregator_of(TASK) != recipient.address:
            return world.aggregator
        world.tester.revert_to_snapshot(snapshot)
        world.tester.mine_block()
    raise AssertionError("a member with 3 % of the stake was drawn 20 times")


def settled_with(world: World, recipient: Recipient) -> None:
    """Carry the task to its distribution in equal parts, the recipient among those paid."""
    cohort = cohort_with(world, recipient)
    aggregator = draw_someone_else(world, cohort, recipient)
    commits = tuple(score_commit(1, b"\1" * 32, TASK, address) for address in cohort)
    candidate = world.candidate(participants=tuple(cohort), score_commits=commits)
    voters = [miner for miner in world.miners[:3] if miner != aggregator]
    world.as_(aggregator).publisher.publish_block(candidate, world.votes(candidate, voters))
    world.reveal_accuracy()
    world.at(world.now() + SCORE_WINDOW + 1)
    world.as_(world.stranger).rewards.distribute(TASK)


def test_a_miner_that_refuses_its_reward_harms_only_itself(empty: World) -> None:
    recipient = Recipient(empty)
    settled_with(empty, recipient)
    rewards = empty.views.rewards
    owed = rewards.balance_of(recipient.address)
    assert owed > 0
    recipient.behave(REFUSE)
    with pytest.raises(Reverted, match="TransferFailed") as refused:
        recipient.call(rewards, "withdraw")
    assert refused.value.arguments == (recipient.address, owed)
    for miner in empty.miners[:3]:
        empty.as_(miner).rewards.withdraw()
    assert empty.balance(rewards.address) == rewards.balance_of(recipient.address) == owed

    # And it can still have it elsewhere.
    elsewhere = "0x" + "7" * 40
    recipient.call(rewards, "withdrawTo", elsewhere)
    assert empty.balance(elsewhere) == owed
    assert empty.balance(rewards.address) == 0


@pytest.mark.parametrize("function", ["withdraw", "withdrawTo", "distribute", "revealAccuracy"])
def test_a_miner_that_calls_back_is_paid_once(empty: World, function: str) -> None:
    recipient = Recipient(empty)
    settled_with(empty, recipient)
    rewards = empty.views.rewards
    owed = rewards.balance_of(recipient.address)
    before = empty.balance(recipient.address)
    arguments = {"withdraw": (), "withdrawTo": (recipient.address,), "revealAccuracy": (TASK, 0, SPEC)}
    recipient.behave(REENTER, rewards._encode(function, *arguments.get(function, (TASK,))))
    recipient.call(rewards, "withdraw")
    assert not recipient.has_reentered
    assert empty.balance(recipient.address) == before + owed


def test_a_publisher_that_refuses_its_refund_can_take_it_later(empty: World) -> None:
    recipient = Recipient(empty)
    escrow = empty.views.escrow
    terms = empty.terms()
    values = tuple(vars(terms).values())
    recipient.call(escrow, "publishTask", TASK, b"\1" * 32, SPEC, values, value=1000)
    empty.publish("another")
    recipient.behave(REFUSE)
    empty.at(terms.deadline_s + 2)
    with pytest.raises(Reverted, match="TransferFailed"):
        recipient.call(escrow, "refundPublisher", TASK)
    empty.as_(empty.publisher).escrow.refund_publisher("another")
    assert empty.balance(escrow.address) == 1000
    recipient.behave(ACCEPT)
    recipient.call(escrow, "refundPublisher", TASK)
    assert empty.balance(escrow.address) == 0


def test_a_publisher_that_calls_back_is_refunded_once(empty: World) -> None:
    recipient = Recipient(empty)
    escrow = empty.views.escrow
    values = tuple(vars(empty.terms()).values())
    recipient.call(escrow, "publishTask", TASK, b"\1" * 32, SPEC, values, value=1000)
    deadline = escrow.get_task(TASK).terms.deadline_s
    empty.publish("another")
    recipient.behave(REENTER, escrow._encode("refundPublisher", TASK))
    empty.at(deadline + 1)
    recipient.call(escrow, "refundPublisher", TASK)
    assert not recipient.has_reentered
    assert empty.balance(escrow.address) == REWARD


def test_a_publisher_that_refuses_its_payment_does_not_stop_an_unmet_settlement(empty: World) -> None:
    """The reward is credited, not sent: even a publisher that cannot be paid can reveal."""
    recipient = Recipient(empty)
    values = tuple(vars(empty.terms()).values())
    commit = bytes.fromhex(accuracy_commit(999_999, b"\2" * 32)[2:])
    recipient.call(empty.views.escrow, "publishTask", TASK, commit, SPEC, values, value=1000)
    recipient.behave(REFUSE)
    empty.deposit(empty.cohort, [10] * 4)
    empty.register(empty.cohort)
    recipient.call(empty.views.stakes, "closeRegistration", TASK, [miner.address for miner in empty.cohort])
    empty.tester.mine_block()
    empty.as_(empty.stranger).stakes.draw_aggregator(TASK)
    empty.publish_block()
    recipient.call(empty.views.rewards, "revealAccuracy", TASK, 999_999, b"\2" * 32)
    assert empty.views.rewards.balance_of(recipient.address) == 1000
    recipient.behave(ACCEPT)
    recipient.call(empty.views.rewards, "withdraw")
    assert empty.balance(empty.deployment.rewards) == 0


@pytest.mark.parametrize("manner", [REFUSE, REENTER])
def test_a_staker_that_misbehaves_gets_its_stake_once_or_not_at_all(empty: World, manner: int) -> None:
    recipient = Recipient(empty, value=100)
    stakes = empty.views.stakes
    recipient.call(stakes, "depositStake", value=100)
    empty.deposit(empty.miners[:1], [1000])
    recipient.call(stakes, "requestWithdrawal", 60)
    recipient.behave(manner, stakes._encode("withdrawStake"))
    empty.at(empty.now() + DELAY + 1)
    if manner == REFUSE:
        with pytest.raises(Reverted, match="TransferFailed"):
            recipient.call(stakes, "withdrawStake")
        assert stakes.stake_of(recipient.address) == 100
    else:
        recipient.call(stakes, "withdrawStake")
        assert not recipient.has_reentered
        assert (stakes.stake_of(recipient.address), empty.balance(recipient.address)) == (40, 60)
    assert empty.balance(stakes.address) == 1000 + stakes.stake_of(recipient.address)


@pytest.mark.parametrize("again", ["withdrawCredit", "withdrawStake"])
def test_credit_is_paid_once(empty: World, again: str) -> None:
    recipient = Recipient(empty)
    aggregator = draw_someone_else(empty, cohort_with(empty, recipient), recipient)
    pair = [empty.candidate(correct=correct) for correct in (1, 2)]
    first, second = (sign(candidate, empty.domain, aggregator.key) for candidate in pair)
    empty.as_(empty.stranger).publisher.report_equivocation(pair[0], first, pair[1], second)
    stakes = empty.views.stakes
    credit = stakes.credit_of(recipient.address)
    assert credit in (33, 34)
    before = empty.balance(recipient.address)
    recipient.behave(REENTER, stakes._encode(again))
    recipient.call(stakes, "withdrawCredit")
    assert not recipient.has_reentered
    assert empty.balance(recipient.address) == before + credit


@pytest.mark.filterwarnings("ignore:SELFDESTRUCT:DeprecationWarning")
def test_ether_forced_into_a_contract_belongs_to_nobody_and_disturbs_nothing(published: World) -> None:
    """A contract destroyed at its creation sends its value without being asked."""
    published.at(published.now() + PUBLISHER_WINDOW // 2)
    for target in published.deployment.addresses:
        code = bytes.fromhex("73" + target[2:] + "ff")  # PUSH20 target SELFDESTRUCT
        send(published.web3, published.stranger, code, to=None, value_wei=5)
        assert published.balance(target) >= 5
    published.reveal_accuracy()
    for miner in published.cohort:
        published.reveal_score(miner)
    published.as_(published.stranger).rewards.distribute(TASK)
    for miner in published.cohort:
        published.as_(miner).rewards.withdraw()
    assert published.balance(published.deployment.escrow) == 5
    assert published.balance(published.deployment.rewards) == 5
