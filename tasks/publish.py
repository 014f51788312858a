"""M1. Commit to the accuracy, lock the reward, read the chain back; only then announce the task.

Algorithm 1 of the protocol. What the publisher must not lose (accuracy, salt, content key) is written to its home
before the first transaction, so that a killed run finds its own escrow again instead of paying twice.
"""

import json
import secrets
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from blocks.artifacts import sha256_hex
from blocks.identity import Identity
from contracts.bindings import InsufficientFunds, Reverted, Status, TaskOnChain, Terms
from contracts.messages import AbortReason, Announcement, Bytes32, accuracy_commit
from contracts.task_spec import PPM, PublishedTask, TaskSpec
from tasks.crypto import ecies
from tasks.crypto.ndd_fe import ORDER
from tasks.learning import compression, models
from tasks.learning.aggregation import SERVER_STEPS
from tasks.learning.datasets import Dataset, encode_npz
from tasks.records import Station, station, terms_path
from tasks.samples import load_samples
from tasks.show import show_markdown


class DepositFailed(RuntimeError):
    """The reward is not locked as it should be; the message says what to do. No task exists."""


def check_runnable(spec: TaskSpec) -> int:
    """Raise ValueError unless the model can be built and the server step exists; return the model's dimension."""
    if spec.aggregation.server_step not in SERVER_STEPS:
        raise ValueError(f"aggregation.server_step = {spec.aggregation.server_step!r}: one of {sorted(SERVER_STEPS)}")
    dataset = spec.dataset
    return models.dimension(spec.model.name, dataset.input_shape, dataset.classes, spec.model.options)


def largest_score(spec: TaskSpec) -> int:
    """Bound of a score: every round's is at most that of a dense vector at the bound, and scores add up over rounds."""
    return spec.rounds.max_rounds * compression.score_bound(check_runnable(spec), spec.compression.bound)


def terms_on_chain(spec: TaskSpec, deadline_s: int) -> Terms:
    """What the contracts themselves enforce."""
    return Terms(
        deadline_s=deadline_s,
        min_miners=spec.participants.miners_min,
        max_miners=spec.participants.miners_max,
        fault_rate_ppm=round(spec.participants.tolerated_faults * PPM),
        aggregator_share_ppm=round(spec.money.aggregator_share * PPM),
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
    terms = PublishedTask(task_id=task_id, publisher=st.address, validation_sha256=sha256_hex(validation), spec=spec)
    commit = commitment(st, task_id)
    escrow = st.chain.contracts(st.me.account).escrow
    found = escrow.get_task(task_id)
    if found.status is Status.NONE:
        deadline_s = st.chain.now_s() + spec.windows.deadline_s
        on_chain_terms = terms_on_chain(spec, deadline_s)
        try:
            escrow.publish_task(task_id, commit, terms.spec_hash(), on_chain_terms, reward_wei=spec.money.reward_wei)
        except (InsufficientFunds, Reverted) as error:
            raise DepositFailed(f"{AbortReason.DEPOSIT_FAILED}: {error}") from error
        found = escrow.get_task(task_id)

    transaction = next(done.transaction for done in st.chain.transactions(task_id) if done.kind == "publishTask")
    st.chain.confirm(transaction)
    if problem := read_back(st, found, terms, commit):
        raise DepositFailed(f"{AbortReason.DEPOSIT_FAILED}: {problem}")

    st.store.post(st.address, terms_path(task_id), terms.encode())
    show_markdown(f"task-{task_id}", _summary(terms, found), "Terms of the task")
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


def read_back(st: Station, found: TaskOnChain, terms: PublishedTask, commit: Bytes32) -> str:
    """What is wrong with the escrow as the chain has it, or an empty string."""
    balance = st.chain.web3.eth.get_balance(st.chain.contracts().escrow.address)  # type: ignore[arg-type]
    checks = {
        f"task id {terms.task_id} belongs to {found.publisher}: choose another": found.publisher == st.address,
        f"status is {found.status.name}, not LOCKED": found.status is Status.LOCKED,
        f"reward is {found.reward_wei} wei, not {terms.spec.money.reward_wei}": (
            found.reward_wei == terms.spec.money.reward_wei
        ),
        f"the escrow holds {balance} wei, less than the reward": balance >= found.reward_wei,
        "the accuracy commitment is not ours": found.accuracy_commit == commit,
        f"spec hash is {found.spec_hash}, not {terms.spec_hash()}": found.spec_hash == terms.spec_hash(),
        "the terms on chain are not those of the task file": (
            found.terms == terms_on_chain(terms.spec, found.terms.deadline_s)
        ),
        f"the deadline {found.terms.deadline_s} is not in the future": found.terms.deadline_s > st.chain.now_s(),
    }
    return "; ".join(problem for problem, holds in checks.items() if not holds)


def require_accuracy(me: Identity, task_id: str, accuracy_ppm: int) -> None:
    """Write the secrets of a new task to the publisher's home, once: accuracy, salt, content key."""
    name = f"{task_id}/commitment.json"
    if me.read_private(name) is None:
        content_secret = secrets.randbelow(ORDER - 1) + 1
        fields = {
            "accuracy_ppm": accuracy_ppm,
            "salt": secrets.token_hex(32),
            "content_secret": content_secret.to_bytes(32, "big").hex(),
        }
        me.write_private(name, json.dumps(fields).encode())


def secrets_of(st: Station, task_id: str) -> dict[str, Any]:
    """What `require_accuracy` wrote. Raises LookupError."""
    data = st.me.read_private(f"{task_id}/commitment.json")
    if data is None:
        raise LookupError(
            f"the required accuracy of {task_id} is not in the publisher's home: start with healchain run"
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


def _summary(terms: PublishedTask, found: TaskOnChain) -> str:
    spec = terms.spec
    return (
        f"# {terms.task_id}\n\n| | |\n|---|---|\n| publisher | `{terms.publisher}` |\n"
        f"| reward | {found.reward_wei} wei, locked |\n| data set | {spec.dataset.name} |\n"
        f"| model | {spec.model.name}, {check_runnable(spec)} parameters |\n"
        f"| rounds | at most {spec.rounds.max_rounds} |\n| spec hash | `{terms.spec_hash()}` |\n"
    )
