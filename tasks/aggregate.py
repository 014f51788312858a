"""M4 and 2.2. Collect, derive the functional key for exactly those who submitted, open the sum, step, evaluate.

Algorithms 4 and 2.2 of the protocol. The publisher derives one functional key for a round, ever: what it derived for is
in its home before the key leaves, so that a second key for other submissions is refused, after a restart too.
"""

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import Field

from blocks.artifacts import MissingArtifact, TamperedArtifact, sha256_hex
from contracts.messages import (
    ZERO32,
    AbortReason,
    Address,
    AuditGrant,
    Candidate,
    Cohort,
    Collection,
    Delivery,
    Frozen,
    KeyGrant,
    KeyRequest,
    Registration,
    RoundResult,
    Submission,
    accuracy_commit,
    struct_hash,
)
from contracts.task_spec import PPM, PublishedTask, TaskSpec
from tasks.cohort import delivery_context, registered_samples, trusted_cohort
from tasks.contribute import chunk_digests, label_of, read_chunk
from tasks.crypto import ecies, ndd_fe
from tasks.dispatch import report_progress
from tasks.global_model import (
    accepted,
    build_network,
    check_listing,
    encode_opening,
    model_after,
    next_model,
    round_support,
    weights_of,
)
from tasks.learning.datasets import Dataset, decode_npz
from tasks.learning.models import encode_parameters
from tasks.learning.training import Evaluation, evaluate
from tasks.publish import published_task
from tasks.records import BadRecord, Station, brief, give_up, parse_json, station
from tasks.show import show_progress, show_table

Points = npt.NDArray[np.uint64]

MAX_EXCESSIVE = 64  # coordinates beyond the bound that are searched further, a fraction of a second each
MAX_SEARCH = 2**40


class KeyRefused(RuntimeError):
    """The publisher does not derive this functional key: it would say more than the task announces."""


@task(persist_result=False, cache_policy=NO_CACHE)
def collect_submissions(task_id: str, round_number: int, actor: str) -> dict[str, str]:
    """M4, the aggregator: check every submission's form, drop what is wrong with the reason, close the round."""
    st = station(actor)
    if said := st.said(Collection, task_id, round_number):
        return said
    terms, cohort = published_task(st, task_id), trusted_cohort(st, task_id)
    try:
        delivered_requirement(st, terms)
        delivered_validation(st, terms, 0)
    except (BadRecord, MissingArtifact, TamperedArtifact, ecies.Unopenable) as error:
        # Before anybody's submission is used: without these the round could not be judged.
        return give_up(st, task_id, round_number, "collect", AbortReason.DECRYPT_FAILED, f"delivery: {brief(error)}")
    model = model_after(st, terms.spec, cohort, round_number - 1)
    coordinates = len(round_support(terms.spec, model, round_number))
    good: dict[Address, Submission] = {}
    refused: dict[Address, str] = {}
    for miner in cohort.miners:
        try:
            good[miner] = check_submission(st, terms, miner, round_number, model.sha256, coordinates)
        except BadRecord as error:
            refused[miner] = brief(error)
    if shortage := too_few(terms, cohort, round_number, good, refused):
        return give_up(st, task_id, round_number, "collect", AbortReason.NOT_ENOUGH_SUBMISSIONS, shortage)
    return st.post(
        Collection(
            task_id=task_id,
            round_number=round_number,
            aggregator=st.address,
            miners=tuple(good),
            submissions=tuple(struct_hash(submission) for submission in good.values()),
            refused=tuple(refused),
            reasons=tuple(refused.values()),
        )
    )


def too_few(
    terms: PublishedTask,
    cohort: Cohort,
    round_number: int,
    good: Iterable[Address],
    refused: dict[Address, str],
) -> str:
    """Why these submissions are not enough, or an empty string. The aggregator knows its own, so it hides nobody."""
    others = [miner for miner in good if miner != cohort.aggregator]
    least = terms.spec.participants.submissions_min
    if len(others) >= least:
        return ""
    return (
        f"round {round_number}: {len(others)} submissions beside the aggregator's own, at least {least} are needed; "
        f"refused: {refused or 'none'}"
    )[:2000]


