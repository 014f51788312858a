"""What a person sees of a task in the Prefect UI, beside the run that conducts it: terms, tables, the accuracy curve, the money.

    chapter       after the steps                        artifact
    terms         publish                                markdown
    cohort        form-cohort                            table
    submissions   audit, each round                      table: who, when, accepted or why not
    accuracy      aggregate, reveal-accuracy             image
    votes         attest                                 table
    rewards       withdraw, refund, compensation         table: amounts with transaction hashes
    summary       the end                                markdown
    progress      while a step computes                  progress, one for each run of a step

All but the progress is read from the publisher's index, which holds checked records and events of the chain: the required
accuracy is in it once it was revealed, not before. A picture is not worth a task: a server that does not take one is logged, and
the run goes on. Outside a run there is no page to put them on, and nothing is made.
"""

import base64
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import Artifact, ImageArtifact, MarkdownArtifact, TableArtifact
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.context import FlowRunContext, SyncClientContext
from prefect.exceptions import PrefectHTTPStatusError
from prefect.logging import get_run_logger

from blocks.registry import Registry
from blocks.tables import (
    ModelVersionRow,
    RefusalRow,
    RegistrationRow,
    RewardRow,
    RoundRow,
    ScoreRow,
    StepRow,
    SubmissionRow,
    TaskRow,
    VoteRow,
)
from contracts.messages import ZERO_ADDRESS
from contracts.task_spec import PPM, PublishedTask
from tasks.learning import models

UPDATE_S = 2.0  # least time between two updates of a progress artifact
PATIENCE_S = 1.0  # longest wait for the last one of a phase to arrive
ETHER_WEI = 10**18
SCORE_UNIT = 10**6  # the contracts count scores in millionths
NOT_TAKEN = (httpx.HTTPError, PrefectHTTPStatusError, RuntimeError)  # RuntimeError: the run's client was closed

# The story


def tag_run(name: str, *tags: str) -> None:
    """Call the run that conducts a task by it, and add tags, whoever started the run, and from where."""
    run, shared = FlowRunContext.get(), SyncClientContext.get()
    if run is None or run.flow_run is None or shared is None:
        return
    if run.flow_run.name == name and set(tags) <= set(run.flow_run.tags):
        return
    try:
        shared.client.update_flow_run(run.flow_run.id, name=name, tags=sorted({*run.flow_run.tags, *tags}))
    except NOT_TAKEN as error:
        get_run_logger().warning("the run is not tagged: %s", error)


def tell(registry: Registry, step: str, task_id: str, round_number: int) -> None:
    """Show what is known of a task after a step of it has ended, well or not."""
    for chapter in CHAPTERS.get(step, ()):
        if FlowRunContext.get() is not None and registry.find_task(task_id) is not None:
            chapter(registry, task_id, round_number)


def show_terms(registry: Registry, task_id: str, _: int) -> None:
    task = _task(registry, task_id)
    if not task.terms:
        return
    spec = PublishedTask.model_validate_json(task.terms).spec
    dataset, shrink = spec.dataset, spec.compression
    size = models.dimension(spec.model.name, dataset.input_shape, dataset.classes, spec.model.options)
    rows = {
        "publisher": f"`{task.publisher}`",
        "reward": _money(spec.money.reward_wei, spec.money.reward_token),
        "stake of a miner": _money(spec.money.minimum_stake_wei, ZERO_ADDRESS),
        "data set": f"{dataset.name}: {dataset.classes} classes, samples of {'×'.join(map(str, dataset.input_shape))}",
        "model": f"{spec.model.name}, {size} parameters" + (f", from {task.start}" if task.start else ""),
        "rounds": f"at most {spec.rounds.max_rounds}, {spec.rounds.contribution_timeout_s:g} s each for submissions",
        "sent in a round": f"{shrink.density:.0%} of the coordinates, {shrink.bits} bits each",
        "miners": f"{spec.participants.miners_min} to {spec.participants.miners_max}",
        "required accuracy": f"committed to: `{task.accuracy_commit}`",
        "deadline": _clock(task.deadline_s),
        "spec hash": f"`{task.spec_hash}`",
        "locked by transaction": f"`{task.transaction}`",
    }
    _put(MarkdownArtifact(key=f"terms-{task_id}", description="Terms", markdown=_sheet(f"Task {task_id}", rows)))


