"""What the bridge takes, message by message: from the device itself, once, and nothing that could end it."""

import base64
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cbor2
import pytest
from pydantic import SecretStr

from blocks.identity import residents
from infra import edge_bridge
from infra.edge_bridge import MAX_WORD, Bridge
from infra.edge_metrics import Metrics
from infra.edge_server import EdgeSettings
from tasks.edge import rounds, seal
from tasks.edge.seal import UPDATE
from tasks.edge.server import open_next, utc_now
from tasks.edge.wire import Refusal
from tests.edge.world import ask, make_server, update

PREFIX = "m/healchain/c/edge/"
UPDATES = PREFIX + "fl/rounds/r-1/updates/"


class Site:
    """A bridge without a broker, a ledger with the devices a, b and c, and an open round."""

    def __init__(self, folder: Path, **pinned: Any) -> None:
        self.server = make_server(folder, **pinned)
        self.ledger = self.server.ledger
        settings = EdgeSettings(mqtt_password=SecretStr("x"), body_bytes=100_000)
        self.metrics = Metrics()
        self.bridge = Bridge(self.server, settings, folder, self.metrics)
        self.keys = {one: self.ledger.register(one, {}, utc_now()) for one in "abc"}
        open_next(self.server, ask(self.server), 1, utc_now())

    def sealed(self, user: str, kind: str, said: dict[str, Any], counter: int) -> bytes:
        return seal.seal(json.dumps(said).encode(), seal.key_of(self.keys[user]), kind, user, counter)

    def say(self, topic: str, payload: bytes) -> dict[str, Any] | None:
        """The answer, opened by the device that it is for."""
        answer = self.bridge.take(topic, payload)
        if answer is None:
            return None
        user = answer[0].rpartition("/")[2]
        assert answer[0] == f"control/manager/answers/{user}"
        if self.ledger.device(user) is None:
            found: dict[str, Any] = json.loads(answer[1])
        else:
            found = json.loads(seal.opened(answer[1], seal.key_of(self.keys[user]), rounds.ANSWER, user)[0])
        assert (found["round_id"], found["proplet_id"]) == ("r-1", user)
        return found

    def refusal(self, topic: str, payload: bytes) -> int:
        with pytest.raises(Refusal) as caught:
            self.bridge.take(topic, payload)
        return caught.value.status


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    yield Site(tmp_path)
    residents.pop("edge", None)


@pytest.fixture
def open_site(tmp_path: Path) -> Iterator[Site]:
    yield Site(tmp_path, is_open=True)
    residents.pop("edge", None)


ALIVE = {"proplet_id": "a", "status": "alive"}


def test_a_device_speaks_for_itself(site):
    site.say(PREFIX + rounds.ALIVE, site.sealed("a", rounds.ALIVE, ALIVE, 1))
    assert site.ledger.device("a").health == "alive"
    site.say(PREFIX + rounds.METRICS, site.sealed("a", rounds.METRICS, {"proplet_id": "a", "cpu_metrics": {}}, 2))
    assert json.loads(site.ledger.device("a").details) == {"metrics": {"proplet_id": "a", "cpu_metrics": {}}}


@pytest.mark.parametrize("topic", [rounds.CREATE, rounds.ALIVE, rounds.RESULTS, rounds.METRICS, rounds.TASK_METRICS])
def test_nobody_speaks_for_a_device(site, topic):
    said = {"proplet_id": "a", "status": "offline"}
    plain = json.dumps(said).encode()
    by_another = seal.seal(plain, seal.key_of(site.keys["b"]), topic, "a", 1)
    in_its_own_name = seal.seal(plain, seal.key_of(site.keys["b"]), topic, "b", 1)
    about_another_thing = seal.seal(plain, seal.key_of(site.keys["a"]), UPDATE, "a", 1)
    forged = [plain, by_another, in_its_own_name, about_another_thing]
    assert [site.refusal(PREFIX + topic, one) for one in forged] == [401] * 4
    assert site.refusal(PREFIX + topic, plain.replace(b'"a"', b'"nobody"')) == 403
    assert (site.ledger.device("a").health, site.ledger.device("a").last_beat_at) == ("", None)


