"""The registry's tables.

    INDEX   derived from chain and store (blocks.derived); `healchain reindex` makes them again
    OWN     what only this host knows: who can be asked, how long steps took, which model versions are pinned
    EDGE    of these, the rounds over edge devices: no chain and no signature holds them, so that these rows are what happened

Amounts in wei, scores and digests are text: no database integer holds them. Times are UTC. A column is empty until the record
or event that fills it is known.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import BigInteger, DateTime, Text, UniqueConstraint, false
from sqlalchemy.types import TypeDecorator
from sqlmodel import Field, SQLModel


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC, also from a database that keeps no time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class TaskRow(SQLModel, table=True):
    """A task of this registry's publishers, as the chain has it; announced, once its publisher has read the escrow back.

    status: LOCKED (not announced), OPEN, TRAINING, PUBLISHED, PAID, REFUNDED, or REFUNDABLE: given up, `reason` says why, and
    the reward goes back to the publisher when the deadline has passed. start: the model version that round 1 starts from.
    """

    __tablename__ = "tasks"
    task_id: str = Field(primary_key=True)
    publisher: str
    spec_hash: str
    terms: str = Field(default="", sa_column_kwargs={"server_default": ""})
    status: str = Field(default="LOCKED", sa_column_kwargs={"server_default": "LOCKED"})
    reason: str = Field(default="", sa_column_kwargs={"server_default": ""})
    token: str | None = None
    reward_wei: str | None = None
    accuracy_commit: str | None = None
    deadline_s: int | None = Field(default=None, sa_type=BigInteger)
    published_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    block_number: int | None = Field(default=None, sa_type=BigInteger)
    transaction: str | None = None
    aggregator: str | None = None
    required_accuracy_ppm: int | None = Field(default=None, sa_type=BigInteger)
    outcome: str | None = None
    start: str | None = None


class EventRow(SQLModel, table=True):
    """An event of the contracts about a task, or about the account of a party (task_id empty). fields: JSON."""

    __tablename__ = "events"
    block_number: int = Field(primary_key=True, sa_type=BigInteger, sa_column_kwargs={"autoincrement": False})
    log_index: int = Field(primary_key=True, sa_type=BigInteger, sa_column_kwargs={"autoincrement": False})
    task_id: str | None = Field(default=None, index=True)
    kind: str
    transaction: str
    at: datetime = Field(sa_type=UtcDateTime)
    fields: str = Field(sa_type=Text)


class RecordRow(SQLModel, table=True):
    """A signed record: who said what about which round, and the digest of its bytes in the store."""

    __tablename__ = "records"
    task_id: str = Field(primary_key=True)
    round_number: int = Field(primary_key=True)
    kind: str = Field(primary_key=True)
    signer: str = Field(primary_key=True)
    path: str = Field(primary_key=True)
    sha256: str
    message: str


class RegistrationRow(SQLModel, table=True):
    """A miner's application to a task. Whether it was admitted, and the stake held, are the chain's word."""

    __tablename__ = "registrations"
    task_id: str = Field(primary_key=True)
    miner: str = Field(primary_key=True)
    encryption_key: str | None = None
    dataset_proof_sha256: str | None = None
    offered_stake_wei: str | None = None
    held_stake_wei: str | None = None
    weight: int | None = Field(default=None, sa_type=BigInteger)
    is_admitted: bool = Field(default=False, sa_column_kwargs={"server_default": false()})


class RoundRow(SQLModel, table=True):
    """One round: how many submissions were collected and accepted, and what the aggregator made of them."""

    __tablename__ = "rounds"
    task_id: str = Field(primary_key=True)
    round_number: int = Field(primary_key=True)
    collected: int | None = None
    accepted: int | None = None
    opening_sha256: str | None = None
    model_sha256: str | None = None
    correct: int | None = Field(default=None, sa_type=BigInteger)
    total: int | None = Field(default=None, sa_type=BigInteger)
    loss_micro: int | None = Field(default=None, sa_type=BigInteger)
    candidate: str | None = None


class SubmissionRow(SQLModel, table=True):
    """What a miner handed over in a round. is_accepted: it is part of the sum; empty while that is open, or refused."""

    __tablename__ = "submissions"
    task_id: str = Field(primary_key=True)
    round_number: int = Field(primary_key=True)
    miner: str = Field(primary_key=True)
    base_model_sha256: str | None = None
    ciphertext_root: str | None = None
    chunks_sha256: str | None = None
    coordinates: int | None = Field(default=None, sa_type=BigInteger)
    score_commit: str | None = None
    sample_count: int | None = Field(default=None, sa_type=BigInteger)
    is_accepted: bool | None = None


class VoteRow(SQLModel, table=True):
    """A miner's verdict on the candidate of a round."""

    __tablename__ = "votes"
    task_id: str = Field(primary_key=True)
    round_number: int = Field(primary_key=True)
    miner: str = Field(primary_key=True)
    candidate: str
    accepted: bool
    reason: str


