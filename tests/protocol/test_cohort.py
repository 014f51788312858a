"""M2: who is admitted, who is refused and why, who is drawn, and who can open what the publisher delivers."""

import io
import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from eth_account import Account
from eth_utils import keccak
from PIL import Image

from blocks.artifacts import MissingArtifact, TamperedArtifact
from blocks.connections import connections_of
from blocks.identity import create_home
from contracts.messages import (
    Abort,
    AbortReason,
    Announcement,
    Challenge,
    ChallengeAnswer,
    Cohort,
    Delivery,
    KeyPossession,
    Registration,
    draw_seed,
    struct_hash,
)
from contracts.sending import Reverted
from tasks.cohort import FULL, MAX_PROOF_BYTES, STAKE_GONE, TakesNoPart, draw, fixed_weights
from tasks.crypto import ecies
from tasks.delivery import delivered_requirement, delivered_validation, delivery_context
from tasks.learning.datasets import Dataset, InvalidDataset, decode_npz, encode_npz, load_ready
from tasks.publish import content_key, published_task, secrets_of
from tasks.records import BadRecord
from tasks.samples import (
    DatasetMismatch,
    DatasetProof,
    check_opening,
    check_proof,
    load_samples,
    open_leaves,
    parse_proof,
    prove,
)
from tests.protocol.world import MINERS, TASK_ID, World, task_file

CULPRIT = "miner-2"
OTHERS = tuple(name for name in MINERS if name != CULPRIT)


def give_data(world: World, name: str, data: bytes) -> None:
    (world.stack.homes[name] / "data.npz").write_bytes(data)


def own_data(world: World, name: str) -> Dataset:
    return load_samples(world.stack.identity(name), world.file.dataset, "train")


def own_proof(world: World, name: str) -> DatasetProof:
    return prove(world.stack.identity(name), TASK_ID, world.file.dataset, own_data(world, name))


def register_with(world: World, name: str, proof: bytes | None = None, **fields: object) -> None:
    """Register as the client does, with another proof or other fields, properly signed."""
    st = world.station(name)
    data = own_proof(world, name).model_dump_json().encode() if proof is None else proof
    registration = Registration(
        task_id=TASK_ID,
        round_number=0,
        miner=st.address,
        encryption_key=st.me.encryption_key,
        dataset_proof_sha256=st.store.put(st.address, data).sha256,
        stake_wei=world.file.money.minimum_stake_wei,
    ).model_copy(update=fields)
    world.contracts_as(name).stakes.deposit_stake(amount_wei=registration.stake_wei)
    st.post(registration)


def form(world: World, *, after: str = "prove-dataset", silent: tuple[str, ...] = ()) -> Cohort | Abort:
    """What is left of M2 after a step. The silent ones do not answer."""
    if after == "publish":
        for name in MINERS:
            if name not in silent:
                world.do("register", name)
    if after in ("publish", "register"):
        world.do("challenge", "publisher")
    if after != "prove-dataset":
        for name in MINERS:
            if name not in silent:
                world.do("prove-dataset", name)
    return world.do("form-cohort", "publisher")


def reasons(world: World, cohort: Cohort | Abort) -> dict[str, str]:
    """Whom the publisher refused, and why; the others are in."""
    assert isinstance(cohort, Cohort), cohort
    why = {world.name(miner): reason for miner, reason in zip(cohort.refused, cohort.reasons, strict=True)}
    assert {world.name(miner) for miner in cohort.miners} == set(MINERS) - set(why)
    assert world.cohort() == cohort
    return why


# Admission


def test_fitting_miners_are_admitted_in_address_order(world_after):
    world = world_after("form-cohort")
    cohort = world.cohort()
    assert cohort.refused == cohort.reasons == ()
    assert {world.name(miner) for miner in cohort.miners} == set(MINERS)
    assert list(cohort.miners) == sorted(cohort.miners, key=lambda miner: int(miner, 16))
    assert cohort.miners == world.contracts.stakes.get_cohort(TASK_ID).miners
    assert cohort.publisher_key == world.stack.identity("publisher").encryption_key
    for miner, name in zip(cohort.miners, cohort.registrations, strict=True):
        assert struct_hash(world.find(Registration, world.name(miner), 0)) == name


def test_the_weights_follow_from_the_registered_sample_counts(world_after):
    world = world_after("form-cohort")
    cohort = world.cohort()
    counts = [len(own_data(world, world.name(miner))) for miner in cohort.miners]
    assert cohort.weights == fixed_weights(world.file.spec(), counts)
    assert max(cohort.weights) <= world.file.participants.weight_levels
    assert len(set(cohort.weights)) > 1


def test_forming_the_cohort_again_gives_the_same(world_after):
    world = world_after("form-cohort")
    assert world.do("form-cohort", "publisher") == world.cohort()
    for step in ("register", "prove-dataset"):
        for name in MINERS:
            assert world.do(step, name)
    assert world.contracts.stakes.stake_of(world.address("miner-1")) == world.file.money.minimum_stake_wei


def test_of_too_many_the_one_with_the_least_stake_is_refused(world_after):
    world = world_after("publish", participants__miners_max=4)
    world.do("register", CULPRIT)
    for name in OTHERS:
        register_with(world, name, stake_wei=world.file.money.minimum_stake_wei + 1)
    assert reasons(world, form(world, after="register")) == {CULPRIT: FULL}


def test_too_little_stake_offered_is_refused_and_the_others_go_on(world_after):
    world = world_after("publish")
    register_with(world, CULPRIT, stake_wei=world.file.money.minimum_stake_wei - 1)
    for name in OTHERS:
        world.do("register", name)
    why = reasons(world, form(world, after="register", silent=(CULPRIT,)))
    assert list(why) == [CULPRIT]
    assert "it offers a stake of 999 wei, the task asks for 1000" in why[CULPRIT]


