"""M4. Collect, audit, open the sum of those who submitted well, step, evaluate, propose: the aggregator's part of a round.

Algorithm 4 of the protocol. What one miner does wrong is refused with the reason, and the round goes on without it.
"""

import math
from collections.abc import Callable

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
    KeyRequest,
    Registration,
    RoundResult,
    Submission,
    struct_hash,
)
from contracts.task_spec import PPM, PublishedTask
from tasks.chunks import put_manifest
from tasks.cohort import registered_samples, trusted_cohort
from tasks.contribute import submitted_ciphertext
from tasks.crypto import ecies, ndd_fe
from tasks.delivery import delivered_requirement, delivered_validation
from tasks.dispatch import report_progress
from tasks.global_model import (
    Opening,
    accepted,
    build_network,
    model_after,
    next_model,
    round_support,
    weights_of,
)
from tasks.keys import audit_vectors, key_context, masks_of, open_scalars, sealed_size, signed_submissions, too_few
from tasks.learning.models import encode_parameters
from tasks.learning.training import Evaluation, evaluate
from tasks.opening import Outcome, need_plan
from tasks.publish import published_task
from tasks.records import BadRecord, Station, brief, give_up, station


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
    for index, miner in enumerate(cohort.miners):
        progress = share_of("checking", index, len(cohort.miners))
        try:
            good[miner] = check_submission(st, terms, miner, round_number, model.sha256, coordinates, progress)
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
    a random point. Without this, one bad ciphertext would spoil the sum of all. In memory are the +-1 vectors, one byte an
    entry, and one piece of one ciphertext.
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
        count = terms.spec.voting.audit_projections * len(submissions)
        sealed = st.store.get(terms.publisher, grant.sealed_sha256, max_bytes=sealed_size(count))
        keys = open_scalars(sealed, st.me, context, count)
    except (BadRecord, MissingArtifact, TamperedArtifact, ValueError) as error:
        return give_up(st, task_id, round_number, "audit", AbortReason.DECRYPT_FAILED, str(error))
    vectors = audit_vectors(st, terms, grant.block_number, submissions[0].coordinates)
    masks = masks_of(st, cohort, submissions, "aggregator")
    bound = terms.spec.projection_bound(submissions[0].coordinates)
    table = audit_table(bound, len(keys))
    good: dict[Address, Submission] = {}
    refused: dict[Address, str] = {}
    for index, submission in enumerate(submissions):
        key = keys[index * len(vectors) : (index + 1) * len(vectors)]
        progress = share_of("auditing", index, len(submissions))
        try:
            ciphertext = submitted_ciphertext(st.store, submission, terms.spec.voting.chunk_coordinates)
            ndd_fe.open_projection(key, masks[index], ciphertext.pieces(progress), vectors, bound=bound, table=table)
            good[submission.miner] = submission
        except ndd_fe.OutOfBound as error:
            refused[submission.miner] = f"malformed ciphertext: audit projections {error.coordinates} are out of range"
        except BadRecord as error:
            refused[submission.miner] = brief(error)
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


def audit_table(bound: int, projections: int) -> ndd_fe.BabySteps:
    """Baby steps for a few logarithms up to a large bound: about as many as all their giant steps together."""
    return ndd_fe.BabySteps.build(min(max(1, math.isqrt(bound * projections // 2)), 2**20))


def share_of(what: str, index: int, count: int) -> Callable[[float], None]:
    """Progress of the index-th of `count` equal parts, as progress of the whole."""
    return lambda fraction: report_progress((index + fraction) / count, what)


def check_submission(
    st: Station,
    terms: PublishedTask,
    miner: Address,
    round_number: int,
    base: str,
    coordinates: int,
    progress: Callable[[float], None],
) -> Submission:
    """The miner's submission, its ciphertext decoded once, piece by piece. Raises BadRecord with the reason."""
    task_id = terms.task_id
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
    ciphertext = submitted_ciphertext(st.store, submission, terms.spec.voting.chunk_coordinates)
    for _ in ciphertext.pieces(progress):
        pass  # reading checks it
    return submission


@task(persist_result=False, cache_policy=NO_CACHE)
def finish_round(task_id: str, round_number: int, outcomes: list[Outcome], actor: str) -> dict[str, str]:
    """M4, the aggregator: publish the opening, step, evaluate; propose a block when the accuracy is met."""
    st = station(actor)
    st.mine(Candidate, task_id, round_number)  # back into the store, should it have gone from there
    if said := st.said(RoundResult, task_id, round_number):
        return said
    for outcome in outcomes:
        if outcome.reason is not None:
            detail = f"round {round_number}: {outcome.detail}"[:2000]
            return give_up(st, task_id, round_number, "aggregate", outcome.reason, detail)
    terms, cohort = published_task(st, task_id), trusted_cohort(st, task_id)
    spec = terms.spec
    request = accepted(st, cohort, round_number)

    opening = publish_opening(st, task_id, round_number, outcomes)
    before, weight = model_after(st, spec, cohort, round_number - 1), sum(weights_of(cohort, request))
    model = next_model(spec, before, round_number, opening.weighted_sum(), weight)
    required_ppm, _ = delivered_requirement(st, terms)
    judged = evaluate(build_network(spec), model.parameters, delivered_validation(st, terms, 0))
    model_ref = st.store.put(st.address, encode_parameters(model.parameters))
    candidate_name = ZERO32
    if judged.correct * PPM >= required_ppm * judged.total:
        candidate = propose(st, cohort, round_number, model_ref.uri, model.sha256, opening.sha256, judged)
        st.post(candidate)
        candidate_name = struct_hash(candidate)
    return st.post(
        RoundResult(
            task_id=task_id,
            round_number=round_number,
            aggregator=st.address,
            request=struct_hash(request),
            opening_sha256=opening.sha256,
            model_sha256=model.sha256,
            correct=judged.correct,
            total=judged.total,
            loss_micro=min(round(judged.loss * 1e6), 2**32 - 1),
            candidate=candidate_name,
        )
    )


def publish_opening(st: Station, task_id: str, round_number: int, outcomes: list[Outcome]) -> Opening:
    """Store the manifest of the opening whose chunks the groups stored. Raises MissingArtifact for an unplanned round."""
    plan = need_plan(st, task_id, round_number)
    digests = [digest for outcome in outcomes for digest in outcome.digests]
    sha256 = put_manifest(st.store, st.address, plan.layout, digests)
    return Opening.listed(st.store, st.address, sha256, size=plan.chunk_coordinates, at_most=plan.coordinates)


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
