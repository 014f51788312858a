"""M3. Train, compress, score, encrypt, submit: a miner's part of a round (Algorithm 3).

What the miner must not do twice is in its home before anything leaves the host: the quantised update, the salt and the
score of a round (`prepared.npz`). A killed run finds them and encrypts the same values under the same salt, which gives
the same ciphertext; it never trains again, and never puts one mask on two different updates.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from prefect import task
from prefect.cache_policies import NO_CACHE

from blocks.artifacts import ArtifactStore, MissingArtifact
from contracts.messages import (
    Address,
    Bytes,
    Bytes32,
    Cohort,
    Collection,
    KeyRequest,
    RoundResult,
    Submission,
    score_commit,
)
from contracts.task_spec import TaskSpec
from tasks.chunks import Chunked, Layout, chunk_root, joined, put_chunks, put_manifest
from tasks.cohort import trusted_cohort
from tasks.crypto import merkle, ndd_fe
from tasks.dispatch import report_progress
from tasks.global_model import GlobalModel, build_network, initial_model, model_after, round_support
from tasks.learning import compression
from tasks.learning.compression import Memory
from tasks.learning.datasets import Dataset, decode_arrays, encode_arrays
from tasks.learning.training import train
from tasks.publish import published_task
from tasks.records import BadRecord, Station, station
from tasks.samples import load_samples
from tasks.workload import Workload, train_by_module, workload_of


class TooLate(RuntimeError):
    """The aggregator closed the round before this submission."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A miner's round before encryption. Secret. values: (k,) int64; score of this round alone and over the task."""

    values: npt.NDArray[np.int64]
    support: npt.NDArray[np.int64]
    memory: Memory
    salt: bytes
    score_salt: bytes
    round_score: int
    score: int

    def encode(self) -> bytes:
        numbers = {"round_score": str(self.round_score), "score": str(self.score)}
        texts = {"salt": self.salt.hex(), "score_salt": self.score_salt.hex(), **numbers}
        arrays: dict[str, npt.NDArray[Any]] = {
            "values": self.values,
            "support": self.support,
            "velocity": self.memory.velocity,
            "residual": self.memory.residual,
            "fields": np.frombuffer(json.dumps(texts).encode(), dtype=np.uint8),
        }
        return encode_arrays(arrays)

    @classmethod
    def decode(cls, data: bytes) -> "Prepared":
        arrays = decode_arrays(data)
        fields = json.loads(arrays["fields"].tobytes())
        return cls(
            values=arrays["values"],
            support=arrays["support"],
            memory=Memory(arrays["velocity"], arrays["residual"]),
            salt=bytes.fromhex(fields["salt"]),
            score_salt=bytes.fromhex(fields["score_salt"]),
            round_score=int(fields["round_score"]),
            score=int(fields["score"]),
        )


def read_prepared(st: Station, task_id: str, round_number: int) -> Prepared | None:
    data = st.me.read_private(_prepared_name(task_id, round_number))
    return None if data is None else Prepared.decode(data)


def label_of(st: Station, task_id: str, round_number: int, miner: Address) -> ndd_fe.Label:
    """What the masks of one submission are bound to: chain, contract, miner, task and round."""
    domain = hashlib.sha256(st.domain.digest() + bytes.fromhex(miner[2:])).digest()
    return ndd_fe.Label(domain=domain, task_id=task_id, round_number=round_number)


def score_at(prepared: Prepared, task_id: str, miner: str) -> Bytes32:
    return score_commit(prepared.score, prepared.score_salt, task_id, miner)


@task(persist_result=False, cache_policy=NO_CACHE)
def train_locally(task_id: str, round_number: int, actor: str) -> None:
    """M3, first half: train from W_t, compress on the common support, quantise, score. Stays on this host."""
    st = station(actor)
    if read_prepared(st, task_id, round_number) is not None:
        return
    terms, cohort = published_task(st, task_id), trusted_cohort(st, task_id)
    spec = terms.spec
    if not 1 <= round_number <= spec.rounds.max_rounds:
        raise BadRecord(f"round {round_number}: the terms of {task_id} have rounds 1 to {spec.rounds.max_rounds}")
    if read_prepared(st, task_id, round_number + 1) is not None:
        raise TooLate(f"round {round_number} is over: round {round_number + 1} is prepared already")
    if st.address not in cohort.miners:
        raise BadRecord(f"{st.address} is not in the cohort of {task_id}")
    model = model_after(st, spec, cohort, round_number - 1)
    memory, earlier_score = _memory_before(st, spec, cohort, round_number, model.parameters.size)
    support, quantised, memory = local_round(
        spec,
        model,
        load_samples(st.me, spec.dataset, "train"),
        memory,
        round_number,
        sample_order=order_of_samples(spec, st.address, round_number),
        on_epoch=lambda epoch, loss: report_progress(
            epoch / spec.training.local_epochs, f"epoch {epoch}, loss {loss:.3f}"
        ),
        workload=workload_of(spec, st, terms.publisher),
    )
    round_score = compression.score(quantised)
    prepared = Prepared(
        values=quantised,
        support=support,
        memory=memory,
        salt=secrets.token_bytes(16),
        score_salt=secrets.token_bytes(32),
        round_score=round_score,
        score=earlier_score + round_score,
    )
    # Whoever is first decides, should the step run twice at once: one update, under one salt.
    st.me.claim(_prepared_name(task_id, round_number), prepared.encode())


