"""A device as a process: what it trains is right, what it cannot hand in is kept, and nothing that is said to it ends it."""

import asyncio
import base64
import datetime
import hashlib
import ipaddress
import json
import os
import re
import ssl
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import pytest
import wasmtime
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from infra import edge_http
from infra.edge_chunks import Assembly, BadChunk
from infra.edge_device import Device, encode_cbor
from infra.edge_http import Http, Refused, Unreachable
from infra.edge_memory import REFUSED, SENT, STARTED, TRAINED, Credentials, Memory, Round, Unusable
from infra.edge_modules import build
from infra.edge_seals import Seals
from infra.edge_settings import InvalidSettings, read_settings
from tasks.edge.seal import key_of, opened
from tests.infra.edge_site import ANSWERS, PREFIX, START, DeviceProcess, Site, free_port, wait_for
from tests.infra.test_edge_modules import plain

MODULE = build.module_path("logistic").read_bytes()
SHA256 = hashlib.sha256(MODULE).hexdigest()
RNG = np.random.default_rng(2)
X, Y = RNG.normal(size=(10, 3)), RNG.integers(0, 2, 10)
DATA = {"data": [{"x": x.tolist(), "y": int(y)} for x, y in zip(X, Y, strict=True)]}
ANSWER = b'{"num_samples":1,"update":{"w":[1,2,3],"b":4}}'


def wat(body: str, answer: bytes = ANSWER) -> bytes:
    quoted = "".join(f"\\{byte:02x}" for byte in answer)
    return bytes(
        wasmtime.wat2wasm(f"""(module
          (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
          (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
          (memory (export "memory") 1)
          (data (i32.const 1024) "{quoted}")
          (func (export "_start") {body}))""")
    )


def wat_answering(answer: bytes) -> bytes:
    return wat(
        f"""(i32.store (i32.const 0) (i32.const 1024)) (i32.store (i32.const 4) (i32.const {len(answer)}))
            (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))""",
        answer,
    )


LOOPING = wat("(loop $again (br $again))")
# Answers after two seconds.
SLOW = wat(f"""
  (i32.store (i32.const 528) (i32.const 1)) (i64.store (i32.const 536) (i64.const 2000000000))
  (drop (call $poll (i32.const 512) (i32.const 640) (i32.const 1) (i32.const 700)))
  (i32.store (i32.const 0) (i32.const 1024)) (i32.store (i32.const 4) (i32.const {len(ANSWER)}))
  (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))""")


@pytest.fixture
def site() -> Iterator[Site]:
    """The servers that the devices of these tests meet."""
    made = Site()
    yield made
    made.close()


Start = Callable[..., DeviceProcess]


@pytest.fixture
def device(site: Site, tmp_path: Path) -> Iterator[Start]:
    """`device("--cbor", name=...)`: a device that runs, with samples of its own, connected to the broker."""
    started: list[DeviceProcess] = []

    def start(
        *flags: str, name: str = "device-1", mqtt: bool = True, data: bool = True, **environment: str
    ) -> DeviceProcess:
        (tmp_path / "data.json").write_text(json.dumps(DATA))
        more = (["--mqtt", site.mqtt_url] if mqtt else []) + (["--data", str(tmp_path / "data.json")] if data else [])
        made = DeviceProcess(site, tmp_path / name, *more, *flags, name=name, **environment)
        started.append(made)
        if mqtt:
            wait_for(made.is_connected, "a connection")
        return made

    yield start
    for one in started:
        one.kill()


def assert_trained(update: dict[str, Any]) -> None:
    w, b = plain(X, Y.astype(float), np.zeros(3), 0.0, epochs=5, lr=0.5, batch_size=4)
    np.testing.assert_allclose(update["update"]["w"], w, rtol=1e-12)
    assert update["update"]["b"] == pytest.approx(b, rel=1e-12)


def test_a_round_over_mqtt_is_trained_and_handed_in_over_http(site, device):
    one = device()
    site.start_round("r-1", "device-1", MODULE)
    update = site.update_of("r-1")
    assert_trained(update)
    assert (update["proplet_id"], update["num_samples"]) == ("device-1", 10)
    assert update["base_model_uri"] == "fl/models/global_model_v0"
    assert update["metrics"]["loss"] < update["metrics"]["loss_before"]
    assert site.updates[0][1:] == ("application/json", site.updates[0][2], "Bearer secret-of-the-device")
    wait_for(lambda: one.state_of("r-1") == SENT, "the round's end")

    (created,) = site.said_on("control/proplet/create")
    assert (created["proplet_id"], created["metadata"]["wasm_runtime"]) == ("device-1", "wasmtime")
    wait_for(lambda: len(site.said_on("control/proplet/alive")) >= 3, "signs of life")
    assert site.said_on("control/proplet/alive")[-1] == {
        "proplet_id": "device-1", "status": "alive", "namespace": "default", "healthy": True,
    }  # fmt: skip
    (result,) = wait_for(lambda: site.said_on("control/proplet/results"), "the result")
    assert (result["task_id"], result["error"], result["results"]["round_id"]) == ("t-1", None, "r-1")
    assert (
        wait_for(lambda: site.said_on("control/proplet/metrics"), "metrics")[0]["memory_metrics"]["rss_bytes"] > 10**6
    )


