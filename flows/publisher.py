"""What the publisher does: publish (M1), form the cohort (M2), derive keys (2.2), open (M5), reveal or refund (M7)."""

from prefect import flow

from contracts.messages import TaskId
from contracts.task_spec import TaskSpec
from tasks import attest, cohort, keys, settle
from tasks import publish as publishing


@flow(name="publish", flow_run_name="M1 publish · {task_id} · {actor}", persist_result=False)
def publish(task_id: TaskId, round_number: int, spec: TaskSpec, actor: str) -> dict[str, str]:
    """M1. Commit, lock the reward, read it back, announce."""
    return publishing.lock_reward(task_id, spec, actor)


@flow(name="challenge", flow_run_name="M2 challenge · {task_id} · {actor}", persist_result=False)
def challenge(task_id: TaskId, round_number: int, actor: str) -> dict[str, str]:
    """M2. Choose the leaves that each applicant must open."""
    return cohort.challenge_applicants(task_id, actor)


@flow(name="form-cohort", flow_run_name="M2 form cohort · {task_id} · {actor}", persist_result=False)
def form_cohort(task_id: TaskId, round_number: int, actor: str) -> dict[str, str]:
    """M2, 2.1, 2.3. Admit, close, draw the aggregator, deliver to it."""
    formed = cohort.admit_and_draw(task_id, actor)
    cohort.deliver_to_aggregator(task_id, actor)
    return formed


@flow(
    name="grant-audit", flow_run_name="M4 audit keys · {task_id} · round {round_number} · {actor}", persist_result=False
)
def grant_audit(task_id: TaskId, round_number: int, actor: str) -> dict[str, str]:
    """M4. Keys for the announced audit projections of what was collected."""
    return keys.grant_audit(task_id, round_number, actor)


@flow(
    name="derive-key", flow_run_name="M4 derive key · {task_id} · round {round_number} · {actor}", persist_result=False
)
def derive_key(task_id: TaskId, round_number: int, actor: str) -> dict[str, str]:
    """2.2. The functional key of this round, for exactly those who submitted."""
    return keys.derive_round_key(task_id, round_number, actor)


@flow(
    name="open-validation",
    flow_run_name="M5 open validation · {task_id} · round {round_number} · {actor}",
    persist_result=False,
)
def open_validation(task_id: TaskId, round_number: int, actor: str) -> dict[str, str]:
    """M5. Seal the validation set to each voter, where the task says so."""
    return attest.open_validation_to_voters(task_id, round_number, actor)


@flow(name="reveal-accuracy", flow_run_name="M7 reveal accuracy · {task_id} · {actor}", persist_result=False)
def reveal_accuracy(task_id: TaskId, round_number: int, actor: str) -> dict[str, str]:
    """M7. Open the commitment to the required accuracy."""
    return settle.open_accuracy(task_id, actor)


@flow(name="refund", flow_run_name="M7 refund · {task_id} · {actor}", persist_result=False)
def refund(task_id: TaskId, round_number: int, actor: str) -> dict[str, str]:
    """M7. Take the reward back after the deadline, if no block was published."""
    return settle.take_refund(task_id, actor)
