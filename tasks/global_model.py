"""The model between rounds, as everybody can compute it: from the public terms and the published openings alone.

W_0       drawn from the task's seed, or the model that its terms name as start
W_r       W_{r-1} + server step of the mean of the sum opened in round r
support   the coordinates of round r, from the mean of round r-1 and the seed
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from blocks.artifacts import ArtifactStore, sha256_hex
from contracts.messages import Address, Bytes32, Cohort, Collection, KeyRequest, RoundResult
from contracts.task_spec import TaskSpec
from tasks.chunks import Chunked, Layout, check_header, encode_header, joined, put_chunks
from tasks.crypto import ndd_fe
from tasks.learning import aggregation, compression, models
from tasks.records import BadRecord, Station

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Scalars = npt.NDArray[np.uint64]

OPENING_MAGIC = b"HCO1"
ENTRY_BYTES = 8 + 32


@dataclass(frozen=True, eq=False)
class GlobalModel:
    """Parameters (d,), the server step's memory, and the mean update that led here (None before round 1)."""

    parameters: Floats
    server_state: aggregation.ServerState
    last_combined: Floats | None

    @property
    def sha256(self) -> Bytes32:
        return sha256_hex(models.encode_parameters(self.parameters))


class Opening(Chunked):
    """The opening (m, rho) of a round in the store."""

    WHAT = "opening"

    def opened(self, chunks: Iterable[int]) -> tuple[Integers, Scalars]:
        """m (n,) and rho (n, 4) of some chunks, one after another. Raises BadRecord."""
        parts = [self._chunk(index) for index in chunks]
        return joined(m for m, _ in parts), joined(rho for _, rho in parts)

    def weighted_sum(self) -> Integers:
        """m (k,), all of it. Of rho, a piece at a time is in memory. Raises BadRecord."""
        weighted_sum = np.empty(self.layout.coordinates, np.int64)
        for piece in self.layout.pieces(self.layout.chunks):
            weighted_sum[self.layout.span(piece)] = self.opened(piece)[0]
        return weighted_sum

    def _chunk(self, index: int) -> tuple[Integers, Scalars]:
        count = self.layout.length(index)
        return self.read(index, opening_size(count), lambda data: decode_opening(data, count))


def build_network(spec: TaskSpec) -> nn.Module:
    dataset = spec.dataset
    return models.build(spec.model.name, dataset.input_shape, dataset.classes, spec.model.options, spec.seed)


def initial_model(spec: TaskSpec, store: ArtifactStore | None = None) -> GlobalModel:
    """W_0. A start that the terms name is read from the store; errors as in `start_parameters`."""
    parameters = models.flatten(build_network(spec)) if spec.model.start is None else start_parameters(spec, store)
    return GlobalModel(parameters, aggregation.ServerState.zero(parameters.size), None)


def start_parameters(spec: TaskSpec, store: ArtifactStore | None) -> Floats:
    """The parameters (d,) of the model that the terms name. Raises MissingArtifact, TamperedArtifact, or BadRecord when they are
    not those of the task's architecture.
    """
    start, model = spec.model.start, spec.model
    if start is None or store is None:
        raise ValueError(f"model.start = {start}: a start is read from a store, and there is none here")
    dimension = models.dimension(model.name, spec.dataset.input_shape, spec.dataset.classes, model.options)
    data = store.get(start.owner, start.sha256, max_bytes=models.encoded_size(dimension))
    try:
        parameters = models.decode_parameters(data)
    except models.InvalidModel as error:
        raise BadRecord(f"model.start = {start.uri} is no model: {error}") from error
    if parameters.size != dimension:
        raise BadRecord(
            f"model.start = {start.uri} has {parameters.size} parameters, model.name = {model.name!r} with its options has "
            f"{dimension}: name a start of the same architecture"
        )
    return parameters


def round_support(spec: TaskSpec, model: GlobalModel, round_number: int) -> Integers:
    """The coordinates (k,) that every miner sends in this round."""
    rules = spec.compression
    return compression.support(
        model.parameters.size,
        round_number,
        model.last_combined,
        density=rules.density,
        explore_share=rules.explore_share,
        seed=str(spec.seed).encode(),
        warmup_rounds=rules.warmup_rounds,
    )


