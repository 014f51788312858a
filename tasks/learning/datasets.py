"""Samples a party trains or validates on: decoding, checking, splitting, scaling.

    features    (n, *input_shape) float32; images are (n, channels, height, width) with values in [0, 1]
    labels      (n,) int64, each in [0, classes)

Reading files is the caller's business: every decoder takes bytes and raises InvalidDataset, naming the field, the value
and what would be right. Nothing here unpickles.
"""

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Arrays = Mapping[str, npt.NDArray[Any]]
Split = Literal["train", "validation", "test"]
Transform = Literal["linear", "sqrt", "log"]

MAX_ARCHIVE_BYTES = 2**31  # of an archive's arrays together; more is refused before memory is taken
MAX_IMAGE_PIXELS = 2**24  # of one image file, before it is resized
IDX_BYTES = b"\0\0\x08"  # begins an idx file of unsigned bytes; the number of dimensions follows
MEDMNIST_SPLITS = {"train": "train", "validation": "val", "test": "test"}
IMAGE_MODES = {1: "L", 3: "RGB"}
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # pillow would clip them to 8 bits
# What zipfile and pillow are known to raise on bytes that somebody tampered with.
UNREADABLE_ARCHIVE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    NotImplementedError,
    RuntimeError,
    OSError,
    EOFError,
)
UNREADABLE_IMAGE = (OSError, SyntaxError, ValueError, struct.error, IndexError, Image.DecompressionBombError)
TRANSFORMS: dict[str, Callable[..., npt.NDArray[np.float64]]] = {"linear": np.positive, "sqrt": np.sqrt, "log": np.log}


class InvalidDataset(ValueError):
    """The samples cannot be used; the message names the field, its value and what would be right."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled samples, checked when made. features: (n, *input_shape) float32; labels: (n,) int64."""

    features: Floats
    labels: Integers
    classes: int

    def __post_init__(self) -> None:
        features, labels = self.features, self.labels
        if features.dtype != np.float32 or features.ndim < 2:
            raise InvalidDataset(
                f"features: {features.dtype} of shape {features.shape}, expected float32 (n, *input_shape)"
            )
        if labels.dtype != np.int64 or labels.shape != features.shape[:1]:
            raise InvalidDataset(
                f"labels: {labels.dtype} of shape {labels.shape}, expected int64 of shape ({len(features)},)"
            )
        if features.size == 0:
            raise InvalidDataset(f"features: shape {features.shape} is empty, expected at least one sample")
        if self.classes < 2:
            raise InvalidDataset(f"classes: {self.classes}, expected at least 2")
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= self.classes:
            raise InvalidDataset(f"labels: values from {lowest} to {highest}, expected 0 to {self.classes - 1}")
        finite = np.isfinite(features)
        if not finite.all():
            sample = int(np.argwhere(~finite)[0][0])
            raise InvalidDataset(f"features: NaN or infinite in sample {sample}, expected finite numbers")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.features.shape[1:])

    def histogram(self) -> list[int]:
        """Number of samples of each class, in class order."""
        return [int(count) for count in np.bincount(self.labels, minlength=self.classes)]

    def take(self, indices: Integers) -> "Dataset":
        """The samples at these indices, in this order."""
        return Dataset(self.features[indices], self.labels[indices], self.classes)


# ── sources ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_ready(name: str) -> Dataset:
    """A real data set that is installed with scikit-learn; no network.

    breast-cancer: 569 fine-needle biopsies, 30 raw features, 2 classes (0 malignant, 1 benign).
    digits: 1797 handwritten digits, (1, 8, 8) in [0, 1], 10 classes.
    """
    # Imported here: it costs a second, and a party with data of its own never needs it.
    from sklearn import datasets as packaged

    if name == "breast-cancer":
        biopsies = packaged.load_breast_cancer()
        return Dataset(biopsies.data.astype(np.float32), biopsies.target.astype(np.int64), classes=2)
    if name == "digits":
        digits = packaged.load_digits()
        return Dataset((digits.images[:, None] / 16).astype(np.float32), digits.target.astype(np.int64), classes=10)
    raise InvalidDataset(f"name: {name!r}, expected one of breast-cancer, digits")


