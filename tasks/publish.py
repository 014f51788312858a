"""M1. Commit to the accuracy, lock the reward, read the chain back; only then announce the task.

Algorithm 1 of the protocol. What the publisher must not lose (accuracy, salt, content key) is written to its home
before the first transaction, so that a killed run finds its own escrow again instead of paying twice.
"""

import json
import math
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from blocks.artifacts import MissingArtifact, TamperedArtifact, sha256_hex
from blocks.identity import Identity, write_secret
from blocks.wasm_runner import NoRuntime
from contracts.bindings import Status, TaskOnChain, Terms
from contracts.messages import ZERO_ADDRESS, AbortReason, Announcement, Bytes32, Frozen, accuracy_commit
from contracts.sending import InsufficientFunds, Reverted
from contracts.task_spec import MAX_SCORE, PPM, PublishedTask, TaskFile, TaskSpec
from tasks.conductors import keep_terms
from tasks.crypto import ecies
from tasks.crypto.ndd_fe import ORDER
from tasks.global_model import start_parameters
from tasks.learning import compression, models
from tasks.learning.aggregation import SERVER_STEPS
from tasks.learning.datasets import Dataset, encode_npz
from tasks.records import BadRecord, Station, brief, parse_json, station, terms_path
from tasks.samples import load_samples
from tasks.workload import check_workload

COORDINATES_PER_PROJECTION = 8
"""An audit may open one number for at least so many coordinates: far too few equations to solve for an update."""


class DepositFailed(RuntimeError):
    """The reward is not locked as it should be; the message says what to do. No task exists."""


def check_runnable(spec: TaskSpec) -> int:
    """Raise ValueError unless the model can be built and the server step exists; return the model's dimension."""
    if spec.aggregation.server_step not in SERVER_STEPS:
        raise ValueError(f"aggregation.server_step = {spec.aggregation.server_step!r}: one of {sorted(SERVER_STEPS)}")
    dataset, rules = spec.dataset, spec.compression
    dimension = models.dimension(spec.model.name, dataset.input_shape, dataset.classes, spec.model.options)
    fewest = math.ceil(dimension * rules.density)
    if COORDINATES_PER_PROJECTION * spec.voting.audit_projections > fewest:
        raise ValueError(
            f"voting.audit_projections = {spec.voting.audit_projections}: with {fewest} coordinates a round (density "
            f"{rules.density} of {dimension}) at most {fewest // COORDINATES_PER_PROJECTION} say little of an update"
        )
    return dimension


def largest_score(spec: TaskSpec) -> int:
    """Bound of a score over the task, in millionths of a step: what an honest miner cannot exceed.

    A round's norm is at most clip_norm in fixed point, plus half a step of rounding in each of the k coordinates, and at
    most that of k coordinates at the bound; rounds add up.
    """
    rules, dimension, total = spec.compression, check_runnable(spec), 0
    for number in range(1, spec.rounds.max_rounds + 1):
        size = math.ceil(dimension * compression.density_of_round(number, rules.density, rules.warmup_rounds))
        clipped = math.ceil((rules.clip_norm * rules.scale + math.sqrt(size) / 2) * compression.SCORE_UNIT)
        total += min(clipped, compression.score_bound(size, rules.bound))
    if total > MAX_SCORE:
        raise ValueError(
            f"rounds.max_rounds = {spec.rounds.max_rounds}, compression.bits = {rules.bits} and compression.clip_norm = "
            f"{rules.clip_norm} allow scores up to {total}, beyond the contract's {MAX_SCORE}: lower one of them"
        )
    return total


def terms_on_chain(spec: TaskSpec, deadline_s: int) -> Terms:
    """What the contracts themselves enforce."""
    return Terms(
        deadline_s=deadline_s,
        # Who takes part in a block may be fewer than the admitted: as few as a round may have (see `trusted_cohort`).
        publish_window_s=spec.windows.publish_s,
        min_miners=spec.participants.submissions_min,
        max_miners=spec.participants.miners_max,
        fault_rate_ppm=round(spec.participants.tolerated_faults * PPM),
        aggregator_share_ppm=round(spec.money.aggregator_share * PPM),
        silence_penalty_ppm=round(spec.money.silence_penalty * PPM),
        publisher_reveal_window_s=spec.windows.publisher_reveal_s,
        aggregator_reveal_window_s=spec.windows.aggregator_reveal_s,
        score_reveal_window_s=spec.windows.score_reveal_s,
        max_score=largest_score(spec),
        min_stake_wei=spec.money.minimum_stake_wei,
    )


