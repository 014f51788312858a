"""RewardDistribution: every path of the money after a block, to the wei and to the second."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
from eth_account.signers.local import LocalAccount

from contracts.bindings import (
    ZERO_ADDRESS,
    Distributed,
    Outcome,
    RewardClaimed,
    RewardCredited,
    Score,
    ScoresOpened,
    Status,
    task_key,
)
from contracts.contributions import Opening, Place
from contracts.messages import accuracy_commit, score_commit
from contracts.sending import Reverted
from tests.contracts.tokens import ANSWER_FALSE, SEND, behave, funded
from tests.contracts.world import (
    ACCURACY,
    AGGREGATOR_WINDOW,
    PUBLISHER_WINDOW,
    REWARD,
    SALT,
    SCORE_WINDOW,
    SPEC,
    TASK,
    World,
    salt_of,
)

SHARE = REWARD * 100_000 // 1_000_000


def published_at(world: World) -> int:
    meta = world.views.publisher.get_block_meta(TASK)
    assert meta is not None
    return meta.published_at_s


def silence_end(world: World) -> int:
    return published_at(world) + PUBLISHER_WINDOW + AGGREGATOR_WINDOW


def balances(world: World) -> dict[str, int]:
    """What accounts can withdraw beside their claims."""
    accounts = (world.publisher, *world.miners)
    found = {account.address: world.views.rewards.balance_of(account.address) for account in accounts}
    return {account: amount for account, amount in found.items() if amount}


def payments(world: World, *order: LocalAccount, scores: Mapping[str, int] | None = None) -> dict[str, int]:
    """What everybody is paid for its claim, in this order or that of addresses, and of its balance."""
    paid: Counter[str] = Counter()
    scores = scores or world.scores()
    for miner in order or world.cohort:
        score = scores[miner.address]
        if world.views.rewards.claimable(TASK, world.miners.index(miner), score):
            paid[miner.address] += world.claim(miner, score=score).event.amount_wei
    for account in balances(world):
        owner = next(one for one in (world.publisher, *world.miners) if one.address == account)
        paid[account] += world.withdraw(owner).event.amount_wei
    return {account: amount for account, amount in paid.items() if amount}


def expected_payments(
    reward: int, parts: Mapping[str, int], aggregator: str, *, is_share_forfeited: bool = False
) -> dict[str, int]:
    """The rule, written once more: parts in the order of claims, out of what is left of reward and parts."""
    share = 0 if is_share_forfeited else reward * 100_000 // 1_000_000
    remaining, left = reward - share, sum(parts.values())
    paid = {}
    for miner, part in parts.items():
        paid[miner] = remaining * part // left if part else 0
        remaining, left = remaining - paid[miner], left - part
    assert (remaining, left) == (0, 0)
    paid[aggregator] = paid.get(aggregator, 0) + share
    return {miner: amount for miner, amount in paid.items() if amount}


def all_is_paid(world: World) -> bool:
    return [world.balance(address) for address in (world.deployment.rewards, world.deployment.escrow)] == [0, 0]


# The accuracy


def test_a_met_requirement_opens_the_scores(published: World) -> None:
    event = published.as_(published.publisher).rewards.reveal_accuracy(TASK, ACCURACY, SALT).event
    assert (event.revealer, event.accuracy_ppm, event.outcome) == (published.publisher.address, ACCURACY, Outcome.MET)
    assert event.score_reveal_end_s == published.now() + SCORE_WINDOW
    settlement = published.views.rewards.get_settlement(TASK)
    assert (settlement.outcome, settlement.is_share_forfeited, settlement.is_distributed) == (Outcome.MET, False, False)
    assert settlement.publisher_reveal_end_s == published_at(published) + PUBLISHER_WINDOW
    assert settlement.aggregator_reveal_end_s == silence_end(published)
    assert published.views.escrow.get_task(TASK).status is Status.PUBLISHED


def test_an_unmet_requirement_pays_the_publisher_back(drawn: World) -> None:
    drawn.publish_block(drawn.candidate(correct=79))
    mined = drawn.as_(drawn.publisher).rewards.reveal_accuracy(TASK, ACCURACY, SALT)
    assert (mined.event.outcome, mined.event.score_reveal_end_s) == (Outcome.UNMET, 0)
    with pytest.raises(Reverted, match="RequirementUnmet") as refused:
        drawn.reveal_score(drawn.cohort[0])
    assert refused.value.arguments == (TASK,)
    with pytest.raises(Reverted, match="RequirementUnmet"):
        drawn.as_(drawn.stranger).rewards.open_scores(TASK)

    distributed = drawn.as_(drawn.stranger).rewards.distribute(TASK)
    key = task_key(TASK)
    assert distributed.event.amount_wei == REWARD
    assert RewardCredited(key, drawn.publisher.address, ZERO_ADDRESS, REWARD) in distributed.events
    assert not any(isinstance(event, Distributed) for event in distributed.events)
    assert balances(drawn) == {drawn.publisher.address: REWARD}
    assert drawn.views.escrow.get_task(TASK).status is Status.SETTLED
    for i, miner in enumerate(drawn.cohort):
        assert drawn.views.rewards.claimable(TASK, i, drawn.scores()[miner.address]) == 0
        with pytest.raises(Reverted, match="NotDistributed"):
            drawn.claim(miner)
    with pytest.raises(Reverted, match="AlreadyDistributed"):
        drawn.as_(drawn.stranger).rewards.distribute(TASK)
    assert drawn.withdraw(drawn.publisher).event.amount_wei == REWARD
    assert all_is_paid(drawn)


@pytest.mark.parametrize(
    ("correct", "total", "outcome"),
    [(80, 100, Outcome.MET), (799_999, 1_000_000, Outcome.UNMET), (4, 5, Outcome.MET), (3, 4, Outcome.UNMET)],
)
def test_the_requirement_is_met_exactly(drawn: World, correct: int, total: int, outcome: Outcome) -> None:
    drawn.publish_block(drawn.candidate(correct=correct, total=total))
    drawn.reveal_accuracy()
    assert drawn.views.rewards.get_settlement(TASK).outcome is outcome


def test_the_aggregator_reveals_when_the_publisher_is_silent(published: World) -> None:
    published.at(published_at(published) + PUBLISHER_WINDOW + 1)
    event = published.as_(published.aggregator).rewards.reveal_accuracy(TASK, ACCURACY, SALT).event
    assert (event.revealer, event.outcome) == (published.aggregator.address, Outcome.MET)
    assert not published.views.rewards.get_settlement(TASK).is_share_forfeited


def test_the_aggregator_reveals_an_unmet_requirement_too(drawn: World) -> None:
    drawn.publish_block(drawn.candidate(correct=79))
    drawn.at(published_at(drawn) + PUBLISHER_WINDOW + 1)
    drawn.as_(drawn.aggregator).rewards.reveal_accuracy(TASK, ACCURACY, SALT)
    drawn.as_(drawn.stranger).rewards.distribute(TASK)
    assert balances(drawn) == {drawn.publisher.address: REWARD}


def test_the_windows_of_publisher_and_aggregator_do_not_overlap(published: World) -> None:
    publisher, aggregator = published.as_(published.publisher).rewards, published.as_(published.aggregator).rewards
    end = published_at(published) + PUBLISHER_WINDOW
    snapshot = published.tester.take_snapshot()
    published.at(end)
    with pytest.raises(Reverted, match="RevealTooEarly"):
        aggregator.reveal_accuracy(TASK, ACCURACY, SALT)
    publisher.reveal_accuracy(TASK, ACCURACY, SALT)

    published.go_back(snapshot)
    published.at(end + 1)
    with pytest.raises(Reverted, match="RevealTooLate"):
        publisher.reveal_accuracy(TASK, ACCURACY, SALT)
    published.at(silence_end(published))
    aggregator.reveal_accuracy(TASK, ACCURACY, SALT)

    published.go_back(snapshot)
    published.at(silence_end(published) + 1)
    for rewards in (publisher, aggregator):
        with pytest.raises(Reverted, match="RevealTooLate"):
            rewards.reveal_accuracy(TASK, ACCURACY, SALT)


def test_nobody_else_reveals_the_accuracy(published: World) -> None:
    for account in (published.stranger, *published.others):
        with pytest.raises(Reverted, match="NotEntitled"):
            published.as_(account).rewards.reveal_accuracy(TASK, ACCURACY, SALT)


def test_the_accuracy_is_the_committed_one(published: World) -> None:
    rewards = published.as_(published.publisher).rewards
    for accuracy, salt in ((ACCURACY + 1, SALT), (ACCURACY, b"\1" * 32), (999_999, SALT)):
        with pytest.raises(Reverted, match="InvalidReveal"):
            rewards.reveal_accuracy(TASK, accuracy, salt)
    rewards.reveal_accuracy(TASK, ACCURACY, SALT)


def test_the_accuracy_is_revealed_once(published: World) -> None:
    published.reveal_accuracy()
    with pytest.raises(Reverted, match="AccuracyAlreadyRevealed"):
        published.reveal_accuracy()


def test_nothing_is_revealed_before_a_block(drawn: World) -> None:
    with pytest.raises(Reverted, match="NoBlock"):
        drawn.reveal_accuracy()
    rewards = drawn.as_(drawn.stranger).rewards
    with pytest.raises(Reverted, match="NoBlock"):
        rewards.reveal_score(TASK, Opening(1000, SALT, Place(0, SPEC, ())))
    for call in (rewards.distribute, rewards.open_scores, rewards.get_settlement):
        with pytest.raises(Reverted, match="NoBlock"):
            call(TASK)


@pytest.mark.parametrize("accuracy", [1_000_001, 2**255])
def test_an_impossible_accuracy_never_refunds_the_publisher(empty: World, accuracy: int) -> None:
    """The commitment is opaque at publication; what is in it comes out here."""
    empty.as_(empty.publisher).escrow.publish_task(
        TASK, accuracy_commit(accuracy, SALT), SPEC, empty.terms(), reward_wei=REWARD
    )
    empty.deposit(empty.cohort, [10] * 4)
    empty.close_and_draw(empty.cohort)
    empty.publish_block()
    with pytest.raises(Reverted, match="InvalidReveal"):
        empty.reveal_accuracy(accuracy)
    # The aggregator, who was given it, proves the bad faith and keeps its share.
    empty.at(published_at(empty) + PUBLISHER_WINDOW + 1)
    event = empty.as_(empty.aggregator).rewards.reveal_accuracy(TASK, accuracy, SALT).event
    assert event.outcome is Outcome.MET
    assert not empty.views.rewards.get_settlement(TASK).is_share_forfeited


def test_the_best_possible_accuracy_can_be_required(empty: World) -> None:
    empty.form(empty.cohort, accuracy_ppm=1_000_000)
    empty.publish_block()
    empty.reveal_accuracy(1_000_000)
    assert empty.views.rewards.get_settlement(TASK).outcome is Outcome.UNMET


# Silence


def test_silence_counts_as_met_and_costs_the_aggregator_its_share(published: World) -> None:
    end = silence_end(published)
    rewards = published.as_(published.stranger).rewards
    published.at(end)
    with pytest.raises(Reverted, match="OutcomePending") as refused:
        rewards.open_scores(TASK)
    assert refused.value.arguments == (end, end)
    published.at(end + 1)
    assert rewards.open_scores(TASK).event.score_reveal_end_s == end + SCORE_WINDOW
    with pytest.raises(Reverted, match="ScoresAlreadyOpen"):
        rewards.open_scores(TASK)
    settlement = published.views.rewards.get_settlement(TASK)
    assert (settlement.outcome, settlement.is_share_forfeited) == (Outcome.MET, True)
    with pytest.raises(Reverted, match="AccuracyAlreadyRevealed"):
        published.as_(published.aggregator).rewards.reveal_accuracy(TASK, ACCURACY, SALT)

    published.reveal_scores()
    event = published.distribute()
    assert (event.aggregator_share_wei, event.pool_wei) == (0, REWARD)
    expected = expected_payments(REWARD, published.scores(), published.aggregator.address, is_share_forfeited=True)
    assert payments(published) == expected
    assert all_is_paid(published)


def test_after_silence_the_window_is_fixed_whoever_acts_first(published: World) -> None:
    """The first reveal records the silence; whether it comes early or late, the end stays."""
    end = silence_end(published) + SCORE_WINDOW
    published.at(silence_end(published) + 1)
    second = published.cohort[1]
    mined = published.as_(second).rewards.reveal_score(TASK, published.opening(second))
    assert ScoresOpened(mined.event.task_key, end) in mined.events
    published.at(end)
    published.reveal_score(published.cohort[2])
    published.at(end + 1)
    with pytest.raises(Reverted, match="RevealTooLate") as refused:
        published.reveal_score(published.cohort[3])
    assert refused.value.arguments == (end, end + 1)


def test_the_settlement_shows_silence_before_anybody_records_it(published: World) -> None:
    pending = published.views.rewards.get_settlement(TASK)
    assert (pending.outcome, pending.score_reveal_end_s) == (Outcome.PENDING, 0)
    published.at(silence_end(published) + 2)
    published.tester.mine_block()
    settlement = published.views.rewards.get_settlement(TASK)
    assert (settlement.outcome, settlement.is_share_forfeited) == (Outcome.MET, True)
    assert settlement.score_reveal_end_s == silence_end(published) + SCORE_WINDOW


def test_when_everybody_is_silent_the_participants_share_equally(published: World) -> None:
    published.at(silence_end(published) + SCORE_WINDOW + 1)
    event = published.distribute()
    assert (event.pool_wei, event.parts) == (REWARD, 4)
    equal = {miner.address: 1 for miner in published.cohort}
    expected = expected_payments(REWARD, equal, published.aggregator.address, is_share_forfeited=True)
    assert payments(published) == expected
    assert all_is_paid(published)


# Scores and distribution


def test_the_reward_is_split_by_score_to_the_wei(opened: World) -> None:
    opened.reveal_scores()
    scores, aggregator = opened.scores(), opened.aggregator.address
    settlement = opened.views.rewards.get_settlement(TASK)
    assert (settlement.revealed_count, settlement.score_sum, settlement.participant_count) == (
        4,
        sum(scores.values()),
        4,
    )
    assert (settlement.remaining, settlement.remaining_parts) == (0, 0)
    # All have revealed: nobody has to wait for the window.
    mined = opened.as_(opened.stranger).rewards.distribute(TASK)
    total = sum(scores.values())
    assert Distributed(task_key(TASK), aggregator, REWARD, SHARE, REWARD - SHARE, total) in mined.events
    assert RewardCredited(task_key(TASK), aggregator, ZERO_ADDRESS, SHARE) in mined.events
    assert balances(opened) == {aggregator: SHARE}
    assert opened.views.escrow.get_task(TASK).status is Status.SETTLED
    settlement = opened.views.rewards.get_settlement(TASK)
    assert (settlement.is_distributed, settlement.remaining, settlement.remaining_parts) == (
        True,
        REWARD - SHARE,
        total,
    )
    expected = expected_payments(REWARD, scores, aggregator)
    assert sum(expected.values()) == REWARD
    assert payments(opened) == expected
    assert all_is_paid(opened)


@pytest.mark.parametrize("order", list(permutations(range(4)))[::5])
def test_claims_are_rounded_in_their_order_and_leave_nothing(paid: World, order: tuple[int, ...]) -> None:
    miners = [paid.cohort[i] for i in order]
    scores = {miner.address: paid.scores()[miner.address] for miner in miners}
    assert payments(paid, *miners) == expected_payments(REWARD, scores, paid.aggregator.address)
    assert all_is_paid(paid)


def test_no_order_of_claims_moves_more_than_a_wei_for_each_claim(paid: World) -> None:
    exact = {miner: (REWARD - SHARE) * score / sum(paid.scores().values()) for miner, score in paid.scores().items()}
    for order in permutations(paid.cohort):
        scores = {miner.address: paid.scores()[miner.address] for miner in order}
        found = expected_payments(REWARD - SHARE, scores, paid.aggregator.address, is_share_forfeited=True)
        assert all(abs(found[miner] - exact[miner]) < len(order) for miner in found)


def test_what_can_be_claimed_is_what_is_paid(paid: World) -> None:
    for i, miner in enumerate(paid.cohort):
        score = paid.scores()[miner.address]
        announced = paid.views.rewards.claimable(TASK, i, score)
        event = paid.claim(miner).event
        assert event == RewardClaimed(task_key(TASK), miner.address, miner.address, ZERO_ADDRESS, announced)
        assert announced > 0
        assert paid.views.rewards.claimable(TASK, i, score) == 0
        assert paid.views.rewards.get_score(TASK, i) == Score(True, score, True)
    assert paid.views.rewards.claimable(TASK, 4, 1000) == 0
    assert paid.withdraw(paid.aggregator).event.amount_wei == SHARE
    assert all_is_paid(paid)


def test_an_unrevealed_score_earns_nothing(opened: World) -> None:
    for miner in opened.cohort[1:3]:
        opened.reveal_score(miner)
    end = opened.views.rewards.get_settlement(TASK).score_reveal_end_s
    opened.at(end)
    with pytest.raises(Reverted, match="ScoresStillOpen") as refused:
        opened.as_(opened.stranger).rewards.distribute(TASK)
    assert refused.value.arguments == (end, end)
    opened.at(end + 1)
    opened.distribute()
    scores = {miner.address: opened.scores()[miner.address] for miner in opened.cohort[1:3]}
    silent = next(miner for miner in (opened.cohort[0], opened.cohort[3]) if miner != opened.aggregator)
    assert opened.views.rewards.get_score(TASK, opened.cohort.index(silent)) == Score(False, 0, False)
    assert opened.claim(silent).event.amount_wei == 0
    assert opened.views.rewards.get_score(TASK, opened.cohort.index(silent)) == Score(False, 0, True)
    assert payments(opened) == expected_payments(REWARD, scores, opened.aggregator.address)
    assert all_is_paid(opened)


def test_when_nobody_reveals_a_score_the_participants_share_equally(opened: World) -> None:
    opened.at(opened.now() + SCORE_WINDOW + 1)
    opened.distribute()
    equal = {miner.address: 1 for miner in opened.cohort}
    assert payments(opened) == expected_payments(REWARD, equal, opened.aggregator.address)
    assert all_is_paid(opened)


@pytest.mark.parametrize("revealing", [4, 2])
def test_zero_scores_share_equally_among_those_who_revealed(drawn: World, revealing: int) -> None:
    commits = tuple(score_commit(0, salt_of(miner), TASK, miner.address) for miner in drawn.cohort)
    drawn.publish_block(drawn.candidate(score_commits=commits))
    drawn.reveal_accuracy()
    chosen = drawn.cohort[4 - revealing :]
    for miner in chosen:
        drawn.reveal_score(miner, 0)
    drawn.at(drawn.now() + SCORE_WINDOW + 1)
    assert drawn.distribute().parts == revealing
    equal = {miner.address: 1 for miner in chosen}
    zero = {miner.address: 0 for miner in drawn.cohort}
    assert payments(drawn, scores=zero) == expected_payments(REWARD, equal, drawn.aggregator.address)
    assert all_is_paid(drawn)


def test_a_reward_smaller_than_the_cohort_leaves_as_well(empty: World) -> None:
    empty.form(empty.cohort, reward=1)
    empty.publish_block()
    empty.at(silence_end(empty) + 1)
    for miner in empty.cohort[2:]:
        empty.reveal_score(miner)
    empty.at(silence_end(empty) + SCORE_WINDOW + 1)
    empty.distribute()
    # The first claim is rounded down to nothing, and counts; so the last takes what is left.
    second, last = empty.cohort[2], empty.cohort[3]
    scores = empty.scores()
    for i, miner in ((2, second), (3, last)):
        assert empty.views.rewards.claimable(TASK, i, scores[miner.address]) == 0
    assert empty.claim(second).event.amount_wei == 0
    assert payments(empty) == {last.address: 1}
    assert all_is_paid(empty)


def test_no_score_before_the_outcome(published: World) -> None:
    with pytest.raises(Reverted, match="OutcomePending"):
        published.reveal_score(published.cohort[0])
    with pytest.raises(Reverted, match="OutcomePending"):
        published.as_(published.stranger).rewards.distribute(TASK)


def test_a_score_is_revealed_until_the_window_ends(opened: World) -> None:
    end = opened.now() + SCORE_WINDOW
    opened.at(end)
    opened.reveal_score(opened.cohort[0])
    with pytest.raises(Reverted, match="RevealTooLate"):
        opened.reveal_score(opened.cohort[1])


def test_a_score_is_revealed_once(opened: World) -> None:
    assert opened.views.rewards.get_score(TASK, 0) == Score(False, 0, False)
    miner = opened.cohort[0]
    event = opened.as_(miner).rewards.reveal_score(TASK, opened.opening(miner)).event
    assert (event.miner, event.position, event.score) == (miner.address, 0, 1000)
    assert opened.views.rewards.get_score(TASK, 0) == Score(True, 1000, False)
    assert not opened.views.rewards.get_score(TASK, 1).is_revealed
    with pytest.raises(Reverted, match="ScoreAlreadyRevealed") as refused:
        opened.reveal_score(miner)
    assert refused.value.arguments == (TASK, miner.address)


def wrong_openings(own: Opening, other: Opening) -> list[Opening]:
    """What looks like the opening of one's own commitment and is not; `other` is another participant's."""
    place = own.place
    places = [
        replace(place, position=place.position ^ 1),
        replace(place, position=place.position + 4),
        replace(place, proof=place.proof[1:]),
        replace(place, proof=()),
        replace(place, proof=(*place.proof, SPEC)),
        other.place,
    ]
    values = [replace(own, score=own.score + 1), replace(own, salt=other.salt), other]
    return [*values, *(replace(own, place=wrong) for wrong in places)]


def test_a_score_is_the_committed_one_and_ones_own(opened: World) -> None:
    first, second, *_ = opened.cohort
    for opening in wrong_openings(opened.opening(first), opened.opening(second)):
        with pytest.raises(Reverted, match="NotParticipant") as refused:
            opened.as_(first).rewards.reveal_score(TASK, opening)
        assert refused.value.arguments == (TASK, first.address)
    opened.reveal_score(first)


def test_only_participants_reveal_scores_and_claim(drawn: World) -> None:
    full = drawn.candidate()
    absent = drawn.others[0]
    kept = [i for i, address in enumerate(full.participants) if address != absent.address]
    drawn.publish_block(
        drawn.candidate(
            participants=tuple(full.participants[i] for i in kept),
            score_commits=tuple(full.score_commits[i] for i in kept),
        )
    )
    drawn.reveal_accuracy()
    present = next(miner for miner in drawn.others if miner != absent)
    outsiders = (absent, drawn.publisher, drawn.stranger, drawn.miners[4])
    for account in outsiders:
        assert drawn.views.publisher.place_of(TASK, account.address) is None
        with pytest.raises(Reverted, match="NotParticipant"):
            drawn.as_(account).rewards.reveal_score(TASK, drawn.opening(present))
    drawn.at(drawn.now() + SCORE_WINDOW + 1)
    drawn.distribute()
    for account in outsiders:
        with pytest.raises(Reverted, match="NotParticipant") as refused:
            drawn.as_(account).rewards.claim_to(TASK, drawn.opening(present))
        assert refused.value.arguments == (TASK, account.address)


@pytest.mark.parametrize(("max_score", "is_valid"), [(1000, True), (999, False)])
def test_a_score_is_at_most_the_maximum(empty: World, max_score: int, is_valid: bool) -> None:
    empty.form(empty.cohort, max_score=max_score)
    empty.publish_block()
    empty.reveal_accuracy()
    if is_valid:
        empty.reveal_score(empty.cohort[0])
    else:
        with pytest.raises(Reverted, match="ScoreTooLarge") as refused:
            empty.reveal_score(empty.cohort[0])
        assert refused.value.arguments == (1000, 999)


@pytest.mark.parametrize("count", [4, 6])
def test_the_largest_scores_and_reward_fit(empty: World, count: int) -> None:
    """64 bits a score, 72 their sum; 88 bits of reward."""
    most, reward, miners = 2**64 - 1, 2**88 - 1, empty.miners[:count]
    empty.form(miners, max_score=most, reward=reward)
    scores = {miner.address: most - i for i, miner in enumerate(miners)}
    commits = tuple(score_commit(scores[miner.address], salt_of(miner), TASK, miner.address) for miner in miners)
    participants = tuple(miner.address for miner in miners)
    voters = [miner for miner in miners if miner != empty.aggregator]
    empty.publish_block(empty.candidate(participants=participants, score_commits=commits), voters)
    empty.reveal_accuracy()
    for miner in miners:
        empty.reveal_score(miner, scores[miner.address])
    assert [empty.views.rewards.get_score(TASK, i).score for i in range(count)] == list(scores.values())
    empty.distribute()
    assert payments(empty, *miners, scores=scores) == expected_payments(reward, scores, empty.aggregator.address)
    assert all_is_paid(empty)
    assert [empty.views.rewards.get_score(TASK, i) for i in range(count)] == [
        Score(True, score, True) for score in scores.values()
    ]


def test_a_reward_is_distributed_once(paid: World) -> None:
    with pytest.raises(Reverted, match="AlreadyDistributed") as refused:
        paid.as_(paid.stranger).rewards.distribute(TASK)
    assert refused.value.arguments == (TASK,)


# Claims and withdrawals


def test_everyone_claims_its_own_once(paid: World) -> None:
    miner = paid.others[0]
    balance = paid.balance(paid.deployment.rewards)
    amount = paid.claim(miner).event.amount_wei
    assert paid.balance(paid.deployment.rewards) == balance - amount
    with pytest.raises(Reverted, match="AlreadyClaimed") as refused:
        paid.claim(miner)
    assert refused.value.arguments == (TASK, miner.address)
    for account in (miner, paid.stranger):
        with pytest.raises(Reverted, match="NothingToWithdraw") as refused:
            paid.withdraw(account)
        assert refused.value.arguments == (account.address,)


def test_a_balance_is_withdrawn_once_and_apart_from_claims(paid: World) -> None:
    aggregator = paid.aggregator
    assert paid.withdraw(aggregator).event.amount_wei == SHARE
    with pytest.raises(Reverted, match="NothingToWithdraw"):
        paid.withdraw(aggregator)
    assert not paid.views.rewards.get_score(TASK, paid.cohort.index(aggregator)).is_claimed
    paid.claim(aggregator)


def test_a_claim_opens_the_committed_score_again(paid: World) -> None:
    """Scores are not stored: a larger one, or another salt, would take what is the others'."""
    miner, other = paid.others[:2]
    for opening in wrong_openings(paid.opening(miner), paid.opening(other)):
        with pytest.raises(Reverted, match="NotParticipant") as refused:
            paid.as_(miner).rewards.claim_to(TASK, opening)
        assert refused.value.arguments == (TASK, miner.address)
    with pytest.raises(Reverted, match="NotParticipant"):
        paid.as_(other).rewards.claim_to(TASK, paid.opening(miner))
    paid.claim(miner)


