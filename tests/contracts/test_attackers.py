"""Accounts that are contracts: they refuse their payment, or call back while they are paid. Only they lose by it."""

import json
from pathlib import Path

import pytest

from contracts.bindings import Bound, Offence, _application, explain
from contracts.messages import ZERO_ADDRESS, accuracy_commit
from contracts.sending import Reverted, Sender
from tests.contracts.tokens import CALL_BACK, behave, funded
from tests.contracts.world import DELAY, PUBLISHER_WINDOW, REWARD, SPEC, TASK, World, number

BUILD = Path(__file__).parent / "build" / "Recipient.json"
ACCEPT, REFUSE, REENTER = range(3)
NO_OPENING = (0, SPEC, 0, [])
PUBLISHER_SALT = b"\2" * 32
COMMIT = bytes.fromhex(accuracy_commit(999_999, PUBLISHER_SALT)[2:])


class Recipient:
    """A contract account at the hand of the stranger."""

    def __init__(self, world: World, value: int = 10**6) -> None:
        self.world = world
        build = json.loads(BUILD.read_text())
        self.sender = Sender(world.web3, world.stranger)
        deployed = self.sender.send(bytes.fromhex(build["bytecode"][2:]), to=None, value_wei=value)
        self.address = deployed["contractAddress"]
        self.contract = world.web3.eth.contract(address=self.address, abi=build["abi"])

    def _send(self, function: str, *arguments: object) -> None:
        data = bytes.fromhex(self.contract.encode_abi(function, args=list(arguments))[2:])
        self.sender.send(data, to=self.address, explain=explain)

    def behave(self, manner: int, again: bytes = b"") -> None:
        self._send("behave", manner, again)

    def call(self, target: Bound, function: str, *arguments: object, value: int = 0) -> None:
        """Call one of the contracts as this account."""
        self._send("forward", target.address, value, target._encode(function, *arguments))

    @property
    def has_reentered(self) -> bool:
        return bool(self.contract.functions.hasReentered().call())


def publish_as(world: World, recipient: Recipient, value: int = 1000) -> int:
    """A task whose publisher is a contract; the deadline."""
    terms = world.terms()
    arguments = (TASK, COMMIT, SPEC, ZERO_ADDRESS, value, tuple(vars(terms).values()))
    recipient.call(world.views.escrow, "publishTask", *arguments, value=value)
    return terms.deadline_s


def unmet(world: World, recipient: Recipient) -> None:
    """Carry the task of a publisher that is a contract to the distribution of its refund."""
    publish_as(world, recipient)
    world.deposit(world.cohort, [10] * 4)
    applications = [_application(*world.application(miner)) for miner in world.cohort]
    recipient.call(world.views.stakes, "closeRegistration", TASK, applications)
    world.tester.mine_block()
    world.as_(world.stranger).stakes.draw_aggregator(TASK)
    world.publish_block()
    recipient.call(world.views.rewards, "revealAccuracy", TASK, 999_999, PUBLISHER_SALT)
    world.as_(world.stranger).rewards.distribute(TASK)


def test_a_contract_is_not_admitted_to_a_cohort(locked: World) -> None:
    """It cannot sign an application: the signature of whoever owns it is not its own."""
    recipient = Recipient(locked)
    recipient.call(locked.views.stakes, "depositStake", value=100)
    forged = locked.application(locked.stranger, miner=recipient.address)
    usual = [locked.application(miner) for miner in locked.cohort]
    applications = sorted([*usual, forged], key=lambda application: number(application[0].miner))
    with pytest.raises(Reverted, match="InvalidApplication") as refused:
        locked.as_(locked.publisher).stakes.close_registration(TASK, applications)
    assert refused.value.arguments[1] == recipient.address


def test_a_recipient_that_refuses_costs_nobody_anything(paid: World) -> None:
    """The claim is undone with the payment; it can be made again for another recipient."""
    recipient, miner = Recipient(paid), paid.others[0]
    recipient.behave(REFUSE)
    place = (paid.cohort.index(miner), paid.scores()[miner.address])
    owed = paid.views.rewards.claimable(TASK, *place)
    with pytest.raises(Reverted, match="TransferFailed") as refused:
        paid.claim(miner, recipient=recipient.address)
    assert refused.value.arguments == (recipient.address, owed)
    assert paid.views.rewards.claimable(TASK, *place) == owed
    for other in paid.cohort:
        paid.claim(other)
    paid.withdraw(paid.aggregator)
    assert paid.balance(paid.deployment.rewards) == 0


@pytest.mark.parametrize("function", ["withdrawTo", "claimTo", "distribute", "revealAccuracy", "revealScore"])
def test_a_publisher_that_calls_back_while_it_is_paid_is_paid_once(empty: World, function: str) -> None:
    recipient = Recipient(empty)
    unmet(empty, recipient)
    rewards = empty.views.rewards
    arguments = {
        "withdrawTo": (ZERO_ADDRESS, recipient.address),
        "claimTo": (TASK, ZERO_ADDRESS, recipient.address, NO_OPENING),
        "distribute": (TASK,),
        "revealAccuracy": (TASK, 0, SPEC),
        "revealScore": (TASK, NO_OPENING),
    }
    before = empty.balance(recipient.address)
    recipient.behave(REENTER, rewards._encode(function, *arguments[function]))
    recipient.call(rewards, "withdrawTo", ZERO_ADDRESS, recipient.address)
    assert not recipient.has_reentered
    assert empty.balance(recipient.address) == before + 1000
    assert empty.balance(rewards.address) == 0


