"""What happened to a task, gathered from chain, store and registry into one dictionary with stable keys.

Amounts are wei, accuracies are recomputed from integers, and what the chain knows is taken from the chain. A task that
ended early has the same keys with nothing in them.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from blocks.artifacts import MissingArtifact, TamperedArtifact
from blocks.tables import RecordRow
from contracts import bindings
from contracts.bindings import Outcome, Status
from contracts.messages import Attestation, Candidate, Cohort, KeyRequest, Registration, RoundResult, Submission
from contracts.task_spec import PPM, PublishedTask, TaskFile
from infra.devstack import Stack
from tasks.dispatch import STEPS
from tasks.samples import DatasetProof


def gather(
    stack: Stack, task_id: str, file: TaskFile, *, started_s: float, finished_s: float, reason: str
) -> dict[str, Any]:
    """The report of a task as it stands now. reason: why it ended early, if the registry does not know."""
    contracts = stack.chain.contracts()
    row = stack.registry.find_task(task_id)
    on_chain = contracts.escrow.get_task(task_id)
    locked = on_chain.status is not Status.NONE
    addresses = {stack.identity(name).address: name for name in stack.homes}
    transactions = _transactions(stack, task_id, list(addresses)) if locked else []
    money = _money(stack, task_id, on_chain)
    rounds = _rounds(stack, task_id)
    block = contracts.publisher.get_block_meta(task_id) if locked else None
    published = next(iter(_events(stack, task_id, bindings.BlockPublished)), None)
    cohort = next(iter(_messages(stack, task_id, Cohort)), None)
    candidates = _messages(stack, task_id, RoundResult)
    chosen = next((one for one in candidates if int(one.candidate, 16)), None)
    return {
        "task": {
            "id": task_id,
            "name": file.name,
            "publisher": stack.identity("publisher").address,
            "status": row.status if row else "FAILED",
            "reason": (row.reason if row else "") or reason,
            "spec_hash": on_chain.spec_hash if locked else None,
            "chain_id": stack.chain.chain_id,
            "contracts": {
                "HealChainEscrow": stack.chain.escrow_address,
                "StakeRegistry": stack.chain.stakes_address,
                "BlockPublisher": stack.chain.publisher_address,
                "RewardDistribution": stack.chain.rewards_address,
            },
            "deadline_s": on_chain.terms.deadline_s if locked else None,
            "reward_wei": on_chain.reward_wei if locked else file.money.reward_wei,
            "is_locked": locked,
            "started_s": started_s,
            "finished_s": finished_s,
        },
        "dataset": _dataset(stack, task_id, file, rounds, cohort),
        "required_accuracy": file.required_accuracy,
        "required_accuracy_ppm": file.required_accuracy_ppm,
        "final_accuracy": _ratio(block.correct, block.total) if block else (rounds[-1]["accuracy"] if rounds else None),
        "rounds": rounds,
        **money,
        "aggregator": cohort.aggregator if cohort else None,
        "gas": _gas(transactions),
        "transactions": [
            {
                "kind": one.kind,
                "sender": one.sender,
                "gas": one.gas_used,
                "transaction": one.transaction,
                "block_number": one.block_number,
                "timestamp_s": one.timestamp_s,
            }
            for one in transactions
        ],
        "model_sha256": published.model_sha256 if published else (chosen.model_sha256 if chosen else None),
        "model_uri": published.model_uri if published else None,
        "candidate": block.candidate_hash if block else (chosen.candidate if chosen else None),
        "candidate_round": chosen.round_number if chosen else None,
        "opening_sha256": chosen.opening_sha256 if chosen else None,
        "votes": _votes(stack, task_id),
        "required_votes": contracts.publisher.required_votes(task_id, len(cohort.miners)) if cohort else None,
        "timeline": _timeline(stack, task_id),
        "actors": addresses,
        "seconds_per_step": _seconds_per_step(stack, task_id),
    }


def _transactions(stack: Stack, task_id: str, accounts: list[str]) -> list[bindings.TransactionRecord]:
    """Those about the task, and the parties' deposits and withdrawals since it was published."""
    about = stack.chain.transactions(task_id)
    moved = bindings.account_events(stack.chain.web3, stack.chain.deployment, accounts)
    since = [one for one in moved if one.block_number >= about[0].block_number]
    unique = {one.transaction: one for one in [*about, *since]}
    return sorted(unique.values(), key=lambda one: one.block_number)