def next_model(
    spec: TaskSpec, model: GlobalModel, round_number: int, weighted_sum: Integers, total_weight: int
) -> GlobalModel:
    """W_r from W_{r-1} and the opened sum (k,) on the round's support."""
    support = round_support(spec, model, round_number)
    # A sum beyond what honest updates can reach is some miner's doing: it is published as it is, and moves nothing.
    weighted_sum = np.where(np.abs(weighted_sum) > spec.recovery_bound(total_weight), 0, weighted_sum)
    mean = aggregation.weighted_mean(weighted_sum, total_weight, spec.compression.scale, support, model.parameters.size)
    step = aggregation.SERVER_STEPS[spec.aggregation.server_step]
    options: dict[str, Any] = dict(spec.aggregation.options)
    parameters, state = step(model.parameters, mean, model.server_state, **options)
    return GlobalModel(parameters, state, mean)


def model_after(station: Station, spec: TaskSpec, cohort: Cohort, round_number: int) -> GlobalModel:
    """W_r, replayed from the openings. Raises BadRecord when a published digest is not that of the replayed model."""
    model = initial_model(spec, station.store)
    for number in range(1, round_number + 1):
        result, opening = opened_round(station, spec, cohort, number, at_most=model.parameters.size)
        weight = sum(weights_of(cohort, accepted(station, cohort, number)))
        model = next_model(spec, model, number, opening.weighted_sum(), weight)
        if model.sha256 != result.model_sha256:
            raise BadRecord(
                f"round {number}: the published model {result.model_sha256} is not W_{number - 1} plus the server step "
                f"of the opened sum, which has digest {model.sha256}"
            )
    return model


def opened_round(
    station: Station, spec: TaskSpec, cohort: Cohort, round_number: int, *, at_most: int
) -> tuple[RoundResult, Opening]:
    """The aggregator's signed result of a round, and its opening of at most `at_most` coordinates. Raises BadRecord."""
    result = station.need(RoundResult, cohort.aggregator, cohort.task_id, round_number)
    size = spec.voting.chunk_coordinates
    return result, Opening.listed(station.store, cohort.aggregator, result.opening_sha256, size=size, at_most=at_most)


def accepted(station: Station, cohort: Cohort, round_number: int) -> KeyRequest:
    """Whose submissions make the sum of a round. Raises BadRecord when the list is not of this cohort."""
    request = station.need(KeyRequest, cohort.aggregator, cohort.task_id, round_number)
    check_listing(cohort, request)
    return request


def check_listing(cohort: Cohort, listing: Collection | KeyRequest) -> None:
    """Raise BadRecord unless the listed miners are of the cohort, in address order, each once with one submission."""
    number = listing.round_number
    if len(listing.miners) != len(listing.submissions) or not set(listing.miners) <= set(cohort.miners):
        raise BadRecord(f"round {number}: the accepted submissions are not of this cohort")
    if list(listing.miners) != sorted(set(listing.miners), key=str.lower):
        raise BadRecord(f"round {number}: the accepted miners are not in address order, each once")


def weights_of(cohort: Cohort, request: KeyRequest) -> list[int]:
    """y_i of the accepted miners, in their order."""
    weight = dict(zip(cohort.miners, cohort.weights, strict=True))
    return [weight[miner] for miner in request.miners]


def store_opening(
    store: ArtifactStore, owner: Address, layout: Layout, weighted_sum: Integers, blinding: Scalars
) -> list[Bytes32]:
    """Store a piece of an opening, m (n,) and rho (n, 4), from the beginning of a chunk on; the chunks' digests."""
    parts = zip(layout.cut(weighted_sum), layout.cut(blinding), strict=True)
    return put_chunks(store, owner, (encode_opening(m, rho) for m, rho in parts))


def encode_opening(weighted_sum: Integers, blinding: Scalars) -> bytes:
    """One chunk of (m, rho): header, m as little-endian int64, rho as 32-byte little-endian scalars."""
    header = encode_header(OPENING_MAGIC, len(weighted_sum))
    return header + weighted_sum.astype("<i8").tobytes() + ndd_fe.encode_scalars(blinding)


def opening_size(count: int) -> int:
    """Bytes of an encoded chunk of `count` coordinates."""
    return 12 + ENTRY_BYTES * count


def decode_opening(data: bytes, count: int) -> tuple[Integers, Scalars]:
    """(m, rho) of a chunk of `count`. Raises ValueError for anything that `encode_opening` does not produce."""
    body = check_header(data, OPENING_MAGIC, count, ENTRY_BYTES)
    return np.frombuffer(body, dtype="<i8", count=count).astype(np.int64), ndd_fe.decode_scalars(body[8 * count :])
