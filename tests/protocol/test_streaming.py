"""A round in several groups of chunks: opened piece by piece, resumed after a kill, spread over processes, refused in part."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, temporary_settings

from blocks.workers import Workers
from contracts.messages import (
    Abort,
    AbortReason,
    Attestation,
    Candidate,
    KeyGrant,
    KeyRequest,
    RoundResult,
    Submission,
    struct_hash,
)
from flows.aggregator import aggregate
from tasks import chunks, dispatch, opening
from tasks.chunks import Chunked, chunk_root, put_manifest
from tasks.contribute import label_of, read_prepared, store_ciphertext, submitted_ciphertext
from tasks.global_model import Opening, opened_round
from tasks.opening import read_plan, sealed_key
from tasks.publish import published_task
from tasks.records import load_record
from tests.protocol.world import MINERS, TASK_ID, World

# 130 coordinates in chunks of 16: nine chunks, the last one of 2 coordinates; three groups, the last one of one chunk.
CHUNKED = {"voting__chunk_coordinates": 16, "voting__spot_checks": 16}
GROUPS = [range(0, 4), range(4, 8), range(8, 9)]


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "PIECE_COORDINATES", 32)
    monkeypatch.setattr(chunks, "GROUP_COORDINATES", 64)


def weighted_sum_of(world: World) -> list[int]:
    """The sum as the miners' own homes have it."""
    cohort = world.cohort()
    weight = dict(zip(cohort.miners, cohort.weights, strict=True))
    values = [weight[world.address(name)] * read_prepared(world.station(name), TASK_ID, 1).values for name in MINERS]
    return np.sum(values, axis=0).tolist()


def opening_of(world: World) -> Opening:
    station, spec = world.station("publisher"), world.file.spec()
    return opened_round(station, spec, world.cohort(), 1, at_most=10_000)[1]


def private(world: World, name: str) -> Path:
    return world.folder / "actors" / name / "private" / TASK_ID / "00001" / "opening"


def test_a_round_in_several_groups_opens_the_weighted_sum(world_after):
    world = world_after("derive-key", **CHUNKED)
    assert opening.plan_opening.fn(TASK_ID, 1, world.aggregator) == GROUPS
    world.through("attest", after="derive-key")
    opened = opening_of(world)
    assert (len(opened.layout.chunks), opened.layout.length(8)) == (9, 2)
    assert opened.weighted_sum().tolist() == weighted_sum_of(world)
    assert {world.find(Attestation, name).reason for name in MINERS} == {""}


def test_every_long_step_tells_how_far_it_is(world_after):
    """Chunk by chunk, up to the end, and never backwards within one kind of work."""
    world = world_after("train", **CHUNKED)
    told: dict[str, list[float]] = {}
    listener = dispatch.watch.listeners.append

    def note(event: dispatch.StepEvent) -> None:
        told.setdefault(event.detail, []).append(event.fraction)

    listener(note)
    token = dispatch._current.set(("some step", "somebody", TASK_ID, 1))
    try:
        world.through("attest", after="train")
    finally:
        dispatch._current.reset(token)
        dispatch.watch.listeners.remove(note)
    for what in ("encrypting", "checking", "auditing", "deriving audit keys", "deriving the functional key"):
        assert len(told[what]) >= 5, what
        assert told[what][-1] == 1, what
    assert told["verifying the sum of round 1"][-1] == 1
    assert told["auditing"] == sorted(told["auditing"])


# --- one chunk that is not what it should be ------------------------------------------------------------------------


def blob_of(world: World, artifact: Chunked, index: int) -> Path:
    return next((world.folder / "store" / artifact.owner.lower() / "blobs").rglob(artifact.digest(index)[2:]))


def damage(world: World, artifact: Chunked, how: str) -> None:
    """Do something to chunk 5 in the store, which is not trusted."""
    blob = blob_of(world, artifact, 5)
    if how == "missing":
        blob.unlink()
    elif how == "swapped":
        blob.write_bytes(blob_of(world, artifact, 4).read_bytes())
    else:
        blob.write_bytes(blob.read_bytes()[:-1])


HARM = [("missing", "is not in the store"), ("swapped", "truncated or changed"), ("truncated", "truncated or changed")]


@pytest.mark.parametrize(("how", "reason"), HARM)
@pytest.mark.parametrize("what", ["ciphertext", "functional key"])
def test_a_damaged_chunk_ends_the_opening_with_its_number_and_owner(world_after, what, how, reason):
    world = world_after("derive-key", **CHUNKED)
    opening.plan_opening.fn(TASK_ID, 1, world.aggregator)
    plan = read_plan(world.station(world.aggregator), TASK_ID, 1)
    if what == "ciphertext":
        artifact = submitted_ciphertext(world.store, world.find(Submission, world.others[0]), 16)
    else:
        artifact = sealed_key(world.store, plan)
    damage(world, artifact, how)
    abort = world.do("aggregate", world.aggregator)
    assert isinstance(abort, Abort)
    assert abort.reason == AbortReason.DECRYPT_FAILED
    assert f"chunk 5 of the {what} of {artifact.owner}: " in abort.detail
    assert reason in abort.detail


