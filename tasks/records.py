"""Signed records in the store: post one's own, find another's, believe neither store nor scheduler.

A record is one message of `contracts.messages` with its signer's EIP-712 signature, as JSON under
``<task>/<round>/<kind>.json`` in the signer's folder (where there are several of a kind, ``<kind>-<about>.json``: the
recipient's address, or the step that a receipt is for).
Whoever reads it checks the signature, the signer, the task and the round; a record that fails says why.
"""

import json
from dataclasses import dataclass
from typing import Any, TypeVar

from eth_utils.address import to_checksum_address
from prefect.exceptions import ObjectNotFound
from pydantic import ValidationError
from pydantic_core import from_json

from blocks.artifacts import AlreadyPosted, ArtifactStore, MissingArtifact, TamperedArtifact, sha256_hex
from blocks.chain import Chain
from blocks.connections import connections_of
from blocks.identity import Identity, find_identity
from contracts import messages
from contracts.messages import Address, Bytes, Domain, Message

M = TypeVar("M", bound=Message)


class BadRecord(ValueError):
    """A record that cannot be believed; the message is the reason."""


@dataclass(frozen=True)
class RecordRef:
    """What an actor's flow returns: which record it posted. A hundred bytes, nothing secret."""

    owner: Address
    kind: str
    path: str
    sha256: str

    def as_json(self) -> dict[str, str]:
        return {"owner": self.owner, "kind": self.kind, "path": self.path, "sha256": self.sha256}


@dataclass(frozen=True)
class Station:
    """What a step works with: who I am, the chain, the store."""

    me: Identity
    chain: Chain
    store: ArtifactStore

    @property
    def address(self) -> Address:
        return self.me.address

    @property
    def domain(self) -> Domain:
        return self.chain.domain

    def post(self, message: Message, *, about: str | None = None) -> dict[str, str]:
        """Sign and post a record, once: what I said first stays. Raises AlreadyPosted when it was something else.

        The own home remembers, so that a store that hides a record cannot make me say another thing in its place.
        """
        body = {"message": message.model_dump(mode="json"), "signature": self.me.sign(message, self.domain)}
        data = json.dumps({"kind": type(message).__name__, **body}, sort_keys=True).encode()
        path = record_path(type(message), message.task_id, message.round_number, about)
        if self.me.claim(_signed_name(path), data) != data:
            raise AlreadyPosted(f"{self.address} has signed another {path} before: a record is signed once")
        self.store.post(self.address, path, data)
        return RecordRef(self.address, type(message).__name__, path, sha256_hex(data)).as_json()

    def mine(self, kind: type[M], task_id: str, round_number: int = 0, *, about: str | None = None) -> M | None:
        """The record I signed before a retry, put back into the store if it is missing there; or None."""
        path = record_path(kind, task_id, round_number, about)
        data = self.me.read_private(_signed_name(path))
        if data is None:
            return None
        self.store.post(self.address, path, data)
        return check_record(kind, data, self.domain, self.address, task_id, round_number)[0]

    def said(self, kind: type[Message], task_id: str, round_number: int = 0) -> dict[str, str] | None:
        """The reference of my record of this kind, or of my word that I gave up: a retry repeats what was said."""
        for candidate in (messages.Abort, kind):
            if (found := self.mine(candidate, task_id, round_number)) is not None:
                return self.reference(found)
        return None

    def find(
        self, kind: type[M], signer: Address, task_id: str, round_number: int = 0, *, about: str | None = None
    ) -> M | None:
        """The signer's record, checked, or None when there is none. Raises BadRecord."""
        found = self.find_signed(kind, signer, task_id, round_number, about=about)
        return None if found is None else found[0]

    def find_signed(
        self, kind: type[M], signer: Address, task_id: str, round_number: int = 0, *, about: str | None = None
    ) -> tuple[M, Bytes] | None:
        """The signer's record and its signature, checked, or None when there is none. Raises BadRecord."""
        path = record_path(kind, task_id, round_number, about)
        try:
            data = self.store.find(signer, path)
        except TamperedArtifact as error:
            raise BadRecord(str(error)) from error
        return None if data is None else check_record(kind, data, self.domain, signer, task_id, round_number)

    def need(
        self, kind: type[M], signer: Address, task_id: str, round_number: int = 0, *, about: str | None = None
    ) -> M:
        """The signer's record, checked. Raises BadRecord, or MissingArtifact when there is none."""
        found = self.find(kind, signer, task_id, round_number, about=about)
        if found is None:
            path = record_path(kind, task_id, round_number, about)
            raise MissingArtifact(f"{signer} has not posted {path}")
        return found

    def reference(self, message: Message, *, about: str | None = None) -> dict[str, str]:
        """The reference of a record that I signed already."""
        path = record_path(type(message), message.task_id, message.round_number, about)
        data = self.me.read_private(_signed_name(path))
        if data is None:
            raise MissingArtifact(f"{self.address} has not signed {path}")
        return RecordRef(self.address, type(message).__name__, path, sha256_hex(data)).as_json()

    def receipt(
        self, task_id: str, round_number: int, step: str, transaction: str, amount_wei: int = 0
    ) -> dict[str, str]:
        """Post the receipt of a step of mine, once: after a retry the first one stays."""
        if before := self.mine(messages.Receipt, task_id, round_number, about=step):
            return self.reference(before, about=step)
        receipt = messages.Receipt(
            task_id=task_id,
            round_number=round_number,
            actor=self.address,
            step=step,
            transaction=transaction,
            amount_wei=str(amount_wei),
        )
        return self.post(receipt, about=step)


