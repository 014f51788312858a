"""Samples: decoding refuses what it should and says why; shares keep every sample once."""

import contextlib
import gzip
import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.learning import datasets
from tasks.learning.datasets import Dataset, InvalidDataset

RNG = np.random.default_rng(0)


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def medmnist(**changes):
    arrays = {
        "train_images": RNG.integers(0, 256, (6, 4, 5), dtype=np.uint8),
        "train_labels": np.array([[0], [1], [2], [0], [1], [2]], dtype=np.uint8),
        "val_images": RNG.integers(0, 256, (2, 4, 5, 3), dtype=np.uint8),
        "val_labels": np.array([0, 3]),
        "test_images": RNG.integers(0, 256, (1, 4, 5), dtype=np.uint8),
        "test_labels": np.array([[1]]),
    }
    arrays.update(changes)
    return {name: array for name, array in arrays.items() if array is not None}


def small(n=4, classes=2):
    return Dataset(RNG.random((n, 3), dtype=np.float32), np.arange(n, dtype=np.int64) % classes, classes)


def png(width=6, height=4, mode="L"):
    buffer = io.BytesIO()
    Image.new(mode, (width, height), (255, 0, 0) if mode == "RGB" else 255).save(buffer, "PNG")
    return buffer.getvalue()


# ── sources ──


def test_the_packaged_data_is_real_and_complete():
    biopsies, digits = datasets.load_ready("breast-cancer"), datasets.load_ready("digits")
    assert (len(biopsies), biopsies.input_shape, biopsies.histogram()) == (569, (30,), [212, 357])
    assert (len(digits), digits.input_shape, digits.classes) == (1797, (1, 8, 8), 10)
    assert (digits.features.min(), digits.features.max()) == (0, 1)
    with pytest.raises(InvalidDataset, match="name: 'iris', expected one of"):
        datasets.load_ready("iris")


def test_a_medmnist_file_gives_channels_first_images():
    arrays = medmnist()
    train = datasets.decode_npz(npz(**arrays), "train")
    assert (train.input_shape, train.classes) == ((1, 4, 5), 4)
    assert np.array_equal(train.features[:, 0] * 255, arrays["train_images"].astype(np.float32))
    validation = datasets.decode_npz(npz(**arrays), "validation")
    assert validation.input_shape == (3, 4, 5)
    assert validation.features[1, 2, 3, 4] == np.float32(arrays["val_images"][1, 3, 4, 2]) / np.float32(255)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": None}, "train_images: missing"),
        ({"train_labels": None}, "train_labels: missing"),
        ({"train_images": RNG.random((6, 4, 5))}, "train_images: float64 .* expected uint8"),
        ({"train_images": np.zeros((6, 20), dtype=np.uint8)}, "train_images: uint8 of shape .* expected"),
        ({"train_images": np.zeros((5, 4, 5), dtype=np.uint8)}, r"labels: int64 of shape \(6,\)"),
        ({"train_images": np.zeros((0, 4, 5), dtype=np.uint8)}, "labels: int64 of shape"),
        ({"train_labels": np.array([[0, 1]] * 6)}, "train_labels: int64 of shape"),
        ({"train_labels": np.array([0.0] * 6)}, "train_labels: float64"),
        ({"train_labels": np.array([0, 1, 2, 3, 4, -1])}, "labels: values from -1 to 4, expected 0 to"),
        ({"train_labels": np.array([], dtype=np.int64)}, "train_labels: empty"),
        ({"train_labels": np.array([2**63] * 6, dtype=np.uint64)}, "train_labels: value"),
        ({"test_labels": np.array([None])}, "dtype object"),
    ],
)
def test_a_wrong_medmnist_file_is_refused_by_field(changes, message):
    with pytest.raises(InvalidDataset, match=message):
        datasets.decode_npz(npz(**medmnist(**changes)), "train")


def test_labels_beyond_the_announced_classes_are_refused():
    with pytest.raises(InvalidDataset, match="labels: values from 0 to 2, expected 0 to 1"):
        datasets.decode_npz(npz(**medmnist()), "train", classes=2)
    with pytest.raises(InvalidDataset, match="split: 'dev'"):
        datasets.decode_npz(npz(**medmnist()), "dev")


@pytest.mark.parametrize("data", [b"", b"PK", b"not a zip", npz(**medmnist())[:-40]])
def test_bytes_that_are_no_archive_are_refused(data):
    with pytest.raises(InvalidDataset):
        datasets.decode_npz(data, "train")


