"""A whole task's learning in one process, from the very functions that the steps call: no chain, no messages, no homes.

For benchmarks and research. Encryption is exact on integers, so `combine` may be the real encryption or a plain sum, and
the models are those of the real run. What each part of a round takes is on a `Stopwatch`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from contracts.task_spec import TaskSpec
from infra.devstack import READY_DATASETS, ready_parts
from tasks.cohort import fixed_weights
from tasks.contribute import local_round
from tasks.global_model import GlobalModel, build_network, initial_model, next_model
from tasks.learning.compression import Memory
from tasks.learning.datasets import Dataset, rescale
from tasks.learning.training import Evaluation, evaluate, train

Integers = npt.NDArray[np.int64]
Combine = Callable[[list[Integers], Sequence[int]], Integers]


class Stopwatch:
    """Wall seconds by part of a round: one entry for each party that does the part, in the order in which they did it."""

    def __init__(self) -> None:
        self._spent: dict[str, list[float]] = {}

    def add(self, part: str, seconds: float) -> None:
        self._spent.setdefault(part, []).append(seconds)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.add(part, time.perf_counter() - started)

    def take(self) -> dict[str, list[float]]:
        """What was measured since the last call."""
        spent, self._spent = self._spent, {}
        return spent


def plain_sum(vectors: list[Integers], weights: Sequence[int]) -> Integers:
    """What encryption opens: the weighted sum of quantised vectors (k,)."""
    return np.asarray(weights, dtype=np.int64) @ np.stack(vectors)


def shares(spec: TaskSpec, miners: int) -> tuple[list[Dataset], Dataset]:
    """Each miner's part of a ready data set, and the publisher's validation set, as the model takes them."""
    named = ready_parts(spec.dataset, miners, spec.seed)
    named = {name: _as_the_model_takes(spec, part) for name, part in named.items()}
    validation = named.pop("publisher")
    return list(named.values()), validation


def ready_sets(spec: TaskSpec) -> tuple[Dataset, Dataset]:
    """All samples for miners of a ready data set, and the publisher's validation set, as the model takes them."""
    if spec.dataset.name not in READY_DATASETS:
        raise ValueError(f"dataset.name = {spec.dataset.name!r}: no ready data set ({', '.join(READY_DATASETS)})")
    train, validation = (_as_the_model_takes(spec, part) for part in READY_DATASETS[spec.dataset.name](spec.seed))
    return train, validation


def _as_the_model_takes(spec: TaskSpec, part: Dataset) -> Dataset:
    rules = spec.dataset
    return rescale(part, low=rules.low, high=rules.high, transform=rules.transform) if rules.low else part


def simulate(
    spec: TaskSpec,
    *,
    miners: int = 5,
    rounds: int | None = None,
    combine: Combine = plain_sum,
    watch: Stopwatch | None = None,
    on_round: Callable[[Evaluation], None] | None = None,
) -> list[Evaluation]:
    """The evaluation after each round of the task as it really runs: sparse, in fixed point, summed by `combine`.

    watch: gets training and compressing of each miner, stepping and evaluating. Training has the drawing of the support in
    it, which is small beside it. on_round: called with each evaluation as it comes.
    """
    watch = watch or Stopwatch()
    parts, validation = shares(spec, miners)
    weights = fixed_weights(spec, [len(part) for part in parts])
    model = initial_model(spec)
    memories = [Memory.zero(model.parameters.size)] * miners
    evaluations = []
    for number in range(1, (rounds or spec.rounds.max_rounds) + 1):
        vectors = []
        for miner, part in enumerate(parts):
            order = _sample_order(spec, number, miner)
            vector, memories[miner] = _local_round(spec, model, part, memories[miner], number, order, watch)
            vectors.append(vector)
        opened = combine(vectors, weights)
        with watch.measure("stepping"):
            model = next_model(spec, model, number, opened, sum(weights))
        with watch.measure("evaluating"):
            evaluations.append(evaluate(build_network(spec), model.parameters, validation))
        if on_round is not None:
            on_round(evaluations[-1])
    return evaluations


def simulate_dense(
    spec: TaskSpec,
    *,
    miners: int = 5,
    rounds: int | None = None,
    watch: Stopwatch | None = None,
    on_round: Callable[[Evaluation], None] | None = None,
) -> list[Evaluation]:
    """The same task in plaintext: every coordinate, as floats, federated averaging with the same weights."""
    watch = watch or Stopwatch()
    parts, validation = shares(spec, miners)
    weights = fixed_weights(spec, [len(part) for part in parts])
    network, rules = build_network(spec), spec.training
    parameters = initial_model(spec).parameters
    evaluations = []
    for number in range(1, (rounds or spec.rounds.max_rounds) + 1):
        trained = []
        for miner, part in enumerate(parts):
            with watch.measure("training"):
                local = train(
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
            trained.append(local)
        with watch.measure("stepping"):
            parameters = np.average(trained, axis=0, weights=weights).astype(np.float32)
        with watch.measure("evaluating"):
            evaluations.append(evaluate(network, parameters, validation))
        if on_round is not None:
            on_round(evaluations[-1])
    return evaluations


def _local_round(
    spec: TaskSpec,
    model: GlobalModel,
    part: Dataset,
    memory: Memory,
    number: int,
    order: int,
    watch: Stopwatch,
) -> tuple[Integers, Memory]:
    """A miner's quantised values and next memory; the end of the last epoch divides training from compressing."""
    marks = [time.perf_counter()]
    _, vector, memory = local_round(
        spec, model, part, memory, number, sample_order=order, on_epoch=lambda *_: marks.append(time.perf_counter())
    )
    watch.add("training", marks[-1] - marks[0])
    watch.add("compressing", time.perf_counter() - marks[-1])
    return vector, memory


def _sample_order(spec: TaskSpec, round_number: int, miner: int) -> int:
    return spec.seed * 10_000 + round_number * 100 + miner
