"""M5. Each miner checks the candidate on its own host and signs its verdict (Algorithm 5).

What is checked, in this order: the aggregator's signature over the candidate; this miner's score commitment; for every
round not yet verified, the opening against random chunks of the cohort's ciphertexts; W_r as W_{r-1} plus the server
step of exactly the opened sums; the model on a few local samples; and, where the task opens its validation set, the
accuracy, reproduced exactly.
"""

import secrets
from collections.abc import Sequence

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from blocks.artifacts import MissingArtifact, TamperedArtifact
from contracts.messages import Announcement, Attestation, Candidate, Cohort, RoundResult, Submission, struct_hash
from contracts.task_spec import PublishedTask, TaskSpec
from tasks.aggregate import latest_score_commits
from tasks.cohort import trusted_cohort
from tasks.contribute import Ciphertext, read_prepared, score_at, submitted_ciphertext
from tasks.crypto import ndd_fe
from tasks.crypto.ecies import Unopenable
from tasks.delivery import deliver, delivered_validation
from tasks.dispatch import report_progress
from tasks.global_model import GlobalModel, Opening, accepted, build_network, model_after, weights_of
from tasks.keys import encryption_keys
from tasks.learning.datasets import Dataset
from tasks.learning.training import Diverged, evaluate
from tasks.publish import check_runnable, published_task, secrets_of
from tasks.records import BadRecord, Station, station
from tasks.samples import load_samples

LOCAL_SAMPLES = 256


class Objection(ValueError):
    """Why this miner does not accept the candidate."""


@task(persist_result=False, cache_policy=NO_CACHE)
def open_validation_to_voters(task_id: str, round_number: int, actor: str) -> dict[str, str]:
    """M5, the publisher: where the task says so, every voter receives the validation set, sealed to it."""
    st = station(actor)
    terms, cohort = published_task(st, task_id), trusted_cohort(st, task_id)
    if terms.spec.voting.open_validation:
        content_secret = {"content_secret": secrets_of(st, task_id)["content_secret"]}
        for miner, key in zip(cohort.miners, encryption_keys(st, cohort), strict=True):
            deliver(st, terms, round_number, miner, key, dict(content_secret))
    announced = st.need(Announcement, st.address, task_id)
    return st.receipt(task_id, round_number, "open-validation", announced.transaction)


@task(persist_result=False, cache_policy=NO_CACHE)
def judge_candidate(task_id: str, round_number: int, actor: str) -> dict[str, str]:
    """M5, a miner: check everything, sign VALID or INVALID with the reason."""
    st = station(actor)
    if posted := st.mine(Attestation, task_id, round_number):
        return st.reference(posted)
    terms, cohort = published_task(st, task_id), trusted_cohort(st, task_id)
    candidate = st.need(Candidate, cohort.aggregator, task_id, round_number)
    try:
        check_candidate(st, terms, cohort, candidate)
        reason = ""
    except (Objection, BadRecord, Diverged, MissingArtifact, TamperedArtifact, Unopenable) as objection:
        reason = str(objection) or type(objection).__name__
    return st.post(
        Attestation(
            task_id=task_id,
            round_number=round_number,
            candidate=struct_hash(candidate),
            accepted=not reason,
            reason=reason[:1000],
        )
    )


def check_candidate(st: Station, terms: PublishedTask, cohort: Cohort, candidate: Candidate) -> None:
    """Return if the candidate is right. Raises Objection or BadRecord with what is wrong."""
    number = candidate.round_number
    result = st.need(RoundResult, cohort.aggregator, terms.task_id, number)
    same = ("model_sha256", "opening_sha256", "correct", "total")
    matches = all(getattr(result, name) == getattr(candidate, name) for name in same)
    if not matches or result.candidate != struct_hash(candidate):
        raise Objection("the candidate is not the result that the aggregator published for the round")
    if candidate.model_uri != f"artifact:{cohort.aggregator}/{candidate.model_sha256}":
        raise Objection(f"the candidate's model_uri {candidate.model_uri} does not name its model")
    check_score_commits(st, cohort, candidate)
    for earlier in range(1, number + 1):
        check_opening_once(st, terms, cohort, earlier)
    model = model_after(st, terms.spec, cohort, number)
    if model.sha256 != candidate.model_sha256:
        raise Objection(f"the candidate names model {candidate.model_sha256}, the opened sums give {model.sha256}")

    before = model_after(st, terms.spec, cohort, number - 1)
    check_locally(terms.spec, before, model, load_samples(st.me, terms.spec.dataset, "train"))
    if (validation := opened_validation(st, terms, number)) is not None:
        judged = evaluate(build_network(terms.spec), model.parameters, validation)
        if (judged.correct, judged.total) != (candidate.correct, candidate.total):
            raise Objection(
                f"the candidate claims {candidate.correct} of {candidate.total} correct, here it is "
                f"{judged.correct} of {judged.total}"
            )


