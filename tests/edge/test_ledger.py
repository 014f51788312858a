"""The ledger: who closes a round, what counts, and that no version is given twice; on SQLite and on PostgreSQL."""

import hashlib
import json
import multiprocessing
import shutil
import subprocess
import threading
from base64 import b64decode
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import create_engine, text
from sqlmodel import select

from blocks import edge_ledger
from blocks.artifacts import ArtifactStore, TamperedArtifact
from blocks.edge_ledger import (
    CLOSED,
    COMPLETED,
    FAILED,
    OPEN,
    WARNING,
    AlreadyWritten,
    EdgeLedger,
    UnknownModel,
    UnknownRound,
    is_alive,
    mosquitto_hash,
    task_id_of,
)
from blocks.registry import Registry
from blocks.tables import EdgeMessageRow, EdgeModelRow, EdgeRoundRow, EdgeTaskRow, EdgeUpdateRow

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
OWNER = "0x" + "ab" * 20


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> EdgeLedger:
    url = f"sqlite:///{tmp_path / 'r.sqlite'}" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    return EdgeLedger(Registry(url=SecretStr(url)), ArtifactStore(root=str(tmp_path / "store")), OWNER)


def again(ledger: EdgeLedger) -> EdgeLedger:
    """The same after a restart."""
    return EdgeLedger(Registry(url=ledger.registry.url), ledger.store, OWNER)


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def a_round(ledger: EdgeLedger, name: str = "r-1", k: int = 2, timeout_s: int = 60) -> EdgeRoundRow:
    return ledger.open_round(
        EdgeRoundRow(
            round_id=name,
            experiment_id="exp-1",
            number=1,
            base_version=0,
            k_of_n=k,
            timeout_s=timeout_s,
            opened_at=NOW,
            started_at=NOW,
            deadline_at=after(timeout_s),
        )
    )


def send(ledger: EdgeLedger, sender: str, at: float = 1, body: str = "{}", error: str = "", name: str = "r-1") -> Any:
    digest = hashlib.sha256(f"{body}{error}".encode()).hexdigest()
    fields = {"num_samples": 0 if error else 5, "metrics": "{}", "error": error, "transport": "http"}
    row = EdgeUpdateRow(round_id=name, proplet_id=sender, digest=digest, received_at=after(at), **fields)
    return ledger.receive(row, None if error else body.encode())


def model(**fields: Any) -> EdgeModelRow:
    return EdgeModelRow(**{"version": -1, "sha256": "", "form": "json", "created_at": NOW, **fields})


def finish(ledger: EdgeLedger, name: str = "r-1", data: bytes = b'{"w":[1]}') -> EdgeRoundRow:
    row = model(parent=0, experiment_id="exp-1", round_id=name)
    return ledger.complete(row, data, "fl/rounds/next", {"round_id": name, "status": "complete"})


def test_the_kth_update_closes_the_round(ledger):
    a_round(ledger)
    assert (send(ledger, "a").round.status, ledger.count("r-1")) == (OPEN, 1)
    closing = send(ledger, "b", at=2)
    assert (closing.kind, closing.count) == ("accepted", 2)
    assert (closing.round.status, closing.round.reason, closing.round.closed_by) == (CLOSED, "k", "b")
    assert closing.round.closed_at == after(2)


def test_the_last_update_of_a_sender_counts_once(ledger):
    a_round(ledger)
    assert send(ledger, "a", body='{"w":[1]}').kind == "accepted"
    assert send(ledger, "a", body='{"w":[2]}').count == 1
    assert send(ledger, "a", body='{"w":[2]}').kind == "repeated"
    (row,) = ledger.updates("r-1")
    assert ledger.body_of(row) == b'{"w":[2]}'


def test_a_late_update_is_kept_beside_the_round_and_changes_nothing(ledger):
    a_round(ledger)
    for sender in "ab":
        send(ledger, sender)
    assert send(ledger, "c").kind == "late"
    assert send(ledger, "a", body='{"w":[9]}').kind == "late"
    assert send(ledger, "a").kind == "repeated"
    assert [row.proplet_id for row in ledger.updates("r-1")] == ["a", "b"]
    assert sorted((row.proplet_id, row.reason) for row in ledger.dropped("r-1")) == [("a", "late"), ("c", "late")]
    assert send(ledger, "c").kind == "late"


