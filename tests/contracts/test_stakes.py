"""StakeRegistry: deposits and withdrawals, the cohort of signed applications, the draw and the turns that follow.

Slashing for two signed candidates is in test_publisher.
"""

import random
from collections.abc import Sequence

import pytest
from eth_utils import keccak

from contracts.bindings import ZERO_ADDRESS, CohortOnChain, Draw, Hold, Offence, Slash, StakeSlashed, Status, Withdrawal
from contracts.messages import Domain, Registration, draw_seed, struct_hash, type_string
from contracts.sending import Reverted
from tests.contracts.world import (
    AGGREGATOR_WINDOW,
    DELAY,
    PENALTY_PPM,
    PUBLISH_WINDOW,
    PUBLISHER_WINDOW,
    SCORE_WINDOW,
    STAKES,
    TASK,
    World,
    named,
    number,
)


def recomputed_draw(seed: bytes, miners: Sequence[str], stakes: Sequence[int]) -> str:
    """The draw as anybody would do it: the stakes laid end to end in address order, and where seed mod total falls."""
    owners = [
        miner
        for miner, stake in sorted(zip(miners, stakes, strict=True), key=lambda m: number(m[0]))
        for _ in range(stake)
    ]
    return owners[int.from_bytes(seed, "big") % len(owners)]


# Stakes


def test_deposits_add_up(empty: World) -> None:
    miner = empty.miners[0]
    stakes = empty.as_(miner).stakes
    assert stakes.deposit_stake(amount_wei=7).event.stake_wei == 7
    assert stakes.deposit_stake(amount_wei=5).event.stake_wei == 12
    assert stakes.stake_of(miner.address) == stakes.available_stake(miner.address) == 12
    assert empty.balance(empty.deployment.stakes) == 12


def test_a_deposit_of_nothing_is_refused(empty: World) -> None:
    with pytest.raises(Reverted, match="ZeroAmount"):
        empty.as_(empty.miners[0]).stakes.deposit_stake(amount_wei=0)


def test_a_stake_fits_in_88_bits(empty: World) -> None:
    stakes = empty.as_(empty.miners[0]).stakes
    stakes.deposit_stake(amount_wei=2**88 - 1)
    with pytest.raises(Reverted, match="SafeCastOverflowedUintDowncast") as refused:
        stakes.deposit_stake(amount_wei=1)
    assert refused.value.arguments == (88, 2**88)


def test_a_requested_withdrawal_is_paid_after_the_delay(empty: World) -> None:
    miner = empty.miners[0]
    stakes = empty.as_(miner).stakes
    stakes.deposit_stake(amount_wei=10)
    withdrawable_at = stakes.request_withdrawal(4).event.withdrawable_at_s
    assert withdrawable_at == empty.now() + DELAY
    assert stakes.get_withdrawal(miner.address) == Withdrawal(4, withdrawable_at)
    # It has left the stake, and waits.
    assert stakes.stake_of(miner.address) == stakes.available_stake(miner.address) == 6
    assert empty.balance(empty.deployment.stakes) == 10
    empty.at(withdrawable_at - 1)
    with pytest.raises(Reverted, match="WithdrawalTooEarly"):
        stakes.withdraw_stake()
    empty.at(withdrawable_at)
    assert stakes.withdraw_stake().event.amount_wei == 4
    assert stakes.stake_of(miner.address) == stakes.available_stake(miner.address) == 6
    assert empty.balance(empty.deployment.stakes) == 6
    with pytest.raises(Reverted, match="NothingToWithdraw"):
        stakes.withdraw_stake()


def test_a_request_replaces_the_one_before_and_zero_cancels(empty: World) -> None:
    miner = empty.miners[0]
    stakes = empty.as_(miner).stakes
    stakes.deposit_stake(amount_wei=10)
    stakes.request_withdrawal(4)
    stakes.request_withdrawal(10)
    assert stakes.stake_of(miner.address) == 0
    with pytest.raises(Reverted, match="InsufficientStake") as refused:
        stakes.request_withdrawal(11)
    assert refused.value.arguments == (miner.address, 10, 11)
    stakes.request_withdrawal(0)
    assert stakes.stake_of(miner.address) == stakes.available_stake(miner.address) == 10
    empty.at(empty.now() + 2 * DELAY)
    with pytest.raises(Reverted, match="NothingToWithdraw"):
        stakes.withdraw_stake()


def test_no_more_than_the_stake_is_withdrawn(empty: World) -> None:
    stakes = empty.as_(empty.miners[0]).stakes
    stakes.deposit_stake(amount_wei=10)
    with pytest.raises(Reverted, match="InsufficientStake") as refused:
        stakes.request_withdrawal(11)
    assert refused.value.arguments == (empty.miners[0].address, 10, 11)


def test_a_stake_is_withdrawn_where_its_owner_says(empty: World) -> None:
    stakes, elsewhere = empty.as_(empty.miners[0]).stakes, "0x" + "5" * 40
    stakes.deposit_stake(amount_wei=10)
    stakes.request_withdrawal(10)
    empty.at(empty.now() + DELAY + 1)
    with pytest.raises(Reverted, match="InvalidRecipient"):
        stakes.withdraw_stake(ZERO_ADDRESS)
    assert stakes.withdraw_stake(elsewhere).event.recipient == elsewhere
    assert empty.balance(elsewhere) == 10


# Holds


