"""What `healchain doctor` finds, and that it names the remedy of what is missing."""

from collections import namedtuple

import pytest

from infra import doctor
from tasks.crypto import backend


def found(name, folder):
    (finding,) = [finding for finding in doctor.examine(folder) if finding.name == name]
    return finding


def test_what_the_tests_run_on_is_in_order(tmp_path):
    assert [finding.name for finding in doctor.examine(tmp_path) if finding.needed and not finding.in_order] == []


def test_it_says_which_curve_core_runs_and_why(tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "CHOICE", backend.choose("portable"))
    finding = found("curve core", tmp_path)
    assert finding.found.startswith("portable (HEALCHAIN_CURVE asks for it)")


def test_a_wrong_core_is_not_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.ndd_fe, "failing_coordinates", lambda *_: [2])
    assert not found("encryption", tmp_path).in_order


def test_a_full_disk_is_not_in_order(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(2**40, 2**40 - 5, 5)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    assert not found("disk", tmp_path / "not" / "there" / "yet").in_order


@pytest.mark.parametrize(
    ("name", "remedy"), [("fashion-mnist", "dataset-fashion-mnist"), ("node and npm", "nodejs npm")]
)
def test_what_is_missing_but_not_needed_is_named_with_its_remedy(name, remedy, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "FASHION_MNIST", tmp_path / "missing")
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    finding = found(name, tmp_path)
    assert not finding.in_order
    assert not finding.needed
    assert f"apt-get install -y {remedy}" in finding.found