def test_it_stays_within_80_mb_while_it_trains(site, device):
    one = device()
    for number in range(3):
        site.start_round(f"r-{number}", "device-1", MODULE)
        site.update_of(f"r-{number}")
    print(f"device: VmHWM {one.memory_kib('VmHWM')} kB, VmRSS {one.memory_kib('VmRSS')} kB")
    assert one.memory_kib("VmHWM") <= 80 * 1000


def test_five_mebibytes_of_data_and_a_large_model_are_trained_on(site, device):
    x = RNG.normal(size=(3300, 70))
    site.datasets["device-1"] = {"data": [{"x": row.tolist(), "y": int(row[0] > 0)} for row in x]}
    site.models[0] = {"w": [0.0] * 70, "b": 0.0, "note": "n" * 200_000}
    one = device(data=False)
    site.start_round("r-1", "device-1", MODULE)
    update = site.update_of("r-1")
    assert update["num_samples"] == 3300
    assert update["update"]["note"] == "n" * 200_000
    assert update["metrics"]["loss"] < update["metrics"]["loss_before"]
    print(f"device with 5 MB of data: VmHWM {one.memory_kib('VmHWM')} kB, VmRSS {one.memory_kib('VmRSS')} kB")


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = tmp_path / "certificate.pem", tmp_path / "key.pem"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    paths[1].write_bytes(key.private_bytes(*form))
    return paths


def test_over_tls_it_trusts_the_given_authority_and_no_other(certificate, tmp_path):
    site = Site(certificate)
    devices = []
    try:
        (tmp_path / "data.json").write_text(json.dumps(DATA))
        flags = ["--mqtt", site.mqtt_url, "--data", str(tmp_path / "data.json")]
        devices.append(trusting := DeviceProcess(site, tmp_path / "one", *flags, "--ca", str(certificate[0])))
        wait_for(trusting.is_connected, "a connection over TLS")
        site.start_round("r-1", "device-1", MODULE)
        assert_trained(site.update_of("r-1"))
        devices.append(wary := DeviceProcess(site, tmp_path / "two", *flags, name="device-2"))
        wait_for(lambda: wary.said().lower().count("certificate verify failed") >= 2, "two refusals")
        assert wary.status()["mqtt"] == "away"
    finally:
        for one in devices:
            one.kill()
        site.close()


def test_what_it_keeps_can_be_read_by_nobody_else_and_no_secret_is_said(site, device):
    one = device()
    site.start_round("r-1", "device-1", MODULE)
    site.update_of("r-1")
    files = [path for path in one.home.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"device.json", "status.json", SHA256}
    assert {path.stat().st_mode & 0o077 for path in files} == {0}
    assert "secret-of-the-device" not in one.said() + json.dumps(site.heard)
    assert b"secret-of-the-device" not in Path(f"/proc/{one.process.pid}/cmdline").read_bytes()


def test_without_mqtt_it_asks_for_rounds_and_fetches_all_it_needs(site, device):
    site.datasets["device-1"] = DATA
    site.open_round("r-1", MODULE)
    device(mqtt=False, data=False)
    assert_trained(site.update_of("r-1"))
    time.sleep(1)
    assert len(site.updates) == 1
    assert [path for path, _ in site.asked].count("/task") == 1
    assert len(site.beats) > 2
    assert site.beats[-1] == ("device-1", {"status": "alive", "detail": ""})


def test_a_server_that_is_away_for_long_is_said_to_be_so_once(site, device):
    site.stop_http()
    one = device(mqtt=False, data=False)
    wait_for(lambda: "no rounds from" in one.said(), "the first question")
    time.sleep(1.5)
    assert one.said().count("no rounds from") == 1
    site.datasets["device-1"] = DATA
    site.open_round("r-1", MODULE)
    site.start_http()
    assert_trained(site.update_of("r-1"))


def test_a_round_that_was_missed_is_found_after_connecting(site, device):
    site.open_round("r-1", MODULE)
    device("--poll-s", "3600")
    assert_trained(site.update_of("r-1"))


def test_an_update_in_cbor_has_typed_arrays(site, device):
    device("--cbor")
    site.start_round("r-1", "device-1", MODULE)
    (path, kind, body, _) = wait_for(lambda: site.updates, "an update")[0]
    assert (path, kind) == ("/update_cbor", "application/cbor")
    said = cbor2.loads(body)
    assert said["update"]["w"].tag == 86
    assert_trained({"update": {"w": np.frombuffer(said["update"]["w"].value, "<f8"), "b": said["update"]["b"]}})


