"""2.2: one functional key for a round, ever, for exactly those who submitted, and of use to the aggregator alone."""

import json

import numpy as np
import pytest

from contracts.messages import Abort, AbortReason, AuditGrant, Collection, KeyGrant, KeyRequest, Submission, struct_hash
from tasks.chunks import Layout, put_manifest
from tasks.contribute import submitted_ciphertext
from tasks.crypto import ndd_fe
from tasks.crypto.ecies import Unopenable
from tasks.keys import KeyRefused, chunk_context, key_context, masks_of, open_scalars, signed_submissions, store_key
from tasks.opening import make_plan, sealed_key
from tasks.publish import published_task
from tests.protocol.world import TASK_ID, World


def smaller_request(world: World) -> KeyRequest:
    """Another request for the same round, without one of the miners."""
    request = world.find(KeyRequest, world.aggregator)
    left_out = request.miners.index(world.address(world.others[0]))
    keep = [index for index in range(len(request.miners)) if index != left_out]
    return request.model_copy(
        update={
            "miners": tuple(request.miners[index] for index in keep),
            "submissions": tuple(request.submissions[index] for index in keep),
        }
    )


def read_functional_key(world: World) -> np.ndarray:
    """The functional key as the aggregator reads it."""
    st = world.station(world.aggregator)
    plan = make_plan(st, published_task(st, TASK_ID), world.cohort(), world.find(KeyRequest, world.aggregator))
    key = sealed_key(st.store, plan)
    return key.scalars(key.layout.chunks, st.me, key_context("functional key", TASK_ID, 1, plan.request))


def test_the_aggregator_opens_the_key_and_the_sum_with_it(world_after):
    world = world_after("derive-key")
    key = read_functional_key(world)
    assert key.shape == (world.find(Submission, "miner-1").coordinates, 4)


def test_nobody_else_opens_the_sealed_key(world_after):
    world = world_after("derive-key")
    request = world.find(KeyRequest, world.aggregator)
    context = key_context("functional key", TASK_ID, 1, struct_hash(request))
    st = world.station(world.aggregator)
    key = sealed_key(st.store, make_plan(st, published_task(st, TASK_ID), world.cohort(), request))
    for index in key.layout.chunks:
        sealed = st.store.get(key.owner, key.digest(index))
        for name in ("publisher", *world.others):
            with pytest.raises(Unopenable):
                open_scalars(sealed, world.station(name).me, chunk_context(context, index), key.layout.length(index))
        assert len(open_scalars(sealed, st.me, chunk_context(context, index), key.layout.length(index)))


def test_a_second_key_for_other_miners_of_the_round_is_refused(world_after):
    world = world_after("derive-key")
    world.forge(smaller_request(world), signer=world.aggregator)
    with pytest.raises(KeyRefused, match="none is derived for"):
        world.do("derive-key", "publisher")


def test_a_store_that_hides_the_key_gets_the_same_one_again(world_after):
    world = world_after("derive-key")
    grant = world.find(KeyGrant, "publisher")
    world.record_file(KeyGrant, "publisher").unlink()
    assert world.do("derive-key", "publisher") == grant


def test_the_refusal_survives_a_kill_between_claim_and_grant_and_a_restart(world_after):
    """The publisher's own memory decides, and it is written before there is a key."""
    world = world_after("derive-key")
    world.forget(KeyGrant, "publisher")
    world.forge(smaller_request(world), signer=world.aggregator)
    world.close()
    again = World(world.folder, world.file)
    try:
        abort = again.do("derive-key", "publisher")
        assert isinstance(abort, Abort)
        assert abort.reason == AbortReason.KEY_REFUSED
        assert "two keys of one round" in abort.detail
        assert again.find(KeyGrant, "publisher") is None
    finally:
        again.close()


def test_a_killed_publisher_derives_the_same_key_for_the_same_request(world_after):
    world = world_after("derive-key")
    first = read_functional_key(world)
    world.forget(KeyGrant, "publisher")  # killed before the grant was signed
    world.do("derive-key", "publisher")
    assert (read_functional_key(world) == first).all()


def whole_ciphertext(world: World, submission: Submission) -> np.ndarray:
    ciphertext = submitted_ciphertext(world.store, submission, world.file.voting.chunk_coordinates)
    return ciphertext.points(ciphertext.layout.chunks)


def test_two_keys_of_one_round_would_reveal_a_single_update(world_after):
    """Why the refusal matters: with a second key, subtraction opens one miner's update."""
    from tasks.contribute import read_prepared

    world = world_after("derive-key")
    publisher, aggregator = world.station("publisher"), world.station(world.aggregator)
    cohort, full, partial = world.cohort(), world.find(KeyRequest, world.aggregator), smaller_request(world)
    sums = []
    for request in (full, partial):
        submissions = signed_submissions(publisher, cohort, request)
        weights = [1] * len(submissions)
        key = ndd_fe.derive_key(
            masks_of(publisher, cohort, submissions, "publisher"), weights, submissions[0].coordinates
        )
        sums.append(
            ndd_fe.open_sum(
                key,
                masks_of(aggregator, cohort, submissions, "aggregator"),
                [whole_ciphertext(world, one) for one in submissions],
                weights,
                bound=10**6,
            )[0]
        )
    victim = world.others[0]
    assert (sums[0] - sums[1]).tolist() == read_prepared(world.station(victim), TASK_ID, 1).values.tolist()


