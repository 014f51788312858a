"""What all parties of a task agree on, checked as a whole before anything is spent. PURE.

    TaskSpec        the public part: everything but the required accuracy, which stays behind a commitment until M7
    TaskFile        a publisher's task file: TaskSpec and the required accuracy
    PublishedTask   TaskSpec bound to a task id, a publisher and a validation set; its keccak is on chain (M1)

Errors: InvalidTask, which names every wrong field, its value and what would be right.
"""

import json
import math
import tomllib
from typing import Any, Literal, Self

from eth_utils.crypto import keccak
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from contracts.messages import ZERO_ADDRESS, Address, Bytes32, Frozen, TaskId

PPM = 1_000_000
MAX_WEIGHT_SUM = 2**16
# The contracts keep a score in 64 bits.
MAX_SCORE = 2**64 - 1
# Recovery takes about sqrt(bound) steps a coordinate beyond the table: above this the aggregator would wait for hours.
MAX_RECOVERY_BOUND = 2**32


class InvalidTask(ValueError):
    """The task file does not describe a task that could run; one line for each field that is wrong."""


class Money(Frozen):
    """What is paid, and what is staked for it."""

    reward_wei: int = Field(gt=0, lt=2**88, description="the whole reward, locked in the escrow by M1")
    reward_token: Address = Field(
        default=ZERO_ADDRESS, description="ERC-20 contract; reward_wei is then in its smallest unit; zero: ether"
    )
    aggregator_share: float = Field(ge=0, le=0.5, description="part of the reward for the drawn aggregator")
    minimum_stake_wei: int = Field(gt=0, lt=2**88, description="stake a miner needs to be admitted")
    silence_penalty: float = Field(
        ge=0, le=1, description="part of its stake that an aggregator loses when its turn passes in silence"
    )


class Participants(Frozen):
    """How many miners take part, and how far their weights differ."""

    miners_min: int = Field(ge=4, le=200, description="fewer admitted miners end the task in M2")
    miners_max: int = Field(ge=4, le=200, description="of more that qualify, those with the larger stakes are admitted")
    submissions_min: int = Field(ge=3, le=200, description="fewer accepted submissions of others end the round")
    tolerated_faults: float = Field(ge=0, le=0.5, description="share of voters that may be silent or object")
    weight_levels: int = Field(ge=1, le=256, description="largest weight y; also the largest ratio of two weights")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.miners_max < self.miners_min:
            raise ValueError(f"miners_max = {self.miners_max} is below miners_min = {self.miners_min}: raise it")
        if self.submissions_min > self.miners_min - 1:
            raise ValueError(
                f"submissions_min = {self.submissions_min} cannot be reached by the {self.miners_min - 1} miners beside "
                f"the aggregator: at most miners_min - 1 = {self.miners_min - 1}"
            )
        return self


class Rounds(Frozen):
    """How many rounds, and how long each waits."""

    max_rounds: int = Field(ge=1, le=10_000, description="without the accuracy after these, the reward goes back")
    contribution_timeout_s: float = Field(gt=0, le=86_400, description="M3: later submissions are refused")
    attestation_timeout_s: float = Field(gt=0, le=86_400, description="M5: later votes do not count")


class Windows(Frozen):
    """Seconds of chain time."""

    deadline_s: int = Field(ge=60, le=10 * 365 * 86_400, description="from publication to the last moment for a block")
    publish_s: int = Field(ge=1, le=90 * 86_400, description="an aggregator's turn: then it can be replaced")
    publisher_reveal_s: int = Field(ge=1, le=90 * 86_400, description="M7: for the publisher to reveal the accuracy")
    aggregator_reveal_s: int = Field(
        ge=1, le=90 * 86_400, description="M7: then for the aggregator, in a silent publisher's stead"
    )
    score_reveal_s: int = Field(ge=1, le=90 * 86_400, description="M7: then for the miners to reveal their scores")