def test_a_module_comes_from_an_address_with_its_digest(site, device):
    site.modules[SHA256] = MODULE
    device()
    site.start_round("r-1", "device-1", MODULE, image_url=f"{site.url}/modules/{SHA256}#sha256={SHA256}")
    assert_trained(site.update_of("r-1"))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"image_url": "{url}/modules/{sha256}"}, "needs a digest"),
        ({"image_url": "{url}/modules/{sha256}", "sha256": "00" * 32}, "the task names 0000"),
        ({"image_url": "{url}/modules/{sha256}", "sha256": "abc"}, "64 hex digits"),
        ({"file": "AGFzbQ==", "sha256": "11" * 32}, "the task names 1111"),
        ({"file": "?"}, "no base64"),
        ({"file": "AGFzbQ=="}, "module: "),
        ({"file": "", "image_url": ""}, "there is no module"),
    ],
)
def test_a_module_that_cannot_be_trusted_is_an_error_update(site, device, how, says):
    site.modules[SHA256] = MODULE
    device()
    how = {name: value.format(url=site.url, sha256=SHA256) for name, value in how.items()}
    site.start_round("r-1", "device-1", MODULE, **how)
    update = site.update_of("r-1")
    assert says in update["error"]
    assert (update["num_samples"], update["update"]) == (0, {})


def test_a_module_comes_in_pieces_over_mqtt(site, device):
    site.modules[SHA256] = MODULE
    one = device("--open")
    site.start_round("r-1", "device-1", MODULE, image_url="ghcr.io/somebody/logistic:latest")
    assert_trained(site.update_of("r-1"))
    assert (one.home / "modules" / SHA256).read_bytes() == MODULE
    site.start_round("r-2", "device-1", MODULE, image_url="ghcr.io/somebody/logistic:latest", sha256=SHA256)
    assert_trained(site.update_of("r-2"))
    assert len(site.said_on("registry/proplet")) == 1  # what is kept is not asked for again


def test_pieces_of_another_module_are_not_run(site, device):
    site.modules[SHA256], site.chunk_sha256 = MODULE, "22" * 32
    one = device("--open")
    site.start_round("r-1", "device-1", MODULE, image_url="logistic")
    wait_for(lambda: f"make digest {SHA256}, expected 2222" in one.said(), "the refusal of the pieces")
    assert one.state_of("r-1") == STARTED


def test_pieces_that_nothing_sealed_names_are_not_asked_for(site, device):
    site.modules[SHA256] = MODULE
    device()
    site.start_round("r-1", "device-1", MODULE, image_url="logistic")
    assert "there is no module 'logistic'" in site.update_of("r-1")["error"]
    assert site.said_on("registry/proplet") == []


def test_a_module_that_fails_is_an_error_update_without_the_devices_data(site, device, tmp_path):
    one = device("--fuel", "1000000")
    site.start_round("r-1", "device-1", LOOPING)
    assert site.update_of("r-1")["error"].startswith("fuel: its 1000000 units are used up")
    (tmp_path / "data.json").write_text('{"data":[{"x":[1,2,3],"y":77}]}')
    site.start_round("r-2", "device-1", MODULE)
    update = site.update_of("r-2")
    assert update == {
        "round_id": "r-2", "proplet_id": "device-1", "base_model_uri": "fl/models/global_model_v0", "num_samples": 0,
        "metrics": {}, "update": {}, "error": "exit 1: exit code 1",
    }  # fmt: skip
    assert "data[0].y = 77" in one.said()
    wait_for(lambda: [said["error"] for said in site.said_on("control/proplet/results")][1:], "both results")


def test_missing_data_or_model_is_an_error_update(site, device):
    device(data=False)
    site.start_round("r-1", "device-1", MODULE)
    assert "the data was not given: HTTP 404: Dataset not found" in site.update_of("r-1")["error"]
    site.start_round("r-2", "device-1", MODULE, version=7)
    assert "the model was not given: HTTP 404: Model not found" in site.update_of("r-2")["error"]


def test_a_server_that_fails_is_asked_again(site, device):
    site.answers = [(503, "not yet"), (500, "oh")]
    one = device()
    site.start_round("r-1", "device-1", MODULE)
    assert_trained(site.update_of("r-1"))
    assert "attempt 2 of 3: HTTP 500: oh" in one.said()
    assert not [topic for topic, _ in site.heard if "/updates/" in topic]


@pytest.mark.parametrize("status", [400, 403, 409, 413])
def test_a_refusal_is_final_and_its_text_is_logged(site, device, status):
    site.answers = [(status, "update.w has shape [2]")]
    one = device()
    site.start_round("r-1", "device-1", MODULE)
    wait_for(lambda: one.state_of("r-1") == REFUSED, "the refusal")
    assert f"refused the update: HTTP {status}: update.w has shape [2]" in one.said()
    one.kill()
    one.start()
    wait_for(one.is_connected, "the restart")
    site.start_round("r-2", "device-1", MODULE)
    site.update_of("r-2")
    assert len(site.updates) == 1