def latest_end(world: World, task_id: str = TASK) -> int:
    """The last second in which anything about a task can matter."""
    terms = world.views.escrow.get_task(task_id).terms
    return terms.deadline_s + PUBLISHER_WINDOW + AGGREGATOR_WINDOW + SCORE_WINDOW


def another(world: World, task_id: str = "another", *, stake: int = 15, **terms: int) -> None:
    """A task of the same cohort that records this much more of everybody's stake."""
    world.publish(task_id, **terms)
    world.deposit(world.cohort, [stake] * 4)
    applications = [world.application(miner, task_id, stake_wei=stake) for miner in world.cohort]
    world.as_(world.publisher).stakes.close_registration(task_id, applications)


def test_an_application_holds_no_stake(locked: World) -> None:
    """A miner is free until it is chosen."""
    miner = locked.cohort[0]
    locked.application(miner)
    locked.as_(miner).stakes.request_withdrawal(40)
    locked.at(locked.now() + DELAY + 1)
    assert locked.as_(miner).stakes.withdraw_stake().event.amount_wei == 40


def test_a_recorded_stake_is_held_until_the_latest_end(drawn: World) -> None:
    miner, end = drawn.cohort[0], latest_end(drawn)
    stakes = drawn.as_(miner).stakes
    assert stakes.get_hold(miner.address) == Hold(40, end)
    assert (stakes.stake_of(miner.address), stakes.available_stake(miner.address)) == (40, 0)
    drawn.at(end)
    with pytest.raises(Reverted, match="InsufficientStake") as refused:
        stakes.request_withdrawal(1)
    assert refused.value.arguments == (miner.address, 0, 1)
    drawn.at(end + 1)
    stakes.request_withdrawal(40)
    assert stakes.get_hold(miner.address) == Hold(0, end)


def test_what_is_not_recorded_stays_free(drawn: World) -> None:
    miner = drawn.cohort[0]
    stakes = drawn.as_(miner).stakes
    stakes.deposit_stake(amount_wei=5)
    assert stakes.available_stake(miner.address) == 5
    with pytest.raises(Reverted, match="InsufficientStake") as refused:
        stakes.request_withdrawal(6)
    assert refused.value.arguments == (miner.address, 5, 6)
    stakes.request_withdrawal(5)
    assert (stakes.stake_of(miner.address), stakes.available_stake(miner.address)) == (40, 0)


def test_a_stake_backs_one_task(drawn: World) -> None:
    """What one task recorded, another can neither record nor take."""
    drawn.publish("another")
    drawn.deposit(drawn.cohort, [15] * 4)
    applications = [drawn.application(miner, "another") for miner in drawn.cohort]
    applications[0] = drawn.application(drawn.cohort[0], "another", stake_wei=16)
    stakes = drawn.as_(drawn.publisher).stakes
    with pytest.raises(Reverted, match="InsufficientStake") as refused:
        stakes.close_registration("another", applications)
    assert refused.value.arguments == (drawn.cohort[0].address, 15, 16)
    applications[0] = drawn.application(drawn.cohort[0], "another")
    stakes.close_registration("another", applications)
    assert stakes.get_cohort("another").stakes_wei == (15,) * 4
    assert [stakes.get_hold(miner.address).recorded_wei for miner in drawn.cohort] == [55, 25, 45, 35]
    assert all(stakes.available_stake(miner.address) == 0 for miner in drawn.cohort)


def test_the_longest_task_holds_all(drawn: World) -> None:
    end = latest_end(drawn)
    another(drawn, deadline_s=drawn.deadline + 500)
    assert {drawn.views.stakes.get_hold(miner.address).held_until_s for miner in drawn.cohort} == {end + 500}
    another(drawn, "shorter", deadline_s=drawn.deadline - 500)
    assert drawn.views.stakes.get_hold(drawn.cohort[0].address) == Hold(70, end + 500)
    drawn.at(end + 1)
    drawn.tester.mine_block()
    assert drawn.views.stakes.available_stake(drawn.cohort[0].address) == 0
    drawn.at(end + 501)
    drawn.tester.mine_block()
    assert drawn.views.stakes.available_stake(drawn.cohort[0].address) == 70


# Releases


def test_a_finished_task_gives_back_what_it_recorded_while_another_holds(drawn: World) -> None:
    another(drawn, deadline_s=drawn.deadline + 5000)
    miner, end, anyone = drawn.cohort[0], latest_end(drawn), drawn.as_(drawn.stranger).stakes
    drawn.at(end)
    with pytest.raises(Reverted, match="StakeHeld") as refused:
        anyone.release_stake(TASK, miner.address)
    assert refused.value.arguments == (end, end)
    drawn.at(end + 1)
    event = anyone.release_stake(TASK, miner.address).event
    assert (event.miner, event.amount_wei) == (miner.address, 40)
    assert anyone.get_hold(miner.address) == Hold(15, end + 5000)
    stakes = drawn.as_(miner).stakes
    with pytest.raises(Reverted, match="InsufficientStake") as refused:
        stakes.request_withdrawal(41)
    assert refused.value.arguments == (miner.address, 40, 41)
    stakes.request_withdrawal(40)
    with pytest.raises(Reverted, match="StakeHeld"):
        anyone.release_stake("another", miner.address)


