"""StakeRegistry: deposits and withdrawals, registration, cohort, the draw; slashing is in test_publisher."""

import random

import pytest
from eth_utils import keccak

from contracts.bindings import CohortOnChain, Status, Withdrawal
from contracts.messages import draw_seed
from contracts.sending import Reverted
from tests.contracts.world import (
    AGGREGATOR_WINDOW,
    DELAY,
    PUBLISHER_WINDOW,
    SCORE_WINDOW,
    STAKES,
    TASK,
    World,
    number,
    salt_of,
)


def recomputed_draw(seed: bytes, miners: list[str], stakes: list[int]) -> str:
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


def test_a_stake_fits_in_96_bits(empty: World) -> None:
    stakes = empty.as_(empty.miners[0]).stakes
    stakes.deposit_stake(amount_wei=2**96 - 1)
    with pytest.raises(Reverted, match="SafeCastOverflowedUintDowncast"):
        stakes.deposit_stake(amount_wei=1)


def test_a_requested_withdrawal_is_paid_after_the_delay(empty: World) -> None:
    miner = empty.miners[0]
    stakes = empty.as_(miner).stakes
    stakes.deposit_stake(amount_wei=10)
    withdrawable_at = stakes.request_withdrawal(4).event.withdrawable_at_s
    assert withdrawable_at == empty.now() + DELAY
    assert stakes.get_withdrawal(miner.address) == Withdrawal(4, withdrawable_at, 0)
    assert (stakes.stake_of(miner.address), stakes.available_stake(miner.address)) == (10, 6)

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
    assert stakes.available_stake(miner.address) == 0
    stakes.request_withdrawal(0)
    assert stakes.available_stake(miner.address) == 10
    empty.at(empty.now() + 2 * DELAY)
    with pytest.raises(Reverted, match="NothingToWithdraw"):
        stakes.withdraw_stake()


def test_no_more_than_the_stake_is_withdrawn(empty: World) -> None:
    stakes = empty.as_(empty.miners[0]).stakes
    stakes.deposit_stake(amount_wei=10)
    with pytest.raises(Reverted, match="InsufficientStake") as refused:
        stakes.request_withdrawal(11)
    assert refused.value.arguments == (empty.miners[0].address, 10, 11)


# Registration


def test_a_miner_with_stake_registers(locked: World) -> None:
    miner = locked.cohort[0]
    stakes = locked.as_(miner).stakes
    assert stakes.registration_of(TASK, miner.address) is None
    digest = "0x" + salt_of(miner).hex()
    assert stakes.register(TASK, digest).event.registration_hash == digest
    assert stakes.registration_of(TASK, miner.address) == digest


def test_a_miner_registers_once(locked: World) -> None:
    locked.register(locked.cohort[:1])
    with pytest.raises(Reverted, match="AlreadyRegistered"):
        locked.register(locked.cohort[:1])


def test_a_registration_names_its_message(locked: World) -> None:
    with pytest.raises(Reverted, match="EmptyRegistration"):
        locked.as_(locked.cohort[0]).stakes.register(TASK, "0x" + "00" * 32)


def test_stake_below_the_minimum_does_not_register(locked: World) -> None:
    poor = locked.miners[5]
    assert locked.views.stakes.stake_of(poor.address) == 5
    with pytest.raises(Reverted, match="InsufficientStake") as refused:
        locked.register([poor])
    assert refused.value.arguments == (poor.address, 5, 10)


def test_stake_about_to_be_withdrawn_does_not_register(locked: World) -> None:
    miner = locked.cohort[0]
    locked.as_(miner).stakes.request_withdrawal(31)
    with pytest.raises(Reverted, match="InsufficientStake"):
        locked.register([miner])


def test_the_publisher_is_not_its_own_miner(locked: World) -> None:
    locked.as_(locked.publisher).stakes.deposit_stake(amount_wei=100)
    with pytest.raises(Reverted, match="PublisherCannotMine"):
        locked.register([locked.publisher])


def test_nobody_registers_for_an_unknown_task(locked: World) -> None:
    with pytest.raises(Reverted, match="WrongStatus") as refused:
        locked.register(locked.cohort[:1], "nobody-knows")
    assert refused.value.arguments == ("nobody-knows", Status.NONE)


def test_registration_ends_with_the_deadline(locked: World) -> None:
    locked.at(locked.deadline)
    locked.register(locked.cohort[:1])
    locked.at(locked.deadline + 1)
    with pytest.raises(Reverted, match="DeadlinePast"):
        locked.register(locked.cohort[1:2])


def test_registration_ends_with_the_cohort(drawn: World) -> None:
    with pytest.raises(Reverted, match="RegistrationIsClosed"):
        drawn.register(drawn.miners[4:5])


# Locks


