"""M2. Registration with dataset proof and stake, the publisher's challenge, the cohort, the draw, the delivery.

Algorithms 2, 2.1 and 2.3 of the protocol. The draw is computed by the contract from the hash of a block mined after
registration closed, and recomputed here (`draw`), as anybody can.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from prefect import task
from prefect.cache_policies import NO_CACHE

from blocks.artifacts import MissingArtifact, TamperedArtifact
from blocks.connections import connections_of
from contracts import bindings
from contracts.messages import (
    AbortReason,
    Address,
    Announcement,
    Bytes,
    Challenge,
    ChallengeAnswer,
    Cohort,
    KeyPossession,
    Registration,
    draw_seed,
    key_address,
    signer_of,
    struct_hash,
)
from contracts.sending import Reverted
from contracts.task_spec import PublishedTask, TaskSpec
from tasks.crypto import ecies
from tasks.delivery import deliver
from tasks.global_model import start_parameters
from tasks.learning.aggregation import public_weights
from tasks.publish import published_task, secrets_of
from tasks.records import BadRecord, Station, brief, give_up, record_path, station
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
from tasks.workload import check_workload, limits_of

MAX_PROOF_BYTES = 1 << 20
MAX_LISTED = 500  # refusals in one record, of at most 300 characters each: below the size of a record
STAKE_GONE = "it took its stake away while registration was being closed"
FULL = "the cohort is full: miners with more stake come first"


class TakesNoPart(ValueError):
    """This host does not stake in a task; the message names what its owner has pinned, and how to change it."""


@dataclass(frozen=True)
class Applicant:
    """A miner who posted a registration, with its signature and proof, or the reason why it is refused."""

    miner: Address
    registration: Registration | None = None
    signature: Bytes = ""
    proof: DatasetProof | None = None
    refused: str = ""


def draw(seed: bytes, cohort: Sequence[Address], stakes_wei: Sequence[int]) -> Address:
    """The aggregator: drawn in proportion to stake, from the candidates in address order (2.1)."""
    ticket = int.from_bytes(seed, "big") % sum(stakes_wei)
    for miner, stake in zip(cohort, stakes_wei, strict=True):
        if ticket < stake:
            return miner
        ticket -= stake
    raise ValueError("no stake to draw from")


def fixed_weights(spec: TaskSpec, sample_counts: Sequence[int]) -> tuple[int, ...]:
    """Public weights y from the registered sample counts; their ratio is capped by weight_levels."""
    levels = spec.participants.weight_levels
    return tuple(public_weights(list(sample_counts), levels, levels))


def trusted_cohort(st: Station, task_id: str) -> Cohort:
    """The cohort, believed only as far as the chain and the parties' own signatures go. Raises BadRecord.

    The publisher signs this record, and it must not matter: whose keys the masks are agreed with and how much each update
    weighs decide who can read it. So the members and the aggregator are those of the contract, every registration is the
    one on chain, the keys are those that their owners signed, no two parties share one, and the weights follow from the
    registered sample counts.
    """
    terms, contracts = published_task(st, task_id), st.chain.contracts()
    cohort = st.need(Cohort, terms.publisher, task_id)
    on_chain = contracts.stakes.get_cohort(task_id)
    if cohort.miners != on_chain.miners or cohort.aggregator != contracts.stakes.aggregator_of(task_id):
        raise BadRecord(f"the publisher's cohort of {task_id} is not the one on chain")
    if not len(cohort.miners) >= terms.spec.participants.miners_min:
        raise BadRecord(
            f"{len(cohort.miners)} miners were admitted, the terms ask for {terms.spec.participants.miners_min}"
        )
    registrations = []
    if cohort.registrations != on_chain.registrations:
        raise BadRecord("the cohort names other registrations than the chain")
    for miner, name in zip(cohort.miners, cohort.registrations, strict=True):
        registration = st.need(Registration, miner, task_id)
        if struct_hash(registration) != name:
            raise BadRecord(f"the registration of {miner} is not the one on chain")
        registrations.append(registration)
    keys = [registration.encryption_key for registration in registrations]
    if cohort.publisher_key != st.need(Announcement, terms.publisher, task_id).encryption_key:
        raise BadRecord("the cohort has another key of the publisher than its announcement")
    if cohort.aggregator_key != keys[cohort.miners.index(cohort.aggregator)]:
        raise BadRecord("the cohort has another key of the aggregator than it registered")
    if len({*keys, cohort.publisher_key}) != len(keys) + 1:
        raise BadRecord("two parties share an encryption key")
    counts = [registered_samples(st, registration) for registration in registrations]
    if cohort.weights != fixed_weights(terms.spec, counts):
        raise BadRecord("the weights do not follow from the registered sample counts")
    return cohort


def registered_samples(st: Station, registration: Registration) -> int:
    """Number of samples that a miner registered. Raises BadRecord when its proof is gone or is none."""
    try:
        data = st.store.get(registration.miner, registration.dataset_proof_sha256, max_bytes=MAX_PROOF_BYTES)
        return parse_proof(data).sample_count
    except (MissingArtifact, TamperedArtifact, DatasetMismatch) as error:
        raise BadRecord(f"dataset proof of {registration.miner}: {brief(error)}") from error


@task(persist_result=False, cache_policy=NO_CACHE)
def apply_for_task(task_id: str, actor: str) -> dict[str, str]:
    """M2, a miner: check its own data, stake what the task asks for, register with the dataset proof.

    The signed registration is also the consent to be taken into the cohort: with it the publisher has the contract hold the
    stake. So it is signed only for a task that the chain has, under terms that were read from it, of a publisher and with a
    stake that the host's owner has agreed to. Raises TakesNoPart.
    """
    st = station(actor)
    terms = agreed_task(st, task_id)
    spec = terms.spec
    # What cannot be read or run is noticed before anything is staked.
    if spec.model.start is not None:
        start_parameters(spec, st.store)
    if spec.workload is not None:
        check_workload(spec, st, terms.publisher, limits_of(spec, st.me))
    dataset = load_samples(st.me, spec.dataset, "train")
    proof = prove(st.me, task_id, spec.dataset, dataset)
    reference = st.store.put(st.address, proof.model_dump_json().encode())
    registration = Registration(
        task_id=task_id,
        round_number=0,
        miner=st.address,
        encryption_key=st.me.encryption_key,
        dataset_proof_sha256=reference.sha256,
        stake_wei=spec.money.minimum_stake_wei,
    )
    # What is posted has its stake; the contract may hold it by now.
    if st.mine(Registration, task_id) is None:
        provide_stake(st, task_id, registration.stake_wei)
    return st.post(registration)


def agreed_task(st: Station, task_id: str) -> PublishedTask:
    """The terms of a task in which this host takes part. Raises TakesNoPart, or BadRecord for terms that are not on chain.

    Publisher and stake are those that the chain has: `published_task` compares the terms with it.
    """
    terms, mine = published_task(st, task_id), connections_of(st.me)
    if terms.publisher not in mine.publishers:
        known = ", ".join(mine.publishers) or "nobody"
        raise TakesNoPart(
            f"publisher {terms.publisher} is none of this host's ({known}). Where it is trusted: healchain join with an "
            "invitation of its consortium, or add it to publishers in connections.json"
        )
    if (stake_wei := terms.spec.money.minimum_stake_wei) > mine.most_stake_wei:
        raise TakesNoPart(
            f"money.minimum_stake_wei = {stake_wei}: this host stakes at most {mine.most_stake_wei} wei in one task. To allow "
            "more: healchain join --most-stake ETHER, or most_stake_wei in connections.json"
        )
    return terms


def provide_stake(st: Station, task_id: str, needed_wei: int) -> None:
    """Have as much stake available: what finished tasks still hold first, then a deposit of what is missing.

    Raises TakesNoPart when that would be more than the host's owner allows for all tasks together.
    """
    stakes = st.chain.contracts(st.me).stakes
    for earlier in st.me.known_tasks():
        if stakes.available_stake(st.address) >= needed_wei or not stakes.get_hold(st.address).recorded_wei:
            break
        if earlier == task_id or st.address not in stakes.get_cohort(earlier).miners:
            continue
        try:
            stakes.release_stake(earlier, st.address)
        except Reverted as refusal:  # the simulation says so: nothing is spent
            if refusal.error not in ("StakeHeld", "NotEntitled"):
                raise
    missing_wei = needed_wei - stakes.available_stake(st.address)
    if missing_wei <= 0:
        return
    all_wei, most_wei = stakes.stake_of(st.address) + missing_wei, connections_of(st.me).most_deposit_wei
    if all_wei > most_wei:
        raise TakesNoPart(
            f"with {missing_wei} wei more, {all_wei} wei are staked: this host deposits at most {most_wei} wei for all tasks. "
            "Wait for the end of earlier ones, or raise most_deposit_wei in connections.json"
        )
    stakes.deposit_stake(amount_wei=missing_wei)


@task(persist_result=False, cache_policy=NO_CACHE)
def challenge_applicants(task_id: str, actor: str) -> dict[str, str]:
    """M2, the publisher: choose leaves of every applicant's proof, now that the roots are fixed."""
    st = station(actor)
    spec = published_task(st, task_id).spec
    stakes = st.chain.contracts().stakes
    for applicant in applicants(st, task_id, spec):
        if check_stake(stakes, spec, applicant).refused or applicant.proof is None or applicant.registration is None:
            continue
        if st.mine(Challenge, task_id, about=applicant.miner) is None:
            count = applicant.proof.sample_count
            asked = min(count, spec.dataset.challenged_leaves)
            leaves = sorted(secrets.SystemRandom().sample(range(count), asked))
            st.post(
                Challenge(
                    task_id=task_id,
                    round_number=0,
                    publisher=st.address,
                    miner=applicant.miner,
                    registration=struct_hash(applicant.registration),
                    leaves=tuple(leaves),
                ),
                about=applicant.miner,
            )
    announced = st.need(Announcement, st.address, task_id)
    return st.receipt(task_id, 0, "challenge", announced.transaction)