def local_round(
    spec: TaskSpec,
    model: GlobalModel,
    dataset: Dataset,
    memory: Memory,
    round_number: int,
    *,
    sample_order: int,
    on_epoch: Callable[[int, float], None] | None = None,
    workload: Workload | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Memory]:
    """A miner's computation of a round: the support (k,), the quantised values on it (k,), the next memory.

    workload: where the terms name one. Raises Diverged, or what a module can fail of.
    """
    shrink = spec.compression
    support = round_support(spec, model, round_number)
    trained = _trained(spec, model, dataset, support, round_number, sample_order, on_epoch, workload)
    values, memory = compression.compress(
        trained - model.parameters, memory, support, momentum=shrink.momentum, clip_norm=shrink.clip_norm
    )
    quantised, memory = compression.to_fixed_point(values, memory, support, scale=shrink.scale, bound=shrink.bound)
    return support, quantised, memory


def _trained(
    spec: TaskSpec,
    model: GlobalModel,
    dataset: Dataset,
    support: npt.NDArray[np.int64],
    round_number: int,
    sample_order: int,
    on_epoch: Callable[[int, float], None] | None,
    workload: Workload | None,
) -> npt.NDArray[np.float32]:
    """The parameters (d,) after the local steps: those of the workload, where the terms name one."""
    rules = spec.training
    if spec.workload is not None:
        if workload is None:
            raise ValueError(f"workload = {spec.workload}: only a task that really runs can train by a module")
        parameters, loss = train_by_module(spec, workload, model, dataset, round_number, sample_order=sample_order)
        if on_epoch is not None and loss is not None:
            on_epoch(rules.local_epochs, loss)
        return parameters
    return train(
        build_network(spec),
        model.parameters,
        dataset,
        epochs=rules.local_epochs,
        batch_size=rules.batch_size,
        learning_rate=rules.learning_rate,
        momentum=rules.momentum,
        weight_decay=rules.weight_decay,
        proximal=rules.proximal,
        support=support,
        feedback=rules.feedback,
        seed=sample_order,
        on_epoch=on_epoch,
    )


@task(persist_result=False, cache_policy=NO_CACHE)
def encrypt_and_submit(task_id: str, round_number: int, actor: str) -> dict[str, str]:
    """M3, second half: encrypt, upload in chunks, sign, submit. Raises TooLate when the round is closed.

    Beside the prepared round, one piece of ciphertext is in memory (`chunks`).
    """
    st = station(actor)
    if posted := st.mine(Submission, task_id, round_number):
        return st.reference(posted)
    spec, cohort = published_task(st, task_id).spec, trusted_cohort(st, task_id)
    if st.find(Collection, cohort.aggregator, task_id, round_number) is not None:
        raise TooLate(f"round {round_number} was closed by the aggregator before this submission")
    prepared = read_prepared(st, task_id, round_number)
    if prepared is None:
        raise MissingArtifact(f"round {round_number} of {task_id} is not prepared in {st.me.home}: train first")

    salt: Bytes = "0x" + prepared.salt.hex()
    label = label_of(st, task_id, round_number, st.address)
    masks = (
        st.me.mask_key(cohort.publisher_key, "publisher", label, salt),
        st.me.mask_key(cohort.aggregator_key, "aggregator", label, salt),
    )
    layout = Layout(len(prepared.values), spec.voting.chunk_coordinates)
    digests = []
    for piece in layout.pieces(layout.chunks):
        values = prepared.values[layout.span(piece)]
        digests += store_ciphertext(st.store, st.address, layout, piece, values, masks, bound=spec.compression.bound)
        report_progress(layout.span(piece).stop / layout.coordinates, "encrypting")

    base = (
        st.need(RoundResult, cohort.aggregator, task_id, round_number - 1).model_sha256
        if round_number > 1
        else initial_model(spec, st.store).sha256
    )
    return st.post(
        Submission(
            task_id=task_id,
            round_number=round_number,
            miner=st.address,
            base_model_sha256=base,
            ciphertext_root=chunk_root(digests),
            chunks_sha256=put_manifest(st.store, st.address, layout, digests),
            coordinates=layout.coordinates,
            score_commit=score_at(prepared, task_id, st.address),
            salt=salt,
            sample_count=len(load_samples(st.me, spec.dataset, "train")),
        )
    )