def _money(stack: Stack, task_id: str, on_chain: bindings.TaskOnChain) -> dict[str, Any]:
    """Scores, rewards, refund and what is left, all from the chain."""
    rewards = stack.chain.contracts().rewards
    credited: dict[str, int] = defaultdict(int)
    for one in _events(stack, task_id, bindings.RewardCredited):
        credited[one.account] += one.amount_wei  # the aggregator is paid twice: its share, and as a miner
    for claimed in _events(stack, task_id, bindings.RewardClaimed):
        credited[claimed.miner] += claimed.amount_wei
    distributed = next(iter(_events(stack, task_id, bindings.Distributed)), None)
    refunded = next(iter(_events(stack, task_id, bindings.PublisherRefunded)), None)
    listed = next(iter(_messages(stack, task_id, Candidate)), None)
    participants: Iterable[str] = listed.participants if listed else ()
    scores: dict[str, int | None] = {}
    refund_wei, aggregator_wei, withdrawn = 0, 0, {}
    if on_chain.status in (Status.PUBLISHED, Status.SETTLED):
        participants = stack.chain.contracts().publisher.get_participants(task_id)
        found = [rewards.get_score(task_id, position) for position in range(len(participants))]
        scores = {miner: one.score if one.is_revealed else None for miner, one in zip(participants, found, strict=True)}
        settlement = rewards.get_settlement(task_id)
        if settlement.outcome is Outcome.UNMET:
            refund_wei = credited.pop(on_chain.publisher, 0)
        withdrawn = {account: rewards.balance_of(account, on_chain.token) == 0 for account in credited}
        if settlement.is_distributed and settlement.outcome is Outcome.MET:
            for miner, due in _unclaimed(settlement, participants, found).items():
                credited[miner] += due
                withdrawn[miner] = False
    if distributed is not None and distributed.aggregator_share_wei:
        aggregator_wei = distributed.aggregator_share_wei
        credited[distributed.aggregator] -= aggregator_wei
    if refunded is not None:
        refund_wei = on_chain.reward_wei
    left = on_chain.reward_wei if on_chain.status in (Status.LOCKED, Status.PUBLISHED) else 0
    return {
        "scores": scores,
        "rewards_wei": credited,
        "is_withdrawn": withdrawn,
        "aggregator_reward_wei": aggregator_wei,
        "refund_wei": refund_wei,
        "escrow_left_wei": left,
    }


def _unclaimed(
    settlement: bindings.Settlement, participants: Sequence[str], scores: Sequence[bindings.Score]
) -> dict[str, int]:
    """What those who have not claimed will be paid if they claim in address order: the contract's rule, to the wei."""
    due, remaining, parts = {}, settlement.remaining, settlement.remaining_parts
    for miner, score in zip(participants, scores, strict=True):
        if settlement.score_sum:
            mine = score.score
        else:
            mine = int(score.is_revealed or settlement.revealed_count == 0)
        if mine and not score.is_claimed:
            due[miner] = remaining * mine // parts
            remaining, parts = remaining - due[miner], parts - mine
    return due


def _rounds(stack: Stack, task_id: str) -> list[dict[str, Any]]:
    refusals = defaultdict(list)
    for refusal in stack.registry.refusals(task_id):
        refusals[refusal.round_number].append({"miner": refusal.actor, "step": refusal.step, "reason": refusal.reason})
    seconds: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for step in stack.registry.steps(task_id):
        seconds[step.round_number][step.step] += step.seconds
    requests = {one.round_number: one for one in _messages(stack, task_id, KeyRequest)}
    coordinates = {one.round_number: one.coordinates for one in _messages(stack, task_id, Submission)}
    dimension = _dimension(stack, task_id)
    return [
        {
            "round": one.round_number,
            "accuracy": _ratio(one.correct, one.total),
            "correct": one.correct,
            "total": one.total,
            "loss": one.loss_micro / 1e6,
            "coordinates": coordinates.get(one.round_number),
            "dimension": dimension,
            "submissions": len(requests[one.round_number].miners) if one.round_number in requests else None,
            "refused": refusals[one.round_number],
            "seconds": {name: round(spent, 3) for name, spent in seconds[one.round_number].items()},
            "opening_sha256": one.opening_sha256,
            "model_sha256": one.model_sha256,
        }
        for one in _messages(stack, task_id, RoundResult)
    ]