TAMPERED = [npz(**medmnist()), datasets.encode_npz(small())]


@given(st.sampled_from(TAMPERED), st.data())
@settings(deadline=None, max_examples=200)
def test_a_tampered_archive_is_refused_or_read_but_never_breaks_anything_else(data, draw):
    broken = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        broken[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    with contextlib.suppress(InvalidDataset):
        datasets.decode_npz(bytes(broken), "train")


def test_an_archive_that_claims_more_than_it_holds_is_refused_without_taking_memory():
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**40, 28, 28)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("train_images.npy", header.getvalue() + b"\0" * 100)
    with pytest.raises(InvalidDataset, match="100 bytes of data, expected"):
        datasets.decode_npz(buffer.getvalue(), "train")


def test_an_archive_that_unpacks_to_too_much_is_refused(monkeypatch):
    monkeypatch.setattr(datasets, "MAX_ARCHIVE_BYTES", 10_000)
    bomb = npz(train_images=np.zeros((1000, 28, 28), dtype=np.uint8))
    assert len(bomb) < 10_000
    with pytest.raises(InvalidDataset, match="data: unpacks to 784128 bytes, expected at most 10000"):
        datasets.decode_npz(bomb, "train")


@given(st.integers(1, 6), st.integers(2, 4), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_our_encoding_round_trips_and_is_canonical(n, classes, seed):
    rng = np.random.default_rng(seed)
    dataset = Dataset(rng.random((n, 2, 3), dtype=np.float32), rng.integers(0, classes, n), classes)
    data = datasets.encode_npz(dataset)
    again = datasets.decode_npz(data, "train")
    assert np.array_equal(again.features, dataset.features)
    assert np.array_equal(again.labels, dataset.labels)
    assert again.classes == classes
    assert datasets.encode_npz(again) == data


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (np.full((2, 3), np.nan), [0, 1], "NaN or infinite in sample 0"),
        (np.full((2, 3), 1e300), [0, 1], "NaN or infinite"),
        (np.zeros((2, 0)), [0, 1], "is empty"),
        (np.zeros(2), [0, 1], "expected float32"),
        (np.zeros((2, 3)), [0, 0], "classes: 1, expected at least 2"),
        (np.array([["a"], ["b"]]), [0, 1], "dtype"),
    ],
)
def test_unusable_features_are_refused(features, labels, message):
    with pytest.raises(InvalidDataset, match=message):
        datasets.decode_npz(npz(features=features, labels=np.array(labels)), "train")


@pytest.mark.parametrize("classes", [np.nan, 2.0, [2, 2]])
def test_a_number_of_classes_that_is_no_integer_is_refused(classes):
    with pytest.raises(InvalidDataset, match=r"classes: .* expected one integer"):
        datasets.decode_npz(npz(features=np.zeros((2, 3)), labels=np.array([0, 1]), classes=np.array(classes)), "train")


def test_class_folders_become_labels_in_the_announced_order():
    files = [("sick", png()), ("well", png(30, 20)), ("well", png(mode="RGB"))]
    dataset = datasets.decode_images(files, ["well", "sick"], (8, 10))
    assert dataset.input_shape == (1, 8, 10)
    assert dataset.labels.tolist() == [1, 0, 0]
    assert (dataset.features[:2] == 1).all()
    assert datasets.decode_images(files, ["well", "sick"], (8, 10), channels=3).input_shape == (3, 8, 10)


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ([("other", png())], {}, r"files\[0\]: class 'other', expected one of"),
        ([("a", png()), ("b", b"GIF89a")], {}, r"files\[1\]: .* expected an image"),
        ([("a", png()[:40])], {}, r"files\[0\]"),
        ([("a", png(mode="I;16"))], {}, r"files\[0\]: pixels of mode I;16, expected 8 bits"),
        ([], {}, "files: none"),
        ([("a", png())], {"channels": 2}, "channels: 2"),
        ([("a", png())], {"size": (0, 8)}, "size"),
        ([("a", png())], {"size": (10**6, 10**6)}, "size"),
    ],
)
def test_wrong_images_are_refused(files, options, message):
    with pytest.raises(InvalidDataset, match=message):
        datasets.decode_images(files, ["a", "b"], **{"size": (8, 8), **options})


