"""What a miner, or somebody in its name, may hand in wrongly: each is refused with its reason, and the round goes on."""

import json

import numpy as np
import pytest

from contracts.messages import (
    AbortReason,
    Attestation,
    Collection,
    Domain,
    KeyRequest,
    RoundResult,
    Submission,
    sign,
    struct_hash,
)
from tasks.chunks import chunk_root, put_manifest
from tasks.contribute import Ciphertext, TooLate, label_of, read_prepared, submitted_ciphertext
from tasks.crypto import ndd_fe
from tasks.global_model import model_after
from tasks.records import record_path
from tests.protocol.world import MINERS, TASK_ID, World


def refused(world: World) -> dict[str, str]:
    """Collect, and say whom the aggregator refused and why."""
    collection = world.do("collect", world.aggregator)
    assert isinstance(collection, Collection)
    return {world.name(miner): why for miner, why in zip(collection.refused, collection.reasons, strict=True)}


def finish_round(world: World) -> RoundResult:
    world.through("aggregate", after="collect")
    result = world.find(RoundResult, world.aggregator)
    assert isinstance(result, RoundResult)
    return result


def change(world: World, name: str, **fields: object) -> Submission:
    """Sign a changed submission with the miner's own key and put it in the place of the first."""
    submission = world.find(Submission, name).model_copy(update=fields)
    world.forge(submission, signer=name)
    return submission


def test_all_good_submissions_are_accepted(world_after):
    world = world_after("submit")
    assert refused(world) == {}
    assert finish_round(world).total > 0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"round_number": 2}, "signed for test-task-1 round 2, not for test-task-1 round 1"),
        ({"task_id": "another-task"}, "signed for another-task"),
        ({"coordinates": 7}, "7 coordinates"),
        ({"base_model_sha256": "0x" + "ab" * 32}, "trained from model 0xabab"),
        ({"salt": "0x00"}, "malformed Submission: 1 validation error for Submission salt"),
        ({"sample_count": 4_000_000}, "sample_count = 4000000, registered are"),
        ({"ciphertext_root": "0x" + "cd" * 32}, "do not hash to the root"),
        ({"chunks_sha256": "0x" + "ee" * 32}, "is not in the store"),
    ],
)
def test_a_signed_submission_with_one_wrong_field_is_refused(world_after, fields, reason):
    world = world_after("submit")
    culprit = world.others[0]
    submission = world.find(Submission, culprit).model_copy(update=fields)
    path = world.record_file(Submission, culprit)
    body = {
        "message": submission.model_dump(mode="json"),
        "signature": world.stack.identity(culprit).sign(submission, world.chain.domain),
    }
    path.write_text(json.dumps({"kind": "Submission", **body}))
    why = refused(world)
    assert list(why) == [culprit]
    assert reason in why[culprit]
    assert finish_round(world)


def test_a_submission_signed_by_somebody_else_is_refused(world_after):
    world = world_after("submit")
    victim, forger = world.others[:2]
    world.forge(world.find(Submission, victim), signer=forger, as_name=victim)
    assert "is signed by" in refused(world)[victim]


def test_another_miners_submission_under_the_own_signature_is_refused(world_after):
    world = world_after("submit")
    victim, thief = world.others[:2]
    world.forge(world.find(Submission, victim), signer=thief)
    assert "speaks for" in refused(world)[thief]


def test_a_submission_signed_for_another_chain_or_contract_is_refused(world_after):
    world = world_after("submit")
    culprit = world.others[0]
    submission = world.find(Submission, culprit)
    elsewhere = Domain(chain_id=1, verifying_contract=world.chain.publisher_address)
    key = bytes(world.stack.identity(culprit).account.key)
    body = {"message": submission.model_dump(mode="json"), "signature": sign(submission, elsewhere, key)}
    world.record_file(Submission, culprit).write_text(json.dumps(body))
    assert "for this chain and contract" in refused(world)[culprit]


