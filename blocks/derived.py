"""Rows of the index, derived from one signed record or one event of the chain: the only place where this is written.

Whoever remembers what happens and whoever rebuilds the index call the same two functions, so both get the same rows. What an
event says holds; what a record says fills what is empty (blocks.registry). A record about somebody else's part is no row:
only the publisher says who was refused, only the drawn aggregator what a round gave.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from eth_utils.address import to_checksum_address
from sqlmodel import SQLModel

from blocks.tables import (
    EventRow,
    ModelVersionRow,
    RecordRow,
    RefusalRow,
    RegistrationRow,
    RewardRow,
    RoundRow,
    ScoreRow,
    SlashRow,
    SubmissionRow,
    TaskRow,
    VoteRow,
)
from contracts import bindings
from contracts.messages import (
    ZERO_ADDRESS,
    Address,
    Attestation,
    Cohort,
    Collection,
    KeyRequest,
    Message,
    Refusal,
    Registration,
    RoundResult,
    Submission,
)


def version_of(task_id: str, round_number: int) -> str:
    """The name of the model after a round."""
    return f"{task_id}/{round_number}"


# Records


def rows_of_record(message: Message, signer: Address, path: str, sha256: str, task: TaskRow | None) -> list[SQLModel]:
    """What a checked record says. task: None for one that the index does not know; then the record alone is kept."""
    record = RecordRow(
        task_id=message.task_id,
        round_number=message.round_number,
        kind=type(message).__name__,
        signer=signer,
        path=path,
        sha256=sha256,
        message=json.dumps(message.model_dump(mode="json"), sort_keys=True),
    )
    derive = FROM_RECORD.get(type(message))
    return [record] if task is None or derive is None else [record, *derive(message, signer, task)]


def _from_registration(message: Registration, signer: Address, task: TaskRow) -> list[SQLModel]:
    return [
        RegistrationRow(
            task_id=task.task_id,
            miner=signer,
            encryption_key=message.encryption_key,
            dataset_proof_sha256=message.dataset_proof_sha256,
            offered_stake_wei=str(message.stake_wei),
        )
    ]


def _from_cohort(message: Cohort, signer: Address, task: TaskRow) -> list[SQLModel]:
    if signer != task.publisher:
        return []
    weights = zip(message.miners, message.weights, strict=False)
    rows = [RegistrationRow(task_id=task.task_id, miner=miner, weight=weight) for miner, weight in weights]
    return [*rows, *_refused(message)]


def _from_submission(message: Submission, signer: Address, task: TaskRow) -> list[SQLModel]:
    names = ("base_model_sha256", "ciphertext_root", "chunks_sha256", "coordinates", "score_commit", "sample_count")
    said = {name: getattr(message, name) for name in names}
    return [SubmissionRow(task_id=task.task_id, round_number=message.round_number, miner=signer, **said)]


def _from_collection(message: Collection, signer: Address, task: TaskRow) -> list[SQLModel]:
    if signer != task.aggregator:
        return []
    number = message.round_number
    return [RoundRow(task_id=task.task_id, round_number=number, collected=len(message.miners)), *_refused(message)]


def _from_key_request(message: KeyRequest, signer: Address, task: TaskRow) -> list[SQLModel]:
    if signer != task.aggregator:
        return []
    number = message.round_number
    accepted = [
        SubmissionRow(task_id=task.task_id, round_number=number, miner=miner, is_accepted=True)
        for miner in message.miners
    ]
    count = RoundRow(task_id=task.task_id, round_number=number, accepted=len(message.miners))
    return [count, *accepted, *_refused(message)]


def _from_round_result(message: RoundResult, signer: Address, task: TaskRow) -> list[SQLModel]:
    if signer != task.aggregator:
        return []
    number = message.round_number
    measured: dict[str, Any] = {"correct": message.correct, "total": message.total, "loss_micro": message.loss_micro}
    return [
        RoundRow(
            task_id=task.task_id,
            round_number=number,
            opening_sha256=message.opening_sha256,
            model_sha256=message.model_sha256,
            candidate=message.candidate,
            **measured,
        ),
        ModelVersionRow(
            version=version_of(task.task_id, number),
            task_id=task.task_id,
            round_number=number,
            sha256=message.model_sha256,
            uri=f"artifact:{signer}/{message.model_sha256}",
            parent=version_of(task.task_id, number - 1) if number > 1 else task.start,
            **measured,
        ),
    ]


def _from_attestation(message: Attestation, signer: Address, task: TaskRow) -> list[SQLModel]:
    return [
        VoteRow(
            task_id=task.task_id,
            round_number=message.round_number,
            miner=signer,
            candidate=message.candidate,
            accepted=message.accepted,
            reason=message.reason,
        )
    ]


def _from_refusal(message: Refusal, signer: Address, task: TaskRow) -> list[SQLModel]:
    if signer != task.publisher:
        return []
    return [
        RefusalRow(
            task_id=task.task_id,
            round_number=message.round_number,
            step=message.step,
            actor=message.actor,
            reason=message.reason,
        )
    ]


def _refused(message: Cohort | Collection | KeyRequest) -> list[SQLModel]:
    step = type(message).__name__
    return [
        RefusalRow(task_id=message.task_id, round_number=message.round_number, step=step, actor=address, reason=reason)
        for address, reason in zip(message.refused, message.reasons, strict=False)
    ]


FROM_RECORD: dict[type[Message], Callable[[Any, Address, TaskRow], list[SQLModel]]] = {
    Registration: _from_registration,
    Cohort: _from_cohort,
    Submission: _from_submission,
    Collection: _from_collection,
    KeyRequest: _from_key_request,
    RoundResult: _from_round_result,
    Attestation: _from_attestation,
    Refusal: _from_refusal,
}


# Events


def rows_of_event(found: bindings.Logged, task: TaskRow | None) -> list[SQLModel]:
    """What an event of the chain says. task: None for one about an account alone, and for the one that makes the task."""
    event = EventRow(
        block_number=found.block_number,
        log_index=found.log_index,
        task_id=getattr(found.event, "task_id", None) if task is None else task.task_id,
        kind=type(found.event).__name__,
        transaction=found.transaction,
        at=moment(found.timestamp_s),
        fields=json.dumps(asdict(found.event), sort_keys=True),
    )
    derive = FROM_EVENT.get(type(found.event))
    return [event] if derive is None else [event, *derive(found.event, found, task)]


def moment(timestamp_s: int) -> datetime:
    return datetime.fromtimestamp(timestamp_s, UTC)


def _task_published(event: bindings.TaskPublished, found: bindings.Logged, _: TaskRow | None) -> list[SQLModel]:
    return [
        TaskRow(
            task_id=event.task_id,
            publisher=event.publisher,
            spec_hash=event.spec_hash,
            token=event.token,
            reward_wei=str(event.reward_wei),
            accuracy_commit=event.accuracy_commit,
            deadline_s=event.deadline_s,
            published_at=moment(found.timestamp_s),
            block_number=found.block_number,
            transaction=found.transaction,
        )
    ]


def _aggregator_drawn(event: bindings.AggregatorDrawn, _: bindings.Logged, task: TaskRow) -> list[SQLModel]:
    return [_more_of(task, aggregator=event.aggregator)]


def _accuracy_revealed(event: bindings.AccuracyRevealed, _: bindings.Logged, task: TaskRow) -> list[SQLModel]:
    return [_more_of(task, required_accuracy_ppm=event.accuracy_ppm, outcome=event.outcome.name)]


def _more_of(task: TaskRow, **fields: Any) -> TaskRow:
    return TaskRow(task_id=task.task_id, publisher=task.publisher, spec_hash=task.spec_hash, **fields)


def members(event: bindings.RegistrationClosed) -> dict[Address, int]:
    """The cohort on chain: each member's recorded stake in wei."""
    words = [int(word, 16) for word in event.cohort]
    return {str(to_checksum_address(f"0x{word >> 96:040x}")): word & (2**96 - 1) for word in words}


