"""Local training and evaluation. The same arguments give the same result on the same machine, to the last bit."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tasks.learning.datasets import Dataset
from tasks.learning.models import flatten, load_flat

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

EVALUATION_BATCH = 512  # samples; bounds memory, and keeps the order of the loss's sum fixed


class Diverged(ValueError):
    """Training or evaluation met a number that is not finite."""


@dataclass(frozen=True)
class Evaluation:
    """Accuracy is correct / total, as integers, so that others reproduce it exactly. loss: mean cross-entropy."""

    correct: int
    total: int
    loss: float


def train(
    module: nn.Module,
    parameters: Floats,
    dataset: Dataset,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    momentum: float,
    weight_decay: float = 0.0,
    proximal: float = 0.0,
    support: Integers | None = None,
    feedback: float = 1.0,
    seed: int,
    on_epoch: Callable[[int, float], None] | None = None,
) -> Floats:
    """New parameters (d,) after SGD from the given ones; the module is only read. Raises Diverged.

    proximal: coefficient mu of FedProx's mu/2 * |W - W_t|^2, which holds skewed miners near the common model.
    support: (k,) the only coordinates that the cohort sends this round. Local steps then move these alone, so that the
    miner optimises the model that the others will see; the steps of the other coordinates are added up beside it,
    times feedback, and come back in the result: error feedback keeps them for a later round. All of those steps are
    taken from one point, so at the full rate (1) they overshoot; a rate below 1 makes up for it.
    seed: order of the samples. on_epoch: called with the epoch (from 1) and its mean loss.
    """
    if epochs < 1 or batch_size < 1 or not learning_rate > 0:
        raise ValueError(
            f"epochs {epochs}, batch_size {batch_size}, learning_rate {learning_rate}: expected all to be positive"
        )
    if not 0 <= feedback <= 1:
        raise ValueError(f"feedback: {feedback}, expected 0 to 1")
    worker = copy.deepcopy(module)
    load_flat(worker, parameters)
    worker.train()
    features, labels = torch.from_numpy(dataset.features), torch.from_numpy(dataset.labels)
    anchors = [parameter.detach().clone() for parameter in worker.parameters()]
    optimizer = torch.optim.SGD(
        worker.parameters(), lr=learning_rate, momentum=momentum, weight_decay=weight_decay, foreach=False
    )
    sent = None if support is None else _masks(worker, support)
    waiting = [torch.zeros_like(anchor) for anchor in anchors]
    rng = np.random.default_rng(seed)

    for epoch in range(1, epochs + 1):
        total_loss = 0.0
        order = torch.from_numpy(rng.permutation(len(dataset)))
        for batch in order.split(batch_size):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(worker(features[batch]), labels[batch])
            loss.backward()
            if proximal:
                _pull_back(worker, anchors, proximal)
            optimizer.step()
            if sent is not None:
                _hold_back(worker, anchors, sent, waiting)
            total_loss += float(loss.detach()) * len(batch)
        if not np.isfinite(total_loss):
            raise Diverged(
                f"loss {total_loss} in epoch {epoch} at learning rate {learning_rate}: expected a smaller rate"
            )
        if on_epoch is not None:
            on_epoch(epoch, total_loss / len(dataset))

    with torch.no_grad():
        for parameter, steps in zip(worker.parameters(), waiting, strict=True):
            parameter.add_(steps, alpha=feedback)
    trained = flatten(worker)
    if not np.isfinite(trained).all():
        raise Diverged(f"parameters not finite after epoch {epochs} at learning rate {learning_rate}")
    return trained


def evaluate(module: nn.Module, parameters: Floats, dataset: Dataset) -> Evaluation:
    """Score the parameters on a dataset; the module is only read. Raises Diverged.

    In float64: hosts differ in the last bits of a sum, and there these are far below any margin between two classes,
    so that every host counts the same number of correct answers.
    """
    judge = copy.deepcopy(module)
    load_flat(judge, parameters)
    judge = judge.double().eval()
    correct, loss = 0, 0.0
    with torch.no_grad():
        for start in range(0, len(dataset), EVALUATION_BATCH):
            features = torch.from_numpy(dataset.features[start : start + EVALUATION_BATCH]).double()
            labels = torch.from_numpy(dataset.labels[start : start + EVALUATION_BATCH])
            outputs = judge(features)
            correct += int((outputs.argmax(dim=1) == labels).sum())
            loss += float(nn.functional.cross_entropy(outputs, labels, reduction="sum"))
    if not np.isfinite(loss):
        raise Diverged(f"loss {loss} on {len(dataset)} samples: expected a finite number")
    return Evaluation(correct=correct, total=len(dataset), loss=loss / len(dataset))


def _pull_back(worker: nn.Module, anchors: list[torch.Tensor], proximal: float) -> None:
    """Add the gradient of the proximal term."""
    with torch.no_grad():
        for parameter, anchor in zip(worker.parameters(), anchors, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter - anchor, alpha=proximal)


def _masks(worker: nn.Module, support: Integers) -> list[torch.Tensor]:
    """One boolean tensor per parameter: true where the coordinate is sent."""
    sizes = [parameter.numel() for parameter in worker.parameters()]
    flat = np.zeros(sum(sizes), dtype=bool)
    flat[support] = True
    pieces = torch.from_numpy(flat).split(sizes)
    return [piece.reshape(parameter.shape) for piece, parameter in zip(pieces, worker.parameters(), strict=True)]


def _hold_back(
    worker: nn.Module, anchors: list[torch.Tensor], sent: list[torch.Tensor], waiting: list[torch.Tensor]
) -> None:
    """Undo the last step where nothing is sent, and add it to what waits."""
    with torch.no_grad():
        for parameter, anchor, mask, steps in zip(worker.parameters(), anchors, sent, waiting, strict=True):
            steps.add_(torch.where(mask, 0.0, parameter - anchor))
            parameter.copy_(torch.where(mask, parameter, anchor))