def test_after_three_failures_in_a_row_the_update_goes_over_mqtt(site, device):
    site.models[0] = {"w": [0.0, 0.0, 0.0], "b": 0.0}
    one = device()
    site.answers = [(503, "away")] * 3
    site.start_round("r-1", "device-1", MODULE)
    (said,) = wait_for(lambda: site.said_on("fl/rounds/r-1/updates/device-1"), "an update over MQTT")
    assert_trained(said)
    wait_for(lambda: one.state_of("r-1") == SENT, "the round's end")
    assert site.updates == []
    assert "attempt 3 of 3" in one.said()


def test_what_only_the_broker_took_is_kept_through_a_kill_and_sent_again_over_http(site, device):
    site.said_to_updates = None
    site.answers = [(503, "away")] * 3
    one = device()
    site.start_round("r-1", "device-1", MODULE)
    wait_for(lambda: site.said_on("fl/rounds/r-1/updates/device-1"), "an update over MQTT")
    # Neither who holds another key nor who holds none can say that it was taken.
    for key in ("another", ""):
        site.do(site.answer("r-1", "device-1", 200, key))
    wait_for(lambda: one.said().count("passed over") == 2, "the forged answers")
    assert one.state_of("r-1") == TRAINED
    one.kill()
    assert one.state_of("r-1") == TRAINED
    one.start()
    assert_trained(site.update_of("r-1"))
    wait_for(lambda: one.state_of("r-1") == SENT, "the round's end")
    assert one.said().count("trained in") == 1


def test_a_refusal_that_comes_over_mqtt_is_final(site, device):
    site.said_to_updates = 409
    site.answers = [(503, "away")] * 3
    one = device()
    site.start_round("r-1", "device-1", MODULE)
    wait_for(lambda: one.state_of("r-1") == REFUSED, "the round's end")
    assert "the server refused the update: MQTT 409: because" in one.said()
    assert site.updates == []


def test_a_start_that_its_server_did_not_seal_is_passed_over(site, device):
    one = device()
    env = {"ROUND_ID": "forged", "MODEL_URI": "fl/models/global_model_v0"}
    said = {"id": "t", "env": env, "proplet_id": "device-1", "file": base64.b64encode(MODULE).decode()}
    forged = [json.dumps(said).encode(), site.sealed(said, START, "device-1", "another")]
    forged += [site.sealed(said, START, "device-2"), site.sealed(said, ANSWERS, "device-1")]
    for payload in forged:
        site.publish(START, payload)
    site.start_round("good", "device-1", MODULE)
    site.update_of("good")
    assert [one["round_id"] for one in one.rounds()] == ["good"]
    assert one.said().count("passed over") == len(forged)


def test_with_open_it_takes_starts_of_existing_servers(site, device):
    device("--open")
    env = {"ROUND_ID": "r-1", "MODEL_URI": "fl/models/global_model_v0", "HYPERPARAMS": "{}"}
    said = {"id": "t", "env": env, "proplet_id": "device-1", "file": base64.b64encode(MODULE).decode()}
    site.publish(START, said)
    assert site.update_of("r-1")["num_samples"] == 10


def test_with_bare_topics_it_goes_where_existing_servers_listen(site, device):
    device("--bare-topics")
    site.answers = [(503, "away")] * 3
    site.start_round("r-1", "device-1", MODULE)
    wait_for(
        lambda: [said for topic, said in site.heard if topic == "fl/rounds/r-1/updates/device-1"], "the bare topic"
    )


def test_an_update_that_nobody_takes_waits_on_disk_and_survives_a_kill(site, device):
    one = device(mqtt=False)
    site.open_round("r-1", MODULE)
    site.answers = [(503, "away")] * 1000
    wait_for(lambda: one.state_of("r-1") == TRAINED, "training")
    wait_for(lambda: "wait on disk" in one.said(), "three failures")
    one.kill()
    site.stop_http()
    (kept,) = (one.home / "rounds").glob("*.json")
    assert kept.stat().st_mode & 0o777 == 0o600
    one.start()
    wait_for(lambda: one.said().count("attempt 3 of 3") >= 2, "three failures again")
    site.answers = []
    site.start_http()
    assert_trained(site.update_of("r-1", patience_s=90))
    assert one.said().count("trained in") == 1


def test_a_round_that_was_being_trained_is_trained_again_after_a_kill(site, device):
    one = device()
    site.start_round("r-1", "device-1", SLOW)
    wait_for(lambda: one.state_of("r-1") == STARTED, "the start")
    time.sleep(0.5)
    one.kill()
    one.start()
    assert site.update_of("r-1")["update"] == {"w": [1, 2, 3], "b": 4}


def test_a_round_is_trained_once_however_often_it_is_started(site, device):
    one = device()
    for _ in range(3):
        site.start_round("r-1", "device-1", MODULE)
    site.update_of("r-1")
    wait_for(lambda: one.state_of("r-1") == SENT, "the round's end")
    one.kill()
    one.start()
    wait_for(one.is_connected, "the restart")
    site.start_round("r-1", "device-1", MODULE)
    site.start_round("r-2", "device-1", MODULE)
    site.update_of("r-2")
    assert one.said().count("trained in") == 2


