"""The money over random histories: each contract holds exactly what it owes, and in the end everything leaves.

Beside the chain runs a model of every wei, written from the rules: who has which stake and credit, what which task
recorded of it, what was taken from whom and is not yet divided, which reward is where, and what is left of a pool after
each claim. Whether an act is accepted the contracts say; what it moves the model says first. Steps that the contracts
refuse change nothing.
"""

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from eth_account.signers.local import LocalAccount
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from contracts.bindings import Contracts, Offence, Outcome, StakeSlashed, Status
from contracts.contributions import Opening
from contracts.messages import ZERO_ADDRESS, Address, Candidate, accuracy_commit, score_commit, sign
from contracts.sending import Reverted
from tests.contracts.tokens import funded
from tests.contracts.world import ACCURACY, DELAY, PENALTY_PPM, SALT, World, salt_of

TASKS = ("first", "second")
PPM = 1_000_000
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


@dataclass
class Pot:
    """One task's money: in the escrow until it is distributed or refunded, then what the participants have not claimed."""

    reward: int
    share_ppm: int
    token: Address
    cohort: list[LocalAccount]
    stakes: dict[Address, int]
    escrowed: int = 0
    aggregator: Address = ""
    is_unmet: bool = False
    is_forfeited: bool = False
    scores: dict[Address, int] = field(default_factory=dict)
    remaining: int = 0
    parts: dict[Address, int] = field(default_factory=dict)
    # The last second in which its stakes can be taken.
    latest_end: int = 0
    # What was taken from whom for what, who has not had its part yet, and how much is not divided yet.
    taken: dict[tuple[Address, Offence], int] = field(default_factory=dict)
    waiting: dict[tuple[Address, Offence], list[Address]] = field(default_factory=dict)
    undivided: int = 0

    def fill(self) -> int:
        """Distribute; the aggregator's share."""
        share = 0 if self.is_forfeited else self.reward * self.share_ppm // PPM
        self.remaining, self.escrowed = self.reward - share, 0
        members = [miner.address for miner in self.cohort]
        if sum(self.scores.values()):
            self.parts = {miner: self.scores.get(miner, 0) for miner in members}
        else:
            self.parts = {miner: int(miner in self.scores or not self.scores) for miner in members}
        return share

    def claim(self, miner: Address) -> int:
        part, total = self.parts[miner], sum(self.parts.values())
        paid = self.remaining * part // total if part else 0
        self.remaining -= paid
        del self.parts[miner]
        return paid