def test_nothing_is_claimed_before_the_distribution(opened: World) -> None:
    opened.reveal_scores()
    with pytest.raises(Reverted, match="NotDistributed") as refused:
        opened.claim(opened.cohort[0])
    assert refused.value.arguments == (TASK, ZERO_ADDRESS)


def test_a_payment_goes_where_its_owner_says(paid: World) -> None:
    miner, elsewhere = paid.others[0], "0x" + "5" * 40
    announced = paid.views.rewards.claimable(TASK, paid.cohort.index(miner), paid.scores()[miner.address])
    with pytest.raises(Reverted, match="InvalidRecipient") as refused:
        paid.claim(miner, recipient=ZERO_ADDRESS)
    assert refused.value.arguments == (ZERO_ADDRESS,)
    claimed = paid.claim(miner, recipient=elsewhere).event
    assert (claimed.miner, claimed.recipient, claimed.amount_wei) == (miner.address, elsewhere, announced)
    assert paid.balance(elsewhere) == announced
    with pytest.raises(Reverted, match="InvalidRecipient"):
        paid.withdraw(paid.aggregator, recipient=ZERO_ADDRESS)
    withdrawn = paid.withdraw(paid.aggregator, recipient=elsewhere).event
    assert (withdrawn.account, withdrawn.recipient) == (paid.aggregator.address, elsewhere)
    assert paid.balance(elsewhere) == announced + SHARE


