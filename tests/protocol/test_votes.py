"""M5 and M6: what a lying aggregator would have to get past every single miner, and past the contract."""

import json

import numpy as np
import pytest
import torch

from contracts.bindings import CohortOnChain
from contracts.contributions import Opening, contributions_root
from contracts.messages import (
    AbortReason,
    Attestation,
    Candidate,
    Collection,
    Domain,
    KeyRequest,
    RoundResult,
    Submission,
    sign,
    struct_hash,
)
from contracts.sending import Reverted
from tasks import aggregate
from tasks.chunks import Layout, put_manifest
from tasks.global_model import build_network, model_after, next_model, opened_round, store_opening, weights_of
from tasks.learning.datasets import Dataset, decode_npz, encode_npz
from tasks.learning.models import encode_parameters
from tasks.settle import collect_votes
from tests.protocol.world import MINERS, TASK_ID, World


def verdicts(world: World) -> dict[str, str]:
    """What each miner but the aggregator says: empty for VALID, else its objection."""
    return {name: world.do("attest", name).reason for name in world.others}


def republish(world: World, **changes: object) -> None:
    """The aggregator signs a changed result and a candidate to match."""
    result, candidate = world.find(RoundResult, world.aggregator), world.find(Candidate, world.aggregator)
    if "model_sha256" in changes:
        changes.setdefault("model_uri", f"artifact:{result.aggregator}/{changes['model_sha256']}")
    candidate = candidate.model_copy(update={name: changes[name] for name in changes if name in Candidate.model_fields})
    result = result.model_copy(
        update={name: changes[name] for name in changes if name in RoundResult.model_fields}
        | {"candidate": struct_hash(candidate)}
    )
    world.forge(candidate, signer=world.aggregator)
    world.forge(result, signer=world.aggregator)


def publish_opening(world: World, weighted_sum: np.ndarray, blinding: np.ndarray) -> None:
    """Publish another opening, with the model that follows from it: everything consistent but the sum."""
    st, spec, cohort = world.station(world.aggregator), world.file.spec(), world.cohort()
    request = aggregate.accepted(st, cohort, 1)
    model = next_model(spec, model_after(st, spec, cohort, 0), 1, weighted_sum, sum(weights_of(cohort, request)))
    layout = Layout(len(weighted_sum), spec.voting.chunk_coordinates)
    digests = store_opening(st.store, st.address, layout, weighted_sum, blinding)
    opening_sha256 = put_manifest(st.store, st.address, layout, digests)
    st.store.put(st.address, encode_parameters(model.parameters))
    republish(world, opening_sha256=opening_sha256, model_sha256=model.sha256)


def true_opening(world: World) -> tuple[np.ndarray, np.ndarray]:
    st, spec = world.station(world.aggregator), world.file.spec()
    opening = opened_round(st, spec, world.cohort(), 1, at_most=10_000)[1]
    return opening.opened(opening.layout.chunks)


def test_an_honest_candidate_is_accepted_by_everybody(world_after):
    world = world_after("open-validation")
    assert set(verdicts(world).values()) == {""}


def test_a_sum_changed_in_one_coordinate_is_caught_by_every_miner_that_checks_the_chunk(world_after):
    world = world_after("open-validation")
    weighted_sum, blinding = true_opening(world)
    weighted_sum = weighted_sum.copy()
    weighted_sum[70] += 1
    publish_opening(world, weighted_sum, blinding)
    for objection in verdicts(world).values():
        assert "does not open the ciphertexts at coordinate 70" in objection


def test_a_changed_sum_with_a_changed_blinding_is_caught_too(world_after):
    world = world_after("open-validation")
    weighted_sum, blinding = true_opening(world)
    weighted_sum, blinding = weighted_sum.copy(), blinding.copy()
    weighted_sum[3] -= 5
    blinding[3, 0] += np.uint64(5)
    publish_opening(world, weighted_sum, blinding)
    assert all("at coordinate 3" in objection for objection in verdicts(world).values())