def test_a_stake_is_released_once(drawn: World) -> None:
    another(drawn, deadline_s=drawn.deadline + 5000, stake=100)
    miner, anyone = drawn.cohort[0], drawn.as_(drawn.stranger).stakes
    drawn.at(latest_end(drawn) + 1)
    anyone.release_stake(TASK, miner.address)
    with pytest.raises(Reverted, match="NotEntitled") as refused:
        anyone.release_stake(TASK, miner.address)
    assert refused.value.arguments == (TASK, 0)
    assert anyone.get_hold(miner.address).recorded_wei == 100
    # Each member has its own release.
    assert anyone.release_stake(TASK, drawn.cohort[1].address).event.amount_wei == 10


def test_a_release_frees_nothing_that_a_later_task_recorded(drawn: World) -> None:
    """When nothing was held in between, the old task's stake is free already, and may be in the new task's."""
    miner, anyone = drawn.cohort[0], drawn.as_(drawn.stranger).stakes
    drawn.at(latest_end(drawn) + 1)
    drawn.publish("later")
    pairs = zip(drawn.cohort, STAKES, strict=True)
    applications = [drawn.application(one, "later", stake_wei=stake) for one, stake in pairs]
    drawn.as_(drawn.publisher).stakes.close_registration("later", applications)
    with pytest.raises(Reverted, match="NotEntitled") as refused:
        anyone.release_stake(TASK, miner.address)
    assert refused.value.arguments == (TASK, 0)
    assert anyone.get_hold(miner.address).recorded_wei == 40
    assert anyone.available_stake(miner.address) == 0
    # Nor after a third task prolonged the hold; only what the second recorded is released then.
    another(drawn, "third", deadline_s=latest_end(drawn, "later") + 5000)
    drawn.at(latest_end(drawn, "later") + 1)
    with pytest.raises(Reverted, match="NotEntitled"):
        anyone.release_stake(TASK, miner.address)
    assert anyone.release_stake("later", miner.address).event.amount_wei == 40
    assert anyone.get_hold(miner.address).recorded_wei == 15


def test_a_task_that_begins_in_the_last_second_of_a_hold_prolongs_it(drawn: World) -> None:
    """Then the old record still counts, and its release frees it; a second later it would not."""
    miner, end = drawn.cohort[0], latest_end(drawn)
    drawn.at(end - 6)
    drawn.publish("next", deadline_s=end + 5000)
    drawn.deposit(drawn.cohort, [15] * 4)
    applications = [drawn.application(one, "next", stake_wei=15) for one in drawn.cohort]
    drawn.at(end)
    drawn.as_(drawn.publisher).stakes.close_registration("next", applications)
    assert drawn.views.stakes.get_hold(miner.address).recorded_wei == 55
    assert drawn.as_(drawn.stranger).stakes.release_stake(TASK, miner.address).event.amount_wei == 40
    assert drawn.views.stakes.get_hold(miner.address).recorded_wei == 15


def test_what_silence_cost_is_not_released(drawn: World) -> None:
    another(drawn, deadline_s=drawn.deadline + 5000)
    former, anyone = drawn.aggregator, drawn.as_(drawn.stranger).stakes
    recorded = STAKES[drawn.cohort.index(former)]
    penalty = recorded * PENALTY_PPM // 1_000_000
    drawn.at(anyone.get_draw(TASK).turn_end_s + 1)
    anyone.replace_aggregator(TASK)
    assert anyone.get_hold(former.address).recorded_wei == recorded + 15 - penalty
    drawn.at(latest_end(drawn) + 1)
    assert anyone.release_stake(TASK, former.address).event.amount_wei == recorded - penalty
    assert anyone.get_hold(former.address).recorded_wei == 15
    assert anyone.available_stake(former.address) == recorded - penalty


def test_nothing_is_released_that_is_free_or_was_never_recorded(drawn: World) -> None:
    anyone, words = drawn.as_(drawn.stranger).stakes, list(drawn.cohort_on_chain.words)
    drawn.at(latest_end(drawn) + 1)
    # The tester names a refusal as of the last block.
    drawn.tester.mine_block()
    # No task holds anything: all is available.
    for position in (0, 4):
        with pytest.raises(Reverted, match="NotEntitled") as refused:
            anyone._transact(object, "releaseStake", TASK, words, position)
        assert refused.value.arguments == (TASK, position)
    for task_id, brought in ((TASK, words[:3]), ("nobody-knows", []), ("nobody-knows", words)):
        with pytest.raises(Reverted, match="WrongCohort"):
            anyone._transact(object, "releaseStake", task_id, brought, 0)
    with pytest.raises(ValueError, match=f"{drawn.miners[4].address} is not in the cohort of {TASK}"):
        anyone.release_stake(TASK, drawn.miners[4].address)


# The cohort


def test_the_type_hash_is_that_of_the_message(world: World) -> None:
    assert world.views.stakes.registration_typehash() == "0x" + keccak(text=type_string(Registration)).hex()


def word(address: str, stake: int) -> str:
    """A member of a cohort as the contracts have it."""
    return f"0x{number(address) << 96 | stake:064x}"


def test_closing_records_the_cohort_and_its_stakes(locked: World) -> None:
    chosen = tuple(miner.address for miner in locked.cohort)
    assert locked.views.stakes.get_cohort(TASK) == CohortOnChain()
    registrations = tuple(struct_hash(locked.application(miner)[0]) for miner in locked.cohort)
    closed = locked.close(locked.cohort)
    words = tuple(map(word, chosen, STAKES))
    assert (closed.event.cohort, closed.event.registrations) == (words, registrations)
    assert closed.event.seed_block == closed.block_number + 1
    assert locked.views.stakes.get_cohort(TASK) == CohortOnChain(chosen, STAKES, registrations, words)
    packed = b"".join(bytes.fromhex(member[2:]) for member in words)
    assert locked.views.stakes.get_draw(TASK) == Draw(
        closed.event.seed_block, "0x" + "00" * 32, "0x" + keccak(packed).hex(), 0, 0
    )
    locked.as_(locked.cohort[0]).stakes.deposit_stake(amount_wei=1000)
    assert locked.views.stakes.get_cohort(TASK).stakes_wei == STAKES