class ModelVersionRow(SQLModel, table=True):
    """The model after a round. version: TASK/ROUND; parent: the version that it was trained from, empty for a seeded one."""

    __tablename__ = "model_versions"
    version: str = Field(primary_key=True)
    task_id: str = Field(index=True)
    round_number: int
    sha256: str = Field(index=True)
    uri: str
    correct: int = Field(sa_type=BigInteger)
    total: int = Field(sa_type=BigInteger)
    loss_micro: int | None = Field(default=None, sa_type=BigInteger)
    parent: str | None = None
    is_published: bool = Field(default=False, sa_column_kwargs={"server_default": false()})
    transaction: str | None = None
    published_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class ScoreRow(SQLModel, table=True):
    """A score that its miner revealed on chain."""

    __tablename__ = "scores"
    task_id: str = Field(primary_key=True)
    miner: str = Field(primary_key=True)
    score: str
    transaction: str


class RewardRow(SQLModel, table=True):
    """Money that the contracts credited or paid. kind: the event. A withdrawal is of all that an account has: no task."""

    __tablename__ = "rewards"
    block_number: int = Field(primary_key=True, sa_type=BigInteger, sa_column_kwargs={"autoincrement": False})
    log_index: int = Field(primary_key=True, sa_type=BigInteger, sa_column_kwargs={"autoincrement": False})
    task_id: str | None = Field(default=None, index=True)
    kind: str
    account: str = Field(index=True)
    recipient: str
    token: str
    amount_wei: str
    transaction: str
    at: datetime = Field(sa_type=UtcDateTime)


class SlashRow(SQLModel, table=True):
    """A part of its stake that an aggregator lost, and for which offence."""

    __tablename__ = "slashes"
    task_id: str = Field(primary_key=True)
    aggregator: str = Field(primary_key=True)
    offence: str = Field(primary_key=True)
    amount_wei: str
    transaction: str


class RefusalRow(SQLModel, table=True):
    """What was refused, in which step, and why. A record in the store that cannot be believed is refused in step `record ...`."""

    __tablename__ = "refusals"
    task_id: str = Field(primary_key=True)
    round_number: int = Field(primary_key=True)
    step: str = Field(primary_key=True)
    actor: str = Field(primary_key=True)
    reason: str


class ActorRow(SQLModel, table=True):
    """A party that can be asked: its name, its address, and the role of its queue."""

    __tablename__ = "actors"
    name: str = Field(primary_key=True)
    address: str = Field(index=True)
    role: str = Field(index=True)


class StepRow(SQLModel, table=True):
    """One run of an actor's step: when, how long, and how it ended."""

    __tablename__ = "steps"
    __table_args__ = (UniqueConstraint("task_id", "round_number", "step", "actor", "started_s", name="one_start"),)
    id: int | None = Field(default=None, primary_key=True)
    task_id: str = Field(index=True)
    round_number: int
    step: str
    actor: str
    started_s: float
    seconds: float
    outcome: str
    detail: str = ""


class PinRow(SQLModel, table=True):
    """A name that was given to a model version. The newest pin of a name that is not undone is the one that holds."""

    __tablename__ = "pins"
    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(index=True)
    version: str
    pinned_at: datetime = Field(sa_type=UtcDateTime)
    undone_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class EdgeExperimentRow(SQLModel, table=True):
    """Rounds over edge devices that somebody asked for. request: JSON as it was asked; digest: SHA-256 of it.

    first_round, rounds: what names its rounds are taken by. series: of experiments that a schedule asks for, its name; else
    empty. ended_at: all its rounds are over, and no run conducts it.
    """

    __tablename__ = "edge_experiments"
    experiment_id: str = Field(primary_key=True)
    digest: str
    request: str = Field(sa_type=Text)
    first_round: str = Field(default="", index=True)
    rounds: int = 1
    series: str = Field(default="", index=True)
    created_at: datetime = Field(sa_type=UtcDateTime)
    ended_at: datetime | None = Field(default=None, sa_type=UtcDateTime, index=True)


class EdgeRoundRow(SQLModel, table=True):
    """One round over edge devices.

    status: OPEN, CLOSED (reason: k, timeout, or abandoned with its run), then COMPLETED with a version, COMPLETED_WITH_WARNING
    (the updates wait for a later combination; detail says why), or FAILED (detail says why). closed_by: who won the closing.
    started_at: when its devices had been told, from which deadline_at counts; until then no deadline closes it.
    """

    __tablename__ = "edge_rounds"
    round_id: str = Field(primary_key=True)
    experiment_id: str = Field(index=True)
    number: int
    base_version: int
    k_of_n: int
    timeout_s: int
    status: str = Field(default="OPEN", index=True)
    reason: str = ""
    closed_by: str = ""
    version: int | None = None
    detail: str = Field(default="", sa_type=Text)
    opened_at: datetime = Field(sa_type=UtcDateTime)
    started_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    deadline_at: datetime = Field(sa_type=UtcDateTime)
    closed_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    completed_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class EdgeUpdateRow(SQLModel, table=True):
    """The last update of a device before the closing of a round. body: the model in JSON; or sha256 of it in the store.

    digest: SHA-256 of what it says, whatever its format. error: why the device has no model; then there is no body.
    """

    __tablename__ = "edge_updates"
    round_id: str = Field(primary_key=True)
    proplet_id: str = Field(primary_key=True)
    digest: str
    num_samples: int = Field(sa_type=BigInteger)
    metrics: str = Field(sa_type=Text)
    error: str = Field(default="", sa_type=Text)
    transport: str
    body: str | None = Field(default=None, sa_type=Text)
    sha256: str | None = Field(default=None, index=True)
    received_at: datetime = Field(sa_type=UtcDateTime)