@task(persist_result=False, cache_policy=NO_CACHE)
def answer_challenge(task_id: str, actor: str) -> dict[str, str]:
    """M2, a miner: open the challenged leaves; hash paths, not samples."""
    st = station(actor)
    terms = agreed_task(st, task_id)
    challenge = st.need(Challenge, terms.publisher, task_id, about=st.address)
    dataset = load_samples(st.me, terms.spec.dataset, "train")
    paths = st.store.put(st.address, open_leaves(st.me, task_id, dataset, challenge.leaves))
    owned = KeyPossession(task_id=task_id, round_number=0, miner=st.address, challenge=struct_hash(challenge))
    return st.post(
        ChallengeAnswer(
            task_id=task_id,
            round_number=0,
            miner=st.address,
            challenge=struct_hash(challenge),
            paths_sha256=paths.sha256,
            key_signature=st.me.sign_as_key_owner(owned, st.domain),
        )
    )


@task(persist_result=False, cache_policy=NO_CACHE)
def admit_and_draw(task_id: str, actor: str) -> dict[str, str]:
    """M2 and 2.1, the publisher: admit whoever proved fitting data, close, draw, publish the cohort."""
    st = station(actor)
    if said := st.said(Cohort, task_id):
        return said
    terms = published_task(st, task_id)
    rules = terms.spec.participants
    stakes = st.chain.contracts(st.me).stakes

    closed = stakes.get_cohort(task_id).miners
    found = applicants(st, task_id, terms.spec)
    if not closed:
        found = [check_stake(stakes, terms.spec, applicant) for applicant in found]
    verified = without_shared_keys([check_answer(st, task_id, applicant) for applicant in found])
    while True:
        admitted, refused = choose(verified, closed, rules.miners_max)
        if len(admitted) < rules.miners_min:
            reasons = "; ".join(f"{miner}: {reason}" for miner, reason in refused.items()) or "nobody else registered"
            detail = f"{len(admitted)} of at least {rules.miners_min} miners qualified ({reasons})"
            return give_up(st, task_id, 0, "form-cohort", AbortReason.NOT_ENOUGH_MINERS, detail[:2000])
        without_stake = None if closed else close_registration(stakes, task_id, admitted)
        if without_stake is None:
            break
        verified = [replace(one, refused=STAKE_GONE) if one.miner == without_stake else one for one in verified]
    miners = tuple(applicant.miner for applicant in admitted)
    registrations = [applicant.registration for applicant in admitted if applicant.registration is not None]
    aggregator = drawn_aggregator(st, stakes, task_id)

    weights = fixed_weights(terms.spec, [applicant.proof.sample_count for applicant in admitted if applicant.proof])
    keys = dict(zip(miners, (registration.encryption_key for registration in registrations), strict=True))
    return st.post(
        Cohort(
            task_id=task_id,
            round_number=0,
            publisher=st.address,
            publisher_key=st.me.encryption_key,
            aggregator=aggregator,
            aggregator_key=keys[aggregator],
            miners=miners,
            registrations=tuple(struct_hash(registration) for registration in registrations),
            weights=weights,
            draw_seed=stakes.get_draw(task_id).seed,
            refused=tuple(refused)[:MAX_LISTED],
            reasons=tuple(refused.values())[:MAX_LISTED],
        )
    )