@task(persist_result=False, cache_policy=NO_CACHE)
def grant_audit(task_id: str, round_number: int, actor: str) -> dict[str, str]:
    """M4, the publisher: keys for the announced projections of each collected submission, once a round."""
    st = station(actor)
    if said := st.said(AuditGrant, task_id, round_number):
        return said
    terms, cohort = published_task(st, task_id), trusted_cohort(st, task_id)
    collection = st.need(Collection, cohort.aggregator, task_id, round_number)
    name = struct_hash(collection)
    try:
        submissions = signed_submissions(st, cohort, collection)
        claim_round(st, task_id, round_number, "audit", name)
    except (BadRecord, KeyRefused, MissingArtifact) as error:
        return give_up(st, task_id, round_number, "grant-audit", AbortReason.KEY_REFUSED, str(error))
    # A block that did not exist when the submissions were signed: nobody could fit a ciphertext to the vectors. Claimed
    # before any key exists, so that no retry, and no store that hides the grant, has further projections opened.
    following = str(st.chain.web3.eth.block_number + 1).encode()
    block_number = int(st.me.claim(f"{task_id}/{round_number:05d}/audit-block", following))
    st.chain.wait_for_block(block_number)
    vectors = audit_vectors(st, terms, block_number, submissions[0].coordinates)
    masks = masks_of(st, cohort, submissions, "publisher")
    keys = np.concatenate([ndd_fe.derive_projection_key(mask, vectors) for mask in masks])
    sealed = ecies.seal(
        ndd_fe.encode_scalars(keys),
        bytes.fromhex(cohort.aggregator_key[2:]),
        ephemeral_seed=secrets.token_bytes(48),
        context=key_context("audit", task_id, round_number, name),
    )
    return st.post(
        AuditGrant(
            task_id=task_id,
            round_number=round_number,
            publisher=st.address,
            collection=name,
            block_number=block_number,
            sealed_sha256=st.store.put(st.address, sealed).sha256,
        )
    )


@task(persist_result=False, cache_policy=NO_CACHE)
def audit_submissions(task_id: str, round_number: int, actor: str) -> dict[str, str]:
    """M4, the aggregator: drop the miners whose ciphertext is malformed; ask for the key for exactly the others.

    A projection <x, a> of a well-formed update is small, so its discrete logarithm is found; that of anything else is
    a random point. Without this, one bad ciphertext would spoil the sum of all.
    """
    st = station(actor)
    if said := st.said(KeyRequest, task_id, round_number):
        return said
    terms, cohort = published_task(st, task_id), trusted_cohort(st, task_id)
    collection = st.need(Collection, st.address, task_id, round_number)
    submissions = signed_submissions(st, cohort, collection)
    try:
        grant = st.need(AuditGrant, terms.publisher, task_id, round_number)
        if grant.collection != struct_hash(collection):
            raise BadRecord(f"the audit keys are for collection {grant.collection}")
        context = key_context("audit", task_id, round_number, grant.collection)
        keys = ndd_fe.decode_scalars(st.me.open_sealed(st.store.get(terms.publisher, grant.sealed_sha256), context))
    except (BadRecord, MissingArtifact, TamperedArtifact, ValueError) as error:
        return give_up(st, task_id, round_number, "audit", AbortReason.DECRYPT_FAILED, str(error))
    vectors = audit_vectors(st, terms, grant.block_number, submissions[0].coordinates)
    masks = masks_of(st, cohort, submissions, "aggregator")
    good: dict[Address, Submission] = {}
    refused: dict[Address, str] = {}
    for index, submission in enumerate(submissions):
        key = keys[index * len(vectors) : (index + 1) * len(vectors)]
        bound = terms.spec.projection_bound(submission.coordinates)
        try:
            ciphertext = whole_ciphertext(st, submission, terms.spec.voting.chunk_coordinates)
            ndd_fe.open_projection(key, masks[index], ciphertext, vectors, bound=bound)
            good[submission.miner] = submission
        except ndd_fe.OutOfBound as error:
            refused[submission.miner] = f"malformed ciphertext: audit projections {error.coordinates} are out of range"
        except BadRecord as error:
            refused[submission.miner] = brief(error)
        report_progress((index + 1) / len(submissions), "auditing")
    show_submissions(task_id, round_number, cohort, good)
    if shortage := too_few(terms, cohort, round_number, good, refused):
        return give_up(st, task_id, round_number, "audit", AbortReason.NOT_ENOUGH_SUBMISSIONS, shortage)
    return st.post(
        KeyRequest(
            task_id=task_id,
            round_number=round_number,
            aggregator=st.address,
            collection=struct_hash(collection),
            miners=tuple(good),
            submissions=tuple(struct_hash(submission) for submission in good.values()),
            refused=tuple(refused),
            reasons=tuple(refused.values()),
        )
    )


