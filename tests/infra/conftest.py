"""A small data set in the files of Fashion-MNIST: handwritten digits, three times as wide and high, with a margin."""

import gzip
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from infra import devstack
from tasks.learning.datasets import load_ready


def encode_idx(array: npt.NDArray[np.uint8]) -> bytes:
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


@pytest.fixture
def idx_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where the ready data set finds its four files: 1 500 images to train on and 297 to judge by."""
    digits = load_ready("digits")
    wide = np.kron((255 * digits.features[:, 0]).astype(np.uint8), np.ones((1, 3, 3), np.uint8))
    images, labels = np.pad(wide, ((0, 0), (2, 2), (2, 2))), digits.labels.astype(np.uint8)
    for part, chosen in (("train", slice(0, 1500)), ("t10k", slice(1500, None))):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(encode_idx(images[chosen]))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(encode_idx(labels[chosen]))
    monkeypatch.setattr(devstack, "FASHION_MNIST", tmp_path)
    return tmp_path