def choose(
    verified: Sequence[Applicant], closed: Sequence[Address], miners_max: int
) -> tuple[list[Applicant], dict[Address, str]]:
    """Who is admitted, in address order, and why the others are not. closed: the cohort that the chain has already."""
    if closed:  # a run before this one closed registration: what came in since is late
        admitted = [applicant for applicant in verified if applicant.miner in closed]
        surplus = [applicant for applicant in verified if applicant.miner not in closed and not applicant.refused]
    else:
        fitting = [applicant for applicant in verified if not applicant.refused]
        fitting.sort(key=lambda applicant: -applicant.registration.stake_wei if applicant.registration else 0)
        admitted, surplus = fitting[:miners_max], fitting[miners_max:]
    refused = {applicant.miner: applicant.refused for applicant in verified if applicant.refused}
    refused |= {applicant.miner: FULL for applicant in surplus}
    # Smallest address first: every party must build the same sums from the same set.
    return sorted(admitted, key=lambda applicant: applicant.miner.lower()), refused


def close_registration(stakes: bindings.StakeRegistry, task_id: str, admitted: Sequence[Applicant]) -> Address | None:
    """Fix the cohort on chain; or name the miner that has taken its stake away in the last moment, and change nothing."""
    applications = [(one.registration, one.signature) for one in admitted if one.registration is not None]
    try:
        stakes.close_registration(task_id, applications)
    except Reverted as refusal:
        if refusal.error != "InsufficientStake":
            raise
        return str(refusal.arguments[0])
    return None