def settle(world: World, task_id: str, **terms: Any) -> None:
    """One more task of the same cohort, up to its distribution in equal parts."""
    world.publish(task_id, **terms)
    world.deposit(world.cohort, [10] * 4)
    world.close_and_draw(world.cohort, task_id)
    candidate = world.candidate(task_id, aggregator=world.aggregator_of(task_id).address)
    voters = [miner for miner in world.cohort if miner.address != candidate.aggregator]
    world.publish_block(candidate, voters)
    world.as_(world.publisher).rewards.reveal_accuracy(task_id, ACCURACY, SALT)
    world.at(world.now() + SCORE_WINDOW + 1)
    world.distribute(task_id)


def test_parts_of_two_tasks_are_claimed_one_after_the_other(paid: World) -> None:
    settle(paid, "second", reward=400, aggregator_share_ppm=0)
    miner = paid.others[0]
    position, score = paid.cohort.index(miner), paid.scores()[miner.address]
    announced = {task: paid.views.rewards.claimable(task, position, score) for task in (TASK, "second")}
    assert announced["second"] == 100
    with pytest.raises(Reverted, match="NotParticipant"):
        paid.as_(miner).rewards.claim_to("second", paid.opening(miner, TASK))
    for task, amount in announced.items():
        event = paid.claim(miner, task).event
        assert (event.task_key, event.amount_wei) == (task_key(task), amount)
        with pytest.raises(Reverted, match="AlreadyClaimed"):
            paid.claim(miner, task)