def give_up(
    st: Station, task_id: str, round_number: int, step: str, reason: messages.AbortReason, detail: str
) -> dict[str, str]:
    """End the task, signed. The first reason given in a round stays, also after a retry."""
    return st.said(messages.Abort, task_id, round_number) or st.post(
        messages.Abort(
            task_id=task_id, round_number=round_number, actor=st.address, step=step, reason=reason, detail=detail
        )
    )


def station(actor: str) -> Station:
    """Where an actor stands: its home, and the chain and the store that its home names. Raises ValueError."""
    try:
        me = find_identity(actor)
    except (ValueError, ObjectNotFound) as error:
        raise ValueError(f"actor {actor!r}: {error}. Set its home up first (healchain run and join do)") from error
    pinned = connections_of(me)
    return Station(me, pinned.chain, pinned.store)


def record_path(kind: type[Message], task_id: str, round_number: int, about: str | None = None) -> str:
    name = kind.__name__ if about is None else f"{kind.__name__}-{about.lower()}"
    return f"{task_id}/{round_number:05d}/{name}.json"


def terms_path(task_id: str) -> str:
    return f"{task_id}/terms.json"


def check_record(
    kind: type[M], data: bytes, domain: Domain, signer: Address, task_id: str, round_number: int
) -> tuple[M, Bytes]:
    """Parse and check one record's bytes; the message and its signature. Raises BadRecord with the reason."""
    try:
        envelope: dict[str, Any] = parse_json(data)
        message = kind.model_validate(envelope["message"])
        signature = str(envelope["signature"])
        recovered = messages.signer_of(message, domain, signature)
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise BadRecord(f"malformed {kind.__name__}: {brief(error)}") from error
    if recovered != to_checksum_address(signer):
        raise BadRecord(f"{kind.__name__} is signed by {recovered}, not by {signer} for this chain and contract")
    if kind.SIGNED_BY is not None and getattr(message, kind.SIGNED_BY) != recovered:
        raise BadRecord(f"{kind.__name__} of {recovered} speaks for {getattr(message, kind.SIGNED_BY)}")
    if (message.task_id, message.round_number) != (task_id, round_number):
        raise BadRecord(
            f"{kind.__name__} was signed for {message.task_id} round {message.round_number}, "
            f"not for {task_id} round {round_number}"
        )
    return message, signature


def load_record(store: ArtifactStore, domain: Domain, reference: dict[str, str]) -> Message:
    """The record behind a step's reference, checked. Raises BadRecord."""
    ref = RecordRef(**reference)
    kind = getattr(messages, ref.kind, None)
    if not (isinstance(kind, type) and issubclass(kind, Message)):
        raise BadRecord(f"{ref.kind!r} is not a kind of record")
    data = store.find(ref.owner, ref.path)
    if data is None or sha256_hex(data) != ref.sha256:
        raise BadRecord(f"record {ref.path} of {ref.owner} is missing or is not the one that was announced")
    task_id, number, _ = ref.path.split("/")
    return check_record(kind, data, domain, ref.owner, task_id, int(number))[0]


def parse_json(data: bytes) -> Any:
    """JSON from somebody else. Raises ValueError for what is none, is nested too deeply, or holds NaN.

    The standard library's parser recurses without a bound of its own, and takes the process with it.
    """
    return from_json(data, allow_inf_nan=False)


def brief(error: Exception) -> str:
    """An error as one short line: it goes into signed records, which are small, and others choose what it quotes."""
    return " ".join(str(error).split())[:300]


def _signed_name(path: str) -> str:
    task_id, _, rest = path.partition("/")
    return f"{task_id}/signed/{rest}"
