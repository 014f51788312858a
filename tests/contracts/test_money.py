"""The money over random histories: each contract holds exactly what it owes, and in the end everything leaves.

The model beside the chain is a ledger written from the events: rewards in the escrow, what RewardDistribution owes,
stakes and credits. Steps that the contracts refuse change nothing.
"""

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from functools import cache

from eth_account.signers.local import LocalAccount
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from contracts.bindings import (
    CreditAdded,
    CreditWithdrawn,
    Distributed,
    Mined,
    PublisherRefunded,
    RewardCredited,
    StakeDeposited,
    StakeSlashed,
    StakeWithdrawn,
    Status,
    TaskPublished,
    Withdrawn,
)
from contracts.messages import Candidate, accuracy_commit, score_commit, sign
from contracts.sending import Reverted
from tests.contracts.world import ACCURACY, DELAY, SALT, World, salt_of

TASKS = ("first", "second")
MINERS = st.integers(0, 3)
REWARDS = st.integers(1, 10**9)
AT_ONCE = st.sampled_from([True, True, False])
CORRECT = st.sampled_from([80, 79, 100])
SHARES = st.sampled_from([0, 333_333, 500_000])
COMMIT = accuracy_commit(ACCURACY, SALT)
SCORES = (7, 0, 10**9, 13)


@cache
def shared_world() -> World:
    return World(4)