def test_shares_of_two_tasks_are_one_balance(paid: World) -> None:
    settle(paid, "second", reward=4000)
    first, second = paid.aggregator, paid.aggregator_of("second")
    owed = Counter({first.address: SHARE})
    owed[second.address] += 400
    assert balances(paid) == owed
    for aggregator in {first.address: first, second.address: second}.values():
        assert paid.withdraw(aggregator).event.amount_wei == owed[aggregator.address]


# Rewards in tokens


def test_a_reward_in_tokens_is_paid_in_tokens(paid: World) -> None:
    token = funded(paid)
    before = paid.balance(paid.deployment.rewards)
    settle(paid, "in-tokens", reward=4001, token=token.address)
    assert token.balance_of(paid.deployment.rewards) == 4001
    assert paid.balance(paid.deployment.rewards) == before
    aggregator = paid.aggregator_of("in-tokens")
    assert paid.views.rewards.balance_of(aggregator.address, token.address) == 400
    for i, miner in enumerate(paid.cohort):
        announced = paid.views.rewards.claimable("in-tokens", i, paid.scores()[miner.address], token.address)
        event = paid.claim(miner, "in-tokens", token=token.address).event
        assert (event.token, event.recipient, event.amount_wei) == (token.address, miner.address, announced)
        assert token.balance_of(miner.address) == announced > 0
    withdrawn = paid.withdraw(aggregator, token=token.address).event
    assert (withdrawn.token, withdrawn.amount_wei) == (token.address, 400)
    assert token.balance_of(paid.deployment.rewards) == token.balance_of(paid.deployment.escrow) == 0
    assert paid.balance(paid.deployment.rewards) == before