class Money(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = shared_world().stage("empty")
        self.token = funded(self.world, amount=10**12)
        self.miners = self.world.miners
        self.accounts = (self.world.publisher, *self.miners)
        self.stakes: Counter[Address] = Counter()
        # What left the stakes to be withdrawn.
        self.requested: Counter[Address] = Counter()
        # What is left of what tasks recorded, by miner and task, and until when all of it counts.
        self.recorded: dict[Address, dict[str, int]] = {miner.address: {} for miner in self.miners}
        self.held_until: Counter[Address] = Counter()
        self.credits: Counter[Address] = Counter()
        self.balances: Counter[tuple[Address, Address]] = Counter()
        self.pots: dict[str, Pot] = {}
        self.published: set[str] = set()

    def as_(self, account: LocalAccount) -> Contracts:
        return self.world.as_(account)

    def candidate(self, task: str, aggregator: Address, correct: int) -> Candidate:
        scores = {miner.address: score for miner, score in zip(self.miners, SCORES, strict=True)}
        cohort = self.pots[task].cohort
        commits = (score_commit(scores[miner.address], salt_of(miner), task, miner.address) for miner in cohort)
        return self.world.candidate(
            task,
            aggregator=aggregator,
            correct=correct,
            participants=tuple(miner.address for miner in cohort),
            score_commits=tuple(commits),
        )

    def turn(self, task: str) -> LocalAccount | None:
        address = self.world.views.stakes.aggregator_of(task)
        return next((miner for miner in self.miners if miner.address == address), None)

    # Stakes

    @rule(miner=MINERS, amount=st.integers(1, 10**6))
    def deposit(self, miner: int, amount: int) -> None:
        account = self.miners[miner]
        self.stakes[account.address] += amount
        event = self.as_(account).stakes.deposit_stake(amount_wei=amount).event
        assert event.stake_wei == self.stakes[account.address]

    @rule(miner=MINERS, share=st.integers(0, 4))
    def request_withdrawal(self, miner: int, share: int) -> None:
        account = self.miners[miner]
        address = account.address
        most = self.available(address) + self.requested[address]
        self.stakes[address] += self.requested[address] - most * share // 4
        self.requested[address] = most * share // 4
        self.as_(account).stakes.request_withdrawal(self.requested[address])

    @rule(miner=MINERS)
    def withdraw_stake_or_credit(self, miner: int) -> None:
        account = self.miners[miner]
        with suppress(Reverted):
            paid = self.as_(account).stakes.withdraw_credit().event.amount_wei
            assert paid == self.credits.pop(account.address)
        with suppress(Reverted):
            paid = self.as_(account).stakes.withdraw_stake().event.amount_wei
            assert paid == self.requested.pop(account.address)

    def available(self, miner: Address) -> int:
        """What no task holds, at the time of the next block."""
        is_held = self.world.now() + 1 <= self.held_until[miner]
        return self.stakes[miner] - (sum(self.recorded[miner].values()) if is_held else 0)

    def hold(self, task: str, stakes: dict[Address, int]) -> None:
        self.pots[task].latest_end = self.world.views.escrow.get_task(task).terms.deadline_s + 600
        for miner, stake in stakes.items():
            if self.world.now() > self.held_until[miner]:
                self.recorded[miner].clear()
            self.recorded[miner][task] = stake
            self.held_until[miner] = max(self.held_until[miner], self.pots[task].latest_end)

    @rule(data=st.data(), miner=MINERS)
    def release(self, data: st.DataObject, miner: int) -> None:
        self.released(self.some_task(data, self.pots), self.miners[miner])

    def released(self, task: str, account: LocalAccount) -> None:
        with suppress(Reverted, ValueError):
            event = self.as_(self.world.stranger).stakes.release_stake(task, account.address).event
            assert event.amount_wei == self.recorded[account.address].pop(task)
            assert self.pots[task].latest_end < self.world.now() <= self.held_until[account.address]

    def take(self, task: str, culprit: Address, offence: Offence, most: int) -> None:
        """Out of what the task recorded, for the other members to share."""
        pot, amount = self.pots[task], min(most, self.recorded[culprit][task])
        assert self.world.now() <= pot.latest_end
        self.stakes[culprit] -= amount
        self.recorded[culprit][task] -= amount
        pot.taken[culprit, offence] = amount
        pot.waiting[culprit, offence] = [miner.address for miner in pot.cohort if miner.address != culprit]
        pot.undivided += amount

    # A task: its steps in their order, each possibly left out

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        """In a purely random history most tasks miss their deadline: so most of these have their block at once."""
        self.publish_and_form(TASKS[0], data.draw(REWARDS), data.draw(SHARES), ZERO_ADDRESS)
        if data.draw(AT_ONCE, label="block at once"):
            self.publish_block(data, data.draw(CORRECT), data.draw(st.booleans()))

    @precondition(lambda self: len(self.pots) < len(TASKS))
    @rule(data=st.data(), is_in_tokens=st.booleans())
    def another(self, data: st.DataObject, is_in_tokens: bool) -> None:
        token = self.token.address if is_in_tokens else ZERO_ADDRESS
        self.publish_and_form(TASKS[1], data.draw(REWARDS), data.draw(SHARES), token, lasts_s=3000)
        if data.draw(AT_ONCE, label="block at once"):
            self.publish_block(data, data.draw(CORRECT), data.draw(st.booleans()))

    def publish_and_form(self, task: str, reward: int, share_ppm: int, token: Address, *, lasts_s: int = 1000) -> None:
        """Everybody with stake that is free joins, after a deposit that makes them enough."""
        terms: dict[str, Any] = {"aggregator_share_ppm": share_ppm, "min_stake_wei": 1, "max_miners": 4}
        terms["deadline_s"] = self.world.now() + lasts_s
        self.world.publish(task, reward=reward, token=token, **terms)
        for miner in range(3):
            self.deposit(miner, 1000)
        available = {m.address: self.available(m.address) for m in self.miners}
        cohort = [miner for miner in self.miners if available[miner.address]]
        self.pots[task] = Pot(reward, share_ppm, token, cohort, available, escrowed=reward)
        self.world.close_and_draw(cohort, task)
        recorded = self.world.views.stakes.get_cohort(task).stakes_wei
        assert list(recorded) == [available[miner.address] for miner in cohort]
        self.hold(task, {miner.address: available[miner.address] for miner in cohort})

    def some_task(self, data: st.DataObject, tasks: Iterable[str]) -> str:
        return data.draw(st.sampled_from(sorted(tasks)), label="task")

    @precondition(lambda self: self.pots.keys() - self.published)
    @rule(data=st.data(), correct=CORRECT, is_revealed=st.booleans())
    def publish_block(self, data: st.DataObject, correct: int, is_revealed: bool) -> None:
        task = self.some_task(data, self.pots.keys() - self.published)
        aggregator = self.turn(task)
        if aggregator is None:
            return
        voters = [miner for miner in self.pots[task].cohort if miner != aggregator]
        with suppress(Reverted):
            self.world.publish_block(self.candidate(task, aggregator.address, correct), voters)
            self.published.add(task)
            self.pots[task].aggregator = aggregator.address
        if is_revealed and task in self.published:
            self.reveal(task, self.world.publisher)

    @rule(data=st.data())
    def resign(self, data: st.DataObject) -> None:
        task = self.some_task(data, self.pots)
        if aggregator := self.turn(task):
            with suppress(Reverted):
                self.as_(aggregator).stakes.resign_aggregator(task)

    @rule(data=st.data())
    def replace(self, data: st.DataObject) -> None:
        task = self.some_task(data, self.pots)
        silent, pot = self.turn(task), self.pots[task]
        with suppress(Reverted):
            events = self.as_(self.world.stranger).stakes.replace_aggregator(task).events
            # A turn that was cut short, or is long over, costs nothing.
            if any(isinstance(event, StakeSlashed) for event in events):
                assert silent is not None
                part = pot.stakes[silent.address] * PENALTY_PPM // PPM
                self.take(task, silent.address, Offence.SILENCE, part)

    @rule(data=st.data())
    def equivocate(self, data: st.DataObject) -> None:
        task = self.some_task(data, self.pots)
        aggregator, pot = self.turn(task), self.pots[task]
        if aggregator is None:
            return
        pair = [self.candidate(task, aggregator.address, correct) for correct in (1, 2)]
        first, second = (sign(candidate, self.world.domain, aggregator.key) for candidate in pair)
        cohort = self.world.views.stakes.get_cohort(task)
        with suppress(Reverted):
            self.as_(self.world.stranger).publisher.report_equivocation(pair[0], first, pair[1], second, cohort)
            self.take(task, aggregator.address, Offence.EQUIVOCATION, pot.stakes[aggregator.address])

    @rule(data=st.data())
    def credit(self, data: st.DataObject) -> None:
        """One part of what was taken, if anything was: equal parts, the residue to the first in address order."""
        task = self.some_task(data, self.pots)
        for (culprit, offence), waiting in self.pots[task].waiting.items():
            if waiting:
                miner = waiting[data.draw(st.integers(0, len(waiting) - 1))]
                self.divide(task, culprit, offence, miner)
                return

    def divide(self, task: str, culprit: Address, offence: Offence, miner: Address) -> None:
        pot = self.pots[task]
        amount, others = pot.taken[culprit, offence], [m.address for m in pot.cohort if m.address != culprit]
        pot.waiting[culprit, offence].remove(miner)
        if amount == 0:
            return
        part = amount // len(others) + (amount % len(others) if miner == others[0] else 0)
        event = self.as_(self.world.stranger).stakes.credit_slashed(task, culprit, offence, miner).event
        assert (event.miner, event.amount_wei) == (miner, part)
        self.credits[miner] += part
        pot.undivided -= part

    def reveal(self, task: str, revealer: LocalAccount) -> None:
        with suppress(Reverted):
            event = self.as_(revealer).rewards.reveal_accuracy(task, ACCURACY, SALT).event
            self.pots[task].is_unmet = event.outcome is Outcome.UNMET

    @precondition(lambda self: self.published)
    @rule(data=st.data(), is_publisher=st.booleans())
    def reveal_accuracy(self, data: st.DataObject, is_publisher: bool) -> None:
        task = self.some_task(data, self.published)
        aggregator = next(m for m in self.miners if m.address == self.pots[task].aggregator)
        self.reveal(task, self.world.publisher if is_publisher else aggregator)

    @precondition(lambda self: self.published)
    @rule(data=st.data(), miners=st.sets(MINERS, min_size=1))
    def reveal_scores(self, data: st.DataObject, miners: set[int]) -> None:
        task = self.some_task(data, self.published)
        for i in sorted(miners):
            miner = self.miners[i]
            place = self.world.views.publisher.place_of(task, miner.address)
            with suppress(Reverted):
                if place is not None:
                    self.as_(miner).rewards.reveal_score(task, Opening(SCORES[i], salt_of(miner), place))
                    self.pots[task].scores[miner.address] = SCORES[i]

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def distribute(self, data: st.DataObject) -> None:
        with suppress(Reverted):
            self.distributed(self.some_task(data, self.published))

    def distributed(self, task: str) -> None:
        """Raises Reverted when it is too early, or done."""
        self.as_(self.world.stranger).rewards.distribute(task)
        pot = self.pots[task]
        if pot.is_unmet:
            self.balances[pot.token, self.world.publisher.address] += pot.escrowed
            pot.escrowed = 0
        else:
            pot.is_forfeited = self.world.views.rewards.get_settlement(task).is_share_forfeited
            self.balances[pot.token, pot.aggregator] += pot.fill()

    @rule(data=st.data())
    def refund(self, data: st.DataObject) -> None:
        task = self.some_task(data, self.pots)
        with suppress(Reverted):
            paid = self.as_(self.world.publisher).escrow.refund_publisher(task).event.amount_wei
            assert paid == self.pots[task].escrowed
            self.pots[task].escrowed = 0

    @rule(account=st.integers(0, 4), is_in_tokens=st.booleans())
    def withdraw(self, account: int, is_in_tokens: bool) -> None:
        """All open claims, which are rounded one after the other, and the balance."""
        who, token = self.accounts[account], self.token.address if is_in_tokens else ZERO_ADDRESS
        for task, pot in self.pots.items():
            # When the last part is claimed, those who have none find nothing left.
            if pot.token == token and who.address in pot.parts and sum(pot.parts.values()):
                score = SCORES[self.miners.index(who)]
                paid = self.world.claim(who, task, score=score, token=token).event.amount_wei
                assert paid == pot.claim(who.address)
        if owed := self.balances.pop((token, who.address), 0):
            assert self.world.withdraw(who, token=token).event.amount_wei == owed

    @rule(seconds=st.sampled_from([60, 110, 310, 1000]))
    def pass_time(self, seconds: int) -> None:
        self.world.at(self.world.now() + seconds)

    # What always holds

    @invariant()
    def each_contract_holds_what_it_owes(self) -> None:
        deployment = self.world.deployment
        for token, held in ((ZERO_ADDRESS, self.world.balance), (self.token.address, self.token.balance_of)):
            pots = [pot for pot in self.pots.values() if pot.token == token]
            owed = sum(amount for (kind, _), amount in self.balances.items() if kind == token)
            assert held(deployment.escrow) == sum(pot.escrowed for pot in pots)
            assert held(deployment.rewards) == owed + sum(pot.remaining for pot in pots)
        undivided = sum(pot.undivided for pot in self.pots.values())
        miners = self.stakes.total() + self.requested.total() + self.credits.total()
        assert self.world.balance(deployment.stakes) == miners + undivided
        assert self.world.balance(deployment.publisher) == 0

    def teardown(self) -> None:
        """Whatever happened, a few ordinary calls empty the contracts."""
        views = self.world.views
        for account in self.accounts:
            assert views.rewards.balance_of(account.address) == self.balances[ZERO_ADDRESS, account.address]
            assert views.stakes.stake_of(account.address) == self.stakes[account.address]
            assert views.stakes.credit_of(account.address) == self.credits[account.address]
            assert views.stakes.get_withdrawal(account.address).amount_wei == self.requested[account.address]
        for task in sorted(self.pots, key=lambda task: self.pots[task].latest_end):
            self.world.at(max(self.world.now(), self.pots[task].latest_end) + 1)
            for miner in self.pots[task].cohort:
                self.released(task, miner)
        self.world.at(self.world.now() + DELAY)
        for task, pot in self.pots.items():
            match views.escrow.get_task(task).status:
                case Status.LOCKED:
                    self.as_(self.world.publisher).escrow.refund_publisher(task)
                    pot.escrowed = 0
                case Status.PUBLISHED:
                    self.distributed(task)
            for (culprit, offence), waiting in pot.waiting.items():
                for miner in list(waiting):
                    self.divide(task, culprit, offence, miner)
        self.world.at(self.world.now() + DELAY)
        self.world.tester.mine_block()
        for miner in range(4):
            self.request_withdrawal(miner, 4)
        self.world.at(self.world.now() + DELAY)
        for account in range(5):
            self.withdraw(account, is_in_tokens=False)
            self.withdraw(account, is_in_tokens=True)
        for miner in range(4):
            self.withdraw_stake_or_credit(miner)
        self.each_contract_holds_what_it_owes()
        deployment = self.world.deployment
        assert [self.world.balance(address) for address in deployment.addresses] == [0, 0, 0, 0]
        assert self.token.balance_of(deployment.escrow) == self.token.balance_of(deployment.rewards) == 0


Money.TestCase.settings = settings(
    max_examples=8,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
TestMoney = Money.TestCase