@task(persist_result=False, cache_policy=NO_CACHE)
def lock_reward(task_id: str, spec: TaskSpec, actor: str) -> dict[str, str]:
    """M1. Lock the reward and announce the task. Raises DepositFailed, and then there is no task."""
    st = station(actor)
    if announced := st.mine(Announcement, task_id):
        return st.reference(announced)

    validation = encode_npz(load_samples(st.me, spec.dataset, "validation"))
    decide_as_approved(st.me, task_id, spec)
    if secrets_of(st, task_id)["spec_sha256"] != spec_sha256(spec):
        raise DepositFailed(
            f"the terms given for {task_id} are not those that its publisher decided on: start it again"
        )
    terms = PublishedTask(task_id=task_id, publisher=st.address, validation_sha256=sha256_hex(validation), spec=spec)
    check_start(st, spec)
    check_own_workload(st, spec)
    commit = commitment(st, task_id)
    escrow = st.chain.contracts(st.me).escrow
    found = escrow.get_task(task_id)
    fresh = found.status is Status.NONE
    if fresh:
        deadline_s = st.chain.now_s() + spec.windows.deadline_s
        on_chain_terms = terms_on_chain(spec, deadline_s)
        try:
            approve_reward(st, spec)
            escrow.publish_task(
                task_id,
                commit,
                terms.spec_hash(),
                on_chain_terms,
                reward_wei=spec.money.reward_wei,
                token=spec.money.reward_token,
            )
        except (InsufficientFunds, Reverted) as error:
            raise DepositFailed(f"{AbortReason.DEPOSIT_FAILED}: {error}") from error
        found = escrow.get_task(task_id)

    transaction = next(done.transaction for done in st.chain.transactions(task_id) if done.kind == "publishTask")
    if problem := read_back(st, found, terms, commit, fresh=fresh):
        raise DepositFailed(f"{AbortReason.DEPOSIT_FAILED}: {problem}")

    st.store.post(st.address, terms_path(task_id), terms.encode())
    return st.post(
        Announcement(
            task_id=task_id,
            round_number=0,
            publisher=st.address,
            encryption_key=st.me.encryption_key,
            spec_hash=terms.spec_hash(),
            transaction=transaction,
        )
    )


def check_start(st: Station, spec: TaskSpec) -> None:
    """Raise DepositFailed unless the model that the task starts from is in the store and fits it."""
    try:
        if spec.model.start is not None:
            start_parameters(spec, st.store)
    except (BadRecord, MissingArtifact, TamperedArtifact) as error:
        raise DepositFailed(f"{AbortReason.DEPOSIT_FAILED}: model.start: {error}. Nothing was locked") from error


def check_own_workload(st: Station, spec: TaskSpec) -> None:
    """Raise DepositFailed unless the module that the miners will run is in the publisher's store, and is one."""
    try:
        with suppress(NoRuntime):  # the miners need one, the publisher does not
            check_workload(spec, st, st.address)
    except (BadRecord, MissingArtifact, TamperedArtifact) as error:
        raise DepositFailed(f"{AbortReason.DEPOSIT_FAILED}: {error}. Nothing was locked") from error


def approve_reward(st: Station, spec: TaskSpec) -> None:
    """Let the escrow take a reward in tokens. Raises Reverted."""
    money, escrow = spec.money, st.chain.contracts().escrow.address
    if money.reward_token == ZERO_ADDRESS:
        return
    token = st.chain.token(money.reward_token, st.me)
    if token.allowance(st.address, escrow) < money.reward_wei:
        token.approve(escrow, money.reward_wei)


def read_back(st: Station, found: TaskOnChain, terms: PublishedTask, commit: Bytes32, *, fresh: bool) -> str:
    """What is wrong with the escrow as the chain has it, or an empty string.

    One that was locked before a kill is ours whatever the time: its way out after the deadline is the refund.
    """
    balance = st.chain.balance_of(st.chain.contracts().escrow.address, found.token)
    checks = {
        f"task id {terms.task_id} belongs to {found.publisher}: choose another": found.publisher == st.address,
        f"status is {found.status.name}, not LOCKED": found.status is Status.LOCKED,
        f"the reward is in token {found.token}, not {terms.spec.money.reward_token}": (
            found.token == terms.spec.money.reward_token
        ),
        f"reward is {found.reward_wei} wei, not {terms.spec.money.reward_wei}": (
            found.reward_wei == terms.spec.money.reward_wei
        ),
        f"the escrow holds {balance} wei, less than the reward": balance >= found.reward_wei,
        "the accuracy commitment is not ours": found.accuracy_commit == commit,
        f"spec hash is {found.spec_hash}, not {terms.spec_hash()}": found.spec_hash == terms.spec_hash(),
        "the terms on chain are not those of the task file": (
            found.terms == terms_on_chain(terms.spec, found.terms.deadline_s)
        ),
        f"the deadline {found.terms.deadline_s} is not in the future": not fresh
        or found.terms.deadline_s > st.chain.now_s(),
    }
    return "; ".join(problem for problem, holds in checks.items() if not holds)


def decide(me: Identity, task_id: str, file: TaskFile) -> None:
    """The publisher's decision, in its home, once: the terms it will pay for, and the secrets of the task.

    Whoever starts the flow later passes the terms along; others than these are not paid for.
    """
    keep_terms(me, task_id, file.spec())
    content_secret = secrets.randbelow(ORDER - 1) + 1
    fields = {
        "accuracy_ppm": file.required_accuracy_ppm,
        "salt": secrets.token_hex(32),
        "content_secret": content_secret.to_bytes(32, "big").hex(),
        "spec_sha256": spec_sha256(file.spec()),
    }
    me.claim(f"{task_id}/commitment.json", json.dumps(fields).encode())


