"""M4, its middle: open the weighted sum of a round, group of chunks by group, wherever the aggregator has workers.

What is opened is decided once: the plan of a round (whose ciphertexts, with which weights, under which key) is claimed in
the aggregator's home when all of it is checked. A group is one Prefect task, on the task runner of `blocks.workers`. It
is given names and numbers, takes plan and keys from the home on its own host, asks the store and no chain, and returns
digests. Which groups are done is in the home as well: a killed aggregator opens the others only.

Memory of a worker process: threads x (miners + 1) x one piece (`chunks`), and 32 bytes a chunk of each manifest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.futures import as_completed
from pydantic import PositiveInt

from blocks.artifacts import ArtifactStore, MissingArtifact, TamperedArtifact
from blocks.identity import Identity
from blocks.workers import load_workers
from contracts.messages import (
    AbortReason,
    Address,
    Bytes32,
    Cohort,
    Frozen,
    KeyGrant,
    KeyRequest,
    PublicKey,
    RoundResult,
    Salt,
    struct_hash,
)
from contracts.task_spec import PublishedTask
from tasks.chunks import Layout
from tasks.cohort import trusted_cohort
from tasks.contribute import Ciphertext, label_of, submitted_ciphertext
from tasks.crypto import bsgs, ndd_fe
from tasks.dispatch import report_progress
from tasks.global_model import accepted, opening_size, store_opening, weights_of
from tasks.keys import KeyRefused, SealedKey, encryption_keys, key_context, signed_submissions
from tasks.publish import published_task
from tasks.records import BadRecord, Station, give_up, station

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

MAX_EXCESSIVE = 64  # coordinates of a group beyond the bound that are searched further, a fraction of a second each
MAX_SEARCH = 2**40


class Summand(Frozen):
    """One accepted miner's part in the sum."""

    miner: Address
    weight: PositiveInt
    encryption_key: PublicKey
    salt: Salt
    chunks_sha256: Bytes32


class Plan(Frozen):
    """What the aggregator opens in a round. Nothing in it is secret."""

    request: Bytes32
    publisher: Address
    sealed_sha256: Bytes32
    coordinates: PositiveInt
    chunk_coordinates: PositiveInt
    bound: PositiveInt
    wide_bound: PositiveInt
    summands: tuple[Summand, ...]

    @property
    def layout(self) -> Layout:
        return Layout(self.coordinates, self.chunk_coordinates)


@dataclass(frozen=True, eq=False)
class RoundToOpen:
    """All that it takes to open a chunk: the artifacts, and the means to read them. Secret: it holds masks.

    bound: largest |m_k| of honest updates. wide_bound: largest |m_k| that passes the audit.
    """

    key: SealedKey
    context: bytes
    me: Identity
    ciphertexts: Sequence[Ciphertext]
    masks: Sequence[bytes]
    weights: Sequence[int]
    bound: int
    wide_bound: int

    @property
    def layout(self) -> Layout:
        return self.key.layout

    @property
    def table(self) -> ndd_fe.BabySteps:
        """Baby steps for all coordinates of the round, shared by the pieces of a process."""
        return bsgs.baby_steps(bsgs.default_size(self.bound, self.layout.coordinates))


@dataclass(frozen=True)
class Outcome:
    """What a group's task returns: the digests of the opening's chunks, or why there are none."""

    digests: tuple[Bytes32, ...] = ()
    reason: AbortReason | None = None
    detail: str = ""


@task(persist_result=False, cache_policy=NO_CACHE)
def plan_opening(task_id: str, round_number: int, actor: str) -> list[range]:
    """M4, the aggregator: check what is to be opened, and return its groups of chunks; none when all is said already."""
    st = station(actor)
    if st.said(RoundResult, task_id, round_number):
        return []
    if (plan := read_plan(st, task_id, round_number)) is None:
        terms, cohort = published_task(st, task_id), trusted_cohort(st, task_id)
        request = accepted(st, cohort, round_number)
        try:
            plan = make_plan(st, terms, cohort, request)
        except (BadRecord, KeyRefused, MissingArtifact, TamperedArtifact) as error:
            detail = f"round {round_number}: {error}"[:2000]
            give_up(st, task_id, round_number, "aggregate", AbortReason.DECRYPT_FAILED, detail)
            return []
        st.me.claim(_plan_name(task_id, round_number), plan.model_dump_json().encode())
    return plan.layout.groups()