def audit_vectors(st: Station, terms: PublishedTask, block_number: int, coordinates: int) -> npt.NDArray[np.int64]:
    """The public +-1 vectors (K, k) of a round, from a block hash."""
    block_hash = bytes(st.chain.web3.eth.get_block(block_number)["hash"])
    count = terms.spec.voting.audit_projections
    size = -(-count * coordinates // 8)
    stream = hashlib.shake_256(b"audit" + terms.task_id.encode() + block_hash).digest(size)
    bits = np.unpackbits(np.frombuffer(stream, dtype=np.uint8))[: count * coordinates]
    return (2 * bits.astype(np.int64) - 1).reshape(count, coordinates)


def masks_of(
    st: Station, cohort: Cohort, submissions: Sequence[Submission], role: Literal["publisher", "aggregator"]
) -> list[bytes]:
    """My half of the masks of each submission: K_iP for the publisher, K_iA for the aggregator."""
    keys = dict(zip(cohort.miners, encryption_keys(st, cohort), strict=True))
    return [
        st.me.mask_key(keys[one.miner], role, label_of(st, one.task_id, one.round_number, one.miner), one.salt)
        for one in submissions
    ]


def signed_submissions(st: Station, cohort: Cohort, listing: Collection | KeyRequest) -> list[Submission]:
    """The listed submissions, each signed by its miner, all of one length. Raises BadRecord or KeyRefused."""
    check_listing(cohort, listing)
    submissions = []
    for miner, name in zip(listing.miners, listing.submissions, strict=True):
        submission = st.need(Submission, miner, listing.task_id, listing.round_number)
        if struct_hash(submission) != name:
            raise KeyRefused(f"{miner} did not sign submission {name}")
        submissions.append(submission)
    if len({submission.coordinates for submission in submissions}) != 1:
        raise KeyRefused("the submissions differ in length")
    return submissions


def check_submission(
    st: Station, terms: PublishedTask, miner: Address, round_number: int, base: str, coordinates: int
) -> Submission:
    """The miner's submission, its ciphertext decoded once. Raises BadRecord with the reason."""
    task_id, size = terms.task_id, terms.spec.voting.chunk_coordinates
    submission = st.find(Submission, miner, task_id, round_number)
    if submission is None:
        raise BadRecord("nothing submitted in time")
    if submission.base_model_sha256 != base:
        raise BadRecord(f"trained from model {submission.base_model_sha256}, the round starts from {base}")
    if submission.coordinates != coordinates:
        raise BadRecord(f"{submission.coordinates} coordinates, the round's support has {coordinates}")
    for earlier in range(1, round_number):
        before = st.find(Submission, miner, task_id, earlier)
        if before is not None and before.salt == submission.salt:
            raise BadRecord(f"salt {submission.salt} was used in round {earlier} already")
    registration = st.find(Registration, miner, task_id)
    if registration is None:
        raise BadRecord("its registration is gone from the store")
    registered = registered_samples(st, registration)
    if submission.sample_count != registered:
        raise BadRecord(f"sample_count = {submission.sample_count}, registered are {registered}")
    digests = chunk_digests(st, submission, size)
    for index in range(len(digests)):
        read_chunk(st, submission, digests, index, size)
    return submission


@task(persist_result=False, cache_policy=NO_CACHE)
def derive_round_key(task_id: str, round_number: int, actor: str) -> dict[str, str]:
    """2.2, the publisher: the functional key of the round, for exactly the requested submissions, sealed to A."""
    st = station(actor)
    terms, cohort = published_task(st, task_id), trusted_cohort(st, task_id)
    request = accepted(st, cohort, round_number)
    name = struct_hash(request)
    if granted := st.mine(KeyGrant, task_id, round_number):
        if granted.request == name:
            return st.reference(granted)
        raise KeyRefused(f"round {round_number} has a key for request {granted.request}; none is derived for {name}")
    try:
        submissions = submissions_for_key(st, terms, cohort, request)
        claim_round(st, task_id, round_number, "functional-key", name)
    except (BadRecord, KeyRefused, MissingArtifact) as error:
        return give_up(st, task_id, round_number, "derive-key", AbortReason.KEY_REFUSED, str(error))

    masks = masks_of(st, cohort, submissions, "publisher")
    functional_key = ndd_fe.derive_key(masks, weights_of(cohort, request), submissions[0].coordinates)
    sealed = ecies.seal(
        ndd_fe.encode_scalars(functional_key),
        bytes.fromhex(cohort.aggregator_key[2:]),
        ephemeral_seed=secrets.token_bytes(48),
        context=key_context("functional key", task_id, round_number, name),
    )
    return st.post(
        KeyGrant(
            task_id=task_id,
            round_number=round_number,
            publisher=st.address,
            request=name,
            sealed_sha256=st.store.put(st.address, sealed).sha256,
        )
    )


def submissions_for_key(st: Station, terms: PublishedTask, cohort: Cohort, request: KeyRequest) -> list[Submission]:
    """The requested submissions. Raises KeyRefused when a key for them would single somebody out."""
    if shortage := too_few(terms, cohort, request.round_number, request.miners, {}):
        raise KeyRefused(shortage)
    weights = weights_of(cohort, request)
    cap = terms.spec.participants.weight_levels
    if not all(1 <= weight <= cap for weight in weights):
        raise KeyRefused(f"weights {weights} are not all in [1, {cap}]")
    return signed_submissions(st, cohort, request)


def claim_round(st: Station, task_id: str, round_number: int, purpose: str, name: str) -> None:
    """Remember, before a key is derived, for which submissions it is. Raises KeyRefused when it was for others."""
    kept = st.me.claim(f"{task_id}/{round_number:05d}/{purpose}-for", name.encode()).decode()
    if kept != name:
        raise KeyRefused(
            f"round {round_number} already has its {purpose} for {kept}: two keys of one round would reveal a single "
            "miner's update by subtraction"
        )


def encryption_keys(st: Station, cohort: Cohort) -> list[str]:
    """Public encryption keys of the cohort's miners, in its order, as they registered them."""
    keys = []
    for miner, name in zip(cohort.miners, cohort.registrations, strict=True):
        registration = st.need(Registration, miner, cohort.task_id)
        if struct_hash(registration) != name:
            raise BadRecord(f"the registration of {miner} is not the one in the cohort")
        keys.append(registration.encryption_key)
    return keys


def key_context(purpose: str, task_id: str, round_number: int, name: str) -> bytes:
    return f"{purpose}|{task_id}|{round_number}|{name}".encode()


@task(persist_result=False, cache_policy=NO_CACHE)
def open_round(task_id: str, round_number: int, actor: str) -> dict[str, str]:
    """M4, the aggregator: decrypt, recover, check, step, evaluate; propose a block when the accuracy is met."""
    st = station(actor)
    st.mine(Candidate, task_id, round_number)  # back into the store, should it have gone from there
    if said := st.said(RoundResult, task_id, round_number):
        return said
    terms, cohort = published_task(st, task_id), trusted_cohort(st, task_id)
    spec = terms.spec
    request = accepted(st, cohort, round_number)
    weights = weights_of(cohort, request)

    def stop(reason: AbortReason, error: object) -> dict[str, str]:
        return give_up(st, task_id, round_number, "aggregate", reason, f"round {round_number}: {error}"[:2000])

    try:
        functional_key = read_functional_key(st, terms, request)
    except (BadRecord, MissingArtifact, TamperedArtifact, ValueError) as error:
        return stop(AbortReason.DECRYPT_FAILED, error)
    try:
        submissions = signed_submissions(st, cohort, request)
        masks = masks_of(st, cohort, submissions, "aggregator")
        size = spec.voting.chunk_coordinates
        ciphertexts = [whole_ciphertext(st, submission, size) for submission in submissions]
        weighted_sum, blinding = open_sum(spec, functional_key, masks, ciphertexts, weights)
    except (BadRecord, KeyRefused, MissingArtifact) as error:
        return stop(AbortReason.DECRYPT_FAILED, error)
    except ndd_fe.OutOfBound as error:
        return stop(AbortReason.RECOVERY_FAILED, error)
    if failing := ndd_fe.failing_coordinates(ciphertexts, weights, weighted_sum, blinding):
        return stop(AbortReason.REENCODING_MISMATCH, f"coordinates {failing[:10]} do not re-encode")

    model = next_model(spec, model_after(st, spec, cohort, round_number - 1), round_number, weighted_sum, sum(weights))
    required_ppm, _ = delivered_requirement(st, terms)
    judged = evaluate(build_network(spec), model.parameters, delivered_validation(st, terms, 0))
    accuracy = judged.correct / judged.total
    show_progress(f"accuracy-{task_id}", 100 * accuracy, f"Accuracy after round {round_number}, in percent")
    model_ref = st.store.put(st.address, encode_parameters(model.parameters))
    opening_ref = st.store.put(st.address, encode_opening(weighted_sum, blinding))
    candidate_name = ZERO32
    if judged.correct * PPM >= required_ppm * judged.total:
        candidate = propose(st, cohort, round_number, model_ref.uri, model.sha256, opening_ref.sha256, judged)
        st.post(candidate)
        candidate_name = struct_hash(candidate)
    return st.post(
        RoundResult(
            task_id=task_id,
            round_number=round_number,
            aggregator=st.address,
            request=struct_hash(request),
            opening_sha256=opening_ref.sha256,
            model_sha256=model.sha256,
            correct=judged.correct,
            total=judged.total,
            loss_micro=min(round(judged.loss * 1e6), 2**32 - 1),
            candidate=candidate_name,
        )
    )


def open_sum(
    spec: TaskSpec, functional_key: Points, masks: list[bytes], ciphertexts: list[Points], weights: list[int]
) -> tuple[npt.NDArray[np.int64], Points]:
    """The opening (m, rho). Raises OutOfBound when a coordinate is beyond even what the audit lets pass.

    The audit bounds a projection, not each coordinate: a miner can exceed the bound in a few. These are searched further,
    so that the true sum is published, and `next_model` leaves them out. One miner does not end the round of all.
    """
    total = sum(weights)
    try:
        return ndd_fe.open_sum(
            functional_key,
            masks,
            ciphertexts,
            weights,
            bound=spec.recovery_bound(total),
            progress=lambda done, all_of_them: report_progress(done / all_of_them, "recovering the sum"),
        )
    except ndd_fe.OutOfBound as error:
        if len(error.coordinates) > MAX_EXCESSIVE:
            raise
        excessive = set(error.coordinates)
    wide = min(spec.projection_bound(len(functional_key)) * total, MAX_SEARCH)
    weighted_sum = np.zeros(len(functional_key), np.int64)
    blinding = np.zeros_like(functional_key)
    edges = sorted({0, len(functional_key), *excessive, *(k + 1 for k in excessive)})
    for start, end in pairwise(edges):
        weighted_sum[start:end], blinding[start:end] = ndd_fe.open_sum(
            functional_key[start:end],
            masks,
            [ciphertext[start:end] for ciphertext in ciphertexts],
            weights,
            bound=wide if start in excessive else spec.recovery_bound(total),
            start=start,
        )
    return weighted_sum, blinding


def read_functional_key(st: Station, terms: PublishedTask, request: KeyRequest) -> npt.NDArray[np.uint64]:
    """The publisher's functional key for exactly this request, unsealed. Raises BadRecord, Unopenable."""
    grant = st.need(KeyGrant, terms.publisher, terms.task_id, request.round_number)
    name = struct_hash(request)
    if grant.request != name:
        raise BadRecord(f"the functional key is for request {grant.request}, not for {name}")
    sealed = st.store.get(terms.publisher, grant.sealed_sha256)
    context = key_context("functional key", terms.task_id, request.round_number, name)
    return ndd_fe.decode_scalars(st.me.open_sealed(sealed, context))


def whole_ciphertext(st: Station, submission: Submission, chunk_coordinates: int) -> Points:
    digests = chunk_digests(st, submission, chunk_coordinates)
    chunks = [read_chunk(st, submission, digests, index, chunk_coordinates) for index in range(len(digests))]
    return np.concatenate(chunks)


class DeliveredFields(Frozen):
    """What a delivery seals: the key to the validation set; for the aggregator also the opening of the commitment."""

    content_secret: str = Field(pattern=r"^[0-9a-f]{64}$")
    accuracy_ppm: int | None = Field(default=None, ge=0)
    salt: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")


def delivered_fields(st: Station, terms: PublishedTask, round_number: int) -> tuple[Delivery, DeliveredFields]:
    """What the publisher sealed to me. Raises BadRecord, Unopenable, MissingArtifact or TamperedArtifact."""
    delivery = st.need(Delivery, terms.publisher, terms.task_id, round_number, about=st.address)
    sealed = st.store.get(terms.publisher, delivery.sealed_sha256)
    try:
        fields = DeliveredFields.model_validate(parse_json(st.me.open_sealed(sealed, delivery_context(terms.task_id))))
    except ecies.Unopenable:
        raise
    except ValueError as error:
        raise BadRecord(
            f"the delivery does not parse: {type(error).__name__}"
        ) from None  # its text would quote secrets
    return delivery, fields


def delivered_validation(st: Station, terms: PublishedTask, round_number: int) -> Dataset:
    """The validation set that the publisher sealed to me. Raises BadRecord when it is not the committed one."""
    delivery, fields = delivered_fields(st, terms, round_number)
    context, secret = delivery_context(terms.task_id), int(fields.content_secret, 16)
    if not 0 < secret < ndd_fe.ORDER:
        raise BadRecord("the delivered content key is no key")
    content = ecies.open_sealed(
        st.store.get(terms.publisher, delivery.content_sha256),
        lambda public: ecies.shared_secret(secret, public),
        recipient_key=ecies.public_key(secret),
        context=context,
    )
    if sha256_hex(content) != terms.validation_sha256:
        raise BadRecord("the delivered validation set is not the one that the task committed to")
    return decode_npz(content, "validation", terms.spec.dataset.classes)


def delivered_requirement(st: Station, terms: PublishedTask) -> tuple[int, str]:
    """The required accuracy in ppm and the salt, sealed to me as aggregator. Raises BadRecord unless they open the commitment."""
    _, fields = delivered_fields(st, terms, 0)
    on_chain = st.chain.contracts().escrow.get_task(terms.task_id).accuracy_commit
    if fields.accuracy_ppm is None or fields.accuracy_ppm > PPM or fields.salt is None:
        raise BadRecord("the delivered accuracy or salt is missing or impossible")
    if accuracy_commit(fields.accuracy_ppm, bytes.fromhex(fields.salt)) != on_chain:
        raise BadRecord("the delivered accuracy and salt do not open the commitment on chain")
    return fields.accuracy_ppm, fields.salt


def propose(
    st: Station,
    cohort: Cohort,
    round_number: int,
    model_uri: str,
    model_sha256: str,
    opening_sha256: str,
    judged: Evaluation,
) -> Candidate:
    """The block: everybody whose submission counted in some round, with its latest score commitment."""
    commits = latest_score_commits(st, cohort, round_number)
    return Candidate(
        task_id=cohort.task_id,
        round_number=round_number,
        model_sha256=model_sha256,
        model_uri=model_uri,
        correct=judged.correct,
        total=judged.total,
        aggregator=st.address,
        participants=tuple(commits),
        score_commits=tuple(commits.values()),
        opening_sha256=opening_sha256,
    )


def latest_score_commits(st: Station, cohort: Cohort, round_number: int) -> dict[Address, str]:
    """Score commitments of the latest accepted submission of each miner, in address order."""
    commits: dict[Address, str] = {}
    for number in range(1, round_number + 1):
        request = accepted(st, cohort, number)
        for miner, name in zip(request.miners, request.submissions, strict=True):
            submission = st.need(Submission, miner, cohort.task_id, number)
            if struct_hash(submission) != name:
                raise BadRecord(f"round {number}: {miner} did not sign the accepted submission {name}")
            commits[miner] = submission.score_commit
    return {miner: commits[miner] for miner in sorted(commits, key=str.lower)}


def show_submissions(task_id: str, round_number: int, cohort: Cohort, good: Iterable[Address]) -> None:
    show_table(
        f"submissions-{task_id}",
        [{"miner": miner, "submission": "accepted" if miner in good else "refused"} for miner in cohort.miners],
        f"Submissions of round {round_number}",
    )