@pytest.mark.parametrize(
    "changes",
    [
        {"task_id": "another-task"},
        {"round_number": 1},
        {"encryption_key": "0x03" + "ab" * 32},
        {"dataset_proof_sha256": "0x" + "ab" * 32},
        {"stake_wei": 29},
    ],
)
def test_an_application_is_signed_for_exactly_what_it_says(locked: World, changes: dict) -> None:
    applications = [locked.application(miner) for miner in locked.cohort]
    registration, _ = applications[2]
    _, other = locked.application(locked.cohort[2], **changes)
    applications[2] = registration, other
    stakes = locked.as_(locked.publisher).stakes
    with pytest.raises(Reverted, match="InvalidApplication") as refused:
        stakes.close_registration(TASK, applications)
    assert refused.value.arguments == (2, locked.cohort[2].address)


def test_nobody_applies_for_another_or_elsewhere(locked: World) -> None:
    usual = [locked.application(miner) for miner in locked.cohort]
    domain, first = locked.domain, locked.cohort[0]
    foreign = [
        Domain(domain.chain_id + 1, domain.verifying_contract),
        Domain(domain.chain_id, locked.deployment.stakes),
    ]
    wrong = [
        (usual[0][0], usual[1][1]),
        (usual[0][0], "0x" + "00" * 64 + "1b"),
        *(locked.application(first, TASK, domain) for domain in foreign),
    ]
    for application in wrong:
        with pytest.raises(Reverted, match="InvalidApplication") as refused:
            locked.as_(locked.publisher).stakes.close_registration(TASK, [application, *usual[1:]])
        assert refused.value.arguments == (0, first.address)
    locked.as_(locked.publisher).stakes.close_registration(TASK, usual)


def test_a_miner_signs_how_much_it_puts_behind_a_task(locked: World) -> None:
    signed = (25, 10, 11, 20)
    applications = [
        locked.application(miner, stake_wei=stake) for miner, stake in zip(locked.cohort, signed, strict=True)
    ]
    stakes = locked.as_(locked.publisher).stakes
    stakes.close_registration(TASK, applications)
    assert stakes.get_cohort(TASK).stakes_wei == signed
    assert [stakes.available_stake(miner.address) for miner in locked.cohort] == [15, 0, 19, 0]


@pytest.mark.parametrize(("signed", "is_enough"), [(9, False), (10, True), (40, True), (41, False)])
def test_what_is_signed_is_at_least_the_minimum_and_at_most_there(locked: World, signed: int, is_enough: bool) -> None:
    first, *rest = locked.cohort
    applications = [locked.application(first, stake_wei=signed), *map(locked.application, rest)]
    stakes = locked.as_(locked.publisher).stakes
    if is_enough:
        stakes.close_registration(TASK, applications)
        return
    with pytest.raises(Reverted, match="InsufficientStake") as refused:
        stakes.close_registration(TASK, applications)
    assert refused.value.arguments == ((first.address, 9, 10) if signed == 9 else (first.address, 40, 41))


def test_stake_below_the_minimum_is_not_chosen(locked: World) -> None:
    poor = locked.miners[5]
    assert locked.views.stakes.stake_of(poor.address) == 5
    with pytest.raises(Reverted, match="InsufficientStake") as refused:
        locked.close([*locked.miners[:3], poor])
    assert refused.value.arguments == (poor.address, 5, 10)


def test_stake_about_to_be_withdrawn_does_not_count(locked: World) -> None:
    applications = [locked.application(miner) for miner in locked.cohort]
    locked.as_(locked.cohort[1]).stakes.request_withdrawal(1)
    with pytest.raises(Reverted, match="InsufficientStake") as refused:
        locked.as_(locked.publisher).stakes.close_registration(TASK, applications)
    assert refused.value.arguments == (locked.cohort[1].address, 9, 10)
    locked.as_(locked.cohort[0]).stakes.request_withdrawal(30)
    locked.as_(locked.cohort[1]).stakes.request_withdrawal(0)
    locked.close(locked.cohort)
    assert locked.views.stakes.get_cohort(TASK).stakes_wei == (10, *STAKES[1:])


def test_the_publisher_is_not_its_own_miner(locked: World) -> None:
    locked.as_(locked.publisher).stakes.deposit_stake(amount_wei=100)
    with pytest.raises(Reverted, match="PublisherCannotMine") as refused:
        locked.close(sorted([*locked.cohort, locked.publisher], key=lambda account: number(account.address)))
    assert refused.value.arguments == (TASK, locked.publisher.address)


def test_an_unknown_task_has_no_cohort(locked: World) -> None:
    with pytest.raises(Reverted, match="WrongStatus") as refused:
        locked.close(locked.cohort, "nobody-knows")
    assert refused.value.arguments == ("nobody-knows", Status.NONE)


def test_only_the_publisher_closes_registration(locked: World) -> None:
    applications = [locked.application(miner) for miner in locked.cohort]
    with pytest.raises(Reverted, match="NotPublisher"):
        locked.as_(locked.cohort[0]).stakes.close_registration(TASK, applications)


