"""A whole task's learning in one process, from the very functions that the steps call: no chain, no messages, no homes.

For benchmarks and research. Encryption is exact on integers, so `combine` may be the real encryption or a plain sum, and
the models are those of the real run.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from contracts.task_spec import TaskSpec
from infra.devstack import split_among
from tasks.cohort import fixed_weights
from tasks.contribute import local_round
from tasks.global_model import build_network, initial_model, next_model
from tasks.learning.compression import Memory
from tasks.learning.datasets import Dataset, load_ready, rescale
from tasks.learning.training import Evaluation, evaluate, train

Integers = npt.NDArray[np.int64]
Combine = Callable[[list[Integers], Sequence[int]], Integers]


def plain_sum(vectors: list[Integers], weights: Sequence[int]) -> Integers:
    """What encryption opens: the weighted sum of quantised vectors (k,)."""
    return np.asarray(weights, dtype=np.int64) @ np.stack(vectors)


def shares(spec: TaskSpec, miners: int) -> tuple[list[Dataset], Dataset]:
    """Each miner's part of a ready data set, and the publisher's validation set, as the model takes them."""
    rules = spec.dataset
    named = split_among(load_ready(rules.name), rules, miners, spec.seed)
    if rules.low:
        named = {
            name: rescale(part, low=rules.low, high=rules.high, transform=rules.transform)
            for name, part in named.items()
        }
    validation = named.pop("publisher")
    return list(named.values()), validation


def simulate(
    spec: TaskSpec, *, miners: int = 5, rounds: int | None = None, combine: Combine = plain_sum
) -> list[Evaluation]:
    """The evaluation after each round of the task as it really runs: sparse, in fixed point, summed by `combine`."""
    parts, validation = shares(spec, miners)
    weights = fixed_weights(spec, [len(part) for part in parts])
    model = initial_model(spec)
    memories = [Memory.zero(model.parameters.size)] * miners
    evaluations = []
    for number in range(1, (rounds or spec.rounds.max_rounds) + 1):
        vectors = []
        for miner, part in enumerate(parts):
            order = _sample_order(spec, number, miner)
            _, vector, memories[miner] = local_round(spec, model, part, memories[miner], number, sample_order=order)
            vectors.append(vector)
        model = next_model(spec, model, number, combine(vectors, weights), sum(weights))
        evaluations.append(evaluate(build_network(spec), model.parameters, validation))
    return evaluations


def simulate_dense(spec: TaskSpec, *, miners: int = 5, rounds: int | None = None) -> list[Evaluation]:
    """The same task in plaintext: every coordinate, as floats, federated averaging with the same weights."""
    parts, validation = shares(spec, miners)
    weights = fixed_weights(spec, [len(part) for part in parts])
    network, rules = build_network(spec), spec.training
    parameters = initial_model(spec).parameters
    evaluations = []
    for number in range(1, (rounds or spec.rounds.max_rounds) + 1):
        trained = [
            train(
                network,
                parameters,
                part,
                epochs=rules.local_epochs,
                batch_size=rules.batch_size,
                learning_rate=rules.learning_rate,
                momentum=rules.momentum,
                weight_decay=rules.weight_decay,
                proximal=rules.proximal,
                seed=_sample_order(spec, number, miner),
            )
            for miner, part in enumerate(parts)
        ]
        parameters = np.average(trained, axis=0, weights=weights).astype(np.float32)
        evaluations.append(evaluate(network, parameters, validation))
    return evaluations


def _sample_order(spec: TaskSpec, round_number: int, miner: int) -> int:
    return spec.seed * 10_000 + round_number * 100 + miner