def test_a_challenge_asks_for_leaves_that_nobody_could_foresee(world_after):
    world = world_after("challenge")
    asked = {name: world.find(Challenge, "publisher", 0, about=world.address(name)).leaves for name in MINERS}
    for name, leaves in asked.items():
        assert len(set(leaves)) == world.file.dataset.challenged_leaves
        assert list(leaves) == sorted(leaves)
        assert max(leaves) < len(own_data(world, name))
    assert len(set(asked.values())) == len(MINERS)
    world.do("challenge", "publisher")  # a retry asks the same
    assert asked == {name: world.find(Challenge, "publisher", 0, about=world.address(name)).leaves for name in MINERS}


# At the miner, before anything is spent


def other_data(dataset: Dataset, kind: str) -> bytes:
    features, labels = dataset.features, dataset.labels
    return {
        "classes": lambda: encode_medmnist(np.zeros((20, 8, 8)), np.full(20, 10)),
        "shape": lambda: encode_npz(Dataset(features[:, :, :7], labels, 10)),
        "samples": lambda: encode_npz(Dataset(features[:9], labels[:9], 10)),
        "no archive": lambda: b"not an archive",
    }[kind]()


def encode_medmnist(images: np.ndarray, labels: np.ndarray) -> bytes:
    """As MedMNIST has it: uint8 images and labels of shape (n, 1), in three splits."""
    buffer = io.BytesIO()
    arrays = {}
    for number, split in enumerate(("train", "val", "test")):
        arrays[f"{split}_images"] = images[number:].astype(np.uint8)
        arrays[f"{split}_labels"] = labels[number:].reshape(-1, 1).astype(np.uint8)
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        ("classes", InvalidDataset, "10"),
        ("shape", DatasetMismatch, r"input_shape = \(1, 7, 8\): the task asks for \(1, 8, 8\)"),
        ("samples", DatasetMismatch, "sample_count = 9: the task asks for at least 10"),
        ("no archive", InvalidDataset, "npz"),
    ],
)
def test_data_that_does_not_fit_is_refused_at_the_miner_before_anything_is_spent(world_after, kind, error, says):
    world = world_after("publish")
    give_data(world, CULPRIT, other_data(own_data(world, CULPRIT), kind))
    before = world.balance_wei(CULPRIT)
    with pytest.raises(error, match=says):
        world.do("register", CULPRIT)
    assert world.balance_wei(CULPRIT) == before
    assert world.contracts.stakes.stake_of(world.address(CULPRIT)) == 0
    assert world.find(Registration, CULPRIT, 0) is None
    assert reasons_of_absence(world, form(world, after="publish", silent=(CULPRIT,))) == {CULPRIT}


def reasons_of_absence(world: World, cohort: Cohort | Abort) -> set[str]:
    assert isinstance(cohort, Cohort)
    assert cohort.refused == ()
    return set(MINERS) - {world.name(miner) for miner in cohort.miners}


def test_registering_adds_the_stake_that_is_missing(world_after):
    world = world_after("publish")
    stakes = world.contracts_as(CULPRIT).stakes
    stakes.deposit_stake(amount_wei=world.file.money.minimum_stake_wei - 1)
    world.do("register", CULPRIT)  # adds what is missing, and no more
    assert world.contracts.stakes.stake_of(world.address(CULPRIT)) == world.file.money.minimum_stake_wei
    assert reasons(world, form(world, after="publish")) == {}


# What a host's owner has agreed to


def pin(world: World, name: str, **changes: object) -> None:
    """Write other limits into a host's home, as its owner may."""
    me = world.stack.identity(name)
    connections_of(me).model_copy(update=changes).pin(me)


@pytest.mark.parametrize(
    ("pinned", "says"),
    [
        ({"publishers": ("0x" + "1" * 40,)}, r"publisher 0x\w+ is none of this host's \(0x1+\)\. .* healchain join"),
        ({"publishers": ()}, r"is none of this host's \(nobody\)\. .* publishers in connections.json"),
        (
            {"most_stake_wei": 999},
            r"money.minimum_stake_wei = 1000: .* at most 999 wei in one task\. .*--most-stake ETHER",
        ),
        ({"most_deposit_wei": 999}, r"with 1000 wei more, 1000 wei are staked: .* at most 999 wei for all tasks\. "),
    ],
)
def test_a_host_stakes_for_its_own_publishers_and_within_its_limits_only(world_after, pinned, says):
    """Whoever runs its step: it spends nothing, signs nothing, and the task goes on without it."""
    world = world_after("publish")
    agreed = connections_of(world.stack.identity(CULPRIT))
    pin(world, CULPRIT, **pinned)
    before = world.balance_wei(CULPRIT)
    with pytest.raises(TakesNoPart, match=says) as caught:
        world.do("register", CULPRIT)
    assert len(str(caught.value)) < 250  # what a scheduler's message keeps of it
    assert world.balance_wei(CULPRIT) == before
    assert world.find(Registration, CULPRIT, 0) is None
    agreed.pin(world.stack.identity(CULPRIT))
    assert world.do("register", CULPRIT).stake_wei == 1000


def test_limits_that_a_task_reaches_exactly_are_kept(world_after):
    world = world_after("publish")
    pin(world, CULPRIT, most_stake_wei=1000, most_deposit_wei=1000)
    world.do("register", CULPRIT)
    world.contracts_as(CULPRIT).stakes.request_withdrawal(1)
    world.forget(Registration, CULPRIT, 0)
    world.do("register", CULPRIT)  # what leaves the stake makes room for as much
    assert world.contracts.stakes.available_stake(world.address(CULPRIT)) == 1000
    pin(world, CULPRIT, most_deposit_wei=0)
    world.do("register", CULPRIT)  # nothing is deposited: what is there is enough


def test_a_host_shows_no_data_in_a_strangers_task(world_after):
    world = world_after("challenge")
    pin(world, CULPRIT, publishers=(world.address("miner-1"),))
    with pytest.raises(TakesNoPart, match="is none of this host's"):
        world.do("prove-dataset", CULPRIT)
    assert world.find(ChallengeAnswer, CULPRIT, 0) is None
    assert set(reasons(world, form(world, silent=(CULPRIT,), after="challenge"))) == {CULPRIT}