def _registration_closed(event: bindings.RegistrationClosed, _: bindings.Logged, task: TaskRow) -> list[SQLModel]:
    return [
        RegistrationRow(task_id=task.task_id, miner=miner, held_stake_wei=str(stake_wei), is_admitted=True)
        for miner, stake_wei in members(event).items()
    ]


def _block_published(event: bindings.BlockPublished, found: bindings.Logged, task: TaskRow) -> list[SQLModel]:
    return [
        ModelVersionRow(
            version=version_of(task.task_id, event.round_number),
            task_id=task.task_id,
            round_number=event.round_number,
            sha256=event.model_sha256,
            uri=event.model_uri,
            correct=event.correct,
            total=event.total,
            is_published=True,
            transaction=found.transaction,
            published_at=moment(found.timestamp_s),
        )
    ]


def _score_revealed(event: bindings.ScoreRevealed, found: bindings.Logged, task: TaskRow) -> list[SQLModel]:
    return [ScoreRow(task_id=task.task_id, miner=event.miner, score=str(event.score), transaction=found.transaction)]


def _stake_slashed(event: bindings.StakeSlashed, found: bindings.Logged, task: TaskRow) -> list[SQLModel]:
    return [
        SlashRow(
            task_id=task.task_id,
            aggregator=event.aggregator,
            offence=event.offence.name,
            amount_wei=str(event.amount_wei),
            transaction=found.transaction,
        )
    ]


def _money(account: str) -> Callable[[Any, bindings.Logged, TaskRow | None], list[SQLModel]]:
    """A row of `rewards` from an event whose field `account` names who is credited or paid."""

    def derive(event: Any, found: bindings.Logged, task: TaskRow | None) -> list[SQLModel]:
        return [
            RewardRow(
                block_number=found.block_number,
                log_index=found.log_index,
                task_id=None if task is None else task.task_id,
                kind=type(event).__name__,
                account=getattr(event, account),
                recipient=getattr(event, "recipient", getattr(event, account)),
                token=getattr(event, "token", ZERO_ADDRESS),
                amount_wei=str(event.amount_wei),
                transaction=found.transaction,
                at=moment(found.timestamp_s),
            )
        ]

    return derive


FROM_EVENT: dict[type, Callable[[Any, bindings.Logged, Any], list[SQLModel]]] = {
    bindings.TaskPublished: _task_published,
    bindings.RegistrationClosed: _registration_closed,
    bindings.AggregatorDrawn: _aggregator_drawn,
    bindings.AccuracyRevealed: _accuracy_revealed,
    bindings.BlockPublished: _block_published,
    bindings.ScoreRevealed: _score_revealed,
    bindings.StakeSlashed: _stake_slashed,
    bindings.RewardCredited: _money("account"),
    bindings.RewardClaimed: _money("miner"),
    bindings.PublisherRefunded: _money("publisher"),
    bindings.CreditAdded: _money("miner"),
    bindings.Withdrawn: _money("account"),
    bindings.CreditWithdrawn: _money("miner"),
    bindings.StakeWithdrawn: _money("miner"),
}
