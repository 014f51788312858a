"""What a task costs in gas, transaction by transaction: the real contracts and bindings on an in-process EVM.

Every miner of a cohort takes part, votes, reveals its own score and claims its own part; one of them is drawn as
aggregator, and withdraws its share. What happens once for all tasks (deployment, stakes) is not in a task's total; what
the first task of accounts costs more than their second is measured apart. The rare paths are measured
on tasks of their own. Gas depends on what is stored and sent, not on the machine: a second run differs by a few gas
(which bytes of hashes and signatures are zero, whom the draw falls on).
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from eth.estimators.gas import binary_gas_search
from eth_account import Account
from eth_account.signers.local import LocalAccount
from eth_tester import EthereumTester, PyEVMBackend
from eth_utils.crypto import keccak
from rich.console import Console
from web3 import EthereumTesterProvider, Web3

from contracts import bindings
from contracts.bindings import Contracts, Mined, Offence, Terms, Token
from contracts.contributions import Opening, place
from contracts.messages import (
    ZERO_ADDRESS,
    Address,
    Attestation,
    Bytes,
    Candidate,
    Domain,
    Registration,
    TaskId,
    accuracy_commit,
    score_commit,
    sign,
    struct_hash,
)
from contracts.sending import Sender
from infra.rows import Row, figure, marked, refreshed, show, table

SIZES = (5, 20, 50, 100)
RARE_SIZES = (5, 50)
# The largest totals that are thought bearable: gas of a task of 50 miners, and of its publication.
GOALS = {"total, 50 miners": "<= 7000000", "publishTask": "<= 150000"}
ONCE_A_TASK = (
    "publishTask",
    "closeRegistration",
    "drawAggregator",
    "publishBlock",
    "revealAccuracy",
    "distribute",
    "withdrawTo",
)
BY_EACH_MINER = ("revealScore", "claimTo")
FIRST_TASK = "first task of 5 miners, more than their second"
START = marked("bench-gas")
# The token is the tests': the benchmark runs from a checkout, the package has no token of its own.
TOKEN = Path(__file__).parents[1] / "tests" / "contracts" / "build" / "TestToken.json"

REWARD = 10**18
STAKE = 10**17
# What one task records of it.
RECORDED = STAKE // 10
ACCURACY_PPM = 930_000
SALT = bytes(keccak(text="salt"))
DIGEST = "0x" + keccak(text="digest").hex()
DAY = 24 * 3600
WINDOW = 3600


def account(name: str) -> LocalAccount:
    found: LocalAccount = Account.from_key(keccak(text=name))
    return found


@dataclass
class Bench:
    """A chain with the contracts and staked miners, in address order, and the gas of every transaction that was sent."""

    size: int
    spent: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.deployer, self.publisher, self.anybody = (account(name) for name in ("deployer", "publisher", "anybody"))
        self.miners = sorted(
            (account(f"miner {i}") for i in range(self.size)), key=lambda miner: int(miner.address, 16)
        )
        actors = (self.deployer, self.publisher, self.anybody, *self.miners)
        funds = {"balance": 10**24, "nonce": 0, "code": b"", "storage": {}}
        # In the first account's name the chain answers views.
        state = {
            bytes.fromhex(actor.address[2:]): funds for actor in (Account.from_key(b"\1".rjust(32, b"\0")), *actors)
        }
        self.tester = EthereumTester(PyEVMBackend(genesis_state=state))
        # One trial execution with the gas of a whole block: the limit does not change what is used.
        self.tester.backend.chain.gas_estimator = binary_gas_search(tolerance=10**8)
        self.web3 = Web3(EthereumTesterProvider(self.tester))
        self.deployment = bindings.deploy(Sender(self.web3, self.deployer))
        self.deployment_gas = sum(
            self.web3.eth.get_block(number)["gasUsed"] for number in range(1, self.web3.eth.block_number + 1)
        )
        self.domain = Domain(self.deployment.chain_id, self.deployment.publisher)
        self.views = bindings.connect(self.web3, self.deployment)
        self.fork = type(self.tester.backend.chain.get_vm()).fork
        self._bound: dict[Address, Contracts] = {}
        for miner in self.miners:
            self.note("depositStake", self.as_(miner).stakes.deposit_stake(amount_wei=STAKE))

    def as_(self, actor: LocalAccount) -> Contracts:
        if actor.address not in self._bound:
            self._bound[actor.address] = bindings.connect(self.web3, self.deployment, Sender(self.web3, actor))
        return self._bound[actor.address]

    def note(self, kind: str, mined: Mined[Any]) -> None:
        self.spent.setdefault(kind, []).append(mined.gas_used)

    def pass_time(self, seconds: int) -> None:
        self.tester.time_travel(self.web3.eth.get_block("latest")["timestamp"] + seconds)

    # A task, step by step

    def publish(self, task_id: TaskId, *, token: Address = ZERO_ADDRESS, kind: str = "publishTask") -> None:
        terms = Terms(
            deadline_s=self.web3.eth.get_block("latest")["timestamp"] + 30 * DAY,
            publish_window_s=DAY,
            publisher_reveal_window_s=WINDOW,
            aggregator_reveal_window_s=WINDOW,
            score_reveal_window_s=WINDOW,
            min_miners=3,
            max_miners=200,
            fault_rate_ppm=0,
            aggregator_share_ppm=100_000,
            silence_penalty_ppm=100_000,
            max_score=10**12,
            min_stake_wei=RECORDED,
        )
        commit = accuracy_commit(ACCURACY_PPM, SALT)
        escrow = self.as_(self.publisher).escrow
        self.note(kind, escrow.publish_task(task_id, commit, DIGEST, terms, reward_wei=REWARD, token=token))

    def application(self, task_id: TaskId, miner: LocalAccount) -> tuple[Registration, Bytes]:
        digest = keccak(text=miner.address).hex()
        registration = Registration(
            task_id=task_id,
            round_number=0,
            miner=miner.address,
            encryption_key="0x02" + digest,
            dataset_proof_sha256="0x" + digest,
            stake_wei=RECORDED,
        )
        return registration, sign(registration, self.domain, miner.key)

    def close(self, task_id: TaskId) -> None:
        applications = [self.application(task_id, miner) for miner in self.miners]
        self.note("closeRegistration", self.as_(self.publisher).stakes.close_registration(task_id, applications))
        self.tester.mine_block()

    def draw(self, task_id: TaskId) -> None:
        self.note("drawAggregator", self.as_(self.anybody).stakes.draw_aggregator(task_id))

    def aggregator(self, task_id: TaskId) -> LocalAccount:
        address = self.views.stakes.aggregator_of(task_id)
        return next(miner for miner in self.miners if miner.address == address)

    def score(self, miner: LocalAccount) -> int:
        return 10**9 + self.miners.index(miner)

    def candidate(self, task_id: TaskId, **changes: int) -> Candidate:
        """All miners take part."""
        aggregator = self.aggregator(task_id).address
        commits = (score_commit(self.score(miner), SALT, task_id, miner.address) for miner in self.miners)
        usual = Candidate(
            task_id=task_id,
            round_number=5,
            model_sha256=DIGEST,
            model_uri=f"artifact:{aggregator}/{DIGEST}",
            correct=950,
            total=1000,
            aggregator=aggregator,
            participants=tuple(miner.address for miner in self.miners),
            score_commits=tuple(commits),
            opening_sha256=DIGEST,
        )
        return usual.model_copy(update=changes)

    def publish_block(self, task_id: TaskId, candidate: Candidate) -> None:
        """With the votes of all others."""
        verdict = Attestation(
            task_id=task_id, round_number=5, candidate=struct_hash(candidate), accepted=True, reason=""
        )
        others = [miner for miner in self.miners if miner.address != candidate.aggregator]
        votes = [sign(verdict, self.domain, miner.key) for miner in others]
        publisher = self.as_(self.aggregator(task_id)).publisher
        self.note("publishBlock", publisher.publish_block(candidate, votes, self.views.stakes.get_cohort(task_id)))

    def reveal(self, task_id: TaskId) -> None:
        self.note("revealAccuracy", self.as_(self.publisher).rewards.reveal_accuracy(task_id, ACCURACY_PPM, SALT))

    def settle(self, task_id: TaskId, candidate: Candidate, *, token: Address = ZERO_ADDRESS) -> None:
        """Every miner reveals and claims for itself, the aggregator withdraws; in tokens under names of their own."""
        suffix = "" if token == ZERO_ADDRESS else ", in tokens"
        places = (place(candidate.participants, candidate.score_commits, i) for i in range(self.size))
        own = [(self.as_(miner).rewards, Opening(self.score(miner), SALT, next(places))) for miner in self.miners]
        for rewards, opening in own:
            self.note(f"revealScore{suffix}", rewards.reveal_score(task_id, opening))
        self.note(f"distribute{suffix}", self.as_(self.anybody).rewards.distribute(task_id))
        for rewards, opening in own:
            self.note(f"claimTo{suffix}", rewards.claim_to(task_id, opening, token=token))
        aggregator = self.as_(self.aggregator(task_id)).rewards
        self.note(f"withdrawTo{suffix}", aggregator.withdraw_to(token=token))


def whole_task(size: int) -> Bench:
    """One task of `size` miners from its publication to the last withdrawal."""
    bench = Bench(size)
    _run(bench, "breast-cancer-1a2b3c4d")
    left = bench.web3.eth.get_balance(bench.deployment.rewards)  # type: ignore[arg-type]
    if left:
        raise AssertionError(f"{left} wei of the reward stayed behind")
    return bench


def first_task_extra(size: int) -> int:
    """What a whole task of accounts that had none costs more than their second, in which each has its slots already."""
    bench = Bench(size)
    totals = []
    for task_id in ("breast-cancer-5e6f7a8b", "breast-cancer-6f7a8b9c"):
        bench.spent.clear()
        _run(bench, task_id)
        totals.append(sum(map(sum, bench.spent.values())))
    return totals[0] - totals[1]


def _run(bench: Bench, task_id: TaskId, *, token: Address = ZERO_ADDRESS) -> None:
    bench.publish(task_id, token=token, kind="publishTask" if token == ZERO_ADDRESS else "publishTask, in tokens")
    bench.close(task_id)
    bench.draw(task_id)
    candidate = bench.candidate(task_id)
    bench.publish_block(task_id, candidate)
    bench.reveal(task_id)
    bench.settle(task_id, candidate, token=token)


def rare_paths(size: int) -> dict[str, int]:
    """Gas of what happens when something goes wrong, and of rewards in tokens; medians where it happens often."""
    bench = Bench(size)
    usual = set(bench.spent)
    _silent_settlement(bench)
    _token_reward(bench)
    _missed_draw_and_turns(bench)
    _leave(bench)
    ordinary = {*usual, *ONCE_A_TASK, *BY_EACH_MINER, "revealScore, in tokens"}
    return {kind: int(statistics.median(spent)) for kind, spent in bench.spent.items() if kind not in ordinary}


def _missed_draw_and_turns(bench: Bench) -> None:
    """Nobody draws in time; the first aggregator signs two candidates and resigns, the second is silent."""
    task_id, stakes = "breast-cancer-2b3c4d5e", bench.as_(bench.anybody).stakes
    bench.publish(task_id)
    bench.close(task_id)
    bench.tester.mine_blocks(257)
    bench.note("moveSeed", stakes.move_seed(task_id))
    bench.tester.mine_block()
    bench.draw(task_id)
    first, cohort = bench.aggregator(task_id), bench.views.stakes.get_cohort(task_id)
    pair = [bench.candidate(task_id, correct=correct) for correct in (950, 951)]
    signed = [sign(candidate, bench.domain, first.key) for candidate in pair]
    publisher = bench.as_(bench.anybody).publisher
    bench.note("reportEquivocation", publisher.report_equivocation(pair[0], signed[0], pair[1], signed[1], cohort))
    bench.note("resignAggregator", bench.as_(first).stakes.resign_aggregator(task_id))
    bench.note("replaceAggregator, after a resignation", stakes.replace_aggregator(task_id))
    second = bench.aggregator(task_id)
    bench.pass_time(2 * DAY)
    bench.note("replaceAggregator, after silence", stakes.replace_aggregator(task_id))
    others = [miner for miner in bench.miners if miner not in (first, second)]
    for culprit, offence in ((first, Offence.EQUIVOCATION), (second, Offence.SILENCE)):
        credited = stakes.credit_slashed(task_id, culprit.address, offence, others[0].address)
        bench.note("creditSlashed, the first of an account" if culprit is first else "creditSlashed", credited)
    bench.note("withdrawCredit", bench.as_(others[0]).stakes.withdraw_credit())
    bench.pass_time(40 * DAY)
    bench.note("refundPublisher", bench.as_(bench.publisher).escrow.refund_publisher(task_id))


def _silent_settlement(bench: Bench) -> None:
    """Publisher and aggregator are silent; then nobody reveals a score either."""
    task_id, anybody = "breast-cancer-3c4d5e6f", bench.as_(bench.anybody)
    bench.publish(task_id)
    bench.close(task_id)
    bench.draw(task_id)
    bench.publish_block(task_id, bench.candidate(task_id))
    bench.pass_time(2 * WINDOW + 10)
    bench.note("openScores", anybody.rewards.open_scores(task_id))


def _token_reward(bench: Bench) -> None:
    build, task_id = json.loads(TOKEN.read_text()), "breast-cancer-4d5e6f7a"
    deployed = Sender(bench.web3, bench.deployer).send(bytes.fromhex(build["bytecode"][2:]), to=None)
    minted = bench.web3.eth.contract(abi=build["abi"]).encode_abi("mint", args=[bench.publisher.address, REWARD])
    publisher = Sender(bench.web3, bench.publisher)
    token = Token(bench.web3, deployed["contractAddress"], publisher)
    publisher.send(bytes.fromhex(minted[2:]), to=token.address)
    bench.note("approve, by the publisher", token.approve(bench.deployment.escrow, REWARD))
    _run(bench, task_id, token=token.address)


def _leave(bench: Bench) -> None:
    """A miner gets free what one task recorded while the next still holds some; later it takes its stake back."""
    miner = max(bench.miners, key=lambda miner: bench.views.stakes.stake_of(miner.address))
    stakes, first = bench.as_(miner).stakes, "breast-cancer-7a8b9cad"
    for task_id in (first, "breast-cancer-8b9cadbe"):
        bench.publish(task_id)
        bench.close(task_id)
        bench.pass_time(20 * DAY)
    bench.note("releaseStake", stakes.release_stake(first, miner.address))
    bench.pass_time(20 * DAY)
    bench.note("requestWithdrawal", stakes.request_withdrawal(STAKE))
    bench.pass_time(DAY)
    bench.note("withdrawStake", stakes.withdraw_stake())


# Figures


@dataclass(frozen=True)
class Costs:
    """Gas of one task of `size` miners by function: once a task the gas, by each miner the mean of all."""

    size: int
    gas: dict[str, int]

    @property
    def total(self) -> int:
        once = sum(self.gas[kind] for kind in ONCE_A_TASK)
        return once + self.size * sum(self.gas[kind] for kind in BY_EACH_MINER)


def costs(bench: Bench) -> Costs:
    return Costs(bench.size, {kind: round(statistics.mean(spent)) for kind, spent in bench.spent.items()})


def slopes(measured: Sequence[Costs]) -> list[Row]:
    """What one more miner costs, between neighbouring sizes; and whether that stays the same."""
    small, *_, large = measured
    middle = measured[1]
    steps = [(a, b, round((b.total - a.total) / (b.size - a.size))) for a, b in pairwise(measured)]
    rows = [Row(f"each further miner, {a.size} to {b.size}", cost, "gas") for a, b, cost in steps]
    first = (middle.total - small.total) / (middle.size - small.size)
    last = (large.total - middle.total) / (large.size - middle.size)
    name = f"each further miner, {middle.size} to {large.size} against {small.size} to {middle.size}"
    return [*rows, Row(name, 100 * abs(last / first - 1), "% apart", "<= 10")]


def rows_of(benches: Sequence[Bench], first_extra: int, rare: dict[int, dict[str, int]]) -> list[Row]:
    measured = [costs(bench) for bench in benches]
    rows = [Row("deployment", benches[0].deployment_gas, "gas")]
    rows += [Row("depositStake", measured[0].gas["depositStake"], "gas")]
    rows += [Row(FIRST_TASK, first_extra, "gas")]
    rows += [Row("publishTask", measured[0].gas["publishTask"], "gas", GOALS["publishTask"])]
    for each in measured:
        rows += [Row(f"{kind}, {each.size} miners", each.gas[kind], "gas") for kind in (*ONCE_A_TASK, *BY_EACH_MINER)]
        rows += [_with_goal(f"total, {each.size} miners", each.total)]
        rows += [Row(f"total a miner, {each.size} miners", round(each.total / each.size), "gas")]
    rows += slopes(measured)
    return rows + [Row(f"{kind}, {size} miners", gas, "gas") for size in rare for kind, gas in rare[size].items()]


def _with_goal(name: str, gas: int) -> Row:
    return Row(name, gas, "gas", GOALS.get(name))


def report(rows: Iterable[Row], fork: str) -> str:
    """The figures in markdown: one table by function and size, one of the rare paths, and the goals."""
    by_name = {row.name: row for row in rows}

    def line(kind: str, sizes: Iterable[int], name: str | None = None) -> tuple[str, ...]:
        found = (by_name[f"{kind}, {size} miners"].value for size in sizes)
        return (name or f"`{kind}`", *map(figure, found))

    usual = [line(kind, SIZES) for kind in ONCE_A_TASK]
    usual += [line(kind, SIZES, f"`{kind}`, by each miner") for kind in BY_EACH_MINER]
    usual += [line("total", SIZES, "**a whole task**"), line("total a miner", SIZES, "a whole task, a miner")]
    suffix = f", {RARE_SIZES[0]} miners"
    paths = [name.removesuffix(suffix) for name in by_name if name.endswith(suffix)]
    seldom = [line(kind, RARE_SIZES, kind) for kind in paths if f"{kind}, {RARE_SIZES[1]} miners" in by_name]
    known = {*ONCE_A_TASK, *BY_EACH_MINER, "total", "total a miner"}
    slope = [row for row in by_name.values() if row.name.startswith("each further miner")]
    further = "; ".join(
        f"{row.name.removeprefix('each further miner, ')}: {figure(row.value)} {row.unit}" for row in slope
    )
    return "\n\n".join(
        [
            f"Rules of the {fork} fork; {datetime.now(UTC):%Y-%m-%d}. Once for all tasks: deployment of the four "
            f"{figure(by_name['deployment'].value)}, `depositStake` {figure(by_name['depositStake'].value)}. "
            f"The {FIRST_TASK}: {figure(by_name[FIRST_TASK].value)}.",
            table(("function", *(f"{size} miners" for size in SIZES)), usual),
            f"Each further miner, {further}.",
            table(
                ("seldom", *(f"{size} miners" for size in RARE_SIZES)), [row for row in seldom if row[0] not in known]
            ),
        ]
    )


def run(out: Path, console: Console, *, document: Path | None = None) -> list[Row]:
    """Measure, print the table, write `out`; with a document, write its block of figures again."""
    benches, rare = [], {}
    for size in SIZES:
        with console.status(f"a task of {size} miners"):
            benches.append(whole_task(size))
    for size in RARE_SIZES:
        with console.status(f"what is rare, {size} miners"):
            rare[size] = rare_paths(size)
    with console.status("a first task and a second"):
        first_extra = first_task_extra(SIZES[0])
    rows = rows_of(benches, first_extra, rare)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([row.record() for row in rows], indent=1))
    show(rows, console)
    fork = benches[0].fork
    console.print(f"rules of the {fork} fork, in-process EVM")
    if document is not None:
        document.write_text(refreshed(document.read_text(), START, report(rows, fork)))
    return rows
