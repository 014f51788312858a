"""The index: recording twice changes nothing, what the chain says holds, and a kill or a restart loses nothing."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime

import pytest
from eth_utils.address import to_checksum_address

from blocks import registry as registry_module
from blocks.registry import Registry, RegistryUnavailable, UnknownVersion
from blocks.tables import INDEX, ModelVersionRow, RefusalRow, RoundRow, SubmissionRow, VoteRow
from contracts import bindings
from contracts.bindings import Logged
from contracts.messages import (
    ZERO32,
    ZERO_ADDRESS,
    Abort,
    Announcement,
    Attestation,
    Collection,
    KeyRequest,
    Receipt,
    Refusal,
    RoundResult,
    Submission,
)

ALICE, BOB = to_checksum_address("0x" + "aa" * 20), to_checksum_address("0x" + "bb" * 20)
PUBLISHER, AGGREGATOR = "0x" + "11" * 20, "0x" + "22" * 20
KEY = bindings.task_key("a-task")
MOST_WEI = 2**96 - 1


@pytest.fixture(params=["sqlite", "postgresql"])
def registry(request, tmp_path):
    if request.param == "sqlite":
        return Registry(url=f"sqlite:///{tmp_path / 'registry.sqlite'}")
    return Registry(url=request.getfixturevalue("postgres_url"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.sqlite"


def receipt(amount_wei: int = 5, round_number: int = 1) -> Receipt:
    return Receipt(
        task_id="a-task",
        round_number=round_number,
        actor="0x" + "11" * 20,
        step="withdraw",
        transaction="0x" + "22" * 32,
        amount_wei=str(amount_wei),
    )


def happened(registry, event, *, block, task_id="a-task", index=0):
    registry.record_event(Logged(event, f"0x{block:064x}", block, index, 1_700_000_000 + block), task_id)


def said(registry, message, signer):
    registry.record(message, signer=signer, path=f"{type(message).__name__}.json", sha256="0x01")


def published(registry, task_id="a-task", block=3):
    event = bindings.TaskPublished(
        bindings.task_key(task_id), PUBLISHER, task_id, ZERO_ADDRESS, MOST_WEI, "0x0a", "0x0b", 1_800_000_000
    )
    happened(registry, event, block=block, task_id=task_id)


def drawn(registry):
    happened(registry, bindings.AggregatorDrawn(KEY, AGGREGATOR, 4, "0x0c", "0x0d", 1_800_000_000), block=5)


def result(model="0x" + "aa" * 32, number=1, correct=8):
    return RoundResult(
        task_id="a-task",
        round_number=number,
        aggregator=AGGREGATOR,
        request=ZERO32,
        opening_sha256="0x" + "bb" * 32,
        model_sha256=model,
        correct=correct,
        total=10,
        loss_micro=2**32 - 1,
        candidate=ZERO32,
    )


def abort(signer, reason="not enough miners", number=0):
    return Abort(task_id="a-task", round_number=number, actor=signer, step="s", reason=reason, detail="1 of 4")


# Actors


def test_an_actor_is_found_by_name_and_by_address(registry):
    registry.record_actor("miner-1", ALICE, "miner")
    assert registry.find_actor("miner-1") == registry.find_actor(ALICE)
    with pytest.raises(LookupError, match="no actor 'miner-2' is known here"):
        registry.find_actor("miner-2")


def test_actors_are_listed_by_role_in_counting_order(registry):
    for number in (10, 2, 1):
        registry.record_actor(f"miner-{number}", f"{ALICE}{number}", "miner")
    registry.record_actor("publisher", BOB, "publisher")
    registry.record_actor("publisher", BOB, "publisher")
    assert [row.name for row in registry.actors("miner")] == ["miner-1", "miner-2", "miner-10"]
    assert [row.name for row in registry.actors("publisher")] == ["publisher"]
    assert len(registry.actors()) == 4


# Tasks


def test_a_task_is_what_the_chain_says(registry):
    assert registry.find_task("a-task") is None
    published(registry)
    task = registry.find_task("a-task")
    assert (task.publisher, task.spec_hash, task.reward_wei) == (PUBLISHER, "0x0b", str(MOST_WEI))
    assert task.published_at == datetime.fromtimestamp(1_700_000_003, UTC)
    assert (task.status, task.terms, task.aggregator) == ("LOCKED", "", None)
    drawn(registry)
    assert registry.find_task("a-task").aggregator == AGGREGATOR


def test_the_status_follows_from_events_and_signed_records(registry):
    seen = []

    def look():
        seen.append(registry.find_task("a-task").status)

    published(registry)
    look()
    key = "0x02" + "cd" * 32
    announced = Announcement(
        task_id="a-task", round_number=0, publisher=PUBLISHER, encryption_key=key, spec_hash=ZERO32, transaction=ZERO32
    )
    said(registry, announced, PUBLISHER)
    look()
    happened(registry, bindings.RegistrationClosed(KEY, (), (), 4), block=4)
    look()
    happened(registry, bindings.BlockPublished(KEY, AGGREGATOR, "0x", "0x0e", "u", 1, 2, 1, "0x"), block=6)
    look()
    happened(registry, bindings.RewardReleased(KEY, ZERO_ADDRESS, 5), block=7)
    look()
    assert seen == ["LOCKED", "OPEN", "TRAINING", "PUBLISHED", "PAID"]


def test_a_reward_released_for_a_model_below_the_accuracy_is_a_refund(registry):
    published(registry)
    happened(registry, bindings.AccuracyRevealed(KEY, PUBLISHER, 990_000, bindings.Outcome.UNMET, 0), block=6)
    happened(registry, bindings.RewardReleased(KEY, ZERO_ADDRESS, 5), block=7)
    task = registry.find_task("a-task")
    assert (task.status, task.outcome, task.required_accuracy_ppm) == ("REFUNDED", "UNMET", 990_000)


def test_only_publisher_and_aggregator_can_give_a_task_up(registry):
    published(registry)
    drawn(registry)
    said(registry, abort(ALICE, "I do not like it"), ALICE)
    assert (registry.find_task("a-task").status, registry.find_task("a-task").reason) == ("LOCKED", "")
    said(registry, abort(AGGREGATOR, "recovery failed", number=2), AGGREGATOR)
    task = registry.find_task("a-task")
    assert (task.status, task.reason) == ("REFUNDABLE", "recovery failed: 1 of 4")
    happened(registry, bindings.PublisherRefunded(KEY, PUBLISHER, PUBLISHER, ZERO_ADDRESS, 5), block=9)
    task = registry.find_task("a-task")
    assert (task.status, task.reason) == ("REFUNDED", "recovery failed: 1 of 4")


def test_an_event_of_an_unknown_task_is_no_row(registry):
    drawn(registry)
    assert [len(registry.rows(table)) for table in INDEX] == [0] * len(INDEX)
    assert registry.last_event() == (0, -1)


def test_the_same_event_twice_changes_nothing(registry):
    for _ in range(2):
        published(registry)
        drawn(registry)
        happened(registry, bindings.RewardCredited(KEY, ALICE, ZERO_ADDRESS, MOST_WEI), block=8, index=2)
    assert registry.last_event() == (8, 2)
    assert len(registry.rows(INDEX[1])) == 3
    (reward,) = registry.rows(INDEX[9])
    assert (reward["account"], reward["amount_wei"], reward["task_id"]) == (ALICE, str(MOST_WEI), "a-task")


# Records


def test_recording_twice_changes_nothing(registry):
    for _ in range(2):
        registry.record_actor("miner-1", ALICE, "miner")
        registry.record(receipt(), signer=ALICE, path="a.json", sha256="0x01")
    assert len(registry.records("a-task")) == len(registry.actors()) == 1


def test_records_of_one_kind_come_in_order(registry):
    for number, signer in ((2, ALICE), (1, BOB), (1, ALICE)):
        registry.record(receipt(round_number=number), signer=signer, path=f"{number}.json", sha256="0x01")
    found = registry.records("a-task", "Receipt")
    assert [(row.round_number, row.signer) for row in found] == [(1, ALICE), (1, BOB), (2, ALICE)]
    assert registry.records("b-task", "Receipt") == []
    assert registry.records("a-task", "Abort") == []


def test_amounts_in_wei_are_text_and_exact(registry):
    registry.record(receipt(MOST_WEI), signer=ALICE, path="a.json", sha256="0x01")
    (row,) = registry.records("a-task", "Receipt")
    assert Receipt.model_validate_json(row.message) == receipt(MOST_WEI)


def submission(miner=ALICE):
    return Submission(
        task_id="a-task",
        round_number=1,
        miner=miner,
        base_model_sha256=ZERO32,
        ciphertext_root=ZERO32,
        chunks_sha256=ZERO32,
        coordinates=2**32 - 1,
        score_commit=ZERO32,
        salt="0x" + "01" * 16,
        sample_count=2**32 - 1,
    )


def listing(kind, signer=AGGREGATOR):
    more = {"collection": ZERO32} if kind is KeyRequest else {}
    listed = {"miners": (ALICE,), "submissions": (ZERO32,), "refused": (BOB,), "reasons": ("too large\0",)}
    return kind(task_id="a-task", round_number=1, aggregator=signer, **listed, **more)


RECORDS = [
    (submission(), ALICE),
    (submission(BOB), BOB),
    (listing(Collection), AGGREGATOR),
    (listing(KeyRequest), AGGREGATOR),
    (result(), AGGREGATOR),
    (Attestation(task_id="a-task", round_number=1, candidate=ZERO32, accepted=False, reason="worse"), ALICE),
]


@pytest.mark.parametrize("order", [RECORDS, RECORDS[::-1]], ids=["in order", "backwards"])
def test_a_round_is_the_same_whatever_comes_first(registry, order):
    published(registry)
    drawn(registry)
    for message, signer in order:
        said(registry, message, signer)
    (round_,) = registry.rows(RoundRow)
    counted = (round_["collected"], round_["accepted"], round_["correct"], round_["total"], round_["loss_micro"])
    assert counted == (1, 1, 8, 10, 2**32 - 1)
    assert {row["miner"]: row["is_accepted"] for row in registry.rows(SubmissionRow)} == {ALICE: True, BOB: None}
    assert {row["coordinates"] for row in registry.rows(SubmissionRow)} == {2**32 - 1}
    assert [(row["miner"], row["accepted"], row["reason"]) for row in registry.rows(VoteRow)] == [
        (ALICE, False, "worse")
    ]
    refused = {row["step"]: (row["actor"], row["reason"]) for row in registry.rows(RefusalRow)}
    assert refused == dict.fromkeys(("Collection", "KeyRequest"), (BOB, "too large\N{REPLACEMENT CHARACTER}"))


def test_a_stranger_says_nothing_about_a_round(registry):
    published(registry)
    drawn(registry)
    said(registry, listing(Collection, ALICE), ALICE)
    said(registry, listing(KeyRequest, ALICE), ALICE)
    said(registry, result(), ALICE)
    no = Refusal(task_id="a-task", round_number=1, publisher=ALICE, step="attest", actor=BOB, reason="no")
    said(registry, no, ALICE)
    assert [registry.rows(table) for table in (RoundRow, SubmissionRow, ModelVersionRow, RefusalRow)] == [
        [],
        [],
        [],
        [],
    ]
    assert len(registry.records("a-task")) == 4
    said(registry, no.model_copy(update={"publisher": PUBLISHER}), PUBLISHER)
    assert [row.reason for row in registry.refusals("a-task")] == ["no"]


# Refusals and steps


def test_the_first_refusal_stays(registry):
    registry.record_refusal("a-task", 1, "contribute", ALICE, "too late")
    registry.record_refusal("a-task", 1, "contribute", ALICE, "something else")
    registry.record_refusal("a-task", 1, "attest", ALICE, "another step")
    registry.record_refusal("a-task", 2, "contribute", ALICE, "another round")
    found = {(row.round_number, row.step): row.reason for row in registry.refusals("a-task")}
    assert found == {(1, "contribute"): "too late", (1, "attest"): "another step", (2, "contribute"): "another round"}
    assert registry.refusals("b-task") == []


def test_every_run_of_a_step_is_kept_once_in_the_order_of_time(registry):
    for started_s in (3.0, 1.0, 2.0, 1.0):
        registry.record_step(
            task_id="a-task", round_number=0, step="publish", actor="p", started_s=started_s, seconds=0.1, outcome="ok"
        )
    assert [row.started_s for row in registry.steps("a-task")] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("text", ["'); DROP TABLE refusals; --", "%s %(a)s :b ?"])
def test_text_that_looks_like_sql_is_text(registry, text):
    registry.record_refusal("a-task", 0, "register", ALICE, text)
    assert registry.refusals("a-task")[0].reason == text


@pytest.mark.parametrize("text", ["a zero \0 byte", "half a \ud800 character"])
def test_text_that_a_database_does_not_take_does_not_stop_it(registry, text):
    registry.record_refusal("a-task", 0, "register", ALICE, text)
    assert registry.refusals("a-task")[0].reason.startswith(text[:6])


# Model versions


def test_a_version_knows_its_parent_and_the_chain_has_the_last_word(registry):
    published(registry)
    drawn(registry)
    first, second = "0x" + "a1" * 32, "0x" + "a2" * 32
    happened(
        registry,
        bindings.BlockPublished(KEY, AGGREGATOR, "0x", second, f"artifact:{AGGREGATOR}/{second}", 9, 10, 2, "0x"),
        block=7,
    )
    said(registry, result(first), AGGREGATOR)
    said(registry, result("0x" + "ff" * 32, number=2, correct=1), AGGREGATOR)
    one, two = registry.versions("a-task")
    assert (one.version, one.parent, one.is_published, one.published_at) == ("a-task/1", None, False, None)
    assert (two.version, two.parent, two.is_published) == ("a-task/2", "a-task/1", True)
    assert (two.sha256, two.correct, two.loss_micro) == (second, 9, 2**32 - 1)
    assert two.transaction == f"0x{7:064x}"
    assert registry.start_from("a-task/2").uri == f"artifact:{AGGREGATOR}/{second}"


def test_a_task_that_starts_from_a_version_is_its_child(registry):
    published(registry)
    drawn(registry)
    said(registry, result("0x" + "a1" * 32), AGGREGATOR)
    published(registry, "b-task", block=20)
    registry.record_terms("b-task", "{}", "0x" + "a1" * 32)
    draw = bindings.AggregatorDrawn(bindings.task_key("b-task"), AGGREGATOR, 4, "0x", "0x", 0)
    happened(registry, draw, block=21, task_id="b-task")
    said(registry, result("0x" + "b1" * 32).model_copy(update={"task_id": "b-task"}), AGGREGATOR)
    assert [(row.version, row.parent) for row in registry.versions()] == [("a-task/1", None), ("b-task/1", "a-task/1")]


def test_a_pin_moves_on_and_is_rolled_back(registry):
    published(registry)
    drawn(registry)
    for number in (1, 2, 3):
        said(registry, result(f"0x{number:064x}", number=number), AGGREGATOR)
    for number in (1, 2, 2, 3):
        assert registry.pin("best", f"a-task/{number}").version == f"a-task/{number}"
    assert len(registry.pins()) == 3
    assert registry.find_version("best").version == "a-task/3"
    assert registry.roll_back("best").version == "a-task/2"
    assert registry.roll_back("best").version == "a-task/1"
    with pytest.raises(UnknownVersion, match="'best' was set 1 times: there is no version before"):
        registry.roll_back("best")
    assert registry.find_version("best").version == "a-task/1"
    assert registry.pin("best", "a-task/3").version == registry.find_version("best").version == "a-task/3"
    assert registry.roll_back("best").version == "a-task/1"


def test_what_is_no_version_is_not_pinned(registry):
    with pytest.raises(UnknownVersion, match="'a-task/1' is no model version and no pin"):
        registry.pin("best", "a-task/1")
    with pytest.raises(ValueError, match="a name without '/'"):
        registry.pin("a/1", "a-task/1")
    assert registry.pins() == []


# The whole index replaced


def test_an_index_is_replaced_at_once_and_what_is_its_hosts_own_stays(registry, path):
    published(registry)
    registry.record_refusal("a-task", 1, "contribute", ALICE, "the old one")
    registry.record_actor("miner-1", ALICE, "miner")
    rebuilt = Registry(url=f"sqlite:///{path}")
    for number in range(3):
        rebuilt.record_refusal("b-task", number, "contribute", ALICE, "the new one")
    published(rebuilt, "b-task")
    registry.replace_index(rebuilt)
    assert [row.task_id for row in registry.tasks()] == ["b-task"]
    assert [registry.rows(table) == rebuilt.rows(table) for table in INDEX] == [True] * len(INDEX)
    assert len(registry.refusals("b-task")) == 3
    assert registry.find_actor("miner-1").address == ALICE


def test_a_rebuilt_index_that_does_not_fit_leaves_the_old_one(registry, path):
    published(registry)
    before = [registry.rows(table) for table in INDEX]
    rebuilt = Registry(url=f"sqlite:///{path}")
    published(rebuilt, "b-task")
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE votes")
    with pytest.raises((RegistryUnavailable, sqlite3.Error), match="votes"):
        registry.replace_index(rebuilt)
    assert [registry.rows(table) for table in INDEX] == before


# Many at once, killed, restarted


def test_many_threads_write_without_losing_any(registry):
    def write(number: int) -> None:
        registry.record_refusal("a-task", number, "contribute", ALICE, "late")
        registry.record(receipt(round_number=number), signer=ALICE, path="a.json", sha256="0x01")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(registry.refusals("a-task")) == len(registry.records("a-task", "Receipt")) == 16


KILLED = """
import os, signal, sys, time
from blocks.registry import Registry
from contracts.bindings import AccuracyRevealed, Logged, Outcome, TaskPublished
registry = Registry(url="sqlite:///" + sys.argv[1])
registry.record_event(Logged(TaskPublished("0x", "0x", "a-task", "0x", 1, "0x", "0x", 1), "0x", 1, 0, 0), "a-task")
for attempt in range(8):
    noted, note = os.pipe()
    pid = os.fork()
    if pid == 0:
        for number in range(10**9):
            registry.record_refusal("a-task", attempt * 10_000 + number, "s", "0x", "late")
            event = AccuracyRevealed("0x", "0x", number, Outcome.MET, number)
            registry.record_event(Logged(event, "0x", 2, number, 0), "a-task")
            os.write(note, b".")
    first = os.read(noted, 1)  # a busy machine takes its time for it
    time.sleep(0.05 + 0.013 * attempt)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(note)
    print(attempt, len(first + os.read(noted, 1 << 20)), flush=True)
    os.close(noted)