def check_locally(spec: TaskSpec, before: GlobalModel, model: GlobalModel, own: Dataset) -> None:
    """Raise Objection when the model does worse on some of the voter's own samples, by more than the task tolerates."""
    network, few = build_network(spec), own.take(np.arange(0, len(own), max(1, len(own) // LOCAL_SAMPLES)))
    was = evaluate(network, before.parameters, few)
    now = evaluate(network, model.parameters, few)
    if now.correct + spec.voting.tolerance * now.total < was.correct:
        raise Objection(
            f"on {now.total} local samples the model got worse, from {was.correct} to {now.correct} correct: more than "
            f"the tolerance {spec.voting.tolerance}"
        )


def opened_validation(st: Station, terms: PublishedTask, round_number: int) -> Dataset | None:
    """The validation set, where the task opens it to voters and the publisher did; else None.

    A publisher that withholds it, or delivers something else, gives up a check that serves itself. It must not gain by it:
    were that an objection, silence would turn a good model into a refund.
    """
    if not terms.spec.voting.open_validation:
        return None
    try:
        return delivered_validation(st, terms, round_number)
    except (BadRecord, MissingArtifact, TamperedArtifact, Unopenable):
        return None


def check_score_commits(st: Station, cohort: Cohort, candidate: Candidate) -> None:
    """Raise Objection unless the block lists the latest accepted commitments, this miner's own among them."""
    expected = latest_score_commits(st, cohort, candidate.round_number)
    listed = dict(zip(candidate.participants, candidate.score_commits, strict=False))
    if list(listed.items()) != list(expected.items()) or len(candidate.score_commits) != len(expected):
        raise Objection("the score commitments are not those of the latest accepted submissions")
    own = [
        score_at(prepared, cohort.task_id, st.address)
        for number in range(1, candidate.round_number + 1)
        if (prepared := read_prepared(st, cohort.task_id, number)) is not None
        and st.address in accepted(st, cohort, number).miners
    ]
    if own and listed.get(st.address) != own[-1]:
        raise Objection("my own score commitment is not listed")


def check_opening_once(st: Station, terms: PublishedTask, cohort: Cohort, round_number: int) -> None:
    """Spot-check the opening of one round, unless this miner has done so. Raises Objection or BadRecord."""
    result = st.need(RoundResult, cohort.aggregator, terms.task_id, round_number)
    name = f"{terms.task_id}/{round_number:05d}/opening-checked"
    if st.me.read_private(name) == result.opening_sha256.encode():
        return
    check_opening(st, terms, cohort, result)
    st.me.claim(name, result.opening_sha256.encode())


def check_opening(st: Station, terms: PublishedTask, cohort: Cohort, result: RoundResult) -> None:
    """Check (m, rho) of random chunks against the commitments that the miners signed: it opens them, or it is a lie.

    Which chunks is drawn here, unknown to the aggregator; it cannot open a commitment in two ways. One piece of every
    ciphertext and of the opening is in memory (`chunks`).
    """
    number, size = result.round_number, terms.spec.voting.chunk_coordinates
    request = accepted(st, cohort, number)
    if result.request != struct_hash(request):
        raise Objection(f"round {number}: the result is for other submissions than the published list")
    dimension = check_runnable(terms.spec)
    opening = Opening.listed(st.store, cohort.aggregator, result.opening_sha256, size=size, at_most=dimension)
    layout, ciphertexts = opening.layout, []
    for miner, name in zip(request.miners, request.submissions, strict=True):
        submission = st.need(Submission, miner, terms.task_id, number)
        if struct_hash(submission) != name or submission.coordinates != layout.coordinates:
            raise Objection(f"round {number}: the submission of {miner} is not the one in the list")
        ciphertexts.append(submitted_ciphertext(st.store, submission, size))
    checks = min(len(layout.chunks), terms.spec.voting.spot_checks)
    drawn = sorted(secrets.SystemRandom().sample(layout.chunks, checks))
    done = 0
    for chunks in layout.pieces(drawn):
        failing = failing_coordinates(ciphertexts, weights_of(cohort, request), opening, chunks)
        if failing:
            raise Objection(
                f"round {number}: the published sum does not open the ciphertexts at coordinate {failing[0]}"
            )
        done += len(chunks)
        report_progress(done / len(drawn), f"verifying the sum of round {number}")


def failing_coordinates(
    ciphertexts: Sequence[Ciphertext], weights: Sequence[int], opening: Opening, chunks: Sequence[int]
) -> list[int]:
    """The coordinates in some chunks, ascending, that the opening does not open. Raises BadRecord."""
    layout, points = opening.layout, [ciphertext.points(chunks) for ciphertext in ciphertexts]
    rows = ndd_fe.failing_coordinates(points, weights, *opening.opened(chunks))
    # All chunks but the last one of the layout are full, and that one, if it is here, comes last.
    return [chunks[row // layout.size] * layout.size + row % layout.size for row in rows]
