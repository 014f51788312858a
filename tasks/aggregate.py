"""M4. Collect, audit, open the sum of those who submitted well, step, evaluate, propose: the aggregator's part of a round.

Algorithm 4 of the protocol. What one miner does wrong is refused with the reason, and the round goes on without it.
"""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from prefect import task
from prefect.cache_policies import NO_CACHE

from blocks.artifacts import MissingArtifact, TamperedArtifact
from contracts.messages import (
    ZERO32,
    AbortReason,
    Address,
    AuditGrant,
    Candidate,
    Cohort,
    Collection,
    KeyGrant,
    KeyRequest,
    Registration,
    RoundResult,
    Submission,
    struct_hash,
)
from contracts.task_spec import PPM, PublishedTask, TaskSpec
from tasks.cohort import registered_samples, trusted_cohort
from tasks.contribute import chunk_digests, read_chunk
from tasks.crypto import ecies, ndd_fe
from tasks.delivery import delivered_requirement, delivered_validation
from tasks.dispatch import report_progress
from tasks.global_model import (
    accepted,
    build_network,
    encode_opening,
    model_after,
    next_model,
    round_support,
    weights_of,
)
from tasks.keys import KeyRefused, audit_vectors, key_context, masks_of, signed_submissions, too_few
from tasks.learning.models import encode_parameters
from tasks.learning.training import Evaluation, evaluate
from tasks.publish import published_task
from tasks.records import BadRecord, Station, brief, give_up, station
from tasks.show import show_progress, show_table

Points = npt.NDArray[np.uint64]

MAX_EXCESSIVE = 64  # coordinates beyond the bound that are searched further, a fraction of a second each
MAX_SEARCH = 2**40


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