def check_stake(stakes: bindings.StakeRegistry, spec: TaskSpec, applicant: Applicant) -> Applicant:
    """The applicant, refused unless it offers the stake that the task asks for, and has it."""
    if applicant.refused or applicant.registration is None:
        return applicant
    offered, available = applicant.registration.stake_wei, stakes.available_stake(applicant.miner)
    if offered < spec.money.minimum_stake_wei:
        return replace(
            applicant, refused=f"it offers a stake of {offered} wei, the task asks for {spec.money.minimum_stake_wei}"
        )
    if available < offered:
        return replace(applicant, refused=f"available stake is {available} wei, it signed for {offered}")
    return applicant


@task(persist_result=False, cache_policy=NO_CACHE)
def deliver_to_aggregator(task_id: str, actor: str) -> None:
    """2.3, the publisher: accuracy, salt and validation set, sealed to the drawn aggregator."""
    st = station(actor)
    cohort = st.mine(Cohort, task_id)
    if cohort is not None:
        fields = secrets_of(st, task_id)
        opening = {name: fields[name] for name in ("accuracy_ppm", "salt", "content_secret")}
        deliver(st, published_task(st, task_id), 0, cohort.aggregator, cohort.aggregator_key, opening)


def applicants(st: Station, task_id: str, spec: TaskSpec) -> list[Applicant]:
    """Everybody who posted a registration, in address order, with what is wrong with the application."""
    return [_applicant(st, task_id, spec, miner) for miner in st.store.owners_of(record_path(Registration, task_id, 0))]


