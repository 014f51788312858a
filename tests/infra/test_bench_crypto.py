"""The benchmark of the cryptography: how rows are judged and written, how peers are asked, and that sums are checked."""

import sys
from pathlib import Path

import numpy as np
import pytest

from infra import bench_crypto, bench_wire
from infra.bench_crypto import (
    START,
    Client,
    KeyPair,
    Peer,
    PeerFailed,
    Server,
    Shape,
    Sizes,
    alternate,
    own_aggregation,
    wire_rows,
)
from infra.rows import END, Row, figure, markdown, parse_goal, refreshed
from tasks.crypto import ndd_fe

SLOWER, FASTER = Row("encrypt", 2.0, "M/s", None, "peer", 4.0), Row("encrypt", 4.0, "M/s", None, "peer", 2.0)


def test_more_is_better_for_rates_and_less_for_times_and_sizes():
    assert (FASTER.ratio, SLOWER.ratio) == (2, 0.5)
    assert Row("two threads", 1.8, "x", None, "peer", 0.9).ratio == 2
    assert [Row("r", 4.0, unit, None, "peer", 2.0).ratio for unit in ("ns", "ms", "B/parameter")] == [0.5] * 3
    assert Row("alone", 4.0, "ms").ratio is None


@pytest.mark.parametrize(
    ("row", "missing"),
    [
        (Row("r", 3.3, "M/s", ">= 3.3"), None),
        (Row("r", 3.0, "M/s", ">= 4"), 0.25),
        (Row("r", 50.0, "ns", "<= 50"), None),
        (Row("r", 60.0, "ns", "<= 50"), 0.2),
        (Row("r", 2.0, "M/s", "ratio >= 2", "peer", 1.0), None),
        (Row("r", 30.0, "ms", "ratio >= 1", "peer", 15.0), 0.5),
        (Row("r", 1.0, "ms"), None),
    ],
)
def test_a_missed_goal_says_by_how_much(row, missing):
    assert row.shortfall() == (None if missing is None else pytest.approx(missing))


def test_a_goal_of_the_ratio_needs_a_peer():
    with pytest.raises(ValueError, match="encrypt: the goal 'ratio >= 1' needs a peer's figure"):
        Row("encrypt", 1.0, "ms", "ratio >= 1").shortfall()


@pytest.mark.parametrize("goal", ["3.3", "> 3", ">= fast", "ratio 2", ">= 3.3 M/s", ""])
def test_a_goal_of_another_form_is_refused(goal):
    with pytest.raises(ValueError, match="expected for example"):
        parse_goal(goal)


def test_a_record_has_every_field_and_four_digits():
    assert Row("encrypt", 3.141592, "M/s", ">= 3.3", "peer", 0.02718281).record() == {
        "name": "encrypt",
        "value": 3.142,
        "unit": "M/s",
        "goal": ">= 3.3",
        "peer": "peer",
        "peer_value": 0.02718,
        "ratio": 115.6,
    }
    alone = Row("verify", 0.123456, "ms").record()
    assert [alone[name] for name in ("value", "goal", "peer", "peer_value", "ratio")] == [
        0.1235,
        None,
        None,
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(0.012345, "0.0123"), (12.345, "12.3"), (999.4, "999"), (1234.5, "1 234"), (2e6, "2 000 000")]
)
def test_a_figure_has_no_exponent_and_keeps_thousands_apart(value, text):
    assert figure(value) == text


def test_the_table_shows_what_is_missed_and_what_is_reached():
    head, line, missed, reached = markdown(
        [Row("slow", 60.0, "ns", "<= 50"), Row("fast", 4.0, "M/s", "ratio >= 1", "peer", 2.0)]
    ).splitlines()
    assert missed == "| slow | 60 ns | <= 50 | missed by 20 % |  |  |  |"
    assert reached == "| fast | 4 M/s | ratio >= 1 | reached | peer | 2 M/s | 2x |"
    assert {text.count("|") for text in (head, line, missed, reached)} == {8}


def test_only_the_block_of_figures_is_written_again():
    document = f"before\n\n{START}\nold figures\n{END}\n\nafter\n"
    once = refreshed(document, START, "figures")
    assert once == f"before\n\n{START}\n\nfigures\n\n{END}\n\nafter\n"
    assert refreshed(once, START, "figures") == once


@pytest.mark.parametrize(
    "document", ["", START, END, f"{END}\n{START}", f"{START}{END}{START}{END}", f"{START}{START}{END}"]
)
def test_a_document_without_the_two_marks_is_refused(document):
    with pytest.raises(ValueError, match="once each"):
        refreshed(document, START, "figures")


def test_the_document_has_the_two_marks():
    document = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    assert "| encrypt |" in refreshed(document, START, markdown([FASTER]))


