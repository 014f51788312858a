"""Typed Python for the four contracts: one method per function, plain values in, dataclasses out, one error type.

    Deployment            the four addresses on one chain; `deploy` makes one, `check_deployment` verifies one
    HealChainEscrow, StakeRegistry, BlockPublisher, RewardDistribution
                          methods named like the Solidity functions, in snake case
    Mined[Event]          a mined transaction and the event it is about

Transactions go out through contracts.sending, whose Reverted names the custom error, its arguments, and what to do about
it. All amounts are wei, all times unix seconds, all hashes lower-case 0x hex, all addresses checksummed.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum, IntEnum
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, get_args, get_origin, get_type_hints

import rlp
from eth_abi.abi import decode
from eth_abi.exceptions import DecodingError
from eth_utils.abi import function_abi_to_4byte_selector
from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak
from web3 import Web3

from contracts import sending
from contracts.contributions import Opening, Place, place
from contracts.messages import ZERO_ADDRESS, Address, Bytes, Bytes32, Candidate, Registration, TaskId, compact_signature
from contracts.sending import NonceTaken, Replaced, Reverted, Sender

BUILD = Path(__file__).parent / "build"
CONTRACTS = ("HealChainEscrow", "StakeRegistry", "BlockPublisher", "RewardDistribution")
INTERFACES = ("IERC20", "IERC20Errors")

# How many blocks one eth_getLogs asks for: public nodes refuse more.
LOG_BLOCKS = 10_000

# What to do about each error of the contracts.
HINTS = {
    "AccuracyAlreadyRevealed": "The outcome is recorded; read it with get_settlement.",
    "AggregatorVote": "The aggregator has no vote on its own candidate; leave its signature out.",
    "AlreadyClaimed": "This part of the reward was paid before; nothing is left to do.",
    "AlreadyDistributed": "The reward is here; everyone can withdraw its part.",
    "AlreadyDrawn": "The aggregator is drawn; read it with aggregator_of.",
    "AlreadySlashed": "This aggregator was slashed for this offence before; nothing is left to do.",
    "CohortSize": "Close registration with a number of miners between the task's minimum and maximum.",
    "CohortWithoutStake": "Nobody in the cohort has a stake to be drawn by; choose miners with stake.",
    "DeadlineNotReached": "Wait until the deadline has passed; until then a block may still be published.",
    "DeadlinePast": "The deadline has passed: choose a later one; of a task on chain, the publisher takes its refund.",
    "DuplicateTask": "A task of this name exists on chain already; choose another name.",
    "ERC20InsufficientAllowance": "Approve the escrow for the whole reward first (Token.approve).",
    "ERC20InsufficientBalance": "The account has too few of these tokens; get more, or give a smaller reward.",
    "ERC20InvalidApprover": "The token refuses this account; use another one.",
    "ERC20InvalidReceiver": "The token refuses this recipient; name another one.",
    "ERC20InvalidSender": "The token refuses this account; use another one.",
    "ERC20InvalidSpender": "The token does not let this account spend; approve the escrow's address.",
    "EvidenceTooLate": "The task's latest end has passed: what it recorded is free, and can no longer be taken.",
    "FeeOnTransfer": "This token keeps a part of what is sent; reward the task in another token or in ether.",
    "InsufficientStake": (
        "Deposit more stake (deposit_stake) or cancel a requested withdrawal, or leave the miner out of the cohort."
    ),
    "InvalidAccuracy": "The candidate must have tested at least one sample, and at most all of them correctly.",
    "InvalidApplication": (
        "The signature at this index is not this miner's, or is for another task, chain or contract; "
        "leave the miner out."
    ),
    "InvalidRecipient": "Name a recipient other than the zero address.",
    "InvalidReveal": "Value and salt do not open the commitment, or the accuracy exceeds 1; reveal what you committed.",
    "InvalidShortString": "The contracts were built wrongly; deploy the committed build.",
    "InvalidTaskID": "A task id has 1 to 64 bytes.",
    "InvalidTerms": "Correct the named field of the terms; the limits are in contracts/README.md.",
    "InvalidVote": "The vote at this index is not a signature; ask its miner to sign again, or leave it out.",
    "LengthMismatch": "Give one score commitment per participant, in the same order.",
    "NoBlock": "No block is published for this task; wait for the aggregator, or refund after the deadline.",
    "NoEquivocation": "The proof is two candidates of one task and round, both signed by the drawn aggregator.",
    "NotAggregator": "Only the aggregator whose turn it is may publish, and the candidate must name it.",
    "NotAscending": "Sort by address, and give every address once.",
    "NotDistributed": "Nothing is left to claim in this token: distribute first, and name the token of the task.",
    "NotDrawn": "There is no aggregator: it is not drawn yet (draw_aggregator), or nobody is left.",
    "NotEntitled": (
        "Only who the rules name may do this: for the accuracy the publisher, then the aggregator; for a slashed stake the "
        "other members, once; a recorded stake is released once."
    ),
    "NothingToWithdraw": "There is nothing to pay out to this account now.",
    "NotInCohort": "This address is not in the cohort; a vote that recovers to it was signed for something else.",
    "NotParticipant": (
        "Score, salt, position and proof do not lead to the block's root for this account; open exactly what was committed."
    ),
    "NotPublisher": "Only the task's publisher may do this; use its account.",
    "NotTheTurn": "Only the aggregator whose turn it is may do this, or be reported.",
    "OnlyContract": "Only another contract of this deployment may call this.",
    "OutcomePending": "Wait until the publisher or the aggregator reveals the accuracy, or both windows have passed.",
    "PublisherCannotMine": "The publisher of a task cannot be one of its miners; use another account.",
    "QuorumNotReached": "Collect more accepting attestations of the cohort for exactly this candidate.",
    "ReentrancyGuardReentrantCall": "A contract called back while it was being paid; that is refused.",
    "RegistrationIsClosed": "The cohort of this task is fixed; join another task.",
    "RegistrationIsOpen": "The publisher has to close registration first (close_registration).",
    "RequirementUnmet": "The model missed the required accuracy: the publisher was refunded and no scores are paid.",
    "RevealTooEarly": "The publisher may still reveal; wait until its window has passed.",
    "RevealTooLate": "The window for this reveal has passed; it cannot be made up for.",
    "SafeCastOverflowedUintDowncast": "The amount is too large for the contract: at most 2^88 - 1.",
    "SafeERC20FailedOperation": (
        "The token refused the transfer: approve the escrow for the whole reward and check the balance, "
        "or ask the token's owner."
    ),
    "ScoreAlreadyRevealed": "This miner's score is revealed; nothing is left to do.",
    "ScoresAlreadyOpen": "Scores can be revealed already; reveal or distribute.",
    "ScoresStillOpen": "Wait until every participant has revealed or the window has passed.",
    "ScoreTooLarge": "The score exceeds the task's maximum; it cannot be paid.",
    "SeedAvailable": "The seed block's hash is still known; draw the aggregator now.",
    "SeedExpired": "Nobody drew within 256 blocks; call move_seed, then draw again.",
    "SeedNotMined": "Wait until the chain is past the seed block, then draw.",
    "StakeHeld": "The task still holds what it recorded; release it after the time given.",
    "StringTooLong": "The contracts were built wrongly; deploy the committed build.",
    "TooFewParticipants": "The block needs at least the task's minimum number of participants.",
    "TransferFailed": "The receiving account refused the payment; repair it or name another recipient.",
    "TurnNotOver": "The aggregator may still publish; wait until its turn is over, or until it resigns.",
    "TurnOver": "The turn is over; the aggregator can publish until it is replaced, but not resign.",
    "WithdrawalTooEarly": "Wait until the withdrawal delay has passed.",
    "WrongCohort": "Bring along exactly the cohort that RegistrationClosed says (get_cohort reads it).",
    "WrongStatus": "The task is in another state (0 none, 1 locked, 2 published, 3 settled, 4 refunded); see get_task.",
    "WrongValue": "Send exactly the reward as the transaction's value, and no value when it is in tokens.",
    "ZeroAmount": "Send an amount above zero.",
    "ZeroReward": "Give a reward above zero.",
    **sending.HINTS,
}


# What the contracts know


class Status(IntEnum):
    NONE = 0
    LOCKED = 1
    PUBLISHED = 2
    SETTLED = 3
    REFUNDED = 4


class Outcome(IntEnum):
    PENDING = 0
    UNMET = 1
    MET = 2


class Offence(IntEnum):
    SILENCE = 0
    EQUIVOCATION = 1


@dataclass(frozen=True)
class Terms:
    """What the publisher fixes for the whole task. The fields of the Solidity struct Terms, in its order."""

    deadline_s: int
    publish_window_s: int
    publisher_reveal_window_s: int
    aggregator_reveal_window_s: int
    score_reveal_window_s: int
    min_miners: int
    max_miners: int
    fault_rate_ppm: int
    aggregator_share_ppm: int
    silence_penalty_ppm: int
    max_score: int
    min_stake_wei: int


@dataclass(frozen=True)
class TaskOnChain:
    """The escrow's record of a task; status NONE when there is no such task. token ZERO_ADDRESS: the reward is in ether."""

    publisher: Address
    reward_wei: int
    status: Status
    token: Address
    accuracy_commit: Bytes32
    spec_hash: Bytes32
    terms: Terms


