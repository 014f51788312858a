"""HealChainEscrow: publication and refund, each rule beside what it refuses."""

import pytest

from contracts.bindings import Status, TaskOnChain, task_key
from contracts.messages import accuracy_commit
from contracts.sending import Reverted, Sender
from tests.contracts.world import ACCURACY, REWARD, SALT, SPEC, TASK, World

COMMIT = accuracy_commit(ACCURACY, SALT)
DAY = 24 * 3600


def test_a_published_task_is_locked_with_its_whole_reward(empty: World) -> None:
    terms = empty.terms()
    mined = empty.as_(empty.publisher).escrow.publish_task(TASK, COMMIT, SPEC, terms, reward_wei=REWARD)
    assert mined.event.task_key == task_key(TASK)
    assert (mined.event.publisher, mined.event.task_id, mined.event.reward_wei) == (
        empty.publisher.address,
        TASK,
        REWARD,
    )
    assert (mined.event.accuracy_commit, mined.event.spec_hash) == (COMMIT, SPEC)
    assert mined.event.deadline_s == terms.deadline_s
    recorded = empty.views.escrow.get_task(TASK)
    assert recorded == TaskOnChain(empty.publisher.address, Status.LOCKED, REWARD, COMMIT, SPEC, terms)
    assert empty.balance(empty.deployment.escrow) == REWARD


def test_an_unknown_task_has_no_status(empty: World) -> None:
    assert empty.views.escrow.get_task("nobody-knows").status is Status.NONE


def test_a_task_id_is_used_once(locked: World) -> None:
    with pytest.raises(Reverted, match="DuplicateTask"):
        locked.as_(locked.stranger).escrow.publish_task(TASK, COMMIT, SPEC, locked.terms(), reward_wei=1)


@pytest.mark.parametrize(("task_id", "is_valid"), [("x", True), ("x" * 64, True), ("", False), ("x" * 65, False)])
def test_a_task_id_has_1_to_64_bytes(empty: World, task_id: str, is_valid: bool) -> None:
    escrow = empty.as_(empty.publisher).escrow
    if is_valid:
        escrow.publish_task(task_id, COMMIT, SPEC, empty.terms(), reward_wei=1)
        assert escrow.get_task(task_id).status is Status.LOCKED
    else:
        with pytest.raises(Reverted, match="InvalidTaskID"):
            escrow.publish_task(task_id, COMMIT, SPEC, empty.terms(), reward_wei=1)


def test_a_task_without_reward_is_refused(empty: World) -> None:
    with pytest.raises(Reverted, match="ZeroReward"):
        empty.publish(reward=0)


def test_a_deadline_lies_in_the_future(empty: World) -> None:
    deadline = empty.now() + 10
    empty.at(deadline)
    with pytest.raises(Reverted, match="DeadlinePast") as refused:
        empty.publish(deadline_s=deadline)
    assert refused.value.arguments == (deadline, deadline)
    empty.publish(deadline_s=empty.now() + 2)


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("min_miners", 3, 2),
        ("max_miners", 200, 201),
        ("max_miners", 3, 2),
        ("fault_rate_ppm", 500_000, 500_001),
        ("aggregator_share_ppm", 500_000, 500_001),
        ("publisher_reveal_window_s", 1, 0),
        ("publisher_reveal_window_s", 90 * DAY, 90 * DAY + 1),
        ("aggregator_reveal_window_s", 1, 0),
        ("aggregator_reveal_window_s", 90 * DAY, 90 * DAY + 1),
        ("score_reveal_window_s", 1, 0),
        ("score_reveal_window_s", 90 * DAY, 90 * DAY + 1),
        ("max_score", 1, 0),
    ],
)
def test_terms_are_accepted_up_to_their_limits(empty: World, field: str, good: int, bad: int) -> None:
    with pytest.raises(Reverted, match="InvalidTerms") as refused:
        empty.publish(**{field: bad})
    solidity = field.split("_")[0] + "".join(part.title() for part in field.split("_")[1:]).replace(
        "WindowS", "Window_s"
    )
    assert refused.value.arguments == (solidity,)
    empty.publish(**{field: good})