def show_cohort(registry: Registry, task_id: str, _: int) -> None:
    names, task = _names(registry), _task(registry, task_id)
    refused = _reasons(registry, task_id, 0, ("Cohort", "register", "prove-dataset"))
    rows = []
    for row in registry.about(RegistrationRow, task_id):
        role = "miner, drawn as aggregator" if row.miner == task.aggregator else "miner"
        decision = role if row.is_admitted else f"refused: {refused.pop(row.miner, 'not admitted')}"
        stake_wei = row.held_stake_wei or row.offered_stake_wei or ""
        rows.append(_applicant(names, row.miner, decision, row.weight or "", stake_wei))
    rows += [_applicant(names, one, f"refused: {why}", "", "") for one, why in refused.items()]
    _put(_table(f"cohort-{task_id}", rows, "Who was admitted, and who was drawn as aggregator"))


def show_submissions(registry: Registry, task_id: str, round_number: int) -> None:
    refused = _reasons(registry, task_id, round_number, ("contribute", "Collection", "KeyRequest"))
    accepted = {one.miner for one in _of_round(registry, SubmissionRow, task_id, round_number) if one.is_accepted}
    rows = _answers(registry, task_id, round_number, "contribute", refused, dict.fromkeys(accepted, "accepted"))
    _put(_table(f"submissions-{task_id}", rows, f"Submissions of round {round_number}"))


def show_votes(registry: Registry, task_id: str, round_number: int) -> None:
    aggregator = _task(registry, task_id).aggregator
    refused = _reasons(registry, task_id, round_number, ("attest",))
    verdicts = {
        one.miner: ("valid" if one.accepted else f"invalid: {one.reason}")
        + (" (its own candidate: not counted)" if one.miner == aggregator else "")
        for one in _of_round(registry, VoteRow, task_id, round_number)
    }
    rows = _answers(registry, task_id, round_number, "attest", refused, verdicts)
    _put(_table(f"votes-{task_id}", rows, f"Votes on the candidate of round {round_number}"))


def show_accuracy(registry: Registry, task_id: str, _: int) -> None:
    measured = [row for row in registry.about(RoundRow, task_id) if row.total]
    if not measured:
        return
    required_ppm = _task(registry, task_id).required_accuracy_ppm
    required = None if required_ppm is None else required_ppm / PPM
    picture = curve([(row.round_number, row.correct / row.total) for row in measured], required)
    last = measured[-1]
    said = f"Accuracy after round {last.round_number}: {last.correct} of {last.total} correct"
    said += "" if required is None else f"; required were {required:.2%}"
    address = "data:image/svg+xml;base64," + base64.b64encode(picture.encode()).decode()
    _put(ImageArtifact(key=f"accuracy-{task_id}", description=said, image_url=address))


def show_rewards(registry: Registry, task_id: str, _: int) -> None:
    names, scores = _names(registry), {row.miner: row.score for row in registry.about(ScoreRow, task_id)}
    publisher = _task(registry, task_id).publisher
    rows = []
    for row in registry.about(RewardRow, task_id):
        score = f"score {_score(scores[row.account])}" if row.account in scores else "took part"
        aggregators = "refund" if row.account == publisher else "aggregator's share"
        kinds = {"RewardClaimed": score, "RewardCredited": aggregators, "PublisherRefunded": "refund"}
        rows.append(
            {
                "account": names(row.account),
                "for": kinds.get(row.kind, "compensation"),
                "amount": _money(int(row.amount_wei), row.token),
                "transaction": row.transaction,
                "wei": row.amount_wei,
                "when": row.at.strftime("%Y-%m-%d %H:%M:%S UTC"),
            }
        )
    _put(_table(f"rewards-{task_id}", rows, "What the contracts credited and paid"))


def show_summary(registry: Registry, task_id: str, _: int) -> None:
    task = _task(registry, task_id)
    measured = [row for row in registry.about(RoundRow, task_id) if row.total]
    block = next((row for row in registry.about(ModelVersionRow, task_id) if row.is_published), None)
    required = task.required_accuracy_ppm
    rewards, token = registry.about(RewardRow, task_id), task.token or ZERO_ADDRESS
    paid = sum(int(row.amount_wei) for row in rewards if row.account != task.publisher)
    rows = {
        "status": f"**{task.status}**" + (f": {_cell(task.reason)}" if task.reason else ""),
        "rounds": str(len(measured)),
        "accuracy": ", ".join(f"{row.correct / row.total:.2%}" for row in measured) or "none was measured",
        "required": "was not revealed" if required is None else f"{required / PPM:.2%}",
        "paid to miners": f"{_money(paid, token)} of {_money(int(task.reward_wei or 0), token)}",
        "refused": str(len(registry.refusals(task_id))),
        "model": f"`{block.uri}`" if block else "none was published",
        "published by transaction": f"`{block.transaction}`" if block else "",
    }
    _put(MarkdownArtifact(key=f"summary-{task_id}", description="Summary", markdown=_sheet(f"Task {task_id}", rows)))


