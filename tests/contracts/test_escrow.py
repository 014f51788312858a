"""HealChainEscrow: publication and refund, each rule beside what it refuses."""

import pytest

from contracts.bindings import ZERO_ADDRESS, Status, TaskOnChain, Transfer, explain, task_key
from contracts.messages import accuracy_commit
from contracts.sending import Reverted, Sender
from tests.contracts.tokens import ANSWER_FALSE, CALL_BACK, EMIT_NONSENSE, KEEP_A_FEE, behave, funded
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
    assert (mined.event.token, mined.event.accuracy_commit, mined.event.spec_hash) == (ZERO_ADDRESS, COMMIT, SPEC)
    assert mined.event.deadline_s == terms.deadline_s
    recorded = empty.views.escrow.get_task(TASK)
    assert recorded == TaskOnChain(empty.publisher.address, REWARD, Status.LOCKED, ZERO_ADDRESS, COMMIT, SPEC, terms)
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
        ("silence_penalty_ppm", 1_000_000, 1_000_001),
        ("publish_window_s", 1, 0),
        ("publish_window_s", 90 * DAY, 90 * DAY + 1),
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


def test_a_reward_fits_in_88_bits(empty: World) -> None:
    empty.publish(reward=2**88 - 1)
    assert empty.views.escrow.get_task(TASK).reward_wei == empty.balance(empty.deployment.escrow) == 2**88 - 1


@pytest.mark.parametrize("sent", [0, REWARD - 1, REWARD + 1])
def test_the_value_sent_is_the_reward(empty: World, sent: int) -> None:
    values = tuple(vars(empty.terms()).values())
    with pytest.raises(Reverted, match="WrongValue") as refused:
        empty.as_(empty.publisher).escrow._transact(
            object, "publishTask", TASK, COMMIT, SPEC, ZERO_ADDRESS, REWARD, values, value_wei=sent
        )
    assert refused.value.arguments == (sent, REWARD)


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


def test_a_refund_goes_where_the_publisher_says(locked: World) -> None:
    locked.at(locked.deadline + 1)
    escrow, elsewhere = locked.as_(locked.publisher).escrow, "0x" + "5" * 40
    with pytest.raises(Reverted, match="InvalidRecipient"):
        escrow.refund_publisher(TASK, ZERO_ADDRESS)
    assert escrow.refund_publisher(TASK, elsewhere).event.recipient == elsewhere
    assert locked.balance(elsewhere) == REWARD


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


def test_the_rewards_contract_says_whose_ether_it_takes(empty: World) -> None:
    with pytest.raises(Reverted, match="OnlyContract") as refused:
        Sender(empty.web3, empty.stranger).send(b"", to=empty.deployment.rewards, value_wei=1, explain=explain)
    assert refused.value.arguments == (empty.stranger.address, empty.deployment.escrow)


# Rewards in tokens


def test_a_reward_in_tokens_is_taken_from_the_publisher_and_given_back(empty: World) -> None:
    token = funded(empty)
    before = token.balance_of(empty.publisher.address)
    terms = empty.terms()
    mined = empty.as_(empty.publisher).escrow.publish_task(
        TASK, COMMIT, SPEC, terms, reward_wei=REWARD, token=token.address
    )
    assert (mined.event.token, mined.event.reward_wei) == (token.address, REWARD)
    assert Transfer(empty.publisher.address, empty.deployment.escrow, REWARD) in mined.events
    assert empty.views.escrow.get_task(TASK).token == token.address
    assert (token.balance_of(empty.deployment.escrow), empty.balance(empty.deployment.escrow)) == (REWARD, 0)
    assert token.balance_of(empty.publisher.address) == before - REWARD

    empty.at(terms.deadline_s + 1)
    refunded = empty.as_(empty.publisher).escrow.refund_publisher(TASK)
    assert (refunded.event.token, refunded.event.amount_wei) == (token.address, REWARD)
    assert (token.balance_of(empty.publisher.address), token.balance_of(empty.deployment.escrow)) == (before, 0)


def test_tokens_have_to_be_approved_before(empty: World) -> None:
    token = funded(empty)
    token.approve(empty.deployment.escrow, REWARD - 1)
    assert token.allowance(empty.publisher.address, empty.deployment.escrow) == REWARD - 1
    with pytest.raises(Reverted, match="ERC20InsufficientAllowance") as refused:
        empty.publish(token=token.address)
    assert refused.value.arguments == (empty.deployment.escrow, REWARD - 1, REWARD)
    token.approve(empty.deployment.escrow, REWARD)
    empty.publish(token=token.address)


def test_a_publisher_without_the_tokens_is_told_so(empty: World) -> None:
    token = funded(empty, amount=REWARD - 1)
    token.approve(empty.deployment.escrow, REWARD)
    with pytest.raises(Reverted, match="ERC20InsufficientBalance") as refused:
        empty.publish(token=token.address)
    assert refused.value.arguments == (empty.publisher.address, REWARD - 1, REWARD)


def test_no_ether_comes_along_with_a_reward_in_tokens(empty: World) -> None:
    values = tuple(vars(empty.terms()).values())
    token = funded(empty)
    with pytest.raises(Reverted, match="WrongValue") as refused:
        empty.as_(empty.publisher).escrow._transact(
            object, "publishTask", TASK, COMMIT, SPEC, token.address, REWARD, values, value_wei=1
        )
    assert refused.value.arguments == (1, 0)


@pytest.mark.parametrize(
    ("manner", "error"),
    [
        (KEEP_A_FEE, "FeeOnTransfer"),
        (ANSWER_FALSE, "SafeERC20FailedOperation"),
        (CALL_BACK, "ReentrancyGuardReentrantCall"),
    ],
)
def test_a_token_that_misbehaves_makes_no_task(empty: World, manner: int, error: str) -> None:
    token = funded(empty, "OddToken")
    behave(
        empty,
        token,
        manner,
        empty.deployment.escrow,
        empty.views.escrow._encode("refundPublisher", TASK, token.address),
    )
    with pytest.raises(Reverted, match=error) as refused:
        empty.publish(token=token.address)
    fee = REWARD // 100
    assert (
        refused.value.arguments
        == {
            KEEP_A_FEE: (token.address, REWARD, REWARD - fee),
            ANSWER_FALSE: (token.address,),
            CALL_BACK: (),
        }[manner]
    )
    assert empty.views.escrow.get_task(TASK).status is Status.NONE
    assert token.balance_of(empty.deployment.escrow) == 0


def test_logs_of_a_token_that_look_like_ours_are_passed_over(empty: World) -> None:
    token = funded(empty, "OddToken")
    behave(empty, token, EMIT_NONSENSE)
    mined = empty.as_(empty.publisher).escrow.publish_task(
        TASK, COMMIT, SPEC, empty.terms(), reward_wei=REWARD, token=token.address
    )
    assert [type(event).__name__ for event in mined.events] == ["TaskPublished", "Transfer"]
