"""The learning benchmark: its sums of seconds are those of the parties, its encryption is real, its plot is a picture."""

import xml.etree.ElementTree as ET
from importlib.resources import files

import numpy as np
import pytest
from rich.console import Console

from contracts.task_spec import load_task_file
from infra import bench
from infra.simulate import Stopwatch, plain_sum
from tasks.crypto import ndd_fe

SVG = "{http://www.w3.org/2000/svg}"
ROW = {
    "miners": 3,
    "seconds": {
        "training": [4.0, 6.0, 5.0],
        "compressing": [0.5, 0.25, 0.25],
        "encrypting": [1.0, 0.5, 2.0],
        "auditing": [0.125, 0.375],
        "key": [0.25],
        "opening": [0.5, 1.5],
        "stepping": [0.125],
        "evaluating": [3.0],
        "verifying": [0.75],
    },
}


def fashion():
    """The ready task, for a small data set and few coordinates."""
    spec = load_task_file((files("deployments") / "ready" / "fashion-mnist.toml").read_text()).spec()
    return spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"samples_min": 50})})


def test_seconds_of_all_parties_count_every_verifier():
    assert bench.sum_of_parties(ROW, ["training"]) == 15
    assert bench.sum_of_parties(ROW, ["verifying"]) == 2 * 0.75
    assert bench.sum_of_parties(ROW, bench.CRYPTOGRAPHY) == 3.5 + 0.5 + 0.25 + 2 + 1.5
    assert bench.sum_of_parties(ROW, bench.PARTS) == 15 + 1 + 7.75 + 0.125 + 3


def test_in_parallel_the_slowest_miner_is_waited_for():
    # The third miner is last: 5 + 0.25 + 2; the others' longer training does not count.
    after = 0.5 + 0.25 + 2 + 0.125 + 3 + 0.75
    assert bench.in_parallel(ROW, bench.PARTS) == 7.25 + after
    assert bench.in_parallel(ROW, bench.CRYPTOGRAPHY) == 2 + 0.5 + 0.25 + 2 + 0.75
    plain = {"miners": 3, "seconds": {name: ROW["seconds"][name] for name in ("training", "evaluating")}}
    assert bench.in_parallel(plain, bench.PARTS) == 6 + 3
    assert bench.in_parallel(plain, bench.CRYPTOGRAPHY) == bench.sum_of_parties(plain, bench.CRYPTOGRAPHY) == 0


def test_the_rounds_of_the_warm_up_are_left_out_of_the_medians():
    rows = [{"coordinates": count, "round": number} for number, count in enumerate((56, 32, 18, 10, 10), start=1)]
    assert [row["round"] for row in bench.settled(rows)] == [4, 5]
    assert bench.settled(rows[:1]) == rows[:1]


def test_the_benchmark_encrypts_for_real(monkeypatch):
    spec, watch = fashion(), Stopwatch()
    rng = np.random.default_rng(0)
    vectors, weights = [rng.integers(-2047, 2048, 300) for _ in range(4)], [16, 3, 1, 7]
    opened = bench.encrypted_sum(spec, watch)(vectors, weights)
    assert opened.tolist() == plain_sum(vectors, weights).tolist()
    assert {part: len(entries) for part, entries in watch.take().items()} == {
        "encrypting": 4,
        "auditing": 2,
        "key": 1,
        "opening": 2,
        "verifying": 1,
    }
    assert watch.take() == {}

    honest = ndd_fe.open_sum

    def lie(*args, **options):
        opened, blinding = honest(*args, **options)
        opened[7] += 1
        return opened, blinding

    monkeypatch.setattr(ndd_fe, "open_sum", lie)
    with pytest.raises(AssertionError, match="does not hold at coordinate 7"):
        bench.encrypted_sum(spec, watch)(vectors, weights)


def test_a_run_of_the_model_has_a_row_for_each_round(idx_folder):
    quiet = Console(quiet=True)
    spec = fashion()
    short = spec.compression.model_copy(update={"warmup_rounds": 0})
    sparse = bench._at_density(spec.model_copy(update={"compression": short}), 0.01)
    rows = bench._play(bench.PLAIN, spec, 2, quiet) + bench._play("encrypted, 99 % sparse", sparse, 2, quiet)
    assert [(row["round"], row["coordinates"], row["parameters"]) for row in rows] == [
        (1, 409_034, 409_034),
        (2, 409_034, 409_034),
        (1, 4_091, 409_034),
        (2, 4_091, 409_034),
    ]
    for row in rows:
        assert len(row["seconds"]["training"]) == row["miners"] == 10
        assert set(row["seconds"]) <= set(bench.PARTS)
        assert (bench.sum_of_parties(row, bench.CRYPTOGRAPHY) > 0) == (row["run"] != bench.PLAIN)
    assert set(rows[-1]["seconds"]) == set(bench.PARTS)
    assert bench.accuracies(rows) == {
        bench.PLAIN: [row["accuracy"] for row in rows[:2]],
        "encrypted, 99 % sparse": [row["accuracy"] for row in rows[2:]],
    }


def test_a_dense_run_has_no_warm_up():
    rules = bench._at_density(fashion(), 1.0).compression
    assert (rules.density, rules.warmup_rounds) == (1.0, 0)
    assert bench._at_density(fashion(), 0.01).compression.warmup_rounds == fashion().compression.warmup_rounds


@pytest.mark.parametrize("rounds", [1, 2, 15, 40])
def test_the_plot_shows_every_run_and_every_round_inside_the_picture(rounds):
    curves = {name: [0.5 + 0.01 * index + r / 200 for r in range(rounds)] for index, name in enumerate("abcd")}
    picture = ET.fromstring(bench.draw_accuracies(curves))
    lines = picture.findall(f"{SVG}polyline")
    assert [len(line.get("points").split()) for line in lines] == [rounds] * 4
    for line in lines:
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert bench.LEFT <= x <= bench.WIDTH - bench.RIGHT
            assert bench.TOP <= y <= bench.HEIGHT - bench.BOTTOM
    texts = [text.text for text in picture.findall(f"{SVG}text")]
    assert [text[-1] for text in texts if text[:-1].endswith(" % ")] == list("dcba")  # the best on top