def test_a_huge_image_is_refused_by_its_header(monkeypatch):
    monkeypatch.setattr(datasets, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InvalidDataset, match=r"files\[0\]: 600 x 400 pixels, expected at most 1000"):
        datasets.decode_images([("a", png(600, 400))], ["a", "b"], (8, 8))


# ── idx files ──


def zipped(data):
    return gzip.compress(data, mtime=0)  # no time of day: every process collects the same tests


def idx(array, *, magic=None, shape=None):
    """The bytes of an array of uint8 as an idx file; magic and shape as given instead of its own."""
    dimensions = array.shape if shape is None else shape
    header = magic or bytes([0, 0, 8, len(dimensions)])
    return zipped(header + struct.pack(f">{len(dimensions)}I", *dimensions) + array.tobytes())


IMAGES = RNG.integers(0, 256, (6, 4, 5), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8)


def test_idx_files_give_images_and_labels():
    clothes = datasets.decode_idx(idx(IMAGES), idx(LABELS), 3)
    assert (clothes.input_shape, clothes.classes, clothes.labels.tolist()) == ((1, 4, 5), 3, LABELS.tolist())
    assert np.array_equal(clothes.features[:, 0], IMAGES.astype(np.float32) / np.float32(255))


def flipped(data, index):
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (idx(LABELS), idx(LABELS), "images: header 0000080100000006.*, expected 00000803 and 3 lengths"),
        (idx(IMAGES), idx(IMAGES), "labels: header 00000803.*, expected 00000801 and 1 lengths"),
        (idx(IMAGES, magic=b"\0\0\x0d\x03"), idx(LABELS), "images: header 00000d03"),  # floats
        (zipped(b""), idx(LABELS), "images: header , expected"),
        (zipped(b"\0\0\x08\x03\0\0"), idx(LABELS), "images: header 000008030000, expected"),
        (idx(IMAGES, shape=(7, 4, 5)), idx(LABELS), "images: 120 bytes, then no end, expected 140 bytes of shape"),
        (idx(IMAGES, shape=(5, 4, 5)), idx(LABELS), "images: more, expected 100 bytes of shape"),
        (idx(IMAGES, shape=(2**32 - 1,) * 3), idx(LABELS), r"images: \d{29} bytes of shape .*, expected at most"),
        (idx(IMAGES, shape=(0, 4, 5)), idx(LABELS), "images: more, expected 0 bytes"),
        (idx(IMAGES[:0]), idx(LABELS[:0]), "labels: empty"),
        (idx(IMAGES), idx(LABELS[:5]), r"labels: int64 of shape \(5,\), expected int64 of shape \(6,\)"),
        (idx(IMAGES), idx(LABELS + 1), "labels: values from 1 to 3, expected 0 to 2"),
        (IMAGES.tobytes(), idx(LABELS), "images: .*, expected a gzip-compressed idx file"),
        (b"", idx(LABELS), "images: header , expected"),
        (idx(IMAGES)[:-9], idx(LABELS), "images: .*, then no end, expected 120 bytes"),
        (idx(IMAGES)[:-1], idx(LABELS), "images: 120 bytes, then no end, expected 120 bytes"),
        (idx(IMAGES) + b"\0", idx(LABELS), "images: more, expected 120 bytes"),
        (flipped(idx(IMAGES), -8), idx(LABELS), "images: .*incorrect data check.*, expected a gzip"),
    ],
)
def test_other_bytes_are_no_idx_files(images, labels, message):
    with pytest.raises(InvalidDataset, match=message):
        datasets.decode_idx(images, labels, 3)


