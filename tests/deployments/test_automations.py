"""The rules that look after runs: registered once, brought up to date, and no address or key to be read from them."""

import json
from collections.abc import Iterator
from datetime import timedelta

import pytest
from prefect.automations import Automation
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.actions import CallWebhook, ChangeFlowRunState
from prefect.server.utilities.user_templates import render_user_template_sync
from prefect.states import Cancelled, Failed, Late
from pydantic import SecretStr

from deployments.automations import REPORT, WEBHOOK, register_automations

LATE = Late()
ADDRESS = SecretStr("http://127.0.0.1:4999/reports?key=4f1d")


@pytest.fixture(scope="module")
def client() -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as opened:
        yield opened
        # The server is that of the whole test run, whose other tests' runs are not to be looked after.
        for rule in rules(opened).values():
            opened._client.delete(f"/automations/{rule.id}").raise_for_status()


def rules(client: SyncPrefectClient) -> dict[str, Automation]:
    found = client._client.post("/automations/filter", json={}).json()
    assert len({one["name"] for one in found}) == len(found)
    return {one["name"]: Automation.model_validate(one) for one in found}


def test_the_rules_are_registered_once_and_brought_up_to_date(client):
    names = register_automations(ADDRESS)
    first = rules(client)
    assert sorted(first) == sorted(names)
    assert register_automations(ADDRESS, limit_s=1800) == names
    second = rules(client)
    assert {name: rule.id for name, rule in first.items()} == {name: rule.id for name, rule in second.items()}
    assert second["healchain: stuck"].trigger.within == timedelta(minutes=30)


def test_a_silent_run_is_put_back_and_a_failed_one_is_reported(client):
    register_automations(ADDRESS)
    found = rules(client)
    (aside,), (back,) = found["healchain: silent"].actions, found["healchain: returned"].actions
    (report,) = found["healchain: failed"].actions
    assert isinstance(aside, ChangeFlowRunState)
    assert isinstance(back, ChangeFlowRunState)
    assert found["healchain: returned"].trigger.expect == {f"prefect.flow-run.{aside.name}"}
    assert (back.state.value, back.name) == ("SCHEDULED", "AwaitingRetry")
    assert not aside.force  # the server pauses no run that has ended
    assert isinstance(report, CallWebhook)
    assert str(report.block_document_id) == str(Webhook.load(WEBHOOK)._block_document_id)


@pytest.mark.parametrize(
    ("state", "remedy"), [(Failed(), "healchain resume task-1"), (Cancelled(), "healchain resume task-1"), (LATE, "")]
)
def test_a_report_of_a_run_that_is_over_names_the_command_that_goes_on(state, remedy):
    run = {"id": "1", "name": "task-1", "state": state}
    report = json.loads(
        render_user_template_sync(REPORT, {"automation": {"name": "healchain: failed"}, "flow_run": run})
    )
    assert (report["task"], report["remedy"]) == ("task-1", remedy)


def test_the_address_of_reports_is_kept_masked(client):
    register_automations(ADDRESS)
    everything = json.dumps(client._client.post("/block_documents/filter", json={}).json())
    everything += json.dumps(client._client.post("/automations/filter", json={}).json())
    assert WEBHOOK in everything
    assert "4f1d" not in everything


def test_without_an_address_a_report_is_an_event_alone(client):
    register_automations()
    assert [action.type for action in rules(client)["healchain: failed"].actions] == ["do-nothing"]