def open_in_groups(task_id: str, round_number: int, groups: list[range], actor: str) -> list[Outcome]:
    """Open every group as a Prefect task on the actor's workers; what came of them, in their order.

    Workers on several hosts each have the home, with the plan in it, and remember the groups that they did.
    """
    if not groups:
        return []
    with load_workers(actor).task_runner() as runner:
        names = {"task_id": task_id, "round_number": round_number, "actor": actor}
        futures = [
            runner.submit(open_group, {**names, "first": group.start, "last": group.stop - 1}) for group in groups
        ]
        for done, _ in enumerate(as_completed(futures), start=1):
            report_progress(done / len(futures), "opening the sum")
        return [future.result() for future in futures]


@task(
    task_run_name="open chunks {first} to {last} · round {round_number} · {actor}",
    persist_result=False,
    cache_policy=NO_CACHE,
)
def open_group(task_id: str, round_number: int, actor: str, first: int, last: int) -> Outcome:
    """Open chunks first..last and store the opening, unless it is done. What is wrong with them is an Outcome too."""
    st = station(actor)
    plan = need_plan(st, task_id, round_number)
    done = f"{task_id}/{round_number:05d}/opening/{first:07d}-{last:07d}"
    kept = (st.me.read_private(done) or b"").decode().split()
    if kept and _is_stored(st, kept, plan.layout):
        return Outcome(tuple(kept))
    try:
        sums = round_to_open(st, plan, task_id, round_number)
        digests = tuple(open_chunks(sums, range(first, last + 1), st.store, st.address))
    except (BadRecord, MissingArtifact, TamperedArtifact) as error:
        return Outcome(reason=AbortReason.DECRYPT_FAILED, detail=str(error))
    except ndd_fe.OutOfBound as error:
        return Outcome(reason=AbortReason.RECOVERY_FAILED, detail=str(error))
    st.store.sync()
    st.me.claim(done, "\n".join(digests).encode())
    return Outcome(digests)


def make_plan(st: Station, terms: PublishedTask, cohort: Cohort, request: KeyRequest) -> Plan:
    """The plan of a round, from signed records and manifests. Raises BadRecord, KeyRefused or MissingArtifact."""
    spec, name = terms.spec, struct_hash(request)
    grant = st.need(KeyGrant, terms.publisher, terms.task_id, request.round_number)
    if grant.request != name:
        raise BadRecord(f"the functional key is for request {grant.request}, not for {name}")
    submissions, weights = signed_submissions(st, cohort, request), weights_of(cohort, request)
    for submission in submissions:
        submitted_ciphertext(st.store, submission, spec.voting.chunk_coordinates)
    coordinates, total = submissions[0].coordinates, sum(weights)
    keys = dict(zip(cohort.miners, encryption_keys(st, cohort), strict=True))
    return Plan(
        request=name,
        publisher=terms.publisher,
        sealed_sha256=grant.sealed_sha256,
        coordinates=coordinates,
        chunk_coordinates=spec.voting.chunk_coordinates,
        bound=spec.recovery_bound(total),
        # The audit bounds a projection, not each coordinate.
        wide_bound=min(spec.projection_bound(coordinates) * total, MAX_SEARCH),
        summands=tuple(
            Summand(
                miner=one.miner,
                weight=weight,
                encryption_key=keys[one.miner],
                salt=one.salt,
                chunks_sha256=one.chunks_sha256,
            )
            for one, weight in zip(submissions, weights, strict=True)
        ),
    )


def read_plan(st: Station, task_id: str, round_number: int) -> Plan | None:
    data = st.me.read_private(_plan_name(task_id, round_number))
    return None if data is None else Plan.model_validate_json(data)


def need_plan(st: Station, task_id: str, round_number: int) -> Plan:
    """The plan of a round. Raises MissingArtifact when this home has none."""
    plan = read_plan(st, task_id, round_number)
    if plan is None:
        raise MissingArtifact(f"round {round_number} of {task_id} has no plan in {st.me.home}: plan the opening first")
    return plan