def test_stake_that_is_asked_back_after_registering_is_too_little_and_the_others_go_on(world_after):
    world = world_after("prove-dataset")
    world.contracts_as(CULPRIT).stakes.request_withdrawal(1)
    why = reasons(world, form(world))
    assert list(why) == [CULPRIT]
    assert "stake" in why[CULPRIT]


def test_whoever_takes_its_stake_away_in_the_last_moment_does_not_stop_the_others(world_after, monkeypatch):
    world = world_after("prove-dataset")
    from tasks import cohort

    def checked_then_gone(stakes, spec, applicant):
        if applicant.miner == world.address(CULPRIT):
            world.contracts_as(CULPRIT).stakes.request_withdrawal(1)
        return applicant

    monkeypatch.setattr(cohort, "check_stake", checked_then_gone)
    assert reasons(world, form(world)) == {CULPRIT: STAKE_GONE}


# A proof that is none


def changed_proof(**fields: object):
    return lambda proof: proof.model_copy(update=fields).model_dump_json().encode()


@pytest.mark.parametrize(
    ("proof", "says"),
    [
        (lambda proof: b"", "does not parse"),
        (lambda proof: b"\xff\xfe", "does not parse"),
        (lambda proof: b"{}", "does not parse"),
        (lambda proof: b"[" * 100_000, "does not parse"),
        (changed_proof(dataset="faces"), "dataset = 'faces': the task asks for 'digits'"),
        (changed_proof(input_shape=(3, 8, 8)), "input_shape = (3, 8, 8)"),
        (changed_proof(histogram=(5, 5), sample_count=10), "classes = 2: the task asks for 10"),
        (changed_proof(histogram=(1,) * 9 + (0,), sample_count=9), "sample_count = 9"),
        (changed_proof(histogram=(1,) * 10, sample_count=11), "does not sum to sample_count = 11"),
        (changed_proof(histogram=(-1, 21) + (0,) * 8, sample_count=20), "does not sum"),
        (changed_proof(sample_count=2**32), "does not parse"),
        (changed_proof(root="0x12"), "does not parse"),
    ],
)
def test_a_proof_that_does_not_fit_is_refused(proven, proof, says):
    check_proof(task_file().dataset, parse_proof(changed_proof()(proven[0])))
    with pytest.raises(DatasetMismatch) as refused:
        check_proof(task_file().dataset, parse_proof(proof(proven[0])))
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("proof", "says"),
    [
        (lambda proof: b"not JSON", "does not parse"),
        (lambda proof: b"0" * (MAX_PROOF_BYTES + 1), f"at most {MAX_PROOF_BYTES}"),
        (changed_proof(histogram=(1,) * 9 + (0,), sample_count=9), "sample_count = 9"),
    ],
    ids=["no JSON", "oversized", "too few samples"],
)
def test_whose_proof_does_not_fit_is_refused_and_the_others_go_on(world_after, proof, says):
    world = world_after("publish")
    register_with(world, CULPRIT, proof(own_proof(world, CULPRIT)))
    for name in OTHERS:
        world.do("register", name)
    why = reasons(world, form(world, after="register", silent=(CULPRIT,)))
    assert list(why) == [CULPRIT]
    assert says in why[CULPRIT]


@pytest.mark.parametrize(
    "fields", [{"dataset": "x" * 400_000}, {"input_shape": (1,) * 200_000}], ids=["long name", "long shape"]
)
def test_a_refusal_does_not_repeat_megabytes_of_the_proof(world_after, fields):
    """The cohort is one small record: a reason that does not fit into it would stop everybody."""
    world = world_after("publish")
    register_with(world, CULPRIT, changed_proof(**fields)(own_proof(world, CULPRIT)))
    for name in OTHERS:
        world.do("register", name)
    why = reasons(world, form(world, after="register", silent=(CULPRIT,)))
    assert list(why) == [CULPRIT]
    assert len(why[CULPRIT]) < 2000


@pytest.mark.parametrize("key", ["0x", "0x02" + "ff" * 32, "0x05" + "11" * 32, "0x04" + "11" * 64, "0x02" + "11" * 31])
def test_an_encryption_key_that_is_no_point_is_refused(world_after, key):
    world = world_after("publish")
    register_with(world, CULPRIT, encryption_key=key)
    for name in OTHERS:
        world.do("register", name)
    assert list(reasons(world, form(world, after="register", silent=(CULPRIT,)))) == [CULPRIT]


def test_a_registration_that_changes_after_the_challenge_is_refused(world_after):
    world = world_after("prove-dataset")
    registration = world.find(Registration, CULPRIT, 0)
    swapped = registration.model_copy(update={"encryption_key": world.stack.identity("miner-1").encryption_key})
    world.forge(swapped, signer=CULPRIT, r=0)
    assert reasons(world, form(world)) == {CULPRIT: "the registration is not the one that was challenged"}


def test_whoever_copies_an_encryption_key_harms_only_itself(world_after):
    world = world_after("publish")
    register_with(world, CULPRIT, encryption_key=world.stack.identity("miner-1").encryption_key)
    for name in OTHERS:
        world.do("register", name)
    why = reasons(world, form(world, after="register"))
    assert why == {CULPRIT: "the answer is not signed with the encryption key that was registered"}


def test_two_who_own_one_encryption_key_do_not_both_get_in(world_after):
    world = world_after("publish")
    shared = world.stack.homes["miner-1"] / "keystore" / "encryption.json"
    st = world.station(CULPRIT)
    secret = Account.decrypt(shared.read_text(), (world.stack.homes["miner-1"] / "passphrase").read_text())
    passphrase = (world.stack.homes[CULPRIT] / "passphrase").read_text()
    copied = Account.encrypt(secret, passphrase, kdf="scrypt", iterations=2)
    (world.stack.homes[CULPRIT] / "keystore" / "encryption.json").write_text(json.dumps(copied))
    assert st.me.encryption_key == world.stack.identity("miner-1").encryption_key
    for name in MINERS:
        world.do("register", name)
    why = reasons(world, form(world, after="register"))
    assert list(why.values()) == ["the encryption key is another party's"]
    assert set(why) < {CULPRIT, "miner-1"}


