"""A task and its parties in a folder, driven step by step, so that a test can stand between two steps and interfere.

The steps are the very functions that the flows call; `tests/protocol/test_run.py` drives the flows themselves.
"""

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blocks.artifacts import ArtifactStore
from blocks.chain import Chain
from blocks.registry import Registry
from contracts.messages import Abort, Cohort, Message, Registration
from contracts.task_spec import TaskFile
from infra.devstack import Stack, set_up
from tasks import aggregate, attest, cohort, contribute, index, keys, opening, publish, settle
from tasks.records import Station, load_record, record_path, station

TASK_ID = "test-task-1"
MINERS = tuple(f"miner-{number}" for number in range(1, 6))
TERMS = """
name = "test-task"
seed = 1
required_accuracy = 0.15
[money]
reward_wei = 1_000_000_000_000_000_007
aggregator_share = 0.1
minimum_stake_wei = 1000
silence_penalty = 0.2
[participants]
miners_min = 4
miners_max = 5
submissions_min = 3
tolerated_faults = 0.34
weight_levels = 4
[rounds]
max_rounds = 2
contribution_timeout_s = 60
attestation_timeout_s = 60
[windows]
deadline_s = 3600
publish_s = 1800
publisher_reveal_s = 600
aggregator_reveal_s = 600
score_reveal_s = 600
[dataset]
name = "digits"
classes = 10
input_shape = [1, 8, 8]
samples_min = 10
challenged_leaves = 4
[model]
name = "logistic"
[training]
local_epochs = 2
batch_size = 32
learning_rate = 0.5
momentum = 0.0
[compression]
density = 0.2
warmup_rounds = 0
explore_share = 0.5
momentum = 0.0
clip_norm = 10.0
value_limit = 2.0
bits = 12
[aggregation]
server_step = "fedavg"
[voting]
open_validation = true
tolerance = 1.0
spot_checks = 8
chunk_coordinates = 64
"""

STEPS: dict[str, Callable[..., Any]] = {
    "register": lambda name, r: cohort.apply_for_task.fn(TASK_ID, name),
    "challenge": lambda name, r: cohort.challenge_applicants.fn(TASK_ID, name),
    "prove-dataset": lambda name, r: cohort.answer_challenge.fn(TASK_ID, name),
    "form-cohort": lambda name, r: cohort.admit_and_draw.fn(TASK_ID, name),
    "deliver": lambda name, r: cohort.deliver_to_aggregator.fn(TASK_ID, name),
    "train": lambda name, r: contribute.train_locally.fn(TASK_ID, r, name),
    "submit": lambda name, r: contribute.encrypt_and_submit.fn(TASK_ID, r, name),
    "collect": lambda name, r: aggregate.collect_submissions.fn(TASK_ID, r, name),
    "grant-audit": lambda name, r: keys.grant_audit.fn(TASK_ID, r, name),
    "audit": lambda name, r: aggregate.audit_submissions.fn(TASK_ID, r, name),
    "derive-key": lambda name, r: keys.derive_round_key.fn(TASK_ID, r, name),
    "aggregate": lambda name, r: aggregate_here(name, r),
    "open-validation": lambda name, r: attest.open_validation_to_voters.fn(TASK_ID, r, name),
    "attest": lambda name, r: attest.judge_candidate.fn(TASK_ID, r, name),
    "publish-block": lambda name, r: settle.publish_voted_block.fn(TASK_ID, r, name),
    "reveal-accuracy": lambda name, r: settle.open_accuracy.fn(TASK_ID, name),
    "reveal-accuracy-instead": lambda name, r: settle.open_accuracy_instead.fn(TASK_ID, name),
    "reveal-score": lambda name, r: settle.open_score.fn(TASK_ID, name),
    "withdraw": lambda name, r: settle.distribute_and_withdraw.fn(TASK_ID, name),
    "refund": lambda name, r: settle.take_refund.fn(TASK_ID, name),
    "resign": lambda name, r: settle.resign_turn.fn(TASK_ID, name),
    "compensation": lambda name, r: settle.take_compensation.fn(TASK_ID, name),
}
# What a task that ends with a block does not need.
OTHER_ENDS = ("reveal-accuracy-instead", "refund", "resign", "compensation")
ORDER = ("publish", *(name for name in STEPS if name not in OTHER_ENDS))


def aggregate_here(name: str, r: int) -> Any:
    """The flow `aggregate` with its groups one after another."""
    groups = opening.plan_opening.fn(TASK_ID, r, name)
    outcomes = [opening.open_group.fn(TASK_ID, r, name, group.start, group.stop - 1) for group in groups]
    return aggregate.finish_round.fn(TASK_ID, r, outcomes, name)


def task_file(**changes: Any) -> TaskFile:
    """The test task; a change is named section__field, or field at the top."""
    fields = tomllib.loads(TERMS)
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        (fields[section] if section else fields)[field] = value
    return TaskFile.model_validate(fields)


