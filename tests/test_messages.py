"""Every message is signed as EIP-712 has it; whatever is changed, the signature is a stranger's."""

import inspect
from typing import Any, get_type_hints

import pytest
from eth_abi import encode
from eth_account import Account
from eth_account.messages import encode_typed_data
from eth_utils import keccak, to_checksum_address
from pydantic import ValidationError
from web3 import Web3

from contracts import messages
from contracts.messages import (
    SECP256K1_ORDER,
    SOLIDITY,
    Attestation,
    Domain,
    Message,
    accuracy_commit,
    draw_seed,
    score_commit,
    sign,
    signer_of,
    struct_fields,
    struct_hash,
    type_string,
    typed_data,
)
from tests.test_imports import ROOT

KINDS = [
    kind
    for _, kind in inspect.getmembers(messages, inspect.isclass)
    if issubclass(kind, Message) and kind is not Message
]
DOMAIN = Domain(chain_id=131_277_322_940_537, verifying_contract=to_checksum_address("0x" + "5f" * 20))
KEY = keccak(text="a wallet key")
SIGNER = Account.from_key(KEY).address
OTHER = Account.from_key(keccak(text="another wallet key")).address

FIRST: dict[str, Any] = {
    "string": "a-task",
    "bytes32": "0x" + "ab" * 32,
    "bytes": "0x" + "cd" * 33,
    "address": SIGNER,
    "uint32": 7,
    "uint96": 2**64 + 7,
    "bool": True,
    "address[]": (SIGNER, OTHER),
    "bytes32[]": ("0x" + "01" * 32, "0x" + "02" * 32),
    "uint32[]": (3, 2**32 - 1),
    "string[]": ("no such dataset", "zu spät ☂"),
}
SECOND: dict[str, Any] = {
    "string": "b-task",
    "bytes32": "0x" + "ab" * 31 + "ac",
    "bytes": "0x" + "cd" * 32,
    "address": OTHER,
    "uint32": 8,
    "uint96": 2**64 + 8,
    "bool": False,
    "address[]": (SIGNER,),
    "bytes32[]": ("0x" + "02" * 32, "0x" + "01" * 32),
    "uint32[]": (),
    "string[]": ("no such dataset",),
}


KEYS = ("encryption_key", "publisher_key", "aggregator_key")


def value_of(values: dict[str, Any], name: str, type_: str) -> Any:
    """A value of the field: keys and salts have a length of their own among the bytes."""
    if name in KEYS:
        return f"0x{2 + (values is SECOND):02x}" + "cd" * 32
    if name == "salt":
        return "0x" + ("cd" if values is FIRST else "ce") * 16
    return values[type_]


def types_of(kind: type[Message]) -> dict[str, str]:
    return {field["name"]: field["type"] for field in struct_fields(kind)}


def example(kind: type[Message]) -> Message:
    return kind.model_validate({name: value_of(FIRST, name, type_) for name, type_ in types_of(kind).items()})


def twin_hash(message: Message) -> str:
    """hashStruct, written from EIP-712 without any helper of eth_account."""
    types = types_of(type(message))
    type_hash = keccak(text=f"{type(message).__name__}({','.join(f'{t} {name}' for name, t in types.items())})")
    parts = [type_hash, *(word(type_, getattr(message, name)) for name, type_ in types.items())]
    return "0x" + keccak(b"".join(parts)).hex()


def word(type_: str, value: Any) -> bytes:
    if type_.endswith("[]"):
        return keccak(b"".join(word(type_[:-2], one) for one in value))
    if type_ == "string":
        return keccak(text=value)
    if type_ == "bytes":
        return keccak(hexstr=value)
    return encode([type_], [bytes.fromhex(value[2:]) if type_ == "bytes32" else value])


def test_all_messages_are_found():
    assert len(KINDS) >= 16
    assert {kind.__name__ for kind in KINDS} >= {"Announcement", "Submission", "Candidate", "Attestation", "Abort"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_signer_is_recovered(kind):
    message = example(kind)
    assert signer_of(message, DOMAIN, sign(message, DOMAIN, KEY)) == SIGNER
    assert sign(message, DOMAIN, KEY) == sign(message, DOMAIN, KEY)  # deterministic: a retry says the same


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in kind.model_fields])
def test_a_changed_field_recovers_a_stranger(kind, name):
    message = example(kind)
    signature = sign(message, DOMAIN, KEY)
    changed = kind.model_validate({**message.model_dump(), name: value_of(SECOND, name, types_of(kind)[name])})
    assert changed != message
    assert signer_of(changed, DOMAIN, signature) != SIGNER
    assert struct_hash(changed) != struct_hash(message)