def decode_npz(data: bytes, split: Split, classes: int | None = None) -> Dataset:
    """One split of a MedMNIST-style .npz, or the whole of our own encoding (`encode_npz`, where split has no meaning).

    MedMNIST: {train,val,test}_images uint8 (n, H, W) or (n, H, W, C), {train,val,test}_labels (n,) or (n, 1).
    classes: what the task announces; without it, one more than the largest label of any split in the file.
    """
    if split not in MEDMNIST_SPLITS:
        raise InvalidDataset(f"split: {split!r}, expected one of {', '.join(MEDMNIST_SPLITS)}")
    arrays = decode_arrays(data)

    if "features" in arrays and "labels" in arrays:
        labels = _labels(arrays["labels"], "labels")
        stated = arrays.get("classes", labels.max() + 1)
        if stated.shape != () or stated.dtype.kind not in "iu":
            raise InvalidDataset(f"classes: {stated.dtype} of shape {stated.shape}, expected one integer")
        features = arrays["features"]
        if features.dtype.kind not in "fiu":
            raise InvalidDataset(f"features: dtype {features.dtype}, expected numbers")
        with np.errstate(over="ignore"):  # an overflow becomes infinite, which Dataset refuses
            features = features.astype(np.float32)
        return Dataset(features, labels, int(stated) if classes is None else classes)

    prefix = MEDMNIST_SPLITS[split]
    for key in (f"{prefix}_images", f"{prefix}_labels"):
        if key not in arrays:
            raise InvalidDataset(f"{key}: missing, the file has {sorted(arrays)}; or give 'features' and 'labels'")
    if classes is None:
        known = [_labels(array, key) for key, array in arrays.items() if key.endswith("_labels")]
        classes = max(int(labels.max()) for labels in known) + 1
    images = arrays[f"{prefix}_images"]
    return Dataset(
        _images(images, f"{prefix}_images"), _labels(arrays[f"{prefix}_labels"], f"{prefix}_labels"), classes
    )


def encode_npz(dataset: Dataset) -> bytes:
    """The same dataset always gives the same bytes, so that its digest names it."""
    return encode_arrays(
        {"features": dataset.features, "labels": dataset.labels, "classes": np.asarray(dataset.classes, dtype=np.int64)}
    )


def decode_idx(images: bytes, labels: bytes, classes: int) -> Dataset:
    """Gzip-compressed idx files, as the MNIST family of data sets comes: images (n, H, W) uint8 and labels (n,) uint8."""
    return Dataset(
        _images(_idx_array(images, "images", 3), "images"), _labels(_idx_array(labels, "labels", 1), "labels"), classes
    )


def _idx_array(data: bytes, field: str, dimensions: int) -> npt.NDArray[np.uint8]:
    """The array of one idx file: IDX_BYTES, the number of dimensions, each length as big-endian uint32, the elements.

    Unpacks what the header promises and no more, and only if that is within MAX_ARCHIVE_BYTES.
    """
    unpacker = zlib.decompressobj(wbits=31)
    try:
        size = 4 + 4 * dimensions
        header = unpacker.decompress(data, size)
        if header[:4] != IDX_BYTES + bytes([dimensions]) or len(header) != size:
            raise InvalidDataset(
                f"{field}: header {header.hex()}, expected {IDX_BYTES.hex()}{dimensions:02x} and {dimensions} lengths"
            )
        shape = struct.unpack_from(f">{dimensions}I", header, 4)
        expected = math.prod(shape)
        if expected > MAX_ARCHIVE_BYTES:
            raise InvalidDataset(f"{field}: {expected} bytes of shape {shape}, expected at most {MAX_ARCHIVE_BYTES}")
        content = unpacker.decompress(unpacker.unconsumed_tail, expected + 1)
    except zlib.error as error:
        raise InvalidDataset(f"{field}: {error}, expected a gzip-compressed idx file") from error
    # The end of the stream carries its checksum: without it, an element may have changed unseen.
    if len(content) != expected or not unpacker.eof or unpacker.unused_data:
        found = "more" if len(content) > expected or unpacker.unused_data else f"{len(content)} bytes, then no end"
        raise InvalidDataset(f"{field}: {found}, expected {expected} bytes of shape {shape}")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def decode_images(
    files: Sequence[tuple[str, bytes]], classes: Sequence[str], size: tuple[int, int], channels: int = 1
) -> Dataset:
    """Image files, each with its class name (its folder). Label i is classes[i]; size is (height, width) in pixels."""
    if channels not in IMAGE_MODES:
        raise InvalidDataset(f"channels: {channels}, expected 1 (grey) or 3 (colour)")
    if min(size) < 1 or math.prod(size) > MAX_IMAGE_PIXELS:
        raise InvalidDataset(f"size: {size}, expected (height, width) of 1 to {MAX_IMAGE_PIXELS} pixels in all")
    if not files:
        raise InvalidDataset("files: none, expected at least one image")
    label_of = {name: label for label, name in enumerate(classes)}
    images, labels = [], []
    for position, (name, content) in enumerate(files):
        if name not in label_of:
            raise InvalidDataset(f"files[{position}]: class {name!r}, expected one of {list(classes)}")
        images.append(_decode_image(content, size, channels, position))
        labels.append(label_of[name])
    return Dataset(_images(np.stack(images), "files"), np.array(labels, dtype=np.int64), len(classes))


