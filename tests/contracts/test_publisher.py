"""BlockPublisher: who may publish what with whose votes, and equivocation."""

from collections import Counter
from dataclasses import replace

import pytest
from eth_account.signers.local import LocalAccount
from eth_utils import keccak

from contracts.bindings import EquivocationReported, Mined, Offence, Slash, StakeSlashed, Status, _candidate
from contracts.contributions import contributions_root, place
from contracts.messages import (
    Attestation,
    Candidate,
    Domain,
    compact_signature,
    sign,
    struct_hash,
    type_string,
)
from contracts.sending import Reverted
from tests.contracts.world import STAKES, TASK, World, named, number


def refused(world: World, candidate: Candidate, votes: list[str], match: str) -> Reverted:
    with pytest.raises(Reverted, match=match) as error:
        world.as_(world.aggregator).publisher.publish_block(candidate, votes, world.cohort_on_chain)
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
    assert drawn.views.publisher.get_candidate(TASK) is None
    assert drawn.views.publisher.get_participants(TASK) == ()
    mined = drawn.as_(drawn.aggregator).publisher.publish_block(
        candidate, drawn.votes(candidate), drawn.cohort_on_chain
    )
    assert mined.event.candidate_hash == struct_hash(candidate)
    assert (mined.event.model_sha256, mined.event.model_uri) == (candidate.model_sha256, candidate.model_uri)
    assert (mined.event.correct, mined.event.total, mined.event.round_number) == (85, 100, 1)

    meta = drawn.views.publisher.get_block_meta(TASK)
    assert meta is not None
    root = contributions_root(candidate.participants, candidate.score_commits)
    assert (meta.candidate_hash, meta.contributions_root, meta.participant_count) == (struct_hash(candidate), root, 4)
    assert mined.event.contributions_root == root
    assert (meta.aggregator, meta.published_at_s, meta.block_number) == (
        drawn.aggregator.address,
        drawn.now(),
        mined.block_number,
    )
    assert (meta.round_number, meta.correct, meta.total, meta.votes) == (1, 85, 100, 3)
    assert drawn.views.publisher.get_participants(TASK) == candidate.participants
    assert drawn.views.publisher.get_candidate(TASK) == candidate
    assert drawn.views.escrow.get_task(TASK).status is Status.PUBLISHED


def test_each_participant_finds_its_place(published: World) -> None:
    publisher, candidate = published.views.publisher, published.candidate()
    for i, miner in enumerate(published.cohort):
        assert publisher.place_of(TASK, miner.address) == place(candidate.participants, candidate.score_commits, i)
    for account in (*published.miners[4:], published.publisher):
        assert publisher.place_of(TASK, account.address) is None
    assert publisher.place_of("nobody-knows", published.cohort[0].address) is None


@pytest.mark.parametrize("count", range(1, 21))
def test_the_contract_makes_the_tree_that_places_are_proved_in(drawn: World, count: int) -> None:
    participants = tuple(named(f"leaf {i}").address for i in range(count))
    commits = tuple("0x" + keccak(text=f"commit {i}").hex() for i in range(count))
    candidate = drawn.candidate(participants=participants, score_commits=commits)
    root = drawn.views.publisher.contributions_root(candidate)
    assert root == contributions_root(participants, commits)
    for i in range(count):
        found = place(participants, commits, i)
        assert (found.position, found.score_commit) == (i, commits[i])
        node = keccak(i.to_bytes(32, "big") + bytes(12) + bytes.fromhex(participants[i][2:] + commits[i][2:]))
        for sibling in (bytes.fromhex(step[2:]) for step in found.proof):
            node = keccak(min(node, sibling) + max(node, sibling))
        assert "0x" + node.hex() == root
    with pytest.raises(IndexError):
        place(participants, commits, count)


def test_a_tree_has_one_commitment_per_participant(drawn: World) -> None:
    candidate = drawn.candidate(score_commits=drawn.candidate().score_commits[:3])
    with pytest.raises(Reverted, match="LengthMismatch"):
        drawn.views.publisher.contributions_root(candidate)
    with pytest.raises(ValueError, match="shorter"):
        contributions_root(candidate.participants, candidate.score_commits)


