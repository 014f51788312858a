"""RewardDistribution: every path of the money after a block, to the wei and to the second."""

from contextlib import suppress

import pytest

from contracts.bindings import Outcome, RewardCredited, ScoresOpened, Status
from contracts.messages import accuracy_commit, score_commit
from contracts.sending import Reverted
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
    accounts = (world.publisher, *world.miners)
    found = {account.address: world.views.rewards.balance_of(account.address) for account in accounts}
    return {account: amount for account, amount in found.items() if amount}


def withdraw_everything(world: World) -> None:
    for account in (world.publisher, *world.miners):
        with suppress(Reverted):
            world.as_(account).rewards.withdraw()
    assert world.balance(world.deployment.rewards) == 0
    assert world.balance(world.deployment.escrow) == 0


def expected_split(world: World, scores: dict[str, int], *, is_share_forfeited: bool = False) -> dict[str, int]:
    """The rule, written once more: parts by score, the residue to the aggregator or to the first miner with a part."""
    share = 0 if is_share_forfeited else SHARE
    remaining = REWARD - share
    total = sum(scores.values())
    paid = {miner: remaining * score // total for miner, score in scores.items()}
    residue = remaining - sum(paid.values())
    first = next(miner for miner, score in scores.items() if score)
    if is_share_forfeited:
        paid[first] += residue
    else:
        paid[world.aggregator.address] = paid.get(world.aggregator.address, 0) + share + residue
    return {miner: amount for miner, amount in paid.items() if amount}


# The accuracy


def test_a_met_requirement_opens_the_scores(published: World) -> None:
    event = published.as_(published.publisher).rewards.reveal_accuracy(TASK, ACCURACY, SALT).event
    assert (event.revealer, event.accuracy_ppm, event.outcome) == (published.publisher.address, ACCURACY, Outcome.MET)
    assert event.score_reveal_end_s == published.now() + SCORE_WINDOW
    settlement = published.views.rewards.get_settlement(TASK)
    assert (settlement.outcome, settlement.is_share_forfeited, settlement.is_settled) == (Outcome.MET, False, False)
    assert settlement.publisher_reveal_end_s == published_at(published) + PUBLISHER_WINDOW
    assert settlement.aggregator_reveal_end_s == silence_end(published)
    assert published.views.escrow.get_task(TASK).status is Status.PUBLISHED


def test_an_unmet_requirement_pays_the_publisher_back(drawn: World) -> None:
    drawn.publish_block(drawn.candidate(correct=79))
    mined = drawn.as_(drawn.publisher).rewards.reveal_accuracy(TASK, ACCURACY, SALT)
    assert (mined.event.outcome, mined.event.score_reveal_end_s) == (Outcome.UNMET, 0)
    assert balances(drawn) == {drawn.publisher.address: REWARD}
    assert drawn.views.escrow.get_task(TASK).status is Status.SETTLED
    with pytest.raises(Reverted, match="RequirementUnmet"):
        drawn.reveal_score(drawn.cohort[0])
    with pytest.raises(Reverted, match="RequirementUnmet"):
        drawn.as_(drawn.stranger).rewards.distribute(TASK)
    with pytest.raises(Reverted, match="RequirementUnmet"):
        drawn.as_(drawn.stranger).rewards.open_scores(TASK)
    assert drawn.as_(drawn.publisher).rewards.withdraw().event.amount_wei == REWARD
    assert drawn.balance(drawn.deployment.rewards) == 0


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
    assert balances(drawn) == {drawn.publisher.address: REWARD}


def test_the_windows_of_publisher_and_aggregator_do_not_overlap(published: World) -> None:
    publisher, aggregator = published.as_(published.publisher).rewards, published.as_(published.aggregator).rewards
    end = published_at(published) + PUBLISHER_WINDOW
    snapshot = published.tester.take_snapshot()
    published.at(end)
    with pytest.raises(Reverted, match="RevealTooEarly"):
        aggregator.reveal_accuracy(TASK, ACCURACY, SALT)
    publisher.reveal_accuracy(TASK, ACCURACY, SALT)

    published.tester.revert_to_snapshot(snapshot)
    published.at(end + 1)
    with pytest.raises(Reverted, match="RevealTooLate"):
        publisher.reveal_accuracy(TASK, ACCURACY, SALT)
    published.at(silence_end(published))
    aggregator.reveal_accuracy(TASK, ACCURACY, SALT)

    published.tester.revert_to_snapshot(snapshot)
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
    with pytest.raises(Reverted, match="NoBlock"):
        drawn.reveal_score(drawn.cohort[0])
    for call in (drawn.as_(drawn.stranger).rewards.distribute, drawn.as_(drawn.stranger).rewards.open_scores):
        with pytest.raises(Reverted, match="NoBlock"):
            call(TASK)


@pytest.mark.parametrize("accuracy", [1_000_001, 2**255])
def test_an_impossible_accuracy_never_refunds_the_publisher(empty: World, accuracy: int) -> None:
    """The commitment is opaque at publication; what is in it comes out here."""
    empty.as_(empty.publisher).escrow.publish_task(
        TASK, accuracy_commit(accuracy, SALT), SPEC, empty.terms(), reward_wei=REWARD
    )
    empty.deposit(empty.cohort, [10] * 4)
    empty.register(empty.cohort)
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
    empty.publish(accuracy_ppm=1_000_000)
    empty.deposit(empty.cohort, [10] * 4)
    empty.register(empty.cohort)
    empty.close_and_draw(empty.cohort)
    empty.publish_block()
    empty.reveal_accuracy(1_000_000)
    assert balances(empty) == {empty.publisher.address: REWARD}


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

    for miner in published.cohort:
        published.reveal_score(miner)
    mined = rewards.distribute(TASK)
    assert mined.event.aggregator_share_wei == 0
    assert balances(published) == expected_split(published, published.scores(), is_share_forfeited=True)
    withdraw_everything(published)


def test_after_silence_the_window_is_fixed_whoever_acts_first(published: World) -> None:
    """The first reveal records the silence; whether it comes early or late, the end stays."""
    end = silence_end(published) + SCORE_WINDOW
    published.at(silence_end(published) + 1)
    mined = published.as_(published.cohort[1]).rewards.reveal_score(TASK, 1111, salt_of(published.cohort[1]))
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
    published.as_(published.stranger).rewards.distribute(TASK)
    part, residue = divmod(REWARD, 4)
    first, *rest = (miner.address for miner in published.cohort)
    assert balances(published) == {first: part + residue, **dict.fromkeys(rest, part)}
    withdraw_everything(published)


# Scores and distribution


def test_the_reward_is_split_by_score_to_the_wei(published: World) -> None:
    published.reveal_accuracy()
    for miner in published.cohort:
        published.reveal_score(miner)
    scores = published.scores()
    settlement = published.views.rewards.get_settlement(TASK)
    assert (settlement.revealed_count, settlement.score_sum) == (4, sum(scores.values()))
    # All have revealed: nobody has to wait for the window.
    mined = published.as_(published.stranger).rewards.distribute(TASK)
    expected = expected_split(published, scores)
    assert sum(expected.values()) == REWARD
    assert balances(published) == expected
    assert sum(event.amount_wei for event in mined.events if isinstance(event, RewardCredited)) == REWARD
    assert (mined.event.reward_wei, mined.event.score_sum) == (REWARD, sum(scores.values()))
    assert SHARE <= mined.event.aggregator_share_wei < SHARE + 4
    assert published.views.escrow.get_task(TASK).status is Status.SETTLED
    assert published.views.rewards.get_settlement(TASK).is_settled
    withdraw_everything(published)


def test_an_unrevealed_score_earns_nothing(published: World) -> None:
    published.reveal_accuracy()
    for miner in published.cohort[1:3]:
        published.reveal_score(miner)
    end = published.views.rewards.get_settlement(TASK).score_reveal_end_s
    published.at(end)
    with pytest.raises(Reverted, match="ScoresStillOpen") as refused:
        published.as_(published.stranger).rewards.distribute(TASK)
    assert refused.value.arguments == (end, end)
    published.at(end + 1)
    published.as_(published.stranger).rewards.distribute(TASK)
    scores = {miner.address: published.scores()[miner.address] for miner in published.cohort[1:3]}
    assert balances(published) == expected_split(published, scores)
    withdraw_everything(published)


def test_when_nobody_reveals_a_score_the_participants_share_equally(published: World) -> None:
    published.reveal_accuracy()
    published.at(published.now() + SCORE_WINDOW + 1)
    published.as_(published.stranger).rewards.distribute(TASK)
    assert balances(published) == expected_split(published, {miner.address: 1 for miner in published.cohort})
    withdraw_everything(published)


def zero_scores(world: World) -> None:
    commits = tuple(score_commit(0, salt_of(miner), TASK, miner.address) for miner in world.cohort)
    world.publish_block(world.candidate(score_commits=commits))
    world.reveal_accuracy()


def test_zero_scores_share_equally(drawn: World) -> None:
    zero_scores(drawn)
    for miner in drawn.cohort:
        drawn.reveal_score(miner, 0)
    drawn.as_(drawn.stranger).rewards.distribute(TASK)
    assert balances(drawn) == expected_split(drawn, {miner.address: 1 for miner in drawn.cohort})


def test_zero_scores_share_equally_among_those_who_revealed(drawn: World) -> None:
    zero_scores(drawn)
    for miner in drawn.cohort[2:]:
        drawn.reveal_score(miner, 0)
    drawn.at(drawn.now() + SCORE_WINDOW + 1)
    drawn.as_(drawn.stranger).rewards.distribute(TASK)
    assert balances(drawn) == expected_split(drawn, {miner.address: 1 for miner in drawn.cohort[2:]})
    withdraw_everything(drawn)


def test_a_reward_smaller_than_the_cohort_leaves_as_well(empty: World) -> None:
    empty.publish(reward=1)
    empty.deposit(empty.cohort, [10] * 4)
    empty.register(empty.cohort)
    empty.close_and_draw(empty.cohort)
    empty.publish_block()
    empty.at(silence_end(empty) + 1)
    for miner in empty.cohort[2:]:
        empty.reveal_score(miner)
    empty.at(silence_end(empty) + SCORE_WINDOW + 1)
    empty.as_(empty.stranger).rewards.distribute(TASK)
    # The residue is the whole wei; the first miner with a part takes it, not one that stayed silent.
    assert balances(empty) == {empty.cohort[2].address: 1}
    withdraw_everything(empty)


def test_no_score_before_the_outcome(published: World) -> None:
    with pytest.raises(Reverted, match="OutcomePending"):
        published.reveal_score(published.cohort[0])
    with pytest.raises(Reverted, match="OutcomePending"):
        published.as_(published.stranger).rewards.distribute(TASK)


def test_a_score_is_revealed_until_the_window_ends(published: World) -> None:
    published.reveal_accuracy()
    end = published.now() + SCORE_WINDOW
    published.at(end)
    published.reveal_score(published.cohort[0])
    with pytest.raises(Reverted, match="RevealTooLate"):
        published.reveal_score(published.cohort[1])


def test_a_score_is_revealed_once(published: World) -> None:
    published.reveal_accuracy()
    assert not published.views.rewards.score_of(TASK, published.cohort[0].address).is_revealed
    published.reveal_score(published.cohort[0])
    found = published.views.rewards.score_of(TASK, published.cohort[0].address)
    assert (found.is_revealed, found.score) == (True, 1000)
    with pytest.raises(Reverted, match="ScoreAlreadyRevealed"):
        published.reveal_score(published.cohort[0])


def test_a_score_is_the_committed_one_and_ones_own(published: World) -> None:
    published.reveal_accuracy()
    first, second, *_ = published.cohort
    for score, salt in ((1001, salt_of(first)), (1000, salt_of(second)), (1111, salt_of(second))):
        with pytest.raises(Reverted, match="InvalidReveal"):
            published.as_(first).rewards.reveal_score(TASK, score, salt)
    published.reveal_score(first)


def test_only_participants_reveal_scores(drawn: World) -> None:
    full = drawn.candidate()
    absent = next(miner for miner in drawn.others)
    kept = [i for i, address in enumerate(full.participants) if address != absent.address]
    drawn.publish_block(
        drawn.candidate(
            participants=tuple(full.participants[i] for i in kept),
            score_commits=tuple(full.score_commits[i] for i in kept),
        )
    )
    drawn.reveal_accuracy()
    for account in (absent, drawn.publisher, drawn.stranger, drawn.miners[4]):
        with pytest.raises(Reverted, match="NotParticipant"):
            drawn.as_(account).rewards.reveal_score(TASK, 1000, salt_of(account))


@pytest.mark.parametrize(("max_score", "is_valid"), [(1000, True), (999, False)])
def test_a_score_is_at_most_the_maximum(empty: World, max_score: int, is_valid: bool) -> None:
    empty.publish(max_score=max_score)
    empty.deposit(empty.cohort, [10] * 4)
    empty.register(empty.cohort)
    empty.close_and_draw(empty.cohort)
    empty.publish_block()
    empty.reveal_accuracy()
    if is_valid:
        empty.reveal_score(empty.cohort[0])
    else:
        with pytest.raises(Reverted, match="ScoreTooLarge") as refused:
            empty.reveal_score(empty.cohort[0])
        assert refused.value.arguments == (1000, 999)


def test_a_reward_is_distributed_once(published: World) -> None:
    published.reveal_accuracy()
    for miner in published.cohort:
        published.reveal_score(miner)
    published.as_(published.stranger).rewards.distribute(TASK)
    with pytest.raises(Reverted, match="AlreadyDistributed"):
        published.as_(published.stranger).rewards.distribute(TASK)


def test_everyone_withdraws_its_own_once(published: World) -> None:
    published.reveal_accuracy()
    published.at(published.now() + SCORE_WINDOW + 1)
    published.as_(published.stranger).rewards.distribute(TASK)
    miner = published.others[0]
    owed = published.views.rewards.balance_of(miner.address)
    assert published.as_(miner).rewards.withdraw().event.amount_wei == owed
    with pytest.raises(Reverted, match="NothingToWithdraw"):
        published.as_(miner).rewards.withdraw()
    with pytest.raises(Reverted, match="NothingToWithdraw"):
        published.as_(published.stranger).rewards.withdraw()

    recipient = "0x" + "5" * 40
    other = published.others[1]
    owed = published.views.rewards.balance_of(other.address)
    with pytest.raises(Reverted, match="InvalidRecipient"):
        published.as_(other).rewards.withdraw_to("0x" + "00" * 20)
    assert published.as_(other).rewards.withdraw_to(recipient).event.recipient == recipient
    assert published.balance(recipient) == owed
