"""What a WebAssembly module gets as the training step of a task, and how its answer is read. PURE.

A module sees the named parameters of the network as MODEL_DATA, a name each with nested lists of its shape, the samples as
DATASET_DATA, {"data": [{"x": [features, flat], "y": label}, ..]}, and the terms of training as HYPERPARAMS. It answers a JSON
object whose `update` has the trained parameters under the same names. It is the contract of edge devices, so that one module
serves both. Error: InvalidAnswer.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from tasks.learning.datasets import Dataset
from tasks.learning.models import Floats, load_flat


class InvalidAnswer(ValueError):
    """What a module answered is no update of the model; names the field, and what would be right."""


def environment(
    module: nn.Module,
    parameters: Floats,
    dataset: Dataset,
    hyperparameters: Mapping[str, float],
    *,
    round_id: str,
    model_uri: str,
    seed: int,
) -> dict[str, str]:
    """The input of one round. The module's own parameters become `parameters` (d,); seed: order of the samples."""
    load_flat(module, parameters)
    model = {name: parameter.detach().numpy().tolist() for name, parameter in module.named_parameters()}
    order = np.random.default_rng(seed).permutation(len(dataset))
    features, labels = dataset.features.reshape(len(dataset), -1)[order], dataset.labels[order]
    rows = [{"x": x, "y": y} for x, y in zip(features.tolist(), labels.tolist(), strict=True)]
    return {
        "ROUND_ID": round_id,
        "MODEL_URI": model_uri,
        "HYPERPARAMS": json.dumps(dict(hyperparameters)),
        "MODEL_DATA": json.dumps(model),
        "DATASET_DATA": json.dumps({"data": rows}),
    }


def trained_parameters(answer: Mapping[str, Any], module: nn.Module) -> Floats:
    """(d,) float32 in the module's order. Raises InvalidAnswer."""
    update = answer.get("update")
    if not isinstance(update, dict):
        raise InvalidAnswer(f"update: {type(update).__name__}, expected an object with the trained parameters")
    named = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    if set(update) != set(named):
        raise InvalidAnswer(f"update: parameters {sorted(update)[:8]}, expected {sorted(named)[:8]}")
    return np.concatenate([_tensor(name, update[name], shape).ravel() for name, shape in named.items()])


def _tensor(name: str, value: Any, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    try:
        numbers = np.array(value)
    except ValueError as error:
        raise InvalidAnswer(f"update.{name}: rows of different lengths, expected shape {shape}") from error
    if numbers.dtype.kind not in "iuf" or numbers.shape != shape:
        raise InvalidAnswer(
            f"update.{name}: {numbers.dtype} of shape {numbers.shape}, expected numbers of shape {shape}"
        )
    with np.errstate(over="ignore"):
        tensor = numbers.astype(np.float32)
    if not np.isfinite(tensor).all():
        raise InvalidAnswer(f"update.{name}: expected finite numbers of single precision")
    return tensor