@pytest.mark.parametrize("data", [b"", b"{", b"null", b'{"message": {}}', b"\xff\xfe", b"[" * 10_000, b"x" * 1_000_000])
def test_a_record_that_is_no_record_is_refused(world_after, data):
    world = world_after("submit")
    culprit = world.others[0]
    world.record_file(Submission, culprit).write_bytes(data)
    assert list(refused(world)) == [culprit]


def test_a_missing_submission_is_noted_and_the_round_goes_on(world_after):
    """A miner that died in training."""
    world = world_after("submit")
    dead = world.others[0]
    world.record_file(Submission, dead).unlink()
    assert refused(world) == {dead: "nothing submitted in time"}
    finish_round(world)
    assert world.address(dead) not in world.find(KeyRequest, world.aggregator).miners


def test_too_few_submissions_end_the_task(world_after):
    world = world_after("submit")
    for dead in world.others[:2]:
        world.record_file(Submission, dead).unlink()
    abort = world.do("collect", world.aggregator)
    assert abort.reason == AbortReason.NOT_ENOUGH_SUBMISSIONS
    assert "2 submissions beside the aggregator's own, at least 3" in abort.detail


def test_a_late_submission_is_refused_at_the_miner_and_not_counted(world_after):
    world = world_after("submit")
    late = world.others[0]
    record = world.record_file(Submission, late)
    kept = world.forget(Submission, late)
    world.do("collect", world.aggregator)
    with pytest.raises(TooLate, match="closed by the aggregator"):
        world.do("submit", late)
    record.write_bytes(kept)  # pushed into the store all the same
    finish_round(world)
    assert world.address(late) not in world.find(KeyRequest, world.aggregator).miners


def test_submitting_twice_hands_in_one_submission(world_after):
    world = world_after("submit")
    first = world.find(Submission, "miner-1")
    assert world.do("submit", "miner-1") == first


def ciphertext_of(world: World, name: str) -> Ciphertext:
    size = world.file.voting.chunk_coordinates
    return submitted_ciphertext(world.store, world.find(Submission, name), size)


def tamper_chunk(world: World, name: str, data: bytes) -> None:
    """Replace the miner's first chunk by other bytes, properly listed and signed."""
    ciphertext = ciphertext_of(world, name)
    digests = [ciphertext.digest(index) for index in ciphertext.layout.chunks]
    digests[0] = world.store.put(ciphertext.owner, data).sha256
    listing = put_manifest(world.store, ciphertext.owner, ciphertext.layout, digests)
    change(world, name, ciphertext_root=chunk_root(digests), chunks_sha256=listing)


def first_chunk(world: World, name: str) -> bytes:
    ciphertext = ciphertext_of(world, name)
    return world.store.get(ciphertext.owner, ciphertext.digest(0))


def test_points_off_the_curve_are_refused(world_after):
    world = world_after("submit")
    culprit = world.others[0]
    data = bytearray(first_chunk(world, culprit))
    data[0] ^= 1
    tamper_chunk(world, culprit, bytes(data))
    assert "chunk 0" in refused(world)[culprit]


@pytest.mark.parametrize("cut", [64, 1])
def test_a_chunk_of_the_wrong_length_is_refused(world_after, cut):
    world = world_after("submit")
    culprit = world.others[0]
    tamper_chunk(world, culprit, first_chunk(world, culprit)[:-cut])
    assert "chunk 0" in refused(world)[culprit]


def test_an_oversized_chunk_is_refused_before_it_is_read(world_after):
    world = world_after("submit")
    culprit = world.others[0]
    tamper_chunk(world, culprit, first_chunk(world, culprit) * 3)
    assert "bytes, at most" in refused(world)[culprit]


def test_a_truncated_artifact_is_refused(world_after):
    world = world_after("submit")
    culprit = world.others[0]
    ciphertext = ciphertext_of(world, culprit)
    blob = next((world.folder / "store" / ciphertext.owner.lower() / "blobs").rglob(ciphertext.digest(0)[2:]))
    blob.write_bytes(blob.read_bytes()[:-64])
    assert "truncated or changed" in refused(world)[culprit]


