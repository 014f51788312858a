"""The benchmark of edge rounds: what it computes from what it saw, and a small one on a real server."""

import io
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import cbor2
import pytest
from rich.console import Console

from infra import bench_edge, edge_crowd, supervision
from infra.bench_edge import PHASES, START, Ran, bottleneck, check_model, phases_of, rows_of
from infra.bench_stack import PartFailed
from infra.edge_crowd import Done
from infra.edge_device import encode_cbor
from infra.rows import END

MOMENTS = (100.0, 103.0, 104.0, 109.0, 110.5, 111.0)
CORES = 2


def done(place: int, **changes: object) -> Done:
    found = {
        "name": f"device-{place}",
        "heard_s": 103.0 + place / 10,
        "fetch_s": 0.02,
        "hand_in_s": 0.01 * (place + 1),
        "way": edge_crowd.way_of(place),
        "ran_module": place == 0,
        "retries": 0,
        "samples": place + 1,
        "w": [float(place), 1.0],
        "b": 2.0 * place,
    }
    return Done(**(found | changes))  # type: ignore[typeddict-item]


def ran(**changes: object) -> Ran:
    found = {
        "devices": 5,
        "ready_s": 7.0,
        "moments": MOMENTS,
        "noticed_s": 111.5,
        "received": (104.0, 105.0, 106.0, 107.0, 109.0),
        "done": [done(place) for place in range(5)],
        "seconds": {"gateway": 9.0, "broker": 3.0, bench_edge.CROWD: 2.0},
        "peaks": {"gateway": 120.0, "broker": 80.0},
    }
    return Ran(**(found | changes))  # type: ignore[arg-type]


# Figures


def test_the_phases_are_the_whole_time():
    assert phases_of(MOMENTS) == dict(zip(PHASES, (3.0, 1.0, 5.0, 1.5, 0.5), strict=True))


def test_rows_say_how_long_how_much_and_what_for():
    rows = {row.name: row.value for row in rows_of(ran(), CORES)}
    assert rows["5 devices: from the request to the new version"] == 11.0
    assert sum(value for name, value in rows.items() if ": of it " in name) == 11.0
    assert rows["5 devices: from the new version to its notice at a device"] == 0.5
    assert rows["5 devices: updates a second, first to last"] == pytest.approx(4 / 5)
    assert rows["5 devices: task heard of after the request, p50"] == pytest.approx(3200)
    assert rows["5 devices: update over MQTT, p50"] == rows["5 devices: update over MQTT, p99"] == pytest.approx(20)
    assert rows["5 devices: memory peak, gateway"] == 120.0
    assert rows["5 devices: of them ran the module"] == 1
    assert "5 devices: from the new version to its notice at a device" not in {
        row.name for row in rows_of(ran(noticed_s=0.0), CORES)
    }


def test_the_bottleneck_is_named_by_the_figures():
    busy = {"gateway": 15.0, "broker": 3.0}
    assert bottleneck(phases_of(MOMENTS), busy, CORES) == (
        "collection; the processor, 82% of 2 cores, most of it the gateway: 83%"
    )
    late = phases_of((0.0, 9.0, 10.0, 11.0, 12.0, 13.0))
    assert bottleneck(late, {"broker": 1.0}, CORES).startswith("start of its flow; waiting")


def test_a_model_that_is_not_the_mean_stops_the_benchmark():
    told = [done(0), done(1)]
    mean = {"w": [2 / 3, 1.0], "b": 4 / 3}
    check_model(mean, told)
    for wrong in ({**mean, "b": 1.0}, {**mean, "w": [0.5, 1.0]}):
        with pytest.raises(PartFailed, match="not the mean of 2 updates"):
            check_model(wrong, told)


# Devices


def test_of_ten_devices_one_speaks_mqtt_and_one_cbor():
    ways = [edge_crowd.way_of(place) for place in range(100)]
    assert (ways.count("mqtt"), ways.count("cbor"), ways.count("json")) == (10, 10, 80)


def test_a_device_always_sends_the_same():
    model = {"w": [0.0] * 8, "b": 0.0}
    first, again, other = (edge_crowd._plain(name, model) for name in ("a", "a", "b"))
    assert first == again != other
    assert cbor2.loads(encode_cbor(first))["num_samples"] == first["num_samples"] > 0


# Processes


def test_a_peak_of_memory_is_seen_and_forgotten():
    code = "import sys; held = bytearray(80 << 20); del held; print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert bench_edge.peak_mib(process.pid) > 80
        bench_edge.forget_peak(process.pid)
        assert bench_edge.peak_mib(process.pid) < 80
        process.kill()
    assert bench_edge.peak_mib(process.pid) == 0


# All of it


@pytest.mark.faults
def test_a_quick_benchmark_runs_on_a_real_server_and_leaves_nothing(tmp_path, monkeypatch):
    document = tmp_path / "figures.md"
    document.write_text(f"before\n{START}\n\nold\n\n{END}\nafter\n")
    out, began_s = tmp_path / "rows.json", time.monotonic()
    with tempfile.TemporaryDirectory(prefix="be-") as short:  # the path of a socket is in it
        monkeypatch.setattr(tempfile, "tempdir", short)
        console = Console(file=io.StringIO(), record=True)
        failed = bench_edge.run(out, console, sizes=(6,), document=document)
        assert failed == [], console.export_text()
        assert not processes_below(short)
    rows = {row["name"]: row["value"] for row in json.loads(out.read_text())}
    whole = rows["6 devices: from the request to the new version"]
    assert 0 < whole < time.monotonic() - began_s
    parts = [value for name, value in rows.items() if ": of it " in name]
    assert len(parts) == len(PHASES)
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(whole, rel=0.01)
    for part in ("prefect", "broker", "gateway", "worker"):
        assert rows[f"6 devices: memory peak, {part}"] > 10
    assert sum(value for name, value in rows.items() if "processor time" in name) > 0
    assert any("bottleneck: " in name for name in rows)
    written = document.read_text()
    assert "| 6 devices: from the request to the new version |" in written
    assert "old" not in written


def processes_below(folder: str) -> list[str]:
    """Commands of servers whose folder is in this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"{supervision.MARK}={folder}/".encode() in path.read_bytes():
                found.append((path.parent / "cmdline").read_text())
    return found
