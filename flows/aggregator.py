"""What the drawn aggregator does beside its work as a miner: aggregate (M4), publish (M6), reveal in P's stead (M7)."""

from prefect import flow

from contracts.messages import TaskId
from tasks import aggregate as aggregating
from tasks import opening, settle


@flow(name="collect", flow_run_name="M4 collect · {task_id} · round {round_number} · {actor}", persist_result=False)
def collect(task_id: TaskId, round_number: int, actor: str) -> dict[str, str]:
    """M4. Check the form of the submissions, close the round."""
    return aggregating.collect_submissions(task_id, round_number, actor)


@flow(name="audit", flow_run_name="M4 audit · {task_id} · round {round_number} · {actor}", persist_result=False)
def audit(task_id: TaskId, round_number: int, actor: str) -> dict[str, str]:
    """M4. Drop malformed ciphertexts, ask for the functional key of exactly the others."""
    return aggregating.audit_submissions(task_id, round_number, actor)


@flow(name="aggregate", flow_run_name="M4 aggregate · {task_id} · round {round_number} · {actor}", persist_result=False)
def aggregate(task_id: TaskId, round_number: int, actor: str) -> dict[str, str]:
    """M4. Open the weighted sum on the actor's workers, make the next model, evaluate it, propose a block if it is good."""
    groups = opening.plan_opening(task_id, round_number, actor)
    outcomes = opening.open_in_groups(task_id, round_number, groups, actor)
    return aggregating.finish_round(task_id, round_number, outcomes, actor)


@flow(
    name="publish-block",
    flow_run_name="M6 publish block · {task_id} · round {round_number} · {actor}",
    persist_result=False,
)
def publish_block(task_id: TaskId, round_number: int, actor: str) -> dict[str, str]:
    """M6. Publish the candidate with the votes for it."""
    return settle.publish_voted_block(task_id, round_number, actor)


@flow(name="reveal-accuracy-instead", flow_run_name="M7 reveal accuracy · {task_id} · {actor}", persist_result=False)
def reveal_accuracy_instead(task_id: TaskId, round_number: int, actor: str) -> dict[str, str]:
    """M7. Open the publisher's commitment when the publisher stays silent."""
    return settle.open_accuracy_instead(task_id, actor)


@flow(name="resign", flow_run_name="M7 resign · {task_id} · {actor}", persist_result=False)
def resign(task_id: TaskId, round_number: int, actor: str) -> dict[str, str]:
    """M7. Give up the turn of a task that ends without a block."""
    return settle.resign_turn(task_id, actor)
