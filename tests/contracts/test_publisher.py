"""BlockPublisher: who may publish what with whose votes, and equivocation."""

import pytest
from eth_utils import keccak

from contracts.bindings import CreditAdded, Status
from contracts.messages import Attestation, Candidate, Domain, sign, struct_hash, type_string
from contracts.sending import Reverted
from tests.contracts.world import STAKES, TASK, World, named, number


def refused(world: World, candidate: Candidate, votes: list[str], match: str) -> Reverted:
    with pytest.raises(Reverted, match=match) as error:
        world.as_(world.aggregator).publisher.publish_block(candidate, votes)
    assert world.views.escrow.get_task(TASK).status is Status.LOCKED
    return error.value


def test_the_type_hashes_are_those_of_the_messages(world: World) -> None:
    publisher = world.views.publisher
    assert publisher.candidate_typehash() == "0x" + keccak(text=type_string(Candidate)).hex()
    assert publisher.attestation_typehash() == "0x" + keccak(text=type_string(Attestation)).hex()


def test_the_contract_hashes_a_candidate_as_the_messages_do(drawn: World) -> None:
    for changes in ({}, {"model_uri": ""}, {"participants": (), "score_commits": ()}, {"round_number": 2**32 - 1}):
        candidate = drawn.candidate(**changes)
        assert drawn.views.publisher.candidate_hash(candidate) == struct_hash(candidate)


def test_a_block_with_the_quorum_is_published(drawn: World) -> None:
    candidate = drawn.candidate()
    assert drawn.views.publisher.get_block_meta(TASK) is None
    mined = drawn.as_(drawn.aggregator).publisher.publish_block(candidate, drawn.votes(candidate))
    assert mined.event.candidate_hash == struct_hash(candidate)
    assert (mined.event.model_sha256, mined.event.model_uri) == (candidate.model_sha256, candidate.model_uri)
    assert (mined.event.correct, mined.event.total, mined.event.round_number) == (85, 100, 1)

    meta = drawn.views.publisher.get_block_meta(TASK)
    assert meta is not None
    assert (meta.candidate_hash, meta.model_sha256) == (struct_hash(candidate), candidate.model_sha256)
    assert (meta.aggregator, meta.published_at_s, meta.block_number) == (
        drawn.aggregator.address,
        drawn.now(),
        mined.block_number,
    )
    assert (meta.round_number, meta.correct, meta.total, meta.votes) == (1, 85, 100, 3)
    assert drawn.views.publisher.get_participants(TASK) == candidate.participants
    assert drawn.views.publisher.get_score_commits(TASK) == candidate.score_commits
    assert drawn.views.escrow.get_task(TASK).status is Status.PUBLISHED


def test_each_participants_commitment_is_found(published: World) -> None:
    publisher = published.views.publisher
    for miner, commit in zip(published.cohort, published.candidate().score_commits, strict=True):
        found = publisher.score_commit_of(TASK, miner.address)
        assert (found.is_participant, found.score_commit, found.participant_count) == (True, commit, 4)
    for miner in (*published.miners[4:], published.publisher):
        assert not publisher.score_commit_of(TASK, miner.address).is_participant
    assert not publisher.score_commit_of("nobody-knows", published.cohort[0].address).is_participant


def test_a_part_of_the_cohort_can_be_the_participants(drawn: World) -> None:
    full = drawn.candidate()
    candidate = drawn.candidate(participants=full.participants[1:], score_commits=full.score_commits[1:])
    drawn.publish_block(candidate)
    assert drawn.views.publisher.get_participants(TASK) == candidate.participants


def test_only_the_drawn_aggregator_publishes(drawn: World) -> None:
    candidate = drawn.candidate()
    votes = drawn.votes(candidate)
    for account in (*drawn.others, drawn.publisher, drawn.stranger):
        with pytest.raises(Reverted, match="NotAggregator"):
            drawn.as_(account).publisher.publish_block(candidate, votes)


def test_a_candidate_names_the_drawn_aggregator(drawn: World) -> None:
    candidate = drawn.candidate(aggregator=drawn.others[0].address)
    refused(drawn, candidate, drawn.votes(candidate), "NotAggregator")


def test_nothing_is_published_before_the_draw(locked: World) -> None:
    locked.register(locked.cohort)
    candidate = Candidate(
        task_id=TASK,
        round_number=1,
        model_sha256="0x" + "ab" * 32,
        model_uri="",
        correct=1,
        total=1,
        aggregator="0x" + "00" * 20,
        participants=(),
        score_commits=(),
        opening_sha256="0x" + "cd" * 32,
    )
    with pytest.raises(Reverted, match="NotAggregator"):
        locked.as_(locked.cohort[0]).publisher.publish_block(candidate, [])


