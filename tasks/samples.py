"""An actor's own samples, and the proof that it holds fitting ones without showing any.

The proof is a Merkle root over salted sample hashes, ordered by class, so that the announced histogram says which class
every leaf must have; the publisher opens a few leaves that it chose after the root was fixed.

    leaf j = H(label_j || SHA-256(salt_j || sample_j)),  salt_j = HMAC-SHA-256(dataset salt, j)

Errors: DatasetMismatch (names the field, the value and what the task asks for), InvalidDataset.
"""

import hashlib
import hmac
import json
import secrets
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError
from pydantic_core import from_json

from blocks.identity import Identity
from contracts.messages import Bytes32, Frozen
from contracts.task_spec import DatasetRequirement
from tasks.crypto import merkle
from tasks.learning.datasets import Dataset, decode_images, decode_npz, rescale, sample_bytes

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


class DatasetMismatch(ValueError):
    """The data does not meet the task's requirement."""


class DatasetProof(Frozen):
    """What a miner says of its data and binds itself to by a Merkle root."""

    dataset: str = Field(max_length=64)
    sample_count: int = Field(ge=1, lt=2**32)
    histogram: tuple[int, ...] = Field(max_length=10_000)
    input_shape: tuple[int, ...] = Field(max_length=4)
    root: Bytes32


class OpenedLeaf(Frozen):
    """One challenged leaf: its label, the salted hash of its sample, and the path to the root."""

    index: int
    label: int
    sample_hash: Bytes32
    path: tuple[Bytes32, ...]


def load_samples(me: Identity, requirement: DatasetRequirement, split: Literal["train", "validation"]) -> Dataset:
    """The actor's samples as the model takes them: decoded, checked against the requirement, rescaled."""
    path = me.data_path()
    newest = max((file.stat().st_mtime_ns for file in _files(path)), default=0)
    return _load(str(path), newest, requirement.model_dump_json(), split)


@lru_cache(maxsize=32)
def _load(path: str, _newest: int, requirement_json: str, split: Literal["train", "validation"]) -> Dataset:
    requirement = DatasetRequirement.model_validate_json(requirement_json)
    dataset = _decode(Path(path), requirement, split)
    check_requirement(requirement, dataset.classes, dataset.input_shape, len(dataset), split)
    if requirement.low:
        return rescale(dataset, low=requirement.low, high=requirement.high, transform=requirement.transform)
    return dataset


def _decode(path: Path, requirement: DatasetRequirement, split: Literal["train", "validation"]) -> Dataset:
    if not path.is_dir():
        return decode_npz(path.read_bytes(), split, requirement.classes)
    if len(requirement.input_shape) != 3:
        raise DatasetMismatch(f"{path} is an image folder, but the task's samples have shape {requirement.input_shape}")
    if len(requirement.class_names) != requirement.classes:
        raise DatasetMismatch(
            f"dataset.class_names = {requirement.class_names}: an image folder needs the {requirement.classes} folder "
            "names in class order in the task file"
        )
    channels, height, width = requirement.input_shape
    files = [(file.parent.name, file.read_bytes()) for file in _files(path)]
    return decode_images(files, requirement.class_names, (height, width), channels)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.glob("*/*") if file.suffix.lower() in IMAGE_SUFFIXES)


def check_requirement(
    requirement: DatasetRequirement, classes: int, input_shape: tuple[int, ...], samples: int, split: str
) -> None:
    """Raise DatasetMismatch unless data of this description fits the task."""
    if classes != requirement.classes:
        raise DatasetMismatch(f"classes = {classes}: the task asks for {requirement.classes}")
    if tuple(input_shape) != requirement.input_shape:
        raise DatasetMismatch(f"input_shape = {tuple(input_shape)}: the task asks for {requirement.input_shape}")
    if split == "train" and samples < requirement.samples_min:
        raise DatasetMismatch(f"sample_count = {samples}: the task asks for at least {requirement.samples_min}")


def prove(me: Identity, task_id: str, requirement: DatasetRequirement, dataset: Dataset) -> DatasetProof:
    """The proof; its salt stays in the private state, so that a retry gives the same root."""
    leaves = [merkle.leaf_hash(_leaf(leaf)) for leaf in _hashed_samples(me, task_id, dataset)]
    return DatasetProof(
        dataset=requirement.name,
        sample_count=len(dataset),
        histogram=tuple(dataset.histogram()),
        input_shape=dataset.input_shape,
        root="0x" + merkle.root(leaves).hex(),
    )