def _decode_image(content: bytes, size: tuple[int, int], channels: int, position: int) -> npt.NDArray[np.uint8]:
    """(height, width) or (height, width, 3) uint8. The size in the header is checked before any pixel is decoded."""
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            if math.prod(image.size) > MAX_IMAGE_PIXELS:
                raise InvalidDataset(
                    f"files[{position}]: {image.width} x {image.height} pixels, expected at most {MAX_IMAGE_PIXELS}"
                )
            if image.mode in DEEP_MODES:
                raise InvalidDataset(f"files[{position}]: pixels of mode {image.mode}, expected 8 bits per channel")
            height, width = size
            return np.asarray(image.convert(IMAGE_MODES[channels]).resize((width, height), Image.Resampling.BILINEAR))
    except InvalidDataset:
        raise
    except UNREADABLE_IMAGE as error:
        raise InvalidDataset(f"files[{position}]: {error}, expected an image ({', '.join(IMAGE_FORMATS)})") from error


def _images(images: npt.NDArray[Any], field: str) -> Floats:
    """(n, H, W) or (n, H, W, C) uint8 to (n, C, H, W) float32 in [0, 1]."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise InvalidDataset(
            f"{field}: {images.dtype} of shape {images.shape}, expected uint8 of shape (n, H, W) or (n, H, W, C)"
        )
    channels_last = images[..., None] if images.ndim == 3 else images
    scaled: Floats = np.ascontiguousarray(np.moveaxis(channels_last, -1, 1)).astype(np.float32) / np.float32(255)
    return scaled


def _labels(labels: npt.NDArray[Any], field: str) -> Integers:
    """(n,) or (n, 1) integers to (n,) int64."""
    if labels.dtype.kind not in "iu" or labels.ndim not in (1, 2) or labels.shape[1:] not in ((), (1,)):
        raise InvalidDataset(
            f"{field}: {labels.dtype} of shape {labels.shape}, expected integers of shape (n,) or (n, 1)"
        )
    if labels.size == 0:
        raise InvalidDataset(f"{field}: empty, expected at least one label")
    if labels.dtype == np.uint64 and int(labels.max()) >= 2**63:
        raise InvalidDataset(f"{field}: value {int(labels.max())}, expected a class number")
    return labels.reshape(-1).astype(np.int64)


# ── arrays as bytes ──────────────────────────────────────────────────────────────────────────────────────────────────


def encode_arrays(arrays: Arrays) -> bytes:
    """An .npz whose bytes depend on nothing but the arrays: sorted names, fixed dates, stored uncompressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            content = io.BytesIO()
            np.lib.format.write_array(content, np.asarray(arrays[name]), version=(1, 0), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0)), content.getvalue())
    return buffer.getvalue()


def decode_arrays(data: bytes) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an .npz. Refuses pickled objects, and sizes that the archive or a header only claims."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
            claimed = sum(member.file_size for member in members)
            if claimed > MAX_ARCHIVE_BYTES:
                raise InvalidDataset(f"data: unpacks to {claimed} bytes, expected at most {MAX_ARCHIVE_BYTES}")
            return {
                member.filename.removesuffix(".npy"): _decode_array(archive.read(member), member.filename)
                for member in members
            }
    except InvalidDataset:
        raise
    except (*UNREADABLE_ARCHIVE, ValueError) as error:
        raise InvalidDataset(f"data: {error}, expected an .npz archive") from error


def _decode_array(content: bytes, field: str) -> npt.NDArray[Any]:
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran_order, dtype = read_header[version](stream)
    except (ValueError, KeyError) as error:
        raise InvalidDataset(f"{field}: {error}, expected a .npy header of version 1 or 2") from error
    if dtype.kind not in "biuf":
        raise InvalidDataset(f"{field}: dtype {dtype}, expected integers, floats or booleans")
    expected, found = math.prod(shape) * dtype.itemsize, len(content) - stream.tell()
    if any(length < 0 for length in shape) or expected != found:
        raise InvalidDataset(f"{field}: {found} bytes of data, expected {expected} for {dtype} of shape {shape}")
    flat = np.frombuffer(content, dtype=dtype, offset=stream.tell())
    return flat.reshape(shape, order="F" if fortran_order else "C").copy()