def test_a_block_is_published_until_the_deadline(drawn: World) -> None:
    candidate = drawn.candidate()
    snapshot = drawn.tester.take_snapshot()
    drawn.at(drawn.deadline + 1)
    refused(drawn, candidate, drawn.votes(candidate), "DeadlinePast")
    drawn.tester.revert_to_snapshot(snapshot)
    drawn.at(drawn.deadline)
    drawn.publish_block(candidate)


def test_a_task_has_one_block(published: World) -> None:
    for candidate in (published.candidate(), published.candidate(round_number=2)):
        with pytest.raises(Reverted, match="WrongStatus"):
            published.as_(published.aggregator).publisher.publish_block(candidate, published.votes(candidate))


def test_no_block_for_a_refunded_task(drawn: World) -> None:
    candidate = drawn.candidate()
    drawn.at(drawn.deadline + 1)
    drawn.as_(drawn.publisher).escrow.refund_publisher(TASK)
    with pytest.raises(Reverted, match="WrongStatus"):
        drawn.as_(drawn.aggregator).publisher.publish_block(candidate, drawn.votes(candidate))


@pytest.mark.parametrize(("correct", "total", "is_valid"), [(0, 1, True), (1, 1, True), (0, 0, False), (2, 1, False)])
def test_an_accuracy_is_a_fraction(drawn: World, correct: int, total: int, is_valid: bool) -> None:
    candidate = drawn.candidate(correct=correct, total=total)
    if is_valid:
        drawn.publish_block(candidate)
    else:
        refused(drawn, candidate, drawn.votes(candidate), "InvalidAccuracy")


def test_too_few_participants(drawn: World) -> None:
    full = drawn.candidate()
    candidate = drawn.candidate(participants=full.participants[:2], score_commits=full.score_commits[:2])
    assert refused(drawn, candidate, drawn.votes(candidate), "TooFewParticipants").arguments == (2, 3)


def test_one_commitment_per_participant(drawn: World) -> None:
    candidate = drawn.candidate(score_commits=drawn.candidate().score_commits[:3])
    assert refused(drawn, candidate, drawn.votes(candidate), "LengthMismatch").arguments == (4, 3)


def test_participants_ascend_strictly(drawn: World) -> None:
    a, b, c, d = drawn.candidate().participants
    for participants in ((a, c, b, d), (a, b, b, d), (d, c, b, a)):
        candidate = drawn.candidate(participants=participants)
        refused(drawn, candidate, drawn.votes(candidate), "NotAscending")


def test_participants_are_in_the_cohort(drawn: World) -> None:
    outsider = drawn.miners[4].address
    participants = sorted((*drawn.candidate().participants[:3], outsider), key=number)
    candidate = drawn.candidate(participants=tuple(participants))
    assert refused(drawn, candidate, drawn.votes(candidate), "NotInCohort").arguments == (TASK, outsider)


# Votes


def test_the_quorum_is_of_the_others_less_the_fault_rate_rounded_up(empty: World) -> None:
    empty.deposit(empty.miners, [10] * 8)
    for i, (count, fault_rate_ppm, required) in enumerate(
        [(3, 500_000, 1), (3, 499_999, 2), (4, 333_334, 2), (8, 0, 7), (8, 300_000, 5)]
    ):
        task = f"task-{i}"
        empty.publish(task, reward=1, fault_rate_ppm=fault_rate_ppm, max_miners=8)
        assert empty.views.publisher.required_votes(task) == 0
        empty.register(empty.miners[:count], task)
        empty.as_(empty.publisher).stakes.close_registration(task, [m.address for m in empty.miners[:count]])
        assert empty.views.publisher.required_votes(task) == required


def test_a_vote_less_than_the_quorum_is_too_few(drawn: World) -> None:
    candidate = drawn.candidate()
    assert drawn.views.publisher.required_votes(TASK) == 3
    error = refused(drawn, candidate, drawn.votes(candidate, drawn.others[:2]), "QuorumNotReached")
    assert error.arguments == (2, 3)


def test_nobody_votes_twice(drawn: World) -> None:
    candidate = drawn.candidate()
    first, second, _ = drawn.others
    refused(drawn, candidate, drawn.votes(candidate, [first, second, second]), "NotAscending")


def test_votes_are_in_the_order_of_their_signers(drawn: World) -> None:
    candidate = drawn.candidate()
    refused(drawn, candidate, drawn.votes(candidate)[::-1], "NotAscending")


def test_the_aggregator_has_no_vote(drawn: World) -> None:
    candidate = drawn.candidate()
    voters = sorted([*drawn.others[:2], drawn.aggregator], key=lambda voter: number(voter.address))
    refused(drawn, candidate, drawn.votes(candidate, voters), "AggregatorVote")


