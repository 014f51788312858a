"""One task from publication to payment: the only place where the order of the steps is written."""

from prefect import flow

from contracts.messages import ZERO32, TaskIdOrNone
from contracts.task_spec import TaskSpec
from tasks.dispatch import ask, ask_each, conclude, conduct, give_up_after, reachable, run_name, task_states


@flow(name="run-task", flow_run_name=run_name, persist_result=False)
def run_task(spec: TaskSpec, publisher: str = "publisher", task_id: TaskIdOrNone = "", follow_on: bool = False) -> str:
    """M1..M7. Returns where the task's money ended: PAID, REFUNDED or REFUNDABLE.

    Args:
        spec: the public terms. The required accuracy is not among them: it is in the publisher's home (healchain approve).
        publisher: the name of the publisher whose home the task's worker serves.
        task_id: leave it empty for a new task; the id of one to go on with it.
        follow_on: start from the last published model of the tasks of this name, one of them at a time: SKIPPED while
            another is under way, and one that its run has left unfinished is ended first.
    """
    task_id, spec = conduct(publisher, task_id, spec, follow_on=follow_on)
    if not task_id:
        return "SKIPPED"
    limit, vote_limit = spec.rounds.contribution_timeout_s, spec.rounds.attestation_timeout_s

    miners, aggregator = (), None
    with task_states(task_id):
        ask(publisher, "publish", task_id=task_id, spec=spec)  # M1
        applicants = ask_each(reachable("miner"), "register", task_id=task_id, timeout_s=limit)  # M2
        ask(publisher, "challenge", task_id=task_id)
        ask_each([one.miner for one in applicants], "prove-dataset", task_id=task_id, timeout_s=limit)
        cohort = ask(publisher, "form-cohort", task_id=task_id)  # M2, 2.1, 2.3
        miners, aggregator = cohort.miners, cohort.aggregator

        for r in range(1, spec.rounds.max_rounds + 1):
            ask_each(miners, "contribute", task_id=task_id, round_number=r, timeout_s=limit)  # M3
            ask(aggregator, "collect", task_id=task_id, round_number=r)  # M4
            ask(publisher, "grant-audit", task_id=task_id, round_number=r)
            ask(aggregator, "audit", task_id=task_id, round_number=r)
            ask(publisher, "derive-key", task_id=task_id, round_number=r)  # 2.2
            result = ask(aggregator, "aggregate", task_id=task_id, round_number=r)  # M4
            if result.candidate != ZERO32:
                ask_each([publisher], "open-validation", task_id=task_id, round_number=r, timeout_s=vote_limit)  # M5
                ask_each(miners, "attest", task_id=task_id, round_number=r, timeout_s=vote_limit)  # M5
                ask(aggregator, "publish-block", task_id=task_id, round_number=r)  # M6
                ask_each([publisher], "reveal-accuracy", task_id=task_id, timeout_s=vote_limit)  # M7
                ask_each([aggregator], "reveal-accuracy-instead", task_id=task_id, timeout_s=vote_limit)
                ask_each(miners, "reveal-score", task_id=task_id, timeout_s=vote_limit)
                ask_each([publisher], "withdraw", task_id=task_id, timeout_s=vote_limit)
                ask_each(miners, "withdraw", task_id=task_id, timeout_s=vote_limit)
                return conclude(task_id)
        give_up_after(task_id, spec.rounds.max_rounds)

    ask_each([aggregator] if aggregator else [], "resign", task_id=task_id, timeout_s=vote_limit)  # M7
    ask_each([publisher], "refund", task_id=task_id, timeout_s=vote_limit)
    ask_each(miners, "compensation", task_id=task_id, timeout_s=vote_limit)
    return conclude(task_id)