@pytest.mark.parametrize(("how", "reason"), HARM)
def test_a_damaged_chunk_of_the_opening_is_an_objection_with_its_number_and_owner(world_after, how, reason):
    world = world_after("open-validation", **CHUNKED)
    artifact = opening_of(world)
    damage(world, artifact, how)
    for name in world.others:
        objection = world.do("attest", name).reason
        assert f"chunk 5 of the opening of {artifact.owner}: " in objection
        assert reason in objection


def relisted(world: World, artifact: Chunked, digests: list[str]) -> str:
    """A manifest of other chunks, stored as its owner would."""
    return put_manifest(world.store, artifact.owner, artifact.layout, digests)


def digests_of(artifact: Chunked, *, swap: bool = False) -> list[str]:
    digests = [artifact.digest(index) for index in artifact.layout.chunks]
    if swap:
        digests[4], digests[5] = digests[5], digests[4]
    return digests


def with_another_version(world: World, artifact: Chunked) -> list[str]:
    """The chunks, the fifth with one more in its version."""
    digests, data = digests_of(artifact), blob_of(world, artifact, 5).read_bytes()
    digests[5] = world.store.put(artifact.owner, data[:3] + bytes([data[3] + 1]) + data[4:]).sha256
    return digests


def grant(world: World, digests: list[str], key: Chunked) -> Abort:
    """The publisher signs a grant of a key in other chunks; what the aggregator makes of it."""
    signed = world.find(KeyGrant, "publisher").model_copy(update={"sealed_sha256": relisted(world, key, digests)})
    world.forge(signed, signer="publisher")
    abort = world.do("aggregate", world.aggregator)
    assert isinstance(abort, Abort)
    return abort


def granted_key(world: World) -> Chunked:
    station, request = world.station(world.aggregator), world.find(KeyRequest, world.aggregator)
    plan = opening.make_plan(station, published_task(station, TASK_ID), world.cohort(), request)
    return sealed_key(world.store, plan)


def test_chunks_of_the_key_open_in_their_own_place_only(world_after):
    world = world_after("derive-key", **CHUNKED)
    key = granted_key(world)
    abort = grant(world, digests_of(key, swap=True), key)
    assert abort.reason == AbortReason.DECRYPT_FAILED
    assert f"chunk 4 of the functional key of {key.owner}: not sealed for this recipient and context" in abort.detail


def test_a_key_with_a_chunk_less_is_refused(world_after):
    world = world_after("derive-key", **CHUNKED)
    key = granted_key(world)
    abort = grant(world, digests_of(key)[:-1], key)
    assert "256 bytes of digests for 9 chunks" in abort.detail


def test_a_key_for_fewer_coordinates_is_refused(world_after):
    world = world_after("derive-key", **CHUNKED)
    key = granted_key(world)
    shorter = chunks.Layout(128, 16)
    sha256 = put_manifest(world.store, key.owner, shorter, digests_of(key)[:-1])
    world.forge(world.find(KeyGrant, "publisher").model_copy(update={"sealed_sha256": sha256}), signer="publisher")
    assert "128 coordinates, not 130" in world.do("aggregate", world.aggregator).detail


def test_an_exchanged_ciphertext_is_dropped_by_the_audit(world_after):
    """Two chunks of the miner's own, in the wrong places, signed by itself."""
    world = world_after("submit", **CHUNKED)
    culprit = world.others[0]
    submission = world.find(Submission, culprit)
    digests = digests_of(submitted_ciphertext(world.store, submission, 16), swap=True)
    listing = relisted(world, submitted_ciphertext(world.store, submission, 16), digests)
    changed = {"ciphertext_root": chunk_root(digests), "chunks_sha256": listing}
    world.forge(submission.model_copy(update=changed), signer=culprit)
    world.through("audit", after="submit")
    request = world.find(KeyRequest, world.aggregator)
    assert request.refused == (world.address(culprit),)
    assert "malformed ciphertext" in request.reasons[0]


def publish_chunks(world: World, digests: list[str]) -> list[str]:
    """The aggregator signs an opening in other chunks; what the others say."""
    result, candidate = world.find(RoundResult, world.aggregator), world.find(Candidate, world.aggregator)
    sha256 = relisted(world, opening_of(world), digests)
    candidate = candidate.model_copy(update={"opening_sha256": sha256})
    world.forge(candidate, signer=world.aggregator)
    named = {"opening_sha256": sha256, "candidate": struct_hash(candidate)}
    world.forge(result.model_copy(update=named), signer=world.aggregator)
    return [world.do("attest", name).reason for name in world.others]