def test_without_a_broker_it_becomes_unhealthy_goes_on_over_http_and_says_so_later(site, device):
    one = device()
    site.stop_broker()
    wait_for(lambda: one.status().get("healthy") is False, "five attempts", patience_s=60)
    assert "no MQTT after 5 attempts" in one.status()["detail"]
    assert "unhealthy: no MQTT after 5 attempts" in one.said()
    site.open_round("r-1", MODULE)
    assert_trained(site.update_of("r-1"))
    wait_for(lambda: site.beats[-1][1]["status"] == "unhealthy", "what it says over HTTP")
    site.heard.clear()
    site.start_broker()
    first = wait_for(lambda: site.said_on("control/proplet/alive"), "a sign of life", patience_s=90)[0]
    assert first["healthy"] is False
    assert "no MQTT after 5 attempts" in first["detail"]
    wait_for(lambda: site.said_on("control/proplet/alive")[-1]["healthy"], "health")
    assert one.status()["healthy"] is True
    site.start_round("r-2", "device-1", MODULE)
    site.update_of("r-2")


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"{", b"[]", b"\xff", b"[" * 20_000, b'{"proplet_id":"device-1"}',
        b'{"proplet_id":"device-1","env":[]}',
        b'{"proplet_id":"device-1","env":{"ROUND_ID":1}}',
        b'{"proplet_id":"device-1","env":{"ROUND_ID":"../../etc"}}',
        b'{"proplet_id":"device-1","env":{"ROUND_ID":"a/+/#"}}',
        b'{"proplet_id":"device-1","env":{"ROUND_ID":"r","A=B":"c"}}',
        b'{"proplet_id":"device-1","env":{"ROUND_ID":"r"},"sha256":7}',
        b'{"proplet_id":"device-1","env":{"ROUND_ID":"r"},"file":{"a":1}}',
    ],
)  # fmt: skip
def test_what_is_malformed_is_passed_over(site, device, payload):
    one = device()
    site.publish("control/manager/start", payload)
    site.start_round("good", "device-1", MODULE)
    site.update_of("good")
    assert "passed over" in one.said()
    assert [one["round_id"] for one in one.rounds()] == ["good"]


def test_what_is_for_another_device_is_not_taken(site, device):
    one = device()
    site.start_round("r-1", "device-2", MODULE)
    site.start_round("r-2", "device-1", MODULE)
    site.update_of("r-2")
    assert [one["round_id"] for one in one.rounds()] == ["r-2"]


def test_the_key_goes_to_its_own_servers_alone(site, device):
    other = Site()
    try:
        other.modules[SHA256] = MODULE
        device()
        site.start_round("r-1", "device-1", MODULE, image_url=f"{other.url}/modules/{SHA256}", sha256=SHA256)
        site.update_of("r-1")
        assert other.asked == [(f"/modules/{SHA256}", "")]
        assert ("/models/0", "Bearer secret-of-the-device") in site.asked
    finally:
        other.close()


def test_a_redirection_is_not_followed(site, device):
    site.modules[SHA256] = MODULE
    one = device()
    site.start_round("r-1", "device-1", MODULE, image_url=f"{site.url}/elsewhere/{SHA256}", sha256=SHA256)
    wait_for(lambda: "HTTP 307" in one.said(), "the refusal to follow")
    assert (f"/modules/{SHA256}", "Bearer secret-of-the-device") not in site.asked


def test_it_ends_when_it_is_told_to_though_a_module_runs(site, device):
    one = device()
    site.start_round("r-1", "device-1", LOOPING)
    wait_for(lambda: one.state_of("r-1") == STARTED, "the start")
    time.sleep(0.5)
    begun = time.monotonic()
    assert one.stop() == 0
    assert time.monotonic() - begun < 10


def test_one_home_is_of_one_device_at_a_time(site, device, tmp_path):
    one = device()
    done = subprocess.run([sys.executable, "-m", "infra.edge_device", *one.flags], capture_output=True, text=True)
    assert done.returncode == 2
    assert "is in use by another device" in done.stderr


def test_it_loads_nothing_heavy():
    heavy = ("prefect", "torch", "web3", "numpy", "pydantic", "sqlalchemy", "httpx", "eth_utils", "typer")
    program = f"import sys, infra.edge_device; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_hands_over_to_the_small_program():
    command = [sys.executable, "-m", "infra.cli", "edge", "device", "--server", "ftp://x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "healchain edge device: --server = ftp://x: expected http://HOST:PORT or https://HOST:PORT, and nothing secret in it"
    )


# Settings

GIVEN = ["--server", "http://127.0.0.1:1"]


def test_help_says_where_the_key_comes_from(capsys):
    with pytest.raises(SystemExit):
        read_settings(["--help"], {})
    said = capsys.readouterr().out
    assert said.startswith("usage: healchain-device --server URL")
    assert "HEALCHAIN_DEVICE_KEY_FILE=FILE" in said
    assert all(len(line) <= 130 for line in said.splitlines())


