"""The flows themselves, through Prefect, with a witness: who opened which file, and what was left where."""

import base64
import json
import os
import re
import sqlite3
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from blocks.registry import Registry
from blocks.tables import INDEX
from contracts.messages import AbortReason
from infra import cli, facts
from infra.devstack import Stack, set_up
from infra.report import render_html
from tasks import dispatch, index
from tasks.contribute import read_prepared
from tasks.dispatch import StepEvent
from tasks.publish import decide, secrets_of
from tasks.records import station
from tests.protocol.world import MINERS, task_file

TASK_ID = "run-1"  # of this file alone: the tests of a process share one Prefect server

_opened: dict[str, set[str]] = defaultdict(set)
_watching: list[Path] = []


def _witness(event: str, arguments: tuple[Any, ...]) -> None:
    """Remember which files below the watched folder each actor's step opens."""
    if event == "open" and _watching and isinstance(arguments[0], str | bytes):
        path = os.fsdecode(arguments[0])
        current = dispatch._current.get()
        if current is not None and path.startswith(str(_watching[0])):
            _opened[current[1]].add(path)


sys.addaudithook(_witness)


class Run:
    """One task, run by its flows."""

    def __init__(self, folder: Path, prefect_home: Path, **changes: Any) -> None:
        self.folder, self.file, self.prefect_home = folder, task_file(**changes), prefect_home
        self.events: list[StepEvent] = []
        # The data is divided by the unchanged terms: what the miners hold does not depend on what the task asks for.
        self.stack: Stack = set_up(folder, task_file().dataset, len(MINERS), self.file.seed, {})
        decide(self.stack.identity("publisher"), TASK_ID, self.file)
        dispatch.watch.listeners.append(self.events.append)
        try:
            self.reason = cli.run_flow(self.stack, TASK_ID, self.file)
        finally:
            dispatch.watch.listeners.remove(self.events.append)
        self.report = facts.gather(self.stack, TASK_ID, self.file, started_s=0, finished_s=1, reason=self.reason)

    def actor(self, name: str) -> Any:
        return station(name)


@pytest.fixture(scope="module")
def paid(tmp_path_factory: pytest.TempPathFactory, prefect_home: Path) -> Run:
    folder = tmp_path_factory.mktemp("paid") / "run"
    _opened.clear()
    _watching.append(folder)
    run = Run(folder, prefect_home)
    _watching.clear()
    return run


def test_a_task_runs_to_payment(paid):
    assert paid.report["task"]["status"] == "PAID"
    assert {event.kind for event in paid.events} <= {"started", "progress", "ok"}
    assert [vote["accepted"] for vote in paid.report["votes"]] == [True] * 5


def assert_rebuilt_alike(run: Run, folder: Path) -> Registry:
    """The index that the run left is, row by row, the one that chain and store give."""
    rebuilt = Registry(url=f"sqlite:///{folder / 'rebuilt.sqlite'}")
    index.reindex(
        rebuilt, run.stack.chain, run.stack.artifacts, run.stack.identity("publisher").address, lambda *_: None
    )
    for table in INDEX:
        assert rebuilt.rows(table) == run.stack.registry.rows(table), table.__tablename__
    return rebuilt


def test_the_index_of_a_paid_task_is_what_chain_and_store_say(paid, tmp_path):
    rebuilt = assert_rebuilt_alike(paid, tmp_path)
    assert rebuilt.find_task(TASK_ID).status == "PAID"
    filled = {table.__tablename__ for table in INDEX if rebuilt.rows(table)}
    assert {table.__tablename__ for table in INDEX} - filled == {"slashes", "refusals"}


def test_no_step_opens_another_actors_home(paid):
    """And each one's own home is opened by it, so the witness is awake."""
    for name, paths in _opened.items():
        foreign = [path for path in paths if "/actors/" in path and f"/actors/{name}/" not in f"{path}/"]
        assert foreign == [], name
        assert any(f"/actors/{name}/" in path for path in paths), name
    assert set(_opened) == {"publisher", *MINERS}