def test_a_registered_stake_is_held_until_the_deadline(locked: World) -> None:
    miner = locked.cohort[0]
    locked.as_(miner).stakes.request_withdrawal(5)
    locked.publish("longer", deadline_s=locked.now() + 2 * DELAY)
    locked.register([miner], "longer")
    deadline = locked.views.escrow.get_task("longer").terms.deadline_s
    locked.at(deadline)
    with pytest.raises(Reverted, match="StakeLocked") as refused:
        locked.as_(miner).stakes.withdraw_stake()
    assert refused.value.arguments == (deadline, deadline)
    locked.at(deadline + 1)
    locked.as_(miner).stakes.withdraw_stake()


def test_the_stake_of_the_cohort_is_held_until_the_latest_possible_end(drawn: World) -> None:
    end = drawn.deadline + PUBLISHER_WINDOW + AGGREGATOR_WINDOW + SCORE_WINDOW
    miner = drawn.cohort[0]
    drawn.as_(miner).stakes.request_withdrawal(5)
    assert drawn.views.stakes.get_withdrawal(miner.address).locked_until_s == end
    # The delay is longer than this task; a second, later one shows that the longest lock counts.
    drawn.publish("longer", deadline_s=drawn.now() + 3 * DELAY)
    drawn.register(drawn.cohort, "longer")
    drawn.as_(drawn.publisher).stakes.close_registration("longer", [m.address for m in drawn.cohort])
    longer = drawn.views.stakes.get_withdrawal(miner.address).locked_until_s
    assert longer == drawn.views.escrow.get_task("longer").terms.deadline_s + 600
    drawn.at(longer)
    with pytest.raises(Reverted, match="StakeLocked"):
        drawn.as_(miner).stakes.withdraw_stake()
    drawn.at(longer + 1)
    drawn.as_(miner).stakes.withdraw_stake()


# The cohort


def test_closing_records_the_cohort_and_its_stakes(locked: World) -> None:
    locked.register(locked.miners[:5])
    chosen = [miner.address for miner in locked.cohort]
    assert locked.views.stakes.get_cohort(TASK) == CohortOnChain((), ())
    closed = locked.as_(locked.publisher).stakes.close_registration(TASK, chosen)
    assert (closed.event.miners, closed.event.stakes_wei) == (tuple(chosen), STAKES)
    assert (closed.event.total_wei, closed.event.seed_block) == (100, closed.block_number + 1)
    assert locked.views.stakes.get_cohort(TASK) == CohortOnChain(tuple(chosen), STAKES)
    locked.as_(locked.cohort[0]).stakes.deposit_stake(amount_wei=1000)
    assert locked.views.stakes.get_cohort(TASK).stakes_wei == STAKES


def test_only_the_publisher_closes_registration(locked: World) -> None:
    locked.register(locked.cohort)
    with pytest.raises(Reverted, match="NotPublisher"):
        locked.as_(locked.cohort[0]).stakes.close_registration(TASK, [m.address for m in locked.cohort])


def test_registration_is_closed_once(drawn: World) -> None:
    with pytest.raises(Reverted, match="RegistrationIsClosed"):
        drawn.as_(drawn.publisher).stakes.close_registration(TASK, [m.address for m in drawn.cohort])


def test_no_cohort_after_the_deadline(locked: World) -> None:
    locked.register(locked.cohort)
    locked.at(locked.deadline + 1)
    with pytest.raises(Reverted, match="DeadlinePast"):
        locked.as_(locked.publisher).stakes.close_registration(TASK, [m.address for m in locked.cohort])


def test_a_cohort_has_a_size_within_the_terms(locked: World) -> None:
    locked.register(locked.miners[:5])
    addresses = [miner.address for miner in locked.miners]
    stakes = locked.as_(locked.publisher).stakes
    for cohort in (addresses[:2], addresses[:7], []):
        with pytest.raises(Reverted, match="CohortSize") as refused:
            stakes.close_registration(TASK, cohort)
        assert refused.value.arguments == (len(cohort), 3, 6)
    stakes.close_registration(TASK, addresses[:3])


def test_a_cohort_ascends_strictly(locked: World) -> None:
    locked.register(locked.cohort)
    a, b, c, d = (miner.address for miner in locked.cohort)
    stakes = locked.as_(locked.publisher).stakes
    for cohort, index in [([a, c, b, d], 2), ([a, b, b, c], 2), ([d, c, b, a], 1), (["0x" + "00" * 20, a, b], 0)]:
        with pytest.raises(Reverted, match="NotAscending") as refused:
            stakes.close_registration(TASK, cohort)
        assert refused.value.arguments[0] == index
    stakes.close_registration(TASK, [a, b, c, d])


def test_a_cohort_is_registered(locked: World) -> None:
    locked.register(locked.cohort[:3])
    with pytest.raises(Reverted, match="NotRegistered") as refused:
        locked.as_(locked.publisher).stakes.close_registration(TASK, [m.address for m in locked.cohort])
    assert refused.value.arguments == (TASK, locked.cohort[3].address)