class World:
    """All parties of one task in one folder."""

    def __init__(self, folder: Path, file: TaskFile) -> None:
        self.folder, self.file = folder, file
        self.stack: Stack = set_up(folder, file.dataset, len(MINERS), file.seed, {})
        publish.decide(self.stack.identity("publisher"), TASK_ID, file)

    def do(self, step: str, name: str, r: int = 1) -> Any:
        """Run one actor's step; return its record, checked as the dispatcher does."""
        reference = self.answer(step, name, r)
        return None if reference is None else load_record(self.store, self.chain.domain, reference)

    def answer(self, step: str, name: str, r: int = 1) -> Any:
        """Run one actor's step; return the reference that it answers."""
        if step == "publish":
            return publish.lock_reward.fn(TASK_ID, self.file.spec(), name)
        return STEPS[step](name, r)

    def follow(self, *steps: str, r: int = 1) -> None:
        """Run steps of everybody, and remember their answers as the dispatcher does. A step that was done answers again."""
        for step in steps:
            for name in self.actors_of(step):
                if (reference := self.answer(step, name, r)) is not None:
                    record = load_record(self.store, self.chain.domain, reference)
                    index.remember(self.registry, self.chain, self.store, record, reference)

    def everybody(self, step: str, r: int = 1) -> list[Any]:
        """Run a step for all who have it."""
        return [self.do(step, name, r) for name in self.actors_of(step)]

    def through(self, last: str, *, after: str | None = None, r: int = 1) -> "World":
        """Run the protocol's steps up to and including `last`, from the one after `after`."""
        start = 0 if after is None else ORDER.index(after) + 1
        for step in ORDER[start : ORDER.index(last) + 1]:
            self.everybody(step, r)
        return self

    def actors_of(self, step: str) -> tuple[str, ...]:
        if step in ("register", "prove-dataset", "train", "submit", "attest", "reveal-score"):
            return MINERS
        if step in ("collect", "audit", "aggregate", "publish-block", "reveal-accuracy-instead"):
            return (self.aggregator,)
        return ("publisher", *MINERS) if step == "withdraw" else ("publisher",)

    @property
    def chain(self) -> Chain:
        return self.stack.chain

    @property
    def store(self) -> ArtifactStore:
        return self.stack.artifacts

    @property
    def registry(self) -> Registry:
        return self.stack.registry

    @property
    def contracts(self) -> Any:
        return self.chain.contracts()

    def contracts_as(self, name: str) -> Any:
        return self.chain.contracts(self.stack.identity(name))

    def address(self, name: str) -> str:
        return self.stack.identity(name).address

    def name(self, address: str) -> str:
        return next(name for name in self.stack.homes if self.address(name) == address)

    @property
    def aggregator(self) -> str:
        return self.name(self.contracts.stakes.aggregator_of(TASK_ID))

    @property
    def others(self) -> list[str]:
        """The miners beside the drawn aggregator."""
        return [name for name in MINERS if name != self.aggregator]

    def station(self, name: str) -> Station:
        return station(name)

    def application(self, address: str) -> tuple[Registration, str]:
        """A miner's registration and its signature, as the contract takes them."""
        found = self.station("publisher").find_signed(Registration, address, TASK_ID)
        assert found is not None
        return found

    def cohort(self) -> Cohort:
        return cohort.trusted_cohort(self.station("publisher"), TASK_ID)

    def find(self, kind: type[Message], name: str, r: int = 1, about: str | None = None) -> Any:
        return self.station("publisher").find(kind, self.address(name), TASK_ID, r, about=about)

    def record_file(self, kind: type[Message], name: str, r: int = 1, about: str | None = None) -> Path:
        path = record_path(kind, TASK_ID, r, about)
        return self.folder / "store" / self.address(name).lower() / "records" / path

    def forge(
        self, message: Message, *, signer: str, as_name: str | None = None, r: int = 1, about: str | None = None
    ) -> None:
        """Put a record into the store as an intruder would: whatever is there already, whoever signed it."""
        identity = self.stack.identity(signer)
        body = {"message": message.model_dump(mode="json"), "signature": identity.sign(message, self.chain.domain)}
        target = self.record_file(type(message), as_name or signer, r, about)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({"kind": type(message).__name__, **body}, sort_keys=True))

    def forget(self, kind: type[Message], name: str, r: int = 1, about: str | None = None) -> bytes:
        """Take a record back, from the store and from its signer's memory: as if killed before signing. Returns it."""
        posted = self.record_file(kind, name, r, about)
        data = posted.read_bytes()
        posted.unlink()
        task, _, rest = record_path(kind, TASK_ID, r, about).partition("/")
        (self.folder / "actors" / name / "private" / task / "signed" / rest).unlink()
        return data

    def abort_of(self, name: str, r: int = 1) -> Abort:
        found = self.find(Abort, name, r)
        assert found is not None, f"{name} did not give up in round {r}"
        return found

    def balance_wei(self, name: str) -> int:
        return int(self.chain.web3.eth.get_balance(self.address(name)))  # type: ignore[arg-type]

    def close(self) -> None:
        self.chain.close()


def reopen(snapshot: Path, folder: Path, file: TaskFile) -> World:
    """A copy of a world that stopped between two steps."""
    shutil.copytree(snapshot, folder)
    return World(folder, file)