def test_strangers_have_no_vote(drawn: World) -> None:
    candidate = drawn.candidate()
    for stranger in (drawn.miners[4], drawn.publisher, named("nobody")):
        voters = sorted([*drawn.others[:2], stranger], key=lambda voter: number(voter.address))
        refused(drawn, candidate, drawn.votes(candidate, voters), "NotInCohort")


@pytest.mark.parametrize("what", ["candidate", "round", "task", "rejection", "reason", "chain", "contract"])
def test_a_vote_for_anything_else_does_not_count(drawn: World, what: str) -> None:
    candidate = drawn.candidate()
    good = drawn.votes(candidate)
    voter = drawn.others[-1]
    domain = drawn.domain
    other = {
        "candidate": lambda: drawn.vote(voter, candidate, candidate="0x" + "11" * 32),
        "round": lambda: drawn.vote(voter, candidate, round_number=2),
        "task": lambda: drawn.vote(voter, candidate, task_id="another-task"),
        "rejection": lambda: drawn.vote(voter, candidate, accepted=False),
        "reason": lambda: drawn.vote(voter, candidate, reason="because"),
        "chain": lambda: drawn.vote(voter, candidate, Domain(domain.chain_id + 1, domain.verifying_contract)),
        "contract": lambda: drawn.vote(voter, candidate, Domain(domain.chain_id, drawn.deployment.escrow)),
    }[what]()
    # It recovers some other address, which may sort before the last vote: either way nobody of the cohort.
    refused(drawn, candidate, [*good[:-1], other], "NotInCohort|NotAscending")
    drawn.publish_block(candidate)


def test_votes_for_one_candidate_do_not_publish_another(drawn: World) -> None:
    votes = drawn.votes(drawn.candidate())
    for changes in (
        {"model_sha256": "0x" + "ac" * 32},
        {"model_uri": "s3://elsewhere"},
        {"correct": 86},
        {"opening_sha256": "0x" + "ce" * 32},
        {"round_number": 2},
        {"score_commits": drawn.candidate().score_commits[::-1]},
    ):
        refused(drawn, drawn.candidate(**changes), votes, "NotInCohort|NotAscending")


@pytest.mark.parametrize("signature", ["0x", "0x" + "00" * 65, "0x" + "ff" * 65, "0x" + "11" * 64])
def test_a_malformed_vote_is_named(drawn: World, signature: str) -> None:
    candidate = drawn.candidate()
    votes = [*drawn.votes(candidate)[:2], signature]
    assert refused(drawn, candidate, votes, "InvalidVote").arguments == (2,)


def test_a_vote_has_one_form(drawn: World) -> None:
    """The other s of a signature recovers the same signer elsewhere; here it is malformed."""
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    candidate = drawn.candidate()
    votes = drawn.votes(candidate)
    raw = bytes.fromhex(votes[2][2:])
    flipped = raw[:32] + (order - int.from_bytes(raw[32:64], "big")).to_bytes(32, "big") + bytes([55 - raw[64]])
    assert refused(drawn, candidate, [*votes[:2], "0x" + flipped.hex()], "InvalidVote").arguments == (2,)


# Equivocation


def both_signed(world: World, first: Candidate, second: Candidate) -> tuple[Candidate, str, Candidate, str]:
    key = world.aggregator.key
    return first, sign(first, world.domain, key), second, sign(second, world.domain, key)


def test_two_signed_candidates_of_one_round_cost_the_stake(drawn: World) -> None:
    proof = both_signed(drawn, drawn.candidate(), drawn.candidate(correct=99))
    stake = STAKES[drawn.cohort.index(drawn.aggregator)]
    mined = drawn.as_(drawn.stranger).publisher.report_equivocation(*proof)
    assert mined.event.aggregator == drawn.aggregator.address
    assert mined.event.reporter == drawn.stranger.address
    assert (mined.event.first, mined.event.second) == (struct_hash(proof[0]), struct_hash(proof[2]))
    assert drawn.views.stakes.stake_of(drawn.aggregator.address) == 0
    assert drawn.views.stakes.is_slashed(TASK)

    # Equal parts, the residue to the first of the others.
    share, residue = divmod(stake, 3)
    credits = [event.amount_wei for event in mined.events if isinstance(event, CreditAdded)]
    assert credits == [share + residue, share, share]
    assert [drawn.views.stakes.credit_of(miner.address) for miner in drawn.others] == credits
    for miner, credit in zip(drawn.others, credits, strict=True):
        assert drawn.as_(miner).stakes.withdraw_credit().event.amount_wei == credit
        with pytest.raises(Reverted, match="NothingToWithdraw"):
            drawn.as_(miner).stakes.withdraw_credit()
    assert drawn.balance(drawn.deployment.stakes) == 155 - stake