def test_an_unmet_reward_in_tokens_goes_back_in_tokens(empty: World) -> None:
    token = funded(empty, amount=REWARD)
    empty.form(empty.cohort, token=token.address)
    empty.publish_block(empty.candidate(correct=79))
    empty.reveal_accuracy()
    empty.as_(empty.stranger).rewards.distribute(TASK)
    with pytest.raises(Reverted, match="NothingToWithdraw"):
        empty.withdraw(empty.publisher)
    assert empty.withdraw(empty.publisher, token=token.address).event.amount_wei == REWARD
    assert token.balance_of(empty.publisher.address) == REWARD


def test_a_claim_in_another_token_than_the_tasks_finds_nothing(paid: World) -> None:
    token = funded(paid)
    settle(paid, "in-tokens", token=token.address)
    miner = paid.others[0]
    for task, wrong in ((TASK, token.address), ("in-tokens", ZERO_ADDRESS), (TASK, funded(paid).address)):
        score = paid.scores()[miner.address]
        assert paid.views.rewards.claimable(task, paid.cohort.index(miner), score, wrong) == 0
        with pytest.raises(Reverted, match="NotDistributed") as refused:
            paid.claim(miner, task, token=wrong)
        assert refused.value.arguments == (task, wrong)
    paid.claim(miner, TASK)
    paid.claim(miner, "in-tokens", token=token.address)
    with pytest.raises(Reverted, match="NothingToWithdraw"):
        paid.withdraw(paid.aggregator, token=funded(paid).address)