def test_a_part_of_the_cohort_can_be_the_participants(drawn: World) -> None:
    full = drawn.candidate()
    candidate = drawn.candidate(participants=full.participants[1:], score_commits=full.score_commits[1:])
    drawn.publish_block(candidate)
    assert drawn.views.publisher.get_participants(TASK) == candidate.participants


def test_only_the_drawn_aggregator_publishes(drawn: World) -> None:
    candidate = drawn.candidate()
    votes, cohort = drawn.votes(candidate), drawn.cohort_on_chain
    for account in (*drawn.others, drawn.publisher, drawn.stranger):
        with pytest.raises(Reverted, match="NotAggregator") as error:
            drawn.as_(account).publisher.publish_block(candidate, votes, cohort)
        assert error.value.arguments == (TASK, account.address, drawn.aggregator.address)


def test_a_candidate_names_the_drawn_aggregator(drawn: World) -> None:
    candidate = drawn.candidate(aggregator=drawn.others[0].address)
    refused(drawn, candidate, drawn.votes(candidate), "NotAggregator")


def test_nothing_is_published_before_the_draw(locked: World) -> None:
    locked.close(locked.cohort)
    nobody = "0x" + "00" * 20
    candidate = Candidate(
        task_id=TASK,
        round_number=1,
        model_sha256="0x" + "ab" * 32,
        model_uri="",
        correct=1,
        total=1,
        aggregator=nobody,
        participants=(),
        score_commits=(),
        opening_sha256="0x" + "cd" * 32,
    )
    account = locked.cohort[0]
    with pytest.raises(Reverted, match="NotAggregator") as error:
        locked.as_(account).publisher.publish_block(candidate, [], locked.cohort_on_chain)
    assert error.value.arguments == (TASK, account.address, nobody)


def test_a_block_is_checked_against_the_true_cohort(drawn: World) -> None:
    candidate, cohort = drawn.candidate(), drawn.cohort_on_chain
    votes = drawn.votes(candidate)
    shorter = replace(cohort, words=cohort.words[:3])
    more = replace(cohort, words=(*cohort.words, f"0x{number(drawn.miners[4].address) << 96 | 50:064x}"))
    for brought in (shorter, more, replace(cohort, words=())):
        with pytest.raises(Reverted, match="WrongCohort") as error:
            drawn.as_(drawn.aggregator).publisher.publish_block(candidate, votes, brought)
        assert error.value.arguments == (TASK,)


def test_the_one_that_replaces_publishes(drawn: World) -> None:
    drawn.as_(drawn.aggregator).stakes.resign_aggregator(TASK)
    drawn.as_(drawn.stranger).stakes.replace_aggregator(TASK)
    drawn.publish_block()
    meta = drawn.views.publisher.get_block_meta(TASK)
    assert meta is not None
    assert meta.aggregator == drawn.aggregator.address


def test_a_block_is_published_until_the_deadline(drawn: World) -> None:
    candidate = drawn.candidate()
    snapshot = drawn.tester.take_snapshot()
    drawn.at(drawn.deadline + 1)
    refused(drawn, candidate, drawn.votes(candidate), "DeadlinePast")
    drawn.go_back(snapshot)
    drawn.at(drawn.deadline)
    drawn.publish_block(candidate)


def test_a_task_has_one_block(published: World) -> None:
    for candidate in (published.candidate(), published.candidate(round_number=2)):
        with pytest.raises(Reverted, match="WrongStatus"):
            published.publish_block(candidate)


def test_no_block_for_a_refunded_task(drawn: World) -> None:
    drawn.at(drawn.deadline + 1)
    drawn.as_(drawn.publisher).escrow.refund_publisher(TASK)
    with pytest.raises(Reverted, match="WrongStatus") as error:
        drawn.publish_block()
    assert error.value.arguments == (TASK, Status.REFUNDED)


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


@pytest.mark.parametrize(
    ("count", "fault_rate_ppm", "required"),
    [(3, 500_000, 1), (3, 499_999, 2), (4, 333_334, 2), (8, 0, 7), (8, 300_000, 5), (200, 500_000, 100)],
)
def test_the_quorum_is_of_the_others_less_the_fault_rate_rounded_up(
    empty: World, count: int, fault_rate_ppm: int, required: int
) -> None:
    empty.publish(fault_rate_ppm=fault_rate_ppm, max_miners=200)
    assert empty.views.publisher.required_votes(TASK, count) == required


