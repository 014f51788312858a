"""Every signed or hashed message of the protocol: one frozen model is one EIP-712 struct. PURE.

The model is the struct: field names, order and types are written once, here. The contracts that check a message carry
the same type string, and a test compares the two type hashes. Commitments follow Solidity's packed encoding.

    Bytes32, Address, Bytes   lower-case hex strings (an address is checksummed), so that a record survives JSON unchanged
    task_id                   the task's name on chain; its keccak is the contracts' key

Sources: EIP-712 (typed structured data), EIP-191. Errors: ValueError (a field that does not fit its type).
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, ClassVar, get_type_hints

from eth_account import Account
from eth_account.messages import SignableMessage, encode_typed_data
from eth_keys.datatypes import PublicKey as CurvePoint
from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints


def _checksummed(value: str) -> str:
    return str(to_checksum_address(value))


Bytes32 = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-f]{64}$")]
Bytes = Annotated[str, StringConstraints(pattern=r"^0x([0-9a-f]{2})*$")]
PublicKey = Annotated[str, StringConstraints(pattern=r"^0x0[23][0-9a-f]{64}$")]
Salt = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-f]{32}$")]
Address = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-fA-F]{40}$"), AfterValidator(_checksummed)]
_TASK_ID = "[a-z0-9][a-z0-9-]{2,63}"  # names folders of homes and of the store as well
TaskId = Annotated[str, StringConstraints(pattern=f"^{_TASK_ID}$")]
TaskIdOrNone = Annotated[str, StringConstraints(pattern=f"^({_TASK_ID})?$")]  # empty: there is none yet
ActorName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]
Uint32 = Annotated[int, Field(ge=0, lt=2**32, strict=True)]
Uint64 = Annotated[int, Field(ge=0, lt=2**64, strict=True)]
Wei = Annotated[int, Field(ge=0, lt=2**88, strict=True)]
Addresses = tuple[Address, ...]
Bytes32s = tuple[Bytes32, ...]
Uint32s = tuple[Uint32, ...]
Strings = tuple[str, ...]

SOLIDITY: dict[Any, str] = {
    Bytes32: "bytes32",
    Bytes: "bytes",
    PublicKey: "bytes",
    Salt: "bytes",
    Address: "address",
    TaskId: "string",
    ActorName: "string",
    Uint32: "uint32",
    Uint64: "uint64",
    Wei: "uint96",
    str: "string",
    bool: "bool",
    Addresses: "address[]",
    Bytes32s: "bytes32[]",
    Uint32s: "uint32[]",
    Strings: "string[]",
}

SIGNATURE = re.compile(r"0x[0-9a-f]{128}(1b|1c)")
SECP256K1_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141

ZERO32: Bytes32 = "0x" + "00" * 32
ZERO_ADDRESS = "0x" + "00" * 20


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Domain:
    """What a signature is bound to: this deployment, on this chain. A signature for another one recovers a stranger."""

    chain_id: int
    verifying_contract: str

    def as_eip712(self) -> dict[str, Any]:
        return {
            "name": "HealChain",
            "version": "1",
            "chainId": self.chain_id,
            "verifyingContract": self.verifying_contract,
        }

    def digest(self) -> bytes:
        """32 bytes that stand for the domain in key derivation (keccak of the packed chain id and contract)."""
        return bytes(keccak(self.chain_id.to_bytes(32, "big") + bytes.fromhex(self.verifying_contract[2:])))


class Message(Frozen):
    """Base of every signed message. `task_id` and `round_number` say what it is about; round 0 is before training.

    SIGNED_BY names the field that holds the signer's address, where the message has one.
    """

    SIGNED_BY: ClassVar[str | None] = None

    task_id: TaskId
    round_number: Uint32


class Announcement(Message):
    """The publisher's word that the task exists: its specification's hash, the escrow transaction, its keys (M1)."""

    SIGNED_BY: ClassVar[str | None] = "publisher"

    publisher: Address
    encryption_key: PublicKey
    spec_hash: Bytes32
    transaction: Bytes32


class Registration(Message):
    """A miner's application (M2). It binds the encryption key to the wallet and fixes the dataset proof and the stake.

    With it the publisher takes the miner into the cohort, and the contract holds this much of its stake.
    """

    SIGNED_BY: ClassVar[str | None] = "miner"

    miner: Address
    encryption_key: PublicKey
    dataset_proof_sha256: Bytes32
    stake_wei: Wei


class Challenge(Message):
    """The leaves that the publisher asks one miner to open, chosen after its root was fixed (M2)."""

    SIGNED_BY: ClassVar[str | None] = "publisher"

    publisher: Address
    miner: Address
    registration: Bytes32
    leaves: Uint32s


class ChallengeAnswer(Message):
    """The opened leaves, as an artifact of hash paths (M2)."""

    SIGNED_BY: ClassVar[str | None] = "miner"

    miner: Address
    challenge: Bytes32
    paths_sha256: Bytes32
    key_signature: Bytes


class KeyPossession(Message):
    """What a miner signs with its encryption key, to show that the key it registered is its own (M2)."""

    miner: Address
    challenge: Bytes32


class Cohort(Message):
    """The admitted miners in address order, their public weights and keys, and the drawn aggregator (M2, 2.1)."""

    SIGNED_BY: ClassVar[str | None] = "publisher"

    publisher: Address
    publisher_key: PublicKey
    aggregator: Address
    aggregator_key: PublicKey
    miners: Addresses
    registrations: Bytes32s
    weights: Uint32s
    draw_seed: Bytes32
    refused: Addresses
    reasons: Strings


class Delivery(Message):
    """The validation set for one recipient (2.3, M5): the sealed content, and the key to it sealed to the recipient.

    The aggregator's also carries the accuracy and the salt behind the commitment, so that a publisher who denies a model
    that met it can be answered on chain.
    """

    SIGNED_BY: ClassVar[str | None] = "publisher"

    publisher: Address
    recipient: Address
    content_sha256: Bytes32
    sealed_sha256: Bytes32


class Submission(Message):
    """What a miner hands over in one round: the ciphertext's chunks under one Merkle root, and a score commitment (M3)."""

    SIGNED_BY: ClassVar[str | None] = "miner"

    miner: Address
    base_model_sha256: Bytes32
    ciphertext_root: Bytes32
    chunks_sha256: Bytes32
    coordinates: Uint32
    score_commit: Bytes32
    salt: Salt
    sample_count: Uint32