def test_a_token_that_stops_stops_only_what_it_pays(paid: World) -> None:
    """Tokens that refuse are asked again later; ether is paid meanwhile."""
    token = funded(paid, "OddToken")
    settle(paid, "in-tokens", token=token.address)
    miner = paid.others[0]
    behave(paid, token, ANSWER_FALSE)
    with pytest.raises(Reverted, match="SafeERC20FailedOperation") as refused:
        paid.claim(miner, "in-tokens", token=token.address)
    assert refused.value.arguments == (token.address,)
    paid.claim(miner, TASK)
    behave(paid, token, SEND)
    assert paid.claim(miner, "in-tokens", token=token.address).event.amount_wei > 0


def test_a_token_that_refuses_the_distribution_is_asked_again(empty: World) -> None:
    token = funded(empty, "OddToken")
    empty.form(empty.cohort, token=token.address)
    empty.publish_block()
    empty.reveal_accuracy()
    empty.reveal_scores()
    behave(empty, token, ANSWER_FALSE)
    with pytest.raises(Reverted, match="SafeERC20FailedOperation"):
        empty.distribute()
    assert empty.views.escrow.get_task(TASK).status is Status.PUBLISHED
    assert not empty.views.rewards.get_settlement(TASK).is_distributed
    behave(empty, token, SEND)
    assert empty.distribute().pool_wei == REWARD - SHARE