def _dimension(stack: Stack, task_id: str) -> int | None:
    from tasks.publish import check_runnable

    row = stack.registry.find_task(task_id)
    return check_runnable(PublishedTask.model_validate_json(row.terms).spec) if row and row.terms else None


def _dataset(
    stack: Stack, task_id: str, file: TaskFile, rounds: list[dict[str, Any]], cohort: Cohort | None
) -> dict[str, Any]:
    weights = dict(zip(cohort.miners, cohort.weights, strict=True)) if cohort else {}
    miners = []
    for registration in _messages(stack, task_id, Registration):
        try:
            data = stack.artifacts.get(registration.miner, registration.dataset_proof_sha256)
            proof = DatasetProof.model_validate_json(data)
        except (MissingArtifact, TamperedArtifact, ValueError):
            continue
        miners.append(
            {
                "miner": registration.miner,
                "samples": proof.sample_count,
                "histogram": list(proof.histogram),
                "weight": weights.get(registration.miner),
            }
        )
    return {
        "name": file.dataset.name,
        "classes": file.dataset.classes,
        "input_shape": list(file.dataset.input_shape),
        "validation_samples": rounds[-1]["total"] if rounds else None,
        "miners": miners,
    }


def _votes(stack: Stack, task_id: str) -> list[dict[str, Any]]:
    votes = []
    for row in stack.registry.records(task_id, Attestation.__name__):
        vote = Attestation.model_validate_json(row.message)
        envelope = json.loads(stack.artifacts.find(row.signer, row.path) or b"{}")
        votes.append(
            {
                "miner": row.signer,
                "accepted": vote.accepted,
                "reason": vote.reason,
                "signature": envelope.get("signature", ""),
            }
        )
    return votes


def _timeline(stack: Stack, task_id: str) -> list[dict[str, Any]]:
    """Every step, in seconds from the start of the first."""
    steps = stack.registry.steps(task_id)
    return [
        {
            "module": STEPS[step.step].module,
            "step": step.step,
            "actor": step.actor,
            "round": step.round_number,
            "start_s": round(step.started_s - steps[0].started_s, 3),
            "seconds": round(step.seconds, 3),
            "outcome": step.outcome,
            "detail": step.detail,
        }
        for step in steps
    ]


def _seconds_per_step(stack: Stack, task_id: str) -> dict[str, float]:
    """Seconds of each step, added up over actors and rounds."""
    seconds: dict[str, float] = defaultdict(float)
    for step in stack.registry.steps(task_id):
        seconds[f"{STEPS[step.step].module} {step.step}"] += step.seconds
    return {name: round(spent, 3) for name, spent in sorted(seconds.items())}


def _gas(transactions: list[bindings.TransactionRecord]) -> dict[str, dict[str, int]]:
    gas: dict[str, dict[str, int]] = {}
    for one in transactions:
        kind = gas.setdefault(one.kind, {"transactions": 0, "gas": 0})
        kind["transactions"] += 1
        kind["gas"] += one.gas_used
    return gas


def _messages(stack: Stack, task_id: str, kind: type[Any]) -> list[Any]:
    """The recorded messages of a kind, by round and signer."""
    rows: Iterable[RecordRow] = stack.registry.records(task_id, kind.__name__)
    return [kind.model_validate_json(row.message) for row in rows]


def _events(stack: Stack, task_id: str, kind: type[Any]) -> list[Any]:
    return stack.chain.events(task_id, kind)


def _ratio(correct: int, total: int) -> float:
    return round(correct / total, len(str(PPM)) - 1)