def test_the_deadline_holds_to_the_moment(ledger):
    a_round(ledger)
    assert ledger.close_if_due("r-1", after(59.999)).status == OPEN
    assert send(ledger, "a", at=59.999).kind == "accepted"
    assert send(ledger, "b", at=60).kind == "late"
    closed = ledger.round("r-1")
    assert (closed.status, closed.reason, closed.closed_at) == (CLOSED, "timeout", after(60))
    assert ledger.close_if_due("r-1", after(90)).closed_at == after(60)


def test_an_error_is_remembered_and_counts_for_nothing(ledger):
    a_round(ledger, k=1)
    assert send(ledger, "a", error="out of fuel").round.status == OPEN
    assert [row.error for row in ledger.updates("r-1")] == ["out of fuel"]
    assert send(ledger, "a").round.status == CLOSED


def test_an_unknown_round_is_said(ledger):
    for ask in (lambda: send(ledger, "a"), lambda: ledger.round("r-1"), lambda: ledger.close_if_due("r-1", NOW)):
        with pytest.raises(UnknownRound, match="round 'r-1' is unknown"):
            ask()


def test_of_many_closers_exactly_one_wins(ledger):
    a_round(ledger, k=1)
    barrier, seen = threading.Barrier(8), []

    def close(name: str) -> None:
        barrier.wait()
        mine = send(ledger, name) if int(name) % 2 else None
        seen.append((name, ledger.close_if_due("r-1", after(60), closer=name).closed_by, mine and mine.kind))

    threads = [threading.Thread(target=close, args=(str(number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = ledger.round("r-1")
    assert {closed_by for _, closed_by, _ in seen} == {winner.closed_by}
    assert len(ledger.updates("r-1")) == (1 if winner.reason == "k" else 0)
    assert [name for name, _, kind in seen if kind == "accepted"] == (
        [winner.closed_by] if winner.reason == "k" else []
    )


def _write_versions(url: str, root: str, many: int, found: Any) -> None:
    ledger = EdgeLedger(Registry(url=SecretStr(url)), ArtifactStore(root=root), OWNER)
    found.put([ledger.put_model(model(), json.dumps({"w": [number]}).encode()) for number in range(many)])


def test_processes_are_never_given_one_version_twice(ledger):
    ledger.put_model(model(), b"{}")
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    url = ledger.registry.url.get_secret_value()
    processes = [context.Process(target=_write_versions, args=(url, ledger.store.root, 10, found)) for _ in range(2)]
    for process in processes:
        process.start()
    versions = [version for _ in processes for version in found.get(timeout=120)]
    for process in processes:
        process.join()
    assert sorted(versions) == list(range(1, 21))


def test_a_version_is_written_once(ledger):
    assert ledger.put_model(model(), b'{"w":[0]}', version=0) == 0
    assert ledger.put_model(model(), b'{"w":[0]}', version=0) == 0
    with pytest.raises(AlreadyWritten, match="version 0 is another model"):
        ledger.put_model(model(), b'{"w":[1]}', version=0)
    assert ledger.model_bytes(ledger.model(0)) == b'{"w":[0]}'
    assert ledger.put_model(model(), b'{"w":[7]}', version=7) == 7
    assert again(ledger).put_model(model(), b'{"w":[8]}') == 8
    with pytest.raises(UnknownModel, match="Model not found"):
        ledger.model(3)


def test_a_round_makes_one_version_however_often_it_is_completed(ledger):
    ledger.put_model(model(), b'{"w":[0]}', version=0)
    a_round(ledger, k=1)
    with pytest.raises(ValueError, match="round r-1 is open"):
        finish(ledger)
    send(ledger, "a")
    assert finish(ledger).version == 1
    assert finish(again(ledger), data=b'{"w":[2]}').version == 1
    assert ledger.end_round("r-1", FAILED, "too late", NOW).status == COMPLETED
    row = ledger.model(1)
    assert (row.parent, row.round_id, row.experiment_id) == (0, "r-1", "exp-1")
    assert ledger.model_bytes(row) == b'{"w":[1]}'
    assert ledger.head().round_id == "r-1"
    (notice,) = ledger.unsent()
    assert json.loads(notice.payload) == {
        "round_id": "r-1",
        "status": "complete",
        "new_model_version": 1,
        "model_uri": "fl/models/global_model_v1",
        "num_updates": 1,
        "k_of_n": 1,
        "partial": False,
        "head": 1,
        "detail": "",
    }
    ledger.mark_sent([notice.id], NOW)
    assert ledger.unsent() == []


def test_a_round_with_a_warning_is_completed_later_with_the_next_version(ledger):
    ledger.put_model(model(), b"{}", version=0)
    for name in ("r-1", "r-2"):
        a_round(ledger, name, k=1)
        send(ledger, "a", name=name)
    assert ledger.end_round("r-1", WARNING, "the aggregator did not answer", NOW).version is None
    assert finish(ledger, "r-2").version == 1
    assert [ledger.body_of(row) for row in ledger.updates("r-1")] == [b"{}"]
    ended = finish(ledger, "r-1")
    assert (ended.status, ended.version, ended.detail) == (COMPLETED, 2, "")


def test_large_bytes_are_in_the_store_and_a_changed_file_is_refused(ledger):
    large = json.dumps({"w": [0.5] * 300_000})
    a_round(ledger, k=1)
    send(ledger, "a", body=large)
    (row,) = ledger.updates("r-1")
    assert row.body is None
    assert ledger.body_of(row).decode() == large
    version = ledger.put_model(model(form="safetensors"), b"tensors")
    assert ledger.model_bytes(ledger.model(version)) == b"tensors"
    for path in Path(ledger.store.root).rglob("blobs/*/*"):
        path.write_bytes(b"other")
    with pytest.raises(TamperedArtifact):
        ledger.body_of(row)
    with pytest.raises(TamperedArtifact):
        ledger.model_bytes(ledger.model(version))


def test_a_changed_row_is_refused(ledger):
    ledger.put_model(model(), b'{"w":[0]}', version=0)
    with create_engine(ledger.registry.url.get_secret_value()).begin() as connection:
        connection.execute(text("""UPDATE edge_models SET body = '{"w":[9]}'"""))
    with pytest.raises(TamperedArtifact, match="version 0 has digest"):
        ledger.model_bytes(ledger.model(0))


def test_pins_hold_and_are_rolled_back(ledger):
    for number in range(3):
        ledger.put_model(model(), json.dumps(number).encode())
    with pytest.raises(UnknownModel, match="no pin 'best'"):
        ledger.pinned("best")
    for number in (1, 2, 2):
        ledger.pin("best", number, NOW)
    assert ledger.pinned("best").version == 2
    assert ledger.roll_back("best", NOW).version == 1
    with pytest.raises(UnknownModel, match="was set 1 times"):
        ledger.roll_back("best", NOW)
    assert again(ledger).pinned("best").version == 1
    assert ledger.registry.pinned("best") is None


def test_experiments_and_rounds_are_asked_for_once(ledger):
    ledger.record_experiment("exp-1", '{"k_of_n":2}', NOW)
    ledger.record_experiment("exp-1", '{"k_of_n":2}', after(5))
    with pytest.raises(AlreadyWritten, match="exp-1 was configured otherwise"):
        ledger.record_experiment("exp-1", '{"k_of_n":3}', NOW)
    a_round(ledger)
    send(ledger, "a")
    assert a_round(again(ledger)).opened_at == NOW
    assert len(ledger.updates("r-1")) == 1
    with pytest.raises(AlreadyWritten, match="round r-1 is of experiment exp-1"):
        ledger.open_round(a_round(ledger).model_copy(update={"experiment_id": "exp-2"}))


def test_a_key_belongs_to_one_device_and_is_not_kept(ledger):
    key = ledger.register("a", {"os": "linux"}, NOW)
    assert ledger.device_with_key(key).proplet_id == "a"
    assert ledger.device_with_key(key + "x") is None
    assert key not in ledger.device("a").model_dump_json()
    fresh = ledger.register("a", {}, NOW)
    assert ledger.device_with_key(key) is None
    assert ledger.device_with_key(fresh).proplet_id == "a"


def test_a_device_is_alive_within_the_margin_of_its_last_beat(ledger):
    ledger.register("a", {}, NOW)
    assert not is_alive(ledger.device("a"), NOW, 30)
    ledger.beat("a", "alive", NOW)
    assert is_alive(ledger.device("a"), after(30), 30)
    assert not is_alive(ledger.device("a"), after(30.1), 30)
    ledger.beat("a", "offline", after(31))
    assert not is_alive(ledger.device("a"), after(31), 30)
    ledger.beat("a", "alive", after(32))
    assert is_alive(ledger.device("a"), after(33), 30)


def test_tasks_are_started_once(ledger):
    def tasks(*names: str) -> list[EdgeTaskRow]:
        moments = {"created_at": NOW, "changed_at": NOW}
        return [
            EdgeTaskRow(task_id=task_id_of("r-1", one), round_id="r-1", proplet_id=one, name=one, start=one, **moments)
            for one in names
        ]

    assert ledger.start_tasks(tasks("a", "b"), "start", [("fl/rounds/start", "{}")]) == 2
    assert ledger.start_tasks(tasks("a", "b", "c"), "start", [("fl/rounds/start", "{}")]) == 1
    assert [(row.topic, row.payload) for row in ledger.unsent()] == [
        ("fl/rounds/start", "{}"),
        ("start", "a"),
        ("start", "b"),
        ("start", "c"),
    ]
    assert [row.proplet_id for row in ledger.tasks("r-1")] == ["a", "b", "c"]


@pytest.mark.skipif(shutil.which("mosquitto_passwd") is None, reason="it is missing: apt-get install -y mosquitto")
def test_mosquitto_knows_the_hash_as_its_own(tmp_path):
    theirs = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(theirs), "a", "key"], check=True, capture_output=True)
    assert theirs.read_text().split("$")[1:3] == mosquitto_hash("key").split("$")[1:3]
    _, _, rounds, salt, derived = theirs.read_text().strip().split("$")
    assert hashlib.pbkdf2_hmac("sha512", b"key", b64decode(salt), int(rounds)) == b64decode(derived)


def files(ledger: EdgeLedger) -> set[str]:
    """Digests of what is in the store."""
    return {"0x" + path.name for path in Path(ledger.store.root).rglob("blobs/*/*")}


def large(number: float) -> str:
    return json.dumps({"w": [number] * 300_000})


def test_bytes_of_what_is_replaced_or_late_are_not_kept_but_that_it_was_there_is(ledger):
    a_round(ledger)
    for number in (0.25, 0.5):
        assert send(ledger, "a", body=large(number)).kind == "accepted"
    send(ledger, "b", body=large(0.75))
    assert send(ledger, "c", body=large(0.125)).kind == "late"
    assert send(ledger, "a", body=large(0.5)).kind == "repeated"
    held = {row.sha256 for row in ledger.updates("r-1")}
    assert files(ledger) == held
    facts = {row.reason: (row.proplet_id, row.sha256, row.size_bytes) for row in ledger.dropped("r-1")}
    first, late = large(0.25).encode(), large(0.125).encode()
    assert facts == {
        "replaced": ("a", "0x" + hashlib.sha256(first).hexdigest(), len(first)),
        "late": ("c", "0x" + hashlib.sha256(late).hexdigest(), len(late)),
    }


def test_bytes_that_another_names_stay(ledger):
    a_round(ledger, k=3)
    for sender in "ab":
        send(ledger, sender, body=large(0.5))
    send(ledger, "a", body=large(0.25))
    assert files(ledger) == {row.sha256 for row in ledger.updates("r-1")}
    assert [ledger.body_of(row).decode() for row in ledger.updates("r-1")] == [large(0.25), large(0.5)]


def test_bytes_that_vanish_before_they_are_named_are_stored_again(ledger, monkeypatch):
    """Another's removal, between the writing of the bytes and the transaction that names them."""
    a_round(ledger, k=1)
    digest = "0x" + hashlib.sha256(large(0.5).encode()).hexdigest()
    real = EdgeLedger._change

    def removed_before(self: EdgeLedger, work: Any) -> Any:
        ledger.store.remove(OWNER, digest)
        return real(self, work)

    monkeypatch.setattr(EdgeLedger, "_change", removed_before)
    send(ledger, "a", body=large(0.5))
    monkeypatch.undo()
    (row,) = ledger.updates("r-1")
    assert ledger.body_of(row).decode() == large(0.5)


def test_what_is_remembered_of_a_flood_is_bounded(ledger):
    a_round(ledger, k=1)
    send(ledger, "a")
    for number in range(12):
        send(ledger, "b", at=2 + number, body=json.dumps({"w": number}))
    assert len(ledger.dropped("r-1")) == 8
    assert max(row.received_at for row in ledger.dropped("r-1")) == after(13)


def test_a_module_or_data_set_that_is_replaced_leaves_no_bytes(ledger):
    for data in (b"first", b"second", b"second"):
        ledger.put_blob("dataset", "a", data)
    ledger.put_blob("dataset", "b", b"second")
    ledger.put_blob("dataset", "a", b"third")
    assert {ledger.blob_bytes(row) for row in ledger.blobs("dataset")} == {b"second", b"third"}
    assert len(files(ledger)) == 2
    with pytest.raises(AlreadyWritten):
        [ledger.put_model(model(form="safetensors"), data, version=0) for data in (b"one", b"other")]
    assert len(files(ledger)) == 3


def test_the_deadline_counts_from_the_clock(ledger):
    a_round(ledger)
    waiting = a_round(ledger, "r-2").model_copy(update={"round_id": "r-3", "number": 3, "started_at": None})
    ledger.open_round(waiting)
    assert ledger.close_if_due("r-3", after(3600)).status == OPEN
    ledger.start_clock("r-3", after(100))
    assert ledger.start_clock("r-3", after(200)).deadline_at == after(160)
    assert ledger.close_if_due("r-3", after(160)).reason == "timeout"


def test_a_round_that_is_combined_after_its_followers_is_not_the_head(ledger):
    ledger.put_model(model(), b"{}", version=0)
    for number, name in enumerate(("r-1", "r-1.2"), start=1):
        row = a_round(ledger, "unused").model_copy(
            update={"round_id": name, "number": number, "opened_at": after(number)}
        )
        ledger.open_round(row)
        for sender in "ab":
            send(ledger, sender, name=name)
    assert finish(ledger, "r-1.2").version == 1
    late = finish(ledger, "r-1")
    assert (late.version, ledger.model(2).round_id, ledger.model(2).parent) == (2, "r-1", 0)
    assert (ledger.head().round_id, ledger.head("exp-1").version) == ("r-1.2", 1)
    assert late.detail == "round r-1.2 trained without it, and training goes on from version 1"
    notice = json.loads(ledger.unsent()[-1].payload)
    assert (notice["new_model_version"], notice["head"], notice["detail"]) == (2, 1, late.detail)


def test_a_partial_round_says_so(ledger):
    a_round(ledger, k=3)
    send(ledger, "a")
    ledger.close_if_due("r-1", after(60))
    assert finish(ledger).detail == "1 of 3 updates came"
    notice = json.loads(ledger.unsent()[0].payload)
    assert (notice["num_updates"], notice["k_of_n"], notice["partial"]) == (1, 3, True)


@pytest.mark.parametrize(
    ("first_round", "rounds"),
    [("r", 1), ("r.3", 1), ("r.1", 1), ("r.4", 1), ("r.03", 1), ("rr", 9), ("q", 9), ("q.2", 3)],
)
def test_names_of_rounds_that_are_to_come_are_taken(ledger, first_round, rounds):
    ledger.record_experiment("exp-1", "{}", NOW, first_round="r", rounds=3)
    ledger.record_experiment("exp-2", "{}", NOW, first_round="q.2.2", rounds=1)
    own = {first_round} | {f"{first_round}.{number}" for number in range(2, rounds + 1)}
    if own & {"r", "r.2", "r.3", "q.2.2"}:
        with pytest.raises(AlreadyWritten, match=f"round {first_round}, or one that follows it, is of experiment exp-"):
            ledger.record_experiment("exp-3", "{}", NOW, first_round=first_round, rounds=rounds)
        assert ledger.experiment("exp-3") is None
    else:
        ledger.record_experiment("exp-3", "{}", NOW, first_round=first_round, rounds=rounds)


def test_experiments_are_under_way_until_they_are_ended(ledger):
    ledger.record_experiment("exp-1", "{}", NOW)
    assert ledger.unended() == []
    a_round(ledger)
    assert ledger.unended() == ["exp-1"]
    for moment in (NOW, after(5)):
        ledger.end_experiment("exp-1", moment)
    assert (ledger.unended(), ledger.experiment("exp-1").ended_at) == ([], NOW)


def test_two_who_write_the_same_row_at_once_both_succeed(tmp_path, postgres_url):
    """The other one's transaction holds a device that is not visible yet; it is committed when this one waits for it."""
    ledger = EdgeLedger(Registry(url=SecretStr(postgres_url)), ArtifactStore(root=str(tmp_path)), OWNER)
    ledger.devices()
    engine = create_engine(postgres_url)
    row = "INSERT INTO edge_devices (proplet_id, namespace, details, health, registered_at) VALUES ('a', 'x', '{}', '', now())"
    waiting = text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    with engine.connect() as other, engine.connect() as watcher:
        other.execute(text(row))
        beating = threading.Thread(target=ledger.beat, args=("a", "alive", NOW))
        beating.start()
        while not watcher.execute(waiting).scalar():
            watcher.rollback()
        other.commit()
        beating.join()
    assert (ledger.device("a").health, ledger.device("a").namespace) == ("alive", "x")


def test_messages_are_forgotten_by_age_and_by_number_and_those_that_wait_much_later(ledger, monkeypatch):
    def left(*days: float) -> list[str]:
        for place, ago in enumerate(days):
            ledger.leave("t", str(place), NOW - timedelta(days=ago))
        return [row.payload for row in ledger.unsent()]

    assert left(40, 30, 2, 0.5, 0) == ["0", "1", "2", "3", "4"]
    by_payload = {row.payload: row.id for row in ledger.unsent()}
    ledger.mark_sent([by_payload["2"], by_payload["3"]], NOW)
    ledger.prune_messages(NOW)
    assert kept(ledger) == ["1", "3", "4"]
    monkeypatch.setattr(edge_ledger, "KEPT_SENT", 1)
    ledger.prune_messages(NOW)
    assert kept(ledger) == ["1", "4"]
    monkeypatch.setattr(edge_ledger, "KEPT_WAITING", 1)
    ledger.prune_messages(NOW)
    assert kept(ledger) == ["4"]


def kept(ledger: EdgeLedger) -> list[str]:
    rows = ledger.registry.read(lambda session: list(session.exec(select(EdgeMessageRow)).all()))
    return sorted(row.payload for row in rows)


def test_counters_stay_with_the_device_until_it_gets_another_key(ledger):
    ledger.register("a", {}, NOW)
    ledger.beat("a", "alive", NOW, counter=2**62)
    ledger.note_counter("a", "updates_counter", 7)
    ledger.beat("a", "alive", NOW)
    row = again(ledger).device("a")
    assert (row.words_counter, row.updates_counter) == (2**62, 7)
    ledger.register("a", {}, NOW)
    assert (ledger.device("a").words_counter, ledger.device("a").updates_counter) == (0, 0)
