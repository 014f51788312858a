"""Every state has an exit: the table of contracts/README.md, row by row, to the wei and to the second.

A row says who acts and who stays silent, where the money goes, and when at the latest. Each is played here on the chain:
one second before that moment the last act is refused, at that moment it is accepted, and the amounts are as the row says.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from eth_account.signers.local import LocalAccount

from contracts.bindings import Offence, TaskOnChain
from contracts.messages import Candidate, score_commit, sign
from contracts.sending import Reverted
from tests.contracts.world import ACCURACY, DELAY, PENALTY_PPM, REWARD, SALT, STAKES, TASK, World, salt_of

README = Path(__file__).parents[2] / "contracts" / "README.md"
SHARE = REWARD // 10
ROUND_ABOUT = 10**6
Payout = dict[str, int]
Act = Callable[[], object]


@dataclass(frozen=True)
class Exit:
    """What a row of the table says, and how to play it: `play` returns the last act, which takes the money out."""

    to: str
    latest: str
    play: Callable[[World], Act]


def on_chain(world: World) -> TaskOnChain:
    return world.views.escrow.get_task(TASK)


def moments(world: World) -> dict[str, int]:
    """The table's letters as seconds of chain time."""
    terms, block = on_chain(world).terms, world.views.publisher.get_block_meta(TASK)
    return {
        "D": terms.deadline_s,
        "E": world.views.stakes.get_draw(TASK).turn_end_s,
        "p": block.published_at_s if block else 0,
        "t": world.views.rewards.get_settlement(TASK).score_reveal_end_s - terms.score_reveal_window_s if block else 0,
        "Wp": terms.publisher_reveal_window_s,
        "Wa": terms.aggregator_reveal_window_s,
        "Ws": terms.score_reveal_window_s,
    }


def moment_of(world: World, latest: str) -> int:
    """A sum of the table's letters and seconds, as a second of chain time."""
    times = moments(world)
    return sum(times[term] if term in times else int(term) for term in latest.split(" + "))


# What ends a row


def refund(world: World) -> Act:
    return lambda: world.as_(world.publisher).escrow.refund_publisher(TASK)


def settle(world: World, score: int | None = None) -> Act:
    """A stranger distributes; then everybody, the publisher included, takes what it is owed.

    score: of all miners, instead of the usual ones.
    """

    def act() -> None:
        world.as_(world.stranger).rewards.distribute(TASK)
        for miner in world.cohort:
            opening = world.opening(miner, score=score)
            if world.views.rewards.claimable(TASK, opening.place.position, opening.score):
                world.as_(miner).rewards.claim_to(TASK, opening)
        for account in (world.publisher, *world.cohort):
            if world.views.rewards.balance_of(account.address):
                world.withdraw(account)

    return act


# The rows


def nobody_closes(world: World) -> Act:
    world.stage("locked")
    return refund(world)


def nobody_draws(world: World) -> Act:
    world.stage("locked").close(world.cohort)
    return refund(world)


def aggregator_is_silent(world: World) -> Act:
    world.stage("drawn")
    return refund(world)


def all_aggregators_are_silent(world: World) -> Act:
    world.stage("drawn")
    # Turns end at the deadline at the latest: 400, 800 and 1 000 seconds after the draw.
    while world.views.stakes.get_draw(TASK).turn_end_s < world.deadline:
        world.at(world.views.stakes.get_draw(TASK).turn_end_s + 1)
        world.as_(world.stranger).stakes.replace_aggregator(TASK)
    return refund(world)


def aggregator_resigns(world: World) -> Act:
    world.stage("drawn")
    world.as_(world.aggregator).stakes.resign_aggregator(TASK)
    return refund(world)


def no_quorum(world: World) -> Act:
    world.stage("drawn")
    with pytest.raises(Reverted, match="QuorumNotReached"):
        world.publish_block(voters=world.others[:2])
    return refund(world)


def publisher_reveals_unmet(world: World) -> Act:
    world.stage("drawn").publish_block(world.candidate(correct=79))
    world.reveal_accuracy()
    return settle(world)


def all_reveal(world: World) -> Act:
    world.stage("open").reveal_scores()
    return settle(world)


def some_reveal(world: World) -> Act:
    world.stage("open")
    for miner in world.cohort[1:3]:
        world.reveal_score(miner)
    return settle(world)


def all_scores_are_zero(world: World) -> Act:
    world.stage("drawn")
    zero = tuple(commitment(miner, 0) for miner in world.cohort)
    world.publish_block(world.candidate(score_commits=zero))
    world.reveal_accuracy()
    for miner in world.cohort[1:3]:
        world.reveal_score(miner, 0)
    return settle(world, score=0)