class Collection(Message):
    """The submissions whose form is right, by struct hash, and whom the aggregator refused and why (M4).

    It closes the round: what comes later is late. The audit vectors are drawn after it.
    """

    SIGNED_BY: ClassVar[str | None] = "aggregator"

    aggregator: Address
    miners: Addresses
    submissions: Bytes32s
    refused: Addresses
    reasons: Strings


class AuditGrant(Message):
    """Keys for the announced audit projections of each collected submission, sealed to the aggregator (M4).

    The +-1 vectors follow from the hash of block `block_number`, mined after the collection was signed.
    """

    SIGNED_BY: ClassVar[str | None] = "publisher"

    publisher: Address
    collection: Bytes32
    block_number: Uint32
    sealed_sha256: Bytes32


class KeyRequest(Message):
    """The submissions that passed the audit; the functional key is derived for exactly these (M4, 2.2)."""

    SIGNED_BY: ClassVar[str | None] = "aggregator"

    aggregator: Address
    collection: Bytes32
    miners: Addresses
    submissions: Bytes32s
    refused: Addresses
    reasons: Strings


class KeyGrant(Message):
    """The functional key of one round, sealed to the aggregator (2.2)."""

    SIGNED_BY: ClassVar[str | None] = "publisher"

    publisher: Address
    request: Bytes32
    sealed_sha256: Bytes32


class RoundResult(Message):
    """What the aggregator opened and made of it: the opening (m, rho), the next model and how it did (M4).

    `candidate` is the struct hash of the block proposed with it, or zero when the accuracy is not reached yet.
    """

    SIGNED_BY: ClassVar[str | None] = "aggregator"

    aggregator: Address
    request: Bytes32
    opening_sha256: Bytes32
    model_sha256: Bytes32
    correct: Uint32
    total: Uint32
    loss_micro: Uint32
    candidate: Bytes32


class Candidate(Message):
    """The block proposed for the chain (M4). Its struct hash is what the miners vote on and the contract recomputes."""

    SIGNED_BY: ClassVar[str | None] = "aggregator"

    model_sha256: Bytes32
    model_uri: str
    correct: Uint32
    total: Uint32
    aggregator: Address
    participants: Addresses
    score_commits: Bytes32s
    opening_sha256: Bytes32


class Attestation(Message):
    """A miner's verdict on one candidate (M5). `reason` is empty when it is accepted."""

    candidate: Bytes32
    accepted: bool
    reason: str


class Receipt(Message):
    """A party's word on a step that happened on chain: what it was, and the transaction that did it (M6, M7)."""

    SIGNED_BY: ClassVar[str | None] = "actor"

    actor: Address
    step: str
    transaction: Bytes32
    amount_wei: str


class Refusal(Message):
    """The publisher goes on without an actor that it asked for a step: which step, and why."""

    SIGNED_BY: ClassVar[str | None] = "publisher"

    publisher: Address
    step: str
    actor: Address
    reason: str


class Abort(Message):
    """An actor gives the task up: in which step, for which reason (an `AbortReason`), and the numbers behind it."""

    SIGNED_BY: ClassVar[str | None] = "actor"

    actor: Address
    step: str
    reason: str
    detail: str


class Membership(Frozen):
    """What a host signs to join a consortium, of no task: its name and encryption key, bound to its wallet.

    moment_ms: the gateway's clock, as the gateway told it.
    """

    name: ActorName
    address: Address
    encryption_key: PublicKey
    moment_ms: Uint64


