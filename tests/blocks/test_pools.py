"""How long a scheduler is waited for, and what it says when it is not; the rest is shown on a real stack (tests/faults)."""

import httpx
import pytest
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Completed, Scheduled

from blocks import pools
from blocks.pools import PoolsUnavailable, _patiently, _seen

REQUEST = httpx.Request("GET", "http://127.0.0.1:1/api")


def answered(status: int) -> PrefectHTTPStatusError:
    return PrefectHTTPStatusError(str(status), request=REQUEST, response=httpx.Response(status, request=REQUEST))


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools.time, "sleep", lambda _: None)


@pytest.mark.parametrize("error", [httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), answered(503)])
def test_a_server_that_restarts_is_waited_for(error):
    failures = [error, error, error]

    def call() -> str:
        if failures:
            raise failures.pop()
        return "answer"

    assert _patiently(call, "ask") == "answer"


def test_a_server_that_stays_away_is_given_up(monkeypatch):
    clock = iter(range(0, 100_000, 400))
    monkeypatch.setattr(pools.time, "monotonic", lambda: next(clock))

    def call() -> None:
        raise httpx.ConnectError("refused")

    with pytest.raises(PoolsUnavailable, match="cannot ask: ConnectError: refused"):
        _patiently(call, "ask")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (answered(401), "refuses the credentials .PREFECT_API_AUTH_STRING."),
        (answered(403), "refuses the credentials"),
        (answered(409), "cannot ask: PrefectHTTPStatusError: 409"),
        (ObjectNotFound(answered(404)), "does not know it. Register the deployments first"),
    ],
)
def test_what_waiting_does_not_mend_is_said_at_once(error, message):
    calls = []

    def call() -> None:
        calls.append(1)
        raise error

    with pytest.raises(PoolsUnavailable, match=message):
        _patiently(call, "ask")
    assert len(calls) == 1


def test_a_run_is_seen_as_the_scheduler_has_it(monkeypatch):
    now = pools.datetime.now(pools.UTC)
    monkeypatch.setattr(pools, "server_now", lambda: now)
    later = _seen("id", Scheduled(scheduled_time=now + pools.timedelta(seconds=90), message="the refund"))
    assert (later.state, later.message, round(later.due_in_s)) == ("Scheduled", "the refund", 90)
    assert not later.has_ended
    done = _seen("id", Completed())
    assert done.is_done
    assert done.has_ended
    assert done.due_in_s == 0