class DatasetRequirement(Frozen):
    """The data that a miner must have."""

    name: str = Field(min_length=1, max_length=64, description="a ready data set, or a name for the parties' own data")
    classes: int = Field(ge=2, le=10_000, description="labels are 0 to classes - 1")
    input_shape: tuple[int, ...] = Field(min_length=1, max_length=4, description="of one sample, e.g. 1, 28, 28")
    samples_min: int = Field(ge=1, description="a miner with fewer samples is refused")
    challenged_leaves: int = Field(ge=1, le=256, description="leaves of the dataset proof that the publisher opens")
    class_names: tuple[str, ...] = Field(default=(), description="folder names in class order, for image folders")
    transform: Literal["linear", "log", "sqrt"] = Field(
        default="linear", description="applied to tabular features first"
    )
    low: tuple[float, ...] = Field(default=(), description="per feature: mapped to -1; public constants")
    high: tuple[float, ...] = Field(default=(), description="per feature: mapped to 1; public constants")

    @field_validator("input_shape")
    @classmethod
    def _positive(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        if min(shape) < 1:
            raise ValueError(f"every dimension must be positive, got {shape}")
        return shape

    @model_validator(mode="after")
    def _constants_fit(self) -> Self:
        features = 1
        for size in self.input_shape:
            features *= size
        for name in ("low", "high"):
            constants = getattr(self, name)
            if constants and len(constants) != features:
                raise ValueError(f"{name} has {len(constants)} numbers for {features} features: give one each, or none")
        if bool(self.low) != bool(self.high) or any(a >= b for a, b in zip(self.low, self.high, strict=True)):
            raise ValueError("low and high go together, and every low is below its high")
        return self


class Start(Frozen):
    """A model that is there already, to go on from: where it is stored, and the digest of its bytes."""

    uri: str = Field(pattern=r"^artifact:0x[0-9a-fA-F]{40}/0x[0-9a-f]{64}$", description="artifact:OWNER/SHA256")
    sha256: Bytes32

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.uri.endswith(f"/{self.sha256}"):
            raise ValueError(
                f"uri = {self.uri} names another digest than sha256 = {self.sha256}: give both of one model"
            )
        return self

    @property
    def owner(self) -> str:
        """The address in whose folder the model is stored."""
        return self.uri.removeprefix("artifact:").partition("/")[0]


class Model(Frozen):
    """What is trained."""

    name: str = Field(description="a model of tasks.learning.models, e.g. logistic, mlp, cnn")
    options: dict[str, Any] = Field(default_factory=dict, description="the model's own options, e.g. hidden")
    start: Start | None = Field(default=None, description="the model of round 0; without it, drawn from the seed")

    @model_serializer(mode="wrap")
    def _without_empty_start(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Terms without a start have no such field, so that their hash does not depend on whether a program knows it."""
        fields: dict[str, Any] = dump(self)
        if self.start is None:
            del fields["start"]
        return fields


class Training(Frozen):
    """How each miner trains on its own data: stochastic gradient descent."""

    local_epochs: int = Field(ge=1, le=1000, description="passes over its data in one round")
    batch_size: int = Field(ge=1, lt=2**31, description="samples of one step")
    learning_rate: float = Field(gt=0, description="of the miner's steps")
    momentum: float = Field(ge=0, lt=1, description="of the miner's steps, within a round")
    weight_decay: float = Field(default=0.0, ge=0, description="L2 penalty of the miner's steps")
    proximal: float = Field(default=0.0, ge=0, description="FedProx: pull towards the global model")
    feedback: float = Field(default=1.0, ge=0, le=1, description="rate at which what is not sent is kept for later")


class Compression(Frozen):
    """What of an update is sent, and in which fixed point."""

    density: float = Field(gt=0, le=1, description="share of coordinates sent, after warm-up; sparsity is 1 - density")
    warmup_rounds: int = Field(ge=0, description="rounds in which the density falls from 1 to its value")
    explore_share: float = Field(ge=0, le=1, description="part of the support drawn at random")
    momentum: float = Field(ge=0, lt=1, description="momentum correction of what is sent, over the rounds")
    clip_norm: float = Field(gt=0, description="largest L2 norm of a local update")
    value_limit: float = Field(ge=1e-6, description="largest |coordinate| sent in one round; the excess waits")
    bits: int = Field(ge=2, le=24, description="bits of a fixed-point coordinate, sign included")

    @model_validator(mode="after")
    def _resolves(self) -> Self:
        if self.scale < 1:
            raise ValueError(f"value_limit = {self.value_limit} does not fit {self.bits} bits: at most {self.bound}")
        return self

    @property
    def bound(self) -> int:
        """Largest |quantized coordinate|."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def scale(self) -> int:
        """Fixed point: a value v is sent as round(v * scale), so that value_limit stays within the bound."""
        return math.floor(self.bound / self.value_limit)


class Aggregation(Frozen):
    """How the weighted sum of a round changes the model."""

    server_step: Literal["fedavg", "fedadam"] = Field(description="the rule that applies the mean update")
    options: dict[str, float] = Field(default_factory=dict, description="the rule's own options, e.g. learning_rate")


class Voting(Frozen):
    """What is checked of each update, and of the model before it is paid for."""

    open_validation: bool = Field(description="voters receive the validation set and reproduce the accuracy")
    tolerance: float = Field(ge=0, le=1, description="local accuracy may fall by this much before a miner objects")
    spot_checks: int = Field(ge=1, le=4096, description="random chunks of the opening that a miner checks per round")
    chunk_coordinates: int = Field(default=1024, ge=16, le=65_536, description="coordinates of one stored chunk")
    audit_projections: int = Field(
        default=2,
        ge=1,
        le=64,
        description="random +-1 projections of each update that the aggregator opens, to name a malformed ciphertext",
    )


class WorkloadLimits(Frozen):
    """What one round of the task's WebAssembly module may use on a miner's host."""

    fuel: int = Field(default=200_000_000_000, ge=1, lt=2**63, description="about one unit an instruction")
    memory_bytes: int = Field(default=2**28, ge=2**16, le=2**32, description="of the module's memory")
    wall_clock_s: float = Field(default=120.0, gt=0, le=86_400, description="the host's own time")


class TaskSpec(Frozen):
    """The public terms of a task. Every limit that a signature, a contract or a recovery relies on is checked here."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{1,40}$", description="becomes the beginning of the task id")
    seed: int = Field(ge=0, lt=2**63, description="public: initial model and the support's exploring part")
    money: Money
    participants: Participants
    rounds: Rounds
    windows: Windows
    dataset: DatasetRequirement
    model: Model
    training: Training
    compression: Compression
    aggregation: Aggregation
    voting: Voting
    workload: str | None = Field(
        default=None,
        pattern=r"^wasm:[0-9a-f]{64}$",
        description="wasm:SHA256 of a WebAssembly module that trains in the miner's own stead; its host runs it in a sandbox",
    )
    workload_limits: WorkloadLimits | None = None

    @model_serializer(mode="wrap")
    def _without_empty_workload(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Terms without a workload have no such field, so that their hash does not depend on whether a program knows it."""
        fields: dict[str, Any] = dump(self)
        return {
            name: value
            for name, value in fields.items()
            if value is not None or name not in ("workload", "workload_limits")
        }

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.workload_limits is not None and self.workload is None:
            raise ValueError("workload_limits are given without a workload: add it, or remove them")
        return self

    @property
    def workload_sha256(self) -> Bytes32 | None:
        """Digest of the module's bytes, as the store names them."""
        return None if self.workload is None else "0x" + self.workload.removeprefix("wasm:")

    @model_validator(mode="after")
    def _recoverable(self) -> Self:
        bound = self.recovery_bound(self.participants.miners_max * self.participants.weight_levels)
        if bound > MAX_RECOVERY_BOUND:
            raise ValueError(
                f"compression.bits = {self.compression.bits}, participants.weight_levels = "
                f"{self.participants.weight_levels} and participants.miners_max = {self.participants.miners_max} allow "
                f"sums up to {bound}, beyond what recovery can search ({MAX_RECOVERY_BOUND}): lower one of them"
            )
        return self

    def projection_bound(self, coordinates: int) -> int:
        """Largest |<x, a>| of one miner for a vector a of +-1."""
        return self.compression.bound * coordinates

    def recovery_bound(self, weight_sum: int) -> int:
        """Largest |<x, y>| by construction: every |x| <= bound, so the sum is at most bound * sum of weights."""
        return self.compression.bound * weight_sum


class TaskFile(TaskSpec):
    """What a publisher writes. The required accuracy leaves its host only as a commitment, until it is revealed."""

    required_accuracy: float = Field(gt=0, le=1)

    @field_validator("required_accuracy")
    @classmethod
    def _at_least_a_millionth(cls, accuracy: float) -> float:
        if round(accuracy * PPM) < 1:
            raise ValueError(f"the contract counts in millionths: at least {1 / PPM}")
        return accuracy

    @property
    def required_accuracy_ppm(self) -> int:
        return round(self.required_accuracy * PPM)

    def spec(self) -> TaskSpec:
        return TaskSpec(**{name: getattr(self, name) for name in TaskSpec.model_fields})


class PublishedTask(Frozen):
    """The terms as published: what `spec_hash` on chain is the hash of."""

    task_id: TaskId
    publisher: Address
    validation_sha256: Bytes32
    spec: TaskSpec

    def encode(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    def spec_hash(self) -> Bytes32:
        return "0x" + bytes(keccak(self.encode())).hex()


def load_task_file(text: str, **overrides: Any) -> TaskFile:
    """A task file in TOML. Raises InvalidTask naming each wrong field, its value and what would be right."""
    try:
        fields = tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError is one; an integer of thousands of digits is another
        raise InvalidTask(f"not a TOML file: {error}") from error
    try:
        return TaskFile.model_validate({**fields, **overrides})
    except ValidationError as error:
        raise InvalidTask("\n".join(_sentence(problem) for problem in error.errors())) from error


def _sentence(problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"]) or "task"
    value = problem["input"]
    shown = "" if isinstance(value, dict) or problem["type"] == "missing" else f" = {value!r}"
    remedy = {
        "missing": "is missing: add it",
        "extra_forbidden": "is not a field of a task: remove it or correct its name",
    }.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    return f"{field}{shown}: {remedy}"