def round_to_open(st: Station, plan: Plan, task_id: str, round_number: int) -> RoundToOpen:
    """A round as planned, with the masks that this actor agreed on with each miner. Raises BadRecord."""
    size, count = plan.chunk_coordinates, plan.coordinates
    return RoundToOpen(
        key=sealed_key(st.store, plan),
        context=key_context("functional key", task_id, round_number, plan.request),
        me=st.me,
        ciphertexts=[
            Ciphertext.listed(st.store, one.miner, one.chunks_sha256, size=size, at_most=count) for one in plan.summands
        ],
        masks=[
            st.me.mask_key(one.encryption_key, "aggregator", label_of(st, task_id, round_number, one.miner), one.salt)
            for one in plan.summands
        ],
        weights=[one.weight for one in plan.summands],
        bound=plan.bound,
        wide_bound=plan.wide_bound,
    )


def sealed_key(store: ArtifactStore, plan: Plan) -> SealedKey:
    """The functional key that the publisher granted; its chunks are not read yet. Raises BadRecord."""
    size, count = plan.chunk_coordinates, plan.coordinates
    key = SealedKey.listed(store, plan.publisher, plan.sealed_sha256, size=size, at_most=count)
    if key.layout.coordinates != count:
        raise BadRecord(f"the functional key of {plan.publisher} has {key.layout.coordinates} coordinates, not {count}")
    return key


def open_chunks(sums: RoundToOpen, chunks: range, store: ArtifactStore, owner: Address) -> list[Bytes32]:
    """Open consecutive chunks piece by piece and store the opening; its chunks' digests.

    Raises BadRecord for a chunk that cannot be read, OutOfBound for sums that are not found. What is found has been encoded
    again and compared with the sum of the ciphertexts, so the opening holds.
    """
    digests, excessive = [], []
    for piece in sums.layout.pieces(chunks):
        weighted_sum, blinding, beyond = open_piece(sums, piece)
        excessive += beyond
        if len(excessive) > MAX_EXCESSIVE:
            raise ndd_fe.OutOfBound(excessive, sums.bound)
        digests += store_opening(store, owner, sums.layout, weighted_sum, blinding)
    return digests


def open_piece(sums: RoundToOpen, piece: range) -> tuple[Integers, Words, list[int]]:
    """The opening m (n,), rho (n, 4) of one piece, and the coordinates that are beyond the bound of honest updates."""
    start = sums.layout.span(piece).start
    functional_key = sums.key.scalars(piece, sums.me, sums.context)
    ciphertexts = [ciphertext.points(piece) for ciphertext in sums.ciphertexts]
    return open_sum(sums, functional_key, ciphertexts, start)


def open_sum(
    sums: RoundToOpen, functional_key: Words, ciphertexts: list[Words], start: int
) -> tuple[Integers, Words, list[int]]:
    """The opening of the coordinates from `start` on, and which are excessive.

    The audit bounds a projection, not each coordinate: a miner can exceed the bound in a few. These are searched further,
    so that the true sum is published, and `next_model` leaves them out. One miner does not end the round of all.
    Raises OutOfBound when there are more than MAX_EXCESSIVE, or one is beyond even what the audit lets pass.
    """
    masks, weights = sums.masks, sums.weights
    try:
        opened = ndd_fe.open_sum(
            functional_key, masks, ciphertexts, weights, bound=sums.bound, table=sums.table, start=start
        )
        return *opened, []
    except ndd_fe.OutOfBound as error:
        if len(error.coordinates) > MAX_EXCESSIVE:
            raise
        excessive = error.coordinates
    weighted_sum, blinding = np.zeros(len(functional_key), np.int64), np.zeros_like(functional_key)
    rows = {coordinate - start for coordinate in excessive}
    for first, end in pairwise(sorted({0, len(functional_key), *rows, *(row + 1 for row in rows)})):
        weighted_sum[first:end], blinding[first:end] = ndd_fe.open_sum(
            functional_key[first:end],
            masks,
            [ciphertext[first:end] for ciphertext in ciphertexts],
            weights,
            bound=sums.wide_bound if first in rows else sums.bound,
            table=sums.table,
            start=start + first,
        )
    return weighted_sum, blinding, excessive


def _is_stored(st: Station, digests: Sequence[Bytes32], layout: Layout) -> bool:
    """Whether the store still has these chunks of my opening, unchanged. One at a time is in memory."""
    try:
        for digest in digests:
            st.store.get(st.address, digest, max_bytes=opening_size(layout.size))
    except (MissingArtifact, TamperedArtifact):
        return False
    return True


def _plan_name(task_id: str, round_number: int) -> str:
    return f"{task_id}/{round_number:05d}/opening/plan.json"