def test_a_registration_signed_by_somebody_else_is_refused(world_after):
    world = world_after("register")
    world.forge(world.find(Registration, CULPRIT, 0), signer="miner-1", as_name=CULPRIT, r=0)
    assert "is signed by" in reasons(world, form(world, after="register", silent=(CULPRIT,)))[CULPRIT]


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_proof_that_is_not_in_the_store_as_it_was_is_refused(world_after, damage):
    world = world_after("register")
    digest = world.find(Registration, CULPRIT, 0).dataset_proof_sha256
    blob = next((world.folder / "store").rglob(digest[2:]))
    blob.unlink() if damage == "missing" else blob.write_bytes(blob.read_bytes()[:-1])
    why = reasons(world, form(world, after="register", silent=(CULPRIT,)))
    assert {"missing": "is not in the store", "truncated": "truncated or changed"}[damage] in why[CULPRIT]


def test_a_missing_registration_is_refused(world_after):
    world = world_after("register")
    world.record_file(Registration, CULPRIT, 0).unlink()
    assert reasons_of_absence(world, form(world, after="register", silent=(CULPRIT,))) == {CULPRIT}


# The challenge


def answer_with(world: World, name: str, data: bytes, **fields: object) -> None:
    st = world.station(name)
    challenge = world.find(Challenge, "publisher", 0, about=st.address)
    answer = ChallengeAnswer(
        task_id=TASK_ID,
        round_number=0,
        miner=st.address,
        challenge=struct_hash(challenge),
        paths_sha256=st.store.put(st.address, data).sha256,
        key_signature=st.me.sign_as_key_owner(
            KeyPossession(task_id=TASK_ID, round_number=0, miner=st.address, challenge=struct_hash(challenge)),
            st.domain,
        ),
    )
    world.forge(answer.model_copy(update=fields), signer=name, r=0)


def opened(world: World, name: str) -> list[dict]:
    leaves = world.find(Challenge, "publisher", 0, about=world.address(name)).leaves
    return json.loads(open_leaves(world.stack.identity(name), TASK_ID, own_data(world, name), leaves))


def lying_proof(world: World) -> tuple[DatasetProof, int]:
    """All samples announced in the class of which there are fewest; all leaves can be challenged."""
    proof = own_proof(world, CULPRIT)
    rare = int(np.argmin(proof.histogram))
    histogram = tuple(proof.sample_count if label == rare else 0 for label in range(10))
    return proof.model_copy(update={"histogram": histogram}), rare


def test_a_proof_that_lies_about_the_histogram_is_caught_by_the_challenge(world_after):
    world = world_after("publish", dataset__challenged_leaves=256)
    proof, rare = lying_proof(world)
    register_with(world, CULPRIT, proof.model_dump_json().encode())
    for name in OTHERS:
        world.do("register", name)
    why = reasons(world, form(world, after="register"))
    assert list(why) == [CULPRIT]
    assert f"the histogram says {rare}" in why[CULPRIT]


def test_an_answer_that_repeats_the_lie_is_not_in_the_tree(world_after):
    world = world_after("publish", dataset__challenged_leaves=256)
    proof, rare = lying_proof(world)
    register_with(world, CULPRIT, proof.model_dump_json().encode())
    for name in OTHERS:
        world.do("register", name)
    world.do("challenge", "publisher")
    answer_with(world, CULPRIT, json.dumps([{**leaf, "label": rare} for leaf in opened(world, CULPRIT)]).encode())
    for name in OTHERS:
        world.do("prove-dataset", name)
    assert "is not in the tree of the registered root" in reasons(world, form(world))[CULPRIT]


@pytest.fixture(scope="module")
def proven(tmp_path_factory) -> tuple[DatasetProof, tuple[int, ...], list[dict]]:
    """A miner's proof, the leaves it is asked for, and how it opens them."""
    me, dataset, asked = create_home(tmp_path_factory.mktemp("me") / "home"), some_digits(0, 60), (1, 20, 59)
    opening = json.loads(open_leaves(me, TASK_ID, dataset, asked))
    return prove(me, TASK_ID, task_file().dataset, dataset), asked, opening


def other_hex(text: str) -> str:
    return text[:-1] + ("0" if text[-1] != "0" else "1")


def with_first(leaves: list[dict], **fields: object) -> list[dict]:
    return [{**leaves[0], **fields}, *leaves[1:]]


@pytest.mark.parametrize(
    ("forged", "says"),
    [
        (lambda leaves: with_first(leaves, sample_hash=other_hex(leaves[0]["sample_hash"])), "is not in the tree"),
        (lambda leaves: with_first(leaves, path=leaves[0]["path"][:-1]), "is not in the tree"),
        (lambda leaves: with_first(leaves, path=[*leaves[0]["path"], "0x" + "00" * 32]), "is not in the tree"),
        (lambda leaves: with_first(leaves, path=leaves[0]["path"][::-1]), "is not in the tree"),
        (lambda leaves: with_first(leaves, path=[]), "is not in the tree"),
        (lambda leaves: with_first(leaves, index=leaves[1]["index"]), "were challenged"),
        (lambda leaves: with_first(leaves, index=-1), "were challenged"),
        (lambda leaves: with_first(leaves, index=10**30), "were challenged"),
        (lambda leaves: with_first(leaves, label=-1), "has class -1"),
        (lambda leaves: with_first(leaves, label=10**30), "has class"),
        (lambda leaves: leaves[1:], "were challenged"),
        (lambda leaves: [*leaves, leaves[0]], "were challenged"),
        (lambda leaves: leaves[::-1], "were challenged"),
        (lambda leaves: [], "were challenged"),
        (lambda leaves: None, "do not parse"),
        (lambda leaves: {"leaves": leaves}, "do not parse"),
        (lambda leaves: with_first(leaves, sample_hash="0x12"), "do not parse"),
    ],
)
def test_leaves_that_are_not_opened_right_are_refused(proven, forged, says):
    proof, asked, leaves = proven
    check_opening(proof, asked, json.dumps(leaves).encode())
    with pytest.raises(DatasetMismatch) as refused:
        check_opening(proof, asked, json.dumps(forged(leaves)).encode())
    assert says in str(refused.value)