def test_registration_is_closed_once(drawn: World) -> None:
    with pytest.raises(Reverted, match="RegistrationIsClosed"):
        drawn.close(drawn.cohort)


def test_no_cohort_after_the_deadline(locked: World) -> None:
    locked.at(locked.deadline + 1)
    with pytest.raises(Reverted, match="DeadlinePast"):
        locked.close(locked.cohort)


def test_a_cohort_has_a_size_within_the_terms(locked: World) -> None:
    for count in (2, 7, 0):
        with pytest.raises(Reverted, match="CohortSize") as refused:
            locked.close(locked.miners[:count])
        assert refused.value.arguments == (count, 3, 6)
    locked.close(locked.miners[:3])


def test_a_cohort_ascends_strictly(locked: World) -> None:
    a, b, c, d = locked.cohort
    for cohort, index in [([a, c, b, d], 2), ([a, b, b, c], 2), ([d, c, b, a], 1)]:
        with pytest.raises(Reverted, match="NotAscending") as refused:
            locked.close(cohort)
        assert refused.value.arguments == (index, cohort[index].address)
    locked.close([a, b, c, d])


def test_a_cohort_without_any_stake_cannot_be_drawn_from(empty: World) -> None:
    empty.publish(min_stake_wei=0)
    with pytest.raises(Reverted, match="CohortWithoutStake") as refused:
        empty.close(empty.cohort)
    assert refused.value.arguments == (TASK,)
    # One wei in the cohort is enough, and draws its owner.
    empty.deposit(empty.cohort[2:3], [1])
    empty.close_and_draw(empty.cohort)
    assert empty.aggregator == empty.cohort[2]


@pytest.mark.parametrize("what", ["stake", "order", "missing", "more", "none"])
def test_a_call_brings_exactly_the_cohort_along(locked: World, what: str) -> None:
    locked.close(locked.cohort)
    # One more than needed: the tester names a refusal as of the last block, not of the next.
    locked.tester.mine_blocks(2)
    words = list(locked.cohort_on_chain.words)
    brought = {
        "stake": [*words[:3], word(locked.cohort[3].address, 21)],
        "order": words[::-1],
        "missing": words[:3],
        "more": [*words, word(locked.miners[4].address, 50)],
        "none": [],
    }[what]
    with pytest.raises(Reverted, match="WrongCohort") as refused:
        locked.as_(locked.stranger).stakes._transact(object, "drawAggregator", TASK, brought)
    assert refused.value.arguments == (TASK,)


# The draw


def test_the_draw_is_what_anybody_recomputes(drawn: World) -> None:
    stakes = drawn.views.stakes
    draw = stakes.get_draw(TASK)
    block_hash = bytes(drawn.web3.eth.get_block(draw.seed_block)["hash"])
    assert draw.seed == "0x" + draw_seed(TASK, block_hash).hex()
    assert (draw.replaced, draw.turn_end_s) == (0, drawn.now() + PUBLISH_WINDOW)
    cohort = stakes.get_cohort(TASK)
    expected = recomputed_draw(bytes.fromhex(draw.seed[2:]), cohort.miners, cohort.stakes_wei)
    assert stakes.aggregator_of(TASK) == expected


def test_many_draws_follow_the_recomputation(locked: World) -> None:
    """One stake table, many tasks: each has its own seed."""
    winners = set()
    for i in range(6):
        task = f"task-{i}"
        locked.publish(task, reward=1)
        if i:
            locked.deposit(locked.cohort, STAKES)
        locked.close(locked.cohort, task)
        locked.tester.mine_block()
        event = locked.as_(locked.stranger).stakes.draw_aggregator(task).event
        seed = keccak(task.encode() + bytes(locked.web3.eth.get_block(event.seed_block)["hash"]))
        assert event.seed == "0x" + seed.hex()
        assert event.aggregator == recomputed_draw(seed, [m.address for m in locked.cohort], STAKES)
        winners.add(event.aggregator)
    assert len(winners) > 1


def test_the_recomputed_draw_is_proportional_to_stake() -> None:
    miners = [f"0x{i:040x}" for i in range(1, 5)]
    generator = random.Random(1)
    draws = [recomputed_draw(generator.randbytes(32), miners, STAKES) for _ in range(20_000)]
    for miner, stake in zip(miners, STAKES, strict=True):
        # Five standard deviations of a binomial share.
        share = stake / sum(STAKES)
        assert abs(draws.count(miner) / 20_000 - share) < 5 * (share * (1 - share) / 20_000) ** 0.5


def test_no_draw_while_registration_is_open(locked: World) -> None:
    assert locked.views.stakes.aggregator_of(TASK) is None
    with pytest.raises(Reverted, match="RegistrationIsOpen"):
        locked.as_(locked.stranger).stakes.draw_aggregator(TASK)
    with pytest.raises(Reverted, match="RegistrationIsOpen"):
        locked.as_(locked.stranger).stakes.move_seed(TASK)


def test_no_draw_before_the_seed_block_is_mined(locked: World) -> None:
    closed = locked.close(locked.cohort)
    with pytest.raises(Reverted, match="SeedNotMined") as refused:
        locked.as_(locked.stranger).stakes.draw_aggregator(TASK)
    assert refused.value.arguments == (closed.event.seed_block, closed.event.seed_block)
    with pytest.raises(Reverted, match="SeedNotMined"):
        locked.as_(locked.stranger).stakes.move_seed(TASK)
    locked.tester.mine_block()
    assert locked.as_(locked.stranger).stakes.draw_aggregator(TASK).event.seed_block == closed.block_number + 1