@dataclass(frozen=True)
class CohortOnChain:
    """Addresses ascending, with the stakes recorded for the draw; all empty while registration is open.

    registrations are struct hashes of the signed Registrations; words are what the contracts ask to be brought along.
    """

    miners: tuple[Address, ...] = ()
    stakes_wei: tuple[int, ...] = ()
    registrations: tuple[Bytes32, ...] = ()
    words: tuple[Bytes32, ...] = ()


@dataclass(frozen=True)
class Draw:
    """seed_block is 0 while registration is open; seed is zero before the draw.

    replaced has bit i set when the member at position i of the cohort had a turn as aggregator before.
    """

    seed_block: int
    seed: Bytes32
    cohort_hash: Bytes32
    replaced: int
    turn_end_s: int


@dataclass(frozen=True)
class Withdrawal:
    """A part that was taken out of the stake, payable from withdrawable_at_s on."""

    amount_wei: int
    withdrawable_at_s: int


@dataclass(frozen=True)
class Hold:
    """What tasks recorded of a stake, and until when the last of them holds it."""

    recorded_wei: int
    held_until_s: int


@dataclass(frozen=True)
class BlockMeta:
    """What the chain keeps of a published block."""

    aggregator: Address
    published_at_s: int
    round_number: int
    votes: int
    correct: int
    total: int
    participant_count: int
    block_number: int
    candidate_hash: Bytes32
    contributions_root: Bytes32


@dataclass(frozen=True)
class Settlement:
    """How far a task with a block is settled. Each `_end_s` is the last second in which the act is accepted.

    remaining is what the participants have not withdrawn yet; remaining_parts the parts that it is for.
    """

    outcome: Outcome
    is_share_forfeited: bool
    is_distributed: bool
    publisher_reveal_end_s: int
    aggregator_reveal_end_s: int
    score_reveal_end_s: int
    revealed_count: int
    participant_count: int
    score_sum: int
    remaining: int
    remaining_parts: int


@dataclass(frozen=True)
class Score:
    is_revealed: bool
    score: int
    is_claimed: bool


@dataclass(frozen=True)
class Slash:
    """What was taken from a member of a cohort; bit i of credited is set when position i has had its part."""

    is_done: bool
    amount_wei: int
    credited: int


# Events. The fields of the Solidity events, in their order; `task_key` is keccak of the task id.


@dataclass(frozen=True)
class TaskPublished:
    task_key: Bytes32
    publisher: Address
    task_id: str
    token: Address
    reward_wei: int
    accuracy_commit: Bytes32
    spec_hash: Bytes32
    deadline_s: int


@dataclass(frozen=True)
class PublisherRefunded:
    task_key: Bytes32
    publisher: Address
    recipient: Address
    token: Address
    amount_wei: int


