"""One task M1..M7 with virtual miners in this process, for research on learning and economics.

Rounds, admission, draw, weights, votes and limits are the steps' own functions. Money follows `infra.economy`, whose rules
are the contracts'. There are no keys, signatures, messages, chain or store, and nobody checks what the steps check of
them: a cheat here is one that the protocol does not notice. Encryption is exact on integers, so a plain sum gives the
models of a real run; `Settings.encrypt` does it for real.
"""

import json
import resource
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak
from rich.console import Console
from rich.progress import Progress

from contracts.messages import ZERO32, AbortReason, Address, Cohort, draw_seed
from contracts.task_spec import PPM, PublishedTask, TaskFile, TaskSpec
from infra import economy, simulation_page
from infra.bench import encrypted_sum
from infra.population import (
    HONEST,
    OF_ABSENCE,
    OF_NOISE,
    OF_REVEALS,
    InvalidSetting,
    Settings,
    VirtualMiner,
    adapted,
    application,
    is_divided,
    populate,
    stream,
)
from infra.simulate import Combine, Stopwatch, ready_sets
from tasks.attest import Objection, check_locally
from tasks.chunks import Layout
from tasks.cohort import choose, draw, fixed_weights
from tasks.contribute import local_round, order_of_samples
from tasks.crypto import ndd_fe
from tasks.global_model import (
    GlobalModel,
    build_network,
    initial_model,
    next_model,
    opening_size,
    round_support,
)
from tasks.keys import sealed_size, too_few
from tasks.learning import compression
from tasks.learning.compression import Memory
from tasks.learning.datasets import Dataset
from tasks.learning.training import Diverged, evaluate
from tasks.publish import check_runnable, terms_on_chain

Integers = npt.NDArray[np.int64]
Tell = Callable[[int, int, int], None]  # round, miners done, miners in all
OnRound = Callable[[dict[str, Any]], None]

CONTRACTS_ADMIT = 200  # MAX_MINERS of contracts/src/Task.sol
ENCRYPTED_BYTES = 448  # of memory for each coordinate of each miner while a sum is encrypted and opened; 424 measured
MAX_ENCRYPTED_BYTES = 4 * 2**30


class Memories:
    """Every miner's memory between rounds, (d,) twice each, in a file that has no name: only pages in use are in memory."""

    def __init__(self, folder: Path, miners: int, dimension: int) -> None:
        needed, free = 8 * miners * dimension, shutil.disk_usage(folder).free
        if needed > free:
            raise InvalidSetting(
                f"miners = {miners}: their memories between rounds take {needed / 2**30:.1f} GiB, {folder} has "
                f"{free / 2**30:.1f} free: fewer miners, or another folder"
            )
        with tempfile.TemporaryFile(dir=folder) as file:
            self._kept = np.memmap(file, np.float32, "w+", shape=(miners, 2, dimension))

    def __getitem__(self, miner: int) -> Memory:
        velocity, residual = np.asarray(self._kept[miner])
        return Memory(velocity, residual)

    def __setitem__(self, miner: int, memory: Memory) -> None:
        self._kept[miner] = memory.velocity, memory.residual


class Submissions:
    """What miners sent in a round, as far as its sum needs it: of a plain sum only the sum so far. By position in the cohort."""

    def __init__(self, combine: Combine | None) -> None:
        self._combine = combine
        self._vectors: list[Integers] = []
        self._weights: list[int] = []
        self._sum: Integers | int = 0
        self.scores: dict[int, int] = {}

    def add(self, position: int, vector: Integers, weight: int) -> None:
        self.scores[position] = compression.score(vector)
        self._weights.append(weight)
        if self._combine is None:
            self._sum = self._sum + weight * vector
        else:
            self._vectors.append(vector)

    @property
    def weight(self) -> int:
        return sum(self._weights)

    def opened(self) -> Integers:
        """The weighted sum (k,) of at least one submission."""
        return np.asarray(self._sum) if self._combine is None else self._combine(self._vectors, self._weights)


