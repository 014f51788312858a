"""What a miner does: join (M2), contribute (M3), attest (M5), reveal and withdraw (M7)."""

from prefect import flow

from contracts.messages import TaskId
from tasks import attest as attesting
from tasks import cohort, settle
from tasks import contribute as contributing


@flow(name="register", flow_run_name="M2 register · {task_id} · {actor}", persist_result=False)
def register(task_id: TaskId, round_number: int, actor: str) -> dict[str, str]:
    """M2. Check the own data, stake, register."""
    return cohort.apply_for_task(task_id, actor)


@flow(name="prove-dataset", flow_run_name="M2 prove data · {task_id} · {actor}", persist_result=False)
def prove_dataset(task_id: TaskId, round_number: int, actor: str) -> dict[str, str]:
    """M2. Open the challenged leaves of the dataset proof."""
    return cohort.answer_challenge(task_id, actor)


@flow(
    name="contribute", flow_run_name="M3 contribute · {task_id} · round {round_number} · {actor}", persist_result=False
)
def contribute(task_id: TaskId, round_number: int, actor: str) -> dict[str, str]:
    """M3. Train, compress, score, encrypt, submit."""
    contributing.train_locally(task_id, round_number, actor)
    return contributing.encrypt_and_submit(task_id, round_number, actor)


@flow(name="attest", flow_run_name="M5 attest · {task_id} · round {round_number} · {actor}", persist_result=False)
def attest(task_id: TaskId, round_number: int, actor: str) -> dict[str, str]:
    """M5. Check the candidate, sign the verdict."""
    return attesting.judge_candidate(task_id, round_number, actor)


@flow(name="reveal-score", flow_run_name="M7 reveal score · {task_id} · {actor}", persist_result=False)
def reveal_score(task_id: TaskId, round_number: int, actor: str) -> dict[str, str]:
    """M7. Open the own score commitment."""
    return settle.open_score(task_id, actor)


@flow(name="withdraw", flow_run_name="M7 withdraw · {task_id} · {actor}", persist_result=False)
def withdraw(task_id: TaskId, round_number: int, actor: str) -> dict[str, str]:
    """M7. Have the rewards distributed, take the own one. Publisher and aggregator do the same."""
    return settle.distribute_and_withdraw(task_id, actor)


@flow(name="compensation", flow_run_name="M7 compensation · {task_id} · {actor}", persist_result=False)
def compensation(task_id: TaskId, round_number: int, actor: str) -> dict[str, str]:
    """M7. Take the own part of what a silent aggregator loses."""
    return settle.take_compensation(task_id, actor)