def no_miner_reveals(world: World) -> Act:
    world.stage("open")
    return settle(world)


def aggregator_reveals(world: World, accuracy_ppm: int = ACCURACY) -> None:
    world.at(moments(world)["p"] + moments(world)["Wp"] + 1)
    world.as_(world.aggregator).rewards.reveal_accuracy(TASK, accuracy_ppm, SALT)


def aggregator_reveals_met(world: World) -> Act:
    world.stage("published")
    aggregator_reveals(world)
    world.reveal_scores()
    return settle(world)


def aggregator_reveals_unmet(world: World) -> Act:
    world.stage("drawn").publish_block(world.candidate(correct=79))
    aggregator_reveals(world)
    return settle(world)


def aggregator_proves_bad_faith(world: World) -> Act:
    world.stage("empty").publish(accuracy_ppm=1_000_001)
    world.deposit(world.cohort, STAKES)
    world.close_and_draw(world.cohort)
    world.publish_block()
    aggregator_reveals(world, 1_000_001)
    world.reveal_scores()
    return settle(world)


def both_are_silent(world: World) -> Act:
    world.stage("published")
    times = moments(world)
    world.at(times["p"] + times["Wp"] + times["Wa"] + 1)
    for miner in world.cohort[1:3]:
        world.reveal_score(miner)
    return settle(world)


def everybody_is_silent(world: World) -> Act:
    world.stage("published")
    return settle(world)


def second_aggregator_publishes(world: World) -> Act:
    world.stage("drawn")
    world.at(world.views.stakes.get_draw(TASK).turn_end_s + 1)
    world.as_(world.stranger).stakes.replace_aggregator(TASK)
    world.publish_block()
    world.reveal_accuracy()
    world.reveal_scores()
    return settle(world)


def commitment(miner: LocalAccount, score: int) -> str:
    return score_commit(score, salt_of(miner), TASK, miner.address)


EXITS = {
    "L1": Exit("publisher", "D + 1", nobody_closes),
    "L2": Exit("publisher", "D + 1", nobody_draws),
    "L3": Exit("publisher", "D + 1", aggregator_is_silent),
    "L4": Exit("publisher", "D + 1", all_aggregators_are_silent),
    "L5": Exit("publisher", "D + 1", aggregator_resigns),
    "L6": Exit("publisher", "D + 1", no_quorum),
    "P1": Exit("publisher", "at once", publisher_reveals_unmet),
    "P2": Exit("share, miners by score", "at once", all_reveal),
    "P3": Exit("share, revealed by score", "t + Ws + 1", some_reveal),
    "P4": Exit("share, revealed equally", "t + Ws + 1", all_scores_are_zero),
    "P5": Exit("share, miners equally", "t + Ws + 1", no_miner_reveals),
    "P6": Exit("share, miners by score", "at once", aggregator_reveals_met),
    "P7": Exit("publisher", "at once", aggregator_reveals_unmet),
    "P8": Exit("share, miners by score", "at once", aggregator_proves_bad_faith),
    "P9": Exit("revealed by score", "p + Wp + Wa + Ws + 1", both_are_silent),
    "P10": Exit("miners equally", "p + Wp + Wa + Ws + 1", everybody_is_silent),
    "P11": Exit("share, miners by score", "at once", second_aggregator_publishes),
}


def in_order_of_claims(amount: int, parts: dict[str, int]) -> Payout:
    """The contract's rule: of what is left, in proportion to the parts that are left, rounded down."""
    paid, left = {}, sum(parts.values())
    for account, mine in parts.items():
        if mine:
            paid[account] = amount * mine // left
            amount, left = amount - paid[account], left - mine
    return paid


def expected(world: World, to: str) -> Payout:
    """The words of the table as amounts. The revealed are the second and third of the cohort where only some reveal."""
    if to == "publisher":
        return {world.publisher.address: REWARD}
    share = SHARE if to.startswith("share") else 0
    members = world.cohort[1:3] if "revealed" in to else world.cohort
    scores = world.scores()
    parts = {miner.address: 1 if "equally" in to else scores[miner.address] for miner in members}
    paid = in_order_of_claims(REWARD - share, parts)
    if share:
        paid[world.aggregator.address] = paid.get(world.aggregator.address, 0) + share
    return paid