def secrets(run: Run) -> dict[str, list[bytes]]:
    """Everything that must not leave its owner's home, in the forms in which it could be written."""
    found: dict[str, list[bytes]] = {}
    for name in run.stack.homes:
        me = run.stack.identity(name)
        home = Path(me.home)
        wallet, scalar = bytes(me.account.key), me._scalar
        found[f"{name} wallet"] = [wallet, wallet.hex().encode(), str(int.from_bytes(wallet, "big")).encode()]
        key = scalar.to_bytes(32, "big")
        found[f"{name} encryption key"] = [key, key[::-1], key.hex().encode(), str(scalar).encode()]
        found[f"{name} passphrase"] = [(home / "passphrase").read_bytes()]
        if name == "publisher":
            fields = secrets_of(run.actor(name), TASK_ID)
            found["content key"] = [fields["content_secret"].encode(), bytes.fromhex(fields["content_secret"])]
            found["accuracy salt"] = [fields["salt"].encode(), bytes.fromhex(fields["salt"])]
            continue
        prepared = read_prepared(run.actor(name), TASK_ID, 1)
        update = prepared.values[:12]
        found[f"{name} update"] = [
            update.astype("<i8").tobytes(),
            update.astype("<i4").tobytes(),
            json.dumps(update.tolist()).encode(),
            json.dumps(update.tolist(), separators=(",", ":")).encode(),
        ]
        found[f"{name} residual"] = [prepared.memory.residual[5:15].tobytes()]
        found[f"{name} score salt"] = [prepared.score_salt, prepared.score_salt.hex().encode()]
        found[f"{name} dataset salt"] = [(home / "private" / TASK_ID / "dataset-salt").read_bytes()]
        data = (home / "data.npz").read_bytes()
        found[f"{name} samples"] = [data[len(data) // 2 : len(data) // 2 + 64]]
    return found


REVEALED = ("accuracy salt", "score salt")  # M7 opens these two on chain, and there they belong


def test_no_secret_is_left_anywhere_outside_its_home(paid, tmp_path):
    report = tmp_path / "report.html"
    report.write_text(json.dumps(paid.report) + render_html(paid.report))
    outside = [path for path in paid.folder.rglob("*") if path.is_file() and "actors" not in path.parts]
    outside += [path for path in paid.prefect_home.rglob("*") if path.is_file()]
    contents = {path: path.read_bytes() for path in [*outside, report]}
    assert any(path.name.startswith("prefect.db") for path in contents)
    assert any("blobs" in path.parts for path in contents)
    for what, forms in secrets(paid).items():
        for path, content in contents.items():
            if what.endswith(REVEALED) and path.name.startswith("chain.sqlite"):
                continue
            assert not any(form in content for form in forms), f"{what} is in {path}"


def test_the_search_for_secrets_finds_a_planted_one(paid):
    planted = json.dumps({"key": secrets(paid)["miner-1 wallet"][1].decode()}).encode()
    assert any(form in planted for forms in secrets(paid).values() for form in forms)


def test_no_foreign_secret_is_in_an_actors_home(paid):
    for what, forms in secrets(paid).items():
        owner = "publisher" if what in ("content key", "accuracy salt") else what.split()[0]
        for name, home in paid.stack.homes.items():
            files = [path for path in home.rglob("*") if path.is_file()] if name != owner else []
            assert not any(form in path.read_bytes() for path in files for form in forms), (what, name)


def prefect_rows(run: Run, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(f"file:{run.prefect_home / 'prefect.db'}?mode=ro", uri=True) as database:
        return database.execute(query).fetchall()


def test_the_runs_are_named_by_step_task_round_and_actor(paid):
    names = {name for (name,) in prefect_rows(paid, "SELECT name FROM flow_run")}
    assert TASK_ID in names
    for name in MINERS:
        assert f"M3 contribute · {TASK_ID} · round 1 · {name}" in names
    assert f"M1 publish · {TASK_ID} · publisher" in names


def test_flow_parameters_are_references_and_public_terms_only(paid):
    for (parameters,) in prefect_rows(paid, "SELECT parameters FROM flow_run"):
        given = json.loads(parameters)
        assert set(given) <= {"task_id", "round_number", "actor", "publisher", "spec", "follow_on"}
        assert "required_accuracy" not in given.get("spec", {})


def told(run: Run, key: str) -> list[Any]:
    """What the artifacts of this key hold, the oldest first."""
    rows = prefect_rows(run, f"SELECT data FROM artifact WHERE key = '{key}' ORDER BY created")
    data = [json.loads(value) if isinstance(value, str) else value for (value,) in rows]
    return [json.loads(one) if isinstance(one, str) and one.startswith("[") else one for one in data]


def test_every_run_has_the_tags_of_its_task_round_actor_and_module(paid):
    tags = {name: set(json.loads(found)) for name, found in prefect_rows(paid, "SELECT name, tags FROM flow_run")}
    assert tags[TASK_ID] == {f"task:{TASK_ID}", "actor:publisher"}
    contributed = tags[f"M3 contribute · {TASK_ID} · round 1 · miner-2"]
    assert {f"task:{TASK_ID}", "round:1", "actor:miner-2", "M3"} <= contributed
    assert all(f"task:{TASK_ID}" in found for name, found in tags.items() if f"· {TASK_ID} ·" in name)


def test_the_ui_tells_of_cohort_submissions_and_votes(paid):
    cohort = told(paid, f"cohort-{TASK_ID}")[-1]
    assert sorted(row["miner"] for row in cohort) == sorted(MINERS)
    assert [row["address"] for row in cohort if "drawn" in row["decision"]] == [paid.report["aggregator"]]
    submissions = told(paid, f"submissions-{TASK_ID}")[-1]
    assert {row["miner"]: row["decision"] for row in submissions} == dict.fromkeys(MINERS, "accepted")
    assert all(re.fullmatch(r"20\d\d-.* UTC", row["when"]) for row in submissions)
    votes = told(paid, f"votes-{TASK_ID}")[-1]
    assert sorted(row["decision"] for row in votes) == ["valid"] * 4 + ["valid (its own candidate: not counted)"]


def test_the_ui_adds_up_the_rewards_with_their_transactions(paid):
    rewards = told(paid, f"rewards-{TASK_ID}")[-1]
    assert sum(int(row["wei"]) for row in rewards) == paid.report["task"]["reward_wei"]
    assert {row["transaction"] for row in rewards} <= {one["transaction"] for one in paid.report["transactions"]}
    assert sorted({row["account"] for row in rewards}) == sorted(MINERS)


def test_the_required_accuracy_is_drawn_once_it_was_revealed(paid):
    curves = [base64.b64decode(one.rpartition(",")[2]).decode() for one in told(paid, f"accuracy-{TASK_ID}")]
    assert ["required" in one for one in curves] == [False] * (len(curves) - 2) + [True] * 2
    assert f"{paid.report['final_accuracy']:.2%}" in curves[-1]


def test_terms_and_summary_frame_the_story(paid):
    terms, summary = told(paid, f"terms-{TASK_ID}")[-1], told(paid, f"summary-{TASK_ID}")[-1]
    assert paid.report["task"]["spec_hash"] in terms
    assert "15.00%" not in terms  # the required accuracy
    assert "**PAID**" in summary
    assert "15.00%" in summary
    assert paid.report["model_sha256"] in summary


def test_each_run_that_computes_has_one_progress(paid):
    query = f"SELECT key, type, count(*) FROM artifact WHERE key LIKE 'progress-{TASK_ID}-%' GROUP BY key"
    found = {key: (kind, count) for key, kind, count in prefect_rows(paid, query)}
    assert found[f"progress-{TASK_ID}-1-miner-3-contribute"] == ("progress", 1)
    assert set(found.values()) == {("progress", 1)}
    done = told(paid, f"progress-{TASK_ID}-1-miner-3-contribute")
    assert done == [100.0]


def test_the_report_has_its_stable_keys_and_adds_up(paid):
    report = paid.report
    keys = {
        "task", "dataset", "required_accuracy", "final_accuracy", "rounds", "scores", "rewards_wei",
        "aggregator_reward_wei", "refund_wei", "escrow_left_wei", "gas", "model_sha256", "votes",
    }  # fmt: skip
    assert keys <= set(report)
    assert {"accuracy", "loss", "coordinates", "submissions", "seconds"} <= set(report["rounds"][0])
    total = sum(report["rewards_wei"].values()) + report["aggregator_reward_wei"]
    assert total == report["task"]["reward_wei"]
    assert all(report["scores"][address] > 0 for address in report["rewards_wei"])
    model = paid.stack.artifacts.get(report["aggregator"], report["model_sha256"])
    assert len(model) > 1000


def test_the_page_names_the_model_and_every_miner(paid):
    page = render_html(paid.report)
    assert paid.report["model_sha256"] in page
    for name in MINERS:
        assert name in page
    assert not re.search(r'(src|href)="http', page)


def test_rounds_repeat_until_the_accuracy_is_reached(tmp_path, prefect_home):
    run = Run(tmp_path / "run", prefect_home, required_accuracy=0.72, rounds__max_rounds=6)
    accuracies = [one["accuracy"] for one in run.report["rounds"]]
    assert len(accuracies) > 1
    assert all(accuracy < 0.72 for accuracy in accuracies[:-1])
    assert accuracies[-1] >= 0.72
    assert run.report["task"]["status"] == "PAID"
    run.stack.chain.close()


def test_a_task_that_never_reaches_its_accuracy_is_refunded(tmp_path, prefect_home):
    run = Run(tmp_path / "run", prefect_home, required_accuracy=1.0, rounds__max_rounds=1)
    assert run.report["task"]["status"] == "REFUNDED"
    assert run.report["task"]["reason"].startswith(AbortReason.MAX_ROUNDS)
    assert run.report["refund_wei"] == run.report["task"]["reward_wei"]
    assert "refunded" in render_html(run.report).lower()
    assert_rebuilt_alike(run, tmp_path)
    run.stack.chain.close()


def test_too_few_miners_end_the_task_in_m2_and_the_reward_goes_back(tmp_path, prefect_home):
    run = Run(tmp_path / "run", prefect_home, dataset__samples_min=1000)
    assert run.report["task"]["status"] == "REFUNDED"
    assert run.report["task"]["reason"].startswith(AbortReason.NOT_ENOUGH_MINERS)
    assert run.report["rounds"] == []
    assert run.report["refund_wei"] == run.report["task"]["reward_wei"]
    refused = {row.actor: row.reason for row in run.stack.registry.refusals(TASK_ID)}
    shown = told(run, f"cohort-{TASK_ID}")[-1]
    assert all("the task asks for at least 1000" in row["decision"] for row in shown)
    assert len(refused) == 5
    assert all("the task asks for at least 1000" in reason for reason in refused.values())
    run.stack.chain.close()


def test_a_publisher_without_money_gets_a_report_that_says_so(tmp_path, prefect_home):
    run = Run(tmp_path / "run", prefect_home, money__reward_wei=10**20)
    assert run.report["task"]["status"] == "FAILED"
    assert "send it at least" in run.report["task"]["reason"]
    assert "deposit failed" in render_html(run.report)
    run.stack.chain.close()


def test_a_miner_that_hangs_is_left_behind_and_the_others_go_on(tmp_path, prefect_home, monkeypatch):
    """Its answer after the timeout is refused and changes nothing."""
    import time

    from tasks import contribute

    honest = contribute.local_round

    def slow(*given: Any, **named: Any) -> Any:
        if dispatch._current.get()[1] == "miner-2":
            time.sleep(25)
        return honest(*given, **named)

    monkeypatch.setattr(contribute, "local_round", slow)
    run = Run(tmp_path / "run", prefect_home, rounds__contribution_timeout_s=20.0)
    assert run.report["task"]["status"] == "PAID"
    assert run.report["rounds"][0]["submissions"] == 4
    reasons = [one["reason"] for one in run.report["rounds"][0]["refused"]]
    assert "no answer within 20 s" in reasons
    assert "nothing submitted in time" in reasons
    rebuilt = assert_rebuilt_alike(run, tmp_path)
    assert "no answer within 20 s" in [row.reason for row in rebuilt.refusals(TASK_ID)]
    shown = {row["miner"]: row["decision"] for row in told(run, f"submissions-{TASK_ID}")[-1]}
    assert shown.pop("miner-2").startswith("refused: n")
    assert set(shown.values()) == {"accepted"}
    run.stack.chain.close()