def test_a_vote_less_than_the_quorum_is_too_few(drawn: World) -> None:
    candidate = drawn.candidate()
    assert drawn.views.publisher.required_votes(TASK, 4) == 3
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


@pytest.mark.parametrize("words", ["00" * 64, "ff" * 64, "11" * 32 + "7f" + "ff" * 31])
def test_a_malformed_vote_is_named(drawn: World, words: str) -> None:
    """Zero, beyond the curve's order, and a high s."""
    candidate = drawn.candidate()
    votes = [*map(compact_signature, drawn.votes(candidate)[:2]), ("0x" + words[:64], "0x" + words[64:])]
    publisher, cohort = drawn.as_(drawn.aggregator).publisher, list(drawn.cohort_on_chain.words)
    with pytest.raises(Reverted, match="InvalidVote") as error:
        publisher._transact(object, "publishBlock", _candidate(candidate), votes, cohort)
    assert error.value.arguments == (2,)


@pytest.mark.parametrize("signature", ["0x", "0x" + "00" * 65, "0x" + "ff" * 65, "0x" + "11" * 64])
def test_what_is_no_signature_is_not_sent(drawn: World, signature: str) -> None:
    candidate = drawn.candidate()
    votes = [*drawn.votes(candidate)[:2], signature]
    with pytest.raises(ValueError, match="malformed"):
        drawn.as_(drawn.aggregator).publisher.publish_block(candidate, votes, drawn.cohort_on_chain)


def test_votes_are_sent_in_the_compact_form(drawn: World) -> None:
    """Both parities of EIP-2098 come up among a few signatures, and each recovers its voter."""
    seen = set()
    for round_number in range(1, 9):
        candidate = drawn.candidate(round_number=round_number)
        votes = drawn.votes(candidate)
        seen |= {int(compact_signature(vote)[1], 16) >> 255 for vote in votes}
        snapshot = drawn.tester.take_snapshot()
        drawn.publish_block(candidate)
        drawn.go_back(snapshot)
        if seen == {0, 1}:
            return
    raise AssertionError("24 signatures of one parity")


def test_a_vote_has_one_form(drawn: World) -> None:
    """The other s of a signature recovers the same signer elsewhere; here it is malformed."""
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    candidate = drawn.candidate()
    votes = drawn.votes(candidate)
    raw = bytes.fromhex(votes[2][2:])
    flipped = raw[:32] + (order - int.from_bytes(raw[32:64], "big")).to_bytes(32, "big") + bytes([55 - raw[64]])
    # A high s leaves no room for the parity in the compact form: what is read is another signature.
    refused(drawn, candidate, [*votes[:2], "0x" + flipped.hex()], "InvalidVote|NotInCohort|NotAscending")


# Equivocation


Proof = tuple[Candidate, str, Candidate, str]


def both_signed(world: World, aggregator: LocalAccount, first: Candidate, second: Candidate) -> Proof:
    key = aggregator.key
    return first, sign(first, world.domain, key), second, sign(second, world.domain, key)


def two_candidates(world: World, task_id: str = TASK) -> Proof:
    """Signed by whose turn it is."""
    pair = [world.candidate(task_id, aggregator=world.aggregator_of(task_id).address, correct=c) for c in (1, 2)]
    return both_signed(world, world.aggregator_of(task_id), *pair)


def report(world: World, proof: Proof) -> Mined[EquivocationReported]:
    cohort = world.views.stakes.get_cohort(proof[0].task_id)
    return world.as_(world.stranger).publisher.report_equivocation(*proof, cohort)


def taken(mined: Mined[EquivocationReported]) -> int:
    (event,) = [event for event in mined.events if isinstance(event, StakeSlashed)]
    assert event.offence is Offence.EQUIVOCATION
    return event.amount_wei