def received(world: World, accounts: list[LocalAccount], act: Act) -> Payout:
    """What each account had more after the act, gas aside."""
    before = {one.address: world.balance(one.address) for one in accounts}
    first = world.web3.eth.block_number + 1
    act()
    gas = dict.fromkeys(before, 0)
    for number in range(first, world.web3.eth.block_number + 1):
        for sent in world.web3.eth.get_block(number, full_transactions=True)["transactions"]:
            receipt = world.web3.eth.get_transaction_receipt(sent["hash"])
            if sent["from"] in gas:
                gas[sent["from"]] += receipt["gasUsed"] * receipt["effectiveGasPrice"]
    gained = {address: world.balance(address) - was + gas[address] for address, was in before.items()}
    return {address: amount for address, amount in gained.items() if amount}


def table() -> dict[str, tuple[str, str]]:
    """Where the money goes and when at the latest, by row, as the README has it."""
    rows = re.findall(r"^\| `([LPS]\d+)` \|(.*)\|$", README.read_text(), re.MULTILINE)
    cells = {name: [cell.strip() for cell in rest.split("|")] for name, rest in rows}
    return {name: (found[-2], found[-1]) for name, found in cells.items()}


@pytest.mark.parametrize("row", EXITS)
def test_the_reward_leaves_as_the_table_says(world: World, row: str) -> None:
    found = EXITS[row]
    assert table()[row] == (found.to, found.latest)
    act = found.play(world)
    accounts = [world.publisher, *world.cohort]
    if found.latest != "at once":
        moment = moment_of(world, found.latest)
        world.at(moment - 1)
        with pytest.raises(Reverted):
            act()
        world.at(moment)
    assert received(world, accounts, act) == expected(world, found.to)
    assert world.balance(world.deployment.escrow) == world.balance(world.deployment.rewards) == 0


def others_take(world: World, culprit: LocalAccount, offence: Offence, amount: int) -> None:
    """Everybody else of the cohort gets an equal part of what was taken, the first of them what is left over."""
    others = [miner for miner in world.cohort if miner != culprit]
    for miner in others:
        world.as_(world.stranger).stakes.credit_slashed(TASK, culprit.address, offence, miner.address)
    credits = [world.views.stakes.credit_of(miner.address) for miner in others]
    part, rest = divmod(amount, len(others))
    assert credits == [part + rest, *[part] * (len(others) - 1)]
    assert sum(credits) == amount


def stake_of(world: World, miner: LocalAccount) -> int:
    return dict(zip([one.address for one in world.cohort], STAKES, strict=True))[miner.address]


def test_a_silent_aggregators_penalty_leaves_as_the_table_says(drawn: World) -> None:
    assert table()["S1"] == ("the others, equally", "E + 1")
    culprit, end = drawn.aggregator, moments(drawn)["E"]
    drawn.at(end)
    with pytest.raises(Reverted, match="TurnNotOver"):
        drawn.as_(drawn.stranger).stakes.replace_aggregator(TASK)
    drawn.at(end + 1)
    drawn.as_(drawn.stranger).stakes.replace_aggregator(TASK)
    others_take(drawn, culprit, Offence.SILENCE, stake_of(drawn, culprit) * PENALTY_PPM // ROUND_ABOUT)


def test_an_equivocators_stake_leaves_as_the_table_says(drawn: World) -> None:
    assert table()["S2"] == ("the others, equally", "at once")
    culprit = drawn.aggregator

    def signed(candidate: Candidate) -> tuple[Candidate, str]:
        return candidate, sign(candidate, drawn.domain, culprit.key)

    pair = (*signed(drawn.candidate()), *signed(drawn.candidate(correct=86)))
    drawn.as_(drawn.stranger).publisher.report_equivocation(*pair, drawn.cohort_on_chain)
    others_take(drawn, culprit, Offence.EQUIVOCATION, stake_of(drawn, culprit))


def test_a_stake_is_free_when_the_table_says(empty: World) -> None:
    assert table()["S3"] == ("its owner", "D + Wp + Wa + Ws + 1")
    empty.form(empty.cohort)
    stakes = empty.as_(empty.others[0]).stakes
    free = moment_of(empty, "D + Wp + Wa + Ws + 1")
    empty.at(free - 1)
    with pytest.raises(Reverted, match="InsufficientStake"):
        stakes.request_withdrawal(10)
    empty.at(free)
    # From there on it is the delay that every withdrawal has.
    assert stakes.request_withdrawal(10).event.withdrawable_at_s == free + DELAY
    empty.at(free + DELAY)
    assert stakes.withdraw_stake().event.amount_wei == 10


def test_the_table_has_no_row_that_is_not_played() -> None:
    assert set(table()) == {*EXITS, "S1", "S2", "S3"}