def test_an_idx_file_that_unpacks_to_more_than_it_says_is_not_unpacked():
    bomb = zipped(b"\0\0\x08\x01" + struct.pack(">I", 6) + bytes(2**28))
    tracemalloc.start()
    with pytest.raises(InvalidDataset, match="labels: more, expected 6 bytes"):
        datasets.decode_idx(idx(IMAGES), bomb, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


@given(st.binary(max_size=200), st.integers(0, 60))
@settings(deadline=None, max_examples=200)
def test_an_idx_file_that_somebody_changed_is_refused_or_says_the_same(noise, at):
    whole = idx(LABELS)
    changed = whole[:at] + noise + whole[at + len(noise) :]
    try:
        decoded = datasets.decode_idx(idx(IMAGES), changed, 3)
    except InvalidDataset:
        return
    assert decoded.labels.tolist() == LABELS.tolist()  # a date or a name in the gzip header


# ── one sample ──


def test_sample_bytes_are_features_then_label():
    dataset = Dataset(np.array([[1.0, -2.0], [0.5, 0.0]], dtype=np.float32), np.array([1, 0]), 2)
    assert datasets.sample_bytes(dataset, 0).hex() == "0000803f" + "000000c0" + "0100000000000000"
    turned = Dataset(np.asfortranarray(np.arange(8, dtype=np.float32).reshape(1, 2, 4)), np.array([0]), 2)
    assert datasets.sample_bytes(turned, 0)[:32] == np.arange(8, dtype="<f4").tobytes()


# ── shares ──


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(0.01, 50), st.integers(1, 8), st.integers(48, 150))
@settings(deadline=None, max_examples=60)
def test_a_partition_is_disjoint_complete_and_deterministic(seed, parts, alpha, minimum, n):
    labels = np.random.default_rng(seed).integers(0, 4, n)
    partition = datasets.dirichlet_partition(labels, parts, alpha, seed, minimum)
    assert sorted(np.concatenate(partition).tolist()) == list(range(n))
    assert len(partition) == parts
    assert min(map(len, partition)) >= minimum
    again = datasets.dirichlet_partition(labels, parts, alpha, seed, minimum)
    assert all(np.array_equal(one, other) for one, other in zip(partition, again, strict=True))


def test_a_small_alpha_skews_labels_more_than_a_large_one():
    labels = np.arange(1000) % 2

    def spread(alpha):
        shares = [labels[part].mean() for part in datasets.dirichlet_partition(labels, 5, alpha, 1, 10)]
        return np.std(shares)

    assert spread(0.5) > 0.15 > spread(100)


@pytest.mark.parametrize(("parts", "alpha", "minimum"), [(0, 1, 1), (3, 1, 4), (2, 0, 1), (2, np.nan, 1), (2, 1, 0)])
def test_an_impossible_partition_is_refused(parts, alpha, minimum):
    with pytest.raises(InvalidDataset):
        datasets.dirichlet_partition(np.zeros(10, dtype=np.int64), parts, alpha, 0, minimum)


@given(st.integers(0, 1000), st.floats(0.1, 0.9))
@settings(deadline=None, max_examples=40)
def test_a_split_keeps_every_sample_once_and_the_class_shares(seed, share):
    n = 100
    whole = Dataset(np.arange(n, dtype=np.float32)[:, None], np.arange(n, dtype=np.int64) % 3, 3)
    train, validation = datasets.split(whole, share, seed)
    assert sorted([*train.features[:, 0], *validation.features[:, 0]]) == list(range(n))
    assert validation.histogram() == [round(share * count) for count in whole.histogram()]


@pytest.mark.parametrize("share", [0.0, 1.0, -1, 0.001, float("nan")])
def test_a_split_with_an_empty_side_is_refused(share):
    with pytest.raises(InvalidDataset, match="validation_share"):
        datasets.split(small(6), share, 0)


@pytest.mark.parametrize("transform", ["linear", "sqrt", "log"])
def test_rescaling_maps_the_public_range_to_plus_minus_one(transform):
    data = Dataset(np.array([[1, 2], [9, 4]], dtype=np.float32), np.array([0, 1]), 2)
    scaled = datasets.rescale(data, low=[1, 2], high=[9, 4], transform=transform)
    assert np.allclose(scaled.features, [[-1, -1], [1, 1]])
    beyond = Dataset(np.array([[-5, 5]], dtype=np.float32), np.array([0]), 2)
    assert datasets.rescale(beyond, low=[1, 2], high=[9, 4], transform=transform).features[0, 1] > 1


@pytest.mark.parametrize(
    ("low", "high", "transform"),
    [
        ([0], [1], "linear"),
        ([0, 0, 0], [1, 1, 0], "linear"),
        ([0, 0, 0], [1, 1, 1], "log"),
        ([-1, 0, 0], [1, 1, 1], "sqrt"),
        ([0, 0, np.nan], [1, 1, 1], "linear"),
        ([0, 0, 0], [1, 1, 1], "cube"),
    ],
)
def test_unusable_ranges_are_refused(low, high, transform):
    with pytest.raises(InvalidDataset):
        datasets.rescale(small(), low=low, high=high, transform=transform)