def test_two_signed_candidates_of_one_round_cost_the_stake(drawn: World) -> None:
    proof, culprit, others = two_candidates(drawn), drawn.aggregator, drawn.others
    position = drawn.cohort.index(culprit)
    stake = STAKES[position]
    mined = report(drawn, proof)
    assert (mined.event.aggregator, mined.event.reporter) == (culprit.address, drawn.stranger.address)
    assert (mined.event.first, mined.event.second) == (struct_hash(proof[0]), struct_hash(proof[2]))
    assert taken(mined) == stake
    assert drawn.views.stakes.stake_of(culprit.address) == 0
    assert drawn.views.stakes.get_slash(TASK, position, Offence.EQUIVOCATION) == Slash(True, stake, 0)

    # Equal parts, the residue to the first of the others.
    share, residue = divmod(stake, 3)
    for miner, credit in zip(others, [share + residue, share, share], strict=True):
        stakes = drawn.as_(miner).stakes
        stakes.credit_slashed(TASK, culprit.address, Offence.EQUIVOCATION, miner.address)
        assert stakes.credit_of(miner.address) == credit
        assert stakes.withdraw_credit().event.amount_wei == credit
        with pytest.raises(Reverted, match="NothingToWithdraw"):
            stakes.withdraw_credit()
    assert drawn.balance(drawn.deployment.stakes) == 155 - stake


def test_an_equivocation_is_punished_once(drawn: World) -> None:
    report(drawn, two_candidates(drawn))
    other = both_signed(drawn, drawn.aggregator, drawn.candidate(), drawn.candidate(correct=98))
    with pytest.raises(Reverted, match="AlreadySlashed") as error:
        report(drawn, other)
    assert error.value.arguments == (TASK, drawn.aggregator.address)


def test_an_equivocation_is_punished_after_publication(published: World) -> None:
    assert taken(report(published, two_candidates(published))) > 0


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_former_aggregator_is_punished_too(drawn: World, is_replaced: bool) -> None:
    proof, former = two_candidates(drawn), drawn.aggregator
    drawn.as_(former).stakes.resign_aggregator(TASK)
    if is_replaced:
        drawn.as_(drawn.stranger).stakes.replace_aggregator(TASK)
    assert taken(report(drawn, proof)) == STAKES[drawn.cohort.index(former)]


def test_silence_and_equivocation_are_two_offences(drawn: World) -> None:
    """The second takes what the first left of the recorded stake."""
    proof, former = two_candidates(drawn), drawn.aggregator
    stake = STAKES[drawn.cohort.index(former)]
    drawn.at(drawn.views.stakes.get_draw(TASK).turn_end_s + 1)
    drawn.as_(drawn.stranger).stakes.replace_aggregator(TASK)
    left = drawn.views.stakes.stake_of(former.address)
    assert 0 < left < stake
    assert taken(report(drawn, proof)) == left
    assert drawn.views.stakes.stake_of(former.address) == 0


def test_only_who_has_or_had_the_turn_is_punished(drawn: World) -> None:
    """Candidates that another member, or a stranger, signed for itself are no offence."""
    for account in (drawn.others[0], drawn.miners[4], drawn.stranger):
        pair = [drawn.candidate(aggregator=account.address, correct=correct) for correct in (1, 2)]
        with pytest.raises(Reverted, match="NotTheTurn") as error:
            report(drawn, both_signed(drawn, account, *pair))
        assert error.value.arguments == (TASK, account.address, drawn.aggregator.address)


def test_a_report_brings_the_cohort_along(drawn: World) -> None:
    cohort = replace(drawn.cohort_on_chain, words=drawn.cohort_on_chain.words[1:])
    with pytest.raises(Reverted, match="WrongCohort"):
        drawn.as_(drawn.stranger).publisher.report_equivocation(*two_candidates(drawn), cohort)


def test_no_more_than_the_recorded_stake_is_taken(drawn: World) -> None:
    drawn.as_(drawn.aggregator).stakes.deposit_stake(amount_wei=7)
    report(drawn, two_candidates(drawn))
    assert drawn.views.stakes.stake_of(drawn.aggregator.address) == 7


def test_evidence_counts_until_the_latest_end(drawn: World) -> None:
    """Later the stake may back another task, whose members count on it."""
    proof, stakes = two_candidates(drawn), drawn.views.stakes
    end = stakes.get_hold(drawn.aggregator.address).held_until_s
    snapshot = drawn.tester.take_snapshot()
    drawn.at(end + 1)
    with pytest.raises(Reverted, match="EvidenceTooLate") as error:
        report(drawn, proof)
    assert error.value.arguments == (end, end + 1)
    drawn.go_back(snapshot)
    drawn.at(end)
    assert taken(report(drawn, proof)) == STAKES[drawn.cohort.index(drawn.aggregator)]