def sample_bytes(dataset: Dataset, index: int) -> bytes:
    """One sample, canonically: features in C order as little-endian float32, then the label as little-endian int64."""
    features = np.ascontiguousarray(dataset.features[index], dtype="<f4")
    return features.tobytes() + int(dataset.labels[index]).to_bytes(8, "little")


# ── shares and scaling ───────────────────────────────────────────────────────────────────────────────────────────────


def split(dataset: Dataset, validation_share: float, seed: int) -> tuple[Dataset, Dataset]:
    """(train, validation), disjoint and complete; each class is divided in the same proportion."""
    if not 0 < validation_share < 1:
        raise InvalidDataset(f"validation_share: {validation_share}, expected more than 0 and less than 1")
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(dataset), dtype=bool)
    for label in range(dataset.classes):
        members = np.flatnonzero(dataset.labels == label)
        chosen[rng.permutation(members)[: round(validation_share * len(members))]] = True
    if chosen.all() or not chosen.any():
        raise InvalidDataset(
            f"validation_share: {validation_share} of {len(dataset)} samples, expected both sides to get some"
        )
    return dataset.take(np.flatnonzero(~chosen)), dataset.take(np.flatnonzero(chosen))


def dirichlet_partition(labels: Integers, parts: int, alpha: float, seed: int, minimum: int) -> list[Integers]:
    """Indices of each part, ascending: disjoint, complete, none smaller than minimum.

    Each class is divided by shares drawn from Dirichlet(alpha), the usual model of label skew: small alpha gives parts
    with few classes, large alpha equal ones. Parts below the minimum are then filled from the largest.
    """
    if parts < 1 or minimum < 1 or parts * minimum > len(labels):
        raise InvalidDataset(
            f"parts: {parts} of at least {minimum} samples, expected 1 or more that {len(labels)} samples can fill"
        )
    if not 0 < alpha < math.inf:
        raise InvalidDataset(f"alpha: {alpha}, expected a positive number")
    rng = np.random.default_rng(seed)
    owner = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(rng.dirichlet(np.full(parts, alpha)))[:-1] * len(members)
        for part, piece in enumerate(np.split(members, np.rint(cuts).astype(np.int64))):
            owner[piece] = part

    sizes = np.bincount(owner, minlength=parts)
    while sizes.min() < minimum:
        largest, smallest = int(sizes.argmax()), int(sizes.argmin())
        owner[rng.choice(np.flatnonzero(owner == largest))] = smallest
        sizes[largest] -= 1
        sizes[smallest] += 1
    return [np.flatnonzero(owner == part) for part in range(parts)]


def rescale(
    dataset: Dataset, *, low: Sequence[float], high: Sequence[float], transform: Transform = "linear"
) -> Dataset:
    """Tabular features mapped so that transform(low) becomes -1 and transform(high) becomes 1, feature by feature.

    low, high: PUBLIC ranges, one number per feature, part of the task. Nobody may pool private data to find a mean and
    a deviation, so the constants come from the literature; values outside the range are allowed and land outside ±1.
    transform: linear, or sqrt or log for long right tails. low must be in its domain; smaller values are raised to low.
    """
    if dataset.features.ndim != 2 or not len(low) == len(high) == dataset.features.shape[1]:
        raise InvalidDataset(
            f"low, high: {len(low)} and {len(high)} numbers, expected one per feature of {dataset.input_shape}"
        )
    if transform not in TRANSFORMS:
        raise InvalidDataset(f"transform: {transform!r}, expected one of {', '.join(TRANSFORMS)}")
    bottom, top = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
    floor = {"linear": -math.inf, "sqrt": 0.0, "log": np.nextafter(0, 1)}[transform]
    if not (np.isfinite(bottom).all() and np.isfinite(top).all() and (bottom < top).all() and bottom.min() >= floor):
        raise InvalidDataset(
            f"low, high: expected finite low < high in the domain of {transform}, got {low} and {high}"
        )
    apply = TRANSFORMS[transform]
    values = dataset.features.astype(np.float64)
    if transform != "linear":
        values = np.maximum(values, bottom)
    first, last = apply(bottom), apply(top)
    scaled = (2 * (apply(values) - first) / (last - first) - 1).astype(np.float32)
    return Dataset(scaled, dataset.labels, dataset.classes)