@dataclass(frozen=True)
class RewardReleased:
    task_key: Bytes32
    token: Address
    amount_wei: int


@dataclass(frozen=True)
class StakeDeposited:
    miner: Address
    amount_wei: int
    stake_wei: int


@dataclass(frozen=True)
class WithdrawalRequested:
    miner: Address
    amount_wei: int
    withdrawable_at_s: int


@dataclass(frozen=True)
class StakeWithdrawn:
    miner: Address
    recipient: Address
    amount_wei: int


@dataclass(frozen=True)
class CreditWithdrawn:
    miner: Address
    recipient: Address
    amount_wei: int


@dataclass(frozen=True)
class RegistrationClosed:
    """cohort holds a word per member: the address in its upper 160 bits, the recorded stake in wei below."""

    task_key: Bytes32
    cohort: tuple[Bytes32, ...]
    registrations: tuple[Bytes32, ...]
    seed_block: int


@dataclass(frozen=True)
class AggregatorDrawn:
    task_key: Bytes32
    aggregator: Address
    seed_block: int
    block_hash: Bytes32
    seed: Bytes32
    turn_end_s: int


@dataclass(frozen=True)
class AggregatorResigned:
    task_key: Bytes32
    aggregator: Address


@dataclass(frozen=True)
class AggregatorReplaced:
    """aggregator is ZERO_ADDRESS when nobody follows."""

    task_key: Bytes32
    former: Address
    aggregator: Address
    turn_end_s: int


@dataclass(frozen=True)
class SeedMoved:
    task_key: Bytes32
    expired_block: int
    seed_block: int


@dataclass(frozen=True)
class StakeReleased:
    task_key: Bytes32
    miner: Address
    amount_wei: int


@dataclass(frozen=True)
class StakeSlashed:
    task_key: Bytes32
    aggregator: Address
    offence: Offence
    position: int
    amount_wei: int


@dataclass(frozen=True)
class CreditAdded:
    task_key: Bytes32
    miner: Address
    amount_wei: int


@dataclass(frozen=True)
class BlockPublished:
    task_key: Bytes32
    aggregator: Address
    candidate_hash: Bytes32
    model_sha256: Bytes32
    model_uri: str
    correct: int
    total: int
    round_number: int
    contributions_root: Bytes32


@dataclass(frozen=True)
class EquivocationReported:
    task_key: Bytes32
    aggregator: Address
    reporter: Address
    first: Bytes32
    second: Bytes32


@dataclass(frozen=True)
class AccuracyRevealed:
    """score_reveal_end_s is 0 when the outcome is UNMET."""

    task_key: Bytes32
    revealer: Address
    accuracy_ppm: int
    outcome: Outcome
    score_reveal_end_s: int


@dataclass(frozen=True)
class ScoresOpened:
    task_key: Bytes32
    score_reveal_end_s: int


@dataclass(frozen=True)
class ScoreRevealed:
    task_key: Bytes32
    miner: Address
    position: int
    score: int


@dataclass(frozen=True)
class RewardCredited:
    """A refund to the publisher, or the aggregator's share; both wait to be withdrawn."""

    task_key: Bytes32
    account: Address
    token: Address
    amount_wei: int


@dataclass(frozen=True)
class Distributed:
    """aggregator_share_wei is 0 when the share was forfeited; pool_wei is for the participants, in proportion to parts."""

    task_key: Bytes32
    aggregator: Address
    reward_wei: int
    aggregator_share_wei: int
    pool_wei: int
    parts: int


@dataclass(frozen=True)
class RewardClaimed:
    task_key: Bytes32
    miner: Address
    recipient: Address
    token: Address
    amount_wei: int


@dataclass(frozen=True)
class Withdrawn:
    account: Address
    recipient: Address
    token: Address
    amount_wei: int


@dataclass(frozen=True)
class Approval:
    """Of an ERC-20 token."""

    owner: Address
    spender: Address
    amount: int


@dataclass(frozen=True)
class Transfer:
    """Of an ERC-20 token."""

    sender: Address
    recipient: Address
    amount: int


EVENTS: tuple[type, ...] = (
    TaskPublished,
    PublisherRefunded,
    RewardReleased,
    StakeDeposited,
    WithdrawalRequested,
    StakeWithdrawn,
    CreditWithdrawn,
    RegistrationClosed,
    AggregatorDrawn,
    AggregatorResigned,
    AggregatorReplaced,
    SeedMoved,
    StakeReleased,
    StakeSlashed,
    CreditAdded,
    BlockPublished,
    EquivocationReported,
    AccuracyRevealed,
    ScoresOpened,
    ScoreRevealed,
    RewardCredited,
    Distributed,
    RewardClaimed,
    Withdrawn,
    Approval,
    Transfer,
)

Event = TypeVar("Event")
Record = TypeVar("Record")


@dataclass(frozen=True)
class Mined(Generic[Event]):
    """A mined transaction: the event it is about, and everything else that it emitted, in order."""

    transaction: Bytes32
    block_number: int
    gas_used: int
    event: Event
    events: tuple[Any, ...]


@dataclass(frozen=True)
class TransactionRecord:
    """One transaction found on chain. `kind` is the contract function's name, or its selector when it is not ours."""

    kind: str
    transaction: Bytes32
    sender: Address
    block_number: int
    timestamp_s: int
    gas_used: int


@dataclass(frozen=True)
class Logged:
    """An event of the four contracts, and where on the chain it is."""

    event: Any
    transaction: Bytes32
    block_number: int
    log_index: int
    timestamp_s: int


@dataclass(frozen=True)
class Deployment:
    """The four contracts of one deployment. `publisher` is the verifying contract of every signed message."""

    chain_id: int
    escrow: Address
    stakes: Address
    publisher: Address
    rewards: Address
    block_number: int

    @property
    def addresses(self) -> tuple[Address, ...]:
        """In the order of CONTRACTS."""
        return (self.escrow, self.stakes, self.publisher, self.rewards)