def test_works_take_turns_and_the_first_turn_does_not_count():
    order = []

    def work(name, *seconds):
        left = list(seconds)

        def spend():
            order.append(name)
            return left.pop(0)

        return spend

    assert alternate(3, work("ours", 100, 1, 9, 2), work("theirs", 100, 4, 5, 6)) == [2, 5]
    assert order == ["ours", "theirs"] * 4


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder of peers' programs with the real loop that answers them."""
    (tmp_path / "answering.py").write_text((bench_crypto.PEERS / "answering.py").read_text())
    monkeypatch.setattr(bench_crypto, "PEERS", tmp_path)
    return tmp_path


def test_a_peer_answers_job_after_job_whatever_its_libraries_print(programs):
    (programs / "doubling.py").write_text(
        "from answering import answer\n"
        "def double(count):\n"
        "    print('a library is chatty')\n"
        "    return {'seconds': 2 * count}\n"
        "answer({'double': double})\n"
    )
    with Peer(Path(sys.executable), "doubling") as peer:
        assert peer.ask("double", count=4) == {"seconds": 8}
        assert peer.timed("double", 5)() == 2


def test_a_peer_that_ends_is_an_error_with_its_last_words(programs):
    (programs / "broken.py").write_text("raise SystemExit('no such curve')\n")
    with Peer(Path(sys.executable), "broken") as peer, pytest.raises(PeerFailed, match=r"broken\.py .*no such curve"):
        peer.ask("encrypt", count=1)


def test_the_requirements_of_peers_are_exact():
    lines = (bench_crypto.PEERS / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins
    assert all(line.count("==") == 1 for line in pins)


def test_one_in_ten_drops_out_and_at_least_one():
    assert [Shape(10, clients).dropped for clients in (5, 19, 50)] == [1, 1, 5]
    assert str(Shape(1_000_000, 50)) == "1 000 000 parameters, 50 clients"


def test_a_whole_aggregation_is_measured_part_by_part():
    spent = own_aggregation(Shape(300, 5))
    assert all(value > 0 for value in spent.values())
    assert spent["publisher's key"] + spent["decoding"] < spent["server"] == spent["server and decryption"]
    assert 48 < spent["bytes"] < 48.1


@pytest.fixture
def submitted():
    """Three clients' values and what they send."""
    publisher, aggregator, *keys = (KeyPair.number(index) for index in range(5))
    values = np.random.default_rng(0).integers(-100, 101, (3, 40))
    clients = [Client(key, publisher, aggregator, 1) for key in keys]
    sent = [client.submit(row, 0) for client, row in zip(clients, values, strict=True)]
    return values, sent, (keys, publisher, aggregator, 1)


def test_the_server_opens_the_sum_of_those_who_stayed(submitted):
    values, sent, parties = submitted
    server = Server(range(1, 3), *parties)
    server.open(sent, values, 0)
    assert server.seconds == server.key_s + server.decode_s + server.sum_s
    assert min(server.key_s, server.decode_s, server.sum_s, server.verify_s) > 0


def test_a_sum_that_is_not_the_values_stops_the_benchmark(submitted):
    values, sent, parties = submitted
    with pytest.raises(AssertionError, match="not the sum of the values"):
        Server(range(3), *parties).open(sent, values + 1, 0)


def test_another_clients_ciphertext_opens_nothing(submitted):
    values, sent, parties = submitted
    with pytest.raises(ndd_fe.OutOfBound):
        Server(range(3), *parties).open([*sent[:2], sent[0]], values, 0)


def test_both_forms_of_points_are_measured_at_each_dimension():
    sizes = Sizes(1, 1, (Shape(50, 5), Shape(70, 5), Shape(50, 50)))
    rows = wire_rows(sizes)
    parts = ["encode", "decode", "SHA-256", "encode and store", "read, hash and decode"]
    assert [row.name for row in rows] == [f"{d} parameters: points, {part}" for d in (50, 70) for part in parts]
    assert all(row.value > 0 and row.peer_value > 0 for row in rows)


def test_both_forms_of_points_refuse_the_same():
    with bench_wire.wire(3) as points:
        for form in points.forms:
            data = form.encode(points.chunks[0])
            assert (form.decode(data) == points.chunks[0]).all()
            with pytest.raises(ndd_fe.InvalidEncoding, match="point 2 is not"):
                form.decode(data[:-1] + bytes([data[-1] ^ 1]))


def test_turns_are_summed_up_by_their_medians():
    turns = [{"client": 3.0, "bytes": 8.0}, {"client": 1.0, "bytes": 8.0}, {"client": 2.0, "bytes": 8.0}]
    assert bench_crypto.medians(turns) == {"client": 2.0, "bytes": 8.0}