def test_a_module_is_sent_to_devices_that_say_who_they_are(site):
    wanted = {"app_name": "m", "proplet_id": "a"}
    assert site.bridge._module_wanted(site.sealed("a", rounds.MODULE_WANTED, wanted, 1)) == "m"
    for payload in (
        json.dumps(wanted).encode(),
        b'{"app_name":"m"}',
        site.sealed("a", rounds.MODULE_WANTED, wanted, 1),
    ):
        with pytest.raises(Refusal):
            site.bridge._module_wanted(payload)


def test_a_word_is_taken_once_and_none_after_a_later_one_even_when_the_bridge_begins_anew(site):
    early, late = (
        site.sealed("a", rounds.ALIVE, {**ALIVE, "status": one}, place) for place, one in ((1, "alive"), (2, "offline"))
    )
    site.say(PREFIX + rounds.ALIVE, late)
    again = Bridge(site.server, EdgeSettings(), site.bridge._folder, Metrics())
    for payload in (early, late):
        with pytest.raises(Refusal, match="it was said before"):
            again.take(PREFIX + rounds.ALIVE, payload)
    assert site.ledger.device("a").health == "offline"


def test_with_a_new_key_a_device_counts_anew_and_the_old_seals_are_void(site):
    old = site.sealed("a", rounds.ALIVE, ALIVE, 500)
    site.say(PREFIX + rounds.ALIVE, site.sealed("a", rounds.ALIVE, ALIVE, 400))
    site.keys["a"] = site.ledger.register("a", {}, utc_now())
    assert site.refusal(PREFIX + rounds.ALIVE, old) == 401
    site.say(PREFIX + rounds.ALIVE, site.sealed("a", rounds.ALIVE, ALIVE, 1))


def test_an_update_is_answered_and_counts_once_however_often_it_comes(site):
    first = site.sealed("a", UPDATE, update("a"), 5)
    assert [site.say(UPDATES + "a", first)["status"] for _ in range(2)] == [200, 200]
    site.say(UPDATES + "b", site.sealed("b", UPDATE, update("b"), 1))
    assert site.ledger.round("r-1").status == "CLOSED"
    # After the closing, too; another one of the same device is late.
    assert site.say(UPDATES + "a", site.sealed("a", UPDATE, update("a"), 6))["status"] == 200
    late = site.say(UPDATES + "a", site.sealed("a", UPDATE, update("a", w=(9.0, 9.0, 9.0)), 7))
    assert (late["status"], late["detail"]) == (
        409,
        "round r-1 is closed: enough updates came; wait for the next round",
    )
    assert site.refusal(UPDATES + "a", first) == 409
    assert [row.proplet_id for row in site.ledger.updates("r-1")] == ["a", "b"]


def test_an_earlier_update_does_not_take_the_place_of_a_later_one(site):
    old, new = (site.sealed("a", UPDATE, update("a", b=float(place)), place) for place in (1, 2))
    site.say(UPDATES + "a", new)
    assert site.refusal(UPDATES + "a", old) == 409
    assert json.loads(site.ledger.body_of(site.ledger.updates("r-1")[0]))["b"] == 2.0