def test_a_model_that_is_not_the_step_of_the_opened_sum_is_refused(world_after):
    world = world_after("open-validation")
    st = world.station(world.aggregator)
    parameters = model_after(st, world.file.spec(), world.cohort(), 1).parameters.copy()
    parameters[0] += np.float32(0.25)
    other = st.store.put(st.address, encode_parameters(parameters))
    republish(world, model_sha256=other.sha256)
    assert all("is not W_0 plus the server step" in objection for objection in verdicts(world).values())


def test_a_claimed_accuracy_that_does_not_come_out_is_refused(world_after):
    world = world_after("open-validation")
    candidate = world.find(Candidate, world.aggregator)
    republish(world, correct=candidate.correct + 1)
    assert all("the candidate claims" in objection for objection in verdicts(world).values())


def test_without_the_validation_set_a_wrong_accuracy_is_not_seen_and_the_rest_still_is(world_after):
    """What open_validation = false gives up, stated."""
    world = world_after("open-validation", voting__open_validation=False)
    candidate = world.find(Candidate, world.aggregator)
    republish(world, correct=candidate.correct + 1)
    assert set(verdicts(world).values()) == {""}


def test_a_missing_score_commitment_is_refused(world_after):
    world = world_after("open-validation")
    candidate = world.find(Candidate, world.aggregator)
    republish(world, participants=candidate.participants[1:], score_commits=candidate.score_commits[1:])
    assert all("score commitments are not those" in objection for objection in verdicts(world).values())


def test_an_exchanged_score_commitment_is_refused(world_after):
    world = world_after("open-validation")
    candidate = world.find(Candidate, world.aggregator)
    republish(world, score_commits=candidate.score_commits[::-1])
    assert all("score commitments are not those" in objection for objection in verdicts(world).values())


def test_a_model_that_is_worse_on_the_own_samples_is_refused(world_after):
    """A miner whose samples agree with W_0 entirely: any step away from it is worse, and within no tolerance."""
    world = world_after("open-validation", voting__tolerance=0.0)
    content = world.others[0]
    data = world.folder / "actors" / content / "data.npz"
    own = decode_npz(data.read_bytes(), "train", 10)
    spec = world.file.spec()
    with torch.no_grad():
        answers = build_network(spec)(torch.from_numpy(own.features)).argmax(dim=1).numpy()
    data.write_bytes(encode_npz(Dataset(own.features, answers.astype(np.int64), 10)))
    assert "the model got worse" in world.do("attest", content).reason
    assert world.do("attest", world.others[1]).reason == ""


def test_a_model_address_that_leads_elsewhere_is_refused(world_after):
    world = world_after("open-validation")
    republish(world, model_uri="https://elsewhere.example/model.bin")
    assert all("does not name its model" in objection for objection in verdicts(world).values())


def test_a_publisher_that_withholds_the_validation_set_does_not_turn_a_good_model_into_a_refund(world_after):
    world = world_after("aggregate")
    world.everybody("attest")
    world.do("publish-block", world.aggregator)
    assert world.contracts.publisher.get_block_meta(TASK_ID).votes == len(MINERS) - 1


def test_a_store_that_hides_what_an_aggregator_signed_does_not_make_it_sign_another_candidate(world_after):
    """Two signed candidates of one round would cost it its stake."""
    world = world_after("aggregate")
    kinds = (Collection, KeyRequest, RoundResult, Candidate)
    signed = [world.find(kind, world.aggregator) for kind in kinds]
    for kind in kinds:
        world.record_file(kind, world.aggregator).unlink()
    world.record_file(Submission, world.others[0]).unlink()
    for step in ("collect", "audit", "aggregate"):
        world.do(step, world.aggregator)
    assert [world.find(kind, world.aggregator) for kind in kinds] == signed