def test_a_deadline_is_at_most_366_days_away(empty: World) -> None:
    furthest = empty.now() + 1 + 366 * DAY
    with pytest.raises(Reverted, match="InvalidTerms") as refused:
        empty.publish(deadline_s=furthest + 1)
    assert refused.value.arguments == ("deadline",)
    empty.publish(deadline_s=furthest)


def test_a_score_times_the_reward_cannot_overflow(empty: World) -> None:
    # With 128-bit scores only a reward above all ether meets this limit.
    reward = 2**121
    most = (2**256 - 1) // 200 // reward
    assert most < 2**128
    with pytest.raises(Reverted, match="InvalidTerms"):
        empty.publish(reward=reward, max_score=most + 1)
    empty.publish(reward=reward, max_score=most)


def test_a_commitment_is_not_empty(empty: World) -> None:
    with pytest.raises(Reverted, match="InvalidTerms"):
        empty.as_(empty.publisher).escrow.publish_task(TASK, "0x" + "00" * 32, SPEC, empty.terms(), reward_wei=1)


def test_the_publisher_is_refunded_after_the_deadline(locked: World) -> None:
    locked.at(locked.deadline + 1)
    before = locked.balance(locked.publisher.address)
    mined = locked.as_(locked.publisher).escrow.refund_publisher(TASK)
    receipt = locked.web3.eth.get_transaction_receipt(mined.transaction)
    assert mined.event.amount_wei == REWARD
    assert (
        locked.balance(locked.publisher.address) == before + REWARD - receipt["gasUsed"] * receipt["effectiveGasPrice"]
    )
    assert locked.balance(locked.deployment.escrow) == 0
    assert locked.views.escrow.get_task(TASK).status is Status.REFUNDED


def test_no_refund_at_the_deadline_itself(locked: World) -> None:
    locked.at(locked.deadline)
    with pytest.raises(Reverted, match="DeadlineNotReached") as refused:
        locked.as_(locked.publisher).escrow.refund_publisher(TASK)
    assert refused.value.arguments == (locked.deadline, locked.deadline)


def test_nobody_else_is_refunded(locked: World) -> None:
    locked.at(locked.deadline + 1)
    with pytest.raises(Reverted, match="NotPublisher"):
        locked.as_(locked.stranger).escrow.refund_publisher(TASK)


def test_a_refund_is_paid_once_and_the_name_stays_taken(locked: World) -> None:
    locked.publish("another")
    locked.at(locked.deadline + 1)
    locked.as_(locked.publisher).escrow.refund_publisher(TASK)
    with pytest.raises(Reverted, match="WrongStatus") as refused:
        locked.as_(locked.publisher).escrow.refund_publisher(TASK)
    assert refused.value.arguments == (TASK, Status.REFUNDED)
    with pytest.raises(Reverted, match="DuplicateTask"):
        locked.publish()
    assert locked.balance(locked.deployment.escrow) == REWARD


def test_no_refund_of_an_unknown_task(empty: World) -> None:
    with pytest.raises(Reverted, match="WrongStatus"):
        empty.as_(empty.publisher).escrow.refund_publisher("nobody-knows")


def test_no_refund_after_publication(published: World) -> None:
    published.at(published.deadline + 1)
    with pytest.raises(Reverted, match="WrongStatus") as refused:
        published.as_(published.publisher).escrow.refund_publisher(TASK)
    assert refused.value.arguments == (TASK, Status.PUBLISHED)


@pytest.mark.parametrize("function", ["markPublished", "releaseReward"])
def test_only_the_other_contracts_move_a_task(locked: World, function: str) -> None:
    for account in (locked.publisher, locked.stranger):
        with pytest.raises(Reverted, match="OnlyContract"):
            locked.as_(account).escrow._transact(object, function, TASK)


@pytest.mark.parametrize("contract", ["escrow", "stakes", "publisher", "rewards"])
def test_no_contract_takes_plain_ether(empty: World, contract: str) -> None:
    with pytest.raises(Reverted):
        Sender(empty.web3, empty.stranger).send(b"", to=getattr(empty.deployment, contract), value_wei=1)