@pytest.mark.parametrize("kept", [1, 2])
def test_a_key_for_too_few_miners_is_refused(world_after, kept):
    """Together with its own update, an aggregator would see a single miner's."""
    world = world_after("audit")
    request = world.find(KeyRequest, world.aggregator)
    chosen = [request.miners.index(world.address(name)) for name in [world.aggregator, *world.others[:kept]]]
    small = request.model_copy(
        update={
            "miners": tuple(request.miners[index] for index in sorted(chosen)),
            "submissions": tuple(request.submissions[index] for index in sorted(chosen)),
        }
    )
    world.forge(small, signer=world.aggregator)
    abort = world.do("derive-key", "publisher")
    assert abort.reason == AbortReason.KEY_REFUSED
    assert "at least 3" in abort.detail


def test_a_miner_listed_twice_is_refused(world_after):
    """A weight of two would single it out."""
    world = world_after("audit")
    request = world.find(KeyRequest, world.aggregator)
    doubled = request.model_copy(
        update={
            "miners": (*request.miners, request.miners[-1]),
            "submissions": (*request.submissions, request.submissions[-1]),
        }
    )
    world.forge(doubled, signer=world.aggregator)
    with pytest.raises(ValueError, match="in address order, each once"):
        world.do("derive-key", "publisher")


def test_a_request_for_a_submission_that_its_miner_did_not_sign_is_refused(world_after):
    world = world_after("audit")
    request = world.find(KeyRequest, world.aggregator)
    invented = request.model_copy(update={"submissions": ("0x" + "ab" * 32, *request.submissions[1:])})
    world.forge(invented, signer=world.aggregator)
    assert "did not sign submission" in world.do("derive-key", "publisher").detail


def test_a_request_that_somebody_else_signed_is_refused(world_after):
    world = world_after("audit")
    request = world.find(KeyRequest, world.aggregator)
    world.forge(request, signer=world.others[0], as_name=world.aggregator)
    with pytest.raises(ValueError, match="is signed by"):
        world.do("derive-key", "publisher")


def test_a_second_set_of_audit_keys_is_refused(world_after):
    """Each set opens a few projections: many sets would open the update."""
    world = world_after("grant-audit")
    world.forget(AuditGrant, "publisher")
    collection = world.find(Collection, world.aggregator)
    world.forge(collection.model_copy(update={"reasons": ("x",), "refused": ()}), signer=world.aggregator)
    abort = world.do("grant-audit", "publisher")
    assert abort.reason == AbortReason.KEY_REFUSED
    assert "already has its audit" in abort.detail


def test_audit_keys_that_the_store_hides_are_never_for_other_projections(world_after):
    """Neither a hidden grant nor a kill before it was signed moves the audit to another block."""
    world = world_after("grant-audit")
    first = world.find(AuditGrant, "publisher")
    world.record_file(AuditGrant, "publisher").unlink()
    assert world.do("grant-audit", "publisher") == first
    world.forget(AuditGrant, "publisher")
    world.chain.wait_for_block(world.chain.web3.eth.block_number + 3)
    assert world.do("grant-audit", "publisher").block_number == first.block_number


def test_a_wrong_functional_key_ends_the_round_loudly(world_after):
    """A publisher that seals other scalars: recovery fails, and never yields a wrong number."""
    world = world_after("derive-key")
    grant, request = world.find(KeyGrant, "publisher"), world.find(KeyRequest, world.aggregator)
    st = world.station("publisher")
    layout = Layout(world.find(Submission, "miner-1").coordinates, world.file.voting.chunk_coordinates)
    context = key_context("functional key", TASK_ID, 1, struct_hash(request))
    recipient = world.cohort().aggregator_key
    digests = store_key(st.store, st.address, layout, layout.chunks, [b"\x07" * 32], [1], recipient, context)
    wrong = put_manifest(st.store, st.address, layout, digests)
    world.forge(grant.model_copy(update={"sealed_sha256": wrong}), signer="publisher")
    abort = world.do("aggregate", world.aggregator)
    assert abort.reason == AbortReason.RECOVERY_FAILED


@pytest.mark.parametrize("damage", ["missing", "truncated", "for another request"])
def test_a_key_that_cannot_be_opened_ends_the_round_with_the_reason(world_after, damage):
    world = world_after("derive-key")
    grant = world.find(KeyGrant, "publisher")
    if damage == "missing":
        world.record_file(KeyGrant, "publisher").unlink()
    elif damage == "truncated":
        blobs = world.folder / "store" / world.address("publisher").lower() / "blobs"
        blob = next(blobs.rglob(grant.sealed_sha256[2:]))
        blob.write_bytes(blob.read_bytes()[:-1])
    else:
        world.forge(grant.model_copy(update={"request": "0x" + "12" * 32}), signer="publisher")
    abort = world.do("aggregate", world.aggregator)
    assert abort.reason == AbortReason.DECRYPT_FAILED


def test_what_the_publisher_keeps_of_a_round_names_the_request_only(world_after):
    world = world_after("derive-key")
    kept = world.folder / "actors" / "publisher" / "private" / TASK_ID / "00001"
    request = world.find(KeyRequest, world.aggregator)
    assert (kept / "functional-key-for").read_text() == struct_hash(request)
    assert {path.name for path in kept.iterdir()} == {"functional-key-for", "audit-for", "audit-block"}
    assert json.loads(world.record_file(KeyGrant, "publisher").read_text())["message"]["request"] == struct_hash(
        request
    )
