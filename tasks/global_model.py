"""The model between rounds, as everybody can compute it: from the public seed and the published openings alone.

W_0       drawn from the task's seed
W_r       W_{r-1} + server step of the mean of the sum opened in round r
support   the coordinates of round r, from the mean of round r-1 and the seed
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from blocks.artifacts import sha256_hex
from contracts.messages import Bytes32, Cohort, Collection, KeyRequest, RoundResult
from contracts.task_spec import TaskSpec
from tasks.crypto import ndd_fe
from tasks.learning import aggregation, compression, models
from tasks.records import BadRecord, Station

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Scalars = npt.NDArray[np.uint64]

OPENING_MAGIC = b"HCO1"


@dataclass(frozen=True, eq=False)
class GlobalModel:
    """Parameters (d,), the server step's memory, and the mean update that led here (None before round 1)."""

    parameters: Floats
    server_state: aggregation.ServerState
    last_combined: Floats | None

    @property
    def sha256(self) -> Bytes32:
        return sha256_hex(models.encode_parameters(self.parameters))


def build_network(spec: TaskSpec) -> nn.Module:
    dataset = spec.dataset
    return models.build(spec.model.name, dataset.input_shape, dataset.classes, spec.model.options, spec.seed)


def initial_model(spec: TaskSpec) -> GlobalModel:
    parameters = models.flatten(build_network(spec))
    return GlobalModel(parameters, aggregation.ServerState.zero(parameters.size), None)


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
    model = initial_model(spec)
    for number in range(1, round_number + 1):
        result, weighted_sum = opened_round(station, cohort, number)
        weight = sum(weights_of(cohort, accepted(station, cohort, number)))
        model = next_model(spec, model, number, weighted_sum, weight)
        if model.sha256 != result.model_sha256:
            raise BadRecord(
                f"round {number}: the published model {result.model_sha256} is not W_{number - 1} plus the server step "
                f"of the opened sum, which has digest {model.sha256}"
            )
    return model


def opened_round(station: Station, cohort: Cohort, round_number: int) -> tuple[RoundResult, Integers]:
    """The aggregator's signed result of a round, and the sum m (k,) it opened."""
    result = station.need(RoundResult, cohort.aggregator, cohort.task_id, round_number)
    weighted_sum, _ = decode_opening(station.store.get(cohort.aggregator, result.opening_sha256))
    return result, weighted_sum


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


def encode_opening(weighted_sum: Integers, blinding: Scalars) -> bytes:
    """(m, rho) of a round: magic, count, m as little-endian int64, rho as 32-byte little-endian scalars."""
    header = OPENING_MAGIC + len(weighted_sum).to_bytes(8, "little")
    return header + weighted_sum.astype("<i8").tobytes() + ndd_fe.encode_scalars(blinding)


def decode_opening(data: bytes) -> tuple[Integers, Scalars]:
    """(m, rho). Raises BadRecord for anything that `encode_opening` does not produce."""
    count = int.from_bytes(data[4:12], "little")
    if data[:4] != OPENING_MAGIC or len(data) != 12 + 40 * count:
        raise BadRecord(f"opening: {len(data)} bytes beginning {data[:4]!r} are no opening of {count} coordinates")
    weighted_sum = np.frombuffer(data, dtype="<i8", count=count, offset=12).astype(np.int64)
    try:
        return weighted_sum, ndd_fe.decode_scalars(data[12 + 8 * count :])
    except ndd_fe.InvalidEncoding as error:
        raise BadRecord(f"opening: {error}") from error
