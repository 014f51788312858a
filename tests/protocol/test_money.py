"""Where the money goes, for every way in which a task can end; always to the wei."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount
from eth_utils import keccak

from blocks.chain import NotYet
from blocks.local_chain import GENESIS_KEYS
from contracts.bindings import Outcome, RewardClaimed, RewardCredited, Status, _create_address
from contracts.messages import AbortReason, Announcement, Cohort, Submission
from contracts.sending import Sender
from tasks import publish
from tasks.publish import DepositFailed
from tasks.records import BadRecord, give_up
from tests.protocol.world import MINERS, TASK_ID, World, task_file

REWARD = task_file().money.reward_wei
TOKEN = Path(__file__).parents[1] / "contracts" / "build" / "TestToken.json"


def credited(world: World) -> dict[str, int]:
    paid: dict[str, int] = {}
    for event in world.chain.events(TASK_ID, RewardCredited):
        paid[world.name(event.account)] = paid.get(world.name(event.account), 0) + event.amount_wei
    for claimed in world.chain.events(TASK_ID, RewardClaimed):
        paid[world.name(claimed.miner)] = paid.get(world.name(claimed.miner), 0) + claimed.amount_wei
    return paid


def nothing_is_left(world: World) -> bool:
    web3, contracts = world.chain.web3, world.contracts
    return web3.eth.get_balance(contracts.escrow.address) == 0 and web3.eth.get_balance(contracts.rewards.address) == 0


def test_everybody_is_paid_in_proportion_to_the_scores(world_after):
    world = world_after("withdraw")
    rewards, aggregator = world.contracts.rewards, world.aggregator
    members = [world.name(miner) for miner in world.contracts.publisher.get_participants(TASK_ID)]
    scores = {name: rewards.get_score(TASK_ID, position).score for position, name in enumerate(members)}
    share = REWARD // 10
    pot, parts, expected = REWARD - share, sum(scores.values()), {}
    for name in MINERS:  # the order in which they withdrew
        expected[name] = pot * scores[name] // parts
        pot, parts = pot - expected[name], parts - scores[name]
    expected[aggregator] += share
    assert min(scores.values()) > 0
    assert credited(world) == expected
    assert sum(expected.values()) == REWARD
    assert nothing_is_left(world)


def mint(world: World, deployer: LocalAccount, account: str, amount: int) -> None:
    """Deploy a token from an account's first transaction, and make somebody rich."""
    web3, build = world.chain.web3, json.loads(TOKEN.read_text())
    Sender(web3, Account.from_key(GENESIS_KEYS[0])).send(b"", to=deployer.address, value_wei=10**18)
    Sender(web3, deployer).send(bytes.fromhex(build["bytecode"][2:]), to=None)
    token = web3.eth.contract(address=_create_address(deployer.address, 0), abi=build["abi"])
    data = bytes.fromhex(token.encode_abi("mint", args=[account, amount])[2:])
    Sender(web3, deployer).send(data, to=token.address)


def test_a_reward_in_tokens_is_locked_shared_and_paid(world_after):
    deployer = Account.from_key(keccak(text="the token's deployer"))
    address = _create_address(deployer.address, 0)
    world = world_after(None, money__reward_token=address)
    mint(world, deployer, world.address("publisher"), REWARD)
    before = world.chain.web3.eth.get_balance(world.contracts.escrow.address)
    world.through("publish")
    token = world.chain.token(address)
    assert token.balance_of(world.contracts.escrow.address) == REWARD
    assert world.chain.web3.eth.get_balance(world.contracts.escrow.address) == before == 0
    world.through("withdraw", after="publish")
    held = {name: token.balance_of(world.address(name)) for name in ("publisher", *MINERS)}
    assert held == {"publisher": 0, **credited(world)}
    assert sum(held.values()) == REWARD


def test_a_publisher_without_the_tokens_makes_no_task(world_after):
    deployer = Account.from_key(keccak(text="the token's deployer"))
    world = world_after(None, money__reward_token=_create_address(deployer.address, 0))
    mint(world, deployer, world.address("publisher"), REWARD - 1)
    with pytest.raises(DepositFailed, match="ERC20InsufficientBalance"):
        world.do("publish", "publisher")
    assert world.contracts.escrow.get_task(TASK_ID).status is Status.NONE


def test_withdrawing_again_pays_nothing_more(world_after):
    world = world_after("withdraw")
    before = {name: world.balance_wei(name) for name in MINERS}
    receipts = world.everybody("withdraw")
    assert {name: world.balance_wei(name) for name in MINERS} == before
    assert sum(int(receipt.amount_wei) for receipt in receipts) == REWARD  # the first receipts, not new ones


def test_a_model_below_the_committed_accuracy_refunds_the_publisher(world_after):
    """An aggregator that proposes too weak a model: voters cannot know the requirement, the reveal shows it."""
    world = world_after("derive-key", required_accuracy=0.99)
    weaken_the_requirement_in_the_aggregators_eyes(world)
    world.through("withdraw", after="derive-key")
    assert world.contracts.rewards.get_settlement(TASK_ID).outcome is Outcome.UNMET
    assert credited(world) == {"publisher": REWARD}
    assert nothing_is_left(world)


