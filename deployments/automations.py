"""The rules by which a Prefect server looks after runs by itself. Doing it again changes nothing.

silent     a run at work on a host, of which nothing is heard for SILENCE_S, is put into the state Silent: its process was killed
           together with its worker, or its host is gone or cut off. The server pauses only what is at work, so that a run
           that has ended stays as it is, should its last event be lost or late
returned   a silent run goes back to its queue at once: a live worker takes it, and finds what was done
failed     a task's run that failed, crashed, was cancelled or finds no worker is reported, with the command that goes on
stuck      a task's run that works for longer than its limit is reported; waiting for chain time is not work

A report is a POST of a JSON object to an address of the operator's own, kept in the block `healchain-reports`: loopback or the
local network will do. Without an address the rule's firing is an event in the server's feed, and nothing else.

Heartbeats are those of infra.step_process: with the server's time in them, a host whose clock is off is not taken for silent.
"""

from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.automations import Automation
from prefect.blocks.webhook import Webhook
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState, DoNothing
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from pydantic import SecretStr

Match = dict[str, str | list[str]]
SILENCE_S = 40
"""Four heartbeats: one that is lost or late is not yet silence; with the server's look every 5 s, noticed within a minute."""
LIMIT_S = 6 * 3600
"""A task may be at work for so long before it is reported, unless the operator says otherwise."""
RUNS: Match = {"prefect.resource.id": "prefect.flow-run.*"}
OF_A_TASK: Match = {"prefect.resource.role": "flow", "prefect.resource.name": "run-task"}
WITH_A_HOST: Match = {"prefect.resource.role": "deployment", "prefect.resource.id": "prefect.deployment.*"}
ENDED = ("Completed", "Failed", "Crashed", "Cancelled", "TimedOut")
PUT_OFF = ("Scheduled", "Waiting", "AwaitingRetry", "Late", "Paused", "Silent", "Suspended")
WEBHOOK = "healchain-reports"
REPORT = (
    '{"rule": {{ automation.name | tojson }}, "task": {{ flow_run.name | tojson }}, "run": "{{ flow_run.id }}", '
    '"state": {{ flow_run.state.name | tojson }}, "message": {{ (flow_run.state.message or "") | tojson }}, '
    '"remedy": {{ ("healchain resume " ~ flow_run.name if flow_run.state.name in ["Failed", "Crashed", "Cancelled"] '
    'else "") | tojson }}}'
)
"""Runs of tasks are called by their tasks. A late run is still to begin: what it lacks is a worker."""


def register_automations(report_to: SecretStr | None = None, *, limit_s: float = LIMIT_S) -> list[str]:
    """Create the rules, or bring them up to date; their names. report_to: an http(s) address, which may hold a key."""
    report = _report(report_to)
    rules = [
        Automation(name="healchain: silent", description=SILENT, trigger=_silent(), actions=[_set_aside()]),
        Automation(name="healchain: returned", description=RETURNED, trigger=_set_silent(), actions=[_give_back()]),
        Automation(name="healchain: failed", description=FAILED, trigger=_failed(), actions=[report]),
        Automation(name="healchain: stuck", description=STUCK, trigger=_stuck(limit_s), actions=[report]),
    ]
    for rule in rules:
        _register(rule)
    return [rule.name for rule in rules]


SILENT = "Nothing is heard of a run's host: it is set aside."
RETURNED = "A silent run goes back to its queue, and a live worker takes it."
FAILED = "A task's run failed, crashed, was cancelled, or finds no worker: tell the operator."
STUCK = "A task's run works for longer than its limit: tell the operator."


def _silent() -> EventTrigger:
    """After each sign of life of a run on a host, the next one, or its end, is expected in time."""
    return EventTrigger(
        match=ResourceSpecification(RUNS),
        match_related=ResourceSpecification(WITH_A_HOST),
        after={"prefect.flow-run.heartbeat", *_states("Running")},  # it may be killed before its first heartbeat
        expect={"prefect.flow-run.heartbeat", *_states(*ENDED, *PUT_OFF)},
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=SILENCE_S),
    )


def _set_aside() -> ChangeFlowRunState:
    return ChangeFlowRunState(
        name="Silent", state=StateType.PAUSED, force=False, message=f"nothing was heard of its host for {SILENCE_S} s"
    )


def _set_silent() -> EventTrigger:
    return EventTrigger(
        match=ResourceSpecification(RUNS),
        expect=_states("Silent"),
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
        within=timedelta(0),
    )


def _give_back() -> ChangeFlowRunState:
    message = f"nothing was heard of its host for {SILENCE_S} s: begun again by the next worker of its queue"
    return ChangeFlowRunState(name="AwaitingRetry", state=StateType.SCHEDULED, force=False, message=message)


def _failed() -> EventTrigger:
    return EventTrigger(
        match=ResourceSpecification(RUNS),
        match_related=ResourceSpecification(OF_A_TASK),
        expect=_states("Failed", "Crashed", "Cancelled", "Late"),
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
    assert isinstance(saved, UUID)  # a coroutine only where an event loop runs
    return CallWebhook(block_document_id=saved, payload=REPORT)


def _register(rule: Automation) -> None:
    try:
        found: Any = Automation.read(name=rule.name)
    except ValueError:  # what Prefect raises when there is none of this name
        rule.create()
        return
    rule.id = found.id
    rule.update()