@dataclass(eq=False)
class VirtualTask:
    """A task after M2. members, scores and counted (rounds that counted) are in address order, as the cohort is.

    combine: what sums a round's vectors, or None for a plain sum.
    """

    spec: TaskSpec
    settings: Settings
    required_ppm: int
    cohort: Cohort
    members: list[VirtualMiner]
    refused: dict[Address, str]
    shared: Dataset
    validation: Dataset
    memories: Memories
    model: GlobalModel
    combine: Combine | None
    watch: Stopwatch
    scores: list[int] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    votes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scores, self.counted = [0] * len(self.members), [0] * len(self.members)
        self.aggregator = self.cohort.miners.index(self.cohort.aggregator)
        self.is_silent = self.members[self.aggregator].character == "silent"
        self.limits = terms_on_chain(self.spec, self.spec.windows.deadline_s)
        self.terms = PublishedTask(
            task_id=self.cohort.task_id, publisher=self.cohort.publisher, validation_sha256=ZERO32, spec=self.spec
        )


def run(file: TaskFile, settings: Settings, folder: Path, console: Console) -> dict[str, Any]:
    """Simulate, showing progress; write simulation.json and simulation.html into the folder; print a summary."""
    torch.set_num_threads(1)  # sums in one order, and no slower for small networks
    folder.mkdir(parents=True, exist_ok=True)
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as progress:
        bar = progress.add_task("setting up", total=None)

        def tell(number: int, done: int, of: int) -> None:
            progress.update(bar, description=f"round {number}", completed=done, total=of)

        def on_round(row: dict[str, Any]) -> None:
            console.print(
                f"round {row['round']}: {100 * row['accuracy']:.2f} % with {row['submissions']} submissions of "
                f"{row['coordinates']} coordinates"
            )

        found = simulate_task(file, settings, folder, tell=tell, on_round=on_round)
    (folder / "simulation.json").write_text(json.dumps(found, indent=1))
    (folder / "simulation.html").write_text(simulation_page.render_html(found))
    simulation_page.print_summary(found, console, folder)
    return found


def simulate_task(
    file: TaskFile,
    settings: Settings,
    folder: Path,
    *,
    tell: Tell = lambda *_: None,
    on_round: OnRound = lambda _: None,
) -> dict[str, Any]:
    """The report of a whole task: everything in it but `measured` is the same for the same seed and settings.

    folder: for the miners' memories while it runs. tell: after each miner; on_round: with each round's figures. Raises
    InvalidSetting, or a ValueError of the task's data or model.
    """
    task = form(file, settings, folder)
    status, reason = play(task, tell, on_round)
    return report(task, status, reason)


def form(file: TaskFile, settings: Settings, folder: Path) -> VirtualTask:
    """M1 and M2: the terms, who is admitted, who is drawn."""
    spec, watch = adapted(file, settings), Stopwatch()
    dimension = check_runnable(spec)
    _check_encryption(spec, settings, dimension)
    shared, validation = ready_sets(spec)
    members, refused = admit(spec, populate(spec, settings, shared))
    required = file.required_accuracy if settings.required_accuracy is None else settings.required_accuracy
    return VirtualTask(
        spec=spec,
        settings=settings,
        required_ppm=round(required * PPM),
        cohort=form_cohort(spec, members),
        members=members,
        refused=refused,
        shared=shared,
        validation=validation,
        memories=Memories(folder, len(members), dimension),
        model=initial_model(spec),
        combine=encrypted_sum(spec, watch) if settings.encrypt else None,
        watch=watch,
    )


def admit(spec: TaskSpec, population: Sequence[VirtualMiner]) -> tuple[list[VirtualMiner], dict[Address, str]]:
    """Who is in the cohort, in address order, and why the others are not."""
    found = {miner.address: miner for miner in population}
    applicants = [application(found[address], _task_id(spec)) for address in sorted(found, key=str.lower)]
    admitted, refused = choose(applicants, (), spec.participants.miners_max)
    return [found[applicant.miner] for applicant in admitted], refused


def form_cohort(spec: TaskSpec, members: Sequence[VirtualMiner]) -> Cohort:
    """Weights by samples, the aggregator drawn by stake; the block's hash is drawn from the task's seed."""
    seed = draw_seed(_task_id(spec), keccak(text=f"block {spec.seed}"))
    publisher = to_checksum_address(keccak(text=f"publisher {spec.seed}")[-20:])
    miners = [miner.address for miner in members]
    aggregator = draw(seed, miners, [miner.stake_wei for miner in members])
    return Cohort(
        task_id=_task_id(spec),
        round_number=0,
        publisher=publisher,
        publisher_key="0x02" + keccak(text=publisher).hex(),
        aggregator=aggregator,
        aggregator_key=members[miners.index(aggregator)].encryption_key,
        miners=tuple(miners),
        registrations=(ZERO32,) * len(members),
        weights=fixed_weights(spec, [len(miner.indices) for miner in members]),
        draw_seed="0x" + seed.hex(),
        refused=(),
        reasons=(),
    )


