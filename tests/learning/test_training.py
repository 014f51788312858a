"""Training repeats to the bit and fails loudly; the ready tasks really learn, sparse and in fixed point."""

import numpy as np
import pytest
import torch

from contracts.task_spec import load_task_file
from infra.cli import READY
from infra.simulate import plain_sum, simulate, simulate_dense
from tasks.learning import models, training
from tasks.learning.datasets import Dataset

RNG = np.random.default_rng(3)
DATA = Dataset(RNG.standard_normal((50, 4)).astype(np.float32), RNG.integers(0, 3, 50), 3)
MODULE = models.build("mlp", (4,), 3, {"hidden": [8]}, seed=0)
START = models.flatten(MODULE)
OPTIONS = {"epochs": 2, "batch_size": 8, "learning_rate": 0.1, "momentum": 0.9, "seed": 5}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(**changes):
    return training.train(MODULE, START, **{"dataset": DATA, **OPTIONS, **changes})


def test_training_repeats_to_the_bit_and_depends_on_its_seed():
    first = train()
    torch.manual_seed(99)
    assert first.tobytes() == train().tobytes()
    assert first.tobytes() != train(seed=6).tobytes()
    assert (first.dtype, first.shape) == (np.float32, START.shape)
    assert np.array_equal(models.flatten(MODULE), START)


def test_each_epoch_is_reported_with_its_loss():
    heard = []
    train(epochs=4, on_epoch=lambda epoch, loss: heard.append((epoch, loss)))
    assert [epoch for epoch, _ in heard] == [1, 2, 3, 4]
    assert heard[-1][1] < heard[0][1]


def test_the_proximal_term_holds_a_miner_near_the_common_model():
    def distance(**changes):
        return np.linalg.norm(train(epochs=10, learning_rate=0.02, **changes) - START)

    assert distance(proximal=5.0) < 0.7 * distance()
    assert distance(weight_decay=0.1) != distance()


def test_a_support_confines_training_and_the_rest_waits():
    support = np.arange(0, START.size, 3)
    rest = np.setdiff1d(np.arange(START.size), support)
    confined, half, full = (train(support=support, feedback=rate) - START for rate in (0.0, 0.5, 1.0))
    assert (confined[rest] == 0).all()
    assert (confined[support] != 0).any()
    assert np.array_equal(confined[support], full[support])
    assert np.allclose(half[rest], 0.5 * full[rest], atol=1e-6)
    assert np.abs(full[rest]).max() > 0.01


def test_the_whole_support_changes_nothing():
    assert train(support=np.arange(START.size)).tobytes() == train().tobytes()


def test_training_that_runs_away_raises():
    with pytest.raises(training.Diverged):
        train(learning_rate=1e30, epochs=5)
    huge = Dataset(np.full((4, 4), 3e38, np.float32), np.array([0, 1, 2, 0]), 3)
    with pytest.raises(training.Diverged):
        train(dataset=huge)


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"feedback": 1.5}])
def test_unusable_options_are_refused(changes):
    with pytest.raises(ValueError, match="expected"):
        train(**changes)


def test_evaluation_counts_exactly():
    parameters = train(epochs=20)
    first, again = (training.evaluate(MODULE, parameters, DATA) for _ in range(2))
    assert first == again
    worker = models.build("mlp", (4,), 3, {"hidden": [8]}, seed=1)
    models.load_flat(worker, parameters)
    with torch.no_grad():
        answers = worker(torch.from_numpy(DATA.features)).argmax(1).numpy()
    assert (first.correct, first.total) == (int((answers == DATA.labels).sum()), 50)
    assert first.correct > 25
    # In single precision or over other batches the answers are the same; so must the count on another host be.
    halves = [DATA.take(np.arange(25)), DATA.take(np.arange(25, 50))]
    assert sum(training.evaluate(MODULE, parameters, half).correct for half in halves) == first.correct


def test_evaluating_a_model_that_is_not_finite_raises():
    with pytest.raises(training.Diverged):
        training.evaluate(MODULE, np.full_like(START, np.nan), DATA)


# ── the ready tasks ──


def ready(name, seed):
    return load_task_file((READY / f"{name}.toml").read_text(), seed=seed).spec()


@pytest.mark.parametrize(("name", "required", "rounds"), [("breast-cancer", 0.94, 6), ("digits", 0.95, 6)])
def test_a_sparse_fixed_point_run_learns_as_well_as_a_dense_plain_one(name, required, rounds):
    spec = ready(name, seed=1)
    sparse, dense = simulate(spec, rounds=rounds), simulate_dense(spec, rounds=rounds)
    assert all(evaluation.correct >= required * evaluation.total for evaluation in sparse[-2:])
    assert sparse[-1].correct >= dense[-1].correct - 0.02 * dense[-1].total


def test_a_run_repeats_to_the_bit_and_goes_through_the_given_combiner():
    seen = []

    def combine(vectors, weights):
        seen.append((max(int(np.abs(vector).max()) for vector in vectors), len(vectors[0]), sum(weights)))
        return plain_sum(vectors, weights)

    spec = ready("breast-cancer", seed=0)
    assert simulate(spec, rounds=3, combine=combine) == simulate(spec, rounds=3)
    assert [size for _, size, _ in seen] == [982, 456, 212]
    assert all(largest <= 2047 and total <= 80 for largest, _, total in seen)
