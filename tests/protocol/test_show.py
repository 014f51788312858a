"""What is drawn and sent for the Prefect UI, beside whole runs (test_run)."""

import re
import socket
import time
from collections.abc import Iterator
from uuid import uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient

from tasks import show


def heights(picture: str) -> list[float]:
    return [float(found) for found in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', picture)]


def test_the_curve_rises_with_the_accuracy_and_stays_in_the_picture():
    drawn = heights(show.curve([(1, 0.31), (2, 0.62), (3, 0.93)], 0.9))
    assert drawn == sorted(drawn, reverse=True)
    assert all(0 < height < show.HEIGHT - show.BOTTOM for height in drawn)
    assert drawn[0] - drawn[1] == pytest.approx(drawn[1] - drawn[2], abs=0.2)


@pytest.mark.parametrize(
    "points", [[(1, 0.0)], [(1, 1.0)], [(1, 1.0), (2, 1.0)], [(n, n / 400) for n in range(1, 301)]]
)
def test_a_curve_of_any_accuracies_is_drawn(points):
    picture = show.curve(points, None)
    assert len(heights(picture)) == len(points)
    assert "required" not in picture
    assert "nan" not in picture.lower()


def test_the_required_accuracy_is_a_dashed_line_at_its_height():
    picture = show.curve([(1, 0.5), (2, 0.75)], 0.75)
    line = re.search(r'<path d="M56 ([\d.]+)H\d+" stroke="#c2410c" stroke-dasharray', picture)
    assert line is not None
    assert float(line[1]) == heights(picture)[1]
    assert "required 75.00%" in picture


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/api"


def test_a_server_that_does_not_answer_holds_no_step_up(silent_server):
    client, bar = SyncPrefectClient(silent_server), show._Bar(uuid4(), "progress-x")
    began_s = time.monotonic()
    for part in range(100):
        bar.tell(client, part / 100, "encrypting")
    assert time.monotonic() - began_s < 1
    bar.tell(client, 1.0, "encrypting")
    assert time.monotonic() - began_s < 2 * show.PATIENCE_S + 1


def test_outside_a_run_nothing_is_made():
    show.show_progress(0.5, "training")
    show.tag_run("x", "task:x")


def test_amounts_are_read_in_their_unit():
    assert show._money(10**18, show.ZERO_ADDRESS) == "1 ether"
    assert show._money(999, show.ZERO_ADDRESS) == "999 wei"
    assert "token 0x12" in show._money(5, "0x12")
    assert show._cell("a|b\nc") == "a\\|b c"