def test_nobody_sends_an_update_in_anothers_name_and_the_device_is_told_nothing_of_it(site):
    plain = json.dumps(update("a")).encode()
    by_another = seal.seal(plain, seal.key_of(site.keys["b"]), UPDATE, "a", 1)
    as_a_word = seal.seal(plain, seal.key_of(site.keys["a"]), rounds.ALIVE, "a", 1)
    assert [site.refusal(UPDATES + "a", one) for one in (plain, by_another, as_a_word)] == [401] * 3
    assert site.refusal(UPDATES + "a", cbor2.dumps(update("a"))) == 401
    assert site.refusal(UPDATES + "nobody", plain) == 403
    assert site.say(UPDATES + "b", site.sealed("b", UPDATE, update("a"), 1))["status"] == 403
    assert site.ledger.updates("r-1") == []


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"round_id": "r-9"}, 403),
        ({"num_samples": 0}, 400),
        ({"base_model_uri": "v7"}, 409),
        ({"note": "n" * 100_000}, 413),
    ],
)
def test_a_refusal_is_told_to_who_sent_it(site, fields, status):
    assert site.say(UPDATES + "a", site.sealed("a", UPDATE, update("a", **fields), 1))["status"] == status


def test_in_open_mode_a_seal_may_be_missing_but_not_wrong(open_site):
    site = open_site
    site.say(PREFIX + rounds.ALIVE, json.dumps(ALIVE).encode())
    assert site.ledger.device("a").health == "alive"
    assert site.refusal(PREFIX + rounds.ALIVE, site.sealed("b", rounds.ALIVE, ALIVE, 1)) == 401
    assert site.bridge._module_wanted(b'{"app_name":"m"}') == "m"
    assert site.say(UPDATES + "a", cbor2.dumps(update("a")))["status"] == 200
    assert site.refusal(UPDATES + "b", site.sealed("a", UPDATE, update("b"), 1)) == 401


def test_in_open_mode_a_device_that_nobody_registered_is_answered_without_a_seal(open_site):
    said = update("00:1a:2b", round_id="r-1")
    assert open_site.say(UPDATES + "00:1a:2b", json.dumps(said).encode())["status"] == 403


@pytest.mark.parametrize(
    ("payload", "status"),
    [
        (b'{"proplet_id":"a","metadata":' + b"[" * 900 + b"]" * 900 + b"}", 400),
        (b'{"proplet_id":"a","metadata":{"x":"' + b"y" * MAX_WORD + b'"}}', 413),
        (b'{"proplet_id":"a\\u0000"}', 400),
        (b'{"proplet_id":"a","task_id":"\\u0000"}', 400),
        (b"[]", 400),
        (b"\xff", 400),
    ],
)
def test_what_is_deep_large_or_cannot_be_kept_is_refused_before_it_is_looked_at(open_site, payload, status):
    for topic in (rounds.CREATE, rounds.ALIVE, rounds.METRICS):
        assert open_site.refusal(PREFIX + topic, payload) == status


def test_results_may_be_larger_but_not_without_bound(site):
    body = base64.b64encode(bytes(600_000)).decode()
    for size, status in ((1, 0), (2, 413)):
        said = {"proplet_id": "a", "task_id": "t", "results": body * size}
        payload = site.sealed("a", rounds.RESULTS, said, size)
        if status:
            assert site.refusal(PREFIX + rounds.RESULTS, payload) == status
        else:
            assert site.say(PREFIX + rounds.RESULTS, payload) is None


def test_what_is_told_to_one_device_is_sealed_for_it(site):
    said = b'{"proplet_id":"a"}'
    for kind in (rounds.TASK_START, rounds.TASK_STOP):
        assert seal.opened(site.bridge._sealed(kind, "a", said), seal.key_of(site.keys["a"]), kind, "a")[0] == said
    assert site.bridge._sealed(rounds.TASK_START, "nobody", said) == said
    assert site.bridge._sealed(rounds.TASK_START, None, said) == said


def test_no_key_is_said_in_the_log(site, caplog):
    caplog.set_level(logging.DEBUG, logger=edge_bridge.__name__)
    site.say(UPDATES + "a", site.sealed("a", UPDATE, update("a", num_samples=0), 1))
    assert "refused" in caplog.text
    digest = site.ledger.device("a").key_sha256
    assert not any(secret in caplog.text for secret in (site.keys["a"], digest, seal.key_of_digest(digest).hex()))