def test_each_task_takes_what_it_recorded(drawn: World) -> None:
    """Whatever the other took of the same account."""
    second = (7, 8, 9, 10)
    drawn.publish("second", reward=1, min_stake_wei=0)
    drawn.deposit(drawn.cohort, second)
    drawn.close_and_draw(drawn.cohort, "second")
    expected = Counter({miner.address: a + b for miner, a, b in zip(drawn.cohort, STAKES, second, strict=True)})
    for task, recorded in ((TASK, STAKES), ("second", second)):
        culprit = drawn.aggregator_of(task)
        amount = taken(report(drawn, two_candidates(drawn, task)))
        assert amount == recorded[drawn.cohort.index(culprit)]
        expected[culprit.address] -= amount
        assert drawn.views.stakes.stake_of(culprit.address) == expected[culprit.address]
        assert drawn.views.stakes.get_hold(culprit.address).recorded_wei == expected[culprit.address]


def test_accomplices_do_not_take_a_recorded_stake(drawn: World) -> None:
    """A culprit convicts itself in a task of its own first, where the others are its friends: that saves it nothing."""
    culprit, friends = drawn.aggregator, drawn.miners[6:8]
    cohort = sorted([culprit, *friends], key=lambda miner: number(miner.address))
    drawn.publish("sham", min_stake_wei=0)
    applications = [drawn.application(miner, "sham", stake_wei=0) for miner in cohort]
    stakes = drawn.as_(drawn.publisher).stakes
    with pytest.raises(Reverted, match="CohortWithoutStake"):
        stakes.close_registration("sham", applications)
    drawn.deposit([culprit], [1])
    applications = [drawn.application(miner, "sham") for miner in cohort]
    assert [registration.stake_wei for registration, _ in applications].count(0) == 2
    stakes.close_registration("sham", applications)
    drawn.tester.mine_block()
    stakes.draw_aggregator("sham")
    assert drawn.aggregator_of("sham") == culprit
    assert taken(report(drawn, two_candidates(drawn, "sham"))) == 1
    assert taken(report(drawn, two_candidates(drawn))) == STAKES[drawn.cohort.index(culprit)]


def test_what_is_no_equivocation(drawn: World) -> None:
    first = drawn.candidate()
    second = drawn.candidate(correct=99)
    aggregator, miner = drawn.aggregator, drawn.others[0]
    honest = both_signed(drawn, aggregator, first, second)
    cases = {
        "one candidate": both_signed(drawn, aggregator, first, first),
        "two rounds": both_signed(drawn, aggregator, first, drawn.candidate(round_number=2)),
        "two tasks": both_signed(drawn, aggregator, first, drawn.candidate(task_id="another-task")),
        "two aggregators": both_signed(drawn, aggregator, first, drawn.candidate(aggregator=miner.address)),
        "first signature": (first, sign(first, drawn.domain, miner.key), *honest[2:]),
        "second signature": (*honest[:3], sign(second, drawn.domain, miner.key)),
    }
    for reason, proof in cases.items():
        with pytest.raises(Reverted, match="NoEquivocation") as error:
            report(drawn, proof)
        assert error.value.arguments == (reason,)


def test_signatures_for_another_deployment_are_no_equivocation(drawn: World) -> None:
    elsewhere = Domain(drawn.domain.chain_id, drawn.deployment.rewards)
    pair = [drawn.candidate(correct=correct) for correct in (1, 2)]
    first, second = (sign(candidate, elsewhere, drawn.aggregator.key) for candidate in pair)
    with pytest.raises(Reverted, match="NoEquivocation"):
        report(drawn, (pair[0], first, pair[1], second))


def test_only_the_block_publisher_slashes(drawn: World) -> None:
    words = list(drawn.cohort_on_chain.words)
    for account in (drawn.publisher, drawn.stranger, drawn.others[0]):
        with pytest.raises(Reverted, match="OnlyContract") as error:
            drawn.as_(account).stakes._transact(object, "slashEquivocation", TASK, drawn.aggregator.address, words)
        assert error.value.arguments == (account.address, drawn.deployment.publisher)