APPROVED_AS_A_WHOLE = ("money", "participants", "windows", "dataset", "voting", "workload", "workload_limits")
TASKS_APPROVED = 100  # of one name, unless the publisher says otherwise


class Approval(Frozen):
    """The publisher's standing approval of tasks with one name. number: what tells it from earlier ones."""

    task: TaskFile
    most_tasks: int
    number: str


def approve(me: Identity, file: TaskFile, most_tasks: int = TASKS_APPROVED) -> None:
    """Let others start so many tasks of this name, from a form or by a schedule; it replaces an earlier approval.

    Whoever starts one may choose how it trains; what it costs, who takes part and what is checked stays as approved.
    """
    approval = Approval(task=file, most_tasks=most_tasks, number=secrets.token_hex(8))
    write_secret(_approval(me, file.name), approval.model_dump_json())


def approve_once(me: Identity, file: TaskFile) -> None:
    """Approve of tasks of this name, unless the publisher has done so already, on whatever terms."""
    if not _approval(me, file.name).exists():
        approve(me, file)


def decide_as_approved(me: Identity, task_id: str, spec: TaskSpec) -> None:
    """Decide on a task that was started without the publisher, if it approved of such tasks. Raises DepositFailed."""
    path = _approval(me, spec.name)
    if me.read_private(f"{task_id}/commitment.json") is not None or not path.exists():
        return
    approval = Approval.model_validate_json(path.read_text())
    for section in APPROVED_AS_A_WHOLE:
        if getattr(spec, section) != getattr(approval.task, section):
            raise DepositFailed(
                f"[{section}] of {task_id} is not what the publisher approved for tasks named {spec.name}: approve it "
                "first (healchain approve TASK.toml)"
            )
    _take_turn(me, approval, task_id)
    fields = {name: getattr(spec, name) for name in TaskSpec.model_fields}
    decide(me, task_id, TaskFile(**fields, required_accuracy=approval.task.required_accuracy))


def _take_turn(me: Identity, approval: Approval, task_id: str) -> None:
    """Count the task among those approved, once however often it is asked. Raises DepositFailed when there are enough."""
    for turn in range(approval.most_tasks):
        if me.claim(f"approvals/{approval.number}/{turn}", task_id.encode()) == task_id.encode():
            return
    raise DepositFailed(
        f"the publisher approved of {approval.most_tasks} tasks named {approval.task.name}, and as many were started: "
        "approve of more (healchain approve TASK.toml --tasks NUMBER)"
    )


def _approval(me: Identity, name: str) -> Path:
    return Path(me.home) / f"approved-{name}.json"


def spec_sha256(spec: TaskSpec) -> Bytes32:
    return sha256_hex(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode())


def published_task(st: Station, task_id: str) -> PublishedTask:
    """The terms as published. Raises BadRecord unless the chain has exactly these: hash, reward, windows and limits.

    The chain names the publisher and the hash; the store only carries the bytes.
    """
    on_chain = st.chain.contracts().escrow.get_task(task_id)
    data = st.store.find(on_chain.publisher, terms_path(task_id))
    if data is None:
        raise MissingArtifact(f"the terms of {task_id} are not in the store of its publisher {on_chain.publisher}")
    try:
        task = PublishedTask.model_validate(parse_json(data))
        expected = terms_on_chain(task.spec, on_chain.terms.deadline_s)
    except ValueError as error:
        raise BadRecord(f"the terms of {task_id} cannot be used: {brief(error)}") from error
    if task.spec_hash() != on_chain.spec_hash or (task.task_id, task.publisher) != (task_id, on_chain.publisher):
        raise BadRecord(f"the terms of {task_id} hash to {task.spec_hash()}, on chain it is {on_chain.spec_hash}")
    reward = (task.spec.money.reward_wei, task.spec.money.reward_token)
    if (on_chain.reward_wei, on_chain.token) != reward or on_chain.terms != expected:
        raise BadRecord(f"the reward or the limits locked on chain for {task_id} are not those of its terms")
    return task


def secrets_of(st: Station, task_id: str) -> dict[str, Any]:
    """What `decide` wrote. Raises LookupError."""
    data = st.me.read_private(f"{task_id}/commitment.json")
    if data is None:
        raise LookupError(
            f"the required accuracy of {task_id} is not in the publisher's home: start it with healchain run or submit, or "
            "approve of tasks of its name (healchain approve TASK.toml)"
        )
    fields: dict[str, Any] = json.loads(data)
    return fields


def commitment(st: Station, task_id: str) -> Bytes32:
    fields = secrets_of(st, task_id)
    return accuracy_commit(fields["accuracy_ppm"], bytes.fromhex(fields["salt"]))


def content_key(fields: dict[str, Any]) -> bytes:
    """Public key (33 bytes) to which the validation set is sealed; its secret goes to each recipient by ECIES."""
    return ecies.public_key(int(fields["content_secret"], 16))


def validation_set(st: Station, terms: PublishedTask) -> Dataset:
    return load_samples(st.me, terms.spec.dataset, "validation")