class InvalidDeployment(ValueError):
    """The addresses do not hold this build of the contracts, or the contracts do not know each other."""


# Builds, and values between Solidity and Python


@cache
def load_build(name: str) -> dict[str, Any]:
    """ABI, bytecode, deployedBytecode and immutableReferences of a contract."""
    build: dict[str, Any] = json.loads((BUILD / f"{name}.json").read_text())
    return build


@cache
def _entries(kind: str) -> dict[str, dict[str, Any]]:
    """Every function, event or error of the four contracts and of tokens, by selector or topic."""
    entries = [
        entry for name in (*CONTRACTS, *INTERFACES) for entry in load_build(name)["abi"] if entry["type"] == kind
    ]
    return {_selector(entry): entry for entry in entries}


def _selector(entry: Mapping[str, Any]) -> str:
    if entry["type"] == "event":
        return "0x" + keccak(text=f"{entry['name']}({','.join(map(_abi_type, entry['inputs']))})").hex()
    # The selector of an error is computed like that of a function.
    return "0x" + function_abi_to_4byte_selector({**entry, "type": "function"}).hex()  # type: ignore[arg-type]


def _abi_type(entry: Mapping[str, Any]) -> str:
    if not entry["type"].startswith("tuple"):
        return str(entry["type"])
    return f"({','.join(map(_abi_type, entry['components']))}){entry['type'][5:]}"


