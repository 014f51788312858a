"""The index is what chain and store say: rebuilt from them it is the same, whatever befell it and whoever lies in the store."""

import sqlite3

import numpy as np
import pytest
from typer.testing import CliRunner

from blocks.artifacts import ArtifactStore, MissingArtifact, TamperedArtifact
from blocks.registry import Registry
from blocks.tables import INDEX, EventRow, RefusalRow, RewardRow, RoundRow, SlashRow, TaskRow, VoteRow
from contracts.messages import Attestation, Cohort, Receipt, Refusal, RoundResult, Submission
from contracts.task_spec import InvalidTask, load_task_file
from infra import cli
from tasks import index
from tasks.contribute import train_locally
from tasks.global_model import build_network, initial_model
from tasks.learning.models import encode_parameters
from tasks.learning.training import evaluate
from tasks.publish import DepositFailed, decide, published_task, terms_on_chain, validation_set
from tasks.records import BadRecord
from tests.protocol import world as worlds
from tests.protocol.conftest import snapshot
from tests.protocol.world import MINERS, ORDER, TASK_ID, reopen, task_file


def rebuild(world, url):
    registry = Registry(url=url)
    index.reindex(registry, world.chain, world.store, world.address("publisher"), lambda *_: None)
    return registry


def contents(registry):
    return {table.__tablename__: registry.rows(table) for table in INDEX}


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The folder of a paid task whose steps were followed as the dispatcher does."""
    file = task_file()
    paid = snapshot(tmp_path_factory.mktemp("paid") / "run", file, "withdraw")
    world = reopen(paid, tmp_path_factory.mktemp("followed") / "run", file)
    world.follow(*ORDER)
    assert index.catch_up(world.registry, world.chain, world.store, TASK_ID) == "PAID"
    world.close()
    return world.folder


@pytest.fixture
def paid(followed, tmp_path):
    world = reopen(followed, tmp_path / "run", task_file())
    yield world
    world.close()


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_what_was_followed_is_what_is_rebuilt(paid, tmp_path, request, database):
    url = f"sqlite:///{tmp_path / 'rebuilt.sqlite'}"
    if database == "postgresql":
        url = request.getfixturevalue("postgres_url")
    told = []
    registry = Registry(url=url)
    args = (registry, paid.chain, paid.store, paid.address("publisher"))
    assert index.reindex(*args, lambda *progress: told.append(progress)) == {"PAID": 1}
    assert told == [(0, 1, TASK_ID), (1, 1, "")]
    assert contents(registry) == contents(paid.registry)
    assert [name for name, rows in contents(registry).items() if not rows] == ["slashes", "refusals"]
    index.reindex(*args, lambda *_: None)
    assert contents(registry) == contents(paid.registry)


def test_the_index_says_what_happened(paid):
    task = paid.registry.find_task(TASK_ID)
    assert (task.aggregator, task.outcome) == (paid.address(paid.aggregator), "MET")
    assert task.required_accuracy_ppm == 150_000
    (round_,) = paid.registry.rows(RoundRow)
    (version,) = paid.registry.versions()
    result = paid.find(RoundResult, paid.aggregator)
    assert (round_["collected"], round_["accepted"], round_["correct"]) == (5, 5, result.correct)
    assert (version.version, version.sha256, version.parent) == (f"{TASK_ID}/1", result.model_sha256, None)
    assert version.transaction == paid.find(Receipt, paid.aggregator, about="publish-block").transaction
    assert {row["miner"] for row in paid.registry.rows(VoteRow)} == {paid.address(name) for name in MINERS}
    claimed = sum(int(row["amount_wei"]) for row in paid.registry.rows(RewardRow) if row["kind"] == "RewardClaimed")
    credited = sum(int(row["amount_wei"]) for row in paid.registry.rows(RewardRow) if row["kind"] == "RewardCredited")
    assert claimed + credited == paid.file.money.reward_wei


def test_a_damaged_index_is_mended_and_what_is_the_hosts_own_stays(paid, tmp_path):
    before = contents(paid.registry)
    paid.registry.pin("best", f"{TASK_ID}/1")
    paid.registry.record_step(
        task_id=TASK_ID, round_number=1, step="attest", actor="miner-1", started_s=1.0, seconds=1.0, outcome="ok"
    )
    with sqlite3.connect(paid.folder / "registry.sqlite") as database:
        database.execute("DELETE FROM events WHERE block_number % 2 = 0")
        database.execute("UPDATE tasks SET status = 'REFUNDED', publisher = 'me'")
        database.execute("UPDATE votes SET accepted = 0")
        database.execute("INSERT INTO refusals VALUES ('another-task', 1, 's', 'me', 'no')")
    assert contents(paid.registry) != before
    rebuild(paid, f"sqlite:///{paid.folder / 'registry.sqlite'}")
    assert contents(paid.registry) == before
    assert [row.name for row in paid.registry.pins()] == ["best"]
    assert len(paid.registry.steps(TASK_ID)) == 1
    assert {row.name for row in paid.registry.actors()} == {"publisher", *MINERS}


def test_a_task_that_ends_without_a_block_is_rebuilt_with_its_refusals_and_its_slash(world_after, tmp_path):
    world = world_after("form-cohort")
    world.follow(*ORDER[: ORDER.index("form-cohort") + 1])
    late = world.address("miner-2")
    station = world.station("publisher")
    for reason in ("no answer within 60 s", "another reason after a restart"):
        index.refuse(station, world.registry, TASK_ID, 1, "contribute", late, reason)
    index.refuse(station, world.registry, TASK_ID, 1, "attest", late, "no answer within 5 s")
    index.declare_over(station, world.registry, TASK_ID, "deadline passed", "nobody answered")
    assert world.registry.find_task(TASK_ID).status == "REFUNDABLE"
    world.follow("refund")
    for name in world.others:
        world.do("compensation", name)
    assert index.catch_up(world.registry, world.chain, world.store, TASK_ID) == "REFUNDED"
    rebuilt = rebuild(world, f"sqlite:///{tmp_path / 'rebuilt.sqlite'}")
    assert contents(rebuilt) == contents(world.registry)
    assert rebuilt.find_task(TASK_ID).reason == "deadline passed: nobody answered"
    refused = {row["step"]: (row["actor"], row["reason"]) for row in rebuilt.rows(RefusalRow)}
    assert refused == {"contribute": (late, "no answer within 60 s"), "attest": (late, "no answer within 5 s")}
    (slash,) = rebuilt.rows(SlashRow)
    assert (slash["offence"], slash["amount_wei"]) == ("SILENCE", "200")
    kinds = [row["kind"] for row in rebuilt.rows(RewardRow)]
    assert {"CreditAdded", "CreditWithdrawn", "PublisherRefunded"} <= set(kinds)


def test_what_cannot_be_believed_is_refused_with_the_reason_and_makes_no_row(paid, tmp_path):
    honest = contents(rebuild(paid, f"sqlite:///{tmp_path / 'honest.sqlite'}"))
    liar, victim = paid.others[0], paid.others[1]
    paid.record_file(Submission, victim).write_text("{}")
    vote = paid.find(Attestation, liar).model_copy(update={"accepted": False, "reason": "I was paid for this"})
    paid.forge(vote, signer=liar, about="again")
    paid.forge(paid.find(RoundResult, paid.aggregator), signer=liar, as_name=victim)
    mine = paid.cohort().model_copy(update={"publisher": paid.address(liar), "refused": (paid.address(victim),)})
    paid.forge(mine.model_copy(update={"reasons": ("go away",)}), signer=liar, r=0)
    lie = Refusal(
        task_id=TASK_ID, round_number=1, publisher=paid.address(liar), step="s", actor=paid.address(victim), reason="x"
    )
    paid.forge(lie, signer=liar, about=f"s-{paid.address(victim)}")
    (paid.record_file(Submission, liar).parent / "Nonsense.json").write_text("[")

    rebuilt = rebuild(paid, f"sqlite:///{tmp_path / 'rebuilt.sqlite'}")
    found = {(row["step"], row["actor"]): row["reason"] for row in rebuilt.rows(RefusalRow)}
    reasons = {
        ("record Submission.json", victim): "malformed Submission",
        ("record Attestation-again.json", liar): "is posted as",
        ("record RoundResult.json", victim): f"is signed by {paid.address(liar)}",
        ("record Nonsense.json", liar): "names no kind of record",
    }
    assert len(found) == len(reasons)
    for (step, name), reason in reasons.items():
        assert reason in found[step, paid.address(name)]
    same = set(honest) - {"records", "refusals", "submissions"}
    assert {name: contents(rebuilt)[name] for name in same} == {name: honest[name] for name in same}
    signed = {(row["kind"], row["signer"]) for row in contents(rebuilt)["records"]}
    assert {
        ("Cohort", paid.address(liar)),
        ("Refusal", paid.address(liar)),
    } <= signed  # kept as said, believed in nothing
    assert (Cohort.__name__, paid.address(victim)) not in signed


def test_a_strangers_task_is_not_in_the_index(world_after, tmp_path):
    world = world_after("publish")
    terms = terms_on_chain(world.file.spec(), world.chain.now_s() + 3600)
    stranger = world.contracts_as("miner-1").escrow
    stranger.publish_task("a-strangers-task", "0x" + "11" * 32, "0x" + "22" * 32, terms, reward_wei=5)
    rebuilt = rebuild(world, f"sqlite:///{tmp_path / 'rebuilt.sqlite'}")
    assert [row["task_id"] for row in rebuilt.rows(TaskRow)] == [TASK_ID]
    assert {row["task_id"] for row in rebuilt.rows(EventRow)} == {TASK_ID}


def test_terms_that_are_not_those_on_chain_are_refused(paid, tmp_path):
    path = paid.folder / "store" / paid.address("publisher").lower() / "records" / TASK_ID / "terms.json"
    path.write_text(path.read_text().replace('"seed":1', '"seed":2'))
    rebuilt = rebuild(paid, f"sqlite:///{tmp_path / 'rebuilt.sqlite'}")
    assert rebuilt.find_task(TASK_ID).terms == ""
    assert "on chain it is" in rebuilt.refusals(TASK_ID)[0].reason


# Starting from a model version


SECOND = "test-task-2"


def second_task(world, monkeypatch, start):
    """The same parties, at the beginning of another task that names a start."""
    file = task_file(model={"name": "logistic", "start": start.model_dump()})
    monkeypatch.setattr(worlds, "TASK_ID", SECOND)
    decide(world.stack.identity("publisher"), SECOND, file)
    world.file = file
    return world


def test_a_second_task_starts_at_the_first_ones_accuracy(paid, monkeypatch, tmp_path):
    paid.registry.pin("best", f"{TASK_ID}/1")
    first = paid.registry.find_version("best")
    world = second_task(paid, monkeypatch, paid.registry.start_from("best"))
    world.follow(*ORDER[: ORDER.index("attest") + 1])

    spec = world.file.spec()
    model = initial_model(spec, world.store)
    publisher = world.station("publisher")
    validation = validation_set(publisher, published_task(publisher, SECOND))
    judged = evaluate(build_network(spec), model.parameters, validation)
    assert (judged.correct, judged.total) == (first.correct, first.total)
    assert model.sha256 == first.sha256
    submissions = [publisher.need(Submission, world.address(name), SECOND, 1) for name in MINERS]
    assert {one.base_model_sha256 for one in submissions} == {first.sha256}
    votes = [publisher.need(Attestation, world.address(name), SECOND, 1) for name in MINERS]
    assert [vote.accepted for vote in votes] == [True] * 5
    second = world.registry.find_version(f"{SECOND}/1")
    assert second.parent == first.version
    assert second.correct > first.correct

    index.catch_up(world.registry, world.chain, world.store, SECOND)
    rebuilt = rebuild(world, f"sqlite:///{tmp_path / 'rebuilt.sqlite'}")
    assert contents(rebuilt) == contents(world.registry)
    assert [row.task_id for row in rebuilt.tasks()] == [TASK_ID, SECOND]


def test_a_tampered_start_stops_everybody_before_money_or_stake_moves(paid, monkeypatch):
    start = paid.registry.start_from(f"{TASK_ID}/1")
    world = second_task(paid, monkeypatch, start)
    blob = world.folder / "store" / start.owner.lower() / "blobs" / start.sha256[2:4] / start.sha256[2:]
    honest = blob.read_bytes()
    other = bytearray(honest)
    other[-1] ^= 1
    before = world.balance_wei("publisher")
    blob.write_bytes(other)
    with pytest.raises(DepositFailed, match=r"truncated or changed\. Nothing was locked"):
        world.do("publish", "publisher")
    assert world.balance_wei("publisher") == before

    blob.write_bytes(honest)
    world.follow("publish")
    blob.write_bytes(other)
    staked = world.contracts.stakes.available_stake(world.address("miner-1"))
    with pytest.raises(TamperedArtifact, match="truncated or changed"):
        world.do("register", "miner-1")
    assert world.contracts.stakes.available_stake(world.address("miner-1")) == staked
    blob.write_bytes(honest)
    world.follow("register", "challenge", "prove-dataset", "form-cohort")
    blob.write_bytes(other)
    with pytest.raises(TamperedArtifact, match="truncated or changed"):
        train_locally.fn(SECOND, 1, "miner-1")


def starting_from(folder, data):
    """The terms of a task that starts from these bytes, and the store that holds them."""
    store = ArtifactStore(root=str(folder))
    reference = store.put("0x" + "11" * 20, data)
    start = {"uri": reference.uri, "sha256": reference.sha256}
    return task_file(model={"name": "logistic", "start": start}).spec(), store


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode_parameters(np.zeros(128, np.float32)), r"has 128 parameters, model.name = 'logistic' .* has 650"),
        (b"HCMP" + bytes(100), "is no model: header"),
        (b"", "is no model: data: 0 bytes"),
    ],
)
def test_a_start_of_another_architecture_is_refused(tmp_path, data, reason):
    with pytest.raises(BadRecord, match=reason):
        initial_model(*starting_from(tmp_path, data))


def test_a_start_that_is_too_large_is_not_read(tmp_path):
    with pytest.raises(TamperedArtifact, match="1048576 bytes, at most 2616 are allowed"):
        initial_model(*starting_from(tmp_path, bytes(1 << 20)))


def test_a_start_that_is_nowhere_is_named(tmp_path):
    spec, _ = starting_from(tmp_path / "one", b"")
    with pytest.raises(MissingArtifact, match="is not in the store"):
        initial_model(spec, ArtifactStore(root=str(tmp_path / "another")))
    with pytest.raises(ValueError, match="a start is read from a store"):
        initial_model(spec)


def test_a_start_is_part_of_the_terms_and_without_one_the_terms_are_as_before():
    start = {"uri": f"artifact:0x{'11' * 20}/0x{'22' * 32}", "sha256": "0x" + "22" * 32}
    plain, started = task_file(), task_file(model={"name": "logistic", "start": start})
    assert "start" not in plain.model_dump(mode="json")["model"]
    assert started.model_dump(mode="json")["model"]["start"] == start
    assert type(started).model_validate_json(started.model_dump_json()) == started


@pytest.mark.parametrize(
    ("start", "sentence"),
    [
        ('uri = "http://x/y", sha256 = "DIGEST"', r"model\.start\.uri = 'http://x/y'"),
        ('uri = "artifact:OWNER/OTHER", sha256 = "DIGEST"', "names another digest"),
        ('sha256 = "DIGEST"', r"model\.start\.uri: is missing: add it"),
    ],
)
def test_a_start_that_is_none_is_named(start, sentence):
    for word, value in (("OWNER", "11" * 20), ("DIGEST", "22" * 32), ("OTHER", "33" * 32)):
        start = start.replace(word, f"0x{value}")
    with pytest.raises(InvalidTask, match=sentence):
        load_task_file(worlds.TERMS.replace('name = "logistic"', f'name = "logistic"\nstart = {{{start}}}'))


# The commands


def healchain(world, *words):
    home = str(world.folder / "actors" / "publisher")
    done = CliRunner().invoke(cli.app, [*words, "--home", home], env={"COLUMNS": "200"})
    return done.exit_code, done.output


def test_the_index_is_rebuilt_and_versions_are_handled_by_commands(paid, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.console, "width", 200)
    version = f"{TASK_ID}/1"
    sha256 = paid.registry.find_version(version).sha256
    assert healchain(paid, "reindex") == (0, "rebuilt from chain and store: 1 PAID\n")
    code, output = healchain(paid, "models", "pin", "best", version)
    assert code == 0
    assert f'[model.start]\nuri = "artifact:{paid.address(paid.aggregator)}/{sha256}"' in output
    code, output = healchain(paid, "models", "list")
    assert code == 0
    assert all(word in output for word in (version, sha256[:14], "best", " UTC"))
    code, output = healchain(paid, "models", "compare", version, "best")
    assert (code, "0 of 650 parameters differ" in output) == (0, True)
    assert f"common ancestor: {version}" in output
    out = tmp_path / "model.bin"
    code, output = healchain(paid, "models", "fetch", "best", "--out", str(out))
    assert (code, sha256 in output) == (0, True)
    assert out.read_bytes() == paid.store.get(paid.address(paid.aggregator), sha256)
    code, output = healchain(paid, "models", "rollback", "best")
    assert (code, "there is no version before" in output) == (2, True)


def test_a_tampered_model_is_not_fetched(paid, tmp_path):
    version = paid.registry.find_version(f"{TASK_ID}/1")
    owner = paid.address(paid.aggregator).lower()
    blob = paid.folder / "store" / owner / "blobs" / version.sha256[2:4] / version.sha256[2:]
    blob.write_bytes(blob.read_bytes()[:-1])
    out = tmp_path / "model.bin"
    code, output = healchain(paid, "models", "fetch", version.version, "--out", str(out))
    assert (code, "truncated or changed" in output) == (2, True)
    assert not out.exists()


def test_an_unknown_version_or_home_is_named(paid, tmp_path):
    code, output = healchain(paid, "models", "fetch", "no-such", "--out", str(tmp_path / "x"))
    assert (code, "'no-such' is no model version and no pin" in output) == (2, True)
    done = CliRunner().invoke(cli.app, ["reindex", "--home", str(tmp_path / "nowhere" / "at" / "all")])
    assert (done.exit_code, "connections.json is missing: set the home up first" in " ".join(done.output.split())) == (
        2,
        True,
    )
