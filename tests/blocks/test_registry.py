"""The index: recording twice changes nothing, and a kill leaves it whole."""

import sqlite3
import subprocess
import sys
import threading

import pytest

from blocks.registry import Registry
from contracts.messages import Receipt

ALICE, BOB = "0x" + "aa" * 20, "0x" + "bb" * 20
MOST_WEI = 2**96 - 1


@pytest.fixture
def path(tmp_path):
    return tmp_path / "registry.sqlite"


@pytest.fixture
def registry(path):
    return Registry(url=f"sqlite:///{path}")


def rows(path, table):
    with sqlite3.connect(path) as database:
        return database.execute(f"SELECT * FROM {table}").fetchall()


def receipt(amount_wei: int = 5, round_number: int = 1) -> Receipt:
    return Receipt(
        task_id="a-task",
        round_number=round_number,
        actor="0x" + "11" * 20,
        step="withdraw",
        transaction="0x" + "22" * 32,
        amount_wei=str(amount_wei),
    )


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


def test_a_task_begins_open_and_its_status_moves_on(registry):
    assert registry.find_task("a-task") is None
    registry.record_task("a-task", ALICE, "0x01", "terms")
    assert registry.find_task("a-task").status == "OPEN"
    for status in ("TRAINING", "PUBLISHED", "PAID"):
        registry.mark_task("a-task", status)
        assert registry.find_task("a-task").status == status
    registry.mark_task("a-task", "FAILED", "deadline passed")
    assert (registry.find_task("a-task").status, registry.find_task("a-task").reason) == ("FAILED", "deadline passed")


def test_recording_a_task_again_does_not_reopen_it(registry, path):
    registry.record_task("a-task", ALICE, "0x01", "terms")
    registry.mark_task("a-task", "PAID")
    before = rows(path, "tasks")
    registry.record_task("a-task", ALICE, "0x01", "terms")
    registry.record_task("a-task", BOB, "0x02", "other terms")
    assert rows(path, "tasks") == before


def test_a_task_that_never_was_is_not_marked(registry):
    registry.mark_task("a-task", "PAID")
    assert registry.find_task("a-task") is None


# Records


def test_recording_twice_changes_nothing(registry, path):
    for _ in range(2):
        registry.record_actor("miner-1", ALICE, "miner")
        registry.record(receipt(), signer=ALICE, path="a.json", sha256="0x01")
    assert len(rows(path, "records")) == len(rows(path, "actors")) == 1


def test_records_of_one_kind_come_in_order(registry):
    for number, signer in ((2, ALICE), (1, BOB), (1, ALICE)):
        registry.record(receipt(round_number=number), signer=signer, path=f"{number}.json", sha256="0x01")
    found = registry.records("a-task", "Receipt")
    assert [(row.round_number, row.signer) for row in found] == [(1, ALICE), (1, BOB), (2, ALICE)]
    assert registry.records("b-task", "Receipt") == []
    assert registry.records("a-task", "Abort") == []


def test_amounts_in_wei_are_text_and_exact(registry, path):
    registry.record(receipt(MOST_WEI), signer=ALICE, path="a.json", sha256="0x01")
    (row,) = registry.records("a-task", "Receipt")
    assert Receipt.model_validate_json(row.message) == receipt(MOST_WEI)
    with sqlite3.connect(path) as database:
        kinds = database.execute("SELECT typeof(message), typeof(sha256) FROM records").fetchall()
    assert kinds == [("text", "text")]
    assert f'"{MOST_WEI}"' in row.message


# Refusals and steps


def test_the_first_refusal_stays(registry):
    registry.record_refusal("a-task", 1, "contribute", ALICE, "too late")
    registry.record_refusal("a-task", 1, "contribute", ALICE, "something else")
    registry.record_refusal("a-task", 1, "attest", ALICE, "another step")
    registry.record_refusal("a-task", 2, "contribute", ALICE, "another round")
    found = {(row.round_number, row.step): row.reason for row in registry.refusals("a-task")}
    assert found == {(1, "contribute"): "too late", (1, "attest"): "another step", (2, "contribute"): "another round"}
    assert registry.refusals("b-task") == []


def test_every_run_of_a_step_is_kept_in_the_order_of_time(registry):
    for started_s in (3.0, 1.0, 2.0):
        registry.record_step(
            task_id="a-task", round_number=0, step="publish", actor="p", started_s=started_s, seconds=0.1, outcome="ok"
        )
    assert [row.started_s for row in registry.steps("a-task")] == [1.0, 2.0, 3.0]


def test_text_that_looks_like_sql_is_text(registry):
    registry.record_refusal("a-task", 0, "register", ALICE, "'); DROP TABLE refusals; --")
    assert registry.refusals("a-task")[0].reason == "'); DROP TABLE refusals; --"


# Many at once, killed


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
registry = Registry(url="sqlite:///" + sys.argv[1])
registry.record_task("a-task", "0x", "0x01", "terms")
for attempt in range(8):
    noted, note = os.pipe()
    pid = os.fork()
    if pid == 0:
        for number in range(10**9):
            registry.record_refusal("a-task", attempt * 10_000 + number, "s", "0x", "late")
            registry.mark_task("a-task", f"S{number}", f"S{number}")
            os.write(note, b".")
    first = os.read(noted, 1)  # a busy machine takes its time for it
    time.sleep(0.05 + 0.013 * attempt)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(note)
    print(attempt, len(first + os.read(noted, 1 << 20)), flush=True)
    os.close(noted)
"""


def test_a_kill_loses_nothing_that_was_recorded(registry, path):
    done = subprocess.run([sys.executable, "-c", KILLED, path], capture_output=True, text=True, check=True)
    found = [row.round_number for row in registry.refusals("a-task")]
    for line in done.stdout.splitlines():
        attempt, confirmed = map(int, line.split())
        kept = [number for number in found if number // 10_000 == attempt]
        assert kept == list(range(attempt * 10_000, attempt * 10_000 + len(kept)))
        assert confirmed <= len(kept) <= confirmed + 1
        assert confirmed > 0
    task = registry.find_task("a-task")
    assert task.status == task.reason  # written together or not at all
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("PRAGMA journal_mode").fetchall() == [("wal",)]