def test_a_server_that_does_not_answer_is_told_in_plain_words():
    with pytest.raises(Unreachable, match=r"^\[Errno 111\] Connection refused$"):
        Http(timeout_s=5).get(f"http://127.0.0.1:{free_port()}", max_bytes=1)


def test_a_certificate_out_of_its_time_is_told_with_the_hosts_own():
    plain = urllib.error.URLError(ssl.SSLError("[SSL: WRONG_VERSION_NUMBER] wrong version number"))
    assert "is it http://" in edge_http._cause(plain)
    error = urllib.error.URLError(ssl.SSLError("certificate verify failed: certificate is not yet valid"))
    assert re.search(r"not yet valid.*; this host's clock says 20[0-9-]+T[0-9:]+Z$", edge_http._cause(error))


def test_a_device_without_a_key_is_told_how_to_give_it(tmp_path, caplog, monkeypatch):
    def refuse(*_: Any, **__: Any) -> bytes:
        raise Refused(401, "the key is unknown")

    made = Device(read_settings(GIVEN, {}), Memory(tmp_path / "home"), Credentials("device-1", ""))
    monkeypatch.setattr(made.http, "get", refuse)
    asyncio.run(made._ask_once())
    assert "HTTP 401: the key is unknown: write what `healchain edge register` printed into a file" in caplog.text


def test_a_flag_comes_before_the_environment_and_that_before_the_default():
    environment = {
        "HEALCHAIN_DEVICE_BEAT_S": "3",
        "HEALCHAIN_DEVICE_TENANT": "t",
        "HEALCHAIN_DEVICE_SERVER": "http://a/",
    }
    settings = read_settings(["--tenant", "flag"], environment)
    assert (settings.beat_s, settings.poll_s, settings.prefix) == (3, 5, "m/flag/c/edge/")
    assert settings.server == settings.registry == settings.data_store == "http://a"
    assert read_settings([*GIVEN, "--cbor"], {}).is_cbor
    assert not read_settings(GIVEN, {}).is_cbor