def _applicant(st: Station, task_id: str, spec: TaskSpec, miner: Address) -> Applicant:
    if miner == st.address:
        return Applicant(miner, refused="the publisher of a task cannot be one of its miners")
    try:
        found = st.find_signed(Registration, miner, task_id)
        if found is None:
            return Applicant(miner, refused="the registration is no longer in the store")
        registration, signature = found
        ecies.shared_secret(1, bytes.fromhex(registration.encryption_key[2:]))  # refuses what is no point
        data = st.store.get(miner, registration.dataset_proof_sha256, max_bytes=MAX_PROOF_BYTES)
        proof = parse_proof(data)
        check_proof(spec.dataset, proof)
    except (BadRecord, DatasetMismatch, MissingArtifact, TamperedArtifact, ValueError) as error:
        return Applicant(miner, refused=brief(error))
    if registration.encryption_key == st.me.encryption_key:
        return Applicant(miner, refused="the encryption key is the publisher's")
    return Applicant(miner, registration, signature, proof)


def without_shared_keys(verified: Sequence[Applicant]) -> list[Applicant]:
    """The applicants, refused when an earlier one that qualified has the same encryption key.

    Both showed that they own it: a copied key alone refuses nobody but the copier.
    """
    kept: list[Applicant] = []
    keys: set[str] = set()
    for applicant in verified:
        if not applicant.refused and applicant.registration is not None:
            key = applicant.registration.encryption_key
            if key in keys:
                applicant = replace(applicant, refused="the encryption key is another party's")
            keys.add(key)
        kept.append(applicant)
    return kept


def check_answer(st: Station, task_id: str, applicant: Applicant) -> Applicant:
    """The applicant, refused with the reason unless it opened exactly what was challenged."""
    if applicant.refused or applicant.proof is None or applicant.registration is None:
        return applicant
    try:
        challenge = st.need(Challenge, st.address, task_id, about=applicant.miner)
        answer = st.need(ChallengeAnswer, applicant.miner, task_id)
        if challenge.registration != struct_hash(applicant.registration):
            raise DatasetMismatch("the registration is not the one that was challenged")
        if answer.challenge != struct_hash(challenge):
            raise DatasetMismatch("the answer is for another challenge")
        check_key_owner(st, applicant.registration, answer)
        data = st.store.get(applicant.miner, answer.paths_sha256, max_bytes=MAX_PROOF_BYTES)
        check_opening(applicant.proof, challenge.leaves, data)
    except (BadRecord, DatasetMismatch, MissingArtifact, TamperedArtifact) as error:
        return replace(applicant, refused=brief(error))
    return applicant


def check_key_owner(st: Station, registration: Registration, answer: ChallengeAnswer) -> None:
    """Raise DatasetMismatch unless the answer is also signed with the registered encryption key."""
    owned = KeyPossession(
        task_id=registration.task_id, round_number=0, miner=registration.miner, challenge=answer.challenge
    )
    try:
        signer = signer_of(owned, st.domain, answer.key_signature)
    except ValueError as error:
        raise DatasetMismatch(f"the signature with the encryption key is malformed: {brief(error)}") from error
    if signer != key_address(registration.encryption_key):
        raise DatasetMismatch("the answer is not signed with the encryption key that was registered")


def drawn_aggregator(st: Station, stakes: bindings.StakeRegistry, task_id: str) -> Address:
    """Have the contract draw, when its block has come, and recompute the draw."""
    if stakes.aggregator_of(task_id) is None:
        st.chain.wait_for_block(stakes.get_draw(task_id).seed_block + 1)
        try:
            stakes.draw_aggregator(task_id)
        except Reverted as refusal:
            if refusal.error != "SeedExpired":
                raise
            moved = stakes.move_seed(task_id).event.seed_block
            st.chain.wait_for_block(moved + 1)
            stakes.draw_aggregator(task_id)
    drawn = stakes.aggregator_of(task_id)
    result = stakes.get_draw(task_id)
    on_chain = stakes.get_cohort(task_id)
    block_hash = bytes(st.chain.web3.eth.get_block(result.seed_block)["hash"])
    seed = draw_seed(task_id, block_hash)
    if "0x" + seed.hex() != result.seed or draw(seed, on_chain.miners, on_chain.stakes_wei) != drawn:
        raise BadRecord(f"the chain drew {drawn}, which the hash of block {result.seed_block} does not give")
    return drawn