class EdgeDroppedRow(SQLModel, table=True):
    """That there was an update which counts for nothing: its bytes are not kept. reason: late, or replaced.

    sha256, size_bytes: of its model in JSON; empty and 0 for one with an error.
    """

    __tablename__ = "edge_dropped_updates"
    round_id: str = Field(primary_key=True)
    proplet_id: str = Field(primary_key=True)
    digest: str = Field(primary_key=True)
    num_samples: int = Field(sa_type=BigInteger)
    received_at: datetime = Field(sa_type=UtcDateTime)
    sha256: str = ""
    size_bytes: int = Field(default=0, sa_type=BigInteger)
    reason: str = ""


class EdgeDeviceRow(SQLModel, table=True):
    """A device. key_sha256: of its key, which only it has; mqtt_hash: the same for mosquitto's password file.

    health: what it said last: alive, offline or unhealthy; empty before it said anything. details: JSON.
    words_counter, updates_counter: of the newest sealed messages that were taken from it over MQTT.
    """

    __tablename__ = "edge_devices"
    proplet_id: str = Field(primary_key=True)
    key_sha256: str | None = Field(default=None, index=True)
    mqtt_hash: str | None = None
    namespace: str = "default"
    details: str = Field(default="{}", sa_type=Text)
    health: str = ""
    registered_at: datetime = Field(sa_type=UtcDateTime)
    last_beat_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    words_counter: int = Field(default=0, sa_type=BigInteger)
    updates_counter: int = Field(default=0, sa_type=BigInteger)


class EdgeModelRow(SQLModel, table=True):
    """A version of an edge model, written once. form: json (in body) or safetensors (in the store); sha256: of these bytes.

    parent: the version that it was trained from. state_sha256: of the rule's state after it, in the store. metrics: JSON.
    """

    __tablename__ = "edge_models"
    version: int = Field(primary_key=True, sa_column_kwargs={"autoincrement": False})
    parent: int | None = None
    sha256: str
    form: str
    body: str | None = Field(default=None, sa_type=Text)
    state_sha256: str | None = None
    metrics: str = Field(default="{}", sa_type=Text)
    experiment_id: str | None = Field(default=None, index=True)
    round_id: str | None = Field(default=None, unique=True)
    created_at: datetime = Field(sa_type=UtcDateTime)


class EdgeTaskRow(SQLModel, table=True):
    """A module that a device runs, as the manager's API has it. start: the message that starts it, JSON.

    state: 0 pending, 1 scheduled, 2 running, 3 completed, 4 failed, 5 skipped, 6 interrupted. results: JSON.
    """

    __tablename__ = "edge_tasks"
    task_id: str = Field(primary_key=True)
    round_id: str | None = Field(default=None, index=True)
    proplet_id: str = Field(default="", index=True)
    name: str
    state: int = 0
    start: str = Field(sa_type=Text)
    results: str | None = Field(default=None, sa_type=Text)
    error: str = Field(default="", sa_type=Text)
    created_at: datetime = Field(sa_type=UtcDateTime)
    changed_at: datetime = Field(sa_type=UtcDateTime)


class EdgeMessageRow(SQLModel, table=True):
    """What is to be published over MQTT, below the prefix of the topics; empty sent_at: not yet."""

    __tablename__ = "edge_messages"
    id: int | None = Field(default=None, primary_key=True)
    topic: str
    payload: str = Field(sa_type=Text)
    made_at: datetime = Field(sa_type=UtcDateTime)
    sent_at: datetime | None = Field(default=None, sa_type=UtcDateTime, index=True)


class EdgeBlobRow(SQLModel, table=True):
    """What devices are given by name, its bytes in the store. kind: module, or dataset (named by its device)."""

    __tablename__ = "edge_blobs"
    kind: str = Field(primary_key=True)
    name: str = Field(primary_key=True)
    sha256: str
    size_bytes: int = Field(sa_type=BigInteger)


INDEX: tuple[type[SQLModel], ...] = (
    TaskRow,
    EventRow,
    RecordRow,
    RegistrationRow,
    RoundRow,
    SubmissionRow,
    VoteRow,
    ModelVersionRow,
    ScoreRow,
    RewardRow,
    SlashRow,
    RefusalRow,
)
EDGE: tuple[type[SQLModel], ...] = (
    EdgeExperimentRow,
    EdgeRoundRow,
    EdgeUpdateRow,
    EdgeDroppedRow,
    EdgeDeviceRow,
    EdgeModelRow,
    EdgeTaskRow,
    EdgeMessageRow,
    EdgeBlobRow,
)
OWN: tuple[type[SQLModel], ...] = (ActorRow, StepRow, PinRow, *EDGE)