class AbortReason(StrEnum):
    """Why a task ends without a block. The reward goes back to the publisher when the deadline has passed."""

    DEPOSIT_FAILED = "deposit failed"
    NOT_ENOUGH_MINERS = "not enough miners"
    NOT_ENOUGH_SUBMISSIONS = "not enough valid submissions"
    KEY_REFUSED = "functional key refused"
    DECRYPT_FAILED = "decrypt failed"
    RECOVERY_FAILED = "recovery failed"
    MAX_ROUNDS = "accuracy not reached in the agreed rounds"
    CANDIDATE_REJECTED = "candidate rejected"
    PUBLISH_FAILED = "publish failed"
    DEADLINE_PASSED = "deadline passed"


def struct_fields(kind: type[Frozen]) -> list[dict[str, str]]:
    """The EIP-712 members of a message, in the order of its fields."""
    hints = get_type_hints(kind, include_extras=True)
    return [{"name": name, "type": SOLIDITY[hints[name]]} for name in kind.model_fields]


def type_string(kind: type[Frozen]) -> str:
    """encodeType of EIP-712, e.g. ``Attestation(string task_id,uint32 round_number,...)``."""
    members = ",".join(f"{field['type']} {field['name']}" for field in struct_fields(kind))
    return f"{kind.__name__}({members})"


def typed_data(message: Frozen, domain: Domain) -> SignableMessage:
    kind = type(message)
    return encode_typed_data(domain.as_eip712(), {kind.__name__: struct_fields(kind)}, message.model_dump(mode="json"))


def struct_hash(message: Frozen) -> Bytes32:
    """hashStruct of EIP-712, without a domain: the name of a message in other messages and in the contracts."""
    # The body of a signable message is exactly hashStruct; the domain given here does not enter it.
    body = typed_data(message, Domain(chain_id=0, verifying_contract="0x" + "00" * 20)).body
    return "0x" + bytes(body).hex()


def sign(message: Frozen, domain: Domain, key: bytes) -> Bytes:
    return "0x" + bytes(Account.sign_message(typed_data(message, domain), key).signature).hex()


def signer_of(message: Frozen, domain: Domain, signature: Bytes) -> Address:
    """The address that signed. Raises ValueError unless the signature is 65 bytes r, s, v in the one form that contracts take.

    Other forms of the same signature (v of 0 or 1, a high s) would recover here and be refused on chain.
    """
    if not SIGNATURE.fullmatch(signature) or int(signature[66:130], 16) > SECP256K1_ORDER // 2:
        raise ValueError(f"signature {signature[:20]}... is malformed: not 65 bytes with a low s and v of 27 or 28")
    try:
        return str(Account.recover_message(typed_data(message, domain), signature=bytes.fromhex(signature[2:])))
    except Exception as error:  # eth-keys raises its own BadSignature and ValidationError families
        raise ValueError(f"signature {signature[:20]}... is malformed: {error}") from error


def compact_signature(signature: Bytes) -> tuple[Bytes32, Bytes32]:
    """65 bytes r, s, v as the two words r, vs of EIP-2098: v - 27 in the top bit of s. Raises ValueError for other forms."""
    if not SIGNATURE.fullmatch(signature):
        raise ValueError(f"signature {signature[:20]}... is malformed: not 65 bytes with v of 27 or 28")
    s, v = int(signature[66:130], 16), int(signature[130:], 16)
    return signature[:66], f"0x{s | (v - 27) << 255:064x}"


def key_address(encryption_key: PublicKey) -> Address:
    """The address whose signatures a public encryption key makes. Raises ValueError when it is no point."""
    try:
        point = CurvePoint.from_compressed_bytes(bytes.fromhex(encryption_key[2:]))
    except Exception as error:  # eth-keys raises its own ValidationError, and ValueError of the curve
        raise ValueError(f"encryption key {encryption_key} is not a point of the curve: {error}") from error
    return str(point.to_checksum_address())


def accuracy_commit(accuracy_ppm: int, salt: bytes) -> Bytes32:
    """keccak(uint256 accuracy || bytes32 salt); accuracy in parts per million (M1)."""
    return "0x" + bytes(keccak(accuracy_ppm.to_bytes(32, "big") + _salt(salt))).hex()


def score_commit(score: int, salt: bytes, task_id: TaskId, miner: Address) -> Bytes32:
    """keccak(uint256 score || bytes32 salt || string taskID || address miner) (M3)."""
    packed = score.to_bytes(32, "big") + _salt(salt) + task_id.encode() + bytes.fromhex(miner[2:])
    return "0x" + bytes(keccak(packed)).hex()


def draw_seed(task_id: TaskId, block_hash: bytes) -> bytes:
    """keccak(taskID || block hash): the seed of the aggregator's draw (2.1)."""
    return bytes(keccak(task_id.encode() + block_hash))


def _salt(salt: bytes) -> bytes:
    if len(salt) != 32:
        raise ValueError(f"salt: expected 32 bytes, got {len(salt)}")
    return salt