def test_the_aggregator_is_drawn_once(drawn: World) -> None:
    with pytest.raises(Reverted, match="AlreadyDrawn") as refused:
        drawn.as_(drawn.stranger).stakes.draw_aggregator(TASK)
    assert refused.value.arguments == (TASK,)
    with pytest.raises(Reverted, match="AlreadyDrawn"):
        drawn.as_(drawn.stranger).stakes.move_seed(TASK)


def test_a_missed_draw_is_seeded_anew_and_a_possible_one_is_not(locked: World) -> None:
    stakes = locked.as_(locked.stranger).stakes
    old = locked.close(locked.cohort).event.seed_block
    # The last block that may look back to it is old + 256.
    locked.tester.mine_blocks(256)
    assert locked.web3.eth.block_number == old + 255
    with pytest.raises(Reverted, match="SeedAvailable") as refused:
        stakes.move_seed(TASK)
    assert refused.value.arguments == (old, old + 256)
    locked.tester.mine_block()
    with pytest.raises(Reverted, match="SeedExpired") as refused:
        stakes.draw_aggregator(TASK)
    assert refused.value.arguments == (old, old + 257)
    moved = stakes.move_seed(TASK)
    assert (moved.event.expired_block, moved.event.seed_block) == (old, moved.block_number + 1)
    locked.tester.mine_block()
    assert stakes.draw_aggregator(TASK).event.seed_block == moved.event.seed_block


def test_no_draw_after_the_deadline_or_a_refund(locked: World) -> None:
    locked.close(locked.cohort)
    locked.at(locked.deadline + 1)
    with pytest.raises(Reverted, match="DeadlinePast"):
        locked.as_(locked.stranger).stakes.draw_aggregator(TASK)
    locked.as_(locked.publisher).escrow.refund_publisher(TASK)
    with pytest.raises(Reverted, match="WrongStatus"):
        locked.as_(locked.stranger).stakes.draw_aggregator(TASK)


# Turns


def test_a_turn_ends_with_the_deadline_at_the_latest(locked: World) -> None:
    locked.at(locked.deadline - 100)
    locked.close_and_draw(locked.cohort)
    assert locked.views.stakes.get_draw(TASK).turn_end_s == locked.deadline


def recomputed_successor(world: World) -> str | None:
    """Who follows: the draw among those without a turn, by the hash of the seed and the bits of the others."""
    cohort, draw = world.cohort_on_chain, world.views.stakes.get_draw(TASK)
    left = [i for i in range(len(cohort.miners)) if not draw.replaced >> i & 1]
    if not left:
        return None
    seed = keccak(bytes.fromhex(draw.seed[2:]) + draw.replaced.to_bytes(32, "big"))
    return recomputed_draw(seed, [cohort.miners[i] for i in left], [cohort.stakes_wei[i] for i in left])


def slashed(events: Sequence[object]) -> list[StakeSlashed]:
    return [event for event in events if isinstance(event, StakeSlashed)]


def test_an_aggregator_that_resigns_loses_nothing_and_is_replaced(drawn: World) -> None:
    former, stakes = drawn.aggregator, drawn.as_(drawn.stranger).stakes
    stake = drawn.views.stakes.stake_of(former.address)
    assert drawn.as_(former).stakes.resign_aggregator(TASK).event.aggregator == former.address
    assert drawn.views.stakes.aggregator_of(TASK) is None
    # At once: nobody has to wait for the turn to end.
    mined = stakes.replace_aggregator(TASK)
    assert (mined.event.former, mined.event.turn_end_s) == (former.address, drawn.now() + PUBLISH_WINDOW)
    assert mined.event.aggregator == recomputed_successor(drawn) == drawn.aggregator.address != former.address
    assert slashed(mined.events) == []
    assert drawn.views.stakes.stake_of(former.address) == stake
    assert drawn.views.stakes.get_draw(TASK).replaced == 1 << drawn.cohort.index(former)
    drawn.publish_block()


def test_a_resigned_aggregator_publishes_no_more(drawn: World) -> None:
    former, candidate = drawn.aggregator, drawn.candidate()
    votes, cohort = drawn.votes(candidate), drawn.cohort_on_chain
    drawn.as_(former).stakes.resign_aggregator(TASK)
    for successor in (False, True):
        if successor:
            drawn.as_(drawn.stranger).stakes.replace_aggregator(TASK)
        with pytest.raises(Reverted, match="NotAggregator"):
            drawn.as_(former).publisher.publish_block(candidate, votes, cohort)


def test_only_the_aggregator_resigns_once_and_in_time(drawn: World) -> None:
    former = drawn.aggregator
    for account in (drawn.publisher, drawn.stranger, *drawn.others):
        with pytest.raises(Reverted, match="NotTheTurn") as refused:
            drawn.as_(account).stakes.resign_aggregator(TASK)
        assert refused.value.arguments == (TASK, account.address, former.address)
    end = drawn.views.stakes.get_draw(TASK).turn_end_s
    snapshot = drawn.tester.take_snapshot()
    drawn.at(end + 1)
    with pytest.raises(Reverted, match="TurnOver") as refused:
        drawn.as_(former).stakes.resign_aggregator(TASK)
    assert refused.value.arguments == (end, end + 1)
    drawn.go_back(snapshot)
    drawn.at(end)
    drawn.as_(former).stakes.resign_aggregator(TASK)
    with pytest.raises(Reverted, match="NotTheTurn"):
        drawn.as_(former).stakes.resign_aggregator(TASK)