def test_exchanged_chunks_of_an_opening_do_not_open_the_ciphertexts(world_after):
    world = world_after("open-validation", **CHUNKED)
    for objection in publish_chunks(world, digests_of(opening_of(world), swap=True)):
        assert "does not open the ciphertexts at coordinate 64" in objection


def test_an_opening_of_an_unknown_version_is_refused(world_after):
    world = world_after("open-validation", **CHUNKED)
    for objection in publish_chunks(world, with_another_version(world, opening_of(world))):
        assert "chunk 5 of the opening of" in objection
        assert "begins b'HCO2', expected b'HCO1'" in objection


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "are no manifest"),
        (b"[]", "are no manifest"),
        (b"HCM2" + bytes(16), "are no manifest: it begins b'HCM1'"),
        (b"HCM1" + bytes(16), "0 coordinates in chunks of 0"),
        (
            b"HCM1" + (130).to_bytes(8, "little") + (64).to_bytes(8, "little") + bytes(96),
            "130 coordinates in chunks of 64",
        ),
        (b"HCM1" + (2**60).to_bytes(8, "little") + (16).to_bytes(8, "little"), "bytes of digests for"),
        (b"HCM1" + (130).to_bytes(8, "little") + (16).to_bytes(8, "little") + bytes(287), "287 bytes of digests"),
        (b"HCM1" + bytes(10_000), "bytes, at most"),
    ],
)
def test_what_is_no_manifest_is_refused_before_a_chunk_is_read(world_after, data, reason):
    world = world_after("submit", **CHUNKED)
    culprit = world.others[0]
    listing = world.store.put(world.address(culprit), data).sha256
    world.forge(world.find(Submission, culprit).model_copy(update={"chunks_sha256": listing}), signer=culprit)
    collection = world.do("collect", world.aggregator)
    assert collection.refused == (world.address(culprit),)
    assert f"manifest of the ciphertext of {world.address(culprit)}: " in collection.reasons[0]
    assert reason in collection.reasons[0]


def exceed(world: World, name: str, coordinates: list[int]) -> None:
    """The miner encrypts numbers beyond the bound at these coordinates, and signs that."""
    station, cohort, submission = world.station(name), world.cohort(), world.find(Submission, name)
    label, values = label_of(station, TASK_ID, 1, station.address), read_prepared(station, TASK_ID, 1).values.copy()
    masks = (
        station.me.mask_key(cohort.publisher_key, "publisher", label, submission.salt),
        station.me.mask_key(cohort.aggregator_key, "aggregator", label, submission.salt),
    )
    values[coordinates] = 100_000
    layout = chunks.Layout(len(values), 16)
    digests = store_ciphertext(world.store, station.address, layout, layout.chunks, values, masks, bound=2**20)
    listing = put_manifest(world.store, station.address, layout, digests)
    changed = {"ciphertext_root": chunk_root(digests), "chunks_sha256": listing}
    world.forge(submission.model_copy(update=changed), signer=name)


@pytest.mark.parametrize(("allowed", "kind"), [(2, RoundResult), (1, Abort)])
def test_what_exceeds_the_bound_is_counted_over_the_pieces_of_a_group(world_after, monkeypatch, allowed, kind):
    """Coordinates 3 and 40 are in two pieces of the first group: each is searched further, up to a limit for both."""
    monkeypatch.setattr(opening, "MAX_EXCESSIVE", allowed)
    world = world_after("submit", **CHUNKED)
    culprit = world.others[0]
    exceed(world, culprit, [3, 40])
    world.through("derive-key", after="submit")
    said = world.do("aggregate", world.aggregator)
    assert isinstance(said, kind)
    if isinstance(said, Abort):
        assert said.reason == AbortReason.RECOVERY_FAILED
        assert "2 coordinates have no exponent within" in said.detail
        assert said.detail.endswith(": 3, 40")
    else:
        difference = opening_of(world).weighted_sum() - weighted_sum_of(world)
        assert np.flatnonzero(difference).tolist() == [3, 40]


# --- killed and resumed ---------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from blocks.identity import Identity, residents
from tasks import chunks, opening
from tests.protocol import world

# The chain that the home names is open in the test's process; it is never connected: opening chunks asks no chain.
folder, name = sys.argv[1:]
residents[name] = Identity(home=f"{folder}/actors/{name}")
chunks.PIECE_COORDINATES = 32
honest, calls = opening.store_opening, 0

def store_opening(*given):
    global calls
    calls += 1
    if calls == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(*given)

opening.store_opening = store_opening
for first, last in ((0, 3), (4, 7), (8, 8)):
    opening.open_group.fn(world.TASK_ID, 1, name, first, last)
