"""2.2. The publisher's keys for a round: audit projections of each submission, and the functional key of their sum.

Algorithm 2.2 of the protocol. One functional key for a round, ever, and one set of projections: what they are for is in
the publisher's home before a key exists, so that a second one for other submissions is refused, after a restart too.
"""

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from prefect import task
from prefect.cache_policies import NO_CACHE

from blocks.artifacts import ArtifactStore, MissingArtifact
from blocks.identity import Identity
from contracts.messages import (
    AbortReason,
    Address,
    AuditGrant,
    Bytes32,
    Cohort,
    Collection,
    KeyGrant,
    KeyRequest,
    PublicKey,
    Registration,
    Submission,
    struct_hash,
)
from contracts.task_spec import PublishedTask
from tasks.chunks import Chunked, Layout, check_header, encode_header, joined, put_chunks, put_manifest
from tasks.cohort import trusted_cohort
from tasks.contribute import label_of
from tasks.crypto import ecies, ndd_fe
from tasks.dispatch import report_progress
from tasks.global_model import accepted, check_listing, weights_of
from tasks.publish import published_task
from tasks.records import BadRecord, Station, give_up, station

KEY_MAGIC = b"HCK1"


class KeyRefused(RuntimeError):
    """The publisher does not derive this functional key: it would say more than the task announces."""


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
    keys = np.empty((len(masks) * len(vectors), 4), np.uint64)
    for index, mask in enumerate(masks):
        keys[index * len(vectors) : (index + 1) * len(vectors)] = ndd_fe.derive_projection_key(mask, vectors)
        report_progress((index + 1) / len(masks), "deriving audit keys")
    sealed = seal_scalars(keys, cohort.aggregator_key, key_context("audit", task_id, round_number, name))
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
def derive_round_key(task_id: str, round_number: int, actor: str) -> dict[str, str]:
    """2.2, the publisher: the functional key of the round, for exactly the requested submissions, sealed to A.

    One piece of the key is in memory (`chunks`).
    """
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

    masks, weights = masks_of(st, cohort, submissions, "publisher"), weights_of(cohort, request)
    layout = Layout(submissions[0].coordinates, terms.spec.voting.chunk_coordinates)
    context = key_context("functional key", task_id, round_number, name)
    digests = []
    for piece in layout.pieces(layout.chunks):
        digests += store_key(st.store, st.address, layout, piece, masks, weights, cohort.aggregator_key, context)
        report_progress(layout.span(piece).stop / layout.coordinates, "deriving the functional key")
    return st.post(
        KeyGrant(
            task_id=task_id,
            round_number=round_number,
            publisher=st.address,
            request=name,
            sealed_sha256=put_manifest(st.store, st.address, layout, digests),
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


def claim_round(st: Station, task_id: str, round_number: int, purpose: str, name: str) -> None:
    """Remember, before a key is derived, for which submissions it is. Raises KeyRefused when it was for others."""
    kept = st.me.claim(f"{task_id}/{round_number:05d}/{purpose}-for", name.encode()).decode()
    if kept != name:
        raise KeyRefused(
            f"round {round_number} already has its {purpose} for {kept}: two keys of one round would reveal a single "
            "miner's update by subtraction"
        )


def masks_of(
    st: Station, cohort: Cohort, submissions: Sequence[Submission], role: Literal["publisher", "aggregator"]
) -> list[bytes]:
    """My half of the masks of each submission: K_iP for the publisher, K_iA for the aggregator."""
    keys = dict(zip(cohort.miners, encryption_keys(st, cohort), strict=True))
    return [
        st.me.mask_key(keys[one.miner], role, label_of(st, one.task_id, one.round_number, one.miner), one.salt)
        for one in submissions
    ]


def encryption_keys(st: Station, cohort: Cohort) -> list[str]:
    """Public encryption keys of the cohort's miners, in its order, as they registered them."""
    keys = []
    for miner, name in zip(cohort.miners, cohort.registrations, strict=True):
        registration = st.need(Registration, miner, cohort.task_id)
        if struct_hash(registration) != name:
            raise BadRecord(f"the registration of {miner} is not the one in the cohort")
        keys.append(registration.encryption_key)
    return keys


def audit_vectors(st: Station, terms: PublishedTask, block_number: int, coordinates: int) -> npt.NDArray[np.int8]:
    """The public +-1 vectors (K, k) of a round, from a block hash: K bytes a coordinate."""
    block_hash = bytes(st.chain.web3.eth.get_block(block_number)["hash"])
    count = terms.spec.voting.audit_projections
    size = -(-count * coordinates // 8)
    stream = hashlib.shake_256(b"audit" + terms.task_id.encode() + block_hash).digest(size)
    signs = np.unpackbits(np.frombuffer(stream, dtype=np.uint8), count=count * coordinates).view(np.int8)
    signs *= 2
    signs -= 1
    return signs.reshape(count, coordinates)


def store_key(
    store: ArtifactStore,
    owner: Address,
    layout: Layout,
    piece: range,
    masks: Sequence[bytes],
    weights: Sequence[int],
    recipient_key: PublicKey,
    context: bytes,
) -> list[Bytes32]:
    """Derive one piece of the functional key from the masks K_iP, seal it chunk by chunk; the chunks' digests."""
    span = layout.span(piece)
    key = ndd_fe.derive_key(masks, weights, span.stop - span.start, start=span.start)
    parts = zip(piece, layout.cut(key), strict=True)
    sealed = (seal_scalars(part, recipient_key, chunk_context(context, index)) for index, part in parts)
    return put_chunks(store, owner, sealed)


class SealedKey(Chunked):
    """The functional key of a round in the store, each chunk sealed to the aggregator for its place."""

    WHAT = "functional key"

    def scalars(self, chunks: Iterable[int], me: Identity, context: bytes) -> npt.NDArray[np.uint64]:
        """The scalars (n, 4) of some chunks, unsealed by `me`, one chunk after another. Raises BadRecord."""
        return joined(self._chunk(index, me, chunk_context(context, index)) for index in chunks)

    def _chunk(self, index: int, me: Identity, context: bytes) -> npt.NDArray[np.uint64]:
        count = self.layout.length(index)
        return self.read(index, sealed_size(count), lambda data: open_scalars(data, me, context, count))


def seal_scalars(scalars: npt.NDArray[np.uint64], recipient_key: PublicKey, context: bytes) -> bytes:
    """Seal scalars (n, 4): header, then 32 bytes each."""
    return ecies.seal(
        encode_header(KEY_MAGIC, len(scalars)) + ndd_fe.encode_scalars(scalars),
        bytes.fromhex(recipient_key[2:]),
        ephemeral_seed=secrets.token_bytes(48),
        context=context,
    )


def open_scalars(sealed: bytes, me: Identity, context: bytes, count: int) -> npt.NDArray[np.uint64]:
    """The `count` scalars (n, 4) sealed to me. Raises Unopenable, or ValueError for what `seal_scalars` does not make."""
    return ndd_fe.decode_scalars(check_header(me.open_sealed(sealed, context), KEY_MAGIC, count, 32))


def sealed_size(count: int) -> int:
    """Bytes of `count` sealed scalars: the sender's point, the header, the scalars, the tag."""
    return 33 + 12 + 32 * count + 16


def key_context(purpose: str, task_id: str, round_number: int, name: str) -> bytes:
    return f"{purpose}|{task_id}|{round_number}|{name}".encode()


def chunk_context(context: bytes, index: int) -> bytes:
    """A chunk opens in its own place only."""
    return context + f"|{index}".encode()