def test_a_publisher_that_refuses_its_refund_can_have_it_elsewhere(empty: World) -> None:
    recipient, elsewhere = Recipient(empty), "0x" + "7" * 40
    escrow, deadline = empty.views.escrow, publish_as(empty, recipient)
    empty.publish("another")
    recipient.behave(REFUSE)
    empty.at(deadline + 2)
    with pytest.raises(Reverted, match="TransferFailed"):
        recipient.call(escrow, "refundPublisher", TASK, recipient.address)
    empty.as_(empty.publisher).escrow.refund_publisher("another")
    assert empty.balance(escrow.address) == 1000
    recipient.call(escrow, "refundPublisher", TASK, elsewhere)
    assert (empty.balance(escrow.address), empty.balance(elsewhere)) == (0, 1000)


def test_a_publisher_that_calls_back_is_refunded_once(empty: World) -> None:
    recipient = Recipient(empty)
    escrow, deadline = empty.views.escrow, publish_as(empty, recipient)
    empty.publish("another")
    recipient.behave(REENTER, escrow._encode("refundPublisher", TASK, recipient.address))
    empty.at(deadline + 2)
    recipient.call(escrow, "refundPublisher", TASK, recipient.address)
    assert not recipient.has_reentered
    assert empty.balance(escrow.address) == REWARD


def test_a_publisher_that_refuses_its_payment_does_not_stop_an_unmet_settlement(empty: World) -> None:
    """The reward is credited, not sent: even a publisher that cannot be paid can reveal."""
    recipient = Recipient(empty)
    recipient.behave(REFUSE)
    unmet(empty, recipient)
    assert empty.views.rewards.balance_of(recipient.address) == 1000
    recipient.call(empty.views.rewards, "withdrawTo", ZERO_ADDRESS, empty.stranger.address)
    assert empty.balance(empty.deployment.rewards) == 0


@pytest.mark.parametrize("function", ["claimTo", "withdrawTo", "distribute"])
def test_a_token_that_calls_back_gets_nothing_twice(empty: World, function: str) -> None:
    """The token's contract is called while the reward is on its way, and calls the contract that sends it."""
    token = funded(empty, "OddToken")
    empty.form(empty.cohort, token=token.address)
    empty.publish_block()
    empty.reveal_accuracy()
    empty.reveal_scores()
    empty.distribute()
    arguments = {
        "claimTo": (TASK, token.address, empty.stranger.address, NO_OPENING),
        "withdrawTo": (token.address, empty.stranger.address),
        "distribute": (TASK,),
    }
    again = empty.views.rewards._encode(function, *arguments[function])
    behave(empty, token, CALL_BACK, empty.deployment.rewards, again)
    before = token.balance_of(empty.deployment.rewards)
    with pytest.raises(Reverted, match="ReentrancyGuardReentrantCall"):
        empty.claim(empty.cohort[0], token=token.address)
    with pytest.raises(Reverted, match="ReentrancyGuardReentrantCall"):
        empty.withdraw(empty.aggregator, token=token.address)
    assert token.balance_of(empty.deployment.rewards) == before == REWARD


@pytest.mark.parametrize("manner", [REFUSE, REENTER])
def test_a_staker_that_misbehaves_gets_its_stake_once_or_not_at_all(empty: World, manner: int) -> None:
    recipient = Recipient(empty, value=100)
    stakes = empty.views.stakes
    recipient.call(stakes, "depositStake", value=100)
    empty.deposit(empty.miners[:1], [1000])
    recipient.call(stakes, "requestWithdrawal", 60)
    recipient.behave(manner, stakes._encode("withdrawStake", recipient.address))
    empty.at(empty.now() + DELAY + 1)
    if manner == REFUSE:
        with pytest.raises(Reverted, match="TransferFailed"):
            recipient.call(stakes, "withdrawStake", recipient.address)
        assert stakes.get_withdrawal(recipient.address).amount_wei == 60
    else:
        recipient.call(stakes, "withdrawStake", recipient.address)
        assert not recipient.has_reentered
        assert empty.balance(recipient.address) == 60
    assert stakes.stake_of(recipient.address) == 40
    assert empty.balance(stakes.address) == 1040 + stakes.get_withdrawal(recipient.address).amount_wei


@pytest.mark.parametrize("function", ["withdrawCredit", "withdrawStake"])
def test_credit_sent_to_a_contract_that_calls_back_is_sent_once(drawn: World, function: str) -> None:
    recipient, former, miner = Recipient(drawn), drawn.aggregator, drawn.others[0]
    drawn.at(drawn.views.stakes.get_draw(TASK).turn_end_s + 1)
    stakes = drawn.as_(miner).stakes
    stakes.replace_aggregator(TASK)
    stakes.credit_slashed(TASK, former.address, Offence.SILENCE, miner.address)
    credit, before = stakes.credit_of(miner.address), drawn.balance(recipient.address)
    assert credit > 0
    recipient.behave(REENTER, stakes._encode(function, recipient.address))
    stakes.withdraw_credit(recipient.address)
    assert not recipient.has_reentered
    assert drawn.balance(recipient.address) == before + credit


@pytest.mark.filterwarnings("ignore:SELFDESTRUCT:DeprecationWarning")
def test_ether_forced_into_a_contract_belongs_to_nobody_and_disturbs_nothing(published: World) -> None:
    """A contract destroyed at its creation sends its value without being asked."""
    published.at(published.now() + PUBLISHER_WINDOW // 2)
    for target in published.deployment.addresses:
        code = bytes.fromhex("73" + target[2:] + "ff")  # PUSH20 target SELFDESTRUCT
        Sender(published.web3, published.stranger).send(code, to=None, value_wei=5)
        assert published.balance(target) >= 5
    published.reveal_accuracy()
    published.reveal_scores()
    published.distribute()
    for miner in published.cohort:
        published.claim(miner)
    published.withdraw(published.aggregator)
    assert published.balance(published.deployment.escrow) == 5
    assert published.balance(published.deployment.rewards) == 5