def audited_out(world: World) -> dict[str, str]:
    world.do("collect", world.aggregator)
    world.do("grant-audit", "publisher")
    request = world.do("audit", world.aggregator)
    assert isinstance(request, KeyRequest)
    return {world.name(miner): why for miner, why in zip(request.refused, request.reasons, strict=True)}


def test_a_miner_whose_ciphertext_is_garbage_is_named_and_the_round_goes_on(world_after):
    """Points on the curve that encrypt nothing: only the audit can tell whose they are."""
    world = world_after("submit")
    culprit = world.others[0]
    garbage = ndd_fe.encrypt(np.zeros(64, np.int64), b"\x01" * 32, b"\x02" * 32, bound=1)
    tamper_chunk(world, culprit, ndd_fe.encode_points(garbage))
    why = audited_out(world)
    assert list(why) == [culprit]
    assert "malformed ciphertext" in why[culprit]
    world.through("aggregate", after="audit")
    expected = weighted_sum_of(world, [name for name in MINERS if name != culprit])
    assert opened_sum(world).tolist() == expected.tolist()


def test_a_copied_ciphertext_is_refused(world_after):
    """The thief's own signature over another miner's chunks: the masks do not fit the thief's keys."""
    world = world_after("submit")
    victim, thief = world.others[:2]
    copied = world.find(Submission, victim)
    ciphertext, address = ciphertext_of(world, victim), world.address(thief)
    digests = [ciphertext.digest(index) for index in ciphertext.layout.chunks]
    for digest in digests:
        world.store.put(address, world.store.get(ciphertext.owner, digest))
    listing = put_manifest(world.store, address, ciphertext.layout, digests)
    change(world, thief, ciphertext_root=copied.ciphertext_root, chunks_sha256=listing, salt=copied.salt)
    assert list(audited_out(world)) == [thief]


def test_a_value_far_past_the_bound_is_refused(world_after):
    world = world_after("submit")
    culprit = world.others[0]
    st, cohort, submission = world.station(culprit), world.cohort(), world.find(Submission, culprit)
    label = label_of(st, TASK_ID, 1, st.address)
    masks = (
        st.me.mask_key(cohort.publisher_key, "publisher", label, submission.salt),
        st.me.mask_key(cohort.aggregator_key, "aggregator", label, submission.salt),
    )
    values = read_prepared(st, TASK_ID, 1).values[:64].copy()
    values[3] = 2**40
    points = ndd_fe.encrypt(values, *masks, bound=2**41)
    tamper_chunk(world, culprit, ndd_fe.encode_points(points))
    assert list(audited_out(world)) == [culprit]


def test_a_coordinate_past_the_bound_that_passes_the_audit_moves_nothing_and_stops_nobody(world_after):
    """The audit bounds a projection: one coordinate can hide in it. The true sum is published, and the model ignores it."""
    world = world_after("submit")
    culprit = world.others[0]
    st, cohort, submission = world.station(culprit), world.cohort(), world.find(Submission, culprit)
    label = label_of(st, TASK_ID, 1, st.address)
    masks = (
        st.me.mask_key(cohort.publisher_key, "publisher", label, submission.salt),
        st.me.mask_key(cohort.aggregator_key, "aggregator", label, submission.salt),
    )
    values = read_prepared(st, TASK_ID, 1).values[:64].copy()
    values[3] = 150_000
    tamper_chunk(world, culprit, ndd_fe.encode_points(ndd_fe.encrypt(values, *masks, bound=2**20)))
    assert audited_out(world) == {}
    world.through("attest", after="audit")
    weight = cohort.weights[cohort.miners.index(world.address(culprit))]
    honest = weighted_sum_of(world, list(MINERS))
    assert opened_sum(world)[3] == honest[3] + weight * (150_000 - read_prepared(st, TASK_ID, 1).values[3])
    position = read_prepared(st, TASK_ID, 1).support[3]
    spec = world.file.spec()
    before, after = (model_after(st, spec, cohort, number).parameters[position] for number in (0, 1))
    assert before == after
    assert {world.find(Attestation, name).accepted for name in MINERS} == {True}


