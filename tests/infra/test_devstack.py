"""Ready data sets: read where they are installed, divided among the parties, and missed in words that help."""

from importlib.resources import files

import numpy as np
import pytest

from contracts.task_spec import load_task_file
from infra import devstack
from tasks.learning.datasets import InvalidDataset, decode_npz, load_ready

READY = files("deployments") / "ready"


def requirement(name, **changes):
    return load_task_file((READY / f"{name}.toml").read_text()).dataset.model_copy(update=changes)


@pytest.mark.parametrize("name", sorted({"breast-cancer", "digits"}))
def test_packaged_data_is_divided_completely(name):
    parts = devstack.ready_parts(requirement(name), miners=5, seed=3)
    assert list(parts) == ["publisher", *(f"miner-{number}" for number in range(1, 6))]
    whole = load_ready(name)
    assert np.sum([part.histogram() for part in parts.values()], axis=0).tolist() == whole.histogram()
    assert min(len(part) for part in parts.values()) >= requirement(name).samples_min


def test_fashion_mnist_keeps_the_division_of_its_files(idx_folder):
    parts = devstack.ready_parts(requirement("fashion-mnist", samples_min=50), miners=10, seed=3)
    validation = parts.pop("publisher")
    assert (len(validation), validation.input_shape, validation.classes) == (297, (1, 28, 28), 10)
    assert len(parts) == 10
    assert sum(len(part) for part in parts.values()) == 1500
    assert np.array_equal(validation.labels, load_ready("digits").labels[1500:])
    # Label skew: some miner has more than a quarter of its samples in one class of ten.
    assert max(max(part.histogram()) / len(part) for part in parts.values()) > 0.25


def test_a_missing_file_is_named_with_what_installs_it(idx_folder):
    (idx_folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz is missing") as missing:
        devstack.ready_parts(requirement("fashion-mnist"), miners=10, seed=0)
    for remedy in ("apt-get install -y dataset-fashion-mnist", "--data NAME=PATH", ".npz"):
        assert remedy in str(missing.value)


def test_a_damaged_file_is_refused(idx_folder):
    path = idx_folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InvalidDataset, match=r"images: .*, then no end"):
        devstack.ready_parts(requirement("fashion-mnist"), miners=10, seed=0)


def test_every_home_gets_its_part_and_a_second_call_changes_nothing(idx_folder, tmp_path):
    homes = {name: tmp_path / "homes" / name for name in ("publisher", "miner-1", "miner-2")}
    for home in homes.values():
        home.mkdir(parents=True)
    rules = requirement("fashion-mnist", samples_min=50)
    devstack.give_data(homes, rules, 0, {})
    written = {name: (home / "data.npz").read_bytes() for name, home in homes.items()}
    sizes = {name: len(decode_npz(data, "train", 10)) for name, data in written.items()}
    assert sizes["publisher"] == 297
    assert sizes["miner-1"] + sizes["miner-2"] == 1500
    devstack.give_data(homes, rules, 1, {})
    assert {name: (home / "data.npz").read_bytes() for name, home in homes.items()} == written


def test_a_data_set_that_is_not_ready_asks_for_the_parties_own(tmp_path):
    with pytest.raises(ValueError, match=r"'x-rays' is no ready data set .*fashion-mnist.* missing for publisher"):
        devstack.give_data({"publisher": tmp_path}, requirement("digits").model_copy(update={"name": "x-rays"}), 0, {})