def test_nobody_resigns_before_the_draw_or_after_the_block(published: World) -> None:
    with pytest.raises(Reverted, match="WrongStatus"):
        published.as_(published.aggregator).stakes.resign_aggregator(TASK)
    with pytest.raises(Reverted, match="WrongStatus"):
        published.as_(published.stranger).stakes.replace_aggregator(TASK)
    published.publish("another")
    with pytest.raises(Reverted, match="NotTheTurn") as refused:
        published.as_(published.cohort[0]).stakes.resign_aggregator("another")
    assert refused.value.arguments[2] == ZERO_ADDRESS
    with pytest.raises(Reverted, match="NotDrawn") as refused:
        published.as_(published.stranger).stakes.replace_aggregator("another")
    assert refused.value.arguments == ("another",)


def test_silence_costs_the_announced_part_of_the_recorded_stake(drawn: World) -> None:
    former, end = drawn.aggregator, drawn.views.stakes.get_draw(TASK).turn_end_s
    position = drawn.cohort.index(former)
    # What is deposited later is not recorded.
    drawn.as_(former).stakes.deposit_stake(amount_wei=1000)
    penalty = STAKES[position] * PENALTY_PPM // 1_000_000
    drawn.at(end)
    with pytest.raises(Reverted, match="TurnNotOver") as refused:
        drawn.as_(drawn.stranger).stakes.replace_aggregator(TASK)
    assert refused.value.arguments == (end, end)
    drawn.at(end + 1)
    mined = drawn.as_(drawn.stranger).stakes.replace_aggregator(TASK)
    (event,) = slashed(mined.events)
    assert (event.aggregator, event.offence, event.position) == (former.address, Offence.SILENCE, position)
    assert event.amount_wei == penalty > 0
    assert drawn.views.stakes.stake_of(former.address) == 1000 + STAKES[position] - penalty
    assert drawn.views.stakes.get_slash(TASK, position, Offence.SILENCE) == Slash(True, penalty, 0)
    assert drawn.aggregator != former


def test_a_late_aggregator_that_is_not_replaced_yet_may_publish(drawn: World) -> None:
    drawn.at(drawn.views.stakes.get_draw(TASK).turn_end_s + 1)
    drawn.publish_block()
    with pytest.raises(Reverted, match="WrongStatus"):
        drawn.as_(drawn.stranger).stakes.replace_aggregator(TASK)


def test_everybody_has_one_turn_and_then_nobody_is_left(locked: World) -> None:
    locked.close_and_draw(locked.cohort)
    stakes, turns = locked.as_(locked.stranger).stakes, []
    while (aggregator := locked.views.stakes.aggregator_of(TASK)) is not None:
        turns.append(aggregator)
        locked.as_(locked.aggregator).stakes.resign_aggregator(TASK)
        event = stakes.replace_aggregator(TASK).event
        assert event.aggregator == (recomputed_successor(locked) or ZERO_ADDRESS)
    assert sorted(turns, key=number) == [miner.address for miner in locked.cohort]
    assert (event.aggregator, event.turn_end_s) == (ZERO_ADDRESS, 0)
    with pytest.raises(Reverted, match="NotDrawn"):
        stakes.replace_aggregator(TASK)


def test_members_without_stake_are_not_drawn_later_either(empty: World) -> None:
    empty.publish(min_stake_wei=0)
    empty.deposit(empty.cohort[:2], [5, 5])
    empty.close_and_draw(empty.cohort)
    seen = set()
    for _ in range(2):
        seen.add(empty.aggregator.address)
        empty.as_(empty.aggregator).stakes.resign_aggregator(TASK)
        event = empty.as_(empty.stranger).stakes.replace_aggregator(TASK).event
    assert seen == {miner.address for miner in empty.cohort[:2]}
    assert event.aggregator == ZERO_ADDRESS


@pytest.mark.parametrize("is_refunded", [False, True])
def test_silence_until_the_deadline_is_punished_and_nobody_follows(drawn: World, is_refunded: bool) -> None:
    former = drawn.aggregator
    drawn.at(drawn.deadline + 1)
    if is_refunded:
        drawn.as_(drawn.publisher).escrow.refund_publisher(TASK)
    mined = drawn.as_(drawn.stranger).stakes.replace_aggregator(TASK)
    assert [event.aggregator for event in slashed(mined.events)] == [former.address]
    assert (mined.event.aggregator, mined.event.turn_end_s) == (ZERO_ADDRESS, 0)
    assert drawn.views.stakes.aggregator_of(TASK) is None


def test_what_silence_cost_goes_to_the_other_members_in_equal_parts(drawn: World) -> None:
    former = drawn.aggregator
    position = drawn.cohort.index(former)
    drawn.at(drawn.views.stakes.get_draw(TASK).turn_end_s + 1)
    drawn.as_(drawn.stranger).stakes.replace_aggregator(TASK)
    penalty = drawn.views.stakes.get_slash(TASK, position, Offence.SILENCE).amount_wei
    share, residue = divmod(penalty, 3)
    others = [miner for miner in drawn.cohort if miner != former]
    stakes = drawn.as_(drawn.stranger).stakes
    for i, miner in enumerate(others):
        event = stakes.credit_slashed(TASK, former.address, Offence.SILENCE, miner.address).event
        assert (event.miner, event.amount_wei) == (miner.address, share + (residue if i == 0 else 0))
        assert drawn.views.stakes.credit_of(miner.address) == event.amount_wei
        if event.amount_wei:
            assert drawn.as_(miner).stakes.withdraw_credit().event.amount_wei == event.amount_wei
        with pytest.raises(Reverted, match="NotEntitled") as refused:
            stakes.credit_slashed(TASK, former.address, Offence.SILENCE, miner.address)
        assert refused.value.arguments == (TASK, drawn.cohort.index(miner))
    everyone = sum(1 << i for i in range(4)) - (1 << position)
    assert drawn.views.stakes.get_slash(TASK, position, Offence.SILENCE).credited == everyone
    assert drawn.balance(drawn.deployment.stakes) == 155 - penalty