Chapter = Callable[[Registry, str, int], None]
CHAPTERS: dict[str, tuple[Chapter, ...]] = {
    "publish": (show_terms,),
    "form-cohort": (show_cohort,),
    "audit": (show_submissions,),
    "aggregate": (show_accuracy,),
    "attest": (show_votes,),
    "reveal-accuracy": (show_accuracy,),
    "reveal-accuracy-instead": (show_accuracy,),
    "withdraw": (show_rewards,),
    "refund": (show_rewards,),
    "compensation": (show_rewards,),
    "run-task": (show_summary,),
}

# Rows and cells


def _task(registry: Registry, task_id: str) -> TaskRow:
    found = registry.find_task(task_id)
    assert found is not None  # `tell` has asked
    return found


def _names(registry: Registry) -> Callable[[str], str]:
    """Name of an address; the address itself where this host knows none."""
    known = {row.address: row.name for row in registry.actors()}
    return lambda address: known.get(address, address)


def _of_round(registry: Registry, table: type[Any], task_id: str, round_number: int) -> list[Any]:
    return [row for row in registry.about(table, task_id) if row.round_number == round_number]


def _reasons(registry: Registry, task_id: str, round_number: int, steps: Sequence[str]) -> dict[str, str]:
    """Why somebody was refused in one of these steps, by address."""
    found: Sequence[RefusalRow] = registry.refusals(task_id)
    return {row.actor: row.reason for row in found if row.round_number == round_number and row.step in steps}


def _answers(
    registry: Registry,
    task_id: str,
    round_number: int,
    step: str,
    refused: Mapping[str, str],
    decisions: Mapping[str, str],
) -> list[dict[str, Any]]:
    """A row for each admitted miner: when its answer came, and what became of it."""
    names = _names(registry)
    ended: dict[str, float] = {}
    steps: Sequence[StepRow] = registry.steps(task_id)
    for row in steps:
        if (row.step, row.round_number, row.outcome) == (step, round_number, "ok"):
            ended.setdefault(row.actor, row.started_s + row.seconds)
    admitted = [row.miner for row in registry.about(RegistrationRow, task_id) if row.is_admitted]
    return [
        {
            "miner": names(miner),
            "when": _clock(ended.get(names(miner))),
            "decision": decisions.get(miner) or (f"refused: {refused[miner]}" if miner in refused else "none came"),
        }
        for miner in admitted
    ]


def _applicant(
    names: Callable[[str], str], address: str, decision: str, weight: int | str, stake_wei: str
) -> dict[str, Any]:
    return {
        "miner": names(address),
        "decision": decision,
        "weight": weight,
        "stake_wei": stake_wei,
        "address": address,
    }


def _table(key: str, rows: Sequence[Mapping[str, Any]], description: str) -> TableArtifact:
    return TableArtifact(key=key, table=[dict(row) for row in rows], description=description)


def _sheet(title: str, rows: Mapping[str, str]) -> str:
    lines = "".join(f"| {name} | {value} |\n" for name, value in rows.items() if value)
    return f"# {title}\n\n| | |\n|---|---|\n{lines}"


def _cell(text: str) -> str:
    """Others' words, so that they stay within their cell."""
    return " ".join(text.replace("|", "\\|").split())[:500]


def _money(amount: int, token: str) -> str:
    if token != ZERO_ADDRESS:
        return f"{amount} of token {token}"
    return f"{amount / ETHER_WEI:.6g} ether" if amount >= 10**12 else f"{amount} wei"


def _score(micro: str) -> str:
    return f"{int(micro) / SCORE_UNIT:,.1f}"