def test_a_candidate_signed_by_another_miner_is_no_candidate(world_after):
    world = world_after("open-validation")
    candidate = world.find(Candidate, world.aggregator)
    world.forge(candidate, signer=world.others[0], as_name=world.aggregator)
    with pytest.raises(ValueError, match="is signed by"):
        world.do("attest", world.others[1])


def test_a_verdict_is_given_once(world_after):
    world = world_after("attest")
    first = world.find(Attestation, world.others[0])
    weighted_sum, blinding = true_opening(world)
    publish_opening(world, weighted_sum + 1, blinding)
    assert world.do("attest", world.others[0]) == first


def test_the_chain_shows_the_block_and_its_votes(world_after):
    world = world_after("publish-block")
    block, candidate = world.contracts.publisher.get_block_meta(TASK_ID), world.find(Candidate, world.aggregator)
    assert block.candidate_hash == struct_hash(candidate)
    assert (block.correct, block.total) == (candidate.correct, candidate.total)
    assert block.votes == len(MINERS) - 1
    assert world.contracts.publisher.get_candidate(TASK_ID) == candidate
    assert block.contributions_root == contributions_root(candidate.participants, candidate.score_commits)


def test_publishing_twice_sends_one_transaction(world_after):
    world = world_after("publish-block")
    first = world.do("publish-block", world.aggregator)
    assert world.do("publish-block", world.aggregator) == first
    assert [done.kind for done in world.chain.transactions(TASK_ID)].count("publishBlock") == 1


def test_a_rejected_candidate_ends_the_task_and_is_never_published(world_after):
    world = world_after("open-validation")
    weighted_sum, blinding = true_opening(world)
    publish_opening(world, weighted_sum + 1, blinding)
    world.everybody("attest")
    abort = world.do("publish-block", world.aggregator)
    assert abort.reason == AbortReason.CANDIDATE_REJECTED
    assert "0 accepting votes, 3 are required" in abort.detail
    assert world.contracts.publisher.get_block_meta(TASK_ID) is None


def test_one_silent_voter_is_tolerated_and_two_are_not(world_after):
    world = world_after("attest")
    world.record_file(Attestation, world.others[0]).unlink()
    votes, said = collect_votes(
        world.station(world.aggregator), world.cohort(), world.find(Candidate, world.aggregator)
    )
    assert len(votes) == 3
    assert said[world.address(world.others[0])] == "no vote"
    world.record_file(Attestation, world.others[1]).unlink()
    assert world.do("publish-block", world.aggregator).reason == AbortReason.CANDIDATE_REJECTED


def vote_of(world: World, name: str) -> Attestation:
    found = world.find(Attestation, name)
    assert isinstance(found, Attestation)
    return found


@pytest.mark.parametrize("kind", ["another round", "another candidate", "another chain", "another miner", "malformed"])
def test_a_vote_that_is_not_for_exactly_this_candidate_does_not_count(world_after, kind):
    world = world_after("attest")
    name, thief = world.others[:2]
    vote, path = vote_of(world, name), world.record_file(Attestation, name)
    identity = world.stack.identity(name)
    if kind == "another round":
        body = vote.model_copy(update={"round_number": 2})
        signature = identity.sign(body, world.chain.domain)
    elif kind == "another candidate":
        body = vote.model_copy(update={"candidate": "0x" + "77" * 32})
        signature = identity.sign(body, world.chain.domain)
    elif kind == "another chain":
        body = vote
        signature = sign(vote, Domain(1, world.chain.publisher_address), bytes(identity.account.key))
    elif kind == "another miner":
        body = vote
        signature = world.stack.identity(thief).sign(vote, world.chain.domain)
    else:
        body, signature = vote, "0x1234"
    path.write_text(json.dumps({"message": body.model_dump(mode="json"), "signature": signature}))
    votes, said = collect_votes(
        world.station(world.aggregator), world.cohort(), world.find(Candidate, world.aggregator)
    )
    assert len(votes) == 3
    assert said[world.address(name)].startswith("refused")
    world.do("publish-block", world.aggregator)
    assert world.contracts.publisher.get_block_meta(TASK_ID).votes == 3