"""


def test_a_kill_loses_nothing_that_was_recorded(path):
    done = subprocess.run([sys.executable, "-c", KILLED, path], capture_output=True, text=True, check=True)
    registry = Registry(url=f"sqlite:///{path}")
    found = [row.round_number for row in registry.refusals("a-task")]
    for line in done.stdout.splitlines():
        attempt, confirmed = map(int, line.split())
        kept = [number for number in found if number // 10_000 == attempt]
        assert kept == list(range(attempt * 10_000, attempt * 10_000 + len(kept)))
        assert confirmed <= len(kept) <= confirmed + 1
        assert confirmed > 0
    events = [row for row in registry.rows(INDEX[1]) if row["kind"] == "AccuracyRevealed"]
    assert f'"accuracy_ppm": {registry.find_task("a-task").required_accuracy_ppm},' in "".join(
        row["fields"] for row in events
    )  # written together or not at all
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("PRAGMA journal_mode").fetchall() == [("wal",)]


def test_a_server_that_is_killed_and_comes_back_is_waited_for(postgres_server, postgres_url):
    """Writing goes on through kill -9 of the server; every write that returned is there, each once."""
    registry = Registry(url=postgres_url)
    registry.record_refusal("a-task", 0, "s", ALICE, "before")
    written, ended = [], threading.Event()

    def write() -> None:
        for number in range(1, 10_000):
            registry.record_refusal("a-task", number, "s", ALICE, "late")
            registry.record_step(
                task_id="a-task", round_number=number, step="s", actor="a", started_s=1.0, seconds=1.0, outcome="ok"
            )
            written.append(number)
            if ended.is_set():
                return

    writer = threading.Thread(target=write)
    writer.start()
    while len(written) < 5:
        time.sleep(0.01)
    postgres_server.kill()
    at_the_kill = len(written)
    time.sleep(0.5)
    postgres_server.start()
    while len(written) < at_the_kill + 5:
        assert writer.is_alive()
        time.sleep(0.01)
    ended.set()
    writer.join()
    assert [row.round_number for row in registry.refusals("a-task")] == [0, *written]
    assert [row.round_number for row in registry.steps("a-task")] == written


def test_a_server_that_stays_away_is_named_without_its_password():
    registry = Registry(url="postgresql+psycopg://me:hidden-word@127.0.0.1:1/index", patience_s=0.5)
    with pytest.raises(
        RegistryUnavailable, match=r"postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/index: .*refused"
    ) as caught:
        registry.actors()
    assert "hidden-word" not in str(caught.value)


def test_a_wrong_database_is_not_waited_for(postgres_url):
    registry = Registry(url=f"{postgres_url.replace('/test_', '/no_such_')}")
    started_s = time.monotonic()
    with pytest.raises(RegistryUnavailable, match="does not exist"):
        registry.actors()
    assert time.monotonic() - started_s < registry_module.PATIENCE_S / 2


def test_a_forked_process_has_connections_of_its_own(postgres_url):
    registry = Registry(url=postgres_url)
    registry.record_refusal("a-task", 1, "s", ALICE, "before")
    child = os.fork()
    if child == 0:
        try:
            for number in range(2, 30):
                registry.record_refusal("a-task", number, "s", BOB, "of the child")
            os._exit(0)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    for number in range(2, 30):
        registry.record_refusal("a-task", number, "s", ALICE, "of the parent")
    assert os.waitpid(child, 0)[1] == 0
    found = registry.refusals("a-task")
    assert len(found) == 57
    assert {(row.actor, row.reason) for row in found if row.round_number > 1} == {
        (ALICE, "of the parent"),
        (BOB, "of the child"),
    }