def store_ciphertext(
    store: ArtifactStore,
    owner: Address,
    layout: Layout,
    piece: range,
    values: npt.NDArray[np.int64],
    masks: tuple[bytes, bytes],
    *,
    bound: int,
) -> list[Bytes32]:
    """Encrypt one piece, values (n,) with |value| <= bound, and store it; masks: K_iP, K_iA. The chunks' digests."""
    points = ndd_fe.encrypt(values, *masks, bound=bound, start=layout.span(piece).start)
    return put_chunks(store, owner, map(ndd_fe.encode_points, layout.cut(points)))


class Ciphertext(Chunked):
    """A miner's ciphertext in the store."""

    WHAT = "ciphertext"

    def points(self, chunks: Iterable[int]) -> npt.NDArray[np.uint64]:
        """The points (n, 8) of some chunks, on the curve, one chunk after another. Raises BadRecord."""
        return joined(self._chunk(index) for index in chunks)

    def pieces(self, progress: Callable[[float], None]) -> Iterator[npt.NDArray[np.uint64]]:
        """All points, piece by piece; `progress` is told the share read so far, in (0, 1]. Raises BadRecord."""
        for piece in self.layout.pieces(self.layout.chunks):
            yield self.points(piece)
            progress(self.layout.span(piece).stop / self.layout.coordinates)

    def _chunk(self, index: int) -> npt.NDArray[np.uint64]:
        count = self.layout.length(index)
        points = self.read(index, ndd_fe.encoded_size(count), ndd_fe.decode_points)
        if len(points) != count:
            raise BadRecord(f"chunk {index} of the ciphertext of {self.owner}: {len(points)} points, expected {count}")
        return points


def submitted_ciphertext(store: ArtifactStore, submission: Submission, size: int) -> Ciphertext:
    """The ciphertext that a miner signed, in chunks of `size`; its points are not read yet. Raises BadRecord."""
    count = submission.coordinates
    ciphertext = Ciphertext.listed(store, submission.miner, submission.chunks_sha256, size=size, at_most=count)
    if ciphertext.layout.coordinates != count:
        raise BadRecord(
            f"the manifest of {submission.miner} lists {ciphertext.layout.coordinates} coordinates, {count} are signed"
        )
    if ciphertext.root() != submission.ciphertext_root:
        raise BadRecord(f"the chunks of {submission.miner} do not hash to the root that it signed")
    return ciphertext


def _memory_before(
    st: Station, spec: TaskSpec, cohort: Cohort, round_number: int, dimension: int
) -> tuple[Memory, int]:
    """The residual and velocity to start from, and the score of the rounds that counted.

    A round whose submission was not accepted gave nothing: what it had sent goes back to the residual.
    """
    memory, score = Memory.zero(dimension), 0
    for number in range(1, round_number):
        prepared = read_prepared(st, cohort.task_id, number)
        if prepared is None:
            continue
        memory = prepared.memory
        request = st.find(KeyRequest, cohort.aggregator, cohort.task_id, number)
        if request is not None and st.address in request.miners:
            score += prepared.round_score
        else:
            residual = memory.residual.copy()
            residual[prepared.support] += compression.dequantize(prepared.values, scale=spec.compression.scale)
            memory = Memory(memory.velocity, residual)
    return memory, score


def order_of_samples(spec: TaskSpec, miner: str, round_number: int) -> int:
    """Seed of the order in which a miner sees its samples: repeatable, different for each miner and round."""
    return int.from_bytes(merkle.leaf_hash(f"{spec.seed}|{miner}|{round_number}".encode())[:8], "big")


def _prepared_name(task_id: str, round_number: int) -> str:
    return f"{task_id}/{round_number:05d}/prepared.npz"