def test_whose_leaves_are_not_opened_right_is_refused_and_the_others_go_on(world_after):
    world = world_after("prove-dataset")
    leaves = opened(world, CULPRIT)
    answer_with(world, CULPRIT, json.dumps(with_first(leaves, path=[])).encode())
    why = reasons(world, form(world))
    assert list(why) == [CULPRIT]
    assert "is not in the tree" in why[CULPRIT]


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b"9" * 5000, b" " * (MAX_PROOF_BYTES + 1)], ids=lambda data: str(data[:4])
)
def test_an_answer_that_is_none_is_refused_and_the_others_go_on(world_after, data):
    world = world_after("prove-dataset")
    answer_with(world, CULPRIT, data)
    assert list(reasons(world, form(world))) == [CULPRIT]


def test_the_right_answer_forged_in_the_same_way_is_accepted(world_after):
    """The twin of the above: what they change is all that is wrong with them."""
    world = world_after("prove-dataset")
    answer_with(world, CULPRIT, json.dumps(opened(world, CULPRIT)).encode())
    assert reasons(world, form(world)) == {}


def test_a_missing_answer_is_refused(world_after):
    world = world_after("prove-dataset")
    world.record_file(ChallengeAnswer, CULPRIT, 0).unlink()
    assert "has not posted" in reasons(world, form(world))[CULPRIT]


def test_an_answer_for_another_challenge_is_refused(world_after):
    world = world_after("prove-dataset")
    answer_with(world, CULPRIT, json.dumps(opened(world, CULPRIT)).encode(), challenge="0x" + "ab" * 32)
    assert reasons(world, form(world)) == {CULPRIT: "the answer is for another challenge"}


@pytest.mark.parametrize(
    ("signature", "says"),
    [
        ("0x", "is malformed"),
        ("0x" + "11" * 64 + "1c", "encryption key"),
        ("0x" + "00" * 64 + "1b", "is malformed"),
    ],
)
def test_an_answer_without_the_encryption_keys_signature_is_refused(world_after, signature, says):
    world = world_after("prove-dataset")
    answer_with(world, CULPRIT, json.dumps(opened(world, CULPRIT)).encode(), key_signature=signature)
    assert says in reasons(world, form(world))[CULPRIT]


def test_another_miners_answer_is_refused(world_after):
    world = world_after("prove-dataset")
    world.forge(world.find(ChallengeAnswer, "miner-1", 0), signer="miner-1", as_name=CULPRIT, r=0)
    assert "is signed by" in reasons(world, form(world))[CULPRIT]


def test_other_samples_than_those_registered_do_not_open_the_leaves(world_after):
    world = world_after("challenge")
    dataset = own_data(world, CULPRIT)
    give_data(world, CULPRIT, encode_npz(Dataset(1 - dataset.features, dataset.labels, 10)))
    for name in MINERS:
        world.do("prove-dataset", name)
    assert "is not in the tree" in reasons(world, form(world))[CULPRIT]


def test_an_answer_shows_hashes_and_no_sample(world_after):
    world = world_after("prove-dataset")
    leaves = opened(world, CULPRIT)
    assert {key for leaf in leaves for key in leaf} == {"index", "label", "sample_hash", "path"}
    again = prove(create_home(world.folder / "twin"), TASK_ID, world.file.dataset, own_data(world, CULPRIT))
    assert again.root != own_proof(world, CULPRIT).root  # salted: the same samples elsewhere are not recognised


NESTED = """
import blocks.local_chain  # loads py-evm, which lifts the limit of recursion
from contracts.messages import Domain, Receipt
from tasks.records import BadRecord, check_record
from tasks.samples import DatasetMismatch, DatasetProof, check_opening
deep = b"[" * 200_000
proof = DatasetProof(dataset="d", sample_count=2, histogram=(1, 1), input_shape=(1,), root="0x" + "00" * 32)
nobody = "0x" + "11" * 20
for check, refusal in (
    (lambda: check_record(Receipt, deep, Domain(1, nobody), nobody, "a-task", 0), BadRecord),
    (lambda: check_opening(proof, (0,), deep), DatasetMismatch),
):
    try:
        check()
    except refusal:
        print("refused", flush=True)
"""