def test_a_miner_that_takes_its_stake_away_is_not_in_a_cohort(locked: World) -> None:
    locked.register(locked.cohort)
    locked.as_(locked.cohort[1]).stakes.request_withdrawal(1)
    with pytest.raises(Reverted, match="InsufficientStake") as refused:
        locked.as_(locked.publisher).stakes.close_registration(TASK, [m.address for m in locked.cohort])
    assert refused.value.arguments == (locked.cohort[1].address, 9, 10)


def test_a_cohort_without_any_stake_cannot_be_drawn_from(empty: World) -> None:
    empty.publish(min_stake_wei=0)
    empty.register(empty.cohort)
    with pytest.raises(Reverted, match="CohortWithoutStake"):
        empty.as_(empty.publisher).stakes.close_registration(TASK, [m.address for m in empty.cohort])
    # One wei in the cohort is enough, and draws its owner.
    empty.deposit(empty.cohort[2:3], [1])
    empty.close_and_draw(empty.cohort)
    assert empty.aggregator == empty.cohort[2]


# The draw


def test_the_draw_is_what_anybody_recomputes(drawn: World) -> None:
    stakes = drawn.views.stakes
    draw = stakes.get_draw(TASK)
    block_hash = bytes(drawn.web3.eth.get_block(draw.seed_block)["hash"])
    assert draw.seed == "0x" + draw_seed(TASK, block_hash).hex()
    assert draw.total_wei == 100
    cohort = stakes.get_cohort(TASK)
    expected = recomputed_draw(bytes.fromhex(draw.seed[2:]), list(cohort.miners), list(cohort.stakes_wei))
    assert stakes.aggregator_of(TASK) == expected


def test_many_draws_follow_the_recomputation(locked: World) -> None:
    """One stake table, many tasks: each has its own seed."""
    winners = set()
    for i in range(6):
        task = f"task-{i}"
        locked.publish(task, reward=1)
        locked.register(locked.cohort, task)
        locked.as_(locked.publisher).stakes.close_registration(task, [m.address for m in locked.cohort])
        locked.tester.mine_block()
        event = locked.as_(locked.stranger).stakes.draw_aggregator(task).event
        seed = keccak(task.encode() + bytes(locked.web3.eth.get_block(event.seed_block)["hash"]))
        assert event.seed == "0x" + seed.hex()
        assert event.aggregator == recomputed_draw(seed, [m.address for m in locked.cohort], list(STAKES))
        winners.add(event.aggregator)
    assert len(winners) > 1


def test_the_recomputed_draw_is_proportional_to_stake() -> None:
    miners = [f"0x{i:040x}" for i in range(1, 5)]
    generator = random.Random(1)
    draws = [recomputed_draw(generator.randbytes(32), miners, list(STAKES)) for _ in range(20_000)]
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
    locked.register(locked.cohort)
    closed = locked.as_(locked.publisher).stakes.close_registration(TASK, [m.address for m in locked.cohort])
    with pytest.raises(Reverted, match="SeedNotMined"):
        locked.as_(locked.stranger).stakes.draw_aggregator(TASK)
    with pytest.raises(Reverted, match="SeedNotMined"):
        locked.as_(locked.stranger).stakes.move_seed(TASK)
    locked.tester.mine_block()
    assert locked.as_(locked.stranger).stakes.draw_aggregator(TASK).event.seed_block == closed.block_number + 1


def test_the_aggregator_is_drawn_once(drawn: World) -> None:
    with pytest.raises(Reverted, match="AlreadyDrawn") as refused:
        drawn.as_(drawn.stranger).stakes.draw_aggregator(TASK)
    assert refused.value.arguments == (TASK, drawn.aggregator.address)
    with pytest.raises(Reverted, match="AlreadyDrawn"):
        drawn.as_(drawn.stranger).stakes.move_seed(TASK)


def test_a_missed_draw_is_seeded_anew_and_a_possible_one_is_not(locked: World) -> None:
    stakes = locked.as_(locked.stranger).stakes
    locked.register(locked.cohort)
    old = (
        locked.as_(locked.publisher)
        .stakes.close_registration(TASK, [m.address for m in locked.cohort])
        .event.seed_block
    )
    # The last block that may look back to it is old + 256.
    locked.tester.mine_blocks(256)
    assert locked.web3.eth.block_number == old + 255
    with pytest.raises(Reverted, match="SeedAvailable"):
        stakes.move_seed(TASK)
    locked.tester.mine_block()
    with pytest.raises(Reverted, match="SeedExpired"):
        stakes.draw_aggregator(TASK)
    moved = stakes.move_seed(TASK)
    assert (moved.event.expired_block, moved.event.seed_block) == (old, moved.block_number + 1)
    locked.tester.mine_block()
    assert stakes.draw_aggregator(TASK).event.seed_block == moved.event.seed_block