def _clock(moment_s: float | None) -> str:
    return "" if moment_s is None else datetime.fromtimestamp(moment_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _put(artifact: Artifact) -> None:
    try:
        artifact.create(_sync=True)  # type: ignore[call-arg]  # what Prefect's own create functions call
    except NOT_TAKEN as error:
        get_run_logger().warning("%s is not shown: %s", artifact.key, error)


# The curve

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 56, 24, 28, 44


def curve(points: Sequence[tuple[int, float]], required: float | None) -> str:
    """An SVG of (round, accuracy in [0, 1]); a dashed line at the required accuracy, where it is known."""
    values = [accuracy for _, accuracy in points] + ([] if required is None else [required])
    low = max(0.0, int(10 * min(values) - 0.5) / 10)
    last = max(2, points[-1][0])

    def x(number: int) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (number - 1) / (last - 1), 1)

    def y(accuracy: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - (accuracy - low) / (1 - low)), 1) if low < 1 else TOP

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#fff"/>', *_axes(x, y, low, last)]
    if required is not None:
        # At the left, on the side away from the curve: there it begins, and seldom near what it has to reach.
        beside = -6 if points[0][1] < required else 16
        parts += [
            f'<path d="M{LEFT} {y(required)}H{WIDTH - RIGHT}" stroke="#c2410c" stroke-dasharray="6 5"/>',
            f'<text x="{LEFT + 4}" y="{y(required) + beside}" fill="#c2410c">required {required:.2%}</text>',
        ]
    line = " ".join(f"{x(number)},{y(accuracy)}" for number, accuracy in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1d4ed8" stroke-width="2.5"/>')
    parts += [f'<circle cx="{x(number)}" cy="{y(accuracy)}" r="4" fill="#1d4ed8"/>' for number, accuracy in points]
    number, accuracy = points[-1]
    parts.append(
        f'<text x="{min(x(number), WIDTH - 40)}" y="{y(accuracy) - 10}" text-anchor="middle" fill="#1d4ed8">{accuracy:.2%}</text>'
    )
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">'
    return head + "".join(parts) + "</svg>"


def _axes(x: Callable[[int], float], y: Callable[[float], float], low: float, last: int) -> list[str]:
    """Lines at round shares of accuracy, numbers below at most twelve rounds."""
    shares = [low + (1 - low) * part / 4 for part in range(5)] if low < 1 else [1.0]
    parts = [f'<path d="M{LEFT} {y(share)}H{WIDTH - RIGHT}" stroke="#e5e7eb"/>' for share in shares]
    parts += [
        f'<text x="{LEFT - 8}" y="{y(share) + 4}" text-anchor="end" fill="#6b7280">{share:.0%}</text>'
        for share in shares
    ]
    parts += [
        f'<text x="{x(number)}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="#6b7280">{number}</text>'
        for number in range(1, last + 1, -(-last // 12))
    ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    return [*parts, f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle" fill="#6b7280">round</text>']


# Progress


def show_progress(fraction: float, what: str) -> None:
    """How far the run of a step is; 0 <= fraction <= 1. Costs the step the start of a thread every UPDATE_S at most."""
    run, shared = FlowRunContext.get(), SyncClientContext.get()
    if run is None or run.flow is None or run.flow_run is None or shared is None:
        return
    given = run.parameters or {}
    key = "-".join(str(given.get(name)) for name in ("task_id", "round_number", "actor"))
    key = f"progress-{key}-{run.flow.name}"
    bar = _bar(run.flow_run.id, re.sub(r"[^a-z0-9-]+", "-", key.lower()))
    bar.tell(shared.client, fraction, what)


@lru_cache(maxsize=256)
def _bar(run_id: UUID, key: str) -> "_Bar":
    return _Bar(run_id, key)


class _Bar:
    """The progress artifact of one run, kept up to date beside the step: a server that is slow, or away, holds up nothing."""

    def __init__(self, run_id: UUID, key: str) -> None:
        self._run_id, self._key = run_id, key
        self._artifact: UUID | None = None
        self._due_s = 0.0
        self._sending: threading.Thread | None = None

    def tell(self, client: SyncPrefectClient, fraction: float, what: str) -> None:
        is_last = fraction >= 1
        if not is_last and (time.monotonic() < self._due_s or not self._is_idle(0)):
            return
        if not self._is_idle(PATIENCE_S):
            return
        self._due_s = time.monotonic() + UPDATE_S
        self._sending = threading.Thread(target=self._send, args=(client, fraction, what), daemon=True)
        self._sending.start()
        if is_last:
            self._is_idle(PATIENCE_S)

    def _is_idle(self, patience_s: float) -> bool:
        """Whether what was sent before has arrived, or failed, within the time."""
        if self._sending is not None:
            self._sending.join(patience_s)
        return self._sending is None or not self._sending.is_alive()

    def _send(self, client: SyncPrefectClient, fraction: float, what: str) -> None:
        percent = round(100 * min(max(fraction, 0.0), 1.0), 1)
        try:
            if self._artifact is None:
                made = ArtifactCreate(
                    type="progress", key=self._key, description=what, data=percent, flow_run_id=self._run_id
                )
                self._artifact = client.create_artifact(made).id
            else:
                client.update_artifact(self._artifact, ArtifactUpdate(description=what, data=percent))
        except NOT_TAKEN:
            pass  # the next one says more