def test_nothing_is_credited_to_the_culprit_or_for_nothing(drawn: World) -> None:
    former = drawn.aggregator
    drawn.at(drawn.views.stakes.get_draw(TASK).turn_end_s + 1)
    stakes, other = drawn.as_(drawn.stranger).stakes, drawn.others[0]
    words, position = list(drawn.cohort_on_chain.words), drawn.cohort.index(former)
    stakes.replace_aggregator(TASK)
    cases = [
        (position, Offence.SILENCE, position),
        (position, Offence.SILENCE, 4),
        (position, Offence.EQUIVOCATION, drawn.cohort.index(other)),
        (drawn.cohort.index(other), Offence.SILENCE, position),
        (4, Offence.SILENCE, position),
    ]
    for culprit, offence, miner in cases:
        with pytest.raises(Reverted, match="NotEntitled") as refused:
            stakes._transact(object, "creditSlashed", TASK, words, culprit, int(offence), miner)
        assert refused.value.arguments == (TASK, miner)
    with pytest.raises(Reverted, match="WrongCohort"):
        stakes._transact(object, "creditSlashed", TASK, words[:3], position, int(Offence.SILENCE), 0)
    with pytest.raises(ValueError, match=f"{named('nobody').address} is not in the cohort of {TASK}"):
        stakes.credit_slashed(TASK, former.address, Offence.SILENCE, named("nobody").address)


@pytest.mark.parametrize("penalty_ppm", [0, 1_000_000])
def test_the_penalty_is_what_the_terms_say(empty: World, penalty_ppm: int) -> None:
    empty.form(empty.cohort, silence_penalty_ppm=penalty_ppm)
    former = empty.aggregator
    empty.at(empty.views.stakes.get_draw(TASK).turn_end_s + 1)
    empty.as_(empty.stranger).stakes.replace_aggregator(TASK)
    assert empty.views.stakes.stake_of(former.address) == 10 - 10 * penalty_ppm // 1_000_000


def test_silence_takes_nothing_out_of_a_withdrawal(locked: World) -> None:
    """What was taken out of the stake before the task recorded it backs nothing."""
    miners = locked.cohort
    for miner, stake in zip(miners, STAKES, strict=True):
        locked.as_(miner).stakes.request_withdrawal(stake - 10)
    locked.close_and_draw(miners)
    former = locked.aggregator
    locked.at(locked.views.stakes.get_draw(TASK).turn_end_s + 1)
    mined = locked.as_(locked.stranger).stakes.replace_aggregator(TASK)
    assert [event.amount_wei for event in slashed(mined.events)] == [10 * PENALTY_PPM // 1_000_000]
    waiting = STAKES[miners.index(former)] - 10
    assert locked.views.stakes.get_withdrawal(former.address).amount_wei == waiting


@pytest.mark.parametrize("is_late", [False, True])
def test_silence_is_punished_until_the_latest_end(drawn: World, is_late: bool) -> None:
    """After it the stake may back another task; the turn is ended all the same."""
    former = drawn.aggregator
    drawn.at(latest_end(drawn) + is_late)
    mined = drawn.as_(drawn.stranger).stakes.replace_aggregator(TASK)
    assert [event.aggregator for event in slashed(mined.events)] == ([] if is_late else [former.address])
    assert mined.event.former == former.address


@pytest.mark.parametrize("seconds", [PUBLISH_WINDOW - 1, PUBLISH_WINDOW])
def test_a_turn_that_the_deadline_cut_short_costs_nothing(locked: World, seconds: int) -> None:
    """A publisher that draws late would else take the stakes of miners that cannot react in time."""
    locked.at(locked.deadline - seconds - 2)
    locked.close_and_draw(locked.cohort)
    assert locked.now() == locked.deadline - seconds
    locked.at(locked.deadline + 1)
    mined = locked.as_(locked.stranger).stakes.replace_aggregator(TASK)
    assert len(slashed(mined.events)) == (seconds == PUBLISH_WINDOW)


def test_only_turns_cut_short_are_spared(drawn: World) -> None:
    """Turns end 400 and 800 seconds after the draw, and at the deadline."""
    lost = []
    while drawn.views.stakes.aggregator_of(TASK):
        drawn.at(drawn.views.stakes.get_draw(TASK).turn_end_s + 1)
        lost.append(len(slashed(drawn.as_(drawn.stranger).stakes.replace_aggregator(TASK).events)))
    assert lost == [1, 1, 0]


def test_the_next_turn_brings_the_cohort_along(drawn: World) -> None:
    drawn.as_(drawn.aggregator).stakes.resign_aggregator(TASK)
    words = list(drawn.cohort_on_chain.words)
    with pytest.raises(Reverted, match="WrongCohort"):
        drawn.as_(drawn.stranger).stakes._transact(object, "replaceAggregator", TASK, words[1:])