def closed(world: World) -> CohortOnChain:
    return world.contracts.stakes.get_cohort(TASK_ID)


def test_the_contract_counts_no_vote_twice_and_none_of_a_stranger(world_after):
    world = world_after("attest")
    candidate = world.find(Candidate, world.aggregator)
    votes, _ = collect_votes(world.station(world.aggregator), world.cohort(), candidate)
    publisher = world.contracts_as(world.aggregator).publisher
    with pytest.raises(Reverted):
        publisher.publish_block(candidate, [votes[0], votes[0], votes[0]], closed(world))
    stranger = world.stack.identity("publisher").sign(vote_of(world, world.others[0]), world.chain.domain)
    with pytest.raises(Reverted):
        publisher.publish_block(candidate, [*votes[:2], stranger], closed(world))


def test_only_the_drawn_aggregator_publishes(world_after):
    world = world_after("attest")
    candidate = world.find(Candidate, world.aggregator)
    votes, _ = collect_votes(world.station(world.aggregator), world.cohort(), candidate)
    for name in ("publisher", world.others[0]):
        with pytest.raises(Reverted, match="NotAggregator"):
            world.contracts_as(name).publisher.publish_block(candidate, votes, closed(world))


def test_a_candidate_changed_after_the_vote_is_not_published(world_after):
    world = world_after("attest")
    candidate = world.find(Candidate, world.aggregator)
    votes, _ = collect_votes(world.station(world.aggregator), world.cohort(), candidate)
    better = candidate.model_copy(update={"correct": candidate.total})
    with pytest.raises(Reverted):
        world.contracts_as(world.aggregator).publisher.publish_block(better, votes, closed(world))


def test_a_publication_that_the_chain_refuses_is_an_abort_with_the_reason(world_after, monkeypatch):
    world = world_after("attest")
    from tasks import settle

    honest = settle.collect_votes
    monkeypatch.setattr(settle, "collect_votes", lambda *given: (honest(*given)[0][::-1], {}))  # not in address order
    abort = world.do("publish-block", world.aggregator)
    assert abort.reason == AbortReason.PUBLISH_FAILED


@pytest.mark.parametrize(
    ("step", "error"), [("revealed by a stranger", "NotEntitled"), ("a wrong accuracy", "InvalidReveal")]
)
def test_a_wrong_reveal_of_the_accuracy_is_refused(world_after, step, error):
    world = world_after("publish-block")
    from tasks.publish import secrets_of

    fields = secrets_of(world.station("publisher"), TASK_ID)
    salt = bytes.fromhex(fields["salt"])
    name = world.others[0] if step == "revealed by a stranger" else "publisher"
    accuracy = fields["accuracy_ppm"] + (0 if name != "publisher" else 1)
    with pytest.raises(Reverted, match=error):
        world.contracts_as(name).rewards.reveal_accuracy(TASK_ID, accuracy, salt)


def test_a_late_reveal_of_the_accuracy_is_refused(world_after):
    world = world_after("publish-block")
    end = world.contracts.rewards.get_settlement(TASK_ID).publisher_reveal_end_s
    world.chain.wait_until(end + 1, "the end of the publisher's window")
    with pytest.raises(Reverted, match="RevealTooLate"):
        world.do("reveal-accuracy", "publisher")


def test_another_score_than_the_committed_one_is_refused(world_after):
    world = world_after("reveal-accuracy")
    from tasks.contribute import read_prepared

    prepared = read_prepared(world.station("miner-1"), TASK_ID, 1)
    own = world.contracts.publisher.place_of(TASK_ID, world.address("miner-1"))
    with pytest.raises(Reverted, match="NotParticipant"):
        world.contracts_as("miner-1").rewards.reveal_score(
            TASK_ID, Opening(prepared.score + 1, prepared.score_salt, own)
        )
