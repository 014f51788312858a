"""The rules by which a Prefect server looks after runs by itself. Doing it again changes nothing.

silent     a run whose process has begun, and of which nothing is heard for SILENCE_S, goes back to its queue: the process was
           killed together with its worker, or its host is gone or cut off. A live worker takes it, and finds what was done
failed     a task's run that failed, crashed or finds no worker is reported
stuck      a task's run that works for longer than its limit is reported; waiting for chain time is not work

A report is a POST of a JSON object to an address of the operator's own, kept in the block `healchain-reports`: loopback or the
local network will do. Without an address the rule's firing is an event in the server's feed, and nothing else.

Heartbeats are those of infra.step_process: with the server's time in them, a host whose clock is off is not taken for silent.
"""

from datetime import timedelta
from typing import Any

from prefect.automations import Automation
from prefect.blocks.webhook import Webhook
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState, DoNothing
from prefect.events.schemas.automations import EventTrigger, Posture, ResourceSpecification
from pydantic import SecretStr

SILENCE_S = 40
"""Four heartbeats: one that is lost or late is not yet silence; with the server's look every 5 s, noticed within a minute."""
LIMIT_S = 6 * 3600
"""A task may be at work for so long before it is reported, unless the operator says otherwise."""
BODY_ENDED = "healchain.run.body-ended"
"""What a step's process says last. A server that was restarted in the middle of a run holds back the events of the run's states
for a quarter of an hour, because it has not seen those before them; it does so with no other event."""
RUNS = {"prefect.resource.id": "prefect.flow-run.*"}
OF_A_TASK = {"prefect.resource.role": "flow", "prefect.resource.name": "run-task"}
WITH_A_HOST = {"prefect.resource.role": "deployment", "prefect.resource.id": "prefect.deployment.*"}
ENDED = ("Completed", "Failed", "Crashed", "Cancelled", "TimedOut")
PUT_OFF = ("Scheduled", "Waiting", "AwaitingRetry", "Late", "Paused", "Suspended")
WEBHOOK = "healchain-reports"
REPORT = (
    '{"rule": {{ automation.name | tojson }}, "task": {{ flow_run.name | tojson }}, "run": "{{ flow_run.id }}", '
    '"state": {{ flow_run.state.name | tojson }}, "message": {{ (flow_run.state.message or "") | tojson }}}'
)


def register_automations(report_to: SecretStr | None = None, *, limit_s: float = LIMIT_S) -> list[str]:
    """Create the rules, or bring them up to date; their names. report_to: an http(s) address, which may hold a key."""
    report = _report(report_to)
    rules = [
        Automation(name="healchain: silent", description=SILENT, trigger=_silent(), actions=[_give_back()]),
        Automation(name="healchain: failed", description=FAILED, trigger=_failed(), actions=[report]),
        Automation(name="healchain: stuck", description=STUCK, trigger=_stuck(limit_s), actions=[report]),
    ]
    for rule in rules:
        _register(rule)
    return [rule.name for rule in rules]


SILENT = "A run whose host is silent goes back to its queue, and a live worker takes it."
FAILED = "A task's run failed, crashed, or finds no worker: tell the operator."
STUCK = "A task's run works for longer than its limit: tell the operator."


def _silent() -> EventTrigger:
    """After each sign of life of a run's process the next one is expected in time, unless it was the last.

    By none of the run's states alone: one that is held back would begin a watch over a run that has ended.
    """
    return EventTrigger(
        match=ResourceSpecification(RUNS),
        match_related=ResourceSpecification(WITH_A_HOST),
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.heartbeat", BODY_ENDED, *_states(*ENDED, *PUT_OFF)},
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=SILENCE_S),
    )


def _give_back() -> ChangeFlowRunState:
    return ChangeFlowRunState(
        name="AwaitingRetry",
        state=StateType.SCHEDULED,
        message=f"nothing was heard of its host for {SILENCE_S} s",
        force=True,
    )


def _failed() -> EventTrigger:
    return EventTrigger(
        match=ResourceSpecification(RUNS),
        match_related=ResourceSpecification(OF_A_TASK),
        expect=_states("Failed", "Crashed", "Late"),
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
        within=timedelta(0),
    )


def _stuck(limit_s: float) -> EventTrigger:
    return EventTrigger(
        match=ResourceSpecification(RUNS),
        match_related=ResourceSpecification(OF_A_TASK),
        after=_states("Running"),
        expect=_states(*ENDED, *PUT_OFF),
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=limit_s),
    )


def _states(*names: str) -> set[str]:
    return {f"prefect.flow-run.{name}" for name in names}


def _report(address: SecretStr | None) -> CallWebhook | DoNothing:
    if address is None:
        return DoNothing()
    saved = Webhook(method="POST", url=address).save(WEBHOOK, overwrite=True)
    return CallWebhook(block_document_id=saved, payload=REPORT)


def _register(rule: Automation) -> None:
    try:
        found: Any = Automation.read(name=rule.name)
    except ValueError:  # what Prefect raises when there is none of this name
        rule.create()
        return
    rule.id = found.id
    rule.update()
