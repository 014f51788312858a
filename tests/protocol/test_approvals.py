"""Tasks that others start on the publisher's standing approval: as many as it said, and at its price."""

import pytest

from blocks.identity import create_home
from tasks.publish import DepositFailed, approve, approve_once, decide_as_approved
from tests.protocol.world import task_file


@pytest.fixture
def me(tmp_path):
    return create_home(tmp_path / "publisher")


def decided(me, task_id):
    return me.read_private(f"{task_id}/commitment.json")


def test_as_many_tasks_begin_as_were_approved_each_counted_once(me):
    file = task_file()
    approve(me, file, most_tasks=2)
    for task_id in ("one", "one", "two", "one", "two"):
        decide_as_approved(me, task_id, file.spec())
        assert decided(me, task_id) is not None
    first = decided(me, "one")
    with pytest.raises(DepositFailed, match=rf"approved of 2 tasks named {file.name}, .* --tasks NUMBER"):
        decide_as_approved(me, "three", file.spec())
    assert decided(me, "three") is None
    assert decided(me, "one") == first


def test_a_later_approval_counts_anew(me):
    file = task_file()
    approve(me, file, most_tasks=1)
    decide_as_approved(me, "one", file.spec())
    approve(me, file, most_tasks=1)
    decide_as_approved(me, "two", file.spec())
    with pytest.raises(DepositFailed, match="approve of more"):
        decide_as_approved(me, "three", file.spec())


def test_an_approval_of_the_publishers_own_is_not_renewed(me):
    file = task_file()
    approve(me, file, most_tasks=1)
    decide_as_approved(me, "one", file.spec())
    approve_once(me, file)
    with pytest.raises(DepositFailed, match="approved of 1 tasks"):
        decide_as_approved(me, "two", file.spec())


def test_another_price_is_refused_and_not_counted(me):
    file = task_file()
    approve(me, file, most_tasks=1)
    with pytest.raises(DepositFailed, match=r"\[money\] of dear is not what the publisher approved"):
        decide_as_approved(me, "dear", task_file(money__reward_wei=file.money.reward_wei + 1).spec())
    decide_as_approved(me, "fair", file.spec())
    assert decided(me, "fair") is not None


def test_without_an_approval_nothing_is_decided(me):
    decide_as_approved(me, "one", task_file().spec())
    assert decided(me, "one") is None