def _task_id(spec: TaskSpec) -> str:
    return f"{spec.name}-simulated"


def _check_encryption(spec: TaskSpec, settings: Settings, dimension: int) -> None:
    rules, miners = spec.compression, spec.participants.miners_max
    densest = compression.density_of_round(1, rules.density, rules.warmup_rounds)
    needed = int(ENCRYPTED_BYTES * dimension * densest * miners)
    if settings.encrypt and needed > MAX_ENCRYPTED_BYTES:
        raise InvalidSetting(
            f"encrypt with {miners} miners and {dimension} parameters takes {needed / 2**30:.1f} GiB of memory, more than "
            f"{MAX_ENCRYPTED_BYTES / 2**30:.0f}: fewer miners; the plain sum gives the same models"
        )


# ── rounds ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def play(task: VirtualTask, tell: Tell, on_round: OnRound) -> tuple[str, str]:
    """M3 to M6: the status in which the task ends, PAID or REFUNDED, and why."""
    if task.is_silent:
        return "REFUNDED", "the aggregator is silent"
    last = task.spec.rounds.max_rounds
    for number in range(1, last + 1):
        before = task.model
        if shortage := play_round(task, number, tell):
            return "REFUNDED", f"{AbortReason.NOT_ENOUGH_SUBMISSIONS}: {shortage}"
        on_round(task.rounds[-1])
        figures = task.rounds[-1]
        met = figures["correct"] * PPM >= task.required_ppm * figures["total"]
        if met and (number == last or not task.settings.all_rounds):
            objection = vote(task, before, number)
            return ("REFUNDED", f"{AbortReason.CANDIDATE_REJECTED}: {objection}") if objection else ("PAID", "")
    return "REFUNDED", f"{AbortReason.MAX_ROUNDS}: {last}"


def play_round(task: VirtualTask, number: int, tell: Tell) -> str:
    """M3 and M4: the next model and a row of figures; or why too few submitted."""
    sent = submissions(task, number, tell)
    if shortage := too_few(task.terms, task.cohort, number, [task.cohort.miners[i] for i in sent.scores], {}):
        return shortage
    opened = sent.opened()
    with task.watch.measure("stepping"):
        task.model = next_model(task.spec, task.model, number, opened, sent.weight)
    for position, score in sent.scores.items():
        task.scores[position] += score
        task.counted[position] += 1
    with task.watch.measure("evaluating"):
        judged = evaluate(build_network(task.spec), task.model.parameters, task.validation)
    task.rounds.append(
        {
            "round": number,
            "correct": judged.correct,
            "total": judged.total,
            "accuracy": judged.correct / judged.total,
            "loss": judged.loss,
            "submissions": len(sent.scores),
            "weight": sent.weight,
            "coordinates": len(opened),
            "model_sha256": task.model.sha256,
            **_bytes(task.spec, len(opened), len(sent.scores)),
        }
    )
    return ""


def submissions(task: VirtualTask, number: int, tell: Tell) -> Submissions:
    """M3 of everybody who does not vanish."""
    present, sent = _present(task, number), Submissions(task.combine)
    for done, position in enumerate(present, start=1):
        try:
            with task.watch.measure("training"):
                vector = contribution(task, position, number)
        except Diverged:
            pass  # its step fails: it submits nothing
        else:
            sent.add(position, vector, task.cohort.weights[position])
        tell(number, done, len(present))
    return sent


def _present(task: VirtualTask, number: int) -> list[int]:
    """Positions of those that do not vanish in a round. The aggregator is there: without it there is no round."""
    draws = stream(task.spec, OF_ABSENCE, number).random(len(task.members))
    return [i for i, drawn in enumerate(draws) if drawn >= task.settings.dropout or i == task.aggregator]


def contribution(task: VirtualTask, position: int, number: int) -> Integers:
    """What a miner sends in a round: quantised values (k,). Raises Diverged."""
    miner, spec = task.members[position], task.spec
    if miner.character in SENT_WITHOUT_TRAINING:
        rng = stream(spec, OF_NOISE, number, position)
        return _at_full_norm(spec, task.model, number, SENT_WITHOUT_TRAINING[miner.character](task.model, rng))
    _, vector, task.memories[position] = local_round(
        spec,
        task.model,
        miner.dataset(task.shared),
        task.memories[position],
        number,
        sample_order=order_of_samples(spec, miner.address, number),
    )
    return vector


