"""Whoever rules over Prefect's database, or over the store, in the middle of a task: it ends right, or stops with the reason."""

import io
import json

import psycopg
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import BlockDocumentUpdate

from blocks import pools
from contracts.messages import Submission
from infra import postgres
from tasks.records import record_path
from tests.faults.stack import REWARD_WEI, StackUnderTest, check, task

pytestmark = [pytest.mark.timeout(1500)]


def prefect_database(stack: StackUnderTest) -> psycopg.Connection:
    plan = json.loads((stack.folder / "stack.json").read_text())
    return psycopg.connect(
        host="127.0.0.1",
        port=stack.ports["postgres"],
        user=postgres.USER,
        password=plan["postgres_password"],
        dbname="prefect",
        autocommit=True,
    )


def test_code_that_the_server_orders_is_not_run(stack, undisturbed, tmp_path):
    """Commands, environments, entrypoints and pull steps in the database, which a process worker would have run."""
    planted = tmp_path / "planted"
    order = f"touch {planted}"
    template = {"job_configuration": {"command": order, "env": {"BASH_ENV": order}}, "variables": {"properties": {}}}
    pull = [{"prefect.deployments.steps.run_shell_script": {"script": order}}]
    with prefect_database(stack) as database:
        database.execute("UPDATE work_pool SET base_job_template = %s", [json.dumps(template)])
        database.execute(
            "UPDATE deployment SET entrypoint = %s, pull_steps = %s, path = %s",
            ["os.system", json.dumps(pull), str(tmp_path)],
        )
        result = stack.finish(stack.begin(task()))
    check(stack, result, undisturbed)
    assert not planted.exists()
    stack.up()  # puts the deployments right again


def test_another_chain_and_store_in_the_servers_blocks_mislead_nobody(stack, undisturbed):
    """Every text in them is forged, as one could who holds the server's key of the blocks: addresses and homes."""
    with get_client(sync_client=True) as client:
        offered = [one for one in client.read_block_documents() if str(one.block_type_name).startswith("HealChain")]
        assert offered
        for one in offered:
            forged = {field: "http://127.0.0.1:1" for field, value in one.data.items() if isinstance(value, str)}
            client.update_block_document(one.id, BlockDocumentUpdate(data=forged, merge_existing_data=True))
        result = stack.finish(stack.begin(task()))
    check(stack, result, undisturbed)
    stack.up()
    with get_client(sync_client=True) as client:
        restored = {one.id: one.data for one in client.read_block_documents()}
    assert {one.id: one.data for one in offered} == {one.id: restored[one.id] for one in offered}


def test_a_step_that_the_server_calls_done_is_not_believed(stack, undisturbed):
    """Its answer is not in the store: the round goes on without it, and says so."""
    with stack.fault("contribute.*miner-2", "tasks.contribute:local_round", do="wait"):
        begun = stack.begin(task())
        stack.await_strike()
        with prefect_database(stack) as database:
            pretended = database.execute(
                "UPDATE flow_run SET state_type = 'COMPLETED', state_name = 'Completed' "
                "WHERE state_type = 'RUNNING' AND name LIKE %s RETURNING state_id",
                ["M3 contribute%miner-2"],
            ).fetchall()
            assert len(pretended) == 1
            database.execute(
                "UPDATE flow_run_state SET type = 'COMPLETED', name = 'Completed' WHERE id = %s", pretended[0]
            )
        address = stack.station("miner-2").address
        stack.wait(lambda: any(entry[2] == address for entry in stack.result(begun[0]).refused), "miner-2 is refused")
        stack.go_on()
        result = stack.finish(begun)
    assert result.status == "PAID"
    assert any("posted no Submission" in reason for _, _, actor, reason in result.refused if actor == address)
    assert sum(result.rewards_wei.values()) == REWARD_WEI


def test_parameters_that_the_server_changes_spend_nothing(stack, undisturbed):
    """A run of `run-task` with a tenfold reward in its terms: the publisher has decided on others."""
    spec = task().spec().model_dump(mode="json")
    spec["money"]["reward_wei"] *= 10
    begun = stack.begin(task())
    with prefect_database(stack) as database:
        row = database.execute("SELECT parameters FROM flow_run WHERE id = %s", [begun[1]]).fetchone()
        assert row is not None
    forged = pools.start(
        "run-task/publisher",
        "publisher",
        {"spec": spec, "publisher": "publisher", "task_id": "forged-task"},
        key="forged",
        name="forged-task",
        tags=[],
    )
    stack.wait(lambda: pools.look([forged.id])[forged.id].has_ended, "the forged task ends")
    seen = pools.look([forged.id])[forged.id]
    assert not seen.is_done
    assert "DepositFailed" in seen.message or "not in the publisher's home" in seen.message
    chain = stack.station("publisher").chain
    assert chain.contracts().escrow.get_task("forged-task").reward_wei == 0
    check(stack, stack.finish(begun), undisturbed)


@pytest.mark.parametrize(
    "what", [("a record",), ("a ciphertext",), ("a record", "a ciphertext")], ids=lambda what: " and ".join(what)
)
def test_what_the_store_changes_is_refused(stack, undisturbed, what):
    """Another miner's signed submission in the place of one; a spoiled ciphertext of a second. Without both of them there
    are too few submissions: the task stops with the reason, and the publisher has its reward back."""
    replaced: dict[str, bytes] = {}
    with stack.fault("collect", "tasks.aggregate:check_submission", do="wait"):
        begun = stack.begin(task(windows__deadline_s=180, windows__publish_s=120))
        stack.await_strike()
        cohort = stack.cohort(begun[0])
        others = [miner for miner in cohort.miners if miner != cohort.aggregator]
        record, ciphertext = others[0], others[2]
        if "a record" in what:
            path = record_path(Submission, begun[0], 1)
            key, foreign = (f"{miner.lower()}/records/{path}" for miner in others[:2])
            replaced[key] = replace(stack, key, stack.objects().get_object("healchain", foreign).read())
        if "a ciphertext" in what:
            spoiled = stack.station("publisher").find(Submission, ciphertext, begun[0], 1)
            assert spoiled is not None
            digest = spoiled.chunks_sha256[2:]
            key = f"{ciphertext.lower()}/blobs/{digest[:2]}/{digest}"
            replaced[key] = replace(stack, key, b"spoiled")
        stack.go_on()
        result = stack.finish(begun)
    for key, data in replaced.items():  # the tests after this one look for what nobody names
        replace(stack, key, data)
    if len(what) == 2:
        assert result.status == "REFUNDED"
        assert "not enough valid submissions" in result.reason
        assert all(said in result.reason for said in (record, "is signed by", ciphertext, "truncated or changed"))
        assert result.rewards_wei == {}
        return
    reasons = {actor: reason for number, step, actor, reason in result.refused if (number, step) == (1, "Collection")}
    assert list(reasons) == [record if what == ("a record",) else ciphertext]
    assert ("is signed by" if what == ("a record",) else "truncated or changed") in reasons.popitem()[1]
    assert (result.status, sum(result.rewards_wei.values())) == ("PAID", REWARD_WEI)


def replace(stack: StackUnderTest, key: str, data: bytes) -> bytes:
    """Write over an object of the store. Returns what was there."""
    before = bytes(stack.objects().get_object("healchain", key).read())
    stack.objects().put_object("healchain", key, io.BytesIO(data), len(data))
    return before