def test_secrets_come_from_the_environment_or_from_a_file_that_nobody_else_reads(tmp_path):
    file = tmp_path / "key"
    file.write_text("of the file\n")
    file.chmod(0o600)
    named = {"HEALCHAIN_DEVICE_KEY_FILE": str(file)}
    assert read_settings(GIVEN, named).key == "of the file"
    assert read_settings(GIVEN, {**named, "HEALCHAIN_DEVICE_KEY": "of the environment"}).key == "of the environment"
    assert read_settings(GIVEN, {"HEALCHAIN_DEVICE_MQTT_PASSWORD": "m"}).mqtt_password == "m"
    file.chmod(0o644)
    with pytest.raises(InvalidSettings, match=f"chmod 600 {file}"):
        read_settings(GIVEN, named)
    with pytest.raises(InvalidSettings, match="KEY_FILE = /nowhere: there is no such file"):
        read_settings(GIVEN, {"HEALCHAIN_DEVICE_KEY_FILE": "/nowhere"})
    with pytest.raises(InvalidSettings, match="one line") as refused:
        read_settings(GIVEN, {"HEALCHAIN_DEVICE_KEY": "a\nsecret"})
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("server", "127.0.0.1:80", "expected http"),
        ("server", "http://user:pass@host", "nothing secret"),
        ("server", "http://host:99999", "Port out of range"),
        ("registry", "mqtt://a", "expected http"),
        ("mqtt", "http://a", "expected mqtt"),
        ("mqtt", "mqtt://u@a", "nothing secret"),
        ("tenant", "a/b", "a part of a topic"),
        ("channel", "#", "a part of a topic"),
        ("id", "a b", "a letter or digit first"),
        ("id", "x" * 129, "1 to 128"),
        ("id", "00:1a:2b", "1 to 128 of a-z, A-Z, 0-9 and ._@-"),
        ("open", "yes", "expected 0 or 1"),
        ("data", "/nowhere", "no such file"),
        ("ca", "/nowhere", "no such file"),
        ("ca", __file__, "no certificates"),
        ("qos", "3", "an integer from 0 to 2"),
        ("qos", "1.5", "an integer"),
        ("beat-s", "0", "a number from 0.1"),
        ("beat-s", "nan", "a number from 0.1"),
        ("fuel", "many", "an integer"),
        ("memory-mib", "0", "from 1 to 4096"),
        ("wall-clock-s", "-1", "a number"),
        ("compile-s", "0", "a number from 0.1"),
        ("compile-memory-mib", "1", "an integer from 64"),
        ("cbor", "yes", "expected 0 or 1"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_wherever_it_is(name, value, says):
    others = [] if name == "server" else GIVEN
    with pytest.raises(InvalidSettings, match=says) as refused:
        read_settings([*others, f"--{name}", value], {})
    assert str(refused.value).startswith(f"--{name} = {value}: ")
    variable = "HEALCHAIN_DEVICE_" + name.upper().replace("-", "_")
    with pytest.raises(InvalidSettings, match=says) as refused:
        read_settings(others, {variable: value})
    assert str(refused.value).startswith(f"{variable} = {value}: ")


# Memory


def test_a_round_is_remembered_until_it_is_over_and_then_only_its_end(tmp_path):
    memory = Memory(tmp_path / "home")
    kept = Round("r-1", TRAINED, {"env": {}}, {"update": {"w": [1.0]}})
    memory.keep(kept)
    assert memory.unfinished() == [kept]
    memory.keep(kept._replace(state=SENT, detail="HTTP"))
    assert memory.unfinished() == []
    assert memory.find("r-1") == Round("r-1", SENT, {}, {}, "HTTP")
    assert memory.find("r-2") is None


def test_old_rounds_are_forgotten_but_never_unsent_ones(tmp_path):
    memory = Memory(tmp_path / "home")
    memory.keep(Round("old", TRAINED, {"env": {}}, {"update": {}}))
    for number in range(205):
        memory.keep(Round(f"r-{number}", SENT, {}, {}))
    assert [one.round_id for one in memory.unfinished()] == ["old"]
    assert len(list((tmp_path / "home" / "rounds").iterdir())) == 201


def test_a_changed_module_is_not_given_out(tmp_path):
    memory = Memory(tmp_path / "home")
    memory.keep_module(b"module")
    sha256 = hashlib.sha256(b"module").hexdigest()
    assert memory.module(sha256) == b"module"
    (tmp_path / "home" / "modules" / sha256).write_bytes(b"other")
    assert memory.module(sha256) is None


def test_credentials_are_made_once_and_checked(tmp_path):
    memory = Memory(tmp_path / "home")
    made = memory.credentials("", "")
    assert memory.credentials("", "new").proplet_id == made.proplet_id
    assert memory.credentials(made.proplet_id, "").key == "new"
    with pytest.raises(Unusable, match="id = another"):
        memory.credentials("another", "")
    os.chmod(tmp_path / "home" / "device.json", 0o640)
    with pytest.raises(Unusable, match="chmod 600"):
        memory.credentials("", "")


def test_counters_rise_with_each_connection_whatever_the_clock_says(tmp_path):
    memory = Memory(tmp_path / "home")
    assert [memory.begin_session(now_s) for now_s in (1000, 5, 5, 2000)] == [1000, 1001, 1002, 2000]
    (tmp_path / "home" / "counter.json").write_text('{"session": "x"}')
    with pytest.raises(Unusable, match=r"counter\.json holds no counter"):
        memory.begin_session(1)


def test_a_last_will_has_the_last_counter_of_its_connection_and_comes_before_the_next(tmp_path):
    memory = Memory(tmp_path / "home")
    seals = Seals(memory, Credentials("device-1", "k"), is_open=False)

    def counter(payload: bytes) -> int:
        return opened(payload, key_of("k"), "alive", "device-1")[1]

    seals.begin()
    will = seals.closing("alive", {"status": "offline"})
    first, second = seals.on("alive", {"a": 1}), seals.on("alive", {"a": 1})
    seals.begin()
    later = seals.on("alive", {"a": 1})
    assert counter(first) < counter(second) < counter(will) < counter(later)


def round_file(**changes: Any) -> str:
    fields = {"round_id": "r", "state": TRAINED, "task": {"env": {}}, "update": {"update": {"w": [1.0]}}, "detail": ""}
    return json.dumps({**fields, **changes})


DEEP = (
    '{"round_id":"r","state":"trained","task":{"env":{}},"detail":"","update":{"update":{"w":'
    + "[" * 900
    + "]" * 900
    + "}}}"
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Expecting value"),
        ("[]", "no object"),
        ('{"round_id":"r"}', "missing"),
        ('{"a":1}', "unexpected"),
        ("[" * 1_000_000, "nested more than 27 deep"),
        (DEEP, "nested more than 27 deep"),
        (round_file(update={"update": {"w": [10**400]}}), "beyond double precision"),
        (round_file(update={"update": {"w": "\ud800"}}), "half of a character"),
        (round_file(update={"update": [1]}), "update.update: expected an object"),
        (round_file(state="other"), "another kind of value"),
        (round_file(detail=7), "another kind of value"),
        (round_file(task={}), "task.env"),
        (round_file(round_id="../other"), "which has another file"),
    ],
    ids=range(13),
)
def test_a_file_that_cannot_be_used_is_set_aside_and_the_others_are_sent(tmp_path, caplog, text, says):
    memory = Memory(tmp_path / "home")
    memory.keep(Round("good", TRAINED, {"env": {}}, {"update": {"w": [1.0]}}))
    memory.keep(Round("r", STARTED, {"env": {}}, {}))
    path = memory._path("r")
    for look in (memory.unfinished, lambda: memory.find("r")):
        path.write_text(text)
        look()
        assert path.with_suffix(".aside").read_text() == text
        assert not path.exists()
    assert str(path) in caplog.text
    assert says in caplog.text
    assert [one.round_id for one in memory.unfinished()] == ["good"]


