"""The end of a task, for people: a page to send to a colleague, and a summary for the terminal.

Both read the same report, the dict that is stored as report.json. A task may end in any module, so every part of
the report may be None, empty or absent; what is absent is named as such and never shown as a zero.

Money is an integer of wei and is printed digit by digit, never through a float. Accuracies are fractions of counted
samples and are cut, not rounded: a printed percentage reaches the requirement only where the real one does.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

Report = Mapping[str, Any]

MODULES = {
    "M1": "Publish",
    "M2": "Form the cohort",
    "M3": "Train and encrypt",
    "M4": "Aggregate",
    "M5": "Attest",
    "M6": "Publish on chain",
    "M7": "Reveal and pay",
}
# Ethereum's usual ids for chains that live in one process or on one desk.
DEVELOPMENT_CHAINS = {1337, 31337, 131277322940537}
ABSENT = "–"
NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"


# Numbers as text


def as_wei(value: Any) -> int | None:
    """An amount in wei, or None where the report has none. Raises ValueError for a float: its last digits are gone."""
    if value is None:
        return None
    if isinstance(value, float | bool):
        raise ValueError(f"an amount in wei must be an integer, got {value!r}")
    return int(value)


def exact_eth(wei: int) -> str:
    """All digits: 1500000000000000007 is '1.500000000000000007'."""
    whole, part = divmod(abs(wei), 10**18)
    digits = f"{part:018d}".rstrip("0")
    return ("-" if wei < 0 else "") + f"{whole:,}" + (f".{digits}" if digits else "")


def short_eth(wei: int, places: int = 6) -> str:
    """With its unit, unbreakable, rounded to `places` decimals; '≈' says that digits were left out. Dust is in wei."""
    unit = 10 ** (18 - places)
    if 0 < abs(wei) < unit:
        return f"{wei:,}{NO_BREAK_SPACE}wei"
    rounded = (wei + unit // 2) // unit * unit
    return f"{exact_eth(rounded)}{NO_BREAK_SPACE}ETH" if rounded == wei else f"≈{exact_eth(rounded)}{NO_BREAK_SPACE}ETH"


def as_ratio(value: Any) -> Fraction | None:
    """The decimal that was written: 0.94 is 94/100, not the nearest binary fraction."""
    return None if value is None else Fraction(Decimal(str(value)))


def percent(ratio: Fraction | None, places: int = 2) -> str:
    """Cut after `places` decimals."""
    if ratio is None:
        return ABSENT
    whole, part = divmod(int(ratio * 100 * 10**places), 10**places)
    return f"{whole}.{part:0{places}d}%" if places else f"{whole}%"


def exact_percent(ratio: Fraction | None) -> str:
    """A requirement as it was written: 94% or 92.5%."""
    if ratio is None:
        return ABSENT
    hundredfold = Decimal(ratio.numerator * 100) / Decimal(ratio.denominator)
    return f"{hundredfold.normalize():f}%"


def grouped(value: Any) -> str:
    return ABSENT if value is None else f"{int(value):,}"


def seconds_text(value: Any) -> str:
    return ABSENT if value is None else f"{float(value):,.2f} s"


def duration_text(value: float | None) -> str:
    """For reading: 8.4 s, 2 min 05 s, 1 h 02 min."""
    if value is None:
        return ABSENT
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def clock(value: Any) -> str:
    """Unix seconds as UTC. Chains of a test may keep a time of their own, even one no calendar has."""
    if value is None:
        return ABSENT
    try:
        return datetime.fromtimestamp(float(value), UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, OSError, ValueError):
        return f"{value} s after 1970"


def score_text(micro: int | None) -> str:
    """A score is a fixed point number of millionths."""
    return "not revealed" if micro is None else f"{micro // 10**6:,}.{micro % 10**6:06d}"


def short(value: Any) -> str:
    """The two ends of a long hexadecimal value."""
    text = ABSENT if value is None else str(value)
    return text if len(text) <= 14 else f"{text[:6]}…{text[-4:]}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts miner-2 before miner-10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


# What the report says


@dataclass(frozen=True)
class Verdict:
    kind: str  # paid, refunded, failed or waiting
    title: str
    sentence: str
    reason: str


@dataclass(frozen=True)
class Accuracy:
    ratio: Fraction
    correct: int | None
    total: int | None

    def __str__(self) -> str:
        counted = f" ({self.correct:,} of {self.total:,})" if self.total else ""
        return percent(self.ratio) + counted


class Actors:
    """Names of addresses, in whatever case the address is written."""

    def __init__(self, actors: Mapping[str, str]):
        self.names = {address.lower(): name for address, name in actors.items()}

    def named(self, address: Any) -> str | None:
        return self.names.get(str(address).lower())

    def name(self, address: Any) -> str:
        return self.named(address) or short(address)

    def in_order(self, addresses: Iterable[str]) -> list[str]:
        """Each address once, by name."""
        distinct = {address.lower(): address for address in addresses if address}
        return sorted(distinct.values(), key=lambda address: (natural(self.name(address)), address.lower()))


def rows(report: Report, key: str) -> list[Any]:
    return list(report.get(key) or [])


def table(report: Report, key: str) -> dict[str, Any]:
    return dict(report.get(key) or {})


def filled(row: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """The row, with None under every key it lacks."""
    return {**dict.fromkeys(keys), **row}


def accuracy_of(round_: Mapping[str, Any]) -> Accuracy | None:
    correct, total = round_.get("correct"), round_.get("total")
    if total and correct is not None:
        return Accuracy(Fraction(correct, total), correct, total)
    ratio = as_ratio(round_.get("accuracy"))
    return None if ratio is None else Accuracy(ratio, None, None)


def final_accuracy(report: Report) -> Accuracy | None:
    """The accuracy of the model that counts, with its samples where a round of the report counted them."""
    final = as_ratio(report.get("final_accuracy"))
    if final is None:
        return None
    for round_ in reversed(rows(report, "rounds")):
        found = accuracy_of(round_)
        if found and abs(found.ratio - final) < Fraction(1, 1000):
            return found
    return Accuracy(final, None, None)


def best_accuracy(report: Report) -> Accuracy | None:
    reached = [found for found in map(accuracy_of, rows(report, "rounds")) if found]
    return max(reached, key=lambda accuracy: accuracy.ratio, default=None)


def meets(accuracy: Accuracy | None, required: Fraction | None) -> bool | None:
    return None if accuracy is None or required is None else accuracy.ratio >= required


def duration(report: Report) -> float | None:
    """From start to end; while the task is open, to the end of the last step."""
    task = table(report, "task")
    if task.get("started_s") is not None and task.get("finished_s") is not None:
        return float(task["finished_s"]) - float(task["started_s"])
    ends = [step["start_s"] + (step.get("seconds") or 0) for step in timed_steps(report)]
    return max(ends, default=None)


def timed_steps(report: Report) -> list[dict[str, Any]]:
    return [step for step in rows(report, "timeline") if step.get("start_s") is not None]


def total_gas(report: Report) -> int | None:
    entries = table(report, "gas").values()
    return sum(int(entry.get("gas") or 0) for entry in entries) if entries else None


@dataclass(frozen=True)
class Settlement:
    """Where the locked reward went, in wei. `note` says whether it adds up."""

    locked: int | None
    to_miners: int
    to_aggregator: int
    refund: int
    left: int | None
    is_balanced: bool | None  # None: nothing to compare
    note: str

    @property
    def allotted(self) -> int:
        return self.to_miners + self.to_aggregator + self.refund


def settlement(report: Report) -> Settlement:
    locked = as_wei(table(report, "task").get("reward_wei"))
    to_miners = sum(as_wei(wei) or 0 for wei in table(report, "rewards_wei").values())
    to_aggregator = as_wei(report.get("aggregator_reward_wei")) or 0
    refund = as_wei(report.get("refund_wei")) or 0
    left = as_wei(report.get("escrow_left_wei"))
    allotted = to_miners + to_aggregator + refund

    balanced: bool | None
    if locked is None:
        balanced, note = None, "The report names no reward."
    elif not allotted and not left and not rows(report, "transactions"):
        balanced, note = None, "No transaction is recorded: no reward was locked."
    elif allotted + (left or 0) == locked:
        balanced, note = True, "Every wei is accounted for: rewards, refund and rest add up to the reward."
    elif allotted == locked and left is not None and left < locked:
        balanced, note = True, f"Every wei is allotted; {exact_eth(left)} ETH of it waits to be withdrawn."
    elif allotted == locked:
        balanced, note = True, "Every wei is allotted; nothing has been withdrawn yet."
    else:
        gap = locked - allotted - (left or 0)
        balanced, note = False, f"The amounts differ from the reward by {gap:,} wei."
    return Settlement(locked, to_miners, to_aggregator, refund, left, balanced, note)


def verdict(report: Report) -> Verdict:
    """How the task ended, in one plain sentence made of its figures, and the recorded reason."""
    task = table(report, "task")
    status = str(task.get("status") or "unknown")
    money = settlement(report)
    reward = "the reward" if money.locked is None else f"the reward of {short_eth(money.locked)}"
    required = as_ratio(report.get("required_accuracy"))
    final, best = final_accuracy(report), best_accuracy(report)
    needed = "" if required is None else f", with {exact_percent(required)} required"
    reached = f"The model reached {final}{needed}. " if final else ""
    tried = f"The best round reached {best}{needed}. " if best else "No round produced a model. "
    until = f" until {clock(task['deadline_s'])}" if task.get("deadline_s") else ""

    if status == "PAID":
        paid = sum(1 for wei in table(report, "rewards_wei").values() if as_wei(wei))
        to_aggregator = f" and {short_eth(money.to_aggregator)} to the aggregator" if money.to_aggregator else ""
        payout = f"The contract pays {short_eth(money.to_miners)} to {plural(paid, 'miner')}{to_aggregator}."
        kind, title, sentence = "paid", "Paid", reached + payout
    elif status == "REFUNDED":
        back = short_eth(money.refund) if money.refund else reward
        kind, title, sentence = "refunded", "Refunded", f"{tried}{capital(back)} went back to the publisher."
    elif status == "REFUNDABLE":
        kind, title = "waiting", "Waiting for the refund"
        sentence = f"{tried}The publisher can take {reward} back once the deadline has passed" + (
            f" ({clock(task['deadline_s'])})." if task.get("deadline_s") else "."
        )
    elif status == "FAILED":
        kind, title = "failed", "Failed"
        if money.left:
            sentence = f"{tried}{short_eth(money.left)} is still in the escrow."
        elif not rows(report, "transactions"):
            sentence = "The task ended before it was published: nothing was locked, nothing was paid."
        else:
            sentence = f"{tried}No reward was paid."
    elif status == "OPEN":
        sentence = f"The task is open and waits for its cohort; {reward} stays locked{until}."
        kind, title = "waiting", "Waiting for miners"
    elif status == "TRAINING":
        kind, title = "waiting", "Waiting for training"
        done = f"{plural(len(rows(report, 'rounds')), 'round')} so far. " if report.get("rounds") else ""
        sentence = f"{done}{tried}{capital(reward)} stays locked{until}."
    elif status == "PUBLISHED":
        kind, title = "waiting", "Waiting for the payout"
        sentence = f"{reached}The block is on chain; the contract pays once accuracy and scores are revealed."
    else:
        kind, title = "waiting", f"Status {status}"
        sentence = "The report does not say how the task ended."
    return Verdict(kind, title, sentence, str(task.get("reason") or ""))


def capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def limits(report: Report) -> tuple[list[str], list[str]]:
    """What a reader can check with this page, and what stays a matter of trust."""
    task, dataset = table(report, "task"), table(report, "dataset")
    votes = rows(report, "votes")
    proves, leaves_open = [], []

    if report.get("transactions"):
        proves.append(
            "The money: each amount follows from the transactions listed here, and anybody with access to the chain "
            "can read them again by their hashes."
        )
    if report.get("opening_sha256"):
        proves.append(
            "The sum: ciphertexts are binding commitments, so the opening published under the digest above can only "
            "be the true weighted sum of what the miners signed."
        )
    if report.get("model_sha256") and votes:
        accepted = sum(1 for vote in votes if vote.get("accepted"))
        proves.append(
            f"The model: its bytes must hash to the SHA-256 above, and {plural(accepted, 'miner')} signed an "
            "accepting attestation for exactly this candidate."
        )
    proves.append(
        "The page itself proves nothing: it is a summary. The chain, the signatures and the digests are the evidence."
    )

    if report.get("rounds"):
        leaves_open += [
            "The aggregate of each round is public. Nobody alone sees a single update, but what can be inferred from "
            "the weighted sum is not hidden.",
            "Publisher and aggregator together could open single updates. The scheme assumes that they do not collude.",
        ]
    else:
        leaves_open.append("No round was run, so there is no model and no update to judge.")
    if report.get("scores"):
        leaves_open.append(
            "Scores are the miners' own figures. The commitment stops a miner from changing a score afterwards, not "
            "from claiming too much at first."
        )
    samples = dataset.get("validation_samples")
    if samples and report.get("rounds"):
        leaves_open.append(
            f"Accuracy is measured on {plural(int(samples), 'validation sample')} of the publisher; one sample is "
            f"{percent(Fraction(1, int(samples)))}. It says nothing about data unlike these."
        )
    if dataset.get("miners"):
        leaves_open.append(
            "Sample counts and histograms come from the miners' signed dataset proofs, of which the publisher opened a "
            "few samples. They do not show where the data came from."
        )
    if task.get("chain_id") in DEVELOPMENT_CHAINS:
        leaves_open.append(
            f"Chain {task['chain_id']} is a development chain: its coins have no value and its record lasts as long "
            "as that chain does."
        )
    return proves, leaves_open


# Charts: positions in percent of the width and pixels of the height, so that text keeps its size on any screen


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Mark:
    x: float  # percent
    y: float  # pixels
    round_number: int
    accuracy: Accuracy
    is_met: bool | None
    is_labelled: bool
    is_label_below: bool
    follows: bool  # the round before has a mark too, so a line joins them


@dataclass(frozen=True)
class AccuracyChart:
    height: int
    marks: list[Mark]
    columns: list[Tick]
    levels: list[Tick]
    required_y: float | None
    is_required_label_below: bool


def accuracy_chart(report: Report, height: int = 230) -> AccuracyChart | None:
    """Accuracy by round. None if no round measured one."""
    rounds = rows(report, "rounds")
    found = [accuracy_of(round_) for round_ in rounds]
    required = as_ratio(report.get("required_accuracy"))
    measured = [accuracy.ratio for accuracy in found if accuracy]
    if not measured:
        return None

    values = [*measured, required] if required is not None else measured
    step = next(step for step in (1, 2, 5, 10, 20) if (max(values) - min(values)) * 100 <= 4 * step or step == 20)
    low = max(0, int(min(values) * 100) // step * step - (step if min(values) * 100 % step == 0 else 0))
    high = min(100, -int(-max(values) * 100 // step) * step + (step if max(values) * 100 % step == 0 else 0))

    def y(ratio: Fraction) -> float:
        return round(float((high - ratio * 100) / (high - low)) * height, 1)

    def x(index: int) -> float:
        return round((index + 0.5) / len(rounds) * 100, 2)

    last = max(index for index, accuracy in enumerate(found) if accuracy)
    first = min(index for index, accuracy in enumerate(found) if accuracy)
    marks = []
    for index, accuracy in enumerate(found):
        if accuracy is None:
            continue
        is_met = meets(accuracy, required)
        marks.append(
            Mark(
                x=x(index),
                y=y(accuracy.ratio),
                round_number=rounds[index].get("round") or index + 1,
                accuracy=accuracy,
                is_met=is_met,
                is_labelled=len(rounds) <= 5 or index in (first, last),
                # Away from the requirement's line, unless that would leave the plot.
                is_label_below=is_met is False and y(accuracy.ratio) < height - 24,
                follows=index > 0 and found[index - 1] is not None,
            )
        )
    every = -(-len(rounds) // 10)  # at most ten names of rounds under the axis
    return AccuracyChart(
        height=height,
        marks=marks,
        columns=[
            Tick(x(index), str(round_.get("round") or index + 1))
            for index, round_ in enumerate(rounds)
            if index % every == 0
        ],
        levels=[Tick(y(Fraction(level, 100)), f"{level}%") for level in range(low, high + 1, step)],
        required_y=None if required is None else y(required),
        is_required_label_below=bool(required is not None and marks[0].accuracy.ratio >= required),
    )


@dataclass(frozen=True)
class Bar:
    x: float  # percent
    width: float  # percent
    module: str
    label: str
    title: str
    outcome: str


@dataclass(frozen=True)
class Lane:
    name: str
    bars: list[Bar]


@dataclass(frozen=True)
class Timeline:
    span_s: float
    lanes: list[Lane]
    ticks: list[Tick]


LANE_ORDER = {"publisher": 0, "aggregator": 1}


def timeline(report: Report) -> Timeline | None:
    """Who did what when: one lane for the modules, then one for each actor. None if no step has a time."""
    steps = sorted(timed_steps(report), key=lambda step: step["start_s"])
    if not steps:
        return None
    span = max(step["start_s"] + (step.get("seconds") or 0) for step in steps) or 1.0

    def place(start: float, end: float) -> tuple[float, float]:
        return round(start / span * 100, 3), round(max(end - start, 0) / span * 100, 3)

    phases: dict[tuple[str, int | None], tuple[float, float]] = {}
    lanes: dict[str, list[Bar]] = {}
    for step in steps:
        start, took = float(step["start_s"]), float(step.get("seconds") or 0)
        module, number = str(step.get("module") or "?"), step.get("round")
        earliest, latest = phases.get((module, number), (start, start))
        phases[module, number] = min(earliest, start), max(latest, start + took)
        outcome = str(step.get("outcome") or "ok")
        title = f"{module} {step.get('step') or ''}{f', round {number}' if number else ''}: "
        title += f"starts at {start:,.2f} s, takes {took:,.2f} s, {outcome}"
        bar = Bar(*place(start, start + took), module, "", title, outcome)
        lanes.setdefault(str(step.get("actor") or "unnamed"), []).append(bar)

    bands = []
    for (module, number), (start, end) in phases.items():
        x, width = place(start, end)
        label = f"{module} · {number}" if number and width >= 9 else module if width >= 3.5 else ""
        title = f"{module} {MODULES.get(module, '')}{f', round {number}' if number else ''}: "
        bands.append(Bar(x, width, module, label, title + f"{start:,.2f} s to {end:,.2f} s", "ok"))

    names = sorted(lanes, key=lambda name: (LANE_ORDER.get(name, 2), natural(name)))
    return Timeline(
        span_s=span,
        lanes=[Lane("modules", bands), *(Lane(name, lanes[name]) for name in names)],
        ticks=time_ticks(span),
    )


def time_ticks(span: float) -> list[Tick]:
    steps = (0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400)
    step = next((step for step in steps if span / step <= 6), span / 6)

    def label(value: float) -> str:
        if span < 120:
            return f"{value:g} s"
        minutes, rest = divmod(round(value), 60)
        return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"

    return [Tick(round(index * step / span * 100, 3), label(index * step)) for index in range(int(span / step) + 1)]


def shares(amounts: Mapping[str, int | None]) -> dict[str, Fraction | None]:
    """Each amount as a part of the sum."""
    whole = sum(amount or 0 for amount in amounts.values())
    return {
        key: None if amount is None else Fraction(amount, whole) if whole else Fraction(0)
        for key, amount in amounts.items()
    }


@dataclass(frozen=True)
class Payout:
    miner: str
    score: int | None
    has_score: bool
    score_share: Fraction | None
    reward: int | None
    reward_share: Fraction | None
    score_width: float  # percent of the widest bar of the chart
    reward_width: float


def payouts(report: Report) -> list[Payout]:
    """Score and reward of every miner the report knows, by name."""
    actors = Actors(table(report, "actors"))
    scores = {miner.lower(): score for miner, score in table(report, "scores").items()}
    rewards = {miner.lower(): as_wei(wei) for miner, wei in table(report, "rewards_wei").items()}
    listed = [row.get("miner") for row in rows(table(report, "dataset"), "miners")]
    miners = actors.in_order([*listed, *table(report, "scores"), *table(report, "rewards_wei")])
    score_shares, reward_shares = shares(scores), shares(rewards)
    widest = max((share for share in [*score_shares.values(), *reward_shares.values()] if share), default=Fraction(1))

    def width(share: Fraction | None) -> float:
        return round(float((share or 0) / widest) * 100, 2)

    return [
        Payout(
            miner=miner,
            score=scores.get(key),
            has_score=key in scores,
            score_share=score_shares.get(key),
            reward=rewards.get(key),
            reward_share=reward_shares.get(key),
            score_width=width(score_shares.get(key)),
            reward_width=width(reward_shares.get(key)),
        )
        for miner in miners
        for key in [miner.lower()]
    ]


# The page

PAGE = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGE.filters.update(
    exact_eth=exact_eth,
    short_eth=short_eth,
    percent=percent,
    exact_percent=exact_percent,
    grouped=grouped,
    seconds=seconds_text,
    duration=duration_text,
    clock=clock,
    score=score_text,
    short=short,
    plural=plural,
)


def render_html(report: Report) -> str:
    """One self-contained page: no script, no font, no address of another host is loaded."""
    actors = Actors(table(report, "actors"))
    task = filled(
        table(report, "task"),
        "id",
        "name",
        "publisher",
        "status",
        "started_s",
        "finished_s",
        "deadline_s",
        "chain_id",
        "spec_hash",
    )
    dataset = filled(table(report, "dataset"), "name", "classes", "input_shape", "validation_samples")
    rounds = rows(report, "rounds")
    votes = [filled(vote, "miner", "accepted", "reason", "signature") for vote in rows(report, "votes")]
    required = as_ratio(report.get("required_accuracy"))
    gas = {kind: filled(entry, "transactions", "gas") for kind, entry in table(report, "gas").items()}
    miners = [filled(row, "miner", "samples", "histogram", "weight") for row in rows(dataset, "miners")]
    steps = [
        filled(step, "module", "step", "actor", "round", "start_s", "seconds", "outcome", "detail")
        for step in rows(report, "timeline")
    ]
    transactions = [
        filled(sent, "kind", "sender", "gas", "transaction", "block_number", "timestamp_s")
        for sent in rows(report, "transactions")
    ]
    proves, leaves_open = limits(report)
    return PAGE.get_template("report.html.j2").render(
        absent=ABSENT,
        modules=MODULES,
        actors=actors,
        task=task,
        verdict=verdict(report),
        money=settlement(report),
        required=required,
        final=final_accuracy(report),
        best=best_accuracy(report),
        is_met=meets(final_accuracy(report), required),
        duration=duration(report),
        total_gas=total_gas(report),
        accuracy_chart=accuracy_chart(report),
        rounds=[
            {
                **filled(round_, "loss", "coordinates", "dimension", "submissions"),
                "number": round_.get("round") or index,
                "measured": accuracy_of(round_),
                "is_met": meets(accuracy_of(round_), required),
                "density": Fraction(round_["coordinates"], round_["dimension"])
                if round_.get("coordinates") is not None and round_.get("dimension")
                else None,
                "refused": [filled(row, "miner", "step", "reason") for row in round_.get("refused") or []],
                "seconds": round_.get("seconds") or {},
            }
            for index, round_ in enumerate(rounds, start=1)
        ],
        round_steps=list(dict.fromkeys(step for round_ in rounds for step in round_.get("seconds") or {})),
        payouts=payouts(report),
        aggregator=report.get("aggregator"),
        timeline=timeline(report),
        steps=sorted(steps, key=lambda step: step["start_s"] or 0.0),
        seconds_per_step=table(report, "seconds_per_step"),
        slowest=max((value or 0.0 for value in table(report, "seconds_per_step").values()), default=0.0) or 1.0,
        votes=votes,
        accepted=sum(1 for vote in votes if vote.get("accepted")),
        required_votes=report.get("required_votes"),
        transactions=transactions,
        contracts=table(task, "contracts"),
        is_development_chain=task.get("chain_id") in DEVELOPMENT_CHAINS,
        gas=sorted(gas.items(), key=lambda entry: -int(entry[1]["gas"] or 0)),
        most_gas=max((int(entry["gas"] or 0) for entry in gas.values()), default=0) or 1,
        digests=[
            ("Spec hash", "Keccak-256, on chain since M1", task.get("spec_hash")),
            ("Model", "SHA-256 of the published parameters", report.get("model_sha256")),
            ("Opening", "SHA-256 of the published sum and its blinding", report.get("opening_sha256")),
            ("Candidate", "Keccak-256, what the miners signed", report.get("candidate")),
            ("Model address", "where the artifact is kept", report.get("model_uri")),
        ],
        dataset=dataset,
        miners=sorted(miners, key=lambda row: natural(actors.name(row.get("miner")))),
        most_samples=max((count for row in miners for count in row.get("histogram") or []), default=0) or 1,
        class_count=max((len(row.get("histogram") or []) for row in miners), default=0),
        known=[(name, address) for address, name in table(report, "actors").items()],
        proves=proves,
        leaves_open=leaves_open,
    )


# The terminal

STYLES = {"paid": "bold green", "refunded": "bold yellow", "failed": "bold red", "waiting": "bold cyan"}
SIGNS = {"paid": "✓", "refunded": "↩", "failed": "✗", "waiting": "…"}
NAME_WIDTH = 20


def print_summary(report: Report, console: Console, report_path: Path) -> None:
    """The last screen of a run. `report_path`: the folder of report.json and report.html, or one of the two files."""
    actors = Actors(table(report, "actors"))
    result, money = verdict(report), settlement(report)
    task = table(report, "task")

    console.print()
    heading = Text().append_text(plain(f"{SIGNS[result.kind]} {result.title}"))
    heading.stylize(STYLES[result.kind])
    task_name = plain(str(task.get("name") or task.get("id") or "unnamed task"))
    console.print(heading.append("  ").append_text(task_name))
    console.print(plain(result.sentence))
    if result.reason:
        console.print(plain(f"Reason: {result.reason}"))

    print_rounds(report, console)
    print_payouts(report, console, actors, money)

    gas = table(report, "gas")
    if gas:
        listing = columns("Gas", ("Transactions", "right"), ("Gas", "right"), ("Each", "right"))
        for kind, entry in sorted(gas.items(), key=lambda item: -int(item[1].get("gas") or 0)):
            count, spent = int(entry.get("transactions") or 0), int(entry.get("gas") or 0)
            each = f"{spent // count:,}" if count else ABSENT
            listing.add_row(clip(kind, 30), f"{count:,}", f"{spent:,}", each)
        listing.add_row(Text("total", "bold"), "", Text(f"{total_gas(report):,}", "bold"), "")
        console.print(listing)

    seconds = table(report, "seconds_per_step")
    if seconds:
        listing = columns("Seconds", ("", "right"), "")
        slowest = max(value or 0.0 for value in seconds.values()) or 1.0
        for step, value in seconds.items():
            bar = Text("▇" * round((value or 0.0) / slowest * 24), "blue")
            listing.add_row(clip(step, 30), seconds_text(value), bar)
        took = duration(report)
        if took is not None:
            listing.add_row(Text("start to end", "bold"), Text(seconds_text(took), "bold"), "")
        console.print(listing)

    folder = report_path.parent if report_path.suffix in {".json", ".html"} else report_path
    console.print()
    for name, purpose in (("report.html", "Page"), ("report.json", "Data")):
        # A path that is broken by a line end cannot be copied.
        console.print(Text(f"{purpose}  {folder / name}"), soft_wrap=True)


def print_rounds(report: Report, console: Console) -> None:
    rounds, required = rows(report, "rounds"), as_ratio(report.get("required_accuracy"))
    if not rounds:
        console.print(Text("\nNo round was run.", "dim"))
        return
    wanted = f"{exact_percent(required)} required" if required is not None else ""
    listing = columns("Round", ("Accuracy", "right"), ("Correct", "right"), wanted, "")
    for index, round_ in enumerate(rounds, start=1):
        accuracy = accuracy_of(round_)
        number = plain(str(round_.get("round") or index))
        if accuracy is None:
            listing.add_row(number, ABSENT, ABSENT, Text("no model", "dim"), "")
            continue
        is_met = meets(accuracy, required)
        word = {True: Text("reached", "green"), False: Text("below", "yellow"), None: Text("")}[is_met]
        counted = f"{accuracy.correct}/{accuracy.total}" if accuracy.total else ABSENT
        listing.add_row(number, percent(accuracy.ratio), counted, accuracy_bar(accuracy.ratio, required), word)
    console.print(listing)


def accuracy_bar(ratio: Fraction, required: Fraction | None, width: int = 32) -> Text:
    """The accuracy from 0 to 100%, with a stroke at the requirement."""
    filled = int(ratio * width)
    bar = Text("█" * filled + "·" * (width - filled))
    bar.stylize("blue", 0, filled)
    bar.stylize("dim", filled)
    if required is None:
        return bar
    at = min(int(required * width), width - 1)
    return bar[:at].append("│", "bold").append_text(bar[at + 1 :])


def print_payouts(report: Report, console: Console, actors: Actors, money: Settlement) -> None:
    if money.locked is None and not report.get("scores"):
        return
    listing = columns("Payout", ("Score", "right"), ("ETH", "right"), "")
    for payout in payouts(report):
        if not payout.has_score and payout.reward is None:
            continue
        score = score_text(payout.score) if payout.has_score else ABSENT
        reward = ABSENT if payout.reward is None else exact_eth(payout.reward)
        listing.add_row(
            clip(actors.name(payout.miner)), score, reward, Text("▇" * round(payout.reward_width / 8), "green")
        )
    if money.to_aggregator:
        listing.add_row("aggregator's share", "", exact_eth(money.to_aggregator), "")
    if money.is_balanced is not None:
        listing.add_row("refund", "", exact_eth(money.refund), "")
        listing.add_row("left in escrow", "", ABSENT if money.left is None else exact_eth(money.left), "")
    name = "reward announced" if money.is_balanced is None else "reward locked"
    listing.add_row(Text(name, "bold"), "", ABSENT if money.locked is None else exact_eth(money.locked), "")
    console.print(listing)
    console.print(Text(money.note, "red" if money.is_balanced is False else "dim"))


Justify = Literal["left", "right"]
LEFT: Justify = "left"


def columns(*headings: str | tuple[str, Justify]) -> Table:
    listing = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", title=" ", title_style="")
    for heading in headings:
        name, justify = (heading, LEFT) if isinstance(heading, str) else heading
        listing.add_column(name, justify=justify, no_wrap=True, overflow="ellipsis")
    return listing


def plain(text: str) -> Text:
    """As it is read: a text from outside is neither markup nor a command to the terminal."""
    return Text("".join(letter if letter.isprintable() or letter == NO_BREAK_SPACE else "�" for letter in text))


def clip(name: str, width: int = NAME_WIDTH) -> Text:
    text = plain(name)
    if cell_len(name) > width:
        text.truncate(width, overflow="ellipsis")
    return text