def open_leaves(me: Identity, task_id: str, dataset: Dataset, indices: tuple[int, ...]) -> bytes:
    """The challenged leaves, as JSON."""
    hashed = _hashed_samples(me, task_id, dataset)
    leaves = [merkle.leaf_hash(_leaf(leaf)) for leaf in hashed]
    opened = []
    for index in indices:
        if index >= len(leaves):
            raise DatasetMismatch(f"challenged leaf {index} does not exist: the proof has {len(leaves)}")
        label, sample_hash = hashed[index]
        path = ["0x" + step.hex() for step in merkle.path(leaves, index)]
        opened.append({"index": index, "label": label, "sample_hash": "0x" + sample_hash.hex(), "path": path})
    return json.dumps(opened, sort_keys=True).encode()


def check_opening(proof: DatasetProof, challenged: tuple[int, ...], data: bytes) -> None:
    """Raise DatasetMismatch unless exactly the challenged leaves are opened, in the tree, with the promised classes."""
    try:
        opened = [OpenedLeaf.model_validate(leaf) for leaf in from_json(data, allow_inf_nan=False)]
    except (ValidationError, ValueError, TypeError) as error:
        raise DatasetMismatch(f"the opened leaves do not parse: {_brief(error)}") from error
    if tuple(leaf.index for leaf in opened) != challenged:
        raise DatasetMismatch(
            f"leaves {[leaf.index for leaf in opened]} were opened, {list(challenged)} were challenged"
        )
    ends = list(accumulate(proof.histogram))  # leaves are ordered by class
    for leaf in opened:
        announced = bisect_right(ends, leaf.index)
        if leaf.label != announced:
            raise DatasetMismatch(f"leaf {leaf.index} has class {leaf.label}, the histogram says {announced}")
        hashed = merkle.leaf_hash(_leaf((leaf.label, bytes.fromhex(leaf.sample_hash[2:]))))
        path = tuple(bytes.fromhex(step[2:]) for step in leaf.path)
        if not merkle.verify(bytes.fromhex(proof.root[2:]), hashed, leaf.index, proof.sample_count, path):
            raise DatasetMismatch(f"leaf {leaf.index} is not in the tree of the registered root")


def check_proof(requirement: DatasetRequirement, proof: DatasetProof) -> None:
    """Raise DatasetMismatch unless the proof's description fits the task and itself."""
    if proof.dataset != requirement.name:
        raise DatasetMismatch(f"dataset = {proof.dataset!r}: the task asks for {requirement.name!r}")
    check_requirement(requirement, len(proof.histogram), proof.input_shape, proof.sample_count, "train")
    if sum(proof.histogram) != proof.sample_count or min(proof.histogram) < 0:
        raise DatasetMismatch(f"histogram {proof.histogram} does not sum to sample_count = {proof.sample_count}")


def _hashed_samples(me: Identity, task_id: str, dataset: Dataset) -> list[tuple[int, bytes]]:
    """(label, salted hash) of every sample, ordered by class."""
    name = f"{task_id}/dataset-salt"
    salt = me.read_private(name)
    if salt is None:
        salt = me.claim(name, secrets.token_bytes(32))
    order = np.argsort(dataset.labels, kind="stable")
    return [(int(dataset.labels[j]), _salted(salt, int(j), sample_bytes(dataset, int(j)))) for j in order]


def _salted(salt: bytes, index: int, sample: bytes) -> bytes:
    return hashlib.sha256(hmac.digest(salt, index.to_bytes(8, "big"), "sha256") + sample).digest()


def _leaf(leaf: tuple[int, bytes]) -> bytes:
    return leaf[0].to_bytes(4, "big") + leaf[1]


def parse_proof(data: bytes) -> DatasetProof:
    try:
        return DatasetProof.model_validate_json(data)
    except ValidationError as error:
        raise DatasetMismatch(f"the dataset proof does not parse: {_brief(error)}") from error


def _brief(error: Any) -> str:
    return " ".join(str(error).split())[:160]