def _zeros(model: GlobalModel, _: np.random.Generator) -> npt.NDArray[np.float64]:
    return np.zeros(model.parameters.size)


def _noise(model: GlobalModel, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    return rng.standard_normal(model.parameters.size)


def _replay(model: GlobalModel, _: np.random.Generator) -> npt.NDArray[np.float64]:
    return np.zeros(model.parameters.size) if model.last_combined is None else model.last_combined.astype(np.float64)


SENT_WITHOUT_TRAINING = {"zero": _zeros, "noise": _noise, "replay": _replay}


def _at_full_norm(spec: TaskSpec, model: GlobalModel, number: int, update: npt.NDArray[np.float64]) -> Integers:
    """Any direction (d,), as large as clipping lets it be, on the round's support in fixed point: what a cheat can send."""
    rules, support = spec.compression, round_support(spec, model, number)
    largest = float(np.abs(update[support]).max(initial=0))
    # So large that clipping decides, whatever the direction: one coordinate alone is beyond clip_norm.
    scaled = (update * (2 * rules.clip_norm / largest) if largest else update).astype(np.float32)
    nothing = Memory.zero(update.size)
    values, memory = compression.compress(scaled, nothing, support, momentum=0.0, clip_norm=rules.clip_norm)
    return compression.to_fixed_point(values, memory, support, scale=rules.scale, bound=rules.bound)[0]


def _bytes(spec: TaskSpec, coordinates: int, submissions: int) -> dict[str, int]:
    """Bytes that all parties together would store in a round: ciphertexts, the functional key, the opening."""
    layout = Layout(coordinates, spec.voting.chunk_coordinates)
    lengths = [layout.length(index) for index in layout.chunks]
    return {
        "ciphertext_bytes": submissions * sum(map(ndd_fe.encoded_size, lengths)),
        "key_bytes": sum(map(sealed_size, lengths)),
        "opening_bytes": sum(map(opening_size, lengths)),
    }


def vote(task: VirtualTask, before: GlobalModel, number: int) -> str:
    """M5: every member but the aggregator that has not vanished votes; why the quorum is not reached, or an empty string.

    Cheats accept: a block pays them. Honest miners also know that everything else they check holds.
    """
    draws = stream(task.spec, OF_ABSENCE, 0).random(len(task.members))
    votes = {"accepting": 0, "objecting": 0, "missing": 0}
    for position, (miner, drawn) in enumerate(zip(task.members, draws, strict=True)):
        if position == task.aggregator:
            continue
        if drawn < task.settings.dropout:
            votes["missing"] += 1
            continue
        with task.watch.measure("voting"):
            votes["accepting" if miner.character != HONEST or _accepts(task, before, miner) else "objecting"] += 1
    required = economy.required_votes(len(task.members), task.limits.fault_rate_ppm)
    task.votes = {**votes, "required": required}
    return "" if votes["accepting"] >= required else f"round {number}: {votes['accepting']} of {required} votes"


def _accepts(task: VirtualTask, before: GlobalModel, miner: VirtualMiner) -> bool:
    try:
        check_locally(task.spec, before, task.model, miner.dataset(task.shared))
    except (Objection, Diverged):
        return False
    return True


# ── money ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def claimed_scores(task: VirtualTask) -> dict[int, int | None]:
    """By position, the score that each participant reveals, or None; participants are those that counted in some round."""
    kept = stream(task.spec, OF_REVEALS).random(len(task.members)) < task.settings.unrevealed
    scores: dict[int, int | None] = {}
    for position, miner in enumerate(task.members):
        if task.counted[position]:
            score = task.limits.max_score if miner.character == "inflate" else task.scores[position]
            scores[position] = None if kept[position] else score
    return scores


@dataclass(frozen=True)
class Payments:
    """In wei, by position: what each member claims, and what a silent aggregator's stake gives or takes; and the rest."""

    claims: list[int]
    from_stakes: list[int]
    share: int
    refund: int


def settle(task: VirtualTask, status: str) -> Payments:
    """M7. A turn that the deadline cuts short costs a silent aggregator nothing (StakeRegistry.replaceAggregator)."""
    reward, nothing = task.spec.money.reward_wei, [0] * len(task.members)
    if status == "PAID":
        scores, claims = claimed_scores(task), list(nothing)
        share, paid = economy.pay_out(reward, task.limits.aggregator_share_ppm, list(scores.values()))
        for position, amount in zip(scores, paid, strict=True):
            claims[position] = amount
        return Payments(claims, nothing, share, 0)
    if not task.is_silent or task.spec.windows.publish_s > task.spec.windows.deadline_s:
        return Payments(nothing, nothing, 0, reward)
    stakes = [miner.stake_wei for miner in task.members]
    gains = economy.take_stake(stakes, task.aggregator, task.limits.silence_penalty_ppm)
    return Payments(nothing, gains, 0, reward)


# ── the report ───────────────────────────────────────────────────────────────────────────────────────────────────────


def report(task: VirtualTask, status: str, reason: str) -> dict[str, Any]:
    """Everything as JSON; amounts of wei are strings, so that no reader rounds them."""
    payments = settle(task, status)
    miners = _miners(task, payments)
    settings = {name: getattr(task.settings, name) for name in Settings.__dataclass_fields__}
    publisher = payments.refund - task.spec.money.reward_wei
    earned = sum(int(miner["earned_wei"]) for miner in miners)
    return {
        "task": {"name": task.spec.name, "seed": task.spec.seed, "status": status, "reason": reason},
        "settings": {**settings, "cheats": dict(task.settings.cheats)},
        "terms": task.spec.model_dump(mode="json"),
        "required_accuracy": task.required_ppm / PPM,
        "is_beyond_contracts": len(task.members) > CONTRACTS_ADMIT,
        "data": {
            "shared_samples": len(task.shared),
            "validation_samples": len(task.validation),
            "is_divided": is_divided(task.spec, task.settings, task.shared),
        },
        "refused": len(task.refused),
        "aggregator": task.members[task.aggregator].name,
        "rounds": task.rounds,
        "votes": task.votes,
        "miners": miners,
        "money_wei": {"publisher": str(publisher), "miners": str(earned), "sum": str(publisher + earned)},
        "economics": economics(miners),
        "measured": {
            "seconds": {part: round(sum(entries), 3) for part, entries in task.watch.take().items()},
            "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        },
    }


def _miners(task: VirtualTask, payments: Payments) -> list[dict[str, Any]]:
    """A row for each member, in address order."""
    claimed = claimed_scores(task)
    shares = [payments.share if i == task.aggregator else 0 for i in range(len(task.members))]
    earned = [sum(parts) for parts in zip(payments.claims, payments.from_stakes, shares, strict=True)]
    return [
        {
            "name": miner.name,
            "address": miner.address,
            "character": miner.character,
            "samples": len(miner.indices),
            "label_balance": miner.label_balance(task.shared.classes),
            "right_labels": miner.right_labels(task.shared),
            "weight": task.cohort.weights[i],
            "stake_wei": str(miner.stake_wei),
            "rounds": task.counted[i],
            "score": task.scores[i],
            "revealed_score": claimed.get(i) if not payments.refund else None,
            "reward_wei": str(payments.claims[i]),
            "share_wei": str(shares[i]),
            "from_stakes_wei": str(payments.from_stakes[i]),
            "earned_wei": str(earned[i]),
        }
        for i, miner in enumerate(task.members)
    ]


def economics(miners: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How evenly the claims fall, what they go along with, and what each character gets; the aggregator's share is apart."""
    rewards = [int(miner["reward_wei"]) for miner in miners]
    return {
        "gini_of_rewards": economy.gini(rewards),
        "lorenz": economy.lorenz(rewards) if sum(rewards) else None,
        "correlations_of_reward": {
            "all": _correlations(miners),
            HONEST: _correlations([miner for miner in miners if miner["character"] == HONEST]),
        },
        "characters": _by_character(miners),
    }


def _correlations(miners: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    rewards = [int(miner["reward_wei"]) for miner in miners]
    measures = ("samples", "label_balance", "right_labels", "rounds", "weight")
    return {name: economy.correlation([miner[name] for miner in miners], rewards) for name in measures}


def _by_character(miners: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each character that is there: how many, what they earn together, and one of them beside one of all."""
    total, found = sum(int(miner["reward_wei"]) for miner in miners), {}
    for name in sorted({miner["character"] for miner in miners}):
        own = [int(miner["reward_wei"]) for miner in miners if miner["character"] == name]
        even = total * len(own) / len(miners)
        found[name] = {
            "miners": len(own),
            "reward_wei": str(sum(own)),
            "share_of_rewards": sum(own) / total if total else None,
            "times_an_even_share": sum(own) / even if total else None,
        }
    return found