def test_the_masks_of_a_submission_are_bound_to_its_miner(world_after):
    """With a stolen or shared key, another's ciphertext under the own name would still not fit."""
    world = world_after("submit")
    victim, thief = world.station(world.others[0]), world.station(world.others[1])
    cohort, salt = world.cohort(), world.find(Submission, world.others[0]).salt
    own, stolen = (
        victim.me.mask_key(cohort.publisher_key, "publisher", label_of(victim, TASK_ID, 1, address), salt)
        for address in (victim.address, thief.address)
    )
    assert own != stolen


def opened_sum(world: World) -> np.ndarray:
    from tasks.global_model import opened_round

    station, spec, cohort = world.station("publisher"), world.file.spec(), world.cohort()
    return opened_round(station, spec, cohort, 1, at_most=10_000)[1].weighted_sum()


def weighted_sum_of(world: World, names: list[str]) -> np.ndarray:
    cohort = world.cohort()
    weight = dict(zip(cohort.miners, cohort.weights, strict=True))
    return sum(weight[world.address(name)] * read_prepared(world.station(name), TASK_ID, 1).values for name in names)


def test_what_is_opened_is_the_weighted_sum_of_the_private_updates(world_after):
    world = world_after("aggregate")
    assert opened_sum(world).tolist() == weighted_sum_of(world, list(MINERS)).tolist()


def test_a_miner_that_missed_a_round_takes_part_in_the_next(world_after):
    world = world_after("submit", required_accuracy=0.999)
    absent = world.others[0]
    world.record_file(Submission, absent).unlink()
    world.through("aggregate", after="submit")
    for step in ("train", "submit", "collect", "grant-audit", "audit", "derive-key", "aggregate"):
        world.everybody(step, 2)
    assert world.address(absent) in world.find(KeyRequest, world.aggregator, 2).miners


def test_what_a_refused_round_had_sent_is_sent_later(world_after):
    """Error feedback: a submission that did not count goes back into the miner's residual."""
    from tasks.contribute import _memory_before
    from tasks.learning.compression import dequantize

    world = world_after("submit", required_accuracy=0.999)
    absent = world.others[0]
    world.record_file(Submission, absent).unlink()
    world.through("aggregate", after="submit")
    st, spec = world.station(absent), world.file.spec()
    prepared = read_prepared(st, TASK_ID, 1)
    memory, score = _memory_before(st, spec, world.cohort(), 2, prepared.memory.residual.size)
    expected = prepared.memory.residual.copy()
    expected[prepared.support] += dequantize(prepared.values, scale=spec.compression.scale)
    assert np.array_equal(memory.residual, expected)
    assert score == 0


def test_a_salt_is_never_accepted_twice(world_after):
    world = world_after("aggregate", required_accuracy=0.999)
    world.everybody("train", 2)
    world.everybody("submit", 2)
    culprit = world.others[0]
    again = world.find(Submission, culprit, 2).model_copy(update={"salt": world.find(Submission, culprit, 1).salt})
    world.forge(again, signer=culprit, r=2)
    collection = world.do("collect", world.aggregator, 2)
    assert "was used in round 1 already" in collection.reasons[0]


def test_the_names_of_submissions_bind_their_content(world_after):
    world = world_after("submit")
    submission = world.find(Submission, "miner-1")
    names = {struct_hash(submission)}
    for field, value in (("coordinates", 1), ("salt", "0x" + "00" * 16), ("score_commit", "0x" + "00" * 32)):
        names.add(struct_hash(submission.model_copy(update={field: value})))
    assert len(names) == 4
    assert record_path(Submission, TASK_ID, 1) == f"{TASK_ID}/00001/Submission.json"