def weaken_the_requirement_in_the_aggregators_eyes(world: World) -> None:
    from tasks import aggregate

    honest = aggregate.delivered_requirement
    try:
        aggregate.delivered_requirement = lambda st, terms: (1, "")
        world.everybody("aggregate")
    finally:
        aggregate.delivered_requirement = honest


def test_the_aggregator_reveals_for_a_silent_publisher(world_after):
    world = world_after("publish-block")
    world.do("reveal-accuracy-instead", world.aggregator)
    settlement = world.contracts.rewards.get_settlement(TASK_ID)
    assert settlement.outcome is Outcome.MET
    assert not settlement.is_share_forfeited
    world.through("withdraw", after="reveal-accuracy")
    assert sum(credited(world).values()) == REWARD
    assert nothing_is_left(world)


def test_silence_of_publisher_and_aggregator_does_not_cost_the_miners_their_pay(world_after):
    world = world_after("publish-block")
    for name in MINERS:
        world.do("reveal-score", name)
    world.everybody("withdraw")
    paid = credited(world)
    assert sum(paid.values()) == REWARD
    assert world.contracts.rewards.get_settlement(TASK_ID).is_share_forfeited
    assert nothing_is_left(world)


def test_when_nobody_reveals_a_score_the_shares_are_equal(world_after):
    world = world_after("reveal-accuracy")
    world.everybody("withdraw")
    paid, aggregator = credited(world), world.aggregator
    each = (REWARD - REWARD // 10) // len(MINERS)
    assert all(0 <= paid[name] - each < len(MINERS) for name in MINERS if name != aggregator)
    assert sum(paid.values()) == REWARD


def test_an_unrevealed_score_earns_nothing_and_blocks_nobody(world_after):
    world = world_after("reveal-accuracy")
    silent = world.others[0]
    for name in MINERS:
        if name != silent:
            world.do("reveal-score", name)
    world.everybody("withdraw")
    paid = credited(world)
    assert paid.get(silent, 0) == 0
    assert sum(paid.values()) == REWARD
    assert nothing_is_left(world)


def test_the_refund_waits_for_the_deadline(world_after):
    world = world_after("form-cohort")
    deadline_s = world.contracts.escrow.get_task(TASK_ID).terms.deadline_s
    with pytest.raises(Exception, match="DeadlineNotReached"):
        world.contracts_as("publisher").escrow.refund_publisher(TASK_ID)
    before = world.balance_wei("publisher")
    world.do("refund", "publisher")
    assert world.chain.now_s() > deadline_s
    assert world.balance_wei("publisher") > before + REWARD - 10**16  # the rest is gas
    assert world.contracts.escrow.get_task(TASK_ID).status is Status.REFUNDED
    assert nothing_is_left(world)


def test_a_task_that_ends_without_a_block_costs_a_present_aggregator_nothing(world_after):
    world = world_after("form-cohort")
    aggregator, stakes = world.aggregator, world.contracts.stakes
    before = stakes.stake_of(world.address(aggregator))
    world.do("resign", aggregator)
    world.do("refund", "publisher")
    for name in MINERS:
        world.do("compensation", name)
    assert stakes.stake_of(world.address(aggregator)) == before
    assert nothing_is_left(world)


def test_a_silent_aggregator_loses_what_the_task_announced_to_the_others(world_after):
    world = world_after("form-cohort")
    aggregator, stakes = world.aggregator, world.contracts.stakes
    others = world.others
    before = stakes.stake_of(world.address(aggregator))
    penalty = before * round(world.file.money.silence_penalty * 10**6) // 10**6
    world.do("refund", "publisher")
    receipts = {name: int(world.do("compensation", name).amount_wei) for name in MINERS}
    assert stakes.stake_of(world.address(aggregator)) == before - penalty
    assert receipts[aggregator] == 0
    assert sum(receipts.values()) == penalty
    assert {penalty // len(others)} <= {receipts[name] for name in others}
    again = {name: int(world.do("compensation", name).amount_wei) for name in MINERS}
    assert again == receipts  # the first receipts, not new payments
    assert world.chain.web3.eth.get_balance(stakes.address) == sum(stakes.stake_of(world.address(n)) for n in MINERS)


def test_compensation_asked_for_too_early_ends_nobodys_turn(world_after):
    world = world_after("publish-block")
    turn_end_s = world.contracts.stakes.get_draw(TASK_ID).turn_end_s
    for name in MINERS:
        assert int(world.do("compensation", name).amount_wei) == 0
    assert world.chain.now_s() < turn_end_s


def test_a_refund_is_paid_once(world_after):
    world = world_after("form-cohort")
    first = world.do("refund", "publisher")
    before = world.balance_wei("publisher")
    assert world.do("refund", "publisher") == first
    assert world.balance_wei("publisher") == before


def test_nobody_but_the_publisher_is_refunded(world_after):
    world = world_after("form-cohort")
    world.chain.wait_until(world.contracts.escrow.get_task(TASK_ID).terms.deadline_s + 1, "the deadline")
    with pytest.raises(Exception, match="NotPublisher"):
        world.contracts_as("miner-1").escrow.refund_publisher(TASK_ID)


def test_a_block_after_the_deadline_is_not_published_and_the_reward_goes_back(world_after):
    world = world_after("attest")
    world.chain.wait_until(world.contracts.escrow.get_task(TASK_ID).terms.deadline_s + 1, "the deadline")
    abort = world.do("publish-block", world.aggregator)
    assert abort.reason == AbortReason.DEADLINE_PASSED
    world.do("refund", "publisher")
    assert nothing_is_left(world)


def test_a_publisher_without_money_leaves_no_task_behind(world_after):
    world = world_after(None, money__reward_wei=10**20)
    with pytest.raises(DepositFailed, match="send it at least"):
        world.do("publish", "publisher")
    assert world.contracts.escrow.get_task(TASK_ID).status is Status.NONE
    assert world.registry.find_task(TASK_ID) is None
    assert world.store.list_records(world.address("publisher")) == []


def test_a_task_id_that_somebody_else_took_leaves_their_task_alone(world_after):
    world = world_after(None)
    spec = world.file.spec()
    from tasks.publish import terms_on_chain

    terms = terms_on_chain(spec, world.chain.now_s() + 3600)
    stranger = world.contracts_as("miner-1").escrow
    stranger.publish_task(TASK_ID, "0x" + "11" * 32, "0x" + "22" * 32, terms, reward_wei=5)
    with pytest.raises(DepositFailed, match="choose another"):
        world.do("publish", "publisher")
    assert world.contracts.escrow.get_task(TASK_ID).publisher == world.address("miner-1")
    assert world.registry.find_task(TASK_ID) is None


def test_publishing_twice_locks_one_reward(world_after):
    world = world_after("publish")
    before = world.balance_wei("publisher")
    first = world.do("publish", "publisher")
    assert world.do("publish", "publisher") == first
    assert world.balance_wei("publisher") == before
    assert [done.kind for done in world.chain.transactions(TASK_ID)] == ["publishTask"]


def test_terms_that_the_publisher_did_not_decide_on_are_not_paid_for(world_after):
    """The scheduler passes the terms along; it does not choose them."""
    world = world_after(None)
    world.file = task_file(money__reward_wei=9 * 10**18)
    with pytest.raises(DepositFailed, match="not those that its publisher decided on"):
        world.do("publish", "publisher")
    assert world.contracts.escrow.get_task(TASK_ID).status is Status.NONE


@pytest.mark.parametrize("what", ["reward", "largest score"])
def test_terms_with_another_escrow_behind_them_attract_no_miner(world_after, what, monkeypatch):
    """A publisher that announces one thing and locks another under the same hash."""
    world = world_after(None)
    honest = publish.terms_on_chain
    if what == "largest score":
        monkeypatch.setattr(publish, "terms_on_chain", lambda *given: replace(honest(*given), max_score=1))
        world.do("publish", "publisher")
        monkeypatch.undo()
    else:
        world.do("publish", "publisher")
        chain_says = type(world.contracts.escrow).get_task
        monkeypatch.setattr(
            type(world.contracts.escrow),
            "get_task",
            lambda escrow, task: replace(chain_says(escrow, task), reward_wei=1),
        )
    before = world.balance_wei("miner-1")
    with pytest.raises(BadRecord, match="locked on chain"):
        world.do("register", "miner-1")
    assert world.balance_wei("miner-1") == before


def test_a_round_with_fewer_miners_than_were_admitted_is_published_and_paid(world_after):
    world = world_after("submit", participants__miners_min=5)
    absent = world.others[0]
    world.forget(Submission, absent)
    world.through("withdraw", after="submit")
    paid = credited(world)
    assert absent not in paid
    assert sum(paid.values()) == REWARD


def test_an_escrow_that_a_kill_left_unannounced_is_refunded_after_the_deadline(world_after):
    world = world_after("publish")
    world.forget(Announcement, "publisher", 0)
    world.chain.wait_until(world.contracts.escrow.get_task(TASK_ID).terms.deadline_s + 1, "the deadline")
    world.do("publish", "publisher")
    world.do("refund", "publisher")
    assert nothing_is_left(world)


def test_a_distant_moment_is_not_waited_for_inside_a_step(world_after, monkeypatch):
    world = world_after("form-cohort")
    monkeypatch.setattr("blocks.local_chain.LocalChainProvider.advance_to", lambda *_: None)  # a real chain's clock
    with pytest.raises(NotYet, match="the refund is not before"):
        world.do("refund", "publisher")


def test_giving_up_twice_keeps_the_first_reason(world_after):
    world = world_after("publish")
    st = world.station("publisher")
    first = give_up(st, TASK_ID, 0, "form-cohort", AbortReason.NOT_ENOUGH_MINERS, "first")
    assert give_up(st, TASK_ID, 0, "form-cohort", AbortReason.KEY_REFUSED, "second") == first
    assert world.abort_of("publisher", 0).detail == "first"
    assert st.mine(Cohort, TASK_ID) is None