def test_an_equivocation_is_punished_once(drawn: World) -> None:
    publisher = drawn.as_(drawn.stranger).publisher
    publisher.report_equivocation(*both_signed(drawn, drawn.candidate(), drawn.candidate(correct=99)))
    with pytest.raises(Reverted, match="AlreadySlashed"):
        publisher.report_equivocation(*both_signed(drawn, drawn.candidate(), drawn.candidate(correct=98)))


def test_an_equivocation_is_punished_after_publication(published: World) -> None:
    proof = both_signed(published, published.candidate(), published.candidate(correct=99))
    published.as_(published.stranger).publisher.report_equivocation(*proof)
    assert published.views.stakes.is_slashed(TASK)


def test_no_more_than_the_recorded_stake_is_taken(drawn: World) -> None:
    drawn.as_(drawn.aggregator).stakes.deposit_stake(amount_wei=7)
    drawn.as_(drawn.stranger).publisher.report_equivocation(
        *both_signed(drawn, drawn.candidate(), drawn.candidate(correct=99))
    )
    assert drawn.views.stakes.stake_of(drawn.aggregator.address) == 7


def test_a_requested_withdrawal_does_not_save_the_stake(drawn: World) -> None:
    stakes = drawn.as_(drawn.aggregator).stakes
    stakes.request_withdrawal(stakes.stake_of(drawn.aggregator.address))
    drawn.as_(drawn.stranger).publisher.report_equivocation(
        *both_signed(drawn, drawn.candidate(), drawn.candidate(correct=99))
    )
    assert stakes.get_withdrawal(drawn.aggregator.address).amount_wei == 0
    assert stakes.available_stake(drawn.aggregator.address) == 0


def test_what_is_left_is_taken_when_another_task_took_the_rest(drawn: World) -> None:
    """One stake backs several tasks."""
    drawn.publish("second", reward=1)
    drawn.register(drawn.cohort, "second")
    drawn.close_and_draw(drawn.cohort, "second")
    second = drawn.views.stakes.aggregator_of("second")
    assert second is not None
    before = sum(drawn.views.stakes.stake_of(m.address) + drawn.views.stakes.credit_of(m.address) for m in drawn.cohort)
    for task, aggregator in ((TASK, drawn.aggregator.address), ("second", second)):
        key = next(m for m in drawn.cohort if m.address == aggregator).key
        pair = [drawn.candidate(task, correct=correct) for correct in (1, 2)]
        proof = (pair[0], sign(pair[0], drawn.domain, key), pair[1], sign(pair[1], drawn.domain, key))
        drawn.as_(drawn.stranger).publisher.report_equivocation(*proof)
        assert drawn.views.stakes.stake_of(aggregator) == 0
    after = sum(drawn.views.stakes.stake_of(m.address) + drawn.views.stakes.credit_of(m.address) for m in drawn.cohort)
    assert before == after


def test_what_is_no_equivocation(drawn: World) -> None:
    first = drawn.candidate()
    second = drawn.candidate(correct=99)
    honest = both_signed(drawn, first, second)
    miner = drawn.others[0].key
    cases = {
        "one candidate": both_signed(drawn, first, first),
        "two rounds": both_signed(drawn, first, drawn.candidate(round_number=2)),
        "two tasks": both_signed(drawn, first, drawn.candidate(task_id="another-task")),
        "no aggregator drawn": both_signed(
            drawn, drawn.candidate(task_id="another-task"), drawn.candidate(task_id="another-task", correct=99)
        ),
        "first signature": (first, sign(first, drawn.domain, miner), *honest[2:]),
        "second signature": (*honest[:3], sign(second, drawn.domain, miner)),
    }
    for reason, proof in cases.items():
        with pytest.raises(Reverted, match="NoEquivocation") as error:
            drawn.as_(drawn.stranger).publisher.report_equivocation(*proof)
        assert error.value.arguments == (reason,)


def test_signatures_for_another_deployment_are_no_equivocation(drawn: World) -> None:
    elsewhere = Domain(drawn.domain.chain_id, drawn.deployment.rewards)
    pair = [drawn.candidate(correct=correct) for correct in (1, 2)]
    first, second = (sign(candidate, elsewhere, drawn.aggregator.key) for candidate in pair)
    with pytest.raises(Reverted, match="NoEquivocation"):
        drawn.as_(drawn.stranger).publisher.report_equivocation(pair[0], first, pair[1], second)


def test_only_the_block_publisher_slashes(drawn: World) -> None:
    for account in (drawn.publisher, drawn.stranger, drawn.others[0]):
        with pytest.raises(Reverted, match="OnlyContract"):
            drawn.as_(account).stakes._transact(object, "slashStake", TASK)