"""


def test_an_aggregator_killed_while_it_opens_goes_on_with_the_group_it_was_at(world_after, monkeypatch):
    """Killed after the first piece of the second group: that group and the third are opened, the first is not again."""
    world = world_after("derive-key", **CHUNKED)
    name = world.aggregator
    opening.plan_opening.fn(TASK_ID, 1, name)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(world.folder), name], cwd=Path.cwd(), check=False, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert {path.name for path in private(world, name).iterdir()} == {"plan.json", "0000000-0000003"}

    opened, honest = [], opening.open_piece
    monkeypatch.setattr(opening, "open_piece", lambda sums, piece: opened.append(piece) or honest(sums, piece))
    world.do("aggregate", name)
    assert opened == [range(4, 6), range(6, 8), range(8, 9)]
    assert opening_of(world).weighted_sum().tolist() == weighted_sum_of(world)
    done = {"plan.json", "0000000-0000003", "0000004-0000007", "0000008-0000008"}
    assert {path.name for path in private(world, name).iterdir()} == done


@pytest.mark.parametrize("how", ["missing", "swapped", "truncated"])
def test_a_finished_group_whose_chunks_the_store_lost_is_opened_again(world_after, how):
    world = world_after("derive-key", **CHUNKED)
    name = world.aggregator
    groups = opening.plan_opening.fn(TASK_ID, 1, name)
    first = opening.open_group.fn(TASK_ID, 1, name, groups[0].start, groups[0].stop - 1)
    blob = next((world.folder / "store" / world.address(name).lower() / "blobs").rglob(first.digests[1][2:]))
    kept = blob.read_bytes()
    if how == "missing":
        blob.unlink()
    else:
        blob.write_bytes(kept[:-1] if how == "truncated" else kept[::-1])
    assert opening.open_group.fn(TASK_ID, 1, name, 0, 3) == first
    assert blob.read_bytes() == kept
    world.do("aggregate", name)
    assert opening_of(world).weighted_sum().tolist() == weighted_sum_of(world)


def test_a_group_without_a_plan_is_not_opened(world_after):
    world = world_after("derive-key", **CHUNKED)
    with pytest.raises(LookupError, match="plan the opening first"):
        opening.open_group.fn(TASK_ID, 1, world.aggregator, 0, 3)


def test_the_plan_of_a_round_names_nothing_secret(world_after):
    """It is decided once; a worker needs the home's keys to do anything with it."""
    world = world_after("derive-key", **CHUNKED)
    opening.plan_opening.fn(TASK_ID, 1, world.aggregator)
    plan = json.loads((private(world, world.aggregator) / "plan.json").read_text())
    assert plan["request"] == struct_hash(world.find(KeyRequest, world.aggregator))
    public = {"miner", "weight", "encryption_key", "salt", "chunks_sha256"}
    assert {name for summand in plan["summands"] for name in summand} == public


# --- on Prefect's task runners --------------------------------------------------------------------------------------

DASK = Workers(
    runner="prefect_dask.DaskTaskRunner",
    options={
        "cluster_kwargs": {"n_workers": 2, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
    },
)


@pytest.fixture(scope="module")
def server() -> str:
    """A Prefect server that other processes find, too."""
    server = SubprocessASGIServer()
    server.start()
    return server.api_url


@pytest.mark.parametrize("workers", [None, DASK], ids=["threads", "dask"])
def test_groups_are_opened_where_the_aggregator_has_its_workers(world_after, monkeypatch, tmp_path, server, workers):
    """Two threads of this process without a block; with one, two processes of a Dask cluster."""
    world = world_after("derive-key", **CHUNKED)
    monkeypatch.undo()  # blocks are loaded from the server, here and in the workers
    monkeypatch.setattr(chunks, "GROUP_COORDINATES", 64)
    honest, name, seen = opening.open_chunks, world.aggregator, tmp_path / "seen"
    seen.mkdir()

    def noting(*given):
        (seen / str(os.getpid())).touch()
        return honest(*given)

    monkeypatch.setattr(opening, "open_chunks", noting)
    with temporary_settings({PREFECT_API_URL: server}):
        world.stack.register()
        if workers is not None:
            workers.save(f"{name}-workers", overwrite=True)
        reference = aggregate(task_id=TASK_ID, round_number=1, actor=name)
        assert opening_of(world).weighted_sum().tolist() == weighted_sum_of(world)
    assert isinstance(load_record(world.store, world.chain.domain, reference), RoundResult)
    processes = {int(path.name) for path in seen.iterdir()}
    assert (processes == {os.getpid()}) if workers is None else (len(processes) == 2 and os.getpid() not in processes)
    assert {path.name for path in private(world, name).iterdir()} >= {"0000000-0000003", "0000008-0000008"}
