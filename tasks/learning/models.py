"""Small networks, built the same everywhere from a name, options and a seed; and a model as one flat vector.

No batch normalisation: its running statistics are not parameters, so they cannot be averaged, encrypted or verified.
The initial parameters are drawn by numpy rather than torch, whose streams differ between kinds of processor.
"""

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Floats = npt.NDArray[np.float32]
Options = Mapping[str, Any]

MAGIC = b"HCMP"
VERSION = 1
HEADER = struct.Struct("<4sHxxQ")  # magic, version, two zero bytes, number of parameters


class InvalidModel(ValueError):
    """Unknown model or option, or parameters that do not fit; names the field, the value and the choices."""


def logistic(input_shape: Sequence[int], classes: int) -> nn.Sequential:
    """One linear layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), classes))


class Binary(nn.Module):
    """Logistic regression of two classes with one weight a feature, named as modules for edge devices name them: w (d,), b ().

    The logits (n, 2) are 0 and z = w x + b, so that the cross-entropy is the log loss of 1 / (1 + exp(-z)).
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(features))
        self.b = nn.Parameter(torch.empty(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = x.flatten(1) @ self.w + self.b
        return torch.stack([torch.zeros_like(z), z], dim=1)


def binary(input_shape: Sequence[int], classes: int) -> Binary:
    """One score for class 1 against class 0. Its initial parameters are zero."""
    if classes != 2:
        raise InvalidModel(f"classes: {classes}, a binary model expects 2")
    return Binary(math.prod(input_shape))


def mlp(input_shape: Sequence[int], classes: int, *, hidden: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them; hidden: their widths."""
    widths = [math.prod(input_shape), *_sizes("hidden", hidden)]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def cnn(input_shape: Sequence[int], classes: int, *, channels: Sequence[int], hidden: int) -> nn.Sequential:
    """3x3 convolutions with ReLU, each followed by 2x2 max pooling, then one hidden linear layer.

    channels: output channels of each convolution; every one halves height and width.
    """
    if len(input_shape) != 3:
        raise InvalidModel(f"input_shape: {tuple(input_shape)}, a cnn expects (channels, height, width)")
    depth, height, width = input_shape
    layers: list[nn.Module] = []
    for outputs in _sizes("channels", channels):
        if min(height, width) < 2:
            raise InvalidModel(f"channels: {list(channels)} halve {tuple(input_shape)} below one pixel, expected fewer")
        layers += [nn.Conv2d(depth, outputs, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        depth, height, width = outputs, height // 2, width // 2
    (hidden,) = _sizes("hidden", [hidden])
    layers += [nn.Flatten(), nn.Linear(depth * height * width, hidden), nn.ReLU(), nn.Linear(hidden, classes)]
    return nn.Sequential(*layers)


MODELS: dict[str, Callable[..., nn.Module]] = {"logistic": logistic, "mlp": mlp, "cnn": cnn, "binary": binary}
OPTIONS: dict[str, tuple[str, ...]] = {"logistic": (), "mlp": ("hidden",), "cnn": ("channels", "hidden"), "binary": ()}


def build(name: str, input_shape: Sequence[int], classes: int, options: Options, seed: int) -> nn.Module:
    """The named model with its initial parameters: He-uniform, biases zero. Global generators stay as they are."""
    module = _structure(name, input_shape, classes, options).to_empty(device="cpu")
    rng = np.random.Generator(np.random.PCG64(seed))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim <= 1:
                parameter.zero_()
                continue
            limit = math.sqrt(6 / math.prod(parameter.shape[1:]))
            drawn = (2 * rng.random(tuple(parameter.shape)) - 1) * limit
            parameter.copy_(torch.from_numpy(drawn.astype(np.float32)))
    return module


def dimension(name: str, input_shape: Sequence[int], classes: int, options: Options) -> int:
    """Number of parameters, without building them."""
    return sum(parameter.numel() for parameter in _structure(name, input_shape, classes, options).parameters())


def flatten(module: nn.Module) -> Floats:
    """All parameters in definition order, (d,) float32, as a copy."""
    return np.concatenate([parameter.detach().cpu().numpy().ravel() for parameter in module.parameters()]).astype(
        np.float32
    )


def load_flat(module: nn.Module, parameters: Floats) -> None:
    """Overwrite the module's parameters with (d,) float32. The inverse of `flatten`."""
    expected = sum(parameter.numel() for parameter in module.parameters())
    if parameters.dtype != np.float32 or parameters.shape != (expected,):
        raise InvalidModel(
            f"parameters: {parameters.dtype} of shape {parameters.shape}, expected float32 of shape ({expected},)"
        )
    start = 0
    with torch.no_grad():
        for parameter in module.parameters():
            piece = parameters[start : start + parameter.numel()]
            parameter.copy_(torch.tensor(piece).reshape(parameter.shape))
            start += parameter.numel()


def encode_parameters(parameters: Floats) -> bytes:
    """Canonical bytes of a flat model; their digest is the model's name. Refuses what is not finite."""
    if parameters.dtype != np.float32 or parameters.ndim != 1 or not np.isfinite(parameters).all():
        raise InvalidModel(
            f"parameters: {parameters.dtype} of shape {parameters.shape}, expected finite float32 of shape (d,)"
        )
    return HEADER.pack(MAGIC, VERSION, parameters.size) + parameters.astype("<f4").tobytes()


def encoded_size(dimension: int) -> int:
    """Bytes of an encoded model of `dimension` parameters."""
    return HEADER.size + 4 * dimension


def decode_parameters(data: bytes) -> Floats:
    """(d,) float32. Refuses every byte string that `encode_parameters` does not produce."""
    if len(data) < HEADER.size:
        raise InvalidModel(f"data: {len(data)} bytes, expected a header of {HEADER.size}")
    magic, version, size = HEADER.unpack_from(data)
    if (magic, version) != (MAGIC, VERSION) or data[6:8] != b"\0\0":
        raise InvalidModel(f"header: {data[:8].hex()}, expected {HEADER.pack(MAGIC, VERSION, 0)[:8].hex()}")
    if len(data) - HEADER.size != 4 * size:
        raise InvalidModel(f"data: {len(data) - HEADER.size} bytes after the header, expected {4 * size}")
    parameters = np.frombuffer(data, dtype="<f4", offset=HEADER.size).astype(np.float32)
    if not np.isfinite(parameters).all():
        raise InvalidModel("parameters: NaN or infinite, expected finite numbers")
    return parameters


def _structure(name: str, input_shape: Sequence[int], classes: int, options: Options) -> nn.Module:
    """The layers without memory behind them, so that nothing is drawn from a global generator."""
    if name not in MODELS:
        raise InvalidModel(f"name: {name!r}, expected one of {', '.join(MODELS)}")
    if set(options) != set(OPTIONS[name]):
        raise InvalidModel(f"options: {sorted(options)}, expected {sorted(OPTIONS[name])} for model {name!r}")
    if classes < 2:
        raise InvalidModel(f"classes: {classes}, expected at least 2")
    _sizes("input_shape", input_shape)
    with torch.device("meta"):
        return MODELS[name](input_shape, classes, **options)


def _sizes(field: str, sizes: Sequence[int]) -> list[int]:
    """The sizes as a list, if all are positive integers and there is at least one."""
    listed = list(sizes) if isinstance(sizes, Sequence) and not isinstance(sizes, str) else []
    if not listed or any(type(size) is not int or size < 1 for size in listed):
        raise InvalidModel(f"{field}: {sizes!r}, expected positive integers")
    return listed
