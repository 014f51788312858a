"""2.3. The validation set on its way: sealed by the publisher, opened by the aggregator and, in M5, by the voters.

Algorithm 2.3 of the protocol. The content is sealed once, to a content key whose secret goes to each recipient by ECIES; the
aggregator's delivery also opens the commitment to the accuracy.
"""

import hashlib
import json
import secrets

from pydantic import Field

from blocks.artifacts import sha256_hex
from contracts.messages import Address, Delivery, Frozen, accuracy_commit
from contracts.task_spec import PPM, PublishedTask
from tasks.crypto import ecies, ndd_fe
from tasks.learning.datasets import Dataset, decode_npz, encode_npz
from tasks.publish import content_key, secrets_of, validation_set
from tasks.records import BadRecord, Station, parse_json
from tasks.samples import DatasetMismatch


def delivery_context(task_id: str) -> bytes:
    return b"delivery|" + task_id.encode()


def deliver(
    st: Station, terms: PublishedTask, round_number: int, recipient: Address, key: str, fields: dict[str, object]
) -> None:
    """Seal the validation set's content key, and what else `fields` holds, to one recipient; once."""
    if st.mine(Delivery, terms.task_id, round_number, about=recipient) is not None:
        return
    secret_fields = secrets_of(st, terms.task_id)
    public = content_key(secret_fields)
    context = delivery_context(terms.task_id)
    validation = encode_npz(validation_set(st, terms))
    if sha256_hex(validation) != terms.validation_sha256:
        raise DatasetMismatch(f"the validation set is not the announced one {terms.validation_sha256}: restore it")
    # A seed that depends on the content: sealed alike for all recipients, and no key ever meets two contents.
    secret = bytes.fromhex(secret_fields["content_secret"])
    seed = hashlib.sha512(secret + context + hashlib.sha256(validation).digest()).digest()[:48]
    content = ecies.seal(validation, public, ephemeral_seed=seed, context=context)
    sealed = ecies.seal(
        json.dumps(fields).encode(),
        bytes.fromhex(key[2:]),
        ephemeral_seed=secrets.token_bytes(48),
        context=context,
    )
    st.post(
        Delivery(
            task_id=terms.task_id,
            round_number=round_number,
            publisher=st.address,
            recipient=recipient,
            content_sha256=st.store.put(st.address, content).sha256,
            sealed_sha256=st.store.put(st.address, sealed).sha256,
        ),
        about=recipient,
    )


class DeliveredFields(Frozen):
    """What a delivery seals: the key to the validation set; for the aggregator also the opening of the commitment."""

    content_secret: str = Field(pattern=r"^[0-9a-f]{64}$")
    accuracy_ppm: int | None = Field(default=None, ge=0)
    salt: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")


def delivered_fields(st: Station, terms: PublishedTask, round_number: int) -> tuple[Delivery, DeliveredFields]:
    """What the publisher sealed to me. Raises BadRecord, Unopenable, MissingArtifact or TamperedArtifact."""
    delivery = st.need(Delivery, terms.publisher, terms.task_id, round_number, about=st.address)
    sealed = st.store.get(terms.publisher, delivery.sealed_sha256)
    try:
        fields = DeliveredFields.model_validate(parse_json(st.me.open_sealed(sealed, delivery_context(terms.task_id))))
    except ecies.Unopenable:
        raise
    except ValueError as error:
        raise BadRecord(
            f"the delivery does not parse: {type(error).__name__}"
        ) from None  # its text would quote secrets
    return delivery, fields


def delivered_validation(st: Station, terms: PublishedTask, round_number: int) -> Dataset:
    """The validation set that the publisher sealed to me. Raises BadRecord when it is not the committed one."""
    delivery, fields = delivered_fields(st, terms, round_number)
    context, secret = delivery_context(terms.task_id), int(fields.content_secret, 16)
    if not 0 < secret < ndd_fe.ORDER:
        raise BadRecord("the delivered content key is no key")
    content = ecies.open_sealed(
        st.store.get(terms.publisher, delivery.content_sha256),
        lambda public: ecies.shared_secret(secret, public),
        recipient_key=ecies.public_key(secret),
        context=context,
    )
    if sha256_hex(content) != terms.validation_sha256:
        raise BadRecord("the delivered validation set is not the one that the task committed to")
    return decode_npz(content, "validation", terms.spec.dataset.classes)


def delivered_requirement(st: Station, terms: PublishedTask) -> tuple[int, str]:
    """The required accuracy in ppm and the salt, sealed to me as aggregator. Raises BadRecord unless they open the commitment."""
    _, fields = delivered_fields(st, terms, 0)
    on_chain = st.chain.contracts().escrow.get_task(terms.task_id).accuracy_commit
    if fields.accuracy_ppm is None or fields.accuracy_ppm > PPM or fields.salt is None:
        raise BadRecord("the delivered accuracy or salt is missing or impossible")
    if accuracy_commit(fields.accuracy_ppm, bytes.fromhex(fields.salt)) != on_chain:
        raise BadRecord("the delivered accuracy and salt do not open the commitment on chain")
    return fields.accuracy_ppm, fields.salt