@pytest.mark.parametrize(
    "number", ["9" * 400, "-1e999", '"\\ud800"', "[" * 500 + "]" * 500], ids=["digits", "infinite", "half", "deep"]
)
def test_an_output_that_cannot_be_sent_is_an_error_update(site, device, number):
    one = device("--cbor")
    answer = '{"num_samples":1,"update":{"w":[' + number + "]}}"
    site.start_round("r-1", "device-1", wat_answering(answer.encode()))
    (_, _, body, _) = wait_for(lambda: site.updates, "an error update")[0]
    assert cbor2.loads(body)["error"].startswith("output: stdout, ")
    wait_for(lambda: one.state_of("r-1") == SENT, "the round's end")


def test_a_device_starts_beside_a_file_that_cannot_be_sent(site, device, tmp_path):
    """As an earlier version could have left it."""
    memory = Memory(tmp_path / "device-1")
    memory._path("r").write_text(round_file(update={"update": {"w": [10**400]}}))
    memory.close()
    one = device("--cbor")
    site.start_round("r-2", "device-1", MODULE)
    wait_for(lambda: one.state_of("r-2") == SENT, "the next round")
    assert "is set aside as" in one.said()


def test_a_task_is_remembered_without_what_nobody_reads(tmp_path):
    memory = Memory(tmp_path / "home")
    device = Device(read_settings(GIVEN, {}), memory, Credentials("device-1", ""))
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    device.accept({"id": "t", "other": deep, "env": {"ROUND_ID": "r"}})
    assert memory.find("r") == Round("r", STARTED, {"id": "t", "env": {"ROUND_ID": "r"}}, {})


@pytest.mark.parametrize("text", ['{"proplet_id": 7}', "[]", "{", '{"proplet_id": "a", "key": null}'])
def test_a_device_json_that_is_none_is_named(tmp_path, text):
    memory = Memory(tmp_path / "home")
    path = tmp_path / "home" / "device.json"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(Unusable, match=str(path)):
        memory.credentials("", "")


# Formats


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ([1, 2.5], (None, [1.0, 2.5])),
        ([[1, 2], [3, 4], [5, 6]], ([3, 2], [1.0, 2, 3, 4, 5, 6])),
        ([[[0.1]], [[0.2]]], ([2, 1, 1], [0.1, 0.2])),
    ],
)
def test_tensors_become_typed_arrays(value, read):
    shape, numbers = read
    packed = cbor2.loads(encode_cbor({"round_id": "r", "update": {"t": value}}))["update"]["t"]
    if shape is not None:
        assert (packed.tag, list(packed.value[0])) == (40, shape)
        packed = packed.value[1]
    assert packed.tag == 86
    assert np.frombuffer(packed.value, "<f8").tolist() == numbers


@pytest.mark.parametrize("value", [0.5, 3, [], [[]], [[1], [1, 2]], ["a"], [True, 1], {"inner": [[], 1]}, None])
def test_what_is_no_tensor_stays_as_it_is(value):
    assert cbor2.loads(encode_cbor({"update": {"t": value}}))["update"]["t"] == value


def piece(index: Any, total: Any, data: Any = "QQ==", **more: Any) -> dict[str, Any]:
    return {"app_name": "m", "chunk_idx": index, "total_chunks": total, "data": data, **more}


AB = hashlib.sha256(b"AB").hexdigest()


def test_pieces_make_the_module_in_any_order_and_with_repetitions():
    assembly = Assembly("m", AB)
    assert assembly.take(piece(1, 2, "Qg==")) is None
    assert assembly.take(piece(1, 2, "Qg==")) is None
    assert assembly.take({**piece(0, 2), "app_name": "other"}) is None
    assert assembly.take(piece(0, 2)) == b"AB"


def test_a_module_that_was_cut_anew_begins_anew():
    assembly = Assembly("m", AB)
    assert assembly.take(piece(0, 3)) is None
    assert assembly.take(piece(0, 2)) is None
    assert assembly.take(piece(1, 2, "Qg==")) == b"AB"


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (piece(2, 2), "0 <= index < total"),
        (piece(-1, 2), "0 <= index < total"),
        (piece(0, 10**6), "0 <= index < total"),
        (piece("0", 2), "0 <= index < total"),
        (piece(True, 2), "0 <= index < total"),
        (piece(0, 2, "?"), "base64"),
        (piece(0, 2, None), "base64"),
        (piece(0, 2, sha256="33" * 32), f"expected {AB}"),
        (piece(0, 2, sha256=3), f"expected {AB}"),
        (piece(0, 1), "make digest"),
    ],
)
def test_a_piece_that_is_none_is_refused(said, says):
    with pytest.raises(BadChunk, match=says):
        Assembly("m", AB).take(said)


def test_pieces_without_any_digest_are_refused():
    with pytest.raises(BadChunk, match="could not be checked"):
        Assembly("m", "").take(piece(0, 1))


def test_topics_are_below_one_prefix():
    assert read_settings(GIVEN, {}).prefix == PREFIX