class Money(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = shared_world().stage("empty")
        self.miners = self.world.miners
        self.escrowed: Counter[str] = Counter()
        self.owed: Counter[str] = Counter()
        self.stakes: Counter[str] = Counter()
        self.credits: Counter[str] = Counter()
        self.paid_in = self.paid_out = 0
        self.cohorts: dict[str, list[LocalAccount]] = {}
        self.published: set[str] = set()

    def record(self, mined: Mined) -> None:
        """Enter the events of a transaction into the ledger."""
        for event in mined.events:
            match event:
                case TaskPublished():
                    self.escrowed[event.task_key] += event.reward_wei
                    self.paid_in += event.reward_wei
                case PublisherRefunded():
                    assert event.amount_wei == self.escrowed.pop(event.task_key)
                    self.paid_out += event.amount_wei
                case RewardCredited():
                    self.owed[event.account] += event.amount_wei
                    self.escrowed[event.task_key] -= event.amount_wei
                case Distributed():
                    assert self.escrowed[event.task_key] == 0
                case Withdrawn():
                    assert event.amount_wei == self.owed.pop(event.account)
                    self.paid_out += event.amount_wei
                case StakeDeposited():
                    self.stakes[event.miner] += event.amount_wei
                    self.paid_in += event.amount_wei
                case StakeWithdrawn():
                    self.stakes[event.miner] -= event.amount_wei
                    self.paid_out += event.amount_wei
                case StakeSlashed():
                    self.stakes[event.aggregator] -= event.amount_wei
                case CreditAdded():
                    self.credits[event.miner] += event.amount_wei
                case CreditWithdrawn():
                    assert event.amount_wei == self.credits.pop(event.miner)
                    self.paid_out += event.amount_wei

    def as_(self, account: LocalAccount):
        return self.world.as_(account)

    def aggregator_of(self, task: str) -> LocalAccount:
        address = self.world.views.stakes.aggregator_of(task)
        return next(miner for miner in self.miners if miner.address == address)

    def candidate(self, task: str, aggregator: LocalAccount, correct: int) -> Candidate:
        cohort = tuple(miner.address for miner in self.cohorts[task])
        salts = {miner.address: salt_of(miner) for miner in self.miners}
        scores = {miner.address: score for miner, score in zip(self.miners, SCORES, strict=True)}
        return Candidate(
            task_id=task,
            round_number=1,
            model_sha256="0x" + "ab" * 32,
            model_uri="s3://model",
            correct=correct,
            total=100,
            aggregator=aggregator.address,
            participants=cohort,
            score_commits=tuple(score_commit(scores[miner], salts[miner], task, miner) for miner in cohort),
            opening_sha256="0x" + "cd" * 32,
        )

    # Stakes

    @rule(miner=MINERS, amount=st.integers(1, 10**6))
    def deposit(self, miner: int, amount: int) -> None:
        self.record(self.as_(self.miners[miner]).stakes.deposit_stake(amount_wei=amount))

    @rule(miner=MINERS, share=st.integers(0, 4))
    def request_withdrawal(self, miner: int, share: int) -> None:
        account = self.miners[miner]
        self.as_(account).stakes.request_withdrawal(self.stakes[account.address] * share // 4)

    @rule(miner=MINERS)
    def withdraw_stake_or_credit(self, miner: int) -> None:
        stakes = self.as_(self.miners[miner]).stakes
        with suppress(Reverted):
            self.record(stakes.withdraw_credit())
        with suppress(Reverted):
            self.record(stakes.withdraw_stake())

    # A task: its steps in their order, each possibly left out

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        """In a purely random history most tasks miss their deadline: so most of these have their block at once."""
        self.publish_and_form(TASKS[0], data.draw(REWARDS), data.draw(SHARES))
        if data.draw(AT_ONCE, label="block at once"):
            self.publish_block(data, data.draw(CORRECT), data.draw(st.booleans()))

    @precondition(lambda self: len(self.cohorts) < len(TASKS))
    @rule(data=st.data())
    def another(self, data: st.DataObject) -> None:
        self.publish_and_form(TASKS[1], data.draw(REWARDS), data.draw(SHARES))
        if data.draw(AT_ONCE, label="block at once"):
            self.publish_block(data, data.draw(CORRECT), data.draw(st.booleans()))

    def publish_and_form(self, task: str, reward: int, share_ppm: int) -> None:
        """Everybody with stake joins, after a deposit that makes them enough."""
        terms = self.world.terms(aggregator_share_ppm=share_ppm, min_stake_wei=1, max_miners=4)
        escrow = self.as_(self.world.publisher).escrow
        self.record(escrow.publish_task(task, COMMIT, "0x" + "ef" * 32, terms, reward_wei=reward))
        for miner in self.miners[:3]:
            self.record(self.as_(miner).stakes.deposit_stake(amount_wei=1000))
        self.cohorts[task] = [m for m in self.miners if self.world.views.stakes.available_stake(m.address) > 0]
        self.world.register(self.cohorts[task], task)
        self.world.close_and_draw(self.cohorts[task], task)

    def some_task(self, data: st.DataObject, tasks: Iterable[str]) -> str:
        return data.draw(st.sampled_from(sorted(tasks)), label="task")

    @precondition(lambda self: self.cohorts.keys() - self.published)
    @rule(data=st.data(), correct=CORRECT, is_revealed=st.booleans())
    def publish_block(self, data: st.DataObject, correct: int, is_revealed: bool) -> None:
        task = self.some_task(data, self.cohorts.keys() - self.published)
        aggregator = self.aggregator_of(task)
        candidate = self.candidate(task, aggregator, correct)
        voters = [miner for miner in self.cohorts[task] if miner != aggregator]
        with suppress(Reverted):
            self.as_(aggregator).publisher.publish_block(candidate, self.world.votes(candidate, voters))
            self.published.add(task)
        if is_revealed and task in self.published:
            self.record(self.as_(self.world.publisher).rewards.reveal_accuracy(task, ACCURACY, SALT))

    @rule(data=st.data())
    def equivocate(self, data: st.DataObject) -> None:
        task = self.some_task(data, self.cohorts)
        aggregator = self.aggregator_of(task)
        pair = [self.candidate(task, aggregator, correct) for correct in (1, 2)]
        first, second = (sign(candidate, self.world.domain, aggregator.key) for candidate in pair)
        with suppress(Reverted):
            self.record(self.as_(self.world.stranger).publisher.report_equivocation(pair[0], first, pair[1], second))

    @precondition(lambda self: self.published)
    @rule(data=st.data(), is_publisher=st.booleans())
    def reveal_accuracy(self, data: st.DataObject, is_publisher: bool) -> None:
        task = self.some_task(data, self.published)
        revealer = self.world.publisher if is_publisher else self.aggregator_of(task)
        with suppress(Reverted):
            self.record(self.as_(revealer).rewards.reveal_accuracy(task, ACCURACY, SALT))

    @precondition(lambda self: self.published)
    @rule(data=st.data(), miners=st.sets(MINERS, min_size=1))
    def reveal_scores(self, data: st.DataObject, miners: set[int]) -> None:
        task = self.some_task(data, self.published)
        for miner in sorted(miners):
            with suppress(Reverted):
                account = self.miners[miner]
                self.record(self.as_(account).rewards.reveal_score(task, SCORES[miner], salt_of(account)))

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def distribute(self, data: st.DataObject) -> None:
        with suppress(Reverted):
            task = self.some_task(data, self.published)
            self.record(self.as_(self.world.stranger).rewards.distribute(task))

    @rule(data=st.data())
    def refund(self, data: st.DataObject) -> None:
        with suppress(Reverted):
            self.record(self.as_(self.world.publisher).escrow.refund_publisher(self.some_task(data, self.cohorts)))

    @precondition(lambda self: sum(self.owed.values()))
    @rule(miner=st.integers(-1, 3))
    def withdraw(self, miner: int) -> None:
        account = self.world.publisher if miner < 0 else self.miners[miner]
        with suppress(Reverted):
            self.record(self.as_(account).rewards.withdraw())

    @rule(seconds=st.sampled_from([60, 110, 310]))
    def pass_time(self, seconds: int) -> None:
        self.world.at(self.world.now() + seconds)

    # What always holds

    @invariant()
    def each_contract_holds_what_it_owes(self) -> None:
        deployment = self.world.deployment
        assert self.world.balance(deployment.escrow) == sum(self.escrowed.values())
        assert self.world.balance(deployment.rewards) == sum(self.owed.values())
        assert self.world.balance(deployment.stakes) == sum(self.stakes.values()) + sum(self.credits.values())
        assert self.world.balance(deployment.publisher) == 0

    def teardown(self) -> None:
        """Whatever happened, a few ordinary calls empty the contracts."""
        rewards, stakes = self.world.views.rewards, self.world.views.stakes
        for account in (self.world.publisher, *self.miners):
            assert rewards.balance_of(account.address) == self.owed[account.address]
            assert stakes.stake_of(account.address) == self.stakes[account.address]
            assert stakes.credit_of(account.address) == self.credits[account.address]
        for miner in self.miners:
            self.as_(miner).stakes.request_withdrawal(self.stakes[miner.address])
        self.world.at(self.world.now() + 10 * DELAY)
        for task in self.cohorts:
            match self.world.views.escrow.get_task(task).status:
                case Status.LOCKED:
                    self.record(self.as_(self.world.publisher).escrow.refund_publisher(task))
                case Status.PUBLISHED:
                    self.record(self.as_(self.world.stranger).rewards.distribute(task))
        for account in (self.world.publisher, *self.miners):
            self.withdraw(self.miners.index(account) if account in self.miners else -1)
        for miner in range(4):
            self.withdraw_stake_or_credit(miner)
        self.each_contract_holds_what_it_owes()
        assert [self.world.balance(address) for address in self.world.deployment.addresses] == [0, 0, 0, 0]
        assert self.paid_in == self.paid_out


Money.TestCase.settings = settings(
    max_examples=8,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
TestMoney = Money.TestCase