def _plain(value: Any, hint: Any) -> Any:
    """One value of a contract as the type that a record's field announces."""
    if get_origin(hint) is tuple:
        return tuple(_plain(item, get_args(hint)[0]) for item in value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    if hasattr(hint, "__dataclass_fields__"):
        return _record(hint, value)
    if isinstance(value, bytes):
        return "0x" + bytes(value).hex()
    if isinstance(value, str) and re.fullmatch("0x[0-9a-fA-F]{40}", value):
        return str(to_checksum_address(value))
    return value


def _record(kind: type[Record], values: Sequence[Any]) -> Record:
    """The dataclass with these values in the order of its fields."""
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(*(_plain(value, hints[name]) for name, value in zip(names, values, strict=True)))


def _decode_event(log: Mapping[str, Any]) -> Any | None:
    """The dataclass of a log, or None when it is none of ours: a token may emit what it likes, in any form."""
    topics = [bytes(topic) for topic in log["topics"]]
    entry = _entries("event").get("0x" + topics[0].hex()) if topics else None
    kind = next((kind for kind in EVENTS if entry is not None and kind.__name__ == entry["name"]), None)
    if entry is None or kind is None:
        return None
    indexed = [_abi_type(field) for field in entry["inputs"] if field["indexed"]]
    plain = [_abi_type(field) for field in entry["inputs"] if not field["indexed"]]
    try:
        from_topics = iter([decode([name], topic)[0] for name, topic in zip(indexed, topics[1:], strict=True)])
        from_data = iter(decode(plain, bytes(log["data"])))
        values = [next(from_topics if field["indexed"] else from_data) for field in entry["inputs"]]
        return _record(kind, values)
    except (DecodingError, ValueError):
        return None


def explain(data: bytes) -> Reverted | None:
    """The error of the four contracts, or of a token, that revert data says; or None."""
    entry = _entries("error").get("0x" + data[:4].hex())
    if entry is None:
        return None
    try:
        values = decode([_abi_type(field) for field in entry["inputs"]], data[4:])
    except DecodingError:
        return None
    return Reverted(entry["name"], tuple(_plain(value, None) for value in values), HINTS[entry["name"]])


def task_key(task_id: TaskId) -> Bytes32:
    """The contracts' key of a task: keccak of its id."""
    return "0x" + keccak(text=task_id).hex()


# Transactions


class Bound:
    """One contract at one address. Without a sender only the views can be used.

    purpose: set it where the same call is meant several times; each is then made once for its purpose (contracts.sending).
    Events are looked for from first_block on: the block of the deployment.
    """

    name: ClassVar[str]

    def __init__(
        self,
        web3: Web3,
        address: Address,
        sender: Sender | None = None,
        *,
        purpose: str = "",
        first_block: int = 0,
    ) -> None:
        self.web3 = web3
        self.address: Address = str(to_checksum_address(address))
        self.sender = sender
        self.purpose = purpose
        self.first_block = first_block
        self._contract = web3.eth.contract(address=to_checksum_address(address), abi=load_build(self.name)["abi"])

    def _encode(self, function: str, *arguments: Any) -> bytes:
        return bytes.fromhex(self._contract.encode_abi(function, args=list(arguments))[2:])

    def _transact(self, event: type[Event], function: str, *arguments: Any, value_wei: int = 0) -> Mined[Event]:
        if self.sender is None:
            raise ValueError(f"{self.name}.{function} sends a transaction: bind the contract to an account")
        receipt = self.sender.send(
            self._encode(function, *arguments),
            to=self.address,
            value_wei=value_wei,
            purpose=self.purpose,
            explain=explain,
        )
        events = tuple(decoded for log in receipt["logs"] if (decoded := _decode_event(log)) is not None)
        return Mined(
            transaction="0x" + bytes(receipt["transactionHash"]).hex(),
            block_number=receipt["blockNumber"],
            gas_used=receipt["gasUsed"],
            event=next(found for found in events if isinstance(found, event)),
            events=events,
        )

    def _read(self, function: str, *arguments: Any) -> tuple[Any, ...]:
        """The return values of a view."""
        transaction = {"to": self.address, "data": "0x" + self._encode(function, *arguments).hex()}
        entry = next(entry for entry in load_build(self.name)["abi"] if entry.get("name") == function)
        answer = sending.call(self.web3, transaction, explain=explain)
        if not answer:
            raise InvalidDeployment(f"no {self.name} at {self.address} on chain {self.web3.eth.chain_id}")
        return tuple(decode([_abi_type(output) for output in entry["outputs"]], answer))

    def _own_address(self) -> Address:
        if self.sender is None:
            raise ValueError(f"{self.name}: name a recipient, or bind the contract to a sender")
        return str(self.sender.account.address)

    def _inputs(self, function: str) -> list[Any]:
        return next(entry["inputs"] for entry in load_build(self.name)["abi"] if entry.get("name") == function)

    def _logs(self, task_id: TaskId, kind: type[Event]) -> Iterator[Any]:
        """Logs of this contract of one kind about a task, in the order of the chain."""
        topic = next(found for found, entry in _entries("event").items() if entry["name"] == kind.__name__)
        return _logs(self.web3, [self.address], self.first_block, [topic, task_key(task_id)])

    def _events(self, task_id: TaskId, kind: type[Event]) -> Iterator[Event]:
        return (_decode_event(log) for log in self._logs(task_id, kind))  # type: ignore[misc]

    def _read_address(self, function: str, *arguments: Any) -> Address:
        return str(to_checksum_address(self._read(function, *arguments)[0]))

    def _read_bytes32(self, function: str, *arguments: Any) -> Bytes32:
        return "0x" + bytes(self._read(function, *arguments)[0]).hex()


Contract = TypeVar("Contract", bound=Bound)


class HealChainEscrow(Bound):
    """Typed calls to contracts/src/HealChainEscrow.sol."""

    name = "HealChainEscrow"

    def publish_task(
        self,
        task_id: TaskId,
        accuracy_commit: Bytes32,
        spec_hash: Bytes32,
        terms: Terms,
        *,
        reward_wei: int,
        token: Address = ZERO_ADDRESS,
    ) -> Mined[TaskPublished]:
        """Tokens must have been approved to the escrow before (Token.approve)."""
        values = tuple(getattr(terms, field.name) for field in fields(terms))
        arguments = (task_id, accuracy_commit, spec_hash, token, reward_wei, values)
        value_wei = reward_wei if token == ZERO_ADDRESS else 0
        return self._transact(TaskPublished, "publishTask", *arguments, value_wei=value_wei)

    def refund_publisher(self, task_id: TaskId, recipient: Address | None = None) -> Mined[PublisherRefunded]:
        """Paid to the publisher itself unless a recipient is named."""
        return self._transact(PublisherRefunded, "refundPublisher", task_id, recipient or self._own_address())

    def get_task(self, task_id: TaskId) -> TaskOnChain:
        return _record(TaskOnChain, self._read("getTask", task_key(task_id))[0])

    def block_publisher(self) -> Address:
        return self._read_address("blockPublisher")

    def reward_distribution(self) -> Address:
        return self._read_address("rewardDistribution")


class StakeRegistry(Bound):
    """Typed calls to contracts/src/StakeRegistry.sol."""

    name = "StakeRegistry"

    def deposit_stake(self, *, amount_wei: int) -> Mined[StakeDeposited]:
        return self._transact(StakeDeposited, "depositStake", value_wei=amount_wei)

    def request_withdrawal(self, amount_wei: int) -> Mined[WithdrawalRequested]:
        """Replaces an earlier request; 0 cancels it."""
        return self._transact(WithdrawalRequested, "requestWithdrawal", amount_wei)

    def withdraw_stake(self, recipient: Address | None = None) -> Mined[StakeWithdrawn]:
        """Paid to the miner itself unless a recipient is named."""
        return self._transact(StakeWithdrawn, "withdrawStake", recipient or self._own_address())

    def withdraw_credit(self, recipient: Address | None = None) -> Mined[CreditWithdrawn]:
        """Paid to the miner itself unless a recipient is named."""
        return self._transact(CreditWithdrawn, "withdrawCredit", recipient or self._own_address())

    def close_registration(
        self, task_id: TaskId, applications: Sequence[tuple[Registration, Bytes]]
    ) -> Mined[RegistrationClosed]:
        """The admitted miners' Registrations with their signatures, strictly ascending by address (as numbers)."""
        packed = [_application(registration, signature) for registration, signature in applications]
        return self._transact(RegistrationClosed, "closeRegistration", task_id, packed)

    def draw_aggregator(self, task_id: TaskId) -> Mined[AggregatorDrawn]:
        return self._transact(AggregatorDrawn, "drawAggregator", task_id, self._cohort_words(task_id))

    def move_seed(self, task_id: TaskId) -> Mined[SeedMoved]:
        """Only when the draw was missed for 256 blocks (SeedExpired)."""
        return self._transact(SeedMoved, "moveSeed", task_id)

    def resign_aggregator(self, task_id: TaskId) -> Mined[AggregatorResigned]:
        """By the aggregator, before its turn is over: it loses nothing, and can publish no more."""
        return self._transact(AggregatorResigned, "resignAggregator", task_id)

    def replace_aggregator(self, task_id: TaskId) -> Mined[AggregatorReplaced]:
        """When the aggregator resigned, or its turn is over without a block (which costs it the announced part of its stake)."""
        return self._transact(AggregatorReplaced, "replaceAggregator", task_id, self._cohort_words(task_id))

    def credit_slashed(self, task_id: TaskId, culprit: Address, offence: Offence, miner: Address) -> Mined[CreditAdded]:
        """Credit a member with its part of what was taken from another; for anybody to call, once per member."""
        cohort = self.get_cohort(task_id)
        for account in (culprit, miner):
            if account not in cohort.miners:
                raise ValueError(
                    f"{account} is not in the cohort of {task_id}: {', '.join(cohort.miners) or 'none yet'}"
                )
        positions = cohort.miners.index(culprit), cohort.miners.index(miner)
        arguments = (task_id, list(cohort.words), positions[0], int(offence), positions[1])
        return self._transact(CreditAdded, "creditSlashed", *arguments)

    def release_stake(self, task_id: TaskId, miner: Address) -> Mined[StakeReleased]:
        """After the task's latest end, while other tasks hold the rest of the stake; when none does, nothing needs releasing."""
        cohort = self.get_cohort(task_id)
        if miner not in cohort.miners:
            raise ValueError(f"{miner} is not in the cohort of {task_id}: {', '.join(cohort.miners) or 'none yet'}")
        position = cohort.miners.index(miner)
        return self._transact(StakeReleased, "releaseStake", task_id, list(cohort.words), position)

    def stake_of(self, miner: Address) -> int:
        """What tasks recorded included, requested withdrawals not."""
        return int(self._read("stakeOf", miner)[0])

    def available_stake(self, miner: Address) -> int:
        return int(self._read("availableStake", miner)[0])

    def credit_of(self, miner: Address) -> int:
        return int(self._read("creditOf", miner)[0])

    def get_hold(self, miner: Address) -> Hold:
        return _record(Hold, self._read("getHold", miner))

    def get_withdrawal(self, miner: Address) -> Withdrawal:
        return _record(Withdrawal, self._read("getWithdrawal", miner))

    def get_cohort(self, task_id: TaskId) -> CohortOnChain:
        """From the event; the chain keeps only its hash."""
        found = next(self._events(task_id, RegistrationClosed), None)
        if found is None:
            return CohortOnChain()
        words = [int(word, 16) for word in found.cohort]
        return CohortOnChain(
            miners=tuple(str(to_checksum_address((word >> 96).to_bytes(20, "big"))) for word in words),
            stakes_wei=tuple(word % 2**96 for word in words),
            registrations=found.registrations,
            words=found.cohort,
        )

    def aggregator_of(self, task_id: TaskId) -> Address | None:
        """Who may publish; None before the draw, after a resignation, and when nobody is left."""
        found = self._read_address("aggregatorOf", task_key(task_id))
        return None if found == ZERO_ADDRESS else found

    def get_draw(self, task_id: TaskId) -> Draw:
        return _record(Draw, self._read("getDraw", task_key(task_id)))

    def get_slash(self, task_id: TaskId, position: int, offence: Offence) -> Slash:
        """What was taken from the member at this position of the cohort."""
        return _record(Slash, self._read("getSlash", task_key(task_id), position, int(offence))[0])

    def withdrawal_delay_s(self) -> int:
        return int(self._read("withdrawalDelay_s")[0])

    def escrow(self) -> Address:
        return self._read_address("escrow")

    def block_publisher(self) -> Address:
        return self._read_address("blockPublisher")

    def registration_typehash(self) -> Bytes32:
        return self._read_bytes32("REGISTRATION_TYPEHASH")

    def _cohort_words(self, task_id: TaskId) -> list[Bytes32]:
        return list(self.get_cohort(task_id).words)


class BlockPublisher(Bound):
    """Typed calls to contracts/src/BlockPublisher.sol."""

    name = "BlockPublisher"

    def publish_block(
        self, candidate: Candidate, signatures: Sequence[Bytes], cohort: CohortOnChain
    ) -> Mined[BlockPublished]:
        """Signatures of the accepting attestations, in the ascending order of their signers' addresses."""
        votes = [compact_signature(signature) for signature in signatures]
        return self._transact(BlockPublished, "publishBlock", _candidate(candidate), votes, list(cohort.words))

    def report_equivocation(
        self,
        first: Candidate,
        first_signature: Bytes,
        second: Candidate,
        second_signature: Bytes,
        cohort: CohortOnChain,
    ) -> Mined[EquivocationReported]:
        arguments = (
            _candidate(first),
            compact_signature(first_signature),
            _candidate(second),
            compact_signature(second_signature),
            list(cohort.words),
        )
        return self._transact(EquivocationReported, "reportEquivocation", *arguments)

    def candidate_hash(self, candidate: Candidate) -> Bytes32:
        return self._read_bytes32("candidateHash", _candidate(candidate))

    def contributions_root(self, candidate: Candidate) -> Bytes32:
        return self._read_bytes32("contributionsRoot", list(candidate.participants), list(candidate.score_commits))

    def required_votes(self, task_id: TaskId, cohort_size: int) -> int:
        return int(self._read("requiredVotes", task_id, cohort_size)[0])

    def get_block_meta(self, task_id: TaskId) -> BlockMeta | None:
        """The published block, or None."""
        meta = _record(BlockMeta, self._read("getBlockMeta", task_key(task_id))[0])
        return meta if meta.published_at_s else None

    def get_candidate(self, task_id: TaskId) -> Candidate | None:
        """The published candidate, from the transaction that published it; None when there is no block."""
        log = next(self._logs(task_id, BlockPublished), None)
        if log is None:
            return None
        sent = self.web3.eth.get_transaction(log["transactionHash"])
        _, arguments = self._contract.decode_function_input(sent["input"])
        values = arguments["candidate"]
        names = [entry["name"] for entry in self._inputs("publishBlock")[0]["components"]]
        hints = get_type_hints(Candidate)
        pairs = zip(Candidate.model_fields, names, strict=True)
        return Candidate(**{field: _plain(values[name], hints[field]) for field, name in pairs})

    def get_participants(self, task_id: TaskId) -> tuple[Address, ...]:
        """In address order; empty when there is no block."""
        found = self.get_candidate(task_id)
        return found.participants if found else ()

    def place_of(self, task_id: TaskId, miner: Address) -> Place | None:
        """The miner's place in the block, with its proof; None for who has no part in it."""
        found = self.get_candidate(task_id)
        if found is None or miner not in found.participants:
            return None
        return place(found.participants, found.score_commits, found.participants.index(miner))

    def candidate_typehash(self) -> Bytes32:
        return self._read_bytes32("CANDIDATE_TYPEHASH")

    def attestation_typehash(self) -> Bytes32:
        return self._read_bytes32("ATTESTATION_TYPEHASH")

    def domain_separator(self) -> Bytes32:
        return self._read_bytes32("domainSeparator")

    def escrow(self) -> Address:
        return self._read_address("escrow")

    def stake_registry(self) -> Address:
        return self._read_address("stakeRegistry")


class RewardDistribution(Bound):
    """Typed calls to contracts/src/RewardDistribution.sol."""

    name = "RewardDistribution"

    def reveal_accuracy(self, task_id: TaskId, accuracy_ppm: int, salt: bytes) -> Mined[AccuracyRevealed]:
        return self._transact(AccuracyRevealed, "revealAccuracy", task_id, accuracy_ppm, salt)

    def open_scores(self, task_id: TaskId) -> Mined[ScoresOpened]:
        """Optional: records the silence of publisher and aggregator, which reveal_score and distribute do as well."""
        return self._transact(ScoresOpened, "openScores", task_id)

    def reveal_score(self, task_id: TaskId, opening: Opening) -> Mined[ScoreRevealed]:
        return self._transact(ScoreRevealed, "revealScore", task_id, _opening(opening))

    def distribute(self, task_id: TaskId) -> Mined[RewardReleased]:
        """`.events` has a RewardCredited for publisher or aggregator, and Distributed when the requirement was met."""
        return self._transact(RewardReleased, "distribute", task_id)

    def claim_to(
        self, task_id: TaskId, opening: Opening, recipient: Address | None = None, *, token: Address = ZERO_ADDRESS
    ) -> Mined[RewardClaimed]:
        """The sender's part of a task's reward, paid to itself unless a recipient is named."""
        arguments = (task_id, token, recipient or self._own_address(), _opening(opening))
        return self._transact(RewardClaimed, "claimTo", *arguments)

    def withdraw_to(self, recipient: Address | None = None, *, token: Address = ZERO_ADDRESS) -> Mined[Withdrawn]:
        """The sender's balance (refunds, aggregators' shares), paid to itself unless a recipient is named."""
        return self._transact(Withdrawn, "withdrawTo", token, recipient or self._own_address())

    def balance_of(self, account: Address, token: Address = ZERO_ADDRESS) -> int:
        """What the account can withdraw beside its claims."""
        return int(self._read("balanceOf", token, account)[0])

    def claimable(self, task_id: TaskId, position: int, score: int, token: Address = ZERO_ADDRESS) -> int:
        """What the participant with this score at this position would be paid for its claim now."""
        return int(self._read("claimable", task_key(task_id), token, position, score)[0])

    def get_settlement(self, task_id: TaskId) -> Settlement:
        """Raises Reverted("NoBlock") before a block is published."""
        return _record(Settlement, self._read("getSettlement", task_id)[0])

    def get_score(self, task_id: TaskId, position: int) -> Score:
        """The score is in the event of its reveal; 0 when it is not revealed."""
        is_revealed, is_claimed = self._read("isRevealed", task_key(task_id), position)
        events = self._events(task_id, ScoreRevealed) if is_revealed else ()
        score = next((event.score for event in events if event.position == position), 0)
        return Score(is_revealed, score, is_claimed)

    def escrow(self) -> Address:
        return self._read_address("escrow")

    def block_publisher(self) -> Address:
        return self._read_address("blockPublisher")


class Token(Bound):
    """The part of an ERC-20 token that a publisher needs."""

    name = "IERC20"

    def approve(self, spender: Address, amount: int) -> Mined[Approval]:
        return self._transact(Approval, "approve", spender, amount)

    def allowance(self, owner: Address, spender: Address) -> int:
        return int(self._read("allowance", owner, spender)[0])

    def balance_of(self, account: Address) -> int:
        return int(self._read("balanceOf", account)[0])


def _candidate(candidate: Candidate) -> tuple[Any, ...]:
    return tuple(getattr(candidate, name) for name in Candidate.model_fields)


def _application(registration: Registration, signature: Bytes) -> tuple[Any, ...]:
    """The Solidity struct Application: what its Registration can be recomputed from, and the signature."""
    key_hash = keccak(hexstr=registration.encryption_key)
    content = (registration.miner, key_hash, registration.dataset_proof_sha256, registration.stake_wei)
    return (*content, *compact_signature(signature))


def _opening(opening: Opening) -> tuple[Any, ...]:
    """The Solidity struct Opening."""
    return (opening.score, opening.salt, opening.place.position, opening.place.proof)


# Deployment


def deploy(sender: Sender, *, withdrawal_delay_s: int = 3600) -> Deployment:
    """Deploy the four contracts from one account, which has no power over them afterwards, and check the result.

    They name each other in their constructors: an address follows from the deployer's nonce and is known before. The first
    nonce is in the account's journal: called again, this goes on with the same deployment, or returns it.
    """
    web3, account, plan = sender.web3, sender.account, _deployment_plan(withdrawal_delay_s)
    nonce = sender.claim_nonce(plan)
    escrow, stakes, publisher, rewards = (_create_address(account.address, nonce + i) for i in range(4))
    arguments = {
        "HealChainEscrow": (publisher, rewards),
        "StakeRegistry": (escrow, publisher, withdrawal_delay_s),
        "BlockPublisher": (escrow, stakes),
        "RewardDistribution": (escrow, publisher),
    }
    first_block = None
    for number, name in enumerate(CONTRACTS):
        build = load_build(name)
        factory = web3.eth.contract(abi=build["abi"], bytecode=build["bytecode"])
        data = bytes.fromhex(factory.constructor(*arguments[name]).data_in_transaction[2:])
        try:
            receipt = sender.send(data, to=None, purpose=plan, nonce=nonce + number, explain=explain)
        except (NonceTaken, Replaced) as error:
            sender.forget_nonce(plan)
            raise InvalidDeployment(
                f"{error}. What is deployed so far is of no use; run this again for another"
            ) from error
        first_block = receipt["blockNumber"] if first_block is None else first_block
    deployment = Deployment(web3.eth.chain_id, escrow, stakes, publisher, rewards, first_block or 0)
    check_deployment(web3, deployment)
    return deployment


def _deployment_plan(withdrawal_delay_s: int) -> str:
    """The name of deploying this build with these settings."""
    builds = keccak("".join(load_build(name)["bytecode"] for name in CONTRACTS).encode())
    return f"deploy build {builds.hex()[:16]}, withdrawal delay {withdrawal_delay_s} s"


def check_deployment(web3: Web3, deployment: Deployment) -> None:
    """Raise InvalidDeployment unless the addresses hold exactly this build, on this chain, and know each other."""
    if web3.eth.chain_id != deployment.chain_id:
        raise InvalidDeployment(f"deployed on chain {deployment.chain_id}, connected to chain {web3.eth.chain_id}")
    for name, address in zip(CONTRACTS, deployment.addresses, strict=True):
        build = load_build(name)
        code = bytearray(web3.eth.get_code(to_checksum_address(address)))
        expected = bytearray.fromhex(build["deployedBytecode"][2:])
        if len(code) == len(expected):
            for reference in build["immutableReferences"]:
                start, end = reference["start"], reference["start"] + reference["length"]
                code[start:end] = expected[start:end]
        if code != expected:
            raise InvalidDeployment(f"the code at {address} is not this build of {name}")
    contracts = connect(web3, deployment)
    wiring = {
        "escrow.blockPublisher": (contracts.escrow.block_publisher(), deployment.publisher),
        "escrow.rewardDistribution": (contracts.escrow.reward_distribution(), deployment.rewards),
        "stakes.escrow": (contracts.stakes.escrow(), deployment.escrow),
        "stakes.blockPublisher": (contracts.stakes.block_publisher(), deployment.publisher),
        "publisher.escrow": (contracts.publisher.escrow(), deployment.escrow),
        "publisher.stakeRegistry": (contracts.publisher.stake_registry(), deployment.stakes),
        "rewards.escrow": (contracts.rewards.escrow(), deployment.escrow),
        "rewards.blockPublisher": (contracts.rewards.block_publisher(), deployment.publisher),
    }
    for what, (found, expected_address) in wiring.items():
        if found != expected_address:
            raise InvalidDeployment(f"{what} is {found}, not {expected_address}")


def _create_address(sender: Address, nonce: int) -> Address:
    """Where a CREATE transaction of this sender puts the contract."""
    return str(to_checksum_address(keccak(rlp.encode([bytes.fromhex(sender[2:]), nonce]))[12:]))


@dataclass(frozen=True)
class Contracts:
    escrow: HealChainEscrow
    stakes: StakeRegistry
    publisher: BlockPublisher
    rewards: RewardDistribution


def connect(web3: Web3, deployment: Deployment, sender: Sender | None = None, *, purpose: str = "") -> Contracts:
    """The four contracts of a deployment, bound to the account that sends."""

    def bind(contract: type[Contract], address: Address) -> Contract:
        return contract(web3, address, sender, purpose=purpose, first_block=deployment.block_number)

    return Contracts(
        bind(HealChainEscrow, deployment.escrow),
        bind(StakeRegistry, deployment.stakes),
        bind(BlockPublisher, deployment.publisher),
        bind(RewardDistribution, deployment.rewards),
    )


# What happened on chain


def task_events(web3: Web3, deployment: Deployment, task_id: TaskId) -> list[TransactionRecord]:
    """Every transaction about a task, in the order of the chain."""
    return _transactions(web3, _deployment_logs(web3, deployment, [task_key(task_id)]))


def account_events(web3: Web3, deployment: Deployment, accounts: Sequence[Address]) -> list[TransactionRecord]:
    """Every deposit and withdrawal of these accounts (stake, credit and rewards), in the order of the chain."""
    topics = ["0x" + account[2:].lower().rjust(64, "0") for account in accounts]
    return _transactions(web3, _deployment_logs(web3, deployment, topics))


def find_events(web3: Web3, deployment: Deployment, task_id: TaskId, kind: type[Event]) -> list[Event]:
    """The events of one kind about a task, in the order of the chain."""
    decoded = (_decode_event(log) for log in _deployment_logs(web3, deployment, [task_key(task_id)]))
    return [found for found in decoded if isinstance(found, kind)]


def history(web3: Web3, deployment: Deployment, first_block: int, last_block: int) -> Iterator[Logged]:
    """Every event of the four contracts in some blocks, the last one included, in the order of the chain."""
    times_s: dict[int, int] = {}
    for log in _logs(web3, deployment.addresses, first_block, []):
        number = log["blockNumber"]
        if number > last_block:
            return
        if number not in times_s:
            times_s = {number: web3.eth.get_block(number)["timestamp"]}
        if (event := _decode_event(log)) is not None:
            yield Logged(event, "0x" + bytes(log["transactionHash"]).hex(), number, log["logIndex"], times_s[number])


def _deployment_logs(web3: Web3, deployment: Deployment, first_topics: Sequence[str]) -> Iterator[Any]:
    """Logs of the four contracts whose first indexed value is one of these."""
    if not first_topics:
        return iter(())
    return _logs(web3, deployment.addresses, deployment.block_number, [None, list(first_topics)])


def _logs(web3: Web3, addresses: Sequence[Address], first_block: int, topics: list[Any]) -> Iterator[Any]:
    """Logs of these contracts with these topics, in the order of the chain, asked for in steps that public nodes accept."""
    latest = web3.eth.block_number
    for start in range(first_block, latest + 1, LOG_BLOCKS):
        yield from web3.eth.get_logs(
            {
                "fromBlock": start,
                "toBlock": min(start + LOG_BLOCKS - 1, latest),
                "address": [to_checksum_address(address) for address in addresses],
                "topics": topics,
            }
        )


def _transactions(web3: Web3, logs: Iterable[Any]) -> list[TransactionRecord]:
    hashes = dict.fromkeys((log["blockNumber"], log["transactionIndex"], bytes(log["transactionHash"])) for log in logs)
    records = []
    for block_number, _, transaction_hash in sorted(hashes):
        transaction = web3.eth.get_transaction(transaction_hash)  # type: ignore[arg-type]
        selector = "0x" + bytes(transaction["input"])[:4].hex()
        records.append(
            TransactionRecord(
                kind=_entries("function").get(selector, {"name": selector})["name"],
                transaction="0x" + transaction_hash.hex(),
                sender=str(to_checksum_address(transaction["from"])),
                block_number=block_number,
                timestamp_s=web3.eth.get_block(block_number)["timestamp"],
                gas_used=web3.eth.get_transaction_receipt(transaction_hash)["gasUsed"],  # type: ignore[arg-type]
            )
        )
    return records