@pytest.mark.parametrize("kind", KINDS)
def test_another_chain_or_contract_recovers_a_stranger(kind):
    message = example(kind)
    signature = sign(message, DOMAIN, KEY)
    for elsewhere in (Domain(1, DOMAIN.verifying_contract), Domain(DOMAIN.chain_id, OTHER)):
        assert signer_of(message, elsewhere, signature) != SIGNER
        assert elsewhere.digest() != DOMAIN.digest()


def test_a_message_of_another_kind_with_the_same_values_recovers_a_stranger():
    """KeyRequest after Collection: the kind's name is part of what is signed."""
    first, second = example(messages.Candidate), example(messages.RoundResult)
    assert signer_of(second, DOMAIN, sign(first, DOMAIN, KEY)) != SIGNER
    assert len({type_string(kind) for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_struct_hash_is_that_of_eip_712(kind):
    message = example(kind)
    assert struct_hash(message) == twin_hash(message)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_signed_is_eth_accounts_own_encoding_of_the_whole_document(kind):
    message = example(kind)
    document = {
        "types": {
            "EIP712Domain": [
                {"name": "name", "type": "string"},
                {"name": "version", "type": "string"},
                {"name": "chainId", "type": "uint256"},
                {"name": "verifyingContract", "type": "address"},
            ],
            kind.__name__: struct_fields(kind),
        },
        "primaryType": kind.__name__,
        "domain": {
            "name": "HealChain",
            "version": "1",
            "chainId": DOMAIN.chain_id,
            "verifyingContract": DOMAIN.verifying_contract,
        },
        "message": message.model_dump(mode="json"),
    }
    assert encode_typed_data(full_message=document) == typed_data(message, DOMAIN)
    assert "0x" + bytes(typed_data(message, DOMAIN).body).hex() == struct_hash(message)


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_survives_json_unchanged(kind):
    message = example(kind)
    again = kind.model_validate_json(message.model_dump_json())
    assert again == message
    assert struct_hash(again) == struct_hash(message)


@pytest.mark.parametrize("kind", [messages.Candidate, messages.Attestation])
def test_the_type_strings_are_those_of_the_contract(kind):
    source = (ROOT / "contracts" / "src" / "BlockPublisher.sol").read_text()
    joined = "".join(line.strip() for line in source.splitlines()).replace('""', "")
    assert f'"{type_string(kind)}"' in joined


def test_a_type_string_lists_the_fields_in_order():
    assert type_string(messages.Registration) == (
        "Registration(string task_id,uint32 round_number,address miner,bytes encryption_key,bytes32 dataset_proof_sha256,"
        "uint96 stake_wei)"
    )
    assert type_string(messages.Challenge) == (
        "Challenge(string task_id,uint32 round_number,address publisher,address miner,bytes32 registration,uint32[] leaves)"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_signers_field_is_an_address_of_the_message(kind):
    hints = get_type_hints(kind, include_extras=True)
    assert kind.SIGNED_BY is None or SOLIDITY[hints[kind.SIGNED_BY]] == "address"


# Fields


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (messages.Registration, "task_id", "Not A Task"),
        (messages.Registration, "task_id", "../task"),
        (messages.Registration, "task_id", "task\n"),
        (messages.Registration, "task_id", "ab"),
        (messages.Registration, "round_number", -1),
        (messages.Registration, "round_number", 2**32),
        (messages.Registration, "round_number", "1"),
        (messages.Registration, "round_number", 1.0),
        (messages.Registration, "round_number", True),
        (messages.Registration, "stake_wei", -1),
        (messages.Registration, "stake_wei", 2**88),
        (messages.Registration, "stake_wei", "1"),
        (messages.Registration, "miner", "0x12"),
        (messages.Registration, "encryption_key", "0xABCD"),
        (messages.Registration, "encryption_key", "0xabc"),
        (messages.Registration, "dataset_proof_sha256", "0x" + "AB" * 32),
        (messages.Registration, "dataset_proof_sha256", "ab" * 32),
        (messages.Registration, "dataset_proof_sha256", "0x" + "ab" * 32 + "\n"),
        (messages.Challenge, "leaves", (1, -1)),
        (messages.Cohort, "weights", (2**32,)),
    ],
)
def test_a_value_that_does_not_fit_its_type_is_refused(kind, name, value):
    with pytest.raises(ValidationError, match=name):
        kind.model_validate({**example(kind).model_dump(), name: value})


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_and_missing_fields_are_refused(kind):
    fields = example(kind).model_dump()
    with pytest.raises(ValidationError, match="extra"):
        kind.model_validate({**fields, "extra": 1})
    with pytest.raises(ValidationError, match="task_id"):
        kind.model_validate({name: value for name, value in fields.items() if name != "task_id"})


def test_a_message_cannot_be_changed_after_it_is_made():
    message = example(messages.Registration)
    with pytest.raises(ValidationError, match="frozen"):
        message.miner = OTHER


def test_addresses_are_equal_whatever_their_case():
    fields = example(messages.Registration).model_dump()
    lower = messages.Registration.model_validate({**fields, "miner": SIGNER.lower()})
    assert lower == example(messages.Registration)


# Signatures


@pytest.mark.parametrize(
    "signature",
    ["", "0x", "0x00", "0x" + "00" * 65, "0x" + "ff" * 65, "0x" + "11" * 64, "0x" + "11" * 66, "0xzz", "no"],
)
def test_a_malformed_signature_is_a_value_error(signature):
    with pytest.raises(ValueError, match="is malformed"):
        signer_of(example(messages.Attestation), DOMAIN, signature)


@pytest.mark.parametrize("position", [0, 20, 40, 63])
def test_a_changed_signature_recovers_a_stranger_or_nobody(position):
    message = example(messages.Attestation)
    data = bytearray.fromhex(sign(message, DOMAIN, KEY)[2:])
    data[position] ^= 1
    try:
        assert signer_of(message, DOMAIN, "0x" + data.hex()) != SIGNER
    except ValueError as error:
        assert "is malformed" in str(error)  # noqa: PT017  (either end is right)


# Commitments


@pytest.mark.parametrize("accuracy", [0, 1, 950_000, 1_000_000, 2**256 - 1])
def test_an_accuracy_commitment_is_soliditys_packed_hash(accuracy):
    salt = keccak(text="salt")
    expected = Web3.solidity_keccak(["uint256", "bytes32"], [accuracy, salt])
    assert accuracy_commit(accuracy, salt) == "0x" + expected.hex()


@pytest.mark.parametrize("score", [0, 1, 10**18, 2**256 - 1])
def test_a_score_commitment_is_soliditys_packed_hash(score):
    salt = keccak(text="salt")
    expected = Web3.solidity_keccak(["uint256", "bytes32", "string", "address"], [score, salt, "a-task", SIGNER])
    assert score_commit(score, salt, "a-task", SIGNER) == "0x" + expected.hex()


def test_a_draw_seed_is_soliditys_packed_hash():
    block_hash = keccak(text="block")
    assert draw_seed("a-task", block_hash) == Web3.solidity_keccak(["string", "bytes32"], ["a-task", block_hash])


def test_a_commitment_to_anything_else_is_another():
    salt, other_salt = keccak(text="salt"), keccak(text="other salt")
    assert len({accuracy_commit(1, salt), accuracy_commit(2, salt), accuracy_commit(1, other_salt)}) == 3
    scores = [(1, salt, "a-task", SIGNER), (2, salt, "a-task", SIGNER), (1, other_salt, "a-task", SIGNER)]
    scores += [(1, salt, "b-task", SIGNER), (1, salt, "a-task", OTHER)]
    assert len({score_commit(*fields) for fields in scores}) == 5


@pytest.mark.parametrize("salt", [b"", b"short", b"x" * 33])
def test_a_salt_of_another_length_is_refused(salt):
    with pytest.raises(ValueError, match="expected 32 bytes"):
        accuracy_commit(1, salt)
    with pytest.raises(ValueError, match="expected 32 bytes"):
        score_commit(1, salt, "a-task", SIGNER)


def test_another_form_of_a_good_signature_is_refused():
    """v of 0 or 1, or the twin with a high s, recovers the same signer here and is refused on chain: not a vote."""
    message = example(Attestation)
    good = sign(message, DOMAIN, KEY)
    assert signer_of(message, DOMAIN, good) == SIGNER
    r, s, v = good[2:66], int(good[66:130], 16), int(good[130:], 16)
    low_v = f"0x{r}{s:064x}{v - 27:02x}"
    high_s = f"0x{r}{SECP256K1_ORDER - s:064x}{55 - v:02x}"
    for other in (low_v, high_s, good.upper(), f" {good}"):
        with pytest.raises(ValueError, match="malformed"):
            signer_of(message, DOMAIN, other)