def test_deeply_nested_json_of_a_stranger_is_refused_and_ends_no_process():
    """In a process of its own: a parser that recurses overflows the stack, which no `except` can catch."""
    done = subprocess.run([sys.executable, "-c", NESTED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["refused", "refused"]), done.stderr[-300:]


def test_checking_an_answer_takes_no_memory_for_the_samples_that_a_proof_claims():
    count = 20_000_000
    proof = DatasetProof(
        dataset="digits",
        sample_count=count,
        histogram=(count,) + (0,) * 9,
        input_shape=(1, 8, 8),
        root="0x" + "00" * 32,
    )
    leaf = {"index": 5, "label": 0, "sample_hash": "0x" + "11" * 32, "path": []}
    tracemalloc.start()
    with pytest.raises(DatasetMismatch, match="is not in the tree"):
        check_opening(proof, (5,), json.dumps([leaf]).encode())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


# Too few


def test_too_few_fitting_miners_end_the_task_with_every_reason(world_after):
    world = world_after("prove-dataset")
    for name in ("miner-1", CULPRIT):
        world.record_file(ChallengeAnswer, name, 0).unlink()
    abort = form(world)
    assert isinstance(abort, Abort)
    assert abort.reason == AbortReason.NOT_ENOUGH_MINERS
    assert "3 of at least 4 miners qualified" in abort.detail
    for name in ("miner-1", CULPRIT):
        assert f"{world.address(name)}: {world.address(name)} has not posted" in abort.detail
    assert world.contracts.stakes.get_cohort(TASK_ID).miners == ()
    assert world.do("form-cohort", "publisher") == abort  # also when asked again
    assert world.do("deliver", "publisher") is None


def test_nobody_at_all_ends_the_task(world_after):
    abort = form(world_after("publish"), after="publish", silent=MINERS)
    assert isinstance(abort, Abort)
    assert "0 of at least 4 miners qualified (nobody else registered)" in abort.detail


def test_just_enough_go_on(world_after):
    world = world_after("prove-dataset")
    world.record_file(ChallengeAnswer, CULPRIT, 0).unlink()
    assert list(reasons(world, form(world))) == [CULPRIT]


def test_an_answer_that_comes_after_the_chain_closed_changes_nothing(world_after):
    """The publisher was killed after closing; what came in meanwhile is late, and the run goes on."""
    world = world_after("prove-dataset")
    closed = sorted((world.address(name) for name in OTHERS), key=lambda miner: int(miner, 16))
    applications = [world.application(miner) for miner in closed]
    world.contracts_as("publisher").stakes.close_registration(TASK_ID, applications)
    cohort = form(world)
    assert isinstance(cohort, Cohort)
    assert list(cohort.miners) == closed
    assert list(cohort.refused) == [world.address(CULPRIT)]


# The draw


def test_the_draw_can_be_recomputed_from_the_chain(world_after):
    world = world_after("form-cohort")
    stakes = world.contracts.stakes
    result, on_chain = stakes.get_draw(TASK_ID), stakes.get_cohort(TASK_ID)
    block = world.chain.web3.eth.get_block(result.seed_block)
    seed = keccak(TASK_ID.encode() + bytes(block["hash"]))
    assert seed == draw_seed(TASK_ID, bytes(block["hash"]))
    assert "0x" + seed.hex() == result.seed == world.cohort().draw_seed
    assert (
        draw(seed, on_chain.miners, on_chain.stakes_wei) == world.cohort().aggregator == stakes.aggregator_of(TASK_ID)
    )
    assert result.replaced == 0


def test_the_seed_is_of_a_block_after_registration_closed(world_after):
    world = world_after("form-cohort")
    closing = next(done for done in world.chain.transactions(TASK_ID) if done.kind == "closeRegistration")
    assert world.contracts.stakes.get_draw(TASK_ID).seed_block > closing.block_number


def test_nobody_draws_again(world_after):
    world = world_after("form-cohort")
    before = world.cohort().aggregator
    with pytest.raises(Reverted, match="AlreadyDrawn"):
        world.contracts_as("publisher").stakes.draw_aggregator(TASK_ID)
    assert world.contracts.stakes.aggregator_of(TASK_ID) == before


ADDRESSES = tuple("0x" + f"{number:02d}" * 20 for number in range(1, 6))


@pytest.mark.parametrize("stakes", [(1, 1, 1, 1, 1), (5, 0, 3, 1, 7), (0, 0, 9, 0, 0), (1, 2, 3, 4, 90)])
def test_every_ticket_falls_on_one_miner_and_a_stake_has_as_many_tickets_as_wei(stakes):
    tickets = [draw(ticket.to_bytes(32, "big"), ADDRESSES, stakes) for ticket in range(sum(stakes))]
    assert Counter(tickets) == {miner: stake for miner, stake in zip(ADDRESSES, stakes, strict=True) if stake}
    assert tickets == sorted(tickets)
    assert draw(sum(stakes).to_bytes(32, "big"), ADDRESSES, stakes) == tickets[0]


def test_the_draw_is_in_proportion_to_stake():
    stakes, count = (10**18, 2 * 10**18, 3 * 10**18, 4 * 10**18, 10**19), 4000
    drawn = Counter(draw(keccak(number.to_bytes(8, "big")), ADDRESSES, stakes) for number in range(count))
    expected = [count * stake / sum(stakes) for stake in stakes]
    chi_square = sum((drawn[miner] - mean) ** 2 / mean for miner, mean in zip(ADDRESSES, expected, strict=True))
    assert chi_square < 18.5  # 4 degrees of freedom: exceeded once in a thousand sets of seeds
    even = [count / 5] * 5
    assert sum((drawn[miner] - mean) ** 2 / mean for miner, mean in zip(ADDRESSES, even, strict=True)) > 500


def test_without_stake_there_is_nothing_to_draw():
    with pytest.raises((ValueError, ZeroDivisionError)):
        draw(b"\1" * 32, ADDRESSES, (0,) * 5)


# The delivery


def test_the_drawn_aggregator_opens_accuracy_salt_and_validation_set(world_after):
    world = world_after("deliver")
    st = world.station(world.aggregator)
    terms = published_task(st, TASK_ID)
    salt = secrets_of(world.station("publisher"), TASK_ID)["salt"]
    assert delivered_requirement(st, terms) == (world.file.required_accuracy_ppm, salt)
    validation = (world.stack.homes["publisher"] / "data.npz").read_bytes()
    assert encode_npz(delivered_validation(st, terms, 0)) == encode_npz(decode_npz(validation, "validation", 10))


def test_nobody_else_opens_the_delivery(world_after):
    world = world_after("deliver")
    delivery = world.find(Delivery, "publisher", 0, about=world.address(world.aggregator))
    publisher, context = world.address("publisher"), delivery_context(TASK_ID)
    identities = [world.stack.identity(name) for name in (*world.others, "publisher")]
    identities.append(create_home(world.folder / "outsider"))
    for identity in identities:
        for digest in (delivery.sealed_sha256, delivery.content_sha256):
            with pytest.raises(ecies.Unopenable):
                identity.open_sealed(world.store.get(publisher, digest), context)
    for name in world.others:
        with pytest.raises(MissingArtifact):
            delivered_validation(world.station(name), published_task(world.station(name), TASK_ID), 0)


def test_what_is_in_the_store_shows_neither_accuracy_nor_salt_nor_samples(world_after):
    world = world_after("deliver")
    fields = secrets_of(world.station("publisher"), TASK_ID)
    validation = (world.stack.homes["publisher"] / "data.npz").read_bytes()
    secrets = [fields["salt"].encode(), bytes.fromhex(fields["salt"]), fields["content_secret"].encode()]
    secrets += [bytes.fromhex(fields["content_secret"]), b"required_accuracy", b"accuracy_ppm", validation[200:400]]
    for path in (world.folder / "store").rglob("*"):
        if path.is_file():
            assert not any(secret in path.read_bytes() for secret in secrets), path


@pytest.mark.parametrize("artifact", ["sealed_sha256", "content_sha256"])
def test_a_tampered_delivery_is_refused(world_after, artifact):
    world = world_after("deliver")
    delivery = world.find(Delivery, "publisher", 0, about=world.address(world.aggregator))
    blob = next((world.folder / "store").rglob(getattr(delivery, artifact)[2:]))
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    st = world.station(world.aggregator)
    with pytest.raises(TamperedArtifact):
        delivered_validation(st, published_task(st, TASK_ID), 0)


def deliver_otherwise(world: World, fields: bytes | None = None, validation: bytes | None = None) -> None:
    """What a dishonest publisher delivers instead, properly sealed and signed."""
    st, aggregator = world.station("publisher"), world.stack.identity(world.aggregator)
    honest = world.find(Delivery, "publisher", 0, about=aggregator.address)
    context, changes = delivery_context(TASK_ID), {}
    if fields is not None:
        key = bytes.fromhex(aggregator.encryption_key[2:])
        sealed = ecies.seal(fields, key, ephemeral_seed=b"\5" * 48, context=context)
        changes["sealed_sha256"] = st.store.put(st.address, sealed).sha256
    if validation is not None:
        key = content_key(secrets_of(st, TASK_ID))
        sealed = ecies.seal(validation, key, ephemeral_seed=b"\6" * 48, context=context)
        changes["content_sha256"] = st.store.put(st.address, sealed).sha256
    world.forge(honest.model_copy(update=changes), signer="publisher", r=0, about=aggregator.address)


def test_a_publisher_who_delivers_another_validation_set_is_caught(world_after):
    world = world_after("deliver")
    deliver_otherwise(world, validation=(world.stack.homes["miner-1"] / "data.npz").read_bytes())
    st = world.station(world.aggregator)
    with pytest.raises(BadRecord, match="not the one that the task committed to"):
        delivered_validation(st, published_task(st, TASK_ID), 0)


@pytest.mark.parametrize("change", [{"salt": "00" * 32}, {"accuracy_ppm": 1}, {"salt": "00"}, {"accuracy_ppm": -1}])
def test_a_publisher_who_delivers_a_wrong_opening_is_caught(world_after, change):
    world = world_after("deliver")
    fields = {**secrets_of(world.station("publisher"), TASK_ID), **change}
    deliver_otherwise(world, fields=json.dumps(fields).encode())
    st = world.station(world.aggregator)
    with pytest.raises(BadRecord):
        delivered_requirement(st, published_task(st, TASK_ID))


@pytest.mark.parametrize(
    "fields", [b"", b"null", b"{}", b"[1]", b'{"content_secret": "xyz"}', b'{"content_secret": "00"}']
)
def test_a_delivery_of_nonsense_is_a_bad_record(world_after, fields):
    world = world_after("deliver")
    deliver_otherwise(world, fields=fields)
    st = world.station(world.aggregator)
    with pytest.raises(BadRecord):
        delivered_validation(st, published_task(st, TASK_ID), 0)


def test_the_same_delivery_sealed_anew_is_accepted(world_after):
    """The twin of the above."""
    world = world_after("deliver")
    kept = secrets_of(world.station("publisher"), TASK_ID)
    fields = {name: kept[name] for name in ("accuracy_ppm", "salt", "content_secret")}
    deliver_otherwise(world, fields=json.dumps(fields).encode())
    st = world.station(world.aggregator)
    assert delivered_requirement(st, published_task(st, TASK_ID))[0] == world.file.required_accuracy_ppm


def test_a_publisher_whose_validation_set_changed_delivers_nothing(world_after):
    world = world_after("form-cohort")
    give_data(world, "publisher", (world.stack.homes["miner-1"] / "data.npz").read_bytes())
    with pytest.raises(DatasetMismatch, match="restore it"):
        world.do("deliver", "publisher")
    assert world.find(Delivery, "publisher", 0, about=world.address(world.aggregator)) is None


def test_a_retry_delivers_the_same(world_after):
    world = world_after("deliver")
    about = world.address(world.aggregator)
    before = world.find(Delivery, "publisher", 0, about=about)
    world.do("deliver", "publisher")
    assert world.find(Delivery, "publisher", 0, about=about) == before


# The cohort as miners see it


def trains(world: World, name: str) -> None:
    world.do("train", name)
    world.do("submit", name)


CHANGES = {
    "another aggregator": lambda world, cohort: {
        "aggregator": world.address(world.others[0]),
        "aggregator_key": world.stack.identity(world.others[0]).encryption_key,
    },
    "a miner left out": lambda world, cohort: {
        "miners": cohort.miners[1:],
        "weights": cohort.weights[1:],
        "registrations": cohort.registrations[1:],
    },
    "a weight that singles a miner out": lambda world, cohort: {"weights": (60_000, *cohort.weights[1:])},
    "a weight of zero": lambda world, cohort: {"weights": (0, *cohort.weights[1:])},
    "the weights in another order": lambda world, cohort: {"weights": cohort.weights[::-1]},
    "too few weights": lambda world, cohort: {"weights": cohort.weights[1:]},
    "the publisher's own key in place of the aggregator's": lambda world, cohort: {
        "aggregator_key": cohort.publisher_key
    },
    "the registration of somebody else": lambda world, cohort: {
        "registrations": (cohort.registrations[1], *cohort.registrations[1:])
    },
    "another publisher's key than announced": lambda world, cohort: {
        "publisher_key": world.stack.identity("miner-1").encryption_key
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_cohort_is_refused_by_the_miners(world_after, change):
    """Signed by the publisher itself, or an old one that the store serves: before anything is encrypted."""
    world = world_after("deliver")
    cohort = world.cohort()
    fields = CHANGES[change](world, cohort)
    assert any(getattr(cohort, name) != value for name, value in fields.items())
    world.forge(cohort.model_copy(update=fields), signer="publisher", r=0)
    for name in world.others[:2]:
        with pytest.raises(BadRecord):
            trains(world, name)


def test_a_cohort_signed_by_another_than_the_publisher_is_refused(world_after):
    world = world_after("deliver")
    world.forge(world.cohort(), signer="miner-1", as_name="publisher", r=0)
    with pytest.raises(BadRecord, match="is signed by"):
        trains(world, world.others[0])


def test_the_cohort_as_it_was_is_accepted(world_after):
    """The twin of the above."""
    world = world_after("deliver")
    world.forge(world.cohort(), signer="publisher", r=0)
    trains(world, world.others[0])
    assert world.find(Announcement, "publisher", 0).encryption_key == world.cohort().publisher_key


def test_a_miner_outside_the_cohort_does_not_train(world_after):
    world = world_after("deliver", participants__miners_max=4)
    outside = next(name for name in MINERS if world.address(name) not in world.cohort().miners)
    with pytest.raises(BadRecord, match="is not in the cohort"):
        world.do("train", outside)


# A party's own data


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_images(folder: Path, dataset: Dataset) -> None:
    """Grey images of 16 x 16 pixels in one folder per class; every other a JPEG."""
    for index in range(len(dataset)):
        target = folder / NAMES[dataset.labels[index]] / (f"{index:04d}" + (".jpg" if index % 2 else ".PNG"))
        target.parent.mkdir(parents=True, exist_ok=True)
        pixels = (dataset.features[index, 0] * 255).astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
        Image.fromarray(pixels).save(target)


def link(world: World, name: str, path: Path) -> None:
    (world.stack.homes[name] / "data.link").write_text(str(path))


def some_digits(start: int, count: int) -> Dataset:
    return load_ready("digits").take(np.arange(start, start + count))


def as_medmnist(dataset: Dataset) -> bytes:
    return encode_medmnist(dataset.features[:, 0] * 255, dataset.labels)


def test_own_images_and_medmnist_files_take_part_by_a_link(world_after, tmp_path):
    world = world_after(None, dataset__class_names=list(NAMES))
    scans, file, held = tmp_path / "scans", tmp_path / "medmnist.npz", tmp_path / "held.npz"
    write_images(scans, some_digits(0, 120))
    (scans / "README.txt").write_text("not an image, and no class")
    file.write_bytes(as_medmnist(some_digits(200, 80)))
    held.write_bytes(as_medmnist(some_digits(400, 60)))
    for name, path in (("miner-1", scans), (CULPRIT, file), ("publisher", held)):
        link(world, name, path)
    world.through("deliver")
    cohort = world.cohort()
    assert cohort.refused == ()
    images, arrays = own_data(world, "miner-1"), own_data(world, CULPRIT)
    assert (len(images), images.input_shape, images.histogram()) == (120, (1, 8, 8), some_digits(0, 120).histogram())
    assert (len(arrays), arrays.input_shape) == (80, (1, 8, 8))
    assert arrays.histogram() == some_digits(200, 80).histogram()
    by_label = images.features[np.argsort(images.labels, kind="stable")]
    original = some_digits(0, 120)
    expected = original.features[np.argsort(original.labels, kind="stable")]
    assert np.abs(by_label - expected).mean() < 0.12  # resized and, half of them, compressed
    st = world.station(world.aggregator)
    assert len(delivered_validation(st, published_task(st, TASK_ID), 0)) == 59  # the file's split `val`
    trains(world, "miner-1")


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda folder: (folder / "ten").mkdir() or write_one(folder / "ten" / "x.png"), InvalidDataset, "class 'ten'"),
        (lambda folder: (folder / "one" / "x.png").write_bytes(b"not an image"), InvalidDataset, "expected an image"),
        (
            lambda folder: [path.unlink() for path in folder.rglob("*") if path.is_file()],
            InvalidDataset,
            "at least one",
        ),
    ],
    ids=["an unknown class", "a broken image", "no image"],
)
def test_an_image_folder_that_does_not_fit_is_refused_at_the_miner(world_after, tmp_path, damage, error, says):
    world = world_after("publish", dataset__class_names=list(NAMES))
    write_images(tmp_path / "scans", some_digits(0, 30))
    damage(tmp_path / "scans")
    link(world, CULPRIT, tmp_path / "scans")
    with pytest.raises(error, match=says):
        world.do("register", CULPRIT)
    assert world.contracts.stakes.stake_of(world.address(CULPRIT)) == 0


def write_one(path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)


def test_an_image_folder_needs_class_names_in_the_task(world_after, tmp_path):
    world = world_after("publish")
    write_images(tmp_path / "scans", some_digits(0, 30))
    link(world, CULPRIT, tmp_path / "scans")
    with pytest.raises(DatasetMismatch, match=r"dataset\.class_names"):
        world.do("register", CULPRIT)


def test_a_link_to_nowhere_is_named(world_after, tmp_path):
    world = world_after("publish")
    link(world, CULPRIT, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        world.do("register", CULPRIT)


def test_the_test_task_is_what_these_numbers_assume():
    file = task_file()
    assert (file.participants.miners_min, file.dataset.samples_min, file.dataset.classes) == (4, 10, 10)
